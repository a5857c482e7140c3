"""Measure speed and memory against length and batch, and where a training step's time goes.

    python experiments/scaling_analysis.py                           # all parts, into runs/speed/
    python experiments/scaling_analysis.py --parts operator --lengths 1024,4096

Parts:

operator    u to y at constant tokens, as attention's core is q, k, v to o. AFNO's cores are the
            mean of twelve layers, whose filters are made at once
batch       the same at constant T
step        forward, backward and optimizer of the trainer's model
profile     a step's time by phase and by kernel

Every run is warmed up and timed by events on the GPU, operators as CUDA graphs. The median is
reported. On a CPU this only shows that the script works: a run is timed three times. Inputs are
random. Rows go to rows.jsonl as they are measured. tables.md and the plots are made from that file,
also from one of an earlier run with --parts none; only rows of the last one's card, torch, --model,
--tokens, --compile and code are in them.
"""
import argparse
import contextlib
import functools
import itertools
import math
import re
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import afno  # noqa: E402
from data.text_to_bin import (FOLDER, InputError, Parser, first_line, integer,  # noqa: E402
                              one_of, owned)
from experiments import archive  # noqa: E402
from experiments.recall import append_lines, read_lines  # noqa: E402
from kernels import usable  # noqa: E402
from runtime import Runtime, code_of, measure_matmul_rate, run, usual_runtime  # noqa: E402
from test_causality import random_tokens  # noqa: E402
from train_gpt2_afno import GPT, MODELS, GPTConfig, flops_per_token, make_optimizers  # noqa: E402

PARTS = ("operator", "batch", "step", "profile")
BATCH_LENGTHS, PROFILE_LENGTH = {1024, 8192}, 1024
# What rows in a table have in common, and what stands before it in words
COMMON = {"where": "", "model": "--model ", "tokens": "--tokens ", "compile": "--compile ",
          "code": "code "}
HIDDEN = ("by_kernel_ms", *COMMON)  # in rows.jsonl alone
MADE_BY = "Made by experiments/scaling_analysis.py"  # in tables.md
WORDS = ("part", "name", "where", "model", "code", "error")  # what a row has beside numbers above 0
COUNTS = ("B", "T", "tokens", "parameters")  # integers
OR_ZERO, OR_NAN = ("range_ms", "memory_MB"), ("TFLOP_per_s", "memory_MB")  # as they are measured
NEEDED = {  # of a row; of one with an error the first two alone
    "floor": (), "operator": ("B", "T", "ms"), "batch": ("B", "T", "ms"),
    "step": ("B", "T", "ms", "mfu", "parameters", "tokens_per_s"),
    "profile": ("B", "T", "by_kernel_ms")}
C = 768
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION}
AFNO_ALONE = {
    "AFNO": dict(mixer="afno"),
    "AFNO, 1024 taps": dict(mixer="afno", afno_filter_length=1024),
    "AFNO, --recompute 1": dict(mixer="afno", recompute=True),
    "AFNO, form state": dict(mixer="afno", afno_form="state")}
STEPS = {  # by --model; filters of T taps where nothing else is said. The first two are profiled
    "d12": {
        "attention, 12 heads of 64": dict(mixer="attn", n_head=12),
        "AFNO with attention in 3, 9": dict(mixer="afno", attn_layers=(3, 9)),
        "attention, 6 heads of 128": dict(mixer="attn", n_head=6),
        "AFNO with attention in 3, 9, 1024 taps": dict(
            mixer="afno", attn_layers=(3, 9), afno_filter_length=1024),
        "AFNO with 6 heads of attention in 3, 9, default taps": dict(
            mixer="afno", attn_layers=(3, 9), n_head=6, afno_filter_length=None),
        **AFNO_ALONE},
    "d4": {  # for a test of this script on a CPU
        "attention, 2 heads of 64": dict(mixer="attn", n_head=2),
        "AFNO with attention in 1": dict(mixer="afno", attn_layers=(1,)),
        **AFNO_ALONE}}


def measure(run, device: torch.device, seconds: float = 0.3,
            graph: bool = False) -> tuple[float, float, float]:
    """Return median and range of run()'s time in ms, and its peak of memory above before, in MB.

    A MB is 2^20 bytes; on a CPU the peak is nan. What is timed has run before. graph: what run()
    launches on a GPU is recorded once as a CUDA graph and replayed. It is for runs of a few short
    kernels, which the GPU does faster than the host launches them. In a training step the host is
    ahead. Here the GPU would wait.
    """
    if device.type == "cpu":
        run()
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            run()
            times.append(1000 * (time.perf_counter() - begin))
        return statistics.median(times), max(times) - min(times), math.nan
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    memory = (torch.cuda.max_memory_allocated() - before) / 2**20
    repeats = 1
    if graph:
        recorded, repeats = torch.cuda.CUDAGraph(), 4
        with torch.cuda.graph(recorded):
            run()
        run = recorded.replay
        run()
    times = []
    while len(times) < 7 or (sum(times) * repeats < 1000 * seconds and len(times) < 100):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / repeats)
    return statistics.median(times), max(times) - min(times), memory


# -----------------------------------------------------------------------------
# operators: each is (inputs that want gradients, function of them, multiply-adds a token and
# channel in forward, layers)

LAYERS = 12  # of AFNO's cores: a model makes all layers' filters at once, a core has its share


def fft_conv(u, taps):
    """Return the usual FFT convolution of u (B, T, C) with taps (G, K), in fp32.

    It is not bitwise causal, and none of its kernels are fused.
    """
    n = 2 * u.size(1)
    responses = torch.fft.rfft(taps, n=n).repeat_interleave(u.size(2) // len(taps), 0).T
    spectrum = torch.fft.rfft(u.float(), n=n, dim=1) * responses
    return torch.fft.irfft(spectrum, n=n, dim=1)[:, : u.size(1)].to(u.dtype)


def conv_products(T: int, K: int) -> float:
    """Return the kernels' multiply-adds a token and channel in forward, for K taps on T tokens."""
    from kernels import convolution

    far = convolution.FAR
    if convolution.is_short(T, K):
        return convolution.multiply_adds(T, K)
    return 3 * far + 2 * (math.ceil(T / far) + 1)  # near field, transform there and back; mixing


def random(*shape, device, dtype=torch.float32, scale=1.0):
    return (scale * torch.randn(shape, device=device)).to(dtype).requires_grad_()


def attention_operators(B: int, T: int, device, dtype):
    """Yield attention's cores, as `operators` does, for each size of a head and backend."""
    for head in (64, 128):
        for name, backend in BACKENDS.items():
            shape = B, C // head, T, head
            q, k, v = (random(*shape, device=device, dtype=dtype) for _ in range(3))

            def attention(q, k, v, backend=backend):
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(q, k, v, is_causal=True)

            yield f"SDPA {name}, head {head}", (q, k, v), attention, T, 1


def operators(B: int, T: int, device, dtype):
    """Yield (name, inputs, function, multiply-adds a token and channel, layers).

    They come one by one, to hold little memory. Multiply-adds are those of forward, nan where they
    are not known.
    """
    yield from attention_operators(B, T, device, dtype)
    filters = C // afno.CHANNELS_PER_FILTER
    u = random(B, T, C, device=device, dtype=dtype)
    taps = random(filters, T, device=device, scale=0.1)
    yield "FFT, unfused, fp32", (u, taps), fft_conv, math.nan, 1
    if T <= 16384:  # its matrices grow
        yield "AFNO, plain path, taps given", (u, taps), afno.plain_conv, math.nan, 1
    kernels = usable("convolution", device, dtype)[0]
    if kernels:
        from kernels import convolution

        yield ("AFNO, kernels, taps given", (u, taps), convolution.causal_conv,
               conv_products(T, T), 1)
    compiled = functools.partial(torch.compile, dynamic=False) if device.type == "cuda" \
        else lambda function: function
    for K in sorted({T, min(T, 128), min(T, 1024)}):
        makers = [afno.AFNO1D(C, filter_length=K).to(device).filters for _ in range(LAYERS)]
        make, conv = compiled(afno.taps_at_once), compiled(afno.causal_conv)

        def cores(*inputs, makers=makers, make=make, conv=conv):
            with torch.autocast(device.type, enabled=False):
                all_taps = make(makers)
            return [conv(u, taps) for u, taps in zip(inputs, all_taps)]

        inputs = (*(random(B, T, C, device=device, dtype=dtype) for _ in makers),
                  *(p for maker in makers for p in maker.parameters()))
        yield (f"AFNO core, {'T' if K == T else K} taps", inputs, cores,
               conv_products(T, K) if kernels else math.nan, LAYERS)
    mixer = afno.AFNO1D(C, form="state").to(device)
    operand = random(B, T, mixer.c_in.out_features, device=device, dtype=dtype)
    core = compiled(mixer.operator)
    yield ("AFNO core, form state", (operand, *mixer.operator.parameters()),
           lambda operand, *_: core(operand), state_products(kernels), 1)
    mixer = afno.AFNO1D(C, short_conv=4, silu=False).to(device)  # as it was measured before

    def around(z, *_):
        z = mixer.short_conv(z)
        return afno.rmsnorm(z + mixer.direct.to(z.dtype) * z)

    yield ("short convolution, direct term and norm beside it",
           (u, *mixer.short_conv.parameters(), mixer.direct), compiled(around), math.nan, 1)


def state_products(kernels: bool) -> float:
    """Return the state kernels' multiply-adds a token and channel in forward.

    They are a chunk's scores and sum, what it sends and what it reads. Half of the scores and of
    the sum is made for nothing. Without kernels it is nan.
    """
    if not kernels:
        return math.nan
    from kernels import state

    return (state.CHUNK + afno.CHANNELS_PER_HEAD) * 2


def outputs(y: torch.Tensor | list) -> list:
    return y if isinstance(y, list) else [y]


def measure_operators(B: int, T: int, only, runtime, part: str, emit):
    """Emit a row for every operator that `only` finds: ms, TB/s, TFLOP/s, and memory in MB.

    The row of one that does not run has its error instead.
    """
    for name, inputs, function, products, layers in operators(B, T, runtime.device, runtime.dtype):
        if not only.search(name):
            continue
        row = dict(part=part, name=name, B=B, T=T)
        try:
            with runtime.autocast():
                upstream = [torch.randn_like(y) for y in outputs(function(*inputs))]

            def forward():
                with torch.no_grad(), runtime.autocast():
                    function(*inputs)

            def both():
                with runtime.autocast():
                    y = outputs(function(*inputs))
                torch.autograd.grad(y, inputs, upstream, allow_unused=True)

            row["forward_ms"] = measure(forward, runtime.device, graph=True)[0] / layers
            row["ms"], row["range_ms"], memory = (
                value / layers for value in measure(both, runtime.device, graph=True))
            if layers == 1:  # the peak of twelve layers is not twelve times that of one
                row["memory_MB"] = memory
        except RuntimeError as error:  # a backend that does not run here, or too little memory
            emit(dict(row, error=first_line(error)[:200]))
            continue
        finally:
            torch._dynamo.reset()
        elements = B * T * C
        # u, y, dy, du once each
        row["TB_per_s"] = 4 * elements * inputs[0].element_size() / row["ms"] / 1e9
        # backward: 2.5 times for attention, 2 for a convolution; a causal T x T product is half
        factor = 3.5 if name.startswith("SDPA") else 3
        row["TFLOP_per_s"] = factor * 2 * products * elements / row["ms"] / 1e9
        emit(row)


# -----------------------------------------------------------------------------
# whole steps


def training_step(options: dict, model_name: str, B: int, T: int, runtime):
    """Return a model, a function that makes one step on random tokens, and the step's two phases.

    The phases are forward and backward, and the optimizers.
    """
    n_layer, n_embd = MODELS[model_name]
    options = dict(options)
    recompute = options.pop("recompute", False)  # of the trainer, not of the model's configuration
    torch.manual_seed(0)
    config = GPTConfig(n_layer=n_layer, n_embd=n_embd, sequence_length=T, **options)
    model = GPT(config).to(runtime.device)
    for block in model.transformer.h:
        block.recompute = recompute
    if runtime.compile:
        model.compile()
    optimizers = make_optimizers(model, "muon", 1e-4, 0.1)
    tokens = random_tokens((B, T + 1), config.vocab_size).to(runtime.device)

    def backpropagate():
        with runtime.autocast():
            _, loss = model(tokens[:, :-1], tokens[:, 1:], return_logits=False)
        loss.backward()

    def optimize():
        for optimizer in optimizers:
            optimizer.step()

    def step():
        backpropagate()
        optimize()
        for optimizer in optimizers:
            optimizer.zero_grad()

    return model, step, backpropagate, optimize


def measure_step(row: dict, options: dict, runtime, matmul_rate) -> dict:
    """Return the row with what a step takes: ms, GiB, tokens/s, MFU and parameters."""
    device = runtime.device
    model, step, backpropagate, optimize = training_step(
        options, row["model"], row["B"], row["T"], runtime)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    row["ms"], row["range_ms"], _ = measure(step, device, seconds=1.5)
    if device.type == "cuda":
        row["peak_GiB"] = torch.cuda.max_memory_allocated() / 2**30
    backpropagate()  # the optimizers want gradients
    row["optimizer_ms"], _, _ = measure(optimize, device)
    row["tokens_per_s"] = row["B"] * row["T"] / row["ms"] * 1000
    row["mfu"] = flops_per_token(model, row["T"]) * row["tokens_per_s"] / matmul_rate
    row["parameters"] = sum(p.numel() for p in model.parameters())
    return row


def steps_at(T: int, args: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    """Yield name and options of each model whose step is measured at a length, --only aside."""
    for name, options in STEPS[args.model].items():
        if (options.get("afno_filter_length") or 0) < T:  # else as with T taps, all there are
            yield step_name(name, args.residual_bf16), options


def measure_steps(args: argparse.Namespace, runtime, matmul_rate, emit):
    """Emit a row for every length and every model of STEPS that --only finds.

    A model that takes too much memory has its error instead.
    """
    for T in args.lengths:
        for name, options in steps_at(T, args):
            if not args.only.search(name):
                continue
            options = dict(afno_filter_length=T, residual_bf16=args.residual_bf16) | options
            row = dict(part="step", name=name, B=args.tokens // T, T=T, model=args.model)
            try:
                emit(measure_step(row, options, runtime, matmul_rate))
            except torch.OutOfMemoryError as error:
                emit(dict(row, error=first_line(error)[:200]))
            torch._dynamo.reset()
            if runtime.device.type == "cuda":
                torch.cuda.empty_cache()


def step_name(name: str, residual_bf16: int) -> str:
    return name if residual_bf16 else f"{name}, fp32 residual"


KERNELS = (  # (what, pattern of kernel names), the first that fits
    ("attention", r"flash|fmha|sdpa|attention"),
    ("convolution",
     r"^(toeplitz|short|transform|mix|long|tiles_gradient|response_gradient|fold|depthwise\w*|"
     r"sent|state\w*)_kernel"),
    ("matrix products", r"gemm|nvjet|cutlass|xmma|cublas|addmm|matmul"),
    ("AdamW", r"adam|multi_tensor"),
    ("loss", r"log_softmax|scatter|gather|cross_entropy"),
    ("fused elementwise, norms and sums of TorchInductor", r"^triton_"),
    ("copies and casts", r"memcpy|memset|copy|fill"),
)


def kernel_times(step, device) -> dict[str, float]:
    """Return the ms of a step by kernel, the largest first, from torch.profiler."""
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activities) as profiler:
        step()
        if cuda:
            torch.cuda.synchronize()
    kernels = {}
    for event in profiler.key_averages():
        time_us = event.self_device_time_total if cuda else event.self_cpu_time_total
        if time_us > 0 and (not cuda or str(event.device_type).endswith("CUDA")):
            kernels[event.key[:110]] = kernels.get(event.key[:110], 0) + time_us / 1000
    return dict(sorted(kernels.items(), key=lambda item: -item[1]))


def measure_profile(args: argparse.Namespace, runtime, emit):
    """Emit the time of a step by phase (events) and by kernel (of one step)."""
    device, T = runtime.device, min(PROFILE_LENGTH, args.tokens)
    B = args.tokens // T
    for name, options in itertools.islice(STEPS[args.model].items(), 2):
        options = dict(options, residual_bf16=args.residual_bf16)
        model, step, backpropagate, optimize = training_step(options, args.model, B, T, runtime)
        x = torch.randn(B, T, model.config.n_embd, device=device, requires_grad=True)
        targets = random_tokens((B, T), model.config.vocab_size).to(device)

        def head():
            with runtime.autocast():
                loss, _ = model.lm_head.loss(x, targets)
            loss.backward()

        row = dict(part="profile", name=step_name(name, args.residual_bf16), T=T, B=B)
        for phase, run in (("step", step), ("forward and backward", backpropagate),
                           ("head and loss alone", head), ("optimizers alone", optimize)):
            row[f"{phase}, ms"], _, _ = measure(run, device)
        emit(dict(row, by_kernel_ms=kernel_times(step, device)))
        torch._dynamo.reset()


# -----------------------------------------------------------------------------
# tables and plots


def exponent(points: list[tuple[float, float]]) -> float:
    """Return the least-squares slope of log time against log T, at constant tokens.

    It is the exponent of T in the cost of a token: 0 where that is constant.
    """
    xs, ys = zip(*((math.log(T), math.log(ms)) for T, ms in points))
    mx, my = statistics.mean(xs), statistics.mean(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys)) / sum((x - mx) ** 2 for x in xs)


def number(value) -> str:
    """Return a number as the tables show it, empty for None and nan."""
    if isinstance(value, int):
        return f"{value:,}"
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"


def table(rows: list[dict], columns: dict[str, str]) -> list[str]:
    """Return a Markdown table's lines; columns: {key of a row: title}.

    A row without ms shows its error there.
    """
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [row.get(key, row.get("error", "") if key == "ms" else "") for key in columns]
        words = (cell if isinstance(cell, str) else number(cell) for cell in cells)
        lines.append("| " + " | ".join(words) + " |")
    return lines + [""]


def matrix(rows: list[dict], key: str, by: str) -> list[str]:
    """Return the lines of a table of names against lengths or batch sizes.

    key: what is shown; by: "T" or "B". Against T, a line ends with its exponent.
    """
    across = sorted({row[by] for row in rows})
    lines = [f"| {key}, {by} = | " + " | ".join(map(str, across)) + " | exponent |",
             "|" + "---|" * (len(across) + 2)]
    for name in dict.fromkeys(row["name"] for row in rows):
        found = {row[by]: row for row in rows if row["name"] == name}
        points = [(x, row[key]) for x, row in sorted(found.items()) if key in row]
        slope = f"{exponent(points):.2f}" if by == "T" and len(points) > 2 else ""
        cells = [number(found[x][key]) if x in found and key in found[x]
                 else "does not run" if x in found else "" for x in across]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {slope} |")
    return lines + [""]


def operator_tables(operator: list[dict]) -> list[str]:
    """Return the lines of the operators' tables: ms, TFLOP/s, TB/s and MB against T."""
    known = [row for row in operator if not math.isnan(row.get("TFLOP_per_s", 0))]
    with_memory = [row for row in operator if "memory_MB" in row or "error" in row]
    return [
        "## Operator, forward + backward, ms", "", *matrix(operator, "ms", "T"),
        "## Operator, forward, ms", "", *matrix(operator, "forward_ms", "T"),
        "## Operator, achieved TFLOP/s of the products it makes", "",
        *matrix(known, "TFLOP_per_s", "T"),
        "## Operator, achieved TB/s of u, y, dy and du once each", "",
        *matrix(operator, "TB_per_s", "T"),
        "## Operator, memory above its inputs, MB", "", *matrix(with_memory, "memory_MB", "T")]


def profile_tables(row: dict) -> list[str]:
    """Return the lines of a profile's tables: ms by phase, by kind of kernel, by kernel."""
    lines = [f"## Profile: {row['name']}, {row['B']} rows of {row['T']}", ""]
    lines += [f"- {key}: {number(row[key])}" for key in row if key.endswith(", ms")] + [""]
    kernels = {key: ms for key, ms in row["by_kernel_ms"].items()
               if "Optimizer.step#" not in key}  # that is a span
    groups = {}
    for key, ms in kernels.items():
        found = (what for what, pattern in KERNELS if re.search(pattern, key, re.IGNORECASE))
        what = next(found, "other")
        groups[what] = groups.get(what, 0) + ms
    total = sum(kernels.values())
    for what, times, most in (("kernels", groups, None), ("kernel", kernels, 25)):
        lines += [f"| {what} | ms | share of all kernels |", "|---|---|---|"]
        for key, ms in sorted(times.items(), key=lambda item: -item[1])[:most]:
            name = key if what == "kernels" else f"`{key}`"
            lines.append(f"| {name} | {number(ms)} | {ms / total:.1%} |")
        lines.append("")
    return lines


def write_tables(rows: list[dict], folder: Path):
    """Write tables.md of all rows into a folder."""
    by_part = {part: [row for row in rows if row["part"] == part] for part in (*PARTS, "floor")}
    common = ", ".join(f"{words}{rows[-1][key]}" for key, words in COMMON.items()
                       if key in rows[-1])  # old rows do not have all
    on_cpu = "On a CPU this only shows that the script works. " * rows[-1]["where"].endswith("CPU")
    lines = [f"{MADE_BY} from rows.jsonl: {common}. {on_cpu}ms are medians; exponents "
             "are slopes of log ms against log T at constant tokens (0: linear cost, 1: "
             f"quadratic). Operators have {C} channels. AFNO's cores: the mean of twelve layers.",
             ""]
    lines += ["## Floors, same run", ""] + table(by_part["floor"], dict(
        name="", B="B", T="T", ms="ms", TB_per_s="TB/s", TFLOP_per_s="TFLOP/s"))
    if by_part["operator"]:
        lines += operator_tables(by_part["operator"])
    for T in sorted({row["T"] for row in by_part["batch"]}):
        lines += [f"## Operator, forward + backward, ms, T = {T}", ""]
        lines += matrix([row for row in by_part["batch"] if row["T"] == T], "ms", "B")
    if steps := by_part["step"]:
        lines += ["## Training step", ""] + table(steps, dict(
            name="mixers", T="T", B="rows", ms="ms", range_ms="range",
            optimizer_ms="optimizer, ms", tokens_per_s="tokens/s", mfu="MFU",
            peak_GiB="peak memory, GiB", parameters="parameters"))
        if all(row.get("model", "d12") == "d12" for row in steps):  # as wide as the operators
            lines += amdahl(by_part["operator"], steps)
    for row in by_part["profile"]:
        lines += profile_tables(row)
    archive.write(folder / "tables.md", "\n".join(lines).encode())


def amdahl(operator: list[dict], steps: list[dict]) -> list[str]:
    """Return the lines of a table of what the ratio of steps is and could be.

    The bound is (D + 12 A) / (D - saved + n A + (12 - n) M), for n layers of attention. Its letters
    are times in ms, explained under the table's title; bound_of makes it.
    """
    lines = ["## Ratio of tokens/s to all attention's, and the Amdahl bound", "",
             "A: attention's core a layer, the fastest backend; M: AFNO's core and what is beside "
             "it. D, the rest of the step, is all attention's step less 12 A; AFNO's has one "
             "projection of C x 2C less a layer, counted at the matmul rate.", "",
             "| T | against | mixers | ratio | bound | share |", "|---|---|---|---|---|---|"]
    for T in sorted({row["T"] for row in steps}):
        at = {row["name"]: row for row in steps if row["T"] == T and "tokens_per_s" in row}
        cores = {row["name"]: row["ms"] for row in operator if row["T"] == T and "ms" in row}
        beside = cores.get("short convolution, direct term and norm beside it", math.nan)
        few = "1024" if T > 1024 else "T"
        for heads in (64, 128):
            attention = next((row for name, row in at.items() if name.endswith(f"of {heads}")),
                             None)
            A = min((ms for name, ms in cores.items()
                     if name.startswith("SDPA") and name.endswith(str(heads))), default=math.nan)
            for name, attention_layers, own_heads, taps in (
                    ("AFNO with attention in 3, 9", 2, 64, "T"),
                    ("AFNO with attention in 3, 9, 1024 taps", 2, 64, few),
                    ("AFNO with 6 heads of attention in 3, 9, default taps", 2, 128, few),
                    ("AFNO", 0, heads, "T"), ("AFNO, 1024 taps", 0, heads, few)):
                if attention is None or name not in at or own_heads != heads:
                    continue
                M = cores.get(f"AFNO core, {taps} taps", math.nan) + beside
                ratio = at[name]["tokens_per_s"] / attention["tokens_per_s"]
                bound = bound_of(attention, attention_layers, A, M)
                lines.append(f"| {T} | head {heads} | {name} | {ratio:.3f} | {number(bound)} | "
                             f"{number(ratio / bound)} |")
    return lines + [""]


def bound_of(attention: dict, attention_layers: int, A: float, M: float) -> float:
    """Return the bound of a step with so many layers of attention; A and M, in ms, as in amdahl."""
    few = 12 - attention_layers
    rate = attention["mfu"] and flops_of_row(attention) / attention["mfu"]
    saved = few * 6 * 2 * C * C * attention["B"] * attention["T"] / rate * 1000
    D = attention["ms"] - 12 * A
    return attention["ms"] / (D - saved + attention_layers * A + few * M)


def flops_of_row(row: dict) -> float:
    """Return the FLOP/s of a step of attention in every layer, as flops_per_token counts."""
    return (6 * row["parameters"] + 6 * 12 * C * row["T"]) * row["tokens_per_s"]


def plot(rows: list[dict], folder: Path):
    """Draw ms, tokens/s and peak memory against T, a PNG file each."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    for part, key, label in (("operator", "ms", "forward + backward, ms"),
                             ("step", "tokens_per_s", "tokens/s"),
                             ("step", "peak_GiB", "peak memory, GiB")):
        chosen = [row for row in rows if row["part"] == part and key in row]
        if not chosen:
            continue
        figure, axes = plt.subplots(figsize=(8, 5))
        for name in dict.fromkeys(row["name"] for row in chosen):
            points = sorted((row["T"], row[key]) for row in chosen if row["name"] == name)
            axes.plot(*zip(*points), marker="o", label=name,
                      linestyle="-" if "AFNO" in name else "--")
        axes.set(xscale="log", yscale="log", xlabel="T", ylabel=label,
                 title=f"{part}, {chosen[0]['B'] * chosen[0]['T']:,} tokens")
        axes.set_xscale("log", base=2)
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
        figure.tight_layout()
        figure.savefig(folder / f"{part}_{key}.png", dpi=120)
        plt.close(figure)


def pattern(text: str) -> re.Pattern:
    """Return a regular expression; raise ArgumentTypeError where it is none."""
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"must be a regular expression, {error}") from None


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the arguments; raise InputError where they are wrong."""
    parser = Parser(description=__doc__)
    tokens = integer(1, 2**24)
    add = parser.add_argument
    add("--parts", default=",".join(PARTS),
        help=f"some of {', '.join(PARTS)}, or none: tables and plots alone")
    add("--lengths", type=lambda text: list(map(tokens, text.split(","))),
        default="256,512,1024,2048,4096,8192,16384,32768,65536",
        help="of operator and step, divisors of --tokens; batch is measured at those of 1024 and "
             "8192 among them")
    add("--tokens", type=tokens, default=65536, help="at every length")
    add("--model", choices=("d4", "d12"), default="d12", help="of step and profile")
    add("--only", type=pattern, default=re.compile(""), metavar="PATTERN",
        help="of operator, batch and step: rows with such names")
    add("--residual_bf16", type=one_of(0, 1), default=1, help="the trainer's, of step and profile")
    add("--compile", type=one_of(0, 1), default=1, help="the model, of step and profile, on a GPU")
    add("--output", type=FOLDER, default=Path(__file__).resolve().parent.parent / "runs/speed")
    args = parser.parse_args(argv)
    args.parts = [part for part in args.parts.split(",") if part != "none"]
    if unknown := set(args.parts) - set(PARTS):
        raise InputError(f"--parts must be of {', '.join(PARTS)} or none, got {', '.join(unknown)}")
    if max(args.lengths) > args.tokens:
        raise InputError(f"--lengths must be <= --tokens {args.tokens}, got {max(args.lengths)}")
    refuse_other_tokens(args)
    some = {*args.parts} != {*PARTS}  # of all parts batch may be missing
    if some and "batch" in args.parts and not BATCH_LENGTHS & {*args.lengths}:
        raise InputError("--lengths must have 1024 or 8192 for --parts batch, got "
                         + ",".join(map(str, args.lengths)))
    return args


def refuse_other_tokens(args: argparse.Namespace):
    """Raise InputError where rows of a length do not add up to --tokens, which the tables name."""
    uneven = [T for T in args.lengths if args.tokens % T]
    if uneven and {"operator", "step"} & {*args.parts}:
        raise InputError(f"--lengths must divide --tokens {args.tokens}, got {uneven[0]}")
    if "profile" in args.parts and args.tokens % min(PROFILE_LENGTH, args.tokens):
        raise InputError(f"--tokens must be < {PROFILE_LENGTH} or a multiple of it for --parts "
                         f"profile, got {args.tokens}")


def names(args: argparse.Namespace, runtime: Runtime) -> Iterator[str]:
    """Yield the names that --only chooses among, from the shortest length on."""
    # a GPU's kernels have names, too; on a CPU shapes are enough, without memory
    device = runtime.device if runtime.device.type == "cuda" else torch.device("meta")
    for T in sorted(args.lengths):
        if "step" in args.parts:
            yield from (name for name, _ in steps_at(T, args))
        if "operator" in args.parts or "batch" in args.parts and T in BATCH_LENGTHS:
            yield from (name for name, *_ in operators(1, T, device, runtime.dtype))


def refuse_no_name(args: argparse.Namespace, runtime: Runtime):
    """Raise InputError where --only chooses none of the names that there are."""
    found = {}
    for name in names(args, runtime):
        if args.only.search(name):
            return
        found[name] = None
    if found:
        raise InputError(f"--only {args.only.pattern}: no row has such a name (there are "
                         f"{'; '.join(found)})")


def measure_floors(tokens: int, device, dtype, emit) -> float:
    """Emit what copies and large products take here; return the products' FLOP/s."""
    u = torch.randn(tokens, C, device=device, dtype=dtype)
    out = torch.empty_like(u)
    ms, _, _ = measure(lambda: (out.copy_(u), out.copy_(u)), device)
    emit(dict(part="floor", name="u read and y written, dy read and du written", B=1, T=tokens,
              ms=ms, TB_per_s=4 * u.numel() * u.element_size() / ms / 1e9))
    matmul_rate = measure_matmul_rate(device, dtype)
    emit(dict(part="floor", name="large matrix product", TFLOP_per_s=matmul_rate / 1e12))
    return matmul_rate


def measure_parts(args: argparse.Namespace, runtime: Runtime, emit):
    """Measure the floors, then what --parts names; emit the rows."""
    matmul_rate = measure_floors(args.tokens, runtime.device, runtime.dtype, emit)
    operator = lambda B, T, part: measure_operators(B, T, args.only, runtime, part, emit)
    if "operator" in args.parts:
        for T in args.lengths:
            operator(args.tokens // T, T, "operator")
    if "profile" in args.parts:
        measure_profile(args, runtime, emit)
    if "step" in args.parts:
        measure_steps(args, runtime, matmul_rate, emit)
    if "batch" in args.parts:
        for T in sorted(BATCH_LENGTHS & {*args.lengths}):
            for B in (1, 4, 16):
                if B * T <= args.tokens:
                    operator(B, T, "batch")


def main(argv: list[str]) -> int:
    """Measure what is asked for, write tables and plots, and return the exit status."""
    args = parse(argv)
    with owned(args.output, f"--output {args.output}", {"tables.md": MADE_BY}):
        return analyse(args)


def analyse(args: argparse.Namespace) -> int:
    """Do what main does, in a folder of this process alone."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runtime = usual_runtime(device, bool(args.compile) and device.type == "cuda")
    file = args.output / "rows.jsonl"
    chip = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    where = f"torch {torch.__version__}, {chip}"
    print(f"{where}; convolution: {usable('convolution', device, runtime.dtype)[1]}", flush=True)

    common = dict(where=where, model=args.model, tokens=args.tokens,
                  compile=int(runtime.compile), code=code_of([Path(__file__)]))

    def emit(row: dict):
        row = row | common
        append_lines(file, row)
        print({key: round(value, 4) if isinstance(value, float) else value
               for key, value in row.items() if key not in HIDDEN}, flush=True)

    read_lines(file, is_whole)  # before hours of measuring
    if args.parts:
        refuse_no_name(args, runtime)
        append_lines(file)
        with contextlib.suppress(KeyboardInterrupt):  # what was measured becomes tables
            measure_parts(args, runtime, emit)
    measured = read_lines(file, is_whole)
    rows = latest(measured)
    if not rows:
        raise InputError(f"{file}: no rows; measure some of --parts {', '.join(PARTS)} first")
    write_tables(rows, args.output)
    try:
        plot(rows, args.output)
    except ImportError as error:
        print(f"no plots: {first_line(error)}", file=sys.stderr)
    if left_out := len(measured) - len(alike(measured)):
        print("left out, of another card, torch, --model, --tokens, --compile or code: "
              f"{left_out} rows; for tables of both use another --output")
    print(f"tables of {rows[-1]['where']}, and plots, in {args.output.name}/")
    return 0


def is_whole(row: dict) -> bool:
    """Return whether a row has all that tables and plots take, as numbers where they want them."""
    needed = NEEDED.get(row.get("part")) if all(itertools.starmap(is_good, row.items())) else None
    return needed is not None and row.keys() >= {
        "name", "where", *needed[: 2 if "error" in row else None]}


def is_good(name: str, value) -> bool:
    """Return whether a row may have such a value under this name."""
    if name in WORDS:
        return isinstance(value, str)
    if name == "by_kernel_ms":
        return isinstance(value, dict) and all(is_good("ms", ms) for ms in value.values())
    if name == "compile":
        return one_of(0, 1).accepts(value)
    if name in COUNTS:
        return integer(1, 10**18).accepts(value)
    return type(value) in (int, float) and (
        0 < value < 1e18 or value == 0 and name in OR_ZERO or value != value and name in OR_NAN)


def alike(rows: list[dict]) -> list[dict]:
    """Return the rows that have in common with the last one what COMMON names.

    Old rows have neither compile nor code, so they are of other code than new ones.
    """
    made = lambda row: [row.get(name) for name in COMMON]
    return [row for row in rows if made(row) == made(rows[-1])]


def latest(rows: list[dict]) -> list[dict]:
    """Return the rows that are alike; of what was measured twice the last."""
    return [*{(row["part"], row["name"], row.get("B"), row.get("T")): row
              for row in alike(rows)}.values()]


if __name__ == "__main__":
    run(main, memory="--tokens")
