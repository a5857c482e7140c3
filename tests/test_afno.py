"""The operator against oracles that share no code with it.

They are complex numbers, loops and O(T^2) sums, all in float64.
"""
import math
import runpy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import afno
from afno import (AFNO1D, FORMS, ROUTINGS, ShortConv, apply_causal_mask_freq, causal_conv,
                  check_arguments, complex_relu, complex_soft_shrink, inverse_rdft,
                  longest_matches, make_operator, mean_rows, newest_matches, plain_short_conv,
                  rmsnorm, taps_at_once, toeplitz, token_conv)
from helpers import matches_by_definition, relative, toeplitz_sum, token_by_token

# primes, powers of two, one more and one less
LENGTHS = (1, 2, 3, 7, 31, 63, 64, 65, 127, 128, 129, 257)
seeded = settings(derandomize=True, deadline=None, max_examples=40)


def inputs(B, T, G, width, K, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(B, T, G * width, generator=generator, dtype=torch.float64)
    taps = torch.randn(G, K, generator=generator, dtype=torch.float64)
    return u.to(dtype).requires_grad_(), taps.to(dtype).requires_grad_()


# -----------------------------------------------------------------------------
# the convolution


@pytest.mark.slow
@seeded
@given(B=st.integers(1, 3), T=st.sampled_from(LENGTHS), G=st.integers(1, 3),
       width=st.integers(1, 4), K=st.sampled_from(LENGTHS), seed=st.integers(0, 9))
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
        prefix = np.fft.irfft(np.fft.rfft(u.detach().numpy()[0, : t + 1].T, n)
                              * np.fft.rfft(k[:, : t + 1], n), n)
        assert np.abs(prefix[:, t] - y[t]).max() < 1e-10


def test_strided_input():
    u, taps = inputs(2, 90, 2, 3, 40)
    strided = torch.stack((u, u), -1)[..., 0].transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    assert torch.equal(causal_conv(strided, taps), causal_conv(u, taps))


@pytest.mark.parametrize("K", (1, 2, 3, 7, 12, 31, 32, 100, 512, 1024))
def test_inverse_rdft(K):
    generator = torch.Generator().manual_seed(K)
    re, im = torch.randn(2, 2, 3, K + 1, dtype=torch.float64, generator=generator)
    re.requires_grad_(), im.requires_grad_()
    y, expected = inverse_rdft(re, im), torch.fft.irfft(torch.complex(re, im), n=2 * K)[..., :K]
    upstream = torch.randn_like(y)
    assert y.shape == (2, 3, K) and relative(y, expected) < 1e-13
    for got, wanted in zip(torch.autograd.grad(y, (re, im), upstream),
                           torch.autograd.grad(expected, (re, im), upstream)):
        assert (got - wanted).norm() < 1e-13 * upstream.norm()
    exact, y = y, inverse_rdft(re.float(), im.float())
    assert relative(y.double(), exact) < 1e-6


def test_toeplitz():
    x = torch.arange(1.0, 5.0)
    expected = torch.tensor([[x[t - s] if t >= s else 0.0 for s in range(4)] for t in range(4)])
    assert torch.equal(toeplitz(x), expected)


def test_short_convolution():
    short = ShortConv(3, 4).double()
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    assert torch.equal(short(x), x)  # begins as the identity
    with torch.no_grad():
        short.taps.copy_(torch.randn(4, 3))
    assert relative(short(x), toeplitz_sum(x, short.taps.T)) < 1e-14
    assert torch.equal(short(x), plain_short_conv(x, short.taps))
    y = toeplitz_sum(x, short.taps.T)
    assert relative(plain_short_conv(x, short.taps, silu=True), y / (1 + (-y).exp())) < 1e-14


def token_sum(u, w):
    """y[t] = sum over lags j of w[t, j] u[t - j], one product at a time."""
    width, y = u.size(2) // w.size(2), torch.zeros_like(u)
    for t in range(u.size(1)):
        for j in range(min(w.size(3), t + 1)):
            y[:, t] = y[:, t] + w[:, t, :, j].repeat_interleave(width, 1) * u[:, t - j]
    return y


@pytest.mark.slow
@seeded
@given(B=st.integers(1, 2), T=st.sampled_from((1, 2, 15, 63, 64, 65, 129)), G=st.integers(1, 3),
       width=st.integers(1, 3), K=st.sampled_from((1, 2, 5, 16)))
def test_taps_of_each_token_and_gradients_are_the_sums(B, T, G, width, K):
    u, _ = inputs(B, T, G, width, 1)
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(B, T, G, K, generator=generator, dtype=torch.float64).requires_grad_()
    y, expected = token_conv(u, w), token_sum(u, w)
    assert relative(y, expected) < 1e-13
    upstream = torch.randn_like(y)
    for got, wanted in zip(torch.autograd.grad(y, (u, w), upstream),
                           torch.autograd.grad(expected, (u, w), upstream)):
        assert (got - wanted).norm() < 1e-13 * (1 + wanted.norm())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_no_token_changes_what_is_before_it(dtype):
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(shape, generator=generator).to(dtype)
    u, w = random(2, 150, 6), random(2, 150, 2, 64)
    y = token_conv(u, w)
    for cut in (1, 63, 64, 65, 149):
        other_u, other_w = u.clone(), w.clone()
        other_u[:, cut:], other_w[:, cut:] = random(2, 150 - cut, 6), random(2, 150 - cut, 2, 64)
        assert torch.equal(token_conv(other_u, other_w)[:, :cut], y[:, :cut])


# -----------------------------------------------------------------------------
# AFNO's pieces, and the taps that they generate


def test_complex_pieces():
    z = torch.complex(torch.randn(50, dtype=torch.float64), torch.randn(50, dtype=torch.float64))
    re, im = complex_relu((z.real, z.imag))
    expected = torch.complex(z.real.clamp(min=0), z.imag.clamp(min=0))
    assert torch.equal(torch.complex(re, im), expected)
    shrunk = torch.complex(*complex_soft_shrink((z.real, z.imag), 0.7))
    expected = torch.where(z.abs() > 0.7, z * (z.abs() - 0.7) / z.abs(), 0)
    for threshold in torch.linspace(0.001, 1, 1000):
        half = torch.full((1,), float(threshold) / 2)
        # an exact zero, in fp32 too
        assert not complex_soft_shrink((half, half), float(threshold))[0].any()
    assert relative(shrunk, expected) < 1e-14 and (shrunk == 0).any() and (shrunk != 0).any()


def test_gradient_of_the_shrink_is_finite_at_zero():
    z = torch.zeros(3, requires_grad=True)
    sum(complex_soft_shrink((z, z), 0.01)).sum().backward()
    assert torch.isfinite(z.grad).all()


def naive_mlp(mlp, z: np.ndarray) -> np.ndarray:
    """(num_blocks, n, in) complex -> (num_experts, num_blocks, n, out), block by block."""
    w1, b1, w2, b2 = (0 * w.detach().numpy().sum(2) if p is None else p.detach().numpy()
                      for p, w in ((mlp.w1, 0), (mlp.b1, mlp.w1), (mlp.w2, 0), (mlp.b2, mlp.w2)))
    experts = len(w1)
    w1, b1, w2, b2 = (part.reshape(-1, *part.shape[2:]) for part in (w1, b1, w2, b2))
    as_complex = lambda w: w[..., : w.shape[-1] // 2] + 1j * w[..., w.shape[-1] // 2 :]
    shrink = lambda x, by: np.where(abs(x) > by, x * (1 - by / np.maximum(abs(x), 1e-300)), 0)
    outputs = []
    for i in range(len(w1)):
        hidden = z[i % len(z)] @ as_complex(w1[i]) + as_complex(b1[i])
        hidden = np.maximum(hidden.real, 0) + 1j * np.maximum(hidden.imag, 0)
        out = hidden @ as_complex(w2[i]) + as_complex(b2[i])
        outputs.append(shrink(out, mlp.sparsity_threshold))
    return np.array(outputs).reshape(experts, len(z), *outputs[0].shape)


def shares(router, routing: str, place) -> np.ndarray:
    """How much of every expert there is at these frequencies / pi or lags in tokens.

    (num_experts or 1, len(place)).
    """
    if routing != router.routing or not list(router.parameters()):
        return np.ones((1, len(place)))
    if routing == "position":
        first, last = np.log(1 + np.array(router.lags))
        place = np.clip((np.log(1 + np.array(place)) - first) / (last - first), 0, 1)
    centre, width = router.centre.detach().numpy(), np.exp(router.log_width.detach().numpy())
    bands = np.array([np.exp(-((place - c) / w) ** 2 / 2) for c, w in zip(centre, width)])
    return bands / bands.sum(0)


def naive_response(operator, angle) -> np.ndarray:
    """The MLP at poles' angles: (experts, filters or heads, poles), complex."""
    features = np.exp(-1j * np.outer(angle, np.arange(33)))
    blocks = operator.mlp.w1.shape[1]
    c = naive_mlp(operator.mlp, np.broadcast_to(features, (blocks, *features.shape)))
    return np.array([np.concatenate([block.T for block in expert]) for expert in c])


def naive_taps(operator, T: int) -> np.ndarray:
    """Taps 0 ... T - 1 of the filter and hilbert forms: complex numbers, DFT by definition."""
    maker = operator.taps
    blocks, K, N = maker.mlp.w1.shape[1], maker.filter_length, 2 * maker.filter_length
    modes = np.arange(maker.num_modes)
    features = np.exp(-2j * np.pi * np.outer(modes, np.arange(33)) / N)
    features = np.broadcast_to(features, (blocks, *features.shape))
    by_frequency = shares(maker.router, "frequency", modes / K)
    taps, by_lag = 0, shares(maker.router, "position", np.arange(K))
    for expert, kept in enumerate(naive_mlp(maker.mlp, features)):
        share = by_frequency[expert % len(by_frequency)]
        kept = np.concatenate([block.T for block in kept]) * share
        # at all N frequencies; a real kernel's, so symmetric
        response = np.zeros((len(kept), N), complex)
        for mode in modes:
            out = kept[:, mode].real + 0j if maker.hilbert or mode in (0, K) else kept[:, mode]
            response[:, mode], response[:, -mode % N] = out, out.conj()
        inverse = np.exp(2j * np.pi * np.outer(np.arange(N), np.arange(K)) / N) / N
        taps = taps + (response @ inverse).real * by_lag[expert % len(by_lag)]
    taps = taps * np.exp(-np.arange(K) / np.geomspace(2, max(K / 2, 2), len(taps))[:, None])
    return np.pad(taps, ((0, 0), (0, max(0, T - K))))[:, :T]


@pytest.mark.parametrize("form", ("filter", "hilbert"))
@pytest.mark.parametrize("K", (1, 5, 40, 64))
@pytest.mark.parametrize("fraction", (1.0, 0.5, 0.1))
def test_taps_are_afno_on_the_operators_spectrum(form, K, fraction):
    assert_naive_taps(form, K, hard_thresholding_fraction=fraction)


@pytest.mark.parametrize("form", ("filter", "hilbert"))
@pytest.mark.parametrize("routing", ROUTINGS)
def test_taps_of_experts(form, routing):
    for num_experts in (1, 2, 4):
        assert_naive_taps(form, 40, routing=routing, num_experts=num_experts)


def assert_naive_taps(form, K, **options):
    torch.manual_seed(K)
    mixer = AFNO1D(12, 3, sparsity_threshold=0.3, filter_length=K, form=form, **options)
    operator = mixer.double().operator
    randomize(operator)
    expected = naive_taps(operator, K)
    assert expected.shape == (3, K) and np.abs(expected).max() > 1e-3
    assert np.abs(operator.taps().detach().numpy() - expected).max() < 1e-10


OPTIONS = ({}, dict(hard_thresholding_fraction=0.4), dict(num_experts=2),
           dict(num_experts=3, routing="position"))


@pytest.mark.parametrize("form", ("filter", "hilbert"))
@pytest.mark.parametrize("options", OPTIONS)
def test_taps_at_once_are_each_makers_own(form, options):
    torch.manual_seed(0)
    makers = [AFNO1D(12, 3, filter_length=40, form=form, **options).double().operator.taps
              for _ in range(4)]
    for maker in makers:
        randomize(maker)
    own, at_once = torch.stack([maker() for maker in makers]), taps_at_once(makers)
    assert at_once.shape == (4, 3, 40) and relative(at_once, own) < 1e-14
    parameters = [p for maker in makers for p in maker.parameters()]
    upstream = torch.randn_like(own)
    for ours, theirs in zip(*(torch.autograd.grad(taps, parameters, upstream)
                              for taps in (at_once, own))):
        assert theirs.any() and relative(ours, theirs) < 1e-13


@torch.no_grad()
def randomize(module):
    """Move every parameter, biases from zero above all."""
    for name, p in module.named_parameters():
        p.add_(torch.randn_like(p) * (1.0 if name.endswith(("b1", "b2")) else 0.1))


def test_experts_are_mixed_in_bands():
    router = AFNO1D(12, 3, num_experts=4).operator.taps.router
    share = router.by_frequency(torch.eye(4)[:, :, None].expand(4, 4, 33),
                                torch.linspace(0, math.pi, 33))[0]
    assert torch.allclose(share.sum(0), torch.ones(33))
    assert share.argmax(0).unique_consecutive().tolist() == [0, 1, 2, 3]  # one after the other


def test_one_expert_is_the_plain_operator():
    plain, *routed = (AFNO1D(12, 3, num_experts=1, routing=routing)
                      for routing in ("frequency", *ROUTINGS))
    for mixer in routed:
        assert mixer.load_state_dict(plain.state_dict())
        assert torch.equal(mixer.operator.taps(), plain.operator.taps())


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
    """The paper's layer on one sequence (L, C) zero-padded to n points.

    DFT by definition, loops over blocks.
    """
    dft = np.exp(-2j * np.pi * np.outer(np.arange(n), np.arange(n)) / n) / np.sqrt(n)
    X = dft[:, : len(x)] @ x
    modes = math.ceil(operator.fraction * (n // 2 + 1))
    blocks = operator.mlp.w1.shape[1]
    # (experts, blocks, modes, out)
    Y = naive_mlp(operator.mlp, X[:modes].reshape(modes, blocks, -1).transpose(1, 0, 2))
    for routing, place in (("frequency", 2 * np.arange(modes) / n), ("position", [len(x)])):
        Y = Y * shares(operator.router, routing, place)[:, None, :, None]
    Y = Y.sum(0)
    whole = np.zeros((n, x.shape[1]), complex)
    for mode in range(modes):
        out = Y[:, mode].reshape(-1)
        out = out.real if mode == 0 or 2 * mode == n else out
        whole[mode], whole[-mode % n] = out, np.conj(out)
    return (dft.conj().T @ whole).real


def data_operator(form: str, **options):
    torch.manual_seed(0)
    operator = AFNO1D(12, 3, sparsity_threshold=0.1, form=form, **options).double().operator
    randomize(operator)
    return operator


@pytest.mark.parametrize("T", (1, 2, 31, 64))
@pytest.mark.parametrize("fraction", (1.0, 0.4))
def test_reference_is_the_papers_formula(T, fraction):
    operator = data_operator("reference", hard_thresholding_fraction=fraction)
    x = torch.randn(2, T, 12, dtype=torch.float64)
    for got, row in zip(operator(x), x):
        assert np.abs(got.detach().numpy() - naive_layer(row.numpy(), operator, T)).max() < 1e-10


@pytest.mark.parametrize("T", (1, 63, 64, 65, pytest.param(300, marks=pytest.mark.slow)))
@pytest.mark.parametrize("options", OPTIONS)
def test_state_is_its_recurrence(T, options):
    operator = data_operator("state", **options)
    z = torch.randn(2, T, sum(operator.sizes), dtype=torch.float64)
    z.requires_grad_()
    got, G = operator(z), operator.num_heads
    angles = operator.log_angle.exp()
    angle = angles.detach().numpy()
    c = naive_response(operator, angle)
    tau = 1 / np.log1p(np.exp(operator.log_decay.detach().numpy()))
    c = c * shares(operator.router, "frequency", angle / np.pi)[:, None]
    c = torch.from_numpy((c * shares(operator.router, "position", tau)[:, :, None]).sum(0))
    ends = np.cumsum(operator.sizes)
    v, k, q = (z[..., a:b].unflatten(-1, (G, -1)) for a, b in zip((0, *ends), ends))
    k, q = (part / (part.square().mean(-1, keepdim=True) + 1e-6).sqrt() for part in (k, q))
    k, q = (torch.complex(*part.chunk(2, -1)) for part in (k, q))
    turn, S, expected = torch.polar(torch.ones(len(angle)).double(), angles), 0, []
    for t in range(T):
        # exp(-softplus(x))
        a = 1 / (1 + torch.exp(operator.log_decay + v[:, t].flatten(1) @ operator.decay.T))
        S = a[..., None, None] * turn[:, None] * S + k[:, t, :, :, None] * v[:, t, :, None]
        y = ((c * q[:, t])[..., None] * S).sum(2).real
        expected.append((y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()).flatten(1))
    expected = torch.stack(expected, 1)
    upstream = torch.randn_like(got)
    wanted = [z, operator.decay, operator.log_decay, operator.log_angle]
    assert relative(got, expected) < 1e-10
    for ours, theirs in zip(torch.autograd.grad(got, wanted, upstream),
                            torch.autograd.grad(expected, wanted[:-1], upstream)):
        assert relative(ours, theirs) < 1e-8


@pytest.mark.parametrize("T", (1, 63, 64, 65, 130, 300))
@pytest.mark.parametrize("options", OPTIONS)
def test_dyadic_is_its_definition(T, options):
    operator, x = data_operator("dyadic", **options), torch.randn(1, T, 12, dtype=torch.float64)
    size = 64 if T <= 64 else 128 if T <= 128 else 256 if T <= 256 else 512
    u, covered = np.zeros((size, 12)), np.zeros((size, size), int)
    u[:T] = x[0]
    expected, near = np.zeros((size, 12)), operator.near.detach().numpy()
    per_filter = 12 // len(near)
    for t in range(size):
        for s in range(t // 64 * 64, t + 1):
            expected[t] += near[:, t - s].repeat(per_filter) * u[s]
            covered[t, s] += 1
    for L in (64, 128, 256):
        for a in range(0, size, 2 * L) if L < size else ():
            later = naive_layer(u[a : a + L], operator, 2 * L)[L:]
            expected[a + L : a + 2 * L] += later * (a + L < T)
            covered[a + L : a + 2 * L, a : a + L] += 1
    assert (covered == np.tri(size)).all()  # every pair s <= t exactly once
    assert np.abs(operator(x)[0].detach().numpy() - expected[:T]).max() < 1e-10


def test_12_filters_of_64_channels_at_768():
    mixer = AFNO1D(768, filter_length=8)
    assert mixer.operator.taps().shape == (12, 8)


def test_a_large_threshold_silences_the_convolution():
    mixer = AFNO1D(16, sparsity_threshold=1e6, filter_length=32)
    assert not mixer.operator.taps().any()


# -----------------------------------------------------------------------------
# the mixer


def naive_forward(mixer: AFNO1D, x, silu: bool = True, token_taps: int = 0):
    """The docstring's lines with the convolution as a sum."""
    C = x.size(-1)
    z = toeplitz_sum(x @ mixer.c_in.weight.T, mixer.short_conv.taps.T)
    value = z[..., :C]
    value = value / (1 + (-value).exp()) if silu else value
    taps = torch.from_numpy(naive_taps(mixer.operator, x.size(1)))
    y = toeplitz_sum(value, taps) + mixer.direct * value
    if token_taps:
        w = (x @ mixer.token_taps.w.T / 10).view(*x.shape[:2], len(taps), token_taps)
        y = y + token_sum(value, w)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return y @ mixer.c_proj.weight.T


def random_mixer(filter_length: int, form: str, dtype=torch.float64, C: int = 24,
                 **options) -> AFNO1D:
    torch.manual_seed(1)
    options = {"num_blocks": 4, **options}
    mixer = AFNO1D(C, **options, filter_length=filter_length, form=form).double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return mixer.to(dtype)


# relative, of outputs; bf16 is autocast's
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def assert_agrees(mixer: AFNO1D, x, expected, dtype):
    """In float64, in fp32, or in bf16 as it trains: parameters in fp32, under autocast."""
    mixer.to(torch.promote_types(dtype, torch.float32))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        got = mixer(x.to(torch.promote_types(dtype, torch.float32))).double()
    assert relative(got, expected) < BOUNDS[dtype]


@seeded
@given(form=st.sampled_from(("filter", "hilbert")), B=st.integers(1, 3), T=st.sampled_from(LENGTHS),
       num_blocks=st.sampled_from((1, 2, 3)), size=st.sampled_from((1, 4, 17, 32)),
       K=st.sampled_from((1, 50, 130)), dtype=st.sampled_from(list(BOUNDS)),
       contiguous=st.booleans(), silu=st.booleans(), token_taps=st.sampled_from((0, 3)))
def test_the_mixer_is_its_formula(form, B, T, num_blocks, size, K, dtype, contiguous, silu,
                                  token_taps):
    # filters shorter and longer than T
    mixer = random_mixer(K, form, C=num_blocks * size, num_blocks=num_blocks, silu=silu,
                         token_taps=token_taps)
    x = torch.randn(B, T, num_blocks * size, dtype=torch.float64)
    if not contiguous:
        x = torch.stack((x, x), -1)[..., 0].transpose(0, 1).contiguous().transpose(0, 1)
        assert min(B, T) == 1 or not x.is_contiguous()
    assert_agrees(mixer, x, naive_forward(mixer, x, silu, token_taps), dtype)


@pytest.mark.parametrize("silu", (False, True))
@pytest.mark.parametrize("short_conv", (1, 4, 7))
def test_without_short_convolution_and_with_others(short_conv, silu):
    mixer = random_mixer(50, "filter", short_conv=short_conv, silu=silu)
    x = torch.randn(2, 60, 24, dtype=torch.float64)
    assert mixer.c_in.out_features == 24
    assert_agrees(mixer, x, naive_forward(mixer, x, silu), torch.float64)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_dyadic_in_the_dtypes_that_train(dtype):
    mixer, x = random_mixer(50, "dyadic"), torch.randn(2, 300, 24, dtype=torch.float64)
    assert_agrees(mixer, x, mixer(x), dtype)  # its float64 is proven above


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


VARIANTS = ({}, dict(num_experts=2), dict(num_experts=3, routing="position"),
            dict(short_conv=4), dict(short_conv=4, silu=False), dict(token_taps=5))


def generated(mixer, x):
    """Return the mixer's outputs for x, made token by token."""
    return token_by_token(lambda x_t, state: mixer.step(mixer.project(x_t), x_t, state=state), x)[0]


STATE_IS_SLOW = [
    pytest.param(form, marks=pytest.mark.slow) if form == "state" else form for form in CAUSAL]


@pytest.mark.parametrize("form", STATE_IS_SLOW)
@pytest.mark.parametrize("variant", VARIANTS)
def test_token_by_token_is_the_forward_pass(form, variant):
    mixer = random_mixer(100, form, **variant)
    # beyond filter_length, and over several of the dyadic form's levels
    x = torch.randn(2, 300, 24, dtype=torch.float64)
    assert relative(generated(mixer, x), mixer(x)) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("form", STATE_IS_SLOW)
def test_two_thousand_tokens_one_by_one_in_fp32(form):
    torch.manual_seed(0)
    mixer, x = AFNO1D(64, form=form), torch.randn(1, 2000, 64)
    assert relative(generated(mixer, x), mixer(x)) < 1e-4


@pytest.mark.parametrize("form", ("state", "filter"))
def test_the_state_does_not_grow(form):
    mixer, state, sizes = AFNO1D(16, form=form, filter_length=8), None, []
    for _ in range(20):
        h = torch.randn(1, 16)
        _, state = mixer.step(mixer.project(h), h, state=state)
        sizes.append(sum(part.numel() for part in state[1] if isinstance(part, torch.Tensor)))
    assert len({*sizes[8:]}) == 1 and sizes[0] <= sizes[8]


@pytest.mark.parametrize("form", CAUSAL)
def test_nothing_in_gives_nothing_out(form):
    """No bias in frequency may become an impulse in time, at token 0 or anywhere."""
    mixer = random_mixer(100, form)
    assert not mixer(torch.zeros(1, 300, 24, dtype=torch.float64)).any()


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_after_one_optimizer_step_every_parameter_has_a_gradient(form, variant):
    if form == "reference" and "num_experts" in variant:
        pytest.skip("the paper's layer has no experts")
    torch.manual_seed(0)
    mixer = AFNO1D(32, filter_length=64, form=form, **variant)
    optimizer = torch.optim.AdamW(mixer.parameters())
    x, wanted = torch.randn(2, 150, 32), torch.randn(2, 150, 32)
    for _ in range(2):
        optimizer.zero_grad()
        (mixer(x) - wanted).square().mean().backward()
        optimizer.step()
    assert [name for name, p in mixer.named_parameters()
            if p.grad is None or not p.grad.any()] == []
    mlp = (mixer.operator.taps if form in ("filter", "hilbert") else mixer.operator).mlp
    for gradient in (mlp.w1.grad, mlp.w2.grad):  # every expert's, not one's alone
        sizes = gradient.flatten(1).norm(dim=1)
        assert sizes.min() > 0.01 * sizes.max()


@pytest.mark.parametrize("C, num_blocks", ((16, 16), (17, 1)))
def test_one_channel_a_filter(C, num_blocks):
    for form in CAUSAL:
        mixer = random_mixer(50, form, C=C, num_blocks=num_blocks)
        x = torch.randn(2, 150, C, dtype=torch.float64)
        assert relative(mixer(x)[:, :70], mixer(x[:, :70])) < 1e-10


@pytest.mark.parametrize("form", CAUSAL)
@pytest.mark.parametrize("T", (64, 1024, 16384))
def test_the_mixed_signal_has_the_size_of_its_input(form, T):
    torch.manual_seed(0)
    mixer = AFNO1D(128, filter_length=1024, form=form)
    operand = torch.randn(1, T, mixer.c_in.out_features)
    y, u = mixer.operator(operand), operand[..., :128]
    assert (y.square().mean() / u.square().mean()).sqrt() > 0.4  # the operator does something
    y = y + u  # the direct term
    assert 0.5 < (y.square().mean() / u.square().mean()).sqrt() < 2


def test_norm():
    x = torch.randn(3, 5, dtype=torch.float64)
    assert relative(rmsnorm(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()) < 1e-14
    half = rmsnorm(x.bfloat16())
    assert half.dtype == torch.bfloat16 and relative(half.double(), rmsnorm(x)) < 1e-2


@pytest.mark.parametrize("arguments, name", (
    (dict(num_blocks=5), "num_blocks"), (dict(num_blocks=0), "num_blocks"),
    (dict(num_blocks=32), "num_blocks"), (dict(hidden_size=0), "hidden_size"),
    (dict(filter_length=3.5), "filter_length"), (dict(num_experts=2.0), "num_experts"),
    (dict(sparsity_threshold=math.inf), "sparsity_threshold"),
    (dict(sparsity_threshold=-0.1), "sparsity_threshold"),
    (dict(sparsity_threshold=math.nan), "sparsity_threshold"),
    (dict(hard_thresholding_fraction=0.0), "hard_thresholding_fraction"),
    (dict(hard_thresholding_fraction=1.1), "hard_thresholding_fraction"),
    (dict(filter_length=0), "filter_length"), (dict(form="padded"), "form"),
    (dict(num_experts=0), "num_experts"), (dict(routing="data"), "routing"),
    (dict(short_conv=0), "short_conv"), (dict(silu=2), "silu"),
    (dict(token_taps=-1), "token_taps"), (dict(token_taps=65), "token_taps"),
    (dict(token_taps=1.5), "token_taps"),
    (dict(form="reference", num_experts=2), "num_experts"),
))
def test_bad_arguments_are_named(arguments, name):
    with pytest.raises(ValueError, match=f"^{name} must "):
        AFNO1D(**{"hidden_size": 16, **arguments})


# -----------------------------------------------------------------------------
# the interface


def test_the_papers_arguments_work():
    mixer = AFNO1D(hidden_size=64, num_blocks=8, sparsity_threshold=0.01)
    mlp = mixer.operator.taps.mlp
    assert mlp.w1.shape[1] == 8 and mlp.sparsity_threshold == 0.01
    assert mixer(torch.randn(2, 10, 64)).shape == (2, 10, 64)


def test_every_form_has_its_operator():
    kinds = [type(make_operator(form, 24, 4, 0.01, 1.0, 50, 1, "frequency")).__name__
             for form in FORMS]
    assert kinds == ["FilterOperator", "FilterOperator", "StateOperator", "DyadicOperator",
                     "ReferenceOperator"]
    for form, kind in zip(FORMS, kinds):  # filters: what makes taps, for all layers at once
        mixer = AFNO1D(24, form=form)
        assert mixer.filters is (mixer.operator.taps if kind == "FilterOperator" else None)


def test_check_arguments_is_what_the_mixer_calls(monkeypatch):
    given = []
    monkeypatch.setattr(afno, "check_arguments", lambda *arguments: given.append(arguments))
    arguments = 24, 4, 0.1, 0.5, 50, "hilbert", 2, "position", 3, True, 7
    AFNO1D(*arguments)
    assert given == [arguments]
    assert check_arguments(*given[0]) is None


def test_what_is_given_to_mix_is_used():
    mixer, x = random_mixer(40, "filter"), torch.randn(2, 90, 24, dtype=torch.float64)
    z, taps, added = mixer.project(x), mixer.filters(), torch.randn(2, 90, 24, dtype=torch.float64)
    assert torch.equal(mixer.mix(z, x, taps=taps), mixer(x))
    assert relative(mixer.mix(z, x, taps=2 * taps), mixer(x)) > 0.1
    assert relative(mixer.mix(z + added, x), mixer.mix(z, x, added)) < 1e-14


def test_the_demonstration_prints_that_ours_has_no_leak(capsys):
    runpy.run_path(afno.__file__, run_name="__main__")
    shapes, *lines = capsys.readouterr().out.splitlines()
    assert shapes.startswith("x (1, 256, 64) -> taps (")
    moved = {line.split("outputs before")[0].strip(): float(line.split()[-1].rstrip("%"))
             for line in lines}
    leaking = ("the paper's layer", "the paper's layer, zero-padded to 2T")
    assert moved.keys() == {*leaking, *(f"AFNO1D, form {form}" for form in CAUSAL)}
    assert all((move > 1) == (name in leaking) and (move == 0) == (name not in leaking)
               for name, move in moved.items())


# -----------------------------------------------------------------------------
# the longest earlier matches


def rows_with_matches(T: int) -> torch.Tensor:
    """Return rows of few tokens, of many, of one, of a period, and one whose end is its middle."""
    rows = torch.stack((torch.randint(3, (T,)), torch.randint(40, (T,)), torch.full((T,), 7),
                        torch.arange(T) % 5, torch.randint(50257, (T,))))
    rows[4, T - T // 3 :] = rows[4, T // 3 : T // 3 + T // 3]
    return rows


@pytest.mark.parametrize("T", (1, 2, 3, 17, 100))
def test_longest_matches_are_those_of_the_definition(T):
    torch.manual_seed(T)
    idx = rows_with_matches(T)
    found, kind = (part.tolist() for part in longest_matches(idx))
    for b, row in enumerate(idx.tolist()):
        assert [*zip(found[b], kind[b])] == [matches_by_definition(row, t) for t in range(T)]


@pytest.mark.parametrize("count", (3, 40))  # fewer rows than the table has, and more
def test_means_of_normed_rows(count):
    torch.manual_seed(count)
    table = torch.randn(17, 6, dtype=torch.float64, requires_grad=True)
    rows = torch.randint(-1, 17, (count, 2, 4))
    rows[0] = -1
    for i, mean in enumerate(mean_rows(table, rows).flatten(0, 1)):
        there = [rmsnorm(table[row]) for row in rows.flatten(0, 1)[i].tolist() if row >= 0]
        wanted = torch.stack(there).mean(0) if there else torch.zeros_like(mean)
        assert torch.allclose(mean, wanted)
    assert not mean_rows(table, rows).requires_grad


def test_matches_token_by_token():
    torch.manual_seed(0)
    idx, seen, found = rows_with_matches(60), None, []
    for t in range(60):
        step, seen = newest_matches(idx[:, t], seen, window=60)
        found.append(step)
    for one_by_one, at_once in zip(zip(*found), longest_matches(idx)):
        assert torch.equal(torch.stack(one_by_one, 1), at_once)
    seen = None
    for t in range(60):  # what is further away than the window is not found
        step, seen = newest_matches(idx[:, t], seen, window=4)
        assert seen[0].size(1) <= 4
    assert step[1][3].tolist() == [0, 0] and step[1][2, 0] > 0
