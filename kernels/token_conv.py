"""Convolve with taps of each token's own, in Triton, forward and backward.

`token_conv(u, w)` is y[t] = sum over lags j < K of w[t, j] u[t - j]. One set of taps serves the W
channels of a group. This file needs Triton; afno.py computes the same sums without.

Blocks of BLOCK tokens meet themselves and the block before, which K <= BLOCK taps reach. The taps
of a block's tokens make a band matrix, so that tensor cores do the work. Here K = 3, t is a token
of the block, s one that it reads:

               s: t0-2   t0-1     t0    t0+1   t0+2
      t0        w[t0,2] w[t0,1] w[t0,0]   0      0       Entry (t, s) is w[t, t - s], and an exact
      t0+1         0    w[.,2]  w[.,1]  w[.,0]   0       zero where s > t: a token reads no later
      t0+2         0       0    w[.,2]  w[.,1] w[.,0]    one, bit for bit, where inputs are finite.

Operands have the input's dtype, and sums are in fp32. There are no atomics: equal inputs give equal
bits.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import operator, save_inputs
from kernels.blocks import BLOCK
from kernels.compiled import jit


@jit
def load_tokens(x_ptr, row, t, first, W: tl.constexpr, T, C, BW: tl.constexpr):
    """Return x[row, t, first ... first + W - 1], (BLOCK, BW), zero beyond the row and the group."""
    c = tl.arange(0, BW)
    inside = ((t >= 0) & (t < T))[:, None] & (c < W)[None, :]
    place = (row * T + t)[:, None] * C + (first + c)[None, :]
    return tl.load(x_ptr + place, mask=inside, other=0.0)


@jit
def store_tokens(x_ptr, x, row, t, first, W: tl.constexpr, T, C, BW: tl.constexpr):
    """Write x, (BLOCK, BW), to x_ptr[row, t, first ... first + W - 1], for t >= 0."""
    c = tl.arange(0, BW)
    place = (row * T + t)[:, None] * C + (first + c)[None, :]
    tl.store(x_ptr + place, x.to(x_ptr.dtype.element_ty),
             mask=(t < T)[:, None] & (c < W)[None, :])


@jit
def tap_places(row, t, s, g, T, stride, LENGTH: tl.constexpr):
    """Return where w[row, t, g, t - s] stands, (BLOCK, BLOCK), and whether t - s is a lag.

    Tokens of w are `stride` numbers apart.
    """
    lag = t[:, None] - s[None, :]
    place = ((row * T + t) * stride + g * LENGTH)[:, None] + lag
    return place, (lag >= 0) & (lag < LENGTH) & (t < T)[:, None]


@jit
def token_conv_kernel(u_ptr, w_ptr, y_ptr, T, C, w_stride, LENGTH: tl.constexpr, W: tl.constexpr,
                      BLOCK: tl.constexpr, BW: tl.constexpr):
    """Write y[t] = sum over s of w[t, t - s] u[s].

    u, y: (B, T, C); w: (B, T, G, K).
    """
    g, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BW), tl.float32)
    for back in tl.static_range(2):
        s = t - back * BLOCK
        place, wanted = tap_places(row, t, s, g, T, w_stride, LENGTH)
        taps = tl.load(w_ptr + place, mask=wanted, other=0.0)
        u = load_tokens(u_ptr, row, s, g * W, W, T, C, BW)
        acc = tl.dot(taps, u, acc, input_precision="ieee")
    store_tokens(y_ptr, acc, row, t, g * W, W, T, C, BW)


@jit
def token_conv_gradient_kernel(dy_ptr, u_ptr, w_ptr, du_ptr, dw_ptr, T, C, w_stride,
                               LENGTH: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
                               BW: tl.constexpr):
    """Write du[s] = sum over t of w[t, t - s] dy[t], and dw[t, t - s] = dy[t] u[s].

    dw is summed over the channels of a group. dy, u, du: (B, T, C); w, dw: (B, T, G, LENGTH), dw
    contiguous.
    """
    g, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dy = load_tokens(dy_ptr, row, t, g * W, W, T, C, BW)
    for back in tl.static_range(2):
        s = t - back * BLOCK
        place, wanted = tap_places(row, t, s, g, T, tl.num_programs(1) * LENGTH, LENGTH)
        u = load_tokens(u_ptr, row, s, g * W, W, T, C, BW)
        products = tl.dot(dy, tl.trans(u), input_precision="ieee")
        tl.store(dw_ptr + place, products.to(dw_ptr.dtype.element_ty), mask=wanted)
    acc = tl.zeros((BLOCK, BW), tl.float32)
    for ahead in tl.static_range(2):
        later = t + ahead * BLOCK
        place, wanted = tap_places(row, later, t, g, T, w_stride, LENGTH)
        taps = tl.load(w_ptr + place, mask=wanted, other=0.0)
        dy = load_tokens(dy_ptr, row, later, g * W, W, T, C, BW)
        acc = tl.dot(tl.trans(taps), dy, acc, input_precision="ieee")
    store_tokens(du_ptr, acc, row, t, g * W, W, T, C, BW)


def launch(run, u: Tensor, w: Tensor, *tensors: Tensor):
    """Run the kernel `run` on `tensors`, sized for u (B, T, C) and w (B, T, G, K)."""
    B, T, C = u.shape
    G, K = w.shape[2:]
    with torch.cuda.device_of(u):  # Triton launches on the current device
        run[triton.cdiv(T, BLOCK), G, B](*tensors, T, C, w.stride(1), LENGTH=K, W=C // G,
                                         BLOCK=BLOCK, BW=max(16, triton.next_power_of_2(C // G)))


def tokens_dense(w: Tensor) -> Tensor:
    """Return w (B, T, G, K), or a copy where a token's taps or a row's tokens are not in order."""
    B, T, _, K = w.shape
    dense = w.stride()[2:] == (K, 1) and (B == 1 or w.stride(0) == T * w.stride(1))
    return w if dense else w.contiguous()


@operator("token_conv")
def token_conv(u: Tensor, w: Tensor) -> Tensor:
    """Return u (B, T, C) convolved with each token's own taps w (B, T, G, K), in u's dtype.

    w has u's dtype; K is at most BLOCK.
    """
    u, w = u.contiguous(), tokens_dense(w)
    y = torch.empty_like(u)
    launch(token_conv_kernel, u, w, u, w, y)
    return y


@torch.library.register_fake(token_conv)
def _(u, w):
    return u.new_empty(u.shape)


@operator("token_conv_backward")
def token_conv_backward(dy: Tensor, u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of u and of w."""
    dy, u, w = dy.contiguous(), u.contiguous(), tokens_dense(w)
    du, dw = torch.empty_like(u), w.new_empty(w.shape)
    launch(token_conv_gradient_kernel, u, w, dy, u, w, du, dw)
    return du, dw


@torch.library.register_fake(token_conv_backward)
def _(dy, u, w):
    return u.new_empty(u.shape), w.new_empty(w.shape)


torch.library.register_autograd(
    token_conv, lambda ctx, dy: token_conv_backward(dy, *ctx.saved_tensors),
    setup_context=save_inputs)
