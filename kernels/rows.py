"""Take RowAdam's step in Triton. This file needs Triton; RowAdam does the same without.

A step meets few rows of a table. The gradients of the others are zero: these are read once, and
their weights stay untouched in memory. PyTorch's operations would read and write whole tables.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def row_adam_kernel(p_ptr, g_ptr, square_ptr, rate, share, eps, C, BC: tl.constexpr):
    """Move one row of the weights p (n, C) by its gradient g, and its second moment (n, 1)."""
    row, c = tl.program_id(0), tl.arange(0, BC)
    place, inside = row.to(tl.int64) * C + c, c < C
    gradient = tl.load(g_ptr + place, mask=inside, other=0.0)
    mean = tl.sum(gradient * gradient, 0) / C
    square = tl.load(square_ptr + row)
    square += share * (mean - square)
    tl.store(square_ptr + row, square)
    if mean != 0:  # NaN, too
        p = tl.load(p_ptr + place, mask=inside, other=0.0)
        tl.store(p_ptr + place, p - rate * gradient / (tl.sqrt(square) + eps), mask=inside)


def row_adam(p: Tensor, gradient: Tensor, square: Tensor, lr: float, beta2: float, eps: float):
    """Move the rows of a table p (n, C) in place, and their second moments `square` (n, 1).

    All three are fp32 and contiguous.
    """
    with torch.cuda.device_of(p):
        row_adam_kernel[(len(p),)](p, gradient, square, lr, 1 - beta2, eps, p.size(1),
                                   BC=triton.next_power_of_2(p.size(1)))
