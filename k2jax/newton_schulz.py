"""Newton-Schulz orthogonalisation of every matrix of an array.

Each step applies the odd polynomial p(s) = a s + b s^3 + c s^5 to the singular values and leaves the singular
vectors alone, so a few steps turn a momentum matrix U S V^T into something close to U V^T.

Legend: ... batch axes (never flattened), n short side, m long side of a matrix.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from k2jax.matrix_specs import LAST_TWO, MatrixSpec, matrix_axes, matrix_sides

KELLER = (3.4445, -4.7750, 2.0315)
_DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class NS:
    """How to orthogonalise.

    Args:
      coeffs: one (a, b, c) per step.
      dtype: type of the iterate, 'bfloat16', 'float16' or 'float32'. Products accumulate in float32 in any
        case, and the input is normalised in float32 before it is cast.

    Raises:
      ValueError: no step, a step that is not three numbers, or another dtype.
    """

    coeffs: tuple[tuple[float, float, float], ...]
    dtype: str = "bfloat16"

    def __post_init__(self):
        if not self.coeffs or any(len(step) != 3 for step in self.coeffs):
            raise ValueError(f"NS.coeffs must hold one (a, b, c) per step, got {self.coeffs!r}")
        if self.dtype not in _DTYPES:
            raise ValueError(f"NS.dtype must be one of {_DTYPES}, got {self.dtype!r}")

    @classmethod
    def k2(cls, dtype: str = "bfloat16") -> "NS":
        """Five steps with Keller Jordan's coefficients, as in Moonlight (arXiv 2502.16982, section 2)."""
        return cls(coeffs=(KELLER,) * 5, dtype=dtype)


K2 = NS.k2()


def newton_schulz(x: jax.Array, ns: NS) -> jax.Array:
    """Orthogonalises the last two axes of `x`.

    Args:
      x: [..., n, m] or [..., m, n], any floating dtype. Entries may be huge or tiny: only ratios matter.
      ns: coefficients and dtype of the iteration.

    Returns:
      Array of the same shape, float32. A zero matrix stays zero. A matrix that holds a NaN or an infinity
      gives NaN: a broken gradient must not turn into a silent zero update.

    Source: Keller Jordan, https://kellerjordan.github.io/posts/muon; Moonlight, arXiv 2502.16982, equation 2.
    """
    tall = x.shape[-2] > x.shape[-1]  # the n x n product is cheapest on the short side
    x = jnp.swapaxes(x, -1, -2) if tall else x
    x = _normalize(x.astype(jnp.float32)).astype(ns.dtype)
    # A scan, not an unrolled loop: the temporaries of one step are reused by the next.
    x, _ = lax.scan(_step, x, jnp.asarray(ns.coeffs, jnp.float32))
    x = x.astype(jnp.float32)
    return jnp.swapaxes(x, -1, -2) if tall else x


def _normalize(x: jax.Array) -> jax.Array:
    """Divides float32 matrices [..., n, m] by their Frobenius norm, without overflow or underflow."""
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    # The exponent bits alone are the power of two below `largest`, so this division rounds nothing.
    exponent = lax.bitcast_convert_type(largest, jnp.int32) & 0x7F800000
    power_of_two = lax.bitcast_convert_type(exponent, jnp.float32)
    x = x / jnp.where(power_of_two == 0, 1.0, power_of_two)
    norm = jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))
    return jnp.where(norm == 0, 0.0, x / jnp.where(norm == 0, 1.0, norm))


def _step(x: jax.Array, abc: jax.Array) -> tuple[jax.Array, None]:
    """One polynomial: x <- a x + (b A + c A A) x with A = x x^T."""
    a, b, c = abc
    # Both terms of the polynomial take the same rounded A: near one their rounding errors nearly cancel.
    # reduce_precision forces the rounding; a plain cast there and back is one that a GPU compiler may drop.
    kind = jnp.finfo(x.dtype)
    gram = lax.reduce_precision(_matmul("...im,...jm->...ij", x, x), kind.nexp, kind.nmant).astype(x.dtype)
    poly = (b * gram.astype(jnp.float32) + c * _matmul("...ij,...jk->...ik", gram, gram)).astype(x.dtype)
    return (a * x + _matmul("...ij,...jm->...im", poly, x)).astype(x.dtype), None


def _matmul(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    # Without this, float32 products run as TF32 or bfloat16 on accelerators.
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    return jnp.einsum(subscripts, x, y, precision=precision, preferred_element_type=jnp.float32)


def orthogonalize(x: jax.Array, *, ns: NS = K2, spec: MatrixSpec = LAST_TWO) -> jax.Array:
    """Orthogonalises every matrix of a parameter-shaped array.

    Args:
      x: any floating array with at least the axes that `spec` names.
      ns: coefficients and dtype of the iteration.
      spec: which axes form the matrix. The others are batch axes and are never flattened, so that a sharded
        expert axis stays sharded; with two or more of them the leading one is scanned, which keeps
        temporaries small.

    Returns:
      Array of the same shape, float32, without any scale: singular values near one.

    Raises:
      ValueError: `spec` does not fit the shape of `x`.
    """
    batch, reduction, output = matrix_axes(x.shape, spec)
    order = batch + reduction + output
    x, given = _whole_matrices(x, reduction + output)
    moved = jnp.transpose(x, order)
    _, fan_in, fan_out = matrix_sides(x.shape, spec)
    matrices = moved.reshape(*(x.shape[axis] for axis in batch), fan_in, fan_out)
    if len(batch) >= 2:
        result = lax.map(lambda layer: newton_schulz(layer, ns), matrices)
    else:
        result = newton_schulz(matrices, ns)
    inverse = sorted(range(x.ndim), key=order.__getitem__)
    result = jnp.transpose(result.reshape(moved.shape), inverse)
    return result if given is None else jax.reshard(result, given)


def _whole_matrices(x, axes):
    """x with every matrix on one device, and the layout to return to (None: nothing was cut).

    On Explicit mesh axes the type tells; elsewhere the compiler sees to it.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x, None
    given = jax.typeof(x).sharding.spec
    if not any(given[axis] for axis in axes):
        return x, None
    return jax.reshard(x, PartitionSpec(*(None if i in axes else part for i, part in enumerate(given)))), given
