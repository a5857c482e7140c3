"""Without a GPU Triton's kernels run in its interpreter: on CPU tensors, in fp32. It must be told before they are made."""
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def fresh_compiler():
    """Or variants of other tests count, and what comes after too many of them runs without compilation."""
    torch._dynamo.reset()
