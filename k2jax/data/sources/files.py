"""Documents from files: one file, a folder or a pattern, on a local disk or in a bucket.

The ending says how a file is read (`rows.py`); any other file that is named alone is text. Buckets are read through
etils.epath, which needs the file system's own package (gcsfs, s3fs, adlfs) or TensorFlow.
"""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from k2jax.data.sources import rows
from k2jax.data.sources.document import Document, holds_shards, utf8

TEXT_ENDINGS = (".txt", ".md", ".rst", ".py")
SCHEMES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}  # URL scheme -> package of the file system

_ARRAY_RECORD = re.compile(r"\.array_?record(-\d+-of-\d+)?$")
_FIELD = re.compile(r"(.+)#([A-Za-z_][\w.-]*)")
_WILD = re.compile(r"[*?\[]")


def file_documents(source: str) -> Iterator[Document]:
    """Documents of `source`: PATH or PATH#FIELD, PATH being a file, a folder or a pattern such as 'data/**/*.jsonl'.

    In order of the files' names, and of the rows in a file. Empty texts are left out. Read one file or row at a time.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: no document, text files beside files of rows in one folder, a URL that cannot be read, or a file
        or row that is damaged; the message names it.
    """
    path, field = split_field(source)
    root, paths = find(path)
    count = 0
    for file in paths:
        name = file.relative_to(root).as_posix()
        for document in _documents_of(file, name, field):
            if document.text:
                count += 1
                yield document
    if not count:
        raise ValueError(
            f"data.source: {source} has no text: its {len(paths)} files of {', '.join(TEXT_ENDINGS)}, .jsonl, "
            ".jsonl.gz, .parquet or .array_record hold nothing. Fix: put text there, or set data.source='stdlib'."
        )


def split_field(source: str) -> tuple[str, str | None]:
    """('data.jsonl', 'body') of 'data.jsonl#body'; a file whose name has such an ending is that file."""
    match = _FIELD.fullmatch(source)
    if not match or ("://" not in source and Path(source).expanduser().exists()):
        return source, None
    return match[1], match[2]


def find(path: str) -> tuple[Path, list[Path]]:
    """(root, files): what names are relative to, and the files in order of their names relative to it."""
    root = _path(path)
    if root.exists():
        if not root.is_dir():
            return root.parent, [root]
        if holds_shards(root):
            raise ValueError(
                f"data.source: {path} holds tokenised shards, and text is needed here. Fix: give the source that they "
                "were prepared from."
            )
        files = [file for file in _walk(root) if kind(file.name)]
        _refuse_a_mixture(path, files)
    elif _WILD.search(path):
        root, pattern = _wildcard_root(path)
        if "://" in path and "**" in pattern:
            raise ValueError(f"data.source={path!r}: '**' is not read in a bucket. Fix: name the folder, or use '*'.")
        files = [file for file in root.glob(pattern) if not file.is_dir()]
    else:
        raise FileNotFoundError(
            f"data.source: {path} does not exist. Fix: give the path of a file or folder, or a pattern in quotes, or "
            "'stdlib', 'packages' or 'hf://owner/name?split=train'."
        )
    return root, sorted(files, key=lambda file: file.relative_to(root).as_posix())


def kind(name: str) -> str | None:
    """How a file in a folder is read, by its ending: 'text', 'jsonl', 'parquet', 'array_record', or None: it is not."""
    if name.endswith((".jsonl", ".jsonl.gz")):
        return "jsonl"
    if name.endswith(".parquet"):
        return "parquet"
    if _ARRAY_RECORD.search(name):
        return "array_record"
    return "text" if name.endswith(TEXT_ENDINGS) else None


def _documents_of(file, name, field):
    how = kind(file.name) or "text"
    if how in ("text", "array_record") and field:
        raise ValueError(f"data.source: {file} has no fields, so '#{field}' means nothing. Fix: leave it out.")
    if how == "text":
        fix = "convert it to UTF-8 (iconv -t UTF-8), unpack it if it is compressed, or move it elsewhere"
        yield Document(name, utf8(_read(file), str(file), fix))
    elif how == "array_record":
        if "://" in str(file):
            raise ValueError(f"data.source: {file}: ArrayRecord is read from local disks only. Fix: copy it to one.")
        yield from _numbered(name, rows.array_record_rows(file))
    else:
        read = rows.jsonl_rows if how == "jsonl" else rows.parquet_rows
        with file.open("rb") as stream:
            yield from _numbered(name, read(stream, str(file), field or "text"))


def _numbered(name, texts):
    for number, text in enumerate(texts, 1):
        yield Document(f"{name}:{number}", text)


def _read(file):
    with file.open("rb") as stream:
        return stream.read()


def _path(path: str):
    scheme, separator, _ = path.partition("://")
    if not separator:
        return Path(path).expanduser()
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in (*SCHEMES, "hf"))
        raise ValueError(f"data.source={path!r}: URLs of {known} are read. Fix: use one, or a local path.")
    from etils import epath

    root = epath.Path(path)
    try:
        root.exists()
    except ImportError as error:
        raise ValueError(
            f"data.source={path!r} needs the file system of {scheme}:// ({error}). Fix: pip install {SCHEMES[scheme]}."
        ) from error
    return root


def _walk(folder):
    # epath has no '**' in buckets.
    if isinstance(folder, Path) and "://" not in str(folder):
        return [path for path in folder.rglob("*") if path.is_file()]
    files = []
    for path in folder.iterdir():
        files += _walk(path) if path.is_dir() else [path]
    return files


def _wildcard_root(path):
    parts = PurePosixPath(path.partition("://")[2] or path).parts
    first = next(i for i, part in enumerate(parts) if _WILD.search(part))
    prefix = path.partition("://")[0] + "://" if "://" in path else ""
    root = str(PurePosixPath(*parts[:first])) if first else "."
    return _path(prefix + root), "/".join(parts[first:])


def _refuse_a_mixture(path, files):
    # A README beside rows is no document of the corpus, and rows beside pages are perhaps their metadata.
    examples = {kind(file.name) == "text": file for file in files}
    if len(examples) == 2:
        raise ValueError(
            f"data.source: {path} holds text ({examples[True].name}) beside files of rows ({examples[False].name}). "
            f"Fix: say which with a pattern, for example {path}/**/*{examples[False].suffix}."
        )
