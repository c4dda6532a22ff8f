"""Attention as written in the book: all T x S logits at once.

Legend: B batch, T queries, S keys, H query heads, G key heads, R = H // G query heads per key head,
K query/key size, V value size.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Attended(NamedTuple):
    """The output, and two statistics of the logits that carry no gradient (float32)."""

    out_BTHV: jax.Array
    lse_BHT: jax.Array
    max_logit_BH: jax.Array


def attention(q_BTHK, k_BSGK, v_BSGV, *, scale, segment_ids=None, q_offset=0):
    """Causal attention with T x S logits in memory; arguments as in `k2jax.kernels.attention.attention`."""
    position_BT = query_positions(q_BTHK, q_offset)
    return masked_attention(q_BTHK, k_BSGK, v_BSGV, causal_mask(position_BT, k_BSGK.shape[1], segment_ids), scale)


def query_positions(q_BTHK, q_offset):
    """The position of every query among the keys, int32 [B, T], or [1, T] where all rows share it."""
    return jnp.reshape(jnp.asarray(q_offset, jnp.int32), (-1, 1)) + jnp.arange(q_BTHK.shape[1], dtype=jnp.int32)


def causal_mask(position_BT, S, segment_ids=None):
    """True where the query at `position_BT` may look: not later than itself, and in its own segment."""
    mask_BTS = jnp.arange(S) <= position_BT[:, :, None]
    if segment_ids is not None:
        position_BT = jnp.broadcast_to(position_BT, (segment_ids.shape[0], position_BT.shape[1]))
        query_segment_BT = jnp.take_along_axis(segment_ids, position_BT, axis=1)
        mask_BTS = mask_BTS & (query_segment_BT[:, :, None] == segment_ids[:, None, :])
    return mask_BTS


def masked_attention(q_BTHK, k_BSGK, v_BSGV, mask, scale):
    """Attention over the True pairs of `mask` ([B|1, T, S], or [B, T, H, S]); every row must have one."""
    (B, T, H, K), G = q_BTHK.shape, k_BSGK.shape[2]
    q_BTGRK = q_BTHK.reshape(B, T, G, H // G, K)
    logits_BGRTS = scale * jnp.einsum("btgrk,bsgk->bgrts", q_BTGRK, k_BSGK, preferred_element_type=jnp.float32)
    if mask.ndim == 3:
        mask_BGRTS = mask[:, None, None]
    else:
        mask_BGRTS = mask.transpose(0, 2, 1, 3).reshape(B, G, H // G, T, -1)
    logits_BGRTS = jnp.where(mask_BGRTS, logits_BGRTS, -jnp.inf)
    max_BGRT = jax.lax.stop_gradient(jnp.max(logits_BGRTS, axis=-1))
    weight_BGRTS = jnp.exp(logits_BGRTS - max_BGRT[..., None])
    sum_BGRT = jnp.sum(weight_BGRTS, axis=-1)
    out_BTGRV = jnp.einsum(
        "bgrts,bsgv->btgrv", weight_BGRTS.astype(v_BSGV.dtype), v_BSGV, preferred_element_type=jnp.float32
    )
    out_BTGRV = out_BTGRV / sum_BGRT.transpose(0, 3, 1, 2)[..., None]
    return Attended(
        out_BTGRV.reshape(B, T, H, -1).astype(v_BSGV.dtype),
        jax.lax.stop_gradient(max_BGRT + jnp.log(sum_BGRT)).reshape(B, H, T),
        jnp.max(max_BGRT, axis=-1).reshape(B, H),
    )
