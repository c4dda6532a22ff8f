r"""The five models of the MoBA paper's scaling experiments, with MoBA or full attention over the same parameters.

Source: "MoBA: Mixture of Block Attention for Long-Context LLMs" (arXiv 2502.13189), table 1 and section 3.1: sizes,
heads, layers, width, tokens, block 512, top-3, sequences of 8K, and of 32K for the loss of trailing tokens. It trained
both kinds of attention with the same settings, and so does this file.
Not in the paper: the MLP. SwiGLU with 8/3 of the width, rounded up to 256, and as many key heads as query heads give
545.97M, 822.15M, 1,146.70M, 1,586.08M and 2,125.33M parameters without embedding and head, which are the table's five
names, cut off after their last digit. Learning rates and batches are those that the same laboratory gives for the
first four shapes at 8K in "Muon is Scalable for LLM Training" (arXiv 2502.16982), table 2: found for AdamW, used for
Muon unchanged. Those of 2.1b continue the row; vocabulary, rotary base, schedule and decay are ours.
Data: the paper's is not public, and the default source is far too small for these runs: name a folder of text with
--config.data.source=FOLDER.
Hardware: never run. Full attention at 8K costs 6.8e19, 1.3e20, 2.3e20, 4.0e20 and 6.9e20 operations; at an estimated
200 TFLOP/s that is 94, 182, 320, 554 and 952 hours of one H100.
Expected result: the losses of full attention and MoBA at 8K differ by about 1e-3, as in the paper's figure 3a. Its
absolute losses, 2.625 C^-0.063 with C = 6 N D in PFLOP/s-days, belong to its own data and tokenizer.
Arguments: size (545m, 822m, 1.1b, 1.5b, 2.1b), attention (moba or full), full_last (layers at the end that keep full
attention, section 3.2), context (8k or 32k), optimizer (muonclip, muon or adamw).
Commands:

python -m experiments.train --config=configs/moba_paper.py:size=545m --count
python -m experiments.train --config=configs/moba_paper.py:size=545m,attention=full --workdir=runs/moba-545m-full
"""

import ml_collections

from configs import common

# Size -> heads and layers (the same number), width, MLP, tokens, learning rate, sequences of 8K in a step.
SIZES = {
    "545m": (14, 1_792, 4_864, 10_800_000_000, 9.143e-4, 128),
    "822m": (16, 2_048, 5_632, 15_300_000_000, 8.825e-4, 160),
    "1.1b": (18, 2_304, 6_144, 20_600_000_000, 8.561e-4, 192),
    "1.5b": (20, 2_560, 6_912, 27_400_000_000, 8.305e-4, 256),
    "2.1b": (22, 2_816, 7_680, 36_900_000_000, 8.1e-4, 320),
}
CONTEXTS = {"8k": 8_192, "32k": 32_768}


def get_config(arg=None):
    arg = common.parse_arg(arg, size="545m", attention="moba", full_last=0, context="8k", optimizer="muonclip")
    for name, known in (("size", SIZES), ("context", CONTEXTS)):
        if arg[name] not in known:
            raise ValueError(f"config argument {name}={arg[name]}: use one of {', '.join(known)}")
    layers, dim, mlp_dim, tokens, learning_rate, examples = SIZES[arg["size"]]
    seq_len = CONTEXTS[arg["context"]]
    batch_size = examples * 8_192 // seq_len
    steps = tokens // (batch_size * seq_len)
    model = {
        "vocab_size": 163_840,
        "dim": dim,
        "num_layers": layers,
        "num_dense_layers": layers,
        "num_heads": layers,
        "mlp_dim": mlp_dim,
        "attn": {"num_kv_heads": layers, "head_dim": 128},
        "attention": common.attention_list(arg["attention"], layers, arg["full_last"]),
        "moba": {"block_size": 512, "top_k": 3},
        "rope": {"theta": 50_000.0},
        "norm_eps": 1e-6,
        "init_std": 0.02,
        "dtype": "bfloat16",
        "remat": "full",
    }
    optimizer = {
        "name": arg["optimizer"],
        "learning_rate": learning_rate,
        "final_learning_rate": learning_rate / 10,
        "warmup_tokens": tokens // 50,
        "weight_decay": 0.1,
    }
    data = {"seq_len": seq_len, "batch_size": batch_size}
    # Micro-batches of eight sequences of 8K, or two of 32K.
    train = {"steps": steps, "accumulation": examples // 8, "eval_every": 1_000, "checkpoint_every": 500}
    return ml_collections.ConfigDict({"model": model, "optimizer": optimizer, "data": data, "train": train})
