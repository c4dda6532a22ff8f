"""Mixture of Block Attention as its paper defines it, with T x S arrays: the version to read and to compare
with.

1. Cut each segment into blocks of B tokens. A block's key is the mean of its keys.
2. A query scores the blocks before its own by the inner product with their mean keys (no scale, no bias).
3. It attends to its own block up to itself, and to all tokens of its top_k - 1 best earlier blocks: one
   softmax over the union. The score chooses and does nothing else, so no gradient flows through it.

Source: "MoBA: Mixture of Block Attention for Long-Context LLMs" (arXiv 2502.13189), section 2.2, equations 2
  to 6.

Legend: B batch, T queries, S keys, N blocks, H query heads, G key heads, R = H // G, J = top_k, K query/key
size, V value size.
"""

import jax
import jax.numpy as jnp

from k2jax.kernels.attention.positions import at_positions
from k2jax.kernels.attention.reference import causal_mask, masked_attention, query_positions
from k2jax.kernels.moba.blocks import Attended, Residuals, choose, layout


def moba_attention(q_BTHK, k_BSGK, v_BSGV, *, block_size, top_k, scale, segment_ids=None, q_offset=0):
    """MoBA with T x S memory; arguments as in `k2jax.moba_pallas.moba_attention`."""
    (B, T, H, _), S = q_BTHK.shape, k_BSGK.shape[1]
    where = layout(segment_ids, S, block_size)
    N = -(-S // block_size) if segment_ids is None else S  # with segments, at worst every token is a block
    position_BT = query_positions(q_BTHK, q_offset)
    own_block_BT = jnp.broadcast_to(at_positions(where.block_id_BS, position_BT), (B, T))
    first_block_BT = at_positions(at_positions(where.block_id_BS, where.segment_start_BS), position_BT)

    candidate_BTN = (jnp.arange(N) >= first_block_BT[..., None]) & (jnp.arange(N) < own_block_BT[..., None])
    score_BTHN = gate_scores(q_BTHK, mean_keys(k_BSGK, where.block_id_BS, N))
    earlier_BTHJ = choose(score_BTHN, candidate_BTN[:, :, None], top_k - 1)
    own_BTH1 = jnp.broadcast_to(own_block_BT[:, :, None, None], (B, T, H, 1))
    selected_BTHJ = jnp.concatenate([own_BTH1, earlier_BTHJ], axis=-1)

    chosen_BTHN = jnp.any(selected_BTHJ[..., None] == jnp.arange(N), axis=-2)
    key_block_BS = jnp.broadcast_to(where.block_id_BS, (B, S))
    chosen_BTHS = jnp.take_along_axis(chosen_BTHN, key_block_BS[:, None, None, :], axis=-1)
    mask_BTHS = chosen_BTHS & causal_mask(position_BT, S)[:, :, None]
    out_BTHV, lse_BHT, max_logit_BH = masked_attention(q_BTHK, k_BSGK, v_BSGV, mask_BTHS, scale)
    return Attended(out_BTHV, Residuals(lse_BHT, max_logit_BH, selected_BTHJ.transpose(0, 2, 1, 3)))


def mean_keys(k_BSGK, block_id_BS, N):
    """Mean key of each block, summed in float32 and rounded to the keys' dtype as the official code does."""
    member_BSN = (block_id_BS[..., None] == jnp.arange(N)).astype(jnp.float32)
    member_BSN = jnp.broadcast_to(member_BSN, (k_BSGK.shape[0], *member_BSN.shape[1:]))
    sum_BNGK = jnp.einsum("bsn,bsgk->bngk", member_BSN, k_BSGK.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    count_BN = jnp.maximum(member_BSN.sum(axis=1), 1.0)
    return (sum_BNGK / count_BN[..., None, None]).astype(k_BSGK.dtype)


def gate_scores(q_BTHK, mean_key_BNGK):
    """Inner product, in float32, of each query head with the mean keys of the key head it shares."""
    (B, T, H, K), G = q_BTHK.shape, mean_key_BNGK.shape[2]
    score_BTGRN = jnp.einsum(
        "btgrk,bngk->btgrn",
        q_BTHK.reshape(B, T, G, H // G, K).astype(jnp.float32),
        mean_key_BNGK.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return jax.lax.stop_gradient(score_BTGRN).reshape(B, T, H, -1)
