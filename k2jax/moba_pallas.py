"""Mixture of Block Attention (MoBA) as one op for any JAX model; this module needs jax alone.

    out = moba_attention(q, k, v, block_size=512, top_k=3)

`docs/moba.md` is the guide, `kernels/moba/reference.py` the definition in code.

Legend: B batch, T queries, S keys, H query heads, G key heads, K query/key size, V value size, J = top_k.
"""

import functools
import logging
import math

import jax.numpy as jnp

from k2jax.kernels.attention import IMPLEMENTATIONS as FULL_ATTENTION
from k2jax.kernels.attention import cannot_run_sm90, check_shapes
from k2jax.kernels.attention import choose as choose_full_attention
from k2jax.kernels.attention import sm90 as full_sm90
from k2jax.kernels.hopper import CannotRun
from k2jax.kernels.moba import reference, sm90, tpu, xla
from k2jax.kernels.moba.blocks import Attended, Residuals
from k2jax.kernels.moba.decode import Pages, append, empty_pages, moba_decode
from k2jax.kernels.partition import attend_over_mesh
from k2jax.kernels.tpu import not_tpu, unproven

__all__ = ["Pages", "Residuals", "append", "empty_pages", "moba_attention", "moba_attention_plan", "moba_decode"]

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = {
    "reference": reference.moba_attention,
    "xla": xla.moba_attention,
    "sm90": sm90.moba_attention,
    "tpu": tpu.moba_attention,
}


def moba_attention(
    q,
    k,
    v,
    *,
    block_size,
    top_k,
    scale=None,
    segment_ids=None,
    q_offset=0,
    return_residuals=False,
    implementation=None,
):
    """Causal attention of each query to its own block and to the top_k - 1 earlier blocks that its head
    scores best.

    A block is `block_size` consecutive tokens, cut from the start of each segment; its score is the inner
    product of the query with the mean of the block's keys. Equal scores: the lowest block wins. All selected
    tokens share one softmax. The choice has no gradient; that of q, k and v through the softmax is exact.

    Args:
      q: [B, T, H, K] queries, after any rotary embedding, bfloat16, float16 or float32.
      k: [B, S, G, K] keys, H a multiple of G; every query head chooses for itself among its key head's
        blocks.
      v: [B, S, G, V] values; V may differ from K.
      block_size: tokens per block; any positive int, and S need not be a multiple of it.
      top_k: blocks each query attends to, its own included: 1 is block-diagonal attention.
      scale: multiplies the logits before the softmax (not the score of a block); None is K ** -0.5.
      segment_ids: int32 [B, S], contiguous runs; no query sees another segment, no block crosses into one.
      q_offset: position of the first query among the keys, an int or int32 [B] (may be traced), for prefill
        in chunks. `q_offset + T <= S` must hold. Keys after a query's position are never read, so a cache may
        be longer than full.
      return_residuals: also return `Residuals(lse_BHT, max_logit_BH, selected_BHTJ)`, none with a gradient.
      implementation: 'reference' (T x S memory), 'xla' (any platform, memory by S x top_k), 'sm90' (Hopper GPUs),
        'tpu' (TPUs, on which it has never run), or None, which chooses by size and device, takes full attention where
        it is the same function, does not choose 'tpu', and logs the choice once.

    Returns:
      [B, T, H, V] in v's dtype, or `(that, Residuals)`.

    Raises:
      ValueError: for shapes that do not fit together, a block size or top_k below 1, or an unknown
        implementation; CannotRun, which is one, for one that cannot do this here.

    Source: "MoBA: Mixture of Block Attention for Long-Context LLMs" (arXiv 2502.13189), section 2.2,
      equations 2 to 6.
    """
    check_shapes(q, k, v, segment_ids, q_offset)
    for name, value in (("block_size", block_size), ("top_k", top_k)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    call = {"block_size": block_size, "top_k": top_k, "scale": scale}
    if implementation is None:
        implementation, why = _choose(q, k, v, segment_ids, q_offset, **call)
        _log_choice(implementation, why, q.shape, k.shape, block_size, top_k)
    elif reason := _cannot_run(implementation, q, k, v, **call):
        raise CannotRun(f"implementation={implementation!r} cannot run: {reason}")
    attend = functools.partial(_implementation(implementation), **call)
    if not isinstance(q_offset, int):
        q_offset = jnp.broadcast_to(q_offset, q.shape[:1])
    outs = Attended("BTHV", Residuals("BHT", "BH", "BHTJ"))
    out, residuals = attend_over_mesh(attend, q, k, v, segment_ids, q_offset, outs)
    return (out, residuals) if return_residuals else out


def moba_attention_plan(q, k, v, *, block_size, top_k, segment_ids=None, q_offset=0, implementation=None):
    """Says what `moba_attention` would do with arrays like these, computing nothing.

    Args: as `moba_attention`; q, k and v may be `jax.ShapeDtypeStruct`.

    Returns: text of three lines: implementation, reason, and an estimate of the memory of forward and
    backward beyond the inputs and outputs, in MiB.
    """
    check_shapes(q, k, v, segment_ids, q_offset)
    call = {"block_size": block_size, "top_k": top_k, "scale": 1.0}
    why = "named by the caller"
    if implementation is None:
        implementation, why = _choose(q, k, v, segment_ids, q_offset, **call)
    elif reason := _cannot_run(implementation, q, k, v, **call):
        why = f"named by the caller, but it cannot run: {reason}"
    _implementation(implementation)
    (B, T, H, _), S = q.shape, k.shape[1]
    if implementation == "xla":
        numbers = xla.working_numbers(q.shape, k.shape, v.shape, block_size, top_k, segment_ids is not None, q_offset)
    elif implementation == "sm90":
        packs = sm90.is_packed(T, S, block_size, segment_ids, q_offset)
        copies = sm90.is_copied(block_size, segment_ids)
        numbers = sm90.working_numbers(q.shape, v.shape, block_size, top_k, packs, copies)
    elif implementation == "tpu":
        numbers = tpu.working_numbers(q.shape, k.shape, v.shape, block_size, top_k)
    elif implementation == "full-xla":
        numbers = 2 * B * H * S * min(T, 512)
    elif implementation == "full-sm90":
        numbers = full_sm90.working_numbers(q.shape, v.shape)
    else:
        numbers = 3 * B * H * T * S
    return (
        f"implementation: {implementation}\nreason: {why}\n"
        f"memory: about {math.ceil(4 * numbers / 2**20)} MiB beyond inputs and outputs"
    )


def _choose(q, k, v, segment_ids, q_offset, *, block_size, top_k, scale):
    """The implementation None stands for, and the reason."""
    T = q.shape[1]
    if isinstance(q_offset, int) and q_offset + T <= block_size * top_k:
        not_sm90 = cannot_run_sm90(q, v, scale)
        full, _ = choose_full_attention(q.shape, k.shape, not_sm90)
        same = f"{q_offset + T} tokens fit in top_k * block_size = {block_size * top_k}: the same function"
        return f"full-{full}", same
    if block_size > T:
        return (
            "reference",
            f"{T} queries are fewer than one block of {block_size}: T x S memory is the smaller one",
        )
    call = {"block_size": block_size, "top_k": top_k, "scale": scale}
    not_sm90 = _cannot_run("sm90", q, k, v, **call)
    if not_sm90:
        reason = unproven() or f"not 'sm90': {not_sm90}"
        return "xla", f"its memory grows with S * top_k; {reason}"
    return "sm90", "a Hopper GPU, and a call that its kernels take"


def _cannot_run(implementation, q, k, v, *, block_size, top_k, scale):
    """Why the kernels of this name cannot compute this call here, or None."""
    call = (q.shape, k.shape, v.shape, q.dtype)
    if implementation == "sm90":
        reason = cannot_run_sm90(q, v, scale)
        return reason or sm90.refusal(*call, block_size=block_size, top_k=top_k, scale=scale)
    if implementation == "tpu":
        return not_tpu() or tpu.refusal(*call, block_size=block_size, top_k=top_k)
    return None


def _implementation(name):
    if name.removeprefix("full-") in FULL_ATTENTION and name.startswith("full-"):
        return functools.partial(_full_attention, FULL_ATTENTION[name.removeprefix("full-")])
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={name!r} is unknown; use None or one of {sorted(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[name]


def _full_attention(attend, q_BTHK, k_BSGK, v_BSGV, *, block_size, top_k, scale, segment_ids=None, q_offset):
    """Full attention, and the choice MoBA would have made; under jit the choice costs nothing unless it is
    used.
    """
    out, lse, max_logit = attend(q_BTHK, k_BSGK, v_BSGV, scale=scale, segment_ids=segment_ids, q_offset=q_offset)
    selected = xla.select(
        q_BTHK, k_BSGK, block_size=block_size, top_k=top_k, segment_ids=segment_ids, q_offset=q_offset
    )
    return Attended(out, Residuals(lse, max_logit, selected))


@functools.cache
def _log_choice(implementation, why, q_shape, k_shape, block_size, top_k):
    logger.info(
        "moba_attention: %r for q %s, k %s, block_size %d, top_k %d: %s",
        implementation,
        q_shape,
        k_shape,
        block_size,
        top_k,
        why,
    )
