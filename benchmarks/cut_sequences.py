"""One sequence over several Hopper GPUs: what attention gains, and what the exchange of halves does for it.

    python -m benchmarks.cut_sequences

On all GPUs of the machine, at least two. Forward with backward at 32K tokens, 16 heads of 128, bfloat16: full attention
and MoBA (blocks of 128, top_k 8) on one GPU and on all, full attention also without the exchange by which every GPU
computes an early and a late half of its queries. Prints milliseconds and writes
benchmarks/results/cut_sequences.json. That the results agree is `tests/test_two_gpus.py`.
"""

import functools

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import k2jax.kernels.attention as attention_room
from benchmarks import record
from benchmarks.moba import SCALE, inputs, median_ms, with_gradients
from k2jax.moba_pallas import moba_attention

TOKENS, HEADS = 32_768, 16
NEVER = TOKENS + 1  # to be balanced


def full(*qkv, balance_from):
    attention_room.KERNELS_BALANCE_FROM = balance_from
    return attention_room.attention(*qkv, scale=SCALE, max_logits=True, implementation="sm90")


def moba(*qkv):
    options = {"return_residuals": True, "implementation": "sm90"}
    return moba_attention(*qkv, scale=SCALE, block_size=128, top_k=8, **options)


def main():
    if len(jax.devices()) < 2:
        raise SystemExit(f"needs two GPUs or more, and jax sees {jax.devices()}")
    balanced = functools.partial(full, balance_from=attention_room.KERNELS_BALANCE_FROM)
    cases = {
        "full attention, one GPU": (balanced, False),
        "full attention, cut": (balanced, True),
        "full attention, cut, as they lie": (functools.partial(full, balance_from=NEVER), True),
        "MoBA, one GPU": (moba, False),
        "MoBA, cut": (moba, True),
    }
    mesh = jax.make_mesh((len(jax.devices()),), ("gpus",), axis_types=(AxisType.Explicit,))
    arrays, found = inputs(1, TOKENS, HEADS, HEADS), {}
    for name, (attend, is_cut) in cases.items():
        run = jax.jit(functools.partial(with_gradients, attend))
        if is_cut:
            with jax.set_mesh(mesh):
                place = NamedSharding(mesh, PartitionSpec(None, "gpus", None, None))
                found[name] = median_ms(run, *(jax.device_put(x, place) for x in arrays))
        else:
            found[name] = median_ms(run, *arrays)
        print(f"{name:34} {found[name]:7.2f} ms", flush=True)
    data = {"tokens": TOKENS, "heads": HEADS, "milliseconds": found}
    print(record.write("cut_sequences", "python -m benchmarks.cut_sequences", data))


if __name__ == "__main__":
    main()
