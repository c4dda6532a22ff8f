"""How fast this machine multiplies, moves and stores: medians of several runs, compilation excluded.

Legend: B devices, D features, A of size 1.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from k2jax import sharding
from k2jax.kernels.partition import mesh_axes, over_mesh

RUNS = 5
_LONG_ENOUGH = 0.02  # seconds of one timing; shorter calls are repeated, so that dispatch is amortised


def seconds(fn: Callable, *args, runs: int = RUNS) -> float:
    """Median seconds of a call, after one that compiles and one that says how often to repeat."""
    jax.block_until_ready(fn(*args))
    repeats = max(1, min(1000, int(_LONG_ENOUGH / max(_timed(fn, args, 1), 1e-7))))
    return statistics.median(_timed(fn, args, repeats) / repeats for _ in range(runs))


def _timed(fn, args, repeats):
    start = time.perf_counter()
    for _ in range(repeats):
        result = fn(*args)
    jax.block_until_ready(result)
    return time.perf_counter() - start


# --- one device -----------------------------------------------------------------------------------------------------


def product_flops(dtype: str, runs: int = RUNS) -> tuple[float, int]:
    """(FLOP/s, size) of a square product, the smallest power of two that takes 20 ms, at most 16384."""
    multiply = jax.jit(jnp.matmul)
    for size in (256 * 2**i for i in range(7)):
        x = jnp.full((size, size), 1.0 / size, dtype)
        jax.block_until_ready(multiply(x, x))
        if _timed(multiply, (x, x), 1) >= _LONG_ENOUGH:
            break
    return 2 * size**3 / seconds(multiply, x, x, runs=runs), size


def memory_bandwidth(runs: int = RUNS) -> float:
    """Bytes per second of reading and writing 256 MiB in place, eight times in a row."""
    x, passes = jnp.ones(2**26, jnp.float32), 8
    # In place: a fresh result would measure how fast the system hands out pages.
    sweep = jax.jit(lambda x: jax.lax.fori_loop(0, passes, lambda _, x: x * 0.5 + 1, x))
    return 2 * passes * x.nbytes / seconds(sweep, x, runs=runs)


def dispatch_seconds(runs: int = RUNS) -> float:
    """Seconds of a call that computes next to nothing."""
    return seconds(jax.jit(lambda x: x + 1), jnp.zeros(()), runs=runs)


def transfer_bandwidth(runs: int = RUNS) -> dict[str, float]:
    """Bytes per second of 64 MiB to and from the device; a CPU's memory is the host's, so there it means nothing."""
    host = np.ones(2**24, np.float32)
    add = jax.jit(lambda x, i: x + i)
    there = seconds(lambda: jax.device_put(host), runs=runs)
    back = []
    for i in range(runs):
        fresh = jax.block_until_ready(add(host, float(i)))  # an array keeps the copy that it was read into
        back.append(_timed(lambda x: np.asarray(x), (fresh,), 1))
    return {"to device": host.nbytes / there, "from device": host.nbytes / statistics.median(back)}


def disk_bandwidth(folder: Path, megabytes: int = 256) -> float:
    """Bytes per second of writing one file and waiting until the disk has it. Raises OSError."""
    block = os.urandom(2**20)  # not compressible
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        for _ in range(megabytes):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return megabytes * 2**20 / (time.perf_counter() - start)


# --- all devices ----------------------------------------------------------------------------------------------------


def _all_gather(axes, x_BD):
    return jax.lax.all_gather(x_BD, axes, axis=0, tiled=True)


def _reduce_scatter(axes, x_BD):
    return jax.lax.psum_scatter(x_BD, axes, scatter_dimension=1, tiled=True)


def _all_reduce(axes, x_BD):
    return jax.lax.psum(x_BD, axes)


def _all_to_all(axes, x_BD):
    return jax.lax.all_to_all(x_BD, axes, split_axis=1, concat_axis=1, tiled=True)


# name: (what a device does, dimensions of the result, the same in numpy over all devices' rows, share of a device's
# array that crosses a link n times over, as NCCL's tests count "bus bandwidth")
_COLLECTIVES = {
    "all-gather": (_all_gather, "AD", lambda x, n: x, lambda n: n - 1),
    "reduce-scatter": (_reduce_scatter, "BD", lambda x, n: x.sum(0).reshape(n, -1), lambda n: (n - 1) / n),
    "all-reduce": (_all_reduce, "AD", lambda x, n: x.sum(0, keepdims=True), lambda n: 2 * (n - 1) / n),
    "all-to-all": (_all_to_all, "BD", lambda x, n: x.reshape(n, n, -1).swapaxes(0, 1).reshape(n, -1),
                   lambda n: (n - 1) / n),
}  # fmt: skip


def collective_bandwidth(runs: int = RUNS) -> dict[str, dict]:
    """{collective: {'bytes_per_second', 'right'}} over all devices, two or more.

    bytes_per_second is what one device sends; right says whether the result is the one that numpy gives.
    """
    devices = jax.device_count()
    size = 2**18 if jax.default_backend() == "cpu" else 2**24  # float32 numbers of each device
    size -= size % devices
    mesh = sharding.line_of_devices()
    found = {}
    with jax.set_mesh(mesh):
        host = np.add.outer(np.arange(devices), np.arange(size) % 7).astype(np.float32)
        x_BD = jax.device_put(host, sharding.named(mesh, "batch"))
        for name, (one, outs, right, share) in _COLLECTIVES.items():
            run = jax.jit(partial(_over_devices, one, outs))
            got = np.asarray(jax.device_get(run(x_BD)))
            found[name] = {
                "bytes_per_second": share(devices) * 4 * size / seconds(run, x_BD, runs=runs),
                "right": bool(np.array_equal(got, right(host, devices))),
            }
    return found


def _over_devices(one, outs, x_BD):
    axes = mesh_axes({"x_BD": x_BD})
    return over_mesh(partial(one, axes["B"]), {"x_BD": x_BD}, outs, axes)
