"""What a tokenizer is, and the one that needs no file: bytes."""

from typing import Protocol

import numpy as np


class Tokenizer(Protocol):
    """Text to ids and back.

    vocab_size: ids are 0 .. vocab_size - 1.
    bos_id, eos_id, pad_id: what opens and closes a document, and what fills a batch.
    fingerprint: short, equal for tokenizers that give the same ids; stored beside tokens and compared.

    Bits per byte divides by the bytes of the text, which `TokenStream.num_text_bytes` counts before tokenising, so it
    is right for any tokenizer.
    """

    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    fingerprint: str

    def encode(self, text: bytes | str) -> np.ndarray:
        """Ids [N] int32, without BOS and EOS. What looks like a special token in the text is text."""

    def encode_document(self, text: bytes | str) -> np.ndarray:
        """Ids [N + 2] int32: BOS, the text, EOS."""

    def decode(self, ids) -> str:
        """Text of ids [N]; special tokens are dropped. Raises ValueError for an id outside 0 .. vocab_size - 1."""


class ByteTokenizer:
    """One id per byte (0..255), then BOS=256, EOS=257, PAD=258.

    `vocab_size` is 264, not 259: a multiple of 8 shards over 8 devices and fills matrix tiles; the ids
    259..263 never occur in data.
    """

    bos_id = 256
    eos_id = 257
    pad_id = 258
    vocab_size = 264
    fingerprint = "bytes-264"  # says which ids mean what; stored beside tokens

    def encode(self, text: bytes | str) -> np.ndarray:
        """Ids [N] int32 of the bytes (of the UTF-8 encoding of a str), without special tokens."""
        data = text.encode("utf-8") if isinstance(text, str) else text
        return np.frombuffer(data, dtype=np.uint8).astype(np.int32)

    def encode_document(self, text: bytes | str) -> np.ndarray:
        """Ids [N + 2] int32: BOS, the bytes, EOS."""
        return np.concatenate([[self.bos_id], self.encode(text), [self.eos_id]], dtype=np.int32)

    def decode(self, ids) -> str:
        """Text of ids [N]. Ids above 255 carry no byte and are dropped; what is not UTF-8 becomes U+FFFD.

        Raises ValueError for an id outside 0..vocab_size - 1.
        """
        ids = checked_ids(ids, self.vocab_size)
        return ids[ids < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


def as_text(text: bytes | str) -> str:
    """A str of UTF-8 bytes; sources have checked them."""
    return text.decode("utf-8") if isinstance(text, bytes) else text


def checked_ids(ids, vocab_size: int) -> np.ndarray:
    """int64 [N]. Raises ValueError for an id outside 0 .. vocab_size - 1."""
    ids = np.asarray(ids, dtype=np.int64).reshape(-1)
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.size:
        raise ValueError(
            f"ids: {outside[0]} is not a token id (0..{vocab_size - 1}). Fix: pass ids that this "
            "tokenizer made, or logits cut to vocab_size."
        )
    return ids
