"""Keep the logs of every run in few bytes: pack, restore, verify, and make single files readable.

    python experiments/archive.py restore 2026-11-26-goals --output /tmp/runs   # a folder as it was
    python experiments/archive.py verify                              # every byte against MANIFEST
    python experiments/archive.py pack runs/2026-12-01-my-question      # add a folder of runs
    python experiments/archive.py keep 2026-11-26-goals/c-92            # make a run's log readable

runs/archive/ has one solid archive a folder (tar, xz -9e) and MANIFEST, the sha256 of every file
as it was, for `sha256sum --check`. Old logs begin with the source code that ran, other runs have it
in source/. Archives and readable logs name each source by its sha256. runs/sources.tar.xz has each
version once.
"""
import hashlib
import io
import lzma
import os
import re
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.text_to_bin import (FOLDER, InputError, Parser, first_line, owned,  # noqa: E402
                              run_main)

RUNS = Path(__file__).resolve().parent / "runs"
RULE = b"=" * 100 + b"\n"
SOURCE = re.compile(rb"source: (\S+) sha256 ([0-9a-f]{64})\n")
COPY = re.compile(rb"copy of the source with sha256 ([0-9a-f]{64})\n")
NAME = re.compile(r"\d{4}-\d\d-\d\d(-[a-z0-9]+)+")
TAR = tarfile.USTAR_FORMAT
ENTRY = re.compile(r"([0-9a-f]{64})  (.+)")  # of MANIFEST


class ArchiveError(InputError):
    """Say what is wrong with an archive, or with what was asked of it."""


def sha256(data: bytes) -> str:
    """Return the sha256 of bytes as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


# files without their sources

def split_log(log: bytes) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Return the sources that a log begins with, as (file name, text), and the rest of the log."""
    first, *parts = log.split(RULE)
    if first or not parts:
        return [], log
    *parts, rest = parts
    return [(name[:-1], text) for name, text in zip(parts[::2], parts[1::2])], rest


def strip_log(log: bytes) -> bytes:
    """Return a log with one line in place of each source that it begins with."""
    sources, rest = split_log(log)
    lines = [b"source: %s sha256 %s\n" % (name, sha256(text).encode()) for name, text in sources]
    return b"".join(lines) + rest


def sources_of(file: str, data: bytes) -> list[bytes]:
    """Return the sources in a file: itself where it is one, else those that a log begins with."""
    if file.endswith(".py"):
        return [data]
    return [text for _, text in split_log(data)[0]]


def strip(file: str, data: bytes) -> bytes:
    """Return what an archive holds for a file: of a source its sha256, of others strip_log's."""
    if file.endswith(".py"):
        return b"copy of the source with sha256 %s\n" % sha256(data).encode()
    return strip_log(data)


def join(stripped: bytes, sources: dict[str, bytes]) -> bytes:
    """Return the file that strip was given, with its sources from read_sources."""
    def source(digest: bytes) -> bytes:
        if (name := source_name(digest.decode())) not in sources:
            raise ArchiveError(f"sources.tar.xz is missing, or lacks {name}")
        return sources[name]

    if copy := COPY.fullmatch(stripped):
        return source(copy[1])
    parts = []
    while match := SOURCE.match(stripped):
        parts += [RULE, match[1], b"\n", RULE, source(match[2])]
        stripped = stripped[match.end():]
    return b"".join(parts) + (RULE if parts else b"") + stripped


def source_name(digest: str) -> str:
    """Return what the source with this sha256 is called in sources.tar.xz."""
    return f"{digest[:12]}.py"


def read_sources(runs: Path = RUNS) -> dict[str, bytes]:
    """Return all sources by source_name."""
    path = runs / "sources.tar.xz"
    return dict(unpacked(path)) if path.is_file() else {}


def unpacked(path: Path) -> list[tuple[str, bytes]]:
    """Return (name, bytes) of all files of an archive; raise ArchiveError where it is damaged."""
    try:
        data = io.BytesIO(lzma.decompress(path.read_bytes()))  # checks every byte
        with tarfile.open(fileobj=data, mode="r:", encoding="utf-8") as tar:
            if odd := [member.name for member in tar if not member.isreg()]:
                raise tarfile.ReadError(f"{odd[0]} is no ordinary file")
            return [(member.name, tar.extractfile(member).read()) for member in tar]
    except (lzma.LZMAError, tarfile.TarError) as error:
        raise ArchiveError(f"{path}: damaged, or no archive ({first_line(error)})") from None


def solid(files: dict[str, bytes]) -> bytes:
    """Return an archive of these files, in this order."""
    archive, options = io.BytesIO(), {"preset": 9 | lzma.PRESET_EXTREME}
    with tarfile.open(fileobj=archive, mode="w:xz", format=TAR, encoding="utf-8", **options) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return archive.getvalue()


# archives

def archives(runs: Path = RUNS) -> list[str]:
    """Return the names of all archives, oldest first."""
    return sorted(path.name.removesuffix(".tar.xz") for path in runs.glob("archive/*.tar.xz"))


def read_manifest(runs: Path = RUNS) -> dict[str, str]:
    """Return the sha256 of every archived file by its name, folder/run/file."""
    path, found = runs / "archive/MANIFEST", {}
    text = path.read_text(encoding="utf-8", errors="surrogateescape") if path.exists() else ""
    for number, line in enumerate(text.splitlines(), 1):
        if not (match := ENTRY.fullmatch(line)) or not line.isprintable():
            raise ArchiveError(f"{path}: line {number} is not <sha256>  <file>")
        found[match[2]] = match[1]
    return found


def members(name: str, runs: Path = RUNS) -> Iterator[tuple[str, bytes]]:
    """Yield every file of an archive as it was, (name, bytes), each checked against MANIFEST."""
    path, manifest = runs / f"archive/{name}.tar.xz", read_manifest(runs)
    if not path.is_file():
        raise ArchiveError(f"no archive {name}; there are: {', '.join(archives(runs))}")
    missing = {file for file in manifest if file.startswith(f"{name}/")}
    sources = read_sources(runs)
    for file, stripped in unpacked(path):
        data = join(stripped, sources)
        if manifest.get(file) != sha256(data):
            raise ArchiveError(f"{path.name}: {file} is not what MANIFEST says")
        missing.discard(file)
        yield file, data
    if missing:
        raise ArchiveError(f"{path.name} lacks {min(missing)}, which MANIFEST has")


def write(path: Path, data: bytes):
    """Write bytes into a file and make the folders above it; a kill leaves the file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(data)
    os.replace(part, path)


def refuse_other(path: Path, data: bytes):
    """Raise ArchiveError where there is something else than a file with these bytes."""
    if os.path.lexists(path) and not (path.is_file() and path.read_bytes() == data):
        raise ArchiveError(f"{path} is there and differs: move it away first")


def restore(name: str, output: Path, runs: Path = RUNS) -> int:
    """Write all files of an archive under output/name; return their number."""
    files = list(members(name, runs))
    for file, data in files:
        refuse_other(output / file, data)
    for file, data in files:
        write(output / file, data)
    return len(files)


def refuse_name(file: str):
    """Raise ArchiveError where tar or MANIFEST does not take the name of a file."""
    try:
        tarfile.TarInfo(file).tobuf(TAR, "utf-8", "strict")
    except UnicodeEncodeError:
        raise ArchiveError(f"{file!r}: its name must be UTF-8") from None
    except ValueError:
        raise ArchiveError(f"{file!r} is too long for tar, which takes 100 bytes and before them "
                           "folders of 155") from None
    if not file.isprintable():
        raise ArchiveError(f"{file!r}: its name must be of printable characters")


def below(folder: Path) -> list[Path]:
    """Return all that is below a folder; raise ArchiveError where one cannot be read.

    Path.rglob would leave it out and say nothing.
    """
    def refuse(error: OSError):
        raise ArchiveError(f"{error.filename}: cannot be read ({error.strerror})")

    walk = os.walk(folder, onerror=refuse) if folder.is_dir() else ()
    return [Path(parent, name) for parent, folders, files in walk for name in (*folders, *files)]


def pack(folder: Path, runs: Path = RUNS) -> int:
    """Add a folder of runs as a new archive, without checkpoints and plots; return how many files.

    plot_runs.py draws the plots again. Nothing is written where it is refused.
    """
    name = folder.resolve().name
    if not NAME.fullmatch(name):
        raise ArchiveError(f"{folder}: its name must be <date>-<question>, as 2026-11-26-goals")
    found = below(folder)
    for path in found:
        if not path.is_file() and (path.is_symlink() or not path.is_dir()):
            raise ArchiveError(f"{path}: neither a folder nor a file, so it would be left out")
    paths = [path for path in found
             if path.is_file() and path.suffix != ".png" and not path.match("state_step*")]
    if not paths:
        raise ArchiveError(f"{folder}: no folder with files to pack")
    paths.sort(key=lambda path: (path.suffix, path.name, path))  # alike files in a row pack best
    named = {f"{name}/{path.relative_to(folder).as_posix()}": path for path in paths}
    for file in named:
        refuse_name(file)
    with owned(runs / "archive", str(runs / "archive")):  # two at once would lose lines of MANIFEST
        add(name, {file: path.read_bytes() for file, path in named.items()}, runs)
        return len(list(members(name, runs)))  # read back, so each file is checked


def add(name: str, files: dict[str, bytes], runs: Path):
    """Write a new archive of these files, their sources and MANIFEST, which comes last.

    Without its lines in MANIFEST, packing was cut off.
    """
    manifest, sources = read_manifest(runs), read_sources(runs)
    if name in archives(runs) and any(file.startswith(f"{name}/") for file in manifest):
        raise ArchiveError(f"an archive {name} exists")
    known = len(sources)
    for file, data in files.items():
        sources |= {source_name(sha256(text)): text for text in sources_of(file, data)}
    stripped = {file: strip(file, data) for file, data in files.items()}
    for file, data in files.items():
        if join(stripped[file], sources) != data:
            raise ArchiveError(f"{file}: would not come back as it is: it begins with sources, or "
                               "lines that name them, and is not a whole log")
    manifest |= {file: sha256(data) for file, data in files.items()}
    write(runs / f"archive/{name}.tar.xz", solid(stripped))
    if len(sources) > known:
        write(runs / "sources.tar.xz", solid(sources))
    lines = (f"{digest}  {file}\n" for file, digest in sorted(manifest.items()))
    write(runs / "archive/MANIFEST", "".join(lines).encode())


# readable files

def keep(entry: str, runs: Path = RUNS) -> Path:
    """Copy the log of folder/run, or the file folder/file, out of its archive; return its path."""
    names = read_manifest(runs)
    logs = [f"{entry}/{log}" for log in ("train.log", "stdout.txt", "metrics.jsonl")]
    wanted = next((file for file in (entry, *logs) if file in names), None)
    if wanted is None:
        raise ArchiveError(f"no archive has {entry}")
    data = next(data for file, data in members(entry.split("/")[0], runs) if file == wanted)
    path, readable = runs / wanted, strip_log(data)
    refuse_other(path, readable)
    write(path, readable)
    return path


def verify(runs: Path = RUNS) -> int:
    """Check every archive and every readable file against MANIFEST; return the number of both."""
    manifest, sources = read_manifest(runs), read_sources(runs)
    found = {file for name in archives(runs) for file, _ in members(name, runs)}
    if lost := manifest.keys() - found:
        raise ArchiveError(f"no archive has {min(lost)}, which MANIFEST has")
    folders = [runs / name for name in archives(runs)]
    readable = [path for folder in folders for path in below(folder)
                if path.is_file() and path.suffix != ".png"]
    for path in readable:
        file = path.relative_to(runs).as_posix()
        if sha256(join(path.read_bytes(), sources)) != manifest.get(file):
            raise ArchiveError(f"{file} is not what its archive has")
    return len(found) + len(readable)


def main():
    """Run one of the four commands."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, nargs in (("restore", "+"), ("pack", "+"), ("keep", "+")):
        commands.add_parser(name).add_argument("names", nargs=nargs)
    commands.choices["restore"].add_argument("--output", type=FOLDER, default=Path("runs"))
    commands.add_parser("verify")
    args = parser.parse_args()
    if args.command == "verify":
        print(f"{verify()} files are as MANIFEST says")
    for name in getattr(args, "names", ()):
        if args.command == "restore":
            print(f"{args.output / name}: {restore(name, args.output)} files")
        elif args.command == "pack":
            print(f"{name}: {pack(Path(name))} files packed")
        else:
            print(keep(name))


if __name__ == "__main__":
    run_main(main)
