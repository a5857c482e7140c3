"""The causal convolution of afno.py as Triton kernels: matrix products only, forward and backward.

A file of its own because it cannot be imported where Triton is not installed; afno.causal_conv then takes its plain path,
which computes the same sums (afno.conv_path chooses).

    near field   Toeplitz tiles of taps times blocks of NEAR tokens
    far field    for long filters: the near field ends at the edge of a block of FAR tokens; completed blocks are transformed
                 one by one (afno.odd_dft, as a matrix), mixed frequency by frequency, and transformed back

The products' right-hand sides are columns: one channel of a filter's W channels in one block of one row; a column's entries
are the block's tokens. Column n is channel n % W of row n // W % B in block n // W // B. Spectra are dense,
(G, 2 FAR, columns), rows (w, re/im). G filters, C = G W channels.

Bitwise causal: an output sums tiles of its own block and of earlier ones; those of its own block hold exact zeros above the
diagonal. Operands are in the input's dtype, sums in fp32, no atomics: equal inputs give equal bits. Only inputs are saved
for backward, spectra are computed again.
"""
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

NEAR, FAR = 128, 256  # tokens in a block of the near and of the far field
DIRECT = 2048  # taps up to which the near field alone is cheaper: half as many multiply-adds a token, against 5 FAR


# -----------------------------------------------------------------------------
# kernels


@triton.jit
def conv_kernel(x_ptr, tiles_ptr, mixed_ptr, dft_ptr, y_ptr, B, T, stride_b, stride_t, num_blocks, num_lags, columns,
                W: tl.constexpr, NEAR: tl.constexpr, FAR: tl.constexpr, SIDES: tl.constexpr, TRANSPOSED: tl.constexpr,
                BN: tl.constexpr, BK: tl.constexpr):
    """y[i] = sum over lags l of tiles[g, l] @ x[i - l]; with a far field, SIDES = FAR / NEAR > 1, over those in block i's
    far block only, plus i's rows of dft @ mixed[g]. TRANSPOSED: tiles[g, l].T @ x[i + l].

    x: (B, T, C), strided; tiles: (G, num_lags, NEAR, NEAR); mixed: (G, 2 FAR, columns); dft: (FAR, 2 FAR); y: (B, T, C).
    A program makes BN columns of blocks i = j SIDES + side, where j is a column's (far) block and side the program's.
    """
    first, g, side = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if SIDES == 1 and not TRANSPOSED:
        first = tl.num_programs(0) - 1 - first  # programs with the most lags first
    n = first * BN + tl.arange(0, BN)
    inside = n < columns
    row, channel = n // W % B, g * W + n % W
    i = n // W // B * SIDES + side
    x_start = x_ptr + row.to(tl.int64) * stride_b + channel
    p, k = tl.arange(0, NEAR), tl.arange(0, BK)
    # lags up to `reach` exist: blocks before (TRANSPOSED: after) block i, in the row or in its far block
    if SIDES > 1:
        reach = SIDES - 1 - side + i * 0 if TRANSPOSED else side + i * 0
        lags = tl.minimum(num_lags, SIDES - side if TRANSPOSED else side + 1)
    elif TRANSPOSED:
        reach = num_blocks - 1 - i
        lags = tl.minimum(num_lags, num_blocks - first * BN // W // B)
    else:
        reach = i
        lags = tl.minimum(num_lags, (first * BN + BN - 1) // W // B + 1)
    acc = tl.zeros((NEAR, BN), tl.float32)
    for step in range(lags * (NEAR // BK)):
        lag, k0 = step // (NEAR // BK), step % (NEAR // BK) * BK
        tile = tiles_ptr + (g * num_lags + lag) * NEAR * NEAR
        if TRANSPOSED:
            h = tl.load(tile + (k0 + k)[None, :] * NEAR + p[:, None])
            t = ((i + lag) * NEAR)[None, :] + (k0 + k)[:, None]
        else:
            h = tl.load(tile + p[:, None] * NEAR + (k0 + k)[None, :])
            t = ((i - lag) * NEAR)[None, :] + (k0 + k)[:, None]
        x = tl.load(x_start[None, :] + t * stride_t, mask=(inside & (lag <= reach))[None, :] & (t < T), other=0.0)
        acc = tl.dot(h, x, acc, input_precision="ieee")
    if SIDES > 1:
        for k0 in range(0, 2 * FAR, BK):
            h = tl.load(dft_ptr + (side * NEAR + p)[:, None] * (2 * FAR) + (k0 + k)[None, :])
            w = (g * 2 * FAR + k0 + k).to(tl.int64) * columns
            x = tl.load(mixed_ptr + w[:, None] + n[None, :], mask=inside[None, :], other=0.0)
            acc = tl.dot(h, x, acc, input_precision="ieee")
    C = tl.num_programs(1) * W
    t = (i * NEAR)[None, :] + p[:, None]
    y_start = y_ptr + row.to(tl.int64) * T * C + channel
    tl.store(y_start[None, :] + t * C, acc.to(y_ptr.dtype.element_ty), mask=inside[None, :] & (t < T))


@triton.jit
def transform_kernel(x_ptr, dft_ptr, out_ptr, B, T, stride_b, stride_t, columns, W: tl.constexpr, FAR: tl.constexpr,
                     BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """out[g, :, n] = dft @ column n of x in blocks of FAR tokens. x: (B, T, C), strided; dft: (2 FAR, FAR)."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)  # fastest: programs side by side read the same x
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    g = tl.program_id(2)
    inside, k = n < columns, tl.arange(0, BK)
    x_start = x_ptr + (n // W % B).to(tl.int64) * stride_b + g * W + n % W
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, FAR, BK):
        h = tl.load(dft_ptr + m[:, None] * FAR + (k0 + k)[None, :])
        t = (n // W // B * FAR)[None, :] + (k0 + k)[:, None]
        x = tl.load(x_start[None, :] + t * stride_t, mask=inside[None, :] & (t < T), other=0.0)
        acc = tl.dot(h, x, acc, input_precision="ieee")
    w = (g * 2 * FAR + m).to(tl.int64) * columns
    tl.store(out_ptr + w[:, None] + n[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside[None, :])


@triton.jit
def mix_kernel(x_ptr, response_ptr, out_ptr, B, blocks, columns, W: tl.constexpr, FAR: tl.constexpr,
               TRANSPOSED: tl.constexpr, BI: tl.constexpr, BN: tl.constexpr):
    """out[i] = sum over j < i of response[i - j] * x[j] at every frequency w; TRANSPOSED: over j > i of
    conj(response[j - i]) * x[j]. x, out: (G, FAR, 2, blocks, B W); response: (G, FAR, 2, blocks).

    Toeplitz tiles of BI blocks again; column n is column n % (B W) of blocks n // (B W) BI ...
    """
    w, g, first = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    width, line = B * W, ((g * FAR + w) * 2).to(tl.int64) * blocks
    n, p = first * BN + tl.arange(0, BN), tl.arange(0, BI)
    i = (n // width * BI)[None, :] + p[:, None]
    re, im = tl.zeros((BI, BN), tl.float32), tl.zeros((BI, BN), tl.float32)
    if TRANSPOSED:
        lags = tl.cdiv(blocks, BI) - first * BN // width
    else:
        lags = tl.minimum((first * BN + BN - 1) // width + 1, tl.cdiv(blocks, BI))
    for step in range(lags):
        j = i + step * BI if TRANSPOSED else i - step * BI
        lag = step * BI + (p[None, :] - p[:, None] if TRANSPOSED else p[:, None] - p[None, :])
        wanted = (lag > 0) & (lag < blocks)
        dtype = x_ptr.dtype.element_ty
        h_re = tl.load(response_ptr + line + lag, mask=wanted, other=0.0).to(dtype)
        h_im = tl.load(response_ptr + line + blocks + lag, mask=wanted, other=0.0).to(dtype)
        if TRANSPOSED:
            h_im = -h_im
        inside = (j >= 0) & (j < blocks) & (n < columns)[None, :]
        place = x_ptr + line * width + j * width + (n % width)[None, :]
        x_re = tl.load(place, mask=inside, other=0.0)
        x_im = tl.load(place + blocks * width, mask=inside, other=0.0)
        re = tl.dot(h_re, x_re, tl.dot(-h_im, x_im, re, input_precision="ieee"), input_precision="ieee")
        im = tl.dot(h_re, x_im, tl.dot(h_im, x_re, im, input_precision="ieee"), input_precision="ieee")
    inside = (i < blocks) & (n < columns)[None, :]
    place = out_ptr + line * width + i * width + (n % width)[None, :]
    tl.store(place, re.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(place + blocks * width, im.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def tiles_gradient_kernel(u_ptr, dy_ptr, out_ptr, B, T, u_stride_b, u_stride_t, dy_stride_b, dy_stride_t, units, together,
                          units_each, W: tl.constexpr, NEAR: tl.constexpr, BK: tl.constexpr):
    """out[g, l, split] = sum of dy[i] @ u[i - l].T over the split's units_each of all units (block i, row) whose blocks
    i - l and i are among the same `together` blocks. u, dy: (B, T, C), strided; out: (G, lags, splits, NEAR, NEAR), fp32.
    A split without units leaves its tile as it was; fold_kernel does not read it."""
    split, lag, g = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    p, k = tl.arange(0, NEAR), tl.arange(0, BK)
    each = together - lag  # blocks i of those together that have a block i - lag
    last = tl.minimum((split + 1) * units_each, units * each) * W
    if split * units_each * W < last:
        acc = tl.zeros((NEAR, NEAR), tl.float32)
        for n0 in range(split * units_each * W, last, BK):
            n = n0 + k
            block = n // W // B
            i = block // each * together + lag + block % each
            row, channel = (n // W % B).to(tl.int64), g * W + n % W
            t = (i * NEAR)[None, :] + p[:, None]
            dy = tl.load(dy_ptr + (row * dy_stride_b + channel)[None, :] + t * dy_stride_t,
                         mask=(n < last)[None, :] & (t < T), other=0.0)
            s = ((i - lag) * NEAR)[:, None] + p[None, :]
            u = tl.load(u_ptr + (row * u_stride_b + channel)[:, None] + s * u_stride_t,
                        mask=(n < last)[:, None] & (s < T), other=0.0)
            acc = tl.dot(dy, u, acc, input_precision="ieee")
        tile = ((g * tl.num_programs(1) + lag) * tl.num_programs(0) + split).to(tl.int64) * NEAR * NEAR
        tl.store(out_ptr + tile + p[:, None] * NEAR + p[None, :], acc)


@triton.jit
def response_gradient_kernel(x_ptr, dy_ptr, out_ptr, B, blocks, W: tl.constexpr, FAR: tl.constexpr, BI: tl.constexpr,
                             BK: tl.constexpr):
    """Tiles of the gradient of mix_kernel's response: out[g, w, :, l, p, q] = sum over a and columns of
    dy[a BI + p] * conj(x[(a - l) BI + q]). x, dy: (G, FAR, 2, blocks, B W); out: (G, FAR, 2, lags, BI, BI) in fp32."""
    w, g, lag = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    lags, width = tl.num_programs(2), B * W
    line = ((g * FAR + w) * 2).to(tl.int64)
    p, k = tl.arange(0, BI), tl.arange(0, BK)
    re, im = tl.zeros((BI, BI), tl.float32), tl.zeros((BI, BI), tl.float32)
    for n0 in range(0, (lags - lag) * width, BK):
        n = n0 + k
        j = n // width * BI
        i, inside = j + lag * BI, n < (lags - lag) * width
        wanted = inside[None, :] & (i[None, :] + p[:, None] < blocks)
        place = dy_ptr + line * blocks * width + (i * width + n % width)[None, :] + p[:, None] * width
        dy_re = tl.load(place, mask=wanted, other=0.0)
        dy_im = tl.load(place + blocks * width, mask=wanted, other=0.0)
        wanted = inside[:, None] & (j[:, None] + p[None, :] < blocks)
        place = x_ptr + line * blocks * width + (j * width + n % width)[:, None] + p[None, :] * width
        x_re = tl.load(place, mask=wanted, other=0.0)
        x_im = tl.load(place + blocks * width, mask=wanted, other=0.0)
        re = tl.dot(dy_re, x_re, tl.dot(dy_im, x_im, re, input_precision="ieee"), input_precision="ieee")
        im = tl.dot(dy_im, x_re, tl.dot(-dy_re, x_im, im, input_precision="ieee"), input_precision="ieee")
    tile = out_ptr + (line * lags + lag) * BI * BI + p[:, None] * BI + p[None, :]
    tl.store(tile, re)
    tl.store(tile + lags * BI * BI, im)


@triton.jit
def fold_kernel(tiles_ptr, out_ptr, splits, units, together, units_each, SIZE: tl.constexpr, BP: tl.constexpr):
    """Gradient of taps from that of their Toeplitz tiles: out[g, l SIZE + d] = the sum of all entries (p, q) of tiles l
    with p - q = d and of tiles l + 1 with p - q = d - SIZE. tiles: (G, lags, splits, SIZE, SIZE), of whose splits as many
    are there as units (together - l) units need, at units_each a split; out: (G, lags SIZE)."""
    lag, g = tl.program_id(0), tl.program_id(1)
    lags = tl.num_programs(0)
    d, q = tl.arange(0, SIZE), tl.arange(0, BP)
    acc = tl.zeros((BP, SIZE), tl.float32)
    for step in range(tl.cdiv(units * (together - lag), units_each) * (SIZE // BP)):
        split, p = step // (SIZE // BP), step % (SIZE // BP) * BP + q
        q_of = p[:, None] - d[None, :]
        after = (q_of < 0).to(tl.int32)
        there = (lag + after < lags) & (split < tl.cdiv(units * (together - lag - after), units_each))
        tile = ((g * lags + lag + after) * splits + split).to(tl.int64) * SIZE * SIZE
        acc += tl.load(tiles_ptr + tile + p[:, None] * SIZE + q_of + after * SIZE, mask=there, other=0.0)
    tl.store(out_ptr + (g * lags + lag) * SIZE + d, tl.sum(acc, 0))


# -----------------------------------------------------------------------------
# launches


# Columns BN and depth BK of the products, and how they are launched, where a block may have 163 KB of shared memory
# (A100, H100, H200) and where it may have 99 KB (RTX 3090, 4090)
LARGE = dict(BN=256, BK=64, num_warps=8, num_stages=3)
SMALL = dict(BN=128, BK=64, num_warps=4, num_stages=2)


def tile_shapes(device: torch.device) -> dict:
    if device.type == "cpu":  # Triton's interpreter
        return dict(BN=64, BK=min(NEAR, 32))
    return LARGE if torch.cuda.get_device_properties(device).shared_memory_per_block_optin > 160 * 1024 else SMALL


def toeplitz_tiles(taps: Tensor, num_lags: int, dtype: torch.dtype) -> Tensor:
    """(G, K) to (G, num_lags, NEAR, NEAR): entry (l, p, q) is taps[l NEAR + p - q], zero where there is no such tap."""
    taps = taps[:, : num_lags * NEAR].to(dtype)
    taps = F.pad(taps, (NEAR - 1, num_lags * NEAR - taps.size(1)))  # from lag 1 - NEAR on
    return taps.unfold(1, 2 * NEAR - 1, NEAR).unfold(2, NEAR, 1).flip(-1).contiguous()


class Sizes:
    """What launches for u (B, T, C), near taps (G, K) and, with a far field, a response share."""

    def __init__(self, u: Tensor, near: Tensor, far: bool):
        (self.B, self.T, self.C), (self.G, K) = u.shape, near.shape
        self.W = self.C // self.G
        self.sides = FAR // NEAR if far else 1
        self.num_blocks = triton.cdiv(self.T, NEAR)
        self.blocks = triton.cdiv(self.T, NEAR * self.sides)  # a program's columns: blocks x B x W
        self.columns = self.blocks * self.B * self.W
        # the last tap reaches into the tile after its own
        self.num_lags = min(self.sides if far else self.num_blocks, triton.cdiv(K - 1, NEAR) + 1)


def conv(x: Tensor, tiles: Tensor, mixed: Tensor | None, dft: Tensor | None, s: Sizes, transposed: bool) -> Tensor:
    y, shapes = x.new_empty(x.shape), tile_shapes(x.device)
    conv_kernel[triton.cdiv(s.columns, shapes["BN"]), s.G, s.sides](
        x, tiles, mixed, dft, y, s.B, s.T, *x.stride()[:2], s.num_blocks, s.num_lags, s.columns, W=s.W, NEAR=NEAR,
        FAR=FAR, SIDES=s.sides, TRANSPOSED=transposed, **shapes)
    return y


def transform(x: Tensor, dft: Tensor, s: Sizes) -> Tensor:
    """Spectra of blocks of FAR tokens, (G, 2 FAR, columns)."""
    out, shapes = x.new_empty(s.G, 2 * FAR, s.columns), tile_shapes(x.device)
    transform_kernel[2 * FAR // NEAR, triton.cdiv(s.columns, shapes["BN"]), s.G](
        x, dft, out, s.B, s.T, *x.stride()[:2], s.columns, W=s.W, FAR=FAR, BM=NEAR, **shapes)
    return out


def mix_tile(s: Sizes) -> int:
    """Blocks a Toeplitz tile of the mixing has."""
    return 16 if s.blocks <= 16 else 32


def mix(x: Tensor, response: Tensor, s: Sizes, transposed: bool) -> Tensor:
    out, BI = torch.empty_like(x), mix_tile(s)
    columns = triton.cdiv(s.blocks, BI) * s.B * s.W
    BN = min(128, max(16, triton.next_power_of_2(columns)))
    mix_kernel[FAR, s.G, triton.cdiv(columns, BN)](
        x, response, out, s.B, s.blocks, columns, W=s.W, FAR=FAR, TRANSPOSED=transposed, BI=BI, BN=BN)
    return out


def fold(tiles: Tensor, units: int = 1, together: int | None = None, units_each: int | None = None) -> Tensor:
    """(N, lags, splits, SIZE, SIZE) to (N, lags SIZE)."""
    N, lags, splits, SIZE, _ = tiles.shape
    out = tiles.new_empty(N, lags * SIZE)
    fold_kernel[lags, N](tiles, out, splits, units, together or lags, units_each or lags, SIZE=SIZE, BP=min(SIZE, 32))
    return out


def near_gradient(u: Tensor, dy: Tensor, s: Sizes, K: int) -> Tensor:
    together = s.sides if s.sides > 1 else s.num_blocks
    units = triton.cdiv(s.num_blocks, together) * s.B
    # about 1024 programs in all: several for every multiprocessor, and fp32 tiles of 64 MB
    units_each = triton.cdiv(s.G * units * sum(together - lag for lag in range(s.num_lags)), 1024)
    tiles = u.new_empty(s.G, s.num_lags, triton.cdiv(units * together, units_each), NEAR, NEAR, dtype=torch.float32)
    shapes = {name: value for name, value in tile_shapes(u.device).items() if name != "BN"}
    tiles_gradient_kernel[tiles.size(2), s.num_lags, s.G](
        u, dy, tiles, s.B, s.T, *u.stride()[:2], *dy.stride()[:2], units, together, units_each, W=s.W, NEAR=NEAR, **shapes)
    taps = fold(tiles, units, together, units_each)[:, :K]
    return F.pad(taps, (0, K - taps.size(1)))


def response_gradient(spectra: Tensor, dmixed: Tensor, s: Sizes) -> Tensor:
    BI = mix_tile(s)
    lags = triton.cdiv(s.blocks, BI)
    BK = min(128, max(16, triton.next_power_of_2(lags * s.B * s.W)))
    tiles = spectra.new_empty(s.G, FAR, 2, lags, BI, BI, dtype=torch.float32)
    response_gradient_kernel[FAR, s.G, lags](spectra, dmixed, tiles, s.B, s.blocks, W=s.W, FAR=FAR, BI=BI, BK=BK)
    return fold(tiles.flatten(0, 2).unsqueeze(2))[:, : s.blocks].view(s.G, 2 * FAR, s.blocks)


# -----------------------------------------------------------------------------
# the operator, opaque to torch.compile, so that a compiled model stays one graph


@torch.library.custom_op("afno::block_conv", mutates_args=())
def block_conv(u: Tensor, near: Tensor, response: Tensor | None, dft: Tensor, inverse: Tensor) -> Tensor:
    """Causal convolution of u (B, T, C) with taps near (G, K), and in the far field with the taps whose segments'
    spectra are response.

    Without a response all T tokens are near. With one, (G, 2 FAR, blocks), near is for lags inside a block of FAR tokens,
    response[..., l] for blocks l apart (0 for l = 0); dft (2 FAR, FAR) and inverse (FAR, 2 FAR) transform (afno.odd_dft).
    u: bf16, fp16 or fp32, any strides; the others fp32. Returns (B, T, C), contiguous, in u's dtype.
    """
    u = last_dimension_dense(u)
    s = Sizes(u, near, response is not None)
    mixed = None
    if response is not None:
        spectra = transform(u, dft.to(u.dtype).contiguous(), s)
        mixed = mix(spectra, response.contiguous(), s, transposed=False)
    return conv(u, toeplitz_tiles(near, s.num_lags, u.dtype), mixed, inverse.to(u.dtype).contiguous(), s, transposed=False)


@block_conv.register_fake
def _(u, near, response, dft, inverse):
    return u.new_empty(u.shape)


@torch.library.custom_op("afno::block_conv_backward", mutates_args=())
def block_conv_backward(dy: Tensor, u: Tensor, near: Tensor, response: Tensor | None, dft: Tensor,
                        inverse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of u, near and response (empty where there is none): each field's transposed products."""
    u, dy = last_dimension_dense(u), last_dimension_dense(dy)
    s = Sizes(u, near, response is not None)
    dmixed = dspectra = None
    dresponse = near.new_empty(0)
    if response is not None:
        dmixed = transform(dy, inverse.T.to(u.dtype).contiguous(), s)
        dspectra = mix(dmixed, response.contiguous(), s, transposed=True)
        dresponse = response_gradient(transform(u, dft.to(u.dtype).contiguous(), s), dmixed, s)
    tiles = toeplitz_tiles(near, s.num_lags, u.dtype)
    du = conv(dy, tiles, dspectra, dft.T.to(u.dtype).contiguous(), s, transposed=True)
    return du, near_gradient(u, dy, s, near.size(1)), dresponse


@block_conv_backward.register_fake
def _(dy, u, near, response, dft, inverse):
    return u.new_empty(u.shape), near.new_empty(near.shape), near.new_empty(0 if response is None else response.shape)


def save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def backward(ctx, dy):
    du, dnear, dresponse = block_conv_backward(dy, *ctx.saved_tensors)
    return du, dnear, None if ctx.saved_tensors[2] is None else dresponse, None, None


block_conv.register_autograd(backward, setup_context=save_inputs)


def last_dimension_dense(x: Tensor) -> Tensor:
    """x, or a copy where neighbouring channels are not neighbours in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()
