"""The gradient of keys and values for TPUs, in Pallas Mosaic TPU: every row that read some keys, in one sum.

One program adds what a tile of rows sends back to a unit of keys; the programs of a unit follow each other, and its sum
stays in memory of the core between them, so the order of every sum is fixed. Logits are computed with the keys along
the sublanes: what there is one of per row then lies along the lanes as it comes from memory.

Legend: X heads of all batch rows, T rows of one of them, B batch, Z heads of keys, S keys of one, U units of keys,
L rows of a tile, N keys of a unit, P gathered rows (Y tiles), W blocks, C places of a block, K query/key size, V value
size.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from k2jax.kernels.attention.tiles_tpu import LOG2E, call_with_tables, dot


class Readers(NamedTuple):
    """The own rows that read each unit of keys; int32, flat over batch and units or batch alone."""

    first_I: jax.Array  # the first tile of them
    count_I: jax.Array  # how many tiles
    position_B: jax.Array  # of the first row among the keys


def readers(start_BT, position_B, num_keys, plan) -> Readers:
    """Who reads what, of rows at consecutive positions with these first keys, rising."""
    L, N = plan.rows, plan.keys
    key_U = jnp.arange(0, num_keys, N, dtype=jnp.int32)
    end_BU = jax.vmap(lambda start_T: jnp.searchsorted(start_T, key_U + (N - 1), side="right"))(start_BT)
    first_BU = jnp.maximum(key_U - position_B[:, None], 0) // L
    count_BU = jnp.maximum(-(-end_BU // L) - first_BU, 0)
    first_BU = jnp.minimum(first_BU, start_BT.shape[1] // L - 1)
    return Readers(*(x.reshape(-1).astype(jnp.int32) for x in (first_BU, count_BU, position_B)))


def own_keys_gradient(scale, plan, most, readers, start_B1T, own, k_ZSK, v_ZSV, *, dtype=None, interpret: Any = None):
    """dk and dv from rows at consecutive positions.

    Args:
      scale, plan, start_B1T, k_ZSK, v_ZSV: as in `tiles_tpu.attend`.
      most: the most tiles of rows that read one unit.
      own: (q_XTK, dout_XTV, lse_XT, delta_XT), as `tiles_tpu.rows_gradient` takes them.
      dtype: of the results; None for that of the keys.

    Returns: dk_ZSK, dv_ZSV.
    """
    L, N, R = plan.rows, plan.keys, plan.heads_per_key
    key_heads = plan.heads // R
    Z, U = k_ZSK.shape[0], k_ZSK.shape[1] // N

    def tile(z, u, i, first_I, count_I):
        line = lax.div(z, key_heads) * U + u
        return first_I[line] + jnp.clip(lax.rem(i, most), 0, jnp.maximum(count_I[line] - 1, 0))

    def start_at(z, u, i, first_I, count_I, _):
        return lax.div(z, key_heads), 0, tile(z, u, i, first_I, count_I)

    def rows_at(z, u, i, first_I, count_I, _):
        return z * R + lax.div(i, most), tile(z, u, i, first_I, count_I), 0

    def vector_at(*at):
        head, tile, _ = rows_at(*at)
        return head, 0, tile

    def keys_at(z, u, i, *_):
        return z, u, 0

    return call_with_tables(
        functools.partial(_own_kernel, scale=scale, plan=plan, most=most),
        readers,
        (start_B1T, *_with_rows(own), k_ZSK, v_ZSV),
        grid=(Z, U, R * most),
        in_specs=[
            pl.BlockSpec((1, 1, L), start_at),
            *_specs(L, own, rows_at, vector_at),
            *(pl.BlockSpec((1, N, x.shape[2]), keys_at) for x in (k_ZSK, v_ZSV)),
        ],
        out_specs=[pl.BlockSpec((1, N, x.shape[2]), keys_at) for x in (k_ZSK, v_ZSV)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, dtype or x.dtype) for x in (k_ZSK, v_ZSV)],
        scratch=[(N, x.shape[2]) for x in (k_ZSK, v_ZSV)],
        interpret=interpret,
    )


def chosen_keys_gradient(
    scale, plan, block_Y, used_1, first_block, num_blocks, chosen, k_WCK, v_WCV, *, interpret=None
):
    """dk and dv from gathered rows, every tile of which reads one block.

    Args:
      block_Y: rising, the block of each tile counted from `first_block`; used_1: how many tiles there are.
      first_block, num_blocks: of all blocks, those to compute.
      chosen: (q_PK, dout_PV, lse_P, delta_P); lse is +inf for a row that is none.
      k_WCK, v_WCV: all blocks of keys and values, C a multiple of the keys of a unit.

    Returns: dk and dv of the blocks, [num_blocks, C, K or V]; undefined for a block without a tile.
    """
    L, N = plan.rows, plan.keys
    C, Y = k_WCK.shape[1], block_Y.shape[0]

    def last(y, used_1):
        """Tiles that are none stay at the last one, so nothing is copied."""
        return jnp.minimum(y, jnp.maximum(used_1[0] - 1, 0))

    def rows_at(u, y, block_Y, used_1, _):
        return 0, last(y, used_1), 0

    def vector_at(u, y, block_Y, used_1, _):
        return 0, 0, last(y, used_1)

    def keys_at(u, y, block_Y, used_1, first_1):
        return first_1[0] + block_Y[last(y, used_1)], u, 0

    def results_at(u, y, block_Y, used_1, _):
        return block_Y[last(y, used_1)], u, 0

    chosen = tuple(x[None] for x in chosen)
    return call_with_tables(
        functools.partial(_chosen_kernel, scale=scale),
        (block_Y, used_1, jnp.reshape(jnp.asarray(first_block, jnp.int32), 1)),
        (*_with_rows(chosen), k_WCK, v_WCV),
        grid=(C // N, Y),
        in_specs=[
            *_specs(L, chosen, rows_at, vector_at),
            *(pl.BlockSpec((1, N, x.shape[2]), keys_at) for x in (k_WCK, v_WCV)),
        ],
        out_specs=[pl.BlockSpec((1, N, x.shape[2]), results_at) for x in (k_WCK, v_WCV)],
        out_shape=[jax.ShapeDtypeStruct((num_blocks, *x.shape[1:]), x.dtype) for x in (k_WCK, v_WCV)],
        scratch=[(N, x.shape[2]) for x in (k_WCK, v_WCV)],
        interpret=interpret,
    )


def _with_rows(rows):
    q, dout, lse, delta = rows
    return q, dout, lse[:, None], delta[:, None]


def _specs(L, rows, rows_at, vector_at):
    wide = [pl.BlockSpec((1, L, x.shape[2]), rows_at) for x in rows[:2]]
    return [*wide, *[pl.BlockSpec((1, 1, L), vector_at)] * 2]


# --- the kernels --------------------------------------------------------------------------------------------------


def _own_kernel(first_I, count_I, position_B, start_11L, *refs, scale, plan, most):
    z, u, i = (pl.program_id(axis) for axis in range(3))
    batch = lax.div(z, plan.heads // plan.heads_per_key)
    line, n = batch * pl.num_programs(1) + u, lax.rem(i, most)
    key, position = u * plan.keys, position_B[batch] + (first_I[line] + n) * plan.rows
    is_last = i == pl.num_programs(2) - 1
    _begin(i == 0, refs)

    def seen():
        key_NL = lax.broadcasted_iota(jnp.int32, (plan.keys, plan.rows), 0) + key
        row_NL = lax.broadcasted_iota(jnp.int32, (plan.keys, plan.rows), 1) + position
        return (key_NL <= row_NL) & (key_NL >= start_11L[0])

    # Of most tiles all rows come behind the unit; whether they have begun before it is not worth a table.
    pl.when(n < count_I[line])(lambda: _add(refs, scale, seen()))
    _end(is_last, refs, scale)


def _chosen_kernel(block_Y, used_1, _, *refs, scale):
    y = pl.program_id(1)
    used, block = used_1[0], block_Y[y]
    is_first = (y == 0) | (block_Y[jnp.maximum(y - 1, 0)] != block)
    is_last = (y == used - 1) | (block_Y[jnp.minimum(y + 1, pl.num_programs(1) - 1)] != block)
    _begin(is_first, refs)
    pl.when(y < used)(lambda: _add(refs, scale, None))
    _end((y < used) & is_last, refs, scale)


def _begin(condition, refs):
    @pl.when(condition)
    def _():
        for sum_ref in refs[-2:]:
            sum_ref[...] = jnp.zeros_like(sum_ref)


def _add(refs, scale, seen_NL):
    q_1LK, dout_1LV, lse_11L, delta_11L, k_1NK, v_1NV, _, _, dk_NK, dv_NV = refs
    q_LK, dout_LV = q_1LK[0], dout_1LV[0]
    p_NL = jnp.exp2(dot(k_1NK[0], q_LK, (1, 1)) * (scale * LOG2E) - lse_11L[0] * LOG2E)
    if seen_NL is not None:
        p_NL = jnp.where(seen_NL, p_NL, 0.0)
    dv_NV[...] += dot(p_NL.astype(dout_LV.dtype), dout_LV)
    ds_NL = p_NL * (dot(v_1NV[0], dout_LV, (1, 1)) - delta_11L[0])
    dk_NK[...] += dot(ds_NL.astype(q_LK.dtype), q_LK)


def _end(condition, refs, scale):
    dk_1NK, dv_1NV, dk_NK, dv_NV = refs[-4:]

    @pl.when(condition)
    def _():
        dk_1NK[0] = (dk_NK[...] * scale).astype(dk_1NK.dtype)
        dv_1NV[0] = dv_NV[...].astype(dv_1NV.dtype)
