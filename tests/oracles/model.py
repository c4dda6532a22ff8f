"""A whole small Kimi K2 style model in float64: sequence by sequence, layer by layer, expert by token.

`params` is the project's parameter tree: groups `dense` and `moe` stack their layers on axis 0.

Legend: B sequences, T tokens, D model size, V vocabulary, H heads, E experts.
"""

from dataclasses import dataclass, field

import numpy as np

from . import router
from .attention import dense_attention
from .gqa import gqa_qkv
from .mla import Mla, mla_qkv, rms_norm
from .moba import moba
from .yarn import softmax_scale


@dataclass(frozen=True)
class ModelSpec:
    """What the parameter shapes alone do not say. `attention` has 'full' or 'moba' for each layer."""

    attention: tuple[str, ...]
    top_k: int = 2
    scaling: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    mla: Mla | None = None
    theta: float = 50000.0
    eps: float = 1e-6
    moba_block: int = 0
    moba_top_k: int = 0


@dataclass
class ModelResult:
    """Logits, the tree of per-head max logits, and per MoE layer the ids and scores of each sequence."""

    logits_BTV: np.ndarray
    max_logits: dict
    ids: list = field(default_factory=list)
    scores: list = field(default_factory=list)


def swiglu(x, w):
    """down(silu(gate(x)) * up(x)) of one token or many."""
    gate = x @ w["w_gate"]
    return (gate / (1 + np.exp(-gate)) * (x @ w["w_up"])) @ w["w_down"]


def attention_layer(x_TD, attn, spec, kind, segment_ids_T, positions_T):
    """(output [T,D], max logit per head) of one attention layer."""
    if spec.mla is None:
        q, k, v = gqa_qkv(x_TD, attn, spec.theta, positions_T)
        scale = q.shape[-1] ** -0.5
    else:
        q, k, v = mla_qkv(x_TD, attn, spec.mla, positions_T)
        scale = softmax_scale(q.shape[-1], spec.mla.yarn)
    if kind == "moba":
        result = moba(q, k, v, spec.moba_block, spec.moba_top_k, scale, segment_ids_T)
        out, top = result.out_THV, result.max_logit_H
    else:
        out, _, top = dense_attention(q, k, v, scale, segment_ids_T)
    return np.einsum("thv,hvd->td", out, attn["wo"]), top


def moe_layer(x_TD, moe, spec):
    """(output [T,D], ids, scores): the chosen experts, weighted, plus the unscaled shared expert."""
    gate = moe["router"]
    ids, weights, scores = router.route(
        x_TD, gate["w"], gate["bias"], spec.top_k, spec.scaling, spec.n_group, spec.topk_group
    )
    out = np.zeros_like(x_TD)
    for t in range(x_TD.shape[0]):
        for expert, weight in zip(ids[t], weights[t], strict=True):
            out[t] += weight * swiglu(x_TD[t], {name: w[expert] for name, w in moe["experts"].items()})
        out[t] += swiglu(x_TD[t], moe["shared"])
    return out, ids, scores


def forward(params, spec, tokens_BT, segment_ids_BT=None, positions_BT=None):
    """Logits and max logits of the whole model, as a ModelResult."""
    params = _map(params, lambda leaf: np.asarray(leaf, np.float64))
    sizes = {name: len(params[name]["attn_norm"]["scale"]) for name in ("dense", "moe") if name in params}
    max_logits = {name: [] for name in sizes}
    x_seqs = [params["embed"]["w"][tokens] for tokens in np.asarray(tokens_BT)]
    result = ModelResult(None, {})
    layer = 0
    for name, count in sizes.items():
        for i in range(count):
            block = _map(params[name], lambda leaf, i=i: leaf[i])
            x_seqs, top, ids, scores = _block(x_seqs, block, spec, spec.attention[layer], segment_ids_BT, positions_BT)
            max_logits[name].append(top)
            if name == "moe":
                result.ids.append(ids)
                result.scores.append(scores)
            layer += 1
    final = [rms_norm(x, params["final_norm"]["scale"], spec.eps) for x in x_seqs]
    result.logits_BTV = np.stack([x @ params["head"]["w"] for x in final])
    result.max_logits = {name: np.stack(rows) for name, rows in max_logits.items()}
    return result


def _block(x_seqs, block, spec, kind, segment_ids_BT, positions_BT):
    """One pre-norm block on every sequence; the maximum is taken over the batch."""
    outs, tops, all_ids, all_scores = [], [], [], []
    for b, x in enumerate(x_seqs):
        segments = None if segment_ids_BT is None else np.asarray(segment_ids_BT)[b]
        positions = None if positions_BT is None else np.asarray(positions_BT)[b]
        normed = rms_norm(x, block["attn_norm"]["scale"], spec.eps)
        out, top = attention_layer(normed, block["attn"], spec, kind, segments, positions)
        x = x + out
        normed = rms_norm(x, block["mlp_norm"]["scale"], spec.eps)
        if "mlp" in block:
            x = x + swiglu(normed, block["mlp"])
        else:
            out, ids, scores = moe_layer(normed, block["moe"], spec)
            x = x + out
            all_ids.append(ids)
            all_scores.append(scores)
        outs.append(x)
        tops.append(top)
    return outs, np.max(tops, axis=0), all_ids, all_scores


def _map(tree, fn):
    if isinstance(tree, dict):
        return {name: _map(value, fn) for name, value in tree.items()}
    return fn(tree)
