"""The symmetric product for Hopper, in Pallas Mosaic GPU.

A persistent grid: every cluster of one or two blocks walks over its share of `schedule.table` for all matrices. A
block has three warpgroups. One only starts copies: it streams tile_k columns at a time of two row tiles and one column
tile through a ring in shared memory, far ahead of the others, across the ends of tiles. Each of the other two
accumulates one tile in its registers, then stores it and its transpose, while the next operands already arrive.
C takes the same way: once the last columns of X are in, the ring carries the two tiles of C.

Legend: B batch, N rows (twice: rows and columns of the result), M columns, U units of the schedule, W what describes
a unit, S three scalars, R ring slots, O operands, T side of a tile, K columns of a step, G warpgroups, V epilogue
buffers, E side of an epilogue square.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from k2jax.kernels.symmetric_matmul.schedule import OWN_ROWS, table

# What the tensor memory accelerator copies at once: rows of 128 bytes, swizzled in groups of eight.
SQUARE = 64
TRANSFORMS = (plgpu.TilingTransform((8, SQUARE)), plgpu.SwizzleTransform(128))
_CONSUMERS = 2
_PRODUCER = 2  # the warpgroup after the consumers
_OPERANDS = 3  # rows of warpgroup 0, rows of warpgroup 1, the column they share

# Streaming multiprocessors of an H100 or H200 SXM, for lowering without one.
H100_SMS = 132


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Args:
      tile: rows and columns of the tile of one warpgroup, 64 or 128.
      tile_k: columns of X per step, a multiple of 64.
      stages: steps that fit into the ring.
      cluster: blocks that share rows, 1 or 2.
      band: pairs of rows of tiles that are walked through together.
      buffers: epilogue squares per warpgroup, two or more; a store waits for the one `buffers` earlier.
    """

    tile: int = 128
    tile_k: int = 64
    stages: int = 4
    cluster: int = 2
    band: int = 8
    buffers: int = 2


def refusal(x_BNM, tile: int = Config.tile) -> str | None:
    """Why this kernel cannot compute the product of x, or None."""
    _, n, m = x_BNM.shape
    if x_BNM.dtype not in (jnp.bfloat16, jnp.float16):
        return f"x is {x_BNM.dtype}, and the kernel takes bfloat16 or float16"
    if n % SQUARE or m % SQUARE:
        return f"x is {n} x {m}, and the kernel copies squares of {SQUARE}: pad both to multiples with zeros"
    if n < tile:
        return f"x has {n} rows, fewer than a tile of {tile}"
    return None


def symmetric_matmul_sm90(
    x_BNM, y_BNM, c_BNN, alpha, beta, gamma, *, config: Config = Config(), num_sms: int | None = None, interpret=None
):
    """alpha x y^T + beta c + gamma I from the tiles of the lower triangle, each stored twice.

    Args:
      x_BNM: bfloat16 or float16; N and M multiples of 64.
      y_BNM: None for x, or another matrix of which x y^T is symmetric up to rounding.
      c_BNN: None, or symmetric matrices in x's type: of each pair of mirrored tiles only the lower one is read.
      alpha, beta, gamma: float32 scalars, may be traced; gamma None adds nothing.
      config: see `Config`; what does not fit into shared memory fails while compiling.
      num_sms: blocks that run at a time; None asks the default device.
      interpret: `plgpu.InterpretGPUParams()` runs it on a CPU, slowly.

    Returns:
      out_BNN in x's type, without y equal to its transpose bit for bit if c is. Mirrored tiles hold the same registers;
      within a tile on the diagonal it rests on the tensor cores adding up every entry's products in the same order.

    Raises:
      ValueError: x does not suit the kernel (`refusal`).
    """
    if reason := refusal(x_BNM, config.tile):
        raise ValueError(reason)
    if num_sms is None:
        num_sms = jax.devices()[0].core_count
    num_batch, n, _ = x_BNM.shape
    table_UW = table(-(-n // config.tile), config.cluster, config.band, own_rows=y_BNM is None)
    matrices = [x_BNM, x_BNM if y_BNM is None else y_BNM, *([] if c_BNN is None else [c_BNN])]
    kernel = plgpu.kernel(
        functools.partial(_kernel, config=config, has_c=c_BNN is not None, has_gamma=gamma is not None),
        out_type=jax.ShapeDtypeStruct((num_batch, n, n), x_BNM.dtype),
        grid=(min(num_sms // config.cluster, num_batch * len(table_UW)),),
        grid_names=("sm",),
        cluster=(config.cluster,),
        cluster_names=("block",),
        num_threads=_CONSUMERS + 1,
        thread_name="wg",
        kernel_name="symmetric_matmul",
        interpret=interpret,
        # Written for these semantics: every layout in shared memory is stated, none is inferred.
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    return kernel(jnp.asarray(table_UW), scalars(alpha, beta, gamma), *matrices)


def scalars(alpha, beta, gamma):
    """float32 [3], in memory because they may be traced."""
    return jnp.stack([jnp.asarray(s, jnp.float32) for s in (alpha, beta, 0.0 if gamma is None else gamma)])


def _kernel(table_UW, scalars_S, x_BNM, y_BNM, *refs, config, has_c, has_gamma):
    c_BNN, out_BNN = refs if has_c else (None, *refs)
    dtype = x_BNM.dtype
    T, K = config.tile, config.tile_k
    if config.cluster == 1:
        empty = plgpu.Barrier(num_arrivals=_CONSUMERS, num_barriers=config.stages)
    else:
        # A slot is written by both blocks, so both blocks' consumers must have left it.
        empty = plgpu.ClusterBarrier(collective_axes=("block",), num_arrivals=_CONSUMERS, num_barriers=config.stages)

    @functools.partial(
        pl.run_scoped,
        ring_ROTK=plgpu.SMEM((config.stages, _OPERANDS, T, K), dtype, transforms=TRANSFORMS),
        out_GVEE=plgpu.SMEM((_CONSUMERS, config.buffers, SQUARE, SQUARE), dtype, transforms=TRANSFORMS),
        full_R=plgpu.Barrier(num_arrivals=_OPERANDS, num_barriers=config.stages),
        empty_R=empty,
        collective_axes="wg",
    )
    def _scope(ring_ROTK, out_GVEE, full_R, empty_R):
        wg = lax.axis_index("wg")
        ring = (ring_ROTK, full_R, empty_R)

        @pl.when(wg == _PRODUCER)
        def _produce():
            plgpu.set_max_registers(40, action="decrease")
            _producer(table_UW, x_BNM, y_BNM, c_BNN, ring, config)

        @pl.when(wg < _CONSUMERS)
        def _consume():
            plgpu.set_max_registers(232, action="increase")
            in_registers = (scalars_S[0], scalars_S[1], scalars_S[2])
            epilogue = functools.partial(
                _epilogue, in_registers, out_BNN, ring, out_GVEE, config=config, has_c=has_c, has_gamma=has_gamma
            )
            _consumer(table_UW, x_BNM.shape, ring, epilogue, config, has_c)


def _steps(m, config, has_c):
    """Steps of the ring per unit: those that carry X, and those that carry C."""
    return pl.cdiv(m, config.tile_k), config.tile // config.tile_k if has_c else 0


def _units(table_UW, num_batch, config, body):
    """body(number here, matrix, row0, row1, column, shared) for each of this cluster's units; returns how many."""
    num_units = table_UW.shape[0]
    total = num_batch * num_units
    first, stride = lax.axis_index("sm"), lax.axis_size("sm")

    def read(number):
        unit = lax.rem(number, jnp.int32(num_units))
        mine = 3 * lax.axis_index("block")
        return *(table_UW[unit, mine + i] for i in range(3)), table_UW[unit, 3 * config.cluster]

    def step(here, work):
        number = first + here * stride
        # The next unit is looked up a whole tile before it is needed.
        following = read(jnp.minimum(number + stride, total - 1))
        body(here, lax.div(number, jnp.int32(num_units)), *work)
        return following

    num_mine = lax.div(total - 1 - first, jnp.int32(stride)) + 1
    lax.fori_loop(0, num_mine, step, read(first))
    return num_mine


def _slot(step, config):
    return lax.rem(step, jnp.int32(config.stages))


def _producer(table_UW, x_BNM, y_BNM, c_BNN, ring, config):
    ring_ROTK, full_R, empty_R = ring
    T, K = config.tile, config.tile_k
    num_x, num_c = _steps(x_BNM.shape[2], config, c_BNN is not None)

    def fill(step, copy):
        """copy(slot) once the slot is free."""
        slot = _slot(step, config)

        @pl.when(step >= config.stages)
        def _wait():
            plgpu.barrier_wait(empty_R.at[slot])

        copy(slot)

    def unit(here, batch, row0, row1, column, shared):
        first = here * (num_x + num_c)
        right = jnp.maximum(column, 0)  # two diagonal tiles need no right operand, but the barrier counts three copies

        def load(slot, k, operand, tile, matrices_BNM=x_BNM, collective_axes=None):
            plgpu.copy_gmem_to_smem(
                matrices_BNM.at[batch, pl.ds(tile * T, T), pl.ds(k * K, K)],
                ring_ROTK.at[slot, operand],
                full_R.at[slot],
                collective_axes=collective_axes,
            )

        def load_x(slot, k, collective_axes):
            load(slot, k, 0, row0, collective_axes=collective_axes)
            load(slot, k, 1, row1, collective_axes=collective_axes)
            load(slot, k, 2, right, y_BNM)

        def stream(collective_axes):
            @pl.loop(0, num_x)
            def _x(k):
                fill(first + k, lambda slot: load_x(slot, k, collective_axes))

        if config.cluster == 1:
            stream(None)
        else:
            pl.when(shared == 1)(lambda: stream(("block",)))
            pl.when(shared == 0)(lambda: stream(None))

        def load_c(slot, k):
            for wg, row in enumerate((row0, row1)):
                col = lax.select(column == OWN_ROWS, row, column)
                plgpu.copy_gmem_to_smem(
                    c_BNN.at[batch, pl.ds(row * T, T), pl.ds(col * T + k * K, K)],
                    ring_ROTK.at[slot, wg],
                    full_R.at[slot],
                )
            plgpu.barrier_arrive(full_R.at[slot])  # for the third operand, which C has not

        for k in range(num_c):
            fill(first + num_x + k, functools.partial(load_c, k=k))

    steps = _units(table_UW, x_BNM.shape[0], config, unit) * (num_x + num_c)

    # A block must not end before its neighbour's last arrival here.
    @pl.loop(0, config.stages)
    def _drain(i):
        fill(steps + i, lambda slot: None)


def _consumer(table_UW, shape, ring, epilogue, config, has_c):
    ring_ROTK, full_R, empty_R = ring
    wg = lax.axis_index("wg")
    num_x, num_c = _steps(shape[2], config, has_c)

    def unit(here, batch, row0, row1, column, shared):
        del shared
        first = here * (num_x + num_c)
        right = lax.select(column == OWN_ROWS, wg, jnp.int32(2))

        def accumulate(acc_TT):
            def multiply(k):
                slot = _slot(first + k, config)
                plgpu.barrier_wait(full_R.at[slot])
                plgpu.wgmma(acc_TT, ring_ROTK.at[slot, wg], ring_ROTK.at[slot, right].transpose((1, 0)))

            multiply(0)

            @pl.loop(1, num_x)
            def _step(k):
                multiply(k)
                # All but the product just started have read their slots.
                plgpu.wgmma_wait(1)
                plgpu.barrier_arrive(empty_R.at[_slot(first + k - 1, config)])

            return acc_TT[...]

        acc_TT = pl.run_scoped(accumulate, plgpu.ACC((config.tile, config.tile), jnp.float32))
        plgpu.barrier_arrive(empty_R.at[_slot(first + num_x - 1, config)])
        row = lax.select(wg == 0, row0, row1)
        epilogue(acc_TT, first + num_x, batch, row, lax.select(column == OWN_ROWS, row, column))

    _units(table_UW, shape[0], config, unit)
    plgpu.wait_smem_to_gmem(0)


def _epilogue(scalars_S, out_BNN, ring, out_GVEE, acc_TT, first, batch, row, column, *, config, has_c, has_gamma):
    """Stores alpha acc + beta c + gamma I, and where the tile is not its own mirror image, the transpose."""
    ring_ROTK, full_R, empty_R = ring
    wg = lax.axis_index("wg")
    T, K, E = config.tile, config.tile_k, SQUARE
    alpha, beta, gamma = scalars_S
    is_diagonal = row == column
    gamma = jnp.where(is_diagonal, gamma, 0.0)
    # The stores of the tile before began a whole tile's products ago: buffers are counted from here.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def store(value_EE, number, row_start, column_start, mirrored=False):
        """Store `number` of this tile. Stores leave their buffers in order."""
        plgpu.wait_smem_to_gmem(config.buffers - 1, wait_read_only=True)
        square_EE = out_GVEE.at[wg, lax.rem(number, jnp.int32(config.buffers))]
        store_square(value_EE, square_EE, out_BNN.at[batch], row_start, column_start, mirrored)

    for j in range(T // E):
        slot = _slot(first + j * E // K, config)
        if has_c and j * E % K == 0:
            plgpu.barrier_wait(full_R.at[slot])
        for i in range(T // E):
            c_EE = ring_ROTK[slot, wg, pl.ds(i * E, E), pl.ds(j * E % K, E)] if has_c else None
            acc_EE = acc_TT[i * E : (i + 1) * E, j * E : (j + 1) * E]
            value_EE = value_of_square(acc_EE, c_EE, alpha, beta, gamma if has_gamma and i == j else None)
            value_EE = value_EE.astype(out_BNN.dtype)
            row_start, column_start = row * T + i * E, column * T + j * E
            square = jnp.int32(j * (T // E) + i)
            number = lax.select(is_diagonal, square, 2 * square)
            store(value_EE, number, row_start, column_start)
            if has_c and i == T // E - 1 and (j + 1) * E % K == 0:
                # Only after the fence in `store`, which orders the reads of C before the copy that overwrites it.
                plgpu.barrier_arrive(empty_R.at[slot])

            @pl.when(jnp.logical_not(is_diagonal))
            def _mirror(value_EE=value_EE, number=number, row_start=row_start, column_start=column_start):
                store(value_EE, number + 1, row_start, column_start, mirrored=True)


def value_of_square(acc_EE, c_EE, alpha, beta, gamma):
    """alpha acc + beta c + gamma I in float32, on registers; without C and without I where they are None."""
    value_EE = alpha * acc_EE
    if c_EE is not None:
        value_EE += beta * c_EE.astype(jnp.float32)
    if gamma is not None:
        row_EE = plgpu.broadcasted_iota(jnp.int32, acc_EE.shape, 0, layout=plgpu.Layout.WGMMA)
        column_EE = plgpu.broadcasted_iota(jnp.int32, acc_EE.shape, 1, layout=plgpu.Layout.WGMMA)
        value_EE += jnp.where(row_EE == column_EE, gamma, 0.0)
    return value_EE


def store_square(value_EE, square_EE, out_NN, row_start, column_start, mirrored=False):
    """Starts to copy registers to rows and columns of the result, or transposed to columns and rows."""
    E = SQUARE
    if mirrored:
        square_EE.transpose((1, 0))[...] = value_EE
        row_start, column_start = column_start, row_start
    else:
        square_EE[...] = value_EE
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(square_EE, out_NN.at[pl.ds(row_start, E), pl.ds(column_start, E)])
