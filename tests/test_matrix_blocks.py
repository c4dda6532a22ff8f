"""Blocks of fused weights and one matrix per head equal a loop over plain matrices; so do optax's dimension numbers.

Legend: L layers, D model, H heads, K head, C key-value latent, P rotary, N no position, V value size.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

from k2jax.matrix_specs import MatrixSpec, from_matrices, stacks, to_matrices, update_scale
from k2jax.muon_groups import orthogonalize, orthogonalize_leaves
from k2jax.muonclip import NS, describe, muonclip, scale_by_muon
from k2jax.newton_schulz import newton_schulz

F32 = NS.k2(dtype="float32")
L, D, H, K, C, P, N, V = 2, 12, 3, 4, 6, 2, 5, 5


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def one_by_one(x, cuts, scale=1.0):
    """The update of a loop over matrices, each a pair (index into x, shape as a matrix)."""
    out = np.full(x.shape, np.nan, np.float32)
    for index, shape in cuts:
        piece = np.asarray(x)[index]
        moved = newton_schulz(jnp.asarray(piece.reshape(shape)), F32)
        out[index] = np.asarray(moved).reshape(piece.shape) * (np.sqrt(max(shape)) if scale is None else scale)
    return out


S = slice(None)
CASES = {
    "latent and rotary key": (
        MatrixSpec(blocks=(C, P)),
        (L, D, C + P),
        [((i, S, part), (D, n)) for i in range(L) for part, n in ((slice(0, C), C), (slice(C, C + P), P))],
    ),
    "keys and values of every head": (
        MatrixSpec(-3, -1, blocks=(N, V)),
        (L, C, H, N + V),
        [((i, S, h, part), (C, N)) for i in range(L) for h in range(H) for part in (slice(0, N), slice(N, N + V))],
    ),
    "keys and values of all heads together": (
        MatrixSpec(-3, (-2, -1), blocks=(N, V)),
        (C, H, N + V),
        [((S, S, part), (C, H * N)) for part in (slice(0, N), slice(N, N + V))],
    ),
    "one matrix per head": (
        MatrixSpec(-3, -1),
        (L, D, H, K),
        [((i, S, h), (D, K)) for i in range(L) for h in range(H)],
    ),
    "heads side by side": (
        MatrixSpec(blocks=(K,) * H),
        (L, D, H * K),
        [((i, S, slice(h * K, h * K + K)), (D, K)) for i in range(L) for h in range(H)],
    ),
    "fused query, key and value": (
        MatrixSpec(blocks=(H * K, K, K)),
        (D, (H + 2) * K),
        [((S, slice(0, 12)), (D, 12)), ((S, slice(12, 16)), (D, 4)), ((S, slice(16, 20)), (D, 4))],
    ),
    "the same in torch's order": (
        MatrixSpec(-1, -2, blocks=(H * K, K, K)),
        ((H + 2) * K, D),
        [((slice(0, 12),), (12, D)), ((slice(12, 16),), (4, D)), ((slice(16, 20),), (4, D))],
    ),
    "input heads of the output projection": (
        MatrixSpec((-3, -2), -1, blocks=(1,) * H, block_axis=-3),
        (L, H, V, D),
        [((i, h), (V, D)) for i in range(L) for h in range(H)],
    ),
    "equal blocks apart from each other": (
        MatrixSpec(blocks=(2, 3, 2)),
        (D, 7),
        [((S, slice(0, 2)), (D, 2)), ((S, slice(2, 5)), (D, 3)), ((S, slice(5, 7)), (D, 2))],
    ),
}
EVERY_CASE = pytest.mark.parametrize(("spec", "shape", "cuts"), CASES.values(), ids=CASES)


@EVERY_CASE
def test_blocks_equal_a_loop_over_matrices(spec, shape, cuts):
    x = normal(0, *shape)
    np.testing.assert_allclose(orthogonalize(x, ns=F32, spec=spec), one_by_one(x, cuts), rtol=0, atol=2e-6)


@EVERY_CASE
def test_every_block_is_scaled_by_its_own_longer_side(spec, shape, cuts):
    x = normal(0, *shape)
    tx = scale_by_muon(consistent_rms=1.0, matrix_specs=spec, ns=F32)
    got, _ = jax.jit(tx.update)(x, tx.init(x))
    np.testing.assert_allclose(got, one_by_one(x, cuts, scale=None), rtol=0, atol=2e-5)


@EVERY_CASE
def test_matrices_go_out_and_come_back(spec, shape, cuts):
    x = normal(0, *shape)
    matrices = to_matrices(x, spec)
    np.testing.assert_array_equal(from_matrices(matrices, shape, spec), x)
    assert [(int(np.prod(m.shape[:-2])), *m.shape[-2:]) for m in matrices] == [s[3:] for s in stacks(shape, spec)]
    assert sum(s.matrices for s in stacks(shape, spec)) == len(cuts)


def test_equal_neighbours_are_one_batch():
    assert [s[3:] for s in stacks((L, D, H * K), MatrixSpec(blocks=(K,) * H))] == [(L * H, D, K)]
    assert [s[3:] for s in stacks((D, 20), MatrixSpec(blocks=(12, 4, 4)))] == [(1, D, 12), (2, D, 4)]


def test_the_update_of_a_block_has_the_rms_of_a_whole_matrix():
    x = normal(0, 64, 40)
    tx = scale_by_muon(matrix_specs=MatrixSpec(blocks=(32, 8)), ns=NS.fast("float32"))
    got = np.asarray(tx.update(x, tx.init(x))[0])
    for part in (got[:, :32], got[:, 32:]):
        np.testing.assert_allclose(np.sqrt(np.mean(part**2)), 0.2, rtol=2e-3)


def test_scale_of_a_leaf_without_blocks_is_one_number():
    assert update_scale((L, D, H, K), MatrixSpec(-3, (-2, -1))) == np.sqrt(12)
    np.testing.assert_allclose(update_scale((3, 7), MatrixSpec(blocks=(2, 5))), [[3**0.5] * 2 + [5**0.5] * 5])


# --- settings of one leaf, and of optax -----------------------------------------------------------


def test_a_leaf_may_have_its_own_newton_schulz():
    exact = NS.fast("float32")
    x = normal(0, 8, 24)
    got = orthogonalize_leaves([x, x], [MatrixSpec(), MatrixSpec(ns=exact)], F32)
    np.testing.assert_array_equal(got[0], newton_schulz(x, F32))
    np.testing.assert_array_equal(got[1], newton_schulz(x, exact))
    table = describe({"a": x, "b": x}, {"a": MatrixSpec(), "b": MatrixSpec(ns=exact)}).splitlines()
    assert [("gram" in line) for line in table[1:3]] == [False, True]


def test_dimension_numbers_of_optax_are_specs():
    params = {"wq": normal(0, D, H, K), "w": normal(1, D, K), "b": normal(2, K)}
    theirs = {"wq": MuonDimensionNumbers((0,), [1, 2]), "w": MuonDimensionNumbers(), "b": None}
    ours = {"wq": MatrixSpec(0, (1, 2)), "w": MatrixSpec(0, 1), "b": None}
    assert describe(params, theirs) == describe(params, ours)
    by_path = {path: theirs[path] for path in params}
    assert describe(params, lambda path, leaf: by_path[path]) == describe(params, ours)
    theirs_tx = optax.contrib.muon(0.1, muon_weight_dimension_numbers=theirs, nesterov=False, consistent_rms=0.2)
    tx = muonclip(0.1, weight_decay=0.0, matrix_specs=theirs, ns=F32)
    want, _ = theirs_tx.update(params, theirs_tx.init(params), params)
    got, _ = tx.update(params, tx.init(params), params)
    for name in ("wq", "w"):
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (MatrixSpec(blocks=(4, 5)), r"blocks add up to 9, the axis has 8"),
        (MatrixSpec(blocks=()), r"blocks add up to 0, the axis has 8"),
        (MatrixSpec(blocks=(8, 0)), r"blocks=\(8, 0\)"),
        (MatrixSpec(blocks=(1, 1), block_axis=-3), r"block_axis must be a reduction or an output axis"),
        (MatrixSpec(blocks=(4, 4), block_axis=5), r"block_axis must be a reduction or an output axis"),
        (MatrixSpec(block_axis=-1), r"has a block_axis but no blocks"),
    ],
)
def test_blocks_that_do_not_fit_name_the_leaf_and_the_fix(spec, message):
    with pytest.raises(ValueError, match=rf"(?s)matrix_specs of 'attn/w': .*{message}.*use None for AdamW"):
        muonclip(0.1, matrix_specs=spec).init({"attn": {"w": jnp.ones((2, 4, 8))}})


def test_a_spec_is_written_as_it_is_typed():
    assert repr(MatrixSpec()) == "MatrixSpec()"
    assert repr(MatrixSpec(-3, (-2, -1), blocks=(4, 4))) == (
        "MatrixSpec(reduction_axis=-3, output_axis=(-2, -1), blocks=(4, 4))"
    )
