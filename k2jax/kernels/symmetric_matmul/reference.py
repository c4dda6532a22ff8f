"""The definition: the whole product. Legend: ... batch axes, N rows (and columns of the result), M columns."""

import functools

import jax.numpy as jnp
from jax import lax


def symmetric_matmul_reference(x, y, c, alpha, beta, gamma):
    """alpha x y^T + beta c + gamma I for x and y [..., N, M]: twice the work that its symmetry needs."""
    # Without this, float32 products run as TF32 or bfloat16 on accelerators.
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    product = functools.partial(jnp.einsum, "...nm,...km->...nk", x, x if y is None else y, precision=precision)
    if y is not None and c is None and gamma is None and isinstance(alpha, float) and alpha == 1.0:
        return product(preferred_element_type=x.dtype)  # Nothing follows: every backend rounds its float32 sum.
    out = alpha * product(preferred_element_type=jnp.float32)
    if c is not None:
        out += beta * c.astype(jnp.float32)
    if gamma is not None:
        out += gamma * jnp.eye(x.shape[-2], dtype=jnp.float32)
    # Several products may take the result, and what their rounding errors have in common cancels. A plain cast to 16
    # bits and back is one that a GPU's compiler may drop, so that they would see different matrices; not this one.
    kind = jnp.finfo(x.dtype)
    return lax.reduce_precision(out, kind.nexp, kind.nmant).astype(x.dtype)
