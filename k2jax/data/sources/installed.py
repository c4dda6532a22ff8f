"""Text that every machine with Python has: its standard library, and the packages installed beside it.

Both are the same for the same release of Python and the same packages: files that a build or an installation
writes for one machine are left out. The hash of the corpus says whether two machines agree.
"""

import hashlib
import logging
import re
import string
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from k2jax.data.sources.document import Document, utf8

log = logging.getLogger(__name__)

STDLIB_ENDINGS = (".py", ".txt", ".rst")
PACKAGES_ENDINGS = (".py", ".txt", ".rst", ".md")

# Not text that a person wrote for this Python: other packages, tests and their data, generated tables.
_STDLIB_SKIPPED_FOLDERS = frozenset(
    (
        *("site-packages", "dist-packages", "test", "tests", "idle_test"),
        *("encodings", "pydoc_data", "ensurepip", "__pycache__"),
    )
)
# Written by the build or by the distribution: they hold paths of one machine and would change the hash.
_MACHINE_PREFIXES = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize")

_PACKAGES_SKIPPED_FOLDERS = frozenset(("test", "tests", "testdata", "__pycache__"))
_LETTERS = string.ascii_letters.encode() + bytes(range(128, 256))
_LARGEST_FILE = 512 * 1024  # bytes
_GENERATED = re.compile(rb"generated (by|from|file)|auto-?generated|do not edit", re.IGNORECASE)


def stdlib_documents(root: str | Path | None = None) -> Iterator[Document]:
    """Code and prose (.py, .txt, .rst) of the running interpreter's standard library, in order of the name.

    Left out: installed packages, tests, `encodings`, `pydoc_data`, `ensurepip`, the files that describe one
    build or machine, and empty files. `root` replaces `sysconfig.get_path('stdlib')`.

    Raises:
      FileNotFoundError: the folder does not exist (some minimal Pythons ship a zip file instead).
      ValueError: no file is left, or a file is not UTF-8.
    """
    folder = Path(root or sysconfig.get_path("stdlib"))
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data.source='stdlib': no standard library folder at {folder}. Fix: set data.source to a folder "
            "of text files, or use a Python that ships its library as files."
        )
    fix = "set data.source to a folder of UTF-8 text files"
    count = 0
    for path in _files(folder, STDLIB_ENDINGS):
        if not _in_stdlib(path.relative_to(folder)):
            continue
        if text := utf8(path.read_bytes(), str(path), fix):
            count += 1
            yield Document(path.relative_to(folder).as_posix(), text)
    if not count:
        raise ValueError(
            f"data.source: {folder} has no non-empty file that ends in {', '.join(STDLIB_ENDINGS)}. "
            "Fix: set data.source to a folder of text files."
        )


def packages_documents(folders: list[Path] | None = None, stdlib: Path | None = None) -> Iterator[Document]:
    """Code and prose of the installed packages, then of the standard library, each in order of the name.

    A file is left out, and counted by its reason in one line of the log, when it is
    - in a folder of tests or test data, or of an installation's records (*.dist-info, *.egg-info),
    - empty, larger than 512 KiB, or not UTF-8 (nobody can mend an installed package),
    - generated: its first five lines say so, or its name ends in _pb2.py or _pb2_grpc.py,
    - a table rather than text: code with lines longer than 100 bytes on average or one longer than 1,000 (the rule of
      "Evaluating Large Language Models Trained on Code", arXiv 2107.03374, section 3.1), or anything of which less
      than a quarter is letters (bytes above 127 count as letters),
    - the same, byte for byte, as an earlier one (vendored copies).

    folders: instead of the running interpreter's site-packages. stdlib: instead of its standard library.
    """
    folders = folders or sorted({Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")})
    left_out, kept, seen = Counter(), Counter(), set()
    for document in _candidates(folders, stdlib, left_out):
        digest = hashlib.sha256(document.text).digest()
        reason = "copies of an earlier file" if digest in seen else _fault(document)
        if reason:
            left_out[reason] += 1
            continue
        seen.add(digest)
        kept["documents"] += 1
        kept["bytes"] += len(document.text)
        yield document
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(left_out.items())) or "nothing"
    log.info("packages: %s documents, %.1f MB; left out: %s", f"{kept['documents']:,}", kept["bytes"] / 1e6, reasons)


def _candidates(folders, stdlib, left_out):
    for folder in folders:
        for path in _files(folder, PACKAGES_ENDINGS):
            relative = path.relative_to(folder)
            if not _in_packages(relative):
                left_out["of tests or of an installation"] += 1
            elif path.stat().st_size > _LARGEST_FILE:
                left_out["too large"] += 1
            else:
                yield Document(f"site-packages/{relative.as_posix()}", path.read_bytes())
    for document in stdlib_documents(stdlib):
        yield Document(f"stdlib/{document.name}", document.text)


def _fault(document: Document) -> str | None:
    """Why an installed file is no text to train on, or None."""
    text = document.text
    if not text.strip():
        return "empty"
    if len(text) > _LARGEST_FILE:
        return "too large"
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return "not UTF-8"
    lines = text.splitlines()
    if document.name.endswith(("_pb2.py", "_pb2_grpc.py")) or any(map(_GENERATED.search, lines[:5])):
        return "generated"
    is_code = document.name.endswith(".py")
    long_lines = len(text) > 101 * len(lines) or max(map(len, lines)) > 1000
    others = len(text.translate(None, _LETTERS))
    return "tables" if (is_code and long_lines) or 4 * others > 3 * len(text) else None


def _files(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    paths = (path for path in folder.rglob("*") if path.name.endswith(endings) and path.is_file())
    return sorted(paths, key=lambda path: path.relative_to(folder).as_posix())


def _in_stdlib(relative: Path) -> bool:
    skipped = _STDLIB_SKIPPED_FOLDERS.intersection(relative.parts[:-1])
    return not skipped and not relative.parts[0].startswith(_MACHINE_PREFIXES)


def _in_packages(relative: Path) -> bool:
    folders = relative.parts[:-1]
    records = any(folder.endswith((".dist-info", ".egg-info")) for folder in folders)
    machine = relative.parts[0].startswith((*_MACHINE_PREFIXES, "__editable__"))
    test_file = relative.name.startswith("test_") or relative.name.endswith("_test.py")
    return not (records or machine or test_file or _PACKAGES_SKIPPED_FOLDERS.intersection(folders))
