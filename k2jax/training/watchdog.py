"""Notices that a run hangs, and writes down where: which step, doing what, and the Python stacks of all threads.

The rule: nothing that the loop does (waiting for data, a step, a batch of an evaluation, a save) may take longer than
ten times the median of the last steps, or 5 minutes, whichever is longer. A hang is only told. The run keeps waiting,
because a slow disk or network comes back, and ending the process costs the steps since the last checkpoint; who wants
an end sends SIGKILL, since SIGTERM is heard between two steps. Starting up and compiling are not watched.
"""

import collections
import faulthandler
import logging
import statistics
import sys
import threading
import time
from pathlib import Path

_log = logging.getLogger(__name__)

LEAST = 300.0  # seconds
TIMES = 10  # the median step


class Watchdog:
    """Watches the thread that calls `at`; to be closed."""

    def __init__(self, file: Path, limit: float | None):
        """file: where the stacks go; made when something hangs. limit: seconds; None: the rule; 0: no watching."""
        self._file, self._fixed = Path(file), limit
        self._steps = collections.deque(maxlen=100)
        self._lock = threading.Lock()
        self._doing, self._since, self._next, self._told = None, 0.0, 0.0, False
        self._closed = threading.Event()
        self._thread = None

    @property
    def limit(self) -> float:
        """Seconds that anything may take now."""
        if self._fixed is not None:
            return self._fixed
        return max(LEAST, TIMES * statistics.median(self._steps)) if self._steps else LEAST

    def at(self, phase: str, step: int) -> None:
        """From now on the loop does `phase` of `step`; calling it again with the same says that it is alive."""
        if self._fixed == 0:
            return
        with self._lock:
            before, self._doing = self._doing, (phase, step)
            now = time.monotonic()
            taken, self._since, self._next = now - self._since, now, now + self.limit
            told, self._told = self._told, False
        if told:
            _log.warning("%s of step %d took %.0f s; the run goes on", *before, taken)
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def rest(self) -> None:
        """Nothing is watched until the next `at`."""
        with self._lock:
            self._next, self._told = float("inf"), False

    def step_took(self, seconds: float) -> None:
        """The time of a finished step, for the rule."""
        self._steps.append(seconds)

    def close(self) -> None:
        """Ends the watching."""
        self._closed.set()
        if self._thread:
            self._thread.join(5)  # It may itself hang on the disk.
            faulthandler.cancel_dump_traceback_later()

    def _watch(self):
        while not self._closed.wait(min(1.0, self.limit / 4)):
            # Code that hangs without letting other threads run stops this one too: then C code prints the stacks.
            faulthandler.dump_traceback_later(self.limit + 1, file=sys.__stderr__)
            with self._lock:
                now = time.monotonic()
                late = now >= self._next
                if late:
                    taken, self._told = now - self._since, True
                    self._next = now + taken  # Told again after twice the time, then four times.
                phase, step = self._doing
            if late:
                self._tell(phase, step, taken)

    def _tell(self, phase, step, taken):
        what = f"{phase} of step {step} has taken {taken:.0f} s (limit {self.limit:.0f} s)"
        where = f"the stacks of all threads are in {self._file}"
        try:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {what}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                file.write("\n")
        except OSError as error:
            where = f"{self._file} cannot be written ({error.strerror})"
        _log.warning("HANG? %s; %s. The run keeps waiting; kill -9 keeps the last checkpoint.", what, where)
