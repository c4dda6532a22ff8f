"""Segments and positions along the keys, for every implementation of full attention and of MoBA.

Legend: B batch (or 1 where all rows are alike), T queries, S keys.
"""

import jax
import jax.numpy as jnp


def segment_starts(segment_ids):
    """The first position of each token's segment, a run of equal ids: int32 [B, S]."""
    position_S = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    is_first_BS = segment_ids[:, 1:] != segment_ids[:, :-1]
    is_first_BS = jnp.pad(is_first_BS, ((0, 0), (1, 0)), constant_values=True)
    return jax.lax.cummax(jnp.where(is_first_BS, position_S, 0), axis=1)


def at_positions(x_BS, position_BT):
    """x at each position, its last value for those behind it; either side may have a batch of 1."""
    batch = max(x_BS.shape[0], position_BT.shape[0])
    x_BS = jnp.broadcast_to(x_BS, (batch, x_BS.shape[1]))
    position_BT = jnp.broadcast_to(position_BT, (batch, position_BT.shape[1]))
    return jnp.take_along_axis(x_BS, jnp.minimum(position_BT, x_BS.shape[1] - 1), axis=1)
