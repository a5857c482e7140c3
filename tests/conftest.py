"""Without a GPU Triton's kernels run in its interpreter: on CPU tensors, in fp32. It must be told before they are made."""
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
