"""Attention of tiles of rows to one block of keys each, for Hopper, in Pallas Mosaic GPU; and the rows' gradient.

A tile is 128 rows of one query head that read the same block of keys: the block's own rows, which see it causally, or
rows that chose it, gathered from wherever they lie. Full attention is one block; where documents are packed, or blocks
begin anywhere, every row of it has a first key (`Starts`). A persistent grid: each block of the GPU walks over its
share of the tiles with three warpgroups. One only starts copies, of rows through one ring in shared memory and of keys
and values through another, ahead of the others and across the ends of tiles. Each of the other two computes 64
rows in registers (the online softmax of FlashAttention-2, arXiv 2307.08691, algorithm 1 and, for the gradient, section
3.1.2), then stores them while its next operands already arrive. What a copy reads behind the last token is zero, what
it writes there is dropped.

Legend: B batch, T queries = S keys, H query heads, G key heads, X = B * T * H, P places of gathered rows (Y tiles of
128), K query/key size, V value size, C keys of a block, D blocks, Q rows of a warpgroup, W warpgroups, N keys of a
step, R ring slots, E words of a choice, L places of a share, M multiprocessors.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from k2jax.kernels.attention import gather_sm90 as gather
from k2jax.kernels.attention import pace_sm90 as pace
from k2jax.kernels.attention import tickets_sm90
from k2jax.kernels.attention.shares_sm90 import fits_into_cache, heads_at_a_time, most_steps, shares_of_tiles

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
LOWEST = -1e30  # Below every logit, and finite when it is scaled.
ROW = plgpu.Layout.WGMMA.reduce(1)
# Of queries and keys, and of values, what the kernels are built for.
HEAD_SIZES = ((64, 64), (128, 128), (192, 128))
DTYPES = ("bfloat16", "float16")


class Starts(NamedTuple):
    """The first key that each query sees, where that is not its block's first one."""

    start_BT: jax.Array  # int32, T rounded up to a tile
    position_B: jax.Array  # of the first query among the keys; [1] where all rows share it


class Chosen(NamedTuple):
    """Queries that chose a block, sorted by block into tiles."""

    index_P: jax.Array  # which row of the queries is at each place, X or more where there is none
    block_Y: jax.Array  # (b * G + g) * D + n of each tile
    used_1: jax.Array  # how many tiles there are


class Choice(NamedTuple):
    """The blocks that each query sees of the keys up to itself: of block n, bit n % 32 of its word n // 32."""

    word_EBHT: jax.Array  # int32, E words of each query, T rounded up to a tile
    block_size: int  # a multiple of 128


def starts_of(start_BT, position_B) -> Starts:
    """Starts from the first key of each query, int32 [B, T] and rising along T, and the first query's position, [B] or
    [1] or a scalar.
    """
    B, T = start_BT.shape
    position_B = jnp.asarray(position_B, jnp.int32).reshape(-1)
    # What is behind the last query sees itself.
    behind_BT = jnp.broadcast_to(position_B[:, None] + jnp.arange(T, padded(T), dtype=jnp.int32), (B, padded(T) - T))
    return Starts(jnp.concatenate([start_BT, behind_BT], axis=1), position_B)


def padded(length: int) -> int:
    """The length that vectors over tokens have here: whole tiles."""
    return -(-length // TILE) * TILE


def attend(
    scale, block_size, q, k_BSGK, v_BSGV, chosen=None, *, starts=None, choice=None, num_keys=None, num_sms=None,
    interpret=None,
):  # fmt: skip
    """Softmax attention of every row to its tile's block, as far as the block alone goes.

    Args:
      scale: of the logits; positive.
      block_size: C, a multiple of 128.
      q: q_BTHK, whose rows read their own block, or q_XK, of which those of `chosen` read theirs; bfloat16 or float16.
      k_BSGK, v_BSGV: in the same type; query head h reads key head h // (H // G).
      chosen: for q_XK, which of its rows read which block. The results of tiles that are not used are undefined.
      starts: for q_BTHK, the first key of every query, and where they lie if they are not as many as the keys;
        `block_size` is then that of one block for all keys.
      choice: for q_BTHK, which parts of their block the queries see; each sees at least the part that it is in.
      num_keys: for q_XK, how many of a block's keys there are, from the first one on; None for all.
      num_sms: blocks that run at a time; None asks the default device.
      interpret: `plgpu.InterpretGPUParams()` runs it on a CPU, slowly.

    Returns: out_BTHV or out_PV in the inputs' type; the logarithm of the softmax's denominator and the largest logit of
      every row in float32 (after scale, natural log): [P], or [B, H, T rounded up to a tile], of which what is behind T
      means nothing.
    """
    K, V, dtype = q.shape[-1], v_BSGV.shape[-1], q.dtype
    step, slots, outs = _fit(((128, 2, CONSUMERS), (128, 1, 1)), TILE * K, SLOTS * (K + V), ROWS * V)
    row = jax.ShapeDtypeStruct(_vector_shape(q, chosen), jnp.float32)
    work = _Work(q, k_BSGK, V, block_size, step, starts, num_keys, choice and choice.block_size)
    share_LM, parts = work.shares(num_sms)
    kernel = _persistent(
        "attend",
        functools.partial(_attend_kernel, work=work, parts=parts, scale=scale),
        out_type=(jax.ShapeDtypeStruct((*_rows_shape(q, chosen), V), dtype), row, row),
        num_sms=num_sms,
        interpret=interpret,
        scratch={
            "q_RWQK": ring_of_rows((slots, CONSUMERS, ROWS, K), dtype, chosen),
            "k_RNK": plgpu.SMEM((SLOTS, step, K), dtype, transforms=TRANSFORMS),
            "v_RNV": plgpu.SMEM((SLOTS, step, V), dtype, transforms=TRANSFORMS),
            "out_WQV": plgpu.SMEM((outs, ROWS, V), dtype, transforms=TRANSFORMS),
            "lse_max_2WQ": plgpu.SMEM((2, CONSUMERS, ROWS), jnp.float32),  # Each array begins at a multiple of 1 KiB.
            "q_full": _full_of_rows(1, slots, chosen),
            "q_empty": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=slots),
            "k_full": plgpu.Barrier(num_barriers=SLOTS),
            "k_empty": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=SLOTS),
            "v_full": plgpu.Barrier(num_barriers=SLOTS),
            "v_empty": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=SLOTS),
            "turn": plgpu.Barrier(num_barriers=CONSUMERS),
            "out_free": plgpu.Barrier(num_barriers=CONSUMERS),
            **work.scratch(),
        },
    )
    return kernel(*_tables(chosen, starts, choice), share_LM, q, k_BSGK, v_BSGV)


def rows_gradient(
    scale, block_size, q, dout, lse, delta, k_BSGK, v_BSGV, chosen=None, *, starts=None, num_keys=None, num_sms=None,
    interpret=None,
):  # fmt: skip
    """The part of dq that comes from each row's tile's block.

    Args: as `attend`; dout like q; lse of the whole row, +inf for a row that is none, and delta, the sum of dout * out,
      in float32 and of the shape of `attend`'s vectors.

    Returns: dq_BTHK or dq_PK.
    """
    K, V, dtype = q.shape[-1], v_BSGV.shape[-1], q.dtype
    step, slots, outs = _fit(((64, 2, CONSUMERS), (64, 1, CONSUMERS)), TILE * (K + V), SLOTS * (K + V), ROWS * K)
    work = _Work(q, k_BSGK, V, block_size, step, starts, num_keys)
    share_LM, _ = work.shares(num_sms)  # Keeping pace was measured forward alone.
    kernel = _persistent(
        "rows_gradient",
        functools.partial(_rows_gradient_kernel, work=work, scale=scale),
        out_type=jax.ShapeDtypeStruct((*_rows_shape(q, chosen), K), dtype),
        num_sms=num_sms,
        interpret=interpret,
        scratch={
            "q_RWQK": ring_of_rows((slots, CONSUMERS, ROWS, K), dtype, chosen),
            "dout_RWQV": ring_of_rows((slots, CONSUMERS, ROWS, V), dtype, chosen),
            "k_RNK": plgpu.SMEM((SLOTS, step, K), dtype, transforms=TRANSFORMS),
            "v_RNV": plgpu.SMEM((SLOTS, step, V), dtype, transforms=TRANSFORMS),
            "dq_WQK": plgpu.SMEM((outs, ROWS, K), dtype, transforms=TRANSFORMS),
            "q_full": _full_of_rows(2, slots, chosen),
            "q_empty": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=slots),
            "k_full": plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
            "k_empty": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=SLOTS),
            **work.scratch(),
        },
    )
    return kernel(*_tables(chosen, starts), share_LM, q, dout, lse, delta, k_BSGK, v_BSGV)


# --- what both kernels share --------------------------------------------------------------------------------------


def _fit(choices, per_slot, per_key, per_out):
    """The first (keys of a step, slots for rows, buffers for results) that fit, of so many numbers of 2 bytes each."""
    return next((n, r, w) for n, r, w in choices if 2 * (r * per_slot + n * per_key + w * per_out) <= SHARED_MEMORY)


def _rows_shape(q, chosen):
    return q.shape[:-1] if chosen is None else chosen.index_P.shape


def _vector_shape(q, chosen):
    """Of one number per row: whole tiles, since copies of vectors begin at multiples of 16 bytes."""
    return (q.shape[0], q.shape[2], padded(q.shape[1])) if chosen is None else chosen.index_P.shape


def ring_of_rows(shape, dtype, chosen):
    tiled = plgpu.SMEM(shape, dtype, transforms=TRANSFORMS)
    return tiled if chosen is None else gather.with_lines(tiled)


def _full_of_rows(arrays, slots, chosen):
    if chosen is None:
        return plgpu.Barrier(num_arrivals=arrays * CONSUMERS, num_barriers=slots)
    return gather.barrier_scratch(slots)


def _tables(chosen, starts, choice=None):
    """Three tables for `_Work.walk`; where rows read their own block from its start, none is read."""
    nothing = jnp.zeros(1, jnp.int32)
    if choice is not None:
        return choice.word_EBHT, nothing, nothing
    if starts is not None:
        return starts.start_BT, starts.position_B, nothing
    return (nothing,) * 3 if chosen is None else (chosen.block_Y, chosen.used_1, chosen.index_P)


def blocks_at_a_time(num_sms):
    """How many blocks of the GPU run at a time; None: as many as the default device has multiprocessors."""
    return jax.devices()[0].core_count if num_sms is None else num_sms


def _persistent(name, body, *, out_type, num_sms, interpret, scratch):
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=(blocks_at_a_time(num_sms),),
        grid_names=("sm",),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        kernel_name=name,
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,  # Rows are reduced within a quarter of a warp; the rings need the memory.
            # Written for these semantics: every layout in shared memory is stated, none is inferred.
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )


@dataclasses.dataclass(frozen=True)
class _Tile:
    """One tile: how to find its rows and keys, and what it sees. Static, or scalars in registers."""

    rows_of: Callable  # (array of rows or vectors, first row, number of rows) -> part of the array
    keys_of: Callable  # (array of keys, first key, number of keys) -> part of the array
    steps: object  # over its keys
    clear_from: object  # the first step in which no row has still to begin; None where all begin with the first
    clear_to: Callable  # (first row of a warpgroup) -> the first step with keys that some of its rows do not see
    # (first row) -> (shape, step) -> whether each row sees each key; None if all see all
    sees: Callable | None
    # (first row) -> (step) -> whether each row chose the block of the step's keys; None where there is no choice
    chooses: Callable | None = None


class _Work:
    """Which tiles there are, and in which order."""

    def __init__(self, q, k_BSGK, value_size, block_size, step, starts, num_keys, choice_size=None):
        self.num_batch, self.length, self.num_key_heads, key_size = k_BSGK.shape
        self.num_rows, self.num_heads = q.shape[1:3] if q.ndim == 4 else (0, None)  # None: rows that chose their block
        self.block_size, self.step, self.choice_size = block_size, step, choice_size
        self.num_keys = block_size if num_keys is None else num_keys
        self.bytes_of_a_head = 2 * self.length * (key_size + value_size)
        self.gathers, self.has_starts = self.num_heads is None, starts is not None

    def scratch(self):
        return tickets_sm90.scratch(CONSUMERS) if self.has_starts else {}

    def shares(self, num_sms):
        """Of rows that read their own block, `shares_of_tiles`, where it is known how many keys they see. And in how
        many parts to keep pace over one block for all that the cache cannot hold, or 0.
        """
        if self.gathers or self.has_starts:
            return jnp.zeros((1, 1), jnp.int32), 0
        rows = range(0, padded(self.num_rows), TILE)
        steps = tuple((row % self.block_size + TILE - 1) // self.step + 1 for row in rows)
        num_key_heads, group = self.num_batch * self.num_key_heads, self.num_heads // self.num_key_heads
        share_LM = shares_of_tiles(num_key_heads, group, steps, self.bytes_of_a_head, blocks_at_a_time(num_sms))
        is_near = self.block_size < self.length or fits_into_cache(self.bytes_of_a_head)
        return jnp.asarray(share_LM), 0 if is_near else pace.parts_of(most_steps(share_LM, steps))

    def walk(self, tables, body, tickets, copies=False):
        """body(number here, tile, steps so far) for each tile of ours; the number of their steps. All warpgroups count
        the same.

        tickets: what `scratch` asked for. copies: whether this warpgroup is the one that copies.
        """
        table, table_2, _, share_LM = tables

        def one(here, number, so_far):
            if self.gathers:
                tile = self._chosen(table, number)
            else:
                starts = (table, table_2) if self.has_starts else (None, None)
                tile = self._own(number, *starts, table if self.choice_size else None)
            body(here, tile, so_far)
            return so_far + tile.steps

        if self.gathers:
            return walk_share(table_2[0], one)
        if not self.has_starts:
            return walk_given(share_LM, one)

        def of_ticket(here, ticket, so_far):
            return one(here, self._number(ticket), so_far)

        total = self.num_batch * self.num_heads * (padded(self.num_rows) // TILE)
        return tickets_sm90.walk(tickets_sm90.Tickets(**tickets), total, of_ticket, draws=copies)

    def _number(self, ticket):
        """The tile of a ticket: key heads take turns, and of these the last rows, which see most keys, are first."""
        num_tiles, group = padded(self.num_rows) // TILE, self.num_heads // self.num_key_heads
        heads = heads_at_a_time(self.num_batch * self.num_key_heads, self.bytes_of_a_head) * group
        rest, turn = split(ticket, heads * num_tiles)
        head, tiles_behind = split(rest, heads)
        return (turn * heads + head) * num_tiles + (num_tiles - 1 - tiles_behind)

    def _own(self, number, start_BT, position_B, word_EBHT):
        tile, batch_head = split(number, padded(self.num_rows) // TILE)
        head, batch = split(batch_head, self.num_heads)
        first_row, N = tile * TILE, jnp.int32(self.step)
        block = lax.div(first_row, jnp.int32(self.block_size))
        key_head = lax.div(head, jnp.int32(self.num_heads // self.num_key_heads))
        first_key, position = block * self.block_size, first_row
        if start_BT is not None:
            # Starts rise: the first row's is the first key of all, and behind the last one's all have begun.
            first_key = lax.div(start_BT[batch, first_row], jnp.int32(TILE)) * TILE
            last_start = start_BT[batch, first_row + (TILE - 1)]
            position = position_B[batch if position_B.shape[0] > 1 else 0] + first_row
        row = position - first_key  # from here on, rows and keys count from the first key

        def rows_of(array, first, size):
            rows = pl.ds(first_row + first, size)
            return array.at[batch, rows, head] if len(array.shape) == 4 else array.at[batch, head, rows]

        def sees(first):
            start_Q = None
            if start_BT is not None:  # Read once, and well before it is needed.
                rows = pl.ds(first_row + first, ROWS)
                start_Q = plgpu.load(start_BT.at[batch, rows], layout=ROW, optimized=False) - first_key

            def seen(shape, step):
                row_QN = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
                key_QN = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA) + step * self.step
                seen_QN = row_QN + (row + first) >= key_QN
                return seen_QN if start_Q is None else seen_QN & (key_QN >= over_rows(start_Q, shape))

            return seen

        def chooses(first):
            rows = pl.ds(first_row + first, ROWS)
            words = [
                plgpu.load(word_EBHT.at[e, batch, head, rows], layout=ROW, optimized=False)
                for e in range(word_EBHT.shape[0])
            ]

            def chose(step):
                here = lax.div(step * self.step, jnp.int32(self.choice_size))
                word_Q = words[0]
                for e in range(1, len(words)):
                    word_Q = jnp.where(here >= 32 * e, words[e], word_Q)
                return (word_Q & lax.shift_left(jnp.int32(1), lax.rem(here, jnp.int32(32)))) != 0

            return chose

        steps = lax.div(row + (TILE - 1), N) + 1
        clear_from = None
        if start_BT is not None:
            clear_from = jnp.minimum(lax.div(last_start - first_key + (N - 1), N), steps)
        return _Tile(
            rows_of,
            self._keys_of(batch, key_head, first_key),
            steps,
            clear_from,
            lambda first: jnp.maximum(lax.div(row + first + 1, N), jnp.int32(0) if clear_from is None else clear_from),
            sees,
            None if word_EBHT is None else chooses,
        )

    def _chosen(self, block_Y, number):
        num_blocks = -(-self.length // self.block_size)
        block, batch_head = split(block_Y[number], num_blocks)
        key_head, batch = split(batch_head, self.num_key_heads)
        steps = -(-self.num_keys // self.step)

        def rows_of(array, first, size):
            return array.at[pl.ds(number * TILE + first, size)]

        def seen(shape, step):
            key_QN = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
            return key_QN + step * self.step < self.num_keys

        return _Tile(
            rows_of,
            self._keys_of(batch, key_head, block * self.block_size),
            jnp.int32(steps),
            None,
            lambda first: jnp.int32(self.num_keys // self.step),
            (lambda first: seen) if self.num_keys % self.step else None,
        )

    def _keys_of(self, batch, key_head, first_key):
        return lambda array, first, size: array.at[batch, pl.ds(first_key + first, size), key_head]


def _over_keys(tile, first_row, begin, step, steps):
    """fori_loop of step(i, carry, masked) over the first steps of a tile, masked where rows from `first_row` on miss
    some keys.
    """
    if tile.sees is None:
        return lax.fori_loop(0, steps, functools.partial(step, masked=False), begin)
    clear_to = jnp.minimum(tile.clear_to(first_row), steps)
    carry, clear_from = begin, 0
    if tile.clear_from is not None:
        clear_from = jnp.minimum(tile.clear_from, steps)
        carry = lax.fori_loop(0, clear_from, functools.partial(step, masked=True), carry)
    carry = lax.fori_loop(clear_from, clear_to, functools.partial(step, masked=False), carry)
    return lax.fori_loop(clear_to, steps, functools.partial(step, masked=True), carry)


def walk_share(total, body):
    """so_far = body(number here, number, so_far), from 0 on, for this multiprocessor's share of `total` tiles.

    Forth and back, because tiles get shorter: who has the longest one of a round has the shortest of the next.

    Returns: the last so_far.
    """
    first, stride = lax.axis_index("sm"), lax.axis_size("sm")

    def place(here):
        return jnp.where(lax.rem(here, jnp.int32(2)) == 0, first, stride - 1 - first)

    rounds = lax.div(jnp.int32(total), jnp.int32(stride))
    has_one_more = place(rounds) < total - rounds * stride
    share = rounds + has_one_more.astype(jnp.int32)
    return lax.fori_loop(0, share, lambda here, so_far: body(here, here * stride + place(here), so_far), jnp.int32(0))


def walk_given(share_LM, body):
    """The same for the tiles that `shares_of_tiles` gives to this multiprocessor."""
    sm = lax.axis_index("sm")

    def one(here, carry):
        number, so_far = carry
        # Read well before it is needed.
        following = share_LM[jnp.minimum(here + 2, share_LM.shape[0] - 1), sm]
        return following, body(here, number, so_far)

    return lax.fori_loop(0, share_LM[0, sm], one, (share_LM[1, sm], jnp.int32(0)))[1]


def split(number, inner):
    """(inner index, outer index) of a number that counts outer, inner."""
    return lax.rem(number, jnp.int32(inner)), lax.div(number, jnp.int32(inner))


def slot_of(number, slots=SLOTS):
    return lax.rem(number, jnp.int32(slots))


def wait_free(number, empty, slots=SLOTS):
    @pl.when(number >= slots)
    def _():
        plgpu.barrier_wait(empty.at[slot_of(number, slots)])


def _stream(work, parts, tables, tickets, rows, row_barriers, keys):
    """Copies the rows of every tile, (array, ring, its lines) each, and then its keys step by step, (array, ring, full,
    empty).

    empty is None where a ring shares the barriers of the one before.
    """
    full, empty = row_barriers
    slots = empty.shape[0]
    passed_P = pace.counters(parts) if parts else None

    def copy_keys(tile, so_far):
        @pl.loop(0, tile.steps)
        def _step(i):
            number, N = so_far + i, work.step
            slot = slot_of(number)
            if parts:
                pace.begin_step(passed_P, parts, number)
            for array, ring, keys_full, keys_empty in keys:
                if keys_empty is not None:
                    wait_free(number, keys_empty)
                plgpu.copy_gmem_to_smem(tile.keys_of(array, i * N, N), ring.at[slot], keys_full.at[slot])

    def one(here, tile, so_far):
        wait_free(here, empty, slots)
        slot = slot_of(here, slots)
        for array, ring, _ in rows:
            for wg in range(CONSUMERS):
                plgpu.copy_gmem_to_smem(tile.rows_of(array, wg * ROWS, ROWS), ring.at[slot, wg], full.at[slot])
        copy_keys(tile, so_far)

    def by_warp(warp):
        """Each warp copies a quarter of every tile's rows; the first one copies keys too."""

        def one(here, tile, so_far):
            wait_free(here, empty, slots)
            slot, share = slot_of(here, slots), TILE // gather.WARPS
            indices = tile.rows_of(tables[2], warp * share, share)
            gather.copy_rows(rows, indices, 0, share, slot * TILE + warp * share, full, slot)
            pl.when(warp == 0)(lambda: copy_keys(tile, so_far))

        work.walk(tables, one, tickets)

    if work.gathers:
        gather.by_warps(by_warp)
        return
    steps = work.walk(tables, one, tickets, copies=True)
    if parts:
        pace.end(passed_P, parts, steps)


def _begin(work, full, ring):
    if work.gathers:
        gather.begin(full, ring.shape[0])


def _wait_rows(work, full, here, ring):
    slots = ring.shape[0]
    if work.gathers:
        gather.wait(full, here, slots)
    else:
        plgpu.barrier_wait(full.at[slot_of(here, slots)])


def over_rows(row_Q, shape):
    return lax.broadcast_in_dim(row_Q, shape, [0])


def filled(value, shape, layout):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


# --- forward ------------------------------------------------------------------------------------------------------


def _attend_kernel(
    table, table_2, index_P, share_LM, q, k_BSGK, v_BSGV, out, lse, largest, *, work, parts, scale, q_RWQK, k_RNK,
    v_RNV, out_WQV, lse_max_2WQ, q_full, q_empty, k_full, k_empty, v_full, v_empty, turn, out_free, **tickets,
):  # fmt: skip
    wg, tables = lax.axis_index("wg"), (table, table_2, index_P, share_LM)
    q_RWQK, q_lines = gather.views(q_RWQK, work.gathers)
    _begin(work, q_full, q_RWQK)

    @pl.when(wg == PRODUCER)
    def _produce():
        plgpu.set_max_registers(40, action="decrease")

        keys = [(k_BSGK, k_RNK, k_full, k_empty), (v_BSGV, v_RNV, v_full, v_empty)]
        _stream(work, parts, tables, tickets, [(q, q_RWQK, q_lines)], (q_full, q_empty), keys)

    @pl.when(wg < CONSUMERS)
    def _consume():
        plgpu.set_max_registers(232, action="increase")

        @pl.when(wg == 1)
        def _first():
            plgpu.barrier_arrive(turn.at[0])
            plgpu.barrier_arrive(out_free.at[0])

        ring = _KeyRing(k_RNK, v_RNV, k_full, k_empty, v_full, v_empty)
        one_out = out_WQV.shape[0] == 1  # for both, one after the other

        def one(here, tile, so_far):
            q_slot = slot_of(here, q_RWQK.shape[0])
            _wait_rows(work, q_full, here, q_RWQK)
            rows = (wg, q_RWQK.at[q_slot, wg], q_empty.at[q_slot])
            acc_QV, max_Q, sum_Q = _attend_tile(tile, so_far, rows, ring, turn, scale)
            if one_out:
                plgpu.barrier_wait(out_free.at[wg])
            else:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_QV = out_WQV.at[0 if one_out else wg]
            out_QV[...] = (acc_QV * over_rows(1.0 / sum_Q, acc_QV.shape)).astype(q.dtype)
            lse_max_2WQ.at[0, wg][...] = max_Q * scale + jnp.log(sum_Q)
            lse_max_2WQ.at[1, wg][...] = max_Q * scale
            plgpu.commit_smem()
            for array, part in ((out, out_QV), (lse, lse_max_2WQ.at[0, wg]), (largest, lse_max_2WQ.at[1, wg])):
                plgpu.copy_smem_to_gmem(part, tile.rows_of(array, wg * ROWS, ROWS))
            if one_out:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(out_free.at[1 - wg])

        work.walk(tables, one, tickets)

        @pl.when(wg == 0)
        def _last():
            plgpu.barrier_wait(turn.at[0])
            plgpu.barrier_wait(out_free.at[0])

        plgpu.wait_smem_to_gmem(0)


class _KeyRing(NamedTuple):
    """Keys and values of the steps, and their barriers."""

    k_RNK: object
    v_RNV: object
    k_full: object
    k_empty: object
    v_full: object
    v_empty: object


def _attend_tile(tile, so_far, rows, ring, turn, scale):
    """The sum of a warpgroup's rows over a tile's keys: (sum_QV, largest logit before scale, denominator).

    The warpgroups take turns at handing products to the tensor cores, so that one is at its exponentials meanwhile.
    """
    (wg, q_QK, q_empty), dtype = rows, ring.k_RNK.dtype
    N, V, last = ring.k_RNK.shape[1], ring.v_RNV.shape[2], tile.steps - 1
    sees, chose = (None if of is None else of(wg * ROWS) for of in (tile.sees, tile.chooses))

    def pass_turn():
        plgpu.barrier_arrive(turn.at[1 - wg])

    def wait_for_keys(i):
        # Before the sum of their logits begins: behind a wait the compiler clears the sum's registers, for nothing.
        plgpu.barrier_wait(ring.k_full.at[slot_of(so_far + i)])

    def multiply(i, s_QN, weighted=None):
        """Adds the logits of step i to s, and to a sum (sum_QV, p_QN) what p weighs of the values before it.

        One after the other on the tensor cores, with nothing to do in between.
        """
        slot, before = slot_of(so_far + i), slot_of(so_far + i - 1)
        if weighted is not None:
            sum_QV, p_QN = weighted
            plgpu.wgmma(sum_QV, p_QN, ring.v_RNV.at[before])
        plgpu.wgmma(s_QN, q_QK, ring.k_RNK.at[slot].transpose((1, 0)))
        pass_turn()
        if weighted is not None:
            plgpu.wgmma_wait(1)
            plgpu.barrier_arrive(ring.v_empty.at[before])
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(ring.k_empty.at[slot])

    def soften(i, carry, masked):
        seen_QN = sees(carry[0].shape, i) if masked else None
        softened = _soften(carry, seen_QN, None if chose is None else chose(i), scale, dtype)
        plgpu.barrier_wait(ring.v_full.at[slot_of(so_far + i)])
        plgpu.barrier_wait(turn.at[wg])
        return softened

    def kv_step(i, carry, masked):
        p_QN, acc_QV, max_Q, sum_Q = soften(i, carry, masked)
        wait_for_keys(i + 1)

        def logits(s_QN):
            added = pl.run_state(lambda sum_QV: multiply(i + 1, s_QN, (sum_QV, p_QN)))
            return added(plgpu.ACC.init(acc_QV)), s_QN[...]

        acc_QV, s_QN = pl.run_scoped(logits, plgpu.ACC((ROWS, N), jnp.float32))
        return s_QN, acc_QV, max_Q, sum_Q

    def first_logits(s_QN):
        multiply(0, s_QN)
        return s_QN[...]

    plgpu.barrier_wait(turn.at[wg])
    wait_for_keys(0)
    s_QN = pl.run_scoped(first_logits, plgpu.ACC((ROWS, N), jnp.float32))
    nothing = filled(0.0, (ROWS, V), plgpu.Layout.WGMMA)
    carry = (s_QN, nothing, filled(-jnp.inf, (ROWS,), ROW), filled(0.0, (ROWS,), ROW))
    carry = _over_keys(tile, wg * ROWS, carry, kv_step, last)
    plgpu.barrier_arrive(q_empty)
    p_QN, acc_QV, max_Q, sum_Q = soften(last, carry, sees is not None)

    def last_product(sum_QV):
        plgpu.wgmma(sum_QV, p_QN, ring.v_RNV.at[slot_of(so_far + last)])
        pass_turn()

    acc_QV = pl.run_state(last_product)(plgpu.ACC.init(acc_QV))
    plgpu.barrier_arrive(ring.v_empty.at[slot_of(so_far + last)])
    return acc_QV, max_Q, sum_Q


def _soften(carry, seen_QN, chosen_Q, scale, dtype):
    """The weights p_QN of a step's logits, and what was summed so far on their scale.

    seen_QN: None if every key is seen. chosen_Q: the rows that see any of the keys; None if all do.
    """
    s_QN, acc_QV, max_Q, sum_Q = carry
    if seen_QN is not None:
        s_QN = jnp.where(seen_QN, s_QN, -jnp.inf)
    new_Q = jnp.maximum(max_Q, s_QN.max(axis=1))
    if chosen_Q is not None:
        new_Q = jnp.where(chosen_Q, new_Q, max_Q)
    if not (seen_QN is None and chosen_Q is None):  # A row that sees no key yet has no difference of infinities.
        new_Q = jnp.maximum(new_Q, LOWEST)
    faded_Q = jnp.exp2((max_Q - new_Q) * (scale * LOG2E))
    subtracted_Q = new_Q * (scale * LOG2E)
    if chosen_Q is not None:
        subtracted_Q = jnp.where(chosen_Q, subtracted_Q, jnp.inf)
    p_QN = jnp.exp2(s_QN * (scale * LOG2E) - over_rows(subtracted_Q, s_QN.shape))
    sum_Q = sum_Q * faded_Q + p_QN.sum(axis=1)
    acc_QV = acc_QV * over_rows(faded_Q, acc_QV.shape)
    # The compiler would otherwise move arithmetic past the barriers, into the other warpgroup's turn.
    return lax.optimization_barrier((p_QN.astype(dtype), acc_QV, new_Q, sum_Q))


# --- the rows' gradient -------------------------------------------------------------------------------------------


def _rows_gradient_kernel(
    table, table_2, index_P, share_LM, q, dout, lse, delta, k_BSGK, v_BSGV, dq, *, work, scale, q_RWQK, dout_RWQV,
    k_RNK, v_RNV, dq_WQK, q_full, q_empty, k_full, k_empty, **tickets,
):  # fmt: skip
    wg, tables = lax.axis_index("wg"), (table, table_2, index_P, share_LM)
    (q_RWQK, q_lines), (dout_RWQV, dout_lines) = (gather.views(ring, work.gathers) for ring in (q_RWQK, dout_RWQV))
    _begin(work, q_full, q_RWQK)
    K, N, slots, dtype = q.shape[-1], work.step, q_RWQK.shape[0], q.dtype

    @pl.when(wg == PRODUCER)
    def _produce():
        plgpu.set_max_registers(40, action="decrease")

        keys = [(k_BSGK, k_RNK, k_full, k_empty), (v_BSGV, v_RNV, k_full, None)]
        rows = [(q, q_RWQK, q_lines), (dout, dout_RWQV, dout_lines)]
        _stream(work, 0, tables, tickets, rows, (q_full, q_empty), keys)

    @pl.when(wg < CONSUMERS)
    def _consume():
        plgpu.set_max_registers(232, action="increase")

        def one(here, tile, so_far):
            lse_Q = plgpu.load(tile.rows_of(lse, wg * ROWS, ROWS), layout=ROW, optimized=False) * LOG2E
            delta_Q = plgpu.load(tile.rows_of(delta, wg * ROWS, ROWS), layout=ROW, optimized=False)
            sees = None if tile.sees is None else tile.sees(wg * ROWS)
            q_slot = slot_of(here, slots)
            _wait_rows(work, q_full, here, q_RWQK)

            def kv_step(i, carry, dq_QK, masked):
                slot = slot_of(so_far + i)
                plgpu.barrier_wait(k_full.at[slot])

                def products(s_QN, dp_QN):
                    plgpu.wgmma(s_QN, q_RWQK.at[q_slot, wg], k_RNK.at[slot].transpose((1, 0)))
                    plgpu.wgmma(dp_QN, dout_RWQV.at[q_slot, wg], v_RNV.at[slot].transpose((1, 0)))
                    return s_QN[...], dp_QN[...]

                acc = plgpu.ACC((ROWS, N), jnp.float32)
                s_QN, dp_QN = pl.run_scoped(products, acc, acc)
                p_QN = jnp.exp2(s_QN * (scale * LOG2E) - over_rows(lse_Q, s_QN.shape))
                if masked:
                    p_QN = jnp.where(sees(s_QN.shape, i), p_QN, 0.0)
                ds_QN = (p_QN * (dp_QN - over_rows(delta_Q, dp_QN.shape))).astype(dtype)
                plgpu.wgmma(dq_QK, ds_QN, k_RNK.at[slot])
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(k_empty.at[slot])
                return carry

            def all_steps(dq_QK):
                _over_keys(tile, wg * ROWS, None, functools.partial(kv_step, dq_QK=dq_QK), tile.steps)
                return dq_QK[...]

            dq_QK = pl.run_scoped(all_steps, plgpu.ACC((ROWS, K), jnp.float32))
            plgpu.barrier_arrive(q_empty.at[q_slot])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            dq_WQK.at[wg][...] = (dq_QK * scale).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(dq_WQK.at[wg], tile.rows_of(dq, wg * ROWS, ROWS))

        work.walk(tables, one, tickets)
        plgpu.wait_smem_to_gmem(0)
