"""configs/logit_explosion.py: two arms that differ in QK-Clip alone, and the effect that they show."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

from k2jax.config import load_config
from k2jax.training.loop import train
from k2jax.training.metrics import read_metrics

CONFIG = str(Path(__file__).resolve().parents[1] / "configs" / "logit_explosion.py")


def test_the_arms_differ_in_the_optimizers_name_alone():
    on, off = load_config(f"{CONFIG}:clip=on"), load_config(f"{CONFIG}:clip=off")
    assert (on.optimizer.name, off.optimizer.name) == ("muonclip", "muon")
    assert dataclasses.replace(on, optimizer=dataclasses.replace(on.optimizer, name="muon")) == off


def test_clip_is_on_by_default():
    assert load_config(CONFIG) == load_config(f"{CONFIG}:clip=on")


def test_decay_per_step_is_that_of_kimi_k2():
    ours, k2 = load_config(CONFIG).optimizer, load_config(str(Path(CONFIG).with_name("kimi_k2.py"))).optimizer
    np.testing.assert_allclose(ours.learning_rate * ours.weight_decay, k2.learning_rate * k2.weight_decay)


def test_both_arms_see_the_same_text_in_the_same_order_for_a_seed():
    on, off = load_config(f"{CONFIG}:clip=on,seed=3"), load_config(f"{CONFIG}:clip=off,seed=3")
    assert on.data == off.data
    assert on.data.seed == on.train.seed == off.train.seed == 3


@pytest.mark.check
def test_logits_pass_the_threshold_under_muon_and_stay_near_it_under_muonclip(tmp_path):
    # A quarter of the batch and a lower threshold, so that the effect shows in a minute.
    tau, quick = 15.0, {"data.batch_size": 4, "optimizer.tau": 15.0}
    max_logit = {}
    for clip in ("off", "on"):
        cfg = load_config(f"{CONFIG}:clip={clip},steps=150", {**quick, "optimizer.warmup_tokens": 5 * 4 * 128})
        with open(os.devnull, "w") as quiet:
            train(cfg, tmp_path / clip, stream=quiet)
        max_logit[clip] = np.array([line["max_logit"] for line in read_metrics(tmp_path / clip / "metrics.jsonl")])
    assert max_logit["off"][-20:].min() > 2 * tau
    assert max_logit["off"][-20:].mean() > 1.5 * max_logit["off"][60:80].mean()
    # The clip acts after the update that saw the logit, so the next batch may pass tau by a step's growth.
    assert max_logit["on"].max() < 1.5 * tau
    assert max_logit["on"][-20:].mean() > 0.5 * tau
