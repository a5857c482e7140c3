"""experiments/sizes.py: fits against an oracle, what it reads of runs, what it refuses."""
import json
import math
import re
import shlex
import shutil

import numpy as np
import pytest

import train_gpt2_afno as trainer
from data.text_to_bin import InputError, owned
from experiments import sizes
from experiments.ablation_studies import STUDIES

TOKENS = 65_536 * 10


def torch_line(card: str) -> str:
    return f"torch 2.11.0+cu130, Python 3.12.3, 1 x {card}, 32 threads\n"


def make_run(folder, flags: str, seconds: float, loss: float, step: int = 10, more: str = "",
             card: str = "NVIDIA H200, CUDA 13.0", tokens: int = TOKENS):
    """Write the two files of a run of ten steps; more: further lines of its log."""
    given = trainer.parse_flags(["--preset", "fineweb", *shlex.split(flags)])
    values = {**trainer.DEFAULTS, **trainer.PRESETS["fineweb"], **given}
    config = trainer.GPTConfig(**trainer.model_fields(values))
    count = sum(p.numel() for p in sizes.shapes_of(trainer.GPT, config).parameters())
    mixers = " ".join(config.mixer_of(layer) for layer in range(config.n_layer))
    folder.mkdir()
    (folder / "train.log").write_text(
        "commit: abc\ncommand: train_gpt2_afno.py --preset fineweb --num_iterations 10 "
        f"--output_dir runs/x {flags}\n{torch_line(card)}"
        f"model: x, {count:,} parameters, mixers {mixers}, {config.n_head} heads, position none\n"
        + more)
    speed = TOKENS / seconds
    speeds = (speed / 9, speed, speed, math.nan, None)  # the first beside other work
    rows = [*(dict(step=n + 1, tokens=0, train_loss=9, train_time_s=0, tokens_per_s=each)
              for n, each in enumerate(speeds)),
            dict(step=step, tokens=tokens, val_loss=loss, train_time_s=2 * seconds),
            dict(step=step, wall_clock_time_to_target_loss=None, train_time_s=seconds)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("seed", range(3))
def test_fits_are_least_squares_with_their_error(seed):
    draw = np.random.default_rng(seed)
    x, noise = draw.uniform(1e6, 1e9, 9), draw.normal(0, 0.01, 9)
    y = 9 - 0.2 * np.log(x) + noise
    a, b, error = sizes.fit(list(x), list(y))
    wanted, covariance = np.polyfit(np.log(x), y, 1, cov=True)
    assert math.isclose(-b, wanted[0], rel_tol=1e-9) and math.isclose(a, wanted[1], rel_tol=1e-9)
    assert math.isclose(error, covariance[0, 0]**0.5, rel_tol=1e-9)
    assert abs(b - 0.2) < 4 * error
    _, b, error = sizes.fit([1.0, math.e], [3.0, 2.5])
    assert math.isclose(b, 0.5) and math.isnan(error)  # two points leave nothing over


@pytest.mark.parametrize("flags, mixer", (
    ("--mixer attn", "attention"), ("", "hybrid"), ("--attn_layers none", "filters"),
    ("--attn_layers none --afno_state_layers 5,10 --afno_short_conv 4", "states")))
def test_what_is_read_of_a_run(tmp_path, flags, mixer):
    found = sizes.read_sized(make_run(tmp_path / "run", f"{flags} --seed 3 --pair_rows 1024",
                                      12.5, 4.25))
    assert (found.model, found.mixer, found.seed) == ("d12", mixer, 3)
    assert (found.tokens, found.seconds, found.loss) == (TOKENS, 12.5, 4.25)
    # the same model without its tables has as many parameters that count
    bare = sizes.read_sized(make_run(
        tmp_path / "bare", f"{flags} --pair_rows 0 --value_tables 0", 1, 1)).parameters
    assert 60e6 < bare <= found.parameters < 1.001 * bare  # the tables' factors and gates
    assert 6 * found.parameters * TOKENS < found.flops < 12 * found.parameters * TOKENS


def test_two_sizes_make_tables_and_plots(tmp_path):
    flags = "--n_head 2 --attn_layers 2"
    runs = [make_run(tmp_path / f"{size}-{seed}", f"--model {size} {flags} --seed {seed}", seconds,
                     loss + seed / (100 if size == "d6" else 20))
            for size, seconds, loss in (("d6", 10, 5.0), ("d12", 20, 4.5)) for seed in (1, 2)]
    assert sizes.main([*map(str, runs), "--output", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out/table.md").read_text()
    assert text.count("| hybrid |") == 4 and text.index("| d6 |") < text.index("| d12 |")
    text = (tmp_path / "out/slopes.md").read_text()
    slope = f"{(5.015 - 4.575) / math.log(2):.4f}"  # between means
    assert re.search(rf"\| d6, d12 \| 4 \| .* \| {slope} \+- \S+ \|$", text, re.MULTILINE)
    assert re.search(rf"\| d6 \| d12 \| .* \| {slope} \|$", text, re.MULTILINE)
    assert sizes.main([str(runs[0]), "--output", str(tmp_path / "one")]) == 0
    one = (tmp_path / "one/slopes.md").read_text()
    assert "one size" in one and "next" not in one
    pytest.importorskip("matplotlib")
    assert (tmp_path / "out/sizes.png").stat().st_size > 1000


def test_sizes_are_compared_with_attention_of_as_much(tmp_path):
    curve = lambda seconds: 6 - 0.3 * math.log(seconds) + 0.05 * math.log(seconds)**2
    runs = []

    def make(mixer, size, seconds, loss, more="", **others):
        flags = f"--model {size} --n_head 2 {mixer} {more} --seed {len(runs)}"
        runs.append(make_run(tmp_path / f"{len(runs)}", flags, seconds, loss, **others))

    for size, seconds in (("d6", 10), ("d12", 80), ("d18", 40), ("d24", 100)):  # d12 is slow
        for noise in (-0.2, 0.2):  # means over seeds count
            make("--mixer attn", size, seconds, curve(seconds) + noise)
        make("--mixer attn", size, seconds, 1.0, tokens=TOKENS // 2)  # another budget
    inside, outside = 0.99 * sizes.NEAR, 1.01 * sizes.NEAR
    hybrid = (("d6", 10 / inside), ("d12", 20), ("d18", 100 * inside), ("d24", 100 * outside),
              ("d36", 10 / outside))
    for size, seconds in hybrid:
        for noise in (-0.3, 0.3):
            make("--attn_layers 2", size, seconds, curve(seconds) + 0.1 + noise)
    lines = sizes.lines_of([sizes.read_sized(folder) for folder in runs])
    rows = {row[2]: row[3:] for row in sizes.less_attention(lines)}
    assert [*rows] == ["d6", "d12", "d18", "d24", "d36"]
    # through the three nearest of four points of a parabola: the parabola
    assert [row[3] for row in rows.values()] == ["+0.1000"] * 3 + [""] * 2
    for (size, seconds), theirs in zip(hybrid[:4], (10, 80, 40, 100)):
        assert rows[size][0] == f"{curve(seconds) + 0.1 - curve(theirs):+.4f}"
    assert rows["d36"][0] == ""  # attention has no d36

    attention = {of.model: of for of in lines[TOKENS, "attention"]}
    of = next(of for of in lines[TOKENS, "hybrid"] if of.model == "d12")
    for i, measure in ((1, "parameters"), (2, "flops")):
        near = sorted(attention.values(), key=lambda other: abs(
            math.log(getattr(other, measure) / getattr(of, measure))))[:3]
        x, y = math.log(getattr(of, measure)), 0.0
        places = [math.log(getattr(other, measure)) for other in near]
        for j, other in enumerate(near):  # Lagrange's form
            weight = math.prod((x - places[k]) / (places[j] - places[k])
                               for k in range(3) if k != j)
            y += weight * curve(other.seconds)
        assert rows["d12"][i] == f"{curve(20) + 0.1 - y:+.4f}"
    assert "of as many parameters" in sizes.slopes(lines)

    two = {key: [of for of in found if of.model in ("d6", "d24")] for key, found in lines.items()}
    straight = sizes.read_off(two[TOKENS, "attention"], "seconds", 10**1.5)
    assert straight == pytest.approx((curve(10) + curve(100)) / 2)
    no_attention = {key: found for key, found in lines.items() if key[1] != "attention"}
    assert sizes.less_attention(no_attention) == []
    for of in lines[TOKENS, "hybrid"]:
        of.machines = ("1 x NVIDIA H100",)
    assert {row[-1] for row in sizes.less_attention(lines)} == {"several cards"}


@pytest.mark.parametrize("cards, further, machines", (
    (("CPU", "CPU"), "", ("1 x CPU", "1 x CPU")),
    (("NVIDIA H200, CUDA 13.0", "NVIDIA H200, CUDA 13.0, driver 580.1"), "",
     ("1 x NVIDIA H200", "1 x NVIDIA H200")),
    (("NVIDIA H200, CUDA 13.0", "NVIDIA H100 80GB HBM3, CUDA 13.0"), "",
     ("1 x NVIDIA H200", "1 x NVIDIA H100 80GB HBM3")),
    (("CPU", "CPU"), "NVIDIA H200, CUDA 13.0",  # resumed there
     ("1 x CPU, 1 x NVIDIA H200", "1 x CPU, 1 x NVIDIA H200"))))
def test_seconds_of_several_cards_have_no_fit(tmp_path, cards, further, machines):
    more = torch_line(further) if further else ""
    runs = [make_run(tmp_path / size, f"--model {size} --n_head 2 --attn_layers 2", seconds, loss,
                     card=card, more=more)
            for size, card, seconds, loss in zip(("d6", "d12"), cards, (10, 20), (5.0, 4.5))]
    lines = sizes.lines_of([sizes.read_sized(folder) for folder in runs])
    found = [row.rstrip(" |").split(" | ")[-1] for row in sizes.table(lines).splitlines()[2:]]
    assert found == [*machines]
    *_, parameters, flops, seconds = sizes.slopes(lines).splitlines()[-1].rstrip(" |").split(" | ")
    assert float(parameters) > 0 and float(flops) > 0
    several = len(set(", ".join(machines).split(", "))) > 1
    assert seconds == ("several cards" if several else f"{0.5 / math.log(2):.4f}")
    pytest.importorskip("matplotlib")
    sizes.draw(lines, tmp_path / "sizes.png")


AGAIN = "command: train_gpt2_afno.py --output_dir runs/x --resume auto --extend 90, resumed at " \
    "step 10\n"


@pytest.mark.parametrize("change, message", (
    (dict(step=9), "not a finished run"),
    (dict(more=AGAIN, step=20), "not a finished run"),  # stopped before it was as long as asked for
    (dict(loss=math.nan), "its loss is nan"),
    (dict(seconds=math.inf), "no step of training has tokens_per_s"),
    (dict(tokens=0), "its tokens are 0, .*: each must be a finite number above 0"),
    (dict(tokens="many"), "not a row of metrics"), (dict(loss="4.5"), "not a row of metrics"),
    (dict(more="model: x, 3 parameters, mixers afno, 1 heads\n"), "not those of the model"),
    (dict(more="command: train_gpt2_afno.py --preset baseline\n"), "not those of the model"),
    (dict(more="command: train_gpt2_afno.py --gone 3\n"), "unrecognized arguments: --gone"),
    (dict(more="command: train_gpt2_afno.py --model 'd4\n"), "No closing quotation")))
def test_what_is_no_finished_run_is_refused(tmp_path, change, message):
    folder = make_run(tmp_path / "run", "", **dict(seconds=1.0, loss=1.0) | change)
    with pytest.raises(InputError, match=f"^{folder}: .*{message}"):
        sizes.read_sized(folder)


def test_files_that_are_not_there_or_no_text_are_refused(tmp_path):
    with pytest.raises(InputError, match="^RUN: must be a folder's name, not empty"):
        sizes.main([""])
    folder = make_run(tmp_path / "bare", "", 1, 1)
    for path in (tmp_path / "nothing", folder / "metrics.jsonl"):
        with pytest.raises(InputError, match=f"^{path}: RUN must be the folder of a run$"):
            sizes.read_sized(path)
    log = (folder / "train.log").read_bytes()
    for text, message in ((b"", "no line with the command"), (b"\xff", "decode"),
                          (log.replace(b"torch ", b""), "no line with the machine")):
        (folder / "train.log").write_bytes(text)
        with pytest.raises(InputError, match=f"^{folder}: .*{message}"):
            sizes.read_sized(folder)
    for name in ("train.log", "metrics.jsonl"):
        (folder / name).unlink()
        with pytest.raises(InputError, match=f"^{folder}: {name}: No such file or directory$"):
            sizes.read_sized(folder)


@pytest.mark.parametrize("counts, words", (
    ((45_875_200, 91_750_400), "45.9M 91.8M"), ((768, 1536), "768 1.54k"),
    ((45_600_000, 46_400_000), "45.6M 46.4M"), ((655_360, 2_000_000_000), "655k 2.00B"),
    ((91_750_400, 91_760_000), "91,750,400 91,760,000"), ((999_499, 999_500), "999k 1.00M"),
    ((99_991_552, 999_817_216), "100M 1.00B"), ((9_999_360, 1_000), "10.0M 1.00k"),
    ((1, 999), "1 999"), ((999_999, 1_000_000), "999,999 1,000,000")))
def test_two_budgets_never_look_alike(counts, words):
    assert [*sizes.labels(counts).values()] == words.split()


def test_tables_and_plots_tell_budgets_apart(tmp_path, monkeypatch):
    lines = sizes.lines_of([sizes.read_sized(make_run(tmp_path / f"{n}", "", 1, 1, tokens=n))
                            for n in (768, 1536)])
    for page in (sizes.table(lines), sizes.slopes(lines)):
        assert "| 768 | hybrid |" in page and "| 1.54k | hybrid |" in page
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    sizes.draw(lines, tmp_path / "sizes.png")
    shown = pyplot.gcf().legends[0].get_texts()
    assert [text.get_text() for text in shown] == ["hybrid, 768 tokens", "hybrid, 1.54k tokens"]
    monkeypatch.undo()
    pyplot.close()


def test_a_run_that_was_made_longer_is_read_to_its_end(tmp_path):
    folder = make_run(tmp_path / "run", "--seed 4", 1, 1, step=100, more=AGAIN)
    assert sizes.read_sized(folder).seed == 4


@pytest.mark.parametrize("flags, message", (
    ("--sequence_length 2048", "--sequence_length is 2048, there 1024"),
    ("--learning_rate 0.1", "--learning_rate is 0.1"),
    ("--input_val_bin other", "--input_val_bin is other"),
    ("--model d6 --n_head 2 --attn_layers 2 --afno_short_conv 4",  # of the mixer's line
     "--afno_short_conv is 4, there 1"),
    ("--seed 2 --attn_layers 5", "--attn_layers is 5, there 5,10"),  # of the mixer and size
    ("--seed 2 --afno_state_layers 3", "--afno_state_layers is 3, there none"),
    ("--seed 2 --n_head 3", "--n_head is 3, there 6"),
    ("--model d6 --n_head 2 --attn_layers 2 --copy_layers 1", "--copy_layers is given, there not"),
    ("--mixer attn --copy_layers 1", "--copy_layers is given, there not given"),
    ("--seed 2 --copy_layers 1", "--copy_layers is 1, there none")))
def test_runs_that_do_not_compare_are_refused(tmp_path, flags, message):
    first = make_run(tmp_path / "first", "--afno_short_conv 1", 1, 1)
    other = make_run(tmp_path / "other", f"--afno_short_conv 1 {flags}", 1, 1)
    with pytest.raises(InputError, match=f"^{other}: does not compare with {first}: {message}"):
        sizes.main([str(first), str(other), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


SAID = "flags that differ from --help's defaults: attn_layers (5, 10), learning_rate {}\n"


@pytest.mark.parametrize("more, message", (
    (SAID.format(0.1), "--learning_rate is 0.1, there 0.0043"),  # the preset was another one
    (SAID.format(0.0043) + AGAIN.replace("90", "0") + SAID.format(0.1),  # changed on the way
     "--learning_rate is 0.0043, then 0.1, there 0.0043"),
    ("flags that differ from --help's defaults: attn_layers (5, 10)\n",
     "--learning_rate is the default, there 0.0043"),
    (SAID.format("0.0043, rest_lr 0.1"), "--rest_lr is 0.1, there the default"),
    ("flags that differ from --help's defaults: learning_rate 0.0043, warmup_iters 5\n", None),
    # a start that was killed before its first checkpoint left no run
    (SAID.format(0.1) + "commit: abc\n{begun}" + SAID.format(0.0043), None),
    (SAID.format(0.0043) + "steps: 10 of 131,072 tokens (2 x 64 x 1024), optimizer muon\n",
     "a step's number of tokens is 131,072, there 65,536"),
    (SAID.format("0.0043, seed 3, dtype bfloat16, save_every 7, batch_size 8, num_iterations 20")
     + "steps: 10 of 65,536 tokens (8 x 8 x 1024), optimizer muon\n", None)))
def test_what_a_log_says_of_flags_must_agree_too(tmp_path, more, message):
    usual = SAID.format(0.0043) + "steps: 10 of 65,536 tokens (1 x 64 x 1024), optimizer muon\n"
    first = make_run(tmp_path / "first", "", 1, 1, more=usual)
    begun = (first / "train.log").read_text().split("\n", 1)[1].replace(usual, "")
    more = more.replace("{begun}", begun)
    if "steps" not in more:
        more += "steps: 10 of 65,536 tokens (1 x 64 x 1024), optimizer muon\n"
    other = make_run(tmp_path / "other", "", 1, 2, more=more)
    runs = [sizes.read_sized(folder) for folder in (first, other)]
    if message is None:
        sizes.refuse_unlike([first, other], runs)
        return
    with pytest.raises(InputError, match=f"^{other}: does not compare with {first}: {message}$"):
        sizes.refuse_unlike([first, other], runs)


def test_layers_that_copy_differ_between_sizes_alone(tmp_path):
    flags = (("--copy_layers 2,5", ""), ("--copy_layers 1", "--model d6 --n_head 2"))
    runs = [sizes.read_sized(make_run(tmp_path / str(i), f"--mixer attn {copies} {size}", 1, 2 - i))
            for i, (copies, size) in enumerate(flags)]
    sizes.refuse_unlike([tmp_path] * 2, runs)


def test_another_validation_text_does_not_compare(tmp_path):
    line = "data: x, 9 tokens, 1 passes to come; validation: y, {} targets of 99, sha256 {}\n" \
        "step:10/10 val_loss:1\n"
    texts = (("64", "0a"), ("64", "0a"), ("64", "0b"), ("63", "0a"))
    runs = [sizes.read_sized(make_run(tmp_path / str(i), f"--seed {i}", 1, 1,
                                      more=line.format(*text))) for i, text in enumerate(texts)]
    old = sizes.read_sized(make_run(tmp_path / "old", "--seed 9", 1, 1))  # says nothing
    sizes.refuse_unlike([tmp_path] * 3, [*runs[:2], old])
    for other in runs[2:]:
        with pytest.raises(InputError, match="does not compare with .*: the validation text is 6"):
            sizes.refuse_unlike([tmp_path] * 2, [runs[0], other])


def test_a_forks_mixer_has_a_line_of_its_own(tmp_path, monkeypatch):
    runs = [sizes.read_sized(make_run(tmp_path / "a", "--attn_layers none", 1, 1))]
    whole = trainer.GPTConfig.mixer_of
    monkeypatch.setattr(trainer.GPTConfig, "mixer_of", lambda config, layer: {
        "afno": "mean"}.get(whole(config, layer), "attn"))
    runs += [sizes.read_sized(make_run(tmp_path / name, f"--attn_layers {layers}", 1, 1))
             for name, layers in (("b", "none"), ("c", "5,10"))]
    lines = sizes.lines_of(runs)
    assert [mixer for _, mixer in lines] == ["filters", "attn and mean", "mean"]
    sizes.draw(lines, tmp_path / "x.png")


def test_other_code_is_said_in_the_table(tmp_path):
    code = lambda digit: f"sha256: {str(digit) * 64} afno.py\n"
    runs = [sizes.read_sized(make_run(tmp_path / f"{i}", f"--seed {i}", 1, 1, more=code(i // 2)))
            for i in range(3)]
    assert "The runs had different code, in afno.py." in sizes.table(sizes.lines_of(runs))
    assert "code" not in sizes.table(sizes.lines_of(runs[:2]))


def test_a_run_or_its_copy_does_not_count_twice(tmp_path):
    first = make_run(tmp_path / "first", "", 1, 1)
    copy = shutil.copytree(first, tmp_path / "copy")
    for other in (first, copy):
        with pytest.raises(InputError, match=f"^{other} and {first} are one run, or copies of it: "
                                             "both are hybrid, d12, of 655,360 tokens and seed"):
            sizes.main([str(first), str(other), "--output", str(tmp_path / "out")])
    different = (("", TOKENS), ("", 2 * TOKENS), ("--seed 2", TOKENS),
                 ("--attn_layers none --afno_short_conv 2", TOKENS), ("--mixer attn", TOKENS),
                 ("--model d6 --n_head 2 --attn_layers 4", TOKENS))
    runs = [sizes.read_sized(make_run(tmp_path / f"{i}", flags, 1, 1, tokens=tokens))
            for i, (flags, tokens) in enumerate(different)]
    sizes.refuse_unlike([tmp_path] * len(runs), runs)
    again = sizes.read_sized(make_run(tmp_path / "again", "", 1, 1.01))  # a repeat of the first
    sizes.refuse_unlike([tmp_path] * 2, [runs[0], again])


def test_only_a_folder_of_this_script_is_written_into(tmp_path, monkeypatch):
    folder, out = make_run(tmp_path / "run", "", 1, 1), tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="^--output: must be a folder's name, not empty"):
        sizes.main([str(folder), "--output", ""])
    assert not (tmp_path / "table.md").exists()
    for _ in range(2):  # its own table is replaced
        assert sizes.main([str(folder), "--output", str(out)]) == 0
    (out / "table.md").write_text("| another | table |\n")
    with pytest.raises(InputError, match=f"^--output {out} has a table.md of something else"):
        sizes.main([str(folder), "--output", str(out)])
    assert (out / "table.md").read_text() == "| another | table |\n"
    (out / "table.md").unlink()
    (out / "slopes.md").write_text("mine")
    with pytest.raises(InputError, match=f"^--output {out} has a slopes.md of something else"):
        sizes.main([str(folder), "--output", str(out)])
    assert [file.name for file in out.glob("*.md")] == ["slopes.md"]
    with owned(out, "x"), pytest.raises(InputError, match=f"--output {out} is in use by"):
        sizes.main([str(folder), "--output", str(out)])


def test_every_size_of_the_study_can_be_made():
    for arm, flags in STUDIES["sizes"].arms.items():
        given = trainer.parse_flags([*shlex.split(flags), "--preset", "fineweb"])
        values = {**trainer.DEFAULTS, **trainer.PRESETS["fineweb"], **given}
        config = trainer.GPTConfig(**trainer.model_fields(values))
        assert arm == f"{values['model']}-{sizes.mixer_of(config)}"
        assert sizes.without_embeddings(sizes.shapes_of(trainer.GPT, config)) > 15e6
