"""Memory of a step: predicted by shapes, read from the compiled step, and refused where it does not fit."""

import dataclasses
import io
import json
from functools import partial

import jax
import numpy as np
import pytest

from k2jax import sharding
from k2jax.config import MeshConfig, load_config
from k2jax.training import memory
from k2jax.training.errors import SetupError
from k2jax.training.loop import train
from k2jax.training.memory import Capacity, Memory
from k2jax.training.optimizer import make_optimizer
from k2jax.training.step import init_state
from tests import tiny
from tests.on_devices import told_by

MIB = 2**20
SMALL = {"model.num_layers": 2, "model.attention": ("moba", "full"), "data.seq_len": 16}


def needs(**parts):
    return Memory(**{"parameters": 0, "optimizer": 0, "batch": 0, "gradients": 0, "activations": 0, "other": 0,
                     "source": "compiled"} | parts)  # fmt: skip


# --- by shapes -----------------------------------------------------------------------------------------------------


def test_parameters_optimizer_and_batch_are_counted_by_hand():
    cfg = tiny.config(overrides={"data.batch_size": 8, "train.accumulation": 2})
    told = memory.predict_memory(cfg)
    shapes = jax.eval_shape(partial(init_state, cfg, make_optimizer(cfg)), jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    # Muon keeps one moment and AdamW two; the router's bias none. AdamW moves embedding, head and gains.
    by_adam = 2 * 264 * 32 + sum(
        leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(shapes["params"]) if "scale" in str(path)
    )
    bias = shapes["params"]["moe"]["moe"]["router"]["bias"].size
    assert told.parameters == told.gradients == 4 * count
    assert told.optimizer == 4 * (count - bias + by_adam) + 24  # and six scalars: steps, five of QK-Clip
    assert told.batch == 4 * 4 * 8 * 32


def test_a_mesh_larger_than_this_machine_divides_what_it_cuts():
    cfg = load_config("configs/nano.py:batch=64")
    one, many = memory.predict_memory(cfg), memory.predict_memory(cfg, {"fsdp": 8, "expert": 4})
    assert one.parameters / 32 < many.parameters < one.parameters / 7
    assert one.batch == 32 * many.batch
    assert one.activations / 32 < many.activations < one.activations / 10


def test_a_mesh_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"mesh\.expert=3"):
        memory.predict_memory(load_config("configs/nano.py:batch=12"), {"expert": 3})


def test_recomputation_and_micro_batches_shrink_the_estimate():
    def activations(**overrides):
        changes = {name.replace("__", "."): value for name, value in overrides.items()}
        return memory.predict_memory(load_config("configs/nano.py", changes)).activations

    none, full = activations(), activations(model__remat="full")
    some = activations(model__remat="dots_saveable")
    assert full < some < none
    assert activations(train__accumulation=4) < none / 2


def test_the_largest_model_is_predicted_without_a_parameter():
    told = memory.predict_memory(load_config("configs/kimi_k2.py"))
    assert told.parameters == 4 * 1_026_408_232_448


# --- beside the compiled step ---------------------------------------------------------------------------------------

COMPARE = """
import dataclasses, json, sys
from functools import partial
import jax
from k2jax import sharding
from k2jax.config import load_config
from k2jax.training import memory
from k2jax.training.optimizer import make_optimizer
from k2jax.training.step import init_state, train_step

def compare(file, overrides):
    cfg = load_config(file, overrides)
    predicted = memory.predict_memory(cfg)
    mesh = sharding.make_mesh(dataclasses.asdict(cfg.mesh))
    tx = make_optimizer(cfg)
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(partial(init_state, cfg, tx), jax.random.key(0))
        state = jax.tree.map(partial(sharding.on_mesh, mesh=mesh), shapes)
        batch = memory.batch_shapes(cfg, mesh)
        step = jax.jit(partial(train_step, cfg=cfg, tx=tx), donate_argnums=0).lower(state, batch)
        compiled = step.compile({"xla_backend_optimization_level": 0})
        arguments = compiled.memory_analysis().argument_size_in_bytes
        told = memory.compiled_memory(compiled, state, batch)
    return {"predicted": dataclasses.asdict(predicted), "compiled": dataclasses.asdict(told), "arguments": arguments,
            "totals": [predicted.total, told.total]}

print(json.dumps([compare(*case) for case in json.loads(sys.argv[1])]))
"""

CASES = [
    ("tests/tiny.py", {}),
    ("configs/nano.py", {}),
    ("configs/nano.py", {"model.remat": "full"}),
    ("configs/nano.py", {"train.accumulation": 4}),
    ("configs/nano.py:batch=1", {}),
    ("configs/nano.py", {"mesh.fsdp": 8}),
    ("configs/nano.py", {"mesh.fsdp": 2, "mesh.expert": 2, "mesh.tensor": 2}),
    ("configs/nano.py", {"mesh.data": 4, "mesh.seq": 2}),
]


@pytest.mark.check
def test_the_prediction_is_near_the_compiled_step():
    told = told_by(COMPARE, devices=8, timeout=1800, arguments=[json.dumps(CASES)])
    for case, found in zip(CASES, told, strict=True):
        predicted, compiled = found["predicted"], found["compiled"]
        for exact in ("parameters", "optimizer", "batch", "gradients"):
            assert predicted[exact] == compiled[exact], (case, exact)
        # What the compiler counts as arguments is what shapes and shardings say, but for a few scalars.
        state = sum(compiled[name] for name in ("parameters", "optimizer", "batch"))
        assert 0 <= found["arguments"] - state < 100, case
        error = found["totals"][0] / found["totals"][1] - 1
        print(f"{case}: predicted {found['totals'][0] / MIB:.1f} MiB, {error:+.1%}")
        assert abs(error) < 0.25, (case, error)


def test_the_compiled_step_of_one_matrix_is_counted_exactly():
    mesh = sharding.make_mesh({})
    with jax.set_mesh(mesh):
        place = sharding.named(mesh, None, None)
        w = jax.ShapeDtypeStruct((256, 256), np.float32, sharding=place)
        state, batch = {"params": {"w": w}, "opt_state": {"mu": w}}, {"x": w}

        def step(state, batch):
            grad = jax.grad(lambda w: ((batch["x"] @ w) ** 2).sum())(state["params"]["w"])
            return {
                "params": {"w": state["params"]["w"] - grad},
                "opt_state": {"mu": 0.9 * state["opt_state"]["mu"] + grad},
            }, ()

        compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    told = memory.compiled_memory(compiled, state, batch)
    assert (told.parameters, told.optimizer, told.batch) == (256 * 1024,) * 3
    assert told.other < 1024  # the state goes where the old one was
    assert told.total == 3 * 256 * 1024 + told.temporaries + told.other


# --- whether it fits ------------------------------------------------------------------------------------------------


@pytest.mark.check
def test_a_run_that_fits_says_so_and_writes_it_down(tmp_path):
    source = tiny.write_text(tmp_path / "text")
    stream = io.StringIO()
    cfg = tiny.config(source, SMALL | {"train.steps": 4, "optimizer.constant_tokens": 0})
    train(cfg, tmp_path / "run", stream=stream)
    said = stream.getvalue()
    assert said.index("memory per device, compiled: ") < said.index("step 2/4")
    told = json.loads((tmp_path / "run" / "memory.json").read_text())
    assert told["total"] == sum(told["bytes_per_device"].values())
    assert told["bytes_per_device"]["parameters"] == memory.predict_memory(cfg).parameters
    assert told["mesh"] == dataclasses.asdict(MeshConfig())


@pytest.mark.parametrize(
    ("limit", "names"),
    [(MIB // 5, "optimizer, parameters, gradients"), pytest.param(MIB, "activations", marks=pytest.mark.check)],
)
def test_a_run_that_does_not_fit_ends_before_its_first_step(tmp_path, monkeypatch, limit, names):
    # First less than the state needs, which is refused before it is made; then less than the compiled step needs.
    monkeypatch.setattr(memory, "capacity", lambda: Capacity(limit, "a small device"))
    source = tiny.write_text(tmp_path / "text")
    with pytest.raises(SetupError, match=r"which has .* \(a small device\)") as caught:
        train(tiny.config(source), tmp_path / "run", stream=io.StringIO())
    said = str(caught.value)
    assert all(name in said.partition("Fix: ")[0] for name in names.split(", "))
    assert said.partition("Fix: ")[2]
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""


def test_the_fix_names_only_what_can_help():
    cfg = tiny.config()
    big = Capacity(100 * MIB, "test")
    with pytest.raises(SetupError) as caught:
        memory.check(needs(activations=90 * MIB, parameters=15 * MIB), cfg, big)
    assert str(caught.value) == (
        "the step needs 105.0 MiB on each device, which has 100.0 MiB (test). Biggest parts: activations 90.0 MiB, "
        "parameters 15.0 MiB. Fix: raise train.accumulation (now 1); set model.remat='full' (now 'none'); lower "
        "data.seq_len (now 32) or data.batch_size (now 4); raise mesh.fsdp (now 1) or mesh.expert (now 1)."
    )
    spent = tiny.config(overrides={"train.accumulation": 4, "model.remat": "full"})
    with pytest.raises(SetupError) as caught:
        memory.check(needs(activations=105 * MIB), spent, big)
    assert str(caught.value).endswith("Fix: lower data.seq_len (now 32) or data.batch_size (now 4).")


def test_between_90_and_100_percent_it_warns():
    cfg, has = tiny.config(), Capacity(100, "test")
    assert memory.check(needs(activations=90), cfg, has) == []
    (warning,) = memory.check(needs(activations=91), cfg, has)
    assert warning.startswith("warning: memory is short")
    (warning,) = memory.check(needs(activations=100), cfg, has)
    with pytest.raises(SetupError):
        memory.check(needs(activations=101), cfg, has)
    assert memory.check(needs(activations=10**15), cfg, None) == []  # a device that does not tell


def test_simulated_devices_share_the_host(monkeypatch):
    whole = memory.capacity()
    monkeypatch.setattr(jax, "local_device_count", lambda: 8)
    assert memory.capacity() == Capacity(whole.limit // 8, "host memory shared by 8 devices")


def test_running_out_inside_is_told_with_the_predicted_parts():
    with (
        pytest.raises(SetupError, match=r"ran out of memory .*activations .*Fix: ") as caught,
        memory.explained(tiny.config()),
    ):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm")
    assert isinstance(caught.value.__cause__, jax.errors.JaxRuntimeError)
    mesh = jax.set_mesh(sharding.make_mesh({}))  # as in the loop
    with mesh, pytest.raises(SetupError, match="ran out"), memory.explained(tiny.config()):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), memory.explained(tiny.config()):
        raise jax.errors.JaxRuntimeError("INTERNAL: another matter")
