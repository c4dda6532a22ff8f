"""What a run writes down: metrics.jsonl always, TensorBoard beside it."""

import json
import math
import os
import time
from pathlib import Path

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from k2jax.training.errors import RunError, WorkdirError
from k2jax.training.trackers import Tracker, scalars

# Everything else in metrics.jsonl is the same, bit for bit, however often a run was interrupted.
TIME_FIELDS = ("step_time", "tokens_per_second", "mfu", "goodput")

ARRAY_FIELDS = ("max_logits", "expert_load")


class MetricsLog:
    """Appends one JSON object per step to metrics.jsonl, and its scalars to TensorBoard and to a tracker if any."""

    def __init__(self, workdir: Path, first_step: int, tracker: Tracker | None = None):
        """Drops the lines of steps after `first_step`, which a killed process wrote past its last checkpoint.

        Raises WorkdirError if metrics.jsonl is damaged, or ends before `first_step`: a step would be missing.
        """
        self.path = Path(workdir) / "metrics.jsonl"
        lines = read_metrics(self.path)
        self.history = [line for line in lines if line["step"] <= first_step]
        last = self.history[-1]["step"] if self.history else 0
        if self.path.exists() and last < first_step:
            raise WorkdirError(
                f"{self.path} ends at step {last}, but the last checkpoint is of step {first_step}. Fix: restore it, "
                f"or delete it; the log then starts after step {first_step}."
            )
        try:
            self._start_file()
            self._board = _Board(Path(workdir) / "tb", first_step)
        except OSError as error:
            raise RunError(_cannot_write(self.path, error)) from error
        self._tracker, self._tracked = tracker, lines[-1]["step"] if lines else 0
        if tracker and tracker.is_new:
            tracker.write(*self.history)
            self._tracked = first_step

    def write(self, line: dict) -> None:
        """Writes one step. Raises RunError if the disk is full."""
        try:
            self._append(line)
            self._board.write(line)
        except OSError as error:
            raise RunError(_cannot_write(self.path, error)) from error
        # A tracker cannot forget what a killed process told it: the same step again would stand there twice.
        if self._tracker and line["step"] > self._tracked:
            self._tracker.write(line)

    def amend(self, step: int, fields: dict) -> None:
        """Adds `fields` to the line of `step`, the last one, or starts the log with them."""
        last = self.history.pop() if self.history else {"step": step}
        self.history.append(last | _plain(fields))
        try:
            self._file.close()
            self._start_file()
            self._board.write({"step": step} | fields)
        except OSError as error:
            raise RunError(_cannot_write(self.path, error)) from error
        if self._tracker:
            self._tracker.write({"step": step} | fields)

    def sync(self) -> None:
        """Makes every line durable; called before a checkpoint, so that a resumed run misses no step."""
        try:
            os.fsync(self._file.fileno())
            self._board.flush()
        except OSError as error:
            raise RunError(_cannot_write(self.path, error)) from error

    def close(self) -> None:
        """Closes the files and the tracker."""
        self._file.close()
        self._board.close()
        if self._tracker:
            self._tracker.close()

    def _start_file(self):
        scratch = self.path.with_suffix(".tmp")
        with scratch.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in self.history)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, self.path)
        # Without a buffer: a line that did not fit the disk must not be tried again when the file is closed.
        self._file = self.path.open("ab", buffering=0)

    def _append(self, line):
        data = (json.dumps(_plain(line)) + "\n").encode()
        written = self._file.write(data)
        if written < len(data):  # The rest fails with the reason.
            self._file.write(data[written:])


class NoLog:
    """The MetricsLog of a process that writes nothing."""

    history = ()

    def write(self, line: dict) -> None: ...
    def amend(self, step: int, fields: dict) -> None: ...
    def sync(self) -> None: ...
    def close(self) -> None: ...


class _Board:
    """TensorBoard scalars, written in this thread.

    tensorboardX's SummaryWriter has a thread that dies of a full disk and then lets the run wait for ever.
    """

    def __init__(self, folder: Path, first_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        # The name counts seconds only: two starts within one must not share a file.
        self._events = EventsWriter(str(folder / "events"), filename_suffix=f".{time.time_ns()}")
        # TensorBoard forgets what a killed process wrote from this step on.
        restart = SessionLog(status=SessionLog.START)
        self._events.write_event(Event(wall_time=time.time(), step=first_step + 1, session_log=restart))
        self._events.flush()
        self._broken = False

    def write(self, line: dict) -> None:
        values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in scalars(line).items()]
        self._guard(
            lambda: self._events.write_event(
                Event(wall_time=time.time(), step=line["step"], summary=Summary(value=values))
            )
        )

    def flush(self) -> None:
        self._guard(self._events.flush)

    def close(self) -> None:
        # After an error the buffer still holds what did not fit: closing would raise it again.
        if not self._broken:
            self._events.close()

    def _guard(self, do):
        try:
            do()
        except OSError:
            self._broken = True
            raise


def _cannot_write(path, error) -> str:
    return (
        f"{path} (or tb/ beside it) cannot be written: {error}. Fix: free disk space, then run the same command again."
    )


def read_metrics(path: Path) -> list[dict]:
    """The complete lines of a metrics.jsonl; a last line cut short by a kill is left out.

    Raises WorkdirError for a line that is no JSON object with a step.
    """
    if not path.exists():
        return []
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WorkdirError(f"{path} cannot be read: {error}. Fix: move it away, or give another --workdir.") from error
    lines = []
    for number, text in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            line = json.loads(text)
            line["step"] + 0
        except (ValueError, TypeError, KeyError) as error:
            raise WorkdirError(
                f"{path}, line {number}, is damaged ({type(error).__name__}: {error}). Fix: restore the file, or "
                "delete it; the log then starts after the last checkpoint."
            ) from error
        lines.append(line)
    return lines


def _plain(value):
    """Arrays as lists of floats; NaN stays NaN, as Python's json reads it back."""
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    if np.ndim(value):
        return np.asarray(value, np.float64).tolist()
    number = np.asarray(value)
    return int(number) if np.issubdtype(number.dtype, np.integer) else float(number)


class SpikeDetector:
    """Tells a loss that stands out of the last ones; it never changes the run."""

    WINDOW, WARMUP, WIDTH = 100, 20, 6.0

    def __init__(self, losses=()):
        """losses: those of the steps so far, so that a resumed run judges as an uninterrupted one."""
        self._losses = [x for x in losses if math.isfinite(x)][-self.WINDOW :]

    def is_spike(self, loss: float) -> bool:
        """Whether `loss` lies more than 6 robust standard deviations above the median of the last 100."""
        recent = np.array(self._losses)
        self._losses = [*self._losses, loss][-self.WINDOW :] if math.isfinite(loss) else self._losses
        if len(recent) < self.WARMUP or not math.isfinite(loss):
            return False
        median = np.median(recent)
        # 1.4826 turns a median absolute deviation into a standard deviation of a normal distribution.
        deviation = 1.4826 * np.median(np.abs(recent - median))
        return bool(loss > median + self.WIDTH * max(deviation, 1e-3))
