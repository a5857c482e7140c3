"""Fit how loss falls with size: against parameters, FLOPs and training seconds, by mixer.

    python experiments/ablation_studies.py sizes --data data/mine        # on a GPU
    python experiments/ablation_studies.py sizes-92M --data data/mine
    python experiments/sizes.py experiments/studies/sizes*/*-seed* --output experiments/sizes

Writes table.md, slopes.md and sizes.png, with a plot for each measure, to --output. Runs of one
mixer on as many tokens make a line, with the fit loss = a - b ln(x), by least squares, and the
standard error of b. Seeds count as runs of their own. As lines bend, slopes.md also has the slope
from each size to the next, between means over seeds, which sizes.png joins. It also says how far
each size of another mixer is from attention of as many parameters, FLOPs and seconds. Parameters
are those without embeddings, tables and head. FLOPs are flops_per_token's, times the tokens of the
run. It counts attention's products of queries and keys, no convolution.
Seconds are the tokens over the median speed of the steps, so what else the card did at times does
not count; of a run with a curriculum they are wrong. They compare on one kind of card: a line whose
runs are of several kinds has no fit to them.

Of each run it reads metrics.jsonl, and the command, the machine and the flags in train.log. It
refuses runs whose other flags differ, such as T or rates; runs of one mixer, or one mixer and size,
that are different models; runs validated on different texts; and a run that is there twice.
table.md says where their code differs.
Needs matplotlib for sizes.png.
"""
import itertools
import math
import re
import shlex
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_gpt2_afno as trainer  # noqa: E402
from data.text_to_bin import (FOLDER, InputError, Parser, owned, show,  # noqa: E402
                              validated_on)
from experiments import archive  # noqa: E402
from experiments.evaluate import markdown  # noqa: E402
from experiments.plot_runs import (FILLED_IN, commands_of, flags_said,  # noqa: E402
                                   last_loss, last_start, machines_of, median_speed, read_run,
                                   unlike)
from runtime import run, shapes_of  # noqa: E402

MEASURES = {"parameters": "parameters without embeddings", "flops": "FLOPs of training",
            "seconds": "training seconds at the median speed"}
MIXERS = ("attention", "hybrid", "states", "filters")
# Flags that make mixer, size, length of the run and place of its files
OF_MIXER = {"afno_short_conv"}  # these agree within a mixer
OF_SIZE = {"n_layer", "n_embd", "n_head", "afno_num_blocks", "attn_layers",
           "afno_state_layers", "copy_layers"}  # and these within a mixer and size
# rows and micro-batches may differ: a step's tokens are compared instead
MAY_DIFFER = {"model", "mixer", "seed", "num_iterations", "warmdown_iters",
              *trainer.SAME_RUN, *trainer.MICRO_BATCH}
DEFAULT = "the default"
COLUMNS = ("tokens", "mixer", "size", "seed", "parameters without embeddings", "FLOPs", "seconds",
           "loss", "machine")
SLOPES = "Loss that e (2.7) times as much takes away"  # of slopes.md
NEAR = 1.25  # times: so far beyond its ends a line is read off


@dataclass
class Sized:
    """A finished run: what it is, what it cost, where it came to."""

    model: str
    mixer: str
    seed: int
    tokens: int
    parameters: int
    flops: float
    seconds: float
    loss: float
    machines: tuple[str, ...]  # several where it was resumed on another
    flags: dict  # all; those of the model as it takes them
    said: list[dict[str, str]]  # flags_said
    step: str  # tokens of a step
    log: str  # train.log from last_start on


def model_of(log: str) -> tuple[trainer.GPT, dict]:
    """Return the model, as shapes_of does, and all flags, from the last command that began a run.

    The commands that went on with it may have changed its steps. Raises InputError where the log's
    own line on the model says otherwise.
    """
    commands = commands_of(log)
    begun = [place for place, (_, resumed) in enumerate(commands) if not resumed]
    models = re.findall(r"^model: \S+ ([\d,]+) parameters, mixers ([a-z ]+),", log, re.MULTILINE)
    if not begun or not models:
        raise InputError("train.log has no line with the command, or none with the model")
    flags, *later = (trainer.parse_flags(shlex.split(words)) for words, _ in commands[begun[-1]:])
    for more in later:
        flags |= {name: more[name] for name in ("num_iterations", "extend") if name in more}
    preset = trainer.PRESETS[flags["preset"]] if flags.get("preset") else {}
    values = {**trainer.DEFAULTS, **preset, **flags}
    config = trainer.GPTConfig(**trainer.model_fields(values))
    model = shapes_of(trainer.GPT, config)
    count = sum(p.numel() for p in model.parameters())
    mixers = " ".join(config.mixer_of(layer) for layer in range(config.n_layer))
    if models[-1] != (f"{count:,}", mixers):
        raise InputError("the flags of the command are not those of the model that train.log names")
    return model, values


def mixer_of(config: trainer.GPTConfig) -> str:
    """Return one of MIXERS, or for a fork's mixer the kinds of its layers, as `attn and mean`."""
    kinds = [config.mixer_of(layer) for layer in range(config.n_layer)]
    if {*kinds} - {"attn", "afno"}:
        return " and ".join(sorted({*kinds}))
    attention = [kind == "attn" for kind in kinds]
    if any(attention):
        return "attention" if all(attention) else "hybrid"
    return "states" if config.afno_state_layers or config.afno_form == "state" else "filters"


def without_embeddings(model: trainer.GPT) -> int:
    """Return the parameters but for embeddings, which the head shares, and tables of rows."""
    left_out = trainer.embedding_tables(model)
    return sum(p.numel() for p in model.parameters() if p not in left_out)


def read_sized(folder: Path) -> Sized:
    """Read a finished run; raise InputError, which names it, where it is not one."""
    if not folder.is_dir():
        raise InputError(f"{folder}: RUN must be the folder of a run")
    try:
        found = read_run(folder)
        log = last_start((folder / "train.log").read_text(encoding="utf-8"))
        (model, flags), machines = model_of(log), machines_of(log)
        if not machines:
            raise InputError("train.log has no line with the machine")
        last = next((row for row in reversed(found.rows) if "val_loss" in row), {})
        if last.get("step") != flags["num_iterations"] + flags["extend"]:
            raise InputError("not a finished run")
        tokens, loss = last_loss(found)
        seconds = tokens / median_speed(found)
    except OSError as error:
        raise InputError(f"{folder}: train.log: {error.strerror}") from None
    except ValueError as error:  # may name one of its files
        raise InputError(f"{folder}: {str(error).removeprefix(f'{folder}/')}") from None
    config, steps = model.config, re.findall(r"^steps: \d+ of (\S+) tokens", log, re.MULTILINE)
    flags |= {name: getattr(config, name) for name in OF_MIXER | OF_SIZE}
    return Sized(flags["model"], mixer_of(config), flags["seed"], tokens,
                 without_embeddings(model),
                 tokens * trainer.flops_per_token(model, config.sequence_length),
                 seconds, loss, machines, flags, flags_said(log), (steps or ["?"])[-1], log)


def show_said(run: Sized, name: str) -> str:
    """Return a flag's value in a run; where a resume changed it, all values in order."""
    return ", then ".join(dict.fromkeys(line.get(name, DEFAULT) for line in run.said))


def compared(of: Sized, there: Sized) -> Iterator[tuple[str, str, str]]:
    """Yield what must agree in two runs: its name, and its value in each."""
    same_mixer = of.mixer == there.mixer
    may_differ = MAY_DIFFER | (set() if same_mixer else OF_MIXER) \
        | (set() if same_mixer and of.model == there.model else OF_SIZE)
    for name, value in of.flags.items():
        if name not in may_differ:
            yield f"--{name}", show(value), show(there.flags[name])
    said = {name for run in (of, there) for line in run.said for name in line}
    said -= may_differ | OF_MIXER | OF_SIZE | FILLED_IN  # of the model: compared above
    for name in sorted(said) if of.said and there.said else ():
        yield f"--{name}", show_said(of, name), show_said(there, name)
    copies = lambda run: "given" if run.flags["copy_layers"] else "not given"
    yield "--copy_layers", copies(of), copies(there)
    yield "a step's number of tokens", of.step, there.step
    texts = [validated_on(run.log)[-1:] for run in (of, there)]
    if all(texts):
        yield "the validation text", *(" ".join(*text) for text in texts)


def refuse_unlike(folders: list[Path], runs: list[Sized]):
    """Raise InputError where runs do not compare, or one is there twice, perhaps as a copy."""
    for (other, there), (folder, of) in itertools.combinations(zip(folders, runs), 2):
        for what, *values in compared(of, there):
            if values[0] != values[1]:
                raise InputError(f"{folder}: does not compare with {other}: {what} is "
                                 f"{values[0]}, there {values[1]}")
        same_size = (of.mixer, of.model) == (there.mixer, there.model)
        if same_size and all(getattr(of, name) == getattr(there, name)
                             for name in ("seed", "tokens", "loss", "seconds")):
            raise InputError(f"{folder} and {other} are one run, or copies of it: both are "
                             f"{of.mixer}, {of.model}, of {of.tokens:,} tokens and seed {of.seed}, "
                             f"with the loss {of.loss} after {of.seconds} s")


def fit(x: list[float], y: list[float]) -> tuple[float, float, float]:
    """Return (a, b, standard error of b) of y = a - b ln(x); nan where points are too few.

    Least squares. The error is from the residuals, with two degrees of freedom less than points.
    """
    u, v = np.log(x), np.array(y, dtype=float)
    if len(set(x)) < 2:
        return math.nan, math.nan, math.nan
    spread = ((u - u.mean())**2).sum()
    slope = ((u - u.mean()) * (v - v.mean())).sum() / spread
    residuals = v - v.mean() - slope * (u - u.mean())
    error = math.sqrt((residuals**2).sum() / (len(u) - 2) / spread) if len(u) > 2 else math.nan
    return v.mean() - slope * u.mean(), -slope, error


def lines_of(runs: list[Sized]) -> dict[tuple[int, str], list[Sized]]:
    """Return the runs by tokens and mixer, in the order of MIXERS, each by size."""
    order = [*MIXERS, *sorted({of.mixer for of in runs} - {*MIXERS})]
    keys = sorted({(of.tokens, order.index(of.mixer)) for of in runs})
    return {(tokens, order[i]): sorted(
        (of for of in runs if (of.tokens, of.mixer) == (tokens, order[i])),
        key=lambda of: (of.parameters, of.seed)) for tokens, i in keys}


def why_not_compared(found: list[Sized], measure: str) -> str:
    """Return why a measure of the runs does not compare, in two words; empty if it does."""
    cards = {machine for of in found for machine in of.machines}
    return "several cards" if measure == "seconds" and len(cards) > 1 else ""


def why_no_fit(found: list[Sized], measure: str) -> str:
    """Return why the runs of a line are not fitted to a measure, in two words; empty if they are.
    """
    one = len({of.model for of in found}) < 2
    return "one size" if one else why_not_compared(found, measure)


def short(count: int) -> str:
    """Return a count with three digits, in billions, M or k."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 1000)):
        if count >= 0.9995 * size:  # rounds to one of it
            return f"{count / size:#.3g}".rstrip(".") + unit
    return str(count)


def labels(budgets: set[int]) -> dict[int, str]:
    """Return numbers of tokens as text such as 45.9M, or in full where two would look alike."""
    found = {tokens: short(tokens) for tokens in budgets}
    return found if len({*found.values()}) == len(found) else {n: f"{n:,}" for n in budgets}


def table(lines: dict[tuple[int, str], list[Sized]]) -> str:
    """Return the table of runs."""
    budgets = labels({tokens for tokens, _ in lines})
    rows = [[budgets[tokens], mixer, of.model, of.seed, f"{of.parameters:,}", f"{of.flops:.3g}",
             f"{of.seconds:.1f}", of.loss, ", ".join(of.machines)]
            for (tokens, mixer), found in lines.items() for of in found]
    words = unlike([of.log for found in lines.values() for of in found])
    return markdown([*COLUMNS], rows) + "\n" + (f"\n{words}\n" if words else "")


def cell(found: list[Sized], measure: str) -> str:
    """Return the slope of a line's fit to a measure with its error, or why there is none."""
    if words := why_no_fit(found, measure):
        return words
    _, slope, error = fit([getattr(of, measure) for of in found], [of.loss for of in found])
    return f"{slope:.4f}" + (f" +- {error:.4f}" if len(found) > 2 else "")


def by_size(found: list[Sized]) -> list[list[Sized]]:
    """Return the runs of a line by size, from the smallest on."""
    return [[*group] for _, group in itertools.groupby(found, lambda of: of.model)]


def mean(found: list[Sized], name: str) -> float:
    """Return the mean of a measure, or of the loss, over runs."""
    return statistics.mean(getattr(of, name) for of in found)


def between(one: list[Sized], other: list[Sized], measure: str) -> str:
    """Return the slope from the runs of a size to those of the next, between their means."""
    if words := why_no_fit(one + other, measure):
        return words
    x, y = ([mean(found, name) for found in (one, other)] for name in (measure, "loss"))
    return f"{fit(x, y)[1]:.4f}"


def read_off(line: list[Sized], measure: str, x: float) -> float:
    """Return a line's loss at x of a measure, from the means of its sizes; nan far beyond its ends.

    It is a parabola in ln(x) through the three nearest sizes. Of two it is straight, and then too
    high between them where a line bends.
    """
    means = {mean(group, measure): mean(group, "loss") for group in by_size(line)}
    if len(means) < 2 or not min(means) / NEAR <= x <= max(means) * NEAR:
        return math.nan
    near = sorted(means, key=lambda place: abs(math.log(place / x)))[:3]
    distances = [math.log(place / x) for place in near]
    return float(np.polyfit(distances, [means[place] for place in near], len(near) - 1)[-1])


def above(group: list[Sized], line: list[Sized], measure: str) -> str:
    """Return how far the loss of a size is above a line's at as much of a measure, or why not."""
    if words := why_not_compared(group + line, measure):
        return words
    difference = mean(group, "loss") - read_off(line, measure, mean(group, measure))
    return "" if math.isnan(difference) else f"{difference:+.4f}"


def less_attention(lines: dict[tuple[int, str], list[Sized]]) -> list[list[str]]:
    """Return rows: how far each size's loss is above attention's of its name, then at MEASURES."""
    rows, budgets = [], labels({tokens for tokens, _ in lines})
    for (tokens, mixer), found in lines.items():
        attention = lines.get((tokens, "attention"))
        if mixer == "attention" or not attention:
            continue
        for group in by_size(found):
            twins = [of for of in attention if of.model == group[0].model]
            same = f"{mean(group, 'loss') - mean(twins, 'loss'):+.4f}" if twins else ""
            rows.append([budgets[tokens], mixer, group[0].model, same,
                         *(above(group, attention, measure) for measure in MEASURES)])
    return rows


def slopes(lines: dict[tuple[int, str], list[Sized]]) -> str:
    """Return the tables of fits, from size to size, and at equal measures, all in nats."""
    fits, pairs, budgets = [], [], labels({tokens for tokens, _ in lines})
    for (tokens, mixer), found in lines.items():
        begin, sizes = [budgets[tokens], mixer], by_size(found)
        fits.append([*begin, ", ".join(group[0].model for group in sizes), len(found),
                     *(cell(found, measure) for measure in MEASURES)])
        pairs += [[*begin, one[0].model, other[0].model,
                   *(between(one, other, measure) for measure in MEASURES)]
                  for one, other in itertools.pairwise(sizes)]
    head = ["tokens", "mixer"]
    parts = [f"{SLOPES}, +- its standard error, which two runs do not have.",
             markdown([*head, "sizes", "runs", *MEASURES.values()], fits)]
    if pairs:
        parts += ["From a size to the next, between means over seeds. Mixers compare where their "
                  "sizes are the same.",
                  markdown([*head, "size", "next", *MEASURES.values()], pairs)]
    if differences := less_attention(lines):
        parts += ["Loss less attention's: of the same size, then of as many parameters, FLOPs and "
                  "seconds. These are read off a parabola in the logarithm through the three "
                  "nearest of attention's sizes, between means. Of two sizes it is a straight "
                  "line, which is too high between them where a line bends. A cell is empty "
                  "where attention has no such size, one size, or none within "
                  f"{NEAR} times. The differences hold the noise of all runs they are made of.",
                  markdown([*head, "size", "the same size", *MEASURES.values()], differences)]
    return "\n\n".join(parts) + "\n"


def draw(lines: dict[tuple[int, str], list[Sized]], output: Path):
    """Draw loss against each measure: points are runs, lines join means; a line style a budget."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(MEASURES), figsize=(14, 5), sharey=True,
                                  layout="constrained")
    budgets = labels({tokens for tokens, _ in lines})
    mixers = [*dict.fromkeys((*MIXERS, *(mixer for _, mixer in lines)))]
    for (measure, words), axes in zip(MEASURES.items(), panels):
        for (tokens, mixer), found in lines.items():
            x, y = [getattr(of, measure) for of in found], [of.loss for of in found]
            color, nth = f"C{mixers.index(mixer)}", sorted(budgets).index(tokens)
            if not why_no_fit(found, measure):
                axes.plot(*([mean(group, name) for group in by_size(found)]
                            for name in (measure, "loss")),
                          color=color, linewidth=1, linestyle=("-", "--", ":")[nth % 3])
            axes.plot(x, y, color=color, marker="os^"[nth % 3], linestyle="", markersize=5,
                      label=f"{mixer}, {budgets[tokens]} tokens")
        axes.set(xscale="log", xlabel=words)
        axes.tick_params(axis="x", which="both", labelsize=7)
        axes.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("validation loss")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center",
                  ncols=max(len(budgets), 4), fontsize=8)
    figure.savefig(output, dpi=100)
    plt.close(figure)


def main(argv: list[str]) -> int:
    """Write tables and plots of the runs; return the exit status."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=FOLDER, metavar="RUN", help="folders of finished runs")
    add("--output", type=FOLDER, default=ROOT / "experiments/sizes", metavar="DIR",
        help="(experiments/sizes)")
    args = parser.parse_args(argv)
    runs = [read_sized(folder) for folder in args.runs]
    refuse_unlike(args.runs, runs)
    lines = lines_of(runs)
    marks = {"table.md": f"| {' | '.join(COLUMNS)} |", "slopes.md": SLOPES, "sizes.png": ""}
    with owned(args.output, f"--output {args.output}", marks):
        for name, text in (("table.md", table(lines)), ("slopes.md", slopes(lines))):
            archive.write(args.output / name, text.encode())
            print(text)
        try:
            draw(lines, args.output / "sizes.png")
        except ImportError:
            print("no sizes.png: matplotlib is not installed")
    return 0


if __name__ == "__main__":
    run(main)
