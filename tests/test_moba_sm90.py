"""MoBA and full attention for Hopper: the kernels interpreted and lowered, the grouping, the choice of None.

The interpreter simulates the kernels' blocks, barriers and copies on a CPU and looks for races; what the compiler makes
of them only a GPU shows: `make gpu`, `python -m benchmarks.moba`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.interpreters import mlir
from jax._src.lib.mlir import ir, passmanager
from jax._src.lib.mlir.dialects import func
from jax.experimental.mosaic import gpu as mgpu

import k2jax.moba_pallas as moba_pallas
from k2jax.kernels import attention as attention_room
from k2jax.kernels.attention import attention, gather_sm90
from k2jax.kernels.attention import sm90 as full_sm90
from k2jax.kernels.moba import sm90
from k2jax.kernels.moba.gate_sm90 import choose_blocks_sm90
from k2jax.kernels.moba.grouping import group, num_tiles
from k2jax.kernels.symmetric_matmul.sm90 import H100_SMS
from k2jax.moba_pallas import moba_attention, moba_attention_plan
from tests.attention_cases import ATTENDS
from tests.on_devices import told_by

# --- the kernels, interpreted -------------------------------------------------------------------------------------

INTERPRET = """
import contextlib, functools, io, json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from benchmarks.moba import with_gradients
from k2jax.kernels.attention import shares_sm90, sm90 as full
from k2jax.kernels.moba import sm90
from k2jax.kernels.moba.blocks import choose
from k2jax.kernels.moba.gate_sm90 import choose_blocks_sm90
from tests import gpu_interpreter
from tests.attention_cases import ATTENDS, call_of, distances, inputs
from tests.test_moba_sm90 import FUSED, GATES, SHORT_FUSED

gpu_interpreter.patch()
interpret = plgpu.InterpretGPUParams(detect_races=True)

def attend(name, how):
    case = (FUSED | SHORT_FUSED | ATTENDS)[name]
    short = {"forward": sm90.FORWARD_KEYS_OF_A_CHOICE, "backward": sm90.BACKWARD_KEYS_OF_A_CHOICE}
    sm90.PAIRS = case[9] or sm90.PAIRS
    sm90.is_short = lambda T, block_size, J, keys: keys in [short[x] for x in how]
    shares_sm90.CACHE_BYTES = 2**16  # so that heads take turns and blocks keep pace
    options = {"num_sms": 3, "interpret": interpret}
    attention = functools.partial(full.attention, **options)
    call = call_of(name, case, attention, functools.partial(sm90.moba_attention, **options))
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        got = with_gradients(call, *inputs(name, case)[0])
        jax.block_until_ready(got)
    return distances(name, case, got) | {"race": said.getvalue().partition("RACE")[2][:1000]}

def gate(case):
    B, T, H, G, C, chosen, dtype, *odd = case
    D = -(-T // C)
    rng = np.random.default_rng(0)
    q, mean = (jnp.asarray(rng.integers(-1, 2, shape), dtype) for shape in ((B, T, H, 64), (B, D, G, 64)))
    if odd and odd[0][0] == "all":
        mean, odd = mean * jnp.asarray(odd[0][1], dtype), []
    for block, number in odd:  # of every query: with either sign
        q = q.at[..., 0].set(1 - 2 * (jnp.arange(T)[:, None] % 2))
        mean = mean.at[:, block, :, 0].set(number)
    # The first choices of every query are closed to it, as another document's blocks are.
    first = jnp.broadcast_to(jnp.arange(T) // (8 * C) * 2, (B, T))
    end = jnp.broadcast_to(jnp.arange(T) // C, (B, T))
    got = choose_blocks_sm90(q, mean, chosen, first, end, num_sms=3, interpret=interpret)
    score = jnp.einsum("bthk,bdhk->bhtd", q.astype(jnp.float32), jnp.repeat(mean, H // G, axis=2).astype(jnp.float32))
    candidate = (jnp.arange(D) < end[0, :, None]) & (jnp.arange(D) >= first[0, :, None])
    right = choose(score, jnp.broadcast_to(candidate, score.shape), chosen)
    return int((got[..., :T].swapaxes(2, 3) != right).sum())

name, *how = sys.argv[1:]
print(json.dumps(gate(GATES[name]) if name in GATES else attend(name, how)))
"""

SHORT = [
    "a tile and a half, grouped heads", "heads in steps, an odd length", "MLA", "float16", "large blocks",
    "more choices than blocks", "more than 32 blocks",
]  # fmt: skip
FUSED = {
    "full, two units, grouped heads": (1, 200, 2, 1, 128, 128, None, None, "bfloat16", None),
    "full, a unit of one step": (1, 150, 1, 1, 128, 128, None, None, "bfloat16", None),
    "full, heads and batch rows": (2, 301, 4, 2, 128, 128, None, None, "float16", None),
    "full, documents of grouped heads": (2, 601, 2, 1, 128, 128, None, None, "bfloat16", None, 37, 290, 300, 301),
    "full, queries in a cache with room": (2, 620, 2, 1, 128, 128, None, None, "float16", None, 300),
}
SHORT_FUSED = {
    "a tile and a half, grouped heads": ATTENDS["a tile and a half, grouped heads"],
    "larger blocks, heads and batch rows": (2, 700, 4, 2, 128, 128, 256, 2, "float16", None),
}
QUICK = {"a tile and a half, grouped heads", "full", "packed documents", "full, two units, grouped heads"}

# batch, tokens, query heads, key heads, block size, chosen, type; small whole numbers, so that many scores are equal
GATES = {
    "ties": (1, 600, 2, 1, 16, 3, "bfloat16"),
    "more than a step of blocks": (1, 1200, 1, 1, 8, 7, "float16"),
    "63 of a few more": (1, 600, 1, 1, 8, 63, "bfloat16"),
    "one of a few": (2, 300, 1, 1, 128, 1, "bfloat16"),
    "fewer tiles than multiprocessors": (1, 200, 1, 1, 16, 3, "bfloat16"),
    "infinities": (1, 600, 2, 1, 16, 3, "bfloat16", (5, np.inf), (20, -np.inf)),
    "scores that are all but zero": (1, 600, 2, 1, 16, 3, "bfloat16", ("all", 2.0**-126)),
}


def interpret(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        # Every simulated warpgroup that waits at a barrier holds a thread of XLA's pool, which has one per core.
        patch.setenv("NPROC", "24")
        return told_by(INTERPRET, 1, arguments=arguments)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.check) for n in ATTENDS])
def test_interpreted_kernels_are_as_exact_as_plain_attention_in_their_type(name):
    assert_exact(interpret(name))


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.check) for n in SHORT])
def test_all_pairs_of_a_short_text_are_as_exact_as_plain_attention_in_their_type(name):
    assert_exact(interpret(name, "forward"))


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.check) for n in FUSED])
def test_the_fused_gradient_is_as_exact_as_plain_attention_in_its_type(name):
    """The interpreter runs blocks in the order of their units, so it says nothing of their waiting for each other."""
    assert_exact(interpret(name))


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.check) for n in SHORT_FUSED])
def test_the_fused_gradient_of_a_short_text_is_as_exact_as_plain_attention_in_its_type(name):
    assert_exact(interpret(name, "forward", "backward"))


def assert_exact(told):
    assert told["race"] == ""
    assert told["agree"] > 0.999
    assert told["paper"].get("agree", 1) > 0.99
    assert all(mine / plain < 1.5 for mine, plain in (told[what] for what in ("out", "dq", "dk", "dv"))), told
    assert all(told[what] < 1e-5 for what in ("lse", "max_logit")), told


@pytest.mark.parametrize("name", GATES)
def test_interpreted_gate_chooses_as_the_definition_does_where_scores_are_equal(name):
    assert interpret(name) == 0


# --- the grouping -------------------------------------------------------------------------------------------------


def random_choices(B, H, T, D, C, J, seed=0):
    """Distinct earlier blocks of each query in [B, H, J, T], -1 where there are fewer."""
    rng = np.random.default_rng(seed)
    winner = np.full((B, H, J, T), -1, np.int32)
    for b, h, t in np.ndindex(B, H, T):
        chosen = rng.permutation(min(t // C, D))[:J]
        winner[b, h, : len(chosen), t] = chosen
    return winner


@pytest.mark.parametrize("kind", ["random", "all want one block", "nobody chooses"])
def test_every_pair_has_a_place_in_a_tile_of_its_block(kind):
    B, H, R, T, C, J, L = 2, 4, 2, 48, 8, 3, 16
    D = T // C
    winner = random_choices(B, H, T, D, C, J)
    if kind == "all want one block":
        winner[:, :, 1:] = -1
        winner[:, :, 0] = np.where(winner[:, :, 0] < 0, -1, 0)
    if kind == "nobody chooses":
        winner[:] = -1
    Y = num_tiles(B * H * C * sum(min(J, n) for n in range(D)), B * H // R * D, L)
    groups = jax.tree.map(np.asarray, jax.jit(group, static_argnums=(1, 2, 3, 4))(jnp.asarray(winner), R, D, L, Y))
    assert (groups.place_BHJT[winner < 0] == Y * L).all()
    places = groups.place_BHJT[winner >= 0]
    assert len(set(places)) == len(places)
    used, span = int(groups.used_1[0]), groups.span_Z2
    for b, h, j, t in zip(*np.nonzero(winner >= 0), strict=True):
        place = groups.place_BHJT[b, h, j, t]
        block = (b * H + h) // R * D + winner[b, h, j, t]
        assert groups.row_P[place] == (b * H + h) * T + t
        assert groups.block_Y[place // L] == block
        assert place // L < used
        assert span[block, 0] <= place < span[block, 0] + span[block, 1]
    assert (groups.row_P >= 0).sum() == (winner >= 0).sum() == span[:, 1].sum()
    assert (span[:, 0] % L == 0).all()


# --- lowering and choosing ----------------------------------------------------------------------------------------


def lowered(run, *shapes):
    """The MLIR of forward and gradient for a GPU, shared memory counted; not machine code."""
    calls = [jax.export.DisabledSafetyCheck.custom_call(f"mosaic_gpu{suffix}") for suffix in ("", "_v2")]
    loss = jax.grad(lambda *qkv: run(*qkv).out_BTHV.astype(jnp.float32).sum(), argnums=(0, 1, 2))
    return jax.export.export(jax.jit(loss), platforms=["cuda"], disabled_checks=calls)(*shapes).mlir_module()


@pytest.mark.parametrize("sizes", full_sm90.HEAD_SIZES, ids=str)
@pytest.mark.parametrize(("dtype", "T"), [("bfloat16", 1500), pytest.param("float16", 8192, marks=pytest.mark.check)])
def test_kernels_lower_for_a_gpu_without_one(sizes, dtype, T):
    q, k, v = (jax.ShapeDtypeStruct((2, T, h, n), dtype) for h, n in ((4, sizes[0]), (2, sizes[0]), (2, sizes[1])))
    options = {"scale": 0.1, "num_sms": H100_SMS}
    assert "mosaic_gpu" in lowered(functools.partial(full_sm90.attention, **options), q, k, v)
    moba = functools.partial(sm90.moba_attention, top_k=4, **options)
    assert "mosaic_gpu" in lowered(functools.partial(moba, block_size=256), q, k, v)
    if dtype == "bfloat16":
        segments = jnp.arange(T)[None] * jnp.ones((2, 1), int) // 700
        packed = functools.partial(moba, block_size=200, segment_ids=segments)
        assert "mosaic_gpu" in lowered(packed, q, k, v)


@pytest.mark.parametrize("chosen", [1, 7, 63])
def test_the_gate_lowers_at_a_long_context(chosen):
    q, mean = (jax.ShapeDtypeStruct((2, n, 16, 128), jnp.bfloat16) for n in (65536, 512))
    calls = [jax.export.DisabledSafetyCheck.custom_call(f"mosaic_gpu{suffix}") for suffix in ("", "_v2")]
    edges = jax.ShapeDtypeStruct((2, 65536), jnp.int32)
    gate = jax.jit(functools.partial(choose_blocks_sm90, num_chosen=chosen, num_sms=H100_SMS))
    jax.export.export(gate, platforms=["cuda"], disabled_checks=calls)(q, mean, first_BT=edges, end_BT=edges)


def call(**changes):
    """Shapes of a call that the kernels take, but for the changes."""
    sizes = {"B": 1, "T": 2048, "S": 2048, "H": 2, "G": 2, "K": 128, "V": 128, "dtype": jnp.bfloat16} | changes
    B, T, S, H, G, K, V, dtype = sizes.values()
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in ((B, T, H, K), (B, S, G, K), (B, S, G, V))]


REFUSED = [
    ({"dtype": jnp.float32}, {}, "q, k and v are float32"),
    ({"T": 64, "S": 64}, {"top_k": 1}, "64 queries are fewer than a tile of 128"),
    ({"K": 96}, {}, r"heads of sizes \(96, 128\): built are"),
    ({}, {"block_size": 48}, "block_size=48 is less than 64"),
    ({"T": 16384, "S": 16384}, {"top_k": 65}, "top_k=65 is more than 64"),
    ({}, {"scale": -1.0}, "scale=-1.0 is not positive"),
]


@pytest.mark.parametrize(("changes", "arguments", "message"), REFUSED)
def test_a_named_kernel_says_why_it_cannot_and_none_takes_another(monkeypatch, changes, arguments, message):
    on_hopper(monkeypatch)
    arguments = {"block_size": 128, "top_k": 3} | arguments
    run = functools.partial(moba_attention, **arguments)
    with pytest.raises(ValueError, match=f"implementation='sm90' cannot run: .*{message}"):
        jax.eval_shape(functools.partial(run, implementation="sm90"), *call(**changes))
    jax.eval_shape(run, *call(**changes))
    if "scale" not in arguments:
        assert "sm90\n" not in moba_attention_plan(*call(**changes), **arguments)


def on_hopper(monkeypatch):
    monkeypatch.setattr(attention_room, "not_hopper", lambda: None)
    monkeypatch.setattr(jax.devices()[0].__class__, "core_count", H100_SMS, raising=False)


def test_none_takes_the_kernels_on_a_hopper_gpu(monkeypatch):
    on_hopper(monkeypatch)
    plan = functools.partial(moba_attention_plan, block_size=128, top_k=3)
    assert plan(*call()).startswith("implementation: sm90\nreason: a Hopper GPU")
    assert plan(*call(T=384, S=384)).startswith("implementation: full-sm90\nreason: 384 tokens fit in")
    assert plan(*call(K=192), segment_ids=jnp.zeros((1, 2048), jnp.int32)).startswith("implementation: sm90")
    offset = jnp.zeros(1, jnp.int32)
    assert moba_pallas._choose(*call(), None, offset, block_size=200, top_k=3, scale=1.0)[0] == "sm90"
    monkeypatch.setattr(attention_room, "num_cuts", lambda q: 16)
    assert plan(*call()).startswith("implementation: sm90")
    monkeypatch.setattr(attention_room, "num_cuts", lambda q: 32)
    cut = plan(*call())
    assert cut.startswith("implementation: xla")
    assert "64 queries are fewer than a tile of 128" in cut
    assert attention_room.choose((1, 2048, 2, 128), (1, 2048, 2, 128), None)[0] == "sm90"


FULL = functools.partial(attention, scale=1.0, implementation="sm90")
CHOOSING = functools.partial(moba_attention, block_size=128, top_k=8, implementation="sm90")


GRADIENTS = {
    "full": (FULL, {}, {}, True),
    "full, 64K": (FULL, {"T": 65536, "S": 65536}, {}, True),
    "full, heads of 64": (FULL, {"K": 64, "V": 64}, {}, False),
    "full, MLA": (FULL, {"K": 192}, {}, False),
    "full, documents": (FULL, {}, {"segment_ids": jnp.zeros((1, 2048), jnp.int32)}, True),
    "full, a chunk of the queries": (FULL, {"T": 1024}, {"q_offset": 3}, True),
    "MoBA, short": (CHOOSING, {}, {}, True),
    "MoBA, 6K": (CHOOSING, {"T": 6144, "S": 6144}, {}, False),
    "MoBA, heads of 64": (CHOOSING, {"K": 64, "V": 64}, {}, False),
    "MoBA, documents": (CHOOSING, {}, {"segment_ids": jnp.zeros((1, 2048), jnp.int32)}, False),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_the_gradient_computes_every_pair_once_where_that_is_faster(monkeypatch, name):
    run, changes, arguments, fused = GRADIENTS[name]
    on_hopper(monkeypatch)
    called = []
    for room in (full_sm90, sm90):
        for kernel in ("fused_gradient", "rows_gradient"):
            monkeypatch.setattr(room, kernel, told(called, kernel, getattr(room, kernel)))
    gradient = jax.grad(lambda *qkv: run(*qkv, **arguments).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    jax.eval_shape(gradient, *call(**changes))
    assert set(called) == {"fused_gradient" if fused else "rows_gradient"}


def told(called, name, function):
    def tell(*arguments, **options):
        called.append(name)
        return function(*arguments, **options)

    return tell


@pytest.mark.parametrize("size", [64, 128, 192])
def test_a_row_is_copied_to_where_tiles_have_it(size):
    line, columns = gather_sm90.LINE, size // gather_sm90.LINE
    rows = np.arange(32 * size).reshape(32, size)
    lines = rows.reshape(4, 8, columns, line).swapaxes(1, 2).reshape(-1, line)  # as TRANSFORMS tile it
    # The kernel's arithmetic, folded by the compiler.
    with mlir.make_ir_context() as context, ir.Location.unknown(context):
        module = ir.Module.create()
        with ir.InsertionPoint(module.body):

            @func.FuncOp.from_py_func(name="lines")
            def _lines():
                places = [mgpu.c(place, ir.IntegerType.get_signless(32)) for place in range(32)]
                return [gather_sm90._line(place, c, columns) for place in places for c in range(columns)]

        passmanager.PassManager.parse("builtin.module(canonicalize)").run(module.operation)
        (made,) = module.body.operations
        numbers = [ir.IntegerAttr(x.owner.attributes["value"]).value for x in made.entry_block.operations[-1].operands]
    np.testing.assert_array_equal(lines[numbers], rows.reshape(-1, line))


def test_multiprocessors_keep_pace_over_one_long_document_alone():
    def waits(T, **how):
        q, k = (jax.ShapeDtypeStruct((1, T, heads, 128), jnp.bfloat16) for heads in (2, 1))
        return "nanosleep" in lowered(
            functools.partial(full_sm90.attention, scale=0.1, num_sms=H100_SMS, **how), q, k, k
        )

    assert waits(2**17)
    assert not waits(2**15)
    assert not waits(2**17, segment_ids=jnp.zeros((1, 2**17), jnp.int32))


def test_keys_of_a_chunk_are_read_as_they_lie():
    """A prefill's chunks, or the parts of a cut sequence, would otherwise each copy all keys and values."""

    shapes = [jax.ShapeDtypeStruct((1, T, 2, 64), jnp.bfloat16) for T in (256, 4096, 4096)]

    def copies(**how):
        attend = functools.partial(sm90.moba_attention, block_size=128, top_k=3, scale=1.0, q_offset=1024, **how)
        # Keys or values of all 31 blocks that may be chosen.
        return str(jax.make_jaxpr(functools.partial(attend, num_sms=3))(*shapes)).count("bf16[1,31,128,2,64] = gather")

    assert copies() == 0
    assert copies(segment_ids=jnp.zeros((1, 4096), jnp.int32)) == 2


def test_short_texts_are_attended_to_as_a_whole():
    forward, backward = sm90.FORWARD_KEYS_OF_A_CHOICE, sm90.BACKWARD_KEYS_OF_A_CHOICE
    assert sm90.is_short(6144, 128, 7, forward)
    assert not sm90.is_short(8192, 128, 7, forward)
    assert sm90.is_short(4096, 128, 7, backward)
    assert not sm90.is_short(6144, 128, 7, backward)
    assert not sm90.is_short(128, 128, 0, forward)
    assert not sm90.is_short(129 * 128, 128, 40, forward)  # more blocks than there are bits


@pytest.mark.parametrize(
    ("arguments", "changes", "mebibytes"),
    [
        # What XLA counted on an H200 (benchmarks/results/moba.json): 1.01 and 0.063 GiB.
        ({"block_size": 65536, "top_k": 1}, {"T": 65536, "S": 65536}, 1032),
        ({"block_size": 128, "top_k": 8}, {"T": 4096, "S": 4096}, 65),
        # Vectors alone, by the gradients of rows and keys.
        ({"block_size": 2**17, "top_k": 1}, {"T": 2**17, "S": 2**17, "K": 192}, 64),
    ],
)
def test_the_plan_counts_the_float32_of_a_gradient_that_is_added_to(monkeypatch, arguments, changes, mebibytes):
    on_hopper(monkeypatch)
    plan = moba_attention_plan(*call(B=2, H=16, G=16, **changes), **arguments)
    counted = int(plan.partition("memory: about ")[2].partition(" MiB")[0])
    assert abs(counted / mebibytes - 1) < 0.1


def test_without_a_hopper_gpu_the_name_is_refused_with_the_reason():
    q, k, v = (jnp.zeros(x.shape, x.dtype) for x in call(T=256, S=256))
    for run in (
        functools.partial(moba_attention, block_size=128, top_k=1, implementation="sm90"),
        functools.partial(attention, scale=1.0, implementation="sm90"),
    ):
        with pytest.raises(ValueError, match="implementation='sm90' cannot run: it needs a Hopper GPU"):
            run(q, k, v)
