"""MoBA on Hopper GPUs: selection, two attention streams and their exact backward, with the hot loops in Pallas.

1. `gate_sm90` chooses each row's earlier blocks without ever writing a score to memory.
2. `grouping` sorts the (row, block) pairs by block and cuts them into tiles; XLA gathers the tiles' queries.
3. `attend_sm90` computes the tiles, and each block's own rows, which lie together already.
4. The partial results of a row are gathered back and joined by their log-sum-exp, in the order of its choices.
The backward recomputes probabilities from the joined log-sum-exp: `keys_gradient_sm90` sums what every row that read a
block sends back, `attend_sm90.rows_gradient` computes each pair's part of dq, gathered back like the output. Nothing is
ever added in an order that could change between runs.

Work space grows with rows times top_k, so heads are taken in groups of at most `PAIRS` pairs.

Legend: B batch, T queries, S keys, H query heads, G key heads, R = H // G, X = B * G (or a group of these), C block
size, D blocks, M = D * C * R rows, J earlier blocks per row, P places of all tiles, K query/key size, V value size.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from k2jax.kernels.moba.attend_sm90 import TILE, Tiles, attend, rows_gradient
from k2jax.kernels.moba.blocks import Attended, Residuals
from k2jax.kernels.moba.gate_sm90 import MAX_CHOSEN, choose_blocks_sm90
from k2jax.kernels.moba.grouping import Groups, group, num_tiles
from k2jax.kernels.moba.keys_gradient_sm90 import keys_gradient

# Pairs whose gathered queries and partial results are in memory at once: 2 GiB at 2 * 256 bytes each, 3 backward.
PAIRS = 2**22
# Of queries and keys, and of values.
HEAD_SIZES = ((64, 64), (128, 128), (192, 128))


def refusal(q_shape, k_shape, v_shape, dtype, *, block_size, top_k, scale, segmented, q_offset) -> str | None:
    """Why these kernels cannot compute this call, or None."""
    (_, T, _, K), S, V = q_shape, k_shape[1], v_shape[3]
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"q, k and v are {dtype}, and the kernels take bfloat16 or float16"
    if (K, V) not in HEAD_SIZES:
        return f"heads of sizes {(K, V)}: built are {HEAD_SIZES}"
    if block_size % 128:
        return f"block_size={block_size} is no multiple of 128"
    if segmented:
        return "segment_ids are not built"
    if T != S or not isinstance(q_offset, int) or q_offset != 0:
        return f"{T} queries at q_offset={q_offset} of {S} keys: only whole sequences are built"
    if top_k - 1 > MAX_CHOSEN:
        return f"top_k={top_k} is more than {MAX_CHOSEN + 1}"
    if scale <= 0:
        return f"scale={scale} is not positive"
    return None


def moba_attention(
    q_BTHK, k_BSGK, v_BSGV, *, block_size, top_k, scale, segment_ids=None, q_offset=0, num_sms=None, interpret=None
):
    """MoBA by Hopper kernels; arguments as in `k2jax.moba_pallas.moba_attention`.

    Raises ValueError where the kernels cannot do it (`refusal`).
    """
    (B, T, H, _), G = q_BTHK.shape, k_BSGK.shape[2]
    reason = refusal(
        q_BTHK.shape, k_BSGK.shape, v_BSGV.shape, q_BTHK.dtype, block_size=block_size, top_k=top_k, scale=scale,
        segmented=segment_ids is not None, q_offset=q_offset,
    )  # fmt: skip
    if reason:
        raise ValueError(reason)
    C, R = block_size, H // G
    D = -(-T // C)
    settings = Settings(float(scale), C, R, T, D, min(top_k - 1, D - 1), num_sms, interpret)
    out_BTHV, lse_BHT, max_BH, winner_BGJM = _attention(settings, q_BTHK, k_BSGK, v_BSGV)
    own_BHT1 = jnp.broadcast_to((jnp.arange(T, dtype=jnp.int32) // C)[:, None], (B, H, T, 1))
    winner_BGJTR = winner_BGJM.reshape(B, G, settings.J, D * C, R)[:, :, :, :T]
    earlier_BHTJ = winner_BGJTR.transpose(0, 1, 4, 3, 2).reshape(B, H, T, settings.J)
    earlier_BHTJ = jnp.pad(earlier_BHTJ, ((0, 0),) * 3 + ((0, top_k - 1 - settings.J),), constant_values=-1)
    selected_BHTJ = jnp.concatenate([own_BHT1, earlier_BHTJ], axis=-1)
    return Attended(out_BTHV, Residuals(lse_BHT, max_BH, selected_BHTJ))


class Settings(NamedTuple):
    """Static numbers of one call; see the legend."""

    scale: float
    C: int
    R: int
    T: int
    D: int
    J: int
    num_sms: int | None
    interpret: Any

    @property
    def options(self):
        return {"num_sms": self.num_sms, "interpret": self.interpret}


# --- all heads, a few at a time -----------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(settings, q_BTHK, k_BSGK, v_BSGV):
    """out_BTHV; lse_BHT, each head's largest logit max_BH (float32) and winner_BGJM without a gradient."""
    return _forward(settings, q_BTHK, k_BSGK, v_BSGV)[0]


def _forward(settings, q_BTHK, k_BSGK, v_BSGV):
    R = settings.R

    def heads(q_BTHK, k_BSGK, v_BSGV):
        B, _, H, _ = q_BTHK.shape
        q_XMK, k_XSK, v_XSV = (_rows(x, r, settings) for x, r in ((q_BTHK, R), (k_BSGK, 1), (v_BSGV, 1)))
        winner_XJM = _choose(settings, q_XMK, k_XSK)
        out_XMV, lse_XM, max_XR = _forward_heads(settings, winner_XJM, q_XMK, k_XSK, v_XSV)
        out_BTHV, lse_BTH = (_unrow(x, R, B, settings) for x in (out_XMV, lse_XM))
        winner_BGJM = winner_XJM.reshape(B, H // R, *winner_XJM.shape[1:])
        return out_BTHV, lse_BTH.swapaxes(1, 2), max_XR.reshape(B, H), winner_BGJM

    out = _by_heads(settings, heads, (2, 2, 2), (2, 1, 1, 1), q_BTHK, k_BSGK, v_BSGV)
    return out, (q_BTHK, k_BSGK, v_BSGV, *out[:2], out[3])


def _backward(settings, saved, cotangents):
    R = settings.R

    def heads(q_BTHK, k_BSGK, v_BSGV, out_BTHV, lse_BHT, winner_BGJM, dout_BTHV):
        delta_BTH = jnp.sum(out_BTHV.astype(jnp.float32) * dout_BTHV.astype(jnp.float32), axis=-1)
        rows = (q_BTHK, dout_BTHV.astype(q_BTHK.dtype), lse_BHT.swapaxes(1, 2), delta_BTH)
        rows = [_rows(x, R, settings) for x in rows]
        keys = [_rows(x, 1, settings) for x in (k_BSGK, v_BSGV)]
        winner_XJM = winner_BGJM.reshape(len(keys[0]), *winner_BGJM.shape[2:])
        gradients = _backward_heads(settings, winner_XJM, *rows, *keys)
        return tuple(_unrow(x, r, len(q_BTHK), settings) for x, r in zip(gradients, (R, 1, 1), strict=True))

    return _by_heads(settings, heads, (2, 2, 2, 2, 1, 1, 2), (2, 2, 2), *saved, cotangents[0])


_attention.defvjp(_forward, _backward)


def _by_heads(settings, fn, axes, out_axes, *xs):
    """fn(*xs) for as many batch rows and key heads at a time as have at most PAIRS pairs.

    axes, out_axes: where every argument and result has its heads; rows are on axis 0.
    """
    B, G = xs[0].shape[0], xs[1].shape[2]
    pairs = max(1, settings.J * settings.D * settings.C * settings.R)

    def divisor(n, most):
        return max(d for d in range(1, n + 1) if n % d == 0 and d <= max(1, most))

    heads = divisor(G, PAIRS // pairs)
    rows = divisor(B, PAIRS // pairs // G)
    steps = (B // rows) * (G // heads)
    if steps == 1:
        return fn(*xs)

    def part(x, axis, i):
        """Start and size of step i's part."""
        share = x.shape[axis] // G * heads
        start = [0] * x.ndim
        start[0], start[axis] = i // (G // heads) * rows, i % (G // heads) * share
        return start, [rows if a == 0 else share if a == axis else n for a, n in enumerate(x.shape)]

    def some(i):
        return fn(*(jax.lax.dynamic_slice(x, *part(x, axis, i)) for x, axis in zip(xs, axes, strict=True)))

    def add(i, outs):
        new = some(i)
        return tuple(
            jax.lax.dynamic_update_slice(x, y, part(x, axis, i)[0])
            for x, y, axis in zip(outs, new, out_axes, strict=True)
        )

    def whole(x, axis):
        return jnp.zeros(
            [B if a == 0 else n * (G // heads) if a == axis else n for a, n in enumerate(x.shape)], x.dtype
        )

    outs = tuple(whole(x, axis) for x, axis in zip(jax.eval_shape(some, 0), out_axes, strict=True))
    return jax.lax.fori_loop(0, steps, add, outs)


def _rows(x_BTH, R, settings):
    """[B, T, H, ...] to [X, M, ...]: the R heads of a key head side by side, T padded with zeros."""
    B, T, H, *E = x_BTH.shape
    padded = settings.D * settings.C
    x_BTH = jnp.pad(x_BTH, [(0, 0), (0, padded - T)] + [(0, 0)] * (x_BTH.ndim - 2))
    return jnp.swapaxes(x_BTH.reshape(B, padded, H // R, R, *E), 1, 2).reshape(-1, padded * R, *E)


def _unrow(x_XM, R, B, settings):
    """The inverse of `_rows`."""
    (X, M), E = x_XM.shape[:2], x_XM.shape[2:]
    x_BGTR = x_XM.reshape(B, X // B, M // R, R, *E)[:, :, : settings.T]
    return jnp.swapaxes(x_BGTR, 1, 2).reshape(B, settings.T, X // B * R, *E)


# --- the heads of one step ----------------------------------------------------------------------------------------


def _choose(settings, q_XMK, k_XSK):
    (X, _, K), M = k_XSK.shape, q_XMK.shape[1]
    if not settings.J:
        return jnp.zeros((X, 0, M), jnp.int32)
    mean_XDK = jnp.mean(k_XSK.reshape(X, settings.D, settings.C, K), axis=2, dtype=jnp.float32)
    # Rounded, as the official code does before the product.
    mean_XDK = mean_XDK.astype(k_XSK.dtype)
    rows_per_block = settings.C * settings.R
    winner_XJM = choose_blocks_sm90(q_XMK, mean_XDK, settings.J, rows_per_block=rows_per_block, **settings.options)
    return jnp.where(jnp.arange(M) < settings.T * settings.R, winner_XJM, -1)


def _groups(settings, winner_XJM) -> Groups:
    X, J, _ = winner_XJM.shape
    pairs = X * settings.C * settings.R * sum(min(J, n) for n in range(settings.D))
    return group(winner_XJM, settings.D, TILE, num_tiles(pairs, X * settings.D, TILE))


def _forward_heads(settings, winner_XJM, q_XMK, k_XSK, v_XSV):
    X, J, M = winner_XJM.shape
    scale, C, R = settings.scale, settings.C, settings.R
    q_AK, k_SK, v_SV = (x.reshape(-1, x.shape[-1]) for x in (q_XMK, k_XSK, v_XSV))
    out_AV, lse_A, max_A = attend(Tiles(C, R), scale, q_AK, k_SK, v_SV, **settings.options)
    max_XR = jnp.max(max_A.reshape(X, M)[:, : settings.T * R].reshape(X, -1, R), axis=1)
    if J:
        groups = _groups(settings, winner_XJM)
        q_PK = _gather(q_AK, groups.row_P)
        far = attend(Tiles(C), scale, q_PK, k_SK, v_SV, groups.block_Y, groups.used_1, **settings.options)
        place_JA = groups.place_XJM.swapaxes(0, 1).reshape(J, -1)
        out_AV, lse_A = _join(out_AV, lse_A, *far[:2], place_JA)
        max_XR = jnp.maximum(max_XR, _largest(far[2], groups.row_P, X, M, R))
    return out_AV.reshape(X, M, -1), lse_A.reshape(X, M), max_XR


def _join(out_AV, lse_A, out_PV, lse_P, place_JA):
    """Weighs the partial results of each row by their share of the whole softmax, its own block's first."""
    lse_JA = lse_P.at[place_JA].get(mode="fill", fill_value=-jnp.inf)
    top_A = jnp.maximum(lse_A, jnp.max(lse_JA, axis=0))
    joined_A = top_A + jnp.log(jnp.exp(lse_A - top_A) + jnp.sum(jnp.exp(lse_JA - top_A), axis=0))
    sum_AV = out_AV * jnp.exp(lse_A - joined_A)[:, None]
    for place_A, lse_part_A in zip(place_JA, lse_JA, strict=True):  # one slot at a time: never [J, A, V]
        sum_AV += _gather(out_PV, place_A) * jnp.exp(lse_part_A - joined_A)[:, None]
    return sum_AV.astype(out_AV.dtype), joined_A


def _largest(max_P, row_P, X, M, R):
    """The largest logit of each query head. A tile's rows are of one key head, so all but a few steps are dense."""
    max_YL, row_YL = max_P.reshape(-1, TILE), row_P.reshape(-1, TILE)
    head_R11 = jnp.arange(R)[:, None, None]
    max_RY = jnp.max(jnp.where((row_YL >= 0) & (row_YL % R == head_R11), max_YL, -jnp.inf), axis=-1)
    x_Y = jnp.max(row_YL, axis=1) // M  # -1 for a tile that is empty
    is_x_XY = x_Y == jnp.arange(X)[:, None]
    return jnp.max(jnp.where(is_x_XY[:, None], max_RY, -jnp.inf), axis=-1)


def _backward_heads(settings, winner_XJM, q_XMK, dout_XMV, lse_XM, delta_XM, k_XSK, v_XSV):
    X, J, M = winner_XJM.shape
    scale, C, R = settings.scale, settings.C, settings.R
    k_SK, v_SV = (x.reshape(-1, x.shape[-1]) for x in (k_XSK, v_XSV))
    own = (q_XMK.reshape(X * M, -1), dout_XMV.reshape(X * M, -1), lse_XM.reshape(-1), delta_XM.reshape(-1))
    dq_AK = rows_gradient(Tiles(C, R), scale, *own, k_SK, v_SV, **settings.options)
    chosen, span_Z2 = None, jnp.zeros((X * settings.D, 2), jnp.int32)
    if J:
        groups = _groups(settings, winner_XJM)
        span_Z2 = groups.span_Z2
        q_AK, dout_AV, lse_A, delta_A = own
        chosen = (
            _gather(q_AK, groups.row_P),
            _gather(dout_AV, groups.row_P),
            jnp.where(groups.row_P < 0, jnp.inf, lse_A[groups.row_P]),  # probability 0 at empty places
            delta_A[groups.row_P],
        )
        tables = (groups.block_Y, groups.used_1)
        dq_PK = rows_gradient(Tiles(C), scale, *chosen, k_SK, v_SV, *tables, **settings.options)
        dq_AK = dq_AK.astype(jnp.float32)
        for place_A in groups.place_XJM.swapaxes(0, 1).reshape(J, -1):
            dq_AK += _gather(dq_PK, place_A)
        dq_AK = dq_AK.astype(q_XMK.dtype)
    dk_SK, dv_SV = keys_gradient(
        scale, k_SK, v_SV, own, chosen, span_Z2, block_size=C, heads_per_key=R, num_heads=X,
        interpret=settings.interpret,
    )  # fmt: skip
    return dq_AK.reshape(q_XMK.shape), dk_SK.reshape(k_XSK.shape), dv_SV.reshape(v_XSV.shape)


def _gather(x_AE, place):
    """Rows of x; zeros where the place is none, be it negative or behind the end: what lies there is undefined."""
    return x_AE.at[jnp.where(place < 0, x_AE.shape[0], place)].get(mode="fill", fill_value=0)
