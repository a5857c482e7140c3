"""The trainer as its users run it: logs, validation, checkpoints, signals, ranks, bad input, generation."""
import argparse
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_gpt2_afno
from afno import AFNO1D, causal_conv
from data import text_to_bin
from data.text_to_bin import InputError, ShardWriter
from train_gpt2_afno import GPT, ROW_ORDERS, Checkpoints, Diverged, GPTConfig, TokenStream, TrainLoader, main

SCRIPT = Path(train_gpt2_afno.__file__)
SMALL = "--device cpu --dtype float32 --compile 0 --model d4 --batch_size 2 --sequence_length 16 --num_iterations 6 " \
        "--val_loss_every 3 --save_every 2 --warmup_iters 2 --warmdown_iters 2 --attn_layers 1"


def write_shards(folder: Path, sizes: dict[str, list[int]]):
    """{prefix: tokens of each shard}: a short text, over and over, so that there is something to learn."""
    text = np.random.default_rng(0).integers(0, 50257, 50)
    for prefix, counts in sizes.items():
        for i, count in enumerate(counts):
            writer = ShardWriter(folder / f"{prefix}_{i}", count)
            writer.write(np.resize(text, count))
            writer.close()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Three training shards, whose borders no batch respects, and one of validation."""
    folder = tmp_path_factory.mktemp("data")
    write_shards(folder, {"train": [100, 37, 300], "val": [151]})
    return folder


@pytest.fixture(autouse=True)
def small_d4(monkeypatch):
    monkeypatch.setitem(train_gpt2_afno.MODELS, "d4", (2, 2, 16))


def flags(data: Path, out: Path, more: str = "") -> list[str]:
    return [*SMALL.split(), "--input_bin", f"{data}/train_*.bin", "--input_val_bin", f"{data}/val_*.bin",
            "--output_dir", str(out), *more.split()]


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[tuple]:
    return [(line["step"], line["train_loss"]) for line in metrics(out) if "train_loss" in line]


def newest(out: Path) -> dict:
    return Checkpoints.load(Checkpoints(out).paths()[0])


def assert_same(a, b, path=""):
    """Bit for bit, all the way down; times are the one thing that may differ."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a.keys() - {"train_time_s", "compile_time_s", "wall_time_s"}:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, pair in enumerate(zip(a, b)):
            assert_same(*pair, f"{path}[{i}]")
    else:
        assert a == b, path


# -----------------------------------------------------------------------------
# a run and its logs


def test_a_run_learns_and_logs(data, tmp_path):
    assert main(flags(data, tmp_path / "run", "--num_iterations 40 --learning_rate 0.01")) == 0
    lines = metrics(tmp_path / "run")
    steps = [line for line in lines if "train_loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 41))
    for line in steps:
        assert set(line) == {"step", "tokens", "train_loss", "lr", "grad_norm", "tokens_per_s", "mfu", "train_time_s",
                             "peak_memory_bytes"}
        assert line["tokens"] == 32 * line["step"] and line["tokens_per_s"] > 0 and 0 < line["mfu"] < 1
    assert steps[0]["lr"] == 0.005 and steps[1]["lr"] == steps[30]["lr"] == 0.01 and steps[-1]["lr"] == 0.005
    validations = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in validations] == [*range(0, 40, 3), 40]
    assert 10 < validations[0]["val_loss"] < 12 and validations[-1]["val_loss"] < 6
    assert lines[-1]["wall_clock_time_to_target_loss"] is None and lines[-1]["tokens_per_s"] > 0
    log = (tmp_path / "run/train.log").read_text()
    assert SCRIPT.read_text() in log and Path(SCRIPT.parent / "afno.py").read_text() in log
    for said in ("command: ", f"torch {torch.__version__}", "mixers afno attn", "optimizer adamw", "peak_memory_usage"):
        assert said in log


def test_paths_in_the_log_are_relative_to_the_repository(data, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--output_dir", str(SCRIPT.parent / "runs/x")])
    main(flags(data, tmp_path / "run", "--num_iterations 1 --val_tokens 1"))
    assert "command: train_gpt2_afno.py --output_dir runs/x\n" in (tmp_path / "run/train.log").read_text()


def test_recomputing_trains_the_same(data, tmp_path):
    for name, more in (("kept", ""), ("again", "--recompute 1")):
        assert main(flags(data, tmp_path / name, more)) == 0
    kept, again = (dict(losses(tmp_path / name)) for name in ("kept", "again"))
    assert again == pytest.approx(kept, rel=1e-5)


@pytest.mark.parametrize("val_tokens", (1, 32, 33, 150))
def test_validation_counts_every_token(data, val_tokens):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50257, n_layer=1, n_head=1, n_embd=8, sequence_length=16)).double()
    stream = TokenStream(f"{data}/val_*.bin", 50257, "input_val_bin")
    runtime = train_gpt2_afno.Runtime(torch.device("cpu"), torch.float32, compile=False)
    got = train_gpt2_afno.evaluate(model, stream, val_tokens, 2, 16, runtime)
    assert got.shape == (16,) and not got[val_tokens:].any()
    tokens = stream.read(0, 151)
    each = []
    for begin in range(0, val_tokens, 16):  # windows of 16, the last one shorter
        end = min(begin + 16, val_tokens)
        logits = model(tokens[None, begin:end])[0][0]
        each += F.cross_entropy(logits, tokens[begin + 1 : end + 1], reduction="none").tolist()
    assert len(each) == val_tokens and abs(got.sum() / val_tokens - np.mean(each)) < 1e-12


def test_defaults_are_the_baselines():
    assert train_gpt2_afno.DEVICE_DEFAULTS["cuda"] == dict(
        model="d12", batch_size=16, grad_accumulation_steps=32, sequence_length=1024, num_iterations=4768,
        val_loss_every=128, save_every=128, dtype="bfloat16", compile=1)
    assert train_gpt2_afno.DEFAULTS["learning_rate"] == 0.0018 and train_gpt2_afno.DEFAULTS["weight_decay"] == 0.1


def test_warmup_and_warmdown_default_to_the_baselines_shares(data, tmp_path):
    argv = flags(data, tmp_path / "run", "--num_iterations 40")
    for name in ("--warmup_iters", "--warmdown_iters"):
        del argv[argv.index(name) : argv.index(name) + 2]
    main(argv)
    rates = [line["lr"] / 0.0018 for line in metrics(tmp_path / "run") if "train_loss" in line]
    assert np.allclose(rates, [0.5] + [1] * 31 + [(9 - i) / 9 for i in range(1, 9)])  # 256/4768 and 1024/4768 of 40


@pytest.mark.parametrize("available, expected", ((151, 150), (2_000_000, 1_048_576)))
def test_validation_takes_the_first_1048576_targets_or_all(available, expected):
    class Stream:
        read = staticmethod(lambda begin, count: None)
        __len__ = lambda self: available

    class Flags:
        val_tokens = None

    assert train_gpt2_afno.count_val_tokens(Flags, Stream()) == expected


def test_schedule_clip_and_decay_reach_every_optimizer(data, tmp_path, monkeypatch):
    made, make = [], train_gpt2_afno.make_optimizers
    monkeypatch.setattr(train_gpt2_afno, "make_optimizers", lambda *arguments: made.append(make(*arguments)) or made[-1])
    main(flags(data, tmp_path / "run", "--optimizer muon --num_iterations 4 --save_every 1"))
    for optimizer in made[-1]:  # the last update of a warmdown of two
        assert [group["lr"] for group in optimizer.param_groups] == [0.0018 / 2]
    assert made[-1][0].param_groups[0]["betas"] == (0.9, 0.95) and made[-1][1].param_groups[0]["momentum"] == 0.95
    main(flags(data, tmp_path / "run", "--optimizer muon --resume auto --num_iterations 8 --weight_decay 0.3 --momentum 0.8 "
               "--beta1 0.7 --beta2 0.98"))  # the flags', not the checkpoint's
    for optimizer in made[-1]:
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3]
    assert made[-1][0].param_groups[0]["betas"] == (0.7, 0.98) and made[-1][1].param_groups[0]["momentum"] == 0.8


def test_gradients_are_clipped(data, tmp_path, monkeypatch):
    norms, step = [], torch.optim.AdamW.step

    def measured(self, *arguments):
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in self.param_groups[0]["params"]]).item())
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", measured)
    main(flags(data, tmp_path / "run", "--grad_clip 0.5 --num_iterations 2"))
    assert np.allclose(norms, 0.5, rtol=1e-3)
    assert all(line["grad_norm"] > 0.6 for line in metrics(tmp_path / "run") if "train_loss" in line)  # before clipping


def test_mfu_counts_6_flops_a_parameter(data, tmp_path):
    count = lambda mixer: train_gpt2_afno.flops_per_token(GPT(GPTConfig(
        vocab_size=97, n_layer=2, n_head=2, n_embd=16, mixer=mixer, afno_filter_length=8)), 100)
    assert count("attn") == 6 * (97 * 16 + 2 * 12 * 16**2) + 6 * 2 * 16 * 100


def test_accumulation_is_a_larger_batch(data, tmp_path):
    main(flags(data, tmp_path / "large", "--batch_size 4"))
    main(flags(data, tmp_path / "small", "--batch_size 1 --grad_accumulation_steps 4"))
    for (_, a), (_, b) in zip(losses(tmp_path / "large"), losses(tmp_path / "small"), strict=True):
        assert abs(a - b) < 1e-5 * b


def test_target_loss_stops_and_is_reported(data, tmp_path, capsys):
    main(flags(data, tmp_path / "run", "--num_iterations 60 --learning_rate 0.01 --target_val_loss 8"))
    last = metrics(tmp_path / "run")[-1]
    main(flags(data, tmp_path / "run", "--num_iterations 60 --learning_rate 0.01 --target_val_loss 8 --resume auto"))
    assert metrics(tmp_path / "run")[-1]["step"] == last["step"]  # it stays reached
    assert last["step"] < 60 and last["wall_clock_time_to_target_loss"] == last["train_time_s"] > 0
    assert re.search(r"wall_clock_time_to_target_loss: \d", capsys.readouterr().out + (tmp_path / "run/train.log").read_text())


def test_max_seconds_saves_and_stops(data, tmp_path):
    main(flags(data, tmp_path / "run", "--max_seconds 0.001"))
    assert newest(tmp_path / "run")["step"] == 0
    main(flags(data, tmp_path / "run", "--resume auto"))
    assert newest(tmp_path / "run")["step"] == 6


def test_without_a_recipe_the_baseline_is_what_it_was_before_there_was_one(data, tmp_path):
    main(flags(data, tmp_path / "run", "--num_iterations 5 --mixer attn"))
    before = (10.878825188, 10.858886719, 10.798175812, 10.588490486, 10.594739914)
    assert [loss for _, loss in losses(tmp_path / "run")] == pytest.approx(before, rel=1e-5)
    assert "recipe: none of its flags\n" in (tmp_path / "run/train.log").read_text()


def test_every_field_of_the_recipe_is_off_by_default():
    config = GPTConfig()
    for name, value in train_gpt2_afno.RECIPE.items():
        assert train_gpt2_afno.DEFAULTS[name] == value
        assert name == "mixer_scale" or getattr(config, name, value) == value
    assert config.mixer_scale == 1 and GPTConfig(mixer="attn").mixer_scale == 24**-0.5


def test_the_presets_of_run_afno_have_flags_that_the_trainer_takes():
    script = (train_gpt2_afno.ROOT / "run_afno.sh").read_text(encoding="utf-8")
    presets = [shlex.split(flags) for flags in re.findall(r"^    flags=\((.*?)\)$", script, re.MULTILINE | re.DOTALL)]
    assert len(presets) == 2
    for words in presets:
        values = train_gpt2_afno.DEFAULTS | train_gpt2_afno.parse_flags(words)
        config = GPTConfig(**train_gpt2_afno.model_fields(values))
        train_gpt2_afno.length_phases(argparse.Namespace(**values), config.sequence_length, world=1)
        assert values["warmdown_iters"] is None or values["warmdown_iters"] <= values["num_iterations"]


# -----------------------------------------------------------------------------
# the recipe's schedules

RECIPE = "--mlp_ratio 3 --swiglu 1 --qk_norm 1 --attn_short_conv 4 --attn_gate 1 --fp8_head 1 --fp8_mlp 1 --embedding_norm 1 " \
         "--logit_softcap 15 --embedding_residual 1 --mixer_scale 1 --final_lr_fraction 0.1 --rest_lr 0.003 --row_order spread " \
         "--residual_bf16 1 --half_rotary 1 --value_residual 1 --momentum 0.9 --beta1 0.7 --beta2 0.98"
PHASES = "--num_iterations 10 --grad_accumulation_steps 2 --curriculum 4:0.3,8:0.3,16:0.4"


def recorded(monkeypatch, stop_at: int | None = None) -> list:
    """The batches (x, y) that are trained on from now on; the run is asked to stop in micro-batch stop_at."""
    batches, forward = [], GPT.forward

    def recording(self, idx, targets=None, return_logits=True):
        batches.append((idx, targets))
        if len(batches) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, idx, targets, return_logits)

    monkeypatch.setattr(GPT, "forward", recording)
    return batches


def test_a_curriculum_reads_every_token_once_and_in_order(data, tmp_path, monkeypatch):
    batches = recorded(monkeypatch)
    main(flags(data, tmp_path / "run", PHASES))
    lengths = [4] * 3 + [8] * 3 + [16] * 4
    assert [x.shape for x, _ in batches] == [(32 // T, T) for T in lengths for _ in range(2)]
    x, y = (torch.cat([batch[part].flatten() for batch in batches]) for part in range(2))
    stream = TokenStream(f"{data}/train_*.bin", 50257, "input_bin")
    assert torch.equal(x, stream.read(0, 640)) and torch.equal(y, stream.read(1, 640))
    lines = [line for line in metrics(tmp_path / "run") if "train_loss" in line]
    assert [line["tokens"] for line in lines] == list(range(64, 641, 64))
    assert [line["sequence_length"] for line in lines] == lengths
    assert [line["tokens"] for line in metrics(tmp_path / "run") if "val_loss" in line] == [0, 192, 384, 576, 640]
    assert newest(tmp_path / "run")["position"] == 640
    assert "1.46 passes to come" in (tmp_path / "run/train.log").read_text()


def test_a_run_stopped_between_phases_and_resumed_equals_uninterrupted(data, tmp_path, monkeypatch):
    options = f"{RECIPE} {PHASES} --optimizer muon --attn_layers 0,1"
    main(flags(data, tmp_path / "whole", options))
    with monkeypatch.context() as patch:
        recorded(patch, stop_at=11)  # the 6th step, the last one of length 8
        assert main(flags(data, tmp_path / "run", options)) == 128 + signal.SIGTERM
    stopped = newest(tmp_path / "run")
    assert stopped["step"] in (5, 6) and stopped["position"] == 64 * stopped["step"]
    batches = recorded(monkeypatch)
    main(["--output_dir", str(tmp_path / "run"), "--resume", "auto", "--device", "cpu"])
    assert batches[0][0].size(1) == (8 if stopped["step"] == 5 else 16)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert_same(newest(tmp_path / "run"), newest(tmp_path / "whole"))


@pytest.mark.parametrize("head, mlp", ((0, 1), (1, 0), (1, 1)))
def test_fp8_is_where_it_was_asked_for(data, tmp_path, monkeypatch, head, mlp):
    """On a CPU that is taken for a GPU with fp8, whose products are emulated."""
    models, make = [], train_gpt2_afno.make_optimizers
    monkeypatch.setattr(train_gpt2_afno, "make_optimizers", lambda *given: models.append(given[0]) or make(*given))
    monkeypatch.setattr(train_gpt2_afno, "fp8_path", lambda *_: (True, "tried"))
    main(flags(data, tmp_path / "run", f"--fp8_head {head} --fp8_mlp {mlp} --num_iterations 2"))
    assert models[0].fp8_head == head and all(block.mlp.fp8 == mlp for block in models[0].transformer.h)
    named = " and of ".join(["the head"] * head + ["the MLPs' first layers"] * mlp)
    assert f"products of {named}: tried\n" in (tmp_path / "run" / "train.log").read_text()


def test_learning_rates_follow_one_schedule(data, tmp_path, monkeypatch):
    made, make = [], train_gpt2_afno.make_optimizers
    monkeypatch.setattr(train_gpt2_afno, "make_optimizers", lambda *given: made.append(make(*given)) or made[-1])
    main(flags(data, tmp_path / "run", f"{RECIPE} --optimizer muon --num_iterations 4"))
    factor = 0.1 + 0.9 * 0.5  # the last update of a warmdown of two
    adamw, muon = ([group["lr"] for group in optimizer.param_groups] for optimizer in made[-1])
    assert adamw == pytest.approx([factor * lr for lr in (0.0018, 0.003, 0.003)]) and muon == [factor * 0.0018]
    assert [line["lr"] for line in metrics(tmp_path / "run") if "train_loss" in line][-1] == factor * 0.0018
    main(flags(data, tmp_path / "run", "--resume auto --num_iterations 6 --rest_lr 0.02"))
    resumed = [group["lr"] for group in made[-1][0].param_groups]
    assert resumed == pytest.approx([factor * lr for lr in (0.0018, 0.02, 0.02)])  # the flag's, not the checkpoint's


def test_a_learning_rate_of_the_rest_is_not_for_half_a_run(data, tmp_path):
    main(flags(data, tmp_path / "run", "--num_iterations 1"))
    with pytest.raises(InputError, match="--rest_lr makes groups .*, or never"):
        main(flags(data, tmp_path / "run", "--resume auto --rest_lr 0.01"))


def test_every_phase_is_checked_before_the_first_step(data, tmp_path, monkeypatch):
    def leaks_at_8(mixer, x, taps, *_):  # behind weights that begin at zero
        return x + mixer.operator.taps.mlp.b2.sum() * x.roll(-1, 1) if x.size(1) == 8 else x

    monkeypatch.setattr(AFNO1D, "forward", leaks_at_8)
    with pytest.raises(InputError, match="the model leaks, refusing to train"):
        main(flags(data, tmp_path / "run", PHASES))
    assert not losses(tmp_path / "run")


# -----------------------------------------------------------------------------
# data


def test_stream_crosses_shard_borders_and_begins_again(data):
    stream = TokenStream(f"{data}/train_*.bin", 50257, "input_bin")
    tokens = np.concatenate([text_to_bin.read_bin(path) for path in sorted(data.glob("train_*.bin"))]).astype(np.int64)
    assert len(stream) == len(tokens) == 437
    twice = torch.from_numpy(np.concatenate((tokens, tokens)))
    for begin, count in ((0, 437), (99, 2), (90, 60), (430, 20), (436, 1)):
        assert torch.equal(stream.read(begin, count), twice[begin : begin + count])
    assert stream.where(137).endswith("train_2_000000.bin, token 0")


@pytest.mark.parametrize("order", ROW_ORDERS)
def test_ranks_share_out_what_one_process_reads(data, order):
    stream, device = TokenStream(f"{data}/train_*.bin", 50257, "input_bin"), torch.device("cpu")
    alone = TrainLoader(stream, 2, 8, 0, 0, 1, device, order)
    ranks = [TrainLoader(stream, 2, 8, 0, rank, 2, device, order) for rank in range(2)]
    for _ in range(20):
        for loader in ranks:
            (x, y), (x_rank, y_rank) = alone.next(), loader.next()
            assert torch.equal(x, x_rank) and torch.equal(y, y_rank)
            assert torch.equal(x[:, 1:], y[:, :-1])
            assert (order == "spread") != torch.equal(x.flatten()[1:], y.flatten()[:-1])
    resumed = TrainLoader(stream, 2, 8, alone.position, 0, 1, device, order)
    assert torch.equal(torch.stack(resumed.next()), torch.stack(alone.next()))


@pytest.mark.parametrize("T", (1, 4, 7, 20))
def test_rows_spread_over_the_stream_meet_each_row_once_a_pass(data, T):
    stream = TokenStream(f"{data}/train_*.bin", 50257, "input_bin")
    loader = TrainLoader(stream, 1, T, 0, 0, 1, torch.device("cpu"), "spread")
    rows = 436 // T  # whole ones, with a target for each last token
    passes = [[loader.start(row) for row in range(n * rows, (n + 1) * rows)] for n in range(2)]
    assert sorted(passes[0]) == list(range(0, rows * T, T)) and passes[0] == passes[1]
    for row in range(rows):
        x, y = loader.next()
        assert torch.equal(x[0], stream.read(passes[0][row], T)) and torch.equal(y[0], stream.read(passes[0][row] + 1, T))


def test_rows_of_a_batch_are_far_apart_where_they_are_spread():
    class Stream:  # as long as FineWeb's 2.5B tokens, and read by nobody here
        def __len__(self):
            return 2_500_000_000

        def read(self, position, count):
            return torch.zeros(count)

    loader = TrainLoader(Stream(), 64, 1024, 0, 0, 1, torch.device("cpu"), "spread")
    for first in (0, 12_345 * 64):
        starts = sorted(loader.start(row) for row in range(first, first + 64))
        apart = [b - a for a, b in zip(starts, starts[1:] + [starts[0] + loader.rows * 1024])]
        assert min(apart) > 0.2 * len(loader.stream) / 64, "the closest two have a fifth of the mean distance at least"


# -----------------------------------------------------------------------------
# checkpoints, signals


def run_script(arguments: list[str], **options) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(SCRIPT), *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)


def wait_for_step(out: Path, step: int):
    deadline = time.time() + 120
    while not (out / "metrics.jsonl").exists() or f'"step": {step},' not in (out / "metrics.jsonl").read_text():
        assert time.time() < deadline, "the run does not get there"
        time.sleep(0.02)


@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
def test_killed_and_resumed_equals_uninterrupted(data, tmp_path, monkeypatch, optimizer):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = f"--optimizer {optimizer} --num_iterations 12 --save_every 3"
    whole = run_script(flags(data, tmp_path / "whole", options))
    killed = run_script(flags(data, tmp_path / "killed", options))
    wait_for_step(tmp_path / "killed", 7)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL and whole.wait() == 0
    resumed = run_script(flags(data, tmp_path / "killed", options + " --resume auto"))
    assert resumed.wait() == 0, resumed.stderr.read()
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert [line["step"] for line in metrics(tmp_path / "killed") if "val_loss" in line] == [0, 3, 6, 9, 12]
    a, b = newest(tmp_path / "killed"), newest(tmp_path / "whole")
    assert a["step"] == 12 and a["position"] == 12 * 32
    assert_same(a, b)


@pytest.mark.parametrize("signum", (signal.SIGINT, signal.SIGTERM))
def test_signals_save_then_exit(data, tmp_path, signum):
    run = run_script(flags(data, tmp_path / "run", "--num_iterations 5000 --save_every 0 --val_loss_every 0"))
    wait_for_step(tmp_path / "run", 3)
    run.send_signal(signum)
    run.send_signal(signum)  # as torchrun does, and impatient people
    assert run.wait(timeout=60) == 128 + signum
    state = newest(tmp_path / "run")
    assert state["step"] >= 3 and losses(tmp_path / "run")[-1][0] == state["step"]


def test_a_signal_cuts_a_validation_short(data, tmp_path, monkeypatch):
    def slow(self, *arguments):
        if not torch.is_grad_enabled():
            os.kill(os.getpid(), signal.SIGTERM)
            calls.append(arguments)
        return hidden(self, *arguments)

    calls, hidden = [], GPT.hidden
    monkeypatch.setattr(GPT, "hidden", slow)
    assert main(flags(data, tmp_path / "run")) == 128 + signal.SIGTERM
    assert len(calls) == 1 and newest(tmp_path / "run")["step"] == 0
    monkeypatch.setattr(GPT, "hidden", hidden)
    assert main(flags(data, tmp_path / "run", "--resume auto")) == 0
    assert [line["step"] for line in metrics(tmp_path / "run") if "val_loss" in line] == [0, 3, 6]


def test_last_two_are_kept_and_a_truncated_one_falls_back(data, tmp_path, capsys):
    main(flags(data, tmp_path / "whole"))
    main(flags(data, tmp_path / "run"))
    paths = Checkpoints(tmp_path / "run").paths()
    assert [path.name for path in paths] == ["state_step000006.pt", "state_step000004.pt"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "metrics.jsonl", "state_step000004.pt", "state_step000006.pt", "train.log"]
    os.truncate(paths[0], paths[0].stat().st_size // 2)
    main(flags(data, tmp_path / "run", "--resume auto"))
    assert "warning: state_step000006.pt cannot be read" in capsys.readouterr().err
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")  # step 5 and 6 once
    assert_same(newest(tmp_path / "run"), newest(tmp_path / "whole"))


def test_going_back_to_an_earlier_checkpoint_leaves_the_later_behind(data, tmp_path):
    main(flags(data, tmp_path / "run"))
    main(flags(data, tmp_path / "run", f"--resume {tmp_path}/run/state_step000004.pt --num_iterations 5"))
    assert [path.name for path in Checkpoints(tmp_path / "run").paths()] == ["state_step000005.pt", "state_step000004.pt"]
    assert (tmp_path / "run/state_step000006.pt.abandoned").exists()
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("damage", ("flipped", "other", "text"))
def test_what_is_no_sound_checkpoint_is_not_loaded(data, tmp_path, capsys, damage):
    main(flags(data, tmp_path / "run"))
    path = Checkpoints(tmp_path / "run").paths()[0]
    if damage == "flipped":
        with open(path, "r+b") as file:
            file.seek(path.stat().st_size // 2)
            file.write(b"\xff" * 50)
    elif damage == "other":
        torch.save({"weights": torch.zeros(3)}, path)
    else:
        path.write_text("no archive")
    with pytest.raises(InputError, match="no readable checkpoint"):
        main(flags(data, tmp_path / "run", f"--resume {path}"))
    main(flags(data, tmp_path / "run", "--resume auto"))
    assert "state_step000006.pt cannot be read" in capsys.readouterr().err and newest(tmp_path / "run")["step"] == 6


def test_a_run_killed_before_its_first_step_can_be_resumed(data, tmp_path):
    main(flags(data, tmp_path / "run", "--max_seconds 0.001 --save_every 0"))
    main(flags(data, tmp_path / "run", "--resume auto"))
    assert [line["step"] for line in metrics(tmp_path / "run") if "val_loss" in line] == [0, 3, 6]


def test_the_data_of_a_run_stay_its_own(data, tmp_path, monkeypatch):
    monkeypatch.chdir(data)
    main(flags(data, tmp_path / "run", "--input_bin train_*.bin --input_val_bin val_*.bin --num_iterations 2"))
    monkeypatch.chdir(tmp_path)
    main(["--output_dir", "run", "--resume", "auto", "--num_iterations", "4", "--device", "cpu"])
    assert len(losses(tmp_path / "run")) == 4


def test_checkpoints_hold_plain_names(data, tmp_path):
    main(flags(data, tmp_path / "run", "--num_iterations 1"))
    state = torch.load(tmp_path / "run/state_step000001.pt", weights_only=True)
    assert state["model"].keys() == GPT(GPTConfig(**state["config"])).state_dict().keys()


def test_training_longer_continues(data, tmp_path):
    main(flags(data, tmp_path / "run"))
    main(["--output_dir", str(tmp_path / "run"), "--resume", "auto", "--num_iterations", "8", "--device", "cpu"])
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, 9))


def test_a_full_disk_costs_no_checkpoint(data, tmp_path):
    main(flags(data, tmp_path / "run", "--num_iterations 2"))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limit[1]))  # a write beyond 1 MiB fails as on a full disk
    try:
        with pytest.raises(InputError, match="cannot write state_step000004.pt: .*checkpoints kept: state_step000002.pt"):
            main(flags(data, tmp_path / "run", "--resume auto"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert newest(tmp_path / "run")["step"] == 2 and not list((tmp_path / "run").glob("*.part"))


# -----------------------------------------------------------------------------
# several ranks


@pytest.mark.parametrize("more, tolerance", (("", 1e-5), ("--value_residual 1 --attn_layers 1 --optimizer muon", 1e-3)))
def test_two_ranks_give_one_processs_losses(data, tmp_path, more, tolerance):  # Muon's products are in bf16
    options = f"--num_iterations 10 --grad_accumulation_steps 4 {more}"
    one = run_script(flags(data, tmp_path / "one", options))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(SCRIPT)]
    two = subprocess.run([*launch, *flags(data, tmp_path / "two", options)], capture_output=True, text=True,
                         env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert two.returncode == 0, two.stderr
    assert one.wait() == 0
    one, two = ([line for line in metrics(tmp_path / name)] for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        for key in {"train_loss", "val_loss"} & a.keys():
            assert abs(a[key] - b[key]) <= tolerance * a[key], (a["step"], key)


# -----------------------------------------------------------------------------
# bad input


@pytest.mark.parametrize("more, message", (
    ("--input_bin nothing_*.bin", "--input_bin: no shard matches nothing_"),
    ("--input_val_bin nothing", "--input_val_bin: no shard matches nothing"),
    ("--batch_size 40", r"--input_bin holds 437 tokens, fewer than one micro-batch .* 641 "),
    ("--val_tokens 151", "--val_tokens must be <= 150, .* got 151"),
    ("--attn_layers 7", "--attn_layers must be in 0 ... 1, got 7"),
    ("--afno_num_blocks 5", "--afno_num_blocks must divide the 16 channels, got 5"),
    ("--afno_form dyadic", "--sequence_length must be > 64 to train --afno_form dyadic, .* got 16"),
    ("--model d13", "--model: invalid choice: 'd13'"),
    ("--afno_form reference", "--afno_form reference is not causal, choose one of filter, analytic, hilbert, state, dyadic"),
    ("--mixer mamba", "--mixer: invalid choice: 'mamba'"),
    ("--batch_size 0", "--batch_size: must be an integer >= 1, got 0"),
    ("--learning_rate -1", "--learning_rate: must be a finite number > 0, got -1"),
    ("--attn_layers one", "--attn_layers: must be layer numbers such as 3,9, got one"),
    ("--no_such_flag 1", "unrecognized arguments: --no_such_flag 1"),
    ("--seed 99999999999999999999", "--seed: must be an integer >= 0 and < 9223372036854775808, got 9"),
    ("--qk_norm 2", "--qk_norm: invalid choice: 2"),
    ("--fp8_head 1 --batch_size 1 --sequence_length 9", "--fp8_head: a micro-batch must be of a multiple of 16 tokens, got 9"),
    ("--logit_softcap -1", "--logit_softcap: must be a finite number >= 0, got -1"),
    ("--mixer_scale nan", "--mixer_scale: must be a finite number >= 0, got nan"),
    ("--final_lr_fraction 1", "--final_lr_fraction: must be a finite number >= 0 and < 1, got 1"),
    ("--rest_lr 0", "--rest_lr: must be a finite number > 0, got 0"),
    ("--curriculum 8:0.5,16", "--curriculum: must be length:share,.* sum to 1, got 8:0.5,16"),
    ("--curriculum 8:0.5,16:0.6", "--curriculum: must be .* with integer lengths > 0 and shares .* that sum to 1"),
    ("--curriculum 0:0.5,16:0.5", "--curriculum: must be .* with integer lengths > 0"),
    ("--curriculum 8:0.5,12:0.5", "--curriculum must end with --sequence_length 16, got 12"),
    ("--curriculum 7:0.5,16:0.5", r"--curriculum: lengths must divide the 32 tokens of a micro-batch \(.*\), got 7"),
    ("--curriculum 8:0.5,128:0.5 --afno_form dyadic --sequence_length 128", "--curriculum must be > 64 .*, got 8"),
    ("--momentum 1", "--momentum: must be a finite number >= 0 and < 1, got 1"),
    ("--beta2 -0.1", "--beta2: must be a finite number >= 0 and < 1, got -0.1"),
    ("--resume auto", "--resume: no readable checkpoint"),
    ("--resume nothing.pt", "--resume nothing.pt: no readable checkpoint"),
))
def test_bad_flags_get_one_line(data, tmp_path, more, message):
    with pytest.raises(InputError, match=message) as error:
        main(flags(data, tmp_path / "run", more))
    assert "\n" not in str(error.value) and not Checkpoints(tmp_path / "run").paths()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_asked_for_and_absent(data, tmp_path):
    with pytest.raises(InputError, match="--device cuda: this torch sees no CUDA device"):
        main(flags(data, tmp_path / "run", "--device cuda"))


def test_the_shell_sees_one_line_and_status_2(data, tmp_path):
    run = run_script(flags(data, tmp_path / "run", "--val_tokens 1000"))
    assert run.wait() == 2
    assert run.stderr.read() == "error: --val_tokens must be <= 150, the targets in --input_val_bin, got 1000\n"


@pytest.mark.parametrize("folder", ("file", "file/below"))
def test_an_output_dir_that_cannot_be(data, tmp_path, folder):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--output_dir .*file"):
        main(flags(data, tmp_path / folder))


def test_a_token_beyond_the_vocabulary_is_located(data, tmp_path):
    folder = tmp_path / "data"
    write_shards(folder.mkdir() or folder, {"train": [200], "val": [50]})
    with open(folder / "train_0_000000.bin", "r+b") as file:
        file.seek(1024 + 2 * 70)
        file.write((50257).to_bytes(2, "little"))
    with pytest.raises(InputError, match="train_0_000000.bin, token 70: token 50257, the vocabulary has 50257"):
        main(flags(folder, tmp_path / "run"))
    assert newest(tmp_path / "run")["step"] == 2  # the good steps before it are not lost


def test_a_checkpoint_of_another_config_is_refused(data, tmp_path):
    main(flags(data, tmp_path / "run"))
    for more, difference in (("--attn_layers 0", r"attn_layers is \(1,\) there, the flags say \(0,\)"),
                             ("--optimizer muon", "optimizer is adamw there, the flags say muon")):
        with pytest.raises(InputError, match=f"a checkpoint of another config: .*{difference}"):
            main(flags(data, tmp_path / "run", f"--resume auto {more}"))


def test_heads_of_attention_may_be_others_than_the_model_has(data, tmp_path):
    for more, heads in (("", 2), ("--n_head 4", 4)):
        out = tmp_path / f"heads-{heads}"
        main(flags(data, out, more))
        main(flags(data, out, "--resume auto --num_iterations 7"))  # its own where the flag is left out
        assert newest(out)["config"]["n_head"] == heads and newest(out)["step"] == 7
    assert losses(tmp_path / "heads-2")[1:] != losses(tmp_path / "heads-4")[1:]
    with pytest.raises(InputError, match="--n_head: twice the heads must divide n_embd 16, got 3 heads"):
        main(flags(data, tmp_path / "heads-3", "--n_head 3"))


def test_a_checkpoint_of_another_version_is_one_clear_line(data, tmp_path):
    main(flags(data, tmp_path / "run"))
    path = Checkpoints(tmp_path / "run").paths()[0]
    state = torch.load(path)
    state["model"] = {key.replace("operator", "kernel"): value for key, value in state["model"].items()}
    torch.save(state, path)
    metrics = (tmp_path / "run/metrics.jsonl").read_text()
    for more in (["--resume", "auto", *flags(data, tmp_path / "run")], ["--output_dir", str(tmp_path / "run"), "--eval_only"]):
        with pytest.raises(InputError, match=r"run: the checkpoint does not fit this version's model \(.*operator"):
            main(more)
    assert (tmp_path / "run/metrics.jsonl").read_text() == metrics  # the summary among them
    state["config"]["tied_head"] = 1  # a flag that this version does not have
    torch.save(state, path)
    for more in (["--resume", "auto", *flags(data, tmp_path / "run")], ["--resume", str(path), "--eval_only"]):
        with pytest.raises(InputError, match="is of another version of this trainer, which had tied_head: the run"):
            main(more)
    del state["config"]["tied_head"]
    state["args"] |= dict(batch_schedule=None, cooldown="sqrt")  # flags that are gone, of which one was in use
    torch.save(state, path)
    with pytest.raises(InputError, match="is of another version of this trainer, which had cooldown: the run"):
        main(["--resume", "auto", *flags(data, tmp_path / "run")])
    del state["args"]["cooldown"]
    state["config"] = {**state["config"], "afno_form": "wavelet"}
    torch.save(state, path)
    with pytest.raises(InputError, match=r"\.pt is of another version of this trainer: --afno_form must be one of"):
        main(["--resume", "auto", *flags(data, tmp_path / "run")])
    assert (tmp_path / "run/metrics.jsonl").read_text() == metrics


def test_a_run_is_not_overwritten(data, tmp_path):
    main(flags(data, tmp_path / "run"))
    with pytest.raises(InputError, match="holds a run: add --resume auto, or name another"):
        main(flags(data, tmp_path / "run"))


def test_divergence_names_step_and_place_and_keeps_the_last_good_checkpoint(data, tmp_path):
    main(flags(data, tmp_path / "run"))
    state = newest(tmp_path / "run")
    # the weights of step 7 are finite, but they are what makes the loss of step 8 not a number
    with pytest.raises(Diverged, match=r"step \d+: (loss|gradient norm) (nan|inf), micro-batch at .*train_\d_000000.bin, "
                                       r"token \d+; checkpoints kept: state_step000006.pt"):
        main(flags(data, tmp_path / "run", "--resume auto --num_iterations 12 --learning_rate 1e38 --save_every 1"))
    assert_same(newest(tmp_path / "run")["model"], state["model"])
    assert (tmp_path / "run/state_step000007.pt.abandoned").exists()
    assert "error: step 8" in (tmp_path / "run/train.log").read_text()


def test_out_of_memory_names_the_flag(monkeypatch, capsys):
    def out_of_memory(argv):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")

    with pytest.raises(SystemExit) as status:
        train_gpt2_afno.run(out_of_memory)
    (line,) = capsys.readouterr().err.splitlines()
    assert status.value.code == 2 and "lower --batch_size" in line and "20.00 GiB" in line


def test_a_leaking_model_is_not_trained(data, tmp_path, monkeypatch):
    def looks_ahead(mixer, x, taps, *_):
        return F.pad(causal_conv(x, taps), (0, 0, 0, 1))[:, 1:]

    monkeypatch.setattr(AFNO1D, "forward", looks_ahead)
    with pytest.raises(InputError, match=r"the model leaks, refusing to train: hidden state 0 is the first that changes "
                                         "with the tokens from position 1 on"):
        main(flags(data, tmp_path / "run"))
    assert not losses(tmp_path / "run")


def test_the_causality_check_draws_nothing_from_the_global_generator(data, tmp_path, monkeypatch):
    main(flags(data, tmp_path / "checked"))
    monkeypatch.setattr(train_gpt2_afno, "refuse_leaks", lambda *arguments: None)
    main(flags(data, tmp_path / "unchecked"))
    assert_same(newest(tmp_path / "checked"), newest(tmp_path / "unchecked"))


# -----------------------------------------------------------------------------
# evaluation and generation


def test_eval_only_at_any_length(data, tmp_path, capsys):
    main(flags(data, tmp_path / "run"))
    own = metrics(tmp_path / "run")[-2]["val_loss"]
    capsys.readouterr()
    for T in (16, 5, 100):
        main(["--output_dir", str(tmp_path / "run"), "--eval_only", "--sequence_length", str(T), "--device", "cpu"])
        found = re.search(rf"step:6 sequence_length:{T} val_tokens:150 val_loss:(\d+\.\d+)", capsys.readouterr().out)
        assert T != 16 or abs(float(found[1]) - own) < 1e-4


class Letters:
    """A tokenizer that needs no vocabulary: a token a byte."""

    eot_token = 50256
    encode_ordinary = staticmethod(lambda text: list(text.encode()))
    decode_single_token_bytes = staticmethod(lambda token: bytes([token % 256]))


def test_the_recipe_is_evaluated_and_generated_from_a_checkpoint(data, tmp_path, monkeypatch, capsys):
    main(flags(data, tmp_path / "run", RECIPE))
    own = metrics(tmp_path / "run")[-2]["val_loss"]
    capsys.readouterr()
    main(["--output_dir", str(tmp_path / "run"), "--eval_only", "--device", "cpu"])
    assert abs(float(re.search(r"val_loss:(\d+\.\d+)", capsys.readouterr().out)[1]) - own) < 1e-4
    state = newest(tmp_path / "run")
    model = GPT(GPTConfig(**state["config"]))
    model.load_state_dict(state["model"])
    assert model.config.logit_softcap == 15 and model.config.qk_norm == 1 and model.config.mixer_scale == 1
    tokens = list(b"To be")
    for _ in range(10):  # within sequence_length
        tokens.append(int(model(torch.tensor([tokens]))[0][0, -1].argmax()))
    greedy = generate(monkeypatch, capsys, tmp_path / "run", "--generate", "To be", "--max_new_tokens", "10",
                      "--temperature", "0")
    assert greedy == "To be" + bytes(token % 256 for token in tokens[5:]).decode(errors="replace") + "\n"


def generate(monkeypatch, capsys, folder: Path, *more: str) -> str:
    monkeypatch.setattr(train_gpt2_afno, "gpt2_encoding", Letters)
    capsys.readouterr()
    main(["--output_dir", str(folder), "--device", "cpu", *more])
    return capsys.readouterr().out


def test_generation_is_the_models(data, tmp_path, monkeypatch, capsys):
    main(flags(data, tmp_path / "run"))
    state = newest(tmp_path / "run")
    model = GPT(GPTConfig(**state["config"]))
    model.load_state_dict(state["model"])
    tokens = list(b"To be")
    for _ in range(11):  # up to sequence_length 16; what attention sees beyond it is tests/test_model.py's
        tokens.append(int(model(torch.tensor([tokens]))[0][0, -1].argmax()))
    expected = b"To be" + bytes(token % 256 for token in tokens[5:])
    greedy = generate(monkeypatch, capsys, tmp_path / "run", "--generate", "To be", "--max_new_tokens", "30",
                      "--temperature", "0")
    assert greedy.startswith(expected.decode(errors="replace"))
    one, cold = (generate(monkeypatch, capsys, tmp_path / "run", "--generate", "To be", "--max_new_tokens", "30", *more)
                 for more in (("--top_k", "1"), ("--temperature", "1e-40")))
    assert one == cold == greedy
    a, b, c = (generate(monkeypatch, capsys, tmp_path / "run", "--generate", "", "--seed", seed) for seed in "112")
    assert a == b != c
