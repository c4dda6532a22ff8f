"""The only file that names the project's mesh axes: the mesh, and the rules from logical names to axes.

Axes are Explicit: an array's type carries its sharding, and an operation whose result is ambiguous raises
instead of guessing. An axis of size 1 appears in no type, so one device and many run the same code.

    slice   whole TPU slices, or hosts without a fast link: the batch alone crosses it
    data    the batch
    fsdp    the batch, and the storage of weights and optimizer state: a layer gathers its weights before use
    expert  the batch, and the experts
    seq     the tokens of a sequence; attention gathers keys and values
    tensor  heads, hidden units and the vocabulary
"""

import math

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from k2jax.config.run import BATCH_AXES

AXES = ("slice", "data", "fsdp", "expert", "seq", "tensor")

# Logical dimension -> mesh axes, the slowest first.
RULES = {
    "batch": BATCH_AXES,
    "length": ("seq",),
    "experts": ("expert",),
    "heads": ("tensor",),
    "hidden": ("tensor",),
    "vocab": ("tensor",),
    "stored": ("fsdp",),  # the dimension of a weight that is cut for storage alone
    "features": ("tensor", "fsdp"),  # of the embedding, whose rows must stay whole to be looked up
}

_MLP = {"w_gate": ("stored", "hidden"), "w_up": ("stored", "hidden"), "w_down": ("hidden", "stored")}

# Dimensions of every weight that is cut, by the last two names of its path; axes in front (layers) are whole.
WEIGHTS = {
    "embed/w": (None, "features"),
    "head/w": ("stored", "vocab"),
    "attn/wq": ("stored", "heads", None),
    "attn/wq_a": ("stored", None),
    "attn/wq_b": ("stored", "heads", None),
    "attn/wk": ("stored", "heads", None),
    "attn/wv": ("stored", "heads", None),
    "attn/wkv_a": ("stored", None),
    "attn/wkv_b": ("stored", "heads", None),
    "attn/wo": ("heads", None, "stored"),
    "router/w": ("stored", None),
    **{f"{mlp}/{name}": dims for mlp in ("mlp", "shared") for name, dims in _MLP.items()},
    **{f"experts/{name}": ("experts", *dims) for name, dims in _MLP.items()},
}

# Axes over which weights are equal and whose links are slow: work that all of them repeat is not worth sharing.
SLOW = ("slice",)

# What a gathered weight is called among the values that a backward pass may keep: it must not.
GATHERED = "gathered_weight"


def make_mesh(sizes: dict[str, int]) -> jax.sharding.Mesh:
    """A mesh of the given axis sizes over the first devices; `slice` > 1 puts every TPU slice on one index.

    Raises ValueError for an axis that does not exist, where there are fewer devices than the sizes ask for, and where
    the devices do not fall into that many slices.
    """
    if unknown := sizes.keys() - set(AXES):
        raise ValueError(f"mesh.{min(unknown)}={sizes[min(unknown)]}: no such axis; use {', '.join(AXES)}")
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    wanted, present = math.prod(shape), jax.device_count()
    if wanted > present:
        asked = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, shape, strict=True) if size > 1)
        raise ValueError(f"{asked} asks for {wanted} devices but there are {present}: lower it")
    devices = jax.devices()[:wanted]
    slices = {getattr(d, "slice_index", None) for d in devices}
    if shape[0] > 1 and slices != {None}:
        if len(slices) != shape[0]:
            raise ValueError(f"mesh.slice={shape[0]}: the devices form {len(slices)} slices; set it to {len(slices)}")
        within, across = (1, *shape[1:]), (shape[0], *(1,) * (len(AXES) - 1))
        grid = mesh_utils.create_hybrid_device_mesh(within, across, devices)
    elif devices[0].platform == "tpu":
        grid = mesh_utils.create_device_mesh(shape, devices)
    else:
        grid = np.array(devices).reshape(shape)
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def line_of_devices() -> jax.sharding.Mesh:
    """All devices along the axis that cuts the batch: for measurements of the links between them."""
    return make_mesh({"data": jax.device_count()})


def abstract_mesh(sizes: dict[str, int]) -> jax.sharding.AbstractMesh:
    """The same mesh without devices, for shapes alone: of any size on any machine."""
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    return jax.sharding.AbstractMesh(shape, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def spec(mesh, *names: str | None) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions have these logical names (None: whole).

    Raises KeyError for a name without a rule.
    """

    def axes(name):
        found = tuple(axis for axis in RULES[name] if mesh.shape[axis] > 1) if name else ()
        return found if len(found) > 1 else found[0] if found else None

    return PartitionSpec(*map(axes, names))


def named(mesh: jax.sharding.Mesh, *names: str | None) -> NamedSharding:
    """`spec` on a concrete mesh, for arrays that come from the host."""
    return NamedSharding(mesh, spec(mesh, *names))


def shard_params(params):
    """Fresh parameters, or any tree with their paths, laid out over the mesh that is set; without one, unchanged."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return params

    def place(path, leaf):
        name = "/".join(str(key.key) for key in path[-2:])
        dims = WEIGHTS.get(name, ())
        whole = (None,) * (leaf.ndim - len(dims))
        return jax.reshard(leaf, spec(mesh, *whole, *dims))

    return jax.tree_util.tree_map_with_path(place, params)


def on_mesh(shape: jax.ShapeDtypeStruct, mesh: jax.sharding.Mesh) -> jax.ShapeDtypeStruct:
    """A shape that was evaluated under `mesh`, with the concrete sharding that its type names, if any."""
    spec = PartitionSpec() if shape.sharding is None else shape.sharding.spec
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=NamedSharding(mesh, spec))


def layout(x) -> PartitionSpec | None:
    """How x lies on the mesh, to be given as an `out_sharding`; None where no mesh is set."""
    return None if jax.sharding.get_abstract_mesh().empty else jax.typeof(x).sharding.spec


def num_shards(x, axis: int) -> int:
    """Into how many parts this axis of x is cut."""
    if layout(x) is None:
        return 1
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[name] for name in _axes(layout(x)[axis]))


def whole(x, *axes: int):
    """x with these axes gathered on every device; all of them by default."""
    if layout(x) is None:
        return x
    axes = {axis % x.ndim for axis in axes or range(x.ndim)}
    return jax.reshard(x, PartitionSpec(*(None if i in axes else part for i, part in enumerate(layout(x)))))


def like(x, y):
    """x laid out as y is, over the dimensions that both have."""
    if layout(x) is None:
        return x
    rank = min(x.ndim, y.ndim)
    return jax.reshard(x, PartitionSpec(*layout(y)[:rank], *(None,) * (x.ndim - rank)))


def weight(w, dtype):
    """A weight as a layer uses it: cast, then gathered over the axes that cut it for storage alone."""
    w = w.astype(dtype)
    if layout(w) is None or not any(set(_axes(part)) & set(RULES["stored"]) for part in layout(w)):
        return w
    kept = (tuple(axis for axis in _axes(part) if axis not in RULES["stored"]) for part in layout(w))
    spec = PartitionSpec(*(axes if len(axes) > 1 else axes[0] if axes else None for axes in kept))
    return checkpoint_name(jax.reshard(w, spec), GATHERED)


def stores_in_parts() -> bool:
    """Whether the mesh cuts weights for storage, so that `weight` gathers."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and any(mesh.shape[axis] > 1 for axis in RULES["stored"])


def _axes(part) -> tuple[str, ...]:
    return () if part is None else part if isinstance(part, tuple) else (part,)
