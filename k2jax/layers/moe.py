"""Mixture of experts: router, routed experts, shared experts.

Legend: B batch, T tokens, D model, E experts, F expert hidden size, J experts per token, N = B * T, R rows in
expert order.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from k2jax import sharding
from k2jax.config import ModelConfig, MoEConfig
from k2jax.kernels.grouped_matmul import grouped_matmul
from k2jax.kernels.partition import mesh_axes, over_mesh
from k2jax.layers.dispatch import from_experts, plan_dispatch, to_experts
from k2jax.layers.init import normal
from k2jax.layers.mlp import MLP, mlp
from k2jax.layers.router import Router, balance_loss, route


class Experts(nnx.Module):
    """The routed experts' SwiGLU matrices, one after the other."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        e, d, f, std = cfg.moe.num_experts, cfg.dim, cfg.moe.expert_dim, cfg.init_std
        self.w_gate = normal(rngs, std, e, d, f)
        self.w_up = normal(rngs, std, e, d, f)
        self.w_down = normal(rngs, std, e, f, d)


class MoE(nnx.Module):
    """Router, routed experts and, as one wider MLP, the shared experts."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.router = Router(cfg.dim, cfg.moe.num_experts, cfg.init_std, rngs)
        self.experts = Experts(cfg, rngs)
        if cfg.moe.num_shared:
            self.shared = MLP(cfg.dim, cfg.moe.num_shared * cfg.moe.expert_dim, cfg.init_std, rngs)


class MoEStats(NamedTuple):
    """load_E: routed assignments of each expert, without padding tokens. balance_loss: mean over the sequences."""

    load_E: jax.Array
    balance_loss: jax.Array
    routing_BTJ: jax.Array


def moe(p, x_BTD, valid_BT, cfg: MoEConfig, pinned_BTJ=None):
    """Weighted sum of the chosen experts plus the shared experts, which are not scaled.

    valid_BT: false for padding tokens, which are computed but count in no statistic.
    Returns (y_BTD, MoEStats).
    """
    with jax.named_scope("moe"):
        ids_BTJ, weights_BTJ, scores_BTE = route(p["router"], x_BTD, cfg, pinned_BTJ)
        y_BTD = run_experts(p["experts"], x_BTD, ids_BTJ, weights_BTJ, cfg)
        if cfg.num_shared:
            y_BTD = y_BTD + mlp(p["shared"], x_BTD)
        loss = balance_loss(scores_BTE, ids_BTJ, valid_BT) / x_BTD.shape[0]
        return y_BTD, MoEStats(expert_load(ids_BTJ, valid_BT, cfg.num_experts), loss, ids_BTJ)


def expert_load(ids_BTJ, valid_BT, num_experts: int):
    """Assignments of each expert by valid tokens, float32 [E], counted in integers."""
    chosen_BTJE = (ids_BTJ[..., None] == jnp.arange(num_experts)) & valid_BT[..., None, None]
    return chosen_BTJE.sum(axis=(0, 1, 2), dtype=jnp.int32).astype(jnp.float32)


def run_experts(p, x_BTD, ids_BTJ, weights_BTJ, cfg: MoEConfig):
    """Weighted sum of the chosen experts [B, T, D].

    On a mesh that cuts the experts, cfg.dispatch says what moves: 'gather' brings the tokens of all devices that share
    the experts to each of them, which computes its own experts' part; 'local' brings all experts to every device.
    """
    with jax.named_scope("experts"):
        w = {name: sharding.weight(leaf, x_BTD.dtype) for name, leaf in p.items()}
        if cfg.dispatch == "local":
            w = {name: sharding.whole(leaf, 0) for name, leaf in w.items()}
        arrays = {"x_BTD": x_BTD, "ids_BTJ": ids_BTJ, "weights_BTJ": weights_BTJ}
        arrays |= {"w_gate_EDF": w["w_gate"], "w_up_EDF": w["w_up"], "w_down_EFD": w["w_down"]}
        axes = mesh_axes(arrays)
        local = partial(_experts_here, axes=axes, num_experts=cfg.num_experts)
        return over_mesh(local, arrays, "BTD", axes)


def _experts_here(x_BTD, ids_BTJ, weights_BTJ, w_gate_EDF, w_up_EDF, w_down_EFD, *, axes, num_experts):
    """One device's experts over the tokens that may need them; the parts of a sum are added up in float32."""
    experts, batch = axes.get("E", ()), axes.get("B", ())
    shared = tuple(axis for axis in experts if axis in batch)  # these devices hold other tokens and other experts
    summed = axes.get("F", ()) + tuple(axis for axis in experts if axis not in batch)
    tokens = (x_BTD, ids_BTJ, weights_BTJ)
    if shared:
        tokens = jax.tree.map(lambda x: jax.lax.all_gather(x, shared, axis=0, tiled=True), tokens)
    x_BTD, ids_BTJ, weights_BTJ = tokens
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    ids_NJ, weights_NJ = (x.reshape(x_ND.shape[0], -1) for x in (ids_BTJ, weights_BTJ))
    here = w_gate_EDF.shape[0]
    first = jax.lax.axis_index(experts) * here if experts else 0
    plan = plan_dispatch(ids_NJ - first, here, always_here=here == num_experts)
    x_RD = to_experts(x_ND, plan)
    gate_RF = grouped_matmul(x_RD, w_gate_EDF, plan.sizes_E)
    up_RF = grouped_matmul(x_RD, w_up_EDF, plan.sizes_E)
    y_RD = grouped_matmul(jax.nn.silu(gate_RF) * up_RF, w_down_EFD, plan.sizes_E)
    y_BTD = from_experts(y_RD, weights_NJ, plan).reshape(x_BTD.shape)
    if summed:
        y_BTD = jax.lax.psum(y_BTD, summed)
    if shared:
        y_BTD = jax.lax.psum_scatter(y_BTD, shared, scatter_dimension=0, tiled=True)
    return y_BTD.astype(x_BTD.dtype)
