"""The causality gate must be able to fail: mixers that leak, each in a known way, and what gate and trainer say."""
import dataclasses

import pytest
import torch
import torch.nn.functional as F

import test_causality
from afno import AFNO1D, causal_conv, complex_linear, complex_relu, complex_soft_shrink
from data.text_to_bin import InputError
from train_gpt2_afno import GPT, CausalSelfAttention, Gates, GPTConfig, Runtime, refuse_leaks, without_zeros

CONFIG = GPTConfig(**test_causality.SMALL, sequence_length=96)
CPU = torch.device("cpu")


def padded_afno(mixer, x, taps, *_):
    """The original AFNO (Guibas et al., 2022) on a sequence padded to 2T and cut back to T: MLP and shrink on data."""
    B, T, C = x.shape
    blocks, size = mixer.operator.taps.mlp.w1.size(1), C // mixer.operator.taps.mlp.w1.size(1)
    weight = lambda seed: torch.randn(blocks, size, 2 * size, generator=torch.Generator().manual_seed(seed)).to(x)
    X = torch.fft.rfft(x, n=2 * T, dim=1, norm="ortho").view(B, T + 1, blocks, size).permute(2, 0, 1, 3).flatten(1, 2)
    z = complex_linear((X.real, X.imag), weight(1) * size**-0.5, torch.zeros(blocks, 2 * size).to(x))
    z = complex_linear(complex_relu(z), weight(2) * size**-0.5, torch.zeros(blocks, 2 * size).to(x))
    X = torch.complex(*complex_soft_shrink(z, 0.01)).view(blocks, B, T + 1, size).permute(1, 2, 0, 3).flatten(2)
    return torch.fft.irfft(X, n=2 * T, dim=1, norm="ortho")[:, :T] + x


def learned_response(mixer, x, taps, *_):
    """A learned response at all 2T frequencies with padding: a kernel of both signs of lag."""
    T = x.size(1)
    response = torch.view_as_complex(torch.randn(T + 1, x.size(2), 2, generator=torch.Generator().manual_seed(1)).to(x))
    return torch.fft.irfft(torch.fft.rfft(x, n=2 * T, dim=1) * response, n=2 * T, dim=1)[:, :T]


def low_frequencies_only(mixer, x, taps, *_):
    """A causal kernel whose high frequencies are cut."""
    T = x.size(1)
    response = torch.fft.rfft(F.pad(taps[:, :T], (0, 2 * T - min(T, taps.size(1)))), dim=1)
    response = response.repeat_interleave(x.size(2) // len(response), 0).T.clone()
    response[T // 2 :] = 0
    return torch.fft.irfft(torch.fft.rfft(x, n=2 * T, dim=1) * response, n=2 * T, dim=1)[:, :T]


def block_summary(mixer, x, taps, *_):
    """The mean of 8 tokens, told to all of them."""
    B, T, C = x.shape
    padded = F.pad(x, (0, 0, 0, -T % 8)).view(B, -1, 8, C)
    return x + padded.mean(2, keepdim=True).expand_as(padded).reshape(B, -1, C)[:, :T]


def off_by_one(mixer, x, taps, *_):
    return F.pad(causal_conv(x, taps), (0, 0, 0, 1))[:, 1:]


def rolled(mixer, x, taps, *_):
    """Rolling the sequence: the last token comes first."""
    return x + x.roll(1, 1)


def norm_over_time(mixer, x, taps, *_):
    return x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()


LEAKS = (padded_afno, learned_response, low_frequencies_only, block_summary, off_by_one, rolled, norm_over_time)


def failed_rows(config: GPTConfig, name: str) -> list[str]:
    """Of the gate's table, in its order."""
    table = test_causality.check(config, [Runtime(CPU, torch.float32, compile=False)])
    test_causality.print_table(name, table)
    return [what for _, _, what, *_, passed in table if not passed]


def failures(monkeypatch, mixer) -> list[str]:
    """The rows of the gate's table that a mixer does not pass."""
    monkeypatch.setattr(AFNO1D, "forward", mixer)
    return failed_rows(CONFIG, mixer.__name__)


@pytest.mark.parametrize("leak", LEAKS)
def test_gate_reports_every_known_leak(monkeypatch, leak):
    found = failures(monkeypatch, leak)
    assert found.count("float32") == found.count("float64") == found.count("float64 gradients") == 4  # each time
    with pytest.raises(InputError, match=r"the model leaks, refusing to train: hidden state \d+ is the first"):
        refuse_leaks(GPT(CONFIG).hidden, 96, 1, CONFIG.vocab_size, CPU)


def test_a_whole_sequence_fft_is_causal_but_not_bitwise(monkeypatch):
    """Rounding is a leak, too: float64 passes its bound, the training dtype is refused (design: blocks, not one FFT)."""

    def whole_sequence_fft(mixer, x, taps, *_):
        T = x.size(1)
        response = torch.fft.rfft(taps[:, :T], n=2 * T, dim=1).repeat_interleave(2, 0).T
        return torch.fft.irfft(torch.fft.rfft(x, n=2 * T, dim=1) * response, n=2 * T, dim=1)[:, :T]

    monkeypatch.setattr(AFNO1D, "channels_per_filter", 2)
    assert set(failures(monkeypatch, whole_sequence_fft)) == {"float32"}


def test_a_mixer_that_ignores_its_input_tests_nothing(monkeypatch):
    """Gradients and changes that are zero everywhere are no proof of causality."""
    config = GPTConfig(**{**test_causality.SMALL, "n_layer": 1}, sequence_length=8)
    model = GPT(config)
    monkeypatch.setattr(model, "hidden", lambda idx: torch.zeros(*idx.shape, 4))
    with pytest.raises(InputError, match="changes nothing after it"):
        refuse_leaks(model.hidden, 8, 1, config.vocab_size, CPU)
    assert test_causality.prefix_leaks(model.hidden, 8, config.vocab_size, CPU)[0][0] == float("inf")


def refused_by_gate_and_trainer(**options) -> bool:
    """Whether every kind of row fails at both lengths, of perturbed weights alone: the initial ones, zero, hide the leak."""
    config = dataclasses.replace(CONFIG, **options)
    found, model = failed_rows(config, str(options)), GPT(config)
    with without_zeros(model), torch.autocast("cpu", torch.bfloat16), pytest.raises(InputError, match="the model leaks"):
        refuse_leaks(model.hidden, 96, 1, config.vocab_size, CPU)
    return sorted(found) == ["float32"] * 2 + ["float64"] * 2 + ["float64 gradients"] * 2


@pytest.mark.parametrize("mixer", (AFNO1D, CausalSelfAttention))
def test_a_leak_through_the_first_value_is_found(monkeypatch, mixer):
    """Only what goes on to the other layers leaks; its share begins at zero."""
    value = mixer.value
    monkeypatch.setattr(mixer, "value", lambda self, z: value(self, z) + 0.01 * value(self, z).roll(-1, 1))
    assert refused_by_gate_and_trainer(value_residual=1, mixer="attn" if mixer is CausalSelfAttention else "afno")


@pytest.mark.parametrize("options", (dict(value_residual=1), dict(mixer="attn", attn_gate=1)))
def test_a_leak_through_gates_is_found(monkeypatch, options):
    forward = Gates.forward
    monkeypatch.setattr(Gates, "forward", lambda self, h: forward(self, h.roll(-1, 1)))
    assert refused_by_gate_and_trainer(**options)


def test_nan_is_a_leak(monkeypatch):
    assert failures(monkeypatch, lambda mixer, x, taps, *_: x * torch.nan)


@pytest.mark.parametrize("mixer, form, status", ((AFNO1D.forward, "filter", 0), (AFNO1D.forward, "dyadic", 0),
                                                 (AFNO1D.forward, "reference", 1), (padded_afno, "filter", 1)))
def test_exit_status_of_the_command(monkeypatch, capsys, mixer, form, status):
    monkeypatch.setattr(AFNO1D, "forward", mixer)
    flags = f"--model d4 --attn_layers 1,2,3 --sequence_length 16 --device cpu --dtype float32 --afno_form {form}"
    assert test_causality.main(flags.split()) == status
    printed = capsys.readouterr().out
    assert ("LEAK" in printed) == ("NOT CAUSAL" in printed) == bool(status)


def test_state_layers_make_room_for_the_hybrids_attention(capsys):
    flags = "--model d4 --sequence_length 16 --device cpu --dtype float32 --afno_state_layers 2,3"
    assert test_causality.main(flags.split()) == 0
    printed = capsys.readouterr().out
    assert "\nattn\n" in printed and "\nafno, form state in (2, 3)\n" in printed
    assert "\nhybrid, attention in (2,), form state in (3,)\n" in printed
