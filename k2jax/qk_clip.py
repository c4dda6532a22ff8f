"""QK-Clip: query and key weights of a head whose largest logit passed tau are scaled down after the update.

Source: Kimi K2, arXiv 2507.20534, Algorithm 1, lines 8 to 17.

Legend: G key heads, R query heads per key head, H = G*R query heads, K head size. Paths are written 'moe/attn/wq_b'.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from k2jax.leaf_roles import closest, named_leaves

PyTree = Any
NO_GAIN = "no gain"
"""`MHAClip.q_norm` or `.k_norm` of a model that normalises there without a gain: there is nothing to clip."""


@dataclasses.dataclass(frozen=True)
class Heads:
    """Where a leaf holds heads, for layouts other than [..., fan-in, heads, size] and biases [..., heads, size].

    A fused `wqkv [D, (H + 2 G) * K]`: queries are `Heads('wqkv', axis=-1, size=K, places=range(H))`, keys
    `Heads('wqkv', axis=-1, size=K, places=range(H, H + G))`. Keys interleaved with their R queries and the value,
    `wqkv [D, G, R + 2, K]`: `Heads('wqkv', axis=(-3, -2), places=range(R, G * (R + 2), R + 2))`. A kernel in torch's
    order, `[H * K, D]`: `Heads('wq', axis=-2, size=K)`.

    Args:
      path: path of the leaf.
      axis: the axis that counts heads, or neighbouring axes that count them together; from the end.
      size: numbers of one head side by side on that axis; None where the axis counts heads only. (`MLAClip` then
        takes the last axis for the head's own.)
      places: which heads of the axis these are, in the order of `max_logits`; None for all.
      layers: how many leading axes count layers, as those of `max_logits` do.
    """

    path: str
    axis: int | tuple[int, ...] = -2
    size: int | None = None
    places: range | tuple[int, ...] | None = None
    layers: int = 0


@dataclasses.dataclass(frozen=True)
class MLAClip:
    """Multi-head latent attention: the leaves of the heads that one entry of `max_logits` describes.

    Args:
      q: the query projection, [..., fan-in, H, nope + rope] (`wq_b`, or `wq` without q-LoRA): its path, or `Heads`.
      kv: the key-value up-projection, [..., fan-in, H, nope + value]: its path, or `Heads`.
      nope: size of the part of a head without rotary embedding, which comes first in both leaves.
    """

    q: str | Heads
    kv: str | Heads
    nope: int


@dataclasses.dataclass(frozen=True)
class MHAClip:
    """Multi-head or grouped-query attention: which leaves hold the heads.

    Args:
      q: the query projection, [..., fan-in, H, K]: its path, or `Heads`.
      k: the key projection, [..., fan-in, G, K] with H a multiple of G: its path, or `Heads`.
      q_bias: the query bias, [..., H, K], if there is one.
      k_bias: the key bias, [..., G, K], if there is one.
      q_norm: the gain [..., H, K] of a norm behind the query projection, if there is one. It is scaled in place of the
        projection, whose scale a norm undoes. One gain for all heads cannot clip one head: an error, as is NO_GAIN.
      k_norm: the gain [..., G, K] of a norm behind the key projection, if there is one.
      max_growth: the most by which one clip may enlarge the query of a head that shares its key with a clipped one,
        to keep that head's logits. Where it would take more, the key is scaled less and the clipped query more, with
        the same logits; 1 scales queries only, unless all heads of a group are clipped.

    Raises:
      ValueError: `max_growth` below one, or a norm without gain.
    """

    q: str | Heads
    k: str | Heads
    q_bias: str | Heads | None = None
    k_bias: str | Heads | None = None
    q_norm: str | Heads | None = None
    k_norm: str | Heads | None = None
    max_growth: float = 2.0

    def __post_init__(self):
        if not self.max_growth >= 1:
            raise ValueError(f"MHAClip.max_growth must be at least 1, got {self.max_growth}")
        if NO_GAIN in (self.q_norm, self.k_norm):
            raise ValueError(
                "MHAClip: a norm without gain behind the query or key projection undoes every scale of the weights, so "
                "the clip would do nothing; it bounds the logits itself. Leave this attention out of QKClip.specs"
            )


@dataclasses.dataclass(frozen=True)
class QKClip:
    """QK-Clip settings: one spec per entry of the `max_logits` tree, named by its path in that tree.

    Raises:
      ValueError: `tau` is not positive, or there is no spec.
    """

    specs: Mapping[str, MLAClip | MHAClip]
    tau: float = 100.0

    def __post_init__(self):
        if not self.tau > 0:
            raise ValueError(f"QKClip.tau must be positive, got {self.tau}; Kimi K2 uses 100")
        if not self.specs:
            raise ValueError("QKClip.specs is empty; name the attention weights, or pass qk_clip=None")


class QKClipState(NamedTuple):
    """What the last step clipped: scalars on the device, which a training loop reads when it likes.

    clipped_fraction, min_gamma: float32, the share of all heads and the smallest factor gamma.
    worst_entry, worst_layer, worst_head: int32, where that factor was: the entry by its place in `QKClip.specs`, the
    layer 0 for an entry [H]. All -1 if no head was clipped.
    """

    clipped_fraction: jax.Array
    min_gamma: jax.Array
    worst_entry: jax.Array
    worst_layer: jax.Array
    worst_head: jax.Array


def qk_clip(specs: Mapping[str, MLAClip | MHAClip], tau: float = 100.0) -> optax.GradientTransformationExtraArgs:
    """QK-Clip as a transformation: the last one of a chain, after learning rate and decay.

    Changes the updates `u` of the named query and key weights to `clip(p + u) - p`, so that a head whose max
    logit was S > tau would have had tau. Heads at or below tau, or with a non-finite S, keep their logits, and
    their weights bit for bit where no head that shares their key is clipped. Values, output weights and the
    shared rotary key are never touched; momentum is not rescaled.

    Args:
      specs: one `MLAClip` or `MHAClip` per entry of the `max_logits` tree, named by its path in that tree.
      tau: the largest max logit that a head may have; 100 in Kimi K2.

    Its `update` takes `max_logits=tree`: leaves [H], or [L, H] for weights with a leading layer axis,
    float32, signed, after the softmax scale, before softmax, maximum over the batch and all micro-batches.

    Raises:
      ValueError: an unknown path, sizes that do not match, a norm of queries or keys that no spec names, or a missing
        or unknown entry of `max_logits`.

    Source: arXiv 2507.20534, Algorithm 1, lines 8 to 17. Grouped queries share a key: its scale is the square
    root of the group's smallest gamma, and each query takes what is left to its own gamma (see `MHAClip.max_growth`).
    """
    return clip_transformation(QKClip(specs, tau))


def clip_transformation(config: QKClip) -> optax.GradientTransformationExtraArgs:
    """`qk_clip` from its settings."""

    def init(params):
        _check(config, named_leaves(params))
        nowhere = (jnp.full([], -1, jnp.int32) for _ in range(3))  # three arrays: a buffer cannot be donated twice
        return QKClipState(jnp.zeros([], jnp.float32), jnp.ones([], jnp.float32), *nowhere)

    def update(updates, state, params=None, *, max_logits=None, **extra_args):
        del state, extra_args
        if params is None:
            raise ValueError("QK-Clip scales weights: call tx.update(grads, state, params, max_logits=...)")
        weights = named_leaves(params)
        gammas = _gammas(config, _check(config, weights), max_logits)
        factors = {}
        for key, spec in config.specs.items():
            by_field = _factors(spec, gammas[key], weights)
            for field, place in _places(spec, weights).items():
                if field in by_field:
                    # Parts of a fused leaf are scaled by one product: each factor is 1 on the parts of the others.
                    path = place.heads.path
                    factors[path] = factors.get(path, 1.0) * _on_leaf(place, by_field[field])
        leaves, treedef = jax.tree.flatten(updates)
        clipped = [
            _clip(u, weights[path], factors[path]) if path in factors else u
            for path, u in zip(weights, leaves, strict=True)
        ]
        return treedef.unflatten(clipped), _statistics(list(gammas.values()))

    return optax.GradientTransformationExtraArgs(init, update)


def _clip(update: jax.Array, param: jax.Array, factor: jax.Array) -> jax.Array:
    param = param.astype(jnp.float32)
    clipped = ((param + update) * factor - param).astype(update.dtype)
    return jnp.where(factor == 1, update, clipped)  # p + u - p would round


def _gammas(config: QKClip, shapes: dict[str, tuple], max_logits: PyTree) -> dict[str, jax.Array]:
    """Factor on each head's logits, [..., H]: min(1, tau / S), and 1 where S is not a finite number."""
    fix = "pass max_logits={...} to tx.update with one array per entry of QKClip.specs"
    given = {} if max_logits is None else named_leaves(max_logits)
    gammas = {}
    for key, shape in shapes.items():
        if key not in given:
            raise ValueError(f"max_logits has no {key!r} (it has {sorted(given)}); {fix}")
        logits = given[key]
        if jnp.shape(logits) != shape:
            raise ValueError(f"max_logits[{key!r}] has shape {jnp.shape(logits)}, but its weights need {shape}")
        logits = lax.stop_gradient(jnp.asarray(logits, jnp.float32))
        above = jnp.isfinite(logits) & (logits > config.tau)
        gammas[key] = jnp.where(above, config.tau / jnp.where(above, logits, 1.0), 1.0)
    unknown = sorted(set(given) - set(shapes))
    if unknown:
        raise ValueError(f"max_logits has {unknown[0]!r}, which QKClip.specs does not name; add a spec for it")
    return gammas


def _statistics(gammas: list[jax.Array]) -> QKClipState:
    """Numbers of one step, for entries [..., H] in the order of the specs."""
    everything = jnp.concatenate([gamma.ravel() for gamma in gammas])
    worst = jnp.argmin(everything)
    # Which entry, layer and head every place of the concatenation is: known when the step is compiled.
    where = np.concatenate(
        [
            np.stack(np.broadcast_arrays(entry, *np.divmod(np.arange(gamma.size), gamma.shape[-1])))
            for entry, gamma in enumerate(gammas)
        ],
        axis=1,
    ).astype(np.int32)
    entry, layer, head = jnp.where(everything[worst] < 1, jnp.asarray(where)[:, worst], -1)
    return QKClipState(jnp.mean(everything < 1, dtype=jnp.float32), jnp.min(everything), entry, layer, head)


# --- what multiplies which weight --------------------------------------------------------------------------


def _factors(spec: MLAClip | MHAClip, gamma: jax.Array, weights: dict[str, Any]) -> dict[str, jax.Array]:
    """What multiplies the weights of each field of a spec: [..., heads, 1], or [..., heads, size] within heads."""
    if isinstance(spec, MLAClip):
        # The rotary key is shared by all heads, so the rotary query takes the whole factor.
        places = _places(spec, weights)
        in_nope_q, in_nope_kv = (np.arange(places[field].head_size) < spec.nope for field in ("q", "kv"))
        root, gamma = jnp.sqrt(gamma)[..., None], gamma[..., None]
        return {"q": jnp.where(in_nope_q, root, gamma), "kv": jnp.where(in_nope_kv, root, 1.0)}
    key_heads = _places(spec, weights)["k"].count
    grouped = gamma.reshape(*gamma.shape[:-1], key_heads, -1)
    # Each query keeps gamma / k of its size. The root of the smallest gamma shares the clip of the worst head evenly
    # between query and key; the second bound keeps the largest gamma / k at max_growth.
    lowest, highest = (f(grouped, axis=-1, keepdims=True) for f in (jnp.min, jnp.max))
    k = jnp.maximum(jnp.sqrt(lowest), highest / spec.max_growth)
    q = (grouped / k).reshape(gamma.shape)[..., None]
    of_q = ("q_norm",) if spec.q_norm else ("q", "q_bias")
    of_k = ("k_norm",) if spec.k_norm else ("k", "k_bias")
    return dict.fromkeys(of_q, q) | dict.fromkeys(of_k, k)


def _on_leaf(place: "_Place", factor: jax.Array) -> jax.Array:
    """A factor [..., heads, 1 or size] in the shape of its leaf, with axes of 1 where it is the same; 1 beside them."""
    if place.heads.places is not None:
        head = np.full(place.total, -1)
        head[list(place.heads.places)] = np.arange(place.count)
        factor = jnp.where((head >= 0)[:, None], factor[..., head, :], 1.0)
    want = [n if i < place.heads.layers or i in place.axes else 1 for i, n in enumerate(place.shape)]
    if place.heads.size is not None:
        factor = jnp.broadcast_to(factor, (*factor.shape[:-1], place.heads.size))
    elif factor.shape[-1] > 1:
        want[-1] = factor.shape[-1]
    return factor.reshape(want)


# --- where the heads are -----------------------------------------------------------------------------------


class _Place(NamedTuple):
    """`Heads` on a leaf: its shape, axes from the front, heads on these axes in all, heads taken, size of one."""

    heads: Heads
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    total: int
    count: int
    head_size: int

    @property
    def layers(self) -> tuple[int, ...]:
        return self.shape[: self.heads.layers]


def _named(spec: MLAClip | MHAClip) -> dict[str, str | Heads]:
    """The fields of a spec that name a leaf."""
    values = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    return {name: value for name, value in values.items() if isinstance(value, str | Heads)}


def _path(named: str | Heads) -> str:
    return named if isinstance(named, str) else named.path


def _places(spec: MLAClip | MHAClip, weights: dict[str, Any]) -> dict[str, _Place]:
    """The place of every field's heads. Raises ValueError, without the spec's name, for one that does not fit."""
    return {field: _place(field, named, weights[_path(named)].shape) for field, named in _named(spec).items()}


def _place(field: str, named: str | Heads, shape: tuple[int, ...]) -> _Place:
    if isinstance(named, str):
        inputs = 1 if field in ("q", "k", "kv") else 0  # biases and gains have no fan-in axis
        named = Heads(named, layers=len(shape) - 2 - inputs)
        if named.layers < 0:
            needed = "[..., fan-in, heads, size]" if inputs else "[..., heads, size]"
            raise ValueError(f"{field} has shape {shape}, needed: {needed}, heads on axis -2; describe others by Heads")
    axes = named.axis if isinstance(named.axis, tuple) else (named.axis,)
    fits = all(-len(shape) <= axis < len(shape) for axis in axes) and axes
    axes = tuple(axis % len(shape) for axis in axes)
    size = named.size or 1
    length = math.prod(shape[axis] for axis in axes)
    places = range(length // size) if named.places is None else named.places
    fits = fits and list(axes) == sorted(set(axes)) and axes[0] >= named.layers and length % size == 0
    if not fits or not set(places) <= set(range(length // size)) or len(set(places)) != len(places):
        raise ValueError(
            f"{field}: {named} does not fit shape {shape}: axes in order, sizes that divide them, places once"
        )
    return _Place(named, shape, axes, length // size, len(places), named.size or shape[-1])


def _check(config: QKClip, weights: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Checks paths and sizes of every spec; returns the shape that each entry of `max_logits` must have."""
    owners = {}
    shapes = {}
    for key, spec in config.specs.items():
        for field, named in _named(spec).items():
            path = _path(named)
            if path not in weights:
                where = f"QKClip.specs[{key!r}].{field}"
                raise ValueError(f"{where} names {path!r}, which is no leaf; {closest(path, weights)}")
        try:
            places = _places(spec, weights)
            shapes[key] = _head_shape(spec, places)
            _check_norms(spec, places, weights)
        except ValueError as error:
            raise ValueError(f"QKClip.specs[{key!r}]: {error}") from error
        for field, place in places.items():
            taken = range(place.total) if place.heads.places is None else place.heads.places
            for head in taken:
                where, owner = f"QKClip.specs[{key!r}].{field}", (place.heads.path, place.axes, head)
                if owner in owners:
                    raise ValueError(f"{where} names {owner[0]!r}, which {owners[owner]} names too; clip a leaf once")
                owners[owner] = where
    return shapes


def _head_shape(spec: MLAClip | MHAClip, places: dict[str, _Place]) -> tuple[int, ...]:
    """Shape of this entry of `max_logits`, [..., H], after checking the weights against each other."""
    is_mla = isinstance(spec, MLAClip)
    q, k = places["q"], places["kv" if is_mla else "k"]
    fits = q.layers == k.layers and k.count > 0
    if is_mla:
        rule = f"the same layers and heads, and nope={spec.nope} within both head sizes"
        fits = fits and q.count == k.count and 0 < spec.nope <= min(q.head_size, k.head_size)
        # Without `size`, a head's own numbers lie on the last axis, which then cannot count heads.
        fits = fits and all(p.heads.size or p.axes[-1] < len(p.shape) - 1 for p in (q, k))
    else:
        rule = "the same layers and head size, query heads a multiple of key heads"
        fits = fits and q.count % k.count == 0 and q.head_size == k.head_size
        for field, other in (("q_bias", q), ("q_norm", q), ("k_bias", k), ("k_norm", k)):
            if field in places:
                place = places[field]
                rule += f"; {field} of every head on its own"
                fits = fits and (place.layers, place.count, place.head_size) == (
                    other.layers,
                    other.count,
                    other.head_size,
                )
    if not fits:
        shapes = {field: place.shape for field, place in places.items()}
        raise ValueError(f"weights of shapes {shapes} do not fit; needed: heads on axis -2, {rule}")
    return (*q.layers, q.count)


def _check_norms(spec: MLAClip | MHAClip, places: dict[str, _Place], weights: dict[str, Any]) -> None:
    """Refuses a gain beside the projections that looks like a norm behind one of them and is not named."""
    if isinstance(spec, MLAClip):  # its norms lie before the projections
        return
    for side in ("q", "k"):
        if getattr(spec, f"{side}_norm") is not None:
            continue
        parent = places[side].heads.path.rpartition("/")[0]
        beside = f"{parent}/" if parent else ""
        for path, leaf in weights.items():
            name = path.removeprefix(beside).lower()
            looks_so = path.startswith(beside) and name.startswith(side) and "norm" in name
            if looks_so and leaf.shape[-1:] == (places[side].head_size,):
                raise ValueError(
                    f"{path!r} looks like a norm behind the {side} projection, which would undo the clip; name it as "
                    f"{side}_norm if it has one gain per head [..., heads, size], else leave this attention out: "
                    f"one gain for all heads cannot clip one head"
                )
