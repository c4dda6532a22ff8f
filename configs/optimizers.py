r"""Muon, MuonClip and AdamW at equal tokens, on a model in K2's proportions that trains within a minute on a GPU.

Source: our own; the question of Moonlight's figures 2 and 3 (arXiv 2502.16982): how many of AdamW's tokens does Muon
save, with the learning rate of each tuned by the same number of trials.
Data: text of the installed packages in a BPE of 16,384 ids, prepared first:

python -m experiments.prepare --source=packages --train-tokenizer=16384 --out=data/bpe

Hardware and time: a run of 500 steps takes one to four minutes on an H100 that three share, and one to compile.
Expected result, held-out bits per byte of MuonClip (rate 0.004) and AdamW (rate 0.001): 1.089 and 1.311 (small), 1.092
and 1.264 (medium); MuonClip at 350 steps is better than AdamW at 500: benchmarks/results/optimizers.json.
Arguments: optimizer (muonclip, muon, adamw), lr, scale (small, medium), steps, seed, data (folder of the shards).
All points of get_sweep: python -m experiments.sweep --config=configs/optimizers.py --workdir=runs/optimizers --jobs=6
Command:

python -m experiments.train --config=configs/optimizers.py --workdir=runs/muonclip
"""

import ml_collections

from configs import common

# layers, width, heads, experts, width of an expert
SCALES = {"small": (6, 384, 6, 16, 192), "medium": (9, 512, 8, 24, 256)}


def get_config(arg=None):
    arg = common.parse_arg(arg, optimizer="muonclip", lr=0.0, scale="small", steps=500, seed=0, data="data/bpe")
    if arg["scale"] not in SCALES:
        raise ValueError(f"scale={arg['scale']!r}: use one of {sorted(SCALES)}")
    layers, dim, heads, experts, expert_dim = SCALES[arg["scale"]]
    seq_len, batch_size = 1_024, 32
    lr = arg["lr"] or (0.002 if arg["optimizer"] == "adamw" else 0.004)
    total = arg["steps"] * seq_len * batch_size
    model = {
        "vocab_size": 16_384,
        "dim": dim,
        "num_layers": layers,
        "num_dense_layers": 1,
        "num_heads": heads,
        "mlp_dim": 5 * expert_dim,
        "attn": {"q_lora_rank": dim // 2, "kv_lora_rank": dim // 4, "nope_dim": 64, "rope_dim": 32, "v_dim": 64},
        "attention": ("full",) * layers,
        "moe": {
            "num_experts": experts,
            "experts_per_token": 4,
            "expert_dim": expert_dim,
            "num_shared": 1,
            "route_scale": 2.0,
        },
        "rope": {"theta": 10_000.0},
        "init_std": 0.02,
        "dtype": "bfloat16",
        "remat": "full",
    }
    optimizer = {
        "name": arg["optimizer"],
        "learning_rate": lr,
        "final_learning_rate": lr / 20,
        "warmup_tokens": total // 25,
        "constant_tokens": total // 3,
        "weight_decay": 0.1,
        "tau": 100.0,
        "router_bias_rate": 1e-3,
        "balance_loss": 1e-3,
    }
    data = {"source": arg["data"], "tokenizer": f"hf:{arg['data']}/tokenizer", "seq_len": seq_len, "seed": arg["seed"]}
    data["batch_size"] = batch_size
    train = {"steps": arg["steps"], "seed": arg["seed"], "checkpoint_every": 10_000, "log_every": 50}
    return ml_collections.ConfigDict({"model": model, "optimizer": optimizer, "data": data, "train": train})


def get_sweep(add):
    """Rates about a factor of two apart, as many for Muon as for AdamW; then Muon's best on fewer tokens.

    The shorter runs tell how many of AdamW's tokens Muon needs for AdamW's loss.
    """
    for scale in ("medium", "small"):  # The long ones first.
        for lr in (0.002, 0.004, 0.008):
            add(scale=scale, optimizer="muonclip", lr=lr, steps=500)
        for lr in (0.0005, 0.001, 0.002):
            add(scale=scale, optimizer="adamw", lr=lr, steps=500)
    add(scale="small", optimizer="muon", lr=0.004, steps=500)
    for scale in ("medium", "small"):
        for steps in (350, 300, 250, 200):
            add(scale=scale, optimizer="muonclip", lr=0.004, steps=steps)
