"""Train a GPT-2 whose tokens are mixed by a causal AFNO (afno.py), or by attention, the control.

    python train_gpt2_afno.py                                # the preset for this device
    python train_gpt2_afno.py --preset fineweb --mixer attn  # the control: same recipe, attention
    python train_gpt2_afno.py --preset baseline              # NoCap-Test's run, the clock to beat
    python train_gpt2_afno.py --preset fineweb --extend 400  # goes on with a longer schedule
    python train_gpt2_afno.py --output_dir runs/mine --generate "To be, or not"

Read from top to bottom: flags and presets, model, optimizers, training, command line. Devices,
ranks, validation and generation are in runtime.py, checkpoints and the log in checkpoints.py.
"""
import argparse
import contextlib
import functools
import math
import shlex
import signal
import sys
import time
import warnings
from dataclasses import asdict, dataclass, make_dataclass
from pathlib import Path

START = time.perf_counter()
if __name__ == "__main__":  # until the loop, which saves first, Ctrl-C ends what runs at once
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from afno import (AFNO1D, FORMS, KINDS, ROUTINGS, DyadicOperator, FourierGate, ShortConv,
                  check_arguments, longest_matches, mean_rows, newest_matches, rmsnorm,
                  taps_at_once)
from checkpoints import (TIMES, Checkpoints, RunLog, at_length, choose_folder, cooldown_step,
                         energy_used, fall_steps, find_checkpoint, finished, load_optimizers,
                         load_weights, not_finite, of_this_version, preset_folder, random_state,
                         read_checkpoint, read_log, refuse_damaged_tensors, refuse_damaged_values,
                         refuse_used, rows_to_read, saved_flags, set_random_state)
from data.loader import (DATA_FLAGS, TokenStream, TrainLoader, choose_data, count_val_tokens,
                         find_shards, length_at, length_phases, lengths_to_come, passes, to_device)
from data.text_to_bin import (ROOT, InputError, Kind, Parser, handled, integer, number, one_of,
                              owned, prefix_table, relative, show)
from facts import (FirstSteps, Laps, describe, describe_end, describe_plan, facts_wanted,
                   kernels_of, show_facts, tokens_of_step)
from kernels import keep_products, try_kernels, usable
from kernels.loss import (Fp8Linear, cross_entropy_chunk, linear_cross_entropy, product_dtype,
                          soft_cap)
from report import report_at_end, report_if_missing
from runtime import (MANY_TOKENS, MICRO_BATCH, Clock, Diverged, Energy, RowTable, Runtime, average,
                     bytes_of_averages, bytes_to_train, choose_device, choose_dtype, choose_gpus,
                     choose_micro_batch, compiled_or_not, data_parallel, distinct_rows,
                     drop_gradients, evaluate, gradients_of, joined_ranks, keep_graphs, launch,
                     measure_matmul_rate, meet_all, no_sync, own_card, peak_memory, ranks,
                     refuse_too_large, row_tables, run, shapes_of, shared_out, to_host)
from test_causality import is_finite, random_tokens, refuse_leaks, refuse_other_targets

LAPS = Laps(START)
LAPS.done("imports")

# -----------------------------------------------------------------------------
# flags: one table. GPTConfig, --help, range checks, presets and checkpoints come from it.


def parse_layers(text: str) -> tuple[int, ...]:
    """Return the layers of "3,9", sorted, none of "none"; raise ValueError otherwise."""
    parts = [] if text == "none" else text.split(",")
    return tuple(sorted({int(part) for part in parts if part.strip()}))


def parse_shares(text: str) -> tuple[tuple[int, float], ...]:
    """Return ((length, share), ...) of "512:0.3,1024:0.7"; raise ValueError otherwise."""
    pairs = [part.split(":") for part in text.split(",")]
    return tuple((int(length), float(share)) for length, share in pairs)


SWITCH = one_of(0, 1)
PRESENT = one_of(False, True)  # a flag without a value
# a smaller cap rounds all logits to the same: then no output depends on any token
SOFTCAP = Kind(float, lambda value: number(0, 1e6).accepts(value) and not 0 < value < 0.01,
               "a number >= 0 and <= 1e+06, but not between 0 and 0.01", "X")
TEXT = Kind(str, lambda value: isinstance(value, str), "text", "TEXT")
NAME = Kind(str, lambda value: isinstance(value, str) and value, "a name, not empty", "NAME")
LAYERS = Kind(parse_layers, lambda value: isinstance(value, tuple) and
              {*map(type, value)} <= {int}, "layer numbers such as 3,9, or none", "L,L")
SHARES = Kind(
    parse_shares, lambda parts: all(type(length) is int and length >= 2 and share > 0
                                    for length, share in parts) and
    math.isclose(sum(share for _, share in parts), 1, abs_tol=1e-6),
    "length:share,length:share,... with integer lengths >= 2 and shares > 0 that sum to 1",
    "T:SHARE,...")

# n_layer, n_embd; d12, d24, d36 and d48 are GPT-2's, d6 and d18 fill gaps, d1 and d4 are for CPUs
MODELS = {"d1": (1, 128), "d4": (4, 128), "d6": (6, 512), "d12": (12, 768), "d18": (18, 896),
          "d24": (24, 1024), "d36": (36, 1280), "d48": (48, 1600)}
# Filters have at most so many taps unless asked for, so a token costs the same at any length.
MOST_TAPS = 1024


@dataclass(frozen=True)
class Flag:
    """One line of the table."""

    name: str
    default: object
    kind: Kind
    help: str
    group: str
    common: bool  # shown by --help; --help all shows the others, too


FLAGS: dict[str, Flag] = {}


def table(group: str, *rows, common: bool = True):
    """Add rows (name, default, kind, help) to FLAGS."""
    for name, default, kind, text in rows:
        FLAGS[name] = Flag(name, default, kind, text, group, common)


table("shape", # GPTConfig's alone: --model sets the last two
      ("vocab_size", 50257, integer(1, 65536), "tokens"),
      ("n_layer", 12, integer(1, 1000), "layers"),
      ("n_embd", 768, integer(2, 100_000), "channels"))
table("model",
      ("preset", None, one_of("fineweb", "fineweb-4k", "shakespeare", "baseline"),
       "flags by name, see above"),
      ("model", "d12", one_of(*MODELS), "size: layers, heads and channels"),
      ("mixer", "afno", one_of("attn", "afno"), "what mixes tokens"),
      ("attn_layers", (), LAYERS, "layers that keep attention where the mixer is afno: the hybrid"),
      ("sequence_length", 1024, integer(2, 2**20), "tokens a row"),
      ("afno_form", "filter", one_of(*FORMS), "construction of the operator; reference leaks"))
table("model",
      ("n_head", None, integer(1, 10_000), "heads of attention (n_embd / 64)"),
      ("afno_state_layers", (), LAYERS, "AFNO layers of form state, whatever --afno_form says"),
      ("afno_num_blocks", 4, integer(1, 100_000), "diagonal blocks of AFNO's MLP"),
      ("afno_sparsity_threshold", 0.01, number(0, 1e6), "soft-shrink of the response"),
      ("afno_hard_thresholding_fraction", 1.0, number(0, 1, False), "share of the modes kept"),
      ("afno_filter_length", None, integer(1, 2**20), f"taps (the row's, at most {MOST_TAPS})"),
      ("afno_num_experts", 1, integer(1, 1000), "sets of weights of AFNO's MLP"),
      ("afno_routing", "frequency", one_of(*ROUTINGS), "what mixes experts; position is the lag"),
      ("afno_short_conv", 4, integer(1, 1024), "taps of the short convolution; 1: none"),
      ("afno_silu", 0, SWITCH, "SiLU after the short convolution, except in form state"),
      ("afno_token_taps", 0, integer(0, 64), "taps each token makes itself, except in form state"),
      ("copy_layers", (), LAYERS, "layers that add what followed the longest earlier matches"),
      ("position", "none", one_of("none", "learned", "sinusoidal", "fourier"),
       "what embeddings get; attention has rotary anyway"),
      ("swiglu", 0, SWITCH, "MLPs of silu(W1 x) V x instead of gelu(W1 x)"),
      ("qk_norm", 0, SWITCH, "rmsnorm of each attention head's query and key"),
      ("attn_short_conv", 1, integer(1, 1024), "taps over query, key and value; 1: none"),
      ("attn_gate", 0, SWITCH, "multiply each attention head's output by a gate of the token"),
      ("half_rotary", 0, SWITCH, "half of the rotary frequencies are 0, the rest from 1 to 1/1024"),
      ("value_residual", 0, SWITCH, "add a gated share of the first mixer's value to each value"),
      ("embedding_norm", 0, SWITCH, "rmsnorm after embedding and position"),
      ("logit_softcap", 0.0, SOFTCAP, "X: logits are X tanh(logits / X); 0: as they are"),
      ("embedding_residual", 0, SWITCH, "each block reads a x + b embedding; a and b are learned"),
      ("pair_rows", 0, integer(0, 10**8), "rows of the table of token pairs; 0: none"),
      ("value_tables", 0, SWITCH, "layers 1, 2 and the last three add a table's row to the value"),
      ("residual_bf16", 0, SWITCH, "residual stream in autocast's dtype instead of fp32"),
      ("depth_scale", 0, SWITCH, "scale mixers by (2 n_layer)^-0.5, as the baseline does"),
      common=False)
table("device",
      ("device", "auto", one_of("auto", "cuda", "cpu"), "auto: CUDA where there is any"),
      ("gpus", None, integer(1, 1024), "cards (as many as there are and divide the micro-batches)"),
      ("seed", 1337, integer(0, 2**63 - 1), "of initialisation and sampling; data order is fixed"))
table("device",
      ("dtype", None, one_of("bfloat16", "float32"), "of autocast (bfloat16 on CUDA, else 32)"),
      ("compile", None, SWITCH, "torch.compile, block by block (1 on CUDA, 0 on a CPU)"),
      ("fp8_head", 0, SWITCH, "fp8 products in the head while training, where the GPU has fp8"),
      ("fp8_mlp", 0, SWITCH, "fp8 in the MLPs' first product while training, likewise"),
      ("recompute", 0, SWITCH, "keep products alone for backward, compute the rest again; tried "
       "where few rows do not fit"), common=False)
table("data and output",
      ("input_bin", None, NAME, "training shards, a pattern (the preset's)"),
      ("input_val_bin", None, NAME, "validation shards, a pattern (the preset's)"),
      ("output_dir", None, NAME, "folder of logs and checkpoints (runs/<preset>-<changed flags>, "
       "where the same command goes on)"))
table("data and output",
      ("row_order", "stream", one_of("stream", "spread"),
       "training rows as they stand, or from all over the data, so that no document fills a batch"),
      ("new_pass", 0, SWITCH, "spread: resume with other data than before, once each row was read"),
      common=False)
table("optimization",
      ("batch_size", 16, integer(1, 2**16), "rows of a micro-batch on one device; left out, a GPU "
       "without memory for them takes fewer rows in more micro-batches"),
      ("grad_accumulation_steps", 32, integer(1, 2**16), "micro-batches a step, over all ranks"),
      ("num_iterations", 4768, integer(1), "steps"),
      ("extend", 0, integer(0), "steps more before the cooldown; shares stay of num_iterations. A "
       "run goes on from where its cooldown began, if it has begun"),
      ("optimizer", "adamw", one_of("adamw", "muon"), "Muon is for the blocks' projections"),
      ("learning_rate", 0.0018, number(0, 1e3, False), "of AdamW and Muon alike"),
      ("weight_decay", 0.1, number(0, 1e3),
       "on all weights but tables of rows, angles, time constants and factors"))
table("optimization",
      ("warmup_iters", None, integer(0), "steps that rise (256/4768 of num_iterations)"),
      ("warmdown_iters", None, integer(0), "steps that fall (the preset's share, or 1024/4768)"),
      ("final_lr_fraction", 0.0, number(0, 1), "of the learning rate, at the end"),
      ("momentum", 0.95, number(0, 0.9999), "Muon's"),
      ("beta1", 0.9, number(0, 0.9999), "AdamW's, of gradients"),
      ("beta2", 0.95, number(0, 0.999999), "AdamW's, of squared gradients"),
      ("rest_lr", None, number(0, 1e3, False), "AdamW's for all but embeddings (learning_rate)"),
      ("table_lr", 0.6, number(0, 1e3, False), "AdamW's for the tables of pairs and of values"),
      ("predict_ahead", 0, SWITCH, "train on the two tokens after the next, too, at first"),
      ("predict_prefix", 0, SWITCH, "train on the next token's longest prefix, too, at first"),
      ("curriculum", None, SHARES, "lengths of rows, each for a share of the steps, the last one "
       "--sequence_length; a micro-batch keeps its tokens"), common=False)
table("evaluation and checkpoints",
      ("val_loss_every", 128, integer(0), "steps; 0: at the end only"),
      ("save_every", 128, integer(0), "steps; 0: at the end, and as the cooldown begins"),
      ("save_minutes", 2.0, number(0, 1e6), "the most that a kill costs; 0: save by steps alone"),
      ("target_val_loss", None, number(0, 1e3, False), "stop there, report the time; not kept"),
      ("goal_val_loss", None, number(0, 1e3, False), "a target at which training goes on"),
      ("max_seconds", None, number(0, 1e9, False), "of wall clock: save, then stop"),
      ("resume", None, NAME, "auto: the newest checkpoint; or a file; flags left out are its own"),
      ("eval_only", False, PRESENT, "validate a checkpoint, at any --sequence_length"))
table("evaluation and checkpoints",
      ("val_batch_size", None, integer(1, 2**16), "rows (batch_size)"),
      ("val_tokens", None, integer(1), "targets, every one counts (at most 1,048,576)"),
      ("val_fp32", 0, SWITCH, "repeat the last validation in fp32, in which NoCap-Test validates"),
      common=False)
table("generation",
      ("generate", None, TEXT, "continue TEXT with a checkpoint"),
      ("max_new_tokens", 200, integer(1, 10**6), "tokens"),
      ("temperature", 0.8, number(0, 1e6), "0: the likeliest token"),
      ("top_k", 50, integer(1, 65536), "sample among so many"))

RECIPE = dict(  # of the hybrid and of its control alike; each gain and each loss is in LOG.md
    mixer="afno", optimizer="muon", learning_rate=0.0043, rest_lr=0.01, momentum=0.9, beta1=0.7,
    beta2=0.98, final_lr_fraction=0.1, row_order="spread", embedding_norm=1, logit_softcap=15.0,
    embedding_residual=1, qk_norm=1, attn_short_conv=4, attn_gate=1, half_rotary=1,
    value_residual=1, swiglu=1, afno_silu=1, afno_short_conv=1)
FINEWEB = dict(input_bin="data/fineweb10B/fineweb_train_*.bin",
               input_val_bin="data/fineweb10B/fineweb_val_*.bin", val_fp32=1)
# the hybrid on 0.5B tokens, a fifth of the baseline's, for 24 GB GPUs; 6 heads are for d12
HYBRID = FINEWEB | RECIPE | dict(
    model="d12", attn_layers=(5, 10), n_head=6, batch_size=32, grad_accumulation_steps=4,
    num_iterations=3800, warmdown_iters=1900, residual_bf16=1, fp8_head=1, fp8_mlp=1,
    pair_rows=262_144, value_tables=1, predict_ahead=1, predict_prefix=1)
PRESETS = {
    # the production run; the goal is NoCap-Test's, which validates rows of 1024
    "fineweb": HYBRID | dict(goal_val_loss=3.3821),
    "fineweb-4k": HYBRID | dict(sequence_length=4096, batch_size=8),
    # a small model on the plays, for a laptop: no soft cap, which is 28% of a CPU's step
    "shakespeare": RECIPE | dict(
        input_bin="data/shakespeare/train_*.bin", input_val_bin="data/shakespeare/val_*.bin",
        model="d4", attn_layers=(2,), sequence_length=256, batch_size=8, grad_accumulation_steps=1,
        num_iterations=120, warmdown_iters=60, val_loss_every=60, save_every=60, logit_softcap=0.0),
    # NoCap-Test's run: all else is the table's default
    "baseline": FINEWEB | dict(mixer="attn", depth_scale=1)}
THIS_COMMAND = ("preset", "output_dir", "device", "gpus", "compile", "resume", "eval_only",
                "generate", "max_seconds", "max_new_tokens", "temperature", "top_k",
                "new_pass")  # of one command: not a checkpoint's to set
SAME_RUN = {*THIS_COMMAND, "extend", "save_every", "save_minutes", "val_loss_every",
            "target_val_loss", "goal_val_loss"}  # the folder's name does not depend on these
DEFAULTS = {flag.name: flag.default for flag in FLAGS.values() if flag.group != "shape"}
CONFIG_FLAGS = [flag for flag in FLAGS.values()
                if flag.group in ("shape", "model") and flag.name not in ("preset", "model")]


@dataclass
class GPTConfig(make_dataclass("Fields", [(f.name, object, f.default) for f in CONFIG_FLAGS])):
    """The model's shape: the flags of the group model, and vocab_size, n_layer, n_embd.

    Raises InputError naming the field, which is the flag, and its allowed range.
    """

    def __post_init__(self):
        if self.n_head is None:
            self.n_head = max(1, self.n_embd // 64)
        if self.afno_filter_length is None:
            self.afno_filter_length = min(self.sequence_length, MOST_TAPS)
        lists = [flag.name for flag in CONFIG_FLAGS if flag.kind is LAYERS]
        vars(self).update({name: tuple(getattr(self, name)) for name in lists})  # JSON has lists
        for flag in CONFIG_FLAGS:
            value = getattr(self, flag.name)
            if not flag.kind.accepts(value):
                raise InputError(f"--{flag.name} must be {flag.kind.words}, got {value}")
        if self.n_embd % (2 * self.n_head):
            raise InputError(f"--n_head: twice the heads must divide n_embd {self.n_embd}, "
                             f"got {self.n_head} heads")
        if self.mixer == "attn":  # so that --mixer attn is right whatever a preset says of AFNO
            self.attn_layers = self.afno_state_layers = ()
        for name in lists:
            for layer in getattr(self, name):
                if not 0 <= layer < self.n_layer:
                    raise InputError(f"--{name} must be in 0 ... {self.n_layer - 1}, got {layer}")
        if both := {*self.attn_layers} & {*self.afno_state_layers}:
            raise InputError("--afno_state_layers and --attn_layers must be different layers, "
                             f"got {min(both)} in both")
        try:
            check_arguments(**self.afno_arguments())
        except ValueError as error:
            raise InputError(f"--afno_{error}") from None

    def afno_arguments(self, layer: int | None = None) -> dict:
        """Return AFNO1D's arguments in this layer, or in a layer of afno_form where it is None."""
        named = {name.removeprefix("afno_"): value for name, value in vars(self).items()
                 if name.startswith("afno_")}
        if layer in named.pop("state_layers"):
            named["form"] = "state"
        return dict(hidden_size=self.n_embd, **named)

    def value_layers(self) -> list[int]:
        """Return the layers that have a table of values; none without --value_tables."""
        n = self.n_layer
        return sorted({1, 2, n - 3, n - 2, n - 1} & {*range(n)}) if self.value_tables else []

    def mixer_of(self, layer: int) -> str:
        return "attn" if self.mixer == "attn" or layer in self.attn_layers else "afno"


# -----------------------------------------------------------------------------
# model


def rotary_tables(position: Tensor, size: int, half: bool = False) -> tuple[Tensor, Tensor]:
    """Return cos and sin, (T, size / 2) each, of positions (T,) (Su et al., 2021, base 10000).

    With half, half of the frequencies, rounded up, go from 1 to 1/1024, and the others are 0: what
    does not turn compares contents wherever they are (modded-nanogpt, Jordan et al., 2024).
    """
    like = dict(device=position.device, dtype=position.dtype)
    if half:
        turning = (size // 2 + 1) // 2
        frequency = 1024.0 ** -torch.linspace(0, 1, turning, **like)
        frequency = F.pad(frequency, (0, size // 2 - turning))
    else:
        frequency = 10000.0 ** -(torch.arange(0, size, 2, **like) / size)
    angle = torch.outer(position, frequency)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the halves (x1, x2) of x, (B, n_head, T, head_dim), by minus their position's angle."""
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * cos + x2 * sin, -x1 * sin + x2 * cos), -1).type_as(x)


class Gates(nn.Module):
    """Make gates (..., number) of h (..., C): 2 sigmoid(w times the first channels of h).

    w begins as zero, so every gate begins as 1.
    """

    channels = 32  # at most

    def __init__(self, number: int, n_embd: int):
        super().__init__()
        # not called weight: those are Muon's
        self.w = nn.Parameter(torch.zeros(number, min(self.channels, n_embd)))

    def forward(self, h: Tensor) -> Tensor:
        return 2 * torch.sigmoid(F.linear(h[..., : self.w.size(1)], self.w))

    def times(self, x: Tensor, h: Tensor) -> Tensor:
        """Return x, (..., C), times the gates of h; each gate has C / number channels."""
        gate = self(h)
        return (gate.unsqueeze(-1) * x.unflatten(-1, (gate.size(-1), -1))).flatten(-2)


class CausalSelfAttention(nn.Module):
    """Mix tokens by attention; its methods are the contract of all mixers (afno.AFNO1D).

    With attn_short_conv > 1 query, key and value are convolved channel by channel with taps that
    begin as the identity (So et al., 2021, "Primer"). With attn_gate Gates of the token multiply
    the heads' outputs (Qiu et al., 2025, "Gated attention for large language models").
    """

    filters = None  # attention has no taps

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.qk_norm = config.n_head, config.qk_norm
        C, taps = config.n_embd, config.attn_short_conv
        self.c_attn = nn.Linear(C, 3 * C, bias=False)  # query | key | value
        self.short_conv = ShortConv(3 * C, taps) if taps > 1 else None
        self.gate = Gates(config.n_head, C) if config.attn_gate else None
        self.c_proj = nn.Linear(C, C, bias=False)

    def project(self, h: Tensor) -> Tensor:
        """Return z, query | key | value, (..., 3 C)."""
        return self.c_attn(h)

    def value(self, z: Tensor) -> Tensor:
        """Return the value before its convolution, (..., C)."""
        return z.chunk(3, -1)[2]

    def mix(self, z: Tensor, h: Tensor, added: Tensor | None, rotary: tuple[Tensor, Tensor],
            taps=None) -> Tensor:
        """Return attention's output, (B, T, C), from z = project(h).

        added: (B, T, C) or None, is added to the value. rotary: rotary_tables of the positions.
        """
        z = z if self.short_conv is None else self.short_conv(z)
        q, k, v = self.heads(z, rotary, added)
        return self.output(F.scaled_dot_product_attention(q, k, v, is_causal=True), h)

    def step(self, z: Tensor, h: Tensor, added: Tensor | None, rotary: tuple[Tensor, Tensor],
             state: tuple | None, window: int) -> tuple[Tensor, tuple]:
        """Return mix() for one more token, (B, C), and the state for the next.

        The state, None at first, has the last `window` keys and values, and the convolution's
        inputs.
        """
        inputs = None
        if self.short_conv is not None:
            z, inputs = self.short_conv.step(z, None if state is None else state[2])
        q, k, v = self.heads(z[:, None], rotary, None if added is None else added[:, None])
        if state is not None:
            k, v = (torch.cat((old, new), 2)[:, :, -window:] for old, new in zip(state, (k, v)))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.output(y, h[:, None])[:, 0], (k, v, inputs)

    def heads(self, z: Tensor, rotary: tuple[Tensor, Tensor], added: Tensor | None):
        """Return query, key and value, three of (B, n_head, T, head_dim)."""
        q, k, v = z.chunk(3, -1)
        v = v if added is None else v + added
        q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in (q, k, v))
        if self.qk_norm:
            q, k = rmsnorm(q), rmsnorm(k)
        return rotate(q, *rotary), rotate(k, *rotary), v

    def output(self, y: Tensor, h: Tensor) -> Tensor:
        """Return (B, T, C) from the heads' outputs y (B, n_head, T, head_dim)."""
        if self.gate is not None:
            y = y * self.gate(h).mT.unsqueeze(-1)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Compute W2 gelu(W1 x), or with swiglu W2 (silu(W1 x) V x), of x (..., C).

    swiglu takes two thirds of the hidden channels, so about as many parameters (Shazeer, 2020, "GLU
    variants improve transformer"). W1 | V are c_fc, W2 is c_proj. With fp8, W1 x and V x are
    Fp8Linear's while training; rows of x then have a root mean square of at most 1.
    """

    fp8 = False

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.swiglu, C = config.swiglu, config.n_embd
        # a multiple of 16, as tensor cores want it
        hidden = math.ceil(4 * C / 24) * 16 if self.swiglu else 4 * C
        self.c_fc = nn.Linear(C, 2 * hidden if self.swiglu else hidden, bias=False)
        self.c_proj = nn.Linear(hidden, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.fp8 and torch.is_grad_enabled():
            rows = x.flatten(0, -2).to(product_dtype(x))
            hidden = Fp8Linear.apply(rows, self.c_fc.weight).unflatten(0, x.shape[:-1])
        else:
            hidden = self.c_fc(x)
        if self.swiglu:
            gate, hidden = hidden.chunk(2, -1)
            return self.c_proj(F.silu(gate) * hidden)
        return self.c_proj(F.gelu(hidden))


class Block(nn.Module):
    """Mixer, then MLP, each on the normed residual stream.

    With embedding_residual the stream comes in as a x + b x0, where x0 is the embedding. With
    value_residual each mixer's value is its own plus c g v0 (Zhou et al., 2024, "Value residual
    learning"): v0 is the first mixer's value, g are Gates of what the mixer reads, one for
    value_channels channels (Karpathy, 2025, nanochat). With value_tables some layers add g' times a
    row of their own table, g' Gates likewise. With pair_rows p g'' times the row of the token's
    pair is added to the mixer's output (modded-nanogpt, 2026). In copy_layers, m f times the mean
    embedding of what followed each set of longest_matches is added, too: an m for each of KINDS, f
    Gates. a, b, c, p and m are learned; they begin at 1, 0, 0, 0.05 and 0.
    """

    recompute = False  # compute what is cheap again in backward, instead of keeping it
    value_channels = 64  # that share a gate, or the largest power of two that divides n_embd

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        C, residual = config.n_embd, config.value_residual
        self.scale = (2 * config.n_layer) ** -0.5 if config.depth_scale else 1.0
        mix = nn.Parameter(torch.tensor([1.0, 0.0])) if config.embedding_residual else None
        self.embedding_mix = mix  # a, b
        gates = lambda: Gates(C // math.gcd(self.value_channels, C), C)
        self.value_mix = nn.Parameter(torch.zeros(())) if residual else None  # c
        self.value_gate = gates() if residual else None  # g
        self.table_gate = gates() if layer in config.value_layers() else None  # g'
        self.pair_mix = nn.Parameter(torch.tensor(0.05)) if config.pair_rows else None  # p
        self.pair_gate = Gates(1, C) if config.pair_rows else None  # g''
        self.copy_gate = Gates(2, C) if layer in config.copy_layers else None  # f
        self.copy_mix = nn.Parameter(torch.zeros(KINDS)) if self.copy_gate else None  # m
        if config.mixer_of(layer) == "attn":
            self.mixer = CausalSelfAttention(config)
        else:
            self.mixer = AFNO1D(**config.afno_arguments(layer))
        self.mlp = MLP(config)

    def forward(self, x: Tensor, v0: Tensor | None, inputs: tuple, rotary,
                taps: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return x and v0, (B, T, C), for the next layer.

        inputs: x0, the row of the token's pair, that of the layer's table of values, each (B, T, C)
        or None, and two sets to copy, or None: mean embeddings (B, T, 2, C), and kinds, one-hot.
        """
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.residual, x, v0, inputs, rotary, taps, use_reentrant=False,
                              preserve_rng_state=False, context_fn=keep_products)
        return self.residual(x, v0, inputs, rotary, taps)

    def residual(self, x, v0, inputs, rotary, taps):
        mix = lambda z, h, added: self.mixer.mix(z, h, added, rotary, taps)
        return self.around(x, v0, inputs, mix)

    def step(self, x: Tensor, v0: Tensor | None, inputs: tuple, rotary, state: tuple | None,
             window: int) -> tuple[Tensor, Tensor | None, tuple]:
        """Return (x, v0, state) of forward for one more token, (B, C); the first state is None."""
        def mix(z: Tensor, h: Tensor, added: Tensor | None) -> Tensor:
            nonlocal state
            y, state = self.mixer.step(z, h, added, rotary, state, window)
            return y

        x, v0 = self.around(x, v0, inputs, mix)
        return x, v0, state

    def around(self, x, v0, inputs, mix) -> tuple[Tensor, Tensor | None]:
        """Return (x, v0) after the layer; mix(z, h, added) is the mixer's output."""
        x0, pair, value, copied = inputs
        if self.embedding_mix is not None:
            x = self.embedding_mix[0] * x + self.embedding_mix[1] * x0
        h = rmsnorm(x)
        z, added = self.mixer.project(h), None
        if self.value_mix is not None:
            v0 = self.mixer.value(z) if v0 is None else v0
            added = self.value_mix * self.value_gate.times(v0, h)
        if self.table_gate is not None:
            row = self.table_gate.times(value, h)
            added = row if added is None else added + row
        x = x + self.scale * mix(z, h, added)
        if self.pair_mix is not None:
            x = x + self.pair_mix * self.pair_gate.times(pair, h)
        if self.copy_mix is not None:
            rows, kind = copied
            factor = kind @ self.copy_mix.to(kind.dtype) * self.copy_gate(h)
            x = x + (factor.unsqueeze(-1) * rows).sum(-2)
        return x + self.mlp(rmsnorm(x)), v0


class PairTable(RowTable):
    """Give each token a row for the pair that it makes with the token before, zero at first.

    Pairs of one hash share a row. The 0 before the first token is a token like any other.
    """

    def reset_parameters(self):
        nn.init.zeros_(self.weight)

    def rows(self, idx: Tensor, before: Tensor) -> Tensor:
        """Return the rows of the tokens idx and of those before them, (...)."""
        key = (before * 50257 + idx) * 2654435761 & 0xffffffff  # Fibonacci hashing; below 2^63
        return key * self.num_embeddings >> 32

    def forward(self, idx: Tensor, before: Tensor) -> Tensor:
        return super().forward(self.rows(idx, before))


class ValueTable(RowTable):
    """Give each token a row that is added to a layer's value, small at first."""

    def reset_parameters(self):
        nn.init.normal_(self.weight, std=0.01)


class Head(nn.Linear):
    """Turn normed hidden states into logits, or into the loss without keeping the logits."""

    fp8 = False  # products in fp8 while training

    def __init__(self, config: GPTConfig):
        super().__init__(config.n_embd, config.vocab_size, bias=False)
        self.cap, self.chunk = config.logit_softcap, cross_entropy_chunk

    def logits(self, x: Tensor) -> Tensor:
        """Return (..., vocab_size) for hidden states (..., C)."""
        return soft_cap(self(x), self.cap)

    def loss(self, x: Tensor, targets: Tensor,
             shares: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the mean loss, and every target's without gradient, in the shape of targets.

        x: (B, T, C). targets: (B, T) int64; -1 does not count. With shares, (K,), targets are (B,
        T, K), and the mean is of their losses weighed by these.
        """
        x = x.view(-1, x.size(-1))
        mean, losses = linear_cross_entropy(x, self.weight, targets.reshape(len(x), -1), self.cap,
                                            self.fp8, self.chunk, shares)
        return mean, losses.view(targets.shape)


class GPT(nn.Module):
    """A GPT-2. Mixers mix tokens, and so do PairTable (the token before) and copy_layers."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config, C = config, config.n_embd
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, C),
            h=nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
        ))
        self.lm_head = Head(config)
        self.transformer.wte.weight = self.lm_head.weight  # one tensor, with nn.Linear's start
        self.pairs = PairTable(config.pair_rows, C) if config.pair_rows else None
        self.values = nn.ModuleDict({str(layer): ValueTable(config.vocab_size, C)
                                     for layer in config.value_layers()})
        if config.position == "learned":
            self.transformer.wpe = nn.Embedding(config.sequence_length, C)
            nn.init.uniform_(self.transformer.wpe.weight, -C**-0.5, C**-0.5)  # as wte begins
        elif config.position == "fourier":
            self.transformer.wpe = FourierGate(C)
        self.taps_at_once = taps_at_once

    def compile(self):
        """Compile block by block, the filters and the loss; equal layers share one compilation."""
        # complex numbers of the forms hilbert and dyadic run as they would without compilation
        for text in (".*does not support code generation for complex operators",
                     ".*TensorFloat32 tensor cores"):  # fp32 is to mean fp32
            warnings.filterwarnings("ignore", message=text)
        # attention and AFNO, training and evaluation, a curriculum's lengths
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.optimize_ddp = False  # it would cut a block's graph on several ranks
        keep_graphs()
        for block in self.transformer.h:
            block.compile(dynamic=False)
        self.taps_at_once = torch.compile(taps_at_once, dynamic=False)
        self.lm_head.chunk = torch.compile(cross_entropy_chunk, dynamic=False)

    def check_length(self, T: int):
        """Raise InputError where T tokens are more than the model has positions for."""
        most = self.config.sequence_length
        if self.config.position == "learned" and T > most:
            raise InputError(f"--position learned has a table of {most} positions: "
                             f"--sequence_length, or prompt and --max_new_tokens, is too long, {T}")

    def embed(self, idx: Tensor, start: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return embeddings (B, T, C) of tokens (B, T), and attention's rotary tables.

        The tokens are at positions start ... start + T - 1.
        """
        config, C = self.config, self.config.n_embd
        x, stop = self.transformer.wte(idx), start + idx.size(1)
        self.check_length(stop)
        position = torch.arange(start, stop, device=x.device, dtype=x.dtype)
        if config.position == "learned":
            x = x + self.transformer.wpe.weight[start:stop]
        elif config.position != "none":
            g = torch.cat(rotary_tables(position, C), -1)
            if config.position == "fourier":
                x = self.transformer.wpe(x, g).type_as(x)
            else:  # sines have mean square 1/2, embeddings at initialisation 1/(3C)
                x = x + g * math.sqrt(2 / (3 * C))
        if config.embedding_norm:
            x = rmsnorm(x)
        if config.residual_bf16:
            x = x.to(product_dtype(x))
        return x, rotary_tables(position, C // config.n_head, bool(config.half_rotary))

    def taps(self) -> dict[int, Tensor]:
        """Return the filters, (num_filters, filter_length), of every layer that has some.

        They are made at once, outside of autocast and of the blocks' graphs: a compiled block would
        make their gradients with bf16 products.
        """
        makers = {layer: block.mixer.filters for layer, block in enumerate(self.transformer.h)
                  if block.mixer.filters is not None}
        if not makers:
            return {}
        # with gradients for validation, too: then one graph serves both
        kind = self.lm_head.weight.device.type
        with torch.enable_grad(), torch.autocast(kind, enabled=False):
            return dict(zip(makers, self.taps_at_once(list(makers.values()))))

    def layers(self, x: Tensor, idx: Tensor, before: Tensor, matches, run) -> Tensor:
        """Return normed hidden states, (..., C), of embeddings x of the tokens idx, (...).

        before: those before them. matches: longest_matches' or None. run: Block, by its number.
        """
        look_up = lambda table, *tokens: table(*tokens).to(product_dtype(x))
        pair = None if self.pairs is None else look_up(self.pairs, idx, before)
        # x0 only where it is used: it may make block 0 a graph of its own
        x0, v0 = x if self.config.embedding_residual else None, None
        copied = matches and [part.to(product_dtype(x)) for part in (mean_rows(
            self.lm_head.weight, matches[0]), F.one_hot(matches[1], 1 + KINDS)[..., 1:])]
        for layer in range(self.config.n_layer):
            key = str(layer)
            value = look_up(self.values[key], idx) if key in self.values else None
            x, v0 = run(layer, x, v0, (x0, pair, value, copied))
        return rmsnorm(x)

    def hidden(self, idx: Tensor) -> Tensor:
        """Return normed hidden states before the head, (B, T, C), of tokens (B, T)."""
        (x, rotary), taps = self.embed(idx, 0), self.taps()
        run = lambda layer, x, v0, inputs: self.transformer.h[layer](
            x, v0, inputs, rotary, taps.get(layer))
        matches = longest_matches(idx) if self.config.copy_layers else None
        return self.layers(x, idx, F.pad(idx, (1, 0))[:, :-1], matches, run)

    def meet(self, idx: Tensor):
        """Let each RowTable meet the rows that tokens (B, T) on the CPU look up."""
        if self.pairs is not None:
            before = F.pad(idx, (1, 0))[:, :-1]
            self.pairs.meet(distinct_rows(self.pairs.rows(idx, before), self.pairs.weight))
        tokens = distinct_rows(idx, self.lm_head.weight) if self.values else None  # as many rows
        for table in self.values.values():
            table.meet(tokens)

    @torch.no_grad()
    def step(self, idx_t: Tensor, state: tuple | None, window: int) -> tuple[Tensor, tuple]:
        """Return hidden() for one more token, (B, C) of (B,), and the state for the next.

        The first state is None; a state is used once. The numbers are hidden's, but attention looks
        back at most `window` tokens.
        """
        t, states, before, seen = state or (
            0, [None] * self.config.n_layer, torch.zeros_like(idx_t), None)
        (x, rotary), states = self.embed(idx_t[:, None], t), list(states)

        def run(layer: int, x: Tensor, v0: Tensor | None, inputs: tuple):
            x, v0, states[layer] = self.transformer.h[layer].step(
                x, v0, inputs, rotary, states[layer], window)
            return x, v0

        matches, seen = newest_matches(idx_t, seen, window) if self.config.copy_layers \
            else (None, None)
        return self.layers(x[:, 0], idx_t, before, matches, run), (t + 1, states, idx_t, seen)

    def forward(self, idx: Tensor, targets: Tensor | None = None, return_logits: bool = True,
                shares: Tensor | None = None):
        """Return (logits (B, T, vocab_size) or None, mean loss or None) of tokens (B, T).

        targets: (B, T) int64; -1 does not count. shares: Head.loss's.
        """
        x = self.hidden(idx)
        loss = None if targets is None else self.lm_head.loss(x, targets, shares)[0]
        return (self.lm_head.logits(x) if return_logits else None), loss


# -----------------------------------------------------------------------------
# optimizers


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) over views of parameters; stacked projections go one by one.

    torch.optim.Muon's updates (torch 2.8 has none), but all matrices of a shape are one batch: one
    by one their products are too small to fill a GPU. lr is scaled by 0.2 sqrt(max(rows,
    columns)), so that an update has AdamW's usual size (Moonshot AI, 2025). Ranks share the work.
    """

    def __init__(self, stacks: list[tuple[nn.Parameter, int | tuple[int, ...]]], lr: float,
                 weight_decay: float, momentum: float):
        """stacks: (parameter, rows of the matrices stacked in it: of each, or of all alike)."""
        self.stacks = [(p, p.detach().split(rows)) for p, rows in stacks]
        super().__init__([matrix for _, matrices in self.stacks for matrix in matrices],
                         dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @staticmethod
    def orthogonalize(G: Tensor) -> Tensor:
        """Return roughly U V^T of each G (n, rows, columns), bf16, by Newton-Schulz steps."""
        tall = G.size(1) > G.size(2)
        X = G.mT if tall else G
        X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
        for _ in range(5):
            A = X @ X.mT
            A = torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315)
            X = torch.baddbmm(X, A, X, beta=3.4445)
        return X.mT.contiguous() if tall else X

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        by_shape = {}
        for p, matrices in self.stacks:
            for matrix, gradient in zip(matrices, p.grad.split([*map(len, matrices)])):
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                row = (matrix, gradient, state["momentum_buffer"])
                by_shape.setdefault(matrix.shape, []).append(row)
        updates = {}
        for shape, batch in by_shape.items():
            _, gradients, averages = map(list, zip(*batch))
            torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
            nesterov = torch._foreach_lerp(gradients, averages, group["momentum"])
            stacked = torch.stack([part.bfloat16() for part in nesterov])
            updates[shape] = shared_out(self.orthogonalize, stacked)
        for shape, batch in by_shape.items():  # one shape's updates travel while others are made
            matrices, rate = [row[0] for row in batch], group["lr"] * 0.2 * math.sqrt(max(shape))
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(matrices, updates.pop(shape)().float().unbind(), alpha=-rate)

    def zero_grad(self):
        for p, _ in self.stacks:
            p.grad = None


class RowAdam(torch.optim.Optimizer):
    """Adam without momentum for tables of which a step meets few rows: the others do not move.

    A row's second moment is one number, the mean square of its channels. It decays by beta2 in
    every step. It is not bias-corrected, so a row's first update is 1 / sqrt(1 - beta2) = 4.5 rates
    long. There is no momentum: it would move rows that no token of the step has met.
    """

    def __init__(self, tables: list[RowTable], lr: float, beta2: float = 0.95, eps: float = 1e-10):
        self.tables = tables
        super().__init__([table.weight for table in tables], dict(lr=lr, beta2=beta2, eps=eps))

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        for table in self.tables:
            p, (rows, few, _), state = table.weight, table.met, self.state[table.weight]
            if not state:
                state["square"] = p.new_zeros(len(p), 1)
            mean = torch.zeros_like(state["square"])
            mean[rows] = few.grad.norm(dim=1, keepdim=True).square() / p.size(1)
            square = state["square"].lerp_(mean, 1 - group["beta2"])[rows]
            p[rows] = few.addcdiv_(few.grad, square.sqrt() + group["eps"], value=-group["lr"])


def embedding_tables(model: GPT) -> set[nn.Parameter]:
    """Return all embeddings' weights: tokens' (the head's, too), positions' and RowTables'."""
    return {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}


# Places, logarithms and factors, for which zero is no neutral value: they do not decay.
PLACES = ("log_angle", "centre", "log_decay", "log_width", "embedding_mix", "value_mix", "pair_mix",
          "copy_mix")


def make_optimizers(model: GPT, name: str, learning_rate: float, weight_decay: float,
                    rest_lr: float | None = None, betas: tuple[float, float] = (0.9, 0.95),
                    momentum: float = 0.95, table_lr: float = 0.6) -> list[torch.optim.Optimizer]:
    """Return the optimizers: adamw, one AdamW; muon, Muon for the blocks' matrices and AdamW.

    AdamW has the rest, AFNO's MLPs among them: many small matrices, to which Muon brings nothing.
    With rest_lr what is neither Muon's nor an embedding has that learning rate. betas are AdamW's.
    Tables of pairs and of values have RowAdam with table_lr, and no decay: a row is seldom met, and
    then has to learn at once (modded-nanogpt's rate).
    """
    stacks, tables, rows, groups = {}, embedding_tables(model), row_tables(model), {}
    if name == "muon":
        for block in model.transformer.h:
            for key, p in block.named_parameters():
                if key == "mixer.c_attn.weight":
                    stacks[p] = p.size(1)  # query, key and value
                elif key == "mixer.c_in.weight":  # in the form state value, key and query
                    stacks[p] = getattr(block.mixer, "stacked", len(p))
                elif key.endswith(".weight") and p.ndim == 2 and p not in tables:
                    stacks[p] = len(p) // (1 + (key == "mlp.c_fc.weight" and model.config.swiglu))
    for key, p in model.named_parameters():
        if p not in stacks and key not in rows:
            is_place, has_rest_lr = key.endswith(PLACES), rest_lr is not None and p not in tables
            group = dict(params=[], lr=rest_lr if has_rest_lr else learning_rate,
                         weight_decay=0.0 if is_place else weight_decay)
            groups.setdefault((has_rest_lr, is_place), group)["params"].append(p)
    optimizers = [torch.optim.AdamW(list(groups.values()), betas=betas,
                                    fused=model.lm_head.weight.device.type != "meta")]
    if stacks:
        optimizers.append(Muon(list(stacks.items()), learning_rate, weight_decay, momentum))
    if rows:
        optimizers.append(RowAdam(list(rows.values()), table_lr))
    return optimizers


def learning_rate_factor(step: int, num_iterations: int, warmup_iters: int, warmdown_iters: int,
                         final: float = 0.0) -> float:
    """Return the factor of the update after `step` updates: up to 1, constant, down to `final`."""
    if step < warmup_iters:
        return (step + 1) / warmup_iters
    left = min(1.0, (num_iterations - step) / max(warmdown_iters, 1))
    return final + (1 - final) * left


def shares_at(done: float, ahead: bool, prefix: bool) -> tuple[list[float], float]:
    """Return the weights of the tokens after the next one, and of the next one's prefix.

    done: the part of the steps that is done, [0, 1]. The next token's own weight is 1. In the first
    third the next but one has 1/2, the one after it 1/4 that falls to 0, the prefix 1/4. In the
    second third 1/2 and the prefix's 1/4 fall to 0 (modded-nanogpt's schedule).
    """
    third, part = divmod(3 * done, 1)
    ahead_shares = {0: [0.5, 0.25 * (1 - part)], 1: [0.5 * (1 - part)]}.get(third, [])
    prefix_share = {0: 0.25, 1: 0.25 * (1 - part)}.get(third, 0.0)
    return ahead_shares if ahead else [], prefix_share if prefix else 0.0


# -----------------------------------------------------------------------------
# training; checkpoints and the log are in checkpoints.py, ranks and clocks in runtime.py


CHECKPOINT_FLAGS = dict(config={flag.name: flag for flag in CONFIG_FLAGS},
                        args={name: FLAGS[name] for name in DEFAULTS})


def sound(state: dict, path: Path) -> dict:
    """Return the checkpoint in this version's names.

    Raises OtherVersion or, where it does not hold what its own config and flags make, any other.
    """
    state = of_this_version(state, path, CHECKPOINT_FLAGS)
    refuse_damaged_values(state, CHECKPOINT_FLAGS["args"])
    model = shapes_of(GPT, GPTConfig(**state["config"]))
    flags = ("optimizer", "learning_rate", "weight_decay", "rest_lr")
    refuse_damaged_tensors(state, model, lambda: make_optimizers(
        model, *(state["args"].get(name) for name in flags)))
    return state


def flops_per_token(model: GPT, T: int) -> float:
    """Return the FLOPs of forward and backward: 6 a parameter, and 12 C a key that attention sees.

    A query sees T/2 keys on average. Look-ups, convolutions and MLPs run once a step do not count.
    """
    mixers = [block.mixer for block in model.transformer.h]
    attention = sum(isinstance(mixer, CausalSelfAttention) for mixer in mixers)
    free = embedding_tables(model) - {model.lm_head.weight}
    free.update(*(m.made_once.parameters() for m in mixers if getattr(m, "made_once", None)))
    parameters = sum(p.numel() for p in {*model.parameters()} - free)
    return 6 * parameters + 12 * attention * model.config.n_embd * T / 2


def choose_fp8(model: GPT, args, device: torch.device, dtype: torch.dtype) -> str | None:
    """Turn fp8 on where it is asked for and works; return what to say of it, if anything."""
    asked = (("the head", args.fp8_head), ("the MLPs' first layers", args.fp8_mlp))
    names = " and of ".join(name for name, chosen in asked if chosen)
    if not names:
        return None
    works, why = usable("fp8", device, dtype)
    model.lm_head.fp8 = works and bool(args.fp8_head)
    for block in model.transformer.h:
        block.mlp.fp8 = works and bool(args.fp8_mlp)
    return f"products of {names}: {why}"


class Run:
    """One training run: its model, data, optimizers and files, and where it stands."""

    def __init__(self, args, config: GPTConfig, runtime: Runtime, saved: dict | None, folder: Path):
        self.args, self.config, self.runtime, self.signals = args, config, runtime, []
        self.device, self.folder = runtime.device, folder
        self.T, self.total_steps = config.sequence_length, args.num_iterations + args.extend
        self.first_steps = FirstSteps(LAPS, self.say)
        self.cooldown = cooldown_step(vars(args))  # the step at which it begins
        self.lengths = length_phases(args, self.T, runtime.world)
        # updates done, tokens consumed
        self.step, self.position = (saved["step"], saved["position"]) if saved else (0, 0)
        if self.step > self.total_steps:
            raise InputError(f"--num_iterations (and --extend) must be >= {self.step}, the step of "
                             f"the checkpoint, got {self.total_steps}")
        # before the model: what is wrong with data should not wait for it
        self.open_data(saved or {})
        torch.manual_seed(args.seed)
        self.model = GPT(config).to(self.device)
        if saved:  # before there is a log: weights that do not fit must cost nothing
            load_weights(self.model, saved.pop("model"), folder)
        self.log = RunLog(folder, self.step if saved else -1) if runtime.rank == 0 else None
        self.checkpoints = Checkpoints(folder)
        self.say(f"command: {shlex.join(map(relative, sys.argv))}"
                 + (f", resumed at step {self.step}" if saved else ""))
        self.optimizers = make_optimizers(
            self.model, args.optimizer, args.learning_rate, args.weight_decay, args.rest_lr,
            (args.beta1, args.beta2), args.momentum, args.table_lr)
        self.rates = [[group["lr"] for group in optimizer.param_groups]
                      for optimizer in self.optimizers]  # at a factor of 1
        if args.predict_prefix:
            self.prefixes = torch.tensor(prefix_table(config.vocab_size), device=self.device)
        self.exact = bool(args.val_fp32) and runtime.dtype != torch.float32  # the loss that decides
        self.pending, self.checked, spent = None, None, saved or dict.fromkeys(TIMES, 0.0)
        self.end_average = lambda: None  # ends the averaging of tables' gradients over ranks
        if saved:
            load_optimizers(self.optimizers, saved.pop("optimizers"), folder)
            set_random_state(saved["rng"], self.device)
        self.compile_time, self.past_wall = spent["compile_time_s"], spent["wall_time_s"]
        try_kernels(kernels_of(config, args), self.device, runtime.dtype)
        self.fp8 = choose_fp8(self.model, args, self.device, runtime.dtype)
        self.clock = Clock(self.device, spent["train_time_s"])
        self.energy = Energy(runtime)
        self.restore_progress(saved)

    def open_data(self, saved: dict):
        """Open the shards; a pass that has begun goes on with the same rows."""
        args = self.args
        self.stream = TokenStream(args.input_bin, self.config.vocab_size, "input_bin")
        self.val_stream = TokenStream(args.input_val_bin, self.config.vocab_size, "input_val_bin")
        self.val_tokens = count_val_tokens(args.val_tokens, self.val_stream)
        self.passes = passes(self.stream, saved, args, self.T)
        self.open_loader()

    def open_loader(self):
        """Read micro-batches of batch_size rows from where the run stands."""
        args, runtime = self.args, self.runtime
        self.tokens = args.batch_size * self.T  # of a micro-batch
        self.loader = TrainLoader(self.stream, args.batch_size, self.T, self.position, runtime.rank,
                                  runtime.world, self.device, args.row_order, self.passes)

    def restore_progress(self, saved: dict | None):
        """Note what is done already: saved, validated, the target reached."""
        args, any_rank = self.args, self.runtime.any_rank
        on_disk, past = self.checkpoints.steps(), self.log.validations if self.log else []
        there = bool(saved) and self.step in on_disk and saved["args"] == args.to_save
        self.saved_step = self.step if any_rank(there) else None
        self.saved_at = time.perf_counter()
        self.reached = None  # not yet: decides reads it
        self.target = args.target_val_loss or args.goal_val_loss or -math.inf
        if past and past[-1]["step"] == self.step and "val_loss_fp32" not in past[-1] \
                and self.exact and self.decides(past[-1]["val_loss"]):
            self.log.validations.pop()  # a signal came before the loss that decides: again
        hits = self.log.hits(self.target) if self.log else []
        self.reached = (hits or [self.clock.total])[0] if any_rank(bool(hits)) else None
        self.validated = self.step if any_rank(self.step in [v["step"] for v in past]) else None
        self.checkpoints.keep["cooldown"] = None if hits else self.cooldown

    def say(self, text: str):
        if self.runtime.rank == 0:
            from tqdm import tqdm
            tqdm.write(text)
            self.log.line(text)

    def wall_time(self) -> float:
        return self.past_wall + time.perf_counter() - START

    def interrupted(self) -> bool:
        return self.runtime.any_rank(bool(self.signals))

    def check_and_compile(self, gate):
        """Compile; try the micro-batch; refuse leaks; measure the 100% of the MFU. gate: main's."""
        LAPS.done("set-up")
        if gate:
            gate.make_room()
            LAPS.done("wait for the gate")
        begin, model, runtime = time.perf_counter(), self.model, self.runtime
        if runtime.compile:
            model.compile()
        to_come = lengths_to_come(self.lengths, self.step, self.args.num_iterations)
        self.wrapped = data_parallel(model, runtime.world)
        self.recompute(self.args.recompute)
        if runtime.compile or self.args.may_shrink:
            self.choose_micro_batch(to_come)
            LAPS.done("compilation")
        self.shapes = [(self.tokens // length, length) for length in to_come]
        self.refuse_leaks(self.shapes)
        runtime.wait()
        LAPS.done("causality check")
        if runtime.compile:
            self.compile_time += time.perf_counter() - begin
            self.say(f"compiled in {time.perf_counter() - begin:.1f} s")
        if gate:
            self.say(gate.verdict())
            LAPS.done("end of the gate")
        self.matmul_rate = measure_matmul_rate(self.device, runtime.dtype) * runtime.world
        self.say(f"matmul rate: {self.matmul_rate / 1e12:.4g} TFLOP/s measured on this device, "
                 "the 100% of mfu")
        self.flops = {length: flops_per_token(model, length) for length in to_come}

    def refuse_leaks(self, shapes: list[tuple[int, int]], training: bool = True):
        """Raise InputError where the very graphs that train, or validate, leak in these shapes."""
        if training:
            refuse_other_targets(*self.loader.ahead.result()[:2], self.loader.text_ahead())
            meet_all(self.model)  # as training looks up
        try:
            refuse_leaks(self.model, shapes, self.runtime, self.say, modes=(training,),
                         goals=self.goals_to_come() if training else ())
        except InputError:
            if self.step and not is_finite(self.model, self.T, self.runtime):
                self.diverged(self.step, "the model's outputs are not finite",
                              math.inf if training else self.step)  # at the start files stay
            raise
        drop_gradients(self.model)

    def recompute(self, recompute: int):
        for block in self.model.transformer.h:
            block.recompute = bool(recompute)

    def choose_micro_batch(self, lengths):
        """Compile by training on a micro-batch that fits; weights, random state, data stay."""
        args, config, random = self.args, self.config, random_state(self.device)
        averages = bytes_of_averages(self.optimizers)
        fixed = averages + bytes_to_train(self.model, tokens_of_step(args))
        args.may_grow = args.may_shrink and len(self.stream) > self.runtime.world * MANY_TOKENS
        unit = math.lcm(16 if args.fp8_head else 1, *(length for length, _ in self.lengths))
        choose_micro_batch(self.runtime, args, self.T, unit, config.n_layer * config.n_embd, fixed,
                           lambda *tried: self.attempt(*tried, lengths, averages), self.say)
        set_random_state(random, self.device)
        if args.batch_size * self.T != self.tokens:
            self.open_loader()

    def attempt(self, rows: int, recompute: int, lengths, averages: int):
        """Make, and drop, gradients of two micro-batches of each length, beside the averages."""
        self.recompute(recompute)
        step = tokens_of_step(self.args)
        made = any(optimizer.state for optimizer in self.optimizers)
        room = torch.empty(0 if made else averages, dtype=torch.uint8, device=self.device)
        try:
            # nothing travels: a rank that fails must not leave the others waiting
            with no_sync(self.wrapped):
                for length in lengths:
                    whole = random_tokens((step // length, length), self.config.vocab_size)
                    self.model.meet(whole)
                    tokens = whole[: rows * self.T // length].to(self.device)
                    for _ in range(2):
                        targets, shares = self.goals(tokens)
                        with self.runtime.autocast():
                            _, loss = self.wrapped(tokens, targets, False, shares)
                        loss.backward()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        finally:
            drop_gradients(self.model)
            del room

    def open_bar(self):
        from tqdm import tqdm

        self.bar = tqdm(total=self.total_steps, initial=self.step, desc=self.config.mixer,
                        disable=self.runtime.rank > 0, dynamic_ncols=True,
                        mininterval=0.5 if sys.stderr.isatty() else 30)
        self.clock.restart()

    def is_due(self, every: int) -> bool:
        return self.step == self.total_steps or (every > 0 and self.step % every == 0)

    def has_ended(self) -> bool:
        stops = self.reached is not None and self.args.target_val_loss is not None
        return stops or self.step == self.total_steps

    def next_batches(self) -> list:
        """Return all of the step's micro-batches before any of its work; none at the end."""
        if self.has_ended():
            return []
        steps, batches = self.args.grad_accumulation_steps // self.runtime.world, []
        while len(batches) < steps and not self.signals:
            batches.append((*self.loader.next(), self.loader.inputs))
        return batches

    def goals_to_come(self) -> list:
        """Return functions as goals(), for each number of targets that a token will have."""
        args, steps = self.args, self.args.num_iterations
        starts = {max(self.step, math.ceil(third * steps / 3)) for third in (0, 1)}
        return [functools.partial(self.goals, step=step) for step in sorted(starts)
                if 3 * step < 2 * steps and (args.predict_ahead or args.predict_prefix)]

    def goals(self, y: Tensor, step: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Return GPT.forward's targets and shares for next tokens y (B, T), at a step or now."""
        args, step = self.args, self.step if step is None else step
        ahead, prefix = shares_at(step / args.num_iterations, bool(args.predict_ahead),
                                  bool(args.predict_prefix))
        targets, shares = [y], [1.0, *ahead]
        for n in range(1, len(shares)):
            targets.append(F.pad(y[:, n:], (0, n), value=-1))
        if prefix:
            targets.append(self.prefixes[y])
            shares.append(prefix)
        if len(shares) == 1:
            return y, None
        shares = to_device(torch.tensor(shares), y.device)  # without a wait of the host
        return torch.stack(targets, -1), shares / shares.sum()

    def forward_backward(self, batches: list, length: int) -> Tensor | None:
        """Leave the step's gradients in the model and return losses (world, len(batches)).

        Returns None where a signal came in between: the step has changed nothing yet, and giving it
        up is quicker than waiting for its end.
        """
        world = self.runtime.world
        losses = torch.zeros(world, len(batches), device=self.device)
        self.model.meet(torch.cat([inputs for *_, inputs in batches]).view(-1, length))
        for i, (x, y, _) in enumerate(batches):
            if i and self.interrupted():  # before the first, ranks have just voted
                drop_gradients(self.model)
                return None
            # gradients travel between ranks once a step
            with no_sync(self.wrapped) if i < len(batches) - 1 else contextlib.nullcontext():
                targets, shares = self.goals(y.view(-1, length))
                with self.runtime.autocast():
                    _, loss = self.wrapped(x.view(-1, length), targets, False, shares)
                (loss / len(batches)).backward()
            losses[self.runtime.rank, i] = loss.detach()
        if world > 1 and (tables := row_tables(self.model)):
            self.end_average = average([table.gradient for table in tables.values()])
        return losses

    def update(self, losses: Tensor, length: int):
        """Make the optimizers' step, and queue its figures."""
        args, model = self.args, self.model
        factor = learning_rate_factor(self.step, self.total_steps, args.warmup_iters,
                                      args.warmdown_iters, args.final_lr_fraction)
        for optimizer, full in zip(self.optimizers, self.rates):
            for group, rate in zip(optimizer.param_groups, full):
                group["lr"] = factor * rate
            if isinstance(optimizer, RowAdam):  # the last: meanwhile its gradients were averaged
                self.end_average()
            optimizer.step()
        grad_norm = torch.nn.utils.get_total_norm(gradients_of(model))
        drop_gradients(model)
        self.runtime.add_up(losses)
        figures = to_host(torch.cat((losses.T.flatten(), grad_norm.view(1))))  # in stream's order
        ended = self.clock.now()
        self.flush()
        self.step, began = self.step + 1, self.position
        self.position = self.loader.position
        self.pending = (self.step, began, self.position, length, factor, figures, ended)
        if self.device.type == "cpu":
            self.flush()  # nothing is asynchronous there

    def flush(self):
        """Log the pending step. Its successor is queued by now, so the GPU does not wait."""
        if self.pending is None:
            return
        step, began, position, length, factor, figures, ended = self.pending
        self.pending = None
        seconds = self.clock.add_until(ended)
        self.first_steps.add(seconds, self.total_steps - self.step)
        *losses, grad_norm = figures.tolist()
        bad = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
        if bad is not None or not math.isfinite(grad_norm):
            what = f"loss {losses[bad]}" if bad is not None else f"gradient norm {grad_norm}"
            where = self.loader.where(began + (bad or 0) * self.tokens)
            self.diverged(step, f"{what}, micro-batch at {where}", step - (bad is not None))
        if self.runtime.rank == 0:
            loss, rate = sum(losses) / len(losses), (position - began) / seconds
            self.log.metric(
                step=step, tokens=position, train_loss=loss, lr=factor * self.args.learning_rate,
                grad_norm=grad_norm, tokens_per_s=rate,
                mfu=rate * self.flops[length] / self.matmul_rate, train_time_s=self.clock.total,
                peak_memory_bytes=peak_memory(self.device),
                **(dict(sequence_length=length) if self.args.curriculum else {}))
            self.bar.set_postfix(loss=f"{loss:.4f}", tok_s=f"{rate:,.0f}", refresh=False)
            self.bar.update(step - self.bar.n)

    def diverged(self, at: int, what: str, bad_weights: int):
        """Stop the run; checkpoints from step `bad_weights` on are not resumed from."""
        if self.runtime.rank == 0:
            self.checkpoints.wait()
            self.checkpoints.set_aside_after(bad_weights - 1, self.say)
        message = f"step {at}: {what}; checkpoints kept: {self.checkpoints.kept()}"
        self.say(f"error: {message}")
        raise Diverged(message)

    def is_time_to_save(self) -> bool:
        """Return whether the last checkpoint will be save_minutes old when the next is written.

        Raises InputError where the last write has failed.
        """
        age = time.perf_counter() - self.saved_at + self.checkpoints.seconds
        return not self.checkpoints.busy() and 0 < 60 * self.args.save_minutes <= age

    def save(self, wait: bool = False):
        """Save the state of this step unless that is done; with wait, return once it is written."""
        if self.saved_step != self.step:
            self.flush()
            weights = self.model.state_dict()
            optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
            if bad := not_finite(weights, optimizers):
                self.diverged(self.step, f"{bad} is not finite", self.step)
            self.saved_step, self.saved_at = self.step, time.perf_counter()
            if self.runtime.rank == 0:
                began, data_tokens = self.loader.pass_at(self.position)
                self.checkpoints.save(dict(
                    model=weights, optimizers=optimizers, step=self.step, position=self.position,
                    data_tokens=data_tokens, pass_began=began,
                    rng=random_state(self.device), config=asdict(self.config),
                    args=self.args.to_save, train_time_s=self.clock.total,
                    compile_time_s=self.compile_time, wall_time_s=self.wall_time()))
        if wait:
            self.checkpoints.wait()
        self.runtime.wait()
        self.energy.write(self.log, self.step)  # once nobody is waited for long
        self.clock.restart()

    def validate(self):
        """Log the validation loss, unless a signal ends it; note whether the target is reached."""
        if self.step == self.validated:
            return
        self.flush()
        if self.checked is None:  # now: the first training step does not wait for this graph
            begin, compiled, self.checked = time.perf_counter(), self.runtime.compile, self.step
            self.checkpoints.wait()  # a log with a validation has a checkpoint
            self.runtime.wait()
            compiled_or_not(self.runtime, lambda: self.refuse_leaks(
                [(self.args.val_batch_size, self.T)], training=False), self.say)
            if compiled and not self.runtime.compile:  # training has lost its graph, too
                self.refuse_leaks(self.shapes)
            if compiled:
                self.compile_time += time.perf_counter() - begin
        loss = self.validation_loss(self.runtime)
        if loss is not None:
            if math.isfinite(loss) and self.decides(loss) and not self.exact \
                    and self.checked != self.step:  # trained weights may leak: then no loss is said
                refuse_leaks(self.model, [(self.args.val_batch_size, self.T)], self.runtime,
                             self.say, modes=(False,), cuts=32)
            self.validated = step = self.step
            self.say(f"step:{step}/{self.total_steps} val_loss:{loss:.4f} "
                     f"train_time:{self.clock.total:.1f}s "
                     f"step_avg:{1000 * self.clock.total / max(step, 1):.1f}ms "
                     f"wall_time:{self.wall_time():.1f}s")
            if not math.isfinite(loss):
                self.diverged(step, f"validation loss {loss}", step)
            if self.runtime.rank == 0:
                self.log.metric(step=step, tokens=self.position, val_loss=loss,
                                train_time_s=self.clock.total, wall_time_s=self.wall_time())
                self.checkpoints.note(loss, step)
            if self.decides(loss) and self.exact:
                loss = self.validate_in_fp32()
            if loss is not None and loss <= self.target and self.reached is None:
                self.reached, self.checkpoints.keep["cooldown"] = self.clock.total, None
                self.say(f"target {self.target:g} reached: step {step}, {self.position:,} tokens, "
                         f"{self.reached:.1f} s")
        self.clock.restart()

    def validation_loss(self, runtime: Runtime) -> float | None:
        total = evaluate(self.model, self.val_stream, self.val_tokens, self.args.val_batch_size,
                         self.T, runtime, self.interrupted)
        return None if total is None else total.sum().item() / self.val_tokens

    def decides(self, loss: float) -> bool:
        """Return whether the loss of this step decides: the last, or one at the target."""
        return self.step == self.total_steps or loss <= self.target and self.reached is None

    def validate_in_fp32(self) -> float | None:
        """Log and return the loss in fp32, not compiled, NoCap-Test's; None where a signal came."""
        exact = Runtime(self.device, torch.float32, False, self.runtime.rank, self.runtime.world)
        with torch.compiler.set_stance("force_eager"):
            refuse_leaks(self.model, [(self.args.val_batch_size, self.T)], exact, self.say,
                         modes=(False,), cuts=32)
            loss = self.validation_loss(exact)
        if loss is not None:
            self.say(f"step:{self.step}/{self.total_steps} val_loss_fp32:{loss:.4f}")
            if self.log:
                self.log.metric(step=self.step, val_loss_fp32=loss)
        return loss

    def finish(self, late: bool) -> int:
        """Say why the run ended, log and say its summary; return the exit status."""
        self.bar.close()
        train_time, peaks = self.clock.total, self.runtime.of_ranks(peak_memory(self.device))
        summary = dict(
            step=self.step, tokens_per_s=self.position / train_time if train_time else 0.0,
            peak_memory_usage=max(peaks), train_time_s=train_time,
            train_time_with_compilation_s=train_time + self.compile_time,
            wall_time_s=self.wall_time(), wall_clock_time_to_target_loss=self.reached)
        describe_end(self, late, summary, peaks)
        if self.log:
            self.log.metric(**summary, energy_j=energy_used(read_log(self.folder)) or None)
        return 128 + self.signals[0] if self.signals else 0


def train(args, config: GPTConfig, runtime: Runtime, saved: dict | None, folder: Path,
          gate=None) -> int:
    """Train until num_iterations, target_val_loss, max_seconds or a signal; return the status."""
    run = Run(args, config, runtime, saved, folder)
    describe(run)
    describe_plan(run, {name: value for name, value in DEFAULTS.items()
                        if name not in THIS_COMMAND + DATA_FLAGS})
    run.check_and_compile(gate)
    run.open_bar()
    # until here there was nothing to save; a second signal does nothing, as torchrun sends two
    with handled(lambda signum, frame: run.signals.append(signum)), run.checkpoints, run.bar:
        try:
            if run.log:  # not before: a start that fails leaves all as it was
                run.log.cut_back(run.checkpoints, run.say)
            status = train_loop(run)
        except InputError as error:
            if run.log:
                run.log.error(error)
            raise
    report_at_end(run)
    return status


def train_loop(run: Run) -> int:
    """Make steps until the run ends or is asked to; return the status."""
    args, runtime = run.args, run.runtime
    while True:
        if run.saved_step is None or run.step == run.cooldown or run.is_due(args.save_every):
            run.save()  # before the validation, whose failure then costs nothing
        if run.step and run.is_due(args.val_loss_every):
            run.validate()
        batches, error = [], None
        try:
            batches = run.next_batches()
        except InputError as bad_data:
            error = bad_data
        late = args.max_seconds is not None and time.perf_counter() - START > args.max_seconds
        stopped = bool(run.signals) or late or error is not None
        votes = runtime.of_ranks(stopped + 2 * run.is_time_to_save())
        if any(vote & 1 for vote in votes) or not batches:
            run.save(wait=True)
            failed = runtime.of_ranks(error is not None)
            if any(failed):
                raise error or InputError(f"rank {failed.index(1)} could not read its rows")
            return run.finish(late)
        if votes[0] & 2:  # rank 0 decides for all
            run.save()
        length = length_at(run.lengths, run.step, args.num_iterations)
        losses = run.forward_backward(batches, length)
        if losses is not None:
            run.update(losses, length)


# -----------------------------------------------------------------------------
# command line


def parse_flags(argv: list[str], about: str | None = __doc__) -> dict:
    """Return {name: value} of the flags that were given; about: of --help. Raise InputError."""
    every = argv == ["--help", "all"]
    presets = "\n".join(f"  {name}: " + " ".join(f"--{flag} {show(value)}"
                        for flag, value in values.items()) for name, values in PRESETS.items())
    parser = Parser(description=about, argument_default=argparse.SUPPRESS,
                    epilog=f"presets:\n{presets}\n\n--help all shows the other flags, too.")
    groups = {}
    for flag in FLAGS.values():
        if flag.group == "shape":
            continue
        group = groups.setdefault(flag.group, parser.add_argument_group(flag.group))
        shown = flag.common or every
        help_text = f"{flag.help} [{show(flag.default)}]".replace("%", "%%")
        options = dict(help=help_text if shown else argparse.SUPPRESS)
        if flag.kind is PRESENT:
            options["action"] = "store_true"
        else:
            options.update(type=flag.kind, metavar=flag.kind.metavar)
        group.add_argument(f"--{flag.name}", **options)
    flags = vars(parser.parse_args(argv[:1] if every else argv))
    if {"generate", "eval_only"} <= flags.keys():
        raise InputError("--generate and --eval_only: choose one")
    return flags


def model_fields(values: dict) -> dict:
    """Return the part of the flags that GPTConfig takes."""
    names = {flag.name for flag in CONFIG_FLAGS}
    chosen = {name: value for name, value in values.items() if name in names and value is not None}
    if "model" in values:
        chosen = dict(zip(("n_layer", "n_embd"), MODELS[values["model"]])) | chosen
    return chosen


def choose_preset(flags: dict, device: torch.device, say) -> dict:
    """Return the preset of flags, else name this machine's there, and say why it is that one."""
    name = flags.get("preset")
    if name is None:
        shards = find_shards(str(ROOT / FINEWEB["input_bin"]))
        name = "fineweb" if device.type == "cuda" and shards else "shakespeare"
        why = "a GPU and FineWeb's shards are here" if name == "fineweb" else \
            "there is no GPU" if device.type == "cpu" else "FineWeb's shards are not in data/"
        say(f"preset {name}, because {why} (--preset chooses)")
        flags["preset"] = name
    return PRESETS[name]


def folder_of_preset(flags: dict, device: torch.device, say) -> Path:
    """Return the folder of the preset's run, and set --resume auto: the same command goes on."""
    values = {**DEFAULTS, **at_length(choose_preset(flags, device, say), flags)}
    flags["resume"] = "auto"
    return preset_folder(flags, values, SAME_RUN)


def merge_flags(flags: dict, device: torch.device, saved: dict | None, say):
    """Return all flags: defaults < preset < checkpoint < command line."""
    given = saved["args"] if saved else at_length(choose_preset(flags, device, say), flags)
    values = {**DEFAULTS, **given, "target_val_loss": None, **flags}
    if saved:
        say_other_preset(flags, saved["args"], say)
    values["dtype"] = choose_dtype(values["dtype"], device, say)
    if values["compile"] is None:
        values["compile"] = int(device.type == "cuda")
    values.update(choose_data(flags, values))
    args = argparse.Namespace(**values)
    args.to_save = {name: relative(value) if name in DATA_FLAGS else value
                    for name, value in values.items()
                    if name not in (*THIS_COMMAND, "target_val_loss")}
    args.val_batch_size = args.val_batch_size or args.batch_size
    args.may_shrink = device.type == "cuda" and flags.keys().isdisjoint(MICRO_BATCH)
    if args.warmup_iters is None:  # the baseline's share
        args.warmup_iters = round(args.num_iterations * 256 / 4768)
    args.warmdown_iters = fall_steps(values)
    return args


def say_other_preset(flags: dict, kept: dict, say):
    """Say where a preset that was asked for is not what the checkpoint's flags are."""
    preset = at_length(PRESETS.get(flags.get("preset"), {}), kept)
    silent = {*flags, *DATA_FLAGS, *MICRO_BATCH}  # a trial may have changed the last
    if differing := [name for name, value in preset.items()
                     if name not in silent and kept.get(name, DEFAULTS[name]) != value]:
        say(f"--preset {flags['preset']} changes nothing: the checkpoint's flags count, and differ "
            f"in {', '.join(differing)}")


def config_of(flags: dict, args, saved: dict | None, folder: Path, only_read: bool) -> GPTConfig:
    """Return the model's shape: the flags', or the checkpoint's, if flags agree with it."""
    if not saved:
        return GPTConfig(**model_fields(vars(args)))
    config = GPTConfig(**saved["config"])
    asked = GPTConfig(**{**saved["config"], **model_fields(flags)})
    if only_read:
        asked.sequence_length = config.sequence_length
        args.val_batch_size = rows_to_read(flags, args, config.sequence_length)
    there, here = asdict(config), asdict(asked)
    there["optimizer"], here["optimizer"] = saved["args"]["optimizer"], args.optimizer
    if differing := [name for name in there if there[name] != here[name]]:
        raise InputError(f"{relative(str(folder))}: a checkpoint of another config: " + ", ".join(
            f"{name} is {there[name]} there, the flags say {here[name]}" for name in differing))
    return config


def run_of(flags: dict, device: torch.device, say) -> tuple[Path, dict | None, object, GPTConfig]:
    """Return (folder, what saved_flags finds there, all flags, shape) of the run that flags name.

    It reads no weights: for what goes on before or beside training.
    """
    folder = choose_folder(flags, False) or folder_of_preset(flags, device, say)
    saved = saved_flags(flags, folder, CHECKPOINT_FLAGS)
    args = merge_flags(flags, device, saved, say)
    return folder, saved, args, config_of(flags, args, saved, folder, False)


def refuse_untrainable(config: GPTConfig, args):
    """Raise InputError for forms that leak, or whose MLP would see no completed block."""
    if config.mixer != "afno":
        return
    if config.afno_form == "reference":
        raise InputError("--afno_form reference is not causal, choose one of "
                         f"{', '.join(FORMS[:-1])}")
    shortest = min(length for length, _ in args.curriculum or ((config.sequence_length, 1.0),))
    if config.afno_form == "dyadic" and shortest <= DyadicOperator.near_length:
        flag = "curriculum" if args.curriculum else "sequence_length"
        raise InputError(f"--{flag} must be > {DyadicOperator.near_length} to train --afno_form "
                         f"dyadic, whose MLP sees completed blocks only, got {shortest}")


def sizes_of(config: GPTConfig, args) -> tuple[int, int]:
    """Return the bytes of a checkpoint, and those that training takes beside a micro-batch."""
    model = shapes_of(GPT, config)
    averages = bytes_of_averages(make_optimizers(
        model, args.optimizer, args.learning_rate, args.weight_decay))
    return averages + 4 * sum(p.numel() for p in model.parameters()), \
        averages + bytes_to_train(model, tokens_of_step(args))


def main(argv: list[str], gate=None) -> int:
    """Train, evaluate or generate as flags say; return the status. gate: start.Gate or None."""
    flags = parse_flags(argv)
    device = choose_device(flags.get("device", "auto"))
    rank, world, local_rank = ranks()

    def say(text: str):  # until there is a log
        if rank == 0:
            print(text, file=sys.stderr, flush=True)

    only_read, saved = "generate" in flags or "eval_only" in flags, None
    folder = choose_folder(flags, only_read) or folder_of_preset(flags, device, say)
    with contextlib.ExitStack() as stack:
        if rank == 0 and not only_read:  # before anything in it is looked at
            stack.enter_context(owned(folder, f"--output_dir {relative(str(folder))}"))
        if only_read or "resume" in flags:
            saved = find_checkpoint(flags, folder, only_read, sound, say)
        args = merge_flags(flags, device, saved, say)
        config = config_of(flags, args, saved, folder, only_read)
        if line := finished(flags, saved, args, folder):
            if rank == 0:
                print(line)
                report_if_missing(folder)
            return 0
        if rank == 0 and not saved:
            refuse_used(folder, "resume" in flags)
        refuse_untrainable(config, args)
        refuse_too_large(GPT, config, args, device, only_read)
        gpus = 1 if only_read else choose_gpus(args.gpus, device, args.grad_accumulation_steps, say)
        if gpus > 1:
            stack.close()  # the folder is rank 0's
            return launch(gpus, gate)
        runtime = Runtime(device, getattr(torch, args.dtype), bool(args.compile), rank, world)
        if device.type == "cuda":
            runtime.device = own_card(local_rank)
        if only_read:
            if rank == 0:  # one process is enough to evaluate or to write
                runtime.world = 1
                model = GPT(config).to(runtime.device)
                read_checkpoint(flags, args, model, runtime, saved, folder, say)
            return 0
        if facts_wanted():
            show_facts(args, folder, runtime.device, sizes_of(config, args), saved)
        with joined_ranks(runtime):
            return train(args, config, runtime, saved, folder, gate)


if __name__ == "__main__":
    run(main)
