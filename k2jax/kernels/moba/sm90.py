"""MoBA on Hopper GPUs: selection, two attention streams and their exact backward, with the hot loops in Pallas.

1. `gate_sm90` chooses each query's earlier blocks without ever writing a score to memory.
2. `grouping` sorts the (query, block) pairs by block and cuts them into tiles; XLA gathers the tiles' queries.
3. `attention.tiles_sm90` computes the tiles, and the queries against their own blocks as they lie.
4. The partial results of a query are gathered back and joined by their log-sum-exp, in the order of its choices.
The backward recomputes probabilities from the joined log-sum-exp: `attention.keys_gradient_sm90` sums what every query
that read a block sends back, `attention.tiles_sm90` computes each pair's part of dq, gathered back like the output.
Nothing is ever added in an order that could change between runs.

Work space grows with queries times top_k, so heads are taken in groups of at most `PAIRS` pairs.

Legend: B batch, T queries = S keys, H query heads, G key heads, R = H // G, D blocks, J earlier blocks per query, P
places of all tiles, K query/key size, V value size. Vectors [B, H, T] and winners are rounded up to whole tiles.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from k2jax.kernels.attention.keys_gradient_sm90 import KeyHeads, keys_gradient
from k2jax.kernels.attention.sm90 import own_rows, whole_groups
from k2jax.kernels.attention.sm90 import refusal as attention_refusal
from k2jax.kernels.attention.tiles_sm90 import TILE, attend, padded, rows_gradient
from k2jax.kernels.moba.blocks import Attended, Residuals
from k2jax.kernels.moba.gate_sm90 import MAX_CHOSEN, choose_blocks_sm90
from k2jax.kernels.moba.grouping import group, num_tiles

# Pairs whose gathered queries and partial results are in memory at once: 8 GiB at 2 * 256 bytes each, 12 backward.
PAIRS = 2**24


def refusal(q_shape, k_shape, v_shape, dtype, *, block_size, top_k, scale, segmented, q_offset) -> str | None:
    """Why these kernels cannot compute this call, or None."""
    reason = attention_refusal(q_shape, k_shape, v_shape, dtype, scale=scale, q_offset=q_offset)
    if reason:
        return reason
    if segmented:
        return "segment_ids are not built"
    if block_size % TILE:
        return f"block_size={block_size} is no multiple of {TILE}"
    if min(top_k - 1, (q_shape[1] - 1) // block_size) > MAX_CHOSEN:
        return f"top_k={top_k} is more than {MAX_CHOSEN + 1}"
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
    D = -(-T // block_size)
    settings = Settings(float(scale), block_size, H // G, T, D, min(top_k - 1, D - 1), num_sms, interpret)
    q_BTHK, k_BSGK, v_BSGV = (whole_groups(x) for x in (q_BTHK, k_BSGK, v_BSGV))
    out_BTHV, lse_BHT, max_BH, winner_BHJT = _attention(settings, q_BTHK, k_BSGK, v_BSGV)
    own_BHT1 = jnp.broadcast_to((jnp.arange(T, dtype=jnp.int32) // block_size)[:, None], (B, H, T, 1))
    earlier_BHTJ = winner_BHJT[..., :T].swapaxes(2, 3)
    earlier_BHTJ = jnp.pad(earlier_BHTJ, ((0, 0),) * 3 + ((0, top_k - 1 - settings.J),), constant_values=-1)
    selected_BHTJ = jnp.concatenate([own_BHT1, earlier_BHTJ], axis=-1)
    return Attended(out_BTHV[:, :T], Residuals(lse_BHT[..., :T], max_BH, selected_BHTJ))


def working_numbers(q_shape, v_shape, block_size, top_k):
    """An estimate of the numbers of 32 bits that the backward holds beyond inputs and outputs."""
    (B, T, H, K), V = q_shape, v_shape[3]
    all_pairs = B * H * T * min(top_k - 1, (T - 1) // block_size)
    # Gathered q and dout and the parts of dq at 16 bits; for each of all pairs its winner, of those at hand six more.
    pairs = min(all_pairs, PAIRS)
    return pairs * (2 * K + V) // 2 + 6 * pairs + all_pairs + B * H * T * (K + 4)


class Settings(NamedTuple):
    """Static numbers of one call; see the legend."""

    scale: float
    block_size: int
    R: int
    num_tokens: int  # before T was rounded up
    D: int
    J: int
    num_sms: int | None
    interpret: Any

    @property
    def options(self):
        return {"num_sms": self.num_sms, "interpret": self.interpret}


# --- forward and backward -----------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(settings, q_BTHK, k_BSGK, v_BSGV):
    """out_BTHV; lse_BHT, each head's largest logit max_BH (float32) and winner_BHJT without a gradient."""
    return _forward(settings, q_BTHK, k_BSGK, v_BSGV)[0]


def _forward(settings, q_BTHK, k_BSGK, v_BSGV):
    scale, C, T = settings.scale, settings.block_size, q_BTHK.shape[1]
    winner_BHJT = _choose(settings, q_BTHK, k_BSGK)
    out_BTHV, lse_BHT, max_BHT = attend(scale, C, q_BTHK, k_BSGK, v_BSGV, **settings.options)
    max_BH = jnp.max(max_BHT[..., : settings.num_tokens], axis=-1)

    def join_chosen(heads, winner_BHJT, out_BTHV, lse_BHT, max_BH):
        groups = _groups(settings, winner_BHJT)
        q_PK = _gather_queries(q_BTHK, groups.row_P, heads)
        tables = (heads.first_block(settings.D) + groups.block_Y, groups.used_1)
        out_PV, lse_P, max_P = attend(scale, C, q_PK, k_BSGK, v_BSGV, *tables, **settings.options)
        out_BTHV, lse_BHT = _join(out_BTHV, lse_BHT, out_PV, lse_P, groups.place_BHJT)
        max_BH = jnp.maximum(max_BH, _largest(settings, max_P, groups.row_P, winner_BHJT.shape))
        return out_BTHV, lse_BHT, max_BH

    if settings.J:
        own = (out_BTHV, lse_BHT, max_BH)
        out_BTHV, lse_BHT, max_BH = _by_heads(settings, join_chosen, q_BTHK, k_BSGK, winner_BHJT, own, (2, 1, 1))
    lse_BHT = lse_BHT[..., :T]
    return (out_BTHV, lse_BHT, max_BH, winner_BHJT), (q_BTHK, k_BSGK, v_BSGV, out_BTHV, lse_BHT, winner_BHJT)


def _backward(settings, saved, cotangents):
    q_BTHK, k_BSGK, v_BSGV, out_BTHV, lse_BHT, winner_BHJT = saved
    scale, C, T = settings.scale, settings.block_size, q_BTHK.shape[1]
    own = own_rows(q_BTHK, out_BTHV, lse_BHT, cotangents[0])
    _, dout_BTHV, lse_BHT, delta_BHT = own
    dq_BTHK = rows_gradient(scale, C, *own, k_BSGK, v_BSGV, **settings.options)
    if not settings.J:
        return dq_BTHK, *keys_gradient(scale, C, own, k_BSGK, v_BSGV, interpret=settings.interpret)

    def add_chosen(heads, winner_BHJT, dq_BTHK, dk_BSGK, dv_BSGV):
        del dk_BSGK, dv_BSGV  # All of these is computed here.
        groups = _groups(settings, winner_BHJT)
        row_P = jnp.where(groups.row_P < 0, 0, heads.first_query(q_BTHK) + groups.row_P)
        chosen = (
            _gather_queries(q_BTHK, groups.row_P, heads),
            _gather_queries(dout_BTHV, groups.row_P, heads),
            jnp.where(groups.row_P < 0, jnp.inf, lse_BHT.reshape(-1)[row_P]),  # probability 0 at empty places
            delta_BHT.reshape(-1)[row_P],
        )
        tables = (heads.first_block(settings.D) + groups.block_Y, groups.used_1)
        dq_PK = rows_gradient(scale, C, *chosen, k_BSGK, v_BSGV, *tables, **settings.options)
        sum_BTHK = dq_BTHK.astype(jnp.float32)
        for j in range(settings.J):
            sum_BTHK += _gather(dq_PK, _per_query(groups.place_BHJT, j, T))
        keys = keys_gradient(
            scale, C, own, k_BSGK, v_BSGV, chosen, groups.span_Z2, heads=heads, interpret=settings.interpret
        )
        return sum_BTHK.astype(dq_BTHK.dtype), *keys

    gradients = (dq_BTHK, jnp.zeros_like(k_BSGK), jnp.zeros_like(v_BSGV))
    return _by_heads(settings, add_chosen, q_BTHK, k_BSGK, winner_BHJT, gradients, (2, 2, 2))


_attention.defvjp(_forward, _backward)


def _by_heads(settings, fn, q_BTHK, k_BSGK, winner_BHJT, results, axes):
    """results after fn(heads, winner, *results) on the parts of a few key heads at a time.

    axes: where every result has its heads; batch rows are on axis 0. As many heads are taken at a time as have at most
    PAIRS pairs; where that is more than a batch row has, whole batch rows.
    """
    (B, T), G = q_BTHK.shape[:2], k_BSGK.shape[2]
    most = max(1, PAIRS // (settings.J * T * settings.R))
    num_heads = max(n for n in range(1, G + 1) if G % n == 0 and n <= most)
    num_rows = max(n for n in range(1, B + 1) if B % n == 0 and n <= max(1, most // G))
    steps = (B // num_rows) * (G // num_heads)

    def step(i, results):
        batch, head = i // (G // num_heads), i % (G // num_heads)
        heads = KeyHeads(batch * num_rows, head * num_heads, num_rows, num_heads, G)

        def start_and_size(x, axis):
            share = x.shape[axis] // G
            start, size = [0] * x.ndim, list(x.shape)
            start[0], start[axis] = heads.batch, heads.head * share
            size[0], size[axis] = num_rows, num_heads * share
            return start, size

        parts = [jax.lax.dynamic_slice(x, *start_and_size(x, a)) for x, a in zip(results, axes, strict=True)]
        winner_part = jax.lax.dynamic_slice(winner_BHJT, *start_and_size(winner_BHJT, 1))
        new = fn(heads, winner_part, *parts)
        return tuple(
            jax.lax.dynamic_update_slice(x, y, start_and_size(x, a)[0])
            for x, y, a in zip(results, new, axes, strict=True)
        )

    return step(0, results) if steps == 1 else jax.lax.fori_loop(0, steps, step, results)


# --- the parts ----------------------------------------------------------------------------------------------------


def _choose(settings, q_BTHK, k_BSGK):
    B, T, H, K = q_BTHK.shape
    if not settings.J:
        return jnp.zeros((B, H, 0, padded(T)), jnp.int32)
    # The last block is nobody's earlier block, so whether it is complete makes no difference.
    whole_BSGK = jnp.pad(k_BSGK, ((0, 0), (0, settings.D * settings.block_size - T), (0, 0), (0, 0)))
    mean_BDGK = jnp.mean(whole_BSGK.reshape(B, settings.D, settings.block_size, -1, K), axis=2, dtype=jnp.float32)
    # Rounded, as the official code does before the product.
    mean_BDGK = mean_BDGK.astype(k_BSGK.dtype)
    winner_BHJT = choose_blocks_sm90(q_BTHK, mean_BDGK, settings.J, block_size=settings.block_size, **settings.options)
    return jnp.where(jnp.arange(winner_BHJT.shape[-1]) < settings.num_tokens, winner_BHJT, -1)


def _groups(settings, winner_BHJT):
    B, H, J, T = winner_BHJT.shape
    pairs = B * H * sum(min(J, n) * min(settings.block_size, T - n * settings.block_size) for n in range(settings.D))
    tiles = num_tiles(pairs, B * H // settings.R * settings.D, TILE)
    return group(winner_BHJT, settings.R, settings.D, TILE, tiles)


def _join(out_BTHV, lse_BHT, out_PV, lse_P, place_BHJT):
    """Weighs the partial results of each query by their share of the whole softmax, its own block's first."""
    T = out_BTHV.shape[1]

    def weight_of(lse_BHT):
        return jnp.exp(lse_BHT - joined_BHT)[..., :T].swapaxes(1, 2)[..., None]

    lse_BHJT = lse_P.at[place_BHJT].get(mode="fill", fill_value=-jnp.inf)
    top_BHT = jnp.maximum(lse_BHT, jnp.max(lse_BHJT, axis=2))
    sum_BHT = jnp.exp(lse_BHT - top_BHT) + jnp.sum(jnp.exp(lse_BHJT - top_BHT[:, :, None]), axis=2)
    joined_BHT = top_BHT + jnp.log(sum_BHT)
    sum_BTHV = out_BTHV * weight_of(lse_BHT)
    for j in range(place_BHJT.shape[2]):  # one choice at a time: never all partial results side by side
        sum_BTHV += _gather(out_PV, _per_query(place_BHJT, j, T)) * weight_of(lse_BHJT[:, :, j])
    return sum_BTHV.astype(out_BTHV.dtype), joined_BHT


def _largest(settings, max_P, row_P, winner_shape):
    """The largest logit of each query head. A tile's queries are of one key head, so all but a few steps are dense."""
    (B, H, _, T), R = winner_shape, settings.R
    max_YL, row_YL = max_P.reshape(-1, TILE), row_P.reshape(-1, TILE)
    head_R11 = jnp.arange(R)[:, None, None]
    max_RY = jnp.max(jnp.where((row_YL >= 0) & (row_YL // T % R == head_R11), max_YL, -jnp.inf), axis=-1)
    key_head_Y = jnp.max(row_YL, axis=1) // (T * R)  # -1 for a tile that is empty
    is_key_head_XY = key_head_Y == jnp.arange(B * H // R)[:, None]
    return jnp.max(jnp.where(is_key_head_XY[:, None], max_RY, -jnp.inf), axis=-1).reshape(B, H)


def _gather_queries(x_BTHE, row_P, heads):
    """Rows of x as `Groups.row_P` numbers the queries of these heads: [P, E]."""
    B, T, H, E = x_BTHE.shape
    head_P, t_P = jnp.divmod(heads.first_query(x_BTHE) + row_P, padded(T))
    # B rows of T * H queries: head_P counts batch and head.
    index_P = (head_P // H * T + t_P) * H + head_P % H
    return _gather(x_BTHE.reshape(B * T * H, E), jnp.where(row_P < 0, -1, index_P))


def _per_query(place_BHJT, j, T):
    return place_BHJT[:, :, j, :T].swapaxes(1, 2)


def _gather(x_PE, place):
    """Rows of x; zeros where the place is none, be it negative or behind the end: what lies there is undefined."""
    return x_PE.at[jnp.where(place < 0, x_PE.shape[0], place)].get(mode="fill", fill_value=0)
