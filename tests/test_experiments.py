"""Studies and plots.

Reading of metrics, skipped and refused runs, failures, tables and pictures, every arm's flags.
"""
import dataclasses
import json
import math
import os
import re
import shlex
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

import train_gpt2_afno as trainer
from data.text_to_bin import InputError, ShardWriter, owned, read_bin, run_main, validated_on
from experiments import (ablation_studies, plot_runs, recall, scaling_analysis, screening,
                         two_cards)
from experiments.ablation_studies import STUDIES, Study, main
from experiments.plot_runs import read_run, time_to_loss

ROOT = Path(trainer.__file__).parent
CURVE = [(0, 0.0, 8.0), (100, 10.0, 6.0), (200, 30.0, 5.0), (300, 40.0, 5.5), (400, 50.0, 4.0)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("train", 300), ("val", 40)):
        writer = ShardWriter(folder / name, count)
        writer.write(np.arange(count) % 50)
        writer.close()
    return folder


@pytest.fixture
def pair(monkeypatch, tmp_path_factory):
    """A study of two arms of two steps, without reports; one thread each: others use the cores."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(
        "import sys, types\nsys.modules['report'] = types.SimpleNamespace("
        "report_at_end=id, report_if_missing=id)\n")
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    monkeypatch.setitem(STUDIES, "pair", Study(
        "Two arms.", {"one": "--mixer afno", "two": "--mixer attn --learning_rate 0.003"},
        "--preset baseline --device cpu --model d4 --batch_size 2 "
        "--grad_accumulation_steps 1 --sequence_length 16 --save_every 0", 64))


@pytest.fixture
def fake_trainer(monkeypatch, tmp_path):
    """A repository whose trainer is the script that the test writes there."""
    monkeypatch.setattr(ablation_studies, "ROOT", tmp_path)
    return tmp_path / "train_gpt2_afno.py"


def write_run(folder: Path, rows: list[dict], end: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    return folder


def write_finished(output: Path, arm: str, step: int = 2, **more: str) -> Path:
    """Write the files of a finished run of the study pair; more: flags beside its own."""
    flags = ablation_studies.flags_of(STUDIES["pair"], arm, 1337, output / "pair", None,
                                      {f"--{name}": value for name, value in more.items()})
    folder = write_run(output / f"pair/{arm}-seed1337", [
        dict(step=step, tokens=64, train_loss=8.0, train_time_s=1.0),
        dict(step=step, tokens=64, val_loss=7.0, train_time_s=1.0),
        dict(step=step, train_time_s=1.0, train_time_with_compilation_s=2.0,
             peak_memory_usage=2**30, wall_clock_time_to_target_loss=None)])
    command = ablation_studies.command(flags).removeprefix("python ")
    (folder / "train.log").write_text(
        f"command: {command}\ntorch 2.0, 1 x CPU\nmodel: d4, 1,000 parameters, mixers attn\n")
    return folder


# -----------------------------------------------------------------------------
# curves


@pytest.mark.parametrize("loss, expected", (
    (8.0, (0.0, 0)), (9.0, (0.0, 0)), (7.0, (5.0, 50)), (6.0, (10.0, 100)), (5.25, (25.0, 175)),
    (5.0, (30.0, 200)), (4.0, (50.0, 400)), (4.75, (45.0, 350)), (3.99, None)))
def test_time_to_loss_is_linear_between_validations(loss, expected):
    assert time_to_loss(CURVE, loss) == (expected and pytest.approx(expected))
    assert time_to_loss([], loss) is None


def test_metrics_are_read_up_to_a_line_that_is_cut_off(tmp_path):
    rows = [dict(step=0, tokens=0, val_loss=9.0, train_time_s=0.0),
            dict(step=1, tokens=32, train_loss=8.5, train_time_s=0.5, lr=0.1),
            dict(step=1, tokens=32, val_loss=8.0, train_time_s=0.5)]
    summary = dict(step=1, tokens_per_s=64.0, wall_clock_time_to_target_loss=None)
    cut = read_run(write_run(tmp_path / "cut", rows, '{"step": 2, "tok'))
    assert cut.train == [(32, 0.5, 8.5)] and cut.curve == [(0, 0.0, 9.0), (32, 0.5, 8.0)]
    assert cut.summary is None
    whole = read_run(write_run(tmp_path / "whole", [*rows, summary]) / "metrics.jsonl")
    assert whole.summary == summary
    with pytest.raises(InputError, match="metrics.jsonl: line 4 is not a row"):
        read_run(write_run(tmp_path / "bad", rows, '{"step": 2, "tok\n{}\n'))
    with pytest.raises(InputError, match="metrics.jsonl: No such file"):
        read_run(tmp_path)


def test_labels_tell_runs_of_one_name_apart(tmp_path):
    runs = [read_run(write_run(tmp_path / name, [])) for name in ("a/same", "b/same", "b/other")]
    assert plot_runs.labels(runs) == ["a/same", "b/same", "other"]


def test_a_running_mean_of_a_fiftieth():
    values = np.random.default_rng(0).random(100)
    expected = [values[max(0, i - 1) : i + 1].mean() for i in range(100)]
    assert np.allclose(plot_runs.smoothed(values), expected)
    assert len(plot_runs.smoothed(values[:0])) == 0


def test_plot_runs_makes_pictures_and_one_line_errors(tmp_path, monkeypatch, capsys):
    def command(*words):
        monkeypatch.setattr(sys, "argv", ["plot_runs.py", *map(str, words)])
        run_main(plot_runs.main)

    run = write_run(tmp_path / "run", [
        dict(step=i, tokens=32 * i, train_time_s=0.5 * i, **{name: 9 - 0.1 * i})
        for i in range(20) for name in ("train_loss", "val_loss")])
    monkeypatch.chdir(tmp_path)
    archived = ROOT / "experiments/runs/2026-11-24-shakespeare/shakespeare-cpu/metrics.jsonl"
    command(run, archived, "--x", "seconds")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == "curves.png: 2 runs\n"
    write_run(tmp_path / "empty", [])
    for words, error in (
            ((run, "empty"), "empty/metrics.jsonl: no rows of training or validation yet"),
            ((run, "--output", "a.text"), "--output a.text: its ending must be one of ")):
        with pytest.raises(SystemExit, match="2"):
            command(*words)
        assert re.fullmatch(f"error: {re.escape(error)}.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("name", ("tokens", "val_loss", "train_time_s"))
def test_what_is_no_number_is_refused_also_in_the_last_line(tmp_path, name):
    for value in ("text", None, [8.0], True, 10**400, -(10**400), 1.7e308, -1.7e308):
        row = dict(step=1, tokens=1, val_loss=4.0, train_time_s=1.0) | {name: value}
        with pytest.raises(InputError, match="metrics.jsonl: line 1 is not a row of metrics"):
            read_run(write_run(tmp_path, [row]))


@pytest.mark.parametrize("make, words", (
    (os.mkfifo, "no ordinary file"), (lambda path: path.symlink_to(os.devnull), "no ordinary file"),
    (os.mkdir, "Is a directory")))
def test_what_is_no_ordinary_file_is_refused(tmp_path, make, words):
    make(tmp_path / "metrics.jsonl")
    with pytest.raises(InputError, match=f"metrics.jsonl: {words}$"):
        read_run(tmp_path)


def test_losses_that_are_not_finite_are_left_out(tmp_path, capsys):
    def row(**loss):
        return dict(step=1, tokens=1, train_time_s=1.0, **loss)

    run = write_run(tmp_path / "all", [row(train_loss=math.inf), row(val_loss=math.nan)])
    with pytest.raises(InputError, match="all/metrics.jsonl: no loss is finite"):
        plot_runs.plot([read_run(run)], tmp_path / "curves.png")
    run = write_run(tmp_path / "some", [row(train_loss=math.inf), row(train_loss=8.0)])
    plot_runs.plot([read_run(run)], tmp_path / "curves.png", ("tokens",))
    assert capsys.readouterr().err.endswith("metrics.jsonl: left out, as not finite: 1 losses\n")


def test_a_legend_has_every_name_as_it_is(tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    names, texts = ["p$x_$", "_private", "plain", os.fsdecode(b"b\xff")], []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *arguments, **options: texts.extend(
        figure.axes[-1].get_legend().get_texts()))
    plot_runs.plot([read_run(write_run(tmp_path / name, [
        dict(step=1, tokens=1, val_loss=4.0, train_time_s=1.0)])) for name in names],
        tmp_path / "curves.png")
    assert [text.get_text() for text in texts] == [*names[:-1], "b?"]
    assert not any(text.get_parse_math() for text in texts)


# -----------------------------------------------------------------------------
# studies


@pytest.mark.slow
def test_a_study_runs_then_skips_and_refuses_other_flags(data, pair, tmp_path, capsys):
    argv = ["pair", "--data", str(data), "--output", str(tmp_path)]
    assert main(argv) == 0
    first = capsys.readouterr().out
    assert "2 of 2 runs finished" in first and "skipped" not in first
    folder = tmp_path / "pair"
    assert {path.name for path in folder.iterdir()} == {
        "one-seed1337", "two-seed1337", "table.md", "curves.png"}
    for name in ("one-seed1337", "two-seed1337"):  # checkpoints are gone
        names = {path.name for path in (folder / name).iterdir()}
        # source: of a working tree that is not committed
        assert names - {"source"} == {"train.log", "metrics.jsonl"}
        assert read_run(folder / name).curve[-1][0] == 64
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    table = (folder / "table.md").read_text()
    one, two = (line.split(" | ") for line in table.splitlines()
                if line.startswith(("| one", "| two")))
    final = [read_run(folder / f"{arm}-seed1337").curve[-1][2] for arm in ("one", "two")]
    assert one[1:4] == [f"{final[0]:.4f}", "one seed", "+0.0000"]
    assert two[3] == f"{final[1] - final[0]:+.4f}"
    assert one[5] == "7,162,528" and one[7] == "64" and two[5] == "7,219,328" and float(one[8]) > 0
    header = next(line for line in table.splitlines() if line.startswith("| arm"))
    assert len(header.split(" | ")) == len(one) == len(two) and "Machine: torch " in table
    for words in (f"--input_bin '{data}/*train_*.bin'", "--mixer attn --learning_rate 0.003 ",
                  "--num_iterations 2 --val_loss_every 1 --seed 1337 "
                  f"--output_dir {folder}/two-seed1337"):
        assert words in table

    before = table, (folder / "one-seed1337/metrics.jsonl").read_text()
    assert main([*argv, "--", "--max_seconds", "100"]) == 0  # does not change what is trained
    assert capsys.readouterr().out.count("finished before, skipped") == 2
    assert before == ((folder / "table.md").read_text().replace(" --max_seconds 100", ""),
                      (folder / "one-seed1337/metrics.jsonl").read_text())
    with pytest.raises(InputError, match="one-seed1337 holds a run with other flags: "
                                         "--warmup_iters is not given there, now 3; delete it"):
        main([*argv, "--", "--warmup_iters", "3"])
    with pytest.raises(InputError, match="--num_iterations is 2 there, now 4"):
        main([*argv, "--tokens", "128"])


def test_a_preset_that_is_another_now_is_refused(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation_studies, "plot", lambda *_: None)
    for arm in STUDIES["pair"].arms:
        log = write_finished(tmp_path, arm) / "train.log"
        flags = shlex.split(log.read_text().splitlines()[0])[2:]
        args = trainer.merge_flags(trainer.parse_flags(flags), torch.device("cpu"), None, print)
        said = [f"{name} {value}" for name, value in vars(args).items()
                if value != trainer.DEFAULTS.get(name, value)]
        with log.open("a") as file:
            file.write(f"flags that differ from --help's defaults: {', '.join(said)}\n")
    argv = ["pair", "--output", str(tmp_path)]
    assert main(argv) == 0
    monkeypatch.setitem(trainer.PRESETS, "baseline",
                        {**trainer.PRESETS["baseline"], "weight_decay": 0.7})
    with pytest.raises(InputError, match="one-seed1337 holds a run with other flags: --weight_decay"
                                         " is .* there, now 0.7; delete it"):
        main(argv)


def test_arms_of_other_code_are_said_in_the_table(pair, tmp_path, capsys):
    for digit, arm in enumerate(("one", "two")):
        log = write_finished(tmp_path, arm) / "train.log"
        log.write_text(f"sha256: {str(digit) * 64} afno.py\n{log.read_text()}")
    words = "The runs had different code, in afno.py."
    for expected in (True, False):
        assert main(["pair", "--output", str(tmp_path)]) == 0
        assert (words in capsys.readouterr().err) == expected
        assert (words in (tmp_path / "pair/table.md").read_text()) == expected
        log.write_text(log.read_text().replace("1" * 64, "0" * 64))


@pytest.mark.parametrize("words", ("--mixer attn", "--seed_of_none 1 --learning_rate 0.002"))
def test_flags_that_make_arms_alike_are_refused(pair, tmp_path, words):
    with pytest.raises(InputError, match=f"{words.split()[-2]} is what arms of pair differ in: le"):
        main(["pair", "--output", str(tmp_path), "--", *words.split()])


def test_a_micro_batch_may_be_as_small_as_memory_asks(pair, monkeypatch, tmp_path, capsys):
    arms = {"one": "--mixer afno", "two": "--mixer attn --grad_accumulation_steps 8"}
    monkeypatch.setitem(STUDIES, "pair", dataclasses.replace(STUDIES["pair"], arms=arms))
    assert main(["pair", "--output", str(tmp_path), "--dry_run", "--", "--grad_accumulation_steps",
                 "2"]) == 0
    assert capsys.readouterr().out.count("--grad_accumulation_steps 2") == 2


def test_what_a_log_was_validated_on_is_of_starts_that_validated():
    start = "commit: x\ndata: x; validation: y, {} targets of 99, sha256 {}\n"
    log = start.format(8, "0a") + "step:3/9 val_loss:4.0\n" + start.format(7, "0b")
    assert validated_on(log) == [("8 targets", "sha256 0a")]
    assert validated_on(log + "step:6/9 val_loss:4.0\n")[1:] == [("7 targets", "sha256 0b")]
    assert plot_runs.unlike([log]) == ""


def test_a_screening_compares_flags_as_logs_have_them():
    words = f"x.py --input_bin {ROOT}/data/x --lr=0.1 --layers 1 '2' --on"
    assert screening.pairs(words, "train.log") == [
        ("--input_bin", "data/x"), ("--lr", "0.1"), ("--layers", "1", "2"), ("--on",)]


def test_a_result_that_cannot_be_written_names_its_file(tmp_path):
    with pytest.raises(InputError, match=f"cannot write {tmp_path}/no/rows.jsonl: No such file"):
        recall.append_lines(tmp_path / "no/rows.jsonl")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are cards")
def test_two_cards_says_that_there_is_none(tmp_path):
    with pytest.raises(InputError, match="--device cuda: this torch sees no CUDA device"):
        two_cards.main(["parts", "--output", str(tmp_path)])


@pytest.mark.parametrize("script", ("recall", "transfer"))
def test_what_a_study_runs_says_so_where_it_is_started_alone(script):
    result = subprocess.run([sys.executable, ROOT / f"experiments/{script}.py", "--help"],
                            capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: python experiments/ablation_studies.py {script} runs this\n"


def test_a_study_owns_its_folder(pair, fake_trainer, tmp_path):
    with owned(tmp_path / "pair", "x"), pytest.raises(InputError, match="t .*/pair is in use by"):
        main(["pair", "--output", str(tmp_path)])
    (tmp_path / "pair").mkdir(exist_ok=True)
    (tmp_path / "pair/table.md").write_text("mine")
    with pytest.raises(InputError, match="--output .*/pair has a table.md of something else"):
        main(["pair", "--output", str(tmp_path)])


def test_steps_of_extend_count(pair, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablation_studies, "plot", lambda *_: None)
    for arm in STUDIES["pair"].arms:
        write_finished(tmp_path, arm, step=4, extend="2")
    assert main(["pair", "--output", str(tmp_path), "--", "--extend", "2"]) == 0
    assert capsys.readouterr().out.count("finished before, skipped") == 2
    with pytest.raises(InputError, match="--extend must be an integer >= 0, got -1"):
        ablation_studies.last_step({"--num_iterations": "2", "--extend": "-1"})


@pytest.mark.parametrize("name, change, message", (
    ("train.log", lambda text: b"", "not the log of a finished run"),
    ("train.log", lambda text: text[text.index(b"\n"):], "not the log of a finished run"),
    ("train.log", lambda text: text + b"\xff", "not text"),
    *(("train.log", lambda text, word=word: text.replace(b" --mixer", word + b" --mixer"),
       "its last command is not made of pairs --name value") for word in (b" '", b" --bare")),
    *(("metrics.jsonl", lambda text, word=word: re.sub(b".*%s_loss.*\n" % word, b"", text),
       f"a finished run, but no rows of {word.decode()}") for word in (b"train", b"val")),
    ("metrics.jsonl", lambda text: text.replace(b"peak_memory_usage", b"p"),
     "its summary must have the numbers step, .*, peak_memory_usage"),
    ("eval-1024.txt", lambda text: b"", "it has no val_loss"),
))
def test_damaged_files_of_a_finished_run_are_one_line_and_cost_nothing(
        pair, tmp_path, name, change, message):
    for arm in STUDIES["pair"].arms:
        folder = write_finished(tmp_path, arm)
    (folder / "eval-1024.txt").write_text("step:2 sequence_length:1024 val_loss:4.5000\n")
    (folder / "state_step000002.pt").touch()
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    with pytest.raises(InputError, match=f"two-seed1337/{name}: {message}.*; delete the run's "
                                         "folder, or restore the file$") as caught:
        main(["pair", "--output", str(tmp_path)])
    assert "\n" not in str(caught.value) and (folder / "state_step000002.pt").exists()


def test_a_failed_arm_is_reported_and_the_others_go_on(pair, fake_trainer, tmp_path, capsys):
    fake_trainer.write_text(
        "import sys\nprint('a line')\n"
        "sys.exit(f'no {sys.argv[sys.argv.index(\"--mixer\") + 1]}')")
    unfinished = tmp_path / "studies/pair/two-seed2"
    unfinished.mkdir(parents=True)
    (unfinished / "state_step000001.pt").touch()
    assert main(["pair", "--seeds", "2", "--output", str(tmp_path / "studies")]) == 1
    said = capsys.readouterr()
    assert said.err == ("error: one-seed2: not finished, exit status 1: no afno\n"
                        "error: two-seed2: not finished, exit status 1: no attn\n")
    assert "0 of 2 runs finished" in said.out
    assert (unfinished / "state_step000001.pt").exists()


def test_a_study_for_a_gpu_says_so_on_a_cpu_and_of_a_killed_run_that_memory_may_be_short(
        pair, fake_trainer, tmp_path, capsys, monkeypatch):
    fake_trainer.write_text("import os\nprint('a line', flush=True)\nos.kill(os.getpid(), 9)")
    monkeypatch.setattr(STUDIES["pair"], "common", f"{ablation_studies.GPU} --n_head 3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["pair", "--output", str(tmp_path / "studies")]) == 1
    warning, error, _ = capsys.readouterr().err.splitlines()
    assert warning.startswith("no GPU here: pair is for one, on a CPU it may take days")
    assert error == ("error: one-seed1337: not finished, exit status -9 (killed, as where memory "
                     "is short): a line")
    main(["pair", "--output", str(tmp_path / "studies"), "--", "--device", "cpu"])
    assert "no GPU" not in capsys.readouterr().err  # it was asked for


def test_an_unfinished_run_is_resumed(pair, fake_trainer, tmp_path):
    fake_trainer.write_text("import sys\nprint(sys.argv[-2:])")
    assert ablation_studies.train({"--output_dir": "run"}) == (0, "['--output_dir', 'run']")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/state_step000001.pt").touch()
    assert ablation_studies.train({"--output_dir": "run"}) == (0, "['--resume', 'auto']")


@pytest.mark.slow
def test_a_run_of_longer_rows_is_evaluated_at_the_common_length(
        data, pair, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablation_studies, "COMMON_LENGTH", 8)
    monkeypatch.delitem(STUDIES["pair"].arms, "one")
    argv = ["pair", "--data", str(data), "--output", str(tmp_path)]
    assert main([*argv, "--keep_checkpoints"]) == 0
    tokens = torch.from_numpy(read_bin(next(data.glob("val_*.bin"))).astype(np.int64))
    folder = tmp_path / "pair/two-seed1337"
    state = torch.load(folder / "state_step000002.pt")
    model = trainer.GPT(trainer.GPTConfig(**state["config"]))
    model.load_state_dict(state["model"])
    rows = [tokens[i : i + 9][None] for i in range(0, 39, 8)]  # 39 targets, each of them once
    loss = sum(model(row[:, :-1], row[:, 1:])[1].item() * (row.size(1) - 1) for row in rows) / 39
    said = re.search(r"sequence_length:8 val_tokens:39 val_loss:(\S+)",
                     (folder / "eval-1024.txt").read_text())
    assert float(said.group(1)) == pytest.approx(loss, abs=1e-3)
    # as if the study had been stopped after the run
    (folder / "eval-1024.txt").unlink()
    assert main(argv) == 0  # finished, evaluated: checkpoints go
    assert not list(tmp_path.glob("pair/*/*.pt"))
    assert f"| {said.group(1)} |" in (tmp_path / "pair/table.md").read_text()
    # not a checkpoint: cannot be evaluated
    (folder / "state_step000002.pt").touch()
    (folder / "eval-1024.txt").unlink()
    capsys.readouterr()
    assert main(argv) == 1
    error = "error: two-seed1337: not evaluated at 8 tokens, exit status 2\n"
    assert error in capsys.readouterr().err


def test_a_stopped_study_stops_its_run(pair, fake_trainer, tmp_path, monkeypatch):
    """The run has time to save."""
    fake_trainer.write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, "
        "lambda *_: (time.sleep(0.3), open('saved', 'w'), sys.exit()))\n"
        "print('ready', flush=True)\ntime.sleep(20)")

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.print", interrupt)  # as Ctrl-C at the run's first line would
    with pytest.raises(KeyboardInterrupt):
        ablation_studies.train({"--output_dir": "run"})
    assert (tmp_path / "saved").exists()


def test_means_and_differences_are_over_seeds(tmp_path):
    def run(name, losses, seconds):
        rows = [dict(step=i, tokens=100 * i, val_loss=loss, train_time_s=seconds * i)
                for i, loss in enumerate(losses)]
        rows += [dict(step=i, tokens=100 * i, train_loss=8.0, train_time_s=seconds * i)
                 for i in (1, 2)]
        folder = write_run(tmp_path / name, [*rows, dict(
            step=2, wall_clock_time_to_target_loss=None, peak_memory_usage=2**30,
            train_time_s=2 * seconds, train_time_with_compilation_s=3 * seconds)])
        (folder / "train.log").write_text("model: d4, 1,000 parameters, mixers attn\n")
        return read_run(folder)

    anchors = {1: run("a1", (9, 7, 5), 1.0), 2: run("a2", (9, 7, 6), 1.0)}
    runs = {1: run("b1", (9, 5, 4), 2.0), 2: run("b2", (9, 8, 7), 2.0)}
    assert ablation_studies.table_row("b", runs, anchors).split(" | ") == [
        "| b", "5.5000", "3.0000", "+0.0000", "50", "1,000", "1.0", "200", "4.0",
        "2.0 (1 of 2 seeds)", "1.00, 0.75", " |"]
    (runs[1].folder / "eval-1024.txt").write_text(
        "step:2 sequence_length:1024 val_tokens:10 val_loss:4.5000\npositions 0-9: 4\n")
    row = ablation_studies.table_row("b", runs, anchors)
    assert row.endswith(" | 1.00, 0.75 | 4.5000 (1 of 2 seeds) |")
    row = ablation_studies.table_row("a", anchors, anchors)
    assert row.split(" | ")[-3:] == ["2.0", "1.00, 1.00", " |"]
    assert ablation_studies.table_row("b", runs, {}).split(" | ")[3] == ""
    assert ablation_studies.table_row("c", {}, anchors).count("|") == 13


def test_a_warmdown_of_half_follows_the_steps(tmp_path):
    arms = dict(half="--mixer attn --warmdown_iters half", none="--mixer attn",
                baseline="--mixer attn --warmdown_iters baseline")
    study = Study("", arms, "--batch_size 2 --grad_accumulation_steps 1 --sequence_length 50")
    half, none, baseline = (ablation_studies.flags_of(study, arm, 1, tmp_path, 1000, {})
                            for arm in arms)
    assert half["--num_iterations"] == "10" and half["--warmdown_iters"] == "5"
    assert "--warmdown_iters" not in none
    assert baseline["--warmdown_iters"] == "2"  # 10 of 4768 / 1024


def test_arms_differ_from_the_preset_in_what_they_say():
    def resolved(name, arm):
        study = STUDIES[name]
        flags = ablation_studies.flags_of(study, arm, 1, ROOT / "x", study.tokens, {})
        given = trainer.parse_flags(ablation_studies.as_words(flags))
        return vars(trainer.merge_flags(given, torch.device("cpu"), None, print))

    anchor, apart = resolved("recipe", "anchor"), ("output_dir", "to_save")
    recipe = trainer.RECIPE | dict(
        n_head=6, attn_layers=(5, 10), residual_bf16=1, fp8_head=1, fp8_mlp=1)
    assert all(anchor[name] == value for name, value in recipe.items())
    assert anchor["warmdown_iters"] == anchor["num_iterations"] // 2
    for arm in STUDIES["recipe"].arms:
        if arm.startswith("without-"):
            changed = {name for name, value in resolved("recipe", arm).items()
                       if name not in apart and value != anchor[name]}
            words = ablation_studies.WITHOUT.get(arm[8:], "--afno_silu 0").split()
            expected = dict(zip(*[iter(words)] * 2))
            assert changed == {name[2:] for name in expected}, arm


@pytest.mark.parametrize("name", STUDIES)
def test_every_arm_of_a_dry_run_has_flags_that_the_trainer_takes(name, capsys):
    status = main([name, "--dry_run", "--seeds", "1337,2"])
    said = capsys.readouterr()
    commands = said.out.splitlines()
    assert len(commands) == len(set(commands)) == 2 * len(STUDIES[name].arms)
    assert all(line.startswith("python train_gpt2_afno.py --") for line in commands)
    assert status == 0 and not said.err


def test_the_study_for_cpus_names_no_number_that_tokens_changes():
    assert not re.search(r"\d", STUDIES["shakespeare"].about)


def test_a_dry_run_refuses_what_the_trainer_would(pair, capsys):
    both = "one", "two"
    for flags, message, arms in (
            ("--curriculum 8:1", "--curriculum must end with --sequence_length 16, got 8", both),
            ("--n_head 3", "--n_head: twice the heads must divide n_embd 128, got 3 heads", both),
            # two has attention anywhere
            ("--attn_layers 7", "--attn_layers must be in 0 ... 3, got 7", ("one",))):
        assert main(["pair", "--dry_run", "--", *flags.split()]) == 1
        assert capsys.readouterr().err.splitlines() == [f"error: {arm}: {message}" for arm in arms]


@pytest.mark.parametrize("name", ("context", "sweep-batch", "schedule"))
def test_arms_train_on_equally_many_tokens(name, capsys):
    main([name, "--dry_run"])
    for line in capsys.readouterr().out.splitlines():
        steps, batch, accumulation, length = (
            int(re.search(rf"--{flag} (\d+)", line).group(1))
            for flag in ("num_iterations", "batch_size", "grad_accumulation_steps",
                         "sequence_length"))
        assert abs(steps * batch * accumulation * length / STUDIES[name].tokens - 1) < 0.01, line


@pytest.mark.parametrize("argv, message", (
    (["pair", "--seeds", "1,x"], "--seeds: must be integers >= 0 such as 1337,2, got 1,x"),
    (["pair", "--tokens", "0"], "--tokens: must be a number > 0 .*, got 0"),
    (["pair", "--data", "nowhere/x"], "--data nowhere/x: .*no file nowhere/xtrain_"),
    (["pair", "--", "--batch_size", "0"], "--batch_size must be an integer >= 1, got 0"),
    (["pair", "--", "--eval_only"], "must be pairs --name value, got --eval_only"),
    (["pair", "--", "--seed", "3"], "--seed is the study's to set"),
    (["other"], "study: invalid choice: 'other'"),
    (["--dry_run", "recall"], "recall has flags of its own: ablation_studies.py recall comes fir"),
    (["goals-baseline", "--tokens", "1e6", "--dry_run"],
     "--tokens does not change arm attention, whose steps are --num_iterations 610: leave --tok"),
    (["pair", "--tokens", "64", "--dry_run", "--", "--num_iterations", "4"],
     "--tokens does not change arm one, whose steps are --num_iterations 4: leave --tokens out"),
    (["pair", "--data", ""], "--data: must be a folder of shards .*, not empty"),
    (["pair", "--output", ""], "--output: must be a folder's name, not empty"),
))
def test_bad_input_is_one_clear_line(pair, argv, message):
    with pytest.raises(InputError, match=message) as caught:
        main(argv)
    assert "\n" not in str(caught.value)


# -----------------------------------------------------------------------------
# screening, scaling


def write_screened(folder: Path, losses: dict[str, float], end: int = 100):
    """Write a run for each name, with a speed of its own and a summary."""
    for speed, (name, loss) in enumerate(losses.items(), 10):
        write_run(folder / name, [
            dict(step=50, tokens=50, train_loss=4.0, tokens_per_s=speed, train_time_s=5.0),
            dict(step=end, tokens=end, val_loss=loss, train_time_s=10.0),
            dict(step=end, wall_clock_time_to_target_loss=None)])


def test_effects_are_of_finished_runs_alone(tmp_path, capsys):
    (tmp_path / "techniques.txt").write_text("".join(f"t{i} --flag{i} 1\n" for i in range(5)))
    screening.plan(tmp_path / "techniques.txt")
    design = capsys.readouterr().out
    (tmp_path / "design.csv").write_text(design)
    signs = {line.split(",")[0]: line.split(",")[1:6] for line in design.splitlines()[1:]}
    assert len(signs) == 12
    effects = np.array([0.1, -0.2, 0.0, 0.05, 0.3])
    write_screened(tmp_path, {name: 4 + effects @ [sign == "+" for sign in row]
                              for name, row in signs.items()})
    screening.effects(tmp_path, 0.175)
    _, *lines, last = capsys.readouterr().out.splitlines()
    found = [float(line.split()[1]) for line in lines]
    assert last == "errors are of the loss, from 12 runs for 6 numbers"
    for digit, name in enumerate(("r01", "r02")):
        (tmp_path / name / "train.log").write_text(f"sha256: {str(digit) * 64} afno.py\n")
    screening.effects(tmp_path, 0.175)
    assert "warning: The runs had different code, in afno.py." in capsys.readouterr().out
    (tmp_path / "r01/train.log").write_text((tmp_path / "r02/train.log").read_text())
    screening.effects(tmp_path, 0.175)
    assert "warning" not in capsys.readouterr().out
    (tmp_path / "r02/train.log").write_text("command: x.py --flag1 1 --seed 2\n")
    with pytest.raises(InputError, match="r02: its command and design.csv differ in --flag"):
        screening.effects(tmp_path, 0.175)
    on = [i for i, sign in enumerate(signs["r02"]) if sign == "+"]
    torch_line = "torch 2.11.0, Python 3.12.3, 1 x {}, 1 thread\n"
    text = "data: x; validation: y, {} targets of 99, sha256 0a\nstep:1/1 val_loss:4\n"
    gone = "commit: a\ncommand: x.py --flag7 1\n" + torch_line.format("H100") + text.format(3) \
        + "commit: a\n"  # a start that left no run
    (tmp_path / "r01/train.log").write_text(torch_line.format("CPU") + text.format(9))
    (tmp_path / "r02/train.log").write_text(
        f"{gone}command: x.py --seed 2 " + " ".join(f"--flag{i}=1" for i in on) + "\n"
        + torch_line.format("NVIDIA H200") + text.format(8))
    screening.effects(tmp_path, 0.175)
    said = capsys.readouterr().out
    assert "warning: They were not all validated on one text" in said
    assert "warning: times are of several machines: 1 x CPU; 1 x NVIDIA H200" in said
    np.testing.assert_allclose(found, effects, atol=1e-4)
    for loss, end, rows in ((4.0, 50, 3), (math.nan, 100, 3), (4.0, 100, 2)):
        write_screened(tmp_path, {"r03": loss}, end)
        path = tmp_path / "r03/metrics.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:rows]))
        with pytest.raises(InputError, match="r03.*: (.*its loss is nan: |not (a )?finished)"):
            screening.effects(tmp_path, 0.175)


@pytest.fixture
def screened(tmp_path) -> Path:
    """Return a folder with the design of one technique and its two finished runs."""
    (tmp_path / "design.csv").write_text("run,t0,flags\nr1,+,--flag0 1\nr2,-,\n")
    write_screened(tmp_path, {"r1": 4.0, "r2": 4.1})
    return tmp_path


@pytest.mark.parametrize("old, new, message", (
    *(("11", speed, "no step of training has tokens_per_s") for speed
      in ('"x"', "null", "0", "-5", "NaN", "1e999", "true", "[]", "1" + "0" * 400)),
    ('"tokens_per_s": 11, ', "", "no step of training has"),
    ("4.1", "-1", "its tokens are 100, its loss is -1: each must be"),
    ('100, "val', 'NaN, "val', "its tokens are nan, its loss is 4.1: each must be")))
def test_a_run_without_a_finite_loss_or_speed_is_refused(screened, old, new, message):
    path = screened / "r2/metrics.jsonl"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(InputError, match=f"^{path}: {message}[^\n]*$"):
        screening.effects(screened, 0.175)


def test_a_single_negative_speed_does_not_count(screened, capsys):
    path, said = screened / "r2/metrics.jsonl", []
    step, *others = path.read_text().splitlines(keepends=True)
    for steps in ([step], [step, step.replace("11", "-2e10"), step]):
        path.write_text("".join([*steps, *others]))
        screening.effects(screened, 0.175)
        said.append(capsys.readouterr().out)
    assert said[-1] == said[-2]


@pytest.mark.parametrize("file, text, message", (
    ("design.csv", b"run,t0,flags\nr1,+," + b"x" * 200_000, "line 2: field larger than"),
    ("design.csv", b"run,t0,flags\nr1,+,\xff\n", "not a text file in UTF-8"),
    ("r2/train.log", b"command: x.py --flag0 '1\n", "No closing quotation in \"--flag0 '1\"")))
def test_a_damaged_file_of_a_screening_is_named(screened, file, text, message):
    (screened / file).write_bytes(text)
    with pytest.raises(InputError, match=f"^{screened / file}: {message}[^\n]*$"):
        screening.effects(screened, 0.175)


def test_of_a_flag_twice_in_a_command_the_last_counts(screened):
    for last, refused in (("1", True), ("0", False)):
        (screened / "r2/train.log").write_text(f"command: x.py --flag0 3 --flag0 {last}\n")
        with pytest.raises(InputError, match="r2: its command") if refused else nullcontext():
            screening.effects(screened, 0.175)


def test_a_copy_of_a_run_is_refused(screened):
    (screened / "r2/metrics.jsonl").write_bytes((screened / "r1/metrics.jsonl").read_bytes())
    with pytest.raises(InputError, match="r1 and .*r2 are one run, or copies of it: both have the"):
        screening.effects(screened, 0.175)


@pytest.mark.parametrize("old, new, message", (
    ("r02,+", "r02,x", "r02 must have a \\+ or a - for each of 2 techniques"),
    ("r02,+", "r02,", "r02 must have a"), ("r02,+,", "r02,", "r02 must have a"),
    ("\nr02,", "\n,", "a run without a name"), ("r02,", "r03,", "r03 stands twice"),
    ("run,t0,t1", "run,t0,t0", "t0 stands twice"),
    ("--flag0 1 --flag1 1", "--flag0 1 --flag0 2", "r01: --flag0 stands twice"),
    ("--flag0 1 --flag1 1", "--flag0 '1", "r01: No closing quotation in \"--flag0 '1\""),
    ("run,", "walk,", "its first line must be"),
    (None, "", "its first line must be"), (None, "run,t0,flags\n", ".* and there must be runs")))
def test_a_design_that_is_not_whole_is_refused(tmp_path, capsys, old, new, message):
    (tmp_path / "techniques.txt").write_text("t0 --flag0 1\nt1 --flag1 1\n")
    screening.plan(tmp_path / "techniques.txt")
    text = capsys.readouterr().out
    signs = {line.split(",")[0]: line.split(",")[1] for line in text.splitlines()}
    text = text.replace(f"r02,{signs['r02']}", "r02,+")  # whatever it was
    (tmp_path / "design.csv").write_text(text.replace(old, new) if old else new)
    with pytest.raises(InputError, match=f"design.csv: {message}"):
        screening.effects(tmp_path, 0.175)


@pytest.mark.parametrize("text, message", (
    ("", ": there is no technique"), ("\n \n", ": there is no technique"),
    ("\nt0\n", ": line 2 must be a name, then flags"), ("t0 x --flag 0\n", ": line 1 must be"),
    ("--z --w 1\n", ": line 1 must be"),
    ("t0 --a 0\nt0 --b 1\n", ": line 2: t0 stands twice, first in line 1"),
    ("t0 --a 0\n\nt1 --b 0 --a=1\n", ": line 3: --a stands twice, first in line 1"),
    ("t0 --b 0\nt1 --a 0 --a 0\n", ": line 2: --a stands twice, first in line 2"),
    ("t0 --a 0\nt1 --b '0\n", ": line 2: No closing quotation in \"--b '0\""),
    ("t0 --a 0\xff\n", ": not a text file in UTF-8"),
    ("t0 --a 0\\\n", ": line 1: No escaped character in '--a 0")))
def test_a_list_of_techniques_that_is_not_whole_is_refused(tmp_path, capsys, text, message):
    (tmp_path / "techniques.txt").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=f"^[^\n]*/techniques.txt{message}[^\n]*$"):
        screening.plan(tmp_path / "techniques.txt")
    assert capsys.readouterr().out == ""


def test_too_many_techniques_leave_no_file(tmp_path, capsys):
    (tmp_path / "techniques.txt").write_text("".join(f"t{i} --flag{i} 1\n" for i in range(24)))
    with pytest.raises(InputError, match="at most 23 techniques, got 24"):
        screening.plan(tmp_path / "techniques.txt")
    assert capsys.readouterr().out == ""


def test_rows_of_another_model_card_or_number_of_tokens_make_no_common_table():
    common = dict(part="step", name="a", T=1, where="CPU", model="d12", tokens=8)
    row = lambda **values: common | values
    rows = [row(ms=1), row(ms=2, where="GPU"), row(ms=3, model="d4"), row(ms=4), row(ms=5, T=2)]
    assert scaling_analysis.latest(rows) == [rows[3], rows[4]]
    assert scaling_analysis.latest(rows[:3]) == [rows[2]]
    assert scaling_analysis.latest([*rows, row(ms=6, T=4, tokens=16)])[0]["ms"] == 6


@pytest.mark.parametrize("row", (
    dict(part="step"), dict(part="step", name="a", where="CPU", B=1, T=1),
    dict(part="other", name="a", where="CPU", B=1, T=1, ms=1.0), *(
        dict(part="operator", name="a", where="CPU", B=1, T=1, ms=1.0) | values for values in (
            dict(T="1"), dict(T=0), dict(T=1.5), dict(B=True), dict(B=0), dict(part=["operator"]),
            dict(ms=0), dict(ms=-1.0), dict(ms=10**400), dict(ms=1e18), dict(ms=math.nan),
            dict(ms=True), dict(ms=None), dict(error=5), dict(memory_MB=-1),
            dict(range_ms=math.nan), dict(TFLOP_per_s=0), dict(forward_ms=0))), *(
        dict(part="profile", name="a", where="CPU", B=1, T=1, by_kernel_ms=value) for value in (
            5, ["a"], {"a": "b"}, {"a": 0}, {"a": -1.0, "b": 2.0}, {"a": math.nan},
            {"a": 10**400}))))
def test_rows_that_make_no_tables_are_refused(tmp_path, row):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match="rows.jsonl: .*not a .*; delete it, or choose another"):
        scaling_analysis.main(["--parts", "none", "--output", str(tmp_path)])


@pytest.mark.parametrize("row", (
    dict(part="floor", ms=1.0), dict(part="operator", B=1, T=1, error="too little memory"),
    dict(part="batch", B=1, T=1, ms=1, range_ms=0.0, TFLOP_per_s=math.nan, memory_MB=math.nan),
    dict(part="profile", B=1, T=1, by_kernel_ms={"a": 1.0}),
    dict(part="profile", B=1, T=1, by_kernel_ms={})))  # where the profiler sees no kernel
def test_rows_as_they_are_measured_make_tables(tmp_path, monkeypatch, row):
    monkeypatch.setattr(scaling_analysis, "plot", lambda *_: None)
    (tmp_path / "rows.jsonl").write_text(json.dumps(dict(name="a name", where="CPU") | row))
    assert scaling_analysis.main(["--parts", "none", "--output", str(tmp_path)]) == 0
    assert "a name" in (tmp_path / "tables.md").read_text()


def test_a_scaling_analysis_owns_its_folder(tmp_path):
    with owned(tmp_path, "x"), pytest.raises(InputError, match="--output .* is in use by"):
        scaling_analysis.main(["--parts", "none", "--output", str(tmp_path)])
    with pytest.raises(InputError, match="--output: must be a folder's name, not empty"):
        scaling_analysis.parse(["--output", ""])


def test_a_table_at_constant_tokens_has_one_number_of_them(tmp_path, monkeypatch, capsys):
    def measure_parts(args, runtime, emit):
        for T in args.lengths:
            emit(dict(part="operator", name="FFT", B=args.tokens // T, T=T, ms=1.0 * T))

    monkeypatch.setattr(scaling_analysis, "measure_parts", measure_parts)
    monkeypatch.setattr(scaling_analysis, "plot", lambda *_: None)
    said = []
    for lengths, tokens in (("256,512", "512"), ("256,1024", "1024")):
        assert scaling_analysis.main(["--parts", "operator", "--lengths", lengths, "--tokens",
                                      tokens, "--output", str(tmp_path)]) == 0
        said.append([line for line in capsys.readouterr().out.splitlines() if "left out" in line])
    line = ("left out, of another card, torch, --model, --tokens, --compile or code: 2 rows; for "
            "tables of both use another --output")
    assert said == [[], [line]]
    assert "| ms, T = | 256 | 1024 | exponent |" in (tmp_path / "tables.md").read_text()


def test_nothing_is_measured_where_rows_cannot_be_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling_analysis, "measure_parts", None)
    (tmp_path / "rows.jsonl").symlink_to(tmp_path / "gone/rows.jsonl")
    with pytest.raises(InputError, match="cannot write .*/rows.jsonl: No such file"):
        scaling_analysis.main(["--output", str(tmp_path)])


def test_without_matplotlib_one_line_says_so(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", [dict(step=1, tokens=1, val_loss=4.0, train_time_s=1.0)])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", ["plot_runs.py", str(run)])
    with pytest.raises(InputError, match="curves.png: import of matplotlib halted"):
        plot_runs.main()
