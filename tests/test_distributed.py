"""Joining processes: what the environment says, what a flag says, and every way in which partners fail to come."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import pytest

from k2jax.training import distributed
from k2jax.training.errors import SetupError

ROOT = Path(__file__).parents[1]
MARKS = ("SLURM", "TPU", "MEGASCALE", "OMPI", "KUBERNETES", "JOB_COMPLETION", "JAX_")


@pytest.fixture
def environment(monkeypatch):
    """Sets the environment of a cluster and nothing of another one."""

    def set_to(values):
        for name in [n for n in os.environ if n.startswith(MARKS)]:
            monkeypatch.delenv(name)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_to


@pytest.fixture
def calls(monkeypatch):
    """What jax.distributed.initialize was called with; it does nothing."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    return calls


STEP = {"SLURM_JOB_ID": "17", "SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_STEP_NODELIST": "n[1-4]"}

CLUSTERS = {
    "nothing": ({}, False, "one process (nothing in the environment speaks of more)"),
    "slurm": (STEP, True, "SLURM job 17, 4 tasks, task 2"),
    "slurm, one task": (STEP | {"SLURM_NTASKS": "1"}, False, "one process"),
    "tpu pod": ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, True, "TPU, 1 slice of 2 hosts"),
    "tpu, one host": ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, False, "one process"),
    "two slices": ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True, "TPU, 2 slices of 1 hosts"),
    "open mpi": ({"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "3"}, True, "Open MPI, rank 3"),
    "a pod of a tpu job": (
        {"KUBERNETES_SERVICE_HOST": "x", "JOB_COMPLETION_INDEX": "0", "TPU_WORKER_HOSTNAMES": "localhost"},
        False, "one process",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_environment_decides_whether_jax_is_asked(environment, calls, name):
    values, several, text = CLUSTERS[name]
    environment(values)
    assert text in distributed.initialize(None, time_limit=7)
    assert calls == ([{"initialization_timeout": 7}] if several else [])
    assert "\n" not in distributed.initialize("off")


def test_off_and_auto_overrule_the_environment(environment, calls):
    environment(STEP)
    assert distributed.initialize("off") == "one process (--distributed=off)"
    assert calls == []
    environment({})
    assert "found by jax" in distributed.initialize("auto")
    assert len(calls) == 1


REFUSED = {
    "a batch script without srun": ({k: v for k, v in STEP.items() if "STEP" not in k}, "srun did not start"),
    "an indexed job": ({"KUBERNETES_SERVICE_HOST": "x", "JOB_COMPLETION_INDEX": "2"}, "this is pod 2 of an indexed"),
    "no number": (STEP | {"SLURM_NTASKS": "four"}, "SLURM_NTASKS=four: expected a number"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_copies_that_would_train_side_by_side_are_refused(environment, calls, name):
    values, text = REFUSED[name]
    environment(values)
    with pytest.raises(SetupError, match="Fix: ") as error:
        distributed.initialize(None)
    assert text in str(error.value)
    assert "--distributed=off" in str(error.value)
    assert calls == []


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("on", "expected auto, off, or --distributed=HOST:PORT,NUM,ID"),
        ("host,2,0", "expected auto"),
        ("host:1234,2", "expected auto"),
        ("host:1234,2,-1", "expected auto"),
        (":1234,2,0", "expected auto"),
        ("host:99999,2,0", "port 99999 does not exist"),
        ("host:1234,2,2", "id 2 of 2 processes; ids run from 0 to 1"),
        ("host:1234,0,0", "id 0 of 0 processes"),
    ],
)
def test_a_flag_that_cannot_be_right_is_refused(calls, flag, text):
    with pytest.raises(SetupError) as error:
        distributed.initialize(flag)
    assert text in str(error.value)
    assert calls == []


def test_devices_that_have_started_already_are_told():
    jax.devices()
    with pytest.raises(SetupError, match=r"could not be joined .* before .* Fix: .*--distributed=off"):
        distributed.initialize(f"localhost:{free_port()},1,0", time_limit=2)


def test_jax_that_cannot_find_the_cluster_is_told(environment):
    environment({})
    with pytest.raises(SetupError, match=r"could not be joined \(found by jax\)"):
        distributed.initialize("auto", time_limit=2)


# --- the meeting, without jax -----------------------------------------------------------------------------------------


def free_port():
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def meet(calls):
    """Starts processes (as threads) with these (num, id); gives what each returned or raised."""

    def start(*numbers, time_limit=5.0, port=None, before=lambda port: None):
        port, ends = port or free_port(), {}

        def one(key, num, process):
            try:
                ends[key] = distributed.initialize(f"localhost:{port},{num},{process}", time_limit=time_limit)
            except SetupError as error:
                ends[key] = str(error)

        threads = [threading.Thread(target=one, args=(i, *pair)) for i, pair in enumerate(numbers)]
        threads[0].start()
        before(port)
        for thread in threads[1:]:
            thread.start()
        for thread in threads:
            thread.join(20)
        return [ends[i] for i in range(len(numbers))]

    return start


def test_all_go_on_when_all_are_there(meet, calls):
    ends = meet((3, 0), (3, 1), (3, 2))
    assert [end.partition(",")[0] for end in ends] == [f"process {i} of 3" for i in range(3)]
    assert sorted(call["process_id"] for call in calls) == [0, 1, 2]
    assert {call["cluster_detection_method"] for call in calls} == {"deactivate"}


def test_who_comes_before_process_0_waits(meet):
    assert "process 1 of 2" in meet((2, 1), (2, 0), before=lambda port: time.sleep(0.5))[0]


def test_process_0_names_those_who_did_not_come(meet, calls):
    ends = meet((4, 0), (4, 2), time_limit=1.0)
    assert "waited 1 s" in ends[0]
    assert "processes 1, 3 of 4 did not come. Fix: start them" in ends[0]
    assert "did not let this one join within 1 s" in ends[1]
    assert calls == []


@pytest.mark.parametrize("host", ["localhost", "no-such-host.invalid"])
def test_a_coordinator_out_of_reach_has_a_time_limit_and_a_fix(calls, host):
    start = time.monotonic()
    with pytest.raises(SetupError, match=rf"within 1 s .* Fix: start process 0 on {host}"):
        distributed.initialize(f"{host}:{free_port()},2,1", time_limit=1)
    assert time.monotonic() - start < 8
    assert calls == []


def test_two_processes_with_one_id(meet):
    ends = meet((3, 0), (3, 1), (3, 1), time_limit=2.0)
    assert sum("another process has the id 1: give every process its own" in end for end in ends[1:]) == 1
    assert "processes 2 of 3 did not come" in ends[0]


def test_another_number_of_processes(meet):
    ends = meet((2, 0), (3, 1), time_limit=1.0)
    assert "process 0 was started for 2 processes, this one for 3" in ends[1]


def test_a_second_process_0(meet):
    ends = meet((2, 0), (2, 0), time_limit=1.0, before=lambda port: time.sleep(0.3))
    assert "cannot listen on port" in ends[1]
    assert "a second process with id 0?" in ends[1]


def test_strangers_on_the_port_and_a_partner_that_died_do_not_matter(meet):
    def visit(port):
        for message in (b"GET / HTTP/1.1\r\n\r\n", b"\xff\xfe", b"", b"k2jax 2 1"):
            with socket_to(port) as guest:
                guest.sendall(message)

    assert "process 0 of 2" in meet((2, 0), (2, 1), before=visit)[0]


@contextlib.contextmanager
def socket_to(port):
    for _ in range(100):
        with contextlib.suppress(OSError):
            guest = socket.create_connection(("localhost", port), timeout=1)
            break
        time.sleep(0.02)
    with guest:
        yield guest


# --- real processes ---------------------------------------------------------------------------------------------------

PROGRAM = """
import sys
from k2jax.training import distributed
print(distributed.initialize(sys.argv[1] if len(sys.argv) > 1 else None, time_limit=60))
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
own = np.array([10.0 ** jax.process_index()], np.float32)
x = jax.make_array_from_process_local_data(NamedSharding(mesh, P("x")), own)
with jax.set_mesh(mesh):
    print(jax.process_count(), float(jax.jit(lambda x: x.sum())(x)))
"""


@pytest.mark.parametrize("way", ["flag", "slurm"])
def test_two_cpu_processes_compute_together(way):
    port = free_port()
    clean = {k: v for k, v in os.environ.items() if not k.startswith(MARKS)} | {"JAX_PLATFORMS": "cpu"}
    processes = []
    for i in range(2):
        # jax's port follows from the job's number.
        slurm = {
            "SLURM_JOB_ID": str(port), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_PROCID": str(i),
            "SLURM_LOCALID": str(i),
        }  # fmt: skip
        flag = [f"localhost:{port},2,{i}"] if way == "flag" else []
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *flag], env=clean | (slurm if way == "slurm" else {}), cwd=ROOT,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    for i, process in enumerate(processes):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        lines = out.splitlines()  # Gloo's own among them.
        said = next(line for line in lines if line.startswith(f"process {i} of 2"))
        assert ("SLURM" in said) == (way == "slurm")
        assert "2 11.0" in lines
