"""Download FineWeb, already tokenized: shards of 100M tokens of the dataset kjj0/fineweb10B-gpt2.

    python data/cached_fineweb10B.py [N]    # the validation shard and N training shards (25)

25 shards are the 2.5B tokens of the baseline's run; there are 103. A shard counts as present once
its header and its size agree. Downloads that were cut off go on where they stopped.
"""
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data.text_to_bin import InputError, read_bin, run_main

REPO, OUT, ALL = "kjj0/fineweb10B-gpt2", ROOT / "data" / "fineweb10B", 103


def is_complete(path: Path) -> bool:
    try:
        read_bin(path)
    except InputError:
        return False
    return True


def fetch(name: str, download) -> None:
    """Make OUT/name a verified shard, or raise InputError.

    `download` is huggingface_hub.hf_hub_download.
    """
    path = OUT / name
    if is_complete(path):
        return
    try:
        # a complete file that failed the check is a wrong one: force makes the client take it anew
        download(repo_id=REPO, filename=name, repo_type="dataset", local_dir=str(OUT),
                 force_download=path.exists())
    except Exception as error:  # the hub's client lets those of its HTTP library through
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{name}: no download from {REPO}, is the network there? "
                         f"({reason})") from None
    read_bin(path)


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
    if missing:
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its retries are not our one line
        try:
            from huggingface_hub import hf_hub_download
        except ImportError:
            raise InputError("the FineWeb download needs huggingface_hub: "
                             "pip install huggingface_hub") from None
        from tqdm import tqdm

        OUT.mkdir(parents=True, exist_ok=True)
        for name in tqdm(missing, desc="FineWeb shards", disable=None):
            fetch(name, hf_hub_download)
    print(f"{OUT.relative_to(ROOT)}: {len(names)} shards, {len(missing)} of them new")


if __name__ == "__main__":
    run_main(main)
