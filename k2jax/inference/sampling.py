"""Text from a model, by running it over a window for every token: no cache yet, so for short samples only.

Legend: W window, V vocabulary.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from k2jax import sharding
from k2jax.config import ModelConfig
from k2jax.model import hidden, logits


def sample(
    params, cfg: ModelConfig, prompt, *,
    vocab_size: int, length: int, window: int, stop_id: int, temperature=0.8, seed=0,
):  # fmt: skip
    """Token ids [<= length] that continue `prompt`, a list of ids.

    vocab_size: of the tokenizer; ids that a model has beyond it stand for no text and are never drawn.
    window: tokens the model sees; the prompt and the text so far are cut to the last of them.
    Sampling ends early at stop_id. Raises ValueError for an empty prompt and a temperature that is not positive.
    """
    if not len(prompt):
        raise ValueError("prompt is empty: start with the tokenizer's BOS")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be positive; 0.01 is all but greedy")
    ids = list(prompt)
    key = jax.random.key(seed)
    for i in range(length):
        recent = ids[-window:]
        padded_W = np.zeros(window, np.int32)
        padded_W[: len(recent)] = recent
        key_i = jax.random.fold_in(key, i)
        token = int(_next_token(params, padded_W, len(recent), key_i, temperature, cfg=cfg, vocab_size=vocab_size))
        if token == stop_id:
            break
        ids.append(token)
    return ids[len(prompt) :]


@partial(jax.jit, static_argnames=("cfg", "vocab_size"))
def _next_token(params, tokens_W, length, key, temperature, *, cfg, vocab_size):
    # Attention is causal, so what stands after `length` changes nothing before it.
    x_1WD, _ = hidden(params, cfg, tokens_W[None])
    last_11D = jax.lax.dynamic_slice_in_dim(x_1WD, length - 1, 1, axis=1)
    logits_V = sharding.whole(logits(params, last_11D)[0, 0])[:vocab_size]
    return jax.random.categorical(key, logits_V / temperature).astype(jnp.int32)
