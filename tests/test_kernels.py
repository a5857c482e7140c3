"""kernels/ against sums in float64, values and all gradients.

On a GPU in bf16; without one in Triton's interpreter in fp32, whose bf16 products are wrong. Memory
that was never written holds NaN here, so none may be read.
"""
import ast
import contextlib
import functools
import importlib
import math
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from helpers import relative, toeplitz_sum

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.runtime.jit import KernelInterface  # noqa: E402

import kernels  # noqa: E402
from kernels import convolution, loss, softmax, state, token_conv, trials  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE, DTYPE, BOUND = ("cuda", torch.bfloat16, 1e-2) if CUDA else ("cpu", torch.float32, 2e-6)


@triton.jit
def count_kernel(x_ptr, n):
    for i in range(n):
        tl.store(x_ptr + i, i)


def kernels_run() -> bool:
    """Return whether kernels run here: Triton 3.6's interpreter does not with NumPy 2.5."""
    x = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    with contextlib.suppress(Exception):  # its own
        count_kernel[(1,)](x, 3)
    return x.tolist() == [0, 1, 2]


pytestmark = pytest.mark.skipif(not kernels_run(), reason="this Triton's interpreter does not work "
                                "with this NumPy: another version of either, or a GPU")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(B, T, G, width, K):
    generator = torch.Generator().manual_seed(0)
    u, taps = (torch.randn(shape, generator=generator) for shape in ((B, T, G * width), (G, K)))
    return u.to(DTYPE), taps


def slow(*arguments):
    return pytest.param(*arguments, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that short inputs have many, and few programs that share them out."""
    for name, value in (("NEAR", 16), ("FAR", 32), ("DIRECT", 46), ("PROGRAMS", 16)):
        monkeypatch.setattr(convolution, name, value)


def check(B, T, G, width, K, transform=lambda u: u):
    u, taps = inputs(B, T, G, width, K)
    upstream = random(B, T, G * width, seed=1).to(DTYPE)
    exact = u.double().requires_grad_(), taps.double().requires_grad_()
    expected = toeplitz_sum(*exact)
    wanted = torch.autograd.grad(expected, exact, upstream.double())
    ours = transform(u.to(DEVICE)).requires_grad_(), taps.to(DEVICE).requires_grad_()
    y = convolution.causal_conv(*ours)
    assert y.dtype == DTYPE and y.shape == u.shape
    got = torch.autograd.grad(y, ours, transform(upstream.to(DEVICE)))
    assert [g.dtype for g in got] == [DTYPE, torch.float32]
    for ours, oracle in zip((y, *got), (expected, *wanted)):
        assert relative(ours.detach().cpu().double(), oracle.detach()) < BOUND


@pytest.mark.slow
@pytest.mark.parametrize("B, T, G, width, K", (
    (1, 1, 1, 1, 1), slow(2, 300, 2, 4, 300), (1, 5, 1, 16, 3), (3, 129, 1, 3, 128),
    (1, 257, 1, 16, 500), (2, 260, 1, 8, 130)))
def test_near_field(B, T, G, width, K):
    check(B, T, G, width, K)


@pytest.mark.slow
@pytest.mark.parametrize("B, T, G, width, K", (
    slow(2, 101, 2, 4, 200), slow(3, 96, 2, 16, 60), (1, 33, 1, 10, 41), slow(1, 700, 1, 2, 700),
    slow(1, 1100, 1, 2, 1100), slow(5, 96, 1, 5, 96),
    (2, 100, 2, 4, 17), (2, 100, 2, 4, 18)))  # tiles of 2 and of 3 lags
def test_near_and_far_field_of_small_blocks(small_blocks, B, T, G, width, K):
    check(B, T, G, width, K)


@pytest.mark.parametrize("T, K", (
    (1, 1), (300, 1), (300, 2), (300, 17), (300, 18), (300, 300), (304, 290), (40, 100)))
def test_multiply_adds_are_those_of_tiles_with_taps(small_blocks, T, K):
    blocks = -(-T // 16)
    tiles = {(t // 16, s // 16) for t in range(16 * blocks)
             for s in range(max(0, t - K + 1), t + 1)}
    assert convolution.multiply_adds(T, K) == pytest.approx(16 * len(tiles) / blocks)


def test_short_filters_are_those_of_few_multiply_adds():
    for T, K, short in ((4096, 4096, True), (65536, 2048, True), (2048, 2048, True), (1, 1, True),
                        (65536, 4096, False), (8192, 8192, False), (4400, 4400, False)):
        assert convolution.is_short(T, K) is short


@pytest.mark.slow
def test_far_field_of_blocks_as_they_are(monkeypatch):
    monkeypatch.setattr(convolution, "DIRECT", 300)
    check(1, 650, 1, 16, 650)


@pytest.mark.slow
@pytest.mark.parametrize("transform", (
    lambda u: torch.cat((u, u), -1)[..., : u.size(-1)],  # as a value beside its gate
    lambda u: u.transpose(0, 1).contiguous().transpose(0, 1),
    lambda u: torch.stack((u, u), -1)[..., 0]))
def test_strides(small_blocks, transform):
    check(2, 101, 2, 4, 101, transform)


@pytest.mark.slow
@pytest.mark.parametrize("K", (30, slow(300)))  # short, long
def test_prefixes_are_bit_identical_at_full_length(small_blocks, K):
    u, taps = (x.to(DEVICE) for x in inputs(2, 300, 1, 4, K))
    y = convolution.causal_conv(u, taps)
    for cut in (1, 15, 16, 17, 31, 32, 33, 150, 299):
        other = u.clone()
        other[:, cut:] = torch.randn_like(other[:, cut:])
        z = convolution.causal_conv(other, taps)
        assert torch.equal(y[:, :cut], z[:, :cut]) and not torch.equal(y[:, cut:], z[:, cut:])
        prefix = convolution.causal_conv(u[:, :cut], taps[:, :K])
        assert torch.equal(y[:, :cut], prefix) or K > 40  # there T chooses short or long


def state_inputs(B, T, G, D, W, dtype):
    generator = torch.Generator().manual_seed(0)
    q, k, v, dy = (torch.randn(B, T, G, size, generator=generator).to(dtype)
                   for size in (D, D, W, W))
    log_a = -torch.rand(B, T, G, generator=generator) ** 4  # from slow to fast
    return q, k, v, log_a, dy


def naive_state(q, k, v, log_a):
    S, outputs = torch.zeros(len(v), v.size(2), q.size(3), v.size(3), dtype=v.dtype), []
    for t in range(v.size(1)):
        S = log_a[:, t, :, None, None].exp() * S + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append((q[:, t, :, :, None] * S).sum(2))
    return torch.stack(outputs, 1)


@pytest.mark.slow
@pytest.mark.parametrize("B, T, G, D, W", (
    (1, 2, 1, 2, 2), slow(2, 300, 2, 8, 5), (1, 64, 3, 2, 3), (3, 65, 2, 16, 16),
    (1, 200, 2, 20, 33), (1, 129, 1, 64, 64), slow(2, 130, 2, 4, 100), (1, 129, 1, 128, 128)))
@pytest.mark.parametrize("strided", (False, True))
def test_state(B, T, G, D, W, strided):
    *halves, log_a, dy = state_inputs(B, T, G, D, W, DTYPE)
    exact = [x.double().requires_grad_() for x in (*halves, log_a)]
    expected = naive_state(*exact)
    wanted = torch.autograd.grad(expected, exact, dy.double())

    def layout(x):  # heads side by side in a wider row, as a split leaves them; or not even that
        x = x.to(DEVICE)
        if not strided:
            return x
        beside = x is not dy and x.size(3) == D
        return torch.cat((x, x), 2)[:, :, :G] if beside else x.mT.contiguous().mT

    ours = [*(layout(x).requires_grad_() for x in halves), log_a.to(DEVICE).requires_grad_()]
    y = state.state_scan(*ours)
    assert y.dtype == DTYPE and y.shape == dy.shape
    got = torch.autograd.grad(y, ours, layout(dy))
    assert [g.dtype for g in got] == [DTYPE] * 3 + [torch.float32]
    for value, oracle in zip((y, *got), (expected, *wanted)):
        assert relative(value.detach().cpu().double(), oracle.detach()) < BOUND


@pytest.mark.slow
def test_states_prefixes_are_bit_identical_at_full_length():
    *halves, log_a, _ = state_inputs(2, 300, 2, 8, 5, DTYPE)
    inputs = [x.to(DEVICE) for x in (*halves, log_a)]
    y = state.state_scan(*inputs)
    for cut in (1, 63, 64, 65, 150, 299):
        others = [x.clone() for x in inputs]
        for x in others:
            x[:, cut:] = -torch.rand_like(x[:, cut:])
        z = state.state_scan(*others)
        assert torch.equal(y[:, :cut], z[:, :cut]) and not torch.equal(y[:, cut:], z[:, cut:])


@pytest.mark.slow
def test_operator_is_registered_as_it_behaves(small_blocks):
    """Shapes and strides without data, gradients, tracing by torch.compile: opcheck's own tests."""
    u = torch.randn(1, 70, 2, device=DEVICE, dtype=DTYPE, requires_grad=True)
    taps = torch.randn(1, 32, device=DEVICE, requires_grad=True)
    response = torch.randn(1, 64, 3, device=DEVICE, requires_grad=True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for taps_response in ((taps, response), (taps, None)):
        torch.library.opcheck(convolution.block_conv, (u, *taps_response), test_utils=tests)
        torch.library.opcheck(convolution.block_conv_backward,
                              (u.detach(), u.detach(), *taps_response), test_utils=tests)
    few = torch.randn(4, 2, device=DEVICE, requires_grad=True)
    for silu in (False, True):
        torch.library.opcheck(convolution.short_conv, (u, few, silu), test_utils=tests)
        torch.library.opcheck(convolution.short_conv_backward,
                              (u.detach(), u.detach(), few, silu), test_utils=tests)
    q, k, v = (torch.randn(1, 70, 2, size, device=DEVICE, dtype=DTYPE, requires_grad=True)
               for size in (4, 4, 3))
    log_a = -torch.rand(1, 70, 2, device=DEVICE)
    torch.library.opcheck(state.state_scan, (q, k, v, log_a.requires_grad_()), test_utils=tests)
    torch.library.opcheck(state.state_scan_backward, (v.detach(), q, k, v, log_a), test_utils=tests)


@pytest.mark.slow
def test_gradients_are_there_when_activations_are_recomputed(small_blocks):
    u = torch.randn(1, 70, 2, device=DEVICE, dtype=DTYPE, requires_grad=True)
    taps = torch.randn(1, 70, device=DEVICE, requires_grad=True)
    plain = torch.autograd.grad(convolution.causal_conv(u, taps).sum(), (u, taps))
    again = torch.utils.checkpoint.checkpoint(convolution.causal_conv, u, taps, use_reentrant=False)
    for got, wanted in zip(torch.autograd.grad(again.sum(), (u, taps)), plain):
        assert torch.equal(got, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("B, T, C, length", (
    (1, 1, 1, 1), (2, 70, 130, 4), (3, 33, 64, 3), (1, 2, 5, 7)))
@pytest.mark.parametrize("silu", (False, True))
def test_depthwise_convolution(B, T, C, length, silu):
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(2, T, B, C, generator=generator)[i].transpose(0, 1).to(DTYPE)  # strided
             for i in range(2))
    taps = torch.randn(length, C, generator=generator)
    exact = x.double().requires_grad_(), taps.double().requires_grad_()
    expected = torch.stack([
        sum(exact[1][lag] * exact[0][:, t - lag] for lag in range(min(length, t + 1)))
        for t in range(T)], 1)
    if silu:
        expected = expected / (1 + torch.exp(-expected))
    wanted = torch.autograd.grad(expected, exact, dy.double())
    ours = x.to(DEVICE).requires_grad_(), taps.to(DEVICE).requires_grad_()
    y = convolution.short_conv(*ours, silu)
    got = torch.autograd.grad(y, ours, dy.to(DEVICE))
    assert [part.dtype for part in (y, *got)] == [DTYPE, DTYPE, torch.float32]
    for part, oracle in zip((y, *got), (expected, *wanted)):
        assert relative(part.detach().cpu().double(), oracle.detach()) < BOUND
    other = ours[0].detach().clone()
    other[:, T // 2 :] = torch.randn_like(other[:, T // 2 :])
    assert torch.equal(convolution.short_conv(other, ours[1], silu)[:, : T // 2], y[:, : T // 2])


@pytest.mark.slow
@pytest.mark.parametrize("B, T, C, G, K", (
    (1, 1, 1, 1, 1), (2, 70, 48, 3, 16), (1, 130, 33, 1, 64), (1, 64, 6, 2, 5)))
def test_taps_of_each_token(B, T, C, G, K):
    generator = torch.Generator().manual_seed(0)
    u, dy = (torch.randn(2, T, B, C, generator=generator)[i].transpose(0, 1).to(DTYPE)  # strided
             for i in range(2))
    wide = torch.randn(B, T, 3 + G * K, generator=generator).to(DTYPE)
    w = wide[..., 3:].unflatten(-1, (G, K))  # as a part of a wider product
    exact = u.double().requires_grad_(), w.double().requires_grad_()
    expected = torch.stack([
        sum(exact[1][:, t, :, lag].repeat_interleave(C // G, 1) * exact[0][:, t - lag]
            for lag in range(min(K, t + 1))) for t in range(T)], 1)
    wanted = torch.autograd.grad(expected, exact, dy.double())
    taps = wide.to(DEVICE)[..., 3:].unflatten(-1, (G, K))
    assert token_conv.tokens_dense(taps) is taps
    ours = u.to(DEVICE).requires_grad_(), taps.requires_grad_()
    y = token_conv.token_conv(*ours)
    got = torch.autograd.grad(y, ours, dy.to(DEVICE))
    for part, oracle in zip((y, *got), (expected, *wanted)):
        assert part.dtype == DTYPE
        assert relative(part.detach().cpu().double(), oracle.detach()) < BOUND
    changed = [x.detach().clone() for x in ours]
    for x in changed:
        x[:, T // 2 :] = torch.randn_like(x[:, T // 2 :])
    assert torch.equal(token_conv.token_conv(*changed)[:, : T // 2], y[:, : T // 2])
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(token_conv.token_conv, ours, test_utils=tests)


def cross_entropy(logits, targets, *rest):
    """Return softmax.cross_entropy's results for one target a row, (rows,)."""
    losses, gradient = softmax.cross_entropy(logits, targets[:, None],
                                             torch.ones_like(targets[:, None], dtype=torch.float),
                                             *rest)
    return losses[:, 0], gradient


@pytest.mark.parametrize("cap", (0, 2.5))
@pytest.mark.parametrize("vocab_size, columns", ((50, 64), (8200, 8256)))
def test_cross_entropy_of_several_targets(cap, vocab_size, columns):
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(3, columns, generator=generator)).to(DTYPE)
    logits[:, vocab_size:] = float("nan")
    last = vocab_size - 1
    targets = torch.tensor([[0, 0, 0], [last, 7, last], [3, last, 0]])
    shares = torch.tensor([[0.5, 0.25, 0.25], [1, 0, 0.5], [0, 0, 1]])
    exact = logits.double().requires_grad_()
    capped = (cap * torch.tanh(exact / cap) if cap else exact)[:, :vocab_size]
    wanted = torch.logsumexp(capped, 1, keepdim=True) - capped.gather(1, targets)
    (wanted_gradient,) = torch.autograd.grad((shares * wanted).sum(), exact)
    losses, gradient = softmax.cross_entropy(logits.to(DEVICE).clone(), targets.to(DEVICE),
                                             shares.to(DEVICE), vocab_size, True, cap)
    assert torch.allclose(losses.cpu().double(), wanted.detach(), rtol=1e-5, atol=1e-5)
    assert (gradient.cpu().double() - wanted_gradient)[:, :vocab_size].abs().max() < BOUND
    assert not gradient[:, vocab_size:].any()


@pytest.mark.parametrize("cap", (0, 2.5))
@pytest.mark.parametrize("vocab_size, columns", ((1, 1), (50, 64), (8192, 8192), (8200, 8256)))
def test_cross_entropy(cap, vocab_size, columns):
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(3, columns, generator=generator)).to(DTYPE)
    logits[:, vocab_size:] = float("nan")  # padding may be anything
    targets = torch.tensor([0, vocab_size // 2, vocab_size - 1])
    exact = logits.double().requires_grad_()
    capped = cap * torch.tanh(exact / cap) if cap else exact
    wanted = F.cross_entropy(capped[:, :vocab_size], targets, reduction="none")
    (wanted_gradient,) = torch.autograd.grad(wanted.sum(), exact)
    for with_gradient in (False, True):
        ours = logits.to(DEVICE).clone()
        losses, gradient = cross_entropy(ours, targets.to(DEVICE), vocab_size, with_gradient, cap)
        assert torch.allclose(losses.cpu().double(), wanted.detach(), rtol=1e-5, atol=1e-5)
        if with_gradient:
            off = (gradient.cpu().double() - wanted_gradient)[:, :vocab_size].abs().max()
            assert gradient is ours and off < BOUND
            assert not gradient[:, vocab_size:].any()
        else:
            assert gradient is None
            assert torch.equal(ours.cpu()[:, :vocab_size], logits[:, :vocab_size])


@pytest.mark.parametrize("scale", (1.0, 2.0**15))
def test_cross_entropys_gradient_in_a_place_of_its_own(scale):
    """As fp8 has it; here in the logits' dtype, as the interpreter's conversion to fp8 is wrong."""
    logits, targets = random(3, 64).to(DEVICE, DTYPE), torch.tensor([0, 20, 49]).to(DEVICE)
    apart, losses = torch.full_like(logits, float("nan")), torch.empty(3, device=DEVICE)
    softmax.cross_entropy_kernel[(3,)](
        logits, apart, targets, torch.ones(3, device=DEVICE), losses, 50, 64, CAP=15.0,
        GRADIENT=True, SCALE=scale, K=1, **softmax.SOFTMAX)
    exact = logits.clone()
    expected, gradient = cross_entropy(exact, targets, 50, True, 15.0)
    assert torch.equal(losses, expected) and relative(apart / scale, gradient) < BOUND
    assert not torch.equal(logits, gradient)
    if CUDA:
        _, gradient8 = cross_entropy(logits.clone(), targets, 50, True, 15.0, scale)
        assert gradient8.dtype == torch.float8_e5m2
        assert relative(gradient8.float() / scale, gradient.float()) < 0.1


@pytest.mark.parametrize("shape", ((1, 1), (128, 256), (200, 300)))
def test_transposed(shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(DEVICE)
    y = softmax.transposed(x.view(torch.float8_e5m2))
    assert torch.equal(y.view(torch.uint8), x.T) and y.is_contiguous()


needs_fp8 = pytest.mark.skipif(not CUDA or torch.cuda.get_device_capability() < (8, 9),
                               reason="products in fp8 need a GPU of compute capability 8.9")


@needs_fp8
def test_fp8_on_a_gpu():
    chosen, why = kernels.usable("fp8", torch.device("cuda"), torch.bfloat16)
    assert chosen, why


# overflow: of exp in the soft cap, whose reciprocal is the zero that is wanted
@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("cap", (0, 30, 100))
@pytest.mark.parametrize("vocab_size, columns", ((50, 64), (8200, 8256)))
def test_cross_entropy_of_extreme_logits(cap, vocab_size, columns):
    """All far below zero or far above, one above all others, both signs, and logits of -inf.

    There are more lanes than logits.
    """
    logits = 3 * torch.randn(6, columns, generator=torch.Generator().manual_seed(0))
    logits[0] -= 1e4
    logits[1] += 1e4
    logits[2, vocab_size // 2] = 1e4
    logits[3, ::2] = -1e4
    logits[4] = 1e4 * logits[4].sign()
    logits[5, : vocab_size // 2] = -float("inf")
    logits, targets = logits.to(DTYPE), torch.full((6,), vocab_size - 1)
    exact = logits.double().requires_grad_()
    capped = cap * torch.tanh(exact / cap) if cap else exact
    wanted = F.cross_entropy(capped[:, :vocab_size], targets, reduction="none")
    (wanted_gradient,) = torch.autograd.grad(wanted.sum(), exact)
    losses, gradient = cross_entropy(logits.to(DEVICE), targets.to(DEVICE), vocab_size, True, cap)
    assert torch.allclose(losses.cpu().double(), wanted.detach(), rtol=1e-5, atol=1e-5)
    off = (gradient.cpu().double() - wanted_gradient).abs().max()
    assert off < max(BOUND, 1e-3)  # 1e4 in fp32 is 1e-3 off


# -----------------------------------------------------------------------------
# trials


def test_usable_says_why():
    for what in trials.BOUNDS:
        assert kernels.usable(what, torch.device("cpu"), torch.bfloat16) == (
            False, "plain PyTorch: Triton kernels need a CUDA device, this is cpu")
    usable, why = kernels.usable("fp8", torch.device("cpu"), torch.bfloat16)
    assert not usable and why.startswith("bfloat16 products: ") and why.endswith("this is cpu)")
    if CUDA:
        for what in trials.BOUNDS:
            assert kernels.usable(what, torch.device("cuda"), torch.bfloat16)[0]
            assert kernels.usable(what, torch.device("cuda"), torch.float32)[0] is False


@pytest.mark.parametrize("change, reason", (
    (dict(installed=lambda: False), "Triton is not installed"),
    (dict(capability=(7, 5)), "Triton kernels need compute capability 8.0, a GPU has 7.5"),
    (dict(dtype=torch.float32), "Triton kernels need half precision, this is float32"),
    (dict(fault="broken"), "Triton kernels do not work here: broken"),
    ({}, None)))
def test_every_condition_has_its_reason(monkeypatch, change, reason):
    on_a_gpu(monkeypatch, change.get("capability", (8, 0)))
    monkeypatch.setattr(kernels, "installed", change.get("installed", lambda: True))
    monkeypatch.setattr(trials, "find_fault", lambda *_: change.get("fault"))
    dtype = change.get("dtype", torch.bfloat16)
    answer = kernels.probe.__wrapped__("loss", torch.device("cuda"), dtype)
    assert answer == ((False, f"plain PyTorch: {reason}") if reason else
                      (True, "Triton kernels on a GPU, agree with float64"))


def on_a_gpu(patch, capability):
    patch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    patch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)


@pytest.fixture
def narrow(monkeypatch):
    """Models so narrow that the interpreter tries their kernels in a second."""
    for name in ("CHANNELS", "HEAD"):
        monkeypatch.setattr(trials, name, 4)


@pytest.mark.slow
def test_kernels_are_tried_before_they_are_trusted(small_blocks, narrow, monkeypatch):
    """find_fault finds nothing in these kernels, wrong numbers in others, and exceptions."""
    def fault(what):
        return trials.find_fault(what, torch.device(DEVICE), DTYPE, BOUND)

    with torch.inference_mode():
        for what in trials.BOUNDS:
            assert fault(what) is None
    monkeypatch.setitem(trials.PARTS, "convolution", ("long_filter",))  # the trial that mixes
    right = convolution.mix
    monkeypatch.setattr(convolution, "mix", lambda *a, **k: 1.1 * right(*a, **k))
    assert fault("convolution").startswith("output of 1056 taps is ")
    assert fault("state") is None

    def broken(*a, **k):
        raise RuntimeError("no C compiler\nin two lines")

    monkeypatch.setattr(convolution, "mix", broken)
    assert fault("convolution") == "RuntimeError: no C compiler"
    right_states = state.chunk_states
    monkeypatch.setattr(state, "chunk_states", lambda *a, **k: 1.1 * right_states(*a, **k))
    assert fault("state").startswith("output of the state is ")
    right_taps = token_conv.launch
    monkeypatch.setattr(token_conv, "launch", lambda run, u, w, *rest: right_taps(
        run, u, w, *(1.1 * x if x is w else x for x in rest)))
    assert fault("token").startswith("output of each token's own taps is ")
    right_loss = softmax.cross_entropy
    for factors, what in (((1.1, 1), "loss"), ((1, 1.1), "gradient"), ((1, math.nan), "gradient")):
        monkeypatch.setattr(softmax, "cross_entropy", lambda *a: tuple(
            factor * x for factor, x in zip(factors, right_loss(*a))))
        assert fault("loss").startswith(f"the {what} with 1 target and a cap of 0 is ")


def test_trials_oracles_are_the_sums_that_are_meant():
    u, taps = (x.double() for x in inputs(2, 70, 2, 3, 90))
    assert relative(trials.exact_conv(u, taps), toeplitz_sum(u, taps)) < 1e-13
    x, few = random(2, 9, 5).double(), random(4, 5).double()
    expected = toeplitz_sum(x, few.T)
    assert relative(trials.exact_short_conv(x, few, False), expected) < 1e-13
    assert relative(trials.exact_short_conv(x, few, True), F.silu(expected)) < 1e-13
    w = random(2, 9, 2, 3).double()
    expected = torch.stack([sum(w[:, t, :, lag].repeat_interleave(2, 1) * few_tokens[:, t - lag]
                                for lag in range(min(3, t + 1)))
                            for few_tokens in [x[..., :4]] for t in range(9)], 1)
    assert relative(trials.exact_token_conv(x[..., :4], w), expected) < 1e-13
    *halves, log_a, _ = (x.double() for x in state_inputs(2, 70, 2, 4, 3, torch.float64))
    assert relative(trials.exact_state(*halves, log_a), naive_state(*halves, log_a)) < 1e-13


def fp8_where_a_gpu_is(monkeypatch, changes=(), capability=(8, 9)):
    """usable's answer on a CPU that it takes for a GPU; changes in fp8: (name, value) of each."""
    with monkeypatch.context() as patch:
        for module in (kernels, loss):
            patch.setattr(module, "usable", lambda *_: (True, ""))
        patch.setattr(softmax, "cross_entropy", loss.cross_entropy_chunk)
        on_a_gpu(patch, capability)
        for name, value in changes:
            patch.setattr(f"kernels.loss.{name}", value)
        return kernels.probe.__wrapped__("fp8", torch.device("cpu"), torch.bfloat16)


def test_fp8_is_tried_before_it_is_trusted(monkeypatch):
    def times(factor, f):
        return lambda *a: tuple(factor * z for z in f(*a))

    product, gradients = loss.fp8_product, loss.Fp8HeadProducts.gradients
    assert fp8_where_a_gpu_is(monkeypatch)[0]
    assert not fp8_where_a_gpu_is(monkeypatch, capability=(8, 0))[0]
    for reason, *change in (
            ("its scale 5", "fp8_product", lambda *a, **k: 1.05 * product(*a, **k)),
            ("nan off", "Fp8HeadProducts.gradients", times(math.nan, gradients)),
            ("division by zero", "Fp8HeadProducts.gradients", lambda *a: 1 / 0),
            ("its scale 1.0e+00", "Fp8Linear.backward", times(2, loss.Fp8Linear.backward))):
        chosen, why = fp8_where_a_gpu_is(monkeypatch, [change])
        assert not chosen and why.startswith("bfloat16 products: fp8 ") and reason in why, why


# -----------------------------------------------------------------------------
# the package


def test_kernels_import_neither_the_model_nor_the_trainer():
    for path in Path(kernels.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "")]
                assert not {"afno", "train_gpt2_afno"} & {name.split(".")[0] for name in names}


@pytest.mark.slow
def test_what_needs_no_triton_imports_without_it():
    script = """
import sys
import threading
sys.modules["triton"] = None
import torch, kernels, kernels.blocks, kernels.loss
assert not kernels.operators() and not kernels.installed()
assert not kernels.usable("loss", torch.device("cpu"), torch.bfloat16)[0]
x, w = torch.randn(32, 16), torch.randn(20, 16, requires_grad=True)
for fp8 in (False, True):
    kernels.loss.linear_cross_entropy(x, w, torch.arange(32) % 20, 15.0, fp8)[0].backward()
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parent.parent)


def test_operators_are_those_whose_results_recomputing_keeps():
    ops = torch.ops.afno
    assert kernels.operators() == {ops.block_conv.default, ops.state_scan.default}


@pytest.mark.slow
@pytest.mark.parametrize("arch", (89, 90))
def test_kernels_compile_and_fit(arch):
    """For an RTX 4090 (99 KB of shared memory a block) and an H100 or H200, without either."""
    script = Path(__file__).parent / "compile_kernels.py"
    done = subprocess.run([sys.executable, script, str(arch)], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


# -----------------------------------------------------------------------------
# with afno.py and the trainer: what depends on their insides


def test_trials_are_as_wide_as_models():
    import afno

    assert (trials.CHANNELS, trials.HEAD) == (afno.CHANNELS_PER_FILTER, afno.CHANNELS_PER_HEAD)


def test_constant_is_what_torch_marks_constants_with():
    marked = torch.compiler.assume_constant_result(lambda: None)
    assert vars(marked) == vars(kernels.constant(lambda: None)) != {}


@pytest.mark.slow
@pytest.mark.parametrize("form", ("filter", "state", "dyadic"))
def test_a_compiled_layer_is_one_graph_with_the_kernels_in_it(small_blocks, monkeypatch, form):
    import afno

    if form == "dyadic" and torch.__version__ < "2.9":
        pytest.skip("torch 2.8 mistakes the strides of an irfft when it traces")
    torch.manual_seed(0)
    filters = form == "filter"
    layer = afno.AFNO1D(16, 2, filter_length=100, form=form, silu=filters,
                        token_taps=5 * filters).to(DEVICE)
    x = torch.randn(2, 100, 16, device=DEVICE, requires_grad=True)
    parameters = [x, *layer.parameters()]

    def gradients(run):
        y = run(x)
        slope = torch.linspace(-1, 1, 16, device=DEVICE)
        return [y, *torch.autograd.grad((y * slope).sum(), parameters)]

    monkeypatch.setattr(afno, "usable", lambda *a: (False, ""))
    plain = gradients(layer)
    calls = []
    yes = torch.compiler.assume_constant_result(lambda *a: (True, ""))
    monkeypatch.setattr(afno, "usable", yes)
    for module, name in ((convolution, "short_filter_conv"), (convolution, "long_filter_conv"),
                         (state, "chunk_states")):
        monkeypatch.setattr(module, name, lambda *a, f=getattr(module, name), **k:
                            calls.append(1) or f(*a, **k))
    compiled = gradients(torch.compile(layer, backend="aot_eager", fullgraph=form != "dyadic"))
    # forward and backward, where states are made again
    assert len(calls) == (3 if form == "state" else 2)
    assert max(relative(ours, theirs) for ours, theirs in zip(compiled, plain)) < 1e-4


@needs_fp8
@pytest.mark.parametrize("recompute", (False, True))
def test_fp8_mlp_in_compiled_blocks(fresh_compiler, recompute):
    """Near the same in bf16 and without compilation, loss and all gradients."""
    from test_causality import move_weights, random_tokens
    from train_gpt2_afno import GPT, GPTConfig

    torch.manual_seed(0)
    config = GPTConfig(vocab_size=97, n_layer=3, n_head=2, n_embd=64, sequence_length=64, swiglu=1)
    model, idx = GPT(config), random_tokens((2, 64), 97).to(DEVICE)
    move_weights(model)
    model.to(DEVICE)

    def step():
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(idx, idx.roll(-1, 1))[1]
        return loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))

    expected = step()
    for block in model.transformer.h:
        block.mlp.fp8, block.recompute = True, recompute
        block.compile(dynamic=False)
    for name, got, wanted in zip(("loss", *dict(model.named_parameters())), step(), expected):
        bound = 0.01 if name == "loss" else 0.2
        assert not wanted.any() or 0 < relative(got, wanted) < bound, name


def test_trials_in_threads_are_on_the_callers_card(monkeypatch):
    cards = threading.local()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(cards, "now", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda card: setattr(cards, "now", card))
    cards.now = 3
    together = threading.Barrier(2, timeout=20)  # both run at once
    tried = kernels.at_once(lambda name: (together.wait(), name, torch.cuda.current_device())[1:],
                            ["a", "b"], torch.device("cuda"))
    assert tried == [("a", 3), ("b", 3)]


@pytest.mark.slow
@pytest.mark.skipif(not isinstance(token_conv.token_conv_kernel, KernelInterface),
                    reason="this Triton's interpreter launches past `run`, as no GPU does")
@pytest.mark.parametrize("what", trials.PARTS)
def test_what_a_trial_launches_is_compiled_ahead(what, small_blocks, narrow, monkeypatch):
    """Every kernel, with its constants, that a trial launches; and nothing is launched for it."""
    device, jobs, launched = torch.device(DEVICE), [], []
    monkeypatch.setattr(trials, "at_once", lambda run, items, device: jobs.extend(items))
    trials.compile_ahead(what, device, DTYPE)
    assert jobs and all(job.keywords["warmup"] for job in jobs)

    def variant(launch, options):
        return launch, sorted(item for item in options.items() if item[0] not in ("grid", "warmup"))

    def spy(launch, *args, **options):
        assert options["warmup"] is False
        launched.append(variant(launch, options))
        return launch(*args, **options)

    for kernel in vars(importlib.import_module(f"kernels.{trials.MODULES[what]}")).values():
        if hasattr(kernel, "run"):
            monkeypatch.setattr(kernel, "run", functools.partial(spy, kernel.run))
    assert trials.find_fault(what, device, DTYPE, BOUND) is None
    ahead = [variant(job.func, job.keywords) for job in jobs]
    assert launched and all(one in ahead for one in launched)
    assert all(one in launched for one in ahead)


def test_a_fault_of_threads_alone_is_none(monkeypatch):
    def broken(*job):
        raise RuntimeError("not made for threads")

    monkeypatch.setattr(trials, "compile_ahead", broken)
    monkeypatch.setitem(trials.PARTS, "loss", ())
    assert trials.find_fault("loss", torch.device("cuda"), DTYPE, BOUND) is None
