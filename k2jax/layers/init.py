"""How every weight matrix starts."""

import jax
import jax.numpy as jnp
from flax import nnx


def normal(rngs: nnx.Rngs, std: float, *shape: int) -> nnx.Param:
    """A float32 parameter drawn from N(0, std^2)."""
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))
