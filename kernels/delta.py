"""The delta rule of states, in plain PyTorch: no Triton kernel is written for it yet.

It is an operator of its own, opaque to torch.compile, which would unroll the chunks of a row.
"""
import torch
from torch import Tensor

from kernels import operator, save_inputs
from kernels.blocks import in_chunks, remains_of


def plain_delta_scan(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, beta: Tensor) -> Tensor:
    """Return y_t = q_t S_t with S_t = a_t S_(t-1) + k_t u_t^T, u_t = b_t (v_t - a_t k_t S_(t-1)).

    q, k: (B, T, G, D); v: (B, T, G, W); log_a, at most zero, and beta: (B, T, G), fp32 or float64.
    Bitwise causal. A token writes what its key does not hold yet. Inside a chunk the u are the
    solution of a triangular system (Yang et al., 2024, "Parallelizing linear transformers with the
    delta rule"):

        u_t + b_t sum over s < t of remains[t, s] (k_t k_s) u_s = b_t (v_t - since_t k_t S),

    S where the chunk begins. So u = own - held S, with two right sides that all chunks solve at
    once; then one chunk follows the other.
    """
    T, half = v.size(1), v.dtype
    q, k, v, log_a, beta = map(in_chunks, (q, k, v, log_a, beta))
    since = log_a.cumsum(3)
    remains, since = remains_of(since), since.exp()[..., None]
    beta = beta[..., None]
    system = torch.eye(k.size(3), device=k.device, dtype=beta.dtype) + (
        beta * remains * (k @ k.mT)).tril(-1)
    sides = beta * torch.cat((v.to(beta.dtype), since * k), -1)
    own, held = torch.linalg.solve_triangular(system, sides, upper=False).split(
        (v.size(-1), k.size(-1)), -1)
    until, held = (remains[..., -1, :, None] * k).to(half), held.to(half)
    state, states, writes = beta.new_zeros(*k.shape[:2], k.size(-1), v.size(-1)), [], []
    for i in range(v.size(2)):
        states.append(state.to(half))
        writes.append((own[:, :, i] - held[:, :, i] @ states[i]).to(half))
        state = since[:, :, i, -1:] * state + until[:, :, i].mT @ writes[i]
    y = ((q @ k.mT) * remains).to(half) @ torch.stack(writes, 2)
    y = y + (since * q).to(half) @ torch.stack(states, 2)
    return y.movedim(1, 3).flatten(1, 2)[:, :T].contiguous()


@operator("delta_scan")
def delta_scan(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, beta: Tensor) -> Tensor:
    """Return plain_delta_scan's y."""
    return plain_delta_scan(q, k, v, log_a, beta)


@operator("delta_scan_backward")
def delta_scan_backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, log_a: Tensor,
                        beta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, log_a and beta."""
    with torch.enable_grad(), torch.autocast(dy.device.type, enabled=False):
        inputs = [x.detach().requires_grad_() for x in (q, k, v, log_a, beta)]
        gradients = torch.autograd.grad(plain_delta_scan(*inputs), inputs, dy)
    return tuple(gradient.contiguous() for gradient in gradients)


@torch.library.register_fake(delta_scan)
def _(q, k, v, log_a, beta):
    return v.new_empty(v.shape)


@torch.library.register_fake(delta_scan_backward)
def _(dy, q, k, v, log_a, beta):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, log_a, beta))


torch.library.register_autograd(
    delta_scan, lambda ctx, dy: delta_scan_backward(dy, *ctx.saved_tensors),
    setup_context=save_inputs)
