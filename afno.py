"""A causal Adaptive Fourier Neural Operator (AFNO) that mixes tokens in place of attention.

AFNO (Guibas et al., "Adaptive Fourier Neural Operators", ICLR 2022) runs a block-diagonal complex MLP and a
soft-shrink over the spectrum of the *data*. That spectrum already holds the future, and zero-padding does not
take it out again: a non-linear function of a whole sequence's spectrum leaks. The causal forms here:

    filter     MLP and shrink act on the spectrum of the *operator*: they generate a frequency response, its inverse
               transform is cut to lags >= 0, and the result is an ordinary causal convolution (the default)
    hilbert    the same, of a learned real part, whose imaginary part is derived in frequency
    analytic   the MLP generates the coefficients of poles inside the unit disc: damped exponentials
    state      the same with coefficients that the tokens make: they write into damped waves and read from them
    dyadic     the MLP stays on the data's spectrum, but only on that of completed blocks

Filter, hilbert and analytic are linear in the data; an optional gate, computed from each token, is not. `reference` is the
original, which leaks.

Complex numbers are pairs (re, im) of real tensors: autocast and torch.compile handle those, and no others, well.

Read from top to bottom: complex building blocks, causal mask in frequency, causal convolution, operators, the mixer.
"""
import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import afno_triton
except ImportError:  # no Triton here
    afno_triton = None


def rmsnorm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / rms(x) over the last dimension, without weights (Zhang & Sennrich, 2019). Half precision norms in fp32."""
    x_full = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    return (x_full * torch.rsqrt(x_full.square().mean(-1, keepdim=True) + eps)).type_as(x)


# -----------------------------------------------------------------------------
# complex building blocks: a complex tensor z is the pair (re, im)

Complex = tuple[Tensor, Tensor]


def complex_linear(z: Complex, weight: Tensor, bias: Tensor | None) -> Complex:
    """z @ W + b for every block by itself (block-diagonal weights).

    z: two of (..., n, in); weight: (..., in, 2 * out), the columns of Re W, then those of Im W; bias: (..., 2 * out)
    likewise, or None. Leading dimensions, such as (num_experts, num_blocks), broadcast. Returns two of (..., n, out).
    """
    re, im = weight.chunk(2, -1)
    z = torch.cat(z, -1) @ torch.cat((weight, torch.cat((-im, re), -1)), -2)  # one real product
    return (z if bias is None else z + bias.unsqueeze(-2)).chunk(2, -1)


def complex_soft_shrink(z: Complex, threshold: float | Tensor) -> Complex:
    """Shorten every number by `threshold` >= 0, to zero where it was shorter: z * max(0, 1 - threshold / |z|).

    On the modulus, not on each part: so a delay, which only turns phases, never changes what is dropped.
    """
    # clamp keeps the gradient of 1/|z| finite where |z| <= threshold; there where makes an exact zero
    squared, least = z[0] ** 2 + z[1] ** 2, threshold**2 + 1e-30
    scale = torch.where(squared > least, 1 - threshold * torch.rsqrt(squared.clamp(min=least)), 0)
    return z[0] * scale, z[1] * scale


RELUS = ("cartesian", "modulus")


def complex_relu(z: Complex, threshold: Tensor | None = None) -> Complex:
    """Cartesian, as in AFNO: ReLU on the real and on the imaginary part. With a threshold (hidden,), modulus: ReLU on
    |z| - threshold with the phase kept, which is the soft-shrink (modReLU: Arjovsky et al., 2016)."""
    if threshold is None:
        return F.relu(z[0]), F.relu(z[1])
    return complex_soft_shrink(z, threshold)


NUM_DELAYS, MLP_WIDTH = 33, 64  # frequency features of an operator's MLP, and its hidden units


class SpectralMLP(nn.Module):
    """AFNO's two-layer complex MLP with ComplexReLU, then soft-shrink; every block of every expert has its own weights.

    Two of (num_blocks or 1, n, size_in) to two of (num_experts, num_blocks, n, size_out). At initialisation inputs of
    mean square 1 give outputs of mean square about 1.
    """

    def __init__(self, num_blocks: int, size_in: int, hidden: int, size_out: int, sparsity_threshold: float,
                 num_experts: int, relu: str, bias: bool):
        super().__init__()
        self.sparsity_threshold = sparsity_threshold
        E, N = num_experts, num_blocks
        self.w1 = nn.Parameter(torch.randn(E, N, size_in, 2 * hidden) * size_in**-0.5)
        self.w2 = nn.Parameter(torch.randn(E, N, hidden, 2 * size_out) * (2 * hidden) ** -0.5)
        self.b1 = nn.Parameter(torch.zeros(E, N, 2 * hidden)) if bias else None
        self.b2 = nn.Parameter(torch.zeros(E, N, 2 * size_out)) if bias else None
        self.log_threshold = nn.Parameter(torch.full((hidden,), math.log(0.5))) if relu == "modulus" else None

    def forward(self, z: Complex) -> Complex:
        threshold = None if self.log_threshold is None else self.log_threshold.exp()
        z = complex_relu(complex_linear(z, self.w1, self.b1), threshold)
        return complex_soft_shrink(complex_linear(z, self.w2, self.b2), self.sparsity_threshold)


ROUTINGS = ("frequency", "position")


class Router(nn.Module):
    """A soft mixture of experts: each has a learned Gaussian band on a line from 0 to 1, a softmax shares out every
    point of it. The line is the frequency (0 to pi), or the logarithm of the lag (of `lags`, first and last, in
    tokens), as `routing` says: never the data, so nothing can leak through it. One expert has no band, no parameters.
    """

    def __init__(self, num_experts: int, routing: str, lags: tuple[float, float]):
        super().__init__()
        self.routing, self.lags = routing, lags
        if num_experts > 1:
            self.centre = nn.Parameter((torch.arange(num_experts) + 0.5) / num_experts)
            self.log_width = nn.Parameter(torch.full((num_experts,), -math.log(2 * num_experts)))

    def by_frequency(self, parts: Tensor, angle: Tensor) -> Tensor:
        """parts: (num_experts, ..., n) at the angles (n,), in radians a token -> (1, ..., n); as it is, if this is not
        what they are routed by."""
        return self.mix(parts, angle / math.pi) if self.routing == "frequency" else parts

    def by_lag(self, parts: Tensor, lag: Tensor) -> Tensor:
        """The same for lags, (n,) or (1,), in tokens."""
        if self.routing != "position":
            return parts
        first, last = (math.log1p(lag) for lag in self.lags)
        return self.mix(parts, ((torch.log1p(lag) - first) / max(last - first, 1e-9)).clamp(0, 1))

    def mix(self, parts: Tensor, place: Tensor) -> Tensor:
        if len(parts) == 1:
            return parts
        distance = (place - self.centre[:, None]) * torch.exp(-self.log_width)[:, None]
        share = F.softmax(-0.5 * distance**2, 0)  # (num_experts, n)
        return (share.view(len(parts), *[1] * (parts.ndim - 2), -1) * parts).sum(0, keepdim=True)


def apply_causal_mask_freq(X: Tensor, n: int) -> Tensor:
    """rfft of the n-point real kernel whose rfft is X, with all lags but 0 ... ceil(n/2) - 1 set to zero.

    A product with a step in time is a circular convolution in frequency: half the identity plus half a discrete
    Hilbert transform, whose kernel is the transform of +1 at kept and -1 at dropped lags. So the real and the
    imaginary part of a causal response determine each other (Kramers-Kronig). X: complex, (..., n // 2 + 1);
    as for irfft, imaginary parts at frequency 0 and, for even n, n/2 do not count. O(n^2), never in time.
    Raises ValueError where X does not have n // 2 + 1 frequencies.
    """
    if n < 1 or X.size(-1) != n // 2 + 1:
        raise ValueError(f"n must be >= 1 and X hold n // 2 + 1 frequencies, got n={n} and {X.size(-1)}")
    k = torch.arange(n, device=X.device)
    kept = -(-n // 2)
    turn = torch.exp(-2j * math.pi / n * k.double())  # float64: 1 - turn cancels at low frequencies
    hilbert = 2 * (1 - turn[kept * k % n]) / torch.where(k == 0, 1, 1 - turn)  # the geometric sum over kept lags
    hilbert[0] = 2 * kept - n
    hilbert = hilbert.to(X.dtype)
    whole = torch.cat((X, X[..., 1 : kept].flip(-1).conj()), -1)  # all n frequencies
    real_bins = (k == 0) | (2 * k == n)
    whole = torch.where(real_bins, whole.real.to(X.dtype), whole)
    rows = hilbert[(k[: n // 2 + 1, None] - k) % n]  # (n // 2 + 1, n)
    return (whole[..., : n // 2 + 1] + whole @ rows.T / n) / 2


@torch.compiler.assume_constant_result
def rdft_factors(n: int) -> tuple[int, int]:
    """N1, even, and N2 with N1 N2 = n, for the fewest products in inverse_rdft."""
    return min(((N, n // N) for N in range(2, n + 1, 2) if n % N == 0), key=lambda factors: factors[0] + 2 * factors[1])


def inverse_rdft(re: Tensor, im: Tensor) -> Tensor:
    """First half of the inverse transform of a real signal of n = 2 K points: irfft(re + i im, n)[..., :K] from two of
    (..., K + 1), as products with real matrices (Cooley & Tukey, 1965): w = N1 a + c and t = N2 d + e, n = N1 N2, give

        y[d, e] = Re sum over c of exp(2 pi i c d / N1) exp(2 pi i c e / n) sum over a of exp(2 pi i a e / N2) X[a, c]

    with about n (N1 + 2 N2) multiply-adds. An FFT would be a complex one, which torch.compile leaves uncompiled.
    """
    K = re.size(-1) - 1
    n = 2 * K
    N1, N2 = rdft_factors(n)

    def wave(first: int, second: int, period: int) -> Complex:
        """cos and sin of 2 pi x y / period, x < first, y < second; x y is reduced before it becomes a float."""
        turns = torch.outer(torch.arange(first, device=re.device), torch.arange(second, device=re.device)) % period
        angle = turns.to(re.dtype) * (2 * math.pi / period)
        return angle.cos(), angle.sin()

    rows = K // N1 + 1
    inner = re.new_full((K - 1,), 2 / n)  # frequencies 1 ... K - 1 stand for their conjugates, too; 0 and K are real
    re, im = re * F.pad(inner, (1, 1), value=1 / n), im * F.pad(inner, (1, 1))
    re, im = (F.pad(part, (0, rows * N1 - K - 1)).unflatten(-1, (rows, N1)) for part in (re, im))  # (..., a, c)
    cos, sin = wave(N2, rows, N2)
    re, im = cos @ re - sin @ im, sin @ re + cos @ im  # (..., e, c)
    cos, sin = wave(N2, N1, n)
    re, im = re * cos - im * sin, re * sin + im * cos
    cos, sin = wave(N1, N1 // 2, N1)
    return (re @ cos - im @ sin).mT.flatten(-2)  # (..., d, e)


# -----------------------------------------------------------------------------
# causal convolution


def toeplitz(x: Tensor) -> Tensor:
    """(..., n) -> (..., n, n), lower triangular: out[t, s] = x[t - s] where t >= s, else an exact zero."""
    n = x.size(-1)
    # Rows of 2n numbers (x, then zeros), read on as rows of 2n - 1: each row begins one place later than the one
    # before. Only copies and views: the gradient is a plain sum, where unfold's would be a scatter.
    rows = F.pad(x, (0, n)).unsqueeze(-2).expand(*x.shape[:-1], n, 2 * n).flatten(-2)
    return rows[..., : n * (2 * n - 1)].unflatten(-1, (n, 2 * n - 1))[..., :n].mT


def odd_dft(block: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Real matrices of the DFT of 2 * block points at the odd frequencies (w + 1/2) / (2 * block), w < block.

    Odd frequencies come in conjugate pairs without exception, so `block` complex numbers hold 2 * block real
    points and there is no special bin. A product of such spectra is a circular convolution whose wrapped part
    changes sign; `plain_conv` uses only outputs that nothing wraps into.
    Returns forward (2 * block, 2 * block) with rows (w, re/im) interleaved, and inverse (block, 2 * block),
    which yields the second half of the points only.
    """
    time = torch.arange(2 * block, device=like.device)
    odd = 2 * torch.arange(block, device=like.device) + 1
    # integers first: the phase is exact modulo one turn before it becomes a float
    angle = (torch.outer(odd, time) % (4 * block)).to(like.dtype) * (math.pi / (2 * block))
    forward = torch.stack((angle.cos(), -angle.sin()), 1).view(2 * block, 2 * block)
    return forward, forward.T[block:] / block


@torch.compiler.assume_constant_result
def kernel_path(device: torch.device, dtype: torch.dtype, kernels: str = "convolution") -> tuple[bool, str]:
    """Whether causal_conv (kernels: convolution) or state_scan (state) takes Triton's kernels for inputs of this dtype on
    this device, and why in a few words."""
    if device.type != "cuda":
        return False, f"plain, Triton's kernels are for CUDA devices, this is {device.type}"
    if afno_triton is None:
        return False, "plain, Triton is not installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False, f"plain, Triton's kernels want compute capability 8.0, {torch.cuda.get_device_name(device)} has less"
    if dtype not in (torch.bfloat16, torch.float16):
        return False, f"plain, Triton's kernels are for half precision, this is {str(dtype).removeprefix('torch.')}"
    if fault := kernel_fault(device, dtype, 2e-2, kernels):
        return False, f"plain, Triton's kernels do not work here: {fault}"
    return True, f"Triton's kernels on {torch.cuda.get_device_name(device)}, found to agree with the plain path"


@functools.cache
def kernel_fault(device: torch.device, dtype: torch.dtype, bound: float, kernels: str) -> str | None:
    """What is wrong with the kernels on this device, found by trying: value and gradients, against the plain path in float64,
    of the short convolution, a short and a long filter, or of the state. Compilers differ between machines and versions, and
    a wrong sum would train, only worse."""
    generator = torch.Generator().manual_seed(0)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def results(run, inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
        inputs = [x.clone().requires_grad_() for x in inputs]
        y = run(*inputs)
        return [x.detach().double() for x in (y, *torch.autograd.grad(y, inputs, dy))]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    def trial(plain, ours, what: str, **inputs: Tensor) -> str | None:
        dy = random(*next(iter(inputs.values())).shape).to(dtype)
        exact = results(plain, [x.double() for x in inputs.values()], dy.double())
        names = "output", *(f"gradient of {name}" for name in inputs)
        for name, got, wanted in zip(names, results(ours, list(inputs.values()), dy), exact):
            relative = ((got - wanted).norm() / wanted.norm()).item()
            if not relative < bound:
                return f"{name} of {what} is {relative:.1e} off, more than {bound:g}"

    try:
        with torch.autocast(device.type, enabled=False):
            if kernels == "state":
                T, D = 5 * afno_triton.CHUNK - 5, AFNO1D.channels_per_head
                q, k, v = (random(2, T, 2, D).to(dtype) for _ in range(3))
                return trial(plain_state_scan, afno_triton.state_scan, "the state", q=q, k=k, v=v,
                             log_a=-0.1 * random(2, T, 2).square())
            fault = None
            for silu in (False, True):
                fault = fault or trial(functools.partial(plain_depthwise_conv, silu=silu),
                                       functools.partial(afno_triton.depthwise_conv, silu=silu),
                                       "the short convolution", x=random(2, 300, 32).to(dtype), taps=random(4, 32))
            # two filters as wide as models have; 33 blocks: more than one tile of blocks to mix
            C = 2 * AFNO1D.channels_per_filter
            for T, K in ((300, afno_triton.FAR - 5), (33 * afno_triton.FAR - 5, 33 * afno_triton.FAR)):
                fault = fault or trial(plain_conv, kernel_conv, f"{K} taps", u=random(1, T, C).to(dtype),
                                       taps=random(2, K) / math.sqrt(K))
        return fault
    except Exception as error:  # whatever a compiler, a driver or a launch may raise
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def causal_conv(u: Tensor, taps: Tensor) -> Tensor:
    """y_t = sum over s <= t of taps[t - s] * u_s, and bitwise causal: y_t is computed from u_0 ... u_t alone.

    u: (B, T, C); taps: (G, K), lags 0 ... K - 1 in tokens, filter g serving channels g C/G ... (g + 1) C/G - 1.
    Any T and any K. Returns (B, T, C) in u's dtype (in autocast's, under autocast); matrices of taps are made in the
    taps' dtype and then cast.
    """
    kind = u.device.type
    if torch.is_autocast_enabled(kind) and u.dtype == torch.float32:
        u = u.to(torch.get_autocast_dtype(kind))
    with torch.autocast(kind, enabled=False):  # filters stay in fp32 until they are used
        return (kernel_conv if kernel_path(u.device, u.dtype)[0] else plain_conv)(u, taps)


def segment_responses(taps: Tensor, forward: Tensor, n: int, b: int) -> Tensor:
    """What blocks of b tokens, 0 ... n - 1 apart, send each other, by frequency: taps (G, K) to (G, 2b, n). Blocks l
    apart meet at lags (l - 1) b + 1 ... (l + 1) b - 1; l = 0 is left to the near field, and zero."""
    taps = F.pad(taps, (0, max(0, n * b - taps.size(1))))[:, : n * b]
    return F.pad(forward @ taps.unfold(-1, 2 * b, b).mT, (1, 0))


def kernel_conv(u: Tensor, taps: Tensor) -> Tensor:
    """causal_conv by afno_triton's kernels: short filters all near, long ones with a far field of blocks of FAR tokens.

    u in half precision (fp32 is slow), taps in fp32. A token and channel takes about K - K^2 / (2 T) multiply-adds up to DIRECT
    (afno_triton.multiply_adds); where that would be more, 3 FAR + 2 T / FAR.
    """
    T, b = u.size(1), afno_triton.FAR
    taps = taps[:, :T].float()
    if afno_triton.is_short(T, taps.size(1)):
        return afno_triton.block_conv(u, taps, None)
    # What reaches a later block is the second half of an inverse transform. Half a period on, frequency w + 1/2 has
    # turned by i (-1)^w: with that in the response, the first half, the transpose of the forward transform, will do.
    response = segment_responses(taps, odd_dft(b, taps)[0], -(-T // b), b).unflatten(1, (b // 2, 2, 2))
    turned = torch.stack((-response[..., 1, :], response[..., 0, :]), 3) / b
    turned = torch.stack((turned[:, :, 0], -turned[:, :, 1]), 2).flatten(1, 3)
    return afno_triton.block_conv(u, taps[:, :b], turned)


def plain_conv(u: Tensor, taps: Tensor) -> Tensor:
    """causal_conv by torch's batched matrix products, in any dtype.

    About 5 b + 4 T/b multiply-adds a token and channel, with b = 64 up to T = 2048 and T / 32 beyond: far below
    attention's, but not near-linear.
    With n = T / b blocks the matrices take G b (b + 4 n^2) numbers: 7 million at 12 filters, T = 4096.

    The sequence is cut into n blocks of b tokens. Inside a block (near field) the product is a lower-triangular
    Toeplitz matrix, whose upper entries are exact zeros. Between blocks (far field) the convolution theorem
    holds block by block: each block is zero-padded to 2b and transformed *by itself*; at every frequency the
    blocks are mixed by a strictly lower-triangular n x n Toeplitz matrix of the responses of the taps' segments;
    the inverse gives each block what the blocks before it send (overlap-save, uniformly partitioned: Stockham
    1966). One FFT over the whole sequence would be shorter to write, but it mixes future values into past
    outputs at rounding level, which is 4e-3 in bf16: too much for a gate that is to find real leaks.
    """
    B, T, C = u.shape
    G = taps.size(0)
    b = 64
    while 32 * b < T:  # at most 32 blocks: the mixing matrices stay small
        b *= 2
    b = min(b, T)
    n = -(-T // b)
    near = toeplitz(F.pad(taps, (0, max(0, b - taps.size(1))))[:, :b])  # (G, b, b)
    if n > 1:
        forward, inverse = odd_dft(b, taps)
        re, im = toeplitz(segment_responses(taps, forward, n, b)).view(G, b, 2, n, n).unbind(2)
        mix = torch.cat((torch.cat((re, -im), -1), torch.cat((im, re), -1)), -2).view(G * b, 2 * n, 2 * n)
    # channels of one filter and the batch are columns; (G, b, n * B * C/G)
    x = F.pad(u, (0, 0, 0, n * b - T)).view(B, n, b, G, C // G).permute(3, 2, 1, 0, 4).reshape(G, b, -1)
    y = near.to(x.dtype) @ x
    if n > 1:
        # expand: otherwise matmul would fold filters and columns together, through transposed copies of x
        spectra = forward[:, :b].to(x.dtype).expand(G, -1, -1) @ x  # (G, 2b, n * B * C/G), rows (w, re/im)
        mixed = mix.to(x.dtype) @ spectra.view(G * b, 2 * n, -1)
        y = y + inverse.to(x.dtype).expand(G, -1, -1) @ mixed.view(G, 2 * b, -1)
    return y.view(G, b, n, B, C // G).permute(3, 2, 1, 0, 4).reshape(B, n * b, C)[:, :T]


def state_scan(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor) -> Tensor:
    """y_t = q_t S_t, where S_t = a_t S_(t-1) + k_t v_t^T is a head's state, and bitwise causal as causal_conv is.

    q, k: (B, T, G, D) of G heads; v: (B, T, G, W); log_a <= 0: (B, T, G), in fp32 or float64; to (B, T, G, W), all in v's
    dtype. In chunks of L = 64 tokens: inside one as attention without a softmax, masked by exact zeros; each sends what it
    adds to the state to the chunks after it. Sums of log_a in fp32. A token costs L (D + W) + 2 D W multiply-adds and its
    share of mixing T / L chunks.
    """
    return (afno_triton.state_scan if kernel_path(v.device, v.dtype, "state")[0] else plain_state_scan)(q, k, v, log_a)


def chunks_remaining(whole: Tensor) -> Tensor:
    """How much of the state after chunk j < i is left where chunk i begins, (..., n, n), from the chunks' sums of log_a,
    (..., n): exp of the sum over chunks j + 1 ... i - 1, and zeros for j >= i. Sums end with chunk i - 1, so that a chunk's
    own, of which a later token is a part, is never in them."""
    n, end = whole.size(-1), whole.cumsum(-1)
    past = torch.ones(n, n, dtype=torch.bool, device=whole.device).tril(-1)
    return (F.pad(end, (1, -1))[..., None] - end[..., None, :]).masked_fill(~past, -math.inf).exp()


def plain_state_scan(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor) -> Tensor:
    """state_scan by torch's batched matrix products, in any dtype."""
    T = v.size(1)
    L = min(64, T)
    n = -(-T // L)
    q, k, v, log_a = (F.pad(x, (0, 0) * (x.ndim - 2) + (0, n * L - T)).unflatten(1, (n, L)).movedim(3, 1).contiguous()
                      for x in (q, k, v, log_a))  # (B, G, n, L, D or W or none)
    since = log_a.cumsum(3)  # how much of the chunk's beginning is left, as a logarithm
    before = torch.ones(L, L, dtype=torch.bool, device=v.device).tril()
    remains = (since[..., None] - since[..., None, :]).masked_fill(~before, -math.inf).exp()  # (..., t, s)
    y = ((q @ k.mT) * remains).to(v.dtype) @ v
    if n > 1:
        whole = since[..., -1]
        sent = (k * (whole[..., None] - since).exp()[..., None]).to(v.dtype).mT @ v  # (B, G, n, D, W)
        state = (chunks_remaining(whole).to(v.dtype) @ sent.flatten(3)).view_as(sent)
        y = y + (q * since.exp()[..., None]).to(v.dtype) @ state
    return y.movedim(1, 3).flatten(1, 2)[:, :T]


def newest_output(window: Tensor, taps: Tensor) -> Tensor:
    """The last output of causal_conv, (B, C), from the last n <= K inputs, (B, n, C), and taps (G, K)."""
    B, n, C = window.shape
    G = len(taps)
    return torch.einsum("bngc,gn->bgc", window.view(B, n, G, C // G), taps[:, :n].flip(1).to(window.dtype)).reshape(B, C)


def extend(window: Tensor | None, u_t: Tensor, length: int) -> Tensor:
    """The last `length` inputs, (B, up to length, C), the newest one, (B, C), included."""
    u_t = u_t[:, None]
    return u_t if window is None else torch.cat((window, u_t), 1)[:, -length:]


def plain_depthwise_conv(x: Tensor, taps: Tensor, silu: bool = False) -> Tensor:
    """Causal convolution of x (B, T, C) with taps (length, C), channel by channel; silu: SiLU of that."""
    length, T = taps.size(0), x.size(1)
    padded, taps = F.pad(x, (0, 0, length - 1, 0)), taps.to(x.dtype)
    y = sum(taps[lag] * padded[:, length - 1 - lag : length - 1 - lag + T] for lag in range(length))
    return F.silu(y) if silu else y


class ShortConv(nn.Module):
    """Causal convolution of a few taps for every channel by itself, (B, T, C) to the same; begins as the identity. Then,
    with silu, SiLU."""

    def __init__(self, channels: int, length: int = 4, silu: bool = False):
        super().__init__()
        self.silu = silu
        self.taps = nn.Parameter(torch.zeros(length, channels))
        nn.init.ones_(self.taps[0])

    def forward(self, x: Tensor) -> Tensor:
        if len(self.taps) > 1 and kernel_path(x.device, x.dtype)[0]:
            return afno_triton.depthwise_conv(x, self.taps.float(), self.silu)
        return plain_depthwise_conv(x, self.taps, self.silu)

    def step(self, x_t: Tensor, window: Tensor | None) -> tuple[Tensor, Tensor]:
        window = extend(window, x_t, len(self.taps))
        y = newest_output(window, self.taps.T)
        return F.silu(y) if self.silu else y, window


def response_at(turn: Tensor, mlp: SpectralMLP, router: Router) -> Complex:
    """AFNO's MLP at angles w (n,), from their frequency features, the responses exp(-i w d) of the delays d = 0 ... 32: turn
    (n, NUM_DELAYS) is w d, in radians. Returns two of (num_experts, or 1 where frequency routes, filters, n)."""
    return tuple(router.by_frequency(part.mT.flatten(1, 2), turn[:, 1]) for part in mlp((turn.cos(), -turn.sin())))


# -----------------------------------------------------------------------------
# operators: (B, T, C) to the same, linear or not in u, all but the reference causal. `step` makes one token's output,
# (B, C) to the same, from the state that the step before returned; the first one gets None. The first operator's filters, which
# need no data, come before it.


class FilterTaps(nn.Module):
    """The taps of the forms `filter` and `hilbert`, whose frequency response AFNO's MLP generates.

    On a fixed grid of 2 x filter_length points: frequency features (the responses exp(-i w d) of the delays
    d = 0 ... 32) -> in each block a two-layer complex MLP with ComplexReLU -> complex soft-shrink -> inverse
    transform, lags >= 0 kept -> decay window exp(-t / tau). The grid and tau, in tokens, are fixed at construction, so
    the same taps serve every T, also beyond filter_length (lags from filter_length on are zero).
    `hilbert` learns the real part of the response alone and derives the imaginary part (apply_causal_mask_freq; the
    cut to lags >= 0 alone would do the same, in time).
    """

    def __init__(self, mlp: SpectralMLP, router: Router, num_filters: int, fraction: float, filter_length: int,
                 hilbert: bool):
        super().__init__()
        self.mlp, self.router = mlp, router
        self.num_filters, self.filter_length, self.hilbert = num_filters, filter_length, hilbert
        self.num_modes = math.ceil(fraction * (filter_length + 1))  # of filter_length + 1 bins, lowest first

    def forward(self) -> Tensor:
        """The filters, (num_filters, filter_length), in the parameters' dtype whatever autocast says."""
        like, K = self.mlp.w1, self.filter_length
        with torch.autocast(like.device.type, enabled=False):
            time = torch.arange(K, device=like.device)
            mode = torch.arange(self.num_modes, device=like.device)
            turns = torch.outer(mode, torch.arange(NUM_DELAYS, device=like.device)) % (2 * K)  # exact, not yet a float
            parts = response_at(turns.to(like.dtype) * (math.pi / K), self.mlp, self.router)
            re, im = (F.pad(part, (0, K + 1 - self.num_modes)) for part in parts)  # missing modes count as zero
            if self.hilbert:
                response = apply_causal_mask_freq(torch.complex(re, torch.zeros_like(re)), 2 * K)
                re, im = response.real, response.imag
            kernel = self.router.by_lag(inverse_rdft(re, im), time.to(like.dtype))[0]
            return kernel * torch.exp(-time / time_constants(self.num_filters, K, like)[:, None])


def taps_at_once(makers: list[FilterTaps]) -> Tensor:
    """What L makers, alike but for the values of their parameters, make: (L, num_filters, filter_length), in about as
    many kernels as one maker takes. To be called outside of autocast where it is compiled: in a compiled function
    autocast(enabled=False) holds for the forward pass alone.
    """
    own = [dict(maker.named_parameters()) for maker in makers]
    stacked = {name: torch.stack([parameters[name] for parameters in own]) for name in own[0]}
    return torch.vmap(lambda parameters: torch.func.functional_call(makers[0], parameters, ()))(stacked)


class FilterOperator(nn.Module):
    """Forms `filter` and `hilbert`: u convolved with taps that are made from parameters alone (FilterTaps)."""

    def __init__(self, taps: FilterTaps):
        super().__init__()
        self.taps = taps

    def forward(self, u: Tensor, taps: Tensor | None = None) -> Tensor:
        """taps: what self.taps() makes, (num_filters, filter_length), where that has been done already."""
        return causal_conv(u, self.taps() if taps is None else taps)

    def step(self, u_t: Tensor, state: tuple | None) -> tuple[Tensor, tuple]:
        """O(filter_length C); the state is the window of inputs and the taps, made once."""
        window, taps = state or (None, self.taps())
        window = extend(window, u_t, self.taps.filter_length)
        return newest_output(window, taps), (window, taps)


def log_spaced(first: float, last: float, count: int, like: Tensor) -> Tensor:
    """(count,) from first to last."""
    return first * (last / first) ** torch.linspace(0, 1, count, device=like.device, dtype=like.dtype)


def time_constants(count: int, filter_length: int, like: Tensor) -> Tensor:
    """(count,), in tokens, log-spaced from 2 to half of filter_length."""
    return log_spaced(2, max(filter_length / 2, 2), count, like)


class AnalyticOperator(nn.Module):
    """Form `analytic`: a response K(w) = sum_m c_m / (1 - p_m exp(-i w)) with poles |p_m| < 1, analytic outside the
    unit disc: taps Re sum_m c_m p_m^t, sums of damped exponentials without end, as in S4D (Gu et al., 2022).

    The poles are learned, their angles in (0, pi), their time constants from 2 tokens to half of filter_length at
    initialisation; AFNO's MLP makes each filter's coefficients from the frequency features of the poles' angles.
    """

    num_poles = 64

    def __init__(self, mlp: SpectralMLP, router: Router, num_filters: int, fraction: float, filter_length: int):
        super().__init__()
        self.mlp, self.router, self.num_filters = mlp, router, num_filters
        kept = math.ceil(fraction * self.num_poles)  # lowest angles first
        self.angle = nn.Parameter((torch.arange(kept) + 0.5) * math.pi / self.num_poles)
        # time constants in an order that gives slow and fast ones to every band: steps of the golden ratio
        order = ((torch.arange(kept) * 0.6180339887) % 1).argsort().argsort()
        self.log_decay = nn.Parameter(-time_constants(kept, filter_length, self.angle.detach())[order].log())

    def poles(self) -> Complex:
        """log p_m as (re, im), (num_poles,) each; re < 0 whatever the parameters are: time constants of e^-15 ... e^15."""
        return -self.log_decay.clamp(-15, 15).exp(), self.angle

    def coefficients(self) -> Complex:
        """c_m of every filter, (num_filters, num_poles) each."""
        turn = torch.outer(self.angle, torch.arange(NUM_DELAYS, device=self.angle.device))
        # The energy of c p^t is |c|^2 / (1 - |p|^2): so all poles begin with the same. Poles side by side have much the
        # same coefficients and add up; with the 4 the taps have about the energy of the filter form's.
        log_radius, _ = self.poles()
        scale = (-torch.expm1(2 * log_radius) / (4 * len(self.angle))).sqrt()
        parts = response_at(turn, self.mlp, self.router)
        return tuple(self.router.by_lag(part, -1 / log_radius)[0] * scale for part in parts)

    def taps(self, T: int) -> Tensor:
        """Lags 0 ... T - 1 of the filters, (num_filters, T), in the parameters' dtype whatever autocast says."""
        with torch.autocast(self.angle.device.type, enabled=False):
            time = torch.arange(T, device=self.angle.device)
            log_radius, angle = (torch.outer(part, time) for part in self.poles())
            re, im = self.coefficients()
            return re @ (log_radius.exp() * angle.cos()) - im @ (log_radius.exp() * angle.sin())

    def forward(self, u: Tensor) -> Tensor:
        return causal_conv(u, self.taps(u.size(1)))

    def step(self, u_t: Tensor, state: tuple | None) -> tuple[Tensor, tuple]:
        """O(num_poles C), however long the text: s_m <- p_m s_m + u, y = Re sum_m c_m s_m."""
        with torch.autocast(u_t.device.type, enabled=False):
            u = u_t.to(self.angle.dtype).view(len(u_t), self.num_filters, -1, 1)
            if state is None:
                log_radius, angle = self.poles()
                poles = log_radius.exp() * angle.cos(), log_radius.exp() * angle.sin()
                coefficients = tuple(part[..., None] for part in self.coefficients())
                state = poles, coefficients, (torch.zeros_like(u), torch.zeros_like(u))
            (p_re, p_im), (c_re, c_im), (s_re, s_im) = state
            s_re, s_im = p_re * s_re - p_im * s_im + u, p_im * s_re + p_re * s_im  # (B, num_filters, C/filter, poles)
            y = s_re @ c_re - s_im @ c_im
            return y.reshape(u_t.shape).to(u_t.dtype), (*state[:2], (s_re, s_im))


class StateOperator(nn.Module):
    """Form `state`: analytic with coefficients that the tokens make. A head's state is its values in damped waves,

        S_t[m] = a_t exp(i w_m) S_(t-1)[m] + k_t[m] v_t      y_t = rmsnorm(Re sum_m c[m] q_t[m] S_t[m])

    where a token writes k, reads q, says what it adds, v, and how much of the past remains, a = exp(-softplus(b + d v)),
    0 < a < 1; k and q have a mean square of one. AFNO's MLP makes the response c from the frequency features of the angles w. At
    d = 0 and c = 1 this is retention (Sun et al., 2023, "Retentive network"), with d a gated linear attention (Yang et al.,
    2024).

    Angles at initialisation are those of rotary attention, time constants go from an eighth of filter_length to four times it:
    recall of what is far is what filters lack.
    """

    def __init__(self, mlp: SpectralMLP, router: Router, num_heads: int, width: int, fraction: float, filter_length: int):
        super().__init__()
        self.mlp, self.router, self.num_heads = mlp, router, num_heads
        num_poles = max(1, width // 2)  # complex ones: a state of as many numbers as a value squared
        kept = math.ceil(fraction * num_poles)
        self.angle = nn.Parameter((10000.0 ** -(torch.arange(num_poles) / num_poles)).flip(0)[:kept])  # lowest first
        tau = log_spaced(filter_length / 8, 4 * filter_length, num_heads, self.angle.detach())
        self.log_decay = nn.Parameter((1 / tau).expm1().log())  # b: softplus of it is 1 / tau
        self.decay = nn.Parameter(torch.zeros(num_heads, num_heads * width))  # d
        self.sizes = (num_heads * width, 2 * kept * num_heads, 2 * kept * num_heads)  # of v, k and q, (re, im) of each head

    def response(self) -> Complex:
        """c, (num_heads, poles) each."""
        turn = torch.outer(self.angle, torch.arange(NUM_DELAYS, device=self.angle.device))
        parts = response_at(turn, self.mlp, self.router)
        lag = 1 / F.softplus(self.log_decay.detach())
        return tuple(self.router.by_lag(part.mT, lag)[0].mT for part in parts)

    def waves(self, z: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """state_scan's inputs of z (B, T, sizes together) at positions (T,): q and k turned to their position, so that
        their real product is the real part of the complex one; q, k and v in z's dtype."""
        v, k, q = z.split(self.sizes, -1)
        log_a = -F.softplus((v @ self.decay.mT.to(v.dtype)).to(self.angle.dtype) + self.log_decay)
        turn = torch.outer(position, self.angle)[:, None]
        cos, sin = turn.cos(), turn.sin()
        v, k, q = (part.unflatten(-1, (self.num_heads, -1)) for part in (v, k, q))
        (k_re, k_im), (q_re, q_im) = (rmsnorm(part.to(cos.dtype)).chunk(2, -1) for part in (k, q))
        c_re, c_im = self.response()
        q_re, q_im = q_re * c_re - q_im * c_im, q_re * c_im + q_im * c_re
        k = torch.cat((k_re * cos + k_im * sin, k_im * cos - k_re * sin), -1)  # k exp(-i w t)
        q = torch.cat((q_re * cos - q_im * sin, -q_re * sin - q_im * cos), -1)  # conjugate of q exp(i w t)
        return q.to(v.dtype), k.to(v.dtype), v, log_a

    def forward(self, z: Tensor) -> Tensor:
        """z: (B, T, v | k | q), to (B, T, num_heads width)."""
        with torch.autocast(z.device.type, enabled=False):
            position = torch.arange(z.size(1), device=z.device).to(self.angle.dtype)
            return rmsnorm(state_scan(*self.waves(z, position))).flatten(2)

    def step(self, z_t: Tensor, state: tuple | None) -> tuple[Tensor, tuple]:
        """O(C width), however long the text."""
        t, S = state or (0, 0.0)
        with torch.autocast(z_t.device.type, enabled=False):
            q, k, v, log_a = (part[:, 0, :, None] for part in self.waves(z_t[:, None], torch.full_like(self.angle[:1], t)))
            S = log_a.exp()[..., None] * S + k.mT.to(log_a.dtype) * v  # (B, G, 2 poles, width)
            y = rmsnorm(q.to(S.dtype) @ S)
            return y.flatten(1).to(z_t.dtype), (t + 1, S)


def spectral_layer(u: Tensor, mlp: SpectralMLP, router: Router, fraction: float, n: int) -> Tensor:
    """AFNO's own layer, on the data's spectrum: u (N, L, C), zero-padded to n points -> rfft -> MLP -> irfft, (N, n, C).

    Transforms are orthonormal over n points, so a threshold means the same at every n that is in use. The share
    `fraction` of the modes is kept, lowest first. Where experts are routed by position, L is the lag.
    """
    N, L, C = u.shape
    like, (E, blocks) = mlp.w1, mlp.w1.shape[:2]
    with torch.autocast(u.device.type, enabled=False):
        modes = math.ceil(fraction * (n // 2 + 1))
        X = torch.fft.rfft(u.to(like.dtype), n=n, dim=1, norm="ortho")[:, :modes]
        X = X.view(N, modes, blocks, C // blocks).permute(2, 0, 1, 3).flatten(1, 2)
        angle = torch.arange(modes, device=u.device, dtype=like.dtype) * (2 * math.pi / n)
        lag = torch.full((1,), L, device=u.device, dtype=like.dtype)
        parts = (part.view(E, blocks, N, modes, C // blocks).transpose(3, 4) for part in mlp((X.real, X.imag)))
        re, im = (router.by_lag(router.by_frequency(part, angle), lag)[0] for part in parts)
        Y = torch.complex(re, im).permute(1, 3, 0, 2).flatten(2)  # (N, modes, C)
        return torch.fft.irfft(Y, n=n, dim=1, norm="ortho").to(u.dtype)


class DyadicOperator(nn.Module):
    """Form `dyadic`: the non-linear MLP stays on the data's spectrum, but only on that of completed blocks.

    At level L = L0, 2 L0, 4 L0, ... and for every multiple a of 2L, the block [a, a + L), zero-padded to 2L, goes
    through AFNO's layer, and the second half of the result, which lies on [a + L, a + 2L), is used: so every pair of
    tokens s < t of different L0-blocks meets at exactly one level, and none other. Inside a block of L0 = 64 tokens
    a convolution with learned taps does the rest. The weights are shared by all levels: any T runs. The MLP has no
    biases: one in frequency would be an impulse in time, at the same place of every block, whatever the data are.
    """

    near_length = 64

    def __init__(self, mlp: SpectralMLP, router: Router, num_filters: int, fraction: float):
        super().__init__()
        self.mlp, self.router, self.fraction = mlp, router, fraction
        tau = time_constants(num_filters, self.near_length, mlp.w1.detach())
        window = torch.exp(-torch.arange(self.near_length) / tau[:, None])
        window = window / (2 * window.norm(dim=1, keepdim=True))  # as much energy as the filter form's taps, about
        self.near = nn.Parameter(torch.randn(num_filters, self.near_length) * window)

    def far(self, past: Tensor) -> Tensor:
        """What completed blocks (N, L, C) send to the L tokens after each."""
        L = past.size(1)
        return spectral_layer(past, self.mlp, self.router, self.fraction, 2 * L)[:, L:]

    def forward(self, u: Tensor) -> Tensor:
        B, T, C = u.shape
        L = self.near_length
        padded = L
        while padded < T:
            padded *= 2
        u = F.pad(u, (0, 0, 0, padded - T)).contiguous()
        y = causal_conv(u.view(-1, L, C), self.near).reshape(B, padded, C)
        while L < T:
            future = self.far(u.view(-1, 2 * L, C)[:, :L])
            y = y + F.pad(future, (0, 0, L, 0)).view(B, padded, C)
            L *= 2
        return y[:, :T]

    def step(self, u_t: Tensor, state: tuple | None) -> tuple[Tensor, tuple]:
        """Amortised O(C log^2 T): the state is all inputs, and what is known of the outputs to come. Changed in place."""
        L0 = self.near_length
        if state is None:
            state = 0, *u_t.new_zeros(2, len(u_t), L0, u_t.size(1))
        t, u, y = state
        u[:, t] = u_t
        y_t = y[:, t] + newest_output(u[:, t - t % L0 : t + 1], self.near)
        t += 1
        if t == u.size(1):
            u, y = (F.pad(part, (0, 0, 0, t)) for part in (u, y))  # twice the room
        if t % L0 == 0:
            L = t & -t  # the one level at which a block ends here: its lowest set bit
            y[:, t : t + L] += self.far(u[:, t - L : t])
        return y_t, (t, u, y)


class ReferenceOperator(nn.Module):
    """Form `reference`: the original AFNO layer (Guibas et al., 2022) over the whole sequence. NOT CAUSAL."""

    def __init__(self, mlp: SpectralMLP, router: Router, fraction: float):
        super().__init__()
        self.mlp, self.router, self.fraction = mlp, router, fraction

    def forward(self, u: Tensor) -> Tensor:
        return spectral_layer(u, self.mlp, self.router, self.fraction, u.size(1))


# -----------------------------------------------------------------------------
# the mixer


FORMS = ("filter", "analytic", "hilbert", "state", "dyadic", "reference")


class AFNO1D(nn.Module):
    """AFNO token mixer, (B, T, hidden_size) to the same, any T; causal in every form but `reference`.

        value = short_conv(W_in x)
        y     = operator(value) + direct value
        out   = W_out rmsnorm(y)              with a gate: W_out( silu(gate) * rmsnorm(y) ), gate made as value is

    With silu, value = silu(short_conv(W_in x)). What forward is given as added_value is added to the part of W_in x that becomes
    the value.

    In the form `state` the operator takes two more of what is made as value is, its y is normed by heads, there is no SiLU
    (measured: it loses), and the MLP has as many blocks as divide both num_blocks and the heads.

    Args:
        hidden_size: channels C.
        num_blocks: separate MLPs (block-diagonal weights), each for C / num_blocks channels. Divides hidden_size.
        sparsity_threshold: lambda of the soft-shrink, in units of the response's gain (all but dyadic, reference)
            or of an orthonormal spectrum (dyadic, reference); in [0, 1e6].
        hard_thresholding_fraction: share of the modes, lowest frequencies first, that may be non-zero; in (0, 1].
            Modes are dropped before a response is made one-sided, so causality is untouched.
        filter_length: number of taps, in tokens (filter, hilbert), or twice the longest time constant at
            initialisation (analytic), or a quarter of it (state), or twice the longest block told apart by routing position
            (dyadic); >= 1.
        form: the operator, one of FORMS; each has its class above.
        num_experts: separate sets of the MLP's weights, mixed by a Router; >= 1 (reference: 1).
        routing: by what, one of ROUTINGS: frequency, or position, which is the lag: a tap's (filter, hilbert), a
            pole's or a head's time constant (analytic, state), a block's length (dyadic).
        relu: the MLP's ComplexReLU, one of RELUS.
        short_conv: taps of the short convolution; >= 1, where 1 mixes no tokens.
        gate: whether there is one.
        silu: whether SiLU acts on the operator's operand, in all forms but state (a gate has one anyway).
    Parameters are float32 or float64; autocast makes the rest bf16. Raises ValueError naming the argument and its
    allowed range.
    """

    channels_per_filter = 64  # at most; 12 filters at 768 channels
    channels_per_head = 128  # of the form state, likewise; 6 heads

    def __init__(self, hidden_size: int, num_blocks: int = 4, sparsity_threshold: float = 0.01,
                 hard_thresholding_fraction: float = 1.0, filter_length: int = 1024, form: str = "filter",
                 num_experts: int = 1, routing: str = "frequency", relu: str = "cartesian", short_conv: int = 4,
                 gate: bool = False, silu: bool = False):
        super().__init__()
        self.check_arguments(hidden_size=hidden_size, num_blocks=num_blocks, sparsity_threshold=sparsity_threshold,
                             hard_thresholding_fraction=hard_thresholding_fraction, filter_length=filter_length,
                             form=form, num_experts=num_experts, routing=routing, relu=relu, short_conv=short_conv,
                             gate=gate, silu=silu)
        block_size = hidden_size // num_blocks
        most, divided = (self.channels_per_head, hidden_size) if form == "state" else (self.channels_per_filter, block_size)
        width = max(d for d in range(1, min(most, block_size) + 1) if divided % d == 0)
        num_filters = hidden_size // width
        num_blocks = math.gcd(num_blocks, num_filters)  # another number in the form state alone
        on_data = form in ("dyadic", "reference")  # what the MLP works on: the data's spectrum or the operator's
        sizes = (block_size,) * 3 if on_data else (NUM_DELAYS, MLP_WIDTH, num_filters // num_blocks)
        mlp = SpectralMLP(num_blocks, *sizes, sparsity_threshold, num_experts, relu, bias=form != "dyadic")
        # lags that experts share out; the dyadic form's are its levels
        lags = (DyadicOperator.near_length, filter_length / 2) if form == "dyadic" else (0, filter_length)
        shared = mlp, Router(num_experts, routing, lags)
        if form in ("filter", "hilbert"):
            self.operator = FilterOperator(FilterTaps(*shared, num_filters, hard_thresholding_fraction, filter_length,
                                                      hilbert=form == "hilbert"))
        elif form == "analytic":
            self.operator = AnalyticOperator(*shared, num_filters, hard_thresholding_fraction, filter_length)
        elif form == "state":
            self.operator = StateOperator(*shared, num_filters, width, hard_thresholding_fraction, filter_length)
        elif form == "dyadic":
            self.operator = DyadicOperator(*shared, num_filters, hard_thresholding_fraction)
        else:
            self.operator = ReferenceOperator(*shared, hard_thresholding_fraction)
        # what c_in makes: the operator's operand, of which the value is the first part, and the gate
        self.sizes = [sum(self.operator.sizes) if form == "state" else hidden_size] + [hidden_size] * gate
        self.c_in = nn.Linear(hidden_size, sum(self.sizes), bias=False)
        self.short_conv = ShortConv(sum(self.sizes), short_conv, silu and form != "state")
        self.direct = nn.Parameter(torch.ones(hidden_size))
        self.c_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    @staticmethod
    def check_arguments(*, hidden_size, num_blocks, sparsity_threshold, hard_thresholding_fraction, filter_length, form,
                        num_experts, routing, relu, short_conv, gate, silu):
        """Raise ValueError, which begins with the argument's name, where one is out of its range."""
        for name, value in (("hidden_size", hidden_size), ("num_blocks", num_blocks), ("filter_length", filter_length),
                            ("num_experts", num_experts), ("short_conv", short_conv)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value}")
        if hidden_size % num_blocks:
            raise ValueError(f"num_blocks must divide the {hidden_size} channels, got {num_blocks}")
        if not 0 <= sparsity_threshold <= 1e6:
            raise ValueError(f"sparsity_threshold must be in [0, 1e6], got {sparsity_threshold}")
        if not 0 < hard_thresholding_fraction <= 1:
            raise ValueError(f"hard_thresholding_fraction must be in (0, 1], got {hard_thresholding_fraction}")
        for name, value, allowed in (("form", form, FORMS), ("routing", routing, ROUTINGS), ("relu", relu, RELUS),
                                     ("gate", gate, (False, True)), ("silu", silu, (False, True))):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value}")
        if form == "reference" and num_experts > 1:
            raise ValueError(f"num_experts must be 1 where form is reference, the paper's layer, got {num_experts}")

    def forward(self, x: Tensor, taps: Tensor | None = None, added_value: Tensor | None = None, z: Tensor | None = None) -> Tensor:
        """taps: see FilterOperator; the other forms have none to be given. added_value: (B, T, hidden_size). z: what project(x)
        makes, where that has been done already."""
        operand, gate = self.operand_and_gate(self.short_conv(self.input(x, added_value, z)))
        return self.output(operand, gate, self.operator(operand) if taps is None else self.operator(operand, taps))

    def project(self, x: Tensor) -> Tensor:
        """W_in x: (..., hidden_size) to the same, with a gate or in the form state to more."""
        return self.c_in(x)

    def value(self, z: Tensor) -> Tensor:
        """The part of project's z that added_value is added to, (..., hidden_size)."""
        return z[..., : len(self.direct)]

    def input(self, x: Tensor, added_value: Tensor | None, z: Tensor | None) -> Tensor:
        z = self.project(x) if z is None else z
        return z if added_value is None else z + F.pad(added_value, (0, z.size(-1) - added_value.size(-1)))

    @torch.no_grad()
    def step(self, x_t: Tensor, state: tuple | None = None, added_value: Tensor | None = None,
             z: Tensor | None = None) -> tuple[Tensor, tuple]:
        """forward token by token, for generation: x_t (B, hidden_size) to the same, and the state for the next one; added_value
        and z likewise.

        The first token's state is None. A state is used once: some of its tensors are changed in place. The weights
        must stay as they are. Costs: see the operators' step. The reference form, not causal, has none.
        """
        window, operator_state = state or (None, None)
        z, window = self.short_conv.step(self.input(x_t, added_value, z), window)
        operand, gate = self.operand_and_gate(z)
        y, operator_state = self.operator.step(operand, operator_state)
        return self.output(operand, gate, y), (window, operator_state)

    def operand_and_gate(self, z: Tensor) -> tuple[Tensor, list[Tensor]]:
        operand, *gate = z.split(self.sizes, -1)
        return operand, gate if self.short_conv.silu else [F.silu(part) for part in gate]

    def output(self, operand: Tensor, gate: list[Tensor], y: Tensor) -> Tensor:
        """The rest of the layer, from the operator's operand, the gate, if any, and the operator's output y, (..., C)."""
        value = operand[..., : len(self.direct)]
        y = rmsnorm(y + self.direct.to(value.dtype) * value)
        return self.c_proj(gate[0] * y if gate else y)
