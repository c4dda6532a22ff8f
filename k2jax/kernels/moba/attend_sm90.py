"""Attention of tiles of rows to one block each, for Hopper, in Pallas Mosaic GPU: forward, and the rows' gradient.

A tile is 128 rows that read the same block of keys: rows that chose it, gathered by the caller, or the block's own
rows, which see it causally. A persistent grid: each block of the GPU walks over every num_sms-th tile with three
warpgroups. One only starts copies, of rows through one ring in shared memory and of keys and values through another,
ahead of the others and across the ends of tiles. Each of the other two computes 64 rows in registers (the online
softmax of FlashAttention-2, arXiv 2307.08691, algorithm 1 and, for the gradient, section 3.1.2), then stores them
while its next operands already arrive.

Legend: A rows (of all heads, one after the other), Z blocks of keys, S = Z * C keys, C keys of a block, Y tiles,
K query/key size, V value size, Q rows of a warpgroup, G warpgroups, N keys of a step, R ring slots.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# What the tensor memory accelerator copies at once: rows of 128 bytes, swizzled in groups of eight.
TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
ROWS = 64  # of a warpgroup: what one wgmma takes
CONSUMERS = 2
TILE = ROWS * CONSUMERS
PRODUCER = CONSUMERS  # the warpgroup after the consumers
SLOTS = 2  # of the ring of keys and values
# Of a block's shared memory, 227 KiB, a little is for barriers and vectors.
SHARED_MEMORY = 230_400
LOG2E = math.log2(math.e)
ROW = plgpu.Layout.WGMMA.reduce(1)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """What a tile reads.

    Args:
      block_size: keys of a block, a multiple of 128.
      heads_per_key: in tiles of a block's own rows, how many rows in a row share a position; None for tiles of rows
        that chose their block, which is then read from a table.
    """

    block_size: int
    heads_per_key: int | None = None

    @property
    def tiles_per_block(self):
        return self.block_size * self.heads_per_key // TILE


def attend(tiles: Tiles, scale, q_AK, k_SK, v_SV, block_Y=None, used_1=None, *, num_sms=None, interpret=None):
    """Softmax attention of every row to its tile's block, as far as the block alone goes.

    Args:
      tiles: which block a tile reads. With `heads_per_key` tile i lies at its place in the order of the blocks.
      scale: of the logits; positive.
      q_AK: [Y * 128, K] bfloat16 or float16.
      k_SK, v_SV: [Z * C, ...] in the same type.
      block_Y, used_1: int32 block of each tile, and how many tiles to compute, at most Y; the results of the others
        are undefined. None with `heads_per_key`.
      num_sms: blocks that run at a time; None asks the default device.
      interpret: `plgpu.InterpretGPUParams()` runs it on a CPU, slowly.

    Returns: out_AV in the inputs' type, lse_A and the largest logits max_A in float32 (after scale, natural log).
    """
    A, K = q_AK.shape
    V = v_SV.shape[1]
    step, slots = _fit(((128, 2), (64, 2), (64, 1)), TILE * K, SLOTS * (K + V), TILE * V)
    row = jax.ShapeDtypeStruct((A,), jnp.float32)
    dtype = q_AK.dtype
    kernel = _persistent(
        functools.partial(_attend_kernel, tiles=tiles, scale=scale, step=step),
        out_type=(jax.ShapeDtypeStruct((A, V), dtype), row, row),
        num_sms=num_sms,
        interpret=interpret,
        scratch={
            "q_RGQK": plgpu.SMEM((slots, CONSUMERS, ROWS, K), dtype, transforms=TRANSFORMS),
            "k_RNK": plgpu.SMEM((SLOTS, step, K), dtype, transforms=TRANSFORMS),
            "v_RNV": plgpu.SMEM((SLOTS, step, V), dtype, transforms=TRANSFORMS),
            "out_GQV": plgpu.SMEM((CONSUMERS, ROWS, V), dtype, transforms=TRANSFORMS),
            "lse_GQ": plgpu.SMEM((CONSUMERS, ROWS), jnp.float32),
            "max_GQ": plgpu.SMEM((CONSUMERS, ROWS), jnp.float32),
            "q_full": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=slots),
            "q_empty": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=slots),
            "k_full": plgpu.Barrier(num_barriers=SLOTS),
            "k_empty": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=SLOTS),
            "v_full": plgpu.Barrier(num_barriers=SLOTS),
            "v_empty": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=SLOTS),
        },
    )
    return kernel(*_tables(tiles, A, block_Y, used_1), q_AK, k_SK, v_SV)


def rows_gradient(
    tiles: Tiles,
    scale,
    q_AK,
    dout_AV,
    lse_A,
    delta_A,
    k_SK,
    v_SV,
    block_Y=None,
    used_1=None,
    *,
    num_sms=None,
    interpret=None,
):
    """The part of dq that comes from each row's tile's block.

    Args: as `attend`; dout_AV in the inputs' type; lse_A of the whole row, +inf for a row that is none, and delta_A,
      the sum of dout * out, both float32.

    Returns: dq_AK in the inputs' type.
    """
    A, K = q_AK.shape
    V = v_SV.shape[1]
    step, slots = _fit(((64, 2), (64, 1)), TILE * (K + V), SLOTS * (K + V), TILE * K)
    dtype = q_AK.dtype
    kernel = _persistent(
        functools.partial(_rows_gradient_kernel, tiles=tiles, scale=scale, step=step),
        out_type=jax.ShapeDtypeStruct((A, K), dtype),
        num_sms=num_sms,
        interpret=interpret,
        scratch={
            "q_RGQK": plgpu.SMEM((slots, CONSUMERS, ROWS, K), dtype, transforms=TRANSFORMS),
            "dout_RGQV": plgpu.SMEM((slots, CONSUMERS, ROWS, V), dtype, transforms=TRANSFORMS),
            "k_RNK": plgpu.SMEM((SLOTS, step, K), dtype, transforms=TRANSFORMS),
            "v_RNV": plgpu.SMEM((SLOTS, step, V), dtype, transforms=TRANSFORMS),
            "dq_GQK": plgpu.SMEM((CONSUMERS, ROWS, K), dtype, transforms=TRANSFORMS),
            "q_full": plgpu.Barrier(num_arrivals=2 * CONSUMERS, num_barriers=slots),
            "q_empty": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=slots),
            "k_full": plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
            "k_empty": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=SLOTS),
        },
    )
    return kernel(*_tables(tiles, A, block_Y, used_1), q_AK, dout_AV, lse_A, delta_A, k_SK, v_SV)


# --- what both kernels share --------------------------------------------------------------------------------------


def _fit(choices, per_slot, per_key, rest):
    """The first (keys of a step, slots for rows) of which a slot's numbers, a key's and the rest fit, at 2 bytes each."""
    return next((n, r) for n, r in choices if 2 * (r * per_slot + n * per_key + rest) <= SHARED_MEMORY)


def _tables(tiles, num_rows, block_Y, used_1):
    if tiles.heads_per_key is None:
        return block_Y, used_1
    # Never read but for their number: a tile's place says its block.
    return jnp.zeros(1, jnp.int32), jnp.full(1, num_rows // TILE, jnp.int32)


def _persistent(body, *, out_type, num_sms, interpret, scratch):
    names = list(scratch)

    def kernel(*refs):
        def scoped(*buffers):
            body(*refs, **dict(zip(names, buffers, strict=True)))

        pl.run_scoped(scoped, *scratch.values(), collective_axes="wg")

    return plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=(jax.devices()[0].core_count if num_sms is None else num_sms,),
        grid_names=("sm",),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,  # Rows are reduced within a quarter of a warp; the rings need the memory.
            # Written for these semantics: every layout in shared memory is stated, none is inferred.
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )


def _walk(tiles, step, block_Y, used_1, body):
    """body(number here, tile, key of its block, row of its block, steps over keys, steps so far) for each tile of ours.

    Both sides of a ring count the same tiles and steps.
    """
    first, stride = lax.axis_index("sm"), lax.axis_size("sm")
    num_mine = lax.div(used_1[0] - first + (stride - 1), jnp.int32(stride))

    def one(here, so_far):
        tile = first + here * stride
        if tiles.heads_per_key is None:
            block, row, steps = block_Y[tile], jnp.int32(0), jnp.int32(tiles.block_size // step)
        else:
            block = lax.div(tile, jnp.int32(tiles.tiles_per_block))
            # The longest tiles first, so that the last ones to run are short.
            reversed_tile = lax.rem(tile, jnp.int32(tiles.tiles_per_block))
            row = (tiles.tiles_per_block - 1 - reversed_tile) * TILE
            tile = block * tiles.tiles_per_block + (tiles.tiles_per_block - 1 - reversed_tile)
            last_key = lax.div(row + (TILE - 1), jnp.int32(tiles.heads_per_key))
            steps = lax.div(last_key, jnp.int32(step)) + 1
        body(here, tile, block * tiles.block_size, row, steps, so_far)
        return so_far + steps

    lax.fori_loop(0, num_mine, one, jnp.int32(0))


def _slot(number, slots=SLOTS):
    return lax.rem(number, jnp.int32(slots))


def _wait_free(number, empty, slots=SLOTS):
    @pl.when(number >= slots)
    def _():
        plgpu.barrier_wait(empty.at[_slot(number, slots)])


def _copy_rows(ref_AE, ring_RGQE, tile, slot, full):
    for wg in range(CONSUMERS):
        rows = pl.ds(tile * TILE + wg * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(ref_AE.at[rows], ring_RGQE.at[slot, wg], full.at[slot])


def _visible(tiles, shape, row, key):
    """Whether each row (of the block's own) is at or behind each key (of the block)."""
    row_QN = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
    key_QN = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
    return row_QN + row >= (key_QN + key) * tiles.heads_per_key


def _over(row_Q, shape):
    return lax.broadcast_in_dim(row_Q, shape, [0])


def _filled(value, shape, layout):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


# --- forward ------------------------------------------------------------------------------------------------------


def _attend_kernel(
    block_Y, used_1, q_AK, k_SK, v_SV, out_AV, lse_A, max_A, *, tiles, scale, step, q_RGQK, k_RNK, v_RNV, out_GQV,
    lse_GQ, max_GQ, q_full, q_empty, k_full, k_empty, v_full, v_empty,
):  # fmt: skip
    wg = lax.axis_index("wg")
    V, N, slots = v_SV.shape[1], step, q_RGQK.shape[0]
    dtype = q_AK.dtype

    @pl.when(wg == PRODUCER)
    def _produce():
        plgpu.set_max_registers(40, action="decrease")

        def one(here, tile, first_key, row, steps, so_far):
            _wait_free(here, q_empty, slots)
            _copy_rows(q_AK, q_RGQK, tile, _slot(here, slots), q_full)

            @pl.loop(0, steps)
            def _step(i):
                number, keys = so_far + i, pl.ds(first_key + i * N, N)
                slot = _slot(number)
                _wait_free(number, k_empty)
                plgpu.copy_gmem_to_smem(k_SK.at[keys], k_RNK.at[slot], k_full.at[slot])
                _wait_free(number, v_empty)
                plgpu.copy_gmem_to_smem(v_SV.at[keys], v_RNV.at[slot], v_full.at[slot])

        _walk(tiles, N, block_Y, used_1, one)

    @pl.when(wg < CONSUMERS)
    def _consume():
        plgpu.set_max_registers(232, action="increase")

        def one(here, tile, first_key, row, steps, so_far):
            q_slot = _slot(here, slots)
            plgpu.barrier_wait(q_full.at[q_slot])

            def kv_step(i, carry):
                acc_QV, max_Q, sum_Q = carry
                slot = _slot(so_far + i)
                plgpu.barrier_wait(k_full.at[slot])

                def logits(acc_QN):
                    plgpu.wgmma(acc_QN, q_RGQK.at[q_slot, wg], k_RNK.at[slot].transpose((1, 0)))
                    return acc_QN[...]

                s_QN = pl.run_scoped(logits, plgpu.ACC((ROWS, N), jnp.float32))
                plgpu.barrier_arrive(k_empty.at[slot])
                if tiles.heads_per_key is not None:
                    s_QN = jnp.where(_visible(tiles, s_QN.shape, row + wg * ROWS, i * N), s_QN, -jnp.inf)
                new_Q = jnp.maximum(max_Q, s_QN.max(axis=1))
                faded_Q = jnp.exp2((max_Q - new_Q) * (scale * LOG2E))
                p_QN = jnp.exp2(s_QN * (scale * LOG2E) - _over(new_Q * (scale * LOG2E), s_QN.shape))
                sum_Q = sum_Q * faded_Q + p_QN.sum(axis=1)
                p_QN = p_QN.astype(dtype)
                plgpu.barrier_wait(v_full.at[slot])

                def weighted(new_QV):
                    plgpu.wgmma(new_QV, p_QN, v_RNV.at[slot])
                    return new_QV[...]

                new_QV = pl.run_scoped(weighted, plgpu.ACC((ROWS, V), jnp.float32))
                plgpu.barrier_arrive(v_empty.at[slot])
                return acc_QV * _over(faded_Q, acc_QV.shape) + new_QV, new_Q, sum_Q

            begin = (
                _filled(0.0, (ROWS, V), plgpu.Layout.WGMMA), _filled(-jnp.inf, (ROWS,), ROW), _filled(0.0, (ROWS,), ROW)
            )  # fmt: skip
            acc_QV, max_Q, sum_Q = lax.fori_loop(0, steps, kv_step, begin)
            plgpu.barrier_arrive(q_empty.at[q_slot])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_GQV.at[wg][...] = (acc_QV * _over(1.0 / sum_Q, acc_QV.shape)).astype(dtype)
            lse_GQ.at[wg][...] = max_Q * scale + jnp.log(sum_Q)
            max_GQ.at[wg][...] = max_Q * scale
            plgpu.commit_smem()
            rows = pl.ds(tile * TILE + wg * ROWS, ROWS)
            plgpu.copy_smem_to_gmem(out_GQV.at[wg], out_AV.at[rows])
            plgpu.copy_smem_to_gmem(lse_GQ.at[wg], lse_A.at[rows])
            plgpu.copy_smem_to_gmem(max_GQ.at[wg], max_A.at[rows])

        _walk(tiles, N, block_Y, used_1, one)
        plgpu.wait_smem_to_gmem(0)


# --- the rows' gradient -------------------------------------------------------------------------------------------


def _rows_gradient_kernel(
    block_Y, used_1, q_AK, dout_AV, lse_A, delta_A, k_SK, v_SV, dq_AK, *, tiles, scale, step, q_RGQK, dout_RGQV, k_RNK,
    v_RNV, dq_GQK, q_full, q_empty, k_full, k_empty,
):  # fmt: skip
    wg = lax.axis_index("wg")
    K, N, slots = q_AK.shape[1], step, q_RGQK.shape[0]
    dtype = q_AK.dtype

    @pl.when(wg == PRODUCER)
    def _produce():
        plgpu.set_max_registers(40, action="decrease")

        def one(here, tile, first_key, row, steps, so_far):
            _wait_free(here, q_empty, slots)
            _copy_rows(q_AK, q_RGQK, tile, _slot(here, slots), q_full)
            _copy_rows(dout_AV, dout_RGQV, tile, _slot(here, slots), q_full)

            @pl.loop(0, steps)
            def _step(i):
                number, keys = so_far + i, pl.ds(first_key + i * N, N)
                slot = _slot(number)
                _wait_free(number, k_empty)
                plgpu.copy_gmem_to_smem(k_SK.at[keys], k_RNK.at[slot], k_full.at[slot])
                plgpu.copy_gmem_to_smem(v_SV.at[keys], v_RNV.at[slot], k_full.at[slot])

        _walk(tiles, N, block_Y, used_1, one)

    @pl.when(wg < CONSUMERS)
    def _consume():
        plgpu.set_max_registers(232, action="increase")

        def one(here, tile, first_key, row, steps, so_far):
            rows = pl.ds(tile * TILE + wg * ROWS, ROWS)
            lse_Q = plgpu.load(lse_A.at[rows], layout=ROW, optimized=False) * LOG2E
            delta_Q = plgpu.load(delta_A.at[rows], layout=ROW, optimized=False)
            q_slot = _slot(here, slots)
            plgpu.barrier_wait(q_full.at[q_slot])

            def kv_step(i, dq_QK):
                slot = _slot(so_far + i)
                plgpu.barrier_wait(k_full.at[slot])

                def products(s_QN, dp_QN):
                    plgpu.wgmma(s_QN, q_RGQK.at[q_slot, wg], k_RNK.at[slot].transpose((1, 0)))
                    plgpu.wgmma(dp_QN, dout_RGQV.at[q_slot, wg], v_RNV.at[slot].transpose((1, 0)))
                    return s_QN[...], dp_QN[...]

                acc = plgpu.ACC((ROWS, N), jnp.float32)
                s_QN, dp_QN = pl.run_scoped(products, acc, acc)
                p_QN = jnp.exp2(s_QN * (scale * LOG2E) - _over(lse_Q, s_QN.shape))
                if tiles.heads_per_key is not None:
                    p_QN = jnp.where(_visible(tiles, s_QN.shape, row + wg * ROWS, i * N), p_QN, 0.0)
                ds_QN = (p_QN * (dp_QN - _over(delta_Q, dp_QN.shape))).astype(dtype)

                plgpu.wgmma(dq_QK, ds_QN, k_RNK.at[slot])
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(k_empty.at[slot])

            def all_steps(dq_QK):
                pl.loop(0, steps)(functools.partial(kv_step, dq_QK=dq_QK))
                return dq_QK[...]

            dq_QK = pl.run_scoped(all_steps, plgpu.ACC((ROWS, K), jnp.float32))
            plgpu.barrier_arrive(q_empty.at[q_slot])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            dq_GQK.at[wg][...] = (dq_QK * scale).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(dq_GQK.at[wg], dq_AK.at[rows])

        _walk(tiles, N, block_Y, used_1, one)
        plgpu.wait_smem_to_gmem(0)
