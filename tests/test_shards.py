"""Tokenised shards: the same stream as in memory at any range, made once, and damage that is named."""

import dataclasses
import fcntl
import json
import os
import pickle
import re
import shutil

import numpy as np
import pytest

from k2jax.data import prepare as preparing
from k2jax.data import shards as shards_module
from k2jax.data.prepare import Request, prepare
from k2jax.data.shards import (
    PIECE_TOKENS,
    Index,
    ShardError,
    ShardStream,
    ShardWriter,
    is_prepared,
    open_prepared,
    verify,
    write_index,
)
from k2jax.data.sources import Document, load_documents, split_held_out
from k2jax.data.stream import JoinedStream, MemoryStream
from k2jax.data.tokenizers import ByteTokenizer

TOKENIZER = ByteTokenizer()


class WideTokenizer(ByteTokenizer):
    """Bytes, but the ids lie above 2^16."""

    vocab_size, bos_id, eos_id, pad_id, fingerprint = 163_840, 163_000, 163_001, 163_002, "wide"

    def encode(self, text):
        return super().encode(text) + np.int32(100_000)


def make_documents(count=60, seed=0):
    """Random bytes of letters: short texts, texts of a few pieces, and one that ends where a piece ends."""
    rng = np.random.default_rng(seed)
    lengths = [*rng.integers(1, 900, size=count), 3 * PIECE_TOKENS, PIECE_TOKENS - 2]
    return [Document(f"{i}.txt", rng.integers(97, 123, n, np.uint8).tobytes()) for i, n in enumerate(lengths)]


def write_shards(folder, documents, tokenizer=TOKENIZER, shards=3):
    """The documents in so many shards, in order."""
    folder.mkdir(parents=True)
    made = []
    for i, part in enumerate(np.array_split(np.arange(len(documents)), shards)):
        writer = ShardWriter(folder, f"{i:05}", tokenizer.vocab_size)
        for j in part:
            tokens = tokenizer.encode_document(documents[j].text)
            writer.add(tokens, np.array([len(tokens)]), len(documents[j].text))
        made.append(writer.close())
    write_index(folder, Index("test", tokenizer.fingerprint, tokenizer.vocab_size, "test", 0.1, tuple(made)))
    return folder


def assert_same_stream(stream, expected):
    assert stream.num_tokens == expected.num_tokens
    assert stream.num_text_bytes == expected.num_text_bytes
    np.testing.assert_array_equal(stream.doc_starts, expected.doc_starts)
    assert stream.doc_starts.dtype == np.int64
    whole = expected.read(0, expected.num_tokens)
    rng = np.random.default_rng(0)
    ranges = [(0, len(whole)), (0, 0), (len(whole), len(whole)), (PIECE_TOKENS - 1, PIECE_TOKENS + 1)]
    for start, stop in [*ranges, *(sorted(rng.integers(0, len(whole) + 1, 2)) for _ in range(60))]:
        tokens = stream.read(int(start), int(stop))
        assert tokens.dtype == np.int32
        np.testing.assert_array_equal(tokens, whole[start:stop])
    for start, stop in [(-1, 3), (5, 4), (0, len(whole) + 1)]:
        with pytest.raises(IndexError):
            stream.read(start, stop)


# --- streams ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [TOKENIZER, WideTokenizer()], ids=["uint16", "uint32"])
@pytest.mark.parametrize("shards", [1, 3])
def test_shards_are_the_stream_that_memory_holds(tmp_path, tokenizer, shards):
    documents = make_documents()
    stream = ShardStream(write_shards(tmp_path / "s", documents, tokenizer, shards), tokenizer)
    assert_same_stream(stream, MemoryStream(documents, tokenizer))
    assert_same_stream(pickle.loads(pickle.dumps(stream)), MemoryStream(documents, tokenizer))
    size = sum(shard.bytes for shard in stream.index.shards)
    assert size == sum(path.stat().st_size for path in (tmp_path / "s").glob("*.array_record"))


def test_a_stream_keeps_few_shards_open(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "MAX_OPEN", 2)
    documents = make_documents()
    stream = ShardStream(write_shards(tmp_path / "s", documents, TOKENIZER, 5), TOKENIZER)
    assert_same_stream(stream, MemoryStream(documents, TOKENIZER))
    assert len(stream._readers) == 2


def test_joined_streams_are_one_after_the_other():
    documents = make_documents()
    parts = [documents[:5], documents[5:6], documents[6:]]
    joined = JoinedStream([MemoryStream(part, TOKENIZER) for part in parts])
    assert_same_stream(joined, MemoryStream(documents, TOKENIZER))


def test_fingerprints_tell_streams_and_tokenizers_apart(tmp_path):
    documents = [Document("a", b"ab"), Document("b", b"c")]
    others = [
        (documents[::-1], TOKENIZER),
        ([Document("a", b"ab"), Document("b", b"d")], TOKENIZER),
        ([Document("a", b"a"), Document("b", b"bc")], TOKENIZER),
        (documents, WideTokenizer()),
    ]
    for make in (
        MemoryStream,
        lambda d, t: ShardStream(write_shards(tmp_path / str(len(list(tmp_path.iterdir()))), d, t, 1)),
    ):
        first, again = make(documents, TOKENIZER).fingerprint, make(documents, TOKENIZER).fingerprint
        assert first == again
        assert len({first, *(make(*other).fingerprint for other in others)}) == 5


def test_equal_ids_of_another_tokenizer_are_another_stream():
    class Renamed(ByteTokenizer):
        fingerprint = "other"

    documents = make_documents(3)
    assert MemoryStream(documents, Renamed()).fingerprint != MemoryStream(documents, TOKENIZER).fingerprint


# --- damage -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("whole") / "s", make_documents(), TOKENIZER, 2)


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "s")


def test_a_shard_that_is_missing_or_cut_off_is_named_when_opened(folder):
    path = folder / "00001.array_record"
    os.truncate(path, path.stat().st_size - 1000)
    with pytest.raises(
        ShardError, match=r"00001\.array_record has [\d,]+ bytes instead of [\d,]+\. Fix: delete the file"
    ):
        ShardStream(folder)
    path.unlink()
    with pytest.raises(ShardError, match=r"00001\.array_record is missing\. Fix: "):
        ShardStream(folder)


@pytest.mark.parametrize("content", [None, b"", b"garbage", "cut", "other"], ids=str)
def test_document_starts_that_are_missing_or_damaged_are_named(folder, content):
    path = folder / "00001.starts.npy"
    good = path.read_bytes()
    path.unlink()
    if content == "cut":
        content = good[:-8]
    elif content == "other":
        content = (folder / "00000.starts.npy").read_bytes()[:-8] + (10**9).to_bytes(8, "little")
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ShardError, match=r"00001\.starts\.npy (cannot be read|is damaged).*Fix: "):
        ShardStream(folder)


def test_a_flipped_byte_never_becomes_another_token(folder):
    path, index = folder / "00000.array_record", ShardStream(folder).index
    good, expected = path.read_bytes(), ShardStream(folder).read(0, index.shards[0].tokens)
    rng, seen = np.random.default_rng(0), 0
    for at in rng.integers(0, len(good), 80):
        path.write_bytes(good[:at] + bytes([good[at] ^ 16]) + good[at + 1 :])
        try:
            tokens = ShardStream(folder).read(0, index.shards[0].tokens)
        except ShardError as error:
            assert re.search(r"00000\.array_record is (cut off or )?damaged: .*Fix: ", str(error))  # noqa: PT017
            with pytest.raises(ShardError):
                verify(folder, index.shards[0], index.dtype)
            seen += 1
        else:
            np.testing.assert_array_equal(tokens, expected)  # Padding of the file.
    assert seen > 10


def test_verifying_sees_other_tokens_and_other_starts(folder):
    index = ShardStream(folder).index
    other = write_shards(folder.parent / "other", make_documents(seed=1), TOKENIZER, 2)
    verify(folder, index.shards[0], index.dtype)
    starts = np.load(folder / "00000.starts.npy")
    starts[1] += 1
    np.save(folder / "00000.starts.npy", starts)
    with pytest.raises(ShardError, match=r"00000\.array_record or its \.starts\.npy has changed"):
        verify(folder, index.shards[0], index.dtype)
    shutil.copy(other / "00001.array_record", folder)
    changed = dataclasses.replace(index.shards[1], bytes=(folder / "00001.array_record").stat().st_size)
    with pytest.raises(ShardError, match=r"00001\.array_record"):
        verify(folder, changed, index.dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:50], "JSONDecodeError"),
        (lambda text: "[]", "TypeError"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "of format 2, this version reads 1"),
        (lambda text: text.replace('"tokens"', '"tokes"'), "TypeError"),
        (lambda text: text.replace('"vocab_size"', '"vocab"'), "KeyError"),
    ],
    ids=["cut", "a list", "format", "shard", "field"],
)
def test_a_damaged_index_is_named(folder, change, message):
    path = folder / "index.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=rf"index\.json cannot be read \(.*{message}.*Fix: "):
        ShardStream(folder)


def test_the_wrong_tokenizer_or_no_index_is_refused(folder):
    with pytest.raises(ValueError, match=r"was made with data\.tokenizer='test' \(bytes-264\), not .*\(wide\)\. Fix: "):
        ShardStream(folder, WideTokenizer())
    (folder / "index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"index\.json does not exist.*Fix: run experiments\.prepare, again"):
        ShardStream(folder)


def test_ids_outside_the_vocabulary_are_not_written(tmp_path):
    writer = ShardWriter(tmp_path, "00000", 264)
    for bad in (-1, 264):
        with pytest.raises(ValueError, match=r"lie outside vocab_size=264"):
            writer.add(np.array([256, bad, 257]), np.array([3]), 1)


# --- preparing ----------------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path):
    """A folder of text, as JSON lines in two files."""
    documents = make_documents(200)[:200]
    for name, part in (("a", documents[:150]), ("b", documents[150:])):
        rows = [json.dumps({"text": d.text.decode()}) for d in part]
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return tmp_path / "text"


def run(text, out, reports=None, **request):
    """prepare() in this process; the phases that it reported go to `reports`."""
    request = {"tokenizer": "bytes", "held_out_fraction": 0.2, "shards": 4} | request
    reports = [] if reports is None else reports
    return prepare(
        Request(str(text), **request), out, 1, lambda phase, done, total: reports.append((phase, done, total))
    )


def contents(out):
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*.*")) if path.is_file()}


def test_prepared_shards_are_what_training_on_the_text_would_read(text, tmp_path):
    out, reports = tmp_path / "out", []
    indexes = run(text, out, reports)
    sides = split_held_out(load_documents(text), 0.2)
    for stream, documents in zip(open_prepared(out, TOKENIZER, 0.2), sides, strict=True):
        assert_same_stream(stream, MemoryStream(documents, TOKENIZER))
    assert len(indexes["train"].shards) == 4
    sizes = [shard.text_bytes for shard in indexes["train"].shards]
    assert max(sizes) - min(sizes) < 2 * 900  # Twice the longest document.
    assert sorted(contents(out)) == sorted(
        [".lock", "plan.json", *(f"{split}/index.json" for split in indexes)]
        + [f"{split}/{s.file}" for split, index in indexes.items() for s in index.shards]
        + [f"{split}/{s.file[:14]}.starts.npy" for split, index in indexes.items() for s in index.shards]
    )
    size = sum(len(d.text) for d in load_documents(text))
    assert reports[-1] == ("tokenising", size, size)
    assert [r[0] for r in reports if r[1] == size] == ["counting", "tokenising"]
    assert is_prepared(out)
    assert not is_prepared(text)
    with pytest.raises(ValueError, match=r"data\.held_out_fraction=0\.03: .*prepared with 0\.2\. Fix: "):
        open_prepared(out, TOKENIZER, 0.03)
    with pytest.raises(ValueError, match=r"holds tokenised shards, and text is needed here\. Fix: "):
        load_documents(out)


def test_a_second_run_checks_and_changes_nothing(text, tmp_path):
    run(text, tmp_path / "out")
    before, reports = contents(tmp_path / "out"), []
    shutil.rmtree(text)  # It is not even read.
    run(text, tmp_path / "out", reports)
    assert {phase for phase, _, _ in reports} == {"verifying"}
    assert contents(tmp_path / "out") == before


def test_a_shard_that_is_gone_is_made_again_and_no_other(text, tmp_path):
    out = tmp_path / "out"
    run(text, out)
    before = contents(out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.array_record")}
    (out / "train" / "00001-of-00004.array_record").unlink()
    (out / "train" / "00002-of-00004.starts.npy").unlink()
    run(text, out)
    assert contents(out) == before
    made = [path.name[:5] for path in out.rglob("*.array_record") if path.stat().st_mtime_ns != times[path]]
    assert sorted(made) == ["00001", "00002"]


def test_a_damaged_shard_is_named_by_the_next_run(text, tmp_path):
    out = tmp_path / "out"
    run(text, out)
    path = out / "train" / "00001-of-00004.array_record"
    good = path.read_bytes()
    path.write_bytes(good[:3000] + b"damage" + good[3006:])
    with pytest.raises(ShardError, match=r"00001-of-00004\.array_record is damaged: .*Fix: delete the file and run"):
        run(text, out)
    path.unlink()
    run(text, out)
    assert path.read_bytes() == good


@pytest.mark.parametrize(
    "change", [{"tokenizer": "train:300"}, {"held_out_fraction": 0.3}, {"shards": 5}], ids=lambda c: next(iter(c))
)
def test_a_folder_belongs_to_one_request(text, tmp_path, change):
    out = tmp_path / "out"
    run(text, out)
    before = contents(out)
    with pytest.raises(
        ValueError, match=rf"belongs to another request \({next(iter(change))}: .* there, .* here\)\. Fix: "
    ):
        run(text, out, **change)
    with pytest.raises(ValueError, match=r"belongs to another request \(source: "):
        run(tmp_path, out)
    assert contents(out) == before


def test_other_folders_are_left_alone(text, tmp_path):
    with pytest.raises(ValueError, match=r"holds something else \(a\.jsonl\)\. Fix: "):
        run(text, text)
    assert sorted(path.name for path in text.iterdir()) == ["a.jsonl", "b.jsonl"]
    (tmp_path / "run").mkdir()
    for name in (".lock", "config.json"):  # A run folder has a lock as well.
        (tmp_path / "run" / name).write_text("{}")
    with pytest.raises(ValueError, match=r"holds something else \(config\.json\)\. Fix: "):
        run(text, tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        run(text, tmp_path / "file")
    with pytest.raises(ValueError, match="written to local disks"):
        run(text, "gs://bucket/out")


def test_a_run_killed_before_its_plan_was_written_can_begin_again(text, tmp_path):
    out = tmp_path / "out"
    for split in ("train", "held_out"):
        (out / split).mkdir(parents=True)
    (out / "plan.json.partial").write_text("{")
    assert run(text, out)["train"].shards


def test_the_home_folder_may_be_written_as_a_tilde(text, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run(text, "~/out")
    assert is_prepared("~/out")
    assert open_prepared("~/out", TOKENIZER, 0.2)[0].num_tokens
    with pytest.raises(ValueError, match="holds tokenised shards, and text is needed here"):
        load_documents("~/out")


def test_two_processes_do_not_prepare_into_one_folder(text, tmp_path):
    out = tmp_path / "out"
    run(text, out)
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is preparing there"):
            run(text, out)


def test_a_source_that_changes_meanwhile_is_refused(text, tmp_path, monkeypatch):
    out = tmp_path / "out"
    counted = preparing._count

    def count_and_change(*arguments):
        plan = counted(*arguments)
        rows = (text / "a.jsonl").read_text().splitlines()
        (text / "a.jsonl").write_text("\n".join([rows[0].replace('": "', '": "X', 1), *rows[1:]]))
        return plan

    monkeypatch.setattr(preparing, "_count", count_and_change)
    with pytest.raises(ValueError, match=r"changed since .* was begun\. Fix: delete "):
        run(text, out)
    with pytest.raises(FileNotFoundError, match=r"holds no complete shards"):
        open_prepared(out, TOKENIZER, 0.2)


def test_shards_of_a_text_that_was_changed_and_put_back_are_made_again(text, tmp_path):
    expected = tmp_path / "expected"
    run(text, expected)
    out, page = tmp_path / "out", text / "a.jsonl"
    run(text, out)
    for name in ("train", "held_out"):  # As if the second half were still to be made.
        shutil.rmtree(out / name)
    original = page.read_text()
    page.write_text(original + original)
    with pytest.raises(ValueError, match="changed since"):
        run(text, out)
    page.write_text(original)
    run(text, out)
    for mine, theirs in zip(open_prepared(out, TOKENIZER, 0.2), open_prepared(expected, TOKENIZER, 0.2), strict=True):
        assert_same_stream(mine, theirs)


def test_shards_that_do_not_add_up_to_the_plan_are_refused(text, tmp_path):
    out = tmp_path / "out"
    run(text, out)
    plan = json.loads((out / "plan.json").read_text())
    plan["documents"]["train"] += 1
    (out / "plan.json").write_text(json.dumps(plan))
    (out / "train" / "index.json").unlink()
    shutil.rmtree(out / "train")
    with pytest.raises(ValueError, match=r"the shards of train hold \d+ documents, and plan.json says \d+"):
        run(text, out)


def test_a_damaged_row_is_found_before_anything_is_tokenised(text, tmp_path):
    with (text / "b.jsonl").open("a") as file:
        file.write('{"text": ')
    with pytest.raises(ValueError, match=r"b\.jsonl, line 51 is not JSON"):
        run(text, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.array_record*"))


def test_a_tokenizer_that_cannot_be_loaded_is_told_before_the_text_is_read(text, tmp_path):
    reports = []
    with pytest.raises(ValueError, match=r"data\.tokenizer='bpe' is not known"):
        run(text, tmp_path / "out", reports, tokenizer="bpe")
    assert reports == []


@pytest.mark.parametrize(
    ("request_", "message"),
    [({"shards": 0}, "shards=0"), ({"held_out_fraction": 1.0}, "fraction=1.0"), ({"tokenizer": "train:x"}, "train:x")],
    ids=["shards", "fraction", "tokenizer"],
)
def test_a_request_that_cannot_work_is_refused(request_, message):
    with pytest.raises(ValueError, match=rf"{message}.*Fix: "):
        Request("stdlib", **{"tokenizer": "bytes"} | request_)


def test_one_huge_document_leaves_shards_out_but_no_text(tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(12):
        (tmp_path / "text" / f"{i:02}.txt").write_bytes(b"z" * (50_000 if i == 5 else 10))
    out = tmp_path / "out"
    index = run(tmp_path / "text", out, shards=6)["train"]
    assert 1 < len(index.shards) < 6
    train, _ = split_held_out(load_documents(tmp_path / "text"), 0.2)
    assert_same_stream(ShardStream(out / "train"), MemoryStream(train, TOKENIZER))
    before = contents(out)
    run(tmp_path / "text", out, shards=6)
    assert contents(out) == before


def test_a_tokenizer_is_trained_on_the_training_text_alone(text, tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    from k2jax.data.tokenizers import hugging_face

    seen = []
    train_bpe = hugging_face.train_bpe

    def watched(documents, *arguments):
        documents = list(documents)
        seen.extend(documents)
        return train_bpe(documents, *arguments)

    monkeypatch.setattr(hugging_face, "train_bpe", watched)
    index = run(text, tmp_path / "out", tokenizer="train:300")["train"]
    train, _ = split_held_out(load_documents(text), 0.2)
    assert seen == train
    tokenizer = hugging_face.HuggingFaceTokenizer(tmp_path / "out" / "tokenizer")
    assert (index.vocab_size, index.tokenizer_fingerprint) == (300, tokenizer.fingerprint)
    assert_same_stream(ShardStream(tmp_path / "out" / "train", tokenizer), MemoryStream(train, tokenizer))
    (tmp_path / "out" / "tokenizer" / "tokenizer.json").write_text(
        (tmp_path / "out" / "tokenizer" / "tokenizer.json").read_text() + " "
    )
    with pytest.raises(ValueError, match=r"is not what .* was begun with .*Fix: restore the old tokenizer"):
        run(text, tmp_path / "out", tokenizer="train:300")
