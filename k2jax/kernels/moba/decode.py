"""MoBA for one new token at a time, over a cache of pages: a page is a block, and its keys' sum is kept beside it.

A page table says where the blocks of each sequence lie, so sequences of any length share one cache. Per step a query
reads the means of its sequence's blocks and the pages of the few that it chooses; what lies in other pages, or behind
the last token, is never used, whatever it is.

Legend: B sequences, N blocks of the longest one, P pages, C tokens of a page, H query heads, G key heads, R = H // G,
J = top_k, K query/key size, V value size.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from k2jax.kernels.moba.blocks import choose


class Pages(NamedTuple):
    """A cache: keys and values of every page, and the float32 sum of its keys so far."""

    k_PCGK: jax.Array
    v_PCGV: jax.Array
    sum_PGK: jax.Array


def empty_pages(num_pages, page_size, num_key_heads, key_size, value_size, dtype) -> Pages:
    """A cache without a token."""
    shape = (num_pages, page_size, num_key_heads)
    sums = jnp.zeros((num_pages, num_key_heads, key_size), jnp.float32)
    return Pages(jnp.zeros((*shape, key_size), dtype), jnp.zeros((*shape, value_size), dtype), sums)


def append(pages: Pages, page_table_BN, length_B, k_BGK, v_BGV) -> Pages:
    """The cache with one more token for each sequence.

    Args:
      page_table_BN: int32, the page of each sequence's blocks. No page may belong to two sequences that write to it.
      length_B: int32, tokens of each sequence so far; its block `length // C` must have a page.
      k_BGK, v_BGV: the token's keys and values, in the cache's type.
    """
    C = pages.k_PCGK.shape[1]
    page_B = jnp.take_along_axis(page_table_BN, (length_B // C)[:, None], axis=1)[:, 0]
    place_B = length_B % C
    # The first token of a page begins its sum: what an earlier owner left there does not matter.
    before_BGK = jnp.where((place_B == 0)[:, None, None], 0.0, pages.sum_PGK[page_B])
    return Pages(
        pages.k_PCGK.at[page_B, place_B].set(k_BGK.astype(pages.k_PCGK.dtype)),
        pages.v_PCGV.at[page_B, place_B].set(v_BGV.astype(pages.v_PCGV.dtype)),
        pages.sum_PGK.at[page_B].set(before_BGK + k_BGK.astype(jnp.float32)),
    )


def moba_decode(q_BHK, pages: Pages, page_table_BN, length_B, *, top_k, scale=None, full=False):
    """Attention of each sequence's last token, whose key and value are in the cache already.

    Args:
      q_BHK: its queries; H is a multiple of the cache's key heads.
      page_table_BN, length_B: as in `append`, with the token counted; a length may be anything from 1 to N * C.
      top_k: blocks it reads, its own included, chosen as by `moba_attention` with `block_size` C. The mean of a block
        is its keys' sum in the order of the tokens, which may round to another neighbour than a sum in one go.
      scale: of the logits; None is K ** -0.5.
      full: read all blocks instead, as the paper's models do when they generate.

    Returns: [B, H, V] in the values' type.

    Raises:
      ValueError: a top_k below 1, or query heads that are no multiple of the key heads.

    Source: "MoBA: Mixture of Block Attention for Long-Context LLMs" (arXiv 2502.13189), section 2.2.
    """
    (B, H, K), (_, C, G, V) = q_BHK.shape, pages.v_PCGV.shape
    if top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1")
    if H % G:
        raise ValueError(f"q has {H} heads and the cache has {G}: the query heads must be a multiple of the key heads")
    N, R = page_table_BN.shape[1], H // G
    scale = K**-0.5 if scale is None else scale
    own_B = (length_B - 1) // C
    q_BGRK = q_BHK.reshape(B, G, R, K)
    if full:
        block_BGRJ = jnp.broadcast_to(jnp.arange(N, dtype=jnp.int32), (B, G, R, N))
        block_BGRJ = jnp.where(block_BGRJ > own_B[:, None, None, None], -1, block_BGRJ)
    else:
        mean_BNGK = (pages.sum_PGK[page_table_BN] / C).astype(pages.k_PCGK.dtype)
        score_BGRN = jnp.einsum(
            "bgrk,bngk->bgrn",
            q_BGRK.astype(jnp.float32),
            mean_BNGK.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        candidate_BN = jnp.arange(N) < own_B[:, None]
        block_BGRJ = choose(score_BGRN, candidate_BN[:, None, None], min(top_k - 1, N))
        own_BGR1 = jnp.broadcast_to(own_B[:, None, None, None], (B, G, R, 1))
        block_BGRJ = jnp.concatenate([own_BGR1, block_BGRJ], axis=-1)

    page_BGRJ = jax.vmap(lambda table_N, block_GRJ: table_N[jnp.maximum(block_GRJ, 0)])(page_table_BN, block_BGRJ)
    head_G11 = jnp.arange(G)[:, None, None]
    k_BGRJCK, v_BGRJCV = (x[page_BGRJ, :, head_G11] for x in (pages.k_PCGK, pages.v_PCGV))
    position_BGRJC = block_BGRJ[..., None] * C + jnp.arange(C)
    reads_BGRJC = (block_BGRJ[..., None] >= 0) & (position_BGRJC < length_B[:, None, None, None, None])
    logits_BGRJC = scale * jnp.einsum("bgrk,bgrjck->bgrjc", q_BGRK, k_BGRJCK, preferred_element_type=jnp.float32)
    logits_BGRJC = jnp.where(reads_BGRJC, logits_BGRJC, -jnp.inf)
    weight_BGRJC = jnp.exp(logits_BGRJC - jnp.max(logits_BGRJC, axis=(-2, -1), keepdims=True))
    # No weight of zero saves a value that is no number.
    v_BGRJCV = jnp.where(reads_BGRJC[..., None], v_BGRJCV, 0)
    out_BGRV = jnp.einsum(
        "bgrjc,bgrjcv->bgrv", weight_BGRJC.astype(v_BGRJCV.dtype), v_BGRJCV, preferred_element_type=jnp.float32
    )
    out_BGRV = out_BGRV / jnp.sum(weight_BGRJC, axis=(-2, -1))[..., None]
    return out_BGRV.reshape(B, H, V).astype(pages.v_PCGV.dtype)
