"""Compare checkpoints token by token on the same text, in rows and document by document.

    python experiments/evaluate.py runs/b runs/c --bin "data/web/val_*.bin" --out runs/compare
    python experiments/evaluate.py runs/c/state_step000350.pt --rows 1024 --tokens 65536
    python experiments/evaluate.py runs/c --filters --out runs/compare    # also of the filters

A CHECKPOINT is a file state_step*.pt of the trainer, or a run's folder, whose newest one counts.
Scored are the first --tokens targets of --bin (the first checkpoint's validation shards), by two
measures. Both score the same targets, so all differences are paired.

stream      rows of --rows tokens as they stand: the trainer's own validation
documents   a token is predicted from its own document alone, from token 50256 on. A document
            longer than --rows is cut into pieces, none of which sees the one before. The target
            of a document's last token is the 50256 of the next one, and it counts

Tables of the losses go to stdout and, with --out, to DIR/table.md; DIR/losses.npz keeps the losses
as float16 under LABEL/stream and LABEL/documents, where place i is the target i + 1 of the text.
What stands there for the same file, text, tokens and rows is not computed again. A standard error
is that of the mean over rows or documents: it holds the text's noise, not that of training.
"""
import argparse
import json
import math
import os
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt2_afno as trainer  # noqa: E402
from data.loader import TokenStream, count_val_tokens, to_device  # noqa: E402
from data.text_to_bin import END_OF_TEXT, ROOT, InputError, relative  # noqa: E402

MEASURES = ("stream", "documents")
UNITS = dict(stream="rows", documents="documents")  # over which errors are taken
SHORTEST = 64  # tokens: shorter pieces are padded to it
BATCH_TOKENS = dict(cuda=65536, cpu=8192)


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


@torch.no_grad()
def losses_of(model: trainer.GPT, tokens: np.ndarray, pieces: Pieces, T: int,
              runtime: trainer.Runtime, batch_tokens: int) -> np.ndarray:
    """Return every target's loss, (N,) float32, in pieces of at most T tokens.

    Pieces of similar length make a batch of about batch_tokens, filled up on the right to the next
    power of two with targets that do not count. So there are few shapes.
    """
    count = int(pieces.length.sum())
    losses = np.zeros(count, np.float32)
    widths = np.maximum(SHORTEST, 1 << np.ceil(np.log2(pieces.length)).astype(int)).clip(max=T)
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
            idx, targets = (torch.from_numpy(part) for part in (
                np.where(counts, tokens[place], 0), np.where(counts, tokens[place + 1], -1)))
            with runtime.autocast():
                hidden = model.hidden(to_device(idx, runtime.device))
                found = model.lm_head.loss(hidden, to_device(targets, runtime.device))[1]
            losses[place[counts]] = found.float().cpu().numpy()[counts]
    return losses


def mean_and_error(values: np.ndarray, unit: np.ndarray) -> tuple[float, float]:
    """Return the mean of values (n,) and its standard error over units (n,), nan for a single one.

    Units are of unequal size: the mean is a ratio of sums, the error is that of a ratio.
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
    """Read one checkpoint; its tensors are read from the file when they are used."""

    def __init__(self, source: str):
        self.path = Path(source)
        if self.path.is_dir():
            found = trainer.Checkpoints(self.path).paths()
            if not found:
                raise InputError(f"{source}: no state_step*.pt in this folder")
            self.path = found[0]
        try:
            self.state = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
            self.state = trainer.of_this_version(self.state, self.path)
        except InputError:
            raise
        except Exception as error:  # a truncated archive fails in many ways
            raise InputError(f"{source}: no readable checkpoint "
                             f"({trainer.first_line(error)})") from None
        self.config = trainer.GPTConfig(**self.state["config"])
        self.label = f"{self.path.absolute().parent.name}@{self.state['step']}"

    def key(self, *more) -> list:
        """Return what a result depends on: the file and whatever else is named."""
        return [relative(str(self.path.absolute())), self.path.stat().st_mtime_ns, *more]

    def initial(self) -> trainer.GPT:
        """Return the model before its first step, as the trainer makes it."""
        torch.manual_seed(self.state["args"]["seed"])
        return trainer.GPT(self.config)

    def model(self, runtime: trainer.Runtime) -> trainer.GPT:
        """Return the model with the checkpoint's weights, ready to be evaluated."""
        model = self.initial()
        trainer.load_weights(model, self.state["model"], self.path)
        model = model.to(runtime.device).eval()
        if runtime.compile:
            model.compile()
        return model


class Results:
    """Hold arrays and numbers by name, in folder/losses.npz where a folder is named."""

    def __init__(self, folder: Path | None):
        self.path = folder / "losses.npz" if folder else None
        self.arrays, self.index = {}, {}
        if self.path is not None and self.path.exists():
            try:
                with np.load(self.path) as file:
                    self.arrays = {name: file[name] for name in file.files}
                self.index = json.loads(str(self.arrays.pop("index")))
            except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
                raise InputError(f"{self.path}: not a file of this script ({error}); "
                                 "remove it, or name another --out") from None

    def stands(self, name: str, key: list) -> bool:
        """Return whether the result of this name is of this key."""
        return self.index.get(name, {}).get("key") == key

    def put(self, name: str, key: list, arrays: dict[str, np.ndarray], **numbers):
        """Keep a result; arrays become float16."""
        self.index[name] = dict(key=key, **numbers)
        self.arrays |= {where: values.astype(np.float16) for where, values in arrays.items()}
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        with open(part, "wb") as file:
            np.savez_compressed(file, index=json.dumps(self.index), **self.arrays)
        os.replace(part, self.path)


@dataclass
class Text:
    """Hold what all checkpoints are asked: tokens, rows, and how each measure cuts them."""

    name: str
    tokens: np.ndarray  # N + 1
    T: int
    pieces: dict[str, Pieces]

    @property
    def count(self) -> int:
        """Return the number of targets."""
        return len(self.tokens) - 1


def read_text(args, checkpoints: list[Checkpoint]) -> Text:
    """Return the text that the command line names; raise InputError where checkpoints disagree."""
    first = checkpoints[0]
    for other in checkpoints[1:]:
        if not args.rows and other.config.sequence_length != first.config.sequence_length:
            raise InputError(f"--rows: name the tokens of a row, {first.label} was trained with "
                             f"{first.config.sequence_length}, {other.label} with "
                             f"{other.config.sequence_length}")
        if other.config.vocab_size != first.config.vocab_size:
            raise InputError(f"{other.label}: a vocabulary of {other.config.vocab_size}, "
                             f"{first.label} has {first.config.vocab_size}")
    T = args.rows or first.config.sequence_length
    pattern = args.bin or str(ROOT / first.state["args"]["input_val_bin"])
    stream = TokenStream(os.path.abspath(pattern), first.config.vocab_size, "bin")
    if args.tokens and args.tokens > len(stream) - 1:
        raise InputError(f"--tokens must be <= {len(stream) - 1}, the targets in --bin, "
                         f"got {args.tokens}")
    count = count_val_tokens(args.tokens, stream)
    tokens = stream.read(0, count + 1).numpy()
    pieces = dict(stream=cut_rows(count, T), documents=cut_documents(tokens, count, T))
    return Text(relative(os.path.abspath(pattern)), tokens, T, pieces)


def compute(checkpoint: Checkpoint, text: Text, args, runtime: trainer.Runtime, results: Results):
    """Put a checkpoint's missing results into `results`."""
    asked = (text.name, text.count, text.T, str(runtime.dtype))
    key, model = checkpoint.key(*asked), None
    for measure in MEASURES:
        name = f"{checkpoint.label}/{measure}"
        if results.stands(name, key):
            continue
        model = model or checkpoint.model(runtime)
        begin = time.perf_counter()
        losses = losses_of(model, text.tokens, text.pieces[measure], text.T, runtime,
                           args.batch_tokens or BATCH_TOKENS[runtime.device.type])
        results.put(name, key, {name: losses}, mean=float(losses.mean(dtype=np.float64)))
        print(f"{name}: {results.index[name]['mean']:.4f}, "
              f"{time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)


# -----------------------------------------------------------------------------
# tables


def markdown(header: list[str], rows: list[list]) -> str:
    """Return a table; numbers have four decimals."""
    def cell(value) -> str:
        return f"{value:.4f}" if isinstance(value, float) and math.isfinite(value) else \
            "" if isinstance(value, float) else str(value)

    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)


def table_of_means(labels: list[str], text: Text, results: Results) -> str:
    """Return the mean losses by both measures, with differences to the first checkpoint."""
    rows = []
    for label in labels:
        row = [label]
        for measure in MEASURES:
            name, unit = f"{label}/{measure}", text.pieces[measure].spread(
                text.pieces[measure].unit)
            row.append(results.index[name]["mean"])
            if len(labels) > 1:
                difference = results.arrays[name].astype(np.float32) - results.arrays[
                    f"{labels[0]}/{measure}"].astype(np.float32)
                row += ["", ""] if label == labels[0] else mean_and_error(difference, unit)
        rows.append(row)
    header = ["checkpoint"]
    for measure in MEASURES:
        header += [measure, *[f"less {labels[0]}", "+-"] * (len(labels) > 1)]
    return markdown(header, rows)


def report(labels: list[str], text: Text, results: Results) -> str:
    """Return all tables as Markdown."""
    documents = int(text.pieces["documents"].unit[-1]) + 1
    head = (f"{text.count:,} targets of {text.name}, {documents:,} documents, rows of {text.T:,} "
            f"tokens; +- is the standard error over rows (stream) or documents.")
    return f"{head}\n\n{table_of_means(labels, text, results)}\n"


# -----------------------------------------------------------------------------
# command line


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the arguments; raise InputError where they are wrong."""
    parser = trainer.Parser(description=__doc__, allow_abbrev=False,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    positive = trainer.integer(1, 2**40)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--bin", metavar="PATTERN", help="shards of the text")
    parser.add_argument("--tokens", type=positive, metavar="N", help="targets [at most 1,048,576]")
    parser.add_argument("--rows", type=positive, metavar="T", help="tokens a row [as trained]")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for what is found")
    parser.add_argument("--device", type=trainer.one_of("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--compile", type=trainer.SWITCH, default=0, help="as the trainer does")
    parser.add_argument("--batch_tokens", type=positive, help="tokens a batch [65536, CPU: 8192]")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Evaluate what is missing and print the tables; return the exit status."""
    args = parse(argv)
    device = trainer.choose_device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    runtime = trainer.Runtime(device, dtype, bool(args.compile))
    checkpoints = [Checkpoint(source) for source in args.checkpoints]
    labels = [checkpoint.label for checkpoint in checkpoints]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise InputError(f"CHECKPOINT: two are called {twice[0]}, after folder and step")
    text, results = read_text(args, checkpoints), Results(args.out)
    for checkpoint in checkpoints:
        compute(checkpoint, text, args, runtime, results)
    page = report(labels, text, results)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "table.md").write_text(page, encoding="utf-8")
    print(page)
    return 0


if __name__ == "__main__":
    trainer.run(main)
