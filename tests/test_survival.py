"""A run on a rented machine: it goes on after any end, and a target that is missed is not lost."""
import argparse
import contextlib
import errno
import math
import os
import random
import re
import shlex
import shutil
import signal
import threading
import time

import pytest
import torch
import torch.nn.functional as F

import report
import train_gpt2_afno
from checkpoints import (Checkpoints, describe_miss, measured_slope, more_steps, preset_folder,
                         read_metrics)
from data.loader import TokenStream, TrainLoader, passes
from data.text_to_bin import InputError, validated_on
from runtime import Diverged
from test_trainer import (STOPPED, VOCABULARY, assert_same, data, flags, losses, main,  # noqa: F401
                          metrics, newest, run_script, script, small, validations, wait_for_step)
from train_gpt2_afno import DEFAULTS, SAME_RUN, Run


def steps_in(folder) -> list[int]:
    return Checkpoints(folder).steps()


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Let folders of presets be in a folder of the test's own."""
    monkeypatch.setattr("checkpoints.ROOT", tmp_path)
    monkeypatch.setattr("checkpoints.record_source", lambda folder: [])
    return tmp_path / "runs"


def without_folder(data, more: str = "") -> list[str]:  # noqa: F811
    argv = flags(data, "none", more)
    at = argv.index("--output_dir")
    return argv[:at] + argv[at + 2 :]


# -----------------------------------------------------------------------------
# one folder a command


@pytest.mark.slow
def test_the_same_command_goes_on_and_then_says_that_it_is_finished(data, runs,  # noqa: F811
                                                                    capsys):
    assert main(without_folder(data, "--max_seconds 0.001")) == 0
    (folder,) = runs.iterdir()
    assert newest(folder)["step"] == 0
    assert main(without_folder(data)) == 0
    before = (folder / "train.log").read_bytes()
    capsys.readouterr()
    assert main(without_folder(data, "--device auto --compile 0")) == 0
    loss = validations(folder)[-1]["val_loss"]
    (line,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(f".* is finished: step:6/6 val_loss:{loss:.4f}", line)
    assert (folder / "train.log").read_bytes() == before and [*runs.iterdir()] == [folder]
    assert main(without_folder(data, "--num_iterations 7")) == 0  # another run
    assert len([*runs.iterdir()]) == 2


def test_flags_that_come_too_late_are_named(data, tmp_path, capsys):  # noqa: F811
    main(flags(data, tmp_path / "run"))
    capsys.readouterr()
    more = "--resume auto --learning_rate 0.1 --val_tokens 9 --save_every 2"
    assert main(flags(data, tmp_path / "run", more)) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith(" (--learning_rate, --val_tokens: too late; --eval_only validates anew)")


@pytest.mark.parametrize("more, shape", (
    ("", (5, 16)), ("--sequence_length 32", (2, 32)), ("--sequence_length 64", (2, 64)),
    ("--sequence_length 8", (5, 8)), ("--sequence_length 32 --val_batch_size 4", (4, 32))))
def test_longer_rows_are_evaluated_in_smaller_batches(data, tmp_path, monkeypatch,  # noqa: F811
                                                      capsys, more, shape):
    main(flags(data, tmp_path / "run"))
    checked, counted = [], []
    monkeypatch.setattr(train_gpt2_afno, "refuse_too_large", lambda make, config, args, *_: (
        counted.append(args.val_batch_size)))
    monkeypatch.setattr("checkpoints.refuse_leaks", lambda model, shapes, *_, **__: checked.extend(
        shapes))
    main(["--output_dir", str(tmp_path / "run"), "--eval_only", "--device", "cpu", *more.split()])
    assert checked == [shape] and counted == [shape[0]]  # also where memory is estimated
    assert f"the causality check of {shape[0]} rows comes first" in capsys.readouterr().err


def test_another_validation_text_is_said_where_a_run_goes_on(data, tmp_path):  # noqa: F811
    out, warned = tmp_path / "run", "warning: earlier losses of this run are of "
    main(flags(data, out, "--target_val_loss 50 --val_loss_every 1"))
    digest = TokenStream(f"{data}/val_*.bin", VOCABULARY, "x").digest
    log = (out / "train.log").read_text()
    (targets, text), = validated_on(log)
    assert text == f"sha256 {digest(int(targets.split()[0]) + 1)}"
    more = "--val_loss_every 1 --resume auto --target_val_loss 0.1"
    main(flags(data, out, f"{more} --max_seconds 0.001"))
    log = (out / "train.log").read_text()
    assert warned not in log and len(validated_on(log)) == 1  # that start validated nothing
    main(flags(data, out, f"{more} --val_tokens 9"))
    assert f"{warned}{targets} {text}: they do not compare" in (out / "train.log").read_text()


def test_a_run_that_died_between_its_last_checkpoint_and_validation_is_not_finished(
        data, tmp_path, monkeypatch):  # noqa: F811
    validate = Run.validate
    monkeypatch.setattr(Run, "validate", lambda run: 1 / 0 if run.step == 6 else validate(run))
    with pytest.raises(ZeroDivisionError):
        main(flags(data, tmp_path / "run"))
    monkeypatch.setattr(Run, "validate", validate)
    assert newest(tmp_path / "run")["step"] == 6  # an error waits for the write, too
    main(flags(data, tmp_path / "run", "--resume auto"))
    assert [line["step"] for line in validations(tmp_path / "run")] == [3, 6]


@pytest.mark.parametrize("given, name", (
    ({}, "fineweb"), (dict(mixer="attn"), "fineweb-mixer-attn"),
    (dict(mixer="afno", seed=1337), "fineweb"),  # the preset's own
    (dict(seed=2, mixer="attn"), "fineweb-mixer-attn-seed-2"),
    (dict(device="cpu", gpus=2, compile=0, max_seconds=9.0, extend=5), "fineweb"),
    (dict(save_minutes=1.0, target_val_loss=3.4), "fineweb"),  # the same weights
    (dict(learning_rate=0.003, attn_layers=(3, 9)), "fineweb-attn_layers-3,9-learning_rate-0.003"),
    (dict(input_bin="a/b_*.bin"), r"fineweb-input_bin-a_b__.bin-[0-9a-f]{8}"),
    (dict(input_bin="x" * 300), r"fineweb-input_bin-x{52}-[0-9a-f]{8}")))
def test_flags_that_differ_from_the_preset_name_the_folder(given, name):
    values = {**DEFAULTS, **train_gpt2_afno.PRESETS["fineweb"]}
    folder = preset_folder(given | dict(preset="fineweb"), values, SAME_RUN)
    assert re.fullmatch(name, folder.name) and folder.parent.name == "runs"


def test_two_long_names_are_two_folders():
    values = {**DEFAULTS, **train_gpt2_afno.PRESETS["fineweb"]}
    names = {preset_folder(dict(preset="fineweb", input_bin=text), values, SAME_RUN)
             for text in ("a/b", "a_b", "x" * 300, "x" * 301)}
    assert len(names) == 4


# -----------------------------------------------------------------------------
# checkpoints in the background


@pytest.mark.slow
def test_the_two_last_the_best_and_the_cooldowns_start_are_kept(data, tmp_path,  # noqa: F811
                                                                monkeypatch):
    loss = {0: 6.0, 2: 3.0, 4: 5.0, 6: 4.0, 8: 4.5, 10: 3.5, 12: 4.0}
    monkeypatch.setattr(Run, "validation_loss", lambda run, runtime: loss[run.step])
    options = "--val_loss_every 2 --warmdown_iters 7 --num_iterations 12"
    main(flags(data, tmp_path / "run", options))
    assert steps_in(tmp_path / "run") == [12, 10, 5, 2]
    main(flags(data, tmp_path / "stopped", options + " --max_seconds 0.001"))
    for steps in (8, 12):  # the best is known again after a resume
        monkeypatch.setattr(Run, "has_ended", lambda run: run.step == steps)
        main(flags(data, tmp_path / "stopped", options + " --resume auto"))
    assert steps_in(tmp_path / "stopped") == [12, 10, 5, 2]


@pytest.mark.slow
def test_slow_writes_hold_the_state_of_their_step(data, tmp_path, monkeypatch):  # noqa: F811
    write, threads = Checkpoints.write, set()

    def slow(self, *given):
        threads.add(threading.current_thread())
        time.sleep(0.2)  # steps are made meanwhile
        write(self, *given)

    options = "--optimizer muon --save_every 5 --num_iterations 9 --warmdown_iters 4"
    main(flags(data, tmp_path / "run", options))
    monkeypatch.setattr(Checkpoints, "write", slow)
    main(flags(data, tmp_path / "slow", options))
    assert threads and threading.main_thread() not in threads
    assert steps_in(tmp_path / "slow") == steps_in(tmp_path / "run") == [9, 5]
    for a, b in zip(Checkpoints(tmp_path / "run").paths(), Checkpoints(tmp_path / "slow").paths()):
        assert_same(Checkpoints.load(a), Checkpoints.load(b))


@pytest.mark.slow
def test_saves_by_time_change_nothing_and_wait_for_none(data, tmp_path, monkeypatch):  # noqa: F811
    saved, write = [], Checkpoints.write

    def slow(self, state, copied=None):
        saved.append(state["step"])
        time.sleep(0.05)
        write(self, state, copied)

    options = "--num_iterations 12 --save_every 0"
    main(flags(data, tmp_path / "whole", options + " --save_minutes 0"))
    monkeypatch.setattr(Checkpoints, "write", slow)
    main(flags(data, tmp_path / "run", options + " --save_minutes 0.000001"))
    assert {0, 10, 12} < {*saved} and len(saved) == len({*saved})
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert_same(newest(tmp_path / "run")["model"], newest(tmp_path / "whole")["model"])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_moment_the_same_command_goes_on(data, tmp_path, script, seed):  # noqa: F811
    options = "--num_iterations 60 --save_every 0 --val_loss_every 20 --save_minutes 0.00001 "
    draw, out = random.Random(seed), tmp_path / "run"
    for step in sorted(draw.sample(range(1, 50), 2)):
        run = run_script(script, flags(data, out, options + "--resume auto"))
        wait_for_step(out, step, run)
        time.sleep(draw.random() / 20)
        run.kill()
        run.wait()
    main(flags(data, out, options + "--resume auto"))
    main(flags(data, tmp_path / "whole", options))
    assert losses(out) == losses(tmp_path / "whole")
    assert_same(newest(out)["model"], newest(tmp_path / "whole")["model"])
    assert not list(out.glob("*.part"))


def test_a_disk_that_is_full_while_the_thread_writes(data, tmp_path, monkeypatch):  # noqa: F811
    save = torch.save

    def full(state, file):
        save(state, file)
        if state["step"] > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match="cannot write state_step00000[34].pt: No space left on "
                                         "device; checkpoints kept: state_step000002.pt"):
        main(flags(data, tmp_path / "run", "--num_iterations 1000 --save_minutes 0.000001"))
    assert losses(tmp_path / "run")[-1][0] < 1000  # not at the end only
    assert newest(tmp_path / "run")["step"] == 2 and not list((tmp_path / "run").glob("*.part"))


def test_a_signal_while_a_write_is_under_way_waits_for_it(data, tmp_path,  # noqa: F811
                                                          monkeypatch):
    write = Checkpoints.write

    def signalled(self, state, copied=None):
        if state["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)
        write(self, state, copied)

    monkeypatch.setattr(Checkpoints, "write", signalled)
    out = tmp_path / "run"
    assert main(flags(data, out, "--num_iterations 1000"), STOPPED) == STOPPED
    last = losses(out)[-1][0]
    assert steps_in(out)[:2] == ([last, 2] if last > 2 else [2, 0])
    assert not list(out.glob("*.part"))
    said = (out / "train.log").read_text()
    assert f"stopped by SIGTERM at step {last}; go on with" in said


def test_of_the_files_set_aside_those_of_the_last_time_are_kept(tmp_path):
    checkpoints, said = Checkpoints(tmp_path), []
    names = lambda: sorted(path.name for path in tmp_path.iterdir())
    for step in (2, 4, 6):
        (tmp_path / f"state_step00000{step}.pt").write_bytes(b"first")
    checkpoints.set_aside_after(2, said.append)
    first = ["state_step000002.pt", "state_step000004.pt.abandoned",
             "state_step000006.pt.abandoned"]
    assert names() == first and len(said) == 2
    checkpoints.set_aside_after(2, said.append)  # a kill and a resume: nothing is new
    assert names() == first and len(said) == 2
    for step in (3, 4):
        (tmp_path / f"state_step00000{step}.pt").write_bytes(b"second")
    checkpoints.set_aside_after(3, said.append)
    assert names() == ["state_step000002.pt", "state_step000003.pt",
                       "state_step000004.pt.abandoned"]
    assert checkpoints.aside()[0].read_bytes() == b"second"
    assert "state_step000006.pt.abandoned, set aside before, is removed" in said


def test_killed_before_its_first_file_is_written_the_same_command_begins_anew(
        data, tmp_path, monkeypatch):  # noqa: F811
    out, argv = tmp_path / "run", flags(data, tmp_path / "run", "--resume auto")
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", lambda *given: None)
        patch.setattr(Run, "validate", lambda run: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(argv)
    assert [step for step, _ in losses(out)] == [1, 2, 3] and not steps_in(out)
    main(argv)
    assert [step for step, _ in losses(out)] == [1, 2, 3, 4, 5, 6]
    aside = (out / "metrics.jsonl.abandoned").read_text()
    assert aside.count("train_loss") == 3  # nothing is lost
    for path in out.glob("state_step*"):
        path.unlink()
    logged = (out / "metrics.jsonl").read_text()
    match = "holds a run: its checkpoints are gone, remove the folder, or name another"
    with pytest.raises(InputError, match=match):  # it has validated and ended
        main(argv)
    assert (out / "metrics.jsonl").read_text() == logged and not steps_in(out)


def test_a_presets_run_is_finished_without_its_checkpoints_too(data, runs, capsys):  # noqa: F811
    """Its folder's name tells its flags."""
    for ends, options in ((6, ""), (3, "--target_val_loss 9")):
        argv = without_folder(data, f"--seed {ends} {options}")
        main(argv)
        [path.unlink() for path in runs.glob("*/*.pt")]
        capsys.readouterr()
        main(argv)
        assert f"is finished: step:{ends}/6" in capsys.readouterr().out
        with pytest.raises(InputError, match="its checkpoints are gone"):
            main([*without_folder(data, f"--seed {ends}"), "--extend", "3"])


def test_a_loss_in_fp32_that_a_signal_cut_short_is_made_by_the_next_command(
        data, tmp_path, monkeypatch):  # noqa: F811
    out, options = tmp_path / "run", "--dtype bfloat16 --val_fp32 1"
    exact = Run.validate_in_fp32

    def signalled(run):
        os.kill(os.getpid(), signal.SIGTERM)
        exact(run)

    monkeypatch.setattr(Run, "validate_in_fp32", signalled)
    assert main(flags(data, out, options), STOPPED) == STOPPED
    said = lambda: (out / "metrics.jsonl").read_text().count('"val_loss_fp32"')
    assert said() == 0
    monkeypatch.setattr(Run, "validate_in_fp32", exact)
    main(flags(data, out, f"{options} --resume auto"))
    main(flags(data, out, f"{options} --resume auto"))  # "is finished"
    assert said() == 1
    # a run that goes back has no loss of before, nor its report
    (out / "report.md").touch()
    main(flags(data, out, f"{options} --resume {out}/state_step000004.pt --max_seconds 0.001"))
    assert said() == 0 and not (out / "report.md").exists()


def test_a_leak_in_fp32_alone_reports_no_loss(data, tmp_path, monkeypatch):  # noqa: F811
    def leaks(self, idx):
        x = hidden(self, idx)
        exact = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        return x + F.pad(x[:, 1:], (0, 0, 0, 1)) if exact else x

    hidden, out = train_gpt2_afno.GPT.hidden, tmp_path / "run"
    monkeypatch.setattr(train_gpt2_afno.GPT, "hidden", leaks)
    with pytest.raises(InputError, match="causality check: the model leaks"):
        main(flags(data, out, "--dtype bfloat16 --val_fp32 1"))
    assert "val_loss_fp32" not in (out / "metrics.jsonl").read_text()
    assert (out / "train.log").read_text().splitlines()[-1].startswith("error: causality check: ")


@pytest.mark.parametrize("more, opens, status", (
    ("", 99, None), ("", 4, "leaks"), ("--target_val_loss 50 --val_loss_every 2", 1, "leaks")))
def test_a_path_that_training_opens_ends_in_no_loss(data, tmp_path, monkeypatch,  # noqa: F811
                                                    more, opens, status):
    """Where the check at the first validation saw nothing."""
    def leaks(self, idx):
        x = hidden(self, idx)
        return x + F.pad(x[:, 1:], (0, 0, 0, 1)) if steps[0] >= opens else x

    def counted(self, *given):
        steps[0] += 1
        return update(self, *given)

    update, steps = Run.update, [0]
    hidden, out = train_gpt2_afno.GPT.hidden, tmp_path / "run"
    monkeypatch.setattr(train_gpt2_afno.GPT, "hidden", leaks)
    monkeypatch.setattr(Run, "update", counted)
    with pytest.raises(InputError, match=status) if status else contextlib.nullcontext():
        main(flags(data, out, more))
    assert ("train_time_with_compilation_s" in (out / "metrics.jsonl").read_text()) == (not status)
    if status:  # the same command again: the loss is as unknown as before
        steps[0] = 0  # what opened it is in no checkpoint
        assert [row["step"] for row in validations(out)] == ([] if more else [3])
        main(flags(data, out, f"{more} --resume auto"))
        assert [row["step"] for row in validations(out)] == ([2] if more else [3, 6])
        said = (out / "train.log").read_text()
        assert said.count("causality check of validation") == (1 if more else 2)


def test_a_loss_that_is_no_number_is_a_divergence_not_a_leak(data, tmp_path,  # noqa: F811
                                                             monkeypatch):
    def broken(self, idx):
        return hidden(self, idx) * (math.nan if done[0] > 4 and not torch.is_grad_enabled() else 1)

    def counted(self, *given):
        done[0] += 1
        return update(self, *given)

    done, hidden, update = [0], train_gpt2_afno.GPT.hidden, Run.update
    monkeypatch.setattr(train_gpt2_afno.GPT, "hidden", broken)
    monkeypatch.setattr(Run, "update", counted)
    with pytest.raises(Diverged, match="validation loss nan"):
        main(flags(data, tmp_path / "run"))


def test_a_first_file_that_cannot_be_written_locks_nobody_out(data, tmp_path,  # noqa: F811
                                                              monkeypatch):
    def full(state, file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    argv = flags(data, tmp_path / "run", "--val_loss_every 1 --resume auto")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(InputError, match="cannot write state_step000000.pt"):
            main(argv)
    main(argv)
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


# -----------------------------------------------------------------------------
# a miss, and a longer constant phase


LONGER = "--num_iterations 10 --warmdown_iters 4 --val_loss_every 1 --save_every 3 " \
    "--curriculum 8:0.3,16:0.7 --predict_ahead 1 --row_order spread --target_val_loss 4.5"


@pytest.mark.slow
def test_a_miss_is_made_good_from_the_cooldowns_start(data, tmp_path):  # noqa: F811
    out = tmp_path / "run"
    main(flags(data, out, LONGER))
    said = (out / "train.log").read_text()
    first, loss = losses(out), validations(out)[-1]["val_loss"]
    assert f"missed: val_loss {loss:.4f} is {loss - 4.5:.4f} above 4.5; estimate: none, beyond " \
        "100 times as many tokens (slope of the loss by ln(tokens): " in said
    assert f"step 6, before the cooldown: python train_gpt2_afno.py --output_dir {out} --resume " \
        "auto --extend 10 --target_val_loss 4.5\n" in said  # as long again
    main(flags(data, out, LONGER + " --resume auto --extend 7"))
    main(flags(data, tmp_path / "whole", LONGER + " --extend 7"))
    assert losses(out) == losses(tmp_path / "whole") and losses(out)[:6] == first[:6]
    assert len(losses(out)) == 17 and losses(out)[6:10] != first[6:]
    assert_same(newest(out), newest(tmp_path / "whole"))
    rates = [line["lr"] for line in metrics(out) if "train_loss" in line]
    assert rates[12] == rates[5] > rates[13] * 0.99 and rates[16] == rates[5] / 4
    aside = [line["step"] for _, line in read_metrics_of(out) if "train_loss" in line]
    assert aside == [7, 8, 9, 10] and (out / "state_step000010.pt.abandoned").exists()
    assert "missed: " in (out / "train.log").read_text()[:len(said)]  # the log goes on
    main(flags(data, out, LONGER + " --resume auto --extend 9"))  # and once more
    assert [step for step, _ in losses(out)] == list(range(1, 20))


def read_metrics_of(folder):
    """Return what was set aside, as read_metrics does."""
    there = folder / "aside"
    there.mkdir()
    shutil.copy(folder / "metrics.jsonl.abandoned", there / "metrics.jsonl")
    return read_metrics(there)


def test_a_start_that_fails_takes_nothing_back(data, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Such as an extension that is stopped, or refused, before its first step."""
    out, options = tmp_path / "run", LONGER + " --save_every 1 --val_loss_every 1"
    worse = iter(range(5, 100))  # the best is the first, as where a run learns by heart
    monkeypatch.setattr(Run, "validation_loss", lambda run, runtime: float(next(worse)))
    main(flags(data, out, options))
    (out / "report.md").write_text("of ten steps")
    names = lambda: sorted(path.name for path in out.iterdir())
    before, rows = names(), (out / "metrics.jsonl").read_bytes()

    def stopped(run, shapes, training=True):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "refuse_leaks", stopped)
        with pytest.raises(KeyboardInterrupt):
            main(flags(data, out, options + " --extend 7 --resume auto"))
    Checkpoints(out).thread.submit(int).result()  # what is removed is gone by now
    assert names() == before and (out / "metrics.jsonl").read_bytes() == rows
    capsys.readouterr()
    main(flags(data, out, options + " --resume auto"))
    assert "is finished: step:10/10" in capsys.readouterr().out


def test_a_finished_run_without_a_report_gets_one(data, tmp_path, monkeypatch,  # noqa: F811
                                                  capsys):
    out = tmp_path / "run"
    main(flags(data, out))
    monkeypatch.setattr(train_gpt2_afno, "report_if_missing", report.report_if_missing)
    capsys.readouterr()
    main(flags(data, out, "--resume auto"))
    assert capsys.readouterr().out.splitlines()[2] == f"report: {out}/report.md"
    assert "Finished: step 6 of 6." in (out / "report.md").read_text()


def test_a_target_that_was_typed_is_not_kept(data, tmp_path, capsys):  # noqa: F811
    """The command without it goes on to the end."""
    out = tmp_path / "run"
    options = "--learning_rate 0.01 --num_iterations 12 --val_loss_every 2"
    main(flags(data, out, options + " --target_val_loss 4.5"))
    assert len(losses(out)) < 12
    capsys.readouterr()
    main(flags(data, out, options + " --target_val_loss 4.5 --resume auto"))
    assert "is finished" in capsys.readouterr().out
    main(flags(data, out, options + " --resume auto"))
    assert len(losses(out)) == 12


def test_a_target_that_is_reached_after_a_miss(data, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "run"
    options = "--learning_rate 0.01 --num_iterations 12 --warmdown_iters 6 --val_loss_every 2 " \
        "--target_val_loss 4 --resume auto"
    main(flags(data, out, options))
    extend = re.search(r"--extend \d+", (out / "train.log").read_text())[0]
    main(flags(data, out, f"{options} {extend}"))
    assert validations(out)[-1]["val_loss"] <= 4
    assert metrics(out)[-1]["wall_clock_time_to_target_loss"] > 0
    capsys.readouterr()
    main(flags(data, out, f"{options} {extend}"))
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize("rounded, exact, flag", (
    (4.9998, 5.0003, "goal_val_loss"), (5.0003, 4.9998, "goal_val_loss"),
    (4.9998, 5.0003, "target_val_loss")))
def test_the_loss_in_fp32_decides_about_a_target(data, tmp_path, monkeypatch,  # noqa: F811
                                                 rounded, exact, flag):
    out, fp32 = tmp_path / "run", lambda runtime: runtime.dtype == torch.float32
    monkeypatch.setattr(Run, "validation_loss",
                        lambda run, runtime: exact if fp32(runtime) else rounded)
    main(flags(data, out, f"--dtype bfloat16 --val_fp32 1 --{flag} 5"))
    log, hit, missed = (out / "train.log").read_text(), exact <= 5, f"missed: val_loss {exact:.4f}"
    assert ("target 5 reached" in log, missed in log) == (hit, not hit)
    assert losses(out)[-1][0] == 6, "it goes on where only the loss in bf16 has reached the target"
    assert (metrics(out)[-1]["wall_clock_time_to_target_loss"] is None) != hit
    page = report.report_of(out).read_text()
    line = next(line for line in page.splitlines() if "loss 5 " in line)
    assert ("**reached**" in line) == hit


@pytest.mark.parametrize("at, options", (
    (3, "--target_val_loss 5"), (6, "--goal_val_loss 5"),
    (6, "--goal_val_loss 5 --val_loss_every 0 --warmdown_iters 0")))
def test_a_signal_in_the_loss_in_fp32_leaves_the_decision_to_the_next_command(
        data, tmp_path, monkeypatch, at, options):  # noqa: F811
    out, argv = tmp_path / "run", f"--dtype bfloat16 --val_fp32 1 --resume auto {options}"
    exact, signalled = 5.0003, [at]

    def validation_loss(run, runtime):
        if runtime.dtype != torch.float32:
            return 4.9998
        if run.step in signalled:
            os.kill(os.getpid(), signal.SIGTERM)
            return signalled.remove(run.step)
        return exact

    monkeypatch.setattr(Run, "validation_loss", validation_loss)
    assert main(flags(data, out, argv), STOPPED) == STOPPED
    log = (out / "train.log").read_text()
    assert losses(out)[-1][0] == at and "missed" not in log and "5 reached" not in log
    assert ("--target_val_loss 5" in log.partition("go on with ")[2]) == ("target" in options)
    main(flags(data, out, argv))
    log = (out / "train.log").read_text()
    assert losses(out)[-1][0] == 6 and "missed: val_loss 5.0003 is 0.0003 above 5;" in log
    assert "target 5 reached" not in log
    assert metrics(out)[-1]["wall_clock_time_to_target_loss"] is None


def test_a_goal_reached_on_the_way_and_missed_at_the_end(data, tmp_path,  # noqa: F811
                                                         monkeypatch):
    values = [4.9, 5.1]
    monkeypatch.setattr(Run, "validation_loss", lambda *given: values.pop(0))
    main(flags(data, tmp_path / "run", "--goal_val_loss 5"))
    log = (tmp_path / "run/train.log").read_text()
    assert "target 5 reached: step 3" in log and "missed: val_loss 5.1000" in log


def test_an_extension_that_is_stopped_at_once_is_not_forgotten(data, tmp_path):  # noqa: F811
    out = tmp_path / "run"
    main(flags(data, out, LONGER))
    main(flags(data, out, LONGER + " --extend 3 --resume auto --max_seconds 0.001"))
    assert newest(out)["step"] == 6
    main(["--output_dir", str(out), "--resume", "auto"])  # as it says when it stops
    assert losses(out)[-1][0] == 13


def test_a_file_in_a_new_folder_is_there_before_the_first_step(data, tmp_path,  # noqa: F811
                                                               monkeypatch):
    old, new = tmp_path / "old", tmp_path / "new"
    main(flags(data, old, LONGER))
    from_file = LONGER + f" --extend 3 --resume {old}/state_step000006.pt"
    main(flags(data, new, from_file + " --val_loss_every 100 --max_seconds 0.001"))
    assert "none: no step yet" in (report.report_of(new)).read_text()
    shutil.rmtree(new)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "update", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(flags(data, new, from_file))
    assert steps_in(new) == [6]
    main(["--output_dir", str(new), "--resume", "auto"])
    assert losses(new)[-1][0] == 13


@pytest.mark.slow
def test_a_model_that_diverged_is_not_called_a_leak(data, tmp_path):  # noqa: F811
    out, options = tmp_path / "run", "--learning_rate 1000 --val_loss_every 5 --optimizer muon"
    with pytest.raises(Diverged, match="step [3-6]: .*checkpoints kept: state_step00000[0-4]"):
        main(flags(data, out, options))
    with pytest.raises(Diverged):  # from one that is kept
        main(flags(data, out, options + " --resume auto"))


def test_a_start_whose_outputs_are_not_finite_leaves_all_as_it_was(data, tmp_path,  # noqa: F811
                                                                   monkeypatch):
    """The machine may be the cause: the weights were found finite."""
    out = tmp_path / "run"
    main(flags(data, out, "--num_iterations 2"))
    there, hidden = steps_in(out), train_gpt2_afno.GPT.hidden
    monkeypatch.setattr(train_gpt2_afno.GPT, "hidden", lambda *given: hidden(*given) * math.nan)
    with pytest.raises(Diverged, match="step 2: the model's outputs are not finite"):
        main(flags(data, out, "--num_iterations 4 --resume auto"))
    assert steps_in(out) == there and not list(out.glob("*.abandoned"))


@pytest.mark.slow
def test_a_cooldown_that_has_not_begun_is_put_off(data, tmp_path):  # noqa: F811
    out = tmp_path / "run"
    main(flags(data, out, LONGER + " --max_seconds 0.001"))
    main(flags(data, out, LONGER + " --extend 3 --resume auto"))
    assert len(losses(out)) == 13 and not list(out.glob("state*.abandoned"))


def test_without_a_state_before_the_cooldown_there_is_no_extension(data, tmp_path):  # noqa: F811
    out = tmp_path / "run"
    main(flags(data, out, LONGER))
    for source in (out / "state_step000010.pt", "auto"):
        match = "--extend goes on from step 6 or one before, where the cooldown had"
        with pytest.raises(InputError, match=match):
            main(flags(data, out, f"{LONGER} --extend 3 --resume {source}"))
        [path.unlink() for path in out.glob("*.pt") if "10" not in path.name]
    assert len(losses(out)) == 10 and not list(out.glob("*.abandoned"))


@pytest.mark.slow
def test_a_goal_is_noted_and_training_goes_on(data, tmp_path):  # noqa: F811
    out = tmp_path / "run"
    options = "--num_iterations 30 --learning_rate 0.01 --goal_val_loss 4.5 --resume auto"
    main(flags(data, out, options))
    assert losses(out)[-1][0] == 30
    hit = next(line for line in validations(out) if line["val_loss"] <= 4.5)
    assert hit["step"] < 30
    assert metrics(out)[-1]["wall_clock_time_to_target_loss"] == hit["train_time_s"]
    log = (out / "train.log").read_text()
    assert f"target 4.5 reached: step {hit['step']}, " in log and "missed" not in log
    main(flags(data, out, options + " --num_iterations 32"))
    assert metrics(out)[-1]["wall_clock_time_to_target_loss"] == hit["train_time_s"]


def test_the_steps_of_a_miss_are_those_of_the_measured_curve(tmp_path):
    law = lambda step: 2 + 8 * step ** -0.28
    curve = [dict(step=step, tokens=10 * step, val_loss=law(step)) for step in range(10, 101, 10)]
    args = argparse.Namespace(num_iterations=100, warmdown_iters=20, warmup_iters=10, extend=0,
                              target_val_loss=None, predict_ahead=1, predict_prefix=0)
    slopes = measured_slope(curve[6:8]), (law(80) - law(70)) / math.log(8 / 7)
    assert slopes[0] == pytest.approx(slopes[1])
    for more in (10, 50, 400):
        steps, whose = more_steps(curve, [], law(100 + more), args)
        assert abs(steps - more) <= 1 + 0.05 * more and whose.endswith(", this run's")
    assert float(whose.split(",")[0]) == pytest.approx(-0.28 * 8 * 100 ** -0.28, rel=0.03)
    thin = [line for line in curve if line["step"] in (40, 60, 100)]  # none in the last quarter
    steps, whose = more_steps(thin, [], law(150), args)
    assert abs(steps - 50) <= 4 and whose.endswith(", this run's")
    early = [line for line in curve if line["step"] in (10, 20, 100)]  # where a loss falls fastest
    for few in (early, curve[3:4] + curve[-1:],
                [line | dict(val_loss=3.0) for line in curve]):
        target = few[-1]["val_loss"] - 0.175 / 0.28 * (1 - 2 ** -0.28)
        steps, whose = more_steps(few, [], target, args)
        assert abs(steps - 100) <= 1 and whose.startswith("-0.175, a larger model's")
    losses = [dict(step=step, tokens=10 * step, train_loss=law(step)) for step in range(1, 101)]
    args.predict_ahead = 0  # then losses of training are of the next token alone
    steps, whose = more_steps(early, losses, law(150), args)
    assert abs(steps - 50) <= 4 and whose.endswith(", this run's")
    assert more_steps(curve, [], 1.9, args)[0] == math.inf  # below what any number of tokens brings
    log, args.extend = argparse.Namespace(validations=curve, folder=tmp_path), 7
    (tmp_path / "state_step000070.pt").touch()
    for target, estimate, more in (
            (law(150), r"5\d\d more tokens, 5\d steps", r"6\d"),
            (law(5000), r".*, \d{4} steps", r"\d{4}"),
            (law(20_000), "none, beyond 100 times as many tokens", 100),
            (1.9, "none, beyond 100 times as many tokens", 100)):
        missed, command = describe_miss(log, Checkpoints(tmp_path), target, args)
        assert re.search(rf"estimate: {estimate} \(slope .* -0.6\d\d, this run's\)$", missed)
        extend = int(re.search(r"go on from step 87, .* --extend (\d+)$", command)[1])
        assert re.fullmatch(str(more), str(extend - 7))
    log.folder, args.target_val_loss = tmp_path / "a b", 3.25
    command = describe_miss(log, Checkpoints(tmp_path), law(150), args)[1].split("python ")[1]
    typed = train_gpt2_afno.parse_flags(shlex.split(command)[1:])
    assert (typed["output_dir"], typed["target_val_loss"]) == (f"{tmp_path}/a b", 3.25)


@pytest.mark.slow
def test_new_shards_come_after_the_pass_that_was_begun(data, tmp_path):  # noqa: F811
    shards = shutil.copytree(data, tmp_path / "data")
    options = "--row_order spread --num_iterations 10 --warmdown_iters 4 --resume auto"
    main(flags(shards, tmp_path / "run", options))
    shutil.copy(shards / "train_0_000000.bin", shards / "train_9.bin")
    state = Checkpoints.load(tmp_path / "run/state_step000006.pt")
    main(flags(shards, tmp_path / "run", options + " --extend 10"))
    stream = TokenStream(f"{shards}/train_*.bin", VOCABULARY, "input_bin")
    args = argparse.Namespace(
        row_order="spread", new_pass=0, extend=10, batch_size=2, grad_accumulation_steps=1)
    found = passes(stream, state, args, 16)
    assert found == [(0, 437), (27 * 16, 537)]
    loader = TrainLoader(stream, 2, 16, 0, 0, 1, "cpu", "spread", found)
    starts = [loader.start(row) // 16 for row in range(27 + 33)]
    assert sorted(starts[:27]) == list(range(27)) and sorted(starts[27:]) == list(range(33))
    last = newest(tmp_path / "run")
    assert last["position"] == 20 * 32 and (last["pass_began"], last["data_tokens"]) == (432, 537)
