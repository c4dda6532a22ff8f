"""MoBA in plain JAX with memory by S x top_k: for training on any platform.

This file cuts queries, keys and values into the shapes on which `routing.py` chooses and `streams.py`
computes, and puts the results back; autodiff takes care of the cuts.

Legend: B batch, T queries, S keys, H query heads, G key heads, R = H // G, X = B * G, C block size, D chunks
of C queries, M = D * C * R rows, N history blocks, J history blocks per row, L rows of a tile, Y tiles, K
query/key size, V value size, E either of K and V.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from k2jax.kernels.attention.positions import at_positions
from k2jax.kernels.attention.reference import query_positions
from k2jax.kernels.moba.blocks import Attended, Residuals, layout
from k2jax.kernels.moba.routing import Pairs, choose_blocks, history_blocks, pack_tiles
from k2jax.kernels.moba.streams import Sizes, joined_attention, working_set

MAX_TILE, MIN_TILE = 128, 16


def moba_attention(q_BTHK, k_BSGK, v_BSGV, *, block_size, top_k, scale, segment_ids=None, q_offset=0):
    """MoBA with S x top_k memory; arguments as in `k2jax.moba_pallas.moba_attention`."""
    B, T = q_BTHK.shape[:2]
    sizes = _sizes(q_BTHK.shape, k_BSGK.shape, block_size, top_k, segment_ids is not None, q_offset)
    routes = _route(q_BTHK, k_BSGK, sizes, top_k, segment_ids, q_offset)
    out_XMV, lse_XM, max_XM = joined_attention(
        float(scale),
        sizes,
        _rows(q_BTHK, sizes),
        _near(k_BSGK, sizes, q_offset),
        _near(v_BSGV, sizes, q_offset),
        _far(k_BSGK, sizes, routes.start_BN, segment_ids),
        _far(v_BSGV, sizes, routes.start_BN, segment_ids),
        routes.inside_XM,
        pack_tiles(routes.pairs, sizes.L, sizes.Y) if sizes.J else None,
    )
    lse_BTH, max_BTH = _unrow(lse_XM, B, T, sizes), _unrow(max_XM, B, T, sizes)
    residuals = Residuals(lse_BTH.transpose(0, 2, 1), jnp.max(max_BTH, axis=1), routes.selected_BHTJ)
    return Attended(_unrow(out_XMV, B, T, sizes), residuals)


def select(q_BTHK, k_BSGK, *, block_size, top_k, segment_ids=None, q_offset=0):
    """The choice alone: `Residuals.selected_BHTJ`."""
    sizes = _sizes(q_BTHK.shape, k_BSGK.shape, block_size, top_k, segment_ids is not None, q_offset)
    return _route(q_BTHK, k_BSGK, sizes, top_k, segment_ids, q_offset).selected_BHTJ


def working_numbers(q_shape, k_shape, v_shape, block_size, top_k, segmented, q_offset):
    """An estimate of the numbers of 32 bits that forward and backward hold beyond inputs and outputs."""
    sizes = _sizes(q_shape, k_shape, block_size, top_k, segmented, q_offset)
    return working_set(sizes, q_shape[0] * k_shape[2], q_shape[3], v_shape[3])


def _sizes(q_shape, k_shape, block_size, top_k, segmented, q_offset):
    """The static sizes of one call. Padding costs at most L - 1 places per block, so tiles get smaller with
    blocks.
    """
    (_, T, H, _), (_, S, G, _) = q_shape, k_shape
    C, R = min(block_size, S), H // G
    N = (S - 1) // C
    J = min(top_k - 1, N)
    static = isinstance(q_offset, int)
    pairs = R * (int(np.minimum(J, (q_offset + np.arange(T)) // C).sum()) if static else T * J)
    L = min(MAX_TILE, max(MIN_TILE, 1 << (max(pairs // max(N, 1), 2).bit_length() - 2)))
    aligned = not segmented and static and q_offset % C == 0
    return Sizes(C=C, D=-(-T // C), R=R, W=C if aligned else 2 * C, N=N, J=J, L=L, Y=(pairs + N * (L - 1)) // L)


class Routes(NamedTuple):
    """What every row reads: its place inside its own block, its history blocks, and both as the user sees
    them.
    """

    inside_XM: jax.Array
    start_BN: jax.Array
    pairs: Pairs | None
    selected_BHTJ: jax.Array


def _route(q_BTHK, k_BSGK, sizes, top_k, segment_ids, q_offset):
    q_BTHK, k_BSGK = jax.lax.stop_gradient((q_BTHK, k_BSGK))
    (B, T, H, _), S, C = q_BTHK.shape, k_BSGK.shape[1], sizes.C
    where = layout(segment_ids, S, C)
    history, first_BS, count_BS = history_blocks(where, segment_ids, S, C)
    position_BT = query_positions(q_BTHK, q_offset)

    def per_row(x_BS):
        x_BT = jnp.broadcast_to(at_positions(x_BS, position_BT), (B, T))
        return _rows(jnp.broadcast_to(x_BT[:, :, None], (B, T, H)), sizes)

    own_BHT1 = jnp.broadcast_to(at_positions(where.block_id_BS, position_BT)[:, None, :, None], (B, H, T, 1))
    inside_XM = per_row(jnp.arange(S, dtype=jnp.int32) - where.block_start_BS)
    if not sizes.J:
        none_BHTJ = jnp.full((B, H, T, top_k - 1), -1, jnp.int32)
        return Routes(inside_XM, history.start_BN, None, jnp.concatenate([own_BHT1, none_BHTJ], axis=-1))

    mean_key_XNK = jnp.mean(_far(k_BSGK, sizes, history.start_BN, segment_ids).astype(jnp.float32), axis=2)
    mean_key_XNK = mean_key_XNK.astype(k_BSGK.dtype)  # rounded, as the official code does before the product
    pairs = choose_blocks(_rows(q_BTHK, sizes), mean_key_XNK, per_row(first_BS), per_row(count_BS), sizes.J)
    winner_BHTJ = _unrow(pairs.block_XMJ, B, T, sizes).transpose(0, 2, 1, 3)
    name = jax.vmap(lambda block_id_N, winner_HTJ: block_id_N[jnp.maximum(winner_HTJ, 0)])
    block_id_BN = jnp.broadcast_to(history.block_id_BN, (B, sizes.N))
    earlier_BHTJ = jnp.where(winner_BHTJ < 0, -1, name(block_id_BN, winner_BHTJ))
    earlier_BHTJ = jnp.pad(earlier_BHTJ, ((0, 0),) * 3 + ((0, top_k - 1 - sizes.J),), constant_values=-1)
    return Routes(inside_XM, history.start_BN, pairs, jnp.concatenate([own_BHT1, earlier_BHTJ], axis=-1))


def _rows(x_BTH, sizes):
    """[B, T, H, ...] to [X, M, ...]: the R heads of a key head side by side, T padded to whole chunks with
    zeros.
    """
    B, T, H = x_BTH.shape[:3]
    x_BTH = jnp.pad(x_BTH, ((0, 0), (0, sizes.D * sizes.C - T)) + ((0, 0),) * (x_BTH.ndim - 2))
    x_BTGR = x_BTH.reshape(B, sizes.D * sizes.C, H // sizes.R, sizes.R, *x_BTH.shape[3:])
    x_BGTR = jnp.swapaxes(x_BTGR, 1, 2)
    return x_BGTR.reshape(-1, sizes.D * sizes.C * sizes.R, *x_BTH.shape[3:])


def _unrow(x_XM, B, T, sizes):
    """The inverse of `_rows`, without the padding."""
    x_BGTR = x_XM.reshape(B, -1, sizes.D * sizes.C, sizes.R, *x_XM.shape[2:])[:, :, :T]
    x_BTGR = jnp.swapaxes(x_BGTR, 1, 2)
    return x_BTGR.reshape(B, T, -1, *x_XM.shape[2:])


def _near(x_BSGE, sizes, q_offset):
    """The keys or values that own blocks can reach, [X, D or D + 1, C, E]: one more chunk unless blocks are
    aligned.
    """
    B, _, G, E = x_BSGE.shape
    before = sizes.W - sizes.C
    length = sizes.D * sizes.C + before
    x_BSGE = jnp.pad(x_BSGE, ((0, 0), (before, sizes.D * sizes.C), (0, 0), (0, 0)))
    if isinstance(q_offset, int):
        x_BSGE = x_BSGE[:, q_offset : q_offset + length]
    else:
        cut = jax.vmap(lambda x_SGE, start: jax.lax.dynamic_slice_in_dim(x_SGE, start, length))
        x_BSGE = cut(x_BSGE, jnp.broadcast_to(q_offset, (B,)))
    return x_BSGE.reshape(B, -1, sizes.C, G, E).transpose(0, 3, 1, 2, 4).reshape(B * G, -1, sizes.C, E)


def _far(x_BSGE, sizes, start_BN, segment_ids):
    """The keys or values of the history blocks, [X, N, C, E]."""
    B, _, G, E = x_BSGE.shape
    if segment_ids is None:
        x_BNCGE = x_BSGE[:, : sizes.N * sizes.C].reshape(B, sizes.N, sizes.C, G, E)
    else:
        position_BNC = start_BN[..., None] + jnp.arange(sizes.C)
        x_BNCGE = jax.vmap(lambda x_SGE, position_NC: x_SGE[position_NC])(x_BSGE, position_BNC)
    return x_BNCGE.transpose(0, 3, 1, 2, 4).reshape(B * G, sizes.N, sizes.C, E)
