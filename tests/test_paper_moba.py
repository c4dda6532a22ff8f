"""The MoBA op against the row-by-row oracle of the paper: values, residuals, selection, gradients.

Legend: B batch, T queries, S keys, H query heads, G key heads, K query/key size, V value size, J = top_k.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax.moba_pallas import moba_attention
from tests.oracles import moba as oracle

# Compilation is most of the time of this file, and tiny arrays need no optimised code.
QUICK_COMPILE = {"xla_backend_optimization_level": 0}


@dataclass(frozen=True)
class Case:
    """One shape of the grid; `segments` are lengths of packed documents, one tuple for each sequence."""

    T: int
    block: int
    top_k: int
    B: int = 1
    S: int | None = None
    H: int = 2
    G: int = 2
    K: int = 8
    V: int = 8
    scale: float | None = None
    segments: tuple[tuple[int, ...], ...] | None = None
    q_offset: int | tuple[int, ...] = 0


CASES = {
    "one_block": Case(T=19, block=4, top_k=1),
    "all_blocks": Case(T=24, block=4, top_k=6, B=2),
    "sequence_shorter_than_block": Case(T=5, block=8, top_k=2),
    "many_ragged_blocks_and_shared_keys": Case(T=299, block=8, top_k=4, H=4, G=2, scale=0.3),
    "mla_sizes": Case(T=33, block=4, top_k=3, K=192, V=128, scale=0.1308608),
    "packed": Case(T=40, block=4, top_k=2, B=2, H=4, G=2, segments=((13, 9, 18), (1, 30, 9))),
    "offset_per_sequence": Case(T=5, S=24, block=4, top_k=2, B=2, H=4, G=2, q_offset=(7, 19)),
    "offset_packed": Case(T=8, S=32, block=4, top_k=2, segments=((9, 23),), q_offset=20),
}


def arrays(case, seed=0):
    rng = np.random.default_rng(seed)
    S = case.S or case.T
    shapes = [(case.T, case.H, case.K), (S, case.G, case.K), (S, case.G, case.V), (case.T, case.H, case.V)]
    q, k, v, do = (rng.standard_normal((case.B, *shape)).astype(np.float32) for shape in shapes)
    segments = None
    if case.segments:
        segments = np.stack([np.repeat(np.arange(1, len(lengths) + 1), lengths) for lengths in case.segments])
    return q, k, v, do, segments


def offsets(case):
    return np.broadcast_to(case.q_offset, (case.B,))


def op(case, implementation, segments):
    """The op as a function of q, k and v that returns the output and the residuals."""
    q_offset = case.q_offset if isinstance(case.q_offset, int) else jnp.array(case.q_offset, jnp.int32)
    return partial(
        moba_attention,
        block_size=case.block,
        top_k=case.top_k,
        scale=case.scale,
        segment_ids=None if segments is None else jnp.array(segments, jnp.int32),
        q_offset=q_offset,
        return_residuals=True,
        implementation=implementation,
    )


def run(attend, q, k, v):
    return jax.jit(attend, compiler_options=QUICK_COMPILE)(q, k, v)


def run_with_gradients(attend, q, k, v, do):
    """(out, residuals, (dq, dk, dv)), in one compiled function."""

    def everything(q, k, v, do):
        out, pullback, residuals = jax.vjp(attend, q, k, v, has_aux=True)
        return out, residuals, pullback(do)

    return jax.jit(everything, compiler_options=QUICK_COMPILE)(q, k, v, do)


def block_starts(case, b):
    """First key position of every block of one row, over all its segments."""
    starts, begin = [], 0
    for length in case.segments[b] if case.segments else (case.S or case.T,):
        starts += range(begin, begin + length, case.block)
        begin += length
    return starts


def selected_starts(selected_HTJ, case, b):
    """The selection in the oracle's form: first key positions in order, without the empty slots."""
    starts = block_starts(case, b)
    rows_THJ = np.asarray(selected_HTJ).transpose(1, 0, 2)
    return [[sorted(starts[n] for n in row if n >= 0) for row in heads] for heads in rows_THJ]


def differences(selected, expected, shown=3):
    """The first (query, head, selected, expected) that differ: few, as the whole difference of two is slow to print."""
    assert len(selected) == len(expected)
    pairs = (
        (t, h, *pair) for t in range(len(expected)) for h, pair in enumerate(zip(selected[t], expected[t], strict=True))
    )
    return [(t, h, one, other) for t, h, one, other in pairs if one != other][:shown]


def arguments(case, segments, b):
    segment_ids = None if segments is None else segments[b]
    return {
        "block_size": case.block,
        "top_k": case.top_k,
        "scale": case.scale,
        "segment_ids_S": segment_ids,
        "q_offset": int(offsets(case)[b]),
    }


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("name", CASES)
def test_values_selection_and_gradients(name, implementation):
    case = CASES[name]
    q, k, v, do, segments = arrays(case)
    out, residuals, gradients = run_with_gradients(op(case, implementation, segments), q, k, v, do)
    for b in range(case.B):
        expected = oracle.moba(q[b], k[b], v[b], **arguments(case, segments, b))
        assert differences(selected_starts(residuals.selected_BHTJ[b], case, b), expected.selected) == []
        np.testing.assert_allclose(out[b], expected.out_THV, atol=1e-5)
        np.testing.assert_allclose(residuals.lse_BHT[b].T, expected.lse_TH, atol=1e-5)
        np.testing.assert_allclose(residuals.max_logit_BH[b], expected.max_logit_H, atol=1e-5)
        wanted = oracle.moba_gradient(q[b], k[b], v[b], do[b], **arguments(case, segments, b))
        for gradient, want in zip(gradients, wanted, strict=True):
            np.testing.assert_allclose(gradient[b], want, atol=1e-4)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_equal_scores_go_to_the_lowest_block(implementation):
    """Whole numbers, so that equal block means are equal in every order of summation."""
    rng = np.random.default_rng(1)
    block = rng.integers(-2, 3, (1, 4, 1, 8)).astype(np.float32)
    k = np.tile(block, (1, 6, 1, 1))
    q = rng.integers(-2, 3, (1, 24, 2, 8)).astype(np.float32)
    case = Case(T=24, block=4, top_k=3, G=1)
    _, residuals = run(op(case, implementation, None), q, k, k)
    expected = oracle.moba(q[0], k[0], k[0], 4, 3).selected
    assert expected[23][0] == [0, 4, 20]
    assert differences(selected_starts(residuals.selected_BHTJ[0], case, 0), expected) == []


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_segment_id_that_comes_back_starts_a_new_segment(implementation):
    case = Case(T=20, block=4, top_k=2, segments=((6, 5, 9),))
    q, k, v, _, _ = arrays(case)
    segments = np.repeat([[1, 2, 1]], [6, 5, 9], axis=1)
    out, _ = run(op(case, implementation, segments), q, k, v)
    expected = oracle.moba(q[0], k[0], v[0], **arguments(case, segments, 0))
    np.testing.assert_allclose(out[0], expected.out_THV, atol=1e-5)


def test_full_attention_stands_in_where_all_blocks_are_chosen():
    """Left to choose, the op takes full attention where it is the same function; the selection must agree."""
    case = CASES["all_blocks"]
    q, k, v, _, segments = arrays(case)
    out, residuals = run(op(case, None, segments), q, k, v)
    for b in range(case.B):
        expected = oracle.moba(q[b], k[b], v[b], **arguments(case, segments, b))
        assert differences(selected_starts(residuals.selected_BHTJ[b], case, b), expected.selected) == []
        np.testing.assert_allclose(out[b], expected.out_THV, atol=1e-5)
        np.testing.assert_allclose(residuals.max_logit_BH[b], expected.max_logit_H, atol=1e-5)
