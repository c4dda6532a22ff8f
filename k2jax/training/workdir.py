"""The run folder: who may write to it, and whether it belongs to this config."""

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import time
from pathlib import Path

from k2jax.config import RunConfig
from k2jax.training.errors import WorkdirError

# What may differ when a run goes on: how long it is, how it is watched, and how it is spread over devices (which
# changes the order of sums), never what it computes per step. The schedule follows the length, so a longer run decays
# later.
_MAY_CHANGE = (
    "train.steps", "train.eval_every", "train.checkpoint_every", "train.checkpoints_kept", "train.log_every",
    "train.max_skipped", "train.sample_tokens", "train.watchdog_seconds", "data.prefetch", "optimizer.learning_rate",
    "optimizer.final_learning_rate", "optimizer.warmup_tokens", "optimizer.constant_tokens",
    "mesh.slice", "mesh.data", "mesh.fsdp", "mesh.expert", "mesh.seq", "mesh.tensor",
    "model.moe.dispatch", "model.remat", "train.loss_chunk",
)  # fmt: skip
_STAGE = re.compile(r"^stages\[\d+\]\.")


@contextlib.contextmanager
def locked(workdir: Path):
    """Holds the folder for this process. Raises WorkdirError while another process trains in it."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / ".lock").open("w")
    except OSError as error:
        raise WorkdirError(f"--workdir={workdir} cannot be written: {error}. Fix: give another folder.") from error
    with lock:
        try:
            # The system drops this lock when the process ends, however it ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WorkdirError(
                f"--workdir={workdir}: another process is training there. Fix: wait for it, or give another folder."
            ) from None
        yield


def check(workdir: Path, cfg: RunConfig) -> list[str]:
    """Whether the folder may go on as this run; it changes nothing. Returns what changed in the config, as text.

    Raises WorkdirError when the folder belongs to another config, or holds something that is no run.
    """
    path = workdir / "config.json"
    if not path.exists():
        for name in ("checkpoints", "metrics.jsonl"):
            if (workdir / name).exists():
                raise WorkdirError(
                    f"{workdir} has {name} but no config.json. Fix: restore it, or give another --workdir."
                )
        return []
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise WorkdirError(f"{path} is not JSON ({error}). Fix: restore it, or give another --workdir.") from error
    if not isinstance(old, dict):
        raise WorkdirError(f"{path} holds no config but {old!r:.40}. Fix: restore it, or give another --workdir.")
    changes = [
        f"{name}: {a} -> {b}" for name, a, b in _differences(old, json.loads(json.dumps(dataclasses.asdict(cfg))))
    ]
    fatal = [c for c in changes if _STAGE.sub("", c.partition(":")[0]) not in _MAY_CHANGE]
    if fatal:
        raise WorkdirError(
            f"--workdir={workdir} belongs to another config: {'; '.join(fatal)} (there -> here). "
            "Fix: use that config, or give another --workdir."
        )
    return changes


def claim(workdir: Path, cfg: RunConfig) -> None:
    """Writes config.json, whole or not at all. Raises WorkdirError when that fails."""
    path = workdir / "config.json"
    scratch = path.with_suffix(".tmp")
    try:
        scratch.write_text(json.dumps(dataclasses.asdict(cfg), indent=2) + "\n", encoding="utf-8")
        os.replace(scratch, path)
    except OSError as error:
        raise WorkdirError(f"{path} cannot be written: {error}. Fix: free disk space, run again.") from error


def is_shared(workdir: Path) -> bool:
    """Whether this process sees what the first one wrote into the folder, after 10 s at most."""
    end = time.monotonic() + 10.0  # A network's file system may lag behind.
    while not (workdir / "config.json").exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def _differences(old, new, name=""):
    """(name, old, new) of every field that differs, in stages too if there are as many; both as JSON reads them."""
    if isinstance(old, dict) and isinstance(new, dict):
        for field in sorted({*old, *new}):
            yield from _differences(old.get(field), new.get(field), f"{name}.{field}" if name else field)
    elif name == "stages" and isinstance(old, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from _differences(a, b, f"stages[{i}]")
    elif old != new:
        yield name, old, new
