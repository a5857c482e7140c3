"""Tune checkpoints on other text: all weights, all but the operator, it or some rows alone.

    python experiments/ablation_studies.py transfer runs/c runs/b       # on a GPU
    python experiments/ablation_studies.py transfer runs/c runs/b --domains law --rates 0.001

A CHECKPOINT is what evaluate.py takes. It is tuned for --steps steps on each domain's text, and
judged on another part of it. The parts that are tuned:

all        all weights
rest       all but the operator; of a model without one, all but the rows
operator   AFNO's MLPs in frequency, which make the filters
rows       of attention: some rows of query and key, which decide what is mixed; as large a share
           of the weights as the operator of the first CHECKPOINT that has one, or all such rows
           where they are fewer. A hybrid has operator and rows

Each part has its own best rate of --rates. Where that is the lowest or the highest, a better one
may lie beyond.

code     the Python files of installed packages; the last tenth is judged
plays    Shakespeare's plays, training and validation shard (python data/shakespeare.py)
law      licence texts of installed packages; the last tenth is judged

Many licences are copies of each other, and some code is. So no token is judged that lies in a run
of 16 tokens which the training part holds, too. Standard errors are those of differences of losses
on the same tokens, over rows. A checkpoint whose outputs depend on later tokens is refused.

Then operators are exchanged between the models that were tuned on different domains: what is a
filter of one domain worth in another? In --output are rows.jsonl, with a line for every result, and
table.md and gains.png made from it. What stands there is not done again.
"""
import argparse
import functools
import itertools
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

if __name__ == "__main__":
    print("error: python experiments/ablation_studies.py transfer runs this", file=sys.stderr)
    sys.exit(2)

import train_gpt2_afno as trainer
from checkpoints import demand_checksums, refuse_damaged_weights
from data.loader import digest_of, to_device
from data.text_to_bin import (FOLDER, ROOT, InputError, Parser, first_line, integer, number,
                              owned, read_bin, relative)
from experiments import archive, package_text
from experiments.evaluate import (BATCH_TOKENS, Checkpoint, cut_rows, losses_of, machine, markdown,
                                  mean_and_error)
from experiments.plot_runs import name_lines
from experiments.recall import append_lines, names, read_lines, refuse_leaky
from runtime import Diverged, Runtime, choose_device, usual_runtime

JUDGED = "Losses on the part of a domain's text that was not trained on"  # in table.md
DOMAINS = {"code": "code", "plays": "plays", "law": "licences"}
PARTS = ("all", "rest", "operator", "rows")  # which weights are trained
MOST_TOKENS = 4_000_000  # of a domain's text
RUN = 16  # tokens: what stands in both parts in such a run is not judged
OPERATOR, ATTENTION = ".mixer.operator.", "c_attn.weight"  # what names of their weights hold
START = "start"  # in place of a domain: the checkpoint as it was

Masks = dict[str, Tensor | None]  # of parameters by name: which numbers, None for all of them


# -----------------------------------------------------------------------------
# which weights


def names_with(model: trainer.GPT, word: str) -> list[str]:
    """Return the names of the parameters that hold a word."""
    return [name for name, _ in model.named_parameters() if word in name]


def operator_of(model: trainer.GPT, share: float) -> Masks:
    """Return masks of the operator's weights; where a model has none, rows_of it."""
    return dict.fromkeys(names_with(model, OPERATOR)) or rows_of(model, share)


def rows_of(model: trainer.GPT, share: float) -> Masks:
    """Return masks of rows of query and key, `share` of all weights, or all where they are fewer.

    They are the same in query and key, and evenly spread over the heads' channels.
    """
    C, projections = model.config.n_embd, names_with(model, ATTENTION)
    total = sum(p.numel() for p in model.parameters())
    rows = max(1, round(share * total / (2 * C * len(projections))))
    chosen = torch.linspace(0, C - 1, min(rows, C)).long()
    mask = torch.zeros(3 * C, 1, dtype=torch.bool)
    mask[torch.cat((chosen, C + chosen))] = True
    return dict.fromkeys(projections, mask)


def part_of(model: trainer.GPT, part: str, share: float) -> Masks:
    """Return masks of the weights of one of PARTS; rows are `share` of all weights."""
    named = dict(model.named_parameters())
    if part == "all":
        return dict.fromkeys(named)
    if part == "rows":
        return rows_of(model, share)
    operator = operator_of(model, share)
    if part == "operator":
        return operator
    return {name: None if name not in operator else ~operator[name] for name in named
            if name not in operator or operator[name] is not None}


def parts_of(model: trainer.GPT) -> tuple[str, ...]:
    """Return the parts that a model has, in the order of PARTS."""
    needed = {"operator": OPERATOR, "rows": ATTENTION}
    return tuple(part for part in PARTS if part not in needed or names_with(model, needed[part]))


def count(model: trainer.GPT, masks: Masks) -> int:
    """Return how many numbers the masks choose."""
    named = dict(model.named_parameters())
    return sum(named[name].numel() if mask is None else mask.expand(named[name].shape).sum().item()
               for name, mask in masks.items())


def share_of_operators(checkpoints: list[Checkpoint]) -> float:
    """Return the operator's share of the weights, of the first checkpoint that has one.

    Raise InputError where none has.
    """
    for checkpoint in checkpoints:
        model = checkpoint.shapes
        if names_with(model, OPERATOR):
            return count(model, operator_of(model, 0)) / count(model, part_of(model, "all", 0))
    raise InputError("CHECKPOINT: one must have AFNO layers; attention's share follows from it")


@torch.no_grad()
def exchange(model: trainer.GPT, masks: Masks, state: dict[str, Tensor]):
    """Set the numbers that the masks choose to those of another model's state."""
    for name, mask in masks.items():
        p = model.get_parameter(name)
        other = state[name].to(p)
        p.copy_(other if mask is None else torch.where(mask.to(p.device), other, p))


# -----------------------------------------------------------------------------
# one result


def runs_of(tokens: np.ndarray) -> np.ndarray:
    """Return a number for each run of RUN tokens, (N - RUN + 1,): equal runs have equal ones."""
    weights = np.uint64(0x9E3779B97F4A7C15)**np.arange(RUN, dtype=np.uint64)  # modulo 2^64
    return np.lib.stride_tricks.sliding_window_view(tokens.astype(np.uint64), RUN) @ weights


def stands_in(tokens: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return which tokens, (N,), lie in a run of RUN tokens that `other` holds, too."""
    if min(len(tokens), len(other)) < RUN:
        return np.zeros(len(tokens), bool)
    begins = np.isin(runs_of(tokens), runs_of(other)).astype(int)
    return np.convolve(begins, np.ones(RUN, int)) > 0


@functools.cache
def text_of(domain: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a domain's tokens for training, those for judging, and which targets count.

    The targets are the tokens for judging but the first one. Raise InputError where there are none.
    """
    tokens = package_text.tokens_of(DOMAINS[domain], MOST_TOKENS, f"--domains {domain}")
    if domain == "plays":
        train = read_bin(package_text.PLAYS.with_name("train_000000.bin")).astype(np.int64)
        judged = tokens
    else:
        train, judged = np.split(tokens, [len(tokens) * 9 // 10])
    return train, judged, ~stands_in(judged, train)[1:]


def judge(model: trainer.GPT, domain: str, runtime: Runtime) -> np.ndarray:
    """Return the losses of all targets of a domain that count."""
    _, tokens, counts = text_of(domain)
    T = model.config.sequence_length
    losses = losses_of(model, tokens, cut_rows(len(tokens) - 1, T), T, runtime,
                       BATCH_TOKENS[runtime.device.type])
    return losses[counts]


def above(losses: np.ndarray, others: np.ndarray, domain: str, T: int) -> dict:
    """Return the mean loss, and its difference from other losses with its standard error."""
    counts = text_of(domain)[2]
    difference, error = mean_and_error(losses - others, np.flatnonzero(counts) // T)
    return dict(loss=float(losses.mean(dtype=np.float64)), difference=float(difference),
                error=error)


def tune(model: trainer.GPT, masks: Masks, domain: str, rate: float, args, runtime: Runtime):
    """Train the chosen weights on random rows of a domain's text.

    Raise InputError where the text is shorter than a row, Diverged where the loss is not finite.
    """
    tokens, T = torch.from_numpy(text_of(domain)[0]), model.config.sequence_length
    if len(tokens) <= T:
        raise InputError(f"--domains {domain}: {len(tokens)} tokens here, a row has {T}")
    chosen = []
    for name, p in model.named_parameters():
        p.requires_grad_(name in masks)
        if name in masks:
            chosen.append(p)
            if masks[name] is not None:  # AdamW without decay leaves what has no gradient
                p.register_hook(functools.partial(torch.mul, masks[name].to(p.device)))
    optimizer = torch.optim.AdamW(chosen, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(args.seed)
    for step in range(args.steps):
        start = torch.randint(len(tokens) - T, (args.batch_size, 1), generator=generator)
        rows = tokens[start + torch.arange(T + 1)]
        idx, targets = (to_device(part, runtime.device) for part in (rows[:, :-1], rows[:, 1:]))
        with runtime.autocast():
            loss = model(idx, targets, return_logits=False)[1]
        loss.backward()
        factor = trainer.learning_rate_factor(step, args.steps, args.steps // 10, args.steps // 2)
        optimizer.param_groups[0]["lr"] = rate * factor
        optimizer.step()
        optimizer.zero_grad()
    if not math.isfinite(loss.item()):
        raise Diverged(f"{domain}, rate {rate}: the loss is {loss.item()}")


def is_whole(row: dict) -> bool:
    """Return whether a row has all that the study takes of it.

    An error is nan where a single row of text was judged.
    """
    domain, part, operator_of = (row.get(name) for name in ("domain", "part", "operator_of"))
    size = number(0, 1e18).accepts
    error = lambda value: size(value) or type(value) is float and math.isnan(value)
    if (part, operator_of) == ("none", START):
        needed = {}
    elif part in PARTS and operator_of == domain:
        needed = dict(error=error, trained=number(0, 1).accepts)
        if part == "rest" and "less_all" in row:  # there since 2026-11-30
            needed |= dict(less_all=number(-1e18, 1e18).accepts, less_all_error=error)
    elif part == "all" and operator_of in (*DOMAINS, START):
        needed = dict(error=error, difference=number(-1e18, 1e18).accepts)
    else:
        return False
    needed |= dict(label=lambda value: isinstance(value, str), domain=[*DOMAINS].__contains__,
                   rate=size, loss=size)
    return row.keys() >= {"setting", "made_of"} and all(
        accepts(row.get(name)) for name, accepts in needed.items())


class Study:
    """Hold what is asked and what is found; every result is a line of rows.jsonl."""

    def __init__(self, args, runtime: Runtime):
        self.args, self.runtime, self.folder = args, runtime, args.output
        self.checkpoints = {checkpoint.label: checkpoint for checkpoint in
                            map(Checkpoint, args.checkpoints)}
        if len(self.checkpoints) < len(args.checkpoints):
            raise InputError("CHECKPOINT: two are called alike, after folder and step")
        self.texts = {}  # of each domain's a digest, and how many targets count
        for domain in args.domains:
            train, judged, counts = text_of(domain)
            if not counts.any():
                raise InputError(f"--domains {domain}: no token is left to judge, all of "
                                 f"{len(counts):,} stand in the training part, too")
            tokens = np.concatenate((train, judged))
            self.texts[domain] = [digest_of([tokens]), int(counts.sum())]
            for label, checkpoint in self.checkpoints.items():
                if tokens.max() >= checkpoint.config.vocab_size:
                    raise InputError(f"{label}: a vocabulary of {checkpoint.config.vocab_size}, "
                                     f"the text of --domains {domain} has GPT-2's tokens")
        self.checked = set()  # labels of checkpoints that do not leak
        self.share = share_of_operators([*self.checkpoints.values()])
        self.setting = dict(steps=args.steps, batch_size=args.batch_size, seed=args.seed)
        self.path = self.folder / "rows.jsonl"
        self.rows = {self.key(row): row for row in read_lines(self.path, is_whole)}
        if others := [row for row in self.rows.values() if row["setting"] != self.setting]:
            raise InputError(f"{self.path} holds results with {others[0]['setting']}, now "
                             f"{self.setting}; delete it, or choose another --output")

    @staticmethod
    def key(row: dict) -> tuple:
        return tuple(row[name] for name in ("label", "domain", "part", "rate", "operator_of"))

    def find(self, label: str, domain: str, part: str, rate: float, operator_of: str, make,
             other_rate: float | None = None):
        """Return a result that stands, or make it: make() returns its numbers.

        It stands where file, share of the operator, texts, machine and other_rate are as they were:
        the rate of the other model that it is compared with, or has the operator of. Raise
        Diverged where new numbers are not finite.
        """
        row = dict(label=label, domain=domain, part=part, rate=rate, operator_of=operator_of)
        made_of = [*self.checkpoints[label].key(), self.share, self.texts[domain],
                   self.texts.get(operator_of), other_rate, machine(self.runtime)]
        there = self.rows.get(self.key(row), {})
        if there.get("made_of") != made_of or part == "rest" and "less_all" not in there:
            append_lines(self.path)  # it can be written: said before minutes of work
            begin = time.perf_counter()
            row |= dict(setting=self.setting, made_of=made_of, **make())
            if not math.isfinite(row["loss"]):
                raise Diverged(f"{label}, {domain}, {part}, rate {rate}: the loss is {row['loss']}")
            self.rows[self.key(row)] = row
            append_lines(self.path, row)
            print(f"{label}, {domain}, {part}, rate {rate}, operator of {operator_of}: "
                  f"{row['loss']:.4f}, {time.perf_counter() - begin:.0f} s", flush=True)
        return self.rows[self.key(row)]

    def parts(self, label: str) -> tuple[str, ...]:
        """Return the parts that are tuned of a checkpoint."""
        return parts_of(self.checkpoints[label].shapes)

    def shown(self) -> tuple[str, ...]:
        """Return the parts that any checkpoint has, in the order of the tables."""
        there = {part for label in self.checkpoints for part in self.parts(label)}
        return tuple(part for part in PARTS if part in there)

    def model(self, label: str) -> trainer.GPT:
        """Return a checkpoint's model; the first time, raise InputError where it leaks."""
        model = self.checkpoints[label].model(self.runtime)
        if label not in self.checked:
            refuse_leaky(label, model, [model.config.sequence_length], self.runtime)
            self.checked.add(label)
        return model

    def weights(self, label: str, domain: str, rate: float) -> Path:
        return self.folder / f"{label}-{domain}-{rate}.pt"

    @functools.cache
    def judged(self, label: str, domain: str, rate: float | None = None) -> np.ndarray:
        """Return the losses of the checkpoint as it is, or tuned with all weights at a rate."""
        model = self.model(label)
        if rate is not None:
            model.load_state_dict(self.read(label, domain, rate))
        return judge(model, domain, self.runtime)

    def before(self, label: str, domain: str) -> float:
        """Return the mean loss of the checkpoint as it is."""
        make = lambda: dict(loss=float(self.judged(label, domain).mean(dtype=np.float64)))
        return self.find(label, domain, "none", 0.0, START, make)["loss"]

    def tuned(self, label: str, domain: str, part: str, rate: float) -> dict:
        """Return the result of tuning a part; weights of `all` are kept for exchanges.

        Its error is that of the difference from the checkpoint as it is. Of `rest` the difference
        from the best of `all` is there, too, with its error.
        """
        all_rate = self.best(label, domain, "all")["rate"] if part == "rest" else None

        def make() -> dict:
            model = self.model(label)
            masks = part_of(model, part, self.share)
            tune(model, masks, domain, rate, self.args, self.runtime)
            if part == "all":
                path = self.weights(label, domain, rate)
                torch.save(model.state_dict(), path.with_suffix(".part"))
                os.replace(path.with_suffix(".part"), path)
            total, T = sum(p.numel() for p in model.parameters()), model.config.sequence_length
            losses = judge(model, domain, self.runtime)
            found = above(losses, self.judged(label, domain), domain, T)
            if part == "rest":
                less = above(losses, self.judged(label, domain, all_rate), domain, T)
                found |= dict(less_all=less["difference"], less_all_error=less["error"])
            return found | dict(trained=count(model, masks) / total)

        return self.find(label, domain, part, rate, domain, make, all_rate)

    def best(self, label: str, domain: str, part: str) -> dict:
        """Return the best result of a part over the rates; delete the weights of the others."""
        best = min((self.tuned(label, domain, part, rate) for rate in self.args.rates),
                   key=lambda row: row["loss"])
        for rate in {*self.args.rates} - {best["rate"]} if part == "all" else ():
            self.weights(label, domain, rate).unlink(missing_ok=True)
        return best

    def exchanged(self, label: str, domain: str, other: str) -> dict:
        """Return the result of a tuned model with another operator, and its loss above its own.

        other: the domain whose tuned model has that operator, or START.
        """
        rate = self.best(label, domain, "all")["rate"]
        other_rate = None if other == START else self.best(label, other, "all")["rate"]

        def make() -> dict:
            model = self.model(label)
            start = {name: p.detach().clone() for name, p in model.state_dict().items()}
            model.load_state_dict(self.read(label, domain, rate))
            state = start if other == START else self.read(label, other, other_rate)
            exchange(model, operator_of(model, self.share), state)
            return above(judge(model, domain, self.runtime), self.judged(label, domain, rate),
                         domain, model.config.sequence_length)

        return self.find(label, domain, "all", rate, other, make, other_rate)

    def read(self, label: str, domain: str, rate: float) -> dict[str, Tensor]:
        """Return weights that `tuned` has kept; where they are gone or damaged, tune again."""
        path = self.weights(label, domain, rate)
        try:
            demand_checksums(path)
            weights = torch.load(path, map_location=self.runtime.device, weights_only=True)
            refuse_damaged_weights(weights, self.checkpoints[label].shapes)
            return weights
        except Exception as error:  # a damaged archive fails in many ways
            print(f"{path.name}: {first_line(error)}: tuned again")
        del self.rows[label, domain, "all", rate, domain]
        self.tuned(label, domain, "all", rate)
        return torch.load(path, map_location=self.runtime.device, weights_only=True)


# -----------------------------------------------------------------------------
# the tables and the plot


def tables(study: Study) -> str:
    """Return all tables as Markdown; make what is missing."""
    args, gains, worth, shown = study.args, [], [], study.shown()
    for label, domain in itertools.product(study.checkpoints, args.domains):
        before = study.before(label, domain)
        gains.append([label, domain, before])
        for part in shown:
            row = study.best(label, domain, part) if part in study.parts(label) else {}
            gains[-1] += [f"{row['trained']:.2%}", row["loss"], row["error"],
                          f"{row['rate']:g}"] if row else [""] * 4
            gains[-1] += [row["less_all"], row["less_all_error"]] if part == "rest" else []
    for label, domain in itertools.product(study.checkpoints, args.domains):
        own = study.best(label, domain, "all")["loss"]
        worth.append([label, domain, own])
        for other in (*args.domains, START):
            row = {} if other == domain else study.exchanged(label, domain, other)
            worth[-1] += [row.get("difference", ""), row.get("error", "")]
    parts = [column for part in shown for column in (
        f"{part}: weights", "loss", "+-", "rate", *["less all", "+-"] * (part == "rest"))]
    judged = ", ".join(f"{counts.sum():,} of {len(counts):,} targets of {domain}" for domain in
                       args.domains for counts in text_of(domain)[2:])
    return "\n\n".join((
        "# transfer",
        f"{JUDGED}: {judged}. The others "
        f"stand in a run of {RUN} tokens in the training part, too. {args.steps} steps of "
        f"{args.batch_size} rows, seed {args.seed}; of each part the best of the rates "
        f"{', '.join(map(str, args.rates))} by these losses. Of a model without operator, rest is "
        "all but the rows. +- is a standard error, over rows: in the first table "
        "of the loss less that before, and of the loss of rest less that of all. Made by "
        "experiments/ablation_studies.py transfer.",
        f"Machine: {machine(study.runtime)}.",
        markdown(["checkpoint", "domain", "before", *parts], gains),
        "Models tuned with all weights, with the operator (where there is none, the rows) of "
        "another domain's model in place of their own: the loss above their own, and the standard "
        "error of that.",
        markdown(["model", "tuned on", "own loss",
                  *(column for other in (*args.domains, START)
                    for column in (f"operator of {other}", "+-"))], worth)))


def plot(study: Study, output: Path):
    """Draw what tuning each part gains with its standard error, a panel for a domain."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    domains, labels, shown = study.args.domains, [*study.checkpoints], study.shown()
    figure, panels = plt.subplots(1, len(domains), figsize=(1 + 4 * len(domains), 4), sharey=True,
                                  squeeze=False)
    for domain, axes in zip(domains, panels[0]):
        for i, label in enumerate(labels):
            best = [study.best(label, domain, part) if part in study.parts(label)
                    else dict(loss=math.nan, error=math.nan) for part in shown]
            axes.bar(np.arange(len(shown)) + 0.8 * i / len(labels),
                     [study.before(label, domain) - row["loss"] for row in best],
                     0.8 / len(labels), yerr=[row["error"] for row in best], capsize=2,
                     label=f"checkpoint {i}")
        axes.set_xticks(np.arange(len(shown)) + 0.4 - 0.4 / len(labels), shown)
        axes.set_title(domain)
    panels[0, 0].set_ylabel("loss before less loss after")
    name_lines(panels[0, -1].legend(fontsize=7), labels)
    figure.tight_layout()
    figure.savefig(output, dpi=120)
    plt.close(figure)


# -----------------------------------------------------------------------------
# command line


def rates(text: str) -> list[float]:
    """Return the learning rates of "0.001,0.003", sorted."""
    return sorted({trainer.FLAGS["learning_rate"].kind(part) for part in text.split(",")})


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the arguments; raise InputError where they are wrong."""
    parser = Parser(prog="ablation_studies.py transfer", description=__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CHECKPOINT")
    add("--domains", type=names(DOMAINS), default=[*DOMAINS], help="(all)")
    add("--rates", type=rates, default="0.0003,0.001,0.003", metavar="X,X", help="(%(default)s)")
    add("--steps", type=integer(1), default=200, help="(200)")
    add("--batch_size", type=trainer.FLAGS["batch_size"].kind, default=16, help="rows (16)")
    add("--seed", type=trainer.FLAGS["seed"].kind, default=1337, help="of the rows (1337)")
    add("--device", type=trainer.FLAGS["device"].kind, default="auto", help="(auto)")
    add("--output", type=FOLDER, default=ROOT / "runs/transfer", metavar="DIR",
        help="(runs/transfer); weights that are exchanged are kept there, too")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Do what is missing and print the tables; return the exit status."""
    args = parse(argv)
    device = choose_device(args.device)
    runtime = usual_runtime(device)
    with owned(args.output, f"--output {args.output}", {"table.md": JUDGED, "gains.png": ""}):
        study = Study(args, runtime)
        page = tables(study)
        archive.write(study.folder / "table.md", f"{page}\n".encode())
        try:
            plot(study, study.folder / "gains.png")
        except ImportError:
            print("no gains.png: matplotlib is not installed")
    print(f"{page}\n\n{relative(str(study.folder.resolve()))}: {len(study.rows)} results")
    return 0
