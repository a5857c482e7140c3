"""Make texts of what ships with installed packages, so that nothing need be fetched.

code            the Python files of all installed packages
plays           the validation part of Shakespeare's plays (python data/shakespeare.py)
licences        licence texts of packages, and of Debian's where there are any
documentation   packages' own pages and descriptions, and Python's manual as pydoc has it

A document begins with token 50256. Documents stand in an order that their names' hashes give, so
that the first tokens are of many packages; equal ones stand once. The texts depend on which
packages are installed, in which versions: compare models on one machine.
"""
import hashlib
import importlib.metadata
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.text_to_bin import END_OF_TEXT, ROOT, InputError, gpt2_encoding, read_bin  # noqa: E402

PLAYS = ROOT / "data" / "shakespeare" / "val_000000.bin"
DEBIAN = Path("/usr/share/common-licenses")
LICENCE = re.compile(r"(licen[cs]e|copying|notice)[^/]*$", re.IGNORECASE)
PAGE = re.compile(r"\.(md|rst)$|/METADATA$", re.IGNORECASE)
SHORTEST = 200  # characters: empty __init__.py and the like are left out


def packaged_files(wanted) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of the files of installed packages whose name is wanted."""
    for package in importlib.metadata.distributions():
        for file in package.files or ():
            if wanted(file.as_posix()):
                yield file.as_posix(), read(Path(package.locate_file(file)))


def read(path: Path) -> str:
    """Return a file's text, empty where it has none in UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def code() -> Iterator[tuple[str, str]]:
    return packaged_files(lambda name: name.endswith(".py"))


def licences() -> Iterator[tuple[str, str]]:
    is_licence = lambda name: LICENCE.search(name) and not name.endswith((".py", ".pyc"))
    yield from packaged_files(is_licence)
    for path in sorted(DEBIAN.glob("*")):
        yield path.name, read(path)


def documentation() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    yield from topics.items()
    for name, text in packaged_files(lambda name: PAGE.search(name) and not LICENCE.search(name)):
        head, _, body = text.partition("\n\n")  # METADATA's fields, then the description
        yield name, body if name.endswith("/METADATA") else text


# what --text takes; plays are tokens already
SOURCES = dict(code=code, plays=None, licences=licences, documentation=documentation)


def documents(source: str) -> list[str]:
    """Return a source's documents, each of them once, in the order of their names' hashes."""
    found = {}
    for name, text in SOURCES[source]():
        if len(text) >= SHORTEST:
            place = hashlib.sha256(name.encode()).hexdigest()
            same = hashlib.sha256(text.encode()).hexdigest()
            found[same] = min(found.get(same, (place, text)), (place, text))
    return [text for _, text in sorted(found.values())]


def tokens_of(source: str, count: int, typed: str = "") -> np.ndarray:
    """Return the first `count` tokens of a source, fewer where it has no more, int64.

    typed: the flag that asked for it (--text SOURCE). Raises InputError, which names it, where the
    source has no tokens.
    """
    typed = typed or f"--text {source}"
    if source == "plays":
        if not PLAYS.exists():
            raise InputError(f"{typed}: there are none yet, run python data/shakespeare.py")
        return read_bin(PLAYS)[:count].astype(np.int64)
    encoding, parts, have = gpt2_encoding(), [], 0
    for text in documents(source):
        parts.append(np.array([END_OF_TEXT, *encoding.encode_ordinary(text)]))
        have += len(parts[-1])
        if have >= count:
            break
    if not parts:
        raise InputError(f"{typed}: no installed package has any")
    return np.concatenate(parts)[:count]
