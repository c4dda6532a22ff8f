"""Products that are symmetric, of a matrix with its own transpose above all: half of each need not be computed.

Legend: B batch, N rows (twice: rows and columns of the result), M columns.
"""

import functools
import logging

import jax

from k2jax.kernels.hopper import CannotRun, not_hopper
from k2jax.kernels.partition import mesh_axes, over_mesh
from k2jax.kernels.symmetric_matmul.reference import symmetric_matmul_reference
from k2jax.kernels.symmetric_matmul.sm90 import refusal, symmetric_matmul_sm90

IMPLEMENTATIONS = {"reference": symmetric_matmul_reference, "sm90": symmetric_matmul_sm90}

# The fewest rows at which it was measured to win (benchmarks/results/symmetric_matmul.json: 1.24x and 1.37x).
SM90_MIN_ROWS = 1024

__all__ = ["IMPLEMENTATIONS", "SM90_MIN_ROWS", "symmetric_matmul"]


def symmetric_matmul(x, c=None, *, y=None, alpha=1.0, beta=1.0, gamma=None, implementation: str | None = None):
    """alpha x y^T + beta c + gamma I, accumulated in float32 and rounded once; y is x where it is not given.

    Args:
      x: [..., N, M]. On a mesh, of [B, N, M] only B may be cut: the matrices are gathered whole.
      c: symmetric matrices [..., N, N] in x's type, or None. For a polynomial b A + c A A of symmetric A, x and c are
        both A. Where c is not symmetric, the result depends on the implementation.
      y: like x, where the caller knows that x y^T is symmetric up to rounding: two polynomials of one symmetric matrix,
        say. Where it is not symmetric, the result depends on the implementation. None for x itself.
      alpha, beta, gamma: numbers or float32 scalars, may be traced. gamma None adds no identity.
      implementation: 'reference' (the whole product, everywhere), 'sm90' (the lower triangle, on Hopper GPUs; without y
        its result equals its transpose bit for bit), or None, which chooses and logs the choice once. Its 'sm90' is
        part of a program for GPUs alone: lowered for another platform, the same call is the reference.

    Returns:
      [..., N, N] in x's type. It has no gradient under 'sm90': an optimizer's update needs none.

    Raises:
      ValueError: shapes or types that do not fit together, an unknown implementation, or one that cannot do this.

    Source: Newton-Schulz with symmetric products as in gram-newton-schulz (Dao-AILab) and QuACK's symmetric GEMM.
    """
    _check(x, c, y)
    if x.ndim == 2:
        x, c, y = (None if a is None else a[None] for a in (x, c, y))
        return symmetric_matmul(x, c, y=y, alpha=alpha, beta=beta, gamma=gamma, implementation=implementation)[0]
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation={implementation!r}: use None or one of {sorted(IMPLEMENTATIONS)}")
    if implementation == "sm90" and (reason := not_hopper() or _unfit(x)):
        raise CannotRun(f"implementation='sm90' cannot run: {reason}")
    run = IMPLEMENTATIONS[implementation] if implementation else _best(x)
    if x.ndim > 3:
        return run(x, y, c, alpha, beta, gamma)
    arrays = {name: a for name, a in (("x_BNM", x), ("y_BNM", y), ("c_BNK", c)) if a is not None}

    def product(x_BNM, y_BNM=None, c_BNK=None):
        return run(x_BNM, y_BNM, c_BNK, alpha, beta, gamma)

    axes = mesh_axes({"x_BNM": x})
    return over_mesh(product, arrays, "BNK", {letter: axes[letter] for letter in axes if letter == "B"})


def _check(x, c, y):
    if x.ndim < 2:
        raise ValueError(f"x.shape={x.shape} must be (..., rows, columns)")
    square = (*x.shape[:-1], x.shape[-2])
    if c is not None and c.shape != square:
        raise ValueError(f"c.shape={c.shape} must be {square}: one square per matrix of x")
    if c is not None and c.dtype != x.dtype:
        raise ValueError(f"c is {c.dtype} and x is {x.dtype}: both must have one type")
    if y is not None and (y.shape, y.dtype) != (x.shape, x.dtype):
        raise ValueError(f"y is {y.dtype}{y.shape} and x is {x.dtype}{x.shape}: both must be alike")


def _best(x):
    """What None runs for x; says so once."""
    reason = not_hopper() or _unfit(x)
    if reason is None and x.shape[-2] < SM90_MIN_ROWS:
        reason = f"x has {x.shape[-2]} rows, fewer than {SM90_MIN_ROWS}"
    _say_once("reference" if reason else "sm90", reason or "a Hopper GPU and enough rows")
    return symmetric_matmul_reference if reason else _sm90_on_gpus


def _sm90_on_gpus(x_BNM, y_BNM, c_BNN, alpha, beta, gamma):
    # The default device is a Hopper GPU, but this program may be one for the host's CPU or for a pod elsewhere.
    return jax.lax.platform_dependent(
        x_BNM, y_BNM, c_BNN, alpha, beta, gamma, cuda=symmetric_matmul_sm90, default=symmetric_matmul_reference
    )


def _unfit(x):
    return "it takes at most one batch axis" if x.ndim > 3 else refusal(x)


@functools.cache
def _say_once(implementation, reason):
    logging.getLogger(__name__).info("symmetric_matmul: %s (%s)", implementation, reason)
