"""Where blocks begin, what a query may choose, and the choice: shared by every implementation of MoBA.

Blocks are cut from the first token of each segment (a run of equal segment ids) and never cross into the next
one; a row without segment ids is one segment. Blocks are numbered from 0 along the row, over all its
segments.

Legend: B batch (or 1 where all rows are alike), T queries, S keys, N blocks, J = top_k.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from k2jax.kernels.attention.positions import segment_starts


class Layout(NamedTuple):
    """Of each key: the first position of its segment and of its block, and its block's number (int32)."""

    segment_start_BS: jax.Array
    block_start_BS: jax.Array
    block_id_BS: jax.Array


class Residuals(NamedTuple):
    """What MoBA knows beside its output; none of it carries a gradient.

    lse_BHT: log of the softmax's denominator over the selected tokens, float32, natural log, after `scale`.
    max_logit_BH: largest logit of each head over the selected, causal pairs, float32, signed, after `scale`.
    selected_BHTJ: int32 block numbers (from 0 along the row, over all segments): slot 0 is the query's own
      block, slots 1.. the chosen earlier blocks by falling gate score, -1 where there were fewer than top_k -
      1 of them.
    """

    lse_BHT: jax.Array
    max_logit_BH: jax.Array
    selected_BHTJ: jax.Array


class Attended(NamedTuple):
    """The output of MoBA with its residuals."""

    out_BTHV: jax.Array
    residuals: Residuals


def layout(segment_ids, S, block_size):
    """Cuts a row of S keys into blocks; without segment ids the batch dimension of the result is 1."""
    position_S = jnp.arange(S, dtype=jnp.int32)
    if segment_ids is None:
        block_S = position_S // block_size
        return Layout(jnp.zeros((1, S), jnp.int32), (block_S * block_size)[None], block_S[None])
    segment_start_BS = segment_starts(segment_ids)
    block_start_BS = position_S - (position_S - segment_start_BS) % block_size
    block_id_BS = jnp.cumsum(block_start_BS == position_S, axis=1, dtype=jnp.int32) - 1
    return Layout(segment_start_BS, block_start_BS, block_id_BS)


def choose(score_N, candidate_N, count):
    """The `count` best candidates along the last axis, best first, the LOWEST block winning a tie; -1 where
    none is left.

    Passes of argmax, because `lax.top_k` sorts all blocks to find a few, at many times the cost.
    """
    score_N = jnp.where(candidate_N, score_N, -jnp.inf)
    winners = []
    for _ in range(count):
        best = jnp.argmax(score_N, axis=-1).astype(jnp.int32)
        found = jnp.max(score_N, axis=-1) > -jnp.inf
        winners.append(jnp.where(found, best, -1))
        score_N = jnp.where(jnp.arange(score_N.shape[-1]) == best[..., None], -jnp.inf, score_N)
    return jnp.stack(winners, axis=-1) if winners else jnp.zeros((*score_N.shape[:-1], 0), jnp.int32)
