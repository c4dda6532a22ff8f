"""Files that hold one document a row: JSON lines, Parquet, ArrayRecord. Rows are counted from 1.

Every reader yields the rows' text as UTF-8 bytes, a few rows in memory at a time, and raises ValueError with the file,
the row and the fix for whatever it cannot read. Nothing is skipped.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from k2jax.data.optional import needs
from k2jax.data.sources.document import utf8

_AGAIN = "make or copy the file again"
_BATCH = 256  # rows read at once


def jsonl_rows(stream, name: str, field: str) -> Iterator[bytes]:
    """Text of every line's `field`; `name` ends in .gz if the stream is gzip. Lines of blanks hold no row."""
    lines = gzip.GzipFile(fileobj=stream) if name.endswith(".gz") else stream
    number = 0
    try:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _json_text(line, f"{name}, line {number}", field)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"data.source: {name} is damaged after line {number}: {error or 'the gzip stream ends early'}. "
            f"Fix: {_AGAIN}; it was perhaps not copied to its end."
        ) from error


def _json_text(line: bytes, where: str, field: str) -> bytes:
    utf8(line, where, "write JSON lines in UTF-8")
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(
            f"data.source: {where} is not JSON ({error}). Fix: mend the line (one object a line); if it is the last "
            f"one, the file was cut off: {_AGAIN}."
        ) from error
    if not isinstance(row, dict):
        raise ValueError(f"data.source: {where} is no object but {line[:40]!r}. Fix: write rows as {{'{field}': ...}}.")
    if field not in row:
        raise ValueError(f"data.source: {where} has no field {field!r} {_choice(row)}")
    return text_of(row[field], where, field)


def parquet_rows(stream, name: str, field: str) -> Iterator[bytes]:
    """Text of the column `field`, of type string or binary."""
    with needs("data", f"data.source: reading {name}"):
        import pyarrow
        import pyarrow.parquet
    row = 0
    try:
        file = pyarrow.parquet.ParquetFile(stream, page_checksum_verification=True)
        if field not in file.schema_arrow.names:
            raise ValueError(f"data.source: {name} has no column {field!r} {_choice(file.schema_arrow.names)}")
        column_type = file.schema_arrow.field(field).type
        if str(column_type) not in ("string", "large_string", "binary", "large_binary"):
            raise ValueError(
                f"data.source: {name}, column {field!r} is of type {column_type}, not text. Fix: name another column "
                "as PATH#COLUMN."
            )
        for batch in file.iter_batches(_BATCH, columns=[field]):
            # Arrow does not check the bytes of a string column; as binary they are checked below.
            for value in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                row += 1
                yield text_of(value, f"{name}, row {row}", field)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"data.source: {name} is damaged after row {row}: {' '.join(str(error).split())}. Fix: {_AGAIN}."
        ) from error


def array_record_rows(path: Path) -> Iterator[bytes]:
    """Every record of a local ArrayRecord file, which must be UTF-8."""
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(path))
    first = 0
    try:
        # A file that is cut off, or none at all, opens as one with no records.
        if not reader.ok():
            raise RuntimeError("it does not end as an ArrayRecord file does")
        for first in range(0, reader.num_records(), _BATCH):
            records = reader.read(list(range(first, min(first + _BATCH, reader.num_records()))))
            for row, record in enumerate(records, first + 1):
                yield utf8(record, f"{path}, record {row}", "write records of UTF-8 text")
        reader.close()  # Not after an error: it would raise the same one again.
    except RuntimeError as error:
        raise ValueError(f"data.source: {path} is damaged after record {first}: {error}. Fix: {_AGAIN}.") from error


def text_of(value, where: str, field: str) -> bytes:
    """The UTF-8 bytes of a row's field. Raises ValueError if it is no text."""
    if isinstance(value, bytes):
        return utf8(value, f"{where}, field {field!r}", "write the text in UTF-8")
    if not isinstance(value, str):
        raise ValueError(
            f"data.source: {where}, field {field!r} is {type(value).__name__} {str(value)[:40]!r}, not text. "
            "Fix: mend the row, or name another field."
        )
    try:
        return value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"data.source: {where}, field {field!r} has half a surrogate pair at character {error.start}, which is no "
            "text. Fix: mend the row."
        ) from error


def _choice(names) -> str:
    return f"(it has {', '.join(map(repr, names)) or 'none'}). Fix: name the right one as PATH#FIELD."
