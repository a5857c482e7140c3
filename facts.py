"""Say what a run needs, gives and costs: one screen before data are fetched or it compiles.

start.py prints the screen, and the trainer where that has not run. Then the trainer says what will
run, and once its first steps are measured, how long it took to come there and how long the rest
will take.
"""
import math
import os
import re
import shlex
import shutil
import sys
import time
from pathlib import Path

import torch

from checkpoints import Checkpoints, describe_miss, describe_stop, read_log
from data.cached_fineweb10B import ALL
from data.loader import find_shards
from data.text_to_bin import ROOT, in_repository, relative, validated_on
from kernels import usable
from runtime import GIB, gpu_driver, memory_budget, ranks

STARTED = "RUN_AFNO_SECONDS"  # in the environment of what run_afno.sh starts: seconds before it
SHARD = 100_000_000  # tokens of one of FineWeb's
# in data/, by the folder there that they fill
SCRIPTS = {"fineweb10B": "cached_fineweb10B.py", "shakespeare": "shakespeare.py"}
KEPT_FILES = 5  # checkpoints on the disk at most: two last, best, the cooldown's, one being written
# The loss to expect, and where that is from, by the folder under runs/: it is the preset's where no
# flag changes the run.
EXPECTED = {
    "fineweb": "3.3821 or less: an estimate, nobody has run it (README.md, Quick start)",
    "fineweb-mixer-attn": "0.02 less than fineweb's: an estimate (README.md, Quick start)",
    "fineweb-4k": "not known (README.md, Quick start)",
    "shakespeare": "4.26, measured (experiments/runs/2026-11-28-first-run/shakespeare)",
    "baseline": "3.3821, published by NoCap-Test (README.md, Quick start)",
}


# -----------------------------------------------------------------------------
# the screen


def in_container(path: Path, mounts: str = "/proc/mounts") -> bool:
    """Return whether a path is on a container's own disk, which goes with the container."""
    try:
        lines = Path(mounts).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not on Linux
        return False
    found = []
    for line in lines:
        where, kind = line.split()[1:3]
        where = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), where)
        if path.resolve().is_relative_to(where):
            found.append((len(where), kind))
    return max(found, default=(0, ""))[1] == "overlay"


def tokens_of_step(args) -> int:
    """Return the tokens that a step of all ranks reads."""
    return args.batch_size * args.grad_accumulation_steps * args.sequence_length


def tokens_of(args) -> int:
    """Return the tokens that the whole run reads."""
    return (args.num_iterations + args.extend) * tokens_of_step(args)


def shards_of(args) -> int:
    """Return how many of FineWeb's shards the run reads; the last 1% of one counts as none."""
    return max(1, min(math.ceil(tokens_of(args) / SHARD - 0.01), ALL))


def data_script(args) -> list[str]:
    """Return the script in data/ that brings the shards, and its arguments; [] for one's own."""
    folder = Path(args.input_bin).parent
    if folder.parent != ROOT / "data" or folder.name not in SCRIPTS:
        return []
    count = [str(shards_of(args))] if folder.name == "fineweb10B" else []
    return [SCRIPTS[folder.name], *count]


def describe_data(args) -> tuple[str, int]:
    """Return where the data are, and the bytes that start.py fetches."""
    train, val = (find_shards(pattern) for pattern in (args.input_bin, args.input_val_bin))
    tokens = sum(os.path.getsize(path) for path in train) // 2
    folder = os.path.dirname(relative(args.input_bin))
    if SCRIPTS["fineweb10B"] not in data_script(args):
        return (f"{folder}: there, {tokens / 1e6:,.1f}M tokens" if train and val
                else f"{folder}: not there yet"), 0
    wanted = shards_of(args)
    missing = max(0, wanted - len(train)) + (not val)
    if not missing:
        return f"{folder}: there, {len(train)} shards for training, {tokens / 1e6:,.0f}M tokens", 0
    fetched = missing * 2 * SHARD
    return f"{folder}: {missing} of {wanted + 1} shards to fetch, {fetched / 1e9:.1f} GB", fetched


def describe_disk(folder: Path, state: int, fetched: int) -> list[str]:
    """Return lines: the disk that is free, and what data and checkpoints of `state` bytes take."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    old = sum(path.stat().st_size for path in Checkpoints(folder).paths())
    need = max(0, KEPT_FILES * state - old) + fetched
    lines = [f"disk: {free / 1e9:,.1f} GB free, {need / 1e9:.1f} needed: up to {KEPT_FILES} "
             f"checkpoints of {state / 1e9:.2g} GB, {fetched / 1e9:.1f} GB of data"]
    if aside := Checkpoints(folder).aside():
        size = sum(path.stat().st_size for path in aside)
        lines.append(f"set aside: {size / 1e9:.2g} GB of checkpoints, *.abandoned ({len(aside)}): "
                     "no run reads them, delete them if you like")
    if need > free:
        lines.append("warning: the disk is too small, make room first")
    if in_container(there):
        lines.append(f"warning: {there} is on this container's own disk, which goes with it: put "
                     "this folder on a volume")
    return lines


def facts(args, folder: Path, device: torch.device, sizes: tuple[int, int], saved: dict | None,
          command: str, pid: int) -> list[str]:
    """Return the screen's lines.

    sizes: bytes of a checkpoint, and those that training takes beside a micro-batch. saved: the
    checkpoint that the run goes on from, or None. pid: the process to stop.
    """
    kept, needed = sizes
    steps, rows = args.num_iterations + args.extend, args.batch_size * args.grad_accumulation_steps
    data, fetched = describe_data(args)
    name, trial = "CPU", ""
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, {torch.cuda.device_count()} here"
        trial = ", the largest micro-batch that fits is tried" if args.may_shrink else ""
    shown = lambda size: f"{size / GIB:.1f} GiB"
    named = "--output_dir" in command and "--resume" not in command
    known = folder.parent == ROOT / "runs" and not args.extend
    expected = EXPECTED.get(folder.name) if known else None
    lines = [
        f"output: {relative(str(folder))}, "
        + (f"at step {saved['step']} of {steps}" if saved else "a new run"),
        f"device: {name}; memory free: {shown(memory_budget(device))}",
        f"memory needed: {shown(needed)} and a micro-batch's work{trial}",
        f"tokens: {tokens_of(args):,} in {steps} steps of {rows} rows of {args.sequence_length}",
        f"data: {data}",
        *describe_disk(folder, kept, fetched),
        f"loss to expect: {expected or 'not known for these flags'}",
        "minutes: said once six steps of this device are measured",
        f"to stop: Ctrl-C or kill -TERM {pid}; once it trains, it saves first",
        f"to go on: {to_go_on(command)}" + " --resume auto" * named,
    ]
    rented = sys.stdout.isatty() or in_container(Path("/"))
    if rented and not {"TMUX", "STY"} & os.environ.keys():
        lines.append("against a closed terminal: "
                     + shlex.join(["tmux", "new", "-s", "afno", command]))
    return lines


def to_go_on(command: str) -> str:
    """Return a command with --resume auto in place of --resume FILE."""
    words, others = iter(shlex.split(command)), []
    for word in words:
        named = word == "--resume" and next(words, "")
        others += ["--resume", "auto"] if named or word.startswith("--resume=") else [word]
    return shlex.join(others)


def facts_wanted() -> bool:
    """Return whether this process of the trainer is to print the screen: start.py has not."""
    return ranks()[0] == 0 and STARTED not in os.environ


def show_facts(args, folder: Path, device: torch.device, sizes: tuple[int, int],
               saved: dict | None, command: str | None = None):
    """Print the screen, of this command where none is given. To stop: this process, or torchrun."""
    shorter = relative if in_repository() else str
    command = command or shlex.join(["python", *map(shorter, sys.argv)])
    pid = os.getpid() if ranks()[1] == 1 else os.getppid()
    print("\n".join(facts(args, folder, device, sizes, saved, command, pid)), flush=True)


# -----------------------------------------------------------------------------
# what will run


KERNELS = dict(convolution="convolution", token="taps of each token", state="state",
               loss="softmax of the loss")  # by their names in kernels.usable; fp8 is said apart


def kernels_of(config, args) -> set[str]:
    """Return the names, in kernels.usable, of the kernels that training a model uses."""
    mixers = {config.mixer_of(layer) for layer in range(config.n_layer)}
    names = {"fp8" if args.fp8_head or args.fp8_mlp else "loss"}
    if "afno" in mixers or config.attn_short_conv > 1:
        names.add("convolution")
    if "afno" in mixers and config.afno_token_taps:
        names.add("token")
    if "afno" in mixers and (config.afno_form == "state" or config.afno_state_layers):
        names.add("state")
    return names


def describe(run):
    """Say what will run: versions, model and kernels."""
    config, device, dtype = run.config, run.device, run.runtime.dtype
    chip = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, driver " \
        f"{gpu_driver()}" if device.type == "cuda" else "CPU"
    threads = torch.get_num_threads()
    run.say(f"torch {torch.__version__}, Python {sys.version.split()[0]}, "
            f"{run.runtime.world} x {chip}, {threads} thread{'s' * (threads > 1)}")
    mixers = [config.mixer_of(layer) for layer in range(config.n_layer)]
    count = sum(p.numel() for p in run.model.parameters())
    run.say(f"model: {run.args.model}, {count:,} parameters, mixers {' '.join(mixers)}, "
            f"{config.n_head} heads, position {config.position}")
    if "afno" in mixers:
        run.say("afno: " + ", ".join(f"{name} {value}"
                                     for name, value in config.afno_arguments().items()))
    if config.afno_state_layers:
        run.say(f"afno layers of form state: {', '.join(map(str, config.afno_state_layers))}")
    names = kernels_of(config, run.args) | {"loss"}  # validation is without fp8
    for name in KERNELS:
        if name in names:
            run.say(f"{KERNELS[name]}: {usable(name, device, dtype)[1]}")
    if run.fp8:
        run.say(run.fp8)


def describe_plan(run, defaults: dict):
    """Say what it will do: data, steps, flags that differ from these defaults, output."""
    args = run.args
    shared = {*map(os.path.realpath, run.stream.paths)} \
        & {*map(os.path.realpath, run.val_stream.paths)}
    if shared:
        run.say(f"warning: {len(shared)} shards are both for training and for validation: the "
                "val_loss is of text that is learned")
    a_step = args.grad_accumulation_steps * run.tokens
    to_come = (run.total_steps - run.step) * a_step / len(run.stream)
    before = validated_on(read_log(run.folder)) if run.log and run.log.validations else []
    targets, text = (f"{run.val_tokens:,} targets",
                     f"sha256 {run.val_stream.digest(run.val_tokens + 1)}")
    run.say(f"data: {relative(args.input_bin)}, {len(run.stream):,} tokens, {to_come:.3g} "
            f"passes to come; validation: {relative(args.input_val_bin)}, {targets} of "
            f"{len(run.val_stream) - 1:,}, {text}")
    if before and before[-1] != (targets, text):
        run.say(f"warning: earlier losses of this run are of {' '.join(before[-1])}: they do not "
                "compare with those to come, nor does a target that they reached")
    if to_come > 1 and (run.config.pair_rows or run.config.value_tables):
        run.say("warning: text that is read again is learned by heart by the tables of pairs and "
                "values (experiments/LOG.md, 2026-11-29): --pair_rows 0 --value_tables 0, or "
                "more text")
    run.say(f"steps: {run.total_steps} of {a_step:,} tokens ({args.grad_accumulation_steps} "
            f"x {args.batch_size} x {run.T}), optimizer {args.optimizer}, learning rate "
            f"{args.learning_rate}, warmup {args.warmup_iters}, warmdown "
            f"{args.warmdown_iters}")
    fall = args.warmdown_iters if args.final_lr_fraction < 1 else 0
    if args.warmup_iters + fall > run.total_steps:
        run.say("warning: the learning rate does not reach its full value, or jumps: "
                f"--warmup_iters and --warmdown_iters are more than {run.total_steps} steps")
    changed = [f"{name} {value}" for name, value in sorted(vars(args).items())
               if name in defaults and value != defaults[name]]
    run.say(f"flags that differ from --help's defaults: {', '.join(changed) or 'none'}")
    if args.optimizer == "adamw" and args.momentum != defaults["momentum"]:
        run.say(f"momentum {args.momentum} is Muon's and does nothing here")
    run.say(f"device: {run.device.type}, {args.dtype}, compile "
            f"{int(run.runtime.compile)}; output: {relative(str(run.folder))}")


def describe_end(run, late: bool, summary: dict, peaks: list[int]):
    """Say why the run ended, and its summary. late: --max_seconds are over."""
    args, reached = run.args, summary["wall_clock_time_to_target_loss"]
    if run.signals:
        run.say(describe_stop(run.signals[0], run.step, run.folder, args.target_val_loss))
    elif late and run.step < run.total_steps:
        run.say(f"stopped by --max_seconds {args.max_seconds:g} at step {run.step}")
    if run.log and not run.signals and run.validated == run.total_steps:
        for line in describe_miss(run.log, run.checkpoints, run.target, args):
            run.say(line)
    if len(peaks) > 1:
        each = ", ".join(f"{peak / 2**20:,.0f}" for peak in peaks)
        run.say(f"peak memory of each rank: {each} MiB")
    no_target = "no target" if run.target == -math.inf else "not reached"
    run.say(f"tokens/s: {summary['tokens_per_s']:,.0f}  "
            f"peak_memory_usage: {max(peaks) / 2**20:,.0f} MiB  "
            f"train_time: {summary['train_time_s']:.1f} s, "
            f"{summary['train_time_with_compilation_s']:.1f} s with compilation  "
            "wall_clock_time_to_target_loss: "
            + (no_target if reached is None else f"{reached:.1f} s"))


# -----------------------------------------------------------------------------
# times


class Laps:
    """Seconds of the parts of a command's start; done() ends a part."""

    def __init__(self, begin: float):
        self.mark, self.parts = begin, {}

    def done(self, part: str):
        now = time.perf_counter()
        self.parts[part] = now - self.mark
        self.mark = now

    def __str__(self) -> str:
        return ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.parts.items())


class FirstSteps:
    """Say how long the first step took to come, and after six how long the rest will take."""

    def __init__(self, laps: Laps, say):
        self.laps, self.say, self.seconds = laps, say, []

    def add(self, seconds: float, left: int):
        """Count a step; so many are left."""
        self.seconds.append(seconds)
        if len(self.seconds) == 1:
            self.laps.done("first save and step")
            before = os.environ.get(STARTED)
            self.say(f"seconds to the first step: {self.laps}"
                     + (f"; before, in run_afno.sh: {before}" if before else ""))
        if len(self.seconds) == 6:
            each = sorted(self.seconds[1:])[2]
            self.say(f"minutes: {left * each / 60:.1f} for the {left} steps to come, {each:.3g} s "
                     "a step on this device, without validations")
