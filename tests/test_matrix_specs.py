"""Which rule every leaf gets, and what the errors about it say.

Legend: L layers, D model, E experts, F hidden, R query latent, H heads, C key-value latent, X vocabulary, N no
position, P rotary, V value.
"""

import itertools
import re

import jax
import jax.numpy as jnp
import pytest

from k2jax.muonclip import EXTERNAL, MatrixSpec, by_ndim, describe, muonclip

TO_HEADS = MatrixSpec(-3, (-2, -1))
FROM_HEADS = MatrixSpec((-3, -2), -1)
N, P, V = 8, 4, 6


def k2_shapes(L=2, D=8, E=4, F=6, R=5, H=2, C=3, X=32):
    """The parameter tree of the project, as shapes; groups `dense` and `moe` are stacked on axis 0."""
    attn = {"wq_a": (D, R), "q_norm": {"scale": (R,)}, "wq_b": (R, H, N + P), "wkv_a": (D, C + P)}
    attn |= {"kv_norm": {"scale": (C,)}, "wkv_b": (C, H, N + V), "wo": (H, V, D)}
    mlp = {"w_gate": (D, F), "w_up": (D, F), "w_down": (F, D)}
    norms = {"attn_norm": {"scale": (D,)}, "mlp_norm": {"scale": (D,)}}
    experts = {name: (E, *shape) for name, shape in mlp.items()}
    moe = {"router": {"w": (D, E), "bias": (E,)}, "experts": experts, "shared": mlp}
    stack = lambda tree: jax.tree.map(lambda s: (L, *s), tree, is_leaf=lambda s: isinstance(s, tuple))  # noqa: E731
    groups = {
        "dense": stack(norms | {"attn": attn, "mlp": mlp}),
        "moe": stack(norms | {"attn": attn, "moe": moe}),
    }
    tree = {"embed": {"w": (X, D)}, "final_norm": {"scale": (D,)}, "head": {"w": (D, X)}} | groups
    is_shape = lambda s: isinstance(s, tuple)  # noqa: E731
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), tree, is_leaf=is_shape)


def k2_roles(path, leaf):
    del leaf
    parts = path.split("/")
    if parts[-1] == "scale" or parts[0] in ("embed", "head"):
        return None
    if parts[-2:] == ["router", "bias"]:
        return EXTERNAL
    return {"wq": TO_HEADS, "wq_b": TO_HEADS, "wkv_b": TO_HEADS, "wo": FROM_HEADS}.get(parts[-1], MatrixSpec())


GOLDEN = """
dense/attn/kv_norm/scale  adamw
dense/attn/q_norm/scale   adamw
dense/attn/wkv_a          muon      2 x (8, 7)
dense/attn/wkv_b          muon      2 x (3, 28)
dense/attn/wo             muon      2 x (12, 8)
dense/attn/wq_a           muon      2 x (8, 5)
dense/attn/wq_b           muon      2 x (5, 24)
dense/attn_norm/scale     adamw
dense/mlp/w_down          muon      2 x (6, 8)
dense/mlp/w_gate          muon      2 x (8, 6)
dense/mlp/w_up            muon      2 x (8, 6)
dense/mlp_norm/scale      adamw
embed/w                   adamw
final_norm/scale          adamw
head/w                    adamw
moe/attn/kv_norm/scale    adamw
moe/attn/q_norm/scale     adamw
moe/attn/wkv_a            muon      2 x (8, 7)
moe/attn/wkv_b            muon      2 x (3, 28)
moe/attn/wo               muon      2 x (12, 8)
moe/attn/wq_a             muon      2 x (8, 5)
moe/attn/wq_b             muon      2 x (5, 24)
moe/attn_norm/scale       adamw
moe/mlp_norm/scale        adamw
moe/moe/experts/w_down    muon      8 x (6, 8)
moe/moe/experts/w_gate    muon      8 x (8, 6)
moe/moe/experts/w_up      muon      8 x (8, 6)
moe/moe/router/bias       external
moe/moe/router/w          muon      2 x (8, 4)
moe/moe/shared/w_down     muon      2 x (6, 8)
moe/moe/shared/w_gate     muon      2 x (8, 6)
moe/moe/shared/w_up       muon      2 x (8, 6)
"""


def described(table):
    """path -> (role, matrices) of the text that `describe` gives."""
    head, *lines, _ = table.splitlines()
    starts = [head.index(name) for name in ("path", "role", "shape", "matrices", "method")]
    rows = [[line[i:j].strip() for i, j in itertools.pairwise(starts)] for line in lines]
    return {path: (role, matrices) for path, role, _, matrices in rows}


def test_every_leaf_of_the_project_has_the_rule_of_the_paper():
    want = {}
    for line in GOLDEN.strip().splitlines():
        path, role, *matrices = re.split(r"\s{2,}", line)
        want[path] = (role, matrices[0] if matrices else "")
    assert described(describe(k2_shapes(), k2_roles)) == want


def test_tree_prefix_paths_and_function_label_alike():
    params = {
        "a": {"wq": jnp.ones((2, 3, 4)), "b": jnp.ones(3)},
        "c": {"w": jnp.ones((3, 4)), "v": jnp.ones((3, 4))},
    }
    tree = {"a": {"wq": MatrixSpec(-3, (-2, -1)), "b": None}, "c": {"w": EXTERNAL, "v": EXTERNAL}}
    prefix = {"a": tree["a"], "c": EXTERNAL}
    paths = {"a": None, "a/wq": TO_HEADS, "c": EXTERNAL}
    function = lambda path, leaf: EXTERNAL if path[0] == "c" else TO_HEADS if leaf.ndim == 3 else None  # noqa: E731
    tables = {describe(params, specs) for specs in (tree, prefix, paths, function)}
    assert len(tables) == 1


def test_describe_counts_newton_schulz_flops():
    table = describe({"w": jax.ShapeDtypeStruct((4, 384, 7168, 2048), jnp.float32)}, MatrixSpec())
    n, m = 2048, 7168
    assert f"{5 * 4 * 384 * (2 + 4 * m / n) * n**3:.3g}" in table.splitlines()[-1]


@pytest.mark.parametrize("specs", [None, {"w": MatrixSpec()}], ids=["not set", "one leaf missing"])
def test_unlabelled_leaf_raises_with_the_table_and_a_paste_that_works(specs):
    params = {"w": jnp.ones((4, 6)), "layer": {"b": jnp.ones(6), "lm_head": jnp.ones((6, 5))}}
    with pytest.raises(ValueError, match=r"(?s)matrix_specs.*layer/lm_head +\[6, 5\]") as error:
        muonclip(0.1, matrix_specs=specs).init(params)
    scope = {"MatrixSpec": MatrixSpec, "EXTERNAL": EXTERNAL}
    exec("matrix_specs = {" + str(error.value).split("matrix_specs = {")[1], scope)
    assert scope["matrix_specs"] == {"w": MatrixSpec(), "layer/b": None, "layer/lm_head": None}
    muonclip(0.1, matrix_specs=scope["matrix_specs"]).init(params)


def test_by_ndim_leaves_vectors_embeddings_and_heads_to_adamw():
    shapes = {"embedding": {"w": (9, 8)}, "lm_head": {"kernel": (8, 9)}, "norm": {"scale": (3, 8)}}
    shapes["mlp"] = {"kernel": (3, 8, 9), "bias": (3, 9)}
    params = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda s: isinstance(s, tuple))
    roles = described(describe(params, by_ndim()))
    assert {path for path, (role, _) in roles.items() if role == "muon"} == {"mlp/kernel"}
    assert described(describe(params, by_ndim(exclude=())))["lm_head/kernel"][0] == "muon"


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (
            {"w": MatrixSpec(), "b": MatrixSpec()},
            r"matrix_specs of 'b'.*does not fit shape \(6,\).*None for AdamW",
        ),
        ({"w": 3, "b": None}, "gives 3 for 'w'"),
        ({"w": None, "b": None, "layer/wq": None}, "'layer/wq', which is no leaf; the closest one is 'w'"),
        (lambda path, leaf: "muon", "gives 'muon' for 'b'"),
    ],
)
def test_wrong_matrix_specs_are_named(specs, message):
    with pytest.raises(ValueError, match=message):
        muonclip(0.1, matrix_specs=specs).init({"w": jnp.ones((4, 6)), "b": jnp.ones(6)})
