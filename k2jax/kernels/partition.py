"""The one shard_map seam: runs a kernel on each device's part of its arrays.

It names no mesh axis: on Explicit axes it reads from the arrays' types how each dimension is cut. Dimensions are the
letters behind an array's name, as everywhere: `q_BTHK` has B, T, H and K. Without a mesh, or with everything on one
device, the kernel is called as it is.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
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


def num_cuts(q_BTHK) -> int:
    """How many devices share the queries of a sequence."""
    axes = mesh_axes({"q_BTHK": q_BTHK}).get("T", ())
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes)


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


def attend_over_mesh(attend, q_BTHK, k_BSGK, v_BSGV, segment_ids, q_offset, outs, balance_from=None):
    """attend(q, k, v, segment_ids=..., q_offset=...) with batch, heads and queries cut as they are.

    Keys and values are gathered along the sequence. outs: as in `over_mesh`; where queries are cut, a result without T
    is a maximum over them and is combined as one. segment_ids: [B, S] or None; q_offset: int or [B].
    balance_from: for an attend that skips the future; where every device holds at least that many queries of a cut
    sequence it computes an early and a late half, which the devices exchange. None: as they lie.
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
        def of_queries(q_BTHK, first):
            return attend(q_BTHK, k_BSGK, v_BSGV, segment_ids=segment_ids_BS, q_offset=q_offset_B + first)

        if queries is None:
            return of_queries(q_BTHK, 0)
        T = q_BTHK.shape[1]
        if balance_from is not None and balance_from <= T and T % 2 == 0:
            attended = _early_and_late(of_queries, q_BTHK, queries, outs)
        else:
            attended = of_queries(q_BTHK, lax.axis_index(queries) * T)
        return jax.tree.map(lambda letters, x: x if "T" in letters else _highest(x, queries), outs, attended)

    return over_mesh(local, arrays, outs, axes)


def _highest(x, axes):
    return lax.pmax(lax.stop_gradient(x), axes)


def _early_and_late(of_queries, q_BTHK, axes, outs):
    """of_queries(q, first) of the two halves of every device's queries, each computed by another device.

    Of n devices, half c of all 2n is computed by device c, or by 2n - 1 - c if there is none: the work of a half grows
    with c, so every device has the same. Device i holds halves 2i and 2i + 1, so the even ones go to n different
    devices, and so do the odd ones: two permutations, and two back.
    """
    n, here, rows = lax.axis_size(axes), lax.axis_index(axes), q_BTHK.shape[1] // 2

    def send(x, odd, back=False):
        halves = [(i, 2 * i + odd) for i in range(n)]
        pairs = [(i, min(c, 2 * n - 1 - c)) for i, c in halves]
        return lax.ppermute(x, axes, [pair[::-1] for pair in pairs] if back else pairs)

    def half(odd):
        q_half_BTHK = send(lax.slice_in_dim(q_BTHK, odd * rows, (odd + 1) * rows, axis=1), odd)
        number = jnp.where(here % 2 == odd, here, 2 * n - 1 - here)
        attended = of_queries(q_half_BTHK, number * rows)
        return jax.tree.map(lambda letters, x: send(x, odd, back=True) if "T" in letters else x, outs, attended)

    def join(letters, even, odd):
        if "T" in letters:
            return lax.concatenate([even, odd], letters.index("T"))
        return jnp.maximum(even, odd)

    return jax.tree.map(join, outs, half(0), half(1))


def on_shards(fn, arguments: tuple, in_specs: tuple, out_specs, mesh=None):
    """fn(*arguments) on each device's parts of these trees of arrays: for functions that use collectives themselves.

    mesh: the mesh of the PartitionSpecs where none is set (jax.set_mesh).
    """
    mesh = None if not jax.sharding.get_abstract_mesh().empty else mesh
    # check_vma is off because a result that was gathered is equal on all devices, which the check cannot know.
    return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arguments)
