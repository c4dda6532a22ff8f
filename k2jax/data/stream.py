"""A corpus as one stream of tokens that can be read at any position, in memory or in shards.

Legend: N tokens of the stream.

Every document is laid down as BOS, text, EOS. Packing and batches know only `TokenStream`, so they work alike over
`MemoryStream` (this file) and `shards.ShardStream`.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

from k2jax.data.sources import Document


class TokenStream(Protocol):
    """Documents end to end: token i of N, for i in 0 .. num_tokens - 1.

    num_tokens: N.
    num_text_bytes: bytes of all documents' text, before tokenising; what bits per byte divides by.
    doc_starts: int64 [documents], ascending positions of each document's BOS; the first is 0.
    fingerprint: hash of the tokens, their documents' borders and the tokenizer: equal streams, equal fingerprints.
    """

    num_tokens: int
    num_text_bytes: int
    doc_starts: np.ndarray
    fingerprint: str

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start .. stop - 1, int32 [stop - start]. Raises IndexError outside 0 .. num_tokens."""


class MemoryStream:
    """A TokenStream held in memory, 4 bytes a token. Raises ValueError if there is no document."""

    def __init__(self, documents: Iterable[Document], tokenizer):
        encoded, self.num_text_bytes = [], 0
        for document in documents:
            encoded.append(tokenizer.encode_document(document.text))
            self.num_text_bytes += len(document.text)
        if not encoded:
            raise ValueError("documents: none given. Fix: pass at least one document.")
        lengths = np.array([len(tokens) for tokens in encoded], dtype=np.int64)
        self._tokens_N = np.concatenate(encoded)
        self.num_tokens = len(self._tokens_N)
        self.doc_starts = np.cumsum(lengths) - lengths
        digest = hashlib.sha256(tokenizer.fingerprint.encode() + b"\0")
        digest.update(self._tokens_N.astype("<i4"))
        digest.update(self.doc_starts.astype("<i8"))
        self.fingerprint = digest.hexdigest()

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start .. stop - 1, int32 [stop - start]. Raises IndexError outside 0 .. num_tokens."""
        check_range(start, stop, self.num_tokens)
        return self._tokens_N[start:stop]


class JoinedStream:
    """Streams of one tokenizer, one after the other, as one TokenStream."""

    def __init__(self, streams: Sequence[TokenStream]):
        self._streams = streams
        self._ends = np.cumsum([stream.num_tokens for stream in streams])
        self.num_tokens = int(self._ends[-1])
        self.num_text_bytes = sum(stream.num_text_bytes for stream in streams)
        offsets = [0, *self._ends[:-1]]
        self.doc_starts = np.concatenate([s.doc_starts + o for s, o in zip(streams, offsets, strict=True)])
        fingerprints = "\0".join(stream.fingerprint for stream in streams)
        self.fingerprint = hashlib.sha256(fingerprints.encode()).hexdigest()

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start .. stop - 1, int32 [stop - start]. Raises IndexError outside 0 .. num_tokens."""
        check_range(start, stop, self.num_tokens)
        parts = [np.empty(0, np.int32)]
        for number, first, last in within_parts(self._ends, start, stop):
            parts.append(self._streams[number].read(first, last))
        return np.concatenate(parts)


def within_parts(ends: np.ndarray, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Where start:stop lies in parts that end at `ends`: (part, its first position, its last position + 1)."""
    while start < stop:
        part = int(np.searchsorted(ends, start, side="right"))
        begin = int(ends[part - 1]) if part else 0
        end = min(stop, int(ends[part]))
        yield part, start - begin, end - begin
        start = end


def check_range(start: int, stop: int, num_tokens: int) -> None:
    """Raises IndexError unless 0 <= start <= stop <= num_tokens."""
    if not 0 <= start <= stop <= num_tokens:
        raise IndexError(f"tokens {start}:{stop} of a stream of {num_tokens}")
