"""What every source gives, which documents are held out, and the hash of a corpus."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Document:
    """One text: `name` is its place relative to the source, `text` its bytes (valid UTF-8, not empty).

    A name is the same on every machine (forward slashes, no root), because the held-out split goes by it.
    """

    name: str
    text: bytes


def split_held_out(
    documents: Iterable[Document], fraction: float, salt: str = "k2jax held-out"
) -> tuple[list[Document], list[Document]]:
    """(train, held_out): whole documents, chosen by the SHA-256 of `salt` and the name, order kept.

    A document's side depends on its own name only, so adding or removing others never moves it, and a larger
    `fraction` keeps what a smaller one held out. `fraction` is the expected share of documents, not of bytes.

    Raises ValueError if `fraction` is not between 0 and 1 or if one side gets no document.
    """
    check_fraction(fraction)
    train, held_out = [], []
    for document in documents:
        (held_out if is_chosen(document.name, fraction, salt) else train).append(document)
    check_split(len(train), len(held_out), fraction)
    return train, held_out


def is_chosen(name: str, fraction: float, salt: str = "k2jax held-out") -> bool:
    """Whether the document of this name is in the `fraction` that `salt` draws."""
    digest = hashlib.sha256(f"{salt}\0{name}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def check_fraction(fraction: float) -> None:
    """Raises ValueError unless `fraction` lies between 0 and 1."""
    if not 0 < fraction < 1:
        raise ValueError(f"data.held_out_fraction={fraction} must lie between 0 and 1. Fix: try 0.03.")


def check_split(train: int, held_out: int, fraction: float) -> None:
    """Raises ValueError if one of the two sides has no document."""
    if not train or not held_out:
        side = "held-out" if train else "training"
        raise ValueError(
            f"data.held_out_fraction={fraction} leaves no {side} file of {train + held_out}. "
            "Fix: add files (a single large file can be cut into several), or change the fraction."
        )


def corpus_hash(documents: Iterable[Document]) -> str:
    """SHA-256 (hex) over the names and contents; the order of the documents does not matter."""
    total = hashlib.sha256()
    for document in sorted(documents, key=lambda document: document.name):
        add_to_hash(total, document)
    return total.hexdigest()


def add_to_hash(total, document: Document) -> None:
    """Adds name and text to a hashlib object. A file's name may hold bytes that are not UTF-8."""
    for field in (document.name.encode("utf-8", "surrogateescape"), document.text):
        # The length in front keeps ('ab', 'c') and ('a', 'bc') apart.
        total.update(len(field).to_bytes(8, "big") + field)


def holds_shards(folder) -> bool:
    """Whether experiments.prepare wrote this folder (any kind of path): it holds tokens, and no text."""
    return (folder / "plan.json").exists() and (folder / "train").exists()


def utf8(text: bytes, where: str, fix: str) -> bytes:
    """`text`, if it is UTF-8. Raises ValueError with the place, the byte and the fix if it is not."""
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data.source: {where} is not UTF-8: byte 0x{text[error.start]:02x} at offset {error.start} "
            f"({error.reason}). Fix: {fix}."
        ) from error
    return text
