"""The processes of a sweep: which part of the machine each gets, how it starts and ends."""

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from experiments.sweep_points import Point

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Slot:
    """A share of the machine for one process at a time: environment, and cores where they are divided."""

    env: dict[str, str]
    cores: frozenset[int] = frozenset()
    gpus: tuple[str, ...] = ()


def make_slots(jobs: int, gpus: list[str], cores: list[int]) -> list[Slot]:
    """The machine in `jobs` shares: GPUs dealt out in turn, else cores. More jobs than GPUs or cores share them."""
    if gpus:
        dealt = [tuple(gpus[i::jobs]) or (gpus[i % len(gpus)],) for i in range(jobs)]
        sharing = -(-jobs // len(gpus))
        memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / sharing:.2f}"} if sharing > 1 else {}
        return [Slot({"CUDA_VISIBLE_DEVICES": ",".join(own)} | memory, gpus=own) for own in dealt]
    size = max(len(cores) // jobs, 1)
    shares = [frozenset(cores[(i * size + k) % len(cores)] for k in range(size)) for i in range(jobs)]
    # XLA sizes its thread pool by NPROC, other libraries theirs by OMP_NUM_THREADS.
    return [Slot({"NPROC": str(size), "OMP_NUM_THREADS": str(size)}, cores=share) for share in shares]


def visible_gpus() -> list[str]:
    """Ids of the NVIDIA GPUs that JAX would use; found without starting a device in this process."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return []
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return []
    return [str(i) for i, _ in enumerate(line for line in listed.stdout.splitlines() if line.startswith("GPU "))]


def visible_cores() -> list[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


class Job:
    """A running point; its output goes to log.txt in the point's folder."""

    def __init__(self, point: Point, folder: Path, slot: Slot, flags: list[str]):
        """flags: given to experiments.train besides config, overrides and folder."""
        self.point, self.slot = point, slot
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "log.txt"
        changes = [f"--config.{path}={value!r}" for path, value in point.overrides.items()]
        words = [f"--config={point.config}", *changes, f"--workdir={folder}", "--distributed=off", *flags]
        # What the user has set stays; a GPU's id is what a slot is.
        env = os.environ | {k: v for k, v in slot.env.items() if k == "CUDA_VISIBLE_DEVICES" or k not in os.environ}
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"=== {time.strftime('%Y-%m-%d %H:%M:%S')} experiments.train {' '.join(words)}\n")
            log.flush()
            # A session of its own: Ctrl-C on the terminal reaches the sweep alone, which then ends its jobs.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "experiments.train", *words],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True,
                preexec_fn=_preparation(slot),
            )  # fmt: skip

    def status(self) -> int | None:
        """Its exit status, None while it runs."""
        return self._process.poll()

    def send(self, number: int) -> None:
        """Sends a signal, to a process that may have ended."""
        if self._process.poll() is None:
            self._process.send_signal(number)


def _preparation(slot):
    """What the child does before it becomes the trainer: takes its cores, and asks to be told when the sweep dies."""
    if not sys.platform.startswith("linux"):
        return None  # There an orphan trains on; a rerun waits for it.
    prctl, parent = ctypes.CDLL(None, use_errno=True).prctl, os.getpid()

    def prepare():
        if slot.cores:
            os.sched_setaffinity(0, slot.cores)
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # It died in between.
            os._exit(128 + signal.SIGTERM)

    return prepare


def is_busy(folder: Path) -> bool:
    """Whether a process still trains in the folder: one that outlived the sweep that started it."""
    lock = folder / ".lock"
    if not lock.exists():
        return False
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log, indented."""
    text = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else ["(no log)"]
    return "\n".join(f"    {line[:200]}" for line in text[-lines:])
