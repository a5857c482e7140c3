"""Compare checkpoints token by token on the same text, in rows and document by document.

    python experiments/evaluate.py runs/b runs/c --bin "data/web/val_*.bin" --out runs/compare
    python experiments/evaluate.py runs/c/state_step000350.pt --rows 1024 --tokens 65536
    python experiments/evaluate.py runs/c --filters --out runs/compare    # also of the filters
    python experiments/evaluate.py runs/b runs/c --text all --rows 65536 --out runs/long
    python experiments/evaluate.py runs/long/table.md                 # draws the plots again

A CHECKPOINT is a file state_step*.pt of the trainer, or a run's folder, whose newest one counts.
Two measures score the first --tokens targets of --bin (the first checkpoint's validation shards).
With --text they score those of each source, made of installed packages (package_text.py). Both
score the same targets, so all differences are paired. First a batch of each width is scored again
with other tokens after a cut in each row: 32 cuts of a width, fewer where rows are long. A model
that leaks there is refused. test_causality.py tries every cut.

stream      rows of --rows tokens as they stand: the trainer's own validation
documents   a token is predicted from its own document alone, from token 50256 on. A document
            longer than --rows is cut into pieces, none of which sees the one before. The target
            of a document's last token is the 50256 of the next one, and it counts

Losses are also told apart by position, by source, and by whether a document ended before in the
row. Few documents have far positions. So of documents of at least --rows tokens there is a table of
their own: it has the same ones at each position, and says how many. Losses are told apart by the
longest earlier match of the tokens up to the target, too. A hit is where the token after the most
recent match is the right next one. --filters adds the lengths, rank, movement and frequency
response of AFNO's filters, and the loss without the taps beyond some lags.

The tables go to stdout. With --out they also go to DIR/table.md, curves to DIR/curves.png and what
filters look like to DIR/filters.png. Plots take matplotlib. DIR/losses.npz keeps the losses as
float16 under LABEL/stream and LABEL/documents, where place i is the target i + 1 of the text. It
keeps taps under LABEL/taps and LABEL/initial taps. LABEL is folder@step. What stands there for the
same file, text, tokens, rows, machine and code is not computed again. The tables are of what the
last call named, checkpoints and --filters: it says what else losses.npz holds. Groups are means of
these rounded losses, each off by 0.004 at most below 16, by 0.008 below 32. In groups of few
targets the last decimals mean nothing.
A standard error is that of the mean over rows or documents: it holds the text's noise, not that of
training.
"""
import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import re
import sys
import time
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt2_afno as trainer  # noqa: E402
from afno import MATCHES  # noqa: E402
from checkpoints import (Checkpoints, OtherVersion, demand, demand_checksums,  # noqa: E402
                         load_weights, of_this_version, position_groups, refuse_damaged_weights)
from data.loader import TokenStream, count_val_tokens, digest_of, to_device  # noqa: E402
from data.text_to_bin import (END_OF_TEXT, FOLDER, ROOT, InputError, Kind, Parser,  # noqa: E402
                              first_line, integer, one_of, owned, relative)
from experiments import archive, package_text  # noqa: E402
from experiments.plot_runs import name_lines, refuse_no_file  # noqa: E402
from runtime import (MOST_TOKENS, Diverged, Runtime, choose_device, code_of,  # noqa: E402
                     gpu_driver, run, shapes_of, usual_runtime)

MEASURES = ("stream", "documents")
END_BEFORE = "a document's end before it in its row"  # what its table is by
LONG = "a document's position, the "  # what its table is by begins so
MOST_CUTS = 32  # after which other tokens come, to see leaks in rows of a width
BLOCK = 64  # tokens: kernels and convolutions cut rows at multiples of it
SHORTEST = 64  # tokens: shorter pieces are padded to it
CUTS = (32, 128, 512)  # the last lags that are kept
FIGURES = {  # of filters, and how they are written
    "lags to 50%": "{:.1f}", "lags to 99%": "{:.1f}",
    **{f"energy beyond {last}": "{:.2%}" for last in CUTS},
    "median frequency": "{:.3f}",
    "rank": "{:.2f}", "correlation": "{:.3f}", "moved": "{:.2f}", "cosine to initial": "{:.3f}"}
OCTAVES = [0.0, *(0.5**n for n in range(9, 0, -1))]  # borders in cycles a token, up to a half
# what the parts of a key are of, in their order
KEY = ("checkpoint", "checkpoint", "code", "text", "text", "row length", "machine")
FILTER_TABLES = ("layer", "response in cycles a token")
HEAD = "+- is the standard error over rows (stream) or documents."
BATCH_TOKENS = dict(cuda=65536, cpu=8192)
TOKENS_A_SOURCE = 262_144  # at most, of --text


# -----------------------------------------------------------------------------
# what a model reads at once


@dataclass(frozen=True)
class Pieces:
    """Hold how the inputs 0 ... N - 1 are cut: a model reads a piece and nothing else."""

    start: np.ndarray  # of each piece, rising from 0
    length: np.ndarray  # they sum to N
    unit: np.ndarray  # number of the row or document that a piece is of

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Return a value for each of the N inputs, (N,), from one for each piece."""
        return np.repeat(values, self.length)

    def units(self) -> np.ndarray:
        """Return the number of the row or document that each of the N inputs is of."""
        return self.spread(self.unit)


def cut_rows(count: int, T: int) -> Pieces:
    """Return rows of T tokens; the last one may be shorter."""
    start = np.arange(0, count, T)
    return Pieces(start, np.minimum(T, count - start), np.arange(len(start)))


def cut_documents(tokens: np.ndarray, count: int, T: int) -> Pieces:
    """Return pieces of at most T tokens, each inside a document of the first `count` tokens.

    A document begins with END_OF_TEXT, the first one wherever the text begins.
    """
    begin = np.union1d([0], np.flatnonzero(tokens[:count] == END_OF_TEXT))
    size = np.diff(begin, append=count)
    parts = -(-size // T)
    unit = np.repeat(np.arange(len(begin)), parts)
    part = np.arange(len(unit)) - np.repeat(np.cumsum(parts) - parts, parts)  # 0 ... in each
    start = begin[unit] + T * part
    return Pieces(start, np.minimum(T, begin[unit] + size[unit] - start), unit)


def joined(parts: list[Pieces]) -> Pieces:
    """Return the pieces of texts that follow one another."""
    sizes = np.cumsum([0] + [part.length.sum() for part in parts])
    units = np.cumsum([0] + [part.unit[-1] + 1 for part in parts])
    return Pieces(np.concatenate([part.start + size for part, size in zip(parts, sizes)]),
                  np.concatenate([part.length for part in parts]),
                  np.concatenate([part.unit + first for part, first in zip(parts, units)]))


@torch.no_grad()
def losses_of_batch(model: trainer.GPT, idx: np.ndarray, targets: np.ndarray,
                    runtime: Runtime) -> np.ndarray:
    """Return every target's loss, float32, of inputs and targets (B, T); those of -1 are 0."""
    idx, targets = (to_device(torch.from_numpy(part), runtime.device) for part in (idx, targets))
    with runtime.autocast():
        return model.lm_head.loss(model.hidden(idx), targets)[1].float().cpu().numpy()


def widths_of(pieces: Pieces, T: int) -> np.ndarray:
    """Return the width to which each piece is filled up: a power of two, or T."""
    return np.maximum(SHORTEST, 1 << np.ceil(np.log2(pieces.length)).astype(int)).clip(max=T)


def losses_of(model: trainer.GPT, tokens: np.ndarray, pieces: Pieces, T: int,
              runtime: Runtime, batch_tokens: int) -> np.ndarray:
    """Return every target's loss, (N,) float32, in pieces of at most T tokens.

    tokens: (N + 1,). Pieces of similar length make a batch of about batch_tokens. It is filled up
    on the right to the next power of two, with targets that do not count. So there are few shapes.
    """
    count = int(pieces.length.sum())
    losses = np.zeros(count, np.float32)
    widths = widths_of(pieces, T)
    for width in np.unique(widths)[::-1]:  # what needs most memory first
        chosen, most = np.flatnonzero(widths == width), max(1, batch_tokens // int(width))
        for first in range(0, len(chosen), most):
            batch = chosen[first : first + most]
            rows = min(most, 1 << (len(batch) - 1).bit_length())
            length = np.zeros(rows, int)
            length[: len(batch)] = pieces.length[batch]
            start = np.zeros(rows, int)
            start[: len(batch)] = pieces.start[batch]
            counts = np.arange(width) < length[:, None]
            place = (start[:, None] + np.arange(width)) * counts
            found = losses_of_batch(model, np.where(counts, tokens[place], 0),
                                    np.where(counts, tokens[place + 1], -1), runtime)
            losses[place[counts]] = found[counts]
    return losses


def choose_cuts(T: int, number: int, random: np.random.Generator) -> np.ndarray:
    """Return `number` places of a row of T in random order: the last ones whose tokens stay.

    Half of them at most are the ends of blocks of 64 tokens, where convolutions are cut. The others
    are spread over the row.
    """
    ends = random.permutation(np.arange(BLOCK - 1, T - 1, BLOCK))[: number // 2]
    borders = np.linspace(0, T - 1, number - len(ends) + 1).astype(int)
    low, high = borders[:-1], np.maximum(borders[1:], borders[:-1] + 1)
    return random.permutation(np.concatenate((ends, random.integers(low, high))))


def refuse_leaks(model: trainer.GPT, text: "Text", runtime: Runtime, batch_tokens: int, path: Path):
    """Raise InputError where a loss depends on a token after its input, in rows of any width.

    Of each width that is scored, one batch of rows is scored again for the same targets, with other
    tokens after a cut in each row. Up to the cuts losses must be the same, bit for bit. A batch has
    32 rows at most, so 32 cuts. Where it has fewer, the widest rows are scored more often: until
    there were 32 cuts, or four and 65,536 tokens.
    """
    random, widths = np.random.default_rng(), text.widths()
    for T in widths:
        rows = max(1, min(batch_tokens // T, MOST_CUTS))
        needed, allowed = -(-MOST_CUTS // rows), max(4, 65_536 // (rows * T))
        times = min(needed, allowed) if T == widths[-1] else 1
        x, y = (np.resize(text.tokens[first:][: text.count], (rows, T)) for first in (0, 1))
        before = losses_of_batch(model, x, y, runtime).view(np.int32)
        for last in choose_cuts(T, rows * times, random).reshape(times, rows, 1):
            after = np.arange(T) > last
            other = np.where(after, (x + random.integers(1, model.config.vocab_size, x.shape))
                             % model.config.vocab_size, x)
            moved = losses_of_batch(model, other, y, runtime).view(np.int32) != before
            if (places := np.flatnonzero((moved & ~after).any(0))).size:
                raise InputError(f"{path}: the model leaks: the loss at place {places[0]} of a row "
                                 f"of {T:,} depends on tokens after it")


# -----------------------------------------------------------------------------
# groups of targets


def longest_matches(tokens: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the longest earlier match of the tokens up to each input, and whether it is a hit.

    tokens: (N + 1,). start: (N,), where the row of each input begins. The match of input i is the
    largest m such that the tokens i - m + 1 ... i also end at an earlier j of the row. It is a hit
    where the token after the most recent such j is token i + 1. Returns (N,) of int, 0 where token
    i is new in its row, and (N,) of bool.

    Matches are found length by length. `inputs` are those whose last m tokens occur more than once
    in their row. Inputs whose last m tokens are equal have equal `name`s. The cost is the sum of
    all matches, times a logarithm.
    """
    count = len(start)
    match, last = np.zeros(count, np.int32), np.zeros(count, np.int64)
    name = np.full(count, -1)  # of the last m tokens, -1 where they occur once
    words = int(tokens.max()) + 1
    inputs, keys, m = np.arange(count), start * words + tokens[:count], 0
    while len(inputs):
        order = np.argsort(keys, kind="stable")  # equal ones stay in the text's order
        keys, sorted_inputs = keys[order], inputs[order]
        same = keys[1:] == keys[:-1]
        m += 1
        found = sorted_inputs[1:][same]
        match[found], last[found] = m, sorted_inputs[:-1][same]
        often = np.append(same, False) | np.insert(same, 0, False)
        repeated = np.sort(sorted_inputs[often])
        name[sorted_inputs[often]] = np.insert(~same, 0, False).cumsum()[often]
        inputs = repeated[repeated - start[repeated] >= m]
        inputs = inputs[name[inputs - 1] >= 0]
        keys = name[inputs - 1] * words + tokens[inputs]
        name[repeated] = -1
    return match, (match > 0) & (tokens[last + 1] == tokens[1 : count + 1])


def groups_of(text: "Text", measure: str) -> dict[str, dict[str, np.ndarray]]:
    """Return {what it is by: {group: mask (N,)}} of a measure's targets, without empty groups."""
    pieces, T = text.pieces[measure], text.T
    start, inputs = pieces.spread(pieces.start), np.arange(text.count)
    place = inputs - start
    context = dict(stream="row", documents="piece")[measure]
    positions = {f"{low}-{high - 1}": (place >= low) & (place < high)
                 for low, high in position_groups(T)}
    groups = {f"position in its {context}": positions}
    if len(text.sources) > 1:
        ends = np.cumsum([*text.sources.values()])
        groups["source"] = {name: (inputs >= end - size) & (inputs < end)
                            for (name, size), end in zip(text.sources.items(), ends)}
    if measure == "stream":
        after = text.after_an_end()
        groups[END_BEFORE] = dict(no=~after, yes=after)
    match, hit = longest_matches(text.tokens, start)
    matches = {"0": match == 0}
    for low, high in zip(MATCHES, [*MATCHES[1:], math.inf]):
        size = f"{low}-{high - 1}" if high > low + 1 else f"{low}"
        these = (match >= low) & (match < high)
        matches |= {f"{size if high < math.inf else f'>= {low}'}, {word}": these & right
                    for word, right in (("miss", ~hit), ("hit", hit))}
    matches |= {"all misses": (match > 0) & ~hit, "all hits": hit}
    groups[f"longest earlier match in its {context}"] = matches
    if measure == "documents":
        full = (np.diff(pieces.unit, prepend=-1) > 0) & (pieces.length == T)  # first pieces
        if full.any():
            by, inside = f"{LONG}{full.sum():,} of {T:,} tokens or more", pieces.spread(full)
            groups[by] = {group: mask & inside for group, mask in positions.items()}
    return {by: {name: mask for name, mask in masks.items() if mask.any()}
            for by, masks in groups.items()}


def mean_and_error(values: np.ndarray, unit: np.ndarray) -> tuple[float, float]:
    """Return the mean of values (n,) and its standard error over units (n,), nan for a single one.

    Units are of unequal size. So the mean is a ratio of sums, and the error is that of a ratio.
    """
    values, size = values.astype(np.float64), np.bincount(unit)
    mean = values.mean()
    rest = (np.bincount(unit, values) - size * mean)[size > 0]
    if len(rest) < 2:
        return mean, math.nan
    return mean, math.sqrt(len(rest) / (len(rest) - 1) * (rest**2).sum()) / len(values)


# -----------------------------------------------------------------------------
# checkpoints, and results that stand


class Checkpoint:
    """Read one checkpoint, once whole for its checksums; tensors are read again when they are used.

    Raise InputError where there is none that can be read.
    """

    def __init__(self, source: str):
        self.path = Path(source)
        refuse_no_file(self.path)
        if self.path.is_dir():
            found = Checkpoints(self.path).paths()
            if not found:
                raise InputError(f"{source}: no state_step*.pt in this folder")
            self.path = found[0]
        try:
            demand_checksums(self.path)
            self.state = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
            self.state = of_this_version(self.state, self.path, trainer.CHECKPOINT_FLAGS)
            demand(trainer.FLAGS["seed"].kind.accepts(self.state["args"].get("seed")), "args.seed")
            self.config = trainer.GPTConfig(**self.state["config"])
            self.shapes = shapes_of(trainer.GPT, self.config)  # the model, on the device meta
            refuse_damaged_weights(self.state["model"], self.shapes)
            folder = re.sub(r"[|\s]+", "_", self.path.absolute().parent.name)  # a cell of a table
            self.label = f"{folder}@{self.state['step']}"
        except OtherVersion:
            raise
        except Exception as error:  # a truncated archive fails in many ways
            raise InputError(f"{source}: no readable checkpoint "
                             f"({first_line(error)})") from None

    def key(self, *more) -> list:
        """Return what a result depends on: the file, the code and whatever else is named."""
        return [relative(str(self.path.absolute())), self.path.stat().st_mtime_ns, code(), *more]

    def layers_with_taps(self) -> list[int]:
        """Return the numbers of the AFNO layers that are made of filters."""
        config = self.config
        return [layer for layer in range(config.n_layer) if config.mixer_of(layer) == "afno"
                and config.afno_arguments(layer)["form"] in ("filter", "hilbert")]

    def initial(self) -> trainer.GPT:
        """Return the model before its first step, as the trainer makes it."""
        torch.manual_seed(self.state["args"]["seed"])
        return trainer.GPT(self.config)

    def model(self, runtime: Runtime) -> trainer.GPT:
        """Return the model with the checkpoint's weights, ready to be evaluated."""
        model = self.initial()
        load_weights(model, self.state["model"], self.path)
        model = model.to(runtime.device).eval()
        if runtime.compile:
            model.compile()
        return model


class Results:
    """Hold arrays and numbers by name, in folder/losses.npz where a folder is named.

    Raise InputError where that file is not of this script.
    """

    def __init__(self, folder: Path | None):
        self.path = folder / "losses.npz" if folder else None
        self.arrays, self.index = {}, {}
        if self.path is not None and self.path.exists():
            try:
                with np.load(self.path) as file:
                    self.arrays = {name: file[name] for name in file.files}
                self.index = json.loads(str(self.arrays.pop("index")))
                for name, result in self.index.items():
                    if not self.is_whole(name, result):
                        raise ValueError(f"{name} is damaged")
            except (OSError, EOFError, ValueError, TypeError, AttributeError, LookupError,
                    zipfile.BadZipFile, zlib.error) as error:
                raise InputError(f"{self.path}: not a file of this script ({first_line(error)}); "
                                 "remove it, or name another --out") from None

    def is_whole(self, name: str, result: dict) -> bool:
        """Return whether a result of the file has its key, its arrays and its mean."""
        if not (isinstance(result["key"], list) and result["key"]):
            return False
        if name.endswith(MEASURES):
            losses, mean = self.arrays[name], result["mean"]
            off = abs(losses.mean(dtype=np.float64) - mean)
            return losses.shape == (result["count"],) and off < 0.01 * max(mean, 1)
        if name.endswith("/taps") and name in self.arrays:
            initial = self.arrays[name.removesuffix("taps") + "initial taps"]
            return initial.shape == self.arrays[name].shape
        return True

    def stands(self, name: str, key: list) -> bool:
        """Return whether the result of this name is of this key."""
        return self.index.get(name, {}).get("key") == key

    def drop(self, names: list[str]):
        """Forget results and arrays of these names."""
        for name in names:
            self.index.pop(name, None)
            self.arrays.pop(name, None)

    def put(self, name: str, key: list, arrays: dict[str, np.ndarray], **numbers):
        """Keep a result, in the file where there is one; arrays become float16."""
        if name in self.index and not self.stands(name, key):
            others = [of for of, old, new in zip(KEY, self.index[name]["key"], key) if old != new]
            print(f"{name}: in place of that of another {', '.join(dict.fromkeys(others))}",
                  file=sys.stderr)
        self.index[name] = dict(key=key, **numbers)
        self.arrays |= {where: values.astype(np.float16) for where, values in arrays.items()}
        if self.path is None:
            return
        part = self.path.with_suffix(".part")
        try:
            with open(part, "wb") as file:
                np.savez_compressed(file, index=json.dumps(self.index), **self.arrays)
            os.replace(part, self.path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise InputError(f"--out: cannot write {self.path}: {error.strerror}") from None


@functools.cache
def code() -> str:
    """Return what tells the code that a result depends on from other, a fork's mixers included."""
    return code_of(ROOT / f"experiments/{name}.py"
                   for name in ("evaluate", "package_text", "recall", "transfer"))


def machine(runtime: Runtime) -> str:
    """Return the version of torch, the device and its driver, and the dtype in words."""
    chip = f"{torch.cuda.get_device_name()}, driver {gpu_driver()}" \
        if runtime.device.type == "cuda" else "CPU"
    return f"torch {torch.__version__}, {chip}, {str(runtime.dtype).removeprefix('torch.')}"


@dataclass
class Text:
    """Hold what all checkpoints are asked: tokens, rows, and how each measure cuts them."""

    name: str
    tokens: np.ndarray  # N + 1
    T: int
    pieces: dict[str, Pieces]
    sources: dict[str, int] = field(default_factory=dict)  # how many targets each has, in order

    @property
    def count(self) -> int:
        """Return the number of targets."""
        return len(self.tokens) - 1

    def widths(self) -> list[int]:
        """Return the widths of rows that are scored, rising."""
        return sorted({int(width) for pieces in self.pieces.values()
                       for width in np.unique(widths_of(pieces, self.T))})

    @functools.cached_property
    def digest(self) -> str:
        return digest_of([self.tokens])

    def after_an_end(self) -> np.ndarray:
        """Return whether a target's row holds an earlier document's tokens before it, (N,)."""
        pieces = self.pieces["stream"]
        begins = np.where(self.tokens[:-1] == END_OF_TEXT, np.arange(self.count), -1)
        return np.maximum.accumulate(begins) > pieces.spread(pieces.start)


def refuse_unlike(checkpoints: list[Checkpoint], args):
    """Raise InputError where checkpoints disagree on rows or vocabulary."""
    first = checkpoints[0]
    for other in checkpoints[1:]:
        if not args.rows and other.config.sequence_length != first.config.sequence_length:
            raise InputError(f"--rows: name the tokens of a row, {first.label} was trained with "
                             f"{first.config.sequence_length}, {other.label} with "
                             f"{other.config.sequence_length}")
        if other.config.vocab_size != first.config.vocab_size:
            raise InputError(f"{other.label}: a vocabulary of {other.config.vocab_size}, "
                             f"{first.label} has {first.config.vocab_size}")
    for checkpoint in checkpoints:
        most = checkpoint.config.sequence_length
        if checkpoint.config.position == "learned" and (args.rows or 0) > most:
            raise InputError(f"--rows must be <= {most}, the positions that {checkpoint.label} has "
                             f"learned, got {args.rows}")


def read_text(args, first: Checkpoint) -> Text:
    """Return the text that the command line names; raise InputError where there is none."""
    T = args.rows or first.config.sequence_length
    if args.text:
        return read_sources(args, first, T)
    pattern, kept = args.bin, first.state["args"].get("input_val_bin")
    if pattern is None:
        if not kept:
            raise InputError(f"--bin: name the text, {first.label} has no --input_val_bin")
        pattern = str(ROOT / kept)
    stream = TokenStream(os.path.abspath(pattern), first.config.vocab_size, "bin")
    if args.tokens and args.tokens > len(stream) - 1:
        raise InputError(f"--tokens must be <= {len(stream) - 1}, the targets in --bin, "
                         f"got {args.tokens}")
    count = count_val_tokens(args.tokens, stream)
    tokens = stream.read(0, count + 1).numpy()
    pieces = dict(stream=cut_rows(count, T), documents=cut_documents(tokens, count, T))
    return Text(relative(os.path.abspath(pattern)), tokens, T, pieces)


def read_sources(args, first: Checkpoint, T: int) -> Text:
    """Return the sources of --text, one after the other; no row and no document is of two.

    The last target of a source is the 50256 with which the next one begins. Raise InputError where
    the checkpoint's tokens are not GPT-2's.
    """
    if first.config.vocab_size <= END_OF_TEXT:
        raise InputError(f"--text: the {first.config.vocab_size} tokens of {first.label} are not "
                         "GPT-2's")
    sources = args.text
    if sources == ["all"]:
        sources = [*package_text.SOURCES]
        if not package_text.PLAYS.exists():
            sources.remove("plays")
            print(f"--text all: {', '.join(sources)}; no plays, as there are none yet (python "
                  "data/shakespeare.py fetches them)", file=sys.stderr)
    found = {source: package_text.tokens_of(source, args.tokens or TOKENS_A_SOURCE)
             for source in sources}
    for source, part in found.items():
        if part.max() >= first.config.vocab_size:
            raise InputError(f"--text {source}: token {part.max()} is in it, {first.label} has "
                             f"{first.config.vocab_size}")
    sizes = {source: len(tokens) for source, tokens in found.items()}
    for source, size in sizes.items():
        if size < (args.tokens or 0):
            print(f"--text {source}: {size:,} targets, it has no more", file=sys.stderr)
    tokens = np.concatenate([*found.values(), [END_OF_TEXT]])
    pieces = dict(
        stream=joined([cut_rows(size, T) for size in sizes.values()]),
        documents=joined([cut_documents(part, len(part), T) for part in found.values()]))
    return Text(f"{', '.join(found)} of installed packages", tokens, T, pieces, sizes)


def compute(checkpoint: Checkpoint, text: Text, args, runtime: Runtime, results: Results):
    """Put a checkpoint's missing results into `results`."""
    key = checkpoint.key(text.digest, text.count, text.T, machine(runtime))
    batch_tokens, label = args.batch_tokens or BATCH_TOKENS[runtime.device.type], checkpoint.label

    @functools.cache
    def model() -> trainer.GPT:  # made where it is needed
        made = checkpoint.model(runtime)
        with reported(f"{label}/causality"):
            refuse_leaks(made, text, runtime, batch_tokens, checkpoint.path)
        return made

    def losses(measure: str) -> np.ndarray:
        return losses_of(model(), text.tokens, text.pieces[measure], text.T, runtime, batch_tokens)

    for measure in MEASURES:
        name = f"{label}/{measure}"
        if not results.stands(name, key):
            with reported(name):
                found = losses(measure)
                if not np.isfinite(found).all():
                    raise Diverged(f"{checkpoint.path}: its losses are not finite")
                results.put(name, key, {name: found}, count=text.count,
                            mean=float(found.mean(dtype=np.float64)))
    if not args.filters:
        return
    name = f"{label}/taps"
    if not results.stands(name, checkpoint.key()):
        initial, final = taps_of(checkpoint.initial()), taps_of(model())
        found = {} if final is None else {name: final, f"{label}/initial taps": initial}
        results.drop([name, f"{label}/initial taps", *(cut_name(label, last) for last in CUTS)])
        results.put(name, checkpoint.key(), found)
    if name not in results.arrays:
        return
    whole, unit = results.arrays[f"{label}/stream"], text.pieces["stream"].units()
    for last in CUTS:
        cut = cut_name(label, last)
        if last + 1 < results.arrays[name].shape[-1] and not results.stands(cut, key):
            with reported(cut), cut_taps(model(), last):
                above = losses("stream").astype(np.float16).astype(np.float32) - whole
                difference, error = mean_and_error(above, unit)
                results.put(cut, key, {}, difference=difference, error=error)


def cut_name(label: str, last: int) -> str:
    """Return the name of the result without the taps beyond a lag."""
    return f"{label}/stream, lags 0-{last}"


@contextlib.contextmanager
def reported(name: str):
    """Say on stderr that the block begins, and how long it took."""
    print(f"{name} ...", file=sys.stderr, flush=True)
    begin = time.perf_counter()
    yield
    print(f"{name}: {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)


# -----------------------------------------------------------------------------
# filters


@torch.no_grad()
def taps_of(model: trainer.GPT) -> np.ndarray | None:
    """Return the taps of all layers that have some, (layers, filters, lags) float32, or None."""
    taps = list(model.taps().values())
    return torch.stack(taps).float().cpu().numpy() if taps else None


@contextlib.contextmanager
def cut_taps(model: trainer.GPT, last: int):
    """Set all taps beyond lag `last` to zero inside of the block."""
    with torch.no_grad():
        taps = {layer: torch.where(torch.arange(part.size(1), device=part.device) <= last, part, 0)
                for layer, part in model.taps().items()}
    model.taps = lambda: taps
    try:
        yield
    finally:
        del model.taps  # what stays is the method


def filter_figures(taps: np.ndarray, initial: np.ndarray) -> list[float]:
    """Return a layer's figures, in the order of FIGURES, of taps (filters, lags).

    All but the last two are of filters scaled to the same energy. A filter's length is the lag up
    to which it has a share of its energy; the mean over filters is taken. Half of a response's
    energy is below the median frequency, in cycles a token. It is 0.25 where all frequencies pass.
    The rank is the exponential of the entropy of the squared singular values' shares. The
    correlation is the mean |cosine| of two filters. The last two compare all taps with the initial
    ones.
    """
    taps, initial = taps.astype(np.float64), initial.astype(np.float64)
    unit = taps / np.maximum(np.linalg.norm(taps, axis=1, keepdims=True), 1e-30)
    reached = np.cumsum(unit**2, 1)
    lengths = [float((reached < share).sum(1).mean()) for share in (0.5, 0.99)]
    beyond = [float((unit[:, last + 1 :] ** 2).sum(1).mean()) for last in CUTS]
    power = np.abs(np.fft.rfft(unit, 4 * unit.shape[1])) ** 2
    below = np.cumsum(power, 1) < power.sum(1, keepdims=True) / 2
    median = float(below.sum(1).mean()) / (4 * unit.shape[1])
    shares = np.linalg.svd(unit, compute_uv=False) ** 2
    shares = shares[shares > 0] / shares.sum()
    rank = math.exp(-(shares * np.log(shares)).sum())
    number = len(unit)
    pairs = np.abs(unit @ unit.T)[~np.eye(number, dtype=bool)]
    before, after = np.linalg.norm(initial), np.linalg.norm(taps)
    return [*lengths, *beyond, median, rank, float(pairs.mean()) if number > 1 else math.nan,
            float(np.linalg.norm(taps - initial) / before),
            float((taps * initial).sum() / (before * after))]


def response_by_octave(taps: np.ndarray) -> list[float]:
    """Return the mean power of the response in each octave of OCTAVES, of taps (filters, lags).

    It is of filters scaled to the same energy, and 1 where all frequencies pass. An octave in which
    an FFT of twice as many points as lags has no point is nan.
    """
    unit = taps / np.maximum(np.linalg.norm(taps, axis=1, keepdims=True), 1e-30)
    power = (np.abs(np.fft.rfft(unit.astype(np.float64), 2 * unit.shape[1])) ** 2).mean(0)
    octave = np.searchsorted(OCTAVES[1:-1], np.fft.rfftfreq(2 * unit.shape[1]), "right")
    return [float(power[octave == n].mean()) if (octave == n).any() else math.nan
            for n in range(len(OCTAVES) - 1)]


# -----------------------------------------------------------------------------
# tables


def markdown(header: list[str], rows: list[list]) -> str:
    """Return a Markdown table; numbers have four decimals, nan is left empty."""
    def cell(value) -> str:
        return f"{value:.4f}" if isinstance(value, float) and math.isfinite(value) else \
            "" if isinstance(value, float) else str(value)

    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)


def difference(name: str, first: str, results: Results) -> np.ndarray:
    """Return the losses of `name` less those of `first`, (N,) float32."""
    return results.arrays[name].astype(np.float32) - results.arrays[first].astype(np.float32)


def table_of_means(labels: list[str], text: Text, results: Results) -> str:
    """Return the mean losses by both measures, with differences to the first checkpoint."""
    header, rows = ["checkpoint"], [[label] for label in labels]
    for measure in MEASURES:
        header += [measure, *[f"less {labels[0]}", "+-"] * (len(labels) > 1)]
        for label, row in zip(labels, rows):
            row.append(results.index[f"{label}/{measure}"]["mean"])
            if label != labels[0]:
                above = difference(f"{label}/{measure}", f"{labels[0]}/{measure}", results)
                row += mean_and_error(above, text.pieces[measure].units())
            elif len(labels) > 1:
                row += ["", ""]
    return markdown(header, rows)


def table_of_contexts(labels: list[str], text: Text, results: Results) -> str:
    """Return a table of what a model loses or gains when it sees a target's own document alone."""
    after, unit = text.after_an_end(), text.pieces["documents"].units()
    masks = {"all": np.full(text.count, True), "no end before": ~after, "an end before": after}
    masks = {name: mask for name, mask in masks.items() if mask.any()}
    header, rows = ["documents less stream"], []
    for name in masks:
        header += [name, "+-"]
    for label in labels:
        above = difference(f"{label}/documents", f"{label}/stream", results)
        rows.append([label])
        for mask in masks.values():
            rows[-1] += mean_and_error(above[mask], unit[mask])
    return markdown(header, rows)


def tables_of_groups(labels: list[str], text: Text, results: Results, measure: str,
                     groups: dict[str, dict[str, np.ndarray]]) -> str:
    """Return tables of losses by group: the first checkpoint's, then how far the others' are above.

    What a group adds to the whole difference is its share times its own.
    """
    first, unit = f"{labels[0]}/{measure}", text.pieces[measure].units()
    losses = results.arrays[first].astype(np.float64)
    above = [difference(f"{label}/{measure}", first, results) for label in labels[1:]]
    tables = []
    for by, masks in groups.items():
        header, rows = [by, "share", labels[0]], []
        for label in labels[1:]:
            header += [f"{label} less {labels[0]}", "+-", "adds"]
        for group, mask in masks.items():
            share = mask.mean()
            rows.append([group, f"{share:.1%}", losses[mask].mean()])
            for values in above:
                mean, error = mean_and_error(values[mask], unit[mask])
                rows[-1] += [mean, error, mean * share]
        tables.append(markdown(header, rows))
    return f"## {measure}, by group\n\n" + "\n\n".join(tables)


def tables_of_filters(checkpoints: list[Checkpoint], results: Results) -> str:
    """Return figures of every layer's filters, and how far the loss rises when taps are cut."""
    page, cuts, octaves = ["## filters"], [], [f"to 1/{1 / border:.0f}" for border in OCTAVES[1:]]
    for checkpoint in checkpoints:
        label = checkpoint.label
        if f"{label}/taps" not in results.arrays:
            page.append(f"{label}: no taps.")
            continue
        final, initial = (results.arrays[f"{label}/{name}"] for name in ("taps", "initial taps"))
        layers = checkpoint.layers_with_taps()
        figures = [filter_figures(*pair) for pair in zip(final, initial)]
        names = [*layers, "mean", "mean, initial"]
        before = [filter_figures(taps, taps) for taps in initial]
        figures += [np.mean(figures, 0), np.mean(before, 0)]
        rows = [[name, *map(str.format, FIGURES.values(), row)]
                for name, row in zip(names, figures)]
        page.append(markdown([f"{label}, {FILTER_TABLES[0]}", *FIGURES], rows))
        responses = [*map(response_by_octave, final)]
        responses += [np.mean(responses, 0), np.mean([*map(response_by_octave, initial)], 0)]
        page.append(markdown(
            [f"{label}, {FILTER_TABLES[1]}", *octaves],
            [[name, *(f"{power:.3f}" if power == power else "" for power in row)]
             for name, row in zip(names, responses)]))
        found = [results.index.get(cut_name(label, last), {}) for last in CUTS]
        cuts.append([label, results.index[f"{label}/stream"]["mean"]])
        for cut in found:
            cuts[-1] += [cut.get("difference", ""), cut.get("error", "")]
    if cuts:
        header = ["stream loss when taps are cut", "whole"]
        for last in CUTS:
            header += [f"lags 0-{last}, less whole", "+-"]
        page.append(markdown(header, cuts))
    return "\n\n".join(page)


def report(checkpoints: list[Checkpoint], text: Text, results: Results, groups: dict[str, dict],
           filters: bool, runtime: Runtime) -> str:
    """Return all tables as Markdown; groups are groups_of each measure."""
    labels = [checkpoint.label for checkpoint in checkpoints]
    documents = int(text.pieces["documents"].unit[-1]) + 1
    head = (f"{text.count:,} targets of {text.name} ({text.digest}), {documents:,} "
            f"document{'s' * (documents > 1)}, rows of {text.T:,} tokens. {HEAD} "
            f"Machine: {machine(runtime)}.")
    parts = [head, table_of_means(labels, text, results), table_of_contexts(labels, text, results)]
    parts += [tables_of_groups(labels, text, results, measure, groups[measure])
              for measure in MEASURES]
    if filters:
        parts.append(tables_of_filters(checkpoints, results))
    return "\n\n".join(parts)


# -----------------------------------------------------------------------------
# plots


def cells_of(table: str) -> list[list[str]]:
    """Return the cells of a Markdown table, line by line."""
    return [[cell.strip() for cell in line.strip("|").split("|")]
            for line in table.strip().splitlines()]


def read_groups(page: str) -> list[tuple[str, str, list[str], dict[str, list[str]]]]:
    """Return the tables of groups of a report(): measure, what tells groups apart, header, rows.

    Rows are cells by group, hits after misses; groups that are sums of others are left out, and so
    is END_BEFORE. Raise ValueError where the page is cut off, or a cell is no number.
    """
    tables = []
    for section in f"\n{page}".split("\n## "):
        title, *parts = section.split("\n\n")
        measure, _, rest = title.partition(",")
        if rest != " by group":
            continue
        for part in parts:
            header, _, *rows = cells_of(part)
            if {len(row) for row in rows} != {len(header)}:
                raise ValueError(f"{measure}, by {header[0]}")
            for row in rows:
                numbers = [float(cell.rstrip("%") or 0) for cell in row[1:]]
                if min((x for x, name in zip(numbers, header[1:]) if name == "+-"), default=0) < 0:
                    raise ValueError(f"{measure}, by {header[0]}: an error below 0")
            rows = sorted((row for row in rows if not row[0].startswith("all ")),
                          key=lambda row: "hit" in row[0])
            tables.append((measure, header[0], header, {row[0]: row for row in rows}))
    tables = [table for table in tables if table[1] != END_BEFORE]
    if len({sum(table[0] == measure and not table[1].startswith(LONG) for table in tables)
            for measure in MEASURES}) > 1:
        raise ValueError(f"not as many tables of {' as of '.join(MEASURES)}")
    return tables


def lines_of(by: str, groups: list[str]) -> list[list[str]]:
    """Return which groups a line joins: hits do not go on misses, and sources have no order."""
    if by == "source":
        return [[group] for group in groups]
    hits = [group for group in groups if "hit" in group]
    return [line for line in ([group for group in groups if group not in hits], hits) if line]


def plot(page: str, folder: Path):
    """Draw the tables of a report() as curves.png and filters.png; without filters, drop that."""
    plot_groups(page, folder / "curves.png")
    if found := read_filters(page):
        plot_filters(found, folder / "filters.png")
    else:
        (folder / "filters.png").unlink(missing_ok=True)  # of other checkpoints


def read_filters(page: str) -> dict[str, dict[str, tuple[list[str], dict[str, list[float]]]]]:
    """Return columns and numbers by layer of a report()'s filters, by label and FILTER_TABLES.

    Pages from before 2026-11-30 have no response. Raise ValueError where the page is cut off or a
    cell is no number.
    """
    found = {}
    for part in filter(str.strip, page.partition("\n## filters\n")[2].split("\n\n")):
        lines = cells_of(part)
        label, _, what = lines[0][0].rpartition(", ")
        if what not in FILTER_TABLES:
            continue
        tables = found.setdefault(label, {})
        layers = {row[0]: [float(cell.rstrip("%") or "nan") for cell in row[1:]]
                  for row in lines[2:]}
        if [*layers][1:][-2:] != ["mean", "mean, initial"] \
                or {len(row) for row in lines} != {len(lines[0])} \
                or any([*layers] != [*other] for _, other in tables.values()):
            raise ValueError(f"filters of {label}")
        tables[what] = lines[0][1:], layers
    if any(next(iter(tables)) != FILTER_TABLES[0] for tables in found.values()):
        raise ValueError("filters")
    return found


def plot_filters(found: dict, output: Path):
    """Draw what read_filters found: lengths by layer and response by octave, a row a checkpoint."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(len(found), 2, figsize=(12, 4 * len(found) + 1), squeeze=False,
                                  layout="constrained")
    for (left, right), (label, tables) in zip(panels, found.items()):
        columns, layers = tables[FILTER_TABLES[0]]
        *trained, _, initial = layers
        for i, column in enumerate(column for column in columns if column.startswith("lags to")):
            place = columns.index(column)
            left.plot(trained, [layers[layer][place] for layer in trained], color=f"C{i}",
                      marker="o", markersize=3, label=f"{column} of the energy")
            left.axhline(layers[initial][place], color=f"C{i}", linestyle="--",
                         label="as drawn, mean of all layers")
        left.set_yscale("symlog", linthresh=1)  # 0.0 is less than 0.05
        left.set(xlabel="layer", ylabel="tokens", ylim=(0, None))
        if FILTER_TABLES[1] in tables:
            columns, layers = tables[FILTER_TABLES[1]]
            for i, layer in enumerate(trained):
                right.plot(columns, layers[layer], color=plt.cm.viridis(i / len(trained)),
                           marker="o", markersize=3, linewidth=1, label=f"layer {layer}")
            right.plot(columns, layers[initial], "ko--", markersize=3, label="as drawn")
            right.set(xlabel="cycles a token", ylabel="mean response", yscale="log")
        else:
            right.set_visible(False)
        for axes in (left, right):
            axes.set_title(label, parse_math=False)
            axes.tick_params(axis="x", labelsize=7)
            axes.grid(alpha=0.3)
            if axes.lines:
                axes.legend(fontsize=6)
    figure.savefig(output, dpi=80)
    plt.close(figure)


def plot_groups(page: str, output: Path):
    """Draw the groups' losses of a report(), or differences to the first checkpoint's.

    A measure is a row of panels, a checkpoint is a color. Bars are standard errors.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tables = read_groups(page)
    rows = [[table for table in tables if table[0] == measure] for measure in MEASURES]
    columns = max(map(len, rows))
    figure, panels = plt.subplots(len(MEASURES), columns, figsize=(5 * columns, 8), squeeze=False,
                                  layout="constrained")
    for axes, table in itertools.chain(*map(itertools.zip_longest, panels, rows)):
        if table:
            draw_groups(axes, *table)
        else:
            axes.set_visible(False)
    legend = figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside lower center",
                           ncols=4)
    header = tables[0][2]
    name_lines(legend, [name.removesuffix(f" less {header[2]}") for name in header[3::3]]
               or header[2:3])
    figure.savefig(output, dpi=80)
    plt.close(figure)


def draw_groups(axes, measure: str, by: str, header: list[str], rows: dict[str, list[str]]):
    """Draw one table of read_groups into a panel."""
    numbers = lambda line, column: [float(rows[group][column] or 0) for group in line]
    columns_drawn = range(3, len(header), 3) if len(header) > 3 else [2]
    for (i, column), line in itertools.product(enumerate(columns_drawn), lines_of(by, [*rows])):
        axes.errorbar(line, numbers(line, column),
                      numbers(line, column + 1) if column > 2 else None, color=f"C{i}",
                      label=f"line {column}", marker="o", markersize=3, linewidth=1, capsize=2)
    axes.set_ylabel(f"loss less {header[2]}'s" if len(header) > 3 else "loss", parse_math=False)
    axes.set_title(f"{measure}, by {by}".replace(", the", ",\nthe"), fontsize=10)
    axes.tick_params(axis="x", rotation=60, labelsize=7)
    axes.grid(alpha=0.3)


# -----------------------------------------------------------------------------
# command line

SOURCES = Kind(
    lambda text: [*dict.fromkeys(text.split(","))],
    lambda found: found == ["all"] or {*package_text.SOURCES}.issuperset(found),
    f"all, or of {', '.join(package_text.SOURCES)}",
    "SOURCE,SOURCE")


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the arguments; raise InputError where they are wrong."""
    parser = Parser(description=__doc__)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--bin", type=trainer.NAME, metavar="PATTERN", help="shards of the text")
    text.add_argument("--text", type=SOURCES, metavar=SOURCES.metavar,
                      help=f"of installed packages: {SOURCES.words}")
    parser.add_argument("--tokens", type=trainer.FLAGS["val_tokens"].kind, metavar="N",
                        help="targets [at most 1,048,576; of --text "
                        f"{TOKENS_A_SOURCE:,} a source]")
    parser.add_argument("--rows", type=trainer.FLAGS["sequence_length"].kind, metavar="T",
                        help="tokens a row [as trained]")
    parser.add_argument("--out", type=FOLDER, metavar="DIR", help="folder for what is found")
    parser.add_argument("--filters", action="store_true", help="look at AFNO's filters, too")
    parser.add_argument("--device", type=one_of("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--compile", type=trainer.SWITCH, default=0, help="as the trainer does")
    parser.add_argument("--batch_tokens", type=integer(1, MOST_TOKENS),
                        help="tokens a batch [65536, CPU: 8192]")
    return parser.parse_args(argv)


def draw_again(table: Path) -> int:
    """Draw the plots beside a table.md of an earlier run; return the exit status."""
    refuse_no_file(table)
    try:
        page = table.read_text(encoding="utf-8")
        found = read_groups(page)
        read_filters(page)
        if found and not page.endswith("\n"):
            raise ValueError("its last line")
    except OSError as error:
        raise InputError(f"{table}: {error.strerror}") from None
    except (ValueError, IndexError) as error:
        raise InputError(f"{table}: damaged or cut off ({first_line(error)})") from None
    if not found:
        raise InputError(f"{table}: no tables of groups as evaluate.py writes them")
    try:
        plot(page, table.parent)
    except ImportError as error:
        raise InputError(f"curves.png: {first_line(error)}") from None
    return 0


def main(argv: list[str]) -> int:
    """Evaluate what is missing and print the tables; return the exit status."""
    args = parse(argv)
    if args.checkpoints[0].endswith(".md") and not Path(args.checkpoints[0]).is_dir():
        if len(argv) > 1:
            raise InputError(f"{args.checkpoints[0]} is drawn as it stands: name nothing else")
        return draw_again(Path(args.checkpoints[0]))
    runtime = usual_runtime(choose_device(args.device), bool(args.compile))
    checkpoints = [Checkpoint(source) for source in args.checkpoints]
    labels = [checkpoint.label for checkpoint in checkpoints]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise InputError(f"CHECKPOINT: two are called {twice[0]}, after folder and step")
    refuse_unlike(checkpoints, args)
    marks = {"table.md": HEAD, "curves.png": "", "filters.png": ""}
    with contextlib.nullcontext() if args.out is None else \
            owned(args.out, f"--out {args.out}", marks):
        print(evaluated(checkpoints, args, runtime))
    return 0


def left_out(checkpoints: list[Checkpoint], filters: bool, results: Results) -> list[str]:
    """Return what has results but no part in the tables: labels, and --filters."""
    labels = [checkpoint.label for checkpoint in checkpoints]
    others = dict.fromkeys(name.partition("/")[0] for name in results.index)
    taps = any(f"{label}/taps" in results.arrays for label in labels)
    return [label for label in others if label not in labels] + ["--filters"] * (taps > filters)


def evaluated(checkpoints: list[Checkpoint], args, runtime: Runtime) -> str:
    """Return the tables; evaluate what is missing, and write all of it to --out."""
    text, results = read_text(args, checkpoints[0]), Results(args.out)
    for checkpoint in checkpoints:
        compute(checkpoint, text, args, runtime, results)
    groups = {measure: groups_of(text, measure) for measure in MEASURES}
    page = report(checkpoints, text, results, groups, args.filters, runtime)
    if args.out is not None:
        archive.write(args.out / "table.md", f"{page}\n".encode())
        if left := left_out(checkpoints, args.filters, results):
            print(f"{args.out / 'table.md'}: without {', '.join(left)}, not named now; "
                  "losses.npz still holds what was found", file=sys.stderr)
        try:
            plot(page, args.out)
        except ImportError:
            print("no plots: matplotlib is not installed", file=sys.stderr)
    return page


if __name__ == "__main__":
    run(main, memory="--batch_tokens or --rows")
