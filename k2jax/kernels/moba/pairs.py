"""What the kernels for every device do around their tiles: mean keys, heads in groups, partial results joined.

Legend: B batch, T queries, S keys, H query heads, G key heads, R = H // G, N blocks that may be chosen, C keys of a
block, J earlier blocks per query, L rows of a tile, Y tiles, P = Y * L places, K query/key size, V value size, E
either.
"""

import jax
import jax.numpy as jnp

from k2jax.kernels.attention.key_heads import KeyHeads

MAX_BLOCKS = 63  # Partial results of a query, each gathered back on its own.
MIN_BLOCK = 64  # A tile reads 128 keys of a block at a time, what is missing of them for nothing.


def refused_blocks(S, block_size, top_k) -> str | None:
    """Why the kernels cannot choose top_k blocks of S keys, or None."""
    if block_size < MIN_BLOCK:
        return f"block_size={block_size} is less than {MIN_BLOCK}"
    if min(top_k - 1, (S - 1) // block_size) > MAX_BLOCKS:
        return f"top_k={top_k} is more than {MAX_BLOCKS + 1}"
    return None


def mean_keys(far_BNCGK):
    """The mean key of each block, rounded, as the official code does before the product."""
    return jnp.mean(far_BNCGK, axis=2, dtype=jnp.float32).astype(far_BNCGK.dtype)


def selection(winner_BHJT, own_BT, block_id_BN, top_k):
    """`Residuals.selected_BHTJ`: own blocks and the chosen ones, by their numbers along the row."""
    B, H, J, T = winner_BHJT.shape
    own_BHT1 = jnp.broadcast_to(own_BT[:, None, :, None], (B, H, T, 1))
    earlier_BHTJ = winner_BHJT.swapaxes(2, 3)
    if J:
        name = jax.vmap(lambda block_id_N, winner_HTJ: block_id_N[jnp.maximum(winner_HTJ, 0)])
        block_id_BN = jnp.broadcast_to(block_id_BN, (B, block_id_BN.shape[1]))
        earlier_BHTJ = jnp.where(earlier_BHTJ < 0, -1, name(block_id_BN, earlier_BHTJ))
    earlier_BHTJ = jnp.pad(earlier_BHTJ, ((0, 0),) * 3 + ((0, top_k - 1 - J),), constant_values=-1)
    return jnp.concatenate([own_BHT1, earlier_BHTJ], axis=-1)


def place_of_keys(where, start_BN, end_BS, place):
    """Where each key is among copies of the blocks, which begin every `place` keys; N * place for one without a copy.

    where: the `Layout`; end_BS: the number of the first block behind each key's candidates.
    """
    N = start_BN.shape[1]
    # A key's own block is the next one behind its candidates, if it may be chosen at all.
    start_or_none_BN = jnp.pad(start_BN, ((0, 0), (0, 1)), constant_values=-1)
    next_BS = jnp.take_along_axis(start_or_none_BN, jnp.minimum(end_BS, N), axis=1)
    inside_BS = jnp.arange(end_BS.shape[1], dtype=jnp.int32) - where.block_start_BS
    return jnp.where(next_BS == where.block_start_BS, end_BS * place + inside_BS, N * place)


def by_heads(fn, most, G, winner_BHJT, results, axes):
    """results after fn(heads, winner, *results) on the parts of at most `most` of the G key heads at a time.

    axes: where every result has its heads; batch rows are on axis 0. Where `most` is more than a batch row has, whole
    batch rows are taken.
    """
    B = winner_BHJT.shape[0]
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


def join(out, lse_BHT, out_PV, lse_P, place_BHJT, per_query):
    """Weighs the partial results of each query by their share of the whole softmax, its own block's first.

    out: of own blocks, in any order of B, T and H; per_query(x_BHT) brings what there is one of per query into it.
    """

    def weight_of(lse_BHT):
        return per_query(jnp.exp(lse_BHT - joined_BHT))[..., None]

    lse_BHJT = lse_P.at[place_BHJT].get(mode="fill", fill_value=-jnp.inf)
    top_BHT = jnp.maximum(lse_BHT, jnp.max(lse_BHJT, axis=2))
    sum_BHT = jnp.exp(lse_BHT - top_BHT) + jnp.sum(jnp.exp(lse_BHJT - top_BHT[:, :, None]), axis=2)
    joined_BHT = top_BHT + jnp.log(sum_BHT)
    total = out * weight_of(lse_BHT)
    for j in range(place_BHJT.shape[2]):  # one choice at a time: never all partial results side by side
        total += gather(out_PV, per_query(place_BHJT[:, :, j])) * weight_of(lse_BHJT[:, :, j])
    return total.astype(out.dtype), joined_BHT


def largest(max_P, row_P, winner_shape, R, L):
    """The largest logit of each query head. A tile's queries are of one key head, so all but a few steps are dense."""
    B, H, _, T = winner_shape
    max_YL, row_YL = max_P.reshape(-1, L), row_P.reshape(-1, L)
    head_R11 = jnp.arange(R)[:, None, None]
    max_RY = jnp.max(jnp.where((row_YL >= 0) & (row_YL // T % R == head_R11), max_YL, -jnp.inf), axis=-1)
    key_head_Y = jnp.max(row_YL, axis=1) // (T * R)  # -1 for a tile that is empty
    is_key_head_XY = key_head_Y == jnp.arange(B * H // R)[:, None]
    return jnp.max(jnp.where(is_key_head_XY[:, None], max_RY, -jnp.inf), axis=-1).reshape(B, H)


def gather(x_PE, place):
    """Rows of x; zeros where the place is none, be it negative or behind the end: what lies there is undefined."""
    return x_PE.at[jnp.where(place < 0, x_PE.shape[0], place)].get(mode="fill", fill_value=0)
