"""Sources: every form reads what it says, in a fixed order, and whatever is damaged is named with its place and fix."""

import gzip
import json
import logging
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import register_implementation

from k2jax.data import sources
from k2jax.data.sources import Document, corpus_hash, iter_documents, load_documents, split_held_out
from k2jax.data.sources.installed import packages_documents, stdlib_documents


def write_files(folder: Path, files: dict[str, bytes]):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text)


def texts(source):
    return [document.text.decode() for document in iter_documents(source)]


# --- the standard library and text files --------------------------------------------------------------------------


def test_stdlib_source_keeps_modules_and_leaves_out_tests_packages_and_machine_files(tmp_path):
    kept = {"abc.py": b"a", "json/decoder.py": b"b", "idlelib/NEWS.txt": b"n", "unittest/case.py": b"u"}
    left_out = {
        "test/test_abc.py": b"\xff",
        "lib2to3/tests/data.py": b"\xff",
        "idlelib/idle_test/mock.py": b"x",
        "site-packages/numpy/core.py": b"x",
        "dist-packages/apt.py": b"x",
        "encodings/cp037.py": b"x",
        "pydoc_data/topics.py": b"x",
        "ensurepip/__init__.py": b"x",
        "json/__pycache__/decoder.py": b"x",
        "_sysconfigdata__linux_.py": b"x",
        "config-3.12-x86_64-linux-gnu/python-config.py": b"x",
        "empty/__init__.py": b"",
        "logo.png": b"\xff",
    }
    write_files(tmp_path, kept | left_out)
    documents = list(stdlib_documents(tmp_path))
    assert {document.name: document.text for document in documents} == kept
    assert [document.name for document in documents] == sorted(kept)


def test_the_running_interpreters_library_is_large_and_loads_alike_twice():
    documents = load_documents("stdlib")
    names = {document.name for document in documents}
    assert {"argparse.py", "json/decoder.py", "asyncio/base_events.py"} <= names
    assert not any(re.search(r"(^|/)(tests?|site-packages)/", name) for name in names)
    assert sum(len(document.text) for document in documents) > 5_000_000
    assert corpus_hash(documents) == corpus_hash(stdlib_documents())


def test_folder_source_reads_files_by_relative_name_and_a_single_file(tmp_path):
    write_files(tmp_path, {"b/one.md": "é".encode(), "a.txt": b"two", "skip.bin": b"\xff", "empty.txt": b""})
    assert load_documents(tmp_path) == [Document("a.txt", b"two"), Document("b/one.md", "é".encode())]
    assert load_documents(tmp_path / "a.txt") == [Document("a.txt", b"two")]
    assert load_documents(f"{tmp_path}/**/*.md") == [Document("b/one.md", "é".encode())]
    assert texts(f"{tmp_path}/*/one.md") == ["é"]


def test_a_file_that_is_not_utf8_is_named_with_its_offset_and_the_fix(tmp_path):
    write_files(tmp_path, {"good.txt": b"fine", "bad.txt": b"caf\xe9 noir"})
    with pytest.raises(ValueError, match=r"bad\.txt is not UTF-8: byte 0xe9 at offset 3.*Fix: .*iconv"):
        load_documents(tmp_path)
    with pytest.raises(ValueError, match=r"bad\.txt is not UTF-8: byte 0xe9 at offset 3.*Fix: set data.source"):
        list(stdlib_documents(tmp_path))


def test_missing_and_empty_folders_are_named_with_the_fix(tmp_path):
    missing = tmp_path / "nowhere"
    for read in (load_documents, stdlib_documents):
        with pytest.raises(FileNotFoundError, match=re.escape(str(missing)) + ".*Fix: "):
            list(read(missing))
    write_files(tmp_path, {"empty.txt": b""})
    with pytest.raises(ValueError, match=re.escape(str(tmp_path)) + r" has no text: its 1 files.*Fix: "):
        load_documents(tmp_path)
    with pytest.raises(ValueError, match="has no non-empty file"):
        list(stdlib_documents(tmp_path))


def test_split_keeps_every_file_on_its_side_when_files_come_and_go():
    documents = [Document(f"module_{i}.py", b"x") for i in range(2000)]
    train, held_out = split_held_out(documents, 0.03)
    assert sorted(d.name for d in train + held_out) == sorted(d.name for d in documents)
    assert 30 <= len(held_out) <= 95  # 60 expected, standard deviation 7.6
    more = [Document("0_new.py", b"n"), *reversed(documents[5:])]
    names = {d.name for d in split_held_out(more, 0.03)[1]} - {"0_new.py"}
    assert names == {d.name for d in held_out} - {d.name for d in documents[:5]}
    changed = [Document(d.name, b"other text") for d in documents]
    assert [d.name for d in split_held_out(changed, 0.03)[1]] == [d.name for d in held_out]
    assert {d.name for d in held_out} < {d.name for d in split_held_out(documents, 0.1)[1]}
    assert [d.name for d in split_held_out(documents, 0.03, salt="other")[1]] != [d.name for d in held_out]


def test_split_that_leaves_a_side_empty_or_a_fraction_out_of_range_is_an_error():
    one = [Document("a.txt", b"a")]
    with pytest.raises(ValueError, match=r"held_out_fraction=0\.001 leaves no held-out file of 1\. Fix: "):
        split_held_out(one, 0.001)
    with pytest.raises(ValueError, match=r"leaves no training file of 1\. Fix: "):
        split_held_out(one, 0.9999999)
    for fraction in (0, 1, -0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="must lie between 0 and 1"):
            split_held_out(one, fraction)


def test_corpus_hash_sees_names_contents_and_their_border_but_not_the_order():
    documents = [Document("ab", b"cd"), Document("e", b"f")]
    assert corpus_hash(documents) == corpus_hash(documents[::-1])
    assert re.fullmatch("[0-9a-f]{64}", corpus_hash(documents))
    others = [
        [Document("abc", b"d"), Document("e", b"f")],
        [Document("ab", b"cx"), Document("e", b"f")],
        [Document("ab", b"cd")],
        [Document("ab", b"f"), Document("e", b"cd")],
    ]
    assert len({corpus_hash(other) for other in [documents, *others]}) == 5


# --- installed packages -------------------------------------------------------------------------------------------


def test_packages_source_keeps_text_that_people_wrote(tmp_path, caplog):
    code = b"def add(a, b):\n    return a + b\n"
    kept = {"numpy/core.py": code, "pkg/README.md": b"# A package\n", "pkg/long_prose.rst": b"words " * 300}
    left_out = {
        "numpy/tests/test_core.py": b"def test(): pass\n",
        "pkg/test_more.py": b"def test_more(): pass\n",
        "numpy-2.0.dist-info/licenses/LICENSE.txt": b"a licence",
        "pkg/latin.py": b"# caf\xe9\n",
        "pkg/_vendor/core.py": code,
        "pkg/big.py": b"x = 'words and words'\n" * 30_000,
        "pkg/message_pb2.py": b"class Message: pass\n",
        "pkg/made.py": b"# -*- coding: utf-8 -*-\n# Autogenerated by make.py, do not edit.\nx = 'a'\n",
        "pkg/wide.py": b"table = [" + b"alpha, " * 200 + b"]\n",
        "pkg/numbers.py": b"x = [\n" + b"    1, 2, 3, 4, 5, 6, 7, 8,\n" * 50 + b"]\n",
        "pkg/__init__.py": b"\n",
        "pkg/data.json": b"{}",
        "__editable___mine_finder.py": b"path = 'of one machine'\n",
    }
    write_files(tmp_path / "site", kept | left_out)
    write_files(tmp_path / "lib", {"abc.py": b"import abc as name\n", "copy.py": code})
    with caplog.at_level(logging.INFO, logger="k2jax"):
        documents = list(packages_documents([tmp_path / "site"], tmp_path / "lib"))
    expected = {f"site-packages/{name}": text for name, text in kept.items()} | {
        "stdlib/abc.py": b"import abc as name\n"
    }
    assert {document.name: document.text for document in documents} == expected
    assert [document.name for document in documents] == sorted(expected)
    [line] = caplog.messages
    assert "2 copies of an earlier file, 1 empty, 2 generated, 1 not UTF-8" in line
    assert "4 of tests or of an installation, 2 tables, 1 too large" in line


def test_the_running_interpreters_packages_load_alike_twice():
    names, size = [], 0
    for document in iter_documents("packages"):
        names.append(document.name)
        size += len(document.text)
    assert len(set(names)) == len(names)
    assert any(name.startswith("site-packages/numpy/") for name in names)
    assert "stdlib/argparse.py" in names
    assert size > 20_000_000
    assert not [name for name in names if re.search(r"/tests?/|dist-info", name)]


# --- rows: JSON lines, Parquet, ArrayRecord -----------------------------------------------------------------------

ROWS = [{"text": "one é", "body": "eins"}, {"text": "", "body": "zwei"}, {"text": "three\n", "body": "drei"}]


def write_jsonl(path, rows):
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)


def write_parquet(path, columns):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)


def write_array_record(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def test_rows_are_documents_named_by_their_number(tmp_path, name):
    if name.endswith("parquet"):
        write_parquet(tmp_path / name, {key: [row[key] for row in ROWS] for key in ROWS[0]})
    else:
        write_jsonl(tmp_path / name, ROWS)
    expected = [Document(f"{name}:1", "one é".encode()), Document(f"{name}:3", b"three\n")]
    assert load_documents(tmp_path / name) == load_documents(tmp_path) == load_documents(f"{tmp_path}/*") == expected
    assert texts(f"{tmp_path}#body") == texts(f"{tmp_path / name}#body") == ["eins", "zwei", "drei"]


def test_array_records_are_documents(tmp_path):
    write_array_record(tmp_path / "a.array_record-00000-of-00001", [b"one", b"", "é".encode()])
    name = "a.array_record-00000-of-00001"
    assert load_documents(tmp_path) == [Document(f"{name}:1", b"one"), Document(f"{name}:3", "é".encode())]
    many = [b"%d" % i for i in range(1, 1001)]
    write_array_record(tmp_path / "many.array_record", many)
    assert [d.text for d in iter_documents(tmp_path / "many.array_record")] == many


def test_files_of_a_folder_come_in_the_order_of_their_names(tmp_path):
    write_files(tmp_path, {"b/x.jsonl": b'{"text": "3"}\n', "a.jsonl": b'{"text": "1"}\n\n{"text": "2"}'})
    assert [(d.name, d.text) for d in iter_documents(tmp_path)] == [
        ("a.jsonl:1", b"1"),
        ("a.jsonl:2", b"2"),
        ("b/x.jsonl:1", b"3"),
    ]


def test_a_file_whose_name_looks_like_a_field_is_that_file(tmp_path):
    write_files(tmp_path, {"notes#body": b"text"})
    assert texts(f"{tmp_path}/notes#body") == ["text"]


GOOD = b'{"text": "good"}\n'
DAMAGED_LINES = [
    (GOOD + b'{"text": "cut', r"line 2 is not JSON .*Fix: mend the line"),
    (GOOD + b"[1]\n", r"line 2 is no object but b'\[1\]"),
    (
        GOOD + b'{"body": "x"}\n',
        r"line 2 has no field 'text' \(it has 'body'\)\. Fix: name the right one as PATH#FIELD",
    ),
    (GOOD + b'{"text": null}\n', r"line 2, field 'text' is NoneType"),
    (GOOD + b'{"text": 3}\n', r"line 2, field 'text' is int '3', not text\. Fix: "),
    (GOOD + b'{"text": "caf\xe9"}\n', r"line 2 is not UTF-8: byte 0xe9 at offset 13.*Fix: "),
    (GOOD + b'{"text": "\\ud800"}\n', r"line 2, field 'text' has half a surrogate pair at character 0"),
    (GOOD + b"[" * 100_000, r"line 2 is not JSON"),
    (b"\n \n", r"has no text: its 1 files"),
]


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize(("content", "message"), DAMAGED_LINES, ids=[message[:28] for _, message in DAMAGED_LINES])
def test_a_damaged_line_is_named(tmp_path, content, message, packed):
    path = tmp_path / ("rows.jsonl.gz" if packed else "rows.jsonl")
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{message}"):
        load_documents(path)


def test_a_cut_or_garbled_gzip_is_named(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    rows = [{"text": f"{i} {np.random.default_rng(i).bytes(40).hex()}"} for i in range(2000)]
    write_jsonl(path, rows)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-4], b"no gzip", whole[:5000] + b"garbage!" + whole[5008:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"rows\.jsonl\.gz is damaged after line \d+: .*Fix: make or copy"):
            load_documents(path)


def test_damaged_parquet_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path / "rows.parquet"
    noise = [np.random.default_rng(i).bytes(200).hex() for i in range(2000)]
    write_parquet(path, {"text": noise})
    whole = path.read_bytes()
    middle = len(whole) // 2
    for content in (whole[:middle], b"", b"text", whole[:4] + bytes(2000) + whole[2004:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"rows\.parquet is damaged after row \d+: .*Fix: "):
            load_documents(path)
    for columns, message in [
        ({"body": ["x"]}, r"has no column 'text' \(it has 'body'\)\. Fix: "),
        ({"text": [1, 2]}, r"column 'text' is of type int64, not text\. Fix: "),
        ({"text": ["a", "b", None]}, r"row 3, field 'text' is NoneType"),
        ({"text": [b"a", b"caf\xe9"]}, r"row 2, field 'text' is not UTF-8: byte 0xe9 at offset 3"),
        ({"text": pyarrow.array([b"caf\xe9"]).view(pyarrow.string())}, r"row 1, field 'text' is not UTF-8"),
    ]:
        write_parquet(path, columns)
        with pytest.raises(ValueError, match=rf"rows\.parquet.*{message}"):
            load_documents(path)


def test_damaged_array_records_are_named(tmp_path):
    path = tmp_path / "rows.array_record"
    write_array_record(path, [np.random.default_rng(i).bytes(500).hex().encode() for i in range(1000)])
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for content in (whole[:middle], whole[:-70_000], b"", b"text\n" * 1000, flipped):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"rows\.array_record is damaged after record \d+: .*Fix: make or copy"):
            load_documents(path)
    write_array_record(path, [b"fine", b"caf\xe9"])
    with pytest.raises(ValueError, match=r"rows\.array_record, record 2 is not UTF-8: byte 0xe9 at offset 3"):
        load_documents(path)


def test_text_beside_rows_and_fields_of_text_are_refused(tmp_path):
    write_files(tmp_path, {"README.md": b"about", "data/rows.jsonl": b'{"text": "x"}\n'})
    with pytest.raises(
        ValueError, match=r"holds text \(README\.md\) beside files of rows \(rows\.jsonl\)\. Fix: .*\*\*/\*"
    ):
        load_documents(tmp_path)
    assert texts(f"{tmp_path}/**/*.jsonl") == ["x"]
    with pytest.raises(ValueError, match=r"README\.md has no fields, so '#text' means nothing\. Fix: "):
        load_documents(f"{tmp_path}/README.md#text")
    with pytest.raises(ValueError, match=r"has no text: its 0 files"):
        load_documents(f"{tmp_path}/*.parquet")


def test_rows_are_read_as_they_are_needed(tmp_path):
    write_files(tmp_path, {"a.jsonl": b'{"text": "first"}\nbroken\n'})
    documents = iter_documents(tmp_path)
    assert next(documents).text == b"first"
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        next(documents)


def test_more_text_than_memory_should_hold_is_sent_to_prepare(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MEMORY_LIMIT", 10)
    write_files(tmp_path, {"a.txt": b"five.", "b.txt": b"five."})
    assert len(load_documents(tmp_path)) == 2
    write_files(tmp_path, {"c.txt": b"."})
    with pytest.raises(ValueError, match=r"Fix: python -m experiments\.prepare --source='.*then data\.source=FOLDER"):
        load_documents(tmp_path)


@pytest.mark.parametrize("name", ["rows.parquet", "hf://owner/name"])
def test_a_missing_package_is_named_with_its_extra(tmp_path, name):
    source = name if "://" in name else tmp_path / name
    (tmp_path / "rows.parquet").write_bytes(b"")
    code = (
        "import sys\nfor name in ('pyarrow', 'datasets'):\n    sys.modules[name] = None\n"
        f"from k2jax.data.sources import load_documents\nload_documents({str(source)!r})"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert re.search(r"ValueError: .*Fix: pip install 'k2jax\[(data|hf)\]'\.$", result.stderr.strip()), result.stderr


# --- buckets ------------------------------------------------------------------------------------------------------


class Bucket(MemoryFileSystem):
    """A bucket in memory under the name that etils asks fsspec for."""

    protocol = ("gcs", "gs")
    store = {}  # noqa: RUF012 (as in its parent)
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("gs://").removeprefix("gcs://").strip("/")


@pytest.fixture
def bucket():
    register_implementation("gcs", Bucket, clobber=True)
    files = Bucket()
    yield files
    Bucket.store.clear()
    register_implementation("gcs", "gcsfs.GCSFileSystem", clobber=True)


def test_a_bucket_is_read_like_a_folder(bucket, tmp_path):
    bucket.pipe({"/b/pages/sub/one.txt": b"one", "/b/pages/two.md": b"two", "/b/pages/logo.png": b"\xff"})
    bucket.pipe({"/b/rows/x.jsonl.gz": gzip.compress(GOOD), "/b/rows/y.jsonl": b'{"text": "bad\n'})
    assert [(d.name, d.text) for d in iter_documents("gs://b/pages")] == [("sub/one.txt", b"one"), ("two.md", b"two")]
    assert load_documents("gs://b/pages/two.md") == [Document("two.md", b"two")]
    assert load_documents("gs://b/pages/*.md") == [Document("two.md", b"two")]
    assert load_documents("gs://b/rows/x.jsonl.gz#text") == [Document("x.jsonl.gz:1", b"good")]
    write_parquet(tmp_path / "x.parquet", {"text": ["a", "b"]})
    bucket.pipe("/b/tables/x.parquet", (tmp_path / "x.parquet").read_bytes())
    assert texts("gs://b/tables") == ["a", "b"]
    with pytest.raises(ValueError, match=r"gs://b/rows/y\.jsonl, line 1 is not JSON"):
        load_documents("gs://b/rows")
    with pytest.raises(FileNotFoundError, match=r"gs://b/nothing does not exist\. Fix: "):
        load_documents("gs://b/nothing")
    with pytest.raises(ValueError, match=r"'\*\*' is not read in a bucket\. Fix: "):
        load_documents("gs://b/**/*.md")
    bucket.pipe("/b/records/x.array_record", b"")
    with pytest.raises(ValueError, match=r"x\.array_record: ArrayRecord is read from local disks only\. Fix: "):
        load_documents("gs://b/records")


def test_a_scheme_that_cannot_be_read_is_named_with_what_to_install(monkeypatch):
    with pytest.raises(ValueError, match=r"'ftp://host/x': URLs of gs://, s3://, az://, hf:// are read\. Fix: "):
        load_documents("ftp://host/x")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ValueError, match=r"'s3://b/x' needs the file system of s3:// .*Fix: pip install s3fs"):
        load_documents("s3://b/x")


# --- Hugging Face data sets ---------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The package `datasets`, offline, with an empty cache of its own."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return datasets


def fill_cache(datasets, rows):
    """What `load_dataset('owner/tiny')` leaves in the cache."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "owner___tiny/default/0.0.0" / ("0" * 40)
    folder.mkdir(parents=True)
    data = datasets.Dataset.from_dict({"text": rows})
    writer = datasets.arrow_writer.ArrowWriter(path=str(folder / "tiny-train.arrow"), features=data.features)
    for row in data:
        writer.write(row)
    examples, size = writer.finalize()
    split = datasets.splits.SplitInfo("train", num_bytes=size, num_examples=examples, dataset_name="tiny")
    info = datasets.DatasetInfo(
        features=data.features, builder_name="parquet", dataset_name="tiny", config_name="default", version="0.0.0",
        splits=datasets.splits.SplitDict({"train": split}, dataset_name="tiny"),
    )  # fmt: skip
    info.write_to_directory(str(folder))


def test_a_data_set_comes_from_the_cache_when_the_hub_is_not_reached(hub, tmp_path):
    with pytest.raises(
        ValueError, match=rf"'hf://owner/tiny' cannot be loaded \(.*cache {tmp_path}/cache\. Fix: .*HF_HOME"
    ):
        load_documents("hf://owner/tiny")
    fill_cache(hub, ["one é", "", "three"])
    expected = [Document("train:1", "one é".encode()), Document("train:3", b"three")]
    assert load_documents("hf://owner/tiny") == load_documents("hf://owner/tiny?split=train&field=text") == expected
    for query, message in [("split=test", r"Unknown split .test.*Fix: check"), ("field=body", r"has no field 'body'")]:
        with pytest.raises(ValueError, match=message):
            load_documents(f"hf://owner/tiny?{query}")


def test_a_saved_data_set_is_read_by_split_and_field(hub, tmp_path):
    data = hub.Dataset.from_dict({"text": ["a", "b"], "n": [1, 2]})
    data.save_to_disk(tmp_path / "one")
    hub.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "two")
    assert texts(f"hf://{tmp_path}/one") == texts(f"hf://{tmp_path}/two") == ["a", "b"]
    assert texts(f"hf://{tmp_path}/two?split=test") == ["b"]
    for query, message in [
        ("one?split=train", r"has no splits\. Fix: leave it out"),
        ("two?split=dev", r"has no split 'dev' \(it has train, test\)\. Fix: "),
        ("one?field=n", r"row 1, field 'n' is int '1', not text"),
        ("one?feild=n", r"is not understood\. Fix: write hf://"),
        ("none", r"cannot be loaded \(FileNotFoundError.*Fix: "),
    ]:
        with pytest.raises(ValueError, match=message):
            load_documents(f"hf://{tmp_path}/{query}")
    (tmp_path / "one" / "data-00000-of-00001.arrow").write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"cannot be loaded .*Fix: "):
        load_documents(f"hf://{tmp_path}/one")


@pytest.mark.parametrize("source", [".", "*.txt", "**/*.txt", "./", "two"])
def test_names_do_not_depend_on_how_the_place_is_written(tmp_path, monkeypatch, source):
    write_files(tmp_path, {"a.txt": b"1", "b.txt": b"2", "two/c.txt": b"3", "two/d.txt": b"4"})
    absolute = [(d.name, d.text) for d in iter_documents(str(tmp_path / source))]
    monkeypatch.chdir(tmp_path)
    assert [(d.name, d.text) for d in iter_documents(source)] == absolute
    assert all(name.endswith(".txt") and len(Path(name).stem) == 1 for name, _ in absolute)


def test_a_name_that_is_not_utf8_is_read_like_any_other(tmp_path):
    names = [b"caf\xe9.txt", b"plain.txt", b"third.txt"]
    for name in names:
        (tmp_path / name.decode("utf-8", "surrogateescape")).write_bytes(b"text " + name[:1])
    documents = load_documents(str(tmp_path))
    assert len(documents) == 3
    train, held_out = split_held_out(documents, 0.4)
    assert len(train) + len(held_out) == 3
    assert len(corpus_hash(documents)) == 64
