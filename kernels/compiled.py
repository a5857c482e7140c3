"""How the kernels are compiled. This file needs Triton."""
import triton

# Numbers that change with the batch and the length. Triton would compile a kernel anew where one of
# them is 1 or a multiple of 16; none is the stride of what a kernel reads 16 bytes at a time.
SIZES = ("B", "T", "K", "num_blocks", "num_lags", "blocks", "splits", "units", "together",
         "units_each", "tokens")

jit = triton.jit(do_not_specialize=SIZES)
