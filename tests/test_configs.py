"""Every file of configs/: it loads, for every argument it takes, and says what a reader needs."""

from pathlib import Path

import ml_collections
import numpy as np
import pytest

from configs import common
from k2jax.config import RunConfig, config_dict, load_config, load_config_module, run_config
from k2jax.model import count_params

FOLDER = Path(__file__).parent.parent / "configs"
FILES = sorted(path for path in FOLDER.glob("*.py") if path.stem not in ("__init__", "common"))
EACH = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)

# Words that no default shows.
WORDS = {
    "attention": ("moba", "full"),
    "optimizer": ("muonclip", "muon", "adamw"),
    "size": ("545m", "822m", "1.1b", "1.5b", "2.1b"),
    "context": ("8k", "32k"),
    "scale": ("small", "medium"),
}


def arguments(path, monkeypatch):
    """The arguments of a config file with their defaults, as it gives them to parse_arg."""
    seen = {}
    parse = common.parse_arg

    def record(arg, **defaults):
        seen.update(defaults)
        return parse(arg, **defaults)

    with monkeypatch.context() as patch:
        patch.setattr(common, "parse_arg", record)
        load_config(str(path))
    return seen


def other_values(name, default):
    if name in WORDS:
        return WORDS[name]
    if isinstance(default, bool):
        return ("on", "off")
    return (default,) if isinstance(default, str) else (default, default + 1)


def test_there_are_configs():
    assert {"nano", "kimi_k2"} <= {path.stem for path in FILES}


@EACH
def test_it_loads_for_every_argument_it_takes(path, monkeypatch):
    assert isinstance(load_config(str(path)), RunConfig)
    for name, default in arguments(path, monkeypatch).items():
        configs = [load_config(f"{path}:{name}={value}") for value in other_values(name, default)]
        if len(configs) > 1 and name != "accumulation":
            assert len(set(configs)) > 1, f"{name} changes nothing"


@EACH
def test_it_returns_a_config_dict_of_its_own(path):
    module, arg = load_config_module(f"{path}:")
    config = module.get_config(arg)
    assert isinstance(config, ml_collections.ConfigDict)
    config.model.dim = 1
    assert module.get_config(arg).model.dim != 1


@EACH
def test_an_unknown_argument_is_refused(path):
    with pytest.raises(ValueError, match="config argument 'nonesuch=3': no argument is named 'nonesuch'"):
        load_config(f"{path}:nonesuch=3")


@EACH
def test_its_docstring_gives_source_arguments_and_command(path, monkeypatch):
    text = load_config_module(str(path))[0].__doc__
    for word in ("Source", "Command", "Arguments", f"python -m experiments.train --config=configs/{path.name}"):
        assert word in text, f"{path.name} says no {word!r}"
    for name in arguments(path, monkeypatch):
        assert name in text.partition("Arguments")[2], f"{path.name} does not document its argument {name!r}"


@EACH
def test_its_docstring_gives_time_or_hardware_and_what_to_expect(path):
    text = load_config_module(str(path))[0].__doc__.lower()
    assert any(word in text for word in ("minutes", "hours", "hardware")), f"{path.name} names no time or hardware"
    assert any(word in text for word in ("result", "expect", "exists to be")), f"{path.name} names no result"


# --- what single files promise --------------------------------------------------------------------------------------


def model_of(name):
    """The model of a config file, also where its data source needs more than the tests have."""
    config = config_dict(str(FOLDER / f"{name}.py"))
    config.data.update(source="stdlib", tokenizer="bytes")
    return run_config(config).model


def test_moonlight_has_the_published_counts():
    """15.29B and 2.24B activated are without embedding and head (arXiv 2502.16982, table 5)."""
    counts = count_params(model_of("moonlight_16b"))
    assert counts.total == 15_960_110_208
    assert counts.total - 2 * counts.embedding == 15_289_021_568
    assert counts.active - 2 * counts.embedding == 2_243_687_552


@pytest.mark.parametrize(
    ("size", "layers", "width", "tokens", "published"),
    [
        ("545m", 14, 1792, 10.8e9, 545e6),
        ("822m", 16, 2048, 15.3e9, 822e6),
        ("1.1b", 18, 2304, 20.6e9, 1.1e9),
        ("1.5b", 20, 2560, 27.4e9, 1.5e9),
        ("2.1b", 22, 2816, 36.9e9, 2.1e9),
    ],
)
def test_moba_models_are_those_of_the_papers_table_1(size, layers, width, tokens, published):
    cfg = load_config(f"{FOLDER / 'moba_paper.py'}:size={size}")
    model = cfg.model
    assert (model.num_layers, model.num_heads, model.dim) == (layers, layers, width)
    assert (model.num_heads * model.attn.head_dim, model.moba.block_size, model.moba.top_k) == (width, 512, 3)
    assert tokens - cfg.tokens_per_step < cfg.total_tokens <= tokens
    counts = count_params(model)
    digit = 1e6 if published < 1e9 else 1e8
    assert published <= counts.total - 2 * counts.embedding < published + digit


def test_moba_models_keep_tokens_and_parameters_whatever_the_attention_and_the_context():
    path = FOLDER / "moba_paper.py"
    short = load_config(f"{path}:size=1.5b")
    long = load_config(f"{path}:size=1.5b,context=32k,attention=full")
    assert (short.data.seq_len, long.data.seq_len) == (8_192, 32_768)
    assert short.tokens_per_step == long.tokens_per_step
    assert count_params(short.model) == count_params(long.model)
    assert load_config(f"{path}:full_last=3").model.attention == ("moba",) * 11 + ("full",) * 3
    with pytest.raises(ValueError, match="size=568m: use one of 545m, 822m"):
        load_config(f"{path}:size=568m")


def test_the_h100_model_is_the_fixed_one():
    config = config_dict(str(FOLDER / "h100.py"))
    assert (config.data.source, config.data.tokenizer, config.train.accumulation) == ("packages", "k2", 4)
    assert config.data.seq_len * config.data.batch_size == 65_536
    model = model_of("h100")
    assert model.mlp_dim == (model.moe.experts_per_token + model.moe.num_shared) * model.moe.expert_dim == 6_912
    counts = count_params(model)
    assert (counts.total, counts.active) == (2_899_220_080, 1_058_969_200)


@pytest.mark.parametrize("name", ["kimi_k2", "moonlight_16b", "h100", "colab"])
def test_the_route_scale_follows_moonlights_rule(name):
    """The mean of 1 / |p| for chosen sigmoids of normal logits that are divided by their sum (its figure 6)."""
    moe = model_of(name).moe
    logits = np.random.default_rng(0).standard_normal((4_000, moe.num_experts))
    chosen = 1 / (1 + np.exp(-np.sort(logits, axis=-1)[:, -moe.experts_per_token :]))
    shares = chosen / chosen.sum(axis=-1, keepdims=True)
    assert moe.route_scale == pytest.approx(np.mean(1 / np.linalg.norm(shares, axis=-1)), rel=1e-3)
