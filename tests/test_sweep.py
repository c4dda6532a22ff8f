"""Sweeps: their points, the shares of the machine, the results, and the order of things with pretended jobs."""

import csv
import dataclasses
import json
import math

import pytest

from experiments import sweep, sweep_results
from experiments.sweep_jobs import Job, make_slots, tail, visible_gpus
from experiments.sweep_points import LONGEST, name, points
from k2jax.training.errors import Interrupted, RunError, SetupError
from tests import tiny

HEAD = "from tests import tiny\nget_config = tiny.get_config\n"


@pytest.fixture
def swept(tmp_path):
    """Writes a config file with this body of get_sweep."""

    def write(*lines):
        body = "".join(f"    {text}\n" for text in lines)
        (tmp_path / "swept.py").write_text(f"{HEAD}def get_sweep(add):\n{body}")
        return str(tmp_path / "swept.py")

    return write


# --- points -----------------------------------------------------------------------------------------------------------


def test_a_point_sets_arguments_and_fields(swept):
    file = swept("for lr in (0.1, 0.2): add(optimizer='adamw', **{'optimizer.learning_rate': lr})", "add()")
    one, two, base = points(f"{file}:steps=4", {"data.seed": 3})
    assert (one.name, base.name) == ("optimizer=adamw_optimizer.learning_rate=0.1", "base")
    assert one.config == f"{file}:steps=4,optimizer=adamw"
    assert two.overrides == {"data.seed": 3, "optimizer.learning_rate": 0.2}
    assert two.cfg == tiny.config(
        steps=4, optimizer="adamw", overrides={"data.seed": 3, "optimizer.learning_rate": 0.2}
    )
    assert base.cfg.optimizer.name == "muonclip"


MISTAKES = {
    "add(seed=1); add(seed=2); add(seed=1)": "points {'seed': 1} and {'seed': 1} are the same run",
    "add(optimizer='muonclip'); add()": "points {'optimizer': 'muonclip'} and {} are the same run",
    "add(**{'optimizer.tau': 100}); add()": "are the same run",
    "add(sed=1)": "point {'sed': 1}: config argument 'sed=1': no argument is named 'sed'; did you mean 'seed'",
    "add(**{'optimizer.tua': 1})": "no field 'tua'",
    "add(**{'optimizer.tau': -1})": "optimizer.tau=-1.0: must be positive",
    "add(**{'data.seed': 1})": "data.seed is set by the command line and by the point",
    "add(steps=3)": "steps is set by the command line and by the point",
    "add(source='a,b')": "source=a,b holds a comma",
    "pass": "get_sweep added no point",
}


@pytest.mark.parametrize("body", MISTAKES)
def test_a_point_that_cannot_work_is_refused_before_anything_runs(swept, body):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        points(f"{swept(body)}:steps=4", {"data.seed": 3})
    assert MISTAKES[body] in str(error.value)


def test_a_file_without_get_sweep_says_how_to_write_one(tmp_path):
    (tmp_path / "plain.py").write_text(HEAD)
    with pytest.raises(ValueError, match=r"no get_sweep\(add\). Fix: write one"):
        points(str(tmp_path / "plain.py"), {})


def test_names_are_short_safe_and_follow_from_the_settings_alone():
    assert name({"lr": 0.01, "clip": False}) == "lr=0.01_clip=False"
    long = name({"data.source": "/some/where/" + "x" * 100})
    odd = {name({"text": t}) for t in ("a/b", "a b", "a-b", "..", "ä", "a\nb")}
    assert len(long) <= LONGEST
    assert len(odd) == 6
    assert all(set(n) <= set("abcdefghijklmnopqrstuvwxyz0123456789=-.") for n in odd)


def test_the_sweeps_of_the_configs_are_sound():
    nano = points("configs/nano.py", {})
    assert {(p.cfg.optimizer.name, p.cfg.optimizer.learning_rate) for p in nano} >= {
        ("muonclip", 0.01),
        ("adamw", 0.002),
    }
    explosion = points("configs/logit_explosion.py", {})
    assert [p.cfg.optimizer.name for p in explosion] == ["muon", "muonclip", "muonclip", "muonclip"]


# --- shares of the machine --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("jobs", "gpus", "expected"),
    [
        (2, ["0", "1", "2", "3"], ["0,2", "1,3"]),
        (4, ["0", "1", "2", "3"], ["0", "1", "2", "3"]),
        (3, ["4", "7"], ["4", "7", "4"]),
    ],
)
def test_gpus_are_dealt_out_in_turn(jobs, gpus, expected):
    slots = make_slots(jobs, gpus, [0, 1])
    assert [slot.env["CUDA_VISIBLE_DEVICES"] for slot in slots] == expected
    shared = [slot.env.get("XLA_PYTHON_CLIENT_MEM_FRACTION") for slot in slots]
    assert shared == (["0.45"] * 3 if jobs == 3 else [None] * jobs)


def test_cores_are_divided_and_threads_counted():
    two = make_slots(2, [], [0, 1, 2, 3, 8])
    assert [slot.cores for slot in two] == [{0, 1}, {2, 3}]
    assert two[0].env == {"NPROC": "2", "OMP_NUM_THREADS": "2"}
    three = make_slots(3, [], [5, 6])
    assert [slot.cores for slot in three] == [{5}, {6}, {5}]


def test_gpus_are_those_that_jax_would_use(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert visible_gpus() == []
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    assert visible_gpus() == ["3", "GPU-5"]
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", "")
    assert visible_gpus() == []


# --- results ----------------------------------------------------------------------------------------------------------


def pretend(point, folder, bits=4.0, steps=None):
    """What a trainer leaves of this point after so many steps; all of them by default."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    total = point.cfg.train.steps
    steps = total if steps is None else steps
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(point.cfg)))
    lines = [
        {"step": s, "loss": 3.0, "max_logit": float(s), "step_time": 2.0, "skipped": 0} for s in range(1, steps + 1)
    ]
    if steps == total:
        lines[-1] |= {"eval/bits_per_byte": bits, "eval/loss": bits * math.log(2)}
        (folder / "checkpoints" / str(total)).mkdir(exist_ok=True)
        (folder / "report.html").write_text("")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_finished_point_has_its_config_evaluation_checkpoint_and_page(swept, tmp_path):
    (point,) = points(swept("add(seed=1)"), {})
    folder = tmp_path / point.name
    assert not sweep_results.is_finished(point, folder)
    pretend(point, folder)
    assert sweep_results.is_finished(point, folder)
    for field, value in (("train.steps", 8), ("optimizer.tau", 50.0)):
        (other,) = points(swept("add(seed=1)"), {field: value})
        assert not sweep_results.is_finished(other, folder)
    (folder / "report.html").unlink()
    assert not sweep_results.is_finished(point, folder)
    pretend(point, folder)
    (folder / "checkpoints" / "6").rmdir()
    assert not sweep_results.is_finished(point, folder)
    pretend(point, folder)
    (folder / "metrics.jsonl").write_text("{broken\n")
    assert not sweep_results.is_finished(point, folder)


def test_a_point_cut_short_is_not_finished(swept, tmp_path):
    (point,) = points(swept("add(seed=1)"), {})
    folder = tmp_path / point.name
    pretend(point, folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    # Evaluated at step 4 and killed, with a later checkpoint that somebody copied there.
    at_4 = json.loads(lines[3]) | {"eval/bits_per_byte": 2.0}
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:3], json.dumps(at_4)]) + "\n")
    assert not sweep_results.is_finished(point, folder)


def test_the_best_comes_first_and_what_has_no_number_last(swept, tmp_path):
    made = points(swept("for seed in range(4): add(seed=seed)"), {})
    for point, bits in zip(made, (3.0, math.nan, 2.0, None), strict=True):
        pretend(point, tmp_path / point.name, bits, steps=3 if bits is None else None)
    status = ["finished", "finished", "finished", "failed"]
    rows = [sweep_results.row(p, tmp_path / p.name, s) for p, s in zip(made, status, strict=True)]
    sweep_results.write(tmp_path, "c.py", {}, rows)
    saved = json.loads((tmp_path / "sweep.json").read_text())["points"]
    assert [p["point"] for p in saved] == ["seed=2", "seed=0", "seed=1", "seed=3"]
    assert saved[0] == {
        "point": "seed=2", "status": "finished", "bits_per_byte": 2.0, "held_out_loss": pytest.approx(1.386, abs=1e-3),
        "max_logit": 6.0, "steps": 6, "seconds": 12.0, "skipped": 0, "settings": {"seed": 2},
    }  # fmt: skip
    assert saved[3]["steps"] == 3
    sheet = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert [(r["seed"], r["bits_per_byte"]) for r in sheet] == [("2", "2.0"), ("0", "3.0"), ("1", ""), ("3", "")]
    text = sweep_results.table(rows).splitlines()
    assert [line.split()[0] for line in text] == ["point", "seed=2", "seed=0", "seed=1", "seed=3"]
    assert text[4].split()[1:3] == ["-", "-"]


def test_the_overlay_shows_the_best_eight(swept, tmp_path):
    made = points(swept("for seed in range(9): add(seed=seed)"), {})
    for point in made:
        pretend(point, tmp_path / point.name, bits=9.0 - point.cfg.train.seed)
    rows = [sweep_results.row(p, tmp_path / p.name, "finished") for p in made]
    assert sweep_results.write_overlay(tmp_path, rows).endswith("report.html (the best 8 of 9)")
    page = (tmp_path / "report.html").read_text()
    assert [f"seed={seed}<" in page for seed in range(9)] == [False] + [True] * 8
    assert sweep_results.write_overlay(tmp_path, []) == "no report: no point is finished"


# --- the order of things ----------------------------------------------------------------------------------------------


@pytest.fixture
def jobs(monkeypatch):
    """Jobs that end at once: by the status that the test plans for a point's next start, 0 if none."""
    planned, started = {}, []

    class Pretended(Job):
        def __init__(self, point, folder, slot, flags):
            self.point, self.slot, self.log = point, slot, folder / "log.txt"
            folder.mkdir(parents=True, exist_ok=True)
            self.log.write_text("the reason\n")
            started.append(point.name)
            self._status = planned.get(point.name, []).pop(0) if planned.get(point.name) else 0
            if self._status == 0:
                pretend(point, folder, bits=2.0 + point.cfg.train.seed)

        def status(self):
            return self._status

        def send(self, number):
            self._status = -number

    monkeypatch.setattr(sweep, "Job", Pretended)
    monkeypatch.setattr(sweep, "TICK", 0)
    monkeypatch.setattr(sweep_results, "write_overlay", lambda workdir, rows: "report: none")
    return planned, started


def run(file, workdir, *more):
    sweep.main([f"--config={file}", f"--workdir={workdir}", *more])


def test_points_run_once_and_are_skipped_by_the_next_start(swept, tmp_path, jobs, capsys):
    file = swept("for seed in (1, 0): add(seed=seed)")
    run(file, tmp_path / "s")
    assert jobs[1] == ["seed=1", "seed=0"]
    run(file, tmp_path / "s")
    assert jobs[1] == ["seed=1", "seed=0"]
    assert "2 finished before" in capsys.readouterr().out
    assert [p["point"] for p in json.loads((tmp_path / "s/sweep.json").read_text())["points"]] == ["seed=0", "seed=1"]


def test_a_failed_point_is_tried_again_and_then_listed_with_its_log(swept, tmp_path, jobs, capsys):
    jobs[0].update({"seed=0": [2], "seed=1": [1, -9]})
    with pytest.raises(RunError, match=r"1 of 3 points failed: seed=1\. Fix: read their logs"):
        run(swept("for seed in range(3): add(seed=seed)"), tmp_path / "s")
    assert sorted(jobs[1]) == ["seed=0", "seed=0", "seed=1", "seed=1", "seed=2"]
    out = capsys.readouterr().out
    assert "seed=0: ended with status 2; it is tried again (1 left)" in out
    assert "--- seed=1 failed" in out
    assert "    the reason" in out
    status = {p["point"]: p["status"] for p in json.loads((tmp_path / "s/sweep.json").read_text())["points"]}
    assert status == {"seed=0": "finished", "seed=1": "failed", "seed=2": "finished"}
    run(swept("for seed in range(3): add(seed=seed)"), tmp_path / "s")
    assert jobs[1][-1] == "seed=1"


@pytest.mark.parametrize("retries", [0, 2])
def test_the_number_of_retries_is_given(swept, tmp_path, jobs, retries):
    jobs[0]["seed=0"] = [2] * 9
    with pytest.raises(RunError):
        run(swept("add(seed=0)"), tmp_path / "s", f"--retries={retries}")
    assert len(jobs[1]) == 1 + retries


def test_a_job_that_ends_well_but_leaves_nothing_has_failed(swept, tmp_path, jobs, monkeypatch):
    monkeypatch.setattr(sweep_results, "is_finished", lambda point, folder: False)
    with pytest.raises(RunError, match="1 of 1 points failed"):
        run(swept("add(seed=0)"), tmp_path / "s", "--retries=0")


def test_mistakes_of_the_command_are_refused(swept, tmp_path, jobs, monkeypatch):
    file = swept("add(**{'mesh.data': 2})")
    for flag in ("--jobs=0", "--retries=-1"):
        with pytest.raises(SetupError, match="expected at least 1 job"):
            run(file, tmp_path / "s", flag)
    monkeypatch.setattr(sweep, "visible_gpus", lambda: ["0", "1"])
    with pytest.raises(SetupError, match="spans 2 devices, and --jobs=2 leaves a job 1 of the GPUs: lower --jobs"):
        run(file, tmp_path / "s", "--jobs=2")
    run(file, tmp_path / "s", "--jobs=1")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(SetupError, match="holds a single run"):
        run(file, tmp_path / "run")


def test_a_stop_ends_what_runs_and_says_how_to_go_on(swept, tmp_path, jobs, monkeypatch, capsys):
    monkeypatch.setattr(sweep.Sweep, "_reap", lambda self: setattr(self, "stop_signal", 2))
    jobs[0]["seed=0"] = [None]
    with pytest.raises(Interrupted, match=r"stopped by SIGINT: 2 waiting. Run the same command to continue."):
        run(swept("for seed in range(2): add(seed=seed)"), tmp_path / "s")
    assert jobs[1] == ["seed=0"]
    assert "stopping 1 jobs" in capsys.readouterr().out


def test_a_log_shows_its_end(tmp_path):
    (tmp_path / "log").write_bytes(b"".join(b"line %d\n" % i for i in range(50)) + b"\xff odd")
    assert tail(tmp_path / "log", 3).splitlines() == ["    line 48", "    line 49", "    � odd"]
    assert "no log" in tail(tmp_path / "absent")
