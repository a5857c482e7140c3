"""Evaluate an exported model with EleutherAI's lm-evaluation-harness.

    pip install lm-eval safetensors
    python report.py runs/mine --export exported
    python experiments/harness.py exported --tasks lambada_openai,hellaswag   # needs a network
    python experiments/harness.py exported --tasks my_task --include FOLDER   # its yaml is there

LAMBADA asks for the last word of a passage. HellaSwag's four endings are near chance, 25%, for
models of this size.

A text is GPT-2's tokens after token 50256, with which documents begin in training. The model sees
at most as many tokens as a row had in training, the last ones. Generation takes the likeliest
token; with learned positions the context is cut so that the new tokens fit into a row, too. An
empty continuation is scored as the document's end; the harness's own models stop at one. A model
whose outputs depend on later tokens is refused: it would read its answers.

The file of --output says which model and tasks its results are of. The same command replaces it.
"""
import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt2_afno as trainer  # noqa: E402
from checkpoints import demand_like  # noqa: E402
from data.loader import to_device  # noqa: E402
from data.text_to_bin import (FOLDER, InputError, Parser, first_line,  # noqa: E402
                              gpt2_encoding, integer, to_path)
from experiments.plot_runs import refuse_no_file  # noqa: E402
from experiments.recall import refuse_leaky  # noqa: E402
from runtime import (Runtime, choose_device, ran_out, run, source_digest,  # noqa: E402
                     usual_runtime)

try:
    from lm_eval.api.model import LM
except ImportError:  # main says so
    LM = object

RESULTS = {"results", "versions", "n-samples"}  # of the harness's, kept in --output
MOST_NEW = 256  # tokens that are generated where a task names no number


def load_exported(folder: Path) -> trainer.GPT:
    """Return the model that `report.py --export` has written; raise InputError where it cannot."""
    from safetensors.torch import load_file, load_model

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model = trainer.GPT(trainer.GPTConfig(**config["model"]))
        path = str(folder / "model.safetensors")
        load_model(model, path)  # refuses other names and shapes
        found, wanted = load_file(path), model.state_dict()
        demand_like(found, {name: wanted[name] for name in found}, "model")
    except Exception as error:  # safetensors has its own
        raise InputError(f"{folder}: not a folder of report.py --export "
                         f"({first_line(error)})") from None
    return model.eval()


class Adapter(LM):
    """Answer the harness's requests; each has `args`, the harness's own tuple."""

    def __init__(self, model: trainer.GPT, runtime: Runtime, batch_size: int):
        super().__init__()
        self.model, self.runtime, self.batch = model.to(runtime.device), runtime, batch_size
        self.encoding, self.T = gpt2_encoding(), model.config.sequence_length
        if self.encoding.n_vocab > model.config.vocab_size:
            raise InputError(f"the model's {model.config.vocab_size} tokens are not GPT-2's")

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a document that begins so."""
        return [self.encoding.eot_token, *self.encoding.encode_ordinary(text)]

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return for (context, continuation) its log-probability and whether it is the likeliest.

        Spaces that end the context belong to the continuation, as GPT-2's tokens begin with them.
        At least one token is scored: where the continuation has merged into the context's last
        token, that one. An empty continuation is the document's end.
        """
        pairs = []
        for context, continuation in (request.args for request in requests):
            whole, before = self.encode(context + continuation), self.encode(context.rstrip())
            if not continuation:
                whole.append(self.encoding.eot_token)
            cut = min(len(before), len(whole) - 1)
            pairs.append((whole[:cut], whole[cut:]))
        return self.score(pairs)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Return each text's log-probability; one longer than a row is cut into windows."""
        sums = []
        for (text,) in (request.args for request in requests):
            scores = self.score(windows(self.encode(text), self.T))
            sums.append(sum(value for value, _ in scores))
        return sums

    @torch.no_grad()
    def score(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Return for tokens (before, after) log p(after | before) and whether it is greedy.

        Pairs of similar length make a batch, padded on the right: no output sees what follows it.
        """
        if too_long := [len(after) for _, after in pairs if len(after) > self.T]:
            raise InputError(f"a continuation has {too_long[0]} tokens, the model's rows {self.T}")
        found = [None] * len(pairs)
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
        for first in range(0, len(order), self.batch):
            chosen = order[first : first + self.batch]
            rows = [sum(pairs[i], [])[-self.T - 1 :] for i in chosen]
            width = len(rows[0]) - 1  # the first is the longest
            inputs = torch.tensor([row[:-1] + [0] * (width + 1 - len(row)) for row in rows])
            with self.runtime.autocast():
                hidden = self.model.hidden(to_device(inputs, self.runtime.device))
                for i, row, states in zip(chosen, rows, hidden):
                    count = len(pairs[i][1])
                    ends = states[len(row) - 1 - count : len(row) - 1]
                    logits = self.model.lm_head.logits(ends).float().cpu()
                    after = torch.tensor(pairs[i][1])
                    found[i] = (-F.cross_entropy(logits, after, reduction="sum").item(),
                                bool((logits.argmax(-1) == after).all()))
        return found

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Return the likeliest continuation of each context, up to one of its stops."""
        texts = []
        for context, options in (request.args for request in requests):
            if options.get("do_sample") and options.get("temperature", 1):
                raise InputError("the harness asks for sampling; this takes the likeliest token")
            stops = options.get("until", [])
            texts.append(self.generate(context, [stops] if isinstance(stops, str) else stops,
                                       options.get("max_gen_toks", MOST_NEW)))
        return texts

    def generate(self, context: str, stops: list[str], count: int) -> str:
        """Return at most `count` tokens as text, up to a stop or the document's end."""
        learned = self.model.config.position == "learned"
        if learned and count >= self.T:
            raise InputError(f"a task wants {count} new tokens (max_gen_toks): with learned "
                             f"positions they must be fewer than those of a row, {self.T}")
        state, new = None, []
        with self.runtime.autocast():
            for token in self.encode(context)[-(self.T - count * learned) :]:
                hidden, state = self.step(token, state)
            while len(new) < count:
                token = int(self.model.lm_head.logits(hidden[0]).argmax())
                if token == self.encoding.eot_token:
                    break
                new.append(token)
                text = self.encoding.decode(new)
                if found := [text.index(stop) for stop in stops if stop and stop in text]:
                    return text[: min(found)]
                hidden, state = self.step(token, state)
        return self.encoding.decode(new)

    def step(self, token: int, state: tuple | None) -> tuple[torch.Tensor, tuple]:
        return self.model.step(torch.tensor([token], device=self.runtime.device), state, self.T)


def windows(tokens: list[int], T: int) -> list[tuple[list[int], list[int]]]:
    """Return (before, after) so that each token but the first is once in `after`.

    A window has T inputs; the last one reaches back so far that it is as long as the others.
    """
    count = len(tokens) - 1
    pairs = []
    for begin in range(0, count, T):
        end = min(begin + T, count)
        pairs.append((tokens[max(0, end - T) : begin + 1], tokens[begin + 1 : end + 1]))
    return pairs


# -----------------------------------------------------------------------------
# command line


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the arguments, --tasks as a list; raise InputError where they are wrong."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("model", type=to_path, metavar="DIR", help="folder of report.py --export")
    add("--tasks", required=True, metavar="NAME,NAME", help="the harness's names")
    add("--include", type=FOLDER, metavar="FOLDER", help="of yaml files of your own tasks")
    add("--shots", type=integer(0, 100), help="examples before each question (the task's)")
    add("--limit", type=integer(1), help="questions a task (all)")
    add("--batch_size", type=trainer.FLAGS["batch_size"].kind, default=32, help="(32)")
    add("--device", type=trainer.FLAGS["device"].kind, default="auto", help="(auto)")
    add("--output", type=Path, metavar="FILE", help="for the results as JSON")
    args = parser.parse_args(argv)
    names = [name.strip() for name in args.tasks.split(",")]
    if not all(names):
        raise InputError(f"--tasks must be names with commas between them, got '{args.tasks}'")
    if args.include is not None and not args.include.is_dir():
        raise InputError(f"--include {args.include}: no such folder")
    args.tasks = names
    return args


def refuse_unwritable(path: Path):
    """Raise InputError where no file can be written there, or one of something else is there."""
    refuse_no_file(path)
    new = not path.exists()
    try:
        if not new and not is_results(path.read_text(encoding="utf-8", errors="replace")):
            raise InputError(f"--output {path}: is there, and not of this script: name another")
        path.open("a").close()
        if new:
            path.unlink()
    except OSError as error:
        raise InputError(f"--output {path}: {error.strerror}") from None


def is_results(text: str) -> bool:
    """Return whether a file's text is empty or what --output holds."""
    try:
        found = dict(json.loads(text)) if text else dict.fromkeys(RESULTS)
        return {*found} - {"of"} == RESULTS and isinstance(found.get("of", {}), dict)
    except (ValueError, TypeError, RecursionError):
        return False


def origin(args: argparse.Namespace) -> dict:
    """Return what results are of: the exported model, and what it is asked."""
    config = json.loads((args.model / "config.json").read_text(encoding="utf-8"))
    return dict(folder=args.model.resolve().name, step=config.get("step"),
                commit=config.get("commit"),
                weights=source_digest([args.model / "model.safetensors"])[:12],
                tasks=",".join(sorted(args.tasks)), shots=args.shots, limit=args.limit)


def refuse_other(path: Path, of: dict):
    """Raise InputError where a file has results of another model or other tasks."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    there = json.loads(text).get("of", {}) if text else of
    for name in of:
        values = ["not given" if found.get(name) is None else found[name] for found in (there, of)]
        if values[0] != values[1]:
            raise InputError(f"--output {path}: is of another model or other tasks ({name}: "
                             f"{values[0]}, here {values[1]}): name another file")


def main(argv: list[str]) -> int:
    """Evaluate the model and print the harness's table; return the exit status."""
    args = parse(argv)
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError as error:
        raise InputError("experiments/harness.py needs the package lm-eval: pip install lm-eval "
                         f"({first_line(error)})") from None

    manager = TaskManager(include_path=args.include and str(args.include))
    if unknown := [task for task in args.tasks if task not in manager.all_tasks]:
        raise InputError(f"--tasks: the harness has no task {unknown[0]} (see `lm-eval ls tasks`)"
                         + (f", nor has --include {args.include}" if args.include else ""))
    if args.output is not None:
        refuse_unwritable(args.output)  # before minutes of work
    device = choose_device(args.device)
    runtime = usual_runtime(device)
    adapter = Adapter(load_exported(args.model), runtime, args.batch_size)
    if args.output is not None:
        of = origin(args)
        refuse_other(args.output, of)
    refuse_leaky(str(args.model), adapter.model, sorted({min(64, adapter.T), adapter.T}), runtime)
    try:
        found = simple_evaluate(adapter, tasks=args.tasks, num_fewshot=args.shots,
                                limit=args.limit, task_manager=manager)
    except Exception as error:  # a task's texts may be missing, or not what its yaml file says
        if isinstance(error, InputError) or ran_out(error):
            raise
        network = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
        raise InputError(f"--tasks {','.join(args.tasks)}: {type(error).__name__}: "
                         f"{first_line(error)}{'; is the network there?' * network}") from None
    print(make_table(found))
    if args.output is not None:
        results = dict(of=of, **{name: found[name] for name in sorted(RESULTS)})
        args.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run(main, memory="--batch_size")
