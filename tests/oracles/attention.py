"""Dense causal attention of one sequence, row by row, in float64.

Legend: T tokens, H query heads, G key heads, K query/key size, V value size.
"""

import numpy as np


def segment_starts(segment_ids_T):
    """For each position, where its segment starts; a segment is a maximal run of equal ids."""
    starts = np.zeros(len(segment_ids_T), int)
    for t in range(1, len(segment_ids_T)):
        starts[t] = starts[t - 1] if segment_ids_T[t] == segment_ids_T[t - 1] else t
    return starts


def softmax_row(logits, values):
    """(softmax(logits) @ values, log-sum-exp, maximum) of one row."""
    top = logits.max()
    weights = np.exp(logits - top)
    return weights @ values / weights.sum(), top + np.log(weights.sum()), top


def dense_attention(q_THK, k_TGK, v_TGV, scale, segment_ids_T=None):
    """(output [T,H,V], log-sum-exp [T,H], signed maximal logit per head [H]) of causal attention."""
    T, H, _ = q_THK.shape
    group = H // k_TGK.shape[1]
    starts = segment_starts(np.zeros(T) if segment_ids_T is None else segment_ids_T)
    out, lse, top = np.zeros((T, H, v_TGV.shape[-1])), np.zeros((T, H)), np.full(H, -np.inf)
    for h in range(H):
        for t in range(T):
            keys = slice(starts[t], t + 1)
            logits = scale * (k_TGK[keys, h // group] @ q_THK[t, h])
            out[t, h], lse[t, h], row_top = softmax_row(logits, v_TGV[keys, h // group])
            top[h] = max(top[h], row_top)
    return out, lse, top
