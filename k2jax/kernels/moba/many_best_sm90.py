"""The best of many blocks for every row of a warpgroup: a sorted list that four threads share.

A thread that kept a list of its own would insert block after block, a step of work for each place of the list. For
lists of more than a few this sorts 64 scores at a time by a network (Batcher, "Sorting networks and their
applications", 1968), merges them into the list of 64, and costs the same for any length. It sorts whole numbers of 64
bits: the score's bits, made to rise with it, above the block's, inverted, so that of equal scores the lower block is
the larger one.

Of a row, as the tensor cores leave it, each of four threads has 16 numbers; thread t has the places 16 t .. 16 t + 15
of a list, wherever in the row its registers are.

Legend: Q rows of a warpgroup, N = 64 scores of a step and places of a list, J places that are wanted.
"""

import functools
import struct
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, memref, scf, vector

from k2jax.kernels.moba.few_best_sm90 import LOWEST

PLACES = 64
OF_A_THREAD = PLACES // 4
LAYOUT = plgpu.Layout.WGMMA
SHAPE = (64, PLACES)
INT_MIN = -(2**31)
NO_SCORE = INT_MIN - struct.unpack("i", struct.pack("f", LOWEST))[0]
ANY = """{
    .reg .pred any;
    setp.ne.u32 any, $1, 0;
    vote.sync.any.pred any, any, 0xffffffff;
    selp.u32 $0, 1, 0, any;
}"""
FROM_LANE = "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;"


class Best(NamedTuple):
    """A list of each row; float32 scores as whole numbers in their order, and blocks with all bits inverted."""

    score_QN: jax.Array
    block_QN: jax.Array


def nothing(wanted: int) -> Best:
    """Lists of no blocks."""
    del wanted
    return Best(*(plgpu.layout_cast(jnp.full(SHAPE, number, jnp.int32), LAYOUT) for number in (NO_SCORE, 0)))


def merged(best: Best, score_QN, block_QN, wanted: int) -> Best:
    """The lists after 64 more blocks, whose numbers are above those of before, as far as the first `wanted` places."""
    result = plgpu.ShapeDtypeStruct(SHAPE, jnp.int32, layout=LAYOUT)

    @plgpu.inline_mgpu(arg_types=(LAYOUT,) * 4, return_type=(result, result))
    def merge(_, score, block, new_score, new_block):
        old = [_keys(*of_row) for of_row in zip(_of_rows(score), _of_rows(block), strict=True)]
        new = [
            _keys([_rising(x) for x in scores], [_inverted(x) for x in blocks])
            for scores, blocks in zip(_of_rows(new_score), _of_rows(new_block), strict=True)
        ]
        lane = arith.remui(utils.thread_idx(), utils.c(32, _i32()))
        ops = _Ops(lane)
        flat = [x for row in old for x in row]
        branch = scf.IfOp(_any_better(ops, old, new, wanted - 1), [x.type for x in flat], has_else=True)
        with ir.InsertionPoint(branch.then_block):
            scf.yield_([x for rows in zip(old, new, strict=True) for x in merge_sorted(ops, *rows)])
        with ir.InsertionPoint(branch.else_block):
            scf.yield_(flat)
        rows = list(branch.results[:OF_A_THREAD]), list(branch.results[OF_A_THREAD:])
        parts = [[_halves(x) for x in row] for row in rows]
        return tuple(_array([[x[i] for x in row] for row in parts], score) for i in range(2))

    return Best(*merge(*best, score_QN, block_QN))


def write(best: Best, winner_JQ):
    """The blocks of the first J places to shared memory; -1 where there are fewer."""
    block_QN = jnp.where(best.score_QN == NO_SCORE, -1, ~best.block_QN)

    @plgpu.inline_mgpu(arg_types=(LAYOUT, plgpu.RefType()))
    def store(_, block, winner_JQ):
        wanted = ir.MemRefType(winner_JQ.type).shape[0]
        thread = arith.remui(utils.thread_idx(), utils.c(128, _i32()))
        lane, warp = (f(thread, utils.c(32, _i32())) for f in (arith.remui, arith.divui))
        in_row, row = (f(lane, utils.c(4, _i32())) for f in (arith.remui, arith.divui))
        row = arith.addi(row, arith.muli(warp, utils.c(16, _i32())))
        first = arith.muli(in_row, utils.c(OF_A_THREAD, _i32()))
        for i, blocks in enumerate(_of_rows(block)):
            at = arith.index_cast(ir.IndexType.get(), arith.addi(row, utils.c(8 * i, _i32())))
            for r, one in enumerate(blocks):
                place = arith.addi(first, utils.c(r, _i32()))
                branch = scf.IfOp(arith.cmpi(arith.CmpIPredicate.slt, place, utils.c(wanted, _i32())))
                with ir.InsertionPoint(branch.then_block):
                    memref.store(one, winner_JQ, [arith.index_cast(ir.IndexType.get(), place), at])
                    scf.yield_([])

    store(block_QN, winner_JQ)


# --- the network, over anything that has `_Ops` -------------------------------------------------------------------


def merge_sorted(ops, best, new):
    """The 64 largest of a falling list and of 64 others, falling; of each thread 16."""
    rising = sort(ops, new, falling=False)
    # The larger ones of a falling and a rising list are the largest of all, and fall and rise once.
    return _clean(ops, [ops.largest(*pair) for pair in zip(best, rising, strict=True)], PLACES, falling=True)


def sort(ops, x, falling):
    """64 numbers of four threads in order."""
    size = 2
    while size <= PLACES:
        x = _exchange(ops, x, size - 1, falling)  # Each half with the other one mirrored,
        x = _clean(ops, x, size // 2, falling)  # after which both are what this sorts.
        size *= 2
    return x


def _clean(ops, x, size, falling):
    """Sorts what rises and falls once, in every `size` places."""
    distance = size // 2
    while distance:
        x = _exchange(ops, x, distance, falling)
        distance //= 2
    return x


def _exchange(ops, x, mask, falling):
    """Puts each place and the one whose number differs by `mask` in order."""
    across, inside = divmod(mask, OF_A_THREAD)
    if not across:
        x, top = list(x), 1 << (mask.bit_length() - 1)
        for r in range(OF_A_THREAD):
            if not r & top:
                pair = x[r], x[r ^ mask]
                order = (ops.largest, ops.smallest) if falling else (ops.smallest, ops.largest)
                x[r], x[r ^ mask] = (f(*pair) for f in order)
        return x
    top = 1 << (across.bit_length() - 1)
    others = [ops.of_thread(x[r ^ inside], across) for r in range(OF_A_THREAD)]
    return [ops.keep(*pair, top, falling) for pair in zip(x, others, strict=True)]


class _Ops:
    """What the network does with numbers of 64 bits in registers."""

    def __init__(self, lane):
        self.lane = lane

    def largest(self, a, b):
        return arith.maxsi(a, b)

    def smallest(self, a, b):
        return arith.minsi(a, b)

    def of_thread(self, a, across):
        """The same register of the thread whose number differs by `across`."""
        return _key(*(utils.shfl_bfly(x, across) for x in _halves(a)))

    def keep(self, mine, other, top, falling):
        """The one that belongs here: where bit `top` of the thread is 0 the larger one if they fall."""
        bit = arith.andi(self.lane, utils.c(top, _i32()))
        is_first = arith.cmpi(arith.CmpIPredicate.eq, bit, utils.c(0, _i32()))
        mine_is_larger = arith.cmpi(arith.CmpIPredicate.sgt, mine, other)
        right = arith.cmpi(arith.CmpIPredicate.eq if falling else arith.CmpIPredicate.ne, mine_is_larger, is_first)
        return arith.select(right, mine, other)

    def first_of_row(self, thread, x):
        """x of thread 0..3 of the row."""
        lane = arith.ori(arith.andi(self.lane, utils.c(28, _i32())), utils.c(thread, _i32()))
        return utils.inline_ptx(FROM_LANE, x, lane, result_types=_i32(), has_side_effects=True, convergent=True)


# --- numbers ------------------------------------------------------------------------------------------------------


def _any_better(ops, old, new, last):
    """Whether a row of the warp has a new score above the one at place `last` of its list."""
    better = utils.c(0, ir.IntegerType.get_signless(1))
    for old_row, new_row in zip(old, new, strict=True):
        have = ops.first_of_row(last // OF_A_THREAD, _halves(old_row[last % OF_A_THREAD])[0])
        top = functools.reduce(arith.maxsi, [_halves(x)[0] for x in new_row])
        better = arith.ori(better, arith.cmpi(arith.CmpIPredicate.sgt, top, have))
    answer = utils.inline_ptx(
        ANY, arith.extui(_i32(), better), result_types=_i32(), has_side_effects=True, convergent=True
    )
    return arith.cmpi(arith.CmpIPredicate.ne, answer, utils.c(0, _i32()))


def _i32():
    return ir.IntegerType.get_signless(32)


def _rising(score):
    """A float32 as a whole number that rises with it; both zeros are 0."""
    bits = arith.bitcast(_i32(), score)
    is_negative = arith.cmpi(arith.CmpIPredicate.slt, bits, utils.c(0, _i32()))
    return arith.select(is_negative, arith.subi(utils.c(INT_MIN, _i32()), bits), bits)


def _inverted(block):
    return arith.xori(block, utils.c(-1, _i32()))


def _keys(scores, blocks):
    return [_key(*pair) for pair in zip(scores, blocks, strict=True)]


def _key(score, block):
    i64 = ir.IntegerType.get_signless(64)
    return arith.ori(arith.shli(arith.extsi(i64, score), utils.c(32, i64)), arith.extui(i64, block))


def _halves(key):
    i64 = ir.IntegerType.get_signless(64)
    return arith.trunci(_i32(), arith.shrui(key, utils.c(32, i64))), arith.trunci(_i32(), key)


def _of_rows(array):
    """The 16 numbers that a thread has of either of its rows."""
    return [
        [vector.extract(pair, [], [e]) for pair in array.registers.flat[row::2] for e in range(2)] for row in range(2)
    ]


def _array(rows, like):
    """The other way round."""
    registers = like.registers.copy()
    for row, numbers in enumerate(rows):
        for i in range(OF_A_THREAD // 2):
            pair = vector.from_elements(ir.VectorType.get((2,), _i32()), numbers[2 * i : 2 * i + 2])
            registers.flat[2 * i + row] = pair
    return mgpu.FragmentedArray(_registers=registers, _layout=like.layout, _is_signed=True)
