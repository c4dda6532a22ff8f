"""Sorts (query, chosen block) pairs by block and cuts each block's queries into tiles, as the Hopper kernels walk them.

One stable sort of a 32-bit key does it for all heads at once; everything else is arithmetic on the sorted order. A tile
is `L` places with queries of one block, and the tiles of all blocks lie one after the other, so their number is bounded
by the pairs plus one incomplete tile per block.

Legend: B batch, T queries, H query heads, G key heads, J chosen earlier blocks per query, D blocks per key head,
Z = B * G * D blocks, I = B * H * J * T pairs, L rows of a tile, Y tiles, P = Y * L places.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Groups(NamedTuple):
    """Where every pair's query lies among the tiles."""

    place_BHJT: jax.Array  # of each pair, P where the query has no such pair
    row_P: jax.Array  # the query (b * H + h) * T + t at each place, -1 where the place is empty
    block_Y: jax.Array  # of each tile, (b * G + g) * D + n; of those past the last one: meaningless
    used_1: jax.Array  # how many tiles there are
    span_Z2: jax.Array  # of each block, its first place and its number of queries


def num_tiles(num_pairs: int, num_blocks: int, L: int) -> int:
    """The most tiles of L rows that so many pairs over so many blocks can need."""
    return (num_pairs + num_blocks * (L - 1)) // L


def group(winner_BHJT, heads_per_key: int, num_blocks: int, L: int, Y: int) -> Groups:
    """Groups queries by the block that they chose.

    Args:
      winner_BHJT: int32 block of each pair, -1 for none.
      heads_per_key: H // G.
      num_blocks: D.
      L: rows of a tile.
      Y: tiles; at least `num_tiles` of the pairs that are not -1.
    """
    B, H, J, T = winner_BHJT.shape
    Z, P = B * H // heads_per_key * num_blocks, Y * L
    key_head_BH = jnp.arange(B * H, dtype=jnp.int32).reshape(B, H) // heads_per_key
    key_I = jnp.where(winner_BHJT < 0, Z, key_head_BH[..., None, None] * num_blocks + winner_BHJT).reshape(-1)
    key_I, pair_I = jax.lax.sort((key_I, jnp.arange(key_I.size, dtype=jnp.int32)), num_keys=1, is_stable=True)
    start_Z1 = search(key_I, jnp.arange(Z + 1, dtype=jnp.int32))
    start_Z, size_Z = start_Z1[:-1], jnp.diff(start_Z1)
    tiles_Z = -(-size_Z // L)
    end_Z = jnp.cumsum(tiles_Z, dtype=jnp.int32)
    first_place_Z = (end_Z - tiles_Z) * L

    # The pair at place i of the sorted order lies as far behind its block's first place as behind its block's start.
    shift_Z = first_place_Z - start_Z
    place_I = jnp.where(key_I < Z, jnp.arange(key_I.size, dtype=jnp.int32) + shift_Z[jnp.minimum(key_I, Z - 1)], P)
    place_I = jnp.zeros_like(place_I).at[pair_I].set(place_I, unique_indices=True)

    block_Y = jnp.minimum(search(end_Z, jnp.arange(Y, dtype=jnp.int32), side="right"), Z - 1)
    block_P = jnp.broadcast_to(block_Y[:, None], (Y, L)).reshape(P)
    order_P = jnp.arange(P, dtype=jnp.int32) - shift_Z[block_P]
    pair_P = pair_I[jnp.minimum(order_P, key_I.size - 1)]
    row_P = pair_P // (J * T) * T + pair_P % T
    row_P = jnp.where(order_P < start_Z[block_P] + size_Z[block_P], row_P, -1)
    span_Z2 = jnp.stack([first_place_Z, size_Z], axis=1)
    return Groups(place_I.reshape(B, H, J, T), row_P, block_Y, end_Z[-1:], span_Z2)


def search(sorted_N, x, side="left"):
    """`jnp.searchsorted` in int32, as one kernel of a GPU; as a loop it is several for each step, 0.4 ms in all."""
    return jnp.searchsorted(sorted_N, x, side=side, method="scan_unrolled").astype(jnp.int32)
