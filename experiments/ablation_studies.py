"""Run a study again: arms against an anchor, each with every seed, one run after the other.

    python experiments/ablation_studies.py shakespeare                # on a CPU, in minutes
    python experiments/ablation_studies.py layout --data data/mixed   # on a GPU, 40M tokens an arm
    python experiments/ablation_studies.py sweep-lr --seeds 1,2 --dry_run    # says what would run
    python experiments/ablation_studies.py context -- --val_tokens 100000    # flags for each run
    python experiments/ablation_studies.py recall     # tasks with known answers: its own --help
    python experiments/ablation_studies.py transfer runs/c runs/b   # to other text: its own --help

A study is a table of arms, STUDIES below; to make one of your own, copy one and change it. In
experiments/studies/STUDY/ are a folder ARM-seedN with train.log and metrics.jsonl for every run,
and table.md and curves.png made from these logs. A run of rows longer than 1024 tokens is also
evaluated at 1024 (eval-1024.txt). Ctrl-C or SIGTERM stops the run in hand, which saves; the same
command goes on from there and skips finished runs.
"""
import argparse
import importlib
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_gpt2_afno as trainer  # noqa: E402
from data.loader import find_shards, length_phases  # noqa: E402
from data.text_to_bin import FOLDER, InputError, Kind, Parser, number, owned, relative  # noqa: E402
from experiments import archive  # noqa: E402
from experiments.plot_runs import (FILLED_IN, Run, commands_of, flags_said,  # noqa: E402
                                   last_start, plot, read_run, time_to_loss, unlike)
from runtime import run  # noqa: E402

# -----------------------------------------------------------------------------
# the studies: what differs from a preset of the trainer

GPU = "--preset fineweb --batch_size 64 --grad_accumulation_steps 1 --sequence_length 1024 " \
    "--warmdown_iters half --save_every 0 --val_fp32 0"
CPU = "--preset baseline --device cpu --model d1 --batch_size 4 --grad_accumulation_steps 1 " \
    "--sequence_length 256 --save_every 0 --val_fp32 0 --val_tokens 20480 " \
    "--input_bin data/shakespeare/train_*.bin --input_val_bin data/shakespeare/val_*.bin"
# The recipe is the preset's (LOG.md has each gain). These flags take one thing of it back.
WITHOUT = {
    "embedding-norm": "--embedding_norm 0",
    "logit-softcap": "--logit_softcap 0",
    "embedding-residual": "--embedding_residual 0",
    "qk-norm": "--qk_norm 0",
    "attn-short-conv": "--attn_short_conv 1",
    "attn-gate": "--attn_gate 0",
    "fp8-head": "--fp8_head 0",
    "fp8-mlp": "--fp8_mlp 0",
    "half-rotary": "--half_rotary 0",
    "value-residual": "--value_residual 0",
    "swiglu": "--swiglu 0",
    "short-averages": "--momentum 0.95 --beta1 0.9 --beta2 0.95",
    "6-heads": "--n_head 12",
    "rest-lr": "--rest_lr 0.0043",  # the learning rate of the other weights
    "residual-bf16": "--residual_bf16 0",
    "pair-rows": "--pair_rows 0",
    "value-tables": "--value_tables 0",
    "predict-ahead": "--predict_ahead 0",
    "predict-prefix": "--predict_prefix 0",
    "long-warmdown": "--warmdown_iters baseline",
    "final-lr": "--final_lr_fraction 0",
}
AFNO, ATTENTION = "--mixer afno --attn_layers ''", "--mixer attn"
HYBRID = "--mixer afno --attn_layers 5,10"
STATE = "--afno_form state --afno_short_conv 4"  # states were measured with the short convolution
MIXERS = {
    "attention": ATTENTION,
    "hybrid": HYBRID,
    "hybrid-4": "--mixer afno --attn_layers 2,5,8,11",
    "states": f"{AFNO} --afno_state_layers 5,10 --afno_short_conv 4",
}

# Heads have 224 or 256 channels, filters 64. One layer of six is of attention, or of form state.
SIZES = {"d6": ("--n_head 2", "4"), "d12": ("--n_head 3", "5,10"),
         "d18": ("--n_head 4 --afno_num_blocks 7", "5,11,16"), "d24": ("--n_head 4", "5,11,16,22")}
SIZED = {f"{size}-{mixer}": f"--model {size} {flags} {of_mixer}"
         for size, (flags, layers) in SIZES.items()
         for mixer, of_mixer in {
             "attention": ATTENTION, "hybrid": f"--mixer afno --attn_layers {layers}",
             "states": f"{AFNO} --afno_state_layers {layers} --afno_short_conv 4",
             "filters": AFNO}.items()}


@dataclass
class Study:
    about: str
    arms: dict[str, str]  # name: flags, which win over the common ones; the first is the anchor
    common: str = GPU  # flags of all arms
    tokens: float = 40e6  # that a run trains on


STUDIES = {
    "layout": Study(
        "Which layers keep attention, or are of form state beside a short convolution, and how "
        "many taps the others have.", {
            "attention-5-10": HYBRID,
            "attention-none": AFNO,
            "attention-6": "--mixer afno --attn_layers 6",
            "attention-3-9": "--mixer afno --attn_layers 3,9",
            "attention-0-1": "--mixer afno --attn_layers 0,1",
            "attention-10-11": "--mixer afno --attn_layers 10,11",
            "attention-2-5-8-11": MIXERS["hybrid-4"],
            "attention-odd": "--mixer afno --attn_layers 1,3,5,7,9,11",
            "attention-all": ATTENTION,
            "taps-128": f"{HYBRID} --afno_filter_length 128",
            "states-5-10": MIXERS["states"],
            "states-2-5-8-11": f"{AFNO} --afno_state_layers 2,5,8,11 --afno_short_conv 4",
            "states-all": f"{AFNO} {STATE}",
        }),
    "mixers": Study(
        "Attention in every layer, in two, in none; without any, also with what followed the "
        "longest earlier match. AFNO layers, but for the form state, have fewer parameters than "
        "attention.", {
            "hybrid": HYBRID,
            "attention": ATTENTION,
            "filter": AFNO,
            "hilbert": f"{AFNO} --afno_form hilbert",
            "state": f"{AFNO} {STATE}",
            "states": MIXERS["states"],
            "filter-copies": f"{AFNO} --copy_layers 2,5,8,11",
            "states-copies": f"{MIXERS['states']} --copy_layers 2,5,8,11",
        }),
    "context": Study(
        "Longer rows for d6, with as many tokens a step. Every loss is at the arm's own length: "
        "compare mixers at one length, or by position (evaluate.py RUN... --rows T, with "
        "--keep_checkpoints here). Arms called taps have filters as long as the rows. `-- --model "
        "d12 --n_head 3` is not enough for d12: its layers of attention and states are 5 and 10.", {
            **{f"{name}-{T}": f"{SIZED[f'd6-{name}']} --sequence_length {T} "
                              f"--batch_size {65_536 // T}"
               for T in (1024, 2048, 4096, 16_384)
               for name in ("hybrid", "attention", "states", "filters")},
            **{f"{name}-16384-taps": f"{SIZED[f'd6-{name}']} --sequence_length 16384 "
                                     "--batch_size 4 --afno_filter_length 16384"
               for name in ("hybrid", "filters")},
        }, tokens=700 * 65_536),
    "recipe": Study(
        "The recipe of the hybrid less one thing, or with one changed; the same for attention, "
        "the control.", {
            "anchor": HYBRID,
            **{f"without-{name}": f"{HYBRID} {flags}" for name, flags in WITHOUT.items()},
            "with-3-heads": f"{HYBRID} --n_head 3",
            "with-short-conv": f"{HYBRID} --afno_short_conv 4",
            "without-silu": f"{HYBRID} --afno_silu 0",
            "attention": ATTENTION,
            "attention-with-3-heads": f"{ATTENTION} --n_head 3",
            **{f"attention-without-{name}": f"{ATTENTION} {flags}"
               for name, flags in WITHOUT.items()},
        }),
    "goals-baseline": Study(
        "How much faster the best recipe comes to the loss at which the baseline ends: the "
        "baseline on 100M tokens, the others on 40M.", {
            "baseline": "--preset baseline --grad_accumulation_steps 8 --row_order spread "
                        "--warmdown_iters baseline",
            **{arm: f"{flags} --num_iterations 610" for arm, flags in MIXERS.items()},
        }, tokens=100e6),
    "goals-mixer": Study(
        "The mixer's own share: one recipe, with attention in every layer, in two or four, in "
        "none.", MIXERS),
    "goals-mixer-92M": Study(
        "goals-mixer with 3 heads and 2.3 times the tokens: what leads at the beginning need not "
        "lead then.", MIXERS, f"{GPU} --n_head 3", tokens=1400 * 65_536),
    "goals-mixer-4096": Study(
        "goals-mixer with rows that grow to 4096 tokens, and as many tokens as goals-mixer-92M; "
        "arms called all-4096 have such rows from the first step, hybrid-4096-taps has as many "
        "taps.", {
            **MIXERS,
            "hybrid-4096-taps": f"{HYBRID} --afno_filter_length 4096",
            "hybrid-all-4096": f"{HYBRID} --curriculum 4096:1",
            "attention-all-4096": f"{ATTENTION} --curriculum 4096:1",
        }, f"{GPU} --sequence_length 4096 --batch_size 16 "
        "--curriculum 512:0.3,1024:0.3,4096:0.4", tokens=1400 * 65_536),
    "sizes": Study(
        "Loss by size, every mixer, 46M tokens: sizes.py fits slopes to it. Learning rates are "
        "those of d12. Value tables are in five layers of all sizes.", SIZED,
        tokens=700 * 65_536),
    "sizes-92M": Study(
        "The smaller sizes of the study sizes on twice the tokens.", {
            arm: flags for arm, flags in SIZED.items() if arm.startswith(("d6-", "d12-"))},
        tokens=1400 * 65_536),
    "forms": Study(
        "What the plan names beside its default: positions, experts, the dyadic form, AFNO in the "
        "first, the middle or the last six layers, and rows that grow. The loss of rows-grow is at "
        "T = 4096: compare it with rows-4096.", {
            "hybrid": HYBRID,
            **{f"position-{name}": f"{HYBRID} --position {name}"
               for name in ("learned", "sinusoidal", "fourier")},
            "experts-by-frequency": f"{HYBRID} --afno_num_experts 4 --afno_routing frequency",
            "experts-by-lag": f"{HYBRID} --afno_num_experts 4 --afno_routing position",
            "dyadic": f"{HYBRID} --afno_form dyadic",
            "rows-4096": f"{HYBRID} --sequence_length 4096 --batch_size 16",
            "rows-grow": f"{HYBRID} --sequence_length 4096 --batch_size 16 "
                         "--curriculum 512:0.3,1024:0.3,4096:0.4",
            "afno-early": "--mixer afno --attn_layers 6,7,8,9,10,11",
            "afno-middle": "--mixer afno --attn_layers 0,1,2,9,10,11",
            "afno-late": "--mixer afno --attn_layers 0,1,2,3,4,5",
        }, f"{GPU} --n_head 3", tokens=1400 * 65_536),
    "schedule": Study("Length of rows over the run, all on as many tokens.", {
        "anchor": HYBRID,
        "curriculum": f"{HYBRID} --curriculum 256:0.3,512:0.3,1024:0.4",
    }),
    "sweep-momentum": Study("Momentum of Muon, averages of AdamW; the same for attention.", {
        f"{name}{arm}": f"{flags} {change}"
        for name, flags in (("", HYBRID), ("attention-", ATTENTION))
        for arm, change in (("anchor", ""), ("momentum-0.85", "--momentum 0.85"),
                            ("momentum-0.95", "--momentum 0.95"), ("beta1-0.8", "--beta1 0.8"),
                            ("beta1-0.9", "--beta1 0.9"), ("beta2-0.95", "--beta2 0.95"))}),
    "sweep-lr": Study("Learning rates, the same for attention.", {
        f"{name}lr-{rate}": f"{flags} --learning_rate {rate}"
        for name, flags in (("", HYBRID), ("attention-", ATTENTION))
        for rate in (0.0043, 0.0018, 0.0025, 0.0036, 0.005, 0.0072)}),  # the anchor's first
    "sweep-warmup": Study(
        "Steps of warmup; the anchor's are the trainer's share of all steps, 256/4768.", {
            "warmup-default": HYBRID,
            **{f"warmup-{steps}": f"{HYBRID} --warmup_iters {steps}" for steps in (64, 128, 256)},
        }),
    "sweep-blocks": Study(
        "Diagonal blocks of AFNO's MLP; filters have 64 channels with 4 and 12 blocks, 48 with 8 "
        "and 16.", {
            "blocks-4": HYBRID,
            **{f"blocks-{n}": f"{HYBRID} --afno_num_blocks {n}" for n in (8, 12, 16)},
        }),
    "sweep-sparsity": Study("Soft-shrink of AFNO's response.", {
        "shrink-0.01": HYBRID,
        **{f"shrink-{shrink}": f"{HYBRID} --afno_sparsity_threshold {shrink}"
           for shrink in (0, 0.03, 0.1)},
    }),
    "sweep-batch": Study(
        "Tokens a step, in units of the baseline's 524,288; the learning rate stays.", {
            "batch-0.125": HYBRID,
            **{f"batch-{n / 512:g}": f"{HYBRID} --batch_size {n}" for n in (16, 32)},
            **{f"batch-{n / 8:g}": f"{HYBRID} --grad_accumulation_steps {n}"
               for n in (2, 4, 8, 32, 80)},
        }, tokens=8 * 80 * 65_536),  # eight of the largest steps
    "shakespeare": Study("AFNO against attention, in one layer, where no GPU is.", {
        "afno": "--mixer afno --depth_scale 0",
        "attention": "--mixer attn",
    }, CPU, 102_400),
}

MADE_BY = "Made by experiments/ablation_studies.py"  # in table.md
OTHERS = ("recall", "transfer")  # studies that are no runs of the trainer: modules of these names

# -----------------------------------------------------------------------------
# runs and their flags

OWN = ("--seed", "--output_dir", "--resume")  # flags that a study sets itself
# where and when, not what is trained
UNCOMPARED = ("--output_dir", "--resume", "--max_seconds", "--save_every")
COMMON_LENGTH = 1024  # in tokens: losses at different lengths do not compare
EVALUATION = f"eval-{COMMON_LENGTH}.txt"
# what the table takes from a run's summary and log
SUMMARY = ("step", "train_time_s", "train_time_with_compilation_s", "peak_memory_usage")
COMMAND, MACHINE = r"^command: (.*)$", r"^(torch \d.*)$"
PARAMETERS = r"^model: .* ([\d,]+) parameters"


def as_dict(words: list[str]) -> dict[str, str]:
    """Return ["--name", "value", ...] as {"--name": "value"}; what comes later wins."""
    if len(words) % 2 or not all(name.startswith("--") for name in words[::2]):
        raise InputError("flags for the trainer must be pairs --name value, "
                         f"got {shlex.join(words)}")
    return dict(zip(words[::2], words[1::2]))


def as_words(flags: dict[str, str]) -> list[str]:
    return [word for pair in flags.items() for word in pair]


def command(flags: dict[str, str]) -> str:
    return f"python train_gpt2_afno.py {shlex.join(as_words(flags))}"


def integer(flags: dict[str, str], name: str, low: int = 1) -> int:
    text = flags.get(name, "nothing")
    if not text.isdecimal() or int(text) < low:
        raise InputError(f"{name} must be an integer >= {low}, got {text}")
    return int(text)


def last_step(flags: dict[str, str]) -> int:
    """Return the step at which a run ends."""
    return integer(flags, "--num_iterations") + integer({"--extend": "0"} | flags, "--extend", 0)


def data_flags(data: str) -> dict[str, str]:
    """Return patterns of the shards in a folder, or of those that begin with a prefix."""
    found, start = {}, f"{data}/*" if os.path.isdir(data) else data
    for flag, part in (("--input_bin", "train"), ("--input_val_bin", "val")):
        pattern = f"{start}{part}_*.bin"
        if not find_shards(pattern):
            raise InputError(f"--data {data}: not a folder of shards, nor how their paths begin: "
                             f"no file {pattern}")
        found[flag] = relative(os.path.abspath(pattern))
    return found


def flags_of(study: Study, arm: str, seed: int, folder: Path, tokens: float | None,
             more: dict[str, str]) -> dict[str, str]:
    """Return all flags of a run.

    Its steps follow from the tokens, the study's own where None are given. From the steps follow
    its validations, about ten, and a warmdown of half of them or, as the baseline's, of 1024/4768.
    """
    flags = as_dict(shlex.split(study.common)) | as_dict(shlex.split(study.arms[arm])) | more
    sizes = ("--batch_size", "--grad_accumulation_steps", "--sequence_length")
    step = math.prod(integer(flags, name) for name in sizes)
    if tokens is not None and "--num_iterations" in flags:
        raise InputError(f"--tokens does not change arm {arm}, whose steps are --num_iterations "
                         f"{flags['--num_iterations']}: leave --tokens out")
    tokens = study.tokens if tokens is None else tokens
    flags.setdefault("--num_iterations", str(max(1, round(tokens / step))))
    steps = integer(flags, "--num_iterations")
    flags.setdefault("--val_loss_every", str(math.ceil(steps / 10)))
    warmdown = flags.get("--warmdown_iters")
    if warmdown == "half":
        flags["--warmdown_iters"] = str(steps // 2)
    elif warmdown == "baseline":
        flags["--warmdown_iters"] = str(round(steps * 1024 / 4768))
    output = relative(str(folder / f"{arm}-seed{seed}"))
    return flags | {"--seed": str(seed), "--output_dir": output}


def folder_of(flags: dict[str, str]) -> Path:
    return ROOT / flags["--output_dir"]


def damaged(path: Path, what: str) -> InputError:
    """Return the error for a run's file that is not as the trainer wrote it."""
    return InputError(f"{relative(str(path))}: {what}; delete the run's folder, or "
                      "restore the file")


def read_text(path: Path) -> str:
    """Return the text of a run's file; raise InputError where it has none."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise damaged(path, getattr(error, "strerror", "not text")) from None


def changed_since(flags: dict[str, str], said: list[dict[str, str]]) -> list[str]:
    """Return how flags that nobody typed differ from a run's: a preset or a default is another now.

    said: flags_said of its log.
    """
    if not said:
        return []
    args = trainer.merge_flags(trainer.parse_flags(as_words(flags)), torch.device("cpu"), None,
                               lambda text: None)
    now = {name: str(value) for name, value in vars(args).items()
           if value != trainer.DEFAULTS.get(name, value)}
    skipped = {*trainer.SAME_RUN, *trainer.MICRO_BATCH, *trainer.DATA_FLAGS, *FILLED_IN}
    shown = lambda values, name: values.get(name, "the default")
    return [f"--{name} is {shown(said[-1], name)} there, now {shown(now, name)}"
            for name in sorted({*said[-1], *now} - skipped)
            if shown(said[-1], name) != shown(now, name)]


def refuse_other_flags(flags: dict[str, str]):
    """Raise InputError if the log in the folder is of a run, finished or not, with other flags."""
    log = folder_of(flags) / "train.log"
    text = read_text(log) if log.is_file() else ""
    if not (commands := commands_of(text)):
        return
    try:
        there = as_dict(shlex.split(commands[-1][0]))
    except ValueError:  # also InputError, which is on what the user gives
        raise damaged(log, "its last command is not made of pairs --name value") from None
    shown = lambda values, name: values.get(name, "not given")
    differing = [f"{name} is {shown(there, name)} there, now {shown(flags, name)}"
                 for name in dict.fromkeys((*flags, *there))
                 if name not in UNCOMPARED and there.get(name) != flags.get(name)]
    differing = differing or changed_since(flags, flags_said(last_start(text)))
    if differing:
        raise InputError(f"{flags['--output_dir']} holds a run with other flags: "
                         f"{', '.join(differing)}; delete it, or choose another --output")


def finished_run(flags: dict[str, str]) -> Run | None:
    """Return the run if it came to its last step, or to the loss that it was to stop at.

    Raises InputError where its files are damaged.
    """
    if not (folder_of(flags) / "metrics.jsonl").is_file():
        return None
    run = read_run(folder_of(flags))
    if not run.summary:
        return None
    if not all(type(run.summary.get(name)) in (int, float) for name in SUMMARY):
        raise damaged(run.file, f"its summary must have the numbers {', '.join(SUMMARY)}")
    reached = run.summary["wall_clock_time_to_target_loss"] is not None
    if run.summary["step"] != last_step(flags) and not ("--target_val_loss" in flags and reached):
        return None
    for rows, what in ((run.train, "training"), (run.curve, "validation")):
        if not rows:
            raise damaged(run.file, f"a finished run, but no rows of {what}, which the table "
                          "takes: choose another --output")
    for pattern in (COMMAND, MACHINE, PARAMETERS):
        from_log(run, pattern)
    loss_at_common_length(run)
    return run


def train(flags: dict[str, str]) -> tuple[int, str]:
    """Run the trainer, show what it says, and return its exit status and last line."""
    resume = ["--resume", "auto"] if any(folder_of(flags).glob("state_step*.pt")) else []
    words = [sys.executable, "train_gpt2_afno.py", *as_words(flags), *resume]
    last = "no output"
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True) as process:
        try:
            for line in process.stdout:
                if line.strip():
                    last = line.strip()
                    print(f"  {last}", flush=True)
        except (KeyboardInterrupt, SystemExit):
            process.terminate()  # the trainer saves before it stops
            process.wait()
            raise
    return process.returncode, last


def finish(flags: dict[str, str], keep_checkpoints: bool) -> int:
    """Evaluate a finished run at COMMON_LENGTH where its rows are longer; return an exit status.

    Then its checkpoints go.
    """
    folder, longer = folder_of(flags), integer(flags, "--sequence_length") / COMMON_LENGTH
    if longer > 1 and any(folder.glob("state_step*.pt")) and not (folder / EVALUATION).is_file():
        names = ("--output_dir", "--device", "--compile")
        kept = {name: flags[name] for name in names if name in flags}
        rows = math.ceil(longer * integer(flags, "--batch_size"))  # with as many tokens as before
        kept |= {"--sequence_length": str(COMMON_LENGTH), "--val_batch_size": str(rows)}
        words = [sys.executable, "train_gpt2_afno.py", "--eval_only", *as_words(kept)]
        part = folder / f"{EVALUATION}.part"
        with part.open("w") as out:
            status = subprocess.run(words, cwd=ROOT, stdout=out).returncode
        if status:
            print(f"error: {folder.name}: not evaluated at {COMMON_LENGTH} tokens, "
                  f"exit status {status}", file=sys.stderr, flush=True)
            return 1
        part.replace(folder / EVALUATION)
    for path in () if keep_checkpoints else folder.glob("state_step*.pt*"):
        path.unlink()
    return 0


# -----------------------------------------------------------------------------
# the table


def loss_at_common_length(run: Run) -> float | None:
    file = run.folder / EVALUATION
    if not file.is_file():
        return None
    if not (found := re.search(r"\bval_loss:(\d+\.\d+|nan|inf)\b", read_text(file))):
        raise damaged(file, "it has no val_loss")
    return float(found.group(1))


def speed(run: Run) -> float:
    """Return tokens/s from step 11 on, as the first are slower; of a short run from its middle."""
    points = [(0, 0.0, None), *run.train]
    begin, end = points[min(10, (len(points) - 1) // 2)], points[-1]
    return (end[0] - begin[0]) / (end[1] - begin[1])


def from_log(run: Run, pattern: str) -> str:
    """Return what the pattern's group last is in the log."""
    log = run.folder / "train.log"
    if not (found := re.findall(pattern, read_text(log), re.MULTILINE)):
        raise damaged(log, "not the log of a finished run")
    return found[-1]


def speedup(run: Run, anchor: Run) -> tuple[float, float, float] | None:
    """Return the seconds to the anchor's final loss, and the anchor's own seconds over them.

    The latter without and with compilation. None where the run never comes to that loss.
    """
    if not (found := time_to_loss(run.curve, anchor.curve[-1][2])):
        return None
    compilation, anchors = (
        of.summary["train_time_with_compilation_s"] - of.summary["train_time_s"]
        for of in (run, anchor))
    wanted = anchor.curve[-1][1]
    return found[0], wanted / found[0], (wanted + anchors) / (found[0] + compilation)


def of_seeds(found, runs) -> str:
    return f" ({len(found)} of {len(runs)} seeds)" if len(found) < len(runs) else ""


def table_row(arm: str, runs: dict[int, Run], anchors: dict[int, Run]) -> str:
    """Return the row of an arm's finished runs, by seed, against the anchor's of the same seed."""
    if not runs:
        return f"| {arm} | not finished" + " |" * 11
    final = {seed: run.curve[-1][2] for seed, run in runs.items()}
    both = [seed for seed in runs if seed in anchors]
    differences = [final[seed] - anchors[seed].curve[-1][2] for seed in both]
    times = [speedup(runs[seed], anchors[seed]) for seed in both]
    reached = [time for time in times if time]
    elsewhere = list(filter(None, map(loss_at_common_length, runs.values())))
    seconds, ratio, with_compilation = map(fmean, zip(*reached)) if reached else (0, 0, 0)
    cells = (
        arm,
        f"{fmean(final.values()):.4f}",
        f"{max(final.values()) - min(final.values()):.4f}" if len(final) > 1 else "one seed",
        f"{fmean(differences):+.4f}" if differences else "",
        f"{fmean(map(speed, runs.values())):,.0f}",
        from_log(next(iter(runs.values())), PARAMETERS),
        f"{max(run.summary['peak_memory_usage'] for run in runs.values()) / 2**30:.1f}",
        f"{fmean(run.curve[-1][0] for run in runs.values()):,.0f}",
        f"{fmean(run.summary['train_time_s'] for run in runs.values()):.1f}",
        f"{seconds:.1f}{of_seeds(reached, times)}" if reached else "never" if times else "",
        f"{ratio:.2f}, {with_compilation:.2f}" if reached else "",
        f"{fmean(elsewhere):.4f}{of_seeds(elsewhere, runs)}" if elsewhere else "",
    )
    return f"| {' | '.join(cells)} |"


def write_report(study: Study, folder: Path, runs: dict[tuple[str, int], Run],
                 flags: dict[tuple[str, int], dict]):
    """Write table.md and curves.png of the finished runs.

    Both dicts are by arm and seed; flags are those of all runs.
    """
    if not runs:
        return
    by_arm = {arm: {seed: run for (of_arm, seed), run in runs.items() if of_arm == arm}
              for arm in study.arms}
    anchor = next(iter(study.arms))
    machines = sorted({from_log(run, MACHINE) for run in runs.values()})
    if words := unlike([read_text(run.folder / "train.log") for run in runs.values()]):
        print(f"warning: {words}", file=sys.stderr, flush=True)
    lines = [
        f"# {folder.name}", "",
        f"{study.about} {MADE_BY} from the runs' logs. Means over "
        f"seeds; spread is the largest less the smallest loss. The anchor is {anchor}; "
        "differences and seconds to its final loss are against its run of the same seed, seconds "
        "linear between validations. Seconds are of training alone. Times faster are the "
        "anchor's seconds over the arm's, without and with compilation; tokens/s are from step "
        "11 on.", "",
        f"Machine: {'; '.join(machines)}.", *([f"**{words}**"] if words else []), "",
        "| arm | val loss | spread | against the anchor | tokens/s | parameters | "
        "peak memory, GiB | tokens | training seconds | seconds to the anchor's loss | "
        f"times faster | val loss at T = {COMMON_LENGTH}, of longer rows |",
        "|" + "---|" * 12,
        *(table_row(arm, by_seed, by_arm[anchor]) for arm, by_seed in by_arm.items()), "",
        "```", *map(command, flags.values()), "```",
    ]
    archive.write(folder / "table.md", "".join(f"{line}\n" for line in lines).encode())
    try:
        plot([run for by_seed in by_arm.values() for run in by_seed.values()],
             folder / "curves.png")
    except ImportError:
        print("no curves.png: matplotlib is not installed; experiments/plot_runs.py makes it "
              "from the same logs")


# -----------------------------------------------------------------------------
# command line


def seeds(text: str) -> list[int]:
    try:
        found = list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        found = [-1]
    if not all(map(trainer.FLAGS["seed"].kind.accepts, found)):
        raise argparse.ArgumentTypeError(f"must be integers >= 0 such as 1337,2, got {text}; "
                                         "the largest is 2^63 - 1")
    return found


PREFIX = Kind(str, bool, "a folder of shards or how their paths begin, not empty", "PREFIX")


def parse(argv: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """Return the study's arguments, and the trainer's flags after `--` and of --data."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("study", choices=(*STUDIES, *OTHERS))
    add("--data", type=PREFIX, metavar=PREFIX.metavar,
        help="folder of shards, or how their paths begin (the preset's)")
    add("--tokens", type=number(0, 1e15, False), metavar="N",
        help="of a run (the study's own)")
    add("--seeds", type=seeds, default="1337", metavar="N,N", help="(1337)")
    add("--output", type=FOLDER, default=ROOT / "experiments/studies", metavar="DIR",
        help="(experiments/studies)")
    add("--keep_checkpoints", action="store_true",
        help="else they are deleted once a run is finished, also in an earlier call")
    add("--dry_run", action="store_true", help="print the commands and check their flags")
    split = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:split])
    more = as_dict(argv[split + 1:])
    if own := [name for name in OWN if name in more]:
        raise InputError(f"{own[0]} is the study's to set; for seeds and folders there are "
                         "--seeds and --output")
    return args, more | ({} if args.data is None else data_flags(args.data))


def dry_run(flags: dict[tuple[str, int], dict]) -> int:
    """Print every run's command, and what the trainer would say against it; return the status."""
    status = 0
    for (arm, _), of_run in flags.items():
        print(command(of_run), flush=True)
        try:
            given = trainer.parse_flags(as_words(of_run))
            args = trainer.merge_flags(given, torch.device("cpu"), None, lambda text: None)
            config = trainer.GPTConfig(**trainer.model_fields(vars(args)))
            trainer.refuse_untrainable(config, args)
            length_phases(args, config.sequence_length, world=1)
        except InputError as error:
            print(f"error: {arm}: {error}", file=sys.stderr, flush=True)
            status = 1
    return status


def main(argv: list[str]) -> int:
    """Run a study, or only say what it would run; return the exit status."""
    if argv[:1] and argv[0] in OTHERS:
        return importlib.import_module(f"experiments.{argv[0]}").main(argv[1:])
    args, more = parse(argv)
    if args.study in OTHERS:
        raise InputError(f"{args.study} has flags of its own: ablation_studies.py {args.study} "
                         "comes first, they follow")
    study, folder = STUDIES[args.study], args.output.resolve() / args.study
    arms = [as_dict(shlex.split(words)) for words in study.arms.values()]
    if alike := [name for name in more if name[2:] not in trainer.MICRO_BATCH
                 and len({arm.get(name) for arm in arms}) > 1]:
        raise InputError(f"{alike[0]} is what arms of {args.study} differ in: leave it out, or "
                         "make a study of your own")
    # every arm once before the next seed, so that a study cut short can be read
    flags = {(arm, seed): flags_of(study, arm, seed, folder, args.tokens, more)
             for seed in args.seeds for arm in study.arms}
    if args.dry_run:
        return dry_run(flags)
    if study.common.startswith(GPU) and "--device" not in more and not torch.cuda.is_available():
        print(f"no GPU here: {args.study} is for one, on a CPU it may take days, and all memory",
              file=sys.stderr)
    with owned(folder, f"--output {folder}", {"table.md": MADE_BY, "curves.png": ""}):
        return run_study(study, folder, flags, args.keep_checkpoints)


def run_study(study: Study, folder: Path, flags: dict[tuple[str, int], dict],
              keep_checkpoints: bool) -> int:
    """Train what is not finished and write the report; return the exit status."""
    status = 0
    for of_run in flags.values():  # all of them before any training
        refuse_other_flags(of_run)
    runs = {key: run for key, of_run in flags.items() if (run := finished_run(of_run))}
    for key in runs:  # where the study was stopped after a run
        status |= finish(flags[key], keep_checkpoints)
    write_report(study, folder, runs, flags)
    for key, of_run in flags.items():
        name = folder_of(of_run).name
        if key in runs:
            print(f"{name}: finished before, skipped", flush=True)
            continue
        print(f"{name}: {command(of_run)}", flush=True)
        exit_status, last = train(of_run)
        if run := finished_run(of_run):
            runs[key] = run
            status |= finish(of_run, keep_checkpoints)
            write_report(study, folder, runs, flags)
        else:
            killed = " (killed, as where memory is short)" * (exit_status == -signal.SIGKILL)
            print(f"error: {name}: not finished, exit status {exit_status}{killed}: {last}",
                  file=sys.stderr, flush=True)
            status = 1
    print(f"{relative(str(folder))}: {len(runs)} of {len(flags)} runs finished")
    return status


if __name__ == "__main__":
    # so that the run in hand is stopped, too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run(main)
