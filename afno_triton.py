"""The causal convolution of afno.py as Triton kernels: matrix products only, forward and backward. Likewise state_scan, of the
form `state`. And kernels for what is around them: the short convolution, and the loss's softmax.

A file of its own because it cannot be imported where Triton is not installed; afno.causal_conv then takes its plain path,
which computes the same sums (afno.kernel_path chooses).

    short filters   every block of NEAR tokens gets Toeplitz tiles of taps times the blocks before it and itself
    long filters    blocks of FAR tokens: a Toeplitz matrix inside the block; completed blocks are transformed one by
                    one, mixed frequency by frequency, and transformed back

The transform F of a block, zero-padded to 2 FAR points, at the odd frequencies (afno.odd_dft) is made in two steps:
two transforms H of half the size, of the even and of the odd tokens, as products with one matrix; then S[w] = E[w] +
turn O[w] and S[FAR - 1 - w] = conj(E[w] - turn O[w]) with turn = exp(-i pi (w + 1/2) / FAR), in fp32, by the kernels
that mix. The way back is F's transpose: the phase between the two halves of an inverse transform is part of the
response (afno.kernel_conv).

The products' right-hand sides are columns: one channel of a filter's W channels in one block of one row; a column's
entries are the block's tokens. Column n is channel n % W of row n // W % B in block n // W // B. G filters, C = G W
channels. Spectra in memory are E and O: (G, 2, FAR, columns), rows (w, re/im).

Bitwise causal, for finite inputs: an output sums products of its own block and of earlier ones; matrices for its own
block (where blocks are mixed, for its own tile of blocks) hold exact zeros above the diagonal. Of inputs of one
length, that is: for another T, sums may be made in another order. Operands are in the input's dtype, sums in fp32, no
atomics: equal inputs give equal bits. Only inputs are saved for backward, spectra are computed again.
"""
import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

NEAR, FAR = 128, 256  # tokens in a block for short and for long filters; FAR = 2 NEAR
CHUNK = 64  # and in one of state_scan
# A filter is short where Toeplitz tiles take at most so many multiply-adds (multiply_adds), all filters of up to 2048 taps and
# longer ones in short rows, up to T = 4224 all. A long one takes 6 NEAR and more, and more memory traffic.
DIRECT = 2048 + NEAR


# -----------------------------------------------------------------------------
# kernels


@triton.jit
def toeplitz_kernel(taps_ptr, out_ptr, K, tile_step, row_step, sign, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                    BP: tl.constexpr):
    """out[g, i, p, q] = taps[g, sign (i tile_step + p row_step - q)], zero where there is no such tap. taps: (G, K) in fp32;
    out: (G, tiles, ROWS, COLUMNS)."""
    first, g = tl.program_id(0) * BP, tl.program_id(1)
    p, q = first + tl.arange(0, BP), tl.arange(0, COLUMNS)  # rows of all tiles, numbered on
    lag = sign * ((p // ROWS * tile_step + p % ROWS * row_step)[:, None] - q[None, :])
    taps = tl.load(taps_ptr + g * K + lag, mask=(lag >= 0) & (lag < K), other=0.0)
    out = out_ptr + g.to(tl.int64) * tl.num_programs(0) * BP * COLUMNS + p[:, None] * COLUMNS + q[None, :]
    tl.store(out, taps.to(out_ptr.dtype.element_ty))


@triton.jit
def short_kernel(x_ptr, tiles_ptr, y_ptr, B, T, stride_b, stride_t, num_blocks, num_lags, columns, W: tl.constexpr,
                 NEAR: tl.constexpr, TRANSPOSED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """y[i] = sum over lags l of tiles[g, l] @ x[i - l]; TRANSPOSED: of tiles[g, l] @ x[i + l].
    x: (B, T, C), strided; tiles: (G, num_lags, NEAR, NEAR); y: (B, T, C)."""
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
        h = tl.load(tiles_ptr + (g * num_lags + lag) * NEAR * NEAR + p[:, None] * NEAR + (k0 + k)[None, :])
        j = i + lag if TRANSPOSED else i - lag
        t = (j * NEAR)[None, :] + (k0 + k)[:, None]
        x = tl.load(x_start[None, :] + t * stride_t, mask=(inside & (lag <= reach))[None, :] & (t < T), other=0.0)
        acc = tl.dot(h, x, acc, input_precision="ieee")
    C = tl.num_programs(1) * W
    t = (i * NEAR)[None, :] + p[:, None]
    y_start = y_ptr + row.to(tl.int64) * T * C + channel
    tl.store(y_start[None, :] + t * C, acc.to(y_ptr.dtype.element_ty), mask=inside[None, :] & (t < T))


@triton.jit
def transform_kernel(x_ptr, half_ptr, out_ptr, B, T, stride_b, stride_t, columns, W: tl.constexpr, FAR: tl.constexpr,
                     BN: tl.constexpr, BK: tl.constexpr):
    """E and O: out[g, parity, :, n] = half @ the tokens of that parity of column n. x: (B, T, C), strided; half: (FAR, FAR/2)
    = H; out: (G, 2, FAR, columns). A program makes half of the rows."""
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
    tl.store(out_ptr + line[:, None] + n[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside[None, :])


@triton.jit
def load_pair(place, odd, size, cos, sin, mask):
    """S[w] and S[FAR - 1 - w], (re, im) each, from E[w] at place (im: + size) and O[w] at place + odd."""
    dtype = place.dtype.element_ty
    e_re = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    e_im = tl.load(place + size, mask=mask, other=0.0).to(tl.float32)
    o_re = tl.load(place + odd, mask=mask, other=0.0).to(tl.float32)
    o_im = tl.load(place + odd + size, mask=mask, other=0.0).to(tl.float32)
    re, im = cos * o_re + sin * o_im, cos * o_im - sin * o_re
    return (e_re + re).to(dtype), (e_im + im).to(dtype), (e_re - re).to(dtype), (im - e_im).to(dtype)


@triton.jit
def load_response(response_ptr, line, blocks, lag, TRANSPOSED: tl.constexpr, dtype: tl.constexpr):
    """Toeplitz tile (re, im) of a frequency's response, strictly one-sided; TRANSPOSED: conjugated."""
    wanted = (lag > 0) & (lag < blocks)
    re = tl.load(response_ptr + line * blocks + lag, mask=wanted, other=0.0).to(dtype)
    im = tl.load(response_ptr + line * blocks + blocks + lag, mask=wanted, other=0.0).to(dtype)
    return re, -im if TRANSPOSED else im


@triton.jit
def add_product(re, im, h_re, h_im, x_re, x_im):
    """(re, im) + h @ x, complex."""
    re = tl.dot(h_re, x_re, tl.dot(-h_im, x_im, re, input_precision="ieee"), input_precision="ieee")
    im = tl.dot(h_re, x_im, tl.dot(h_im, x_re, im, input_precision="ieee"), input_precision="ieee")
    return re, im


@triton.jit
def mix_kernel(x_ptr, response_ptr, out_ptr, B, blocks, columns, padded_columns, W: tl.constexpr, FAR: tl.constexpr,
               TRANSPOSED: tl.constexpr, BI: tl.constexpr, BN: tl.constexpr):
    """M[i] = sum over blocks j < i of response[i - j] * S[j] at every frequency; TRANSPOSED: over j > i of
    conj(response[j - i]) * S[j]. x: S as E and O; out: what F's transpose multiplies with H's, likewise; response:
    (G, FAR, 2, blocks).

    A program does the frequencies w and FAR - 1 - w. Toeplitz tiles of BI blocks; its column n is column n % (B W) of the
    blocks from n // (B W) BI on, so a tile serves all blocks at once.
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
        s_re, s_im, s2_re, s2_im = load_pair(x_ptr + start + j * width + (n % width)[None, :], odd, columns, cos, sin, inside)
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


@triton.jit
def long_kernel(x_ptr, near_ptr, mixed_ptr, half_ptr, y_ptr, B, T, stride_b, stride_t, columns, W: tl.constexpr,
                FAR: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Tokens of one parity of y: near[g, parity] @ x in the same block + half.T @ mixed[g, parity]. x: (B, T, C), strided;
    near: (G, 2, FAR/2, FAR); mixed: (G, 2, FAR, columns); half: (FAR, FAR/2) = H; y: (B, T, C)."""
    NEAR: tl.constexpr = FAR // 2
    g, parity = tl.program_id(1), tl.program_id(2)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = n < columns
    row, channel, begin = n // W % B, g * W + n % W, n // W // B * FAR
    x_start = x_ptr + row.to(tl.int64) * stride_b + channel
    p, k = tl.arange(0, NEAR), tl.arange(0, BK)
    acc = tl.zeros((NEAR, BN), tl.float32)
    for k0 in range(0, FAR, BK):
        h = tl.load(near_ptr + (g * 2 + parity) * NEAR * FAR + p[:, None] * FAR + (k0 + k)[None, :])
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
    tl.store(y_start[None, :] + t * C, acc.to(y_ptr.dtype.element_ty), mask=inside[None, :] & (t < T))


@triton.jit
def tiles_gradient_kernel(u_ptr, dy_ptr, out_ptr, B, T, u_stride_b, u_stride_t, dy_stride_b, dy_stride_t, num_lags, units,
                          together, units_each, W: tl.constexpr, NEAR: tl.constexpr, LAGS: tl.constexpr, BK: tl.constexpr):
    """out[g, l, split] = sum of dy[i] @ u[i - l].T over the split's units_each of all units (block i, row) whose blocks
    i - l and i are among the same `together` blocks. u, dy: (B, T, C), strided; out: (G, num_lags, splits, NEAR, NEAR), fp32.
    A program makes LAGS lags at once, of the units that the first of them has. A split without units leaves its tiles as
    they were; fold_kernel does not read them."""
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
            u = tl.load(u_ptr + (row * u_stride_b + channel)[:, None] + s * u_stride_t,
                        mask=(n < last)[:, None] & (s < T) & (lag_of[None, :] <= place[:, None]), other=0.0)
            acc = tl.dot(dy, u, acc, input_precision="ieee")
        tile = ((g * num_lags + lag_of) * tl.num_programs(0) + split).to(tl.int64) * NEAR * NEAR
        tl.store(out_ptr + tile[None, :] + p[:, None] * NEAR + (q % NEAR)[None, :], acc, mask=(lag_of < num_lags)[None, :])


@triton.jit
def response_gradient_kernel(x_ptr, dm_ptr, out_ptr, B, blocks, columns, W: tl.constexpr, FAR: tl.constexpr,
                             BI: tl.constexpr, BK: tl.constexpr):
    """Tiles of the gradient of mix_kernel's response: out[g, w, :, l, p, q] = sum over a and columns of
    dM[a BI + p] * conj(S[(a - l) BI + q]). x, dm: S and dM as E and O; out: (G, FAR, 2, lags, BI, BI) in fp32."""
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
    tile = out_ptr + ((g * FAR + w) * 2 * lags + lag).to(tl.int64) * BI * BI + p[:, None] * BI + p[None, :]
    tl.store(tile, re)
    tl.store(tile + lags * BI * BI, im)
    tile = out_ptr + ((g * FAR + FAR - 1 - w) * 2 * lags + lag).to(tl.int64) * BI * BI + p[:, None] * BI + p[None, :]
    tl.store(tile, re2)
    tl.store(tile + lags * BI * BI, im2)


@triton.jit
def fold_kernel(tiles_ptr, out_ptr, splits, units, together, units_each, LAGS: tl.constexpr, SIZE: tl.constexpr,
                BP: tl.constexpr):
    """Gradient of taps from that of their Toeplitz tiles, split by split: out[g, split, l SIZE + d] = the sum of all entries
    (p, q) of tiles l with p - q = d and of tiles l + 1 with p - q = d - SIZE. tiles: (G, lags, splits, SIZE, SIZE), of whose
    splits as many are there as tiles_gradient_kernel makes; out: (G, splits, lags SIZE)."""
    g, lag, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)  # g first: the others end at 65,535
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
        acc += tl.load(tiles_ptr + tile + p[:, None] * SIZE + q_of + after * SIZE, mask=there, other=0.0)
    tl.store(out_ptr + ((g * splits + split) * lags + lag) * SIZE + d, tl.sum(acc, 0))


@triton.jit
def depthwise_kernel(x_ptr, taps_ptr, dy_ptr, y_ptr, T, C, LENGTH: tl.constexpr, TRANSPOSED: tl.constexpr,
                     SILU: tl.constexpr, GRADIENT: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """y[t] = sum over lags l of taps[l] * x[t - l], channel by channel; TRANSPOSED: of taps[l] * x[t + l]. SILU: y is SiLU of
    that; GRADIENT: dy times SiLU's slope there. x, dy, y: (B, T, C), contiguous; taps: (LENGTH, C) in fp32."""
    t, c = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(1) * BC + tl.arange(0, BC)
    begin = tl.program_id(2).to(tl.int64) * T * C
    inside = c < C
    acc = tl.zeros((BT, BC), tl.float32)
    for lag in tl.static_range(LENGTH):
        s = t + lag if TRANSPOSED else t - lag
        tap = tl.load(taps_ptr + lag * C + c, mask=inside, other=0.0)
        x = tl.load(x_ptr + begin + s[:, None] * C + c[None, :], mask=((s >= 0) & (s < T))[:, None] & inside[None, :],
                    other=0.0)
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


@triton.jit
def depthwise_gradient_kernel(x_ptr, dy_ptr, out_ptr, tokens, T, C, BT: tl.constexpr, BC: tl.constexpr):
    """out[split, l] = sum of dy[t] * x[t - l] over the split's tokens of all B T. out: (splits, LENGTH, C) in fp32. Programs of
    all lags follow each other: what the first one reads is in the cache for the others."""
    lag, c, split = tl.program_id(0), tl.program_id(1) * BC + tl.arange(0, BC), tl.program_id(2)
    inside = c < C
    acc = tl.zeros((BT, BC), tl.float32)
    for first in range(split * BT, tokens, tl.num_programs(2) * BT):
        n = first + tl.arange(0, BT)
        wanted = ((n < tokens) & (n % T >= lag))[:, None] & inside[None, :]  # x is a token of this row
        place = n.to(tl.int64)[:, None] * C + c[None, :]
        dy = tl.load(dy_ptr + place, mask=wanted, other=0.0)
        x = tl.load(x_ptr + place - lag * C, mask=wanted, other=0.0)
        acc += dy.to(tl.float32) * x.to(tl.float32)
    tl.store(out_ptr + (split * tl.num_programs(0) + lag) * C + c, tl.sum(acc, 0), mask=inside)


@triton.jit
def load_heads(x_ptr, g, b, t, T, first, size, stride_b, stride_t, SIZE: tl.constexpr):
    """x[b, t, g, first:] of x (B, T, G, size), heads side by side: (tokens, SIZE), zero beyond."""
    d = first + tl.arange(0, SIZE)
    x_ptr += b.to(tl.int64) * stride_b + g * size
    return tl.load(x_ptr + t.to(tl.int64)[:, None] * stride_t + d[None, :], mask=(t < T)[:, None] & (d < size)[None, :],
                   other=0.0)


@triton.jit
def state_places(x_ptr, ahead, first, D, W, DP: tl.constexpr, WP: tl.constexpr):
    """Of states (B, G, chunks, D, W) that `ahead` chunks after the program's own, columns from the first on: (DP, WP), and
    which of them there are."""
    chunk = tl.program_id(0) + ahead
    n = (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + chunk
    d, w = tl.arange(0, DP), first + tl.arange(0, WP)
    inside = (d < D)[:, None] & (w < tl.where(chunk < tl.num_programs(0), W, 0))[None, :]
    return x_ptr + n * D * W + d[:, None] * W + w[None, :], inside


@triton.jit
def load_state(x_ptr, ahead, first, D, W, DP: tl.constexpr, WP: tl.constexpr):
    """state_places' numbers, zero beyond."""
    places, inside = state_places(x_ptr, ahead, first, D, W, DP, WP)
    return tl.load(places, mask=inside, other=0.0)


@triton.jit
def load_log_a(log_a_ptr, g, b, t, T):
    """(since, until): logarithms of what remains of the chunk's beginning at each token, and of each token at its end."""
    log_a = tl.load(log_a_ptr + (b.to(tl.int64) * T + t) * tl.num_programs(1) + g, mask=t < T, other=0.0)
    since = tl.cumsum(log_a, 0)
    return since, tl.sum(log_a, 0) - since


@triton.jit
def sent_kernel(x_ptr, y_ptr, log_a_ptr, out_ptr, T, x_stride_b, x_stride_t, y_stride_b, y_stride_t, D, W,
                FROM_START: tl.constexpr, L: tl.constexpr, DP: tl.constexpr, WP: tl.constexpr):
    """out[b, g, chunk] = sum over the chunk's tokens of decay x y^T, where decay is what remains of the token at the chunk's
    end, FROM_START: of its beginning at the token. x: (B, T, G, D); y: (B, T, G, W); log_a: (B, T, G), fp32; out: (B, G,
    chunks, D, W). This kernel and the next two: a program a chunk of a head of a row."""
    g, b, t = tl.program_id(1), tl.program_id(2), tl.program_id(0) * L + tl.arange(0, L)
    since, until = load_log_a(log_a_ptr, g, b, t, T)
    x = load_heads(x_ptr, g, b, t, T, 0, D, x_stride_b, x_stride_t, DP)
    y = load_heads(y_ptr, g, b, t, T, 0, W, y_stride_b, y_stride_t, WP)
    x = (x * tl.exp(since if FROM_START else until)[:, None]).to(y.dtype)
    out = tl.dot(tl.trans(x), y, input_precision="ieee")
    places, inside = state_places(out_ptr, 0, 0, D, W, DP, WP)
    tl.store(places, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def state_kernel(q_ptr, k_ptr, v_ptr, log_a_ptr, state_ptr, y_ptr, T, q_stride_b, q_stride_t, k_stride_b, k_stride_t,
                 v_stride_b, v_stride_t, D, W, L: tl.constexpr, DP: tl.constexpr, WP: tl.constexpr):
    """y_t = sum over s <= t of the chunk of what remains of s at t (q_t k_s) v_s + what remains of the chunk's beginning
    q_t state. state: (B, G, chunks, D, W), where chunks begin; y: (B, T, G, W)."""
    g, b, t = tl.program_id(1), tl.program_id(2), tl.program_id(0) * L + tl.arange(0, L)
    since, _ = load_log_a(log_a_ptr, g, b, t, T)
    q = load_heads(q_ptr, g, b, t, T, 0, D, q_stride_b, q_stride_t, DP)
    k = load_heads(k_ptr, g, b, t, T, 0, D, k_stride_b, k_stride_t, DP)
    v = load_heads(v_ptr, g, b, t, T, 0, W, v_stride_b, v_stride_t, WP)
    state = load_state(state_ptr, 0, 0, D, W, DP, WP)
    remains = tl.exp(tl.where(t[:, None] >= t[None, :], since[:, None] - since[None, :], -float("inf")))
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * remains
    y = tl.dot(q, state, input_precision="ieee") * tl.exp(since)[:, None]
    y = tl.dot(scores.to(v.dtype), v, y, input_precision="ieee")
    w = tl.arange(0, WP)
    y_ptr += ((b.to(tl.int64) * T + t) * tl.num_programs(1) + g)[:, None] * W + w[None, :]
    tl.store(y_ptr, y.to(y_ptr.dtype.element_ty), mask=(t < T)[:, None] & (w < W)[None, :])


VALUES = tl.constexpr(32)  # columns of values and states at a time, for sums and products to fit into registers and shared memory


@triton.jit
def state_gradient_kernel(dy_ptr, q_ptr, k_ptr, v_ptr, log_a_ptr, state_ptr, dsent_ptr, dq_ptr, dk_ptr, dv_ptr, dlog_a_ptr, T,
                          dy_stride_b, dy_stride_t, q_stride_b, q_stride_t, k_stride_b, k_stride_t, v_stride_b, v_stride_t,
                          D, W, L: tl.constexpr, DP: tl.constexpr, WP: tl.constexpr):
    """Gradients of q, k, v and log_a. That of the sum of log_a up to a token is q dq - k dk: with this sign the sum is in what
    the token reads, with the other one in what it writes. A token's own log_a is in the sums of all tokens from it on: of its
    chunk's, and of the later ones', which all go through the state where the next chunk begins, whose gradient is dsent,
    (B, G, chunks, D, W)."""
    g, b, t = tl.program_id(1), tl.program_id(2), tl.program_id(0) * L + tl.arange(0, L)
    since, until = load_log_a(log_a_ptr, g, b, t, T)
    remains = tl.exp(tl.where(t[:, None] >= t[None, :], since[:, None] - since[None, :], -float("inf")))
    since, until = tl.exp(since)[:, None], tl.exp(until)[:, None]
    place = (b.to(tl.int64) * T + t) * tl.num_programs(1) + g
    dtype = dq_ptr.dtype.element_ty
    WB: tl.constexpr = WP if WP < VALUES else VALUES
    dscores = tl.zeros((L, L), tl.float32)
    for first in range(0, WP, WB):
        dy = load_heads(dy_ptr, g, b, t, T, first, W, dy_stride_b, dy_stride_t, WB)
        v = load_heads(v_ptr, g, b, t, T, first, W, v_stride_b, v_stride_t, WB)
        dscores = tl.dot(dy, tl.trans(v), dscores, input_precision="ieee")
    dscores = (dscores * remains).to(dtype)
    q = load_heads(q_ptr, g, b, t, T, 0, D, q_stride_b, q_stride_t, DP)
    k = load_heads(k_ptr, g, b, t, T, 0, D, k_stride_b, k_stride_t, DP)
    scores = (tl.dot(q, tl.trans(k), input_precision="ieee") * remains).to(dtype)
    dq, dk, later = tl.zeros((L, DP), tl.float32), tl.zeros((L, DP), tl.float32), tl.zeros((DP,), tl.float32)
    for first in range(0, WP, WB):
        dy = load_heads(dy_ptr, g, b, t, T, first, W, dy_stride_b, dy_stride_t, WB)
        state = load_state(state_ptr, 0, first, D, W, DP, WB)
        dq = tl.dot(dy, tl.trans(state), dq, input_precision="ieee")
        v = load_heads(v_ptr, g, b, t, T, first, W, v_stride_b, v_stride_t, WB)
        dsent = load_state(dsent_ptr, 0, first, D, W, DP, WB)
        dk = tl.dot(v, tl.trans(dsent), dk, input_precision="ieee")
        dv = tl.dot(k, dsent, input_precision="ieee") * until
        dv = tl.dot(tl.trans(scores), dy, dv, input_precision="ieee")
        w = first + tl.arange(0, WB)
        tl.store(dv_ptr + place[:, None] * W + w[None, :], dv.to(dtype), mask=(t < T)[:, None] & (w < W)[None, :])
        later += tl.sum(load_state(state_ptr, 1, first, D, W, DP, WB).to(tl.float32) * dsent.to(tl.float32), 1)
    dq = tl.dot(dscores, k, dq * since, input_precision="ieee")
    dk = tl.dot(tl.trans(dscores), q, dk * until, input_precision="ieee")
    d = tl.arange(0, DP)
    inside = (t < T)[:, None] & (d < D)[None, :]
    tl.store(dq_ptr + place[:, None] * D + d[None, :], dq.to(dtype), mask=inside)
    tl.store(dk_ptr + place[:, None] * D + d[None, :], dk.to(dtype), mask=inside)
    dlog_a = tl.sum(later, 0) + tl.cumsum(tl.sum(q * dq - k * dk, 1), 0, reverse=True)
    tl.store(dlog_a_ptr + place, dlog_a, mask=t < T)


LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def quick_exp(x):
    """exp(x), zero below 2^-126: numbers so small cost tl.exp three more instructions."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def soft_cap(logits, CAP: tl.constexpr):
    full = logits.to(tl.float32)
    return full if CAP == 0 else CAP - (2 * CAP) / (1 + tl.exp2(full * (2 * LOG2_E / CAP)))  # CAP tanh(full / CAP)


@triton.jit
def cross_entropy_kernel(logits_ptr, gradient_ptr, targets_ptr, losses_ptr, vocab_size, columns, CAP: tl.constexpr,
                         GRADIENT: tl.constexpr, SCALE: tl.constexpr, BV: tl.constexpr):
    """The loss of a row of logits, (rows, columns); with GRADIENT, d loss / d logits times SCALE, which may take the logits'
    place. The row is read from memory once, the second time it is still in the cache, if not too many rows are under way."""
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * columns
    gradient_ptr += row.to(tl.int64) * columns
    target = tl.load(targets_ptr + row).to(tl.int32)
    at_target = soft_cap(tl.load(logits_ptr + target), CAP)
    # Lanes of 8 columns, 16 bytes, in one thread each: it has their maximum and sum without the others until the end. Loads
    # and stores are masked at columns, a multiple of 64; at vocab_size, seldom one, they would be of 2 bytes each.
    k = tl.arange(0, BV // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    BOUNDED: tl.constexpr = CAP > 0 and CAP <= 64  # then exp of a logit and its sum are numbers in fp32 without a maximum
    largest = tl.full((BV // 8,), 0.0 if BOUNDED else -1e38, tl.float32)  # no -inf: what is subtracted has to be a number
    total = tl.zeros((BV // 8,), tl.float32)
    for first in range(0, vocab_size, BV):
        z = soft_cap(tl.load(logits_ptr + first + k, mask=k < columns - first, other=0.0), CAP)
        z = tl.where(k < vocab_size - first, z, -float("inf"))
        if not BOUNDED:
            before, largest = largest, tl.maximum(largest, tl.max(z, 1))
            total *= quick_exp(before - largest)
        total += tl.sum(quick_exp(z - largest[:, None]), 1)
    most = tl.max(largest, 0)
    log_total = tl.log(tl.sum(total * quick_exp(largest - most), 0))
    tl.store(losses_ptr + row, most - at_target + log_total)  # in this order large logits cost no digits
    if GRADIENT:
        log_sum = most + log_total
        for first in range(0, columns, BV):
            z = soft_cap(tl.load(logits_ptr + first + k, mask=k < columns - first, other=0.0), CAP)
            gradient = quick_exp(z - log_sum) - tl.where(k == target - first, 1.0, 0.0)
            if CAP > 0:
                gradient *= 1 - (z * (1 / CAP)) * (z * (1 / CAP))
            gradient = tl.where(k < vocab_size - first, gradient, 0.0)  # of padding
            tl.store(gradient_ptr + first + k, (gradient * SCALE).to(gradient_ptr.dtype.element_ty), mask=k < columns - first)


@triton.jit
def transpose_kernel(x_ptr, y_ptr, M, N, BLOCK: tl.constexpr):
    """y (N, M) of x (M, N), both dense."""
    m = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + m[:, None] * N + n[None, :], mask=(m[:, None] < M) & (n[None, :] < N), other=0)
    tl.store(y_ptr + n[:, None] * M + m[None, :], tl.trans(x), mask=(n[:, None] < N) & (m[None, :] < M))


# -----------------------------------------------------------------------------
# launches


# Columns BN and depth BK of the products, and how they are launched, where a block may have 163 KB of shared memory
# (A100, H100, H200) and where it may have 99 KB (RTX 3090, 4090)
LARGE = dict(BN=256, BK=64, num_warps=8, num_stages=3)
SMALL = dict(BN=128, BK=64, num_warps=4, num_stages=2)
# BN / NEAR is also how many lags tiles_gradient_kernel makes at once
PROGRAMS = 256  # that make gradients of taps, about: two for every multiprocessor of an H100, each leaves a tile to add
# Blocks a Toeplitz tile of mix_kernel has, and columns at most: four fp32 sums of BI x BN. Larger tiles waste less above
# the diagonal's place and are slower all the same.
MIX = dict(BI=16, BN=128)
RESPONSE = {16: 64, 32: 32, 64: 32}  # BI: BK at most, of response_gradient_kernel; four fp32 sums of BI x BI
# cross_entropy_kernel's: registers let an H100 run two or three such programs a multiprocessor, 27 or 40 MB of rows in bf16:
# its second level cache has 50 MB. Programs of half the size would be four, 53 MB.
SOFTMAX = dict(BV=8192, num_warps=16)


def tile_shapes(device: torch.device) -> dict:
    if device.type == "cpu":  # Triton's interpreter
        shapes = dict(BN=64, BK=32)
    else:
        large = torch.cuda.get_device_properties(device).shared_memory_per_block_optin > 160 * 1024
        shapes = LARGE if large else SMALL
    return dict(shapes, BK=min(NEAR, shapes["BK"]))


class Sizes:
    """What launches for u (B, T, C), G filters and blocks of `size` tokens share."""

    def __init__(self, u: Tensor, G: int, size: int):
        self.B, self.T, C = u.shape
        self.G, self.W = G, C // G
        self.width = self.B * self.W  # columns a block
        self.blocks = triton.cdiv(self.T, size)
        self.columns = self.blocks * self.width


def toeplitz(taps: Tensor, tiles: int, shape: tuple[int, int], tile_step: int, row_step: int, sign: int,
             dtype: torch.dtype) -> Tensor:
    """(G, K) to (G, tiles, *shape), entries (i, p, q) taps[sign (i tile_step + p row_step - q)] or zero."""
    out, BP = taps.new_empty(len(taps), tiles, *shape, dtype=dtype), min(16, shape[0])
    toeplitz_kernel[tiles * shape[0] // BP, len(taps)](
        taps.contiguous(), out, taps.size(1), tile_step, row_step, sign, ROWS=shape[0], COLUMNS=shape[1], BP=BP)
    return out


def count_lags(blocks: int, K: int) -> int:
    """Tiles of NEAR taps; the last tap reaches into the tile after its own."""
    return min(blocks, -(-(K - 1) // NEAR) + 1)


def multiply_adds(T: int, K: int) -> float:
    """A token's and channel's by Toeplitz tiles: NEAR for every lag that its block has a partner at, in the mean of the row's
    blocks, of which the first have fewer: about K - K^2 / (2 T)."""
    blocks = -(-T // NEAR)
    lags = count_lags(blocks, K)
    return NEAR * (lags - lags * (lags - 1) / (2 * blocks))


def is_short(T: int, K: int) -> bool:
    """Whether a filter of K taps on rows of T tokens is made of Toeplitz tiles alone."""
    return multiply_adds(T, K) <= DIRECT


def short_conv(x: Tensor, taps: Tensor, transposed: bool) -> Tensor:
    s, y, shapes = Sizes(x, len(taps), NEAR), x.new_empty(x.shape), tile_shapes(x.device)
    num_lags = count_lags(s.blocks, taps.size(1))
    sign = -1 if transposed else 1
    tiles = toeplitz(taps, num_lags, (NEAR, NEAR), sign * NEAR, 1, sign, x.dtype)  # lags l NEAR +- (p - q)
    short_kernel[triton.cdiv(s.columns, shapes["BN"]), s.G](
        x, tiles, y, s.B, s.T, *x.stride()[:2], s.blocks, num_lags, s.columns,
        W=s.W, NEAR=NEAR, TRANSPOSED=transposed, **shapes)
    return y


def transform(x: Tensor, half: Tensor, s: Sizes) -> Tensor:
    """E and O of all blocks of FAR tokens, (G, 2, FAR, columns)."""
    out, shapes = x.new_empty(s.G, 2, FAR, s.columns), tile_shapes(x.device)
    transform_kernel[4, triton.cdiv(s.columns, shapes["BN"]), s.G](
        x, half, out, s.B, s.T, *x.stride()[:2], s.columns, W=s.W, FAR=FAR, **shapes)
    return out


def mix(x: Tensor, response: Tensor, s: Sizes, transposed: bool) -> Tensor:
    out, BI = torch.empty_like(x), MIX["BI"]
    padded_columns = triton.cdiv(s.blocks, BI) * s.width
    BN = min(MIX["BN"], max(16, triton.next_power_of_2(padded_columns)))
    mix_kernel[FAR // 2, s.G, triton.cdiv(padded_columns, BN)](
        x, response, out, s.B, s.blocks, s.columns, padded_columns, W=s.W, FAR=FAR, TRANSPOSED=transposed, BI=BI, BN=BN)
    return out


def long_conv(x: Tensor, taps: Tensor, mixed: Tensor, half: Tensor, s: Sizes, transposed: bool) -> Tensor:
    near = toeplitz(taps, 2, (FAR // 2, FAR), 1, 2, -1 if transposed else 1, x.dtype)  # lags +-(2 p + parity - q)
    y, shapes = x.new_empty(x.shape), tile_shapes(x.device)
    long_kernel[triton.cdiv(s.columns, shapes["BN"]), s.G, 2](
        x, near, mixed, half, y, s.B, s.T, *x.stride()[:2], s.columns, W=s.W, FAR=FAR, **shapes)
    return y


def fold(tiles: Tensor, units: int, together: int, units_each: int, lags_at_once: int) -> Tensor:
    """(N, lags, splits, SIZE, SIZE) to (N, lags SIZE)."""
    N, lags, splits, SIZE, _ = tiles.shape
    out = tiles.new_empty(N, splits, lags * SIZE)
    fold_kernel[N, lags, splits](
        tiles, out, splits, units, together, units_each, LAGS=lags_at_once, SIZE=SIZE, BP=min(SIZE, 32))
    return out.sum(1)


def taps_gradient(u: Tensor, dy: Tensor, G: int, K: int, together: int | None = None) -> Tensor:
    """(G, K), of all pairs of tokens or of those in the same `together` blocks of NEAR."""
    s = Sizes(u, G, NEAR)
    num_lags = count_lags(s.blocks, K)
    together = together or s.blocks
    units = triton.cdiv(s.blocks, together) * s.B
    shapes = tile_shapes(u.device)
    wide = shapes.pop("BN") // NEAR
    lags_at_once = wide if wide > 1 and together > 2 else 1
    units_each = triton.cdiv(G * units * sum(together - lag for lag in range(0, num_lags, lags_at_once)), PROGRAMS)
    tiles = u.new_empty(G, num_lags, triton.cdiv(units * together, units_each), NEAR, NEAR, dtype=torch.float32)
    tiles_gradient_kernel[tiles.size(2), triton.cdiv(num_lags, lags_at_once), G](
        u, dy, tiles, s.B, s.T, *u.stride()[:2], *dy.stride()[:2], num_lags, units, together, units_each, W=s.W, NEAR=NEAR,
        LAGS=lags_at_once, **shapes)
    taps = fold(tiles, units, together, units_each, lags_at_once)[:, :K]
    return F.pad(taps, (0, K - taps.size(1)))


def response_gradient(spectra: Tensor, dmixed: Tensor, s: Sizes) -> Tensor:
    BI = min(max(RESPONSE), max(min(RESPONSE), triton.next_power_of_2(s.blocks)))
    lags = triton.cdiv(s.blocks, BI)
    BK = min(RESPONSE[BI], max(16, triton.next_power_of_2(lags * s.width)))
    filters = max(1, 2**25 // (2 * FAR * lags * BI * BI))  # at once: tiles of up to 128 MB
    parts = []
    for x, dm in zip(spectra.split(filters), dmixed.split(filters)):
        tiles = x.new_empty(len(x), FAR, 2, lags, BI, BI, dtype=torch.float32)
        response_gradient_kernel[FAR // 2, len(x), lags](x, dm, tiles, s.B, s.blocks, s.columns, W=s.W, FAR=FAR, BI=BI, BK=BK)
        parts.append(fold(tiles.flatten(0, 2).unsqueeze(2), 1, lags, lags, 1)[:, : s.blocks])
    return torch.cat(parts).view(s.G, 2 * FAR, s.blocks)


@functools.cache
def half_transform(device: torch.device, dtype: torch.dtype, size: int) -> Tensor:
    """H: (size, size / 2), rows (w, re/im): exp(-2 pi i (w + 1/2) t / size), made in fp32, once for all layers."""
    from afno import odd_dft  # not at the top: afno imports this file

    forward, _ = odd_dft(size // 2, torch.empty(0, device=device, dtype=torch.float32))
    return forward[:, : size // 2].to(dtype).contiguous()


def cross_entropy(logits: Tensor, targets: Tensor, vocab_size: int, with_gradient: bool, cap: float = 0.0,
                  fp8_scale: float = 0.0):
    """As train_gpt2_afno.cross_entropy_chunk, but that a gradient in the logits' dtype takes their place, (rows, columns)."""
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    gradient = torch.empty_like(logits, dtype=torch.float8_e5m2) if fp8_scale else logits
    with torch.cuda.device_of(logits):
        cross_entropy_kernel[(len(logits),)](logits, gradient, targets, losses, vocab_size, logits.size(1), CAP=float(cap),
                                             GRADIENT=with_gradient, SCALE=float(fp8_scale or 1), **SOFTMAX)
    return losses, gradient if with_gradient else None


def transposed(x: Tensor) -> Tensor:
    """(M, N) of one byte a number, dense, to (N, M): many times faster than torch's copy."""
    (M, N), y = x.shape, x.new_empty(x.shape[::-1])
    with torch.cuda.device_of(x):
        transpose_kernel[triton.cdiv(N, 128), triton.cdiv(M, 128)](x.view(torch.int8), y.view(torch.int8), M, N, BLOCK=128,
                                                                   num_warps=8)
    return y


# -----------------------------------------------------------------------------
# the operator, opaque to torch.compile, so that a compiled model stays one graph


@torch.library.custom_op("afno::block_conv", mutates_args=())
def block_conv(u: Tensor, taps: Tensor, response: Tensor | None) -> Tensor:
    """Causal convolution of u (B, T, C) with taps (G, K): all of them short filters, or, where there is a response, those
    of lags inside a block of FAR tokens; response (G, 2 FAR, blocks), rows (w, re/im), is then for blocks 1, 2 ... apart: the
    block sends F's transpose of response times its F.

    u: bf16, fp16 or fp32, any strides; the others fp32. Returns (B, T, C), contiguous, in u's dtype.
    """
    with torch.cuda.device_of(u):  # Triton launches on the current device
        u = last_dimension_dense(u)
        if response is None:
            return short_conv(u, taps, transposed=False)
        s, half = Sizes(u, len(taps), FAR), half_transform(u.device, u.dtype, FAR)
        mixed = mix(transform(u, half, s), response.contiguous(), s, transposed=False)
        return long_conv(u, taps, mixed, half, s, transposed=False)


@block_conv.register_fake
def _(u, taps, response):
    return u.new_empty(u.shape)


@torch.library.custom_op("afno::block_conv_backward", mutates_args=())
def block_conv_backward(dy: Tensor, u: Tensor, taps: Tensor, response: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of u, taps and response (empty where there is none): the transposed products."""
    with torch.cuda.device_of(u):
        u, dy = last_dimension_dense(u), last_dimension_dense(dy)
        G, K = taps.shape
        if response is None:
            return short_conv(dy, taps, transposed=True), taps_gradient(u, dy, G, K), taps.new_empty(0)
        s, half = Sizes(u, G, FAR), half_transform(u.device, u.dtype, FAR)
        dmixed = transform(dy, half, s)
        du = long_conv(dy, taps, mix(dmixed, response.contiguous(), s, transposed=True), half, s, transposed=True)
        return du, taps_gradient(u, dy, G, K, FAR // NEAR), response_gradient(transform(u, half, s), dmixed, s)


@block_conv_backward.register_fake
def _(dy, u, taps, response):
    return u.new_empty(u.shape), taps.new_empty(taps.shape), taps.new_empty(0 if response is None else response.shape)


def save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def backward(ctx, dy):
    u, taps, response = ctx.saved_tensors
    du, dtaps, dresponse = block_conv_backward(dy, u, taps, response)
    return du, dtaps, None if response is None else dresponse


block_conv.register_autograd(backward, setup_context=save_inputs)


def depthwise(x: Tensor, taps: Tensor, transposed: bool = False, silu: bool = False, dy: Tensor | None = None) -> Tensor:
    B, T, C = x.shape
    y = x.new_empty(x.shape)
    depthwise_kernel[triton.cdiv(T, 32), triton.cdiv(C, 128), B](
        x.contiguous(), taps, x if dy is None else dy, y, T, C, LENGTH=len(taps), TRANSPOSED=transposed, SILU=silu,
        GRADIENT=dy is not None, BT=32, BC=128)
    return y


@torch.library.custom_op("afno::depthwise_conv", mutates_args=())
def depthwise_conv(x: Tensor, taps: Tensor, silu: bool) -> Tensor:
    """Causal convolution of x (B, T, C), bf16, fp16 or fp32, with taps (length, C), fp32, of every channel by itself; few taps.
    silu: SiLU of that."""
    with torch.cuda.device_of(x):
        return depthwise(x, taps, silu=silu)


@depthwise_conv.register_fake
def _(x, taps, silu):
    return x.new_empty(x.shape)


@torch.library.custom_op("afno::depthwise_conv_backward", mutates_args=())
def depthwise_conv_backward(dy: Tensor, x: Tensor, taps: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    """Gradients of x and taps; what SiLU was taken of is computed again."""
    B, T, C = x.shape
    with torch.cuda.device_of(x):
        x, dy = x.contiguous(), dy.contiguous()
        if silu:
            dy = depthwise(x, taps, silu=True, dy=dy)
        parts = taps.new_empty(min(128, triton.cdiv(B * T, 32)), len(taps), C)
        depthwise_gradient_kernel[len(taps), triton.cdiv(C, 128), len(parts)](x, dy, parts, B * T, T, C, BT=32, BC=128)
        return depthwise(dy, taps, transposed=True), parts.sum(0)


@depthwise_conv_backward.register_fake
def _(dy, x, taps, silu):
    return x.new_empty(x.shape), taps.new_empty(taps.shape)


def save_depthwise_inputs(ctx, inputs, output):
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


depthwise_conv.register_autograd(lambda ctx, dy: (*depthwise_conv_backward(dy, *ctx.saved_tensors, ctx.silu), None),
                                 setup_context=save_depthwise_inputs)


# its sums and products would not fit into the registers of four warps; no second copy of what a loop loads
STATE_GRADIENT = dict(num_warps=8, num_stages=1)


def launch_state(kernel, q: Tensor, v: Tensor, pointers: tuple[Tensor, ...], strided: tuple[Tensor, ...], **options):
    """A program a chunk of a head of a row; the kernel is told the first two strides of what is strided."""
    (B, T, G, D), W = q.shape, v.size(3)
    DP, WP = (max(16, triton.next_power_of_2(size)) for size in (D, W))
    strides = [stride for x in strided for stride in x.stride()[:2]]
    kernel[triton.cdiv(T, CHUNK), G, B](*pointers, T, *strides, D, W, L=CHUNK, DP=DP, WP=WP, **options)


def remaining(log_a: Tensor, dtype: torch.dtype) -> Tensor:
    """afno.chunks_remaining of log_a (B, T, G), (B, G, n, n)."""
    from afno import chunks_remaining  # not at the top: afno imports this file

    n = triton.cdiv(log_a.size(1), CHUNK)
    whole = F.pad(log_a, (0, 0, 0, n * CHUNK - log_a.size(1))).unflatten(1, (n, CHUNK)).sum(2).mT
    return chunks_remaining(whole).to(dtype)


def chunk_states(x: Tensor, y: Tensor, log_a: Tensor, remains: Tensor, transposed: bool) -> Tensor:
    """Of k and v, the states where chunks begin, (B, G, n, D, W), from what each chunk sends; transposed: of q and dy, the
    gradient of what was sent, from the states'."""
    (B, T, G, D), W = x.shape, y.size(3)
    sent = y.new_empty(B, G, triton.cdiv(T, CHUNK), D, W)
    launch_state(sent_kernel, x, y, (x, y, log_a, sent), (x, y), FROM_START=transposed)
    return ((remains.mT if transposed else remains) @ sent.flatten(3)).view_as(sent)


@torch.library.custom_op("afno::state_scan", mutates_args=())
def state_scan(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor) -> Tensor:
    """afno.state_scan for q, k (B, T, G, D) and v (B, T, G, W) in bf16, fp16 or fp32, any strides, and log_a (B, T, G) in
    fp32; (B, T, G, W), contiguous, in v's dtype."""
    with torch.cuda.device_of(v):
        (q, k, v), log_a = map(heads_dense, (q, k, v)), log_a.contiguous()
        y, state = v.new_empty(v.shape), chunk_states(k, v, log_a, remaining(log_a, v.dtype), transposed=False)
        launch_state(state_kernel, q, v, (q, k, v, log_a, state, y), (q, k, v))
        return y


@state_scan.register_fake
def _(q, k, v, log_a):
    return v.new_empty(v.shape)


@torch.library.custom_op("afno::state_scan_backward", mutates_args=())
def state_scan_backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, log_a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and log_a."""
    with torch.cuda.device_of(v):
        (dy, q, k, v), log_a = map(heads_dense, (dy, q, k, v)), log_a.contiguous()
        remains = remaining(log_a, v.dtype)
        state = chunk_states(k, v, log_a, remains, transposed=False)
        dsent = chunk_states(q, dy, log_a, remains, transposed=True)
        gradients = tuple(x.new_empty(x.shape) for x in (q, k, v, log_a))
        launch_state(state_gradient_kernel, q, v, (dy, q, k, v, log_a, state, dsent, *gradients), (dy, q, k, v),
                     **STATE_GRADIENT)
        return gradients


@state_scan_backward.register_fake
def _(dy, q, k, v, log_a):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), log_a.new_empty(log_a.shape)


state_scan.register_autograd(lambda ctx, dy: state_scan_backward(dy, *ctx.saved_tensors), setup_context=save_inputs)


def heads_dense(x: Tensor) -> Tensor:
    """x (B, T, G, size), or a copy where heads are not side by side in memory."""
    return x if x.stride()[2:] == (x.size(3), 1) else x.contiguous()


def last_dimension_dense(x: Tensor) -> Tensor:
    """x, or a copy where neighbouring channels are not neighbours in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()
