"""The matrices of a leaf: which axes form them, which blocks of a fused weight are matrices of their own.

Legend: L layers, D model, H heads, K and V head sizes.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@dataclasses.dataclass(frozen=True)
class MatrixSpec:
    """Which axes of a parameter form its matrices; every other axis is a batch of independent matrices.

    An input projection `wq [L, D, H, K]` is `MatrixSpec(-3, (-2, -1))`: L matrices [D, H*K]. One matrix per head is
    the same without the head axis, `MatrixSpec(-3, -1)`: L*H matrices [D, K]. An output projection `wo [L, H, V, D]`
    is `MatrixSpec((-3, -2), -1)`. Count from the end, so that one spec fits stacked and unstacked layers.

    Args:
      reduction_axis: the axis, or axes, that the forward pass sums over (fan-in).
      output_axis: the axis, or axes, of the result (fan-out).
      blocks: sizes of the parts of a fused weight along `block_axis`, each a matrix of its own: (512, 64) for a
        latent and a shared rotary key, (K,) * H for heads in a flat [D, H*K]. They add up to the axis.
      block_axis: the axis that is cut, one of the axes above; None for the last output axis.
      ns: a `k2jax.newton_schulz.NS` for this leaf alone; None for the optimizer's.
    """

    reduction_axis: int | tuple[int, ...] = -2
    output_axis: int | tuple[int, ...] = -1
    blocks: tuple[int, ...] | None = None
    block_axis: int | None = None
    ns: Any = None

    def __repr__(self) -> str:
        given = [
            f"{f.name}={value!r}" for f in dataclasses.fields(self) if (value := getattr(self, f.name)) != f.default
        ]
        return f"MatrixSpec({', '.join(given)})"


LAST_TWO = MatrixSpec()


def matrix_axes(shape: tuple[int, ...], spec: MatrixSpec) -> tuple[tuple[int, ...], ...]:
    """Axes (batch, reduction, output) of a parameter of this shape, counted from the front.

    Raises:
      ValueError: an axis is missing from the shape, or named twice.
    """
    reduction, output = (as_axes(axis) for axis in (spec.reduction_axis, spec.output_axis))
    ndim = len(shape)
    if not reduction or not output or any(not -ndim <= axis < ndim for axis in reduction + output):
        raise ValueError(f"{spec} does not fit shape {shape}: it needs axes in [{-ndim}, {ndim})")
    reduction, output = (tuple(axis % ndim for axis in axes) for axes in (reduction, output))
    if len(set(reduction + output)) != len(reduction + output):
        raise ValueError(f"{spec} names an axis of shape {shape} twice: reduction and output must be disjoint")
    batch = tuple(axis for axis in range(ndim) if axis not in reduction + output)
    return batch, reduction, output


def as_axes(axis: int | Iterable[int]) -> tuple[int, ...]:
    return (axis,) if isinstance(axis, int) else tuple(axis)


class Stack(NamedTuple):
    """Equal blocks that lie side by side in a leaf, and so one batch of equal matrices; all of it without blocks.

    start, count, size: `count` blocks of `size` along the cut axis, from `start`.
    matrices, fan_in, fan_out: how many matrices that makes with the batch axes, and their sides.
    """

    start: int
    count: int
    size: int
    matrices: int
    fan_in: int
    fan_out: int


def cut_axis(shape: tuple[int, ...], spec: MatrixSpec) -> int:
    """The axis that `spec.blocks` cut, counted from the front."""
    return as_axes(spec.output_axis if spec.block_axis is None else spec.block_axis)[-1] % len(shape)


def stacks(shape: tuple[int, ...], spec: MatrixSpec) -> list[Stack]:
    """The matrices of a parameter of this shape, equal neighbours together.

    Raises:
      ValueError: `spec` does not fit the shape, or its blocks do not add up to the axis that they cut.
    """
    batch, reduction, output = matrix_axes(shape, spec)
    outer, fan_in, fan_out = (math.prod(shape[axis] for axis in axes) for axes in (batch, reduction, output))
    axis = cut_axis(shape, spec)
    length = shape[axis]
    if spec.blocks is None:
        if spec.block_axis is not None:
            raise ValueError(f"{spec} has a block_axis but no blocks; give their sizes, or leave both out")
        return [Stack(0, 1, length, outer, fan_in, fan_out)]
    if axis in batch or not -len(shape) <= (spec.block_axis or 0) < len(shape):
        raise ValueError(f"{spec} does not fit shape {shape}: block_axis must be a reduction or an output axis")
    if sum(spec.blocks) != length or min(spec.blocks, default=0) < 1:
        raise ValueError(
            f"{spec} does not fit shape {shape}: blocks add up to {sum(spec.blocks)}, the axis has {length}"
        )
    found, start = [], 0
    for size, group in itertools.groupby(spec.blocks):
        count = len(list(group))
        sides = (fan_in // length * size, fan_out) if axis in reduction else (fan_in, fan_out // length * size)
        found.append(Stack(start, count, size, outer * count, *sides))
        start += count * size
    return found


def to_matrices(x: jax.Array, spec: MatrixSpec) -> list[jax.Array]:
    """The matrices of a leaf as one array [*batch, fan-in, fan-out] for each of its `stacks`.

    Equal blocks are the last batch axis of their stack; without blocks there is one stack and no such axis.
    """
    _, reduction, output = matrix_axes(x.shape, spec)
    axis = cut_axis(x.shape, spec)
    found = []
    for part in stacks(x.shape, spec):
        split, order = _layout(x.shape, spec, part)
        piece = lax.slice_in_dim(x, part.start, part.start + part.count * part.size, axis=axis)
        moved = jnp.transpose(piece.reshape(split), order)
        batch = len(order) - len(reduction + output)
        found.append(moved.reshape(*moved.shape[:batch], part.fan_in, part.fan_out))
    return found


def from_matrices(results: list[jax.Array], shape: tuple[int, ...], spec: MatrixSpec) -> jax.Array:
    """The leaf of this shape whose `to_matrices` these are."""
    axis = cut_axis(shape, spec)
    pieces = []
    for part, matrices in zip(stacks(shape, spec), results, strict=True):
        split, order = _layout(shape, spec, part)
        moved = matrices.reshape([split[i] for i in order])
        inverse = sorted(range(len(order)), key=order.__getitem__)
        pieces.append(jnp.transpose(moved, inverse).reshape(*shape[:axis], part.count * part.size, *shape[axis + 1 :]))
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=axis)


def _layout(shape, spec, part):
    """(shape, order): the piece of a stack with its equal blocks on an axis of their own, and batch axes first."""
    batch, reduction, output = matrix_axes(shape, spec)
    axis = cut_axis(shape, spec)
    if part.count == 1:
        return (*shape[:axis], part.size, *shape[axis + 1 :]), [*batch, *reduction, *output]
    split = (*shape[:axis], part.count, part.size, *shape[axis + 1 :])
    batch, reduction, output = ([i + (i >= axis) for i in axes] for axes in (batch, reduction, output))
    return split, [*batch, axis, *reduction, *output]


def update_scale(shape: tuple[int, ...], spec: MatrixSpec) -> float | np.ndarray:
    """sqrt(max(fan-in, fan-out)) of the matrix that an entry belongs to: a number, or an array along the cut axis.

    A semi-orthogonal matrix has root mean square 1 / sqrt(max(n, m)) (Moonlight, arXiv 2502.16982, lemma 1), so this
    brings matrices of every size to one, and a block to the same as a whole matrix.
    """
    parts = stacks(shape, spec)
    if spec.blocks is None:
        return math.sqrt(max(parts[0].fan_in, parts[0].fan_out))
    along = np.concatenate([np.full(s.count * s.size, math.sqrt(max(s.fan_in, s.fan_out)), np.float32) for s in parts])
    axis = cut_axis(shape, spec)
    return along.reshape([-1 if i == axis else 1 for i in range(len(shape))])
