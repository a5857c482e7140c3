"""What a run leaves behind: its folder, its checkpoints, its log; and --eval_only and --generate.

Files are written so that a kill at any moment damages none, and read so that damage is refused.
The trainer says what its checkpoints must hold: its flags, its model, its optimizers.
"""
import contextlib
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from data.loader import TokenStream, count_val_tokens
from data.text_to_bin import (ROOT, InputError, first_line, relative, show, sync_folder, to_path,
                              to_type)
from runtime import Diverged, Runtime, evaluate, generate, source_files
from test_causality import check_generation, refuse_leaks

TIMES = ("train_time_s", "compile_time_s", "wall_time_s")
VALIDATED = ("val_loss", "tokens", "train_time_s")  # of a validation in metrics.jsonl
NEEDED = {"optimizer", "input_bin", "input_val_bin"}  # of the flags: each has a value


# -----------------------------------------------------------------------------
# checkpoints


class Checkpoints:
    """state_step*.pt of one run: copied to the host's memory, then written by a thread.

    A file is written under another name, synced, renamed; one at a time. The two newest are kept,
    and those of the steps in `keep`. Of files set aside, the latest set is kept.
    """

    def __init__(self, folder: Path):
        self.folder, self.keep = folder, dict(best=None, cooldown=None)
        self.best, self.last = math.inf, None  # the best one's loss, the step saved last
        self.memory, self.writing, self.seconds = {}, None, 0.0  # of the last write
        self.thread = ThreadPoolExecutor(1)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        """Wait for the write under way; where there is an error already, that one counts."""
        self.thread.shutdown()
        with contextlib.suppress(InputError) if error else contextlib.nullcontext():
            self.wait()

    def paths(self) -> list[Path]:
        """Return the files, newest first."""
        found = [path for path in self.folder.glob("state_step*.pt")
                 if re.fullmatch(r"state_step\d+\.pt", path.name)]
        return sorted(found, key=self.step_of, reverse=True)

    def steps(self) -> list[int]:
        return [self.step_of(path) for path in self.paths()]

    @staticmethod
    def step_of(path: Path) -> int:
        return int(re.sub(r"\D", "", path.name))

    def kept(self) -> str:
        return ", ".join(path.name for path in self.paths()) or "none"

    def aside(self) -> list[Path]:
        """Return the files that were set aside; no run reads them."""
        return sorted(self.folder.glob("state_step*.pt.abandoned"))

    def set_aside_after(self, step: int, say):
        """Rename checkpoints later than `step`: a run that goes on from there has not made them.

        Where there are any, those set aside before are removed: so they never fill a disk.
        """
        later = [path for path in self.paths() if self.step_of(path) > step]
        for old in self.aside() if later else ():
            old.unlink()
            say(f"{old.name}, set aside before, is removed")
        for path in later:
            path.replace(path.with_suffix(".pt.abandoned"))
            say(f"{path.name} is set aside as {path.name}.abandoned, step {step} is the last that "
                "counts")
        for part in self.folder.glob("state_step*.pt.*part"):
            part.unlink()  # of a run that was killed while saving

    def save(self, state: dict):
        """Copy the state, and begin to write the copy; first wait for the write before."""
        self.wait()
        self.last = state["step"]
        copy, copied = self.copy(state), None
        if torch.cuda.is_initialized():
            copied = torch.cuda.Event()
            copied.record()
        self.writing = self.thread.submit(self.write, copy, copied)

    def copy(self, state: dict) -> dict:
        """Return the state with copies of its tensors, in the memory of the copies before.

        Steps that follow on a GPU's stream begin after the copies, and the host does not wait.
        """
        before, self.memory = self.memory, {}

        def copied(x):
            if isinstance(x, dict):
                return {key: copied(value) for key, value in x.items()}
            if isinstance(x, list):
                return [copied(value) for value in x]
            if not isinstance(x, Tensor):
                return x
            key = x.data_ptr(), x.shape, x.dtype  # tied weights stay one
            if key not in self.memory:
                there = before.get(key)
                if there is None:
                    there = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
                self.memory[key] = there.copy_(x, non_blocking=True)
            return self.memory[key]

        return copied(state)

    def write(self, state: dict, copied=None):
        """Write the state once it is copied; raise InputError where that fails."""
        begin = time.perf_counter()
        path = self.folder / f"state_step{state['step']:06d}.pt"
        part = path.with_suffix(f".pt.{os.getpid()}.part")
        try:
            if copied:
                copied.synchronize()
            self.folder.mkdir(parents=True, exist_ok=True)  # somebody may have removed it
            with open(part, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except (OSError, RuntimeError) as error:  # torch.save turns some write errors into these
            part.unlink(missing_ok=True)
            cause = error if isinstance(error, OSError) else error.__context__
            reason = cause.strerror if isinstance(cause, OSError) else first_line(error)
            raise InputError(f"--output_dir: cannot write {path.name}: {reason}; "
                             f"checkpoints kept: {self.kept()}") from None
        sync_folder(self.folder)
        self.remove_old()
        self.seconds = time.perf_counter() - begin

    def remove_old(self):
        for old in self.paths()[2:]:
            if self.step_of(old) not in self.keep.values():
                old.unlink(missing_ok=True)

    def note(self, loss: float, step: int):
        """Keep this step's file, if there is one or will be, as the best where the loss is.

        The one before is removed when a write under way has ended.
        """
        if loss < self.best and step in (self.last, *self.steps()):
            self.best, self.keep["best"] = loss, step
            self.thread.submit(self.remove_old)

    def wait(self):
        """Wait for the write under way; raise InputError where it fails."""
        writing, self.writing = self.writing, None
        if writing:
            writing.result()

    def busy(self) -> bool:
        """Return whether a write is under way; raise InputError where the last one has failed."""
        if self.writing and self.writing.done():
            self.wait()
        return self.writing is not None

    @staticmethod
    def load(path: Path) -> dict:
        """Return what save() wrote; raise any exception where the file is not whole and sound."""
        demand_checksums(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        wanted = {"model", "optimizers", "step", "position", "config", "args", "rng", *TIMES}
        if missing := wanted - set(state):
            raise ValueError(f"not a checkpoint of this trainer, {min(missing)} is missing")
        return state

    def newest(self, sound, say, last: float = math.inf) -> dict | None:
        """Return the newest sound one, None where there never was one; say which are not sound.

        sound(state, path): the state in this version's names; raises OtherVersion or, for damage,
        any other exception. last: the last step that may be taken.
        """
        for path in self.paths():
            if self.step_of(path) > last:
                continue
            try:
                return sound(self.load(path), path)
            except OtherVersion:  # the ones before are not for this version either
                raise
            except Exception as error:  # a truncated archive fails in many ways
                say(f"warning: {path.name} cannot be read ({first_line(error)}): "
                    "trying the one before")
        if last < math.inf:
            raise InputError(f"--extend goes on from step {last} or one before, where the cooldown "
                             f"had not begun; checkpoints kept: {self.kept()}")
        if found := sorted(path.name for path in self.folder.glob("state_step*.pt*")
                           if path.suffix in (".pt", ".abandoned")):
            raise InputError(f"no readable checkpoint in {self.folder}, which has "
                             f"{', '.join(found)}")
        return None


class OtherVersion(InputError):
    """Say that a whole checkpoint is of another version of this trainer."""


def of_this_version(state: dict, path: Path, flags: dict[str, dict]) -> dict:
    """Return the checkpoint in this version's names; raise OtherVersion for what is gone.

    flags: {name: Flag} of the trainer, for the checkpoint's config and for its args. A flag that is
    gone, and was off, does not matter.
    """
    for part, known in flags.items():
        values = state[part]
        if gone := sorted(name for name in values if name not in known and values[name]):
            raise OtherVersion(f"{relative(str(path))} is of another version of this trainer, "
                               f"which had {', '.join(gone)}: its train.log names that version")
        for name in set(values) - set(known):
            del values[name]
    for name, value in state["config"].items():
        flag = flags["config"][name]
        if {type(value), type(flag.default)} == {str} and not flag.kind.accepts(value):
            raise OtherVersion(f"{relative(str(path))} is of another version of this trainer: "
                               f"--{name} must be {flag.kind.words}, got {value}")
    return state


def demand(good, name: str):
    """Raise ValueError where a checkpoint's content, called `name`, is not good."""
    if not good:
        raise ValueError(f"{name} is damaged")


def demand_like(found: dict, wanted: dict, name: str):
    """Raise ValueError where tensors have not the names, shapes and dtypes of others, or NaN."""
    demand(isinstance(found, dict) and found.keys() == wanted.keys(), name)
    for key, like in wanted.items():
        x = found[key]
        demand(isinstance(x, Tensor) and x.layout == torch.strided and x.is_contiguous()
               and (x.shape, x.dtype) == (like.shape, like.dtype), f"{name}.{key}")
        demand(x.isfinite().all(), f"{name}.{key} (not finite)")


def demand_checksums(path: Path):
    """Raise ValueError or zipfile's errors where bytes of a file of torch.save have changed."""
    with zipfile.ZipFile(path) as archive:
        if bad := archive.testzip():
            raise ValueError(f"checksum of {bad} is wrong")


def refuse_damaged_values(state: dict, flags: dict):
    """Raise ValueError where a checkpoint's flags, numbers or random states cannot be.

    flags: {name: Flag} of its args.
    """
    demand(state["args"].keys() >= NEEDED, "args")
    for name, value in state["args"].items():
        absent = value is None and flags[name].default is None and name not in NEEDED
        demand(absent or flags[name].kind.accepts(value), f"args.{name}")
    for name in ("step", "position", "data_tokens", "pass_began", *TIMES):
        value = state.get(name, 0)  # before there was a key for it
        demand(type(value) in ((int, float) if name in TIMES else (int,)) and 0 <= value < 1e18,
               name)
    torch.Generator().set_state(state["rng"]["cpu"])
    cuda = state["rng"]["cuda"]
    demand(cuda is None or isinstance(cuda, Tensor) and cuda.dtype == torch.uint8, "rng.cuda")


def refuse_damaged_weights(found: dict, model: nn.Module) -> bool:
    """Raise ValueError where weights are not those of the model, on the device meta.

    Return False where they have other names and the same shapes. Those are of another version:
    load_weights says so.
    """
    wanted = model.state_dict()
    demand(isinstance(found, dict) and all(isinstance(x, Tensor) for x in found.values()), "model")
    names = lambda weights: {re.sub(r"\d+", "", name) for name in weights}
    shapes = lambda weights: sorted(x.shape for x in weights.values())
    if names(found) != names(wanted) and shapes(found) == shapes(wanted):
        return False
    demand_like(found, wanted, "model")
    return True


def refuse_other_matrices(states: dict, parameters: list[Tensor]):
    """Raise OtherVersion where Muon's averages are of as many numbers, in other matrices."""
    shapes = [x["momentum_buffer"].shape for x in states.values() if "momentum_buffer" in x]
    wanted = [p.shape for p in parameters]
    if shapes != wanted and sum(map(math.prod, shapes)) == sum(map(math.prod, wanted)):
        raise OtherVersion("the checkpoint is of another version of this trainer, whose Muon took "
                           "value, key and query together: its train.log names it")


def refuse_damaged_tensors(state: dict, model: nn.Module, make_optimizers):
    """Raise ValueError where weights and averages are not those of the model, on the device meta.

    make_optimizers(): the model's.
    """
    if not refuse_damaged_weights(state["model"], model):
        return
    optimizers = make_optimizers()
    demand(len(state["optimizers"]) == len(optimizers), "optimizers")
    for optimizer, found in zip(optimizers, state["optimizers"]):
        there, wanted = ([group["params"] for group in part["param_groups"]]
                         for part in (found, optimizer.state_dict()))
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        kind = type(optimizer).__name__
        if kind == "Muon":
            refuse_other_matrices(found["state"], parameters)
        # before the first step there is none
        steps = range(len(parameters)) if state["step"] else ()
        demand(there == wanted and found["state"].keys() == {*steps}, "an optimizer")
        for i, values in found["state"].items():
            p = parameters[i]
            like = dict(step=torch.zeros(()), exp_avg=p, exp_avg_sq=p) if kind == "AdamW" else \
                dict(momentum_buffer=p) if kind == "Muon" else dict(square=p[:, :1])
            demand_like(values, like, f"an optimizer.{i}")


def not_finite(weights: dict, optimizers: list[dict]) -> str | None:
    """Return the name of a tensor that holds NaN or infinity; wait for a GPU once."""
    named = [*weights.items(), *((f"{name} of an optimizer", x) for optimizer in optimizers
                                 for values in optimizer["state"].values()
                                 for name, x in values.items())]
    device = named[0][1].device
    finite = torch.stack([x.isfinite().all().to(device) for _, x in named]).tolist()
    return next((name for (name, _), good in zip(named, finite) if not good), None)


def load_weights(model: nn.Module, weights: dict, folder: Path):
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # of another version of this code
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{relative(str(folder))}: the checkpoint does not fit this version's "
                         f"model ({reason})") from None


def load_optimizers(optimizers: list, states: list[dict], folder: Path):
    """Load averages; rates and such stay the flags'."""
    for optimizer, state in zip(optimizers, states, strict=True):
        chosen = [{name: value for name, value in group.items() if name != "params"}
                  for group in optimizer.param_groups]
        if len(chosen) != len(state["param_groups"]):
            raise InputError("--rest_lr makes groups of parameters: give it from the first step "
                             f"on, or never; {relative(str(folder))} began otherwise")
        optimizer.load_state_dict(state)
        for group, values in zip(optimizer.param_groups, chosen):
            group.update(values)


def random_state(device: torch.device) -> dict:
    cuda = torch.cuda.get_rng_state() if device.type == "cuda" else None
    return dict(cpu=torch.get_rng_state(), cuda=cuda)


def set_random_state(state: dict, device: torch.device):
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


# -----------------------------------------------------------------------------
# log


def record_source(folder: Path) -> list[str]:
    """Return lines that name the code that runs; keep in folder/source what no commit holds.

    With git: the commit, the diff to it where there is one, and files that git does not know.
    Without: the files themselves.
    """
    files = source_files(ROOT)
    names = [str(path.relative_to(ROOT)) for path in files]
    git = ["git", "-C", str(ROOT)]
    run = lambda *words: subprocess.run([*git, *words], capture_output=True, check=True).stdout
    try:
        commit, diff = run("rev-parse", "HEAD").decode().strip(), run("diff", "HEAD", "--", *names)
        kept = run("ls-files", "--others", "--", *names).decode().splitlines()
    except (OSError, subprocess.CalledProcessError):
        commit, diff, kept = "none (no git here): the source is in source/", b"", names
    else:
        commit += " and source/" * bool(kept)
    for name in kept:
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / "source" / name)
    if diff:
        (folder / "source").mkdir(parents=True, exist_ok=True)
        name = f"{hashlib.sha256(diff).hexdigest()[:12]}.diff"
        (folder / "source" / name).write_bytes(diff)
        commit += f" and source/{name}"
    return [f"commit: {commit}", *(f"sha256: {hashlib.sha256(path.read_bytes()).hexdigest()} {name}"
                                   for path, name in zip(files, names))]


def read_metrics(folder: Path) -> list[tuple[str, dict]]:
    """Return (line, its values) of metrics.jsonl, without the lines that are damaged or cut off."""
    path, found = folder / "metrics.jsonl", []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines(keepends=True):
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            values = json.loads(line)
            if line.endswith("\n") and values["step"] >= 0:
                numbers = {name: float(values[name]) for name in VALIDATED if "val_loss" in values}
                found.append((line, values | numbers))
    return found


def is_summary(values: dict) -> bool:
    return "wall_clock_time_to_target_loss" in values


def read_log(folder: Path) -> str:
    path = folder / "train.log"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


@dataclass
class Process:
    """What train.log says of a process of a run."""

    start: int  # the step at which it began
    joules: float | None  # what its GPUs used until its last save or its end
    ended: bool  # with a summary: it was not killed, and did not fail


def processes(log: str) -> list[Process]:
    """Return the processes that have written a train.log, in their order."""
    found = []
    for part in re.split("^command: ", log, flags=re.MULTILINE)[1:]:
        start = re.match(r".*, resumed at step (\d+)\n", part)
        joules = re.findall(r"^energy: (\S+) J", part, re.MULTILINE)
        found.append(Process(int(start[1]) if start else 0, float(joules[-1]) if joules else None,
                             bool(re.search("^tokens/s: ", part, re.MULTILINE))))
    return found


def energy_used(log: str) -> float:
    """Return the joules of all processes, as far as they are known."""
    return sum(process.joules or 0 for process in processes(log))


class RunLog:
    """Write train.log (the version, all that the run says, energy) and metrics.jsonl of a run."""

    def __init__(self, folder: Path, step: int):
        """Go on after `step`; -1 is a new run's."""
        self.folder, self.step = folder, step
        with self.errors():
            folder.mkdir(parents=True, exist_ok=True)
            kept = [values for _, values in read_metrics(folder) if values["step"] <= step]
            self.validations = validations_of(kept)
            for text in record_source(folder):
                self.line(text)

    @contextlib.contextmanager
    def errors(self):
        try:
            yield
        except OSError as error:
            raise InputError(f"--output_dir {self.folder} is not writable: {error.strerror}; "
                             f"checkpoints kept: {Checkpoints(self.folder).kept()}") from None

    def cut_back(self, checkpoints: "Checkpoints", say):
        """Set aside checkpoints and lines after the step, and summaries; drop damaged lines."""
        kept, aside, path = [], [], self.folder / "metrics.jsonl"
        with self.errors():
            checkpoints.set_aside_after(self.step, say)
            for line, values in read_metrics(self.folder):
                counts = values["step"] <= self.step and not is_summary(values)
                (kept if counts else aside).append(line)
            if aside:  # before it is gone from the other
                self.line("".join(aside).removesuffix("\n"), "metrics.jsonl.abandoned")
                (self.folder / "report.md").unlink(missing_ok=True)  # it is of what does not count
            part = path.with_suffix(".jsonl.part")
            part.write_text("".join(kept), encoding="utf-8")
            part.replace(path)
        for line in self.validations:  # only now: what is not kept is removed
            checkpoints.note(line["val_loss"], line["step"])

    def line(self, text: str, name: str = "train.log"):
        with self.errors():
            self.folder.mkdir(parents=True, exist_ok=True)  # somebody may have removed it
            # opened each time: so it is the file of that name; names in it need not be UTF-8
            with open(self.folder / name, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text + "\n")

    def error(self, error: Exception):
        """Write the error that ends the run as the last line, if the disk takes it."""
        with contextlib.suppress(InputError):
            self.line(f"error: {error}")

    def metric(self, **values):
        """Log numbers by name, with nine digits: they tell all numbers of fp32 apart."""
        values = {name: float(f"{value:.9g}") if isinstance(value, float) else value
                  for name, value in values.items()}
        self.line(json.dumps(values), "metrics.jsonl")
        if {"val_loss", "val_loss_fp32"} & values.keys():
            self.validations = validations_of([*self.validations, values])

    def hits(self, target: float) -> list[float]:
        """Return the training seconds of the validations that have reached a target."""
        return [line["train_time_s"] for line in self.validations if loss_of(line) <= target]


def validations_of(rows: list[dict]) -> list[dict]:
    """Return the validations among lines of metrics.jsonl, each with its loss in fp32, if any."""
    found = {}  # by step: its second, after a signal in its fp32, counts alone
    for row in rows:
        if "val_loss" in row:
            found[row["step"]] = row
        elif "val_loss_fp32" in row and row["step"] in found:
            found[row["step"]] = found[row["step"]] | row
    return [*found.values()]


def loss_of(line: dict) -> float:
    """Return a line's loss: validation's in fp32, else validation's, else training's."""
    return next(line[name] for name in ("val_loss_fp32", "val_loss", "train_loss") if name in line)


# -----------------------------------------------------------------------------
# the schedule, and what to do where it was too short

SLOPE = -0.175  # of the loss by ln(tokens): the hybrid d12, T = 2048 (experiments/LOG.md)
FLATTENS = 0.28  # that slope falls as tokens^-0.28 (Hoffmann et al., 2022, eq. 10)
FAR = 100  # times the tokens so far: beyond that nothing is estimated


def fall_steps(args: dict) -> int:
    """Return the steps of the cooldown: the flag's, or the baseline's share."""
    given = args["warmdown_iters"]
    return round(args["num_iterations"] * 1024 / 4768) if given is None else given


def at_length(preset: dict, flags: dict) -> dict:
    """Return the preset with its share of falling steps at the flags' num_iterations."""
    if "warmdown_iters" not in preset or "num_iterations" not in flags:
        return preset
    share = preset["warmdown_iters"] / preset["num_iterations"]
    return preset | dict(warmdown_iters=round(share * flags["num_iterations"]))


def cooldown_step(args: dict) -> int:
    """Return the step at which the cooldown of a run with these flags begins."""
    return max(0, args["num_iterations"] + (args.get("extend") or 0) - fall_steps(args))


def measured_slope(lines: list[dict]) -> float | None:
    """Return d loss / d ln(tokens) by least squares, None where it is no fall.

    It needs two lines of metrics.jsonl.
    """
    points = [(math.log(line["tokens"]), loss_of(line)) for line in lines]
    if len(points) < 2:
        return None
    x, y = ([point[i] - sum(p[i] for p in points) / len(points) for point in points]
            for i in range(2))
    slope = sum(a * b for a, b in zip(x, y)) / sum(a * a for a in x)
    return slope if slope < 0 else None


def more_steps(validations: list[dict], losses: list[dict], target: float,
               args) -> tuple[float, str]:
    """Return how many more steps the target may take, inf for never, and what that rests on.

    losses: lines of training's. The loss falls by ln(tokens) as validations do in the last quarter
    of the constant phase. Where there are not two, it falls as training's losses do in the second
    half, or, where these hold further targets, as the last two validations there. Then it falls as
    FLATTENS says: loss - E = b tokens^-a has the slope -a b tokens^-a.
    """
    last, end = validations[-1], cooldown_step(vars(args))
    within = lambda lines, first: [line for line in lines
                                   if max(1, args.warmup_iters, first) <= line["step"] <= end]
    late = within(validations, (args.warmup_iters + 3 * end) / 4)
    if len(late) < 2:  # before the second half the loss falls faster
        further = args.predict_ahead or args.predict_prefix
        late = within(validations, end / 2)[-2:] if further else within(losses, end / 2)
    slope, whose = measured_slope(late), "this run's"
    if slope:
        slope *= (last["step"] / math.sqrt(late[0]["step"] * late[-1]["step"])) ** -FLATTENS
    else:
        slope, whose = SLOPE, "a larger model's, as this run's constant phase shows none"
    left = 1 - FLATTENS * (target - loss_of(last)) / slope  # of what tokens can still bring
    steps = last["step"] * (left ** (-1 / FLATTENS) - 1) if left > 0 else math.inf
    return max(1, math.ceil(steps)) if steps < math.inf else steps, f"{slope:.3f}, {whose}"


def trainer_command(folder: Path, stops: float | None, more: str = "") -> str:
    """Return the command that goes on in a folder, to be typed where this one was.

    stops: --target_val_loss, which is not kept.
    """
    script = to_type(str(ROOT / "train_gpt2_afno.py"))
    words = ["python", script, "--output_dir", to_type(str(folder)), "--resume", "auto"]
    return shlex.join(words) + more + (f" --target_val_loss {stops}" if stops else "")


def describe_stop(signum: int, step: int, folder: Path, stops: float | None) -> str:
    """Return a line for a run that a signal has stopped; stops: --target_val_loss."""
    return f"stopped by {signal.Signals(signum).name} at step {step}; go on with " \
        f"{trainer_command(folder, stops)}"


def describe_miss(log: RunLog, checkpoints: Checkpoints, target: float, args) -> list[str]:
    """Return lines: how far the last loss is above a target, and the command that goes on."""
    last = log.validations[-1]
    if not -math.inf < target < loss_of(last):
        return []
    losses = [values for _, values in read_metrics(log.folder) if "train_loss" in values]
    steps, whose = more_steps(log.validations, losses, target, args)
    near, by = steps <= FAR * last["step"], f"(slope of the loss by ln(tokens): {whose})"
    tokens = f"none, beyond {FAR} times as many tokens"
    if near:
        tokens = f"{round(last['tokens'] / last['step'] * steps):,} more tokens, {steps} steps"
    lines = [f"missed: val_loss {loss_of(last):.4f} is {loss_of(last) - target:.4f} above "
             f"{target:.10g}; estimate: {tokens} {by}"]
    more, sure = last["step"], ""
    if near:  # a second miss would cost another cooldown
        more, sure = math.ceil(1.2 * steps), ", with a fifth more to be sure"
    begin = cooldown_step(vars(args))
    if any(step <= begin for step in checkpoints.steps()):
        command = trainer_command(log.folder, args.target_val_loss,
                                  f" --extend {args.extend + more}")
        lines.append(f"go on from step {begin}, before the cooldown{sure}: {command}")
    else:
        lines.append("no state from before the cooldown is kept: only a new run can be longer")
    return lines


# -----------------------------------------------------------------------------
# the folder


def holds_run(folder: Path) -> bool:
    """Return whether there is a checkpoint, or the log of a run that has validated or ended.

    A run that was killed before its first checkpoint was written has none of these.
    """
    return bool(Checkpoints(folder).paths()) or any(
        "val_loss" in values or is_summary(values) for _, values in read_metrics(folder))


def refuse_used(folder: Path, resuming: bool):
    """Raise InputError where the folder of a new run holds one."""
    if holds_run(folder):
        hint = "its checkpoints are gone, remove the folder, or " if resuming else \
            "add --resume auto, or "
        raise InputError(f"--output_dir {relative(str(folder))} holds a run: {hint}name another")


def choose_folder(flags: dict, only_read: bool) -> Path | None:
    """Return the folder that --output_dir or a checkpoint names, or None for one of a new run."""
    if "output_dir" in flags:
        return to_path(flags["output_dir"])
    if flags.get("resume", "auto") != "auto":
        return to_path(flags["resume"]).parent
    if "resume" not in flags and not only_read:
        return None
    return newest_run("--output_dir")


def newest_run(name: str) -> Path:
    """Return the folder under runs/ with the newest checkpoint; raise InputError for `name`."""
    runs = sorted(ROOT.glob("runs/*/state_step*.pt"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise InputError(f"{name}: no run with a checkpoint under runs/, name the folder of one")
    return runs[-1].parent


def preset_folder(flags: dict, values: dict, same_run: set[str]) -> Path:
    """Return the folder of a run: its preset's name and the flags that differ from the preset.

    So a sweep needs no names. values: the preset's; same_run: flags that may change in a run. Long
    names, and those with signs that not every file system takes, end with a digest.
    """
    changed = [f"{name}-{show(value)}" for name, value in sorted(flags.items())
               if name not in same_run and value != values[name]]
    text = "-".join([flags["preset"], *changed])
    name = re.sub(r"[^\w.,-]+", "_", text, flags=re.ASCII)
    if name != text or len(name) > 80:
        name = f"{name[:70]}-{hashlib.sha256(os.fsencode(text)).hexdigest()[:8]}"
    return ROOT / "runs" / name


def finished(flags: dict, saved: dict | None, args, folder: Path) -> str | None:
    """Return a line where --resume auto finds a run that has ended, None where there is more to do.

    It has ended at its last step, or at --target_val_loss.
    """
    if flags.get("resume") != "auto" or {"generate", "eval_only"} & flags.keys():
        return None
    if not saved and "output_dir" in flags:  # only a preset's folder tells its flags
        return None
    lines, steps = [values for _, values in read_metrics(folder)], args.num_iterations + args.extend
    step = saved["step"] if saved else max((values["step"] for values in lines), default=-1)
    here = [values for values in lines if values["step"] == step]
    if not (found := validations_of(here)) or not any(map(is_summary, here)):
        return None
    if args.val_fp32 and args.dtype != "float32" and "val_loss_fp32" not in found[-1]:
        return None
    if step != steps and loss_of(found[-1]) > (args.target_val_loss or -math.inf):
        return None
    line = f"{relative(str(folder))} is finished: step:{step}/{steps} " \
        f"val_loss:{loss_of(found[-1]):.4f}"
    changed = [f"--{name}" for name in sorted(flags) if saved and name in args.to_save
               and args.to_save[name] != saved["args"].get(name, args.to_save[name])]
    return line + f" ({', '.join(changed)}: too late; --eval_only validates anew)" * bool(changed)


def last_to_extend(saved: dict, flags: dict) -> float:
    """Return the last step from which --extend may go on, infinity where it says nothing new."""
    there = saved["args"]
    if flags.get("extend", there.get("extend", 0)) == there.get("extend", 0):
        return math.inf
    return min(cooldown_step(there), cooldown_step(there | flags))


def saved_flags(flags: dict, folder: Path, known: dict[str, dict]) -> dict | None:
    """Return config, args and step of the checkpoint that --resume goes on from, else None.

    Its weights are not read. known: of_this_version's flags.
    """
    if "resume" not in flags:
        return None
    auto = flags["resume"] == "auto"
    for path in Checkpoints(folder).paths() if auto else [to_path(flags["resume"])]:
        with contextlib.suppress(Exception):  # the trainer reads all of it, and says what is wrong
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            state = of_this_version(state, path, known)
            refuse_damaged_values(state, known["args"])
            if not auto or state["step"] <= last_to_extend(state, flags):
                return {name: state[name] for name in ("config", "args", "step")}
    return None


def find_checkpoint(flags: dict, folder: Path, only_read: bool, sound, say) -> dict | None:
    """Return the state that --resume, --eval_only or --generate ask for, None for a new run.

    sound: as for Checkpoints.newest.
    """
    source = flags.get("resume", "auto")
    if source == "auto":
        say(f"checkpoint: newest in {relative(str(folder))}")
        state = Checkpoints(folder).newest(sound, say)
        if state is None and only_read:
            raise InputError(f"--output_dir {relative(str(folder))}: no checkpoint there")
        if state is None:
            if not holds_run(folder):
                say("there is none yet: this run begins anew")
        elif (last := last_to_extend(state, flags)) < state["step"] and not only_read:
            state = Checkpoints(folder).newest(sound, say, last)
        return state
    path = to_path(source)
    try:
        state = sound(Checkpoints.load(path), path)
    except OtherVersion:
        raise
    except Exception as error:
        raise InputError(f"--resume {source}: no readable checkpoint "
                         f"({first_line(error)})") from None
    if not only_read and holds_run(folder) and not folder.samefile(path.parent):
        raise InputError(f"--output_dir {relative(str(folder))} holds another run than --resume "
                         f"{source}: name a new folder, or go on with --resume auto")
    if not only_read and (last := last_to_extend(state, flags)) < state["step"]:
        raise InputError(f"--extend goes on from step {last} or one before, where the cooldown had "
                         f"not begun, --resume {source} is of step {state['step']}")
    return state


# -----------------------------------------------------------------------------
# --eval_only and --generate


def position_groups(T: int) -> list[tuple[int, int]]:
    """Return (begin, end) of the positions 0-63, 64-127, 128-255, ... of a row of T tokens."""
    bounds = [0, *(64 << i for i in range(T.bit_length()) if 64 << i < T), T]
    return [*zip(bounds, bounds[1:])]


def loss_by_position(total: Tensor, val_tokens: int) -> list[tuple[int, int, float]]:
    """Return (first, last, mean loss) of the positions 0-63, 64-127, 128-255, ... of a window."""
    T = len(total)
    counts = torch.full((T,), val_tokens // T)
    counts[: val_tokens % T] += 1  # the last window may be cut off
    spans = [(a, b - 1, int(counts[a:b].sum()), total[a:b].sum().item())
             for a, b in position_groups(T)]
    return [(first, last, loss / count) for first, last, count, loss in spans if count]


def rows_to_read(flags: dict, args, trained: int) -> int:
    """Return --val_batch_size as typed, or rows of as many tokens as trained, two at least."""
    rows = args.val_batch_size
    return rows if "val_batch_size" in flags else min(
        rows, max(2, rows * trained // args.sequence_length))


def read_checkpoint(flags: dict, args, model: nn.Module, runtime: Runtime, saved: dict,
                    folder: Path, say):
    """Generate from a checkpoint, or print its validation loss, also by position.

    model: of the checkpoint's config, on its device.
    """
    config = model.config
    load_weights(model, saved["model"], folder)
    rows, T = args.val_batch_size, args.sequence_length
    say(f"step {saved['step']}, {runtime.device.type}, {args.dtype}, sequence length {T} "
        f"(trained at {config.sequence_length})"
        + f"; the causality check of {rows} rows comes first" * ("generate" not in flags))
    if "generate" in flags:
        if (off := check_generation(model, min(T, 128), runtime.device)) > 1e-4:
            raise InputError(f"--generate: token by token the model is {off:.1e} off its parallel "
                             "pass, more than 1e-4: it would not write what was trained")
        return generate(model, flags["generate"], args, T, runtime)
    model.check_length(T)
    if runtime.compile:
        model.compile()
    refuse_leaks(model, [(rows, T)], runtime, say, modes=(False,))
    val_stream = TokenStream(args.input_val_bin, config.vocab_size, "input_val_bin")
    val_tokens = count_val_tokens(args.val_tokens, val_stream)
    total = evaluate(model, val_stream, val_tokens, rows, T, runtime)
    loss = total.sum().item() / val_tokens
    print(f"step:{saved['step']} sequence_length:{T} val_tokens:{val_tokens} val_loss:{loss:.4f}")
    if not math.isfinite(loss):
        raise Diverged(f"validation loss {loss}")
    for first, last, loss in loss_by_position(total, val_tokens):
        print(f"positions {first}-{last}: {loss:.4f}")
