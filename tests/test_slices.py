"""A mesh over two TPU slices that are not there: device order, and a train step that the real compiler accepts."""

import pytest

from tests.on_devices import told_in

pytestmark = pytest.mark.check
pytest.importorskip("libtpu", reason="it exists for Linux on x86-64 alone")

# Without these, libtpu asks a metadata server which machine this is.
NO_TPU = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

PROGRAM = """
import dataclasses, json, re
from functools import partial
import jax
from jax.experimental import topologies
from k2jax import sharding
from k2jax.training import memory
from k2jax.training.optimizer import make_optimizer
from k2jax.training.step import init_state, train_step
from tests import tiny

topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2", num_slices=2)
jax.devices, jax.device_count = lambda: topology.devices, lambda: len(topology.devices)
told = {}
try:
    sharding.make_mesh({"slice": 4, "fsdp": 2})
except ValueError as error:
    told["refused"] = str(error)
sizes = {"slice": 2, "fsdp": 2, "expert": 2}
small = {"model.num_layers": 2, "model.attention": ("moba", "full")}
cfg = tiny.config("stdlib", {f"mesh.{axis}": n for axis, n in sizes.items()} | small, batch=16, accumulation=2)
mesh = sharding.make_mesh(sizes)
told["slices"] = [sorted({device.slice_index for device in part.flat}) for part in mesh.devices]
with jax.set_mesh(mesh):
    tx = make_optimizer(cfg)
    shapes = jax.eval_shape(lambda: init_state(cfg, tx, jax.random.key(0)))
    state = jax.tree.map(partial(sharding.on_mesh, mesh=mesh), shapes)
    step = jax.jit(partial(train_step, cfg=cfg, tx=tx), donate_argnums=0).lower(state, memory.batch_shapes(cfg, mesh))
    compiled = step.compile()
# Between slices the compiler sends and receives over the hosts' network, within one it uses collectives.
told["between"] = len(re.findall(r" send\\(", compiled.as_text()))
told["within"] = len(re.findall(r" all-gather(?:-start)?\\(", compiled.as_text()))
print(json.dumps(told))
"""


def test_two_slices_lie_on_the_slice_axis_and_a_train_step_compiles_for_them():
    told = told_in(NO_TPU, PROGRAM, timeout=1200)
    assert told["slices"] == [[0], [1]]
    assert "mesh.slice=4: the devices form 2 slices" in told["refused"]
    # Weights are gathered within a slice; gradients and a few sums cross, and there are fewer of those.
    assert 0 < told["between"] < told["within"]
