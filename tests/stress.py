"""Look for tracebacks, hangs and wrong statuses: damage, kills and random flags on a tiny run.

    python tests/stress.py [--headers 100] [--bits 100] [--kills 20] [--flags 60] [--seed 0]

Prints a line for each finding and the counts; the exit status is 0 where nothing was found. The
issue's figures: --headers 1000 --bits 1000 --kills 200 --flags 300.
"""
import argparse
import json
import os
import random
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runtime
import train_gpt2_afno as trainer
from checkpoints import Checkpoints
from data.text_to_bin import InputError, ShardWriter

SMALL = "--preset baseline --mixer afno --attn_layers 1 --device cpu --model d4 --batch_size 2 " \
    "--sequence_length 16 --val_batch_size 5 --num_iterations 12 --val_loss_every 4 " \
    "--save_every 3 --optimizer muon --grad_accumulation_steps 2 --curriculum 8:0.5,16:0.5"
trainer.MODELS["d4"] = (2, 16)
model_fields = trainer.model_fields
trainer.model_fields = lambda values: model_fields(values) | dict(vocab_size=496)
trainer.measure_matmul_rate = trainer.report_at_end = lambda *_: 1e12


def start(arguments: list[str], output: Path) -> int:
    """Return the process id of a trainer; forked, so that it need not import torch again.

    This process must not compute anything with torch before.
    """
    if child := os.fork():
        return child
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
    sys.argv[1:] = arguments
    status = 99
    try:
        runtime.run(trainer.main)
    except SystemExit as end:
        status = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stderr.flush()
    os._exit(status)


def wait(child: int, seconds: float) -> int | None:
    """Return the exit status, negative for a signal, or None where it takes longer."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return None


def end(arguments: list[str], output: Path, seconds: float, stop=signal.SIGTERM) -> str | None:
    """Run a trainer, stop it after some seconds, and return what is wrong with how it ended."""
    child = start(arguments, output)
    status = wait(child, seconds)
    if status is None:
        os.kill(child, stop)
        status = wait(child, 20)
    if status is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "hangs"
    said = output.read_text(errors="replace")
    if "Traceback" in said:
        return "traceback: " + said.strip().splitlines()[-1]
    if status not in (0, 1, 2, 128 + stop, -stop):
        return f"status {status}"
    if status == 2 and sum(line.startswith("error: ") for line in said.splitlines()) != 1:
        return "status 2 without one line that says why"
    return None


def kills(data: list[str], folder: Path, count: int, draw: random.Random):
    """Kill a run at random moments, again and again; in the end it must equal a whole one."""
    def losses(out: Path) -> list:
        lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        return [(line["step"], line["train_loss"]) for line in lines if "train_loss" in line]

    argv = [*SMALL.split(), *data, "--resume", "auto", "--output_dir"]
    yield end([*argv, str(folder / "whole")], folder / "output", 200)
    left, round_ = count, 0
    while left > 0:
        out, round_ = folder / f"killed{round_}", round_ + 1
        steps = 0
        while left > 0 and steps < 12:
            yield end([*argv, str(out)], folder / "output", draw.uniform(0.05, 2), signal.SIGKILL)
            left -= 1
            steps = max([step for step, _ in losses(out)] if (out / "metrics.jsonl").exists()
                        else [0], default=0) if not damaged_tail(out) else 0
        yield end([*argv, str(out)], folder / "output", 200)
        if losses(out) != losses(folder / "whole"):
            yield "a killed run has other losses than a whole one"


def damaged_tail(out: Path) -> bool:
    path = out / "metrics.jsonl"
    return path.exists() and not path.read_bytes().endswith(b"\n")


def flags(data: list[str], folder: Path, count: int, draw: random.Random):
    """Train, evaluate or generate with random values of random flags."""
    names = [name for name, flag in trainer.FLAGS.items() if flag.group != "shape"
             and name not in ("output_dir", "resume", "input_bin", "input_val_bin", "device")]
    values = ["0", "1", "2", "3", "16", "0.5", "1e-50", "1e18", "1000000000", "-1", "nan", "",
              "none", "0,1", "8:0.5,16:0.5", "muon", "state", "dyadic", "spread", "x" * 300]
    for i in range(count):
        chosen = []
        for name in draw.sample(names, draw.randint(1, 4)):
            kind = trainer.FLAGS[name].kind
            own = kind.metavar.split("|") if "|" in kind.metavar else values
            chosen += [f"--{name}"] + ([] if kind is trainer.PRESENT else [draw.choice(own)])
        argv = [*SMALL.split(), *data, "--output_dir", str(folder / f"flags{i}"), *chosen]
        if bad := end(argv, folder / "output", 20):
            yield f"{shlex.join(chosen)}: {bad}"
        else:
            yield None


def headers(shard: Path, folder: Path, count: int, draw: random.Random):
    """Read shards of which some bytes of the header are others, or which are cut off."""
    whole = shard.read_bytes()
    for _ in range(count):
        content = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            content[draw.randrange(draw.choice((12, 1024)))] = draw.randrange(256)
        (folder / "m.bin").write_bytes(content[: draw.choice((len(content), draw.randrange(2000)))])
        try:
            trainer.TokenStream(str(folder / "m.bin"), 496, "input_bin").read(0, 1)
            yield None
        except InputError:
            yield None
        except Exception as error:
            yield f"traceback: {error!r}"


def bits(run: Path, count: int, draw: random.Random):
    """Load checkpoints of which one bit is another: it is sound, or the one before is taken."""
    newest = Checkpoints(run).paths()[0]
    whole = newest.read_bytes()
    for _ in range(count):
        content = bytearray(whole)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        newest.write_bytes(content)
        try:
            state = Checkpoints(run).newest(trainer.sound, lambda text: None)
            yield None if state["step"] in (9, 12) else f"step {state['step']}"
        except Exception as error:
            yield f"traceback: {error!r}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, count in dict(headers=100, bits=100, kills=20, flags=60, seed=0).items():
        parser.add_argument(f"--{name}", type=int, default=count)
    args, draw, total = parser.parse_args(), None, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for prefix, tokens in (("train", 900), ("val", 151)):
            writer = ShardWriter(folder / prefix)
            writer.write(np.resize(np.random.default_rng(0).integers(0, 496, 50), tokens))
            writer.close()
        data = ["--input_bin", f"{folder}/train_*.bin", "--input_val_bin", f"{folder}/val_*.bin"]
        draw, shard = random.Random(args.seed), folder / "train_000000.bin"
        for what, found in (  # what forks comes first
                ("kills", kills(data, folder, args.kills, draw)),
                ("flags", flags(data, folder, args.flags, draw)),
                ("headers", headers(shard, folder, args.headers, draw)),
                ("bits", bits(folder / "whole", args.bits, draw))):
            found = list(found)
            bad = [text for text in found if text]
            print(f"{what}: {len(found)} trials, {len(bad)} findings", flush=True)
            for text in bad:
                print(f"  {text}", flush=True)
            total += len(bad)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    return int(total > 0)


if __name__ == "__main__":
    sys.exit(main())
