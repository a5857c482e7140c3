"""Plot loss curves of any runs, from their metrics.jsonl, against tokens and training seconds.

    python experiments/plot_runs.py runs/mine runs/other                  # writes curves.png
    python experiments/archive.py restore 2026-11-26-goals --output runs  # runs of the tables
    python experiments/plot_runs.py runs/2026-11-26-goals/[bc]-92 --x seconds --output goals.png

Points are validation losses. Thin lines are training losses, averaged over the last fiftieth of
all steps. Training seconds are the trainer's: without compilation, validation and saving.
Needs matplotlib.
"""
import json
import math
import re
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.text_to_bin import (InputError, Parser, first_line, number, run_main,  # noqa: E402
                              validated_on)

X = ("tokens", "seconds")
FILLED_IN = {"dtype", "val_batch_size", "warmup_iters"}  # by the trainer, where they are not given


@dataclass
class Run:
    """What metrics.jsonl says of a run."""

    file: Path  # its metrics.jsonl
    train: list[tuple[int, float, float]]  # (tokens, training seconds, loss) of every step
    curve: list[tuple[int, float, float]]  # the same of every validation
    summary: dict | None  # what the trainer wrote when it stopped, at the last step or before
    rows: list[dict] = field(default_factory=list)  # all of the file

    @property
    def folder(self) -> Path:
        return self.file.resolve().parent


def refuse_no_file(path: Path):
    """Raise InputError where a path is neither file nor folder: a pipe would wait for ever."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise InputError(f"{path}: no ordinary file")


def read_run(path: Path) -> Run:
    """Read a run's folder or its metrics.jsonl; raise InputError naming the file.

    There may be no rows. A loss may be nan or infinite, as of a run that diverged.
    """
    run = Run(path / "metrics.jsonl" if path.is_dir() else path, [], [], None)
    try:
        refuse_no_file(run.file)
        lines = run.file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{run.file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{run.file}: not a text file, a metrics.jsonl is wanted") from None
    for place, line in enumerate(lines, 1):
        try:
            row = dict(json.loads(line))
            if "train_loss" in row:
                run.train.append(point(row, "train_loss"))
            elif "val_loss" in row:
                run.curve.append(point(row, "val_loss"))
            elif "wall_clock_time_to_target_loss" in row:
                run.summary = row
            run.rows.append(row)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            # the last line of a run that was killed, or is still writing, may be cut off
            if place < len(lines) or not isinstance(error, ValueError):
                raise InputError(f"{run.file}: line {place} is not a row of metrics") from None
    return run


def last_loss(run: Run) -> tuple[int, float]:
    """Return the tokens and the loss at the last validation of a run that has one.

    Raise InputError where one of both is no finite number above 0.
    """
    tokens, _, loss = run.curve[-1]
    if not all(map(number(0, 1e18, include_low=False).accepts, (tokens, loss))):
        raise InputError(f"{run.file}: its tokens are {tokens!r}, its loss is {loss!r}: each must "
                         "be a finite number above 0")
    return tokens, loss


def median_speed(run: Run) -> float:
    """Return the median tokens/s of a run's steps, which what else the machine did hardly moves.

    Steps without a finite number above 0 do not count: a patch of old trials logged the last step
    before a state too late. Raise InputError where no step has one.
    """
    found = [row.get("tokens_per_s") for row in run.rows if "train_loss" in row]
    speeds = [*filter(number(0, 1e18, include_low=False).accepts, found)]
    if not speeds:
        raise InputError(f"{run.file}: no step of training has tokens_per_s, a finite number > 0")
    return statistics.median(speeds)


def point(row: dict, loss: str) -> tuple[int, float, float]:
    """Return (tokens, training seconds, loss) of a row; raise TypeError where one is no number.

    A number beyond 1e300 counts as none, as float64 could not add it up.
    """
    found = row["tokens"], row["train_time_s"], row[loss]
    if not all(type(value) in (int, float) and not 1e300 < abs(value) < math.inf
               for value in found):
        raise TypeError
    return found


def commands_of(log: str) -> list[tuple[str, bool]]:
    """Return a train.log's commands without the script, and whether each went on with a run."""
    found = re.findall(r"^command: \S+ (.*?)(, resumed at step \d+)?$", log, re.MULTILINE)
    return [(words, bool(resumed)) for words, resumed in found]


def last_start(log: str) -> str:
    """Return a train.log from its last start that did not resume: those before left no run."""
    starts = re.split(r"^(?=commit: )", log, flags=re.MULTILINE)
    fresh = [i for i, part in enumerate(starts) if not all(on for _, on in commands_of(part))]
    return "".join(starts[fresh[-1]:]) if fresh else log


def machines_of(log: str) -> tuple[str, ...]:
    """Return the kinds of machine that a train.log names, such as 1 x NVIDIA H200."""
    return tuple(sorted({*re.findall(r"^torch .*, (\d+ x [^,\n]+)", last_start(log),
                                     re.MULTILINE)}))


def flags_said(log: str) -> list[dict[str, str]]:
    """Return the flags that differ from --help's defaults, one dict for each start in a log."""
    lines = re.findall(r"^flags that differ from --help's defaults: (.*)$", log, re.MULTILINE)
    parts = (re.split(r", (?=[a-z]\w* )", line) for line in lines)
    return [dict(part.split(" ", 1) for part in of_line if " " in part) for of_line in parts]


def unlike(logs: list[str]) -> str:
    """Return sentences on sources and validation texts that were not the same in all runs.

    A train.log has the sha256 of each. Older logs have none, and count as any.
    """
    texts = {text for log in logs for text in validated_on(last_start(log))}
    said = ["They were not all validated on one text, or on as many targets: their losses do not "
            "compare."] * (len(texts) > 1)
    found = [re.findall(r"^sha256: ([0-9a-f]{64}) (.+)$", last_start(log), re.MULTILINE)
             for log in logs]
    codes = [{*lines} for lines in found if lines]
    if codes and set.union(*codes) != set.intersection(*codes):
        files = sorted({name for _, name in set.union(*codes) - set.intersection(*codes)})
        said.insert(0, f"The runs had different code, in {', '.join(files)}. That may explain "
                    "differences.")
    return " ".join(said)


def time_to_loss(curve: list[tuple[int, float, float]], loss: float) -> tuple[float, float] | None:
    """Return (seconds, tokens) where the curve first reaches the loss, None if it never does.

    It is taken to be linear between validations.
    """
    before = None
    for tokens, seconds, value in curve:
        if value <= loss:
            if before is None:
                return seconds, tokens
            tokens_before, seconds_before, value_before = before
            share = (value_before - loss) / (value_before - value)
            return (seconds_before + share * (seconds - seconds_before),
                    tokens_before + share * (tokens - tokens_before))
        before = tokens, seconds, value
    return None


def smoothed(values: np.ndarray) -> np.ndarray:
    """Return the means of each value and those before it, a fiftieth of all at most."""
    sums = np.concatenate(([0.0], np.cumsum(values)))
    end = np.arange(1, len(values) + 1)
    begin = np.maximum(end - max(1, len(values) // 50), 0)
    return (sums[end] - sums[begin]) / (end - begin)


def labels(runs: list[Run]) -> list[str]:
    """Return the runs' folder names, with the folder above where two would be alike."""
    names = [run.folder.name for run in runs]
    return [name if names.count(name) == 1 else f"{run.folder.parent.name}/{name}"
            for run, name in zip(runs, names)]


def name_lines(legend, names: list[str]):
    """Name the lines of a legend, in their order. Labels of lines would read _ and $ as signs.

    A folder's name need not be UTF-8: there is a ? for what is not.
    """
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(text=name.encode(errors="replace").decode(), parse_math=False)


def finite_rows(run: Run) -> list[np.ndarray]:
    """Return the rows of training and of validation; say how many are left out, as not finite.

    Raises InputError where none are left.
    """
    rows = [np.array(rows, dtype=float).reshape(-1, 3) for rows in (run.train, run.curve)]
    finite = [of_kind[np.isfinite(of_kind).all(axis=1)] for of_kind in rows]
    if not sum(map(len, rows)):
        raise InputError(f"{run.file}: no rows of training or validation yet")
    if not sum(map(len, finite)):
        raise InputError(f"{run.file}: no loss is finite")
    if left_out := sum(map(len, rows)) - sum(map(len, finite)):
        print(f"{run.file}: left out, as not finite: {left_out} losses", file=sys.stderr)
    return finite


def plot(runs: list[Run], output: Path, xs: tuple[str, ...] = X, log: bool = False):
    """Write the picture; raise InputError for a run without losses, or a name of no picture.

    log: x is logarithmic, without what is at 0.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    finite = [finite_rows(run) for run in runs]
    figure, panels = plt.subplots(1, len(xs), figsize=(1 + 6 * len(xs), 5), sharey=True,
                                  squeeze=False)
    if output.suffix[1:] not in (formats := figure.canvas.get_supported_filetypes()):
        raise InputError(f"--output {output}: its ending must be one of {', '.join(formats)}")
    colors = plt.get_cmap("tab10" if len(runs) <= 10 else "tab20").colors
    settled = []  # losses after the first tenth of a run, whose fall would flatten all that follows
    for i, (train, curve) in enumerate(finite):
        color = colors[i % len(colors)]
        train[:, 2] = smoothed(train[:, 2])
        end = max(rows[-1, 0] for rows in (train, curve) if len(rows))
        settled += [loss for rows in (train, curve) for tokens, _, loss in rows
                    if tokens >= end / 10]
        for x, axes in zip(xs, panels[0]):
            axes.plot(train[:, X.index(x)], train[:, 2], color=color, linewidth=0.6, alpha=0.6)
            axes.plot(curve[:, X.index(x)], curve[:, 2], color=color, linewidth=1, marker="o",
                      markersize=4, label=f"run {i}")
    margin = 0.05 * (max(settled) - min(settled)) or 0.1
    for x, axes in zip(xs, panels[0]):
        axes.set(xlabel=x if x == "tokens" else "training seconds, without compilation",
                 ylim=(min(settled) - margin, max(settled) + margin))
        if log:
            axes.set_xscale("log", nonpositive="mask")
        axes.grid(alpha=0.3)
    panels[0, 0].set_ylabel("loss: points validation, thin lines training")
    name_lines(panels[0, -1].legend(fontsize=7), labels(runs))
    figure.tight_layout()
    figure.savefig(output, dpi=120)
    plt.close(figure)


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or a metrics.jsonl")
    add("--output", type=Path, default=Path("curves.png"), help="(curves.png)")
    add("--x", choices=X, help="one panel instead of both")
    args = parser.parse_args()
    runs = [read_run(path) for path in args.runs]
    logs = [run.folder / "train.log" for run in runs]
    if words := unlike([log.read_text(errors="replace") for log in logs if log.is_file()]):
        print(f"warning: {words}")
    try:
        plot(runs, args.output, (args.x,) if args.x else X)
    except ImportError as error:
        raise InputError(f"{args.output}: {first_line(error)}") from None
    print(f"{args.output}: {len(args.runs)} runs")


if __name__ == "__main__":
    run_main(main)
