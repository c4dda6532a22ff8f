"""Grouped-query and multi-head attention: the projections of the MoBA paper's models.

Legend: B batch, T tokens, D model, H query heads, G key heads, K head size.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from k2jax import sharding
from k2jax.config import ModelConfig
from k2jax.layers.init import normal
from k2jax.layers.rope import apply_rope, softmax_scale


class GQA(nnx.Module):
    """Query, key, value and output matrices."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        a, std = cfg.attn, cfg.init_std
        self.wq = normal(rngs, std, cfg.dim, cfg.num_heads, a.head_dim)
        self.wk = normal(rngs, std, cfg.dim, a.num_kv_heads, a.head_dim)
        self.wv = normal(rngs, std, cfg.dim, a.num_kv_heads, a.head_dim)
        self.wo = normal(rngs, std, cfg.num_heads, a.head_dim, cfg.dim)


def gqa_qkv(p, x_BTD, positions_BT, cfg: ModelConfig):
    """Queries, keys (both with rotary positions over the whole head), values and the softmax scale."""
    with jax.named_scope("gqa_qkv"):
        dtype = x_BTD.dtype
        q_BTHK = jnp.einsum("BTD,DHK->BTHK", x_BTD, sharding.weight(p["wq"], dtype))
        k_BTGK = jnp.einsum("BTD,DGK->BTGK", x_BTD, sharding.weight(p["wk"], dtype))
        v_BTGK = jnp.einsum("BTD,DGK->BTGK", x_BTD, sharding.weight(p["wv"], dtype))
        q_BTHK = apply_rope(q_BTHK, positions_BT, cfg.rope)
        k_BTGK = apply_rope(k_BTGK, positions_BT, cfg.rope)
        return q_BTHK, k_BTGK, v_BTGK, softmax_scale(cfg.attn.head_dim, cfg.rope)
