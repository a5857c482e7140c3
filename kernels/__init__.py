"""Kernels in Triton, and the head's loss. Skip the former: plain PyTorch computes the same sums.

    compiled.py       how kernels are compiled
    blocks.py         mathematics that the plain paths of afno.py use, too; no Triton
    convolution.py    causal_conv and short_conv
    token_conv.py     token_conv: taps of each token's own
    state.py          state_scan
    softmax.py        the softmax of the loss, a transpose
    loss.py           linear_cross_entropy, and what fp8 is; imports without Triton
    trials.py         every kernel against float64, before it is trusted

This file imports without Triton. `usable` says whether a kernel may be used, and why;
`keep_products` what --recompute keeps.
"""
import functools
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts


PROBING = {what: threading.RLock() for what in ("convolution", "token", "state", "loss", "fp8")}


def installed() -> bool:
    """Return whether Triton can be imported here."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def operators() -> set:
    """Return the operators that recomputing should not run again."""
    if not installed():
        return set()
    from kernels import convolution, state  # noqa: F401

    return {torch.ops.afno.block_conv.default, torch.ops.afno.state_scan.default}


def keep_products():
    """Return torch.utils.checkpoint's contexts for --recompute: keep products, recompute the rest.

    Kept for backward are the results of matrix products, attention, long convolutions and states.
    """
    attention = [f"_scaled_dot_product_{name}" for name in (
        "flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")]
    kept = {getattr(torch.ops.aten, name).default
            for name in ("mm", "addmm", "bmm", "_scaled_mm", *attention)}
    kept |= operators()

    def policy(context, op, *args, **kwargs):
        keep = op in kept
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def constant(function):
    """Mark a function whose result torch.compile is to take for a constant.

    torch.compiler.assume_constant_result does the same, and imports the compiler for it: 2.4 s.
    """
    function._dynamo_marked_constant = True
    return function


def operator(name: str):
    """Return a decorator: the function becomes the operator afno::name, opaque to torch.compile.

    torch.library.custom_op does the same, and imports the compiler at the first call: 2 s. Here
    the function is hidden from the compiler where that has been imported already.
    """
    def register(function):
        hidden = torch._disable_dynamo(function)
        run = lambda *args: (hidden if "torch._dynamo" in sys.modules else function)(*args)
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(f"afno::{name}", schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(f"afno::{name}", "default", run)
        return getattr(torch.ops.afno, name).default
    return register


def save_inputs(ctx, inputs, output):
    """Keep all inputs of an operator for its gradient: a setup_context of register_autograd."""
    ctx.save_for_backward(*inputs)


@constant
def usable(what: str, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Return whether kernels serve operands of this dtype on this device, and why, in one line.

    what: convolution (causal_conv and short_conv), token (token_conv), state, loss (its softmax),
    or fp8 (products of the head and of Fp8Linear; dtype is the one that they replace). The first
    call for a device tries the kernels there; the answer is kept. Other threads wait for it.
    """
    with PROBING[what]:
        return probe(what, device, dtype)


def at_once(function, items, device: torch.device) -> list:
    """Return function(item) of each, on a GPU in threads: Triton's compiler leaves Python free."""
    if device.type != "cuda":
        return [function(item) for item in items]
    # threads begin on card 0
    card = torch.cuda.current_device() if device.index is None else device.index

    def on_card(item):
        torch.cuda.set_device(card)
        return function(item)

    with ThreadPoolExecutor() as pool:
        return list(pool.map(on_card, items))


def try_kernels(names, device: torch.device, dtype: torch.dtype):
    """Try the kernels of these names, as usable does, all at once: later calls have the answer."""
    at_once(lambda name: usable(name, device, dtype), names, device)


@functools.cache
def probe(what: str, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Return usable's answer, which is found here once."""
    if what == "fp8":
        return probe_fp8(device, dtype)
    if missing := missing_condition(device, dtype):
        return False, f"plain PyTorch: {missing}"
    from kernels import trials

    if fault := trials.find_fault(what, device, dtype, trials.BOUNDS[what]):
        return False, f"plain PyTorch: Triton kernels do not work here: {fault}"
    return True, f"Triton kernels on {torch.cuda.get_device_name(device)}, agree with float64"


def missing_condition(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return what this device or dtype lacks for every kernel, or None."""
    if device.type != "cuda":
        return f"Triton kernels need a CUDA device, this is {device.type}"
    if not installed():
        return "Triton is not installed"
    if (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        return (f"Triton kernels need compute capability 8.0, {torch.cuda.get_device_name(device)} "
                f"has {capability[0]}.{capability[1]}")
    if dtype not in (torch.bfloat16, torch.float16):
        return f"Triton kernels need half precision, this is {name_of(dtype)}"
    return None


def probe_fp8(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Return whether products in fp8 work here, and why."""
    usual = f"{name_of(dtype)} products"
    softmax, why = usable("loss", device, dtype)
    if not softmax:
        return False, f"{usual}: fp8 needs the Triton kernel of the loss, which is not used ({why})"
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        return False, (f"{usual}: fp8 needs compute capability 8.9, {name} has "
                       f"{capability[0]}.{capability[1]}")
    from kernels import trials

    fault, off = trials.try_fp8(device, dtype)
    if fault:
        return False, f"{usual}: fp8 {fault}"
    return True, (f"fp8 products on {name}, within {off:.1e} of float64; validation in "
                  f"{name_of(dtype)}")


def name_of(dtype: torch.dtype) -> str:
    """Return a dtype's name without `torch.`."""
    return str(dtype).removeprefix("torch.")
