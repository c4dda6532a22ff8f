"""Rotary embedding and YaRN (Peng et al., arXiv 2309.00071) with DeepSeek-V3's mscale, in float64.

Legend: T tokens, R rotary size (even), N any leading axes.
"""

from dataclasses import dataclass
from math import ceil, floor, log, pi

import numpy as np


@dataclass(frozen=True)
class Yarn:
    """The `rope_scaling` entry of a DeepSeek-V3 style config; the defaults are Kimi K2's."""

    factor: float = 32.0
    original_length: int = 4096
    beta_fast: float = 1.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


def correction_range(dim, theta, yarn):
    """(low, high): the rotary pairs between which YaRN goes from kept to interpolated frequencies."""

    def pair_that_turns(rotations):
        return dim * log(yarn.original_length / (rotations * 2 * pi)) / (2 * log(theta))

    low = floor(pair_that_turns(yarn.beta_fast))
    high = ceil(pair_that_turns(yarn.beta_slow))
    return max(low, 0), min(high, dim - 1)


def inverse_frequencies(dim, theta, yarn=None):
    """Angular frequency of each of the dim/2 rotary pairs."""
    plain = np.array([theta ** (-2 * i / dim) for i in range(dim // 2)])
    if yarn is None:
        return plain
    low, high = correction_range(dim, theta, yarn)
    width = high - low if high != low else 0.001
    out = np.empty(dim // 2)
    for i in range(dim // 2):
        interpolated_share = min(max((i - low) / width, 0.0), 1.0)
        out[i] = plain[i] * (1 - interpolated_share) + plain[i] / yarn.factor * interpolated_share
    return out


def attention_factor(factor, mscale):
    """DeepSeek's m(s) = 0.1 s ln(factor) + 1."""
    return 1.0 if factor <= 1 else 0.1 * mscale * log(factor) + 1.0


def softmax_scale(qk_dim, yarn=None):
    """qk_dim^-0.5, times m(mscale_all_dim)^2 under YaRN (0.1308608 for K2)."""
    if yarn is None or not yarn.mscale_all_dim:
        return qk_dim**-0.5
    return qk_dim**-0.5 * attention_factor(yarn.factor, yarn.mscale_all_dim) ** 2


def rope(x_NTR, positions_T, theta, yarn=None):
    """Rotate the pairs (x[2i], x[2i+1]) by position * frequency[i]; the pairs stay where they are.

    The released checkpoints store interleaved pairs. Hugging Face permutes the result (evens, then odds);
    query and key get the same permutation, so no logit changes.
    """
    x_NTR = np.asarray(x_NTR, np.float64)
    dim = x_NTR.shape[-1]
    freqs = inverse_frequencies(dim, theta, yarn)
    gain = 1.0
    if yarn is not None:
        gain = attention_factor(yarn.factor, yarn.mscale) / attention_factor(yarn.factor, yarn.mscale_all_dim)
    out = np.empty_like(x_NTR)
    for t, position in enumerate(positions_T):
        for i in range(dim // 2):
            cos, sin = gain * np.cos(position * freqs[i]), gain * np.sin(position * freqs[i])
            even, odd = x_NTR[..., t, 2 * i], x_NTR[..., t, 2 * i + 1]
            out[..., t, 2 * i] = even * cos - odd * sin
            out[..., t, 2 * i + 1] = odd * cos + even * sin
    return out
