"""Where a step's time goes: real traces on the CPU, op names as the compiler writes them, and missing files."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import step_profile

BODY = "jit(train_step)/while/body/eval_jaxpr/"


@pytest.mark.parametrize(
    ("op_name", "found"),
    [
        (BODY + "jvp()/while/body/eval_jaxpr/moe/experts/gather", ("experts", "forward")),
        (BODY + "transpose(jvp())/while/body/eval_jaxpr/checkpoint/moe/experts/gather", ("experts", "backward")),
        (BODY + "transpose(jvp())/rematted_computation/attention_full/exp", ("attention_full", "again")),
        ("jit(train_step)/optimizer/while/body/...ij,...jm->...im/dot_general", ("optimizer", "update")),
        (BODY + "jvp()/while/body/add", (step_profile.OTHER, "forward")),
        (BODY + "jvp()/moe/router/dot_general", ("router", "forward")),
    ],
)  # fmt: skip
def test_an_operation_belongs_to_its_innermost_scope_and_its_pass(op_name, found):
    assert step_profile.part(op_name) == found


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """(trace, hlo) folders of a small function with two scopes, run twice."""
    folder = tmp_path_factory.mktemp("traced")

    @jax.jit
    def train_step(x):
        with jax.named_scope("experts"):
            y = jnp.sort(x @ x)  # nothing fuses with a sort
        with jax.named_scope("optimizer"):
            return jnp.sin(y @ x).sum()

    x = jax.random.normal(jax.random.key(0), (256, 256))
    compiled = train_step.lower(x).compile()
    (folder / "hlo").mkdir()
    (folder / "hlo" / "module_0001.jit_train_step.cpu_after_optimizations.txt").write_text(compiled.as_text())
    compiled(x).block_until_ready()
    with jax.profiler.trace(folder / "trace"):
        for _ in range(2):
            compiled(x).block_until_ready()
    return folder / "trace", folder / "hlo"


def test_kernels_of_a_real_trace_find_their_scopes(traced):
    found = step_profile.table(*traced, steps=2)
    assert {"experts", "optimizer"} <= found["parts"].keys()
    assert found["parts"]["optimizer"].keys() == {"update"}
    sums = sum(sum(times.values()) for times in found["parts"].values()) + found["unnamed"]
    assert sums == pytest.approx(found["total"], abs=0.01)
    assert step_profile.table(*traced, steps=1)["total"] == pytest.approx(2 * found["total"], abs=0.01)
    assert "experts" in "\n".join(step_profile.lines(found))


def test_what_is_missing_is_named_with_the_fix(tmp_path, traced):
    with pytest.raises(FileNotFoundError, match="--profile=FIRST:LAST"):
        step_profile.table(tmp_path, traced[1], 1)
    with pytest.raises(FileNotFoundError, match="XLA_FLAGS"):
        step_profile.table(traced[0], tmp_path, 1)
    with gzip.open(tmp_path / "a.trace.json.gz", "wt") as file:
        json.dump({"traceEvents": [{"name": "x", "dur": 1, "pid": 1, "args": {}}]}, file)
    with pytest.raises(ValueError, match="command buffers"):
        step_profile.kernels(tmp_path)
