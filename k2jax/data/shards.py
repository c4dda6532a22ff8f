"""A tokenised corpus on disk: ArrayRecord shards that any range of tokens can be read from.

A folder holds
- NAME.array_record: the shard's tokens, one record per piece of PIECE_TOKENS tokens (the last one shorter), each a
  little-endian uint16 or uint32,
- NAME.starts.npy: int64, the position of each document's BOS in its shard,
- index.json: what the shards hold and which tokenizer made them.

The stream is the shards one after another. A shard begins with a BOS and ends with an EOS.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from k2jax.data.sources.document import holds_shards
from k2jax.data.stream import check_range, within_parts

FORMAT = 1
PIECE_TOKENS = 8192
MAX_OPEN = 256  # shards of a stream that are open at once; a process may have a thousand files
_AGAIN = "delete the file and run experiments.prepare again with the same arguments, which makes what is missing"
# Records are read one by one and compressed lightly: tokens shrink by a third to two thirds, more effort gains little.
_WRITER_OPTIONS = "group_size:1,zstd:1"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


class ShardError(ValueError):
    """A shard is missing, cut off or damaged."""


@dataclass(frozen=True)
class Shard:
    """One shard of index.json."""

    file: str  # name in the folder
    bytes: int  # size of the file
    documents: int
    tokens: int
    text_bytes: int  # of the documents, before tokenising
    sha256: str  # of the tokens as stored and then the document starts, as int64


@dataclass(frozen=True)
class Index:
    """index.json."""

    tokenizer: str
    tokenizer_fingerprint: str
    vocab_size: int
    source: str
    held_out_fraction: float
    shards: tuple[Shard, ...]
    format: int = FORMAT

    @property
    def dtype(self) -> np.dtype:
        return token_dtype(self.vocab_size)


def token_dtype(vocab_size: int) -> np.dtype:
    """What a token is stored as: little-endian uint16 up to 65,536 ids, uint32 above."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def write_index(folder: Path, index: Index) -> None:
    """Writes index.json, whole or not at all: with it, the folder is complete."""
    totals = {name: sum(getattr(s, name) for s in index.shards) for name in ("documents", "tokens", "text_bytes")}
    write_json(folder / "index.json", dataclasses.asdict(index) | {"dtype": index.dtype.name} | totals)


def read_index(folder: str | Path) -> Index:
    """Raises FileNotFoundError without index.json, ValueError if it is damaged or of another format."""
    path = Path(folder) / "index.json"
    if not path.exists():
        raise FileNotFoundError(
            f"data.source: {path} does not exist, so {folder} holds no complete shards. Fix: run experiments.prepare, "
            "again if it was interrupted."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"it is of format {content['format']}, this version reads {FORMAT}")
        shards = tuple(Shard(**shard) for shard in content["shards"])
        if not shards or not all(
            Path(s.file).name == s.file and min(s.bytes, s.documents, s.tokens) > 0 for s in shards
        ):
            raise ValueError("shards: none, or one that is no file of this folder or is empty")
        names = [field.name for field in dataclasses.fields(Index)]
        return Index(**{name: content[name] for name in names} | {"shards": shards})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"data.source: {path} cannot be read ({type(error).__name__}: {error}). Fix: prepare into another folder."
        ) from error


def is_prepared(folder: str | Path) -> bool:
    """Whether `folder` is the output of experiments.prepare: train/ and held_out/ with their shards."""
    return holds_shards(Path(folder).expanduser())


def open_prepared(folder: str | Path, tokenizer, held_out_fraction: float) -> tuple["ShardStream", "ShardStream"]:
    """(train, held_out) of a folder that experiments.prepare made.

    Raises what ShardStream raises, and ValueError if another share was held out.
    """
    folder = Path(folder).expanduser()
    train, held_out = (ShardStream(folder / split, tokenizer) for split in ("train", "held_out"))
    if train.index.held_out_fraction != held_out_fraction:
        raise ValueError(
            f"data.held_out_fraction={held_out_fraction}: {folder} was prepared with {train.index.held_out_fraction}. "
            "Fix: set that, or prepare the text again."
        )
    return train, held_out


class ShardStream:
    """A TokenStream over the shards of a folder; see `k2jax.data.stream.TokenStream`.

    Document starts are held in memory, 8 bytes a document; tokens are read when asked for. It can be pickled.

    tokenizer: compared with the one that made the shards.

    Raises:
      FileNotFoundError: no index.json.
      ValueError: another tokenizer, or a damaged index.json.
      ShardError: a file that is missing, cut off or damaged; the message names it. `read` raises it too, for records
        that do not decode.
    """

    def __init__(self, folder: str | Path, tokenizer=None):
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        if tokenizer is not None and tokenizer.fingerprint != self.index.tokenizer_fingerprint:
            raise ValueError(
                f"data.source: {self.folder} was made with data.tokenizer={self.index.tokenizer!r} "
                f"({self.index.tokenizer_fingerprint}), not with the one given ({tokenizer.fingerprint}). "
                "Fix: name that tokenizer, or prepare the text again."
            )
        shards = self.index.shards
        self._ends = np.cumsum([shard.tokens for shard in shards])
        self.num_tokens = int(self._ends[-1])
        self.num_text_bytes = sum(shard.text_bytes for shard in shards)
        starts = [read_starts(self.folder, shard) for shard in shards]
        for shard in shards:
            check_size(self.folder, shard)
        offsets = self._ends - [shard.tokens for shard in shards]
        self.doc_starts = np.concatenate([s + offset for s, offset in zip(starts, offsets, strict=True)])
        hashes = "".join(shard.sha256 for shard in shards)
        self.fingerprint = hashlib.sha256(f"{self.index.tokenizer_fingerprint}\0{hashes}".encode()).hexdigest()
        self._readers, self._lock = {}, threading.Lock()

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start .. stop - 1, int32 [stop - start]. Raises IndexError outside 0 .. num_tokens."""
        check_range(start, stop, self.num_tokens)
        parts = [np.empty(0, np.int32)]
        for number, first, last in within_parts(self._ends, start, stop):
            parts.append(self._read_shard(number, first, last))
        return np.concatenate(parts, dtype=np.int32)

    def _read_shard(self, number, start, stop):
        first = start // PIECE_TOKENS
        tokens = self._reader(number).pieces(first, -(-stop // PIECE_TOKENS))
        return tokens[start - first * PIECE_TOKENS : stop - first * PIECE_TOKENS]

    def _reader(self, number):
        with self._lock:
            reader = self._readers.pop(number, None)
            if reader is None:
                reader = ShardReader(self.folder, self.index.shards[number], self.index.dtype)
            self._readers[number] = reader  # the newest stands last
            if len(self._readers) > MAX_OPEN:
                del self._readers[next(iter(self._readers))]
            return reader

    def __getstate__(self):
        return self.__dict__ | {"_readers": {}, "_lock": None}

    def __setstate__(self, state):
        self.__dict__ = state | {"_lock": threading.Lock()}

    def __repr__(self) -> str:
        return f"ShardStream({str(self.folder)!r}, {self.num_tokens} tokens)"


class ShardReader:
    """Reads pieces of one shard. Raises ShardError for a file that is cut off or holds another number of them."""

    def __init__(self, folder: Path, shard: Shard, dtype: np.dtype):
        from array_record.python.array_record_module import ArrayRecordReader

        self._path, self._tokens, self._dtype = folder / shard.file, shard.tokens, dtype
        self.num_pieces = -(-shard.tokens // PIECE_TOKENS)
        self._reader = ArrayRecordReader(str(self._path), _READER_OPTIONS)
        # A file that is cut off opens as one without records.
        if not self._reader.ok() or self._reader.num_records() != self.num_pieces:
            raise ShardError(
                f"data.source: {self._path} is cut off or damaged: it should hold {self.num_pieces} records. "
                f"Fix: {_AGAIN}."
            )

    def pieces(self, first: int, last: int) -> np.ndarray:
        """Tokens of the pieces first .. last - 1, as stored. Raises ShardError if they do not decode."""
        try:
            data = b"".join(self._reader.read(list(range(first, last))))
        except RuntimeError as error:
            raise ShardError(f"data.source: {self._path} is damaged: {error}. Fix: {_AGAIN}.") from error
        expected = min(last * PIECE_TOKENS, self._tokens) - first * PIECE_TOKENS
        if len(data) != expected * self._dtype.itemsize:
            raise ShardError(
                f"data.source: {self._path} is damaged: pieces {first}:{last} have {len(data)} bytes, not {expected} "
                f"tokens of {self._dtype.itemsize}. Fix: {_AGAIN}."
            )
        return np.frombuffer(data, self._dtype)


def read_starts(folder: Path, shard: Shard) -> np.ndarray:
    """int64 [documents]. Raises ShardError for a file that is missing or cannot be those of this shard."""
    path = folder / starts_file(shard.file)
    try:
        starts = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise ShardError(f"data.source: {path} cannot be read: {error}. Fix: {_AGAIN}.") from error
    whole = starts.dtype == np.int64 and starts.shape == (shard.documents,)
    if not whole or starts[0] != 0 or starts[-1] >= shard.tokens or np.any(np.diff(starts) < 2):
        raise ShardError(f"data.source: {path} is damaged: no starts of {shard.documents} documents. Fix: {_AGAIN}.")
    return starts


def check_size(folder: Path, shard: Shard) -> None:
    """Raises ShardError unless the shard's file is there, with its size."""
    path = folder / shard.file
    size = path.stat().st_size if path.exists() else None
    if size != shard.bytes:
        found = "is missing" if size is None else f"has {size:,} bytes instead of {shard.bytes:,}"
        raise ShardError(f"data.source: {path} {found}. Fix: {_AGAIN}.")


def verify(folder: Path, shard: Shard, dtype: np.dtype) -> None:
    """Reads the whole shard. Raises ShardError if anything in it has changed since it was written."""
    check_size(folder, shard)
    reader = ShardReader(folder, shard, dtype)
    digest = hashlib.sha256()
    for first in range(0, reader.num_pieces, 256):
        digest.update(reader.pieces(first, min(first + 256, reader.num_pieces)))
    digest.update(read_starts(folder, shard).astype("<i8"))
    if digest.hexdigest() != shard.sha256:
        raise ShardError(
            f"data.source: {folder / shard.file} or its .starts.npy has changed: other SHA-256. Fix: {_AGAIN}."
        )


def starts_file(shard_file: str) -> str:
    """The name of the document starts beside a shard."""
    return f"{shard_file.removesuffix('.array_record')}.starts.npy"


class ShardWriter:
    """Writes one shard. It has its name, and Shard in NAME.json, only when it is complete.

    Raises OSError if the disk is full or cannot be written.
    """

    def __init__(self, folder: Path, name: str, vocab_size: int):
        from array_record.python.array_record_module import ArrayRecordWriter

        self._folder, self._name, self._vocab_size = folder, name, vocab_size
        self._scratch = folder / f"{name}.array_record.partial"
        with _disk_errors(self._scratch):
            self._writer = ArrayRecordWriter(str(self._scratch), _WRITER_OPTIONS)
        self._dtype = token_dtype(vocab_size)
        self._digest = hashlib.sha256()
        self._rest = np.empty(0, self._dtype)  # tokens of the piece that is not full yet
        self._starts, self._tokens, self._text_bytes = [], 0, 0

    def add(self, tokens: np.ndarray, lengths: np.ndarray, text_bytes: int) -> None:
        """Adds whole documents: their tokens end to end, the length of each, the bytes of all their texts."""
        if tokens.min() < 0 or tokens.max() >= self._vocab_size:
            raise ValueError(f"tokens {tokens.min()}..{tokens.max()} lie outside vocab_size={self._vocab_size}")
        self._starts.append(self._tokens + np.cumsum(lengths) - lengths)
        self._tokens += len(tokens)
        self._text_bytes += text_bytes
        waiting = np.concatenate([self._rest, tokens.astype(self._dtype)])
        full = len(waiting) // PIECE_TOKENS * PIECE_TOKENS
        for first in range(0, full, PIECE_TOKENS):
            self._write(waiting[first : first + PIECE_TOKENS])
        self._rest = waiting[full:]

    def close(self) -> Shard:
        """Completes the shard and gives it its name."""
        if len(self._rest):
            self._write(self._rest)
        with _disk_errors(self._scratch):
            self._writer.close()
        path = self._folder / f"{self._name}.array_record"
        starts = np.concatenate(self._starts).astype(np.int64)
        self._digest.update(starts.astype("<i8"))
        _sync(self._scratch)
        os.replace(self._scratch, path)
        scratch = self._folder / f"{self._name}.starts.partial"
        with scratch.open("wb") as stream:
            np.save(stream, starts)
        _sync(scratch)
        os.replace(scratch, self._folder / starts_file(path.name))
        shard = Shard(
            path.name, path.stat().st_size, len(starts), self._tokens, self._text_bytes, self._digest.hexdigest()
        )
        write_json(self._folder / f"{self._name}.json", dataclasses.asdict(shard))
        return shard

    def _write(self, tokens):
        self._digest.update(tokens)
        with _disk_errors(self._scratch):
            self._writer.write(tokens.tobytes())


def write_json(path: Path, content: dict) -> None:
    """Writes a JSON file, whole or not at all."""
    scratch = path.with_name(f"{path.name}.partial")
    scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    _sync(scratch)
    os.replace(scratch, path)


@contextlib.contextmanager
def _disk_errors(path):
    # The writer raises RuntimeError for whatever the system refused, with the system's words.
    try:
        yield
    except RuntimeError as error:
        known = (number for number in sorted(errno.errorcode) if os.strerror(number) in str(error))
        raise OSError(next(known, errno.EIO), str(error), str(path)) from error


def _sync(path):
    # A name must not survive a power cut that its content did not.
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
