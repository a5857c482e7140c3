"""How a run starts: what it says first, the micro-batch that fits, what run_afno.sh does."""
import argparse
import contextlib
import os
import queue
import re
import signal
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from helpers import RefusingGate

import checkpoints
import facts
import runtime
import start
import test_causality
import train_gpt2_afno
from checkpoints import TIMES, random_state
from data.text_to_bin import InputError
from runtime import choose_dtype, memory_budget, next_smaller, with_fewer_rows
from test_trainer import (CPU, SCRIPT, assert_same, data, flags, full_size,  # noqa: F401
                          losses, main, newest, small, validations)
from train_gpt2_afno import PRESETS, GPTConfig, Run

GIB = 2**30
CUDA = torch.device("cuda", 0)


# -----------------------------------------------------------------------------
# the micro-batch that fits


@pytest.mark.parametrize("preset, unit, chain", (
    ("fineweb", 16, [(32, 0), (16, 0), (8, 0), (4, 0), (4, 1), (2, 1), (1, 1)]),
    ("fineweb-4k", 16, [(8, 0), (4, 0), (2, 0), (1, 0), (1, 1)]),
    ("baseline", 4 * 1024, [(16, 0), (8, 0), (4, 0), (4, 1)])))
def test_fewer_rows_are_tried_then_recomputing_then_fewer_still(preset, unit, chain):
    args = train_gpt2_afno.merge_flags(dict(preset=preset), CPU, None, print)
    tried = [(args.batch_size, args.recompute)]
    while following := next_smaller(*tried[-1], args.sequence_length, unit):
        tried.append(following)
    assert tried == chain


def test_an_odd_number_of_rows_is_not_halved():
    assert next_smaller(5, 0, 4096, 16) == (5, 1) and next_smaller(5, 1, 4096, 16) is None


@pytest.fixture
def card(monkeypatch):
    """Return a function that makes a GPU of this CPU: so many rows fit, so many with recompute.

    It returns the list of what is tried.
    """
    merge, attempt, tried = train_gpt2_afno.merge_flags, Run.attempt, []
    most, free = [0, 0], [1e12]
    preset = dict(batch_size=8, grad_accumulation_steps=1)
    monkeypatch.setitem(PRESETS, "baseline", PRESETS["baseline"] | preset)
    monkeypatch.setattr(runtime, "FEW_TOKENS", 32)
    monkeypatch.setattr(runtime, "memory_budget", lambda device: free[0])

    def merged(given, *more):
        args = merge(given, *more)
        args.may_shrink = "batch_size" not in given
        return args

    def limited(run, rows, recompute, *more):
        tried.append((rows, recompute))
        attempt(run, rows, recompute, *more)
        torch.rand(3)  # a compiler may draw
        if rows > most[recompute]:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train_gpt2_afno, "merge_flags", merged)
    monkeypatch.setattr(Run, "attempt", limited)

    def make(rows: int, recomputed: int = 0, memory: float = 1e12) -> list:
        most[:], free[:] = [rows, max(rows, recomputed)], [memory]
        tried.clear()
        return tried

    return make


def untyped(data, out, more: str = "") -> list[str]:  # noqa: F811
    """Return flags without those of the micro-batch."""
    text = " ".join(flags(data, out, more))
    return text.replace("--batch_size 2 --grad_accumulation_steps 1 ", "").split()


def lines_of(out, begin: str) -> list[str]:
    return re.findall(f"^{begin}.*", (out / "train.log").read_text(), re.MULTILINE)


@pytest.mark.slow
def test_what_does_not_fit_becomes_more_micro_batches(data, tmp_path, card):  # noqa: F811
    """The trial changes nothing: the run equals one whose flags were typed, bit for bit."""
    tried = card(2)
    main(untyped(data, tmp_path / "tried"))
    assert tried == [(8, 0), (4, 0), (2, 0)]
    (said,) = lines_of(tmp_path / "tried", "micro-batch: ")
    assert said.startswith("micro-batch: 2 rows x 4, because 4 rows of 16 need more than the ")
    typed = "--batch_size 2 --grad_accumulation_steps 4"
    main(untyped(data, tmp_path / "typed", typed))
    a, b = newest(tmp_path / "tried"), newest(tmp_path / "typed")
    assert_same(a, b)
    assert losses(tmp_path / "tried") == losses(tmp_path / "typed")


def test_what_fits_stays_as_it_was_asked_for(data, tmp_path, card):  # noqa: F811
    tried = card(8)
    main(untyped(data, tmp_path / "tried", "--num_iterations 7"))
    assert tried == [(8, 0)]
    (said,) = lines_of(tmp_path / "tried", "micro-batch: ")
    assert said.startswith("micro-batch: 8 rows x 1, as asked for; ")
    main(untyped(data, tmp_path / "typed",
                 "--num_iterations 7 --batch_size 8 --grad_accumulation_steps 1"))
    assert not lines_of(tmp_path / "typed", "micro-batch: ")
    assert_same(newest(tmp_path / "tried"), newest(tmp_path / "typed"))
    (start,) = lines_of(tmp_path / "tried", "seconds to the first step: ")
    assert re.search(r"imports [\d.]+, set-up [\d.]+, .*causality check [\d.]+, first save", start)
    (minutes,) = lines_of(tmp_path / "tried", "minutes: ")
    assert re.match(r"minutes: 0\.0 for the 1 steps? to come, [\d.e-]+ s a step", minutes)


@pytest.mark.slow
def test_recomputing_comes_before_very_few_rows(data, tmp_path, card):  # noqa: F811
    tried = card(0, recomputed=1)
    main(untyped(data, tmp_path / "run"))
    assert tried == [(8, 0), (4, 0), (2, 0), (2, 1), (1, 1)]
    (said,) = lines_of(tmp_path / "run", "micro-batch: ")
    assert "1 row x 8, recomputed, because 2 rows of 16 with --recompute 1 need more" in said
    args = newest(tmp_path / "run")["args"]
    assert (args["batch_size"], args["grad_accumulation_steps"], args["recompute"]) == (1, 8, 1)


@pytest.mark.slow
def test_a_resumed_run_keeps_its_micro_batch_where_it_fits(data, tmp_path, card):  # noqa: F811
    tried = card(4)
    argv = untyped(data, tmp_path / "run")
    main([*argv, "--max_seconds", "0.001"])
    more = [*argv, "--resume", "auto"]
    tried = card(8)  # a larger card
    main([*more, "--num_iterations", "3"])
    assert tried == [(4, 0)]
    tried = card(1, recomputed=2)
    main(more)
    assert tried == [(4, 0), (2, 0), (2, 1)]  # recomputing, this card takes two
    state = newest(tmp_path / "run")
    assert state["position"] == 6 * 8 * 16 and state["args"]["batch_size"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("rows, memory, count", ((0, 1e12, 5), (8, 1.0, 0)))
def test_where_nothing_fits_the_flags_are_named(data, tmp_path, card, rows, memory,  # noqa: F811
                                                count):
    tried = card(rows, memory=memory)
    with pytest.raises(InputError, match="^out of memory: 1 row of 16 with --recompute 1 need .* "
                                         "lower --batch_size .*, --sequence_length or --model$"):
        main(untyped(data, tmp_path / "run"))
    assert len(tried) == count and not losses(tmp_path / "run")


@pytest.mark.slow
def test_compilation_that_fails_is_left_out(data, tmp_path, monkeypatch):  # noqa: F811
    stances, attempt = [], Run.attempt
    monkeypatch.setattr(torch.compiler, "set_stance", stances.append)
    monkeypatch.setattr(train_gpt2_afno.GPT, "compile", lambda model: None)

    def fails(run, *given):
        if run.runtime.compile:
            raise RuntimeError("Failed to find C compiler.\nmore")
        attempt(run, *given)

    monkeypatch.setattr(Run, "attempt", fails)
    main(flags(data, tmp_path / "run", "--compile 1"))
    assert stances == ["force_eager"] and len(losses(tmp_path / "run")) == 6
    (said,) = lines_of(tmp_path / "run", "torch.compile fails here ")
    assert "(Failed to find C compiler.): it goes on as with --compile 0" in said
    monkeypatch.setattr(Run, "attempt", lambda run, *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # it was not the compiler
        main(flags(data, tmp_path / "other", "--compile 1"))


def test_what_validates_is_checked_without_a_compiler_that_fails(data, tmp_path,  # noqa: F811
                                                                 monkeypatch):
    stances, checked, check = [], [], train_gpt2_afno.refuse_leaks
    monkeypatch.setattr(torch.compiler, "set_stance", lambda *given: stances.append(given[0])
                        or contextlib.nullcontext())
    monkeypatch.setattr(train_gpt2_afno.GPT, "compile", lambda model: None)

    def fails(model, shapes, runtime, say, modes, goals=(), cuts=-1):
        if runtime.compile and modes == (False,):
            raise RuntimeError("Failed to find C compiler.")
        checked.append(modes)
        check(model, shapes, runtime, say, modes, goals, cuts)

    monkeypatch.setattr(train_gpt2_afno, "refuse_leaks", fails)
    main(flags(data, tmp_path / "run", "--compile 1"))
    assert "force_eager" in stances and len(validations(tmp_path / "run")) == 2
    (said,) = lines_of(tmp_path / "run", "torch.compile fails here ")
    # what trains is another graph now; the last is of the trained model
    assert checked == [(True,), (False,), (True,), (False,)]



def micro_batch(batch_size: int, grad_accumulation_steps: int, **named) -> types.SimpleNamespace:
    """Return flags of which choose_micro_batch may change some."""
    return types.SimpleNamespace(
        batch_size=batch_size, grad_accumulation_steps=grad_accumulation_steps,
        **dict(recompute=0, may_shrink=True, may_grow=True,
               to_save=dict(val_batch_size=None)) | named)


@pytest.mark.parametrize("rows, steps, T, world, free, named, expected", (
    (32, 4, 1024, 1, 60, {}, (64, 2)),  # the preset on 80 GB
    (32, 4, 1024, 2, 60, {}, (64, 2)),
    (32, 4, 1024, 4, 60, {}, (32, 4)),  # each card has one micro-batch
    (32, 3, 1024, 1, 60, {}, (32, 3)),  # an odd number of micro-batches
    (8, 4, 4096, 1, 60, {}, (16, 2)),
    (64, 2, 1024, 1, 60, {}, (64, 2)),  # it has enough tokens
    (32, 4, 1024, 1, 48, {}, (32, 4)),  # 24.4 GiB at least: so twice as much is not free
    (32, 4, 1024, 1, 60, dict(may_grow=False), (32, 4))))
def test_a_card_with_plenty_of_memory_takes_more_rows(rows, steps, T, world, free, named, expected,
                                                      monkeypatch):
    monkeypatch.setattr(runtime, "memory_budget", lambda device: free * GIB)
    ranks = types.SimpleNamespace(device=CPU, compile=False, world=world, wait=lambda: None,
                                  of_ranks=lambda value: [value])
    args, said, tried = micro_batch(rows, steps, **named), [], []
    runtime.choose_micro_batch(ranks, args, T, 16, 12 * 768, 4.2 * GIB,
                               lambda *one: tried.append(one), said.append)
    assert tried == [(expected[0], 0)]
    assert (args.batch_size, args.grad_accumulation_steps) == expected
    grown = expected[0] > rows
    assert ("because 60.0 GiB are free" in "".join(said)) == grown
    # another card, or four, may go on with what was asked for
    assert args.to_save.get("batch_size", "asked") == ("asked" if grown else rows)


def test_the_rank_with_the_smallest_card_decides():
    """This rank's card would take 32 rows, the other's 8."""
    others = iter([10 * GIB, 1, 1, 0])
    ranks = types.SimpleNamespace(device=CPU, compile=False, world=2, wait=lambda: None,
                                  of_ranks=lambda value: [value, next(others)])
    args, said, tried = micro_batch(32, 4), [], []
    runtime.choose_micro_batch(ranks, args, 1024, 16, 1, 6 * GIB, lambda *one: tried.append(one),
                               said.append)
    assert tried == [(32, 0), (16, 0), (8, 0)] and "10.0 GiB that are free" in said[0]
    assert (args.batch_size, args.grad_accumulation_steps, args.val_batch_size) == (8, 16, 8)
    assert args.to_save == dict(batch_size=8, grad_accumulation_steps=16, recompute=0,
                                val_batch_size=None)


@pytest.mark.parametrize("total, fraction", ((24, 0.75), (48, 0.875), (8, 0.5)))
def test_the_gate_leaves_room_to_the_trainer_beside_it(monkeypatch, total, fraction):
    """Else the trainer that sets up beside it would find a full card, and give its kernels up."""
    found = []
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda device: types.SimpleNamespace(total_memory=total * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction",
                        lambda share, device: found.append(share))
    for device in (CPU, CUDA):
        runtime.leave_room(device)
    assert found == [fraction]


@pytest.mark.parametrize("fraction, expected", ((1.0, 72), (0.5, 40)))
def test_a_capped_allocator_has_the_memory_of_its_cap(monkeypatch, fraction, expected):
    for name, value in dict(mem_get_info=(70 * GIB, 80 * GIB), memory_reserved=2 * GIB,
                            get_per_process_memory_fraction=fraction).items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value, raising=False)
    assert memory_budget(CUDA) == expected * GIB


def test_the_averages_bytes_are_those_of_a_checkpoint(data, tmp_path, monkeypatch):  # noqa: F811
    found = []
    monkeypatch.setattr(Run, "open_bar", lambda run, bar=Run.open_bar: found.append(
        runtime.bytes_of_averages(run.optimizers)) or bar(run))
    main(flags(data, tmp_path / "run", "--optimizer muon --pair_rows 40 --num_iterations 2"))
    states = [values for part in newest(tmp_path / "run")["optimizers"]
              for values in part["state"].values()]
    assert found == [sum(x.nbytes for values in states for name, x in values.items()
                         if name != "step")]


def test_the_trial_holds_the_gradients_of_tables(data, tmp_path, monkeypatch):  # noqa: F811
    """Those of one micro-batch, while the next one goes forward, as in training."""
    held, forward = [], train_gpt2_afno.GPT.forward

    def recorded(model, *given, **named):
        held.append([table.gradient is not None for table in runtime.row_tables(model).values()])
        return forward(model, *given, **named)

    def trial(run, bar=Run.open_bar):
        held.clear()
        run.attempt(2, 0, {16: None}, 0)
        assert not runtime.gradients_of(run.model)
        bar(run)

    monkeypatch.setattr(train_gpt2_afno.GPT, "forward", recorded)
    monkeypatch.setattr(Run, "open_bar", trial)
    main(flags(data, tmp_path / "run", "--pair_rows 40 --value_tables 1 --num_iterations 1 "
               "--grad_accumulation_steps 2"))
    tables = len(held[0])
    assert tables > 1 and held == [[False] * tables, [True] * tables] * 2


def test_the_bytes_to_train_are_those_of_a_step():
    """Of tables these are the rows that random tokens meet: too many would refuse a card."""
    model = train_gpt2_afno.GPT(train_gpt2_afno.GPTConfig(
        n_layer=2, n_embd=64, n_head=1, vocab_size=3000, sequence_length=64, pair_rows=5000,
        value_tables=1))
    idx = torch.randint(3000, (40, 64), generator=torch.Generator().manual_seed(0))
    model.meet(idx)
    model(idx, idx.roll(-1, 1), False)[1].backward()
    held = [*model.parameters(), *runtime.gradients_of(model),
            *(table.met[1] for table in runtime.row_tables(model).values())]
    assert sum(x.nbytes for x in held) == pytest.approx(
        runtime.bytes_to_train(model, idx.numel()), rel=0.02)


@pytest.mark.parametrize("many, grows", ((436, True), (437, False)))
def test_rows_grow_only_where_the_text_has_as_many(data, tmp_path, monkeypatch,  # noqa: F811
                                                   many, grows):
    merge, found = train_gpt2_afno.merge_flags, []

    def on_a_gpu(*given):
        args = merge(*given)
        args.may_shrink = True
        return args

    monkeypatch.setattr(train_gpt2_afno, "MANY_TOKENS", many)
    monkeypatch.setattr(train_gpt2_afno, "merge_flags", on_a_gpu)
    monkeypatch.setattr(train_gpt2_afno, "choose_micro_batch",
                        lambda ranks, args, *more: found.append(args.may_grow))
    main(flags(data, tmp_path / "run", "--num_iterations 1"))
    assert found == [grows]


def test_the_gate_takes_fewer_rows_where_memory_is_not_enough():
    said, tried = [], []

    def work(rows):
        tried.append(rows)
        if rows > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rows

    assert with_fewer_rows(32, work, said.append) == 8 and tried == [32, 16, 8] and len(said) == 2
    with pytest.raises(ZeroDivisionError):
        with_fewer_rows(32, lambda rows: 1 / 0, said.append)


@pytest.mark.parametrize("capability, asked, expected", (
    ((8, 9), None, "bfloat16"), ((8, 0), "float32", "float32"), ((7, 5), "float32", "float32"),
    ((7, 5), None, "float32"), ((7, 5), "bfloat16", None)))
def test_a_card_without_bfloat16_is_said(monkeypatch, capability, asked, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    said = []
    if expected is None:
        with pytest.raises(InputError, match="--dtype bfloat16: Tesla T4 has compute capability "
                                             "7.5, bfloat16 needs 8.0; use --dtype float32"):
            choose_dtype(asked, CUDA, said.append)
        return
    assert choose_dtype(asked, CUDA, said.append) == expected
    assert len(said) == (capability < (8, 0) and asked is None)


# -----------------------------------------------------------------------------
# the screen of facts


def screen(monkeypatch, tmp_path, argv: str, **variables) -> list[str]:
    """Return facts.py's lines for a repository at tmp_path, without tmux unless it is given."""
    for name in ("TMUX", "STY", facts.STARTED):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name in ("facts", "checkpoints", "train_gpt2_afno", "data.loader", "data.text_to_bin"):
        monkeypatch.setattr(f"{name}.ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    shown, show = [], facts.facts
    monkeypatch.setattr(facts, "facts", lambda *given: shown.extend(show(*given)) or shown)
    monkeypatch.setattr(start, "fetch", lambda *script: None)
    monkeypatch.setattr(train_gpt2_afno, "main", lambda *given: 0)
    assert start.main(argv.split(), Passed()) == 0
    monkeypatch.setattr(facts, "facts", show)
    return shown


class Passed:
    """A gate that has passed."""

    show = verdict = lambda self: None
    importing = argparse.Namespace(start=lambda: None)


def test_one_screen_says_what_a_run_needs(full_size, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setattr(facts, "in_container", lambda path: True)
    monkeypatch.setattr(facts.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1e12))
    lines = screen(monkeypatch, tmp_path, "--preset fineweb --device cpu")
    assert len(lines) <= 16
    assert all(len(line) <= 100 for line in lines if str(tmp_path) not in line)
    text = "\n".join(lines)
    for said in ("output: runs/fineweb, a new run", "device: CPU; memory free: ",
                 "tokens: 498,073,600 in 3800 steps of 128 rows of 1024",
                 "fineweb10B: 6 of 6 shards to fetch, 1.2 GB", "1.2 GB of data",
                 "loss to expect: 3.3821 or less: an estimate", "is on this container's own disk",
                 f"kill -TERM {os.getpid()};",
                 "to go on: bash run_afno.sh fineweb --device cpu",
                 "tmux new -s afno 'bash run_afno.sh fineweb --device cpu'"):
        assert said in text, said
    monkeypatch.setattr(facts, "in_container", lambda path: False)
    longer = "\n".join(screen(monkeypatch, tmp_path, "--preset fineweb --extend 9 --device cpu"))
    assert "3809 steps" in longer and "loss to expect: not known for these flags" in longer
    text = "\n".join(screen(monkeypatch, tmp_path, "--preset fineweb --seed 2", TMUX="/tmp/x,1,0"))
    assert "loss to expect: not known for these flags" in text
    assert "warning" not in text and "tmux" not in text


def test_commands_to_go_on_work_where_they_are_typed(monkeypatch, tmp_path):
    go_on = facts.to_go_on
    assert go_on("python x.py --resume 'a b.pt' --seed 2") == "python x.py --resume auto --seed 2"
    assert go_on("python x.py '--resume=a b.pt' -- y") == "python x.py --resume auto -- y"
    assert go_on("bash run_afno.sh '--output_dir=a b'") == "bash run_afno.sh '--output_dir=a b'"
    inside, outside = checkpoints.ROOT / "runs/a b", tmp_path / "c"
    monkeypatch.chdir(checkpoints.ROOT)
    assert checkpoints.trainer_command(inside, None) == \
        "python train_gpt2_afno.py --output_dir 'runs/a b' --resume auto"
    monkeypatch.chdir(tmp_path)
    assert checkpoints.trainer_command(Path("c"), 3.38215, " --extend 9") == (
        f"python {checkpoints.ROOT}/train_gpt2_afno.py --output_dir {outside} --resume auto "
        "--extend 9 --target_val_loss 3.38215")
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert f"--output_dir {outside} " in checkpoints.trainer_command(outside, None)


def test_the_first_gpu_is_named_as_its_tensors_name_it(monkeypatch):
    """What is tried for a device is kept by its name: cuda and cuda:0 would be tried twice."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda card: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert runtime.choose_device("auto") == runtime.own_card(0) == torch.device("cuda", 0)


@pytest.mark.parametrize("variable, name, threads", (
    (None, "auto", 1), (None, "cuda", 1), (None, "cpu", 2), ("2", "auto", 2)))
def test_beside_a_gpu_the_cpu_works_in_one_thread(monkeypatch, variable, name, threads):
    before, at_start = torch.get_num_threads(), 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    torch.set_num_threads(at_start)
    try:
        runtime.choose_device(name)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


OF_24_GB = types.SimpleNamespace(total_memory=24 * GIB)


def test_the_screen_of_a_gpu(full_size, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setattr(runtime, "choose_device", lambda name: CUDA)
    for module in (facts, runtime):
        monkeypatch.setattr(module, "memory_budget", lambda device: 23 * GIB)
    for name, value in dict(get_device_name="RTX 4090", device_count=1,
                            get_device_capability=(8, 9), get_device_properties=OF_24_GB).items():
        monkeypatch.setattr(torch.cuda, name, lambda *device, value=value: value)
    tried = queue.Queue()
    monkeypatch.setattr(start, "try_kernels", lambda args, config, device: tried.put(device))
    text = "\n".join(screen(monkeypatch, tmp_path, "--preset fineweb"))
    assert tried.get(timeout=20) == CUDA  # beside the facts
    with monkeypatch.context() as patch:  # each card's process tries its own
        patch.setattr(torch.cuda, "device_count", lambda: 2)
        screen(monkeypatch, tmp_path, "--preset fineweb")
    screen(monkeypatch, tmp_path, "--preset fineweb --seed 7")
    assert tried.get(timeout=20) == CUDA and tried.empty()
    assert "device: RTX 4090, 1 here; memory free: 23.0 GiB" in text
    assert "work, the largest micro-batch that fits is tried" in text
    assert "is tried" not in "".join(screen(monkeypatch, tmp_path, "--batch_size 8"))


def test_what_is_there_is_not_needed_again(monkeypatch, tmp_path):
    shards, run = tmp_path / "data/fineweb10B", tmp_path / "runs/fineweb-model-d4"
    for folder in (shards, run):
        folder.mkdir(parents=True)
    saved_at(run, 7, "--preset fineweb --device cpu --model d4 --n_head 1 --attn_layers 1")
    for name in ("train_000001", "train_000002", "val_000000"):
        (shards / f"fineweb_{name}.bin").write_bytes(bytes(2_000_000))
    text = "\n".join(screen(monkeypatch, tmp_path, "--preset fineweb --device cpu --model d4 "
                            f"--n_head 1 --attn_layers 1 --output_dir {run} --resume auto"))
    assert ", at step 7 of 3800" in text
    assert "fineweb10B: 3 of 6 shards to fetch, 0.6 GB" in text
    assert f"--output_dir {run} --resume auto" in text


@pytest.mark.parametrize("argv, script", (
    ("--preset fineweb", "cached_fineweb10B.py 5"),
    ("--preset baseline", "cached_fineweb10B.py 25"),
    ("--preset fineweb-4k", "cached_fineweb10B.py 5"), ("--preset shakespeare", "shakespeare.py"),
    ("--preset fineweb --num_iterations 7600", "cached_fineweb10B.py 10"),
    ("--preset fineweb --num_iterations 7631", "cached_fineweb10B.py 10"),
    ("--preset fineweb --num_iterations 7720", "cached_fineweb10B.py 11"),
    ("--preset fineweb --extend 3800", "cached_fineweb10B.py 10"),
    ("--preset baseline --num_iterations 999999", "cached_fineweb10B.py 103"),
    ("--preset fineweb --num_iterations 1", "cached_fineweb10B.py 1"),
    ("--preset fineweb --input_bin mine_*.bin --input_val_bin mine.bin", ""),
    ("--preset fineweb --input_bin data/shakespeare/train_*.bin --input_val_bin mine.bin",
     "shakespeare.py")))
def test_as_much_text_is_fetched_as_a_run_reads(argv, script):
    args = train_gpt2_afno.merge_flags(train_gpt2_afno.parse_flags(argv.split()), CPU, None, print)
    assert " ".join(facts.data_script(args)) == script


def test_a_disk_that_is_too_small_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(facts.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1e9))
    lines = facts.describe_disk(tmp_path / "runs/x", 10**9, 0)
    assert lines[0].startswith("disk: 1.0 GB free, 5.0 needed: up to 5 checkpoints of 1 GB")
    assert lines[1] == "warning: the disk is too small, make room first"


def test_checkpoints_that_were_set_aside_are_counted(tmp_path):
    (tmp_path / "state_step000007.pt").write_bytes(b"")
    assert len(facts.describe_disk(tmp_path, 10**9, 0)) <= 2  # perhaps a warning
    for step in (8, 9):
        (tmp_path / f"state_step00000{step}.pt.abandoned").write_bytes(bytes(3_000_000))
    assert facts.describe_disk(tmp_path, 10**9, 0)[1] == "set aside: 0.006 GB of " \
        "checkpoints, *.abandoned (2): no run reads them, delete them if you like"


def test_a_containers_own_disk_is_known_by_its_mounts(tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text("overlay / overlay rw 0 0\nproc /proc proc rw 0 0\n"
                      r"/dev/sdb /a\040volume ext4 rw 0 0" "\n/dev/sdc /vol ext4 rw 0 0\n")
    where = lambda text: facts.in_container(facts.Path(text), str(mounts))
    assert where("/root/afno") and where("/volume") and where("/")
    assert not where("/a volume/afno") and not where("/vol/x")
    assert not facts.in_container(tmp_path, str(tmp_path / "none"))


def test_losses_to_expect_have_a_source():
    readme = (SCRIPT.parent / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `bash run_afno.sh ([^`]+)` (\|.*)", readme, re.MULTILINE))
    rows["fineweb-mixer-attn"] = rows.pop("fineweb --mixer attn")
    assert rows.keys() == facts.EXPECTED.keys()
    for name, text in facts.EXPECTED.items():
        figures = re.findall(r"\d\.\d+|not known|estimate", text)
        assert figures and all(figure in rows[name] for figure in figures), name
    log = SCRIPT.parent / "experiments/runs/2026-11-28-first-run/shakespeare/train.log"
    assert "val_loss:4.2571" in log.read_text()


def test_facts_are_not_shown_twice(data, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.delenv(facts.STARTED, raising=False)
    main(flags(data, tmp_path / "run", "--num_iterations 1"))
    assert "loss to expect: " in capsys.readouterr().out
    monkeypatch.setenv(facts.STARTED, "packages 3, gate 40")
    main(flags(data, tmp_path / "other", "--num_iterations 1"))
    assert "loss to expect: " not in capsys.readouterr().out
    (start,) = lines_of(tmp_path / "other", "seconds to the first step: ")
    assert start.endswith("; before, in run_afno.sh: packages 3, gate 40")


def test_compilations_are_kept_in_the_repository(monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "mine")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    runtime.keep_compilations()
    assert os.environ["TRITON_CACHE_DIR"] == "mine"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(SCRIPT.parent / ".cache/inductor")


# -----------------------------------------------------------------------------
# run_afno.sh


SLEEPS = "import time; time.sleep(60)"


@pytest.fixture
def begin(monkeypatch, tmp_path, capsys, full_size):  # noqa: F811
    """Return a function that starts, given Python for the two scripts.

    It returns the status or the error, what is printed, and what the trainer was called with.
    """
    monkeypatch.setenv(facts.STARTED, "packages 0")
    monkeypatch.setattr(start, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["start.py"])
    (tmp_path / "data").mkdir()
    called = []

    def trainer(argv, *gates):
        called.append((argv, sys.argv[0]))
        called.extend(gate.verdict() for gate in gates)
        return 3

    monkeypatch.setattr(train_gpt2_afno, "main", trainer)

    def make(data="", gate="", *more):
        (tmp_path / "data/shakespeare.py").write_text(f"print('two works')\n{data}")
        (tmp_path / "test_causality.py").write_text(
            f"import sys; print('row', sys.argv[1:])\n{gate}")
        argv = ["--preset", "shakespeare", "--device", "cpu", "--output_dir", f"{tmp_path}/run",
                *more]
        child = start.Gate(argv)
        try:
            status = start.main(argv, child)
        except InputError as error:
            status = str(error)
        finally:
            child.end()
        assert child.process.wait(10) is not None
        return status, capsys.readouterr().out, called

    return make


def test_facts_come_first_then_the_lines_of_both(begin, tmp_path):
    status, out, called = begin()
    lines = out.splitlines()
    assert lines[0].startswith("output: ") and status == 3
    assert sorted(lines[-2:]) == ["data: two works",
                                  f"gate: row ['--preset', 'shakespeare', '--device', 'cpu', "
                                  f"'--output_dir', '{tmp_path}/run']"]
    (argv, script), verdict = called
    assert argv[:2] == ["--preset", "shakespeare"] and script.endswith("train_gpt2_afno.py")
    assert re.fullmatch(r"causality gate: passed, \d\.\d s after the start", verdict)


def test_data_that_cannot_be_had_end_the_gate(begin):
    status, out, called = begin(data="raise SystemExit(2)",
                                gate=SLEEPS)
    assert status == "the data are not there: shakespeare.py ended with status 2"
    assert not called and "data: two works" in out


def test_a_gate_that_fails_lets_nothing_train(begin):
    status, out, called = begin(gate="raise SystemExit(1)")
    assert status == "causality gate: it ended with status 1, nothing is trained"
    assert not called and "gate: row" in out


def test_a_child_is_ended_with_what_it_has_started(tmp_path, monkeypatch):
    monkeypatch.setattr(start, "HERE", tmp_path)
    (tmp_path / "a.py").write_text(f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "{SLEEPS}"])
open("{tmp_path}/pid", "w").write(str(child.pid))
print("ready")
child.wait()
""")
    child = start.Beside("a", "a.py")
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.01)
    child.end()
    assert child.process.wait(10) == -signal.SIGTERM
    grandchild = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{grandchild}") and time.monotonic() < deadline:
        if "Z" in open(f"/proc/{grandchild}/stat").read().split(")")[1]:
            break
        time.sleep(0.01)
    else:
        assert not os.path.exists(f"/proc/{grandchild}")


@pytest.mark.parametrize("free, beside", ((75 * GIB, True), (23 * GIB, False)))
def test_a_large_card_has_room_for_the_gate_beside_training(begin, monkeypatch, free, beside):
    monkeypatch.setattr(runtime, "choose_device", lambda name: CUDA)
    monkeypatch.setattr(runtime, "memory_budget", lambda device: free)
    monkeypatch.setattr(facts, "show_facts", lambda *given: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: OF_24_GB)
    merge = train_gpt2_afno.merge_flags
    monkeypatch.setattr(train_gpt2_afno, "merge_flags", lambda flags, device, *more: merge(
        flags, CPU, *more))
    rooms = []

    def trainer(argv, gate):
        gate.make_room()
        rooms.append(bool(gate.said))
        return 0 if gate.verdict() == gate.said else 1

    monkeypatch.setattr(train_gpt2_afno, "main", trainer)
    assert begin()[0] == 0 and rooms == [not beside]


def test_ones_own_data_need_no_download(begin, tmp_path):
    own = "--input_bin a --input_val_bin b".split()
    status, out, called = begin("raise SystemExit(2)", "", *own)
    assert status == 3 and "data: two works" not in out


def test_a_run_without_steps_left_starts_no_download(begin, tmp_path):
    saved_at(tmp_path / "run", 120, "--preset shakespeare --device cpu")
    status, out, called = begin(SLEEPS, "", "--resume", "auto")
    assert status == 3 and out.count("\n") == 1 and "gate: row" in out
    assert "passed" in called[1]  # the trainer may go back to a step before: it has the gate
    assert "holds a run: add --resume auto" in begin(SLEEPS, SLEEPS)[0]


def saved_at(folder, step: int, given: str):
    """Write what start.py reads of a checkpoint that such flags have made."""
    args = train_gpt2_afno.merge_flags(train_gpt2_afno.parse_flags(given.split()), CPU, None, print)
    config = GPTConfig(**train_gpt2_afno.model_fields(vars(args)))
    folder.mkdir(exist_ok=True)
    state = dict(step=step, args=args.to_save, config=vars(config), rng=random_state(CPU),
                 position=0, **dict.fromkeys(TIMES, 0.0))
    torch.save(state, folder / f"state_step{step:06d}.pt")


def test_a_run_that_goes_on_is_described_as_its_checkpoint_is(begin, tmp_path):
    saved_at(tmp_path / "run", 60, "--preset shakespeare --device cpu "
             "--sequence_length 128 --num_iterations 240")
    status, out, called = begin("", "", "--resume", "auto")
    assert status == 3 and "run, at step 60 of 240\n" in out
    assert "in 240 steps of 8 rows of 128" in out


def test_the_screen_is_of_the_checkpoint_that_is_taken(begin, tmp_path):
    flags = "--preset shakespeare --device cpu --num_iterations 80 --warmdown_iters 20"
    for step in (40, 70):  # the latter in the cooldown
        saved_at(tmp_path / "run", step, flags)
    given = (*flags.split()[4:], "--resume", "auto")
    assert "run, at step 70 of 80\n" in begin("", "", *given)[1]
    assert "run, at step 40 of 90\n" in begin("", "", *given, "--extend", "10")[1]
    path = tmp_path / "run/state_step000040.pt"
    out = begin("", "", *given[:-1], str(path))[1]
    (again,) = re.findall("^to go on: .*", out, re.MULTILINE)
    assert "run, at step 40 of 80\n" in out and again.endswith("--resume auto")
    damaged = tmp_path / "run/state_step000070.pt"
    damaged.write_bytes(damaged.read_bytes().replace(b"float32", b"float3r"))
    assert "run, at step 40 of 80\n" in begin("", "", *given)[1]


def test_the_gate_tries_the_model_of_the_checkpoint(tmp_path, monkeypatch):
    saved_at(tmp_path / "run", 60, "--preset shakespeare --device cpu --mixer attn --batch_size 4")
    tried = []
    monkeypatch.setattr(test_causality, "check_trained",
                        lambda gate, trainer, args, config, runtime: tried.append((args, config)))
    monkeypatch.setattr(test_causality, "check_family", lambda *given: None)
    monkeypatch.setattr(test_causality, "CACHE", tmp_path / "cache")
    argv = ["--preset", "shakespeare", "--device", "cpu", "--output_dir", str(tmp_path / "run")]
    assert test_causality.main([*argv, "--resume", "auto"]) == 0
    ((args, config),) = tried
    assert (config.mixer, args.batch_size) == ("attn", 4)


@pytest.mark.parametrize("more, said", (
    (("--mixer", "afno", "--afno_form", "reference"), "--afno_form reference is not causal"),
    (("--pair_rows", "100000000", "--model", "d48"), ".*--pair_rows ask for too much"),
    (("--batch_size", "65536", "--grad_accumulation_steps", "65536"), "--batch_size x ")))
def test_flags_that_the_trainer_refuses_are_refused_before_the_gate_meets_them(begin, more, said):
    error, _, called = begin("", SLEEPS, *more)
    assert re.match(said, str(error)) and not called


@pytest.mark.parametrize("more", (("--eval_only",), ("--generate", "x")))
def test_nothing_trains_so_the_gate_ends(begin, monkeypatch, more):
    """Else it would take the cores from what was asked for."""
    ended, end = [], start.Gate.end
    monkeypatch.setattr(start.Gate, "end", lambda gate: ended.append(True) or end(gate))
    monkeypatch.setattr(train_gpt2_afno, "main", lambda argv, gate=None: 5 if ended else 4)
    assert begin(SLEEPS, SLEEPS, *more)[0] == 5


def test_the_trainer_waits_for_the_gate(data, tmp_path):  # noqa: F811
    with pytest.raises(InputError, match="^causality gate: it ended"):
        train_gpt2_afno.main(flags(data, tmp_path / "run"), RefusingGate())
    assert not losses(tmp_path / "run")


@pytest.mark.parametrize("options, fp8, names", (
    (dict(mixer="attn"), 0, {"loss"}),
    (dict(mixer="attn", attn_short_conv=4, afno_token_taps=4), 1, {"fp8", "convolution"}),
    (dict(attn_layers=(0, 1)), 0, {"loss"}),
    (dict(afno_token_taps=4), 0, {"loss", "convolution", "token"}),
    (dict(afno_state_layers=(1,)), 0, {"loss", "convolution", "state"}),
    (dict(afno_form="state"), 0, {"loss", "convolution", "state"})))
def test_kernels_that_a_model_uses_are_tried_at_once(options, fp8, names):
    config = train_gpt2_afno.GPTConfig(**dict(mixer="afno", n_layer=2, n_embd=16) | options)
    args = types.SimpleNamespace(fp8_head=fp8, fp8_mlp=0, model="d1")
    assert facts.kernels_of(config, args) == names
    said = []
    facts.describe(types.SimpleNamespace(
        config=config, args=args, device=CPU, model=torch.nn.Linear(1, 1), say=said.append,
        runtime=types.SimpleNamespace(dtype=torch.float32, world=1), fp8=None))
    for name, text in facts.KERNELS.items():  # the loss's softmax is of validation, too
        assert any(line.startswith(f"{text}: ") for line in said) == (name in names | {"loss"})


@pytest.mark.parametrize("more, warned", (("--pair_rows 40", 1), ("--value_tables 1", 1), ("", 0)))
def test_repeated_text_is_said_where_tables_learn_it(data, tmp_path, more, warned):  # noqa: F811
    for name, steps, expected in (("once", 2, 0), ("again", 3000, warned)):
        main(flags(data, tmp_path / name, f"--num_iterations {steps} --max_seconds 0.001 {more}"))
        assert len(lines_of(tmp_path / name, "warning: text that is read again")) == expected
