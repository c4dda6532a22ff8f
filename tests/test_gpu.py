"""What must hold on a GPU: XLA forms and kernels against what is exact, and a short training run. For `make gpu`."""

import io
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import moba as moba_benchmark
from k2jax.config import load_config
from k2jax.kernels.attention import attention, shares_sm90, sm90
from k2jax.kernels.symmetric_matmul import symmetric_matmul
from k2jax.moba_pallas import moba_attention
from k2jax.muonclip import NS, orthogonalize
from k2jax.newton_schulz import newton_schulz
from k2jax.training.loop import train
from k2jax.training.metrics import read_metrics
from tests import clip_paths
from tests.oracles.moba import moba as moba_oracle

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def on_a_gpu():
    assert jax.default_backend() == "gpu", f"jax runs on {jax.default_backend()}: install the extra cuda12 or cuda13"


def test_moba_agrees_with_the_oracle_in_full_float32():
    shapes = [(1, 200, heads, 32) for heads in (4, 2, 2)]
    q, k, v = (np.random.default_rng(i).normal(size=x).astype(np.float32) for i, x in enumerate(shapes))
    segments = np.repeat([1, 2], [90, 110])[None].astype(np.int32)
    with jax.default_matmul_precision("highest"):
        out, residuals = moba_attention(
            *(jnp.asarray(x) for x in (q, k, v)),
            block_size=32, top_k=3, scale=0.2, segment_ids=jnp.asarray(segments), return_residuals=True,
            implementation="xla",
        )  # fmt: skip
    expected = moba_oracle(q[0], k[0], v[0], 32, 3, 0.2, segments[0])
    np.testing.assert_allclose(out[0], expected.out_THV, atol=2e-5)
    np.testing.assert_allclose(residuals.max_logit_BH[0], expected.max_logit_H, atol=2e-5)


def test_newton_schulz_in_bfloat16_stays_within_its_bound():
    x = jax.random.normal(jax.random.key(0), (4, 256, 896))
    exact = newton_schulz(x, NS.k2(dtype="float32"))
    rounded = newton_schulz(x, NS.k2())
    assert float(jnp.linalg.norm(rounded - exact) / jnp.linalg.norm(exact)) < 1.5e-2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_symmetric_product_is_right_and_symmetric(dtype):
    x = (jax.random.normal(jax.random.key(0), (3, 1088, 1536)) / 40).astype(dtype)
    c = symmetric_matmul(x, implementation="reference")
    got = jax.jit(lambda x, c: symmetric_matmul(x, c, alpha=0.5, beta=-2.0, gamma=3.0))(x, c)
    exact = symmetric_matmul(*(a.astype(jnp.float32) for a in (x, c)), alpha=0.5, beta=-2.0, gamma=3.0)
    error = jnp.linalg.norm(got.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
    assert error < {"bfloat16": 4e-3, "float16": 5e-4}[dtype]
    assert (got == got.swapaxes(-1, -2)).all()
    # x and x D: symmetric as well, of two matrices.
    y = x * jnp.where(jnp.arange(1536) % 3, 1, -2).astype(dtype)
    got = jax.jit(lambda x, y: symmetric_matmul(x, y=y))(x, y).astype(jnp.float32)
    exact = symmetric_matmul(x.astype(jnp.float32), y=y.astype(jnp.float32))
    assert jnp.linalg.norm(got - exact) / jnp.linalg.norm(exact) < {"bfloat16": 4e-3, "float16": 5e-4}[dtype]


@pytest.mark.parametrize(("ns", "bound"), [(NS.k2(), 1.5e-2), (NS.k2("float16", "gram"), 1e-2), (NS.fast(), 5e-3)])
def test_large_matrices_are_orthogonalised_within_the_bound(ns, bound):
    x = jax.random.normal(jax.random.key(0), (2, 3, 1024, 2048))
    exact = jax.jit(partial(orthogonalize, ns=NS(ns.coeffs, "float32")))(x)
    rounded = jax.jit(partial(orthogonalize, ns=ns))(x)
    assert float(jnp.linalg.norm(rounded - exact) / jnp.linalg.norm(exact)) < bound


@pytest.mark.parametrize("name", moba_benchmark.CHECKS)
def test_moba_kernels_are_as_exact_as_plain_attention_and_the_same_twice(name):
    moba_benchmark.check(name)


@pytest.mark.parametrize("kind", ["one document", "documents", "a chunk"])
@pytest.mark.parametrize("sizes", sm90.HEAD_SIZES, ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_full_attention_kernels_are_as_exact_as_plain_attention_and_the_same_twice(sizes, dtype, kind):
    shapes = [(2, 1500, heads, size) for heads, size in ((4, sizes[0]), (2, sizes[0]), (2, sizes[1]), (4, sizes[1]))]
    arrays = [jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate(shapes)]

    options = {"scale": 0.1, "max_logits": True}
    if kind == "documents":
        segments = jnp.searchsorted(jnp.array([37, 700]), jnp.arange(1500), side="right")
        options["segment_ids"] = jnp.broadcast_to(segments, (2, 1500))
    if kind == "a chunk":  # of one row in the middle, with keys behind it that nobody sees, of the other at the end
        arrays[0], arrays[3] = arrays[0][:, :700], arrays[3][:, :700]
        options["q_offset"] = jnp.array([10, 800])

    def run(q, k, v, implementation):
        return attention(q, k, v, implementation=implementation, **options)

    def all_of(arrays, implementation):
        run_one = partial(moba_benchmark.with_gradients, partial(run, implementation=implementation))
        return jax.jit(run_one)(*arrays)

    got, rounded = all_of(arrays, "sm90"), all_of(arrays, "reference")
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), got, all_of(arrays, "sm90")))
    with jax.default_matmul_precision("highest"):
        exact = all_of([x.astype(jnp.float32) for x in arrays], "reference")
    for mine, theirs, right in zip(*((r[0], *r[2]) for r in (got, rounded, exact)), strict=True):
        error, plain = (jnp.linalg.norm(x.astype(jnp.float32) - right) for x in (mine, theirs))
        assert error < 1.5 * plain
    np.testing.assert_allclose(got[1], exact[1], atol=1e-4)


def test_units_wait_for_each_other_over_many_waves_of_blocks():
    """Eight blocks of the GPU for each of its multiprocessors, of which the later ones wait for earlier ones."""
    q, k, v, dout = moba_benchmark.inputs(2, 8192, 16, 8)

    @jax.jit
    def run(q, k, v, dout):
        attended = sm90.attend(0.1, q.shape[1], q, k, v)
        own = sm90.own_rows(q, attended[0], attended[1][..., : q.shape[1]], dout)
        apart = (sm90.rows_gradient(0.1, k.shape[1], *own, k, v), *sm90.keys_gradient(0.1, k.shape[1], own, k, v))
        return sm90.fused_gradient(0.1, own, k, v), apart

    fused, apart = run(q, k, v, dout)
    jax.block_until_ready(run(*(2 * x for x in (q, k, v, dout))))
    again, _ = run(q, k, v, dout)
    for x, y, z in zip(fused, again, apart, strict=True):
        assert (x == y).all()
        x, z = (a.astype(jnp.float32) for a in (x, z))
        assert jnp.linalg.norm(x - z) / jnp.linalg.norm(z) < 5e-3


def test_multiprocessors_that_keep_pace_give_the_same_bits_and_go_on_without_who_does_not_come(monkeypatch):
    q, k, v, _ = moba_benchmark.inputs(1, 2**17, 2, 1)
    assert not shares_sm90.fits_into_cache(2 * k.shape[1] * 2 * k.shape[3])

    def run(**options):
        return jax.jit(lambda *x: sm90.attend(0.1, x[1].shape[1], *x, **options))(q, k, v)

    paced = run()
    # Of twice as many blocks as fit onto the GPU, half begin when the others, which wait for them, are done.
    crowded = run(num_sms=2 * jax.devices()[0].core_count)
    monkeypatch.setattr(shares_sm90, "CACHE_BYTES", 2**40)
    for x, y, z in zip(paced, crowded, run(), strict=True):
        assert (x == y).all()
        assert (x == z).all()


@pytest.mark.parametrize("kind", ["full", "moba"])
def test_a_clip_is_driven_by_the_kernels(kind):
    clip_paths.assert_clipped(clip_paths.attend_by(kind, "sm90"), "bfloat16")


def test_nano_learns_on_a_gpu(tmp_path):
    result = train(load_config("configs/nano.py:steps=60", {"train.sample_tokens": 0}), tmp_path, stream=io.StringIO())
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"] - 1.5
    assert result.evaluation["eval/bits_per_byte"] < 4.5
    assert all(math.isfinite(line["max_logit"]) and not line["skipped"] for line in lines)
