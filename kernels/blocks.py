"""Compute with blocks, as afno.py's plain paths and the kernels both do. No Triton here."""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # tokens of a block of token_conv, and the most taps that a token may have


def odd_dft(block: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the DFT of 2 * block points at the odd frequencies as a pair of real matrices.

    The frequencies are (w + 1/2) / (2 * block) for w < block. They come in conjugate pairs without
    exception, so `block` complex numbers hold 2 * block real points and no bin is special. A
    product of two such spectra is a circular convolution whose wrapped part changes sign. The
    convolutions here use only outputs that nothing wraps into.

    Returns forward (2 * block, 2 * block), whose rows are (w, re/im), and inverse (block, 2 *
    block), which yields the second half of the points alone. Both have the dtype and the device of
    `like`.
    """
    time = torch.arange(2 * block, device=like.device)
    odd = 2 * torch.arange(block, device=like.device) + 1
    # integers first: the phase is exact modulo one turn before it becomes a float
    angle = (torch.outer(odd, time) % (4 * block)).to(like.dtype) * (math.pi / (2 * block))
    forward = torch.stack((angle.cos(), -angle.sin()), 1).view(2 * block, 2 * block)
    return forward, forward.T[block:] / block


def segment_responses(taps: Tensor, forward: Tensor, n: int, b: int) -> Tensor:
    """Return, by frequency, what a block of b tokens sends to the block l later, for l < n.

    taps: (G, K). forward: odd_dft's, for blocks of b. Returns (G, 2b, n), rows (w, re/im). Blocks l
    apart meet at the lags (l - 1) b + 1 ... (l + 1) b - 1. Column l = 0 is zero: a block's own lags
    are no part of it.
    """
    taps = F.pad(taps, (0, max(0, n * b - taps.size(1))))[:, : n * b]
    return F.pad(forward @ taps.unfold(-1, 2 * b, b).mT, (1, 0))


def chunks_remaining(whole: Tensor) -> Tensor:
    """Return how much of the state after chunk j is left where chunk i begins, zero for j >= i.

    whole: (..., n), every chunk's sum of log_a. Returns (..., n, n), exp of the sum over the chunks
    between j and i. Chunk i's own sum is never in it: a later token is a part of that.
    """
    n, end = whole.size(-1), whole.cumsum(-1)
    past = torch.ones(n, n, dtype=torch.bool, device=whole.device).tril(-1)
    until = F.pad(end, (1, -1))[..., None]
    return (until - end[..., None, :]).masked_fill(~past, -math.inf).exp()
