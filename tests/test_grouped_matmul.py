"""Grouped matrix products: every implementation against a plain loop, with its gradients.

Legend: R rows, E groups, D input features, F output features.
"""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax.kernels import grouped_matmul as room
from k2jax.kernels.grouped_matmul import IMPLEMENTATIONS, TILE, grouped_matmul

D, F = 5, 7
SIZES = {
    "all groups": (1, 2, 1, 3),
    "empty groups first, between and last": (0, 2, 0, 0, 1, 0),
    "one group": (2,),
    "all rows in the last group": (0, 0, 3),
    "rows after the last group": (1, 0, 1, None, None),
}


def case(name):
    """x [R, D], w [E, D, F], sizes [E]; None stands for a tile of zeros that no group owns."""
    tiles = [n for n in SIZES[name] if n is not None]
    used, spare = sum(tiles) * TILE, (len(SIZES[name]) - len(tiles)) * TILE
    rng = np.random.default_rng(0)
    x_RD = np.concatenate([rng.standard_normal((used, D), np.float32), np.zeros((spare, D), np.float32)])
    return x_RD, rng.standard_normal((len(tiles), D, F), np.float32), np.array(tiles) * TILE


def loop(x_RD, w_EDF, sizes_E):
    y_RF, start = np.zeros((x_RD.shape[0], F)), 0
    for size, w_DF in zip(sizes_E, w_EDF, strict=True):
        y_RF[start : start + size] = x_RD[start : start + size].astype(np.float64) @ w_DF
        start += size
    return y_RF


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
def test_every_row_meets_the_matrix_of_its_group(name, implementation):
    x_RD, w_EDF, sizes_E = case(name)
    y_RF = grouped_matmul(x_RD, w_EDF, jnp.array(sizes_E), implementation=implementation)
    np.testing.assert_allclose(y_RF, loop(x_RD, w_EDF, sizes_E), atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_are_those_of_the_loop(implementation):
    x_RD, w_EDF, sizes_E = case("empty groups first, between and last")
    grad_RF = np.random.default_rng(1).standard_normal((x_RD.shape[0], F), np.float32)

    def loss(x_RD, w_EDF):
        return jnp.vdot(grouped_matmul(x_RD, w_EDF, jnp.array(sizes_E), implementation=implementation), grad_RF)

    dx_RD, dw_EDF = jax.jit(jax.grad(loss, argnums=(0, 1)))(x_RD, w_EDF)
    group_R = np.repeat(np.arange(len(sizes_E)), sizes_E)
    np.testing.assert_allclose(dx_RD, np.einsum("rf,rdf->rd", grad_RF, w_EDF[group_R]), atol=1e-4)
    want = np.stack([x_RD[group_R == e].T @ grad_RF[group_R == e] for e in range(len(sizes_E))])
    np.testing.assert_allclose(dw_EDF, want, atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_result_has_the_dtype_of_its_inputs(implementation):
    x_RD, w_EDF, sizes_E = (jnp.asarray(a) for a in case("one group"))
    y_RF = grouped_matmul(x_RD.astype("bfloat16"), w_EDF.astype("bfloat16"), sizes_E, implementation=implementation)
    assert y_RF.dtype == jnp.bfloat16
    np.testing.assert_allclose(y_RF.astype(np.float32), loop(*case("one group")), atol=0.1)


def test_an_unknown_implementation_is_refused_with_those_that_exist():
    x_RD, w_EDF, sizes_E = case("one group")
    with pytest.raises(ValueError, match=r"implementation='cublas': use None or one of \['reference', 'xla'\]"):
        grouped_matmul(x_RD, w_EDF, sizes_E, implementation="cublas")


def test_a_part_of_a_tile_is_refused():
    x_RD, w_EDF, sizes_E = case("one group")
    with pytest.raises(ValueError, match=f"x has {2 * TILE - 1} rows: pad them to a multiple of {TILE}"):
        grouped_matmul(x_RD[:-1], w_EDF, sizes_E)


def test_the_choice_is_said_once(caplog):
    room._say_once.cache_clear()
    x_RD, w_EDF, sizes_E = case("one group")
    with caplog.at_level(logging.INFO, logger="k2jax"):
        grouped_matmul(x_RD, w_EDF, sizes_E)
        grouped_matmul(x_RD, w_EDF, sizes_E)
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == ["grouped_matmul: xla"]
