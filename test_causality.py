"""Causality gate: no output may depend on a later token or on another row. Run it before training.

    python test_causality.py [the trainer's flags]    # --preset fineweb --mixer attn ...
    pytest test_causality.py                          # the same on small models

`check_causality(model, seq_len, vocab_size)` is the check itself. It needs torch alone and takes
any model or function from tokens to outputs: `from test_causality import check_causality` in a
project of your own. The trainer calls it on the graphs, dtype and shapes that it uses: on what
trains before the first step, on what validates before the first validation.

How it looks. Two batches differ so: row k of the second keeps its first c_k tokens, and every token
after this cut is another one. Outputs before the cut must be the same, bit for bit: nothing here
passes a whole sequence through one FFT, so no later token even enters the arithmetic of an earlier
output. With all cuts 1 ... T - 1 every pair of positions is told apart. A second pair of batches
exchanges whole rows: the rows that stay must not move at any position. The head comes after that,
and must treat every position by itself.

The gate's table has the model that is about to be trained, in the dtype that trains; then small
models of every mixer and form at 128 tokens; then gradients in float64, where output t must not
depend on the embedding of a later token, for every pair of a short row. A pass is remembered in
.cache/ by source, shape and versions. Exit status: 0, 1 on a leak, 2 on bad flags. What all of this
proves and what it cannot: experiments/causality.md.
"""
import contextlib
import dataclasses
import hashlib
import itertools
import math
import os
import pathlib
import secrets
import time
import types

BEGIN = time.perf_counter()  # before torch, whose import takes seconds
if __name__ == "__main__":
    # OpenMP reads this when torch is loaded. Threads that wait by spinning take a busy machine's
    # cores from those that work: the gate then took ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch  # noqa: E402

ALL_CUTS_UP_TO = 2048  # tokens; longer rows, and CPUs, get a stratified sample of the cuts
END_OF_TEXT = 50256
CACHE = ".cache"  # a folder that git ignores: which gates have passed


# -----------------------------------------------------------------------------
# the check: torch alone


@dataclasses.dataclass
class Leak:
    """What check_causality found: `position` is the first output that moved where none may move."""

    position: int | None  # None: no output moved where all should, so nothing was tested
    cut: int | None  # tokens from here on were exchanged; None: all tokens of other rows were
    ratio: float = math.inf  # norm of what moved before the cut / at or after it
    cause: str = "tokens of other rows of the batch"  # where there is no cut

    def __str__(self):
        if self.position is None and self.cut is None:
            return self.cause
        if self.position is None:
            return f"exchanging the tokens from position {self.cut} on changes nothing after it"
        cause = self.cause if self.cut is None else f"tokens from position {self.cut} on"
        return f"output {self.position} is the first that changes with the {cause}"

    __repr__ = __str__  # as a list of leaks shows them


class Leaks(list):
    """The leaks, none where the model is causal, and what was looked at."""

    coverage = 0.0  # share of the pairs t < s of positions that a cut separates
    cuts = 0  # how many of the T - 1
    seed = 0  # of the sample of cuts and of the tokens


def random_tokens(shape: tuple[int, ...], vocab_size: int, seed: int = 1234) -> torch.Tensor:
    """Return tokens on the CPU from a generator of their own, not from training's."""
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def new_seed() -> int:
    """Return a seed from the system: training's generator stays as it is."""
    return secrets.randbelow(2**31)


def choose_cuts(T: int, budget: int | None, generator: torch.Generator) -> list[int]:
    """Return `budget` cuts of 1 ... T - 1, one from each of so many equal parts; None: all."""
    if budget is None or budget >= T - 1:
        return list(range(1, T))
    edges = torch.linspace(1, T, budget + 1).round().long()
    draw = torch.rand(budget, generator=generator)
    return [int(a + (b - a) * u) for a, b, u in zip(edges, edges[1:], draw)]


def coverage_of(cuts: list[int], T: int) -> float:
    """Return the share of the pairs t < s of positions with t < c <= s for one of the cuts c."""
    edges = [0, *sorted(set(cuts)), T]
    unseen = sum((b - a) * (b - a - 1) // 2 for a, b in zip(edges, edges[1:]))
    return 1 - unseen / max(T * (T - 1) // 2, 1)


def exchange(idx: torch.Tensor, kept: torch.Tensor, vocab_size: int, special: list[int],
             parity: int, generator: torch.Generator) -> torch.Tensor:
    """Return idx, (B, T), with every token from position kept[k] of row k on replaced by another.

    In every other row, from row `parity` on, the first one becomes one of `special`, in turn, where
    that is another token (-1 is the token before): a leak may show only where one of them is next.
    """
    B, T = idx.shape
    shift = torch.randint(1, vocab_size, idx.shape, generator=generator)
    other = (idx + shift) % vocab_size
    rows = torch.arange(B)[(kept < T) & (torch.arange(B) % 2 == parity)]
    if len(rows):
        at, before = kept[rows], idx[rows, (kept[rows] - 1).clamp(min=0)]
        chosen = torch.tensor([special[k % len(special)] for k in range(len(rows))])
        chosen = torch.where(chosen < 0, before, chosen)
        chosen = torch.where(chosen == idx[rows, at], other[rows, at], chosen)
        other[rows, at] = chosen
    return torch.where(torch.arange(T) < kept[:, None], idx, other)


def base_tokens(B: int, T: int, vocab_size: int, special: list[int],
                generator: torch.Generator) -> torch.Tensor:
    """Return (B, T) random tokens; every other row repeats tokens and has special ones."""
    idx = torch.randint(vocab_size, (B, T), generator=generator)
    draw = torch.rand(B, T, generator=generator)
    odd = (torch.arange(B) % 2 == 1)[:, None]
    rare = torch.tensor(special)[torch.randint(len(special), (B, T), generator=generator)]
    idx = torch.where(odd & (draw < 0.1) & (rare >= 0), rare, idx)
    repeated = torch.cat((idx[:, :1], idx[:, :-1]), 1)
    return torch.where(odd & (draw > 0.8), repeated, idx)


def plain_tokens(B: int, T: int, vocab_size: int, special: list[int],
                 generator: torch.Generator) -> torch.Tensor:
    """Return (B, T) random tokens, none special; every other row's second half is its first."""
    idx = torch.randint(vocab_size, (B, T), generator=generator)
    usual = next((token for token in range(vocab_size) if token not in special), None)
    if usual is not None:
        idx = torch.where(torch.isin(idx, torch.tensor(special)), usual, idx)
    idx[1::2, T - T // 2 :] = idx[1::2, : T // 2]
    return idx


def moved_outputs(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return where, (B, T), any bit of outputs (B, T, ...) moved, or is NaN, on the CPU."""
    return (before != after).reshape(*before.shape[:2], -1).any(-1).cpu()


def compare(before: torch.Tensor, after: torch.Tensor, kept: torch.Tensor,
            tolerance: float) -> Leaks:
    """Return the leaks of rows whose first kept[k] outputs must not have moved."""
    leaks, moved, T = Leaks(), moved_outputs(before, after), before.size(1)
    for k, cut in enumerate(kept.tolist()):
        if cut < T and not moved[k, cut:].any():
            leaks.append(Leak(None, cut))
        if not moved[k, :cut].any():
            continue
        change = (after[k].double() - before[k].double()).reshape(T, -1).norm(dim=-1).cpu()
        change = torch.where(moved[k], change, 0)
        whole = change[cut:].norm().item() if cut < T else change.norm().item()
        ratio = change[:cut].norm().item() / whole if whole > 0 else math.inf
        if not ratio <= tolerance:  # NaN is a leak
            first = int(moved[k, :cut].nonzero()[0])
            leaks.append(Leak(first, cut if cut < T else None, ratio))
    return leaks


def check_causality(model, seq_len: int, vocab_size: int, tolerance: float = 0.0, *,
                    rows: int = 8, cuts: int | None = None, device: torch.device | str = "cpu",
                    seed: int | None = None) -> Leaks:
    """Return the leaks of `model`, with their first positions; an empty list if it is causal.

    model: maps tokens (rows, seq_len), int64, to outputs (rows, seq_len, ...), or to a tuple that
    begins with them. One that draws at random, as dropout does, must be in eval(). tolerance: the
    largest r, the norm of what moves before a cut over that of what moves after it, that is no
    leak. 0 asks for bit-identical outputs; a model that passes whole sequences through an FFT
    needs about 1e-5 in fp32. rows: of a batch; at least 2 are needed to see that rows are apart.
    cuts: how many to try, a stratified sample; half of them meet a special token next. None: all
    seq_len - 1, each with a special token next and without. seed: of tokens and cuts; None: a new
    one. Gradients are on or off as the caller has them.
    """
    if seq_len < 2 or vocab_size < 2:
        raise ValueError(f"seq_len and vocab_size must be >= 2, got {seq_len} and {vocab_size}")
    seed = new_seed() if seed is None else seed
    generator = torch.Generator().manual_seed(seed)
    special = sorted({-1, 0, vocab_size - 1} | {END_OF_TEXT} & set(range(vocab_size)))
    chosen = choose_cuts(seq_len, cuts, generator)
    leaks = Leaks()
    leaks.coverage, leaks.cuts, leaks.seed = coverage_of(chosen, seq_len), len(chosen), seed
    bases = [make(rows, seq_len, vocab_size, special, generator)
             for make in (base_tokens, plain_tokens)]

    def outputs(idx: torch.Tensor) -> torch.Tensor:
        y = model(idx.to(device))
        return (y[0] if isinstance(y, tuple) else y).detach()

    before = [outputs(idx) for idx in bases]
    # (how many tokens each row keeps, which rows meet a special token next, which base)
    plans = []
    for n, first in enumerate(range(0, len(chosen), rows)):
        part = chosen[first : first + rows]
        kept = torch.tensor(part + part[:1] * (rows - len(part)))  # the last batch is filled up
        kept = kept[torch.randperm(rows, generator=generator)]  # no cut has a row of its own
        if cuts is None or len(chosen) <= rows:
            plans += [(kept, 0, (seed + n) % 2), (kept, 1, (seed + n + 1) % 2)]
        else:
            plans.append((kept, (seed + n) % 2, (seed + n // 2) % 2))
    if rows > 1:  # whole rows: one half stays, then the other
        half = torch.randperm(rows, generator=generator) < rows // 2
        plans += [(torch.where(half, seq_len, 0), 0, 0), (torch.where(half, 0, seq_len), 1, 1)]
    for kept, parity, base in plans:
        changed = exchange(bases[base], kept, vocab_size, special, parity, generator)
        leaks += compare(before[base], outputs(changed), kept, tolerance)
    leaks.sort(key=lambda leak: math.inf if leak.position is None else leak.position)
    if leaks and ((outputs(bases[0]) != before[0]) & before[0].isfinite()).any():
        leaks.insert(0, Leak(None, None, cause="outputs differ for the same tokens: it draws at "
                             "random, as dropout does, or keeps a state between calls"))
    return leaks


@contextlib.contextmanager
def moved_weights(model: torch.nn.Module, seed: int = 0):
    """Move every weight meanwhile: a leak must not hide behind a weight that begins at zero or one.

    The noise is from a generator of its own; weights come back bit for bit.
    """
    kept = [(p, p.detach().clone()) for p in model.parameters()]
    move_weights(model, seed)
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in kept:
                p.copy_(value)


def move_weights(model: torch.nn.Module, seed: int = 0):
    """Add noise to every weight, of its own standard deviation and at least 0.02.

    Vectors and single numbers get at least 0.5: such as a share of the first value, which begins at
    zero and would hide a leak from bf16. No two weights get the same noise: a leak may hide behind
    their difference. An odd seed makes the noise of the even one before it, with the other sign: a
    leak may show on one side of zero alone.
    """
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed // 2)
    sign = 1 - 2 * (seed % 2)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator, device=p.device)
            size = p.std(correction=0).clamp(min=0.02 if p.ndim > 1 else 0.5)
            p.add_(noise.mul_(size * sign).to(p))


def gradient_leaks(hidden, embedding: torch.nn.Module, T: int, vocab_size: int,
                   device: torch.device | str = "cpu", bound: float = 0.0) -> Leaks:
    """Return the pairs t < s for which the gradient of output t towards embedding s is not zero.

    hidden: maps tokens (B, T) to outputs (B, T, C); embedding: the module that it looks tokens up
    with. Row k of a batch of T equal rows gives the gradient of output k, so one backward pass has
    every pair. bound: the largest ratio to the gradient's norm that counts as zero.
    """
    found = []
    hook = embedding.register_forward_hook(lambda module, inputs, output: found.append(output))
    idx = random_tokens((1, T), vocab_size).expand(T, T).to(device)
    y = hidden(idx)
    hook.remove()
    direction = torch.randn(y.size(-1), generator=torch.Generator().manual_seed(0)).to(y)
    outputs = (y.diagonal(dim1=0, dim2=1).mT @ direction).sum()  # output k of row k
    size = torch.autograd.grad(outputs, found[0])[0].norm(dim=-1).cpu()  # (t, s)
    leaks = Leaks()
    leaks.coverage, leaks.cuts = 1.0, T - 1
    for t in range(T):
        ratio = (size[t, t + 1 :].norm() / size[t].norm()).item()
        if not size[t, : t + 1].norm() > 0:
            leaks.append(Leak(None, t + 1))
        elif not ratio <= bound:
            later = int((~(size[t, t + 1 :] <= bound * size[t].norm())).nonzero()[0])
            leaks.append(Leak(t, t + 1 + later, ratio))
    return leaks


# -----------------------------------------------------------------------------
# this repository's models: what the trainer checks, and the gate


@contextlib.contextmanager
def as_constant(weight: torch.nn.Parameter):
    """Tell autograd meanwhile that nobody wants the weight's gradient."""
    wanted = weight.requires_grad
    weight.requires_grad_(False)
    try:
        yield
    finally:
        weight.requires_grad_(wanted)


def given_to_head(model, goals=None):
    """Return a function from tokens to the states that forward(), which trains, gives to the head.

    Next tokens are what the function is given, or the tokens one later. Forward's targets are what
    goals makes of them. Raises ValueError where it does anything else to the head's mean loss than
    to return it: that could not be checked.
    """
    def states(idx: torch.Tensor, later: torch.Tensor | None = None) -> torch.Tensor:
        given, mean = [], torch.zeros(())
        later = idx.roll(-1, 1) if later is None else later
        model.lm_head.loss = lambda x, targets, shares=None: (given.append(x) or mean, None)
        try:
            targets, *shares = goals(later) if goals else (later,)
            loss = model(idx, targets, False, *shares)[1]
        finally:
            del model.lm_head.loss  # the class's is back
        if len(given) != 1 or loss is not mean:
            raise ValueError("forward() must call lm_head.loss once, and return its mean loss")
        return given[0]
    return states


def target_leaks(model, seq_len: int, rows: int, device, seed: int, goals=None) -> Leaks:
    """Return a leak where states that forward() gives to the head change with its targets alone."""
    draw = lambda n: random_tokens((rows, seq_len), model.config.vocab_size, seed + n).to(device)
    states, idx = given_to_head(model, goals), draw(0)
    # without their graphs, of which a card may hold no two
    moved = moved_outputs(*(states(idx, draw(n)).detach() for n in (1, 2)))
    return Leaks([Leak(int(moved.any(0).nonzero()[0]), None, cause="targets")]
                 if moved.any() else [])


def wrong_losses(head, x: torch.Tensor, targets: torch.Tensor, shares: torch.Tensor | None,
                 mean: torch.Tensor, losses: torch.Tensor, some: torch.Tensor) -> Leaks:
    """Return leaks where losses are not the logits' cross-entropy, or the mean is not theirs.

    A target is a later token: it may pick one of the logits' probabilities, and change nothing.
    The logits are those of the positions `some`, of all that are numbered row by row.
    """
    x, y, losses = x.flatten(0, 1), targets.flatten(0, 1), losses.flatten(0, 1)
    if shares is None:
        y, losses, shares = y.unsqueeze(-1), losses.unsqueeze(-1), torch.ones(1, device=x.device)
    counts = (y >= 0) & (y[:, :1] >= 0)
    with torch.no_grad():
        log_prob = torch.log_softmax(head.logits(x[None, some])[0].float(), -1)
    expected = -log_prob.gather(1, y[some].clamp(min=0)) * counts[some]
    off = (losses[some] - expected).norm() / expected.norm()
    # an fp8 product is 6% off in norm; losses, which are log V and more, by less than 2%
    bound = 0.05 if head.fp8 and torch.is_grad_enabled() else \
        0.02 if torch.is_autocast_enabled(x.device.type) else 1e-4
    own = (losses * shares).sum() / counts[:, 0].sum()
    causes = []
    if not off <= bound:
        causes.append(f"the head's losses are {off:.1%} off the cross-entropy of its logits")
    if not (own - mean).abs() <= 1e-3 * own.abs():
        causes.append(f"the head trains on a mean loss of {mean:.4g}, its losses' is {own:.4g}")
    return Leaks(Leak(None, None, cause=cause) for cause in causes)


def compare_mixtures(batches: list, digits: list, holes: torch.Tensor,
                     differ: torch.Tensor) -> Leaks:
    """Return a leak where outputs (rows, T, ...) of two batches differ and their inputs do not.

    Batch b has first or second inputs as digits[b], (rows, T), says. Without such a leak, return
    one where other inputs, which `differ`, move nothing. In even batches `holes` have no target.
    """
    wrong, still = torch.zeros_like(holes), Leaks()
    for i, j in itertools.combinations(range(len(digits)), 2):
        kept, moved = digits[i] == digits[j], moved_outputs(batches[i], batches[j])
        if (moves := ~kept & ~holes & differ).any() and not moved[moves].any():
            still.append(Leak(None, None, cause="other states and targets move no loss"))
        same = moved & kept
        # of an even and an odd batch, one alone has targets in the holes
        wrong |= same & ~holes if (i - j) % 2 else same
    if wrong.any():
        first = int(wrong.any(0).nonzero()[0])
        return Leaks([Leak(first, None, cause="head's inputs at other positions")])
    return still


def check_head(model, seq_len: int, rows: int, device, seed: int, logits: bool,
               every_pair: bool, goals=None) -> Leaks:
    """Return the leaks of the head, which must treat every position of every row by itself.

    Each position gets a random number. In batch b it holds its first state and target where bit b
    of the number is 0, else its second. Where two batches hold the same ones, outputs must be
    equal. With the numbers 1 to 3 two of three pairs of positions are told apart; every_pair:
    numbers that all differ. In every other batch all targets count, in the others nine of ten.
    goals: what makes GPT.forward's targets and shares of the next tokens. The losses are those of
    training; two batches make gradients, too.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randint(model.config.vocab_size, (rows, seq_len),
                                 generator=generator).to(device)
    x = model.hidden(draw()).detach()
    (targets, shares), (other_targets, _) = (goals(y) if goals else (y, None)
                                             for y in (draw(), draw()))
    more = () if shares is None else (shares,)
    holes = torch.rand(rows, seq_len, generator=generator) < 0.1
    holes[0, 0] = False  # a mean of none is no number
    number = 1 + torch.randperm(rows * seq_len, generator=generator).view(rows, seq_len)
    some = number.flatten()[:64].to(device) - 1
    number = number if every_pair else 1 + number % 3
    sums = Leaks()
    far = (x - x.flip(0, 1)).norm(dim=-1) > 1e-3 * x.norm(dim=-1)  # not by rounding alone
    differ = far.cpu() | moved_outputs(targets, other_targets)

    def outputs(b: int, other: torch.Tensor) -> torch.Tensor:
        mixed, looked_at = torch.where(other.unsqueeze(-1), x.flip(0, 1), x), b >= len(digits) - 2
        mixed.requires_grad_(looked_at and torch.is_grad_enabled())  # which must change no loss
        goal = torch.where(other if shares is None else other.unsqueeze(-1), other_targets, targets)
        if b % 2 == 0:
            goal[holes.to(device)] = -1
        with as_constant(model.lm_head.weight):
            mean, losses = model.lm_head.loss(mixed, goal, *more)
        if looked_at:
            sums.extend(wrong_losses(model.lm_head, mixed, goal, shares, mean, losses, some))
        parts = [losses.reshape(rows, seq_len, -1),
                 *([model.lm_head.logits(mixed)] if logits else [])]
        return torch.cat([part.detach().to(losses.dtype) for part in parts], -1)

    # the last digit is 0 everywhere: one batch has all the first ones
    digits = [number >> b & 1 for b in range(int(number.max()).bit_length() + 1)]
    batches = [outputs(b, (digit == 1).to(device)) for b, digit in enumerate(digits)]
    found = compare_mixtures(batches, digits, holes, differ)
    return found if found and found[0].position is not None else sums or found


def budget(seq_len: int, rows: int, device: torch.device) -> int | None:
    """Return how many cuts to try: all on a GPU up to 2048 tokens, else a sample."""
    if torch.device(device).type == "cuda":
        return None if seq_len <= ALL_CUTS_UP_TO else max(256, rows)
    return max(32, rows)


def check_model(model, seq_len: int, rows: int, device, autocast, modes=(True, False),
                cuts: int | None = -1, logits: bool | None = False,
                seed: int | None = None, goals=()) -> Leaks:
    """Return the leaks of hidden states and of the head's losses for (rows, seq_len).

    autocast: a function that makes the context to run in. modes: with gradients the graph that
    trains runs, forward(), without the one that validates, hidden(). cuts, seed:
    check_causality's; cuts of -1: budget's, of which validation tries each once. logits: look at
    the head's logits, too, and at every pair of its positions; None: not at the head. goals: what
    makes the targets and shares that train; forward() and the head are tried with each, with as
    many cuts as rows.
    """
    cuts = budget(seq_len, rows, device) if cuts == -1 else cuts
    every_pair = logits or cuts is None or cuts >= seq_len - 1
    seed = new_seed() if seed is None else seed
    leaks = Leaks()
    for mode, gradients in enumerate(modes):
        with torch.set_grad_enabled(gradients), autocast():
            states = given_to_head(model) if gradients else model.hidden
            found = check_causality(
                states, seq_len, model.config.vocab_size, rows=rows, device=device,
                cuts=seq_len - 1 if cuts is None and not gradients else cuts, seed=seed + mode)
            leaks += found
            for goal in (None, *goals) if gradients else ():
                leaks += target_leaks(model, seq_len, rows, device, seed + mode, goal)
            if logits is not None:
                head = lambda *more: check_head(model, seq_len, rows, device, seed + mode, *more)
                leaks += head(logits, every_pair)
            for goal in goals if gradients else ():
                leaks += check_causality(
                    given_to_head(model, goal), seq_len, model.config.vocab_size, rows=rows,
                    cuts=min(rows, seq_len - 1), device=device, seed=seed + mode)
                if logits is not None:
                    leaks += head(False, False, goal)
        leaks.coverage, leaks.cuts, leaks.seed = found.coverage, found.cuts, seed
    return leaks


def refuse_other_targets(x: torch.Tensor, y: torch.Tensor, text: torch.Tensor):
    """Raise InputError where targets y, (B, T), are not the tokens that follow the inputs x.

    text: the first row's T + 1 tokens, as the data have them.
    """
    from data.text_to_bin import InputError

    first = torch.equal(x[0].cpu(), text[:-1]) and torch.equal(y[0].cpu(), text[1:])
    if not first or not torch.equal(x[:, 1:], y[:, :-1]):
        raise InputError("causality check: the targets of training rows are not their next tokens")


@torch.no_grad()
def measure_leaks(model, rows: int, T: int, runtime, seed: int) -> Leaks:
    """Return a leak where evaluate's sums are not those of the logits of hidden() for its text.

    Any text's next tokens do: here random ones, two batches and some of a third. hidden() itself is
    checked before.
    """
    from runtime import evaluate

    alone = dataclasses.replace(runtime, rank=0, world=1)  # ranks may compile for minutes
    count, text = 2 * rows * T + rows * T // 2 + 1, random_tokens(
        (3 * rows * T + 1,), model.config.vocab_size, seed)
    stream = types.SimpleNamespace(read=lambda begin, length: text[begin : begin + length])
    got = evaluate(model, stream, count, rows, T, alone)
    text, losses = text.to(runtime.device), []
    with runtime.autocast():
        for idx, goals in zip(text[:-1].split(rows * T), text[1:].split(rows * T)):
            hidden = model.hidden(idx.view(rows, T)).flatten(0, 1)
            for part, goal in zip(hidden.split(1024), goals.split(1024)):  # few logits at once
                logits = model.lm_head.logits(part[None])[0].float()
                losses.append(logits.logsumexp(-1) - logits.gather(1, goal[:, None])[:, 0])
    losses = torch.cat(losses).double()
    losses[count:] = 0
    wanted = losses.view(-1, T).sum(0)
    off = ((got - wanted).norm() / wanted.norm()).item()
    bound = 1e-4 if runtime.dtype == torch.float32 else 0.02
    return Leaks([] if off <= bound else [Leak(None, None, cause=(
        f"validation's losses are {off:.1%} off the cross-entropy of the model's logits"))])


def refuse_leaks(model, shapes, runtime, say, modes=(True, False), goals=(),
                 cuts: int | None = -1):
    """Raise InputError where an output depends on a later token or on another row, bit for bit.

    shapes: (rows, T) of the batches to try. runtime: the trainer's Runtime. modes, goals,
    cuts: check_model's. Weights are tried moved, then as they are, with few cuts. Where modes have
    validation, what evaluate() sums is checked, too.
    """
    from data.text_to_bin import InputError

    seed = runtime.new_seed()  # every rank sees the same leak, and rank 0 names it
    what = " and ".join("training" if gradients else "validation" for gradients in modes)

    def check(rows: int, T: int, **more) -> tuple[Leaks, float]:
        begin = time.perf_counter()
        leaks = check_model(model, T, rows, runtime.device, runtime.autocast, modes, seed=seed,
                            **more)
        if not leaks and False in modes:
            leaks += measure_leaks(model, rows, T, runtime, seed)
        if leaks:
            raise InputError(f"causality check: the model leaks, refusing to go on: {leaks[0]}")
        return leaks, time.perf_counter() - begin

    with moved_weights(model, seed):
        found = [check(rows, T, goals=goals, cuts=cuts) for rows, T in shapes]
    for (rows, T), (leaks, seconds) in zip(shapes, found):
        seconds += check(rows, T, cuts=min(rows, T - 1))[1]
        say(f"causality check of {what}, {rows} rows of {T}: bit-identical, "
            f"{leaks.coverage:.1%} of the pairs of positions (seed {seed}, {seconds:.1f} s)")


@torch.no_grad()
def is_finite(model, T: int, runtime) -> bool:
    """Return whether the outputs of T tokens are finite: others differ from themselves."""
    idx = random_tokens((1, T), model.config.vocab_size).to(runtime.device)
    with runtime.autocast():
        return bool(model.hidden(idx).isfinite().all())


@torch.no_grad()
def check_generation(model, T: int, device) -> float:
    """Return how far step(), token by token, is from hidden() over T tokens, relative, in fp32.

    Half of the tokens are of few, so that they match earlier ones. Two texts go on in turn, each
    with a state of its own.
    """
    idx = random_tokens((2, T), model.config.vocab_size)
    idx[:, T // 2 :] = random_tokens((2, T - T // 2), min(16, model.config.vocab_size))
    idx = idx.to(device)
    whole, states, steps = model.hidden(idx), [None, None], []
    for t in range(T):
        for row in range(2):
            output, states[row] = model.step(idx[row : row + 1, t], states[row], T)
            steps.append(output)
    off = torch.cat(steps).view(T, 2, -1).transpose(0, 1) - whole
    off = off.double().norm() / whole.double().norm()
    return off.item() if off.isfinite() else math.inf


SHORT, GRADIENT_LENGTH = 128, 66  # tokens; the latter crosses a block of 64
FEW_TOKENS = 256  # a vocabulary for what is before the head, whose products would cost the most


class Gate:
    """The gate's table: a row is printed when it is done, and `passed` says whether all were."""

    def __init__(self):
        self.passed, self.seconds = True, 0.0
        print(f"{'model':<22} {'T':>5}  {'arithmetic':<22} {'cuts':>5}  {'pairs':>7}  "
              f"{'seed':>10}  {'s':>5}  (with moved weights)")

    def row(self, name: str, T: int, what: str, check):
        begin = time.perf_counter()
        leaks = check()
        seconds = time.perf_counter() - begin
        self.passed &= not leaks
        self.seconds += seconds
        print(f"{name:<22} {T:>5}  {what:<22} {leaks.cuts:>5}  {leaks.coverage:>7.2%}  "
              f"{leaks.seed:>10}  {seconds:>5.1f}  "
              f"{'LEAK: ' + str(leaks[0]) if leaks else 'ok'}", flush=True)

    def close(self) -> int:
        """Print the verdict and return the exit status."""
        print("\ncausal: nothing moved that must not" if self.passed
              else "\nNOT CAUSAL: do not train this")
        return 0 if self.passed else 1


def short_configs(given, device: torch.device) -> dict:
    """Return the gate's small models, {name: GPTConfig}: two layers of each mixer and form.

    They have the recipe of `given` and at most two heads. The forms filter and state are in the
    mixtures. On a CPU heads are half as wide, which halves the time; no kernel there depends on
    the width.
    """
    heads, size = min(given.n_head, 2), given.n_embd // given.n_head
    width = heads * (size // 2 if device.type == "cpu" and size % 4 == 0 else size)
    options = dict(n_layer=2, n_head=heads, n_embd=width, vocab_size=FEW_TOKENS,
                   afno_num_blocks=math.gcd(given.afno_num_blocks, width), sequence_length=SHORT,
                   mixer="afno")
    options |= {name: () for name, value in vars(given).items() if isinstance(value, tuple)}
    options["copy_layers"] = (0, 1) if given.copy_layers else ()
    configs = {"attention": dict(mixer="attn"), "hybrid": dict(attn_layers=(1,)),
               "states among filters": dict(afno_state_layers=(1,))}
    configs |= {f"afno, {form}": dict(afno_form=form) for form in ("hilbert", "dyadic")}
    return {name: dataclasses.replace(given, **options | dict(afno_form="filter") | change)
            for name, change in configs.items()}


def check_trained(gate: Gate, trainer, args, config, runtime):
    """Add rows for the model that the flags ask for, in the shapes and dtype that train.

    At T - 1, at which nobody trains, the vocabulary is small and each cut is tried once. Nothing is
    compiled here: the trainer checks its compiled graphs itself.
    """
    from runtime import with_fewer_rows

    device, tokens = runtime.device, args.batch_size * config.sequence_length
    lengths = [T for T, _ in args.curriculum or ((config.sequence_length, 1.0),)]
    few = dataclasses.replace(config, vocab_size=min(FEW_TOKENS, config.vocab_size))
    for name, shape, shorter, modes in (("the model to train", config, 0, (True, False)),
                                        ("with few tokens", few, 1, (True,))):
        model = moved_model(trainer, shape, args.seed ^ shorter, device)
        said = trainer.choose_fp8(model, args, device, runtime.dtype)
        if said and not shorter:
            print(said)
        for T in lengths:
            if T - shorter < 2:  # one token has no later one
                continue
            length, rows = T - shorter, tokens // T
            cuts = budget(length, rows, device)
            if cuts is None and shorter:
                cuts = length - 1
            gate.row(name, length, args.dtype, lambda: with_fewer_rows(rows, lambda some: (
                check_model(model, length, some, device, runtime.autocast, modes, cuts)), print))


def moved_model(trainer, config, seed: int, device):
    """Return a model made on the device, which is quicker there, with weights moved."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = trainer.GPT(config)
    move_weights(model, seed)
    return model


def two_goals(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return targets and shares of the next tokens y and of those after them."""
    return torch.stack((y, y.roll(-1, 1)), -1), torch.tensor([2 / 3, 1 / 3], device=y.device)


def check_family(gate: Gate, trainer, configs: dict, runtime):
    """Add rows for models of 128 tokens: all cuts, eval mode, gradients in float64.

    The first of them has the head, logits included: it is the same in all.
    """
    from runtime import Runtime

    device = runtime.device
    exact = Runtime(device, torch.float32, compile=False)
    for count, (name, config) in enumerate(configs.items()):
        model, T = moved_model(trainer, config, count, device), config.sequence_length
        for mode in [exact] + [runtime] * (runtime.dtype != torch.float32):
            for length, evaluating, cuts in ((T, False, T - 1), (T - 1, True, 32)):
                model.train(not evaluating)
                what = str(mode.dtype).removeprefix("torch.") + ", eval mode" * evaluating
                gate.row(name, length, what, lambda: check_model(
                    model, length, 16, device, mode.autocast, (not evaluating,), cuts,
                    logits=None if count else True, goals=() if count else (two_goals,)))
        model.double()
        gate.row(name, GRADIENT_LENGTH, "float64 gradients", lambda: gradient_leaks(
            model.hidden, model.transformer.wte, GRADIENT_LENGTH, config.vocab_size, device))


def passed_file(args, config) -> pathlib.Path:
    """Return the file that says that the gate has passed: so a sweep over rates pays once.

    Its name is a digest of the sources, the model's shape, the flags that change what runs, the
    versions and the device.
    """
    from runtime import shapes_of, source_digest, source_files
    from train_gpt2_afno import GPT

    shapes_of(GPT, config)  # imports what a fork's mixer imports once it is made
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    flags = [getattr(args, name) for name in ("batch_size", "curriculum", "device", "dtype",
                                              "fp8_head", "fp8_mlp")]
    runs = config, flags, torch.__version__, gpu, source_digest(source_files())
    name = hashlib.sha256(repr(runs).encode()).hexdigest()[:16]
    return pathlib.Path(__file__).resolve().parent / CACHE / f"gate-{name}"


def main(argv: list[str]) -> int:
    """Run the gate for the model that the trainer's flags ask for; return the exit status."""
    import train_gpt2_afno as trainer
    from runtime import Runtime, choose_device, leave_room

    imported = time.perf_counter()
    flags = trainer.parse_flags(argv, __doc__)
    device = choose_device(flags.get("device", "auto"))
    leave_room(device)
    _, _, args, config = trainer.run_of(flags, device, print)
    runtime = Runtime(device, getattr(torch, args.dtype), bool(args.compile))
    passed = passed_file(args, config)
    if passed.exists():
        print(f"passed before, with this source, configuration and versions: {passed.name} in "
              f"{passed.parent.name}/ (delete it to run the gate again)")
        return 0
    # here, so that no row of the table waits for a trial
    trainer.try_kernels(trainer.kernels_of(config, args) | {"convolution", "state"}, device,
                        runtime.dtype)
    print(f"{args.model}, mixer {config.mixer}, {device.type}; convolution: "
          f"{trainer.usable('convolution', device, runtime.dtype)[1]}")
    tried = time.perf_counter()
    gate = Gate()
    check_trained(gate, trainer, args, config, runtime)
    check_family(gate, trainer, short_configs(config, device), runtime)
    if gate.passed:
        passed.parent.mkdir(exist_ok=True)
        passed.touch()
    status, ended = gate.close(), time.perf_counter()
    print(f"{ended - BEGIN:.1f} s: {imported - BEGIN:.1f} imports, {tried - imported:.1f} device "
          f"and trials of kernels, {gate.seconds:.1f} rows, {ended - tried - gate.seconds:.1f} "
          f"models; {time.process_time():.0f} s of all cores")
    return status


# -----------------------------------------------------------------------------
# pytest test_causality.py (no pytest in here: the command runs where only the trainer's packages
# are)

SMALL = dict(vocab_size=300, n_layer=3, n_head=2, n_embd=32, afno_num_blocks=4)


def test_causality(model=None, seq_len: int = 100):
    """Raise AssertionError where the model, or by default a small hybrid, is not causal."""
    if model is None:
        from train_gpt2_afno import GPT, GPTConfig

        model = GPT(GPTConfig(**SMALL, attn_layers=(1,), sequence_length=seq_len))
    outputs = model.hidden if hasattr(model, "hidden") else model
    config = getattr(model, "config", None)
    leaks = check_causality(outputs, seq_len, getattr(config, "vocab_size", SMALL["vocab_size"]))
    assert not leaks, str(leaks[0])


def assert_causal(**options):
    """Raise AssertionError where a small model is not causal, at one block and at several."""
    from runtime import Runtime, choose_device
    from train_gpt2_afno import GPT, GPTConfig

    device = choose_device("auto")
    modes = [Runtime(device, torch.float32, compile=False)]
    if device.type == "cuda":
        modes += [Runtime(device, torch.bfloat16, compile=False)]
    for T, position in ((64, "learned"), (64, "sinusoidal"), (64, "fourier"), (257, "none"),
                        (2200, "none")):
        torch.manual_seed(0)
        model = GPT(GPTConfig(**SMALL, **options, sequence_length=T, position=position)).to(device)
        move_weights(model)
        for mode in modes:
            for length, rows in ((T, 4), (T - 1, 4)) if T < 1000 else ((T - 1, 2),):
                leaks = check_model(model, length, rows, device, mode.autocast, cuts=16)
                assert not leaks, f"{options} {position} T = {length}: {leaks[0]}"
    model = GPT(GPTConfig(**SMALL, **options, sequence_length=GRADIENT_LENGTH)).to(device).double()
    move_weights(model)
    leaks = gradient_leaks(model.hidden, model.transformer.wte, GRADIENT_LENGTH,
                           SMALL["vocab_size"], device)
    assert not leaks, f"{options} float64 gradients: {leaks[0]}"


def test_attention_is_causal():
    assert_causal(mixer="attn")


def test_every_form_of_afno_is_causal():
    for form in ("filter", "hilbert", "state", "dyadic"):
        assert_causal(mixer="afno", afno_form=form, afno_filter_length=100)


def test_experts_are_causal():
    for form, routing in (("filter", "position"), ("hilbert", "frequency"), ("dyadic", "position")):
        assert_causal(mixer="afno", afno_form=form, afno_filter_length=100, afno_num_experts=2,
                      afno_routing=routing)


def test_hybrids_are_causal():
    assert_causal(mixer="afno", attn_layers=(1,))
    assert_causal(mixer="afno", afno_state_layers=(1,), afno_short_conv=4)
    assert_causal(mixer="afno", attn_layers=(1,), afno_state_layers=(2,), value_residual=1,
                  half_rotary=1)


if __name__ == "__main__":
    from runtime import run

    run(main)
