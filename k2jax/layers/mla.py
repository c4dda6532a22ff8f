"""Multi-head latent attention: its projections, as released with Kimi K2 and DeepSeek-V3.

Legend: B batch, T tokens, D model, Q query latent, C key-value latent, H heads, N head part without position,
R rotary part, K = N + R, V value size.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from k2jax import sharding
from k2jax.config import ModelConfig
from k2jax.layers.init import normal
from k2jax.layers.norm import RMSNorm, rms_norm
from k2jax.layers.rope import apply_rope, softmax_scale

# The released modelling file builds the norms of both latents without rms_norm_eps, so they keep its default. K2 has
# the same number everywhere; Moonlight has 1e-5 in its blocks and 1e-6 here.
LATENT_EPS = 1e-6


class MLA(nnx.Module):
    """Low-rank queries (or one query matrix), one latent and one shared rotary key per token, output matrix."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        a, std = cfg.attn, cfg.init_std
        head = a.nope_dim + a.rope_dim
        if a.q_lora_rank is None:
            self.wq = normal(rngs, std, cfg.dim, cfg.num_heads, head)
        else:
            self.wq_a = normal(rngs, std, cfg.dim, a.q_lora_rank)
            self.q_norm = RMSNorm(a.q_lora_rank)
            self.wq_b = normal(rngs, std, a.q_lora_rank, cfg.num_heads, head)
        self.wkv_a = normal(rngs, std, cfg.dim, a.kv_lora_rank + a.rope_dim)
        self.kv_norm = RMSNorm(a.kv_lora_rank)
        self.wkv_b = normal(rngs, std, a.kv_lora_rank, cfg.num_heads, a.nope_dim + a.v_dim)
        self.wo = normal(rngs, std, cfg.num_heads, a.v_dim, cfg.dim)


def mla_qkv(p, x_BTD, positions_BT, cfg: ModelConfig):
    """Queries, keys, values and the softmax scale.

    Queries and keys carry [part without position | rotary part]; the rotary key is one head shared by all and is not
    normalised. Returns (q_BTHK, k_BTHK, v_BTHV, scale).
    """
    with jax.named_scope("mla_qkv"):
        a, dtype = cfg.attn, x_BTD.dtype
        if a.q_lora_rank is None:
            q_BTHK = jnp.einsum("BTD,DHK->BTHK", x_BTD, sharding.weight(p["wq"], dtype))
        else:
            q_BTQ = jnp.einsum("BTD,DQ->BTQ", x_BTD, sharding.weight(p["wq_a"], dtype))
            q_BTQ = rms_norm(p["q_norm"], q_BTQ, LATENT_EPS)
            q_BTHK = jnp.einsum("BTQ,QHK->BTHK", q_BTQ, sharding.weight(p["wq_b"], dtype))
        q_BTHN, q_BTHR = jnp.split(q_BTHK, [a.nope_dim], axis=-1)
        q_BTHK = jnp.concatenate([q_BTHN, apply_rope(q_BTHR, positions_BT, cfg.rope)], axis=-1)

        latent = jnp.einsum("BTD,DC->BTC", x_BTD, sharding.weight(p["wkv_a"], dtype))
        c_BTC, k_BTR = jnp.split(latent, [a.kv_lora_rank], axis=-1)
        c_BTC = rms_norm(p["kv_norm"], c_BTC, LATENT_EPS)
        kv = jnp.einsum("BTC,CHK->BTHK", c_BTC, sharding.weight(p["wkv_b"], dtype))
        k_BTHN, v_BTHV = jnp.split(kv, [a.nope_dim], axis=-1)
        k_BT1R = apply_rope(k_BTR[:, :, None], positions_BT, cfg.rope)
        k_BTHR = sharding.like(jnp.broadcast_to(k_BT1R, (*k_BTHN.shape[:3], a.rope_dim)), k_BTHN)
        k_BTHK = jnp.concatenate([k_BTHN, k_BTHR], axis=-1)
        return q_BTHK, k_BTHK, v_BTHV, softmax_scale(a.nope_dim + a.rope_dim, cfg.rope)
