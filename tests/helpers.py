"""Share what several test files need: a tiny model, oracles, how far two tensors are apart."""
import torch

from afno import COPIES, MATCHES
from data.text_to_bin import InputError
from train_gpt2_afno import GPT, GPTConfig

TINY = dict(vocab_size=97, n_layer=3, n_head=2, n_embd=16, sequence_length=24, afno_num_blocks=4)


def tiny(**options) -> GPT:
    """Return a model of three layers, the same bits at each call."""
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**TINY, **options}))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return |a - b| / |b|."""
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


def kept_and_recomputed(model: GPT, idx: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Return all parameters' gradients for tokens idx, without and with recomputing."""
    gradients = []
    for recompute in (False, True):
        for block in model.transformer.h:
            block.recompute = recompute
        loss = model(idx, idx.roll(-1, 1), return_logits=False)[1]
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    return gradients


def toeplitz_sum(u: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """Return y_t = sum over s <= t of taps[t - s] u_s, term by term of the lag."""
    T, per_filter = u.size(1), u.size(2) // taps.size(0)
    y = torch.zeros_like(u)
    for lag in range(min(T, taps.size(1))):
        y[:, lag:] += taps[:, lag].repeat_interleave(per_filter) * u[:, : T - lag]
    return y


def token_by_token(step, x: torch.Tensor) -> tuple[torch.Tensor, object]:
    """Return step's outputs for x (B, T, ...), stacked, and its last state.

    step(x_t, state) returns (output, state); the first state is None.
    """
    state, outputs = None, []
    for t in range(x.size(1)):
        y_t, state = step(x[:, t], state)
        outputs.append(y_t)
    return torch.stack(outputs, 1), state


def matches_by_definition(row: list[int], t: int) -> tuple[list[list[int]], list[int]]:
    """Return longest_matches at token t, by comparing lists: (tokens, kinds) of both sets."""
    def followed(length):
        there = [row[s + 1] for s in range(t - 1, length - 2, -1)
                 if row[s - length + 1 : s + 1] == row[t - length + 1 : t + 1]]
        return (there + [-1] * COPIES)[:COPIES], min(COPIES, len(there))

    none = [-1] * COPIES, 0
    for level in range(len(MATCHES), 0, -1):
        tokens, number = followed(MATCHES[level - 1])
        if number:
            others, more = followed(1) if level > 1 else none
            kind = 4 * len(MATCHES) + more if more else 0
            return [tokens, others], [4 * (level - 1) + number, kind]
    return [none[0]] * 2, [0, 0]


class RefusingGate:
    """A start.Gate that has room beside training, and has found a leak."""

    make_room = lambda self: None

    def verdict(self):
        raise InputError("causality gate: it ended with status 1, nothing is trained")
