"""Rotary positions and their YaRN extension.

Legend: B batch, T tokens, H heads, R rotary size, F = R / 2 frequencies.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from k2jax.config import RopeConfig


def inverse_frequencies(rope_dim: int, cfg: RopeConfig) -> np.ndarray:
    """Radians per token of each rotary pair, float32 [F].

    With factor > 1 this is YaRN's blend (arXiv 2309.00071, section 3.2): pairs that turn more than beta_fast times
    in the original context keep their frequency, those below beta_slow are slowed by `factor`.
    K2's beta_fast = beta_slow = 1 makes the ramp a step between pairs 19 and 20.
    """
    extra_F = 1.0 / cfg.theta ** (np.arange(0, rope_dim, 2, dtype=np.float64) / rope_dim)
    if cfg.factor == 1.0:
        return extra_F.astype(np.float32)

    def pair_that_turns(times):
        return rope_dim * math.log(cfg.original_length / (times * 2 * math.pi)) / (2 * math.log(cfg.theta))

    low = max(math.floor(pair_that_turns(cfg.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(cfg.beta_slow)), rope_dim - 1)
    # The released code widens an empty ramp by 0.001 so that the division is defined.
    ramp_F = (np.arange(rope_dim // 2) - low) / max(high - low, 1e-3)
    slowed_F = np.clip(ramp_F, 0.0, 1.0)
    return (extra_F / cfg.factor * slowed_F + extra_F * (1.0 - slowed_F)).astype(np.float32)


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's magnitude 0.1 * mscale * ln(factor) + 1; 1 without an extension."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(head_dim: int, cfg: RopeConfig) -> float:
    """head_dim^-0.5 times YaRN's squared magnitude; 0.1308608 for the released K2, 192^-0.5 at 4K pre-training."""
    return head_dim**-0.5 * yarn_mscale(cfg.factor, cfg.mscale_all_dim) ** 2


def apply_rope(x_BTHR, positions_BT, cfg: RopeConfig):
    """Turns the interleaved pairs (0,1), (2,3), ... of the last axis by their position's angles.

    The result holds all first members, then all second ones. Queries and keys get the same order, so their products
    are those of the released model, which reorders before turning.
    """
    with jax.named_scope("rope"):
        frequency_F = jnp.asarray(inverse_frequencies(x_BTHR.shape[-1], cfg))
        angle_BTF = positions_BT[..., None].astype(jnp.float32) * frequency_F
        magnitude = yarn_mscale(cfg.factor, cfg.mscale) / yarn_mscale(cfg.factor, cfg.mscale_all_dim)
        cos_BT1F = (jnp.cos(angle_BTF) * magnitude)[:, :, None]
        sin_BT1F = (jnp.sin(angle_BTF) * magnitude)[:, :, None]
        first_BTHF = x_BTHR[..., 0::2].astype(jnp.float32)
        second_BTHF = x_BTHR[..., 1::2].astype(jnp.float32)
        turned = (
            first_BTHF * cos_BT1F - second_BTHF * sin_BT1F,
            second_BTHF * cos_BT1F + first_BTHF * sin_BT1F,
        )
        return jnp.concatenate(turned, axis=-1).astype(x_BTHR.dtype)
