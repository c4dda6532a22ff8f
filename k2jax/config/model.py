"""What a transformer is: frozen dataclasses that refuse what cannot work."""

from dataclasses import dataclass

from k2jax.config.checks import not_negative, one_of, positive

FLOATS = ("float32", "bfloat16", "float16")
REMAT = ("none", "full", "dots_saveable", "dots_with_no_batch_dims_saveable")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions; `factor` > 1 switches YaRN on (arXiv 2309.00071, as released with Kimi K2)."""

    theta: float = 50_000.0
    factor: float = 1.0
    original_length: int = 4096  # tokens; the context before the YaRN extension
    beta_fast: float = 1.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


@dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention (Kimi K2 report section 2.3; DeepSeek-V2, arXiv 2405.04434)."""

    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    q_lora_rank: int | None = None  # None: queries come from the hidden state by one matrix, as in Moonlight


@dataclass(frozen=True)
class GQAConfig:
    """Grouped-query attention; num_kv_heads equal to num_heads is multi-head attention."""

    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class MoBAConfig:
    """Mixture of Block Attention (arXiv 2502.13189); top_k counts the current block."""

    block_size: int
    top_k: int


@dataclass(frozen=True)
class MoEConfig:
    """Routed and shared experts (Kimi K2 report section 2.3; DeepSeek-V3, arXiv 2412.19437, section 2.1.2)."""

    num_experts: int
    experts_per_token: int
    expert_dim: int
    num_shared: int = 1
    num_groups: int = 1
    groups_per_token: int = 1
    route_scale: float = 1.0  # multiplies the normalised weights; 2.827 for K2's 8 of 384
    dispatch: str = "gather"  # what moves where the mesh cuts the experts: 'gather' the tokens, 'local' the weights


@dataclass(frozen=True)
class ModelConfig:
    """A transformer: what its parameters are and how they are used."""

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    mlp_dim: int  # hidden size of the dense layers' MLP
    attn: MLAConfig | GQAConfig
    attention: tuple[str, ...]  # 'full' or 'moba' per layer; never changes the parameters
    num_dense_layers: int = 1  # the first layers carry a dense MLP, the others experts
    moe: MoEConfig | None = None
    moba: MoBAConfig | None = None
    rope: RopeConfig = RopeConfig()
    norm_eps: float = 1e-6  # of the blocks' norms and the last one; MLA's own norms keep 1e-6, as released
    init_std: float = 0.02
    dtype: str = "bfloat16"  # of the computation; parameters and reductions are float32
    remat: str = "none"  # what the backward pass recomputes: 'none', 'full', or all but what a JAX policy saves

    def __post_init__(self):
        positive("model", self, "vocab_size", "dim", "num_layers", "num_heads", "mlp_dim", "norm_eps", "init_std")
        _check_attention(self)
        _check_rope(self)
        _check_experts(self)
        one_of("model", self, "dtype", FLOATS)
        one_of("model", self, "remat", REMAT)

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers


def _check_attention(cfg: ModelConfig):
    if len(cfg.attention) != cfg.num_layers:
        raise ValueError(
            f"model.attention has {len(cfg.attention)} entries for model.num_layers={cfg.num_layers}: "
            "give one of 'full', 'moba' per layer"
        )
    for i, kind in enumerate(cfg.attention):
        if kind not in ("full", "moba"):
            raise ValueError(f"model.attention[{i}]={kind!r}: use 'full' or 'moba'")
    if "moba" in cfg.attention and cfg.moba is None:
        raise ValueError("model.attention names 'moba' but model.moba is missing: give block_size and top_k")
    if cfg.moba is not None:
        positive("model.moba", cfg.moba, "block_size", "top_k")
    if isinstance(cfg.attn, MLAConfig):
        positive("model.attn", cfg.attn, "kv_lora_rank", "nope_dim", "rope_dim", "v_dim")
        if cfg.attn.q_lora_rank is not None:
            positive("model.attn", cfg.attn, "q_lora_rank")
    else:
        positive("model.attn", cfg.attn, "num_kv_heads", "head_dim")
        if cfg.num_heads % cfg.attn.num_kv_heads:
            raise ValueError(
                f"model.attn.num_kv_heads={cfg.attn.num_kv_heads} does not divide model.num_heads={cfg.num_heads}: "
                "every key head serves the same number of query heads"
            )


def _check_rope(cfg: ModelConfig):
    field = "head_dim" if isinstance(cfg.attn, GQAConfig) else "rope_dim"
    size = getattr(cfg.attn, field)
    if size % 2:
        raise ValueError(f"model.attn.{field}={size}: rotary positions turn pairs, use an even size")
    positive("model.rope", cfg.rope, "original_length", "beta_fast", "beta_slow")
    if not cfg.rope.theta > 1:
        raise ValueError(f"model.rope.theta={cfg.rope.theta}: must exceed 1, for example 10000")
    if not cfg.rope.factor >= 1:
        raise ValueError(f"model.rope.factor={cfg.rope.factor}: must be at least 1, which switches YaRN off")


def _check_experts(cfg: ModelConfig):
    if not 0 <= cfg.num_dense_layers <= cfg.num_layers:
        raise ValueError(
            f"model.num_dense_layers={cfg.num_dense_layers}: must lie between 0 and model.num_layers={cfg.num_layers}"
        )
    if cfg.num_moe_layers == 0:
        return
    if cfg.moe is None:
        raise ValueError(
            f"model.num_dense_layers={cfg.num_dense_layers} leaves {cfg.num_moe_layers} layers of experts but "
            "model.moe is missing: give it, or set num_dense_layers to num_layers"
        )
    moe = cfg.moe
    positive("model.moe", moe, "num_experts", "experts_per_token", "expert_dim", "num_groups", "groups_per_token")
    positive("model.moe", moe, "route_scale")
    one_of("model.moe", moe, "dispatch", ("gather", "local"))
    not_negative("model.moe", moe, "num_shared")
    if moe.num_experts % moe.num_groups:
        raise ValueError(
            f"model.moe.num_groups={moe.num_groups} does not divide model.moe.num_experts={moe.num_experts}: "
            "groups have equal sizes, use a divisor"
        )
    if moe.groups_per_token > moe.num_groups:
        raise ValueError(
            f"model.moe.groups_per_token={moe.groups_per_token} exceeds model.moe.num_groups={moe.num_groups}: lower it"
        )
    reachable = moe.num_experts // moe.num_groups * moe.groups_per_token
    if moe.experts_per_token > reachable:
        raise ValueError(
            f"model.moe.experts_per_token={moe.experts_per_token} exceeds the {reachable} experts that a token's "
            "groups hold: lower it or raise groups_per_token"
        )
    if moe.num_groups > 1 and moe.num_experts // moe.num_groups < 2:
        raise ValueError(
            f"model.moe.num_groups={moe.num_groups}: a group is scored by its two best experts, so it needs two"
        )
