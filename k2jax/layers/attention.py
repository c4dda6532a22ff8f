"""Self-attention of a block: projections, full attention or MoBA over them, output matrix.

Legend: B batch, T tokens, D model, H query heads, G key heads, K query/key size, V value size, J blocks per query.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from k2jax import sharding
from k2jax.config import GQAConfig, MLAConfig, ModelConfig
from k2jax.kernels.attention import attention
from k2jax.layers.gqa import GQA, gqa_qkv
from k2jax.layers.mla import MLA, mla_qkv
from k2jax.moba_pallas import moba_attention

PROJECTIONS = {MLAConfig: (MLA, mla_qkv), GQAConfig: (GQA, gqa_qkv)}


class AttentionStats(NamedTuple):
    """max_logit_H: over the batch, float32, no gradient; selected_BHTJ: MoBA's blocks. None where not asked for."""

    max_logit_H: jax.Array | None
    selected_BHTJ: jax.Array | None


def make_attention(cfg: ModelConfig, rngs: nnx.Rngs) -> nnx.Module:
    """The projections that cfg.attn names. They are the same under full attention and MoBA."""
    return PROJECTIONS[type(cfg.attn)][0](cfg, rngs)


def self_attention(p, x_BTD, positions_BT, segment_ids_BT, kind, cfg: ModelConfig, *, max_logits, selections):
    """Causal attention of every token to its own document.

    kind: 'full' or 'moba'. max_logits, selections: whether the stats hold them.
    Returns (y_BTD, AttentionStats).
    """
    with jax.named_scope(f"attention_{kind}"):
        q_BTHK, k_BTGK, v_BTGV, scale = PROJECTIONS[type(cfg.attn)][1](p, x_BTD, positions_BT, cfg)
        attend = {"full": _full, "moba": _moba}[kind]
        y_BTHV, max_logit_BH, selected_BHTJ = attend(
            (q_BTHK, k_BTGK, v_BTGV), segment_ids_BT, scale, cfg, max_logits, selections
        )
        # Every device needs every head's maximum to clip its part of the weights.
        max_logit_H = sharding.whole(max_logit_BH.max(axis=0)) if max_logits else None
        w_HVD = sharding.weight(p["wo"], x_BTD.dtype)
        y_BTD = jnp.einsum("BTHV,HVD->BTD", y_BTHV, w_HVD, out_sharding=sharding.layout(x_BTD))
        return y_BTD, AttentionStats(max_logit_H, selected_BHTJ)


def _full(qkv, segment_ids, scale, cfg, max_logits, selections):
    result = attention(*qkv, scale=scale, segment_ids=segment_ids, max_logits=max_logits)
    y_BTHV, max_logit_BH = result if max_logits else (result, None)
    return y_BTHV, max_logit_BH, None


def _moba(qkv, segment_ids, scale, cfg, max_logits, selections):
    result = moba_attention(
        *qkv,
        block_size=cfg.moba.block_size,
        top_k=cfg.moba.top_k,
        scale=scale,
        segment_ids=segment_ids,
        return_residuals=max_logits or selections,
    )
    if not (max_logits or selections):
        return result, None, None
    y_BTHV, residuals = result
    return y_BTHV, residuals.max_logit_BH, residuals.selected_BHTJ if selections else None
