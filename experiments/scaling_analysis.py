"""Speed and memory against length and batch: the operator, a whole training step, and where a step's time goes.

    python experiments/scaling_analysis.py                              # all parts, into runs/speed/
    python experiments/scaling_analysis.py --parts operator --lengths 1024,4096

Parts: operator (u to y, as attention's core is q, k, v to o, at constant tokens; AFNO's cores are the mean of twelve layers,
whose filters are made at once), batch (the same at constant T), step
(forward, backward and optimizer of the trainer's model), profile (a step's time by phase and by kernel). Every run is warmed
up, timed by events on the GPU (operators as CUDA graphs), and reported as the median; inputs are random. Rows go to
rows.jsonl as they are measured; tables.md and the plots are made from that file, also from one of an earlier run with
--parts none.
"""
import argparse
import contextlib
import functools
import json
import math
import re
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import afno  # noqa: E402
from train_gpt2_afno import (GPT, MODELS, GPTConfig, Runtime, flops_per_token, make_optimizers, measure_matmul_rate,  # noqa: E402
                             random_tokens)

PARTS = ("operator", "batch", "step", "profile")
C = 768
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION}
STEPS = {  # of d12; filters of T taps where nothing else is said
    "attention, 12 heads of 64": dict(mixer="attn", n_head=12),
    "attention, 6 heads of 128": dict(mixer="attn", n_head=6),
    "AFNO with attention in 3, 9": dict(mixer="afno", attn_layers=(3, 9)),
    "AFNO": dict(mixer="afno"),
    "AFNO with attention in 3, 9, 1024 taps": dict(mixer="afno", attn_layers=(3, 9), afno_filter_length=1024),
    "AFNO with 6 heads of attention in 3, 9, default taps": dict(
        mixer="afno", attn_layers=(3, 9), n_head=6, afno_filter_length=None),
    "AFNO, 1024 taps": dict(mixer="afno", afno_filter_length=1024),
    "AFNO, --recompute 1": dict(mixer="afno", recompute=True),
    "AFNO, form state": dict(mixer="afno", afno_form="state"),
}


def measure(run, device: torch.device, seconds: float = 0.3, graph: bool = False) -> tuple[float, float, float]:
    """Median and range of run()'s time in ms, and its peak of memory above what was there before, in MB.

    graph: what run() launches on a GPU is recorded once as a CUDA graph and replayed. For runs of a few short kernels, which
    the GPU does faster than the host launches them: in a training step the host is ahead, here the GPU would wait.
    """
    if device.type == "cpu":
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
# operators: each is (inputs that want gradients, function of them, multiply-adds a token and channel in forward, layers)

LAYERS = 12  # of AFNO's cores: a model makes the filters of all its layers at once, a core has its share of that


def fft_conv(u, taps):
    """The usual FFT convolution, in fp32: not bitwise causal, and no kernel of it is fused with another."""
    n = 2 * u.size(1)
    spectrum = torch.fft.rfft(u.float(), n=n, dim=1) * torch.fft.rfft(taps, n=n).repeat_interleave(
        u.size(2) // len(taps), 0).T
    return torch.fft.irfft(spectrum, n=n, dim=1)[:, : u.size(1)].to(u.dtype)


def conv_products(T: int, K: int) -> float:
    """Multiply-adds a token and channel of the kernels' forward: see afno_triton."""
    far = afno.afno_triton.FAR
    if afno.afno_triton.is_short(T, K):
        return afno.afno_triton.multiply_adds(T, K)
    return 3 * far + 2 * (math.ceil(T / far) + 1)  # near field, transform there and back; mixing


def operators(B: int, T: int, device, dtype):
    """(name, inputs, function, multiply-adds a token and channel, layers); generated one by one to hold little memory."""
    def random(*shape, scale=1.0, dtype=dtype):
        return (scale * torch.randn(shape, device=device)).to(dtype).requires_grad_()

    for head in (64, 128):
        for name, backend in BACKENDS.items():
            q, k, v = (random(B, C // head, T, head) for _ in range(3))

            def attention(q, k, v, backend=backend):
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(q, k, v, is_causal=True)

            yield f"SDPA {name}, head {head}", (q, k, v), attention, T, 1
    filters = C // afno.AFNO1D.channels_per_filter
    u, taps = random(B, T, C), random(filters, T, scale=0.1, dtype=torch.float32)
    yield "FFT, unfused, fp32", (u, taps), fft_conv, math.nan, 1
    if T <= 16384:  # its matrices grow
        yield "AFNO, plain path, taps given", (u, taps), afno.plain_conv, math.nan, 1
    kernels = afno.kernel_path(device, dtype)[0]
    if kernels:
        yield "AFNO, kernels, taps given", (u, taps), afno.kernel_conv, conv_products(T, T), 1
    compiled = functools.partial(torch.compile, dynamic=False) if device.type == "cuda" else lambda function: function
    for K in sorted({T, min(T, 128), min(T, 1024)}):
        makers = [afno.AFNO1D(C, filter_length=K).to(device).operator.taps for _ in range(LAYERS)]
        make, conv = compiled(afno.taps_at_once), compiled(afno.causal_conv)

        def cores(*inputs, makers=makers, make=make, conv=conv):
            with torch.autocast(device.type, enabled=False):
                all_taps = make(makers)
            return [conv(u, taps) for u, taps in zip(inputs, all_taps)]

        yield (f"AFNO core, {'T' if K == T else K} taps",
               (*(random(B, T, C) for _ in makers), *(p for maker in makers for p in maker.parameters())),
               cores, conv_products(T, K) if kernels else math.nan, LAYERS)
    mixer = afno.AFNO1D(C, form="state").to(device)
    operand, core = random(B, T, mixer.sizes[0]), compiled(mixer.operator)
    # a chunk's scores and sum, of which a product makes half for nothing, what it sends and what it reads
    products = (afno.afno_triton.CHUNK + afno.AFNO1D.channels_per_head) * 2 if kernels else math.nan
    yield ("AFNO core, form state", (operand, *mixer.operator.parameters()), lambda operand, *_: core(operand), products, 1)
    mixer = afno.AFNO1D(C).to(device)

    def around(z, *_):
        z = mixer.short_conv(z)
        return afno.rmsnorm(z + mixer.direct.to(z.dtype) * z)

    yield ("short convolution, direct term and norm beside it", (u, *mixer.short_conv.parameters(), mixer.direct),
           compiled(around), math.nan, 1)


def outputs(y: torch.Tensor | list) -> list:
    return y if isinstance(y, list) else [y]


def measure_operators(B: int, T: int, only, device, dtype, runtime, part: str, emit):
    for name, inputs, function, products, layers in operators(B, T, device, dtype):
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

            row["forward_ms"] = measure(forward, device, graph=True)[0] / layers
            row["ms"], row["range_ms"], memory = (value / layers for value in measure(both, device, graph=True))
            if layers == 1:  # the peak of twelve layers is not twelve times that of one
                row["memory_MB"] = memory
        except RuntimeError as error:  # a backend that does not run here, or too little memory: said, not hidden
            emit(dict(row, error=str(error).strip().splitlines()[0][:200]))
            continue
        finally:
            torch._dynamo.reset()
        elements = B * T * C
        row["TB_per_s"] = 4 * elements * inputs[0].element_size() / row["ms"] / 1e9  # u, y, dy, du once each
        # backward: 2.5 times for attention, 2 for a convolution; a causal product of T x T is half of it
        factor = 3.5 if name.startswith("SDPA") else 3
        row["TFLOP_per_s"] = factor * 2 * products * elements / row["ms"] / 1e9
        emit(row)


# -----------------------------------------------------------------------------
# whole steps


def training_step(options: dict, model_name: str, B: int, T: int, device, runtime):
    """A function that makes one step of the trainer's on random tokens, and its phases."""
    n_layer, n_head, n_embd = MODELS[model_name]
    options = dict(n_head=n_head) | options
    if model_name == "d4":  # for a test of this script on a CPU
        options.update(n_head=n_head, attn_layers=options.get("attn_layers", ())[:1] and (1,))
    recompute = options.pop("recompute", False)  # of the trainer, not of the model's configuration
    torch.manual_seed(0)
    config = GPTConfig(n_layer=n_layer, n_embd=n_embd, sequence_length=T, **options)
    model = GPT(config).to(device)
    for block in model.transformer.h:
        block.recompute = recompute
    if runtime.compile:
        model.compile()
    optimizers = make_optimizers(model, "muon", 1e-4, 0.1)
    tokens = random_tokens((B, T + 1), config.vocab_size).to(device)

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


def measure_step(row: dict, options: dict, device, runtime, matmul_rate) -> dict:
    model, step, backpropagate, optimize = training_step(options, row["model"], row["B"], row["T"], device, runtime)
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


def measure_steps(lengths, tokens, model_name, residual_bf16, only, device, runtime, matmul_rate, emit):
    for T in lengths:
        for name, options in STEPS.items():
            if (options.get("afno_filter_length") or 0) >= T or not only.search(name):
                continue  # the former has been measured: T taps are all there are
            options = dict(afno_filter_length=T, residual_bf16=residual_bf16) | options
            row = dict(part="step", name=step_name(name, residual_bf16), B=tokens // T, T=T, model=model_name)
            try:
                emit(measure_step(row, options, device, runtime, matmul_rate))
            except torch.OutOfMemoryError as error:
                emit(dict(row, error=str(error).splitlines()[0][:200]))
            torch._dynamo.reset()
            if device.type == "cuda":
                torch.cuda.empty_cache()


def step_name(name: str, residual_bf16: int) -> str:
    return name if residual_bf16 else f"{name}, fp32 residual"


KERNELS = (  # (what, pattern of kernel names), the first that fits
    ("attention", r"flash|fmha|sdpa|attention"),
    ("convolution",
     r"^(toeplitz|short|transform|mix|long|tiles_gradient|response_gradient|fold|depthwise\w*|sent|state\w*)_kernel"),
    ("matrix products", r"gemm|nvjet|cutlass|xmma|cublas|addmm|matmul"),
    ("AdamW", r"adam|multi_tensor"),
    ("loss", r"log_softmax|scatter|gather|cross_entropy"),
    ("fused elementwise, norms and sums of TorchInductor", r"^triton_"),
    ("copies and casts", r"memcpy|memset|copy|fill"),
)


def measure_profile(T, tokens, model_name, residual_bf16, device, runtime, emit):
    """Time of a step by phase (events) and by kernel (torch.profiler, of one step)."""
    from torch.profiler import ProfilerActivity, profile
    for name in ("attention, 12 heads of 64", "AFNO with attention in 3, 9"):
        options = dict(STEPS[name], residual_bf16=residual_bf16)
        model, step, backpropagate, optimize = training_step(options, model_name, max(tokens // T, 1), T, device, runtime)
        x = torch.randn(tokens // T * T, model.config.n_embd, device=device, requires_grad=True)
        targets = random_tokens((len(x),), model.config.vocab_size).to(device)

        def head():
            with runtime.autocast():
                loss, _ = model.loss(x, targets)
            loss.backward()

        row = dict(part="profile", name=step_name(name, residual_bf16), T=T, B=tokens // T)
        for phase, run in (("step", step), ("forward and backward", backpropagate), ("head and loss alone", head),
                           ("optimizers alone", optimize)):
            row[f"{phase}, ms"], _, _ = measure(run, device)
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        with profile(activities=activities) as profiler:
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
        kernels = {}
        for event in profiler.key_averages():
            time_us = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
            if time_us and (device.type == "cpu" or str(event.device_type).endswith("CUDA")):
                kernels[event.key[:110]] = kernels.get(event.key[:110], 0) + time_us / 1000
        row["by_kernel_ms"] = dict(sorted(kernels.items(), key=lambda item: -item[1]))
        emit(row)
        torch._dynamo.reset()


# -----------------------------------------------------------------------------
# tables and plots


def exponent(points: list[tuple[float, float]]) -> float:
    """Least-squares slope of log time against log T: 1 + the exponent of T in the cost of a token, at constant tokens."""
    xs, ys = zip(*((math.log(T), math.log(ms)) for T, ms in points))
    mx, my = statistics.mean(xs), statistics.mean(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys)) / sum((x - mx) ** 2 for x in xs)


def number(value) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"


def table(rows: list[dict], columns: dict[str, str]) -> list[str]:
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [row.get(key, row.get("error", "") if key == "ms" else "") for key in columns]
        lines.append("| " + " | ".join(cell if isinstance(cell, str) else number(cell) for cell in cells) + " |")
    return lines + [""]


def matrix(rows: list[dict], key: str, by: str) -> list[str]:
    """A table of names against lengths or batch sizes."""
    across = sorted({row[by] for row in rows})
    lines = [f"| {key}, {by} = | " + " | ".join(map(str, across)) + " | exponent |", "|" + "---|" * (len(across) + 2)]
    for name in dict.fromkeys(row["name"] for row in rows):
        found = {row[by]: row for row in rows if row["name"] == name}
        points = [(x, row[key]) for x, row in sorted(found.items()) if key in row]
        slope = f"{exponent(points):.2f}" if by == "T" and len(points) > 2 else ""
        cells = [number(found[x][key]) if x in found and key in found[x] else "does not run" if x in found else ""
                 for x in across]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {slope} |")
    return lines + [""]


def write_tables(rows: list[dict], folder: Path):
    by_part = {part: [row for row in rows if row["part"] == part] for part in (*PARTS, "floor")}
    lines = ["Made by experiments/scaling_analysis.py from rows.jsonl. ms are medians; exponents are slopes of log ms against "
             "log T at constant tokens (0: linear cost, 1: quadratic). AFNO's cores: the mean of twelve layers.", ""]
    lines += ["## Floors, same run", ""] + table(by_part["floor"], dict(name="", B="B", T="T", ms="ms", TB_per_s="TB/s",
                                                                       TFLOP_per_s="TFLOP/s"))
    if operator := by_part["operator"]:
        lines += ["## Operator, forward + backward, ms", ""] + matrix(operator, "ms", "T")
        lines += ["## Operator, forward, ms", ""] + matrix(operator, "forward_ms", "T")
        lines += ["## Operator, achieved TFLOP/s of the products it makes", ""]
        lines += matrix([row for row in operator if not math.isnan(row.get("TFLOP_per_s", 0))], "TFLOP_per_s", "T")
        lines += ["## Operator, achieved TB/s of u, y, dy and du once each", ""] + matrix(operator, "TB_per_s", "T")
        lines += ["## Operator, memory above its inputs, MB", ""]
        lines += matrix([row for row in operator if "memory_MB" in row or "error" in row], "memory_MB", "T")
    for T in sorted({row["T"] for row in by_part["batch"]}):
        lines += [f"## Operator, forward + backward, ms, T = {T}", ""]
        lines += matrix([row for row in by_part["batch"] if row["T"] == T], "ms", "B")
    if steps := by_part["step"]:
        lines += ["## Training step", ""] + table(steps, dict(
            name="mixers", T="T", B="rows", ms="ms", range_ms="range", optimizer_ms="optimizer, ms", tokens_per_s="tokens/s",
            mfu="MFU", peak_GiB="peak memory, GiB", parameters="parameters"))
        lines += amdahl(operator, steps)
    for row in by_part["profile"]:
        lines += [f"## Profile: {row['name']}, {row['B']} rows of {row['T']}", ""]
        lines += [f"- {key}: {number(row[key])}" for key in row if key.endswith(", ms")] + [""]
        kernels = {key: ms for key, ms in row["by_kernel_ms"].items() if "Optimizer.step#" not in key}  # that is a span
        groups = {}
        for key, ms in kernels.items():
            what = next((what for what, pattern in KERNELS if re.search(pattern, key, re.IGNORECASE)), "other")
            groups[what] = groups.get(what, 0) + ms
        for what, times, most in (("kernels", groups, None), ("kernel", kernels, 25)):
            lines += [f"| {what} | ms | share of all kernels |", "|---|---|---|"]
            lines += [f"| {key if what == 'kernels' else f'`{key}`'} | {number(ms)} | {ms / sum(kernels.values()):.1%} |"
                      for key, ms in sorted(times.items(), key=lambda item: -item[1])[:most]] + [""]
    (folder / "tables.md").write_text("\n".join(lines))


def amdahl(operator: list[dict], steps: list[dict]) -> list[str]:
    """What the ratio of steps could be: (D + 12 A) / (D - saved + n A + (12 - n) M), D - saved read off the AFNO step."""
    lines = ["## Ratio of tokens/s to all attention's, and the Amdahl bound", "",
             "A: attention's core a layer, the fastest backend; M: AFNO's core and what is beside it. D, the rest of the step, "
             "is all attention's step less 12 A; AFNO's has one projection of C x 2C less a layer, counted at the matmul rate.",
             "", "| T | against | mixers | ratio | bound | share |", "|---|---|---|---|---|---|"]
    for T in sorted({row["T"] for row in steps}):
        at = {row["name"]: row for row in steps if row["T"] == T and "tokens_per_s" in row}
        cores = {row["name"]: row["ms"] for row in operator if row["T"] == T and "ms" in row}
        beside = cores.get("short convolution, direct term and norm beside it", math.nan)
        for heads in (64, 128):
            attention = next((row for name, row in at.items() if name.endswith(f"of {heads}")), None)
            A = min((ms for name, ms in cores.items() if name.startswith("SDPA") and name.endswith(str(heads))),
                    default=math.nan)
            few = "1024" if T > 1024 else "T"
            for name, attention_layers, own_heads, taps in (
                    ("AFNO with attention in 3, 9", 2, 64, "T"), ("AFNO with attention in 3, 9, 1024 taps", 2, 64, few),
                    ("AFNO with 6 heads of attention in 3, 9, default taps", 2, 128, few),
                    ("AFNO", 0, heads, "T"), ("AFNO, 1024 taps", 0, heads, few)):
                if attention is None or name not in at or own_heads != heads:
                    continue
                M = cores.get(f"AFNO core, {taps} taps", math.nan) + beside
                ratio = at[name]["tokens_per_s"] / attention["tokens_per_s"]
                rate = attention["mfu"] and flops_of_row(attention) / attention["mfu"]
                saved = (12 - attention_layers) * 6 * 2 * C * C * attention["B"] * T / rate * 1000
                D = attention["ms"] - 12 * A
                bound = attention["ms"] / (D - saved + attention_layers * A + (12 - attention_layers) * M)
                lines.append(f"| {T} | head {heads} | {name} | {ratio:.3f} | {number(bound)} | {number(ratio / bound)} |")
    return lines + [""]


def flops_of_row(row: dict) -> float:
    """FLOP/s of a step of attention in every layer, as flops_per_token counts."""
    return (6 * row["parameters"] + 6 * 12 * C * row["T"]) * row["tokens_per_s"]


def plot(rows: list[dict], folder: Path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    for part, key, label in (("operator", "ms", "forward + backward, ms"), ("step", "tokens_per_s", "tokens/s"),
                             ("step", "peak_GiB", "peak memory, GiB")):
        chosen = [row for row in rows if row["part"] == part and key in row]
        if not chosen:
            continue
        figure, axes = plt.subplots(figsize=(8, 5))
        for name in dict.fromkeys(row["name"] for row in chosen):
            points = sorted((row["T"], row[key]) for row in chosen if row["name"] == name)
            axes.plot(*zip(*points), marker="o", label=name, linestyle="-" if "AFNO" in name else "--")
        axes.set(xscale="log", yscale="log", xlabel="T", ylabel=label,
                 title=f"{part}, {chosen[0]['B'] * chosen[0]['T']:,} tokens")
        axes.set_xscale("log", base=2)
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
        figure.tight_layout()
        figure.savefig(folder / f"{part}_{key}.png", dpi=120)
        plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}, or none: tables and plots alone")
    parser.add_argument("--lengths", default="256,512,1024,2048,4096,8192,16384,32768,65536",
                        help="of operator and step; batch is measured at those of 1024 and 8192 that are among them")
    parser.add_argument("--tokens", type=int, default=65536, help="at every length")
    parser.add_argument("--model", choices=("d4", "d12"), default="d12", help="of step and profile")
    parser.add_argument("--only", type=re.compile, default=re.compile(""), metavar="PATTERN",
                        help="of operator, batch and step: rows with such names")
    parser.add_argument("--residual_bf16", type=int, choices=(0, 1), default=1, help="the trainer's, of step and profile")
    parser.add_argument("--compile", type=int, choices=(0, 1), default=1)
    parser.add_argument("--output", type=Path,
                        default=Path(__file__).resolve().parent.parent / "runs/speed")
    args = parser.parse_args()
    parts = [part for part in args.parts.split(",") if part != "none"]
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts must be of {', '.join(PARTS)} or none, got {', '.join(unknown)}")
    lengths = [int(T) for T in args.lengths.split(",")]
    if bad := [T for T in lengths if not 1 <= T <= args.tokens]:
        parser.error(f"--lengths must be in [1, --tokens {args.tokens}], got {bad[0]}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # on a CPU this only shows that the script works
    runtime = Runtime(device, dtype, compile=bool(args.compile) and device.type == "cuda")
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "rows.jsonl"
    where = f"torch {torch.__version__}, " + (torch.cuda.get_device_name() if device.type == "cuda" else "CPU")
    print(f"{where}; convolution: {afno.kernel_path(device, runtime.dtype)[1]}", flush=True)

    def emit(row: dict):
        row = dict(row, where=where)
        with file.open("a") as f:
            f.write(json.dumps(row) + "\n")
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()
               if key not in ("by_kernel_ms", "where")}, flush=True)

    if parts:
        u = torch.randn(args.tokens, C, device=device, dtype=runtime.dtype)
        out = torch.empty_like(u)
        ms, _, _ = measure(lambda: (out.copy_(u), out.copy_(u)), device)
        emit(dict(part="floor", name="u read and y written, dy read and du written", B=1, T=args.tokens, ms=ms,
                  TB_per_s=4 * u.numel() * u.element_size() / ms / 1e9))
        matmul_rate = measure_matmul_rate(device, runtime.dtype)
        emit(dict(part="floor", name="matrix product of 8192 x 8192", TFLOP_per_s=matmul_rate / 1e12))
        del u, out
    with contextlib.suppress(KeyboardInterrupt):  # what was measured becomes tables
        if "operator" in parts:
            for T in lengths:
                measure_operators(args.tokens // T, T, args.only, device, runtime.dtype, runtime, "operator", emit)
        if "profile" in parts:
            measure_profile(min(1024, args.tokens), args.tokens, args.model, args.residual_bf16, device, runtime, emit)
        if "step" in parts:
            measure_steps(lengths, args.tokens, args.model, args.residual_bf16, args.only, device, runtime, matmul_rate, emit)
        if "batch" in parts:
            for T in sorted({1024, 8192} & {*lengths}):
                for B in (1, 4, 16):
                    if B * T <= args.tokens:
                        measure_operators(B, T, args.only, device, runtime.dtype, runtime, "batch", emit)
    latest = {}  # a row measured again replaces the old one
    for line in file.read_text().splitlines():
        row = json.loads(line)
        latest[row["part"], row["name"], row.get("B"), row.get("T")] = row
    write_tables(list(latest.values()), args.output)
    plot(list(latest.values()), args.output)
    print(f"tables and plots in {args.output.name}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
