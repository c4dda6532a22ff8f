"""Keeps the multiprocessors of a Hopper GPU near each other on their way over the same keys.

Who reads a key first brings it from memory for all, as long as it is still in the second-level cache when the last one
reads it. Where a head's keys and values are more than the cache holds, that takes multiprocessors that stay near each
other. By themselves they drift apart: over a million tokens every key came from memory again and again, and a GPU at
work is limited by its power, so all of it took a seventh longer.

So each counts the parts of its share of steps that it begins, and waits before a part until all others have begun the
one `AHEAD` before. The order of results does not depend on it, and it is a courtesy: who has waited long for one that
does not come, as where another program holds a multiprocessor, goes on, and nobody waits again in that call.

Legend: P parts of the largest share, and behind them whether somebody gave up.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, scf

STEPS = 64  # of a part: of 128 keys each, a tenth of a millisecond together
AHEAD = 2  # parts
TRIES = 2048  # of a microsecond or two


def parts_of(steps: int) -> int:
    return -(-steps // STEPS)


def counters(parts: int):
    """passed_P, zero before every call. For a kernel whose largest share has so many parts."""
    return pl.get_global(plgpu.SemaphoreType.REGULAR((parts + 1,)))


def begin_step(passed_P, parts, number):
    """Before the step with this number, counted over the share. By one whole warpgroup of every block of the GPU."""

    @pl.when(lax.rem(number, jnp.int32(STEPS)) == 0)
    def _part():
        part = lax.div(number, jnp.int32(STEPS))
        plgpu.semaphore_signal(passed_P.at[part], 1, memory_scope="gpu")

        @pl.when(part >= AHEAD)
        def _wait():
            linger(passed_P.at[part - AHEAD], passed_P.at[parts], lax.axis_size("sm"))


def end(passed_P, parts, steps):
    """Behind the last of so many steps: nobody waits for this share."""

    @pl.loop(lax.div(steps + (STEPS - 1), jnp.int32(STEPS)), parts)
    def _part(part):
        plgpu.semaphore_signal(passed_P.at[part], 1, memory_scope="gpu")


def linger(passed, gave_up, count):
    """Until `count` have passed, or anybody gave up."""
    reference = plgpu.RefType()

    @plgpu.inline_mgpu(arg_types=(reference, reference, plgpu.Layout.WG_SPLAT(())))
    def until(_, passed, gave_up, count):
        passed, gave_up = (utils.SemaphoreRef(utils.memref_ptr(x)) for x in (passed, gave_up))
        i32 = ir.IntegerType.get_signless(32)
        with utils.single_thread(scope=mgpu.ThreadSubset.WARPGROUP):
            loop = scf.WhileOp([i32], [mgpu.c(0, i32)])
            with ir.InsertionPoint(loop.before.blocks.append(i32)):
                (tries,) = loop.before.blocks[0].arguments
                few = arith.cmpi(arith.CmpIPredicate.ult, _read(passed, i32), count.registers.item())
                hopeful = arith.cmpi(arith.CmpIPredicate.eq, _read(gave_up, i32), mgpu.c(0, i32))
                patient = arith.cmpi(arith.CmpIPredicate.ult, tries, mgpu.c(TRIES, i32))
                scf.condition(arith.andi(few, arith.andi(hopeful, patient)), [tries])
            with ir.InsertionPoint(loop.after.blocks.append(i32)):
                (tries,) = loop.after.blocks[0].arguments
                utils.inline_ptx("nanosleep.u32 1000;", has_side_effects=True)
                scf.yield_([arith.addi(tries, mgpu.c(1, i32))])
            spent = arith.cmpi(arith.CmpIPredicate.eq, loop.results[0], mgpu.c(TRIES, i32))
            gave_up.signal(1, predicate=spent, relaxed=True, memory_scope="gpu")

    until(passed, gave_up, jnp.int32(count))


def _read(semaphore, i32):
    text = "ld.relaxed.gpu.global.b32 $0, [$1];"
    return utils.inline_ptx(text, semaphore.ptr, result_types=i32, has_side_effects=True)
