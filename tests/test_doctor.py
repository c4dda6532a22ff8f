"""The doctor sees what is wrong: ops, collectives, steps; and it goes on whatever it finds."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import doctor
from k2jax.config import load_config
from k2jax.diagnostics import advice, cases, examination, ops, rates
from k2jax.diagnostics.ops import Case, Outcome, check
from k2jax.kernels import attention as attention_op
from k2jax.kernels import grouped_matmul as grouped_op
from k2jax.kernels.hopper import CannotRun
from k2jax.training.errors import SetupError
from tests import tiny
from tests.on_devices import told_by

ROOT = Path(__file__).resolve().parent.parent
X = np.random.default_rng(0).standard_normal((8, 8), np.float32)


def case(run, reference=jnp.sin, dtype="float32", inputs=(X,), **kwargs):
    return Case("sine", "planted", dtype, inputs, run, reference, tolerance=1e-5, **kwargs)


# --- one op ---------------------------------------------------------------------------------------------------------


def test_a_right_op_passes_with_its_error():
    outcome = check(case(lambda x: jnp.cos(x - np.pi / 2)))
    assert outcome.state == "pass"
    assert 0 < outcome.error < 1e-6
    assert outcome.line().startswith("PASS   sine planted float32")


@jax.custom_jvp
def sine_with_a_wrong_gradient(x):
    return jnp.sin(x)


sine_with_a_wrong_gradient.defjvp(lambda x, dx: (jnp.sin(x[0]), 1.01 * jnp.cos(x[0]) * dx[0]))


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (lambda x: 1.001 * jnp.sin(x), "wrong: "),
        (sine_with_a_wrong_gradient, "wrong: gradient"),
        (lambda x: jnp.where(x > 1, jnp.nan, jnp.sin(x)), "not finite"),
        (lambda x: jnp.sin(x)[:4], "shape (4, 8), not (8, 8)"),
        (lambda x: jnp.sin(x) @ x[:3], "TypeError"),
    ],
    ids=["value", "gradient", "not a number", "shape", "exception"],
)
def test_a_wrong_op_fails_and_says_how(run, says):
    outcome = check(case(run))
    assert outcome.state == "fail"
    assert says in outcome.line()


def test_integers_must_be_equal():
    right = case(lambda x: jnp.argmax(x, axis=0), lambda x: jnp.argmax(x, axis=0))
    assert check(right).state == "pass"
    assert check(dataclasses.replace(right, run=lambda x: jnp.argmin(x, axis=0))).state == "fail"


@pytest.mark.parametrize("error", [NotImplementedError, CannotRun])
def test_an_implementation_that_the_platform_lacks_is_absent(error):
    def run(x):
        raise error("needs a Hopper GPU")

    assert check(case(run)).line() == f"ABSENT {'sine planted float32':44} {'':32} needs a Hopper GPU"


def test_rounded_inputs_reach_both_sides_alike():
    outcome = check(case(lambda x: x, lambda x: x, dtype="bfloat16"))
    assert outcome.error == 0


# --- the table of cases ---------------------------------------------------------------------------------------------


def test_every_implementation_in_every_table_has_cases_in_both_types(monkeypatch):
    monkeypatch.setitem(attention_op.IMPLEMENTATIONS, "new", attention_op.IMPLEMENTATIONS["xla"])
    found = {(c.op.split()[0], c.implementation, c.dtype) for c in cases.all_cases()}
    for op, table in {"attention": attention_op, "moba": cases.moba_pallas, "grouped_matmul": grouped_op}.items():
        for name in table.IMPLEMENTATIONS:
            assert {(op, name, "float32"), (op, name, "bfloat16")} <= found
    assert {name for name, _, _ in found} >= {"dispatch", "token_logprobs", "newton_schulz", "qk_clip"}
    assert {dtype for op, _, dtype in found if op == "newton_schulz"} == {"float32", "bfloat16", "float16"}


def named(op, implementation, dtype):
    return next(
        c for c in cases.all_cases(quick=True) if (c.op, c.implementation, c.dtype) == (op, implementation, dtype)
    )


def test_a_wrong_kernel_is_seen(monkeypatch):
    right = grouped_op.IMPLEMENTATIONS["xla"]
    assert check(named("grouped_matmul", "xla", "bfloat16")).state == "pass"
    # The weight of the next group: what an off-by-one in a kernel's table of tiles does.
    monkeypatch.setitem(grouped_op.IMPLEMENTATIONS, "xla", lambda x, w, sizes: right(x, jnp.roll(w, 1, 0), sizes))
    for dtype in ("float32", "bfloat16"):
        assert check(named("grouped_matmul", "xla", dtype)).state == "fail"


@pytest.mark.parametrize(("op", "implementation"), [("newton_schulz", "batched"), ("qk_clip", "MLA and MHA")])
def test_optimizer_ops_agree_with_float64(op, implementation):
    assert check(named(op, implementation, "float32")).state == "pass"


# --- rates ----------------------------------------------------------------------------------------------------------


def test_a_time_is_the_median_and_leaves_compilation_out(monkeypatch):
    times = iter([9.0, 1.0, 5.0, 2.0, 3.0, 1.0])  # one that says how often, then five runs
    monkeypatch.setattr(rates, "_timed", lambda fn, args, repeats: next(times))
    called = []
    assert rates.seconds(called.append, 0) == 2.0
    assert called == [0]


def test_a_disk_is_written_and_left_clean(tmp_path):
    assert rates.disk_bandwidth(tmp_path, megabytes=1) > 0
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="No such file"):
        rates.disk_bandwidth(tmp_path / "absent", megabytes=1)


COLLECTIVES = """
import json, jax
from k2jax.diagnostics import rates
told = {"right": rates.collective_bandwidth(runs=1)}
highest = lambda axes, x_BD: jax.lax.pmax(x_BD, axes)
rates._COLLECTIVES = {"all-reduce": (highest, *rates._COLLECTIVES["all-reduce"][1:])}
told["wrong"] = rates.collective_bandwidth(runs=1)
print(json.dumps(told))
"""


def test_collectives_over_eight_devices_are_measured_and_checked():
    told = told_by(COLLECTIVES, devices=8)
    assert set(told["right"]) == {"all-gather", "reduce-scatter", "all-reduce", "all-to-all"}
    assert all(link["right"] and link["bytes_per_second"] > 0 for link in told["right"].values())
    assert not told["wrong"]["all-reduce"]["right"]


# --- the round ------------------------------------------------------------------------------------------------------

STEPPED = {
    "devices": 1, "compile_seconds": 1.0, "steps": 5, "step_seconds": 0.1, "tokens_per_second": 1280.0, "mfu": 0.3,
    "peak": "1 TFLOP/s, test", "losses": [5.0, 4.0], "finite": True, "memory_predicted": 2**20,
    "memory_compiled": 2**20, "memory_peak": None, "memory": ["memory per device"], "state_bytes": 2**20,
    "batch_bytes": 1000,
}  # fmt: skip


@pytest.fixture
def short(monkeypatch):
    """The round with two ops, fast rates and invented steps; a test may change `plan`."""
    plan = {"cases": [case(jnp.sin), case(lambda x: jnp.sin(x))], "steps": lambda cfg, steps: STEPPED}
    monkeypatch.setattr(examination, "all_cases", lambda quick: plan["cases"])
    monkeypatch.setattr(examination, "take_steps", lambda cfg, steps: plan["steps"](cfg, steps))
    monkeypatch.setattr(rates, "product_flops", lambda dtype, runs: (1e12, 256))
    monkeypatch.setattr(rates, "memory_bandwidth", lambda runs: 1e10)
    monkeypatch.setattr(rates, "disk_bandwidth", lambda folder, megabytes: 1e9)
    return plan


def status(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        doctor.main(["--config=tests/tiny.py", f"--workdir={tmp_path}", "--quick"])
    said = capsys.readouterr().out
    return ended.value.code, said, json.loads((tmp_path / "doctor.json").read_text())


def test_all_right_ends_with_0_and_a_record(short, tmp_path, capsys):
    code, said, told = status(tmp_path, capsys)
    assert code == 0
    assert "collectives       skipped: one device" in said
    assert "all right: 2 op checks passed" in said.splitlines()[-1]
    assert (told["wrong"], told["config"]["model"]["dim"]) == ([], 32)
    assert {"command", "hardware", "versions", "commit", "date", "machine", "rates", "seconds"} <= set(told)


def test_a_wrong_op_ends_with_1_and_stops_nothing(short, tmp_path, capsys):
    short["cases"].insert(0, case(lambda x: 1.1 * jnp.sin(x)))
    code, said, told = status(tmp_path, capsys)
    assert code == 1
    assert said.splitlines()[-1].startswith("WRONG: sine planted float32")
    assert [op["state"] for op in told["ops"]] == ["fail", "pass", "pass"]
    assert "FAIL   sine planted float32" in said
    assert "tokens/s" in said


def test_steps_that_fail_end_with_1(short, tmp_path, capsys):
    def too_big(cfg, steps):
        raise SetupError("the step needs 2 GiB")

    short["steps"] = too_big
    code, said, told = status(tmp_path, capsys)
    assert (code, told["steps"]) == (1, None)
    assert "FAIL   the step needs 2 GiB" in said
    short["steps"] = lambda cfg, steps: STEPPED | {"finite": False, "losses": [5.0, None]}
    code, said, told = status(tmp_path, capsys)
    assert code == 1
    assert "loss 5.0000 to not finite" in said


def test_a_disk_that_cannot_be_written_is_told(short, monkeypatch, tmp_path, capsys):
    def full(folder, megabytes):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rates, "disk_bandwidth", full)
    code, said, _ = status(tmp_path, capsys)
    assert code == 1
    assert "FAIL   disk write: OSError: [Errno 28] No space left on device" in said


def test_a_rate_that_cannot_be_measured_stops_nothing(short, monkeypatch, tmp_path, capsys):
    def broken(*args):
        raise RuntimeError("no such product")

    monkeypatch.setattr(rates, "product_flops", broken)
    monkeypatch.setattr(rates, "collective_bandwidth", broken)
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    code, said, told = status(tmp_path, capsys)
    assert code == 1
    assert told["wrong"] == ["product float32", "product bfloat16", "collectives"]
    assert "FAIL   collectives: RuntimeError: no such product" in said
    assert "dispatch" in told["rates"]


def test_a_config_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(SetupError, match=r"nowhere\.py"):
        doctor.main(["--config=nowhere.py", f"--workdir={tmp_path}"])


# --- advice ---------------------------------------------------------------------------------------------------------

FAST = {"product float32": 1e12, "product bfloat16": 4e12, "dispatch": 1e-6, "disk write": 1e9, "to device": 1e10}


def advised(rates_now=None, stepped=None, outcomes=(), overrides=None):
    cfg = load_config("configs/nano.py", {"model.dtype": "bfloat16"} | (overrides or {}))
    return "\n".join(advice.slow_parts(cfg, outcomes, FAST | (rates_now or {}), STEPPED | (stepped or {})))


def test_types_are_advised_by_what_was_measured():
    assert "model.dtype='bfloat16' is emulated here" in advised({"product bfloat16": 1e11})
    assert "model.dtype" not in advised()
    assert "optimizer.ns_dtype='float32': products in bfloat16 run 4.0 times as fast" in advised()


def test_a_kernel_that_works_here_is_not_missed(monkeypatch):
    assert "moba runs through XLA" in advised()
    monkeypatch.setitem(cases.moba_pallas.IMPLEMENTATIONS, "chip", None)
    assert "moba runs through XLA" in advised()  # it is in the table, but nothing shows that it works
    works = Outcome("moba packed", "chip", "float32", "pass", 0.0, 1e-5, "", 1.0)
    said = advised(outcomes=[works])
    assert "moba runs" not in said
    assert "grouped_matmul runs through XLA" in said


def test_slow_surroundings_are_told():
    quick = advised()
    for word, slow in {
        "checkpoints: ": {"disk write": 1e6},
        "batches: ": {"to device": 1e5},
        "dispatch: ": {"dispatch": 0.02},
    }.items():
        assert word not in quick
        assert word in advised(slow)
    assert "MFU 1.0%" in advised(stepped={"mfu": 0.01})


def test_padding_of_experts_is_told_where_it_is_much():
    assert "experts: up to 25% more rows" in advised()
    assert "experts: " not in advised(overrides={"data.batch_size": 32})


def test_this_device_has_float64():
    assert advice.has_float64()


# --- for real -------------------------------------------------------------------------------------------------------


@pytest.mark.check
@pytest.mark.parametrize("devices", [1, 8])
def test_the_whole_round_as_a_process(tmp_path, devices):
    source = tiny.write_text(tmp_path / "text")
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "-m", "experiments.doctor", "--quick", f"--workdir={tmp_path}"]
    command += [f"--config=tests/tiny.py:source={source},data={min(devices, 4)}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((tmp_path / "doctor.json").read_text())
    assert told["wrong"] == []
    assert told["steps"]["devices"] == min(devices, 4)
    assert len(told["collectives"]) == (4 if devices > 1 else 0)
    assert abs(told["steps"]["memory_predicted"] / told["steps"]["memory_compiled"] - 1) < 0.5
    needs = {"sm90": "needs a Hopper GPU", "tpu": "needs a TPU"}
    kernels = [op for op in told["ops"] if op["implementation"] in needs]
    assert {op["state"] for op in kernels} == {"absent"}
    assert all(needs[op["implementation"]] in op["message"] for op in kernels)
    assert all(op["state"] == "pass" for op in told["ops"] if op not in kernels)
    assert ops.TOLERANCE.keys() <= {op["dtype"] for op in told["ops"]}
