r"""From short full attention to long MoBA in one run: 4K tokens full, then 16K tokens MoBA with YaRN.

Source: our own, in small; the stages of Kimi K2 (arXiv 2507.20534, section 2.5) and the switch from full attention to
MoBA of the MoBA paper (arXiv 2502.13189, section 3.2), whose last layers stay full.
Data: the Python standard library of the interpreter that runs it, bytes as tokens.
Expected time: minutes on two CPU cores. Expected result: the loss goes on through the switch;
benchmarks/results/stage_switch.json compares it with switch=off.
Arguments: steps, at (steps before the switch), switch (off: 4K to the end, for the same number of tokens), seed.
Command:

python -m experiments.train --config=configs/long_context.py --workdir=runs/long_context
"""

import ml_collections

from configs import common

SHORT, LONG = 4_096, 16_384


def get_config(arg=None):
    arg = common.parse_arg(arg, steps=230, at=200, switch=True, seed=0)
    layers = 2
    rate = 0.01
    before, after = arg["at"] * SHORT, (arg["steps"] - arg["at"]) * LONG
    steps = arg["steps"] if arg["switch"] else (before + after) // SHORT
    model = {
        "vocab_size": 264,
        "dim": 64,
        "num_layers": layers,
        "num_dense_layers": 1,
        "num_heads": 2,
        "mlp_dim": 192,
        "attn": {"q_lora_rank": 32, "kv_lora_rank": 32, "nope_dim": 32, "rope_dim": 16, "v_dim": 32},
        "attention": ("full",) * layers,
        "moba": {"block_size": 512, "top_k": 3},
        "moe": {"num_experts": 8, "experts_per_token": 2, "expert_dim": 64, "num_shared": 1, "route_scale": 2.0},
        "rope": {"theta": 10_000.0, "original_length": SHORT},
        "init_std": 0.05,
        "dtype": "float32",
        "remat": "full",
    }
    optimizer = {
        "name": "muonclip",
        "learning_rate": rate,
        "final_learning_rate": rate,
        "warmup_tokens": before // 20,
        "constant_tokens": (before if arg["switch"] else before + after) - before // 20,
        "weight_decay": 0.1,
        "router_bias_rate": 1e-2,
        "balance_loss": 1e-3,
        "ns_dtype": "float32",
    }
    data = {"source": "stdlib", "seq_len": SHORT, "batch_size": 1, "seed": arg["seed"]}
    train = {
        "steps": steps,
        "seed": arg["seed"],
        "checkpoint_every": arg["at"],
        "eval_every": 10 if arg["switch"] else 10 * LONG // SHORT,  # after the switch, at the same tokens
        "log_every": 10,
        "loss_chunk": 1024,
    }
    switch = {
        "name": "16K MoBA",
        "start": arg["at"],
        "model": {"attention": common.attention_list("moba", layers, full_last=1), "rope": {"factor": LONG / SHORT}},
        "data": {"seq_len": LONG},
        "optimizer": {"warmup_tokens": 0, "constant_tokens": after},
    }
    stages = [ml_collections.ConfigDict(switch)] if arg["switch"] else []
    return ml_collections.ConfigDict(
        {"model": model, "optimizer": optimizer, "data": data, "train": train, "stages": stages}
    )
