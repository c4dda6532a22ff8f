"""Two real processes with two devices each train one model: killed, stopped and failing, they end and go on as one."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections import Counter

import numpy as np
import pytest

from k2jax.data.packing import PackedWindows
from k2jax.data.pipeline import Source, train_iterator
from k2jax.data.sources import load_documents, split_held_out
from k2jax.data.stream import MemoryStream
from k2jax.data.tokenizers import ByteTokenizer
from tests import tiny
from tests.test_faults import PATIENCE, ROOT, assert_same, complete, lines, told, written

pytestmark = pytest.mark.check

STEPS, EVERY = 12, 2
TOKENIZER = ByteTokenizer()
SMALL = ["--config.model.num_layers=2", "--config.model.attention=('moba', 'full')"]  # less to compile

# experiments.train as one of several processes. It notes a checksum of every row that it feeds, and fails if told to.
PROGRAM = """
import json, os, zlib
from experiments import common, train
from k2jax.data.pipeline import TrainIterator
from k2jax.training.stages import StageWork

number = os.environ["NUMBER"]
fail_at = {pair.split(":")[0]: int(pair.split(":")[1]) for pair in os.environ.get("FAIL", "").split()}
fed, notes = [], open(os.environ["NOTES"] + number, "a", buffering=1)
following, next_batch = TrainIterator.__next__, StageWork.next_batch

def noted(self):
    batch = following(self)
    fed.append([zlib.crc32(row.tobytes()) for row in batch["tokens"]])
    return batch

def fed_to(self):
    batch, step = next_batch(self), self.start + self.data.get_state()["batches"]
    notes.write(json.dumps([step, fed[-1]]) + "\\n")
    if fail_at.get(number) == step:
        raise ValueError("the disk of this host is gone")
    return batch

TrainIterator.__next__, StageWork.next_batch = noted, fed_to
common.run_main(train.main)
"""


class World:
    """The text and the environment that all runs share, and how they are started."""

    def __init__(self, folder):
        self.folder, self.source = folder, folder / "text"
        self.source.mkdir()
        rng = np.random.default_rng(0)
        for i in range(16):  # Random, so that no two windows are alike.
            text = rng.integers(97, 123, 100).astype(np.uint8).tobytes()
            (self.source / f"page{i:02}.txt").write_bytes(text)
        self.env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_COMPILATION_CACHE": "true",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def start(self, workdir, *more, processes=2, workdirs=None, fail=""):
        """The processes of one run, four devices together."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        flags = f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={4 // processes}"
        arg = f"source={self.source},steps={STEPS},every={EVERY},data=4"
        started = []
        for i in range(processes):
            command = [sys.executable, "-c", PROGRAM, f"--config=tests/tiny.py:{arg}"]
            command += [f"--workdir={workdirs[i] if workdirs else workdir}", *SMALL, *more]
            command += [f"--distributed={address},{processes},{i}"] if processes > 1 else ["--distributed=off"]
            here = {"NUMBER": str(i), "NOTES": f"{workdir}.notes", "FAIL": fail, "XLA_FLAGS": flags}
            with open(f"{workdir}.out{i}", "w") as out, open(f"{workdir}.err{i}", "w") as err:
                started.append(subprocess.Popen(command, cwd=ROOT, env=self.env | here, stdout=out, stderr=err))
        return started

    def run(self, workdir, *more, **options):
        """[(exit status, stdout, stderr)] of a run that is left alone."""
        return ended(workdir, self.start(workdir, *more, **options))


def ended(workdir, processes, patience=PATIENCE):
    end, results = time.monotonic() + patience, []
    try:
        for i, process in enumerate(processes):
            status = process.wait(max(end - time.monotonic(), 1))
            results.append((status, *((workdir.parent / f"{workdir.name}.{x}{i}").read_text() for x in ("out", "err"))))
    finally:
        for process in processes:
            process.kill()
    return results


def until(processes, condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert all(p.poll() is None for p in processes), "a process ended early"
        assert time.monotonic() < end, "the processes hang"
        time.sleep(0.0005)


def good(results):
    assert [status for status, _, _ in results] == [0] * len(results), results[-1][-1][-3000:] + results[0][-1][-3000:]
    return results


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def undisturbed(world):
    workdir = world.folder / "undisturbed"
    (_, first, _), (_, second, _) = good(world.run(workdir))
    assert "devices: 4 x" in first
    assert "step " not in second, "only the first process prints"
    assert [line["step"] for line in lines(workdir)] == list(range(1, STEPS + 1))
    return workdir


def fed(workdir, processes, last=STEPS, after=0):
    """{step: checksums of the rows of all processes} of the steps after + 1 .. last, the newest note of each."""
    rows = {}
    for number in range(processes):
        notes = (workdir.parent / f"{workdir.name}.notes{number}").read_text().splitlines()
        newest = dict(map(json.loads, notes))
        for step in range(after + 1, last + 1):
            rows[step] = [*rows.get(step, []), *newest[step]]
    return rows


@pytest.fixture(scope="module")
def planned(world):
    """What the pipeline gives one process that feeds everything: {step: checksums}, and the window of each."""
    documents, _ = split_held_out(load_documents(world.source), 0.3)
    stream = MemoryStream(documents, TOKENIZER)
    windows = PackedWindows(stream, 32, TOKENIZER.pad_id)
    window_of = {zlib.crc32(windows[i]["tokens"].tobytes()): i for i in range(len(windows))}
    assert len(window_of) == len(windows) <= 4 * STEPS, "windows differ, and a run sees each of them"
    data = train_iterator(
        [Source("text", stream)], pad_id=TOKENIZER.pad_id, seq_len=32, batch_size=4, seed=0, prefetch=0
    )
    steps = {step: [zlib.crc32(row.tobytes()) for row in next(data)["tokens"]] for step in range(1, STEPS + 1)}
    return steps, window_of


def test_two_processes_feed_what_one_would_and_each_window_once_a_pass(undisturbed, planned):
    steps, window_of = planned
    assert fed(undisturbed, 2) == steps
    order = [window_of[row] for step in range(1, STEPS + 1) for row in steps[step]]
    assert sorted(order[: len(window_of)]) == list(range(len(window_of)))
    assert max(Counter(order[len(window_of) :]).values(), default=1) == 1


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_together_and_restarted_they_continue_bit_for_bit(world, undisturbed, planned, tmp_path, seed):
    workdir, rng = tmp_path / "run", random.Random(seed)
    processes, steps = world.start(workdir), rng.randint(4, STEPS - 2)
    until(processes, lambda: written(workdir) >= steps and complete(workdir))
    time.sleep(rng.random() * 0.1)
    for process in rng.sample(processes, 2):
        process.kill()
    ended(workdir, processes)
    (_, out, _), _ = good(world.run(workdir))
    assert "resumed from step" in out
    assert_same(workdir, undisturbed)
    assert fed(workdir, 2) == planned[0]


def test_killed_on_two_and_restarted_on_one_process_they_lose_and_repeat_no_token(
    world, undisturbed, planned, tmp_path
):
    workdir = tmp_path / "run"
    processes = world.start(workdir)
    until(processes, lambda: 4 in complete(workdir))
    for process in processes:
        process.kill()
    ended(workdir, processes)
    kept = complete(workdir)[-1]
    before = fed(workdir, 2, last=kept)
    for number in range(2):
        (tmp_path / f"run.notes{number}").unlink()
    ((_, out, _),) = good(world.run(workdir, processes=1))
    assert f"resumed from step {kept}" in out
    steps, window_of = planned
    rows = before | fed(workdir, 1, after=kept)
    assert rows == steps
    order = [window_of[row] for step in sorted(rows) for row in rows[step]]
    assert sorted(order[: len(window_of)]) == list(range(len(window_of))), "a token was lost or repeated"
    for mine, theirs in zip(lines(workdir), lines(undisturbed), strict=True):
        for name in ("loss", "grad_norm", "update_norm", "max_logit"):
            # The same mesh and the same sums, but reduced by another library.
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4), (mine["step"], name)


@pytest.mark.parametrize("target", [0, 1])
def test_a_signal_to_one_process_stops_all_at_the_same_step(world, undisturbed, tmp_path, target):
    workdir = tmp_path / "run"
    processes = world.start(workdir, "--config.train.checkpoint_every=100")
    until(processes, lambda: written(workdir) >= 2)
    processes[target].send_signal(signal.SIGTERM)
    results = ended(workdir, processes)
    assert [status for status, _, _ in results] == [128 + signal.SIGTERM] * 2, results
    stopped = {re.search(r"stopped by SIGTERM after step (\d+)", err).group(1) for _, _, err in results}
    assert stopped == {str(complete(workdir)[-1])}
    good(world.run(workdir))
    assert_same(workdir, undisturbed)


@pytest.mark.parametrize("target", [0, 1])
def test_an_error_of_one_process_ends_the_other_with_its_message(world, tmp_path, target):
    workdir = tmp_path / "run"
    start = time.monotonic()
    results = ended(workdir, world.start(workdir, fail=f"{target}:5"))
    (status, _, err), (other_status, _, other_err) = results[target], results[1 - target]
    assert status == 1
    assert "ValueError: the disk of this host is gone" in err
    assert other_status == 2
    assert told(other_err) == f"error: process {target} failed: ValueError: the disk of this host is gone"
    assert time.monotonic() - start < PATIENCE / 2
    assert complete(workdir)[-1] == 4


@pytest.mark.parametrize("target", [0, 1])
def test_a_killed_process_ends_the_other(world, tmp_path, target):
    workdir = tmp_path / "run"
    processes = world.start(workdir)
    until(processes, lambda: written(workdir) >= 3)
    processes[target].kill()
    status, _, err = ended(workdir, processes)[1 - target]
    assert status not in (0, None)
    assert re.search("could not go on|distributed|coordination|heartbeat", err), err[-2000:]


def test_folders_that_are_not_shared_are_told(world, tmp_path):
    workdirs = [tmp_path / "host0" / "run", tmp_path / "host1" / "run"]
    for status, _, err in world.run(tmp_path / "run", workdirs=workdirs):
        assert status == 2
        assert "not see the config.json that the first one wrote there. Fix: name a folder that all hosts" in told(err)


def test_devices_left_out_of_the_mesh_are_told(world, tmp_path):
    for status, _, err in world.run(tmp_path / "run", "--config.mesh.data=2"):
        assert status == 2
        assert "mesh: its axes make 2 devices, but the 2 processes have 4: raise mesh.data" in err


def test_another_corpus_is_refused_by_all(world, undisturbed, tmp_path):
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    source = shutil.copytree(world.source, tmp_path / "text")
    page = next(source / d.name for d in split_held_out(load_documents(source), 0.3)[0])
    page.write_bytes(page.read_bytes()[::-1])
    config = json.loads((workdir / "config.json").read_text())
    config["data"]["source"] = str(source)
    (workdir / "config.json").write_text(json.dumps(config))
    shown = []
    for status, _, err in world.run(workdir, f"--config.data.source={source}", f"--config.train.steps={STEPS + 2}"):
        assert status == 2
        shown.append(err)
    assert all("has tokens" in err and "Fix: resume with the same sources" in err for err in shown)
    assert tiny.config(source).data.sources[0].path == str(source)
