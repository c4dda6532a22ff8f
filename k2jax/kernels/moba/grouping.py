"""Sorts (row, chosen block) pairs by block and cuts each block's rows into tiles: what the Hopper kernels walk over.

One stable sort of a 32-bit key does it for all heads at once; everything else is arithmetic on the sorted order. A tile
is `L` places with rows of one block, and the tiles of all blocks lie one after the other, so their number is bounded by
the pairs plus one incomplete tile per block.

Legend: X batch * key heads, M rows (queries times query heads per key head), J chosen earlier blocks per row, D blocks
per head, Z = X * D blocks, I = X * J * M pairs, L rows of a tile, Y tiles, P = Y * L places.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Groups(NamedTuple):
    """Where every pair's row lies among the tiles."""

    place_XJM: jax.Array  # of each pair, P where the row has no such pair
    row_P: jax.Array  # the row x * M + m at each place, -1 where the place is empty
    block_Y: jax.Array  # of each tile, x * D + n; of those past the last one: meaningless
    used_1: jax.Array  # how many tiles there are
    span_Z2: jax.Array  # of each block, its first place and its number of rows


def num_tiles(num_pairs: int, num_blocks: int, L: int) -> int:
    """The most tiles of L rows that so many pairs over so many blocks can need."""
    return (num_pairs + num_blocks * (L - 1)) // L


def group(winner_XJM, num_blocks: int, L: int, Y: int) -> Groups:
    """Groups rows by the block that they chose.

    Args:
      winner_XJM: int32 block of each pair, -1 for none.
      num_blocks: D.
      L: rows of a tile.
      Y: tiles; at least `num_tiles` of the pairs that are not -1.
    """
    X, J, M = winner_XJM.shape
    Z, P = X * num_blocks, Y * L
    head_X11 = jnp.arange(X, dtype=jnp.int32)[:, None, None]
    key_I = jnp.where(winner_XJM < 0, Z, head_X11 * num_blocks + winner_XJM).reshape(-1)
    key_I, pair_I = jax.lax.sort((key_I, jnp.arange(key_I.size, dtype=jnp.int32)), num_keys=1, is_stable=True)
    start_Z1 = jnp.searchsorted(key_I, jnp.arange(Z + 1, dtype=jnp.int32)).astype(jnp.int32)
    start_Z, size_Z = start_Z1[:-1], jnp.diff(start_Z1)
    tiles_Z = -(-size_Z // L)
    end_Z = jnp.cumsum(tiles_Z, dtype=jnp.int32)
    first_place_Z = (end_Z - tiles_Z) * L

    # The pair at place i of the sorted order lies as far behind its block's first place as behind its block's start.
    shift_Z = first_place_Z - start_Z
    place_I = jnp.where(key_I < Z, jnp.arange(key_I.size, dtype=jnp.int32) + shift_Z[jnp.minimum(key_I, Z - 1)], P)
    place_I = jnp.zeros_like(place_I).at[pair_I].set(place_I, unique_indices=True)

    block_Y = jnp.minimum(jnp.searchsorted(end_Z, jnp.arange(Y), side="right"), Z - 1).astype(jnp.int32)
    block_P = jnp.broadcast_to(block_Y[:, None], (Y, L)).reshape(P)
    order_P = jnp.arange(P, dtype=jnp.int32) - shift_Z[block_P]
    pair_P = pair_I[jnp.minimum(order_P, key_I.size - 1)]
    row_P = pair_P // (J * M) * M + pair_P % M
    row_P = jnp.where(order_P < start_Z[block_P] + size_Z[block_P], row_P, -1)
    return Groups(place_I.reshape(X, J, M), row_P, block_Y, end_Z[-1:], jnp.stack([first_place_Z, size_Z], axis=1))
