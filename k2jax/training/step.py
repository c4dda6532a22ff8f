"""One optimizer step: micro-batches, clipping, update, QK-Clip, balance rule, guard.

Legend: A micro-batches, B sequences of a micro-batch, T tokens, M expert layers, E experts.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax

from k2jax import sharding
from k2jax.config import RunConfig
from k2jax.layers.router import update_router_bias
from k2jax.model import init_params, token_logprobs
from k2jax.training.schedules import by_step


def init_state(cfg: RunConfig, tx, key) -> dict:
    """params, optimizer state, finished steps, and skipped steps in a row: all that a checkpoint must hold."""
    params = init_params(cfg.model, key)
    zero = jnp.zeros((), jnp.int32)
    return {"params": params, "opt_state": tx.init(params), "step": zero, "skipped_in_row": zero}


def micro_loss(params, batch, num_targets, cfg: RunConfig):
    """This micro-batch's share of the step's loss, and what it tells.

    num_targets: predicted tokens of the whole step, so that shares add up to the mean over the step's tokens
    however the documents fall into micro-batches.
    """
    logp_BT, aux = token_logprobs(
        params, cfg.model, batch["tokens"], batch["segment_ids"], targets_BT=batch["targets"],
        chunk=cfg.train.loss_chunk, max_logits=True,
    )  # fmt: skip
    nats = -jnp.sum(logp_BT * batch["loss_mask"]) / num_targets
    balance = aux.balance_loss / cfg.train.accumulation
    summed = {"loss": nats, "balance_loss": balance}
    if aux.expert_load_ME is not None:
        summed["load_ME"] = aux.expert_load_ME
    total = nats + cfg.optimizer.balance_loss * balance
    if cfg.optimizer.z_loss:
        summed["z_loss"] = jnp.sum(jnp.square(aux.log_z_BT) * batch["loss_mask"]) / num_targets
        total += cfg.optimizer.z_loss * summed["z_loss"]
    return total, (summed, aux.max_logits)


def gradients(params, batch, cfg: RunConfig):
    """Gradient of the step's loss over the micro-batches of `batch` (arrays [A, B, T]).

    Losses, loads and gradients are summed; max logits take the maximum, since a sum would clip too far.
    """
    num_targets = jnp.maximum(batch["loss_mask"].sum(), 1.0)
    value_and_grad = jax.value_and_grad(partial(micro_loss, cfg=cfg), has_aux=True)

    def one(micro):
        (_, (summed, max_logits)), grads = value_and_grad(params, micro, num_targets)
        return (grads, summed), max_logits

    if cfg.train.accumulation == 1:
        return one(jax.tree.map(lambda x: x[0], batch))

    def add(carry, micro):
        total, highest = one(micro)
        return (jax.tree.map(jnp.add, carry[0], total), jax.tree.map(jnp.maximum, carry[1], highest)), None

    # From nothing rather than from the first micro-batch, so that a micro-batch is compiled once.
    total, highest = jax.eval_shape(one, jax.tree.map(lambda x: x[0], batch))
    nothing = (jax.tree.map(_zeros, total), jax.tree.map(lambda x: _zeros(x) - jnp.inf, highest))
    return jax.lax.scan(add, nothing, batch)[0]


def _zeros(shape):
    return jnp.zeros(shape.shape, shape.dtype, out_sharding=shape.sharding)


def train_step(state, batch, *, cfg: RunConfig, tx, rate=None):
    """(new state, metrics). A step whose loss or gradient is not finite changes nothing but its count.

    rate: the learning rate by finished steps, for the metrics alone; that of cfg by default.
    """
    params = state["params"]
    (grads, summed), max_logits = gradients(params, batch, cfg)
    grad_norm = optax.tree.norm(grads)
    # Known before the update, so that every leaf is updated in its place. A check of the update itself, which only a
    # learning rate near float32's end makes infinite, would keep the whole old state beside the new one.
    finite = jnp.isfinite(summed["loss"]) & jnp.isfinite(grad_norm)
    with jax.named_scope("optimizer"):
        updates, opt_state = tx.update(grads, state["opt_state"], params, max_logits=max_logits)
        updated = optax.apply_updates(params, updates)
    update_norm = optax.tree.norm(updates)
    if "load_ME" in summed:
        updated = _balance(updated, summed["load_ME"], cfg.optimizer.router_bias_rate)
    new = {"params": updated, "opt_state": opt_state, "step": state["step"] + 1}
    old = {"params": params, "opt_state": state["opt_state"], "step": state["step"] + 1}
    new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
    new["skipped_in_row"] = jnp.where(finite, 0, state["skipped_in_row"] + 1)
    metrics = _metrics(cfg, summed, max_logits, grad_norm, update_norm, finite, new["skipped_in_row"])
    # The optimizer counts the updates it made: after a skipped step its schedule is one step behind the loop's.
    updates_made = optax.tree.get(state["opt_state"], "count", state["step"])
    metrics |= {"lr": (rate or by_step(cfg))(updates_made)}
    return new, jax.tree.map(sharding.whole, metrics)  # Every process reads them.


def _balance(params, load_ME, rate):
    router = params["moe"]["moe"]["router"]
    router = router | {"bias": update_router_bias(router["bias"], load_ME, rate)}
    return params | {"moe": params["moe"] | {"moe": params["moe"]["moe"] | {"router": router}}}


def _metrics(cfg, summed, max_logits, grad_norm, update_norm, finite, skipped_in_row):
    all_max = jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(max_logits)])
    metrics = {
        "loss": summed["loss"],
        "balance_loss": summed["balance_loss"],
        "grad_norm": grad_norm,
        "update_norm": update_norm,
        "max_logit": all_max.max(),
        "skipped": 1 - finite.astype(jnp.int32),
        "skipped_in_row": skipped_in_row,
        "max_logits": max_logits,
    }
    if "z_loss" in summed:
        metrics["z_loss"] = summed["z_loss"]
    if cfg.optimizer.name == "muonclip":
        metrics["clipped_fraction"] = jnp.mean(all_max > cfg.optimizer.tau)
    if "load_ME" in summed:
        load_ME = summed["load_ME"]
        metrics["expert_load"] = load_ME / jnp.maximum(load_ME.sum(axis=-1, keepdims=True), 1.0)
        metrics["load_max_over_mean"] = jnp.max(metrics["expert_load"].max(axis=-1)) * load_ME.shape[-1]
    return metrics


def held_out_nats(params, batch, *, cfg: RunConfig):
    """(sum of nats, load_ME) over a held-out batch [B, T]."""
    logp_BT, aux = token_logprobs(
        params, cfg.model, batch["tokens"], batch["segment_ids"], targets_BT=batch["targets"],
        chunk=cfg.train.loss_chunk,
    )  # fmt: skip
    return jax.tree.map(sharding.whole, (-jnp.sum(logp_BT * batch["loss_mask"]), aux.expert_load_ME))
