"""python tests/compile_kernels.py ARCH: compiles afno_triton's kernels for compute capability ARCH, with no GPU, as they are
launched in bf16 at 64 channels a filter. Prints what each takes; exits 1 where that is more than the GPU has."""
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

import afno_triton as kernels  # noqa: E402

ARCH = int(sys.argv[1])
SHAPES, SHARED = (kernels.SMALL, 99 * 1024) if ARCH in (86, 89) else (kernels.LARGE, 163 * 1024)
BF16 = dict.fromkeys(("x_ptr", "y_ptr", "u_ptr", "dy_ptr", "dm_ptr", "tiles_ptr", "near_ptr", "mixed_ptr",
                       "half_ptr", "out_ptr"), "*bf16")
FP32 = dict(BF16, response_ptr="*fp32")
PRODUCTS = (kernels.short_kernel, kernels.transform_kernel, kernels.mix_kernel, kernels.long_kernel,
            kernels.tiles_gradient_kernel, kernels.response_gradient_kernel, kernels.sent_kernel, kernels.state_kernel,
            kernels.state_gradient_kernel)
STATE = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "state_ptr", "dsent_ptr", "dq_ptr", "dk_ptr", "dv_ptr"), "*bf16")
STATE |= dict(BF16, log_a_ptr="*fp32", dlog_a_ptr="*fp32")
UNALIGNED = ("num_blocks", "num_lags", "blocks", "splits", "units", "together", "units_each", "K",
             "tile_step", "row_step", "sign", "vocab_size", "T")


def compile(kernel, pointers: dict, constants: dict, options: dict) -> int:
    names = [p.name for p in kernel.params]
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
               if name not in constants and name not in UNALIGNED}
    built = triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned),
                           target=GPUTarget("cuda", ARCH, 32), options=options)
    ptx = built.asm["ptx"]
    print(f"{kernel.__name__} {constants}: {built.metadata.shared} bytes of shared memory, tensor core instructions "
          f"{ptx.count('wgmma.mma_async') + ptx.count('mma.sync')}", flush=True)
    assert "mma" in ptx or kernel not in PRODUCTS
    assert kernel is not kernels.cross_entropy_kernel or "ld.global.v4" in ptx  # 16 bytes, though vocab_size is odd
    return built.metadata.shared


def main() -> int:
    shapes = {name: SHAPES[name] for name in ("BN", "BK")}
    options = {name: value for name, value in SHAPES.items() if name not in shapes}
    gradient = dict(FP32, out_ptr="*fp32")
    shared = []
    far = dict(W=64, FAR=kernels.FAR)
    for transposed in (False, True):
        shared.append(compile(kernels.short_kernel, BF16, dict(W=64, NEAR=kernels.NEAR, TRANSPOSED=transposed, **shapes),
                              options))
        shared.append(compile(kernels.mix_kernel, FP32, dict(far, TRANSPOSED=transposed, **kernels.MIX), {}))
    for kernel in (kernels.transform_kernel, kernels.long_kernel):
        shared.append(compile(kernel, BF16, dict(far, **shapes), options))
    for lags in {1, SHAPES["BN"] // kernels.NEAR}:
        shared.append(compile(kernels.tiles_gradient_kernel, gradient,
                              dict(W=64, NEAR=kernels.NEAR, LAGS=lags, BK=SHAPES["BK"]), options))
    for BI, BK in kernels.RESPONSE.items():
        shared.append(compile(kernels.response_gradient_kernel, gradient, dict(far, BI=BI, BK=BK), {}))
    for shape in ((kernels.NEAR, kernels.NEAR), (kernels.NEAR, kernels.FAR)):
        shared.append(compile(kernels.toeplitz_kernel, dict(FP32, taps_ptr="*fp32"),
                              dict(ROWS=shape[0], COLUMNS=shape[1], BP=16), {}))
    for size in (16, 64, kernels.NEAR):
        shared.append(compile(kernels.fold_kernel, dict(gradient, tiles_ptr="*fp32"),
                              dict(LAGS=1, SIZE=size, BP=min(size, 32)), {}))
    for transposed, silu, is_gradient in ((False, False, False), (True, False, False), (False, True, False), (False, True, True)):
        shared.append(compile(kernels.depthwise_kernel, dict(BF16, taps_ptr="*fp32"), dict(
            LENGTH=4, TRANSPOSED=transposed, SILU=silu, GRADIENT=is_gradient, BT=32, BC=128), {}))
    shared.append(compile(kernels.depthwise_gradient_kernel, gradient, dict(BT=32, BC=128), {}))
    state = dict(L=kernels.CHUNK, DP=128, WP=128)
    for from_start in (False, True):
        shared.append(compile(kernels.sent_kernel, STATE, dict(state, FROM_START=from_start), {}))
    shared.append(compile(kernels.state_kernel, STATE, state, {}))
    shared.append(compile(kernels.state_gradient_kernel, STATE, state, kernels.STATE_GRADIENT))
    for cap, dtype, scale in ((0.0, "bf16", 1.0), (15.0, "bf16", 1.0), (15.0, "fp8e5", 32768.0)):
        pointers = dict(logits_ptr="*bf16", gradient_ptr=f"*{dtype}", targets_ptr="*i64", losses_ptr="*fp32")
        shared.append(compile(kernels.cross_entropy_kernel, pointers,
                              dict(CAP=cap, GRADIENT=True, SCALE=scale, BV=kernels.SOFTMAX["BV"]),
                              dict(num_warps=kernels.SOFTMAX["num_warps"])))
    shared.append(compile(kernels.transpose_kernel, dict(x_ptr="*i8", y_ptr="*i8"), dict(BLOCK=128), dict(num_warps=8)))
    print(f"at most {max(shared)} of {SHARED} bytes")
    return int(max(shared) > SHARED)


if __name__ == "__main__":
    sys.exit(main())
