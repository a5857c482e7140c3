"""Evaluate checkpoints: against the trainer's validation, and against definitions by loops."""
import io
import json
import math
import os
import re
import shlex
import zipfile

import numpy as np
import pytest
import torch

import runtime
import train_gpt2_afno as trainer
from data.loader import TokenStream
from data.text_to_bin import InputError, ShardWriter, owned
from experiments import evaluate
from experiments.evaluate import (CUTS, FIGURES, OCTAVES, Text, cut_documents, cut_rows, cut_taps,
                                  filter_figures, groups_of, longest_matches, losses_of, main,
                                  mean_and_error, response_by_octave, taps_of)
from runtime import Runtime
from train_gpt2_afno import GPT, GPTConfig

CPU = Runtime(torch.device("cpu"), torch.float32, compile=False)
END_OF_TEXT = 49  # of a small vocabulary, for time
SHAPE = dict(vocab_size=50, n_layer=2, n_embd=16, n_head=2, sequence_length=96,
             afno_num_blocks=2, attn_layers=(1,), embedding_norm=1, value_residual=1,
             afno_filter_length=64)


@pytest.fixture(autouse=True)
def small_vocabulary(monkeypatch):
    monkeypatch.setattr(evaluate, "END_OF_TEXT", END_OF_TEXT)
    monkeypatch.setattr(evaluate, "plot", lambda *arguments: None)  # it takes a second


@pytest.fixture
def sources(monkeypatch, tokens):
    """Replace what ships with packages by two sources, of 300 and 200 tokens of two documents."""
    found = dict(code=tokens[:300].copy(), plays=tokens[300:500].copy())
    for text in found.values():
        text[0] = END_OF_TEXT
    monkeypatch.setattr(evaluate.package_text, "tokens_of", lambda name, n: found[name][:n])
    return found


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    """Return a text of few words in documents of 1 to 300 tokens; it begins inside one."""
    random = np.random.default_rng(0)
    text = random.integers(0, 40, 901)
    text[[70, 71, 130, 430, 431, 500, 520, 800]] = END_OF_TEXT
    return text


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(1)
    model = GPT(GPTConfig(**SHAPE))
    with torch.no_grad():
        for p in model.parameters():  # so that gates and convolutions do something
            p.add_(0.1 * torch.randn_like(p))
    return model


def write_text(folder, tokens):
    folder.mkdir(exist_ok=True)
    writer = ShardWriter(folder / "val", len(tokens))
    writer.write(tokens)
    writer.close()
    return str(folder / "val_*.bin")


def write_checkpoint(folder, model: GPT, pattern: str, step: int = 7, seed: int = 1):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"state_step{step:06d}.pt"
    torch.save(dict(model=model.state_dict(), optimizers=[], step=step, position=0, rng={},
                    config=trainer.asdict(model.config),
                    args=dict(seed=seed, input_val_bin=pattern)), path)
    return path


# -----------------------------------------------------------------------------
# measures


@pytest.mark.parametrize("count, T", ((900, 96), (192, 96), (50, 96), (900, 70)))
def test_stream_is_the_trainers_validation(model, tokens, tmp_path, count, T):
    stream = TokenStream(write_text(tmp_path, tokens), 50, "bin")
    losses = losses_of(model, tokens[: count + 1], cut_rows(count, T), T, CPU, 300)
    total = runtime.evaluate(model, stream, count, 3, T, CPU)
    assert len(losses) == count
    assert losses.mean(dtype=np.float64) == pytest.approx(total.sum().item() / count, abs=1e-6)
    by_place = np.bincount(np.arange(count) % T, losses, minlength=T)
    np.testing.assert_allclose(by_place, total.numpy(), atol=1e-4)


@torch.no_grad()
def test_documents_see_only_themselves(model, tokens):
    count, T = 890, 96
    losses = losses_of(model, tokens[: count + 1], cut_documents(tokens, count, T), T, CPU, 500)
    start = 0
    for i in range(count):
        if tokens[i] == END_OF_TEXT or i - start == T:
            start = i
        if i % 17 == 0 or tokens[i + 1] == END_OF_TEXT:  # a part of them, for time
            alone, target = torch.from_numpy(tokens[start : i + 1]), torch.tensor(tokens[i + 1])
            logits = model.lm_head.logits(model.hidden(alone[None])[0, -1])
            assert losses[i] == pytest.approx(
                torch.nn.functional.cross_entropy(logits, target).item(), abs=2e-5), i


def test_both_measures_score_the_same_targets(model, tokens):
    T, count = 96, 900
    for text, equal in ((np.where(tokens == END_OF_TEXT, 0, tokens), True), (tokens, False)):
        stream, documents = (losses_of(model, text, pieces, T, CPU, 400)
                             for pieces in (cut_rows(count, T), cut_documents(text, count, T)))
        assert len(stream) == len(documents) == count
        assert np.allclose(stream, documents, atol=1e-5) == equal
        assert np.allclose(stream[:70], documents[:70], atol=1e-5)


def test_documents_are_the_units(tokens):
    pieces = cut_documents(tokens, 900, 96)
    np.testing.assert_array_equal(pieces.units(), (tokens[:900] == END_OF_TEXT).cumsum())
    assert pieces.length.sum() == 900 and pieces.length.max() == 96
    np.testing.assert_array_equal(cut_rows(200, 96).units(), np.arange(200) // 96)


def test_error_is_over_units():
    unit = np.repeat(np.arange(6), 50)
    shift = np.array([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    mean, error = mean_and_error(shift[unit], unit)  # tokens of a unit add nothing new
    assert (mean, error) == (2.5, pytest.approx(shift.std(ddof=1) / 6**0.5))
    random, means = np.random.default_rng(0), []
    for _ in range(300):
        size = random.integers(1, 40, 80)
        unit = np.repeat(np.arange(80), size)
        values = random.normal(size=80)[unit] + random.normal(size=len(unit))
        means.append(mean_and_error(values, unit))
    found, errors = np.array(means).T
    assert np.sqrt((errors**2).mean()) == pytest.approx(found.std(), rel=0.15)
    assert np.isnan(mean_and_error(np.ones(5), np.zeros(5, int))[1])


# -----------------------------------------------------------------------------
# groups


def match_by_definition(row: list[int], i: int) -> tuple[int, int | None]:
    """Return the longest match of row[: i + 1] that ends before i, and its most recent end."""
    best, end = 0, None
    for j in range(i):
        m = 0
        while m <= j and row[j - m] == row[i - m]:
            m += 1
        if m and m >= best:
            best, end = m, j
    return best, end


@pytest.mark.parametrize("words, count, T, seed", (
    (1, 50, 20, 0), (2, 201, 40, 1), (3, 200, 57, 2), (9, 300, 128, 3), (9, 300, 300, 4)))
def test_matches_are_those_of_the_definition(words, count, T, seed):
    tokens = np.random.default_rng(seed).integers(0, words, count + 1)
    tokens[150:185] = tokens[100:135]
    for pieces in (cut_rows(count, T), cut_documents(np.where(tokens == 0, 49, tokens), count, T)):
        start = pieces.spread(pieces.start)
        match, hit = longest_matches(tokens, start)
        for i in range(count):
            best, end = match_by_definition(tokens[start[i] : i + 1].tolist(), i - start[i])
            right = end is not None and tokens[start[i] + end + 1] == tokens[i + 1]
            assert (match[i], hit[i]) == (best, right), i


def test_groups_are_told_apart(tokens):
    T, count = 96, 900
    tokens = tokens.copy()
    tokens[300:330] = tokens[340:370] = np.arange(30)
    tokens[576] = END_OF_TEXT  # where a row begins
    pieces = dict(stream=cut_rows(count, T), documents=cut_documents(tokens, count, T))
    text = Text("", tokens, T, pieces)
    ends = [0, *np.flatnonzero(tokens[:count] == END_OF_TEXT), count]
    begins = [begin for begin, end in zip(ends, ends[1:]) if end - begin >= T]
    assert 1 < len(begins) < len(ends) - 1
    full = groups_of(text, "documents")[f"a document's position, the {len(begins)} of 96 tokens "
                                        "or more"]
    for (low, high), mask in zip(((0, 64), (64, 96)), full.values(), strict=True):
        assert mask.nonzero()[0].tolist() == [i for begin in begins
                                              for i in range(begin + low, begin + high)]
    sizes = (3 * T, T - 1, T, T + 1, 5, T)  # the first begins where the text does, the last is cut
    cut = np.ones(sum(sizes), int)
    cut[np.cumsum(sizes)[:-1]] = END_OF_TEXT
    found = groups_of(Text("", cut, T, dict(documents=cut_documents(cut, len(cut) - 1, T))),
                      "documents")
    full = found["a document's position, the 3 of 96 tokens or more"]
    begins = [0, 4 * T - 1, 5 * T - 1]
    assert [mask.nonzero()[0].tolist() for mask in full.values()] == [
        [i for begin in begins for i in range(begin + low, begin + high)]
        for low, high in ((0, 64), (64, T))]
    no_end = Text("", np.arange(40), T, dict(documents=cut_documents(np.arange(40), 39, T)))
    assert len(groups_of(no_end, "documents")) == 2  # position and match: none has 96 tokens
    for measure in pieces:
        position, *rest = (masks for by, masks in groups_of(text, measure).items()
                           if not by.startswith("a document's position"))
        assert [*position] == ["0-63", "64-95"]
        for masks in (position, *rest):
            masks = {name: mask for name, mask in masks.items() if not name.startswith("all ")}
            np.testing.assert_array_equal(sum(mask.astype(int) for mask in masks.values()), 1)
    _, ends, matches = groups_of(text, "stream").values()
    for i in range(count):
        seen = tokens[i // T * T + 1 : i + 1]  # a row's first token may begin its only document
        assert ends["yes"][i] == (END_OF_TEXT in seen), i
    assert matches[">= 16, hit"].nonzero()[0].tolist() == [*range(355, 369)]
    assert matches["4-5, hit"][343:345].all() and matches["all hits"][341:369].all()


# -----------------------------------------------------------------------------
# filters


def test_figures_of_known_filters():
    taps = np.zeros((3, 600))
    taps[0, 0], taps[1, 40], taps[2, [0, 200]] = 2, 1, (3, 4)  # energies 9 : 16
    figures = dict(zip(FIGURES, filter_figures(taps, taps)))
    assert figures["lags to 50%"] == pytest.approx((0 + 40 + 200) / 3)
    assert figures["energy beyond 32"] == pytest.approx((0 + 1 + 16 / 25) / 3)
    assert figures["energy beyond 128"] == pytest.approx(16 / 25 / 3)
    assert figures["energy beyond 512"] == 0
    assert figures["correlation"] == pytest.approx(3 / 5 / 3)
    assert (figures["moved"], figures["cosine to initial"]) == (0, pytest.approx(1))
    figures = dict(zip(FIGURES, filter_figures(np.eye(4, 600), -2 * np.eye(4, 600))))
    assert figures["rank"] == pytest.approx(4)
    assert (figures["moved"], figures["cosine to initial"]) == (1.5, pytest.approx(-1))
    for lags in (1, 2, 3, 600):
        figures = dict(zip(FIGURES, filter_figures(np.eye(1, lags), np.eye(1, lags))))
        assert figures["median frequency"] == 0.25  # every frequency passes
    assert filter_figures(np.ones((4, 600)), np.ones((4, 600)))[-4] == pytest.approx(1)
    for step, least, most in ((1.0, 0, 0.01), (-1.0, 0.49, 0.5)):  # low and high frequencies pass
        taps = step ** np.arange(600)[None]
        figures = dict(zip(FIGURES, filter_figures(taps, taps)))
        assert least <= figures["median frequency"] <= most


def test_the_response_is_told_by_octave():
    assert response_by_octave(np.eye(3, 1024)) == pytest.approx([1] * 9)  # every frequency passes
    short = response_by_octave(np.eye(3, 32))  # with points of a 64th of a cycle
    assert short[1:4] == pytest.approx([math.nan] * 3, nan_ok=True) and short[4:] == [1] * 5
    for octave, frequency in enumerate((
            1 / 700, 1 / 400, 1 / 200, 0.01, 0.02, 0.04, 0.08, 0.2, 0.4)):
        found = response_by_octave(2 * np.cos(2 * np.pi * frequency * np.arange(4096))[None])
        share = 2 * (OCTAVES[octave + 1] - OCTAVES[octave])  # of all frequencies
        assert found[octave] * share == pytest.approx(1, abs=0.1)  # nearly all power is there


def test_cut_taps_are_those_of_a_shorter_sum(model, tokens):
    idx = torch.from_numpy(tokens[None, :96])
    with torch.no_grad():
        whole, before = model.hidden(idx), taps_of(model)
        with cut_taps(model, 5):
            cut = taps_of(model)
            assert not torch.equal(model.hidden(idx), whole)
            assert torch.equal(model.hidden(idx)[:, :6], whole[:, :6])  # no lag beyond 5 yet
        np.testing.assert_array_equal(cut[..., :6], before[..., :6])
        assert not cut[..., 6:].any() and before[..., 6:].any()
        assert torch.equal(model.hidden(idx), whole)


def test_filters_of_a_run(model, tokens, tmp_path, capsys):
    pattern, out = write_text(tmp_path / "data", tokens), tmp_path / "out"
    torch.manual_seed(5)
    write_checkpoint(tmp_path / "begun", GPT(GPTConfig(**SHAPE)), pattern, seed=5)
    write_checkpoint(tmp_path / "moved", model, pattern, seed=5)
    attention = GPT(GPTConfig(**{**SHAPE, "mixer": "attn"}))
    write_checkpoint(tmp_path / "attention", attention, pattern)
    command = [*(str(tmp_path / name) for name in ("begun", "moved", "attention")),
               "--tokens", "400", "--out", str(out), "--device", "cpu", "--filters"]
    assert main(command) == 0
    first = capsys.readouterr()
    figures = {}
    for label, name, line in re.findall(
            r"^\| (\w+)@7, layer .*\n\| ---.*\n\| (\d) \| (.*) \|$", first.out, re.MULTILINE):
        figures[label] = dict(zip(FIGURES, line.split(" | ")), layer=name)
    assert figures.keys() == {"begun", "moved"} and figures["begun"]["layer"] == "0"
    assert figures["begun"]["moved"] == "0.00" and figures["moved"]["moved"] != "0.00"
    assert "attention@7: no taps." in first.out
    assert f"begun@7/stream, lags 0-{CUTS[0]}" in first.err  # of 64 lags
    assert f"begun@7/stream, lags 0-{CUTS[1]}" not in first.err
    with np.load(out / "losses.npz") as file:
        np.testing.assert_allclose(file["moved@7/taps"], taps_of(model), rtol=1e-3, atol=1e-7)
        np.testing.assert_array_equal(file["begun@7/taps"], file["moved@7/initial taps"])
    assert main(command) == 0
    assert capsys.readouterr() == (first.out, "")
    assert main(command[:-1]) == 0 and main(command) == 0
    assert capsys.readouterr().err == f"{out}/table.md: without --filters, not named now; " \
        "losses.npz still holds what was found\n"
    write_checkpoint(tmp_path / "moved", attention, pattern)  # in place of one that had filters
    assert main(command) == 0
    assert "moved@7: no taps." in capsys.readouterr().out
    with np.load(out / "losses.npz") as file:
        assert not [name for name in file.files if name.startswith("moved@7/") and "taps" in name]


# -----------------------------------------------------------------------------
# the command


def test_command_keeps_what_stands(model, tokens, tmp_path, monkeypatch, capsys):
    pattern = write_text(tmp_path / "data", tokens)
    first = write_checkpoint(tmp_path / "a", model, pattern)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
        write_checkpoint(tmp_path / "b", model, pattern, step=3)
        write_checkpoint(tmp_path / "b", model, pattern, step=12)
        model.lm_head.weight.mul_(2)
    out = tmp_path / "out"
    command = [str(first), str(tmp_path / "b"), "--device", "cpu", "--tokens", "500",
               "--out", str(out)]
    assert main(command) == 0
    page = (out / "table.md").read_text()
    assert capsys.readouterr().out.strip() == page.strip()
    with np.load(out / "losses.npz") as file:
        assert {*file.files} == {"index", *(f"{label}/{measure}" for label in ("a@7", "b@12")
                                            for measure in evaluate.MEASURES)}
        difference = (file["b@12/stream"].astype(float) - file["a@7/stream"]).mean()
        assert file["a@7/stream"].dtype == np.float16 and len(file["a@7/stream"]) == 500
        losses = losses_of(model, tokens[:501], cut_rows(500, 96), 96, CPU, 400)
        np.testing.assert_allclose(file["a@7/stream"], losses, rtol=1e-3)
    row = next(line for line in page.splitlines() if line.startswith("| b@12"))
    assert float(row.split("|")[3]) == pytest.approx(difference, abs=1e-3)

    calls, real = [], losses_of
    monkeypatch.setattr(evaluate, "losses_of", lambda *args: calls.append(1) or real(*args))
    assert main(command) == 0 and not calls
    assert (out / "table.md").read_text() == page
    command[command.index("500")] = "400"
    capsys.readouterr()
    assert main(command) == 0 and len(calls) == 4
    assert "a@7/stream: in place of that of another text" in capsys.readouterr().err
    write_checkpoint(tmp_path / "b", model, pattern, step=12)  # the same path, another file
    assert main(command) == 0 and len(calls) == 6
    write_text(tmp_path / "data", tokens[::-1])  # the same name, another text
    assert main(command) == 0 and len(calls) == 10
    monkeypatch.setattr(evaluate, "code", lambda: "other")  # a fork has changed its mixer
    assert main(command) == 0 and len(calls) == 14
    with np.load(out / "losses.npz") as file:
        kept = dict(file)
    index = json.loads(str(kept["index"]))
    for more in (dict(index=json.dumps({**index, "a@7/stream": {
            **index["a@7/stream"], "mean": index["a@7/stream"]["mean"] + 1}})),
                 dict(index=json.dumps({**index, "a@7/stream": {"key": ["x"]}})),
                 {"a@7/documents": kept["a@7/documents"][:-1]}):
        np.savez(out / "losses.npz", **kept | more)
        with pytest.raises(InputError, match="losses.npz: not a file of this script"):
            main(command)
    (out / "losses.npz").write_bytes(b"")
    with pytest.raises(InputError, match="losses.npz: not a file of this script"):
        main(command)
    (out / "losses.npz").unlink()
    for value, error, message in (
            (math.nan, InputError, "no readable checkpoint .*wte.weight .not finite. is damaged"),
            (3e38, runtime.Diverged, "b/state_step000012.pt: its losses are not finite")):
        with torch.no_grad():
            saved = model.lm_head.weight[0].clone()
            model.lm_head.weight[0] = value
            write_checkpoint(tmp_path / "b", model, pattern, step=12)
            model.lm_head.weight[0] = saved
        with pytest.raises(error, match=message):
            main(command)


@pytest.mark.parametrize("leak", (
    lambda x: x + 1e-3 * x.roll(-1, 1),  # the next token's
    lambda x: x + 1e-3 * x.roll(-40, 1),
    lambda x: x + x.mean(1, keepdim=True),
    lambda x: torch.where(torch.arange(x.size(1))[:, None] % 4 == 3, x.roll(-1, 1), x),
    lambda x: torch.where(torch.arange(x.size(1))[:, None] == 63, x.roll(-1, 1), x),  # its end
    lambda x: x.roll(-1, 1) if x.size(1) < 96 else x,  # in short rows alone, as documents have them
    lambda x: x / x.square().mean((0, 1), keepdim=True).sqrt()))  # a norm over rows and time
def test_a_model_that_leaks_is_refused(model, tokens, tmp_path, monkeypatch, leak):
    pattern, leaky = write_text(tmp_path / "data", tokens), tmp_path / "b"
    command = [str(write_checkpoint(tmp_path / "a", model, pattern)), "--device", "cpu",
               "--out", str(tmp_path / "out")]
    assert main(command) == 0
    page, hidden = (tmp_path / "out" / "table.md").read_text(), GPT.hidden
    monkeypatch.setattr(GPT, "hidden", lambda self, idx: leak(hidden(self, idx)))
    write_checkpoint(leaky, model, pattern)
    with pytest.raises(InputError, match="b/state_step000007.pt: the model leaks: the loss at pl"):
        main([command[0], str(leaky), *command[1:]])  # what stands for a is not computed again
    assert (tmp_path / "out" / "table.md").read_text() == page


@pytest.mark.parametrize("T, number", ((1024, 32), (96, 8), (65, 32), (65_536, 4), (2, 2), (1, 1)))
def test_cuts_are_at_the_ends_of_blocks_and_spread(T, number):
    random = np.random.default_rng(1)
    for _ in range(20):
        cuts = evaluate.choose_cuts(T, number, random)
        assert len(cuts) == number and cuts.min() >= 0 and cuts.max() <= max(T - 2, 0)
        ends = {cut for cut in cuts if cut % 64 == 63}
        assert len(ends) >= min(number // 2, (T - 1) // 64)
    if T == 1024:
        assert ends >= {*range(63, 1023, 64)}  # all 15 of them


def test_every_width_is_checked_with_few_rows(model, tokens, monkeypatch):
    shapes = []
    monkeypatch.setattr(evaluate, "losses_of_batch", lambda model, x, y, runtime: (
        shapes.append(x.shape), np.zeros(x.shape, np.float32))[1])
    pieces = dict(stream=cut_rows(1500, 1024), documents=cut_documents(tokens, 1500, 1024))
    text = Text("text", tokens[:1501], 1024, pieces)
    for batch_tokens, rows, times in ((8192, 8, 4), (65_536, 32, 1), (2048, 2, 16), (100, 1, 32)):
        shapes.clear()
        evaluate.refuse_leaks(model, text, CPU, batch_tokens, None)
        assert [*dict.fromkeys(T for _, T in shapes)] == text.widths()
        assert text.widths()[0] == 64 and text.widths()[-1] == 1024
        assert max(number for number, T in shapes) <= 32
        assert [number for number, T in shapes if T == 1024] == [rows] * (1 + times)
        assert len([T for _, T in shapes if T < 1024]) == 2 * len(text.widths()[:-1])


def test_a_leak_at_few_places_is_seen_in_one_row(model, tokens, tmp_path, monkeypatch):
    pattern, hidden = write_text(tmp_path / "data", tokens), GPT.hidden
    monkeypatch.setattr(GPT, "hidden", lambda self, idx: torch.where(
        (torch.arange(idx.size(1)) // 12 == 3)[:, None], hidden(self, idx).roll(-1, 1),
        hidden(self, idx)))
    path = write_checkpoint(tmp_path / "a", model, pattern)
    with pytest.raises(InputError, match="the model leaks: the loss at place (3[6-9]|4[0-7]) "):
        main([str(path), "--device", "cpu", "--batch_tokens", "96"])


def test_a_full_disk_and_odd_names(model, tokens, tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path / "a |b\nc", model, write_text(tmp_path / "data", tokens))
    command = [str(path), "--device", "cpu", "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch, pytest.raises(InputError, match="--out: cannot write "):
        patch.setattr(evaluate.os, "replace", lambda *_: exec("raise OSError(28, 'No space')"))
        main(command)
    assert not list((tmp_path / "out").glob("*.part"))
    assert main(command) == 0
    assert "| a_b_c@7 |" in (tmp_path / "out/table.md").read_text()
    assert evaluate.read_groups((tmp_path / "out/table.md").read_text())


@pytest.mark.parametrize("damage, message", (
    ("flip", "checksum of .* is wrong"), ("int8", "weight is damaged"),
    ("float16", "weight is damaged"), ("list", "model is damaged"), ("seed", "args.seed is damag"),
    ("config", "no readable checkpoint")))
def test_a_damaged_checkpoint_is_refused(model, tokens, tmp_path, damage, message):
    path = write_checkpoint(tmp_path / "a", model, write_text(tmp_path / "data", tokens))
    state = torch.load(path, weights_only=True)
    if damage in ("int8", "float16"):
        state["model"] = {name: w.to(getattr(torch, damage)) for name, w in state["model"].items()}
    elif damage == "list":
        state["model"] = [*state["model"].values()]
    elif damage == "seed":
        del state["args"]["seed"]
    elif damage == "config":
        del state["config"]
    torch.save(state, path)
    if damage == "flip":
        with zipfile.ZipFile(path) as archive:
            largest = max(archive.infolist(), key=lambda member: member.file_size)
        data = bytearray(path.read_bytes())
        for place in range(largest.header_offset + 400, largest.header_offset + 440):
            data[place] ^= 0x40
        path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        main([str(path), "--device", "cpu"])


def test_a_source_without_so_many_tokens_says_so(model, tokens, sources, tmp_path, capsys):
    path = write_checkpoint(tmp_path / "a", model, write_text(tmp_path / "data", tokens))
    command = [str(path), "--device", "cpu", "--text", "code,plays"]
    assert main(command) == 0 and "it has no more" not in capsys.readouterr().err
    assert main([*command, "--tokens", "250"]) == 0
    assert "--text plays: 200 targets, it has no more\n" in capsys.readouterr().err


def test_a_folder_of_something_else_is_left_alone(model, tokens, tmp_path):
    path = write_checkpoint(tmp_path / "a|b", model, write_text(tmp_path / "data", tokens))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/table.md").write_text("mine")
    command = [str(path), "--device", "cpu", "--tokens", "200", "--out", str(tmp_path / "out")]
    with pytest.raises(InputError, match="--out .* has a table.md of something else"):
        main(command)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["table.md"]
    (tmp_path / "out/table.md").rename(tmp_path / "out/curves.png")  # without a table
    with pytest.raises(InputError, match="--out .* has a curves.png of something else"):
        main(command)
    assert (tmp_path / "out/curves.png").read_text() == "mine"
    (tmp_path / "out/curves.png").unlink()
    assert main(command) == 0 and main(command) == 0
    assert "| a_b@7 |" in (tmp_path / "out/table.md").read_text()


def test_a_call_says_what_it_leaves_out_and_what_it_replaces(model, tokens, tmp_path, monkeypatch,
                                                             capsys):
    pattern, out = write_text(tmp_path / "data", tokens), tmp_path / "out"
    paths = [str(write_checkpoint(tmp_path / name, model, pattern)) for name in "ab"]
    one = ["--device", "cpu", "--tokens", "200", "--out", str(out), paths[0]]
    both = [*one, paths[1]]
    said = lambda command: capsys.readouterr() if main(command) == 0 else None
    assert f" Machine: torch {torch.__version__}, CPU, float32.\n" in said(both).out
    assert said(one).err == \
        f"{out}/table.md: without b@7, not named now; losses.npz still holds what was found\n"
    assert not said(both).err and "| b@7 |" in (out / "table.md").read_text()
    write_checkpoint(tmp_path / "b", model, pattern)  # the same path, another file
    lines = said(both).err.splitlines()
    assert "b@7/stream: in place of that of another checkpoint" in lines
    assert not [line for line in lines if line.startswith("a@7")]
    monkeypatch.setattr(evaluate, "code", lambda: "other")
    monkeypatch.setattr(evaluate, "machine", lambda runtime: "torch 1, a GPU, bfloat16")
    found = said([*both, "--rows", "48"])
    assert " Machine: torch 1, a GPU, bfloat16.\n" in found.out
    assert "a@7/documents: in place of that of another code, row length, machine\n" in found.err
    found = said([*both, "--rows", "48", "--tokens", "100"])
    assert "a@7/stream: in place of that of another text\n" in found.err


def test_one_document_is_no_documents(model, tokens, tmp_path, capsys):
    path = write_checkpoint(tmp_path / "a", model, write_text(tmp_path / "data", tokens))
    for count, words in (("60", "), 1 document, rows"), ("71", "), 2 documents, rows")):
        assert main([str(path), "--device", "cpu", "--tokens", count]) == 0
        assert words in capsys.readouterr().out


def test_losses_are_as_exact_as_the_script_says():
    said = re.findall(r"([\d.]+)\s(?:at most )?below (\d+)", evaluate.__doc__)
    assert [below for _, below in said] == ["16", "32"]
    for off, below in said:
        half_a_step = np.spacing(np.nextafter(np.float16(below), np.float16(0))) / 2
        assert round(float(half_a_step), 3) == float(off)


def test_a_line_joins_what_goes_on():
    matches = ["0", "1, miss", "2-3, miss", "1, hit"]
    assert evaluate.lines_of("longest earlier match in its row", matches) == [
        matches[:3], matches[3:]]
    assert evaluate.lines_of("position in its row", ["0-63", "64-95"]) == [["0-63", "64-95"]]
    assert evaluate.lines_of("source", ["code", "plays"]) == [["code"], ["plays"]]


def test_a_page_that_is_cut_off_is_not_drawn(model, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "plot", lambda *arguments: None)
    pattern = write_text(tmp_path / "data", tokens)
    runs = [str(write_checkpoint(tmp_path / name, model, pattern)) for name in "ab"]
    assert main([*runs, "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    table = tmp_path / "out/table.md"
    page = table.read_bytes()
    assert main([str(table)]) == 0
    refused = 0
    for end in [*range(page.index(b"## stream"), page.index(b"## documents"), 211), len(page) - 2]:
        table.write_bytes(page[:end])
        with pytest.raises(InputError, match="damaged or cut off|no tables of groups"):
            main([str(table)])
        refused += 1
    assert refused > 5
    row = page.index(b"| 0-63 |")
    end = page.index(b"\n", row)
    cells = page[row:end].split(b" | ")
    for column, number in ((1, b"many"), (2, b"5.8x"), (3, b"0.06 3"), (4, b"-0.1"), (5, b"x")):
        damaged = b" | ".join([*cells[:column], number, *cells[column + 1 :]])
        table.write_bytes(page[:row] + damaged + page[end:])
        with pytest.raises(InputError, match="table.md: damaged or cut off"):
            main([str(table)])
    os.mkfifo(tmp_path / "pipe.md")
    for name in ("pipe.md", "pipe"):
        (tmp_path / "pipe.md").rename(tmp_path / name)
        with pytest.raises(InputError, match=f"{name}: no ordinary file"):
            main([str(tmp_path / name)])
        (tmp_path / name).rename(tmp_path / "pipe.md")
    table.write_bytes(page)
    with pytest.raises(InputError, match="table.md is drawn as it stands: name nothing else"):
        main(["--filters", str(table)])


def test_all_sources_are_those_that_are_there(model, tokens, sources, tmp_path, capsys,
                                              monkeypatch):
    pattern = write_text(tmp_path / "data", tokens)
    command = [str(write_checkpoint(tmp_path / "a", model, pattern)), "--device", "cpu", "--text"]
    monkeypatch.setattr(evaluate.package_text, "SOURCES", dict(code=None, plays=None))
    monkeypatch.setattr(evaluate.package_text, "PLAYS", tmp_path / "none.bin")
    with pytest.raises(InputError, match="--text: must be all, or of code"):
        main([*command, "all,code"])
    monkeypatch.setattr(evaluate.package_text, "tokens_of",
                        lambda name, n: sources[name][:n] if name == "code" else None)
    assert main([*command, "all"]) == 0
    said = capsys.readouterr()
    assert "300 targets of code of installed packages (" in said.out
    assert "--text all: code; no plays, as there are none yet (python data/shakes" in said.err


def test_sources_are_apart_and_told_apart(model, tokens, sources, tmp_path, capsys, monkeypatch):
    pattern, out = write_text(tmp_path / "data", tokens), tmp_path / "out"
    command = [str(write_checkpoint(tmp_path / "a", model, pattern)), "--device", "cpu"]
    command += ["--text", "code,plays", "--out", str(out)]
    assert main(command) == 0
    said = capsys.readouterr()
    assert "500 targets of code, plays of installed packages (" in said.out
    for measure, cut in (("stream", cut_rows),
                         ("documents", lambda size, T: cut_documents(found, size, T))):
        for source, size in (("code", 300), ("plays", 200)):
            found = sources[source]
            whole = np.append(found, END_OF_TEXT)
            mean = losses_of(model, whole, cut(size, 96), 96, CPU, 400).mean(dtype=np.float64)
            line, = re.findall(rf"## {measure}, by group.*?^\| {source} \| (.*?) \|$", said.out,
                               re.MULTILINE | re.DOTALL)
            assert line.startswith(f"{size / 500:.1%} | ")
            assert float(line.split(" | ")[1]) == pytest.approx(mean, abs=2e-3)
    assert main(command) == 0
    assert capsys.readouterr() == (said.out, "")  # what stands is not computed again
    sources["plays"][100] = 3  # another text of the same name
    assert main(command) == 0
    assert "a@7/stream: " in capsys.readouterr().err
    with pytest.raises(InputError, match="--text: must be all, or of code, .*, got poems"):
        main([*command, "--text", "poems"])
    sources["plays"][100] = 50
    with pytest.raises(InputError, match="--text plays: token 50 is in it, a@7 has 50$"):
        main(command)
    monkeypatch.setattr(evaluate, "END_OF_TEXT", 50256)
    with pytest.raises(InputError, match="--text: the 50 tokens of a@7 are not GPT-2's"):
        main(command)


@pytest.mark.slow
def test_a_picture_of_every_group(tokens, tmp_path, monkeypatch):
    monkeypatch.undo()
    axes = pytest.importorskip("matplotlib.axes").Axes
    drawn, numbers, hidden, errorbar = [], [], [], axes.errorbar
    titles, set_title = [], axes.set_title
    monkeypatch.setattr(axes, "set_title", lambda self, title, **how: (
        titles.append(title.replace("\n", " ")), set_title(self, title, **how))[1])
    monkeypatch.setattr(axes, "errorbar", lambda self, groups, *more, **how: (
        drawn.append((how["color"], *groups)), numbers.append(more[0]),
        errorbar(self, groups, *more, **how))[2])
    monkeypatch.setattr(axes, "set_visible", lambda self, visible: hidden.append(visible))
    labels, count = ["a@1", "b@2"], 900
    pieces = dict(stream=cut_rows(count, 96), documents=cut_documents(tokens, count, 96))
    text = Text("", tokens, 96, pieces, dict(code=500, plays=400))
    results, random = evaluate.Results(None), np.random.default_rng(0)
    for name in (f"{label}/{measure}" for label in labels for measure in evaluate.MEASURES):
        results.put(name, [], {name: random.random(count)})
    groups = {measure: groups_of(text, measure) for measure in evaluate.MEASURES}
    for shown in (labels, labels[:1]):
        page = "\n\n".join(evaluate.tables_of_groups(shown, text, results, measure, groups[measure])
                            for measure in evaluate.MEASURES)
        (tmp_path / "table.md").write_text(f"{page}\n")
        assert evaluate.main([str(tmp_path / "table.md")]) == 0
        assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
        assert drawn[:3] == [("C0", "0-63", "64-95"), ("C0", "code"), ("C0", "plays")]
        assert {("hit" in line[1], len({"hit" in group for group in line[1:]}))
                for line in drawn} == {(False, 1), (True, 1)}
        tables = evaluate.read_groups(page)
        assert [table[0] for table in tables] == ["stream"] * 3 + ["documents"] * 4
        assert titles == [*(f"{measure}, by {by}" for measure in evaluate.MEASURES
                            for by in groups[measure] if "end before" not in by)]
        *_, (_, by, _, rows) = tables
        assert by.startswith("a document's position, the ") and hidden == [False]
        assert numbers[-1] == [float(row[-3 if len(shown) > 1 else 2]) for row in rows.values()]
        titles.clear()
        hidden.clear()
        measure, by, header, rows = next(t for t in tables[3:] if t[1].startswith("longest"))
        assert len(header) == 3 + 3 * (len(shown) - 1) and by.startswith("longest")
        for group, row in rows.items():
            mask = groups[measure][by][group]
            assert float(row[2]) == pytest.approx(
                results.arrays["a@1/documents"][mask].mean(dtype=np.float64), abs=6e-5)
    hits = ["hit" in name for name in rows]
    assert hits == sorted(hits) and any(hits) and not any(name.startswith("all ") for name in rows)
    (tmp_path / "table.md").write_text("nothing")
    with pytest.raises(InputError, match="table.md: no tables of groups"):
        evaluate.main([str(tmp_path / "table.md")])


def damaged(index, **arrays):
    """Return the bytes of a losses.npz with such an index."""
    file = io.BytesIO()
    np.savez_compressed(file, index=json.dumps(index), **arrays)
    return file.getvalue()


flipped = bytearray(damaged({"a@7/stream": dict(key=[1])}, **{"a@7/stream": np.zeros(500)}))
flipped[60] ^= 255  # inside of what is compressed


@pytest.mark.parametrize("text", (
    b"", b"notes", bytes(flipped), damaged([]), damaged({"x": 3}), damaged({"a@7/stream": {}}),
    damaged({"a@7/taps": dict(key=5)}), damaged({"a@7/stream": dict(key=[1])})))
def test_a_damaged_file_is_refused_and_kept(tmp_path, text):
    (tmp_path / "losses.npz").write_bytes(text)
    with pytest.raises(InputError, match="losses.npz: not a file of this script"):
        evaluate.Results(tmp_path)
    assert (tmp_path / "losses.npz").read_bytes() == text


def test_two_at_once_do_not_write_to_one_folder(model, tokens, tmp_path):
    pattern = write_text(tmp_path / "data", tokens)
    write_checkpoint(tmp_path / "a", model, pattern)
    with owned(tmp_path / "out", "x"), pytest.raises(InputError, match="--out .* is in use by"):
        main([str(tmp_path / "a"), "--device", "cpu", "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("words, message", (
    ("a --text code --bin x", "--bin: not allowed with argument --text"),
    ("none.pt", "none.pt: no readable checkpoint"),
    ("empty", "no state_step"),
    ("a a", "two are called a@7"),
    ("a --tokens 901", "--tokens must be <= 900"),
    ("a long", "--rows: name the tokens of a row, a@7 was trained with 96, long@7 with 48"),
    ("a --bin none*.bin", "--bin: no shard matches"),
    ("a --rows 0", "must be an integer >= 2"),
    ("a --out ''", "--out: must be a folder's name, not empty"),
    ("a --bin one/val_*.bin", "--bin holds one token"),
    ("a --bin ''", "--bin: must be a name, not empty"),
    ("learned --rows 97", "--rows must be <= 96, the positions that learned@7 has learned")))
def test_bad_input_is_one_line(model, tokens, tmp_path, monkeypatch, words, message):
    pattern = write_text(tmp_path / "data", tokens)
    write_checkpoint(tmp_path / "a", model, pattern)
    write_checkpoint(tmp_path / "long", GPT(GPTConfig(**{**SHAPE, "sequence_length": 48})), pattern)
    learned = GPT(GPTConfig(**{**SHAPE, "position": "learned"}))
    write_checkpoint(tmp_path / "learned", learned, pattern)
    (tmp_path / "empty").mkdir()
    write_text(tmp_path / "one", tokens[:1])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=re.escape(message)):
        main([*shlex.split(words), "--device", "cpu"])


FILTERS = """

## filters

| c, d@7, layer | lags to 50% | lags to 99% | energy beyond 32 |
| --- | --- | --- | --- |
| 0 | 3.8 | 40.7 | 5.30% |
| 2 | 0.5 | 5.6 | 0.07% |
| mean | 2.1 | 23.1 | 2.70% |
| mean, initial | 4.7 | 28.2 | 1.40% |

| c, d@7, response in cycles a token | to 1/512 | to 1/2 |
| --- | --- | --- |
| 0 | 19.267 | 0.517 |
| 2 |  | 0.419 |
| mean | 13.0 | 0.4 |
| mean, initial | 1.297 | 1.010 |

| stream loss when taps are cut | whole | lags 0-32, less whole | +- |
| --- | --- | --- | --- |
| c, d@7 | 4.2933 | 0.0307 | 0.0007 |
"""


def test_filters_are_drawn_from_their_tables(tmp_path):
    found = evaluate.read_filters(FILTERS)
    (figures, layers), (octaves, response) = found["c, d@7"].values()
    assert [*found] == ["c, d@7"] and figures[:2] == ["lags to 50%", "lags to 99%"]
    assert layers["2"] == [0.5, 5.6, 0.07] and layers["mean, initial"][1] == 28.2
    assert octaves == ["to 1/512", "to 1/2"] and response["0"] == [19.267, 0.517]
    assert np.isnan(response["2"][0])  # an octave below the model's lowest frequency
    pytest.importorskip("matplotlib")
    evaluate.plot_filters(evaluate.read_filters(FILTERS), tmp_path / "filters.png")
    assert (tmp_path / "filters.png").read_bytes().startswith(b"\x89PNG")


def test_a_page_draws_its_filters_or_says_that_they_are_cut_off(tmp_path, monkeypatch):
    monkeypatch.undo()  # the fixture's
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(evaluate, "read_groups", lambda page: [page])
    monkeypatch.setattr(evaluate, "plot_groups", lambda page, output: output.touch())
    table, picture = tmp_path / "table.md", tmp_path / "filters.png"
    whole = FILTERS.splitlines(keepends=True)
    first, response, cut = (next(i for i, line in enumerate(whole) if words in line)
                            for words in ("layer |", "response", "stream loss"))
    for end in range(first + 1, len(whole)):
        table.write_text("".join(whole[:end]))
        if end in (first + 6, first + 7) or end >= response + 6:  # old pages have no response
            assert main([str(table)]) == 0 and picture.exists()
            picture.unlink()
        else:
            with pytest.raises(InputError, match="table.md: damaged or cut off"):
                main([str(table)])
    two = FILTERS + FILTERS.replace("c, d@7", "$e_|@7").replace("## filters", "")
    for page in (FILTERS.replace("5.6 |", ""), FILTERS.replace("40.7", "many"),
                 FILTERS.replace("| 2 |  |", "| 3 |  |"), two[: two.index("| 0 |")]):
        table.write_text(page)
        with pytest.raises(InputError, match="table.md: damaged or cut off"):
            main([str(table)])
    table.write_text("## stream, by group\n\n## filters\n\nb@7: no taps.\n")
    picture.touch()
    assert main([str(table)]) == 0 and not picture.exists()  # it was of other checkpoints
