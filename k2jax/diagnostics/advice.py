"""What will be slow on this machine and why, from what was measured."""

import os

import jax
import numpy as np

from k2jax import moba_pallas
from k2jax.config import RunConfig
from k2jax.kernels import grouped_matmul

PLAIN = {"reference", "xla"}  # run on any platform; every other name in a table is a kernel for one
MANY_CORES = 4  # data, compilation, checkpoints and, on a CPU, the model itself share them


def slow_parts(cfg: RunConfig, outcomes, rates: dict, steps: dict | None) -> list[str]:
    """One line for each thing that will be slow.

    outcomes: of the ops. rates: by name, as `experiments.doctor` collects them, per second. steps: `take_steps`'s
    result, or None where the steps failed.
    """
    model = cfg.parts[0].run.model
    lines = _kernels(outcomes) + _types(model, cfg.optimizer, rates) + _padding(cfg)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if cores < MANY_CORES:
        lines.append(
            f"{cores} CPU cores: data, compilation and checkpoints (and a model on the CPU) wait for each other"
        )
    return lines + (_around_the_step(cfg, rates, steps) if steps else [])


def _kernels(outcomes):
    kind, lines = jax.devices()[0].device_kind, []
    works = {(o.op.split()[0], o.implementation) for o in outcomes if o.state == "pass"}
    for op, table in {"moba": moba_pallas, "grouped_matmul": grouped_matmul}.items():
        if not any((op, kernel) in works for kernel in set(table.IMPLEMENTATIONS) - PLAIN):
            lines.append(f"{op} runs through XLA: no kernel for {kind} is built")
    return lines


def _types(model, optimizer, rates):
    lines = []
    products = [rates.get(f"product {dtype}") for dtype in ("bfloat16", "float32")]
    gain = products[0] / products[1] if all(products) else 1.0  # where one failed, nothing can be said
    for field, dtype in (("model.dtype", model.dtype), ("optimizer.ns_dtype", optimizer.ns_dtype)):
        if dtype == "bfloat16" and gain < 1.0:
            lines.append(
                f"{field}='bfloat16' is emulated here: products run at {gain:.2f} times float32's rate; set 'float32'"
            )
        if dtype == "float32" and gain > 1.5:
            lines.append(f"{field}='float32': products in bfloat16 run {gain:.1f} times as fast here")
    if not has_float64():
        lines.append("float64 is missing on this device: exact comparisons must run on the host's CPU")
    return lines


def has_float64() -> bool:
    """Whether the device computes in float64: 1 + 2**-40 is told from 1."""
    with jax.enable_x64(True):
        x = jax.jit(lambda x: x + 2.0**-40)(np.float64(1))
        return bool(np.asarray(x, np.float64) > 1)


def _padding(cfg):
    run = cfg.parts[0].run
    if not run.model.num_moe_layers:
        return []
    moe, tile = run.model.moe, grouped_matmul.TILE
    tokens = run.data.batch_size // run.train.accumulation * run.data.seq_len // run.mesh.batch_shards
    rows = tokens * moe.experts_per_token
    share = moe.num_experts / run.mesh.expert * (tile - 1) / rows
    if share < 0.2:
        return []
    return [
        f"experts: up to {share:.0%} more rows than tokens ({tokens} tokens of a micro-batch and device give "
        f"{rows} rows, and each expert pads to a multiple of {tile}): raise the micro-batch or mesh.expert"
    ]


def _around_the_step(cfg, rates, steps):
    lines, seconds, train = [], steps["step_seconds"], cfg.train
    if disk := rates.get("disk write"):
        save = steps["state_bytes"] / disk
        if save > 0.05 * seconds * train.checkpoint_every:
            lines.append(
                f"checkpoints: {save:.1f} s of writing every {train.checkpoint_every} steps "
                f"({seconds * train.checkpoint_every:.1f} s): raise train.checkpoint_every or use a faster disk"
            )
    if link := rates.get("to device"):
        move = steps["batch_bytes"] / link
        if move > 0.05 * seconds:
            lines.append(f"batches: {move * 1e3:.1f} ms of transfer in a step of {seconds * 1e3:.1f} ms")
    if rates.get("dispatch", 0.0) > 0.05 * seconds:
        lines.append(
            f"dispatch: {rates['dispatch'] * 1e3:.2f} ms in a step of {seconds * 1e3:.1f} ms: enlarge the step"
        )
    if steps["compile_seconds"] > 100 * seconds:
        lines.append(
            f"compilation: {steps['compile_seconds']:.0f} s, as long as {steps['compile_seconds'] / seconds:.0f} steps"
        )
    if steps["mfu"] < 0.2:
        lines.append(
            f"MFU {steps['mfu']:.1%}: small matrices, masks and data movement, not products, take most of the step; "
            "trace it with experiments.train --profile"
        )
    return lines
