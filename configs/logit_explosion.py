r"""Attention logits explode under Muon and are capped under MuonClip: Kimi K2's Figure 2 in small.

Source: the Kimi K2 report (arXiv 2507.20534), Figure 2 and appendix D, whose small ablation has tau = 30. The model is
ours: two layers of K2's kind, one dense and one of experts, on the Python standard library, bytes as tokens. What makes
the logits grow is a learning rate that is too high, held constant, with K2's small decay per step; nothing else is done
to them. The gap in loss between the arms belongs to these settings: K2's own ablation found none.
Expected time: 2 to 3 minutes of CPU time for each arm (measured 136 to 155 s on two busy cores).
Expected result, measured with seeds 0 to 2: Muon's largest logit reaches 630 to 1083; MuonClip's stays below 35.1, a
sixth above tau, and its held-out bits per byte are 0.10 to 0.19 lower. benchmarks/logit_explosion.py measures it.
Arguments: clip (on: MuonClip, off: Muon), steps, seed.
Commands; the third draws both runs on one page, the last compares thresholds:

python -m experiments.train --config=configs/logit_explosion.py:clip=off --workdir=runs/logits-off
python -m experiments.train --config=configs/logit_explosion.py:clip=on --workdir=runs/logits-on
python -m experiments.report --workdir=runs/logits-on,runs/logits-off
python -m experiments.sweep --config=configs/logit_explosion.py --workdir=runs/logits-sweep --jobs=2
"""

import ml_collections

from configs import common

LEARNING_RATE = 0.025
# Decay per step is learning rate x weight decay: K2's is 2e-4 x 0.1, and ours is the same 2e-5. K2's weight decay of
# 0.1 at this learning rate would take 125 times as much from the weights in a step.
WEIGHT_DECAY = 2e-5 / LEARNING_RATE


def get_config(arg=None):
    arg = common.parse_arg(arg, clip=True, steps=600, seed=0)
    seq_len, batch_size = 128, 16
    model = {
        "vocab_size": 264,
        "dim": 96,
        "num_layers": 2,
        "num_dense_layers": 1,
        "num_heads": 2,
        "mlp_dim": 256,
        "attn": {"q_lora_rank": 64, "kv_lora_rank": 64, "nope_dim": 64, "rope_dim": 32, "v_dim": 64},
        "attention": ("full", "full"),
        "moe": {"num_experts": 4, "experts_per_token": 1, "expert_dim": 128, "num_shared": 1},
        "rope": {"theta": 10_000.0},
        "init_std": 0.05,
        "dtype": "float32",
    }
    optimizer = {
        "name": "muonclip" if arg["clip"] else "muon",
        "learning_rate": LEARNING_RATE,
        "final_learning_rate": LEARNING_RATE,
        "warmup_tokens": arg["steps"] * seq_len * batch_size // 30,
        "weight_decay": WEIGHT_DECAY,
        "tau": 30.0,
        "router_bias_rate": 1e-2,
        "balance_loss": 1e-3,
        "ns_dtype": "float32",
    }
    data = {"source": "stdlib", "seq_len": seq_len, "batch_size": batch_size, "seed": arg["seed"]}
    train = {"steps": arg["steps"], "seed": arg["seed"], "log_every": 10}
    return ml_collections.ConfigDict({"model": model, "optimizer": optimizer, "data": data, "train": train})


def get_sweep(add):
    """No clipping, and three thresholds."""
    add(clip=False)
    for tau in (15.0, 30.0, 60.0):
        add(**{"optimizer.tau": tau})
