"""The trainer as its users run it: flags, logs, checkpoints, signals, ranks, bad input, generation.
"""
import hashlib
import inspect
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import runtime
import test_causality
import train_gpt2_afno
from afno import AFNO1D, causal_conv
from checkpoints import Checkpoints, of_this_version, record_source
from data import text_to_bin
from data.loader import TokenStream, TrainLoader
from data.text_to_bin import InputError, ShardWriter
from runtime import Diverged, Runtime, evaluate, measure_matmul_rate, run
from train_gpt2_afno import DEFAULTS, FLAGS, GPT, PRESETS, GPTConfig

SCRIPT = Path(train_gpt2_afno.__file__)
CPU = torch.device("cpu")
STOPPED = 128 + signal.SIGTERM  # the exit status then
VOCABULARY = 496  # instead of 50257, so that a step takes milliseconds
MATMUL_RATE, BUDGET = measure_matmul_rate, test_causality.budget
# without a recipe: what the table of flags says by default, and AFNO in layer 0
SMALL = "--preset baseline --mixer afno --depth_scale 0 --attn_layers 1 --device cpu " \
    "--dtype float32 --compile 0 --model d4 --batch_size 2 --grad_accumulation_steps 1 " \
    "--sequence_length 16 --num_iterations 6 --val_loss_every 3 --save_every 2 " \
    "--warmup_iters 2 --warmdown_iters 2 --val_batch_size 5"


def write_shards(folder: Path, sizes: dict[str, list[int]], vocabulary: int = VOCABULARY):
    """Write {prefix: tokens of each shard}: a short text, over and over, which can be learned."""
    text = np.random.default_rng(0).integers(0, 50257, 50) % vocabulary
    assert len({*text}) == 50
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
def small(monkeypatch):
    """Let --model d4 be two layers of 16 channels, the vocabulary small, and what takes long short.
    """
    monkeypatch.setitem(train_gpt2_afno.MODELS, "d4", (2, 16))
    fields = train_gpt2_afno.model_fields
    monkeypatch.setattr(train_gpt2_afno, "model_fields",
                        lambda values: fields(values) | dict(vocab_size=VOCABULARY))
    for name in ("measure_matmul_rate", "report_at_end", "report_if_missing"):  # they take long
        monkeypatch.setattr(train_gpt2_afno, name, lambda *_: 1e12)
    # of the cuts at start 2, not all 15: what the check sees is tests/test_gate.py's
    monkeypatch.setattr(test_causality, "budget", lambda *_: 2)


@pytest.fixture
def full_size(small, monkeypatch):
    """Undo `small`."""
    monkeypatch.undo()


def main(argv: list[str], expected: int = 0) -> int:
    """Train in this process; end all tests where a signal came that no test has sent.

    The trainer catches signals, saves and returns. So where `timeout` or a scheduler ended the
    tests while one trained, they used to go on, and that one failed: steps were missing.
    """
    status = train_gpt2_afno.main(argv)
    if status > 128 and status != expected:
        pytest.exit(f"{signal.Signals(status - 128).name} from outside", returncode=status)
    return status


def flags(data: Path, out: Path, more: str = "") -> list[str]:
    return [*SMALL.split(), "--input_bin", f"{data}/train_*.bin",
            "--input_val_bin", f"{data}/val_*.bin", "--output_dir", str(out), *more.split()]


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[tuple]:
    if not (out / "metrics.jsonl").exists():  # the start has failed
        return []
    return [(line["step"], line["train_loss"]) for line in metrics(out) if "train_loss" in line]


def validations(out: Path) -> list[dict]:
    return [line for line in metrics(out) if "val_loss" in line]


def newest(out: Path) -> dict:
    return Checkpoints.load(Checkpoints(out).paths()[0])


def assert_same(a, b, path=""):
    """Compare bit for bit, all the way down; times are the one thing that may differ."""
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
# flags and presets


def values_of(argv: str, saved: dict | None = None, say=lambda text: None):
    """Return (args, config) as main makes them on a CPU."""
    given = train_gpt2_afno.parse_flags(argv.split())
    args = train_gpt2_afno.merge_flags(given, CPU, saved, say)
    return args, train_gpt2_afno.config_of(given, args, saved, Path("run"), False)


def test_defaults_are_the_baselines(full_size):
    assert DEFAULTS | dict(
        model="d12", batch_size=16, grad_accumulation_steps=32, sequence_length=1024,
        num_iterations=4768, val_loss_every=128, save_every=128, optimizer="adamw",
        learning_rate=0.0018, weight_decay=0.1, beta1=0.9, beta2=0.95) == DEFAULTS
    args, config = values_of("--preset baseline")
    assert (config.mixer, config.depth_scale, config.n_head) == ("attn", 1, 12)
    assert (args.warmup_iters, args.warmdown_iters, args.val_fp32) == (256, 1024, 1)


def test_every_field_of_the_recipe_is_off_by_default():
    neutral = dict(
        swiglu=0, qk_norm=0, attn_short_conv=1, attn_gate=0, fp8_head=0, fp8_mlp=0,
        embedding_norm=0, logit_softcap=0.0, embedding_residual=0, final_lr_fraction=0.0,
        rest_lr=None, row_order="stream", residual_bf16=0, half_rotary=0, value_residual=0,
        momentum=0.95, beta1=0.9, beta2=0.95, curriculum=None, depth_scale=0, afno_silu=0)
    config = GPTConfig()
    for name, value in neutral.items():
        assert DEFAULTS[name] == value and getattr(config, name, value) == value, name


def test_the_operators_defaults_are_the_presets():
    """What won is the default of AFNO1D; flags are off by default, as the whole recipe is."""
    for name, parameter in inspect.signature(AFNO1D).parameters.items():
        for preset in ("fineweb", "fineweb-4k", "shakespeare"):
            assert PRESETS[preset].get(f"afno_{name}", parameter.default) == parameter.default


def test_a_block_scales_its_mixer_by_depth_where_the_flag_says_so():
    for argv, scale in (("--preset baseline --n_head 2", 0.5), ("--preset shakespeare", 1.0)):
        model = GPT(values_of(f"{argv} --model d4 --attn_layers 1")[1])
        assert [block.scale for block in model.transformer.h] == [scale] * 2


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_flags_that_the_trainer_takes(name, full_size):
    assert set(PRESETS[name]) <= set(DEFAULTS)
    assert all(FLAGS[flag].kind.accepts(value) for flag, value in PRESETS[name].items())
    args, config = values_of(f"--preset {name}")
    train_gpt2_afno.length_phases(args, config.sequence_length, world=1)
    assert args.warmup_iters + args.warmdown_iters <= args.num_iterations
    script = (train_gpt2_afno.ROOT / "run_afno.sh").read_text(encoding="utf-8")
    assert re.search(rf"^#   {name} ", script, re.MULTILINE)


def test_without_a_preset_the_one_for_this_device_is_said(full_size, monkeypatch, tmp_path):
    said = []
    args, _ = values_of("", say=said.append)
    assert said == ["preset shakespeare, because there is no GPU (--preset chooses)"]
    assert args.optimizer == "muon" and args.input_bin.endswith("data/shakespeare/train_*.bin")
    monkeypatch.setattr(train_gpt2_afno, "ROOT", tmp_path)
    cuda = torch.device("cuda")
    assert train_gpt2_afno.choose_preset({}, cuda, said.append) == PRESETS["shakespeare"]
    assert "FineWeb's shards are not in data/" in said[-1]
    shards = tmp_path / "data/fineweb10B"
    shards.mkdir(parents=True)
    (shards / "fineweb_train_000001.bin").touch()
    assert train_gpt2_afno.choose_preset({}, cuda, said.append) == PRESETS["fineweb"]
    assert said[-1] == "preset fineweb, because a GPU and FineWeb's shards are here " \
        "(--preset chooses)"
    assert train_gpt2_afno.choose_preset({}, CPU, said.append) == PRESETS["shakespeare"]
    assert train_gpt2_afno.choose_preset(dict(preset="baseline"), CPU, None) == PRESETS["baseline"]


def test_the_command_says_its_preset_in_one_line_of_stderr(data, tmp_path, capsys):
    shards = f"--input_bin {data}/train_*.bin --input_val_bin {data}/val_*.bin"
    main(f"{shards} --device cpu --model d4 --attn_layers 1 --sequence_length 16 --batch_size 2 "
         f"--num_iterations 1 --warmdown_iters 0 --output_dir {tmp_path}/run".split())
    printed = capsys.readouterr()
    assert re.findall(".*preset.*", printed.err) == [
        "preset shakespeare, because there is no GPU (--preset chooses)"]
    assert "learning_rate 0.0043" in printed.out  # what differs from --help's defaults


def test_the_control_is_right_with_one_flag(full_size):
    args, config = values_of("--preset fineweb --mixer attn")
    assert [config.mixer_of(layer) for layer in range(config.n_layer)] == ["attn"] * 12
    assert (config.n_head, config.depth_scale, config.attn_layers) == (6, 0, ())
    hybrid_args, hybrid = values_of("--preset fineweb")
    assert hybrid.attn_layers == (5, 10) and hybrid.depth_scale == 0
    differing = {name for name in vars(args) if vars(args)[name] != vars(hybrid_args)[name]}
    assert differing == {"mixer", "to_save"}


def test_flags_win_over_the_checkpoint_over_the_preset_over_defaults(full_size):
    assert values_of("--preset baseline")[0].learning_rate == 0.0018
    args, config = values_of("--preset shakespeare")
    assert args.learning_rate == 0.0043
    saved = dict(args=args.to_save | dict(learning_rate=0.5), config=vars(config))
    args, config = values_of("--preset baseline", saved)
    assert args.learning_rate == 0.5 and config.mixer == "afno"
    assert args.optimizer == "muon"  # the checkpoint's, which was the first preset's
    assert values_of("--learning_rate 0.7", saved)[0].learning_rate == 0.7
    assert values_of("--preset shakespeare --learning_rate 0.7")[0].learning_rate == 0.7
    assert set(args.to_save).isdisjoint(train_gpt2_afno.THIS_COMMAND)


@pytest.mark.parametrize("preset, steps, fall", (
    ("fineweb", 3800, 1900), ("fineweb", 1000, 500), ("shakespeare", 30, 15),
    ("baseline", 4768, 1024), ("baseline", 745, 160)))
def test_a_preset_keeps_its_share_of_falling_steps(full_size, preset, steps, fall):
    command = f"--preset {preset} --num_iterations {steps}"
    args, _ = values_of(command)
    assert args.warmdown_iters == fall
    assert args.to_save["warmdown_iters"] == (None if preset == "baseline" else fall)
    assert values_of(f"{command} --warmdown_iters 7")[0].warmdown_iters == 7
    saved = dict(args=args.to_save, config=vars(values_of(command)[1]))
    longer, _ = values_of(f"--num_iterations {steps + 200}", saved)  # the run's, not the preset's
    assert longer.warmdown_iters == (fall if preset != "baseline" else
                                     round((steps + 200) * 1024 / 4768))
    name = lambda argv: train_gpt2_afno.folder_of_preset(
        train_gpt2_afno.parse_flags(argv.split()), CPU, print).name
    assert (name(f"{command} --warmdown_iters {fall}") == name(command)) == (preset != "baseline")
    assert name(f"{command} --warmdown_iters {fall + 1}") != name(command)  # another run


@pytest.mark.parametrize("more, warned", (
    ("--warmup_iters 2 --warmdown_iters 4", True), ("--warmup_iters 9 --warmdown_iters 0", True),
    ("--warmup_iters 2 --warmdown_iters 4 --final_lr_fraction 1", False),
    ("--warmup_iters 2 --warmdown_iters 2", False)))
def test_a_schedule_that_does_not_fit_is_said(data, tmp_path, more, warned):
    main(flags(data, tmp_path / "run", f"--num_iterations 4 {more}"))
    log = (tmp_path / "run/train.log").read_text()
    assert ("the learning rate does not reach its full value" in log) == warned


def test_a_preset_that_changes_nothing_is_said(full_size):
    command = "--preset shakespeare --learning_rate 0.2 --num_iterations 240"
    args, config = values_of(command)
    saved, said = dict(args=args.to_save, config=vars(config)), []
    values_of(command, saved, said.append)
    values_of("", saved, said.append)
    assert said == []
    values_of("--preset shakespeare --num_iterations 300", saved, said.append)
    values_of("--preset baseline --val_fp32 1", saved, said.append)
    assert said == [
        "--preset shakespeare changes nothing: the checkpoint's flags count, and differ in "
        "learning_rate",
        "--preset baseline changes nothing: the checkpoint's flags count, and differ in mixer, "
        "depth_scale"]


def test_a_target_of_an_old_checkpoint_is_not_kept():
    args, config = values_of(f"{SMALL} --input_bin x --input_val_bin x")
    saved = dict(args=args.to_save | dict(target_val_loss=50.0), config=vars(config))
    assert train_gpt2_afno.merge_flags({}, CPU, saved, print).target_val_loss is None


def test_generate_and_eval_only_exclude_each_other():
    with pytest.raises(InputError, match="--generate and --eval_only: choose one"):
        main(["--generate", "x", "--eval_only"])


@pytest.mark.parametrize("argv, every", ((["--help"], False), (["--help", "all"], True)))
def test_help_shows_the_presets_and_the_flags_that_people_use(capsys, argv, every):
    with pytest.raises(SystemExit) as status:
        main(argv)
    printed = capsys.readouterr().out
    shown = {name for name in re.findall(r"^  --(\w+)", printed, re.MULTILINE)}
    assert status.value.code == 0
    assert all(re.search(rf"^  {preset}: --\w", printed, re.MULTILINE) for preset in PRESETS)
    assert shown - {"help"} == {name for name in DEFAULTS if every or FLAGS[name].common}
    assert every or 25 <= len(shown) <= 38


@pytest.mark.parametrize("flag", FLAGS.values(), ids=FLAGS)
def test_defaults_are_in_the_range_of_their_flag(flag):
    assert flag.default is None or flag.kind.accepts(flag.default)
    if flag.group != "shape" and flag.kind is not train_gpt2_afno.PRESENT and flag.default:
        text = train_gpt2_afno.show(flag.default)  # as --help shows it
        assert train_gpt2_afno.parse_flags([f"--{flag.name}", text]) == {flag.name: flag.default}


OUTSIDE = {"N": ("-1", "1.5", "nan", str(10**20)), "X": ("-1", "nan", "inf", "x"), "L,L": ("one",),
           "T:SHARE,...": ("8:0.5", "0:1", "8:1:1", "8"), "NAME": ("",)}


@pytest.mark.parametrize("flag", [flag for flag in FLAGS.values() if flag.group != "shape" and
                                  flag.kind not in (train_gpt2_afno.TEXT, train_gpt2_afno.PRESENT)],
                         ids=lambda flag: flag.name)
def test_a_value_outside_its_range_is_one_line_and_status_2(monkeypatch, capsys, flag):
    for text in OUTSIDE.get(flag.kind.metavar, ("nonsense", "2.5")):
        monkeypatch.setattr(sys, "argv", ["train_gpt2_afno.py", f"--{flag.name}", text])
        with pytest.raises(SystemExit) as status:
            run(main)
        (line,) = capsys.readouterr().err.splitlines()
        assert status.value.code == 2
        assert line == f"error: --{flag.name}: must be {flag.kind.words}, got {text}"


def test_a_new_flag_is_one_line_of_the_table():
    """GPTConfig, ranges, help and checkpoints come from FLAGS: none of them is listed twice."""
    source = SCRIPT.read_text()
    for name in ("half_rotary", "attn_gate", "residual_bf16"):
        assert source.count(f'"{name}"') == 1


# -----------------------------------------------------------------------------
# the baseline, written down a second time


def nocap_rate(it: int, lr=0.0018, num_iterations=4768, warmup=256, warmdown=1024) -> float:
    if it < warmup:
        return lr * (it + 1) / warmup
    if it < num_iterations - warmdown:
        return lr
    return lr * (num_iterations - it) / warmdown


def test_the_baselines_learning_rate_is_nocap_tests_in_all_steps(full_size):
    args, _ = values_of("--preset baseline")
    assert args.num_iterations == 4768 and args.final_lr_fraction == 0
    for it in range(4769):
        ours = args.learning_rate * train_gpt2_afno.learning_rate_factor(
            it, args.num_iterations, args.warmup_iters, args.warmdown_iters,
            args.final_lr_fraction)
        assert ours == pytest.approx(nocap_rate(it), rel=1e-14, abs=1e-20), it


class NoCap(nn.Module):
    """NoCap-Test's model; its layers are made in its order, with nn.Linear's own start."""

    def __init__(self, vocab_size: int, n_layer: int, n_head: int, C: int):
        super().__init__()
        self.n_head = n_head
        self.wte = nn.Embedding(vocab_size, C)
        self.blocks = nn.ModuleList(nn.ModuleList((
            nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False),
            nn.Linear(C, 4 * C, bias=False), nn.Linear(4 * C, C, bias=False)))
            for _ in range(n_layer))
        self.lm_head = nn.Linear(C, vocab_size, bias=False)
        self.wte.weight = self.lm_head.weight

    @staticmethod
    def norm(x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    def attend(self, x, c_attn, c_proj):
        B, T, C = x.shape
        d = C // self.n_head
        angle = torch.outer(torch.arange(T).float(),
                            1 / 10000 ** (torch.arange(0, d, 2).float() / d))
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]

        def rotary(z):
            z1, z2 = z[..., : d // 2], z[..., d // 2 :]
            return torch.cat((z1 * cos + z2 * sin, -z1 * sin + z2 * cos), -1)

        q, k, v = (part.view(B, T, self.n_head, d) for part in c_attn(x).split(C, dim=2))
        scores = torch.einsum("bthd,bshd->bhts", rotary(q), rotary(k)) / math.sqrt(d)
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
        y = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)
        return c_proj(y.reshape(B, T, C))

    def forward(self, idx, targets):
        x = self.wte(idx)
        for c_attn, c_proj, c_fc, mlp_c_proj in self.blocks:
            y = self.attend(self.norm(x), c_attn, c_proj)
            x = x + y / math.sqrt(2 * len(self.blocks))
            x = x + mlp_c_proj(F.gelu(c_fc(self.norm(x))))
        return F.cross_entropy(self.lm_head(self.norm(x)).flatten(0, 1), targets.flatten())


def test_the_baseline_begins_with_nocap_tests_bits(monkeypatch):
    monkeypatch.setitem(train_gpt2_afno.MODELS, "d4", (3, 32))
    args, config = values_of("--preset baseline --model d4 --n_head 2")
    torch.manual_seed(args.seed)
    model = GPT(config)
    torch.manual_seed(args.seed)
    other = NoCap(VOCABULARY, 3, 2, 32)
    ours, theirs = list(model.parameters()), list(other.parameters())
    assert len(ours) == len(theirs) == 1 + 4 * 3
    assert model.transformer.wte.weight is model.lm_head.weight
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


@pytest.mark.slow
def test_40_steps_of_the_baseline_are_nocap_tests(data, tmp_path, monkeypatch):
    monkeypatch.setitem(train_gpt2_afno.MODELS, "d4", (3, 32))
    main(f"--preset baseline --model d4 --n_head 2 --device cpu --dtype float32 --compile 0 "
         f"--batch_size 2 --grad_accumulation_steps 2 --sequence_length 16 --num_iterations 40 "
         f"--warmup_iters 4 --warmdown_iters 10 --val_loss_every 0 --save_every 0 "
         f"--input_bin {data}/train_*.bin --input_val_bin {data}/val_*.bin "
         f"--output_dir {tmp_path}/run".split())
    torch.manual_seed(1337)
    model, expected = NoCap(VOCABULARY, 3, 2, 32), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0018, betas=(0.9, 0.95),
                                  weight_decay=0.1, fused=True)
    shards = [np.fromfile(path, "<u2")[512:] for path in sorted(data.glob("train_*.bin"))]
    tokens = torch.from_numpy(np.resize(np.concatenate(shards), 40 * 64 + 1).astype(np.int64))
    for it in range(40):
        total = 0.0
        for begin in (64 * it, 64 * it + 32):
            x, y = (tokens[begin + i : begin + i + 32].view(2, 16) for i in range(2))
            loss = model(x, y) / 2
            loss.backward()
            total += loss.item()
        for group in optimizer.param_groups:
            group["lr"] = nocap_rate(it, num_iterations=40, warmup=4, warmdown=10)
        optimizer.step()
        optimizer.zero_grad()
        expected.append((it + 1, pytest.approx(total, abs=1e-5)))
    assert losses(tmp_path / "run") == expected
    assert expected[-1][1].expected < expected[0][1].expected - 1


@pytest.mark.slow
def test_without_a_recipe_the_baseline_is_what_it_was_before_there_was_one(full_size, tmp_path,
                                                                          monkeypatch):
    monkeypatch.setitem(train_gpt2_afno.MODELS, "d4", (2, 16))
    write_shards(tmp_path, {"train": [100, 37, 300], "val": [151]}, vocabulary=50257)
    main(flags(tmp_path, tmp_path / "run", "--num_iterations 5 --mixer attn --depth_scale 1 "
               "--n_head 2"))
    before = (10.878825188, 10.858886719, 10.798175812, 10.588490486, 10.594739914)
    assert [loss for _, loss in losses(tmp_path / "run")] == pytest.approx(before, rel=1e-5)
    log = (tmp_path / "run/train.log").read_text()
    changed = re.search("^flags that differ from --help's defaults: (.*)$", log, re.MULTILINE)[1]
    assert "depth_scale 1, " in changed and "mixer attn, " in changed
    assert "swiglu" not in changed and "optimizer" not in changed


# -----------------------------------------------------------------------------
# a run and its logs


@pytest.mark.slow
def test_a_run_learns_and_logs(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt2_afno, "measure_matmul_rate", MATMUL_RATE)
    assert main(flags(data, tmp_path / "run", "--num_iterations 40 --learning_rate 0.01")) == 0
    lines = metrics(tmp_path / "run")
    steps = [line for line in lines if "train_loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 41))
    for line in steps:
        assert set(line) == {"step", "tokens", "train_loss", "lr", "grad_norm", "tokens_per_s",
                             "mfu", "train_time_s", "peak_memory_bytes"}
        assert line["tokens"] == 32 * line["step"]
        assert line["tokens_per_s"] > 0 and 0 < line["mfu"] < 1
    assert steps[0]["lr"] == 0.005 and steps[1]["lr"] == steps[30]["lr"] == 0.01
    assert steps[-1]["lr"] == 0.005
    found = validations(tmp_path / "run")
    assert [line["step"] for line in found] == [*range(3, 40, 3), 40]
    assert 6 < steps[0]["train_loss"] < 7 and found[-1]["val_loss"] < 3
    assert lines[-1]["wall_clock_time_to_target_loss"] is None and lines[-1]["tokens_per_s"] > 0
    log = (tmp_path / "run/train.log").read_text()
    for said in ("commit: ", "command: ", f"torch {torch.__version__}", "mixers afno attn",
                 "optimizer adamw", "peak_memory_usage"):
        assert said in log
    for name in ("train_gpt2_afno.py", "afno.py", "checkpoints.py", "runtime.py",
                 "kernels/convolution.py", "data/loader.py"):
        digest = hashlib.sha256((SCRIPT.parent / name).read_bytes()).hexdigest()
        assert f"sha256: {digest} {name}\n" in log


def test_paths_in_the_log_are_relative_to_the_repository(data, tmp_path, monkeypatch):
    argv = [str(SCRIPT), "--output_dir", str(SCRIPT.parent / "runs/x")]
    monkeypatch.setattr(sys, "argv", argv)
    main(flags(data, tmp_path / "run", "--num_iterations 1 --val_tokens 1"))
    log = (tmp_path / "run/train.log").read_text()
    assert "command: train_gpt2_afno.py --output_dir runs/x\n" in log


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Take a repository of two sources and a text, committed, for the trainer's own."""
    root = tmp_path / "tree"
    for name in ("trainer.py", "kernels/state.py", "README.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("old\n")
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr("checkpoints.ROOT", root)
    return root


def head_of(root: Path) -> str:
    return subprocess.check_output(["git", "-C", str(root), "rev-parse", "HEAD"], text=True).strip()


def digests(*texts: str) -> list[str]:
    names = ("trainer.py", "kernels/state.py")
    return [f"sha256: {hashlib.sha256(text.encode()).hexdigest()} {name}"
            for text, name in zip(texts, names)]


def test_a_committed_source_is_named_by_its_commit(tree, tmp_path):
    (tree / "README.md").write_text("new\n")  # is no source
    lines = record_source(tmp_path / "run")
    assert lines == [f"commit: {head_of(tree)}", *digests("old\n", "old\n")]
    assert not (tmp_path / "run").exists()


def test_a_changed_source_is_a_commit_and_a_diff(tree, tmp_path):
    (tmp_path / "run").mkdir()
    (tree / "trainer.py").write_text("new\n")
    lines = record_source(tmp_path / "run")
    (path,) = (tmp_path / "run/source").iterdir()
    name = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    assert path.name == f"{name}.diff"
    assert lines == [f"commit: {head_of(tree)} and source/{name}.diff", *digests("new\n", "old\n")]
    subprocess.run(["git", "-C", str(tree), "apply", "-R", str(path)], check=True)
    assert (tree / "trainer.py").read_text() == "old\n"


def test_a_source_that_git_does_not_know_is_kept(tree, tmp_path):
    (tree / "kernels/new.py").write_text("a kernel\n")
    lines = record_source(tmp_path / "run")
    assert lines[0] == f"commit: {head_of(tree)} and source/"
    assert [path.name for path in (tmp_path / "run/source").rglob("*.py")] == ["new.py"]
    assert (tmp_path / "run/source/kernels/new.py").read_text() == "a kernel\n"


def test_a_source_in_a_folder_that_a_fork_added_counts(tree, tmp_path, monkeypatch):
    digest = lambda: runtime.source_digest(runtime.source_files(tree))
    before = digest()
    for place, counts in (("mixers", True), ("tests", False), ("experiments", False),
                          (".venv/lib/site-packages/x", False), ("venv/site-packages", False)):
        file = tree / place / "ema.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("an average\n")
        assert digest() == before  # not imported
        monkeypatch.setitem(sys.modules, "ema", types.SimpleNamespace(__file__=str(file)))
        assert (digest() != before) == counts
        named = [line.split()[-1] for line in record_source(tmp_path / place)[1:]]
        assert ("mixers/ema.py" in named) == counts
        monkeypatch.delitem(sys.modules, "ema")


@pytest.mark.parametrize("missing", ("repository", "program"))
def test_without_git_the_source_is_kept(tree, tmp_path, monkeypatch, missing):
    if missing == "repository":
        shutil.rmtree(tree / ".git")
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
    lines = record_source(tmp_path / "run")
    assert lines == ["commit: none (no git here): the source is in source/",
                     *digests("old\n", "old\n")]
    for name in ("trainer.py", "kernels/state.py"):
        assert (tmp_path / "run/source" / name).read_text() == "old\n"
    assert not (tmp_path / "run/source/README.md").exists()


@pytest.mark.slow
def test_recomputing_trains_the_same(data, tmp_path):
    for name, more in (("kept", ""), ("again", "--recompute 1")):
        assert main(flags(data, tmp_path / name, more)) == 0
    kept, again = (dict(losses(tmp_path / name)) for name in ("kept", "again"))
    assert again == pytest.approx(kept, rel=1e-5)


@pytest.mark.parametrize("val_tokens", (1, 32, 33, 150))
def test_validation_counts_every_token(data, val_tokens):
    torch.manual_seed(0)
    shape = dict(vocab_size=VOCABULARY, n_layer=1, n_head=1, n_embd=8, sequence_length=16)
    model = GPT(GPTConfig(**shape)).double()
    stream = TokenStream(f"{data}/val_*.bin", VOCABULARY, "input_val_bin")
    runtime = Runtime(CPU, torch.float32, compile=False)
    got = evaluate(model, stream, val_tokens, 2, 16, runtime)
    assert got.shape == (16,) and not got[val_tokens:].any()
    tokens = stream.read(0, 151)
    each = []
    for begin in range(0, val_tokens, 16):  # windows of 16, the last one shorter
        end = min(begin + 16, val_tokens)
        logits = model(tokens[None, begin:end])[0][0]
        each += F.cross_entropy(logits, tokens[begin + 1 : end + 1], reduction="none").tolist()
    assert len(each) == val_tokens and abs(got.sum() / val_tokens - np.mean(each)) < 1e-12


@pytest.mark.slow
def test_warmup_and_warmdown_default_to_the_baselines_shares(data, tmp_path):
    argv = flags(data, tmp_path / "run", "--num_iterations 40")
    for name in ("--warmup_iters", "--warmdown_iters"):
        del argv[argv.index(name) : argv.index(name) + 2]
    main(argv)
    rates = [line["lr"] / 0.0018 for line in metrics(tmp_path / "run") if "train_loss" in line]
    # 256/4768 and 1024/4768 of 40
    assert np.allclose(rates, [0.5] + [1] * 31 + [(9 - i) / 9 for i in range(1, 9)])


@pytest.mark.parametrize("available, wanted, expected", (
    (151, None, 150), (2_000_000, None, 1_048_576), (2_000_000, 7, 7), (151, 150, 150)))
def test_validation_takes_the_first_1048576_targets_or_all(available, wanted, expected):
    class Stream:
        read = staticmethod(lambda begin, count: None)
        __len__ = lambda self: available

    assert train_gpt2_afno.count_val_tokens(wanted, Stream()) == expected


@pytest.fixture
def optimizers(monkeypatch):
    """The optimizers of all runs, in a list that grows."""
    made, make = [], train_gpt2_afno.make_optimizers
    monkeypatch.setattr(train_gpt2_afno, "make_optimizers",
                        lambda *given: made.append(make(*given)) or made[-1])
    return made


def of_groups(optimizer, name: str) -> list:
    return [group[name] for group in optimizer.param_groups]


def test_schedule_clip_and_decay_reach_every_optimizer(data, tmp_path, optimizers):
    main(flags(data, tmp_path / "run", "--optimizer muon --num_iterations 4 --save_every 1"))
    adamw, muon = optimizers[-1]
    for optimizer in optimizers[-1]:  # the last update of a warmdown of two
        assert of_groups(optimizer, "lr") == [0.0018 / 2]
    assert of_groups(adamw, "betas") == [(0.9, 0.95)] and of_groups(muon, "momentum") == [0.95]
    main(flags(data, tmp_path / "run", "--optimizer muon --resume auto --num_iterations 8 "
               "--weight_decay 0.3 --momentum 0.8 --beta1 0.7 --beta2 0.98"))
    adamw, muon = optimizers[-1]  # the flags', not the checkpoint's
    for optimizer in optimizers[-1]:
        assert of_groups(optimizer, "weight_decay") == [0.3]
    assert of_groups(adamw, "betas") == [(0.7, 0.98)] and of_groups(muon, "momentum") == [0.8]


def test_mfu_counts_6_flops_a_parameter():
    shape = dict(vocab_size=97, n_layer=2, n_head=2, n_embd=16, mixer="attn", afno_filter_length=8)
    count = train_gpt2_afno.flops_per_token(GPT(GPTConfig(**shape)), 100)
    assert count == 6 * (97 * 16 + 2 * 12 * 16**2) + 6 * 2 * 16 * 100


@pytest.mark.slow
def test_accumulation_is_a_larger_batch(data, tmp_path):
    main(flags(data, tmp_path / "large", "--batch_size 4"))
    main(flags(data, tmp_path / "small", "--batch_size 1 --grad_accumulation_steps 4"))
    for (_, a), (_, b) in zip(losses(tmp_path / "large"), losses(tmp_path / "small"), strict=True):
        assert abs(a - b) < 1e-5 * b


def test_target_loss_stops_and_is_reported(data, tmp_path, capsys):
    options = "--num_iterations 60 --learning_rate 0.01 --target_val_loss 4"
    main(flags(data, tmp_path / "run", options))
    last = metrics(tmp_path / "run")[-1]
    main(flags(data, tmp_path / "run", f"{options} --resume auto"))
    assert metrics(tmp_path / "run")[-1]["step"] == last["step"]  # it stays reached
    assert last["step"] < 60
    assert last["wall_clock_time_to_target_loss"] == last["train_time_s"] > 0
    said = capsys.readouterr().out + (tmp_path / "run/train.log").read_text()
    assert re.search(r"wall_clock_time_to_target_loss: \d", said)


def test_max_seconds_saves_and_stops(data, tmp_path):
    main(flags(data, tmp_path / "run", "--max_seconds 0.001"))
    assert newest(tmp_path / "run")["step"] == 0
    main(flags(data, tmp_path / "run", "--resume auto"))
    assert newest(tmp_path / "run")["step"] == 6


# -----------------------------------------------------------------------------
# the recipe's schedules

RECIPE = "--swiglu 1 --qk_norm 1 --attn_short_conv 4 --attn_gate 1 --fp8_head 1 --fp8_mlp 1 " \
    "--embedding_norm 1 --logit_softcap 15 --embedding_residual 1 --depth_scale 0 " \
    "--final_lr_fraction 0.1 --rest_lr 0.003 --row_order spread --residual_bf16 1 " \
    "--half_rotary 1 --value_residual 1 --momentum 0.9 --beta1 0.7 --beta2 0.98"
PHASES = "--num_iterations 10 --grad_accumulation_steps 2 --curriculum 4:0.3,8:0.3,16:0.4"


def recorded(monkeypatch, stop_at: int | None = None) -> list:
    """Return the batches (x, y) that are trained on from now on, in a list that grows.

    The run is asked to stop in micro-batch stop_at.
    """
    batches, forward = [], GPT.forward

    def recording(self, idx, targets=None, return_logits=True, shares=None):
        if "loss" not in vars(self.lm_head):  # else the causality check calls
            batches.append((idx, targets))
        if len(batches) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, idx, targets, return_logits, shares)

    monkeypatch.setattr(GPT, "forward", recording)
    return batches


def test_a_curriculum_reads_every_token_once_and_in_order(data, tmp_path, monkeypatch):
    batches = recorded(monkeypatch)
    main(flags(data, tmp_path / "run", PHASES))
    lengths = [4] * 3 + [8] * 3 + [16] * 4
    assert [x.shape for x, _ in batches] == [(32 // T, T) for T in lengths for _ in range(2)]
    x, y = (torch.cat([batch[part].flatten() for batch in batches]) for part in range(2))
    stream = TokenStream(f"{data}/train_*.bin", VOCABULARY, "input_bin")
    assert torch.equal(x, stream.read(0, 640)) and torch.equal(y, stream.read(1, 640))
    lines = [line for line in metrics(tmp_path / "run") if "train_loss" in line]
    assert [line["tokens"] for line in lines] == list(range(64, 641, 64))
    assert [line["sequence_length"] for line in lines] == lengths
    at = [line["tokens"] for line in validations(tmp_path / "run")]
    assert at == [192, 384, 576, 640]
    assert newest(tmp_path / "run")["position"] == 640
    assert "1.46 passes to come" in (tmp_path / "run/train.log").read_text()


@pytest.mark.slow
def test_a_run_stopped_between_phases_and_resumed_equals_uninterrupted(data, tmp_path,
                                                                       monkeypatch):
    options = f"{RECIPE} {PHASES} --optimizer muon --attn_layers 0,1"
    main(flags(data, tmp_path / "whole", options))
    with monkeypatch.context() as patch:
        recorded(patch, stop_at=11)  # the 6th step, the last one of length 8
        assert main(flags(data, tmp_path / "run", options), STOPPED) == STOPPED
    stopped = newest(tmp_path / "run")
    assert stopped["step"] in (5, 6) and stopped["position"] == 64 * stopped["step"]
    batches = recorded(monkeypatch)
    main(["--output_dir", str(tmp_path / "run"), "--resume", "auto", "--device", "cpu"])
    assert batches[0][0].size(1) == (8 if stopped["step"] == 5 else 16)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert_same(newest(tmp_path / "run"), newest(tmp_path / "whole"))


@pytest.mark.parametrize("head, mlp", ((0, 1), (1, 0), (1, 1)))
def test_fp8_is_where_it_was_asked_for(data, tmp_path, monkeypatch, head, mlp):
    """Take a CPU for a GPU with fp8, whose products are emulated."""
    models, make = [], train_gpt2_afno.make_optimizers
    monkeypatch.setattr(train_gpt2_afno, "make_optimizers",
                        lambda *given: models.append(given[0]) or make(*given))
    monkeypatch.setattr(train_gpt2_afno, "usable", lambda *_: (True, "tried"))
    options = f"--fp8_head {head} --fp8_mlp {mlp} --num_iterations 2"
    main(flags(data, tmp_path / "run", options))
    assert models[-1].lm_head.fp8 == head
    assert all(block.mlp.fp8 == mlp for block in models[-1].transformer.h)
    named = " and of ".join(["the head"] * head + ["the MLPs' first layers"] * mlp)
    assert f"products of {named}: tried\n" in (tmp_path / "run/train.log").read_text()


def test_learning_rates_follow_one_schedule(data, tmp_path, optimizers):
    main(flags(data, tmp_path / "run", f"{RECIPE} --optimizer muon --num_iterations 4"))
    factor = 0.1 + 0.9 * 0.5  # the last update of a warmdown of two
    adamw, muon = (of_groups(optimizer, "lr") for optimizer in optimizers[-1])
    assert adamw == pytest.approx([factor * lr for lr in (0.0018, 0.003, 0.003)])
    assert muon == [factor * 0.0018]
    logged = [line["lr"] for line in metrics(tmp_path / "run") if "train_loss" in line]
    assert logged[-1] == factor * 0.0018
    main(flags(data, tmp_path / "run", "--resume auto --num_iterations 6 --rest_lr 0.02"))
    resumed = of_groups(optimizers[-1][0], "lr")  # the flag's, not the checkpoint's
    assert resumed == pytest.approx([factor * lr for lr in (0.0018, 0.02, 0.02)])


def test_a_learning_rate_of_the_rest_is_not_for_half_a_run(data, tmp_path):
    main(flags(data, tmp_path / "run", "--num_iterations 1"))
    with pytest.raises(InputError, match="--rest_lr makes groups .*, or never"):
        main(flags(data, tmp_path / "run", "--resume auto --rest_lr 0.01"))


def test_every_phase_is_checked_before_the_first_step(data, tmp_path, monkeypatch):
    def leaks_at_8(self, z, h, added=None, rotary=None, taps=None):  # behind weights that are zero
        return h + self.operator.taps.mlp.b2.sum() * h.roll(-1, 1) if h.size(1) == 8 else h

    monkeypatch.setattr(test_causality, "budget", BUDGET)
    monkeypatch.setattr(AFNO1D, "mix", leaks_at_8)
    with pytest.raises(InputError, match="the model leaks, refusing to go on"):
        main(flags(data, tmp_path / "run", PHASES))
    assert not losses(tmp_path / "run")


# -----------------------------------------------------------------------------
# data


def test_stream_crosses_shard_borders_and_begins_again(data):
    stream = TokenStream(f"{data}/train_*.bin", VOCABULARY, "input_bin")
    shards = [text_to_bin.read_bin(path) for path in sorted(data.glob("train_*.bin"))]
    tokens = np.concatenate(shards).astype(np.int64)
    assert len(stream) == len(tokens) == 437
    twice = torch.from_numpy(np.concatenate((tokens, tokens)))
    for begin, count in ((0, 437), (99, 2), (90, 60), (430, 20), (436, 1)):
        assert torch.equal(stream.read(begin, count), twice[begin : begin + count])
    assert stream.where(137).endswith("train_2_000000.bin, token 0")


@pytest.mark.parametrize("order", ("stream", "spread"))
def test_ranks_share_out_what_one_process_reads(data, order):
    stream = TokenStream(f"{data}/train_*.bin", VOCABULARY, "input_bin")
    alone = TrainLoader(stream, 2, 8, 0, 0, 1, CPU, order)
    ranks = [TrainLoader(stream, 2, 8, 0, rank, 2, CPU, order) for rank in range(2)]
    for _ in range(20):
        for loader in ranks:
            (x, y), (x_rank, y_rank) = alone.next(), loader.next()
            assert torch.equal(x, x_rank) and torch.equal(y, y_rank)
            assert torch.equal(x[:, 1:], y[:, :-1])
            assert (order == "spread") != torch.equal(x.flatten()[1:], y.flatten()[:-1])
    resumed = TrainLoader(stream, 2, 8, alone.position, 0, 1, CPU, order)
    assert torch.equal(torch.stack(resumed.next()), torch.stack(alone.next()))


@pytest.mark.parametrize("T", (1, 4, 7, 20))
def test_rows_spread_over_the_stream_meet_each_row_once_a_pass(data, T):
    stream = TokenStream(f"{data}/train_*.bin", VOCABULARY, "input_bin")
    loader = TrainLoader(stream, 1, T, 0, 0, 1, CPU, "spread")
    rows = 436 // T  # whole ones, with a target for each last token
    passes = [[loader.start(row) for row in range(n * rows, (n + 1) * rows)] for n in range(2)]
    assert sorted(passes[0]) == list(range(0, rows * T, T)) and passes[0] == passes[1]
    for row in range(rows):
        x, y = loader.next()
        assert torch.equal(x[0], stream.read(passes[0][row], T))
        assert torch.equal(y[0], stream.read(passes[0][row] + 1, T))


def test_rows_of_a_batch_are_far_apart_where_they_are_spread():
    class Stream:  # as long as FineWeb's 2.5B tokens, and read by nobody here
        def __len__(self):
            return 2_500_000_000

        def read(self, position, count):
            return torch.zeros(count)

    loader = TrainLoader(Stream(), 64, 1024, 0, 0, 1, CPU, "spread")
    whole = (len(Stream()) - 1) // 1024 * 1024  # the tokens of whole rows
    for first in (0, 12_345 * 64):
        starts = sorted(loader.start(row) for row in range(first, first + 64))
        apart = [b - a for a, b in zip(starts, starts[1:] + [starts[0] + whole])]
        # the closest two have a fifth of the mean distance at least
        assert min(apart) > 0.2 * len(loader.stream) / 64


# -----------------------------------------------------------------------------
# checkpoints, signals


@pytest.fixture(scope="session")
def script(tmp_path_factory) -> Path:
    """The trainer of `small`, which with KILL_AT kills itself when that step is logged."""
    path = tmp_path_factory.mktemp("script") / "small.py"
    path.write_text(f"""
import os, signal, sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import train_gpt2_afno as trainer
from checkpoints import RunLog
from runtime import run

trainer.MODELS["d4"] = (2, 16)
fields, metric = trainer.model_fields, RunLog.metric

def log(self, **values):
    metric(self, **values)
    if values["step"] == int(os.environ.get("KILL_AT", -1)) and "train_loss" in values:
        os.kill(os.getpid(), signal.SIGKILL)

trainer.model_fields = lambda values: fields(values) | dict(vocab_size={VOCABULARY})
RunLog.metric = log
trainer.report_at_end = lambda run: None
run(trainer.main)
""")
    return path


def run_script(path: Path, arguments: list[str], **variables) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(path), *arguments], stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True, env={**os.environ, **variables})


def wait_for_step(out: Path, step: int, run: subprocess.Popen):
    """Wait until a step is logged; fail where the run ends before."""
    path = out / "metrics.jsonl"
    while not path.exists() or f'"step": {step},' not in path.read_text():
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", (
    "--optimizer adamw", "--optimizer muon --pair_rows 40 --value_tables 1 --predict_ahead 1 "
    "--predict_prefix 1"))
def test_killed_and_resumed_equals_uninterrupted(data, tmp_path, script, recipe):
    options = f"{recipe} --num_iterations 12 --save_every 3"
    killed = run_script(script, flags(data, tmp_path / "killed", options), KILL_AT="7")
    main(flags(data, tmp_path / "whole", options))  # meanwhile
    assert killed.wait() == -signal.SIGKILL, killed.stderr.read()
    assert main(flags(data, tmp_path / "killed", options + " --resume auto")) == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert [line["step"] for line in validations(tmp_path / "killed")] == [3, 6, 9, 12]
    a, b = newest(tmp_path / "killed"), newest(tmp_path / "whole")
    assert a["step"] == 12 and a["position"] == 12 * 32
    assert_same(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("signum", (signal.SIGINT, signal.SIGTERM))
def test_signals_save_then_exit(data, tmp_path, script, signum):
    options = "--num_iterations 1000000 --save_every 0 --val_loss_every 0"
    run = run_script(script, flags(data, tmp_path / "run", options))
    wait_for_step(tmp_path / "run", 3, run)
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
    monkeypatch.setattr(train_gpt2_afno, "refuse_leaks", lambda *given, **more: None)
    assert main(flags(data, tmp_path / "run"), STOPPED) == STOPPED
    assert len(calls) == 1 and newest(tmp_path / "run")["step"] == 3
    monkeypatch.setattr(GPT, "hidden", hidden)
    assert main(flags(data, tmp_path / "run", "--resume auto")) == 0
    assert [line["step"] for line in validations(tmp_path / "run")] == [3, 6]


def test_a_signal_from_outside_ends_the_tests(data, tmp_path, monkeypatch):
    recorded(monkeypatch, stop_at=1)
    with pytest.raises(pytest.exit.Exception, match="SIGTERM from outside"):
        main(flags(data, tmp_path / "run"))


@pytest.mark.slow
def test_last_two_are_kept_and_a_truncated_one_falls_back(data, tmp_path, capsys):
    main(flags(data, tmp_path / "whole"))
    main(flags(data, tmp_path / "run"))
    paths = Checkpoints(tmp_path / "run").paths()
    assert [path.name for path in paths] == ["state_step000006.pt", "state_step000004.pt"]
    # source is there where the repository has changes
    assert sorted({path.name for path in (tmp_path / "run").iterdir()} - {"source"}) == [
        "metrics.jsonl", "state_step000004.pt", "state_step000006.pt", "train.log"]
    os.truncate(paths[0], paths[0].stat().st_size // 2)
    main(flags(data, tmp_path / "run", "--resume auto"))
    assert "warning: state_step000006.pt cannot be read" in capsys.readouterr().err
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")  # step 5 and 6 once
    assert_same(newest(tmp_path / "run"), newest(tmp_path / "whole"))


def test_going_back_to_an_earlier_checkpoint_leaves_the_later_behind(data, tmp_path):
    main(flags(data, tmp_path / "run"))
    main(flags(data, tmp_path / "run",
               f"--resume {tmp_path}/run/state_step000004.pt --num_iterations 5"))
    names = [path.name for path in Checkpoints(tmp_path / "run").paths()]
    assert names == ["state_step000005.pt", "state_step000004.pt"]
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
    assert "state_step000006.pt cannot be read" in capsys.readouterr().err
    assert newest(tmp_path / "run")["step"] == 6


def test_a_run_killed_before_its_first_step_can_be_resumed(data, tmp_path):
    main(flags(data, tmp_path / "run", "--max_seconds 0.001 --save_every 0"))
    main(flags(data, tmp_path / "run", "--resume auto"))
    assert [line["step"] for line in validations(tmp_path / "run")] == [3, 6]


def test_the_data_of_a_run_stay_its_own(data, tmp_path, monkeypatch):
    monkeypatch.chdir(data)
    main(flags(data, tmp_path / "run",
               "--input_bin train_*.bin --input_val_bin val_*.bin --num_iterations 2"))
    monkeypatch.chdir(tmp_path)
    main("--output_dir run --resume auto --num_iterations 4 --device cpu".split())
    assert len(losses(tmp_path / "run")) == 4


def test_checkpoints_hold_plain_names(data, tmp_path):
    main(flags(data, tmp_path / "run", "--num_iterations 1"))
    state = torch.load(tmp_path / "run/state_step000001.pt", weights_only=True)
    assert state["model"].keys() == GPT(GPTConfig(**state["config"])).state_dict().keys()


def test_training_longer_continues(data, tmp_path):
    main(flags(data, tmp_path / "run"))
    main(["--output_dir", str(tmp_path / "run"), "--resume", "auto", "--num_iterations", "8",
          "--device", "cpu"])
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, 9))


def test_a_full_disk_costs_no_checkpoint(data, tmp_path, monkeypatch):
    # without git it is more than the limit
    monkeypatch.setattr("checkpoints.record_source", lambda folder: [])
    main(flags(data, tmp_path / "run", "--num_iterations 2"))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    # a write beyond 64 KiB fails as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limit[1]))
    try:
        with pytest.raises(InputError, match="cannot write state_step000002.pt: "  # the new flags
                                             ".*checkpoints kept: state_step000002.pt"):
            main(flags(data, tmp_path / "run", "--resume auto"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert newest(tmp_path / "run")["step"] == 2
    assert not list((tmp_path / "run").glob("*.part"))


# -----------------------------------------------------------------------------
# several ranks


@pytest.mark.slow
@pytest.mark.parametrize("more, tolerance", (  # Muon's products are in bf16
    ("", 1e-5), ("--value_residual 1 --attn_layers 1 --optimizer muon --pair_rows 40 "
                 "--value_tables 1", 1e-3)))
def test_two_ranks_give_one_processs_losses(data, tmp_path, script, more, tolerance):
    options = f"--num_iterations 10 --grad_accumulation_steps 4 {more}"
    main(flags(data, tmp_path / "one", options))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
              str(script)]
    two = subprocess.run([*launch, *flags(data, tmp_path / "two", options)], capture_output=True,
                         text=True)
    assert two.returncode == 0, two.stderr
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for key in {"train_loss", "val_loss"} & a.keys():
            assert abs(a[key] - b[key]) <= tolerance * a[key], (a["step"], key)


# -----------------------------------------------------------------------------
# bad input


@pytest.mark.parametrize("more, message", (
    ("--input_bin nothing_*.bin", "--input_bin: no shard matches .*nothing_"),
    ("--input_val_bin nothing", "--input_val_bin: no shard matches .*nothing"),
    ("--batch_size 40",
     r"--input_bin holds 437 tokens, fewer than one micro-batch .* 641 "),
    ("--val_tokens 151", "--val_tokens must be <= 150, .* got 151"),
    ("--attn_layers 7", "--attn_layers must be in 0 ... 1, got 7"),
    ("--afno_state_layers 1", "--attn_layers must be different layers, got 1 in both"),
    ("--afno_num_blocks 5", "--afno_num_blocks must divide the 16 channels, got 5"),
    ("--afno_form dyadic",
     "--sequence_length must be > 64 to train --afno_form dyadic, .* got 16"),
    ("--model d13", "--model: must be one of d1, d4, d6, d12, d18, d24, d36, d48, got d13"),
    ("--afno_form reference",
     "--afno_form reference is not causal, choose one of filter, hilbert, state, dyadic$"),
    ("--afno_form analytic", "--afno_form: must be one of filter, .*, got analytic"),
    ("--mixer mamba", "--mixer: must be one of attn, afno, got mamba"),
    ("--preset fastest",
     "--preset: must be one of fineweb, fineweb-4k, shakespeare, baseline, got fastest"),
    ("--batch_size 0", "--batch_size: must be an integer >= 1 .*, got 0"),
    ("--learning_rate -1", "--learning_rate: must be a number > 0 .*, got -1"),
    ("--attn_layers one", "--attn_layers: must be layer numbers such as 3,9, or none, got one"),
    ("--no_such_flag 1", "unrecognized arguments: --no_such_flag 1"),
    ("--mixer_scale 1", "unrecognized arguments: --mixer_scale 1"),
    ("--seed 99999999999999999999",
     "--seed: must be an integer >= 0 and <= 9,223,372,036,854,775,807, got 9"),
    ("--qk_norm 2", "--qk_norm: must be one of 0, 1, got 2"),
    ("--fp8_head 1 --batch_size 1 --sequence_length 9",
     "--fp8_head: a micro-batch must be of a multiple of 16 tokens, got 9"),
    ("--logit_softcap -1", "--logit_softcap: must be a number >= 0 .*, got -1"),
    ("--afno_sparsity_threshold nan",
     "--afno_sparsity_threshold: must be a number >= 0 .*, got nan"),
    ("--final_lr_fraction 1.1", "--final_lr_fraction: must be a number >= 0 and <= 1, got 1.1"),
    ("--rest_lr 0", "--rest_lr: must be a number > 0 .*, got 0"),
    ("--curriculum 8:0.5,16", "--curriculum: must be length:share,.* sum to 1, got 8:0.5,16"),
    ("--curriculum 8:0.5,16:0.6",
     "--curriculum: must be .* with integer lengths >= 2 and shares > 0 that sum to 1"),
    ("--curriculum 0:0.5,16:0.5", "--curriculum: must be .* with integer lengths >= 2"),
    ("--curriculum 8:0.5,12:0.5", "--curriculum must end with --sequence_length 16, got 12"),
    ("--curriculum 7:0.5,16:0.5",
     r"--curriculum: lengths must divide the 32 tokens of a micro-batch \(.*\), got 7"),
    ("--curriculum 8:0.5,128:0.5 --afno_form dyadic --sequence_length 128",
     "--curriculum must be > 64 .*, got 8"),
    ("--momentum 1", "--momentum: must be a number >= 0 and <= 0.9999, got 1"),
    ("--beta2 -0.1", "--beta2: must be a number >= 0 and <= 0.999999, got -0.1"),
    ("--resume nothing.pt", "--resume nothing.pt: no readable checkpoint"),
))
def test_bad_flags_get_one_line(data, tmp_path, more, message):
    with pytest.raises(InputError, match=message) as error:
        main(flags(data, tmp_path / "run", more))
    assert "\n" not in str(error.value) and not Checkpoints(tmp_path / "run").paths()


def test_one_pattern_of_data_without_the_other_is_refused(data, tmp_path):
    for name in ("--input_bin", "--input_val_bin"):
        argv = flags(data, tmp_path / "run")
        del argv[argv.index(name) : argv.index(name) + 2]
        with pytest.raises(InputError, match="--input_bin and --input_val_bin go together"):
            main(argv)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_asked_for_and_absent(data, tmp_path):
    with pytest.raises(InputError, match="--device cuda: this torch sees no CUDA device"):
        main(flags(data, tmp_path / "run", "--device cuda"))


@pytest.mark.slow
def test_the_shell_sees_one_line_and_status_2(data, tmp_path):
    run = run_script(SCRIPT, flags(data, tmp_path / "run", "--val_tokens 1000"))
    assert run.wait() == 2
    assert run.stderr.read() == "error: --val_tokens must be <= 150, the targets in " \
        "--input_val_bin, got 1000\n"


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
        file.write(VOCABULARY.to_bytes(2, "little"))
    with pytest.raises(InputError, match="train_0_000000.bin, token 70: token 496, "
                                         "the vocabulary has 496"):
        main(flags(folder, tmp_path / "run"))
    assert newest(tmp_path / "run")["step"] == 2  # the good steps before it are not lost


def test_a_checkpoint_of_another_config_is_refused(data, tmp_path):
    main(flags(data, tmp_path / "run", "--num_iterations 1"))
    for more, difference in (
            ("--attn_layers 0", r"attn_layers is \(1,\) there, the flags say \(0,\)"),
            ("--optimizer muon", "optimizer is adamw there, the flags say muon")):
        match = f"a checkpoint of another config: .*{difference}"
        with pytest.raises(InputError, match=match):
            main(flags(data, tmp_path / "run", f"--resume auto {more}"))


@pytest.mark.slow
def test_heads_of_attention_may_be_others_than_the_model_has(data, tmp_path):
    for more, heads in (("", 1), ("--n_head 4", 4)):
        out = tmp_path / f"heads-{heads}"
        main(flags(data, out, more))
        main(flags(data, out, "--resume auto --num_iterations 7"))  # without the flag its own
        assert newest(out)["config"]["n_head"] == heads and newest(out)["step"] == 7
    assert losses(tmp_path / "heads-1")[1:] != losses(tmp_path / "heads-4")[1:]
    match = "--n_head: twice the heads must divide n_embd 16, got 3 heads"
    with pytest.raises(InputError, match=match):
        main(flags(data, tmp_path / "heads-3", "--n_head 3"))


def test_a_checkpoint_of_another_version_is_one_clear_line(data, tmp_path):
    main(flags(data, tmp_path / "run", "--num_iterations 1"))
    path = Checkpoints(tmp_path / "run").paths()[0]
    state = torch.load(path)
    rename = lambda key: key.replace("operator", "kernel")
    state["model"] = {rename(key): value for key, value in state["model"].items()}
    torch.save(state, path)
    before = (tmp_path / "run/metrics.jsonl").read_text()
    resume = ["--resume", "auto", *flags(data, tmp_path / "run")]
    evaluate = ["--output_dir", str(tmp_path / "run"), "--eval_only"]
    for argv in (resume, evaluate):
        match = r"run: the checkpoint does not fit this version's model \(.*operator"
        with pytest.raises(InputError, match=match):
            main(argv)
    assert (tmp_path / "run/metrics.jsonl").read_text() == before  # the summary among them
    state["config"]["tied_head"] = 1  # a flag that this version does not have
    torch.save(state, path)
    for argv in (resume, ["--resume", str(path), "--eval_only"]):
        match = "is of another version of this trainer, which had tied_head: its train.log"
        with pytest.raises(InputError, match=match):
            main(argv)
    del state["config"]["tied_head"]
    # flags that are gone, of which one was in use
    state["args"] |= dict(batch_schedule=None, cooldown="sqrt")
    torch.save(state, path)
    match = "is of another version of this trainer, which had cooldown: its train.log"
    with pytest.raises(InputError, match=match):
        main(resume)
    del state["args"]["cooldown"]
    state["config"] = {**state["config"], "afno_form": "wavelet"}
    torch.save(state, path)
    match = r"\.pt is of another version of this trainer: --afno_form must be one of"
    with pytest.raises(InputError, match=match):
        main(resume)
    assert (tmp_path / "run/metrics.jsonl").read_text() == before


def test_a_checkpoint_with_idle_flags_that_are_gone_and_without_new_ones_loads():
    args, config = values_of(f"{SMALL} --input_bin x --input_val_bin x")
    state = dict(args=args.to_save | dict(grad_clip=0.0), config=vars(config) | dict(afno_gate=0))
    del state["config"]["copy_layers"], state["args"]["goal_val_loss"]
    there = of_this_version(state, Path("x.pt"), train_gpt2_afno.CHECKPOINT_FLAGS)
    assert GPTConfig(**there["config"]) == config and "grad_clip" not in there["args"]


@pytest.mark.parametrize("field, value", (("mixer_scale", 0.7), ("afno_relu", "modulus")))
@pytest.mark.parametrize("where", ("config", "args"))
def test_checkpoints_with_what_is_gone_are_refused_by_name(field, value, where):
    args, config = values_of(f"{SMALL} --input_bin x --input_val_bin x")
    state = dict(args=args.to_save, config=vars(config))
    state[where] = state[where] | {field: value}
    match = rf"x\.pt is of another version of this trainer, which had {field}: its train.log"
    with pytest.raises(InputError, match=match):
        of_this_version(state, Path("x.pt"), train_gpt2_afno.CHECKPOINT_FLAGS)


def test_a_run_is_not_overwritten(data, tmp_path):
    main(flags(data, tmp_path / "run", "--num_iterations 1"))
    with pytest.raises(InputError, match="holds a run: add --resume auto, or name another"):
        main(flags(data, tmp_path / "run"))


def test_divergence_names_step_and_place_and_keeps_the_last_good_checkpoint(data, tmp_path,
                                                                            monkeypatch):
    main(flags(data, tmp_path / "run"))
    state = newest(tmp_path / "run")
    # the weights of step 7 are finite, but they are what makes the loss of step 8 not a number
    monkeypatch.setattr(train_gpt2_afno, "learning_rate_factor", lambda *_: 1e35)
    match = r"step \d+: (loss|gradient norm) (nan|inf), micro-batch at .*train_\d_000000.bin, " \
        r"token \d+; checkpoints kept: state_step000006.pt"
    with pytest.raises(Diverged, match=match):
        main(flags(data, tmp_path / "run",
                   "--resume auto --num_iterations 12 --learning_rate 1000 --save_every 1"))
    assert_same(newest(tmp_path / "run")["model"], state["model"])
    assert (tmp_path / "run/state_step000007.pt.abandoned").exists()
    assert "error: step 8" in (tmp_path / "run/train.log").read_text()


def test_out_of_memory_names_the_flag(capsys):
    def out_of_memory(argv):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")

    with pytest.raises(SystemExit) as status:
        run(out_of_memory)
    (line,) = capsys.readouterr().err.splitlines()
    assert status.value.code == 2 and "lower --batch_size" in line and "20.00 GiB" in line


def test_a_leaking_model_is_not_trained(data, tmp_path, monkeypatch):
    def looks_ahead(self, z, h, added=None, rotary=None, taps=None):
        return F.pad(causal_conv(h, taps), (0, 0, 0, 1))[:, 1:]

    monkeypatch.setattr(test_causality, "budget", BUDGET)
    monkeypatch.setattr(AFNO1D, "mix", looks_ahead)
    with pytest.raises(InputError, match="causality check: the model leaks, refusing to go on: "
                                         "output 0 is the first that changes with the tokens"):
        main(flags(data, tmp_path / "run"))
    assert not losses(tmp_path / "run")


def test_a_model_that_leaks_where_it_validates_reports_no_loss(data, tmp_path, monkeypatch):
    def looks_ahead(self, idx):
        x = hidden(self, idx)
        return x + F.pad(x, (0, 0, 0, 1))[:, 1:] if len(idx) == rows else x

    hidden, rows = GPT.hidden, 5  # that no batch has but a validation's
    monkeypatch.setattr(test_causality, "budget", BUDGET)
    monkeypatch.setattr(GPT, "hidden", looks_ahead)
    with pytest.raises(InputError, match="causality check: the model leaks, refusing to go on: "
                                         "output 0 is the first that changes with the tokens"):
        main(flags(data, tmp_path / "run"))
    assert len(losses(tmp_path / "run")) == 3 and not validations(tmp_path / "run")


def test_the_causality_check_changes_nothing(data, tmp_path, monkeypatch):
    """It draws nothing from the global generator, and its noise on the weights goes again."""
    main(flags(data, tmp_path / "checked"))
    monkeypatch.setattr(train_gpt2_afno, "refuse_leaks", lambda *given, **more: None)
    main(flags(data, tmp_path / "unchecked"))
    assert_same(newest(tmp_path / "checked"), newest(tmp_path / "unchecked"))


# -----------------------------------------------------------------------------
# evaluation and generation


def test_eval_only_at_any_length(data, tmp_path, capsys):
    main(flags(data, tmp_path / "run"))
    own = metrics(tmp_path / "run")[-2]["val_loss"]
    capsys.readouterr()
    for T in (16, 5, 100):
        main(["--output_dir", str(tmp_path / "run"), "--eval_only", "--sequence_length", str(T),
              "--device", "cpu"])
        line = rf"step:6 sequence_length:{T} val_tokens:150 val_loss:(\d+\.\d+)"
        found = re.search(line, capsys.readouterr().out)
        assert T != 16 or abs(float(found[1]) - own) < 1e-4


class Letters:
    """A tokenizer that needs no vocabulary: a token a byte."""

    eot_token = VOCABULARY - 1
    encode_ordinary = staticmethod(lambda text: list(text.encode()))
    decode_single_token_bytes = staticmethod(lambda token: bytes([token % 256]))


def generate(monkeypatch, capsys, folder: Path, *more: str) -> str:
    """Return what --generate with `more` prints."""
    monkeypatch.setattr("runtime.gpt2_encoding", Letters)
    capsys.readouterr()
    main(["--output_dir", str(folder), "--device", "cpu", *more])
    return capsys.readouterr().out


def likeliest(folder: Path, count: int) -> tuple[GPT, str]:
    """Return the model of a run, and "To be" with its likeliest `count` tokens, without step()."""
    state = newest(folder)
    model = GPT(GPTConfig(**state["config"]))
    model.load_state_dict(state["model"])
    tokens = list(b"To be")
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0][0, -1].argmax()))
    text = b"To be" + bytes(token % 256 for token in tokens[5:])
    return model, text.decode(errors="replace")


TO_BE = ("--generate", "To be", "--max_new_tokens")


def test_the_recipe_is_evaluated_and_generated_from_a_checkpoint(data, tmp_path, monkeypatch,
                                                                 capsys):
    main(flags(data, tmp_path / "run", RECIPE))
    own = metrics(tmp_path / "run")[-2]["val_loss"]
    capsys.readouterr()
    main(["--output_dir", str(tmp_path / "run"), "--eval_only", "--device", "cpu"])
    found = re.search(r"val_loss:(\d+\.\d+)", capsys.readouterr().out)
    assert abs(float(found[1]) - own) < 1e-4
    model, expected = likeliest(tmp_path / "run", 10)  # within sequence_length
    assert model.config.logit_softcap == 15 and model.config.qk_norm == 1
    assert model.config.depth_scale == 0
    greedy = generate(monkeypatch, capsys, tmp_path / "run", *TO_BE, "10", "--temperature", "0")
    assert greedy == expected + "\n"


@pytest.mark.slow
def test_generation_is_the_models(data, tmp_path, monkeypatch, capsys):
    main(flags(data, tmp_path / "run"))
    # up to sequence_length 16; what attention sees beyond it is tests/test_model.py's
    _, expected = likeliest(tmp_path / "run", 11)
    ours = lambda *more: generate(monkeypatch, capsys, tmp_path / "run", *more)
    greedy = ours(*TO_BE, "20", "--temperature", "0")
    assert greedy.startswith(expected)
    one, cold = (ours(*TO_BE, "20", *more) for more in (("--top_k", "1"),
                                                        ("--temperature", "1e-40")))
    assert one == cold == greedy
    a, b, c = (ours("--generate", "", "--seed", seed) for seed in "112")
    assert a == b != c
