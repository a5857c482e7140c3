"""Triton's kernels against the Toeplitz sum in float64, value and all gradients: on a GPU in bf16, without one in Triton's
interpreter in fp32 (its bf16 products are wrong). Memory that was never written holds NaN here, so none may be read."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint

pytest.importorskip("triton")

import afno  # noqa: E402
import afno_triton  # noqa: E402
import test_causality  # noqa: E402
import train_gpt2_afno  # noqa: E402
from test_afno import inputs, relative, toeplitz_sum  # noqa: E402
from test_model import random_tokens, tiny  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE, DTYPE, BOUND = ("cuda", torch.bfloat16, 1e-2) if CUDA else ("cpu", torch.float32, 2e-6)


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that short inputs have many."""
    for name, value in (("NEAR", 16), ("FAR", 32), ("DIRECT", 46)):
        monkeypatch.setattr(afno_triton, name, value)


def check(B, T, G, width, K, transform=lambda u: u):
    u, taps = (x.detach() for x in inputs(B, T, G, width, K))
    u, upstream = u.to(DTYPE), torch.randn(B, T, G * width, generator=torch.Generator().manual_seed(1)).to(DTYPE)
    exact = u.double().requires_grad_(), taps.float().double().requires_grad_()
    expected = toeplitz_sum(*exact)
    wanted = torch.autograd.grad(expected, exact, upstream.double())
    ours = transform(u.to(DEVICE)).requires_grad_(), taps.float().to(DEVICE).requires_grad_()
    y = afno.kernel_conv(*ours)
    assert y.dtype == DTYPE and y.shape == u.shape
    got = torch.autograd.grad(y, ours, transform(upstream.to(DEVICE)))
    assert [g.dtype for g in got] == [DTYPE, torch.float32]
    for ours, oracle in zip((y, *got), (expected, *wanted)):
        assert relative(ours.detach().cpu().double(), oracle.detach()) < BOUND


@pytest.mark.parametrize("B, T, G, width, K", (
    (1, 1, 1, 1, 1), (2, 300, 2, 4, 300), (1, 5, 1, 16, 3), (3, 129, 1, 3, 128), (1, 257, 1, 16, 500), (2, 260, 1, 8, 130)))
def test_near_field(B, T, G, width, K):
    check(B, T, G, width, K)


@pytest.mark.parametrize("B, T, G, width, K", (
    (2, 101, 2, 4, 200), (3, 96, 2, 16, 60), (1, 33, 1, 10, 41), (1, 700, 1, 2, 700), (1, 1100, 1, 2, 1100),
    (5, 96, 1, 5, 96), (2, 100, 2, 4, 17), (2, 100, 2, 4, 18)))  # the last two: near field of 2 and of 3 lags
def test_near_and_far_field_of_small_blocks(small_blocks, B, T, G, width, K):
    check(B, T, G, width, K)


@pytest.mark.parametrize("T, K", ((1, 1), (300, 1), (300, 2), (300, 17), (300, 18), (300, 300), (304, 290), (40, 100)))
def test_multiply_adds_are_those_of_tiles_with_taps(small_blocks, T, K):
    blocks = -(-T // 16)
    tiles = {(t // 16, s // 16) for t in range(16 * blocks) for s in range(max(0, t - K + 1), t + 1)}
    assert afno_triton.multiply_adds(T, K) == pytest.approx(16 * len(tiles) / blocks)


def test_short_filters_are_those_of_few_multiply_adds():
    for T, K, short in ((4096, 4096, True), (65536, 2048, True), (2048, 2048, True), (1, 1, True),
                        (65536, 4096, False), (8192, 8192, False), (4400, 4400, False)):
        assert afno_triton.is_short(T, K) is short


def test_far_field_of_blocks_as_they_are(monkeypatch):
    monkeypatch.setattr(afno_triton, "DIRECT", 300)
    check(1, 650, 1, 16, 650)


@pytest.mark.parametrize("transform", (
    lambda u: torch.cat((u, u), -1)[..., : u.size(-1)],  # as a value beside its gate
    lambda u: u.transpose(0, 1).contiguous().transpose(0, 1),
    lambda u: torch.stack((u, u), -1)[..., 0]))
def test_strides(small_blocks, transform):
    check(2, 101, 2, 4, 101, transform)


@pytest.mark.parametrize("K", (30, 300))  # near field alone, and both
def test_prefixes_are_bit_identical_at_full_length(small_blocks, K):
    u, taps = (x.detach() for x in inputs(2, 300, 2, 4, K))
    u, taps = u.to(DEVICE, DTYPE), taps.float().to(DEVICE)
    y = afno.kernel_conv(u, taps)
    for cut in (1, 15, 16, 17, 31, 32, 33, 150, 299):
        other = u.clone()
        other[:, cut:] = torch.randn_like(other[:, cut:])
        z = afno.kernel_conv(other, taps)
        assert torch.equal(y[:, :cut], z[:, :cut]) and not torch.equal(y[:, cut:], z[:, cut:])
        assert torch.equal(y[:, :cut], afno.kernel_conv(u[:, :cut], taps[:, :K])) or K > 40  # there T chooses the fields


def state_inputs(B, T, G, D, W, dtype):
    generator = torch.Generator().manual_seed(0)
    q, k, v, dy = (torch.randn(B, T, G, size, generator=generator).to(dtype) for size in (D, D, W, W))
    log_a = -torch.rand(B, T, G, generator=generator) ** 4  # from slow to fast
    return q, k, v, log_a, dy


def naive_state(q, k, v, log_a):
    state, outputs = torch.zeros(len(v), v.size(2), q.size(3), v.size(3), dtype=v.dtype), []
    for t in range(v.size(1)):
        state = log_a[:, t, :, None, None].exp() * state + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append((q[:, t, :, :, None] * state).sum(2))
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("B, T, G, D, W", (
    (1, 2, 1, 2, 2), (2, 300, 2, 8, 5), (1, 64, 3, 2, 3), (3, 65, 2, 16, 16), (1, 200, 2, 20, 33), (1, 129, 1, 64, 64),
    (2, 130, 2, 4, 100), (1, 129, 1, 128, 128)))
@pytest.mark.parametrize("strided", (False, True))
def test_state(B, T, G, D, W, strided):
    *halves, log_a, dy = state_inputs(B, T, G, D, W, DTYPE)
    exact = [x.double().requires_grad_() for x in (*halves, log_a)]
    expected = naive_state(*exact)
    wanted = torch.autograd.grad(expected, exact, dy.double())

    def layout(x):  # heads side by side in a wider row, as a split leaves them; or not even that
        x = x.to(DEVICE)
        return x if not strided else torch.cat((x, x), 2)[:, :, :G] if x is not dy and x.size(3) == D else x.mT.contiguous().mT

    ours = [*(layout(x).requires_grad_() for x in halves), log_a.to(DEVICE).requires_grad_()]
    y = afno_triton.state_scan(*ours)
    assert y.dtype == DTYPE and y.shape == dy.shape
    got = torch.autograd.grad(y, ours, layout(dy))
    assert [g.dtype for g in got] == [DTYPE] * 3 + [torch.float32]
    for value, oracle in zip((y, *got), (expected, *wanted)):
        assert relative(value.detach().cpu().double(), oracle.detach()) < BOUND


def test_states_prefixes_are_bit_identical_at_full_length():
    *halves, log_a, _ = state_inputs(2, 300, 2, 8, 5, DTYPE)
    inputs = [x.to(DEVICE) for x in (*halves, log_a)]
    y = afno_triton.state_scan(*inputs)
    for cut in (1, 63, 64, 65, 150, 299):
        others = [x.clone() for x in inputs]
        for x in others:
            x[:, cut:] = -torch.rand_like(x[:, cut:])
        z = afno_triton.state_scan(*others)
        assert torch.equal(y[:, :cut], z[:, :cut]) and not torch.equal(y[:, cut:], z[:, cut:])


def test_operator_is_registered_as_it_behaves(small_blocks):
    """Shapes and strides without data, gradients, and tracing by torch.compile, in opcheck's own tests."""
    u = torch.randn(1, 70, 4, device=DEVICE, dtype=DTYPE, requires_grad=True)
    taps = torch.randn(2, 32, device=DEVICE, requires_grad=True)
    response = torch.randn(2, 64, 3, device=DEVICE, requires_grad=True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for taps_response in ((taps, response), (taps, None)):
        torch.library.opcheck(afno_triton.block_conv, (u, *taps_response), test_utils=tests)
        torch.library.opcheck(afno_triton.block_conv_backward, (u.detach(), u.detach(), *taps_response), test_utils=tests)
    few = torch.randn(4, 4, device=DEVICE, requires_grad=True)
    for silu in (False, True):
        torch.library.opcheck(afno_triton.depthwise_conv, (u, few, silu), test_utils=tests)
        torch.library.opcheck(afno_triton.depthwise_conv_backward, (u.detach(), u.detach(), few, silu), test_utils=tests)
    q, k, v = (torch.randn(1, 70, 2, size, device=DEVICE, dtype=DTYPE, requires_grad=True) for size in (4, 4, 3))
    log_a = -torch.rand(1, 70, 2, device=DEVICE)
    torch.library.opcheck(afno_triton.state_scan, (q, k, v, log_a.requires_grad_()), test_utils=tests)
    torch.library.opcheck(afno_triton.state_scan_backward, (v.detach(), q, k, v, log_a), test_utils=tests)


def test_gradients_are_there_when_activations_are_recomputed(small_blocks):
    u, taps = torch.randn(1, 70, 4, device=DEVICE, dtype=DTYPE, requires_grad=True), torch.randn(2, 70, device=DEVICE)
    taps.requires_grad_()
    plain = torch.autograd.grad(afno.kernel_conv(u, taps).sum(), (u, taps))
    again = torch.utils.checkpoint.checkpoint(afno.kernel_conv, u, taps, use_reentrant=False)
    for got, wanted in zip(torch.autograd.grad(again.sum(), (u, taps)), plain):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("B, T, C, length", ((1, 1, 1, 1), (2, 70, 130, 4), (3, 33, 64, 3), (1, 2, 5, 7)))
@pytest.mark.parametrize("silu", (False, True))
def test_depthwise_convolution(B, T, C, length, silu):
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(2, T, B, C, generator=generator)[i].transpose(0, 1).to(DTYPE) for i in range(2))  # strided
    taps = torch.randn(length, C, generator=generator)
    exact = x.double().requires_grad_(), taps.double().requires_grad_()
    expected = torch.stack([sum(exact[1][lag] * exact[0][:, t - lag] for lag in range(min(length, t + 1)))
                            for t in range(T)], 1)
    if silu:
        expected = expected / (1 + torch.exp(-expected))
    wanted = torch.autograd.grad(expected, exact, dy.double())
    ours = x.to(DEVICE).requires_grad_(), taps.to(DEVICE).requires_grad_()
    y = afno_triton.depthwise_conv(*ours, silu)
    got = torch.autograd.grad(y, ours, dy.to(DEVICE))
    assert [part.dtype for part in (y, *got)] == [DTYPE, DTYPE, torch.float32]
    for part, oracle in zip((y, *got), (expected, *wanted)):
        assert relative(part.detach().cpu().double(), oracle.detach()) < BOUND
    other = ours[0].detach().clone()
    other[:, T // 2 :] = torch.randn_like(other[:, T // 2 :])
    assert torch.equal(afno_triton.depthwise_conv(other, ours[1], silu)[:, : T // 2], y[:, : T // 2])


@pytest.mark.parametrize("cap", (0, 2.5))
@pytest.mark.parametrize("vocab_size, columns", ((1, 1), (50, 64), (8192, 8192), (8200, 8256)))
def test_cross_entropy(cap, vocab_size, columns):
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(3, columns, generator=generator)).to(DTYPE)
    logits[:, vocab_size:] = float("nan")  # padding may be anything
    targets = torch.tensor([0, vocab_size // 2, vocab_size - 1])
    exact = logits.double().requires_grad_()
    capped = cap * torch.tanh(exact / cap) if cap else exact
    wanted = torch.nn.functional.cross_entropy(capped[:, :vocab_size], targets, reduction="none")
    (wanted_gradient,) = torch.autograd.grad(wanted.sum(), exact)
    for with_gradient in (False, True):
        ours = logits.to(DEVICE).clone()
        losses, gradient = afno_triton.cross_entropy(ours, targets.to(DEVICE), vocab_size, with_gradient, cap)
        assert torch.allclose(losses.cpu().double(), wanted.detach(), rtol=1e-5, atol=1e-5)
        if with_gradient:
            assert gradient is ours and (gradient.cpu().double() - wanted_gradient)[:, :vocab_size].abs().max() < BOUND
            assert not gradient[:, vocab_size:].any()
        else:
            assert gradient is None and torch.equal(ours.cpu()[:, :vocab_size], logits[:, :vocab_size])


@pytest.mark.parametrize("scale", (1.0, 2.0**15))
def test_cross_entropys_gradient_in_a_place_of_its_own(scale):
    """As fp8 has it; here in the logits' dtype, as the interpreter's conversion to fp8 is wrong."""
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(3, 64, generator=generator).to(DEVICE, DTYPE), torch.tensor([0, 20, 49]).to(DEVICE)
    apart, losses = torch.full_like(logits, float("nan")), torch.empty(3, device=DEVICE)
    afno_triton.cross_entropy_kernel[(3,)](logits, apart, targets, losses, 50, 64, CAP=15.0, GRADIENT=True, SCALE=scale,
                                           **afno_triton.SOFTMAX)
    exact = logits.clone()
    expected, gradient = afno_triton.cross_entropy(exact, targets, 50, True, 15.0)
    assert torch.equal(losses, expected) and relative(apart / scale, gradient) < BOUND and not torch.equal(logits, gradient)
    if CUDA:
        _, gradient8 = afno_triton.cross_entropy(logits.clone(), targets, 50, True, 15.0, scale)
        assert gradient8.dtype == torch.float8_e5m2
        assert relative(gradient8.float() / scale, gradient.float()) < 0.1


@pytest.mark.parametrize("shape", ((1, 1), (128, 256), (200, 300)))
def test_transposed(shape):
    x = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    y = afno_triton.transposed(x.view(torch.float8_e5m2))
    assert torch.equal(y.view(torch.uint8), x.T) and y.is_contiguous()


needs_fp8 = pytest.mark.skipif(not CUDA or torch.cuda.get_device_capability() < (8, 9),
                               reason="products in fp8 need a GPU of compute capability 8.9")


@needs_fp8
def test_fp8_on_a_gpu():
    chosen, why = train_gpt2_afno.fp8_path(torch.device("cuda"), torch.bfloat16)
    assert chosen, why


@needs_fp8
@pytest.mark.parametrize("recompute", (False, True))
def test_fp8_mlp_in_compiled_blocks(fresh_compiler, recompute):
    """Near the same in bf16 and without compilation, loss and all gradients."""
    model, idx = tiny(n_embd=64, swiglu=1).to(DEVICE), random_tokens((2, 64), 97).to(DEVICE)
    test_causality.perturb(model)

    def step():
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(idx, idx.roll(-1, 1))[1]
        return loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))

    expected = step()
    for block in model.transformer.h:
        block.mlp.fp8, block.recompute = True, recompute
        block.compile(dynamic=False)
    for name, got, wanted in zip(("loss", *dict(model.named_parameters())), step(), expected):
        assert not wanted.any() or 0 < relative(got, wanted) < (0.01 if name == "loss" else 0.2), name


@pytest.mark.filterwarnings("ignore:overflow")  # of exp in the soft cap, whose reciprocal is the zero that is wanted
@pytest.mark.parametrize("cap", (0, 30, 100))
@pytest.mark.parametrize("vocab_size, columns", ((50, 64), (8200, 8256)))
def test_cross_entropy_of_extreme_logits(cap, vocab_size, columns):
    """All far below zero or far above, one above all others, both signs, and logits of -inf; more lanes than there are logits."""
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
    wanted = torch.nn.functional.cross_entropy(capped[:, :vocab_size], targets, reduction="none")
    (wanted_gradient,) = torch.autograd.grad(wanted.sum(), exact)
    losses, gradient = afno_triton.cross_entropy(logits.to(DEVICE), targets.to(DEVICE), vocab_size, True, cap)
    assert torch.allclose(losses.cpu().double(), wanted.detach(), rtol=1e-5, atol=1e-5)
    assert (gradient.cpu().double() - wanted_gradient).abs().max() < max(BOUND, 1e-3)  # 1e4 in fp32 is 1e-3 off


def test_path_is_chosen_in_words():
    assert afno.kernel_path(torch.device("cpu"), torch.bfloat16) == (
        False, "plain, Triton's kernels are for CUDA devices, this is cpu")
    if CUDA:
        assert afno.kernel_path(torch.device("cuda"), torch.bfloat16)[0]
        assert afno.kernel_path(torch.device("cuda"), torch.float32)[0] is False


def test_kernels_are_tried_before_they_are_trusted(small_blocks, monkeypatch):
    """kernel_fault finds nothing in these kernels, wrong numbers in others, and exceptions."""
    for name in ("channels_per_filter", "channels_per_head"):
        monkeypatch.setattr(afno.AFNO1D, name, 4)
    fault = afno.kernel_fault.__wrapped__
    with torch.inference_mode():
        for kernels in ("convolution", "state"):
            assert fault(torch.device(DEVICE), DTYPE, BOUND, kernels) is None
    right = afno_triton.mix
    monkeypatch.setattr(afno_triton, "mix", lambda *a, **k: 1.1 * right(*a, **k))
    assert fault(torch.device(DEVICE), DTYPE, BOUND, "convolution").startswith("output of 1056 taps is ")
    assert fault(torch.device(DEVICE), DTYPE, BOUND, "state") is None

    def broken(*a, **k):
        raise RuntimeError("no C compiler\nin two lines")

    monkeypatch.setattr(afno_triton, "mix", broken)
    assert fault(torch.device(DEVICE), DTYPE, BOUND, "convolution") == "RuntimeError: no C compiler"
    right = afno_triton.chunk_states
    monkeypatch.setattr(afno_triton, "chunk_states", lambda *a, **k: 1.1 * right(*a, **k))
    assert fault(torch.device(DEVICE), DTYPE, BOUND, "state").startswith("output of the state is ")


@pytest.mark.parametrize("arch", (89, 90))
def test_kernels_compile_and_fit(arch):
    """For an RTX 4090 (99 KB of shared memory a block) and an H100 or H200, without either."""
    script = Path(__file__).parent / "compile_kernels.py"
    done = subprocess.run([sys.executable, script, str(arch)], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize("form", ("filter", "analytic", "state", "dyadic"))
def test_a_compiled_layer_is_one_graph_with_the_kernels_in_it(small_blocks, monkeypatch, form):
    if form == "dyadic" and torch.__version__ < "2.9":
        pytest.skip("torch 2.8 mistakes the strides of an irfft when it traces")
    torch.manual_seed(0)
    layer = afno.AFNO1D(16, 2, filter_length=100, form=form, gate=True, silu=form == "filter").to(DEVICE)
    x = torch.randn(2, 100, 16, device=DEVICE, requires_grad=True)
    parameters = [x, *layer.parameters()]

    def gradients(run):
        y = run(x)
        return [y, *torch.autograd.grad((y * torch.linspace(-1, 1, 16, device=DEVICE)).sum(), parameters)]

    monkeypatch.setattr(afno, "kernel_path", lambda *a: (False, ""))
    plain = gradients(layer)
    calls = []
    monkeypatch.setattr(afno, "kernel_path", torch.compiler.assume_constant_result(lambda *a: (True, "")))
    for name in ("short_conv", "long_conv", "chunk_states"):
        monkeypatch.setattr(afno_triton, name, lambda *a, f=getattr(afno_triton, name), **k: calls.append(1) or f(*a, **k))
    compiled = gradients(torch.compile(layer, backend="aot_eager", fullgraph=form != "dyadic"))
    assert len(calls) == (3 if form == "state" else 2)  # forward and backward, where states are made again
    assert max(relative(ours, theirs) for ours, theirs in zip(compiled, plain)) < 1e-4
