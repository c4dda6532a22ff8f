"""Layers one by one: rotary positions, norm, router, dispatch and experts.

Legend: B batch, T tokens, D model, E experts, J experts per token, N tokens, R rotary size.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax.config import MoEConfig, RopeConfig
from k2jax.layers.dispatch import from_experts, plan_dispatch, to_experts
from k2jax.layers.moe import moe
from k2jax.layers.norm import rms_norm
from k2jax.layers.rope import apply_rope, inverse_frequencies, softmax_scale
from k2jax.layers.router import balance_loss, route, update_router_bias

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


# --- Rotary positions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rope", [RopeConfig(theta=100.0), RopeConfig(theta=100.0, factor=4.0, original_length=16)])
def test_rotary_products_depend_on_the_distance_alone(rope):
    q_R, k_R = normal(0, 8), normal(1, 8)

    def product(i, j):
        x = jnp.stack([q_R, k_R])[None, :, None]
        turned = apply_rope(x, jnp.array([[i, j]]), rope)[0, :, 0]
        return float(turned[0] @ turned[1])

    assert product(9, 4) == pytest.approx(product(105, 100), rel=1e-4)
    assert product(9, 4) != pytest.approx(product(9, 5), rel=1e-2)
    assert product(3, 3) == pytest.approx(float(q_R @ k_R), rel=1e-5)


def test_rotary_positions_turn_neighbouring_pairs():
    x = jnp.zeros((1, 1, 1, 4)).at[..., 2].set(1.0)  # first member of the pair (2, 3)
    angle = 3 * 100.0 ** (-2 / 4)
    turned = apply_rope(x, jnp.array([[3]]), RopeConfig(theta=100.0))
    np.testing.assert_allclose(turned[0, 0, 0], [0, np.cos(angle), 0, np.sin(angle)], atol=1e-6)


def test_yarn_of_kimi_k2_is_a_step_between_pairs_19_and_20():
    plain = inverse_frequencies(64, RopeConfig())
    yarn = inverse_frequencies(64, RopeConfig(factor=32.0))
    np.testing.assert_array_equal(yarn[:20], plain[:20])
    np.testing.assert_allclose(yarn[20:], plain[20:] / 32, rtol=1e-6)


def test_softmax_scale_before_and_after_the_extension():
    assert softmax_scale(192, RopeConfig()) == 192**-0.5
    assert softmax_scale(192, RopeConfig(factor=32.0)) == pytest.approx(0.1308608, rel=1e-6)


# --- Norm -------------------------------------------------------------------------------------------------------


def test_the_norm_rounds_before_its_gain():
    """Statistics in float32, then bfloat16, then the gain in bfloat16: twice rounded, as in the released model."""
    x, scale = jnp.asarray(300 * normal(2, 3, 40), jnp.bfloat16), jnp.asarray(1 + 0.3 * normal(3, 40))
    wide = np.asarray(x, np.float32)
    unit = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
    want = jnp.asarray(unit, jnp.bfloat16) * scale.astype(jnp.bfloat16)
    got = rms_norm({"scale": scale}, x, 1e-6)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, want)
    assert (np.asarray(got) != np.asarray((unit * scale).astype(jnp.bfloat16))).any()


def test_the_norm_adds_epsilon_under_the_root():
    np.testing.assert_allclose(rms_norm({"scale": jnp.ones(2)}, jnp.array([3.0, 4.0]), 2.5), [3 / 15**0.5, 4 / 15**0.5])


# --- Router -----------------------------------------------------------------------------------------------------


def choose(logits_E, bias_E, **groups):
    """(ids, weights) of one token whose router logits are logits_E."""
    cfg = MoEConfig(num_experts=len(logits_E), experts_per_token=2, expert_dim=1, route_scale=3.0, **groups)
    p = {"w": jnp.asarray([logits_E], jnp.float32), "bias": jnp.asarray(bias_E, jnp.float32)}
    ids, weights, _ = route(p, jnp.ones((1, 1, 1)), cfg)
    return ids[0, 0].tolist(), weights[0, 0]


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def test_the_lowest_id_wins_a_tie():
    assert choose([0.5, 1.0, 1.0, 1.0], [0, 0, 0, 0])[0] == [1, 2]
    assert choose([1.0, 1.0, 1.0, 1.0], [0, 0, 0, 0])[0] == [0, 1]


def test_the_bias_chooses_and_does_not_weigh():
    logits = [2.0, 1.0, 0.0, -1.0]
    ids, weights = choose(logits, [0, 0, 0, 5.0])
    assert ids == [3, 0]
    np.testing.assert_allclose(weights, 3 * sigmoid([-1, 2]) / sigmoid([-1, 2]).sum(), rtol=1e-6)
    assert choose(logits, [0, 0, 0, 0])[0] == [0, 1]


def test_experts_of_other_groups_stay_out_when_every_bias_is_negative():
    """All scores are below zero, so that a mask of 0 would let the experts of the masked group in."""
    logits, bias = [3.0, 2.0, 1.0, 0.0], [-5.0] * 4
    assert choose(logits, bias, num_groups=2, groups_per_token=1)[0] == [0, 1]


def test_a_group_is_worth_its_two_best_experts():
    logits = [6.0, -9.0, -9.0, 1.5, 1.5, -9.0]
    assert choose(logits, [0.0] * 6, num_groups=2, groups_per_token=1)[0] == [3, 4]


def test_pinned_ids_take_the_weights_of_their_scores():
    cfg = MoEConfig(num_experts=4, experts_per_token=2, expert_dim=1)
    p = {"w": jnp.array([[2.0, 1.0, 0.0, -1.0]]), "bias": jnp.zeros(4)}
    ids, weights, _ = route(p, jnp.ones((1, 1, 1)), cfg, jnp.array([[[3, 1]]]))
    assert ids.tolist() == [[[3, 1]]]
    np.testing.assert_allclose(weights[0, 0], sigmoid([-1, 1]) / sigmoid([-1, 1]).sum(), rtol=1e-6)


def test_the_router_works_in_float32_under_bfloat16():
    """Two experts closer than bfloat16 can tell: float32 sees that the second is better."""
    cfg = MoEConfig(num_experts=2, experts_per_token=1, expert_dim=1)
    p = {"w": jnp.array([[1.0, 1.0 + 1e-4]]), "bias": jnp.zeros(2)}
    ids, weights, scores = route(p, jnp.ones((1, 1, 1), jnp.bfloat16), cfg)
    assert ids.tolist() == [[[1]]]
    assert weights.dtype == scores.dtype == jnp.float32


def test_balance_loss_is_one_for_an_even_load_and_grows_to_its_bound_in_a_collapse():
    T, E, J = 6, 4, 2
    valid = jnp.ones((1, T), bool)
    even = jnp.array([[[0, 1], [2, 3]] * 3])
    assert float(balance_loss(jnp.full((1, T, E), 0.3), even, valid)) == pytest.approx(1.0)
    collapsed = jnp.broadcast_to(jnp.array([0, 1]), (1, T, J))
    scores = jnp.broadcast_to(jnp.array([0.5, 0.5, 0.0, 0.0]), (1, T, E))
    assert float(balance_loss(scores, collapsed, valid)) == pytest.approx(E / J)


def test_balance_loss_sums_sequences_and_leaves_padding_out():
    scores, ids = jnp.asarray(sigmoid(normal(4, 2, 6, 4))), jnp.asarray(np.argsort(normal(5, 2, 6, 4))[..., :2])
    valid = jnp.arange(6) < jnp.array([[6], [4]])
    alone = [balance_loss(scores[:1], ids[:1], valid[:1]), balance_loss(scores[1:, :4], ids[1:, :4], valid[1:, :4])]
    assert float(balance_loss(scores, ids, valid)) == pytest.approx(float(sum(alone)), rel=1e-6)
    assert float(balance_loss(scores, ids, jnp.zeros((2, 6), bool))) == 0.0


def test_the_bias_rises_where_the_load_is_low_and_its_mean_stays():
    bias = update_router_bias(jnp.zeros((2, 4)), jnp.array([[9.0, 1, 1, 1], [2, 2, 2, 2]]), 0.1)
    np.testing.assert_allclose(bias, [[-0.15, 0.05, 0.05, 0.05], [0, 0, 0, 0]], atol=1e-6)


# --- Dispatch and experts ---------------------------------------------------------------------------------------

ROUTINGS = {
    "random": (9, 6, np.stack([np.random.default_rng(n).permutation(6)[:3] for n in range(9)])),
    "all tokens to one expert": (150, 5, np.full((150, 1), 3)),
    "empty experts": (7, 40, np.stack([np.arange(n, n + 2) for n in range(7)])),
    "one token": (1, 4, np.array([[2, 0]])),
    "a tile and one row": (129, 2, np.zeros((129, 1), int)),
}


@pytest.mark.parametrize("name", ROUTINGS)
def test_every_assignment_has_a_row_of_its_own_in_its_experts_rows(name):
    _, E, ids_NJ = ROUTINGS[name]
    plan = jax.jit(plan_dispatch, static_argnums=1)(jnp.asarray(ids_NJ), E)
    rows, sizes_E = np.asarray(plan.row_NJ), np.asarray(plan.sizes_E)
    assert len(np.unique(rows)) == ids_NJ.size  # nothing dropped, nothing doubled
    ends_E = np.cumsum(sizes_E)
    np.testing.assert_array_equal(np.searchsorted(ends_E, rows, side="right"), ids_NJ)
    assert ends_E[-1] <= len(plan.assignment_R)
    assert (sizes_E % 128 == 0).all()
    np.testing.assert_array_equal(sizes_E == 0, np.bincount(ids_NJ.ravel(), minlength=E) == 0)
    owner = np.full(len(plan.assignment_R), ids_NJ.size)
    owner[rows.ravel()] = np.arange(ids_NJ.size)
    np.testing.assert_array_equal(plan.assignment_R, owner)


@pytest.mark.parametrize("name", ROUTINGS)
def test_there_and_back_equals_plain_indexing_with_autodiff(name):
    """The hand-written gradients against those that JAX derives from the definition."""
    N, E, ids_NJ = ROUTINGS[name]
    plan = plan_dispatch(jnp.asarray(ids_NJ), E)
    x_ND, weights_NJ, grad_ND = normal(0, N, 3), normal(1, *ids_NJ.shape), normal(2, N, 3)
    gain_E1 = 1.0 + jnp.arange(E)[:, None]

    def dispatched(x_ND, weights_NJ):
        gain_R1 = jnp.repeat(gain_E1, plan.sizes_E, axis=0, total_repeat_length=len(plan.assignment_R))
        y_ND = from_experts(jnp.sin(to_experts(x_ND, plan)) * gain_R1, weights_NJ, plan)
        return jnp.vdot(y_ND, grad_ND), y_ND

    def plain(x_ND, weights_NJ):
        y_NJD = jnp.sin(x_ND)[:, None] * gain_E1[ids_NJ]
        y_ND = (y_NJD * weights_NJ[..., None]).sum(axis=1)
        return jnp.vdot(y_ND, grad_ND), y_ND

    results = (jit(jax.grad(f, argnums=(0, 1), has_aux=True))(x_ND, weights_NJ) for f in (dispatched, plain))
    for got, want in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-4, rtol=1e-5)


def test_padding_rows_are_zero():
    _, _, ids_NJ = ROUTINGS["random"]
    plan = plan_dispatch(jnp.asarray(ids_NJ), 6)
    x_RD = to_experts(1 + jnp.ones((9, 2)), plan)
    np.testing.assert_array_equal(x_RD[:, 0], 2.0 * (np.asarray(plan.assignment_R) < ids_NJ.size))


CFG = MoEConfig(num_experts=5, experts_per_token=2, expert_dim=6, route_scale=1.5)


def experts(shared):
    def swiglu(seed, *lead):
        return {"w_gate": normal(seed, *lead, 4, 6), "w_up": normal(seed + 1, *lead, 4, 6),
                "w_down": normal(seed + 2, *lead, 6, 4)}  # fmt: skip

    p = {"router": {"w": normal(0, 4, 5), "bias": np.zeros(5, np.float32)}, "experts": swiglu(1, 5)}
    return p | ({"shared": swiglu(4)} if shared else {})


def dense_moe(p, x_BTD, ids_BTJ, weights_BTJ):
    """Every expert on every token, weighted by what the token gives it."""

    def swiglu(w, x):
        return (jax.nn.silu(x @ w["w_gate"]) * (x @ w["w_up"])) @ w["w_down"]

    y_BTD = swiglu(p["shared"], x_BTD) if "shared" in p else jnp.zeros_like(x_BTD)
    for e in range(5):
        share_BT = jnp.where(ids_BTJ == e, weights_BTJ, 0).sum(-1)
        y_BTD = y_BTD + share_BT[..., None] * swiglu({name: w[e] for name, w in p["experts"].items()}, x_BTD)
    return y_BTD


@pytest.mark.parametrize("shared", [0, 1])
def test_experts_equal_a_dense_loop_with_its_gradients(shared):
    cfg = MoEConfig(num_experts=5, experts_per_token=2, expert_dim=6, route_scale=1.5, num_shared=shared)
    x_BTD, grad_BTD, valid_BT = normal(7, 2, 9, 4), normal(8, 2, 9, 4), jnp.ones((2, 9), bool)

    def sparse(p, x_BTD):
        y_BTD, stats = moe(p, x_BTD, valid_BT, cfg)
        return jnp.vdot(y_BTD, grad_BTD), (y_BTD, stats.load_E.sum())

    def dense(p, x_BTD):
        ids_BTJ, weights_BTJ, _ = route(p["router"], x_BTD, cfg)
        y_BTD = dense_moe(p, x_BTD, ids_BTJ, weights_BTJ)
        return jnp.vdot(y_BTD, grad_BTD), (y_BTD, 2.0 * 9 * 2)

    p = jax.tree.map(jnp.asarray, experts(shared))
    results = (jit(jax.grad(f, argnums=(0, 1), has_aux=True))(p, x_BTD) for f in (sparse, dense))
    for got, want in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)


def test_padding_tokens_are_computed_and_counted_nowhere():
    p, x_BTD = jax.tree.map(jnp.asarray, experts(1)), jnp.asarray(normal(9, 2, 9, 4))
    valid_BT = jnp.arange(9) < jnp.array([[9], [5]])
    run = jit(lambda valid_BT: moe(p, x_BTD, valid_BT, CFG))
    (y_BTD, some), (want_BTD, everything) = run(valid_BT), run(jnp.ones((2, 9), bool))
    np.testing.assert_array_equal(y_BTD, want_BTD)
    np.testing.assert_array_equal(some.load_E, np.bincount(np.ravel(some.routing_BTJ[valid_BT]), minlength=5))
    assert float(everything.load_E.sum()) == 2 * 9 * 2
    _, _, scores = route(p["router"], x_BTD, CFG)
    want = balance_loss(scores, some.routing_BTJ, valid_BT) / 2  # mean over the two sequences
    assert float(some.balance_loss) == pytest.approx(float(want), rel=1e-6)
