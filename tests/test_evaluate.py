"""Evaluate checkpoints: against the trainer's validation, and against definitions by loops."""
import re

import numpy as np
import pytest
import torch

import train_gpt2_afno as trainer
from data.loader import TokenStream
from data.text_to_bin import END_OF_TEXT, InputError, ShardWriter
from experiments import evaluate
from experiments.evaluate import cut_documents, cut_rows, losses_of, main, mean_and_error
from train_gpt2_afno import GPT, GPTConfig, Runtime

CPU = Runtime(torch.device("cpu"), torch.float32, compile=False)
SHAPE = dict(n_layer=2, n_embd=16, n_head=2, sequence_length=96, afno_num_blocks=2,
             attn_layers=(1,), embedding_norm=1, value_residual=1, afno_filter_length=64)


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
    stream = TokenStream(write_text(tmp_path, tokens), 50257, "bin")
    losses = losses_of(model, tokens[: count + 1], cut_rows(count, T), T, CPU, 300)
    total = trainer.evaluate(model, stream, count, 3, T, CPU)
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
        if i % 7 == 0 or tokens[i + 1] == END_OF_TEXT:  # a part of them, for time
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
    assert main(command) == 0 and len(calls) == 4
    write_checkpoint(tmp_path / "b", model, pattern, step=12)  # the same path, another file
    assert main(command) == 0 and len(calls) == 6


@pytest.mark.parametrize("words, message", (
    ("none.pt", "none.pt: no readable checkpoint"),
    ("empty", "no state_step"),
    ("a a", "two are called a@7"),
    ("a --tokens 901", "--tokens must be <= 900"),
    ("a long", "--rows: name the tokens of a row, a@7 was trained with 96, long@7 with 48"),
    ("a --bin none*.bin", "--bin: no shard matches"),
    ("a --rows 0", "must be an integer >= 1")))
def test_bad_input_is_one_line(model, tokens, tmp_path, monkeypatch, words, message):
    pattern = write_text(tmp_path / "data", tokens)
    write_checkpoint(tmp_path / "a", model, pattern)
    write_checkpoint(tmp_path / "long", GPT(GPTConfig(**{**SHAPE, "sequence_length": 48})), pattern)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=re.escape(message)):
        main([*words.split(), "--device", "cpu"])
