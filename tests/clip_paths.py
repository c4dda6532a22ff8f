"""One clip driven by an attention's own max logits: what every path of attention must feed QK-Clip.

Legend: B batch, T tokens, D model, H heads, K head size.
"""

import jax
import jax.numpy as jnp
import numpy as np

from k2jax.kernels.attention import attention
from k2jax.moba_pallas import moba_attention
from k2jax.muonclip import MatrixSpec, MHAClip, QKClip, muonclip

B, T, D, H, K = 2, 300, 32, 3, 64
SCALE = K**-0.5
BLOCKS = {"block_size": 64, "top_k": 2}  # MoBA's


def attend_by(kind, implementation):
    """'full' attention or 'moba' by an implementation, as `clipped_by` takes it."""

    def attend(q, k, v):
        if kind == "full":
            return attention(q, k, v, scale=SCALE, max_logits=True, implementation=implementation)[1]
        options = {"return_residuals": True, "implementation": implementation}
        return moba_attention(q, k, v, scale=SCALE, **BLOCKS, **options)[1].max_logit_BH

    return attend


def clipped_by(attend, dtype):
    """Per head: the largest logit before a clip, the threshold, and the largest logit after it.

    attend: (q, k, v) -> each row's largest logit of every head, [B, H]. Both maxima are attend's own; the first one is
    all that the clip is told. The heads' logits lie below, just above and far above the threshold.
    """
    keys = jax.random.split(jax.random.key(0), 4)
    x_BTD = jax.random.normal(keys[0], (B, T, D))
    params = {f"w{name}": jax.random.normal(key, (D, H, K)) / D**0.5 for name, key in zip("qkv", keys[1:], strict=True)}
    params["wq"] *= jnp.array([0.5, 2.0, 8.0])[:, None]

    def largest(params):
        q, k, v = (jnp.einsum("btd,dhk->bthk", x_BTD, params[f"w{name}"]).astype(dtype) for name in "qkv")
        return attend(q, k, v).max(axis=0)

    before_H = largest(params)
    tau = float(before_H[1]) / 1.5
    assert tau > 0
    to_heads = MatrixSpec(-3, (-2, -1))
    optimizer = muonclip(
        1.0,
        weight_decay=0.0,
        matrix_specs=lambda path, leaf: to_heads,
        qk_clip=QKClip({"attn": MHAClip(q="wq", k="wk")}, tau),
    )
    state = optimizer.init(params)
    nothing = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(nothing, state, params, max_logits={"attn": before_H})
    after_H = largest(jax.tree.map(jnp.add, params, updates))
    return np.asarray(before_H), tau, np.asarray(after_H)


def assert_clipped(attend, dtype):
    before_H, tau, after_H = clipped_by(attend, dtype)
    assert before_H[0] < tau < before_H[1] < before_H[2]
    # Queries and keys are rounded to their type before and after.
    np.testing.assert_allclose(after_H, np.minimum(before_H, tau), rtol={"float32": 1e-5, "bfloat16": 1e-2}[dtype])
