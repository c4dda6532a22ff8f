"""Where every matrix of the optimizer is orthogonalised: how leaves lie on the mesh, groups, and what has to move.

All of it follows from shapes and shardings, so `describe` tells before a step what `muon_groups` does in it.

Legend: n short and m long side of a whole matrix.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from k2jax.matrix_specs import MatrixSpec, Stack, cut_axis, matrix_axes, stacks
from k2jax.newton_schulz import NS

MAX_GROUP_BYTES = 2**29
_ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}


class Placement(NamedTuple):
    """How one device sees a leaf.

    shape, spec: of its part, after the gather. gathered: mesh axes over which `gather_axis` is gathered first.
    cut_in, cut_out: mesh axes that cut fan-in and fan-out of the matrices. cut: all mesh axes that cut the part.
    """

    shape: tuple[int, ...]
    spec: MatrixSpec
    gather_axis: int
    gathered: tuple[str, ...]
    cut_in: tuple[str, ...]
    cut_out: tuple[str, ...]
    cut: frozenset[str]

    def parts(self) -> list[Stack]:
        """The stacks of matrices, or of pieces of them, that one device has."""
        return stacks(self.shape, self.spec)


class Member(NamedTuple):
    """One stack of one leaf in a group: so many matrices; tall if fan-in is its long side."""

    leaf: int
    stack: int
    count: int
    tall: bool


@dataclasses.dataclass(frozen=True)
class Group:
    """Equal matrices that are orthogonalised together.

    rows, columns: mesh axes that cut n and m. repeated: mesh axes that cut nothing of these leaves.
    split: those of all three that divide the stack among devices. Of the rest, `rows` and `columns` are gathered and
    `repeated` ones repeat the work. chunks: passes over the stack, of `per_chunk` matrices a device.
    sizes: of the mesh axes.
    """

    n: int
    m: int
    ns: NS
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    repeated: tuple[str, ...]
    members: tuple[Member, ...]
    split: tuple[str, ...]
    chunks: int
    per_chunk: int
    sizes: Mapping[str, int]

    @property
    def count(self) -> int:
        """Matrices of which a device has pieces."""
        return sum(member.count for member in self.members)

    @property
    def stack(self) -> int:
        """Places of one pass: matrices, and padding where there are too few."""
        return self.per_chunk * self.ways(self.split)

    @property
    def padding(self) -> float:
        """Share of the devices' places that hold no matrix of their own."""
        return 1 - self.count / (self.chunks * self.stack)

    @property
    def bytes(self) -> int:
        """What a device receives, without the norms (8 bytes a matrix and mesh axis)."""
        moved = _moved(self.stack, self.rows, self.columns, self.repeated, self.split, self.sizes)
        piece = self.n * self.m // self.ways(self.rows + self.columns)
        return round(self.chunks * moved * piece * _ITEMSIZE[self.ns.dtype])

    def ways(self, axes: Iterable[str]) -> int:
        """Into how many parts these mesh axes cut."""
        return ways(axes, self.sizes)

    def where(self) -> str:
        """In words: 'local', or what moves over which mesh axes."""
        cut = self.rows + self.columns
        kinds = {
            "all-to-all": [axis for axis in cut if axis in self.split],
            "gather": [axis for axis in cut if axis not in self.split],
            "split": [axis for axis in self.repeated if axis in self.split],
            "repeat": [axis for axis in self.repeated if axis not in self.split],
        }
        return " + ".join(f"{kind} {','.join(axes)}" for kind, axes in kinds.items() if axes) or "local"


def ways(axes: Iterable[str], sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[axis] for axis in axes)


def cuts(partition: Iterable[Any], ndim: int) -> tuple[tuple[str, ...], ...]:
    """The mesh axes of every dimension, of a PartitionSpec."""
    parts = [() if part is None else part if isinstance(part, tuple) else (part,) for part in partition]
    return (*parts, *((),) * (ndim - len(parts)))


def on_one_mesh(shardings: list, names: list[str]) -> list[NamedSharding] | None:
    """The shardings of leaves as they lie on one mesh; None where no leaf lies on any.

    A leaf without a sharding, or on one device, is whole on every device of the others' mesh.
    Raises ValueError for another kind of sharding and for two meshes; it names the leaves.
    """
    found: dict[str, NamedSharding] = {}
    for name, sharding in zip(names, shardings, strict=True):
        if isinstance(sharding, NamedSharding):
            if not sharding.mesh.empty:
                found[name] = sharding
        elif sharding is not None and not isinstance(sharding, SingleDeviceSharding):
            raise ValueError(f"the sharding of {name!r} is {sharding!r}; give a NamedSharding, such as its x.sharding")
    if not found:
        return None
    first = next(iter(found))
    mesh = found[first].mesh
    for name, sharding in found.items():
        if sharding.mesh.shape_tuple != mesh.shape_tuple:
            raise ValueError(
                f"{first!r} lies on a mesh of {dict(mesh.shape)} and {name!r} on one of {dict(sharding.mesh.shape)}: "
                "put all parameters on one mesh"
            )
    return [found.get(name, NamedSharding(mesh, PartitionSpec())) for name in names]


def place(
    shape: tuple[int, ...], spec: MatrixSpec, cut: tuple[tuple[str, ...], ...], sizes: Mapping[str, int]
) -> Placement:
    """How one device sees a leaf of this whole shape; `cut` as of `cuts`.

    Blocks on an axis that is cut stay there if they are equal and each device has whole ones. Else that axis is
    gathered: devices would hold different parts of different matrices.
    Raises ValueError for a spec that does not fit, and where mesh axes do not divide an axis that they cut.
    """
    for axis, axes in enumerate(cut):
        if shape[axis] % ways(axes, sizes):
            raise ValueError(f"mesh axes {axes} do not divide axis {axis} of shape {shape} into {ways(axes, sizes)}")
    _, reduction, output = matrix_axes(shape, spec)
    stacks(shape, spec)  # raises for a spec that does not fit
    cut, axis, gathered, of_blocks = list(cut), cut_axis(shape, spec), (), ()
    if spec.blocks is not None and (parts := ways(cut[axis], sizes)) > 1:
        if len(set(spec.blocks)) == 1 and len(spec.blocks) % parts == 0:
            spec = dataclasses.replace(spec, blocks=spec.blocks[: len(spec.blocks) // parts])
            of_blocks = cut[axis]
        else:
            cut[axis], gathered = (), cut[axis]
    local = tuple(size // ways(axes, sizes) for size, axes in zip(shape, cut, strict=True))
    of_matrix = [() if i == axis and of_blocks else axes for i, axes in enumerate(cut)]
    merged = [tuple(name for i in axes for name in of_matrix[i] if sizes[name] > 1) for axes in (reduction, output)]
    return Placement(local, spec, axis, gathered, *merged, frozenset(itertools.chain(*cut)))


def place_all(
    shapes: list[tuple[int, ...]], specs: list[MatrixSpec], shardings: list, names: list[str]
) -> tuple[list[Placement], list[NamedSharding] | None, dict[str, int]]:
    """(placements, shardings on their one mesh or None, sizes of its axes) of leaves that lie as `shardings` say.

    Raises ValueError as `on_one_mesh` and `place` do, with the leaf's name.
    """
    shardings = on_one_mesh(shardings, names)
    sizes = {} if shardings is None else dict(shardings[0].mesh.shape)
    placements = []
    for i, (shape, spec) in enumerate(zip(shapes, specs, strict=True)):
        try:
            placements.append(place(shape, spec, cuts(shardings[i].spec if shardings else (), len(shape)), sizes))
        except ValueError as error:
            raise ValueError(f"{names[i]!r}: {error}") from error
    return placements, shardings, sizes


def group(
    placements: list[Placement],
    settings: list[NS],
    sizes: Mapping[str, int],
    *,
    max_group_bytes: int = MAX_GROUP_BYTES,
    repeat_over: tuple[str, ...] = (),
) -> list[Group]:
    """The groups of all leaves, settings[i] being those of leaf i.

    A group's concatenated stack takes at most `max_group_bytes` on a device unless it is one leaf's alone, and in one
    pass a device works on whole matrices of as many bytes (at least one), both in float32. `repeat_over`: mesh axes too
    slow to divide work over; devices along them repeat it instead.
    """
    if isinstance(repeat_over, str):
        raise ValueError(f"repeat_over={repeat_over!r} is a string: give a tuple of mesh axes, ({repeat_over!r},)")
    if max_group_bytes < 1:
        raise ValueError(f"max_group_bytes={max_group_bytes}: must be positive")
    if sizes and (unknown := [axis for axis in repeat_over if axis not in sizes]):
        raise ValueError(f"repeat_over names {unknown[0]!r}, which is no axis of the mesh; it has {', '.join(sizes)}")
    found: dict[Any, list[list[Member]]] = {}
    for leaf, (placed, ns) in enumerate(zip(placements, settings, strict=True)):
        for i, part in enumerate(placed.parts()):
            if not part.matrices * part.fan_in * part.fan_out:
                continue  # a stack of nothing
            fan_in, fan_out = part.fan_in * ways(placed.cut_in, sizes), part.fan_out * ways(placed.cut_out, sizes)
            tall = fan_in > fan_out
            sides = ((fan_out, placed.cut_out), (fan_in, placed.cut_in))
            (n, rows), (m, columns) = sides if tall else reversed(sides)
            repeated = tuple(axis for axis, size in sizes.items() if size > 1 and axis not in placed.cut)
            lists = found.setdefault((n, m, ns, rows, columns, repeated), [[]])
            piece_bytes = 4 * part.fan_in * part.fan_out
            if lists[-1] and piece_bytes * (part.matrices + sum(x.count for x in lists[-1])) > max_group_bytes:
                lists.append([])
            lists[-1].append(Member(leaf, i, part.matrices, tall))
    return [
        _divide(key, members, sizes, max_group_bytes, repeat_over) for key, lists in found.items() for members in lists
    ]


def _divide(key, members, sizes, max_group_bytes, repeat_over) -> Group:
    """The group of these members, with the choice of what divides its stack.

    Of all sets of axes: least matrices a device, then least bytes, then least padding. One matrix that four devices
    hold is so gathered by all: sending it to one and back would take twice the bytes and no less time.
    """
    n, m, ns, rows, columns, repeated = key
    count = sum(member.count for member in members)
    candidates = [axis for axis in rows + columns + repeated if axis not in repeat_over or axis not in repeated]

    def cost(split):
        per_device = -(-count // ways(split, sizes))
        places = per_device * ways(split, sizes)
        return per_device, _moved(places, rows, columns, repeated, split, sizes), places

    subsets = itertools.chain.from_iterable(itertools.combinations(candidates, k) for k in range(len(candidates) + 1))
    split = min(subsets, key=cost)
    most = max(1, max_group_bytes // (4 * n * m))
    per_device = -(-count // ways(split, sizes))
    chunks = -(-per_device // most)
    per_chunk = -(-per_device // chunks)
    return Group(n, m, ns, rows, columns, repeated, tuple(members), split, chunks, per_chunk, sizes)


def _moved(places, rows, columns, repeated, split, sizes) -> float:
    """How many pieces of matrices a device receives for a stack with so many places."""
    results = ways([axis for axis in repeated if axis in split], sizes)
    mine = places / results
    moved = places - mine
    for side in (rows, columns):
        moved += 2 * mine * (1 - 1 / ways([axis for axis in side if axis in split], sizes))
    return moved + mine * (ways([axis for axis in rows + columns if axis not in split], sizes) - 1)
