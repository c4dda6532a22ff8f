"""The cases that the doctor runs: every implementation that an op's table holds, in the types that a run may use.

Legend: B batch, T tokens, H heads, G key heads, K query/key size, V value size, R rows, E experts, D and F features,
N tokens of a dispatch, J experts per token, L layers, n and m sides of a matrix.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from k2jax import moba_pallas, model
from k2jax.config import GQAConfig, ModelConfig
from k2jax.diagnostics.ops import TOLERANCE, Case
from k2jax.kernels import attention as attention_op
from k2jax.kernels import grouped_matmul as grouped_op
from k2jax.layers.dispatch import from_experts, plan_dispatch, to_experts
from k2jax.muonclip import MHAClip, MLAClip, qk_clip
from k2jax.newton_schulz import NS, newton_schulz

# Five steps in few bits; a right implementation stays below a third of it.
NS_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-1, "float16": 2e-2}


def all_cases(quick: bool = False) -> list[Case]:
    """Every case; quick leaves out the second shape of the attention ops."""
    cases = []
    for dtype in ("float32", "bfloat16"):
        shapes = {"packed": ((4, 2, 64, 64), True)} | ({} if quick else {"MLA": ((2, 2, 192, 128), False)})
        for label, (sizes, packed) in shapes.items():
            cases += _attention(label, dtype, sizes, packed) + _moba(label, dtype, sizes, packed)
        cases += _grouped_matmul(dtype) + _dispatch(dtype) + _token_logprobs(dtype)
    return cases + _newton_schulz() + _qk_clip()


def _attention_inputs(sizes, packed, grid):
    """q, k, v and segment ids. grid: values with few bits, whose block means and scores round nowhere."""
    H, G, K, V = sizes
    rng, B, T = np.random.default_rng(1), 2, 320
    shapes = ((B, T, H, K), (B, T, G, K), (B, T, G, V))
    qkv = [rng.standard_normal(shape, np.float32) for shape in shapes]
    if grid:
        qkv[:2] = [rng.integers(-4, 5, shape).astype(np.float32) / 4 for shape in shapes[:2]]
    segment_ids = np.ones((B, T), np.int32)
    if packed:
        segment_ids[0, 130:], segment_ids[1, 47:] = 2, 2
    return (*qkv, segment_ids)


def _attention(label, dtype, sizes, packed):
    inputs = _attention_inputs(sizes, packed, grid=False)

    def attend(q_BTHK, k_BTGK, v_BTGV, segment_ids, *, implementation):
        return attention_op.attention(
            q_BTHK, k_BTGK, v_BTGV, scale=q_BTHK.shape[-1] ** -0.5, segment_ids=segment_ids, max_logits=True,
            implementation=implementation,
        )  # fmt: skip

    reference = partial(attend, implementation="reference")
    return [
        Case(f"attention {label}", name, dtype, inputs, partial(attend, implementation=name), reference,
             TOLERANCE[dtype])
        for name in attention_op.IMPLEMENTATIONS
    ]  # fmt: skip


def _moba(label, dtype, sizes, packed):
    inputs = _attention_inputs(sizes, packed, grid=True)

    def attend(q_BTHK, k_BTGK, v_BTGV, segment_ids, *, implementation):
        return moba_pallas.moba_attention(
            q_BTHK, k_BTGK, v_BTGV, block_size=64, top_k=3, segment_ids=segment_ids, return_residuals=True,
            implementation=implementation,
        )  # fmt: skip

    reference = partial(attend, implementation="reference")
    return [
        Case(f"moba {label}", name, dtype, inputs, partial(attend, implementation=name), reference, TOLERANCE[dtype])
        for name in moba_pallas.IMPLEMENTATIONS
    ]


def _grouped_matmul(dtype):
    rng, tile = np.random.default_rng(2), grouped_op.TILE
    sizes_E = np.array([2, 0, 1, 3], np.int32) * tile
    x_RD = rng.standard_normal((8 * tile, 96), np.float32)
    x_RD[6 * tile :] = 0  # rows after the last group
    w_EDF = rng.standard_normal((4, 96, 64), np.float32)

    def multiply(x_RD, w_EDF, sizes_E, *, implementation):
        return grouped_op.grouped_matmul(x_RD, w_EDF, sizes_E, implementation=implementation)

    def loop(x_RD, w_EDF, sizes_E):
        first_E = jnp.cumsum(sizes_E) - sizes_E
        row_R1 = jnp.arange(x_RD.shape[0])[:, None]
        mine = [(row_R1 >= first) & (row_R1 < first + size) for first, size in zip(first_E, sizes_E, strict=True)]
        # The rows after the last group are zero, but a gradient flows to them: it belongs to nobody.
        return sum(jnp.where(m, x_RD @ w_DF, 0.0) for m, w_DF in zip(mine, w_EDF, strict=True))

    def inside(result, sizes_E):
        return jnp.where(jnp.arange(result.shape[0])[:, None] < sizes_E.sum(), result, 0)

    return [
        Case("grouped_matmul", name, dtype, (x_RD, w_EDF, sizes_E),
             lambda x, w, sizes, name=name: inside(multiply(x, w, sizes, implementation=name), sizes), loop,
             TOLERANCE[dtype])
        for name in grouped_op.IMPLEMENTATIONS
    ]  # fmt: skip


def _dispatch(dtype):
    """Tokens to experts and back, where an expert scales the features by a vector of its own."""
    rng, E = np.random.default_rng(3), 8
    ids_NJ = np.stack([rng.permutation(E)[:3] for _ in range(200)]).astype(np.int32)
    x_ND = rng.standard_normal((200, 32), np.float32)
    weights_NJ, scale_ED = rng.random((200, 3), np.float32), rng.standard_normal((E, 32), np.float32)

    def moved(x_ND, weights_NJ, scale_ED, ids_NJ, *, first, here):
        plan = plan_dispatch(ids_NJ - first, here, always_here=here == E)
        x_RD = to_experts(x_ND, plan)
        expert_R = jnp.searchsorted(jnp.cumsum(plan.sizes_E), jnp.arange(x_RD.shape[0]), side="right")
        scale_RD = scale_ED[first + jnp.minimum(expert_R, here - 1)]
        return from_experts(x_RD * scale_RD, weights_NJ.astype(jnp.float32), plan)

    def dense(x_ND, weights_NJ, scale_ED, ids_NJ, *, first, here):
        present_NJ = (ids_NJ >= first) & (ids_NJ < first + here)
        return jnp.einsum("ND,NJ,NJD->ND", x_ND, jnp.where(present_NJ, weights_NJ, 0.0), scale_ED[ids_NJ])

    inputs = (x_ND, weights_NJ, scale_ED, ids_NJ)
    return [
        Case("dispatch", label, dtype, inputs, partial(moved, **part), partial(dense, **part), TOLERANCE[dtype])
        for label, part in {"all experts": {"first": 0, "here": E}, "a part": {"first": 2, "here": 3}}.items()
    ]


def _token_logprobs(dtype):
    """The chunked loss against all logits at once, in a model of one layer, in the same type."""
    cfg = ModelConfig(
        vocab_size=500, dim=32, num_layers=1, num_dense_layers=1, num_heads=2, mlp_dim=48,
        attn=GQAConfig(num_kv_heads=1, head_dim=16), attention=("full",), dtype=dtype, init_std=0.2,
    )  # fmt: skip
    rng = np.random.default_rng(4)
    shapes = jax.eval_shape(partial(model.init_params, cfg), jax.random.key(0))
    leaves, treedef = jax.tree.flatten(shapes)
    # Parameters are float32 in any type of computation, so they are no input that would be rounded.
    params = treedef.unflatten([0.2 * rng.standard_normal(leaf.shape, np.float32) for leaf in leaves])
    tokens_BT = rng.integers(0, cfg.vocab_size, (2, 90)).astype(np.int32)
    head_w = params["head"]["w"].astype(jnp.dtype(dtype)).astype(np.float32)

    def with_head(head_w):
        return jax.tree.map(jnp.asarray, params) | {"head": {"w": head_w.astype(jnp.float32)}}

    def chunked(head_w, tokens_BT):
        return model.token_logprobs(with_head(head_w), cfg, tokens_BT, chunk=32)[0]

    def at_once(head_w, tokens_BT):
        logits_BTV, _ = model.apply(with_head(head_w), cfg, tokens_BT)
        logp_BTV = jax.nn.log_softmax(logits_BTV[:, :-1], axis=-1)
        return jnp.pad(jnp.take_along_axis(logp_BTV, tokens_BT[:, 1:, None], axis=-1)[..., 0], ((0, 0), (0, 1)))

    return [Case("token_logprobs", "chunked", dtype, (head_w, tokens_BT), chunked, at_once, TOLERANCE[dtype])]


def _newton_schulz():
    rng = np.random.default_rng(5)
    wide, tall = rng.standard_normal((3, 48, 80), np.float32), rng.standard_normal((64, 40), np.float32)

    def exact(*matrices):
        return [_through_singular_values(x) for x in matrices]

    def iterate(*matrices, dtype):
        return [newton_schulz(x, NS.k2(dtype=dtype)) for x in matrices]

    # The op rounds its input itself, after it has divided by the norm.
    return [
        Case("newton_schulz", "batched", dtype, (wide, tall), partial(iterate, dtype=dtype), exact,
             NS_TOLERANCE[dtype], exact=True)
        for dtype in NS_TOLERANCE
    ]  # fmt: skip


def _through_singular_values(x):
    """The polynomials applied to the singular values, in float64."""
    u, s, vt = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    s = s / np.linalg.norm(s, axis=-1, keepdims=True)
    for a, b, c in NS.k2().coeffs:
        s = a * s + b * s**3 + c * s**5
    return np.einsum("...ij,...j,...jk->...ik", u, s, vt)


def _qk_clip():
    """One head above tau and one below, in two layers; MLA by its parts and multi-head attention."""
    rng, tau = np.random.default_rng(6), 100.0
    params = {
        "wq_b": rng.standard_normal((2, 16, 2, 12), np.float32),
        "wkv_b": rng.standard_normal((2, 16, 2, 16), np.float32),
        "wq": rng.standard_normal((2, 16, 2, 8), np.float32),
        "wk": rng.standard_normal((2, 16, 2, 8), np.float32),
    }
    highest = np.array([[250.0, 40.0], [99.0, 400.0]], np.float32)
    names, nope = list(params), 8

    def clipped(highest, *weights):
        params = dict(zip(names, weights, strict=True))
        tx = qk_clip({"mla": MLAClip("wq_b", "wkv_b", nope=nope), "mha": MHAClip("wq", "wk")}, tau)
        updates, _ = tx.update(
            jax.tree.map(jnp.zeros_like, params), tx.init(params), params, max_logits={"mla": highest, "mha": highest}
        )
        return [params[name] + updates[name] for name in names]

    def exact(highest, wq_b, wkv_b, wq, wk):
        gamma = np.minimum(1.0, tau / highest.astype(np.float64))[:, None, :, None]
        root = np.sqrt(gamma)
        wq_b, wkv_b = wq_b.astype(np.float64), wkv_b.astype(np.float64)
        wq_b = np.concatenate([wq_b[..., :nope] * root, wq_b[..., nope:] * gamma], axis=-1)
        wkv_b = np.concatenate([wkv_b[..., :nope] * root, wkv_b[..., nope:]], axis=-1)
        return [wq_b, wkv_b, wq * root, wk * root]

    inputs = (highest, *params.values())
    return [Case("qk_clip", "MLA and MHA", "float32", inputs, clipped, exact, 1e-6, exact=True)]
