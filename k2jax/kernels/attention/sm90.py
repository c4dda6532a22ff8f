"""Full causal attention on Hopper GPUs: the tiles and gradients of one block that holds all keys.

The gradient computes every pair of tokens once where `fused_gradient` is built, elsewhere twice: for queries, for keys.

Legend: B batch, T queries = S keys, H query heads, G key heads, K query/key size, V value size. Vectors [B, H, T] are
rounded up to whole tiles inside.
"""

import functools

import jax
import jax.numpy as jnp

from k2jax.kernels.attention.fused_gradient_sm90 import fused_gradient, is_built
from k2jax.kernels.attention.keys_gradient_sm90 import keys_gradient
from k2jax.kernels.attention.positions import at_positions, segment_starts
from k2jax.kernels.attention.reference import Attended, query_positions
from k2jax.kernels.attention.tiles_sm90 import DTYPES, HEAD_SIZES, TILE, attend, padded, rows_gradient, starts_of


def refusal(q_shape, v_shape, dtype, *, scale) -> str | None:
    """Why these kernels cannot compute this call, or None."""
    T, sizes = q_shape[1], (q_shape[3], v_shape[3])
    if jnp.dtype(dtype).name not in DTYPES:
        return f"q, k and v are {dtype}, and the kernels take {DTYPES}"
    if sizes not in HEAD_SIZES:
        return f"heads of sizes {sizes}: built are {HEAD_SIZES}"
    if T < TILE:
        return f"{T} queries are fewer than a tile of {TILE}"
    if scale <= 0:
        return f"scale={scale} is not positive"
    return None


def attention(q_BTHK, k_BSGK, v_BSGV, *, scale, segment_ids=None, q_offset=0, num_sms=None, interpret=None):
    """Causal attention by Hopper kernels; arguments as in `k2jax.kernels.attention.attention`.

    num_sms, interpret: as in `tiles_sm90.attend`.

    Raises ValueError where the kernels cannot do it (`refusal`).
    """
    reason = refusal(q_BTHK.shape, v_BSGV.shape, q_BTHK.dtype, scale=scale)
    if reason:
        raise ValueError(reason)
    T, S = q_BTHK.shape[1], k_BSGK.shape[1]
    q_BTHK, k_BSGK, v_BSGV = (whole_groups(x) for x in (q_BTHK, k_BSGK, v_BSGV))
    starts = None
    if not is_whole(T, S, segment_ids, q_offset):
        start_BS = jnp.zeros((1, S), jnp.int32) if segment_ids is None else segment_starts(segment_ids)
        starts = starts_at(start_BS, q_BTHK, T, q_offset)
    settings = (float(scale), T, num_sms, interpret)
    out_BTHV, lse_BHT, max_BH = _attention(settings, q_BTHK, k_BSGK, v_BSGV, starts)
    return Attended(out_BTHV[:, :T], lse_BHT[..., :T], max_BH)


def working_numbers(q_shape, v_shape):
    """Numbers of 32 bits that the backward holds beyond inputs and outputs: vectors, and dq where it is added to."""
    B, T, H, K = q_shape
    return B * H * T * (4 + (K if is_built(q_shape, v_shape) else 0))


def whole_groups(x_BTHE):
    """x with zeros behind its last token up to a multiple of 8, since copies swizzle rows in groups of eight."""
    return jnp.pad(x_BTHE, ((0, 0), (0, -x_BTHE.shape[1] % 8), (0, 0), (0, 0)))


def is_whole(T, S, segment_ids, q_offset):
    """Whether this is one document whose queries lie at the keys' positions, as far as can be told while tracing."""
    return segment_ids is None and T == S and isinstance(q_offset, int) and q_offset == 0


def starts_at(start_BS, q_BTHK, num_tokens, q_offset):
    """`Starts` of queries, of which `num_tokens` are real, from the first key that each position sees, [B or 1, S]."""
    B, T = q_BTHK.shape[:2]
    position_BT = jnp.broadcast_to(query_positions(q_BTHK, q_offset), (B, T))
    start_BT = at_positions(start_BS, position_BT)
    start_BT = jnp.where(jnp.arange(T) < num_tokens, start_BT, position_BT)
    return starts_of(start_BT, q_offset)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(settings, q_BTHK, k_BSGK, v_BSGV, starts):
    """out_BTHV; lse_BHT and each head's largest logit max_BH, in float32 without a gradient."""
    return _forward(settings, q_BTHK, k_BSGK, v_BSGV, starts)[0]


def _forward(settings, q_BTHK, k_BSGK, v_BSGV, starts):
    scale, num_tokens, num_sms, interpret = settings
    T = q_BTHK.shape[1]
    options = {"starts": starts, "num_sms": num_sms, "interpret": interpret}
    out_BTHV, lse_BHT, max_BHT = attend(scale, padded(k_BSGK.shape[1]), q_BTHK, k_BSGK, v_BSGV, **options)
    lse_BHT = lse_BHT[..., :T]
    saved = (q_BTHK, k_BSGK, v_BSGV, out_BTHV, lse_BHT, starts)
    return (out_BTHV, lse_BHT, jnp.max(max_BHT[..., :num_tokens], axis=-1)), saved


def _backward(settings, saved, cotangents):
    scale, _, num_sms, interpret = settings
    q_BTHK, k_BSGK, v_BSGV, out_BTHV, lse_BHT, starts = saved
    own = own_rows(q_BTHK, out_BTHV, lse_BHT, cotangents[0])
    if is_built(q_BTHK.shape, v_BSGV.shape):
        return *fused_gradient(scale, own, k_BSGK, v_BSGV, starts=starts, interpret=interpret), None
    block_size, options = padded(k_BSGK.shape[1]), {"starts": starts, "interpret": interpret}
    dq_BTHK = rows_gradient(scale, block_size, *own, k_BSGK, v_BSGV, num_sms=num_sms, **options)
    return dq_BTHK, *keys_gradient(scale, block_size, own, k_BSGK, v_BSGV, **options), None


_attention.defvjp(_forward, _backward)


def own_rows(q_BTHK, out_BTHV, lse_BHT, dout_BTHV):
    """(q, dout, lse, delta) as `tiles_sm90.rows_gradient` takes them; probabilities are 0 behind the last query."""
    delta_BTH = jnp.sum(out_BTHV.astype(jnp.float32) * dout_BTHV.astype(jnp.float32), axis=-1)
    T = q_BTHK.shape[1]
    to_tile = ((0, 0), (0, 0), (0, padded(T) - T))
    lse_BHT = jnp.pad(lse_BHT, to_tile, constant_values=jnp.inf)
    return q_BTHK, dout_BTHV.astype(q_BTHK.dtype), lse_BHT, jnp.pad(delta_BTH.swapaxes(1, 2), to_tile)
