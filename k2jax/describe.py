"""The table of what the optimizer does to every leaf, before a step is taken."""

from typing import Any, NamedTuple

from k2jax.leaf_roles import EXTERNAL, leaf_roles, table
from k2jax.matrix_specs import MatrixSpec, Stack, stacks
from k2jax.newton_schulz import K2, NS, method_flops, runs_gram

PyTree = Any


class LeafPlan(NamedTuple):
    """What one update does to one leaf.

    matrices: its matrices, equal ones together. methods: 'standard' or 'gram' for each of them.
    flops: of Newton-Schulz. bytes: what the update reads and writes besides: gradient, parameter, update, and the
    momentum or the two moments, in float32, each read and written.
    """

    path: str
    role: str
    shape: tuple[int, ...]
    matrices: tuple[Stack, ...]
    methods: tuple[str, ...]
    flops: int
    bytes: int


def plan(params: PyTree, matrix_specs: PyTree, *, ns: NS = K2) -> list[LeafPlan]:
    """One `LeafPlan` a leaf, in the order of `jax.tree.leaves`. Arguments and errors as in `describe`."""
    return [_leaf_plan(path, leaf, role, ns) for path, leaf, role in leaf_roles(params, matrix_specs)]


def _leaf_plan(path: str, leaf: Any, role: Any, ns: NS) -> LeafPlan:
    if not isinstance(role, MatrixSpec):
        name = "external" if role is EXTERNAL else "adamw"
        moved = 0 if role is EXTERNAL else leaf.size * (3 * leaf.dtype.itemsize + 16)
        return LeafPlan(path, name, leaf.shape, (), (), 0, moved)
    ns = ns if role.ns is None else role.ns
    matrices = tuple(stacks(leaf.shape, role))
    sides = [sorted((part.fan_in, part.fan_out)) for part in matrices]
    methods = tuple("gram" if runs_gram(n, m, ns) else "standard" for n, m in sides)
    flops = sum(
        part.matrices * method_flops(n, m, ns, method)
        for part, (n, m), method in zip(matrices, sides, methods, strict=True)
    )
    return LeafPlan(path, "muon", leaf.shape, matrices, methods, flops, leaf.size * (3 * leaf.dtype.itemsize + 8))


def describe(params: PyTree, matrix_specs: PyTree, *, ns: NS = K2) -> str:
    """Table of what the optimizer does to every leaf, one line a leaf and one with the totals.

    Columns: path, role, shape, matrices as count x (fan-in, fan-out), the form of Newton-Schulz that they take, its
    operations in one update, and the bytes that the update reads and writes besides (see `LeafPlan`).

    `params` may be arrays or shapes (`jax.eval_shape`). Raises the same errors as `muonclip(...).init`.
    """
    plans = plan(params, matrix_specs, ns=ns)
    rows = [tuple(cell(leaf) for cell in _COLUMNS.values()) for leaf in plans]
    total = LeafPlan("total", "", (), (), (), sum(leaf.flops for leaf in plans), sum(leaf.bytes for leaf in plans))
    last = tuple(cell(total) if name in _TOTALS else "" for name, cell in _COLUMNS.items())
    return table([tuple(_COLUMNS), *rows, last])


_COLUMNS = {
    "path": lambda leaf: leaf.path,
    "role": lambda leaf: leaf.role,
    "shape": lambda leaf: str(list(leaf.shape)),
    "matrices": lambda leaf: " + ".join(f"{s.matrices} x ({s.fan_in}, {s.fan_out})" for s in leaf.matrices),
    "method": lambda leaf: " + ".join(dict.fromkeys(leaf.methods)),
    "NS FLOPs": lambda leaf: f"{leaf.flops:.3g}" if leaf.flops or not leaf.role else "",
    "bytes": lambda leaf: f"{leaf.bytes:.3g}",
}
_TOTALS = {"path", "NS FLOPs", "bytes"}
