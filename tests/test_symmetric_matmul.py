"""Symmetric products: the public function, the schedule of the Hopper kernel, the kernel interpreted and lowered.

The interpreter simulates the kernel's blocks, barriers and copies on a CPU and looks for races; what the compiler makes
of the kernel only a GPU shows: `python -m benchmarks.symmetric_matmul`.
"""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax.kernels import symmetric_matmul as room
from k2jax.kernels.symmetric_matmul import symmetric_matmul
from k2jax.kernels.symmetric_matmul.schedule import OWN_ROWS, table
from k2jax.kernels.symmetric_matmul.sm90 import H100_SMS, Config, refusal, symmetric_matmul_sm90
from tests.on_devices import told_by

ALPHA, BETA, GAMMA = 1.5, -0.75, 0.25


def case(batch, n, m, dtype=jnp.float32):
    """x and a symmetric c of small whole numbers, of which float32 adds up products without an error."""
    rng = np.random.default_rng(0)
    c = rng.integers(-4, 5, (batch, n, n))
    return jnp.asarray(rng.integers(-3, 4, (batch, n, m)), dtype), jnp.asarray(c + c.swapaxes(1, 2), dtype)


def another(x):
    """y of which x y^T is symmetric, of small whole numbers too: x D with a diagonal D."""
    return x * jnp.asarray(np.random.default_rng(1).choice([-2, -1, 1], x.shape[-1]), x.dtype)


def exact(x, c=None, gamma=None, y=None):
    """The result in float64; with the coefficients above and whole numbers it needs one rounding."""
    x = np.asarray(x, np.float64)
    out = ALPHA * np.einsum("bim,bjm->bij", x, x if y is None else np.asarray(y, np.float64))
    out += 0 if c is None else BETA * np.asarray(c, np.float64)
    return out + (0 if gamma is None else gamma * np.eye(x.shape[1]))


# --- the public function ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("with_c", [False, True])
@pytest.mark.parametrize("gamma", [None, GAMMA])
def test_reference_is_the_formula(dtype, with_c, gamma):
    x, c = case(2, 9, 13, dtype)
    c = c if with_c else None
    out = symmetric_matmul(x, c, alpha=ALPHA, beta=BETA, gamma=gamma, implementation="reference")
    np.testing.assert_array_equal(out, exact(x, c, gamma).astype(x.dtype), strict=True)


def test_one_matrix_is_a_batch_of_one():
    x, c = case(1, 6, 4)
    one = symmetric_matmul(x[0], c[0], y=another(x)[0], alpha=ALPHA, beta=BETA, gamma=GAMMA)
    np.testing.assert_array_equal(one, exact(x, c, GAMMA, another(x))[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("alpha", [1.0, jnp.float32(1.0)], ids=["known", "traced"])
def test_the_bare_product_of_two_matrices(dtype, alpha):
    x, _ = case(2, 9, 13, dtype)
    out = symmetric_matmul(x, y=another(x), alpha=alpha)
    expected = np.einsum("bim,bjm->bij", np.asarray(x, np.float64), np.asarray(another(x), np.float64))
    np.testing.assert_array_equal(out, expected.astype(x.dtype), strict=True)


def test_coefficients_may_be_traced_through_a_scan():
    x, c = case(1, 6, 4)

    def step(a, abg):
        alpha, beta, gamma = abg
        return a, symmetric_matmul(x, a, alpha=alpha, beta=beta, gamma=gamma)

    _, outs = jax.lax.scan(step, c, jnp.array([[1.0, 0.0, 0.0], [ALPHA, BETA, GAMMA]]))
    np.testing.assert_array_equal(outs[1], exact(x, c, GAMMA))


def test_none_says_once_what_it_chose_and_why(caplog):
    room._say_once.cache_clear()
    x, _ = case(1, 6, 4)
    with caplog.at_level(logging.INFO, logger="k2jax"):
        symmetric_matmul(x)
        symmetric_matmul(x)
    (said,) = [record.getMessage() for record in caplog.records if "symmetric_matmul" in record.getMessage()]
    assert said.startswith("symmetric_matmul: reference (it needs a Hopper GPU")


@pytest.mark.parametrize(
    ("x", "c", "implementation", "message"),
    [
        ((6,), None, None, r"x.shape=\(6,\) must be \(\.\.\., rows, columns\)"),
        ((2, 6, 4), (2, 6, 4), None, r"c.shape=\(2, 6, 4\) must be \(2, 6, 6\)"),
        ((2, 6, 4), None, "cublas", r"use None or one of \['reference', 'sm90'\]"),
        ((1, 512, 64), None, "sm90", "it needs a Hopper GPU"),
    ],
)
def test_a_call_that_cannot_be_is_refused(x, c, implementation, message):
    c = None if c is None else jnp.zeros(c)
    with pytest.raises(ValueError, match=message):
        symmetric_matmul(jnp.zeros(x), c, implementation=implementation)


def test_two_types_are_refused():
    x, c = case(1, 6, 4)
    with pytest.raises(ValueError, match="c is float32 and x is bfloat16"):
        symmetric_matmul(x.astype(jnp.bfloat16), c)
    with pytest.raises(ValueError, match=r"y is float32\(1, 6, 2\) and x is float32\(1, 6, 4\)"):
        symmetric_matmul(x, y=x[..., :2])


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((1, 512, 64), jnp.float32, "takes bfloat16 or float16"),
        ((1, 520, 64), jnp.bfloat16, "copies squares of 64"),
        ((1, 512, 72), jnp.bfloat16, "copies squares of 64"),
        ((1, 64, 64), jnp.bfloat16, "fewer than a tile of 128"),
    ],
)
def test_the_kernel_says_why_it_cannot(shape, dtype, reason):
    x = jax.ShapeDtypeStruct(shape, dtype)
    assert reason in refusal(x)
    with pytest.raises(ValueError, match=reason):
        symmetric_matmul_sm90(x, None, None, ALPHA, BETA, None, num_sms=H100_SMS)


ON_A_MESH = """
import json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, PartitionSpec as P
from k2jax.kernels.symmetric_matmul import symmetric_matmul
mesh = jax.make_mesh((2, 2), ("one", "two"), axis_types=(AxisType.Explicit,) * 2)
x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 6, 8)), jnp.float32)
alone = symmetric_matmul(x, symmetric_matmul(x), alpha=2.0)
with jax.set_mesh(mesh):
    x = jax.device_put(x, P("one", None, "two"))
    out = jax.jit(lambda x: symmetric_matmul(x, symmetric_matmul(x), alpha=2.0))(x)
print(json.dumps([str(out.sharding.spec), float(jnp.abs(np.asarray(out) - alone).max())]))
"""


def test_on_a_mesh_the_batch_stays_cut():
    spec, difference = told_by(ON_A_MESH, 4)
    assert spec.startswith("P('one', None")
    assert difference < 1e-5


# --- the schedule -------------------------------------------------------------------------------------------------


def tiles(rows):
    """(row, column) of every tile that the units of a table compute."""
    found = []
    for unit in rows:
        for row0, row1, column in unit[:-1].reshape(-1, 3):
            found += [(row, row if column == OWN_ROWS else column) for row in (row0, row1)]
    return found


@pytest.mark.parametrize("num_tiles", [1, 2, 3, 4, 7, 8, 12, 16, 31])
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize(("band", "own_rows"), [(1, True), (3, True), (8, True), (8, False)])
def test_every_tile_of_the_lower_triangle_is_computed_once(num_tiles, cluster, band, own_rows):
    rows = table(num_tiles, cluster, band, own_rows)
    found = tiles(rows)
    if not own_rows:  # Another matrix's rows are right only where the column says which.
        assert (rows[:, :-1].reshape(-1, 3)[:, 2] != OWN_ROWS)[
            (rows[:, :-1].reshape(-1, 3)[:, :2] < num_tiles).any(1)
        ].all()
    assert len(set(found)) == len(found), "two units would store to the same tile"
    inside = {(row, column) for row, column in found if row < num_tiles}
    assert inside == {(row, column) for row in range(num_tiles) for column in range(row + 1)}


def test_k2_wastes_no_tile():
    assert len(tiles(table(16, 1, 8))) == 16 * 17 // 2
    assert len(tiles(table(16, 2, 8))) == 16 * 17 // 2


def test_blocks_that_share_rows_have_the_same_rows():
    rows = table(16, 2, 8)
    shared = rows[rows[:, -1] == 1]
    assert len(shared) == 28
    np.testing.assert_array_equal(shared[:, :2], shared[:, 3:5])
    assert (shared[:, [2, 5]] < shared[:, :1]).all(), "below the diagonal only"


# --- the kernel ---------------------------------------------------------------------------------------------------

INTERPRET = """
import contextlib, io, json
import jax, numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from tests.test_symmetric_matmul import ALPHA, BETA, GAMMA, INTERPRETED, another, case, exact
told = {}
for name, (kernel, options, shape, dtype, with_y, with_c, with_gamma) in INTERPRETED.items():
    x, c = case(*shape, dtype)
    y = another(x) if with_y else None
    c = c if with_c else None
    gamma = GAMMA if with_gamma else None
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    run = jax.jit(lambda *arguments: kernel(*arguments, **options, interpret=interpret))
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        out = np.asarray(run(x, y, c, ALPHA, BETA, gamma))
    right = exact(x, c, gamma, y).astype(out.dtype)
    told[name] = {"wrong": int((out != right).sum()), "race": said.getvalue().partition("RACE")[2][:2000]}
print(json.dumps(told))
"""

# name: kernel, its options, (batch, n, m), type, with Y, with C, with gamma.
INTERPRETED = {
    "two blocks share rows, an odd number of tiles": (
        symmetric_matmul_sm90,
        {"config": Config(tile=64, stages=3), "num_sms": 4},
        (2, 192, 128),
        "bfloat16",
        False,
        True,
        True,
    ),
    "two matrices, two blocks": (
        symmetric_matmul_sm90,
        {"config": Config(tile=64, stages=3), "num_sms": 4},
        (1, 320, 128),
        "bfloat16",
        True,
        True,
        True,
    ),
    "one block, a ring shorter than a tile, bare": (
        symmetric_matmul_sm90,
        {"config": Config(tile=64, stages=2, cluster=1), "num_sms": 2},
        (1, 128, 192),
        "float16",
        False,
        False,
        False,
    ),
    "large tiles that leave the matrix": (
        symmetric_matmul_sm90,
        {"config": Config(tile_k=128, stages=2, cluster=1), "num_sms": 2},
        (1, 192, 192),
        "float16",
        False,
        True,
        False,
    ),
}


@pytest.fixture(scope="module")
def interpreted():
    with pytest.MonkeyPatch.context() as patch:
        # Every simulated warpgroup that waits at a barrier holds a thread of XLA's pool, which has one per core.
        patch.setenv("NPROC", "24")
        return told_by(INTERPRET, 1)


@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_kernel_is_right_in_every_bit(interpreted, name):
    assert interpreted[name] == {"wrong": 0, "race": ""}


@pytest.mark.parametrize(("platform", "has_kernel"), [("cuda", True), ("cpu", False)])
def test_what_none_chose_on_a_hopper_gpu_is_no_kernel_in_a_program_for_another_platform(
    monkeypatch, platform, has_kernel
):
    monkeypatch.setattr(room, "not_hopper", lambda: None)
    monkeypatch.setattr(room, "symmetric_matmul_sm90", functools.partial(symmetric_matmul_sm90, num_sms=H100_SMS))
    x, c = (jax.ShapeDtypeStruct((2, 1024, columns), jnp.bfloat16) for columns in (2048, 1024))
    calls = [jax.export.DisabledSafetyCheck.custom_call(f"mosaic_gpu{suffix}") for suffix in ("", "_v2")]
    call = jax.jit(lambda x, c, beta: symmetric_matmul(x, c, alpha=2.0, beta=beta))
    module = jax.export.export(call, platforms=[platform], disabled_checks=calls)(x, c, jnp.float32(1)).mlir_module()
    assert ("mosaic_gpu" in module) == has_kernel


@pytest.mark.parametrize("config", [Config(), Config(cluster=1), Config(stages=3, buffers=4)], ids=str)
def test_kernel_lowers_for_a_gpu_without_one(config):
    """Up to the MLIR of Mosaic GPU, shared memory counted; not to machine code."""
    kernel = functools.partial(symmetric_matmul_sm90, config=config, num_sms=H100_SMS)
    x, c = (jax.ShapeDtypeStruct((24, 2048, columns), jnp.bfloat16) for columns in (7168, 2048))
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    calls = [jax.export.DisabledSafetyCheck.custom_call(f"mosaic_gpu{suffix}") for suffix in ("", "_v2")]
    export = jax.export.export(jax.jit(kernel), platforms=["cuda"], disabled_checks=calls)
    assert "mosaic_gpu" in export(x, None, c, scalar, scalar, scalar).mlir_module()
