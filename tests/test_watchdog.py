"""The watchdog: what counts as a hang, what it writes, and that it ends nothing."""

import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from k2jax.training.watchdog import Watchdog

ROOT = Path(__file__).parents[1]


@pytest.fixture
def watch(tmp_path, caplog):
    """Makes a watchdog; closes it at the end."""
    caplog.set_level(logging.WARNING)
    made = []

    def make(limit=None):
        made.append(Watchdog(tmp_path / "hang.txt", limit))
        return made[-1]

    yield make
    for watchdog in made:
        watchdog.close()


def a_data_iterator_that_blocks(seconds):
    time.sleep(seconds)


def test_the_limit_is_ten_median_steps_and_five_minutes_at_least(watch):
    watchdog = watch()
    assert watchdog.limit == 300
    for seconds in (1.0, 2.0, 500.0):
        watchdog.step_took(seconds)
    assert watchdog.limit == 300
    for _ in range(5):
        watchdog.step_took(60.0)
    assert watchdog.limit == 600
    assert watch(7.0).limit == 7.0


def test_a_hang_is_told_with_step_phase_and_stacks_and_told_again_less_and_less(watch, tmp_path, caplog):
    watchdog = watch(0.3)
    watchdog.step_took(1000.0)  # A limit that was given does not follow the steps.
    watchdog.at("data", 7)
    a_data_iterator_that_blocks(2.0)
    text = (tmp_path / "hang.txt").read_text()
    assert "data of step 7 has taken 0 s (limit 0 s)" in text
    assert "in a_data_iterator_that_blocks" in text
    assert "(most recent call first)" in text
    told = [r.getMessage() for r in caplog.records]
    assert 2 <= len(told) <= 4  # after 0.3, 0.6 and 1.2 seconds, each up to a look later
    assert told[0].startswith("HANG? data of step 7 has taken")
    assert "The run keeps waiting; kill -9 keeps the last checkpoint" in told[0]
    watchdog.at("dispatch", 7)
    assert caplog.records[-1].getMessage() == "data of step 7 took 2 s; the run goes on"


def test_signs_of_life_and_rest_keep_it_quiet(watch, tmp_path, caplog):
    watchdog = watch(0.4)
    for _ in range(10):
        watchdog.at("evaluation", 3)
        time.sleep(0.1)
    watchdog.rest()
    time.sleep(0.8)
    assert not (tmp_path / "hang.txt").exists()
    assert caplog.records == []


def test_zero_watches_nothing(watch, tmp_path):
    watchdog = watch(0)
    watchdog.at("data", 1)
    assert "watchdog" not in [thread.name for thread in threading.enumerate()]


def test_a_closed_watchdog_is_quiet_and_a_disk_that_takes_nothing_is_told(watch, tmp_path, caplog):
    (tmp_path / "hang.txt").mkdir()
    watchdog = watch(0.2)
    watchdog.at("save", 4)
    time.sleep(0.35)
    assert "hang.txt cannot be written (Is a directory)" in caplog.text
    watchdog.close()
    caplog.clear()
    time.sleep(0.6)
    assert caplog.records == []


def test_code_that_lets_no_other_thread_run_is_seen_as_well(tmp_path):
    code = (
        "import ctypes, sys, time; from k2jax.training.watchdog import Watchdog\n"
        "w = Watchdog(sys.argv[1], 0.5); w.at('data', 1); time.sleep(0.3)\n"
        "def holds_the_lock(): ctypes.PyDLL(None).sleep(3)\n"
        "holds_the_lock(); w.close()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "hang.txt")], cwd=ROOT, env=os.environ, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert "in holds_the_lock" in done.stderr
