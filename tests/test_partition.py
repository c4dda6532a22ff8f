"""The shard_map seam: a kernel sees its part of every array, however the arrays are cut, and names no mesh axis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from k2jax.kernels.partition import attend_over_mesh, dims, mesh_axes, num_cuts, over_mesh
from tests.on_devices import told_by

FOUR_DEVICES = """
import json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from k2jax.kernels.partition import mesh_axes, over_mesh

mesh = jax.make_mesh((2, 2), ("rows", "columns"), axis_types=(AxisType.Explicit,) * 2)

def kernel(x_BD, w_D):
    assert x_BD.shape == (3, 2), x_BD.shape
    return x_BD * w_D, jax.lax.psum((x_BD @ w_D).sum(), ("rows", "columns"))

with jax.set_mesh(mesh):
    x = jax.device_put(jnp.arange(24.0).reshape(6, 4), NamedSharding(mesh, P("rows", "columns")))
    w = jnp.arange(4.0)  # whole: the seam cuts it as x is cut
    def call(x, w):
        arrays = {"x_BD": x, "w_D": w}
        return over_mesh(kernel, arrays, ("BD", ""), mesh_axes({"x_BD": x}))
    rows, total = jax.jit(call)(x, w)
    grad_w = jax.jit(jax.grad(lambda w: call(x, w)[0].sum() + 2 * call(x, w)[1]))(w)
    y, expected = np.arange(24.0).reshape(6, 4), np.arange(4.0)
told = [rows.tolist() == (y * expected).tolist(), float(total) == float((y @ expected).sum()),
        grad_w.tolist() == (3 * y.sum(0)).tolist(), str(rows.sharding.spec)]
print(json.dumps(told))
"""


def test_a_kernel_runs_on_parts_with_exact_gradients():
    assert told_by(FOUR_DEVICES, devices=4) == [True, True, True, "P('rows', 'columns')"]


ATTENTION = """
import json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from k2jax.kernels.attention import attention
from k2jax.moba_pallas import moba_attention

rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((2, 24, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
q[:, :12] *= 3  # the largest logits lie in the first part
segments = np.array([[1] * 10 + [2] * 14, [1] * 24], np.int32)
mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=(AxisType.Explicit,) * 3)

def full(q, k, v):
    return attention(q, k, v, scale=0.3, segment_ids=segments, max_logits=True)

def moba(q, k, v):
    out, residuals = moba_attention(q, k, v, block_size=4, top_k=3, segment_ids=segments, return_residuals=True)
    return out, residuals.max_logit_BH, residuals.lse_BHT, residuals.selected_BHTJ

told = {}
for name, attend in (("full", full), ("moba", moba)):
    run = jax.jit(lambda *x: (attend(*x), jax.grad(lambda *x: (attend(*x)[0] ** 2).sum(), (0, 1, 2))(*x)))
    expected = run(q, k, v)
    for batch, length, heads in (("a", "b", "c"), (None, ("a", "b"), None)):
        with jax.set_mesh(mesh):
            place = NamedSharding(mesh, P(batch, length, heads, None))
            found = run(*(jax.device_put(x, place) for x in (q, k, v)))
            errors = jax.tree.map(lambda x, y: float(np.abs(np.asarray(x, np.float64) - y).max()), found, expected)
            told[f"{name} {length}"] = max(jax.tree.leaves(errors))
print(json.dumps(told))
"""


def test_attention_is_the_same_however_it_is_cut():
    errors = told_by(ATTENTION, devices=8)
    assert len(errors) == 4
    assert max(errors.values()) < 2e-5, errors


BALANCED = """
import functools, json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from k2jax.kernels.attention import reference
from k2jax.kernels.partition import attend_over_mesh

rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((2, 48, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
segments = np.array([[1] * 10 + [2] * 38, [1] * 48], np.int32)
outs = (reference.Attended("BTHV", "BHT", "BH"), "BT")

def attend(q, k, v, segment_ids, q_offset):
    attended = reference.attention(q, k, v, scale=0.3, segment_ids=segment_ids, q_offset=q_offset)
    # How many keys this device's queries see, and who it is: kept by the devices that the queries come from.
    seen = (q_offset + jnp.arange(q.shape[1]) + 1).sum()
    who = jax.lax.axis_index(axes) if axes else 0
    return attended, jnp.broadcast_to(1000 * seen + who, q.shape[:2])

def run(q, k, v, balance_from):
    return attend_over_mesh(attend, q, k, v, segments, 0, outs, balance_from)

def all_of(*qkv, balance_from):
    loss = lambda *qkv: (run(*qkv, balance_from)[0].out_BTHV ** 2).sum()
    return jax.jit(lambda *qkv: (run(*qkv, balance_from), jax.grad(loss, (0, 1, 2))(*qkv)))(*qkv)

told, axes = {}, None
(expected, _), gradients = all_of(q, k, v, balance_from=None)
for shape, names, axes in (((3, 1), ("a", "b"), "a"), ((2, 2), ("a", "b"), ("a", "b")), ((2, 1), ("a", "b"), "a")):
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[: np.prod(shape)])
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, P(None, axes, None, None))
        (found, count), found_gradients = all_of(*(jax.device_put(x, place) for x in (q, k, v)), balance_from=4)
        pairs = zip(jax.tree.leaves((found, found_gradients)), jax.tree.leaves((expected, gradients)), strict=True)
        error = max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in pairs)
        halves = {int(x) for x in np.asarray(count)[0]}
        work = [sum(x // 1000 for x in halves if x % 1000 == device) for device in range(np.prod(shape))]
        told[str(shape)] = error, work
print(json.dumps(told))
"""


def test_halves_exchanged_give_the_same_and_every_device_the_same_work():
    told = told_by(BALANCED, devices=4)
    assert len(told) == 3
    assert all(error < 2e-5 for error, _ in told.values()), told
    assert told["(3, 1)"][1] == [392] * 3
    assert told["(2, 2)"][1] == [294] * 4


def test_dimensions_are_the_letters_behind_a_name():
    assert dims("segment_ids_BS") == "BS"


def test_cuts_of_a_sequence_are_counted():
    assert num_cuts(jnp.zeros((1, 4, 1, 8))) == 1
    mesh = jax.sharding.AbstractMesh((2, 3, 2), ("a", "b", "c"), axis_types=(AxisType.Explicit,) * 3)
    with jax.sharding.use_abstract_mesh(mesh):
        for cut, count in ((None, 1), ("b", 3), (("b", "c"), 6)):
            place = NamedSharding(mesh, P("a" if cut == "b" else None, cut))
            assert num_cuts(jax.ShapeDtypeStruct((2, 12, 1, 8), jnp.float32, sharding=place)) == count


def test_without_a_mesh_a_kernel_runs_as_it_is():
    arrays = {"x_B": jnp.arange(3.0)}
    assert mesh_axes(arrays) == {}
    np.testing.assert_array_equal(over_mesh(lambda x_B: 2 * x_B, arrays, "B", {}), [0, 2, 4])


@pytest.fixture
def mesh():
    mesh = jax.make_mesh((1, 1), ("rows", "columns"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        yield mesh


def cut(mesh, shape, *parts):
    return jax.device_put(np.zeros(shape, np.float32), NamedSharding(mesh, P(*parts)))


def test_arrays_must_agree_on_how_a_dimension_is_cut(mesh):
    arrays = {"x_BD": cut(mesh, (2, 3), "rows", None), "y_BE": cut(mesh, (2, 3), None, None)}
    with pytest.raises(ValueError, match=r"y_BE cuts B over \(\), another array over \('rows',\)"):
        mesh_axes(arrays)


def test_query_and_key_heads_must_be_cut_alike(mesh):
    q = cut(mesh, (1, 4, 2, 8), None, None, "rows", None)
    k = cut(mesh, (1, 4, 1, 8))
    with pytest.raises(ValueError, match="a device needs whole groups"):
        attend_over_mesh(lambda *a, **k: None, q, k, k, None, 0, None)
