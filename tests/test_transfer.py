"""Tuning parts of a model on other text: what moves, what stands, what is exchanged."""
import json
import math

import numpy as np
import pytest
import torch

import afno
import train_gpt2_afno as trainer
from data.text_to_bin import InputError
from experiments import ablation_studies, package_text, transfer
from experiments.transfer import (PARTS, count, exchange, operator_of, part_of, parts_of,
                                  rows_of, text_of, tune)
from runtime import Diverged, Runtime
from train_gpt2_afno import GPT, GPTConfig

CPU = Runtime(torch.device("cpu"), torch.float32, compile=False)
SHAPE = dict(vocab_size=50, n_layer=2, n_embd=16, n_head=2, sequence_length=16, afno_num_blocks=2)
HYBRID, ATTENTION = dict(mixer="afno", attn_layers=(1,)), dict(mixer="attn")


@pytest.fixture(autouse=True)
def texts(monkeypatch):
    """Replace the domains' texts by 200 tokens of two words each."""
    random = np.random.default_rng(0)
    found = {name: (random.integers(low, low + 2, 200), random.integers(low, low + 2, 50),
                    np.arange(49) % 7 > 0) for low, name in zip((0, 10, 20), transfer.DOMAINS)}
    monkeypatch.setattr(transfer, "text_of", found.get)


def make(**options) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**SHAPE | options))


def save(folder, seed: int = 1, **options):
    """Write a checkpoint of step 7 into a folder of its own."""
    model = make(**options)
    folder.mkdir(exist_ok=True)
    torch.save(dict(model=model.state_dict(), optimizers=[], step=7, position=0, rng={},
                    config=trainer.asdict(model.config), args=dict(seed=seed)),
               folder / "state_step000007.pt")


def moved(model: GPT, before: dict) -> dict[str, torch.Tensor]:
    """Return which numbers of each parameter differ from a state."""
    return {name: (p != before[name]).detach() for name, p in model.named_parameters()}


def test_a_model_has_the_parts_of_its_mixers():
    hybrid, attention = make(**HYBRID), make(**ATTENTION)
    assert parts_of(hybrid) == PARTS and parts_of(attention) == ("all", "rest", "rows")
    assert parts_of(make(mixer="afno", attn_layers=())) == ("all", "rest", "operator")
    rows = rows_of(hybrid, 0.02)
    assert all(".1." in name and name.endswith("c_attn.weight") for name in rows)
    assert 0 < count(hybrid, rows) == pytest.approx(
        0.02 * count(hybrid, part_of(hybrid, "all", 0)), abs=2 * 16)


@pytest.mark.parametrize("options, least", ((HYBRID, "operator"), (ATTENTION, "rows")))
def test_parts_are_disjoint_and_make_the_whole(options, least):
    model = make(**options)
    numbers = {part: count(model, part_of(model, part, 0.02)) for part in parts_of(model)}
    assert numbers[least] + numbers["rest"] == numbers["all"] == sum(
        p.numel() for p in model.parameters())
    assert numbers[least] > 0 and numbers["rest"] > 0
    if options is ATTENTION:  # the share that was asked for, to a row of query and key a layer
        assert abs(numbers["rows"] - 0.02 * numbers["all"]) <= 2 * 16


@pytest.mark.parametrize("options, part, least", (
    *((HYBRID, part, "operator") for part in ("all", "rest", "operator")),
    (HYBRID, "rows", "rows"), *((ATTENTION, part, "rows") for part in ("all", "rest", "rows"))))
def test_what_is_not_trained_does_not_move(options, part, least):
    args = transfer.parse(["x", "--steps", "3", "--batch_size", "2"])
    model = make(**options)
    chosen = part_of(model, least, 0.05)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    tune(model, part_of(model, part, 0.05), "code", 0.01, args, CPU)
    of_least = torch.cat([
        torch.full_like(moves, name in chosen).flatten() if chosen.get(name) is None
        else chosen[name].expand(moves.shape).flatten()
        for name, moves in moved(model, before).items()])
    moves = torch.cat([moves.flatten() for moves in moved(model, before).values()])
    if part != "rest":
        assert moves[of_least].float().mean() > 0.5
    else:
        assert not moves[of_least].any()
    if part == least:
        assert not moves[~of_least].any()
    else:
        assert moves[~of_least].float().mean() > 0.2


@pytest.mark.parametrize("options", (HYBRID, ATTENTION))
def test_an_exchange_moves_the_operator_alone(options):
    model, other = make(**options), make(**options)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    operator = operator_of(model, 0.05)
    exchange(model, operator, other.state_dict())
    moves = moved(model, before)
    assert {name for name, part in moves.items() if part.any()} == {*operator}
    assert sum(part.sum().item() for part in moves.values()) == count(model, operator)
    exchange(model, dict.fromkeys(moves), before)
    assert not any(part.any() for part in moved(model, before).values())


@pytest.mark.slow
def test_a_study_stands_and_its_tables_are_its_losses(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(transfer, "plot", lambda *arguments: None)  # it takes a second
    for name, options in (("c", HYBRID), ("b", ATTENTION)):
        save(tmp_path / name, **options)
    argv = ["transfer", str(tmp_path / "c"), str(tmp_path / "b"), "--domains", "code,law",
            "--rates", "0.01,0.001", "--steps", "4", "--batch_size", "2", "--device", "cpu",
            "--output", str(tmp_path / "out")]
    assert ablation_studies.main(argv) == 0
    said = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "out/rows.jsonl").read_text().splitlines()]
    # of two domains: before, three parts (of c four) at two rates, two exchanges
    assert len(rows) == 2 * (1 + 4 * 2 + 2) + 2 * (1 + 3 * 2 + 2)
    assert said.count("c@7: causality check") == said.count("b@7: causality check") == 1
    loss = {(row["label"], row["domain"], row["part"], row["rate"], row["operator_of"]):
            row["loss"] for row in rows}
    best = min(loss["c@7", "code", "all", rate, "code"] for rate in (0.01, 0.001))
    assert best < loss["c@7", "code", "none", 0.0, "start"]
    assert f"| c@7 | code | {loss['c@7', 'code', 'none', 0.0, 'start']:.4f} | 100.00% | " \
        f"{best:.4f} | " in said and " | 0.01 | " in said
    found = {(row["label"], row["domain"], row["part"], row["rate"]): row for row in rows
             if row["operator_of"] == row["domain"]}
    rest = min((found["c@7", "code", "rest", rate] for rate in (0.01, 0.001)),
               key=lambda row: row["loss"])
    assert rest["less_all"] == pytest.approx(rest["loss"] - best, abs=1e-6)
    assert f" | {rest['less_all']:.4f} | {rest['less_all_error']:.4f} | " in said
    of_c, of_b = (line for line in said.splitlines() if line.startswith(("| c@7 | code | ",
                                                                         "| b@7 | code | "))
                  and line.count("%") > 2)
    assert of_c.count("%") == 4 and of_b.count("%") == 3 and " |  |  |  |  | " in of_b
    kept = {path.name for path in (tmp_path / "out").glob("*.pt")}
    assert len(kept) == 4 and "c@7-code-0.01.pt" in kept
    other = loss["c@7", "code", "all", 0.01, "law"] - best
    assert f"| c@7 | code | {best:.4f} |  |  | {other:.4f} | " in said
    assert ablation_studies.main(argv) == 0
    again = capsys.readouterr().out
    assert again == said[said.index("# transfer"):]  # nothing was trained again
    fewer = [*argv[:5], "--rates", "0.001", *argv[7:]]  # whose weights were deleted, perhaps
    assert ablation_studies.main(fewer) == 0
    rest = found["c@7", "code", "rest", 0.001]["loss"] - found["c@7", "code", "all", 0.001]["loss"]
    assert f" | {rest:.4f} | " in capsys.readouterr().out  # less all at its rate of now
    assert ablation_studies.main(argv) == 0
    capsys.readouterr()
    save(tmp_path / "b", seed=2, **ATTENTION)  # another file of the same name
    assert ablation_studies.main(argv) == 0
    again = capsys.readouterr().out
    assert again.count("b@7, ") == 2 * (1 + 3 * 2 + 2) and "c@7, " not in again
    weights = tmp_path / "out/c@7-code-0.01.pt"
    before, data = torch.load(weights, weights_only=True), bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 0x40
    lines = (tmp_path / "out/rows.jsonl").read_text().splitlines()
    exchanged = [line for line in lines if '"label": "c@7"' in line and '"part": "all"' in line
                 and '"rate": 0.01, "operator_of": "start"' in line]
    for bad in (bytes(data), b"", None):  # damaged, empty, gone: tuned again to the same weights
        weights.unlink() if bad is None else weights.write_bytes(bad)
        (tmp_path / "out/rows.jsonl").write_text(
            "".join(f"{line}\n" for line in lines if line not in exchanged))
        assert exchanged and ablation_studies.main(argv) == 0
        again = torch.load(weights, weights_only=True)
        assert all(torch.equal(again[name], w) for name, w in before.items())
        assert {*exchanged} <= {*(tmp_path / "out/rows.jsonl").read_text().splitlines()}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/table.md").write_text("mine")
    with pytest.raises(InputError, match="--output .*/mine has a table.md of something"):
        ablation_studies.main([*argv[:-1], str(tmp_path / "mine")])
    assert f"\n\nMachine: torch {torch.__version__}, CPU, float32.\n" in said
    assert weights.exists() and not [*(tmp_path / "out").glob("*.part")]
    with pytest.raises(InputError, match="holds results with .*; delete it, or choose another"):
        ablation_studies.main([*argv, "--seed", "3"])
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/rows.jsonl").write_text('{"setting": 1}\n')
    with pytest.raises(InputError, match="rows.jsonl: line 1 is not a result of this study"):
        ablation_studies.main([*argv[:-1], str(tmp_path / "foreign")])
    with pytest.raises(InputError, match="one must have AFNO layers"):
        ablation_studies.main([*argv[:1], argv[2], *argv[3:-1], str(tmp_path / "x")])
    monkeypatch.setattr(transfer, "text_of", lambda domain: (
        np.full(99, 50), np.zeros(99, int), np.ones(98, bool)))
    with pytest.raises(InputError, match="c@7: a vocabulary of 50, the text of --domains code"):
        ablation_studies.main([*argv[:-1], str(tmp_path / "y")])


def test_results_of_another_machine_or_dtype_are_made_again(tmp_path, monkeypatch):
    made, args = [], transfer.parse([str(tmp_path / "c"), "--output", str(tmp_path)])
    monkeypatch.setattr(transfer, "judge", lambda *_: made.append(1) or np.full(42, 3.0))
    save(tmp_path / "c", **HYBRID)
    for number, dtype in enumerate(("float32", "bfloat16", "float32"), 1):
        for _ in range(2):  # the second time it stands
            study = transfer.Study(args, Runtime(CPU.device, getattr(torch, dtype), False))
            assert study.before("c@7", "code") == 3 and len(made) == number
    with open(study.path) as file:
        row = json.loads(file.readline())
    row["made_of"].pop()  # as it was before: of a machine not known
    study.path.write_text(f"{json.dumps(row)}\n")
    assert transfer.Study(args, CPU).before("c@7", "code") == 3 and len(made) == 4


def test_results_from_before_a_difference_was_kept_are_read_and_made_again(tmp_path, monkeypatch):
    losses = iter(range(1, 9))
    monkeypatch.setattr(transfer, "judge", lambda *_: np.full(42, float(next(losses))))
    monkeypatch.setattr(transfer, "tune", lambda *_: None)
    save(tmp_path / "c", **HYBRID)
    args = transfer.parse([str(tmp_path / "c"), "--output", str(tmp_path), "--rates", "0.01"])
    row = transfer.Study(args, CPU).tuned("c@7", "code", "rest", 0.01)
    assert row["less_all"] == -1 and row["less_all_error"] == 0  # 3, less 4 of the kept weights
    path = tmp_path / "rows.jsonl"
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    del kept[-1]["less_all"], kept[-1]["less_all_error"]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in kept))
    assert "less_all" in transfer.Study(args, CPU).tuned("c@7", "code", "rest", 0.01)


def test_a_study_takes_the_share_of_rows_that_the_operator_has(tmp_path):
    save(tmp_path / "c", **HYBRID | dict(n_embd=64, afno_num_blocks=16))
    args = transfer.parse([str(tmp_path / "c"), "--output", str(tmp_path)])
    study = transfer.Study(args, CPU)
    model = study.checkpoints["c@7"].shapes
    study.share = 0.01
    assert count(model, rows_of(model, study.share)) == pytest.approx(
        0.01 * count(model, part_of(model, "all", 0)), abs=64)
    study.args.steps, study.args.batch_size = 1, 1
    assert study.tuned("c@7", "code", "rows", 0.001)["trained"] == pytest.approx(0.01, abs=0.002)


def test_tables_have_the_parts_of_all_checkpoints(tmp_path):
    for name, options in (("b", ATTENTION), ("f", dict(mixer="afno", attn_layers=()))):
        save(tmp_path / name, **options)
    for order in ("bf", "fb"):
        study = transfer.Study(transfer.parse([
            *(str(tmp_path / name) for name in order), "--domains", "code", "--output",
            str(tmp_path / "out")]), CPU)
        assert study.shown() == PARTS
        assert study.parts("b@7") == ("all", "rest", "rows")
    alone = transfer.parse([str(tmp_path / "f"), "--domains", "code", "--output", str(tmp_path)])
    assert transfer.Study(alone, CPU).shown() == ("all", "rest", "operator")


def test_a_checkpoint_that_leaks_has_no_result(tmp_path, monkeypatch):
    conv = afno.causal_conv
    monkeypatch.setattr(afno, "causal_conv",
                        lambda u, taps: conv(u, taps) + 0.05 * u.roll(-1, 1))
    monkeypatch.setattr(transfer, "judge", None)
    save(tmp_path / "c", **HYBRID)
    with pytest.raises(InputError, match="^c@7: causality check: the model leaks"):
        transfer.main([str(tmp_path / "c"), "--device", "cpu", "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out/table.md").exists()


ROW = dict(label="c@7", domain="code", rate=0.01, setting={}, made_of=[], loss=3.0)
BEFORE, TUNED, EXCHANGED = (ROW | more for more in (
    dict(part="none", rate=0.0, operator_of="start"),
    dict(part="rest", operator_of="code", error=0.1, trained=0.5, less_all=-0.1,
         less_all_error=0.1),
    dict(part="all", operator_of="law", error=0.1, difference=-0.5)))


@pytest.mark.parametrize("row, values", (
    *((BEFORE, values) for values in (
        dict(loss="x"), dict(loss=float("nan")), dict(loss=-1), dict(loss=10**400),
        dict(label=["a"]), dict(domain="poems"), dict(domain=["code"]), dict(rate="0"),
        dict(operator_of="law"), dict(operator_of=[1]))),
    *((TUNED, values) for values in (
        dict(less_all=None), dict(less_all_error=-1), dict(trained=None), dict(trained=1.5),
        dict(error=None), dict(error="x"), dict(error=-1),
        dict(part="half"), dict(part=["all"]), dict(loss=True), dict(rate=float("inf")))),
    *((EXCHANGED, values) for values in (
        dict(difference=None), dict(difference=float("nan")), dict(error=float("inf")),
        dict(part="rest"), dict(operator_of="code"), dict(operator_of="poems")))))
def test_rows_that_make_no_tables_are_refused(tmp_path, row, values):
    save(tmp_path / "c", **HYBRID)
    out = tmp_path / "out"
    out.mkdir()
    (out / "rows.jsonl").write_text(f"{json.dumps(EXCHANGED)}\n{json.dumps(row | values)}\n")
    (out / "table.md").write_text(transfer.JUDGED)
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(InputError, match="rows.jsonl: line 2 is not a result .*; delete it, or "):
        transfer.main([str(tmp_path / "c"), "--device", "cpu", "--output", str(out)])
    assert {path: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("row", (BEFORE, TUNED, EXCHANGED, TUNED | dict(error=float("nan"))))
def test_rows_as_they_are_made_are_read(row):
    assert transfer.is_whole(row) and not transfer.is_whole(
        {name: value for name, value in row.items() if name != "made_of"})


def test_nothing_is_judged_where_rows_cannot_be_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "judge", None)
    save(tmp_path / "c", **HYBRID)
    (tmp_path / "rows.jsonl").symlink_to(tmp_path / "gone/rows.jsonl")
    with pytest.raises(InputError, match="cannot write .*/rows.jsonl: No such file"):
        transfer.main([str(tmp_path / "c"), "--device", "cpu", "--output", str(tmp_path)])


def test_a_loss_that_is_not_finite_is_no_result(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "judge", lambda *_: np.full(42, np.inf))
    save(tmp_path / "c", **HYBRID)
    with pytest.raises(Diverged, match="c@7, code, none, rate 0.0: the loss is inf"):
        transfer.main([str(tmp_path / "c"), "--device", "cpu", "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out/table.md").exists()


@pytest.mark.parametrize("domain, message", (
    ("plays", "there are none yet, run python data/shakespeare.py"),
    ("law", "no installed package has any"), ("code", "no installed package has any")))
def test_a_text_that_is_missing_is_told_by_the_flag_of_this_study(tmp_path, monkeypatch, domain,
                                                                  message):
    monkeypatch.setattr(package_text, "PLAYS", tmp_path / "val_000000.bin")
    monkeypatch.setattr(package_text, "documents", lambda source: [])
    with pytest.raises(InputError, match=f"^--domains {domain}: {message}$"):
        text_of.__wrapped__(domain)


def test_what_stands_in_the_training_part_is_not_judged():
    random = np.random.default_rng(1)
    train, new = random.integers(0, 50, 500), random.integers(0, 50, 300)
    judged = np.concatenate((new[:100], train[40:70], new[100:], train[:15]))
    seen = transfer.stands_in(judged, train)
    runs = {tuple(train[i:i + 16]) for i in range(len(train) - 15)}
    expected = np.zeros(len(judged), bool)
    for i in range(len(judged) - 15):
        if tuple(judged[i:i + 16]) in runs:
            expected[i:i + 16] = True
    assert (seen == expected).all() and seen[100:130].all() and not seen[-15:].all()
    assert not transfer.stands_in(judged[:15], train).any()


@pytest.mark.slow
def test_a_picture_of_the_gains(tmp_path, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    study = type("Study", (), dict(
        args=transfer.parse(["x"]), checkpoints=dict.fromkeys(("a$b_$@1", "_b@2")),
        before=lambda *_: 4.0, shown=lambda _: PARTS, parts=lambda _, label: PARTS[:3],
        best=lambda _, label, domain, part: dict(loss=3.5 - PARTS.index(part), error=0.1)))()
    bars, bar = [], plt.Axes.bar
    monkeypatch.setattr(plt.Axes, "bar", lambda axes, x, height, *arguments, **named: bars.append(
        (height, named["yerr"])) or bar(axes, x, height, *arguments, **named))
    names, name_lines = [], transfer.name_lines
    monkeypatch.setattr(transfer, "name_lines", lambda legend, labels: names.extend(
        name_lines(legend, labels) or [text.get_text() for text in legend.get_texts()]))
    transfer.plot(study, tmp_path / "gains.png")
    assert names == ["a$b_$@1", "_b@2"]
    assert len(bars) == 2 * 3  # checkpoints and domains
    for heights, errors in bars:  # the last is what neither has
        assert heights[:3] == [0.5, 1.5, 2.5] and math.isnan(heights[3])
        assert errors[:3] == [0.1] * 3
    assert (tmp_path / "gains.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("argv, message", (
    (["x", "--domains", "poems"], "--domains: must be of code, plays, law, .*, got poems"),
    (["x", "--rates", "0"], "--rates: must be a number > 0 .*, got 0"),
    (["nowhere"], "nowhere: no readable checkpoint")))
def test_bad_input_is_one_clear_line(argv, message, tmp_path):
    with pytest.raises(InputError, match=message) as caught:
        transfer.main([*argv, "--output", str(tmp_path / "out")])
    assert "\n" not in str(caught.value)
