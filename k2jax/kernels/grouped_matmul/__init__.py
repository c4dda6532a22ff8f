"""Matrix products of groups of rows, each group with a matrix of its own.

Legend: R rows, E groups, D input features, F output features.
"""

import functools
import logging

from k2jax.kernels.grouped_matmul.reference import grouped_matmul_reference
from k2jax.kernels.grouped_matmul.xla import TILE, grouped_matmul_xla

IMPLEMENTATIONS = {"reference": grouped_matmul_reference, "xla": grouped_matmul_xla}

__all__ = ["IMPLEMENTATIONS", "TILE", "grouped_matmul"]


def grouped_matmul(x_RD, w_EDF, sizes_E, *, implementation: str | None = None):
    """y[r] = x[r] @ w[e] for every row r of group e; the groups lie one after the other.

    sizes_E: rows of each group, every one a multiple of TILE (padding rows are the caller's, and zero). Rows after
    the last group must be zero as well, and give zero.
    implementation: None picks the best for the platform, which is 'xla' everywhere until kernels exist.
    Raises ValueError for an unknown name and for R that is no multiple of TILE.
    """
    if implementation is None:
        implementation = "xla"
        _say_once(implementation, "tiles of one batched product; no kernel exists for any platform yet")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: use None or one of {sorted(IMPLEMENTATIONS)}")
    if x_RD.shape[0] % TILE:
        raise ValueError(f"x has {x_RD.shape[0]} rows: pad them to a multiple of {TILE}")
    return IMPLEMENTATIONS[implementation](x_RD, w_EDF, sizes_E)


@functools.cache
def _say_once(implementation, reason):
    logging.getLogger(__name__).info("grouped_matmul: %s (%s)", implementation, reason)
