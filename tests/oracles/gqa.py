"""Grouped-query attention with rotary positions over the whole head; G = H is multi-head attention.

Legend: T tokens, D model size, H query heads, G key heads, K query/key size, V value size.
"""

import numpy as np

from . import yarn as rotary
from .attention import dense_attention


def gqa_qkv(x_TD, attn, theta, positions_T=None):
    """Rotated queries [T,H,K] and keys [T,G,K], and values [T,G,V]."""
    x_TD = np.asarray(x_TD, np.float64)
    positions_T = range(x_TD.shape[0]) if positions_T is None else positions_T
    q, k, v = (np.einsum("td,dhk->thk", x_TD, np.asarray(attn[w], np.float64)) for w in ("wq", "wk", "wv"))
    for x in (q, k):
        for h in range(x.shape[1]):
            x[:, h] = rotary.rope(x[:, h], positions_T, theta)
    return q, k, v


def gqa_forward(x_TD, attn, theta, segment_ids_T=None, positions_T=None):
    """(output [T,D], max logit per head [H], q, k, v) of one layer of full causal attention."""
    q, k, v = gqa_qkv(x_TD, attn, theta, positions_T)
    out, _, top = dense_attention(q, k, v, q.shape[-1] ** -0.5, segment_ids_T)
    return np.einsum("thv,hvd->td", out, np.asarray(attn["wo"], np.float64)), top, q, k, v
