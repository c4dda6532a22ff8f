"""The training room in one process: step, guard, schedule, spikes, metrics, work folder and progress."""

import contextlib
import dataclasses
import io
import math
import struct
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from k2jax.config import load_config
from k2jax.layers.router import update_router_bias
from k2jax.model import init_params
from k2jax.training import hardware
from k2jax.training import step as step_module
from k2jax.training import workdir as workdir_module
from k2jax.training.errors import NonFiniteError, RunError, WorkdirError
from k2jax.training.loop import train
from k2jax.training.metrics import MetricsLog, SpikeDetector, read_metrics
from k2jax.training.optimizer import make_optimizer
from k2jax.training.progress import Progress, clock
from k2jax.training.schedules import by_step, learning_rate
from k2jax.training.step import gradients, train_step
from tests import tiny
from tests.oracles.router import bias_update

quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SMALL = {"model.num_layers": 2, "model.attention": ("moba", "full"), "data.seq_len": 16}


def small(**overrides):
    """Two layers, sixteen tokens: less to compile."""
    return tiny.config(overrides=SMALL | overrides)


def random_batch(cfg, seed=0):
    """[A, B, T] arrays as the pipeline makes them, with uneven masks, so that micro-batches weigh differently."""
    rng = np.random.default_rng(seed)
    shape = (cfg.data.batch_size, cfg.data.seq_len)
    batch = {
        "tokens": rng.integers(0, 256, shape).astype(np.int32),
        "targets": rng.integers(0, 256, shape).astype(np.int32),
        "segment_ids": np.sort(rng.integers(1, 3, shape).astype(np.int32), axis=1),
        "loss_mask": (rng.random(shape) < np.linspace(0.2, 1.0, shape[0])[:, None]).astype(np.float32),
    }
    accumulation = cfg.train.accumulation
    return {name: x.reshape(accumulation, -1, shape[1]) for name, x in batch.items()}


# --- step --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def params():
    """Of small(), with a router bias that is not zero."""
    params = quick_jit(partial(init_params, small().model))(jax.random.key(0))
    params["moe"]["moe"]["router"]["bias"] += jnp.array([0.03, -0.01, 0.0, -0.02])
    return params


@pytest.fixture
def fake_gradients(monkeypatch):
    """Replaces forward and backward by numbers of the batch: what follows them compiles in a moment."""

    def fake(params, batch, cfg):
        heads = jnp.ones((1, cfg.model.num_heads))
        summed = {"loss": batch["loss"], "balance_loss": 1.0, "load_ME": batch["load_ME"]}
        grads = jax.tree.map(lambda w: jnp.full_like(w, batch["grad"]) + 0.1 * w, params)
        return (grads, summed), {"dense": heads, "moe": 2 * heads}

    monkeypatch.setattr(step_module, "gradients", fake)


def numbers(loss=3.0, grad=0.5, load=(5.0, 1.0, 2.0, 0.0)):
    return {"loss": np.float32(loss), "grad": np.float32(grad), "load_ME": np.array([load], np.float32)}


def start(cfg, params, tx=None):
    """(state, step function)."""
    tx = tx or make_optimizer(cfg)
    zero = jnp.int32(0)
    state = {"params": params, "opt_state": tx.init(params), "step": zero, "skipped_in_row": zero}
    return state, quick_jit(partial(train_step, cfg=cfg, tx=tx))


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_a_step_that_is_not_finite_changes_nothing_but_its_count(fake_gradients, params):
    state, step = start(small(), params)
    state, _ = step(state, numbers())
    before = bits((state["params"], state["opt_state"]))
    for count, bad in enumerate((numbers(loss=np.nan), numbers(grad=np.inf), numbers(grad=np.nan)), start=1):
        state, metrics = step(state, bad)
        assert bits((state["params"], state["opt_state"])) == before
        assert int(state["step"]) == count + 1
        assert (int(metrics["skipped"]), int(metrics["skipped_in_row"])) == (1, count)
    state, metrics = step(state, numbers())
    assert bits((state["params"], state["opt_state"])) != before
    assert (int(metrics["skipped"]), int(metrics["skipped_in_row"])) == (0, 0)
    rate = partial(train_step, cfg=small(), tx=make_optimizer(small()), rate=lambda updates: 10.0 + updates)
    assert float(quick_jit(rate)(state, numbers())[1]["lr"]) == 12.0, "the third update's, in the sixth step"


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA L4", 121e12), ("NVIDIA L40S", None), ("NVIDIA T400", None),
     ("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("TPU v5", 459e12), ("TPU7x", 2307e12)],
)  # fmt: skip
def test_the_peak_is_that_of_the_chip_and_not_of_one_whose_name_begins_alike(monkeypatch, kind, peak):
    monkeypatch.setattr(hardware.jax, "devices", lambda: [SimpleNamespace(device_kind=kind)])
    monkeypatch.setattr(hardware, "_measured", lambda: 1.0)
    found, source = hardware.peak_flops_per_device()
    assert found == (peak or 1.0)
    assert ("measured" in source) == (peak is None)


def test_an_update_that_is_not_finite_ends_the_run(tmp_path):
    text = tiny.write_text(tmp_path / "text")
    cfg = tiny.config(text, SMALL | {"optimizer.learning_rate": 1e39, "optimizer.warmup_tokens": 0}, steps=6)
    with pytest.raises(NonFiniteError, match=r"step 1 made an update .* learning rate of inf.*learning_rate"):
        train(cfg, tmp_path / "run", stream=io.StringIO())
    assert not any((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize(("name", "rate"), [("muonclip", 0.01), ("muonclip", 0.0), ("adamw", 0.0)])
def test_the_balance_rule_alone_moves_the_router_bias(fake_gradients, params, name, rate):
    state, step = start(small(**{"optimizer.router_bias_rate": rate, "optimizer.name": name}), params)
    new, metrics = step(state, numbers())
    old, new = params["moe"]["moe"]["router"], new["params"]["moe"]["moe"]["router"]
    expected_E = bias_update(np.asarray(old["bias"][0], np.float64), np.array([5.0, 1.0, 2.0, 0.0]), rate)
    np.testing.assert_allclose(new["bias"][0], expected_E, atol=1e-8)
    assert np.array_equal(old["bias"], new["bias"]) == (rate == 0)
    assert not np.array_equal(old["w"], new["w"])
    np.testing.assert_allclose(metrics["expert_load"], [[0.625, 0.125, 0.25, 0.0]])
    assert float(metrics["load_max_over_mean"]) == 2.5


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_micro_batches_sum_gradients_and_take_the_largest_max_logit(monkeypatch, accumulation):
    def micro_loss(w, batch, num_targets, cfg):
        nats = jnp.sum(batch["loss_mask"] * jnp.sin(w * batch["tokens"])) / num_targets
        return nats, ({"loss": nats}, {"moe": batch["tokens"].max()[None]})

    monkeypatch.setattr(step_module, "micro_loss", micro_loss)
    cfg = small(**{"train.accumulation": accumulation})
    batch = random_batch(cfg)
    (grad, summed), max_logits = gradients(jnp.float32(0.01), batch, cfg)
    tokens, mask = batch["tokens"].astype(np.float64), batch["loss_mask"].astype(np.float64)
    assert float(summed["loss"]) == pytest.approx(np.sum(mask * np.sin(0.01 * tokens)) / mask.sum(), rel=1e-5)
    assert float(grad) == pytest.approx(np.sum(mask * tokens * np.cos(0.01 * tokens)) / mask.sum(), rel=1e-5)
    assert float(max_logits["moe"][0]) == tokens.max()


@pytest.mark.check
def test_micro_batches_give_the_step_of_the_whole_batch(params):
    results = []
    for accumulation in (1, 2, 4):
        cfg = small(**{"train.accumulation": accumulation})
        state, step = start(cfg, params)
        new, metrics = step(state, random_batch(cfg))
        results.append((new["params"], metrics))
    (whole, whole_metrics), *others = results
    for parts, parts_metrics in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4), parts, whole)
        # A sum of the max logits would be about `accumulation` times too large.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), parts_metrics, whole_metrics)


@pytest.mark.parametrize(
    "load", [[[5.0, 1.0, 2.0, 0.0], [3.0, 3.0, 3.0, 3.0]], [[2.0, 2.0, 6.0, 2.0], [0.0, 0.0, 0.0, 9.0]]]
)
def test_the_balance_rule_agrees_with_the_oracle(load):
    bias_ME = np.array([[0.1, -0.2, 0.3, 0.0], [0.0, 0.5, -0.5, 0.1]])
    expected_ME = [bias_update(b, np.array(c), 0.01) for b, c in zip(bias_ME, load, strict=True)]
    np.testing.assert_allclose(update_router_bias(jnp.array(bias_ME), jnp.array(load), 0.01), expected_ME, atol=1e-7)


# --- schedule ----------------------------------------------------------------------------------------------------


def test_the_schedule_at_its_boundaries():
    rate = partial(learning_rate, peak=1.0, final=0.1, warmup=100, constant=200, total=1000)
    values = {1: 0.01, 50: 0.5, 100: 1.0, 200: 1.0, 300: 1.0, 650: 0.55, 1000: 0.1, 5000: 0.1}
    for tokens, expected in values.items():
        assert float(rate(tokens)) == pytest.approx(expected, abs=1e-6), tokens
    quarter = 0.1 + 0.45 * (1 + math.cos(math.pi / 4))
    assert float(rate(475)) == pytest.approx(quarter, abs=1e-6)


def test_no_warm_up_starts_at_the_peak_and_no_decay_ends_there():
    assert float(learning_rate(1, peak=1.0, final=0.1, warmup=0, constant=10, total=20)) == 1.0
    assert float(learning_rate(20, peak=1.0, final=0.1, warmup=5, constant=15, total=20)) == 1.0


def test_a_schedule_may_have_more_tokens_than_an_int32_holds():
    cfg = load_config("configs/kimi_k2.py")
    rate = quick_jit(by_step(cfg))
    constant_steps = cfg.optimizer.constant_tokens / cfg.tokens_per_step
    assert float(rate(499)) == pytest.approx(2e-4, rel=1e-5)
    assert float(rate(int(500 + constant_steps) - 2)) == pytest.approx(2e-4, rel=1e-5)
    assert float(rate(int((500 + constant_steps + cfg.train.steps) / 2) - 1)) == pytest.approx(1.1e-4, rel=1e-4)
    assert float(rate(cfg.train.steps - 1)) == pytest.approx(2e-5, rel=1e-5)


def test_the_schedule_counts_tokens_not_steps():
    cfg = tiny.config()
    twice = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, batch_size=2 * cfg.data.batch_size))
    assert cfg.tokens_per_step == 128
    assert float(by_step(cfg)(0)) == pytest.approx(0.02)  # 128 tokens of warm-up end with the first step.
    assert float(by_step(cfg)(5)) == pytest.approx(0.002)
    assert float(by_step(twice)(1)) < 0.02 == pytest.approx(float(by_step(cfg)(1)))


# --- spikes ------------------------------------------------------------------------------------------------------


def losses(n=60):
    return [5.0 - 0.02 * i + 0.05 * math.sin(7 * i) for i in range(n)]


def test_a_spike_stands_out_and_ordinary_noise_does_not():
    detector = SpikeDetector()
    assert not any(detector.is_spike(x) for x in losses())
    assert detector.is_spike(9.0)
    assert not detector.is_spike(losses()[-1])
    assert not detector.is_spike(math.nan)


def test_the_first_steps_are_never_spikes():
    detector = SpikeDetector()
    assert not any(detector.is_spike(x) for x in [5.0] * 19 + [50.0])


def test_a_resumed_detector_judges_as_an_uninterrupted_one():
    series = [*losses(130), 10.0, math.nan, *losses(20), 5.6, 20.0]
    whole = SpikeDetector()
    judged = [whole.is_spike(x) for x in series]
    for cut in (1, 25, 131, 132, 150):
        resumed = SpikeDetector(series[:cut])
        assert [resumed.is_spike(x) for x in series[cut:]] == judged[cut:]
    assert sum(judged) >= 2


# --- metrics.jsonl and TensorBoard -------------------------------------------------------------------------------


def line(step, **more):
    return {"step": step, "loss": np.float32(1.1) / step, "lr": 0.5, "skipped": np.int32(0), **more}


def log_of(folder, first, last, resume_at=0):
    log = MetricsLog(folder, resume_at)
    for step in range(first, last + 1):
        log.write(line(step, max_logits={"moe": np.float32([[1.5, 2.5]])}))
    log.sync()
    log.close()
    return folder / "metrics.jsonl"


def test_numbers_come_back_bit_for_bit(tmp_path):
    path = log_of(tmp_path, 1, 3)
    (_, second, _) = read_metrics(path)
    assert np.float32(second["loss"]) == np.float32(1.1) / 2
    assert second["max_logits"] == {"moe": [[1.5, 2.5]]}
    assert isinstance(second["skipped"], int)


def test_resuming_drops_what_was_written_past_the_checkpoint(tmp_path):
    path = log_of(tmp_path, 1, 5)
    before = path.read_bytes()
    with path.open("a") as file:
        file.write('{"step": 6, "lo')
    log_of(tmp_path, 4, 5, resume_at=3)
    assert path.read_bytes() == before


def test_history_is_what_was_written_up_to_the_checkpoint(tmp_path):
    log_of(tmp_path, 1, 5)
    log = MetricsLog(tmp_path, 2)
    assert [past["step"] for past in log.history] == [1, 2]
    log.amend(2, {"eval/loss": np.float64(2.25)})
    log.write(line(3))
    log.close()
    assert [past.get("eval/loss") for past in read_metrics(tmp_path / "metrics.jsonl")] == [None, 2.25, None]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text.replace('"step": 2', '"step" 2'), "line 2, is damaged"),
        (lambda text: text.replace('"step": 2', '"steps": 2'), "line 2, is damaged"),
        (lambda text: "[1]\n" + text, "line 1, is damaged"),
        (
            lambda text: "".join(text.splitlines(keepends=True)[:2]),
            "ends at step 2, but the last checkpoint is of step 4",
        ),
    ],
)
def test_a_damaged_log_is_told_and_kept(tmp_path, damage, message):
    path = log_of(tmp_path, 1, 5)
    path.write_text(damage(path.read_text()))
    before = path.read_bytes()
    with pytest.raises(WorkdirError, match=message):
        MetricsLog(tmp_path, 4)
    assert path.read_bytes() == before


def test_a_log_that_was_deleted_starts_anew(tmp_path):
    path = log_of(tmp_path, 5, 6, resume_at=4)
    assert [past["step"] for past in read_metrics(path)] == [5, 6]


def test_a_full_disk_is_told_once(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log._file.close()
    with Path("/dev/full").open("ab", buffering=0) as log._file:
        with pytest.raises(
            RunError, match=r"metrics.jsonl .* cannot be written: .*No space left.* Fix: free disk space"
        ):
            log.write(line(1))
        log.close()


def write_many(log):
    for step in range(1, 20_000):
        log.write(line(step))


def test_a_full_disk_under_tensorboard_is_told_and_does_not_hang(tmp_path):
    log = MetricsLog(tmp_path, 0)
    full = open("/dev/full", "wb")  # noqa: SIM115 - closing it fails, which is the point
    log._board._events._py_recordio_writer._writer = full
    with pytest.raises(RunError, match="No space left"):
        write_many(log)
    log.close()
    with contextlib.suppress(OSError):
        full.close()


def events(folder):
    """Every event of a TensorBoard folder in order: records of length, checksum, bytes, checksum."""
    for path in sorted((folder / "tb").iterdir(), key=lambda p: p.stat().st_mtime_ns):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            yield Event.FromString(data[at + 12 : at + 12 + length])
            at += length + 16


def test_tensorboard_shows_each_step_once(tmp_path):
    log_of(tmp_path, 1, 5)
    log_of(tmp_path, 4, 6, resume_at=3)
    shown = {}
    for event in events(tmp_path):
        if event.HasField("session_log") and event.session_log.status == SessionLog.START:
            # What TensorBoard does at a restart.
            shown = {step: value for step, value in shown.items() if step < event.step}
        for value in event.summary.value:
            if value.tag == "loss":
                assert event.step not in shown
                shown[event.step] = value.simple_value
    assert shown == {step: pytest.approx(1.1 / step) for step in range(1, 7)}


# --- the work folder ---------------------------------------------------------------------------------------------


def test_a_folder_of_another_config_is_refused_and_a_longer_run_is_not(tmp_path):
    workdir_module.claim(tmp_path, tiny.config())
    assert workdir_module.check(tmp_path, tiny.config()) == []
    assert workdir_module.check(tmp_path, tiny.config(steps=9)) == ["train.steps: 6 -> 9"]
    with pytest.raises(WorkdirError, match=r"data.batch_size: 4 -> 8 \(there -> here\). Fix: use that config"):
        workdir_module.check(tmp_path, tiny.config(batch=8))
    with pytest.raises(WorkdirError, match=r"model.moe.num_experts: 4 -> 8"):
        workdir_module.check(tmp_path, tiny.config(overrides={"model.moe.num_experts": 8}))


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", '{"a"'])
def test_a_config_that_cannot_be_read_is_told(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(WorkdirError, match=r"config.json .*Fix: restore it"):
        workdir_module.check(tmp_path, tiny.config())


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl"])
def test_what_another_run_left_is_not_written_over(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(WorkdirError, match=f"has {name} but no config.json"):
        workdir_module.check(tmp_path, tiny.config())


def test_one_folder_has_one_writer(tmp_path):
    again = workdir_module.locked(tmp_path)
    with workdir_module.locked(tmp_path), pytest.raises(WorkdirError, match="another process is training there"):
        again.__enter__()
    with workdir_module.locked(tmp_path):
        pass


# --- progress ----------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(stream, steps, every=2):
    progress = Progress(steps, every, stream)
    for step in range(1, steps + 1):
        progress.step(
            {
                "step": step, "loss": 1.0, "lr": 0.1, "grad_norm": 1.0, "max_logit": 2.0, "step_time": 30.0,
                "tokens_per_second": 1e4, "mfu": 0.5,
            }
        )  # fmt: skip
        if step == 3:
            progress.say("a warning")
    progress.finish()
    return stream.getvalue()


def test_a_pipe_gets_plain_lines(monkeypatch):
    text = shown(io.StringIO(), 5)
    assert [t.split(" | ")[0] for t in text.splitlines()] == ["step 2/5", "a warning", "step 4/5", "step 5/5"]
    assert "\r" not in text


def test_a_terminal_gets_one_line_that_is_rewritten_and_fits(monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    text = shown(Terminal(), 5)
    assert text.count("\n") == 3  # The warning, the line above it, and the end.
    assert text.count("\r\x1b[2Kstep ") == 5
    assert all(len(part) < 50 for part in text.replace("\r\x1b[2K", "\n").splitlines())
    assert "step 1/5 | eta 2:00" in text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (61, "1:01"), (3600, "1:00:00"), (3723.9, "1:02:03")])
def test_clock(seconds, text):
    assert clock(seconds) == text
