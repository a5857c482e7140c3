"""Several ranks, through gloo on the CPU: what they share out, and how a run with them ends."""
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import RefusingGate

import train_gpt2_afno
from data.text_to_bin import InputError
from runtime import RowTable, average, choose_gpus, launch, shared_out
from test_trainer import (SCRIPT, STOPPED, VOCABULARY, data, flags, losses,  # noqa: F401
                          main, newest, small, wait_for_step)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LONG = "--num_iterations 1000000 --save_every 0 --val_loss_every 0 --grad_accumulation_steps 2 " \
    "--pair_rows 50 --value_tables 1"


# -----------------------------------------------------------------------------
# how many cards


@pytest.mark.parametrize("there, micro_batches, chosen", (
    (2, 8, 2), (3, 8, 2), (4, 8, 4), (8, 8, 8), (16, 8, 8), (4, 6, 3), (2, 1, 1), (5, 7, 1)))
def test_as_many_cards_are_used_as_divide_the_micro_batches(monkeypatch, there, micro_batches,
                                                            chosen):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    said = []
    assert choose_gpus(None, CUDA, micro_batches, said.append) == chosen
    assert said == [f"{chosen} of {there} GPUs: the most that divide the {micro_batches} "
                    "micro-batches of a step (--gpus chooses)"]


def test_one_card_and_a_cpu_are_nothing_to_choose_from(monkeypatch):
    for device, there in ((CUDA, 1), (CPU, 4)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
        assert choose_gpus(None, device, 8, say=None) == 1


@pytest.mark.parametrize("device, asked, micro_batches, message", (
    (CUDA, 5, 10, "--gpus must be <= 4, the GPUs here for --device cuda, got 5"),
    (CPU, 1, 8, "--gpus must be <= 0, the GPUs here for --device cpu, got 1"),
    (CUDA, 3, 8, "--gpus must divide --grad_accumulation_steps 8, got 3")))
def test_cards_that_cannot_be_are_refused(monkeypatch, device, asked, micro_batches, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for count in (1, 2, 4):
        assert choose_gpus(count, CUDA, 8, say=None) == count
    with pytest.raises(InputError, match=f"^{message}$"):
        choose_gpus(asked, device, micro_batches, say=None)


def test_the_flag_is_checked_before_anything_is_made(data, tmp_path):  # noqa: F811
    with pytest.raises(InputError, match="--gpus must be <= 0"):
        main(flags(data, tmp_path / "run", "--gpus 2"))
    assert not (tmp_path / "run").exists()


def test_the_shell_leaves_cards_to_the_trainer(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase $1 in -*) ;; *) echo "ran $*" ;; esac\n')
    python.chmod(0o755)
    run = subprocess.run(["bash", str(SCRIPT.parent / "run_afno.sh"), "fineweb", "--gpus", "2"],
                         capture_output=True, text=True,
                         env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == \
        f"ran {SCRIPT.parent / 'start.py'} --preset fineweb --gpus 2"


def test_several_ranks_wait_for_the_gate():
    with pytest.raises(InputError, match="^causality gate: it ended"):
        launch(2, RefusingGate())


def test_ranks_started_by_hand_are_as_many_as_asked_for(data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")  # as torchrun sets it
    with pytest.raises(InputError, match="--gpus must be the number of ranks .* 2, got 4"):
        main(flags(data, tmp_path / "run", "--gpus 4"))


def test_ranks_started_by_hand_must_divide_the_micro_batches():
    """The tokens of a step stay as they are: it used to take a micro-batch more, unsaid."""
    args = train_gpt2_afno.merge_flags(dict(preset="shakespeare"), CPU, None, print)
    with pytest.raises(InputError, match="must be a multiple of the 2 ranks, got 1"):
        train_gpt2_afno.length_phases(args, 256, world=2)


@pytest.mark.parametrize("returned, status", ((None, 0), (0, 0), (143, 143)))
def test_a_rank_ends_at_once_with_its_status(returned, status):
    """Whatever threads of libraries are left, and with all that it has printed."""
    code = f"import sys; from runtime import run; run(lambda argv: print('said') or {returned})"
    ended = subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, capture_output=True,
                           text=True, env={**os.environ, "RANK": "0", "WORLD_SIZE": "2",
                                           "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"})
    assert (ended.returncode, ended.stdout) == (status, "said\n"), ended.stderr


# -----------------------------------------------------------------------------
# what travels between ranks


def average_on(rank: int, store: str):
    """Be one of three ranks; the oracle averages whole gradients."""
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=3)
    reduce = dist.all_reduce
    torch.manual_seed(0)
    for met in ((3, 5, 1), (4, 0, 2), (0, 0, 0)):
        sent, wanted, tables = [], [], [RowTable(60, 4), RowTable(90, 4)]
        for table in tables:
            own = [torch.randint(len(table.weight), (n,)) for n in met]  # of each rank, on all
            factor = torch.randn(3, 9, 4)[rank, : met[rank]]
            (table(own[rank]) * factor).sum().backward()
            wanted.append(table.weight.grad)
            table.meet(torch.cat(own).unique())
            (table(own[rank]) * factor).sum().backward()
        for g in wanted:
            reduce(g)
        dist.all_reduce = lambda x, **options: (sent.append(x.numel()), reduce(x, **options))[1]
        end = average([table.gradient for table in tables])
        dist.all_reduce = reduce
        end()
        for table, sums in zip(tables, wanted):
            assert ((table.gradient - sums[table.met[0]] / 3).abs() < 1e-6).all()
            assert sums.any(1).sum() == len(table.met[0])
        rows = sum(len(table.met[0]) for table in tables)
        assert sum(sent) == 4 * rows <= 2 * 4 * sum(met), sent  # rows that were met
    dist.destroy_process_group()  # else its threads may abort the process at its end


def share_on(rank: int, store: str):
    """Be one of three ranks; the oracle squares all matrices by itself."""
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=3)
    shares = {1: (1, 0, 0), 2: (1, 1, 0), 3: (1, 1, 1), 4: (2, 2, 0), 7: (3, 3, 1)}
    for n, taken in shares.items():
        stacked = torch.randint(-9, 9, (n, 4, 2), generator=torch.Generator().manual_seed(n))
        stacked, given = stacked.bfloat16(), []
        end = shared_out(lambda x: (given.append(len(x)), x * x + 1)[1], stacked)
        assert torch.equal(end(), stacked**2 + 1)  # small whole numbers: exact in bf16
        assert sum(given) == taken[rank], (n, given)
    dist.destroy_process_group()


@pytest.mark.parametrize("work", (average_on, share_on))
def test_three_ranks_share_what_they_should(tmp_path, work):
    """Tables: other rows each, one rank with none. Matrices: fewer than ranks, and more."""
    fork = multiprocessing.get_context("fork")  # spares three imports of torch
    ranks = [fork.Process(target=work, args=(rank, f"file://{tmp_path}/store"))
             for rank in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]


# -----------------------------------------------------------------------------
# how runs end


@pytest.fixture(scope="session")
def script(tmp_path_factory) -> Path:
    """The trainer of `small` on two ranks; rank 1 does what BAD says in the step after 3."""
    path = tmp_path_factory.mktemp("script") / "ranks.py"
    path.write_text(f"""
import datetime, os, signal, sys, time
sys.path.insert(0, {str(SCRIPT.parent)!r})
import torch
import runtime
import train_gpt2_afno as trainer
from checkpoints import Checkpoints
from data.text_to_bin import InputError

BAD = os.environ.get("BAD")
trainer.MODELS["d4"] = (2, 16)
fields, save = trainer.model_fields, Checkpoints.save
next_batches, goals = trainer.Run.next_batches, trainer.Run.goals

def bad_batches(run):
    if run.step == 3 and run.runtime.rank == 1:
        if BAD == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif BAD == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        elif BAD == "data":
            raise InputError("a token too large")
        elif BAD == "stuck":
            stuck()
        elif BAD == "stuck in a step":
            trainer.average = stuck
    return next_batches(run)

def stuck(*_):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(600)

def goals_and_signal(run, y, **step):
    if BAD == "signal" and run.step == 3 and run.runtime.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return goals(run, y, **step)

def slow_save(checkpoints, state):
    if BAD == "slow" and state["step"] == 0:
        time.sleep(7)
    save(checkpoints, state)

if BAD in ("stuck", "stuck in a step", "slow"):
    runtime.LONGEST_WAIT = datetime.timedelta(seconds=5)
trainer.model_fields = lambda values: fields(values) | dict(vocab_size={VOCABULARY})
trainer.measure_matmul_rate = trainer.report_at_end = lambda *_: 1e12
trainer.refuse_too_large = lambda *_: None  # so the launcher imports no compiler
trainer.choose_gpus = lambda *_: 1 if "RANK" in os.environ else 2
trainer.Run.next_batches, Checkpoints.save = bad_batches, slow_save
trainer.Run.goals = goals_and_signal
runtime.run(trainer.main)
""")
    return path


def start(script: Path, arguments: list[str], bad: str = "") -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(script), *arguments], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "BAD": bad, "OMP_NUM_THREADS": "1"})


def errors(text: str) -> list[str]:
    """Return the trainer's own messages, in their order; they may come after a bar."""
    return re.findall("error: rank .*", text)


@pytest.mark.slow
def test_from_one_rank_to_two_which_die_and_back(data, tmp_path, script):  # noqa: F811
    options = "--grad_accumulation_steps 4 --save_every 1 --num_iterations "
    main(flags(data, tmp_path / "whole", options + "5"))
    main(flags(data, tmp_path / "run", options + "2 --warmdown_iters 2"))
    resume = options + "5 --resume auto"
    two = start(script, flags(data, tmp_path / "run", resume), "killed")
    _, said = two.communicate(timeout=60)
    assert two.returncode == 128 + signal.SIGKILL, said
    assert errors(said)[-1] == "error: rank 1 was killed by SIGKILL"
    assert newest(tmp_path / "run")["step"] == 3
    main(flags(data, tmp_path / "run", resume))
    assert newest(tmp_path / "run")["position"] == newest(tmp_path / "whole")["position"]
    for a, b in zip(losses(tmp_path / "run")[2:], losses(tmp_path / "whole")[2:], strict=True):
        assert a == (b[0], pytest.approx(b[1], rel=1e-2))


@pytest.mark.slow
def test_two_ranks_train_tables_as_one_does(data, tmp_path, script):  # noqa: F811
    """At two lengths of rows: the same losses, and the same rows move.

    One rank gets a signal in the first of a step's two micro-batches. Both give the step up, and
    later go on.
    """
    options = "--pair_rows 50 --value_tables 1 --predict_ahead 1 " \
        "--grad_accumulation_steps 4 --num_iterations 7 --curriculum 8:0.5,16:0.5"
    main(flags(data, tmp_path / "one", options))
    resume = flags(data, tmp_path / "two", options + " --resume auto")
    two = start(script, resume, "signal")
    _, said = two.communicate(timeout=60)
    assert two.returncode == STOPPED and newest(tmp_path / "two")["step"] == 3, said
    two = start(script, resume)
    _, said = two.communicate(timeout=60)
    assert two.returncode == 0, said
    for a, b in zip(losses(tmp_path / "two"), losses(tmp_path / "one"), strict=True):
        assert a == (b[0], pytest.approx(b[1], rel=1e-4))
    one, two = (newest(tmp_path / name)["model"] for name in ("one", "two"))
    for name in one:
        assert (one[name] - two[name]).abs().max() <= 1e-3 * one[name].abs().max(), name
    moved = one["pairs.weight"].any(1)
    assert not moved.all() and torch.equal(moved, two["pairs.weight"].any(1))


@pytest.mark.slow
def test_rank_0_decides_when_all_save_by_time(data, tmp_path, script):  # noqa: F811
    """A rank dies in the step after 3; no step is saved by its number but the first."""
    two = start(script, flags(data, tmp_path / "run", LONG + " --save_minutes 0.000001"), "killed")
    _, said = two.communicate(timeout=60)
    assert two.returncode == 128 + signal.SIGKILL, said
    assert newest(tmp_path / "run")["step"] in (1, 2, 3)


@pytest.mark.slow
def test_a_signal_to_the_launcher_saves_and_ends_as_on_one_card(data, tmp_path,  # noqa: F811
                                                                script):
    """And nobody minds that the first checkpoint takes rank 0 longer than ranks wait otherwise."""
    run = start(script, flags(data, tmp_path / "run", LONG), "slow")
    wait_for_step(tmp_path / "run", 3, run)
    run.send_signal(signal.SIGTERM)
    out, said = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM and not errors(said), said
    step = newest(tmp_path / "run")["step"]
    assert step >= 3 and losses(tmp_path / "run")[-1][0] == step
    assert f"stopped by SIGTERM at step {step}" in out
    assert re.search(r"peak memory of each rank: \d+, \d+ MiB", out)


@pytest.mark.slow
@pytest.mark.parametrize("bad, status, message, kept", (
    ("memory", 2, "error: rank 1: out of memory: lower --batch_size", 0),
    ("data", 2, "error: rank 1: a token too large", 3),
    ("stuck", 1, "error: rank 0: .*[Tt]imed? ?out", 0),
    ("stuck in a step", 1, "error: rank 0: .*[Tt]imed? ?out", 0)))
def test_a_rank_that_fails_alone_ends_the_run_and_is_named(data, tmp_path, script,  # noqa: F811
                                                           bad, status, message, kept):
    run = start(script, flags(data, tmp_path / "run", LONG), bad)
    _, said = run.communicate(timeout=60)
    assert run.returncode == status, said
    assert any(re.match(message, line) for line in errors(said)), said
    assert re.fullmatch(r"error: rank [01] ended with status \d", errors(said)[-1])
    assert newest(tmp_path / "run")["step"] == kept
