"""Config files to dataclasses: what is refused, with which words, and what passes unchanged."""

import dataclasses
from pathlib import Path

import ml_collections
import pytest

from configs.common import attention_list, parse_arg
from k2jax.config import (
    GQAConfig,
    MeshConfig,
    MLAConfig,
    ModelConfig,
    RunConfig,
    StageConfig,
    apply_overrides,
    config_dict,
    load_config,
    run_config,
)
from tests import tiny

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "tests" / "tiny.py")
NANO = str(ROOT / "configs" / "nano.py")


def refused(**overrides):
    """The message with which the tiny config and these overrides are refused; `__` stands for a dot."""
    with pytest.raises(ValueError, match=r"\S") as error:
        load_config(TINY, {name.replace("__", "."): value for name, value in overrides.items()})
    return str(error.value)


POSITIVE = {
    "model": ("vocab_size", "dim", "num_layers", "num_heads", "mlp_dim", "norm_eps", "init_std"),
    "model.attn": ("kv_lora_rank", "nope_dim", "rope_dim", "v_dim", "q_lora_rank"),
    "model.moba": ("block_size", "top_k"),
    "model.moe": ("num_experts", "experts_per_token", "expert_dim", "num_groups", "groups_per_token", "route_scale"),
    "model.rope": ("original_length", "beta_fast", "beta_slow"),
    "optimizer": ("learning_rate", "tau"),
    "data": ("seq_len", "batch_size"),
    "train": (
        "steps",
        "accumulation",
        "loss_chunk",
        "checkpoint_every",
        "checkpoints_kept",
        "log_every",
        "max_skipped",
    ),
    "mesh": ("slice", "data", "fsdp", "expert", "seq", "tensor"),
}
NOT_NEGATIVE = {
    "model.moe": ("num_shared",),
    "optimizer": (
        "final_learning_rate", "warmup_tokens", "constant_tokens", "weight_decay", "clip_norm", "router_bias_rate",
        "balance_loss", "z_loss",
    ),
    "data": ("seed", "prefetch"),
    "train": ("eval_every", "sample_tokens"),
}  # fmt: skip


def paths(groups):
    return [f"{group}.{field}" for group, fields in groups.items() for field in fields]


@pytest.mark.parametrize("path", paths(POSITIVE))
def test_sizes_and_rates_must_be_positive(path):
    for value in (0, -3):
        assert f"{path}={value}: must be positive" in refused(**{path: value}).replace(f"{float(value)}", f"{value}")


@pytest.mark.parametrize("path", paths(NOT_NEGATIVE))
def test_counts_and_weights_may_be_zero_but_not_negative(path):
    load_config(TINY, {path: 0})
    assert f"{path}=-1: must be 0 or more" in refused(**{path: -1}).replace("-1.0", "-1")


def test_nan_is_not_a_rate():
    assert refused(optimizer__learning_rate=float("nan")) == "optimizer.learning_rate=nan: must be positive"
    assert refused(optimizer__weight_decay=float("nan")) == "optimizer.weight_decay=nan: must be 0 or more"


HEADS = {"num_kv_heads": 3, "head_dim": 16}
CANNOT_WORK = [
    ({"model.dtype": "int8"}, "model.dtype='int8'", "'bfloat16'"),
    ({"model.remat": "dots"}, "model.remat='dots'", "'dots_saveable'"),
    ({"model.attention": ["full"] * 2}, "model.attention has 2 entries", "model.num_layers=3"),
    ({"model.attention": ["full", "mobi", "full"]}, "model.attention[1]='mobi'", "'full' or 'moba'"),
    ({"model.moba": None}, "model.moba is missing", "give block_size and top_k"),
    ({"model.moe": None}, "model.moe is missing", "num_dense_layers to num_layers"),
    ({"model.num_dense_layers": 4}, "model.num_dense_layers=4", "between 0 and model.num_layers=3"),
    ({"model.num_dense_layers": -1}, "model.num_dense_layers=-1", "between 0 and model.num_layers=3"),
    ({"model.attn.rope_dim": 15}, "model.attn.rope_dim=15", "even"),
    ({"model.attn": {"num_kv_heads": 2, "head_dim": 7}}, "model.attn.head_dim=7", "even"),
    ({"model.attn": HEADS}, "model.attn.num_kv_heads=3", "does not divide model.num_heads=2"),
    ({"model.rope.theta": 1.0}, "model.rope.theta=1.0", "must exceed 1"),
    ({"model.rope.factor": 0.5}, "model.rope.factor=0.5", "at least 1"),
    ({"model.moe.num_groups": 3}, "model.moe.num_groups=3", "num_experts=4"),
    ({"model.moe.groups_per_token": 2}, "model.moe.groups_per_token=2", "model.moe.num_groups=1"),
    ({"model.moe.experts_per_token": 5}, "model.moe.experts_per_token=5", "the 4 experts"),
    (
        {"model.moe.num_groups": 2, "model.moe.experts_per_token": 3},
        "model.moe.experts_per_token=3 exceeds the 2 experts",
        "raise groups_per_token",
    ),
    ({"model.moe.num_groups": 4, "model.moe.experts_per_token": 1}, "model.moe.num_groups=4", "two best experts"),
    ({"optimizer.name": "sgd"}, "optimizer.name='sgd'", "'muonclip'"),
    ({"optimizer.ns_dtype": "fp8"}, "optimizer.ns_dtype='fp8'", "'float32'"),
    ({"optimizer.momentum": 1.0}, "optimizer.momentum=1.0", "0.95"),
    ({"data.held_out_fraction": 1.0}, "data.held_out_fraction=1.0", "0.03"),
    ({"data.tokenizer": "bpe"}, "data.tokenizer='bpe'", "'bytes'"),
    ({"data.tokenizer": "hf:"}, "data.tokenizer='hf:'", "'hf:PATH'"),
    ({"mesh.tensor": 4}, "mesh.tensor=4 does not divide model.num_heads=2", "change one"),
    ({"mesh.seq": 3}, "mesh.seq=3 does not divide data.seq_len=32", "change one"),
    (
        {"mesh.fsdp": 2, "model.attn.kv_lora_rank": 15},
        "mesh.fsdp=2 does not divide model.attn.kv_lora_rank=15",
        "change",
    ),
    ({"mesh.expert": 4, "mesh.data": 2}, "mesh.data=2, mesh.expert=4 does not divide", "use a multiple of 8"),
    ({"mesh.expert": 2, "model.num_dense_layers": 3}, "mesh.expert=2: the model has no experts", "raise mesh.data"),
    ({"model.moe.dispatch": "all"}, "model.moe.dispatch='all'", "'gather', 'local'"),
    ({"train.accumulation": 3}, "train.accumulation=3", "data.batch_size=4"),
    ({"mesh.data": 3}, "mesh.data=3", "use a multiple of 3"),
    ({"train.accumulation": 2, "mesh.data": 4}, "mesh.data=4 does not divide the micro-batch of 2", "multiple of 4"),
    ({"optimizer.warmup_tokens": 10**9}, "optimizer.warmup_tokens", "shorten them"),
]


@pytest.mark.parametrize(("overrides", "names", "fix"), CANNOT_WORK)
def test_what_cannot_work_is_refused_with_field_value_and_fix(overrides, names, fix):
    message = refused(**overrides)
    assert names in message
    assert fix in message


WRONG_TYPES = [
    ("model.dim", 1.5, "expected int, got float"),
    ("model.dim", True, "expected int, got bool"),
    ("model.dim", None, "expected int, got NoneType"),
    ("model.dim", {}, "expected int, got dict"),
    ("model.dtype", 32, "expected str, got int"),
    ("optimizer.learning_rate", "0.1", "expected float, got str"),
    ("optimizer.nesterov", 1, "expected bool, got int"),
    ("model.attention", "full", "expected tuple[str, ...], got str"),
    ("model.attention", ["full", 2, "full"], "config.model.attention[1]=2: expected str, got int"),
    ("model.attn", None, "expected MLAConfig or GQAConfig, got NoneType"),
    ("model.attn.q_lora_rank", "big", "expected int or NoneType, got str"),
    ("model.rope", 10_000.0, "expected RopeConfig, got float"),
    ("train", 7, "expected TrainConfig, got int"),
]


@pytest.mark.parametrize(("path", "value", "message"), WRONG_TYPES)
def test_a_value_of_another_type_is_refused(path, value, message):
    text = refused(**{path: value})
    assert f"config.{path}" in text
    assert message in text


def test_an_int_is_a_float_a_list_is_a_tuple_and_none_is_an_option():
    changes = {
        "optimizer.learning_rate": 1,
        "model.attention": ["full", "moba", "full"],
        "model.attn.q_lora_rank": None,
    }
    cfg = load_config(TINY, changes)
    assert type(cfg.optimizer.learning_rate) is float
    assert cfg.model.attention == ("full", "moba", "full")
    assert cfg.model.attn.q_lora_rank is None
    hash(cfg)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("optimizer.learning_rat", "OptimizerConfig has no field 'learning_rat'; did you mean 'learning_rate'?"),
        ("optimzer.tau", "RunConfig has no field 'optimzer'; did you mean 'optimizer'?"),
        ("model.moe.experts", "MoEConfig has no field 'experts'"),
        ("train.zzz", "TrainConfig has no field 'zzz'; known: accumulation, checkpoint_every"),
        ("model.attn.head_dim", "MLAConfig has no field 'head_dim'"),
        ("model.dim.x", "config.model.dim=32 has no fields; set --config.model.dim instead"),
    ],
)
def test_an_unknown_field_is_refused_with_the_closest_name(path, message):
    assert message in refused(**{path: 1})


def test_a_missing_field_is_named():
    tree = config_dict(TINY).to_dict()
    del tree["model"]["dim"]
    with pytest.raises(ValueError, match=r"config\.model\.dim is missing: ModelConfig needs it"):
        run_config(tree)
    with pytest.raises(ValueError, match=r"config=7: expected the fields of RunConfig"):
        run_config(7)


def test_the_fields_choose_between_latent_and_grouped_attention():
    assert isinstance(load_config(TINY).model.attn, MLAConfig)
    grouped = {"model.attn": {"num_kv_heads": 2, "head_dim": 16}}
    assert load_config(TINY, grouped).model.attn == GQAConfig(num_kv_heads=2, head_dim=16)
    assert "GQAConfig has no field 'head_dm'; did you mean 'head_dim'?" in refused(
        model__attn={"num_kv_heads": 2, "head_dm": 16}
    )


def test_overrides_reach_fields_that_the_file_leaves_at_their_default():
    cfg = load_config(NANO, {"mesh.data": 2, "model.remat": "full", "optimizer.nesterov": True, "model.dim": 64})
    assert (cfg.mesh.data, cfg.model.remat, cfg.optimizer.nesterov, cfg.model.dim) == (2, "full", True, 64)
    locked = config_dict(NANO).lock()
    assert run_config(apply_overrides(locked, {"mesh.data": 2})).mesh == MeshConfig(data=2)
    assert locked.is_locked


def test_a_config_survives_the_way_through_dicts():
    cfg = load_config(TINY, {"mesh.data": 2})
    tree = dataclasses.asdict(cfg)
    assert run_config(tree) == cfg
    assert run_config(ml_collections.ConfigDict(tree)) == cfg
    assert run_config(ml_collections.FrozenConfigDict(tree)) == cfg
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.model.dim = 3


def test_tokens_of_a_step_and_of_the_run():
    cfg = load_config(f"{TINY}:steps=7,batch=8,accumulation=2")
    assert cfg.tokens_per_step == 8 * 32
    assert cfg.total_tokens == 7 * 8 * 32


def test_a_file_that_does_not_exist_is_named():
    with pytest.raises(FileNotFoundError, match=r"configs/nanno\.py.*clone's root"):
        load_config("configs/nanno.py:steps=3")


def test_arguments_take_the_type_of_their_default():
    assert parse_arg(None, steps=5, on=False) == {"steps": 5, "on": False}
    assert parse_arg("steps=7,lr=1e-3,name=a,on", steps=5, lr=0.1, name="b", on=False) == {
        "steps": 7,
        "lr": 1e-3,
        "name": "a",
        "on": True,
    }
    assert parse_arg("on=off", on=True) == {"on": False}


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("stps=7", "'stps=7': no argument is named 'stps'; did you mean 'steps'?"),
        ("zzz=7", "known: on, steps"),
        ("steps=x", "steps=x: expected a value of type int, like 5"),
        ("steps", "expected a value of type int"),
        ("on=maybe", "on=maybe: use on or off"),
    ],
)
def test_a_wrong_argument_is_refused_with_what_exists(arg, message):
    with pytest.raises(ValueError, match=r"config argument") as error:
        parse_arg(arg, steps=5, on=False)
    assert message in str(error.value)


def test_the_last_layers_of_an_attention_list_are_full():
    assert attention_list("moba", 4, full_last=1) == ("moba", "moba", "moba", "full")
    assert attention_list("full", 2, full_last=1) == ("full", "full")
    with pytest.raises(ValueError, match="attention=sparse: use full or moba"):
        attention_list("sparse", 4, full_last=1)


def test_the_package_knows_no_config_dict():
    """config.py reads one through its methods; everything below gets frozen dataclasses."""
    importing = [p for p in (ROOT / "k2jax").rglob("*.py") if "import ml_collections" in p.read_text(encoding="utf-8")]
    assert importing == []
    nested = [f.type for f in dataclasses.fields(RunConfig) if f.name != "stages"] + [StageConfig]
    assert all(dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen for cls in (*nested, ModelConfig))


# --- mixtures -----------------------------------------------------------------------------------------------------


def test_a_source_is_a_path_or_a_mixture_of_paths_with_weights():
    assert [(s.path, s.weight) for s in tiny.config("text").data.sources] == [("text", 1.0)]
    mixed = tiny.config(overrides={"data.source": [{"path": "a", "weight": 3}, {"path": "b"}]})
    assert [(s.path, s.weight) for s in mixed.data.sources] == [("a", 3.0), ("b", 1.0)]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], r"data\.source=\(\): names no source"),
        ([{"path": ""}], r"data\.source\[0\]\.path='': empty"),
        ([{"path": "a"}, {"path": "b", "weight": -1}], r"data\.source\[1\]\.weight=-1\.0: must be 0 or more"),
        ([{"path": "a", "weight": float("inf")}], r"data\.source\[0\]\.weight=inf: must be 0 or more"),
        ([{"path": "a", "weight": 0}], "every weight is 0; give one source a positive weight"),
        ([{"path": "a"}, {"path": "b"}, {"path": "a"}], r"data\.source\[2\]\.path='a' is named twice"),
        ([{"path": "a", "wieght": 1}], "SourceConfig has no field 'wieght'; did you mean 'weight'"),
        ([{"weight": 1}], r"source\[0\]\.path is missing"),
        (3, "expected str or tuple"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        tiny.config(overrides={"data.source": source})
