"""What moves every leaf of a parameter tree: Muon, AdamW, or a rule outside the optimizer.

Paths are written 'moe/attn/wq_b'.
"""

import difflib
from collections.abc import Callable, Iterable
from typing import Any

import jax

from k2jax.matrix_specs import MatrixSpec, as_axes, stacks

PyTree = Any


class _External:
    def __repr__(self) -> str:
        return "EXTERNAL"


EXTERNAL = _External()
"""Role of a leaf that some other rule writes, such as a router bias: its update is exactly zero."""


def by_ndim(exclude: tuple[str, ...] = ("embed", "head")) -> Callable[[str, Any], MatrixSpec | None]:
    """A `matrix_specs` for a tree in the usual layout: matrices on the last two axes, batch axes before them.

    AdamW gets leaves with fewer than two axes, leaves named 'scale' or 'bias' (a stack of vectors [L, D]
    looks like a matrix but is none), and every leaf with a part of its path that starts or ends with a word
    of `exclude` ('lm_head', 'embedding'). Read the table of `describe` before training with it.
    """

    def spec(path: str, leaf: Any) -> MatrixSpec | None:
        parts = path.split("/")
        if len(parts) > 1 and parts[-1] == "value":  # a Flax NNX state: the array inside the variable
            parts.pop()
        excluded = any(part.startswith(word) or part.endswith(word) for part in parts for word in exclude)
        return None if excluded or leaf.ndim < 2 or parts[-1] in ("scale", "bias") else MatrixSpec()

    return spec


def table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _as_role(x: Any) -> Any:
    """`x`, or the MatrixSpec that an `optax.contrib.MuonDimensionNumbers` means."""
    if isinstance(x, tuple) and getattr(x, "_fields", ()) == ("reduction_axis", "output_axis"):
        return MatrixSpec(as_axes(x.reduction_axis), as_axes(x.output_axis))
    return x


def _is_role(x: Any) -> bool:
    return x is None or x is EXTERNAL or isinstance(_as_role(x), MatrixSpec)


def _is_absent(x: Any) -> bool:
    """None, as for a bias that a layer does not have, or optax.MaskedNode, a leaf that another transformation moves."""
    return x is None or (isinstance(x, tuple) and not x and hasattr(x, "_fields"))


def named_leaves(tree: PyTree, is_leaf: Callable | None = None) -> dict[str, Any]:
    """The leaves by path, such as 'moe/attn/wq_b', in the order of `jax.tree.leaves`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves}


def leaf_roles(params: PyTree, matrix_specs: PyTree) -> list[tuple[str, Any, Any]]:
    """(path, leaf, role) of every leaf, in the order of `jax.tree.leaves`.

    Raises:
      ValueError: a leaf without a role, an unknown path, or a role that does not fit its leaf.
    """
    leaves = named_leaves(params)
    if matrix_specs is None:
        raise ValueError(f"matrix_specs is not set, so no leaf has a rule.\n{_paste(leaves, {})}")
    if callable(matrix_specs):
        labels = {path: matrix_specs(path, leaf) for path, leaf in leaves.items()}
    else:
        absent = [path for path, leaf in named_leaves(params, is_leaf=_is_absent).items() if _is_absent(leaf)]
        labels = _labels_by_prefix(leaves, named_leaves(matrix_specs, is_leaf=_is_role), absent)
    labels = {path: _as_role(role) for path, role in labels.items()}
    wrong = {path: role for path, role in labels.items() if not _is_role(role)}
    if wrong:
        path, role = next(iter(wrong.items()))
        raise ValueError(f"matrix_specs gives {role!r} for {path!r}; expected a MatrixSpec, None or EXTERNAL")
    missing = [path for path in leaves if path not in labels]
    if missing:
        raise ValueError(f"matrix_specs has no entry for {', '.join(missing)}.\n{_paste(leaves, labels)}")
    for path, role in labels.items():
        if isinstance(role, MatrixSpec):
            try:
                stacks(leaves[path].shape, role)
            except ValueError as error:
                raise ValueError(f"matrix_specs of {path!r}: {error}; mend it, or use None for AdamW") from error
    return [(path, leaf, labels[path]) for path, leaf in leaves.items()]


def _labels_by_prefix(leaves: dict[str, Any], entries: dict[str, Any], absent: list[str]) -> dict[str, Any]:
    """The entry of the longest prefix of each path; a full tree, a prefix tree and flat paths all work."""
    labels, used = {}, set()
    for path in [*leaves, *absent]:
        parts = path.split("/")
        prefixes = ["/".join(parts[:length]) for length in range(len(parts), -1, -1)]
        matching = [prefix for prefix in prefixes if prefix in entries]
        used.update(matching)
        if matching and path in leaves:
            labels[path] = entries[matching[0]]
    unknown = [entry for entry in entries if entry not in used]
    if unknown:
        raise ValueError(f"matrix_specs names {unknown[0]!r}, which is no leaf; {closest(unknown[0], leaves)}")
    return labels


def _paste(leaves: dict[str, Any], labels: dict[str, Any]) -> str:
    """The table of leaves, and a `matrix_specs` to paste: known roles kept, others guessed by `by_ndim`."""
    guess = by_ndim()
    leaf_table = table([("path", "shape"), *((path, str(list(leaf.shape))) for path, leaf in leaves.items())])
    lines = [f"    {path!r}: {labels.get(path, guess(path, leaf))!r}," for path, leaf in leaves.items()]
    advice = "Check every line, then paste (None = AdamW, EXTERNAL = written by another rule):"
    return "\n".join([leaf_table, advice, "matrix_specs = {", *lines, "}"])


def closest(path: str, known: Iterable[str]) -> str:
    """Advice for an error about an unknown path."""
    close = difflib.get_close_matches(path, list(known), n=1, cutoff=0.0)
    return f"the closest one is {close[0]!r}" if close else "the tree has no leaf"
