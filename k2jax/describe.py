"""The table of what the optimizer does to every leaf, before a step is taken."""

import math
from typing import Any, NamedTuple

from k2jax.leaf_roles import EXTERNAL, leaf_roles, named_leaves, table
from k2jax.matrix_specs import MatrixSpec, Stack, stacks
from k2jax.muon_plan import MAX_GROUP_BYTES, Group, Placement, group, place_all, ways
from k2jax.newton_schulz import K2, NS, method_flops, runs_gram

PyTree = Any


class LeafPlan(NamedTuple):
    """What one update does to one leaf.

    matrices: its matrices, equal ones together. methods: 'standard' or 'gram' for each of them.
    flops: of Newton-Schulz. bytes: what the update reads and writes besides: gradient, parameter, update, and the
    momentum or the two moments, in float32, each read and written. Both of the whole mesh.
    where: 'local', or what moves over which mesh axes, in the words of `describe`. received: bytes that a device
    receives for it. places: so many matrices could be orthogonalised in the same time; `filled` of them are there.
    """

    path: str
    role: str
    shape: tuple[int, ...]
    matrices: tuple[Stack, ...]
    methods: tuple[str, ...]
    flops: int
    bytes: int
    where: str = ""
    received: int = 0
    places: float = 0
    filled: int = 0


def plan(
    params: PyTree,
    matrix_specs: PyTree,
    *,
    ns: NS = K2,
    shardings: PyTree = None,
    max_group_bytes: int | None = None,
    repeat_over: tuple[str, ...] = (),
) -> list[LeafPlan]:
    """One `LeafPlan` a leaf, in the order of `jax.tree.leaves`. Arguments and errors as in `describe`."""
    roles = leaf_roles(params, matrix_specs)
    given = {} if shardings is None else named_leaves(shardings)
    leaves = [_leaf_plan(path, leaf, role, ns) for path, leaf, role in roles]
    mine = [i for i, (_, _, role) in enumerate(roles) if isinstance(role, MatrixSpec)]
    names = [roles[i][0] for i in mine]
    lying = [given.get(roles[i][0], getattr(roles[i][1], "sharding", None)) for i in mine]
    specs = [roles[i][2] for i in mine]
    placements, _, mesh = place_all([roles[i][1].shape for i in mine], specs, lying, names)
    settings = [ns if spec.ns is None else spec.ns for spec in specs]
    how = {"max_group_bytes": MAX_GROUP_BYTES if max_group_bytes is None else max_group_bytes}
    how |= {"repeat_over": repeat_over}
    groups = group(placements, settings, mesh, **how)
    for place_of_leaf, i in enumerate(mine):
        leaves[i] = _spread(leaves[i], place_of_leaf, placements[place_of_leaf], groups, mesh)
    return leaves


def _spread(leaf: LeafPlan, index: int, placed: Placement, groups: list[Group], sizes: dict[str, int]) -> LeafPlan:
    """The plan of a leaf with its share of its groups."""
    shares = [(g, member.count) for g in groups for member in g.members if member.leaf == index]
    words = list(dict.fromkeys(g.where() for g, _ in shares))
    received = sum(g.bytes * count / g.count for g, count in shares)
    if placed.gathered:
        words.insert(0, f"gather blocks {','.join(placed.gathered)}")
        received += 4 * math.prod(placed.shape) * (1 - 1 / ways(placed.gathered, sizes))
    places = sum(g.chunks * g.stack * count / g.count for g, count in shares)
    filled = sum(count for _, count in shares)
    return leaf._replace(where="; ".join(words), received=round(received), places=places, filled=filled)


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


def describe(
    params: PyTree,
    matrix_specs: PyTree,
    *,
    ns: NS = K2,
    shardings: PyTree = None,
    max_group_bytes: int | None = None,
    repeat_over: tuple[str, ...] = (),
) -> str:
    """Table of what the optimizer does to every leaf, one line a leaf and one with the totals.

    Columns: path, role, shape, matrices as count x (fan-in, fan-out), the form of Newton-Schulz that they take, its
    operations in one update, the bytes that the update reads and writes besides (see `LeafPlan`), where the matrices
    are orthogonalised, the bytes that one device receives for that (but norms: 8 a matrix), and the share of the
    devices' room that stays empty because the matrices do not divide.

    Where: `local`, on the device that stores them; `all-to-all A`, pieces become whole matrices over mesh axis A;
    `gather A`, every device of A gets the whole matrix; `split A`, devices along A hold the same pieces and share the
    work; `repeat A`, they all do it; `gather blocks A`, blocks do not end where A cuts, so the axis is gathered first.

    Args:
      params: arrays or shapes (`jax.eval_shape`), with shardings if they lie on a mesh.
      shardings: where the parameters do not tell; as for `muonclip`, as are the other arguments.

    Raises the same errors as `muonclip(...).init`.
    """
    how = {"shardings": shardings, "max_group_bytes": max_group_bytes, "repeat_over": repeat_over}
    plans = plan(params, matrix_specs, ns=ns, **how)
    rows = [tuple(cell(leaf) for cell in _COLUMNS.values()) for leaf in plans]
    sums = {name: sum(getattr(leaf, name) for leaf in plans) for name in ("flops", "bytes", "received")}
    total = LeafPlan("total", "", (), (), (), **sums)
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
    "where": lambda leaf: leaf.where,
    "received": lambda leaf: f"{leaf.received:.3g}" if leaf.where or not leaf.role else "",
    "padding": lambda leaf: f"{1 - leaf.filled / leaf.places:.0%}" if leaf.places else "",
}
_TOTALS = {"path", "NS FLOPs", "bytes", "received"}
