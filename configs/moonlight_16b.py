r"""Moonlight-16B-A3B exactly as released: 15,960,110,208 parameters, 2,914,776,192 of them active.

Source: the released config.json, and "Muon is Scalable for LLM Training" (arXiv 2502.16982), section 3.3 and appendix
C. Its "15.29B total, 2.24B activated" leave embedding and head out: by shape that is 15,289,021,568 and 2,243,687,552,
and 2 x 163,840 x 2,048 = 671,088,640 are added to each.
Hardware: a pod; this file has never been run. It exists to be counted, compiled ahead of time and loaded.
Training here is stages 1 and 2 of the report, 5.2T tokens of 8,192: warm-up to 4.2e-4 over 33B, then a cosine to
4.2e-5. Left out: 2,048 sequences a step instead of 4,096 up to 200B tokens, and the cooldown over the last 500B.
Moonlight had no QK-Clip, hence 'muon'. Not given by the report: the balance loss, taken from config.json.
Arguments: none.
Command, which counts the parameters without allocating them:

python -m experiments.train --config=configs/moonlight_16b.py --count
"""

import ml_collections

from configs import common


def get_config(arg=None):
    common.parse_arg(arg)
    layers, seq_len, batch_size = 27, 8_192, 4_096
    model = {
        "vocab_size": 163_840,
        "dim": 2_048,
        "num_layers": layers,
        "num_dense_layers": 1,
        "num_heads": 16,
        "mlp_dim": 11_264,
        "attn": {"q_lora_rank": None, "kv_lora_rank": 512, "nope_dim": 128, "rope_dim": 64, "v_dim": 128},
        "attention": ("full",) * layers,
        "moe": {
            "num_experts": 64,
            "experts_per_token": 6,
            "expert_dim": 1_408,
            "num_shared": 2,
            "route_scale": 2.446,
        },
        "rope": {"theta": 50_000.0},
        "norm_eps": 1e-5,
        "init_std": 0.02,
        "dtype": "bfloat16",
        "remat": "full",
    }
    optimizer = {
        "name": "muon",
        "learning_rate": 4.2e-4,
        "final_learning_rate": 4.2e-5,
        "warmup_tokens": 33_000_000_000,
        "weight_decay": 0.1,
        "momentum": 0.95,
        "router_bias_rate": 1e-3,
        "balance_loss": 1e-3,
    }
    data = {"seq_len": seq_len, "batch_size": batch_size}
    train = {"steps": 5_200_000_000_000 // (seq_len * batch_size), "loss_chunk": 512, "checkpoint_every": 1_000}
    return ml_collections.ConfigDict({"model": model, "optimizer": optimizer, "data": data, "train": train})
