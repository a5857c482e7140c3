"""Write the report of a run, or export its model.

    python report.py [RUN_FOLDER]               # report.md and curve.png; else of the newest run
    python report.py RUN_FOLDER --export DIR    # DIR/model.safetensors and DIR/config.json

All numbers are those of the run's train.log, metrics.jsonl and checkpoint. The trainer writes the
report at a run's end. Only the picture needs matplotlib, and only the export needs safetensors.
"""
import argparse
import contextlib
import io
import itertools
import json
import os
import re
import shutil
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path

import torch

from checkpoints import (VALIDATED, Checkpoints, Process, energy_used, is_summary, load_weights,
                         loss_of, newest_run, processes, read_log, validations_of)
from data.text_to_bin import (FOLDER, InputError, Parser, appears_whole, first_line, gpt2_encoding,
                              relative, run_main, to_path)
from runtime import Runtime, generate

PROMPTS = ("The history of", "Once upon a time", "To be, or not to be")
SAMPLING = dict(seed=1337, temperature=0.8, top_k=50, max_new_tokens=50)

# The baseline to compare with: NoCap-Test's own run on one RTX 4090, which took 5.401 h for 2.50B
# tokens (its README.md). LOG is its log; `wall` is in wandb-summary.json beside that.
SOURCE = "https://github.com/BottleCapAI/NoCap-Test"
LOG = f"{SOURCE}/blob/master/wandb/run-20250410_203158-64s1zc1w/files/output.log"
BASELINE = dict(loss=3.3821, steps=4768, tokens=2_499_805_184, seconds=19444.5, wall=19795.6,
                peak_mib=9829, machine="one RTX 4090")
BASELINE_LOSSES = (  # every 128 steps and at the end; all steps took 4.08 s, within 22 s in all
    10.9680, 6.1793, 5.3062, 4.7842, 4.3689, 4.1628, 4.0718, 3.9768, 3.9235, 3.8688, 3.8278, 3.7995,
    3.7659, 3.7373, 3.7190, 3.6939, 3.6830, 3.6629, 3.6504, 3.6399, 3.6269, 3.6265, 3.6015, 3.5993,
    3.5929, 3.5760, 3.5735, 3.5752, 3.5551, 3.5473, 3.5338, 3.5223, 3.4921, 3.4699, 3.4443, 3.4208,
    3.3997, 3.3839, 3.3821)


# Numbers that the report reads of metrics.jsonl, and those that validations and summaries need
NUMBERS = {"step", "tokens", "train_loss", "val_loss", "val_loss_fp32", "train_time_s",
           "train_time_with_compilation_s", "wall_time_s", "peak_memory_usage", "peak_memory_bytes"}
OF_VALIDATION = {*VALIDATED, "wall_time_s"}
OF_SUMMARY = {"train_time_s", "train_time_with_compilation_s"}


def is_whole(row: dict) -> bool:
    """Return whether a row of metrics.jsonl has its numbers; a loss may be nan or infinite."""
    needed = {"step"} | (OF_VALIDATION if "val_loss" in row else set()) \
        | (OF_SUMMARY if is_summary(row) else set())
    good = lambda name, value: type(value) in (int, float) and (
        abs(value) < 1e18 or "loss" in name and type(value) is float)
    return needed <= row.keys() and type(row["step"]) is int and row["step"] >= 0 and all(
        good(name, value) for name, value in row.items() if name in NUMBERS)


class Record:
    """What a run's files say of it. Raises InputError where there is no sound metrics.jsonl."""

    def __init__(self, folder: Path):
        from experiments.plot_runs import read_run

        if not folder.is_dir():
            raise InputError(f"{folder}: no folder of a run")
        self.run, self.log = read_run(folder), read_log(folder)
        for number, row in enumerate(self.run.rows, 1):
            if not is_whole(row):
                raise InputError(f"{self.run.file}: line {number} is not a row of metrics")
        self.processes = processes(self.log)
        # of each name the last value; a summary comes last
        self.latest = {name: value for row in self.run.rows for name, value in row.items()}
        self.validations = validations_of(self.run.rows)
        self.step, total = self.latest.get("step", 0), self.last(r"steps: (\d+) of ")
        self.total_steps = int(total) if total else None

    def all(self, pattern: str) -> list[str]:
        """Return what the group of a pattern is in the lines of train.log that begin so."""
        return re.findall(f"^{pattern}", self.log, re.MULTILINE)

    def last(self, pattern: str) -> str | None:
        """Return the same of the last such line: of the last start of a run that was resumed."""
        return (self.all(pattern) or [None])[-1]

    def loss_at(self, step: int) -> tuple[float, str] | None:
        """Return the validation loss at a step, in fp32 if there is one, and its dtype."""
        found = [row for row in self.validations if row["step"] == step]
        if not found:
            return None
        dtype = "float32" if "val_loss_fp32" in found[-1] else self.last(r"device: \w+, (\w+),")
        return loss_of(found[-1]), dtype or "a dtype not known"


# -----------------------------------------------------------------------------
# the report


def final_loss(record: Record) -> str:
    if not record.validations:
        return "none: the run has no validation"
    step = record.validations[-1]["step"]
    loss, dtype = record.loss_at(step)
    text = f"**{loss:.4f}** in {dtype}"
    if dtype != "float32":
        text += ", none in float32 (`--val_fp32 1`)"
    return text + (f", at step {step}, not the last" if step < record.step else "")


def time_to(record: Record, target: float) -> str:
    """Return when a validation first reached the target, or by how much all missed it."""
    if not record.validations:
        return "not known: the run has no validation"
    for row in record.validations:
        if loss_of(row) <= target:
            return (f"**reached** after {row['train_time_s']:,.1f} s of training, "
                    f"{row['wall_time_s']:,.1f} s of wall clock, at step {row['step']}")
    lowest = min(map(loss_of, record.validations))
    return f"**not reached**: the lowest is {lowest:.4f}, {lowest - target:.4f} above"


def state_of(record: Record) -> str:
    """Return in a sentence whether the run is finished, and why not."""
    where = f"step {record.step} of {record.total_steps or 'a number not known'}"
    if record.run.summary is None:
        error = re.search(r"^error: (.*)\n\Z", record.log, re.MULTILINE)
        why = f"it failed at {error[1]}" if error else "it still trains, was killed, or failed"
        return f"**Unfinished** at {where}: {why}."
    if record.step == record.total_steps:
        return f"Finished: {where}."
    target = re.search(r"\btarget_val_loss ([^,\n]+)", record.last("flags that differ (.*)") or "")
    last = record.validations[-1] if record.validations else dict(step=None)
    if target and last["step"] == record.step and loss_of(last) <= float(target[1]):
        return f"Stopped at its target: {where}."
    return f"**Unfinished** at {where}: {record.last('(stopped by .*)') or 'it was stopped'}."


def energy(record: Record) -> str:
    """Return what the GPUs used in all processes of the run, and what is missing of it."""
    found, known = record.processes, 0
    ends = [process.start for process in found[1:]] + [record.step]
    for i, process in enumerate(found):  # its steps that count: none has gone back to before them
        if process.joules is not None:
            known += max(0, min(ends[i:]) - process.start)
    if not (joules := energy_used(record.log)):
        return "not known: it takes a GPU and `pip install nvidia-ml-py`"
    text = f"{joules:,.0f} J of the GPUs"
    if known < record.step:
        text += f", **of {known} of {record.step} steps alone**: the others' is not known"
    return text + without_lost(found)


def without_lost(found: list[Process]) -> str:
    """Return what to say of a number that is summed over these processes."""
    if not (lost := sum(not process.ended for process in found)):
        return ""
    return f", without what {lost} process{'es' * (lost > 1)}, killed or failed, did after the " \
        "last save"


def targets(record: Record) -> list[tuple[str, str, str]]:
    """Return facts' rows of the losses to reach: those that were typed, and the baseline's."""
    given = {float(target): f" (`--{name}`)" for name in ("target_val_loss", "goal_val_loss")
             for target in record.all(f"flags .* {name} ([^,\n]+)")[-1:]}
    rows = []
    for target in dict.fromkeys([*given, BASELINE["loss"]]):
        found, reached = time_to(record, target), ""
        if target == BASELINE["loss"] and (unlike := other_measure(record)):
            found += f", {unlike}"
        elif target == BASELINE["loss"]:
            reached = f"after {BASELINE['seconds']:,.1f} s of training"
        rows.append((f"loss {target:g}{given.get(target, '')}", found, reached))
    return rows


def other_measure(record: Record) -> str:
    """Return why this run's losses do not compare with the baseline's; empty where they do."""
    text = record.last("data: .*; validation: ([^,]+)") or "fineweb"
    targets = record.last(r"data: .*; validation: [^,]+, ([\d,]+) targets") or "1,048,576"
    T = record.last(r"steps: .* tokens \(\d+ x \d+ x (\d+)\)") or "1024"
    if "fineweb" not in text.lower():
        return "not on FineWeb, as it seems"
    return ", ".join([f"of {targets} targets, the baseline's of 1,048,576"]
                     * (targets != "1,048,576")
                     + [f"in rows of {T}, the baseline's of 1024"] * (T != "1024"))


def facts(record: Record) -> list[tuple[str, str, str]]:
    """Return (name, this run's, the baseline's) of all numbers."""
    latest, base, unknown = record.latest, BASELINE, "not known: the run did not end"

    def shown(name: str, form: str) -> str:
        return form.format(latest[name]) if name in latest else unknown

    seconds, with_compilation = (latest.get(name) for name in (
        "train_time_s", "train_time_with_compilation_s"))
    compilation = f"{with_compilation - seconds:,.1f} s" if record.run.summary else unknown
    timed = [row["step"] for row in record.run.rows if "wall_time_s" in row]
    then = f", at step {timed[-1]}" if timed and timed[-1] != record.step else ""
    peak = max((row.get("peak_memory_usage") or row.get("peak_memory_bytes") or 0
                for row in record.run.rows), default=0)  # of all processes
    return [
        ("validation loss", final_loss(record), f"{base['loss']}"),
        *targets(record),
        ("training", shown("train_time_s", "{:,.1f} s"), f"{base['seconds']:,.1f} s"),
        ("compilation", compilation, "in its training"),
        ("wall clock", shown("wall_time_s", "{:,.1f} s") + then
         + without_lost(record.processes[:-1]), f"{base['wall']:,.1f} s"),
        ("tokens", shown("tokens", "{:,}"), f"{base['tokens']:,}"),
        ("tokens/s", f"{latest['tokens'] / seconds:,.0f}" if seconds and "tokens" in latest
         else "none: no step yet",
         f"{base['tokens'] / base['seconds']:,.0f}"),
        ("peak memory", f"{peak / 2**20:,.0f} MiB" if peak else unknown,
         f"{base['peak_mib']:,} MiB"),
        ("energy", energy(record), "not published"),
        ("machine", record.last("torch .*, Python [^,]+, (.*)") or "not known: no train.log",
         base["machine"]),
    ]


def curve(record: Record, picture: Path) -> str:
    """Draw the losses beside the baseline's; return Markdown, which says what is missing."""
    from experiments.plot_runs import Run, plot

    share = [min(128 * i / BASELINE["steps"], 1) for i in range(len(BASELINE_LOSSES))]
    points = [(part * BASELINE["tokens"], part * BASELINE["seconds"], loss)
              for part, loss in zip(share, BASELINE_LOSSES)]
    baseline = Run(Path("NoCap-Test, one RTX 4090/metrics.jsonl"), [], points, None)
    try:
        plot([record.run, baseline], picture, log=True)
    except ImportError as error:
        return f"None: {first_line(error)}. `pip install matplotlib`, then `python report.py " \
               f"{relative(str(picture.parent))}`."
    return f"![loss against tokens and seconds]({picture.name})"


def samples(model, step: int) -> str:
    """Return in Markdown what the model writes after each of PROMPTS. Raises InputError."""
    if gpt2_encoding().eot_token >= model.config.vocab_size:
        raise InputError(f"the model's {model.config.vocab_size} tokens are not GPT-2's")
    runtime = Runtime(model.lm_head.weight.device, torch.float32, False)
    args = argparse.Namespace(**SAMPLING)
    texts = [f"Of step {step}: " + ", ".join(f"{name} {value}" for name, value in SAMPLING.items())]
    for prompt in PROMPTS:
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            generate(model, prompt, args, model.config.sequence_length, runtime)
        texts += [f"{prompt!r}:", textwrap.indent(text.getvalue().rstrip(), "    ", lambda _: True)]
    return "\n\n".join(texts)


def write_report(folder: Path, make_samples) -> Path:
    """Write report.md and curve.png into a run's folder; return the former's path.

    make_samples(): Markdown. Where this or the picture fails, the report says why.
    """
    from experiments.plot_runs import last_start

    record, path = Record(folder), folder / "report.md"

    def part(make, *arguments) -> str:
        try:
            return make(*arguments)
        except Exception as error:
            return f"None: {first_line(error)}."

    lines = [record.last(f"({begin}.*)") or f"{begin}not known: no train.log"
             for begin in ("commit: ", "torch ", "model: ", "data: ", "steps: ", "flags that ")]
    table = ["| | this run | baseline |", "|---|---|---|",
             *(f"| {' | '.join(row)} |" for row in facts(record))]
    starts = itertools.groupby(record.all("command: (.*)"),
                               lambda command: re.sub(r", resumed at step \d+$", "", command))
    commands = [f"python {next(same).replace(', resumed at', '  # resumed at')}"
                for _, same in starts]  # one that was typed again goes on by itself
    warnings = [f"- Warning: {line}" for line in dict.fromkeys(
        re.findall("^warning: (.*)", last_start(record.log), re.MULTILINE))]
    text = "\n\n".join([
        f"# {folder.resolve().name}", state_of(record), "\n".join(table),
        *["\n".join(warnings)] * bool(warnings),
        f"The baseline is [NoCap-Test]({SOURCE})'s own run, as published in [its log]({LOG}). The "
        "losses compare where both read the same validation text: NoCap-Test's is the first "
        "1,048,576 tokens of FineWeb's.",
        "## Curve", part(curve, record, folder / "curve.png"), "## Samples", part(make_samples),
        "## To repeat it", "\n".join(["```", *(commands or ["not known: no train.log"]), "```"]),
        "\n".join(f"- {line}" for line in lines)])
    new = path.with_suffix(f".md.{os.getpid()}.part")
    new.write_text(text + "\n", encoding="utf-8")
    new.replace(path)
    return path


def report_of(folder: Path) -> Path:
    """Write the report of a run from what its folder holds; return its path."""
    def make_samples() -> str:
        model, state = load_checkpoint(folder)
        return samples(model, state["step"])

    return write_report(folder, make_samples)


def report_if_missing(folder: Path):
    """Write the report of a finished run that was killed before it had one."""
    if (folder / "report.md").exists():
        return
    print("its report is missing: writing it, with samples", flush=True)
    try_report(lambda: report_of(folder), print)


def report_at_end(run):
    """Write the report of the trainer's run, unless a signal has ended it."""
    if run.log is None or run.signals:  # not rank 0
        return
    try_report(lambda: write_report(run.folder, lambda: samples(run.model, run.step)), run.say)


def try_report(make, say):
    """Say which path make() has written. A failure is one line and costs the run nothing."""
    try:
        say(f"report: {relative(str(make()))}")
    except Exception as error:
        say(f"warning: there is no report: {first_line(error)}")


# -----------------------------------------------------------------------------
# export


def load_checkpoint(folder: Path):
    """Return (model, state) of a run's newest sound checkpoint. Raises InputError."""
    from train_gpt2_afno import GPT, GPTConfig, sound

    state = Checkpoints(folder).newest(sound, lambda text: print(text, file=sys.stderr))
    if state is None:
        raise InputError(f"{relative(str(folder))}: no checkpoint there")
    model = GPT(GPTConfig(**state["config"]))
    load_weights(model, state["model"], folder)
    return model, state


def export(folder: Path, out: Path) -> int:
    """Write `out`, a new folder with model.safetensors and config.json; return the model's step."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_model
    except ImportError as error:
        raise InputError(f"--export: {first_line(error)}: pip install safetensors") from None
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--export {out}: must be a new folder, or an empty one")
    if Path.cwd().is_relative_to(out.resolve()):  # it is replaced as a whole
        raise InputError(f"--export {out}: must not be the folder that you are in")
    record, (model, state) = Record(folder), load_checkpoint(folder)
    loss, dtype = record.loss_at(state["step"]) or (None, None)
    config = dict(model=asdict(model.config), step=state["step"], tokens=state["position"],
                  val_loss=loss, val_dtype=dtype, torch=record.last("torch ([^,]+)"),
                  commit=record.last("commit: (.*)"))
    try:
        with appears_whole(out) as new:
            (new / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            save_model(model, str(new / "model.safetensors"))  # tensors that are one, once
            shutil.copymode(new / "config.json", new / "model.safetensors")  # which is the owner's
            for path in new.iterdir():
                with open(path, "r+b") as file:
                    os.fsync(file.fileno())
    except SafetensorError as error:
        raise InputError(f"--export {out}: {first_line(error)}") from None
    except OSError as error:
        raise InputError(f"--export {out}: {error.strerror}") from None
    return state["step"]


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("run", nargs="?", type=FOLDER, metavar="RUN_FOLDER",
                        help="a run's folder (of those under runs/, the newest with a checkpoint)")
    parser.add_argument("--export", type=FOLDER, metavar="DIR",
                        help="write the model there, and no report")
    args = parser.parse_args()
    folder = newest_run("RUN_FOLDER") if args.run is None else to_path(args.run)
    if args.export is not None:
        step = export(folder, to_path(args.export))
        print(f"{args.export}: model.safetensors and config.json, of step {step}")
        return

    print(relative(str(report_of(folder))))


if __name__ == "__main__":
    run_main(main)
