"""Small calls of MoBA and of full attention on which every device's kernels are compared with the definition."""

import jax.numpy as jnp
import numpy as np

from benchmarks.moba import as_selected, with_gradients
from k2jax.kernels.attention.reference import query_positions
from k2jax.kernels.moba import reference
from k2jax.kernels.moba.blocks import layout
from tests.oracles import moba as paper

# batch, tokens, query heads, key heads, sizes of keys and values, block size (None: full attention), top_k, type,
# PAIRS, ends of documents
ATTENDS = {
    "a tile and a half, grouped heads": (1, 300, 2, 1, 128, 128, 128, 2, "bfloat16", 2**22),
    "heads in steps, an odd length": (2, 301, 4, 2, 64, 64, 128, 3, "bfloat16", 900),
    "batch rows in steps": (2, 301, 2, 2, 64, 64, 128, 2, "bfloat16", 700),
    "MLA": (1, 400, 1, 1, 192, 128, 128, 2, "bfloat16", 2**22),
    "float16": (1, 500, 1, 1, 128, 128, 128, 3, "float16", 2**22),
    "own block alone": (1, 300, 2, 1, 64, 64, 128, 1, "bfloat16", 2**22),
    "large blocks": (1, 700, 1, 1, 64, 64, 256, 2, "bfloat16", 2**22),
    "more choices than blocks": (1, 300, 1, 1, 64, 64, 128, 9, "bfloat16", 2**22),
    "packed documents": (2, 700, 2, 1, 64, 64, 128, 3, "bfloat16", 2**22, 37, 290, 291, 600),
    "blocks of 100": (1, 560, 2, 1, 64, 64, 100, 3, "bfloat16", 900),
    "blocks of 200 in documents": (1, 900, 1, 1, 128, 128, 200, 2, "float16", 2**22, 450),
    "many choices": (1, 1300, 2, 1, 64, 64, 64, 18, "bfloat16", 2**22),
    "more than 32 blocks": (1, 4300, 1, 1, 64, 64, 128, 3, "bfloat16", 2**22),
    "full, packed documents": (2, 601, 2, 1, 64, 64, None, None, "bfloat16", None, 37, 290, 300, 301),
    "a chunk of the queries": (2, 620, 2, 1, 64, 64, 128, 3, "bfloat16", 2**22),
    "a chunk of the queries of documents": (2, 620, 2, 1, 64, 64, 100, 2, "bfloat16", 900, 180, 400),
    "full, a chunk of the queries": (2, 620, 2, 1, 64, 64, None, None, "bfloat16", None, 300),
    "full": (2, 301, 4, 2, 64, 64, None, None, "bfloat16", None),
    "full MLA": (1, 200, 2, 2, 192, 128, None, None, "float16", None),
}
# Relative errors of a norm, and largest differences.
ERRORS, DIFFERENCES = ("out", "dq", "dk", "dv"), ("lse", "max_logit")
# What the paper's oracle, which computes row by row, does in seconds.
MOST_PAIRS = 2_000_000
# How many queries, and where they begin.
QUERIES = {
    "a chunk of the queries": (204, [17, 416]),
    "a chunk of the queries of documents": (204, [17, 411]),
    "full, a chunk of the queries": (300, [10, 320]),
    "full, queries in a cache with room": (300, [10, 320]),
}


def inputs(name, case):
    """[q, k, v, dout], segment ids and the offset of the queries."""
    B, S, H, G, K, V, _, _, dtype, _, *ends = case
    segment_ids = None
    if ends:  # Every batch row a little longer documents.
        rows = [jnp.searchsorted(jnp.array(ends) + 3 * b, jnp.arange(S), side="right") for b in range(B)]
        segment_ids = jnp.stack(rows).astype(jnp.int32)
    T, q_offset = QUERIES.get(name, (S, 0))
    rng = np.random.default_rng(0)
    shapes = ((B, T, H, K), (B, S, G, K), (B, S, G, V), (B, T, H, V))
    arrays = [jnp.asarray(rng.standard_normal(shape), jnp.float32).astype(dtype) for shape in shapes]
    return arrays, segment_ids, q_offset if isinstance(q_offset, int) else jnp.array(q_offset)


def call_of(name, case, full, moba):
    """The case's call, (q, k, v) -> (out, residuals), of a room's `attention` or `moba_attention`."""
    _, segment_ids, q_offset = inputs(name, case)
    settings = {"scale": case[4] ** -0.5, "segment_ids": segment_ids, "q_offset": q_offset}
    if case[6] is not None:
        return lambda *qkv: tuple(moba(*qkv, **settings, block_size=case[6], top_k=case[7]))

    def attend(*qkv):
        out, lse, largest = full(*qkv, **settings)
        return out, (lse, largest)

    return attend


def distances(name, case, got) -> dict:
    """How far (out, residuals, gradients) are from the definition.

    Returns: agree, the share of equal choices; for out, dq, dk and dv the relative errors, in float32, of `got` and of
    plain attention in the case's type on the same choice; the largest differences of lse and max_logit. Where it is
    quick, `got` is compared with the paper too: `paper` has these distances, and the larger of both is told.
    """
    (B, S, H, _, K, _, C, top_k, *_), (arrays, segment_ids, q_offset) = case, inputs(name, case)
    T = arrays[0].shape[1]
    if C is None:
        block_id = jnp.zeros((B, S), jnp.int32) if segment_ids is None else segment_ids
        positions = jnp.broadcast_to(query_positions(arrays[0], q_offset), (B, T))
        own = jnp.take_along_axis(block_id, positions, axis=1)
        selected, agree = jnp.broadcast_to(own[:, None, :, None], (B, H, T, 1)), 1.0
    else:
        settings = {"block_size": C, "top_k": top_k, "segment_ids": segment_ids, "q_offset": q_offset}
        right = reference.moba_attention(*arrays[:3], scale=K**-0.5, **settings).residuals.selected_BHTJ
        selected, block_id = got[1].selected_BHTJ, layout(segment_ids, S, C).block_id_BS
        agree = float((selected == right).mean())

    def plain(*qkv):
        return as_selected(*qkv, selected, block_id, K**-0.5, q_offset)

    rounded, exact = with_gradients(plain, *arrays), with_gradients(plain, *(x.astype(jnp.float32) for x in arrays))

    quick = B * T * H * (S if C is None else C * top_k) < MOST_PAIRS
    found = {"agree": agree, "paper": paper_distances(name, case, got) if quick else {}}
    for i, what in enumerate(ERRORS):
        mine, theirs, right = ((x[0], *x[2])[i] for x in (got, rounded, exact))
        found[what] = (max(_error(mine, right), found["paper"].get(what, 0)), _error(theirs, right))
    for i, what in enumerate(DIFFERENCES):
        found[what] = max(_difference(got[1][i], exact[1][i]), found["paper"].get(what, 0))
    return found


def _error(x, right):
    return float(jnp.linalg.norm(x.astype(jnp.float32) - right) / jnp.linalg.norm(right))


def _difference(x, right):
    return float(jnp.abs(x - right).max())


def paper_distances(name, case, got) -> dict:
    """The same distances of `got` from an oracle that computes row by row what the paper says, in float64.

    Only `agree` where a choice is another: mean keys are rounded to the keys' type, by `docs/moba.md`, and the paper's
    are not.
    """
    (B, S, _, _, K, _, C, top_k, *_), (arrays, segment_ids, q_offset) = case, inputs(name, case)
    offset_B = np.broadcast_to(q_offset, (B,))
    arrays = [np.asarray(x.astype(jnp.float32)) for x in arrays]
    rights, agree = [], []
    for b in range(B):
        # Full attention is the block of a row that holds all keys.
        settings = {"block_size": C or S, "top_k": top_k or 1, "scale": K**-0.5, "q_offset": int(offset_B[b])}
        settings["segment_ids_S"] = None if segment_ids is None else np.asarray(segment_ids[b])
        q, k, v, dout = (x[b] for x in arrays)
        right = paper.moba(q, k, v, **settings)
        gradients = paper.moba_gradient(q, k, v, dout, **settings)
        rights.append((right.out_THV, *gradients, right.lse_TH.T, right.max_logit_H))
        if C is not None:
            block_id_S = np.broadcast_to(layout(segment_ids, S, C).block_id_BS, (B, S))[b]
            chosen_HTJ = np.asarray(got[1].selected_BHTJ[b])
            agree += [
                set(block_id_S[right.selected[t][h]]) == set(chosen_HTJ[h, t]) - {-1}
                for h, t in np.ndindex(chosen_HTJ.shape[:2])
            ]
    if not all(agree):
        return {"agree": float(np.mean(agree))}
    rights = [np.stack(x) for x in zip(*rights, strict=True)]
    measures = [*zip(ERRORS, [_error] * 4, strict=True), *zip(DIFFERENCES, [_difference] * 2, strict=True)]
    found = {
        what: distance(mine, right)
        for (what, distance), mine, right in zip(measures, (got[0], *got[2], *got[1][:2]), rights, strict=True)
    }
    return found | {"agree": 1.0}
