"""The transformer: embed, blocks, norm, logits; and how many parameters and operations that is.

Parameters are stacked by shape, never by attention kind: `dense` holds the first layers, `moe` the others. One tree
therefore loads under full attention, MoBA or any list of the two.

Legend: B batch, T tokens, D model, V vocabulary, H heads, E experts, J experts per token, P dense layers,
M expert layers, L layers of a group, N chunks, C tokens of a chunk, S parts of a sequence.
"""

import dataclasses
import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from k2jax import sharding
from k2jax.config import GQAConfig, ModelConfig
from k2jax.layers.attention import make_attention, self_attention
from k2jax.layers.init import normal
from k2jax.layers.mlp import MLP, mlp
from k2jax.layers.moe import MoE, moe
from k2jax.layers.norm import RMSNorm, rms_norm


class DenseBlock(nnx.Module):
    """Attention and a dense MLP, each behind a norm."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.attn_norm = RMSNorm(cfg.dim)
        self.attn = make_attention(cfg, rngs)
        self.mlp_norm = RMSNorm(cfg.dim)
        self.mlp = MLP(cfg.dim, cfg.mlp_dim, cfg.init_std, rngs)


class MoEBlock(nnx.Module):
    """Attention and experts, each behind a norm."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.attn_norm = RMSNorm(cfg.dim)
        self.attn = make_attention(cfg, rngs)
        self.mlp_norm = RMSNorm(cfg.dim)
        self.moe = MoE(cfg, rngs)


class Matrix(nnx.Module):
    """One matrix, for the embedding and the head."""

    def __init__(self, std: float, rngs: nnx.Rngs, *shape: int):
        self.w = normal(rngs, std, *shape)


class Transformer(nnx.Module):
    """Definition and initialisation; the work is done by the functions below over the split parameters."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        self.embed = Matrix(cfg.init_std, rngs, cfg.vocab_size, cfg.dim)
        if cfg.num_dense_layers:
            self.dense = _stack(DenseBlock, cfg, rngs, cfg.num_dense_layers)
        if cfg.num_moe_layers:
            self.moe = _stack(MoEBlock, cfg, rngs, cfg.num_moe_layers)
        self.final_norm = RMSNorm(cfg.dim)
        self.head = Matrix(cfg.init_std, rngs, cfg.dim, cfg.vocab_size)

    def __call__(self, tokens_BT, segment_ids=None, positions=None):
        """Logits [B, T, V] and Aux, for short inputs."""
        return apply(parameters(self), self.cfg, tokens_BT, segment_ids, positions)


def _stack(block, cfg, rngs, num_layers):
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key):
        return block(cfg, nnx.Rngs(params=key))

    return make(jax.random.split(rngs.params(), num_layers))


def parameters(model: nnx.Module) -> dict:
    """The module's parameters as a nested dict of arrays."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def init_params(cfg: ModelConfig, key: jax.Array) -> dict:
    """Fresh parameters: a nested dict of float32 arrays, groups dense [P, ...] and moe [M, ...].

    Under a mesh they are laid out over it; their values are the same on every mesh.
    """
    # One compiled call: module by module, initialisation would dispatch every small operation by itself.
    return jax.jit(lambda key: sharding.shard_params(parameters(Transformer(cfg, nnx.Rngs(params=key)))))(key)


@partial(jax.tree_util.register_dataclass, data_fields=["max_logits", "expert_load_ME", "balance_loss", "routing",
                                                        "selections", "log_z_BT"], meta_fields=[])  # fmt: skip
@dataclasses.dataclass(frozen=True)
class Aux:
    """What a forward pass tells besides its result.

    max_logits: {'dense': [P, H], 'moe': [M, H]}, the tree that the optimizer's update takes, or None.
    expert_load_ME: routed tokens of each expert. balance_loss: sum over layers of the mean over sequences.
    routing: chosen experts [M, B, T, J], which can be pinned in another call, or None without experts.
    selections: {layer: [B, H, T, J]} blocks that MoBA chose, or None.
    log_z_BT: log of the sum of the exponentials of each position's logits, from `token_logprobs` alone.
    """

    max_logits: dict | None
    expert_load_ME: jax.Array | None
    balance_loss: jax.Array
    routing: jax.Array | None
    selections: dict | None
    log_z_BT: jax.Array | None = None


def hidden(
    params, cfg: ModelConfig, tokens_BT, segment_ids=None, positions=None, *,
    max_logits=False, selections=False, routing=None,
):  # fmt: skip
    """Final normalised states [B, T, D] and Aux.

    segment_ids: int [B, T], one id per packed document; tokens attend to their own document only, and 0 marks
    padding. positions: int [B, T]; by default they count from the start of each document.
    max_logits, selections: whether Aux holds them. routing: experts to use, as Aux.routing gives them.
    """
    tokens_BT = jnp.asarray(tokens_BT)
    if positions is None:
        positions = default_positions(tokens_BT, segment_ids)
    valid_BT = jnp.ones_like(tokens_BT, bool) if segment_ids is None else segment_ids > 0
    block = partial(
        _block, positions_BT=positions, segment_ids_BT=segment_ids, valid_BT=valid_BT, cfg=cfg,
        max_logits=max_logits, selections=selections,
    )  # fmt: skip
    with jax.named_scope("embed"):
        x_BTD = _embed(sharding.weight(params["embed"]["w"], cfg.dtype), tokens_BT)
    stats = {}
    first = 0
    for group, num_layers in (("dense", cfg.num_dense_layers), ("moe", cfg.num_moe_layers)):
        if num_layers:
            kinds = cfg.attention[first : first + num_layers]
            pinned = routing if group == "moe" else None
            x_BTD, stats[group] = _run_group(block, params[group], x_BTD, kinds, pinned, cfg)
        first += num_layers
    x_BTD = rms_norm(params["final_norm"], x_BTD, cfg.norm_eps)
    return x_BTD, _collect(stats, cfg, max_logits, selections)


def _embed(w_VD, tokens_BT):
    # Each device looks up its part of the features, which are then gathered: no copy of the whole matrix.
    if sharding.layout(w_VD) is None:
        return w_VD[tokens_BT]
    features = sharding.layout(w_VD)[1]
    x_BTD = w_VD.at[tokens_BT].get(out_sharding=PartitionSpec(*sharding.layout(tokens_BT), features))
    return sharding.whole(x_BTD, 2)


def default_positions(tokens_BT, segment_ids_BT):
    """Position of each token in its document."""
    index_BT = jnp.zeros_like(tokens_BT) + jnp.arange(tokens_BT.shape[1], dtype=tokens_BT.dtype)
    if segment_ids_BT is None:
        return index_BT
    segment_ids_BT = sharding.whole(segment_ids_BT, 1)  # a document's start may lie on another device
    first_of_document = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    starts_BT = jnp.where(jnp.pad(first_of_document, ((0, 0), (1, 0))), sharding.whole(index_BT, 1), 0)
    return index_BT - sharding.like(jax.lax.cummax(starts_BT, axis=1), tokens_BT)


def _block(x_BTD, p, kind, pinned_BTJ, *, positions_BT, segment_ids_BT, valid_BT, cfg, max_logits, selections):
    y_BTD, attn = self_attention(
        p["attn"], rms_norm(p["attn_norm"], x_BTD, cfg.norm_eps), positions_BT, segment_ids_BT, kind, cfg,
        max_logits=max_logits, selections=selections,
    )  # fmt: skip
    x_BTD = x_BTD + y_BTD
    y_BTD = rms_norm(p["mlp_norm"], x_BTD, cfg.norm_eps)
    if "moe" in p:
        y_BTD, experts = moe(p["moe"], y_BTD, valid_BT, cfg.moe, pinned_BTJ)
    else:
        y_BTD, experts = mlp(p["mlp"], y_BTD), None
    return x_BTD + y_BTD, (attn, experts)


def _run_group(block, params_L, x_BTD, kinds, pinned_LBTJ, cfg):
    """Scans every run of layers of one attention kind; returns the stats of each run."""
    runs, start = [], 0
    for kind, members in itertools.groupby(kinds):
        stop = start + len(list(members))
        layer = remat(partial(_scanned, block, kind), cfg.remat)
        inputs = (params_L, pinned_LBTJ)
        if (start, stop) != (0, len(kinds)):
            inputs = jax.tree.map(lambda leaf, a=start, b=stop: leaf[a:b], inputs)
        x_BTD, stats = jax.lax.scan(layer, x_BTD, inputs)
        runs.append((kind, stop - start, stats))
        start = stop
    return x_BTD, runs


def _scanned(block, kind, x_BTD, inputs):
    p, pinned_BTJ = inputs
    return block(x_BTD, p, kind, pinned_BTJ)


def remat(fn, policy: str):
    """The body of a scan with recomputation in its backward pass; policy is one of `config.REMAT`.

    The scan itself keeps the compiler from merging the recomputation with the first computation.
    """
    if policy == "none":
        if not sharding.stores_in_parts():
            return fn
        # A gathered weight that waits for the backward pass would undo what cutting the weights saves.
        keep = jax.checkpoint_policies.save_anything_except_these_names(sharding.GATHERED)
        return jax.checkpoint(fn, prevent_cse=False, policy=keep)
    if policy == "full":
        return jax.checkpoint(fn, prevent_cse=False)
    return jax.checkpoint(fn, prevent_cse=False, policy=getattr(jax.checkpoint_policies, policy))


def _collect(stats, cfg, max_logits, selections):
    def joined(group, pick):
        return jnp.concatenate([pick(run) for _, _, run in stats[group]])

    experts = "moe" in stats
    chosen = {}
    if selections:
        layer = 0
        for kind, count, (attn, _) in itertools.chain.from_iterable(stats.values()):
            if kind == "moba":
                chosen |= {layer + i: attn.selected_BHTJ[i] for i in range(count)}
            layer += count
    return Aux(
        max_logits={g: joined(g, lambda run: run[0].max_logit_H) for g in stats} if max_logits else None,
        expert_load_ME=joined("moe", lambda run: run[1].load_E) if experts else None,
        balance_loss=joined("moe", lambda run: run[1].balance_loss).sum() if experts else jnp.zeros(()),
        routing=joined("moe", lambda run: run[1].routing_BTJ) if experts else None,
        selections=chosen if selections else None,
    )


def logits(params, x_BTD):
    """Float32 logits [..., V] of final states [..., D]."""
    with jax.named_scope("head"):
        w_DV = sharding.weight(params["head"]["w"], x_BTD.dtype)
        return jnp.einsum("...D,DV->...V", x_BTD, w_DV, preferred_element_type=jnp.float32)


def apply(params, cfg: ModelConfig, tokens_BT, segment_ids=None, positions=None, **kwargs):
    """Logits [B, T, V] and Aux, for tests and short inputs; keyword arguments as in `hidden`."""
    x_BTD, aux = hidden(params, cfg, tokens_BT, segment_ids, positions, **kwargs)
    return logits(params, x_BTD), aux


def token_logprobs(
    params, cfg: ModelConfig, tokens_BT, segment_ids=None, positions=None, *, targets_BT=None, chunk=512, **kwargs
):
    """log p(target) of every position [B, T] float32, and Aux with log_z_BT.

    targets_BT: by default each position's next token, and 0 at the last position, which has none.
    chunk: tokens of a sequence whose logits exist at once; no [B, T, V] array is ever kept.
    """
    x_BTD, aux = hidden(params, cfg, tokens_BT, segment_ids, positions, **kwargs)
    last = None
    if targets_BT is None:
        targets_BT = sharding.like(jnp.pad(sharding.whole(tokens_BT, 1)[:, 1:], ((0, 0), (0, 1))), tokens_BT)
        last = tokens_BT.shape[1] - 1
    batch, length = tokens_BT.shape
    shards = sharding.num_shards(x_BTD, 1)
    chunk = min(chunk, length) // shards or 1
    padding = -(length // shards) % chunk

    def split(x_BT):
        # A chunk takes the same number of tokens from every part of a sequence that is cut.
        x_BST = x_BT.reshape(batch, shards, length // shards, *x_BT.shape[2:])
        x_BST = jnp.pad(x_BST, ((0, 0), (0, 0), (0, padding)) + ((0, 0),) * (x_BST.ndim - 3))
        return jnp.moveaxis(x_BST.reshape(batch, shards, -1, chunk, *x_BT.shape[2:]), 2, 0)

    score = jax.checkpoint(lambda inputs: _chunk_logprobs(params, *inputs))
    chunks_NBSC = jax.lax.map(score, (split(x_BTD), split(targets_BT)))

    def join(x_NBSC):
        x_BST = jnp.moveaxis(x_NBSC, 0, 2).reshape(batch, shards, -1)[:, :, : length // shards]
        return x_BST.reshape(batch, length)

    logp_BT, log_z_BT = map(join, chunks_NBSC)
    if last is not None:
        logp_BT = jnp.where(jnp.arange(length) == last, 0.0, logp_BT)
    return logp_BT, dataclasses.replace(aux, log_z_BT=log_z_BT)


def _chunk_logprobs(params, x_BSCD, targets_BSC):
    with jax.named_scope("token_logprobs"):
        logits_BSCV = logits(params, x_BSCD)
        # A masked sum instead of a gather: it keeps the batch's sharding and its gradient is no scatter.
        hit_BSCV = targets_BSC[..., None] == jnp.arange(logits_BSCV.shape[-1])
        log_z_BSC = jax.nn.logsumexp(logits_BSCV, axis=-1)
        return jnp.sum(jnp.where(hit_BSCV, logits_BSCV, 0.0), axis=-1) - log_z_BSC, log_z_BSC


@dataclasses.dataclass(frozen=True)
class ParamCounts:
    """total; active per token, with embedding and head; embedding alone."""

    total: int
    active: int
    embedding: int


def count_params(cfg: ModelConfig) -> ParamCounts:
    """Counts by shape evaluation: nothing is allocated, so the 1T model counts on a laptop."""
    shapes = jax.eval_shape(partial(init_params, cfg), jax.random.key(0))
    total = _size(shapes)
    active = total
    if cfg.num_moe_layers:
        experts = _size(shapes["moe"]["moe"]["experts"])
        active -= experts - experts * cfg.moe.experts_per_token // cfg.moe.num_experts
    return ParamCounts(total, active, _size(shapes["embed"]))


def _size(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """Training FLOPs per token: forward and backward, active weights without the embedding's look-up, and attention.

    Attention counts the pairs that the masks leave: the causal half, or MoBA's selected blocks. No recomputation.
    """
    counts = count_params(cfg)
    if isinstance(cfg.attn, GQAConfig):
        pair = cfg.num_heads * 2 * cfg.attn.head_dim
    else:
        pair = cfg.num_heads * (cfg.attn.nope_dim + cfg.attn.rope_dim + cfg.attn.v_dim)
    position = np.arange(seq_len)
    keys = {"full": float(np.mean(position + 1))}
    if cfg.moba is not None:
        block = position // cfg.moba.block_size
        history = np.minimum(block, cfg.moba.top_k - 1) * cfg.moba.block_size
        keys["moba"] = float(np.mean(history + position % cfg.moba.block_size + 1))
    attention = sum(keys[kind] for kind in cfg.attention) * pair
    return 6.0 * (counts.active - counts.embedding + attention)
