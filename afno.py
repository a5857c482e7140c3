"""A causal Adaptive Fourier Neural Operator (AFNO) that mixes tokens in place of attention.

AFNO (Guibas et al., "Adaptive Fourier Neural Operators", ICLR 2022) runs a block-diagonal complex MLP and a
soft-shrink over the spectrum of the *data*. That spectrum already holds the future, and zero-padding does not
take it out again: a non-linear function of a whole sequence's spectrum leaks. Here MLP and shrink act on the
spectrum of the *operator*: they generate a frequency response, its inverse transform is cut to lags >= 0, and
the result is an ordinary causal convolution. What adapts to the data is a gate computed from each token.

Complex numbers are pairs (re, im) of real tensors: autocast and torch.compile handle those, and no others, well.

Read from top to bottom: complex building blocks, causal convolution, the mixer AFNO1D.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rmsnorm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / rms(x) over the last dimension, without weights (Zhang & Sennrich, 2019). Half precision norms in fp32."""
    x_full = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    return (x_full * torch.rsqrt(x_full.square().mean(-1, keepdim=True) + eps)).type_as(x)


# -----------------------------------------------------------------------------
# complex building blocks: a complex tensor z is the pair (re, im)

Complex = tuple[Tensor, Tensor]


def complex_linear(z: Complex, weight: Tensor, bias: Tensor) -> Complex:
    """z @ W + b for every block by itself (block-diagonal weights).

    z: two of (num_blocks, n, in); weight: (num_blocks, in, 2 * out), the columns of Re W, then those of Im W;
    bias: (num_blocks, 2 * out) likewise. Returns two of (num_blocks, n, out).
    """
    (re_re, re_im), (im_re, im_im) = ((part @ weight).chunk(2, -1) for part in z)
    bias_re, bias_im = bias.unsqueeze(1).chunk(2, -1)
    return re_re - im_im + bias_re, re_im + im_re + bias_im


def complex_relu(z: Complex) -> Complex:
    """ReLU on the real and on the imaginary part, as in AFNO."""
    return F.relu(z[0]), F.relu(z[1])


def complex_soft_shrink(z: Complex, threshold: float) -> Complex:
    """Shorten every number by `threshold`, to zero where it was shorter: z * max(0, 1 - threshold / |z|).

    On the modulus, not on each part: so a delay, which only turns phases, never changes what is dropped.
    """
    floor = max(threshold**2, 1e-30)  # clamp keeps the gradient of 1/|z| finite where |z| <= threshold
    scale = F.relu(1 - threshold * torch.rsqrt((z[0] ** 2 + z[1] ** 2).clamp(min=floor)))
    return z[0] * scale, z[1] * scale


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
    changes sign; `causal_conv` uses only outputs that nothing wraps into.
    Returns forward (2 * block, 2 * block) with rows (w, re/im) interleaved, and inverse (block, 2 * block),
    which yields the second half of the points only.
    """
    time = torch.arange(2 * block, device=like.device)
    odd = 2 * torch.arange(block, device=like.device) + 1
    # integers first: the phase is exact modulo one turn before it becomes a float
    angle = (torch.outer(odd, time) % (4 * block)).to(like.dtype) * (math.pi / (2 * block))
    forward = torch.stack((angle.cos(), -angle.sin()), 1).view(2 * block, 2 * block)
    return forward, forward.T[block:] / block


def causal_conv(u: Tensor, taps: Tensor) -> Tensor:
    """y_t = sum over s <= t of taps[t - s] * u_s, and bitwise causal: y_t is computed from u_0 ... u_t alone.

    u: (B, T, C); taps: (G, K), lags 0 ... K - 1 in tokens, filter g serving channels g C/G ... (g + 1) C/G - 1.
    Any T and any K. Returns (B, T, C) in u's dtype (in autocast's, under autocast; taps keep theirs until the
    last product). All work is in matrix products: about 5 b + 4 T/b multiply-adds a token and channel, with
    b = 64 up to T = 2048 and T / 32 beyond, so this plain path is far below attention's but not yet near-linear.

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
    with torch.autocast(u.device.type, enabled=False):  # filters stay in fp32 until they are used
        taps = F.pad(taps, (0, max(0, n * b - taps.size(1))))[:, : n * b]
        near = toeplitz(taps[:, :b])  # (G, b, b)
        if n > 1:
            forward, inverse = odd_dft(b, taps)
            response = F.pad(taps.unfold(-1, 2 * b, b) @ forward.T, (0, 0, 1, 0))  # (G, n, 2b); block lag 0 is near
            re, im = toeplitz(response.mT).view(G, b, 2, n, n).unbind(2)
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


class ShortConv(nn.Module):
    """Causal convolution of a few taps for every channel by itself, (B, T, C) to the same; begins as the identity."""

    def __init__(self, channels: int, length: int = 4):
        super().__init__()
        self.taps = nn.Parameter(torch.zeros(length, channels))
        nn.init.ones_(self.taps[0])

    def forward(self, x: Tensor) -> Tensor:
        length, T = self.taps.size(0), x.size(1)
        padded, taps = F.pad(x, (0, 0, length - 1, 0)), self.taps.to(x.dtype)
        return sum(taps[lag] * padded[:, length - 1 - lag : length - 1 - lag + T] for lag in range(length))


# -----------------------------------------------------------------------------
# the mixer


class AFNO1D(nn.Module):
    """Causal AFNO token mixer, filter form: (B, T, hidden_size) to the same, any T.

        value, gate = short_conv(W_in x)
        y   = taps * value + direct value          (* is a causal convolution)
        out = W_out( silu(gate) * rmsnorm(y) )

    The taps come from AFNO's own pieces, applied to the operator's spectrum on a fixed grid of 2 x filter_length
    points: frequency features (the responses exp(-i w d) of the delays d = 0 ... 32) -> in each of num_blocks
    blocks a two-layer complex MLP with ComplexReLU -> complex soft-shrink -> inverse transform, lags >= 0 kept
    -> decay window exp(-t / tau). The grid and tau, in tokens, are fixed at construction, so the same taps serve
    every T, also beyond filter_length (lags from filter_length on are zero).

    Args:
        hidden_size: channels C.
        num_blocks: separate MLPs; each yields the filters of its C / num_blocks channels. Divides hidden_size.
        sparsity_threshold: lambda of the soft-shrink, in units of the response's gain; >= 0.
        hard_thresholding_fraction: share of the modes, lowest frequencies first, that may be non-zero; in (0, 1].
            Modes are dropped before the response is made one-sided, so causality is untouched.
        filter_length: number of taps, in tokens; >= 1.
    Raises ValueError naming the argument and its allowed range.
    """

    channels_per_filter = 16  # at most; 48 filters at 768 channels
    mlp_width = 64

    def __init__(self, hidden_size: int, num_blocks: int = 8, sparsity_threshold: float = 0.01,
                 hard_thresholding_fraction: float = 1.0, filter_length: int = 1024):
        super().__init__()
        if not 1 <= num_blocks <= hidden_size or hidden_size % num_blocks:
            raise ValueError(f"num_blocks must divide hidden_size={hidden_size}, got {num_blocks}")
        if not sparsity_threshold >= 0:
            raise ValueError(f"sparsity_threshold must be >= 0, got {sparsity_threshold}")
        if not 0 < hard_thresholding_fraction <= 1:
            raise ValueError(f"hard_thresholding_fraction must be in (0, 1], got {hard_thresholding_fraction}")
        if not filter_length >= 1:
            raise ValueError(f"filter_length must be >= 1, got {filter_length}")
        self.sparsity_threshold = sparsity_threshold
        self.filter_length = filter_length
        self.num_modes = math.ceil(hard_thresholding_fraction * (filter_length + 1))  # of filter_length + 1 bins
        self.num_delays = min(33, filter_length)

        block_size = hidden_size // num_blocks
        width = max(d for d in range(1, self.channels_per_filter + 1) if block_size % d == 0)
        filters_per_block, hidden = block_size // width, self.mlp_width
        self.num_filters = num_blocks * filters_per_block

        self.c_in = nn.Linear(hidden_size, 2 * hidden_size, bias=False)  # value | gate
        self.short_conv = ShortConv(2 * hidden_size)
        # At initialisation the response has a mean square gain of about 1, so its one-sided half adds about
        # half as much energy to y as the direct term.
        self.w1 = nn.Parameter(torch.randn(num_blocks, self.num_delays, 2 * hidden) * self.num_delays**-0.5)
        self.b1 = nn.Parameter(torch.zeros(num_blocks, 2 * hidden))
        self.w2 = nn.Parameter(torch.randn(num_blocks, hidden, 2 * filters_per_block) * (2 * hidden) ** -0.5)
        self.b2 = nn.Parameter(torch.zeros(num_blocks, 2 * filters_per_block))
        self.direct = nn.Parameter(torch.ones(hidden_size))
        self.c_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def taps(self) -> Tensor:
        """The filters, (num_filters, filter_length), in the parameters' dtype whatever autocast says."""
        like = self.w1
        with torch.autocast(like.device.type, enabled=False):
            time = torch.arange(self.filter_length, device=like.device)
            mode = torch.arange(self.num_modes, device=like.device)
            turns = torch.outer(mode, time[: self.num_delays]) % (2 * self.filter_length)  # exact before it is a float
            angle = turns.to(like.dtype) * (math.pi / self.filter_length)
            z = complex_linear((angle.cos(), -angle.sin()), self.w1, self.b1)
            z = complex_linear(complex_relu(z), self.w2, self.b2)
            z = complex_soft_shrink(z, self.sparsity_threshold)
            re, im = (part.mT.reshape(self.num_filters, self.num_modes) for part in z)
            kernel = torch.fft.irfft(torch.complex(re, im), n=2 * self.filter_length)  # missing modes count as zero
            # time constants log-spaced from 2 tokens to half the filter
            span = torch.linspace(0, 1, self.num_filters, device=like.device, dtype=like.dtype)
            tau = 2 * (max(self.filter_length / 2, 2) / 2) ** span
            return kernel[:, : self.filter_length] * torch.exp(-time / tau[:, None])

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.short_conv(self.c_in(x)).chunk(2, -1)
        y = causal_conv(value, self.taps()) + self.direct.to(value.dtype) * value
        return self.c_proj(F.silu(gate) * rmsnorm(y))
