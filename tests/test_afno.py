"""The operator against oracles that share no code with it: complex numbers, loops, O(T^2) sums, all in float64."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from afno import (AFNO1D, FORMS, AnalyticOperator, ShortConv, apply_causal_mask_freq, causal_conv, complex_relu,
                  complex_soft_shrink, rmsnorm, toeplitz)

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


def naive_mlp(mlp, z: np.ndarray) -> np.ndarray:
    """(num_blocks, n, in) complex -> (num_blocks, n, out), block by block."""
    w1, b1, w2, b2 = (p.detach().numpy() for p in (mlp.w1, mlp.b1, mlp.w2, mlp.b2))
    as_complex = lambda w: w[..., : w.shape[-1] // 2] + 1j * w[..., w.shape[-1] // 2 :]
    outputs = []
    for block in range(len(w1)):
        hidden = z[block] @ as_complex(w1[block]) + as_complex(b1[block])
        hidden = np.maximum(hidden.real, 0) + 1j * np.maximum(hidden.imag, 0)
        out = hidden @ as_complex(w2[block]) + as_complex(b2[block])
        outputs.append(np.where(abs(out) > mlp.sparsity_threshold, out * (1 - mlp.sparsity_threshold / abs(out)), 0))
    return np.array(outputs)


def naive_taps(operator, T: int) -> np.ndarray:
    """Taps 0 ... T - 1 of the filter, hilbert and analytic forms: complex numbers, DFT by definition."""
    if isinstance(operator, AnalyticOperator):
        decay, angle = (p.detach().numpy() for p in (operator.log_decay.exp(), operator.angle))
        features = np.exp(-1j * np.outer(angle, np.arange(33)))
        c = naive_mlp(operator.mlp, np.broadcast_to(features, (len(operator.mlp.w1), *features.shape)))
        c = c * np.sqrt((1 - np.exp(-2 * decay)) / (4 * len(decay)))[:, None]
        c = np.concatenate([block.T for block in c])  # (filters, poles)
        return np.array([[sum(c_m * np.exp(-d_m + 1j * a_m) ** t for c_m, d_m, a_m in zip(row, decay, angle)).real
                          for t in range(T)] for row in c])
    K, N = operator.filter_length, 2 * operator.filter_length
    modes = np.arange(operator.num_modes)
    features = np.exp(-2j * np.pi * np.outer(modes, np.arange(min(33, K))) / N)
    kept = naive_mlp(operator.mlp, np.broadcast_to(features, (len(operator.mlp.w1), *features.shape)))
    kept = np.concatenate([block.T for block in kept])
    response = np.zeros((len(kept), N), complex)  # at all N frequencies; a real kernel's, so symmetric
    for mode in modes:
        out = kept[:, mode].real + 0j if operator.hilbert or mode in (0, K) else kept[:, mode]
        response[:, mode], response[:, -mode % N] = out, out.conj()
    inverse = np.exp(2j * np.pi * np.outer(np.arange(N), np.arange(K)) / N) / N
    taps = (response @ inverse).real * np.exp(-np.arange(K) / np.geomspace(2, max(K / 2, 2), len(kept))[:, None])
    return np.pad(taps, ((0, 0), (0, max(0, T - K))))[:, :T]


@pytest.mark.parametrize("form", ("filter", "hilbert", "analytic"))
@pytest.mark.parametrize("K", (1, 5, 40, 64))
@pytest.mark.parametrize("fraction", (1.0, 0.5, 0.1))
def test_taps_are_afno_on_the_operators_spectrum(form, K, fraction):
    torch.manual_seed(K)
    operator = AFNO1D(12, 3, sparsity_threshold=0.3, hard_thresholding_fraction=fraction, filter_length=K,
                      form=form).double().operator
    with torch.no_grad():
        for b in (operator.mlp.b1, operator.mlp.b2):
            b.normal_()
    expected = naive_taps(operator, K)
    assert expected.shape == (operator.num_filters, K) and np.abs(expected).max() > 1e-3
    taps = operator.taps(K) if form == "analytic" else operator.taps()
    assert np.abs(taps.detach().numpy() - expected).max() < 1e-10


def test_poles_stay_inside_the_unit_disc():
    operator = AFNO1D(16, form="analytic").operator
    with torch.no_grad():
        operator.log_decay.normal_(std=3)
    assert (operator.poles()[0] < 0).all()
    assert operator.taps(3000)[:, -1].abs().max() < operator.taps(3000).abs().max()


# -----------------------------------------------------------------------------
# the causal mask in frequency


@pytest.mark.parametrize("n", (1, 2, 3, 4, 5, 16, 17, 128, 129))
def test_mask_in_frequency_is_the_mask_in_time(n):
    kernel = torch.randn(3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    masked = kernel * (torch.arange(n) < math.ceil(n / 2))
    got = apply_causal_mask_freq(torch.fft.rfft(kernel), n)
    assert (got - torch.fft.rfft(masked)).abs().max() < 1e-12


def test_mask_ignores_what_irfft_ignores():
    X = torch.randn(2, 9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    X = torch.view_as_complex(X)  # imaginary parts at frequency 0 and 8, too
    masked = torch.fft.irfft(X, 16) * (torch.arange(16) < 8)
    assert (apply_causal_mask_freq(X, 16) - torch.fft.rfft(masked)).abs().max() < 1e-12


@pytest.mark.parametrize("n", (0, 15, 18))
def test_mask_wants_all_frequencies(n):
    with pytest.raises(ValueError, match=r"^n must be >= 1 and X hold n // 2 \+ 1 frequencies"):
        apply_causal_mask_freq(torch.zeros(9, dtype=torch.complex64), n)


# -----------------------------------------------------------------------------
# AFNO's layer on data: the reference, and the dyadic form


def naive_layer(x: np.ndarray, operator, n: int) -> np.ndarray:
    """The paper's layer on one sequence (L, C) zero-padded to n points: DFT by definition, loops over blocks."""
    dft = np.exp(-2j * np.pi * np.outer(np.arange(n), np.arange(n)) / n) / np.sqrt(n)
    X = dft[:, : len(x)] @ x
    modes = math.ceil(operator.fraction * (n // 2 + 1))
    blocks = len(operator.mlp.w1)
    Y = naive_mlp(operator.mlp, X[:modes].reshape(modes, blocks, -1).transpose(1, 0, 2))
    whole = np.zeros((n, x.shape[1]), complex)
    for mode in range(modes):
        out = Y[:, mode].reshape(-1)
        out = out.real if mode == 0 or 2 * mode == n else out
        whole[mode], whole[-mode % n] = out, np.conj(out)
    return (dft.conj().T @ whole).real


def data_operator(form: str, fraction: float):
    torch.manual_seed(0)
    operator = AFNO1D(12, 3, sparsity_threshold=0.1, hard_thresholding_fraction=fraction, form=form).double().operator
    with torch.no_grad():
        for b in (operator.mlp.b1, operator.mlp.b2):
            b.normal_()
    return operator


@pytest.mark.parametrize("T", (1, 2, 31, 64))
@pytest.mark.parametrize("fraction", (1.0, 0.4))
def test_reference_is_the_papers_formula(T, fraction):
    operator, x = data_operator("reference", fraction), torch.randn(2, T, 12, dtype=torch.float64)
    for got, row in zip(operator(x), x):
        assert np.abs(got.detach().numpy() - naive_layer(row.numpy(), operator, T)).max() < 1e-10


@pytest.mark.parametrize("T", (1, 63, 64, 65, 130, 300))
@pytest.mark.parametrize("fraction", (1.0, 0.4))
def test_dyadic_is_its_definition(T, fraction):
    operator, x = data_operator("dyadic", fraction), torch.randn(1, T, 12, dtype=torch.float64)
    u, covered = np.zeros((512, 12)), np.zeros((512, 512), int)
    u[:T] = x[0]
    expected, per_filter, near = np.zeros((512, 12)), 12 // len(operator.near), operator.near.detach().numpy()
    for t in range(512):
        for s in range(t // 64 * 64, t + 1):
            expected[t] += near[:, t - s].repeat(per_filter) * u[s]
            covered[t, s] += 1
    for L in (64, 128, 256):
        for a in range(0, 512, 2 * L):
            expected[a + L : a + 2 * L] += naive_layer(u[a : a + L], operator, 2 * L)[L:] * (a + L < T)
            covered[a + L : a + 2 * L, a : a + L] += 1
    assert (covered == np.tri(512)).all()  # every pair s <= t exactly once
    assert np.abs(operator(x)[0].detach().numpy() - expected[:T]).max() < 1e-10


def test_48_filters_of_16_channels_at_768():
    mixer = AFNO1D(768, filter_length=8)
    assert mixer.operator.taps().shape == (48, 8)


def test_a_large_threshold_silences_the_convolution():
    mixer = AFNO1D(16, sparsity_threshold=1e6, filter_length=32)
    assert not mixer.operator.taps().any()


# -----------------------------------------------------------------------------
# the mixer


def naive_forward(mixer: AFNO1D, x):
    """The docstring's three lines with the convolution as a sum."""
    value, gate = (x @ mixer.c_in.weight.T).chunk(2, -1)
    value_taps, gate_taps = mixer.short_conv.taps.T.chunk(2)
    value, gate = toeplitz_sum(value, value_taps), toeplitz_sum(gate, gate_taps)
    y = toeplitz_sum(value, torch.from_numpy(naive_taps(mixer.operator, x.size(1)))) + mixer.direct * value
    y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return (gate / (1 + (-gate).exp()) * y) @ mixer.c_proj.weight.T


def random_mixer(filter_length: int, form: str) -> AFNO1D:
    torch.manual_seed(1)
    mixer = AFNO1D(24, num_blocks=4, filter_length=filter_length, form=form).double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return mixer


@pytest.mark.parametrize("form", ("filter", "hilbert", "analytic"))
@pytest.mark.parametrize("T", (1, 2, 50, 129))
def test_the_mixer_is_its_formula(form, T):
    mixer = random_mixer(50, form)  # filters shorter than, as long as and longer than T
    x = torch.randn(2, T, 24, dtype=torch.float64)
    assert relative(mixer(x), naive_forward(mixer, x)) < 1e-10
    assert relative(mixer.float()(x.float()).double(), mixer.double()(x)) < 1e-5


CAUSAL = tuple(form for form in FORMS if form != "reference")


@pytest.mark.parametrize("form", CAUSAL)
def test_a_longer_input_changes_no_prefix(form):
    mixer = random_mixer(40, form)
    x = torch.randn(1, 700, 24, dtype=torch.float64)
    whole = mixer(x)
    for T in (1, 39, 64, 65, 300):
        assert relative(mixer(x[:, :T]), whole[:, :T]) < 1e-10
    single = mixer.float()(x.float())
    for T in (1, 39, 64, 65, 300):
        assert relative(mixer(x[:, :T].float()), single[:, :T]) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_has_a_gradient(form):
    torch.manual_seed(0)
    mixer = AFNO1D(32, filter_length=64, form=form)
    mixer(torch.randn(2, 150, 32)).square().sum().backward()
    assert [name for name, p in mixer.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("form", CAUSAL)
@pytest.mark.parametrize("T", (64, 1024, 16384))
def test_the_mixed_signal_has_the_size_of_its_input(form, T):
    torch.manual_seed(0)
    mixer, u = AFNO1D(128, filter_length=1024, form=form), torch.randn(1, T, 128)
    y = mixer.operator(u) + u
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
    (dict(form="padded"), "form"),
))
def test_bad_arguments_are_named(arguments, name):
    with pytest.raises(ValueError, match=f"^{name} must "):
        AFNO1D(16, **arguments)
