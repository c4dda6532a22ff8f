"""QK-Clip: what it means for the logits of real attention, and the max logits that feed it.

Legend: B batch, T queries, S keys, D model, L layers, H query heads, G key heads, K head size, N no position,
P rotary, V value, C latent, R query latent.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from k2jax.muonclip import (
    MatrixSpec,
    MHAClip,
    MLAClip,
    QKClip,
    accumulate_max,
    max_logits,
    muonclip,
    qk_clip,
)
from tests.test_muonclip import F32, TO_HEADS, N, P, V, first_update, normal, zeros_like

FROM_HEADS = MatrixSpec((-3, -2), -1)


# --- what it means for logits ---------------------------------------------------------------------


def rope(x_BTHP):
    T, size = x_BTHP.shape[1], x_BTHP.shape[-1]
    angle = np.arange(T)[:, None, None] * 100.0 ** (-np.arange(0, size, 2) / size)
    a, b = x_BTHP[..., ::2], x_BTHP[..., 1::2]
    return jnp.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def rms_norm(x):
    return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def mla_layer(seed, q_lora=True, rotary=P, D=16, H=4, C=10, R=12):
    names = {"wkv_a": (D, C + rotary), "wkv_b": (C, H, N + V), "wo": (H, V, D)}
    names |= {"wq_a": (D, R), "wq_b": (R, H, N + rotary)} if q_lora else {"wq": (D, H, N + rotary)}
    params = {name: normal(seed + i, *shape) for i, (name, shape) in enumerate(sorted(names.items()))}
    spread = jnp.linspace(0.2, 2.0, H)[:, None]  # some heads above tau, some below
    q = "wq_b" if q_lora else "wq"
    return params | {q: params[q] * spread}


def mla_qk(params, x_BTD):
    """Query and key of every head, [B, T, H, N + P], as the model of the project makes them."""
    C = params["wkv_b"].shape[-3]
    if "wq" in params:
        q = jnp.einsum("btd,dhk->bthk", x_BTD, params["wq"])
    else:
        q = jnp.einsum("btr,rhk->bthk", rms_norm(x_BTD @ params["wq_a"]), params["wq_b"])
    kv = x_BTD @ params["wkv_a"]
    k_nope = jnp.einsum("btc,chk->bthk", rms_norm(kv[..., :C]), params["wkv_b"])[..., :N]
    k_rope = jnp.broadcast_to(rope(kv[..., None, C:]), (*k_nope.shape[:3], kv.shape[-1] - C))
    q = jnp.concatenate([q[..., :N], rope(q[..., N:])], -1)
    return q, jnp.concatenate([k_nope, k_rope], -1)


def dense_max(q, k, scale=0.3):
    """Signed causal maximum per head in float64."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
    logits = np.einsum("bthk,bshk->bhts", q, k) * scale
    return np.where(np.tril(np.ones(logits.shape[-2:], bool)), logits, -np.inf).max((0, 2, 3))


def clip_update(params, spec, S, tau, weight_decay=0.0, grads=None):
    tx = muonclip(0.1, weight_decay=weight_decay, matrix_specs=all_roles, ns=F32, qk_clip=QKClip({"attn": spec}, tau))
    grads = zeros_like(params) if grads is None else grads
    logits = {"attn": jnp.asarray(S, jnp.float32)}
    updates, state = first_update(tx, grads, params, max_logits=logits)
    return optax.apply_updates(params, updates), state


def all_roles(path, leaf):
    name = path.split("/")[-1]
    return {"wq_b": TO_HEADS, "wq": TO_HEADS, "wk": TO_HEADS, "wkv_b": TO_HEADS, "wo": FROM_HEADS}.get(
        name, None if name.startswith("b") else MatrixSpec()
    )


@pytest.mark.parametrize("q_lora", [True, False], ids=["q-lora", "no q-lora"])
@pytest.mark.parametrize("rotary", [P, 0], ids=["rope", "no rope"])
def test_recomputed_mla_logits_equal_min_of_S_and_tau(q_lora, rotary):
    params, x = mla_layer(0, q_lora, rotary), normal(9, 2, 7, 16)
    before = dense_max(*mla_qk(params, x))
    tau = float(np.sort(before)[1:3].mean())
    spec = MLAClip(q="wq_b" if q_lora else "wq", kv="wkv_b", nope=N)
    after, state = clip_update(params, spec, before, tau)
    np.testing.assert_allclose(dense_max(*mla_qk(after, x)), np.minimum(before, tau), rtol=2e-6)
    assert (before > tau).sum() == 2
    assert float(optax.tree_utils.tree_get(state, "clipped_fraction")) == 0.5
    assert np.isclose(float(optax.tree_utils.tree_get(state, "min_gamma")), tau / before.max())


def test_values_output_and_shared_rotary_key_are_bitwise_untouched():
    params = mla_layer(0)
    after, _ = clip_update(params, MLAClip(q="wq_b", kv="wkv_b", nope=N), [1e4] * 4, 100.0)
    for name in ("wkv_a", "wo", "wq_a"):
        np.testing.assert_array_equal(after[name], params[name])
    np.testing.assert_array_equal(after["wkv_b"][..., N:], params["wkv_b"][..., N:])
    np.testing.assert_allclose(after["wkv_b"][..., :N], 0.1 * params["wkv_b"][..., :N], rtol=1e-5)
    np.testing.assert_allclose(after["wq_b"][..., :N], 0.1 * params["wq_b"][..., :N], rtol=1e-5)
    np.testing.assert_allclose(after["wq_b"][..., N:], 0.01 * params["wq_b"][..., N:], rtol=1e-4)


def test_clip_scales_the_updated_weights_and_leaves_momentum_alone():
    params, grads = mla_layer(0), mla_layer(50)
    spec, S = MLAClip(q="wq_b", kv="wkv_b", nope=N), [400.0, 50.0, 100.0, 101.0]
    plain, plain_state = clip_update(params, spec, [0.0] * 4, 100.0, weight_decay=0.1, grads=grads)
    clipped, state = clip_update(params, spec, S, 100.0, weight_decay=0.1, grads=grads)
    gamma = np.minimum(1, 100 / np.asarray(S))[:, None]
    np.testing.assert_allclose(clipped["wq_b"][..., N:], plain["wq_b"][..., N:] * gamma, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(clipped["wq_b"][:, 1:3], plain["wq_b"][:, 1:3])
    jax.tree.map(np.testing.assert_array_equal, state[0], plain_state[0])
    x = normal(9, 2, 7, 16)
    want = dense_max(*mla_qk(plain, x)) * gamma[:, 0]
    np.testing.assert_allclose(dense_max(*mla_qk(clipped, x)), want, rtol=5e-6)


@pytest.mark.parametrize("biases", [False, True], ids=["no bias", "bias"])
def test_recomputed_gqa_logits_equal_min_of_S_and_tau(biases):
    params = {"wq": normal(0, 16, 4, 8) * jnp.linspace(0.3, 2, 4)[:, None], "wk": normal(1, 16, 2, 8)}
    params |= {"bq": normal(2, 4, 8), "bk": normal(3, 2, 8)} if biases else {}
    x = normal(4, 2, 7, 16)

    def logits(p):
        q, k = jnp.einsum("btd,dhk->bthk", x, p["wq"]), jnp.einsum("btd,dgk->btgk", x, p["wk"])
        q, k = (q + p["bq"], k + p["bk"]) if biases else (q, k)
        return dense_max(rope(q), rope(k))

    before = logits(params)
    tau = float(np.sort(before)[:2].mean())
    spec = MHAClip(q="wq", k="wk", q_bias="bq", k_bias="bk") if biases else MHAClip(q="wq", k="wk")
    after, _ = clip_update(params, spec, before, tau)
    np.testing.assert_allclose(logits(after), np.minimum(before, tau), rtol=3e-6)


def test_gqa_scales_a_shared_key_once_and_gives_siblings_back_what_they_lose():
    params = {"wq": jnp.ones((3, 4, 2)), "wk": jnp.ones((3, 2, 2))}
    after, _ = clip_update(params, MHAClip(q="wq", k="wk"), [400.0, 50.0, 90.0, 20.0], 100.0)
    np.testing.assert_allclose(after["wq"][0, :, 0], [0.5, 2, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(after["wk"][0, :, 0], [0.5, 1], rtol=1e-6)


@pytest.mark.parametrize("S", [-400.0, 0.0, 99.99, 100.0, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_heads_not_above_tau_change_nothing_bitwise(S, kind):
    if kind == "mla":
        params, grads, spec = mla_layer(0), mla_layer(50), MLAClip(q="wq_b", kv="wkv_b", nope=N)
    else:
        params, grads = ({"wq": normal(i, 16, 4, 8), "wk": normal(i + 1, 16, 2, 8)} for i in (0, 50))
        spec = MHAClip(q="wq", k="wk")
    tx = qk_clip({"attn": spec}, tau=100.0)
    updates, state = first_update(tx, grads, params, max_logits={"attn": jnp.full(4, S)})
    jax.tree.map(np.testing.assert_array_equal, updates, grads)
    assert float(state.clipped_fraction) == 0
    assert float(state.min_gamma) == 1


def test_scanned_layers_equal_layers_one_by_one():
    layers, updates = ([mla_layer(seed + 100 * i) for i in range(3)] for seed in (0, 300))
    S = jnp.asarray([[400.0, 50, 90, 20], [10, 10, 10, 1000], [-500, np.nan, 101, 5]], jnp.float32)
    tx = qk_clip({"attn": MLAClip(q="wq_b", kv="wkv_b", nope=N)})
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)  # noqa: E731
    got, _ = first_update(tx, stack(updates), stack(layers), max_logits={"attn": S})
    one_by_one = zip(updates, layers, S, strict=True)
    want = stack([first_update(tx, u, p, max_logits={"attn": s})[0] for u, p, s in one_by_one])
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert not np.array_equal(got["wq_b"], stack(updates)["wq_b"])


def test_two_groups_of_layers_are_clipped_by_their_own_entries():
    params = {"dense": {"wq": jnp.ones((1, 3, 2, 2)), "wk": jnp.ones((1, 3, 2, 2))}}
    params["moe"] = jax.tree.map(lambda x: jnp.concatenate([x, x]), params["dense"])
    specs = {group: MHAClip(q=f"{group}/wq", k=f"{group}/wk") for group in ("dense", "moe")}
    tx = qk_clip(specs)
    logits = {"dense": jnp.array([[1.0, 400]]), "moe": jnp.array([[1.0, 1], [400, 1]])}
    updates, state = first_update(tx, zeros_like(params), params, max_logits=logits)
    after = optax.apply_updates(params, updates)
    np.testing.assert_allclose(after["dense"]["wq"][:, 0, :, 0], [[1, 0.5]])
    np.testing.assert_allclose(after["moe"]["wq"][:, 0, :, 0], [[1, 1], [0.5, 1]])
    np.testing.assert_allclose(state.clipped_fraction, 2 / 6, rtol=1e-6)


# --- max logits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 7, 128, 300])
def test_max_logits_equals_dense_float64(T):
    q, k = normal(0, 2, T, 4, 8), normal(1, 2, T, 2, 8)
    np.testing.assert_allclose(max_logits(q, k, scale=0.3), dense_max(q, k), rtol=1e-6)


def test_max_logits_is_signed_and_respects_the_mask():
    q, k = jnp.ones((1, 2, 1, 4)), jnp.stack([-jnp.ones((1, 1, 4)), jnp.ones((1, 1, 4))], 1)
    assert float(max_logits(q[:, :1], k[:, :1], scale=1.0)[0]) == -4
    assert float(max_logits(q, k, scale=1.0)[0]) == 4
    q = q.at[:, 1].multiply(-1)  # the second key is now large for the first query only, which may not see it
    assert float(max_logits(q, k, scale=1.0, causal=False)[0]) == 4
    assert float(max_logits(q, k, scale=1.0, segment_ids=jnp.array([[1, 2]]))[0]) == -4
    assert float(max_logits(q, 3 * k, scale=1.0)[0]) == 12  # second query, first key


def test_max_logits_of_rectangular_cross_attention_and_its_errors():
    q, k = normal(0, 1, 5, 2, 8), normal(1, 1, 9, 2, 8)
    want = (np.einsum("bthk,bshk->bhts", q, k) * 0.5).max((0, 2, 3))
    np.testing.assert_allclose(max_logits(q, k, scale=0.5, causal=False), want, rtol=1e-5)
    with pytest.raises(ValueError, match="as many queries as keys, got 5 and 9"):
        max_logits(q, k, scale=0.5)
    with pytest.raises(ValueError, match="2 query heads are not a multiple of 3"):
        max_logits(q, normal(1, 1, 5, 3, 8), scale=0.5)


def test_max_logits_carries_no_gradient():
    q, k = normal(0, 1, 5, 2, 8), normal(1, 1, 5, 2, 8)
    grads = jax.grad(lambda q, k: max_logits(q, k, scale=1.0).sum(), argnums=(0, 1))(q, k)
    assert not any(g.any() for g in grads)


def test_accumulation_over_micro_batches_takes_the_maximum():
    q, k = normal(0, 4, 7, 2, 8), normal(1, 4, 7, 2, 8)
    whole = {"attn": max_logits(q, k, scale=1.0)}
    halves = [{"attn": max_logits(q[i : i + 2], k[i : i + 2], scale=1.0)} for i in (0, 2)]
    np.testing.assert_allclose(accumulate_max(*halves)["attn"], whole["attn"], rtol=1e-6)


# --- errors of QK-Clip ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"max_logits has no 'attn' \(it has \[\]\); pass max_logits="),
        ({"max_logits": None}, "max_logits has no 'attn'"),
        ({"max_logits": {"attention": jnp.ones(4)}}, r"max_logits has no 'attn' \(it has \['attention'\]\)"),
        (
            {"max_logits": {"attn": jnp.ones(3)}},
            r"max_logits\['attn'\] has shape \(3,\), but its weights need \(4,\)",
        ),
        (
            {"max_logits": {"attn": jnp.ones(4), "moe": jnp.ones(4)}},
            "'moe', which QKClip.specs does not name",
        ),
    ],
)
def test_wrong_max_logits_are_an_error_and_never_a_skipped_clip(given, message):
    params = mla_layer(0)
    clip = QKClip({"attn": MLAClip(q="wq_b", kv="wkv_b", nope=N)})
    tx = muonclip(0.1, matrix_specs=all_roles, qk_clip=clip)
    with pytest.raises(ValueError, match=message):
        first_update(tx, zeros_like(params), params, **given)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (
            {"a": MLAClip(q="wq_d", kv="wkv_b", nope=N)},
            r"specs\['a'\].q names 'wq_d'.*closest one is 'wq_[ab]'",
        ),
        ({"a": MLAClip(q="wq_b", kv="wkv_b", nope=13)}, "nope=13 within both head sizes"),
        ({"a": MLAClip(q="wq_a", kv="wkv_b", nope=N)}, "heads on axis -2"),
        ({"a": MHAClip(q="wkv_b", k="wq_b")}, "same layers and head size"),
        ({"a": MHAClip(q="wq_b", k="wq_b")}, "clip a leaf once"),
        ({}, "QKClip.specs is empty"),
    ],
)
def test_wrong_clip_specs_are_named(specs, message):
    with pytest.raises(ValueError, match=message):
        qk_clip(specs).init(mla_layer(0))


def test_tau_must_be_positive():
    with pytest.raises(ValueError, match=r"QKClip\.tau must be positive, got 0"):
        QKClip({"a": MHAClip(q="wq", k="wk")}, tau=0)
