"""The DeepSeek-V3 router ("noaux_tc") and its two balancing rules, token by token.

Legend: T tokens, D model size, E experts.
"""

import numpy as np


def top_indices(scores, count):
    """The indices of the `count` largest scores; among equals the lowest index comes first."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]


def route_token(scores_E, bias_E, top_k, scaling, n_group=1, topk_group=1):
    """(expert ids, their weights) of one token, from its sigmoid scores.

    The bias decides who is chosen and never weighs. A group is worth the sum of its two best biased scores;
    experts outside the chosen groups are -inf, so that a negative bias cannot let them back in.
    """
    choice = scores_E + bias_E
    if n_group > 1:
        size = len(choice) // n_group
        worth = [sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in range(n_group)]
        kept = top_indices(worth, topk_group)
        choice = np.array([c if i // size in kept else -np.inf for i, c in enumerate(choice)])
    ids = top_indices(choice, top_k)
    weights = scores_E[ids] / (sum(scores_E[ids]) + 1e-20) * scaling
    return ids, weights


def route(x_TD, w_DE, bias_E, top_k, scaling, n_group=1, topk_group=1):
    """(ids [T, top_k], weights [T, top_k], sigmoid scores [T, E])."""
    scores_TE = 1 / (1 + np.exp(-(np.asarray(x_TD, np.float64) @ np.asarray(w_DE, np.float64))))
    bias_E = np.asarray(bias_E, np.float64)
    rows = [route_token(scores_E, bias_E, top_k, scaling, n_group, topk_group) for scores_E in scores_TE]
    return np.array([ids for ids, _ in rows]), np.array([weights for _, weights in rows]), scores_TE


def expert_counts(ids, experts):
    """How many (token, slot) pairs each expert received."""
    counts = np.zeros(experts)
    for i in np.ravel(ids):
        counts[i] += 1
    return counts


def bias_update(bias_E, counts_E, rate):
    """Moonlight (arXiv 2502.16982) appendix C: b += rate (sign(e) - mean sign(e)), e = mean load - load."""
    sign = np.sign(np.mean(counts_E) - counts_E)
    return bias_E + rate * (sign - sign.mean())


def sequence_balance_loss(ids_per_sequence, scores_per_sequence):
    """DeepSeek-V3 (arXiv 2412.19437) eq. 17-20 without alpha: mean over sequences of sum_i f_i P_i."""
    losses = []
    for ids, scores_TE in zip(ids_per_sequence, scores_per_sequence, strict=True):
        T, E = scores_TE.shape
        fraction = E / (ids.shape[-1] * T) * expert_counts(ids, E)
        probability = np.mean(scores_TE / scores_TE.sum(-1, keepdims=True), axis=0)
        losses.append(float(np.sum(fraction * probability)))
    return float(np.mean(losses))
