"""SwiGLU. Legend: B batch, T tokens, D model, F hidden."""

import jax
import jax.numpy as jnp
from flax import nnx

from k2jax import sharding
from k2jax.layers.init import normal


class MLP(nnx.Module):
    """The three matrices of a SwiGLU."""

    def __init__(self, dim: int, hidden: int, std: float, rngs: nnx.Rngs):
        self.w_gate = normal(rngs, std, dim, hidden)
        self.w_up = normal(rngs, std, dim, hidden)
        self.w_down = normal(rngs, std, hidden, dim)


def mlp(p, x_BTD):
    """(silu(x w_gate) * x w_up) w_down (arXiv 2002.05202)."""
    with jax.named_scope("mlp"):
        dtype = x_BTD.dtype
        gate_BTF = jnp.einsum("BTD,DF->BTF", x_BTD, sharding.weight(p["w_gate"], dtype))
        up_BTF = jnp.einsum("BTD,DF->BTF", x_BTD, sharding.weight(p["w_up"], dtype))
        y_BTF, w_FD = jax.nn.silu(gate_BTF) * up_BTF, sharding.weight(p["w_down"], dtype)
        return jnp.einsum("BTF,FD->BTD", y_BTF, w_FD, out_sharding=sharding.layout(x_BTD))
