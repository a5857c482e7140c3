"""Compute the loss of a language model's head without holding all logits, and products in fp8.

This file imports without Triton. `linear_cross_entropy` is the loss; it takes Triton's softmax
(kernels/softmax.py) where kernels.usable says so. `Fp8Linear` is a linear layer whose product is
in fp8.

What fp8 is. A number of 8 bits, in two formats. float8_e4m3fn has 3 bits of mantissa, so it rounds
by up to 1/16. It reaches from 2^-9 to 448. float8_e5m2 has 2 bits, so it rounds by up to 1/8. It
reaches from 2^-16 to 57,344. GPUs have fp8 from compute capability 8.9 on. They multiply fp8
matrices twice as fast as bf16 ones, with sums in fp32 (Micikevicius et al., 2022, "FP8 formats for
deep learning"). The head's logits alone are summed by use_fast_accum, which is faster and keeps
fewer digits.

Which tensors. Only in training, and only in two layers: the head (x @ w.T with its 50,000 rows of
w) and the MLPs' first layer. Weights stay in fp32 and are rounded anew in every step.

    product                      first operand         second operand        made by
    y  = x @ w.T                 x    e4m3             w    e4m3             both
    dx = dy @ w                  dy   e5m2             w    e4m3             both
    dw = dy.T @ x                dy   e5m2             x    e4m3             the head alone
    dw = dy.T @ x                dy   bf16             x    bf16             Fp8Linear

Activations and weights need digits, so they get e4m3. Gradients need range, so they get e5m2.
Fp8Linear leaves dw in bf16: fp8 would want both of its operands transposed in memory.

Which scales. fp8's range is narrow, so a tensor is multiplied before it is rounded, and the
product is divided afterwards. Every scale is a constant, or comes from the weight:

    x     448 / sqrt(C)      rows come from rmsnorm. Their mean square is at most 1, so no number
                             exceeds sqrt(C) and none is cut off. (fp8_rows)
    w     448 / max |w|      the weight is the same for all tokens. (fp8_weight)
    dy    2^15 at the head   the gradient of one logit is at most 1, before the mean over tokens.
                             (Fp8HeadProducts)
    dy    1024 N             in Fp8Linear, for N tokens. Its numbers are about 1e-3 / N, the largest
                             seen 0.2 / N. Larger ones become the largest that e5m2 has.

Why not the usual scale, which is made from the largest number in the batch. The largest number may
be in a later token. It would change how an earlier token is rounded. The future would leak into the
past, if by rounding alone, and the causality check compares bits. In the same way padding or a
second row in a batch would change the result.

What it costs. A product is 4 to 6% off in norm, without a bias: rounding errors have no sign in
common. kernels.usable("fp8", ...) tries it on the device against float64 before it is trusted.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import usable


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that a product with x will use: autocast's where it is on, else x's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


# -----------------------------------------------------------------------------
# products in fp8


def fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x (N, C) in float8_e4m3fn, and the scale that it is to be multiplied by.

    Every row's root mean square must be at most 1, as rmsnorm makes it.
    """
    up = torch.finfo(torch.float8_e4m3fn).max / math.sqrt(x.size(1))
    return (x * up).to(torch.float8_e4m3fn), torch.full((), 1 / up, device=x.device)


def fp8_weight(w: Tensor) -> tuple[Tensor, Tensor]:
    """Return w in float8_e4m3fn, and the scale that it is to be multiplied by.

    The largest |w| becomes the largest number of fp8.
    """
    scale = w.abs().amax().float().clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return (w / scale).to(torch.float8_e4m3fn), scale


def fp8_product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype,
                use_fast_accum: bool = False) -> Tensor:
    """Return a @ b times both scales, in dtype.

    a lies in memory by rows, b by columns: the one order that all tensor cores take. Sizes are
    multiples of 16. On a CPU, for tests, the product is made in fp32.
    """
    if a.is_cuda:
        return torch._scaled_mm(a, b, scale_a=a_scale, scale_b=b_scale, out_dtype=dtype,
                                use_fast_accum=use_fast_accum)
    with torch.autocast(a.device.type, enabled=False):  # torch 2.13's on CPUs takes e5m2 for e4m3
        return (a.float() @ b.float() * (a_scale * b_scale)).to(dtype)


class Fp8Linear(torch.autograd.Function):
    """Compute x @ w.T in x's dtype; x: (N, C), rows as fp8_rows wants them; w: (M, C).

    This and the gradient of x are made in fp8, the gradient of w in x's dtype.
    """

    @staticmethod
    def forward(ctx, x, w):
        (x8, x_scale), (w8, w_scale) = fp8_rows(x), fp8_weight(w)
        ctx.save_for_backward(x, w8, w_scale)
        ctx.w_dtype = w.dtype
        return fp8_product(x8, w8.T, x_scale, w_scale, x.dtype)

    @staticmethod
    def backward(ctx, g):
        x, w8, w_scale = ctx.saved_tensors
        # Times the tokens of a mean loss, gradients are some 1e-3, the largest 0.2 (a d4's first 50
        # steps). That leaves room for gradient accumulation, by which they are smaller.
        up, top = 1024.0 * len(x), torch.finfo(torch.float8_e5m2).max
        g8 = (g.float() * up).clamp(-top, top).to(torch.float8_e5m2)
        g_scale = torch.full((), 1 / up, device=g.device)
        dx = fp8_product(g8, w8.T.contiguous().T, g_scale, w_scale, x.dtype)
        return dx, (g.T @ x).to(ctx.w_dtype)


# -----------------------------------------------------------------------------
# the head's products


class HeadProducts:
    """Make the products of the head w (V, C) with some rows, `part`, of hidden states x (N, C).

    They are the logits, and the gradients of x and w from those of the logits. All are of one
    dtype.
    """

    gradient_scale = 0.0  # of the logits' gradients: none

    def __init__(self, x: Tensor, w: Tensor):
        self.x, self.w = x, w

    def logits(self, part: slice) -> Tensor:
        return self.x[part] @ self.w.T

    def gradients(self, part: slice, dlogits: Tensor) -> tuple[Tensor, Tensor]:
        return dlogits @ self.w, dlogits.T @ self.x[part]


class Fp8HeadProducts(HeadProducts):
    """Make HeadProducts' products in fp8, for rows x as fp8_rows wants them."""

    gradient_scale = 2.0**15

    def __init__(self, x: Tensor, w: Tensor):
        self.dtype = x.dtype
        (self.x, self.x_scale), (self.w, self.w_scale) = fp8_rows(x), fp8_weight(w)
        self.g_scale = torch.full((), 1 / self.gradient_scale, device=x.device)
        self.w_columns = self.columns(self.w)

    def logits(self, part: slice) -> Tensor:
        return fp8_product(self.x[part], self.w.T, self.x_scale, self.w_scale, self.dtype,
                           use_fast_accum=True)

    def gradients(self, part: slice, dlogits: Tensor) -> tuple[Tensor, Tensor]:
        dx = fp8_product(dlogits, self.w_columns, self.g_scale, self.w_scale, self.dtype)
        dlogits, x = self.columns(dlogits).T, self.columns(self.x[part])
        return dx, fp8_product(dlogits, x, self.g_scale, self.x_scale, self.dtype)

    @staticmethod
    def columns(x: Tensor) -> Tensor:
        """Return x, by columns in memory."""
        if not x.is_cuda:
            return x.T.contiguous().T
        from kernels import softmax  # needs Triton

        return softmax.transposed(x).T


# -----------------------------------------------------------------------------
# the loss


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """Return cap tanh(logits / cap), which is within +-cap.

    A cap of 0 changes no number. bf16 logits become fp32.
    """
    full = logits.float() if logits.dtype == torch.bfloat16 else logits
    return cap * torch.tanh(full / cap) if cap else full


def cross_entropy_chunk(logits: Tensor, targets: Tensor, shares: Tensor, vocab_size: int,
                        with_gradient: bool, cap: float = 0.0,
                        fp8_scale: float = 0.0) -> tuple[Tensor, Tensor | None]:
    """Return the losses of some rows' targets, (rows, K), and a gradient of the logits, or None.

    logits: (rows, at least vocab_size), columns beyond are padding; targets and shares: (rows, K).
    The gradient is that of sum_k shares_k loss_k: (softmax(capped logits) sum_k shares_k, less
    shares_k at target k) times soft_cap's slope. Its dtype is the logits'. With fp8_scale > 0 it is
    multiplied by that and is float8_e5m2.
    """
    capped = soft_cap(logits[:, :vocab_size], cap)
    log_prob = F.log_softmax(capped, -1)
    losses = -log_prob.gather(1, targets)
    if not with_gradient:
        return losses, None
    gradient = log_prob.exp_().mul_(shares.sum(1, keepdim=True))
    gradient.scatter_add_(1, targets, -shares)
    if cap:
        gradient *= 1 - (capped / cap).square()
    gradient = gradient.to(logits.dtype)
    if padding := logits.size(1) - vocab_size:
        gradient = F.pad(gradient, (0, padding))
    return losses, (gradient * fp8_scale).to(torch.float8_e5m2) if fp8_scale else gradient


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, cap: float = 0.0,
                         fp8: bool = False, chunk_function=cross_entropy_chunk,
                         shares: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy of soft_cap(x @ weight.T), and every target's.

    The targets' have no gradient. x: (N, C); weight: (vocab_size, C); targets: (N,), or (N, K) with
    shares (K,). Shares weigh a row's losses in the mean. A target of -1 does not count. A row whose
    first target is -1 does not count at all. fp8 holds only where gradients are made. It wants rows
    as fp8_rows does, and a multiple of 16 of them. Where Triton's kernel is not usable,
    chunk_function makes the losses, such as a compiled cross_entropy_chunk.
    """
    if usable("loss", x.device, product_dtype(x))[0]:
        from kernels import softmax

        chunk_function = softmax.cross_entropy
    training = torch.is_grad_enabled()
    shares = torch.ones(1, device=x.device) if shares is None else shares
    mean, losses = LinearCrossEntropy.apply(x, weight, targets.view(len(x), -1), shares,
                                            chunk_function, training, cap, fp8 and training)
    return mean, losses.view(targets.shape)


class LinearCrossEntropy(torch.autograd.Function):
    """Compute linear_cross_entropy by chunks of rows, never all (N, vocab_size) logits at once.

    The gradient of a mean cross-entropy needs nothing from above but one factor. So forward
    computes it along with the loss, and backward only scales it. Products are in autocast's dtype
    where it is on. The softmax is in fp32, for float64 in float64. For fp8, see Fp8HeadProducts.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, shares, chunk_function, with_gradient, cap=0.0, fp8=False):
        vocab_size, dtype = weight.size(0), product_dtype(x)
        # The stored vocabulary is not padded, the operand is: tensor cores want rows of aligned
        # length. On a CPU, small chunks instead: 96 rows of logits (19 MB) stay below what malloc
        # returns to the system each time, and page faults would cost as much as the arithmetic.
        padding, rows = (-vocab_size % 64, 8192) if x.is_cuda else (0, 96)
        w = F.pad(weight.to(dtype), (0, 0, 0, padding)) if padding else weight.to(dtype)
        losses_dtype = torch.promote_types(x.dtype, torch.float32)
        losses = torch.empty(targets.shape, dtype=losses_dtype, device=x.device)
        # (N, 1), a factor of 0 for rows that do not count. They are zeros in the products: so they
        # add nothing to the gradient of w.
        counts = (targets[:, :1] >= 0).to(losses.dtype)
        shares = (targets >= 0) * counts * shares.to(losses.dtype)  # (N, K)
        products = (Fp8HeadProducts if fp8 else HeadProducts)((x * counts.to(x.dtype)).to(dtype), w)
        # somebody wants them; autograd says so under no_grad, too
        wanted = with_gradient and any(ctx.needs_input_grad[:2])
        dx, dw = (torch.empty_like(x), torch.zeros_like(weight)) if wanted else (None, None)
        for i in range(0, x.size(0), rows):
            part = slice(i, i + rows)
            losses[part], dlogits = chunk_function(
                products.logits(part), targets[part].clamp(min=0), shares[part], vocab_size,
                with_gradient, cap, products.gradient_scale)
            if wanted:
                dx[part], dw_part = products.gradients(part, dlogits)
                dw += dw_part[:vocab_size]
        count = counts.sum().clamp(min=1)
        if wanted:
            ctx.save_for_backward(dx.mul_(counts).div_(count), dw.div_(count))
        ctx.mark_non_differentiable(losses)
        # no matrix product for the sum: autocast would round that to bf16
        mean = (losses * shares).sum() / count
        return mean, losses.mul_((targets >= 0) * counts)

    @staticmethod
    def backward(ctx, gradient, _):
        dx, dw = ctx.saved_tensors
        return dx * gradient, dw * gradient, None, None, None, None, None, None
