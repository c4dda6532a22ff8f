"""The model's own promises: counts, stacks, recomputation, causality, packing, chunked log-probabilities, Aux.

That the numbers are right is the business of test_paper_model; here forms of the same model meet each other.

Legend: B batch, T tokens, V vocabulary, D model, H heads, E experts, J chosen experts or blocks, M expert layers.
"""

import dataclasses
import functools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from k2jax import model
from k2jax.config import GQAConfig, MLAConfig, MoBAConfig, ModelConfig, MoEConfig, load_config
from k2jax.layers.attention import self_attention
from k2jax.layers.mla import mla_qkv
from k2jax.layers.mlp import mlp
from k2jax.layers.moe import moe
from k2jax.layers.norm import rms_norm

ROOT = Path(__file__).parent.parent
# Compilation is most of the time of this file, and tiny models need no optimised code.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

B, T = 2, 21
LATENT = MLAConfig(kv_lora_rank=10, nope_dim=8, rope_dim=4, v_dim=6, q_lora_rank=14)
HYBRID = ModelConfig(
    vocab_size=30,
    dim=16,
    num_layers=4,
    num_heads=2,
    mlp_dim=20,
    attn=LATENT,
    attention=("moba", "full", "moba", "moba"),
    moba=MoBAConfig(block_size=4, top_k=2),
    moe=MoEConfig(num_experts=6, experts_per_token=2, expert_dim=8, route_scale=2.0),
    init_std=0.3,
    dtype="float32",
)
FULL = dataclasses.replace(HYBRID, attention=("full",) * 4)
MOBA = dataclasses.replace(HYBRID, attention=("moba",) * 4)
# One layer of experts, and three with a dense one, for what needs no more and costs a backward pass.
ONE = dataclasses.replace(
    HYBRID, num_layers=1, num_dense_layers=0, attention=("moba",), attn=GQAConfig(num_kv_heads=1, head_dim=8)
)
THREE = dataclasses.replace(ONE, num_layers=3, num_dense_layers=1, attention=("full",) * 3)
SHALLOW = dataclasses.replace(HYBRID, num_layers=1, attention=("full",), moe=None)


@functools.cache
def params_of(cfg):
    """Parameters of the model's shapes; router biases decide, so that a forgotten one shows."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        noise = rng.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(1 + 0.1 * noise if path[-1].key == "scale" else 0.3 * noise)

    return jax.tree_util.tree_map_with_path(fill, shapes_of(cfg))


def shapes_of(cfg):
    return jax.eval_shape(functools.partial(model.init_params, cfg), jax.random.key(0))


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(2), (B, T), 0, HYBRID.vocab_size)


@pytest.fixture(scope="module")
def segments():
    """Documents of 9, 6 and 6 tokens, and of 6, 9 and 6: MoBA's blocks of 4 fit none of them."""
    return jnp.array([np.repeat([1, 2, 3], (9, 6, 6)), np.repeat([4, 7, 5], (6, 9, 6))], jnp.int32)


@pytest.fixture(scope="module")
def whole():
    """One document per row."""
    return jnp.ones((B, T), jnp.int32)


@functools.cache
def compiled(cfg, **kwargs):
    """apply for one config, compiled once for all the tests that need it."""
    return jit(lambda p, t, s, r=None: model.apply(p, cfg, t, s, routing=r, **kwargs))


everything = functools.partial(compiled, max_logits=True, selections=True)


def close(a, b, atol=2e-5):
    np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5)


# --- Counts -------------------------------------------------------------------------------------------------


def test_kimi_k2_is_counted_without_memory_and_within_seconds():
    cfg = load_config(str(ROOT / "configs" / "kimi_k2.py")).model
    before, start = len(jax.live_arrays()), time.perf_counter()
    counts = model.count_params(cfg)
    assert time.perf_counter() - start < 20
    assert len(jax.live_arrays()) <= before + 1  # the key
    assert counts == model.ParamCounts(total=1_026_408_232_448, active=32_861_500_928, embedding=163_840 * 7_168)


COUNTED = {
    "latent queries": (HYBRID, 4 * (16 * 14 + 14 + 14 * 2 * 12 + 16 * 14 + 10 + 10 * 2 * 14 + 2 * 6 * 16)),
    "one query matrix": (
        dataclasses.replace(HYBRID, attn=dataclasses.replace(LATENT, q_lora_rank=None)),
        4 * (16 * 2 * 12 + 16 * 14 + 10 + 10 * 2 * 14 + 2 * 6 * 16),
    ),
    "grouped": (
        dataclasses.replace(HYBRID, attn=GQAConfig(num_kv_heads=1, head_dim=8)),
        4 * (16 * 16 + 2 * 16 * 8 + 16 * 16),
    ),
}
OUTSIDE = 2 * 30 * 16 + 16  # embedding, head, final norm
BLOCKS = 4 * 2 * 16 + 3 * 16 * 20 + 3 * (16 * 6 + 6 + 3 * 16 * 8)  # norms, dense MLP, routers and shared experts
EXPERT = 3 * 16 * 8


@pytest.mark.parametrize("name", COUNTED)
def test_counts_are_those_of_the_formula(name):
    cfg, attention = COUNTED[name]
    counts = model.count_params(cfg)
    assert counts.total == OUTSIDE + BLOCKS + attention + 3 * 6 * EXPERT
    assert counts.active == OUTSIDE + BLOCKS + attention + 3 * 2 * EXPERT
    assert counts.embedding == 30 * 16


def test_without_experts_every_parameter_is_active():
    counts = model.count_params(dataclasses.replace(FULL, num_dense_layers=4, moe=None))
    assert counts.total == counts.active


@pytest.mark.parametrize("length", [3, 4, 5, 21])
def test_flops_count_active_weights_and_the_pairs_that_the_masks_leave(length):
    per_head_pair = {"latent": 8 + 4 + 6, "grouped": 8 + 8}
    grouped = dataclasses.replace(HYBRID, attn=GQAConfig(num_kv_heads=1, head_dim=8))
    full = sum(t + 1 for t in range(length))
    blocks = [list(range(t // 4 + 1))[-2:] for t in range(length)]  # any two: all past ones are whole
    moba = sum(1 for t in range(length) for c in blocks[t] for s in range(4 * c, 4 * c + 4) if s <= t)
    for name, cfg in (("latent", HYBRID), ("grouped", grouped)):
        counts = model.count_params(cfg)
        pairs = (full + 3 * moba) / length * 2 * per_head_pair[name]
        want = 3 * 2 * (counts.active - counts.embedding) + 3 * 2 * pairs
        assert model.flops_per_token(cfg, length) == pytest.approx(want, rel=1e-12)


# --- One tree for every attention list ------------------------------------------------------------------------


LISTS = [
    ("moba", "full", "moba", "moba"),
    pytest.param(("moba", "moba", "moba", "full"), marks=pytest.mark.check),
    pytest.param(("full", "full", "full", "full"), marks=pytest.mark.check),
]


@pytest.mark.parametrize("attention", LISTS)
def test_one_tree_runs_under_every_attention_list_as_a_plain_loop_over_layers(attention, tokens, segments):
    cfg = dataclasses.replace(HYBRID, attention=attention)
    assert shapes_of(cfg) == shapes_of(FULL) == shapes_of(MOBA)
    logits, aux = everything(cfg)(params_of(HYBRID), tokens, segments)
    want, max_logits, loads = jit(functools.partial(plain_loop, cfg=cfg))(params_of(HYBRID), tokens, segments)
    close(logits, want)
    close(jnp.concatenate([aux.max_logits["dense"], aux.max_logits["moe"]]), max_logits)
    np.testing.assert_array_equal(aux.expert_load_ME, loads)


def plain_loop(params, tokens_BT, segments_BT, cfg):
    """(logits, max logits [L, H], loads [M, E]), one layer after the other without a scan."""
    valid_BT = segments_BT > 0
    positions_BT = model.default_positions(tokens_BT, segments_BT)
    x_BTD = params["embed"]["w"][tokens_BT]
    max_logits, loads = [], []
    for i, kind in enumerate(cfg.attention):
        group, j = ("dense", i) if i < cfg.num_dense_layers else ("moe", i - cfg.num_dense_layers)
        p = jax.tree.map(lambda leaf, j=j: leaf[j], params[group])
        y_BTD, stats = self_attention(
            p["attn"], rms_norm(p["attn_norm"], x_BTD, cfg.norm_eps), positions_BT, segments_BT, kind, cfg,
            max_logits=True, selections=False,
        )  # fmt: skip
        x_BTD = x_BTD + y_BTD
        max_logits.append(stats.max_logit_H)
        y_BTD = rms_norm(p["mlp_norm"], x_BTD, cfg.norm_eps)
        if group == "dense":
            x_BTD = x_BTD + mlp(p["mlp"], y_BTD)
        else:
            y_BTD, stats = moe(p["moe"], y_BTD, valid_BT, cfg.moe)
            x_BTD = x_BTD + y_BTD
            loads.append(stats.load_E)
    x_BTD = rms_norm(params["final_norm"], x_BTD, cfg.norm_eps)
    return x_BTD @ params["head"]["w"], jnp.stack(max_logits), jnp.stack(loads)


def test_moba_with_room_for_every_block_is_full_attention(tokens, whole):
    full, _ = everything(FULL)(params_of(FULL), tokens, whole)
    roomy = dataclasses.replace(MOBA, moba=MoBAConfig(block_size=3, top_k=7))
    close(compiled(roomy)(params_of(FULL), tokens, None)[0], full)
    sparse, _ = everything(MOBA)(params_of(FULL), tokens, whole)
    assert np.abs(sparse - full).max() > 0.05


# --- Recomputation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", pytest.param("moba", marks=pytest.mark.check)])
def test_recomputation_changes_no_gradient(kind, tokens):
    def gradient_of(policy):
        cfg = dataclasses.replace(ONE, attention=(kind,), remat=policy)
        loss = jax.grad(lambda p: model.token_logprobs(p, cfg, tokens)[0].mean())
        return jit(loss)(params_of(ONE))

    want = gradient_of("none")
    for policy in ("full", "dots_saveable"):
        jax.tree.map(close, gradient_of(policy), want)


def test_each_policy_keeps_what_it_names():
    def kept(policy):
        cfg = dataclasses.replace(SHALLOW, remat=policy)

        def states(p):
            return model.hidden(p, cfg, jnp.zeros((1, 8), jnp.int32))[0]

        pull = jax.eval_shape(lambda p: jax.vjp(states, p)[1], params_of(SHALLOW))
        return sum(leaf.size for leaf in jax.tree.leaves(pull))

    assert kept("full") < kept("dots_with_no_batch_dims_saveable") <= kept("dots_saveable") < kept("none")


def test_an_unknown_policy_is_refused_with_those_that_exist():
    with pytest.raises(ValueError, match=r"model\.remat='some'.*'none', 'full', 'dots_saveable'"):
        dataclasses.replace(HYBRID, remat="some")


# --- Causality and packing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "moba"])
def test_no_gradient_reaches_later_tokens_or_other_documents(kind):
    cfg, length = dataclasses.replace(ONE, attention=(kind,)), 12
    tokens_1T = jnp.arange(length)[None]  # every token once, so that rows of the embedding stand for positions
    segments_1T = jnp.array([[1] * 3 + [2] * 9])
    params = params_of(ONE)

    def outputs(w_VD):
        x_BTD, _ = model.hidden(params | {"embed": {"w": w_VD}}, cfg, tokens_1T, segments_1T)
        return x_BTD[0] @ jnp.linspace(-1, 1, cfg.dim)

    reach_TS = np.abs(jit(jax.jacrev(outputs))(params["embed"]["w"])).max(-1)[:, :length]
    document_T = np.asarray(segments_1T[0])
    allowed_TS = np.tril(document_T[:, None] == document_T)
    assert not reach_TS[~allowed_TS].any()
    assert (reach_TS[allowed_TS] > 0).mean() == 1 if kind == "full" else (reach_TS.diagonal() > 0).all()


@pytest.mark.parametrize("cfg", [FULL, MOBA], ids=["full", "moba"])
def test_later_tokens_change_nothing_before_them_not_even_a_choice(cfg, tokens, whole):
    changed = tokens.at[:, 10:].set((tokens[:, 10:] + 1) % cfg.vocab_size)
    (before, aux), (after, other) = (everything(cfg)(params_of(FULL), t, whole) for t in (tokens, changed))
    close(before[:, :10], after[:, :10], atol=1e-6)
    assert np.abs(before[:, 10:] - after[:, 10:]).max() > 0.05
    np.testing.assert_array_equal(aux.routing[:, :, :10], other.routing[:, :, :10])
    for layer, selected in aux.selections.items():
        np.testing.assert_array_equal(selected[:, :, :10], other.selections[layer][:, :, :10])


def test_packed_documents_give_the_logits_that_each_gives_alone(tokens, segments):
    packed, _ = everything(HYBRID)(params_of(HYBRID), tokens, segments)
    for length in (6, 9):
        rows = [(b, np.flatnonzero(segments[b] == s)) for b in range(B) for s in np.unique(segments[b])]
        rows = [(b, index) for b, index in rows if len(index) == length]
        alone, _ = compiled(HYBRID)(params_of(HYBRID), jnp.stack([tokens[b, index] for b, index in rows]), None)
        for logits, (b, index) in zip(alone, rows, strict=True):
            close(packed[b, index], logits)


def test_positions_count_from_the_start_of_each_document():
    tokens_BT = jnp.zeros((2, 6), jnp.int32)
    segment_ids = jnp.array([[1, 1, 2, 2, 2, 1], [5, 5, 5, 5, 0, 0]])
    np.testing.assert_array_equal(
        model.default_positions(tokens_BT, segment_ids), [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 0, 1]]
    )
    np.testing.assert_array_equal(model.default_positions(tokens_BT, None), [range(6)] * 2)


def test_given_positions_are_used(tokens):
    def run(p, t, positions):
        return model.apply(p, SHALLOW, t, None, positions)[0]

    run = jit(run)
    positions = jnp.tile(jnp.arange(T), (B, 1))
    near = run(params_of(SHALLOW), tokens, positions)
    close(run(params_of(SHALLOW), tokens, positions + 5), near)  # only differences of positions count
    assert np.abs(run(params_of(SHALLOW), tokens, 3 * positions) - near).max() > 0.01


# --- Log-probabilities ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 5, T, 100])
def test_token_logprobs_are_those_of_the_logits_for_every_chunk(chunk, tokens):
    logits, _ = compiled(SHALLOW)(params_of(SHALLOW), tokens, None)
    want_BTV = jax.nn.log_softmax(logits)
    targets = (tokens * 7 + 3) % SHALLOW.vocab_size

    @jit
    def both(p, t, targets_BT):
        given = model.token_logprobs(p, SHALLOW, t, targets_BT=targets_BT, chunk=chunk)[0]
        return given, model.token_logprobs(p, SHALLOW, t, chunk=chunk)[0]

    given, default = both(params_of(SHALLOW), tokens, targets)
    assert given.shape == default.shape == (B, T)
    assert given.dtype == jnp.float32
    close(given, np.take_along_axis(want_BTV, targets[..., None], -1)[..., 0])
    close(default[:, :-1], np.take_along_axis(want_BTV[:, :-1], tokens[:, 1:, None], -1)[..., 0])
    np.testing.assert_array_equal(default[:, -1], 0.0)


def test_no_array_of_all_logits_is_kept_for_the_backward_pass(tokens):
    def loss(p, chunk):
        return model.token_logprobs(p, SHALLOW, tokens, chunk=chunk)[0].sum()

    program = str(jax.make_jaxpr(jax.grad(functools.partial(loss, chunk=7)))(params_of(SHALLOW)))
    chunks, vocabulary = T // 7, SHALLOW.vocab_size
    assert f"[{B},1,7,{vocabulary}]" in program  # one part, since no mesh cuts the sequence
    assert f",{T},{vocabulary}]" not in program
    assert f"[{chunks},{B},1,7,{vocabulary}]" not in program


# --- What Aux tells ---------------------------------------------------------------------------------------------


def test_aux_holds_what_was_asked_for(tokens):
    aux = jax.eval_shape(lambda p: model.hidden(p, HYBRID, tokens)[1], params_of(HYBRID))
    assert aux.max_logits is None
    assert aux.selections is None
    assert aux.expert_load_ME.shape == (3, 6)
    assert aux.routing.shape == (3, B, T, 2)
    dense = jax.eval_shape(lambda p: model.hidden(p, SHALLOW, tokens, max_logits=True)[1], params_of(SHALLOW))
    assert dense.expert_load_ME is dense.routing is None
    assert dense.max_logits.keys() == {"dense"}
    assert dense.balance_loss.shape == ()


def test_max_logits_and_loads_carry_no_gradient(tokens):
    def told(p):
        _, aux = model.hidden(p, ONE, tokens, max_logits=True)
        return sum(leaf.sum() for leaf in jax.tree.leaves(aux.max_logits)) + aux.expert_load_ME.sum()

    grads = jit(jax.grad(told))(params_of(ONE))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_max_logits_are_the_largest_unmasked_products_over_the_batch(tokens, segments):
    _, aux = everything(FULL)(params_of(FULL), tokens, segments)
    p = jax.tree.map(lambda leaf: leaf[0], params_of(FULL)["dense"])
    x_BTD = rms_norm(p["attn_norm"], params_of(FULL)["embed"]["w"][tokens], FULL.norm_eps)
    q_BTHK, k_BTHK, _, scale = mla_qkv(p["attn"], x_BTD, model.default_positions(tokens, segments), FULL)
    logits_BHTS = np.einsum("bthk,bshk->bhts", q_BTHK, k_BTHK) * scale
    seen_BTS = np.tril(np.ones((T, T), bool)) & (np.asarray(segments)[:, :, None] == np.asarray(segments)[:, None])
    want_H = np.where(seen_BTS[:, None], logits_BHTS, -np.inf).max(axis=(0, 2, 3))
    close(aux.max_logits["dense"][0], want_H)
    assert aux.max_logits["moe"].shape == (3, 2)
    assert aux.max_logits["moe"].dtype == jnp.float32


def test_selections_are_keyed_by_layer_and_begin_with_the_own_block(tokens, whole):
    _, aux = everything(HYBRID)(params_of(HYBRID), tokens, whole)
    assert sorted(aux.selections) == [0, 2, 3]
    own_T = np.arange(T) // 4
    for selected_BHTJ in aux.selections.values():
        assert selected_BHTJ.shape == (B, 2, T, 2)
        np.testing.assert_array_equal(selected_BHTJ[..., 0], np.broadcast_to(own_T, (B, 2, T)))
        assert (selected_BHTJ[..., 1] < own_T).all()
    assert not np.array_equal(aux.selections[2], aux.selections[3])


def test_pinned_routing_reproduces_and_decides(tokens, whole):
    run, params = everything(HYBRID), params_of(HYBRID)
    logits, aux = run(params, tokens, whole)
    again, pinned = run(params, tokens, whole, aux.routing)
    close(again, logits)
    close(pinned.balance_loss, aux.balance_loss)
    np.testing.assert_array_equal(pinned.expert_load_ME, aux.expert_load_ME)
    other, moved = run(params, tokens, whole, (aux.routing + 1) % 6)
    np.testing.assert_array_equal(moved.routing, (aux.routing + 1) % 6)
    np.testing.assert_array_equal(moved.expert_load_ME, np.roll(aux.expert_load_ME, 1, axis=1))
    assert np.abs(other - logits).max() > 0.05


def test_padding_counts_in_no_load_and_no_balance_loss(tokens, segments):
    """The second document as padding: its tokens go nowhere in the statistics, and nobody's logits change."""
    logits, aux = everything(HYBRID)(params_of(HYBRID), tokens, segments)
    padded = segments.at[0, 9:].set(0)
    some, fewer = everything(HYBRID)(params_of(HYBRID), tokens, padded)
    close(some[0, :9], logits[0, :9])
    counted = [np.bincount(np.ravel(ids[np.asarray(padded) > 0]), minlength=6) for ids in np.asarray(fewer.routing)]
    np.testing.assert_array_equal(fewer.expert_load_ME, counted)
    np.testing.assert_array_equal(aux.expert_load_ME.sum(axis=1), B * T * 2)
    assert float(fewer.balance_loss) != pytest.approx(float(aux.balance_loss), rel=1e-3)


def test_bfloat16_stays_close_to_float32_where_the_routing_is_the_same(tokens):
    cfg = dataclasses.replace(ONE, attention=("full",))
    params = jax.tree.map(lambda leaf: leaf / 2 if leaf.ndim > 2 else leaf, params_of(ONE))  # a tame model
    logits, aux = compiled(cfg)(params, tokens, None)
    rounded, _ = compiled(dataclasses.replace(cfg, dtype="bfloat16"))(params, tokens, None, aux.routing)
    assert rounded.dtype == jnp.float32
    assert 1e-3 < np.std(rounded - logits) / np.std(logits) < 0.03


# --- Definition and compilation ---------------------------------------------------------------------------------


def test_the_module_is_the_function_over_its_parameters(tokens):
    @jit
    def made(key):
        module = model.Transformer(SHALLOW, nnx.Rngs(params=key))
        return model.parameters(module), model.init_params(SHALLOW, key), module(tokens)[0]

    params, same, logits = made(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, params, same)
    close(logits, compiled(SHALLOW)(params, tokens, None)[0])


@functools.cache
def initialised():
    return jit(functools.partial(model.init_params, THREE))(jax.random.key(0))


def test_counts_are_those_of_the_leaves():
    assert model.count_params(THREE).total == sum(leaf.size for leaf in jax.tree.leaves(initialised()))


def test_parameters_are_float32_and_start_as_the_config_says():
    params = initialised()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        assert leaf.dtype == jnp.float32
        match path[-1].key:
            case "scale":
                assert (leaf == 1).all()
            case "bias":
                assert (leaf == 0).all()
            case _:
                assert 0.8 * THREE.init_std < np.std(leaf) < 1.2 * THREE.init_std
    experts = params["moe"]["moe"]["experts"]["w_up"]
    assert not np.array_equal(experts[0, 0], experts[0, 1])  # experts
    assert not np.array_equal(experts[0], experts[1])  # layers


def test_equal_configs_and_new_values_compile_nothing_anew(tokens):
    traces = []

    @functools.partial(jit, static_argnames="cfg")
    def run(params, tokens_BT, cfg):
        traces.append(cfg)
        return model.apply(params, cfg, tokens_BT)[0]

    run(params_of(SHALLOW), tokens, SHALLOW)
    run(jax.tree.map(lambda leaf: 2 * leaf, params_of(SHALLOW)), tokens + 1, dataclasses.replace(SHALLOW))
    assert len(traces) == 1
