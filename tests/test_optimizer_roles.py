"""Which rule writes which parameter: the whole table of every architecture, and where QK-Clip cuts."""

import jax
import pytest

from k2jax import model
from k2jax.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig, load_config
from k2jax.matrix_specs import stacks
from k2jax.muonclip import EXTERNAL, MatrixSpec, MHAClip, MLAClip
from k2jax.training.optimizer import clip_specs, leaf_roles, per_head_matrices, role

LATENT = MLAConfig(kv_lora_rank=6, nope_dim=4, rope_dim=2, v_dim=3, q_lora_rank=5)
LATENT_NO_Q = MLAConfig(kv_lora_rank=6, nope_dim=4, rope_dim=2, v_dim=3)
GROUPED = GQAConfig(num_kv_heads=1, head_dim=4)

# path -> (role, shape of one layer's matrix as (fan-in, fan-out)); axes are read off the shapes below.
ADAM, OTHER = "adam", "external"
OUTSIDE = {"embed/w": ADAM, "final_norm/scale": ADAM, "head/w": ADAM}
NORMS = {"attn_norm/scale": ADAM, "mlp_norm/scale": ADAM}
DENSE = {f"mlp/{name}": (-2, -1) for name in ("w_gate", "w_up", "w_down")}
MOE = {
    "moe/router/w": (-2, -1),
    "moe/router/bias": OTHER,
    **{f"moe/{part}/{name}": (-2, -1) for part in ("experts", "shared") for name in ("w_gate", "w_up", "w_down")},
}
HEADS_OUT, HEADS_IN = (-3, (-2, -1)), ((-3, -2), -1)
KEY_VALUE = {"attn/wkv_a": (-2, -1), "attn/kv_norm/scale": ADAM, "attn/wkv_b": HEADS_OUT, "attn/wo": HEADS_IN}
ATTENTION = {
    LATENT: {"attn/wq_a": (-2, -1), "attn/q_norm/scale": ADAM, "attn/wq_b": HEADS_OUT, **KEY_VALUE},
    LATENT_NO_Q: {"attn/wq": HEADS_OUT, **KEY_VALUE},
    GROUPED: {"attn/wq": HEADS_OUT, "attn/wk": HEADS_OUT, "attn/wv": HEADS_OUT, "attn/wo": HEADS_IN},
}
FORMS = pytest.mark.parametrize("attn", ATTENTION, ids=["latent", "latent_without_q", "grouped"])


def config(attn, num_dense_layers=1, num_shared=1):
    return ModelConfig(
        vocab_size=11,
        dim=8,
        num_layers=3,
        num_heads=2,
        mlp_dim=10,
        attn=attn,
        attention=("full",) * 3,
        num_dense_layers=num_dense_layers,
        moe=MoEConfig(num_experts=4, experts_per_token=2, expert_dim=6, num_shared=num_shared),
    )


def table(cfg):
    shapes = jax.eval_shape(lambda: model.init_params(cfg, jax.random.key(0)))
    paths = ("/".join(key.key for key in keys) for keys, _ in jax.tree_util.tree_leaves_with_path(shapes))
    return {path: _told(role(path)) for path in paths}


def _told(found):
    if found is None:
        return ADAM
    return OTHER if found is EXTERNAL else (found.reduction_axis, found.output_axis)


@FORMS
def test_every_leaf_has_its_rule_and_its_axes(attn):
    block = NORMS | ATTENTION[attn]
    want = OUTSIDE | {f"dense/{path}": told for path, told in (block | DENSE).items()}
    want |= {f"moe/{path}": told for path, told in (block | MOE).items()}
    assert table(config(attn)) == want


def test_without_shared_experts_there_is_nothing_to_write():
    paths = table(config(LATENT, num_shared=0))
    assert not [path for path in paths if "shared" in path]


@FORMS
def test_the_axes_cut_each_weight_into_fan_in_and_fan_out(attn):
    """Fan-in is what the layer contracts with its input: D for projections in, heads times values for the output."""
    D, Q, C, H, N, R, V = 8, 5, 6, 2, 4, 2, 3
    if attn is GROUPED:
        want = {"wq": (D, H * 4), "wk": (D, 1 * 4), "wv": (D, 1 * 4), "wo": (H * 4, D)}
    else:
        want = {"wkv_a": (D, C + R), "wkv_b": (C, H * (N + V)), "wo": (H * V, D)}
        want |= {"wq": (D, H * (N + R))} if attn is LATENT_NO_Q else {"wq_a": (D, Q), "wq_b": (Q, H * (N + R))}
    shapes = jax.eval_shape(lambda: model.init_params(config(attn), jax.random.key(0)))
    for name, sides in want.items():
        shape = shapes["dense"]["attn"][name].shape
        spec = role(f"dense/attn/{name}")
        assert tuple(_size(shape, axes) for axes in (spec.reduction_axis, spec.output_axis)) == sides


@FORMS
def test_per_head_cuts_queries_keys_and_values_and_nothing_else(attn):
    D, Q, C, H, N, R, V = 8, 5, 6, 2, 4, 2, 3
    if attn is GROUPED:
        want = {"wq": [(H, D, 4)], "wk": [(1, D, 4)], "wv": [(1, D, 4)]}
    else:
        want = {"wkv_a": [(1, D, C), (1, D, R)], "wkv_b": [(H, C, N), (H, C, V)]}
        want |= {"wq": [(H, D, N + R)]} if attn is LATENT_NO_Q else {"wq_b": [(H, Q, N + R)]}
    cfg = config(attn)
    shapes = jax.eval_shape(lambda: model.init_params(cfg, jax.random.key(0)))
    matrices = per_head_matrices(cfg.attn)
    for name, sides in want.items():
        found = stacks(shapes["dense"]["attn"][name].shape, role(f"dense/attn/{name}", matrices=matrices))
        assert [stack[3:] for stack in found] == sides
    same = table(cfg).keys() - {f"{group}/attn/{name}" for name in want for group in ("dense", "moe")}
    assert all(role(path, matrices=matrices) is role(path) for path in same)


def _size(shape, axes):
    size = 1
    for axis in axes if isinstance(axes, tuple) else (axes,):
        size *= shape[axis]
    return size


def test_a_leaf_without_a_rule_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'moe/attn/w_gate_new'.*training/optimizer\.py"):
        role("moe/attn/w_gate_new")


def test_qk_clip_finds_the_heads_of_every_group():
    assert clip_specs(config(LATENT)) == {
        group: MLAClip(q=f"{group}/attn/wq_b", kv=f"{group}/attn/wkv_b", nope=4) for group in ("dense", "moe")
    }
    assert clip_specs(config(LATENT_NO_Q, num_dense_layers=0)) == {
        "moe": MLAClip(q="moe/attn/wq", kv="moe/attn/wkv_b", nope=4)
    }
    assert clip_specs(config(GROUPED, num_dense_layers=3)) == {"dense": MHAClip(q="dense/attn/wq", k="dense/attn/wk")}


@FORMS
def test_qk_clip_names_leaves_that_exist_keyed_as_the_max_logits(attn):
    cfg = config(attn)
    paths = table(cfg)
    tokens = jax.ShapeDtypeStruct((1, 4), "int32")
    aux = jax.eval_shape(
        lambda t: model.hidden(model.init_params(cfg, jax.random.key(0)), cfg, t, max_logits=True)[1], tokens
    )
    specs = clip_specs(cfg)
    assert specs.keys() == aux.max_logits.keys()
    for spec in specs.values():
        assert spec.q in paths
        assert (spec.k if attn is GROUPED else spec.kv) in paths


def test_per_head_is_one_switch_which_kimi_k2_leaves_off():
    off = load_config("configs/kimi_k2.py")
    on = load_config("configs/kimi_k2.py", {"optimizer.per_head": True})
    assert leaf_roles(off)("moe/attn/wq_b", None) == MatrixSpec(-3, (-2, -1))
    assert leaf_roles(on)("moe/attn/wq_b", None) == MatrixSpec(-3, -1)
    assert leaf_roles(on)("moe/attn/wkv_b", None).blocks == (128, 128)
    assert leaf_roles(on)("moe/attn/wkv_a", None).blocks == (512, 64)
