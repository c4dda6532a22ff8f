"""Groups as tiles of equal height, multiplied as one batch.

Legend: R rows, E groups, D and F features, N tiles, M rows of a tile.
"""

import jax.numpy as jnp

# Rows of a tile: a group is padded to a multiple of it, so a lower value wastes fewer rows and a higher one loads
# each matrix for more of them.
TILE = 128


def grouped_matmul_xla(x_RD, w_EDF, sizes_E):
    """One batched product of N tiles, each with its group's matrix.

    Every tile gets a copy of that matrix, N * D * F values, and the weights' gradient adds those copies up: the price
    of a plain batched product, which a kernel need not pay.
    """
    num_rows, dim = x_RD.shape
    tile_start_N = jnp.arange(num_rows // TILE) * TILE
    group_N = jnp.searchsorted(jnp.cumsum(sizes_E), tile_start_N, side="right", method="compare_all")
    # Tiles after the last group hold zeros: any matrix will do.
    group_N = jnp.minimum(group_N, w_EDF.shape[0] - 1)
    x_NMD = x_RD.reshape(-1, TILE, dim)
    return jnp.einsum("NMD,NDF->NMF", x_NMD, w_EDF[group_N]).reshape(num_rows, -1)
