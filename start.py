"""Come from a command to training: facts, data, causality gate, then training in this process.

    python start.py [the trainer's flags]    # what run_afno.sh runs, once packages are there

The gate and the fetching of data are processes of their own, whose lines begin with "gate: " and
"data: ". On a GPU the trainer sets up beside the gate. Where memory is enough for both, it compiles
beside it, too. No step is made before the gate has passed.
"""
import contextlib
import importlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
BOTH = 60 * 2**30  # free bytes of a GPU that are enough for the gate beside a micro-batch


def import_compiler():
    """Import torch.compile's parts and start its processes, beside the set-up.

    The import takes 2 s. The processes import torch, and the first compilation would wait for that.
    """
    with contextlib.suppress(Exception):  # where it fails, the compilation says so
        importlib.import_module("torch._inductor.compile_fx")
        importlib.import_module("torch._inductor.async_compile").maybe_warm_pool()


def try_kernels(args, config, device):
    """Try the kernels that the run will use, beside the facts. The trainer waits for the answer.

    Where the process ends first, it ends once what compiles is done.
    """
    import torch

    from facts import kernels_of
    from kernels import try_kernels

    with contextlib.suppress(Exception):  # the trainer meets it again, and says so
        try_kernels(kernels_of(config, args), device, getattr(torch, args.dtype))


class Beside:
    """A script in a process of its own. Its lines are shown from show() on; end() ends it."""

    def __init__(self, name: str, script: str, *argv: str):
        self.name, self.shown, self.began = name, threading.Event(), time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / script), *argv], stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            env={**os.environ, "PYTHONUNBUFFERED": "1"}, start_new_session=True)
        self.printer = threading.Thread(target=self.print_lines, daemon=True)
        self.printer.start()

    def print_lines(self):
        for line in self.process.stdout:
            self.shown.wait()
            print(f"{self.name}: {line}", end="", flush=True)
        self.ended = time.perf_counter()

    def show(self):
        self.shown.set()

    def wait(self) -> tuple[int, float]:
        """Return the exit status, and the seconds that it took, once all lines are printed."""
        self.show()
        self.printer.join()
        return self.process.wait(), self.ended - self.began

    def end(self):
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGTERM)


class Gate(Beside):
    """The causality gate. The trainer waits for it where memory is not enough for both."""

    said, has_room = "", False

    def __init__(self, argv: list[str]):
        super().__init__("gate", "test_causality.py", *argv)
        self.importing = threading.Thread(target=import_compiler, daemon=True)

    def make_room(self):
        """Wait for the compiler's import, and for the verdict unless memory is enough for both."""
        if self.importing.ident:
            self.importing.join()
        if not self.has_room:
            self.verdict()

    def verdict(self) -> str:
        """Return a line that says that the gate has passed. Raises InputError where it has not."""
        from data.text_to_bin import InputError

        if not self.said:
            status, seconds = self.wait()
            if status:
                raise InputError(f"causality gate: it ended with status {status}, nothing is "
                                 "trained")
            self.said = f"causality gate: passed, {seconds:.1f} s after the start"
        return self.said


def fetch(script: str, *argv: str):
    """Fetch data by a script of data/, which leaves what is there. Raises InputError."""
    from data.text_to_bin import InputError

    child = Beside("data", f"data/{script}", *argv)
    try:
        status, _ = child.wait()
    finally:
        child.end()
    if status:
        raise InputError(f"the data are not there: {script} ended with status {status}")


def main(argv: list[str], gate: Gate) -> int:
    """Show the facts, wait for the data, train; return the exit status."""
    import train_gpt2_afno as trainer
    from checkpoints import holds_run, refuse_used
    from data.text_to_bin import ROOT, to_type
    from facts import STARTED, data_script, show_facts
    from runtime import choose_device, choose_gpus, memory_budget, refuse_too_large

    flags, said = trainer.parse_flags(argv), []
    sys.argv = [str(HERE / "train_gpt2_afno.py"), *argv]  # what torchrun and train.log repeat
    if {"generate", "eval_only"} & flags.keys():
        gate.end()
        return trainer.main(argv)
    device = choose_device(flags.get("device", "auto"))
    folder, saved, args, config = trainer.run_of(flags, device, said.append)
    if "resume" not in flags:
        refuse_used(folder, False)  # before anything is fetched
    ended = saved and saved["step"] == args.num_iterations + args.extend
    if ended or not saved and holds_run(folder):  # no step is left, or no checkpoint
        return trainer.main(argv, gate)
    trainer.refuse_untrainable(config, args)  # before the gate meets it
    refuse_too_large(trainer.GPT, config, args, device, False)
    # this process trains, unless there is one for each of several cards
    trains = choose_gpus(args.gpus, device, args.grad_accumulation_steps, said.append) == 1
    if trains:
        threading.Thread(target=try_kernels, args=(args, config, device), daemon=True).start()
    words = argv[1:] if argv[:1] == ["--preset"] else argv  # as run_afno.sh was called
    show_facts(args, folder, device, trainer.sizes_of(config, args), saved,
               shlex.join(["bash", to_type(str(ROOT / "run_afno.sh")), *words]))
    os.environ.setdefault(STARTED, "")  # the trainer shows no facts
    trainer.LAPS.done("facts")
    if args.compile and trains:
        gate.importing.start()
    gate.show()
    gate.has_room = device.type == "cuda" and memory_budget(device) >= BOTH
    if script := data_script(args):
        fetch(*script)
        trainer.LAPS.done("data")
    if device.type == "cpu":  # both would take all cores
        gate.verdict()
        trainer.LAPS.done("causality gate")
    return trainer.main(argv, gate)


if __name__ == "__main__":
    from data.text_to_bin import handled

    begun = Gate(sys.argv[1:])  # before torch is imported, which takes seconds in either process

    def leave(signum, frame):
        begun.end()
        os._exit(128 + signum)

    try:
        with handled(leave):  # an exception in the import of torch's C++ parts would abort
            from train_gpt2_afno import run  # whose clock begins before torch's import

            with handled(lambda signum, frame: sys.exit(128 + signum)):
                run(lambda argv: main(argv, begun))
    finally:
        begun.end()
