"""Device memory of a training step: what it will take, by shapes alone, and what it takes, by its compiled form.

Bytes are those of one device throughout: its shard of every array. A step needs

    parameters    float32, its shard of every weight
    optimizer     Muon's momentum, AdamW's moments
    batch         all micro-batches of one step
    gradients     as large as the parameters
    activations   everything else that the step allocates: what the forward pass keeps for the backward pass, the
                  working set of a layer and of the loss, and what the optimizer's update allocates
    other         outputs that take no argument's place, generated code, arrays that this process holds besides
"""

import contextlib
import dataclasses
import json
import math
import os
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.extend.core import Literal

from k2jax import sharding
from k2jax.config import MeshConfig, RunConfig
from k2jax.model import init_params, token_logprobs
from k2jax.muon_plan import MAX_GROUP_BYTES
from k2jax.training.errors import SetupError
from k2jax.training.optimizer import make_optimizer
from k2jax.training.step import init_state

WARN_ABOVE = 0.9  # of the device: allocators fragment, and the collectives' buffers are in no analysis


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device during a step; `source` says whether they are 'predicted' or of the 'compiled' step."""

    parameters: int
    optimizer: int
    batch: int
    gradients: int
    activations: int
    other: int
    source: str

    def parts(self) -> dict[str, int]:
        """{part: bytes}, the biggest first."""
        parts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "source"}
        return dict(sorted(parts.items(), key=lambda item: -item[1]))

    @property
    def temporaries(self) -> int:
        return self.gradients + self.activations

    @property
    def total(self) -> int:
        return sum(self.parts().values())


@dataclasses.dataclass(frozen=True)
class Capacity:
    """Bytes that one device has, and who says so."""

    limit: int
    source: str


# --- what the compiled step says ------------------------------------------------------------------------------------


def compiled_memory(compiled, state, batch) -> Memory | None:
    """The memory of a compiled train step, or None where the platform's compiler does not tell.

    state, batch: its arguments, as arrays or as shapes with their shardings. The gradients are among its temporaries;
    their share is known from the shapes, and what is left is called activations.
    """
    told = compiled.memory_analysis()
    if told is None:
        return None
    gradients = min(bytes_per_device(state["params"]), told.temp_size_in_bytes)
    other = told.output_size_in_bytes - told.alias_size_in_bytes + told.generated_code_size_in_bytes
    return Memory(
        parameters=bytes_per_device(state["params"]),
        optimizer=bytes_per_device(state["opt_state"]),
        batch=bytes_per_device(batch),
        gradients=gradients,
        activations=told.temp_size_in_bytes - gradients,
        other=other,
        source="compiled",
    )


def with_other_arrays(memory: Memory) -> Memory:
    """The same, plus what this process holds on its device beside parameters and optimizer state, where it tells.

    A notebook that trained before, say.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    held = stats.get("bytes_in_use", 0) - memory.parameters - memory.optimizer
    return dataclasses.replace(memory, other=memory.other + max(0, held))


def bytes_per_device(tree) -> int:
    """Bytes of the first device's shards of a tree of arrays, or of shapes with their shardings."""
    return sum(_shard_bytes(leaf.shape, leaf.dtype, leaf.sharding) for leaf in jax.tree.leaves(tree))


def _shard_bytes(shape, dtype, placed) -> int:
    if jax.dtypes.issubdtype(dtype, jax.dtypes.extended):  # a random key: a few words
        return 0
    whole = math.prod(shape) * np.dtype(dtype).itemsize
    spec, mesh = getattr(placed, "spec", ()), getattr(placed, "mesh", None)
    axes = [axis for part in spec or () if part for axis in (part if isinstance(part, tuple) else (part,))]
    return whole // math.prod(mesh.shape[axis] for axis in axes)


# --- what shapes alone say ------------------------------------------------------------------------------------------


def predict_memory(cfg: RunConfig, sizes: dict[str, int] | None = None) -> Memory:
    """The memory of a step of `cfg`, without a device, a compilation or an allocated array.

    sizes: mesh axes in place of cfg.mesh, for meshes larger than this machine, for example {'fsdp': 8}.
    Parameters, optimizer state, batch and gradients are exact. Activations are estimated:

        kept      what the traced forward pass of one micro-batch hands to its backward pass under model.remat
        layer     what the backward pass of one layer needs besides: one and a half times what it recomputes under
                  model.remat, for the gradients that flow meanwhile; and, where the mesh cuts weights for storage,
                  the layer's gathered weights and their gradients; of the largest layer
        loss      three times the float32 logits of train.loss_chunk tokens
        backward  gradients (twice with micro-batches: the sum and the latest) + kept + max(layer, loss)
        update    gradients, and Newton-Schulz: four times the largest leaf in float32, or of what goes through it at
                  once (`muon_plan.MAX_GROUP_BYTES`); parameters and optimizer state are written in their place
        activations = max(backward, update) - gradients

    Raises ValueError, as a RunConfig does, for sizes that do not divide the model or the batch.
    """
    if sizes is not None:
        cfg = dataclasses.replace(cfg, mesh=MeshConfig(**sizes))
    mesh = sharding.abstract_mesh(dataclasses.asdict(cfg.mesh))
    with jax.sharding.use_abstract_mesh(mesh):
        state = jax.eval_shape(partial(init_state, cfg, make_optimizer(cfg)), _key_shape())
        batch = batch_shapes(cfg, mesh)
        kept = _kept_bytes(cfg.model, cfg.train.loss_chunk, state["params"], batch)
        layer = max(_layer_bytes(cfg, mesh, dense, kind) for dense, kind in _kinds(cfg))
    parameters, optimizer = bytes_per_device(state["params"]), bytes_per_device(state["opt_state"])
    rows = cfg.data.batch_size // cfg.train.accumulation / cfg.mesh.batch_shards
    chunk = min(cfg.train.loss_chunk, cfg.data.seq_len) / cfg.mesh.seq
    loss = 3 * 4 * rows * chunk * cfg.model.vocab_size / cfg.mesh.tensor
    sums = 2 if cfg.train.accumulation > 1 else 1
    largest = min(MAX_GROUP_BYTES, max(map(bytes_per_device, jax.tree.leaves(state["params"]))))
    backward = sums * parameters + kept + max(layer, loss)
    update = parameters + 4 * largest
    return Memory(
        parameters=parameters,
        optimizer=optimizer,
        batch=bytes_per_device(batch),
        gradients=parameters,
        activations=int(max(backward, update)) - parameters,
        other=0,
        source="predicted",
    )


def batch_shapes(cfg: RunConfig, mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays [A, B, T] of one step, with their shardings on a concrete or abstract mesh."""
    accumulation = cfg.train.accumulation
    shape = (accumulation, cfg.data.batch_size // accumulation, cfg.data.seq_len)
    place = sharding.named(mesh, None, "batch", "length")
    dtypes = {"tokens": np.int32, "targets": np.int32, "segment_ids": np.int32, "loss_mask": np.float32}
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for name, dtype in dtypes.items()}


def _kinds(cfg) -> set[tuple[bool, str]]:
    """The kinds of layers that the model has: (whether dense, attention)."""
    return {(i < cfg.model.num_dense_layers, kind) for i, kind in enumerate(cfg.model.attention)}


def _layer_bytes(cfg, mesh, dense: bool, kind: str) -> float:
    """What the backward pass of one layer needs beside what the forward pass kept for it."""
    one = dataclasses.replace(cfg.model, num_layers=1, num_dense_layers=int(dense), attention=(kind,))
    params = jax.eval_shape(partial(init_params, one), _key_shape())
    batch = batch_shapes(cfg, mesh)
    kept = {
        remat: _kept_bytes(dataclasses.replace(one, remat=remat), cfg.train.loss_chunk, params, batch)
        for remat in {cfg.model.remat, "none"}
    }
    recomputed = kept["none"] - kept[cfg.model.remat]
    if cfg.mesh.fsdp == 1:
        return 1.5 * recomputed
    stored = bytes_per_device(params["dense" if dense else "moe"])
    return 1.5 * recomputed + 2 * stored * cfg.mesh.fsdp * jax.numpy.dtype(cfg.model.dtype).itemsize / 4


def _key_shape():
    return jax.eval_shape(lambda: jax.random.key(0))


def _kept_bytes(model, chunk, params, batch) -> int:
    """What the forward pass of one micro-batch keeps for its backward pass, beside parameters and batch."""

    def forward(params, batch):
        tokens, segment_ids, targets = (batch[name][0] for name in ("tokens", "segment_ids", "targets"))

        def loss(params):
            logp_BT, aux = token_logprobs(params, model, tokens, segment_ids, targets_BT=targets, chunk=chunk)
            return logp_BT, aux.balance_loss

        return jax.vjp(loss, params)[1]

    jaxpr = jax.make_jaxpr(forward)(params, batch).jaxpr
    given = {id(var) for var in (*jaxpr.invars, *jaxpr.constvars)}
    kept = {id(var): var.aval for var in jaxpr.outvars if not isinstance(var, Literal) and id(var) not in given}
    return sum(_shard_bytes(aval.shape, aval.dtype, aval.sharding) for aval in kept.values())


# --- whether it fits ------------------------------------------------------------------------------------------------


def capacity() -> Capacity | None:
    """What one of this process's devices has, or None where it does not tell.

    A CPU's devices share the memory of the host, or what a control group leaves of it.
    """
    device = jax.local_devices()[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return Capacity(stats["bytes_limit"], device.device_kind)
    if device.platform != "cpu":
        return None
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    group = Path("/sys/fs/cgroup/memory.max")
    told = group.read_text(encoding="ascii").strip() if group.exists() else "max"
    limit = limit if told == "max" else min(limit, int(told))
    devices = jax.local_device_count()
    return Capacity(limit // devices, "host memory" + (f" shared by {devices} devices" if devices > 1 else ""))


def peak() -> dict[str, int]:
    """{'peak_memory': most bytes that one of this process's devices has held so far}; empty where it does not tell."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return {"peak_memory": stats["peak_bytes_in_use"]} if "peak_bytes_in_use" in stats else {}


def describe(memory: Memory, has: Capacity | None) -> list[str]:
    """Plain lines: the total beside what the device has, then the parts."""
    of = f" of {text(has.limit)} ({memory.total / has.limit:.1%}; {has.source})" if has else ""
    parts = ", ".join(f"{name} {text(size)}" for name, size in memory.parts().items())
    return [f"memory per device, {memory.source}: {text(memory.total)}{of}", f"  {parts}"]


def text(size: float) -> str:
    """Bytes as MiB or GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def check(memory: Memory, cfg: RunConfig, has: Capacity | None) -> list[str]:
    """Warnings, as text: none below 90 % of the device.

    Raises SetupError where the device has less than the step needs, with the biggest parts and what makes them small.
    """
    if has is None or memory.total <= WARN_ABOVE * has.limit:
        return []
    says = f"the step needs {text(memory.total)} on each device, which has {text(has.limit)} ({has.source})"
    biggest = [(name, size) for name, size in memory.parts().items() if size >= 0.1 * memory.total]
    says += f". Biggest parts: {', '.join(f'{name} {text(size)}' for name, size in biggest)}. Fix: "
    says += "; ".join(dict.fromkeys(knob for name, _ in biggest for knob in _knobs(name, cfg))) + "."
    if memory.total > has.limit:
        raise SetupError(says)
    return [f"warning: memory is short, and fragmentation may end the run: {says}"]


def _knobs(part: str, cfg: RunConfig) -> list[str]:
    """What makes a part smaller, with the present values."""
    if part in ("parameters", "optimizer", "gradients"):
        experts = f" or mesh.expert (now {cfg.mesh.expert})" if cfg.model.num_moe_layers else ""
        return [f"raise mesh.fsdp (now {cfg.mesh.fsdp}){experts}"]
    if part == "other":
        return ["end what else holds arrays on the device"]
    knobs = []
    if part == "activations" and cfg.data.batch_size > cfg.train.accumulation * cfg.mesh.batch_shards:
        knobs.append(f"raise train.accumulation (now {cfg.train.accumulation})")
    if part == "activations" and cfg.model.remat != "full":
        knobs.append(f"set model.remat='full' (now {cfg.model.remat!r})")
    return [*knobs, f"lower data.seq_len (now {cfg.data.seq_len}) or data.batch_size (now {cfg.data.batch_size})"]


def require_room(state, cfg: RunConfig) -> None:
    """Before the state is made: raises SetupError where it and its gradients alone exceed the device."""
    parameters = bytes_per_device(state["params"])
    check(Memory(parameters, bytes_per_device(state["opt_state"]), 0, parameters, 0, 0, "by shapes"), cfg, capacity())


def foresee(stage: str, cfg: RunConfig) -> list[str]:
    """Lines about a later stage, by shapes: an estimate warns and ends no run."""
    memory, has = predict_memory(cfg), capacity()
    try:
        return check(memory, cfg, has)
    except SetupError as error:
        # Not the end: the compiler's own account decides when the stage begins.
        return [f"warning: stage {stage!r} will probably not fit: {error}"]


def report(compiled, state, cfg: RunConfig, mesh, path: Path | None, stage: str = "start") -> list[str]:
    """Lines to print before a stage's first step; writes them as JSON to `path`, if one is given.

    Raises SetupError where the step does not fit.
    """
    memory, has = compiled_memory(compiled, state, batch_shapes(cfg, mesh)), capacity()
    if memory is None:
        return [f"memory per device: {jax.default_backend()}'s compiler does not tell"]
    memory = with_other_arrays(memory)
    if path is not None:
        told = {"stage": stage, "bytes_per_device": memory.parts(), "total": memory.total, "source": memory.source}
        told |= {"device": dataclasses.asdict(has) if has else None, "mesh": dataclasses.asdict(cfg.mesh)}
        path.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return describe(memory, has) + check(memory, cfg, has)


@contextlib.contextmanager
def explained(cfg: RunConfig):
    """Turns a device that runs out of memory inside into a SetupError with the predicted parts."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        has = capacity()
        told = " ".join(str(error).split())[:200]
        memory = predict_memory(cfg)
        knobs = dict.fromkeys(knob for part in list(memory.parts())[:2] for knob in _knobs(part, cfg))
        raise SetupError(
            f"the device ran out of memory ({told}). " + " ".join(describe(memory, has)) + f". Fix: {'; '.join(knobs)}."
        ) from error
