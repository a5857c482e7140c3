"""Download FineWeb, already tokenized: shards of 100M tokens of the dataset kjj0/fineweb10B-gpt2.

    python data/cached_fineweb10B.py [N]    # the validation shard and N training shards (25)

25 shards are the 2.5B tokens of the baseline's run; there are 103. Each shard is compared with the
hub's sha256 once, then sha256.txt beside the shards has it; from then on it counts as present where
its header and its size agree. A shard whose download was cut off is downloaded again from its
beginning.
"""
import contextlib
import hashlib
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data.text_to_bin import InputError, first_line, owned, read_bin, run_main, warn_once

REPO, OUT, ALL = "kjj0/fineweb10B-gpt2", ROOT / "data" / "fineweb10B", 103
SUMS = "sha256.txt"  # as sha256sum writes and checks it


def is_complete(path: Path) -> bool:
    try:
        read_bin(path)
    except InputError:
        return False
    return True


def verified() -> set[str]:
    """Return the names of the shards that were compared with the hub's."""
    with contextlib.suppress(FileNotFoundError):
        text = (OUT / SUMS).read_text(encoding="utf-8", errors="replace")
        return {line[66:] for line in text.splitlines()}
    return set()


def fetch(name: str, download, sha256=None) -> None:
    """Make OUT/name a verified shard, or raise InputError.

    `download` is huggingface_hub.hf_hub_download; sha256(name) is the hub's digest, or None.
    """
    path, folder = OUT / name, OUT / ".download"
    if is_complete(path) and (name in verified() or not sha256):
        return
    shutil.rmtree(folder, ignore_errors=True)  # of a call that was killed
    try:
        try:
            expected = sha256(name) if sha256 else None
            if is_complete(path) and digest_of(path) != expected:
                path.unlink()
            missing = not is_complete(path)
            if missing:
                download(repo_id=REPO, filename=name, repo_type="dataset", local_dir=str(folder),
                         force_download=path.exists())
        except Exception as error:  # the hub's client lets those of its HTTP library through
            raise InputError(f"{name}: no download from {REPO}, is the network there? "
                             f"({first_line(error)})") from None
        if missing:
            read_bin(folder / name)
            if expected and (found := digest_of(folder / name)) != expected:
                raise InputError(f"{name}: the download's sha256 is {found}, the hub's {expected}: "
                                 "try again")
            os.replace(folder / name, path)
        if expected:
            with open(OUT / SUMS, "a", encoding="utf-8") as file:
                file.write(f"{expected}  {name}\n")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def digest_of(path: Path) -> str:
    """Return the sha256 of a file that is on the disk for good."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch_all(names: list[str]):
    """Fetch shards from the hub, or compare them with it."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its retries are not our one line
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    except ImportError:
        raise InputError("the FineWeb download needs huggingface_hub: "
                         "pip install huggingface_hub") from None
    from tqdm import tqdm

    sha256 = lambda name: get_hf_file_metadata(  # the tag of a large file
        hf_hub_url(REPO, name, repo_type="dataset")).etag
    with owned(OUT, str(OUT.relative_to(ROOT))):
        for name in tqdm(names, desc="FineWeb shards", disable=None):
            fetch(name, hf_hub_download, sha256)


def main():
    try:
        count = int(sys.argv[1]) if len(sys.argv) > 1 else 25
    except ValueError:
        count = 0
    if not 1 <= count <= ALL or len(sys.argv) > 2:
        raise InputError(f"usage: cached_fineweb10B.py [N], N training shards from 1 to {ALL}")
    names = [f"fineweb_train_{i:06d}.bin" for i in range(1, count + 1)]
    names.insert(0, "fineweb_val_000000.bin")
    missing = [name for name in names if not is_complete(OUT / name)]
    if unknown := [*missing, *sorted({*names} - {*missing} - verified())]:
        try:
            fetch_all(unknown)
        except InputError as error:
            if not all(is_complete(OUT / name) for name in names):
                raise
            warn_once(f"shards that are there are not compared with the hub's: {error}")
    print(f"{OUT.relative_to(ROOT)}: {len(names)} shards, {len(missing)} of them new")


if __name__ == "__main__":
    run_main(main)
