"""MuonClip, the optimizer of Kimi K2, as an optax transformation for any JAX model.

Muon for matrices, AdamW for everything else, one learning rate and one decoupled weight decay for both
(Kimi K2, arXiv 2507.20534, Algorithm 1; Moonlight, arXiv 2502.16982), and QK-Clip on the updated weights.

Legend: n and m the short and the long side of a matrix.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from k2jax.describe import describe
from k2jax.leaf_roles import EXTERNAL, by_ndim, leaf_roles, named_leaves
from k2jax.matrix_specs import MatrixSpec, update_scale
from k2jax.max_logits import accumulate_max, lse_bound, max_logits
from k2jax.muon_groups import orthogonalize, orthogonalize_leaves
from k2jax.muon_plan import MAX_GROUP_BYTES
from k2jax.newton_schulz import K2, NS
from k2jax.polar_express import polar_express
from k2jax.qk_clip import Heads, MHAClip, MLAClip, QKClip, QKClipState, clip_transformation, qk_clip

__all__ = [
    "EXTERNAL",
    "NS",
    "AdamW",
    "Heads",
    "MHAClip",
    "MLAClip",
    "MatrixSpec",
    "QKClip",
    "QKClipState",
    "accumulate_max",
    "by_ndim",
    "describe",
    "from_optax_state",
    "lse_bound",
    "max_logits",
    "muonclip",
    "orthogonalize",
    "polar_express",
    "qk_clip",
    "scale_by_muon",
    "to_optax_state",
]

PyTree = Any


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Settings of the AdamW branch; learning rate and decay are shared with Muon (Moonlight, section 2.2)."""

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8


class MuonState(NamedTuple):
    """Momentum of the matrices: the tree of the parameters, without the leaves of other roles."""

    mu: PyTree


class MuonAdamWState(NamedTuple):
    """Step count (int32), Muon's momentum, and AdamW's two moments (float32); trees of the parameters."""

    count: jax.Array
    mu: PyTree
    adam_m: PyTree
    adam_v: PyTree


# --- Muon and AdamW -----------------------------------------------------------------------------------------


def scale_by_muon(
    *,
    beta: float = 0.95,
    nesterov: bool = False,
    consistent_rms: float = 0.2,
    matrix_specs: PyTree = None,
    ns: NS = K2,
    mu_dtype: str = "float32",
    shardings: PyTree = None,
    max_group_bytes: int | None = None,
    repeat_over: tuple[str, ...] = (),
) -> optax.GradientTransformationExtraArgs:
    """Muon's direction alone: momentum, orthogonalisation, scale; no learning rate, no decay.

    Leaves with role None pass through unchanged (combine with another rule), EXTERNAL leaves become zero.
    Arguments and errors as in `muonclip`. Source: arXiv 2507.20534, Algorithm 1, lines 3 to 5.
    """
    orthogonalized = _orthogonalizer(ns, shardings, max_group_bytes, repeat_over)

    def init(params):
        return MuonState(mu=_zeros(params, leaf_roles(params, matrix_specs), MatrixSpec, mu_dtype))

    def update(grads, state, params=None, **extra_args):
        del params, extra_args
        treedef = jax.tree.structure(grads)
        roles = leaf_roles(grads, matrix_specs)
        directions, mus = _muon(roles, treedef.flatten_up_to(state.mu), beta, nesterov, consistent_rms, orthogonalized)
        updates = [
            direction.astype(grad.dtype) if direction is not None else grad if role is None else jnp.zeros_like(grad)
            for (_, grad, role), direction in zip(roles, directions, strict=True)
        ]
        return treedef.unflatten(updates), MuonState(mu=treedef.unflatten(mus))

    return optax.GradientTransformationExtraArgs(init, update)


def muonclip(
    learning_rate: float | Callable[[jax.Array], jax.Array],
    *,
    beta: float = 0.95,
    nesterov: bool = False,
    weight_decay: float = 0.1,
    consistent_rms: float = 0.2,
    matrix_specs: PyTree = None,
    ns: NS = K2,
    mu_dtype: str = "float32",
    adam: AdamW = AdamW(),
    qk_clip: QKClip | None = None,
    shardings: PyTree = None,
    max_group_bytes: int | None = None,
    repeat_over: tuple[str, ...] = (),
) -> optax.GradientTransformationExtraArgs:
    """Muon with AdamW for what is no matrix, decoupled decay, update RMS of AdamW, and QK-Clip.

    For a matrix W with fan-in and fan-out n, m (a block of its own where `MatrixSpec.blocks` says so):
    `M <- beta M + G`, `O = NewtonSchulz(M) consistent_rms sqrt(max(n, m))`, `W <- W - lr (O + weight_decay W)`.
    AdamW leaves get the same rate and decay, norm gains, embeddings and head included. The update itself has no
    gradient.

        tx = muonclip(2e-4, matrix_specs=..., qk_clip=QKClip({'attn': MHAClip(q='attn/wq', k='attn/wk')}))
        updates, state = tx.update(grads, state, params, max_logits={'attn': max_logits_LH})
        params = optax.apply_updates(params, updates)

    Args:
      learning_rate: a number, or a schedule of the number of updates already made.
      beta: momentum, heavy ball: the gradient is not scaled by 1 - beta.
      nesterov: feed `beta M + G` to Newton-Schulz, as Moonlight's code does; Kimi K2's Algorithm 1 does not.
      weight_decay: decoupled decay, times the plain learning rate, for every leaf that is not EXTERNAL.
      consistent_rms: root mean square of a Muon update before the learning rate.
      matrix_specs: the rule of every leaf: `MatrixSpec` (Muon; an `optax.contrib.MuonDimensionNumbers` is one too),
        None (AdamW) or `EXTERNAL` (update exactly zero). A tree like the parameters, a prefix of one, a dict of
        paths, or `fn(path, leaf)`.
      ns: Newton-Schulz coefficients, dtype and form; a `MatrixSpec` may name another one for its leaf.
      mu_dtype: name of the dtype in which the momentum is kept; the update computes in float32.
      adam: settings of the AdamW branch.
      qk_clip: which weights to clip by the `max_logits` of each update; None for a model without the clip.
      shardings: a tree of NamedSharding like the parameters, for a mesh with Auto axes; of Explicit axes the types of
        the gradients tell. Entries of leaves that are not Muon's are ignored.
      max_group_bytes: bytes of whole matrices, in float32, that a device orthogonalises at once; the work space is
        about twice as much. None for 2**29.
      repeat_over: mesh axes, along which all devices hold the same weights, that are too slow to share the work over:
        devices along them repeat it.

    Returns:
      An optax transformation. State holds arrays only, no settings: new coefficients take effect after a restore.
      Updates have the wider dtype of gradient and parameter. The statistics of the clip:
      `optax.tree_utils.tree_get(state, 'clipped_fraction')`.

    Raises:
      ValueError: a leaf without a rule (the message holds a `matrix_specs` to paste), a rule that does not
        fit its leaf, an unknown path, `update` without `params`, or, with `qk_clip`, without fitting
        `max_logits`; a mesh with Auto axes without `shardings`.

    Source: Kimi K2, arXiv 2507.20534, Algorithm 1; for the AdamW leaves Moonlight, arXiv 2502.16982,
    section 2.2.
    """
    orthogonalized = _orthogonalizer(ns, shardings, max_group_bytes, repeat_over)
    settings = (beta, nesterov, weight_decay, consistent_rms, matrix_specs, orthogonalized, mu_dtype, adam)
    muon = _muon_adamw(learning_rate, *settings)
    return muon if qk_clip is None else optax.chain(muon, clip_transformation(qk_clip))


def _muon_adamw(
    learning_rate, beta, nesterov, weight_decay, consistent_rms, matrix_specs, orthogonalized, mu_dtype, adam
):
    def init(params):
        roles = leaf_roles(params, matrix_specs)
        return MuonAdamWState(
            count=jnp.zeros([], jnp.int32),
            mu=_zeros(params, roles, MatrixSpec, mu_dtype),
            adam_m=_zeros(params, roles, type(None), jnp.float32),
            adam_v=_zeros(params, roles, type(None), jnp.float32),
        )

    def update(grads, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError("muonclip decays weights: call tx.update(grads, state, params)")
        treedef = jax.tree.structure(grads)
        lr = learning_rate(state.count) if callable(learning_rate) else learning_rate
        count = optax.safe_increment(state.count)
        flat_grads, mus, ms, vs = (treedef.flatten_up_to(tree) for tree in (grads, *state[1:]))
        leaves = leaf_roles(params, matrix_specs)
        roles = [(path, grad, role) for (path, _, role), grad in zip(leaves, flat_grads, strict=True)]
        directions, mus = _muon(roles, mus, beta, nesterov, consistent_rms, orthogonalized)
        updates = []
        for i, (_, param, role) in enumerate(leaves):
            grad, direction = flat_grads[i], directions[i]
            dtype = jnp.promote_types(grad.dtype, param.dtype)
            if role is EXTERNAL:
                updates.append(jnp.zeros_like(grad, dtype=dtype))
                continue
            if role is None:
                direction, ms[i], vs[i] = _adam(grad, ms[i], vs[i], count, adam)
            step = -lr * (direction + weight_decay * param.astype(jnp.float32))
            updates.append(step.astype(dtype))
        return treedef.unflatten(updates), MuonAdamWState(count, *map(treedef.unflatten, (mus, ms, vs)))

    return optax.GradientTransformationExtraArgs(init, update)


def _zeros(params: PyTree, roles: list[tuple[str, Any, Any]], kind: type, dtype: Any) -> PyTree:
    """Zeros for the leaves whose role is of this kind; the others hold no array."""
    states = [
        jnp.zeros_like(leaf, dtype=dtype) if isinstance(role, kind) else optax.MaskedNode() for _, leaf, role in roles
    ]
    return jax.tree.unflatten(jax.tree.structure(params), states)


def _orthogonalizer(ns, shardings, max_group_bytes, repeat_over):
    """`orthogonalize_leaves` with these settings, of (arrays, specs, paths, into)."""
    given = None if shardings is None else named_leaves(shardings)

    def orthogonalized(arrays, specs, paths, into):
        mine = None
        if given is not None:
            if missing := [path for path in paths if path not in given]:
                raise ValueError(f"shardings has no entry for {missing[0]!r}; give a tree like the parameters")
            mine = [given[path] for path in paths]
        most = MAX_GROUP_BYTES if max_group_bytes is None else max_group_bytes
        how = {"max_group_bytes": most, "repeat_over": repeat_over, "names": paths}
        return orthogonalize_leaves(arrays, specs, ns, into=into, shardings=mine, **how)

    return orthogonalized


def _muon(roles, mus, beta, nesterov, consistent_rms, orthogonalized):
    """Algorithm 1, lines 3 to 5, for all leaves of (path, gradient, role): (directions, momenta).

    Directions are float32, and None for leaves of other roles.
    """
    directions, mus = [None] * len(roles), list(mus)
    mine = [i for i, (_, _, role) in enumerate(roles) if isinstance(role, MatrixSpec)]
    inputs = []
    for i in mine:
        grad = roles[i][1].astype(jnp.float32)
        mu = beta * mus[i].astype(jnp.float32) + grad
        inputs.append(beta * mu + grad if nesterov else mu)
        mus[i] = mu.astype(mus[i].dtype)
    specs = [roles[i][2] for i in mine]
    paths, grads = ([roles[i][place] for i in mine] for place in (0, 1))
    results = orthogonalized(inputs, specs, paths, grads)
    for i, spec, direction in zip(mine, specs, results, strict=True):
        directions[i] = direction * (consistent_rms * update_scale(direction.shape, spec))
    return directions, mus


def _adam(grad, m, v, count, adam):
    """Adam with bias correction: (direction, first moment, second moment), all float32."""
    grad = grad.astype(jnp.float32)
    m = adam.b1 * m + (1 - adam.b1) * grad
    v = adam.b2 * v + (1 - adam.b2) * grad * grad
    m_hat = m / (1 - adam.b1**count)
    v_hat = v / (1 - adam.b2**count)
    return m_hat / (jnp.sqrt(v_hat) + adam.eps), m, v


# --- from and to optax.contrib.muon ------------------------------------------------------------------------


def from_optax_state(optax_state: PyTree, state: PyTree, *, beta: float = 0.95) -> PyTree:
    """`state`, fresh from `muonclip(...).init`, filled from a state of `optax.contrib.muon`.

    optax keeps the average `mu <- beta mu + (1 - beta) G` and corrects its bias outside the state, so the heavy ball
    is exactly `mu / (1 - beta)`. Adam's moments and the count are the same in both. Training goes on with optax's
    direction where it ran without Nesterov; its Nesterov mixes momentum and gradient with bias terms of its own.

    Args:
      optax_state: of `optax.contrib.muon`, also inside a chain.
      state: of `muonclip`, also inside a chain; the clip's statistics and members of other kinds stay as they are.
      beta: the momentum of both.

    Returns:
      A new state like `state`.

    Raises:
      ValueError: one of them holds no such state, or a leaf is Muon's in one and AdamW's in the other.
    """
    ours, muon, adam = (_only(s, kind) for s, kind in zip((state, optax_state, optax_state), _KINDS, strict=True))
    filled = MuonAdamWState(
        count=jnp.asarray(muon.count, jnp.int32),
        mu=_filled(ours.mu, muon.mu, 1 / (1 - beta)),
        adam_m=_filled(ours.adam_m, adam.mu, 1.0),
        adam_v=_filled(ours.adam_v, adam.nu, 1.0),
    )
    return _map_states(state, lambda part: filled if isinstance(part, MuonAdamWState) else part)


def to_optax_state(state: PyTree, optax_state: PyTree, *, beta: float = 0.95) -> PyTree:
    """`optax_state`, fresh from `optax.contrib.muon(...).init`, filled from a state of `muonclip`.

    The inverse of `from_optax_state`, with the same arguments and errors.
    """
    ours = _only(state, MuonAdamWState)

    def filled(part):
        if isinstance(part, optax.contrib.MuonState):
            return part._replace(count=ours.count, mu=_filled(part.mu, ours.mu, 1 - beta))
        if isinstance(part, optax.ScaleByAdamState):
            moments = {"mu": _filled(part.mu, ours.adam_m, 1.0), "nu": _filled(part.nu, ours.adam_v, 1.0)}
            return part._replace(count=ours.count, **moments)
        return part._replace(count=ours.count)  # a learning-rate schedule

    for kind in _KINDS[1:]:
        _only(optax_state, kind)
    return _map_states(optax_state, filled)


_KINDS = (MuonAdamWState, optax.contrib.MuonState, optax.ScaleByAdamState)


def _map_states(state: PyTree, fn: Callable) -> PyTree:
    """`state` with `fn` of every optimizer state in it."""
    kinds = (*_KINDS, optax.ScaleByScheduleState)
    is_state = lambda x: isinstance(x, kinds)  # noqa: E731
    return jax.tree.map(lambda x: fn(x) if is_state(x) else x, state, is_leaf=is_state)


def _only(state: PyTree, kind: type) -> Any:
    """The one state of this kind inside an optimizer's state."""
    found = [x for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kind)) if isinstance(x, kind)]
    if len(found) != 1:
        raise ValueError(f"expected one {kind.__module__}.{kind.__name__} in the optimizer's state, found {len(found)}")
    return found[0]


def _filled(mine: PyTree, theirs: PyTree, factor: float) -> PyTree:
    """`mine` with the arrays of `theirs` times `factor`, in the dtypes of `mine`."""
    given = named_leaves(theirs)
    for path, leaf in named_leaves(mine).items():
        if path not in given or given[path].shape != leaf.shape:
            raise ValueError(
                f"the other state has no {leaf.shape} for leaf {path!r}: give it the same rule (Muon or AdamW) in "
                f"matrix_specs and in muon_weight_dimension_numbers"
            )
    leaves = [(factor * given[path]).astype(leaf.dtype) for path, leaf in named_leaves(mine).items()]
    return jax.tree.unflatten(jax.tree.structure(mine), leaves)
