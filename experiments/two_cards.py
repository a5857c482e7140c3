"""Measure training on several cards: losses, speed, memory, and how runs end.

    python experiments/two_cards.py speed --cards 1 2 4 --output runs/cards
    python experiments/two_cards.py ends --output runs/ends
    torchrun --standalone --nproc_per_node=2 experiments/two_cards.py parts

speed: the first 50 steps of the hybrid in micro-batches of --rows rows on so many cards, and of 16
rows on one card, which says how far rounding alone moves the losses. ends: a small model on two
cards gets SIGTERM, goes on on one, then on two, of which one is killed. parts: what the gradients'
way between cards takes, the tables' by row or whole, and the optimizers. With --device cpu they try
themselves out on a tiny model, through gloo. --input_bin and --input_val_bin are the trainer's.
"""
import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

import train_gpt2_afno as trainer  # noqa: E402
from data.loader import TokenStream, TrainLoader  # noqa: E402
from runtime import Clock, average_rows, run  # noqa: E402

SCRIPT = trainer.ROOT / "train_gpt2_afno.py"
FIRST_50 = "--preset fineweb --num_iterations 50 --warmup_iters 258 --warmdown_iters 0 " \
    "--val_fp32 0 --val_tokens 65536 --val_loss_every 0 --save_every 0"
SMALL = "--preset fineweb --model d4 --n_head 2 --attn_layers 2 --sequence_length 256 " \
    "--batch_size 8 --grad_accumulation_steps 4 --compile 0 --warmup_iters 10 --warmdown_iters 0 " \
    "--val_fp32 0 --val_tokens 4096 --val_loss_every 0 --save_every 20"
TINY = " --model d1 --n_head 2 --attn_layers none --sequence_length 64 --batch_size 2 " \
    "--num_iterations 12 --val_batch_size 2 --val_tokens 200 --fp8_head 0 --fp8_mlp 0"


class Launch:
    """One command of the trainer on so many cards, or processes on a CPU; its output is a file."""

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
        while not (self.rows() and self.rows()[-1]["step"] >= step):
            if self.process.poll() is not None:
                raise SystemExit(f"{self.printed} ended too early")
            time.sleep(0.2)

    def rank(self, wanted: int) -> int:
        """Return the process of a rank."""
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
        """Send a signal; return the launcher's status and the seconds it took to end."""
        begin = time.perf_counter()
        os.kill(pid, signum)
        return self.status(), time.perf_counter() - begin


def distance(a: dict[int, float], b: dict[int, float], first: int = 1) -> str:
    """Return how far two runs' losses are apart from a step on."""
    apart = [abs(a[step] - b[step]) for step in sorted(a.keys() & b.keys()) if step >= first]
    return f"{len(apart)} steps, largest {max(apart):.6f}, mean {statistics.mean(apart):.6f}"


def speed(args):
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


def milliseconds(function, device: torch.device, repeats: int = 20) -> float:
    clock = Clock(device, 0.0)
    for _ in range(3):  # the first ones warm up
        function()
    clock.restart()
    for _ in range(repeats):
        function()
    return 1000 * clock.add_until(clock.now()) / repeats


def parts(args):
    rank = int(os.environ["RANK"])
    device = torch.device(args.device, rank) if args.device == "cuda" else torch.device("cpu")
    if args.device == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo")
    values, world = trainer.DEFAULTS | trainer.PRESETS["fineweb"], dist.get_world_size()
    if args.device == "cpu":
        values |= dict(model="d1", attn_layers=(), n_head=2, sequence_length=64, batch_size=2)
    torch.manual_seed(0)
    model = trainer.GPT(trainer.GPTConfig(**trainer.model_fields(values))).to(device)
    adamw, muon, row_adam = trainer.make_optimizers(model, "muon", 0.001, 0.1)
    tables = trainer.row_tables(model)
    loader = TrainLoader(TokenStream(args.input_bin, model.config.vocab_size, "input_bin"),
                         values["batch_size"], model.config.sequence_length, 0, rank, world, device,
                         values["row_order"])
    for _ in range(values["grad_accumulation_steps"] // world):
        x, y = loader.next()
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            loss = model(x, y, return_logits=False)[1]
        loss.backward()
    gradients = [p.grad for p in tables.values()]
    met = sum(g.any(1).sum().item() for g in gradients)
    whole = torch.zeros(sum(p.numel() for p in tables.values()), device=device)
    others = torch.zeros(sum(p.numel() for p in model.parameters()) - len(whole), device=device)
    if rank == 0:
        print(f"{world} ranks, bytes of gradients: {others.nbytes:,} but for the tables, "
              f"{met * gradients[0][0].nbytes:,} of the tables' rows that rank 0 met, "
              f"{whole.nbytes:,} of whole tables")
    for name, function in (("all-reduce but for the tables", lambda: dist.all_reduce(others)),
                           ("tables by row", lambda: average_rows(gradients)),
                           ("all-reduce of whole tables", lambda: dist.all_reduce(whole)),
                           ("AdamW", adamw.step), ("RowAdam", row_adam.step),
                           ("Muon", muon.step)):
        taken = milliseconds(function, device)
        if rank == 0:
            print(f"{name}: {taken:.2f} ms")
    dist.destroy_process_group()


def main(argv: list[str]):
    parser = trainer.Parser(description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "ends", "parts"))
    parser.add_argument("--cards", type=trainer.one_of(1, 2, 4), nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=trainer.one_of(32, 64), default=32,
                        help="of a micro-batch: more keep the host ahead of a fast card")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", default="runs/cards")
    for name in trainer.DATA_FLAGS:
        parser.add_argument(f"--{name}", default=trainer.FINEWEB[name])
    args = parser.parse_args(argv)
    if 1 not in args.cards:
        raise trainer.InputError(f"--cards must have 1, which others are compared with, got "
                                 f"{' '.join(map(str, args.cards))}")
    globals()[args.what](args)


if __name__ == "__main__":
    run(main)
