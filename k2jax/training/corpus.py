"""What a run reads: the streams of its sources, and the held-out text."""

from dataclasses import dataclass

import numpy as np

from k2jax.config import RunConfig
from k2jax.data.shards import is_prepared, open_prepared
from k2jax.data.sources import load_documents, split_held_out
from k2jax.data.stream import JoinedStream, MemoryStream, TokenStream
from k2jax.data.tokenizers import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Corpus:
    """Training streams by source, in the order in which the run first names them, and all held-out text as one."""

    tokenizer: Tokenizer
    streams: dict[str, TokenStream]
    held_out: TokenStream

    def held_out_document(self, length: int):
        """Up to `length` tokens [T] of the first held-out document that is that long, or of the longest."""
        starts = self.held_out.doc_starts
        lengths = np.minimum(np.diff(starts, append=self.held_out.num_tokens), length)
        chosen = int(np.argmax(lengths))
        return self.held_out.read(int(starts[chosen]), int(starts[chosen] + lengths[chosen]))


def read_corpus(cfg: RunConfig) -> Corpus:
    """Reads every source that a stage of the run names; each gives a share of its files as held-out text.

    Raises ValueError or FileNotFoundError for what the sources cannot give, and for a vocabulary too small for the
    tokenizer.
    """
    tokenizer = load_tokenizer(cfg.data.tokenizer)
    if tokenizer.vocab_size > cfg.model.vocab_size:
        raise ValueError(
            f"model.vocab_size={cfg.model.vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size}"
        )
    streams, held_out = {}, []
    for path in cfg.source_paths:
        streams[path], aside = _streams(path, tokenizer, cfg.data.held_out_fraction)
        held_out.append(aside)
    return Corpus(tokenizer, streams, JoinedStream(held_out))


def _streams(path, tokenizer, held_out_fraction):
    if is_prepared(path):
        return open_prepared(path, tokenizer, held_out_fraction)
    sides = split_held_out(load_documents(path), held_out_fraction)
    return [MemoryStream(documents, tokenizer) for documents in sides]
