"""The operator against oracles that share no code with it: complex numbers, loops, O(T^2) sums, all in float64."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from afno import AFNO1D, ShortConv, causal_conv, complex_relu, complex_soft_shrink, rmsnorm, toeplitz

LENGTHS = (1, 2, 3, 7, 31, 63, 64, 65, 127, 128, 129, 257)  # primes, powers of two, one more and one less
seeded = settings(derandomize=True, deadline=None, max_examples=40)


def relative(a, b) -> float:
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


def toeplitz_sum(u, taps):
    """y_t = sum over s <= t of taps[t - s] u_s, term by term of the lag."""
    T, per_filter = u.size(1), u.size(2) // taps.size(0)
    y = torch.zeros_like(u)
    for lag in range(min(T, taps.size(1))):
        y[:, lag:] += taps[:, lag].repeat_interleave(per_filter) * u[:, : T - lag]
    return y


def inputs(B, T, G, width, K, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(B, T, G * width, generator=generator, dtype=torch.float64)
    taps = torch.randn(G, K, generator=generator, dtype=torch.float64)
    return u.to(dtype).requires_grad_(), taps.to(dtype).requires_grad_()


# -----------------------------------------------------------------------------
# the convolution


@seeded
@given(B=st.integers(1, 3), T=st.sampled_from(LENGTHS), G=st.integers(1, 3), width=st.integers(1, 4),
       K=st.sampled_from(LENGTHS), seed=st.integers(0, 9))
def test_convolution_and_gradients_are_the_toeplitz_sums(B, T, G, width, K, seed):
    u, taps = inputs(B, T, G, width, K, seed=seed)
    y, expected = causal_conv(u, taps), toeplitz_sum(u, taps)
    upstream = torch.randn_like(y)
    assert relative(y, expected) < 1e-12
    for got, wanted in zip(torch.autograd.grad(y, (u, taps), upstream),
                           torch.autograd.grad(expected, (u, taps), upstream)):
        assert relative(got, wanted) < 1e-12


@pytest.mark.parametrize("T", (2048, 2049, 4500))  # blocks of 64, then wider ones
@pytest.mark.parametrize("K", (100, 5000))
def test_long_convolutions(T, K):
    u, taps = inputs(1, T, 2, 1, K)
    assert relative(causal_conv(u, taps), toeplitz_sum(u, taps)) < 1e-12


@pytest.mark.parametrize("dtype, bound", ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)))
def test_convolution_in_the_dtypes_that_train(dtype, bound):
    u, taps = inputs(2, 300, 3, 2, 300)
    expected = toeplitz_sum(u, taps)
    assert relative(causal_conv(u.to(dtype), taps.float()).double(), expected) < bound


def test_one_fft_for_every_prefix_gives_the_same():
    u, taps = inputs(1, 150, 2, 1, 200)
    y, k = causal_conv(u, taps).detach().numpy()[0], taps.detach().numpy()
    for t in range(150):
        n = 2 * (t + 1)
        prefix = np.fft.irfft(np.fft.rfft(u.detach().numpy()[0, : t + 1].T, n) * np.fft.rfft(k[:, : t + 1], n), n)
        assert np.abs(prefix[:, t] - y[t]).max() < 1e-10


def test_strided_input():
    u, taps = inputs(2, 90, 2, 3, 40)
    strided = torch.stack((u, u), -1)[..., 0].transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous() and torch.equal(causal_conv(strided, taps), causal_conv(u, taps))


def test_toeplitz():
    x = torch.arange(1.0, 5.0)
    expected = torch.tensor([[x[t - s] if t >= s else 0.0 for s in range(4)] for t in range(4)])
    assert torch.equal(toeplitz(x), expected)


def test_short_convolution():
    short = ShortConv(3).double()
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    assert torch.equal(short(x), x)  # begins as the identity
    with torch.no_grad():
        short.taps.copy_(torch.randn(4, 3))
    assert relative(short(x), toeplitz_sum(x, short.taps.T)) < 1e-14


# -----------------------------------------------------------------------------
# AFNO's pieces, and the taps that they generate


def test_complex_pieces():
    z = torch.complex(torch.randn(50, dtype=torch.float64), torch.randn(50, dtype=torch.float64))
    re, im = complex_relu((z.real, z.imag))
    assert torch.equal(torch.complex(re, im), torch.complex(z.real.clamp(min=0), z.imag.clamp(min=0)))
    shrunk = torch.complex(*complex_soft_shrink((z.real, z.imag), 0.7))
    expected = torch.where(z.abs() > 0.7, z * (z.abs() - 0.7) / z.abs(), 0)
    assert relative(shrunk, expected) < 1e-14 and (shrunk == 0).any() and (shrunk != 0).any()


def test_gradient_of_the_shrink_is_finite_at_zero():
    z = torch.zeros(3, requires_grad=True)
    sum(complex_soft_shrink((z, z), 0.01)).sum().backward()
    assert torch.isfinite(z.grad).all()


def naive_taps(mixer: AFNO1D) -> np.ndarray:
    """Frequency features -> block-diagonal complex MLP -> shrink -> inverse DFT by definition -> window, in loops."""
    K, N = mixer.filter_length, 2 * mixer.filter_length
    w1, b1, w2, b2 = (p.detach().numpy() for p in (mixer.w1, mixer.b1, mixer.w2, mixer.b2))
    as_complex = lambda w: w[..., : w.shape[-1] // 2] + 1j * w[..., w.shape[-1] // 2 :]
    filters = []
    for block in range(len(w1)):
        response = np.zeros((N, w2.shape[-1] // 2), complex)  # at all N frequencies
        for mode in range(mixer.num_modes):
            features = np.exp(-2j * np.pi * mode * np.arange(w1.shape[1]) / N)
            hidden = features @ as_complex(w1[block]) + as_complex(b1[block])
            hidden = np.maximum(hidden.real, 0) + 1j * np.maximum(hidden.imag, 0)
            out = hidden @ as_complex(w2[block]) + as_complex(b2[block])
            out = np.where(abs(out) > mixer.sparsity_threshold, out * (1 - mixer.sparsity_threshold / abs(out)), 0)
            response[mode] = out.real if mode in (0, K) else out  # a real kernel: real at both ends, symmetric
            if 0 < mode < K:
                response[N - mode] = out.conj()
        inverse = np.exp(2j * np.pi * np.outer(np.arange(K), np.arange(N)) / N) / N
        filters.extend((inverse @ response).real.T)
    tau = np.geomspace(2, max(K / 2, 2), len(filters))
    return np.array(filters) * np.exp(-np.arange(K) / tau[:, None])


@pytest.mark.parametrize("K", (1, 5, 40, 64))
@pytest.mark.parametrize("fraction", (1.0, 0.5, 0.1))
def test_taps_are_afno_on_the_operators_spectrum(K, fraction):
    torch.manual_seed(K)
    mixer = AFNO1D(12, num_blocks=3, sparsity_threshold=0.3, hard_thresholding_fraction=fraction, filter_length=K)
    mixer.double()
    with torch.no_grad():
        for b in (mixer.b1, mixer.b2):
            b.normal_()
    expected = naive_taps(mixer)
    assert expected.shape == (mixer.num_filters, K) and np.abs(expected).max() > 1e-3
    assert np.abs(mixer.taps().detach().numpy() - expected).max() < 1e-10


def test_48_filters_of_16_channels_at_768():
    mixer = AFNO1D(768, filter_length=8)
    assert mixer.taps().shape == (48, 8)


def test_a_large_threshold_silences_the_convolution():
    mixer = AFNO1D(16, sparsity_threshold=1e6, filter_length=32)
    assert not mixer.taps().any()


# -----------------------------------------------------------------------------
# the mixer


def naive_forward(mixer: AFNO1D, x):
    """The docstring's three lines with the convolution as a sum."""
    value, gate = (x @ mixer.c_in.weight.T).chunk(2, -1)
    value_taps, gate_taps = mixer.short_conv.taps.T.chunk(2)
    value, gate = toeplitz_sum(value, value_taps), toeplitz_sum(gate, gate_taps)
    y = toeplitz_sum(value, torch.from_numpy(naive_taps(mixer))) + mixer.direct * value
    y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return (gate / (1 + (-gate).exp()) * y) @ mixer.c_proj.weight.T


def random_mixer(filter_length: int) -> AFNO1D:
    torch.manual_seed(1)
    mixer = AFNO1D(24, num_blocks=4, filter_length=filter_length).double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return mixer


@pytest.mark.parametrize("T", (1, 2, 50, 129))
def test_the_mixer_is_its_formula(T):
    mixer = random_mixer(filter_length=50)  # shorter than, as long as and longer than T
    x = torch.randn(2, T, 24, dtype=torch.float64)
    assert relative(mixer(x), naive_forward(mixer, x)) < 1e-10
    assert relative(mixer.float()(x.float()).double(), mixer.double()(x)) < 1e-5


def test_a_longer_input_changes_no_prefix():
    mixer = random_mixer(filter_length=40)
    x = torch.randn(1, 700, 24, dtype=torch.float64)
    whole = mixer(x)
    for T in (1, 39, 64, 65, 300):
        assert relative(mixer(x[:, :T]), whole[:, :T]) < 1e-12


def test_every_parameter_has_a_gradient():
    torch.manual_seed(0)
    mixer = AFNO1D(32, filter_length=64)
    mixer(torch.randn(2, 64, 32)).square().sum().backward()
    assert [name for name, p in mixer.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("T", (64, 1024, 4096))
def test_the_mixed_signal_has_the_size_of_its_input(T):
    torch.manual_seed(0)
    mixer, u = AFNO1D(128, filter_length=1024), torch.randn(1, T, 128)
    y = causal_conv(u, mixer.taps()) + mixer.direct * u
    assert 0.5 < (y.square().mean() / u.square().mean()).sqrt() < 2


def test_norm():
    x = torch.randn(3, 5, dtype=torch.float64)
    assert relative(rmsnorm(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()) < 1e-14
    half = rmsnorm(x.bfloat16())
    assert half.dtype == torch.bfloat16 and relative(half.double(), rmsnorm(x)) < 1e-2


@pytest.mark.parametrize("arguments, name", (
    (dict(num_blocks=5), "num_blocks"), (dict(num_blocks=0), "num_blocks"), (dict(num_blocks=32), "num_blocks"),
    (dict(sparsity_threshold=-0.1), "sparsity_threshold"), (dict(sparsity_threshold=math.nan), "sparsity_threshold"),
    (dict(hard_thresholding_fraction=0.0), "hard_thresholding_fraction"),
    (dict(hard_thresholding_fraction=1.1), "hard_thresholding_fraction"), (dict(filter_length=0), "filter_length"),
))
def test_bad_arguments_are_named(arguments, name):
    with pytest.raises(ValueError, match=f"^{name} must "):
        AFNO1D(16, **arguments)
