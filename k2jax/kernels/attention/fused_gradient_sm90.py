"""The gradient of full causal attention for Hopper, in Pallas Mosaic GPU: dq, dk and dv from five products.

A block of the GPU takes 128 keys and values of one key head, half of them for each of two warpgroups, and keeps their
gradients in registers while a third warpgroup streams the rows of every query head past them, 64 at a time, the last
rows first. Logits and probabilities are computed once for all three gradients, as in FlashAttention-3 (arXiv
2407.08608): both warpgroups put ds into shared memory, and each multiplies all of it with half of the columns of the
keys. A fourth warpgroup adds these products to dq in global memory by copies that add. It does so in the order of the
units, each of which waits until the one before has added to the same rows, so the order of every sum is fixed. A block
waits only for one of a lower number: GPUs start blocks in the order of their numbers, so none waits forever, though
CUDA does not promise that order.

Legend: B batch, T queries = S keys, H query heads, G key heads, K = V query/key/value size, N keys of a warpgroup,
W warpgroups, Q rows of a step, E columns of dq of a warpgroup, R slots of two.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from k2jax.kernels.attention.keys_gradient_sm90 import KEYS, ROWS, UNIT, add_to_values, keys_seen
from k2jax.kernels.attention.tiles_sm90 import CONSUMERS, PRODUCER, TRANSFORMS, slot_of, wait_free

SLOTS = 2
SIZE = 128
COLUMNS = SIZE // CONSUMERS
ADDER = PRODUCER + 1
F32_TRANSFORMS = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
FEW_REGISTERS, MANY_REGISTERS = 24, 232  # The four warpgroups' sum is at most 512.


def fused_gradient(scale, own, k_BSGK, v_BSGV, *, interpret=None):
    """dq, dk and dv of full causal attention.

    Args:
      scale: of the logits.
      own: (q_BTHK, dout_BTHV, lse_BHT, delta_BHT), as for `tiles_sm90.rows_gradient`. The vectors are rounded up to
        whole tiles of 128 rows; lse is +inf behind the last query.
      k_BSGK, v_BSGV: bfloat16 or float16, K = V = 128.
      interpret: as in `tiles_sm90.attend`.

    Returns: dq_BTHK in float32, dk_BSGK and dv_BSGV.
    """
    (B, S, G, K), dtype = k_BSGK.shape, k_BSGK.dtype
    T, H = own[0].shape[1:3]
    if (T, K, v_BSGV.shape[-1]) != (S, SIZE, SIZE):
        raise ValueError(f"{T} queries of {S} keys of sizes {K}, {v_BSGV.shape[-1]}: built is T = S, sizes {SIZE}")
    pairs = plgpu.SMEM((SLOTS, ROWS, K), dtype, transforms=TRANSFORMS)
    vectors = plgpu.SMEM((SLOTS, ROWS), jnp.float32)
    kernel = plgpu.kernel(
        functools.partial(_kernel, scale=scale),
        out_type=(
            jax.ShapeDtypeStruct((B, T, H, K), jnp.float32),
            *(jax.ShapeDtypeStruct(k_BSGK.shape, dtype) for _ in range(2)),
        ),
        # The last axis is the slowest: units start in the order in which they add to dq.
        grid=(B * G, -(-S // UNIT)),
        grid_names=("head", "unit"),
        num_threads=CONSUMERS + 2,
        thread_name="wg",
        kernel_name="fused_gradient",
        interpret=interpret,
        scratch_types={
            "k_WNK": plgpu.SMEM((CONSUMERS, KEYS, K), dtype, transforms=TRANSFORMS),
            "v_WNV": plgpu.SMEM((CONSUMERS, KEYS, K), dtype, transforms=TRANSFORMS),
            "q_RQK": pairs,
            "dout_RQV": pairs,
            "lse_RQ": vectors,
            "delta_RQ": vectors,
            "ds_RWNQ": plgpu.SMEM((SLOTS, CONSUMERS, KEYS, ROWS), dtype, transforms=TRANSFORMS),
            "dq_RWQE": plgpu.SMEM((SLOTS, CONSUMERS, ROWS, COLUMNS), jnp.float32, transforms=F32_TRANSFORMS),
            "kv_full": plgpu.Barrier(num_arrivals=4),
            "full": plgpu.Barrier(num_arrivals=4, num_barriers=SLOTS),
            "empty": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=SLOTS),
            "met": plgpu.Barrier(num_arrivals=CONSUMERS),
            "dq_full": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=SLOTS),
            "dq_empty": plgpu.Barrier(num_arrivals=1, num_barriers=SLOTS),
        },
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    return kernel(*own, k_BSGK, v_BSGV)


class _Unit:
    """The keys of this block of the GPU, and which rows read them; scalars in registers."""

    def __init__(self, q_BTHK, k_BSGK):
        (_, T, self.num_heads, _), G = q_BTHK.shape, k_BSGK.shape[2]
        self.batch, self.key_head = (op(lax.axis_index("head"), jnp.int32(G)) for op in (lax.div, lax.rem))
        self.number, self.group = lax.axis_index("unit"), self.num_heads // G
        self.start = self.number * UNIT
        self.tiles = -(-T // ROWS)  # of a query head
        # Rows before the unit's first key see none of its keys, and rows from its last key on see all of them.
        self.steps = self.tiles - self.number * (UNIT // ROWS)
        self.clear_to = jnp.maximum(self.steps - UNIT // ROWS, 0)

    def keys_of(self, array, wg):
        return array.at[self.batch, pl.ds(self.start + wg * KEYS, KEYS), self.key_head]

    def tile_of(self, step):
        return self.tiles - 1 - step

    def rows_of(self, array, r, step):
        rows, head = pl.ds(self.tile_of(step) * ROWS, ROWS), self.key_head * self.group + r
        return array.at[self.batch, rows, head] if len(array.shape) == 4 else array.at[self.batch, head, rows]

    def columns_of(self, dq_BTHK, r, step, wg):
        rows, head = pl.ds(self.tile_of(step) * ROWS, ROWS), self.key_head * self.group + r
        return dq_BTHK.at[self.batch, rows, head, pl.ds(wg * COLUMNS, COLUMNS)]

    def turn_of(self, turns, r, step):
        head = self.batch * self.num_heads + self.key_head * self.group + r
        return turns.at[head * self.tiles + self.tile_of(step)]

    def walk(self, body):
        """body(query head of the key head, step, steps before it) for all steps."""

        @pl.loop(0, self.group)
        def _head(r):
            pl.loop(0, self.steps)(lambda i: body(r, i, r * self.steps + i))


def _kernel(
    q_BTHK, dout_BTHV, lse_BHT, delta_BHT, k_BSGK, v_BSGV, dq_BTHK, dk_BSGK, dv_BSGV, *, scale, k_WNK, v_WNV, q_RQK,
    dout_RQV, lse_RQ, delta_RQ, ds_RWNQ, dq_RWQE, kv_full, full, empty, met, dq_full, dq_empty,
):  # fmt: skip
    unit, wg = _Unit(q_BTHK, k_BSGK), lax.axis_index("wg")
    rings = (q_RQK, dout_RQV, lse_RQ, delta_RQ)
    # How many units have added to a tile of rows: zero before every call.
    turns = pl.get_global(plgpu.SemaphoreType.REGULAR((q_BTHK.shape[0] * unit.num_heads * unit.tiles,)))

    @pl.when(wg == PRODUCER)
    def _produce():
        plgpu.set_max_registers(FEW_REGISTERS, action="decrease")
        for i in range(CONSUMERS):
            plgpu.copy_gmem_to_smem(unit.keys_of(k_BSGK, i), k_WNK.at[i], kv_full)
            plgpu.copy_gmem_to_smem(unit.keys_of(v_BSGV, i), v_WNV.at[i], kv_full)
        arrays = (q_BTHK, dout_BTHV, lse_BHT, delta_BHT)

        def stream(r, i, number):
            wait_free(number, empty, SLOTS)
            slot = slot_of(number, SLOTS)
            for array, ring in zip(arrays, rings, strict=True):
                plgpu.copy_gmem_to_smem(unit.rows_of(array, r, i), ring.at[slot], full.at[slot])

        unit.walk(stream)

    @pl.when(wg == ADDER)
    def _add():
        plgpu.set_max_registers(FEW_REGISTERS, action="decrease")
        unit.walk(functools.partial(_add_in_turn, unit, dq_BTHK, dq_RWQE, turns, dq_full, dq_empty))

    @pl.when(wg < CONSUMERS)
    def _consume():
        plgpu.set_max_registers(MANY_REGISTERS, action="increase")
        plgpu.barrier_wait(kv_full)
        barriers = (full, empty, met, dq_full, dq_empty)

        def all_steps(dk_NK, dv_NV):
            step = functools.partial(
                _add_rows, unit=unit, wg=wg, scale=scale, keys=(k_WNK, v_WNV), sums=(dk_NK, dv_NV), rings=rings,
                ds_RWNQ=ds_RWNQ, dq_RWQE=dq_RWQE, barriers=barriers,
            )  # fmt: skip

            @pl.loop(0, unit.group)
            def _head(r):
                so_far = r * unit.steps
                pl.loop(0, unit.clear_to)(lambda i: step(i, so_far + i, masked=False))
                pl.loop(unit.clear_to, unit.steps)(lambda i: step(i, so_far + i, masked=True))

            return dk_NK[...], dv_NV[...]

        acc = plgpu.ACC((KEYS, SIZE), jnp.float32)
        dk_NK, dv_NV = pl.run_scoped(all_steps, acc, acc)
        _meet(met)  # The other warpgroup multiplied with these keys too.
        k_NK, v_NV = k_WNK.at[wg], v_WNV.at[wg]
        k_NK[...] = (dk_NK * scale).astype(k_BSGK.dtype)
        v_NV[...] = dv_NV.astype(v_BSGV.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_NK, unit.keys_of(dk_BSGK, wg))
        plgpu.copy_smem_to_gmem(v_NV, unit.keys_of(dv_BSGV, wg))
        plgpu.wait_smem_to_gmem(0)


def _meet(met):
    plgpu.barrier_arrive(met)
    plgpu.barrier_wait(met)


def _add_in_turn(unit, dq_BTHK, dq_RWQE, turns, dq_full, dq_empty, r, step, number):
    """Adds a step's product to dq once all units before this one have; the first one, which all rows see, stores it."""
    slot, turn = slot_of(number, SLOTS), unit.turn_of(turns, r, step)
    plgpu.barrier_wait(dq_full.at[slot])

    def copy(reduction_op):
        for i in range(CONSUMERS):
            columns = unit.columns_of(dq_BTHK, r, step, i)
            plgpu.copy_smem_to_gmem(dq_RWQE.at[slot, i], columns, reduction_op=reduction_op)

    pl.when(unit.number == 0)(lambda: copy(None))

    @pl.when(unit.number > 0)
    def _later():
        plgpu.semaphore_wait(turn, unit.number, decrement=False, memory_scope="gpu")
        copy("add")

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(dq_empty.at[slot])
    plgpu.wait_smem_to_gmem(0)  # What was written is seen by the unit whose turn is next.
    plgpu.semaphore_signal(turn, 1, memory_scope="gpu")


def _add_rows(i, number, masked, *, unit, wg, scale, keys, sums, rings, ds_RWNQ, dq_RWQE, barriers):
    """Adds what 64 rows send back, and hands over what the unit's keys send to half of the rows' columns."""
    (k_WNK, v_WNV), (dk_NK, dv_NV), (full, empty, met, dq_full, dq_empty) = keys, sums, barriers
    slot = slot_of(number, SLOTS)
    plgpu.barrier_wait(full.at[slot])
    rows = q_QK, *_ = [ring.at[slot] for ring in rings]

    def seen(shape):
        return keys_seen(shape, wg, unit.tile_of(i) * ROWS - unit.start)[1]

    own = (k_WNK.at[wg], v_WNV.at[wg])
    ds_NQ = add_to_values(own, rows, dv_NV, scale, seen if masked else None, tight=True)
    plgpu.wgmma(dk_NK, ds_NQ, q_QK)
    # Both warpgroups were done with this slot's last ds before they met in the step between.
    ds_RWNQ.at[slot, wg][...] = ds_NQ
    plgpu.commit_smem()
    _meet(met)

    def back(dq_QE):
        for j in range(CONSUMERS):
            columns = pl.ds(wg * COLUMNS, COLUMNS)
            plgpu.wgmma(dq_QE, ds_RWNQ.at[slot, j].transpose((1, 0)), k_WNK.at[j, :, columns])
        return dq_QE[...]

    dq_QE = pl.run_scoped(back, plgpu.ACC((ROWS, COLUMNS), jnp.float32))
    # The vectors' ordinary loads came before the last commit_smem, which orders them before the next copy.
    plgpu.barrier_arrive(empty.at[slot])
    wait_free(number, dq_empty, SLOTS)
    dq_RWQE.at[slot, wg][...] = dq_QE * scale
    plgpu.commit_smem()
    plgpu.barrier_arrive(dq_full.at[slot])
