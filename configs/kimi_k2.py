r"""Kimi K2 exactly as released: 1,026,408,232,448 parameters, 32.86B active.

Source: Kimi K2 report (arXiv 2507.20534), tables 2 and 4 and section 2.5, and the released config.json. The report
states "1.04T"; that figure counts the one dense layer as a layer of experts.
Hardware: a pod; this file has never been run. It exists to be counted, compiled ahead of time and loaded.
Arguments: yarn=off for the 4K pre-training form (softmax scale 192^-0.5), on for the released 128K form.
Not given by the report, filled in from Moonlight (arXiv 2502.16982): momentum, bias rate; balance loss from the
released config's aux_loss_alpha.
Command, which counts the parameters without allocating them:

python -m experiments.train --config=configs/kimi_k2.py --count
"""

import ml_collections

from configs import common


def get_config(arg=None):
    arg = common.parse_arg(arg, yarn=True)
    layers, tokens_per_step = 61, 16_384 * 4_096
    model = {
        "vocab_size": 163_840,
        "dim": 7_168,
        "num_layers": layers,
        "num_dense_layers": 1,
        "num_heads": 64,
        "mlp_dim": 18_432,
        "attn": {"q_lora_rank": 1_536, "kv_lora_rank": 512, "nope_dim": 128, "rope_dim": 64, "v_dim": 128},
        "attention": ("full",) * layers,
        "moe": {
            "num_experts": 384,
            "experts_per_token": 8,
            "expert_dim": 2_048,
            "num_shared": 1,
            "route_scale": 2.827,
        },
        "rope": {"theta": 50_000.0, "factor": 32.0 if arg["yarn"] else 1.0, "original_length": 4_096},
        "norm_eps": 1e-6,
        "init_std": 0.02,
        "dtype": "bfloat16",
        "remat": "full",
    }
    optimizer = {
        "name": "muonclip",
        "learning_rate": 2e-4,
        "final_learning_rate": 2e-5,
        "warmup_tokens": 500 * tokens_per_step,
        "constant_tokens": 10_000_000_000_000,
        "weight_decay": 0.1,
        "momentum": 0.95,
        "tau": 100.0,
        "router_bias_rate": 1e-3,
        "balance_loss": 1e-3,
    }
    data = {"seq_len": 4_096, "batch_size": 16_384}
    train = {"steps": 230_968, "loss_chunk": 512, "checkpoint_every": 1_000}
    return ml_collections.ConfigDict({"model": model, "optimizer": optimizer, "data": data, "train": train})
