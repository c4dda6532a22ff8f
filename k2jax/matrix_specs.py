"""Which leaves of a parameter tree hold matrices, on which axes, and what role every other leaf has.

Legend: L layers, D model, H heads, K and V head sizes. Paths are written 'moe/attn/wq_b'.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax

PyTree = Any


@dataclasses.dataclass(frozen=True)
class MatrixSpec:
    """Which axes of a parameter form its matrix; every other axis is a batch of independent matrices.

    An input projection `wq [L, D, H, K]` is `MatrixSpec(-3, (-2, -1))`: L matrices [D, H*K]. An output
    projection `wo [L, H, V, D]` is `MatrixSpec((-3, -2), -1)`. Count from the end, so that one spec fits
    stacked and unstacked layers.

    Args:
      reduction_axis: the axis, or axes, that the forward pass sums over (fan-in).
      output_axis: the axis, or axes, of the result (fan-out).
    """

    reduction_axis: int | tuple[int, ...] = -2
    output_axis: int | tuple[int, ...] = -1


class _External:
    def __repr__(self) -> str:
        return "EXTERNAL"


EXTERNAL = _External()
"""Role of a leaf that some other rule writes, such as a router bias: its update is exactly zero."""

LAST_TWO = MatrixSpec()


def matrix_axes(shape: tuple[int, ...], spec: MatrixSpec) -> tuple[tuple[int, ...], ...]:
    """Axes (batch, reduction, output) of a parameter of this shape, counted from the front.

    Raises:
      ValueError: an axis is missing from the shape, or named twice.
    """
    reduction, output = (
        axis if isinstance(axis, tuple) else (axis,) for axis in (spec.reduction_axis, spec.output_axis)
    )
    ndim = len(shape)
    if not reduction or not output or any(not -ndim <= axis < ndim for axis in reduction + output):
        raise ValueError(f"{spec} does not fit shape {shape}: it needs axes in [{-ndim}, {ndim})")
    reduction, output = (tuple(axis % ndim for axis in axes) for axes in (reduction, output))
    if len(set(reduction + output)) != len(reduction + output):
        raise ValueError(f"{spec} names an axis of shape {shape} twice: reduction and output must be disjoint")
    batch = tuple(axis for axis in range(ndim) if axis not in reduction + output)
    return batch, reduction, output


def matrix_sides(shape: tuple[int, ...], spec: MatrixSpec) -> tuple[int, int, int]:
    """(number of matrices, fan-in, fan-out) of a parameter of this shape."""
    return tuple(math.prod(shape[axis] for axis in axes) for axes in matrix_axes(shape, spec))


def by_ndim(exclude: tuple[str, ...] = ("embed", "head")) -> Callable[[str, Any], MatrixSpec | None]:
    """A `matrix_specs` for a tree in the usual layout: matrices on the last two axes, batch axes before them.

    AdamW gets leaves with fewer than two axes, leaves named 'scale' or 'bias' (a stack of vectors [L, D]
    looks like a matrix but is none), and every leaf with a part of its path that starts or ends with a word
    of `exclude` ('lm_head', 'embedding'). Read the table of `describe` before training with it.
    """

    def spec(path: str, leaf: Any) -> MatrixSpec | None:
        parts = path.split("/")
        excluded = any(part.startswith(word) or part.endswith(word) for part in parts for word in exclude)
        return None if excluded or leaf.ndim < 2 or parts[-1] in ("scale", "bias") else MatrixSpec()

    return spec


def role_table(params: PyTree, matrix_specs: PyTree, *, ns_steps: int) -> str:
    """The text of `k2jax.muonclip.describe`, for that many Newton-Schulz steps. Raises what `leaf_roles` raises."""
    rows = [("path", "role", "shape", "matrices", "NS FLOPs")]
    total = 0
    for path, leaf, role in leaf_roles(params, matrix_specs):
        matrices, flops = "", ""
        if isinstance(role, MatrixSpec):
            count, fan_in, fan_out = matrix_sides(leaf.shape, role)
            n, m = sorted((fan_in, fan_out))
            leaf_flops = ns_steps * count * (2 * n**3 + 4 * n * n * m)
            total += leaf_flops
            matrices, flops = f"{count} x ({fan_in}, {fan_out})", f"{leaf_flops:.3g}"
        rows.append((path, _role_name(role), str(list(leaf.shape)), matrices, flops))
    return _table([*rows, ("total", "", "", "", f"{total:.3g}")])


def _role_name(role: Any) -> str:
    return "muon" if isinstance(role, MatrixSpec) else "adamw" if role is None else "external"


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _is_role(x: Any) -> bool:
    return x is None or x is EXTERNAL or isinstance(x, MatrixSpec)


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
        labels = _labels_by_prefix(leaves, named_leaves(matrix_specs, is_leaf=_is_role))
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
                matrix_axes(leaves[path].shape, role)
            except ValueError as error:
                raise ValueError(f"matrix_specs of {path!r}: {error}; use None for AdamW") from error
    return [(path, leaf, labels[path]) for path, leaf in leaves.items()]


def _labels_by_prefix(leaves: dict[str, Any], entries: dict[str, Any]) -> dict[str, Any]:
    """The entry of the longest prefix of each path; a full tree, a prefix tree and flat paths all work."""
    labels, used = {}, set()
    for path in leaves:
        parts = path.split("/")
        prefixes = ["/".join(parts[:length]) for length in range(len(parts), -1, -1)]
        matching = [prefix for prefix in prefixes if prefix in entries]
        used.update(matching)
        if matching:
            labels[path] = entries[matching[0]]
    unknown = [entry for entry in entries if entry not in used]
    if unknown:
        raise ValueError(f"matrix_specs names {unknown[0]!r}, which is no leaf; {closest(unknown[0], leaves)}")
    return labels


def _paste(leaves: dict[str, Any], labels: dict[str, Any]) -> str:
    """The table of leaves, and a `matrix_specs` to paste: known roles kept, others guessed by `by_ndim`."""
    guess = by_ndim()
    table = _table([("path", "shape"), *((path, str(list(leaf.shape))) for path, leaf in leaves.items())])
    lines = [f"    {path!r}: {labels.get(path, guess(path, leaf))!r}," for path, leaf in leaves.items()]
    advice = "Check every line, then paste (None = AdamW, EXTERNAL = written by another rule):"
    return "\n".join([table, advice, "matrix_specs = {", *lines, "}"])


def closest(path: str, known: Iterable[str]) -> str:
    """Advice for an error about an unknown path."""
    close = difflib.get_close_matches(path, list(known), n=1, cutoff=0.0)
    return f"the closest one is {close[0]!r}" if close else "the tree has no leaf"
