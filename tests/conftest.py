"""Set up the tests: fast ones first, Triton's interpreter where there is no GPU."""
import os

# Threads that wait for each other at small operations must not spin: on a busy machine that made
# them 10 times slower. OpenMP reads this when torch is loaded; processes that tests start, too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # on CPU tensors, in fp32; before its kernels are made

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
