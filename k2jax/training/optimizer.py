"""Which rule writes which parameter, and the optimizer that a config names.

Legend: D model, Q query latent, C key-value latent, H heads, K head, V value size, V vocabulary, E experts, F hidden.
"""

from functools import partial

import optax

from k2jax import sharding
from k2jax.config import GQAConfig, ModelConfig, RunConfig
from k2jax.muonclip import EXTERNAL, AdamW, MatrixSpec, MHAClip, MLAClip, QKClip, muonclip
from k2jax.newton_schulz import NS
from k2jax.training.schedules import by_step

_IN = MatrixSpec(reduction_axis=-2, output_axis=-1)
_HEADS_OUT = MatrixSpec(reduction_axis=-3, output_axis=(-2, -1))
_HEADS_IN = MatrixSpec(reduction_axis=(-3, -2), output_axis=-1)

# By the last two names of a leaf's path. Every projection is one matrix over all its heads, as in Moonlight and K2;
# gains, embedding and head are AdamW's (arXiv 2502.16982, section 2.2), and the router's weights are Muon's.
MATRICES = {
    "attn/wq": _HEADS_OUT,
    "attn/wq_a": _IN,
    "attn/wq_b": _HEADS_OUT,
    "attn/wk": _HEADS_OUT,
    "attn/wv": _HEADS_OUT,
    "attn/wkv_a": _IN,
    "attn/wkv_b": _HEADS_OUT,
    "attn/wo": _HEADS_IN,
    "router/w": _IN,
    **{f"{mlp}/{name}": _IN for mlp in ("mlp", "shared", "experts") for name in ("w_gate", "w_up", "w_down")},
}
# What optimizer.per_head puts in their place for queries, keys and values: the head axis is a batch axis. GLM-5
# (arXiv 2602.15763) splits the up-projections of latent attention so; the output projection stays whole.
_ONE_HEAD_OUT = MatrixSpec(reduction_axis=-3, output_axis=-1)


def per_head_matrices(attn) -> dict[str, MatrixSpec]:
    """MATRICES with one matrix per head, and fused weights cut: the latent from the rotary key, keys from values."""
    heads = {name: _ONE_HEAD_OUT for name, spec in MATRICES.items() if spec is _HEADS_OUT}
    if isinstance(attn, GQAConfig):
        return MATRICES | heads
    return (
        MATRICES
        | heads
        | {
            "attn/wkv_a": MatrixSpec(-2, -1, blocks=(attn.kv_lora_rank, attn.rope_dim)),
            "attn/wkv_b": MatrixSpec(-3, -1, blocks=(attn.nope_dim, attn.v_dim)),
        }
    )


BY_ADAM = {
    "embed/w", "head/w", "attn_norm/scale", "mlp_norm/scale", "final_norm/scale", "q_norm/scale", "kv_norm/scale",
}  # fmt: skip
BY_ANOTHER_RULE = {"router/bias"}


def role(path: str, leaf=None, matrices=MATRICES):
    """The MatrixSpec of a leaf that Muon writes, None for AdamW, EXTERNAL for the router's bias.

    Raises ValueError for a leaf that no rule names: a new parameter must be given one.
    """
    name = "/".join(path.split("/")[-2:])
    if name in matrices:
        return matrices[name]
    if name in BY_ADAM:
        return None
    if name in BY_ANOTHER_RULE:
        return EXTERNAL
    raise ValueError(f"no optimizer rule for parameter {path!r}: name it in k2jax/training/optimizer.py")


def leaf_roles(cfg: RunConfig):
    """`role` as cfg.optimizer.per_head has it, or under optimizer.name='adamw' with AdamW in Muon's place."""
    if cfg.optimizer.name != "adamw":
        return partial(role, matrices=per_head_matrices(cfg.model.attn)) if cfg.optimizer.per_head else role
    return lambda path, leaf: EXTERNAL if role(path, leaf) is EXTERNAL else None


def newton_schulz(cfg: RunConfig) -> NS:
    """K2's five steps in the dtype that the config names."""
    return NS.k2(dtype=cfg.optimizer.ns_dtype)


def clip_specs(cfg: ModelConfig):
    """Where QK-Clip finds the query and key weights of each group of layers, keyed as Aux.max_logits is."""
    groups = [g for g, n in (("dense", cfg.num_dense_layers), ("moe", cfg.num_moe_layers)) if n]
    if isinstance(cfg.attn, GQAConfig):
        return {g: MHAClip(q=f"{g}/attn/wq", k=f"{g}/attn/wk") for g in groups}
    query = "wq" if cfg.attn.q_lora_rank is None else "wq_b"
    return {g: MLAClip(q=f"{g}/attn/{query}", kv=f"{g}/attn/wkv_b", nope=cfg.attn.nope_dim) for g in groups}


def make_optimizer(cfg: RunConfig, rate=None) -> optax.GradientTransformationExtraArgs:
    """Global-norm clipping, then the optimizer that cfg.optimizer.name names.

    rate: the learning rate by finished steps; that of cfg by default, which is wrong for one stage of a run alone.

    All three decay every parameter they write. Global-norm clipping reaches Muon's momentum through the mix of
    gradients only, since Newton-Schulz ignores scale.
    """
    opt = cfg.optimizer

    tx = muonclip(
        rate or by_step(cfg),
        beta=opt.momentum,
        nesterov=opt.nesterov,
        weight_decay=opt.weight_decay,
        matrix_specs=leaf_roles(cfg),
        ns=newton_schulz(cfg),
        adam=AdamW(b1=0.9, b2=0.95, eps=1e-8),
        qk_clip=QKClip(clip_specs(cfg.model), tau=opt.tau) if opt.name == "muonclip" else None,
        repeat_over=sharding.SLOW,
    )
    clip = optax.clip_by_global_norm(opt.clip_norm) if opt.clip_norm else optax.identity()
    return optax.chain(clip, tx)
