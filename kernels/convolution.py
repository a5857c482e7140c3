"""Convolve causally in Triton, forward and backward: with long filters, and with a few taps.

`causal_conv(u, taps)` makes one filter's taps serve its W channels, by matrix products alone.
`short_conv` has a few taps for every channel by itself. This file needs Triton; afno.py computes
the same sums without.

A filter takes one of two ways (is_short). Short filters are made of Toeplitz tiles alone. A tile of
taps multiplies a block of NEAR = 128 tokens. There is one for every pair of blocks that the taps
reach. Here K = 2 NEAR + 1:

             x[0]   x[1]   x[2]   x[3]      l is a tile's lag, in blocks. Entry (p, q) of tile l is
      y[0]   l=0     0      0      0        taps[l NEAR + p - q]: p is a token of y's block, q of
      y[1]   l=1    l=0     0      0        x's. Tile 0 is lower triangular, with exact zeros above
      y[2]   l=2    l=1    l=0     0        its diagonal, so a token reads no later one.
      y[3]    0     l=2    l=1    l=0

Long filters have blocks of FAR = 256 tokens. A Toeplitz matrix serves a block's own lags.
Completed blocks are transformed one by one, mixed frequency by frequency, and transformed back.
This is overlap-save, uniformly partitioned (Stockham, 1966). A block is zero-padded to 2 FAR points
and transformed at the odd frequencies (blocks.odd_dft), to S[w] for w < FAR. One matrix H of half
the size does it, for even and odd tokens apart:

      tokens 0, 2, 4 ...  -- H -->  E[w]      S[w]           = E[w] + turn O[w]
      tokens 1, 3, 5 ...  -- H -->  O[w]      S[FAR - 1 - w] = conj(E[w] - turn O[w])
                                              turn = exp(-i pi (w + 1/2) / FAR), w < FAR / 2

The kernels that mix do this last step, in fp32. Memory holds E and O, (G, 2, FAR, columns), rows
(w, re/im). The way back is the transform's transpose. An inverse transform has another phase
between its two halves. That phase is part of the response (causal_conv).

The right-hand sides of all products are columns: one channel of a filter in one block of one row
(of B). The entries of a column are the block's tokens. Columns are numbered as follows, for
G filters and C = G W channels:

      n         0 ... W-1   W ... 2W-1   ...   (B-1)W ... BW-1   BW ... BW+W-1   ...
      channel   0 ... W-1   0 ... W-1    ...     0    ...  W-1    0 ... W-1          n % W
      row           0           1        ...        B-1               0              n // W % B
      block         0           0        ...         0                1              n // W // B

The kernels are bitwise causal for finite inputs. An output sums products of its own block and of
earlier ones. The matrices for its own block hold exact zeros above the diagonal. Where blocks are
mixed, so do those for its own tile of blocks. This holds among inputs of one length: another T may
make the sums in another order.

Operands have the input's dtype, and sums are in fp32. There are no atomics: equal inputs give equal
bits. Only the inputs are kept for the backward pass; spectra are computed again.
"""
import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels import operator, save_inputs
from kernels.blocks import odd_dft, segment_responses
from kernels.compiled import jit

NEAR, FAR = 128, 256  # tokens in a block for short and for long filters; FAR = 2 NEAR
# A filter is short where Toeplitz tiles take at most so many multiply-adds: all filters of up to
# 2048 taps, longer ones in short rows, and all up to T = 4224. A long one takes 6 NEAR and more,
# and more traffic.
DIRECT = 2048 + NEAR

# Columns BN and depth BK of the products, and how they are launched: where a block may have 163 KB
# of shared memory (A100, H100, H200), and where it may have 99 KB (RTX 3090, 4090). BN / NEAR is
# also how many lags tiles_gradient_kernel makes at once.
LARGE = dict(BN=256, BK=64, num_warps=8, num_stages=3)
SMALL = dict(BN=128, BK=64, num_warps=4, num_stages=2)


def tile_shapes(device: torch.device) -> dict:
    """Return the launch parameters BN, BK and so on for this device."""
    if device.type == "cpu":  # Triton's interpreter
        shapes = dict(BN=64, BK=32)
    else:
        properties = torch.cuda.get_device_properties(device)
        shapes = LARGE if properties.shared_memory_per_block_optin > 160 * 1024 else SMALL
    return dict(shapes, BK=min(NEAR, shapes["BK"]))


class Sizes:
    """Hold what launches share for u (B, T, C), G filters and blocks of `size` tokens."""

    def __init__(self, u: Tensor, G: int, size: int):
        self.B, self.T, C = u.shape
        self.G, self.W = G, C // G
        self.width = self.B * self.W  # columns of a block
        self.blocks = triton.cdiv(self.T, size)
        self.columns = self.blocks * self.width


def last_dimension_dense(x: Tensor) -> Tensor:
    """Return x, or a copy where neighbouring channels are not neighbours in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


# -----------------------------------------------------------------------------
# Toeplitz matrices of taps


@jit
def toeplitz_kernel(taps_ptr, out_ptr, K, tile_step, row_step, sign, ROWS: tl.constexpr,
                    COLUMNS: tl.constexpr, BP: tl.constexpr):
    """Write out[g, i, p, q] = taps[g, sign (i tile_step + p row_step - q)].

    It is zero where there is no such tap. taps: (G, K) in fp32; out: (G, tiles, ROWS, COLUMNS).
    """
    first, g = tl.program_id(0) * BP, tl.program_id(1)
    p, q = first + tl.arange(0, BP), tl.arange(0, COLUMNS)  # rows of all tiles, numbered on
    lag = sign * ((p // ROWS * tile_step + p % ROWS * row_step)[:, None] - q[None, :])
    taps = tl.load(taps_ptr + g * K + lag, mask=(lag >= 0) & (lag < K), other=0.0)
    out_ptr += g.to(tl.int64) * tl.num_programs(0) * BP * COLUMNS
    out = out_ptr + p[:, None] * COLUMNS + q[None, :]
    tl.store(out, taps.to(out_ptr.dtype.element_ty))


def toeplitz(taps: Tensor, tiles: int, shape: tuple[int, int], tile_step: int, row_step: int,
             sign: int, dtype: torch.dtype) -> Tensor:
    """Return the Toeplitz matrices (G, tiles, *shape) of taps (G, K): see toeplitz_kernel."""
    out, BP = taps.new_empty(len(taps), tiles, *shape, dtype=dtype), min(16, shape[0])
    toeplitz_kernel[tiles * shape[0] // BP, len(taps)](
        taps.contiguous(), out, taps.size(1), tile_step, row_step, sign, ROWS=shape[0],
        COLUMNS=shape[1], BP=BP)
    return out


# -----------------------------------------------------------------------------
# short filters: Toeplitz tiles alone


def count_lags(blocks: int, K: int) -> int:
    """Return how many tiles K taps make, one for every lag of blocks, at most `blocks`.

    The last tap reaches into the tile after its own.
    """
    return min(blocks, -(-(K - 1) // NEAR) + 1)


def multiply_adds(T: int, K: int) -> float:
    """Return the multiply-adds of a token and channel by Toeplitz tiles, about K - K^2 / (2 T).

    It is NEAR for every lag at which the token's block has a partner, in the mean of the row's
    blocks. The first blocks have fewer partners.
    """
    blocks = -(-T // NEAR)
    lags = count_lags(blocks, K)
    return NEAR * (lags - lags * (lags - 1) / (2 * blocks))


def is_short(T: int, K: int) -> bool:
    """Return whether a filter of K taps on rows of T tokens is made of Toeplitz tiles alone."""
    return multiply_adds(T, K) <= DIRECT


@jit
def short_kernel(x_ptr, tiles_ptr, y_ptr, B, T, stride_b, stride_t, num_blocks, num_lags, columns,
                 W: tl.constexpr, NEAR: tl.constexpr, TRANSPOSED: tl.constexpr, BN: tl.constexpr,
                 BK: tl.constexpr):
    """Write y[i] = sum over lags l of tiles[g, l] @ x[i - l], for every block i.

    With TRANSPOSED the sum is of tiles[g, l] @ x[i + l]. x: (B, T, C), strided; tiles: (G,
    num_lags, NEAR, NEAR); y: (B, T, C).
    """
    first, g = tl.program_id(0), tl.program_id(1)
    if not TRANSPOSED:
        first = tl.num_programs(0) - 1 - first  # programs with the most lags first
    n = first * BN + tl.arange(0, BN)
    inside = n < columns
    row, channel, i = n // W % B, g * W + n % W, n // W // B
    x_start = x_ptr + row.to(tl.int64) * stride_b + channel
    p, k = tl.arange(0, NEAR), tl.arange(0, BK)
    if TRANSPOSED:
        reach = num_blocks - 1 - i  # lags that the block has partners at
        lags = tl.minimum(num_lags, num_blocks - first * BN // W // B)
    else:
        reach = i
        lags = tl.minimum(num_lags, (first * BN + BN - 1) // W // B + 1)
    acc = tl.zeros((NEAR, BN), tl.float32)
    for step in range(lags * (NEAR // BK)):
        lag, k0 = step // (NEAR // BK), step % (NEAR // BK) * BK
        tile = tiles_ptr + (g * num_lags + lag) * NEAR * NEAR
        h = tl.load(tile + p[:, None] * NEAR + (k0 + k)[None, :])
        j = i + lag if TRANSPOSED else i - lag
        t = (j * NEAR)[None, :] + (k0 + k)[:, None]
        wanted = (inside & (lag <= reach))[None, :] & (t < T)
        x = tl.load(x_start[None, :] + t * stride_t, mask=wanted, other=0.0)
        acc = tl.dot(h, x, acc, input_precision="ieee")
    C = tl.num_programs(1) * W
    t = (i * NEAR)[None, :] + p[:, None]
    y_start = y_ptr + row.to(tl.int64) * T * C + channel
    inside = inside[None, :] & (t < T)
    tl.store(y_start[None, :] + t * C, acc.to(y_ptr.dtype.element_ty), mask=inside)


def short_filter_conv(x: Tensor, taps: Tensor, transposed: bool) -> Tensor:
    """Return x (B, T, C) convolved with short filters, taps (G, K).

    With transposed, x is the output's gradient, and the input's is returned.
    """
    s, y, shapes = Sizes(x, len(taps), NEAR), x.new_empty(x.shape), tile_shapes(x.device)
    num_lags = count_lags(s.blocks, taps.size(1))
    sign = -1 if transposed else 1  # lags l NEAR +- (p - q)
    tiles = toeplitz(taps, num_lags, (NEAR, NEAR), sign * NEAR, 1, sign, x.dtype)
    short_kernel[triton.cdiv(s.columns, shapes["BN"]), s.G](
        x, tiles, y, s.B, s.T, *x.stride()[:2], s.blocks, num_lags, s.columns,
        W=s.W, NEAR=NEAR, TRANSPOSED=transposed, **shapes)
    return y


# -----------------------------------------------------------------------------
# long filters: blocks are transformed, mixed, and transformed back


@functools.cache
def half_transform(device: torch.device, dtype: torch.dtype, size: int) -> Tensor:
    """Return H (size, size / 2), rows (w, re/im): exp(-2 pi i (w + 1/2) t / size).

    It is made in fp32 and once for all layers.
    """
    forward, _ = odd_dft(size // 2, torch.empty(0, device=device, dtype=torch.float32))
    return forward[:, : size // 2].to(dtype).contiguous()


@jit
def transform_kernel(x_ptr, half_ptr, out_ptr, B, T, stride_b, stride_t, columns, W: tl.constexpr,
                     FAR: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Write E and O: out[g, parity, :, n] = half @ the tokens of that parity of column n.

    x: (B, T, C), strided; half: (FAR, FAR/2) = H; out: (G, 2, FAR, columns). A program makes half
    of the rows.
    """
    NEAR: tl.constexpr = FAR // 2
    parity = tl.program_id(0) // 2
    m = tl.program_id(0) % 2 * NEAR + tl.arange(0, NEAR)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    g = tl.program_id(2)
    inside, k = n < columns, tl.arange(0, BK)
    x_start = x_ptr + (n // W % B).to(tl.int64) * stride_b + g * W + n % W
    acc = tl.zeros((NEAR, BN), tl.float32)
    for k0 in range(0, NEAR, BK):
        h = tl.load(half_ptr + m[:, None] * NEAR + (k0 + k)[None, :])
        t = (n // W // B * FAR + parity)[None, :] + 2 * (k0 + k)[:, None]
        x = tl.load(x_start[None, :] + t * stride_t, mask=inside[None, :] & (t < T), other=0.0)
        acc = tl.dot(h, x, acc, input_precision="ieee")
    line = ((g * 2 + parity) * FAR + m).to(tl.int64) * columns
    out = out_ptr + line[:, None] + n[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside[None, :])


def transform(x: Tensor, half: Tensor, s: Sizes) -> Tensor:
    """Return E and O of all blocks of FAR tokens of x, (G, 2, FAR, columns)."""
    out, shapes = x.new_empty(s.G, 2, FAR, s.columns), tile_shapes(x.device)
    transform_kernel[4, triton.cdiv(s.columns, shapes["BN"]), s.G](
        x, half, out, s.B, s.T, *x.stride()[:2], s.columns, W=s.W, FAR=FAR, **shapes)
    return out


@jit
def load_pair(place, odd, size, cos, sin, mask):
    """Return S[w] and S[FAR - 1 - w], (re, im) each.

    They are made of E[w] at `place` and O[w] at `place + odd`. An imaginary part is `size` after
    its real part. cos and sin are those of pi (w + 1/2) / FAR.
    """
    dtype = place.dtype.element_ty
    e_re = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    e_im = tl.load(place + size, mask=mask, other=0.0).to(tl.float32)
    o_re = tl.load(place + odd, mask=mask, other=0.0).to(tl.float32)
    o_im = tl.load(place + odd + size, mask=mask, other=0.0).to(tl.float32)
    re, im = cos * o_re + sin * o_im, cos * o_im - sin * o_re
    s_re, s_im, s2_re, s2_im = e_re + re, e_im + im, e_re - re, im - e_im
    return s_re.to(dtype), s_im.to(dtype), s2_re.to(dtype), s2_im.to(dtype)


@jit
def load_response(response_ptr, line, blocks, lag, TRANSPOSED: tl.constexpr, dtype: tl.constexpr):
    """Return a frequency's response at `lag`, (re, im), as a Toeplitz tile.

    It is zero but for lags 1 ... blocks - 1. With TRANSPOSED it is conjugated.
    """
    wanted = (lag > 0) & (lag < blocks)
    re = tl.load(response_ptr + line * blocks + lag, mask=wanted, other=0.0).to(dtype)
    im = tl.load(response_ptr + line * blocks + blocks + lag, mask=wanted, other=0.0).to(dtype)
    return re, -im if TRANSPOSED else im


@jit
def add_product(re, im, h_re, h_im, x_re, x_im):
    """Return (re, im) + h @ x, a complex product."""
    re = tl.dot(h_re, x_re, tl.dot(-h_im, x_im, re, input_precision="ieee"), input_precision="ieee")
    im = tl.dot(h_re, x_im, tl.dot(h_im, x_re, im, input_precision="ieee"), input_precision="ieee")
    return re, im


# Blocks in a Toeplitz tile of mix_kernel, and columns at most: four fp32 sums of BI x BN. Larger
# tiles waste less above the diagonal's place and are slower all the same.
MIX = dict(BI=16, BN=128)


@jit
def mix_kernel(x_ptr, response_ptr, out_ptr, B, blocks, columns, padded_columns, W: tl.constexpr,
               FAR: tl.constexpr, TRANSPOSED: tl.constexpr, BI: tl.constexpr, BN: tl.constexpr):
    """Write, at every frequency, M[i] = sum over blocks j < i of response[i - j] * S[j].

    With TRANSPOSED the sum is over j > i of conj(response[j - i]) * S[j]. x: S as E and O;
    response: (G, FAR, 2, blocks). out is laid out as x and holds M folded for the way back: H.T @
    out[g, parity] are the tokens of that parity of F.T @ M. F is the whole transform.

    A program does the frequencies w and FAR - 1 - w, in Toeplitz tiles of BI blocks. Its column n
    is column n % (B W) of the blocks from n // (B W) BI on. So one tile serves all blocks at once.
    """
    w, g, first = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    angle = (w + 0.5) * (3.141592653589793 / FAR)
    cos, sin = tl.cos(angle), tl.sin(angle)
    width = B * W
    line = ((g * FAR + w) * 2).to(tl.int64)  # of the response at w, and at FAR - 1 - w
    opposite = ((g * FAR + FAR - 1 - w) * 2).to(tl.int64)
    start = (g * 2 * FAR + 2 * w).to(tl.int64) * columns
    odd = columns * FAR
    n, p = first * BN + tl.arange(0, BN), tl.arange(0, BI)
    i = (n // width * BI)[None, :] + p[:, None]
    re, im = tl.zeros((BI, BN), tl.float32), tl.zeros((BI, BN), tl.float32)
    re2, im2 = tl.zeros((BI, BN), tl.float32), tl.zeros((BI, BN), tl.float32)
    if TRANSPOSED:
        lags = tl.cdiv(blocks, BI) - first * BN // width
    else:
        lags = tl.minimum((first * BN + BN - 1) // width + 1, tl.cdiv(blocks, BI))
    dtype = x_ptr.dtype.element_ty
    for step in range(lags):
        if TRANSPOSED:
            j = i + step * BI
            lag = step * BI + p[None, :] - p[:, None]
        else:
            j = i - step * BI
            lag = step * BI + p[:, None] - p[None, :]
        inside = (j >= 0) & (j < blocks) & (n < padded_columns)[None, :]
        place = x_ptr + start + j * width + (n % width)[None, :]
        s_re, s_im, s2_re, s2_im = load_pair(place, odd, columns, cos, sin, inside)
        h_re, h_im = load_response(response_ptr, line, blocks, lag, TRANSPOSED, dtype)
        re, im = add_product(re, im, h_re, h_im, s_re, s_im)
        h_re, h_im = load_response(response_ptr, opposite, blocks, lag, TRANSPOSED, dtype)
        re2, im2 = add_product(re2, im2, h_re, h_im, s2_re, s2_im)
    inside = (i < blocks) & (n < padded_columns)[None, :]
    place = out_ptr + start + i * width + (n % width)[None, :]
    tl.store(place, (re + re2).to(dtype), mask=inside)
    tl.store(place + columns, (im - im2).to(dtype), mask=inside)
    tl.store(place + odd, ((re - re2) * cos - (im + im2) * sin).to(dtype), mask=inside)
    tl.store(place + odd + columns, ((re - re2) * sin + (im + im2) * cos).to(dtype), mask=inside)


def mix(x: Tensor, response: Tensor, s: Sizes, transposed: bool) -> Tensor:
    """Return x mixed by mix_kernel, both (G, 2, FAR, columns); response: (G, 2 FAR, blocks)."""
    out, BI = torch.empty_like(x), MIX["BI"]
    padded_columns = triton.cdiv(s.blocks, BI) * s.width
    BN = min(MIX["BN"], max(16, triton.next_power_of_2(padded_columns)))
    mix_kernel[FAR // 2, s.G, triton.cdiv(padded_columns, BN)](
        x, response, out, s.B, s.blocks, s.columns, padded_columns, W=s.W, FAR=FAR,
        TRANSPOSED=transposed, BI=BI, BN=BN)
    return out


@jit
def long_kernel(x_ptr, near_ptr, mixed_ptr, half_ptr, y_ptr, B, T, stride_b, stride_t, columns,
                W: tl.constexpr, FAR: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Write the tokens of one parity of y: near[g, parity] @ x + half.T @ mixed[g, parity].

    x and mixed are those of the same block. x: (B, T, C), strided; near: (G, 2, FAR/2, FAR); mixed:
    (G, 2, FAR, columns); half: (FAR, FAR/2) = H; y: (B, T, C).
    """
    NEAR: tl.constexpr = FAR // 2
    g, parity = tl.program_id(1), tl.program_id(2)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = n < columns
    row, channel, begin = n // W % B, g * W + n % W, n // W // B * FAR
    x_start = x_ptr + row.to(tl.int64) * stride_b + channel
    p, k = tl.arange(0, NEAR), tl.arange(0, BK)
    acc = tl.zeros((NEAR, BN), tl.float32)
    for k0 in range(0, FAR, BK):
        near = near_ptr + (g * 2 + parity) * NEAR * FAR
        h = tl.load(near + p[:, None] * FAR + (k0 + k)[None, :])
        t = begin[None, :] + (k0 + k)[:, None]
        x = tl.load(x_start[None, :] + t * stride_t, mask=inside[None, :] & (t < T), other=0.0)
        acc = tl.dot(h, x, acc, input_precision="ieee")
    for k0 in range(0, FAR, BK):
        h = tl.load(half_ptr + (k0 + k)[None, :] * NEAR + p[:, None])
        line = ((g * 2 + parity) * FAR + k0 + k).to(tl.int64) * columns
        x = tl.load(mixed_ptr + line[:, None] + n[None, :], mask=inside[None, :], other=0.0)
        acc = tl.dot(h, x, acc, input_precision="ieee")
    C = tl.num_programs(1) * W
    t = begin[None, :] + 2 * p[:, None] + parity
    y_start = y_ptr + row.to(tl.int64) * T * C + channel
    inside = inside[None, :] & (t < T)
    tl.store(y_start[None, :] + t * C, acc.to(y_ptr.dtype.element_ty), mask=inside)


def long_filter_conv(x: Tensor, taps: Tensor, mixed: Tensor, half: Tensor, s: Sizes,
                     transposed: bool) -> Tensor:
    """Return y (B, T, C): what a block's own tokens send, plus what `mixed` brings it.

    x: (B, T, C); taps: (G, FAR or fewer); mixed: (G, 2, FAR, columns); half: H. With transposed, x
    is the output's gradient, and y is the input's.
    """
    sign = -1 if transposed else 1  # lags +-(2 p + parity - q)
    near = toeplitz(taps, 2, (FAR // 2, FAR), 1, 2, sign, x.dtype)
    y, shapes = x.new_empty(x.shape), tile_shapes(x.device)
    long_kernel[triton.cdiv(s.columns, shapes["BN"]), s.G, 2](
        x, near, mixed, half, y, s.B, s.T, *x.stride()[:2], s.columns, W=s.W, FAR=FAR, **shapes)
    return y


# -----------------------------------------------------------------------------
# gradients of taps and responses: first of their Toeplitz tiles, then folded along the diagonals


# About how many programs make gradients of taps: two a multiprocessor of an H100, each leaves a
# tile
PROGRAMS = 256


@jit
def tiles_gradient_kernel(u_ptr, dy_ptr, out_ptr, B, T, u_stride_b, u_stride_t, dy_stride_b,
                          dy_stride_t, num_lags, units, together, units_each, W: tl.constexpr,
                          NEAR: tl.constexpr, LAGS: tl.constexpr, BK: tl.constexpr):
    """Write out[g, l, split] = sum of dy[i] @ u[i - l].T over the split's units.

    A unit is a block i of a row. A split has units_each units. A unit's blocks i - l and i are
    among the same `together` blocks. u, dy: (B, T, C), strided; out: (G, num_lags, splits, NEAR,
    NEAR) in fp32. A program makes LAGS lags at once, of the units that the first of them has. A
    split without units leaves its tiles as they were; fold_kernel does not read them.
    """
    split, lag, g = tl.program_id(0), tl.program_id(1) * LAGS, tl.program_id(2)
    p, q, k = tl.arange(0, NEAR), tl.arange(0, LAGS * NEAR), tl.arange(0, BK)
    lag_of = lag + LAGS - 1 - q // NEAR  # the farthest block comes first
    each = together - lag  # blocks i of those together that have a block i - lag
    last = tl.minimum((split + 1) * units_each, units * each) * W
    if split * units_each * W < last:
        acc = tl.zeros((NEAR, LAGS * NEAR), tl.float32)
        for n0 in range(split * units_each * W, last, BK):
            n = n0 + k
            block = n // W // B
            place = lag + block % each  # of block i among those together
            i = block // each * together + place
            row, channel = (n // W % B).to(tl.int64), g * W + n % W
            t = (i * NEAR)[None, :] + p[:, None]
            dy = tl.load(dy_ptr + (row * dy_stride_b + channel)[None, :] + t * dy_stride_t,
                         mask=(n < last)[None, :] & (t < T), other=0.0)
            s = ((i - lag - LAGS + 1) * NEAR)[:, None] + q[None, :]
            there = (n < last)[:, None] & (s < T) & (lag_of[None, :] <= place[:, None])
            u = tl.load(u_ptr + (row * u_stride_b + channel)[:, None] + s * u_stride_t, mask=there,
                        other=0.0)
            acc = tl.dot(dy, u, acc, input_precision="ieee")
        tile = ((g * num_lags + lag_of) * tl.num_programs(0) + split).to(tl.int64) * NEAR * NEAR
        out = out_ptr + tile[None, :] + p[:, None] * NEAR + (q % NEAR)[None, :]
        tl.store(out, acc, mask=(lag_of < num_lags)[None, :])


# BI: BK at most, of response_gradient_kernel, which has four fp32 sums of BI x BI
RESPONSE = {16: 64, 32: 32, 64: 32}


@jit
def response_gradient_kernel(x_ptr, dm_ptr, out_ptr, B, blocks, columns, W: tl.constexpr,
                             FAR: tl.constexpr, BI: tl.constexpr, BK: tl.constexpr):
    """Write out[g, w, :, l, p, q] = sum over a and columns of dM[a BI + p] conj(S[(a - l) BI + q]).

    Those are the tiles of the gradient of mix_kernel's response. x, dm: S and dM as E and O; out:
    (G, FAR, 2, lags, BI, BI) in fp32.
    """
    w, g, lag = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    angle = (w + 0.5) * (3.141592653589793 / FAR)
    cos, sin = tl.cos(angle), tl.sin(angle)
    lags, width = tl.num_programs(2), B * W
    start = (g * 2 * FAR + 2 * w).to(tl.int64) * columns
    odd = columns * FAR
    p, k = tl.arange(0, BI), tl.arange(0, BK)
    re, im = tl.zeros((BI, BI), tl.float32), tl.zeros((BI, BI), tl.float32)
    re2, im2 = tl.zeros((BI, BI), tl.float32), tl.zeros((BI, BI), tl.float32)
    for n0 in range(0, (lags - lag) * width, BK):
        n = n0 + k
        j = n // width * BI
        i, inside = j + lag * BI, n < (lags - lag) * width
        wanted = inside[None, :] & (i[None, :] + p[:, None] < blocks)
        place = dm_ptr + start + (i * width + n % width)[None, :] + p[:, None] * width
        d_re, d_im, d2_re, d2_im = load_pair(place, odd, columns, cos, sin, wanted)
        wanted = inside[:, None] & (j[:, None] + p[None, :] < blocks)
        place = x_ptr + start + (j * width + n % width)[:, None] + p[None, :] * width
        s_re, s_im, s2_re, s2_im = load_pair(place, odd, columns, cos, sin, wanted)
        re, im = add_product(re, im, d_re, d_im, s_re, -s_im)
        re2, im2 = add_product(re2, im2, d2_re, d2_im, s2_re, -s2_im)
    tile = ((g * FAR + w) * 2 * lags + lag).to(tl.int64) * BI * BI
    out = out_ptr + tile + p[:, None] * BI + p[None, :]
    tl.store(out, re)
    tl.store(out + lags * BI * BI, im)
    tile = ((g * FAR + FAR - 1 - w) * 2 * lags + lag).to(tl.int64) * BI * BI
    out = out_ptr + tile + p[:, None] * BI + p[None, :]
    tl.store(out, re2)
    tl.store(out + lags * BI * BI, im2)


@jit
def fold_kernel(tiles_ptr, out_ptr, splits, units, together, units_each, LAGS: tl.constexpr,
                SIZE: tl.constexpr, BP: tl.constexpr):
    """Write the gradient of taps from that of their Toeplitz tiles, split by split.

    out[g, split, l SIZE + d] is the sum of all entries (p, q) of tile l with p - q = d, and of tile
    l + 1 with p - q = d - SIZE:

                   q ->                        q ->
              p    0  .  .  .             p    .  1  2  3      the number is d, for SIZE = 4
                   1  0  .  .                  .  .  1  2
                   2  1  0  .                  .  .  .  1
                   3  2  1  0                  .  .  .  .
                   tile l                      tile l + 1

    tiles: (G, lags, splits, SIZE, SIZE); out: (G, splits, lags SIZE). Only those splits are read
    that tiles_gradient_kernel makes.
    """
    # g first: the other two numbers of programs end at 65,535
    g, lag, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    lags = tl.num_programs(1)
    d, q = tl.arange(0, SIZE), tl.arange(0, BP)
    made = tl.cdiv(units * (together - lag // LAGS * LAGS), units_each)
    made_after = tl.cdiv(units * (together - (lag + 1) // LAGS * LAGS), units_each)
    acc = tl.zeros((BP, SIZE), tl.float32)
    for first in range(0, SIZE, BP):
        p = first + q
        q_of = p[:, None] - d[None, :]
        after = (q_of < 0).to(tl.int32)
        there = (lag + after < lags) & (split < tl.where(after == 1, made_after, made))
        tile = ((g * lags + lag + after) * splits + split).to(tl.int64) * SIZE * SIZE
        place = tiles_ptr + tile + p[:, None] * SIZE + q_of + after * SIZE
        acc += tl.load(place, mask=there, other=0.0)
    tl.store(out_ptr + ((g * splits + split) * lags + lag) * SIZE + d, tl.sum(acc, 0))


def fold(tiles: Tensor, units: int, together: int, units_each: int, lags_at_once: int) -> Tensor:
    """Return tiles (N, lags, splits, SIZE, SIZE) summed by diagonals and splits, (N, lags SIZE)."""
    N, lags, splits, SIZE, _ = tiles.shape
    out = tiles.new_empty(N, splits, lags * SIZE)
    fold_kernel[N, lags, splits](
        tiles, out, splits, units, together, units_each, LAGS=lags_at_once, SIZE=SIZE,
        BP=min(SIZE, 32))
    return out.sum(1)


def taps_gradient(u: Tensor, dy: Tensor, G: int, K: int, together: int | None = None) -> Tensor:
    """Return the gradient of taps (G, K), in fp32; u, dy: (B, T, C).

    It is that of all pairs of tokens, or of those in the same `together` blocks of NEAR.
    """
    s = Sizes(u, G, NEAR)
    num_lags = count_lags(s.blocks, K)
    together = together or s.blocks
    units = triton.cdiv(s.blocks, together) * s.B
    shapes = tile_shapes(u.device)
    wide = shapes.pop("BN") // NEAR
    lags_at_once = wide if wide > 1 and together > 2 else 1
    pairs = sum(together - lag for lag in range(0, num_lags, lags_at_once))
    units_each = triton.cdiv(G * units * pairs, PROGRAMS)
    splits = triton.cdiv(units * together, units_each)
    tiles = u.new_empty(G, num_lags, splits, NEAR, NEAR, dtype=torch.float32)
    tiles_gradient_kernel[splits, triton.cdiv(num_lags, lags_at_once), G](
        u, dy, tiles, s.B, s.T, *u.stride()[:2], *dy.stride()[:2], num_lags, units, together,
        units_each, W=s.W, NEAR=NEAR, LAGS=lags_at_once, **shapes)
    taps = fold(tiles, units, together, units_each, lags_at_once)[:, :K]
    return F.pad(taps, (0, K - taps.size(1)))


def response_gradient(spectra: Tensor, dmixed: Tensor, s: Sizes) -> Tensor:
    """Return the gradient of mix's response, (G, 2 FAR, blocks), from S and dM as E and O."""
    BI = min(64, max(16, triton.next_power_of_2(s.blocks)))  # a key of RESPONSE
    lags = triton.cdiv(s.blocks, BI)
    BK = min(RESPONSE[BI], max(16, triton.next_power_of_2(lags * s.width)))
    filters = max(1, 2**25 // (2 * FAR * lags * BI * BI))  # at once: tiles of up to 128 MB
    parts = []
    for x, dm in zip(spectra.split(filters), dmixed.split(filters)):
        tiles = x.new_empty(len(x), FAR, 2, lags, BI, BI, dtype=torch.float32)
        response_gradient_kernel[FAR // 2, len(x), lags](
            x, dm, tiles, s.B, s.blocks, s.columns, W=s.W, FAR=FAR, BI=BI, BK=BK)
        tiles = tiles.flatten(0, 2).unsqueeze(2)
        parts.append(fold(tiles, 1, lags, lags, 1)[:, : s.blocks])
    return torch.cat(parts).view(s.G, 2 * FAR, s.blocks)


# -----------------------------------------------------------------------------
# the operator, opaque to torch.compile, so that a compiled model stays one graph


@operator("block_conv")
def block_conv(u: Tensor, taps: Tensor, response: Tensor | None) -> Tensor:
    """Return the causal convolution of u (B, T, C) with taps (G, K), contiguous, in u's dtype.

    Without a response all filters are short ones. With one, taps are those of lags inside a block
    of FAR tokens. response (G, 2 FAR, blocks), rows (w, re/im), is for blocks 1, 2 ... apart. A
    block x sends F.T @ (response * F @ x); F transforms x, zero-padded. u: bf16, fp16 or fp32, any
    strides; the others: fp32.
    """
    with torch.cuda.device_of(u):  # Triton launches on the current device
        u = last_dimension_dense(u)
        if response is None:
            return short_filter_conv(u, taps, transposed=False)
        s, half = Sizes(u, len(taps), FAR), half_transform(u.device, u.dtype, FAR)
        mixed = mix(transform(u, half, s), response.contiguous(), s, transposed=False)
        return long_filter_conv(u, taps, mixed, half, s, transposed=False)


@torch.library.register_fake(block_conv)
def _(u, taps, response):
    return u.new_empty(u.shape)


@operator("block_conv_backward")
def block_conv_backward(dy: Tensor, u: Tensor, taps: Tensor,
                        response: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of u, taps and response (empty where there is none)."""
    with torch.cuda.device_of(u):
        u, dy = last_dimension_dense(u), last_dimension_dense(dy)
        G, K = taps.shape
        if response is None:
            du = short_filter_conv(dy, taps, transposed=True)
            return du, taps_gradient(u, dy, G, K), taps.new_empty(0)
        s, half = Sizes(u, G, FAR), half_transform(u.device, u.dtype, FAR)
        dmixed = transform(dy, half, s)
        mixed = mix(dmixed, response.contiguous(), s, transposed=True)
        du = long_filter_conv(dy, taps, mixed, half, s, transposed=True)
        dtaps = taps_gradient(u, dy, G, K, FAR // NEAR)
        return du, dtaps, response_gradient(transform(u, half, s), dmixed, s)


@torch.library.register_fake(block_conv_backward)
def _(dy, u, taps, response):
    dresponse = taps.new_empty(0 if response is None else response.shape)
    return u.new_empty(u.shape), taps.new_empty(taps.shape), dresponse


def backward(ctx, dy):
    u, taps, response = ctx.saved_tensors
    du, dtaps, dresponse = block_conv_backward(dy, u, taps, response)
    return du, dtaps, None if response is None else dresponse


torch.library.register_autograd(block_conv, backward, setup_context=save_inputs)


def causal_conv(u: Tensor, taps: Tensor) -> Tensor:
    """Return y_t = sum over s <= t of taps[t - s] * u_s, (B, T, C) in u's dtype.

    u: (B, T, C) in half precision (fp32 is slow). taps: (G, K), used in fp32; filter g serves
    channels g C/G ... (g + 1) C/G - 1. A token and channel takes about K - K^2 / (2 T)
    multiply-adds up to DIRECT (multiply_adds). Where that would be more, it takes about
    3 FAR + 2 T / FAR.
    """
    T, b = u.size(1), FAR
    taps = taps[:, :T].float()
    if is_short(T, taps.size(1)):
        return block_conv(u, taps, None)
    # What reaches a later block is the second half of an inverse transform. Half a period on,
    # frequency w + 1/2 has turned by i (-1)^w: with that in the response, the first half, which is
    # the transpose of the forward transform, will do.
    response = segment_responses(taps, odd_dft(b, taps)[0], -(-T // b), b)
    response = response.unflatten(1, (b // 2, 2, 2))
    turned = torch.stack((-response[..., 1, :], response[..., 0, :]), 3) / b
    turned = torch.stack((turned[:, :, 0], -turned[:, :, 1]), 2).flatten(1, 3)
    return block_conv(u, taps[:, :b], turned)


# -----------------------------------------------------------------------------
# the short convolution: a few taps for every channel by itself


@jit
def depthwise_kernel(x_ptr, taps_ptr, dy_ptr, y_ptr, T, C, LENGTH: tl.constexpr,
                     TRANSPOSED: tl.constexpr, SILU: tl.constexpr, GRADIENT: tl.constexpr,
                     BT: tl.constexpr, BC: tl.constexpr):
    """Write y[t] = sum over lags l of taps[l] * x[t - l], channel by channel.

    With TRANSPOSED the sum is of taps[l] * x[t + l]. With SILU, y is SiLU of the sum. With
    GRADIENT, too, y is dy times SiLU's slope at the sum. x, dy, y: (B, T, C), contiguous; taps:
    (LENGTH, C) in fp32.
    """
    t, c = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(1) * BC + tl.arange(0, BC)
    begin = tl.program_id(2).to(tl.int64) * T * C
    inside = c < C
    acc = tl.zeros((BT, BC), tl.float32)
    for lag in tl.static_range(LENGTH):
        s = t + lag if TRANSPOSED else t - lag
        tap = tl.load(taps_ptr + lag * C + c, mask=inside, other=0.0)
        wanted = ((s >= 0) & (s < T))[:, None] & inside[None, :]
        x = tl.load(x_ptr + begin + s[:, None] * C + c[None, :], mask=wanted, other=0.0)
        acc += tap[None, :] * x.to(tl.float32)
    place, inside = begin + t[:, None] * C + c[None, :], (t < T)[:, None] & inside[None, :]
    if SILU:
        share = tl.sigmoid(acc)
        if GRADIENT:
            dy = tl.load(dy_ptr + place, mask=inside, other=0.0).to(tl.float32)
            acc = dy * share * (1 + acc * (1 - share))
        else:
            acc *= share
    tl.store(y_ptr + place, acc.to(y_ptr.dtype.element_ty), mask=inside)


@jit
def depthwise_gradient_kernel(x_ptr, dy_ptr, out_ptr, tokens, T, C, BT: tl.constexpr,
                              BC: tl.constexpr):
    """Write out[split, l] = sum of dy[t] * x[t - l] over the split's share of all B T tokens.

    x, dy: (B, T, C); out: (splits, LENGTH, C) in fp32. Programs of all lags follow each other: what
    the first one reads is in the cache for the others.
    """
    lag, c, split = tl.program_id(0), tl.program_id(1) * BC + tl.arange(0, BC), tl.program_id(2)
    inside = c < C
    acc = tl.zeros((BT, BC), tl.float32)
    for first in range(split * BT, tokens, tl.num_programs(2) * BT):
        n = first + tl.arange(0, BT)
        there = (n < tokens) & (n % T >= lag)  # x is a token of this row
        wanted = there[:, None] & inside[None, :]
        place = n.to(tl.int64)[:, None] * C + c[None, :]
        dy = tl.load(dy_ptr + place, mask=wanted, other=0.0)
        x = tl.load(x_ptr + place - lag * C, mask=wanted, other=0.0)
        acc += dy.to(tl.float32) * x.to(tl.float32)
    out = out_ptr + (split * tl.num_programs(0) + lag) * C + c
    tl.store(out, tl.sum(acc, 0), mask=inside)


def depthwise(x: Tensor, taps: Tensor, transposed: bool = False, silu: bool = False,
              dy: Tensor | None = None) -> Tensor:
    """Return depthwise_kernel's y of x (B, T, C) and taps (length, C).

    With silu and dy (B, T, C), it is the gradient of SiLU's input.
    """
    B, T, C = x.shape
    y = x.new_empty(x.shape)
    depthwise_kernel[triton.cdiv(T, 32), triton.cdiv(C, 128), B](
        x.contiguous(), taps, x if dy is None else dy, y, T, C, LENGTH=len(taps),
        TRANSPOSED=transposed, SILU=silu, GRADIENT=dy is not None, BT=32, BC=128)
    return y


@operator("depthwise_conv")
def short_conv(x: Tensor, taps: Tensor, silu: bool) -> Tensor:
    """Return the causal convolution of x (B, T, C) with taps (length, C), every channel by itself.

    With silu, return SiLU of it. x: bf16, fp16 or fp32; taps: fp32, few of them.
    """
    with torch.cuda.device_of(x):
        return depthwise(x, taps, silu=silu)


@torch.library.register_fake(short_conv)
def _(x, taps, silu):
    return x.new_empty(x.shape)


@operator("depthwise_conv_backward")
def short_conv_backward(dy: Tensor, x: Tensor, taps: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and taps. SiLU's input is computed again."""
    B, T, C = x.shape
    with torch.cuda.device_of(x):
        x, dy = x.contiguous(), dy.contiguous()
        if silu:
            dy = depthwise(x, taps, silu=True, dy=dy)
        parts = taps.new_empty(min(128, triton.cdiv(B * T, 32)), len(taps), C)
        depthwise_gradient_kernel[len(taps), triton.cdiv(C, 128), len(parts)](
            x, dy, parts, B * T, T, C, BT=32, BC=128)
        return depthwise(dy, taps, transposed=True), parts.sum(0)


@torch.library.register_fake(short_conv_backward)
def _(dy, x, taps, silu):
    return x.new_empty(x.shape), taps.new_empty(taps.shape)


def save_short_inputs(ctx, inputs, output):
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def short_backward(ctx, dy):
    return *short_conv_backward(dy, *ctx.saved_tensors, ctx.silu), None


torch.library.register_autograd(short_conv, short_backward, setup_context=save_short_inputs)
