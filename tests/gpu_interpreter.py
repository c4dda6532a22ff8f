"""Teaches JAX's interpreter of Mosaic GPU kernels a wgmma whose left operand is in registers.

The interpreter (jax 0.11 and 0.12) reads both operands from shared memory and knows no other way. `patch()` replaces
its product by one that takes the values of such an operand as they are; everything else is the interpreter's.
"""

import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as interpreter


def patch():
    interpreter.wgmma = _wgmma(interpreter.wgmma)


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
