"""Train small models of each mixer on tasks whose answers are known, and count right answers.

    python experiments/ablation_studies.py recall                     # a laptop, under 15 minutes
    python experiments/ablation_studies.py recall --grid whole        # a GPU
    python experiments/ablation_studies.py recall --tasks recall,copying --seeds 1,2

recall      pairs of a key and its value, then each key once more: what was its value?
induction   triggers among noise, each always followed by the same token: which one?
needle      such pairs, far apart among tokens as frequent as words; all keys again at the end, each
            with its value after it
copying     a string of different tokens, a pause, a marker: the string again
counting    symbols among filler: how often was this one there until now?

A model of two layers learns a task on fresh rows of all lengths and loads at once. It is tested on
rows that it has never seen. The load is the number of pairs, triggers, needles, tokens of the
string, kinds of symbols. The distance, in tokens, is from a question to what it asks for. In
counting it is to the symbol's first place, 0 at that place. Mixers have the trainer's recipe,
without soft cap, value residual and weight decay. They see the same rows in the same order, in as
many steps. A model stops before only where its mean loss of two rounds is below 0.005: nearly all
of its answers are right.

A model whose outputs depend on later tokens is refused before it is trained: it would read its
answers.

Two controls say whether a task measures anything. Attention must answer 99.5% of the questions of
recall, induction, needle and copying at every length and load. A model whose layers mix no tokens,
filters of one tap, must stay at chance everywhere, within four standard errors. Whatever it answers
above that, the question gives away. It has a third of the steps. Filters alone are no control: what
they find is a result.

In experiments/studies/recall/ are rows.jsonl, with a line for every model, and table.md and
curves.png made from it. Models that stand there are not trained again.
"""
import argparse
import itertools
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

if __name__ == "__main__":
    print("error: python experiments/ablation_studies.py recall runs this", file=sys.stderr)
    sys.exit(2)

import train_gpt2_afno as trainer
from data.text_to_bin import (FOLDER, ROOT, InputError, Kind, Parser, integer, number, owned,
                              relative)
from experiments import archive
from experiments.ablation_studies import seeds
from experiments.evaluate import code, machine, markdown
from runtime import Diverged, Runtime, choose_device, usual_runtime
from test_causality import refuse_leaks

FILLER, MARKER, FIRST = 0, 1, 2  # tokens; keys begin at FIRST, values at half of the vocabulary


@dataclass(frozen=True)
class Grid:
    """Hold what all models of a study share."""

    vocab_size: int
    n_embd: int
    lengths: tuple[int, ...]
    loads: tuple[int, ...]
    steps: int
    tokens: int  # of a step
    rate: float  # times the recipe's learning rates
    answers: int  # of a test, at least

    def cells(self) -> list[tuple[int, int]]:
        """Return every (length, load) where four times the load fit into the length."""
        return [(T, n) for T in self.lengths for n in self.loads if 4 * n <= T]


GRIDS = {
    "small": Grid(128, 64, (64, 128, 256), (4, 8, 16), 300, 2048, 2.0, 1000),
    "whole": Grid(8192, 128, (64, 128, 256, 512, 1024, 2048), (4, 8, 16, 32, 64, 128, 256),
                  6000, 65_536, 1.0, 10_000),
}
RECIPE = {name: trainer.RECIPE[name] for name in (
    "qk_norm", "attn_short_conv", "attn_gate", "half_rotary", "embedding_norm",
    "embedding_residual", "swiglu", "afno_silu")} | dict(n_layer=2)
MIXERS = {
    "attention": dict(mixer="attn"),
    "hybrid": dict(mixer="afno", attn_layers=(1,), afno_short_conv=1),
    "states": dict(mixer="afno", afno_state_layers=(1,), afno_short_conv=4),
    "filters": dict(mixer="afno", afno_short_conv=4),
    "none": dict(mixer="afno", afno_short_conv=1, afno_filter_length=1),
}
COUNTED = "counting"  # the task that attention need not solve
SOLVED = 0.995  # share of right answers that attention must reach
MARGIN = 4  # standard errors: what counts as no better than chance
MADE_BY = "Made by experiments/ablation_studies.py recall"  # in table.md
VERDICTS = {True: "holds", False: "**FAILS**", None: "not known"}
LEARNT = 0.005  # nats: a mean loss below is that of right answers alone
CHECKED_ROWS, CUTS = 2, 16  # of the causality check: some 45 rows in all


# -----------------------------------------------------------------------------
# tasks: each returns tokens, targets (-1 does not count) and distances, three of (rows, T)


class Draw:
    """Draw random tokens of a vocabulary for a number of rows."""

    def __init__(self, generator: torch.Generator, rows: int, vocab_size: int):
        self.rows, self.like = rows, dict(generator=generator, device=generator.device)
        self.half, self.vocab_size = vocab_size // 2, vocab_size

    def distinct(self, count: int, low: int, high: int) -> Tensor:
        """Return different numbers from low to high - 1, (rows, count), in random order."""
        return low + torch.rand(self.rows, high - low, **self.like).argsort(1)[:, :count]

    def below(self, high: int, count: int) -> Tensor:
        """Return numbers from 0 to high - 1, (rows, count)."""
        return torch.randint(high, (self.rows, count), **self.like)

    def keys(self, count: int) -> Tensor:
        return self.distinct(count, FIRST, self.half)

    def values(self, count: int) -> Tensor:
        return self.half + self.below(self.vocab_size - self.half, count)

    def words(self, count: int) -> Tensor:
        """Return values, (rows, count), as unequal in frequency as words.

        The frequency of the n-th is as 1/n (Zipf).
        """
        share = 1 / torch.arange(1, self.vocab_size - self.half + 1, device=self.like["device"])
        drawn = torch.multinomial(share, self.rows * count, True, generator=self.like["generator"])
        return self.half + drawn.view(self.rows, count)

    def empty(self, T: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens, targets and distances of rows that hold and ask nothing."""
        shape, device = (self.rows, T), self.like["device"]
        return (torch.full(shape, FILLER, device=device), torch.full(shape, -1, device=device),
                torch.zeros(shape, dtype=torch.int64, device=device))


def recall(draw: Draw, T: int, load: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, targets and distances, (rows, T) each, of the task recall.

    First come `load` pairs of a key and its value. Then each key comes once more, at a random
    place. Its target is its value, and the distance goes back to that value. The rest is filler.
    """
    tokens, targets, distance = draw.empty(T)
    keys, values = draw.keys(load), draw.values(load)
    tokens[:, 0 : 2 * load : 2], tokens[:, 1 : 2 * load : 2] = keys, values
    asked = draw.distinct(load, 2 * load, T)
    tokens.scatter_(1, asked, keys)
    targets.scatter_(1, asked, values)
    distance.scatter_(1, asked, asked - torch.arange(1, 2 * load, 2, device=asked.device))
    return tokens, targets, distance


def induction(draw: Draw, T: int, load: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, targets and distances, (rows, T) each, of the task induction.

    T // 4 triggers of `load` kinds stand among noise. The same token follows every trigger of a
    kind. It is the target at a trigger, except at the first of its kind. The distance goes back to
    where that token last followed the kind.
    """
    _, targets, distance = draw.empty(T)
    tokens, triggers, after = draw.values(T), draw.keys(load), draw.values(load)
    places = 2 * draw.distinct(T // 4, 0, T // 2).sort(1).values
    kind = draw.below(load, T // 4)
    tokens.scatter_(1, places, triggers.gather(1, kind))
    tokens.scatter_(1, places + 1, after.gather(1, kind))
    earlier = (kind[:, :, None] == kind[:, None, :]).tril(-1)
    newest = (earlier * torch.arange(1, T // 4 + 1, device=kind.device)).amax(2) - 1
    known = newest >= 0
    targets.scatter_(1, places, after.gather(1, kind).masked_fill(~known, -1))
    distance.scatter_(1, places, places - places.gather(1, newest.clamp(min=0)) - 1)
    return tokens, targets, distance


def needle(draw: Draw, T: int, load: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, targets and distances, (rows, T) each, of the task needle.

    `load` pairs of a key and its value stand far apart among words. All keys come again at the end,
    each with its value after it. A key's target is its value there, and the distance goes back to
    the first place of the value.
    """
    _, targets, distance = draw.empty(T)
    tokens, keys, values = draw.words(T), draw.keys(load), draw.values(load)
    places = 2 * draw.distinct(load, 0, T // 2 - load)
    tokens.scatter_(1, places, keys)
    tokens.scatter_(1, places + 1, values)
    asked = slice(T - 2 * load, T, 2)
    tokens[:, asked], tokens[:, T - 2 * load + 1 :: 2], targets[:, asked] = keys, values, values
    distance[:, asked] = torch.arange(T - 2 * load, T, 2, device=places.device) - places - 1
    return tokens, targets, distance


def copying(draw: Draw, T: int, load: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, targets and distances, (rows, T) each, of the task copying.

    A string of `load` different tokens is followed by filler and MARKER. From MARKER on the targets
    are the string again. Every distance is T - load.
    """
    tokens, targets, distance = draw.empty(T)
    string = draw.distinct(load, draw.half, draw.vocab_size)
    tokens[:, :load], tokens[:, -load] = string, MARKER
    tokens[:, T - load + 1 :] = string[:, :-1]
    targets[:, -load:], distance[:, -load:] = string, T - load
    return tokens, targets, distance


def counting(draw: Draw, T: int, load: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, targets and distances, (rows, T) each, of the task counting.

    min(8 load, T // 2) symbols of `load` kinds stand among filler. The target at the n-th symbol of
    a kind is the token vocab_size // 2 + n - 1. The distance goes back to the kind's first symbol.
    """
    tokens, targets, distance = draw.empty(T)
    count = min(8 * load, T // 2)  # of all symbols
    symbols, kind = draw.keys(load), draw.below(load, count)
    places = 1 + draw.distinct(count, 0, T - 1).sort(1).values  # a filler first
    tokens.scatter_(1, places, symbols.gather(1, kind))
    same = (kind[:, :, None] == kind[:, None, :]).tril()
    targets.scatter_(1, places, draw.half + same.sum(2) - 1)
    first = same.int().argmax(2)
    distance.scatter_(1, places, places - places.gather(1, first))
    return tokens, targets, distance


TASKS = {task.__name__: task for task in (recall, induction, needle, copying, counting)}


# -----------------------------------------------------------------------------
# one model


def generator(seed: int, task: str, part: str, device: torch.device) -> torch.Generator:
    """Return the source of a task's rows: the same for every mixer, another one for the test."""
    number = 2 * (seed * len(TASKS) + [*TASKS].index(task)) + ("train", "test").index(part)
    return torch.Generator(device).manual_seed(number % 2**63)


def make_model(grid: Grid, mixer: str, seed: int) -> trainer.GPT:
    """Return a model of the grid's shape with one of MIXERS, its weights drawn from the seed."""
    torch.manual_seed(seed)
    shape = dict(vocab_size=grid.vocab_size, n_embd=grid.n_embd, sequence_length=max(grid.lengths))
    return trainer.GPT(trainer.GPTConfig(**shape | RECIPE | MIXERS[mixer]))


def train(model: trainer.GPT, task: str, grid: Grid, seed: int,
          runtime: Runtime) -> tuple[float, int]:
    """Train on batches of one (length, load) each; return the last loss and the number of steps.

    A round is a batch of every (length, load), in random order. The last loss is the mean over two
    rounds. Once it is below LEARNT, the rest of grid.steps is left out.
    """
    recipe = trainer.RECIPE
    optimizers = trainer.make_optimizers(
        model, recipe["optimizer"], recipe["learning_rate"] * grid.rate, 0.0,
        recipe["rest_lr"] * grid.rate, (recipe["beta1"], recipe["beta2"]), recipe["momentum"])
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = [group["lr"] for group in groups]
    rows, cells = generator(seed, task, "train", runtime.device), grid.cells()
    order, losses = torch.Generator().manual_seed(seed), []
    for step in range(grid.steps):
        if step % len(cells) == 0:
            last = torch.stack(losses[-2 * len(cells):]).mean() if losses else math.inf
            if last < LEARNT:
                break
            places = torch.randperm(len(cells), generator=order).tolist()
        T, load = cells[places[step % len(cells)]]
        tokens, targets, _ = TASKS[task](Draw(rows, grid.tokens // T, grid.vocab_size), T, load)
        with runtime.autocast():
            loss = answers(model, tokens, targets)[1]
        loss.backward()
        factor = trainer.learning_rate_factor(step, grid.steps, grid.steps // 20, grid.steps // 2)
        for group, rate in zip(groups, rates):
            group["lr"] = rate * factor
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses[-2 * len(cells):]).mean().item(), len(losses)


def answers(model: trainer.GPT, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return hidden states (n, C) where a target counts, and the mean loss of these targets."""
    asked = targets >= 0
    hidden = model.hidden(tokens)[asked]
    return hidden, model.lm_head.loss(hidden[None], targets[asked][None])[0]


@torch.no_grad()
def test(model: trainer.GPT, task: str, grid: Grid, seed: int, runtime: Runtime) -> list[dict]:
    """Return for every (length, load) how many answers are right, in all and by distance.

    chance is the share of the commonest answer. by_distance has [begin, right, answers] for the
    distances from begin to 2 begin - 1. begin is a power of two, or 0 for the distance 0.
    """
    source, cells = generator(seed, task, "test", runtime.device), []
    for T, load in grid.cells():
        right, distances, asked = [], [], []
        while sum(map(len, asked)) < grid.answers:
            draw = Draw(source, grid.tokens // T, grid.vocab_size)
            tokens, targets, distance = TASKS[task](draw, T, load)
            with runtime.autocast():
                hidden, _ = answers(model, tokens, targets)
                found = model.lm_head.logits(hidden).argmax(-1)
            asked.append(targets[targets >= 0])
            right.append(found == asked[-1])
            distances.append(distance[targets >= 0])
        right, distances, asked = (torch.cat(part).cpu() for part in (right, distances, asked))
        begins = torch.where(distances > 0, 2**distances.clamp(min=1).log2().floor().long(), 0)
        by_distance = [[begin, right[begins == begin].sum().item(), (begins == begin).sum().item()]
                       for begin in begins.unique().tolist()]
        cells.append(dict(T=T, load=load, answers=len(right), right=right.sum().item(),
                          chance=asked.bincount().max().item() / len(asked),
                          by_distance=by_distance))
    return cells


def refuse_leaky(name: str, model: trainer.GPT, lengths: list[int], runtime: Runtime):
    """Raise InputError with the model's name where an output depends on a token after it.

    lengths: of the rows to try.
    """
    shapes = [(CHECKED_ROWS, T) for T in lengths]
    say = lambda text: print(f"{name}: {text}", flush=True)
    try:
        refuse_leaks(model, shapes, runtime, say, modes=(False,), cuts=CUTS)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def measure(task: str, mixer: str, seed: int, grid: Grid, runtime: Runtime) -> dict:
    """Train and test one model; return its line of rows.jsonl.

    Raise InputError where the model leaks, Diverged where the loss is not finite.
    """
    model = make_model(grid, mixer, seed).to(runtime.device)
    lengths = sorted({min(grid.lengths), max(grid.lengths)})
    refuse_leaky(name_of(task, mixer, seed), model, lengths, runtime)
    begin = time.perf_counter()
    most = math.ceil(grid.steps / 3) if mixer == "none" else grid.steps
    loss, steps = train(model, task, replace(grid, steps=most), seed, runtime)
    if not math.isfinite(loss):
        raise Diverged(f"{name_of(task, mixer, seed)}: the loss is {loss}")
    seconds = time.perf_counter() - begin
    return dict(task=task, mixer=mixer, seed=seed, setting=setting(grid, mixer), loss=loss,
                steps=steps, seconds=seconds, parameters=sum(p.numel() for p in model.parameters()),
                machine=machine(runtime), code=code(), cells=test(model, task, grid, seed, runtime))


def name_of(task: str, mixer: str, seed: int) -> str:
    return f"{task}-{mixer}-seed{seed}"


def setting(grid: Grid, mixer: str) -> dict:
    """Return what a result depends on besides task and seed, as JSON gives it back."""
    return json.loads(json.dumps(asdict(grid) | RECIPE | MIXERS[mixer]))


def read_lines(path: Path, is_whole, only_read: bool = False) -> list[dict]:
    """Return the results in a file, one a line; raise InputError where is_whole(one) is not true.

    A last line that is cut off is dropped: a kill has done that, or a study is about to end it.
    From the file it goes, too, unless that is only read.
    """
    if not path.exists():
        return []
    way_out = "delete it, or choose another --output"
    foreign = InputError(f"{path}: not a file of this study; {way_out}")
    try:
        *lines, last = path.read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines]
    except (ValueError, RecursionError):
        raise foreign from None
    try:
        rows += [json.loads(last)] if last else []
        lines += [last] if last else []
    except (ValueError, RecursionError):
        if not last.startswith("{"):
            raise foreign from None
        if not only_read:
            print(f"{path}: the last line was cut off and is dropped", file=sys.stderr)
    for place, row in enumerate(rows, 1):
        if not (isinstance(row, dict) and is_whole(row)):
            raise InputError(f"{path}: line {place} is not a result of this study; {way_out}")
    if last and not only_read:
        archive.write(path, "".join(f"{line}\n" for line in lines).encode())
    return rows


def append_lines(path: Path, *rows: dict):
    """Append results to what read_lines reads; without any, only see that this can be done."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write("".join(f"{json.dumps(row)}\n" for row in rows))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None


def read_rows(path: Path, grid: Grid, only_read: bool = False) -> list[dict]:
    """Return the lines of models that are finished; raise InputError for those of another grid.

    Rows of counting from before 2026-11-30 are of another one: distance 0 was counted as 1 there.
    A model that stands twice would count twice: it is refused, too.
    """
    rows, found = read_lines(path, is_whole, only_read), set()
    for row in rows:
        name = name_of(row["task"], row["mixer"], row["seed"])
        old = row["task"] == COUNTED and any(cell["by_distance"][0][0] > 0 for cell in row["cells"])
        if old or row["setting"] != setting(grid, row["mixer"]) \
                or [*map(cell_key, row["cells"])] != grid.cells():
            raise InputError(f"{path} holds {name} with other settings; delete it, or choose "
                             "another --output")
        if name in found:
            raise InputError(f"{path} holds {name} twice; delete one of its lines, or choose "
                             "another --output")
        found.add(name)
    return rows


def is_whole(row: dict) -> bool:
    """Return whether a row has all that the study takes of it; `code` is of newer rows alone."""
    cells = row.get("cells")
    return (row.get("task") in [*TASKS] and row.get("mixer") in [*MIXERS] and "setting" in row
            and trainer.FLAGS["seed"].kind.accepts(row.get("seed"))
            and integer(1).accepts(row.get("steps")) and isinstance(row.get("machine"), str)
            and isinstance(row.get("code", ""), str)
            and isinstance(cells, list) and len(cells) > 0 and all(map(is_whole_cell, cells)))


def is_whole_cell(cell) -> bool:
    """Return whether a cell has its numbers, and its answers by distance sum to all of them."""
    kinds = dict(T=integer(1), load=integer(1), answers=integer(1), right=integer(0),
                 chance=number(0, 1))
    if not isinstance(cell, dict) or not all(
            kind.accepts(cell.get(name)) for name, kind in kinds.items()):
        return False
    parts = cell.get("by_distance")
    if not isinstance(parts, list) or not all(
            isinstance(part, list) and len(part) == 3 and all(map(integer(0).accepts, part))
            and part[1] <= part[2] > 0 for part in parts):
        return False
    begins = [begin for begin, _, _ in parts]
    sums = [sum(part[place] for part in parts) for place in (1, 2)]
    return begins == sorted({*begins}) and sums == [cell["right"], cell["answers"]]


# -----------------------------------------------------------------------------
# the tables and the plot


def share(counts: list[tuple[int, int]]) -> float:
    """Return the share of right answers of (right, answers) pairs."""
    right, number = map(sum, zip(*counts))
    return right / number


def by_load(rows: list[dict]) -> dict[tuple[int, int], float]:
    """Return {(T, load): accuracy} over the seeds of one task and mixer."""
    cells = sorted((cell for row in rows for cell in row["cells"]), key=cell_key)
    return {key: share([(cell["right"], cell["answers"]) for cell in group])
            for key, group in itertools.groupby(cells, cell_key)}


def cell_key(cell: dict) -> tuple[int, int]:
    return cell["T"], cell["load"]


def by_distance(rows: list[dict]) -> dict[int, float]:
    """Return {begin: accuracy} over all lengths and loads.

    Distances are told apart by the power of two, begin, where a group begins.
    """
    found = {}
    for row in rows:
        for cell in row["cells"]:
            for begin, right, number in cell["by_distance"]:
                found.setdefault(begin, []).append((right, number))
    return {begin: share(counts) for begin, counts in sorted(found.items())}


def table(first: str, lines: dict[str, dict], head) -> list[str]:
    """Return a Markdown table of percentages; head(column) is a column's title."""
    columns = sorted({column for values in lines.values() for column in values})
    rows = [[name, *(f"{100 * values[column]:.1f}" for column in columns)]
            for name, values in lines.items()]
    return [markdown([first, *map(head, columns)], rows), ""]


def controls(rows: list[dict]) -> list[tuple[bool | None, str]]:
    """Return for each control whether it holds, and a sentence with its worst number.

    The worst cell of the worst seed counts. None stands for a control that was not trained.
    """
    found, groups = [], grouped(rows)
    for task in dict.fromkeys(task for task, _ in groups):
        if task != COUNTED and (task, "attention") in groups:
            worst, (T, load) = min((cell["right"] / cell["answers"], cell_key(cell))
                                   for row in groups[task, "attention"] for cell in row["cells"])
            found.append((worst >= SOLVED, f"{task}: attention answers {worst:.1%} at its worst "
                          f"(T = {T}, load {load}), {SOLVED:.1%} are asked for"))
        elif task != COUNTED:
            found.append((None, f"{task}: attention was not trained"))
        if (task, "none") in groups:
            errors, cell = max((errors_above_chance(cell), cell_key(cell))
                               for row in groups[task, "none"] for cell in row["cells"])
            found.append((errors <= MARGIN, f"{task}: without mixing {errors:.1f} standard errors "
                          f"above chance at most (T = {cell[0]}, load {cell[1]}), {MARGIN} are "
                          "allowed"))
        else:
            found.append((None, f"{task}: the model without mixing was not trained"))
    return found


def errors_above_chance(cell: dict) -> float:
    """Return by how many standard errors right answers are above chance, negative below it.

    Chance is the share of the commonest answer among those asked for, so a little more than that of
    a guess. Its error is that of independent answers, but at least one answer.
    """
    chance, count = cell["chance"], cell["answers"]
    error = max(math.sqrt(chance * (1 - chance) * count), 1.0)
    return (cell["right"] - chance * count) / error


def grouped(rows: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """Return {(task, mixer): rows}, in the order of TASKS and MIXERS."""
    found = {(task, mixer): [row for row in rows if (row["task"], row["mixer"]) == (task, mixer)]
             for task in TASKS for mixer in MIXERS}
    return {key: group for key, group in found.items() if group}


def write_report(rows: list[dict], folder: Path, grid: Grid):
    """Write table.md of the models that are finished."""
    seeds = sorted({row["seed"] for row in rows})
    lines = [
        f"# {folder.name}", "",
        f"Right answers in percent, on rows never seen. Models of two layers of {grid.n_embd} "
        f"channels, vocabulary {grid.vocab_size:,}, one model a task and mixer, trained on at "
        f"most {grid.steps:,} steps of {grid.tokens:,} tokens of all lengths T and loads at once. "
        f"Seeds: {', '.join(map(str, seeds))}. {MADE_BY} from rows.jsonl; experiments/recall.py "
        "says what is asked.", "",
        f"Machine: {'; '.join(sorted({row['machine'] for row in rows}))}.", "",
        *["The models were made with different code. That may explain differences.", ""] * (
            len({row.get("code") for row in rows}) > 1),
        "## Controls", "",
        *(f"- {VERDICTS[holds]}: {text}." for holds, text in controls(rows)), ""]
    for task in TASKS:
        mixers = {}
        for (of, mixer), group in grouped(rows).items():
            if of == task:
                own = sorted({row["seed"] for row in group})
                apart = "" if own == seeds else f" (seeds: {', '.join(map(str, own))})"
                mixers[mixer + apart] = group
        if mixers:
            lines += [f"## {task}", ""]
            lines += table("T x load", {name: by_load(group) for name, group in mixers.items()},
                           lambda column: f"{column[0]} x {column[1]}")
            lines += table("distance", {name: by_distance(group)
                                        for name, group in mixers.items()},
                           lambda begin: f"{begin}-{2 * begin - 1}" if begin > 1 else f"{begin}")
    archive.write(folder / "table.md", "\n".join(lines).encode())


def plot(rows: list[dict], output: Path, grid: Grid):
    """Draw accuracy against load at the longest rows, and against distance: two panels a task."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = [task for task in TASKS if any(row["task"] == task for row in rows)]
    figure, panels = plt.subplots(len(tasks), 2, figsize=(10, 1 + 2.6 * len(tasks)), sharey=True,
                                  squeeze=False, layout="constrained")
    longest = max(grid.lengths)
    for (task, mixer), group in grouped(rows).items():
        left, right = panels[tasks.index(task)]
        loads = {load: value for (T, load), value in by_load(group).items() if T == longest}
        for axes, values, x in ((left, loads, f"load, T = {longest}"),
                                (right, by_distance(group), "distance, tokens, all T and loads")):
            axes.plot([*values], [100 * value for value in values.values()], label=mixer,
                      color=f"C{[*MIXERS].index(mixer)}", marker="o", markersize=3, linewidth=1)
            axes.set_xscale("symlog", base=2, linthresh=1)  # a distance may be 0
            axes.set(xlabel=x, title=task)
            axes.grid(alpha=0.3)
        left.set_ylabel("right answers, %")
    named = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    figure.legend(named.values(), named, loc="outside lower center", ncols=len(MIXERS))
    figure.savefig(output, dpi=120)
    plt.close(figure)


# -----------------------------------------------------------------------------
# command line


def names(known) -> Kind:
    """Return the Kind that reads "one,other" as a list of known names."""
    return Kind(lambda text: [*dict.fromkeys(text.split(","))], {*known}.issuperset,
                f"of {', '.join(known)}, with commas between", "NAME,NAME")


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the arguments; raise InputError where they are wrong."""
    parser = Parser(prog="ablation_studies.py recall", description=__doc__)
    add = parser.add_argument
    add("--grid", choices=GRIDS, default="small", help="lengths and loads (small)")
    add("--tasks", type=names(TASKS), default=[*TASKS], help="(all)")
    add("--mixers", type=names(MIXERS), default=[*MIXERS], help="(all)")
    add("--seeds", type=seeds, default="1337", metavar="N,N", help="(1337)")
    add("--device", type=trainer.FLAGS["device"].kind, default="auto", help="(auto)")
    add("--output", type=FOLDER, default=ROOT / "experiments/studies", metavar="DIR",
        help="(experiments/studies)")
    add("--dry_run", action="store_true", help="say what would be trained")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Train and test what is missing; return 1 where a control fails."""
    args = parse(argv)
    # every task and mixer once before the next seed, so that a study cut short can be read
    wanted = [*itertools.product(args.seeds, args.tasks, args.mixers)]
    folder = args.output.resolve() / ("recall" if args.grid == "small" else f"recall-{args.grid}")
    if args.dry_run:  # a study may be at work there: nothing is written
        finished = {(row["seed"], row["task"], row["mixer"]) for row in
                    read_rows(folder / "rows.jsonl", GRIDS[args.grid], only_read=True)}
        missing = [name_of(task, mixer, seed) for seed, task, mixer in wanted
                   if (seed, task, mixer) not in finished]
        print("\n".join(missing or ["nothing: all models are finished"]))
        return 0
    runtime = usual_runtime(choose_device(args.device))
    with owned(folder, f"--output {folder}", {"table.md": MADE_BY, "curves.png": ""}):
        return study(wanted, folder, GRIDS[args.grid], runtime)


def study(wanted: list[tuple[int, str, str]], folder: Path, grid: Grid, runtime: Runtime) -> int:
    """Train and test each (seed, task, mixer) that is missing; return 1 where a control fails."""
    path = folder / "rows.jsonl"
    rows = read_rows(path, grid)
    finished = {(row["seed"], row["task"], row["mixer"]): row.get("code") for row in rows}
    for seed, task, mixer in wanted:
        name = name_of(task, mixer, seed)
        if (seed, task, mixer) in finished:
            other = finished[seed, task, mixer] not in (None, code())
            print(f"{name}: finished before{', with other code' * other}, skipped", flush=True)
            continue
        append_lines(path)  # it can be written: said before minutes of training
        row = measure(task, mixer, seed, grid, runtime)
        rows.append(row)
        append_lines(path, row)
        accuracy = share([(cell["right"], cell["answers"]) for cell in row["cells"]])
        print(f"{name}: {accuracy:.1%} right, {row['steps']} steps, {row['seconds']:.0f} s",
              flush=True)
        write_report(rows, folder, grid)
    write_report(rows, folder, grid)
    try:
        plot(rows, folder / "curves.png", grid)
    except ImportError:
        print("no curves.png: matplotlib is not installed")
    failed = [text for holds, text in controls(rows) if holds is False]
    for text in failed:
        print(f"error: a control fails: {text}", file=sys.stderr)
    print(f"{relative(str(folder))}: {len(rows)} models in table.md")
    return 1 if failed else 0
