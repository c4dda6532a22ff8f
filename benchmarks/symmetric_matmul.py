"""The symmetric product against the whole one: is it right, and how much faster is it?

    python -m benchmarks.symmetric_matmul [--seconds 90] [--only NAME ...]

On a Hopper GPU. Every variant is first compared with a float32 product of fresh random inputs (C, three coefficients,
both types, sizes that are no multiple of the tiles), must be symmetric bit for bit and give the same bits twice. What
is right is then timed at the shapes of Kimi K2's Newton-Schulz steps: every variant at the first two, the fastest two
at the others. Two baselines: XLA's bare product, and XLA's product with coefficients and C, which is what the kernel
computes. A variant that fails is reported and left out; the exit status is 1 if none is right. After `--seconds`
nothing new is started, and what hangs for HANGS seconds ends the run with what was measured so far.
"""

import argparse
import dataclasses
import functools
import os
import statistics
import sys
import threading
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import record
from k2jax.kernels.symmetric_matmul.reference import symmetric_matmul_reference
from k2jax.kernels.symmetric_matmul.sm90 import Config, symmetric_matmul_sm90

CONFIGS = {
    "cluster2 s4": Config(),
    "cluster1 s4": Config(cluster=1),
    "cluster2 s4 band 4": Config(band=4),
    "cluster2 s3 b4": Config(stages=3, buffers=4),
}
VARIANTS = {name: functools.partial(symmetric_matmul_sm90, config=config) for name, config in CONFIGS.items()}
BARE, SAME = "XLA, bare product", "XLA, the same"

# (batch, n, m, with C, with Y): Gram products X X^T, squares A A + C of the polynomial, products of two polynomials.
SHAPES = [
    (24, 2048, 7168, False, False),
    (24, 2048, 2048, True, False),
    (24, 2048, 2048, False, True),
    (64, 1024, 2048, False, False),
    (64, 1024, 1024, True, False),
    (64, 1024, 1024, False, True),
    (24, 1536, 7168, False, False),
]
# The same, then whether with gamma, and the type.
CHECKS = [
    (2, 2048, 1024, True, False, True, jnp.bfloat16),
    (2, 1024, 1024, True, True, False, jnp.float16),
    (3, 1216, 448, False, False, True, jnp.bfloat16),
    (1, 512, 7168, False, True, False, jnp.bfloat16),
    (40, 640, 192, True, False, True, jnp.float16),
]
TOLERANCE = {"bfloat16": 4e-3, "float16": 5e-4}
REPEATS = 7
HANGS = 60.0


def say(text):
    print(text, flush=True)


def inputs(seed, batch, n, m, with_c, with_y, dtype):
    """x with singular values around one, y = x D with D diagonal, and a symmetric C, made on the device."""
    x_key, c_key = jax.random.split(jax.random.key(seed))
    x_BNM = (jax.random.normal(x_key, (batch, n, m)) / np.sqrt(m)).astype(dtype)
    y_BNM = x_BNM * (1 - 2 * (jnp.arange(m) % 3 == 0)).astype(dtype) if with_y else None
    if not with_c:
        return x_BNM, y_BNM, None
    c_BNN = jax.random.normal(c_key, (batch, n, n)) / np.sqrt(n)
    return x_BNM, y_BNM, (c_BNN + c_BNN.swapaxes(1, 2)).astype(dtype)


def check(name, cases):
    """The largest error over some CHECKS; raises AssertionError where a result is wrong."""
    worst = 0.0
    run = jax.jit(VARIANTS[name])
    for batch, n, m, with_c, with_y, with_gamma, dtype in cases:
        seed = time.time_ns() % 2**31
        x, y, c = jax.jit(inputs, static_argnums=(1, 2, 3, 4, 5, 6))(seed, batch, n, m, with_c, with_y, dtype)
        alpha, beta, gamma = jnp.float32(1.25), jnp.float32(-0.75), jnp.float32(0.5) if with_gamma else None
        first = run(x, y, c, alpha, beta, gamma)
        # Something else in between, so that the second run cannot find the first one's result in memory.
        jax.block_until_ready(run(x, y, c, 0 * alpha, beta, gamma))
        error, symmetric, same = (
            a.item() for a in judge(first, run(x, y, c, alpha, beta, gamma), x, y, c, alpha, beta, gamma)
        )
        what = f"{batch} x {n} x {m} {jnp.dtype(dtype).name}"
        assert error < TOLERANCE[jnp.dtype(dtype).name], f"{what}: error {error:.2e}"
        assert symmetric, f"{what}: not symmetric, error {error:.2e}"
        assert same, f"{what}: two runs differ, error {error:.2e}"
        worst = max(worst, error)
    return worst


@jax.jit
def judge(first, second, x, y, c, alpha, beta, gamma):
    """Relative error of a result, whether it is symmetric, and whether a second one is the same."""
    x, y, c = (None if a is None else a.astype(jnp.float32) for a in (x, y, c))
    right = symmetric_matmul_reference(x, y, c, alpha, beta, gamma)
    error = jnp.linalg.norm(first.astype(jnp.float32) - right) / jnp.linalg.norm(right)
    # Of two matrices, mirrored entries within a diagonal tile are two sums.
    symmetric = jnp.all(first == first.swapaxes(1, 2)) if y is None else True
    return error, jnp.asarray(symmetric), jnp.all(first == second)


def bare_product(x_BNM, y_BNM, c_BNN, alpha, beta, gamma):
    """What XLA does fastest: neither coefficients nor C."""
    del c_BNN, alpha, beta, gamma
    return jnp.einsum("BNM,BKM->BNK", x_BNM, x_BNM if y_BNM is None else y_BNM, preferred_element_type=x_BNM.dtype)


def milliseconds(function, shape, rounds):
    """Median over REPEATS of the time of one call, and its spread. A repeat makes 2 * rounds calls in one program."""
    make = jax.jit(inputs, static_argnums=(1, 2, 3, 4, 5, 6))
    xs, ys, cs = zip(*(make(seed, *shape, jnp.bfloat16) for seed in range(2)), strict=True)
    function = jax.jit(function)

    # Donated, since a loop would otherwise begin with a copy of its inputs.
    @functools.partial(jax.jit, donate_argnums=0)
    def many(xs, ys, cs, alpha):
        def one_round(_, xs):
            for i in range(2):
                out = function(xs[i], ys[i], cs[i], alpha, jnp.float32(-0.75), None)
                # Nothing changes, but the next call's input now depends on this one's result.
                other = xs[1 - i].at[0, 0, 0].add(0 * out[0, 0, 0])
                xs = (xs[i], other) if i == 0 else (other, xs[i])
            return xs

        return jax.lax.fori_loop(0, rounds, one_round, xs)

    alpha = jnp.float32(1.25)
    xs = jax.block_until_ready(many(xs, ys, cs, alpha))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        xs = jax.block_until_ready(many(xs, ys, cs, alpha))
        times.append((time.perf_counter() - start) / (2 * rounds) * 1e3)
    return statistics.median(times), max(times) - min(times)


def time_one(name, shape, rows):
    """Adds [ms, spread] to rows, {name: ...} of this shape, and prints a line."""
    batch, n, m, with_c, with_y = shape
    flops = 2 * batch * n * n * m
    # About twenty milliseconds of work in one program, whatever the shape.
    rounds = max(2, min(20, round(10e-3 / (flops / 600e12))))
    function = {BARE: bare_product, SAME: symmetric_matmul_reference}.get(name) or VARIANTS[name]
    try:
        ms, spread = milliseconds(function, shape, rounds)
    except Exception as error:
        say(f"  {name}: {first_line(error)}")
        return
    rows[name] = [ms, spread]
    faster = "  ".join(f"{rows[base][0] / ms:5.2f}x" if base in rows else "     -" for base in (BARE, SAME))
    what = f"{batch} x {n} x {m}" + ", C" * with_c + ", Y" * with_y
    say(f"  {what:22s} {name:18s} {ms:8.4f} ms +-{spread:.4f} {flops / ms / 1e9:6.0f} whole-TFLOP/s  {faster}")


def first_line(error):
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300] if text else ''}"


def checked(name, found):
    """Whether the variant is right; notes the error, or why it is not."""
    start = time.monotonic()
    try:
        # What the variants share is checked once.
        error = check(name, CHECKS if not found["largest_error"] else CHECKS[:2])
    except Exception as failure:
        found["failed"][name] = first_line(failure)
        say(f"WRONG {name}: {found['failed'][name]} ({time.monotonic() - start:.1f} s)")
        if not isinstance(failure, AssertionError):
            say("".join(traceback.format_exception(failure)[-3:])[-1500:])
        return False
    found["largest_error"][name] = error
    say(f"right {name}: largest error {error:.2e} ({time.monotonic() - start:.1f} s)")
    return True


def guarded(found, function, *arguments):
    """function(*arguments), unless it hangs: no exception reaches a thread that waits for a GPU."""

    def give_up():
        say(f"hung: {function.__name__}{arguments[:1]}")
        try:
            save(found)
        finally:
            os._exit(2)

    timer = threading.Timer(HANGS, give_up)
    timer.start()
    try:
        return function(*arguments)
    finally:
        timer.cancel()


def save(found):
    say(f"wrote {record.write('symmetric_matmul', 'python -m benchmarks.symmetric_matmul', found)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    say(f"{record.hardware()}, jax {jax.__version__}; last columns: speed against {BARE!r} and {SAME!r}")
    results = [{"shape": shape, "ms": {}} for shape in SHAPES]
    configs = {name: dataclasses.asdict(config) for name, config in CONFIGS.items()}
    found = {"configs": configs, "largest_error": {}, "failed": {}, "results": results}

    def time_at(result, names):
        for name in names:
            if time.monotonic() < deadline:
                guarded(found, time_one, name, result["shape"], result["ms"])

    for result in results:
        time_at(result, [BARE, SAME])
    for name in arguments.only:
        if time.monotonic() < deadline and guarded(found, checked, name, found):
            for result in results[:2]:
                time_at(result, [name])
    total = {
        name: sum(result["ms"].get(name, [np.inf])[0] for result in results[:2]) for name in found["largest_error"]
    }
    for result in results[2:]:
        time_at(result, sorted(total, key=total.get)[:2])
    save(found)
    return 0 if found["largest_error"] else 1


if __name__ == "__main__":
    sys.exit(main())
