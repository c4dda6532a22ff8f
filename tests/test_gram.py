"""Newton-Schulz on the Gram matrix, and near-exact coefficients, against the exact polynomial in float64."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax.newton_schulz import NS, method_flops, newton_schulz, runs_gram
from tests.test_newton_schulz import matrix, relative_error
from tests.test_polar_express import DEEPSEEK_V4

KELLER, FAST = NS.k2().coeffs, NS.fast().coeffs


@cache
def decomposed(kind):
    x = matrix(kind).astype(np.float64)
    return np.linalg.svd(x / np.linalg.norm(x), full_matrices=False)


def exact(kind, coeffs):
    u, s, vt = decomposed(kind)
    for a, b, c in coeffs:
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ vt


def run(x, ns):
    return _run(jnp.asarray(x), ns)


_run = jax.jit(newton_schulz, static_argnums=1, compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.parametrize(
    ("kind", "ns", "bound"),
    [
        ("gauss", NS.fast(), 2e-3),
        ("log3", NS.fast(), 1.5e-2),
        ("log5", NS.fast(), 2.5e-2),
        ("gauss", NS(KELLER, "float16", "gram"), 2e-3),
        ("log3", NS(KELLER, "float16", "gram"), 1e-2),
        ("log5", NS(KELLER, "float16", "gram"), 2e-2),
        ("log5", NS.fast("float32"), 1e-4),
        ("log5", NS(FAST, "float32", "gram", restarts=(2,)), 2e-3),
        ("log5", NS(FAST, "float32"), 3e-5),
        ("log5", NS(FAST, "bfloat16"), 0.24),
        ("log5", NS(FAST, "float16"), 3e-2),
        ("log5", NS(DEEPSEEK_V4, "float32"), 5e-4),
        ("log3", NS(DEEPSEEK_V4, "float16", "gram"), 2e-2),
    ],
    ids=lambda v: f"{len(v.coeffs)}-{v.method}-{v.dtype}-{v.restarts}" if isinstance(v, NS) else str(v),
)
def test_equals_the_exact_composed_polynomial(kind, ns, bound):
    assert relative_error(run(matrix(kind), ns), exact(kind, ns.coeffs)) <= bound


def test_fast_is_the_polar_factor_where_k2_is_not():
    u, _, vt = decomposed("gauss")
    assert relative_error(run(matrix("gauss"), NS.fast()), u @ vt) <= 2.5e-3
    assert 0.1 < relative_error(exact("gauss", KELLER), u @ vt) < 0.2


def test_restarts_are_every_second_step_unless_given():
    assert NS(FAST, "float16", "gram") != NS.fast()
    assert NS(FAST, "float16", "gram").segments() == NS.fast().segments()
    assert [len(part) for part in NS(KELLER, "float16", "gram").segments()] == [2, 2, 1]
    assert [len(part) for part in NS(KELLER, "float16", "gram", (1,)).segments()] == [1, 4]


# --- the input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e30, 1e-30, 3e37, 1.2e-37])
def test_scale_of_the_input_does_not_matter(scale):
    x = np.random.default_rng(1).uniform(0.1, 1.0, (16, 48)).astype(np.float32)
    np.testing.assert_allclose(run(x * np.float32(scale), NS.fast()), run(x, NS.fast()), rtol=0, atol=2e-3)


def test_zero_stays_zero_and_a_broken_gradient_gives_nan():
    x = np.zeros((3, 8, 24), np.float32)
    x[1, 2, 3], x[2] = np.nan, 1.0
    out = np.asarray(run(x, NS.fast()))
    assert not out[0].any()
    assert np.isnan(out[1]).all()
    np.testing.assert_allclose(out[2], 1 / np.sqrt(8 * 24), rtol=1e-2)  # rank one


@pytest.mark.parametrize("entry", [1e30, 1e-30])
def test_one_extreme_entry_among_ordinary_ones(entry):
    x = matrix("gauss", 32, 96).copy()
    x[3, 4] = entry
    u, s, vt = np.linalg.svd(x.astype(np.float64) / np.abs(x).max(), full_matrices=False)
    s /= np.linalg.norm(s)
    for a, b, c in FAST:
        s = a * s + b * s**3 + c * s**5
    assert relative_error(run(x, NS.fast()), (u * s) @ vt) <= 6e-3


def test_rank_deficient_matrix_keeps_its_rank():
    s = np.linalg.svd(np.asarray(run(matrix("rank 5"), NS.fast("float32")), np.float64), compute_uv=False)
    # Noise of the float32 input, about 1e-8 of the largest singular value, grows by the slope at zero, 1900.
    np.testing.assert_allclose(s[:5], 1, atol=3e-3)
    assert s[5] < 1e-3


def test_transpose_and_batch_equal_matrices_one_by_one():
    x = jnp.asarray(np.random.default_rng(2).standard_normal((3, 40, 12)), jnp.float32)
    got = run(x, NS.fast())
    np.testing.assert_array_equal(run(jnp.swapaxes(x, -1, -2), NS.fast()), jnp.swapaxes(got, -1, -2))
    np.testing.assert_allclose(got[2], run(x[2], NS.fast()), rtol=0, atol=1e-3)
    vmapped = jax.jit(jax.vmap(lambda a: newton_schulz(a, NS.fast())))(x)
    np.testing.assert_allclose(got, vmapped, rtol=0, atol=1e-3)


# --- work -----------------------------------------------------------------------------------------


def products(jaxpr, times=1):
    """Operations of all dot_generals together, with scans counted as often as they run."""
    found = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            inner = eqn.invars[0].aval.shape[eqn.params["dimension_numbers"][0][0][0]]
            found += 2 * times * inner * eqn.outvars[0].aval.size
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", None)
            if inner is not None:
                found += products(inner, times * eqn.params.get("length", 1))
    return found


@pytest.mark.parametrize(
    "ns",
    [NS.k2(), NS.fast(), NS(KELLER, "float16", "gram", (2,)), NS(DEEPSEEK_V4, "float32", "gram")],
    ids=["k2", "fast", "one restart", "ten steps"],
)
def test_operations_are_those_of_the_products_that_run(ns):
    n, m = 16, 56
    found = products(jax.make_jaxpr(lambda x: newton_schulz(x, ns))(jnp.zeros((n, m))).jaxpr)
    assert found == method_flops(n, m, ns, ns.method)


@pytest.mark.parametrize(("ns", "units"), [(NS.k2(), 80), (NS(KELLER, "float16", "gram", (2,)), 56), (NS.fast(), 72)])
def test_operations_at_the_shape_of_k2s_experts(ns, units):
    """In units of n^3, at m = 3.5 n."""
    assert method_flops(2048, 7168, ns, ns.method) == units * 2048**3


def test_a_nearly_square_matrix_takes_the_standard_iteration_with_the_same_settings():
    standard = NS(FAST, "float16")
    assert not runs_gram(64, 96, NS.fast())
    assert runs_gram(64, 97, NS.fast())
    for m, same in ((64, True), (96, True), (97, False)):
        jaxprs = [
            str(jax.make_jaxpr(lambda x, ns=ns: newton_schulz(x, ns))(jnp.zeros((64, m))))
            for ns in (standard, NS.fast())
        ]
        assert (jaxprs[0] == jaxprs[1]) == same


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dtype": "bfloat16", "method": "gram"}, "Use dtype='float16'"),
        ({"method": "qr"}, "NS.method must be one of .*got 'qr'"),
        ({"restarts": (2,)}, "restarts=\\(2,\\) belong to method='gram'"),
        ({"dtype": "float16", "method": "gram", "restarts": (0,)}, "increasing steps"),
        ({"dtype": "float16", "method": "gram", "restarts": (5,)}, "increasing steps"),
        ({"dtype": "float16", "method": "gram", "restarts": (4, 2)}, "increasing steps"),
        ({"dtype": "float16", "method": "gram", "restarts": (2, 2)}, "increasing steps"),
    ],
)
def test_settings_that_cannot_work_are_an_error(kwargs, message):
    with pytest.raises(ValueError, match=message):
        NS(coeffs=KELLER, **kwargs)
