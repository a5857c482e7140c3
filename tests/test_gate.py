"""The causality gate must be able to fail: mixers that leak, each in a known way."""
import dataclasses
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import afno
import test_causality
import train_gpt2_afno
from afno import AFNO1D, causal_conv, complex_linear, complex_relu, complex_soft_shrink
from test_causality import check_causality, moved_weights
from train_gpt2_afno import GPT, CausalSelfAttention, Gates, GPTConfig, Runtime

CONFIG = GPTConfig(**{**test_causality.SMALL, "n_layer": 2}, sequence_length=96)
CPU = torch.device("cpu")


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


def failed_rows(config: GPTConfig, name: str) -> list[str]:
    """Return what fails in the gate's table, in its order."""
    table = test_causality.check(config, [Runtime(CPU, torch.float32, compile=False)])
    test_causality.print_table(name, table)
    return [what for _, _, what, *_, passed in table if not passed]


def failures(monkeypatch, leak) -> list[str]:
    """Return the rows of the gate's table that a mixer does not pass."""
    monkeypatch.setattr(AFNO1D, "mix", instead_of_mix(leak))
    return failed_rows(CONFIG, leak.__name__)


@pytest.mark.parametrize("leak", LEAKS)
def test_gate_reports_every_known_leak(monkeypatch, leak):
    found = failures(monkeypatch, leak)
    kinds = [found.count(kind) for kind in ("float32", "float64", "float64 gradients")]
    assert kinds == [4, 4, 4]  # each time
    leaks = check_causality(GPT(CONFIG).hidden, 96, CONFIG.vocab_size)
    assert leaks and all(found.position < found.cut for found in leaks)
    assert str(leaks[0]).startswith(f"output {leaks[0].position} is the first that changes with ")


def test_a_whole_sequence_fft_is_causal_but_not_bitwise(monkeypatch):
    """Refuse rounding, too: float64 passes its bound, the training dtype does not."""

    def whole_sequence_fft(mixer, x, taps):
        T = x.size(1)
        response = torch.fft.rfft(taps[:, :T], n=2 * T, dim=1).repeat_interleave(2, 0).T
        return torch.fft.irfft(torch.fft.rfft(x, n=2 * T, dim=1) * response, n=2 * T, dim=1)[:, :T]

    monkeypatch.setattr(afno, "CHANNELS_PER_FILTER", 2)
    assert set(failures(monkeypatch, whole_sequence_fft)) == {"float32"}
    hidden = GPT(CONFIG).hidden
    assert check_causality(hidden, 96, CONFIG.vocab_size)
    assert check_causality(hidden, 96, CONFIG.vocab_size, tolerance=1e-5) == []


def test_a_mixer_that_ignores_its_input_tests_nothing(monkeypatch):
    """Gradients and changes that are zero everywhere are no proof of causality."""
    config = GPTConfig(**{**test_causality.SMALL, "n_layer": 1}, sequence_length=8)
    model = GPT(config)
    monkeypatch.setattr(model, "hidden", lambda idx: torch.zeros(*idx.shape, 4))
    leaks = check_causality(model.hidden, 8, config.vocab_size)
    assert [leak.cut for leak in leaks] == test_causality.cuts(8)
    assert all("changes nothing after it" in str(leak) for leak in leaks)
    leaks = test_causality.prefix_leaks(model.hidden, 8, config.vocab_size, CPU)
    assert leaks[0][0] == float("inf")


def refused_by_gate_and_check(**options) -> bool:
    """Return whether every kind of row fails at both lengths, of moved weights alone.

    The initial ones, zero, hide the leak.
    """
    config = dataclasses.replace(CONFIG, **options)
    found, model = failed_rows(config, str(options)), GPT(config)
    with moved_weights(model), torch.autocast("cpu", torch.bfloat16):
        assert check_causality(model.hidden, 96, config.vocab_size)
    return sorted(found) == ["float32"] * 2 + ["float64"] * 2 + ["float64 gradients"] * 2


@pytest.mark.parametrize("mixer", (AFNO1D, CausalSelfAttention))
def test_a_leak_through_the_first_value_is_found(monkeypatch, mixer):
    """Only what goes on to the other layers leaks; its share begins at zero."""
    value = mixer.value
    leaks = lambda self, z: value(self, z) + 0.01 * value(self, z).roll(-1, 1)
    if mixer is AFNO1D:  # its output takes the value once more, which is none of this test's
        own = lambda self, operand, y: self.c_proj(afno.rmsnorm(
            y + self.direct.to(operand.dtype) * value(self, operand)))
        monkeypatch.setattr(mixer, "output", own)
    monkeypatch.setattr(mixer, "value", leaks)
    name = "attn" if mixer is CausalSelfAttention else "afno"
    assert refused_by_gate_and_check(value_residual=1, mixer=name)


@pytest.mark.parametrize("options", (dict(value_residual=1), dict(mixer="attn", attn_gate=1)))
def test_a_leak_through_gates_is_found(monkeypatch, options):
    forward = Gates.forward
    monkeypatch.setattr(Gates, "forward", lambda self, h: forward(self, h.roll(-1, 1)))
    assert refused_by_gate_and_check(**options)


def test_nan_is_a_leak(monkeypatch):
    assert failures(monkeypatch, lambda mixer, x, taps: x * torch.nan)
    assert check_causality(GPT(CONFIG).hidden, 96, CONFIG.vocab_size)


@pytest.mark.parametrize("mix, form, status", (
    (AFNO1D.mix, "filter", 0), (AFNO1D.mix, "dyadic", 0), (AFNO1D.mix, "reference", 1),
    (instead_of_mix(padded_afno), "filter", 1)))
def test_exit_status_of_the_command(monkeypatch, capsys, mix, form, status):
    monkeypatch.setattr(AFNO1D, "mix", mix)
    flags = "--preset baseline --model d4 --attn_layers 1 --sequence_length 16 --device cpu " \
        f"--dtype float32 --afno_form {form}"
    assert test_causality.main(flags.split()) == status
    printed = capsys.readouterr().out
    assert ("LEAK" in printed) == ("NOT CAUSAL" in printed) == bool(status)


def test_state_layers_make_room_for_the_hybrids_attention(monkeypatch, capsys):
    monkeypatch.setitem(train_gpt2_afno.MODELS, "d4", (4, 16))
    flags = "--preset baseline --mixer afno --model d4 --sequence_length 16 --device cpu " \
        "--dtype float32 --afno_state_layers 2,3"
    assert test_causality.main(flags.split()) == 0
    printed = capsys.readouterr().out
    assert "\nattn\n" in printed and "\nafno, form state in (2, 3)\n" in printed
    assert "\nhybrid, attention in (2,), form state in (3,)\n" in printed


# -----------------------------------------------------------------------------
# the check by itself, for any model


class Toy(torch.nn.Module):
    """Add up the embeddings of all tokens until t + ahead."""

    def __init__(self, ahead: int):
        super().__init__()
        self.embedding, self.ahead = torch.nn.Embedding(50, 4), ahead

    def forward(self, idx):
        total = self.embedding(idx).double().cumsum(1)
        return F.pad(total, (0, 0, 0, self.ahead))[:, self.ahead :]


def test_the_check_takes_any_model_and_names_the_first_position_that_leaks():
    assert check_causality(Toy(0), 40, 50) == check_causality(Toy(0), 40, 50, rows=3) == []
    leaks = check_causality(Toy(1), 40, 50)
    found = [(leak.cut, leak.position) for leak in leaks]
    assert found == [(cut, cut - 1) for cut in (1, 3, 7, 15, 31, 32, 39)]
    assert str(leaks[1]).startswith("output 2 is the first that changes with the tokens from "
                                    "position 3 on (r = ")


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


def test_moved_weights_come_back_bit_for_bit():
    model = GPT(dataclasses.replace(CONFIG, value_residual=1, embedding_residual=1))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(KeyError), moved_weights(model):
        for p, old in zip(model.parameters(), before):
            assert not (p == old).any(), "every number moves, zeros and ones, too"
        raise KeyError
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before))
