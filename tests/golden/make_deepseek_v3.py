"""Writes tests/golden/deepseek_v3_*.npz: what Hugging Face's DeepSeek-V3, the class that K2 names, makes of cases.py.

Runs in an environment of its own, in which k2jax is not installed; the files in the tree were made with

    Python 3.11.7, torch 2.13.0 (CPU), transformers 5.23.0, numpy 2.4.6

From the repository's root, with that environment's Python (10 seconds on one core):

    pip install torch==2.13.0 transformers==5.23.0
    python -m tests.golden.make_deepseek_v3

The weights go through transformers' own loading of a released checkpoint, so it is its code that joins an expert's
gate and up matrices. Everything is float32 with eager attention and eager experts.

transformers masks the groups that a token does not see with -inf. Until transformers#45440 was mended it filled them
with 0.0, which wins against negative choices; the script refuses such a version, and no patch is applied.

Each file holds, for B sequences of T tokens, at the positions `cases.KEPT` of T where a state is meant:
tokens [B, T], logits [B, T, V], experts [M, B, T, J] in ascending order,
hidden [L + 1, B, t, D] (the input of every layer, and last the final states after the last norm),
attention and mlp [L, B, t, D] (what each layer adds to the residual stream),
and for one case loss and gradient: all gradients, flat, in the order of `cases.shapes`.
"""

import platform
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from tests.golden import cases

FOLDER = Path(__file__).parent
# float32 keeps about 1e-7: a choice that is clear by this much is the same in every implementation.
MARGIN = 2e-5


def load(case: str) -> DeepseekV3ForCausalLM:
    """The model of a case, from a checkpoint with the released names."""
    weights = {name: torch.from_numpy(value) for name, value in cases.weights(case).items()}
    with tempfile.TemporaryDirectory() as folder:
        DeepseekV3Config(**cases.CASES[case]).save_pretrained(folder)
        save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        model, info = DeepseekV3ForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
        )
    assert not any(info.values()), info
    assert (model.config._attn_implementation, model.config._experts_implementation) == ("eager", "eager")
    assert model.config.rope_interleave
    return model.eval()


def record(model):
    """{kind: [output of each layer]}, filled by hooks when the model runs."""
    seen = {"attention": [], "mlp": [], "experts": [], "router_inputs": []}
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda module, args, out: seen["attention"].append(out[0]))
        layer.mlp.register_forward_hook(lambda module, args, out: seen["mlp"].append(out))
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(lambda module, args, out: seen["experts"].append(out[2]))
            layer.mlp.gate.register_forward_pre_hook(lambda module, args: seen["router_inputs"].append(args[0]))
    return seen


def check_routing(case, model, seen):
    """The case must be one that tells implementations apart, and no choice in it may hang by a rounding."""
    config = cases.CASES[case]
    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    per_token, groups = config["num_experts_per_tok"], config["n_group"]
    unbiased, zero_filled = 0.0, 0.0
    for gate, x, ids in zip(gates, seen["router_inputs"], seen["experts"], strict=True):
        scores = torch.sigmoid(x.double().view(-1, x.shape[-1]) @ gate.weight.double().T)
        choice = scores + gate.e_score_correction_bias.double()
        best = choice.view(len(choice), groups, -1).topk(2).values.sum(-1).sort(descending=True)
        if groups > 1:
            kept = config["topk_group"]
            assert (best.values[:, kept - 1] - best.values[:, kept]).min() > MARGIN
        mask = torch.zeros_like(best.values).scatter(1, best.indices[:, : config["topk_group"]], 1.0).bool()
        mask = mask.repeat_interleave(choice.shape[1] // groups, dim=1)
        ranked = choice.masked_fill(~mask, -torch.inf).sort(descending=True)
        assert (ranked.values[:, per_token - 1] - ranked.values[:, per_token]).min() > MARGIN
        mine = ranked.indices[:, :per_token].sort().values
        assert torch.equal(mine, ids.sort().values), "masked groups are not filled with -inf (transformers#45440)?"
        unbiased += (scores.topk(per_token).indices.sort().values != mine).any(-1).double().mean().item()
        filled = choice.masked_fill(~mask, 0.0).topk(per_token).indices.sort().values
        zero_filled += (filled != mine).any(-1).double().mean().item()
    unbiased, zero_filled = unbiased / len(gates), zero_filled / len(gates)
    print(f"{case}: the bias changes the experts of {unbiased:.0%} of tokens, a mask of 0.0 would of {zero_filled:.0%}")
    assert unbiased > 0.3
    assert groups == 1 or zero_filled > 0.2


def flat_gradient(case, model):
    """All gradients, flat, in the order of cases.shapes; the bias has none and counts as zero."""
    grads = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    values = dict(model.named_parameters())
    weights = cases.weights(case)
    flat = []
    for name, shape in cases.shapes(cases.CASES[case]).items():
        layer, _, rest = name.partition(".experts.")
        if not rest:
            flat.append(grads.get(name, np.zeros(shape, np.float32)))
            assert name in grads or name.endswith("bias")
            continue
        expert, matrix, _ = rest.split(".")
        joined = f"{layer}.experts." + ("down_proj" if matrix == "down_proj" else "gate_up_proj")
        half = shape[0]
        rows = {"gate_proj": slice(0, half), "up_proj": slice(half, 2 * half), "down_proj": slice(None)}[matrix]
        assert np.array_equal(values[joined].detach().numpy()[int(expert), rows], weights[name])
        flat.append(grads[joined][int(expert), rows])
    return np.concatenate([part.ravel() for part in flat])


def run(case: str) -> dict[str, np.ndarray]:
    """The arrays of a case's file."""
    model = load(case)
    seen = record(model)
    tokens = torch.from_numpy(cases.tokens(case)).long()
    out = model(tokens, output_hidden_states=True, use_cache=False)
    check_routing(case, model, seen)
    found = {"tokens": tokens.numpy().astype(np.uint8), "logits": out.logits.detach().numpy()}
    found["experts"] = np.stack([ids.view(*tokens.shape, -1).sort().values.numpy() for ids in seen["experts"]])
    found["experts"] = found["experts"].astype(np.uint8)
    for name, states in {"hidden": out.hidden_states, "attention": seen["attention"], "mlp": seen["mlp"]}.items():
        found[name] = np.stack([state.detach().numpy()[:, cases.KEPT] for state in states])
    if case == cases.GRADIENTS:
        logits = out.logits[:, :-1].reshape(-1, out.logits.shape[-1])
        loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].reshape(-1))
        loss.backward()
        found |= {"loss": loss.detach().numpy(), "gradient": flat_gradient(case, model)}
    return found


def main():
    torch.set_num_threads(1)
    print(platform.python_version(), torch.__version__, transformers.__version__, np.__version__)
    for case in cases.CASES:
        path = FOLDER / f"deepseek_v3_{case}.npz"
        found = run(case)
        np.savez_compressed(path, **found)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB, logits of deviation {found['logits'].std():.2f}")


if __name__ == "__main__":
    main()
