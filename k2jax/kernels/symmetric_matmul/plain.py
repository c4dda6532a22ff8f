"""The symmetric product for Hopper at its plainest: one block, one warpgroup, one tile of the lower triangle.

It shows what `sm90.py` adds: no persistent grid, nothing overlaps a tile's end with the next one's start. It is there
to be compared with.

Legend: B batch, N rows (twice: rows and columns of the result), M columns, L tiles of the lower triangle, S three
scalars, T side of a tile, K columns of a step.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from k2jax.kernels.symmetric_matmul.sm90 import SQUARE, TRANSFORMS, refusal, scalars, store_square, value_of_square


def symmetric_matmul_plain(x_BNM, c_BNN, alpha, beta, gamma, *, tile=128, stages=4, interpret=None):
    """As `symmetric_matmul_sm90`: the same arguments, results and errors."""
    if reason := refusal(x_BNM, tile):
        raise ValueError(reason)
    num_batch, n, _ = x_BNM.shape
    tiles_L2 = np.array([(i, j) for i in range(-(-n // tile)) for j in range(i + 1)], np.int32)
    matrices = [x_BNM] if c_BNN is None else [x_BNM, c_BNN]
    kernel = plgpu.kernel(
        functools.partial(_kernel, tile=tile, stages=stages, has_c=c_BNN is not None, has_gamma=gamma is not None),
        out_type=jax.ShapeDtypeStruct((num_batch, n, n), x_BNM.dtype),
        grid=(num_batch, len(tiles_L2)),
        grid_names=("batch", "tile"),
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    return kernel(jnp.asarray(tiles_L2), scalars(alpha, beta, gamma), *matrices)


def _kernel(tiles_L2, scalars_S, x_BNM, *refs, tile, stages, has_c, has_gamma):
    c_BNN, out_BNN = refs if has_c else (None, *refs)
    batch, T, E = lax.axis_index("batch"), tile, SQUARE
    row, column = (tiles_L2[lax.axis_index("tile"), i] for i in range(2))

    def accumulate(acc_TT):
        def step(_, row_TK, column_TK):
            plgpu.wgmma(acc_TT, row_TK, column_TK.transpose((1, 0)))
            plgpu.wgmma_wait(1)

        plgpu.emit_pipeline(
            step,
            grid=(pl.cdiv(x_BNM.shape[2], E),),
            in_specs=[
                plgpu.BlockSpec((T, E), lambda k, i=i: (i, k), transforms=TRANSFORMS, delay_release=1)
                for i in (row, column)
            ],
            max_concurrent_steps=stages,
        )(x_BNM.at[batch], x_BNM.at[batch])
        return acc_TT[...]

    acc_TT = pl.run_scoped(accumulate, plgpu.ACC((T, T), jnp.float32))

    @functools.partial(
        pl.run_scoped,
        square_EE=plgpu.SMEM((E, E), x_BNM.dtype, transforms=TRANSFORMS),
        arrived=plgpu.Barrier(),
    )
    def _store(square_EE, arrived):
        for i in range(T // E):
            for j in range(T // E):
                start = row * T + i * E, column * T + j * E
                plgpu.wait_smem_to_gmem(0)
                c_EE = None
                if has_c:
                    plgpu.copy_gmem_to_smem(c_BNN.at[batch, pl.ds(start[0], E), pl.ds(start[1], E)], square_EE, arrived)
                    plgpu.barrier_wait(arrived)
                    c_EE = square_EE[...]
                gamma = jnp.where(row == column, scalars_S[2], 0.0) if has_gamma and i == j else None
                acc_EE = acc_TT[i * E : (i + 1) * E, j * E : (j + 1) * E]
                value_EE = value_of_square(acc_EE, c_EE, scalars_S[0], scalars_S[1], gamma).astype(x_BNM.dtype)
                store_square(value_EE, square_EE, out_BNN.at[batch], *start)

                @pl.when(row != column)
                def _mirror(value_EE=value_EE, start=start):
                    plgpu.wait_smem_to_gmem(0)
                    store_square(value_EE, square_EE, out_BNN.at[batch], *start, mirrored=True)

        plgpu.wait_smem_to_gmem(0)
