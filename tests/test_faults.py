"""Real processes that are killed, stopped, starved of disk space or misused: nothing is lost, and the message says why.

Every run is compared, line by line and bit by bit, with one that nobody disturbed.
"""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from k2jax.training.metrics import TIME_FIELDS
from tests import tiny
from tests.small_disk import small_disk

pytestmark = pytest.mark.check

ROOT = Path(__file__).parents[1]
STEPS, EVERY = 12, 2
PATIENCE = 300  # seconds for one process, on a busy machine


class World:
    """The text, the command and the environment that all runs of a test share."""

    def __init__(self, folder: Path):
        self.source = tiny.write_text(folder / "text")
        self.folder = folder
        # Only speed: compiled programs come from the undisturbed run, unoptimised, so that a process starts in seconds.
        self.env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_COMPILATION_CACHE": "true",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
        }

    def flags(self, workdir, *more, **arg):
        arg = {"source": self.source, "steps": STEPS, "every": EVERY} | arg
        text = ",".join(f"{name}={value}" for name, value in arg.items())
        return [f"--config=tests/tiny.py:{text}", f"--workdir={workdir}", *more]

    def start(self, workdir, *more, program=("-m", "experiments.train"), env=None, preexec_fn=None, **arg):
        return subprocess.Popen(
            [sys.executable, *program, *self.flags(workdir, *more, **arg)],
            cwd=ROOT, env=self.env | (env or {}), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=preexec_fn,
        )  # fmt: skip

    def run(self, workdir, *more, **options):
        """(exit status, stdout, stderr) of a run that is left alone."""
        return finish(self.start(workdir, *more, **options))


def finish(process):
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def undisturbed(world):
    """The folder of the run that all others must equal."""
    workdir = world.folder / "undisturbed"
    status, _, err = world.run(workdir)
    assert status == 0, err
    assert [line["step"] for line in lines(workdir)] == list(range(1, STEPS + 1))
    return workdir


def lines(workdir):
    """The lines of metrics.jsonl without what a clock says."""
    text = (workdir / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [{k: v for k, v in json.loads(t).items() if k not in TIME_FIELDS} for t in text.splitlines()]


def complete(workdir):
    """Steps of the complete checkpoints."""
    folder = workdir / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.exists() else []


def fingerprint(workdir, step):
    """What the checkpoint says of the bits of its arrays, next to the state of the data."""
    text = (workdir / "checkpoints" / str(step) / "_CHECKPOINT_METADATA").read_text()
    saved = json.loads(text)["custom_metadata"]
    return saved["fingerprint"], saved["data"]


def assert_same(workdir, undisturbed):
    for mine, theirs in zip(lines(workdir), lines(undisturbed), strict=True):
        assert json.dumps(mine) == json.dumps(theirs)
    # One more may be left where a kill came before the oldest was deleted; the next save deletes it.
    assert complete(workdir)[-2:] == complete(undisturbed)
    assert fingerprint(workdir, STEPS) == fingerprint(undisturbed, STEPS)
    with np.load(workdir / "selections.npz") as mine, np.load(undisturbed / "selections.npz") as theirs:
        assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)
    assert (workdir / "report.html").exists()


def written(workdir):
    """Complete lines of metrics.jsonl so far."""
    try:
        return (workdir / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def told(err):
    """The last line of stderr: what a person must do. TensorStore's threads may print before it."""
    last = err.splitlines()[-1]
    assert last.startswith("error: "), err
    return last


def when(process, condition):
    """Waits for the condition; False if the process ends first."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < end, "the process hangs"
        time.sleep(0.0005)
    return True


def kill(process):
    process.kill()
    process.communicate()


def completed(world, workdir, undisturbed):
    """Runs the same command until it is done and compares."""
    status, out, err = world.run(workdir)
    assert status == 0, err
    assert_same(workdir, undisturbed)
    return out


# --- kill -9 -----------------------------------------------------------------------------------------------------


def test_killed_at_random_moments(world, undisturbed, tmp_path):
    chance, kills, seen = random.Random(20), 0, []
    for _ in range(4):
        process = world.start(tmp_path)
        line = chance.randint(0, STEPS - 1)
        if when(process, lambda line=line: written(tmp_path) > line):
            time.sleep(chance.random() * 0.05)
        kills += process.poll() is None
        kill(process)
        seen.append((written(tmp_path), complete(tmp_path)))
    assert kills >= 2, seen
    completed(world, tmp_path, undisturbed)


def test_killed_before_anything_is_saved(world, undisturbed, tmp_path):
    process = world.start(tmp_path)
    assert when(process, lambda: (tmp_path / "config.json").exists())
    kill(process)
    assert complete(tmp_path) == []
    completed(world, tmp_path, undisturbed)


def test_killed_during_a_save(world, undisturbed, tmp_path):
    folder, left = tmp_path / "checkpoints", 0

    def unfinished():
        return folder.exists() and any(not p.name.isdigit() for p in folder.iterdir())

    for _ in range(2):
        process = world.start(tmp_path)
        # What the kill before left is swept away first.
        if when(process, lambda: not unfinished()) and when(process, unfinished):
            kill(process)
            left += unfinished()
        else:
            finish(process)
    assert left, "no save was met half-way"
    completed(world, tmp_path, undisturbed)


def test_killed_with_metrics_past_the_checkpoint(world, undisturbed, tmp_path):
    process = world.start(tmp_path, "--config.train.checkpoint_every=5")
    assert when(process, lambda: 5 in complete(tmp_path) and written(tmp_path) >= 8)
    kill(process)
    if complete(tmp_path)[-1] == 5:
        assert written(tmp_path) > 5
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # A line cut short.
    completed(world, tmp_path, undisturbed)


def test_killed_between_the_last_checkpoint_and_the_report(world, undisturbed, tmp_path):
    process = world.start(tmp_path)
    assert when(process, lambda: STEPS in complete(tmp_path))
    kill(process)
    completed(world, tmp_path, undisturbed)


# --- signals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_state_and_says_so(world, undisturbed, tmp_path, number):
    process = world.start(tmp_path, "--config.train.checkpoint_every=100")
    assert when(process, lambda: written(tmp_path) >= 3)
    process.send_signal(number)
    status, _, err = finish(process)
    assert status == 128 + number
    step = lines(tmp_path)[-1]["step"]
    assert f"stopped by {number.name} after step {step} of {STEPS}; the state is saved" in err
    assert "Traceback" not in err
    assert complete(tmp_path) == [step]
    assert 3 <= step < STEPS
    completed(world, tmp_path, undisturbed)


# Runs the program with a method of the trainer wrapped: it sends a signal at its n-th call.
SENDER = """
import os, signal, sys
from experiments import common, train
from k2jax.training import evaluate, loop
where, n, number = os.environ["SEND"].split()
owner = {"run": evaluate.HeldOut, "_compile": loop._Run, "_describe": loop._Run}[where]
method, calls = getattr(owner, where), []
def wrapped(self, *args):
    calls.append(1)
    if len(calls) == int(n):
        os.kill(os.getpid(), int(number))
    return method(self, *args)
setattr(owner, where, wrapped)
common.run_main(train.main)
"""


@pytest.mark.parametrize(("call", "step"), [(1, 4), (3, STEPS)])
def test_a_signal_during_an_evaluation_gives_it_up_and_the_next_start_makes_up_for_it(
    world, undisturbed, tmp_path, call, step
):
    status, _, err = world.run(tmp_path, program=("-c", SENDER), env={"SEND": f"run {call} {signal.SIGTERM:d}"})
    assert status == 143, err
    assert complete(tmp_path)[-1] == step
    assert "eval/loss" not in lines(tmp_path)[-1]
    assert "is done" not in completed(world, tmp_path, undisturbed)


def test_a_signal_before_the_first_step_ends_at_once(world, undisturbed, tmp_path):
    status, _, err = world.run(tmp_path, program=("-c", SENDER), env={"SEND": f"_compile 1 {signal.SIGTERM:d}"})
    assert status == 143, err
    assert "nothing was trained yet" in err
    assert complete(tmp_path) == []
    completed(world, tmp_path, undisturbed)


def test_a_second_interrupt_ends_at_once_without_a_traceback(world, undisturbed, tmp_path):
    twice = SENDER.replace("os.kill(os.getpid(), int(number))", "[os.kill(os.getpid(), int(number)) for _ in range(2)]")
    status, _, err = world.run(tmp_path, program=("-c", twice), env={"SEND": f"run 1 {signal.SIGINT:d}"})
    assert status == 130, err
    assert "Traceback" not in err
    completed(world, tmp_path, undisturbed)


# --- checkpoints and disks ---------------------------------------------------------------------------------------


def stopped_at(world, workdir, step):
    """A run killed as soon as the checkpoint of `step` was complete."""
    process = world.start(workdir)
    assert when(process, lambda: step in complete(workdir))
    kill(process)


@pytest.mark.parametrize("name", ["state/ocdbt.process_0/d/*", "*"])
def test_a_damaged_checkpoint_is_told_and_deleting_it_works(world, undisturbed, tmp_path, name):
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    # As if killed at the end: without this, the run would be done and its arrays not read.
    (workdir / "selections.npz").unlink()
    text = (workdir / "metrics.jsonl").read_text().splitlines()
    last = {k: v for k, v in json.loads(text[-1]).items() if not k.startswith("eval/")}
    (workdir / "metrics.jsonl").write_text("\n".join([*text[:-1], json.dumps(last)]) + "\n")
    bad = workdir / "checkpoints" / str(STEPS)
    if name == "*":
        shutil.rmtree(bad)
        bad.mkdir()
    else:
        path = max(bad.glob(name), key=lambda p: p.stat().st_size)
        os.truncate(path, path.stat().st_size // 2)
    status, _, err = world.run(workdir)
    assert status == 2
    assert f"delete {bad}; the same command then continues from step {STEPS - EVERY}" in told(err)
    shutil.rmtree(bad)
    completed(world, workdir, undisturbed)


def limit(size):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_checkpoint_that_does_not_fit_the_disk(world, undisturbed, tmp_path):
    stopped_at(world, tmp_path, 4)
    good = complete(tmp_path)[-1]
    status, _, err = world.run(tmp_path, preexec_fn=limit(60_000))
    assert status == 2, err
    assert f"Nothing is lost: the checkpoint of step {good} is complete" in told(err)
    assert "Fix: free disk space" in told(err)
    completed(world, tmp_path, undisturbed)


def test_metrics_that_do_not_fit_the_disk(world, undisturbed, tmp_path):
    status, _, err = world.run(tmp_path, "--config.train.checkpoint_every=100", preexec_fn=limit(5_000))
    assert status == 2, err
    assert f"{tmp_path / 'metrics.jsonl'} (or tb/ beside it) cannot be written" in told(err)
    assert "Traceback" not in err
    assert 2 <= written(tmp_path) < STEPS
    completed(world, tmp_path, undisturbed)


def test_a_disk_that_is_really_full(world, undisturbed, tmp_path):
    with small_disk(tmp_path / "disk", "900k") as enlarge:
        workdir = tmp_path / "disk" / "run"
        status, _, err = world.run(workdir)
        assert status == 2, err
        assert "Fix: free disk space" in told(err)
        enlarge()
        completed(world, workdir, undisturbed)


def test_metrics_in_the_way(world, tmp_path):
    stopped_at(world, tmp_path, 2)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    status, _, err = world.run(tmp_path)
    assert status == 2
    assert f"{tmp_path / 'metrics.jsonl'} cannot be read" in told(err)


# --- numbers that are not finite ---------------------------------------------------------------------------------

# Runs the program with the loss mask of some steps not a number.
POISON = """
import os
import numpy as np
from experiments import common, train
from k2jax.training import stages
first, last = map(int, os.environ["POISON"].split())
taken, batches = [], stages.StageWork.next_batch
def poisoned(self):
    batch = batches(self)
    taken.append(1)
    bad = first <= len(taken) <= last
    return batch | {"loss_mask": batch["loss_mask"] * np.float32(np.nan)} if bad else batch
stages.StageWork.next_batch = poisoned
common.run_main(train.main)
"""


def test_single_bad_steps_are_skipped_and_counted(world, tmp_path):
    status, out, err = world.run(tmp_path, program=("-c", POISON), env={"POISON": "5 6"})
    assert status == 0, err
    assert [line["step"] for line in lines(tmp_path) if line["skipped"]] == [5, 6]
    assert "warning: step 6 skipped: loss or gradient not finite (2 in a row)" in out
    assert np.isfinite(lines(tmp_path)[-1]["eval/loss"])


def test_too_many_bad_steps_stop_the_run_and_good_data_continue_it(world, tmp_path):
    status, _, err = world.run(tmp_path, program=("-c", POISON), env={"POISON": "6 12"})
    assert status == 2
    assert "3 steps in a row, up to step 8, had a loss or gradient that is not finite" in told(err)
    assert "train.max_skipped=3" in told(err)
    assert complete(tmp_path)
    status, out, err = world.run(tmp_path)
    assert status == 0, err
    assert "resumed from step" in out
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, STEPS + 1))
    assert not lines(tmp_path)[-1]["skipped"]


# --- other processes, other devices, longer runs -----------------------------------------------------------------


def test_two_processes_in_one_folder(world, undisturbed, tmp_path):
    first = world.start(tmp_path)
    assert when(first, lambda: written(tmp_path) >= 1)
    first.send_signal(signal.SIGSTOP)
    status, _, err = world.run(tmp_path)
    assert status == 2
    assert f"error: --workdir={tmp_path}: another process is training there" in err
    first.send_signal(signal.SIGCONT)
    assert finish(first)[0] == 0
    assert_same(tmp_path, undisturbed)


def test_two_devices_train_as_one(world, undisturbed, tmp_path):
    flags = world.env["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2"
    status, out, err = world.run(tmp_path, data=2, env={"XLA_FLAGS": flags})
    assert status == 0, err
    assert "devices: 2 x" in out
    for one, two in zip(lines(undisturbed)[:6], lines(tmp_path)[:6], strict=True):
        for name in ("loss", "balance_loss", "grad_norm", "update_norm", "max_logit"):
            assert two[name] == pytest.approx(one[name], rel=2e-3), (one["step"], name)
    np.testing.assert_allclose(lines(tmp_path)[1]["expert_load"], lines(undisturbed)[1]["expert_load"], atol=0.01)


def test_a_run_on_two_devices_is_killed_and_continues_bit_for_bit(world, tmp_path):
    two = {"data": 2, "env": {"XLA_FLAGS": world.env["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2"}}
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    assert world.run(alone, **two)[0] == 0
    process = world.start(killed, **two)
    assert when(process, lambda: 4 in complete(killed))
    kill(process)
    assert world.run(killed, **two)[0] == 0
    assert_same(killed, alone)


def test_a_finished_run_says_so_and_can_be_continued(world, tmp_path):
    assert world.run(tmp_path, steps=4)[0] == 0
    before = lines(tmp_path)
    status, out, _ = world.run(tmp_path, steps=4)
    assert status == 0
    assert f"{tmp_path} is done: step 4 of 4" in out
    assert "To train longer" in out
    assert lines(tmp_path) == before
    status, out, err = world.run(tmp_path, steps=6)
    assert status == 0, err
    assert "resumed from step 4" in out
    assert "train.steps: 4 -> 6" in out
    assert lines(tmp_path)[:4] == before
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_trace_of_some_steps_is_written_even_if_the_run_ends_inside(world, tmp_path):
    status, out, err = world.run(tmp_path, "--profile=3:9", steps=4)
    assert status == 0, err
    assert f"profile in {tmp_path / 'profile'}" in out
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    status, _, err = world.run(tmp_path, "--profile=1:2", steps=6)
    assert status == 2
    assert "--profile=1:2: this start runs steps 5 to 6" in err


# --- a terminal and a pipe ---------------------------------------------------------------------------------------


def test_one_rewritten_line_on_a_terminal_and_plain_lines_in_a_pipe(world, tmp_path):
    status, out, _ = world.run(tmp_path / "pipe", steps=4)
    assert status == 0
    steps = [line for line in out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in steps] == ["2/4", "4/4"]
    assert all("| eta 0:0" in line for line in steps)
    assert "\r" not in out
    assert "\x1b" not in out
    shown = on_a_terminal(world, tmp_path / "terminal")
    rewritten = [part for part in shown.split("\r\x1b[2K") if part.startswith("step ")]
    assert [part.split()[1] for part in rewritten] == ["1/4", "2/4", "3/4", "4/4"]
    assert all("| eta " in part for part in rewritten)
    assert all(len(part.splitlines()[0]) < 80 for part in rewritten), "a wrapped line cannot be rewritten"


def on_a_terminal(world, workdir):
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.train", *world.flags(workdir, steps=4)],
        cwd=ROOT, env=world.env | {"COLUMNS": "80"}, stdout=theirs, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # Linux reports the end of a terminal as an error.
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    assert process.wait(PATIENCE) == 0
    return shown.decode()
