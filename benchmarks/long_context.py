"""Long contexts at the level of the model, on one Hopper GPU: training at 32K tokens, and prefill from 4K to 1M.

    python -m benchmarks.long_context --workdir=runs/long [--steps 20] [--layers 4] [--only PART ...]
    python -m benchmarks.long_context --plot

configs/h100.py with fewer layers, bytes as tokens and sequences of 32K: MoBA by the Hopper kernels, the same by XLA,
and full attention by the kernels, each trained by a process of its own on the same batches. Then the forward pass to
the final states, MoBA of blocks of 4,096 with k = 12 (MoBA paper, section 3.3) against full attention; there the
feed-forward layers are dense and narrow, since experts at a million tokens at once take more than the GPU has. Writes
benchmarks/results/long_context.json after every part, and keeps what --only leaves out; --plot draws it into
docs/images/long_context.png.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

import k2jax.kernels.attention as attention_room
from benchmarks import record
from benchmarks.moba import median_ms
from k2jax.config import load_config
from k2jax.model import hidden, init_params
from k2jax.training.loop import train
from k2jax.training.metrics import read_metrics

RUNS = {"MoBA, kernels": ("moba", True), "MoBA, XLA": ("moba", False), "full attention, kernels": ("full", True)}
SEQ_LEN = 32_768
PARTS = (*RUNS, "prefill")
PREFILLED = {"moba": "MoBA, blocks of 4,096, top_k 12", "full": "full attention"}
PREFILL = (4_096, 16_384, 65_536, 262_144, 1_048_576)


def config(kind, layers, steps, moba, **more):
    overrides = {
        "model.num_layers": layers,
        "model.attention": (kind,) * layers,
        "model.moba": moba,
        "model.vocab_size": 264,
        "data.tokenizer": "bytes",
        "data.source": "stdlib",
        "data.seq_len": SEQ_LEN,
        "data.batch_size": 2,
        "train.accumulation": 2,
        "train.sample_tokens": 0,
        "train.log_every": 1,
        **{f"model.{name}": value for name, value in more.items()},
    }
    return load_config(f"configs/h100.py:steps={steps}", overrides)


def folder_of(name, flags):
    return flags.workdir / name.replace(", ", "-").replace(" ", "-")


def train_one(name, flags):
    kind, kernels = RUNS[name]
    if not kernels:
        attention_room.not_hopper = lambda: "switched off by the benchmark"
    cfg = config(kind, flags.layers, flags.steps, {"block_size": 512, "top_k": 4})
    train(cfg, folder_of(name, flags))


def training(name, flags) -> dict:
    command = [sys.executable, "-m", "benchmarks.long_context", f"--workdir={flags.workdir}", f"--one={name}"]
    command += [f"--steps={flags.steps}", f"--layers={flags.layers}"]
    # One large piece of memory from the start: grown piece by piece it is too fragmented for a step's activations.
    env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}
    subprocess.run(command, cwd=record.ROOT, check=True, env=env)
    folder = folder_of(name, flags)
    rows = read_metrics(folder / "metrics.jsonl")
    memory = json.loads((folder / "memory.json").read_text(encoding="utf-8"))
    return {
        "median_step_seconds": statistics.median(row["step_time"] for row in rows[3:]),
        "compiled_bytes": memory["total"],
        "activation_bytes": memory["bytes_per_device"]["activations"],
        "max_logit": max(row["max_logit"] for row in rows),
        "loss": [round(row["loss"], 4) for row in rows],
    }


def prefill(layers) -> dict:
    """{kind: {tokens: seconds}} of the forward pass; a length that does not fit ends a kind's row, and is said."""
    found = {}
    for kind in PREFILLED:
        narrow = {"num_dense_layers": layers, "mlp_dim": 3_072}
        cfg = config(kind, layers, 1, {"block_size": 4_096, "top_k": 12}, **narrow).model
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), init_params(cfg, jax.random.key(0)))
        found[kind] = {}
        for T in PREFILL:
            tokens = jax.random.randint(jax.random.key(T), (1, T), 0, 256)
            try:
                run = jax.jit(partial(_last_state, cfg=cfg)).lower(params, tokens).compile()
                found[kind][T] = median_ms(run, params, tokens) / 1e3
            except jax.errors.JaxRuntimeError as error:
                found[kind][T] = None
                print(f"prefill, {kind}, {T} tokens: {str(error)[:200]}", flush=True)
                break
            print(f"prefill, {kind}, {T} tokens: {found[kind][T]:.4f} s", flush=True)
    return found


def _last_state(params, tokens_BT, cfg):
    return hidden(params, cfg, tokens_BT)[0][:, -1]


def plot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    data = record.read("long_context")
    if data is None:
        raise SystemExit("nothing to plot yet: python -m benchmarks.long_context on a Hopper GPU")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, run in data["training"].items():
        left.plot(
            range(1, len(run["loss"]) + 1), run["loss"], label=f"{name}: {run['median_step_seconds']:.2f} s a step"
        )
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set(xlabel=f"step of 2 x {SEQ_LEN} tokens", ylabel="loss in nats per byte", title="training at 32K")
    for kind, rows in data["prefill"].items():
        rows = [(int(T), seconds) for T, seconds in rows.items() if seconds]
        right.loglog(*zip(*rows, strict=True), "o-", label=PREFILLED[kind])
    right.set(xlabel="tokens", ylabel="seconds", title=f"prefill of {data['layers']} layers, {data['hardware']}")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend()
    path = record.ROOT / "docs" / "images" / "long_context.png"
    figure.savefig(path, dpi=110)
    print(path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/long"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--one", choices=list(RUNS), help="train this one alone")
    parser.add_argument("--plot", action="store_true")
    flags = parser.parse_args(argv)
    flags.workdir = flags.workdir.resolve()
    if flags.one:
        train_one(flags.one, flags)
        return
    if flags.plot:
        plot()
        return
    data = {"layers": flags.layers, "seq_len": SEQ_LEN, "training": {}, "prefill": {}}
    before = record.read("long_context") or {}
    data |= {name: before[name] for name in ("training", "prefill") if before.get("layers") == flags.layers}
    command = f"python -m benchmarks.long_context --steps={flags.steps} --layers={flags.layers}"
    for name in flags.only:
        if name == "prefill":
            data[name] = prefill(flags.layers)
        else:
            data["training"][name] = training(name, flags)
            print(name, {k: v for k, v in data["training"][name].items() if k != "loss"}, flush=True)
        print(record.write("long_context", command, data), flush=True)


if __name__ == "__main__":
    main()
