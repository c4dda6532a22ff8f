"""The router: which experts a token goes to, with which weights, and how their load is kept even.

Legend: B batch, T tokens, D model, E experts, J experts per token, G expert groups, P experts of a group.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from k2jax import sharding
from k2jax.config import MoEConfig
from k2jax.layers.init import normal


class Router(nnx.Module):
    """Scores of the experts, and the bias that the balance rule alone writes."""

    def __init__(self, dim: int, num_experts: int, std: float, rngs: nnx.Rngs):
        self.w = normal(rngs, std, dim, num_experts)
        self.bias = nnx.Param(jnp.zeros(num_experts, jnp.float32))


def route(p, x_BTD, cfg: MoEConfig, pinned_BTJ=None):
    """Expert ids, their weights and the scores of all experts, as released with Kimi K2.

    Scores are float32 sigmoids. The bias takes part in the selection only; the weights are the chosen scores without
    it, normalised to one and multiplied by route_scale. With groups, a token sees the experts of its
    groups_per_token best groups; the others are masked with -inf, since a negative bias makes 0 a winning score.
    pinned_BTJ: ids to use instead of selecting, for comparisons in which the selection must not differ.
    Returns (ids_BTJ int32, weights_BTJ float32, scores_BTE float32). The lowest id wins a tie.
    """
    with jax.named_scope("router"):
        x_BTD, w_DE = x_BTD.astype(jnp.float32), sharding.weight(p["w"], jnp.float32)
        logits_BTE = jnp.einsum("BTD,DE->BTE", x_BTD, w_DE, precision=jax.lax.Precision.HIGHEST)
        scores_BTE = jax.nn.sigmoid(logits_BTE)
        if pinned_BTJ is None:
            choice_BTE = jax.lax.stop_gradient(scores_BTE + p["bias"])
            if cfg.num_groups > 1:
                choice_BTE = _mask_other_groups(choice_BTE, cfg)
            ids_BTJ = jax.lax.top_k(choice_BTE, cfg.experts_per_token)[1]
        else:
            ids_BTJ = pinned_BTJ
        chosen_BTJE = ids_BTJ[..., None] == jnp.arange(cfg.num_experts)
        weights_BTJ = jnp.sum(jnp.where(chosen_BTJE, scores_BTE[:, :, None], 0.0), axis=-1)
        weights_BTJ = weights_BTJ / (weights_BTJ.sum(axis=-1, keepdims=True) + 1e-20) * cfg.route_scale
        return ids_BTJ, weights_BTJ, scores_BTE


def _mask_other_groups(choice_BTE, cfg: MoEConfig):
    # A group is scored by the sum of its two best experts (DeepSeek-V3, released modelling file).
    size = cfg.num_experts // cfg.num_groups
    choice_BTGP = choice_BTE.reshape(*choice_BTE.shape[:2], cfg.num_groups, size)
    group_score_BTG = jax.lax.top_k(choice_BTGP, 2)[0].sum(axis=-1)
    best = jax.lax.top_k(group_score_BTG, cfg.groups_per_token)[1]
    kept_BTG = (best[..., None] == jnp.arange(cfg.num_groups)).any(axis=-2)
    return jnp.where(kept_BTG[..., None], choice_BTGP, -jnp.inf).reshape(choice_BTE.shape)


def balance_loss(scores_BTE, ids_BTJ, valid_BT):
    """Sum over the sequences of sum_e f_e P_e (DeepSeek-V3, equations 17-20), without its factor alpha.

    f_e is E / (J T) times the number of the sequence's tokens that chose e, P_e the mean share of e in their scores;
    it is 1 for an even load. Tokens with valid_BT false (padding) do not count.
    """
    num_experts, per_token = scores_BTE.shape[-1], ids_BTJ.shape[-1]
    valid_BT1 = valid_BT[..., None].astype(jnp.float32)
    tokens_B1 = jnp.maximum(valid_BT1.sum(axis=1), 1.0)
    chosen_BTE = (ids_BTJ[..., None] == jnp.arange(num_experts)).any(axis=-2)
    f_BE = (chosen_BTE * valid_BT1).sum(axis=1) * (num_experts / per_token) / tokens_B1
    share_BTE = scores_BTE / (scores_BTE.sum(axis=-1, keepdims=True) + 1e-20)
    p_BE = (share_BTE * valid_BT1).sum(axis=1) / tokens_B1
    return jnp.sum(jax.lax.stop_gradient(f_BE) * p_BE)


def update_router_bias(bias_E, load_E, rate: float):
    """Moonlight's rule (arXiv 2502.16982, appendix C): b += rate * (sign(e) - mean sign(e)).

    e is the mean load minus the expert's load: an expert with too few tokens is chosen more easily from now on.
    Leading axes (layers) are batched.
    """
    sign_E = jnp.sign(load_E.mean(axis=-1, keepdims=True) - load_E)
    return bias_E + rate * (sign_E - sign_E.mean(axis=-1, keepdims=True))
