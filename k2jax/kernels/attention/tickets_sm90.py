"""Tiles by tickets on a Hopper GPU: a multiprocessor that is free takes the next one.

Where documents begin is known when the kernel runs and not before. Shares that were made while tracing fitted one
document; of four documents of 8K tokens the largest took 1.8 times as long as the mean. Here a counter in global memory
counts tiles, the long ones first as far as their positions tell. Who computes a tile makes no difference to it, so two
runs give the same bits.

The warpgroup that copies draws when it has asked for all of a tile, while the others still compute its last steps, and
tells them by a ring in shared memory. Earlier it would take one while others are free: with a tile of lookahead a
quarter of 32K tokens took a seventh longer.

Legend: R ring slots.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import memref

SLOTS = 2
DRAW = "atom.add.relaxed.gpu.global.u32 $0, [$1], 1;"


class Tickets(NamedTuple):
    """What the warpgroups of a block of the GPU share; for `scratch_types`."""

    ticket_R: object
    told: object
    heard: object


def scratch(listeners: int) -> dict:
    """listeners: warpgroups that do not draw."""
    return {
        "ticket_R": plgpu.SMEM((SLOTS,), jnp.int32),
        "told": plgpu.Barrier(num_barriers=SLOTS),
        "heard": plgpu.Barrier(num_arrivals=listeners, num_barriers=SLOTS),
    }


def walk(tickets, total, body, *, draws):
    """so_far = body(number here, ticket, so_far), from 0 on, for tickets below `total`.

    draws: whether this warpgroup is the one that draws. A block's first ticket is its own number.
    """
    drawn = pl.get_global(plgpu.SemaphoreType.REGULAR((1,))).at[0] if draws else None

    def one(state):
        here, ticket, so_far = state
        slot = lax.rem(here, jnp.int32(SLOTS))
        so_far = body(here, ticket, so_far)
        if draws:
            pl.when(here >= SLOTS)(lambda: plgpu.barrier_wait(tickets.heard.at[slot]))
            draw(drawn, tickets.ticket_R.at[slot])
            plgpu.barrier_arrive(tickets.told.at[slot])
        plgpu.barrier_wait(tickets.told.at[slot])
        ticket = lax.axis_size("sm") + tickets.ticket_R[slot]
        if not draws:
            plgpu.barrier_arrive(tickets.heard.at[slot])
        return here + 1, ticket, so_far

    begin = (jnp.int32(0), lax.axis_index("sm"), jnp.int32(0))
    return lax.while_loop(lambda state: state[1] < total, one, begin)


def draw(drawn, ticket):
    """Writes down how many were drawn before; by one thread, which waits for the answer."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def add_one(_, drawn, ticket):
        pointer, i32 = utils.SemaphoreRef(utils.memref_ptr(drawn)).ptr, ir.IntegerType.get_signless(32)
        with utils.single_thread(scope=mgpu.ThreadSubset.WARPGROUP):
            before = utils.inline_ptx(DRAW, pointer, result_types=i32, has_side_effects=True)
            memref.store(before, ticket, [])

    add_one(drawn, ticket)
