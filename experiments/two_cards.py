"""Measure training on several cards: losses, speed, memory, and how runs end.

    python experiments/two_cards.py speed --cards 1 2 4 --output runs/cards
    python experiments/two_cards.py ends --output runs/ends
    torchrun --standalone --nproc_per_node=2 experiments/two_cards.py parts --rows 64

speed runs the first 50 steps of the hybrid on so many cards, in micro-batches of --rows rows. A run
on one card with 16 rows says how far rounding alone moves the losses.

ends runs a small model on two cards. It gets SIGTERM and resumes on one card. Then it resumes on
two, of which one is killed.

parts times a step and its pieces, on the device and on the host: with tables, without them, and
where nothing travels. It says where the host waits for the device. It times the gradients' way and
the optimizers alone. It also runs in one process. A piece's time on the device holds that in which
the device waits for the host.

With --device cpu they try themselves out on a tiny model, through gloo. --input_bin and
--input_val_bin are the trainer's.
"""
import contextlib
import gc
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

import train_gpt2_afno as trainer  # noqa: E402
from data.text_to_bin import ROOT, InputError, Parser, one_of  # noqa: E402
from runtime import (Clock, Runtime, average, choose_device, drop_gradients,  # noqa: E402
                     joined_ranks, own_card, ranks, row_tables, run)

SCRIPT = ROOT / "train_gpt2_afno.py"
FIRST_50 = "--preset fineweb --num_iterations 50 --warmup_iters 258 --warmdown_iters 0 " \
    "--val_fp32 0 --val_tokens 65536 --val_loss_every 0 --save_every 0"
WHOLE = "--preset fineweb --val_fp32 0 --val_tokens 65536"
SMALL = "--preset fineweb --model d4 --n_head 2 --attn_layers 2 --sequence_length 256 " \
    "--batch_size 8 --grad_accumulation_steps 4 --compile 0 --warmup_iters 10 --warmdown_iters 0 " \
    "--val_fp32 0 --val_tokens 4096 --val_loss_every 0 --save_every 20 " \
    "--predict_ahead 0 --predict_prefix 0"  # whose shares follow from --num_iterations
TINY = " --model d1 --n_head 2 --attn_layers none --sequence_length 64 --batch_size 2 " \
    "--num_iterations 12 --val_batch_size 2 --val_tokens 200 --fp8_head 0 --fp8_mlp 0"
REPEATS = dict(cuda=(3, 20), cpu=(1, 2))  # of what parts measures; the first warm up


class Launch:
    """Run one command of the trainer on so many cards, or processes on a CPU.

    Its output goes to the file `printed`, its run to `folder`. `variables` are added to the
    environment.
    """

    def __init__(self, args, name: str, cards: int, flags: str, folder: str | None = None,
                 **variables):
        self.folder = Path(args.output) / (folder or name)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable]
        if args.device == "cpu":
            command += f"-m torch.distributed.run --standalone --nproc_per_node={cards}".split()
        command += [str(SCRIPT), *flags.split(), "--output_dir", str(self.folder),
                    "--device", args.device, "--input_bin", args.input_bin,
                    "--input_val_bin", args.input_val_bin]
        if args.device == "cuda":
            command += ["--gpus", str(cards)]
        self.printed = Path(args.output) / f"{name}.txt"
        with open(self.printed, "w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT,
                                            env={**os.environ, **variables})

    def status(self, timeout: float = 600) -> int:
        return self.process.wait(timeout)

    def losses(self) -> dict[int, float]:
        return {row["step"]: row["train_loss"] for row in self.rows()}

    def rows(self) -> list[dict]:
        """Return the steps logged so far."""
        path = self.folder / "metrics.jsonl"
        whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
        return [row for line in whole.splitlines() if "train_loss" in (row := json.loads(line))]

    def wait_for(self, step: int):
        """Wait until a step is logged; raise SystemExit where the run ends before."""
        while not (self.rows() and self.rows()[-1]["step"] >= step):
            if self.process.poll() is not None:
                raise SystemExit(f"{self.printed} ended too early")
            time.sleep(0.2)

    def rank(self, wanted: int) -> int:
        """Return the process id of a rank; raise SystemExit where there is none."""
        for path in Path("/proc").glob("[0-9]*"):
            try:
                parent = int(path.joinpath("stat").read_text().rpartition(")")[2].split()[1])
                variables = path.joinpath("environ").read_bytes().split(b"\0")
            except OSError:  # it has ended
                continue
            if parent == self.process.pid and f"RANK={wanted}".encode() in variables:
                return int(path.name)
        raise SystemExit(f"{self.printed}: no process of rank {wanted}")

    def end_by(self, pid: int, signum: int) -> tuple[int, float]:
        """Send a signal to a process; return the launcher's status and its seconds to the end."""
        begin = time.perf_counter()
        os.kill(pid, signum)
        return self.status(), time.perf_counter() - begin


def distance(a: dict[int, float], b: dict[int, float], first: int = 1) -> str:
    """Return in words how far two runs' losses are apart, from the step `first` on."""
    apart = [abs(a[step] - b[step]) for step in sorted(a.keys() & b.keys()) if step >= first]
    return f"{len(apart)} steps, largest {max(apart):.6f}, mean {statistics.mean(apart):.6f}"


def speed(args):
    """Train the first 50 steps on each number of cards; print speed, memory and losses.

    Speed is in tokens/s, the median from the eleventh logged step on, and as a multiple of one
    card's. Losses are compared with those of one card. Raise SystemExit where a run fails.
    """
    tiny, runs = args.device == "cpu", {}
    for cards, rows in ((1, 16), *((cards, args.rows) for cards in args.cards)):
        # on the second card, beside the next one
        where = dict(CUDA_VISIBLE_DEVICES="1") if rows == 16 else {}
        flags = (FIRST_50 + TINY * tiny + f" --grad_accumulation_steps {128 // rows}"
                 f" --batch_size {rows // 16 if tiny else rows}")
        runs[cards, rows] = Launch(args, f"cards-{cards}-rows-{rows}", cards, flags, **where)
        for run in runs.values() if rows == args.rows else ():
            if status := run.status():
                raise SystemExit(f"{run.printed} ended with {status}")
    one = runs[1, args.rows]
    rate = {key: statistics.median(row["tokens_per_s"] for row in run.rows()[10:])
            for key, run in runs.items()}
    for (cards, rows), run in runs.items():
        log = (run.folder / "train.log").read_text()
        peak = re.findall(r"peak memory of each rank: .*|peak_memory_usage: [\d,]+ MiB", log)[0]
        print(f"{cards} cards, {rows} rows: {rate[cards, rows]:,.0f} tokens/s, "
              f"{rate[cards, rows] / rate[1, args.rows]:.3f} of one card's; {peak}; losses to one "
              f"card's with {args.rows} rows: {distance(run.losses(), one.losses())}")


def ends(args):
    """End a run by SIGTERM, resume it on one card and on two, and kill a rank.

    Print statuses, seconds, and how far its losses are from those of a whole run.
    """
    small = SMALL + TINY * (args.device == "cpu") + " --num_iterations "
    run = Launch(args, "1-two-cards", 2, small + "1000000", "run")
    run.wait_for(30)
    print("SIGTERM to the launcher: status {}, {:.1f} s".format(
        *run.end_by(run.process.pid, signal.SIGTERM)))
    step = run.rows()[-1]["step"]
    one = Launch(args, "2-one-card", 1, f"{small}{step + 30} --resume auto", "run")
    print(f"from step {step} on one card: status {one.status()}")
    two = Launch(args, "3-two-cards", 2, small + "1000000 --resume auto", "run")
    two.wait_for(step + 60)
    print("kill -9 of rank 1: status {}, {:.1f} s".format(*two.end_by(two.rank(1), signal.SIGKILL)))
    print(*re.findall(".*(?:error: rank|exitcode).*", two.printed.read_text()), sep="\n")
    whole = Launch(args, "4-whole", 1, f"{small}{step + 60}")
    print(f"whole run on one card: status {whole.status()}; losses of all four pieces to its: "
          f"{distance(two.losses(), whole.losses())}; after the first change "
          f"{distance(two.losses(), whole.losses(), step + 1)}")


class Pieces:
    """Measure what functions take, in ms: on the device by events, and on the host."""

    def __init__(self, device: torch.device):
        self.now, self.moments = Clock(device, 0.0).now, {}

    def timed(self, name: str, function):
        """Return the function; its calls are measured under this name."""
        def measured(*arguments, **named):
            begin = time.perf_counter(), self.now()
            result = function(*arguments, **named)
            row = *begin, time.perf_counter(), self.now()
            self.moments.setdefault(name, []).append(row)
            return result
        return measured

    def watch(self, run: trainer.Run, patch):
        """Measure a step's pieces; patch(object, name, value) sets an attribute for a while."""
        def begin_and_end(*arguments):
            return self.timed("tables: wait for the sums", begin(*arguments))

        begin = self.timed("tables: sums on their way", trainer.average)
        patch(trainer, "average", begin_and_end)
        for place, name, what in (
                (run.model, "meet", "tables: the step's rows"),
                (run, "next_batches", "micro-batches, read ahead"), (run, "goals", "targets"),
                (run.runtime, "of_ranks", "votes of ranks"), (run.wrapped, "forward", "forward"),
                (torch.Tensor, "backward", "backward, others' average"),
                *((optimizer, "step", type(optimizer).__name__) for optimizer in run.optimizers),
                (torch.nn.utils, "get_total_norm", "norm of gradients"),
                (run, "flush", "log; wait for the step before")):
            patch(place, name, self.timed(what, getattr(place, name)))

    def rows(self, steps: int) -> list[tuple[str, float, float]]:
        """Return (name, milliseconds on the device, on the host) a step."""
        between = lambda a, b: 1000 * (b - a) if isinstance(a, float) else a.elapsed_time(b)
        return [(name, sum(between(row[1], row[3]) for row in rows) / steps,
                 sum(between(row[0], row[2]) for row in rows) / steps)
                for name, rows in self.moments.items()]


def one_step(run: trainer.Run):
    """Make one training step, with the loop's vote of ranks."""
    run.runtime.of_ranks(0)  # the loop's vote
    run.update(run.forward_backward(run.next_batches(), run.T), run.T)


def milliseconds(function, device: torch.device) -> float:
    """Return the mean ms of a call on the device, after calls that warm up (REPEATS)."""
    clock = Clock(device, 0.0)
    warm_up, repeats = REPEATS[device.type]
    for _ in range(warm_up):
        function()
    clock.restart()
    for _ in range(repeats):
        function()
    return 1000 * clock.add_until(clock.now()) / repeats


def host_waits(run: trainer.Run) -> str:
    """Return the places of a step at which the host waits for the GPU, as torch finds them."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        one_step(run)
        torch.cuda.set_sync_debug_mode("default")
    places = Counter(f"{Path(one.filename).name}:{one.lineno}" for one in found
                     if "synchronizing CUDA operation" in str(one.message))
    return ", ".join(f"{place} x {n}" for place, n in places.items()) or "none"


def measure_steps(run: trainer.Run, name: str, say):
    """Say what a whole step takes, then what its pieces take, in ms."""
    say(f"\n{name}: {milliseconds(lambda: one_step(run), run.device):.2f} ms a step")
    pieces, undo = Pieces(run.device), contextlib.ExitStack()
    with undo:
        pieces.watch(run, lambda *what: undo.enter_context(mock.patch.object(*what)))
        whole = milliseconds(lambda: one_step(run), run.device)
    say(f"{'device':>10} {'host':>9}   ms a step; {whole:.2f} with what measures these")
    for piece, device, host in pieces.rows(sum(REPEATS[run.device.type])):
        say(f"{device:10.2f} {host:9.2f}   {piece}")


def measure_alone(run: trainer.Run, say):
    """Say what the gradients' way between cards and the optimizers take, one by one, in ms."""
    batches = run.next_batches()
    run.forward_backward(batches, run.T)
    tables = row_tables(run.model).values()
    gradients = [table.gradient for table in tables]
    whole = torch.zeros(sum(table.weight.numel() for table in tables), device=run.device)
    others = torch.zeros(sum(p.numel() for p in run.model.parameters()) - len(whole),
                         device=run.device)
    say(f"\nalone, bytes of gradients: {others.nbytes:,} but for the tables, "
        f"{sum(gradient.nbytes for gradient in gradients):,} of the tables' rows that a rank met, "
        f"{whole.nbytes:,} of whole tables")
    for name, function in (("all-reduce but for the tables", lambda: dist.all_reduce(others)),
                           ("tables by row", lambda: average(gradients)()),
                           ("all-reduce of whole tables", lambda: dist.all_reduce(whole)),
                           *((type(one).__name__, one.step) for one in run.optimizers)):
        say(f"{milliseconds(function, run.device):10.2f}   {name}")
    drop_gradients(run.model)


def parts(args):
    """Measure steps and their pieces on the ranks that torchrun began, with and without tables.

    With several ranks, also measure the gradients' way alone, steps whose tables are not averaged,
    and steps where nothing travels. Rank 0 prints.
    """
    rank, world, local_rank = ranks()
    tiny = args.device == "cpu"
    flags = (WHOLE + TINY * tiny + f" --num_iterations 3800 --grad_accumulation_steps "
             f"{128 // args.rows} --batch_size {args.rows // 16 if tiny else args.rows}")
    say = lambda text: print(text, flush=True) if rank == 0 else None
    device = own_card(local_rank) if args.device == "cuda" else torch.device("cpu")
    runtime = Runtime(device, torch.float32 if tiny else torch.bfloat16, not tiny, rank, world)
    with joined_ranks(runtime):
        for tables in ("", " --pair_rows 0 --value_tables 0"):
            given = trainer.parse_flags([*(flags + tables).split(), "--input_bin", args.input_bin,
                                         "--input_val_bin", args.input_val_bin])
            values = trainer.merge_flags(given, device, None, say)
            folder = Path(args.output) / f"parts{'-without' * bool(tables)}"
            config = trainer.config_of(given, values, None, folder, False)
            run = trainer.Run(values, config, runtime, None, folder)
            run.refuse_leaks = lambda shapes: None
            run.check_and_compile(None)
            run.open_bar()
            run.bar.disable = True
            what = f"{world} ranks, {args.rows} rows, with{'out' * bool(tables)} tables"
            measure_steps(run, what, say)
            if not tiny:
                say(f"the host waits at: {host_waits(run)}")
            if world > 1 and not tables:
                measure_alone(run, say)
            if world > 1:
                with mock.patch.object(trainer, "average", lambda *_: lambda: None):
                    if not tables:
                        measure_steps(run, f"{what}, which are not averaged", say)
                    run.wrapped = run.model
                    measure_steps(run, f"{what}, nothing travels", say)
            del run
            gc.collect()


def main(argv: list[str]):
    """Run speed, ends or parts; raise InputError where the arguments are wrong."""
    parser = Parser(description=__doc__)
    parser.add_argument("what", choices=("speed", "ends", "parts"))
    parser.add_argument("--cards", type=one_of(1, 2, 4), nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=one_of(32, 64), default=32,
                        help="of a micro-batch: more keep the host ahead of a fast card")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", default="runs/cards")
    for name in trainer.DATA_FLAGS:
        parser.add_argument(f"--{name}", default=trainer.FINEWEB[name])
    args = parser.parse_args(argv)
    if 1 not in args.cards:
        raise InputError(f"--cards must have 1, which others are compared with, got "
                         f"{' '.join(map(str, args.cards))}")
    choose_device(args.device)  # where there is no GPU, it says so
    globals()[args.what](args)


if __name__ == "__main__":
    run(main)
