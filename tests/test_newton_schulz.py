"""Newton-Schulz against the same polynomial applied to an exact singular value decomposition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax import newton_schulz as newton_schulz_module
from k2jax.kernels import symmetric_matmul as symmetric_module
from k2jax.kernels.symmetric_matmul import symmetric_matmul
from k2jax.kernels.symmetric_matmul.reference import symmetric_matmul_reference
from k2jax.matrix_specs import MatrixSpec, stacks
from k2jax.muon_groups import orthogonalize, orthogonalize_leaves
from k2jax.newton_schulz import NS, newton_schulz

F32 = NS.k2(dtype="float32")
BF16 = NS.k2()
F16 = NS.k2(dtype="float16")


def oracle(x: np.ndarray, ns: NS) -> np.ndarray:
    """The composed polynomial on the singular values of x / ||x||_F, in float64."""
    x = x.astype(np.float64)
    peak = np.abs(x).max()
    if peak == 0:
        return np.zeros_like(x)
    x = x / peak
    u, s, vt = np.linalg.svd(x / np.linalg.norm(x), full_matrices=False)
    for a, b, c in ns.coeffs:
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ vt


def matrix(kind: str, n: int = 256, m: int = 896) -> np.ndarray:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, m))
    if kind == "gauss":
        return x.astype(np.float32)
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    if kind == "rank 5":
        s = np.where(np.arange(n) < 5, 1.0, 0.0)
    else:
        s = np.logspace(0, {"log3": -3, "log5": -5}[kind], n)
    return ((u * s) @ vt).astype(np.float32)


def relative_error(got, want) -> float:
    return float(np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want))


@pytest.mark.parametrize(
    ("kind", "ns", "bound"),
    [
        ("gauss", F32, 1e-5),
        ("log3", F32, 1e-5),
        ("log5", F32, 1e-5),
        ("gauss", BF16, 1.3e-2),
        ("log3", BF16, 0.08),
        ("log5", BF16, 0.1),
        ("gauss", F16, 2e-3),
        ("log3", F16, 1e-2),
        ("log5", F16, 2e-2),
    ],
    ids=lambda v: v.dtype if isinstance(v, NS) else str(v),
)
def test_equals_the_exact_composed_polynomial(kind, ns, bound):
    x = matrix(kind)
    assert relative_error(newton_schulz(jnp.asarray(x), ns), oracle(x, ns)) <= bound


def test_rank_deficient_matrix_keeps_its_rank():
    x = matrix("rank 5")
    got = np.asarray(newton_schulz(jnp.asarray(x), F32), np.float64)
    s = np.linalg.svd(got, compute_uv=False)
    # Noise of the float32 input, about 1e-8 of the largest singular value, grows by the slope at zero, 485.
    assert s[4] > 0.6
    assert s[5] < 1e-3


def test_close_to_the_polar_factor_on_a_gaussian_matrix():
    x = matrix("gauss", 256, 896)
    u, _, vt = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    assert relative_error(newton_schulz(jnp.asarray(x), F32), u @ vt) < 0.2


@pytest.mark.parametrize("ns", [F32, BF16, F16], ids=lambda ns: ns.dtype)
def test_zero_matrix_stays_zero(ns):
    assert not np.asarray(newton_schulz(jnp.zeros((3, 5, 7)), ns)).any()


@pytest.mark.parametrize("scale", [1e30, 1e-30, 3e37, 1.2e-37])
@pytest.mark.parametrize("ns", [F32, BF16, F16], ids=lambda ns: ns.dtype)
def test_scale_of_the_input_does_not_matter(ns, scale):
    x = np.random.default_rng(1).uniform(0.1, 1.0, (16, 24)).astype(np.float32)
    scaled = (x * np.float32(scale)).astype(np.float32)
    got = newton_schulz(jnp.asarray(scaled), ns)
    assert relative_error(got, oracle(scaled, ns)) <= {"float32": 2e-5, "bfloat16": 0.1, "float16": 2e-2}[ns.dtype]


@pytest.mark.parametrize("entry", [1e30, 1e-30])
def test_one_extreme_entry_among_ordinary_ones(entry):
    x = matrix("gauss")
    x[3, 4] = entry
    assert relative_error(newton_schulz(jnp.asarray(x), F32), oracle(x, F32)) <= 1e-5


def test_powers_of_two_scale_bitwise():
    x = jnp.asarray(matrix("gauss"))
    np.testing.assert_array_equal(newton_schulz(x, BF16), newton_schulz(x * 2.0**-60, BF16))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_broken_gradient_gives_nan_and_not_a_silent_zero(bad):
    x = matrix("gauss", 8, 12)
    x[0, 0] = bad
    batch = jnp.stack([jnp.asarray(x), jnp.ones((8, 12))])
    out = newton_schulz(batch, F32)
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1]).all()


@pytest.mark.parametrize("ns", [F32, BF16], ids=lambda ns: ns.dtype)
def test_transpose_of_the_input_transposes_the_output(ns):
    x = jnp.asarray(matrix("gauss", 24, 40))
    np.testing.assert_array_equal(newton_schulz(x.T, ns), newton_schulz(x, ns).T)


def test_batch_axes_equal_a_loop_and_vmap():
    x = jnp.asarray(np.random.default_rng(2).standard_normal((2, 3, 12, 8)), jnp.float32)
    got = newton_schulz(x, F32)
    for i in range(2):
        for j in range(3):
            np.testing.assert_allclose(got[i, j], newton_schulz(x[i, j], F32), rtol=0, atol=2e-6)
    vmapped = jax.vmap(jax.vmap(lambda a: newton_schulz(a, F32)))(x)
    np.testing.assert_allclose(got, vmapped, rtol=0, atol=2e-6)


def test_batch_axes_are_never_flattened():
    jaxpr = str(jax.make_jaxpr(lambda x: newton_schulz(x, BF16))(jnp.zeros((2, 3, 12, 8))))
    assert "reshape" not in jaxpr
    assert "dimension_numbers=(([3], [3]), ([0, 1], [0, 1]))" in jaxpr


@pytest.mark.parametrize("ns", [BF16, F16], ids=lambda ns: ns.dtype)
def test_products_accumulate_in_float32(ns):
    # In 16 bits a sum of ones stops growing at 256 or 2048.
    ones = jnp.ones((2, 4096), ns.dtype)
    np.testing.assert_array_equal(newton_schulz_module._product(ones, ones.T).astype(jnp.float32), 4096.0)
    np.testing.assert_array_equal(symmetric_matmul(ones).astype(jnp.float32), 4096.0)


@pytest.mark.parametrize("ns", [BF16, NS.k2("float16", "gram")], ids=["standard", "Gram"])
def test_the_symmetric_kernel_takes_every_symmetric_product_where_it_is_chosen(monkeypatch, ns):
    taken = []

    def kernel(x, y, c, alpha, beta, gamma):
        taken.append((x.shape, y is None, c is None))
        return symmetric_matmul_reference(x, y, c, alpha, beta, gamma)

    monkeypatch.setattr(symmetric_module, "not_hopper", lambda: None)
    monkeypatch.setattr(symmetric_module, "SM90_MIN_ROWS", 128)
    monkeypatch.setattr(symmetric_module, "_sm90_on_gpus", kernel)
    x = np.stack([matrix("gauss"), matrix("log3")])
    got = newton_schulz(jnp.asarray(x), ns)
    for i, bound in enumerate((1.3e-2, 0.08)):
        assert relative_error(got[i], oracle(x[i], ns)) <= bound
    # Traced once in a loop over equal steps: X X^T and the polynomial of each; the Gram form has two kinds of segments.
    gram = ns.method == "gram"
    assert taken.count(((2, 256, 896), True, True)) == (2 if gram else 1)
    assert taken.count(((2, 256, 256), True, False)) == (5 if gram else 1)
    # Of two matrices: for each step but a segment's last, P R, P R P and Q P.
    assert taken.count(((2, 256, 256), False, True)) == (9 if gram else 0)


@pytest.mark.parametrize(
    ("shape", "spec", "to_2d", "sides"),
    [
        ((5, 7), MatrixSpec(), lambda x: x, (1, 5, 7)),
        ((5, 7), MatrixSpec(-1, -2), lambda x: x.T, (1, 7, 5)),
        ((5, 4, 3), MatrixSpec(-3, (-2, -1)), lambda x: x.reshape(5, 12), (1, 5, 12)),
        ((4, 3, 5), MatrixSpec((-3, -2), -1), lambda x: x.reshape(12, 5), (1, 12, 5)),
        ((4, 5, 3), MatrixSpec(1, (0, 2)), lambda x: x.transpose(1, 0, 2).reshape(5, 12), (1, 5, 12)),
    ],
)
def test_spec_says_which_axes_form_the_matrix(shape, spec, to_2d, sides):
    x = jnp.asarray(np.random.default_rng(3).standard_normal(shape), jnp.float32)
    got = orthogonalize(x, ns=F32, spec=spec)
    assert got.shape == shape
    np.testing.assert_allclose(to_2d(got), newton_schulz(to_2d(x), F32), rtol=0, atol=2e-6)
    assert [stack[3:] for stack in stacks(shape, spec)] == [sides]


@pytest.mark.parametrize(
    ("shape", "spec"),
    [((3, 5, 7), MatrixSpec()), ((2, 3, 5, 7), MatrixSpec()), ((2, 5, 3, 7), MatrixSpec(1, 3))],
)
def test_stacked_parameter_equals_its_matrices_one_by_one(shape, spec):
    x = jnp.asarray(np.random.default_rng(4).standard_normal(shape), jnp.float32)
    got = orthogonalize(x, ns=F32, spec=spec)
    front = lambda a: jnp.moveaxis(a, (1, 3), (2, 3)) if spec.reduction_axis == 1 else a  # noqa: E731
    for index in np.ndindex(*front(x).shape[:-2]):
        want = newton_schulz(front(x)[index], F32)
        np.testing.assert_allclose(front(got)[index], want, rtol=0, atol=2e-6)


def test_a_leaf_beyond_the_bytes_of_a_group_goes_through_in_chunks_to_save_memory():
    def temporary_bytes(fn):
        x = jax.ShapeDtypeStruct((8, 4, 64, 64), jnp.float32)
        return jax.jit(fn).lower(x).compile().memory_analysis().temp_size_in_bytes

    four = 4 * 4 * 64 * 64
    chunks = temporary_bytes(lambda x: orthogonalize_leaves([x], [MatrixSpec()], F32, max_group_bytes=four))
    at_once = temporary_bytes(lambda x: newton_schulz(x, F32))
    assert chunks < at_once / 2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (MatrixSpec(-3, -1), "does not fit shape"),
        (MatrixSpec(-1, 1), "twice"),
        (MatrixSpec((), -1), "does not fit shape"),
    ],
)
def test_spec_that_does_not_fit_is_an_error(spec, message):
    with pytest.raises(ValueError, match=message):
        orthogonalize(jnp.zeros((4, 5)), spec=spec)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"coeffs": ()}, "NS.coeffs"),
        ({"coeffs": ((1.0, 2.0),)}, "NS.coeffs"),
        ({"coeffs": ((1.0, 0.0, 0.0),), "dtype": "float64"}, "NS.dtype"),
    ],
)
def test_bad_iteration_is_an_error(kwargs, message):
    with pytest.raises(ValueError, match=message):
        NS(**kwargs)


def test_k2_is_five_keller_steps_in_bfloat16():
    assert NS.k2() == NS(coeffs=((3.4445, -4.7750, 2.0315),) * 5, dtype="bfloat16")
