r"""A Kimi-K2-style model small enough to train on two CPU cores: MLA, experts, MoBA and MuonClip all at work.

Source: our own; the parts are those of Kimi K2 (arXiv 2507.20534) and MoBA (arXiv 2502.13189), in small.
Data: the Python standard library of the interpreter that runs it, bytes as tokens.
Expected time: three to five minutes on two CPU cores, set-up apart; see benchmarks/results/nano_cpu.json.
Expected result: about 2.0 bits per byte on whole held-out files (1.97 to 2.02 on three machines); counts of two-byte
contexts reach about 2.5.
Arguments: steps, attention (moba or full), optimizer (muonclip, muon or adamw), lr (0: the optimizer's own), batch
(sequences a step), accumulation (micro-batches a step), seed.
Commands; the second trains the six points of get_sweep, about half an hour on two cores:

python -m experiments.train --config=configs/nano.py --workdir=runs/nano
python -m experiments.sweep --config=configs/nano.py --workdir=runs/nano-sweep --jobs=2
"""

import ml_collections

from configs import common


def get_config(arg=None):
    arg = common.parse_arg(
        arg, steps=450, attention="moba", optimizer="muonclip", lr=0.0, batch=8, seed=0, accumulation=1
    )
    layers, seq_len = 4, 256
    # The best of those tried, about a factor of two apart: 0.005 to 0.04 for Muon, 0.0005 to 0.008 for AdamW.
    lr = arg["lr"] or (0.002 if arg["optimizer"] == "adamw" else 0.01)
    tokens_per_step = arg["batch"] * seq_len
    total = arg["steps"] * tokens_per_step
    model = {
        "vocab_size": 264,
        "dim": 128,
        "num_layers": layers,
        "num_dense_layers": 1,
        "num_heads": 4,
        "mlp_dim": 384,
        "attn": {"q_lora_rank": 64, "kv_lora_rank": 64, "nope_dim": 32, "rope_dim": 16, "v_dim": 32},
        "attention": common.attention_list(arg["attention"], layers, full_last=1),
        "moba": {"block_size": 32, "top_k": 3},
        "moe": {"num_experts": 8, "experts_per_token": 2, "expert_dim": 128, "num_shared": 1, "route_scale": 2.0},
        "rope": {"theta": 10_000.0},
        "init_std": 0.05,
        "dtype": "float32",
    }
    optimizer = {
        "name": arg["optimizer"],
        "learning_rate": lr,
        "final_learning_rate": lr / 20,
        "warmup_tokens": total // 30,
        "constant_tokens": total // 3,
        "weight_decay": 0.1,
        "tau": 100.0,
        "router_bias_rate": 1e-2,
        "balance_loss": 1e-3,
        "ns_dtype": "float32",
    }
    data = {"source": "stdlib", "seq_len": seq_len, "batch_size": arg["batch"], "seed": arg["seed"]}
    train = {
        "steps": arg["steps"],
        "accumulation": arg["accumulation"],
        "seed": arg["seed"],
        "eval_every": 150,
        "checkpoint_every": 100,
        "log_every": 10,
        "sample_tokens": 300,
    }
    return ml_collections.ConfigDict({"model": model, "optimizer": optimizer, "data": data, "train": train})


def get_sweep(add):
    """The default learning rate of each optimizer between half and twice of it."""
    for lr in (0.005, 0.01, 0.02):
        add(optimizer="muonclip", lr=lr)
    for lr in (0.001, 0.002, 0.004):
        add(optimizer="adamw", lr=lr)
