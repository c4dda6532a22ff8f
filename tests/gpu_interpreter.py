"""Teaches JAX's interpreter of Mosaic GPU kernels what ours need and it (jax 0.11 and 0.12) does not know.

A wgmma whose left operand is in registers: it reads both from shared memory. `pl.run_state` of accumulators with first
values: it knows scoped ones alone. `patch()` adds both; everything else is the interpreter's.
"""

import jax
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as interpreter
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def patch():
    interpreter.wgmma = _wgmma(interpreter.wgmma)
    pl.run_state = _run_state


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

        def access(name):
            key = interpreter.HostAllocationKey.from_array(arguments[f"{name}_allocation_key_as_array"])
            kept = interpreter._remove_noop_transforms(arguments[f"{name}_transforms"])
            return key, memory.access(key, interpreter.jax.tree.map(int, kept))

        b, _, _ = memory.get_buffer_content(*access("b"), arguments["thread"], logging_info=info)
        acc, _, _ = memory.get_buffer_content(*access("acc"), arguments["thread"], logging_info=info)
        a = np.asarray(a_allocation_key_as_array)
        result = acc + np.matmul(a, b, dtype=acc.dtype)
        memory.store_buffer_content(*access("acc"), result, arguments["thread"], logging_info=info)
        return arguments["token"]

    return wgmma
