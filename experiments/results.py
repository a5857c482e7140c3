"""Make the tables of README.md, experiments/README.md and experiments/benchmark_results.md.

    python experiments/results.py            # write them between their <!-- table --> marks
    python experiments/results.py --check    # end with status 1 where a page is out of date

THE table is read from the readable logs under runs/ alone, that of all runs from the archives.
"""
import contextlib
import json
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from data.text_to_bin import InputError, Parser, first_line, run_main  # noqa: E402
from experiments import archive  # noqa: E402
from experiments.plot_runs import time_to_loss  # noqa: E402

GOALS, LONG = "2026-11-26-goals", "2026-11-26-400m-tokens"
WEB, PRUNE = "2026-11-29-groups-and-screen", "2026-11-30-prune-and-draws"
ROWS = (  # of THE table: the letter of the glossary, what it is, its runs
    ("A", "baseline", ("2026-11-26-swiglu-and-fp8/a-400", f"{GOALS}/a-400-s2")),
    ("B", "control", (f"{GOALS}/b-92", f"{GOALS}/b-92-s2", f"{GOALS}/b-92-s3")),
    ("C", "hybrid", (f"{GOALS}/c-92", f"{GOALS}/c-92-s2", f"{GOALS}/c-92-s3")),
    ("C0", "no attention", (f"{GOALS}/c0-92", f"{GOALS}/c0-92-s2", f"{LONG}/c0-92-s3")),
    ("B", "control", (f"{LONG}/b-400",)),
    ("C", "hybrid", (f"{LONG}/c-400",)),
    ("B", "control, today's recipe", (f"{WEB}/b", f"{PRUNE}/b-s4")),
    ("C", "hybrid, today's recipe", (f"{WEB}/c", f"{PRUNE}/c-s4")),
)
LOGS = ("train.log", "stdout.txt", "metrics.jsonl")
NOT_SAID = {  # flags that the table of all runs says in other words, or that change nothing
    "mixer", "attn_layers", "afno_state_layers", "output_dir", "seed", "num_iterations",
    "warmdown_iters", "sequence_length", "input_bin", "input_val_bin", "save_every",
    "val_loss_every", "val_fp32", "resume"}
TEXTS = {  # of a run, by the folder that its shards are in
    "mixed": "mixed English", "all": "mixed English", "web": "**web English**",
    "shakespeare": "Shakespeare"}
MARKS = "<!-- table -->\n", "<!-- /table -->"  # around the table of a page


@dataclass
class Run:
    """Hold what a run's log says; empty where it says nothing."""
    name: str  # folder/run
    flags: dict[str, str] = field(default_factory=dict)
    mixers: str = ""
    text: str = ""  # that it was validated on, and trained where no other is named
    length: int | None = None  # T, the tokens of a row
    steps: int | None = None  # those of the plan
    curve: list[tuple[int, float, float]] = field(default_factory=list)  # (step, seconds, loss)
    tokens: int | None = None  # those read when the last validation was made
    speed: float | None = None  # tokens a second of training
    seconds: float | None = None  # of training
    with_compilation: float | None = None
    peak: float | None = None  # GiB
    machine: str = ""

    @property
    def loss(self) -> float | None:
        """Return the last validation loss."""
        return self.curve[-1][2] if self.curve else None

    @property
    def seed(self) -> str:
        """Return the seed that the command names, or the trainer's default."""
        return self.flags.get("seed", "1337") if self.flags else ""


# reading

@contextlib.contextmanager
def named(file: str | Path):
    """Raise InputError naming a file where what is in it cannot be read."""
    try:
        yield
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: damaged, or cut off ({first_line(error)})") from None


def last(pattern: str, log: str) -> tuple[str, ...]:
    """Return the groups of a pattern's last match in a log, none where there is no match."""
    found = [match.groups() for match in re.finditer(pattern, log, re.MULTILINE)]
    return found[-1] if found else ()


def number(text: str) -> float:
    """Return the number that a text with commas stands for."""
    return float(text.replace(",", ""))


def read_flags(command: str) -> dict[str, str]:
    """Return the flags of a command line; the last one counts, and a bare one has the value ''."""
    flags, name = {}, None
    for word in shlex.split(command):
        if word.startswith("--"):
            name = word[2:]
            flags[name] = ""
        elif name:
            flags[name] = word
    return flags


def describe_mixers(mixers: list[str], states: str = "") -> str:
    """Return how many layers mix in which way, and where those stand that are not the rule."""
    kinds = {"afno": "AFNO", "attn": "attention"}
    kind = {**dict(enumerate(kinds[mixer] for mixer in mixers)),
            **{int(layer): "state" for layer in states.split(", ") if layer}}
    (rule, count), *others = Counter(kind.values()).most_common()
    places = (f"{name} in {', '.join(str(i) for i in kind if kind[i] == name)}"
              for name, _ in sorted(others))
    return "; ".join([f"{rule} x{count}", *places])


def read_log(name: str, log: str) -> Run:
    """Return the run that a log without sources describes; what was resumed counts as it ended."""
    run = Run(name)
    for command in re.findall(r"^command: (.*)", log, re.MULTILINE):
        run.flags |= read_flags(command)
    for mixers in last(r"^model: .* mixers ((?:afno|attn)(?: (?:afno|attn))*)", log):
        run.mixers = describe_mixers(
            mixers.split(), *last(r"^afno layers of form state: (.*)", log))
    for shards in last(r"^data: data/(\w+)/", log):
        (text,) = last(r"^data: .*validation: data/(\w+)/", log) or (shards,)
        run.text = TEXTS.get(text, "") + f", trained on data/{shards}" * (text != shards)
    for machine in last(r"(?:\d x|on) (?:NVIDIA )?(H\d+|CPU)", log):
        run.machine = machine
    steps = r"^step:(\d+)/\d+ val_loss:([\d.]+) train_time:([\d.]+)s"
    run.curve = [(int(step), float(seconds), float(loss))
                 for step, loss, seconds in re.findall(steps, log, re.MULTILINE)]
    if plan := last(r"^steps: (\d+) of ([\d,]+) tokens \(\d+ x \d+ x (\d+)\)", log):
        run.steps, run.length = int(plan[0]), int(plan[2])
        run.tokens = run.curve[-1][0] * int(number(plan[1])) if run.curve else None
    if end := last(r"^tokens/s: ([\d,]+)  peak_memory_usage: ([\d,]+) MiB  "
                   r"train_time: ([\d.]+) s, ([\d.]+) s with compilation", log):
        run.speed, peak, run.seconds, run.with_compilation = map(number, end)
        run.peak = peak / 1024
    return run


def add_metrics(run: Run, metrics: str):
    """Fill in what a metrics.jsonl knows better than the log, or alone."""
    rows = [json.loads(line) for line in metrics.splitlines() if '"train_loss"' not in line]
    curve = [row for row in rows if "val_loss" in row]
    if curve:
        run.tokens = curve[-1]["tokens"]
        run.curve = run.curve or [(r["step"], r["train_time_s"], r["val_loss"]) for r in curve]
    for row in rows:
        if "peak_memory_usage" in row and run.speed is None:
            run.speed, run.seconds = row["tokens_per_s"], row["train_time_s"]
            run.with_compilation = row["train_time_with_compilation_s"]
            run.peak = row["peak_memory_usage"] / 2**30
    if run.seconds is not None and run.seconds <= 0:  # the clock stood still
        run.speed = run.seconds = run.with_compilation = None


def read_whole(name: str) -> Run:
    """Return the run of a readable log; raise InputError naming the log where it is not whole."""
    path = archive.RUNS / name / "train.log"
    with named(path):
        run = read_log(name, path.read_text(encoding="utf-8"))
        for value in ("machine", "text", "steps", "curve", "speed"):
            if not getattr(run, value):
                raise ValueError(f"no line with its {value}")
        if run.curve[-1][0] != run.steps:
            raise ValueError(f"last validated at step {run.curve[-1][0]} of {run.steps}")
    return run


def archived_runs(folder: str) -> list[Run]:
    """Return all runs of an archive, by name."""
    texts: dict[str, dict[str, str]] = {}
    for file, data in archive.members(folder):
        name, _, last_part = file.rpartition("/")
        if last_part in LOGS:
            with named(file):
                texts.setdefault(name, {})[last_part] = archive.split_log(data)[1].decode()
    runs = []
    for name, logs in sorted(texts.items()):
        log = "train.log" if logs.get("train.log") else "stdout.txt"
        with named(f"{name}/{log}"):
            run = read_log(name, logs.get(log, ""))
        with named(f"{name}/metrics.jsonl"):
            add_metrics(run, logs.get("metrics.jsonl", ""))
        runs.append(run)
    return runs


# THE table

def average(runs: Iterable[Run], value: str) -> float:
    """Return the mean of one value over runs."""
    return mean(getattr(run, value) for run in runs)


def timed(runs: list[Run]) -> list[Run]:
    """Return the runs on the first one's kind of machine, whose speeds a row may average."""
    return [run for run in runs if run.machine == runs[0].machine]


def mean_curve(runs: list[Run]) -> list[tuple[float, float]]:
    """Return (training seconds, loss) at each step where one of the runs validated, their means.

    Between two of its own validations a run is read off linearly.
    """
    first = max(run.curve[0][0] for run in runs)
    last = min(run.curve[-1][0] for run in runs)
    steps = sorted({step for run in runs for step, *_ in run.curve if first <= step <= last})
    # the last validation of a step counts: a run may have gone on from an earlier one
    of = {run.name: [*zip(*sorted({point[0]: point for point in run.curve}.values()))]
          for run in runs}
    read = lambda group, row: np.mean(
        [np.interp(steps, of[run.name][0], of[run.name][row]) for run in group], axis=0)
    return [*zip(read(timed(runs), 1).tolist(), read(runs, 2).tolist())]


def times_faster(runs: list[Run], other: list[Run], compilation: bool = False) -> float:
    """Return the other's seconds to the higher of both last losses over the runs' seconds to it."""
    loss = max(mean_curve(group)[-1][1] for group in (runs, other))

    def seconds(group: list[Run]) -> float:
        before = mean(run.with_compilation - run.seconds for run in timed(group))
        curve = [(0, *point) for point in mean_curve(group)]
        return time_to_loss(curve, loss)[0] + before * compilation

    return seconds(other) / seconds(runs)


def compare(letter: str, groups: list[tuple[str, list[Run]]], runs: list[Run], places: int) -> str:
    """Return how much faster runs are than the row with a letter; empty without a fair one.

    Fair is the same machine and text, and for B as many tokens: A has its own recipe and plan.
    """
    alike = ("machine", "text") if letter == "A" else ("machine", "text", "tokens")
    for name, other in groups:
        if name == letter and all(getattr(other[0], value) == getattr(runs[0], value)
                                  for value in alike):
            return f"{times_faster(runs, other):.{places}f}x"
    return ""


def main_table(root: str) -> str:
    """Return THE table; links are relative to the folder from which runs/ is root + 'runs/'."""
    groups = [(letter, [*map(read_whole, names)]) for letter, _, names in ROWS]
    lines = ["| | on text | tokens | val loss | training s | tokens/s | peak GiB | faster than A "
             "| faster than B | machine | seeds | logs |", "|---" * 12 + "|"]
    for (letter, what, names), (_, runs) in zip(ROWS, groups):
        same = timed(runs)
        links = " ".join(f"[{name.split('/')[1]}]({root}runs/{name}/train.log)" for name in names)
        lines.append(
            f"| **{letter}**: {what} | {runs[0].text.strip('*')} | {runs[0].tokens / 1e6:.0f}M "
            f"| {average(runs, 'loss'):.4f} "
            f"| {average(same, 'seconds'):.1f} | {average(same, 'speed'):,.0f} "
            f"| {average(same, 'peak'):.1f} | {compare('A', groups, runs, 1)} "
            f"| {compare('B', groups, runs, 2)} | {runs[0].machine} | {len(runs)} | {links} |")
    return "\n".join([*lines, "", *notes(groups)])


def notes(groups: list[tuple[str, list[Run]]]) -> list[str]:
    """Return the sentences that the numbers of THE table need."""
    lengths = sorted({run.length for _, runs in groups for run in runs})
    (_, a), (_, b), (_, c), *_ = groups
    ratios = [times_faster(c, other, compilation=True) for other in (a, b)]
    lines = [f"T = {' and '.join(map(str, lengths))} in all rows; means over seeds.",
             "Both columns of times (x) are estimated: read off linearly between validations.",
             f"With the seconds of compilation C at {c[0].tokens / 1e6:.0f}M on {c[0].text} is "
             f"{ratios[0]:.1f}x faster than A and {ratios[1]:.2f}x faster than B."]
    others = [(letter, run) for letter, runs in groups for run in runs if run not in timed(runs)]
    return lines + [f"{run.name.split('/')[1]} ran on an {run.machine}: in the row of {letter} it "
                    "counts for the loss, not for speed and memory." for letter, run in others]


# the table of all runs

def differences(runs: list[Run]) -> list[str]:
    """Return for each run the flags in which it differs from what most runs of its folder have."""
    commands = [run.flags for run in runs if run.flags]
    names = sorted({name for flags in commands for name in flags} - NOT_SAID)
    usual = {name: Counter(flags.get(name) for flags in commands).most_common(1)[0][0]
             for name in names}

    def said(flags: dict[str, str]) -> str:
        same_preset = flags.get("preset") == usual.get("preset")  # else a flag may be the preset's
        own = (name for name in names if flags and flags.get(name) != usual[name]
               and (name in flags or same_preset))
        return " ".join(f"{name} {flags[name]}".strip() if name in flags else f"no {name}"
                        for name in own)

    return [said(run.flags) for run in runs]


def run_row(run: Run, changes: str) -> str:
    """Return the row of a run in the table of all runs."""
    folder, name = run.name.split("/", 1)
    log = next((f"runs/{run.name}/{log}" for log in LOGS
                if (archive.RUNS / run.name / log).exists()), None)
    link = f"[log]({log})" if log else f"[archive](runs/archive/{folder}.tar.xz)"
    step = run.curve[-1][0] if run.curve else 0
    short = f"last validated at step {step} of {run.steps}"
    what = "; ".join(filter(None, (run.mixers, f"`{changes}`" if changes else "",
                                   short if run.steps and step < run.steps else "")))

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    millions = run.tokens / 1e6 if run.tokens else None
    return (f"| {name} | {what} | {cell(run.length, 'd')} | {cell(millions, '.1f')} "
            f"| {cell(run.loss, '.4f')} | {run.text if run.curve else ''} "
            f"| {cell(run.speed, ',.0f')} | {cell(run.seconds, '.1f')} "
            f"| {cell(run.with_compilation, '.1f')} | {cell(run.peak, '.1f')} "
            f"| {run.machine} | {run.seed} | {link} |")


def all_runs() -> str:
    """Return a heading and a table for each archive that has runs."""
    parts = []
    for folder in archive.archives():
        if runs := archived_runs(folder):
            rows = [run_row(run, changes) for run, changes in zip(runs, differences(runs))]
            parts += [f"## {folder}", "", "| run | what | T | tokens, M | val loss | on text "
                      "| tokens/s | training s | with compilation | peak GiB "
                      "| machine | seed | log |",
                      "|---" * 13 + "|", *rows, ""]
    return "\n".join(parts).rstrip()


# pages

def renewed(path: Path, table: str) -> str:
    """Return a page with a new table between its marks; raise InputError where it lacks them."""
    with named(path):
        page = path.read_text(encoding="utf-8")
    before, begin, rest = page.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not end or any(page.count(mark) > 1 for mark in MARKS):
        raise InputError(f"{path}: must have the lines {MARKS[0].strip()} and {MARKS[1]}, in this "
                         "order, once each")
    return f"{before}{begin}{table}\n{end}{after}"


def pages() -> dict[Path, str]:
    """Return every generated page as it should be."""
    tables = {HERE.parent / "README.md": main_table("experiments/"),
              HERE / "README.md": main_table(""), HERE / "benchmark_results.md": all_runs()}
    return {path: renewed(path, table) for path, table in tables.items()}


def main():
    """Write the pages, or with --check say which are out of date."""
    parser = Parser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only check; write nothing")
    check = parser.parse_args().check
    old = {path: page for path, page in pages().items() if page != path.read_text()}
    for path, page in old.items():
        print(f"{path.relative_to(HERE.parent)}: {'out of date' if check else 'written'}")
        if not check:
            archive.write(path, page.encode())
    if check and old:
        raise SystemExit(1)


if __name__ == "__main__":
    run_main(main)
