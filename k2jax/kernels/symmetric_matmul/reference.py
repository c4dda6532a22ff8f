"""The definition: the whole product. Legend: B batch, N rows (twice: rows and columns of the result), M columns."""

import jax
import jax.numpy as jnp


def symmetric_matmul_reference(x_BNM, c_BNN, alpha, beta, gamma):
    """alpha x x^T + beta c + gamma I, twice the work that its symmetry needs."""
    # Without this, float32 products run as TF32 or bfloat16 on accelerators.
    precision = jax.lax.Precision.HIGHEST if x_BNM.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    product = jnp.einsum("BNM,BKM->BNK", x_BNM, x_BNM, precision=precision, preferred_element_type=jnp.float32)
    out_BNN = alpha * product
    if c_BNN is not None:
        out_BNN += beta * c_BNN.astype(jnp.float32)
    if gamma is not None:
        out_BNN += gamma * jnp.eye(x_BNM.shape[1], dtype=jnp.float32)
    return out_BNN.astype(x_BNM.dtype)
