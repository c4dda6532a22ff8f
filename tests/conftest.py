"""Shared by all tests: the time each file takes, printed against its budget, and an end to the slow ones."""

import os
import time
from collections import defaultdict

import pytest

# A test compiles what it tests, and leaves nothing in the user's cache; who tests the cache switches it on.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")

# Seconds of one core for each file, on two cores about half of the wall time in all: what `make test` runs first, then
# what `make check` and `make gpu` run.
BUDGET = defaultdict(lambda: 40.0) | {
    "tests/test_model.py": 60.0,
    "tests/test_moba.py": 60.0,
    "tests/test_clip_paths.py": 90.0,
    "tests/test_moba_sm90.py": 600.0,
    "tests/test_moba_tpu.py": 900.0,
    "tests/test_symmetric_matmul.py": 60.0,
    "tests/test_memory.py": 240.0,
    "tests/test_doctor.py": 240.0,
    "tests/test_faults.py": 900.0,
    "tests/test_prepare.py": 300.0,
    "tests/test_mutants.py": 600.0,
    "tests/test_running.py": 900.0,
    "tests/test_meshes.py": 600.0,
    "tests/test_stages.py": 300.0,
    "tests/test_processes.py": 900.0,
    "tests/test_notebook.py": 240.0,
    "tests/test_package.py": 240.0,
    "tests/test_logit_explosion.py": 180.0,
    "tests/test_slices.py": 180.0,
    "tests/test_gpu.py": 300.0,
    "tests/test_two_gpus.py": 600.0,
}

_seconds = defaultdict(float)


def pytest_runtest_setup(item):
    """Where CHECK_UNTIL says so (seconds since 1970), no slow test starts any more: CI has an end, machines differ."""
    until = os.environ.get("CHECK_UNTIL")
    if until and item.get_closest_marker("check") and time.time() > float(until):
        pytest.skip("not started: CHECK_UNTIL has passed")


def pytest_runtest_logreport(report):
    _seconds[report.nodeid.partition("::")[0]] += report.duration


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("seconds by file")
    for name, seconds in sorted(_seconds.items(), key=lambda item: -item[1]):
        over = "  OVER ITS BUDGET" if seconds > BUDGET[name] else ""
        terminalreporter.write_line(f"{seconds:7.1f} of {BUDGET[name]:4.0f}  {name}{over}")
