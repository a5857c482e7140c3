"""The report of a run and the export of its model, of tiny runs of the trainer."""
import ast
import importlib.util
import io
import itertools
import json
import math
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import report
import train_gpt2_afno
from data.text_to_bin import ROOT
from runtime import gpu_driver, gpu_energy
from test_trainer import (STOPPED, Letters, data, flags, main, metrics,  # noqa: F401
                          newest, small, validations)
from train_gpt2_afno import GPT, GPTConfig

AT_END = report.report_at_end


@pytest.fixture(autouse=True)
def letters(monkeypatch):
    """Let a token be a byte, samples be short, and no test draw that does not look at it."""
    for name in ("report", "runtime"):
        monkeypatch.setattr(f"{name}.gpt2_encoding", Letters)
    monkeypatch.setattr("experiments.plot_runs.plot", lambda *_, **__: None)
    monkeypatch.setitem(report.SAMPLING, "max_new_tokens", 5)


def command(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, words)])
    report.main()


def refused(monkeypatch, capsys, *words) -> str:
    """Return the one line that the script says where it ends with status 2."""
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, words)])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="^2$"):
        report.run_main(report.main)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


def written(monkeypatch, folder: Path) -> tuple[str, dict[str, str]]:
    """Return a run's report, and this run's column of its table."""
    command(monkeypatch, folder)
    text = (folder / "report.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| [^|]* \|$", text, re.MULTILINE)
    return text, dict(rows)


def test_numbers_are_those_of_the_metrics(data, tmp_path, monkeypatch):
    main(flags(data, tmp_path / "run"))
    text, table = written(monkeypatch, tmp_path / "run")
    summary, last = metrics(tmp_path / "run")[-1], validations(tmp_path / "run")[-1]
    assert text.startswith("# run\n\nFinished: step 6 of 6.\n")
    assert table["validation loss"] == f"**{last['val_loss']:.4f}** in float32"
    assert table["loss 3.3821"] == f"**not reached**: the lowest is {last['val_loss']:.4f}, " \
        f"{last['val_loss'] - 3.3821:.4f} above, not on FineWeb, as it seems"
    assert table["training"] == f"{summary['train_time_s']:,.1f} s"
    assert table["compilation"] == "0.0 s"
    assert table["wall clock"] == f"{summary['wall_time_s']:,.1f} s"
    assert table["tokens"] == "192" == str(newest(tmp_path / "run")["position"])
    assert table["tokens/s"] == f"{summary['tokens_per_s']:,.0f}"
    assert table["peak memory"] == f"{summary['peak_memory_usage'] / 2**20:,.0f} MiB"
    assert table["energy"].startswith("not known")
    threads = torch.get_num_threads()
    assert table["machine"] == f"1 x CPU, {threads} thread{'s' * (threads > 1)}"
    log = (tmp_path / "run/train.log").read_text()
    for name in ("commit", "command"):
        (line,) = re.findall(f"^{name}: (.*)", log, re.MULTILINE)
        assert line in text
    assert f"- torch {torch.__version__}, Python {sys.version.split()[0]}, " in text
    samples = text.split("## Samples")[1].split("## To")[0]
    assert "Of step 6: seed 1337, " in samples
    for prompt in report.PROMPTS:
        assert f"\n{prompt!r}:\n\n    {prompt}" in samples
    assert written(monkeypatch, tmp_path / "run")[0] == text  # samples have a seed
    assert not list((tmp_path / "run").glob("*.part"))


def test_a_goal_that_is_reached_ends_no_run(data, tmp_path, monkeypatch):  # noqa: F811
    """Only --target_val_loss does."""
    options = "--goal_val_loss 99 --num_iterations"
    main(flags(data, tmp_path / "run", f"{options} 4"))
    main(flags(data, tmp_path / "run", f"{options} 8 --resume auto --max_seconds 0.001"))
    assert metrics(tmp_path / "run")[-1]["wall_clock_time_to_target_loss"] is not None
    assert "**Unfinished** at step 4 of 8" in written(monkeypatch, tmp_path / "run")[0]


@pytest.mark.slow
def test_the_target_is_reached_or_by_how_much_it_is_missed(data, tmp_path, monkeypatch):
    options = "--num_iterations 60 --learning_rate 0.01 --target_val_loss"
    main(flags(data, tmp_path / "hit", f"{options} 4"))
    text, table = written(monkeypatch, tmp_path / "hit")
    summary, last = metrics(tmp_path / "hit")[-1], validations(tmp_path / "hit")[-1]
    assert f"Stopped at its target: step {last['step']} of 60." in text
    assert table["loss 4 (`--target_val_loss`)"] == \
        f"**reached** after {summary['wall_clock_time_to_target_loss']:,.1f} s of training, " \
        f"{last['wall_time_s']:,.1f} s of wall clock, at step {last['step']}"
    assert table["loss 3.3821"].startswith("**not reached**")
    main(flags(data, tmp_path / "miss", "--target_val_loss 1.5 --goal_val_loss 9"))
    text, table = written(monkeypatch, tmp_path / "miss")
    lowest = min(row["val_loss"] for row in validations(tmp_path / "miss"))
    assert "Finished: step 6 of 6." in text and table["loss 1.5 (`--target_val_loss`)"] == \
        f"**not reached**: the lowest is {lowest:.4f}, {lowest - 1.5:.4f} above"
    assert table["loss 9 (`--goal_val_loss`)"].startswith("**reached** after ")
    log = tmp_path / "miss/train.log"
    log.write_text(re.sub(r"(; validation: )[^,]+", r"\1data/fineweb10B/val.bin", log.read_text()))
    assert "it seems" in table["loss 3.3821"]
    text, table = written(monkeypatch, tmp_path / "miss")
    assert re.search(r"of \d+ targets, the baseline's of 1,048,576, in rows of 16, the baseline's "
                     "of 1024$", table["loss 3.3821"])
    said = re.sub(r", \d+ targets", ", 1,048,576 targets", log.read_text())
    log.write_text(re.sub(r"(tokens \(\d+ x \d+ x) 16", r"\1 1024", said))
    text, table = written(monkeypatch, tmp_path / "miss")
    assert "the baseline's of" not in table["loss 3.3821"]
    assert "| after 19,444.5 s of training |" in text and "Warning" not in text


def test_warnings_of_the_log_stand_in_the_report(data, tmp_path, monkeypatch):
    again = ["--input_val_bin", f"{data}/train_*.bin", "--warmup_iters", "9", "--warmdown_iters",
             "9"]
    main([*flags(data, tmp_path / "run"), *again])
    text, _ = written(monkeypatch, tmp_path / "run")
    assert re.findall("^- Warning: (.{11})", text, re.MULTILINE) == ["3 shards ar", "the learnin"]
    log = tmp_path / "run/train.log"  # the same of a start that left no run
    whole = re.sub("^command: .*", "command: x.py --seed 1", log.read_text(), flags=re.MULTILINE)
    log.write_text(whole + re.sub("^warning.*\n", "", whole, flags=re.MULTILINE))
    assert "Warning" not in written(monkeypatch, tmp_path / "run")[0]


@pytest.mark.slow
def test_validation_in_fp32_comes_first_where_there_is_one(data, tmp_path, monkeypatch):
    for name in "01":
        main(flags(data, tmp_path / name, f"--dtype bfloat16 --val_fp32 {name}"))
    loss = validations(tmp_path / "0")[-1]["val_loss"]
    assert written(monkeypatch, tmp_path / "0")[1]["validation loss"] == \
        f"**{loss:.4f}** in bfloat16, none in float32 (`--val_fp32 1`)"
    (exact,) = re.findall(r"val_loss_fp32:(\d\.\d{4})", (tmp_path / "1/train.log").read_text())
    assert written(monkeypatch, tmp_path / "1")[1]["validation loss"] == f"**{exact}** in float32"


def test_what_is_missing_is_said(data, tmp_path, monkeypatch):
    run = tmp_path / "run"
    main(flags(data, run, "--max_seconds 0.001 --save_every 0"))
    text, table = written(monkeypatch, run)
    assert "**Unfinished** at step 0 of 6: stopped by --max_seconds 0.001 at step 0.\n" in text
    assert table["tokens/s"] == "none: no step yet"
    main(flags(data, run, "--resume auto"))
    rows = [row for row in metrics(run) if row.get("step", 0) < 5]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"st')
    for path in run.glob("state_step*"):
        path.unlink()
    text, table = written(monkeypatch, run)
    assert "**Unfinished** at step 4 of 6: it still trains, was killed, or failed.\n" in text
    assert f"None: {run}: no checkpoint there." in text
    assert table["validation loss"].endswith(", at step 3, not the last")
    assert table["compilation"] == "not known: the run did not end"
    assert table["tokens"] == "128" and "MiB" in table["peak memory"]
    assert text.count("  # resumed at step 0") == 1
    with open(run / "train.log", "a") as log:
        log.write("error: step 5: loss nan\n")
    assert "step 4 of 6: it failed at step 5: loss nan.\n" in written(monkeypatch, run)[0]
    (run / "train.log").unlink()
    (run / "metrics.jsonl").write_text(json.dumps(rows[1]) + "\n")
    text, table = written(monkeypatch, run)
    assert table["validation loss"] == "none: the run has no validation"
    assert table["loss 3.3821"] == "not known: the run has no validation"
    assert "- commit: not known: no train.log\n" in text and "a number not known" in text
    (run / "metrics.jsonl").write_text("")
    assert written(monkeypatch, run)[1]["tokens"] == "not known: the run did not end"


@pytest.mark.parametrize("change", (
    dict(val_loss="3.2"), dict(train_time_s=None), dict(step=None), dict(step=-1),
    dict(wall_time_s=None), dict(val_loss_fp32="3.2"), dict(tokens=math.inf),
    dict(peak_memory_bytes="much"), dict(wall_clock_time_to_target_loss=None)))
def test_a_damaged_line_of_the_metrics_is_refused(tmp_path, monkeypatch, capsys, change):
    """None takes a number out; the last is a summary without its seconds."""
    run, row = tmp_path, dict(step=0, tokens=32, val_loss=3.0, train_time_s=1.0, wall_time_s=1.0)
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert written(monkeypatch, run)[1]["loss 3.3821"].startswith("**reached** after 1.0 s")
    lost = {name for name, value in change.items() if value is None and name in row}
    damaged = {name: value for name, value in (row | change).items() if name not in lost}
    (run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (
        row, damaged, row | dict(step=2))))
    ways = [()] + [("--export", tmp_path / "out")] * bool(importlib.util.find_spec("safetensors"))
    for words in ways:
        assert refused(monkeypatch, capsys, run, *words) == \
            f"error: {run}/metrics.jsonl: line 2 is not a row of metrics\n"
    if "train_time_s" in change:
        (run / "metrics.jsonl").write_text(json.dumps(row | change) + "\n" + json.dumps(row))
        assert "line 1 is not a row" in refused(monkeypatch, capsys, run)


def test_another_vocabulary_or_no_checkpoint_costs_the_samples_alone(data, tmp_path, monkeypatch):
    main(flags(data, tmp_path / "run"))
    monkeypatch.setattr(Letters, "eot_token", 50256)
    text = written(monkeypatch, tmp_path / "run")[0]
    assert "None: the model's 496 tokens are not GPT-2's." in text
    for path in (tmp_path / "run").glob("state_step*"):
        path.write_bytes(b"damaged")
    assert "None: no readable checkpoint in " in written(monkeypatch, tmp_path / "run")[0]


def test_the_picture_and_what_to_install_for_it(tmp_path, monkeypatch):
    monkeypatch.undo()
    run = tmp_path / "run"
    run.mkdir()
    rows = [dict(step=i, tokens=32 * i, train_time_s=0.5 * i, wall_time_s=i, val_loss=9 - i)
            for i in range(3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        text = written(monkeypatch, run)[0]
    assert re.search(r"## Curve\n\nNone: .*matplotlib.* `pip install matplotlib`, then "
                     f"`python report.py {run}`.\n", text)
    assert not (run / "curve.png").exists()
    assert "![loss against tokens and seconds](curve.png)" in written(monkeypatch, run)[0]
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_baselines_curve_is_the_published_one():
    assert len(report.BASELINE_LOSSES) == 1 + -(-report.BASELINE["steps"] // 128)
    assert report.BASELINE_LOSSES[-1] == report.BASELINE["loss"] == 3.3821
    assert report.BASELINE["tokens"] == report.BASELINE["steps"] * 2**19
    assert round(report.BASELINE["seconds"] / 3600, 3) == 5.401


# -----------------------------------------------------------------------------
# at the end of a run


def test_the_trainer_writes_it_at_the_end_but_not_after_a_signal(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt2_afno, "report_at_end", AT_END)
    main(flags(data, tmp_path / "run"))
    text = (tmp_path / "run/report.md").read_text()
    assert "Finished: step 6 of 6." in text
    assert written(monkeypatch, tmp_path / "run")[0] == text  # of the checkpoint alone
    assert (tmp_path / "run/train.log").read_text().endswith(f"report: {tmp_path}/run/report.md\n")
    next_batches = train_gpt2_afno.Run.next_batches

    def stopped(run):
        run.signals.append(signal.SIGTERM)
        return next_batches(run)

    monkeypatch.setattr(train_gpt2_afno.Run, "next_batches", stopped)
    assert main(flags(data, tmp_path / "stopped"), STOPPED) == STOPPED
    assert not (tmp_path / "stopped/report.md").exists()


def test_a_report_that_fails_costs_the_run_a_line(data, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no\nway")

    monkeypatch.setattr(train_gpt2_afno, "report_at_end", AT_END)
    monkeypatch.setattr(report, "write_report", broken)
    assert main(flags(data, tmp_path / "run")) == 0
    log = (tmp_path / "run/train.log").read_text()
    assert log.endswith("\nwarning: there is no report: no\n")


def test_the_energy_is_the_difference_of_the_drivers_counter(data, tmp_path, monkeypatch):
    counts = iter((5_000, 6_000, 12_000, 99_000, 12_345_000))  # at the start, at each save
    monkeypatch.setattr("runtime.gpu_energy", lambda device: next(counts))
    main(flags(data, tmp_path / "run", "--save_every 3 --warmdown_iters 6"))
    assert next(counts, None) is None
    assert metrics(tmp_path / "run")[-1]["energy_j"] == 12_340
    table = written(monkeypatch, tmp_path / "run")[1]
    assert table["energy"] == "12,340 J of the GPUs"


def test_the_energy_is_that_of_all_processes(data, tmp_path, monkeypatch):
    """Each call of the counter is a joule more; saves are at steps 0, 3, 6, and at the end.
    """
    run, next_batches = tmp_path / "run", train_gpt2_afno.Run.next_batches
    options = "--warmdown_iters 6 --save_every 3 --resume "
    energy = lambda: written(monkeypatch, run)[1]["energy"]

    def count(known: bool = True):
        calls = itertools.count(1)
        monkeypatch.setattr("runtime.gpu_energy", lambda device: 1000 * next(calls) * known)

    def killed(run):
        return 1 / 0 if run.step == 5 else next_batches(run)

    count()
    monkeypatch.setattr(train_gpt2_afno.Run, "next_batches", killed)
    with pytest.raises(ZeroDivisionError):
        main(flags(data, run, options + "auto"))
    lost = ", without what 1 process, killed or failed, did after the last save"
    assert energy() == "2 J of the GPUs" + lost
    count()
    monkeypatch.setattr(train_gpt2_afno.Run, "next_batches", next_batches)
    main(flags(data, run, options + "auto"))
    assert energy() == "5 J of the GPUs" + lost
    assert metrics(run)[-1]["energy_j"] == 5
    count(False)  # the package is gone
    main(flags(data, run, options + "auto --num_iterations 8"))
    assert energy() == "5 J of the GPUs, **of 6 of 8 steps alone**: the others' is not known" \
        + lost
    count()
    main(flags(data, run, f"{options}{run}/state_step000006.pt --num_iterations 9"))
    assert energy() == "8 J of the GPUs" + lost
    text, table = written(monkeypatch, run)
    assert table["wall clock"].endswith(" s" + lost)
    assert re.findall("  # resumed at.*", text) == ["  # resumed at step 3"]  # then the same again
    rows = [dict(row, peak_memory_bytes=2**40) if row["step"] == 1 else row for row in metrics(run)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert written(monkeypatch, run)[1]["peak memory"] == "1,048,576 MiB"
    text = (run / "train.log").read_text()
    (run / "train.log").write_text(re.sub("energy: .*\n", "", text))  # as it was before
    assert energy() == "not known: it takes a GPU and `pip install nvidia-ml-py`"


def test_what_the_driver_tells(monkeypatch):
    """Two functions that only a GPU's machine answers, with what NVIDIA documents."""
    nvml = SimpleNamespace(nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID={"GPU-a-b": 7}.get,
                           nvmlDeviceGetTotalEnergyConsumption={7: 12_345}.get)
    assert gpu_energy(torch.device("cpu")) == 0
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="a-b"))
    assert gpu_energy(torch.device("cuda")) == 12_345
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu_energy(torch.device("cuda")) == 0
    for line, version in (
            ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May", "535.183.01"),
            ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15 ", "570.86.15"),
            ("", "unknown")):
        monkeypatch.setattr("runtime.open", lambda *_, **__: io.StringIO(line), raising=False)
        assert gpu_driver() == version


# -----------------------------------------------------------------------------
# export


def readme_example() -> str:
    """Return README's example of how an exported model is used."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"\*\*Export\.\*\*.*?```python\n(.*?)```", text, re.DOTALL)
    assert len(code.splitlines()) <= 10
    return code


@pytest.mark.parametrize("options", (
    "--mixer attn", "--optimizer muon --pair_rows 40 --value_tables 1 --position learned"))
def test_an_exported_model_has_the_checkpoints_logits(data, tmp_path, monkeypatch, capsys, options):
    pytest.importorskip("safetensors")
    main(flags(data, tmp_path / "run", options))
    (tmp_path / "out").mkdir()  # empty: it may be there
    command(monkeypatch, tmp_path / "run", "--export", tmp_path / "out")
    assert capsys.readouterr().out.endswith(": model.safetensors and config.json, of step 6\n")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "model.safetensors"}
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1  # safetensors would let nobody else read its file
    state, found = newest(tmp_path / "run"), {}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert GPTConfig(**config["model"]) == GPTConfig(**state["config"])
    assert (config["step"], config["tokens"]) == (6, state["position"])
    assert config["val_loss"] == validations(tmp_path / "run")[-1]["val_loss"]
    assert (config["val_dtype"], config["torch"]) == ("float32", torch.__version__)
    assert f"commit: {config['commit']}\n" in (tmp_path / "run/train.log").read_text()
    code = readme_example().replace("DIR", str(tmp_path / "out"))
    exec(re.sub(r"\[\[.*\]\]", "[[46, 210, 28]]", code), found)  # tokens of the small vocabulary
    model = GPT(GPTConfig(**state["config"]))
    model.load_state_dict(state["model"])
    assert torch.equal(found["logits"], model(torch.tensor([[46, 210, 28]]))[0])
    assert found["model"].transformer.wte.weight is found["model"].lm_head.weight


def test_errors_are_one_line(tmp_path, monkeypatch, capsys):
    error = lambda *words: refused(monkeypatch, capsys, *words)
    run = tmp_path / "run"
    assert error(run) == f"error: {run}: no folder of a run\n"
    run.mkdir()
    assert error(run) == f"error: {run / 'metrics.jsonl'}: No such file or directory\n"
    assert error("--exprt", "x").startswith("error: unrecognized arguments: --exprt")
    monkeypatch.setattr("checkpoints.ROOT", tmp_path)
    assert error().startswith("error: RUN_FOLDER: no run with a checkpoint under runs/")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "safetensors", None)
        assert re.match("error: --export: .*safetensors.*: pip install safetensors$",
                        error(run, "--export", out))
    pytest.importorskip("safetensors")
    (run / "metrics.jsonl").touch()
    assert error(run, "--export", out).endswith(": no checkpoint there\n")
    assert error(run, "--export", run).endswith("run: must be a new folder, or an empty one\n")
    with monkeypatch.context() as patch:
        (tmp_path / "here").mkdir()
        patch.chdir(tmp_path / "here")
        assert error(run, "--export", ".") == \
            "error: --export .: must not be the folder that you are in\n"
        (tmp_path / "here").rmdir()
    assert error("") == "error: RUN_FOLDER: must be a folder's name, not empty, got \n"
    assert error(run, "--export", "") == \
        "error: --export: must be a folder's name, not empty, got \n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_an_export_that_fails_leaves_nothing(data, tmp_path, monkeypatch, capsys):
    safetensors = pytest.importorskip("safetensors")

    def full(model, path):
        Path(path).write_bytes(b"half")
        raise safetensors.SafetensorError("No space left on device")

    main(flags(data, tmp_path / "run"))
    assert refused(monkeypatch, capsys, tmp_path / "run", "--export", "/dev/null/out") == \
        "error: --export /dev/null/out: Not a directory\n"
    monkeypatch.setattr("safetensors.torch.save_model", full)
    assert refused(monkeypatch, capsys, tmp_path / "run", "--export", tmp_path / "out") == \
        f"error: --export {tmp_path}/out: No space left on device\n"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_newest_run_is_taken_where_none_is_named(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("checkpoints.ROOT", tmp_path)
    main(flags(data, tmp_path / "runs/mine"))
    command(monkeypatch)
    assert capsys.readouterr().out.endswith(f"{tmp_path}/runs/mine/report.md\n")


def test_the_trainer_needs_no_other_package_and_no_experiments():
    """What report.py imports outside of functions is what the trainer needs to start."""
    top = ast.parse(Path(report.__file__).read_text(encoding="utf-8")).body
    found = {node.module for node in top if isinstance(node, ast.ImportFrom)}
    found |= {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    assert found - sys.stdlib_module_names == {"torch", "checkpoints", "data.text_to_bin",
                                               "runtime"}
