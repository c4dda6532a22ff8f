"""Attention of tiles of rows to ranges of keys, for TPUs, in Pallas Mosaic TPU; and the rows' gradient.

A tile is some rows of one query head. Prefetched tables say which steps of keys it reads, so that the copies of the
next step run ahead and steps of the future, or of another block, are neither copied nor computed. Rows see their keys
causally from a first key of their own on (own rows), or all keys of the block that they chose (chosen rows, gathered by
the caller). One program computes one step of one tile: the online softmax of FlashAttention-2 (arXiv 2307.08691,
algorithm 1 and, for the gradient, section 3.1.2), its sums in memory of the core between the steps of a tile.

Numbers of one per row lie along the lanes in memory and are turned into columns inside: a column in memory would take
the room of 128.

Legend: X heads of all batch rows, T rows of one of them, B batch, Z heads of keys, S keys of one, L rows of a tile, N
keys of a step, I tiles of the tables, K query/key size, V value size.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
# Of a step. The logits of one, and two or three arrays like them, are in the core's memory beside the operands.
MAX_ROWS, MAX_KEYS = 512, 512
LOG2E, LN2 = math.log2(math.e), math.log(2)
LOWEST = -1e30  # Below every logit, and finite when one is subtracted from another.
NEVER = 2**30  # The first key of a row that is none.


class Tiles(NamedTuple):
    """What every tile reads; int32. The last three are those of own rows, None for chosen ones."""

    first_I: jax.Array  # its first step of keys
    count_I: jax.Array  # how many; 0 where there is nothing to compute, and results are undefined
    position_I: jax.Array | None = None  # of its first row among the keys
    begun_I: jax.Array | None = None  # the key from which on all its rows see keys
    start_B1T: jax.Array | None = None  # the first key that each row sees


class Plan(NamedTuple):
    """The static numbers of a call."""

    rows: int  # L
    keys: int  # N
    steps: int  # the most that a tile reads
    heads: int  # rows of X that share one line of tables
    heads_per_key: int  # rows of X that read the same head of keys
    num_keys: int | None = None  # of chosen rows: the keys of a block, of which the last step may have fewer


def own_tiles(start_BT, position_B, num_rows, plan) -> Tiles:
    """The tables of rows at consecutive positions.

    Args:
      start_BT: first key of each row, rising, in whole tiles; what is behind `num_rows` is no row.
      position_B: of the first row among the keys.
    """
    T, L, N = start_BT.shape[1], plan.rows, plan.keys
    row_Y = jnp.arange(0, T, L, dtype=jnp.int32)
    position_BY = position_B[:, None] + row_Y
    first_BY = start_BT[:, ::L] // N
    last_BY = position_B[:, None] + jnp.minimum(row_Y + L, num_rows) - 1
    count_BY = jnp.where(row_Y < num_rows, last_BY // N + 1 - first_BY, 0)
    start_BT = jnp.where(jnp.arange(T) < num_rows, start_BT, NEVER)
    begun_BY = start_BT[:, L - 1 :: L]
    flat = (x.reshape(-1).astype(jnp.int32) for x in (first_BY, count_BY, position_BY, begun_BY))
    return Tiles(*flat, start_BT[:, None])


def attend(scale, plan, tiles, q_XTK, k_ZSK, v_ZSV, *, interpret: Any = None):
    """Softmax attention of every row to what its tile reads.

    Args:
      scale: of the logits.
      plan, tiles: which tile reads what; T and S are multiples of the steps.
      q_XTK, k_ZSK, v_ZSV: bfloat16 or float32.
      interpret: `pltpu.InterpretParams()` or True runs it on a CPU, slowly.

    Returns: out_XTV in the inputs' type; the logarithm of the softmax's denominator and the largest logit of every row
      in float32 (after scale, natural log), [X, T]. Of rows that are none they mean nothing.
    """
    (X, T, _), V, dtype = q_XTK.shape, v_ZSV.shape[2], q_XTK.dtype
    vector = jax.ShapeDtypeStruct((X, 1, T), jnp.float32)
    call = _call(
        functools.partial(_attend_kernel, scale=scale, plan=plan),
        plan,
        tiles,
        out_shape=(jax.ShapeDtypeStruct((X, T, V), dtype), vector, vector),
        operands=(q_XTK, k_ZSK, v_ZSV),
        scratch=((plan.rows, V), (plan.rows, 1), (plan.rows, 1)),
        interpret=interpret,
    )
    out_XTV, lse_X1T, max_X1T = call
    return out_XTV, lse_X1T[:, 0], max_X1T[:, 0]


def rows_gradient(scale, plan, tiles, q_XTK, dout_XTV, lse_XT, delta_XT, k_ZSK, v_ZSV, *, interpret: Any = None):
    """The part of dq that comes from what each row's tile reads.

    Args: as `attend`; dout like its out; lse of the whole row, +inf for a row that is none, and delta, the sum of
      dout * out, in float32.

    Returns: dq_XTK.
    """
    (L, _), K = plan[:2], q_XTK.shape[2]
    return _call(
        functools.partial(_rows_gradient_kernel, scale=scale, plan=plan),
        plan,
        tiles,
        out_shape=jax.ShapeDtypeStruct(q_XTK.shape, q_XTK.dtype),
        operands=(q_XTK, dout_XTV, lse_XT[:, None], delta_XT[:, None], k_ZSK, v_ZSV),
        scratch=((L, K), (L, 1), (L, 1)),
        interpret=interpret,
    )


# --- what both kernels share --------------------------------------------------------------------------------------


def _call(kernel, plan, tiles, *, out_shape, operands, scratch, interpret):
    """The kernel for every tile and step. Keys and values are the last two operands, all others go by rows."""
    (X, T, _), L, N = operands[0].shape, plan.rows, plan.keys
    *tables, start_B1T = tiles
    tables = [table for table in tables if table is not None]

    def rows_at(x, y, n, *tables):
        return x, y, 0

    def vector_at(x, y, n, *tables):
        return x, 0, y

    def start_at(x, y, n, *tables):
        return lax.div(x, plan.heads), 0, y

    def keys_at(x, y, n, first_I, count_I, *tables):
        i = _line(x, y, plan, T // L)
        # Beyond its last step a tile stays where it is, so nothing is copied.
        return lax.div(x, plan.heads_per_key), first_I[i] + jnp.clip(n, 0, jnp.maximum(count_I[i] - 1, 0)), 0

    def by_rows(x):
        return pl.BlockSpec((1, 1, L), vector_at) if x.shape[1] == 1 else pl.BlockSpec((1, L, x.shape[2]), rows_at)

    in_specs = [by_rows(x) for x in operands[:-2]]
    in_specs += [pl.BlockSpec((1, N, x.shape[2]), keys_at) for x in operands[-2:]]
    if start_B1T is not None:
        in_specs.insert(0, pl.BlockSpec((1, 1, L), start_at))
        operands = (start_B1T, *operands)
    return call_with_tables(
        kernel,
        tables,
        operands,
        grid=(X, T // L, plan.steps),
        in_specs=in_specs,
        out_specs=jax.tree.map(by_rows, out_shape),
        out_shape=out_shape,
        scratch=scratch,
        interpret=interpret,
    )


def call_with_tables(kernel, tables, operands, *, grid, in_specs, out_specs, out_shape, scratch, interpret):
    """The kernel over a grid whose copies the tables direct; its last axis is in order, with float32 scratch kept."""
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(tables),
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
    )
    options = pltpu.CompilerParams(dimension_semantics=("parallel",) * (len(grid) - 1) + ("arbitrary",))
    call = pl.pallas_call(
        kernel, out_shape=out_shape, grid_spec=grid_spec, compiler_params=options, interpret=interpret or False
    )
    return call(*tables, *operands)


def _line(x, y, plan, num_tiles):
    """Where the tables have tile y of head x."""
    return lax.div(x, plan.heads) * num_tiles + y


class _Step(NamedTuple):
    """One step of one tile, as scalars of the core."""

    n: jax.Array  # its number
    count: jax.Array  # of the tile's steps
    is_clear: jax.Array | bool  # whether every row sees every key
    seen: Any  # () -> which row sees which key, [L, N]

    def run(self, body):
        """body(seen or None), if there is such a step."""
        inside = self.n < self.count
        pl.when(inside & self.is_clear)(functools.partial(body, None))
        if self.is_clear is not True:
            pl.when(inside & ~self.is_clear)(lambda: body(self.seen()))


def _step(refs, plan):
    """The step that this program computes, and the references behind its tables."""
    x, y, n = (pl.program_id(axis) for axis in range(3))
    i = _line(x, y, plan, pl.num_programs(1))
    shape = (plan.rows, plan.keys)
    first_I, count_I, *refs = refs
    count = count_I[i]
    if plan.num_keys is not None:
        is_clear = True if plan.num_keys == plan.steps * plan.keys else (n + 1) * plan.keys <= plan.num_keys
        return _Step(n, count, is_clear, lambda: _iota(shape, 1, n * plan.keys) < plan.num_keys), refs
    position_I, begun_I, start_11L, *refs = refs
    key, position = (first_I[i] + n) * plan.keys, position_I[i]

    def seen():
        key_LN = _iota(shape, 1, key)
        return (key_LN <= _iota(shape, 0, position)) & (key_LN >= column(start_11L[0]))

    return _Step(n, count, (key + plan.keys - 1 <= position) & (key >= begun_I[i]), seen), refs


def _iota(shape, axis, start):
    return lax.broadcasted_iota(jnp.int32, shape, axis) + start


def column(row_1L):
    """[L, 1] of [1, L]."""
    return jnp.broadcast_to(row_1L, (LANES, row_1L.shape[1])).T[:, :1]


def _row(column_L1):
    """[1, L] of [L, 1]."""
    return jnp.broadcast_to(column_L1, (column_L1.shape[0], LANES)).T[:1]


def dot(a, b, contract=(1, 0)):
    """The product over these axes, added in float32; of float32 as exact as float32 is."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


# --- the kernels --------------------------------------------------------------------------------------------------


def _attend_kernel(*refs, scale, plan):
    step, refs = _step(refs, plan)
    q_1LK, k_1NK, v_1NV, out_1LV, lse_11L, max_11L, sum_LV, top_L1, total_L1 = refs

    @pl.when(step.n == 0)
    def _begin():
        sum_LV[...] = jnp.zeros_like(sum_LV)
        total_L1[...] = jnp.zeros_like(total_L1)
        top_L1[...] = jnp.full_like(top_L1, LOWEST)

    def add(seen_LN):
        s_LN = dot(q_1LK[0], k_1NK[0], (1, 1)) * (scale * LOG2E)
        if seen_LN is not None:
            s_LN = jnp.where(seen_LN, s_LN, LOWEST)
        old_L1 = top_L1[...]
        new_L1 = jnp.maximum(old_L1, jnp.max(s_LN, axis=1, keepdims=True))
        faded_L1 = jnp.exp2(old_L1 - new_L1)
        # Keys that a row does not see count only until it has seen one: then all of that fades to 0.
        p_LN = jnp.exp2(s_LN - new_L1)
        top_L1[...] = new_L1
        total_L1[...] = total_L1[...] * faded_L1 + jnp.sum(p_LN, axis=1, keepdims=True)
        sum_LV[...] = sum_LV[...] * faded_L1 + dot(p_LN.astype(v_1NV.dtype), v_1NV[0])

    step.run(add)

    @pl.when(step.n == step.count - 1)
    def _end():
        out_1LV[0] = (sum_LV[...] / total_L1[...]).astype(out_1LV.dtype)
        lse_11L[0] = _row(top_L1[...] * LN2 + jnp.log(total_L1[...]))
        max_11L[0] = _row(top_L1[...] * LN2)


def _rows_gradient_kernel(*refs, scale, plan):
    step, refs = _step(refs, plan)
    q_1LK, dout_1LV, lse_11L, delta_11L, k_1NK, v_1NV, dq_1LK, sum_LK, lse_L1, delta_L1 = refs

    @pl.when(step.n == 0)
    def _begin():
        sum_LK[...] = jnp.zeros_like(sum_LK)
        lse_L1[...] = column(lse_11L[0] * LOG2E)
        delta_L1[...] = column(delta_11L[0])

    def add(seen_LN):
        p_LN = jnp.exp2(dot(q_1LK[0], k_1NK[0], (1, 1)) * (scale * LOG2E) - lse_L1[...])
        if seen_LN is not None:
            p_LN = jnp.where(seen_LN, p_LN, 0.0)
        ds_LN = p_LN * (dot(dout_1LV[0], v_1NV[0], (1, 1)) - delta_L1[...])
        sum_LK[...] += dot(ds_LN.astype(k_1NK.dtype), k_1NK[0])

    step.run(add)

    @pl.when(step.n == step.count - 1)
    def _end():
        dq_1LK[0] = (sum_LK[...] * scale).astype(dq_1LK.dtype)
