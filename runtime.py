"""Run a model: on a device, one process a card; gradients; clocks; loss and text; a script's end.

A model has `hidden`, `step`, `check_length` and `lm_head`.
"""
import codecs
import contextlib
import gc
import hashlib
import math
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data.loader import TokenStream, to_device
from data.text_to_bin import (ROOT, InputError, first_line, gpt2_encoding, machine_memory,
                              show_safely)
from test_causality import new_seed

LONGEST_WAIT = timedelta(minutes=1)  # of a rank for the others: then the run ends
GIB = 2**30
MOST_TOKENS = 2**27  # of a step: all of them are read before its work begins


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

    def add_up(self, x: Tensor):
        """Let x be its sum over all ranks."""
        if self.world > 1:
            dist.all_reduce(x)

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


def usual_runtime(device: torch.device, compile: bool = False) -> Runtime:
    """Return one process, bf16 on a GPU and fp32 on a CPU."""
    return Runtime(device, torch.bfloat16 if device.type == "cuda" else torch.float32, compile)


def choose_device(name: str) -> torch.device:
    """Return the CPU or the first GPU, as --device asks. A rank takes its own_card() later.

    Beside a GPU the CPU works in one thread, unless OMP_NUM_THREADS says how many: its pieces are
    small, and on a busy host threads wait for each other (experiments/LOG.md, "two cards").
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this torch sees no CUDA device; use cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    return torch.device("cuda:0")


def choose_dtype(asked: str | None, device: torch.device, say) -> str:
    """Return autocast's dtype, or the one for this device. Raises InputError for --dtype."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0):
        return asked or ("bfloat16" if device.type == "cuda" else "float32")
    card = "{} has compute capability {}.{}, bfloat16 needs 8.0".format(
        torch.cuda.get_device_name(device), *torch.cuda.get_device_capability(device))
    if asked == "bfloat16":
        raise InputError(f"--dtype bfloat16: {card}; use --dtype float32")
    if asked is None:
        say(f"{card}: --dtype float32, which is slower and takes more memory")
    return "float32"


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


def launch(processes: int, gate=None) -> int:
    """Run this command by torchrun in so many processes, one a card; return the exit status.

    gate: a start.Gate, for which they wait.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if gate:
        print(gate.verdict(), file=sys.stderr, flush=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as choose_device; torchrun would warn
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
# the micro-batch that fits

MICRO_BATCH = ("batch_size", "grad_accumulation_steps", "recompute")  # a trial's, unless typed
FEW_TOKENS = 4096  # smaller micro-batches leave a GPU idle: --recompute 1 is tried before them
# so many keep even a fast GPU behind its host (experiments/LOG.md, "two cards")
MANY_TOKENS = 65536
ROOM = 6 * GIB  # for the preset's weights and averages, contexts of both and trials of kernels
# bytes of a token and channel that a block keeps for backward, without and with --recompute: at
# least, as measured (experiments/LOG.md, "Does it fit in 24 GB?")
KEPT = (36, 20)


def memory_budget(device: torch.device) -> float:
    """Return the bytes that this process may have of the device, with those that it has."""
    if device.type == "cpu":
        return machine_memory()
    index = torch.cuda.current_device() if device.index is None else device.index
    free, total = torch.cuda.mem_get_info(index)
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda index: 1.0)(index)
    return min(free + torch.cuda.memory_reserved(index), fraction * total)


def leave_room(device: torch.device):
    """Let this process, the gate, leave ROOM bytes of a GPU, or half, to a trainer beside it."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(max(0.5, 1 - ROOM / total), device)


def refuse_too_large(make, config, args, device: torch.device, only_read: bool):
    """Raise InputError, naming the flags that matter, where memory cannot be enough.

    make(config): a model.
    """
    step = args.batch_size * config.sequence_length * args.grad_accumulation_steps
    if step > MOST_TOKENS:
        raise InputError("--batch_size x --sequence_length x --grad_accumulation_steps must be <= "
                         f"{MOST_TOKENS:,} tokens a step, got {step:,}")
    model = shapes_of(make, config)
    there = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" \
        else machine_memory()
    rows = args.val_batch_size if only_read else args.batch_size
    numbers = sum(p.numel() for p in model.parameters())
    needs = {
        # weights; while training also gradients and one average, but for tables
        "--model, --afno_num_experts, --afno_short_conv or --pair_rows":
            4 * (numbers if only_read else 3 * numbers - 2 * numbers_in_tables(model)),
        # two residuals a layer, in bf16
        "--batch_size, --val_batch_size or --sequence_length": 4 * config.n_embd * max(
            rows * args.sequence_length * (1 if only_read else config.n_layer),
            args.val_batch_size * args.sequence_length),
        # what makes the taps: hidden units of the MLP at every mode
        "--afno_filter_length or --afno_num_experts":
            sum(4 * module.num_modes * module.mlp.w1[:, :, 0].numel()
                for module in model.modules() if hasattr(module, "num_modes"))}
    if (total := sum(needs.values())) > there:
        raise InputError(f"{max(needs, key=needs.get)} ask for too much: at least "
                         f"{total / GIB:,.3g} GiB of memory, there are {there / GIB:,.3g}")


def bytes_of_averages(optimizers: list) -> int:
    """Return the bytes of what the optimizers keep from step to step."""
    numbers = dict(AdamW=lambda p: 2 * p.numel(), Muon=lambda p: p.numel(), RowAdam=len)
    return 4 * sum(numbers[type(optimizer).__name__](p) for optimizer in optimizers
                   for group in optimizer.param_groups for p in group["params"])


def ran_out(error: Exception) -> bool:
    """Return whether memory was not enough; a compiler's errors may hold that, too."""
    texts = ("can't allocate memory", "out of memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or isinstance(
        error, RuntimeError) and any(text in str(error) for text in texts)


def next_smaller(rows: int, recompute: int, T: int, unit: int) -> tuple[int, int] | None:
    """Return (rows, recompute) to try where these need too much memory, None where there is none.

    Tokens of a micro-batch, rows of T, stay a multiple of `unit`.
    """
    if rows % 2 == 0 and rows // 2 * T % unit == 0 and (recompute or rows * T > FEW_TOKENS):
        return rows // 2, recompute
    return None if recompute else (rows, 1)


def attempted(runtime: Runtime, work) -> tuple[int, str]:
    """Return the worst of all ranks' outcomes of work(), and why this rank's is not 0.

    It is 0 where it works, 1 where memory is not enough, 2 where it does not compile.
    """
    outcome, reason = attempted_here(work, runtime.compile)
    runtime.wait()  # one may compile for minutes
    return max(runtime.of_ranks(outcome)), reason


def attempted_here(work, may_blame_compiler: bool) -> tuple[int, str]:
    """Return this rank's outcome, as attempted, and why it is not 0."""
    try:
        work()
        return 0, ""
    except (InputError, Diverged):
        raise
    except Exception as error:  # a compiler has many
        if ran_out(error):
            return 1, first_line(error)
        if not may_blame_compiler:
            raise
        return 2, first_line(getattr(error, "inner_exception", error))


def leave_out_compiler(runtime: Runtime, reason: str, say):
    """Go on without torch.compile, and say so."""
    say(f"torch.compile fails here ({reason or 'on another rank'}): it goes on as with "
        "--compile 0, slower and with more memory")
    torch.compiler.set_stance("force_eager")
    runtime.compile = False


def compiled_or_not(runtime: Runtime, work, say):
    """Do work() on all ranks. Where it does not compile on one of them, do it without compiler."""
    outcome, reason = attempted(runtime, work)
    if outcome == 2:
        leave_out_compiler(runtime, reason, say)
    if outcome:
        work()  # where memory is not enough, it raises again


def more_rows(args, T: int, world: int, spare) -> int:
    """Return how many rows of T tokens to try first: args' own, or more where memory is plenty.

    They double while they divide a step on so many ranks, have at most MANY_TOKENS, and spare(rows)
    says that there is room.
    """
    rows, step = args.batch_size, args.batch_size * args.grad_accumulation_steps
    while 2 * rows * T <= MANY_TOKENS and step % (2 * rows * world) == 0 and spare(2 * rows):
        rows *= 2
    return rows


def choose_micro_batch(runtime: Runtime, args, T: int, unit: int, channels: int, fixed: int,
                       attempt, say):
    """Set args.batch_size, grad_accumulation_steps and recompute to what all ranks' cards take.

    What args have is tried first, or with args.may_grow more rows where twice what they can take is
    free. More rows are not saved: so another card, or more cards, may go on with fewer. Without
    args.may_shrink args' own are all. The rows of a step stay. attempt(rows, recompute) does the
    work of training on a micro-batch of rows of T tokens, and raises where it cannot. Its tokens
    stay a multiple of `unit`. What cannot fit is not tried: it takes `fixed` bytes and KEPT for
    each of the model's channels, of all layers together. Compilation is left out where it fails.
    Raises InputError where nothing fits.
    """
    budget = min(runtime.of_ranks(int(min(memory_budget(runtime.device), 2**62))))
    least = lambda rows, recompute: fixed + KEPT[recompute] * channels * rows * T
    asked, why = args.batch_size, ""
    tried = asked, args.recompute
    if args.may_grow:
        rows = more_rows(args, T, runtime.world,
                         lambda rows: 2 * least(rows, args.recompute) <= budget)
        if rows > asked:
            tried, why = (rows, args.recompute), f"{budget / GIB:.1f} GiB are free"
    while tried:
        rows, recompute = tried
        need = least(rows, recompute) * args.may_shrink
        outcome, reason = 1, ""
        if need <= budget:
            outcome, reason = attempted(runtime, lambda: attempt(rows, recompute))
        if outcome == 0:
            break
        if runtime.compile and outcome == 1:
            torch.compiler.reset()  # of a shape that is given up; too many variants would stop it
        gc.collect()  # what an error of the compiler's holds
        if runtime.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        if outcome == 2:
            leave_out_compiler(runtime, reason, say)
            continue
        what = f"{rows} row{'s' * (rows > 1)} of {T}" + " with --recompute 1" * recompute
        why = f"{what} need at least {need / GIB:.1f} GiB, {budget / GIB:.1f} are free" \
            if need > budget else f"{what} need more than the {budget / GIB:.1f} GiB that are free"
        tried = next_smaller(rows, recompute, T, unit) if args.may_shrink else None
    else:
        raise InputError(f"out of memory: {why}: lower --batch_size (and raise "
                         "--grad_accumulation_steps to match), --sequence_length or --model"
                         + ", or set --recompute 1" * (not recompute))
    if args.may_shrink:
        chosen = dict(zip(MICRO_BATCH, (
            rows, args.grad_accumulation_steps * asked // rows, recompute)))
        vars(args).update(chosen)
        if rows <= asked:
            args.to_save.update(chosen)
        args.val_batch_size = args.to_save["val_batch_size"] or rows
        say(f"micro-batch: {rows} row{'s' * (rows > 1)} x {args.grad_accumulation_steps}"
            + ", recomputed" * recompute + f", {f'because {why}' if why else 'as asked for'}; at "
            f"most {peak_memory(runtime.device) / GIB:.1f} GiB in use")


def with_fewer_rows(rows: int, work, say):
    """Return work(rows), or that of half as many rows, and so on, where memory is not enough."""
    while True:
        try:
            return work(rows)
        except Exception as error:
            if rows < 4 or not ran_out(error):
                raise
        rows //= 2
        gc.collect()
        torch.cuda.empty_cache()
        say(f"memory is not enough: with {rows} rows")


# -----------------------------------------------------------------------------
# gradients: few rows of tables, averages over ranks


def data_parallel(model, world: int):
    """Return the model so wrapped that backward averages gradients over several ranks.

    Those of RowTables are left to `average`.
    """
    if world == 1:
        return model
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, row_tables(model))
    # as views of what travels, gradients are not copied back: a small kernel less for each
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def no_sync(model):
    """Return a context in which backward leaves a data_parallel model's gradients to each rank."""
    shared = isinstance(model, DistributedDataParallel)
    return model.no_sync() if shared else contextlib.nullcontext()


class RowTable(nn.Embedding):
    """A table of which a step meets few rows: these alone have gradients, in a copy of them.

    Whole gradients would be read and written in each micro-batch, to add zeros.
    """

    met = None  # by a step: rows (R,), their copy (R, C), and the place of each row there (n,)

    def meet(self, rows: Tensor | None = None):
        """Look up only these rows, in their copy; without rows look up all, in no copy."""
        weight = self.weight
        few = weight if rows is None else weight.detach()[rows].requires_grad_()
        rows = torch.arange(len(weight), device=weight.device) if rows is None else rows
        places = rows.new_full((len(weight),), -1)
        places[rows] = torch.arange(len(rows), device=rows.device)
        self.met = rows, few, places

    @property
    def gradient(self) -> Tensor | None:
        """Return the gradient of the rows that a step has met, (R, C), or None."""
        return None if self.met is None else self.met[1].grad

    def forward(self, rows: Tensor) -> Tensor:
        if self.met is None:
            return super().forward(rows)
        _, few, places = self.met
        return F.embedding(places[rows], few)


def row_tables(model) -> dict[str, RowTable]:
    """Return a model's RowTables by the names of their weights."""
    return {f"{name}.weight": module for name, module in model.named_modules()
            if isinstance(module, RowTable)}


def meet_all(model):
    """Let a model's RowTables meet all rows, in no copy."""
    for table in row_tables(model).values():
        table.meet()


def gradients_of(model) -> list[Tensor]:
    """Return all gradients that a model has, those of its RowTables' few rows last."""
    found = [p.grad for p in model.parameters()]
    found += [table.gradient for table in row_tables(model).values()]
    return [gradient for gradient in found if gradient is not None]


def drop_gradients(model):
    """Drop all gradients; RowTables look up all rows again."""
    model.zero_grad()
    for table in row_tables(model).values():
        table.met = None


def numbers_in_tables(model) -> int:
    """Return how many of a model's numbers are in RowTables."""
    return sum(table.weight.numel() for table in row_tables(model).values())


def bytes_to_train(model, tokens: int) -> int:
    """Return the bytes of a model's weights and gradients in a step of random tokens.

    Of RowTables these are the gradients of the rows that it meets, and a copy of these rows.
    """
    met = sum(table.weight.numel() * -math.expm1(-tokens / len(table.weight))
              for table in row_tables(model).values())
    whole = 8 * sum(p.numel() for p in model.parameters()) - 4 * numbers_in_tables(model)
    return whole + int(8 * met)


def distinct_rows(rows: Tensor, table: Tensor) -> Tensor:
    """Return which rows of the table (n, C) these are, each once, on its device; rows: on the CPU.

    Some others fill them up to a multiple of n / 64: steps of one size use the same memory again.
    """
    there = np.zeros(len(table), bool)  # NumPy finds them in a fifth of torch's time
    there[rows.numpy().ravel()] = True
    more = -np.count_nonzero(there) % max(1, len(table) // 64)
    there[np.flatnonzero(~there)[:more]] = True
    return to_device(torch.from_numpy(np.flatnonzero(there)), table.device)


def average(gradients: list[Tensor]):
    """Begin to average gradients over all ranks in place; return what ends it.

    On a GPU the host does not wait.
    """
    travelling = [dist.all_reduce(gradient, async_op=True) for gradient in gradients]

    def end():
        for gradient, travel in zip(gradients, travelling):
            travel.wait()
            gradient.div_(dist.get_world_size())

    return end


def shared_out(function, stacked: Tensor):
    """Begin function(stacked), (n, ...), each rank its share of the n; return what returns it all.

    function takes each of the n alone and keeps their shape. On a GPU the host does not wait.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == 1:
        done = function(stacked)
        return lambda: done
    size = -(-len(stacked) // world)
    mine = stacked[size * dist.get_rank():][:size]
    share = stacked.new_zeros(size, *stacked.shape[1:])
    if len(mine):
        share[:len(mine)] = function(mine)
    count, everything = len(stacked), share.new_empty(size * world, *share.shape[1:])
    travel = dist.all_gather_into_tensor(everything, share, async_op=True)

    def end():
        travel.wait()
        return everything[:count]

    return end


# -----------------------------------------------------------------------------
# measuring


def to_host(x: Tensor) -> Tensor:
    """Return x on the CPU, on a GPU without waiting: it is there once the GPU comes to this point.
    """
    if x.device.type == "cpu":
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


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


def shapes_of(make, *arguments):
    """Return make(*arguments) of shapes alone: its tensors, on the device meta, hold nothing."""
    with torch.device("meta"):
        return make(*arguments)


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


def gpu_energy(device: torch.device) -> int:
    """Return the millijoules that this GPU has used since its driver was loaded; 0 where unknown.

    It takes the package nvidia-ml-py, which is pynvml, and a GPU from 2017 on.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        card = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(card)
    except Exception:  # NVML has many
        return 0


class Energy:
    """Measure what the GPUs of all ranks use from here on."""

    def __init__(self, runtime: Runtime):
        self.runtime, self.begin = runtime, gpu_energy(runtime.device)

    def write(self, log, step: int):
        """Write it to rank 0's log, where the driver tells it; all ranks together."""
        now = gpu_energy(self.runtime.device)
        used = sum(self.runtime.of_ranks(now - self.begin if 0 < self.begin < now else 0))
        if log and used:
            log.line(f"energy: {used / 1000:.1f} J until step {step}")


def gpu_driver() -> str:
    """Return the version of NVIDIA's driver, as far as Linux tells it."""
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            found = re.search(r"\b\d{3}(\.\d+)+\b", file.readline())
    except OSError:
        found = None
    return found[0] if found else "unknown"


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
    runtime.add_up(total)
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


def keep_compilations():
    """Let compilations stay in the repository's .cache, unless the environment names a folder."""
    for name, folder in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        os.environ.setdefault(name, str(ROOT / ".cache" / folder))


def source_files(root: Path = ROOT) -> list[Path]:
    """Return all code of the repository that a run may call.

    That is also what was imported from a folder that a fork added, not experiments and tests.
    """
    found = [path for pattern in ("*.py", "kernels/**/*.py", "data/**/*.py")
             for path in sorted(root.glob(pattern))]
    modules = [*sys.modules.values()]
    imported = {Path(getattr(module, "__file__", None) or ".") for module in modules}

    def added(path: Path) -> bool:
        parts = path.relative_to(root).parts
        return parts[0] not in ("experiments", "tests") and not any(
            part == "site-packages" or part.startswith(".") for part in parts)

    inside = {path for path in imported if path.suffix == ".py" and path.is_relative_to(root)}
    return found + sorted(filter(added, inside - {*found}))


def source_digest(paths: Iterable[Path]) -> str:
    """Return the sha256 of the files' contents, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def code_of(scripts: Iterable[Path]) -> str:
    """Return what tells the code that results of these scripts depend on from other code."""
    said = ("report.py", "facts.py", "start.py")  # words alone
    return source_digest([*scripts, *(path for path in source_files()
                                      if path.name not in said)])[:12]


def keep_graphs():
    """Let torch.compile keep the blocks' graphs for the next start, with their gradients.

    By default it traces anew what enters autocast or holds a torch.autograd.Function. All that they
    do stands in the graph, which is the cache's key. The gradients of our operators do not: so
    kernels/ is in the key, too.
    """
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    key = source_digest(sorted(ROOT.glob("kernels/*.py")))
    functorch.autograd_cache_allow_custom_autograd_functions = True
    inductor.unsafe_marked_cacheable_functions = {
        f"torch.amp.autocast_mode.{name}_autocast": key for name in ("_enter", "_exit")}


def run(main_function, memory: str = "--batch_size (and raise --grad_accumulation_steps to match), "
        "or --val_batch_size, --sequence_length or --model") -> None:
    """Exit with the function's status; bad input is one clear line and status 2, divergence 1.

    memory: the flags to lower where there is not enough.
    """
    rank, message = None, None
    show_safely()
    keep_compilations()
    try:
        rank = ranks()[0] if "RANK" in os.environ else None
        status = main_function(sys.argv[1:]) or 0
    except (InputError, Diverged) as error:
        message, status = str(error), 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:  # outside training, which saves first
        status = 130
    except OSError as error:
        message, status = f"{error.filename or 'output'}: {error.strerror or error}", 2
    except Exception as error:
        if ran_out(error):
            message, status = f"out of memory: lower {memory} ({first_line(error)})", 2
        elif rank is None:
            raise
        else:
            traceback.print_exc()
            message, status = first_line(error), 1
    if message:
        who = "" if rank is None else f"rank {rank}: "
        print(f"error: {who}{message}", file=sys.stderr)
    if rank is not None:  # at once: NCCL would wait for the other ranks, gloo's threads may abort
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # nobody reads it any more
                stream.flush()
        os._exit(status)
    sys.exit(status)
