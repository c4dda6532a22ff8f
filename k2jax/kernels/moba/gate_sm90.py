"""MoBA's choice of blocks for Hopper, in Pallas Mosaic GPU: gate and top-k in one kernel, no score in memory.

A persistent grid over tiles of 128 rows. One warpgroup starts copies; each of the other two scores its 64 rows against
64 blocks at a time and keeps every row's best blocks so far, sorted, in registers: a few by `few_best_sm90`, many by
`many_best_sm90`. The lowest of equal blocks wins, as in `blocks.choose`.

Legend: B batch, T queries, H query heads, G key heads, D blocks, J chosen blocks, K query/key size, Q rows of a
warpgroup, W warpgroups, N blocks of a step, R ring slots.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from k2jax.kernels.attention.tiles_sm90 import (
    CONSUMERS,
    PRODUCER,
    ROW,
    ROWS,
    SLOTS,
    TILE,
    TRANSFORMS,
    blocks_at_a_time,
    over_rows,
    padded,
    slot_of,
    split,
    wait_free,
    walk_share,
)
from k2jax.kernels.moba import few_best_sm90, many_best_sm90
from k2jax.kernels.moba.few_best_sm90 import LOWEST

STEP = 64  # blocks scored at a time
ENLARGED = 2.0**60  # so that the differences of bfloat16's scores are what `few_best_sm90` needs; exact
# From so many on a network that sorts is faster than to insert (benchmarks/results/gate_lists.json).
MANY = 23


def choose_blocks_sm90(q_BTHK, mean_key_BDGK, num_chosen, first_BT, end_BT, *, num_sms=None, interpret=None):
    """The best of each query's candidate blocks by the inner product with the blocks' mean keys.

    Args:
      q_BTHK, mean_key_BDGK: bfloat16 or float16, products added in float32; K a multiple of 64.
      num_chosen: J, at most 64.
      first_BT, end_BT: int32, a query may choose blocks from the first on and before the end; both rise along T.
      num_sms, interpret: as in `tiles_sm90.attend`.

    Returns: int32 winner_BHJT with T rounded up to a tile, the best block first, the lowest of equal ones; -1 where
      there are fewer. A score that is no number is never chosen, and those beyond 8e19 count as equal. What is behind T
      means nothing.
    """
    (B, T, H, K), dtype = q_BTHK.shape, q_BTHK.dtype
    # Copies swizzle rows in groups of eight. What they read behind the last block is zero, and nobody's candidate.
    D = mean_key_BDGK.shape[1]
    if dtype == jnp.bfloat16:
        mean_key_BDGK = mean_key_BDGK * jnp.bfloat16(ENLARGED)
    mean_key_BDGK = jnp.pad(mean_key_BDGK, ((0, 0), (0, max(-D % 8, STEP - D)), (0, 0), (0, 0)))
    to_tile = ((0, 0), (0, padded(T) - T))
    range_2BT = jnp.stack([jnp.pad(x, to_tile, mode="edge") for x in (first_BT, end_BT)])
    ends_2BYL = range_2BT.reshape(2, B, -1, TILE)
    (first_BYL, end_BYL) = ends_2BYL
    spans = (first_BYL[..., 0] // STEP * STEP, end_BYL[..., -1], first_BYL[..., -1], end_BYL[..., 0])
    span_BY4 = jnp.stack(spans, axis=-1)
    kernel = plgpu.kernel(
        _kernel,
        out_type=jax.ShapeDtypeStruct((B, H, num_chosen, padded(T)), jnp.int32),
        grid=(blocks_at_a_time(num_sms),),
        grid_names=("sm",),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        kernel_name="gate",
        scratch_types={
            "q_RWQK": plgpu.SMEM((SLOTS, CONSUMERS, ROWS, K), dtype, transforms=TRANSFORMS),
            "mean_RNK": plgpu.SMEM((SLOTS, STEP, K), dtype, transforms=TRANSFORMS),
            "winner_WJQ": plgpu.SMEM((CONSUMERS, num_chosen, ROWS), jnp.int32),
            "q_full": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=SLOTS),
            "q_empty": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=SLOTS),
            "full": plgpu.Barrier(num_barriers=SLOTS),
            "empty": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=SLOTS),
        },
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    return kernel(span_BY4, range_2BT, q_BTHK, mean_key_BDGK)


def _kernel(
    span_BY4, range_2BT, q_BTHK, mean_BDGK, winner_BHJT, *, q_RWQK, mean_RNK, winner_WJQ, q_full, q_empty, full, empty
):
    wg = lax.axis_index("wg")
    B, H, num_chosen, T = winner_BHJT.shape
    num_tiles, lists = T // TILE, few_best_sm90 if num_chosen < MANY else many_best_sm90
    heads_per_key = H // mean_BDGK.shape[2]

    def walk(body):
        """body(number here, batch, head, first row, span, steps, steps so far); long tiles first.

        span: the first block, and from where to where all rows have candidates.
        """

        def one(here, number, so_far):
            batch_head, tiles_behind = split(number, B * H)
            head, batch = split(batch_head, H)
            tile = num_tiles - 1 - tiles_behind
            first_block, end, *all_see = (span_BY4[batch, tile, i] for i in range(4))
            steps = lax.div(jnp.maximum(end - first_block, 0) + (STEP - 1), jnp.int32(STEP))
            body(here, batch, head, tile * TILE, (first_block, *all_see), steps, so_far)
            return so_far + steps

        walk_share(B * H * num_tiles, one)

    @pl.when(wg == PRODUCER)
    def _produce():
        plgpu.set_max_registers(40, action="decrease")

        def one(here, batch, head, row, span, steps, so_far):
            slot = slot_of(here)
            wait_free(here, q_empty)
            for i in range(CONSUMERS):
                rows = pl.ds(row + i * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(q_BTHK.at[batch, rows, head], q_RWQK.at[slot, i], q_full.at[slot])
            key_head = lax.div(head, jnp.int32(heads_per_key))

            @pl.loop(0, steps)
            def _step(i):
                slot, blocks = slot_of(so_far + i), pl.ds(span[0] + i * STEP, STEP)
                wait_free(so_far + i, empty)
                plgpu.copy_gmem_to_smem(mean_BDGK.at[batch, blocks, key_head], mean_RNK.at[slot], full.at[slot])

        walk(one)

    @pl.when(wg < CONSUMERS)
    def _consume():
        plgpu.set_max_registers(232, action="increase")

        def one(here, batch, head, row, span, steps, so_far):
            q_slot, rows = slot_of(here), pl.ds(row + wg * ROWS, ROWS)
            candidates = [plgpu.load(range_2BT.at[i, batch, rows], layout=ROW, optimized=False) for i in range(2)]
            plgpu.barrier_wait(q_full.at[q_slot])

            def step(i, best):
                slot = slot_of(so_far + i)
                plgpu.barrier_wait(full.at[slot])

                def product(acc_QN):
                    plgpu.wgmma(acc_QN, q_RWQK.at[q_slot, wg], mean_RNK.at[slot].transpose((1, 0)))
                    return acc_QN[...]

                score_QN = pl.run_scoped(product, plgpu.ACC((ROWS, STEP), jnp.float32))
                plgpu.barrier_arrive(empty.at[slot])
                return lists.merged(best, *_scores_of_candidates(score_QN, candidates, span, i), num_chosen)

            best = lax.fori_loop(0, steps, step, lists.nothing(num_chosen))
            plgpu.barrier_arrive(q_empty.at[q_slot])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            lists.write(best, winner_WJQ.at[wg])
            plgpu.commit_smem()
            for j in range(num_chosen):
                plgpu.copy_smem_to_gmem(winner_WJQ.at[wg, j], winner_BHJT.at[batch, head, j, rows])

        walk(one)
        plgpu.wait_smem_to_gmem(0)


def _scores_of_candidates(score_QN, candidates, span, i):
    """The scores of step i and their blocks; LOWEST for those of no candidates."""
    shape = score_QN.shape
    first_block, all_begin, all_end = span
    first_block += i * STEP
    block_QN = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA) + first_block
    # A comparison is false for what is no number; infinity would become none in the differences of `few_best_sm90`.
    score_QN = jnp.minimum(jnp.where(score_QN > LOWEST, score_QN, LOWEST), -LOWEST)

    def of_candidates():
        first_QN, end_QN = (over_rows(x, shape) for x in candidates)
        return jnp.where((block_QN >= first_QN) & (block_QN < end_QN), score_QN, LOWEST)

    all_are = (first_block >= all_begin) & (first_block + STEP <= all_end)
    return lax.cond(all_are, lambda: score_QN, of_candidates), block_QN
