"""MuonClip, the optimizer of Kimi K2, as an optax transformation for any JAX model.

Muon for matrices, AdamW for everything else, one learning rate and one decoupled weight decay for both
(Kimi K2, arXiv 2507.20534, Algorithm 1; Moonlight, arXiv 2502.16982), and QK-Clip on the updated weights.

Legend: B batch, T queries, S keys, G key heads, R query heads per key head, H = G*R query heads, K head size,
C queries of one chunk, n and m the short and the long side of a matrix. Paths are written 'moe/attn/wq_b'.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from k2jax.matrix_specs import (
    EXTERNAL,
    MatrixSpec,
    by_ndim,
    closest,
    leaf_roles,
    matrix_sides,
    named_leaves,
    role_table,
)
from k2jax.newton_schulz import K2, NS, orthogonalize

__all__ = [
    "EXTERNAL",
    "NS",
    "AdamW",
    "MHAClip",
    "MLAClip",
    "MatrixSpec",
    "QKClip",
    "accumulate_max",
    "by_ndim",
    "describe",
    "max_logits",
    "muonclip",
    "orthogonalize",
    "qk_clip",
    "scale_by_muon",
]

PyTree = Any
_QUERY_CHUNK = 128


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Settings of the AdamW branch; learning rate and decay are shared with Muon (Moonlight, section 2.2)."""

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8


@dataclasses.dataclass(frozen=True)
class MLAClip:
    """Multi-head latent attention: the leaves of the heads that one entry of `max_logits` describes.

    Args:
      q: path of the query projection, [..., fan-in, H, nope + rope] (`wq_b`, or `wq` without q-LoRA).
      kv: path of the key-value up-projection, [..., fan-in, H, nope + value].
      nope: size of the part of a head without rotary embedding, which comes first in both leaves.
    """

    q: str
    kv: str
    nope: int


@dataclasses.dataclass(frozen=True)
class MHAClip:
    """Multi-head or grouped-query attention: which leaves hold the heads.

    Args:
      q: path of the query projection, [..., fan-in, H, K].
      k: path of the key projection, [..., fan-in, G, K] with H a multiple of G.
      q_bias: path of the query bias, [..., H, K], if there is one.
      k_bias: path of the key bias, [..., G, K], if there is one.
    """

    q: str
    k: str
    q_bias: str | None = None
    k_bias: str | None = None


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


class MuonState(NamedTuple):
    """Momentum of the matrices: the tree of the parameters, float32, without the leaves of other roles."""

    mu: PyTree


class MuonAdamWState(NamedTuple):
    """Step count (int32), Muon's momentum, and AdamW's two moments; trees of the parameters, float32."""

    count: jax.Array
    mu: PyTree
    adam_m: PyTree
    adam_v: PyTree


class QKClipState(NamedTuple):
    """What the last step clipped, float32 scalars: the share of all heads, and the smallest factor gamma."""

    clipped_fraction: jax.Array
    min_gamma: jax.Array


# --- Muon and AdamW -----------------------------------------------------------------------------------------


def scale_by_muon(
    *,
    beta: float = 0.95,
    nesterov: bool = False,
    consistent_rms: float = 0.2,
    matrix_specs: PyTree = None,
    ns: NS = K2,
) -> optax.GradientTransformationExtraArgs:
    """Muon's direction alone: momentum, orthogonalisation, scale; no learning rate, no decay.

    Leaves with role None pass through unchanged (combine with another rule), EXTERNAL leaves become zero.
    Arguments and errors as in `muonclip`. Source: arXiv 2507.20534, Algorithm 1, lines 3 to 5.
    """

    def init(params):
        return MuonState(mu=_zeros(params, leaf_roles(params, matrix_specs), MatrixSpec))

    def update(grads, state, params=None, **extra_args):
        del params, extra_args
        treedef = jax.tree.structure(grads)
        updates, new_mu = [], []
        roles = leaf_roles(grads, matrix_specs)
        for (_, grad, role), mu in zip(roles, treedef.flatten_up_to(state.mu), strict=True):
            if isinstance(role, MatrixSpec):
                direction, mu = _muon(grad, mu, role, beta, nesterov, consistent_rms, ns)
                updates.append(direction.astype(grad.dtype))
            else:
                updates.append(grad if role is None else jnp.zeros_like(grad))
            new_mu.append(mu)
        return treedef.unflatten(updates), MuonState(mu=treedef.unflatten(new_mu))

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
    adam: AdamW = AdamW(),
    qk_clip: QKClip | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon with AdamW for what is no matrix, decoupled decay, update RMS of AdamW, and QK-Clip.

    For a matrix W with fan-in and fan-out n, m: `M <- beta M + G`, `O = NewtonSchulz(M) consistent_rms
    sqrt(max(n, m))`, `W <- W - lr (O + weight_decay W)`. AdamW leaves get the same rate and decay, norm
    gains, embeddings and head included.

        tx = muonclip(2e-4, matrix_specs=..., qk_clip=QKClip({'attn': MHAClip(q='attn/wq', k='attn/wk')}))
        updates, state = tx.update(grads, state, params, max_logits={'attn': max_logits_LH})
        params = optax.apply_updates(params, updates)

    Args:
      learning_rate: a number, or a schedule of the number of updates already made.
      beta: momentum, heavy ball: the gradient is not scaled by 1 - beta.
      nesterov: feed `beta M + G` to Newton-Schulz, as Moonlight's code does; Kimi K2's Algorithm 1 does not.
      weight_decay: decoupled decay, times the plain learning rate, for every leaf that is not EXTERNAL.
      consistent_rms: root mean square of a Muon update before the learning rate.
      matrix_specs: the rule of every leaf: `MatrixSpec` (Muon), None (AdamW) or `EXTERNAL` (update exactly
        zero). A tree like the parameters, a prefix of one, a dict of paths, or `fn(path, leaf)`.
      ns: Newton-Schulz coefficients and dtype.
      adam: settings of the AdamW branch.
      qk_clip: which weights to clip by the `max_logits` of each update; None for a model without the clip.

    Returns:
      An optax transformation. State holds float32 arrays and a count, no settings. Updates have the dtype of
      the gradients. The statistics of the clip: `optax.tree_utils.tree_get(state, 'clipped_fraction')`.

    Raises:
      ValueError: a leaf without a rule (the message holds a `matrix_specs` to paste), a rule that does not
        fit its leaf, an unknown path, `update` without `params`, or, with `qk_clip`, without fitting
        `max_logits`.

    Source: Kimi K2, arXiv 2507.20534, Algorithm 1; for the AdamW leaves Moonlight, arXiv 2502.16982,
    section 2.2.
    """

    muon = _muon_adamw(learning_rate, beta, nesterov, weight_decay, consistent_rms, matrix_specs, ns, adam)
    return muon if qk_clip is None else optax.chain(muon, _clip_transformation(qk_clip))


def _muon_adamw(learning_rate, beta, nesterov, weight_decay, consistent_rms, matrix_specs, ns, adam):
    def init(params):
        roles = leaf_roles(params, matrix_specs)
        return MuonAdamWState(
            count=jnp.zeros([], jnp.int32),
            mu=_zeros(params, roles, MatrixSpec),
            adam_m=_zeros(params, roles, type(None)),
            adam_v=_zeros(params, roles, type(None)),
        )

    def update(grads, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError("muonclip decays weights: call tx.update(grads, state, params)")
        treedef = jax.tree.structure(grads)
        lr = learning_rate(state.count) if callable(learning_rate) else learning_rate
        count = optax.safe_increment(state.count)
        rows = []
        flat = zip(*(treedef.flatten_up_to(tree) for tree in (grads, *state[1:])), strict=True)
        for (_, param, role), (grad, mu, m, v) in zip(leaf_roles(params, matrix_specs), flat, strict=True):
            if role is EXTERNAL:
                rows.append((jnp.zeros_like(grad), mu, m, v))
                continue
            if role is None:
                direction, m, v = _adam(grad, m, v, count, adam)
            else:
                direction, mu = _muon(grad, mu, role, beta, nesterov, consistent_rms, ns)
            step = -lr * (direction + weight_decay * param.astype(jnp.float32))
            rows.append((step.astype(grad.dtype), mu, m, v))
        updates, *moments = (treedef.unflatten(column) for column in zip(*rows, strict=True))
        return updates, MuonAdamWState(count, *moments)

    return optax.GradientTransformationExtraArgs(init, update)


def _zeros(params: PyTree, roles: list[tuple[str, Any, Any]], kind: type) -> PyTree:
    """Float32 zeros for the leaves whose role is of this kind; the others hold no array."""
    states = [
        jnp.zeros_like(leaf, dtype=jnp.float32) if isinstance(role, kind) else optax.MaskedNode()
        for _, leaf, role in roles
    ]
    return jax.tree.unflatten(jax.tree.structure(params), states)


def _muon(grad, mu, spec, beta, nesterov, consistent_rms, ns):
    """Algorithm 1, lines 3 to 5: (direction, momentum), both float32."""
    grad = grad.astype(jnp.float32)
    mu = beta * mu + grad
    _, fan_in, fan_out = matrix_sides(grad.shape, spec)
    direction = orthogonalize(beta * mu + grad if nesterov else mu, ns=ns, spec=spec)
    return direction * (consistent_rms * math.sqrt(max(fan_in, fan_out))), mu


def _adam(grad, m, v, count, adam):
    """Adam with bias correction: (direction, first moment, second moment), all float32."""
    grad = grad.astype(jnp.float32)
    m = adam.b1 * m + (1 - adam.b1) * grad
    v = adam.b2 * v + (1 - adam.b2) * grad * grad
    m_hat = m / (1 - adam.b1**count)
    v_hat = v / (1 - adam.b2**count)
    return m_hat / (jnp.sqrt(v_hat) + adam.eps), m, v


def describe(params: PyTree, matrix_specs: PyTree, *, ns: NS = K2) -> str:
    """Table of what the optimizer does to every leaf: path, role, shape, matrices, NS FLOPs of one update.

    `params` may be arrays or shapes (`jax.eval_shape`). Raises the same errors as `muonclip(...).init`.
    """
    return role_table(params, matrix_specs, ns_steps=len(ns.coeffs))


# --- QK-Clip ------------------------------------------------------------------------------------------------


def qk_clip(specs: Mapping[str, MLAClip | MHAClip], tau: float = 100.0) -> optax.GradientTransformationExtraArgs:
    """QK-Clip as a transformation: the last one of a chain, after learning rate and decay.

    Changes the updates `u` of the named query and key weights to `clip(p + u) - p`, so that a head whose max
    logit was S > tau would have had tau. Heads at or below tau, or with a non-finite S, change nothing, bit
    for bit. Values, output weights and the shared rotary key are never touched; momentum is not rescaled.

    Args:
      specs: one `MLAClip` or `MHAClip` per entry of the `max_logits` tree, named by its path in that tree.
      tau: the largest max logit that a head may have; 100 in Kimi K2.

    Its `update` takes `max_logits=tree`: leaves [H], or [L, H] for weights with a leading layer axis,
    float32, signed, after the softmax scale, before softmax, maximum over the batch and all micro-batches.

    Raises:
      ValueError: an unknown path, sizes that do not match, or a missing or unknown entry of `max_logits`.

    Source: arXiv 2507.20534, Algorithm 1, lines 8 to 17. Grouped queries share a key: its scale is the square
    root of the group's smallest gamma, and each query takes what is left to its own gamma.
    """
    return _clip_transformation(QKClip(specs, tau))


def _clip_transformation(config: QKClip) -> optax.GradientTransformationExtraArgs:
    def init(params):
        _check_clip(config, named_leaves(params))
        return QKClipState(clipped_fraction=jnp.zeros([], jnp.float32), min_gamma=jnp.ones([], jnp.float32))

    def update(updates, state, params=None, *, max_logits=None, **extra_args):
        del state, extra_args
        if params is None:
            raise ValueError("QK-Clip scales weights: call tx.update(grads, state, params, max_logits=...)")
        weights = named_leaves(params)
        shapes = _check_clip(config, weights)
        gammas = _gammas(config, shapes, max_logits)
        factors = {}
        for key, spec in config.specs.items():
            factors |= _factors(spec, gammas[key], weights)
        leaves, treedef = jax.tree.flatten(updates)
        clipped = [
            _clip(u, weights[path], factors[path]) if path in factors else u
            for path, u in zip(weights, leaves, strict=True)
        ]
        every_gamma = jnp.concatenate([gamma.ravel() for gamma in gammas.values()])
        state = QKClipState(jnp.mean(every_gamma < 1, dtype=jnp.float32), jnp.min(every_gamma))
        return treedef.unflatten(clipped), state

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


def _factors(spec: MLAClip | MHAClip, gamma: jax.Array, weights: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """What multiplies each weight, by path: broadcast over the fan-in axis [..., 1, heads, size]."""
    gamma = gamma[..., None, :, None]
    if isinstance(spec, MLAClip):
        # The rotary key is shared by all heads, so the rotary query takes the whole factor.
        in_nope_q, in_nope_kv = (np.arange(weights[path].shape[-1]) < spec.nope for path in (spec.q, spec.kv))
        root = jnp.sqrt(gamma)
        return {spec.q: jnp.where(in_nope_q, root, gamma), spec.kv: jnp.where(in_nope_kv, root, 1.0)}
    key_heads = weights[spec.k].shape[-2]
    grouped = gamma.reshape(*gamma.shape[:-2], key_heads, -1)
    k = jnp.sqrt(jnp.min(grouped, axis=-1, keepdims=True))
    q = (grouped / k).reshape(gamma.shape)
    biases = {spec.q_bias: q[..., 0, :, :], spec.k_bias: k[..., 0, :, :]}
    return {spec.q: q, spec.k: k} | {path: factor for path, factor in biases.items() if path is not None}


def _check_clip(config: QKClip, weights: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Checks paths and sizes of every spec; returns the shape that each entry of `max_logits` must have."""
    owners = {}
    shapes = {}
    for key, spec in config.specs.items():
        named = {field: path for field, path in dataclasses.asdict(spec).items() if isinstance(path, str)}
        for field, path in named.items():
            where = f"QKClip.specs[{key!r}].{field}"
            if path not in weights:
                raise ValueError(f"{where} names {path!r}, which is no leaf; {closest(path, weights)}")
            if path in owners:
                raise ValueError(f"{where} names {path!r}, which {owners[path]} names too; clip a leaf once")
            owners[path] = where
        shapes[key] = _head_shape(key, spec, {field: weights[path].shape for field, path in named.items()})
    return shapes


def _head_shape(key: str, spec: MLAClip | MHAClip, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Shape of this entry of `max_logits`, [..., H], after checking the weights against each other."""
    is_mla = isinstance(spec, MLAClip)
    q, k = shapes["q"], shapes["kv" if is_mla else "k"]
    fits = min(len(q), len(k)) >= 3 and q[:-3] == k[:-3] and k[-2] > 0
    if is_mla:
        rule = f"heads on axis -2, the same layers and heads, and nope={spec.nope} within both head sizes"
        fits = fits and q[-2] == k[-2] and 0 < spec.nope <= min(q[-1], k[-1])
    else:
        rule = "heads on axis -2, the same layers and head size, query heads a multiple of key heads"
        fits = fits and q[-2] % k[-2] == 0 and q[-1] == k[-1]
        biases = {"q_bias": (*q[:-3], *q[-2:]), "k_bias": (*k[:-3], *k[-2:])}
        fits = fits and all(shapes[field] == want for field, want in biases.items() if field in shapes)
    if not fits:
        raise ValueError(f"QKClip.specs[{key!r}]: weights of shapes {shapes} do not fit; needed: {rule}")
    return (*q[:-3], q[-2])


# --- max logits, for models with their own attention -----------------------------------------------------


def max_logits(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    *,
    scale: float,
    causal: bool = True,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """Exact largest logit of every head: max over the batch and unmasked pairs of scale * q.k, signed.

    No [T, S] array exists: queries go in chunks. Carries no gradient. Costs one more QK product.

    Args:
      q_BTHK: queries after rotary embedding, any floating dtype.
      k_BSGK: keys after rotary embedding; H is a multiple of G.
      scale: softmax scale, every constant that multiplies q.k included.
      causal: a query sees its own and earlier positions.
      segment_ids: [B, S] int32; a query sees keys of its own segment only.

    Returns:
      [H] float32.

    Raises:
      ValueError: H is not a multiple of G, or T differs from S under a mask.
    """
    B, T, H, K = q_BTHK.shape
    _, S, G, _ = k_BSGK.shape
    if H % G:
        raise ValueError(f"max_logits: {H} query heads are not a multiple of {G} key heads")
    if (causal or segment_ids is not None) and T != S:
        raise ValueError(f"max_logits: a mask needs as many queries as keys, got {T} and {S}")
    q_BTHK, k_BSGK = lax.stop_gradient((q_BTHK, k_BSGK))
    chunks = -(-T // _QUERY_CHUNK)
    # A short last chunk is filled with the last query again: a maximum does not mind.
    rows = jnp.minimum(jnp.arange(chunks * _QUERY_CHUNK), T - 1).reshape(chunks, -1)

    def chunk_max(rows_C):
        q_BCGRK = q_BTHK[:, rows_C].reshape(B, -1, G, H // G, K)
        logits_BGRCS = jnp.einsum(
            "bcgrk,bsgk->bgrcs",
            q_BCGRK,
            k_BSGK,
            precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        mask_BCS = jnp.ones((1, 1, 1), bool)
        if causal:
            mask_BCS &= rows_C[:, None] >= jnp.arange(S)
        if segment_ids is not None:
            mask_BCS &= segment_ids[:, rows_C, None] == segment_ids[:, None, :]
        return jnp.where(mask_BCS[:, None, None], logits_BGRCS * scale, -jnp.inf).max(axis=(0, 3, 4)).ravel()

    return lax.map(chunk_max, rows).max(axis=0)


def accumulate_max(tree_a: PyTree, tree_b: PyTree) -> PyTree:
    """Elementwise maximum of two `max_logits` trees: how micro-batches add up (never a sum or a mean)."""
    return jax.tree.map(jnp.maximum, tree_a, tree_b)
