"""Where the text comes from. `docs/data.md` shows every form of `data.source`.

`installed` reads what every machine with Python has, `files` reads files (with `rows` for those of many documents),
`hugging_face` reads data sets. Each gives documents one at a time.
"""

from collections.abc import Iterator
from pathlib import Path

from k2jax.data.sources import files, hugging_face, installed
from k2jax.data.sources.document import Document, corpus_hash, is_chosen, split_held_out

__all__ = ["Document", "corpus_hash", "is_chosen", "iter_documents", "load_documents", "split_held_out"]

MEMORY_LIMIT = 4 * 10**9  # bytes of text that training holds in memory; its tokens take up to four times as much


def iter_documents(source: str | Path) -> Iterator[Document]:
    """The documents of `source`, one at a time, the same ones in the same order every time.

    'stdlib', 'packages', 'hf://owner/name?split=train&field=text', or a file, folder, pattern or bucket with text,
    JSON lines, Parquet or ArrayRecord, as PATH or PATH#FIELD.

    Raises FileNotFoundError or ValueError, when they are reached, as the functions called here say.
    """
    source = str(source)
    if source == "stdlib":
        return installed.stdlib_documents()
    if source == "packages":
        return installed.packages_documents()
    if source.startswith("hf://"):
        return hugging_face.dataset_documents(source)
    return files.file_documents(source)


def load_documents(source: str | Path) -> list[Document]:
    """All documents of `source` (see `iter_documents`), in memory.

    Raises ValueError also for more than 4 GB of text.
    """
    documents, size = [], 0
    for document in iter_documents(source):
        size += len(document.text)
        if size > MEMORY_LIMIT:
            raise ValueError(
                f"data.source={str(source)!r} holds more than {MEMORY_LIMIT / 1e9:.0f} GB of text, which is not kept "
                f"in memory. Fix: python -m experiments.prepare --source='{source}' --tokenizer=... --out=FOLDER, "
                "then data.source=FOLDER."
            )
        documents.append(document)
    return documents
