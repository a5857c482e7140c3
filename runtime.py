"""Run a model: on a device, one process a card; clocks; its loss and its text; how a script ends.

Nothing here knows how the model is made: it has `hidden`, `step`, `check_length` and `lm_head`.
"""
import codecs
import contextlib
import os
import re
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from data.loader import TokenStream, to_device
from data.text_to_bin import InputError, first_line, gpt2_encoding, show_safely
from test_causality import new_seed

LONGEST_WAIT = timedelta(minutes=1)  # of a rank for the others: then the run ends


# -----------------------------------------------------------------------------
# devices and ranks


@dataclass
class Runtime:
    """Where and how everything runs: one process, or one of several under torchrun."""

    device: torch.device
    dtype: torch.dtype
    compile: bool
    rank: int = 0
    world: int = 1
    patient: object = None  # a group of all ranks that waits longer than LONGEST_WAIT

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def of_ranks(self, value: int) -> list[int]:
        """Return every rank's value: on the CPU, through gloo, which does not wait for the GPU."""
        values = torch.zeros(self.world, dtype=torch.int64)
        values[self.rank] = value
        if self.world > 1:
            dist.all_reduce(values)
        return values.tolist()

    def any_rank(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank: ranks must leave the loop together."""
        return any(self.of_ranks(flag))

    def wait(self):
        """Wait for all ranks, after work that may take one of them more than LONGEST_WAIT."""
        if self.world > 1:
            dist.barrier(self.patient)

    def new_seed(self) -> int:
        """Return rank 0's new seed, so that all ranks draw the same."""
        seed = torch.tensor(new_seed())
        if self.world > 1:
            dist.broadcast(seed, 0)
        return seed.item()


def choose_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this torch sees no CUDA device; use cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def ranks() -> tuple[int, int, int]:
    """Return the rank, the number of ranks and the rank on this machine that torchrun has set."""
    values = []
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        text = os.environ.get(name, default)
        if not re.fullmatch("[0-9]{1,6}", text):
            raise InputError(f"the environment's {name} must be a number, got {text!r}: unset it")
        values.append(int(text))
    rank, world, local_rank = values
    if rank >= world or world > 1 and not os.environ.get("MASTER_ADDR"):
        raise InputError(f"the environment has RANK {rank} and WORLD_SIZE {world}, but torchrun "
                         "has not set them: unset both")
    return rank, world, local_rank


def choose_gpus(asked: int | None, device: torch.device, micro_batches: int, say) -> int:
    """Return how many processes to start, one a card, which share out a step's micro-batches.

    It is 1 where torchrun has started this one. Raises InputError for --gpus.
    """
    if "RANK" in os.environ:
        if asked not in (None, world := ranks()[1]):
            raise InputError(f"--gpus must be the number of ranks under torchrun, {world}, "
                             f"got {asked}")
        return 1
    there = torch.cuda.device_count() if device.type == "cuda" else 0
    if asked is None:
        most = max(n for n in range(1, max(there, 1) + 1) if micro_batches % n == 0)
        if there > 1:
            say(f"{most} of {there} GPUs: the most that divide the {micro_batches} micro-batches "
                "of a step (--gpus chooses)")
        return most
    if asked > there:
        raise InputError(f"--gpus must be <= {there}, the GPUs here for --device "
                         f"{device.type}, got {asked}")
    if micro_batches % asked:
        raise InputError(f"--gpus must divide --grad_accumulation_steps {micro_batches}, "
                         f"got {asked}")
    return asked


def own_card(local_rank: int) -> torch.device:
    """Return this process's CUDA device, which becomes the current one."""
    if local_rank >= torch.cuda.device_count():
        raise InputError(f"the environment has LOCAL_RANK {local_rank}, but there are "
                         f"{torch.cuda.device_count()} CUDA devices")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


@contextlib.contextmanager
def joined_ranks(runtime: Runtime):
    """Join the groups of all ranks, of several: one that waits a minute, and a patient one."""
    if runtime.world == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if runtime.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=LONGEST_WAIT)
    runtime.patient = dist.new_group(backend="gloo", timeout=timedelta(hours=1))
    yield
    dist.destroy_process_group()  # not after an error: it would wait for ranks that do not come


def launch(processes: int) -> int:
    """Run this command by torchrun in so many processes, one a card; return the exit status."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # torchrun would choose 1 and warn
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    try:
        torchrun.main(["--standalone", f"--nproc_per_node={processes}", *sys.argv])
    except SignalException as stopped:  # it has passed the signal on, and the ranks have saved
        return 128 + stopped.sigval
    except ChildFailedError as error:
        # the first to fail; not one that within a second failed for want of it (1) or was ended
        first = min(failure.timestamp for failure in error.failures.values())
        ended = [(rank, failure.exitcode) for rank, failure in error.failures.items()
                 if failure.timestamp <= first + 1]
        rank, status = min(ended, key=lambda pair: pair[1] in (1, -signal.SIGTERM))
        how = f"ended with status {status}" if status > 0 else \
            f"was killed by {signal.Signals(-status).name}"
        print(f"error: rank {rank} {how}", file=sys.stderr, flush=True)
        return status if status > 0 else 128 - status
    return 0


# -----------------------------------------------------------------------------
# measuring


def gather_rows(gradients: list[Tensor]) -> list[Tensor]:
    """Return the means over all ranks of coalesced sparse gradients, of which only rows travel."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == 1 or not gradients:
        return gradients
    mine = torch.tensor([len(g.values()) for g in gradients], device=gradients[0].device)
    counts = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(counts, mine)
    means = []
    for g, numbers in zip(gradients, torch.stack(counts, 1).tolist()):
        parts = []
        for part, dim in ((g.indices(), 1), (g.values(), 0)):  # padded, as all ranks send as much
            room = [0, max(numbers) - len(g.values())]
            sent = F.pad(part, room if dim else [0, 0, *room]).contiguous()
            got = [torch.empty_like(sent) for _ in range(world)]
            dist.all_gather(got, sent)
            parts.append(torch.cat([x.narrow(dim, 0, n) for x, n in zip(got, numbers)], dim))
        means.append(torch.sparse_coo_tensor(parts[0], parts[1] / world, g.shape).coalesce())
    return means


class Clock:
    """Measure the seconds of steps; on a GPU by events, as the host runs ahead of it.

    `total` excludes compilation, validation and saving: restart() begins the next step after those.
    """

    def __init__(self, device: torch.device, total: float):
        self.device, self.total = device, total
        self.restart()

    def now(self):
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def restart(self):
        self.mark = self.now()

    def add_until(self, ended) -> float:
        """Wait for the moment `ended`, count the seconds since the last one and return them."""
        if self.device.type == "cpu":
            seconds = ended - self.mark
        else:
            ended.synchronize()
            seconds = self.mark.elapsed_time(ended) / 1000
        self.mark = ended
        self.total += seconds
        return seconds


def peak_memory(device: torch.device) -> int:
    """Return the most bytes so far: of tensors on a GPU, resident on a CPU (0 where unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure_matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large matrix product in this dtype: what the MFU is a share of."""
    n, repeats = (8192, 10) if device.type == "cuda" else (1024, 3)
    a, b = (torch.randn(n, n, generator=torch.Generator().manual_seed(i)).to(device, dtype)
            for i in range(2))
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(2):  # the first round warms up
        synchronize()
        begin = time.perf_counter()
        for _ in range(repeats):
            a @ b
        synchronize()
        seconds = time.perf_counter() - begin
    return repeats * 2 * n**3 / seconds


# -----------------------------------------------------------------------------
# a model's loss on a text, and its own text


@torch.no_grad()
def evaluate(model, stream: TokenStream, val_tokens: int, B: int, T: int, runtime: Runtime,
             interrupted=lambda: False) -> Tensor | None:
    """Return the sums of the losses of the stream's first `val_tokens` targets, (T,), float64.

    Every one of them counts, by its position in windows of T tokens. The last row and the last
    batch are filled up with targets that do not count, so all batches have one shape. Returns None
    where interrupted() says so, which it does to all ranks at once.
    """
    device = runtime.device
    total = torch.zeros(T, dtype=torch.float64, device=device)
    for first in range(0, val_tokens, runtime.world * B * T):
        if interrupted():
            return None
        begin = first + runtime.rank * B * T
        if begin >= val_tokens:
            continue
        count = min(B * T, val_tokens - begin)
        tokens = F.pad(stream.read(begin, count + 1), (0, B * T - count))
        targets = tokens[1:].clone()
        targets[count:] = -1
        with runtime.autocast():
            hidden = model.hidden(to_device(tokens[:-1].view(B, T), device))
            _, losses = model.lm_head.loss(hidden, to_device(targets.view(B, T), device))
        total += losses.double().sum(0)
    if runtime.world > 1:
        dist.all_reduce(total)
    return total


@torch.no_grad()
def generate(model, text: str, args, T: int, runtime: Runtime):
    """Print a continuation of `text` token by token; attention looks back at most T tokens.

    <|endoftext|> in the text is the token.
    """
    encoding, tokens = gpt2_encoding(), []
    for document in text.split("<|endoftext|>"):
        tokens += [encoding.eot_token, *encoding.encode_ordinary(document)]
    tokens = tokens[1:] or tokens
    model.check_length(len(tokens) + args.max_new_tokens - 1)
    generator = torch.Generator().manual_seed(args.seed)
    # a character may take several tokens
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    print(text, end="", flush=True)
    with runtime.autocast():  # once: so weights are cast once
        state = None
        for token in tokens[:-1]:
            _, state = model.step(torch.tensor([token], device=runtime.device), state, T)
        token = tokens[-1]
        for _ in range(args.max_new_tokens):
            hidden, state = model.step(torch.tensor([token], device=runtime.device), state, T)
            token = sample(model.lm_head.logits(hidden[0]).cpu(), args, generator)
            piece = decoder.decode(encoding.decode_single_token_bytes(token))
            print(piece, end="", flush=True)
    print(decoder.decode(b"", final=True))


def sample(logits: Tensor, args, generator: torch.Generator) -> int:
    """Return one token of (vocab_size,): the likeliest at temperature 0, else one of the top_k."""
    if args.temperature == 0:
        return int(logits.argmax())
    top = logits.double().topk(min(args.top_k, len(logits)))
    scores = (top.values - top.values.max()) / args.temperature  # <= 0: none is too low
    return int(top.indices[torch.multinomial(F.softmax(scores, -1), 1, generator=generator)])


# -----------------------------------------------------------------------------
# how a script ends


class Diverged(RuntimeError):
    """A loss or gradient that is not finite."""


def run(main_function, memory: str = "--batch_size (and raise --grad_accumulation_steps to match), "
        "or --val_batch_size, --sequence_length or --model") -> None:
    """Exit with the function's status; bad input is one clear line and status 2, divergence 1.

    memory: the flags to lower where there is not enough.
    """
    rank, message = None, None
    show_safely()
    try:
        rank = ranks()[0] if "RANK" in os.environ else None
        status = main_function(sys.argv[1:])
    except (InputError, Diverged) as error:
        message, status = str(error), 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:  # outside training, which saves first
        status = 130
    except OSError as error:
        message, status = f"{error.filename or 'output'}: {error.strerror or error}", 2
    except Exception as error:
        # a compiler's errors are RuntimeErrors, too, also where they hold that memory ran out
        ran_out = isinstance(error, RuntimeError) and any(
            text in str(error) for text in ("can't allocate memory", "out of memory"))
        if ran_out or isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            message, status = f"out of memory: lower {memory} ({first_line(error)})", 2
        elif rank is None:
            raise
        else:
            traceback.print_exc()
            message, status = first_line(error), 1
    if message:
        who = "" if rank is None else f"rank {rank}: "
        print(f"error: {who}{message}", file=sys.stderr, flush=True)
        if rank is not None:  # at once: NCCL would wait for the other ranks first
            sys.stdout.flush()
            os._exit(status)
    sys.exit(status)
