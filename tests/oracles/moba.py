"""Mixture of Block Attention (arXiv 2502.13189), one row at a time, with its exact gradient.

Legend: T queries, S keys, H query heads, G key heads, K query/key size, V value size.
"""

from dataclasses import dataclass

import numpy as np

from .attention import segment_starts, softmax_row


@dataclass(frozen=True)
class MobaResult:
    """`selected[t][h]` lists the first key position of every block that the row attends to, in order."""

    out_THV: np.ndarray
    lse_TH: np.ndarray
    max_logit_H: np.ndarray
    selected: list


def selected_blocks(q_K, keys_SK, position, start, block_size, top_k):
    """First key positions of the blocks one row attends to, in increasing order.

    Blocks are cut from the start of the row's segment. The block that holds the row is always taken; the
    other top_k - 1 are the earlier blocks with the largest q . mean(key), lowest block first among equals.
    """
    current = (position - start) // block_size
    gates = []
    for j in range(current):
        first = start + j * block_size
        gates.append(q_K @ keys_SK[first : first + block_size].mean(axis=0))
    best = sorted(range(current), key=lambda j: (-gates[j], j))[: top_k - 1]
    return [start + j * block_size for j in [*sorted(best), current]]


def _rows(q_THK, k_SGK, block_size, top_k, segment_ids_S, q_offset):
    """Yield (row, head, key head, attended key positions, first positions of the selected blocks)."""
    T, H, _ = q_THK.shape
    S, G, _ = k_SGK.shape
    starts = segment_starts(np.zeros(S) if segment_ids_S is None else segment_ids_S)
    for t in range(T):
        position = q_offset + t
        for h in range(H):
            g = h // (H // G)
            blocks = selected_blocks(q_THK[t, h], k_SGK[:, g], position, starts[position], block_size, top_k)
            keys = [s for first in blocks for s in range(first, first + block_size) if s <= position]
            yield t, h, g, keys, blocks


def _default_scale(q_THK, scale):
    return q_THK.shape[-1] ** -0.5 if scale is None else scale


def moba(q_THK, k_SGK, v_SGV, block_size, top_k, scale=None, segment_ids_S=None, q_offset=0):
    """Outputs, log-sum-exp, per-head maximum over attended pairs, and the selection, as a MobaResult."""
    q_THK, k_SGK, v_SGV = (np.asarray(x, np.float64) for x in (q_THK, k_SGK, v_SGV))
    scale = _default_scale(q_THK, scale)
    T, H, _ = q_THK.shape
    out, lse, top = np.zeros((T, H, v_SGV.shape[-1])), np.zeros((T, H)), np.full(H, -np.inf)
    selected = [[None] * H for _ in range(T)]
    for t, h, g, keys, blocks in _rows(q_THK, k_SGK, block_size, top_k, segment_ids_S, q_offset):
        logits = scale * (k_SGK[keys, g] @ q_THK[t, h])
        out[t, h], lse[t, h], row_top = softmax_row(logits, v_SGV[keys, g])
        top[h] = max(top[h], row_top)
        selected[t][h] = blocks
    return MobaResult(out, lse, top, selected)


def moba_gradient(q_THK, k_SGK, v_SGV, do_THV, block_size, top_k, scale=None, segment_ids_S=None, q_offset=0):
    """(dq, dk, dv) of sum(out * do): the selection is a constant, so a row is a softmax over fixed keys."""
    q_THK, k_SGK, v_SGV, do_THV = (np.asarray(x, np.float64) for x in (q_THK, k_SGK, v_SGV, do_THV))
    scale = _default_scale(q_THK, scale)
    dq, dk, dv = np.zeros_like(q_THK), np.zeros_like(k_SGK), np.zeros_like(v_SGV)
    for t, h, g, keys, _ in _rows(q_THK, k_SGK, block_size, top_k, segment_ids_S, q_offset):
        logits = scale * (k_SGK[keys, g] @ q_THK[t, h])
        p = np.exp(logits - logits.max())
        p /= p.sum()
        dp = v_SGV[keys, g] @ do_THV[t, h]
        ds = p * (dp - p @ dp)
        dq[t, h] += scale * (ds @ k_SGK[keys, g])
        for s, ds_s, p_s in zip(keys, ds, p, strict=True):
            dk[s, g] += scale * ds_s * q_THK[t, h]
            dv[s, g] += p_s * do_THV[t, h]
    return dq, dk, dv
