"""Newton-Schulz orthogonalisation of every matrix of an array.

Each step applies the odd polynomial p(s) = a s + b s^3 + c s^5 to the singular values and leaves the singular
vectors alone, so a few steps turn a momentum matrix U S V^T into something close to U V^T.

Legend: ... batch axes (never flattened), n short side, m long side of a matrix.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from jax import lax

from k2jax.kernels.symmetric_matmul import symmetric_matmul
from k2jax.polar_express import polar_express

KELLER = (3.4445, -4.7750, 2.0315)
_DTYPES = ("bfloat16", "float16", "float32")
_METHODS = ("standard", "gram")
# float16 has no normal number below 6e-5, and most entries of the Gram matrix of a large normalised matrix are smaller
# (reduce_precision turns them to zero). Times 64 for the matrix, 4096 for its Gram matrix, they are not; nothing
# passes 65504, since singular values stay near one.
_LIFT = {"float16": 64.0}


@dataclasses.dataclass(frozen=True)
class NS:
    """How to orthogonalise.

    Args:
      coeffs: one (a, b, c) per step.
      dtype: type of the iterate, 'bfloat16', 'float16' or 'float32'. Products accumulate in float32 in any
        case, and the input is normalised in float32 before it is cast.
      method: 'standard' iterates on the matrix [n, m], 'gram' on its Gram matrix [n, n], which takes fewer operations
        for long matrices. A matrix on which it would take more (up to m/n = 1.5 with six steps and two restarts;
        `runs_gram` decides) takes the standard iteration with the same coefficients and dtype.
      restarts: the steps, counted from 0, before which 'gram' computes the Gram matrix anew, since its rounding error
        grows from step to step; None for every second step, which keeps any number of steps accurate.

    Raises:
      ValueError: no step, a step that is not three numbers, another dtype or method, 'gram' in bfloat16, restarts
        without 'gram', or restarts that are not increasing steps of the iteration.
    """

    coeffs: tuple[tuple[float, float, float], ...]
    dtype: str = "bfloat16"
    method: str = "standard"
    restarts: tuple[int, ...] | None = None

    def __post_init__(self):
        # Settings are keys of the groups of equal matrices, so lists become tuples.
        object.__setattr__(self, "coeffs", tuple(tuple(step) for step in self.coeffs))
        if self.restarts is not None:
            object.__setattr__(self, "restarts", tuple(self.restarts))
        if not self.coeffs or any(len(step) != 3 for step in self.coeffs):
            raise ValueError(f"NS.coeffs must hold one (a, b, c) per step, got {self.coeffs!r}")
        if self.dtype not in _DTYPES:
            raise ValueError(f"NS.dtype must be one of {_DTYPES}, got {self.dtype!r}")
        if self.method not in _METHODS:
            raise ValueError(f"NS.method must be one of {_METHODS}, got {self.method!r}")
        if self.method == "gram" and self.dtype == "bfloat16":
            raise ValueError(
                "NS(method='gram', dtype='bfloat16') would lose the update: on decaying spectra its relative error "
                "passes 1. Use dtype='float16', which costs the same, or method='standard'"
            )
        if self.restarts is not None:
            if self.method != "gram":
                raise ValueError(f"NS.restarts={self.restarts} belong to method='gram', got method={self.method!r}")
            steps = range(1, len(self.coeffs))
            if list(self.restarts) != sorted({*self.restarts} & {*steps}):
                raise ValueError(f"NS.restarts must be increasing steps of {steps}, got {self.restarts}")

    @classmethod
    def k2(cls, dtype: str = "bfloat16", method: str = "standard") -> "NS":
        """Five steps with Keller Jordan's coefficients, as in Moonlight (arXiv 2502.16982, section 2).

        NS.k2('float16', 'gram') computes the same polynomials on the Gram matrix with one restart: on GPUs fewer
        operations and smaller errors than the bfloat16 iteration. TPUs multiply no float16; 'gram' refuses bfloat16.
        """
        return cls((KELLER,) * 5, dtype, method, restarts=(2,) if method == "gram" else None)

    @classmethod
    def fast(cls, dtype: str = "float16") -> "NS":
        """Six steps of Polar Express on the Gram matrix: singular values above 1e-3 arrive within 0.2 % of one.

        On long matrices fewer operations than `k2`. Updates are 5 to 19 % larger than k2's, whose singular values end
        below one on average (benchmarks/ns_quality.py), so look at the learning rate again.

        Source: arXiv 2505.16932; the Gram form with restarts is that of github.com/Dao-AILab/gram-newton-schulz.
        """
        return cls(coeffs=polar_express(l=1e-3, steps=6, eps=0.01), dtype=dtype, method="gram", restarts=(2, 4))

    def segments(self) -> list[tuple[tuple[float, float, float], ...]]:
        """The steps of the Gram form between its restarts."""
        starts = range(2, len(self.coeffs), 2) if self.restarts is None else self.restarts
        return [self.coeffs[i:j] for i, j in itertools.pairwise([0, *starts, len(self.coeffs)])]


K2 = NS.k2()


# --- operations --------------------------------------------------------------------------------------------


def method_flops(n: int, m: int, ns: NS, method: str) -> int:
    """Floating-point operations of one n x m matrix (n <= m) by this method, every product computed in full."""
    square, wide = 2 * n**3, 2 * n * n * m
    if method == "standard":
        return len(ns.coeffs) * (2 * wide + square)
    parts = ns.segments()
    # A segment of k steps: k squares of the Gram matrix, k - 1 updates of Q, two products for each of the k - 1 updates
    # of the Gram matrix; and X X^T at its start, Q X at its end.
    return sum(len(part) + 3 * (len(part) - 1) for part in parts) * square + len(parts) * 2 * wide


def runs_gram(n: int, m: int, ns: NS) -> bool:
    """Whether an n x m matrix (n <= m) goes through the Gram form: where that is asked for and takes less work."""
    return ns.method == "gram" and method_flops(n, m, ns, "gram") < method_flops(n, m, ns, "standard")


# --- the iteration -----------------------------------------------------------------------------------------


def newton_schulz(x: jax.Array, ns: NS) -> jax.Array:
    """Orthogonalises the last two axes of `x`.

    Args:
      x: [..., n, m] or [..., m, n], any floating dtype. Entries may be huge or tiny: only ratios matter.
      ns: coefficients, dtype and form of the iteration.

    Returns:
      Array of the same shape, float32. A zero matrix stays zero. A matrix that holds a NaN or an infinity
      gives NaN: a broken gradient must not turn into a silent zero update.

    Source: Keller Jordan, https://kellerjordan.github.io/posts/muon; Moonlight, arXiv 2502.16982, equation 2.
    """
    tall = x.shape[-2] > x.shape[-1]  # the n x n product is cheapest on the short side
    x = jnp.swapaxes(x, -1, -2) if tall else x
    x = finish(iterate(prepare(x, ns), ns), ns)
    return jnp.swapaxes(x, -1, -2) if tall else x


def prepare(x: jax.Array, ns: NS, over: tuple[str, ...] = ()) -> jax.Array:
    """Matrices [..., n, m] as the iteration takes them: divided by their norm in float32, then in `ns.dtype`.

    over: inside a shard_map, the mesh axes that cut the matrices, so that the norm is that of the whole matrix.
    """
    return (_normalize(x.astype(jnp.float32), over) * _LIFT.get(ns.dtype, 1.0)).astype(ns.dtype)


def iterate(x: jax.Array, ns: NS) -> jax.Array:
    """The steps alone, from and to `ns.dtype`, for whole matrices [..., n, m] with n <= m."""
    lift = _LIFT.get(ns.dtype, 1.0)
    powers = jnp.array([1.0, lift**2, lift**4], jnp.float32)
    # Scans, not unrolled loops: the temporaries of one step are reused by the next.
    if runs_gram(*x.shape[-2:], ns):
        for _, equal in itertools.groupby(ns.segments(), key=len):
            x, _ = lax.scan(_gram_segment, x, jnp.array(list(equal), jnp.float32) / powers)
    else:
        x, _ = lax.scan(_step, x, jnp.array(ns.coeffs, jnp.float32) / powers)
    return x


def finish(x: jax.Array, ns: NS) -> jax.Array:
    """What `iterate` returns, in float32 with singular values near one."""
    return x.astype(jnp.float32) / _LIFT.get(ns.dtype, 1.0)


def _normalize(x: jax.Array, over: tuple[str, ...] = ()) -> jax.Array:
    """Divides float32 matrices [..., n, m] by their Frobenius norm, without overflow or underflow."""
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    largest = lax.pmax(largest, over) if over else largest
    # The exponent bits alone are the power of two below `largest`, so this division rounds nothing.
    exponent = lax.bitcast_convert_type(largest, jnp.int32) & 0x7F800000
    power_of_two = lax.bitcast_convert_type(exponent, jnp.float32)
    x = x / jnp.where(power_of_two == 0, 1.0, power_of_two)
    squares = jnp.sum(x * x, axis=(-2, -1), keepdims=True)
    norm = jnp.sqrt(lax.psum(squares, over) if over else squares)
    return jnp.where(norm == 0, 0.0, x / jnp.where(norm == 0, 1.0, norm))


def _step(x: jax.Array, abc: jax.Array) -> tuple[jax.Array, None]:
    """One polynomial: x <- (a I + b A + c A A) x with A = x x^T."""
    a, b, c = abc
    gram = symmetric_matmul(x)
    if x.dtype == jnp.float32:  # The identity in the polynomial would cost small singular values their last digit.
        return a * x + _product(symmetric_matmul(gram, gram, alpha=c, beta=b), x), None
    return _product(symmetric_matmul(gram, gram, alpha=c, beta=b, gamma=a), x), None


def _gram_segment(x: jax.Array, coeffs: jax.Array) -> tuple[jax.Array, None]:
    """Several polynomials, [steps, 3], at the price of two products with the long side: x <- Q x.

    p(x) = P x with P = a I + b R + c R R and R = x x^T, and the next Gram matrix is P R P: everything between the two
    long products is n x n and a polynomial of R, so all those products commute and are symmetric.
    """
    gram = symmetric_matmul(x)
    last = len(coeffs) - 1
    product = None
    for t, (a, b, c) in enumerate(coeffs):
        poly = symmetric_matmul(gram, gram, alpha=c, beta=b, gamma=a)
        product = poly if product is None else symmetric_matmul(product, y=poly)
        if t < last:
            gram = symmetric_matmul(symmetric_matmul(poly, y=gram), y=poly)
    return _product(product, x), None


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    """x y, accumulated in float32 by every backend and rounded once to the dtype of x."""
    # Without this, float32 products run as TF32 or bfloat16 on accelerators.
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    return jnp.einsum("...ij,...jm->...im", x, y, precision=precision, preferred_element_type=x.dtype)
