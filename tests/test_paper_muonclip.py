"""MuonClip in float32 against Algorithm 1 of the Kimi K2 report in float64, and what QK-Clip does to logits.

Legend: L layers, T tokens, D model size, H query heads, G key heads, K head size, E experts, F expert size.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from k2jax.muonclip import EXTERNAL, NS, MatrixSpec, MHAClip, MLAClip, QKClip, muonclip
from tests.oracles import algorithm1, gqa, mla

L, D, H, G = 2, 12, 4, 2
NOPE, ROPE, V, K, LATENT, Q_RANK = 6, 4, 5, 6, 9, 8
IN_PROJECTION, OUT_PROJECTION = MatrixSpec(-3, (-2, -1)), MatrixSpec((-3, -2), -1)
# Compilation is most of the time of this file, and tiny arrays need no optimised code.
QUICK_COMPILE = {"xla_backend_optimization_level": 0}

MLA_SHAPES = {
    "wq_a": (L, D, Q_RANK),
    "q_norm/scale": (L, Q_RANK),
    "wq_b": (L, Q_RANK, H, NOPE + ROPE),
    "wkv_a": (L, D, LATENT + ROPE),
    "kv_norm/scale": (L, LATENT),
    "wkv_b": (L, LATENT, H, NOPE + V),
    "wo": (L, H, V, D),
}
PLAIN_Q_SHAPES = {"wq": (L, D, H, NOPE + ROPE)} | {
    name: shape for name, shape in MLA_SHAPES.items() if name not in ("wq_a", "q_norm/scale", "wq_b")
}
GQA_SHAPES = {"wq": (L, D, H, K), "wk": (L, D, G, K), "wv": (L, D, G, V), "wo": (L, H, V, D)}
MHA_SHAPES = {"wq": (D, H, K), "wk": (D, H, K), "wv": (D, H, V), "wo": (H, V, D)}
OTHER_SHAPES = {
    "embed/w": (20, D),
    "head/w": (D, 20),
    "norm/scale": (L, D),
    "experts/w_up": (L, 3, D, 7),
    "experts/w_down": (L, 3, 7, D),
    "router/w": (L, D, 3),
    "router/bias": (L, 3),
}
SHAPES = (
    {f"mla/{name}": shape for name, shape in MLA_SHAPES.items()}
    | {f"plain_q/{name}": shape for name, shape in PLAIN_Q_SHAPES.items()}
    | {f"gqa/{name}": shape for name, shape in GQA_SHAPES.items()}
    | {f"mha/{name}": shape for name, shape in MHA_SHAPES.items()}
    | OTHER_SHAPES
)
CLIPS = {
    "mla": MLAClip(q="mla/wq_b", kv="mla/wkv_b", nope=NOPE),
    "plain_q": MLAClip(q="plain_q/wq", kv="plain_q/wkv_b", nope=NOPE),
    "gqa": MHAClip(q="gqa/wq", k="gqa/wk"),
    "mha": MHAClip(q="mha/wq", k="mha/wk"),
}


def matrix_spec(path, leaf):
    """Every projection is one matrix, every expert is one; norms, embedding and head go to AdamW."""
    name = path.split("/")[-1]
    if path == "router/bias":
        return EXTERNAL
    if path in ("embed/w", "head/w") or name == "scale":
        return None
    if name in ("wq", "wq_b", "wk", "wv", "wkv_b"):
        return IN_PROJECTION
    return OUT_PROJECTION if name == "wo" else MatrixSpec()


def oracle_matrices():
    """The same rule in the oracle's form: (batch axes, axes of the rows)."""
    out = {}
    for path, shape in SHAPES.items():
        name = path.split("/")[-1]
        if path in ("embed/w", "head/w", "router/bias") or name == "scale":
            continue
        inputs = 2 if name == "wo" else 1
        outputs = 2 if name in ("wq", "wq_b", "wk", "wv", "wkv_b") else 1
        out[path] = (len(shape) - inputs - outputs, inputs)
    return out


def nest(flat):
    tree = {}
    for path, leaf in flat.items():
        *groups, name = path.split("/")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = leaf
    return tree


def flatten(tree, prefix=""):
    flat = {}
    for name, leaf in tree.items():
        path = f"{prefix}{name}"
        flat |= flatten(leaf, f"{path}/") if isinstance(leaf, dict) else {path: leaf}
    return flat


def random_leaves(rng, shapes, size=0.3):
    return {path: np.float32(size * rng.standard_normal(shape)) for path, shape in shapes.items()}


def oracle_clip(flat, max_logits, tau):
    """The oracle's clip on each layer of each attention group alone."""
    out = dict(flat)
    rules = {"gqa": algorithm1.clip_gqa, "mha": algorithm1.clip_mha}
    for group, tops in max_logits.items():
        names = [path for path in flat if path.startswith(f"{group}/")]
        one_layer = tops.ndim == 1
        for i, top in enumerate([tops] if one_layer else tops):
            layer = {path.split("/", 1)[1]: out[path] if one_layer else out[path][i] for path in names}
            if group in rules:
                layer = rules[group](layer, top, tau)
            else:
                layer = algorithm1.clip_mla(layer, top, tau, NOPE)
            for path in names:
                new = layer[path.split("/", 1)[1]]
                if one_layer:
                    out[path] = new
                else:
                    out[path] = np.stack([*out[path][:i], new, *out[path][i + 1 :]])
    return out


def random_max_logits(rng):
    """Maxima below and above tau = 100, a negative one, and one that is not finite."""
    shapes = {"mla": (L, H), "plain_q": (L, H), "gqa": (L, H), "mha": (H,)}
    tops = {group: np.float32(rng.uniform(20, 180, shape)) for group, shape in shapes.items()}
    tops["mla"][0, 1], tops["gqa"][1, 2], tops["plain_q"][0, 0] = -30.0, -np.inf, np.nan
    return tops


def schedule(step):
    return 0.004 * (1 + step) / 5 if step < 5 else 0.004 - 1e-4 * (step - 5)


def jax_schedule(step):
    return jnp.where(step < 5, 0.004 * (1 + step) / 5, 0.004 - 1e-4 * (step - 5))


def test_twenty_steps_equal_algorithm_1():
    check_twenty_steps(SHAPES)


def test_twenty_steps_with_nesterov_momentum():
    check_twenty_steps({path: SHAPES[path] for path in SHAPES if path.startswith("mha/")}, nesterov=True)


def check_twenty_steps(shapes, nesterov=False):
    """Schedule, decay, momentum, AdamW and the clip together, on random gradients and max logits."""
    rng = np.random.default_rng(0)
    flat = random_leaves(rng, shapes)
    clips = {group: clip for group, clip in CLIPS.items() if f"{group}/wo" in shapes}
    tx = muonclip(
        jax_schedule,
        nesterov=nesterov,
        matrix_specs=matrix_spec,
        ns=NS.k2(dtype="float32"),
        qk_clip=QKClip(clips, tau=100.0),
    )
    params = nest({path: jnp.array(leaf) for path, leaf in flat.items()})
    state = tx.init(params)

    def step(params, state, grads, max_logits):
        updates, state = tx.update(grads, state, params, max_logits=max_logits)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, compiler_options=QUICK_COMPILE)

    trained = {path: leaf for path, leaf in flat.items() if path != "router/bias"}
    matrices, oracle_state = oracle_matrices(), algorithm1.init(trained)
    for _ in range(20):
        grads = random_leaves(rng, shapes, size=0.05)
        max_logits = {group: tops for group, tops in random_max_logits(rng).items() if group in clips}
        params, state = step(params, state, nest(grads), max_logits)
        trained, oracle_state = algorithm1.update(trained, grads, oracle_state, schedule, matrices, nesterov=nesterov)
        trained = oracle_clip(trained, max_logits, 100.0)
    ours = flatten(params)
    for path, want in trained.items():
        # The balanced clip may grow the queries of a quiet sibling; the bound follows their size.
        np.testing.assert_allclose(ours[path], want, atol=1e-6 * max(1, np.abs(want).max()), err_msg=path)
    for path in flat.keys() - trained.keys():
        np.testing.assert_array_equal(ours[path], flat[path])


def clip_once(flat, group, max_logits, tau):
    """The parameters after one update with zero gradients and no decay: QK-Clip alone."""
    params = nest({path: jnp.array(leaf) for path, leaf in flat.items()})
    tx = muonclip(
        0.1,
        weight_decay=0.0,
        matrix_specs=matrix_spec,
        ns=NS.k2(dtype="float32"),
        qk_clip=QKClip({group: CLIPS[group]}, tau=tau),
    )
    grads = jax.tree.map(jnp.zeros_like, params)

    def step(params, grads, max_logits):
        updates, _ = tx.update(grads, tx.init(params), params, max_logits={group: max_logits})
        return optax.apply_updates(params, updates)

    return flatten(jax.jit(step, compiler_options=QUICK_COMPILE)(params, grads, jnp.float32(max_logits)))


def forward(flat, group, layer, x_TD):
    """(max logit per head, q, k, v) of one layer by the oracle."""
    one_layer = group == "mha"
    attn = nest({path.split("/", 1)[1]: leaf if one_layer else leaf[layer] for path, leaf in flat.items()})
    if group in ("mha", "gqa"):
        _, top, q, k, v = gqa.gqa_forward(x_TD, attn, 100.0)
    else:
        _, top, q, k, v = mla.mla_forward(x_TD, attn, mla.Mla(NOPE, ROPE, V, theta=100.0))
    return top, q, k, v


SHAPES_OF = {"mla": MLA_SHAPES, "plain_q": PLAIN_Q_SHAPES, "gqa": GQA_SHAPES, "mha": MHA_SHAPES}
MAY_CHANGE = {
    "mla": {"mla/wq_b", "mla/wkv_b"},
    "plain_q": {"plain_q/wq", "plain_q/wkv_b"},
    "gqa": {"gqa/wq", "gqa/wk"},
    "mha": {"mha/wq", "mha/wk"},
}


@pytest.mark.parametrize("group", SHAPES_OF)
def test_recomputed_max_logit_of_every_head_is_the_smaller_of_s_and_tau(group):
    rng = np.random.default_rng(2)
    shapes = {f"{group}/{name}": shape for name, shape in SHAPES_OF[group].items()}
    flat = random_leaves(rng, shapes, size=0.8)
    x = rng.standard_normal((10, D))
    layers = range(1 if group == "mha" else L)
    before = [forward(flat, group, i, x) for i in layers]
    tops = np.stack([top for top, *_ in before])
    tau = float(np.median(tops))
    assert 0 < tau < tops.max()
    after_flat = clip_once(flat, group, tops[0] if group == "mha" else tops, tau)
    for i, (top, _, k, v) in zip(layers, before, strict=True):
        new_top, _, new_k, new_v = forward(after_flat, group, i, x)
        np.testing.assert_allclose(new_top, np.minimum(top, tau), rtol=2e-6)
        np.testing.assert_array_equal(new_v, v)
        if group in ("mla", "plain_q"):
            np.testing.assert_array_equal(new_k[..., NOPE:], k[..., NOPE:])
    for path, leaf in flat.items():
        if path not in MAY_CHANGE[group]:
            np.testing.assert_array_equal(after_flat[path], leaf)


@pytest.mark.parametrize("group", SHAPES_OF)
def test_clip_changes_no_bit_at_or_below_tau_or_for_a_maximum_that_is_no_number(group):
    rng = np.random.default_rng(3)
    flat = random_leaves(rng, {f"{group}/{name}": shape for name, shape in SHAPES_OF[group].items()})
    quiet = np.array([[100.0, -500.0, 0.0, np.nan], [np.inf, -np.inf, 99.9, 1.0]])
    for tops in quiet if group == "mha" else [quiet]:
        after = clip_once(flat, group, tops, 100.0)
        for path, leaf in flat.items():
            np.testing.assert_array_equal(after[path], leaf)


def test_update_without_gradient_history_is_only_decay():
    """A zero momentum has no direction, so Algorithm 1 leaves W (1 - lr * decay)."""
    params = {"w": jnp.ones((3, 5))}
    tx = muonclip(0.5, weight_decay=0.1, matrix_specs={"w": MatrixSpec()})
    updates, _ = tx.update({"w": jnp.zeros((3, 5))}, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], np.full((3, 5), -0.05), rtol=1e-6)
