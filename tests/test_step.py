"""One step of the smallest model: what its loss counts, how micro-batches join, what a broken step leaves behind.

Legend: B sequences, T tokens, V vocabulary.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from k2jax import model
from k2jax.training.step import gradients, held_out_nats, init_state, train_step
from tests import tiny

quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
# One dense layer: seconds to compile, so that planted bugs are found in seconds.
SMALLEST = {"model.num_layers": 1, "model.attention": ("full",), "model.moe": None, "data.seq_len": 16}


def config(**changes):
    return tiny.config(overrides=SMALLEST | changes)


@pytest.fixture(scope="module")
def batch():
    """[1, B, T]: two packed documents a row, and masks that differ between the rows."""
    cfg = config()
    rng = np.random.default_rng(0)
    shape = (cfg.data.batch_size, cfg.data.seq_len)
    arrays = {name: rng.integers(0, 256, shape).astype(np.int32) for name in ("tokens", "targets")}
    arrays["segment_ids"] = np.sort(rng.integers(1, 3, shape).astype(np.int32), axis=1)
    arrays["loss_mask"] = (rng.random(shape) < np.linspace(0.2, 1.0, shape[0])[:, None]).astype(np.float32)
    return {name: x[None] for name, x in arrays.items()}


@pytest.fixture(scope="module")
def params():
    return quick_jit(partial(init_state, config(), optax.identity()))(jax.random.key(0))["params"]


@pytest.fixture(scope="module")
def step_gradients():
    return quick_jit(partial(gradients, cfg=config()))


def masked_nats(params, batch):
    """-log p of every masked target in float64, from all logits at once."""
    tokens_BT, targets_BT, segments_BT, mask_BT = (
        batch[name][0] for name in ("tokens", "targets", "segment_ids", "loss_mask")
    )
    forward = quick_jit(lambda p, tokens_BT, segments_BT: model.apply(p, config().model, tokens_BT, segments_BT)[0])
    logits_BTV = np.asarray(forward(params, tokens_BT, segments_BT), np.float64)
    log_z_BT = np.log(np.exp(logits_BTV).sum(axis=-1))
    picked_BT = np.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return ((log_z_BT - picked_BT) * mask_BT).sum()


def test_the_loss_is_the_mean_over_the_predicted_tokens(params, batch, step_gradients):
    (_, sums), _ = step_gradients(params, batch)
    assert float(sums["loss"]) == pytest.approx(masked_nats(params, batch) / batch["loss_mask"].sum(), rel=1e-5)


def test_what_the_mask_hides_leaves_no_trace(params, batch, step_gradients):
    hidden = batch["loss_mask"] == 0
    assert hidden.any()
    other = batch | {"targets": np.where(hidden, 255 - batch["targets"], batch["targets"])}
    got, want = step_gradients(params, other), step_gradients(params, batch)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_held_out_nats_are_the_sum_over_the_predicted_tokens(params, batch):
    nats, _ = quick_jit(partial(held_out_nats, cfg=config()))(params, {name: x[0] for name, x in batch.items()})
    assert float(nats) == pytest.approx(masked_nats(params, batch), rel=1e-5)


def test_micro_batches_add_losses_and_take_the_largest_max_logit(params, batch, step_gradients):
    (whole, whole_sums), whole_max = step_gradients(params, batch)
    halves = {name: x.reshape(2, -1, x.shape[-1]) for name, x in batch.items()}
    halved = quick_jit(partial(gradients, cfg=config(**{"train.accumulation": 2})))
    (parts, parts_sums), parts_max = halved(params, halves)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), parts, whole)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), parts_sums, whole_sums)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), parts_max, whole_max)


def test_a_sound_step_is_taken_and_a_broken_one_is_not(params, batch):
    cfg, tx = config(), optax.with_extra_args_support(optax.sgd(0.1))
    state = {"params": params, "opt_state": tx.init(params), "step": jnp.int32(0), "skipped_in_row": jnp.int32(0)}
    step = quick_jit(partial(train_step, cfg=cfg, tx=tx))
    sound, metrics = step(state, batch)
    assert int(metrics["skipped"]) == 0
    assert not np.array_equal(sound["params"]["head"]["w"], params["head"]["w"])
    broken, metrics = step(state, batch | {"loss_mask": np.full_like(batch["loss_mask"], np.nan)})
    assert int(metrics["skipped"]) == 1
    jax.tree.map(np.testing.assert_array_equal, broken["params"], params)
