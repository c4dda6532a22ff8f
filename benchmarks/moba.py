"""MoBA's Hopper kernels: are they right, how fast are they, and against which dense attention?

    python -m benchmarks.moba [--checks NAME ...] [--only NAME ...] [--stages] [--peers] [--seconds 400] [--write]
    python -m benchmarks.moba --plot

On a Hopper GPU. Correctness first: outputs, gradients, log-sum-exp, max logits and selections of CHECKS against the
definition in float32, on fresh random inputs, with the error of plain bfloat16 attention on the same selection as the
yardstick, and two runs bit for bit. Then medians of forward and of forward with backward at every case of CASES, bf16;
with --stages what every stage of the first case takes, and with --peers dense attention: ours, and the fastest that is
to be had (cuDNN through jax.nn, tokamax, flash-attn3-jax: what cannot be imported is said), where a call is expected to
take at most MAX_PEER_SECONDS. After --seconds nothing new is started. Prints a table; --write keeps it in
benchmarks/results/moba.json. --plot draws that file, anywhere.
"""

import argparse
import functools
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp

from benchmarks import record
from k2jax.kernels.attention import sm90 as full_sm90
from k2jax.kernels.attention.key_heads import KeyHeads
from k2jax.kernels.attention.keys_gradient_sm90 import keys_gradient
from k2jax.kernels.attention.reference import causal_mask, masked_attention, query_positions
from k2jax.kernels.attention.tiles_sm90 import TILE, attend, rows_gradient
from k2jax.kernels.moba import reference, sm90
from k2jax.kernels.moba.blocks import layout
from k2jax.kernels.moba.pairs import join as join_pairs
from k2jax.kernels.moba.pairs import largest as largest_of_pairs

# name: batch, tokens, query heads, key heads, block size, top k, sizes of keys and values, ends of documents
CHECKS = {
    "short": (1, 1024, 2, 2, 128, 3, 128, 128),
    "odd length, grouped": (2, 2700, 4, 2, 256, 2, 128, 128),
    "many": (1, 16384, 1, 1, 128, 8, 128, 128),
    "own block alone": (1, 1024, 1, 1, 512, 1, 64, 64),
    "MLA": (1, 6100, 1, 1, 128, 4, 192, 128),
    "MLA, short": (1, 2000, 2, 2, 128, 4, 192, 128),
    "short, grouped, three words": (1, 8700, 2, 1, 128, 16, 128, 128),
    "packed documents": (2, 2000, 2, 1, 128, 3, 128, 128, 37, 700, 701, 1400),
    "odd blocks": (1, 1500, 2, 2, 100, 4, 128, 128),
    "64 blocks": (1, 6000, 1, 1, 64, 64, 64, 64),
    "many choices": (1, 4096, 2, 1, 64, 20, 64, 64),
    "a chunk of the queries": (2, 2000, 2, 1, 128, 3, 128, 128),
}
# The first query, and how many there are, where they are not as many as the keys.
QUERIES = {"a chunk of the queries": (700, 1024)}
# name: batch, tokens, query heads, key heads, block size, top k, sizes of keys and values
CASES = {
    "64K, B=128, k=8": (2, 65536, 16, 16, 128, 8, 128, 128),
    "4K, B=128, k=8": (2, 4096, 16, 16, 128, 8, 128, 128),
    "8K, B=128, k=8": (2, 8192, 16, 16, 128, 8, 128, 128),
    "16K, B=128, k=8": (2, 16384, 16, 16, 128, 8, 128, 128),
    "32K, B=128, k=8": (2, 32768, 16, 16, 128, 8, 128, 128),
    "32K, B=512, k=3": (2, 32768, 16, 16, 512, 3, 128, 128),
    "32K, B=256, k=32": (2, 32768, 16, 16, 256, 32, 128, 128),
    "64K, B=128, k=64": (2, 65536, 16, 16, 128, 64, 128, 128),
    "32K, MLA, B=512, k=4": (1, 32768, 16, 16, 512, 4, 192, 128),
    "128K, B=128, k=8": (2, 131072, 16, 16, 128, 8, 128, 128),
    "256K, B=128, k=8": (2, 262144, 16, 16, 128, 8, 128, 128),
    "512K, B=128, k=8": (2, 524288, 16, 16, 128, 8, 128, 128),
    "1M, B=4096, k=12": (1, 1048576, 16, 16, 4096, 12, 128, 128),
}
CURVE = [name for name in CASES if name.endswith("K, B=128, k=8")]
FORWARD_ONLY = {"1M, B=4096, k=12"}
SCALE = 128**-0.5
REPEATS = 5
MAX_PEER_SECONDS = 10.0
MEMORY = "GiB beyond inputs and outputs"
DENSE_RATE = 5e14  # operations a second, to guess what a peer will take


def say(text):
    print(text, flush=True)


def inputs(B, T, H, G, K=128, V=128, dtype=jnp.bfloat16):
    @jax.jit
    def make(key):
        keys = jax.random.split(key, 4)
        shapes = [(B, T, H, K), (B, T, G, K), (B, T, G, V), (B, T, H, V)]
        return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]

    return make(jax.random.key(time.time_ns() % 2**31))


def with_gradients(attention, q, k, v, dout):
    """Output and residuals, (dq, dk, dv) of attention(q, k, v) -> (out, residuals)."""
    out, pull, residuals = jax.vjp(attention, q, k, v, has_aux=True)
    return out, residuals, pull(dout.astype(out.dtype))


def kernels(q, k, v, **settings):
    return tuple(sm90.moba_attention(q, k, v, scale=SCALE, **settings))


def as_selected(q, k, v, selected_BHTJ, block_id_BS, scale=SCALE, q_offset=0):
    """The definition with T x S arrays, for a choice already made."""
    mask_BHTS = (selected_BHTJ[..., None] == block_id_BS[:, None, None, None]).any(axis=-2)
    mask_BTHS = mask_BHTS.swapaxes(1, 2) & causal_mask(query_positions(q, q_offset), k.shape[1])[:, :, None]
    out, lse, max_logit = masked_attention(q, k, v, mask_BTHS, scale)
    return out, (lse, max_logit)


def check(name) -> dict[str, float]:
    """Errors, as multiples of those of plain bfloat16 attention; raises AssertionError where something is wrong."""
    B, T, H, G, C, top_k, K, V, *ends = CHECKS[name]
    arrays = inputs(B, T, H, G, K, V)
    q_offset, num_queries = QUERIES.get(name, (0, T))
    arrays[0], arrays[3] = arrays[0][:, :num_queries], arrays[3][:, :num_queries]
    segments = (
        jnp.broadcast_to(jnp.searchsorted(jnp.array(ends), jnp.arange(T), side="right"), (B, T)) if ends else None
    )
    settings = {"block_size": C, "top_k": top_k, "segment_ids": segments, "q_offset": q_offset}
    run = jax.jit(functools.partial(with_gradients, functools.partial(kernels, **settings)))
    got = run(*arrays)
    jax.block_until_ready(run(*(2 * x for x in arrays)))  # so that a second run cannot find the first one's results
    same = jax.tree.map(lambda a, b: bool((a == b).all()), got, run(*arrays))
    assert jax.tree.all(same), f"{name}: two runs differ: {same}"

    definition = jax.jit(functools.partial(reference.moba_attention, scale=SCALE, **settings))
    block_id_BS = layout(segments, T, C).block_id_BS
    selected = got[1].selected_BHTJ
    agree = float((selected == definition(*arrays[:3]).residuals.selected_BHTJ).mean())
    assert agree > 0.9999, f"{name}: {agree:.5f} of the selections are the definition's"
    plain = jax.jit(
        lambda *arrays: with_gradients(
            lambda *qkv: as_selected(*qkv, selected, block_id_BS, q_offset=q_offset), *arrays
        )
    )
    rounded = plain(*arrays)
    with jax.default_matmul_precision("highest"):
        exact = plain(*(x.astype(jnp.float32) for x in arrays))

    def error(x, right):
        return float(jnp.linalg.norm(x.astype(jnp.float32) - right) / jnp.linalg.norm(right))

    found = {"selections": agree}
    for i, what in enumerate(("out", "dq", "dk", "dv")):
        mine, theirs, right = ((r[0], *r[2])[i] for r in (got, rounded, exact))
        found[what] = error(mine, right) / error(theirs, right)
        assert found[what] < 1.5, f"{name}: {what} is {found[what]:.2f} times as wrong as plain bfloat16"
    for i, what in enumerate(("lse", "max_logit")):
        found[what] = float(jnp.abs(got[1][i] - exact[1][i]).max())
        assert found[what] < 1e-3, f"{name}: {what} is {found[what]:.1e} off"
    return found


def median_ms(function, *arrays) -> float:
    """Median over REPEATS of the milliseconds of one of three calls in a row; fewer of what takes long.

    A first call is never counted. Of what takes more than a second, the second one is.
    """
    jax.block_until_ready(function(*arrays))
    start = time.perf_counter()
    out = jax.block_until_ready(function(*arrays))
    first = time.perf_counter() - start
    if first > 1:
        return first * 1e3
    calls, repeats = (1, 3) if first > 0.2 else (3, REPEATS)
    times = []
    for _ in range(repeats):
        del out
        start = time.perf_counter()
        for _ in range(calls):
            out = function(*arrays)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / calls * 1e3)
    return statistics.median(times)


def compiled(attention, arrays, backward, more=()):
    """The program of attention(q, k, v, *more) -> out on arrays like these: forward, or forward with backward."""
    if not backward:
        return jax.jit(attention).lower(*arrays[:3], *more).compile()

    def both(q, k, v, dout, *more):
        out, pull = jax.vjp(lambda *qkv: attention(*qkv, *more), q, k, v)
        return out, *pull(dout.astype(out.dtype))

    return jax.jit(both).lower(*arrays, *more).compile()


def compiled_cases(names, peers) -> dict:
    """{name: {label: {what: the program, to come}}}: all at once, since compiling takes longer than running."""
    pool, programs = ThreadPoolExecutor(), {}
    for name in names:
        B, T, H, G, C, top_k, K, V = CASES[name]
        arrays = jax.eval_shape(functools.partial(inputs, B, T, H, G, K, V))
        whats = {"forward": False} | ({} if name in FORWARD_ONLY else {"forward + backward": True})
        programs[name] = {}
        for label, attention in {"k2jax MoBA": moba(C, top_k), **peers}.items():
            expected = B * H * T**2 * (K + V) * (1.0 if name in FORWARD_ONLY else 3.5) / DENSE_RATE
            if label in peers and expected > MAX_PEER_SECONDS:
                say(f"{name}: {label} is expected to take {expected:.0f} s a call: left out")
                continue
            programs[name][label] = {
                what: pool.submit(compiled, attention, arrays, backward) for what, backward in whats.items()
            }
    pool.shutdown()
    return programs


def moba(C, top_k):
    return lambda q, k, v: sm90.moba_attention(q, k, v, block_size=C, top_k=top_k, scale=SCALE).out_BTHV


def dense_peers() -> dict:
    def cudnn(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, scale=SCALE, is_causal=True, implementation="cudnn")

    def ours(q, k, v):
        return full_sm90.attention(q, k, v, scale=SCALE).out_BTHV

    found = {"k2jax dense": ours, "cuDNN": cudnn}
    try:
        import tokamax

        found["tokamax"] = functools.partial(
            tokamax.dot_product_attention, scale=SCALE, is_causal=True, implementation="mosaic_gpu"
        )
    except Exception as error:
        say(f"  tokamax: {type(error).__name__}: {str(error)[:200]}")
    try:
        from flash_attn3_jax import flash_mha

        found["flash-attn3-jax"] = functools.partial(flash_mha, softmax_scale=SCALE, is_causal=True)
    except Exception as error:
        say(f"  flash-attn3-jax: {type(error).__name__}: {str(error)[:200]}")
    return found


def stages(B, T, H, G, C, top_k, K, V) -> dict[str, float]:
    """Milliseconds of every stage alone, on random inputs."""
    q, k, v, dout = inputs(B, T, H, G, K, V)
    settings = sm90.Settings(SCALE, C, H // G, T, T // C, top_k - 1, None, None)
    choose = jax.jit(functools.partial(sm90._choose, settings, packed=None))
    found = {"means, gate, top-k": median_ms(choose, q, k)}
    winner = choose(q, k)
    grouping = jax.jit(functools.partial(sm90._groups, settings, packed=None))
    found["grouping"] = median_ms(grouping, winner)
    groups = grouping(winner)
    chosen = jax.jit(functools.partial(sm90._chosen, settings, heads=KeyHeads(0, 0, B, G, G)))(q, groups)
    own = jax.jit(functools.partial(attend, SCALE, C))
    found["own blocks"] = median_ms(own, q, k, v)
    own_out = own(q, k, v)
    far, q_XK, dout_XV = jax.jit(functools.partial(attend, SCALE, C)), sm90._flat(q), sm90._flat(dout)
    found["chosen blocks"] = median_ms(far, q_XK, k, v, chosen)
    far_out = far(q_XK, k, v, chosen)
    join = jax.jit(functools.partial(join_pairs, per_query=functools.partial(sm90._per_query, T=T)))
    found["join"] = median_ms(join, *own_out[:2], *far_out[:2], groups.place_BHJT)
    largest = jax.jit(lambda max_P, row_P: largest_of_pairs(max_P, row_P, winner.shape, H // G, TILE))
    found["max logits"] = median_ms(largest, far_out[2], groups.row_P)
    _, lse = join(*own_out[:2], *far_out[:2], groups.place_BHJT)
    del far_out
    lse_P = jnp.where(groups.row_P < 0, jnp.inf, lse.reshape(-1)[groups.row_P])
    rows, mine = (q_XK, dout_XV, lse_P, jnp.zeros_like(lse_P)), (q, dout, lse, jnp.zeros_like(lse))
    dq = jax.jit(functools.partial(rows_gradient, SCALE, C))
    found["dq, chosen"] = median_ms(dq, *rows, k, v, chosen)
    found["dq, own"] = median_ms(dq, *mine, k, v)
    dkv = jax.jit(functools.partial(keys_gradient, SCALE, C))
    found["dk and dv"] = median_ms(dkv, mine, k, v, (*rows, chosen.index_P), groups.span_Z2)
    return found


def time_case(name, programs, deadline) -> dict:
    """{who: {what: milliseconds, or memory}} of one case; memory is what the compiler counts."""
    B, T, H, G, _, _, K, V = CASES[name]
    arrays, times = inputs(B, T, H, G, K, V), {}
    for label, whats in programs.items():
        if time.monotonic() > deadline:
            say(f"{name}: out of time before {label}")
            continue
        times[label] = {}
        try:
            for what, program in whats.items():
                run, backward = program.result(), what != "forward"
                times[label][what] = median_ms(run, *(arrays if backward else arrays[:3]))
                if backward:
                    times[label][MEMORY] = run.memory_analysis().temp_size_in_bytes / 2**30
        except Exception as error:
            say(f"  {label}: {type(error).__name__}: {str(error)[:300]}")
        say(f"{name}: {label:16}" + ", ".join(f"{what} {x:.2f}" for what, x in times[label].items()))
    return times


def plot():
    """docs/images/moba_curve.png: time against length, of results/moba.json."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    data = record.read("moba")
    if data is None:
        raise SystemExit("nothing to plot yet: python -m benchmarks.moba --peers --write on a Hopper GPU")
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, what in zip(axes, ("forward", "forward + backward"), strict=True):
        for label in ("k2jax MoBA", "k2jax dense", "cuDNN", "tokamax", "flash-attn3-jax"):
            rows = [(CASES[n][1], data["milliseconds"].get(n, {}).get(label, {}).get(what)) for n in CURVE]
            rows = sorted((T, ms) for T, ms in rows if ms)
            axis.loglog(*zip(*rows, strict=True), "o-" if "MoBA" in label else ".--", label=label)
        axis.set_xlabel("tokens")
        axis.set_ylabel("milliseconds")
        axis.set_title(f"{what}, 2 x 16 heads, B=128, k=8, {data['hardware']}", fontsize=8)
        axis.grid(alpha=0.3)
        axis.legend()
    path = record.ROOT / "docs" / "images" / "moba_curve.png"
    figure.savefig(path, dpi=110)
    say(str(path))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checks", nargs="*", choices=list(CHECKS), default=list(CHECKS))
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--stages", action="store_true")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--seconds", type=float, default=400.0)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--plot", action="store_true")
    flags = parser.parse_args(argv)
    if flags.plot:
        plot()
        return
    deadline = time.monotonic() + flags.seconds
    data = {"repeats": REPEATS, "errors": {}, "milliseconds": {}, "stages": {}}

    def save():
        if flags.write:
            record.write("moba", "python -m benchmarks.moba --peers --stages --write", data)

    for name in flags.checks:
        start = time.monotonic()
        data["errors"][name] = found = check(name)
        numbers = ", ".join(f"{what} {x:.3g}" for what, x in found.items())
        say(f"right: {name}: {numbers} ({time.monotonic() - start:.0f} s)")
    if flags.stages:
        data["stages"][flags.only[0]] = found = stages(*CASES[flags.only[0]])
        for what, ms in found.items():
            say(f"  {what:20} {ms:8.3f} ms")
    start = time.monotonic()
    programs = compiled_cases(flags.only, dense_peers() if flags.peers else {})
    say(f"compiled in {time.monotonic() - start:.0f} s")
    for name in flags.only:
        data["milliseconds"][name] = time_case(name, programs[name], deadline)
        save()


if __name__ == "__main__":
    main()
