"""The held-out set, and what is written down of the trained model.

Legend: B sequences, T tokens, M expert layers, E experts, L MoBA layers, H heads, J blocks per query,
C blocks.
"""

from functools import partial
from pathlib import Path

import jax
import numpy as np

from k2jax.config import RunConfig
from k2jax.inference.sampling import sample
from k2jax.model import hidden
from k2jax.training.feed import Feed
from k2jax.training.processes import is_first
from k2jax.training.step import held_out_nats

EXCERPT = 60  # characters of a block that the report shows


class HeldOut:
    """Evaluates a model on whole held-out files."""

    def __init__(self, cfg: RunConfig, batches, feed: Feed):
        """batches: what data.held_out_batches returns, for the rows of `feed`."""
        self._batches = batches
        self._place = feed.arrays
        self._nats = jax.jit(partial(held_out_nats, cfg=cfg))

    def run(self, params, should_stop=lambda: False) -> dict | None:
        """{'eval/loss': nats per prediction, 'eval/bits_per_byte', 'eval/load_max_over_mean': [M] per layer}.

        should_stop is asked between batches; if it says so, the evaluation is given up and None returned.
        """
        total, load_ME = 0.0, 0.0
        for batch in self._batches:
            if should_stop():
                return None
            nats, batch_load_ME = jax.device_get(self._nats(params, self._place(batch)))
            total += float(nats)
            if batch_load_ME is not None:
                load_ME = load_ME + batch_load_ME
        result = {
            "eval/loss": total / self._batches.num_predictions,
            "eval/bits_per_byte": self._batches.bits_per_byte(total),
        }
        if np.ndim(load_ME):
            result["eval/load_max_over_mean"] = (load_ME.max(axis=-1) / load_ME.mean(axis=-1)).tolist()
        return result


def write_selections(workdir: Path, params, cfg: RunConfig, tokens_T, tokenizer) -> bool:
    """Writes selections.npz: for one held-out document of tokens_T, the blocks that every MoBA head chose.

    Arrays: selected int32 [L, H, T, J] (-1 = none, slot 0 the current block), layers [L], text [C] (how each block
    starts), block_size.
    Returns False, and writes nothing, for a model without MoBA layers.
    """
    if "moba" not in cfg.model.attention:
        return False
    run = jax.jit(partial(hidden, cfg=cfg.model, selections=True))
    chosen = jax.device_get(run(params, tokens_BT=tokens_T[None])[1].selections)
    layers = sorted(chosen)
    if not is_first():
        return True
    size = cfg.model.moba.block_size
    np.savez_compressed(
        workdir / "selections.npz",
        selected=np.stack([chosen[layer][0] for layer in layers]).astype(np.int32),
        layers=np.array(layers, np.int32),
        text=np.array([tokenizer.decode(tokens_T[i : i + size])[:EXCERPT] for i in range(0, len(tokens_T), size)]),
        block_size=np.int32(size),
    )
    return True


def write_sample(workdir: Path, params, cfg: RunConfig, tokenizer) -> str:
    """Generates train.sample_tokens tokens from the start of a document, writes sample.txt, returns the text."""
    ids = sample(
        params, cfg.model, [tokenizer.bos_id],
        length=cfg.train.sample_tokens, window=min(cfg.data.seq_len, cfg.train.sample_tokens + 1),
        stop_id=tokenizer.eos_id, vocab_size=tokenizer.vocab_size,
    )  # fmt: skip
    text = tokenizer.decode(ids)
    if is_first():
        (workdir / "sample.txt").write_text(text, encoding="utf-8")
    return text
