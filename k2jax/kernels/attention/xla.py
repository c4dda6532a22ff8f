"""Attention in chunks of queries: the same result in S x chunk memory, on any platform.

A chunk is recomputed in the backward (`jax.checkpoint`), so no T x S array outlives it. Where the queries are
all the keys' positions, up to 8 static ranges cut away most of the keys that lie in the future.

Legend: B batch, T queries, S keys, H query heads, G key heads, C queries of one chunk, K query/key size, V
  value size.
"""

import functools

import jax
import jax.numpy as jnp

from k2jax.kernels.attention.reference import Attended, causal_mask, masked_attention, query_positions

MAX_RANGES = 8
MAX_CHUNK, MIN_CHUNK = 512, 128
# Logits of one chunk, over batch and heads: 2**26 float32 are 256 MiB.
CHUNK_LOGITS = 2**26


def attention(q_BTHK, k_BSGK, v_BSGV, *, scale, segment_ids=None, q_offset=0):
    """Causal attention in chunks of queries; arguments as in `k2jax.kernels.attention.attention`."""
    (B, T, H, _), S = q_BTHK.shape, k_BSGK.shape[1]
    fits = min(MAX_CHUNK, CHUNK_LOGITS // (B * H * S), -(-T // MAX_RANGES))
    chunk = min(T, max(MIN_CHUNK, fits))
    position_BT = jnp.broadcast_to(query_positions(q_BTHK, q_offset), (B, T))
    if T != S or not isinstance(q_offset, int):
        return _attend_range(q_BTHK, k_BSGK, v_BSGV, segment_ids, position_BT, scale, chunk)
    chunks_per_range = -(-T // (chunk * MAX_RANGES))
    parts = []
    for start in range(0, T, chunk * chunks_per_range):
        end = min(start + chunk * chunks_per_range, T)
        parts.append(
            _attend_range(
                q_BTHK[:, start:end],
                k_BSGK[:, :end],
                v_BSGV[:, :end],
                None if segment_ids is None else segment_ids[:, :end],
                position_BT[:, start:end],
                scale,
                chunk,
            )
        )
    return _join(parts)


def _attend_range(q_BTHK, k_BSGK, v_BSGV, segment_ids, position_BT, scale, chunk):
    """All queries of one range against the same keys, one chunk after the other."""
    T = q_BTHK.shape[1]

    @functools.partial(jax.checkpoint, prevent_cse=chunk >= T)
    def attend(q_BCHK, position_BC):
        mask_BCS = causal_mask(position_BC, k_BSGK.shape[1], segment_ids)
        return masked_attention(q_BCHK, k_BSGK, v_BSGV, mask_BCS, scale)

    whole = T - T % chunk
    parts = []
    if whole == chunk:
        parts.append(attend(q_BTHK[:, :whole], position_BT[:, :whole]))
    elif whole:
        stacked = jax.lax.map(
            lambda xs: attend(*xs),
            (_chunks(q_BTHK[:, :whole], chunk), _chunks(position_BT[:, :whole], chunk)),
        )
        parts.append(_unstack(stacked))
    if whole < T:
        parts.append(attend(q_BTHK[:, whole:], position_BT[:, whole:]))
    return _join(parts)


def _chunks(x_BT, chunk):
    return jnp.moveaxis(x_BT.reshape(x_BT.shape[0], -1, chunk, *x_BT.shape[2:]), 1, 0)


def _unstack(stacked):
    """Attended results with a leading axis of chunks, put side by side along the queries."""
    out_BNCHV = jnp.moveaxis(stacked.out_BTHV, 0, 1)
    lse_BHNC = jnp.moveaxis(stacked.lse_BHT, 0, 2)
    return Attended(
        out_BNCHV.reshape(out_BNCHV.shape[0], -1, *out_BNCHV.shape[3:]),
        lse_BHNC.reshape(*lse_BHNC.shape[:2], -1),
        jnp.max(stacked.max_logit_BH, axis=0),
    )


def _join(parts):
    if len(parts) == 1:
        return parts[0]
    return Attended(
        jnp.concatenate([part.out_BTHV for part in parts], axis=1),
        jnp.concatenate([part.lse_BHT for part in parts], axis=2),
        functools.reduce(jnp.maximum, [part.max_logit_BH for part in parts]),
    )
