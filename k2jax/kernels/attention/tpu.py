"""Full causal attention on TPUs: own rows of one block that holds all keys; and what MoBA does with own rows, too.

Heads lie before tokens here, so that a copy of some tokens of one head is one piece.

Legend: B batch, T queries, S keys, H query heads, G key heads, X = B * H, Z = B * G, K query/key size, V value size, E
either. T and S are rounded up to whole steps inside.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from k2jax.kernels.attention.keys_gradient_tpu import Readers, own_keys_gradient, readers
from k2jax.kernels.attention.positions import at_positions, segment_starts
from k2jax.kernels.attention.reference import Attended, query_positions
from k2jax.kernels.attention.tiles_tpu import LANES, MAX_KEYS, MAX_ROWS, Plan, Tiles, attend, own_tiles, rows_gradient

DTYPES = ("bfloat16", "float32")
# Of queries and keys, and of values: the compiler has taken the kernels with these.
HEAD_SIZES = ((64, 64), (128, 128), (192, 128), (256, 256))
# int32 of tables that a core's scalar memory (1 MiB) holds beside what the compiler needs.
MAX_TABLE = 2**17


def refusal(q_shape, k_shape, v_shape, dtype) -> str | None:
    """Why these kernels cannot compute this call, or None."""
    sizes, (B, T) = (q_shape[3], v_shape[3]), q_shape[:2]
    if jnp.dtype(dtype).name not in DTYPES:
        return f"q, k and v are {dtype}, and the kernels take {DTYPES}"
    if sizes not in HEAD_SIZES:
        return f"heads of sizes {sizes}: built are {HEAD_SIZES}"
    tiles = 4 * B * -(-max(T, k_shape[1]) // MAX_ROWS)
    if tiles > MAX_TABLE:
        return f"{B} rows of {max(T, k_shape[1])} tokens need tables of {tiles} numbers, more than {MAX_TABLE}"
    return None


def attention(q_BTHK, k_BSGK, v_BSGV, *, scale, segment_ids=None, q_offset=0, interpret=None):
    """Causal attention by TPU kernels; arguments as in `k2jax.kernels.attention.attention`.

    interpret: as in `tiles_tpu.attend`.

    Raises ValueError where the kernels cannot do it (`refusal`).
    """
    reason = refusal(q_BTHK.shape, k_BSGK.shape, v_BSGV.shape, q_BTHK.dtype)
    if reason:
        raise ValueError(reason)
    (B, T, H, _), (S, G) = q_BTHK.shape, k_BSGK.shape[1:3]
    known = q_offset if segment_ids is None and isinstance(q_offset, int) else None
    shape = own_shape(T, S, S, H, H // G, known)
    start_BS = jnp.zeros((1, S), jnp.int32) if segment_ids is None else segment_starts(segment_ids)
    own = own_tables(shape, start_BS, q_BTHK, q_offset)
    q_XTK = heads_first(q_BTHK, shape.padded_rows)
    k_ZSK, v_ZSV = (heads_first(x, shape.padded_keys) for x in (k_BSGK, v_BSGV))
    out_XTV, lse_XT, max_XT = _attention((float(scale), shape, interpret), q_XTK, k_ZSK, v_ZSV, own)
    max_BH = jnp.max(max_XT[:, :T], axis=1).reshape(B, H)
    return Attended(tokens_first(out_XTV, B, T), lse_XT[:, :T].reshape(B, H, T), max_BH)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(settings, q_XTK, k_ZSK, v_ZSV, own):
    """out_XTV; lse_XT and every row's largest logit max_XT, in float32 without a gradient."""
    return _forward(settings, q_XTK, k_ZSK, v_ZSV, own)[0]


def _forward(settings, q_XTK, k_ZSK, v_ZSV, own):
    scale, shape, interpret = settings
    out_XTV, lse_XT, max_XT = attend(scale, shape.plan, own.tiles, q_XTK, k_ZSK, v_ZSV, interpret=interpret)
    return (out_XTV, lse_XT, max_XT), (q_XTK, k_ZSK, v_ZSV, out_XTV, lse_XT, own)


def _backward(settings, saved, cotangents):
    scale, shape, interpret = settings
    q_XTK, k_ZSK, v_ZSV, out_XTV, lse_XT, own = saved
    rows = rows_of(shape, q_XTK, out_XTV, lse_XT, cotangents[0])
    dq_XTK = rows_gradient(scale, shape.plan, own.tiles, *rows, k_ZSK, v_ZSV, interpret=interpret)
    return dq_XTK, *own_keys(scale, shape, own, rows, k_ZSK, v_ZSV, interpret=interpret), None


_attention.defvjp(_forward, _backward)


# --- rows that read their own block -------------------------------------------------------------------------------


class OwnShape(NamedTuple):
    """The static numbers of rows at consecutive positions."""

    plan: Plan
    tiles_per_unit: int  # the most tiles of rows that read one step of keys
    num_rows: int
    padded_rows: int
    padded_keys: int


class Own(NamedTuple):
    """Their tables."""

    tiles: Tiles
    readers: Readers


def own_shape(T, S, block_size, H, R, known_offset, padded_keys=None) -> OwnShape:
    """How rows that read at most `block_size` keys up to themselves are cut.

    known_offset: the position of the first one, where that is static and blocks begin at multiples of their size.
    padded_keys: what S is rounded up to, a multiple of the step; None chooses.
    """
    L, padded_rows = even_steps(T, MAX_ROWS)
    N, _ = even_steps(min(block_size, S), MAX_KEYS)
    padded_keys = padded_keys or -(-S // N) * N
    if known_offset is None:
        steps, tiles = (block_size + L - 2) // N + 2, (block_size + N - 2) // L + 2
    else:
        row_Y = known_offset + np.arange(0, padded_rows, L)
        last_Y = np.minimum(row_Y + L, S) - 1
        steps = int((last_Y // N - row_Y // block_size * block_size // N).max()) + 1
        key_U = np.arange(0, padded_keys, N)
        end_U = np.minimum((key_U + N - 1) // block_size * block_size + block_size - known_offset, padded_rows)
        tiles = int((-(-end_U // L) - np.maximum(key_U - known_offset, 0) // L).max())
    plan = Plan(L, N, max(1, min(steps, padded_keys // N)), H, R)
    return OwnShape(plan, max(1, min(tiles, padded_rows // L)), T, padded_rows, padded_keys)


def even_steps(length: int, most: int) -> tuple[int, int]:
    """Steps of equal length, whole lanes and at most `most` each, and the sum of them."""
    steps = -(-length // most)
    step = -(-length // (steps * LANES)) * LANES
    return step, step * steps


def own_tables(shape: OwnShape, start_BS, q_BTHK, q_offset) -> Own:
    """From the first key that each position sees, [B or 1, S]."""
    B = q_BTHK.shape[0]
    position_BT = jnp.broadcast_to(query_positions(q_BTHK, q_offset)[:, :1], (B, 1)) + jnp.arange(shape.padded_rows)
    start_BT = at_positions(start_BS, position_BT)
    tiles = own_tiles(start_BT, position_BT[:, 0], shape.num_rows, shape.plan)
    return Own(tiles, readers(tiles.start_B1T[:, 0], position_BT[:, 0], shape.padded_keys, shape.plan))


def heads_first(x_BTHE, length):
    """[B * H, length, E], zeros behind the last token."""
    x_BTHE = jnp.pad(x_BTHE, ((0, 0), (0, length - x_BTHE.shape[1]), (0, 0), (0, 0)))
    return x_BTHE.swapaxes(1, 2).reshape(-1, length, x_BTHE.shape[3])


def tokens_first(x_XTE, B, T):
    """The inverse, without the padding."""
    return x_XTE.reshape(B, -1, *x_XTE.shape[1:])[:, :, :T].swapaxes(1, 2)


def rows_of(shape: OwnShape, q_XTK, out_XTV, lse_XT, dout_XTV):
    """(q, dout, lse, delta) as `tiles_tpu.rows_gradient` takes them; probabilities are 0 behind the last query."""
    is_row_T = jnp.arange(shape.padded_rows) < shape.num_rows
    delta_XT = jnp.sum(out_XTV.astype(jnp.float32) * dout_XTV.astype(jnp.float32), axis=-1)
    lse_XT, delta_XT = jnp.where(is_row_T, lse_XT, jnp.inf), jnp.where(is_row_T, delta_XT, 0.0)
    return q_XTK, dout_XTV.astype(q_XTK.dtype), lse_XT, delta_XT


def own_keys(scale, shape: OwnShape, own: Own, rows, k_ZSK, v_ZSV, **options):
    """dk_ZSK, dv_ZSV from rows that read their own block; options as of `own_keys_gradient`."""
    arguments = (own.readers, own.tiles.start_B1T, rows, k_ZSK, v_ZSV)
    return own_keys_gradient(scale, shape.plan, shape.tiles_per_unit, *arguments, **options)
