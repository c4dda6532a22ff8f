"""Turns a source into tokenised shards that training reads, in a folder that survives being interrupted.

The text is read twice. The first time it is counted, which finds every damaged row before hours of tokenising, gives
the shards equal sizes and the progress its end; the second time it is tokenised. A document's split follows from its
name and its shard from the text before it, so a second run makes the shards that are missing and no others.

Folder: plan.json (what was asked, what was counted), train/ and held_out/ (see `shards.py`), tokenizer/ if one was
trained.
"""

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from k2jax.data.shards import Index, Shard, ShardWriter, starts_file, token_dtype, verify, write_index, write_json
from k2jax.data.sources import iter_documents
from k2jax.data.sources.document import add_to_hash, check_fraction, check_split, is_chosen
from k2jax.data.tokenizers import Tokenizer, load_tokenizer

SPLITS = ("train", "held_out")
SHARD_BYTES = 128 * 2**20  # of text, where the number of shards is not given
TRAINING_BYTES = 2**30  # of text that a tokenizer is trained on; of more, a share by the hash of the names
_BATCH_BYTES = 2**20  # of text, that a worker is given at once
_TRAINED = "train:"


@dataclass(frozen=True)
class Request:
    """What is asked for; a folder holds one request."""

    source: str
    tokenizer: str  # as data.tokenizer, or 'train:8192' for a BPE of so many ids trained on the training documents
    held_out_fraction: float = 0.03
    shards: int | None = None  # of the training split; None: one per 128 MiB of text

    def __post_init__(self):
        check_fraction(self.held_out_fraction)
        if self.tokenizer.startswith(_TRAINED) and not self.tokenizer.removeprefix(_TRAINED).isdecimal():
            raise ValueError(f"tokenizer={self.tokenizer!r}: give the number of ids. Fix: try '{_TRAINED}8192'.")
        if self.shards is not None and self.shards < 1:
            raise ValueError(f"shards={self.shards} must be at least 1. Fix: leave it out, or try 8.")


@dataclass(frozen=True)
class Plan:
    """plan.json: the request, and what the source held when it was counted."""

    request: Request
    tokenizer_fingerprint: str
    documents: dict[str, int]  # by split
    text_bytes: dict[str, int]
    sha256: str  # over names and texts in the source's order

    def num_shards(self, split: str) -> int:
        size = self.text_bytes["train"] / self.request.shards if self.request.shards else SHARD_BYTES
        return max(1, round(self.text_bytes[split] / size))

    def shard_name(self, split: str, number: int) -> str:
        return f"{number:05}-of-{self.num_shards(split):05}"


# Called with what is done ('counting', 'verifying', 'tokenising'), bytes of text done, and in all or None.
Report = Callable[[str, int, int | None], None]


def prepare(request: Request, out: str | Path, workers: int, report: Report) -> dict[str, Index]:
    """Brings `out` to what `request` asks for and returns {'train': Index, 'held_out': Index}.

    Shards that are there are read again and compared with their hashes, whether or not anything is missing.

    Raises ValueError or FileNotFoundError for what cannot work: the source's and tokenizer's errors, a folder that
    holds something else or is in use, a damaged shard, a source that changed meanwhile. Raises OSError for a disk.
    """
    out = Path(out).expanduser()
    if re.match(r"\w+:/", str(out)):  # A Path has one slash of a URL's two.
        raise ValueError(f"--out={out}: shards are written to local disks. Fix: give a folder, copy it afterwards.")
    _refuse_other_content(out)
    for split in SPLITS:
        (out / split).mkdir(parents=True, exist_ok=True)
    with _locked(out):
        plan = _plan(request, out, report)
        tokenizer = load_tokenizer(tokenizer_name(request, out))
        if tokenizer.fingerprint != plan.tokenizer_fingerprint:
            raise ValueError(
                f"--tokenizer={request.tokenizer} is not what {out} was begun with ({tokenizer.fingerprint} here, "
                f"{plan.tokenizer_fingerprint} there). Fix: restore the old tokenizer, or give another --out."
            )
        known = {split: _recorded(out / split) for split in SPLITS}
        finished = {split: _verified(out / split, known[split], tokenizer, report) for split in SPLITS}
        has_indexes = all((out / split / "index.json").exists() for split in SPLITS)
        if not has_indexes or any(known[split].keys() != finished[split].keys() for split in SPLITS):
            _tokenise(plan, out, tokenizer, finished, workers, report)
        return {split: _complete(plan, out, split, tokenizer, finished[split]) for split in SPLITS}


def tokenizer_name(request: Request, out: Path) -> str:
    """What data.tokenizer is for the shards of `out`."""
    return f"hf:{Path(out).expanduser() / 'tokenizer'}" if request.tokenizer.startswith(_TRAINED) else request.tokenizer


# --- the folder ---------------------------------------------------------------------------------------------------


_BEGUN = {".lock", *SPLITS, "tokenizer", "plan.json.partial"}  # what may be there before plan.json is


def _refuse_other_content(out):
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out={out} is a file. Fix: give a folder.")
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    strange = names - _BEGUN
    if strange and "plan.json" not in names:
        raise ValueError(f"--out={out} holds something else ({sorted(strange)[0]}). Fix: give a new or empty folder.")


@contextlib.contextmanager
def _locked(out):
    with (out / ".lock").open("w") as lock:
        try:
            # The system drops this lock when the process ends, however it ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--out={out}: another process is preparing there. Fix: wait for it.") from None
        yield


def _plan(request, out, report):
    path = out / "plan.json"
    if not path.exists():
        plan = _count(request, out, report)
        write_json(path, dataclasses.asdict(plan))
        return plan
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        plan = Plan(**content | {"request": Request(**content["request"])})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}). Fix: give another --out.") from error
    old, new = dataclasses.asdict(plan.request), dataclasses.asdict(request)
    changed = [f"{name}: {old[name]} there, {new[name]} here" for name in new if old[name] != new[name]]
    if changed:
        raise ValueError(
            f"--out={out} belongs to another request ({'; '.join(changed)}). Fix: ask for the same, or give another "
            "--out."
        )
    return plan


def _count(request, out, report):
    documents, text_bytes = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    digest = hashlib.sha256()
    is_trained = request.tokenizer.startswith(_TRAINED)
    if not is_trained:
        load_tokenizer(request.tokenizer)  # Its errors come before the hours of counting.
    for document in iter_documents(request.source):
        split = _split(document, request)
        documents[split] += 1
        text_bytes[split] += len(document.text)
        add_to_hash(digest, document)
        report("counting", sum(text_bytes.values()), None)
    check_split(documents["train"], documents["held_out"], request.held_out_fraction)
    if is_trained:
        _train_tokenizer(request, out, text_bytes["train"], report)
    fingerprint = load_tokenizer(tokenizer_name(request, out)).fingerprint
    return Plan(request, fingerprint, documents, text_bytes, digest.hexdigest())


def _train_tokenizer(request, out, text_bytes, report):
    from k2jax.data.tokenizers.hugging_face import train_bpe

    size = int(request.tokenizer.removeprefix(_TRAINED))
    share = min(1.0, TRAINING_BYTES / text_bytes)

    def documents():
        done = 0
        for document in iter_documents(request.source):
            if _split(document, request) == "train" and is_chosen(document.name, share, "k2jax tokenizer"):
                done += len(document.text)
                report("training the tokenizer", done, int(text_bytes * share))
                yield document

    train_bpe(documents(), size, out / "tokenizer")


def _split(document, request):
    return "held_out" if is_chosen(document.name, request.held_out_fraction) else "train"


def _recorded(folder) -> dict[str, Shard]:
    """{name: Shard} of the shards that were completed at some time."""
    records = {}
    for path in [folder / "index.json", *sorted(folder.glob("*-of-*.json"))]:
        if not path.exists():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            shards = [Shard(**row) for row in content.get("shards", [content])]
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} cannot be read ({error}). Fix: delete it and run again.") from error
        records |= {shard.file.removesuffix(".array_record"): shard for shard in shards}
    return records


def _verified(folder, records, tokenizer, report) -> dict[str, Shard]:
    """Those of `records` that are still there, read and compared with their hashes."""
    done, total = 0, sum(shard.text_bytes for shard in records.values())
    finished = {}
    for name, shard in sorted(records.items()):
        if (folder / shard.file).exists() and (folder / starts_file(shard.file)).exists():
            verify(folder, shard, token_dtype(tokenizer.vocab_size))
            finished[name] = shard
        done += shard.text_bytes
        report("verifying", done, total)
    return finished


def _complete(plan, out, split, tokenizer, shards):
    for field in ("documents", "text_bytes"):
        found, planned = sum(getattr(shard, field) for shard in shards.values()), getattr(plan, field)[split]
        if found != planned:
            raise ValueError(
                f"--out={out}: the shards of {split} hold {found:,} {field}, and plan.json says {planned:,}: some were "
                f"made from another text. Fix: delete {out}, or give another --out."
            )
    index = Index(
        tokenizer=tokenizer_name(plan.request, out),
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        source=plan.request.source,
        held_out_fraction=plan.request.held_out_fraction,
        shards=tuple(shards[name] for name in sorted(shards)),
    )
    write_index(out / split, index)
    for path in [*(out / split).glob("*-of-*.json"), *(out / split).glob("*.partial")]:
        path.unlink()
    return index


# --- tokenising ---------------------------------------------------------------------------------------------------


def _tokenise(plan, out, tokenizer, finished, workers, report):
    """Makes the shards that are not in `finished` and adds them to it."""
    before = {split: set(shards) for split, shards in finished.items()}
    digest = hashlib.sha256()
    batches = _batches(plan, finished, digest)
    total = sum(plan.text_bytes.values()) - sum(s.text_bytes for shards in finished.values() for s in shards.values())
    done, writers = 0, {}
    for (split, name), (tokens, lengths, text_bytes) in _encoded(batches, plan, out, tokenizer, workers):
        if split in writers and writers[split][0] != name:
            _close(writers, split, finished)
        if split not in writers:
            writers[split] = name, ShardWriter(out / split, name, tokenizer.vocab_size)
        writers[split][1].add(tokens, lengths, text_bytes)
        done += text_bytes
        report("tokenising", done, total)
    if digest.hexdigest() != plan.sha256:
        for split, shards in finished.items():
            for name in shards.keys() - before[split]:  # Made of the other text: they must not be taken for finished.
                (out / split / f"{name}.json").unlink()
        raise ValueError(
            f"--source={plan.request.source} changed since {out} was begun. Fix: delete {out}, or give another --out."
        )
    for split in list(writers):
        _close(writers, split, finished)


def _close(writers, split, finished):
    name, writer = writers.pop(split)
    finished[split][name] = writer.close()


def _batches(plan: Plan, finished, digest) -> Iterator[tuple[tuple[str, str], list[bytes]]]:
    """((split, shard name), texts) in the order in which a shard takes them; all documents pass through `digest`."""
    before, waiting = dict.fromkeys(SPLITS, 0), {}
    for document in iter_documents(plan.request.source):
        add_to_hash(digest, document)
        split = _split(document, plan.request)
        count = plan.num_shards(split)
        number = min(before[split] * count // plan.text_bytes[split], count - 1)
        before[split] += len(document.text)
        name = plan.shard_name(split, number)
        if name in finished[split]:
            continue
        texts, old, size = waiting.get(split, ([], name, 0))
        if texts and (old != name or size >= _BATCH_BYTES):
            yield (split, old), texts
            texts, size = [], 0
        texts.append(document.text)
        waiting[split] = texts, name, size + len(document.text)
    for split, (texts, name, _) in waiting.items():
        yield (split, name), texts


def _encoded(batches, plan, out, tokenizer, workers):
    """(key, tokens, lengths, text bytes) of every batch, in order, with a few batches under way at once."""
    if workers == 1:
        yield from ((key, encode_batch(tokenizer, texts)) for key, texts in batches)
        return
    # Processes start anew: a fork of a process with threads may hang.
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker, (tokenizer_name(plan.request, out),)
    )
    under_way = collections.deque()
    try:
        while True:
            for key, texts in islice(batches, 3 * workers - len(under_way)):
                under_way.append((key, pool.submit(_encode_in_worker, texts)))
            if not under_way:
                return
            key, future = under_way.popleft()
            yield key, future.result()
    except BrokenProcessPool as error:
        raise ValueError(
            f"--workers={workers}: a worker process ended, perhaps killed for memory. Fix: give fewer; finished shards "
            "are kept."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def encode_batch(tokenizer: Tokenizer, texts: list[bytes]) -> tuple[np.ndarray, np.ndarray, int]:
    """(tokens of all documents end to end, length of each, bytes of text)."""
    encoded = [tokenizer.encode_document(text) for text in texts]
    lengths = np.array([len(tokens) for tokens in encoded], np.int64)
    return np.concatenate(encoded), lengths, sum(map(len, texts))


_worker_tokenizer: Tokenizer | None = None


def _start_worker(name: str):
    global _worker_tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The main process ends the workers.
    parent = multiprocessing.parent_process()
    # Nothing else ends a worker whose parent was killed.
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    _worker_tokenizer = load_tokenizer(name)


def _encode_in_worker(texts):
    return encode_batch(_worker_tokenizer, texts)
