"""Stages: what differs from the stage before, one schedule over all, data that go on, exact resume across a switch."""

import io
import json
import shutil

import pytest

from k2jax.config import apply_overrides, run_config
from k2jax.report.run_folder import load_run
from k2jax.training.errors import SetupError, WorkdirError
from k2jax.training.loop import train
from k2jax.training.metrics import read_metrics
from k2jax.training.schedules import by_step
from k2jax.training.workdir import check, claim
from tests import tiny

LONG = {
    "name": "long",
    "start": 4,
    "model": {"attention": ("moba", "moba", "full"), "rope": {"factor": 2.0, "original_length": 32}},
    "data": {"seq_len": 64, "batch_size": 2},
    "optimizer": {"warmup_tokens": 0, "constant_tokens": 128},
}
COOL = {
    "name": "cool",
    "start": 6,
    "optimizer": {"learning_rate": 0.002, "final_learning_rate": 0.0, "constant_tokens": 0, "decay": "linear"},
}
TIMES = ("step_time", "tokens_per_second", "mfu", "goodput")


def config(source="stdlib", stages=(LONG, COOL), steps=8, **overrides):
    tree = apply_overrides(tiny.get_config(f"source={source},steps={steps},every=2"), overrides)
    return run_config(tree.to_dict() | {"stages": list(stages)})


# --- config ---------------------------------------------------------------------------------------------------------


def test_a_stage_is_the_stage_before_it_with_its_changes():
    start, long, cool = config().parts
    assert [(p.name, p.start, p.stop) for p in (start, long, cool)] == [("start", 0, 4), ("long", 4, 6), ("cool", 6, 8)]
    assert start.run.data.seq_len == 32
    assert (long.run.data.seq_len, long.run.model.rope.factor, long.run.model.rope.theta) == (64, 2.0, 10_000.0)
    assert cool.run.model == long.run.model
    assert cool.run.optimizer.learning_rate == 0.002
    assert cool.run.optimizer.tau == start.run.optimizer.tau


def test_tokens_count_over_stages_of_different_size():
    cfg = config(stages=(LONG | {"data": {"batch_size": 8}},))
    assert [cfg.tokens_after(step) for step in (0, 4, 5, 8)] == [0, 512, 768, 1536]
    assert cfg.total_tokens == 1536


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"start": 8}, r"stages\[0\] \('long'\)\.start=8: must lie after step 0 and before train\.steps=8"),
        ({"start": 0}, r"start=0"),
        ({"name": "start"}, r"give every stage another name"),
        ({"model": {"dim": 64}}, r"model\.dim=64: a stage cannot change it from 32; start another run"),
        ({"model": {"moe": {"num_experts": 8}}}, r"model\.moe=.*a stage cannot change it"),
        ({"optimizer": {"name": "adamw"}}, r"optimizer\.name='adamw': a stage cannot change it"),
        ({"data": {"seed": 5}}, r"data\.seed=5: a stage cannot change it"),
        ({"accumulation": 3}, r"train\.accumulation=3"),
        ({"data": {"sequence": 5}}, r"has no field 'sequence'"),
        ({"optimizer": {"constant_tokens": 10**6}}, r"exceed the run's"),
    ],
    ids=str,
)
def test_what_a_stage_cannot_be_is_refused(stage, message):
    with pytest.raises(ValueError, match=message):
        config(stages=(LONG | stage,))


def test_two_stages_of_one_name_are_refused():
    with pytest.raises(ValueError, match="give every stage another name"):
        config(stages=(LONG, COOL | {"name": "long"}))


def test_every_stage_has_a_schedule_of_its_own():
    rate = by_step(config())
    # Warm-up of one step, constant two, decay to the end of the first stage; constant then decay; linear to zero.
    expected = [0.02, 0.02, 0.02, 0.002, 0.02, 0.002, 0.001, 0.0]
    assert [float(rate(step)) for step in range(8)] == pytest.approx(expected, abs=1e-8)


def test_a_run_with_stages_may_change_what_any_run_may(tmp_path):
    claim(tmp_path, config())
    assert check(tmp_path, config(**{"data.prefetch": 7})) == [
        "data.prefetch: 2 -> 7", "stages[0].data.prefetch: 2 -> 7", "stages[1].data.prefetch: 2 -> 7",
    ]  # fmt: skip
    with pytest.raises(WorkdirError, match=r"stages\[0\]\.data\.batch_size: 2 -> 4.*Fix: use that config"):
        check(tmp_path, config(stages=(LONG | {"data": {"seq_len": 64, "batch_size": 4}}, COOL)))
    with pytest.raises(WorkdirError, match="stages"):
        check(tmp_path, config(stages=(LONG,)))


# --- a run ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tiny.write_text(tmp_path_factory.mktemp("text"), files=16)


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """A run of three stages whose checkpoints are all kept."""
    workdir = tmp_path_factory.mktemp("whole")
    stream = io.StringIO()
    train(config(text, **{"train.checkpoints_kept": 9, "train.log_every": 1}), workdir, stream=stream)
    return workdir, stream.getvalue()


def lines(workdir):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(workdir / "metrics.jsonl")]


@pytest.mark.check
def test_the_switch_is_told_and_stands_in_the_metrics(whole):
    workdir, printed = whole
    assert "stage 'long': steps 5 to 6, 2 sequences of 64 tokens a step" in printed
    assert "a new pass;" in printed
    found = lines(workdir)
    assert [line["tokens"] for line in found] == [128 * (i + 1) for i in range(8)]
    assert [line["lr"] for line in found] == pytest.approx([0.02, 0.02, 0.02, 0.002, 0.02, 0.002, 0.001, 0.0], abs=1e-8)
    assert load_run(workdir).stages == [(4, "long"), (6, "cool")]
    assert all(line["skipped"] == 0 for line in found)
    timed = read_metrics(workdir / "metrics.jsonl")
    assert all(0 < line["step_time"] < 60 and 0 < line["goodput"] <= 1 for line in timed)


@pytest.mark.check
@pytest.mark.parametrize("step", [4, 6])
def test_a_run_resumed_at_a_switch_is_the_run_that_never_stopped(whole, text, tmp_path, step):
    copy = tmp_path / "copy"
    shutil.copytree(whole[0], copy)
    for checkpoint in (copy / "checkpoints").iterdir():
        if checkpoint.name.isdigit() and int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)
    train(config(text, **{"train.checkpoints_kept": 9, "train.log_every": 1}), copy, stream=io.StringIO())
    assert json.dumps(lines(copy)) == json.dumps(lines(whole[0]))


def test_a_corpus_too_small_for_a_later_stage_is_refused_at_the_start(text, tmp_path):
    with pytest.raises(SetupError, match=r"windows of seq_len=65536"):
        train(config(text, stages=(LONG | {"data": {"seq_len": 65536, "batch_size": 2}},)), tmp_path)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.check
def test_a_stage_that_changed_is_another_run(whole, text):
    from k2jax.training.errors import WorkdirError

    other = config(text, stages=(LONG | {"start": 3}, COOL), **{"train.checkpoints_kept": 9, "train.log_every": 1})
    with pytest.raises(WorkdirError, match="stages"):
        train(other, whole[0])
