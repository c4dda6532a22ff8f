"""Sampling from a small model by running it over a window."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax import model
from k2jax.config import GQAConfig, ModelConfig
from k2jax.inference import sampling

CFG = ModelConfig(
    vocab_size=12,
    dim=16,
    num_layers=1,
    num_heads=2,
    mlp_dim=16,
    attn=GQAConfig(num_kv_heads=1, head_dim=8),
    attention=("full",),
    dtype="float32",
)
NEVER = -1
sample = functools.partial(sampling.sample, vocab_size=CFG.vocab_size)


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(functools.partial(model.init_params, CFG), jax.random.key(0))
    rng = np.random.default_rng(2)  # a text that does not end in one token for ever
    return jax.tree.map(lambda leaf: 0.6 * jnp.asarray(rng.standard_normal(leaf.shape, np.float32)), shapes)


def test_a_low_temperature_takes_the_likeliest_token_of_the_window(params):
    prompt, window = [3, 1, 4], 4
    got = sample(params, CFG, prompt, length=5, window=window, stop_id=NEVER, temperature=1e-4)
    assert got == sample(params, CFG, prompt, length=5, window=window, stop_id=NEVER, temperature=1e-4, seed=9)
    assert len(set(got)) > 3
    text = prompt + got
    last_logits = jax.jit(lambda p, ids: model.apply(p, CFG, ids)[0][:, -1])
    windows = [text[:i][-window:] for i in range(len(prompt), len(text))]
    for length in (3, 4):
        ids = jnp.array([w for w in windows if len(w) == length])
        likeliest = np.argmax(last_logits(params, ids), axis=-1)
        assert [got[i] for i, w in enumerate(windows) if len(w) == length] == likeliest.tolist()


def test_only_the_window_is_seen(params):
    run = functools.partial(sample, params, CFG, length=5, window=4, stop_id=NEVER, seed=2)
    assert run([7, 7, 7, 1, 2, 3, 4]) == run([9, 1, 2, 3, 4])
    assert run(np.array([9, 1, 2, 3, 4])) == run([1, 2, 3, 4])


def test_the_text_ends_before_the_stop_token(params):
    whole = sample(params, CFG, [5], length=12, window=4, stop_id=NEVER, temperature=2.0)
    assert len(whole) == 12
    stop = whole[4]
    cut = sample(params, CFG, [5], length=12, window=4, stop_id=stop, temperature=2.0)
    assert cut == whole[: whole.index(stop)]


def test_the_seed_decides_and_heat_spreads(params):
    run = functools.partial(sample, params, CFG, [5], length=40, window=4, stop_id=NEVER, temperature=50.0)
    assert run(seed=1) == run(seed=1) != run(seed=2)
    assert len(set(run(seed=1))) > 8


def test_nothing_is_asked_for_and_nothing_comes(params):
    assert sample(params, CFG, [5], length=0, window=2, stop_id=NEVER) == []


def test_an_empty_prompt_and_no_heat_are_refused(params):
    with pytest.raises(ValueError, match="prompt is empty: start with the tokenizer's BOS"):
        sample(params, CFG, [], length=2, window=2, stop_id=NEVER)
    with pytest.raises(ValueError, match=r"temperature=0: must be positive"):
        sample(params, CFG, [1], length=2, window=2, stop_id=NEVER, temperature=0)


def test_ids_that_the_tokenizer_does_not_have_are_never_drawn(params):
    drawn = sampling.sample(params, CFG, [5], vocab_size=6, length=60, window=4, stop_id=NEVER, temperature=50.0)
    assert set(drawn) == set(range(6))
