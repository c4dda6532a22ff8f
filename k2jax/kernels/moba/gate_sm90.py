"""MoBA's choice of blocks for Hopper, in Pallas Mosaic GPU: gate and top-k in one kernel, no score in memory.

A persistent grid over tiles of 128 rows. One warpgroup starts copies; each of the other two scores its 64 rows against
128 blocks at a time and keeps every row's best blocks so far, sorted, in registers. Per 128 blocks it extracts the
chosen number of maxima, lowest block first among equals, and inserts each into the list behind what is equal there: the
blocks come in rising order, so a lower block always wins a tie, as in `blocks.choose`.

Legend: X heads, M rows, N blocks (padded), J chosen blocks, K query/key size, Q rows of a warpgroup, G warpgroups,
R ring slots, W blocks of a step.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from k2jax.kernels.moba.attend_sm90 import CONSUMERS, PRODUCER, ROW, ROWS, TILE, TRANSFORMS

STEP = 128  # blocks scored at a time
SLOTS = 2
# The list takes a few registers for each block, beside 64 for the scores.
MAX_CHOSEN = 15


def choose_blocks_sm90(q_XMK, mean_key_XNK, num_chosen, *, rows_per_block, num_sms=None, interpret=None):
    """The best earlier blocks of each row by the inner product with the blocks' mean keys.

    Args:
      q_XMK, mean_key_XNK: bfloat16 or float16, products added in float32; M a multiple of 128, K of 64.
      num_chosen: J, 1 to MAX_CHOSEN.
      rows_per_block: row m may choose a block below m // rows_per_block.
      num_sms, interpret: as in `attend_sm90.attend`.

    Returns: int32 winner_XJM, the best block first, the lowest of equal ones; -1 where there are fewer. A score that is
      no number is never chosen.
    """
    (X, M, K), N = q_XMK.shape, mean_key_XNK.shape[1]
    mean_key_XNK = jnp.pad(mean_key_XNK, ((0, 0), (0, -N % STEP), (0, 0)))
    dtype = q_XMK.dtype
    scratch = {
        "q_RGQK": plgpu.SMEM((SLOTS, CONSUMERS, ROWS, K), dtype, transforms=TRANSFORMS),
        "mean_RWK": plgpu.SMEM((SLOTS, STEP, K), dtype, transforms=TRANSFORMS),
        "winner_GJQ": plgpu.SMEM((CONSUMERS, num_chosen, ROWS), jnp.int32),
        "q_full": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=SLOTS),
        "q_empty": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=SLOTS),
        "full": plgpu.Barrier(num_barriers=SLOTS),
        "empty": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=SLOTS),
    }
    kernel = plgpu.kernel(
        functools.partial(_kernel, rows_per_block=rows_per_block),
        out_type=jax.ShapeDtypeStruct((X, num_chosen, M), jnp.int32),
        grid=(jax.devices()[0].core_count if num_sms is None else num_sms,),
        grid_names=("sm",),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        scratch_types=scratch,
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    return kernel(q_XMK, mean_key_XNK)


def _kernel(q_XMK, mean_XNK, winner_XJM, *, rows_per_block, q_RGQK, mean_RWK, winner_GJQ, q_full, q_empty, full, empty):
    wg = lax.axis_index("wg")
    num_heads, num_tiles = q_XMK.shape[0], q_XMK.shape[1] // TILE
    first, stride = lax.axis_index("sm"), lax.axis_size("sm")
    num_mine = lax.div(num_heads * num_tiles - 1 - first, jnp.int32(stride)) + 1

    def walk(body):
        """body(number here, head, first row, steps, steps so far); the longest tiles first, all heads side by side."""

        def one(here, so_far):
            number = first + here * stride
            head = lax.rem(number, jnp.int32(num_heads))
            row = (num_tiles - 1 - lax.div(number, jnp.int32(num_heads))) * TILE
            num_candidates = lax.div(row + (TILE - 1), jnp.int32(rows_per_block))
            steps = lax.div(num_candidates + (STEP - 1), jnp.int32(STEP))
            body(here, head, row, steps, so_far)
            return so_far + steps

        lax.fori_loop(0, num_mine, one, jnp.int32(0))

    def slot_of(number):
        return lax.rem(number, jnp.int32(SLOTS))

    def wait_free(number, barrier):
        @pl.when(number >= SLOTS)
        def _():
            plgpu.barrier_wait(barrier.at[slot_of(number)])

    @pl.when(wg == PRODUCER)
    def _produce():
        plgpu.set_max_registers(40, action="decrease")

        def one(here, head, row, steps, so_far):
            wait_free(here, q_empty)
            for i in range(CONSUMERS):
                rows = pl.ds(row + i * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(q_XMK.at[head, rows], q_RGQK.at[slot_of(here), i], q_full.at[slot_of(here)])

            @pl.loop(0, steps)
            def _step(i):
                slot = slot_of(so_far + i)
                wait_free(so_far + i, empty)
                plgpu.copy_gmem_to_smem(mean_XNK.at[head, pl.ds(i * STEP, STEP)], mean_RWK.at[slot], full.at[slot])

        walk(one)

    @pl.when(wg < CONSUMERS)
    def _consume():
        plgpu.set_max_registers(232, action="increase")

        def one(here, head, row, steps, so_far):
            row, q_slot = row + wg * ROWS, slot_of(here)
            plgpu.barrier_wait(q_full.at[q_slot])

            def step(i, best):
                slot = slot_of(so_far + i)
                plgpu.barrier_wait(full.at[slot])

                def product(acc_QW):
                    plgpu.wgmma(acc_QW, q_RGQK.at[q_slot, wg], mean_RWK.at[slot].transpose((1, 0)))
                    return acc_QW[...]

                score_QW = pl.run_scoped(product, plgpu.ACC((ROWS, STEP), jnp.float32))
                plgpu.barrier_arrive(empty.at[slot])
                return _best_of(score_QW, best, row, i * STEP, rows_per_block)

            nothing = tuple((_row(-jnp.inf), _row(-1.0)) for _ in range(winner_GJQ.shape[1]))
            best = lax.fori_loop(0, steps, step, nothing)
            plgpu.barrier_arrive(q_empty.at[q_slot])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for j, (_, block_Q) in enumerate(best):
                winner_GJQ.at[wg, j][...] = block_Q.astype(jnp.int32)
            plgpu.commit_smem()
            for j in range(len(best)):
                plgpu.copy_smem_to_gmem(winner_GJQ.at[wg, j], winner_XJM.at[head, j, pl.ds(row, ROWS)])

        walk(one)
        plgpu.wait_smem_to_gmem(0)


def _row(value):
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), ROW)


def _best_of(score_QW, best, row, first_block, rows_per_block):
    """The sorted list (score, block) of each row after another STEP blocks. float32 holds every block."""
    shape = score_QW.shape
    row_QW = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
    column_QW = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
    # A block is earlier than a row's own if its first row and a whole block more lie at or before the row.
    candidate_QW = row_QW + row >= (column_QW + (first_block + 1)) * rows_per_block
    # A comparison is false for what is no number.
    score_QW = jnp.where(candidate_QW & (score_QW > -jnp.inf), score_QW, -jnp.inf)
    # Negative, because the largest is what a reduction finds.
    minus_QW = -(column_QW + first_block).astype(jnp.float32)
    for _ in best:
        score_Q = score_QW.max(axis=1)
        is_best_QW = score_QW == lax.broadcast_in_dim(score_Q, shape, [0])
        minus_Q = jnp.where(is_best_QW, minus_QW, -jnp.inf).max(axis=1)
        score_QW = jnp.where(minus_QW == lax.broadcast_in_dim(minus_Q, shape, [0]), -jnp.inf, score_QW)
        block_Q = -minus_Q
        new = []
        for have_Q, have_block_Q in best:
            better_Q = score_Q > have_Q
            new.append((jnp.where(better_Q, score_Q, have_Q), jnp.where(better_Q, block_Q, have_block_Q)))
            score_Q, block_Q = jnp.where(better_Q, have_Q, score_Q), jnp.where(better_Q, have_block_Q, block_Q)
        best = tuple(new)
    return best
