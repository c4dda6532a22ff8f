"""Data sets of the Hugging Face hub, or saved by `datasets` on a local disk."""

from collections.abc import Iterator
from urllib.parse import parse_qsl

from k2jax.data.optional import needs
from k2jax.data.sources.document import Document
from k2jax.data.sources.rows import text_of

_FORM = "hf://owner/name?split=train&field=text&config=NAME, or hf:///folder that save_to_disk wrote"


def dataset_documents(source: str) -> Iterator[Document]:
    """Rows of `hf://owner/name?split=train&field=text&config=NAME`, or of `hf:///folder?split=train&field=text`.

    split (default 'train'), field (default 'text') and config (default: the data set's own) may be left out. The data
    set is downloaded whole into the cache of `datasets` and read from there, row by row.

    Raises ValueError for a form that is not this one, for a data set, split or field that is not there, for a hub
    that cannot be reached while the cache lacks the data set, and for a row that is no text.
    """
    place, options = _parse(source)
    field = options["field"]
    rows = _load_folder(source, place, options) if place.startswith("/") else _load(source, place, options)
    if field not in rows.column_names:
        known = ", ".join(map(repr, rows.column_names))
        raise ValueError(f"data.source={source!r} has no field {field!r} (it has {known}). Fix: &field=ONE_OF_THESE.")
    count = 0
    for number, row in enumerate(rows.select_columns([field]), 1):
        text = text_of(row[field], f"{source}, row {number}", field)
        if text:
            count += 1
            yield Document(f"{options['split'] or 'train'}:{number}", text)
    if not count:
        raise ValueError(
            f"data.source={source!r} has no text in its {len(rows)} rows. Fix: name another split or field."
        )


def _parse(source):
    place, _, query = source.removeprefix("hf://").partition("?")
    pairs = dict(parse_qsl(query, keep_blank_values=True))
    unknown = pairs.keys() - {"split", "field", "config"}
    empty = [name for name, value in pairs.items() if not value]
    if not place or place.startswith(".") or unknown or empty:
        raise ValueError(f"data.source={source!r} is not understood. Fix: write {_FORM}.")
    return place, {"split": None, "field": "text", "config": None} | pairs


def _load(source, place, options):
    with needs("hf", f"data.source={source!r}"):
        import datasets
    try:
        return datasets.load_dataset(place, options["config"], split=options["split"] or "train")
    except (OSError, ValueError) as error:
        # The package raises ConnectionError and FileNotFoundError (both OSError) for a hub that it cannot reach or a
        # data set that it cannot find, and ValueError for a wrong config, split or cache.
        raise ValueError(
            f"data.source={source!r} cannot be loaded ({type(error).__name__}: {error}). Looked on the hub and in the "
            f"cache {datasets.config.HF_DATASETS_CACHE}. Fix: check owner, name, config and split; without a network, "
            f"run datasets.load_dataset({place!r}) where there is one and copy its cache here (HF_HOME), or give the "
            "folder of save_to_disk as hf:///folder."
        ) from error


def _load_folder(source, place, options):
    with needs("hf", f"data.source={source!r}"):
        import datasets
    try:
        loaded = datasets.load_from_disk(place)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"data.source={source!r} cannot be loaded ({type(error).__name__}: {error}). Fix: give a folder that "
            "datasets' save_to_disk wrote, or write it again."
        ) from error
    has_splits = isinstance(loaded, datasets.DatasetDict)
    if options["config"] or (options["split"] and not has_splits):
        name = "config" if options["config"] else "split"
        raise ValueError(f"data.source={source!r}: the data set of this folder has no {name}s. Fix: leave it out.")
    split = options["split"] or "train"
    if has_splits and split not in loaded:
        known = ", ".join(loaded)
        raise ValueError(f"data.source={source!r} has no split {split!r} (it has {known}). Fix: ?split=ONE_OF_THESE.")
    return loaded[split] if has_splits else loaded
