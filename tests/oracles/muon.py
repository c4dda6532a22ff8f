"""Muon as its authors and others publish it, one matrix at a time, in float64.

Keller Jordan: https://github.com/KellerJordan/Muon, `muon_update` and `Muon.step`. PyTorch: torch.optim.Muon.
Moonlight: https://github.com/MoonshotAI/Moonlight, `examples/toy_train.py`. Written again from reading them, without
their code's bfloat16; torch's layout, a weight is [out, in].
"""

import numpy as np

KELLER = (3.4445, -4.7750, 2.0315)


def newton_schulz(g, steps=5, eps=1e-7, clamp=False):
    """`zeropower_via_newtonschulz5`. PyTorch clamps the norm at eps, the two others add it."""
    a, b, c = KELLER
    norm = np.sqrt((g * g).sum())
    x = g / (max(norm, eps) if clamp else norm + eps)
    if g.shape[0] > g.shape[1]:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def keller_step(w, g, momentum, *, lr, weight_decay=0.0, beta=0.95, nesterov=True):
    """(w, momentum): the average of gradients, and the scale max(1, rows / columns)^0.5."""
    momentum = momentum + (g - momentum) * (1 - beta)
    update = g + (momentum - g) * beta if nesterov else momentum
    update = newton_schulz(update) * max(1, g.shape[0] / g.shape[1]) ** 0.5
    return w * (1 - lr * weight_decay) - lr * update, momentum


def torch_step(w, g, momentum, *, lr, weight_decay=0.1, beta=0.95, nesterov=True):
    """(w, momentum) of torch.optim.Muon with adjust_lr_fn='match_rms_adamw': rate and scale multiply."""
    momentum = momentum + (g - momentum) * (1 - beta)
    update = g + (momentum - g) * beta if nesterov else momentum
    update = newton_schulz(update, clamp=True)
    return w * (1 - lr * weight_decay) - lr * 0.2 * np.sqrt(max(w.shape)) * update, momentum


def moonlight_muon_step(w, g, momentum, *, lr, weight_decay=0.1, beta=0.95, nesterov=True):
    """(w, momentum): a heavy ball, of which Nesterov adds beta times to the gradient."""
    momentum = momentum * beta + g
    update = newton_schulz(g + beta * momentum if nesterov else momentum)
    return w * (1 - lr * weight_decay) - lr * 0.2 * np.sqrt(max(w.shape)) * update, momentum


def moonlight_adam_step(w, g, moments, t, *, lr, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8):
    """(w, moments) of the backup for what is no matrix; `t` counts from 1. eps lies before the bias correction."""
    first = moments[0] + (g - moments[0]) * (1 - betas[0])
    second = moments[1] + (g * g - moments[1]) * (1 - betas[1])
    update = first / (eps + np.sqrt(second))
    scale = (1 - betas[0] ** t) / (1 - betas[1] ** t) ** 0.5
    return w * (1 - lr * weight_decay) - lr / scale * update, (first, second)
