"""The causality gate must be able to fail: mixers that leak, each in a known way."""
import argparse
import contextlib
import dataclasses
import inspect
import io
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import afno  # noqa: E402
import kernels.loss  # noqa: E402
import runtime  # noqa: E402
import test_causality  # noqa: E402
import train_gpt2_afno  # noqa: E402
from afno import AFNO1D, causal_conv, complex_linear, complex_relu, complex_soft_shrink
from data.text_to_bin import InputError
from runtime import Runtime
from test_causality import (check_causality, check_family, check_generation, check_head,
                            check_model, gradient_leaks, moved_weights, refuse_leaks)
from train_gpt2_afno import GPT, MLP, CausalSelfAttention, Gates, GPTConfig, Head

CONFIG = GPTConfig(**{**test_causality.SMALL, "n_layer": 2}, sequence_length=96)
RICH = dataclasses.replace(CONFIG, attn_layers=(0,), value_residual=1, embedding_residual=1,
                           attn_short_conv=3, attn_gate=1, logit_softcap=15.0, pair_rows=64,
                           value_tables=1, afno_token_taps=5)
SHORT = dataclasses.replace(CONFIG, sequence_length=67)  # just longer than the gradients' rows
CPU = torch.device("cpu")
EXACT = Runtime(CPU, torch.float32, compile=False)
HALF = Runtime(CPU, torch.bfloat16, compile=False)


def instead_of_mix(leak):
    """Return what AFNO1D.mix becomes: leak(mixer, h, taps), from the block's normed input h."""
    return lambda mixer, z, h, added=None, rotary=None, taps=None: leak(mixer, h, taps)


def padded_afno(mixer, x, taps):
    """Be the original AFNO (Guibas et al., 2022) on a sequence padded to 2T and cut back to T.

    MLP and shrink are on data.
    """
    B, T, C = x.shape
    blocks = mixer.operator.taps.mlp.w1.size(1)
    size = C // blocks
    weight = lambda seed: torch.randn(blocks, size, 2 * size,
                                      generator=torch.Generator().manual_seed(seed)).to(x)
    no_bias = torch.zeros(blocks, 2 * size).to(x)
    X = torch.fft.rfft(x, n=2 * T, dim=1, norm="ortho").view(B, T + 1, blocks, size)
    X = X.permute(2, 0, 1, 3).flatten(1, 2)
    z = complex_linear((X.real, X.imag), weight(1) * size**-0.5, no_bias)
    z = complex_linear(complex_relu(z), weight(2) * size**-0.5, no_bias)
    X = torch.complex(*complex_soft_shrink(z, 0.01)).view(blocks, B, T + 1, size)
    X = X.permute(1, 2, 0, 3).flatten(2)
    return torch.fft.irfft(X, n=2 * T, dim=1, norm="ortho")[:, :T] + x


def learned_response(mixer, x, taps):
    """Multiply all 2T frequencies by a learned response: a kernel of both signs of lag."""
    T = x.size(1)
    generator = torch.Generator().manual_seed(1)
    response = torch.view_as_complex(torch.randn(T + 1, x.size(2), 2, generator=generator).to(x))
    return torch.fft.irfft(torch.fft.rfft(x, n=2 * T, dim=1) * response, n=2 * T, dim=1)[:, :T]


def low_frequencies_only(mixer, x, taps):
    """Cut the high frequencies of a causal kernel."""
    T = x.size(1)
    response = torch.fft.rfft(F.pad(taps[:, :T], (0, 2 * T - min(T, taps.size(1)))), dim=1)
    response = response.repeat_interleave(x.size(2) // len(response), 0).T.clone()
    response[T // 2 :] = 0
    return torch.fft.irfft(torch.fft.rfft(x, n=2 * T, dim=1) * response, n=2 * T, dim=1)[:, :T]


def block_summary(mixer, x, taps):
    """Tell the mean of 8 tokens to all of them."""
    B, T, C = x.shape
    padded = F.pad(x, (0, 0, 0, -T % 8)).view(B, -1, 8, C)
    return x + padded.mean(2, keepdim=True).expand_as(padded).reshape(B, -1, C)[:, :T]


def off_by_one(mixer, x, taps):
    return F.pad(causal_conv(x, taps), (0, 0, 0, 1))[:, 1:]


def rolled(mixer, x, taps):
    """Roll the sequence: the last token comes first."""
    return x + x.roll(1, 1)


def norm_over_time(mixer, x, taps):
    return x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Let --model d4 be two layers of 16 channels, and the vocabulary small."""
    monkeypatch.setitem(train_gpt2_afno.MODELS, "d4", (2, 16))
    fields = train_gpt2_afno.model_fields
    monkeypatch.setattr(train_gpt2_afno, "model_fields",
                        lambda values: fields(values) | dict(vocab_size=300))


LEAKS = (padded_afno, learned_response, low_frequencies_only, block_summary, off_by_one, rolled,
         norm_over_time)


def start_sees(config: GPTConfig, runtime: Runtime = EXACT, T: int = 96, fp8: bool = False):
    """Return the trainer's message where its check at start refuses a model, else None.

    It tries all cuts, as on a GPU.
    """
    torch.manual_seed(0)
    model = GPT(config)
    for block in model.transformer.h:
        block.mlp.fp8 = fp8
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(test_causality, "budget", lambda T, rows, device: T - 1)
            refuse_leaks(model, [(16, T)], runtime, lambda text: None)
    except InputError as error:
        return str(error)


def gate_sees(config: GPTConfig, runtime: Runtime) -> list[str]:
    """Return the lines of the gate's table that report a leak."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        gate = test_causality.Gate()
        check_family(gate, train_gpt2_afno, {"mutant": config}, runtime)
    lines = [line for line in printed.getvalue().splitlines() if "LEAK" in line]
    assert bool(lines) != gate.passed
    return lines


@pytest.mark.slow
@pytest.mark.parametrize("leak", LEAKS)
def test_every_known_leak_is_reported_by_each_kind_of_row(monkeypatch, leak):
    monkeypatch.setattr(AFNO1D, "mix", instead_of_mix(leak))
    found = " ".join(gate_sees(SHORT, HALF))
    for what in ("float32 ", "float32, eval mode", "bfloat16 ", "bfloat16, eval mode",
                 "float64 gradients"):
        assert what in found
    assert "refusing to go on: output " in start_sees(CONFIG)
    leaks = check_causality(GPT(CONFIG).hidden, 96, CONFIG.vocab_size)
    assert leaks and all(found.position < found.cut for found in leaks if found.cut is not None)
    assert leaks[0].position == min(found.position for found in leaks)
    assert str(leaks[0]).startswith(f"output {leaks[0].position} is the first that changes with ")


@pytest.mark.slow
def test_a_whole_sequence_fft_is_causal_but_not_bitwise(monkeypatch):
    """Refuse rounding, too: float64 passes its bound, the training dtype does not."""

    def whole_sequence_fft(mixer, x, taps):
        T = x.size(1)
        response = torch.fft.rfft(taps[:, :T], n=2 * T, dim=1).repeat_interleave(2, 0).T
        return torch.fft.irfft(torch.fft.rfft(x, n=2 * T, dim=1) * response, n=2 * T, dim=1)[:, :T]

    monkeypatch.setattr(afno, "CHANNELS_PER_FILTER", 2)
    monkeypatch.setattr(AFNO1D, "mix", instead_of_mix(whole_sequence_fft))
    assert start_sees(CONFIG)
    model = GPT(CONFIG)
    assert check_causality(model.hidden, 96, CONFIG.vocab_size, tolerance=1e-5) == []
    model.double()
    assert check_causality(model.hidden, 96, CONFIG.vocab_size, tolerance=1e-10) == []
    table = model.transformer.wte
    assert gradient_leaks(model.hidden, table, 72, CONFIG.vocab_size, bound=1e-10) == []


def test_a_mixer_that_ignores_its_input_tests_nothing():
    """Gradients and changes that are zero everywhere are no proof of causality."""
    still = lambda idx: torch.zeros(*idx.shape, 4)
    leaks = check_causality(still, 8, 300)
    assert sorted({leak.cut for leak in leaks}) == [0, *range(1, 8)]
    assert all("changes nothing after it" in str(leak) for leak in leaks)
    model = GPT(CONFIG)
    deaf = lambda idx: model.transformer.wte(idx) * 0
    assert len(gradient_leaks(deaf, model.transformer.wte, 8, 300)) == 8


# Mutants: (what it is, a patch of the classes, who cannot see it and why)

NEXT = lambda x: F.pad(x, (0, 0, 0, 1))[:, 1:]  # each token gets the one after it


def patched_hidden(change):
    """Return a patch after which GPT.hidden is change(model, idx, hidden states)."""
    def patch(monkeypatch):
        hidden = GPT.hidden
        monkeypatch.setattr(GPT, "hidden", lambda self, idx: change(self, idx, hidden(self, idx)))
    return patch


def at(first: int, last: int):
    """Return a change that adds the next hidden state at the positions first ... last."""
    def change(model, idx, x):
        place = torch.arange(x.size(1))[:, None]
        return torch.where((place >= first) & (place <= last), x + NEXT(x), x)
    return change


def where_next(token):
    """Return a change that shows where a token comes next."""
    def change(model, idx, x):
        comes = F.pad(idx[:, 1:] == (idx[:, :-1] if token is None else token), (0, 1))
        return x + comes[..., None]
    return change


def embedding_residual(monkeypatch):
    around = train_gpt2_afno.Block.around

    def leaking(self, x, v0, inputs, mix):
        return around(self, x + self.embedding_mix[1] * NEXT(inputs[0]), v0, inputs, mix)
    monkeypatch.setattr(train_gpt2_afno.Block, "around", leaking)


def table_of_pairs(monkeypatch):
    forward = train_gpt2_afno.PairTable.forward
    monkeypatch.setattr(train_gpt2_afno.PairTable, "forward",
                        lambda self, idx, before: forward(self, idx.roll(-1, -1), idx))


def tables_of_values(monkeypatch):
    around = train_gpt2_afno.Block.around
    monkeypatch.setattr(train_gpt2_afno.Block, "around", lambda self, x, v0, inputs, mix: around(
        self, x, v0, (*inputs[:2], NEXT(inputs[2]), inputs[3]), mix))


def short_conv(monkeypatch):
    forward = afno.ShortConv.forward
    monkeypatch.setattr(afno.ShortConv, "forward", lambda self, x: forward(self, x) + (
        self.taps[1] * NEXT(x) if len(self.taps) > 1 else 0))


def token_taps(monkeypatch):
    by_group = afno.TokenTaps.by_group
    monkeypatch.setattr(afno.TokenTaps, "by_group", lambda self, taps: by_group(self, NEXT(taps)))


def first_value(mixer):
    def patch(monkeypatch):
        value = mixer.value
        monkeypatch.setattr(mixer, "value", lambda self, z: value(self, z) + 0.01 * (
            value(self, z).roll(-1, 1) if z.ndim == 3 else 0))
    return patch


def gates(monkeypatch):
    forward = Gates.forward
    monkeypatch.setattr(Gates, "forward", lambda self, h: forward(self, h.roll(-1, 1)))


def mlp(monkeypatch):
    forward = MLP.forward
    monkeypatch.setattr(MLP, "forward", lambda self, x: forward(self, x + 0.1 * NEXT(x)))


def fp8_scale_of_the_batch(monkeypatch):
    def rows(x):
        scale = x.abs().amax() / 448
        return (x / scale).to(torch.float8_e4m3fn), scale
    monkeypatch.setattr(kernels.loss, "fp8_rows", rows)


def in_loss(monkeypatch):
    loss = Head.loss
    monkeypatch.setattr(Head, "loss", lambda self, x, targets, *shares: loss(
        self, x + NEXT(x), targets, *shares))


def in_logits(monkeypatch):
    logits = Head.logits
    monkeypatch.setattr(Head, "logits", lambda self, x: logits(self, x + NEXT(x)))


def mean_of_the_batch(model, idx, x):
    return x - x.mean(0, keepdim=True)


MUTANTS = {
    "next token, positions 64 to T - 3": (patched_hidden(at(64, 93)), None),
    "next token, one position": (patched_hidden(at(41, 41)), None),
    "next token, inside blocks of 8 only": (patched_hidden(
        lambda model, idx, x: torch.where((torch.arange(x.size(1)) % 8 < 7)[:, None],
                                          x + NEXT(x), x)), None),
    "last token, at the first position": (patched_hidden(
        lambda model, idx, x: x + F.pad(x[:, -1:], (0, 0, 0, x.size(1) - 1))), None),
    "last token, at the one before it": (patched_hidden(at(94, 94)), None),
    "two tokens ahead": (patched_hidden(lambda model, idx, x: x + NEXT(NEXT(x))), None),
    "forty tokens ahead": (patched_hidden(lambda model, idx, x: x + F.pad(
        x, (0, 0, 0, 40))[:, 40:]), None),
    "only without gradients": (patched_hidden(
        lambda model, idx, x: x if torch.is_grad_enabled() else x + NEXT(x)), None),
    "only with gradients": (patched_hidden(
        lambda model, idx, x: x + NEXT(x) if torch.is_grad_enabled() else x), None),
    "in the loss, not in hidden states": (in_loss, None),
    "in the logits alone": (in_logits, "where"),
    "another row, the same position": (patched_hidden(
        lambda model, idx, x: x + 0.1 * x.roll(1, 0)), None),
    "another row, a later position": (patched_hidden(
        lambda model, idx, x: x + 0.1 * NEXT(x).roll(1, 0)), None),
    "another row, an earlier position": (patched_hidden(
        lambda model, idx, x: x + 0.1 * x.roll((1, 3), (0, 1))), None),
    "mean of the batch": (patched_hidden(mean_of_the_batch), None),
    "only where the batch has more than one row": (patched_hidden(
        lambda model, idx, x: x + NEXT(x) if len(x) > 1 else x), None),
    "through the embedding residual, 0 at first": (embedding_residual, None),
    "through the table of pairs, 0 at first": (table_of_pairs, None),
    "through the tables of values": (tables_of_values, None),
    "through taps of a short convolution": (short_conv, None),
    "through taps of each token": (token_taps, None),
    "through the first value, attention": (first_value(CausalSelfAttention), None),
    "through the first value, AFNO": (first_value(AFNO1D), None),
    "through gates": (gates, None),
    "in the MLP": (mlp, None),
    "where the last of the vocabulary is next": (patched_hidden(where_next(299)), None),
    "where token 0 is next": (patched_hidden(where_next(0)), None),
    "where a token is next again": (patched_hidden(where_next(None)), None),
    "only where no document ends in the batch": (patched_hidden(
        lambda model, idx, x: x if ((idx == 0) | (idx == 299)).any() else x + NEXT(x)), None),
    "only where T % 8 is not 0": (patched_hidden(
        lambda model, idx, x: x + NEXT(x) if x.size(1) % 8 else x), "start"),
    "only in eval mode": (patched_hidden(
        lambda model, idx, x: x if model.training else x + NEXT(x)), "start"),
    "only at 48 tokens, of a curriculum": (patched_hidden(
        lambda model, idx, x: x + NEXT(x) if x.size(1) == 48 else x), "both"),
    "of relative size 1e-6": (patched_hidden(lambda model, idx, x: x + 1e-6 * NEXT(x)), None),
    "NaN": (patched_hidden(lambda model, idx, x: x * torch.nan), None),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_refused(monkeypatch, name):
    """Who cannot see one: the arithmetic that it looks at is the same without the mutant.

    start: training at 96 tokens does not call eval mode, nor is T % 8 other than 0.
    where: start sees that loss and logits differ, but at no position.
    both: the length is a curriculum's, and start sees it where it trains at that length.
    """
    patch, unseen = MUTANTS[name]
    patch(monkeypatch)
    said, lines = start_sees(RICH), gate_sees(RICH, EXACT)
    assert bool(lines) == (unseen != "both")
    assert bool(said) == (unseen not in ("start", "both"))
    if unseen == "both":
        assert start_sees(RICH, T=48)
    if unseen is None:
        assert re.search(r"output \d+ is the first that changes", said) and "output" in lines[0]


# What is around hidden states: forward(), which trains, and what the head does with its targets

def new_forward(change):
    """Return a patch after which forward() hands change(model, hidden states, targets) on."""
    def forward(self, idx, targets=None, return_logits=True, shares=None):
        x = change(self, self.hidden(idx), targets)
        return None, self.lm_head.loss(x, targets, shares)[0]
    return lambda monkeypatch: monkeypatch.setattr(GPT, "forward", forward)


def new_loss(change):
    """Return a patch after which Head.loss is change(loss, head, x, targets, shares)."""
    def patch(monkeypatch):
        loss = Head.loss
        monkeypatch.setattr(Head, "loss", lambda self, x, targets, shares=None: change(
            lambda x: loss(self, x, targets, shares), self, x, targets, shares))
    return patch


def hook_on_the_model(monkeypatch):
    """Read the targets instead of the inputs, before forward()."""
    def init(self, config, old=GPT.__init__):
        old(self, config)
        first = lambda targets: targets if targets.ndim == 2 else targets[..., 0].clamp(min=0)
        self.register_forward_pre_hook(lambda model, given: (first(given[1]), *given[1:]))
    monkeypatch.setattr(GPT, "__init__", init)


def margin_at_the_target(monkeypatch):
    chunk = train_gpt2_afno.cross_entropy_chunk
    margin = lambda logits, targets: logits.scatter_add(1, targets, torch.ones_like(logits))
    monkeypatch.setattr(train_gpt2_afno, "cross_entropy_chunk",
                        lambda logits, targets, *rest: chunk(
                            margin(logits, targets), targets, *rest))


def of_the_target(head, targets):
    """Return the target's row of the head."""
    first = targets if targets.ndim == 2 else targets[..., 0]
    return head.weight[first.clamp(min=0)]


POSITIONS, CROSS_ENTROPY = "is the first that changes", "off the cross-entropy of its logits"
MEAN, TARGETS = "the head trains on a mean loss of", "is the first that changes with the targets"
AROUND = {  # what it is: (patch, what the check says)
    "forward: next state": (new_forward(lambda model, x, y: x + NEXT(x)), POSITIONS),
    "forward: the target": (new_forward(
        lambda model, x, y: x + of_the_target(model.lm_head, y)), POSITIONS),
    "hook: targets for inputs": (hook_on_the_model, POSITIONS),
    "loss: its target": (new_loss(lambda loss, head, x, y, shares: loss(
        x + of_the_target(head, y))), CROSS_ENTROPY),
    "loss: its target, while training": (new_loss(lambda loss, head, x, y, shares: loss(
        x + torch.is_grad_enabled() * of_the_target(head, y))), CROSS_ENTROPY),
    "loss: its target, while validating": (new_loss(lambda loss, head, x, y, shares: loss(
        x + (not torch.is_grad_enabled()) * of_the_target(head, y))), CROSS_ENTROPY),
    "loss: margin at the target": (margin_at_the_target, CROSS_ENTROPY),
    "loss: at most 4": (new_loss(lambda loss, head, x, y, shares: [
        part.clamp(max=4) for part in loss(x)]), CROSS_ENTROPY),
    "loss: in another base": (new_loss(lambda loss, head, x, y, shares: [
        0.8 * part for part in loss(x)]), CROSS_ENTROPY),
    "loss: the mean alone": (new_loss(lambda loss, head, x, y, shares: (
        loss(x + NEXT(x))[0], loss(x)[1])), MEAN),
    "loss: where x has a gradient": (new_loss(lambda loss, head, x, y, shares: loss(
        x + NEXT(x) if x.requires_grad else x)), POSITIONS),
    "loss: where a target does not count": (new_loss(lambda loss, head, x, y, shares: loss(
        x + NEXT(x) if (y < 0).any() else x)), POSITIONS),
    "loss: where all targets count": (new_loss(lambda loss, head, x, y, shares: loss(
        x if (y < 0).any() else x + NEXT(x))), POSITIONS),
    "loss: its target, where all count": (new_loss(lambda loss, head, x, y, shares: loss(
        x if (y < 0).any() else x + of_the_target(head, y))), POSITIONS),
    "loss: its target, where all count, while validating": (new_loss(
        lambda loss, head, x, y, shares: loss(x if (y < 0).any() or torch.is_grad_enabled()
                                              else x + of_the_target(head, y))), POSITIONS),
    "forward: the last target": (new_forward(lambda model, x, y: torch.cat((
        x[:, :-1], x[:, -1:] + of_the_target(model.lm_head, y)[:, -1:]), 1)), TARGETS),
    "forward: the last target, at all positions": (new_forward(
        lambda model, x, y: x + of_the_target(model.lm_head, y)[:, -1:]), TARGETS),
    "loss: of several goals": (new_loss(lambda loss, head, x, y, shares: loss(
        x if shares is None else x + NEXT(x))), POSITIONS),
    "loss: the target, of several goals": (new_loss(lambda loss, head, x, y, shares: loss(
        x if shares is None else x + of_the_target(head, y))), CROSS_ENTROPY),
}


@pytest.mark.parametrize("runtime", (EXACT, HALF))
def test_what_is_around_hidden_states_is_checked(monkeypatch, runtime):
    def found() -> str:
        torch.manual_seed(0)
        model = GPT(dataclasses.replace(CONFIG, mixer="attn", n_layer=1))
        test_causality.move_weights(model)
        return " ".join(map(str, check_model(model, 12, 4, CPU, runtime.autocast, cuts=4, seed=1,
                                             goals=(test_causality.two_goals,))))

    assert found() == ""
    for name, (patch, said) in AROUND.items():
        with monkeypatch.context() as patched:
            patch(patched)
            assert said in found(), name


# What the check at start alone can see: weights as they are, the text that evaluate() is given


def gated(size: float, gate):
    """Return a patch with a leak through three weights, begun at 0.1; gate makes a number of them.
    """
    def patch(monkeypatch):
        init, hidden = GPT.__init__, GPT.hidden

        def with_weights(self, config):
            init(self, config)
            self.gains = torch.nn.ParameterList([torch.nn.Parameter(torch.tensor(0.1))
                                                 for _ in range(3)])
        monkeypatch.setattr(GPT, "__init__", with_weights)
        monkeypatch.setattr(GPT, "hidden", lambda self, idx: hidden(self, idx) + size * gate(
            self.gains) * NEXT(self.transformer.wte(idx)))
    return patch


def new_evaluate(old: str, new: str):
    """Return a patch that changes a piece of evaluate()'s code."""
    def patch(monkeypatch):
        code = inspect.getsource(runtime.evaluate)
        assert code.count(old) == 1
        names = {**vars(runtime)}
        exec(code.replace(old, new), names)
        monkeypatch.setattr(runtime, "evaluate", names["evaluate"])
    return patch


STARTS = {  # what it is: (patch, what the check says)
    "gains as they begin": (gated(1e4, lambda gains: gains[0].relu() * gains[1].relu()
                                  * gains[2].relu()), POSITIONS),
    "a gain near its start": (gated(20, lambda gains: (1 - 20 * (gains[0] - 0.1).abs()).relu()),
                              POSITIONS),
    "evaluate: inputs are targets": (new_evaluate("tokens[:-1].view", "tokens[1:].view"), "off"),
    "evaluate: nine of ten losses": (new_evaluate("losses.double()", "(0.9 * losses.double())"),
                                     "off"),
    "evaluate: a state more": (new_evaluate(
        "_, losses = model.lm_head.loss(hidden,",
        "_, losses = model.lm_head.loss(F.pad(hidden, (0, 0, 0, 1))[:, 1:] + hidden,"), "off"),
    "evaluate: whole batches alone": (new_evaluate(
        "range(0, val_tokens, runtime", "range(0, val_tokens - B * T + 1, runtime"), "off"),
    "evaluate: it learns from the batch before": (new_evaluate(
        "        total += losses.double().sum(0)\n", """        total += losses.double().sum(0)
        with torch.enable_grad():
            model(tokens[:-1].view(B, T), targets.view(B, T), False)[1].backward()
        for p in model.parameters():
            p.sub_(p.grad, alpha=0.1)
            p.grad = None
"""), "off"),
}


@pytest.mark.parametrize("name", STARTS)
def test_what_only_the_start_can_see_is_refused(monkeypatch, name):
    look = lambda config=RICH: refuse_leaks(GPT(config), [(4, 24)], EXACT, lambda text: None)
    look()
    patch, said = STARTS[name]
    patch(monkeypatch)
    for _ in range(3):  # whatever is drawn
        with pytest.raises(InputError, match=said):
            look()


@pytest.mark.parametrize("cuts, batches", ((3, 4), (23, 8), (None, 14)))
def test_both_bases_and_special_tokens_meet_cuts(monkeypatch, cuts, batches):
    """Batches, but for the two bases: at least one of each base with cuts, two of whole rows."""
    met, exchange = [], test_causality.exchange

    def recorded(idx, kept, vocab_size, special, parity, generator):
        met.append((bool(torch.isin(idx, torch.tensor(special)).any()), parity, int(kept.max())))
        return exchange(idx, kept, vocab_size, special, parity, generator)

    monkeypatch.setattr(test_causality, "exchange", recorded)
    for seed in range(8):
        met.clear()
        assert not check_causality(Toy(0), 24, 300, rows=4, cuts=cuts, seed=seed)
        assert len(met) == batches
        with_cuts = {(base, parity) for base, parity, kept in met if kept < 24}
        assert {base for base, _ in with_cuts} == {parity for _, parity in with_cuts} == {0, 1}
        assert cuts == 3 or len(with_cuts) == 4  # no base is tied to who meets a special token


def test_a_head_is_expected_to_move_where_its_inputs_or_targets_do():
    torch.manual_seed(0)
    for rows, T in ((1, 2), (2, 2), (1, 3), (3, 2)):
        model = GPT(dataclasses.replace(CONFIG, vocab_size=3, n_layer=1, mixer="attn"))
        for seed in range(30):
            assert not check_head(model, T, rows, CPU, seed, logits=False, every_pair=False)


@pytest.mark.parametrize("exact", (EXACT, HALF))
def test_what_evaluate_sums_is_right_to_rounding(exact):
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(CONFIG, logit_softcap=15.0))
    with moved_weights(model):
        assert not test_causality.measure_leaks(model, 3, 40, exact, 5)
        # each of several ranks for itself: none waits for another, which may compile for minutes
        of_two = dataclasses.replace(exact, rank=1, world=2)
        assert not test_causality.measure_leaks(model, 3, 40, of_two, 5)


def test_a_forward_that_makes_its_own_loss_cannot_be_checked(monkeypatch):
    monkeypatch.setattr(GPT, "forward", lambda self, idx, targets, return_logits: (
        None, F.cross_entropy(self.lm_head(self.hidden(idx)).mT, targets)))
    with pytest.raises(ValueError, match="forward.. must call lm_head.loss once"):
        check_model(GPT(CONFIG), 8, 2, CPU, EXACT.autocast)


@pytest.mark.parametrize("step, columns", ((0, [4, 3]), (1, [4, 3]), (2, [3]), (4, [])))
def test_every_number_of_targets_to_come_is_tried(monkeypatch, step, columns):
    """Of six steps two have four targets a token, two have three, two have the next token alone."""
    seen, forward = [], GPT.forward

    def recorded(model, idx, targets, return_logits, shares=None):
        seen.append(targets.size(-1) if shares is not None else 1)
        return forward(model, idx, targets, return_logits, shares)

    monkeypatch.setattr(GPT, "forward", recorded)
    checked_by_the_trainer(CONFIG, predict_ahead=1, predict_prefix=1, num_iterations=6, step=step)
    assert [*dict.fromkeys(seen)] == [1, *columns]


@pytest.mark.parametrize("columns", (3, 4))
def test_a_forward_that_leaks_with_several_targets_alone_is_refused(monkeypatch, columns):
    def leaks(model, idx, targets=None, return_logits=True, shares=None):
        x = model.hidden(idx)
        if shares is not None and targets.size(-1) == columns:
            x = x + model.transformer.wte(targets[..., 0].clamp(min=0))
        return None, model.lm_head.loss(x, targets, *([] if shares is None else [shares]))[0]

    monkeypatch.setattr(GPT, "forward", leaks)
    checked_by_the_trainer(CONFIG)
    with pytest.raises(InputError, match="causality check: the model leaks"):
        checked_by_the_trainer(CONFIG, predict_ahead=1, predict_prefix=1, num_iterations=6)


def checked_by_the_trainer(config: GPTConfig, targets_from: int = 1, step: int = 0, **flags):
    """Run the trainer's check at start of a micro-batch of 4 rows of 24."""
    args = argparse.Namespace(**{**dict(predict_ahead=0, predict_prefix=0, num_iterations=1),
                                 **flags})
    row = test_causality.random_tokens((4, 26), 300)
    batch = row[:, :24], row[:, targets_from : targets_from + 24]
    loader = argparse.Namespace(ahead=argparse.Namespace(result=lambda: batch),
                                text_ahead=lambda: row[0, :25])
    run = argparse.Namespace(args=args, model=GPT(config), runtime=EXACT, T=24, loader=loader,
                             say=lambda text: None, step=step, device=CPU,
                             prefixes=torch.arange(300))
    run.goals = lambda *given, **more: train_gpt2_afno.Run.goals(run, *given, **more)
    run.goals_to_come = lambda: train_gpt2_afno.Run.goals_to_come(run)
    train_gpt2_afno.Run.refuse_leaks(run, [(4, 24)])


def test_the_trainer_checks_its_rows_and_its_goals(monkeypatch):
    checked_by_the_trainer(CONFIG, predict_ahead=1)
    for targets_from in (0, 2):
        with pytest.raises(InputError, match="targets of training rows are not their next tokens"):
            checked_by_the_trainer(CONFIG, targets_from)
    x, y = (row := test_causality.random_tokens((4, 25), 300))[:, :-1], row[:, 1:]
    refuse = test_causality.refuse_other_targets
    refuse(x, y, row[0])
    for inputs, targets in ((y.roll(1, 1), y), (x, x.roll(-1, 1)), (x.flip(0), y.flip(0))):
        with pytest.raises(InputError, match="not their next tokens"):  # one target at place 0, ...
            refuse(inputs, targets, row[0])
    AROUND["loss: of several goals"][0](monkeypatch)
    checked_by_the_trainer(CONFIG)
    with pytest.raises(InputError, match="causality check: the model leaks"):
        checked_by_the_trainer(CONFIG, predict_ahead=1)


@pytest.mark.slow
def test_a_scale_of_the_whole_batch_in_fp8_is_a_leak(monkeypatch):
    assert start_sees(RICH, HALF, fp8=True) is None
    fp8_scale_of_the_batch(monkeypatch)
    assert "output" in start_sees(RICH, HALF, fp8=True)


@pytest.mark.slow
def test_a_match_that_is_not_earlier_is_a_leak(monkeypatch):
    config = dataclasses.replace(CONFIG, copy_layers=(0, 1))
    assert start_sees(config) is start_sees(config, HALF) is None
    assert gate_sees(config, EXACT) == []
    find = train_gpt2_afno.longest_matches

    def later(idx):
        after, level = find(idx.flip(1))
        return after.flip(1), level.flip(1)

    monkeypatch.setattr(train_gpt2_afno, "longest_matches", later)
    assert "refusing to go on: output " in start_sees(config)
    assert gate_sees(config, EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("level", (1, 3, 7, len(afno.MATCHES)))
def test_a_match_that_tells_the_next_token_is_a_leak(monkeypatch, level):
    """Whatever the length of the match: rows repeat their first half."""
    config, find = dataclasses.replace(CONFIG, copy_layers=(1,)), train_gpt2_afno.longest_matches

    def next_token(idx):
        after, kind = find(idx)
        tells = kind[..., None] > 4 * (level - 1)
        return torch.where(tells, idx.roll(-1, 1)[..., None, None], after), kind

    monkeypatch.setattr(train_gpt2_afno, "longest_matches", next_token)
    assert "refusing to go on: output " in start_sees(config)
    assert gate_sees(config, EXACT)


@pytest.mark.slow
def test_states_that_hold_later_tokens_are_a_leak(monkeypatch):
    monkeypatch.setattr(afno, "remains_of", lambda since: torch.ones_like(since)[..., None, :])
    config = dataclasses.replace(CONFIG, afno_form="state")
    assert "refusing to go on: output 0 " in start_sees(config)


@pytest.mark.slow
@pytest.mark.parametrize("options", (
    {}, dict(mixer="attn"), dict(afno_form="hilbert"), dict(afno_form="dyadic"),
    dict(afno_form="state"), dict(afno_state_layers=(1,), afno_silu=1)))
def test_nothing_true_is_called_a_leak(options):
    config = dataclasses.replace(CONFIG, value_residual=1, **options)
    assert start_sees(config) is start_sees(config, HALF) is None
    assert gate_sees(config, EXACT) == []


def test_generation_is_checked_against_the_parallel_pass(monkeypatch):
    torch.manual_seed(0)
    model = GPT(RICH)
    assert check_generation(model, 96, CPU) < 1e-5
    step = AFNO1D.step
    monkeypatch.setattr(AFNO1D, "step", lambda self, z, *rest: step(self, z + 0.01, *rest))
    assert check_generation(model, 96, CPU) > 1e-4


def test_copies_in_generation_are_checked_against_the_parallel_pass(monkeypatch):
    model = GPT(dataclasses.replace(CONFIG, vocab_size=5000, copy_layers=(1,)))
    test_causality.move_weights(model)
    assert check_generation(model, 96, CPU) < 1e-5
    newest = train_gpt2_afno.newest_matches

    def late(idx_t, seen, window):
        (found, kinds), seen = newest(idx_t, seen, window)
        return (torch.where(found < 0, found, found.roll(1, -1)), kinds), seen

    monkeypatch.setattr(train_gpt2_afno, "newest_matches", late)
    assert check_generation(model, 96, CPU) > 1e-4


def test_a_cache_that_outlives_a_text_is_found(monkeypatch):
    model, step, caches = GPT(RICH), train_gpt2_afno.CausalSelfAttention.step, {}
    assert check_generation(model, 96, CPU) < 1e-5

    def cached(self, z, h, added, rotary, state, window):
        y, caches[self] = step(self, z, h, added, rotary, state or caches.get(self), window)
        return y, caches[self]

    monkeypatch.setattr(train_gpt2_afno.CausalSelfAttention, "step", cached)
    assert check_generation(model, 96, CPU) > 1e-4


@pytest.mark.parametrize("change", (dict(copy_layers=(0,)), dict(copy_layers=(2, 3)),
                                    dict(attn_layers=(3,), afno_state_layers=(2,))))
def test_the_gates_small_models_take_any_list_of_layers(change):
    given = dataclasses.replace(CONFIG, n_layer=4, **change)
    for config in test_causality.short_configs(given, CPU).values():
        assert config.copy_layers == ((0, 1) if given.copy_layers else ())
        hidden = GPT(config).hidden(torch.zeros(1, 4, dtype=torch.long))
        assert hidden.shape == (1, 4, config.n_embd)


@pytest.mark.slow
@pytest.mark.parametrize("mix, form, status", (
    (AFNO1D.mix, "filter", 0), (AFNO1D.mix, "reference", 1),
    (instead_of_mix(rolled), "filter", 1)))
def test_exit_status_of_the_command(monkeypatch, capsys, tmp_path, mix, form, status):
    monkeypatch.setattr(AFNO1D, "mix", mix)
    monkeypatch.setattr(test_causality, "CACHE", str(tmp_path / "passed"))
    flags = "--preset baseline --model d4 --mixer afno --attn_layers 1 --sequence_length 80 " \
        f"--batch_size 2 --device cpu --dtype float32 --afno_form {form}"
    assert test_causality.main(flags.split()) == status
    printed = capsys.readouterr().out
    assert ("LEAK" in printed) == ("NOT CAUSAL" in printed) == bool(status)
    for name in ("the model to train", "attention", "hybrid", "states among filters",
                 "afno, dyadic"):
        assert f"\n{name}" in printed
    if status == 0:  # a pass is remembered, a leak is not
        assert test_causality.main(flags.split()) == 0
        assert "passed before" in capsys.readouterr().out
    folder = tmp_path / "passed"
    assert len(list(folder.iterdir()) if folder.exists() else []) == (status == 0)


def test_another_shape_dtype_or_batch_is_another_pass():
    args = train_gpt2_afno.merge_flags(dict(preset="baseline"), CPU, None, print)
    name = lambda config, **changes: test_causality.passed_file(
        argparse.Namespace(**{**vars(args), **changes}), config).name
    names = [name(CONFIG), name(CONFIG), name(RICH), name(CONFIG, dtype="bfloat16"),
             name(CONFIG, batch_size=3), name(CONFIG, curriculum=((8, 1.0),))]
    assert names[0] == names[1] and len(set(names)) == 5
    assert name(CONFIG, learning_rate=0.1) == names[0]  # a sweep over rates pays once


def test_a_mixer_imported_when_it_is_made_is_in_the_pass(monkeypatch, tmp_path):
    args, seen = train_gpt2_afno.merge_flags(dict(preset="baseline"), CPU, None, print), []
    monkeypatch.setattr(AFNO1D, "__init__", instead_of_init(seen))
    monkeypatch.setattr(runtime, "source_files", lambda: seen.append("asked") or [])
    test_causality.passed_file(args, CONFIG)
    assert seen[0] == "made" and seen[-1] == "asked"


def instead_of_init(seen: list):
    init = AFNO1D.__init__

    def noted(self, *given, **named):
        seen.append("made")
        init(self, *given, **named)
    return noted


def test_what_draws_at_random_is_not_called_a_leak():
    model, dropout = GPT(CONFIG), torch.nn.Dropout(0.5)
    model.hidden = lambda idx: dropout(GPT.hidden(model, idx))
    leaks = check_causality(model.hidden, 24, CONFIG.vocab_size)
    assert str(leaks[0]).startswith("outputs differ for the same tokens: it draws at random")
    with pytest.raises(InputError, match="outputs differ for the same tokens"):
        refuse_leaks(model, [(4, 24)], EXACT, lambda text: None, modes=(False,))
    broken = lambda idx: torch.full((*idx.shape, 4), math.nan)
    assert "for the same tokens" not in str(check_causality(broken, 24, 300))


def test_the_plans_call(monkeypatch):
    test_causality.test_causality(seq_len=20)
    monkeypatch.setattr(AFNO1D, "mix", instead_of_mix(off_by_one))
    with pytest.raises(AssertionError, match="output"):
        test_causality.test_causality(GPT(CONFIG), seq_len=20)


def test_weights_are_moved_once_for_all_lengths_of_a_curriculum(monkeypatch):
    moved = []
    monkeypatch.setattr(test_causality, "move_weights", lambda model, seed: moved.append(1))
    refuse_leaks(GPT(CONFIG), [(4, 24), (2, 48)], EXACT, lambda text: None)
    assert len(moved) == 1


@pytest.mark.parametrize("one, other", ((3, 4), (40, 2), (19, 16), (0, 47)))
def test_every_pair_of_the_heads_positions_is_told_apart(monkeypatch, one, other):
    """Positions are those of two rows of 24."""
    model, loss = GPT(CONFIG), Head.loss
    look = lambda: check_head(model, 24, 2, CPU, 5, logits=True, every_pair=True)
    assert look() == []

    def leaking(self, x, targets):
        mean, losses = loss(self, x, targets)
        leak = torch.zeros(48).index_fill(0, torch.tensor(one), 1) * x.view(48, -1)[other].sum()
        return mean, losses + leak.view(2, 24)

    monkeypatch.setattr(Head, "loss", leaking)
    (leak,) = look()
    assert str(leak) == f"output {one % 24} is the first that changes with the head's inputs at " \
        "other positions"


class Kept:
    """Count the bytes of a tensor that a graph keeps, as long as the graph is there."""

    now = most = 0

    def __init__(self, x: torch.Tensor):
        self.x = x.detach()
        Kept.now += x.nbytes
        Kept.most = max(Kept.most, Kept.now)

    def __del__(self):
        Kept.now -= self.x.nbytes


def test_the_check_keeps_no_more_than_a_micro_batch_of_training(monkeypatch):
    """A card that holds the micro-batch that trains must hold what is checked before it, too."""
    model, goals = GPT(RICH), lambda y: (torch.stack((y, y), -1), torch.tensor([0.8, 0.2]))
    idx = torch.randint(RICH.vocab_size, (4, 24))
    monkeypatch.setattr(Kept, "most", 0)
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.x):
        loss = model(idx, *goals(idx)[:1], False, *goals(idx)[1:])[1]
        trains = Kept.most
        del loss
        assert trains > 100_000 and Kept.now == 0
        Kept.most = 0
        refuse_leaks(model, [(4, 24)], EXACT, lambda text: None, goals=(goals,))
    assert 0.5 * trains < Kept.most <= trains


def test_two_batches_of_the_heads_check_make_gradients(monkeypatch):
    model, made = GPT(CONFIG), []
    x, targets = torch.randn(2, 24, CONFIG.n_embd), torch.zeros(2, 24, dtype=torch.int64)
    losses = model.lm_head.loss(x, targets)[1]
    chunk, gradients, calls = model.lm_head.chunk, kernels.loss.HeadProducts.gradients, []
    monkeypatch.setattr(kernels.loss.HeadProducts, "gradients",
                        lambda *args: calls.append(1) or gradients(*args))
    model.lm_head.chunk = lambda *args: made.append(args[4]) or chunk(*args)  # args[4]: gradient?
    with test_causality.as_constant(model.lm_head.weight):
        assert torch.equal(model.lm_head.loss(x, targets)[1], losses)
    assert not calls
    assert check_head(model, 24, 2, CPU, 5, logits=True, every_pair=True) == []
    assert len(calls) == 2 < len(made) and all(made) and model.lm_head.weight.requires_grad


@pytest.mark.parametrize("rank", (0, 1))
def test_every_rank_draws_rank_0s_sample_and_so_finds_the_same_leak(monkeypatch, rank):
    """The leak depends on the tokens that are drawn: another seed finds another one, or none."""
    hidden, sent = GPT.hidden, []

    def broadcast(seed, source):
        assert source == 0
        sent.append(seed.item())
        seed.fill_(7)

    monkeypatch.setattr(torch.distributed, "broadcast", broadcast)
    monkeypatch.setattr(GPT, "hidden", lambda self, idx: at(5 + int(idx[0, 0]) % 80, 95)(
        self, idx, hidden(self, idx)))
    messages = []
    for runtime in (dataclasses.replace(EXACT, rank=rank, world=2),) * 2:
        torch.manual_seed(0)
        with pytest.raises(InputError) as error:
            refuse_leaks(GPT(CONFIG), [(4, 96)], runtime, print)
        messages.append(str(error.value))
    assert messages[0] == messages[1] and sent[0] != sent[1]


# -----------------------------------------------------------------------------
# the check by itself, for any model


class Toy(torch.nn.Module):
    """Add up the embeddings of all tokens until t + ahead."""

    def __init__(self, ahead: int):
        super().__init__()
        self.embedding, self.ahead = torch.nn.Embedding(300, 4), ahead

    def forward(self, idx):
        total = self.embedding(idx).double().cumsum(1)
        return F.pad(total, (0, 0, 0, self.ahead))[:, self.ahead :]


def test_the_check_takes_any_model_and_names_the_first_position_that_leaks():
    assert check_causality(Toy(0), 40, 50) == check_causality(Toy(0), 40, 50, rows=3) == []
    leaks = check_causality(Toy(1), 40, 50)
    found = {(leak.cut, leak.position) for leak in leaks if leak.position is not None}
    assert found == {(cut, cut - 1) for cut in range(1, 40)}
    assert leaks.coverage == 1 and leaks.cuts == 39
    assert str(leaks[0]) == "output 0 is the first that changes with the tokens from position 1 on"


def test_a_sample_of_cuts_is_drawn_anew_and_its_share_of_pairs_is_counted():
    first, second = (check_causality(Toy(0), 40, 50, cuts=5) for _ in range(2))
    assert first.seed != second.seed and 0.7 < first.coverage < 1
    again = check_causality(Toy(1), 40, 50, cuts=5, seed=7)
    assert [str(leak) for leak in again] == [
        str(leak) for leak in check_causality(Toy(1), 40, 50, cuts=5, seed=7)]
    assert test_causality.coverage_of([3], 6) == 9 / 15  # three before the cut, three after it


@pytest.mark.slow
def test_the_check_needs_torch_alone():
    """Block what the repository has besides; the model is a toy."""
    program = """
import sys
for name in ("train_gpt2_afno", "afno", "kernels", "data", "numpy", "triton", "pytest"):
    sys.modules[name] = None
import torch
from test_causality import check_causality
embedding = torch.nn.Embedding(50, 4)
print(check_causality(lambda idx: embedding(idx).cumsum(1), 20, 50))
print(check_causality(lambda idx: embedding(idx).cumsum(1)[:, 1:], 20, 50)[0].position)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          cwd=test_causality.__file__.rpartition("/")[0] or ".")
    assert done.stdout == "[]\n0\n", done.stderr


def test_no_two_weights_move_alike_and_an_odd_seed_moves_them_the_other_way():
    moves = []
    for seed in (6, 7, 8):
        weights = torch.nn.ParameterList([torch.zeros(()), torch.zeros(())])
        with moved_weights(weights, seed):
            moves.append([p.item() for p in weights])
    assert moves[0] == [-move for move in moves[1]]
    assert len({abs(move) for move in moves[0] + moves[2]}) == 4


def test_moved_weights_come_back_bit_for_bit():
    model = GPT(dataclasses.replace(CONFIG, value_residual=1, embedding_residual=1))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(KeyError), moved_weights(model):
        for p, old in zip(model.parameters(), before):
            assert not (p == old).any(), "every number moves, zeros and ones, too"
        raise KeyError
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before))


# -----------------------------------------------------------------------------
# python tests/test_gate.py: the table of mutants for experiments/causality.md


def print_mutants():
    print("| mutant | start | gate | seconds |\n| --- | --- | --- | --- |")
    for name, (patch, _) in MUTANTS.items():
        with pytest.MonkeyPatch.context() as monkeypatch:
            patch(monkeypatch)
            begin = time.perf_counter()
            said, lines = start_sees(RICH), gate_sees(RICH, EXACT)
            cells = []
            for text in (said or "", "".join(lines[:1])):
                place = re.search(r"output (\d+)", text)
                cells.append(f"refused, at {place[1]}" if place else
                             "refused: losses are not the logits'" if text else "not seen")
            seconds = time.perf_counter() - begin
            print(f"| {name} | {' | '.join(cells)} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    print_mutants()
