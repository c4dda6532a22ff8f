"""Experts spread over devices: the same sums and the same gradients, whatever the degree and whatever moves."""

from tests.on_devices import told_by

EIGHT_DEVICES = """
import dataclasses, functools, json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from k2jax import sharding
from k2jax.config import MoEConfig
from k2jax.layers.moe import run_experts

cfg = MoEConfig(num_experts=8, experts_per_token=3, expert_dim=6)
rng = np.random.default_rng(0)
draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
x, cotangent = draw(8, 5, 4), draw(8, 5, 4)
ids = np.stack([[rng.permutation(8)[:3] for _ in range(5)] for _ in range(8)]).astype(np.int32)
ids[0] = [0, 1, 2]  # a sequence that loads one device alone
mix = draw(8, 5, 3)
w = {"w_gate": draw(8, 4, 6), "w_up": draw(8, 4, 6), "w_down": draw(8, 6, 4)}

def dense(w, x, mix):
    chosen = (ids[..., None] == np.arange(8)) * mix[..., None]
    hidden = jax.nn.silu(jnp.einsum("BTD,EDF->BTEF", x, w["w_gate"])) * jnp.einsum("BTD,EDF->BTEF", x, w["w_up"])
    return jnp.einsum("BTEF,EFD,BTJE->BTD", hidden, w["w_down"], chosen)

def worst(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.max(np.abs(np.asarray(x, np.float64) - np.asarray(y)))) for x, y in pairs)

expected = jax.value_and_grad(lambda *a: (dense(*a) * cotangent).sum(), (0, 1, 2))(w, x, mix)
told = {}
for dispatch in ("gather", "local"):
    for sizes in ({}, {"expert": 2}, {"expert": 4}, {"expert": 2, "tensor": 2}, {"data": 2, "expert": 2, "fsdp": 2}):
        mesh = sharding.make_mesh(sizes)
        with jax.set_mesh(mesh):
            place = functools.partial(jax.device_put, device=sharding.named(mesh, "batch", None))
            spread = sharding.shard_params({"moe": {"experts": w}})["moe"]["experts"]
            run = functools.partial(run_experts, cfg=dataclasses.replace(cfg, dispatch=dispatch))
            loss = lambda w, x, mix: (run(w, x, place(ids), mix) * place(cotangent)).sum()
            found = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(spread, place(x), place(mix))
            told[f"{dispatch} {sizes}"] = worst(found, expected)
            part = spread["w_up"].addressable_shards[0].data.size * sizes.get("expert", 1)
            assert part * sizes.get("tensor", 1) * sizes.get("fsdp", 1) == w["w_up"].size
print(json.dumps(told))
"""


def test_experts_are_the_same_on_every_mesh():
    errors = told_by(EIGHT_DEVICES, devices=8)
    assert len(errors) == 10
    assert max(errors.values()) < 2e-5, errors
