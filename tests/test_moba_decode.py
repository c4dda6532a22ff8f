"""Decoding over pages against attention over the whole sequence.

Legend: B sequences, S tokens, C tokens of a page, H query heads, G key heads, K, V sizes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax.kernels.attention import attention
from k2jax.moba_pallas import append, empty_pages, moba_attention, moba_decode

B, S, C, H, G, K, V = 3, 40, 8, 4, 2, 16, 12
LENGTHS = np.array([40, 17, 8], np.int32)
N = S // C


def sequences(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(s), dtype) for s in ((B, S, H, K), (B, S, G, K), (B, S, G, V))]


def filled(k, v, poison=0.0):
    """A cache with every sequence's tokens, its pages in no order, whatever is unused filled with `poison`."""
    pages = jax.tree.map(lambda x: x + poison, empty_pages(B * N + 2, C, G, K, V, k.dtype))
    table = jnp.asarray(np.random.default_rng(5).permutation(B * N + 2)[: B * N].reshape(B, N), jnp.int32)
    step = jax.jit(append)
    for t in range(S):
        new, own = step(pages, table, jnp.full(B, t), k[:, t], v[:, t]), table[:, t // C]
        goes_on = np.flatnonzero(t < LENGTHS)  # a sequence that has ended writes nothing
        own = own[goes_on]
        pages = jax.tree.map(lambda x, y, own=own: x.at[own].set(y[own]), pages, new)
    return pages, table


def last(out_BSHV):
    return out_BSHV[jnp.arange(B), LENGTHS - 1]


@pytest.mark.parametrize("top_k", [1, 2, 3, 9])
@pytest.mark.parametrize("poison", [0.0, np.nan], ids=["zeros", "not a number"])
def test_every_last_token_reads_what_it_reads_in_one_pass(top_k, poison):
    q, k, v = sequences()
    pages, table = filled(k, v, poison)
    got = jax.jit(functools.partial(moba_decode, top_k=top_k))(last(q), pages, table, jnp.asarray(LENGTHS))
    whole = moba_attention(q, k, v, block_size=C, top_k=top_k, implementation="reference")
    np.testing.assert_allclose(got, last(whole), atol=2e-6)


def test_full_decoding_reads_everything():
    q, k, v = sequences(1)
    pages, table = filled(k, v, np.nan)
    got = moba_decode(last(q), pages, table, jnp.asarray(LENGTHS), top_k=1, full=True)
    np.testing.assert_allclose(got, last(attention(q, k, v, scale=K**-0.5)), atol=2e-6)


def test_equal_scores_take_the_lowest_block():
    q, k, v = sequences(2)
    k = jnp.ones_like(k)
    pages, table = filled(k, v)
    got = moba_decode(last(q), pages, table, jnp.asarray(LENGTHS), top_k=2)
    whole = moba_attention(q, k, v, block_size=C, top_k=2, implementation="reference")
    np.testing.assert_allclose(got, last(whole), atol=2e-6)


def test_a_page_forgets_its_last_owner():
    q, k, v = sequences(3)
    pages, table = filled(k, v)
    again = jnp.roll(table, 1, axis=0)  # the same pages, now of other sequences
    for t in range(2 * C + 1):
        pages = append(pages, again, jnp.full(B, t), k[:, t], v[:, t])
    length = jnp.full(B, 2 * C + 1)
    got = moba_decode(q[:, 2 * C], pages, again, length, top_k=2)
    whole = moba_attention(q, k, v, block_size=C, top_k=2, implementation="reference")
    np.testing.assert_allclose(got, whole[:, 2 * C], atol=2e-6)


def test_bfloat16_stays_close_to_float32():
    q, k, v = sequences(4)
    exact = moba_decode(last(q), *filled(k, v), jnp.asarray(LENGTHS), top_k=9)
    q, k, v = sequences(4, jnp.bfloat16)
    rounded = moba_decode(last(q), *filled(k, v), jnp.asarray(LENGTHS), top_k=9)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_allclose(rounded.astype(jnp.float32), exact, atol=3e-2)


@pytest.mark.parametrize(
    ("heads", "top_k", "message"),
    [(4, 0, "top_k=0 must be at least 1"), (3, 2, "q has 3 heads and the cache has 2")],
)
def test_a_call_that_cannot_be_is_refused(heads, top_k, message):
    pages = empty_pages(2, C, G, K, V, jnp.float32)
    with pytest.raises(ValueError, match=message):
        moba_decode(jnp.zeros((1, heads, K)), pages, jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32), top_k=top_k)
