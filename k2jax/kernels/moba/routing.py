"""Which earlier blocks each query reads, and a place in a tile of equal-block queries for each (query, block)
pair.

Only a complete block followed by a token of its own segment can be an earlier block of anything, so there are
at most (S - 1) // C of them however the row is packed: the static bound that jit needs. They are numbered
from 0 along the row ("history blocks"), and the candidates of one query are a contiguous range of them.

A row is one query of one query head; the R heads of a key head share its blocks, hence its tiles: row = t * R
+ r.

Legend: B batch (or 1 where all rows are alike), T queries, S keys, G key heads, R query heads per key head, X
= B * G, M rows (queries, padded, times R), N history blocks, C block size, J = earlier blocks per row, L rows
of a tile, Y tiles, P = Y * L places, K query/key size.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from k2jax.kernels.attention.positions import at_positions
from k2jax.kernels.moba.blocks import choose

# Scores held at once, over batch, heads, rows and blocks: 2**24 float32 are 64 MiB.
GATE_SCORES, MIN_CHUNK = 2**24, 64


class History(NamedTuple):
    """Start and row-wide number of each history block; those past a row's last one repeat position 0,
    unreachable.
    """

    start_BN: jax.Array
    block_id_BN: jax.Array


class Pairs(NamedTuple):
    """The history blocks that each row chose (-1: none), best first, and its rank among the rows of each such
    block.
    """

    block_XMJ: jax.Array
    rank_XMJ: jax.Array
    size_XN: jax.Array  # the rows of each block


class Tiles(NamedTuple):
    """Rows sorted by block into tiles of L, each against one block; M and P stand for 'none'."""

    place_XMJ: jax.Array  # where each pair's row is, P where the row has no such pair
    row_XP: jax.Array  # the row at each place, M where the place is empty
    block_XY: jax.Array  # the history block of each tile, rising


def history_blocks(where, segment_ids, S, C):
    """The history blocks of each row of the batch, and for each key its segment's first and the count before
    its own.
    """
    N = (S - 1) // C
    count_BS = (where.block_start_BS - where.segment_start_BS) // C
    if segment_ids is None:
        block_1N = jnp.arange(N, dtype=jnp.int32)[None]
        return History(block_1N * C, block_1N), jnp.zeros_like(count_BS), count_BS
    position_S = jnp.arange(S, dtype=jnp.int32)
    segment_later_BS = jnp.pad(where.segment_start_BS[:, C:], ((0, 0), (0, C)), constant_values=-1)[:, :S]
    is_history_BS = (where.block_start_BS == position_S) & (segment_later_BS == where.segment_start_BS)
    before_BS = jnp.cumsum(is_history_BS, axis=1, dtype=jnp.int32) - is_history_BS
    place_BS = jnp.where(is_history_BS, before_BS, N)
    put = jax.vmap(lambda place_S: jnp.zeros(N, jnp.int32).at[place_S].set(position_S, mode="drop"))
    start_BN = put(place_BS)
    history = History(start_BN, jnp.take_along_axis(where.block_id_BS, start_BN, axis=1))
    return history, at_positions(before_BS, where.segment_start_BS), count_BS


def choose_blocks(q_XMK, mean_key_XNK, first_XM, count_XM, J):
    """The J best history blocks of each row among `first .. first + count - 1`.

    Works on chunks of rows, so that only the winners are kept of the scores. The ranks are those of a
    counting sort: the running count, in the order of the rows.
    """
    (X, M, _), N = q_XMK.shape, mean_key_XNK.shape[1]
    chunk = min(M, max(MIN_CHUNK, GATE_SCORES // (X * N)))
    chunks = -(-M // chunk)

    def split(x_XM):
        x_XM = jnp.pad(x_XM, ((0, 0), (0, chunks * chunk - M)) + ((0, 0),) * (x_XM.ndim - 2))
        return jnp.moveaxis(x_XM.reshape(x_XM.shape[0], chunks, chunk, *x_XM.shape[2:]), 1, 0)

    def join(x_AXMJ):
        return jnp.moveaxis(x_AXMJ, 0, 1).reshape(X, chunks * chunk, J)[:, :M]

    def one_chunk(xs):
        q_XMK, first_XM, count_XM = xs
        score_XMN = jnp.einsum(
            "xmk,xnk->xmn",
            q_XMK.astype(jnp.float32),
            mean_key_XNK.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        block_N = jnp.arange(N)
        candidate_XMN = (block_N >= first_XM[..., None]) & (block_N < (first_XM + count_XM)[..., None])
        winner_XMJ = choose(score_XMN, candidate_XMN, J)
        chosen_XMN = jnp.any(winner_XMJ[..., None] == block_N, axis=-2)
        running_XMN = jnp.cumsum(chosen_XMN, axis=1, dtype=jnp.int32)
        rank_XMJ = jnp.take_along_axis(running_XMN, jnp.maximum(winner_XMJ, 0), axis=-1) - 1
        return winner_XMJ, rank_XMJ, running_XMN[:, -1]

    winner_AXMJ, rank_AXMJ, size_AXN = map_steps(one_chunk, (split(q_XMK), split(first_XM), split(count_XM)))
    before_AXN = jnp.cumsum(size_AXN, axis=0) - size_AXN
    base_AXMJ = jax.vmap(jax.vmap(lambda before_N, winner_MJ: before_N[winner_MJ]))(
        before_AXN, jnp.maximum(winner_AXMJ, 0)
    )
    return Pairs(join(winner_AXMJ), join(rank_AXMJ + base_AXMJ), jnp.sum(size_AXN, axis=0))


def pack_tiles(pairs, L, Y):
    """Gives every pair a place: the blocks in order, each in as few tiles of L rows as hold it."""
    M, N = pairs.block_XMJ.shape[1], pairs.size_XN.shape[1]
    tiles_XN = -(-pairs.size_XN // L)
    end_XN = jnp.cumsum(tiles_XN, axis=1)

    def pack(winner_MJ, rank_MJ, first_N, end_N):
        place_MJ = jnp.where(winner_MJ < 0, Y * L, first_N[winner_MJ] * L + rank_MJ)
        row_MJ = jnp.broadcast_to(jnp.arange(M, dtype=jnp.int32)[:, None], place_MJ.shape)
        row_P = jnp.full((Y * L,), M, jnp.int32).at[place_MJ].set(row_MJ, mode="drop")
        block_Y = jnp.searchsorted(end_N, jnp.arange(Y), side="right")
        return Tiles(place_MJ, row_P, jnp.minimum(block_Y, N - 1).astype(jnp.int32))

    return jax.vmap(pack)(pairs.block_XMJ, pairs.rank_XMJ, end_XN - tiles_XN, end_XN)


def map_steps(function, xs):
    """lax.map, without the loop where there is one step."""
    if jax.tree.leaves(xs)[0].shape[0] == 1:
        return jax.tree.map(lambda x: x[None], function(jax.tree.map(lambda x: x[0], xs)))
    return jax.lax.map(function, xs)
