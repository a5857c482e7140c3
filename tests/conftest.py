"""Set up the tests: fast ones first, Triton's interpreter where there is no GPU."""
import os

# One thread a process: at operations as small as the tests' more of them wait for each other most
# of the time, and longer on a busy machine. OpenMP reads this when torch is loaded; processes that
# tests start, too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # on CPU tensors, in fp32; before its kernels are made

# Of test_causality.py, which has no pytest in it: what takes more than a second.
SLOW = ("test_causality.py::",)
# Slow tests of these start processes and wait for them, some for so many seconds at most. They are
# done one at a time, on a machine of many cores one of each file.
PROCESSES = ("test_trainer", "test_faults", "test_ranks")
MANY_CORES = 8


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a second (-m 'not slow')")
    config.addinivalue_line("markers", "xdist_group(name): of tests that one process runs")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks for groups
def pytest_collection_modifyitems(items):
    """Mark and group slow tests, and move them to the end: first those that one process does."""
    for item in items:
        if item.nodeid.startswith(SLOW):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("slow") and item.path.stem in PROCESSES:
            many = (os.cpu_count() or 1) >= MANY_CORES
            item.add_marker(pytest.mark.xdist_group(item.path.stem if many else "processes"))
    marked = lambda item, name: item.get_closest_marker(name) is not None
    items.sort(key=lambda item: marked(item, "slow") * (2 - marked(item, "xdist_group")))


@pytest.fixture
def fresh_compiler():
    """Forget compilations: variants of other tests count, and too many of them stop it."""
    torch._dynamo.reset()
