"""Try every kernel on its device before it is trusted: values and gradients, against float64.

Compilers differ between machines and versions. A wrong sum would train, only worse. The exact sums
are written here a second time, on the CPU. They use other means than the kernels and than afno.py's
plain paths. This file needs Triton, except for try_fp8.
"""
import contextlib
import functools
import importlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import at_once

# Relative error that a kernel's rounding may make. Below, of fp8 products: the rounding's, and that
# of their scale, in which rounding errors cancel.
BOUNDS = dict(convolution=2e-2, token=2e-2, state=2e-2, loss=1e-2)
FP8_BOUND, FP8_SCALE_BOUND = 8e-2, 2e-2
# Trials of each, and the module whose kernels they launch
PARTS = dict(convolution=("short_conv", "short_filter", "long_filter"), token=("token",),
             state=("state",), loss=("loss",))
MODULES = dict(convolution="convolution", token="token_conv", state="state", loss="softmax")
# Channels of a filter and of a head, as models have them (AFNO1D's)
CHANNELS, HEAD = 64, 128


def exact_conv(u: Tensor, taps: Tensor) -> Tensor:
    """Return u (B, T, C) convolved with taps (G, K), by one FFT of 2 T points."""
    T, width = u.size(1), u.size(2) // len(taps)
    taps = taps[:, :T].repeat_interleave(width, 0)
    spectrum = torch.fft.rfft(u.mT, 2 * T) * torch.fft.rfft(taps, 2 * T)
    return torch.fft.irfft(spectrum, 2 * T)[..., :T].mT


def exact_short_conv(x: Tensor, taps: Tensor, silu: bool) -> Tensor:
    """Return x (B, T, C) convolved with taps (length, C), by shifts; with silu, SiLU of that."""
    T = x.size(1)
    y = sum(tap * F.pad(x, (0, 0, lag, 0))[:, :T] for lag, tap in enumerate(taps))
    return y / (1 + torch.exp(-y)) if silu else y


def exact_token_conv(u: Tensor, w: Tensor) -> Tensor:
    """Return u (B, T, C) convolved with each token's own taps w (B, T, G, K), by shifts."""
    T, width = u.size(1), u.size(2) // w.size(2)
    w = w.repeat_interleave(width, 2)
    return sum(w[..., lag] * F.pad(u, (0, 0, lag, 0))[:, :T] for lag in range(w.size(3)))


def exact_state(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor) -> Tensor:
    """Return the state's output (B, T, G, W) as one masked sum over all pairs of tokens, O(T^2).

    q, k: (B, T, G, D); v: (B, T, G, W); log_a: (B, T, G).
    """
    T, total = v.size(1), log_a.cumsum(1)
    past = torch.ones(T, T, dtype=torch.bool).tril()[..., None]
    between = total[:, :, None] - total[:, None]  # (B, t, s, G)
    remains = between.masked_fill(~past, -math.inf).exp()
    return torch.einsum("btgd,bsgd,btsg,bsgw->btgw", q, k, remains, v)


def exact_cross_entropy(logits: Tensor, targets: Tensor, cap: float) -> Tensor:
    """Return the losses of targets, both (rows, K), for the logits cap tanh(logits / cap).

    logits: (rows, vocabulary). A cap of 0 leaves them as they are.
    """
    logits = cap * torch.tanh(logits / cap) if cap else logits
    return torch.stack([F.cross_entropy(logits, column, reduction="none")
                        for column in targets.unbind(1)], 1)


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Return |got - exact| / |exact|, in Euclidean norms of all numbers."""
    return ((got.detach().cpu().double() - exact.detach()).norm() / exact.detach().norm()).item()


def with_gradients(run, inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    """Return y = run(*inputs), then the gradients of all inputs where that of y is dy."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    y = run(*inputs)
    return [y, *torch.autograd.grad(y, inputs, dy)]


class Trials:
    """Try kernels on a device with random numbers; their relative error must be below `bound`."""

    def __init__(self, device: torch.device, dtype: torch.dtype, bound: float):
        self.device, self.dtype, self.bound = device, dtype, bound
        self.generator = torch.Generator().manual_seed(0)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def half(self, *shape: int) -> Tensor:
        return self.random(*shape).to(self.dtype)

    def compare(self, kernel, exact, what: str, **inputs: Tensor) -> str | None:
        """Return in words what is off, the output or a gradient of an input, or None.

        `exact` gets the inputs in float64 on the CPU, `kernel` gets them on the device. The output
        has the shape of the first input.
        """
        dy = self.half(*next(iter(inputs.values())).shape)
        wanted = with_gradients(exact, [x.double() for x in inputs.values()], dy.double())
        ours = [x.to(self.device) for x in inputs.values()]
        got = with_gradients(kernel, ours, dy.to(self.device))
        names = ("output", *(f"gradient of {name}" for name in inputs))
        for name, *pair in zip(names, got, wanted):
            if fault := self.check(f"{name} of {what}", *pair):
                return fault
        return None

    def check(self, what: str, got: Tensor, wanted: Tensor) -> str | None:
        """Return in words how far `got` is off `wanted`, or None where that is below the bound."""
        off = relative_error(got, wanted)
        return None if off < self.bound else f"{what} is {off:.1e} off, more than {self.bound:g}"

    def short_conv(self) -> str | None:
        """Try the short convolution of four taps, without SiLU and with it."""
        from kernels import convolution

        for silu in (False, True):
            if fault := self.compare(lambda x, taps: convolution.short_conv(x, taps, silu),
                                     lambda x, taps: exact_short_conv(x, taps, silu),
                                     "the short convolution", x=self.half(2, 300, 32),
                                     taps=self.random(4, 32)):
                return fault
        return None

    def filter(self, T: int, K: int) -> str | None:
        """Try two filters of K taps on T tokens, as wide as models have."""
        from kernels import convolution

        return self.compare(convolution.causal_conv, exact_conv, f"{K} taps",
                            u=self.half(1, T, 2 * CHANNELS),
                            taps=self.random(2, K) / math.sqrt(K))

    def short_filter(self) -> str | None:
        """Try filters that are made of Toeplitz tiles alone."""
        from kernels import convolution

        return self.filter(300, convolution.FAR - 5)

    def long_filter(self) -> str | None:
        """Try long filters over 33 blocks: more than one tile of blocks to mix."""
        from kernels import convolution

        return self.filter(33 * convolution.FAR - 5, 33 * convolution.FAR)

    def token(self) -> str | None:
        """Try each token's own taps, over three blocks, the last one short."""
        from kernels import blocks, token_conv

        T = 3 * blocks.BLOCK - 5
        return self.compare(token_conv.token_conv, exact_token_conv, "each token's own taps",
                            u=self.half(2, T, 2 * CHANNELS), w=self.half(2, T, 2, 16) / 4)

    def state(self) -> str | None:
        """Try the scan of states, over five chunks, the last one short."""
        from kernels import state

        T = 5 * state.CHUNK - 5
        q, k, v = (self.half(2, T, 2, HEAD) for _ in range(3))
        log_a = -0.1 * self.random(2, T, 2).square()
        return self.compare(state.state_scan, exact_state, "the state", q=q, k=k, v=v, log_a=log_a)

    def loss(self) -> str | None:
        """Try the softmax of the loss, with and without a soft cap, for one target and three."""
        from kernels import softmax

        logits = (3 * self.random(4, 10_048)).to(self.dtype)
        # three targets of a row may be one
        all_targets = torch.tensor([[0, 7, 0], [5, 5, 5], [9_998, 3, 4], [9_999, 1, 2]])
        for K, cap in ((1, 0.0), (1, 15.0), (3, 15.0)):
            targets = all_targets[:, :K]
            shares = self.random(4, K).abs().float()
            exact = logits.double().requires_grad_()
            losses = exact_cross_entropy(exact[:, :10_000], targets, cap)
            wanted = losses, *torch.autograd.grad((shares * losses).sum(), exact)
            got = softmax.cross_entropy(
                logits.to(self.device, copy=True), targets.to(self.device), shares.to(self.device),
                10_000, True, cap)
            for name, *pair in zip(("loss", "gradient"), got, wanted):
                what = f"the {name} with {K} target{'s' * (K > 1)} and a cap of {cap:g}"
                if fault := self.check(what, *pair):
                    return fault
        return None


class Rehearsal(Trials):
    """Do what the trials do on the device, and compare nothing."""

    def compare(self, kernel, exact, what: str, **inputs: Tensor):
        ours = [x.to(self.device) for x in inputs.values()]
        with_gradients(kernel, ours, self.half(*ours[0].shape).to(self.device))

    def check(self, what: str, got: Tensor, wanted: Tensor):
        pass


@contextlib.contextmanager
def recorded_launches(what: str):
    """Record meanwhile, once a variant, what would launch the kernels of `what`; launch nothing.

    It gives {variant: a function that compiles it}.
    """
    module, found = importlib.import_module(f"kernels.{MODULES[what]}"), {}
    launches = {value: value.run for value in vars(module).values() if hasattr(value, "run")}

    def record(kernel, *args, **options):
        variant = (kernel, *(getattr(x, "dtype", x) for x in args),
                   *sorted(item for item in options.items() if item[0] != "grid"))
        found[variant] = functools.partial(launches[kernel], *args, **options | dict(warmup=True))

    for kernel in launches:
        kernel.run = functools.partial(record, kernel)
    try:
        yield found
    finally:
        for kernel, launch in launches.items():
            kernel.run = launch


def compile_ahead(what: str, device: torch.device, dtype: torch.dtype):
    """Compile all kernels that the trials of `what` launch, in threads.

    A trial launches one after another, and would wait for each compilation in turn.
    """
    with recorded_launches(what) as found, exactly(device):
        for part in PARTS[what]:
            getattr(Rehearsal(device, dtype, math.inf), part)()
    at_once(lambda compiled: compiled(), found.values(), device)


@contextlib.contextmanager
def exactly(device: torch.device):
    """Switch gradients on and autocast off for a trial, whatever is outside."""
    with (torch.inference_mode(False), torch.enable_grad(),
          torch.autocast(device.type, enabled=False), torch.autocast("cpu", enabled=False)):
        yield


def kind_and_first_line(error: Exception) -> str:
    """Return an exception's kind and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def find_fault(what: str, device: torch.device, dtype: torch.dtype, bound: float) -> str | None:
    """Return in words what is wrong with the kernels `what` on this device, or None.

    what: a name of BOUNDS. bound: their relative error must be below it.
    """
    def part(name: str) -> str | None:
        with exactly(device):
            return getattr(Trials(device, dtype, bound), name)()

    try:
        if device.type == "cuda":
            with contextlib.suppress(Exception):  # a compiler may not be made for threads
                compile_ahead(what, device, dtype)
        return next(filter(None, map(part, PARTS[what])), None)
    except Exception as error:  # whatever a compiler, a driver or a launch may raise
        return kind_and_first_line(error)


def try_fp8(device: torch.device, dtype: torch.dtype) -> tuple[str | None, float]:
    """Return what is wrong with products in fp8 on this device, or None, and their largest error.

    It tries the head's loss and Fp8Linear, values and gradients. The error is relative, and nan
    where they do not work.
    """
    from kernels.loss import Fp8Linear, linear_cross_entropy

    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(rows, 128, generator=generator) for rows in (64, 1000))
    x, w = x * torch.rsqrt(x.square().mean(-1, keepdim=True)), 0.1 * w
    targets = torch.randint(1000, (64,), generator=generator)
    slope = 1e-3 / 64 * torch.randn(64, 992, generator=generator)

    def exact(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        losses = exact_cross_entropy(x @ w.T, targets[:, None], 15.0)[:, 0]
        return losses.mean(), losses, x @ w[:992].T

    def ours(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, losses = linear_cross_entropy(x, w, targets.to(device), 15.0, fp8=True)
        return mean, losses, Fp8Linear.apply(x, w[:992].float())  # weights are fp32, as in training

    def results(run, *inputs: Tensor) -> list[Tensor]:
        inputs = [z.requires_grad_() for z in inputs]
        mean, losses, y = run(*inputs)
        gradients = torch.autograd.grad(mean, inputs) + torch.autograd.grad(y, inputs, slope.to(y))
        return [z.detach().cpu().double() for z in (losses, y, *gradients)]

    try:
        with exactly(device):
            got = results(ours, *(z.to(device, dtype, copy=True) for z in (x, w)))
            pairs = list(zip(got, results(exact, x.double(), w.double())))
        # a maximum that is NaN if any is
        off = torch.tensor([relative_error(a, b) for a, b in pairs]).max().item()
        scales = torch.stack([((a - b) * b).sum().abs() / b.square().sum() for a, b in pairs])
        scale = scales.max().item()
    except Exception as error:  # whatever a library, a driver or a launch may raise
        return f"does not work here: {kind_and_first_line(error)}", math.nan
    if not (off < FP8_BOUND and scale < FP8_SCALE_BOUND):
        return f"is {off:.1e} off here, its scale {scale:.1e}", off
    return None, off
