"""Keep the logs of every run in few bytes: pack, restore, verify, and make single files readable.

    python experiments/archive.py restore 2026-11-26-goals --output /tmp/runs   # a folder as it was
    python experiments/archive.py verify                              # every byte against MANIFEST
    python experiments/archive.py pack runs/2026-12-01-my-question      # add a folder of runs
    python experiments/archive.py keep 2026-11-26-goals/c-92            # make a run's log readable

runs/archive/ has one solid archive a folder (tar, xz -9e) and MANIFEST, the sha256 of every file
as it was, for `sha256sum --check`. Old logs begin with the source code that ran: archives and
readable logs name each source by its sha256 instead. runs/sources.tar.xz has each version once.
"""
import argparse
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

from data.text_to_bin import InputError, run_main  # noqa: E402

RUNS = Path(__file__).resolve().parent / "runs"
RULE = b"=" * 100 + b"\n"
SOURCE = re.compile(rb"source: (\S+) sha256 ([0-9a-f]{64})\n")
NAME = re.compile(r"\d{4}-\d\d-\d\d(-[a-z0-9]+)+")


class ArchiveError(InputError):
    """Say what is wrong with an archive, or with what was asked of it."""


def sha256(data: bytes) -> str:
    """Return the sha256 of bytes as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


# logs without their sources

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


def join_log(stripped: bytes, sources: dict[str, bytes]) -> bytes:
    """Return the log that strip_log was given, with its sources from read_sources."""
    parts = []
    while match := SOURCE.match(stripped):
        parts += [RULE, match[1], b"\n", RULE, sources[source_name(match[2].decode())]]
        stripped = stripped[match.end():]
    return b"".join(parts) + (RULE if parts else b"") + stripped


def source_name(digest: str) -> str:
    """Return what the source with this sha256 is called in sources.tar.xz."""
    return f"{digest[:12]}.py"


def read_sources(runs: Path = RUNS) -> dict[str, bytes]:
    """Return all sources by source_name."""
    path = runs / "sources.tar.xz"
    if not path.is_file():
        return {}
    with tarfile.open(path, "r:xz") as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def solid(files: dict[str, bytes]) -> bytes:
    """Return an archive of these files, in this order."""
    archive, options = io.BytesIO(), {"preset": 9 | lzma.PRESET_EXTREME}
    with tarfile.open(fileobj=archive, mode="w:xz", format=tarfile.USTAR_FORMAT, **options) as tar:
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
    try:
        lines = (runs / "archive/MANIFEST").read_text().splitlines()
    except FileNotFoundError:
        return {}
    return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}


def members(name: str, runs: Path = RUNS) -> Iterator[tuple[str, bytes]]:
    """Yield every file of an archive as it was, (name, bytes), each checked against MANIFEST."""
    path, manifest = runs / f"archive/{name}.tar.xz", read_manifest(runs)
    if not path.is_file():
        raise ArchiveError(f"no archive {name}; there are: {', '.join(archives(runs))}")
    missing = {file for file in manifest if file.startswith(f"{name}/")}
    sources = read_sources(runs)
    with tarfile.open(path, "r:xz") as tar:
        for member in tar:
            data = join_log(tar.extractfile(member).read(), sources)
            if manifest.get(member.name) != sha256(data):
                raise ArchiveError(f"{path.name}: {member.name} is not what MANIFEST says")
            missing.discard(member.name)
            yield member.name, data
    if missing:
        raise ArchiveError(f"{path.name} lacks {min(missing)}, which MANIFEST has")


def write(path: Path, data: bytes):
    """Write bytes into a file and make the folders above it; a kill leaves the file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(data)
    os.replace(part, path)


def restore(name: str, output: Path, runs: Path = RUNS) -> int:
    """Write all files of an archive under output/name; return their number."""
    count = 0
    for file, data in members(name, runs):
        write(output / file, data)
        count += 1
    return count


def pack(folder: Path, runs: Path = RUNS) -> int:
    """Add a folder of runs as a new archive, without checkpoints and plots; return how many files.

    plot_runs.py draws the plots again.
    """
    name, manifest = folder.resolve().name, read_manifest(runs)
    if not NAME.fullmatch(name):
        raise ArchiveError(f"{folder}: its name must be <date>-<question>, as 2026-11-26-goals")
    # the manifest comes last: without it, packing was cut off
    if name in archives(runs) and any(file.startswith(f"{name}/") for file in manifest):
        raise ArchiveError(f"an archive {name} exists")
    files = [path for path in folder.rglob("*")
             if path.is_file() and path.suffix != ".png" and not path.match("state_step*")]
    if not files:
        raise ArchiveError(f"{folder}: no folder with files to pack")
    files.sort(key=lambda path: (path.suffix, path.name, path))  # alike files in a row pack best
    stripped, sources = {}, read_sources(runs)
    known = len(sources)
    for path in files:
        data, file = path.read_bytes(), f"{name}/{path.relative_to(folder).as_posix()}"
        sources |= {source_name(sha256(text)): text for _, text in split_log(data)[0]}
        stripped[file], manifest[file] = strip_log(data), sha256(data)
    write(runs / f"archive/{name}.tar.xz", solid(stripped))
    if len(sources) > known:
        write(runs / "sources.tar.xz", solid(sources))
    lines = (f"{digest}  {file}\n" for file, digest in sorted(manifest.items()))
    write(runs / "archive/MANIFEST", "".join(lines).encode())
    return len(list(members(name, runs)))  # read back, so each file is checked


# readable files

def keep(entry: str, runs: Path = RUNS) -> Path:
    """Copy the log of folder/run, or the file folder/file, out of its archive; return its path."""
    names = read_manifest(runs)
    logs = [f"{entry}/{log}" for log in ("train.log", "stdout.txt", "metrics.jsonl")]
    wanted = next((file for file in (entry, *logs) if file in names), None)
    if wanted is None:
        raise ArchiveError(f"no archive has {entry}")
    data = next(data for file, data in members(entry.split("/")[0], runs) if file == wanted)
    write(runs / wanted, strip_log(data))
    return runs / wanted


def verify(runs: Path = RUNS) -> int:
    """Check every archive and every readable file against MANIFEST; return the number of both."""
    manifest, sources = read_manifest(runs), read_sources(runs)
    found = {file for name in archives(runs) for file, _ in members(name, runs)}
    if lost := manifest.keys() - found:
        raise ArchiveError(f"no archive has {min(lost)}, which MANIFEST has")
    folders = [runs / name for name in archives(runs)]
    readable = [path for folder in folders for path in folder.rglob("*")
                if path.is_file() and path.suffix != ".png"]
    for path in readable:
        file = path.relative_to(runs).as_posix()
        if sha256(join_log(path.read_bytes(), sources)) != manifest.get(file):
            raise ArchiveError(f"{file} is not what its archive has")
    return len(found) + len(readable)


def main():
    """Run one of the four commands."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, nargs in (("restore", "+"), ("pack", "+"), ("keep", "+")):
        commands.add_parser(name).add_argument("names", nargs=nargs)
    commands.choices["restore"].add_argument("--output", type=Path, default=Path("runs"))
    commands.add_parser("verify")
    args = parser.parse_args()
    try:
        if args.command == "verify":
            print(f"{verify()} files are as MANIFEST says")
        for name in getattr(args, "names", ()):
            if args.command == "restore":
                print(f"{args.output / name}: {restore(name, args.output)} files")
            elif args.command == "pack":
                print(f"{name}: {pack(Path(name))} files packed")
            else:
                print(keep(name))
    except tarfile.TarError as error:
        raise ArchiveError(error) from None


if __name__ == "__main__":
    run_main(main)
