"""What the golden script and its test share: tiny models in the fields of config.json, their weights and tokens.

Weights are never stored. Each is made from its released name alone out of PCG64's raw bits, which NumPy promises to
keep the same in every version (NEP 19), so both sides have the same bits.
"""

import math
import zlib

import numpy as np

SEED = 0  # the first under which no choice of an expert hangs by a rounding; the script checks it
BATCH, LENGTH = 2, 48  # tokens; longer than the original length of every rope_scaling below
KEPT = slice(3, None, 9)  # positions whose hidden states are stored
GRADIENTS = "kimi_k2"  # the case whose gradients are stored

# The shape of every case; the sizes differ from each other so that a swapped axis cannot fit.
BASE = {
    "vocab_size": 32,
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "intermediate_size": 40,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 16,
    "v_head_dim": 6,
    "moe_intermediate_size": 10,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.827,
    "rms_norm_eps": 1e-6,
    "rope_theta": 50_000.0,
    "rope_interleave": True,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "num_nextn_predict_layers": 0,
}

# K2's own YaRN: equal betas make a step, here between pairs 1 and 2 of 8; the magnitudes cancel in cos and sin.
STEP = {
    "type": "yarn",
    "factor": 32.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 1.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
# YaRN's usual betas make a ramp over pairs 0 to 3 at theta 100; the magnitudes do not cancel.
RAMP = STEP | {"beta_fast": 32.0, "mscale_all_dim": 0.5}
GROUPS = {"n_routed_experts": 12, "n_group": 4, "topk_group": 2}

CASES = {
    "kimi_k2": BASE | {"rope_scaling": STEP},
    "kimi_k2_before_yarn": BASE | {"first_k_dense_replace": 2},
    "moonlight": BASE
    | {"q_lora_rank": None, "n_shared_experts": 2, "rms_norm_eps": 1e-5, "routed_scaling_factor": 2.446},
    "expert_groups": BASE
    | GROUPS
    | {"rope_theta": 100.0, "rope_scaling": RAMP, "first_k_dense_replace": 2, "routed_scaling_factor": 2.5},
    "experts_only": BASE
    | GROUPS
    | {"q_lora_rank": None, "rope_scaling": STEP, "first_k_dense_replace": 0, "n_shared_experts": 2},
    # An epsilon that is seen: only the blocks' norms take it, those inside of attention keep 1e-6.
    "coarse_epsilon": BASE | {"rms_norm_eps": 1e-2, "rope_theta": 100.0, "rope_scaling": RAMP},
}


def tokens(case: str) -> np.ndarray:
    """Token ids [BATCH, LENGTH]."""
    vocab_size = CASES[case]["vocab_size"]
    raw = np.random.PCG64(zlib.crc32(f"{SEED}/{case}/tokens".encode())).random_raw(BATCH * LENGTH)
    return (raw % np.uint64(vocab_size)).astype(np.int32).reshape(BATCH, LENGTH)


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """{released name: shape}; matrices are [out, in], as in the shards of the released checkpoint."""
    dim, vocab_size, heads = config["hidden_size"], config["vocab_size"], config["num_attention_heads"]
    latent, nope, rope = config["kv_lora_rank"], config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    value, query = config["v_head_dim"], config["q_lora_rank"]
    found = {"model.embed_tokens.weight": (vocab_size, dim)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        found[f"{layer}.input_layernorm.weight"] = (dim,)
        if query is None:
            found[f"{layer}.self_attn.q_proj.weight"] = (heads * (nope + rope), dim)
        else:
            found[f"{layer}.self_attn.q_a_proj.weight"] = (query, dim)
            found[f"{layer}.self_attn.q_a_layernorm.weight"] = (query,)
            found[f"{layer}.self_attn.q_b_proj.weight"] = (heads * (nope + rope), query)
        found[f"{layer}.self_attn.kv_a_proj_with_mqa.weight"] = (latent + rope, dim)
        found[f"{layer}.self_attn.kv_a_layernorm.weight"] = (latent,)
        found[f"{layer}.self_attn.kv_b_proj.weight"] = (heads * (nope + value), latent)
        found[f"{layer}.self_attn.o_proj.weight"] = (dim, heads * value)
        found[f"{layer}.post_attention_layernorm.weight"] = (dim,)
        if i < config["first_k_dense_replace"]:
            found |= _mlp(f"{layer}.mlp", dim, config["intermediate_size"])
            continue
        found[f"{layer}.mlp.gate.weight"] = (config["n_routed_experts"], dim)
        found[f"{layer}.mlp.gate.e_score_correction_bias"] = (config["n_routed_experts"],)
        for e in range(config["n_routed_experts"]):
            found |= _mlp(f"{layer}.mlp.experts.{e}", dim, config["moe_intermediate_size"])
        width = config["n_shared_experts"] * config["moe_intermediate_size"]
        found |= _mlp(f"{layer}.mlp.shared_experts", dim, width)
    return found | {"model.norm.weight": (dim,), "lm_head.weight": (vocab_size, dim)}


def _mlp(name, dim, hidden):
    into, out = (hidden, dim), (dim, hidden)
    return {f"{name}.gate_proj.weight": into, f"{name}.up_proj.weight": into, f"{name}.down_proj.weight": out}


def weights(case: str) -> dict[str, np.ndarray]:
    """{released name: float32 array}, such that every part changes the logits."""
    return {name: _fill(f"{SEED}/{case}/{name}", shape) for name, shape in shapes(CASES[case]).items()}


def _fill(name, shape):
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(math.prod(shape)).reshape(shape)
    # 24 bits fill a float32's significand: uniform over [-1, 1), exact on every machine.
    uniform = (raw >> np.uint64(40)).astype(np.float32) * np.float32(2**-23) - np.float32(1)
    if name.endswith("norm.weight"):
        return np.float32(1) + np.float32(0.2) * uniform
    if name.endswith("bias"):
        # Low enough that many choices are negative: a masked group that is filled with 0 would win.
        return np.float32(-0.6) + np.float32(0.3) * uniform
    fan_in = 1 if "embed_tokens" in name else shape[-1]
    return np.float32(math.sqrt(3 / fan_in)) * uniform
