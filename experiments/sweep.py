r"""Trains every point of a config's get_sweep(add), N at a time, and compares them.

python -m experiments.sweep --config=configs/nano.py --workdir=runs/sweep --jobs=2
python -m experiments.sweep --config=configs/nano.py:steps=100 --workdir=runs/short --config.data.seed=1

Each point is an `experiments.train` of its own in WORKDIR/NAME. The same command again skips finished points and goes
on with the others.
"""

import argparse
import collections
import contextlib
import signal
import sys
import time
from pathlib import Path

from experiments import common, sweep_results
from experiments.sweep_jobs import Job, Slot, is_busy, make_slots, tail, visible_cores, visible_gpus
from experiments.sweep_points import Point, devices, points
from k2jax.training.errors import Interrupted, RunError, SetupError
from k2jax.training.progress import clock
from k2jax.training.workdir import locked

TICK = 0.2  # seconds between two looks at the jobs


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="config file with get_sweep, and an argument for every point")
    parser.add_argument("--workdir", type=Path, required=True, help="folder of the sweep; continued if it holds one")
    parser.add_argument("--jobs", type=int, default=1, help="points at a time; they share GPUs or cores (default 1)")
    parser.add_argument("--retries", type=int, default=1, help="how often a failed point is tried again (default 1)")
    parser.add_argument("--compile_cache", metavar="DIR|off", help="as for experiments.train")
    parser.add_argument("--track", metavar="wandb:PROJECT|trackio:PROJECT", help="as for experiments.train")
    return common.parse_flags(parser, argv)


def main(argv=None):
    flags, overrides = parse(argv)
    if flags.jobs < 1 or flags.retries < 0:
        raise SetupError(f"--jobs={flags.jobs} --retries={flags.retries}: expected at least 1 job and 0 retries")
    try:
        made = points(flags.config, overrides)
    except (ValueError, FileNotFoundError) as error:
        raise SetupError(error) from error
    slots = make_slots(flags.jobs, visible_gpus(), visible_cores())
    for point in made:
        if slots[0].gpus and devices(point) > min(len(slot.gpus) for slot in slots):
            raise SetupError(
                f"point {point.name} spans {devices(point)} devices, and --jobs={flags.jobs} leaves a job "
                f"{len(slots[-1].gpus)} of the GPUs: lower --jobs"
            )
    if (flags.workdir / "metrics.jsonl").exists():
        raise SetupError(f"--workdir={flags.workdir} holds a single run. Fix: give another folder.")
    passed = [f"--{n}={v}" for n in ("compile_cache", "track") if (v := getattr(flags, n))]
    with locked(flags.workdir):
        Sweep(flags, overrides, made, slots, passed).run()


class Sweep:
    """What is left to do, what runs, and what came of it."""

    def __init__(self, flags, overrides, made: list[Point], slots: list[Slot], passed: list[str]):
        self.flags, self.overrides, self.points, self.passed = flags, overrides, made, passed
        self.status = {p.name: "finished" if self._is_finished(p) else "waiting" for p in made}
        self.todo = [p for p in made if self.status[p.name] == "waiting"]
        self.queue = collections.deque(self.todo)
        self.free, self.running = collections.deque(slots), []
        self.failures = collections.Counter()
        self.stop_signal = None
        self._awaited = set()
        self._board = _Board(sum(p.cfg.train.steps for p in self.todo), self._steps())

    def run(self):
        """Runs all points. Raises Interrupted when stopped, RunError when points have failed for good."""
        say, skipped = self._board.say, len(self.points) - len(self.queue)
        say(
            f"{len(self.points)} points in {self.flags.workdir}, {skipped} finished before; {self.flags.jobs} at a time"
        )
        self._write()
        with self._signals():
            try:
                while (self.queue or self.running) and not self.stop_signal:
                    self._start()
                    self._reap()
                    self._board.show(self._counts, self._steps)
                    time.sleep(TICK)
            finally:
                self._end()
        rows = self._write()
        say(sweep_results.table(rows))
        say(sweep_results.write_overlay(self.flags.workdir, rows))
        say(f"table: {self.flags.workdir / 'sweep.json'}, {self.flags.workdir / 'sweep.csv'}")
        failed = [p for p in self.points if self.status[p.name] == "failed"]
        for point in failed:
            say(f"--- {point.name} failed; the end of {self._folder(point) / 'log.txt'}:")
            say(tail(self._folder(point) / "log.txt"))
        if self.stop_signal:
            raise Interrupted(
                f"stopped by {signal.Signals(self.stop_signal).name}: {self._counts()}. "
                "Run the same command to continue.",
                self.stop_signal,
            )
        if failed:
            raise RunError(
                f"{len(failed)} of {len(self.points)} points failed: {', '.join(p.name for p in failed)}. Fix: read "
                "their logs; the same command tries them again."
            )

    def _folder(self, point):
        return self.flags.workdir / point.name

    def _is_finished(self, point):
        folder = self._folder(point)
        return not is_busy(folder) and sweep_results.is_finished(point, folder)

    def _steps(self):
        """Steps done of the points that were not finished at the start; a failed one counts as a whole."""
        return sum(
            p.cfg.train.steps if self.status[p.name] == "failed" else sweep_results.steps_done(self._folder(p))
            for p in self.todo
        )

    def _counts(self):
        count = collections.Counter(self.status.values())
        return ", ".join(f"{count[s]} {s}" for s in ("finished", "failed", "running", "waiting") if count[s])

    def _start(self):
        for _ in range(len(self.queue)):
            if not self.free:
                return
            point = self.queue.popleft()
            folder = self._folder(point)
            if is_busy(folder):
                if point.name not in self._awaited:
                    self._awaited.add(point.name)
                    self._board.say(f"{point.name}: waits for a process that still trains there")
                self.queue.append(point)
                continue
            if sweep_results.is_finished(point, folder):  # By the process that was waited for.
                self._settle(point, "finished", "finished by another process")
                continue
            self.running.append(Job(point, folder, self.free.popleft(), self.passed))
            self.status[point.name] = "running"
            self._board.say(f"{point.name}: started{' again' * bool(self.failures[point.name])}")

    def _reap(self):
        for job in [job for job in self.running if job.status() is not None]:
            self.running.remove(job)
            self.free.append(job.slot)
            point = job.point
            if job.status() == 0 and self._is_finished(point):
                self._settle(point, "finished", "finished")
                continue
            self.failures[point.name] += 1
            left = self.flags.retries + 1 - self.failures[point.name]
            what = f"ended with status {job.status()}"
            if left > 0:
                self.queue.append(point)
                self._settle(point, "waiting", f"{what}; it is tried again ({left} left); see {job.log}")
            else:
                self._settle(point, "failed", f"{what} and is given up; see {job.log}")

    def _settle(self, point, status, text):
        self.status[point.name] = status
        self._board.say(f"{point.name}: {text} [{self._counts()}]")
        self._write()

    def _end(self):
        """Has what still runs save and end."""
        if not self.running:
            return
        self._board.say(f"stopping {len(self.running)} jobs, which save first; Ctrl-C again kills them")
        for job in self.running:
            job.send(signal.SIGTERM)
        try:
            while any(job.status() is None for job in self.running):
                time.sleep(TICK)
        except KeyboardInterrupt:
            self._board.say("killed; what their last checkpoints hold is safe")
            for job in self.running:
                job.send(signal.SIGKILL)
        for job in self.running:
            finished = self._is_finished(job.point)  # It may have ended by itself meanwhile.
            self.status[job.point.name] = "finished" if finished else "waiting"

    def _write(self):
        rows = [sweep_results.row(p, self._folder(p), self.status[p.name]) for p in self.points]
        sweep_results.write(self.flags.workdir, self.flags.config, self.overrides, rows)
        return rows

    @contextlib.contextmanager
    def _signals(self):
        def ask(number, frame):
            if self.stop_signal and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.stop_signal = number

        old = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


class _Board:
    """Lines that stay, and one that tells how far the sweep is: rewritten on a terminal, once a minute elsewhere."""

    def __init__(self, total: int, before: int):
        self._total, self._before, self._started = total, before, time.monotonic()
        self._terminal, self._open, self._next = sys.stdout.isatty(), False, 0.0

    def say(self, text: str) -> None:
        if self._open:
            sys.stdout.write("\r\x1b[2K")
            self._open = False
        print(text, flush=True)

    def show(self, counts, steps) -> None:
        """counts, steps: functions, since reading every run's metrics costs something; called when a line is due."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + (1 if self._terminal else 60)
        done = steps()
        new = done - self._before
        left = clock((self._total - done) * (now - self._started) / new) if new > 0 else "?"
        text = f"{counts()} | step {done}/{self._total} of all | eta {left}"
        if self._terminal:
            sys.stdout.write(f"\r\x1b[2K{text[:100]}")
            sys.stdout.flush()
            self._open = True
        else:
            print(text, flush=True)


if __name__ == "__main__":
    common.run_main(main)
