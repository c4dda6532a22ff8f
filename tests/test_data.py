"""Text to batches: nothing lost, nothing counted twice, and a saved state that continues exactly."""

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from k2jax.data import count_models
from k2jax.data.sources import Document, load_documents, split_held_out
from k2jax.data.tokenizers import ByteTokenizer
from tests.test_pipeline import make_documents

TOKENIZER = ByteTokenizer()
BOS, EOS, PAD = TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.pad_id


# Tokenizer


def test_byte_tokenizer_round_trips_every_byte_and_drops_specials():
    text = "naïve 漢字\n\t\0"
    ids = TOKENIZER.encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == list(text.encode())
    assert TOKENIZER.decode(ids) == text
    document = TOKENIZER.encode_document(bytes(range(256)))
    assert document.dtype == np.int32
    assert document.tolist() == [BOS, *range(256), EOS]
    assert TOKENIZER.decode([BOS, 104, PAD, 105, EOS, 263]) == "hi"
    assert TOKENIZER.decode([104, 0xC3]) == "h\ufffd"
    assert TOKENIZER.encode_document(b"").tolist() == [BOS, EOS]
    assert TOKENIZER.vocab_size % 8 == 0


@pytest.mark.parametrize("bad", [-1, 264])
def test_decoding_an_id_outside_the_vocabulary_is_an_error(bad):
    with pytest.raises(ValueError, match=f"{bad} is not a token id"):
        TOKENIZER.decode([65, bad])


# Count models


def plain_bits_per_byte(train, held_out, order):
    """The same estimate with dictionaries and exact fractions, straight from its definition."""
    pairs, contexts = Counter(), Counter()

    def events(documents):
        for document in documents:
            symbols = ["mark"] * order + list(document.text) + ["mark"]
            for i in range(order, len(symbols)):
                yield tuple(symbols[i - order : i]), symbols[i]

    for context, outcome in events(train):
        for k in range(order + 1):
            pairs[context[order - k :], outcome] += 1
            contexts[context[order - k :]] += 1
    bits = 0.0
    for context, outcome in events(held_out):
        p = Fraction(1, 257)
        for k in range(order + 1):
            c = context[order - k :]
            p = (pairs[c, outcome] + Fraction(32) * p) / (contexts[c] + 32)
        bits -= math.log2(p)
    return bits / sum(len(document.text) for document in held_out)


@pytest.mark.parametrize("order", [1, 2])
def test_count_model_equals_its_definition_in_exact_fractions(order):
    rng = np.random.default_rng(1)
    texts = [rng.choice(list(b"abcd\xff\0"), size=size).astype(np.uint8).tobytes() for size in (50, 1, 2, 90)]
    train = [Document(str(i), text) for i, text in enumerate(texts)]
    held_out = [Document("x", b"abca\0zz\xff"), Document("y", b"a")]
    expected = plain_bits_per_byte(train, held_out, order)
    assert count_models.bits_per_byte(train, held_out, order) == pytest.approx(expected, rel=1e-12)


def test_two_bytes_of_context_beat_one_on_the_standard_library():
    documents = [d for d in load_documents("stdlib") if d.name.startswith(("email/", "asyncio/", "json/"))]
    train, held_out = split_held_out(documents, 0.1)
    order_1, order_2 = (count_models.bits_per_byte(train, held_out, order) for order in (1, 2))
    assert 1.5 < order_2 < order_1 - 0.4
    assert order_1 < 4.5


def test_count_models_reject_other_orders_and_missing_documents():
    documents = make_documents()
    with pytest.raises(ValueError, match=r"order=3 is not supported\. Fix: "):
        count_models.bits_per_byte(documents, documents, 3)
    with pytest.raises(ValueError, match=r"12 for training, 0 held out\. Fix: "):
        count_models.bits_per_byte(documents, [], 1)
