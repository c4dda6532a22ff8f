r"""The smallest run that has every part: a dense and two expert layers, one of them MoBA. Shared by the tests.

It is a config file as well, so that tests of whole processes run the same thing:

python -m experiments.train --config=tests/tiny.py:source=FOLDER,steps=6 --workdir=...
"""

from pathlib import Path

import ml_collections

from configs import common
from k2jax.config import RunConfig, apply_overrides, run_config

WORDS = [
    "the",
    "clip",
    "of",
    "a",
    "head",
    "keeps",
    "its",
    "logit",
    "low",
    "while",
    "every",
    "block",
    "finds",
    "an",
    "expert",
]


def get_config(arg=None):
    arg = common.parse_arg(
        arg, source="stdlib", steps=6, optimizer="muonclip", batch=4, accumulation=1, data=1, every=2, seed=0
    )
    model = {
        "vocab_size": 264,
        "dim": 32,
        "num_layers": 3,
        "num_dense_layers": 1,
        "num_heads": 2,
        "mlp_dim": 64,
        "attn": {"q_lora_rank": 16, "kv_lora_rank": 16, "nope_dim": 8, "rope_dim": 4, "v_dim": 8},
        "attention": ("full", "moba", "full"),
        "moba": {"block_size": 8, "top_k": 2},
        "moe": {"num_experts": 4, "experts_per_token": 2, "expert_dim": 32, "num_shared": 1, "route_scale": 2.0},
        "rope": {"theta": 10_000.0},
        "init_std": 0.1,
        "dtype": "float32",
    }
    optimizer = {
        "name": arg["optimizer"],
        "learning_rate": 0.02,
        "final_learning_rate": 0.002,
        "warmup_tokens": 128,
        "constant_tokens": 256,
        "weight_decay": 0.1,
        "momentum": 0.9,
        "nesterov": False,
        "tau": 100.0,
        "clip_norm": 1.0,
        "router_bias_rate": 1e-2,
        "balance_loss": 1e-3,
        "ns_dtype": "float32",
    }
    data = {
        "source": arg["source"],
        "tokenizer": "bytes",
        "seq_len": 32,
        "batch_size": arg["batch"],
        "held_out_fraction": 0.3,
        "seed": arg["seed"],
        "prefetch": 2,
    }
    train = {
        "steps": arg["steps"],
        "accumulation": arg["accumulation"],
        "seed": arg["seed"],
        "loss_chunk": 16,
        "eval_every": 2 * arg["every"],
        "checkpoint_every": arg["every"],
        "checkpoints_kept": 2,
        "log_every": 2,
        "max_skipped": 3,
        "sample_tokens": 0,
    }
    mesh = {"data": arg["data"]}
    groups = {"model": model, "optimizer": optimizer, "data": data, "train": train, "mesh": mesh}
    return ml_collections.ConfigDict(groups)


def config(source: Path | str = "stdlib", overrides: dict | None = None, **arg) -> RunConfig:
    """The RunConfig of get_config with these arguments and overrides by dotted path."""
    text = ",".join(f"{name}={value}" for name, value in {"source": source, **arg}.items())
    return run_config(apply_overrides(get_config(text), overrides or {}))


def write_text(folder: Path, files: int = 12, lines: int = 8) -> Path:
    """Fills `folder` with text files, the same ones every time, and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    for f in range(files):
        rows = (" ".join(WORDS[(f * 7 + row * 5 + i * i) % len(WORDS)] for i in range(8)) for row in range(lines))
        (folder / f"page{f:02}.txt").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder
