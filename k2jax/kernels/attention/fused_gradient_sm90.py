"""The gradient of full attention for Hopper, in Pallas Mosaic GPU: dq, dk and dv from five products.

A block of the GPU takes 128 keys and values of one key head, half of them for each of two warpgroups, and keeps their
gradients in registers while rows of every query head stream past them, 64 at a time, the last rows first. Logits and
probabilities are computed once for all three gradients, as in FlashAttention-3 (arXiv 2407.08608): both warpgroups put
ds into shared memory, and each multiplies all of it with half of the columns of the keys. That happens one step late,
so that the warpgroups need not meet. Products are queued so that one is under way beside all else that a warpgroup
does: that of values and dout beside the exponentials, what is added to dv beside ds, and what is added to dk beside
handing dq over.

The third warpgroup's warps copy. One brings rows; two add the products to dq in global memory, by copies that add, and
in the order of the units, so that the order of every sum is fixed; the fourth watches whose turn it is. A block waits
only for one of a lower number: GPUs start blocks in the order of their numbers, so none waits forever, though CUDA does
not promise that order.

Legend: B batch, T queries, S keys, H query heads, G key heads, K = V query/key/value size, N keys of a warpgroup, W
warpgroups, Q rows of a step, Y their tiles, C columns of dq of a warpgroup, R ring slots, E words of a choice.
"""

import enum
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from k2jax.kernels.attention.keys_gradient_sm90 import COLUMN, KEYS, ROWS, UNIT, hidden_warpgroup, keys_seen, reach
from k2jax.kernels.attention.shares_sm90 import heads_at_a_time
from k2jax.kernels.attention.tiles_sm90 import CONSUMERS, LOG2E, PRODUCER, TRANSFORMS, slot_of, wait_free

SIZE = 128
COLUMNS = SIZE // CONSUMERS
SLOTS = 2
F32_TRANSFORMS = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
FEW_REGISTERS, MANY_REGISTERS = 24, 240  # The three warpgroups' sum is at most 512.


def fused_gradient(scale, own, k_BSGK, v_BSGV, *, starts=None, choice=None, interpret=None):
    """dq, dk and dv of full attention, or of its part that queries chose.

    Args:
      scale: of the logits.
      own: (q_BTHK, dout_BTHV, lse_BHT, delta_BHT), as for `tiles_sm90.rows_gradient`. The vectors are rounded up to
        whole tiles of 128 rows; lse is +inf behind the last query.
      k_BSGK, v_BSGV: bfloat16 or float16, K = V = 128.
      starts: the first key of every query, and where they lie if they are not as many as the keys, as in
        `tiles_sm90.attend`.
      choice: which blocks the queries see, as for `tiles_sm90.attend`; None for all.
      interpret: as in `tiles_sm90.attend`.

    Returns: dq_BTHK, dk_BSGK and dv_BSGV in the inputs' type. dq is summed in a float32 buffer of its own.
    """
    (B, S, G, K), dtype = k_BSGK.shape, k_BSGK.dtype
    T, H = own[0].shape[1:3]
    if (K, v_BSGV.shape[-1]) != (SIZE, SIZE) or (starts is None and T != S):
        raise ValueError(f"{T} queries of {S} keys of sizes {K}, {v_BSGV.shape[-1]}: built are {SIZE}, T = S or starts")
    if not (starts is None or choice is None):
        raise ValueError("starts and a choice: one of both is built")
    # With more of them a head's rows do not stay in the cache from unit to unit, with fewer its units wait for each
    # other. Units walk close behind each other, so only some of a head's rows lie between them: by measurement a
    # quarter of q and dout of one query head, and of packed documents, which are shorter than T, half as many.
    heads = heads_at_a_time(B * G, T * SIZE // (1 if starts is None else 2))
    kernel = plgpu.kernel(
        functools.partial(_kernel, scale=scale, block_size=choice and choice.block_size, has_starts=starts is not None),
        out_type=(
            jax.ShapeDtypeStruct((B, H, T, K), jnp.float32),
            *(jax.ShapeDtypeStruct(k_BSGK.shape, dtype) for _ in range(2)),
        ),
        # The last axis is the fastest: units start in the order in which they add to dq.
        grid=(B * G // heads, -(-S // UNIT), heads),
        grid_names=("heads", "unit", "head"),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        kernel_name="fused_gradient",
        interpret=interpret,
        scratch_types={
            "k_WNK": plgpu.SMEM((CONSUMERS, KEYS, K), dtype, transforms=TRANSFORMS),
            "v_WNV": plgpu.SMEM((CONSUMERS, KEYS, K), dtype, transforms=TRANSFORMS),
            "q_RQK": plgpu.SMEM((SLOTS, ROWS, K), dtype, transforms=TRANSFORMS),
            "dout_RQV": plgpu.SMEM((SLOTS, ROWS, K), dtype, transforms=TRANSFORMS),
            "ds_RWNQ": plgpu.SMEM((SLOTS, CONSUMERS, KEYS, ROWS), dtype, transforms=TRANSFORMS),
            "dq_RWQC": plgpu.SMEM((SLOTS, CONSUMERS, ROWS, COLUMNS), jnp.float32, transforms=F32_TRANSFORMS),
            "lse_delta_2RQ": plgpu.SMEM((2, SLOTS, ROWS), jnp.float32),  # Each array begins at a multiple of 1 KiB.
            "start_or_word_RQ": plgpu.SMEM((SLOTS, ROWS), jnp.int32),
            "kv_full": plgpu.Barrier(num_arrivals=4),
            "q_full": plgpu.Barrier(num_arrivals=2 if choice is None and starts is None else 3, num_barriers=SLOTS),
            "dout_full": plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
            "empty": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=SLOTS),
            "ds_full": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=SLOTS),
            "ds_empty": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=SLOTS),
            "dq_full": plgpu.Barrier(num_barriers=CONSUMERS * SLOTS),
            "dq_empty": plgpu.Barrier(num_barriers=CONSUMERS * SLOTS),
            "turn_come": plgpu.Barrier(num_barriers=SLOTS),
            "turn_taken": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=SLOTS),
        },
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,
            # No thread reads what it wrote: it goes to the tensor cores or to copies, ordered by barriers of ours.
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )
    q_BTHK, dout_BTHV, lse_BHT, delta_BHT = own
    more = () if choice is None else (choice.word_EBHT,)
    if starts is not None:
        # Vectors are rounded up to tiles of 128; a step of 64 rows behind the last one is nobody's.
        starts = starts._replace(start_BT=starts.start_BT[:, : -(-T // ROWS) * ROWS])
        more = (starts.start_BT, reach(starts, S))
    dq_BHTK, *keys = kernel(k_BSGK, v_BSGV, q_BTHK, lse_BHT * LOG2E, dout_BTHV, delta_BHT, *more)
    return (dq_BHTK * scale).astype(q_BTHK.dtype).swapaxes(1, 2), *keys


def is_built(q_shape, v_shape) -> bool:
    """Whether `fused_gradient` is built for these heads."""
    return (q_shape[3], v_shape[3]) == (SIZE, SIZE)


class _Unit:
    """The keys of this block of the GPU, and which rows read them; scalars in registers."""

    def __init__(self, q_BTHK, k_BSGK, start_BT=None, reach_BU6=None, block_size=None):
        (_, T, self.num_heads, _), G = q_BTHK.shape, k_BSGK.shape[2]
        head = lax.axis_index("heads") * lax.axis_size("head") + lax.axis_index("head")
        self.batch, self.key_head = (op(head, jnp.int32(G)) for op in (lax.div, lax.rem))
        self.number, self.group = lax.axis_index("unit"), self.num_heads // G
        self.start, self.start_BT = self.number * UNIT, start_BT
        self.tiles = -(-T // ROWS)  # of a query head
        if reach_BU6 is None:
            # Rows before the unit's first key see none of its keys, and rows from its last key on see all of them.
            self.first_tile, self.position = self.number * (UNIT // ROWS), jnp.int32(0)
            self.steps = self.tiles - self.first_tile
            clear_from, clear_to = jnp.minimum(UNIT // ROWS, self.steps), self.steps
        else:
            first_row, self.position, self.steps, clear_from, clear_to, self.first_key = (
                reach_BU6[self.batch, self.number, i] for i in range(6)
            )
            self.first_tile = lax.div(first_row, jnp.int32(ROWS))
        # Of the steps, which begin with the last rows, those whose rows see all keys from the same one on.
        self.clear_from, self.clear_to = self.steps - clear_to, self.steps - clear_from
        self.all_steps = self.group * self.steps
        # All of the unit's keys lie in one block: its bit in which word of a choice.
        self.word, self.bit = None, None
        if block_size is not None:
            block = lax.div(self.start, jnp.int32(block_size))
            self.word, self.bit = (op(block, jnp.int32(32)) for op in (lax.div, lax.rem))

    def keys_of(self, array, wg):
        return array.at[self.batch, pl.ds(self.start + wg * KEYS, KEYS), self.key_head]

    def tile_of(self, step):
        return self.first_tile + self.steps - 1 - step

    def position_of(self, step):
        """Of a step's first row, behind the unit's first key."""
        return self.position + (self.steps - 1 - step) * ROWS

    def units_before(self, step):
        """How many units add to a step's rows before this one."""
        if self.start_BT is None:
            return self.number
        # The first row of a tile sees the first key of all that its rows see.
        return self.number - lax.div(self.start_BT[self.batch, self.tile_of(step) * ROWS], jnp.int32(UNIT))

    def head_of(self, r):
        return self.key_head * self.group + r

    def rows_at(self, step):
        return pl.ds(self.tile_of(step) * ROWS, ROWS)

    def rows_of(self, array, r, step):
        """Of q or dout, or of a vector, or of starts."""
        rows, head = self.rows_at(step), self.head_of(r)
        places = {4: (self.batch, rows, head), 3: (self.batch, head, rows), 2: (self.batch, rows)}
        return array.at[places[len(array.shape)]]

    def columns_of(self, dq_BHTK, r, step, wg):
        return dq_BHTK.at[self.batch, self.head_of(r), self.rows_at(step), pl.ds(wg * COLUMNS, COLUMNS)]

    def turn_of(self, turns, r, step):
        return turns.at[(self.batch * self.num_heads + self.head_of(r)) * self.tiles + self.tile_of(step)]

    def walk(self, body):
        """body(query head of the key head, tile behind the last one, number of the step) for all steps."""
        pl.loop(0, self.all_steps)(lambda number: body(*self._place(number), number))

    def walk_rows(self, body):
        """body(tile behind the last one, number of the step, its mask) for all steps."""
        clear_from, clear_to = (x * self.group for x in (self.clear_from, self.clear_to))
        parts = [(Mask.NONE, jnp.int32(0), clear_to), (Mask.PAIRS, clear_to, self.all_steps)]
        if self.start_BT is not None:
            # A document's first unit adds to dq first, and all its others wait for it: its steps must not be slow
            # ones because another document ends in it.
            ends_to = jnp.where(self.first_key > 0, clear_to, clear_from)
            parts = [(Mask.ENDS, jnp.int32(0), ends_to), (Mask.NONE, ends_to, clear_to), *parts[1:]]
        for mask, begin, end in parts:
            step = functools.partial(lambda number, mask: body(self._place(number)[1], number, mask), mask=mask)
            # Where the compiler knows how a loop begins, it clears registers in every clear step, where a product could
            # begin without them, and waits for all products first (jax 0.11.2, CUDA 13.0).
            pl.loop(begin if mask is Mask.PAIRS else lax.optimization_barrier(begin), end)(step)

    def _place(self, number):
        """All heads of a tile of rows, then the next: all units read the same rows at about the same time. If each head
        were one walk, short units would wait at its end for the longest, whose turn comes first at the next head.
        """
        return lax.rem(number, jnp.int32(self.group)), lax.div(number, jnp.int32(self.group))


class Mask(enum.Enum):
    """What hides keys from a step's rows: nothing; ends of documents, the same keys from all rows and all keys from
    those behind the unit's last document; or what differs from pair to pair.
    """

    NONE = 0
    ENDS = 1
    PAIRS = 2


class _Shared(NamedTuple):
    """What is in shared memory, and the barriers."""

    k_WNK: object
    v_WNV: object
    q_RQK: object
    lse_delta_2RQ: object
    start_or_word_RQ: object
    dout_RQV: object
    ds_RWNQ: object
    dq_RWQC: object
    kv_full: object
    q_full: object
    dout_full: object
    empty: object
    ds_full: object
    ds_empty: object
    dq_full: object
    dq_empty: object
    turn_come: object
    turn_taken: object


def _kernel(k_BSGK, v_BSGV, q_BTHK, *refs, scale, block_size, has_starts, **shared):
    *rows, dq_BHTK, dk_BSGK, dv_BSGV = refs
    tables = ()
    if has_starts:
        *rows, reach_BU6 = rows
        tables = (rows[-1], reach_BU6)
    unit, wg, mem = _Unit(q_BTHK, k_BSGK, *tables, block_size=block_size), lax.axis_index("wg"), _Shared(**shared)
    # How many warps have added to a tile of rows: zero before every call.
    turns = pl.get_global(plgpu.SemaphoreType.REGULAR((q_BTHK.shape[0] * unit.num_heads * unit.tiles,)))

    @pl.when(wg == PRODUCER)
    def _copy():
        plgpu.set_max_registers(FEW_REGISTERS, action="decrease")

        def warps():
            warp = lax.axis_index("warp")
            pl.when(warp < CONSUMERS)(lambda: _add_in_turn(unit, warp, dq_BHTK, mem, turns))
            pl.when(warp == CONSUMERS)(lambda: _stream(unit, (k_BSGK, v_BSGV), (q_BTHK, *rows), mem))
            pl.when(warp == CONSUMERS + 1)(lambda: _watch_turns(unit, mem, turns))

        pl.kernel(warps, mesh=plgpu.WarpMesh(axis_name="warp"))()

    @pl.when(wg < CONSUMERS)
    def _consume():
        plgpu.set_max_registers(MANY_REGISTERS, action="increase")
        plgpu.barrier_arrive(mem.ds_empty.at[0])  # The first ds finds its place free.
        plgpu.barrier_wait(mem.kv_full)
        acc = plgpu.ACC((KEYS, SIZE), jnp.float32)
        dk_NK, dv_NV = pl.run_scoped(functools.partial(_all_steps, unit, mem, scale), acc, acc)
        # The other warpgroup multiplied with these keys too.
        plgpu.barrier_wait(mem.ds_empty.at[slot_of(unit.all_steps - 1 + SLOTS)])
        k_NK, v_NV = mem.k_WNK.at[wg], mem.v_WNV.at[wg]
        k_NK[...] = (dk_NK * scale).astype(k_BSGK.dtype)
        v_NV[...] = dv_NV.astype(v_BSGV.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_NK, unit.keys_of(dk_BSGK, wg))
        plgpu.copy_smem_to_gmem(v_NV, unit.keys_of(dv_BSGV, wg))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # The kernel's end waits for the writes.


# --- the copying warps --------------------------------------------------------------------------------------------


def _stream(unit, keys, rows, mem):
    """Copies the unit's keys and values, then the rows of all steps."""
    for array, part_WNK in zip(keys, (mem.k_WNK, mem.v_WNV), strict=True):
        for w in range(CONSUMERS):
            plgpu.copy_gmem_to_smem(unit.keys_of(array, w), part_WNK.at[w], mem.kv_full)
    q_BTHK, lse_BHT, dout_BTHV, delta_BHT, *more = rows
    more = [(x if unit.word is None else x.at[unit.word], mem.start_or_word_RQ) for x in more]
    parts = (
        (((q_BTHK, mem.q_RQK), (lse_BHT, mem.lse_delta_2RQ.at[0]), *more), mem.q_full),
        (((dout_BTHV, mem.dout_RQV), (delta_BHT, mem.lse_delta_2RQ.at[1])), mem.dout_full),
    )

    def one(r, i, number):
        wait_free(number, mem.empty)
        slot = slot_of(number)
        for pairs, full in parts:
            for array, ring in pairs:
                plgpu.copy_gmem_to_smem(unit.rows_of(array, r, i), ring.at[slot], full.at[slot])

    unit.walk(one)


def _watch_turns(unit, mem, turns):
    """Tells the adding warps when the units before this one have added to a step's rows; ahead of them, since a look
    into global memory takes long.
    """

    def one(r, i, number):
        wait_free(number, mem.turn_taken)

        units = unit.units_before(i)

        @pl.when(units > 0)
        def _wait():
            added = units * CONSUMERS
            plgpu.semaphore_wait(unit.turn_of(turns, r, i), added, decrement=False, memory_scope="gpu")

        plgpu.barrier_arrive(mem.turn_come.at[slot_of(number)])

    unit.walk(one)


def _add_in_turn(unit, warp, dq_BHTK, mem, turns):
    """Adds a warpgroup's columns of every step's product to dq; the first unit that the rows see stores them."""

    def one(r, i, number):
        slot, units = slot_of(number), unit.units_before(i)
        plgpu.barrier_wait(mem.turn_come.at[slot])
        plgpu.barrier_arrive(mem.turn_taken.at[slot])
        here = warp * SLOTS + slot
        plgpu.barrier_wait(mem.dq_full.at[here])

        def copy(reduction_op):
            columns = unit.columns_of(dq_BHTK, r, i, warp)
            plgpu.copy_smem_to_gmem(mem.dq_RWQC.at[slot, warp], columns, reduction_op=reduction_op)

        pl.when(units == 0)(lambda: copy(None))
        pl.when(units > 0)(lambda: copy("add"))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(mem.dq_empty.at[here])
        plgpu.wait_smem_to_gmem(0)  # What was written is seen by the unit whose turn is next.
        plgpu.semaphore_signal(unit.turn_of(turns, r, i), 1, memory_scope="gpu")

    for slot in range(SLOTS):
        plgpu.barrier_arrive(mem.dq_empty.at[warp * SLOTS + slot])  # The first products find their places free.
    unit.walk(one)


# --- the computing warpgroups -------------------------------------------------------------------------------------


class _Step(NamedTuple):
    """One step of a warpgroup."""

    unit: _Unit
    mem: _Shared
    scale: float
    number: object
    wg: object


def _all_steps(unit, mem, scale, dk_NK, dv_NV):
    """The unit's gradients: what every step adds to dk before scale, and to dv."""

    def body(i, number, mask):
        step = _Step(unit, mem, scale, number, hidden_warpgroup())
        _hand_over(step, _differentiate(step, dv_NV, i, mask))
        _multiply(step, dk_NK)

    unit.walk_rows(body)
    last = _Step(unit, mem, scale, unit.all_steps - 1, hidden_warpgroup())
    _wait_rows(last, last.number)

    def product(dq_QC):
        _queue_rows(last, last.number, dq_QC)
        _give_rows(last, last.number, dq_QC[...])

    pl.run_scoped(product, plgpu.ACC((ROWS, COLUMNS), jnp.float32))
    return dk_NK[...], dv_NV[...]


def _differentiate(step, dv_NV, i, mask):
    """ds, what the loss says of a step's logits; queues what the step adds to dv."""
    mem, slot = step.mem, slot_of(step.number)
    acc = plgpu.ACC((KEYS, ROWS), jnp.float32)
    plgpu.barrier_wait(mem.q_full.at[slot])
    # Vectors are loaded well before they are needed: loads wait for the tensor cores' own reads of shared memory.
    lse_Q = _subtracted(step, mask)

    def logits(s_NQ):
        plgpu.wgmma(s_NQ, mem.k_WNK.at[step.wg], mem.q_RQK.at[slot].transpose((1, 0)))
        plgpu.barrier_wait(mem.dout_full.at[slot])
        return pl.run_scoped(functools.partial(chances, s_NQ), acc)

    def chances(s_NQ, dp_NQ):
        plgpu.wgmma(dp_NQ, mem.v_WNV.at[step.wg], mem.dout_RQV.at[slot].transpose((1, 0)))
        s_NQ = plgpu.wgmma_accumulator_load(s_NQ, wait_n=1)
        delta_Q = plgpu.load(mem.lse_delta_2RQ.at[1, slot], layout=COLUMN)
        p_NQ = _probabilities(step, s_NQ, lse_Q, i, mask)

        @pl.when(step.number > 0)
        def _before():  # The products of the step before are done by now.
            plgpu.barrier_arrive(mem.empty.at[slot_of(step.number - 1 + SLOTS)])

        plgpu.wgmma(dv_NV, p_NQ.astype(mem.q_RQK.dtype), mem.dout_RQV.at[slot])
        dp_NQ = plgpu.wgmma_accumulator_load(dp_NQ, wait_n=1)
        ds_NQ = p_NQ * (dp_NQ - lax.broadcast_in_dim(delta_Q, dp_NQ.shape, [1]))
        return ds_NQ.astype(mem.q_RQK.dtype)

    return pl.run_scoped(logits, acc)


def _subtracted(step, mask):
    """The lse of a step's rows; infinite where they see no key of the unit: their probabilities are 0."""
    slot = slot_of(step.number)
    lse_Q = plgpu.load(step.mem.lse_delta_2RQ.at[0, slot], layout=COLUMN)
    if step.unit.bit is not None:
        word_Q = plgpu.load(step.mem.start_or_word_RQ.at[slot], layout=COLUMN)
        lse_Q = jnp.where(word_Q & lax.shift_left(jnp.int32(1), step.unit.bit) != 0, lse_Q, jnp.inf)
    if mask is Mask.ENDS:
        start_Q = plgpu.load(step.mem.start_or_word_RQ.at[slot], layout=COLUMN)
        lse_Q = jnp.where(start_Q < step.unit.start + UNIT, lse_Q, jnp.inf)
    return lse_Q


def _probabilities(step, s_NQ, lse_Q, i, mask):
    p_NQ = jnp.exp2(s_NQ * (step.scale * LOG2E) - lax.broadcast_in_dim(lse_Q, s_NQ.shape, [1]))
    if mask is Mask.NONE:
        return p_NQ
    key_NQ, seen_NQ = keys_seen(p_NQ.shape, step.wg, step.unit.position_of(i))
    if mask is Mask.ENDS:
        seen_NQ = key_NQ >= step.unit.first_key
    elif step.unit.start_BT is not None:
        start_Q = plgpu.load(step.mem.start_or_word_RQ.at[slot_of(step.number)], layout=COLUMN) - step.unit.start
        seen_NQ &= key_NQ >= lax.broadcast_in_dim(start_Q, key_NQ.shape, [1])
    return jnp.where(seen_NQ, p_NQ, 0.0)


def _hand_over(step, ds_NQ):
    """Puts ds where both warpgroups multiply with it."""
    mem, slot = step.mem, slot_of(step.number)
    plgpu.barrier_wait(mem.ds_empty.at[slot])  # The one but last ds lay here.
    mem.ds_RWNQ.at[slot, step.wg][...] = ds_NQ
    # This orders the vectors' ordinary loads before the next copies too.
    plgpu.commit_smem()
    plgpu.barrier_arrive(mem.ds_full.at[slot])


def _multiply(step, dk_NK):
    """Gives away what the ds of the step before adds to dq, and queues what the step's ds adds to dk.

    Before the first step there is no ds: what its product is does not matter, since nobody gets it.
    """
    mem, slot = step.mem, slot_of(step.number)
    _wait_rows(step, step.number - 1)

    def products(dq_QC):
        _queue_rows(step, step.number - 1, dq_QC)
        plgpu.wgmma(dk_NK, mem.ds_RWNQ.at[slot, step.wg], mem.q_RQK.at[slot])
        _give_rows(step, step.number - 1, plgpu.wgmma_accumulator_load(dq_QC, wait_n=1))

    pl.run_scoped(products, plgpu.ACC((ROWS, COLUMNS), jnp.float32))


def _wait_rows(step, number):
    pl.when(number >= 0)(lambda: plgpu.barrier_wait(step.mem.ds_full.at[slot_of(number + SLOTS)]))


def _queue_rows(step, number, dq_QC):
    """Half of the columns of what all of the unit's keys send to the rows of the step with this number."""
    mem, slot = step.mem, slot_of(number + SLOTS)
    for w in range(CONSUMERS):
        columns = pl.ds(step.wg * COLUMNS, COLUMNS)
        plgpu.wgmma(dq_QC, mem.ds_RWNQ.at[slot, w].transpose((1, 0)), mem.k_WNK.at[w, :, columns])


def _give_rows(step, number, dq_QC):
    """Gives a product to the adding warp, unless the step is none."""
    mem, wg, slot = step.mem, step.wg, slot_of(number + SLOTS)
    plgpu.barrier_arrive(mem.ds_empty.at[slot])

    @pl.when(number >= 0)
    def _give():
        here = wg * SLOTS + slot
        plgpu.barrier_wait(mem.dq_empty.at[here])
        mem.dq_RWQC.at[slot, wg][...] = dq_QC
        plgpu.commit_smem()
        plgpu.barrier_arrive(mem.dq_full.at[here])
