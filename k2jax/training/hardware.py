"""Peak matrix-product rates, the denominator of MFU."""

import re
import time

import jax
import jax.numpy as jnp

# Dense bf16 FLOP/s per device, by a part of its device_kind; from the vendors' data sheets.
_PEAK = {
    "H100": 989e12, "H200": 989e12, "A100": 312e12, "L4": 121e12, "T4": 65e12, "B200": 2250e12,
    "v4": 275e12, "v5 lite": 197e12, "v5e": 197e12, "v5p": 459e12, "v5": 459e12, "v6 lite": 918e12, "v6e": 918e12,
    "7x": 2307e12,
}  # fmt: skip


def peak_flops_per_device() -> tuple[float, str]:
    """(FLOP/s, where the number comes from). CPUs and unknown chips are measured with a float32 product."""
    kind = jax.devices()[0].device_kind
    for name, peak in _PEAK.items():
        if re.search(rf"(?<![0-9]){name}(?![0-9A-Z])", kind):  # An L40 is no L4.
            return peak, f"{kind}, data sheet, bf16"
    return _measured(), f"{kind}, measured float32 product"


def _measured(size=1024, repeats=5):
    x = jnp.ones((size, size), jnp.float32)
    multiply = jax.jit(lambda x: x @ x)
    multiply(x).block_until_ready()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        multiply(x).block_until_ready()
        times.append(time.perf_counter() - start)
    # A CPU backend of several simulated devices shares one machine.
    return 2 * size**3 / min(times) / (jax.device_count() if jax.default_backend() == "cpu" else 1)
