"""The gradient of keys and values for Hopper, in Pallas Mosaic GPU: every row that read a block, in one sum.

A block of the GPU takes 128 keys and values, half of them for each of two warpgroups, and keeps their gradients in
registers while a third warpgroup streams the rows past them, 64 at a time: those that chose the block, which the caller
has gathered, then the block's own, which see it causally. Nothing is added in memory, so the order of every sum is
fixed. Probabilities are recomputed from the rows' log-sum-exp (FlashAttention-2, arXiv 2307.08691, section 3.1.2).

Legend: A gathered rows, M own rows of a head, X heads, D blocks of a head, Z = X * D, S = Z * C keys, C keys of a
block, K query/key size, V value size, N keys of a warpgroup, G warpgroups, Q rows of a step, R ring slots.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from k2jax.kernels.moba.attend_sm90 import CONSUMERS, LOG2E, PRODUCER, TRANSFORMS

KEYS = 64  # of a warpgroup
UNIT = KEYS * CONSUMERS
ROWS = 64  # of a step
SLOTS = 3
COLUMN = plgpu.Layout.WGMMA.reduce(0)


def keys_gradient(scale, k_SK, v_SV, own, chosen, span_Z2, *, block_size, heads_per_key, num_heads, interpret=None):
    """dk and dv, summed over all rows that read a key.

    Args:
      scale: of the logits; positive.
      k_SK, v_SV: keys and values of all blocks, bfloat16 or float16.
      own: (q, dout, lse, delta) of every block's own rows in the order of the blocks: [Z * C * heads_per_key, ...].
      chosen: the same of the rows that chose a block, gathered, or None. lse is +inf for a row that is none, and the
        block's rows are followed by such rows up to a multiple of 64.
      span_Z2: int32, each block's first gathered row, a multiple of 64, and how many there are.
      block_size: C, a multiple of 128.
      heads_per_key: rows in a row that share a position.
      num_heads: X.
      interpret: as in `attend_sm90.attend`.

    Returns: dk_SK, dv_SV in the inputs' type.
    """
    (S, K), V = k_SK.shape, v_SV.shape[1]
    dtype = k_SK.dtype
    num_blocks = S // block_size // num_heads
    chosen = () if chosen is None else chosen
    kernel = plgpu.kernel(
        functools.partial(
            _kernel, scale=scale, block_size=block_size, heads_per_key=heads_per_key, num_blocks=num_blocks
        ),
        out_type=(jax.ShapeDtypeStruct((S, K), dtype), jax.ShapeDtypeStruct((S, V), dtype)),
        # The last axis is the slowest. Early blocks are chosen most often, so they start first.
        grid=(num_heads, block_size // UNIT, num_blocks),
        grid_names=("head", "unit", "block"),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        interpret=interpret,
        scratch_types={
            "k_GNK": plgpu.SMEM((CONSUMERS, KEYS, K), dtype, transforms=TRANSFORMS),
            "v_GNV": plgpu.SMEM((CONSUMERS, KEYS, V), dtype, transforms=TRANSFORMS),
            "q_RQK": plgpu.SMEM((SLOTS, ROWS, K), dtype, transforms=TRANSFORMS),
            "dout_RQV": plgpu.SMEM((SLOTS, ROWS, V), dtype, transforms=TRANSFORMS),
            "lse_RQ": plgpu.SMEM((SLOTS, ROWS), jnp.float32),
            "delta_RQ": plgpu.SMEM((SLOTS, ROWS), jnp.float32),
            "kv_full": plgpu.Barrier(num_arrivals=2, num_barriers=CONSUMERS),
            "full": plgpu.Barrier(num_arrivals=4, num_barriers=SLOTS),
            "empty": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=SLOTS),
        },
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    return kernel(span_Z2, k_SK, v_SV, *own, *chosen)


def _kernel(
    span_Z2, k_SK, v_SV, *refs, scale, block_size, heads_per_key, num_blocks, k_GNK, v_GNV, q_RQK, dout_RQV, lse_RQ,
    delta_RQ, kv_full, full, empty,
):  # fmt: skip
    *rows, dk_SK, dv_SV = refs
    own, chosen = rows[:4], rows[4:]
    wg = lax.axis_index("wg")
    block = lax.axis_index("head") * num_blocks + lax.axis_index("block")
    first_key = lax.axis_index("unit") * UNIT
    dtype = k_SK.dtype

    # Own rows before the unit's first key see none of its keys.
    skipped = lax.div(first_key * heads_per_key, jnp.int32(ROWS))
    own_steps = block_size * heads_per_key // ROWS - skipped
    own_start = block * (block_size * heads_per_key)
    chosen_steps = lax.div(span_Z2[block, 1] + (ROWS - 1), jnp.int32(ROWS)) if chosen else jnp.int32(0)

    @pl.when(wg == PRODUCER)
    def _produce():
        plgpu.set_max_registers(40, action="decrease")
        for i in range(CONSUMERS):
            keys = pl.ds(block * block_size + first_key + i * KEYS, KEYS)
            plgpu.copy_gmem_to_smem(k_SK.at[keys], k_GNK.at[i], kv_full.at[i])
            plgpu.copy_gmem_to_smem(v_SV.at[keys], v_GNV.at[i], kv_full.at[i])

        def stream(arrays, start, steps, so_far):
            @pl.loop(0, steps)
            def _step(i):
                slot = lax.rem(so_far + i, jnp.int32(SLOTS))

                @pl.when(so_far + i >= SLOTS)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                rows = pl.ds(start + i * ROWS, ROWS)
                for array, ring in zip(arrays, (q_RQK, dout_RQV, lse_RQ, delta_RQ), strict=True):
                    plgpu.copy_gmem_to_smem(array.at[rows], ring.at[slot], full.at[slot])

        if chosen:
            stream(chosen, span_Z2[block, 0], chosen_steps, jnp.int32(0))
        stream(own, own_start + skipped * ROWS, own_steps, chosen_steps)

    @pl.when(wg < CONSUMERS)
    def _consume():
        plgpu.set_max_registers(232, action="increase")
        plgpu.barrier_wait(kv_full.at[wg])
        k_NK, v_NV = k_GNK.at[wg], v_GNV.at[wg]

        def step(i, dk_NK, dv_NV, so_far, row=None):
            """Adds 64 rows. row: of the own rows of the block, the first of all steps; None for rows that chose it."""
            slot = lax.rem(so_far + i, jnp.int32(SLOTS))
            plgpu.barrier_wait(full.at[slot])

            def logits(acc_NQ):
                plgpu.wgmma(acc_NQ, k_NK, q_RQK.at[slot].transpose((1, 0)))
                return acc_NQ[...]

            s_NQ = pl.run_scoped(logits, plgpu.ACC((KEYS, ROWS), jnp.float32))
            lse_Q = plgpu.load(lse_RQ.at[slot], layout=COLUMN) * LOG2E
            delta_Q = plgpu.load(delta_RQ.at[slot], layout=COLUMN)
            p_NQ = jnp.exp2(s_NQ * (scale * LOG2E) - lax.broadcast_in_dim(lse_Q, s_NQ.shape, [1]))
            if row is not None:
                key_NQ = plgpu.broadcasted_iota(jnp.int32, s_NQ.shape, 0, layout=plgpu.Layout.WGMMA)
                row_NQ = plgpu.broadcasted_iota(jnp.int32, s_NQ.shape, 1, layout=plgpu.Layout.WGMMA)
                key_NQ = (key_NQ + (first_key + wg * KEYS)) * heads_per_key
                p_NQ = jnp.where(row_NQ + (row + i * ROWS) >= key_NQ, p_NQ, 0.0)

            def chances(dp_NQ):
                plgpu.wgmma(dp_NQ, v_NV, dout_RQV.at[slot].transpose((1, 0)))
                plgpu.wgmma(dv_NV, p_NQ.astype(dtype), dout_RQV.at[slot])
                return plgpu.wgmma_accumulator_load(dp_NQ, wait_n=1)  # While the second product still runs.

            dp_NQ = pl.run_scoped(chances, plgpu.ACC((KEYS, ROWS), jnp.float32))
            ds_NQ = p_NQ * (dp_NQ - lax.broadcast_in_dim(delta_Q, dp_NQ.shape, [1]))
            plgpu.wgmma(dk_NK, ds_NQ.astype(dtype), q_RQK.at[slot])
            # The vectors were read by ordinary loads, which this orders before the copy that overwrites them.
            plgpu.commit_smem()
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(empty.at[slot])

        def all_steps(dk_NK, dv_NV):
            add = functools.partial(step, dk_NK=dk_NK, dv_NV=dv_NV)
            if chosen:
                pl.loop(0, chosen_steps)(functools.partial(add, so_far=jnp.int32(0)))
            pl.loop(0, own_steps)(functools.partial(add, so_far=chosen_steps, row=skipped * ROWS))
            return dk_NK[...], dv_NV[...]

        sums = [plgpu.ACC((KEYS, x.shape[1]), jnp.float32) for x in (k_SK, v_SV)]
        dk_NK, dv_NV = pl.run_scoped(all_steps, *sums)
        k_NK[...] = (dk_NK * scale).astype(dtype)
        v_NV[...] = dv_NV.astype(dtype)
        plgpu.commit_smem()
        keys = pl.ds(block * block_size + first_key + wg * KEYS, KEYS)
        plgpu.copy_smem_to_gmem(k_NK, dk_SK.at[keys])
        plgpu.copy_smem_to_gmem(v_NV, dv_SV.at[keys])
        plgpu.wait_smem_to_gmem(0)
