"""experiments/scaling_analysis.py: what it refuses to measure, which rows share tables."""
import math

import pytest
import torch

import runtime
from data.text_to_bin import InputError
from experiments import scaling_analysis
from experiments.scaling_analysis import STEPS, parse
from runtime import Runtime
from train_gpt2_afno import GPTConfig, MODELS

CPU = Runtime(torch.device("cpu"), torch.float32, compile=False)
ROW = dict(part="step", name="a", B=1, T=1, ms=1.0, mfu=0.1, parameters=1, tokens_per_s=1.0,
           where="torch 2, CPU", model="d4", tokens=8, compile=0, code="abc")


@pytest.mark.parametrize("flags, message", (
    ("--parts operator --lengths 500,700 --tokens 1000", "--lengths must divide --tokens 1000, "
                                                         "got 700"),
    ("--parts step --lengths 3 --tokens 4", "--lengths must divide --tokens 4, got 3"),
    ("--parts profile --lengths 3 --tokens 1500", "--tokens must be < 1024 or a multiple of it for "
                                                  "--parts profile, got 1500"),
    ("--parts batch --lengths 64,128", "--lengths must have 1024 or 8192 for --parts batch, got "
                                       "64,128"),
    ("--parts operator,batch --lengths 64", "--lengths must have 1024 or 8192")))
def test_what_a_part_cannot_measure_is_refused(flags, message):
    with pytest.raises(InputError, match=f"^{message}"):
        parse(flags.split())


@pytest.mark.parametrize("flags", (
    "--parts batch --lengths 1024 --tokens 1500", "--parts profile --lengths 3 --tokens 1000",
    "--parts none --lengths 3 --tokens 4", "--lengths 64", ""))
def test_other_lengths_and_numbers_of_tokens_are_not(flags):
    parse(flags.split())


@pytest.mark.parametrize("flags, there", (
    ("--parts batch --lengths 1024 --only nothing", "FFT, unfused, fp32"),
    ("--parts operator --lengths 64 --tokens 64 --only nothing", "FFT, unfused, fp32; AFNO, plain"),
    ("--parts step --model d4 --lengths 64 --tokens 64 --only 1024.taps", "in 1; AFNO; "),
    ("--parts step,profile --model d4 --only fp32", "attention, 2 heads of 64; AFNO with")))
def test_a_pattern_that_no_name_has_is_refused_before_it_is_measured(
        tmp_path, monkeypatch, flags, there):
    monkeypatch.setattr(scaling_analysis, "measure_parts", None)
    with pytest.raises(InputError, match=f"^--only .*: no row has such a name .*{there}"):
        scaling_analysis.main([*flags.split(), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_names_are_found_without_what_they_are_of():
    args = parse("--parts operator --lengths 64,256".split())
    found = lambda device: [name for T in args.lengths for name, *_ in
                            scaling_analysis.operators(1, T, torch.device(device), torch.float32)]
    assert [*scaling_analysis.names(args, CPU)] == found("cpu")
    args.lengths = [2**40]  # more memory than there is
    assert "AFNO core, T taps" in scaling_analysis.names(args, CPU)


def test_names_of_fp32_steps_are_found_as_tables_show_them():
    args = parse("--parts step --model d4 --residual_bf16 0 --only fp32".split())
    scaling_analysis.refuse_no_name(args, CPU)


@pytest.mark.parametrize("model", STEPS)
def test_names_of_steps_are_those_of_the_models(model):
    n_layer, n_embd = MODELS[model]
    for name, options in STEPS[model].items():
        options = {key: value for key, value in options.items() if key != "recompute"}
        config = GPTConfig(n_layer=n_layer, n_embd=n_embd, sequence_length=2048, **options)
        kinds = [config.mixer_of(layer) for layer in range(n_layer)]
        layers = ", ".join(str(layer) for layer, kind in enumerate(kinds) if kind == "attn")
        if name.startswith("attention"):
            assert {*kinds} == {"attn"} and n_embd % config.n_head == 0
            assert name == f"attention, {config.n_head} heads of {n_embd // config.n_head}"
        else:
            assert (f"attention in {layers}" in name) if layers else "attention" not in name


def test_a_table_says_of_what_it_is(tmp_path):
    scaling_analysis.write_tables([ROW], tmp_path)
    head = (tmp_path / "tables.md").read_text().split("\n")[0]
    assert "torch 2, CPU, --model d4, --tokens 8, --compile 0, code abc. On a CPU this" in head
    scaling_analysis.write_tables([dict(part="floor", name="a", where="torch 2, H200")], tmp_path)
    head = (tmp_path / "tables.md").read_text().split("\n")[0]
    assert "torch 2, H200. ms are" in head


def test_rows_of_other_code_or_another_compile_are_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling_analysis, "plot", lambda *_: None)
    old = {name: value for name, value in ROW.items() if name not in ("compile", "code")}
    rows = [old, ROW | dict(compile=1), ROW | dict(code="abd"), ROW]
    assert scaling_analysis.latest(rows) == [ROW] and scaling_analysis.latest([old]) == [old]
    scaling_analysis.append_lines(tmp_path / "rows.jsonl", *rows)
    assert scaling_analysis.main(["--parts", "none", "--output", str(tmp_path)]) == 0
    assert "left out, of another card, torch, --model, --tokens, --compile or code: 3 rows" in \
        capsys.readouterr().out


def test_rows_name_their_code_and_compile(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling_analysis, "plot", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(scaling_analysis, "measure_parts", lambda args, runtime, emit: emit(
        dict(part="floor", name="a")))
    codes = []
    for more in ("", "# more\n"):
        script = tmp_path / "script.py"
        script.write_text(more)
        monkeypatch.setattr(scaling_analysis, "__file__", str(script))
        scaling_analysis.main(["--lengths", "64", "--tokens", "64", "--output", str(tmp_path)])
        row = scaling_analysis.read_lines(tmp_path / "rows.jsonl", scaling_analysis.is_whole)[-1]
        codes.append(row["code"])
        assert row["compile"] == 0
    assert codes[0] != codes[1]


def test_what_only_says_words_is_no_other_code(tmp_path, monkeypatch):
    paths = [tmp_path / name for name in ("afno.py", "facts.py", "report.py", "start.py")]
    monkeypatch.setattr(runtime, "source_files", lambda: paths)
    codes = []
    for of in ([], paths[1:], paths[:1]):
        for path in paths:
            path.write_text("# more\n" * (path in of))
        codes.append(scaling_analysis.code_of([]))
    assert codes[0] == codes[1] != codes[2]


@pytest.mark.parametrize("values", (dict(compile=2), dict(compile=True), dict(code=5)))
def test_rows_with_another_compile_or_code_are_no_rows(values):
    assert scaling_analysis.is_whole(ROW) and not scaling_analysis.is_whole(ROW | values)


@pytest.mark.slow
def test_steps_and_profiles_of_the_small_model(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(scaling_analysis, "plot", lambda *_: None)
    monkeypatch.setattr(scaling_analysis, "measure", lambda run, *_, **how: (run(), 1.0)[1:] * 3)
    monkeypatch.setattr(scaling_analysis, "measure_matmul_rate", lambda *_: 1e12)
    assert scaling_analysis.main(["--parts", "step,profile", "--model", "d4", "--lengths", "64",
                                  "--tokens", "128", "--only", "^attention|in 1$", "--output",
                                  str(tmp_path)]) == 0
    rows = scaling_analysis.read_lines(tmp_path / "rows.jsonl", scaling_analysis.is_whole)
    names = [*STEPS["d4"]][:2]
    assert [(row["name"], row["B"], row["T"]) for row in rows if row["part"] == "profile"] == [
        (name, 1, 128) for name in names]
    assert [(row["name"], row["B"], row["T"]) for row in rows if row["part"] == "step"] == [
        (name, 2, 64) for name in names]
    page = (tmp_path / "tables.md").read_text()
    assert f" Operators have {scaling_analysis.C} channels. " in page
    assert all(f"## Profile: {name}, 1 rows of 128" in page for name in names)


def test_a_run_on_a_cpu_is_warm(monkeypatch):
    clock, took = [0.0], iter((9, 1, 2, 3))  # the first run is slow

    def work():
        clock[0] += next(took)

    monkeypatch.setattr(scaling_analysis.time, "perf_counter", lambda: clock[0])
    median, spread, memory = scaling_analysis.measure(work, torch.device("cpu"))
    assert (median, spread) == (2000, 2000) and math.isnan(memory)


def test_a_folder_of_something_else_is_named(tmp_path):
    (tmp_path / "tables.md").write_text("mine")
    with pytest.raises(InputError, match=f"^--output {tmp_path} has a tables.md of something else"):
        scaling_analysis.main(["--parts", "none", "--output", str(tmp_path)])
