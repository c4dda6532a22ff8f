"""Memory of MoBA's XLA form, forward and backward: compiled for a range of lengths, and run at the longest one.

    python -m benchmarks.moba_memory

Prints a table and writes benchmarks/results/moba_memory.json. Sizes are MiB. "temporary" is what the compiler
reserves beyond inputs and outputs; "peak RSS" is the most memory the process held while running, less what it held
before its first array. About one minute on two CPU cores.

Legend: S sequence length, H heads, K query/key size, V value size.
"""

import resource
import sys
import time

import jax
import jax.numpy as jnp

from benchmarks import record
from k2jax.moba_pallas import moba_attention, moba_attention_plan

LENGTHS = [8192, 16384, 32768, 65536]
HEADS, SIZE, BLOCK_SIZE, TOP_K = 4, 64, 512, 3
MIB = 2**20


def loss(q, k, v):
    return jnp.sum(moba_attention(q, k, v, block_size=BLOCK_SIZE, top_k=TOP_K, implementation="xla"))


def compile_at(S):
    shape = jax.ShapeDtypeStruct((1, S, HEADS, SIZE), jnp.float32)
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(shape, shape, shape).compile()


def measure(S):
    compiled = compile_at(S)
    shape = jax.ShapeDtypeStruct((1, S, HEADS, SIZE), jnp.float32)
    plan = moba_attention_plan(shape, shape, shape, block_size=BLOCK_SIZE, top_k=TOP_K, implementation="xla")
    row = {
        "sequence": S,
        "temporary_mib": round(compiled.memory_analysis().temp_size_in_bytes / MIB),
        "estimate_mib": int(plan.split("about ")[1].split()[0]),
        "one_logit_array_mib": HEADS * S * S * 4 // MIB,
    }
    print(
        f"{S:>9} {row['temporary_mib']:>14} {row['estimate_mib']:>14} {row['one_logit_array_mib']:>22}",
        flush=True,
    )
    return compiled, row


def peak_rss_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (MIB if sys.platform == "darwin" else 1024)


def main():
    print(f"{'S':>9} {'temporary':>14} {'estimate':>14} {'one S x S of float32':>22}")
    measured = [measure(S) for S in LENGTHS]
    compiled = measured[-1][0]
    before = peak_rss_mib()
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = [jax.random.normal(key, (1, LENGTHS[-1], HEADS, SIZE), jnp.float32) for key in keys]
    start = time.perf_counter()
    value, gradients = jax.block_until_ready(compiled(*inputs))
    seconds = time.perf_counter() - start
    if not all(bool(jnp.isfinite(x).all()) for x in (value, *gradients)):
        raise RuntimeError("the run gave numbers that are not finite; its memory means nothing")
    run = {
        "sequence": LENGTHS[-1],
        "seconds": round(seconds, 2),
        "peak_rss_mib": round(peak_rss_mib() - before),
        "inputs_and_gradients_mib": 6 * inputs[0].nbytes // MIB,
    }
    print(f"ran S = {run['sequence']}: {run['seconds']} s, peak RSS +{run['peak_rss_mib']} MiB", end=" ")
    print(f"(inputs and gradients are {run['inputs_and_gradients_mib']} MiB of it)")
    data = {
        "shape": {"batch": 1, "heads": HEADS, "size": SIZE, "block_size": BLOCK_SIZE, "top_k": TOP_K},
        "dtype": "float32",
        "compiled": [row for _, row in measured],
        "run": run,
    }
    record.write("moba_memory", "python -m benchmarks.moba_memory", data)


if __name__ == "__main__":
    main()
