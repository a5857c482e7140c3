"""python tests/compile_kernels.py ARCH: compile the kernels for capability ARCH, without a GPU.

They are compiled as they are launched in bf16 at 64 channels a filter. Prints a line a kernel:
shared memory, tensor core instructions, and, where Triton brings ptxas, registers and spills. Exits
1 where one takes more shared memory than the GPU has.
"""
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kernels import convolution as conv, softmax, state, token_conv  # noqa: E402
from kernels.blocks import BLOCK  # noqa: E402
from kernels.compiled import SIZES  # noqa: E402

HALF = ("x_ptr y_ptr u_ptr dy_ptr dm_ptr tiles_ptr near_ptr mixed_ptr half_ptr out_ptr q_ptr k_ptr "
        "v_ptr state_ptr dsent_ptr dq_ptr dk_ptr dv_ptr logits_ptr gradient_ptr w_ptr du_ptr "
        "dw_ptr")
FULL = "response_ptr taps_ptr log_a_ptr dlog_a_ptr losses_ptr shares_ptr"
POINTERS = dict.fromkeys(HALF.split(), "*bf16") | dict.fromkeys(FULL.split(), "*fp32")
POINTERS["targets_ptr"] = "*i64"
UNALIGNED = (*SIZES, "tile_step", "row_step", "sign", "vocab_size")
NO_PRODUCTS = (conv.toeplitz_kernel, conv.fold_kernel, conv.depthwise_kernel,
               conv.depthwise_gradient_kernel, softmax.cross_entropy_kernel,
               softmax.transpose_kernel)


def build(arch: int, kernel, constants: dict, options: dict, pointers: dict):
    """Return the compiled kernel; pointers: types that are not those of POINTERS."""
    names = [p.name for p in kernel.params]
    types = POINTERS | pointers
    signature = {name: "constexpr" if name in constants else types.get(name, "i32")
                 for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
               if name not in constants and name not in UNALIGNED}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(arch: int, ptx: str) -> str:
    """Return registers and spills of a kernel in words, "" where no ptxas of Triton's takes it."""
    target = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
    binaries = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        for ptxas in sorted(binaries.glob("ptxas*")):
            done = subprocess.run([ptxas, "-v", f"--gpu-name={target}", file, "-o", "/dev/null"],
                                  capture_output=True, text=True)
            registers = re.search(r"Used (\d+) registers", done.stderr)
            spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
            if registers and spills:
                return f", {registers[1]} registers, spills {spills[1]} + {spills[2]} bytes"
    return ""


def launches(arch: int):
    """Yield (kernel, constants, options, pointers) of all that is launched on this architecture."""
    shapes = conv.SMALL if arch in (86, 89) else conv.LARGE
    tile = {name: shapes[name] for name in ("BN", "BK")}
    options = {name: value for name, value in shapes.items() if name not in tile}
    near, far, full = dict(W=64, NEAR=conv.NEAR), dict(W=64, FAR=conv.FAR), dict(out_ptr="*fp32")
    for transposed in (False, True):
        yield conv.short_kernel, dict(near, TRANSPOSED=transposed, **tile), options, {}
        yield conv.mix_kernel, dict(far, TRANSPOSED=transposed, **conv.MIX), {}, {}
    for kernel in (conv.transform_kernel, conv.long_kernel):
        yield kernel, dict(far, **tile), options, {}
    for lags in {1, tile["BN"] // conv.NEAR}:
        yield conv.tiles_gradient_kernel, dict(near, LAGS=lags, BK=tile["BK"]), options, full
    for BI, BK in conv.RESPONSE.items():
        yield conv.response_gradient_kernel, dict(far, BI=BI, BK=BK), {}, full
    for columns in (conv.NEAR, conv.FAR):
        yield conv.toeplitz_kernel, dict(ROWS=conv.NEAR, COLUMNS=columns, BP=16), {}, {}
    for size in (16, 64, conv.NEAR):
        yield (conv.fold_kernel, dict(LAGS=1, SIZE=size, BP=min(size, 32)), {},
               dict(full, tiles_ptr="*fp32"))
    few = dict(BT=32, BC=128)
    for variant in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 1, 1)):
        flags = dict(zip(("TRANSPOSED", "SILU", "GRADIENT"), map(bool, variant)))
        yield conv.depthwise_kernel, dict(few, LENGTH=4, **flags), {}, {}
    yield conv.depthwise_gradient_kernel, few, {}, full
    for kernel in (token_conv.token_conv_kernel, token_conv.token_conv_gradient_kernel):
        yield kernel, dict(LENGTH=16, W=64, BLOCK=BLOCK, BW=64), {}, {}
    chunk = dict(L=state.CHUNK, DP=128, WP=128)
    for from_start in (False, True):
        yield state.sent_kernel, dict(chunk, FROM_START=from_start), {}, {}
    yield state.state_kernel, chunk, {}, {}
    yield state.state_gradient_kernel, chunk, state.STATE_GRADIENT, {}
    width, warps = ({name: softmax.SOFTMAX[name]} for name in ("BV", "num_warps"))
    for cap, dtype, scale, K in ((0.0, "bf16", 1.0, 1), (15.0, "bf16", 1.0, 1),
                                 (15.0, "fp8e5", 32768.0, 1), (15.0, "fp8e5", 32768.0, 4)):
        constants = dict(width, CAP=cap, GRADIENT=True, SCALE=scale, K=K)
        yield softmax.cross_entropy_kernel, constants, warps, dict(gradient_ptr=f"*{dtype}")
    bytes_alone = dict(x_ptr="*i8", y_ptr="*i8")
    yield softmax.transpose_kernel, dict(BLOCK=128), dict(num_warps=8), bytes_alone


def main() -> int:
    arch = int(sys.argv[1])
    limit, shared = (99 if arch in (86, 89) else 163) * 1024, []
    for kernel, constants, options, pointers in launches(arch):
        built = build(arch, kernel, constants, options, pointers)
        ptx = built.asm["ptx"]
        tensor_cores = ptx.count("wgmma.mma_async") + ptx.count("mma.sync")
        shared.append(built.metadata.shared)
        print(f"{kernel.__name__} {constants}: {shared[-1]} bytes of shared memory, tensor core "
              f"instructions {tensor_cores}{resources(arch, ptx)}", flush=True)
        assert tensor_cores or kernel in NO_PRODUCTS
        # 16 bytes at a time, though vocab_size is odd
        assert kernel is not softmax.cross_entropy_kernel or "ld.global.v4" in ptx
    print(f"at most {max(shared)} of {limit} bytes")
    return int(max(shared) > limit)


if __name__ == "__main__":
    sys.exit(main())
