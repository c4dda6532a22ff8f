"""The model against arrays that Hugging Face's DeepSeek-V3 made, the class that the released K2 names.

tests/golden/make_deepseek_v3.py wrote them; weights and tokens come from tests/golden/cases.py on both sides.
Legend: D model, H heads, Q query latent, C key-value latent, K query/key size, V value size, R rotary size,
E experts, F hidden size of an expert.
"""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax import model
from k2jax.config import MLAConfig, ModelConfig, MoEConfig, RopeConfig
from k2jax.layers.attention import self_attention
from k2jax.layers.mlp import mlp
from k2jax.layers.moe import moe
from k2jax.layers.norm import rms_norm
from tests.golden import cases

FOLDER = Path(__file__).parent / "golden"
EACH = pytest.mark.parametrize("case", cases.CASES)
# Logits and states are of order 1; float32 sums in another order differ by a few 1e-6.
CLOSE = functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-5)
# Compilation is most of the time of this file, and tiny models need no optimised code.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


@functools.cache
def golden(case):
    with np.load(FOLDER / f"deepseek_v3_{case}.npz") as file:
        return dict(file)


def model_config(case):
    """The case's config.json in our fields."""
    hf = cases.CASES[case]
    yarn = hf.get("rope_scaling")
    rope = {}
    if yarn:
        rope = {name: yarn[name] for name in ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")}
        rope["original_length"] = yarn["original_max_position_embeddings"]
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        dim=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        num_dense_layers=hf["first_k_dense_replace"],
        num_heads=hf["num_attention_heads"],
        mlp_dim=hf["intermediate_size"],
        attn=MLAConfig(
            q_lora_rank=hf["q_lora_rank"],
            kv_lora_rank=hf["kv_lora_rank"],
            nope_dim=hf["qk_nope_head_dim"],
            rope_dim=hf["qk_rope_head_dim"],
            v_dim=hf["v_head_dim"],
        ),
        attention=("full",) * hf["num_hidden_layers"],
        moe=MoEConfig(
            num_experts=hf["n_routed_experts"],
            experts_per_token=hf["num_experts_per_tok"],
            expert_dim=hf["moe_intermediate_size"],
            num_shared=hf["n_shared_experts"],
            num_groups=hf["n_group"],
            groups_per_token=hf["topk_group"],
            route_scale=hf["routed_scaling_factor"],
        ),
        rope=RopeConfig(theta=hf["rope_theta"], **rope),
        norm_eps=hf["rms_norm_eps"],
        dtype="float32",
    )


def our_tree(named, cfg):
    """Weights (or gradients) by released name, as the tree that k2jax takes."""
    layers = [_layer(named, cfg, i) for i in range(cfg.num_layers)]
    groups = {"dense": layers[: cfg.num_dense_layers], "moe": layers[cfg.num_dense_layers :]}
    tree = {name: jax.tree.map(lambda *leaves: np.stack(leaves), *group) for name, group in groups.items() if group}
    return tree | {
        "embed": {"w": named["model.embed_tokens.weight"]},
        "final_norm": {"scale": named["model.norm.weight"]},
        "head": {"w": named["lm_head.weight"].T},
    }


def _layer(named, cfg, i):
    def get(name):
        return named[f"model.layers.{i}.{name}.weight"]

    def heads_out(name):
        w_OI = get(f"self_attn.{name}")
        return w_OI.T.reshape(w_OI.shape[1], cfg.num_heads, -1)

    def swiglu(name):
        return {f"w_{part}": get(f"{name}.{part}_proj").T for part in ("gate", "up", "down")}

    attn = {
        "wkv_a": get("self_attn.kv_a_proj_with_mqa").T,
        "kv_norm": {"scale": get("self_attn.kv_a_layernorm")},
        "wkv_b": heads_out("kv_b_proj"),
        "wo": get("self_attn.o_proj").T.reshape(cfg.num_heads, cfg.attn.v_dim, cfg.dim),
    }
    if cfg.attn.q_lora_rank is None:
        attn["wq"] = heads_out("q_proj")
    else:
        attn["wq_a"] = get("self_attn.q_a_proj").T
        attn["q_norm"] = {"scale": get("self_attn.q_a_layernorm")}
        attn["wq_b"] = heads_out("q_b_proj")
    norms = {
        "attn_norm": {"scale": get("input_layernorm")},
        "mlp_norm": {"scale": get("post_attention_layernorm")},
    }
    if i < cfg.num_dense_layers:
        return norms | {"attn": attn, "mlp": swiglu("mlp")}
    experts = [swiglu(f"mlp.experts.{e}") for e in range(cfg.moe.num_experts)]
    bias = named[f"model.layers.{i}.mlp.gate.e_score_correction_bias"]
    layer_of_experts = {
        "router": {"w": get("mlp.gate").T, "bias": bias},
        "experts": jax.tree.map(lambda *leaves: np.stack(leaves), *experts),
        "shared": swiglu("mlp.shared_experts"),
    }
    return norms | {"attn": attn, "moe": layer_of_experts}


def params_of(case):
    cfg = model_config(case)
    params = our_tree(cases.weights(case), cfg)
    shapes = jax.eval_shape(lambda: model.init_params(cfg, jax.random.key(0)))
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes)
    return cfg, jax.tree.map(jnp.asarray, params)


def test_the_files_belong_to_these_weights_and_tokens():
    for case in cases.CASES:
        np.testing.assert_array_equal(golden(case)["tokens"], cases.tokens(case))


@EACH
def test_logits_and_chosen_experts(case):
    cfg, params = params_of(case)
    logits, aux = jit(lambda p, t: model.apply(p, cfg, t))(params, cases.tokens(case))
    np.testing.assert_array_equal(np.sort(aux.routing, -1), golden(case)["experts"])
    CLOSE(logits, golden(case)["logits"])


@pytest.mark.parametrize("case", ["kimi_k2", "expert_groups"])
def test_pinned_experts_are_used_whatever_the_bias_says(case):
    cfg, params = params_of(case)
    params["moe"]["moe"]["router"]["bias"] = jnp.zeros_like(params["moe"]["moe"]["router"]["bias"])
    # In descending order: the order of a token's experts must not matter.
    pinned = jnp.asarray(golden(case)["experts"][..., ::-1], jnp.int32)
    logits, aux = jit(lambda p, t, r: model.apply(p, cfg, t, routing=r))(params, cases.tokens(case), pinned)
    np.testing.assert_array_equal(aux.routing, pinned)
    CLOSE(logits, golden(case)["logits"])


@EACH
def test_every_layer_adds_what_it_should(case):
    """Attention, MLP or experts, and the residual stream, layer by layer; uncompiled, as the shapes repeat."""
    cfg, params = params_of(case)
    want = golden(case)
    x_BTD = params["embed"]["w"][cases.tokens(case)]
    positions_BT = jnp.broadcast_to(jnp.arange(cases.LENGTH), x_BTD.shape[:2])
    for i in range(cfg.num_layers):
        group, member = ("dense", i) if i < cfg.num_dense_layers else ("moe", i - cfg.num_dense_layers)
        p = jax.tree.map(lambda leaf, member=member: leaf[member], params[group])
        CLOSE(x_BTD[:, cases.KEPT], want["hidden"][i], err_msg=f"input of layer {i}")
        y_BTD = rms_norm(p["attn_norm"], x_BTD, cfg.norm_eps)
        y_BTD, _ = self_attention(p["attn"], y_BTD, positions_BT, None, "full", cfg, max_logits=False, selections=False)
        CLOSE(y_BTD[:, cases.KEPT], want["attention"][i], err_msg=f"attention of layer {i}")
        x_BTD = x_BTD + y_BTD
        y_BTD = rms_norm(p["mlp_norm"], x_BTD, cfg.norm_eps)
        if group == "dense":
            y_BTD = mlp(p["mlp"], y_BTD)
        else:
            y_BTD, _ = moe(p["moe"], y_BTD, jnp.ones_like(positions_BT, bool), cfg.moe)
        CLOSE(y_BTD[:, cases.KEPT], want["mlp"][i], err_msg=f"MLP of layer {i}")
        x_BTD = x_BTD + y_BTD
    x_BTD = rms_norm(params["final_norm"], x_BTD, cfg.norm_eps)
    CLOSE(x_BTD[:, cases.KEPT], want["hidden"][-1], err_msg="final states")


def test_gradients_of_the_mean_cross_entropy():
    case = cases.GRADIENTS
    cfg, params = params_of(case)
    tokens = cases.tokens(case)

    def loss(params):
        logp_BT, _ = model.token_logprobs(params, cfg, tokens, chunk=16)
        return -logp_BT.sum() / (tokens.shape[0] * (tokens.shape[1] - 1))

    value, grads = jit(jax.value_and_grad(loss))(params)
    assert float(value) == pytest.approx(float(golden(case)["loss"]), rel=1e-6)
    named, start = {}, 0
    for name, shape in cases.shapes(cases.CASES[case]).items():
        stop = start + math.prod(shape)
        named[name] = golden(case)["gradient"][start:stop].reshape(shape)
        start = stop
    assert start == golden(case)["gradient"].size
    want = our_tree(named, cfg)

    def compare(path, ours, theirs):
        name = jax.tree_util.keystr(path)
        if name.endswith("['bias']"):
            assert not np.any(ours), "only the balance rule moves the router's bias"
            return
        largest = np.abs(theirs).max()
        assert largest > 1e-4, name
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * largest, err_msg=name)

    jax.tree_util.tree_map_with_path(compare, grads, want)
