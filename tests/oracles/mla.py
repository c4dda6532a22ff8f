"""Multi-head latent attention of one sequence, as in DeepSeek-V2 (arXiv 2405.04434 §2.1) and Kimi K2.

Legend: T tokens, D model size, H heads, C key/value latent size; a head's query is [nope | rope], its
up-projected latent [nope | v], and the down-projection of a token [C | rope].
"""

from dataclasses import dataclass

import numpy as np

from . import yarn as rotary
from .attention import dense_attention


@dataclass(frozen=True)
class Mla:
    """Head sizes and position settings of one MLA layer."""

    nope: int
    rope: int
    v: int
    theta: float = 50000.0
    eps: float = 1e-6
    yarn: rotary.Yarn | None = None


def rms_norm(x, scale, eps):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def mla_qkv(x_TD, attn, cfg, positions_T=None):
    """Per-head queries and keys [T, H, nope+rope] after rotation, and values [T, H, v]."""
    attn = {name: _float64(leaf) for name, leaf in attn.items()}
    x_TD = np.asarray(x_TD, np.float64)
    T = x_TD.shape[0]
    positions_T = range(T) if positions_T is None else positions_T
    latent_size = attn["kv_norm"]["scale"].shape[-1]
    if "wq" in attn:
        q = np.einsum("td,dhk->thk", x_TD, attn["wq"])
    else:
        q_latent = rms_norm(x_TD @ attn["wq_a"], attn["q_norm"]["scale"], cfg.eps)
        q = np.einsum("tr,rhk->thk", q_latent, attn["wq_b"])
    down = x_TD @ attn["wkv_a"]
    latent = rms_norm(down[:, :latent_size], attn["kv_norm"]["scale"], cfg.eps)
    shared_key = rotary.rope(down[:, latent_size:], positions_T, cfg.theta, cfg.yarn)
    up = np.einsum("tc,chk->thk", latent, attn["wkv_b"])

    q_out, k_out = q.copy(), np.empty_like(q)
    for h in range(q.shape[1]):
        q_out[:, h, cfg.nope :] = rotary.rope(q[:, h, cfg.nope :], positions_T, cfg.theta, cfg.yarn)
        k_out[:, h, : cfg.nope] = up[:, h, : cfg.nope]
        k_out[:, h, cfg.nope :] = shared_key
    return q_out, k_out, up[:, :, cfg.nope :]


def mla_forward(x_TD, attn, cfg, segment_ids_T=None, positions_T=None):
    """(output [T,D], max logit per head [H], q, k, v) of one layer of full causal attention."""
    q, k, v = mla_qkv(x_TD, attn, cfg, positions_T)
    scale = rotary.softmax_scale(cfg.nope + cfg.rope, cfg.yarn)
    out, _, top = dense_attention(q, k, v, scale, segment_ids_T)
    return np.einsum("thv,hvd->td", out, np.asarray(attn["wo"], np.float64)), top, q, k, v


def _float64(leaf):
    if isinstance(leaf, dict):
        return {name: _float64(value) for name, value in leaf.items()}
    return np.asarray(leaf, np.float64)
