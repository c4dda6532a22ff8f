"""The best few blocks of every row of a warpgroup: a sorted list in registers, into which blocks are inserted.

Of 64 scores it takes one maximum after the other, lowest block first among equals, and inserts it behind what is equal
in the list: the blocks come in rising order, so a lower block always wins a tie. A warp is done with the 64 when none
of its rows has a block left that is better than its list's last: late ones rarely are. Each of the four threads that
share a row has the whole list.

Legend: Q rows of a warpgroup, N = 64 blocks of a step, J places.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir.dialects import arith, vector

from k2jax.kernels.attention.tiles_sm90 import ROW, ROWS, filled, over_rows

LOWEST = -1e38  # the score of no candidate; those of candidates are between this and 1e38
FAR = 3e38  # The difference of two scores times this is more than any number of blocks, if it is above 2^-100.
SCALAR = plgpu.Layout.WG_SPLAT(())
VOTE = """{
    .reg .pred any;
    setp.gt.f32 any, $1, 0f00000000;
    vote.sync.any.pred any, any, 0xffffffff;
    selp.f32 $0, 0f3f800000, 0f00000000, any;
}"""


def nothing(wanted: int):
    """Lists [(score_Q, block_Q)] of no blocks. float32 holds every block."""
    return tuple((filled(LOWEST, (ROWS,), ROW), filled(-1.0, (ROWS,), ROW)) for _ in range(wanted))


def merged(best, score_QN, block_QN, wanted: int):
    """The lists after 64 more blocks."""
    del wanted
    shape = score_QN.shape
    # Negative, because the largest is what a reduction finds.
    minus_QN = -block_QN.astype(jnp.float32)

    def has_better(state):
        _, score_Q, best = state
        return any_of_warp(score_Q - best[-1][0])

    def take_one(state):
        score_QN, score_Q, best = state
        # What is not the maximum is left far below: a comparison and a choice, in the additions and products of which
        # a GPU does twice as many.
        minus_or_low_QN = (score_QN - over_rows(score_Q, shape)) * FAR + minus_QN
        minus_Q = minus_or_low_QN.max(axis=1)
        best = _inserted(best, score_Q, -minus_Q)
        # The one that is taken becomes the lowest; what the others are compared with is above all scores.
        score_QN = jnp.minimum(score_QN, (over_rows(minus_Q, shape) - minus_or_low_QN) * FAR + LOWEST)
        return score_QN, score_QN.max(axis=1), best

    return lax.while_loop(has_better, take_one, (score_QN, score_QN.max(axis=1), best))[2]


def write(best, winner_JQ):
    """The blocks to shared memory; -1 where there are fewer."""
    for j, (_, block_Q) in enumerate(best):
        winner_JQ.at[j][...] = block_Q.astype(jnp.int32)


def _inserted(best, score_Q, block_Q):
    """The list with another block, behind what is equal."""
    new, moved_Q = [], score_Q > jnp.inf
    for have_Q, have_block_Q in best:
        # What was moved goes before the next one, even if that is equal: it was found earlier.
        better_Q = moved_Q = moved_Q | (score_Q > have_Q)
        new.append((jnp.where(better_Q, score_Q, have_Q), jnp.where(better_Q, block_Q, have_block_Q)))
        score_Q, block_Q = jnp.where(better_Q, have_Q, score_Q), jnp.where(better_Q, have_block_Q, block_Q)
    return tuple(new)


def any_of_warp(row_Q):
    """Whether a number of a warp's own rows is positive: warps go on apart, each as long as its rows need."""

    @plgpu.inline_mgpu(arg_types=(ROW,), return_type=plgpu.ShapeDtypeStruct((), jnp.float32, layout=SCALAR))
    def vote(_, row_Q):
        one = [vector.extract(x, [], [0]) for x in row_Q.registers.flat]  # of each row that a thread knows of
        largest = functools.reduce(arith.maximumf, one)
        answer = utils.inline_ptx(VOTE, largest, result_types=largest.type, has_side_effects=True, convergent=True)
        return mgpu.FragmentedArray.splat(answer, ())

    return vote(row_Q) > 0
