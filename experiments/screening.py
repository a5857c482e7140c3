"""Screen many techniques in few runs: a Plackett-Burman design, and what each technique does.

    python experiments/screening.py plan techniques.txt > runs/screen/design.csv
    python experiments/screening.py effects runs/screen

techniques.txt has one line for each technique: its name, then its flags. plan writes one line for
each run: its name, a + or - for each technique, and the flags of those with a +. Half of the runs
have a technique, half have not, and any two techniques meet in all four ways equally often: so
every run counts for every technique (Plackett & Burman, 1946). The first run has all.

effects reads design.csv and the folders of the runs beside it, of which some may be more than
planned, such as one without any technique. It fits by least squares the last validation loss, and
the logarithm of the seconds a token: a constant and one number for each technique, no interactions.
net is loss + --slope times time; the slope is in nats for e times the tokens. +- is one standard
error, where there are more runs than numbers.
"""
import argparse
import csv
import shlex
import sys
from pathlib import Path
from statistics import median

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.text_to_bin import InputError, Parser, number, relative, run_main  # noqa: E402
from experiments.plot_runs import (commands_of, last_start, machines_of,  # noqa: E402
                                   read_run, unlike)

# for so many runs: the second row of the design; the others are its shifts
SECOND = {12: "++-+++---+-", 24: "+++++-+-++--++--+-+----"}


def design(techniques: int) -> list[str]:
    """Return the signs of every run, one for each technique; raise InputError for too many."""
    size = next((size for size in SECOND if techniques < size), None)
    if size is None:
        raise InputError(f"at most {max(SECOND) - 1} techniques, got {techniques}")
    minus = SECOND[size].translate(str.maketrans("+-", "-+"))  # so that one run has all
    rows = ["+" * (size - 1)] + [minus[-i:] + minus[:-i] for i in range(size - 1)]
    return [row[:techniques] for row in rows]


def plan(path: Path):
    """Print design.csv for the techniques in a file."""
    lines = [line.split(maxsplit=1) for line in path.read_text().splitlines() if line.strip()]
    if not lines or any(len(line) < 2 for line in lines):
        raise InputError(f"{path}: " + ("each line must be a name, then flags" if lines
                                        else "there is no technique"))
    refuse_twice(path, [name for name, _ in lines])
    runs = design(len(lines))
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(["run", *(name for name, _ in lines), "flags"])
    for number, signs in enumerate(runs, 1):
        flags = " ".join(flags for sign, (_, flags) in zip(signs, lines) if sign == "+")
        out.writerow([f"r{number:02d}", *signs, flags])


def refuse_twice(path: Path, names: list[str]):
    """Raise InputError where a name stands twice."""
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"{path}: the name {twice[0]} stands twice")


def read_design(path: Path) -> tuple[dict[str, str], list[str], np.ndarray]:
    """Return runs with their flags, techniques, and 1 where a run (row) has one (column), else 0.
    """
    with open(path, newline="", encoding="utf-8-sig") as file:  # as spreadsheets write it
        head, *rows = [row for row in csv.reader(file) if row] or [[]]
    if len(head) < 3 or (head[0], head[-1]) != ("run", "flags") or not rows:
        raise InputError(f"{path}: its first line must be run, techniques, flags, as plan writes "
                         "it, and there must be runs")
    for row in rows:
        if len(row) != len(head) or not row[0] or not {*row[1:-1]} <= {"+", "-"}:
            raise InputError(f"{path}: {row[0] or 'a run without a name'} must have a + or a - for "
                             f"each of {len(head) - 2} techniques, then flags")
    names, techniques = [row[0] for row in rows], head[1:-1]
    refuse_twice(path, names)
    refuse_twice(path, techniques)
    flags = {row[0]: row[-1] for row in rows}
    return flags, techniques, np.array([[sign == "+" for sign in row[1:-1]] for row in rows], float)


def last_loss_and_time(folder: Path) -> tuple[int, float, float]:
    """Return a run's tokens, last validation loss, and logarithm of its median seconds a token.

    Raises InputError where it is not finished.
    """
    found = read_run(folder)
    speeds = [row["tokens_per_s"] for row in found.rows if "train_loss" in row]
    if found.summary is None or not found.curve or not speeds:
        raise InputError(f"{folder}: not a finished run")
    tokens, _, loss = found.curve[-1]
    if not np.isfinite(loss):
        raise InputError(f"{folder}: its loss is {loss}")
    return tokens, loss, -np.log(median(speeds))


def fit(X: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return least squares' coefficients of y = X c, and their standard errors, NaN if unknown."""
    c, _, rank, _ = np.linalg.lstsq(X, y, rcond=None)
    if rank < X.shape[1]:
        raise InputError(f"{len(X)} runs do not tell {X.shape[1] - 1} techniques apart")
    left = len(X) - rank
    variance = ((y - X @ c) ** 2).sum() / left if left else np.nan
    return c, np.sqrt(variance * np.diag(np.linalg.inv(X.T @ X)))


def refuse_other_runs(folder: Path, flags: dict[str, str], logs: dict[str, str]):
    """Raise InputError where a run's command has not the flags of its line in design.csv.

    It may have others, but none of another run's line. flags: those lines'. logs: train.log of each
    run; one without a command counts as right.
    """
    planned = {run: pairs(shlex.split(words)) for run, words in flags.items()}
    techniques = set().union(*planned.values())
    for run, log in logs.items():
        given = [pairs(shlex.split(words)) for words, _ in commands_of(last_start(log))]
        if given and (wrong := (given[0] & techniques) ^ planned[run]):
            raise InputError(f"{folder / run}: its command and design.csv differ in "
                             f"{' '.join(min(wrong))}")


def pairs(words: list[str]) -> set[tuple[str, ...]]:
    """Return the flags of a command, each with its values, as a train.log has them."""
    words = [relative(part) for word in words
             for part in (word.split("=", 1) if word.startswith("--") else [word])]
    at = [i for i, word in enumerate(words) if word.startswith("--")]
    return {tuple(words[i:j]) for i, j in zip(at, [*at[1:], len(words)])}


def effects(folder: Path, slope: float):
    """Print what each technique does to loss and time in a folder of runs."""
    runs, names, has = read_design(folder / "design.csv")
    X = np.column_stack((np.ones(len(runs)), has))
    tokens, loss, time = np.array([last_loss_and_time(folder / run) for run in runs]).T
    if shorter := [run for run, count in zip(runs, tokens) if count != max(tokens)]:
        raise InputError(f"{folder / shorter[0]}: not finished, or shorter than other runs")
    paths = [folder / run / "train.log" for run in runs]
    logs = [path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
            for path in paths]
    refuse_other_runs(folder, runs, dict(zip(runs, logs)))
    (effect, error), (seconds, _) = fit(X, loss), fit(X, time)
    print(f"{'technique':<12} {'loss':>8} {'+-':>7} {'time':>6} {'net':>8}")
    for name, e, error, t in zip(names, effect[1:], error[1:], seconds[1:]):
        print(f"{name:<12} {e:+8.4f} {error:7.4f} {100 * t:+5.1f}% {e + slope * t:+8.4f}")
    print(f"errors are of the loss, from {len(X)} runs for {X.shape[1]} numbers")
    if words := unlike(logs):
        print(f"warning: {words}")
    machines = {machine for log in logs for machine in machines_of(log)}
    if len(machines) > 1:
        print(f"warning: times are of several machines: {'; '.join(sorted(machines))}")


def main():
    """Run one of the two commands."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("plan", "effects"))
    parser.add_argument("path", type=Path)
    parser.add_argument("--slope", type=number(0, 1e3), default=0.175)
    args = parser.parse_args()
    try:
        plan(args.path) if args.command == "plan" else effects(args.path, args.slope)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise InputError(f"{args.path}: {error}") from None


if __name__ == "__main__":
    run_main(main)
