"""RMSNorm. Legend: D features."""

import jax
import jax.numpy as jnp
from flax import nnx


class RMSNorm(nnx.Module):
    """The gain of an RMSNorm, initialised to one."""

    def __init__(self, dim: int):
        self.scale = nnx.Param(jnp.ones(dim, jnp.float32))


def rms_norm(p, x_D, eps: float):
    """x / rms(x) * scale over the last axis (arXiv 1910.07467).

    Statistics in float32; the normalised value returns to x's dtype before the gain, as in the released model.
    """
    with jax.named_scope("rms_norm"):
        y_D = x_D.astype(jnp.float32)
        y_D = y_D * jax.lax.rsqrt(jnp.mean(jnp.square(y_D), axis=-1, keepdims=True) + eps)
        return y_D.astype(x_D.dtype) * p["scale"].astype(x_D.dtype)
