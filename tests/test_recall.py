"""Tasks with known answers, against definitions by loops; the study: resumed, refused, controls."""
import json
from dataclasses import replace

import pytest
import torch

import afno
from data.text_to_bin import InputError, owned
from experiments import ablation_studies, recall
from experiments.recall import FILLER, GRIDS, MARKER, MIXERS, TASKS, Draw, Grid, main
from runtime import Runtime

CPU = Runtime(torch.device("cpu"), torch.float32, compile=False)
TINY = Grid(vocab_size=32, n_embd=16, lengths=(16, 32), loads=(2, 4, 8), steps=2, tokens=64,
            rate=2.0, answers=8)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(GRIDS, "small", TINY)


def rows_of(task: str, T: int, load: int, rows: int = 20, vocab_size: int = 64):
    draw = Draw(torch.Generator().manual_seed(0), rows, vocab_size)
    return TASKS[task](draw, T, load)


# -----------------------------------------------------------------------------
# tasks


def known_answers(task: str, row: list[int], load: int) -> dict[int, tuple[int, int]]:
    """Return {place of a question: (answer, place of what it asks for)} by the task's definition.

    Half of the vocabulary of 64 are keys.
    """
    T, found = len(row), {}
    if task == "recall":
        place = {row[2 * i]: 2 * i + 1 for i in range(load)}
        found = {t: (row[place[row[t]]], place[row[t]]) for t in range(2 * load, T)
                 if row[t] != FILLER}
    elif task == "induction":
        last = {}
        for t in range(T):
            if MARKER < row[t] < 32:
                if row[t] in last:
                    found[t] = (row[last[row[t]] + 1], last[row[t]] + 1)
                last[row[t]] = t
    elif task == "needle":
        for t in range(T - 2 * load, T, 2):
            found[t] = (row[row.index(row[t]) + 1], row.index(row[t]) + 1)
            assert row[t + 1] == found[t][0]
    elif task == "copying":
        assert row[T - load] == MARKER
        for i in range(load):
            found[T - load + i] = (row[i], i)
    else:
        for t in range(T):
            if row[t] != FILLER:
                found[t] = (31 + row[: t + 1].count(row[t]), row.index(row[t]))
    return found


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("T, load", ((16, 4), (48, 4), (48, 12), (64, 1)))
def test_every_target_is_the_answer_by_definition(task, T, load):
    tokens, targets, distance = rows_of(task, T, load)
    assert tokens.shape == targets.shape == distance.shape == (20, T)
    assert 0 <= tokens.min() and tokens.max() < 64 and targets.max() < 64
    for row, answers, lags in zip(tokens.tolist(), targets.tolist(), distance.tolist()):
        found = known_answers(task, row, load)
        assert {t: answer for t, answer in enumerate(answers) if answer >= 0} == \
            {t: answer for t, (answer, _) in found.items()}
        assert all(lags[t] == t - source for t, (_, source) in found.items())


def test_needles_are_few_and_at_every_depth():
    tokens, _, distance = rows_of("needle", 64, 4, rows=200)
    keys = (tokens < 32).sum(1)
    assert (keys == 8).all() and (tokens[:, :56] < 32).any(0)[::2].all()
    assert distance[distance > 0].min() < 8 and distance.max() > 50
    words = tokens[tokens >= 32].bincount(minlength=64)[32:]
    assert words[0] > 4 * words[8:].float().mean()  # the first word is as frequent as words are
    for task in TASKS:
        assert len(rows_of(task, 64, 4)[0].unique(dim=0)) == 20


def test_rows_depend_on_seed_task_and_part_alone():
    draws = {(seed, task, part): recall.generator(seed, task, part, CPU.device).initial_seed()
             for seed in (0, 1, 1337, 2**63 - 1) for task in TASKS for part in ("train", "test")}
    assert len({*draws.values()}) == len(draws)


def test_the_grids_are_the_issues():
    small, whole = GRIDS["small"], GRIDS["whole"]
    assert max(small.lengths) == 256 and max(small.loads) == 16
    assert whole.vocab_size == 8192 and max(whole.loads) == 256
    assert (min(whole.lengths), max(whole.lengths)) == (64, 2048)
    assert (64, 16) in whole.cells() and (64, 32) not in whole.cells()
    assert (2048, 256) in whole.cells()


# -----------------------------------------------------------------------------
# models


@pytest.mark.parametrize("mixer", MIXERS)
def test_tokens_meet_in_every_mixer_but_none(mixer):
    model = recall.make_model(TINY, mixer, seed=1)
    tokens = torch.randint(32, (2, 16), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 3] = (tokens[:, 3] + 1) % 32
    with torch.no_grad():
        moved = (model.hidden(tokens) != model.hidden(changed)).any(-1).any(0)
    assert not moved[:3].any() and moved[3]
    assert moved[4:].any() == (mixer != "none")


@pytest.mark.slow
def test_attention_learns_what_no_mixer_can():
    grid, found = Grid(16, 32, (8,), (2,), 100, 512, 4.0, 300), {}
    for mixer in ("attention", "none"):
        model = recall.make_model(grid, mixer, seed=1)
        given = grid if mixer == "attention" else replace(grid, steps=30)
        loss, steps = recall.train(model, "copying", given, 1, CPU)
        assert (loss < recall.LEARNT) == (steps < given.steps) == (mixer == "attention")
        (cell,) = recall.test(model, "copying", grid, 1, CPU)
        found[mixer] = cell["right"] / cell["answers"]
    assert found["attention"] > 0.99
    assert recall.errors_above_chance(cell) <= 4  # of the model without mixing, the last one


# -----------------------------------------------------------------------------
# the study


@pytest.mark.slow
def test_a_study_runs_then_goes_on_where_it_was_cut(tiny, tmp_path, capsys, monkeypatch):
    argv = ["recall", "--tasks", "recall,counting", "--mixers", "attention,none", "--device",
            "cpu", "--output", str(tmp_path)]
    assert ablation_studies.main([*argv, "--dry_run"]) == 0
    wanted = capsys.readouterr().out.splitlines()
    assert wanted == [f"{task}-{mixer}-seed1337" for task in ("recall", "counting")
                      for mixer in ("attention", "none")]
    assert ablation_studies.main(argv) == 1  # two steps teach attention nothing
    said, folder = capsys.readouterr(), tmp_path / "recall"
    assert said.err.startswith("error: a control fails: recall: attention answers ")
    assert {path.name for path in folder.iterdir()} == {"rows.jsonl", "table.md", "curves.png"}
    lines = (folder / "rows.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [recall.name_of(r["task"], r["mixer"], r["seed"]) for r in rows] == wanted
    for cell in rows[0]["cells"]:
        assert sum(right for _, right, _ in cell["by_distance"]) == cell["right"]
        assert sum(count for *_, count in cell["by_distance"]) == cell["answers"] >= 8
    table = (folder / "table.md").read_text()
    assert "| T x load | 16 x 2 | 16 x 4 | 32 x 2 | 32 x 4 | 32 x 8 |" in table
    assert "**FAILS**: recall: attention answers" in table

    # cut off while the last line was written: that model alone is trained again, to the same bits
    (folder / "rows.jsonl").write_text("\n".join(lines)[:-20])
    assert ablation_studies.main(argv) == 1
    assert capsys.readouterr().out.count("finished before, skipped") == 3
    again = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    for row in (*rows, *again):
        del row["seconds"]
    assert again == rows and table == (folder / "table.md").read_text()

    lines = [json.dumps(row | dict(seconds=1.0)) for row in rows]
    lines[0] = lines[0].replace(recall.code(), "another")
    (folder / "rows.jsonl").write_text("".join(f"{line}\n" for line in lines))
    assert ablation_studies.main(argv) == 1
    assert "recall-attention-seed1337: finished before, with other code, skipped" in \
        capsys.readouterr().out
    assert "The models were made with different code." in (folder / "table.md").read_text()
    for row in rows[1:]:  # a study begun before rows named their code
        row.pop("code")
    recall.write_report(rows, folder, recall.GRIDS["small"])
    assert "The models were made with different code." in (folder / "table.md").read_text()

    monkeypatch.setitem(recall.RECIPE, "swiglu", 0)
    with pytest.raises(InputError, match="rows.jsonl holds recall-attention-seed1337 with other "
                                         "settings; delete it, or choose another --output"):
        ablation_studies.main(argv)


def test_a_dry_run_leaves_out_what_is_finished_and_writes_nothing(tiny, tmp_path, capsys):
    argv = ["--tasks", "counting", "--dry_run", "--output", str(tmp_path)]
    folder = tmp_path / "recall"
    assert main(argv) == 0 and not folder.exists()
    assert capsys.readouterr().out.count("counting-") == len(MIXERS)
    folder.mkdir()
    recall.append_lines(folder / "rows.jsonl", whole_row(seed=1337))
    with open(folder / "rows.jsonl", "a") as file:
        file.write('{"task": ')  # a study that is at work there
    before = (folder / "rows.jsonl").read_bytes()
    assert main([*argv, "--mixers", "none,filters"]) == 0
    assert capsys.readouterr() == ("counting-filters-seed1337\n", "")
    assert main([*argv, "--mixers", "none"]) == 0
    assert capsys.readouterr().out == "nothing: all models are finished\n"
    assert (folder / "rows.jsonl").read_bytes() == before and len([*folder.iterdir()]) == 1


@pytest.mark.parametrize("lengths", ((16, 32), (16,), (32,)))
def test_a_model_that_leaks_is_not_trained(tiny, tmp_path, monkeypatch, lengths):
    conv = afno.causal_conv
    monkeypatch.setattr(afno, "causal_conv", lambda u, taps: conv(u, taps) + (
        0.05 * u.roll(-1, 1) if u.size(1) in lengths else 0))
    monkeypatch.setattr(recall, "train", None)
    with pytest.raises(InputError, match="^recall-filters-seed1: causality check: the model leaks"):
        main(["--tasks", "recall", "--mixers", "filters", "--seeds", "1", "--device", "cpu",
              "--output", str(tmp_path)])
    assert not (tmp_path / "recall/table.md").exists()


def test_controls_name_their_worst_cell():
    def row(task, mixer, right):
        cells = [dict(T=64, load=load, answers=1000, right=number, chance=0.02, by_distance=[])
                 for load, number in zip((4, 16), right)]
        return dict(task=task, mixer=mixer, seed=1, cells=cells)

    rows = [row("recall", "attention", (1000, 1000)), row("recall", "attention", (1000, 996)),
            row("recall", "none", (20, 42)),
            row("needle", "attention", (990, 1000)), row("needle", "none", (30, 20)),
            row("counting", "attention", (0, 0)), row("copying", "filters", (0, 0))]
    found = recall.controls(rows)
    assert [holds for holds, _ in found] == [True, False, False, True, None, None, None]
    # 22 answers above the 20 of chance, whose error is sqrt(1000 * 0.02 * 0.98) = 4.43
    assert found[1][1].startswith("recall: without mixing 5.0 standard errors above chance at "
                                  "most (T = 64, load 16)")
    assert found[2][1].startswith("needle: attention answers 99.0% at its worst (T = 64, load 4)")
    assert [text for _, text in found[4:]] == [
        "copying: attention was not trained", "copying: the model without mixing was not trained",
        "counting: the model without mixing was not trained"]


def test_the_first_place_of_a_symbol_is_a_distance_of_its_own():
    model = recall.make_model(TINY, "none", seed=1)
    for cell in recall.test(model, "counting", TINY, 1, CPU):
        begins = [begin for begin, *_ in cell["by_distance"]]
        assert begins[0] == 0 and all(begin & (begin - 1) == 0 for begin in begins[1:])
        assert sum(count for *_, count in cell["by_distance"]) == cell["answers"]


def test_seeds_are_pooled():
    rows = [dict(cells=[dict(T=64, load=4, right=right, answers=10, by_distance=[[8, right, 10]])])
            for right in (4, 10)]
    assert recall.by_load(rows) == {(64, 4): 0.7} and recall.by_distance(rows) == {8: 0.7}


def test_mixers_of_other_seeds_say_so(tmp_path):
    cells = [dict(T=64, load=4, right=10, answers=10, by_distance=[[8, 10, 10]])]
    rows = [dict(task="copying", mixer=mixer, seed=seed, cells=cells, machine="CPU")
            for mixer, seed in (("attention", 1), ("attention", 2), ("filters", 2))]
    recall.write_report(rows, tmp_path, TINY)
    page = (tmp_path / "table.md").read_text()
    assert "Seeds: 1, 2." in page and "| attention |" in page
    assert page.count("| filters (seeds: 2) |") == 2  # by load and by distance


def test_a_page_of_something_else_is_left_alone(tiny, tmp_path):
    (tmp_path / "recall").mkdir()
    (tmp_path / "recall/table.md").write_text("mine")
    with pytest.raises(InputError, match="--output .*/recall has a table.md of"):
        ablation_studies.main(["recall", "--device", "cpu", "--output", str(tmp_path)])
    assert (tmp_path / "recall/table.md").read_text() == "mine"


@pytest.mark.parametrize("argv, message", (
    (["--output", ""], "--output: must be a folder's name, not empty"),
    (["--tasks", "recall,x"], "--tasks: must be of recall, induction, .*, got recall,x"),
    (["--mixers", ""], "--mixers: must be of attention, .*, got "),
    (["--grid", "large"], "--grid: invalid choice: 'large'"),
    (["--seeds", "-1"], "--seeds: must be integers >= 0"),
))
def test_bad_input_is_one_clear_line(argv, message):
    with pytest.raises(InputError, match=message) as caught:
        main(argv)
    assert "\n" not in str(caught.value)


def whole_row(task: str = "counting", mixer: str = "none", seed: int = 1) -> dict:
    """Return a line of rows.jsonl as the study writes it, without what it does not read."""
    cells = [dict(T=T, load=load, answers=10, right=4, chance=0.25,
                  by_distance=[[0, 1, 2], [1, 0, 3], [4, 3, 5]]) for T, load in TINY.cells()]
    return dict(task=task, mixer=mixer, seed=seed, steps=1, machine="CPU", code="0a",
                setting=recall.setting(TINY, mixer), cells=cells)


def test_rows_without_code_are_read(tmp_path):
    path, rows = tmp_path / "rows.jsonl", [whole_row(), whole_row(seed=2), whole_row("recall")]
    del rows[0]["code"]  # of before 2026-11-30
    recall.append_lines(path, *rows)
    assert recall.read_rows(path, TINY) == rows


def test_counting_of_before_first_places_were_apart_is_refused(tmp_path):
    row, path = whole_row(), tmp_path / "rows.jsonl"
    row["cells"][0]["by_distance"][0][0] = 1
    row["cells"][0]["by_distance"][1][0] = 2
    recall.append_lines(path, row)
    with pytest.raises(InputError, match="holds counting-none-seed1 with other settings"):
        recall.read_rows(path, TINY)


def of_cell(**values) -> dict:
    """Return a row's cells with other values in the second one, None for no value."""
    cells = whole_row()["cells"]
    cells[1] = {name: value for name, value in (cells[1] | values).items() if value is not None}
    return dict(cells=cells)


@pytest.mark.parametrize("values", (
    dict(task="poems"), dict(task=["recall"]), dict(mixer=[1]), dict(mixer="x"), dict(seed=[1]),
    dict(seed="1"), dict(seed=-1), dict(seed=True), dict(steps="1"), dict(machine=5),
    dict(code=[1]), dict(cells=5), dict(cells=[]), dict(cells=[5]), dict(cells={"T": 1}),
    *(of_cell(**{name: None}) for name in whole_row()["cells"][0]),
    of_cell(T="16"), of_cell(load=0), of_cell(right="x"), of_cell(right=-1), of_cell(right=11),
    of_cell(right=4.0), of_cell(answers=0), of_cell(answers=0, right=0, by_distance=[]),
    of_cell(answers=10**400), of_cell(chance=1.5), of_cell(chance=float("nan")),
    of_cell(by_distance=5), of_cell(by_distance=[5]), of_cell(by_distance=[[0, 4]]),
    of_cell(by_distance=[[0, 4, "x"]]), of_cell(by_distance=[[0, 4, 9]]),
    of_cell(by_distance=[[0, 3, 10]]), of_cell(by_distance=[[0, 4, 3], [1, 0, 7]]),
    of_cell(by_distance=[[1, 2, 5], [1, 2, 5]])))
def test_rows_that_make_no_tables_are_refused(tiny, tmp_path, values):
    path = tmp_path / "recall/rows.jsonl"
    path.parent.mkdir()
    recall.append_lines(path, whole_row(seed=3), whole_row() | values)
    before = path.read_bytes()
    with pytest.raises(InputError, match="rows.jsonl: line 2 is not a result .*; delete it, or "):
        main(["--output", str(tmp_path)])
    assert path.read_bytes() == before and [*path.parent.iterdir()] == [path]


@pytest.mark.parametrize("others, message", (
    (lambda cells: cells[1:], "with other settings"),
    (lambda cells: cells[:1] + cells, "with other settings"),
    (lambda cells: cells, "twice")))
def test_what_would_count_twice_or_is_missing_is_refused(tmp_path, others, message):
    path, row = tmp_path / "rows.jsonl", whole_row()
    recall.append_lines(path, row, row | dict(cells=others(row["cells"])))
    with pytest.raises(InputError, match=f"rows.jsonl holds counting-none-seed1 {message}; "):
        recall.read_rows(path, TINY)


@pytest.mark.parametrize("text", (
    b"{}\n", b"[]", b"5\n", 9**5 * b"[" + b"\n", 9**5 * b'{"a":' + b"\n",
    b"notes of mine, no newline", b"\xff\xfe\n", b'{"setting": 1}\n',
    b'{"task": "recall", "mixer": "x", "seed": 1, "setting": {}, "steps": 1, "machine": "CPU", '
    b'"cells": []}\n'))
def test_a_file_of_something_else_is_refused_and_kept(tiny, tmp_path, text):
    (tmp_path / "recall").mkdir()
    (tmp_path / "recall/rows.jsonl").write_bytes(text)
    with pytest.raises(InputError, match="rows.jsonl") as caught:
        main(["--output", str(tmp_path)])
    assert "delete it, or choose another" in str(caught.value)
    assert (tmp_path / "recall/rows.jsonl").read_bytes() == text


def test_nothing_is_trained_where_rows_cannot_be_kept(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(recall, "measure", None)
    (tmp_path / "recall").mkdir()
    (tmp_path / "recall/rows.jsonl").symlink_to(tmp_path / "gone/rows.jsonl")
    with pytest.raises(InputError, match="cannot write .*/recall/rows.jsonl: No such file"):
        main(["--device", "cpu", "--output", str(tmp_path)])


def test_a_last_line_without_newline_counts_where_it_is_whole(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"name": 1}\n{"name": 2}')
    has_name = lambda row: "name" in row
    assert recall.read_lines(path, has_name) == [{"name": 1}, {"name": 2}]
    assert path.read_text() == '{"name": 1}\n{"name": 2}\n' and not capsys.readouterr().err
    path.write_text('{"name": 1}\n{"name": ')
    assert recall.read_lines(path, has_name) == [{"name": 1}]
    assert path.read_text() == '{"name": 1}\n'
    assert "the last line was cut off and is dropped" in capsys.readouterr().err


def test_a_folder_is_one_process_alone(tiny, tmp_path):
    with owned(tmp_path / "recall", "x"), pytest.raises(InputError, match="t .*/recall is in use"):
        main(["--output", str(tmp_path)])


def test_the_plot_names_a_mixer_that_only_the_last_task_has(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    cell = dict(T=64, load=4, answers=8, right=2, chance=0.1, by_distance=[[32, 2, 8]])
    recall.plot([dict(task=task, mixer=mixer, seed=1, cells=[cell])
                 for task, mixer in (("recall", "attention"), ("counting", "none"))],
                tmp_path / "curves.png", recall.GRIDS["small"])
    assert [text.get_text() for text in pyplot.gcf().legends[0].get_texts()] == [
        "attention", "none"]
    monkeypatch.undo()
    pyplot.close()
