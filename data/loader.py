"""Read training rows and validation tokens from .bin shards."""
import functools
import glob
import hashlib
import itertools
import math
import os
import weakref
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from data.text_to_bin import HEADER_BYTES, ROOT, InputError, read_bin, relative, to_path

DATA_FLAGS = ("input_bin", "input_val_bin")


def choose_data(flags: dict, values: dict) -> dict:
    """Return absolute patterns of the shards: a flag's from here, others from the repository.

    Raise InputError where one flag is given without the other.
    """
    if len(flags.keys() & DATA_FLAGS) == 1:
        raise InputError("--input_bin and --input_val_bin go together, one is missing")
    return {name: os.path.abspath(to_path(values[name]) if name in flags else ROOT / values[name])
            for name in DATA_FLAGS}


def digest_of(parts: Iterable[np.ndarray]) -> str:
    """Return what tells a text, in parts, from others: how the sha256 of its tokens begins."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.astype(np.uint16).tobytes())
    return found.hexdigest()[:8]


def find_shards(pattern: str) -> list[str]:
    """Return the files that match, sorted. As much of the pattern as exists is taken literally."""
    there = pattern
    while there and not os.path.exists(there):
        there = os.path.dirname(there)
    return sorted(glob.glob(glob.escape(there) + pattern[len(there):]))


class TokenStream:
    """Read all shards that match a pattern as one sequence without beginning or end.

    They are read, not mapped: a mapped file that shrinks would kill the process. Raise InputError
    where none matches.
    """

    def __init__(self, pattern: str, vocab_size: int, flag: str):
        self.paths, self.vocab_size, self.flag = find_shards(pattern), vocab_size, flag
        if not self.paths:
            raise InputError(f"--{flag}: no shard matches {relative(pattern)} (data/shakespeare.py,"
                             " data/cached_fineweb10B.py and data/text_to_bin.py make some)")
        self.starts = np.cumsum([0] + [len(read_bin(path)) for path in self.paths])
        self.files = [os.open(path, os.O_RDONLY) for path in self.paths]
        weakref.finalize(self, lambda files: [os.close(file) for file in files], self.files)
        self.stamps = [self.stamp(shard) for shard in range(len(self.files))]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def stamp(self, shard: int) -> tuple[int, int]:
        """Return what changes when somebody writes to the file: its size and its time."""
        status = os.fstat(self.files[shard])
        return status.st_size, status.st_mtime_ns

    def locate(self, position: int) -> tuple[int, int]:
        """Return (number of the shard, offset of the token in it)."""
        position %= len(self)
        shard = int(np.searchsorted(self.starts, position, side="right")) - 1
        return shard, position - int(self.starts[shard])

    def where(self, position: int) -> str:
        shard, offset = self.locate(position)
        return f"{self.paths[shard]}, token {offset}"

    def read(self, position: int, count: int) -> Tensor:
        """Return tokens position ... position + count - 1, int64; the first one follows the last.

        Raise InputError where one is not in the vocabulary.
        """
        parts, begin = [], position
        while count > 0:
            shard, offset = self.locate(begin)
            size = min(count, int(self.starts[shard + 1] - self.starts[shard]) - offset)
            parts.append(self.read_shard(shard, offset, size))
            begin, count = begin + size, count - size
        tokens = np.concatenate(parts).astype(np.int64)
        if tokens.max() >= self.vocab_size:
            at = int((tokens >= self.vocab_size).argmax())
            raise InputError(f"{self.where(position + at)}: token {tokens[at]}, "
                             f"the vocabulary has {self.vocab_size}")
        return torch.from_numpy(tokens)

    def digest(self, count: int) -> str:
        """Return digest_of the first `count` tokens, of which few are held at once."""
        return digest_of(self.read(begin, min(1 << 20, count - begin)).numpy()
                         for begin in range(0, count, 1 << 20))

    def read_shard(self, shard: int, offset: int, count: int) -> np.ndarray:
        """Return tokens of one shard, uint16; raise InputError where it is not what it was."""
        try:
            data = os.pread(self.files[shard], 2 * count, HEADER_BYTES + 2 * offset)
        except OSError as error:
            raise InputError(f"{self.paths[shard]}: {error.strerror}") from None
        if len(data) < 2 * count or self.stamp(shard) != self.stamps[shard]:
            raise InputError(f"{self.paths[shard]}: somebody has written to this file since the "
                             "run began")
        return np.frombuffer(data, dtype="<u2")


def to_device(tokens: Tensor, device: torch.device) -> Tensor:
    """Return tokens on the device. On a GPU the host does not wait for the copy."""
    return tokens.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tokens


@functools.cache
def spread_step(rows: int) -> int:
    """Return a step, some 0.618 of the rows, that meets all before it meets one again."""
    return next(n for n in range(round(0.618 * rows), 2 * rows) if math.gcd(n, rows) == 1)


class TrainLoader:
    """Deal out micro-batches (B, T) of inputs and targets without end, read one ahead in a thread.

    `position` counts the tokens dealt out before, to all ranks; it is a multiple of T. Rows go to
    micro-batches, and these to ranks, in turn: any number of ranks sees the same tokens in a step.
    `inputs`, (ranks x B, T) on the CPU, are those of all ranks in the micro-batch dealt out last.

    In the order `stream` rows come as they stand. In the order `spread` they come from all over the
    stream, so that neighbours in a batch are not of one document. Steps of 0.618 of the stream keep
    them as far apart as can be for a batch of any size. They meet each row once a pass.
    """

    def __init__(self, stream: TokenStream, B: int, T: int, position: int, rank: int, world: int,
                 device, order: str = "stream", passes=None):
        """Begin at `position`; raise InputError where the stream is too short for one micro-batch.

        passes: (where it begins, tokens of the stream) of each pass that has other data.
        """
        if len(stream) < world * B * T + 1:
            raise InputError(
                f"--input_bin holds {len(stream)} tokens, fewer than one micro-batch and its last "
                f"target: {world * B * T + 1} (--batch_size {B} x --sequence_length {T} x {world} "
                "ranks + 1)")
        self.stream, self.B, self.T, self.device = stream, B, T, device
        self.position, self.rank, self.stride = position, rank, world * B * T
        self.passes, self.spread = passes or [(0, len(stream))], order == "spread"
        self.thread = ThreadPoolExecutor(1)
        self.ahead = self.thread.submit(self.load, position)

    def pass_at(self, position: int) -> tuple[int, int]:
        """Return where the pass at this position began, and its tokens of the stream."""
        return max((one for one in self.passes if one[0] <= position), default=self.passes[0])

    def start(self, row: int) -> int:
        """Return where in the stream a row begins, counted from the first one dealt out."""
        if not self.spread:
            return row * self.T
        rows = (self.pass_at(row * self.T)[1] - 1) // self.T
        return row * spread_step(rows) % rows * self.T

    def where(self, position: int) -> str:
        return self.stream.where(self.start(position // self.T))

    def load(self, position: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs and targets of this rank, (B, T) each, and the inputs of all ranks."""
        first = position // self.T
        # all ranks' tokens: so a bad one stops every rank alike, and each knows what others look up
        tokens = torch.stack([self.stream.read(self.start(row), self.T + 1)
                              for row in range(first, first + self.stride // self.T)])
        own = tokens[self.rank * self.B :][: self.B]
        x, y = (to_device(part.contiguous(), self.device) for part in (own[:, :-1], own[:, 1:]))
        return x, y, tokens[:, :-1]

    def text_ahead(self) -> Tensor:
        """Return the (T + 1,) tokens of this rank's next row, read apart from load()."""
        row = self.position // self.T + self.rank * self.B
        return self.stream.read(self.start(row), self.T + 1)

    def next(self) -> tuple[Tensor, Tensor]:
        """Return the next inputs and targets, (B, T) each; begin to read those after them."""
        x, y, self.inputs = self.ahead.result()
        self.position += self.stride
        self.ahead = self.thread.submit(self.load, self.position)
        return x, y


def passes(stream: TokenStream, saved: dict, args, T: int) -> list[tuple[int, int]]:
    """Return (position at which it begins, tokens of the stream) of this pass and a later one.

    saved: the checkpoint, or {}. Rows that are spread must stay those of the pass that has begun.
    With --extend, added shards come after that pass. With --new_pass they come once each row was
    read. Raise InputError otherwise.
    """
    began, position, now = saved.get("pass_began", 0), saved.get("position", 0), len(stream)
    before = saved.get("data_tokens") or now
    if before == now or not position or args.row_order != "spread":
        return [(began, now)]
    rows = (before - 1) // T
    left = began + rows * T - position
    if left <= 0 and args.new_pass:
        return [(position, now)]
    if args.extend and before in stream.starts:
        count = max(1, -(-(position - began) // (rows * T)))  # it may not be the first one
        return [(began, before), (began + count * rows * T, now)]
    step = saved["step"] + max(0, -(-left // (args.grad_accumulation_steps * args.batch_size * T)))
    raise InputError(
        f"--input_bin holds {now:,} tokens, {before:,} when the checkpoint was saved: "
        "--row_order spread would read some rows twice and others never. Name the "
        f"shards of before, or go on with --row_order stream, or from step {step} on, "
        "when each row was read, begin a pass over the new data with --new_pass 1")


def count_val_tokens(wanted: int | None, val_stream: TokenStream) -> int:
    """Return how many targets to evaluate: every token but the first can be one.

    Without `wanted` it is at most 1,048,576. Raise InputError where there are too few tokens, or
    one is not in the vocabulary.
    """
    most = len(val_stream) - 1
    if most < 1:
        raise InputError(f"--{val_stream.flag} holds one token, validation needs two")
    if wanted is not None and wanted > most:
        raise InputError(f"--val_tokens must be <= {most}, the targets in --{val_stream.flag}, "
                         f"got {wanted}")
    count = wanted or min(1_048_576, most)
    for begin in range(0, count, 1 << 20):  # a bad token should not wait for the first validation
        val_stream.read(begin, min(1 << 20, count + 1 - begin))
    return count


# -----------------------------------------------------------------------------
# lengths of rows


def length_at(phases: tuple[tuple[int, float], ...], step: int, num_iterations: int) -> int:
    """Return the length of rows of the update that follows `step` updates.

    phases: (length, share of the steps), in their order.
    """
    end = 0.0
    for length, share in phases:
        end += share
        if step < round(end * num_iterations):
            break
    return length


def lengths_to_come(phases: tuple[tuple[int, float], ...], step: int,
                    num_iterations: int) -> list[int]:
    """Return the lengths of rows after `step` updates, each once, in their order."""
    ends = itertools.accumulate(share for _, share in phases)
    starts = (0, *(round(end * num_iterations) for end in ends))
    return [*dict.fromkeys(length_at(phases, max(start, step), num_iterations)
                           for start in starts)]


def length_phases(args, T: int, world: int) -> tuple[tuple[int, float], ...]:
    """Return length_at's phases; raise InputError where they and the batch do not fit."""
    B, total = args.batch_size, args.grad_accumulation_steps
    lengths = args.curriculum or ((T, 1.0),)
    product = f"(--batch_size {B} x --sequence_length {T})"
    if args.fp8_head and B * T % 16:
        raise InputError("--fp8_head: a micro-batch must be of a multiple of 16 tokens, "
                         f"got {B * T} {product}")
    if total % world:
        raise InputError(f"--grad_accumulation_steps must be a multiple of the {world} ranks, "
                         f"got {total}")
    if lengths[-1][0] != T:
        raise InputError(f"--curriculum must end with --sequence_length {T}, got {lengths[-1][0]}")
    if uneven := [length for length, _ in lengths if B * T % length]:
        raise InputError(f"--curriculum: lengths must divide the {B * T} tokens of a micro-batch "
                         f"{product}, got {uneven[0]}")
    return lengths
