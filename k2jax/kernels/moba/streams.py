"""The two streams of MoBA and their exact backward.

  near: rows in chunks of one block size against the keys that their own blocks can reach;
  far:  (row, history block) pairs in tiles of L rows against one block each.
Each yields partial softmax results that are joined by their log-sum-exp (LSE). Far results are gathered back
to their rows, and the far gradients of a block are summed in the order of its tiles: nothing is added in an
order that could change between runs. The backward recomputes probabilities from the joined LSE and is exact
(Dao, "FlashAttention-2", arXiv 2307.08691, section 3.1.2, on each stream with the joined output and LSE).

Legend: X = batch * key heads, M rows (queries, padded, times query heads per key head), D chunks, C block
size, W keys in reach of a chunk, Q = M // D rows of a chunk, N history blocks, J history blocks per row, L
rows of a tile, Y tiles, P = Y * L places, O runs of tiles with equal block, K query/key size, V value size.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Over the heads of one step: logits of chunks or tiles at once, and far results kept until they are joined.
STEP_LOGITS = 2**24
STEP_PARTIALS = 2**27
# The far backward sums the tiles of a step by an [O, Y] product, whose cost this bounds to a fraction of the
# tiles' own.
MAX_STEP_TILES = 64


class Sizes(NamedTuple):
    """Static sizes of one call; see the legend. R is the query heads per key head."""

    C: int
    D: int
    R: int
    W: int
    N: int
    J: int
    L: int
    Y: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def joined_attention(scale, sizes, q_XMK, near_XDCK, near_XDCV, far_XNCK, far_XNCV, inside_XM, tiles):
    """Softmax over the own block and the chosen blocks of each row.

    Args:
      inside_XM: how many keys of its block lie before the row.
      tiles: `routing.Tiles`, or None where there is no history.

    Returns: out_XMV in v's dtype, lse_XM and the rows' largest logits max_XM in float32, those two without
      gradient.
    """
    return _forward(scale, sizes, q_XMK, near_XDCK, near_XDCV, far_XNCK, far_XNCV, inside_XM, tiles)[0]


def working_set(sizes, X, K, V):
    """Numbers of 32 bits that the forward and backward hold at once, roughly: far partials, one step of
    logits, copies.
    """
    heads = _heads_per_step(sizes, X, K, V)
    partials = heads * sizes.Y * sizes.L * (max(K, V) + 3)
    logits = 5 * min(STEP_LOGITS, heads * max(sizes.Y * sizes.L * sizes.C, sizes.D * sizes.C * sizes.R * sizes.W))
    copies = X * sizes.D * sizes.C * (sizes.R * (2 * K + 2 * V + 4 * sizes.J) + 3 * (K + V))
    return partials + logits + copies


def _forward(scale, sizes, q_XMK, near_XDCK, near_XDCV, far_XNCK, far_XNCV, inside_XM, tiles):
    def head(q_MK, near_DCK, near_DCV, far_NCK, far_NCV, inside_M, tiles):
        out_MV, lse_M, max_M = _near_forward(scale, sizes, step_chunks, q_MK, near_DCK, near_DCV, inside_M)
        if sizes.J:
            far = _far_forward(scale, sizes, step_tiles, q_MK, far_NCK, far_NCV, tiles)
            out_MV, lse_M, max_M = _join(out_MV, lse_M, max_M, *far, tiles.place_XMJ)
        return out_MV.astype(near_DCV.dtype), lse_M, max_M

    heads, step_chunks, step_tiles = _steps(sizes, q_XMK, near_XDCV)
    arguments = (q_XMK, near_XDCK, near_XDCV, far_XNCK, far_XNCV, inside_XM, tiles)
    out_XMV, lse_XM, max_XM = _map(head, heads, *arguments)
    return (out_XMV, lse_XM, max_XM), (*arguments, out_XMV, lse_XM)


def _backward(scale, sizes, saved, cotangents):
    def head(q_MK, near_DCK, near_DCV, far_NCK, far_NCV, inside_M, tiles, out_MV, lse_M, dout_MV):
        delta_M = jnp.sum(dout_MV.astype(jnp.float32) * out_MV.astype(jnp.float32), axis=-1)
        rows = (q_MK, dout_MV, lse_M, delta_M)
        dq_MK, dnear_DCK, dnear_DCV = _near_backward(scale, sizes, step_chunks, rows, near_DCK, near_DCV, inside_M)
        if sizes.J:
            dfar_q_MK, dfar_NCK, dfar_NCV = _far_backward(scale, sizes, step_tiles, rows, far_NCK, far_NCV, tiles)
            dq_MK = dq_MK + dfar_q_MK
        else:
            dfar_NCK, dfar_NCV = jnp.zeros_like(far_NCK), jnp.zeros_like(far_NCV)
        primals = (q_MK, near_DCK, near_DCV, far_NCK, far_NCV)
        gradients = (dq_MK, dnear_DCK, dnear_DCV, dfar_NCK, dfar_NCV)
        return tuple(g.astype(x.dtype) for g, x in zip(gradients, primals, strict=True))

    heads, step_chunks, step_tiles = _steps(sizes, saved[0], saved[2])
    return (*_map(head, heads, *saved, cotangents[0]), None, None)


joined_attention.defvjp(_forward, _backward)


def _near_forward(scale, sizes, step, q_MK, near_DCK, near_DCV, inside_M):
    def chunk(q_QK, k_WK, v_WV, inside_Q):
        logits_QW = scale * _dot(q_QK, k_WK.T)
        return _partial_softmax(jnp.where(_reach(sizes, inside_Q), logits_QW, -jnp.inf), v_WV)

    split = (
        _chunks(sizes, q_MK),
        _windows(sizes, near_DCK),
        _windows(sizes, near_DCV),
        _chunks(sizes, inside_M),
    )
    return tuple(x.reshape(-1, *x.shape[2:]) for x in _map(chunk, step, *split))


def _far_forward(scale, sizes, step, q_MK, far_NCK, far_NCV, tiles):
    def tile(row_L, block):
        logits_LC = scale * _dot(_take(q_MK, row_L), far_NCK[block].T)
        return _partial_softmax(logits_LC, far_NCV[block])

    partial = _map(tile, step, tiles.row_XP.reshape(sizes.Y, sizes.L), tiles.block_XY)
    return tuple(x.reshape(-1, *x.shape[2:]) for x in partial)


def _join(out_MV, lse_M, max_M, out_PV, lse_P, max_P, place_MJ):
    """Weighs the partial results of each row by their share of the whole softmax."""
    far_lse_MJ = _take_or(lse_P, place_MJ, -jnp.inf)
    top_M = jnp.maximum(lse_M, jnp.max(far_lse_MJ, axis=1))
    joined_M = top_M + jnp.log(jnp.exp(lse_M - top_M) + jnp.sum(jnp.exp(far_lse_MJ - top_M[:, None]), axis=1))
    out_MV = out_MV * jnp.exp(lse_M - joined_M)[:, None]
    for j in range(place_MJ.shape[1]):  # one slot at a time: never [M, J, V]
        out_MV += _take(out_PV, place_MJ[:, j]) * jnp.exp(far_lse_MJ[:, j] - joined_M)[:, None]
    return out_MV, joined_M, jnp.maximum(max_M, jnp.max(_take_or(max_P, place_MJ, -jnp.inf), axis=1))


def _near_backward(scale, sizes, step, rows, near_DCK, near_DCV, inside_M):
    def chunk(q_QK, dout_QV, lse_Q, delta_Q, k_WK, v_WV, inside_Q):
        logits_QW = jnp.where(_reach(sizes, inside_Q), scale * _dot(q_QK, k_WK.T), -jnp.inf)
        return _gradients(scale, logits_QW, q_QK, dout_QV, lse_Q, delta_Q, k_WK, v_WV)

    split = (_windows(sizes, near_DCK), _windows(sizes, near_DCV), _chunks(sizes, inside_M))
    dq_DQK, dk_DWK, dv_DWV = _map(chunk, step, *(_chunks(sizes, x) for x in rows), *split)
    return dq_DQK.reshape(-1, dq_DQK.shape[-1]), _unwindow(sizes, dk_DWK), _unwindow(sizes, dv_DWV)


def _far_backward(scale, sizes, step, rows, far_NCK, far_NCV, tiles):
    q_MK, dout_MV, lse_M, delta_M = rows

    def tile(row_L, block):
        q_LK, k_CK = _take(q_MK, row_L), far_NCK[block]
        lse_L = _take_or(lse_M, row_L, jnp.inf)  # probability 0, hence no gradient, at empty places
        return _gradients(
            scale,
            scale * _dot(q_LK, k_CK.T),
            q_LK,
            _take(dout_MV, row_L),
            lse_L,
            _take(delta_M, row_L),
            k_CK,
            far_NCV[block],
        )

    def add_step(sums, xs):
        row_YL, block_Y = xs
        dq_YLK, *d_YC = jax.vmap(tile)(row_YL, block_Y)
        return tuple(_add_by_block(s, d, block_Y) for s, d in zip(sums, d_YC, strict=True)), dq_YLK

    step = min(step, MAX_STEP_TILES, sizes.Y)
    spare = -sizes.Y % step
    row_YL = jnp.pad(tiles.row_XP.reshape(sizes.Y, sizes.L), ((0, spare), (0, 0)), constant_values=q_MK.shape[0])
    block_Y = jnp.pad(tiles.block_XY, (0, spare), mode="edge")
    zeros = tuple(0 * x.astype(jnp.float32) for x in (far_NCK, far_NCV))
    (dk_NCK, dv_NCV), dq = jax.lax.scan(add_step, zeros, (row_YL.reshape(-1, step, sizes.L), block_Y.reshape(-1, step)))
    dq_PK = dq.reshape(-1, q_MK.shape[1])[: sizes.Y * sizes.L]
    dq_MK = sum(_take_or(dq_PK, tiles.place_XMJ[:, j], 0.0) for j in range(sizes.J))
    return dq_MK, dk_NCK, dv_NCV


def _add_by_block(sum_NC, d_YC, block_Y):
    """Adds each tile's gradient to its block: first within runs of equal blocks, so that no two adds meet."""
    run_Y = jnp.cumsum(jnp.concatenate([jnp.zeros(1, jnp.int32), (block_Y[1:] != block_Y[:-1]).astype(jnp.int32)]))
    member_OY = run_Y == jnp.arange(block_Y.shape[0])[:, None]
    block_O = jnp.max(jnp.where(member_OY, block_Y, -1), axis=1)
    place_O = jnp.where(block_O < 0, sum_NC.shape[0] + jnp.arange(block_Y.shape[0]), block_O)
    d_OC = jnp.einsum("oy,yce->oce", member_OY.astype(jnp.float32), d_YC, precision=jax.lax.Precision.HIGHEST)
    return sum_NC.at[place_O].add(d_OC, mode="drop", unique_indices=True)


def _partial_softmax(logits_QW, v_WV):
    max_Q = jnp.max(logits_QW, axis=-1)
    weight_QW = jnp.exp(logits_QW - max_Q[:, None])
    sum_Q = jnp.sum(weight_QW, axis=-1)
    return _dot(weight_QW.astype(v_WV.dtype), v_WV) / sum_Q[:, None], max_Q + jnp.log(sum_Q), max_Q


def _gradients(scale, logits_QW, q_QK, dout_QV, lse_Q, delta_Q, k_WK, v_WV):
    """dq, dk, dv of one chunk or tile, in float32, from the LSE and delta of whole rows."""
    weight_QW = jnp.exp(logits_QW - lse_Q[:, None])
    dv_WV = _dot(weight_QW.astype(dout_QV.dtype).T, dout_QV)
    dlogits_QW = (scale * weight_QW * (_dot(dout_QV, v_WV.T) - delta_Q[:, None])).astype(q_QK.dtype)
    return _dot(dlogits_QW, k_WK), _dot(dlogits_QW.T, q_QK), dv_WV


def _reach(sizes, inside_Q):
    """The keys of a chunk's window that lie in the row's block and not after the row."""
    position_Q1 = (sizes.W - sizes.C) + jnp.arange(sizes.C * sizes.R)[:, None] // sizes.R
    key_W = jnp.arange(sizes.W)
    return (key_W <= position_Q1) & (key_W >= position_Q1 - inside_Q[:, None])


def _chunks(sizes, x_M):
    return x_M.reshape(sizes.D, -1, *x_M.shape[1:])


def _windows(sizes, x_DC):
    """Each chunk's keys, after those of the chunk before where blocks are not aligned with chunks."""
    return x_DC if sizes.W == sizes.C else jnp.concatenate([x_DC[:-1], x_DC[1:]], axis=1)


def _unwindow(sizes, d_DW):
    """The transpose of `_windows`."""
    if sizes.W == sizes.C:
        return d_DW
    one_more = ((0, 1), (0, 0), (0, 0))
    return jnp.pad(d_DW[:, : sizes.C], one_more) + jnp.pad(d_DW[:, sizes.C :], ((1, 0), (0, 0), (0, 0)))


def _dot(a, b):
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _take(x, index):
    return x.at[index].get(mode="clip")


def _take_or(x, index, fill):
    return x.at[index].get(mode="fill", fill_value=fill)


def _heads_per_step(sizes, X, K, V):
    return max(1, min(X, STEP_PARTIALS // (sizes.Y * sizes.L * max(K, V) + 1)))


def _steps(sizes, q_XMK, near_XDCV):
    """How many heads, and of these how many chunks and tiles, are computed at once."""
    heads = _heads_per_step(sizes, q_XMK.shape[0], q_XMK.shape[-1], near_XDCV.shape[-1])
    chunks = max(1, STEP_LOGITS // (heads * sizes.C * sizes.R * sizes.W))
    return heads, chunks, max(1, STEP_LOGITS // (heads * sizes.L * sizes.C))


def _map(function, step, *xs):
    """vmap, `step` elements at a time."""
    if step >= jax.tree.leaves(xs)[0].shape[0]:
        return jax.vmap(function)(*xs)
    return jax.lax.map(lambda x: function(*x), xs, batch_size=step)
