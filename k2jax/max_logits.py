"""Max logits of every head for QK-Clip, for models whose attention does not return them.

Legend: B batch, T queries, S keys, G key heads, R query heads per key head, H = G*R query heads, K head size,
C queries of one chunk.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

PyTree = Any
_QUERY_CHUNK = 128


def max_logits(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    *,
    scale: float,
    causal: bool = True,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """Exact largest logit of every head: max over the batch and unmasked pairs of scale * q.k, signed.

    No [T, S] array exists: queries go in chunks. Carries no gradient. Costs one more QK product.

    Args:
      q_BTHK: queries after rotary embedding, any floating dtype.
      k_BSGK: keys after rotary embedding; H is a multiple of G.
      scale: softmax scale, every constant that multiplies q.k included.
      causal: a query sees its own and earlier positions.
      segment_ids: [B, S] int32; a query sees keys of its own segment only.

    Returns:
      [H] float32.

    Raises:
      ValueError: H is not a multiple of G, or T differs from S under a mask.
    """
    B, T, H, K = q_BTHK.shape
    _, S, G, _ = k_BSGK.shape
    if H % G:
        raise ValueError(f"max_logits: {H} query heads are not a multiple of {G} key heads")
    if (causal or segment_ids is not None) and T != S:
        raise ValueError(f"max_logits: a mask needs as many queries as keys, got {T} and {S}")
    q_BTHK, k_BSGK = lax.stop_gradient((q_BTHK, k_BSGK))
    chunks = -(-T // _QUERY_CHUNK)
    # A short last chunk is filled with the last query again: a maximum does not mind.
    rows = jnp.minimum(jnp.arange(chunks * _QUERY_CHUNK), T - 1).reshape(chunks, -1)

    def chunk_max(rows_C):
        q_BCGRK = q_BTHK[:, rows_C].reshape(B, -1, G, H // G, K)
        logits_BGRCS = jnp.einsum(
            "bcgrk,bsgk->bgrcs",
            q_BCGRK,
            k_BSGK,
            precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        mask_BCS = jnp.ones((1, 1, 1), bool)
        if causal:
            mask_BCS &= rows_C[:, None] >= jnp.arange(S)
        if segment_ids is not None:
            mask_BCS &= segment_ids[:, rows_C, None] == segment_ids[:, None, :]
        return jnp.where(mask_BCS[:, None, None], logits_BGRCS * scale, -jnp.inf).max(axis=(0, 3, 4)).ravel()

    return lax.map(chunk_max, rows).max(axis=0)


def lse_bound(lse: jax.Array, *, head_axis: int = -1) -> jax.Array:
    """A bound on every head's max logit from the log-sum-exp of its softmax rows, for kernels that return only that.

    max logit <= bound <= max logit + log(number of keys). As `max_logits` of an update it therefore never clips too
    little; a head may be clipped although it is up to log(keys) below tau, and end as far below it. Large logits make
    peaked rows, for which the bound is nearly exact.

    Args:
      lse: log-sum-exp of every row, float32, [B, T, H] as `jax.nn.dot_product_attention(return_residual=True)` gives
        it, or any other order of axes. Of the logits that the clip is about: after the scale, natural logarithm.
      head_axis: the axis of H.

    Returns:
      [H] float32, without gradient.
    """
    heads_last = jnp.moveaxis(lax.stop_gradient(lse), head_axis, -1).astype(jnp.float32)
    return heads_last.max(axis=tuple(range(lse.ndim - 1)))


def accumulate_max(tree_a: PyTree, tree_b: PyTree) -> PyTree:
    """Elementwise maximum of two `max_logits` trees: how micro-batches add up (never a sum or a mean)."""
    return jax.tree.map(jnp.maximum, tree_a, tree_b)
