"""Compute the softmax of the loss in Triton, and the transpose that fp8 products need.

This file needs Triton. kernels/loss.py has the loss itself, and the same softmax without Triton.
vocab_size and columns do not change in a run, so Triton may compile for them: plain triton.jit.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def quick_exp(x):
    """Return exp(x), zero below 2^-126. tl.exp keeps such numbers, by three more instructions."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def soft_cap(logits, CAP: tl.constexpr):
    """Return CAP tanh(logits / CAP) in fp32. A CAP of 0 leaves the logits as they are."""
    full = logits.to(tl.float32)
    return full if CAP == 0 else CAP - (2 * CAP) / (1 + tl.exp2(full * (2 * LOG2_E / CAP)))


# Registers let an H100 run two or three such programs a multiprocessor, 27 or 40 MB of rows in
# bf16: its second level cache has 50 MB. Programs of half the size would be four, 53 MB.
SOFTMAX = dict(BV=8192, num_warps=16)


@triton.jit
def cross_entropy_kernel(logits_ptr, gradient_ptr, targets_ptr, shares_ptr, losses_ptr, vocab_size,
                         columns, CAP: tl.constexpr, GRADIENT: tl.constexpr, SCALE: tl.constexpr,
                         K: tl.constexpr, BV: tl.constexpr):
    """Write the losses of one row of logits (rows, columns) for its targets (rows, K).

    With GRADIENT, also write the gradient of sum_k shares_k loss_k by the logits, times SCALE. It
    may take the logits' place. shares: (rows, K). Columns from vocab_size on are padding; their
    gradient is zero. The row is read from memory once. The second time it is still in the cache, if
    not too many rows are under way.
    """
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * columns
    gradient_ptr += row.to(tl.int64) * columns
    targets_ptr += row * K
    shares_ptr += row * K
    losses_ptr += row * K
    for j in tl.static_range(K):  # not yet the losses: the gradient will take the logits' place
        at_target = soft_cap(tl.load(logits_ptr + tl.load(targets_ptr + j)), CAP)
        tl.store(losses_ptr + j, -at_target)
    tl.debug_barrier()  # what one thread has stored, all read
    # Lanes of 8 columns, 16 bytes, in one thread each: it has their maximum and sum without the
    # others until the end. Loads and stores are masked at columns, a multiple of 64; at
    # vocab_size, seldom one, they would be of 2 bytes each.
    k = tl.arange(0, BV // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    # Bounded: then exp of a logit and its sum are numbers in fp32 without a maximum
    BOUNDED: tl.constexpr = CAP > 0 and CAP <= 64
    # no -inf: what is subtracted has to be a number
    largest = tl.full((BV // 8,), 0.0 if BOUNDED else -1e38, tl.float32)
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
    total_share = 0.0
    for j in tl.static_range(K):
        total_share += tl.load(shares_ptr + j)
        at_target = tl.load(losses_ptr + j)
        tl.debug_barrier()
        tl.store(losses_ptr + j, most + at_target + log_total)  # so large logits cost no digits
    if GRADIENT:
        log_sum = most + log_total
        for first in range(0, columns, BV):
            z = soft_cap(tl.load(logits_ptr + first + k, mask=k < columns - first, other=0.0), CAP)
            gradient = total_share * quick_exp(z - log_sum)
            for j in tl.static_range(K):
                target = tl.load(targets_ptr + j).to(tl.int32)
                gradient -= tl.where(k == target - first, tl.load(shares_ptr + j), 0.0)
            if CAP > 0:
                gradient *= 1 - (z * (1 / CAP)) * (z * (1 / CAP))
            gradient = tl.where(k < vocab_size - first, gradient, 0.0)  # of padding
            gradient = (gradient * SCALE).to(gradient_ptr.dtype.element_ty)
            tl.store(gradient_ptr + first + k, gradient, mask=k < columns - first)


def cross_entropy(logits: Tensor, targets: Tensor, shares: Tensor, vocab_size: int,
                  with_gradient: bool, cap: float = 0.0,
                  fp8_scale: float = 0.0) -> tuple[Tensor, Tensor | None]:
    """Return what loss.cross_entropy_chunk returns.

    A gradient in the logits' dtype takes the logits' place in memory, (rows, columns).
    """
    losses = logits.new_empty(targets.shape, dtype=torch.float32)
    gradient = torch.empty_like(logits, dtype=torch.float8_e5m2) if fp8_scale else logits
    with torch.cuda.device_of(logits):
        cross_entropy_kernel[(len(logits),)](
            logits, gradient, targets.contiguous(), shares.contiguous(), losses, vocab_size,
            logits.size(1), CAP=float(cap), GRADIENT=with_gradient, SCALE=float(fp8_scale or 1),
            K=targets.size(1), **SOFTMAX)
    return losses, gradient if with_gradient else None


@triton.jit
def transpose_kernel(x_ptr, y_ptr, M, N, BLOCK: tl.constexpr):
    """Write y (N, M), the transpose of x (M, N), both dense."""
    m = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = (m[:, None] < M) & (n[None, :] < N)
    x = tl.load(x_ptr + m[:, None] * N + n[None, :], mask=inside, other=0)
    inside = (n[:, None] < N) & (m[None, :] < M)
    tl.store(y_ptr + n[:, None] * M + m[None, :], tl.trans(x), mask=inside)


def transposed(x: Tensor) -> Tensor:
    """Return the transpose (N, M) of x (M, N), much faster than torch's copy.

    x is dense and has one byte a number.
    """
    (M, N), y = x.shape, x.new_empty(x.shape[::-1])
    with torch.cuda.device_of(x):
        transpose_kernel[triton.cdiv(N, 128), triton.cdiv(M, 128)](
            x.view(torch.int8), y.view(torch.int8), M, N, BLOCK=128, num_warps=8)
    return y
