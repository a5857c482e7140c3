"""Compute the scan S_t = a_t S_(t-1) + k_t v_t^T, y_t = q_t S_t in Triton, with gradients.

`state_scan(q, k, v, log_a)` is bitwise causal. This file needs Triton; afno.py computes the same
sums without. A row is cut into chunks of CHUNK = 64 tokens. A program works for one chunk of one
head. Three steps make the output:

    sent_kernel     sent_j, what the tokens of chunk j add to the state, as it is at the chunk's end
    a product       state_i, the state where chunk i begins: the sum of remains[i, j] sent_j, j < i
    state_kernel    y: attention without a softmax inside the chunk, and what state_i adds to it

Here is the matrix `remains` (blocks.chunks_remaining); a_j is what chunk j leaves of a state:

                  sent_0    sent_1    sent_2    sent_3
      state_0       0         0         0         0
      state_1       1         0         0         0
      state_2      a_1        1         0         0
      state_3    a_1 a_2     a_2        1         0

Inside a chunk, the shares of later tokens are exact zeros. The backward pass runs the same chain
from the other end: dsent is the gradient of what was sent.

What remains of a number from token s to token t is exp(log_a_(s+1) + ... + log_a_t). `since` and
`until` are such sums of log_a, in fp32. `since` goes from the chunk's beginning to each token,
`until` from each token to the chunk's end.
"""
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels import operator, save_inputs
from kernels.blocks import chunks_remaining
from kernels.compiled import jit

CHUNK = 64  # tokens


def heads_dense(x: Tensor) -> Tensor:
    """Return x (B, T, G, size), or a copy where heads are not side by side in memory."""
    return x if x.stride()[2:] == (x.size(3), 1) else x.contiguous()


def launch(kernel, q: Tensor, v: Tensor, pointers: tuple[Tensor, ...], strided: tuple[Tensor, ...],
           **options):
    """Run `kernel` with one program for every chunk of every head of every row.

    It gets `pointers`, T, the first two strides of each tensor in `strided`, D and W. q: (B, T, G,
    D); v: (B, T, G, W).
    """
    (B, T, G, D), W = q.shape, v.size(3)
    DP, WP = (max(16, triton.next_power_of_2(size)) for size in (D, W))
    strides = [stride for x in strided for stride in x.stride()[:2]]
    kernel[triton.cdiv(T, CHUNK), G, B](
        *pointers, T, *strides, D, W, L=CHUNK, DP=DP, WP=WP, **options)


# -----------------------------------------------------------------------------
# loads that the kernels share


@jit
def load_heads(x_ptr, g, b, t, T, first, size, stride_b, stride_t, SIZE: tl.constexpr):
    """Return x[b, t, g, first:], (tokens, SIZE), zero beyond T and beyond size.

    x: (B, T, G, size), heads side by side in memory.
    """
    d = first + tl.arange(0, SIZE)
    x_ptr += b.to(tl.int64) * stride_b + g * size
    return tl.load(x_ptr + t.to(tl.int64)[:, None] * stride_t + d[None, :],
                   mask=(t < T)[:, None] & (d < size)[None, :], other=0.0)


@jit
def state_places(x_ptr, ahead, first, D, W, DP: tl.constexpr, WP: tl.constexpr):
    """Return pointers (DP, WP) to a chunk's state, and which of them are valid.

    The chunk is `ahead` chunks after the program's own. States are (B, G, chunks, D, W). Columns
    begin at `first`.
    """
    chunk = tl.program_id(0) + ahead
    n = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    n = n * tl.num_programs(0) + chunk
    d, w = tl.arange(0, DP), first + tl.arange(0, WP)
    inside = (d < D)[:, None] & (w < tl.where(chunk < tl.num_programs(0), W, 0))[None, :]
    return x_ptr + n * D * W + d[:, None] * W + w[None, :], inside


@jit
def load_state(x_ptr, ahead, first, D, W, DP: tl.constexpr, WP: tl.constexpr):
    """Return the numbers at state_places, (DP, WP), zero where a pointer is not valid."""
    places, inside = state_places(x_ptr, ahead, first, D, W, DP, WP)
    return tl.load(places, mask=inside, other=0.0)


@jit
def load_log_a(log_a_ptr, g, b, t, T):
    """Return (since, until), logarithms of what remains, (tokens,) each.

    since: of the chunk's beginning at each token; until: of each token at the chunk's end. log_a:
    (B, T, G), contiguous.
    """
    place = (b.to(tl.int64) * T + t) * tl.num_programs(1) + g
    log_a = tl.load(log_a_ptr + place, mask=t < T, other=0.0)
    since = tl.cumsum(log_a, 0)
    return since, tl.sum(log_a, 0) - since


@jit
def remains_inside(since, t):
    """Return what remains of token s at token t of the chunk, (t, s), exact zeros for s > t."""
    between = since[:, None] - since[None, :]
    return tl.exp(tl.where(t[:, None] >= t[None, :], between, -float("inf")))


# -----------------------------------------------------------------------------
# forward


@jit
def sent_kernel(x_ptr, y_ptr, log_a_ptr, out_ptr, T, x_stride_b, x_stride_t, y_stride_b,
                y_stride_t, D, W, FROM_START: tl.constexpr, L: tl.constexpr, DP: tl.constexpr,
                WP: tl.constexpr):
    """Write out[b, g, chunk] = sum over the chunk's tokens of decay x y^T.

    decay is what remains of the token at the chunk's end. With FROM_START it is what remains of the
    chunk's beginning at the token. x: (B, T, G, D); y: (B, T, G, W); log_a: (B, T, G), fp32; out:
    (B, G, chunks, D, W).
    """
    g, b = tl.program_id(1), tl.program_id(2)
    t = tl.program_id(0) * L + tl.arange(0, L)
    since, until = load_log_a(log_a_ptr, g, b, t, T)
    x = load_heads(x_ptr, g, b, t, T, 0, D, x_stride_b, x_stride_t, DP)
    y = load_heads(y_ptr, g, b, t, T, 0, W, y_stride_b, y_stride_t, WP)
    x = (x * tl.exp(since if FROM_START else until)[:, None]).to(y.dtype)
    out = tl.dot(tl.trans(x), y, input_precision="ieee")
    places, inside = state_places(out_ptr, 0, 0, D, W, DP, WP)
    tl.store(places, out.to(out_ptr.dtype.element_ty), mask=inside)


def remaining(log_a: Tensor, dtype: torch.dtype) -> Tensor:
    """Return chunks_remaining of log_a (B, T, G): (B, G, n, n) in `dtype`, for n chunks."""
    n = triton.cdiv(log_a.size(1), CHUNK)
    padded = F.pad(log_a, (0, 0, 0, n * CHUNK - log_a.size(1)))
    return chunks_remaining(padded.unflatten(1, (n, CHUNK)).sum(2).mT).to(dtype)


def chunk_states(x: Tensor, y: Tensor, log_a: Tensor, remains: Tensor, transposed: bool) -> Tensor:
    """Return the states where chunks begin, (B, G, n, D, W), from what each chunk sends.

    x is k, (B, T, G, D), and y is v, (B, T, G, W). remains: (B, G, n, n). With transposed, x is q
    and y is dy. Then the result is the gradient of what each chunk sends, from that of the states.
    """
    (B, T, G, D), W = x.shape, y.size(3)
    sent = y.new_empty(B, G, triton.cdiv(T, CHUNK), D, W)
    launch(sent_kernel, x, y, (x, y, log_a, sent), (x, y), FROM_START=transposed)
    return ((remains.mT if transposed else remains) @ sent.flatten(3)).view_as(sent)


@jit
def state_kernel(q_ptr, k_ptr, v_ptr, log_a_ptr, state_ptr, y_ptr, T, q_stride_b, q_stride_t,
                 k_stride_b, k_stride_t, v_stride_b, v_stride_t, D, W, L: tl.constexpr,
                 DP: tl.constexpr, WP: tl.constexpr):
    """Write y_t = begin_t q_t state + sum over s <= t of remains[t, s] (q_t k_s) v_s.

    s and t are tokens of the chunk. begin_t is what remains of the chunk's beginning at t. state:
    (B, G, chunks, D, W), where chunks begin; q, k: (B, T, G, D); v, y: (B, T, G, W).
    """
    g, b = tl.program_id(1), tl.program_id(2)
    t = tl.program_id(0) * L + tl.arange(0, L)
    since, _ = load_log_a(log_a_ptr, g, b, t, T)
    q = load_heads(q_ptr, g, b, t, T, 0, D, q_stride_b, q_stride_t, DP)
    k = load_heads(k_ptr, g, b, t, T, 0, D, k_stride_b, k_stride_t, DP)
    v = load_heads(v_ptr, g, b, t, T, 0, W, v_stride_b, v_stride_t, WP)
    state = load_state(state_ptr, 0, 0, D, W, DP, WP)
    remains = remains_inside(since, t)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * remains
    y = tl.dot(q, state, input_precision="ieee") * tl.exp(since)[:, None]
    y = tl.dot(scores.to(v.dtype), v, y, input_precision="ieee")
    w = tl.arange(0, WP)
    y_ptr += ((b.to(tl.int64) * T + t) * tl.num_programs(1) + g)[:, None] * W + w[None, :]
    tl.store(y_ptr, y.to(y_ptr.dtype.element_ty), mask=(t < T)[:, None] & (w < W)[None, :])


# -----------------------------------------------------------------------------
# backward

# Columns of values and states at a time, for sums and products to fit into registers and shared
# memory
VALUES = tl.constexpr(32)
# Its sums and products would not fit into the registers of four warps; no second copy of what a
# loop loads
STATE_GRADIENT = dict(num_warps=8, num_stages=1)


@jit
def state_gradient_kernel(dy_ptr, q_ptr, k_ptr, v_ptr, log_a_ptr, state_ptr, dsent_ptr, dq_ptr,
                          dk_ptr, dv_ptr, dlog_a_ptr, T, dy_stride_b, dy_stride_t, q_stride_b,
                          q_stride_t, k_stride_b, k_stride_t, v_stride_b, v_stride_t, D, W,
                          L: tl.constexpr, DP: tl.constexpr, WP: tl.constexpr):
    """Write the gradients of q, k, v and log_a.

    state: (B, G, chunks, D, W), where chunks begin; dsent: likewise, the gradient of what chunks
    send.

    log_a acts through its sums c_t up to token t. The gradient of c_t is q_t dq_t - k_t dk_t: what
    a token reads has c_t with a plus, what it writes has it with a minus. A token's log_a is in the
    sums of all tokens from it on. For tokens of its own chunk their gradients are added up. All
    later tokens read through the state where the next chunk begins. They add that state times its
    gradient, which is dsent.
    """
    g, b = tl.program_id(1), tl.program_id(2)
    t = tl.program_id(0) * L + tl.arange(0, L)
    since, until = load_log_a(log_a_ptr, g, b, t, T)
    remains = remains_inside(since, t)
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
    dq, dk = tl.zeros((L, DP), tl.float32), tl.zeros((L, DP), tl.float32)
    later = tl.zeros((DP,), tl.float32)
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
        inside = (t < T)[:, None] & (w < W)[None, :]
        tl.store(dv_ptr + place[:, None] * W + w[None, :], dv.to(dtype), mask=inside)
        next_state = load_state(state_ptr, 1, first, D, W, DP, WB)
        later += tl.sum(next_state.to(tl.float32) * dsent.to(tl.float32), 1)
    dq = tl.dot(dscores, k, dq * since, input_precision="ieee")
    dk = tl.dot(tl.trans(dscores), q, dk * until, input_precision="ieee")
    d = tl.arange(0, DP)
    inside = (t < T)[:, None] & (d < D)[None, :]
    tl.store(dq_ptr + place[:, None] * D + d[None, :], dq.to(dtype), mask=inside)
    tl.store(dk_ptr + place[:, None] * D + d[None, :], dk.to(dtype), mask=inside)
    dlog_a = tl.sum(later, 0) + tl.cumsum(tl.sum(q * dq - k * dk, 1), 0, reverse=True)
    tl.store(dlog_a_ptr + place, dlog_a, mask=t < T)


# -----------------------------------------------------------------------------
# the operator, opaque to torch.compile


@operator("state_scan")
def state_scan(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor) -> Tensor:
    """Return the scan's y (B, T, G, W), contiguous, in v's dtype.

    q, k: (B, T, G, D) and v: (B, T, G, W) in bf16, fp16 or fp32, any strides; log_a: (B, T, G) in
    fp32, at most zero.
    """
    with torch.cuda.device_of(v):
        (q, k, v), log_a = map(heads_dense, (q, k, v)), log_a.contiguous()
        y = v.new_empty(v.shape)
        state = chunk_states(k, v, log_a, remaining(log_a, v.dtype), transposed=False)
        launch(state_kernel, q, v, (q, k, v, log_a, state, y), (q, k, v))
        return y


@torch.library.register_fake(state_scan)
def _(q, k, v, log_a):
    return v.new_empty(v.shape)


@operator("state_scan_backward")
def state_scan_backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor,
                        log_a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and log_a, shaped as these; dy: (B, T, G, W)."""
    with torch.cuda.device_of(v):
        (dy, q, k, v), log_a = map(heads_dense, (dy, q, k, v)), log_a.contiguous()
        remains = remaining(log_a, v.dtype)
        state = chunk_states(k, v, log_a, remains, transposed=False)
        dsent = chunk_states(q, dy, log_a, remains, transposed=True)
        gradients = tuple(x.new_empty(x.shape) for x in (q, k, v, log_a))
        launch(state_gradient_kernel, q, v, (dy, q, k, v, log_a, state, dsent, *gradients),
               (dy, q, k, v), **STATE_GRADIENT)
        return gradients


@torch.library.register_fake(state_scan_backward)
def _(dy, q, k, v, log_a):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, log_a))


def backward(ctx, dy):
    return state_scan_backward(dy, *ctx.saved_tensors)


torch.library.register_autograd(state_scan, backward, setup_context=save_inputs)
