"""The mesh and how the model lies on it: several devices tell what one device tells."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from k2jax import sharding
from k2jax.model import init_params
from tests import tiny
from tests.on_devices import told_by

# The other meshes and the whole train step: tests/test_meshes.py.
MESHES = {"gqa": {"data": 2, "tensor": 2}, "mla": {"fsdp": 2, "expert": 2, "seq": 2}}

SPREAD = """
import functools, json, sys
import jax, jax.numpy as jnp, numpy as np
from k2jax import model, sharding
from k2jax.config import GQAConfig, MLAConfig, MoBAConfig, ModelConfig, MoEConfig

def config(attn):
    return ModelConfig(
        vocab_size=16, dim=8, num_layers=2, num_heads=2, mlp_dim=8, attn=attn,
        attention=("full", "moba"), moba=MoBAConfig(block_size=4, top_k=2), dtype="float32",
        moe=MoEConfig(num_experts=4, experts_per_token=2, expert_dim=4),
    )

rng = np.random.default_rng(0)
tokens = rng.integers(0, 16, (4, 12)).astype(np.int32)
segments = np.array([[1] * 5 + [2] * 7, [1] * 12, [1] * 3 + [2] * 9, [1] * 9 + [0] * 3], np.int32)

def loss(params, tokens, segments, cfg):
    logp, aux = model.token_logprobs(params, cfg, tokens, segments, chunk=4, max_logits=True, selections=True)
    return -logp.mean() + 0.1 * aux.balance_loss, (logp, aux)

def run(cfg, sizes):
    mesh = sharding.make_mesh(sizes)
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(functools.partial(model.init_params, cfg), jax.random.key(0))
        rng = np.random.default_rng(1)
        draw = lambda x: 0.5 * rng.standard_normal(x.shape, np.float32)
        params = jax.tree.map(lambda x: jax.device_put(draw(x), sharding.on_mesh(x, mesh).sharding), shapes)
        spread = jax.device_put((tokens, segments), sharding.named(mesh, "batch", "length"))
        step = jax.jit(jax.value_and_grad(functools.partial(loss, cfg=cfg), has_aux=True),
                       compiler_options={"xla_backend_optimization_level": 0})
        result = step(params, *spread)
        same = jax.tree.map(lambda p, g: p.sharding == g.sharding, params, result[1])
        assert all(jax.tree.leaves(same)), same
    return jax.device_get(result)

def worst(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.max(np.abs(np.asarray(x, np.float64) - np.asarray(y)))) for x, y in pairs)

told = {}
for name, attn in (("gqa", GQAConfig(num_kv_heads=2, head_dim=4)), ("mla", MLAConfig(8, 4, 4, 4, q_lora_rank=8))):
    cfg = config(attn)
    (_, (logp, aux)), grads = run(cfg, json.loads(sys.argv[1])[name])
    (_, (logp_1, aux_1)), grads_1 = run(cfg, {})
    told[name] = {"logp": worst(logp, logp_1), "aux": worst(aux, aux_1), "grads": worst(grads, grads_1),
                  "size": float(np.std(logp))}
for key, attempt in {
    "too many": lambda: sharding.make_mesh({"data": 16}),
    "indivisible": lambda: jax.device_put(np.zeros((6, 2)),
                                          sharding.named(sharding.make_mesh({"data": 4}), "batch", None)),
}.items():
    try:
        attempt()
    except ValueError as error:
        told[key] = str(error)
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told():
    """What a process with eight devices tells."""
    return told_by(SPREAD, devices=8, arguments=[json.dumps(MESHES)])


@pytest.mark.parametrize("attn", MESHES)
def test_devices_together_tell_what_one_tells(told, attn):
    errors = told[attn]
    assert errors["size"] > 0.1
    assert errors["logp"] < 1e-5
    assert errors["aux"] < 1e-4  # max logits, loads, balance loss, routing and selections
    assert errors["grads"] < 1e-5


def test_more_devices_than_there_are_is_refused(told):
    assert told["too many"] == "mesh.data=16 asks for 16 devices but there are 8: lower it"


def test_a_batch_that_does_not_divide_is_refused(told):
    assert "(6, 2)" in told["indivisible"]


def test_an_unknown_axis_is_refused():
    with pytest.raises(ValueError, match=r"mesh\.dta=2: no such axis; use slice, data, fsdp, expert, seq, tensor"):
        sharding.make_mesh({"dta": 2})


def abstract(**sizes):
    shape = tuple(sizes.get(axis, 1) for axis in sharding.AXES)
    return jax.sharding.AbstractMesh(shape, sharding.AXES, axis_types=(jax.sharding.AxisType.Explicit,) * len(shape))


def test_specs_name_only_axes_that_cut():
    mesh = abstract(data=2, expert=2, tensor=4)
    assert sharding.spec(mesh, "batch", None, "heads") == P(("data", "expert"), None, "tensor")
    assert sharding.spec(abstract(), "batch", "length") == P(None, None)
    with pytest.raises(KeyError, match="batsh"):
        sharding.spec(mesh, "batsh")


def test_every_matrix_of_the_model_is_cut_for_storage():
    cfg = tiny.config().model
    key = jax.eval_shape(lambda: jax.random.key(0))
    with jax.sharding.use_abstract_mesh(abstract(fsdp=2)):
        shapes = jax.eval_shape(lambda key: init_params(cfg, key), key)
    whole = {
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
        if "fsdp" not in str(leaf.sharding.spec)
    }
    assert all(name.endswith("['scale']") or name.endswith("['bias']") for name in whole), whole


def test_without_a_mesh_nothing_is_laid_out():
    x = jnp.zeros((2, 3))
    assert sharding.layout(x) is None
    assert sharding.num_shards(x, 0) == 1
    assert sharding.whole(x, 0) is x
    assert sharding.like(x, jnp.zeros((2, 3))) is x
    assert sharding.weight(x, jnp.float32) is not None


def test_layers_read_a_weight_whole_along_what_is_cut_for_storage():
    with jax.sharding.use_abstract_mesh(abstract(fsdp=2, tensor=2)):
        shape = jax.ShapeDtypeStruct((4, 8), np.float32, sharding=None)
        out = jax.eval_shape(lambda w: sharding.weight(jax.reshard(w, P("fsdp", "tensor")), jnp.bfloat16), shape)
    assert out.sharding.spec == P(None, "tensor")
    assert out.dtype == jnp.bfloat16
