"""Meshes and processes on two real GPUs: what simulated devices show, where the links are real. Run by `make gpu`."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from k2jax.training.metrics import read_metrics
from tests import tiny
from tests.on_devices import ROOT, told_in
from tests.test_meshes import STEPS

pytestmark = pytest.mark.gpu

GPUS = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
# Gathers and sums in float32, but a GPU's matrix products order their sums by shape: wider than on the CPU.
TOLERANCE, PARAMETERS = 2e-4, 2e-3
PATIENCE = 300  # seconds


@pytest.fixture(autouse=True)
def two_gpus():
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    if listed.count("GPU ") < 2:
        pytest.skip("needs two GPUs")


@pytest.mark.parametrize("axis", ["data", "fsdp", "expert", "seq", "tensor"])
def test_a_mesh_of_two_gpus_trains_as_one(axis):
    told = told_in(GPUS, STEPS, timeout=PATIENCE, arguments=[json.dumps([{axis: 2}]), "only these"])
    [(metrics, parameters, stored)] = told.values()
    assert metrics < TOLERANCE
    assert parameters < PARAMETERS
    assert stored < 0.52 or axis in ("data", "seq", "expert", "tensor")


CUT_SEQUENCES = """
import functools, json
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from benchmarks.moba import inputs, with_gradients
from k2jax.kernels.attention import attention
from k2jax.moba_pallas import moba_attention

mesh = jax.make_mesh((2,), ("seq",), axis_types=(AxisType.Explicit,))
arrays = inputs(1, 4096, 4, 2)
segments = jnp.where(jnp.arange(4096) < 1500, 1, 2)[None]

def full(*qkv, segment_ids, implementation):
    return attention(*qkv, scale=0.1, segment_ids=segment_ids, max_logits=True, implementation=implementation)

def moba(*qkv, segment_ids, implementation):
    options = {"segment_ids": segment_ids, "return_residuals": True, "implementation": implementation}
    out, residuals = moba_attention(*qkv, scale=0.1, block_size=128, top_k=4, **options)
    return out, residuals.max_logit_BH

told = {}
for name, attend in (("full", full), ("moba", moba)):
    for documents in (None, segments):
        run = functools.partial(attend, segment_ids=documents, implementation="sm90")
        call = lambda *arrays: jax.jit(functools.partial(with_gradients, run))(*arrays)
        one = jax.device_get(call(*arrays))
        with jax.set_mesh(mesh):
            place = NamedSharding(mesh, P(None, "seq", None, None))
            two = jax.device_get(call(*(jax.device_put(x, place) for x in arrays)))
        norm = lambda x: float(jnp.linalg.norm(jnp.asarray(x, jnp.float32)))
        errors = jax.tree.map(lambda a, b: norm(a.astype("float32") - b.astype("float32")) / norm(b), two, one)
        told[f"{name}, {'one document' if documents is None else 'two documents'}"] = max(jax.tree.leaves(errors))
print(json.dumps(told))
"""


def test_kernels_on_a_sequence_cut_over_two_gpus_agree_with_one():
    told = told_in({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, CUT_SEQUENCES, timeout=PATIENCE)
    # Each device rounds its part of dk and dv before they are summed.
    assert len(told) == 4
    assert all(error < 6e-3 for error in told.values()), told


def start(workdir, source, steps):
    """Two processes of one run, a GPU each."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = []
    for i in range(2):
        command = [sys.executable, "-m", "experiments.train", f"--workdir={workdir}"]
        command += [f"--config=tests/tiny.py:source={source},steps={steps},every=2,data=2"]
        command += [f"--distributed={address},2,{i}", "--config.optimizer.final_learning_rate=0.02"]
        env = os.environ | GPUS | {"CUDA_VISIBLE_DEVICES": str(i)}
        with open(f"{workdir}.log{i}", "a") as log:
            started.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log))
    return started


def losses(workdir):
    return [line["loss"] for line in read_metrics(workdir / "metrics.jsonl")]


def test_two_processes_with_a_gpu_each_are_killed_and_go_on(tmp_path):
    source = tiny.write_text(tmp_path / "text")
    for process in start(tmp_path / "whole", source, 10):
        assert process.wait(PATIENCE) == 0, (tmp_path / "whole.log0").read_text()
    killed = start(tmp_path / "killed", source, 10)
    end = time.monotonic() + PATIENCE
    while not list((tmp_path / "killed").glob("checkpoints/[0-9]*")):
        assert time.monotonic() < end
        assert all(process.poll() is None for process in killed)
        time.sleep(0.05)
    killed[1].send_signal(signal.SIGKILL)
    for process in killed:
        assert process.wait(PATIENCE) != 0, "the other process must not go on alone"
    for process in start(tmp_path / "killed", source, 10):
        assert process.wait(PATIENCE) == 0, (tmp_path / "killed.log0").read_text()
    assert len(losses(tmp_path / "killed")) == 10
    assert losses(tmp_path / "killed") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)
