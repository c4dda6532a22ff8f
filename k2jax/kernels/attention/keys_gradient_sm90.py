"""The gradient of keys and values for Hopper, in Pallas Mosaic GPU: every row that read a block, in one sum.

A block of the GPU takes 128 keys and values, half of them for each of two warpgroups, and keeps their gradients in
registers while a third warpgroup streams the rows past them, 64 at a time: those that chose the keys' block, gathered
from wherever they lie, then the block's own of every query head, which see it causally. Nothing is added in memory, so
the order of every sum is fixed. Probabilities are recomputed from the rows' log-sum-exp (FlashAttention-2, arXiv
2307.08691, section 3.1.2).

Legend: B batch, T queries = S keys, H query heads, G key heads, P gathered rows, K query/key size, V value size, C keys
of a block, D blocks, Z = B * G * D, N keys of a warpgroup, W warpgroups, Q rows of a step, R ring slots.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from k2jax.kernels.attention import gather_sm90 as gather
from k2jax.kernels.attention.key_heads import KeyHeads
from k2jax.kernels.attention.positions import at_positions
from k2jax.kernels.attention.shares_sm90 import heads_at_a_time
from k2jax.kernels.attention.tiles_sm90 import (
    CONSUMERS,
    LOG2E,
    PRODUCER,
    TRANSFORMS,
    ring_of_rows,
    slot_of,
    wait_free,
)

KEYS = 64  # of a warpgroup
UNIT = KEYS * CONSUMERS
ROWS = 64  # of a step
SLOTS = 3
COLUMN = plgpu.Layout.WGMMA.reduce(0)


def keys_gradient(
    scale, block_size, own, k_BSGK, v_BSGV, chosen=None, span_Z2=None, *, starts=None, heads=None, interpret=None
):  # fmt: skip
    """dk and dv, summed over all rows that read a key.

    Args:
      scale, block_size: as in `tiles_sm90.attend`.
      own: (q_BTHK, dout_BTHV, lse, delta), as for `tiles_sm90.rows_gradient`: every row reads its own block. None for
        no such rows.
      k_BSGK, v_BSGV: bfloat16 or float16.
      chosen: the same of rows that chose a block: (q_XK, dout_XV, lse_P, delta_P, index_P). Place p is row index_P[p];
        where it is none, lse is +inf and the index X or more. A block's rows are followed by such places up to a
        multiple of 64.
      span_Z2: int32, of each of the heads' blocks, (b * G + g) * D + n counted from their first one, its first gathered
        row, a multiple of 64, and their number.
      starts: of own rows, as in `tiles_sm90.attend`.
      heads: the key heads to compute; None for all.
      interpret: as in `tiles_sm90.attend`.

    Returns: dk_BSGK, dv_BSGV of the heads.
    """
    (B, S, G, K), V, dtype = k_BSGK.shape, v_BSGV.shape[-1], k_BSGK.dtype
    heads = KeyHeads(0, 0, B, G, G) if heads is None else heads
    first_2 = jnp.stack([jnp.asarray(start, jnp.int32) for start in (heads.batch, heads.head)])
    arrays = {
        "own": own,
        "starts": starts if starts is None else (starts.start_BT, reach(starts, S)),
        "chosen": chosen if chosen is None else (*chosen, span_Z2),
    }
    arrays = {name: tuple(given) for name, given in arrays.items() if given is not None}
    shape, num_heads = (heads.num_rows, S, heads.num_heads), heads.num_rows * heads.num_heads
    # Own rows are read by unit after unit. Those of a key head's query heads follow each other.
    at_a_time = num_heads if own is None else heads_at_a_time(num_heads, 2 * own[0].shape[1] * (K + V))
    kernel = plgpu.kernel(
        functools.partial(_kernel, names=tuple(arrays), scale=scale, block_size=block_size),
        out_type=(jax.ShapeDtypeStruct((*shape, K), dtype), jax.ShapeDtypeStruct((*shape, V), dtype)),
        # The last axis is the fastest. Early keys are read by most rows, so they start first.
        grid=(num_heads // at_a_time, -(-S // UNIT), at_a_time),
        grid_names=("heads", "unit", "head"),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        kernel_name="keys_gradient",
        interpret=interpret,
        scratch_types={
            "k_WNK": plgpu.SMEM((CONSUMERS, KEYS, K), dtype, transforms=TRANSFORMS),
            "v_WNV": plgpu.SMEM((CONSUMERS, KEYS, V), dtype, transforms=TRANSFORMS),
            "q_RQK": ring_of_rows((SLOTS, ROWS, K), dtype, chosen),
            "dout_RQV": ring_of_rows((SLOTS, ROWS, V), dtype, chosen),
            "lse_RQ": plgpu.SMEM((SLOTS, ROWS), jnp.float32),
            "delta_RQ": plgpu.SMEM((SLOTS, ROWS), jnp.float32),
            "start_RQ": plgpu.SMEM((SLOTS, ROWS), jnp.int32),
            "kv_full": plgpu.Barrier(num_arrivals=2, num_barriers=CONSUMERS),
            "full": plgpu.Barrier(num_arrivals=4 if starts is None else 5, num_barriers=SLOTS),
            "vectors_full": plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
            "chosen_full": gather.barrier_scratch(SLOTS),
            "empty": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=SLOTS),
        },
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    return kernel(first_2, k_BSGK, v_BSGV, *itertools.chain(*arrays.values()))


def reach(starts, num_keys):
    """Which own rows read a unit's keys, int32 [B, units, 6].

    The first row, a multiple of 64; its position behind the unit's first key; steps of 64 rows: all, the first one
    with rows behind the unit's last key alone, the first one after it with rows that begin behind that key; and from
    which of its keys on the rows of the steps between those see them.
    """
    key_U = jnp.arange(0, num_keys, UNIT, dtype=jnp.int32)
    row_BU = jnp.maximum(key_U - starts.position_B[:, None], 0) // ROWS * ROWS
    position_BU = starts.position_B[:, None] + row_BU - key_U
    # Tiles whose first, or whose last, row does not begin behind a key: starts rise. By comparisons it is one kernel.
    tiles = jax.vmap(functools.partial(jnp.searchsorted, side="right", method="compare_all"), (0, None))
    seeing_BU, whole_BU = (tiles(starts.start_BT[:, row::ROWS], key_U + UNIT - 1) for row in (0, ROWS - 1))
    steps_BU = jnp.maximum(seeing_BU - row_BU // ROWS, 0)
    clear_from_BU = jnp.clip(-((position_BU - (UNIT - 1)) // ROWS), 0, steps_BU)
    clear_to_BU = jnp.clip(whole_BU - row_BU // ROWS, clear_from_BU, steps_BU)
    # Rows behind a unit that see any of its keys are of the same document as its last one.
    last_BU = jnp.maximum(key_U + UNIT - 1 - starts.position_B[:, None], 0)
    first_BU = jnp.maximum(at_positions(starts.start_BT, last_BU) - key_U, 0)
    of_units = (row_BU, position_BU, steps_BU, clear_from_BU, clear_to_BU, first_BU)
    return jnp.stack(jnp.broadcast_arrays(*of_units), axis=-1).astype(jnp.int32)


class _Unit:
    """The keys of this block of the GPU, and which rows read them; scalars in registers."""

    def __init__(self, first_2, k_BSGK, dk_BSGK, block_size, own=None, starts=None, chosen=None):
        S, G = k_BSGK.shape[1:3]
        head = lax.axis_index("heads") * lax.axis_size("head") + lax.axis_index("head")
        self.result = [op(head, jnp.int32(dk_BSGK.shape[2])) for op in (lax.div, lax.rem)]
        self.batch, self.key_head = first_2[0] + self.result[0], first_2[1] + self.result[1]
        self.start = lax.axis_index("unit") * UNIT
        block = lax.div(self.start, jnp.int32(block_size))
        self.num_own_heads = 0 if own is None else own[0].shape[2] // G
        if starts is None:
            # Own rows before the unit's first key see none of its keys; from its last key on, they see all of them.
            end = jnp.minimum((block + 1) * block_size, S)
            self.own_start, self.position = self.start, jnp.int32(0)
            self.own_steps = self.clear_to = lax.div(end - self.start + (ROWS - 1), jnp.int32(ROWS))
            self.clear_from = jnp.minimum(UNIT // ROWS, self.own_steps)
        else:
            of_unit = (starts[1][self.batch, lax.axis_index("unit"), i] for i in range(6))
            self.own_start, self.position, self.own_steps, self.clear_from, clear_to, first_key = of_unit
            self.clear_to = jnp.where(first_key > 0, self.clear_from, clear_to)
        self.chosen_start, self.chosen_steps = jnp.int32(0), jnp.int32(0)
        if chosen is not None:
            span, span_Z2 = head * -(-S // block_size) + block, chosen[-1]
            self.chosen_start = span_Z2[span, 0]
            self.chosen_steps = lax.div(span_Z2[span, 1] + (ROWS - 1), jnp.int32(ROWS))

    def keys_of(self, array, wg):
        return array.at[self.batch, pl.ds(self.start + wg * KEYS, KEYS), self.key_head]

    def result_of(self, array, wg):
        batch, head = self.result
        return array.at[batch, pl.ds(self.start + wg * KEYS, KEYS), head]

    def chosen_rows_of(self, array, step):
        return array.at[pl.ds(self.chosen_start + step * ROWS, ROWS)]

    def own_rows_of(self, array, step, r):
        rows, head = pl.ds(self.own_start + step * ROWS, ROWS), self.key_head * self.num_own_heads + r
        places = {4: (self.batch, rows, head), 3: (self.batch, head, rows), 2: (self.batch, rows)}
        return array.at[places[len(array.shape)]]


def _kernel(
    first_2, k_BSGK, v_BSGV, *refs, names, scale, block_size, k_WNK, v_WNV, q_RQK, dout_RQV, lse_RQ, delta_RQ, start_RQ,
    kv_full, full, vectors_full, chosen_full, empty,
):  # fmt: skip
    *refs, dk_BSGK, dv_BSGV = refs
    given = {}
    for name in names:
        size = {"own": 4, "starts": 2, "chosen": 6}[name]
        given[name], refs = refs[:size], refs[size:]
    unit = _Unit(first_2, k_BSGK, dk_BSGK, block_size, **given)
    wg = lax.axis_index("wg")
    (q_RQK, q_lines), (dout_RQV, dout_lines) = (gather.views(ring, "chosen" in names) for ring in (q_RQK, dout_RQV))
    rings = (q_RQK, dout_RQV, lse_RQ, delta_RQ, start_RQ)
    if "chosen" in names:
        gather.begin(chosen_full, SLOTS)
    has_starts = "starts" in names

    @pl.when(wg == PRODUCER)
    def _produce():
        plgpu.set_max_registers(24, action="decrease")
        for i in range(CONSUMERS):
            plgpu.copy_gmem_to_smem(unit.keys_of(k_BSGK, i), k_WNK.at[i], kv_full.at[i])
            plgpu.copy_gmem_to_smem(unit.keys_of(v_BSGV, i), v_WNV.at[i], kv_full.at[i])
        own = [*given.get("own", ()), *given.get("starts", ())[:1]]
        if "chosen" in given:
            lines = ((q_RQK, q_lines), (dout_RQV, dout_lines))
            _stream_chosen(unit, given["chosen"], lines, (lse_RQ, delta_RQ), (chosen_full, vectors_full), empty)
        if own:
            _stream_own(unit, own, rings, full, empty)

    @pl.when(wg < CONSUMERS)
    def _consume():
        plgpu.set_max_registers(240, action="increase")
        plgpu.barrier_wait(kv_full.at[wg])
        k_NK, v_NV = k_WNK.at[wg], v_WNV.at[wg]

        def all_steps(dk_NK, dv_NV):
            keys, sums = (k_WNK, v_WNV), (dk_NK, dv_NV)
            add = functools.partial(_add_rows, scale=scale, keys=keys, sums=sums, rings=rings, empty=empty)
            if "chosen" in names:

                def rows_came(number):
                    gather.wait(chosen_full, number, SLOTS)
                    plgpu.barrier_wait(vectors_full.at[slot_of(number, SLOTS)])

                pl.loop(0, unit.chosen_steps)(functools.partial(add, so_far=jnp.int32(0), rows_came=rows_came))
            if "own" not in names:
                return dk_NK[...], dv_NV[...]

            @pl.loop(0, unit.num_own_heads)
            def _own_head(r):
                def rows_came(number):
                    plgpu.barrier_wait(full.at[slot_of(number, SLOTS)])

                own = functools.partial(add, so_far=unit.chosen_steps + r * unit.own_steps, rows_came=rows_came)
                seen_by = functools.partial(_seen_by, unit, start_RQ if has_starts else None)
                pl.loop(0, unit.clear_from)(functools.partial(own, seen_by=seen_by))
                pl.loop(unit.clear_from, unit.clear_to)(own)
                if has_starts:
                    pl.loop(unit.clear_to, unit.own_steps)(functools.partial(own, seen_by=seen_by))

            return dk_NK[...], dv_NV[...]

        sums = [plgpu.ACC((KEYS, x.shape[-1]), jnp.float32) for x in (k_BSGK, v_BSGV)]
        dk_NK, dv_NV = pl.run_scoped(all_steps, *sums)
        k_NK[...] = (dk_NK * scale).astype(k_BSGK.dtype)
        v_NV[...] = dv_NV.astype(v_BSGV.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_NK, unit.result_of(dk_BSGK, wg))
        plgpu.copy_smem_to_gmem(v_NV, unit.result_of(dv_BSGV, wg))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # The kernel's end waits for the writes.


def _seen_by(unit, start_RQ, shape, step, slot, wg):
    """Whether each key of a warpgroup is seen by each own row of a step."""
    key_NQ, seen_NQ = keys_seen(shape, wg, unit.position + step * ROWS)
    if start_RQ is None:
        return seen_NQ
    start_Q = plgpu.load(start_RQ.at[slot], layout=COLUMN) - unit.start
    return seen_NQ & (key_NQ >= lax.broadcast_in_dim(start_Q, shape, [1]))


def hidden_warpgroup():
    """The number of this warpgroup, of which the compiler does not know that it never changes.

    Otherwise it computes all addresses of the warpgroup's keys before the loop that needs them, and runs out of
    registers (`python -m benchmarks.hopper_code`).
    """
    return lax.optimization_barrier(lax.axis_index("wg"))


def keys_seen(shape, wg, position):
    """The keys of a warpgroup, and whether rows from `position` on have come to them; from the unit's first key on."""
    key_NQ = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA) + wg * KEYS
    row_NQ = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA) + position
    return key_NQ, row_NQ >= key_NQ


def _stream_chosen(unit, chosen, rings, vectors, barriers, empty):
    """Copies the rows that chose the unit's block, 64 at a time; each warp a quarter of them.

    rings: (ring, its lines) of q and of dout; vectors: rings of lse and delta.
    """
    *rows, lse_P, delta_P, index_P, _ = chosen
    full, vectors_full = barriers
    share = ROWS // gather.WARPS
    arrays = [(array_XE, *ring) for array_XE, ring in zip(rows, rings, strict=True)]

    def copy(warp):
        @pl.loop(0, unit.chosen_steps)
        def _step(i):
            wait_free(i, empty, SLOTS)
            slot = slot_of(i, SLOTS)

            @pl.when(warp == 0)
            def _vectors():
                for array_P, ring in zip((lse_P, delta_P), vectors, strict=True):
                    plgpu.copy_gmem_to_smem(unit.chosen_rows_of(array_P, i), ring.at[slot], vectors_full.at[slot])

            indices = unit.chosen_rows_of(index_P, i)
            gather.copy_rows(arrays, indices, warp * share, share, slot * ROWS + warp * share, full, slot)

    gather.by_warps(copy)


def _stream_own(unit, own, rings, full, empty):
    """Copies the block's own rows of each query head, 64 at a time."""

    @pl.loop(0, unit.num_own_heads)
    def _own_head(r):
        so_far = unit.chosen_steps + r * unit.own_steps

        @pl.loop(0, unit.own_steps)
        def _step(i):
            wait_free(so_far + i, empty, SLOTS)
            slot = slot_of(so_far + i, SLOTS)
            for array, ring in zip(own, rings, strict=False):  # starts may be missing
                plgpu.copy_gmem_to_smem(unit.own_rows_of(array, i, r), ring.at[slot], full.at[slot])


def _add_rows(i, so_far, rows_came, seen_by=None, *, scale, keys, sums, rings, empty):
    """Adds what 64 rows send back.

    seen_by: (shape, step, slot, warpgroup) -> which of its keys they see; None where they see all.
    """
    dk_NK, dv_NV = sums
    slot = slot_of(so_far + i, SLOTS)
    wg = hidden_warpgroup()
    keys = tuple(x_WNE.at[wg] for x_WNE in keys)
    rows_came(so_far + i)
    rows = q_QK, *_ = [ring.at[slot] for ring in rings[:4]]
    seen = None if seen_by is None else lambda shape: seen_by(shape, i, slot, wg)
    ds_NQ = _add_to_values(keys, rows, dv_NV, scale, seen, tight=dk_NK.shape[1] + dv_NV.shape[1] > 256)
    plgpu.wgmma(dk_NK, ds_NQ, q_QK)
    # The vectors were read by ordinary loads, which this orders before the copy that overwrites them.
    plgpu.commit_smem()
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(empty.at[slot])


def _add_to_values(keys, rows, dv_NV, scale, seen=None, *, tight):
    """Adds to dv what rows send back to a warpgroup's values. The sum need not be there yet: `plgpu.wgmma_wait`.

    keys: (k_NK, v_NV), rows: (q_QK, dout_QV, lse_Q, delta_Q), in shared memory. seen: shape -> which keys the rows see;
    None where they see all. tight: whether few registers are left; the order of the products then costs an overlap and
    saves some. Out of registers, the compiler waits for every single product (`python -m benchmarks.hopper_code`).

    Returns: ds_NQ in the inputs' type, what the rows send back to the logits.
    """
    (k_NK, v_NV), (q_QK, dout_QV, lse_Q, delta_Q) = keys, rows
    dtype = q_QK.dtype

    def logits(acc_NQ):
        plgpu.wgmma(acc_NQ, k_NK, q_QK.transpose((1, 0)))
        return acc_NQ[...]

    s_NQ = pl.run_scoped(logits, plgpu.ACC((KEYS, ROWS), jnp.float32))
    lse_Q = plgpu.load(lse_Q, layout=COLUMN) * LOG2E
    p_NQ = jnp.exp2(s_NQ * (scale * LOG2E) - lax.broadcast_in_dim(lse_Q, s_NQ.shape, [1]))
    if seen is not None:
        p_NQ = jnp.where(seen(s_NQ.shape), p_NQ, 0.0)

    def chances(dp_NQ):
        if tight:  # All of p is needed first, so neither lse nor logits wait in registers beside dp.
            plgpu.wgmma(dv_NV, p_NQ.astype(dtype), dout_QV)
            plgpu.wgmma(dp_NQ, v_NV, dout_QV.transpose((1, 0)))
            return dp_NQ[...]
        plgpu.wgmma(dp_NQ, v_NV, dout_QV.transpose((1, 0)))
        plgpu.wgmma(dv_NV, p_NQ.astype(dtype), dout_QV)
        return plgpu.wgmma_accumulator_load(dp_NQ, wait_n=1)  # While the second product still runs.

    dp_NQ = pl.run_scoped(chances, plgpu.ACC((KEYS, ROWS), jnp.float32))
    delta_Q = plgpu.load(delta_Q, layout=COLUMN)
    ds_NQ = p_NQ * (dp_NQ - lax.broadcast_in_dim(delta_Q, dp_NQ.shape, [1]))
    return ds_NQ.astype(dtype)
