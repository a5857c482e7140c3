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
import csv
import itertools
import shlex
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.text_to_bin import InputError, Parser, number, relative, run_main  # noqa: E402
from experiments.plot_runs import (commands_of, last_loss, last_start,  # noqa: E402
                                   machines_of, median_speed, read_run, unlike)

Flags = list[tuple[str, ...]]  # each with its values

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


def text_of(path: Path) -> str:
    """Return a file's text; raise InputError where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")  # as spreadsheets write it
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file in UTF-8") from None


def read_techniques(path: Path) -> dict[str, str]:
    """Return the flags of each technique in a file by its name.

    Raises InputError, also where a name or a flag stands twice: of two techniques with one flag, a
    run would have the last alone.
    """
    techniques, line_of = {}, {}
    for number, line in enumerate(text_of(path).splitlines(), 1):
        if not line.strip():
            continue
        where, (name, *flags) = f"{path}: line {number}", line.strip().split(maxsplit=1)
        if name.startswith("-") or not flags or not flags[0].startswith("--"):
            raise InputError(f"{where} must be a name, then flags")
        for word in (name, *(flag for flag, *_ in pairs(flags[0], where))):
            if word in line_of:
                raise InputError(f"{where}: {word} stands twice, first in line {line_of[word]}")
            line_of[word] = number
        techniques[name] = flags[0]
    if not techniques:
        raise InputError(f"{path}: there is no technique")
    return techniques


def plan(path: Path):
    """Print design.csv for the techniques in a file."""
    techniques = read_techniques(path)
    runs = design(len(techniques))
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(["run", *techniques, "flags"])
    for number, signs in enumerate(runs, 1):
        flags = " ".join(flags for sign, flags in zip(signs, techniques.values()) if sign == "+")
        out.writerow([f"r{number:02d}", *signs, flags])


def refuse_twice(where: str, words: list[str]):
    """Raise InputError where a name or a flag stands twice."""
    if twice := [word for word in words if words.count(word) > 1]:
        raise InputError(f"{where}: {twice[0]} stands twice")


def read_design(path: Path) -> tuple[dict[str, Flags], list[str], np.ndarray]:
    """Return runs with their flags, techniques, and 1 where a run (row) has one (column), else 0.
    """
    try:
        lines = csv.reader(text_of(path).splitlines(keepends=True))
        head, *rows = [row for row in lines if row] or [[]]
    except csv.Error as error:
        raise InputError(f"{path}: line {lines.line_num}: {error}") from None
    if len(head) < 3 or (head[0], head[-1]) != ("run", "flags") or not rows:
        raise InputError(f"{path}: its first line must be run, techniques, flags, as plan writes "
                         "it, and there must be runs")
    for row in rows:
        if len(row) != len(head) or not row[0] or not {*row[1:-1]} <= {"+", "-"}:
            raise InputError(f"{path}: {row[0] or 'a run without a name'} must have a + or a - for "
                             f"each of {len(head) - 2} techniques, then flags")
    techniques, flags = head[1:-1], {}
    refuse_twice(path, [row[0] for row in rows])
    refuse_twice(path, techniques)
    for run, *_, words in rows:
        flags[run] = pairs(words, f"{path}: {run}")
        refuse_twice(f"{path}: {run}", [flag for flag, *_ in flags[run]])
    return flags, techniques, np.array([[sign == "+" for sign in row[1:-1]] for row in rows], float)


def last_loss_and_time(folder: Path) -> tuple[int, float, float]:
    """Return a run's tokens, last validation loss, and logarithm of its median seconds a token.

    Raises InputError where it is not finished, or one of these is no finite number.
    """
    found = read_run(folder)
    if found.summary is None or not found.curve:
        raise InputError(f"{folder}: not a finished run")
    return *last_loss(found), -np.log(median_speed(found))


def fit(X: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return least squares' coefficients of y = X c, and their standard errors, NaN if unknown."""
    c, _, rank, _ = np.linalg.lstsq(X, y, rcond=None)
    if rank < X.shape[1]:
        raise InputError(f"{len(X)} runs do not tell {X.shape[1] - 1} techniques apart")
    left = len(X) - rank
    variance = ((y - X @ c) ** 2).sum() / left if left else np.nan
    return c, np.sqrt(variance * np.diag(np.linalg.inv(X.T @ X)))


def refuse_other_runs(folder: Path, flags: dict[str, Flags], logs: dict[str, str]):
    """Raise InputError where a run's command has not the flags of its line in design.csv.

    It may have others, but none of another run's line. flags: those lines'. logs: train.log of each
    run; one without a command counts as right.
    """
    techniques = set().union(*flags.values())
    for run, log in logs.items():
        if commands := commands_of(last_start(log)):
            found = pairs(commands[0][0], f"{folder / run / 'train.log'}")
            given = {flag[0]: flag for flag in found}.values()  # the last counts, as it did there
            if wrong := (techniques & {*given}) ^ {*flags[run]}:
                raise InputError(f"{folder / run}: its command and design.csv differ in "
                                 f"{' '.join(min(wrong))}")


def pairs(text: str, where: str) -> Flags:
    """Return the flags in a text, each with its values, as a train.log has them.

    Raises InputError, which begins with where, for a quote that does not end.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise InputError(f"{where}: {error} in {text!r}") from None
    words = [relative(part) for word in words
             for part in (word.split("=", 1) if word.startswith("--") else [word])]
    at = [i for i, word in enumerate(words) if word.startswith("--")]
    return [tuple(words[i:j]) for i, j in zip(at, [*at[1:], len(words)])]


def effects(folder: Path, slope: float):
    """Print what each technique does to loss and time in a folder of runs."""
    runs, names, has = read_design(folder / "design.csv")
    X = np.column_stack((np.ones(len(runs)), has))
    found = [last_loss_and_time(folder / run) for run in runs]
    tokens, loss, time = np.array(found).T
    if shorter := [run for run, count in zip(runs, tokens) if count != max(tokens)]:
        raise InputError(f"{folder / shorter[0]}: not finished, or shorter than other runs")
    for (run, values), (other, there) in itertools.combinations(zip(runs, found), 2):
        if values == there:
            raise InputError(f"{folder / run} and {folder / other} are one run, or copies of it: "
                             f"both have the loss {values[1]} and the same speed")
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
    parser = Parser(description=__doc__)
    parser.add_argument("command", choices=("plan", "effects"))
    parser.add_argument("path", type=Path)
    parser.add_argument("--slope", type=number(0, 1e3), default=0.175)
    args = parser.parse_args()
    plan(args.path) if args.command == "plan" else effects(args.path, args.slope)


if __name__ == "__main__":
    run_main(main)
