"""Rows from anywhere in global memory into a ring in shared memory, by Hopper's copy engine, line by line.

Tensor cores read rows in tiles of eight rows and 128 bytes, swizzled (`TRANSFORMS`), and the engine has no copy of
scattered rows into them. But it swizzles by the bits of the address that it writes to, so lines of 128 bytes, copied
one at a time to where a tile has them, make the same tile. Such a ring is two views of one piece of memory: the array
that products read, and its lines.

A Pallas copy arrives at its barrier with every lane, twice, which for a line is more work than the copy. So these rings
have barriers of their own: one lane of a warp announces the bytes of all that the warp will copy.

Legend: X rows in global memory, E numbers of a row, R ring slots.
"""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith

LINE = 64  # numbers of 16 bits
TILE_ROWS = 8  # in a tile of `TRANSFORMS`
WARPS = 4  # of the copying warpgroup, each with a quarter of the rows
BATCH = 8  # rows whose numbers are read before any of them is copied
SWIZZLE = (plgpu.SwizzleTransform(128),)
SCALAR = plgpu.Layout.WG_SPLAT(())
BARRIER_WORDS = 2  # of 32 bits


def with_lines(tiled):
    """The ring of `tiled`, [..., rows, E] with `TRANSFORMS`, also as lines."""
    lines = math.prod(tiled.shape) // LINE
    return plgpu.RefUnion(tiled, plgpu.SMEM((lines, LINE), tiled.dtype, transforms=SWIZZLE))


def views(ring, gathers):
    """(array, lines) of a ring that `with_lines` made, (array, None) of another one."""
    return tuple(ring) if gathers else (ring, None)


def barrier_scratch(slots):
    """Of the ring: its barriers, and one by which everybody hears that they are there."""
    return plgpu.SMEM((BARRIER_WORDS * slots,), jnp.int32), plgpu.Barrier()


def begin(barriers, slots):
    """Makes the barriers. Every warpgroup calls it before anything else."""
    words, ready = barriers

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def make(_, words):
        mgpu.BarrierRef.initialize(mgpu.memref_slice(words, slice(0, slots)), WARPS)
        utils.inline_ptx("fence.mbarrier_init.release.cluster;", has_side_effects=True)

    @pl.when(lax.axis_index("wg") == 0)
    def _first():
        make(words)
        plgpu.barrier_arrive(ready)

    plgpu.barrier_wait(ready)


def wait(barriers, number, slots):
    """Until the rows of a ring's filling with this number, counted from 0 on, have all come."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR, SCALAR))
    def until(_, words, slot, parity):
        zero = mgpu.c(0, parity.mlir_dtype)
        odd = arith.cmpi(arith.CmpIPredicate.ne, _value(parity), zero)
        _barrier(words, slot).wait_parity(odd)

    until(barriers[0], lax.rem(number, jnp.int32(slots)), lax.rem(lax.div(number, jnp.int32(slots)), jnp.int32(2)))


def copy_rows(arrays, index_P, first, count, place, barriers, slot):
    """Copies `count` rows to the places of rings from `place` on, counted over all of a ring's rows. One warp's part.

    Args:
      arrays: (array_XE, the ring as products read it, its lines) each; the copies need the lines alone.
      index_P: the numbers of rows; of X or more, zeros are copied.
      first: of the first one, in index_P.
      barriers, slot: of the ring.
    """
    sizes = [array_XE.shape[1] for array_XE, *_ in arrays]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR))
    def announce(_, words, slot):
        _barrier(words, slot).arrive_expect_tx(2 * count * sum(sizes), predicate=_one_lane())

    of_arrays = [(plgpu.RefType(), plgpu.RefType(SWIZZLE)) for _ in arrays]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR, of_arrays, [SCALAR] * BATCH, SCALAR))
    def copy(launch, words, slot, arrays, indices, place):
        barrier, lane = _barrier(words, slot), _one_lane()
        for r, index in enumerate(indices):
            at = arith.addi(_value(place), mgpu.c(r, place.mlir_dtype))
            for array, lines in arrays:
                columns = array.type.shape[1] // LINE
                for c in range(columns):
                    launch.async_copy(
                        src_ref=array,
                        dst_ref=mgpu.memref_slice(lines, mgpu.ds(_index(_line(at, c, columns)), 1)),
                        gmem_slice=(mgpu.ds(_index(_value(index)), 1), mgpu.ds(c * LINE, LINE)),
                        swizzle=128,
                        barrier=barrier,
                        arrive=False,
                        predicate=lane,
                    )

    announce(barriers[0], slot)

    @pl.loop(0, count // BATCH)
    def _batch(i):
        indices = [index_P[first + i * BATCH + r] for r in range(BATCH)]
        copy(barriers[0], slot, [(x, lines) for x, _, lines in arrays], indices, place + i * BATCH)


def _value(scalar):
    return scalar.registers.item()


def _index(x):
    return arith.index_cast(ir.IndexType.get(), x)


def _barrier(words, slot):
    return mgpu.BarrierRef(utils.memref_ptr(words), _value(slot), None, 1)


def _one_lane():
    return mgpu.single_thread_predicate(mgpu.ThreadSubset.WARP)


def _line(place, c, columns):
    """Where a ring has line c of a row: tiles of eight rows and one line, one row of tiles after the other."""

    def number(x):
        return mgpu.c(x, place.type)

    group, within = arith.divui(place, number(TILE_ROWS)), arith.remui(place, number(TILE_ROWS))
    in_columns = arith.addi(arith.muli(group, number(columns)), number(c))
    return arith.addi(arith.muli(in_columns, number(TILE_ROWS)), within)


def by_warps(copy):
    """copy(number of the warp) by every warp of this warpgroup."""
    pl.kernel(lambda: copy(lax.axis_index("warp")), mesh=plgpu.WarpMesh(axis_name="warp"))()
