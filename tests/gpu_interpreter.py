"""Teaches JAX's interpreter of Mosaic GPU kernels what ours need and it (jax 0.11 and 0.12) does not know.

A wgmma whose left operand is in registers: it reads both from shared memory. `pl.run_state` of accumulators with first
values: it knows scoped ones alone. Copies that add to global memory. Semaphores in global memory, as which it has none:
whoever waits for another block is let through, since it runs blocks one after the other. What a warp asks its threads:
all of a warpgroup's are asked. Rows that are gathered: whole, into the array alone. Tickets: every block draws those
that the others leave to it. The lists that four threads share: sorted, and in one piece.
`patch()` adds these; everything else is the interpreter's.
"""

import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as interpreter
from jax.experimental import io_callback
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from k2jax.kernels.attention import gather_sm90, pace_sm90, tickets_sm90
from k2jax.kernels.moba import few_best_sm90, many_best_sm90

NUMBER = jax.ShapeDtypeStruct((), jnp.int32)
USES, DRAWS = itertools.count(), collections.defaultdict(itertools.count)


def patch():
    interpreter.wgmma = _wgmma(interpreter.wgmma)
    interpreter.copy_smem_to_gmem = _copy_smem_to_gmem(interpreter.copy_smem_to_gmem)
    pl.run_state = _run_state
    pl.get_global = _Semaphores
    plgpu.semaphore_wait = plgpu.semaphore_signal = lambda *_, **__: None
    pace_sm90.linger = lambda *_: None
    tickets_sm90.draw = _draw
    few_best_sm90.any_of_warp = lambda row_Q: jnp.any(row_Q > 0)
    many_best_sm90.merged, many_best_sm90.write = _merged, _write
    gather_sm90.with_lines, gather_sm90.views = (lambda tiled: tiled), (lambda ring, gathers: (ring, None))
    gather_sm90.barrier_scratch = lambda slots: plgpu.Barrier(num_arrivals=gather_sm90.WARPS, num_barriers=slots)
    gather_sm90.begin = lambda *_: None
    gather_sm90.wait = lambda full, number, slots: plgpu.barrier_wait(full.at[jax.lax.rem(number, jnp.int32(slots))])
    gather_sm90.copy_rows = _copy_rows


def _access(memory, arguments, name):
    """Which buffer an argument names, and which part of it."""
    key = interpreter.HostAllocationKey.from_array(arguments[f"{name}_allocation_key_as_array"])
    kept = interpreter._remove_noop_transforms(arguments[f"{name}_transforms"])
    return key, memory.access(key, interpreter.jax.tree.map(int, kept))


def _run_state(body):
    """`pl.run_state` for a tree of `plgpu.ACC.init(values)`."""

    def run(accumulators):
        leaves, tree = jax.tree.flatten(accumulators, is_leaf=lambda x: isinstance(x, plgpu.ACC))

        def scoped(*refs):
            body(jax.tree.unflatten(tree, refs))  # Products are added alone, so the first values can come last.
            sums = [x._init + ref[...] for x, ref in zip(leaves, refs, strict=True)]
            return jax.tree.unflatten(tree, sums)

        return pl.run_scoped(scoped, *(plgpu.ACC(x.shape, x.dtype) for x in leaves))

    return run


def _wgmma(original):
    def wgmma(*, a_allocation_key_as_array, **arguments):
        if np.ndim(a_allocation_key_as_array) == 1:
            return original(a_allocation_key_as_array=a_allocation_key_as_array, **arguments)
        memory = interpreter._get_shared_memory()
        info = interpreter.memory.GPULoggingInfo(
            arguments["mesh_location"], arguments["thread"], arguments["source_info"]
        )

        access = functools.partial(_access, memory, arguments)
        b, _, _ = memory.get_buffer_content(*access("b"), arguments["thread"], logging_info=info)
        acc, _, _ = memory.get_buffer_content(*access("acc"), arguments["thread"], logging_info=info)
        a = np.asarray(a_allocation_key_as_array)
        result = acc + np.matmul(a, b, dtype=acc.dtype)
        memory.store_buffer_content(*access("acc"), result, arguments["thread"], logging_info=info)
        return arguments["token"]

    return wgmma


class _Semaphores:
    """Stands for semaphores in global memory, which are neither read nor written. `use` is another one each time that
    a block asks for them.
    """

    def __init__(self, kind):
        self.at = self
        self.use = io_callback(lambda: np.int32(next(USES)), NUMBER)
        del kind

    def __getitem__(self, index):
        return self


def _draw(drawn, ticket):
    draws = io_callback(lambda use: np.int32(next(DRAWS[int(use)])), NUMBER, drawn.use)
    ticket[...] = draws * jax.lax.axis_size("sm") + jax.lax.axis_index("sm")


def _merged(best, score_QN, block_QN, wanted):
    del wanted
    bits_QN = jax.lax.bitcast_convert_type(score_QN, jnp.int32)
    bits_QN = jnp.where(bits_QN < 0, many_best_sm90.INT_MIN - bits_QN, bits_QN)
    both = [jnp.concatenate(pair, axis=1) for pair in zip(best, (bits_QN, ~block_QN), strict=True)]
    falling = jax.lax.sort([~x for x in both], num_keys=2)
    return many_best_sm90.Best(*(~x[:, : many_best_sm90.PLACES] for x in falling))


def _write(best, winner_JQ):
    blocks_QN = jnp.where(best.score_QN == many_best_sm90.NO_SCORE, -1, ~best.block_QN)
    winner_JQ[...] = blocks_QN.T[: winner_JQ.shape[0]]


def _copy_rows(arrays, index_P, first, count, place, full, slot):
    """All of a warp's rows at once, which lie side by side in the ring: every access is a call of NumPy."""
    index_I = index_P[pl.ds(first, count)]
    for array_XE, ring, _ in arrays:
        *leading, rows, _ = ring.shape
        assert rows % count == 0
        where, at = [pl.ds(jax.lax.rem(place, jnp.int32(rows)), count)], jax.lax.div(place, jnp.int32(rows))
        for length in reversed(leading):
            where.insert(0, jax.lax.rem(at, jnp.int32(length)))
            at = jax.lax.div(at, jnp.int32(length))
        ring[tuple(where)] = jnp.take(array_XE[...], index_I, axis=0, mode="fill", fill_value=0)
    plgpu.barrier_arrive(full.at[slot])


def _copy_smem_to_gmem(original):
    def copy_smem_to_gmem(*, reduction_op, **arguments):
        if reduction_op is None:
            return original(reduction_op=None, **arguments)
        assert reduction_op == "add", reduction_op
        memory, thread = interpreter._get_shared_memory(), arguments["thread"]
        info = interpreter.memory.GPULoggingInfo(arguments["mesh_location"], thread, arguments["source_info"])

        access = functools.partial(_access, memory, arguments)
        added, _, _ = memory.get_buffer_content(*access("src"), thread, logging_info=info)
        key, place = access("dst")
        place, added = interpreter._clip_store_to_shape(place, added, tuple(memory.buffer_shape_and_dtype(key).shape))
        so_far, _, _ = memory.get_buffer_content(key, place, thread, logging_info=info)
        memory.store_buffer_content(key, place, so_far + added, thread, logging_info=info)
        return arguments["token"]

    return copy_smem_to_gmem
