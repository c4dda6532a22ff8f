"""Trackers: what they are told, that a resumed run continues theirs, and that no failure of theirs reaches the run."""

import json
import logging
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from k2jax.training import trackers
from k2jax.training.errors import SetupError, WorkdirError
from k2jax.training.metrics import MetricsLog
from k2jax.training.trackers import Tracker, check, scalars
from tests import tiny

# A tracker as a package: writes down what it is told, and misbehaves where FAKE says so.
FAKE = """
import json, os, time
def login(prompt): return os.environ.get("FAKE_KEY") == "yes"
def init(**arguments):
    _do("init", arguments)
    return Run()
class Run:
    def log(self, scalars, step): _do("log", {"step": step, **scalars})
    def finish(self): _do("finish", {})
def _do(what, value):
    where, _, way = os.environ.get("FAKE", "").partition(":")
    if where == what:
        if way == "hang": time.sleep(60)
        raise SystemExit("out of order") if way == "exit" else ConnectionError("no route to host")
    with open(os.environ["TOLD"], "a") as file:
        file.write(json.dumps([what, value], default=str) + "\\n")
"""


@pytest.fixture
def fake(tmp_path, monkeypatch, caplog):
    """Both packages by the fake one; gives what they were told."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for name in trackers.KINDS:
        (packages / f"{name}.py").write_text(FAKE)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(packages)
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    monkeypatch.setenv("FAKE_KEY", "yes")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    caplog.set_level(logging.WARNING)
    yield lambda what: [v for w, v in map(json.loads, (tmp_path / "told").read_text().splitlines()) if w == what]
    for name in trackers.KINDS:
        sys.modules.pop(name, None)


def line(step):
    return {
        "step": step, "loss": np.float32(2.5), "skipped": np.int32(0), "lr": 0.01, "step_time": 0.1 * step,
        "max_logits": {"dense": [[1.0, 2.0]]}, "expert_load": [[0.5, 0.5]],
    }  # fmt: skip


def run(workdir, first, steps, spec="wandb:lab"):
    """A start of a run: lines after `first`, and no goodbye if it is killed."""
    workdir.mkdir(exist_ok=True)
    log = MetricsLog(workdir, first, Tracker(*check(spec), workdir, tiny.config()))
    for step in steps:
        log.write(line(step))
    return log


@pytest.mark.parametrize("kind", trackers.KINDS)
def test_a_tracker_gets_the_scalars_of_every_line_and_the_config(fake, tmp_path, kind):
    log = run(tmp_path / "run", 0, [1, 2, 3], f"{kind}:lab")
    log.amend(3, {"eval/loss": 2.25})
    log.close()
    assert fake("log")[0] == {"step": 1, "loss": 2.5, "skipped": 0, "lr": 0.01, "step_time": 0.1}
    assert [told["step"] for told in fake("log")] == [1, 2, 3, 3]
    assert fake("log")[3]["eval/loss"] == 2.25
    (arguments,) = fake("init")
    assert (arguments["project"], arguments["resume"]) == ("lab", "allow")
    assert arguments["config"]["optimizer"]["name"] == "muonclip"
    assert fake("finish") == [{}]


def test_what_a_line_holds_as_numbers():
    assert scalars(line(7)) == {"loss": 2.5, "skipped": 0, "lr": 0.01, "step_time": pytest.approx(0.7)}
    assert [type(v) for v in scalars(line(7)).values()] == [float, int, float, float]


@pytest.mark.parametrize("kind", trackers.KINDS)
def test_a_resumed_run_continues_the_trackers_run_and_repeats_no_step(fake, tmp_path, kind):
    run(tmp_path / "run", 0, [1, 2, 3, 4, 5], f"{kind}:lab").close()
    run(tmp_path / "run", 3, [4, 5, 6], f"{kind}:lab").close()  # killed after 5, resumed from the checkpoint of step 3
    one, two = fake("init")
    key = "id" if kind == "wandb" else "name"
    assert one[key] == two[key]
    assert one[key].startswith("run-")
    assert [told["step"] for told in fake("log")] == [1, 2, 3, 4, 5, 6]


def test_runs_of_one_name_and_other_projects_stay_apart(fake, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        run(tmp_path / folder / "run", 0, [1]).close()
    run(tmp_path / "a" / "run", 1, [2], "wandb:other").close()
    assert len({arguments["id"] for arguments in fake("init")}) == 3


def test_a_tracker_that_is_added_later_gets_the_lines_so_far(fake, tmp_path):
    (tmp_path / "run").mkdir()
    log = MetricsLog(tmp_path / "run", 0)
    for step in (1, 2, 3):
        log.write(line(step))
    log.close()
    run(tmp_path / "run", 2, [3, 4]).close()
    assert [told["step"] for told in fake("log")] == [1, 2, 3, 4]


@pytest.mark.parametrize("way", ["init:raise", "init:exit", "log:raise", "finish:raise"])
def test_a_tracker_that_fails_is_told_once_and_loudly(fake, tmp_path, monkeypatch, caplog, way):
    monkeypatch.setenv("FAKE", way)
    log = run(tmp_path / "run", 0, [1, 2])
    time.sleep(0.2)
    log.write(line(3))
    log.close()
    (told,) = [r.getMessage() for r in caplog.records]
    assert told.startswith("TRACKER LOST: wandb follows this run no more (")
    assert ("SystemExit: out of order" if "exit" in way else "ConnectionError: no route to host") in told
    assert [json.loads(t)["step"] for t in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_tracker_that_hangs_holds_nothing_up(fake, tmp_path, monkeypatch, caplog, where):
    monkeypatch.setenv("FAKE", f"{where}:hang")
    monkeypatch.setattr(trackers, "PATIENCE", 0.3)
    start = time.monotonic()
    run(tmp_path / "run", 0, range(1, 51)).close()
    assert time.monotonic() - start < 5
    assert "it did not finish within 0 s" in caplog.records[0].getMessage()
    assert len(caplog.records) == 1


def test_a_tracker_that_falls_behind_is_given_up(fake, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("FAKE", "init:hang")
    monkeypatch.setattr(trackers, "WAITING", 5)
    log = run(tmp_path / "run", 0, range(1, 20))
    assert "5 steps wait to be sent" in caplog.records[0].getMessage()
    log.close()
    assert len(caplog.records) == 1


@pytest.mark.parametrize("spec", ["mlflow:lab", "wandb", "wandb:", "trackio:a b", "wandb:a/b", ":lab"])
def test_a_spec_that_cannot_be_right_is_refused(fake, spec):
    with pytest.raises(SetupError, match=r"--track=.*expected wandb:PROJECT or trackio:PROJECT"):
        check(spec)


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(SetupError, match=r'Fix: pip install "k2jax\[trackio\]"'):
        check("trackio:lab")


def test_nobody_logged_in_is_told_before_anything_starts(fake, monkeypatch):
    monkeypatch.setenv("FAKE_KEY", "no")
    with pytest.raises(SetupError, match="Fix: wandb login; or WANDB_MODE=offline"):
        check("wandb:lab")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert check("wandb:lab") == ("wandb", "lab")


def test_a_damaged_identity_is_told(fake, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tracker.json").write_text("[1")
    with pytest.raises(WorkdirError, match=r"tracker.json cannot be read .* Fix: delete it"):
        Tracker("wandb", "lab", tmp_path / "run", tiny.config())


# --- the real ones, where they are installed --------------------------------------------------------------------------


def test_wandb_itself_offline(tmp_path, monkeypatch, caplog):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(tmp_path / "run", 0, [1, 2, 3]).close()
    run(tmp_path / "run", 2, [3, 4]).close()
    written = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len({folder.name.partition("-run-")[2].partition("-")[2] for folder in written}) == 1
    assert caplog.records == []
    assert not [t for t in threading.enumerate() if t.name.startswith("tracker")]


def test_trackio_itself_in_a_folder(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    run(tmp_path / "run", 0, [1, 2, 3], "trackio:lab").close()
    run(tmp_path / "run", 2, [3, 4], "trackio:lab").close()
    code = (
        "import trackio; (run,) = trackio.Api().runs('lab'); "
        "from trackio.sqlite_storage import SQLiteStorage; logs = SQLiteStorage.get_logs('lab', run.name); "
        "print([(p['step'], p['loss']) for p in logs])"
    )
    # In a process of its own: what was written is on disk.
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "[(1, 2.5), (2, 2.5), (3, 2.5), (4, 2.5)]", done.stderr
    assert caplog.records == []
