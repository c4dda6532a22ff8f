"""Full attention: both implementations against a per-row oracle in NumPy float64.

Legend: B batch, T queries, S keys, H query heads, G key heads, K query/key size, V value size.
"""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax.kernels import attention as attention_module
from k2jax.kernels.attention import attention, xla

IMPLEMENTATIONS = ["reference", "xla"]
# Tiny inputs spend their time in the compiler, so it is asked for less.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks small enough that tiny inputs take every path: ranges, loops and the ragged rest."""
    monkeypatch.setattr(xla, "MAX_CHUNK", 4)
    monkeypatch.setattr(xla, "MIN_CHUNK", 4)
    monkeypatch.setattr(xla, "MAX_RANGES", 3)


def make_inputs(B=2, T=29, S=29, H=4, G=2, K=12, V=8, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (B, T, H, K), (B, S, G, K), (B, S, G, V)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def oracle(q_BTHK, k_BSGK, v_BSGV, scale, segment_ids, q_offset):
    q, k, v = (np.asarray(x, np.float64) for x in (q_BTHK, k_BSGK, v_BSGV))
    (B, T, H, _), G = q.shape, k.shape[2]
    offset_B = np.broadcast_to(np.asarray(q_offset), (B,))
    out_BTHV, max_logit_BH = np.zeros((B, T, H, v.shape[-1])), np.full((B, H), -np.inf)
    for b, t, h in np.ndindex(B, T, H):
        position = t + offset_B[b]
        seen = [s for s in range(position + 1) if segment_ids is None or segment_ids[b, s] == segment_ids[b, position]]
        logits = scale * k[b, seen, h // (H // G)] @ q[b, t, h]
        weights = np.exp(logits - logits.max())
        out_BTHV[b, t, h] = weights @ v[b, seen, h // (H // G)] / weights.sum()
        max_logit_BH[b, h] = max(max_logit_BH[b, h], logits.max())
    return out_BTHV, max_logit_BH


def segments(B, S):
    ids = np.zeros((B, S), np.int32)
    ids[0, 5:] = 3
    ids[-1, 11:20] = 1
    ids[-1, 20:] = 2
    return jnp.asarray(ids)


CASES = {
    "causal": {},
    "packed segments": {"segmented": True},
    "one key head": {"G": 1},
    "mla sizes": {"K": 192, "V": 128, "G": 4},
    "chunk of a prefill": {"T": 7, "q_offset": 13},
    "offset per row, packed": {"T": 7, "q_offset": np.array([3, 22], np.int32), "segmented": True},
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
def test_values_and_max_logits_match_the_oracle(case, implementation, small_chunks):
    sizes = dict(CASES[case])
    q_offset, segmented = sizes.pop("q_offset", 0), sizes.pop("segmented", False)
    q, k, v = make_inputs(**sizes)
    segment_ids = segments(*k.shape[:2]) if segmented else None
    out, max_logit = attention(
        q,
        k,
        v,
        scale=0.3,
        segment_ids=segment_ids,
        q_offset=q_offset,
        max_logits=True,
        implementation=implementation,
    )
    want, want_max_logit = oracle(q, k, v, 0.3, segment_ids, q_offset)
    np.testing.assert_allclose(out, want, atol=1e-5)
    np.testing.assert_allclose(max_logit, want_max_logit, atol=1e-4)
    assert max_logit.dtype == jnp.float32


def test_chunked_gradients_equal_the_reference(small_chunks):
    q, k, v = make_inputs()
    segment_ids = segments(*k.shape[:2])

    def gradients(implementation):
        def loss(q, k, v):
            arguments = {"scale": 0.3, "segment_ids": segment_ids, "implementation": implementation}
            return jnp.sum(jnp.sin(attention(q, k, v, **arguments)))

        return jit(jax.grad(loss, (0, 1, 2)))(q, k, v)

    for got, want in zip(gradients("xla"), gradients("reference"), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_gradient_is_the_slope_of_the_output():
    q, k, v = make_inputs(B=1, T=6, S=6)
    weight, *_ = make_inputs(B=1, T=6, S=6, K=8, seed=1)
    nudge = [1e-2 * x for x in make_inputs(B=1, T=6, S=6, seed=2)]

    @jax.jit
    def loss(q, k, v):
        return jnp.sum(weight * attention(q, k, v, scale=0.3))

    gradients = jax.grad(loss, (0, 1, 2))(q, k, v)
    for i in range(3):
        up, down = ([x + sign * nudge[j] * (i == j) for j, x in enumerate((q, k, v))] for sign in (1, -1))
        np.testing.assert_allclose(
            jnp.sum(gradients[i] * nudge[i]), (loss(*up) - loss(*down)) / 2, rtol=1e-2, atol=1e-4
        )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_max_logit_is_signed_and_ignores_masked_pairs(implementation):
    """Logits are negative in segment 1, which must not see key 0; queries 1..3 reach 0.01 * 100 * 12 there."""
    q, k, v = make_inputs(B=1, T=8, S=8, H=1, G=1)
    q, k = jnp.abs(q), -jnp.abs(k)
    q = q.at[:, 0].set(-1.0).at[:, 1:4].set(0.01)
    k = k.at[:, 0].set(100.0).at[:, 1:4].set(-1.0)
    run = functools.partial(attention, scale=1.0, max_logits=True, implementation=implementation)
    _, max_logit = run(q, k, v, segment_ids=jnp.array([[0, 0, 0, 0, 1, 1, 1, 1]]))
    np.testing.assert_allclose(max_logit, [[12.0]], rtol=1e-5)
    _, negative = run(q[:, 4:], k[:, 4:], v[:, 4:])
    assert negative[0, 0] < 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_max_logit_carries_no_gradient(implementation):
    q, k, v = make_inputs()

    def loss(q):
        return attention(q, k, v, scale=0.3, max_logits=True, implementation=implementation)[1].sum()

    assert not jnp.any(jit(jax.grad(loss))(q))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_gradient_flows_to_later_keys(implementation, small_chunks):
    q, k, v = make_inputs(B=1)

    def loss(k, v):
        return attention(q, k, v, scale=0.3, implementation=implementation)[:, :10].sum()

    for gradient in jit(jax.grad(loss, (0, 1)))(k, v):
        assert not jnp.any(gradient[:, 10:])
        assert jnp.all(jnp.any(gradient[:, :9] != 0, axis=(0, 2, 3)))


def test_bfloat16_keeps_its_dtype_and_stays_close(small_chunks):
    q, k, v = make_inputs(dtype=jnp.bfloat16)
    want, _ = oracle(q, k, v, 0.3, None, 0)
    for implementation in IMPLEMENTATIONS:
        out = jit(functools.partial(attention, scale=0.3, implementation=implementation))(q, k, v)
        assert out.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(out, np.float32), want, atol=3e-2)


def test_chunked_memory_grows_linearly_with_the_sequence(monkeypatch):
    monkeypatch.setattr(xla, "MAX_RANGES", 2)  # each range is compiled by itself

    def temporary_bytes(S):
        def loss(q, k, v):
            return jnp.sum(attention(q, k, v, scale=0.3, implementation="xla"))

        shape = jax.ShapeDtypeStruct((1, S, 2, 16), jnp.float32)
        compiled = jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporary_bytes(4096), temporary_bytes(16384)
    assert large < 5 * small, (small, large)  # 4 times the keys; a kept S x S would be 16 times


def test_choice_is_by_size_and_logged_once(caplog):
    attention_module._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, "k2jax.kernels.attention"):
        small = jax.ShapeDtypeStruct((1, 128, 2, 16), jnp.float32)
        large = jax.ShapeDtypeStruct((1, 4096, 2, 16), jnp.float32)
        for shape in (small, large, large):
            jax.eval_shape(lambda q: attention(q, q, q, scale=0.3), shape)
    assert [record.message.split("'")[1] for record in caplog.records] == ["reference", "xla"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"H": 3}, "multiple of the key heads"),
        ({"T": 30}, "leaves the 29 keys"),
        ({"q_offset": -1}, "leaves the 29 keys"),
        ({"segment_ids": jnp.zeros((2, 5), jnp.int32)}, r"segment_ids.shape=\(2, 5\)"),
        ({"implementation": "fast"}, "'reference', 'sm90', 'tpu', 'xla'"),
    ],
)
def test_errors_name_the_argument_and_the_fix(change, message):
    sizes = {name: change[name] for name in change if name in "HT"}
    arguments = {name: change[name] for name in change if name not in "HT"}
    with pytest.raises(ValueError, match=message):
        attention(*make_inputs(**sizes), scale=0.3, **arguments)
