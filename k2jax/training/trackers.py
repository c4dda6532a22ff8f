"""Weights & Biases and trackio as followers of metrics.jsonl: the same lines, the scalars of them.

A tracker works in a thread of its own, and the training never waits for it: whatever fails or hangs there is said once
and the run goes on, because metrics.jsonl has everything. A resumed run continues the tracker's run.
"""

import dataclasses
import importlib
import json
import logging
import os
import queue
import re
import threading
import uuid
from pathlib import Path

import numpy as np

from k2jax.config import RunConfig
from k2jax.training.errors import SetupError, WorkdirError

_log = logging.getLogger(__name__)

KINDS = ("wandb", "trackio")
WAITING = 10_000  # steps that may wait to be sent
PATIENCE = 60.0  # seconds for what is left when the run ends


def check(spec: str) -> tuple[str, str]:
    """(tracker, project) of 'wandb:PROJECT' or 'trackio:PROJECT', with the package present and logged in.

    Raises SetupError otherwise, before anything has started.
    """
    kind, _, project = spec.partition(":")
    if kind not in KINDS or not re.fullmatch(r"[\w.-]{1,100}", project):
        raise SetupError(
            f"--track={spec}: expected {' or '.join(f'{k}:PROJECT' for k in KINDS)}; letters, digits and -_. in PROJECT"
        )
    try:
        module = importlib.import_module(kind)
    except ImportError as error:
        raise SetupError(f'--track={spec}: {error}. Fix: pip install "k2jax[{kind}]".') from error
    # Without a key wandb would ask for one on the terminal, from within its thread.
    if kind == "wandb" and os.environ.get("WANDB_MODE", "online") == "online" and not module.login(prompt=False):
        raise SetupError(f"--track={spec}: nobody is logged in. Fix: wandb login; or WANDB_MODE=offline keeps it here.")
    return kind, project


class Tracker:
    """Sends lines to one tracker; to be closed."""

    def __init__(self, kind: str, project: str, workdir: Path, cfg: RunConfig):
        self._kind = kind
        self._name, self.is_new = _identity(kind, project, workdir)
        self._arguments = {"project": project, "config": dataclasses.asdict(cfg), "resume": "allow"}
        if kind == "wandb":
            self._arguments |= {"id": self._name, "name": workdir.resolve().name, "dir": str(workdir)}
        else:
            self._arguments |= {"name": self._name}  # trackio knows a run by its name
        self._lines = queue.Queue()
        self._failed = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"tracker {kind}", daemon=True)
        self._thread.start()

    def write(self, *lines: dict) -> None:
        """Passes the scalars of lines on, at once."""
        if self._failed.is_set():
            return
        if self._lines.qsize() >= WAITING:
            self._fail(f"{WAITING} steps wait to be sent")
        self._lines.put(lines)

    def close(self) -> None:
        """Waits a minute at most for what is left."""
        self._lines.put(None)
        if not self._failed.is_set():
            self._thread.join(PATIENCE)
            if self._thread.is_alive():
                self._fail(f"it did not finish within {PATIENCE:.0f} s")

    def _work(self):
        # Whatever a tracker raises, even SystemExit, must not end the run; it is told, not swallowed.
        try:
            run = importlib.import_module(self._kind).init(**self._arguments)
            while (lines := self._lines.get()) is not None:
                for line in lines:
                    run.log(scalars(line), step=line["step"])
            run.finish()
        except BaseException as error:
            self._fail(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")

    def _fail(self, reason):
        if not self._failed.is_set():
            self._failed.set()
            _log.warning(
                "TRACKER LOST: %s follows this run no more (%s). The training goes on; metrics.jsonl has every line.",
                self._kind, reason,
            )  # fmt: skip


def scalars(line: dict) -> dict:
    """The numbers of a metrics line, without its arrays and its step."""
    return {
        n: np.asarray(v).item() for n, v in line.items() if n != "step" and not isinstance(v, dict) and not np.ndim(v)
    }


def _identity(kind, project, workdir):
    """(id of the tracker's run, whether it is new), kept in the work folder."""
    path = workdir / "tracker.json"
    known = {}
    if path.exists():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            known = {name: str(known[name]) for name in known}
        except (ValueError, TypeError, OSError) as error:
            raise WorkdirError(
                f"{path} cannot be read ({error}). Fix: delete it; a new tracker run then starts."
            ) from error
    spec = f"{kind}:{project}"
    if spec in known:
        return known[spec], False
    # The folder's name for people, the rest so that two runs of one name stay apart.
    stem = re.sub(r"[^\w-]+", "-", workdir.resolve().name)[:60]
    known[spec] = f"{stem}-{uuid.uuid4().hex[:8]}"
    scratch = path.with_suffix(".tmp")
    try:
        scratch.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
        os.replace(scratch, path)
    except OSError as error:
        raise WorkdirError(f"{path} cannot be written: {error}. Fix: free disk space, run again.") from error
    return known[spec], True
