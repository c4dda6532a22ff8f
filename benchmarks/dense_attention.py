"""Full causal attention of our own on a Hopper GPU against the fastest that is to be had.

    python -m benchmarks.dense_attention [--only NAME ...] [--seconds 300] [--write]

Forward, and forward with backward, bf16. The implementations take turns, in another order each round, because a GPU
that gets warm gets slower: what is compared ran within the same second, after any of the others. Times are medians over
ROUNDS; what cannot run a case is said. Packed documents are compared with flash-attn3-jax's form of them alone; the
others' interfaces have none. Each is told of them in its own way, by an argument of its program. Prints a table;
--write keeps it in benchmarks/results/dense_attention.json.
Whether the kernels are right, tests/test_gpu.py asks.
"""

import argparse
import functools
import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp

from benchmarks import moba, record
from benchmarks.moba import SCALE, say
from k2jax.kernels.attention import sm90

# name: batch, tokens, query heads, key heads, sizes of keys and values, ends of documents
CASES = {
    "4K": (2, 4096, 16, 16, 128, 128),
    "8K": (2, 8192, 16, 16, 128, 128),
    "16K": (2, 16384, 16, 16, 128, 128),
    "32K": (2, 32768, 16, 16, 128, 128),
    "64K": (2, 65536, 16, 16, 128, 128),
    "128K": (2, 131072, 16, 16, 128, 128),
    "16K, 4 key heads": (2, 16384, 16, 4, 128, 128),
    "32K, MLA": (1, 32768, 16, 16, 192, 128),
    "4K, 4 documents": (2, 4096, 16, 16, 128, 128, 900, 1500, 2800, 4096),
    "32K, 4 documents": (2, 32768, 16, 16, 128, 128, 8192, 16384, 24576, 32768),
    "32K, 12 documents": (
        2, 32768, 16, 16, 128, 128,
        700, 1500, 1900, 5600, 9000, 9300, 12000, 17400, 18200, 23600, 29000, 32768,
    ),
}  # fmt: skip
WHATS = {"forward": False, "forward + backward": True}
ROUNDS = 7
ROUND_SECONDS = 0.03  # of calls in a row, at least one


def compiled_cases(names) -> dict:
    """{name: {(what, who): (the program, to come; what tells it of documents)}}.

    All at once, since compiling takes longer than running.
    """
    pool, programs = ThreadPoolExecutor(), {}
    whole = {who: (attention, ()) for who, attention in moba.dense_peers().items()}
    for name in names:
        arrays, ends = jax.eval_shape(functools.partial(moba.inputs, *CASES[name][:6])), CASES[name][6:]
        programs[name] = {
            (what, who): (pool.submit(moba.compiled, attention, arrays, backward, more), more)
            for what, backward in WHATS.items()
            for who, (attention, more) in (document_peers(CASES[name][0], ends) if ends else whole).items()
        }
    pool.shutdown()
    return programs


def document_peers(B, ends) -> dict:
    """Who can attend to documents that end at `ends` in each of B rows.

    Returns: {who: (attention(q, k, v, *more), more)}.
    """
    longest = max(map(int.__sub__, ends, (0, *ends)))
    segment_S = jnp.searchsorted(jnp.array(ends), jnp.arange(ends[-1]), side="right").astype(jnp.int32)
    row_B = jnp.arange(B, dtype=jnp.int32) * ends[-1]
    start_N = jnp.pad((row_B[:, None] + jnp.array(ends, jnp.int32)).reshape(-1), (1, 0))

    def ours(q, k, v, segment_ids):
        return sm90.attention(q, k, v, scale=SCALE, segment_ids=segment_ids).out_BTHV

    def varlen(q, k, v, start_N):
        from flash_attn3_jax import flash_mha_varlen

        options = {"max_seqlen_q": longest, "max_seqlen_k": longest, "softmax_scale": SCALE, "is_causal": True}
        out = flash_mha_varlen(*(x.reshape(-1, *x.shape[2:]) for x in (q, k, v)), start_N, **options)
        return out.reshape(*q.shape[:3], -1)

    return {"k2jax dense": (ours, (jnp.tile(segment_S, (B, 1)),)), "flash-attn3-jax": (varlen, (start_N,))}


def time_case(name, programs) -> dict[str, dict[str, float]]:
    """{what: {who: milliseconds}} of one case."""
    arrays, runs, times = moba.inputs(*CASES[name][:6]), {}, {}
    for (what, who), (program, more) in programs.items():
        given = (*(arrays if WHATS[what] else arrays[:3]), *more)
        try:
            run = program.result()
            jax.block_until_ready(run(*given))
            start = time.perf_counter()
            jax.block_until_ready(run(*given))
        except Exception as error:
            say(f"  {name}, {what}: {who}: {type(error).__name__}: {str(error)[:150]}")
            continue
        calls = max(1, int(ROUND_SECONDS / (time.perf_counter() - start)))
        runs[what, who], times[what, who] = (run, given, calls), []
    for number in range(ROUNDS):
        for key in random.Random(number).sample(list(runs), len(runs)):
            run, given, calls = runs[key]
            start = time.perf_counter()
            for _ in range(calls):
                out = run(*given)
            jax.block_until_ready(out)
            times[key].append((time.perf_counter() - start) / calls * 1e3)
            del out
    found = {what: {} for what in WHATS}
    for (what, who), milliseconds in times.items():
        found[what][who] = statistics.median(milliseconds)
    return found


def line(name, what, times) -> str:
    """One row of the table; beside our own times the fastest peer's as a multiple of them."""
    fastest = min((ms for who, ms in times.items() if not who.startswith("k2jax")), default=None)
    told = [
        f"{who} {ms:.2f}" + (f" ({fastest / ms:.2f}x of the fastest)" if fastest and who.startswith("k2jax") else "")
        for who, ms in times.items()
    ]
    return f"{name:18} {what:19} {', '.join(told)}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seconds", type=float, default=300.0, help="after these nothing new is started")
    parser.add_argument("--write", action="store_true")
    flags = parser.parse_args(argv)
    start = time.monotonic()
    programs = compiled_cases(flags.only)
    data = {"rounds": ROUNDS, "milliseconds": {}}
    for name in flags.only:
        if time.monotonic() - start > flags.seconds:
            say(f"out of time before {name}")
            break
        data["milliseconds"][name] = found = time_case(name, programs[name])
        for what, times in found.items():
            say(line(name, what, times))
        if flags.write:
            record.write("dense_attention", "python -m benchmarks.dense_attention --write", data)


if __name__ == "__main__":
    main()
