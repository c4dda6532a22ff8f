"""MoBA on TPUs: selection by XLA, two attention streams and their exact backward, with the hot loops in Pallas.

1. XLA scores the blocks for some queries at a time and chooses.
2. `grouping` sorts the (query, block) pairs by block and cuts them into tiles; XLA gathers the tiles' queries.
3. `attention.tiles_tpu` computes the tiles, and the queries against their own blocks as they lie.
4. The partial results of a query are gathered back and joined by their log-sum-exp, in the order of its choices.
The backward recomputes probabilities from the joined log-sum-exp: `attention.keys_gradient_tpu` sums what every query
that read a block sends back, `attention.tiles_tpu` computes each pair's part of dq, gathered back like the output.
Nothing is ever added in an order that could change between runs.

Work space grows with queries times top_k, so heads are taken in groups of at most `PAIRS` pairs.

Legend: B batch, T queries, S keys, H query heads, G key heads, R = H // G, X = B * H, Z = B * G, D blocks of a key
head, N blocks that may be chosen, C tokens of a block, J earlier blocks per query, L queries scored at a time, Y tiles,
P places of all of them, W = Z * D blocks, K query/key size, V value size, E either. T and S are rounded up to whole
steps inside.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from k2jax.kernels.attention.keys_gradient_tpu import chosen_keys_gradient
from k2jax.kernels.attention.positions import at_positions
from k2jax.kernels.attention.reference import query_positions
from k2jax.kernels.attention.tiles_tpu import LANES, MAX_KEYS, MAX_ROWS, Plan, Tiles, attend, rows_gradient
from k2jax.kernels.attention.tpu import (
    MAX_TABLE,
    Own,
    OwnShape,
    even_steps,
    heads_first,
    own_keys,
    own_shape,
    own_tables,
    rows_of,
    tokens_first,
)
from k2jax.kernels.attention.tpu import refusal as attention_refusal
from k2jax.kernels.moba.blocks import Attended, Residuals, choose, layout
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
from k2jax.kernels.moba.routing import history_blocks, map_steps

# Pairs whose gathered queries and partial results are in memory at once: 1 GiB at 2 * 256 bytes each, 1.5 backward.
PAIRS = 2**21
GATE_SCORES = 2**24  # held at once, over batch, heads, queries and blocks
MAX_PASSES = 15  # Of `blocks.choose`; with more, one sort is cheaper.


def refusal(q_shape, k_shape, v_shape, dtype, *, block_size, top_k) -> str | None:
    """Why these kernels cannot compute this call, or None."""
    reason = attention_refusal(q_shape, k_shape, v_shape, dtype) or refused_blocks(k_shape[1], block_size, top_k)
    if reason:
        return reason
    numbers = 2 * _chosen(q_shape, k_shape, block_size, top_k, None).tiles_per_key_head
    if numbers > MAX_TABLE:
        return f"a key head's tiles need tables of {numbers} numbers, more than {MAX_TABLE}"
    return None


def moba_attention(q_BTHK, k_BSGK, v_BSGV, *, block_size, top_k, scale, segment_ids=None, q_offset=0, interpret=None):
    """MoBA by TPU kernels; arguments as in `k2jax.moba_pallas.moba_attention`.

    interpret: as in `tiles_tpu.attend`.

    Raises ValueError where the kernels cannot do it (`refusal`).
    """
    (B, T, H, _), (S, G) = q_BTHK.shape, k_BSGK.shape[1:3]
    shapes = (q_BTHK.shape, k_BSGK.shape, v_BSGV.shape)
    reason = refusal(*shapes, q_BTHK.dtype, block_size=block_size, top_k=top_k)
    if reason:
        raise ValueError(reason)
    known = q_offset if segment_ids is None and isinstance(q_offset, int) else None
    chosen = _chosen(q_BTHK.shape, k_BSGK.shape, block_size, top_k, known)
    is_copied = segment_ids is not None or chosen.place != block_size
    num_blocks = (S - 1) // block_size
    table_blocks = num_blocks if is_copied else -(-S // block_size)
    own = own_shape(T, S, block_size, H, H // G, known, None if is_copied else table_blocks * block_size)
    settings = Settings(float(scale), block_size, B, H, G, table_blocks, is_copied, own, chosen, interpret)

    where = layout(segment_ids, S, block_size)
    history, *candidates = history_blocks(where, segment_ids, S, block_size)
    tables = _tables(settings, where, history, candidates, q_BTHK, q_offset, segment_ids is not None)
    q_XTK = heads_first(q_BTHK, own.padded_rows)
    k_ZSK, v_ZSV = (heads_first(x, own.padded_keys) for x in (k_BSGK, v_BSGV))
    out_XTV, lse_BHT, max_BH, winner_BHJT = _attention(settings, q_XTK, k_ZSK, v_ZSV, tables)
    position_BT = jnp.broadcast_to(query_positions(q_BTHK, q_offset), (B, T))
    own_BT = at_positions(where.block_id_BS, position_BT)
    selected_BHTJ = selection(winner_BHJT[..., :T], own_BT, history.block_id_BN, top_k)
    return Attended(tokens_first(out_XTV, B, T), Residuals(lse_BHT[..., :T], max_BH, selected_BHTJ))


def working_numbers(q_shape, k_shape, v_shape, block_size, top_k):
    """An estimate of the numbers of 32 bits that the backward holds beyond inputs and outputs."""
    (B, T, H, K), (S, G), V = q_shape, k_shape[1:3], v_shape[3]
    K, V = (-(-size // LANES) * LANES for size in (K, V))  # A TPU keeps whole lanes.
    chosen = _chosen(q_shape, k_shape, block_size, top_k, None)
    all_pairs = B * H * T * chosen.J
    # Gathered q and dout and the parts of dq at 16 bits; for each of all pairs its winner, of those at hand six more.
    pairs = min(all_pairs, max(PAIRS, all_pairs // (B * G)))
    of_pairs = pairs * (2 * K + V) // 2 + 6 * pairs + all_pairs
    # Copies of all arrays with heads first, at 16 bits, and sums over the pairs of a query or key at 32.
    return of_pairs + (B * H * T + B * G * S) * 2 * (K + V)


class Chosen(NamedTuple):
    """The static numbers of rows that choose blocks."""

    J: int
    plan: Plan
    place: int  # what a block's tokens are rounded up to
    tiles_per_key_head: int
    pairs_per_key_head: int  # the most there can be


class Settings(NamedTuple):
    """The static numbers of one call; see the legend."""

    scale: float
    block_size: int
    B: int
    H: int
    G: int
    table_blocks: int  # D
    is_copied: bool  # whether blocks that may be chosen are copies, instead of the keys as they lie
    own: OwnShape
    chosen: Chosen
    interpret: Any


class Tables(NamedTuple):
    """Where blocks begin, and who may choose which."""

    own: Own
    first_BT: jax.Array  # the candidates of each query: from this block on
    end_BT: jax.Array  # and before this one
    start_BN: jax.Array | None  # of each block that may be chosen; None where that is a multiple of their size
    place_BS: jax.Array | None  # of each key among the copies, behind their end for one that was not copied


def _chosen(q_shape, k_shape, block_size, top_k, known_offset) -> Chosen:
    """How pairs are cut into tiles. known_offset: as in `own_shape`."""
    (_, T, H, _), (S, G) = q_shape, k_shape[1:3]
    N = (S - 1) // block_size
    J, D = min(top_k - 1, N), max(1, -(-S // block_size))
    earlier_T = np.full(T, J) if known_offset is None else (known_offset + np.arange(T)) // block_size
    pairs = H // G * int(np.minimum(J, earlier_T).sum())
    # A tile is half empty for each block, so there should be a few of them.
    rows = next((L for L in (MAX_ROWS, MAX_ROWS // 2) if pairs >= 2 * L * D), LANES)
    keys, place = even_steps(block_size, MAX_KEYS)
    plan = Plan(rows, keys, place // keys, heads=1, heads_per_key=1, num_keys=block_size)
    return Chosen(J, plan, place, num_tiles(pairs, D, rows), pairs)


def _tables(settings, where, history, candidates, q_BTHK, q_offset, segmented) -> Tables:
    B, own = settings.B, settings.own
    S = where.block_start_BS.shape[1]
    own_table = own_tables(own, where.block_start_BS, q_BTHK, q_offset)
    where, (first_BS, count_BS) = jax.tree.map(lambda x: jnp.broadcast_to(x, (B, S)), (where, tuple(candidates)))
    end_BS = first_BS + count_BS
    position_BT = jnp.broadcast_to(query_positions(q_BTHK, q_offset), (B, own.num_rows))
    to_rows = ((0, 0), (0, own.padded_rows - own.num_rows))  # Rows that are none have no candidates.
    first_BT, end_BT = (jnp.pad(at_positions(x, position_BT), to_rows) for x in (first_BS, end_BS))
    if not segmented:
        return Tables(own_table, first_BT, end_BT, None, None)
    start_BN = jnp.broadcast_to(history.start_BN, (B, settings.table_blocks))
    place_BS = place_of_keys(where, start_BN, end_BS, settings.chosen.place)
    behind = settings.table_blocks * settings.chosen.place
    place_BS = jnp.pad(place_BS, ((0, 0), (0, own.padded_keys - S)), constant_values=behind)
    return Tables(own_table, first_BT, end_BT, start_BN, place_BS)


# --- forward and backward -----------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(settings, q_XTK, k_ZSK, v_ZSV, tables):
    """out_XTV; lse_BHT, each head's largest logit max_BH (float32) and winner_BHJT without a gradient."""
    return _forward(settings, q_XTK, k_ZSK, v_ZSV, tables)[0]


def _forward(settings, q_XTK, k_ZSK, v_ZSV, tables):
    B, H, (own, chosen) = settings.B, settings.H, (settings.own, settings.chosen)
    scale, options = settings.scale, {"interpret": settings.interpret}
    far = [_far(settings, x, tables) for x in (k_ZSK, v_ZSV)]
    winner_BHJT = _choose(settings, q_XTK, far[0], tables)
    out_XTV, lse_XT, max_XT = attend(scale, own.plan, tables.own.tiles, q_XTK, k_ZSK, v_ZSV, **options)
    out_BHTV, lse_BHT = (x.reshape(B, H, *x.shape[1:]) for x in (out_XTV, lse_XT))
    max_BH = jnp.max(max_XT[:, : own.num_rows], axis=1).reshape(B, H)

    def join_chosen(heads, winner_BHJT, out_BHTV, lse_BHT, max_BH):
        groups = _groups(settings, winner_BHJT)
        q_1PK = _gather_queries(settings, q_XTK, groups.row_P, heads)[None]
        keys = (x_WCE.reshape(1, -1, x_WCE.shape[2]) for x_WCE in far)
        out_1PV, lse_1P, max_1P = attend(scale, chosen.plan, _tiles(settings, groups, heads), q_1PK, *keys, **options)
        out_BHTV, lse_BHT = join(out_BHTV, lse_BHT, out_1PV[0], lse_1P[0], groups.place_BHJT, lambda x_BHT: x_BHT)
        max_chosen_BH = largest(max_1P[0], groups.row_P, winner_BHJT.shape, H // settings.G, chosen.plan.rows)
        return out_BHTV, lse_BHT, jnp.maximum(max_BH, max_chosen_BH)

    if chosen.J:
        results = (out_BHTV, lse_BHT, max_BH)
        few = (_few_heads(settings), settings.G)
        out_BHTV, lse_BHT, max_BH = by_heads(join_chosen, *few, winner_BHJT, results, (1, 1, 1))
    out_XTV = out_BHTV.reshape(out_XTV.shape)
    saved = (q_XTK, k_ZSK, v_ZSV, out_XTV, lse_BHT, winner_BHJT, tables)
    return (out_XTV, lse_BHT, max_BH, winner_BHJT), saved


def _backward(settings, saved, cotangents):
    q_XTK, k_ZSK, v_ZSV, out_XTV, lse_BHT, winner_BHJT, tables = saved
    B, H, G, (own, chosen) = settings.B, settings.H, settings.G, (settings.own, settings.chosen)
    scale, options = settings.scale, {"interpret": settings.interpret}
    rows = rows_of(own, q_XTK, out_XTV, lse_BHT.reshape(q_XTK.shape[:2]), cotangents[0])
    dq_XTK = rows_gradient(scale, own.plan, tables.own.tiles, *rows, k_ZSK, v_ZSV, **options)
    own_gradient = functools.partial(own_keys, scale, own, tables.own, rows, k_ZSK, v_ZSV, **options)
    if not chosen.J:
        return dq_XTK, *own_gradient(), None
    far = [_far(settings, x, tables) for x in (k_ZSK, v_ZSV)]

    def add_chosen(heads, winner_BHJT, dq_BHTK, *keys_gradient):
        del keys_gradient  # All of it is computed here.
        groups = _groups(settings, winner_BHJT)
        gathered = _gather_rows(settings, rows, groups.row_P, heads)
        flat = (x_WCE.reshape(1, -1, x_WCE.shape[2]) for x_WCE in far)
        tiles = _tiles(settings, groups, heads)
        dq_1PK = rows_gradient(scale, chosen.plan, tiles, *(x[None] for x in gathered), *flat, **options)
        sum_BHTK = dq_BHTK.astype(jnp.float32)
        for j in range(chosen.J):
            sum_BHTK += gather(dq_1PK[0], groups.place_BHJT[:, :, j])
        arguments = (groups.block_Y, groups.used_1, heads.first_block(settings.table_blocks), groups.span_Z2.shape[0])
        keys = chosen_keys_gradient(scale, chosen.plan, *arguments, gathered, *far, **options)
        was_chosen_W11 = groups.span_Z2[:, 1, None, None] > 0
        shape = (heads.num_rows, heads.num_heads, settings.table_blocks)
        keys = (jnp.where(was_chosen_W11, x_WCE, 0).reshape(*shape, *x_WCE.shape[1:]) for x_WCE in keys)
        return sum_BHTK.astype(dq_BHTK.dtype), *keys

    dq_BHTK = dq_XTK.reshape(B, H, *dq_XTK.shape[1:])
    nothing = (jnp.zeros((B, G, settings.table_blocks, *x_WCE.shape[1:]), x_WCE.dtype) for x_WCE in far)
    few = (_few_heads(settings), G)
    dq_BHTK, *far_keys = by_heads(add_chosen, *few, winner_BHJT, (dq_BHTK, *nothing), (1, 1, 1))
    # In float32, so that only the chosen rows' part is rounded before the sum.
    keys = zip(own_gradient(dtype=jnp.float32), far_keys, strict=True)
    keys = ((x + _back_from_far(settings, far_x, tables)).astype(far_x.dtype) for x, far_x in keys)
    return dq_BHTK.reshape(dq_XTK.shape), *keys, None


_attention.defvjp(_forward, _backward)


# --- the parts ----------------------------------------------------------------------------------------------------


def _few_heads(settings):
    """How many key heads have at most PAIRS pairs, and tables that fit."""
    chosen = settings.chosen
    return max(1, min(PAIRS // max(1, chosen.pairs_per_key_head), MAX_TABLE // 2 // (chosen.tiles_per_key_head + 1)))


def _far(settings, x_ZSE, tables):
    """Keys or values that may be chosen, [W, place, E]: every block from a multiple of a step on."""
    C, D, place = settings.block_size, settings.table_blocks, settings.chosen.place
    Z, _, E = x_ZSE.shape
    if not settings.is_copied:
        return x_ZSE.reshape(Z * D, place, E)
    if tables.start_BN is None:
        x_WCE = x_ZSE[:, : D * C].reshape(Z * D, C, E)
    else:
        position_BNC = tables.start_BN[..., None] + jnp.arange(C)
        copy = jax.vmap(lambda x_GSE, position_NC: x_GSE[:, position_NC])
        x_WCE = copy(x_ZSE.reshape(settings.B, settings.G, -1, E), position_BNC).reshape(Z * D, C, E)
    return jnp.pad(x_WCE, ((0, 0), (0, place - C), (0, 0)))


def _back_from_far(settings, x_BGDCE, tables):
    """The transpose of `_far`: a key lies in one block at most, so nothing is added."""
    B, G, D, place, E = x_BGDCE.shape
    Z, S = B * G, settings.own.padded_keys
    if not settings.is_copied:
        return x_BGDCE.reshape(Z, S, E)
    if tables.place_BS is None:
        x_ZSE = x_BGDCE[..., : settings.block_size, :].reshape(Z, D * settings.block_size, E)
        return jnp.pad(x_ZSE, ((0, 0), (0, S - x_ZSE.shape[1]), (0, 0)))
    back = jax.vmap(lambda x_GSE, place_S: x_GSE.at[:, place_S].get(mode="fill", fill_value=0))
    return back(x_BGDCE.reshape(B, G, D * place, E), tables.place_BS).reshape(Z, S, E)


def _choose(settings, q_XTK, far_WCK, tables):
    B, H, J = settings.B, settings.H, settings.chosen.J
    T = settings.own.padded_rows
    if not J:
        return jnp.zeros((B, H, 0, T), jnp.int32)
    far_BGNCK = far_WCK.reshape(B, settings.G, settings.table_blocks, *far_WCK.shape[1:])
    mean_BNGK = mean_keys(far_BGNCK.transpose(0, 2, 3, 1, 4)[:, :, : settings.block_size])
    q_BTHK = tokens_first(q_XTK, B, T)
    rows = GATE_SCORES // (B * H * settings.table_blocks) // LANES * LANES
    rows = min(T, max(LANES, rows))
    return _choose_by_xla(q_BTHK, mean_BNGK, J, tables.first_BT, tables.end_BT, rows)[..., :T]


def _choose_by_xla(q_BTHK, mean_BNGK, J, first_BT, end_BT, rows):
    """The J best blocks of each query among `first .. end - 1`, best first, the lowest of equal ones; -1 for none.

    rows: how many queries are scored at a time; T of the result is a multiple of it.

    Returns: winner_BHJT.
    """
    (B, T, H, K), (N, G) = q_BTHK.shape, mean_BNGK.shape[1:3]
    precision = jax.lax.Precision.HIGHEST if q_BTHK.dtype == jnp.float32 else None

    def tiles(x_BT):
        x_BT = jnp.pad(x_BT, ((0, 0), (0, -T % rows)) + ((0, 0),) * (x_BT.ndim - 2))
        return jnp.moveaxis(x_BT.reshape(B, -1, rows, *x_BT.shape[2:]), 1, 0)

    def one_tile(xs):
        q_BLGRK, first_BL, end_BL = xs
        score_BGRLN = jnp.einsum(
            "blgrk,bngk->bgrln", q_BLGRK, mean_BNGK, precision=precision, preferred_element_type=jnp.float32
        )
        block_N = jnp.arange(N)
        candidate_BLN = (block_N >= first_BL[..., None]) & (block_N < end_BL[..., None])
        candidate_BGRLN = jnp.broadcast_to(candidate_BLN[:, None, None], score_BGRLN.shape)
        if J <= MAX_PASSES:
            return choose(score_BGRLN, candidate_BGRLN, J)
        # `lax.top_k` has the lowest block first among equals, too.
        best, winner_BGRLJ = jax.lax.top_k(jnp.where(candidate_BGRLN, score_BGRLN, -jnp.inf), J)
        return jnp.where(best > -jnp.inf, winner_BGRLJ, -1)

    winner_YBGRLJ = map_steps(one_tile, (tiles(q_BTHK.reshape(B, T, G, H // G, K)), tiles(first_BT), tiles(end_BT)))
    return winner_YBGRLJ.transpose(1, 2, 3, 5, 0, 4).reshape(B, H, J, -1)


def _groups(settings, winner_BHJT):
    B, H, R = *winner_BHJT.shape[:2], settings.H // settings.G
    D, L = settings.table_blocks, settings.chosen.plan.rows
    key_heads = B * H // R
    tiles = num_tiles(key_heads * settings.chosen.pairs_per_key_head, key_heads * D, L)
    return group(winner_BHJT, R, D, L, tiles)


def _tiles(settings, groups, heads):
    """The tables of gathered rows: every tile reads one whole block."""
    steps = settings.chosen.plan.steps
    block_Y = heads.first_block(settings.table_blocks) + groups.block_Y
    return Tiles(block_Y * steps, jnp.where(jnp.arange(block_Y.size) < groups.used_1, steps, 0))


def _gather_queries(settings, x_XTE, row_P, heads):
    """Rows of x as `Groups.row_P` numbers the queries of these heads, zeros at empty places: [P, E]."""
    place_P = heads.first_query(settings.H, settings.own.padded_rows) + row_P
    return gather(x_XTE.reshape(-1, x_XTE.shape[2]), jnp.where(row_P < 0, -1, place_P))


def _gather_rows(settings, rows, row_P, heads):
    """(q, dout, lse, delta) of gathered rows; probability 0 at empty places."""
    q_XTK, dout_XTV, lse_XT, delta_XT = rows
    place_P = jnp.where(row_P < 0, 0, heads.first_query(settings.H, settings.own.padded_rows) + row_P)
    lse_P = jnp.where(row_P < 0, jnp.inf, lse_XT.reshape(-1)[place_P])
    wide = (_gather_queries(settings, x, row_P, heads) for x in (q_XTK, dout_XTV))
    return *wide, lse_P, delta_XT.reshape(-1)[place_P]
