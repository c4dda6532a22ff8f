"""A few steps of a config on this machine: how fast, how much memory, and whether the loss is a number.

Tokens are random: the device is what is measured here, not the text.
"""

import dataclasses
import statistics
import time
from functools import partial

import jax
import numpy as np

from k2jax import sharding
from k2jax.config import RunConfig
from k2jax.model import flops_per_token
from k2jax.training import memory
from k2jax.training.hardware import peak_flops_per_device
from k2jax.training.optimizer import make_optimizer
from k2jax.training.step import init_state, train_step


def take_steps(cfg: RunConfig, steps: int = 20) -> dict:
    """What `steps` steps of the config's first stage tell; the first is not timed, since it may still load programs.

    Returns a dict for JSON. Seconds: compile_seconds, step_seconds (median). Rates: tokens_per_second, mfu of `peak`.
    losses: first and last, None for what is no number; finite: whether all are numbers. Bytes: memory_predicted,
    memory_compiled, memory_peak (per device; None where the platform does not tell), batch_bytes (per device),
    state_bytes (of a checkpoint). memory: the report's lines.
    Raises SetupError where the step does not fit the device, ValueError where the mesh does not fit the machine.
    """
    run = cfg.parts[0].run
    predicted = memory.predict_memory(run)
    mesh = sharding.make_mesh(dataclasses.asdict(run.mesh))
    with jax.set_mesh(mesh):
        tx = make_optimizer(run)
        make = partial(init_state, run, tx)
        key = jax.random.key(run.train.seed)
        memory.require_room(jax.eval_shape(make, key), run)
        state = jax.jit(make)(key)
        shapes = memory.batch_shapes(run, mesh)
        start = time.monotonic()
        compiled = jax.jit(partial(train_step, cfg=run, tx=tx), donate_argnums=0).lower(state, shapes).compile()
        compile_seconds = time.monotonic() - start
        lines = memory.report(compiled, state, run, mesh, None)
        told = memory.compiled_memory(compiled, state, shapes)
        state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        times, losses = _timed_steps(compiled, state, _random_batch(run, shapes), steps)
    median = statistics.median(times)
    peak, source = peak_flops_per_device()
    flops = flops_per_token(run.model, run.data.seq_len) * run.tokens_per_step
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "devices": mesh.size,
        "compile_seconds": compile_seconds,
        "steps": steps,
        "step_seconds": median,
        "tokens_per_second": run.tokens_per_step / median,
        "mfu": flops / median / (peak * mesh.size),
        "peak": f"{peak / 1e12:.2f} TFLOP/s, {source}",
        "losses": [loss if np.isfinite(loss) else None for loss in (losses[0], losses[-1])],
        "finite": bool(np.all(np.isfinite(losses))),
        "memory_predicted": predicted.total,
        "memory_compiled": told.total if told else None,
        "memory_peak": stats.get("peak_bytes_in_use"),
        "memory": lines,
        "state_bytes": state_bytes,
        "batch_bytes": memory.bytes_per_device(shapes),
    }


def _random_batch(cfg, shapes):
    rng = np.random.default_rng(0)
    shape = shapes["tokens"].shape
    tokens = rng.integers(0, cfg.model.vocab_size, shape).astype(np.int32)
    host = {"tokens": tokens, "targets": np.roll(tokens, -1, axis=-1), "segment_ids": np.ones(shape, np.int32)}
    host["loss_mask"] = np.ones(shape, np.float32)
    return {name: jax.device_put(host[name], x.sharding) for name, x in shapes.items()}


def _timed_steps(compiled, state, batch, steps):
    times, losses = [], []
    for _ in range(steps + 1):
        start = time.perf_counter()
        state, metrics = compiled(state, batch)
        losses.append(float(metrics["loss"]))  # waits for the step
        times.append(time.perf_counter() - start)
    return times[1:], losses
