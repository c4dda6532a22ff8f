"""Real processes: a warm cache changes no bit, hangs are told, a broken tracker costs nothing, sweeps survive."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.test_faults import ROOT, STEPS, World, complete, fingerprint, finish, kill, lines, told, when, written
from tests.test_trackers import FAKE

pytestmark = pytest.mark.check


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("running"))


@pytest.fixture(scope="module")
def undisturbed(world):
    """A run without a compile cache, that all others must equal."""
    workdir = world.folder / "undisturbed"
    status, out, err = world.run(workdir, "--compile_cache=off")
    assert status == 0, err
    assert "compile cache: off" in out
    return workdir


def assert_same(workdir, undisturbed):
    assert json.dumps(lines(workdir)) == json.dumps(lines(undisturbed))
    assert fingerprint(workdir, STEPS) == fingerprint(undisturbed, STEPS)


# --- compile cache ----------------------------------------------------------------------------------------------------


def test_a_cold_a_warm_and_a_garbled_cache_give_the_same_run_bit_for_bit(world, undisturbed, tmp_path):
    cache, said = tmp_path / "cache", {}
    for name in ("cold", "warm", "garbled"):
        if name == "garbled":
            for i, entry in enumerate(sorted(cache.glob("*-cache"))):
                data = entry.read_bytes()
                entry.write_bytes((b"", b"garbage", data[: len(data) // 2], data[:99] + b"?" + data[100:])[i % 4])
            (cache / "a folder-cache").mkdir()
        status, out, err = world.run(tmp_path / name, f"--compile_cache={cache}")
        assert status == 0, err
        assert_same(tmp_path / name, undisturbed)
        said[name] = next(line for line in out.splitlines() if line.startswith("compiled the train step"))
        assert ("damaged entry of the compile cache" in err) == (name == "garbled")
    assert "compile cache: miss, kept for the next start" in said["cold"]
    assert "compile cache: hit" in said["warm"]
    assert "compile cache: miss, kept for the next start" in said["garbled"]
    status, out, _ = world.run(tmp_path / "healed", f"--compile_cache={cache}")
    assert "compile cache: hit" in out


# --- hangs ------------------------------------------------------------------------------------------------------------

# Runs the program with something in step 4 that takes three seconds.
SLOW = """
import os, time
import jax
from experiments import common, train
from k2jax.training import checkpoints, stages
def a_thing_that_hangs(step):
    if int(step) == 4:
        time.sleep(3)
where, taken = os.environ["SLOW"], []
batches, steps, save = stages.StageWork.next_batch, stages.train_step, checkpoints.Checkpoints.save
def next_batch(self):
    taken.append(1)
    a_thing_that_hangs(len(taken))
    return batches(self)
def train_step(state, batch, **more):
    jax.debug.callback(a_thing_that_hangs, state["step"] + 1)
    return steps(state, batch, **more)
def slow_save(self, step, state, meta):
    a_thing_that_hangs(step)
    return save(self, step, state, meta)
if where == "data": stages.StageWork.next_batch = next_batch
if where == "device": stages.train_step = train_step
if where == "save": checkpoints.Checkpoints.save = slow_save
common.run_main(train.main)
"""
PHASES = {"data": ("data",), "device": ("computation", "dispatch", "evaluation"), "save": ("save",)}


@pytest.mark.parametrize("where", PHASES)
def test_a_hang_is_told_with_its_step_and_phase_and_the_run_goes_on(world, undisturbed, tmp_path, where):
    status, _, err = world.run(tmp_path, "--config.train.watchdog_seconds=1", program=("-c", SLOW), env={"SLOW": where})
    assert status == 0, err
    text = (tmp_path / "hang.txt").read_text()
    assert any(f"HANG? {phase} of step 4 has taken" in err for phase in PHASES[where]), err
    assert any(f"{phase} of step 4 has taken" in text for phase in PHASES[where])
    assert "in a_thing_that_hangs" in text
    assert "of step 4 took 3 s; the run goes on" in err
    assert json.dumps(lines(tmp_path)) == json.dumps(lines(undisturbed))


def test_a_run_that_does_not_hang_says_nothing(undisturbed):
    assert not (undisturbed / "hang.txt").exists()


def test_a_hung_run_is_ended_by_sigterm_when_it_goes_on(world, tmp_path):
    process = world.start(tmp_path, "--config.train.watchdog_seconds=1", program=("-c", SLOW), env={"SLOW": "data"})
    assert when(process, lambda: (tmp_path / "hang.txt").exists())
    process.send_signal(signal.SIGTERM)
    status, _, err = finish(process)
    assert status == 143, err
    assert complete(tmp_path)[-1] == 4


# --- trackers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake(tmp_path):
    """Environment with a pretended trackio, and what it was told."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "trackio.py").write_text(FAKE)
    env = {"PYTHONPATH": f"{tmp_path / 'packages'}:{ROOT}", "TOLD": str(tmp_path / "told")}

    def steps():
        rows = [json.loads(text) for text in (tmp_path / "told").read_text().splitlines()]
        return [value["step"] for what, value in rows if what == "log"]

    return env, steps


def test_a_tracker_that_breaks_changes_nothing_but_is_said(world, undisturbed, tmp_path, fake):
    status, _, err = world.run(tmp_path / "run", "--track=trackio:lab", env=fake[0] | {"FAKE": "log:raise"})
    assert status == 0
    assert err.count("TRACKER LOST: trackio follows this run no more (ConnectionError: no route to host)") == 1
    assert_same(tmp_path / "run", undisturbed)


def test_a_tracked_run_is_killed_and_goes_on_in_the_same_place(world, undisturbed, tmp_path, fake):
    workdir = tmp_path / "run"
    process = world.start(workdir, "--track=trackio:lab", "--config.train.checkpoint_every=5", env=fake[0])
    assert when(process, lambda: 5 in complete(workdir) and written(workdir) >= 8)
    kill(process)
    before = json.loads((workdir / "tracker.json").read_text())
    status, _, err = world.run(workdir, "--track=trackio:lab", env=fake[0])
    assert status == 0, err
    assert json.loads((workdir / "tracker.json").read_text()) == before
    assert fake[1]() == sorted(set(fake[1]()))  # No step twice; the last before the kill may have been on its way.
    assert {*range(1, 6), *range(10, STEPS + 1)} <= set(fake[1]())


def test_a_tracker_that_is_not_installed_ends_before_anything_starts(world, tmp_path):
    status, _, err = world.run(
        tmp_path / "run", "--track=wandb:lab",
        program=("-c", "import sys; sys.modules['wandb'] = None\nfrom experiments import common, train\n"
                       "common.run_main(train.main)"),
    )  # fmt: skip
    assert status == 2
    assert 'pip install "k2jax[wandb]"' in told(err)
    assert not (tmp_path / "run").exists()


# --- sweeps -----------------------------------------------------------------------------------------------------------

SWEPT = """
from tests import tiny
get_config = tiny.get_config
def get_sweep(add):
    for seed in (0, 1, 2):
        add(seed=seed)
"""


class Sweeps:
    """Starts sweeps of three runs, two at a time."""

    def __init__(self, world):
        self.world, self.file = world, world.folder / "swept.py"
        self.file.write_text(SWEPT)

    def start(self, workdir, *more, file=None):
        arg = f"{file or self.file}:source={self.world.source},steps={STEPS},every=2"
        return subprocess.Popen(
            [sys.executable, "-m", "experiments.sweep", f"--config={arg}", f"--workdir={workdir}", "--jobs=2", *more],
            cwd=ROOT, env=self.world.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, workdir, *more, **options):
        return finish(self.start(workdir, *more, **options))


@pytest.fixture(scope="module")
def sweeps(world):
    return Sweeps(world)


@pytest.fixture(scope="module")
def whole(sweeps, world):
    """A sweep that nobody disturbed."""
    workdir = world.folder / "sweep"
    status, out, err = sweeps.run(workdir)
    assert status == 0, err + out
    assert "3 finished" in out
    return workdir


def numbers(workdir):
    """The table without what a clock says."""
    rows = json.loads((workdir / "sweep.json").read_text())["points"]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def trainers(workdir):
    """Process ids that train in the sweep's folders."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                with open(f"/proc/{entry.name}/cmdline", "rb") as file:
                    words = file.read().decode(errors="replace").split("\0")
            except OSError:
                continue
            if "experiments.train" in words and any(w.startswith(f"--workdir={workdir}/") for w in words):
                found.append(int(entry.name))
    return found


def assert_whole(workdir, whole):
    assert numbers(workdir) == numbers(whole)
    for seed in range(3):
        assert json.dumps(lines(workdir / f"seed={seed}")) == json.dumps(lines(whole / f"seed={seed}"))
    assert (workdir / "report.html").exists()
    assert trainers(workdir) == []


def test_a_sweep_trains_every_point_and_a_second_start_none(sweeps, whole, tmp_path):
    assert [row["status"] for row in numbers(whole)] == ["finished"] * 3
    bits = [row["bits_per_byte"] for row in numbers(whole)]
    assert bits == sorted(bits)
    page = (whole / "report.html").read_text()
    assert all(f"seed={seed}" in page for seed in range(3))
    before = {path: path.stat().st_mtime_ns for path in whole.glob("seed=*/*")}
    status, out, _ = sweeps.run(whole)
    assert status == 0
    assert "3 finished before" in out
    assert {path: path.stat().st_mtime_ns for path in whole.glob("seed=*/*")} == before


def half_way(process, workdir):
    """Waits until one point is some steps old and not done."""
    assert when(process, lambda: any(3 <= written(workdir / f"seed={s}") < STEPS for s in range(2)))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the orphans train on")
def test_a_killed_sweep_takes_its_jobs_along_and_a_rerun_completes_it(sweeps, whole, tmp_path):
    process = sweeps.start(tmp_path)
    half_way(process, tmp_path)
    assert trainers(tmp_path)
    kill(process)
    # At once: the rerun waits for those that still save.
    status, out, err = sweeps.run(tmp_path)
    assert status == 0, err + out
    assert_whole(tmp_path, whole)


def test_an_interrupted_sweep_saves_and_says_how_to_go_on(sweeps, whole, tmp_path):
    process = sweeps.start(tmp_path)
    half_way(process, tmp_path)
    process.send_signal(signal.SIGINT)
    status, out, err = finish(process)
    assert status == 130, err
    assert "stopped by SIGINT: " in err
    assert "Run the same command to continue." in err
    assert "Traceback" not in err
    assert trainers(tmp_path) == []
    assert (tmp_path / "sweep.csv").exists()
    status, out, err = sweeps.run(tmp_path)
    assert status == 0, err + out
    assert_whole(tmp_path, whole)


def test_an_orphan_is_waited_for(sweeps, whole, world, tmp_path):
    shutil.copytree(whole / "seed=0", tmp_path / "seed=0")
    shutil.copytree(whole / "seed=1", tmp_path / "seed=1")
    orphan = world.start(tmp_path / "seed=2", seed=2)
    assert when(orphan, lambda: written(tmp_path / "seed=2") >= 1)
    orphan.send_signal(signal.SIGSTOP)
    process = sweeps.start(tmp_path)
    time.sleep(6)
    assert process.poll() is None
    orphan.send_signal(signal.SIGCONT)
    assert finish(orphan)[0] == 0
    status, out, err = finish(process)
    assert status == 0, err
    assert "seed=2: waits for a process that still trains there" in out
    # The folder is free a moment before the orphan has written its page: a job may have been started to write it.
    assert "seed=2: finished" in out
    assert [row["status"] for row in numbers(tmp_path)] == ["finished"] * 3


def test_a_point_that_cannot_run_is_tried_twice_and_the_others_finish(sweeps, whole, world, tmp_path):
    file = tmp_path / "swept.py"
    # Of the second, too little text is left to train on.
    fields = "**{'data.seed': seed, 'data.held_out_fraction': (0.3, 0.99, 0.3)[seed]}"
    file.write_text(SWEPT.replace("seed=seed", fields))
    status, out, err = sweeps.run(tmp_path / "s", file=file)
    assert status == 2
    assert "1 of 3 points failed" in told(err)
    assert "ended with status 2; it is tried again (1 left)" in out
    assert "error: " in out.partition("--- data.seed=1")[2]
    assert [row["status"] for row in numbers(tmp_path / "s")] == ["finished", "finished", "failed"]


def test_two_sweeps_in_one_folder(sweeps, whole):
    import fcntl

    with (whole / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status, _, err = sweeps.run(whole)
    assert status == 2
    assert "another process is training there" in told(err)
