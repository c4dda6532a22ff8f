"""Groups as tiles of equal height, multiplied as one batch.

Legend: R rows, E groups, D and F features, N tiles, M rows of a tile.
"""

import jax
import jax.numpy as jnp

# Rows of a tile: a group is padded to a multiple of it, so a lower value wastes fewer rows and a higher one loads
# each matrix for more of them.
TILE = 128


@jax.custom_vjp
def grouped_matmul_xla(x_RD, w_EDF, sizes_E):
    """One batched product of N tiles, each with its group's matrix.

    Every tile gets a copy of that matrix, N * D * F values, and the weights' gradient as many partial sums: the price
    of a plain batched product, which a kernel need not pay.
    """
    group_N = _groups(x_RD, sizes_E)
    return jnp.einsum("NMD,NDF->NMF", _tiles(x_RD), w_EDF[group_N]).reshape(x_RD.shape[0], -1)


def _groups(x_RD, sizes_E):
    """The group of every tile. Tiles after the last group hold zeros: any matrix will do."""
    tile_start_N = jnp.arange(x_RD.shape[0] // TILE) * TILE
    group_N = jnp.searchsorted(jnp.cumsum(sizes_E), tile_start_N, side="right", method="compare_all")
    return jnp.minimum(group_N, sizes_E.shape[0] - 1)


def _tiles(x_RD):
    return x_RD.reshape(-1, TILE, x_RD.shape[-1])


def _fwd(x_RD, w_EDF, sizes_E):
    # The copies of the matrices are made again in the backward pass rather than kept for it.
    return grouped_matmul_xla(x_RD, w_EDF, sizes_E), (x_RD, w_EDF, sizes_E)


def _bwd(saved, grad_RF):
    x_RD, w_EDF, sizes_E = saved
    group_N = _groups(x_RD, sizes_E)
    grad_NMF = _tiles(grad_RF)
    grad_x_RD = jnp.einsum("NMF,NDF->NMD", grad_NMF, w_EDF[group_N]).reshape(x_RD.shape)
    partial_NDF = jnp.einsum("NMD,NMF->NDF", _tiles(x_RD), grad_NMF)
    # Adding the tiles up by a product: the gradient of a gather is a scatter-add, whose order changes from run to run
    # on a GPU and whose sums are rounded after every tile. It costs E / TILE of the product before it, and a NaN in one
    # tile reaches every group's gradient: the step is skipped either way.
    mine_EN = (jnp.arange(w_EDF.shape[0])[:, None] == group_N).astype(x_RD.dtype)
    exact = jax.lax.Precision.HIGHEST if x_RD.dtype == jnp.float32 else None
    grad_w_EDF = jnp.einsum("EN,NDF->EDF", mine_EN, partial_NDF, precision=exact)
    return grad_x_RD, grad_w_EDF.astype(w_EDF.dtype), None


grouped_matmul_xla.defvjp(_fwd, _bwd)
