r"""One fixed model for one H100, so that numbers of different days and branches compare: K2's parts, 2.9B parameters.

Source: our own, in the proportions of Kimi K2 (arXiv 2507.20534, table 2): MLA with both latents, one dense layer as
wide as its nine active experts, 8 of 48 experts and one shared, K2's tokenizer. 2,899,220,080 parameters, 1,058,969,200
of them active with embedding and head, 555,652,720 without.
The route scale follows the rule that gives Moonlight its 2.446 and K2 its 2.827 (arXiv 2502.16982, figure 6): the mean
of 1 / |p| over random normal logits, p the chosen sigmoids divided by their sum. For 8 of 48 it is 2.821.
Data: text of installed Python packages, in K2's tokens.
65,536 tokens a step: four micro-batches of four sequences of 4,096. A step is 3.6e14 operations without recomputation.
The learning rate has not been searched for.
Hardware: one H100 of 80 GB, with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 in the environment, since JAX takes three quarters
of the memory by default. A step needs 60.0 GiB; --config.train.accumulation=8 less, for the same step.
Expected time: 4.40 s a step after 1:39 to compile, 2 hours 27 minutes for the 2,000 steps. That is 14,880 tokens a
second and 8.3 % of the chip's rate, all through XLA: attention takes 44 % of a step, the experts 29 %
(python -m benchmarks.h100, benchmarks/results/h100_baseline.json). Since then attention takes Hopper kernels; with them
four of these layers at 32K tokens have been timed (benchmarks/results/long_context.json), this config has not.
Expected result: after 75 steps of a schedule of 75, 5.76 nats per held-out token (of 0.4 % of the documents:
--held-out-fraction=0.004 for prepare, --config.data.held_out_fraction=0.004 for the run).
Arguments: steps.
Command:

python -m experiments.train --config=configs/h100.py:steps=100 --workdir=runs/h100
"""

import ml_collections

from configs import common


def get_config(arg=None):
    arg = common.parse_arg(arg, steps=2_000)
    layers, seq_len, batch_size = 14, 4_096, 16
    tokens = arg["steps"] * seq_len * batch_size
    model = {
        "vocab_size": 163_840,
        "dim": 1_536,
        "num_layers": layers,
        "num_dense_layers": 1,
        "num_heads": 12,
        "mlp_dim": 9 * 768,
        "attn": {"q_lora_rank": 768, "kv_lora_rank": 512, "nope_dim": 128, "rope_dim": 64, "v_dim": 128},
        "attention": ("full",) * layers,
        "moe": {"num_experts": 48, "experts_per_token": 8, "expert_dim": 768, "num_shared": 1, "route_scale": 2.821},
        "rope": {"theta": 50_000.0},
        "norm_eps": 1e-6,
        "init_std": 0.02,
        "dtype": "bfloat16",
        "remat": "full",
    }
    optimizer = {
        "name": "muonclip",
        "learning_rate": 4e-4,
        "final_learning_rate": 4e-5,
        "warmup_tokens": tokens // 20,
        "constant_tokens": tokens // 2,
        "weight_decay": 0.1,
        "tau": 100.0,
        "router_bias_rate": 1e-3,
        "balance_loss": 1e-3,
    }
    data = {"source": "packages", "tokenizer": "k2", "seq_len": seq_len, "batch_size": batch_size}
    train = {"steps": arg["steps"], "accumulation": 4, "loss_chunk": 512, "checkpoint_every": 1_000}
    return ml_collections.ConfigDict({"model": model, "optimizer": optimizer, "data": data, "train": train})
