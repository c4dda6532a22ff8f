"""Full causal attention: one function, several implementations of the same mathematics.

Legend: B batch, T queries, S keys, H query heads, G key heads (H % G == 0), K query/key size, V value size.
"""

import functools
import logging

import jax.numpy as jnp

from k2jax.kernels.attention import reference, sm90, tpu, xla
from k2jax.kernels.hopper import CannotRun, not_hopper
from k2jax.kernels.partition import attend_over_mesh, num_cuts
from k2jax.kernels.tpu import not_tpu, unproven

logger = logging.getLogger(__name__)

# Above this, skipping most of the future saves more than computing the logits again in the backward costs.
REFERENCE_MAX_PAIRS = 2**17

# Queries of a device, from which on two halves still are whole tiles of the kernels.
KERNELS_BALANCE_FROM = 256

IMPLEMENTATIONS = {
    "reference": reference.attention,
    "xla": xla.attention,
    "sm90": sm90.attention,
    "tpu": tpu.attention,
}


def attention(
    q_BTHK,
    k_BSGK,
    v_BSGV,
    *,
    scale,
    segment_ids=None,
    q_offset=0,
    max_logits=False,
    implementation=None,
):
    """Softmax attention in which a query sees the keys at its own and earlier positions of its own segment.

    Args:
      q_BTHK: queries at positions `q_offset .. q_offset + T - 1` of the keys, bfloat16, float16 or float32.
      k_BSGK, v_BSGV: keys and values; query head h reads key head h // (H // G). K and V may differ (MLA:
        192, 128).
      scale: multiplies the logits before the softmax, which runs in float32.
      segment_ids: int32 [B, S]; tokens attend only where the ids are equal. None is one segment per row.
      q_offset: an int, or int32 [B] (may be traced); `q_offset + T <= S` must hold.
      max_logits: also return each head's largest logit, which QK-Clip needs.
      implementation: 'reference' (keeps T x S logits), 'xla' (chunks of queries, recomputed in the backward),
        'sm90' (Hopper GPUs), 'tpu' (TPUs), or None, which chooses by size and device and logs the choice once. No TPU
        has run 'tpu', so None does not choose it.

    Returns:
      out_BTHV in v's dtype, or `(out_BTHV, max_logit_BH)`: float32, signed, after `scale`, over unmasked
      pairs only, without gradient.

    Raises:
      ValueError: for shapes that do not fit together or an unknown implementation; CannotRun, which is one, for one
        that cannot do this here.

    Source: Vaswani et al., "Attention Is All You Need" (arXiv 1706.03762), equation 1; the chunked form
    follows Rabe and Staats, "Self-attention Does Not Need O(n^2) Memory" (arXiv 2112.05682).
    """
    check_shapes(q_BTHK, k_BSGK, v_BSGV, segment_ids, q_offset)
    if implementation is None:
        not_sm90 = cannot_run_sm90(q_BTHK, v_BSGV, scale)
        implementation, why = choose(q_BTHK.shape, k_BSGK.shape, not_sm90)
        _log_choice(implementation, why, q_BTHK.shape, k_BSGK.shape)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is unknown; use None or one of {sorted(IMPLEMENTATIONS)}")
    reason = None
    if implementation == "sm90":
        reason = cannot_run_sm90(q_BTHK, v_BSGV, scale)
    elif implementation == "tpu":
        reason = cannot_run_tpu(q_BTHK, k_BSGK, v_BSGV)
    if reason:
        raise CannotRun(f"implementation={implementation!r} cannot run: {reason}")
    attend = functools.partial(IMPLEMENTATIONS[implementation], scale=scale)
    if not isinstance(q_offset, int):
        q_offset = jnp.broadcast_to(q_offset, q_BTHK.shape[:1])
    outs = reference.Attended("BTHV", "BHT", "BH")
    # The kernels skip the future; XLA's form does not, so exchanging halves would gain nothing there.
    balance_from = KERNELS_BALANCE_FROM if implementation in ("sm90", "tpu") else None
    attended = attend_over_mesh(attend, q_BTHK, k_BSGK, v_BSGV, segment_ids, q_offset, outs, balance_from)
    return (attended.out_BTHV, attended.max_logit_BH) if max_logits else attended.out_BTHV


def choose(q_shape, k_shape, not_sm90: str | None) -> tuple[str, str]:
    """The implementation None stands for, and the reason. not_sm90: why the Hopper kernels cannot run, or None."""
    pairs = q_shape[1] * k_shape[1]
    if pairs <= REFERENCE_MAX_PAIRS:
        return "reference", f"{pairs} pairs of queries and keys are at most {REFERENCE_MAX_PAIRS}"
    if not_sm90:
        return "xla", unproven() or f"not 'sm90': {not_sm90}"
    return "sm90", "a Hopper GPU, and a call that its kernels take"


def cannot_run_sm90(q_BTHK, v_BSGV, scale) -> str | None:
    """Why the Hopper kernels cannot compute this call of full attention here, or None."""
    B, T, H, K = q_BTHK.shape
    return not_hopper() or sm90.refusal((B, T // num_cuts(q_BTHK), H, K), v_BSGV.shape, q_BTHK.dtype, scale=scale)


def cannot_run_tpu(q_BTHK, k_BSGK, v_BSGV) -> str | None:
    """Why the TPU kernels cannot compute this call of full attention here, or None."""
    return not_tpu() or tpu.refusal(q_BTHK.shape, k_BSGK.shape, v_BSGV.shape, q_BTHK.dtype)


def check_shapes(q_BTHK, k_BSGK, v_BSGV, segment_ids, q_offset):
    """Raises ValueError, with the argument and the fix, where the shapes of an attention call do not fit."""
    for name, x in (("q", q_BTHK), ("k", k_BSGK), ("v", v_BSGV)):
        if len(x.shape) != 4:
            raise ValueError(f"{name}.shape={x.shape} must have four dimensions: batch, position, head, size")
    (B, T, H, K), (S, G) = q_BTHK.shape, k_BSGK.shape[1:3]
    if H % G:
        raise ValueError(f"q has {H} heads and k has {G}: the query heads must be a multiple of the key heads")
    if k_BSGK.shape != (B, S, G, K):
        raise ValueError(f"k.shape={k_BSGK.shape} must be (batch, keys, key heads, size) = {(B, S, G, K)}, from q")
    if v_BSGV.shape[:3] != (B, S, G):
        raise ValueError(f"v.shape={v_BSGV.shape} must begin with {(B, S, G)}, as k does")
    if segment_ids is not None and segment_ids.shape != (B, S):
        raise ValueError(f"segment_ids.shape={segment_ids.shape} must be (batch, keys) = {(B, S)}: ids for every key")
    last = T + q_offset if isinstance(q_offset, int) else T
    if last > S or (isinstance(q_offset, int) and q_offset < 0):
        raise ValueError(
            f"q_offset={q_offset} with {T} queries leaves the {S} keys: 0 <= q_offset <= {S - T} must hold"
        )


@functools.cache
def _log_choice(implementation, why, q_shape, k_shape):
    logger.info("attention: %r for q %s, k %s: %s", implementation, q_shape, k_shape, why)
