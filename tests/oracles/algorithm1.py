"""Algorithm 1 of the Kimi K2 report (arXiv 2507.20534): MuonClip, in float64.

Parameters are flat dicts {name: array}. `matrices[name] = (batch, inputs)` says that the first `batch` axes
of that array count matrices, the next `inputs` axes form the rows and the remaining axes the columns of one
matrix; every other name is trained by AdamW. Newton-Schulz coefficients, momentum and AdamW's settings are
Moonlight's (arXiv 2502.16982).

Legend: H query heads, G key heads.
"""

from math import prod

import numpy as np

KELLER = (3.4445, -4.7750, 2.0315)


def newton_schulz(m, steps=5, eps=1e-7):
    """Push the singular values of one matrix towards 1: `steps` of x -> a x + b x^3 + c x^5."""
    a, b, c = KELLER
    x = m / (np.linalg.norm(m) + eps)
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.T


def orthogonalize(m, batch, inputs):
    """Newton-Schulz and the factor 0.2 sqrt(max(n, m)) on every matrix that one array holds."""
    rows = prod(m.shape[batch : batch + inputs])
    stack = m.reshape(prod(m.shape[:batch]), rows, -1)
    out = [newton_schulz(x) * np.sqrt(max(x.shape)) * 0.2 for x in stack]
    return np.stack(out).reshape(m.shape)


def init(params):
    """Zero momentum and Adam moments, for every parameter."""
    zeros = {name: np.zeros(np.shape(p)) for name, p in params.items()}
    return {"step": 0, "mu": dict(zeros), "adam_m": dict(zeros), "adam_v": dict(zeros)}


def update(
    params,
    grads,
    state,
    lr,
    matrices,
    *,
    weight_decay=0.1,
    momentum=0.95,
    nesterov=False,
    b1=0.9,
    b2=0.95,
    eps=1e-8,
):
    """One step without the clip: (params, state). `lr` is a number or a function of the steps done so far.

    `nesterov` is Moonlight's footnote 1: Newton-Schulz gets momentum * M + G. The K2 report has none.
    """
    rate = lr(state["step"]) if callable(lr) else lr
    t = state["step"] + 1
    new = {"step": t, "mu": {}, "adam_m": {}, "adam_v": {}}
    out = {}
    for name, p in params.items():
        p, g = np.asarray(p, np.float64), np.asarray(grads[name], np.float64)
        if name in matrices:
            m = new["mu"][name] = momentum * state["mu"][name] + g
            direction = orthogonalize(momentum * m + g if nesterov else m, *matrices[name])
        else:
            m = new["adam_m"][name] = b1 * state["adam_m"][name] + (1 - b1) * g
            v = new["adam_v"][name] = b2 * state["adam_v"][name] + (1 - b2) * g * g
            direction = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        out[name] = p - rate * (direction + weight_decay * p)
    return out, new


def gamma(max_logits_H, tau):
    """tau / S where S > tau and S is finite, else 1, per head."""
    return np.array([tau / s if np.isfinite(s) and s > tau else 1.0 for s in np.asarray(max_logits_H, float)])


def clip_mla(attn, max_logits_H, tau, nope):
    """QK-Clip of one MLA layer: sqrt(gamma) on the parts without position, gamma on the query's rotary part.

    Values, the latent's down-projection and with it the shared rotary key are untouched.
    """
    query = "wq_b" if "wq_b" in attn else "wq"
    q, kv = np.array(attn[query], np.float64), np.array(attn["wkv_b"], np.float64)
    for h, g in enumerate(gamma(max_logits_H, tau)):
        q[:, h, :nope] *= np.sqrt(g)
        q[:, h, nope:] *= g
        kv[:, h, :nope] *= np.sqrt(g)
    return {**attn, query: q, "wkv_b": kv}


def clip_mha(attn, max_logits_H, tau):
    """QK-Clip of one multi-head layer: sqrt(gamma) on each head's query and key."""
    q, k = np.array(attn["wq"], np.float64), np.array(attn["wk"], np.float64)
    for h, g in enumerate(gamma(max_logits_H, tau)):
        q[:, h] *= np.sqrt(g)
        k[:, h] *= np.sqrt(g)
    return {**attn, "wq": q, "wk": k}


def clip_gqa(attn, max_logits_H, tau):
    """The balanced rule: a shared key takes the root of its worst head's gamma, each query takes the rest."""
    q, k = np.array(attn["wq"], np.float64), np.array(attn["wk"], np.float64)
    group = q.shape[1] // k.shape[1]
    gammas = gamma(max_logits_H, tau)
    for g in range(k.shape[1]):
        heads = range(g * group, (g + 1) * group)
        key_factor = np.sqrt(min(gammas[h] for h in heads))
        k[:, g] *= key_factor
        for h in heads:
            q[:, h] *= gammas[h] / key_factor
    return {**attn, "wq": q, "wk": k}
