"""Full causal attention on Hopper GPUs: the tiles and gradients of one block that holds all keys.

Legend: B batch, T queries = S keys, H query heads, G key heads, K query/key size, V value size. Vectors [B, H, T] are
rounded up to whole tiles inside.
"""

import functools

import jax
import jax.numpy as jnp

from k2jax.kernels.attention.keys_gradient_sm90 import keys_gradient
from k2jax.kernels.attention.reference import Attended
from k2jax.kernels.attention.tiles_sm90 import DTYPES, HEAD_SIZES, TILE, attend, padded, rows_gradient


def refusal(q_shape, k_shape, v_shape, dtype, *, scale, segmented, q_offset) -> str | None:
    """Why these kernels cannot compute this call, or None."""
    T, S, sizes = q_shape[1], k_shape[1], (q_shape[3], v_shape[3])
    if jnp.dtype(dtype).name not in DTYPES:
        return f"q, k and v are {dtype}, and the kernels take {DTYPES}"
    if sizes not in HEAD_SIZES:
        return f"heads of sizes {sizes}: built are {HEAD_SIZES}"
    if S < TILE:
        return f"{S} keys are fewer than a tile of {TILE}"
    if segmented:
        return "segment_ids are not built"
    if T != S or not isinstance(q_offset, int) or q_offset != 0:
        return f"{T} queries at q_offset={q_offset} of {S} keys: only whole sequences are built"
    if scale <= 0:
        return f"scale={scale} is not positive"
    return None


def attention(q_BTHK, k_BSGK, v_BSGV, *, scale, segment_ids=None, q_offset=0, num_sms=None, interpret=None):
    """Causal attention by Hopper kernels; arguments as in `k2jax.kernels.attention.attention`.

    num_sms, interpret: as in `tiles_sm90.attend`.

    Raises ValueError where the kernels cannot do it (`refusal`).
    """
    shapes = (q_BTHK.shape, k_BSGK.shape, v_BSGV.shape)
    reason = refusal(*shapes, q_BTHK.dtype, scale=scale, segmented=segment_ids is not None, q_offset=q_offset)
    if reason:
        raise ValueError(reason)
    T = q_BTHK.shape[1]
    q_BTHK, k_BSGK, v_BSGV = (whole_groups(x) for x in (q_BTHK, k_BSGK, v_BSGV))
    out_BTHV, lse_BHT, max_BH = _attention((float(scale), T, num_sms, interpret), q_BTHK, k_BSGK, v_BSGV)
    return Attended(out_BTHV[:, :T], lse_BHT[..., :T], max_BH)


def whole_groups(x_BTHE):
    """x with zeros behind its last token up to a multiple of 8, since copies swizzle rows in groups of eight."""
    return jnp.pad(x_BTHE, ((0, 0), (0, -x_BTHE.shape[1] % 8), (0, 0), (0, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(settings, q_BTHK, k_BSGK, v_BSGV):
    """out_BTHV; lse_BHT and each head's largest logit max_BH, in float32 without a gradient."""
    return _forward(settings, q_BTHK, k_BSGK, v_BSGV)[0]


def _forward(settings, q_BTHK, k_BSGK, v_BSGV):
    scale, num_tokens, num_sms, interpret = settings
    T = q_BTHK.shape[1]
    out_BTHV, lse_BHT, max_BHT = attend(scale, padded(T), q_BTHK, k_BSGK, v_BSGV, num_sms=num_sms, interpret=interpret)
    lse_BHT = lse_BHT[..., :T]
    return (out_BTHV, lse_BHT, jnp.max(max_BHT[..., :num_tokens], axis=-1)), (q_BTHK, k_BSGK, v_BSGV, out_BTHV, lse_BHT)


def _backward(settings, saved, cotangents):
    scale, _, num_sms, interpret = settings
    q_BTHK, k_BSGK, v_BSGV, out_BTHV, lse_BHT = saved
    own = own_rows(q_BTHK, out_BTHV, lse_BHT, cotangents[0])
    block_size = padded(q_BTHK.shape[1])
    dq_BTHK = rows_gradient(scale, block_size, *own, k_BSGK, v_BSGV, num_sms=num_sms, interpret=interpret)
    return dq_BTHK, *keys_gradient(scale, block_size, own, k_BSGK, v_BSGV, interpret=interpret)


_attention.defvjp(_forward, _backward)


def own_rows(q_BTHK, out_BTHV, lse_BHT, dout_BTHV):
    """(q, dout, lse, delta) as `tiles_sm90.rows_gradient` takes them; probabilities are 0 behind the last query."""
    delta_BTH = jnp.sum(out_BTHV.astype(jnp.float32) * dout_BTHV.astype(jnp.float32), axis=-1)
    T = q_BTHK.shape[1]
    to_tile = ((0, 0), (0, 0), (0, padded(T) - T))
    lse_BHT = jnp.pad(lse_BHT, to_tile, constant_values=jnp.inf)
    return q_BTHK, dout_BTHV.astype(q_BTHK.dtype), lse_BHT, jnp.pad(delta_BTH.swapaxes(1, 2), to_tile)
