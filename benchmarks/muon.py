"""One update of Muon: ours against every Muon that is to be had, in one run on one GPU; and ours on two.

    python -m benchmarks.muon [--peers=FOLDER] [--work 'experts' ...]

Ours: tx.update of `muonclip` (momentum, Newton-Schulz, decay, rate) over one stacked float32 leaf, state donated, with
the symmetric-product kernel and through XLA alone (what other GPUs get). Peers: optax.contrib.muon, the bare five steps
in bfloat16 as plain jnp, torch.optim.Muon and, from FOLDER, Keller Jordan's (FOLDER/keller/keller_muon.py, the muon.py
of his repository) and dion's (FOLDER/dion/dion). Correctness first: every form of ours against its own polynomial in
float32. Times are medians of REPEATS; prints a table and, with all peers and all work, writes
benchmarks/results/muon.json. PyTorch must be there.
"""

import argparse
import contextlib
import functools
import os
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs a part of the memory.

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, PartitionSpec

from benchmarks import record
from k2jax.kernels.symmetric_matmul.reference import symmetric_matmul_reference
from k2jax.muonclip import NS, MatrixSpec, muonclip, orthogonalize

WORK = {"experts": (24, 2048, 7168), "small": (64, 1024, 2048)}
OURS = {
    "k2, bfloat16, standard": NS.k2(),
    "k2, float16, Gram": NS.k2("float16", "gram"),
    "fast, float16, Gram": NS.fast(),
}
TOLERANCE = {"bfloat16": 1.5e-2, "float16": 1e-2}
REPEATS = 10
XLA_ALONE = mock.patch("k2jax.kernels.symmetric_matmul._sm90_on_gpus", symmetric_matmul_reference)


def say(text):
    print(text, flush=True)


def median_ms(call, wait) -> float:
    """Median milliseconds of call() until wait(its result), after two calls to warm up."""
    times = []
    for i in range(REPEATS + 2):
        start = time.perf_counter()
        wait(call())
        if i >= 2:
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def make_grad(shape):
    return jax.jit(lambda key: jax.random.normal(key, shape))(jax.random.key(time.time_ns() % 2**31))


def update_ms(tx, shape, mesh=None, spec=None) -> float:
    """Milliseconds of one tx.update over a leaf of this shape; the gradient's memory becomes the update's."""
    params, grads = {"w": make_grad(shape)}, {"w": make_grad(shape)}
    if mesh is not None:
        params, grads = jax.device_put((params, grads), jax.NamedSharding(mesh, spec))
    state = jax.jit(tx.init)(params)
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    held = [grads, state]

    def call():
        held[:] = step(*held, params)
        return held

    return median_ms(call, jax.block_until_ready)


def errors() -> dict[str, float]:
    """Relative error of every form of ours against the same polynomial in float32; raises where one is wrong."""
    x = make_grad((4, 1024, 2048))
    found = {}
    for name, ns in OURS.items():
        exact = jax.jit(functools.partial(orthogonalize, ns=NS(ns.coeffs, "float32")))(x)
        rounded = jax.jit(functools.partial(orthogonalize, ns=ns))(x)
        found[name] = float(jnp.linalg.norm(rounded - exact) / jnp.linalg.norm(exact))
        say(f"error of {name}: {found[name]:.2e}")
        assert found[name] < TOLERANCE[ns.dtype], name
    return found


def ours(shape) -> dict[str, float]:
    found = {}
    for name, ns in OURS.items():
        make = functools.partial(muonclip, 1e-3, matrix_specs={"w": MatrixSpec()}, ns=ns)
        for label, choice in ((f"k2jax {name}", contextlib.nullcontext()), (f"k2jax {name}, XLA alone", XLA_ALONE)):
            jax.clear_caches()  # A scan remembers how its body was traced: with the kernel, or without.
            with choice:
                found[label] = update_ms(make(), shape)
            say(f"  {label:46} {found[label]:8.2f} ms")
    return found


def bare_steps(x):
    """Five bfloat16 steps and nothing else: the least that anyone writes."""
    x = (x / jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)).astype(jnp.bfloat16)
    for _ in range(5):
        gram = jnp.einsum("bij,bkj->bik", x, x)
        x = 3.4445 * x + jnp.einsum("bik,bkj->bij", -4.7750 * gram + 2.0315 * gram @ gram, x)
    return x


def jax_peers(shape) -> dict[str, float]:
    dims = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    muon = optax.contrib.muon(
        1e-3, nesterov=False, consistent_rms=0.2, weight_decay=0.1, muon_weight_dimension_numbers={"w": dims}
    )
    bare, grad = jax.jit(bare_steps), make_grad(shape)
    return {
        "optax.contrib.muon": update_ms(muon, shape),
        "plain jnp, bfloat16, steps alone": median_ms(lambda: bare(grad), jax.block_until_ready),
        "optax.adamw, for scale": update_ms(optax.adamw(1e-3), shape),
    }


def torch_peers(shape, folder: Path | None) -> dict[str, float]:
    """Steps over as many parameters as the stack has matrices; what cannot be imported is said, not timed."""
    import torch

    if folder is not None:
        sys.path[:0] = [str(folder / "keller"), str(folder / "dion")]

    def keller(params):
        from keller_muon import SingleDeviceMuon

        return SingleDeviceMuon(params, lr=1e-3)

    def dion(params, **options):
        from dion import Muon

        return Muon(params, lr=1e-3, use_triton=True, **options)

    makers = {
        "torch.optim.Muon": lambda params: torch.optim.Muon(params, lr=1e-3, nesterov=False),
        "Keller Jordan's Muon": keller,
        "dion's Muon, Triton, quintic": functools.partial(dion, use_polar_express=False),
        "dion's Muon, Triton, Polar Express": dion,
        "dion's Muon, Triton, Polar Express, Gram": functools.partial(dion, use_gram_newton_schulz=True),
    }
    found = {}
    for name, make in makers.items():
        try:
            params = [torch.nn.Parameter(torch.randn(shape[1:], device="cuda")) for _ in range(shape[0])]
            for param in params:
                param.grad = torch.randn_like(param)
            step = make(params).step
            found[name] = median_ms(step, lambda _: torch.cuda.synchronize())
        except Exception as error:
            say(f"  {name}: {type(error).__name__}: {str(error)[:200]}")
        params = step = None
        torch.cuda.empty_cache()
    return found


def on_two(shape) -> dict[str, float]:
    """Our update with the leaf cut over two GPUs, in every way it can be, against one GPU."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
    found = {}
    for name, ns in OURS.items():
        tx = muonclip(1e-3, matrix_specs={"w": MatrixSpec()}, ns=ns)
        times = {"one GPU": update_ms(tx, shape)}
        with jax.set_mesh(mesh):
            for place in (("x", None, None), (None, "x", None), (None, None, "x"), (None, None, None)):
                times[str(place)] = update_ms(tx, shape, mesh, PartitionSpec(*place))
        found[name] = times
        say(f"  two GPUs, {name}: " + ", ".join(f"{cut} {ms:.2f} ms" for cut, ms in times.items()))
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="folder with the repositories of peers")
    parser.add_argument("--work", nargs="*", choices=list(WORK), default=list(WORK))
    flags = parser.parse_args(argv)
    data = {"repeats": REPEATS, "errors": errors(), "milliseconds": {}, "two_gpus": {}}
    for work in flags.work:
        shape = WORK[work]
        say(f"{work}: float32 {list(shape)}")
        times = data["milliseconds"][f"{work} {list(shape)}"] = ours(shape)
        times |= jax_peers(shape)
        times |= torch_peers(shape, flags.peers)
        for name, ms in sorted(times.items(), key=lambda item: item[1]):
            say(f"  {ms:8.2f} ms  {name}")

    def save():
        if flags.peers and flags.work == list(WORK):
            say(str(record.write("muon", "python -m benchmarks.muon --peers=FOLDER", data)))

    save()  # Two GPUs take as long again.
    if jax.device_count() > 1:
        data["two_gpus"] = on_two(WORK["experts"])
        save()


if __name__ == "__main__":
    main()
