"""Several processes as one run: finds out how many there are, and joins them before any device work.

By itself it asks only the environment, and calls jax.distributed.initialize() where that says that there are several
processes: SLURM steps, TPU pods and slices (GKE sets their variables), Open MPI. Anything else is given by flag:
HOST:PORT of process 0, how many processes there are, and which one this is. jax ends a process whose partners do not
come by SIGABRT; with the flag they meet here first, so that a wrong number or a missing process is told as what it is.
"""

import contextlib
import logging
import os
import socket
import time

import jax

from k2jax.training.errors import SetupError

TIME_LIMIT = 300  # seconds to wait for the other processes

_FORM = "--distributed=HOST:PORT,NUM,ID, for example --distributed=10.0.0.1:1234,2,0 on the host 10.0.0.1"
_log = logging.getLogger(__name__)


def initialize(flag: str | None = None, *, time_limit: float = TIME_LIMIT) -> str:
    """Joins the processes of a run and says in one line what it found; call it before anything that uses a device.

    flag: None asks the environment; 'auto' too, and insists on several processes, found by jax itself where no variable
    tells (a TPU VM asks its metadata server); 'off' is one process whatever the environment says; HOST:PORT,NUM,ID
    names everything. time_limit: seconds.
    Raises SetupError for a flag that cannot be right, for partners that do not come, for two processes with one id, and
    where jax has started its devices or was initialised before.
    """
    if flag == "off":
        return "one process (--distributed=off)"
    if flag not in (None, "auto"):
        return _join(*_parse(flag), time_limit)
    count, where = _in_environment(flag == "auto")
    if flag is None and count == 1:
        return f"one process ({where})"
    _log.info("waiting up to %d s for the other processes (%s)", time_limit, where)
    _call_jax(where, initialization_timeout=int(time_limit))
    return f"process {jax.process_index()} of {jax.process_count()} ({where})"


def _in_environment(insists: bool) -> tuple[int | None, str]:
    """(how many processes, who says so); None for a number that only jax can find out."""
    env = os.environ
    if "SLURM_JOB_ID" in env and _number("SLURM_NTASKS") > 1:
        job = f"SLURM job {env['SLURM_JOB_ID']}, {env['SLURM_NTASKS']} tasks"
        if "SLURM_STEP_NODELIST" not in env:
            raise SetupError(
                f"{job}, but srun did not start this process. Fix: start it with srun, or give "
                "--distributed=off for one process."
            )
        return _number("SLURM_NTASKS"), f"{job}, task {env.get('SLURM_PROCID')}"
    hosts = len(list(filter(None, env.get("TPU_WORKER_HOSTNAMES", "").split(","))))
    slices = _number("MEGASCALE_NUM_SLICES")
    if hosts > 1 or slices > 1:
        return max(hosts, 1) * slices, f"TPU, {slices} slice{'s' * (slices > 1)} of {max(hosts, 1)} hosts"
    if _number("OMPI_COMM_WORLD_SIZE") > 1:
        return _number("OMPI_COMM_WORLD_SIZE"), f"Open MPI, rank {env.get('OMPI_COMM_WORLD_RANK')}"
    if hosts == 0 and "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env and not insists:
        raise SetupError(
            f"this is pod {env['JOB_COMPLETION_INDEX']} of an indexed Kubernetes Job, which does not say how many "
            f"there are. Fix: give {_FORM}, with the pod's index as ID; or --distributed=off for one process."
        )
    return (None, "found by jax") if insists else (1, "nothing in the environment speaks of more")


def _number(name) -> int:
    text = os.environ.get(name, "1")
    if not text.isdecimal():
        raise SetupError(
            f"the environment says {name}={text}: expected a number. Fix: give --distributed=off or {_FORM}."
        )
    return int(text)


def _parse(flag):
    """(host, port, num, id) of HOST:PORT,NUM,ID."""
    address, *numbers = flag.split(",")
    host, _, port = address.rpartition(":")
    if not (host and len(numbers) == 2 and all(n.isdecimal() for n in (port, *numbers))):
        raise SetupError(f"--distributed={flag}: expected auto, off, or {_FORM}")
    port, num, process = int(port), int(numbers[0]), int(numbers[1])
    if not 0 < port < 65536:
        raise SetupError(f"--distributed={flag}: port {port} does not exist; use one from 1024 to 65535")
    if process >= num:
        raise SetupError(f"--distributed={flag}: id {process} of {num} processes; ids run from 0 to {num - 1}")
    return host, port, num, process


def _join(host, port, num, process, time_limit):
    _refuse_second_start()
    address, end = f"{host}:{port}", time.monotonic() + time_limit
    if num > 1:
        _log.info("process %d of %d waits up to %d s for the others at %s", process, num, time_limit, address)
        if process == 0:
            _gather(host, port, num, end, time_limit)
        else:
            _knock(host, port, num, process, end, time_limit)
    # 'deactivate': the flag has said everything, and SLURM must not hand out the devices a second time.
    _call_jax(
        address, coordinator_address=address, num_processes=num, process_id=process,
        cluster_detection_method="deactivate", initialization_timeout=int(time_limit),
    )  # fmt: skip
    return f"process {process} of {num}, coordinator {address}"


def _refuse_second_start():
    if jax.distributed.is_initialized():
        raise SetupError("jax.distributed is initialised already. Fix: call it once, or give --distributed=off.")


def _call_jax(where, **arguments):
    _refuse_second_start()
    try:
        jax.distributed.initialize(**arguments)
    except (RuntimeError, ValueError, TypeError, OSError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise SetupError(
            f"the processes could not be joined ({where}): {reason}. Fix: name them yourself with {_FORM}; or give "
            "--distributed=off for one process. Nothing may use a device before."
        ) from error


# --- meeting: process 0 counts who is there, on the port that jax's service takes over -----------------------------


def _gather(host, port, num, end, time_limit):
    """Waits until every other process has knocked, then lets all of them go on."""
    try:
        # Both families where the system has both: what a name resolves to is not ours to know.
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        server = socket.create_server(("", port), family=family, dualstack_ipv6=dual)
    except OSError as error:
        raise SetupError(
            f"process 0 cannot listen on port {port}: {error.strerror}. Fix: another process has the port (a second "
            f"process with id 0?): choose another one, and give every process the same."
        ) from error
    here = {}
    with server, contextlib.ExitStack() as stack:
        while len(here) < num - 1:
            server.settimeout(max(end - time.monotonic(), 0.01))
            try:
                guest = stack.enter_context(server.accept()[0])
            except TimeoutError:
                missing = ", ".join(str(i) for i in range(1, num) if i not in here)
                raise SetupError(
                    f"process 0 waited {time_limit:.0f} s at {host}:{port}: processes {missing} of {num} did not come. "
                    "Fix: start them with the same address and number; the port must be open between the hosts."
                ) from None
            answer = _judge(guest, num, here)
            if answer == "wait":
                continue
            _answer(guest, answer)
        for guest in here.values():
            _answer(guest, "go")


def _judge(guest, num, here):
    """'wait' for a process that belongs to the run, else what is wrong with it."""
    guest.settimeout(10)
    try:
        word, *numbers = guest.recv(100).decode().split()
        their_num, process = map(int, numbers)
    except (ValueError, OSError):
        return "this is no process of k2jax"  # A port scanner, or a health check: no reason to end a run.
    if word != "k2jax" or not 0 < process < num:
        return f"id {process} is not one of 1 to {num - 1}"
    if their_num != num:
        return f"process 0 was started for {num} processes, this one for {their_num}: give all the same number"
    if process in here and not _has_left(here[process]):
        return f"another process has the id {process}: give every process its own"
    here[process] = guest
    return "wait"


def _has_left(guest):
    """Whether the other end is closed: nothing is sent to process 0 after the knock."""
    guest.setblocking(False)
    try:
        return guest.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _answer(guest, text):
    with contextlib.suppress(OSError):  # Whoever has gone meanwhile is missed by jax, with its time limit.
        guest.sendall(text.encode())


def _knock(host, port, num, process, end, time_limit):
    """Tells process 0 that this one is there, and waits until all are."""
    what = f"--distributed={host}:{port},{num},{process}"
    while True:
        try:
            with socket.create_connection(
                (host.strip("[]"), port), timeout=max(end - time.monotonic(), 0.01)
            ) as server:
                server.sendall(f"k2jax {num} {process}".encode())
                answer = server.recv(1000).decode()
        except (OSError, UnicodeDecodeError) as error:
            answer, reason = "", getattr(error, "strerror", None) or str(error)
        else:
            reason = "it closed the connection"
        if answer == "go":
            return
        if answer:
            raise SetupError(f"{what}: {answer}")
        if time.monotonic() >= end:
            raise SetupError(
                f"{what}: process 0 did not let this one join within {time_limit:.0f} s ({reason}). Fix: start process "
                f"0 on {host}, and see that its name resolves and port {port} is open."
            )
        time.sleep(0.2)
