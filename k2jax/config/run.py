"""What a training run is: frozen dataclasses that refuse what cannot work."""

import dataclasses
import functools
import math
from dataclasses import dataclass

from k2jax.config.checks import not_negative, one_of, positive
from k2jax.config.model import FLOATS, GQAConfig, ModelConfig

BATCH_AXES = ("slice", "data", "fsdp", "expert")  # those among which a batch is divided


@dataclass(frozen=True)
class OptimizerConfig:
    """MuonClip, Muon or AdamW with one schedule, counted in tokens."""

    name: str = "muonclip"  # 'muonclip' (QK-Clip on), 'muon' (off), 'adamw' (every leaf by AdamW)
    learning_rate: float = 2e-4
    final_learning_rate: float = 2e-5
    warmup_tokens: int = 0
    constant_tokens: int = 0  # after the warm-up; the decay takes the remaining tokens
    decay: str = "cosine"  # or 'linear', which with constant_tokens is warm-up, stable, decay
    weight_decay: float = 0.1
    momentum: float = 0.95
    nesterov: bool = False
    tau: float = 100.0  # QK-Clip's threshold on a head's maximum logit
    clip_norm: float = 1.0  # of the global gradient norm; 0 switches it off
    router_bias_rate: float = 1e-3  # Moonlight's u; 0 leaves the bias alone
    balance_loss: float = 1e-4  # weight of the sequence-wise balance loss
    z_loss: float = 0.0  # weight of the mean of log(sum of exp(logits))^2, which keeps logits from drifting
    ns_dtype: str = "bfloat16"  # of Newton-Schulz; float32 is faster on CPUs
    per_head: bool = False  # Muon on every head's query, key and value projection by itself, as in GLM-5 and Kimi K3

    def __post_init__(self):
        one_of("optimizer", self, "name", ("muonclip", "muon", "adamw"))
        one_of("optimizer", self, "ns_dtype", FLOATS)
        one_of("optimizer", self, "decay", ("cosine", "linear"))
        positive("optimizer", self, "learning_rate", "tau")
        not_negative("optimizer", self, "final_learning_rate", "warmup_tokens", "constant_tokens", "weight_decay")
        not_negative("optimizer", self, "clip_norm", "router_bias_rate", "balance_loss", "z_loss")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optimizer.momentum={self.momentum}: must lie in [0, 1), for example 0.95")


@dataclass(frozen=True)
class SourceConfig:
    """One source of a mixture; shares of the sequences are in proportion to the weights, on any scale."""

    path: str  # docs/data.md has every form: 'stdlib', 'packages', files, buckets, data sets, prepared shards
    weight: float = 1.0


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it is cut."""

    source: str | tuple[SourceConfig, ...] = "stdlib"  # one path, or a mixture
    tokenizer: str = "bytes"  # or 'k2', 'k2:FILE' (a tiktoken.model), 'hf:PATH' (a tokenizer.json)
    seq_len: int = 512  # tokens
    batch_size: int = 8  # sequences per step over all devices and micro-batches
    held_out_fraction: float = 0.03  # of the documents
    seed: int = 0
    prefetch: int = 2  # batches made ahead

    def __post_init__(self):
        positive("data", self, "seq_len", "batch_size")
        not_negative("data", self, "seed", "prefetch")
        if not 0 < self.held_out_fraction < 1:
            raise ValueError(
                f"data.held_out_fraction={self.held_out_fraction}: must lie between 0 and 1, for example 0.03"
            )
        form, _, path = self.tokenizer.partition(":")
        if self.tokenizer not in ("bytes", "k2") and not (form in ("k2", "hf") and path):
            raise ValueError(f"data.tokenizer={self.tokenizer!r}: use 'bytes', 'k2', 'k2:FILE' or 'hf:PATH'")
        _check_sources(self.sources)

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The mixture; a lone path is a mixture of one."""
        return (SourceConfig(self.source),) if isinstance(self.source, str) else self.source


@dataclass(frozen=True)
class TrainConfig:
    """Steps, evaluation, checkpoints and guards."""

    steps: int
    accumulation: int = 1  # micro-batches per step
    seed: int = 0
    loss_chunk: int = 512  # tokens of a sequence whose logits exist at once
    eval_every: int = 0  # steps; 0: only at the end
    checkpoint_every: int = 100  # steps
    checkpoints_kept: int = 2
    log_every: int = 10  # steps between printed lines and between arrays in metrics.jsonl
    max_skipped: int = 10  # non-finite steps in a row before the run stops
    sample_tokens: int = 0  # of the text generated at the end
    watchdog_seconds: float | None = None  # until a hang is told; None: 10 median steps, 300 at least; 0: never

    def __post_init__(self):
        positive("train", self, "steps", "accumulation", "loss_chunk", "log_every", "max_skipped")
        positive("train", self, "checkpoint_every", "checkpoints_kept")
        not_negative("train", self, "eval_every", "sample_tokens")
        if self.watchdog_seconds is not None:
            not_negative("train", self, "watchdog_seconds")


@dataclass(frozen=True)
class MeshConfig:
    """Size of each mesh axis; k2jax/sharding.py says what each one cuts."""

    slice: int = 1
    data: int = 1
    fsdp: int = 1
    expert: int = 1
    seq: int = 1
    tensor: int = 1

    def __post_init__(self):
        positive("mesh", self, *(field.name for field in dataclasses.fields(self)))

    @property
    def batch_shards(self) -> int:
        """Into how many parts the batch is cut: every axis but seq and tensor takes a share."""
        return math.prod(getattr(self, axis) for axis in BATCH_AXES)


@dataclass(frozen=True)
class StageConfig:
    """A part of a run with settings of its own, as the stages of the Kimi K2 report (section 2.5).

    In a config file a stage names what differs from the stage before it; here it is complete. Its schedule counts its
    own tokens.
    """

    name: str
    start: int  # steps finished before it
    accumulation: int
    model: ModelConfig
    optimizer: OptimizerConfig
    data: DataConfig


@dataclass(frozen=True)
class Stage:
    """Steps start + 1 .. stop of a run, and their settings; run.train.steps is their number."""

    name: str
    start: int
    stop: int
    run: "RunConfig"


@dataclass(frozen=True)
class RunConfig:
    """Everything that a training run is. The settings beside `stages` are those of its beginning."""

    model: ModelConfig
    optimizer: OptimizerConfig
    data: DataConfig
    train: TrainConfig
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    stages: tuple[StageConfig, ...] = ()

    def __post_init__(self):
        if self.stages:
            _check_stages(self)
            return
        micro, rest = divmod(self.data.batch_size, self.train.accumulation)
        if rest:
            raise ValueError(
                f"data.batch_size={self.data.batch_size} is not a multiple of "
                f"train.accumulation={self.train.accumulation}: change one of them"
            )
        _check_mesh(self, micro)
        planned = self.optimizer.warmup_tokens + self.optimizer.constant_tokens
        if planned > self.total_tokens:
            raise ValueError(
                f"optimizer.warmup_tokens + optimizer.constant_tokens = {planned} exceed the run's "
                f"{self.total_tokens} tokens (train.steps x data.batch_size x data.seq_len): shorten them or add steps"
            )

    @functools.cached_property
    def parts(self) -> tuple[Stage, ...]:
        """The stages in order; a run without stages is one. Raises ValueError where one of them cannot work."""
        starts = (0, *(stage.start for stage in self.stages), self.train.steps)
        first = StageConfig("start", 0, self.train.accumulation, self.model, self.optimizer, self.data)
        return tuple(
            Stage(stage.name, start, stop, _stage_run(self, stage, stop - start))
            for stage, start, stop in zip((first, *self.stages), starts, starts[1:], strict=False)
        )

    @property
    def tokens_per_step(self) -> int:
        """Of a run without stages, or of the first one."""
        return self.data.batch_size * self.data.seq_len

    @property
    def total_tokens(self) -> int:
        return self.tokens_after(self.train.steps)

    @property
    def source_paths(self) -> tuple[str, ...]:
        """Every source that a stage names, in the order of their first mention."""
        return tuple(dict.fromkeys(source.path for part in self.parts for source in part.run.data.sources))

    def tokens_after(self, step: int) -> int:
        """Tokens that the first `step` steps take."""
        if not self.stages:
            return step * self.tokens_per_step
        return sum((min(step, p.stop) - p.start) * p.run.tokens_per_step for p in self.parts if p.start < step)


def _stage_run(cfg, stage, steps):
    train = dataclasses.replace(cfg.train, steps=steps, accumulation=stage.accumulation)
    return RunConfig(stage.model, stage.optimizer, stage.data, train, cfg.mesh)


# What a stage may change of the model: how attention is computed and what is recomputed, never a parameter's shape.
_STAGE_MODEL = ("attention", "moba", "rope", "dtype", "remat")


def _check_stages(run: RunConfig):
    last = 0
    for i, stage in enumerate(run.stages):
        where = f"stages[{i}] ({stage.name!r})"
        if not last < stage.start < run.train.steps:
            raise ValueError(
                f"{where}.start={stage.start}: must lie after step {last} and before train.steps={run.train.steps}"
            )
        last = stage.start
        if [s.name for s in run.stages].count(stage.name) > 1 or stage.name == "start":
            raise ValueError(f"{where}: give every stage another name; 'start' is the run's beginning")
        for group, old, new, free in (
            ("model", run.model, stage.model, _STAGE_MODEL),
            ("optimizer", run.optimizer, stage.optimizer, None),
            ("data", run.data, stage.data, None),
        ):
            for field in dataclasses.fields(old):
                fixed = field.name not in free if free else field.name in _STAGE_FIXED[group]
                if fixed and getattr(old, field.name) != getattr(new, field.name):
                    raise ValueError(
                        f"{where}.{group}.{field.name}={getattr(new, field.name)!r}: a stage cannot change it from "
                        f"{getattr(old, field.name)!r}; start another run"
                    )
    for part in run.parts:  # each is checked as a run of its own
        if part.run.train.steps < 1:
            raise ValueError(f"stage {part.name!r} has no steps")


_STAGE_FIXED = {"optimizer": ("name",), "data": ("tokenizer", "held_out_fraction", "seed")}


def _check_sources(sources: tuple[SourceConfig, ...]):
    if not sources:
        raise ValueError("data.source=(): names no source; use a path, or a list of {'path': ..., 'weight': ...}")
    paths = [source.path for source in sources]
    for i, source in enumerate(sources):
        if not source.path:
            raise ValueError(f"data.source[{i}].path='': empty; use 'stdlib' or a path")
        if not 0 <= source.weight < math.inf:
            raise ValueError(f"data.source[{i}].weight={source.weight}: must be 0 or more")
        if source.path in paths[:i]:
            raise ValueError(f"data.source[{i}].path={source.path!r} is named twice: add up its weights")
    if not any(source.weight for source in sources):
        raise ValueError("data.source: every weight is 0; give one source a positive weight")


def _check_mesh(run: RunConfig, micro: int):
    mesh, model = run.mesh, run.model
    if micro % mesh.batch_shards:
        cut = ", ".join(f"mesh.{a}={n}" for a, n in dataclasses.asdict(mesh).items() if n > 1 and a in BATCH_AXES)
        raise ValueError(
            f"{cut} does not divide the micro-batch of {micro} sequences (data.batch_size / train.accumulation): "
            f"use a multiple of {mesh.batch_shards}"
        )
    sizes = {
        "seq": {"data.seq_len": run.data.seq_len},
        "fsdp": {"model.dim": model.dim},
        "tensor": {
            "model.dim": model.dim,
            "model.num_heads": model.num_heads,
            "model.mlp_dim": model.mlp_dim,
            "model.vocab_size": model.vocab_size,
        },
        "expert": {},
    }
    if isinstance(model.attn, GQAConfig):
        sizes["tensor"]["model.attn.num_kv_heads"] = model.attn.num_kv_heads
    else:
        sizes["fsdp"]["model.attn.kv_lora_rank"] = model.attn.kv_lora_rank
        if model.attn.q_lora_rank is not None:
            sizes["fsdp"]["model.attn.q_lora_rank"] = model.attn.q_lora_rank
    if model.num_moe_layers:
        sizes["tensor"]["model.moe.expert_dim"] = model.moe.expert_dim
        sizes["expert"]["model.moe.num_experts"] = model.moe.num_experts
    elif mesh.expert > 1:
        raise ValueError(f"mesh.expert={mesh.expert}: the model has no experts; set it to 1 and raise mesh.data")
    for axis, fields in sizes.items():
        parts = getattr(mesh, axis)
        for name, size in fields.items():
            if size % parts:
                raise ValueError(f"mesh.{axis}={parts} does not divide {name}={size}: change one of them")
    if model.dim % (mesh.tensor * mesh.fsdp):
        raise ValueError(
            f"mesh.tensor x mesh.fsdp = {mesh.tensor * mesh.fsdp} does not divide model.dim={model.dim}, over which "
            "both cut the embedding: change one of them"
        )
