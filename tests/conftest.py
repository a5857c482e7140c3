"""Set up the tests: fast ones first, one thread, Triton's interpreter where there is no GPU."""
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # on CPU tensors, in fp32; before its kernels are made

# Two threads of torch wait for each other at every small operation, and on a busy machine each
# wait is a time slice: 2 tests took 20 times as long. Processes that tests start get it, too.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# Of test_causality.py, which has no pytest in it: what takes more than two seconds.
SLOW = ("test_causality.py::",)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than two seconds (-m 'not slow')")


def pytest_collection_modifyitems(items):
    """Mark test_causality.py's slow tests, and move slow tests to the end."""
    for item in items:
        if item.nodeid.startswith(SLOW):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture
def fresh_compiler():
    """Forget compilations: variants of other tests count, and too many of them stop it."""
    torch._dynamo.reset()
