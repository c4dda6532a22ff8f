"""The one shard_map seam: runs a kernel on each device's part of its arrays.

It names no mesh axis: on Explicit axes it reads from the arrays' types how each dimension is cut. Dimensions are the
letters behind an array's name, as everywhere: `q_BTHK` has B, T, H and K. Without a mesh, or with everything on one
device, the kernel is called as it is.
"""

import jax
from jax.sharding import PartitionSpec


def mesh_axes(arrays: dict) -> dict[str, tuple[str, ...]]:
    """{letter: mesh axes} of the dimensions that are cut, from the types of `arrays` {'q_BTHK': array, ...}.

    Raises ValueError where two arrays cut the same dimension differently.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return {}
    found = {}
    for name, x in arrays.items():
        spec = jax.typeof(x).sharding.spec
        for letter, part in zip(dims(name), (*spec, *(None,) * (x.ndim - len(spec))), strict=True):
            axes = () if part is None else part if isinstance(part, tuple) else (part,)
            if found.setdefault(letter, axes) != axes:
                raise ValueError(f"{name} cuts {letter} over {axes}, another array over {found[letter]}")
    return {letter: axes for letter, axes in found.items() if axes}


def dims(name: str) -> str:
    """'BTHK' of 'q_BTHK'."""
    return name.rpartition("_")[2]


def over_mesh(fn, arrays: dict, outs, axes: dict[str, tuple[str, ...]]):
    """fn(**arrays) on each device's part.

    outs: the letters of every result, as a tree of strings like fn's result. axes: how each letter is cut, as
    `mesh_axes` tells; an array that is cut otherwise is brought into that form first. A result that lacks a letter
    must be equal on all devices of its axes: reduce it inside fn.
    """
    if not axes:
        return fn(**arrays)

    def spec(letters):
        return PartitionSpec(*(axes.get(letter) for letter in letters))

    in_specs = {name: spec(dims(name)) for name in arrays}
    arrays = {name: jax.reshard(x, in_specs[name]) for name, x in arrays.items()}
    # check_vma is off because kernels build loop carries from constants, which the check would call unvarying.
    mapped = jax.shard_map(
        lambda arrays: fn(**arrays), in_specs=(in_specs,), out_specs=jax.tree.map(spec, outs), check_vma=False
    )
    return mapped(arrays)


def attend_over_mesh(attend, q_BTHK, k_BSGK, v_BSGV, segment_ids, q_offset, outs):
    """attend(q, k, v, segment_ids=..., q_offset=...) with batch, heads and queries cut as they are.

    Keys and values are gathered along the sequence. outs: as in `over_mesh`; where queries are cut, a result without T
    is a maximum over them and is combined as one. segment_ids: [B, S] or None; q_offset: int or [B].
    Raises ValueError where query heads and key heads are cut differently.
    """
    arrays = {"q_BTHK": q_BTHK, "k_BSGK": k_BSGK, "v_BSGV": v_BSGV}
    axes = mesh_axes(arrays)
    if axes.get("H") != axes.get("G"):
        raise ValueError(
            f"query heads are cut over {axes.get('H')} and key heads over {axes.get('G')}: a device needs whole "
            "groups; let the axes divide the number of key heads"
        )
    queries = axes.get("T")
    axes = {letter: cut for letter, cut in axes.items() if letter in "BTHG"}
    if segment_ids is not None:
        arrays["segment_ids_BS"] = segment_ids
    if not isinstance(q_offset, int):
        arrays["q_offset_B"] = q_offset

    def local(q_BTHK, k_BSGK, v_BSGV, segment_ids_BS=None, q_offset_B=q_offset):
        if queries is not None:
            q_offset_B = q_offset_B + jax.lax.axis_index(queries) * q_BTHK.shape[1]
        attended = attend(q_BTHK, k_BSGK, v_BSGV, segment_ids=segment_ids_BS, q_offset=q_offset_B)
        if queries is None:
            return attended
        return jax.tree.map(lambda letters, x: x if "T" in letters else _highest(x, queries), outs, attended)

    return over_mesh(local, arrays, outs, axes)


def _highest(x, axes):
    return jax.lax.pmax(jax.lax.stop_gradient(x), axes)


def on_shards(fn, arguments: tuple, in_specs: tuple, out_specs, mesh=None):
    """fn(*arguments) on each device's parts of these trees of arrays: for functions that use collectives themselves.

    mesh: the mesh of the PartitionSpecs where none is set (jax.set_mesh).
    """
    mesh = None if not jax.sharding.get_abstract_mesh().empty else mesh
    # check_vma is off because a result that was gathered is equal on all devices, which the check cannot know.
    return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arguments)
