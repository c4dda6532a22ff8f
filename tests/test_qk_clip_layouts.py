"""QK-Clip beyond the usual layout: fused and flat weights, torch's order, norms, bounded growth, what it reports.

Legend: B batch, T queries, S keys, D model, L layers, H query heads, G key heads, R queries per key head, K head size,
N no position, P rotary, V value, C latent.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from k2jax.muonclip import Heads, MHAClip, MLAClip, QKClip, QKClipState, lse_bound, max_logits, muonclip, qk_clip
from k2jax.qk_clip import NO_GAIN
from tests.test_muonclip import N, P, V, first_update, normal, zeros_like
from tests.test_qk_clip import dense_max, rms_norm, rope

D, H, G, K = 16, 4, 2, 8
TAU = 100.0
S = np.float32([400, 50, 90, 120])


def clip(params, spec, S=S, tau=TAU):
    tx = qk_clip({"attn": spec}, tau)
    update = jax.jit(tx.update, compiler_options={"xla_backend_optimization_level": 0})
    updates, state = update(zeros_like(params), tx.init(params), params, max_logits={"attn": jnp.asarray(S)})
    return optax.apply_updates(params, updates), state


# --- layouts --------------------------------------------------------------------------------------

Q_SIZE, K_SIZE = H * K, G * K
INTERLEAVED = np.concatenate([[g * 2, g * 2 + 1, H + g, H + G + g] for g in range(G)])  # q q k v of every group


def flat(wqkv):
    return wqkv.reshape(D, -1)


LAYOUTS = {
    "heads on one axis": (
        lambda w: w,
        MHAClip(q=Heads("w", places=range(H)), k=Heads("w", places=range(H, H + G))),
    ),
    "flat": (
        flat,
        MHAClip(q=Heads("w", axis=-1, size=K, places=range(H)), k=Heads("w", axis=-1, size=K, places=range(H, H + G))),
    ),
    "flat, torch's order": (
        lambda w: flat(w).T,
        MHAClip(q=Heads("w", axis=-2, size=K, places=range(H)), k=Heads("w", axis=-2, size=K, places=range(H, H + G))),
    ),
    "interleaved by group": (
        lambda w: w[:, INTERLEAVED].reshape(D, G, 4, K),
        MHAClip(
            q=Heads("w", axis=(-3, -2), places=(0, 1, 4, 5)),
            k=Heads("w", axis=(-3, -2), places=range(2, 8, 4)),
        ),
    ),
}


@pytest.mark.parametrize(("lay", "spec"), LAYOUTS.values(), ids=LAYOUTS)
def test_a_fused_weight_is_clipped_as_its_parts_are(lay, spec):
    parts = {"wq": normal(0, D, H, K), "wk": normal(1, D, G, K), "wv": normal(2, D, G, K)}
    want, _ = clip(parts, MHAClip(q="wq", k="wk"))
    after, _ = clip({"w": lay(jnp.concatenate(list(parts.values()), axis=1))}, spec)
    np.testing.assert_array_equal(after["w"], lay(jnp.concatenate([want["wq"], want["wk"], parts["wv"]], axis=1)))
    assert (np.asarray(want["wk"]) != np.asarray(parts["wk"])).any()


def test_a_fused_weight_with_fused_biases_keeps_its_values_bitwise():
    params = {"w": normal(0, D, Q_SIZE + 2 * K_SIZE), "b": normal(1, Q_SIZE + 2 * K_SIZE)}
    place = lambda path, start, count: Heads(path, axis=-1, size=K, places=range(start, start + count))  # noqa: E731
    spec = MHAClip(place("w", 0, H), place("w", H, G), q_bias=place("b", 0, H), k_bias=place("b", H, G))
    x = normal(4, 2, 7, D)

    def logits(p):
        y = (x @ p["w"] + p["b"]).reshape(2, 7, H + 2 * G, K)
        return dense_max(rope(y[:, :, :H]), rope(y[:, :, H : H + G]))

    before = logits(params)
    tau = float(np.sort(before)[:2].mean())
    after, _ = clip(params, spec, before, tau)
    np.testing.assert_allclose(logits(after), np.minimum(before, tau), rtol=3e-6)
    for name in params:
        np.testing.assert_array_equal(after[name][..., Q_SIZE + K_SIZE :], params[name][..., Q_SIZE + K_SIZE :])


def test_scanned_layers_of_a_fused_weight_equal_layers_one_by_one():
    stacked = {"w": normal(0, 3, D, (H + 2 * G) * K)}
    spec = lambda layers: MHAClip(  # noqa: E731
        Heads("w", axis=-1, size=K, places=range(H), layers=layers),
        Heads("w", axis=-1, size=K, places=range(H, H + G), layers=layers),
    )
    tops = np.stack([S, S[::-1], np.float32([1, np.nan, -5, 300])])
    got, _ = clip(stacked, spec(1), tops)
    want = [clip({"w": stacked["w"][i]}, spec(0), tops[i])[0]["w"] for i in range(3)]
    np.testing.assert_array_equal(got["w"], np.stack(want))
    with pytest.raises(ValueError, match=r"shape \(4,\), but its weights need \(3, 4\)"):
        clip(stacked, spec(1), S)


@pytest.mark.parametrize("order", ["flat", "torch"])
def test_flat_latent_attention_is_clipped_as_the_usual_layout_is(order):
    C = 10
    parts = {"wq": normal(0, D, H, N + P), "wkv_b": normal(1, C, H, N + V)}
    want, _ = clip(parts, MLAClip(q="wq", kv="wkv_b", nope=N))
    lay = (lambda w: w.reshape(len(w), -1)) if order == "flat" else (lambda w: w.reshape(len(w), -1).T)
    axis = -1 if order == "flat" else -2
    spec = MLAClip(q=Heads("wq", axis, size=N + P), kv=Heads("wkv_b", axis, size=N + V), nope=N)
    after, _ = clip({name: lay(w) for name, w in parts.items()}, spec)
    for name in parts:
        np.testing.assert_array_equal(after[name], lay(want[name]))


# --- grouped queries: how much a sibling may grow -------------------------------------------------


@pytest.mark.parametrize(
    ("max_growth", "q", "k"),
    [
        (4.0, [0.25, 4, 4, 4], 0.25),  # 1/16 to the worst head, shared evenly
        (2.0, [0.125, 2, 2, 2], 0.5),
        (1.0, [0.0625, 1, 1, 1], 1.0),  # by the query alone
    ],
)
def test_growth_of_siblings_is_bounded_and_every_head_still_gets_its_own_factor(max_growth, q, k):
    params = {"wq": jnp.ones((3, 4, 2)), "wk": jnp.ones((3, 1, 2))}
    after, _ = clip(params, MHAClip(q="wq", k="wk", max_growth=max_growth), np.float32([1600, 5, -3, 100]))
    np.testing.assert_allclose(after["wq"][0, :, 0], q, rtol=1e-6)
    np.testing.assert_allclose(after["wk"][0, :, 0], k, rtol=1e-6)


def test_growth_is_two_at_most_unless_given():
    assert MHAClip(q="wq", k="wk") == MHAClip(q="wq", k="wk", max_growth=2.0)


def test_a_group_of_which_every_head_is_clipped_shares_the_clip_whatever_the_bound():
    params = {"wq": jnp.ones((3, 2, 2)), "wk": jnp.ones((3, 1, 2))}
    after, _ = clip(params, MHAClip(q="wq", k="wk", max_growth=1.0), np.float32([400, 400]))
    np.testing.assert_allclose(after["wq"][0, :, 0], [0.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(after["wk"][0, :, 0], [0.5], rtol=1e-6)


@pytest.mark.parametrize("max_growth", [1.0, 1.5, 100.0])
def test_recomputed_logits_do_not_depend_on_the_bound(max_growth):
    params, x = (
        {"wq": normal(0, D, H, K) * jnp.linspace(0.1, 3, H)[:, None], "wk": normal(1, D, G, K)},
        normal(2, 2, 7, D),
    )
    logits = lambda p: dense_max(*(rope(jnp.einsum("btd,dhk->bthk", x, p[name])) for name in ("wq", "wk")))  # noqa: E731
    before = logits(params)
    tau = float(np.sort(before)[:2].mean())
    after, _ = clip(params, MHAClip(q="wq", k="wk", max_growth=max_growth), before, tau)
    np.testing.assert_allclose(logits(after), np.minimum(before, tau), rtol=3e-6)
    assert np.abs(after["wq"]).max() <= max_growth * np.abs(params["wq"]).max()


# --- norms behind the projections -----------------------------------------------------------------


def test_gains_per_head_are_clipped_in_place_of_the_projections():
    params = {"wq": normal(0, D, H, K), "wk": normal(1, D, G, K)}
    params |= {"q_norm": 1 + normal(2, H, K, scale=0.2), "k_norm": 1 + normal(3, G, K, scale=0.2)}
    x = normal(4, 2, 7, D)

    def logits(p):
        q, k = (rms_norm(jnp.einsum("btd,dhk->bthk", x, p[name])) for name in ("wq", "wk"))
        return dense_max(rope(q * p["q_norm"]), rope(k * p["k_norm"]))

    before = logits(params)
    tau = float(np.sort(before)[:2].mean())
    after, _ = clip(params, MHAClip(q="wq", k="wk", q_norm="q_norm", k_norm="k_norm"), before, tau)
    # Rotary embedding mixes numbers of one head only, so a gain per head passes through it.
    np.testing.assert_allclose(logits(after), np.minimum(before, tau), rtol=3e-6)
    for name in ("wq", "wk"):
        np.testing.assert_array_equal(after[name], params[name])


@pytest.mark.parametrize("name", ["q_norm/scale", "k_layernorm/weight", "query_norm"])
def test_a_norm_that_no_spec_names_is_refused(name):
    params = {"attn": {"wq": jnp.ones((D, H, K)), "wk": jnp.ones((D, G, K))}}
    node, *rest = name.split("/")
    params["attn"][node] = {rest[0]: jnp.ones(K)} if rest else jnp.ones(K)
    with pytest.raises(ValueError, match=rf"specs\['a'\].*'attn/{name}' looks like a norm behind the [qk] projection"):
        qk_clip({"a": MHAClip(q="attn/wq", k="attn/wk")}).init(params)


def test_norms_of_something_else_are_no_reason_to_refuse():
    params = {"wq": jnp.ones((D, H, K)), "wk": jnp.ones((D, G, K)), "q_norm": jnp.ones(D), "attn_norm": jnp.ones(K)}
    qk_clip({"a": MHAClip(q="wq", k="wk")}).init(params)


def test_one_gain_for_all_heads_is_refused():
    params = {"wq": jnp.ones((2, D, H, K)), "wk": jnp.ones((2, D, G, K)), "q_norm": jnp.ones((2, K))}
    with pytest.raises(ValueError, match="q_norm of every head on its own"):
        qk_clip({"a": MHAClip(q="wq", k="wk", q_norm="q_norm")}).init(params)


@pytest.mark.parametrize("side", ["q_norm", "k_norm"])
def test_a_norm_without_gain_is_refused_when_it_is_declared(side):
    with pytest.raises(ValueError, match=r"a norm without gain .* undoes every scale.*Leave this attention out"):
        MHAClip(q="wq", k="wk", **{side: NO_GAIN})


# --- reports --------------------------------------------------------------------------------------


def report(tops):
    params = {
        name: {"wq": jnp.ones((n, D, 2, K)), "wk": jnp.ones((n, D, 2, K))} for name, n in (("moe", 3), ("dense", 1))
    }
    tx = qk_clip({name: MHAClip(q=f"{name}/wq", k=f"{name}/wk") for name in params})  # not in alphabetical order
    _, state = jax.jit(tx.update)(zeros_like(params), tx.init(params), params, max_logits=tops)
    assert jax.tree.map(jnp.shape, state) == QKClipState((), (), (), (), ())
    return tx.init(params), state


def test_state_says_which_head_was_clipped_most():
    tops = {"moe": jnp.array([[1.0, 2], [150, 3], [4, 500]]), "dense": jnp.array([[200.0, 7]])}
    _, state = report(tops)
    assert (int(state.worst_entry), int(state.worst_layer), int(state.worst_head)) == (0, 2, 1)
    np.testing.assert_allclose((state.clipped_fraction, state.min_gamma), (3 / 8, 0.2), rtol=1e-6)
    _, state = report({**tops, "dense": jnp.array([[1000.0, 7]])})
    assert (int(state.worst_entry), int(state.worst_layer), int(state.worst_head)) == (1, 0, 0)


def test_state_names_no_head_where_none_was_clipped():
    fresh, state = report({"moe": jnp.full((3, 2), jnp.nan), "dense": jnp.zeros((1, 2))})
    jax.tree.map(np.testing.assert_array_equal, fresh, state)
    assert [int(x) for x in state[2:]] == [-1, -1, -1]


# --- the log-sum-exp in place of the maximum ------------------------------------------------------


@pytest.mark.parametrize("head_axis", [-1, 1])
def test_lse_is_above_the_max_logit_by_at_most_the_log_of_the_number_of_keys(head_axis):
    q, k = 3 * normal(0, 2, 7, 4, 8), normal(1, 2, 7, 4, 8)
    _, lse_BTH = jax.nn.dot_product_attention(q, k, k, scale=0.3, is_causal=True, return_residual=True)
    bound = lse_bound(jnp.moveaxis(lse_BTH, -1, head_axis), head_axis=head_axis)
    exact = np.asarray(max_logits(q, k, scale=0.3))
    assert bound.shape == (4,)
    assert (bound >= exact - 1e-5).all()
    assert (bound <= exact + np.log(7)).all()


def test_a_clip_by_the_lse_leaves_no_head_above_tau():
    params, x = {"wq": 3 * normal(0, D, H, K), "wk": normal(1, D, G, K)}, normal(2, 2, 7, D)

    def project(p):
        return (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in ("wq", "wk"))

    q, k = project(params)
    _, lse = jax.nn.dot_product_attention(q, k, k, scale=0.3, is_causal=True, return_residual=True)
    tau = float(np.median(dense_max(q, k)))
    after, _ = clip(params, MHAClip(q="wq", k="wk"), lse_bound(lse), tau)
    top = dense_max(*project(after))
    assert (top <= tau * (1 + 1e-5)).all()
    assert top.max() > tau - np.log(7)
    assert not jax.grad(lambda x: lse_bound(x).sum())(lse).any()


# --- errors, weights in sixteen bits --------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            MHAClip(q="w", k="wk"),
            r"q has shape \(16, 64\), needed: \[..., fan-in, heads, size\].*describe others by Heads",
        ),
        (MHAClip(q=Heads("w", -1, size=7), k="wk"), r"q: Heads\(path='w'.*does not fit shape \(16, 64\)"),
        (MHAClip(q=Heads("w", -1, size=K, places=range(7, 9)), k="wk"), "does not fit shape"),
        (MHAClip(q=Heads("w", -1, size=K, places=(0, 0)), k="wk"), "does not fit shape"),
        (MHAClip(q=Heads("w", (-1, -2), size=K), k="wk"), "does not fit shape"),
        (MHAClip(q=Heads("w", -3, size=K), k="wk"), "does not fit shape"),
        (MHAClip(q=Heads("w", -1, size=K, places=range(3)), k="wk"), "query heads a multiple of key heads"),
        (MHAClip(q=Heads("w", -1, size=16), k="wk"), "the same layers and head size"),
        (
            MHAClip(Heads("w", -1, K, range(4)), Heads("w", -1, K, range(3, 5))),
            "names 'w', which .* names too; clip a leaf once",
        ),
        (MLAClip(q=Heads("wk", -1), kv="wk", nope=2), "heads on axis -2"),
    ],
)
def test_places_that_do_not_fit_are_named(spec, message):
    with pytest.raises(ValueError, match=rf"QKClip\.specs\['a'\].*{message}"):
        qk_clip({"a": spec}).init({"w": jnp.ones((D, 64)), "wk": jnp.ones((D, G, K))})


def test_growth_below_one_is_an_error():
    with pytest.raises(ValueError, match=r"max_growth must be at least 1, got 0\.5"):
        MHAClip(q="wq", k="wk", max_growth=0.5)


def test_bfloat16_weights_are_clipped_in_float32_and_masters_exactly():
    """bfloat16 weights end within their rounding; float32 masters lose nothing to bfloat16 gradients."""
    masters = {"wq": normal(0, D, H, K), "wk": normal(1, D, H, K)}
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), masters)
    tx = muonclip(0.0, matrix_specs=lambda path, leaf: None, qk_clip=QKClip({"attn": MHAClip(q="wq", k="wk")}))
    gamma = np.minimum(1, TAU / S)[:, None]
    for params, bound in ((half, 2**-7), (masters, 1e-6)):
        updates, _ = first_update(tx, half, params, max_logits={"attn": jnp.asarray(S)})
        after = optax.apply_updates(params, updates)
        for name, w in params.items():
            assert after[name].dtype == w.dtype
            np.testing.assert_allclose(np.float32(after[name]), np.sqrt(gamma) * np.float32(w), rtol=bound)
