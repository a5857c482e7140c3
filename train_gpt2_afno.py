"""Train a GPT-2 whose tokens are mixed by a causal AFNO (afno.py), or by attention: the NoCap-Test baseline.

    python train_gpt2_afno.py                                        # defaults for this device, said at start
    torchrun --standalone --nproc_per_node=1 train_gpt2_afno.py --mixer afno --attn_layers 5,10
    python train_gpt2_afno.py --output_dir runs/mine --resume auto   # goes on where it stopped
    python train_gpt2_afno.py --output_dir runs/mine --generate "To be, or not"

Read from top to bottom: configuration, model, causality check, data loader, optimizers, checkpoints, training
loop, generation, command line.
"""
import argparse
import codecs
import contextlib
import functools
import glob
import json
import math
import os
import re
import shlex
import signal
import sys
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from afno import (AFNO1D, DyadicOperator, FilterOperator, FORMS, RELUS, ROUTINGS, ShortConv, afno_triton, kernel_path,
                  rmsnorm, taps_at_once)
from data.text_to_bin import InputError, gpt2_encoding, read_bin

START = time.perf_counter()
ROOT = Path(__file__).resolve().parent

# -----------------------------------------------------------------------------
# configuration

MODELS = {  # n_layer, n_head, n_embd; d12 to d48 are GPT-2's sizes, d1 and d4 are for CPUs
    "d1": (1, 2, 128),
    "d4": (4, 2, 128),
    "d12": (12, 12, 768),
    "d24": (24, 16, 1024),
    "d36": (36, 20, 1280),
    "d48": (48, 25, 1600),
}
# Of filters, unless asked for: so a token costs the same at any length. More were 1.05 to 1.3 times slower steps from T = 4096 on
# and have 1e-5 of the energy at initialisation (experiments/benchmark_results.md).
MOST_TAPS = 1024
MIXERS, POSITIONS = ("attn", "afno"), ("none", "learned", "sinusoidal", "fourier")


@dataclass
class GPTConfig:
    """The model's shape. Raises InputError naming the field, which is the flag, and its allowed range."""

    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    sequence_length: int = 1024  # trained length; any other length runs, too
    mixer: str = "afno"
    attn_layers: tuple[int, ...] = ()  # layers that keep attention when the mixer is afno: the hybrid
    afno_form: str = "filter"
    afno_state_layers: tuple[int, ...] = ()  # AFNO layers of form state among those of afno_form
    afno_num_blocks: int = 4
    afno_sparsity_threshold: float = 0.01
    afno_hard_thresholding_fraction: float = 1.0
    afno_filter_length: int | None = None  # taps; None: sequence_length, at most MOST_TAPS
    afno_num_experts: int = 1
    afno_routing: str = "frequency"
    afno_relu: str = "cartesian"
    afno_short_conv: int = 4
    afno_gate: int = 0
    afno_silu: int = 0
    position: str = "none"  # rotary stays inside attention, whatever this says
    mlp_ratio: int = 4  # hidden channels of an MLP, in n_embd; with swiglu two thirds of them
    swiglu: int = 0
    qk_norm: int = 0
    attn_short_conv: int = 1  # taps; 1: none
    attn_gate: int = 0
    half_rotary: int = 0
    value_residual: int = 0
    embedding_norm: int = 0
    logit_softcap: float = 0.0  # 0: none
    embedding_residual: int = 0
    residual_bf16: int = 0  # the residual stream in autocast's dtype; 0: fp32
    mixer_scale: float | None = None  # None: 1; in the baseline, attn in all layers, (2 n_layer)^-0.5

    def __post_init__(self):
        self.attn_layers, self.afno_state_layers = tuple(self.attn_layers), tuple(self.afno_state_layers)
        if self.mixer_scale is None:
            self.mixer_scale = (2 * self.n_layer) ** -0.5 if self.mixer == "attn" else 1.0
        if self.afno_filter_length is None:
            self.afno_filter_length = min(self.sequence_length, MOST_TAPS)
        switches = ("swiglu", "qk_norm", "attn_gate", "half_rotary", "value_residual", "embedding_norm", "embedding_residual",
                    "residual_bf16")
        for name, allowed in (("mixer", MIXERS), ("position", POSITIONS), *((name, (0, 1)) for name in switches)):
            if getattr(self, name) not in allowed:
                raise InputError(f"--{name} must be one of {', '.join(map(str, allowed))}, got {getattr(self, name)}")
        for name in ("vocab_size", "n_layer", "n_head", "n_embd", "sequence_length", "mlp_ratio", "attn_short_conv"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} must be >= 1, got {getattr(self, name)}")
        for name in ("logit_softcap", "mixer_scale"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"--{name} must be finite and >= 0, got {getattr(self, name)}")
        if self.n_embd % (2 * self.n_head):
            raise InputError(f"--n_head: twice the heads must divide n_embd {self.n_embd}, got {self.n_head} heads")
        for name in ("attn_layers", "afno_state_layers"):
            if outside := [layer for layer in getattr(self, name) if not 0 <= layer < self.n_layer]:
                raise InputError(f"--{name} must be in 0 ... {self.n_layer - 1}, got {outside[0]}")
        if both := {*self.attn_layers} & {*self.afno_state_layers}:
            raise InputError(f"--afno_state_layers and --attn_layers must be different layers, got {min(both)} in both")
        try:
            AFNO1D.check_arguments(**self.afno_arguments())
        except ValueError as error:
            raise InputError(f"--afno_{error}") from None

    def afno_arguments(self, layer: int | None = None) -> dict:
        """AFNO1D's in this layer (None: in those of afno_form): its names are the flags' without afno_."""
        flags = {name.removeprefix("afno_"): value for name, value in vars(self).items() if name.startswith("afno_")}
        if layer in flags.pop("state_layers"):
            flags["form"] = "state"
        return dict(hidden_size=self.n_embd, **flags)

    def mixer_of(self, layer: int) -> str:
        return "attn" if self.mixer == "attn" or layer in self.attn_layers else "afno"


# -----------------------------------------------------------------------------
# model


def rotary_tables(position: Tensor, size: int, half: bool = False) -> tuple[Tensor, Tensor]:
    """cos and sin, (T, size / 2) each, of positions (T,) at log-spaced frequencies, base 10000 (Su et al., 2021).

    With half, half of them, rounded up, go from 1 to 1/1024, and the others are 0: what does not turn compares contents
    wherever they are (modded-nanogpt, Jordan et al., 2024).
    """
    like = dict(device=position.device, dtype=position.dtype)
    if half:
        turning = (size // 2 + 1) // 2
        frequency = F.pad(1024.0 ** -torch.linspace(0, 1, turning, **like), (0, size // 2 - turning))
    else:
        frequency = 10000.0 ** -(torch.arange(0, size, 2, **like) / size)
    angle = torch.outer(position, frequency)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the halves (x1, x2) of x, (B, n_head, T, head_dim), by minus the angle of their position."""
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * cos + x2 * sin, -x1 * sin + x2 * cos), -1).type_as(x)


def product_dtype(x: Tensor) -> torch.dtype:
    """Of a product with x: autocast's where it is on, else x's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class Gates(nn.Module):
    """h (..., C) to gates (..., number): 2 sigmoid of w times the first channels of h. w begins as zero, so all gates as 1."""

    channels = 32  # at most

    def __init__(self, number: int, n_embd: int):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(number, min(self.channels, n_embd)))  # not called weight: those are Muon's

    def forward(self, h: Tensor) -> Tensor:
        return 2 * torch.sigmoid(F.linear(h[..., : self.w.size(1)], self.w))


class CausalSelfAttention(nn.Module):
    """x: (B, T, C) to the same; cos, sin: (T, head_dim / 2), rotary_tables' of its positions; added_value, (B, T, C) or None, is
    added to the value; z is what project(x) makes, where that has been done already.

    With attn_short_conv > 1 query, key and value are convolved with so many taps, channel by channel, which begin as the
    identity (So et al., 2021, "Primer"). With attn_gate Gates of x multiply the heads' outputs (Qiu et al., 2025, "Gated attention
    for large language models").
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.qk_norm = config.n_head, config.qk_norm
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)  # query | key | value
        self.short_conv = ShortConv(3 * config.n_embd, config.attn_short_conv) if config.attn_short_conv > 1 else None
        self.gate = Gates(config.n_head, config.n_embd) if config.attn_gate else None
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, added_value: Tensor | None = None, z: Tensor | None = None) -> Tensor:
        z = self.project(x) if z is None else z
        q, k, v = self.heads(z if self.short_conv is None else self.short_conv(z), cos, sin, added_value)
        return self.output(F.scaled_dot_product_attention(q, k, v, is_causal=True), x)

    def project(self, x: Tensor) -> Tensor:
        return self.c_attn(x)

    def value(self, z: Tensor) -> Tensor:
        """The value before its convolution, (..., C), of project's z."""
        return z.chunk(3, -1)[2]

    def step(self, x_t: Tensor, cos: Tensor, sin: Tensor, cache: tuple | None, window: int,
             added_value: Tensor | None = None, z: Tensor | None = None) -> tuple[Tensor, tuple]:
        """forward token by token, x_t and added_value (B, C) to the same; the cache, None at first, is of the last `window`
        keys and values, and the short convolution's."""
        z, inputs = self.project(x_t) if z is None else z, None
        if self.short_conv is not None:
            z, inputs = self.short_conv.step(z, None if cache is None else cache[2])
        q, k, v = self.heads(z[:, None], cos, sin, None if added_value is None else added_value[:, None])
        if cache is not None:
            k, v = (torch.cat((old, new), 2)[:, :, -window:] for old, new in zip(cache, (k, v)))
        return self.output(F.scaled_dot_product_attention(q, k, v), x_t[:, None])[:, 0], (k, v, inputs)

    def heads(self, z: Tensor, cos: Tensor, sin: Tensor, added_value: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = z.chunk(3, -1)
        v = v if added_value is None else v + added_value
        q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in (q, k, v))
        if self.qk_norm:
            q, k = rmsnorm(q), rmsnorm(k)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def output(self, y: Tensor, x: Tensor) -> Tensor:
        """From heads y (B, n_head, T, head_dim)."""
        if self.gate is not None:
            y = y * self.gate(x).mT.unsqueeze(-1)
        return self.c_proj(y.transpose(1, 2).flatten(2))


# Products in fp8, twice as fast on GPUs that have it (Micikevicius et al., 2022, "FP8 formats for deep learning"): activations
# and weights in float8_e4m3fn, gradients in float8_e5m2, sums in fp32. Scales are constants or the weight's: one from the
# largest number in a batch would be a leak, if of rounding only.


def fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (N, C) in fp8, and what that is to be multiplied by. A row's root mean square is at most 1, as rmsnorm makes it, so that no
    number exceeds sqrt(C)."""
    up = torch.finfo(torch.float8_e4m3fn).max / math.sqrt(x.size(1))
    return (x * up).to(torch.float8_e4m3fn), torch.full((), 1 / up, device=x.device)


def fp8_weight(w: Tensor) -> tuple[Tensor, Tensor]:
    """w in fp8, its largest number as fp8's largest, and what that is to be multiplied by."""
    scale = w.abs().amax().float().clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return (w / scale).to(torch.float8_e4m3fn), scale


def fp8_product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype, use_fast_accum: bool = False) -> Tensor:
    """a b times both scales, in dtype: a lies in memory by rows, b by columns, the one order that all tensor cores take."""
    if a.is_cuda:
        return torch._scaled_mm(a, b, scale_a=a_scale, scale_b=b_scale, out_dtype=dtype, use_fast_accum=use_fast_accum)
    with torch.autocast(a.device.type, enabled=False):  # for tests: torch 2.13's on CPUs takes e5m2 for e4m3
        return (a.float() @ b.float() * (a_scale * b_scale)).to(dtype)


class Fp8Linear(torch.autograd.Function):
    """x (N, C), rows as fp8_rows wants them, @ w (M, C).T in x's dtype: this and the gradient of x in fp8, the gradient of w in x's
    dtype, as fp8 would want both its operands transposed."""

    @staticmethod
    def forward(ctx, x, w):
        (x8, x_scale), (w8, w_scale) = fp8_rows(x), fp8_weight(w)
        ctx.save_for_backward(x, w8, w_scale)
        ctx.w_dtype = w.dtype
        return fp8_product(x8, w8.T, x_scale, w_scale, x.dtype)

    @staticmethod
    def backward(ctx, g):
        x, w8, w_scale = ctx.saved_tensors
        # times the tokens of a mean loss, gradients are some 1e-3, the largest 0.2 (a d4's first 50 steps); fp8 has numbers from
        # 2^-16 to 57,344, which leaves room for --grad_accumulation_steps, by which they are smaller
        up, top = 1024.0 * len(x), torch.finfo(torch.float8_e5m2).max
        g8, g_scale = (g.float() * up).clamp(-top, top).to(torch.float8_e5m2), torch.full((), 1 / up, device=g.device)
        return fp8_product(g8, w8.T.contiguous().T, g_scale, w_scale, x.dtype), (g.T @ x).to(ctx.w_dtype)


class MLP(nn.Module):
    """x (..., C) to the same: W2 gelu(W1 x). With swiglu W2 (silu(W1 x) V x), of two thirds of the hidden channels, so of about
    as many parameters (Shazeer, 2020, "GLU variants improve transformer"). W1 | V are c_fc, W2 is c_proj. With fp8, in training,
    W1 x and V x are Fp8Linear's, for rows x of root mean square at most 1."""

    fp8 = False

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.swiglu = config.swiglu
        hidden = config.mlp_ratio * config.n_embd
        if self.swiglu:
            hidden = math.ceil(hidden / 24) * 16  # a multiple of 16, as tensor cores want it
        self.c_fc = nn.Linear(config.n_embd, 2 * hidden if self.swiglu else hidden, bias=False)
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=False)

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


# What is kept for backward with --recompute 1: results of matrix products, attention and convolution.
KEPT = {getattr(torch.ops.aten, name).default for name in (
    "mm", "addmm", "bmm", "_scaled_mm", "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_flash_attention_for_cpu")}
if afno_triton is not None:
    KEPT |= {torch.ops.afno.block_conv.default, torch.ops.afno.state_scan.default}


def keep_products():
    """For torch's checkpoint: keep what KEPT says, compute the rest again."""
    def policy(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


class Block(nn.Module):
    """Mixer, then MLP, each on the normed residual stream. The mixer is the config's for this layer.

    With embedding_residual the stream comes in as a x + b x0, where x0 is the embedding. With value_residual each mixer's value
    is its own plus c g v0, where v0 is the first mixer's, which its block makes where it is given none (Zhou et al., 2024, "Value
    residual learning"), and g are Gates of what the mixer reads, one for value_channels channels (as nanochat, Karpathy, 2025,
    has them for value embeddings). a, b and c are learned and begin at 1, 0, 0; taps are AFNO1D's.
    """

    recompute = False  # what is cheap to compute, in backward again instead of keeping it
    value_channels = 64  # that share a gate; fewer where n_embd is no multiple: the largest power of two that divides it

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.mixer_scale = config.mixer_scale
        self.embedding_mix = nn.Parameter(torch.tensor([1.0, 0.0])) if config.embedding_residual else None  # a, b
        self.value_mix = nn.Parameter(torch.zeros(())) if config.value_residual else None  # c
        groups = config.n_embd // math.gcd(self.value_channels, config.n_embd)
        self.value_gate = Gates(groups, config.n_embd) if config.value_residual else None  # g
        if config.mixer_of(layer) == "attn":
            self.mixer = CausalSelfAttention(config)
        else:
            self.mixer = AFNO1D(**config.afno_arguments(layer))
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], x0: Tensor | None = None, v0: Tensor | None = None,
                taps: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """x, v0 (B, T, C) of this layer to those of the next; x0 (B, T, C)."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.residual, x, rotary, x0, v0, taps, use_reentrant=False, preserve_rng_state=False,
                              context_fn=keep_products)
        return self.residual(x, rotary, x0, v0, taps)

    def residual(self, x: Tensor, rotary: tuple[Tensor, Tensor], x0: Tensor | None, v0: Tensor | None, taps: Tensor | None):
        x, h, z, v0, added_value = self.input(x, x0, v0)
        attention = isinstance(self.mixer, CausalSelfAttention)
        return self.output(x, self.mixer(h, *(rotary if attention else (taps,)), added_value, z)), v0

    def step(self, x_t: Tensor, rotary: tuple[Tensor, Tensor], state: tuple | None, window: int, x0_t: Tensor | None = None,
             v0_t: Tensor | None = None):
        """forward token by token: x_t, x0_t, v0_t (B, C), state of the mixer, None at first, to (x_t, state, v0_t)."""
        x_t, h, z, v0_t, added_value = self.input(x_t, x0_t, v0_t)
        if isinstance(self.mixer, CausalSelfAttention):
            h, state = self.mixer.step(h, *rotary, state, window, added_value, z)
        else:
            h, state = self.mixer.step(h, state, added_value, z)
        return self.output(x_t, h), state, v0_t

    def input(self, x: Tensor, x0: Tensor | None, v0: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """(x, its norm h, what the mixer's project makes of h, v0, c g v0); all (..., C) but the third."""
        if self.embedding_mix is not None:
            x = self.embedding_mix[0] * x + self.embedding_mix[1] * x0
        h = rmsnorm(x)
        z = self.mixer.project(h)
        if self.value_mix is None:
            return x, h, z, None, None
        v0 = self.mixer.value(z) if v0 is None else v0
        gate = self.value_gate(h)
        gated = gate.unsqueeze(-1) * v0.unflatten(-1, (gate.size(-1), -1))
        return x, h, z, v0, self.value_mix * gated.flatten(-2)

    def output(self, x: Tensor, h: Tensor) -> Tensor:
        x = x + self.mixer_scale * h
        return x + self.mlp(rmsnorm(x))


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """The head's products as they enter the softmax: within +-cap, smoothly (0: as they are), and never in bf16."""
    full = logits.float() if logits.dtype == torch.bfloat16 else logits
    return cap * torch.tanh(full / cap) if cap else full


def cross_entropy_chunk(logits: Tensor, targets: Tensor, vocab_size: int, with_gradient: bool, cap: float = 0.0,
                        fp8_scale: float = 0.0):
    """Losses of some rows, (rows,), and d loss / d logits, which is softmax(logits) minus one at the target, times the
    slope of soft_cap.

    logits: (rows, >= vocab_size), columns beyond are padding; targets: (rows,). The gradient comes in the logits' dtype, or,
    where fp8_scale > 0, multiplied by that in float8_e5m2.
    """
    capped = soft_cap(logits[:, :vocab_size], cap)
    log_prob, targets = F.log_softmax(capped, -1), targets[:, None]
    hit = log_prob.gather(1, targets)
    if not with_gradient:
        return -hit[:, 0], None
    gradient, at_target = log_prob.exp_(), hit.exp() - 1
    if cap:
        slope = 1 - (capped / cap).square()
        gradient, at_target = gradient * slope, at_target * slope.gather(1, targets)
    gradient = gradient.to(logits.dtype)
    if padding := logits.size(1) - vocab_size:
        gradient = F.pad(gradient, (0, padding))
    gradient.scatter_(1, targets, at_target.to(logits.dtype))
    return -hit[:, 0], (gradient * fp8_scale).to(torch.float8_e5m2) if fp8_scale else gradient


def largest_error(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Of (got, exact), relative to the norm of what is exact; NaN if any is."""
    return torch.stack([(got - exact).norm() / exact.norm() for got, exact in pairs]).max()


@functools.cache
def loss_path(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether afno_triton.cross_entropy takes cross_entropy_chunk's place for logits of this dtype, and why."""
    triton, why = kernel_path(device, dtype)
    if not triton:
        return False, why
    generator = torch.Generator().manual_seed(0)
    logits, targets = 3 * torch.randn(4, 10_048, generator=generator), torch.tensor([0, 5, 9_998, 9_999])
    for cap in (0.0, 15.0):
        try:
            exact = cross_entropy_chunk(logits.to(dtype).double(), targets, 10_000, True, cap)
            ours = afno_triton.cross_entropy(logits.to(device, dtype), targets.to(device), 10_000, True, cap)
            off = largest_error([(a.cpu().double(), b) for a, b in zip(ours, exact)])
        except Exception as error:  # whatever a compiler, a driver or a launch may raise
            return False, f"plain, Triton's kernel does not work here: {type(error).__name__}"
        if not off < 1e-2:
            return False, f"plain, Triton's kernel is {off:.1e} off here"
    return True, f"Triton's kernel on {torch.cuda.get_device_name(device)}, found to agree with the plain path"


class HeadProducts:
    """The three products of rows `part` of hidden states x (N, C) with the head w (V, C), all of one dtype: logits, and the
    gradients of x and w from those of the logits."""

    gradient_scale = 0.0  # of the latter: none

    def __init__(self, x: Tensor, w: Tensor):
        self.x, self.w = x, w

    def logits(self, part: slice) -> Tensor:
        return self.x[part] @ self.w.T

    def gradients(self, part: slice, dlogits: Tensor) -> tuple[Tensor, Tensor]:
        return dlogits @ self.w, dlogits.T @ self.x[part]


class Fp8HeadProducts(HeadProducts):
    """The same in fp8, for rows x of root mean square at most 1; gradients of logits are at most 1."""

    gradient_scale = 2.0**15  # float8_e5m2 has numbers from 2^-16 to 57,344

    def __init__(self, x: Tensor, w: Tensor):
        self.dtype = x.dtype
        (self.x, self.x_scale), (self.w, self.w_scale) = fp8_rows(x), fp8_weight(w)
        self.g_scale = torch.full((), 1 / self.gradient_scale, device=x.device)
        self.w_columns = self.columns(self.w)

    def logits(self, part: slice) -> Tensor:
        return fp8_product(self.x[part], self.w.T, self.x_scale, self.w_scale, self.dtype, use_fast_accum=True)

    def gradients(self, part: slice, dlogits: Tensor) -> tuple[Tensor, Tensor]:
        dx = fp8_product(dlogits, self.w_columns, self.g_scale, self.w_scale, self.dtype)
        return dx, fp8_product(self.columns(dlogits).T, self.columns(self.x[part]), self.g_scale, self.x_scale, self.dtype)

    @staticmethod
    def columns(x: Tensor) -> Tensor:
        """x, by columns in memory."""
        return (afno_triton.transposed(x) if x.is_cuda else x.T.contiguous()).T


@functools.cache
def fp8_path(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether Fp8HeadProducts and Fp8Linear run here, and why."""
    (triton, why), usual = loss_path(device, dtype), str(dtype).removeprefix("torch.")
    if not triton:
        return False, f"in {usual}, as fp8 goes with Triton's kernel for the softmax of the loss, which is {why}"
    name = torch.cuda.get_device_name(device)
    if torch.cuda.get_device_capability(device) < (8, 9):
        return False, f"in {usual}, as fp8 wants compute capability 8.9, {name} has less"
    generator = torch.Generator().manual_seed(0)
    x, w = rmsnorm(torch.randn(64, 128, generator=generator)), 0.1 * torch.randn(1000, 128, generator=generator)
    targets, slope = torch.randint(1000, (64,), generator=generator), 1e-3 * torch.randn(64, 992, generator=generator)
    results = []
    try:
        for where, fp8 in (("cpu", False), (device, True)):
            inputs = [z.to(where, dtype if fp8 else torch.float64, copy=True).requires_grad_() for z in (x, w)]
            with torch.enable_grad(), torch.autocast(device.type, enabled=False):
                mean, losses = LinearCrossEntropy.apply(*inputs, targets.to(where), cross_entropy_chunk, True, 15.0, fp8)
                rows, matrix = inputs[0], inputs[1][:992]
                y = Fp8Linear.apply(rows, matrix.float()) if fp8 else rows @ matrix.T  # weights are fp32, as in training
                gradients = torch.autograd.grad(mean, inputs) + torch.autograd.grad(y, inputs, slope.to(y) / len(y))
            results.append([z.detach().cpu().double() for z in (losses, y, *gradients)])
        pairs = list(zip(*reversed(results)))
        off = largest_error(pairs)
        scale = torch.stack([((a - b) * b).sum().abs() / b.square().sum() for a, b in pairs]).max()  # rounding leaves it alone
    except Exception as error:  # whatever a library, a driver or a launch may raise
        return False, f"in {usual}, as fp8 does not work here: {first_line(error)[:200]}"
    if not (off < 8e-2 and scale < 2e-2):
        return False, f"in {usual}, as fp8 is {off:.1e} off here, its scale {scale:.1e}"
    return True, f"in fp8 on {name}, found to agree with float64 but for {off:.1e}; in validation in {usual}"


class LinearCrossEntropy(torch.autograd.Function):
    """cross-entropy(soft_cap(x @ weight.T), targets) in chunks of rows: the (N, vocab_size) logits never exist at once.

    x: (N, C); weight: (vocab_size, C); targets: (N,), -1 does not count. Returns the mean, and the loss of every row,
    (N,), without gradient. The gradient of a mean cross-entropy needs nothing from above but one factor, so forward
    computes it along with the loss and backward only scales it.
    Products are in autocast's dtype where it is on, the softmax in fp32 (float64 for float64); fp8: see Fp8HeadProducts, for
    every 16 rows.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, chunk_function, with_gradient, cap=0.0, fp8=False):
        on_gpu, vocab_size = x.is_cuda, weight.size(0)
        dtype = product_dtype(x)
        if loss_path(x.device, dtype)[0]:
            chunk_function = afno_triton.cross_entropy
        # The stored vocabulary is not padded, the operand is: tensor cores want rows of aligned length.
        # On a CPU, small chunks instead: 96 rows of logits (19 MB) stay below what malloc returns to the system
        # each time, and page faults would cost as much as the arithmetic.
        padding, rows = (-vocab_size % 64, 8192) if on_gpu else (0, 96)
        w = F.pad(weight.to(dtype), (0, 0, 0, padding)) if padding else weight.to(dtype)
        losses = torch.empty(len(x), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        counts = (targets >= 0).to(losses.dtype)[:, None]  # (N, 1), a factor of 0 for targets that do not count
        # rows that do not count are zeros: so they add nothing to the gradient of w
        products = (Fp8HeadProducts if fp8 else HeadProducts)((x * counts.to(x.dtype)).to(dtype), w)
        dx, dw = (torch.empty_like(x), torch.zeros_like(weight)) if with_gradient else (None, None)
        for i in range(0, x.size(0), rows):
            part = slice(i, i + rows)
            losses[part], dlogits = chunk_function(products.logits(part), targets[part].clamp(min=0), vocab_size, with_gradient,
                                                   cap, products.gradient_scale)
            if with_gradient:
                dx[part], dw_part = products.gradients(part, dlogits)
                dw += dw_part[:vocab_size]
        count = counts.sum().clamp(min=1)
        if with_gradient:
            ctx.save_for_backward(dx.mul_(counts).div_(count), dw.div_(count))
        losses *= counts[:, 0]  # no product of matrices for the sum: autocast would round that to bf16
        ctx.mark_non_differentiable(losses)
        return losses.sum() / count, losses

    @staticmethod
    def backward(ctx, gradient, _):
        dx, dw = ctx.saved_tensors
        return dx * gradient, dw * gradient, None, None, None, None, None


class FourierGate(nn.Module):
    """Embeddings x, (B, T, C), become x * sigmoid(W2 g(t)) + W1 g(t), with g(t) sines and cosines, (T, C), of position
    t at log-spaced frequencies. W1 g begins with the size of embeddings, the gate near 1/2."""

    def __init__(self, n_embd: int):
        super().__init__()
        self.shift = nn.Linear(n_embd, n_embd, bias=False)  # W1
        self.scale = nn.Linear(n_embd, n_embd, bias=False)  # W2
        for linear in (self.shift, self.scale):
            nn.init.normal_(linear.weight, std=math.sqrt(2 / 3) / n_embd)

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        return x * torch.sigmoid(self.scale(g)) + self.shift(g)


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            h=nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # one tensor, with nn.Linear's initialisation
        if config.position == "learned":
            self.transformer.wpe = nn.Embedding(config.sequence_length, config.n_embd)
            nn.init.uniform_(self.transformer.wpe.weight, -config.n_embd**-0.5, config.n_embd**-0.5)  # as wte begins
        elif config.position == "fourier":
            self.transformer.wpe = FourierGate(config.n_embd)
        self.cross_entropy_chunk, self.taps_at_once, self.fp8_head = cross_entropy_chunk, taps_at_once, False

    def compile(self):
        """Compile block by block (alike layers share one compilation, so it takes seconds), the filters and the loss."""
        # The complex numbers of the forms hilbert and dyadic run as they would without compilation.
        warnings.filterwarnings("ignore", message=".*does not support code generation for complex operators")
        warnings.filterwarnings("ignore", message=".*TensorFloat32 tensor cores")  # fp32 is to mean fp32
        torch._dynamo.config.recompile_limit = 64  # attention and AFNO, training and evaluation, full and short batch
        for block in self.transformer.h:
            block.compile(dynamic=False)
        self.taps_at_once = torch.compile(taps_at_once, dynamic=False)
        self.cross_entropy_chunk = torch.compile(cross_entropy_chunk, dynamic=False)

    def check_length(self, T: int):
        """Raise InputError where T tokens are more than the model has positions for."""
        if self.config.position == "learned" and T > self.config.sequence_length:
            raise InputError(f"--position learned has a table of {self.config.sequence_length} positions, "
                             f"--sequence_length, or prompt and --max_new_tokens, must not exceed it, got {T}")

    def embed(self, idx: Tensor, start: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Embeddings (B, T, C) of tokens (B, T) at positions start ... start + T - 1, and attention's rotary tables."""
        x, (C, n_head) = self.transformer.wte(idx), (self.config.n_embd, self.config.n_head)
        stop = start + idx.size(1)
        self.check_length(stop)
        position = torch.arange(start, stop, device=x.device, dtype=x.dtype)
        if self.config.position == "learned":
            x = x + self.transformer.wpe.weight[start:stop]
        elif self.config.position != "none":
            g = torch.cat(rotary_tables(position, C), -1)
            if self.config.position == "fourier":
                x = self.transformer.wpe(x, g).type_as(x)
            else:
                x = x + g * math.sqrt(2 / (3 * C))  # sines have mean square 1/2, embeddings at initialisation 1/(3C)
        if self.config.embedding_norm:
            x = rmsnorm(x)
        if self.config.residual_bf16:
            x = x.to(product_dtype(x))
        return x, rotary_tables(position, C // n_head, bool(self.config.half_rotary))

    def taps(self) -> dict[int, Tensor]:
        """The filters of every layer that has some, (num_filters, filter_length) by layer, made at once, and outside of
        autocast and of the blocks' graphs: a compiled block would make their gradients with bf16 products."""
        makers = {layer: block.mixer.operator.taps for layer, block in enumerate(self.transformer.h)
                  if isinstance(block.mixer, AFNO1D) and isinstance(block.mixer.operator, FilterOperator)}
        if not makers:
            return {}
        with torch.autocast(self.lm_head.weight.device.type, enabled=False):
            return dict(zip(makers, self.taps_at_once(list(makers.values()))))

    def hidden(self, idx: Tensor) -> Tensor:
        """Normed hidden states before the head: idx (B, T) of tokens to (B, T, C)."""
        x, rotary = self.embed(idx, 0)
        x0 = x if self.config.embedding_residual else None  # only where it is used: it may make block 0 a graph of its own
        v0, taps = None, self.taps()
        for layer, block in enumerate(self.transformer.h):
            x, v0 = block(x, rotary, x0, v0, taps.get(layer))
        return rmsnorm(x)

    @torch.no_grad()
    def step(self, idx_t: Tensor, state: tuple | None, window: int) -> tuple[Tensor, tuple]:
        """hidden token by token: idx_t (B,) to (B, C), and the state for the next token; the first one's is None.

        The same numbers as hidden's, but that attention looks back at most `window` tokens. A state is used once.
        """
        t, states = state or (0, [None] * self.config.n_layer)
        embedding, rotary = self.embed(idx_t[:, None], t)
        x = x0 = embedding[:, 0]
        states, v0 = list(states), None
        for layer, block in enumerate(self.transformer.h):
            x, states[layer], v0 = block.step(x, rotary, states[layer], window, x0, v0)
        return rmsnorm(x), (t + 1, states)

    def forward(self, idx: Tensor, targets: Tensor | None = None, return_logits: bool = True):
        """idx, targets: (B, T) int64, a target of -1 does not count -> (logits (B, T, vocab_size) or None,
        mean loss or None)."""
        x = self.hidden(idx)
        loss = None if targets is None else self.loss(x, targets)[0]
        return (self.logits(x) if return_logits else None), loss

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states (..., C) to (..., vocab_size)."""
        return soft_cap(self.lm_head(x), self.config.logit_softcap)

    def loss(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss, and every target's, (B, T), without gradient: of hidden states (B, T, C), targets (B, T)."""
        training = torch.is_grad_enabled()
        mean, losses = LinearCrossEntropy.apply(x.view(-1, x.size(-1)), self.lm_head.weight, targets.reshape(-1),
                                                self.cross_entropy_chunk, training, self.config.logit_softcap,
                                                self.fp8_head and training)
        return mean, losses.view(targets.shape)


# -----------------------------------------------------------------------------
# causality check

CUTS = (1, 3, 7, 15, 31, 32, 63)  # and T - 1


def random_tokens(shape: tuple[int, ...], vocab_size: int) -> Tensor:
    """Tokens on the CPU from a generator of their own: the training's random numbers stay as they are."""
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(1234))


def exchange_after(idx: Tensor, cut: int, vocab_size: int) -> Tensor:
    """idx with every token from position `cut` on replaced by another one."""
    shift = 1 + random_tokens(idx.shape, vocab_size - 1).to(idx.device)
    return torch.where(torch.arange(idx.size(1), device=idx.device) < cut, idx, (idx + shift) % vocab_size)


def cuts(T: int) -> list[int]:
    """The lengths of the prefixes after which tokens are exchanged."""
    return sorted({*(cut for cut in CUTS if cut < T), T - 1} - {0})


def prefix_changes(hidden, idx: Tensor, vocab_size: int):
    """Yield (cut, how far row 0 of hidden(idx), (B, T, C), moves at each position when the tokens from cut on change).

    The latter are norms, (T,), float64: all zero before the cut if no future value even enters the arithmetic. With
    gradients enabled, a compiled model runs the graph that trains, otherwise the one that validates.
    """
    before = hidden(idx)[0].detach().double()
    for cut in cuts(idx.size(1)):
        after = hidden(exchange_after(idx, cut, vocab_size))[0].detach().double()
        yield cut, (after - before).norm(dim=-1)


def refuse_leaks(hidden, T: int, B: int, vocab_size: int, device: torch.device):
    """Raise InputError where hidden states before an exchanged token are not bit-identical, or where nothing moves.

    Bitwise, in the very precision and compilation that trains: no mixer here lets a future value into the
    arithmetic of a past output (test_causality.py measures the same in float64, and gradients).
    """
    idx = random_tokens((1, T), vocab_size).expand(B, T).to(device)
    for cut, change in prefix_changes(hidden, idx, vocab_size):
        if not change[cut:].norm() > 0:
            raise InputError(f"causality check: exchanging the tokens from position {cut} on changes nothing after it")
        if leaks := (~(change[:cut] == 0)).nonzero().flatten().tolist():
            raise InputError(f"causality check: the model leaks, refusing to train: hidden state {leaks[0]} is the "
                             f"first that changes with the tokens from position {cut} on")


@contextlib.contextmanager
def without_zeros(model: GPT):
    """Weights that begin at zero, such as form state's decays by token, would hide a leak: meanwhile they are random, from a
    generator of their own, and single numbers, such as the share of the first value, 0.5."""
    zeros = [p for p in model.parameters() if not p.any()]
    with torch.no_grad():
        for p in zeros:
            p.copy_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1234)) if p.ndim else torch.tensor(0.5))
    yield
    with torch.no_grad():
        for p in zeros:
            p.zero_()


# -----------------------------------------------------------------------------
# data loader


class TokenStream:
    """The tokens of all shards that match a pattern, as one memory-mapped sequence without beginning or end."""

    def __init__(self, pattern: str, vocab_size: int, flag: str):
        self.paths, self.vocab_size = sorted(glob.glob(pattern)), vocab_size
        if not self.paths:
            raise InputError(f"--{flag}: no shard matches {relative(pattern)} (data/shakespeare.py, "
                             "data/cached_fineweb10B.py and data/text_to_bin.py make some)")
        self.shards = [read_bin(path) for path in self.paths]
        self.starts = np.cumsum([0] + [len(shard) for shard in self.shards])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def locate(self, position: int) -> tuple[int, int]:
        """(number of the shard, offset of the token in it)."""
        position %= len(self)
        shard = int(np.searchsorted(self.starts, position, side="right")) - 1
        return shard, position - int(self.starts[shard])

    def where(self, position: int) -> str:
        shard, offset = self.locate(position)
        return f"{self.paths[shard]}, token {offset}"

    def read(self, position: int, count: int) -> Tensor:
        """Tokens position ... position + count - 1, int64, across shard borders and from the end to the beginning."""
        parts, begin = [], position
        while count > 0:
            shard, offset = self.locate(begin)
            parts.append(self.shards[shard][offset : offset + count].astype(np.int64))
            begin, count = begin + len(parts[-1]), count - len(parts[-1])
        tokens = np.concatenate(parts)
        if tokens.max() >= self.vocab_size:
            at = int((tokens >= self.vocab_size).argmax())
            raise InputError(f"{self.where(position + at)}: token {tokens[at]}, the vocabulary has {self.vocab_size}")
        return torch.from_numpy(tokens)


def to_device(tokens: Tensor, device: torch.device) -> Tensor:
    return tokens.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tokens


ROW_ORDERS = ("stream", "spread")


class TrainLoader:
    """Endless micro-batches (B, T) of inputs and targets, read one ahead in a thread.

    `position` counts the tokens dealt out before; it is a multiple of T. Rows are dealt out over micro-batches, and these over
    the ranks, in turn, so that any number of ranks sees the same tokens in a step. Rows come as they stand in the stream, or,
    order `spread`, from all over it: neighbours in a batch are then not of one long document. Steps of 0.618 of the stream
    keep them as far apart as can be for a batch of any size, and meet each row once a pass.
    """

    def __init__(self, stream: TokenStream, B: int, T: int, position: int, rank: int, world: int, device, order: str = "stream"):
        if len(stream) < world * B * T + 1:
            raise InputError(f"--input_bin holds {len(stream)} tokens, fewer than one micro-batch and its last target: "
                             f"{world * B * T + 1} (--batch_size {B} x --sequence_length {T} x {world} ranks + 1)")
        self.stream, self.B, self.T, self.device = stream, B, T, device
        self.position, self.rank, self.stride = position, rank, world * B * T
        self.rows = (len(stream) - 1) // T if order == "spread" else None  # in a pass
        if self.rows:
            self.step = next(n for n in range(round(0.618 * self.rows), 2 * self.rows) if math.gcd(n, self.rows) == 1)
        self.thread = ThreadPoolExecutor(1)
        self.ahead = self.thread.submit(self.load, position)

    def start(self, row: int) -> int:
        """Where in the stream a row begins, counted from the first one dealt out."""
        return (row * self.step % self.rows if self.rows else row) * self.T

    def where(self, position: int) -> str:
        return self.stream.where(self.start(position // self.T))

    def load(self, position: int) -> tuple[Tensor, Tensor]:
        first = position // self.T
        # all ranks' tokens, though only a part is used: so a bad one stops every rank, with one message
        tokens = torch.stack([self.stream.read(self.start(row), self.T + 1)
                              for row in range(first, first + self.stride // self.T)])
        tokens = tokens[self.rank * self.B :][: self.B]
        return tuple(to_device(part.contiguous(), self.device) for part in (tokens[:, :-1], tokens[:, 1:]))

    def next(self) -> tuple[Tensor, Tensor]:
        batch = self.ahead.result()
        self.position += self.stride
        self.ahead = self.thread.submit(self.load, self.position)
        return batch


@torch.no_grad()
def evaluate(model: GPT, stream: TokenStream, val_tokens: int, B: int, T: int, runtime: "Runtime",
             interrupted=lambda: False) -> Tensor | None:
    """Sum of the losses of the first `val_tokens` targets of the stream, every one of them, in windows of T tokens: by
    position in the window, (T,), float64.

    The last row and the last batch are filled up with targets that do not count, so all batches have one shape.
    None as soon as interrupted() says so, which it does to all ranks at once.
    """
    device = runtime.device
    total = torch.zeros(T, dtype=torch.float64, device=device)
    for first in range(0, val_tokens, runtime.world * B * T):
        if interrupted():
            return None
        begin = first + runtime.rank * B * T
        if begin >= val_tokens:
            continue
        count = min(B * T, val_tokens - begin)
        tokens = F.pad(stream.read(begin, count + 1), (0, B * T - count))
        targets = tokens[1:].clone()
        targets[count:] = -1
        with runtime.autocast():
            hidden = model.hidden(to_device(tokens[:-1].view(B, T), device))
            _, losses = model.loss(hidden, to_device(targets.view(B, T), device))
        total += losses.double().sum(0)
    if runtime.world > 1:
        dist.all_reduce(total)
    return total


def loss_by_position(total: Tensor, val_tokens: int) -> list[tuple[int, int, float]]:
    """(first, last, mean loss) of positions 0-63, 64-127, 128-255, ... of evaluate's windows."""
    T = len(total)
    counts = torch.full((T,), val_tokens // T)
    counts[: val_tokens % T] += 1  # the last window may be cut off
    bounds = [0] + [64 << i for i in range(T.bit_length()) if 64 << i < T] + [T]
    spans = [(a, b - 1, int(counts[a:b].sum()), total[a:b].sum().item()) for a, b in zip(bounds, bounds[1:])]
    return [(first, last, loss / count) for first, last, count, loss in spans if count]


# -----------------------------------------------------------------------------
# optimizers


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024, "Muon") over views of parameters: stacked projections are orthogonalised one by one.

    torch.optim.Muon's updates (torch 2.8 has none), but that all matrices of a shape are one batch, as one by one their products
    are too small to fill a GPU. lr is scaled by 0.2 sqrt(max(rows, columns)), so that an update has AdamW's usual size (Moonshot
    AI, 2025).
    """

    def __init__(self, stacks: list[tuple[nn.Parameter, int]], lr: float, weight_decay: float, momentum: float):
        """stacks: (parameter, how many equal matrices are stacked along its rows)."""
        self.stacks = [(p, p.detach().chunk(n)) for p, n in stacks]
        super().__init__([matrix for _, matrices in self.stacks for matrix in matrices],
                         dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @staticmethod
    def orthogonalize(G: Tensor) -> Tensor:
        """Newton-Schulz: of each G (n, rows, columns), bf16, U V^T of its singular value decomposition, roughly."""
        tall = G.size(1) > G.size(2)
        X = G.mT if tall else G
        X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
        for _ in range(5):
            A = X @ X.mT
            X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315), X, beta=3.4445)
        return X.mT.contiguous() if tall else X

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        by_shape = {}
        for p, matrices in self.stacks:
            for matrix, gradient in zip(matrices, p.grad.chunk(len(matrices))):
                if not self.state[matrix]:
                    self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
                by_shape.setdefault(matrix.shape, []).append((matrix, gradient, self.state[matrix]["momentum_buffer"]))
        for shape, batch in by_shape.items():
            matrices, gradients, averages = map(list, zip(*batch))
            torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
            nesterov = torch._foreach_lerp(gradients, averages, group["momentum"])
            updates = self.orthogonalize(torch.stack([part.bfloat16() for part in nesterov])).float().unbind()
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(matrices, updates, alpha=-group["lr"] * 0.2 * math.sqrt(max(shape)))

    def zero_grad(self):
        for p, _ in self.stacks:
            p.grad = None


def embedding_tables(model: GPT) -> set[nn.Parameter]:
    """Weights of all embeddings: of tokens (the head's, too) and of positions."""
    return {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}


def make_optimizers(model: GPT, name: str, learning_rate: float, weight_decay: float, rest_lr: float | None = None,
                    betas: tuple[float, float] = (0.9, 0.95), momentum: float = 0.95) -> list[torch.optim.Optimizer]:
    """adamw: one AdamW for everything, the baseline. muon: Muon for the blocks' projections, AdamW for the rest.

    AFNO's MLPs, many small matrices, are among the rest: Muon brings them nothing and takes time (lessons.md).
    With rest_lr what is neither Muon's nor an embedding has that learning rate. betas are AdamW's, momentum is Muon's.
    """
    stacks = {}
    if name == "muon":
        for key, p in model.transformer.h.named_parameters():
            if key.endswith((".c_attn.weight", ".c_in.weight")):
                stacks[p] = len(p) // p.size(1)  # query, key and value; value and gate, or value, key and query
            elif key.endswith(".c_fc.weight"):
                stacks[p] = 1 + model.config.swiglu
            elif key.endswith(".weight"):
                stacks[p] = 1
    adamw = {name: p for name, p in model.named_parameters() if p not in stacks}
    # poles, bands and thresholds are places and logarithms, for which zero is no neutral value, nor is it for the
    # residual's factor, which begins at one: they do not decay, nor do the other factors
    places = ("angle", "centre", "log_decay", "log_width", "log_threshold", "embedding_mix", "value_mix")
    tables, groups = embedding_tables(model), {}
    for key, p in adamw.items():
        has_rest_lr = rest_lr is not None and p not in tables
        groups.setdefault((has_rest_lr, key.endswith(places)), []).append(p)
    groups = [dict(params=parameters, lr=rest_lr if has_rest_lr else learning_rate,
                   weight_decay=0.0 if is_place else weight_decay)
              for (has_rest_lr, is_place), parameters in groups.items()]
    optimizers = [torch.optim.AdamW(groups, betas=betas, fused=True)]
    if stacks:
        optimizers.append(Muon(list(stacks.items()), learning_rate, weight_decay, momentum))
    return optimizers


def learning_rate_factor(step: int, num_iterations: int, warmup_iters: int, warmdown_iters: int, final: float = 0.0) -> float:
    """The factor for the update that follows `step` updates: rising to 1, constant, falling to `final`."""
    if step < warmup_iters:
        return (step + 1) / warmup_iters
    return final + (1 - final) * min(1.0, (num_iterations - step) / max(warmdown_iters, 1))


def length_at(phases: tuple[tuple[int, float], ...], step: int, num_iterations: int) -> int:
    """Of the rows of the update that follows `step` updates: phases are (length, share of the steps), in their order."""
    end = 0.0
    for length, share in phases:
        end += share
        if step < round(end * num_iterations):
            break
    return length


# -----------------------------------------------------------------------------
# checkpoints


class Checkpoints:
    """state_step*.pt files of one run, written to a temporary file, synced and renamed; the last two are kept."""

    def __init__(self, folder: Path):
        self.folder = folder

    def paths(self) -> list[Path]:
        """Newest first."""
        found = [path for path in self.folder.glob("state_step*.pt") if re.fullmatch(r"state_step\d+\.pt", path.name)]
        return sorted(found, key=self.step_of, reverse=True)

    @staticmethod
    def step_of(path: Path) -> int:
        return int(re.sub(r"\D", "", path.name))

    def set_aside_after(self, step: int, log):
        """Rename the checkpoints later than `step`: a run that goes on from there must not take them for its own."""
        for path in self.paths():
            if self.step_of(path) > step:
                path.replace(path.with_suffix(".pt.abandoned"))
                log(f"{path.name} is set aside as {path.name}.abandoned, step {step} is the last that counts")
        for part in self.folder.glob("state_step*.pt.part"):
            part.unlink()  # of a run that was killed while saving

    def save(self, state: dict):
        path = self.folder / f"state_step{state['step']:06d}.pt"
        part = path.with_suffix(".pt.part")
        try:
            with open(part, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
            descriptor = os.open(self.folder, os.O_RDONLY)
            os.fsync(descriptor)  # the rename, too, must survive a power cut
            os.close(descriptor)
        except (OSError, RuntimeError) as error:  # torch.save turns some write errors into RuntimeError
            part.unlink(missing_ok=True)
            cause = error if isinstance(error, OSError) else error.__context__
            reason = cause.strerror if isinstance(cause, OSError) else str(error).splitlines()[0]
            raise InputError(f"--output_dir: cannot write {path.name}: {reason}; "
                             f"checkpoints kept: {self.kept()}") from None
        for old in self.paths()[2:]:
            old.unlink()

    def kept(self) -> str:
        return ", ".join(path.name for path in self.paths()) or "none"

    @staticmethod
    def load(path: Path) -> dict:
        """Raises an exception of any kind if the file is not a whole and sound checkpoint of this trainer, of any version."""
        with zipfile.ZipFile(path) as archive:
            if bad := archive.testzip():
                raise ValueError(f"checksum of {bad} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if missing := {"model", "optimizers", "step", "position", "config", "args", "rng"} - set(state):
            raise ValueError(f"not a checkpoint of this trainer, {min(missing)} is missing")
        return state

    @staticmethod
    def of_this_version(state: dict, path: Path) -> dict:
        """state, which load read from path; raises InputError if its model or its training is not one of this version's."""
        gone = set(state["config"]) - {f.name for f in fields(GPTConfig)}
        known = DEFAULTS.keys() | DEVICE_DEFAULTS["cpu"].keys()
        gone |= {name for name, value in state["args"].items() if name not in known and value}  # flags that were in use
        if gone:
            raise InputError(f"{relative(str(path))} is of another version of this trainer, which had "
                             f"{', '.join(sorted(gone))}: the run's train.log has its source")
        try:
            GPTConfig(**state["config"])
        except InputError as error:  # a choice that is gone
            raise InputError(f"{relative(str(path))} is of another version of this trainer: {error}") from None
        return state

    def newest(self, log) -> dict:
        """The newest one that can be read; says which ones cannot."""
        for path in self.paths():
            try:
                state = self.load(path)
            except Exception as error:  # a truncated archive fails in many ways
                log(f"warning: {path.name} cannot be read ({first_line(error)}): trying the one before")
            else:  # if it is not for this version, the ones before are not either
                return self.of_this_version(state, path)
        raise InputError(f"--resume: no readable checkpoint state_step*.pt in {self.folder}")


def load_weights(model: GPT, weights: dict, folder: Path):
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # of another version of this code: its train.log has the source
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{relative(str(folder))}: the checkpoint does not fit this version's model ({reason})") from None


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# -----------------------------------------------------------------------------
# logs


def relative(text: str) -> str:
    """Paths inside the repository relative to it, so that a log reads the same everywhere."""
    return text.replace(f"{ROOT}{os.sep}", "")


class RunLog:
    """train.log (full source, command, versions, then all that is printed) and metrics.jsonl of one run."""

    def __init__(self, folder: Path, resumed_step: int | None):
        self.folder, self.val_loss = folder, None  # of the resumed step, if it is among the metrics
        with self.errors():
            folder.mkdir(parents=True, exist_ok=True)
            if resumed_step is not None:
                self.cut_back(resumed_step)
            self.text = open(folder / "train.log", "a", encoding="utf-8")
            self.metrics = open(folder / "metrics.jsonl", "a", encoding="utf-8")
            if resumed_step is None:
                for name in ("train_gpt2_afno.py", "afno.py", "afno_triton.py"):
                    self.text.write(f"{'=' * 100}\n{name}\n{'=' * 100}\n{(ROOT / name).read_text(encoding='utf-8')}")
                self.text.write("=" * 100 + "\n")

    @contextlib.contextmanager
    def errors(self):
        try:
            yield
        except OSError as error:
            raise InputError(f"--output_dir {self.folder} is not writable: {error.strerror}; "
                             f"checkpoints kept: {Checkpoints(self.folder).kept()}") from None

    def cut_back(self, step: int):
        """Drop what was logged after `step` (it will be done again), summaries, and a line that a crash cut off."""
        path, kept = self.folder / "metrics.jsonl", []
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else ():
            with contextlib.suppress(json.JSONDecodeError):
                values = json.loads(line)
                if line.endswith("\n") and values["step"] <= step and "wall_clock_time_to_target_loss" not in values:
                    kept.append(line)
                    if values["step"] == step:
                        self.val_loss = values.get("val_loss", self.val_loss)
        part = path.with_suffix(".jsonl.part")
        part.write_text("".join(kept), encoding="utf-8")
        part.replace(path)

    def line(self, text: str):
        with self.errors():
            self.text.write(text + "\n")
            self.text.flush()

    def metric(self, **values):
        with self.errors():
            self.metrics.write(json.dumps(values) + "\n")
            self.metrics.flush()


def peak_memory(device: torch.device) -> int:
    """Bytes, at most so far: of torch's tensors on a GPU, resident on a CPU (0 where the system does not say)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product in this dtype on this device: what the MFU is a share of."""
    n, repeats = (8192, 10) if device.type == "cuda" else (1024, 3)
    a, b = (torch.randn(n, n, generator=torch.Generator().manual_seed(i)).to(device, dtype) for i in range(2))
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(2):  # the first round warms up
        synchronize()
        begin = time.perf_counter()
        for _ in range(repeats):
            a @ b
        synchronize()
        seconds = time.perf_counter() - begin
    return repeats * 2 * n**3 / seconds


def flops_per_token(model: GPT, T: int) -> float:
    """Forward and backward, as usual: 6 a parameter (tables that are only looked up have none) and 12 C a key that a
    query of attention sees, T/2 on average; convolutions are free."""
    config = model.config
    attention = sum(config.mixer_of(layer) == "attn" for layer in range(config.n_layer))
    looked_up = embedding_tables(model) - {model.lm_head.weight}
    return 6 * sum(p.numel() for p in {*model.parameters()} - looked_up) + 12 * attention * config.n_embd * T / 2


# -----------------------------------------------------------------------------
# training loop


class Diverged(RuntimeError):
    """A loss or gradient that is not finite."""


@dataclass
class Runtime:
    """Where and how everything runs: one process, or one of several under torchrun."""

    device: torch.device
    dtype: torch.dtype
    compile: bool
    rank: int = 0
    world: int = 1

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank: ranks must leave the loop together."""
        if self.world == 1:
            return flag
        flags = torch.tensor(float(flag))
        dist.all_reduce(flags)  # on the CPU, through gloo: does not wait for the GPU
        return flags.item() > 0


@contextlib.contextmanager
def caught_signals():
    """Yields a list that grows by every SIGINT and SIGTERM, which otherwise do nothing.

    So a repeated one is harmless: torchrun passes on to its processes what a terminal has already sent to all.
    """
    signals = []
    before = {signum: signal.signal(signum, lambda signum, frame: signals.append(signum))
              for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def length_phases(args, T: int, world: int) -> tuple[tuple[int, float], ...]:
    """length_at's phases. Raises InputError where they and the batch do not fit each other."""
    B, total, lengths = args.batch_size, args.grad_accumulation_steps, args.curriculum or ((T, 1.0),)
    if args.fp8_head and B * T % 16:
        raise InputError(f"--fp8_head: a micro-batch must be of a multiple of 16 tokens, got {B * T} (--batch_size {B} x "
                         f"--sequence_length {T})")
    if total % world:
        raise InputError(f"--grad_accumulation_steps must be a multiple of the {world} ranks, got {total}")
    if lengths[-1][0] != T:
        raise InputError(f"--curriculum must end with --sequence_length {T}, got {lengths[-1][0]}")
    if uneven := [length for length, _ in lengths if B * T % length]:
        raise InputError(f"--curriculum: lengths must divide the {B * T} tokens of a micro-batch (--batch_size {B} x "
                         f"--sequence_length {T}), got {uneven[0]}")
    return lengths


def train(args, config: GPTConfig, runtime: Runtime, saved: dict | None, output_dir: Path, signals: list[int]) -> int:
    """Train until num_iterations, target_val_loss, max_seconds or a signal; returns the exit status."""
    from tqdm import tqdm

    device, rank, world = runtime.device, runtime.rank, runtime.world
    B, T, total_steps = args.batch_size, config.sequence_length, args.num_iterations
    lengths, accumulation = length_phases(args, T, world), args.grad_accumulation_steps // world  # of each rank
    step, position = (saved["step"], saved["position"]) if saved else (0, 0)  # updates done, tokens consumed
    if step > total_steps:
        raise InputError(f"--num_iterations must be >= {step}, the step of the checkpoint, got {total_steps}")

    # data first: what is wrong with it should not wait for a model
    stream = TokenStream(args.input_bin, config.vocab_size, "input_bin")
    val_stream = TokenStream(args.input_val_bin, config.vocab_size, "input_val_bin")
    val_tokens = count_val_tokens(args, val_stream)
    loader = TrainLoader(stream, B, T, position, rank, world, device, args.row_order)

    torch.manual_seed(args.seed)
    model = GPT(config).to(device)
    if saved:  # before the log is cut back to this step: weights that do not fit must cost nothing
        load_weights(model, saved.pop("model"), output_dir)

    log = RunLog(output_dir, step if saved else None) if rank == 0 else None
    checkpoints = Checkpoints(output_dir)

    def say(text: str):
        if rank == 0:
            tqdm.write(text)
            log.line(text)

    say(f"command: {relative(shlex.join(sys.argv))}" + (f", resumed at step {step}" if saved else ""))
    if rank == 0:
        checkpoints.set_aside_after(step, say)
    gpu = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}" if device.type == "cuda" else "CPU"
    say(f"torch {torch.__version__}, Python {sys.version.split()[0]}, {world} x {gpu}, "
        f"{torch.get_num_threads()} threads")

    # optimizers
    for block in model.transformer.h:
        block.recompute = bool(args.recompute)
    optimizers = make_optimizers(model, args.optimizer, args.learning_rate, args.weight_decay, args.rest_lr,
                                 (args.beta1, args.beta2), args.momentum)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]  # at a factor of 1
    train_time = compile_time = past_wall = 0.0
    if saved:
        for optimizer, state in zip(optimizers, saved.pop("optimizers"), strict=True):
            options = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
            if len(options) != len(state["param_groups"]):
                raise InputError("--rest_lr makes groups of parameters: give it from the first step on, or never; "
                                 f"{relative(str(output_dir))} began otherwise")
            optimizer.load_state_dict(state)
            for group, chosen in zip(optimizer.param_groups, options):
                group.update(chosen)  # the flags', not the checkpoint's
        torch.set_rng_state(saved["rng"]["cpu"])
        if device.type == "cuda" and saved["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(saved["rng"]["cuda"])
        train_time, compile_time, past_wall = (saved[key] for key in ("train_time_s", "compile_time_s", "wall_time_s"))
    mixers = [config.mixer_of(layer) for layer in range(config.n_layer)]
    say(f"model: {args.model}, {sum(p.numel() for p in model.parameters()):,} parameters, mixers {' '.join(mixers)}, "
        f"{config.n_head} heads, position {config.position}, mixer scale {config.mixer_scale:g}")
    if config.mixer == "afno":
        say("afno: " + ", ".join(f"{name} {value}" for name, value in config.afno_arguments().items()))
        say(f"convolution: {kernel_path(device, runtime.dtype)[1]}")
        if config.afno_state_layers:
            say(f"afno layers of form state: {', '.join(map(str, config.afno_state_layers))}")
        if config.afno_form == "state" or config.afno_state_layers:
            say(f"state: {kernel_path(device, runtime.dtype, 'state')[1]}")
    say(f"softmax of the loss: {loss_path(device, runtime.dtype)[1]}")
    if args.fp8_head or args.fp8_mlp:
        fp8, why = fp8_path(device, runtime.dtype)
        model.fp8_head = fp8 and bool(args.fp8_head)
        for block in model.transformer.h:
            block.mlp.fp8 = fp8 and bool(args.fp8_mlp)
        names = [name for name, chosen in (("the head", args.fp8_head), ("the MLPs' first layers", args.fp8_mlp)) if chosen]
        say(f"products of {' and of '.join(names)}: {why}")
    passes = (total_steps - step) * args.grad_accumulation_steps * B * T / len(stream)
    say(f"data: {relative(args.input_bin)}, {len(stream):,} tokens, {passes:.3g} passes to come; "
        f"validation: {relative(args.input_val_bin)}, {val_tokens:,} targets of {len(val_stream) - 1:,}")
    say(f"steps: {total_steps} of {args.grad_accumulation_steps * B * T:,} tokens ({args.grad_accumulation_steps} x {B} x {T}); "
        f"optimizer {args.optimizer}, learning rate {args.learning_rate}, warmup {args.warmup_iters}, "
        f"warmdown {args.warmdown_iters}, weight decay {args.weight_decay}, grad clip {args.grad_clip}, "
        f"recompute {args.recompute}")
    recipe = {name: getattr(args, name) for name, usual in RECIPE.items() if getattr(args, name) != usual}
    say("recipe: " + (", ".join(f"{name} {value}" for name, value in recipe.items()) or "none of its flags"))
    if args.rest_lr and args.optimizer == "adamw":
        say(f"rest_lr {args.rest_lr} is for the blocks' projections, too: Muon, which would have them, is not the optimizer")
    if args.momentum != RECIPE["momentum"] and args.optimizer == "adamw":
        say(f"momentum {args.momentum} is Muon's and does nothing here: AdamW is the optimizer")
    say(f"device: {device.type}, {str(runtime.dtype).removeprefix('torch.')}, compile {int(runtime.compile)}; "
        f"output: {relative(str(output_dir))}")

    # causality check and compilation, before the clock starts
    begin = time.perf_counter()
    if runtime.compile:
        model.compile()
    to_come = dict.fromkeys(length_at(lengths, i, total_steps) for i in range(step, total_steps + 1))
    for length in to_come:  # with gradients and, where it is compiled, in the shape that trains: on that very graph
        with without_zeros(model), runtime.autocast():
            refuse_leaks(model.hidden, length, B * T // length if runtime.compile else 1, config.vocab_size, device)
    say("causality check: hidden states before an exchanged token are bit-identical "
        f"({time.perf_counter() - begin:.1f} s)")
    wrapped = DistributedDataParallel(model) if world > 1 else model
    if runtime.compile:
        for length in to_come:
            tokens = random_tokens((B * T // length, length), config.vocab_size).to(device)
            with runtime.autocast():
                wrapped(tokens, tokens, return_logits=False)[1].backward()
            model.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        compile_time += time.perf_counter() - begin
        say(f"compiled in {time.perf_counter() - begin:.1f} s")
    matmul_rate = measure_matmul_rate(device, runtime.dtype) * world
    say(f"matmul rate: {matmul_rate / 1e12:.4g} TFLOP/s measured on this device, the 100% of mfu")
    flops = {length: flops_per_token(model, length) for length in to_come}

    bar = tqdm(total=total_steps, initial=step, desc=config.mixer, disable=rank > 0, dynamic_ncols=True,
               mininterval=0.5 if sys.stderr.isatty() else 30)
    def clock():
        """A moment: on a GPU an event among its work, which the host may be far ahead of."""
        if device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    pending = None  # the figures of the last step, on their way to the host
    mark = clock()  # when the step began

    def wall_time() -> float:
        return past_wall + time.perf_counter() - START

    def interrupted() -> bool:
        return runtime.any_rank(bool(signals))

    def forward_backward(batches, length: int) -> Tensor | None:
        """Losses (world, len(batches)) of a step, gradients in the parameters; None if a signal came in between."""
        losses = torch.zeros(world, len(batches), device=device)
        for i, (x, y) in enumerate(batches):
            if interrupted():
                return None  # the step has changed nothing yet: giving it up is quicker than waiting for its end
            # gradients travel between ranks once a step
            sync = contextlib.nullcontext() if world == 1 or i == len(batches) - 1 else wrapped.no_sync()
            with sync:
                with runtime.autocast():
                    _, loss = wrapped(x.view(-1, length), y.view(-1, length), return_logits=False)
                (loss / len(batches)).backward()
            losses[rank, i] = loss.detach()
        return losses

    def diverged(at: int, what: str, bad_weights: int):
        """Stop; checkpoints from step `bad_weights` on hold the weights that gave this: they are not resumed from."""
        if rank == 0:
            checkpoints.set_aside_after(bad_weights - 1, say)
        message = f"step {at}: {what}; checkpoints kept: {checkpoints.kept()}"
        say(f"error: {message}")
        raise Diverged(message)

    def flush():
        """Log the pending step; by now its successor is already queued, so waiting for it does not stall the GPU."""
        nonlocal pending, mark, train_time
        if pending is None:
            return
        done, began_at, ended_at, length, factor, figures, ended = pending
        pending = None
        if device.type == "cpu":
            seconds = ended - mark
        else:
            ended.synchronize()
            seconds = mark.elapsed_time(ended) / 1000
        mark = ended
        *losses, grad_norm = figures.tolist()
        train_time += seconds
        bad = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
        if bad is not None or not math.isfinite(grad_norm):
            what = f"loss {losses[bad]}" if bad is not None else f"gradient norm {grad_norm}"
            diverged(done, f"{what}, micro-batch at {loader.where(began_at + (bad or 0) * B * T)}",
                     done - 1 if bad is not None else done)
        if rank == 0:
            loss, rate = sum(losses) / len(losses), (ended_at - began_at) / seconds
            log.metric(step=done, tokens=ended_at, train_loss=loss, lr=factor * args.learning_rate,
                       grad_norm=grad_norm, tokens_per_s=rate, mfu=rate * flops[length] / matmul_rate,
                       train_time_s=train_time, peak_memory_bytes=peak_memory(device),
                       **(dict(sequence_length=length) if args.curriculum else {}))
            bar.set_postfix(loss=f"{loss:.4f}", tok_s=f"{rate:,.0f}", refresh=False)
            bar.update(done - bar.n)

    def save():
        nonlocal saved_step, mark
        if saved_step == step:
            return
        flush()
        if rank == 0:
            rng = dict(cpu=torch.get_rng_state(), cuda=torch.cuda.get_rng_state() if device.type == "cuda" else None)
            checkpoints.save(dict(
                model=model.state_dict(), optimizers=[optimizer.state_dict() for optimizer in optimizers], step=step,
                position=position, rng=rng, config=asdict(config), args=args.to_save, train_time_s=train_time,
                compile_time_s=compile_time, wall_time_s=wall_time()))
        saved_step, mark = step, clock()  # training time excludes saving

    saved_step = step if saved and any(checkpoints.step_of(path) == step for path in checkpoints.paths()) else None
    resumed_loss = log.val_loss if rank == 0 else None
    validated = step if runtime.any_rank(resumed_loss is not None) else None
    target = -math.inf if args.target_val_loss is None else args.target_val_loss
    reached = train_time if runtime.any_rank(resumed_loss is not None and resumed_loss <= target) else None
    error = None
    while True:
        last = step == total_steps
        if step == 0 or last or (args.save_every and step % args.save_every == 0):
            save()  # before the validation, whose failure then costs nothing
        if step != validated and (last or (args.val_loss_every and step % args.val_loss_every == 0)):
            flush()
            total = evaluate(model, val_stream, val_tokens, args.val_batch_size, T, runtime, interrupted)
            if total is not None:
                val_loss = total.sum().item() / val_tokens
                validated = step
                say(f"step:{step}/{total_steps} val_loss:{val_loss:.4f} train_time:{train_time:.1f}s "
                    f"step_avg:{1000 * train_time / max(step, 1):.1f}ms wall_time:{wall_time():.1f}s")
                if not math.isfinite(val_loss):
                    diverged(step, f"validation loss {val_loss}", step)
                if rank == 0:
                    log.metric(step=step, tokens=position, val_loss=val_loss, train_time_s=train_time,
                               wall_time_s=wall_time())
                if val_loss <= target:
                    reached = train_time
            mark = clock()  # training time excludes validation
        batches = []
        if not last and reached is None:
            try:  # all of the step's data before any of its work
                batches = [loader.next() for _ in range(accumulation)]
            except InputError as bad_data:
                error = bad_data
        late = args.max_seconds is not None and time.perf_counter() - START > args.max_seconds
        if runtime.any_rank(bool(signals) or late) or last or reached is not None or error is not None:
            save()
            break

        length = length_at(lengths, step, total_steps)
        losses = forward_backward(batches, length)
        if losses is None:
            continue
        grads = [p.grad for p in model.parameters()]
        grad_norm = torch.nn.utils.get_total_norm(grads)
        if args.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), args.grad_clip, grad_norm)
        factor = learning_rate_factor(step, total_steps, args.warmup_iters, args.warmdown_iters, args.final_lr_fraction)
        for optimizer, full in zip(optimizers, rates):
            for group, rate in zip(optimizer.param_groups, full):
                group["lr"] = factor * rate
            optimizer.step()
            optimizer.zero_grad()
        if world > 1:
            dist.all_reduce(losses)
        figures = torch.cat((losses.T.flatten(), grad_norm.view(1)))  # in the order of the stream
        if device.type == "cuda":
            figures = torch.empty(figures.shape, pin_memory=True).copy_(figures, non_blocking=True)
        ended = clock()
        flush()
        pending = (step + 1, position, loader.position, length, factor, figures, ended)
        if device.type == "cpu":
            flush()  # nothing is asynchronous there
        step, position = step + 1, loader.position

    bar.close()
    if error is not None:
        raise error
    if signals:
        say(f"stopped by {signal.Signals(signals[0]).name} at step {step}; go on with --output_dir "
            f"{relative(str(output_dir))} --resume auto")
    elif late and not last:
        say(f"stopped by --max_seconds {args.max_seconds:g} at step {step}")
    summary = dict(tokens_per_s=position / train_time if train_time else 0.0, peak_memory_usage=peak_memory(device),
                   train_time_s=train_time, train_time_with_compilation_s=train_time + compile_time,
                   wall_time_s=wall_time(), wall_clock_time_to_target_loss=reached)
    to_target = f"{reached:.1f} s" if reached is not None else "not reached" if args.target_val_loss else "no target"
    say(f"tokens/s: {summary['tokens_per_s']:,.0f}  "
        f"peak_memory_usage: {summary['peak_memory_usage'] / 2**20:,.0f} MiB  "
        f"train_time: {train_time:.1f} s, {train_time + compile_time:.1f} s with compilation  "
        f"wall_clock_time_to_target_loss: {to_target}")
    if rank == 0:
        log.metric(step=step, **summary)
    return 128 + signals[0] if signals else 0


def count_val_tokens(args, val_stream: TokenStream) -> int:
    """How many targets to evaluate: every token but the first can be one."""
    most = len(val_stream) - 1
    if most < 1:
        raise InputError("--input_val_bin holds one token, validation needs two")
    if args.val_tokens is not None and args.val_tokens > most:
        raise InputError(f"--val_tokens must be <= {most}, the targets in --input_val_bin, got {args.val_tokens}")
    val_tokens = args.val_tokens or min(1_048_576, most)
    for begin in range(0, val_tokens, 1 << 20):  # a bad token should not wait for the first validation
        val_stream.read(begin, min(1 << 20, val_tokens + 1 - begin))
    return val_tokens


# -----------------------------------------------------------------------------
# generation


@torch.no_grad()
def generate(model: GPT, text: str, args, T: int, runtime: Runtime):
    """Stream a continuation of `text` to the terminal, token by token; attention looks back at most T tokens."""
    encoding = gpt2_encoding()
    tokens = encoding.encode_ordinary(text) or [encoding.eot_token]
    model.check_length(len(tokens) + args.max_new_tokens - 1)
    generator = torch.Generator().manual_seed(args.seed)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may take several tokens
    print(text, end="", flush=True)
    with runtime.autocast():  # once: so weights are cast once
        state = None
        for token in tokens[:-1]:
            _, state = model.step(torch.tensor([token], device=runtime.device), state, T)
        token = tokens[-1]
        for _ in range(args.max_new_tokens):
            hidden, state = model.step(torch.tensor([token], device=runtime.device), state, T)
            token = sample(model.logits(hidden[0]).cpu(), args, generator)
            print(decoder.decode(encoding.decode_single_token_bytes(token)), end="", flush=True)
    print(decoder.decode(b"", final=True))


def sample(logits: Tensor, args, generator: torch.Generator) -> int:
    """One token of (vocab_size,): the likeliest at temperature 0, else one of the top_k by their probabilities."""
    if args.temperature == 0:
        return int(logits.argmax())
    top = logits.topk(min(args.top_k, len(logits)))
    scores = (top.values - top.values.max()) / args.temperature  # <= 0: no temperature is too low
    return int(top.indices[torch.multinomial(F.softmax(scores, -1), 1, generator=generator)])


# -----------------------------------------------------------------------------
# command line

RECIPE = dict(  # what else may be changed about the baseline; as it stands here, nothing is
    mlp_ratio=4, swiglu=0, qk_norm=0, attn_short_conv=1, attn_gate=0, embedding_norm=0, logit_softcap=0.0, embedding_residual=0,
    mixer_scale=None, curriculum=None, final_lr_fraction=0.0, rest_lr=None, row_order="stream", residual_bf16=0, fp8_head=0,
    fp8_mlp=0, half_rotary=0, value_residual=0, momentum=0.95, beta1=0.9, beta2=0.95,
)
DEFAULTS = dict(
    input_bin=None, input_val_bin=None, output_dir=None, model=None, n_head=None, mixer="afno", attn_layers=(),
    afno_form="filter", afno_state_layers=(), afno_num_blocks=4, afno_sparsity_threshold=0.01,
    afno_hard_thresholding_fraction=1.0, afno_filter_length=None, afno_num_experts=1, afno_routing="frequency",
    afno_relu="cartesian", afno_short_conv=4, afno_gate=0, afno_silu=0,
    position="none", optimizer="adamw", learning_rate=0.0018, warmup_iters=None, warmdown_iters=None, weight_decay=0.1,
    grad_clip=0.0, recompute=0, val_tokens=None, val_batch_size=None, target_val_loss=None, max_seconds=None,
    seed=1337, device="auto", dtype=None, compile=None, resume=None, eval_only=False, generate=None,
    max_new_tokens=200, temperature=0.8, top_k=50, **RECIPE,
)
DEVICE_DEFAULTS = {  # on a GPU the baseline's run, on a CPU what two cores do in minutes
    "cuda": dict(model="d12", batch_size=16, grad_accumulation_steps=32, sequence_length=1024, num_iterations=4768,
                 val_loss_every=128, save_every=128, dtype="bfloat16", compile=1),
    "cpu": dict(model="d4", batch_size=8, grad_accumulation_steps=1, sequence_length=256, num_iterations=120,
                val_loss_every=60, save_every=60, dtype="float32", compile=0),
}
DATA_FLAGS = ("input_bin", "input_val_bin")
NOT_KEPT = ("output_dir", "device", "compile", "resume", "eval_only", "generate", "max_seconds", "max_new_tokens",
            "temperature", "top_k")  # flags that a checkpoint does not carry over to the run that loads it


def number(kind, at_least=-math.inf, above=-math.inf, below=math.inf):
    """An argparse type that knows its range."""
    bounds = [f">= {at_least}"] * (at_least > -math.inf) + [f"> {above}"] * (above > -math.inf) + \
        [f"< {below}"] * (below < math.inf)

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (value >= at_least and above < value < below):
            word = "an integer" if kind is int else "a finite number"
            raise argparse.ArgumentTypeError(f"must be {word} {' and '.join(bounds)}, got {text}")
        return value

    return parse


def layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",") if part.strip()}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be layer numbers such as 3,9, got {text}") from None


def shares(text: str) -> tuple[tuple[int, float], ...]:
    """length:share,length:share,... to ((length, share of the steps), ...)."""
    try:
        parts = [part.split(":") for part in text.split(",")]
        found = tuple((number(int, above=0)(length), number(float, above=0)(share)) for length, share in parts)
    except (ValueError, argparse.ArgumentTypeError):
        found = ()
    if not math.isclose(sum(share for _, share in found), 1, abs_tol=1e-6):
        raise argparse.ArgumentTypeError(f"must be length:share,length:share,... with integer lengths > 0 and shares of the "
                                         f"steps > 0 that sum to 1, got {text}")
    return found


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(re.sub(r"^argument ", "", message))


def parse_flags(argv: list[str]) -> dict:
    """The flags that were given, and no others: {name: value}. Raises InputError."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                    argument_default=argparse.SUPPRESS)
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=MODELS, help="size (default d12 on CUDA, d4 on a CPU)")
    add("--n_head", type=number(int, 1), metavar="N", help="heads of attention (the model's; of d12 12)")
    add("--mixer", choices=MIXERS, help="what mixes tokens; attn is the baseline (default afno)")
    add("--attn_layers", type=layers, metavar="L,L", help="layers that keep attention when the mixer is afno (none)")
    add("--sequence_length", type=number(int, 1), metavar="T", help="tokens a row (1024 on CUDA, 256 on a CPU)")
    add("--afno_form", choices=FORMS,
        help="construction of the operator; reference, the paper's, leaks and is for the gate alone (filter)")
    add("--afno_state_layers", type=layers, metavar="L,L", help="AFNO layers of form state, whatever --afno_form says (none)")
    add("--afno_num_blocks", type=number(int, 1), metavar="N", help="diagonal blocks of AFNO's MLP (4)")
    add("--afno_sparsity_threshold", type=number(float, 0), metavar="X", help="soft-shrink of the response (0.01)")
    add("--afno_hard_thresholding_fraction", type=number(float, above=0), metavar="X",
        help="share of the modes kept (1)")
    add("--afno_filter_length", type=number(int, 1), metavar="K", help=f"taps (the sequence length, at most {MOST_TAPS})")
    add("--afno_num_experts", type=number(int, 1), metavar="E", help="sets of weights of the operator's MLP (1)")
    add("--afno_routing", choices=ROUTINGS, help="by what experts are mixed: frequency bands, or lags (frequency)")
    add("--afno_relu", choices=RELUS, help="the MLP's ComplexReLU (cartesian)")
    add("--afno_short_conv", type=number(int, 1), metavar="K", help="taps of the short convolution; 1: none (4)")
    add("--afno_gate", type=int, choices=(0, 1), help="whether the token gates the mixed signal (0)")
    add("--afno_silu", type=int, choices=(0, 1), help="SiLU after the short convolution, but in the form state (0)")
    add("--position", choices=POSITIONS, help="what is added to embeddings; attention has rotary anyway (none)")
    add("--mlp_ratio", type=number(int, 1), metavar="N",
        help="hidden channels of the MLPs, in n_embd; with --swiglu two thirds of them (4)")
    for name, text in (
            ("swiglu", "MLPs of silu(W1 x) V x instead of gelu(W1 x) (0)"),
            ("qk_norm", "attention: rmsnorm of each head's query and key (0)"),
            ("attn_gate", "attention: each head's output is multiplied by a gate computed from the token (0)"),
            ("half_rotary", "attention: half of the rotary frequencies go from 1 to 1/1024, the others are 0 (0)"),
            ("value_residual", "each mixer's value is its own plus a learned and gated share of the first mixer's (0)"),
            ("embedding_norm", "rmsnorm after embedding and position (0)"),
            ("embedding_residual", "each block takes a x + b embedding, learned, which begin at 1 and 0 (0)"),
            ("residual_bf16", "the residual stream in autocast's dtype instead of fp32 (0)"),
            ("fp8_head", "in training the head's products in fp8, where the GPU has it; a micro-batch must be of a multiple of 16 "
             "tokens (0)"),
            ("fp8_mlp", "in training the MLPs' first product, and its input's gradient, in fp8, where the GPU has it (0)")):
        add(f"--{name}", type=int, choices=(0, 1), help=text)
    add("--attn_short_conv", type=number(int, 1), metavar="K",
        help="attention: taps of a convolution of query, key and value, channel by channel; 1: none (1)")
    add("--logit_softcap", type=number(float, 0), metavar="X", help="logits are X tanh(logits / X); 0: as they are (0)")
    add("--mixer_scale", type=number(float, 0), metavar="X", help="factor of the mixer's output (1; with --mixer attn "
        "the baseline's (2 n_layer)^-0.5)")
    add = parser.add_argument_group("device").add_argument
    add("--device", choices=("auto", "cuda", "cpu"), help="(auto: CUDA if there is any)")
    add("--dtype", choices=("bfloat16", "float32"), help="of autocast (bfloat16 on CUDA, float32 on a CPU)")
    add("--compile", type=int, choices=(0, 1), help="torch.compile, block by block (1 on CUDA, 0 on a CPU)")
    add("--seed", type=number(int, 0, below=2**63), metavar="N",
        help="of initialisation and sampling; the data order is fixed (1337)")
    add = parser.add_argument_group("data and output").add_argument
    add("--input_bin", metavar="GLOB", help="training shards (data/fineweb10B if present, else data/shakespeare)")
    add("--input_val_bin", metavar="GLOB", help="validation shards (likewise)")
    add("--output_dir", metavar="DIR", help="logs and checkpoints (runs/<time>-<model>-<mixer>)")
    add("--row_order", choices=ROW_ORDERS, help="of training rows: as they stand in the shards, or spread over all of them, so "
        "that long documents do not fill a batch (stream)")
    add = parser.add_argument_group("optimization").add_argument
    add("--batch_size", type=number(int, 1), metavar="B", help="rows of a micro-batch on one device (16; CPU 8)")
    add("--grad_accumulation_steps", type=number(int, 1), metavar="N",
        help="micro-batches a step, over all ranks together (32; CPU 1)")
    add("--num_iterations", type=number(int, 1), metavar="N", help="steps (4768; CPU 120)")
    add("--optimizer", choices=("adamw", "muon"), help="muon: for the blocks' projections, AdamW for the rest (adamw)")
    add("--learning_rate", type=number(float, above=0), metavar="X", help="of AdamW and Muon alike (0.0018)")
    add("--warmup_iters", type=number(int, 0), metavar="N", help="rising (256/4768 of num_iterations)")
    add("--warmdown_iters", type=number(int, 0), metavar="N", help="falling (1024/4768 of num_iterations)")
    add("--final_lr_fraction", type=number(float, 0, below=1), metavar="X", help="of the learning rate, at the end (0)")
    add("--momentum", type=number(float, 0, below=1), metavar="X", help="Muon's (0.95)")
    add("--beta1", type=number(float, 0, below=1), metavar="X", help="AdamW's, of gradients (0.9)")
    add("--beta2", type=number(float, 0, below=1), metavar="X", help="AdamW's, of their squares (0.95)")
    add("--rest_lr", type=number(float, above=0), metavar="X",
        help="AdamW's for all but embeddings and Muon's matrices (learning_rate)")
    add("--curriculum", type=shares, metavar="T:SHARE,...",
        help="sequence lengths, each for a share of the steps, such as 256:0.5,1024:0.5; rows grow to the same tokens, "
        "the last one is --sequence_length (none)")
    add("--weight_decay", type=number(float, 0), metavar="X", help="on all weights (0.1)")
    add("--recompute", type=int, choices=(0, 1), help="1 keeps products, attention and long convolutions alone for backward and "
        "computes what is between them again, filters apart: less memory, a little slower (0)")
    add("--grad_clip", type=number(float, 0), metavar="X", help="largest gradient norm; 0 does not clip (0)")
    add = parser.add_argument_group("evaluation and checkpoints").add_argument
    add("--val_loss_every", type=number(int, 0), metavar="N", help="steps; 0: at the end only (128; CPU 60)")
    add("--val_batch_size", type=number(int, 1), metavar="B", help="rows (as batch_size)")
    add("--val_tokens", type=number(int, 1), metavar="N", help="targets, each of them counts (at most 1,048,576)")
    add("--save_every", type=number(int, 0), metavar="N", help="steps; 0: at the end only (128; CPU 60)")
    add("--target_val_loss", type=number(float, above=0), metavar="X", help="stop there and report the time")
    add("--max_seconds", type=number(float, above=0), metavar="X", help="of wall clock; save, then stop")
    add("--resume", metavar="auto|FILE", help="continue the newest checkpoint, or FILE; flags left out are its own")
    add("--eval_only", action="store_true", help="validation loss of a checkpoint, at any --sequence_length")
    add = parser.add_argument_group("generation").add_argument
    add("--generate", metavar="TEXT", help="continue TEXT with a checkpoint")
    add("--max_new_tokens", type=number(int, 1), metavar="N", help="(200)")
    add("--temperature", type=number(float, 0), metavar="X", help="0: the likeliest token (0.8)")
    add("--top_k", type=number(int, 1), metavar="N", help="sample among so many (50)")
    return vars(parser.parse_args(argv))


def model_fields(values: dict) -> dict:
    """The part of the flags that GPTConfig takes."""
    chosen = {f.name: values[f.name] for f in fields(GPTConfig) if values.get(f.name) is not None}
    if "model" in values:
        chosen = dict(zip(("n_layer", "n_head", "n_embd"), MODELS[values["model"]])) | chosen
    return chosen


def choose_data(flags: dict, values: dict) -> dict:
    """Absolute patterns of the shards: the flags' (relative to here), a checkpoint's (to the repository), a default."""
    given = {name: values[name] for name in DATA_FLAGS if values[name] is not None}
    if len(given) == 1:
        raise InputError("--input_bin and --input_val_bin go together, one is missing")
    if given:
        return {name: os.path.abspath(value if name in flags else ROOT / value) for name, value in given.items()}
    fineweb = str(ROOT / "data/fineweb10B/fineweb_{}_*.bin")
    chosen = fineweb if glob.glob(fineweb.format("train")) else str(ROOT / "data/shakespeare/{}_*.bin")
    return {name: chosen.format(part) for name, part in zip(DATA_FLAGS, ("train", "val"))}


def choose_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this torch sees no CUDA device; use cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def find_checkpoint(flags: dict, say) -> tuple[dict, Path]:
    """(state, folder of the run) that --resume, --eval_only or --generate ask for."""
    source = flags.get("resume", "auto")
    if source != "auto":
        path = Path(source)
        try:
            state = Checkpoints.load(path)
        except Exception as error:
            raise InputError(f"--resume {source}: no readable checkpoint ({first_line(error)})") from None
        return Checkpoints.of_this_version(state, path), Path(flags.get("output_dir", path.parent))
    if "output_dir" in flags:
        folder = Path(flags["output_dir"])
    else:
        runs = sorted(ROOT.glob("runs/*/state_step*.pt"), key=lambda path: path.stat().st_mtime)
        if not runs:
            raise InputError("--output_dir: no run with a checkpoint under runs/, name the folder of one")
        folder = runs[-1].parent
    say(f"checkpoint: newest in {relative(str(folder))}")
    return Checkpoints(folder).newest(say), folder


def main(argv: list[str]) -> int:
    flags = parse_flags(argv)
    device = choose_device(flags.get("device", "auto"))
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    def say(text: str):  # until there is a log
        if rank == 0:
            print(text, file=sys.stderr, flush=True)

    saved, only_read = None, "generate" in flags or "eval_only" in flags
    if only_read or "resume" in flags:
        saved, folder = find_checkpoint(flags, say)
    values = {**DEFAULTS, **DEVICE_DEFAULTS[device.type], **(saved["args"] if saved else {}), **flags}
    values.update(choose_data(flags, values))
    if not saved and "grad_accumulation_steps" not in flags:
        values["grad_accumulation_steps"] = max(values["grad_accumulation_steps"], world)  # one for every rank
    if saved:
        config = GPTConfig(**saved["config"])
        asked = GPTConfig(**{**saved["config"], **model_fields({"n_head": saved["args"].get("n_head"), **flags})})
        T, asked.sequence_length = asked.sequence_length, config.sequence_length if only_read else asked.sequence_length
        differing = {name: (old, new) for (name, old), new in zip(asdict(config).items(), asdict(asked).values())
                     if old != new}
        if values["optimizer"] != saved["args"]["optimizer"]:
            differing["optimizer"] = (saved["args"]["optimizer"], values["optimizer"])
        if differing:
            raise InputError(f"{relative(str(folder))}: a checkpoint of another config: " + ", ".join(
                f"{name} is {old} there, the flags say {new}" for name, (old, new) in differing.items()))
    else:
        config = GPTConfig(**model_fields(values))
        T = config.sequence_length
        default = f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{values['model']}-{values['mixer']}"
        folder = Path(flags.get("output_dir", ROOT / default))
        metrics = folder / "metrics.jsonl"
        if rank == 0 and (Checkpoints(folder).paths() or metrics.is_file() and metrics.stat().st_size):
            raise InputError(f"--output_dir {relative(str(folder))} holds a run: add --resume auto, or name another")
    if config.mixer == "afno" and config.afno_form == "reference":
        raise InputError(f"--afno_form reference is not causal, choose one of {', '.join(FORMS[:-1])}")
    shortest = min(length for length, _ in values["curriculum"] or ((config.sequence_length, 1.0),))
    if config.mixer == "afno" and config.afno_form == "dyadic" and shortest <= DyadicOperator.near_length:
        flag = "curriculum" if values["curriculum"] else "sequence_length"
        raise InputError(f"--{flag} must be > {DyadicOperator.near_length} to train --afno_form dyadic, whose MLP sees "
                         f"completed blocks only, got {shortest}")
    values["sequence_length"] = config.sequence_length

    args = argparse.Namespace(**values, to_save={name: relative(value) if name in DATA_FLAGS else value
                                                 for name, value in values.items() if name not in NOT_KEPT})
    args.val_batch_size = args.val_batch_size or args.batch_size
    if args.warmup_iters is None:
        args.warmup_iters = round(args.num_iterations * 256 / 4768)
    if args.warmdown_iters is None:
        args.warmdown_iters = round(args.num_iterations * 1024 / 4768)

    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    runtime = Runtime(device, getattr(torch, args.dtype), bool(args.compile), rank, world)
    if not only_read:
        if world > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        try:
            with caught_signals() as signals:
                return train(args, config, runtime, saved, folder, signals)
        finally:
            if world > 1:
                dist.destroy_process_group()

    if rank > 0:
        return 0  # one process is enough to evaluate or to write
    runtime.world = 1
    model = GPT(config).to(device)
    load_weights(model, saved["model"], folder)
    if "generate" not in flags:
        model.check_length(T)
    say(f"step {saved['step']}, {device.type}, {args.dtype}, sequence length {T} (trained at {config.sequence_length})")
    if "generate" in flags:
        generate(model, flags["generate"], args, T, runtime)
        return 0
    if runtime.compile:
        model.compile()
    val_stream = TokenStream(args.input_val_bin, config.vocab_size, "input_val_bin")
    val_tokens = count_val_tokens(args, val_stream)
    total = evaluate(model, val_stream, val_tokens, args.val_batch_size, T, runtime)
    print(f"step:{saved['step']} sequence_length:{T} val_tokens:{val_tokens} "
          f"val_loss:{total.sum().item() / val_tokens:.4f}")
    for first, last, loss in loss_by_position(total, val_tokens):
        print(f"positions {first}-{last}: {loss:.4f}")
    return 0


def run(main_function) -> None:
    """Exit with the function's status; bad input is one clear line and status 2, a diverged run one line and 1."""
    first_rank = os.environ.get("RANK", "0") == "0"  # errors of input and divergence meet all ranks alike
    message = None
    try:
        status = main_function(sys.argv[1:])
    except (InputError, Diverged) as error:
        message, status = str(error) if first_rank else None, 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:  # outside training, which saves first
        status = 130
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # a compiler's errors are RuntimeErrors, too, also where they hold that memory ran out
        ran_out = any(text in str(error) for text in ("can't allocate memory", "out of memory"))
        if not (ran_out or isinstance(error, (torch.OutOfMemoryError, MemoryError))):
            raise
        message, status = "out of memory: lower --batch_size (and raise --grad_accumulation_steps to match), or " \
            f"--val_batch_size, --sequence_length or --model ({first_line(error)})", 2
    if message:
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(status)


if __name__ == "__main__":
    run(main)
