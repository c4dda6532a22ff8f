"""The model's forward pass in float32 against the float64 oracle, for every architecture the configs offer.

Legend: B batch, T tokens, V vocabulary, E experts.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax import model
from k2jax.config import GQAConfig, MLAConfig, MoBAConfig, ModelConfig, MoEConfig, RopeConfig
from tests.oracles import model as oracle
from tests.oracles.mla import Mla
from tests.oracles.router import sequence_balance_loss
from tests.oracles.yarn import Yarn

SIZES = {"vocab_size": 40, "dim": 24, "num_heads": 4, "mlp_dim": 20, "dtype": "float32"}
EXPERTS = MoEConfig(num_experts=8, experts_per_token=3, expert_dim=12, route_scale=2.446)
LATENT = MLAConfig(kv_lora_rank=10, nope_dim=8, rope_dim=4, v_dim=6, q_lora_rank=14)
LATENT_NO_Q = MLAConfig(kv_lora_rank=10, nope_dim=8, rope_dim=4, v_dim=6)
SHARED_KEYS = GQAConfig(num_kv_heads=2, head_dim=8)
BLOCKS = MoBAConfig(block_size=4, top_k=2)
LONG = RopeConfig(theta=500.0, factor=8.0, original_length=16)
PACKED = [(9, 8, 4), (3, 17, 1)]


def config(num_layers=3, **changes):
    return ModelConfig(
        **{"num_layers": num_layers, "attention": ("full",) * num_layers, "moe": EXPERTS} | SIZES | changes
    )


GROUPED = MoEConfig(
    num_experts=8, experts_per_token=3, expert_dim=12, num_groups=4, groups_per_token=2, route_scale=2.5
)
TWO_SHARED = MoEConfig(num_experts=6, experts_per_token=2, expert_dim=8, num_shared=2)
HYBRID = ("moba", "full", "moba")
# Compilation is most of the time of this file, and tiny models need no optimised code.
QUICK_COMPILE = {"xla_backend_optimization_level": 0}

CASES = {
    "mla_yarn_moe": (config(attn=LATENT, rope=LONG), None),
    "mla_without_q_lora": (config(attn=LATENT_NO_Q), None),
    "mla_moba_hybrid": (config(attn=LATENT, moba=BLOCKS, attention=HYBRID), PACKED),
    "gqa_moba_packed": (
        config(attn=SHARED_KEYS, moba=BLOCKS, attention=("moba", "moba", "full"), num_dense_layers=2),
        PACKED,
    ),
    "gqa_dense_only": (config(2, attn=SHARED_KEYS, moe=None, num_dense_layers=2), PACKED),
    "experts_only_two_shared": (config(2, attn=LATENT, num_dense_layers=0, moe=TWO_SHARED), None),
    "group_limited_routing": (config(attn=LATENT_NO_Q, moe=GROUPED), None),
}


def oracle_spec(cfg):
    """The oracle's settings for a project config."""
    latent, blocks, experts = cfg.attn, cfg.moba or MoBAConfig(0, 0), cfg.moe or EXPERTS
    yarn = None
    if cfg.rope.factor > 1:
        yarn = Yarn(factor=cfg.rope.factor, original_length=cfg.rope.original_length)
    mla = None
    if isinstance(latent, MLAConfig):
        mla = Mla(latent.nope_dim, latent.rope_dim, latent.v_dim, cfg.rope.theta, cfg.norm_eps, yarn)
    return oracle.ModelSpec(
        attention=cfg.attention,
        top_k=experts.experts_per_token,
        scaling=experts.route_scale,
        n_group=experts.num_groups,
        topk_group=experts.groups_per_token,
        mla=mla,
        theta=cfg.rope.theta,
        eps=cfg.norm_eps,
        moba_block=blocks.block_size,
        moba_top_k=blocks.top_k,
    )


def random_params(cfg, seed=0):
    """Parameters of the project's shapes, large enough that every part changes the logits."""
    shapes = jax.eval_shape(lambda: model.init_params(cfg, jax.random.key(0)))
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        name = path[-1].key
        noise = rng.standard_normal(leaf.shape)
        if name == "scale":
            return np.float32(1 + 0.2 * noise)
        if name == "bias":
            return np.float32(-0.6 + 0.3 * noise)
        return np.float32(0.35 * noise)

    return jax.tree.map(jnp.asarray, jax.tree_util.tree_map_with_path(fill, shapes))


def inputs(cfg, packed, T=21):
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, cfg.vocab_size, (2, T))
    if packed is None:
        return tokens, None
    return tokens, np.stack([np.repeat(np.arange(1, len(lengths) + 1), lengths) for lengths in packed])


@pytest.mark.parametrize("name", CASES)
def test_logits_max_logits_and_routing(name):
    cfg, packed = CASES[name]
    params = random_params(cfg)
    tokens, segments = inputs(cfg, packed)
    segment_ids = None if segments is None else jnp.array(segments, jnp.int32)
    logits, aux = jax.jit(lambda p, t, s: model.apply(p, cfg, t, s, max_logits=True))(params, tokens, segment_ids)
    expected = oracle.forward(params, oracle_spec(cfg), tokens, segments)
    spread = np.std(expected.logits_BTV)
    assert spread > 0.3
    np.testing.assert_allclose(logits, expected.logits_BTV, atol=3e-5 * spread, rtol=3e-5)
    assert aux.max_logits.keys() == expected.max_logits.keys()
    for group, want in expected.max_logits.items():
        np.testing.assert_allclose(aux.max_logits[group], want, rtol=2e-5, atol=2e-5)
    if cfg.moe is None:
        return
    E = cfg.moe.num_experts
    np.testing.assert_array_equal(np.sort(aux.routing, -1), np.sort(expected.ids, -1))
    counts = [np.bincount(np.ravel(ids), minlength=E) for ids in expected.ids]
    np.testing.assert_array_equal(aux.expert_load_ME, counts)
    balance = sum(sequence_balance_loss(*layer) for layer in zip(expected.ids, expected.scores, strict=True))
    assert float(aux.balance_loss) == pytest.approx(balance, rel=1e-5)


def test_token_logprobs_are_the_log_softmax_of_the_logits():
    cfg, packed = CASES["gqa_moba_packed"]
    params = random_params(cfg)
    tokens, segments = inputs(cfg, packed)

    def logprobs(params, tokens, segment_ids):
        return model.token_logprobs(params, cfg, tokens, segment_ids, chunk=8)[0]

    logp = jax.jit(logprobs, compiler_options=QUICK_COMPILE)(params, tokens, jnp.array(segments, jnp.int32))
    logits = oracle.forward(params, oracle_spec(cfg), tokens, segments).logits_BTV
    log_z = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    want = np.take_along_axis(logits[:, :-1], tokens[:, 1:, None], -1)[..., 0] - log_z[:, :-1]
    np.testing.assert_allclose(logp[:, :-1], want, atol=2e-4)


def test_released_k2_has_the_parameters_of_its_formula():
    cfg = ModelConfig(
        vocab_size=163840,
        dim=7168,
        num_layers=61,
        num_heads=64,
        mlp_dim=18432,
        attn=MLAConfig(kv_lora_rank=512, nope_dim=128, rope_dim=64, v_dim=128, q_lora_rank=1536),
        attention=("full",) * 61,
        moe=MoEConfig(num_experts=384, experts_per_token=8, expert_dim=2048, route_scale=2.827),
    )
    counts = model.count_params(cfg)
    assert counts.total == 1_026_408_232_448
    assert counts.active == 32_861_500_928
