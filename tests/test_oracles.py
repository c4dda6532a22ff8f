"""The oracles checked by hand-computed cases and invariants, without the project's own code.

Legend: T tokens, D model size, H query heads, G key heads, K query/key size, V value size, E experts.
"""

from dataclasses import replace

import numpy as np
import pytest

from tests.oracles import algorithm1, attention, gqa, mla, moba, model, router, yarn


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def mla_params(rng, D=6, H=3, nope=4, rope=2, v=4, latent=5, q_rank=4):
    normal = rng.standard_normal
    query = {"wq": normal((D, H, nope + rope))}
    if q_rank:
        query = {
            "wq_a": normal((D, q_rank)),
            "q_norm": {"scale": 1 + 0.1 * normal(q_rank)},
            "wq_b": normal((q_rank, H, nope + rope)),
        }
    return query | {
        "wkv_a": normal((D, latent + rope)),
        "kv_norm": {"scale": 1 + 0.1 * normal(latent)},
        "wkv_b": normal((latent, H, nope + v)),
        "wo": normal((H, v, D)),
    }


def test_k2_yarn_is_a_hard_step_between_pairs_19_and_20():
    k2 = yarn.Yarn()
    plain, scaled = yarn.inverse_frequencies(64, 50000.0), yarn.inverse_frequencies(64, 50000.0, k2)
    assert yarn.correction_range(64, 50000.0, k2) == (19, 20)
    np.testing.assert_array_equal(scaled[:20], plain[:20])
    np.testing.assert_allclose(scaled[20:], plain[20:] / 32, rtol=1e-15)


def test_deepseek_v3_yarn_ramps_from_pair_10_to_23():
    v3 = yarn.Yarn(factor=40.0, beta_fast=32.0)
    plain, scaled = yarn.inverse_frequencies(64, 10000.0), yarn.inverse_frequencies(64, 10000.0, v3)
    assert yarn.correction_range(64, 10000.0, v3) == (10, 23)
    share_kept = (scaled / plain - 1 / 40) / (1 - 1 / 40)
    np.testing.assert_allclose(share_kept[10:24], 1 - np.arange(14) / 13, atol=1e-12)


def test_softmax_scale_with_and_without_yarn():
    assert yarn.softmax_scale(192, yarn.Yarn()) == pytest.approx(0.1308608, abs=5e-8)
    assert yarn.softmax_scale(192) == pytest.approx(0.0721688, abs=5e-8)


def test_rope_turns_a_pair_by_position_times_frequency():
    np.testing.assert_allclose(yarn.rope([[1.0, 0.0]], [np.pi / 2], 50000.0), [[0.0, 1.0]], atol=1e-15)
    out = yarn.rope([[0.0, 0.0, 1.0, 2.0]], [10], 100.0)  # the second of two pairs has frequency 1/10
    np.testing.assert_allclose(out[0, 2:], [np.cos(1) - 2 * np.sin(1), 2 * np.cos(1) + np.sin(1)], rtol=1e-14)


def test_rope_gives_the_logits_of_the_permuted_rotate_half_form(rng):
    """Hugging Face reorders to (evens, odds) and rotates halves: the same inner products."""

    def rotate_half(x, positions):
        angles = np.outer(positions, yarn.inverse_frequencies(8, 50000.0))
        even, odd = x[:, 0::2], x[:, 1::2]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([even * cos - odd * sin, odd * cos + even * sin], -1)

    q, k, positions = rng.standard_normal((5, 8)), rng.standard_normal((5, 8)), np.arange(5) * 7
    ours = yarn.rope(q, positions, 50000.0) @ yarn.rope(k, positions, 50000.0).T
    np.testing.assert_allclose(ours, rotate_half(q, positions) @ rotate_half(k, positions).T, atol=1e-12)


@pytest.mark.parametrize("q_rank", [0, 4])
def test_mla_depends_on_relative_positions_and_not_on_later_tokens(rng, q_rank):
    cfg = mla.Mla(nope=4, rope=2, v=4, yarn=yarn.Yarn(original_length=8))
    attn, x = mla_params(rng, q_rank=q_rank), rng.standard_normal((7, 6))
    out, top, q, k, v = mla.mla_forward(x, attn, cfg)
    assert (q.shape, k.shape, v.shape) == ((7, 3, 6), (7, 3, 6), (7, 3, 4))
    shifted = mla.mla_forward(x, attn, cfg, positions_T=np.arange(7) + 11)
    np.testing.assert_allclose(shifted[0], out, atol=1e-10)
    np.testing.assert_allclose(mla.mla_forward(x[:4], attn, cfg)[0], out[:4], atol=1e-12)
    brute = max(yarn.softmax_scale(6, cfg.yarn) * q[i, 1] @ k[j, 1] for i in range(7) for j in range(i + 1))
    assert top[1] == pytest.approx(brute)


def test_mla_first_token_attends_to_itself_only(rng):
    attn, x = mla_params(rng), rng.standard_normal((3, 6))
    out, _, _, _, v = mla.mla_forward(x, attn, mla.Mla(nope=4, rope=2, v=4))
    np.testing.assert_allclose(out[0], sum(v[0, h] @ attn["wo"][h] for h in range(3)), atol=1e-12)


def test_gqa_equals_mha_with_repeated_keys(rng):
    attn = {"wq": rng.standard_normal((6, 4, 4)), "wo": rng.standard_normal((4, 4, 6))}
    attn |= {"wk": rng.standard_normal((6, 2, 4)), "wv": rng.standard_normal((6, 2, 4))}
    repeated = {**attn, "wk": np.repeat(attn["wk"], 2, 1), "wv": np.repeat(attn["wv"], 2, 1)}
    x = rng.standard_normal((5, 6))
    for ours, theirs in zip(gqa.gqa_forward(x, attn, 1e4)[:2], gqa.gqa_forward(x, repeated, 1e4)[:2], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_router_bias_selects_but_does_not_weigh():
    scores = np.array([0.8, 0.6, 0.2, 0.4])
    ids, weights = router.route_token(scores, np.array([-1.0, 0.0, 0.7, 0.0]), 2, 2.5)
    assert ids == [2, 1]  # 0.9, 0.6 with the bias
    np.testing.assert_allclose(weights, [2.5 * 0.2 / 0.8, 2.5 * 0.6 / 0.8], rtol=1e-12)


def test_router_takes_the_lowest_index_among_equals():
    assert router.route_token(np.full(6, 0.5), np.zeros(6), 3, 1.0)[0] == [0, 1, 2]


def test_router_groups_are_ranked_by_their_two_best_and_hide_the_rest():
    scores = np.array([0.9, 0.1, 0.6, 0.5, 0.3, 0.2])  # groups worth 1.0, 1.1, 0.5
    assert router.route_token(scores, np.zeros(6), 2, 1.0, n_group=3, topk_group=1)[0] == [2, 3]
    negative = np.full(6, -2.0)  # filling with 0 instead of -inf would choose from the hidden groups
    assert router.route_token(scores, negative, 2, 1.0, n_group=3, topk_group=1)[0] == [2, 3]


@pytest.mark.parametrize(("experts", "top_k", "factor"), [(384, 8, 2.827), (64, 6, 2.446)])
def test_published_routing_scale_gives_unit_norm_weights(rng, experts, top_k, factor):
    scores = np.sort(1 / (1 + np.exp(-rng.standard_normal((20000, experts)))), -1)[:, -top_k:]
    weights = scores / scores.sum(-1, keepdims=True)
    assert np.mean(1 / np.linalg.norm(weights, axis=-1)) == pytest.approx(factor, abs=2e-3)


def test_bias_update_by_hand():
    # loads 5 0 2 1, mean 2: signs -1 1 0 1, mean 1/4
    new = router.bias_update(np.zeros(4), np.array([5.0, 0.0, 2.0, 1.0]), 1e-3)
    np.testing.assert_allclose(new, [-1.25e-3, 0.75e-3, -0.25e-3, 0.75e-3], rtol=1e-12)


def test_balance_loss_is_one_when_balanced_and_experts_over_k_when_collapsed():
    even = np.full((4, 4), 0.5)
    balanced = np.array([[0, 1], [2, 3], [0, 1], [2, 3]])
    assert router.sequence_balance_loss([balanced], [even]) == pytest.approx(1.0)
    collapsed = np.tile([1.0, 1.0, 0.0, 0.0], (4, 1))
    one_pair = np.tile([0, 1], (4, 1))
    assert router.sequence_balance_loss([balanced, one_pair], [even, collapsed]) == pytest.approx((1 + 2) / 2)


def random_moba(rng, T=11, H=4, G=2, K=3, V=2):
    shapes = ((T, H, K), (T, G, K), (T, G, V))
    return tuple(rng.standard_normal(shape) for shape in shapes)


def test_moba_with_enough_blocks_is_full_attention(rng):
    q, k, v = random_moba(rng)
    segments = np.array([3] * 6 + [5] * 5)
    ours = moba.moba(q, k, v, block_size=4, top_k=2, segment_ids_S=segments)
    out, lse, top = attention.dense_attention(q, k, v, 3**-0.5, segments)
    np.testing.assert_allclose(ours.out_THV, out, atol=1e-14)
    np.testing.assert_allclose(ours.lse_TH, lse, atol=1e-14)
    np.testing.assert_allclose(ours.max_logit_H, top, atol=1e-14)


def test_moba_with_one_block_is_block_diagonal(rng):
    q, k, v = random_moba(rng)
    blocks = np.arange(11) // 4
    out, _, _ = attention.dense_attention(q, k, v, 3**-0.5, blocks)
    np.testing.assert_allclose(moba.moba(q, k, v, 4, 1).out_THV, out, atol=1e-14)


def test_moba_cuts_blocks_at_each_segment_start(rng):
    q, k, v = random_moba(rng)
    packed = moba.moba(q, k, v, 2, 2, segment_ids_S=np.array([1] * 5 + [2] * 6))
    for part in (slice(0, 5), slice(5, 11)):
        alone = moba.moba(q[part], k[part], v[part], 2, 2)
        np.testing.assert_allclose(packed.out_THV[part], alone.out_THV, atol=1e-14)


def test_moba_chunk_with_an_offset_equals_the_rows_of_the_whole(rng):
    q, k, v = random_moba(rng)
    whole = moba.moba(q, k, v, 3, 2)
    chunk = moba.moba(q[7:9], k, v, 3, 2, q_offset=7)
    np.testing.assert_allclose(chunk.out_THV, whole.out_THV[7:9], atol=1e-14)
    assert chunk.selected == whole.selected[7:9]


def test_moba_selects_by_the_raw_mean_key_and_breaks_ties_low():
    keys = np.array([[1.0], [0.0], [0.0], [1.0], [2.0], [-1.5], [9.0]])  # block means 0.5 0.5 0.25, then current
    assert moba.selected_blocks(np.array([1.0]), keys, 6, 0, 2, 2) == [0, 6]
    assert moba.selected_blocks(np.array([1.0]), keys, 6, 0, 2, 3) == [0, 2, 6]
    assert moba.selected_blocks(np.array([-1.0]), keys, 6, 0, 2, 2) == [4, 6]


def test_moba_gradient_matches_finite_differences(rng):
    q, k, v = random_moba(rng)
    do = rng.standard_normal((11, 4, 2))
    segments = np.array([1] * 7 + [2] * 4)
    arguments = {"block_size": 2, "top_k": 2, "scale": 0.7, "segment_ids_S": segments}
    gradients = moba.moba_gradient(q, k, v, do, **arguments)
    for i, gradient in enumerate(gradients):
        direction = rng.standard_normal(gradient.shape)
        values = []
        for step in (1e-5, -1e-5):
            moved = [q, k, v]
            moved[i] = moved[i] + step * direction
            values.append(np.sum(moba.moba(*moved, **arguments).out_THV * do))
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(np.sum(gradient * direction), rel=1e-7)


def test_keller_coefficients_have_the_published_scalar_map():
    a, b, c = algorithm1.KELLER
    x = np.linspace(0, 1, 200001)
    slope = a**5
    for _ in range(5):
        x = a * x + b * x**3 + c * x**5
    assert slope == pytest.approx(485, abs=0.5)
    assert x.max() == pytest.approx(1.202, abs=5e-4)


@pytest.mark.parametrize("shape", [(4, 7), (7, 4)])
def test_newton_schulz_applies_the_map_to_the_singular_values(rng, shape):
    m = rng.standard_normal(shape)
    u, s, vt = np.linalg.svd(m / (np.linalg.norm(m) + 1e-7), full_matrices=False)
    a, b, c = algorithm1.KELLER
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    np.testing.assert_allclose(algorithm1.newton_schulz(m), u * s @ vt, atol=1e-12)


def test_algorithm1_first_steps_by_hand():
    """One 1x1 matrix (Newton-Schulz of a number is its sign times p^5(1)) and one AdamW scalar."""
    p1 = 1.0
    for _ in range(5):
        p1 = np.polyval([2.0315, 0, -4.7750, 0, 3.4445, 0], p1)
    params, state = {"w": [[2.0]], "b": [3.0]}, None
    state = algorithm1.init(params)
    for g in (5.0, -4.0):  # momentum 5, then 0.95 * 5 - 4 > 0: the sign stays
        params, state = algorithm1.update(params, {"w": [[g]], "b": [g]}, state, 0.1, {"w": (0, 1)})
    w = 2.0
    for _ in range(2):
        w -= 0.1 * (0.2 * p1 + 0.1 * w)
    assert params["w"].item() == pytest.approx(w, rel=1e-6)
    b = 3.0 - 0.1 * (1 + 0.1 * 3.0)
    second = (0.09 * 5 - 0.1 * 4) / (1 - 0.81)
    root = np.sqrt((0.95 * 0.05 * 25 + 0.05 * 16) / (1 - 0.95**2))
    assert params["b"].item() == pytest.approx(b - 0.1 * (second / root + 0.1 * b), rel=1e-6)


def test_algorithm1_treats_each_matrix_of_a_stack_alone(rng):
    stack = rng.standard_normal((2, 3, 2, 4))  # two matrices of 3 rows and 2*4 columns
    both = algorithm1.orthogonalize(stack, 1, 1)
    for one, alone in zip(both, stack, strict=True):
        expected = algorithm1.newton_schulz(alone.reshape(3, 8)) * np.sqrt(8) * 0.2
        np.testing.assert_allclose(one, expected.reshape(3, 2, 4), atol=1e-14)


def test_learning_rate_schedule_starts_at_step_zero():
    params, state = {"b": [0.0]}, algorithm1.init({"b": [0.0]})
    params, _ = algorithm1.update(params, {"b": [1.0]}, state, lambda step: 0.5 if step == 0 else 9.0, {})
    assert params["b"].item() == pytest.approx(-0.5)


def test_gamma_leaves_small_negative_and_non_finite_maxima_alone():
    heads = [200.0, 100.0, 5.0, 0.0, -400.0, np.inf, -np.inf, np.nan]
    np.testing.assert_array_equal(algorithm1.gamma(heads, 100.0), [0.5] + [1] * 7)


@pytest.mark.parametrize("q_rank", [0, 4])
def test_mla_clip_brings_every_head_to_the_smaller_of_its_maximum_and_tau(rng, q_rank):
    cfg = mla.Mla(nope=4, rope=2, v=4, yarn=yarn.Yarn(original_length=8))
    attn, x = mla_params(rng, q_rank=q_rank), rng.standard_normal((9, 6))
    _, top, _, k, v = mla.mla_forward(x, attn, cfg)
    tau = float(np.median(top))
    assert tau > 0
    clipped = algorithm1.clip_mla(attn, top, tau, cfg.nope)
    _, new_top, _, new_k, new_v = mla.mla_forward(x, clipped, cfg)
    np.testing.assert_allclose(new_top, np.minimum(top, tau), rtol=1e-12)
    np.testing.assert_array_equal(new_v, v)
    np.testing.assert_array_equal(new_k[..., cfg.nope :], k[..., cfg.nope :])


def test_balanced_clip_reproduces_the_published_example():
    attn = {"wq": np.ones((1, 4, 1)), "wk": np.ones((1, 2, 1))}
    out = algorithm1.clip_gqa(attn, [400.0, 50.0, 90.0, 20.0], 100.0)
    np.testing.assert_allclose(out["wq"].ravel(), [0.5, 2, 1, 1])
    np.testing.assert_allclose(out["wk"].ravel(), [0.5, 1])


def test_mha_clip_is_the_balanced_rule_with_one_head_per_key(rng):
    attn = {"wq": rng.standard_normal((5, 3, 4)), "wk": rng.standard_normal((5, 3, 4))}
    top = [250.0, 30.0, 110.0]
    one, two = algorithm1.clip_mha(attn, top, 100.0), algorithm1.clip_gqa(attn, top, 100.0)
    for name in attn:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-14)


def test_k2_parameter_count_from_the_published_shapes():
    H, V = 7168, 163840
    attn = H * 1536 + 1536 * 64 * 192 + H * (512 + 64) + 512 * 64 * 256 + 64 * 128 * H
    norms = 2 * H + 1536 + 512
    expert, dense, router_size = 3 * H * 2048, 3 * H * 18432, 384 * H + 384
    total = 61 * (attn + norms) + dense + 60 * (385 * expert + router_size) + 2 * V * H + H
    assert (attn, total) == (101_122_048, 1_026_408_232_448)
    active = total - 60 * (384 - 8) * expert
    assert active == 32_861_500_928


def small_model(rng, **changes):
    normal = rng.standard_normal
    D, H, V, F, E = 6, 2, 9, 5, 4

    def block(layers):
        attn = {"wq": normal((layers, D, H, 4)), "wo": normal((layers, H, 4, D))}
        attn |= {"wk": normal((layers, D, 1, 4)), "wv": normal((layers, D, 1, 4))}
        norms = {name: {"scale": np.ones((layers, D))} for name in ("attn_norm", "mlp_norm")}
        return norms | {"attn": attn}

    def mlp(*lead):
        return {
            "w_gate": normal((*lead, D, F)),
            "w_up": normal((*lead, D, F)),
            "w_down": normal((*lead, F, D)),
        }

    gate = {"w": normal((2, D, E)), "bias": np.zeros((2, E))}
    params = {
        "embed": {"w": normal((V, D))},
        "dense": block(1) | {"mlp": mlp(1)},
        "moe": block(2) | {"moe": {"router": gate, "experts": mlp(2, E), "shared": mlp(2)}},
        "final_norm": {"scale": np.ones(D)},
        "head": {"w": normal((D, V))},
    }
    spec = model.ModelSpec(attention=("full",) * 3, theta=100.0)
    return params, replace(spec, **changes)


def test_model_is_causal_and_reports_the_maximum_over_the_batch(rng):
    params, spec = small_model(rng)
    tokens = rng.integers(0, 9, (2, 6))
    changed = tokens.copy()
    changed[:, 4:] = (changed[:, 4:] + 1) % 9
    one, two = model.forward(params, spec, tokens), model.forward(params, spec, changed)
    np.testing.assert_allclose(one.logits_BTV[:, :4], two.logits_BTV[:, :4], atol=1e-12)
    assert np.abs(one.logits_BTV[:, 4:] - two.logits_BTV[:, 4:]).max() > 1e-3
    alone = [model.forward(params, spec, tokens[b : b + 1]).max_logits for b in range(2)]
    for name in ("dense", "moe"):
        np.testing.assert_allclose(one.max_logits[name], np.maximum(alone[0][name], alone[1][name]), atol=1e-12)


def test_model_with_moba_over_packed_segments_equals_its_segments_alone(rng):
    params, spec = small_model(rng, attention=("full", "moba", "moba"), moba_block=2, moba_top_k=2)
    tokens, segments = rng.integers(0, 9, (1, 9)), np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2]])
    packed = model.forward(params, spec, tokens, segments).logits_BTV
    for part in (slice(0, 4), slice(4, 9)):
        alone = model.forward(params, spec, tokens[:, part]).logits_BTV
        np.testing.assert_allclose(packed[:, part], alone, atol=1e-10)


def test_identical_experts_make_the_moe_a_dense_mlp(rng):
    params, spec = small_model(rng, scaling=2.5)
    moe = {name: {leaf: w[0] for leaf, w in group.items()} for name, group in params["moe"]["moe"].items()}
    moe["experts"] = {leaf: np.repeat(w[:1], 4, 0) for leaf, w in moe["experts"].items()}
    x = rng.standard_normal((3, 6))
    one_expert = {leaf: w[0] for leaf, w in moe["experts"].items()}
    out, ids, _ = model.moe_layer(x, moe, spec)
    assert ids.shape == (3, 2)
    np.testing.assert_allclose(out, 2.5 * model.swiglu(x, one_expert) + model.swiglu(x, moe["shared"]), atol=1e-12)
