"""Writes tests/golden/torch_muon.npz: what torch.optim.Muon makes of three matrices in a few steps.

Runs in an environment of its own, in which k2jax is not installed; the file in the tree was made with

    Python 3.11.7, torch 2.13.0 (CPU), numpy 2.4.6

From the repository's root, with that environment's Python (5 seconds on one core):

    pip install torch==2.13.0 numpy
    python -m tests.golden.make_torch_muon

torch orthogonalises in bfloat16, whatever the parameters are. A second run, in which `Tensor.bfloat16` is `double` and
everything else is torch's own code, shows the same update without that rounding.

The file holds, for each of `SHAPES` with i its number: start_i [n, m] and grads_i [STEPS, n, m] in eighths (int8), and
the weights after the last step, bfloat16_i (float32) and double_i (float64).
"""

from pathlib import Path

import numpy as np
import torch

SHAPES = ((32, 80), (80, 32), (48, 48))
STEPS = 3
SETTINGS = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95, "nesterov": True, "adjust_lr_fn": "match_rms_adamw"}


def main():
    rng = np.random.default_rng(0)
    arrays = {}
    for i, shape in enumerate(SHAPES):
        arrays[f"start_{i}"] = rng.integers(-8, 9, shape, np.int8)
        arrays[f"grads_{i}"] = rng.integers(-8, 9, (STEPS, *shape), np.int8)
        arrays[f"bfloat16_{i}"] = run(arrays[f"start_{i}"], arrays[f"grads_{i}"], torch.float32)
    torch.Tensor.bfloat16 = torch.Tensor.double
    for i, _ in enumerate(SHAPES):
        arrays[f"double_{i}"] = run(arrays[f"start_{i}"], arrays[f"grads_{i}"], torch.float64)
    np.savez_compressed(Path(__file__).parent / "torch_muon.npz", **arrays)


def run(start, grads, dtype):
    parameter = torch.nn.Parameter(torch.tensor(start, dtype=dtype) / 8)
    optimizer = torch.optim.Muon([parameter], **SETTINGS)
    for grad in grads:
        parameter.grad = torch.tensor(grad, dtype=dtype) / 8
        optimizer.step()
    return parameter.detach().numpy()


if __name__ == "__main__":
    main()
