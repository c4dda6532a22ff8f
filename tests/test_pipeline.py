"""Streams to batches: no token lost or repeated, shares that are exact, a place that any process can go on from."""

import json
import math
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from k2jax.data.packing import PackedWindows
from k2jax.data.pipeline import Source, held_out_batches, train_iterator
from k2jax.data.sources import Document, load_documents
from k2jax.data.stream import MemoryStream
from k2jax.data.tokenizers import ByteTokenizer

TOKENIZER = ByteTokenizer()
BOS, EOS, PAD = TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.pad_id


def make_documents(lengths=(3, 1, 17, 8, 40, 2, 5, 64, 9, 30, 11, 7), seed=0):
    """Documents of random printable bytes, of the given lengths."""
    rng = np.random.default_rng(seed)
    texts = [rng.integers(32, 127, size=length, dtype=np.uint8).tobytes() for length in lengths]
    return [Document(f"folder/{i}.txt", text) for i, text in enumerate(texts)]


def make_stream(documents=None):
    return MemoryStream(documents or make_documents(), TOKENIZER)


def make_windows(documents, seq_len):
    return PackedWindows(make_stream(documents), seq_len, PAD)


def reference_stream(documents):
    """[(token, document index)] by plain Python."""
    return [(t, d) for d, document in enumerate(documents) for t in [BOS, *document.text, EOS]]


def iterator_of(documents, **arguments):
    """Batches of one source."""
    return train_iterator([Source("text", make_stream(documents))], pad_id=PAD, **arguments)


def held_out_of(documents, **arguments):
    return held_out_batches(make_stream(documents), pad_id=PAD, **arguments)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same_batches(actual, expected):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)
            assert a[key].dtype == b[key].dtype


# Packing


@pytest.mark.parametrize("seq_len", [1, 2, 7, 16, 100, 1000])
def test_windows_predict_every_token_of_the_stream_exactly_once(seq_len):
    documents = make_documents()
    stream = reference_stream(documents)
    windows = make_windows(documents, seq_len)
    position = 0
    for item in (windows[i] for i in range(len(windows))):
        assert {key: (value.shape, value.dtype.name) for key, value in item.items()} == {
            "tokens": ((seq_len,), "int32"),
            "targets": ((seq_len,), "int32"),
            "segment_ids": ((seq_len,), "int32"),
            "loss_mask": ((seq_len,), "float32"),
        }
        first_document = stream[position][1] if position < len(stream) else None
        for t in range(seq_len):
            row = tuple(item[key][t].item() for key in ("tokens", "targets", "segment_ids", "loss_mask"))
            if position + 1 < len(stream):
                (token, document), (target, target_document) = stream[position], stream[position + 1]
                expected = (token, target, document - first_document + 1, float(document == target_document))
                position += 1
            else:
                expected = (PAD, PAD, 0, 0.0)
            assert row == expected
    assert position == len(stream) - 1


def test_no_window_is_padding_alone():
    for length in range(1, 40):
        windows = make_windows([Document("a", b"x" * length)], 8)
        assert windows[len(windows) - 1]["loss_mask"].sum() > 0


def test_segments_and_mask_of_a_window_written_by_hand():
    documents = [Document("a", b"ab"), Document("b", b"c")]
    windows = make_windows(documents, 5)
    a, b, c = b"abc"
    assert [windows[i]["tokens"].tolist() for i in range(len(windows))] == [
        [BOS, a, b, EOS, BOS],
        [c, PAD, PAD, PAD, PAD],
    ]
    assert windows[0]["targets"].tolist() == [a, b, EOS, BOS, c]
    assert windows[0]["segment_ids"].tolist() == [1, 1, 1, 1, 2]
    assert windows[0]["loss_mask"].tolist() == [1, 1, 1, 0, 1]
    assert windows[1]["targets"].tolist() == [EOS, PAD, PAD, PAD, PAD]
    assert windows[1]["segment_ids"].tolist() == [1, 0, 0, 0, 0]
    assert windows[1]["loss_mask"].tolist() == [1, 0, 0, 0, 0]


def test_packing_rejects_no_documents_an_empty_window_and_an_index_out_of_range():
    with pytest.raises(ValueError, match="documents: none given"):
        MemoryStream([], TOKENIZER)
    with pytest.raises(ValueError, match=r"seq_len=0 must be at least 1\. Fix: "):
        make_windows(make_documents(), 0)
    windows = make_windows(make_documents(), 8)
    for index in (-1, len(windows)):
        with pytest.raises(IndexError):
            windows[index]


# Training batches

ARGUMENTS = {"seq_len": 16, "batch_size": 3, "seed": 5}


def row_keys(batches):
    """Each row as bytes: the windows of `make_documents` are all different."""
    return [row.tobytes() for batch in batches for row in batch["tokens"]]


def test_each_epoch_holds_every_window_once_in_a_new_order():
    documents = make_documents()
    windows = make_windows(documents, 16)
    every = Counter(windows[i]["tokens"].tobytes() for i in range(len(windows)))
    assert max(every.values()) == 1
    assert len(windows) % 3, "a batch must span two epochs here"
    rows = row_keys(take(iterator_of(documents, **ARGUMENTS), len(windows)))
    epochs = [rows[first : first + len(windows)] for first in range(0, 3 * len(windows), len(windows))]
    assert all(Counter(epoch) == every for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != [windows[i]["tokens"].tobytes() for i in range(len(windows))]


def test_batches_are_stacked_windows_with_the_agreed_types():
    batch = next(iterator_of(make_documents(), **ARGUMENTS))
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        "tokens": ((3, 16), "int32"),
        "targets": ((3, 16), "int32"),
        "segment_ids": ((3, 16), "int32"),
        "loss_mask": ((3, 16), "float32"),
    }


def test_order_depends_on_the_seed_and_not_on_prefetch():
    documents = make_documents()
    expected = take(iterator_of(documents, **ARGUMENTS, prefetch=0), 20)
    for prefetch in (1, 2, 16):
        actual = take(iterator_of(documents, **ARGUMENTS, prefetch=prefetch), 20)
        assert_same_batches(actual, expected)


def test_neighbouring_seeds_share_no_epoch_order():
    documents = make_documents()
    count = len(make_windows(documents, 16))
    orders = set()
    for seed in range(4):
        arguments = {**ARGUMENTS, "batch_size": count, "seed": seed}
        epochs = take(iterator_of(documents, **arguments), 4)
        orders |= {tuple(row_keys([epoch])) for epoch in epochs}
    assert len(orders) == 16


@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_state_after_n_batches_gives_batch_n_plus_1_next(prefetch):
    documents = make_documents()
    iterator = iterator_of(documents, **ARGUMENTS, prefetch=prefetch)
    states, batches = [], []
    for _ in range(30):
        states.append(json.loads(json.dumps(iterator.get_state())))
        batches.append(next(iterator))
    for n in (0, 1, 4, 13, 29):
        fresh = iterator_of(documents, **ARGUMENTS, prefetch=prefetch)
        fresh.set_state(states[n])
        assert fresh.get_state() == states[n]
        assert_same_batches(take(fresh, 30 - n), batches[n:])
    # The same iterator, with batches waiting in its buffer, going back and then ahead.
    for n in (3, 20):
        iterator.set_state(states[n])
        assert_same_batches(take(iterator, 5), batches[n : n + 5])


def test_state_ignores_batches_that_threads_have_prepared():
    iterator = iterator_of(make_documents(), **ARGUMENTS, prefetch=8)
    take(iterator, 2)
    state = iterator.get_state()
    time.sleep(0.2)  # The threads fill the buffer meanwhile.
    assert iterator.get_state() == state
    assert state["batches"] == 2


def test_reading_the_state_does_not_disturb_the_stream():
    documents = make_documents()
    undisturbed = take(iterator_of(documents, **ARGUMENTS), 10)
    iterator = iterator_of(documents, **ARGUMENTS)
    watched = []
    for _ in range(10):
        iterator.get_state()
        watched.append(next(iterator))
    assert_same_batches(watched, undisturbed)


def test_a_fresh_process_continues_from_a_saved_state(tmp_path):
    for document in make_documents():
        (tmp_path / document.name).parent.mkdir(exist_ok=True)
        (tmp_path / document.name).write_bytes(document.text)
    script = (
        "import hashlib, json, sys\n"
        "from k2jax.data.pipeline import Source, train_iterator\n"
        "from k2jax.data.sources import load_documents\n"
        "from k2jax.data.stream import MemoryStream\n"
        "from k2jax.data.tokenizers import ByteTokenizer\n"
        "source = Source('text', MemoryStream(load_documents(sys.argv[1]), ByteTokenizer()))\n"
        "iterator = train_iterator([source], pad_id=258, seq_len=16, batch_size=3, seed=5)\n"
        "iterator.set_state(json.loads(sys.argv[2]))\n"
        "batches = [next(iterator) for _ in range(6)]\n"
        "print(json.dumps([{key: value.tolist() for key, value in batch.items()} for batch in batches]))\n"
    )
    iterator = iterator_of(load_documents(tmp_path), **ARGUMENTS)
    take(iterator, 7)
    state = iterator.get_state()
    expected = [{key: value.tolist() for key, value in batch.items()} for batch in take(iterator, 6)]
    process = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), json.dumps(state)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        timeout=60,
    )
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout) == expected


def test_a_state_saved_over_other_data_or_arguments_is_refused():
    documents = make_documents()
    state = iterator_of(documents, **ARGUMENTS).get_state()
    for name, value in (("seq_len", 8), ("batch_size", 2), ("seed", 6)):
        other = iterator_of(documents, **{**ARGUMENTS, name: value})
        with pytest.raises(ValueError, match=f"{name}: saved {ARGUMENTS[name]}, now {value}.*Fix: "):
            other.set_state(state)
    edited = [Document(documents[0].name, b"new"), *documents[1:]]
    with pytest.raises(ValueError, match=r"streams: 'text' has tokens [0-9a-f]{12}, saved [0-9a-f]{12}.*Fix: "):
        iterator_of(edited, **ARGUMENTS).set_state(state)


def test_a_corpus_smaller_than_a_window_or_a_batch_is_an_error_with_the_numbers():
    tiny = [Document("a.txt", b"hello")]
    with pytest.raises(ValueError, match=r"1 training documents have 7 tokens = 1 windows of seq_len=16.*Fix: "):
        iterator_of(tiny, seq_len=16, batch_size=1, seed=0)
    with pytest.raises(ValueError, match=r"7 tokens = 3 windows of seq_len=2; one batch of batch_size=4 needs 4"):
        iterator_of(tiny, seq_len=2, batch_size=4, seed=0)
    for name, value in (("batch_size", 0), ("prefetch", -1), ("seed", -1)):
        with pytest.raises(ValueError, match=f"{name}={value} must be at least"):
            iterator_of(make_documents(), **{**ARGUMENTS, name: value})


def test_a_corpus_of_one_full_window_repeats_it():
    tiny = [Document("a.txt", b"hello")]
    batches = take(iterator_of(tiny, seq_len=6, batch_size=1, seed=0), 3)
    assert [batch["tokens"].tolist() for batch in batches] == [[[BOS, *b"hello"]]] * 3


# Held-out batches


@pytest.mark.parametrize(("seq_len", "batch_size"), [(1, 3), (7, 4), (16, 5), (16, 1), (500, 2)])
def test_held_out_batches_predict_every_byte_and_every_eos_once(seq_len, batch_size):
    documents = make_documents()
    held_out = held_out_of(documents, seq_len=seq_len, batch_size=batch_size)
    inputs, targets = [], []
    for batch in held_out:
        assert {value.shape for value in batch.values()} == {(batch_size, seq_len)}
        real = batch["loss_mask"] == 1
        inputs += batch["tokens"][real].tolist()
        targets += batch["targets"][real].tolist()
        assert (batch["segment_ids"] == real).all()
        assert (batch["tokens"][~real] == PAD).all()
        assert (batch["targets"][~real] == PAD).all()
    assert inputs == [t for d in documents for t in [BOS, *d.text]]
    assert targets == [t for d in documents for t in [*d.text, EOS]]
    assert held_out.num_bytes == sum(len(d.text) for d in documents)
    assert held_out.num_predictions == held_out.num_bytes + len(documents) == len(targets)
    rows = sum(-(-(len(d.text) + 1) // seq_len) for d in documents)
    assert len(held_out) == -(-rows // batch_size)


def test_bits_per_byte_of_a_uniform_guess_charges_eos_to_the_bytes():
    held_out = held_out_of(make_documents((10, 30)), seq_len=8, batch_size=2)
    total_nats = sum(batch["loss_mask"].sum() for batch in held_out) * math.log(256)
    assert held_out.bits_per_byte(total_nats) == pytest.approx(8 * 42 / 40)


def test_held_out_batches_reject_no_documents_and_sizes_below_1():
    with pytest.raises(ValueError, match="documents: none given"):
        MemoryStream([], TOKENIZER)
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        held_out_of(make_documents(), seq_len=8, batch_size=0)
    with pytest.raises(ValueError, match="seq_len=0 must be at least 1"):
        held_out_of(make_documents(), seq_len=0, batch_size=2)


def test_held_out_rows_of_several_processes_make_the_whole_batch():
    documents = make_documents()
    whole = list(held_out_of(documents, seq_len=16, batch_size=4))
    parts = [list(held_out_of(documents, seq_len=16, batch_size=4, rows=rows)) for rows in ([0, 1], [2, 3])]
    joined = [{key: np.concatenate([a[key], b[key]]) for key in a} for a, b in zip(*parts, strict=True)]
    assert_same_batches(joined, whole)
