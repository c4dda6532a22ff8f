"""MoBA's choice of blocks for Hopper, in Pallas Mosaic GPU: gate and top-k in one kernel, no score in memory.

A persistent grid over tiles of 128 rows. One warpgroup starts copies; each of the other two scores its 64 rows against
128 blocks at a time and keeps every row's best blocks so far, sorted, in registers. Per 128 blocks it extracts the
chosen number of maxima, lowest block first among equals, and inserts each into the list behind what is equal there: the
blocks come in rising order, so a lower block always wins a tie, as in `blocks.choose`.

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
    padded,
    slot_of,
    split,
    wait_free,
    walk_share,
)

STEP = 128  # blocks scored at a time
# The list takes a few registers for each block, beside 64 for the scores.
MAX_CHOSEN = 15


def choose_blocks_sm90(q_BTHK, mean_key_BDGK, num_chosen, first_BT, end_BT, *, num_sms=None, interpret=None):
    """The best of each query's candidate blocks by the inner product with the blocks' mean keys.

    Args:
      q_BTHK, mean_key_BDGK: bfloat16 or float16, products added in float32; K a multiple of 64.
      num_chosen: J, 1 to MAX_CHOSEN.
      first_BT, end_BT: int32, a query may choose blocks from the first on and before the end; both rise along T.
      num_sms, interpret: as in `tiles_sm90.attend`.

    Returns: int32 winner_BHJT with T rounded up to a tile, the best block first, the lowest of equal ones; -1 where
      there are fewer. A score that is no number is never chosen. What is behind T means nothing.
    """
    (B, T, H, K), dtype = q_BTHK.shape, q_BTHK.dtype
    # Copies swizzle rows in groups of eight. What they read behind the last block is zero, and nobody's candidate.
    D = mean_key_BDGK.shape[1]
    mean_key_BDGK = jnp.pad(mean_key_BDGK, ((0, 0), (0, max(-D % 8, STEP - D)), (0, 0), (0, 0)))
    to_tile = ((0, 0), (0, padded(T) - T))
    range_2BT = jnp.stack([jnp.pad(x, to_tile, mode="edge") for x in (first_BT, end_BT)])
    ends_2BYL = range_2BT.reshape(2, B, -1, TILE)
    span_BY2 = jnp.stack([ends_2BYL[0, ..., 0] // STEP * STEP, ends_2BYL[1, ..., -1]], axis=-1)
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
    return kernel(span_BY2, range_2BT, q_BTHK, mean_key_BDGK)


def _kernel(
    span_BY2, range_2BT, q_BTHK, mean_BDGK, winner_BHJT, *, q_RWQK, mean_RNK, winner_WJQ, q_full, q_empty, full, empty
):
    wg = lax.axis_index("wg")
    (B, H), num_tiles = winner_BHJT.shape[:2], winner_BHJT.shape[3] // TILE
    heads_per_key = H // mean_BDGK.shape[2]

    def walk(body):
        """body(number here, batch, head, first row, first block, steps, steps so far); long tiles first."""

        def one(here, number, so_far):
            batch_head, tiles_behind = split(number, B * H)
            head, batch = split(batch_head, H)
            tile = num_tiles - 1 - tiles_behind
            first_block, end = (span_BY2[batch, tile, i] for i in range(2))
            steps = lax.div(jnp.maximum(end - first_block, 0) + (STEP - 1), jnp.int32(STEP))
            body(here, batch, head, tile * TILE, first_block, steps, so_far)
            return so_far + steps

        walk_share(B * H * num_tiles, one)

    @pl.when(wg == PRODUCER)
    def _produce():
        plgpu.set_max_registers(40, action="decrease")

        def one(here, batch, head, row, first_block, steps, so_far):
            slot = slot_of(here)
            wait_free(here, q_empty)
            for i in range(CONSUMERS):
                rows = pl.ds(row + i * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(q_BTHK.at[batch, rows, head], q_RWQK.at[slot, i], q_full.at[slot])
            key_head = lax.div(head, jnp.int32(heads_per_key))

            @pl.loop(0, steps)
            def _step(i):
                slot, blocks = slot_of(so_far + i), pl.ds(first_block + i * STEP, STEP)
                wait_free(so_far + i, empty)
                plgpu.copy_gmem_to_smem(mean_BDGK.at[batch, blocks, key_head], mean_RNK.at[slot], full.at[slot])

        walk(one)

    @pl.when(wg < CONSUMERS)
    def _consume():
        plgpu.set_max_registers(232, action="increase")

        def one(here, batch, head, row, first_block, steps, so_far):
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
                return _best_of(score_QN, best, candidates, first_block + i * STEP)

            nothing = tuple((_row(-jnp.inf), _row(-1.0)) for _ in range(winner_WJQ.shape[1]))
            best = lax.fori_loop(0, steps, step, nothing)
            plgpu.barrier_arrive(q_empty.at[q_slot])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for j, (_, block_Q) in enumerate(best):
                winner_WJQ.at[wg, j][...] = block_Q.astype(jnp.int32)
            plgpu.commit_smem()
            for j in range(len(best)):
                plgpu.copy_smem_to_gmem(winner_WJQ.at[wg, j], winner_BHJT.at[batch, head, j, rows])

        walk(one)
        plgpu.wait_smem_to_gmem(0)


def _row(value):
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), ROW)


def _best_of(score_QN, best, candidates, first_block):
    """The sorted list (score, block) of each row after another STEP blocks. float32 holds every block."""
    shape = score_QN.shape
    block_QN = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA) + first_block
    first_QN, end_QN = (lax.broadcast_in_dim(x, shape, [0]) for x in candidates)
    # A comparison is false for what is no number.
    candidate_QN = (block_QN >= first_QN) & (block_QN < end_QN) & (score_QN > -jnp.inf)
    score_QN = jnp.where(candidate_QN, score_QN, -jnp.inf)
    # Negative, because the largest is what a reduction finds.
    minus_QN = -block_QN.astype(jnp.float32)
    for _ in best:
        score_Q = score_QN.max(axis=1)
        is_best_QN = score_QN == lax.broadcast_in_dim(score_Q, shape, [0])
        minus_Q = jnp.where(is_best_QN, minus_QN, -jnp.inf).max(axis=1)
        score_QN = jnp.where(minus_QN == lax.broadcast_in_dim(minus_Q, shape, [0]), -jnp.inf, score_QN)
        block_Q = -minus_Q
        new, moved_Q = [], score_Q > jnp.inf
        for have_Q, have_block_Q in best:
            # What was moved goes before the next one, even if that is equal: it was found earlier.
            better_Q = moved_Q = moved_Q | (score_Q > have_Q)
            new.append((jnp.where(better_Q, score_Q, have_Q), jnp.where(better_Q, block_Q, have_block_Q)))
            score_Q, block_Q = jnp.where(better_Q, have_Q, score_Q), jnp.where(better_Q, have_block_Q, block_Q)
        best = tuple(new)
    return best
