r"""nano's bigger sibling for a free T4 of Colab: MLA, experts, MoBA and MuonClip, about ten minutes.

Source: our own; the parts are those of Kimi K2 (arXiv 2507.20534) and MoBA (arXiv 2502.13189), in small. The route
scale is the rule's for 4 of 16 experts (arXiv 2502.16982, figure 6): 1.991.
Data: the Python standard library of the interpreter that runs it, bytes as tokens.
float32 throughout, on XLA's own kernels: a T4 has no bfloat16 units, and float16 would need a loss scale, which the
training step does not have.
Hardware: one T4. It has never been run there. Estimated about ten minutes for 1,000 steps of 16,384 tokens: 9.4e11
operations a step with Newton-Schulz, at 1.6 of the T4's 8 TFLOP/s.
Expected result: below nano's 2.0 bits per byte on whole held-out files; not measured.
Arguments: steps, attention (moba or full).
Command:

python -m experiments.train --config=configs/colab.py --workdir=runs/colab
"""

import ml_collections

from configs import common


def get_config(arg=None):
    arg = common.parse_arg(arg, steps=1_000, attention="moba")
    layers, seq_len, batch_size = 6, 512, 32
    tokens = arg["steps"] * seq_len * batch_size
    model = {
        "vocab_size": 264,
        "dim": 256,
        "num_layers": layers,
        "num_dense_layers": 1,
        "num_heads": 4,
        "mlp_dim": 1_280,
        "attn": {"q_lora_rank": 128, "kv_lora_rank": 128, "nope_dim": 64, "rope_dim": 32, "v_dim": 64},
        "attention": common.attention_list(arg["attention"], layers, full_last=1),
        "moba": {"block_size": 64, "top_k": 3},
        "moe": {"num_experts": 16, "experts_per_token": 4, "expert_dim": 256, "num_shared": 1, "route_scale": 1.991},
        "rope": {"theta": 10_000.0},
        "init_std": 0.05,
        "dtype": "float32",
    }
    optimizer = {
        "name": "muonclip",
        "learning_rate": 0.005,
        "final_learning_rate": 0.00025,
        "warmup_tokens": tokens // 30,
        "constant_tokens": tokens // 3,
        "weight_decay": 0.1,
        "tau": 100.0,
        "router_bias_rate": 1e-2,
        "balance_loss": 1e-3,
        "ns_dtype": "float32",
    }
    data = {"source": "stdlib", "seq_len": seq_len, "batch_size": batch_size}
    train = {
        "steps": arg["steps"],
        "accumulation": 4,  # 3 GB beside the parameters instead of 9 in two micro-batches
        "eval_every": 250,
        "checkpoint_every": 250,
        "log_every": 10,
        "sample_tokens": 300,
    }
    return ml_collections.ConfigDict({"model": model, "optimizer": optimizer, "data": data, "train": train})
