"""Muon on a mesh: several devices tell what one tells, each matrix is orthogonalised once, and little moves.

Eight simulated devices in a process of its own; the plan, which is arithmetic, in this one.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from k2jax.describe import plan
from k2jax.matrix_specs import LAST_TWO, MatrixSpec
from k2jax.muon_plan import group, place
from k2jax.muonclip import NS, describe, muonclip, orthogonalize
from tests.on_devices import told_by

W, F32 = MatrixSpec(), NS.k2(dtype="float32")

PROGRAM = """
import json, re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from k2jax.muon_groups import orthogonalize_leaves
from k2jax.muonclip import MatrixSpec, NS, muonclip, orthogonalize

F32 = NS.k2(dtype="float32")
rng = np.random.default_rng(0)
fast = {"xla_backend_optimization_level": 0}
slow, only_slow = json.loads(sys.argv[1]), sys.argv[2] == "True"
told = {}

def mesh_of(kind, **sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(getattr(AxisType, kind),) * len(sizes))

def products(compiled):
    # Numbers that one device's matrix products give, each loop over steps written once.
    found = re.findall(r"= f32\\[([\\d,]+)\\]\\S* dot\\(", compiled)
    return sum(int(np.prod([int(size) for size in shape.split(",")])) for shape in found)

def counts(compiled):
    names = ("all-to-all", "all-gather", "all-reduce", "collective-permute", "reduce-scatter")
    return {name: len(re.findall(rf" {name}(?:-start)?\\(", compiled)) for name in names}

def worst(a, b):
    return max(float(np.max(np.abs(np.asarray(x) - np.asarray(y)))) for x, y in zip(a, b, strict=True))

alone = jax.jit(lambda x, spec, ns: orthogonalize(x, spec=spec, ns=ns), static_argnums=(1, 2), compiler_options=fast)

def compare(name, mesh, leaves, ns=F32, **how):
    # leaves: (shape, partition, spec). Only the cases that this process is asked for.
    if (name in slow) != only_slow:
        return
    xs = [rng.standard_normal(shape).astype(np.float32) for shape, _, _ in leaves]
    specs = [spec for _, _, spec in leaves]
    shardings = [NamedSharding(mesh, part) for _, part, _ in leaves]
    auto = AxisType.Auto in mesh.axis_types
    run = jax.jit(
        lambda xs: orthogonalize_leaves(xs, specs, ns, shardings=shardings if auto else None, **how),
        compiler_options=fast,
    )
    placed = [jax.device_put(x, s) for x, s in zip(xs, shardings)]
    lowered = run.lower(placed)
    compiled = lowered.compile()
    out = compiled(placed)
    one = [alone(x, spec, ns) for x, spec in zip(xs, specs)]
    told[name] = {
        "error": worst(out, one),
        "kept": all(o.sharding.is_equivalent_to(s, o.ndim) for o, s in zip(out, shardings)),
        "products": products(compiled.as_text()),
        # Before compilation: a CPU moves float32 in any case.
        "16 bits": len(re.findall(r"all_to_all.*xf16>", lowered.as_text())),
        **counts(compiled.as_text()),
    }

W = MatrixSpec()
for kind in ("Explicit", "Auto"):
    line, plane = mesh_of(kind, a=8), mesh_of(kind, a=4, b=2)
    compare(f"{kind} rows", line, [((8, 16, 24), P(None, "a", None), W)])
    compare(f"{kind} columns", line, [((8, 16, 24), P(None, None, "a"), W)])
    compare(f"{kind} batch", line, [((8, 16, 24), P("a"), W)])
    compare(f"{kind} both", plane, [((8, 16, 24), P(None, "a", "b"), W)])
    compare(f"{kind} uneven", line, [((5, 24, 16), P(None, "a"), W)])

line, plane = mesh_of("Explicit", a=8), mesh_of("Explicit", a=4, b=2)
compare("group", line, [((8, 24, 16), P(None, "a"), W), ((2, 4, 16, 24), P(None, None, None, "a"), W)])
compare("shared", plane, [((8, 16, 24), P(None, "a", None), W)])
compare("equal", plane, [((5, 16, 24), P(), W)])
compare("one matrix", line, [((16, 24), P("a"), W)])
small = {"max_group_bytes": 2 * 4 * 16 * 24}
compare("chunks", plane, [((9, 5, 16, 24), P(None, None, "a", None), W)], **small)
compare("chunks on the batch", line, [((8, 7, 16, 24), P("a"), W)], **small)
compare("repeated", plane, [((8, 16, 24), P(None, "a", None), W)], repeat_over=("b",))
compare("both sides of the mesh at once", line, [((8, 16, 24), P(None, "a"), W), ((8, 16, 24), P("a"), W)])
heads = MatrixSpec((-3, -2), -1)
compare("merged axes", plane, [((8, 4, 8, 16), P(None, "b", "a", None), heads)])
compare("whole blocks", line, [((3, 16, 32), P(None, None, "a"), MatrixSpec(blocks=(2,) * 16))])
compare("cut blocks", line, [((3, 16, 32), P(None, None, "a"), MatrixSpec(blocks=(20, 12)))])
compare("blocks of the other side", line, [((8, 16, 32), P(None, "a"), MatrixSpec(blocks=(20, 12)))])
compare("16 bits", line, [((8, 16, 24), P(None, "a", None), W)], ns=NS.fast())
compare("many", plane, [((3, 24, 16), P(None, "a", "b"), W), ((16, 24), P("b", "a"), W), ((24, 24), P("a", "b"), W)])
ideal = jax.jit(lambda x: orthogonalize(x, ns=F32), compiler_options=fast).lower(np.zeros((1, 16, 24), np.float32))
told["one"] = products(ideal.compile().as_text())

if only_slow:
    print(json.dumps(told))
    sys.exit()

# A whole step, with AdamW leaves and donation; on the Auto mesh without one being set.
def step_of(kind):
    tx = muonclip(0.1, matrix_specs={"w": W, "b": None}, ns=F32, shardings=shardings if kind == "Auto" else None)
    def steps(params, grads, state):
        for _ in range(2):
            updates, state = tx.update(grads, state, params)
            params = jax.tree.map(jnp.add, params, updates)
        return params, state
    return tx, jax.jit(steps, donate_argnums=(0, 2), compiler_options=fast)

arrays = {"w": rng.standard_normal((3, 16, 24)).astype(np.float32), "b": rng.standard_normal(16).astype(np.float32)}
grads = jax.tree.map(lambda x: x[::-1].copy(), arrays)
shardings = None
tx, run = step_of("none")
want = run(jax.tree.map(jnp.asarray, arrays), grads, tx.init(arrays))
for kind in ("Explicit", "Auto"):
    mesh = mesh_of(kind, a=4, b=2)
    shardings = {"w": NamedSharding(mesh, P(None, "a", "b")), "b": NamedSharding(mesh, P("a"))}
    tx, run = step_of(kind)
    params, placed = jax.device_put((arrays, grads), (shardings, shardings))
    got = run(params, placed, tx.init(params))
    told[f"{kind} step"] = {"error": worst(jax.tree.leaves(got), jax.tree.leaves(want)),
                            "kept": got[0]["w"].sharding.is_equivalent_to(shardings["w"], 3)}

auto = jax.device_put(arrays["w"], NamedSharding(mesh_of("Auto", a=8), P(None, "a")))
attempts = {
    "no shardings": lambda: jax.jit(lambda x: orthogonalize(x))(auto),
    "missing entry": lambda: muonclip(0.1, matrix_specs=W, shardings={"v": auto.sharding}).update(
        {"w": auto}, muonclip(0.1, matrix_specs=W).init({"w": auto}), {"w": auto}),
    "unknown axis": lambda: orthogonalize_leaves([auto], [W], F32, shardings=[auto.sharding], repeat_over=("slow",)),
}
for name, attempt in attempts.items():
    try:
        attempt()
    except ValueError as error:
        told[name] = str(error)
# Inside a user's shard_map every device has whole matrices of its own: nothing to distribute.
inside = jax.shard_map(lambda x: orthogonalize(x, ns=F32), in_specs=P("a"), out_specs=P("a"), mesh=line)
x = rng.standard_normal((8, 16, 24)).astype(np.float32)
told["inside"] = worst([jax.jit(inside)(jax.device_put(x, NamedSharding(line, P("a"))))], [orthogonalize(x, ns=F32)])
print(json.dumps(told))
"""

TRAINING = """
import json
from functools import partial
import jax, jax.numpy as jnp, numpy as np
from k2jax import model, sharding
from k2jax.training.optimizer import make_optimizer
from tests import tiny

def run(sizes):
    mesh = sharding.make_mesh(sizes)
    cfg = tiny.config("stdlib", {f"mesh.{axis}": size for axis, size in sizes.items()}, batch=8)
    rng = np.random.default_rng(0)
    draw = lambda x: jax.device_put(rng.standard_normal(x.shape, np.float32), sharding.on_mesh(x, mesh).sharding)
    with jax.set_mesh(mesh):
        tx = make_optimizer(cfg)
        shapes = jax.eval_shape(partial(model.init_params, cfg.model), jax.random.key(0))
        params, grads = jax.tree.map(draw, shapes), jax.tree.map(draw, shapes)
        logits = {"dense": (cfg.model.num_dense_layers,), "moe": (cfg.model.num_moe_layers,)}
        logits = {g: 150 * jnp.ones((*n, cfg.model.num_heads)) for g, n in logits.items() if n[0]}
        update = jax.jit(tx.update, compiler_options={"xla_backend_optimization_level": 0})
        updates, _ = update(grads, tx.init(params), params, max_logits=logits)
    same = jax.tree.map(lambda u, p: u.sharding == p.sharding, updates, params)
    assert all(jax.tree.leaves(same)), same
    return jax.device_get(jax.tree.leaves(updates))

one, many = run({}), run({"slice": 2, "fsdp": 2, "tensor": 2})
print(json.dumps(max(float(np.max(np.abs(a - b)) / np.max(np.abs(a))) for a, b in zip(one, many) if a.any())))
"""


@pytest.mark.check
def test_the_optimizer_of_training_on_a_mesh_tells_what_one_device_tells():
    assert told_by(TRAINING, devices=8) <= 2e-5


BOTH = ["rows", "columns", "batch", "both", "uneven"]
SLOW = [f"Auto {name}" for name in BOTH[1:]]
SLOW += ["one matrix", "many", "both sides of the mesh at once", "chunks on the batch", "blocks of the other side"]
CASES = [f"Explicit {name}" for name in BOTH] + ["Explicit step", "Auto rows", "Auto step"]
CASES += ["group", "shared", "equal", "chunks", "repeated", "merged axes", "whole blocks", "cut blocks"]


@pytest.fixture(scope="module")
def told():
    return told_by(PROGRAM, devices=8, arguments=[json.dumps(SLOW), False])


@pytest.fixture(scope="module")
def told_slowly():
    return told_by(PROGRAM, devices=8, arguments=[json.dumps(SLOW), True])


@pytest.mark.parametrize("case", CASES)
def test_many_devices_tell_what_one_tells_and_leave_the_result_where_it_was(told, case):
    assert told[case]["error"] <= 1e-5
    assert told[case]["kept"]


@pytest.mark.check
@pytest.mark.parametrize("case", SLOW)
def test_more_ways_to_lie_on_a_mesh(told_slowly, case):
    assert told_slowly[case]["error"] <= 1e-5
    assert told_slowly[case]["kept"]


def test_sixteen_bits_move_and_round_as_on_one_device(told):
    assert told["16 bits"]["16 bits"] == 2
    assert told["16 bits"]["error"] <= 2e-3


@pytest.mark.parametrize(
    ("case", "all_to_all", "all_gather", "all_reduce"),
    [
        *((name, 2, 0, 2) for name in ("Explicit rows", "Explicit columns", "Explicit uneven", "Auto rows")),
        ("Explicit both", 4, 0, 2),  # one each way for each of two axes
        ("Explicit batch", 0, 0, 0),
        ("group", 2, 0, 2),  # w_gate and w_down of one model
        ("shared", 2, 1, 2),
        ("equal", 0, 1, 0),
    ],
)
def test_what_moves(told, case, all_to_all, all_gather, all_reduce):
    want = {"all-to-all": all_to_all, "all-gather": all_gather, "all-reduce": all_reduce}
    assert {name: told[case][name] for name in want} == want  # the two all-reduces are norms, four bytes a matrix
    assert told[case]["collective-permute"] == told[case]["reduce-scatter"] == 0


@pytest.mark.check
def test_what_moves_on_auto_axes_and_for_one_matrix(told_slowly):
    moves = {name: (told_slowly[name]["all-to-all"], told_slowly[name]["all-gather"]) for name in SLOW[:5]}
    want = {"Auto columns": (2, 0), "Auto batch": (0, 0), "Auto both": (4, 0), "Auto uneven": (2, 0)}
    assert moves == want | {"one matrix": (0, 1)}


def test_axes_to_repeat_over_carry_nothing(told):
    assert told["repeated"]["all-gather"] == 0
    assert told["shared"]["all-gather"] == 1


@pytest.mark.parametrize(
    ("case", "matrices"),
    [
        *((f"Explicit {cut}", 1) for cut in ("rows", "columns", "batch", "both", "uneven")),
        *(("group", 2), ("shared", 1), ("equal", 1)),
    ],
)
def test_every_matrix_is_orthogonalised_once_in_the_whole_mesh(told, case, matrices):
    assert told["one"] > 0
    assert told[case]["products"] == matrices * told["one"]


def test_matrices_inside_a_shard_map_are_left_where_they_are(told):
    assert told["inside"] <= 1e-5


def test_errors_name_the_fix(told):
    assert "muonclip(shardings=jax.tree.map(lambda x: x.sharding, params))" in told["no shardings"]
    assert told["missing entry"] == "shardings has no entry for 'w'; give a tree like the parameters"
    assert told["unknown axis"] == "repeat_over names 'slow', which is no axis of the mesh; it has a"


# --- the plan -----------------------------------------------------------------------------------------------------

MESH = AbstractMesh((8, 4, 2), ("model", "data", "slice"), axis_types=(AxisType.Explicit,) * 3)


def leaf(*shape, cut=()):
    return jax.ShapeDtypeStruct(shape, np.float32, sharding=NamedSharding(MESH, P(*cut)))


def planned(x, spec=LAST_TWO):
    return plan({"w": x}, spec, repeat_over=("slice",))[0]


def test_the_plan_of_a_stack_that_divides():
    # 64 matrices of [256, 512], 2 a device: of 16 pieces [32, 512] that it keeps of the 64, it sends 7/8 and gets as
    # much, twice; then it receives three quarters of all 64 results.
    found = planned(leaf(64, 256, 512, cut=(None, "model")))
    assert found.where == "all-to-all model + split data + repeat slice"
    assert found.received == (2 * 16 * 7 / 8 + 64 * 3 / 4) * 32 * 512 * 2
    assert found.places == found.filled == 64


def test_the_plan_of_a_stack_that_does_not_divide():
    # 3 matrices: the four devices along data take one each, one place is empty. Over model alone it would be 8 places.
    found = planned(leaf(3, 256, 512, cut=(None, "model")))
    assert found.where == "gather model + split data + repeat slice"
    assert found.received == (7 + 3) * 32 * 512 * 2
    assert (found.places, found.filled) == (4, 3)


def test_the_plan_of_experts_that_lie_on_the_axis_is_local():
    found = planned(leaf(8, 4, 256, 512, cut=("model", "data")))
    assert (found.where, found.received) == ("repeat slice", 0)


def test_the_plan_of_blocks_that_a_mesh_axis_cuts():
    # Blocks that end elsewhere: seven eighths of a float32 leaf arrive first.
    x = leaf(2, 256, 512, cut=(None, None, "model"))
    found = planned(x, MatrixSpec(blocks=(256, 128, 128)))
    assert found.where.startswith("gather blocks model; split ")
    assert found.received > 2 * 256 * 512 * 4 * 7 / 8
    whole = planned(x, MatrixSpec(blocks=(64,) * 8))
    assert whole.where == "split data + repeat slice"


def test_describe_prints_the_plan():
    leaves = {"w": leaf(3, 256, 512, cut=(None, "model")), "v": leaf(8, 256, 512, cut=("model",)), "b": leaf(16)}
    lines = describe(leaves, {"w": MatrixSpec(), "v": MatrixSpec(), "b": None}, repeat_over=("slice", "data"))
    row = {line.split()[0]: line for line in lines.splitlines()}
    assert "all-to-all model + repeat data,slice" in row["w"]
    assert row["w"].endswith("62%")
    assert row["v"].split()[-2:] == ["0", "0%"]
    plain = describe({"v": jax.ShapeDtypeStruct((8, 4, 4), np.float32)}, MatrixSpec()).splitlines()[1]
    assert plain.split()[-3:] == ["local", "0", "0%"]


def test_large_leaves_go_alone_and_small_ones_together_up_to_the_bytes_of_a_group():
    three = {name: jax.ShapeDtypeStruct((4, 16, 32), np.float32) for name in "abc"}
    size = 4 * 16 * 32 * 4
    placed = [place(x.shape, MatrixSpec(), ((),) * 3, {}) for x in three.values()]
    groups = group(placed, [NS.k2()] * 3, {}, max_group_bytes=2 * size)
    assert [[member.leaf for member in found.members] for found in groups] == [[0, 1], [2]]
    alone = group(placed, [NS.k2()] * 3, {}, max_group_bytes=size // 2)
    assert [(found.chunks, found.per_chunk) for found in alone] == [(2, 2)] * 3


# --- without a mesh -----------------------------------------------------------------------------------------------


def test_shardings_of_arrays_on_one_device_are_no_mesh():
    params = {"w": jnp.ones((3, 4, 6))}
    tx = muonclip(0.1, matrix_specs={"w": W}, ns=F32, shardings=jax.tree.map(lambda x: x.sharding, params))
    updates, _ = tx.update(params, tx.init(params), params)
    plain, _ = muonclip(0.1, matrix_specs={"w": W}, ns=F32).update(params, tx.init(params), params)
    np.testing.assert_array_equal(updates["w"], plain["w"])


def test_another_kind_of_sharding_is_refused_with_its_leaf():
    params = {"w": jnp.ones((4, 6))}
    tx = muonclip(0.1, matrix_specs={"w": W}, shardings={"w": P("a")})
    with pytest.raises(ValueError, match=r"the sharding of 'w' is P.*give a NamedSharding"):
        tx.update(params, tx.init(params), params)


@pytest.mark.parametrize("shape", [(0, 4, 5), (4, 0), (2, 0, 3)])
def test_a_stack_of_nothing_stays_one(shape):
    assert orthogonalize(jnp.zeros(shape), spec=W).shape == shape
    assert "adamw" not in describe({"w": jnp.zeros(shape)}, {"w": W})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repeat_over": "slow"}, "repeat_over='slow' is a string"),
        ({"max_group_bytes": 0}, "max_group_bytes=0: must be positive"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    params = {"w": jnp.ones((4, 6))}
    tx = muonclip(0.1, matrix_specs={"w": W}, **settings)
    with pytest.raises(ValueError, match=message):
        tx.update(params, tx.init(params), params)
