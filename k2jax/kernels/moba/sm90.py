"""MoBA on Hopper GPUs: selection, two attention streams and their exact backward, with the hot loops in Pallas.

1. `gate_sm90` chooses each query's earlier blocks without ever writing a score to memory.
2. `grouping` sorts the (query, block) pairs by block and cuts them into tiles of 128, whose queries the kernels gather.
3. `attention.tiles_sm90` computes the tiles, and the queries against their own blocks as they lie.
4. The partial results of a query are gathered back and joined by their log-sum-exp, in the order of its choices.
Where a text is so short that 2 to 4 take longer than all pairs of its tokens (`is_short`), its forward pass computes
all of them instead, and every query skips what it did not choose; of a shorter one with heads of 128 so does the
backward.
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

from k2jax.kernels.attention.fused_gradient_sm90 import fused_gradient, is_built
from k2jax.kernels.attention.keys_gradient_sm90 import keys_gradient
from k2jax.kernels.attention.positions import at_positions
from k2jax.kernels.attention.reference import query_positions
from k2jax.kernels.attention.sm90 import is_whole, own_rows, starts_at, whole_groups
from k2jax.kernels.attention.sm90 import refusal as attention_refusal
from k2jax.kernels.attention.sm90 import working_numbers as full_numbers
from k2jax.kernels.attention.tiles_sm90 import TILE, Choice, Chosen, Starts, attend, padded, rows_gradient
from k2jax.kernels.moba.blocks import Attended, Residuals, layout
from k2jax.kernels.moba.gate_sm90 import choose_blocks_sm90
from k2jax.kernels.moba.grouping import group, num_tiles
from k2jax.kernels.moba.pairs import (
    by_heads,
    gather,
    join,
    largest,
    mean_keys,
    place_of_keys,
    refused_blocks,
    selection,
)
from k2jax.kernels.moba.routing import history_blocks

# Pairs whose partial results are in memory at once: 4 GiB at 256 bytes each.
PAIRS = 2**24
# On a Hopper GPU a choice costs, beside its keys, as much as this many keys of a query in full attention.
FORWARD_KEYS_OF_A_CHOICE = 320
BACKWARD_KEYS_OF_A_CHOICE = 160
MAX_SHORT_BLOCKS = 128  # A query's choice is in registers then, a bit for each.


def refusal(q_shape, k_shape, v_shape, dtype, *, block_size, top_k, scale) -> str | None:
    """Why these kernels cannot compute this call, or None."""
    reason = attention_refusal(q_shape, v_shape, dtype, scale=scale)
    return reason or refused_blocks(k_shape[1], block_size, top_k)


def moba_attention(
    q_BTHK, k_BSGK, v_BSGV, *, block_size, top_k, scale, segment_ids=None, q_offset=0, num_sms=None, interpret=None
):  # fmt: skip
    """MoBA by Hopper kernels; arguments as in `k2jax.moba_pallas.moba_attention`.

    Raises ValueError where the kernels cannot do it (`refusal`).
    """
    (B, T, H, _), (S, G) = q_BTHK.shape, k_BSGK.shape[1:3]
    shapes = (q_BTHK.shape, k_BSGK.shape, v_BSGV.shape)
    reason = refusal(*shapes, q_BTHK.dtype, block_size=block_size, top_k=top_k, scale=scale)
    if reason:
        raise ValueError(reason)
    q_BTHK, k_BSGK, v_BSGV = (whole_groups(x) for x in (q_BTHK, k_BSGK, v_BSGV))
    # A block that somebody chooses is complete and has a token behind it.
    num_blocks = (S - 1) // block_size
    packs, copies = is_packed(T, S, block_size, segment_ids, q_offset), is_copied(block_size, segment_ids)
    table_blocks = num_blocks if copies else -(-S // block_size)
    J = min(top_k - 1, num_blocks)
    settings = Settings(float(scale), block_size, H // G, T, table_blocks, J, num_sms, interpret)
    where = layout(segment_ids, S, block_size)
    history, *candidates = history_blocks(where, segment_ids, S, block_size)
    packed = None
    if packs:
        packed = _packed(settings, where, history, candidates, q_BTHK, k_BSGK, q_offset, copies)
    out_BTHV, lse_BHT, max_BH, winner_BHJT = _attention(settings, q_BTHK, k_BSGK, v_BSGV, packed)
    position_BT = jnp.broadcast_to(query_positions(q_BTHK, q_offset)[:, :T], (B, T))
    own_BT = at_positions(where.block_id_BS, position_BT)
    selected_BHTJ = selection(winner_BHJT[..., :T], own_BT, history.block_id_BN, top_k)
    return Attended(out_BTHV[:, :T], Residuals(lse_BHT[..., :T], max_BH, selected_BHTJ))


def is_packed(T, S, block_size, segment_ids, q_offset):
    """Whether blocks may begin anywhere, or queries may not lie at the keys' positions."""
    return block_size % TILE > 0 or not is_whole(T, S, segment_ids, q_offset)


def is_copied(block_size, segment_ids):
    """Whether blocks may begin where the kernels cannot read them."""
    return block_size % TILE > 0 or segment_ids is not None


class Copied(NamedTuple):
    """How blocks that may be chosen are copied to where the kernels read them."""

    start_BN: jax.Array  # of each block
    place_BS: jax.Array  # of each key among the copies; behind their end for one that was not copied


class Packed(NamedTuple):
    """Where blocks begin anywhere, or queries: own blocks begin by `starts`."""

    first_BT: jax.Array  # the candidates of each query: from this block on
    end_BT: jax.Array  # and before this one
    starts: Starts
    copied: Copied | None  # None where blocks are read as they lie


def _packed(settings, where, history, candidates, q_BTHK, k_BSGK, q_offset, copies):
    (B, T), S = q_BTHK.shape[:2], where.block_start_BS.shape[1]
    where, (first_BS, count_BS) = jax.tree.map(lambda x: jnp.broadcast_to(x, (B, S)), (where, tuple(candidates)))
    end_BS, copied = first_BS + count_BS, None
    if copies:
        N, place = settings.table_blocks, padded(settings.block_size)
        start_BN = jnp.broadcast_to(history.start_BN, (B, N))
        place_BS = place_of_keys(where, start_BN, end_BS, place)
        place_BS = jnp.pad(place_BS, ((0, 0), (0, k_BSGK.shape[1] - S)), constant_values=N * place)
        copied = Copied(start_BN, place_BS)
    position_BT = jnp.broadcast_to(query_positions(q_BTHK, q_offset), (B, T))
    first_BT, end_BT = (at_positions(x, position_BT) for x in (first_BS, end_BS))
    starts = starts_at(where.block_start_BS, q_BTHK, settings.num_tokens, q_offset)
    return Packed(first_BT, end_BT, starts, copied)


def working_numbers(q_shape, v_shape, block_size, top_k, packs, copies):
    """An estimate of the numbers of 32 bits that the backward holds beyond inputs and outputs.

    packs, copies: `is_packed` and `is_copied`.
    """
    (B, T, H, K), (_, S, G, V) = q_shape, v_shape
    J = min(top_k - 1, (S - 1) // block_size)
    all_pairs = B * H * T * J
    if not packs and is_built(q_shape, v_shape) and is_short(T, block_size, J, BACKWARD_KEYS_OF_A_CHOICE):
        return all_pairs + full_numbers(q_shape, v_shape)
    # The parts of dq at 16 bits; for each of all pairs its winner, of those at hand six numbers more.
    pairs = min(all_pairs, PAIRS)
    # Copied keys and values, and their gradients, at 16 bits.
    return pairs * K // 2 + 6 * pairs + all_pairs + B * H * T * (K + 4) + copies * B * S * G * (K + V)


class Settings(NamedTuple):
    """Static numbers of one call; see the legend."""

    scale: float
    block_size: int
    R: int
    num_tokens: int  # before T was rounded up
    table_blocks: int  # of each key head in the kernels' tables
    J: int
    num_sms: int | None
    interpret: Any


# --- forward and backward -----------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(settings, q_BTHK, k_BSGK, v_BSGV, packed):
    """out_BTHV; lse_BHT, each head's largest logit max_BH (float32) and winner_BHJT without a gradient."""
    return _forward(settings, q_BTHK, k_BSGK, v_BSGV, packed)[0]


def _forward(settings, q_BTHK, k_BSGK, v_BSGV, packed):
    scale, T = settings.scale, q_BTHK.shape[1]
    own_block, far_block, own_options, far_options = _call(settings, packed, k_BSGK.shape[1])
    per_query = functools.partial(_per_query, T=T)
    far = [_far(settings, x, packed) for x in (k_BSGK, v_BSGV)]
    winner_BHJT = _choose(settings, q_BTHK, far[0], packed)
    dense = _is_dense(settings, T, packed, FORWARD_KEYS_OF_A_CHOICE)
    if dense:
        own_block, own_options = padded(T), own_options | {"choice": _choice(settings, winner_BHJT)}
    out_BTHV, lse_BHT, max_BHT = attend(scale, own_block, q_BTHK, k_BSGK, v_BSGV, **own_options)
    max_BH = jnp.max(max_BHT[..., : settings.num_tokens], axis=-1)

    def join_chosen(heads, winner_BHJT, out_BTHV, lse_BHT, max_BH):
        groups = _groups(settings, winner_BHJT, packed)
        chosen = _chosen(settings, q_BTHK, groups, heads)
        out_PV, lse_P, max_P = attend(scale, far_block, _flat(q_BTHK), *far, chosen, **far_options)
        out_BTHV, lse_BHT = join(out_BTHV, lse_BHT, out_PV, lse_P, groups.place_BHJT, per_query)
        max_BH = jnp.maximum(max_BH, largest(max_P, groups.row_P, winner_BHJT.shape, settings.R, TILE))
        return out_BTHV, lse_BHT, max_BH

    if settings.J and not dense:
        own = (out_BTHV, lse_BHT, max_BH)
        few = _few_heads(settings, q_BTHK, k_BSGK)
        out_BTHV, lse_BHT, max_BH = by_heads(join_chosen, *few, winner_BHJT, own, (2, 1, 1))
    lse_BHT = lse_BHT[..., :T]
    saved = (q_BTHK, k_BSGK, v_BSGV, out_BTHV, lse_BHT, winner_BHJT, packed)
    return (out_BTHV, lse_BHT, max_BH, winner_BHJT), saved


def _backward(settings, saved, cotangents):
    q_BTHK, k_BSGK, v_BSGV, out_BTHV, lse_BHT, winner_BHJT, packed = saved
    scale, T = settings.scale, q_BTHK.shape[1]
    own_block, far_block, own_options, far_options = _call(settings, packed, k_BSGK.shape[1])
    own = own_rows(q_BTHK, out_BTHV, lse_BHT, cotangents[0])
    if is_built(q_BTHK.shape, v_BSGV.shape) and _is_dense(settings, T, packed, BACKWARD_KEYS_OF_A_CHOICE):
        choice = _choice(settings, winner_BHJT)
        return *fused_gradient(scale, own, k_BSGK, v_BSGV, choice=choice, interpret=settings.interpret), None
    _, dout_BTHV, lse_BHT, delta_BHT = own
    dq_BTHK = rows_gradient(scale, own_block, *own, k_BSGK, v_BSGV, **own_options)
    far = [_far(settings, x, packed) for x in (k_BSGK, v_BSGV)]
    starts = None if packed is None else packed.starts
    # Of a block that is read as it lies, one kernel sums what its own queries send back and what others do.
    is_together = packed is None or packed.copied is None

    def add_chosen(heads, winner_BHJT, dq_BTHK, dk_BSGK, dv_BSGV):
        del dk_BSGK, dv_BSGV  # All of these is computed here.
        groups = _groups(settings, winner_BHJT, packed)
        row_P = jnp.where(groups.row_P < 0, 0, heads.first_query(q_BTHK.shape[2], padded(T)) + groups.row_P)
        rows = (
            _flat(q_BTHK),
            _flat(dout_BTHV),
            jnp.where(groups.row_P < 0, jnp.inf, lse_BHT.reshape(-1)[row_P]),  # probability 0 at empty places
            delta_BHT.reshape(-1)[row_P],
        )
        chosen = _chosen(settings, q_BTHK, groups, heads)
        dq_PK = rows_gradient(scale, far_block, *rows, *far, chosen, **far_options)
        sum_BTHK = dq_BTHK.astype(jnp.float32)
        for j in range(settings.J):
            sum_BTHK += gather(dq_PK, _per_query(groups.place_BHJT[:, :, j], T))
        options = {"heads": heads, "interpret": settings.interpret} | ({"starts": starts} if is_together else {})
        together = own if is_together else None
        keys = keys_gradient(scale, far_block, together, *far, (*rows, chosen.index_P), groups.span_Z2, **options)
        return sum_BTHK.astype(dq_BTHK.dtype), *keys

    gradients = (dq_BTHK, *map(jnp.zeros_like, far))
    if settings.J:
        few = _few_heads(settings, q_BTHK, k_BSGK)
        gradients = by_heads(add_chosen, *few, winner_BHJT, gradients, (2, 2, 2))
    if settings.J and is_together:
        return *gradients, None
    keys = keys_gradient(scale, own_block, own, k_BSGK, v_BSGV, starts=starts, interpret=settings.interpret)
    if settings.J:
        keys = [x + _back_from_far(far_x, packed.copied) for x, far_x in zip(keys, gradients[1:], strict=True)]
    return gradients[0], *keys, None


def _call(settings, packed, S):
    """The block sizes of own and chosen blocks as the kernels see them, and the options of either call."""
    options = {"num_sms": settings.num_sms, "interpret": settings.interpret}
    if packed is None:
        return settings.block_size, settings.block_size, options, options
    own_options = options | {"starts": packed.starts}
    return padded(S), padded(settings.block_size), own_options, options | {"num_keys": settings.block_size}


_attention.defvjp(_forward, _backward)


def is_short(T, block_size, J, keys_of_a_choice) -> bool:
    """Whether to attend to all pairs of T tokens costs less than to J earlier blocks and the own one."""
    few = 2 * ((J + 1) * block_size + J * keys_of_a_choice)
    return J > 0 and few >= T and -(-T // block_size) <= MAX_SHORT_BLOCKS


def _is_dense(settings, T, packed, keys_of_a_choice):
    """Whether a pass of this call computes all pairs."""
    return packed is None and is_short(T, settings.block_size, settings.J, keys_of_a_choice)


def _choice(settings, winner_BHJT) -> Choice:
    """Each query's chosen blocks and its own one."""
    own_T = jnp.arange(winner_BHJT.shape[-1], dtype=jnp.int32) // settings.block_size

    def word(e):
        def bits(block):
            return jnp.where(block // 32 == e, jnp.left_shift(jnp.int32(1), block % 32), 0)

        chosen_BHJT = jnp.where(winner_BHJT < 0, 0, bits(winner_BHJT))
        return jnp.sum(chosen_BHJT, axis=2, dtype=jnp.int32) | bits(own_T)

    words = -(-settings.table_blocks // 32)
    return Choice(jnp.stack([word(e) for e in range(words)]), settings.block_size)


def _few_heads(settings, q_BTHK, k_BSGK):
    """How many key heads have at most PAIRS pairs, and how many there are."""
    return max(1, PAIRS // (settings.J * q_BTHK.shape[1] * settings.R)), k_BSGK.shape[2]


# --- the parts ----------------------------------------------------------------------------------------------------


def _far(settings, x_BSGE, packed):
    """Keys or values that may be chosen, every block from a multiple of a tile on."""
    if packed is None or packed.copied is None or not settings.J:
        return x_BSGE
    B, _, G, E = x_BSGE.shape
    C = settings.block_size
    position_BNC = packed.copied.start_BN[..., None] + jnp.arange(C)
    x_BNCGE = jax.vmap(lambda x_SGE, position_NC: x_SGE[position_NC])(x_BSGE, position_BNC)
    x_BNCGE = jnp.pad(x_BNCGE, ((0, 0), (0, 0), (0, padded(C) - C), (0, 0), (0, 0)))
    return x_BNCGE.reshape(B, settings.table_blocks * padded(C), G, E)


def _back_from_far(x_BSGE, copied):
    """The transpose of `_far`: a key lies in one block at most, so nothing is added."""
    return jax.vmap(lambda x_SGE, place_S: x_SGE.at[place_S].get(mode="fill", fill_value=0))(x_BSGE, copied.place_BS)


def _choose(settings, q_BTHK, far_BSGK, packed):
    B, T, H = q_BTHK.shape[:3]
    if not settings.J:
        return jnp.zeros((B, H, 0, padded(T)), jnp.int32)
    C, N = settings.block_size, settings.table_blocks
    if packed is None:
        first_BT = jnp.zeros((B, T), jnp.int32)
        end_BT = first_BT + jnp.arange(T, dtype=jnp.int32) // C
    else:
        first_BT, end_BT = packed.first_BT, packed.end_BT
    # Of blocks as they lie, the last one is nobody's earlier block, so whether it is complete makes no difference.
    behind = max(N * C - far_BSGK.shape[1], 0)
    far_BSGK = jnp.pad(far_BSGK, ((0, 0), (0, behind), (0, 0), (0, 0)))
    mean_BNGK = mean_keys(far_BSGK.reshape(B, N, -1, *far_BSGK.shape[2:])[:, :, :C])
    options = {"num_sms": settings.num_sms, "interpret": settings.interpret}
    winner_BHJT = choose_blocks_sm90(q_BTHK, mean_BNGK, settings.J, first_BT, end_BT, **options)
    return jnp.where(jnp.arange(winner_BHJT.shape[-1]) < settings.num_tokens, winner_BHJT, -1)


def _groups(settings, winner_BHJT, packed):
    B, H, J, T = winner_BHJT.shape
    C, D = settings.block_size, settings.table_blocks
    pairs = J * T if packed is not None else sum(min(J, n) * min(C, T - n * C) for n in range(D))
    tiles = num_tiles(B * H * pairs, B * H // settings.R * D, TILE)
    return group(winner_BHJT, settings.R, D, TILE, tiles)


def _chosen(settings, q_BTHK, groups, heads) -> Chosen:
    """The tiles of `groups` of these heads, as the kernels find their queries in `_flat(q_BTHK)` and their blocks."""
    B, T, H, _ = q_BTHK.shape
    head_P, t_P = jnp.divmod(heads.first_query(H, padded(T)) + groups.row_P, padded(T))
    # B rows of T * H queries: head_P counts batch and head.
    index_P = (head_P // H * T + t_P) * H + head_P % H
    index_P = jnp.where(groups.row_P < 0, B * T * H, index_P)
    return Chosen(index_P, heads.first_block(settings.table_blocks) + groups.block_Y, groups.used_1)


def _flat(x_BTHE):
    return x_BTHE.reshape(-1, x_BTHE.shape[-1])


def _per_query(x_BHT, T):
    return x_BHT[..., :T].swapaxes(1, 2)
