"""Newton-Schulz for all leaves of an update: equal matrices together, each one once in the whole mesh.

On one device that is a batch. On a mesh a device holds pieces of a stack of matrices; one all-to-all turns them into
fewer whole matrices, another one brings the results back. Devices that hold the same pieces share the stack and gather
each other's results. What moves is in the iteration's dtype, after a normalisation in float32. `muon_plan` decides.

Rows of a matrix that several mesh axes cut may arrive in another order: Newton-Schulz gives the rows of its result in
the order of those of its argument, so the way back undoes it. The same holds for columns.
"""

import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, NamedSharding

from k2jax.kernels.partition import on_shards
from k2jax.matrix_specs import LAST_TWO, MatrixSpec, from_matrices, to_matrices
from k2jax.muon_plan import MAX_GROUP_BYTES, Group, Placement, group, place_all
from k2jax.newton_schulz import K2, NS, finish, iterate, prepare


def orthogonalize(
    x: jax.Array, *, ns: NS = K2, spec: MatrixSpec = LAST_TWO, sharding: NamedSharding | None = None
) -> jax.Array:
    """Orthogonalises every matrix of a parameter-shaped array.

    Args:
      x: any floating array with at least the axes that `spec` names.
      ns: coefficients, dtype and form of the iteration.
      spec: which axes form the matrix, and which blocks of it are matrices of their own. The others are batch axes.
      sharding: how `x` lies on a mesh with Auto axes; Explicit axes are read from the type of `x`.

    Returns:
      Array of the same shape, float32, without any scale: singular values near one.

    Raises:
      ValueError: `spec` does not fit the shape of `x`, or `sharding` is needed and not given.
    """
    return orthogonalize_leaves([x], [spec], ns, shardings=None if sharding is None else [sharding])[0]


def orthogonalize_leaves(
    directions: list[jax.Array],
    specs: list[MatrixSpec],
    ns: NS,
    *,
    into: list[jax.Array] | None = None,
    shardings: list[NamedSharding] | None = None,
    max_group_bytes: int = MAX_GROUP_BYTES,
    repeat_over: tuple[str, ...] = (),
    names: list[str] | None = None,
) -> list[jax.Array]:
    """`orthogonalize` for all leaves of one update, each with its own `NS` where its spec names one.

    Args beside those of `orthogonalize`:
      into: arrays like the leaves whose values are not needed any more, such as their gradients; a leaf that goes
        through in chunks leaves its result in the memory of a float32 one.
      shardings: one for each leaf, where mesh axes are Auto.
      max_group_bytes, repeat_over: as in `muon_plan.group`.
      names: of the leaves, for errors.

    Raises:
      ValueError: a spec or a sharding that does not fit its leaf, leaves on two meshes, or Auto axes without
        `shardings`.
    """
    if not directions:
        return []
    settings = [ns if spec.ns is None else spec.ns for spec in specs]
    names = [f"leaf {i}" for i in range(len(specs))] if names is None else names
    shardings = _shardings(directions) if shardings is None else shardings
    placements, shardings, sizes = place_all([x.shape for x in directions], specs, shardings, names)
    groups = group(placements, settings, sizes, max_group_bytes=max_group_bytes, repeat_over=repeat_over)

    spare = _spare(directions, into, groups)

    def local(xs, spare):
        return _local(xs, spare, placements, groups)

    if shardings is None:
        return local(directions, spare)
    layouts = [sharding.spec for sharding in shardings]
    return on_shards(local, (directions, spare), (layouts, {i: layouts[i] for i in spare}), layouts, shardings[0].mesh)


def _spare(directions, into, groups) -> dict[int, jax.Array]:
    """Of `into`, by leaf, what chunks can be written into as it lies."""
    chunked = {member.leaf for found in groups if found.chunks > 1 for member in found.members}
    kinds = {i: (jax.typeof(into[i]), jax.typeof(directions[i])) for i in chunked} if into is not None else {}
    return {
        i: into[i] for i, (spare, x) in kinds.items() if spare.dtype == jnp.float32 and spare.sharding == x.sharding
    }


def _shardings(directions: list[jax.Array]) -> list[NamedSharding | None]:
    """How the leaves lie on Explicit axes, from their types; all None without a mesh, or inside a shard_map.

    Raises ValueError on Auto axes, of which a type tells nothing.
    """
    found = [jax.typeof(x).sharding for x in directions]
    mesh = next((sharding.mesh for sharding in found if not sharding.mesh.empty), found[0].mesh)
    kinds = {kind for kind, size in zip(mesh.axis_types, mesh.axis_sizes, strict=True) if size > 1}
    if AxisType.Auto in kinds:
        raise ValueError(
            f"the mesh {dict(mesh.shape)} has Auto axes, so types do not tell how the matrices lie on it; give "
            "muonclip(shardings=jax.tree.map(lambda x: x.sharding, params)), or make the mesh with "
            "axis_types=(jax.sharding.AxisType.Explicit,) * its number of axes"
        )
    return found if AxisType.Explicit in mesh.axis_types else [None] * len(found)


def _local(xs: list, spare: dict, placements: list[Placement], groups: list[Group]) -> list[jax.Array]:
    """All leaves on one device, which sees its parts of them."""
    stacks = [_stacks(x, placed) for x, placed in zip(xs, placements, strict=True)]
    spare = {i: to_matrices(x, placements[i].spec) for i, x in spare.items() if not placements[i].gathered}
    results = [[matrices.astype(jnp.float32) for matrices in stack] for stack in stacks]  # for stacks of nothing
    for members in groups:
        parts = [stacks[member.leaf][member.stack] for member in members.members]
        first = members.members[0]
        into = spare[first.leaf][first.stack] if len(parts) == 1 and first.leaf in spare else None
        for member, part in zip(members.members, _orthogonalize_group(parts, into, members), strict=True):
            results[member.leaf][member.stack] = part
    leaves = []
    for matrices, placed in zip(results, placements, strict=True):
        x = from_matrices(matrices, placed.shape, placed.spec)
        leaves.append(_own_part(x, placed.gathered, placed.gather_axis))
    return leaves


def _stacks(x: jax.Array, placed: Placement) -> list[jax.Array]:
    """What a device has of a leaf's matrices."""
    if placed.gathered:
        x = lax.all_gather(x, placed.gathered, axis=placed.gather_axis, tiled=True)
    return to_matrices(x, placed.spec)


def _orthogonalize_group(parts: list[jax.Array], into: jax.Array | None, members: Group) -> list[jax.Array]:
    """The stacks of a group, [*batch, fan-in, fan-out] each: concatenated, orthogonalised, taken apart again."""
    stacked = [part.reshape(-1, *part.shape[-2:]) for part in parts]
    if len(parts) == 1:  # may be large, so it is turned chunk by chunk
        into = jnp.zeros(stacked[0].shape, jnp.float32) if into is None else into.reshape(stacked[0].shape)
        return [_in_chunks(stacked[0], into, members, tall=members.members[0].tall).reshape(parts[0].shape)]
    talls = [member.tall for member in members.members]
    together = jnp.concatenate([_turned(x, tall) for x, tall in zip(stacked, talls, strict=True)])
    ends = list(itertools.accumulate(member.count for member in members.members))
    into = jnp.zeros(together.shape, jnp.float32)
    results = jnp.split(_in_chunks(together, into, members, tall=False), ends[:-1])
    return [_turned(result, tall).reshape(part.shape) for result, tall, part in zip(results, talls, parts, strict=True)]


def _turned(x: jax.Array, tall: bool) -> jax.Array:
    return jnp.swapaxes(x, -1, -2) if tall else x


def _in_chunks(x: jax.Array, into: jax.Array, members: Group, tall: bool) -> jax.Array:
    """A stack of pieces, so many at a time that the whole matrices of a pass stay within the group's bytes.

    The chunks together overwrite all of `into`.
    """
    count = len(x)
    if members.chunks == 1:
        padded = jnp.pad(x, ((0, members.stack - count), (0, 0), (0, 0))) if members.stack > count else x
        return _turned(_once_in_the_mesh(_turned(padded, tall), members), tall)[:count]

    def one(i, out):
        # The last chunk starts earlier instead of being padded, which would copy the leaf; it repeats a few matrices.
        start = jnp.minimum(i * members.stack, count - members.stack)
        chunk = lax.dynamic_slice_in_dim(x, start, members.stack)
        result = _turned(_once_in_the_mesh(_turned(chunk, tall), members), tall)
        # A TPU would rather lay all of the results out transposed than turn each chunk: two more copies of the leaf.
        result = with_layout_constraint(result, Layout(major_to_minor=(0, 1, 2)))
        return lax.dynamic_update_slice_in_dim(out, result, start, axis=0)

    return lax.fori_loop(0, members.chunks, one, into)


def _once_in_the_mesh(x: jax.Array, members: Group) -> jax.Array:
    """Pieces [stack, n, m] of matrices to the same pieces of the orthogonal ones, float32."""
    shared, moved, gathered = _axes_by_use(members)
    x = _own_part(x, shared, axis=0)
    x = prepare(x, members.ns, over=members.rows + members.columns)
    for side, axes in moved:
        x = lax.all_to_all(x, axes, split_axis=0, concat_axis=side, tiled=True)
    for side, axes in gathered:
        x = lax.all_gather(x, axes, axis=side, tiled=True)
    x = iterate(x, members.ns)
    for side, axes in reversed(gathered):
        x = _own_part(x, axes, axis=side)
    for side, axes in reversed(moved):
        x = lax.all_to_all(x, axes, split_axis=side, concat_axis=0, tiled=True)
    x = lax.all_gather(x, shared, axis=0, tiled=True) if shared else x
    return finish(x, members.ns)


def _axes_by_use(members: Group):
    """Mesh axes that share a stack; then, with the side of the matrix that they cut, those moved and those gathered."""
    shared = tuple(axis for axis in members.repeated if axis in members.split)
    sides = [(1, members.rows), (2, members.columns)]
    moved = [(side, tuple(axis for axis in axes if axis in members.split)) for side, axes in sides]
    gathered = [(side, tuple(axis for axis in axes if axis not in members.split)) for side, axes in sides]
    return shared, *([use for use in uses if use[1]] for uses in (moved, gathered))


def _own_part(x: jax.Array, axes: tuple[str, ...], axis: int) -> jax.Array:
    """The part of x along `axis` that belongs to this device's place on these mesh axes."""
    if not axes:
        return x
    size = x.shape[axis] // lax.axis_size(axes)
    return lax.dynamic_slice_in_dim(x, lax.axis_index(axes) * size, size, axis)
