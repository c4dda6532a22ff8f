"""MuonClip inside optax's wrappers, over any tree of parameters, in a checkpoint, with weights in sixteen bits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx

from k2jax.muonclip import (
    NS,
    Heads,
    MatrixSpec,
    MHAClip,
    QKClip,
    accumulate_max,
    by_ndim,
    describe,
    max_logits,
    muonclip,
    qk_clip,
    scale_by_muon,
)

F32 = NS.k2(dtype="float32")
TO_HEADS = MatrixSpec(-3, (-2, -1))
QUICK = {"xla_backend_optimization_level": 0}


def normal(seed, *shape, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def attention(seed=0):
    return {"wq": normal(seed, 6, 2, 4), "wk": normal(seed + 1, 6, 2, 4), "gain": normal(seed + 2, 5)}


ROLES = {"wq": TO_HEADS, "wk": TO_HEADS, "gain": None}
CLIP = QKClip({"attn": MHAClip(q="wq", k="wk")})


def equal(got, want, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **({"rtol": 1e-5, "atol": 1e-6} | tolerance)), got, want)


# --- wrappers -------------------------------------------------------------------------------------


def test_multi_steps_with_a_running_maximum_equals_one_update_of_the_whole_batch():
    """MultiSteps passes on the extra arguments of the last call alone, so each call gets the maximum so far."""
    params = attention()
    tx = muonclip(0.1, matrix_specs=ROLES, ns=F32, qk_clip=CLIP)
    multi = optax.MultiSteps(tx, every_k_schedule=3)

    @jax.jit
    def micro_step(params, state, running, grads, logits):
        running = accumulate_max(running, logits)
        updates, state = multi.update(grads, state, params, max_logits=running)
        running = jax.tree.map(lambda x: jnp.where(multi.has_updated(state), -jnp.inf, x), running)
        return optax.apply_updates(params, updates), state, running

    grads = [attention(10 * i) for i in range(1, 7)]
    tops = jnp.asarray([[400, 50], [5, 200], [90, 20], [1, 2], [3, 4], [5, 6]], jnp.float32)  # worst heads come early
    state, running = multi.init(params), {"attn": jnp.full(2, -jnp.inf)}
    got = params
    for i in range(6):
        got, state, running = micro_step(got, state, running, grads[i], {"attn": tops[i]})
    want, whole = params, tx.init(params)
    for half in (slice(0, 3), slice(3, 6)):
        mean = jax.tree.map(lambda *g: sum(g) / 3, *grads[half])
        updates, whole = tx.update(mean, whole, want, max_logits={"attn": tops[half].max(0)})
        want = optax.apply_updates(want, updates)
    equal(got, want)
    equal(state.inner_opt_state, whole)
    # What the last micro-batch alone would have asked for: no clip.
    assert (tops[2] < 100).all()
    assert float(running["attn"].max()) == -np.inf


def test_partition_gives_each_transformation_its_leaves():
    params, grads = attention(), attention(5)
    labels = {"wq": "muon", "wk": "muon", "gain": "frozen"}
    alone = muonclip(0.1, matrix_specs=ROLES, ns=F32, qk_clip=CLIP)
    tx = optax.partition(
        {"muon": muonclip(0.1, matrix_specs=ROLES, ns=F32, qk_clip=CLIP), "frozen": optax.set_to_zero()}, labels
    )
    tops = {"attn": jnp.array([50.0, 400])}
    got, state = jax.jit(tx.update, compiler_options=QUICK)(grads, tx.init(params), params, max_logits=tops)
    want, _ = alone.update(grads, alone.init(params), params, max_logits=tops)
    equal({k: got[k] for k in ("wq", "wk")}, {k: want[k] for k in ("wq", "wk")})
    assert not got["gain"].any()
    assert float(optax.tree_utils.tree_get(state, "clipped_fraction")) == 0.5


def test_a_recipe_from_parts_equals_the_whole():
    params, grads = attention(), attention(5)
    labels = {"wq": "muon", "wk": "muon", "gain": "adam"}
    parts = optax.partition(
        {
            "muon": scale_by_muon(matrix_specs=TO_HEADS, ns=F32),
            "adam": optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-8),
        },
        labels,
    )
    tx = optax.chain(parts, optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(0.02), qk_clip(CLIP.specs))
    whole = muonclip(0.02, matrix_specs=ROLES, ns=F32, qk_clip=CLIP)
    tops = {"attn": jnp.array([50.0, 400])}
    got, _ = tx.update(grads, tx.init(params), params, max_logits=tops)
    want, _ = whole.update(grads, whole.init(params), params, max_logits=tops)
    equal(got, want)


# --- any tree -------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Linear:
    """A module as Equinox has them: a dataclass that is a pytree, with None for what a layer does not have."""

    weight: jax.Array
    bias: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Attention:
    query: Linear
    key: Linear
    heads: int = dataclasses.field(metadata={"static": True}, default=2)


def test_a_dataclass_of_modules_trains_like_a_dict():
    """Torch's layout [out, in], as Equinox has it: heads lie side by side on the first axis."""
    model = Attention(Linear(normal(0, 8, 6), normal(1, 8)), Linear(normal(2, 8, 6)))
    roles = lambda path, leaf: MatrixSpec(-1, -2) if path.endswith("weight") else None  # noqa: E731
    head = lambda path: Heads(path, axis=-2, size=4)  # noqa: E731
    clip = MHAClip(head("query/weight"), head("key/weight"), q_bias=Heads("query/bias", axis=-1, size=4))
    tx = muonclip(0.1, matrix_specs=roles, ns=F32, qk_clip=QKClip({"attn": clip}))
    step = jax.jit(tx.update, compiler_options=QUICK)
    tops = {"attn": jnp.array([400.0, 50])}
    updates, _ = step(model, tx.init(model), model, max_logits=tops)
    after = optax.apply_updates(model, updates)
    assert isinstance(after, Attention)
    assert after.key.bias is None

    as_dict = {"q": {"w": model.query.weight.T.reshape(6, 2, 4), "b": model.query.bias.reshape(2, 4)}}
    as_dict |= {"k": {"w": model.key.weight.T.reshape(6, 2, 4)}}
    roles = {"q/w": TO_HEADS, "q/b": None, "k/w": TO_HEADS}
    tx = muonclip(0.1, matrix_specs=roles, ns=F32, qk_clip=QKClip({"attn": MHAClip("q/w", "k/w", q_bias="q/b")}))
    updates, _ = tx.update(as_dict, tx.init(as_dict), as_dict, max_logits=tops)
    want = optax.apply_updates(as_dict, updates)
    equal(after.query.weight.T.reshape(6, 2, 4), want["q"]["w"])
    equal(after.query.bias.reshape(2, 4), want["q"]["b"])
    equal(after.key.weight.T.reshape(6, 2, 4), want["k"]["w"])


def test_roles_as_a_tree_of_modules_may_hold_none_where_a_layer_has_no_bias():
    model = Attention(Linear(normal(0, 8, 6), normal(1, 8)), Linear(normal(2, 8, 6)))
    roles = jax.tree.map(lambda leaf: MatrixSpec(-1, -2) if leaf.ndim == 2 else None, model)
    assert "key/weight" in describe(model, roles)


def test_a_flax_nnx_state_trains():
    model = nnx.Sequential(nnx.Linear(4, 6, rngs=nnx.Rngs(0)), nnx.Linear(6, 3, rngs=nnx.Rngs(1)))
    _, params = nnx.split(model)
    tx = muonclip(0.1, matrix_specs=by_ndim(), ns=F32)
    assert [line.split()[1] for line in describe(params, by_ndim()).splitlines()[1:-1]] == ["adamw", "muon"] * 2
    updates, state = jax.jit(tx.update, compiler_options=QUICK)(params, tx.init(params), params)
    nnx.update(model, optax.apply_updates(params, updates))
    assert model(jnp.ones((2, 4))).shape == (2, 3)
    assert {x.shape for x in jax.tree.leaves(state)} == {(), (4, 6), (6, 3), (6,), (3,)}


# --- checkpoints, sixteen bits --------------------------------------------------------------------


def test_a_checkpoint_gives_the_state_back_and_new_coefficients_take_effect(tmp_path):
    params, tops = attention(), {"attn": jnp.array([50.0, 400])}
    tx = muonclip(optax.linear_schedule(0.1, 0.0, 10), matrix_specs=ROLES, ns=F32, qk_clip=CLIP)
    state = tx.init(params)
    for i in range(2):
        _, state = tx.update(attention(i), state, params, max_logits=tops)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", tx.init(params))
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)

    other = muonclip(0.1, matrix_specs=ROLES, ns=NS.fast("float32"), qk_clip=CLIP)
    fresh = other.init(params)
    got, _ = other.update(attention(3), restored, params, max_logits=tops)
    momentum = restored[0].mu["wq"] * 0.95 + attention(3)["wq"]
    exact, _ = other.update(
        attention(3) | {"wq": momentum}, fresh, params, max_logits=tops
    )  # the same direction from an empty momentum
    equal(got["wq"], exact["wq"], atol=1e-5)
    old, _ = tx.update(attention(3), restored, params, max_logits=tops)
    assert np.abs(got["wq"] - old["wq"]).max() > 1e-3


def test_momentum_in_bfloat16_keeps_its_dtype_and_stays_close():
    params, roles = {"w": normal(0, 12, 20)}, {"w": MatrixSpec()}
    exact, half = (muonclip(0.1, matrix_specs=roles, ns=F32, mu_dtype=dtype) for dtype in ("float32", "bfloat16"))
    states = [exact.init(params), half.init(params)]
    for i in range(5):
        (want, states[0]), (got, states[1]) = (
            tx.update({"w": normal(i, 12, 20)}, state, params) for tx, state in zip((exact, half), states, strict=True)
        )
    assert states[1].mu["w"].dtype == half.init(params).mu["w"].dtype == jnp.bfloat16
    error = float(jnp.linalg.norm(got["w"] - want["w"]) / jnp.linalg.norm(want["w"]))
    assert 1e-4 < error < 1e-2


def test_float32_masters_train_with_bfloat16_gradients():
    """The forward pass sees bfloat16; the optimizer is given the masters, and its updates have their dtype."""
    masters, target = {"w": normal(0, 8, 12)}, normal(1, 8, 12)
    tx = muonclip(1e-3, matrix_specs={"w": MatrixSpec()}, ns=F32, weight_decay=0.0)

    @jax.jit
    def step(masters, state):
        half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), masters)
        grads = jax.grad(lambda p: jnp.mean((p["w"].astype(jnp.float32) - target) ** 2))(half)
        updates, state = tx.update(grads, state, masters)
        return optax.apply_updates(masters, updates), state, grads, updates

    state = tx.init(masters)
    after, _, grads, updates = step(masters, state)
    assert (grads["w"].dtype, updates["w"].dtype, after["w"].dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    # A step of 1e-3 / 5 is below the rounding of most bfloat16 weights and reaches every master.
    assert (np.asarray(after["w"]) != np.asarray(masters["w"])).mean() > 0.99


# --- logits explode, and do not -------------------------------------------------------------------


def test_logits_that_explode_stay_near_tau_at_no_cost_in_loss():
    """Kimi K2's figures 2 and 3 in small: queries and keys that start inflated, with and without QK-Clip."""
    width, heads, size, tau = 16, 2, 8, 30.0
    params = {name: normal(i, width, heads, size, scale=0.5) for i, name in enumerate(("wq", "wk", "wv"))}
    params |= {"wq": 4 * params["wq"], "wk": 4 * params["wk"]}
    x = normal(5, 4, 12, width)
    target = jnp.einsum("btd,dhk->bthk", jnp.cumsum(x, 1) / jnp.arange(1, 13)[:, None], normal(6, width, heads, size))

    def loss(p):
        q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in ("wq", "wk", "wv"))
        out = jax.nn.dot_product_attention(q, k, v, scale=size**-0.5, is_causal=True)
        return jnp.mean((out - target) ** 2), {"attn": max_logits(q, k, scale=size**-0.5)}

    def train(config):
        tx = muonclip(0.02, weight_decay=0.0, matrix_specs=TO_HEADS, ns=F32, qk_clip=config)

        def step(carry, _):
            params, state = carry
            (value, tops), grads = jax.value_and_grad(loss, has_aux=True)(params)
            updates, state = tx.update(grads, state, params, max_logits=tops)
            return (optax.apply_updates(params, updates), state), (value, tops["attn"].max())

        run = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=60)[1], compiler_options=QUICK)
        return run(params)

    (losses_on, tops_on), (losses_off, tops_off) = train(QKClip({"attn": MHAClip("wq", "wk")}, tau)), train(None)
    assert tops_on[0] == tops_off[0] > 5 * tau
    assert tops_on[1:].max() < 1.1 * tau
    assert tops_off[1:].min() > 5 * tau
    assert losses_on[-1] < losses_off[-1]
