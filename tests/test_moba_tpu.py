"""MoBA and full attention for TPUs: the kernels interpreted and compiled for topologies, the choice of None.

The interpreter simulates a TPU's memories and copies on a CPU. The compiler is the real one, for chips that are not
here: it shows that the kernels compile and what memory they take, not that what it made of them is right.
"""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import k2jax.moba_pallas as moba_pallas
from benchmarks.moba import with_gradients
from k2jax.kernels import attention as attention_room
from k2jax.kernels import tpu as device
from k2jax.kernels.attention import attention
from k2jax.kernels.attention import tpu as full_tpu
from k2jax.kernels.moba import reference, tpu
from k2jax.moba_pallas import moba_attention, moba_attention_plan
from tests import attention_cases, test_moba_sm90
from tests.on_devices import told_in

# --- the kernels, interpreted -------------------------------------------------------------------------------------

# Beside those of Hopper.
OWN = {
    "a few tokens": (2, 40, 2, 1, 64, 64, 64, 2, "bfloat16", 2**21),
    "heads of 256": (1, 300, 2, 1, 256, 256, 128, 2, "bfloat16", 2**21),
    "blocks of two steps": (1, 1500, 1, 1, 64, 64, 600, 2, "bfloat16", 2**21),
    "the most choices": (1, 4200, 1, 1, 64, 64, 64, 64, "bfloat16", 2**21),
    "full, several tiles": (1, 1100, 2, 1, 64, 64, None, None, "bfloat16", None),
    "full, heads of 256": (1, 600, 1, 1, 256, 256, None, None, "float32", None),
}
ATTENDS = {
    name: tuple("float32" if x == "float16" else x for x in case)
    for name, case in (attention_cases.ATTENDS | OWN).items()
}
QUICK = {"a tile and a half, grouped heads", "full, several tiles"}
# float32 has no rounded version to be measured against: its own roundings are a few units of 2**-24.
EXACT_ERROR = 2e-6


def run(name, interpret, monkeypatch):
    """Output, residuals and gradients of the kernels."""
    case = ATTENDS[name]
    monkeypatch.setattr(tpu, "PAIRS", case[9])
    rooms = (functools.partial(f, interpret=interpret) for f in (full_tpu.attention, tpu.moba_attention))
    call = attention_cases.call_of(name, case, *rooms)
    return jax.jit(functools.partial(with_gradients, call))(*attention_cases.inputs(name, case)[0])


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.check) for n in ATTENDS])
def test_interpreted_kernels_are_as_exact_as_plain_attention_in_their_type(name, monkeypatch):
    found = attention_cases.distances(name, ATTENDS[name], run(name, True, monkeypatch))
    assert found["agree"] > 0.999
    assert found["paper"].get("agree", 1) > 0.99
    for what in ("out", "dq", "dk", "dv"):
        mine, plain = found[what]
        assert mine <= (EXACT_ERROR if ATTENDS[name][8] == "float32" else 1.5 * plain), what
    assert all(found[what] < 1e-5 for what in ("lse", "max_logit")), found


RACES = """
import contextlib, io, json, sys
import jax, pytest
from jax.experimental.pallas import tpu as pltpu
from tests.test_moba_tpu import run
said = io.StringIO()
with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
    runs = [run(sys.argv[1], pltpu.InterpretParams(detect_races=True, random_seed=i), patch) for i in range(2)]
    same = jax.tree.map(lambda a, b: bool((a == b).all()), *runs)
print(json.dumps({"same": all(jax.tree.leaves(same)), "race": said.getvalue().partition("RACE")[2][:1000]}))
"""


@pytest.mark.parametrize(
    "name", ["a few tokens", *(pytest.param(n, marks=pytest.mark.check) for n in ("packed documents", "full"))]
)
def test_simulated_copies_have_no_race_and_any_order_of_programs_gives_the_same_bits(name):
    told = told_in({"JAX_PLATFORMS": "cpu"}, RACES, arguments=[name])
    assert told == {"same": True, "race": ""}


# --- the kernels, compiled for chips that are not here ------------------------------------------------------------

# Without these, libtpu asks a metadata server which machine this is.
NO_TPU = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

COMPILE = """
import functools, json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from k2jax.kernels.attention import tpu as full
from k2jax.kernels.moba import tpu
from tests.test_moba_tpu import COMPILED
B, T, S, H, G, K, V, dtype, C, top_k, packed, _ = COMPILED[sys.argv[2]]
topology = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1])
on = functools.partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(topology.devices[0]))
arrays = [on(shape, dtype) for shape in ((B, T, H, K), (B, S, G, K), (B, S, G, V))]
attend = full.attention if C is None else functools.partial(tpu.moba_attention, block_size=C, top_k=top_k)
extra = {"segment_ids": on((B, S), jnp.int32)} if packed else {}
extra |= {"q_offset": on((B,), jnp.int32)} if T < S else {}
def loss(q, k, v, extra):
    return attend(q, k, v, scale=0.1, **extra)[0].astype(jnp.float32).sum()
compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(*arrays, extra).compile()
memory = compiled.memory_analysis()
text = compiled.as_text()
print(json.dumps({"kernels": text.count('custom_call_target="tpu_custom_call"'),
                  "temp_mib": memory.temp_size_in_bytes / 2**20}))
"""

# batch, queries, keys, query heads, key heads, sizes of keys and values, type, block size, top_k, packed?, the most MiB
# beyond inputs and outputs: a tenth above the chip whose compiler takes most
COMPILED = {
    "moba": (2, 8192, 8192, 16, 16, 128, 128, "bfloat16", 512, 4, False, 1950),
    "moba MLA": (2, 8192, 8192, 16, 16, 192, 128, "bfloat16", 512, 4, False, 2700),
    "moba packed": (2, 8192, 8192, 16, 4, 128, 128, "bfloat16", 512, 4, True, 1450),
    "moba in small blocks": (1, 8192, 8192, 8, 8, 64, 64, "bfloat16", 200, 8, False, 850),
    "moba heads of 256": (1, 4096, 4096, 4, 2, 256, 256, "float32", 512, 3, False, 250),
    "moba, a chunk of the queries": (1, 2048, 32768, 8, 2, 128, 128, "bfloat16", 512, 8, False, 250),
    "moba at a long context": (1, 131072, 131072, 4, 4, 128, 128, "bfloat16", 4096, 12, False, 3300),
    "full": (2, 8192, 8192, 16, 16, 128, 128, "bfloat16", None, None, False, 500),
    "full MLA": (2, 8192, 8192, 16, 16, 192, 128, "bfloat16", None, None, False, 650),
    "full packed": (2, 8192, 8192, 16, 4, 64, 64, "bfloat16", None, None, True, 250),
    "full heads of 256": (1, 4096, 4096, 4, 2, 256, 256, "float32", None, None, False, 60),
}
CHIPS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")


@pytest.mark.check
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("name", COMPILED)
def test_forward_and_gradient_compile_for_a_chip_in_bounded_memory(chip, name):
    pytest.importorskip("libtpu")
    told = told_in(NO_TPU, COMPILE, arguments=[chip, name])
    *_, C, _, _, most = COMPILED[name]
    assert told["kernels"] == (3 if C is None else 6)
    assert told["temp_mib"] < most


@pytest.mark.parametrize("sizes", full_tpu.HEAD_SIZES, ids=str)
def test_kernels_lower_without_a_tpu(sizes):
    T = 1200
    q, k, v = (jax.ShapeDtypeStruct((1, T, h, n), "bfloat16") for h, n in ((4, sizes[0]), (2, sizes[0]), (2, sizes[1])))
    moba = functools.partial(tpu.moba_attention, scale=0.1, block_size=200, top_k=3)
    for attend in (moba, functools.partial(full_tpu.attention, scale=0.1)):
        loss = jax.grad(lambda *qkv, attend=attend: attend(*qkv)[0].astype(jnp.float32).sum(), argnums=(0, 1, 2))
        checks = [jax.export.DisabledSafetyCheck.custom_call("tpu_custom_call")]
        exported = jax.export.export(jax.jit(loss), platforms=["tpu"], disabled_checks=checks)(q, k, v)
        assert "tpu_custom_call" in exported.mlir_module()


# --- choosing -----------------------------------------------------------------------------------------------------

REFUSED = [
    ({"dtype": jnp.float16}, {}, "q, k and v are float16"),
    ({"K": 96}, {}, r"heads of sizes \(96, 128\): built are"),
    ({}, {"block_size": 48}, "block_size=48 is less than 64"),
    ({"T": 16384, "S": 16384}, {"top_k": 65}, "top_k=65 is more than 64"),
    ({"T": 2**20, "S": 2**20, "H": 16}, {"top_k": 64}, "a key head's tiles need tables of"),
    ({"T": 2**21, "S": 2**21, "B": 16}, {}, "need tables of 262144 numbers"),
]


@pytest.mark.parametrize(("changes", "arguments", "message"), REFUSED)
def test_a_named_kernel_says_why_it_cannot(monkeypatch, changes, arguments, message):
    on_tpu(monkeypatch)
    arguments = {"block_size": 128, "top_k": 3, "implementation": "tpu"} | arguments
    call = test_moba_sm90.call(**changes)
    with pytest.raises(ValueError, match=f"implementation='tpu' cannot run: .*{message}"):
        jax.eval_shape(functools.partial(moba_attention, **arguments), *call)
    assert "named by the caller, but it cannot run: " in moba_attention_plan(*call, **arguments)


def on_tpu(monkeypatch):
    for room in (device, attention_room, moba_pallas):
        monkeypatch.setattr(room, "not_tpu", lambda: None)


def test_none_does_not_take_on_a_tpu_what_never_ran_on_one_and_says_its_name(monkeypatch, caplog):
    on_tpu(monkeypatch)
    call = test_moba_sm90.call()
    plan = moba_attention_plan(*call, block_size=128, top_k=3)
    assert plan.startswith("implementation: xla\n")
    assert "have never run on one; name 'tpu' to take them" in plan
    attention_room._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, "k2jax.kernels.attention"):
        jax.eval_shape(functools.partial(attention, scale=1.0), *call)
    assert "'xla'" in caplog.text
    assert "name 'tpu' to take them" in caplog.text
    assert moba_attention_plan(*call, block_size=128, top_k=3, implementation="tpu").startswith("implementation: tpu\n")


def test_without_a_tpu_the_name_is_refused_with_the_reason():
    q, k, v = (jnp.zeros(x.shape, x.dtype) for x in test_moba_sm90.call(T=256, S=256))
    for run_named in (
        functools.partial(moba_attention, block_size=128, top_k=1, implementation="tpu"),
        functools.partial(attention, scale=1.0, implementation="tpu"),
    ):
        with pytest.raises(ValueError, match="implementation='tpu' cannot run: it needs a TPU, and the default device"):
            run_named(q, k, v)


def test_a_named_kernel_is_what_runs(monkeypatch):
    """Through the public functions, in the interpreter."""
    on_tpu(monkeypatch)
    (q, k, v, _), *_ = attention_cases.inputs("a few tokens", ATTENDS["a few tokens"])
    with pltpu.force_tpu_interpret_mode():
        out, residuals = moba_attention(q, k, v, block_size=64, top_k=2, return_residuals=True, implementation="tpu")
    right = reference.moba_attention(q, k, v, block_size=64, top_k=2, scale=q.shape[-1] ** -0.5)
    np.testing.assert_allclose(out.astype(jnp.float32), right.out_BTHV.astype(jnp.float32), atol=0.02)
    np.testing.assert_allclose(residuals.lse_BHT, right.residuals.lse_BHT, atol=1e-5)
