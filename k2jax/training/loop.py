"""The training loop: joins data, step, evaluation, checkpoints and metrics.

Everything that a person can get wrong is checked before device work starts. The device is never waited for inside
the loop: a step is dispatched first, then the numbers of the step before are read.
"""

import contextlib
import dataclasses
import math
import signal
import time
from functools import partial
from pathlib import Path

import jax

from k2jax import sharding
from k2jax.config import RunConfig
from k2jax.data.shards import ShardError
from k2jax.model import count_params
from k2jax.muonclip import describe
from k2jax.training import compile_cache, memory, trackers
from k2jax.training.checkpoints import Checkpoints
from k2jax.training.corpus import read_corpus
from k2jax.training.errors import Interrupted, NonFiniteError, RunError, SetupError
from k2jax.training.evaluate import write_sample, write_selections
from k2jax.training.hardware import peak_flops_per_device
from k2jax.training.metrics import ARRAY_FIELDS, MetricsLog, NoLog, SpikeDetector
from k2jax.training.optimizer import leaf_roles, newton_schulz
from k2jax.training.processes import Agreement, ending_together, is_first
from k2jax.training.progress import Progress, clock
from k2jax.training.schedules import by_step
from k2jax.training.stages import check_sizes, stages_of
from k2jax.training.step import init_state
from k2jax.training.watchdog import Watchdog
from k2jax.training.workdir import check, claim, is_shared, locked


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended: finished steps, the last evaluation, whether there was nothing left to do."""

    steps: int
    evaluation: dict
    already_done: bool


def train(
    cfg: RunConfig, workdir: Path, *, profile: tuple[int, int] | None = None, stream=None, track: str | None = None
) -> Result:
    """Trains to cfg.train.steps, from the last complete checkpoint in `workdir` if there is one.

    profile: (first, last) steps to trace into workdir/profile, both included. stream: where progress goes; stdout by
    default. track: 'wandb:PROJECT' or 'trackio:PROJECT' to have a tracker follow the metrics. With several processes
    all call this, over one workdir; only the first writes and prints.
    Raises a RunError for what a person must mend: SetupError (data, devices), WorkdirError, CheckpointError,
    NonFiniteError, Interrupted (the state is saved).
    """
    workdir = Path(workdir)
    with contextlib.ExitStack() as stack:
        stack.enter_context(ending_together())
        tracked = trackers.check(track) if track and is_first() else None
        if is_first():
            stack.enter_context(locked(workdir))
        try:
            run = _Run(cfg, workdir, profile, stream, tracked)
        except (ValueError, FileNotFoundError) as error:
            raise SetupError(error) from error
        try:
            with jax.set_mesh(run.mesh):
                return run.run()
        except ShardError as error:
            raise RunError(f"{error} Nothing is lost: the last complete checkpoint is kept.") from error


class _Run:
    """The pieces of one process's share of a run."""

    def __init__(self, cfg, workdir, profile, stream, tracked):
        self.cfg, self.workdir, self.profile = cfg, workdir, profile
        self.started = time.monotonic()
        self.corpus = read_corpus(cfg)
        check_sizes(cfg, self.corpus)
        self.changes = check(workdir, cfg) if is_first() else []
        self.mesh = _make_mesh(cfg)
        self.stages = stages_of(cfg, self.corpus, self.mesh, by_step(cfg))
        self.agreement = Agreement(self.mesh)
        if is_first():
            claim(workdir, cfg)
        self.agreement.now(0)  # Nobody goes on before the folder is claimed.
        if self.agreement.now(not is_shared(workdir)):
            raise ValueError(
                f"--workdir={workdir}: a process does not see the config.json that the first one wrote there. "
                "Fix: name a folder that all hosts share."
            )
        self.checkpoints = Checkpoints(workdir / "checkpoints", cfg.train.checkpoints_kept)
        self.first_step = self.checkpoints.steps[-1] if self.checkpoints.steps else 0
        self.stage = self._stage_of(min(self.first_step, cfg.train.steps))
        if self.agreement.now(self.first_step) != self.first_step:
            raise ValueError(f"--workdir={workdir}: the processes see different checkpoints. Fix: share the folder.")
        self._check_profile()
        tracker = trackers.Tracker(*tracked, workdir, cfg) if tracked else None
        self.metrics = MetricsLog(workdir, self.first_step, tracker) if is_first() else NoLog()
        self.spikes = SpikeDetector([line["loss"] for line in self.metrics.history if "loss" in line])
        self.progress = Progress(cfg.train.steps, cfg.train.log_every, stream, silent=not is_first())
        self.productive = 0.0
        self.last_ready = None
        self.tracing = False
        own = f".{jax.process_index()}" if jax.process_count() > 1 else ""
        self.watchdog = Watchdog(workdir / f"hang{own}.txt", cfg.train.watchdog_seconds)
        self.signalled = self.stop_signal = 0  # what this process was sent, and what all agreed on

    def run(self) -> Result:
        try:
            with self._signals():
                try:
                    return self._run()
                finally:  # After Ctrl-C as well: what is being written is completed, or its error told.
                    self.checkpoints.close()
        finally:
            self.watchdog.close()
            self._stop_trace()
            self.progress.finish()
            self.metrics.close()
            for stage in self.stages:
                stage.data.close()

    def _run(self):
        cfg, steps = self.cfg, self.cfg.train.steps
        evaluation = next((m for m in reversed(self.metrics.history) if "eval/loss" in m), {})
        # A signal may have cut short the evaluation of the last saved step.
        line = self.metrics.history[-1] if self.metrics.history else {}
        overdue = self.first_step > 0 and self._is_evaluated(self.first_step) and "eval/loss" not in line
        overdue = bool(self.agreement.now(overdue and is_first()))  # The first process alone has a history.
        if self.first_step >= steps and not overdue:
            return Result(self.first_step, evaluation, already_done=True)
        state = self._start()
        if overdue:
            evaluation = self._catch_up(state)
        if self.first_step >= steps:
            return Result(self.first_step, evaluation, already_done=False)
        # The checkpoint may be the last of its stage, whose step is then of no use.
        step_fn, pending = self._compile(state) if self.first_step < self.stage.stop else None, None
        self.last_ready = time.monotonic()
        if self._asked_to_stop():
            raise self._interrupted(self.first_step)
        for step in range(self.first_step + 1, steps + 1):
            if step > self.stage.stop:
                self._finish(pending)
                pending = None
                step_fn = self._next_stage(state)
            self.watchdog.at("data", step)
            batch = self.stage.next_batch()
            self.watchdog.at("dispatch", step)
            self._start_trace(step, state)
            state, metrics = step_fn(state, batch)
            self._finish(pending)
            if self.tracing and step >= self.profile[1]:
                jax.block_until_ready(state)
                self._stop_trace()
            pending = {"step": step, "metrics": metrics, "evaluation": {}}
            if self._is_evaluated(step):
                pending["evaluation"] = self._evaluate(state, step) or {}
                evaluation = pending["evaluation"] or evaluation
            done = step == steps and bool(pending["evaluation"])
            if done:
                self._describe(state)
            # Read once: a signal from here on stops the next step, or the one after it with several processes.
            stop = self.stop_signal = max(self.stop_signal, self.agreement.soon(self.signalled))
            # The end of a stage is kept as well: the next one may turn out not to fit these devices.
            if done or stop or step == self.stage.stop < steps or step % cfg.train.checkpoint_every == 0:
                self._finish(pending)
                pending = None
                self._save(state, step)
            if stop and not done:
                raise self._interrupted(step)
        return Result(steps, evaluation, already_done=False)

    def _is_evaluated(self, step):
        every = self.cfg.train.eval_every
        return step >= self.cfg.train.steps or (every > 0 and step % every == 0)

    def _interrupted(self, step):
        return Interrupted(
            f"stopped by {signal.Signals(self.stop_signal).name} after step {step} of {self.cfg.train.steps}; "
            + ("the state is saved. " if step else "nothing was trained yet. ")
            + "Run the same command to continue.",
            self.stop_signal,
        )

    def _asked_to_stop(self) -> bool:
        """Whether a signal asked any process to stop; all processes must ask at the same point."""
        self.stop_signal = max(self.stop_signal, self.agreement.now(self.signalled))
        return self.stop_signal > 0

    # --- start --------------------------------------------------------------------------------------------------

    def _start(self):
        cfg = self.cfg
        make = partial(init_state, cfg, self.stage.tx)
        key = jax.random.key(cfg.train.seed)
        counts = count_params(cfg.model)
        peak, source = peak_flops_per_device()
        self.peak = peak * self.mesh.size
        say = self.progress.say
        say(f"devices: {self.mesh.size} x {jax.devices()[0].device_kind}; peak {peak / 1e12:.2f} TFLOP/s ({source})")
        tokens = self.stage.run.tokens_per_step
        say(f"parameters: {counts.total:,} total, {counts.active:,} active; {tokens:,} tokens a step")
        for change in self.changes:
            say(f"config changed since the last start: {change}")
        shapes = jax.eval_shape(make, key)
        roles = describe(shapes["params"], leaf_roles(cfg), ns=newton_schulz(cfg), repeat_over=sharding.SLOW)
        if is_first():
            (self.workdir / "parameters.txt").write_text(roles + "\n", encoding="utf-8")
        for stage in self.stages[self.stages.index(self.stage) + 1 :]:
            stage.check(shapes)
            for line in memory.foresee(stage.name, stage.run):
                say(line)
        memory.require_room(shapes, self.stage.run)
        if not self.first_step:
            with memory.explained(self.stage.run):
                return jax.jit(make)(key)
        abstract = jax.tree.map(partial(sharding.on_mesh, mesh=self.mesh), shapes)
        state, meta = self.checkpoints.restore(self.first_step, abstract)
        try:
            self.stage.data.set_state(meta["data"])
        except ValueError as error:
            raise SetupError(error) from error
        say(f"resumed from step {self.first_step} in {self.workdir}")
        return state

    def _compile(self, state):
        self.watchdog.rest()
        start, cache = time.monotonic(), compile_cache.Seen()
        with memory.explained(self.stage.run):
            compiled = self.stage.compile(state)
        self.progress.say(f"compiled the train step in {clock(time.monotonic() - start)} ({cache})")
        path = self.workdir / "memory.json" if is_first() else None
        for line in memory.report(compiled, state, self.stage.run, self.mesh, path, self.stage.name):
            self.progress.say(line)
        return compiled

    def _stage_of(self, step):
        """The stage that takes this step; the first one before any step."""
        return next(stage for stage in self.stages if step <= stage.stop)

    def _next_stage(self, state):
        """Goes over to the next stage; its data go on where this one's ended. Returns its compiled step."""
        with self._not_a_step(state):
            before, self.stage = self.stage, self._stage_of(self.stage.stop + 1)
            left = self.stage.data.begin_stage(before.data.get_state())
            before.data.close()
            run = self.stage.run
            self.progress.say(
                f"stage {self.stage.name!r}: steps {self.stage.start + 1} to {self.stage.stop}, "
                f"{run.data.batch_size} sequences of {run.data.seq_len} tokens a step"
            )
            for source, windows in left.items():
                self.progress.say(f"{source}: a new pass; {windows} windows of the old length are left of the last one")
            return self._compile(state)

    def _catch_up(self, state):
        """Makes up for the evaluation of the restored step, and for what is written at the end of a run."""
        evaluation = self._evaluate(state, self.first_step)
        if not evaluation:
            raise self._interrupted(self.first_step)
        if self.first_step >= self.cfg.train.steps:
            self._describe(state)
        self.metrics.amend(self.first_step, evaluation)
        return evaluation

    # --- each step ----------------------------------------------------------------------------------------------

    def _finish(self, pending):
        """Reads a dispatched step's numbers, writes them down, and stops a run that has gone wrong."""
        if pending is None:
            return
        self.watchdog.at("computation", pending["step"])
        line = jax.device_get(pending["metrics"])
        now = time.monotonic()
        seconds, self.last_ready = now - self.last_ready, now
        self.watchdog.step_took(seconds)
        self.productive += seconds
        step, tokens = pending["step"], self.stage.run.tokens_per_step
        in_row = int(line.pop("skipped_in_row"))
        if step % self.cfg.train.log_every and step != self.cfg.train.steps:
            line = {name: value for name, value in line.items() if name not in ARRAY_FIELDS}
        else:
            line |= memory.peak()
        line |= {
            "step": step,
            "tokens": self.cfg.tokens_after(step),
            "spike": int(self.spikes.is_spike(float(line["loss"]))),
            "step_time": seconds,
            "tokens_per_second": tokens / seconds,
            "mfu": self.stage.flops / seconds / self.peak,
            "goodput": self.productive / (now - self.started),
        } | pending["evaluation"]
        self.metrics.write(line)
        self.progress.step(line)
        if line["spike"]:
            self.progress.say(f"warning: loss spike at step {step}: {line['loss']:.4f}")
        if line["skipped"]:
            self.progress.say(f"warning: step {step} skipped: loss or gradient not finite ({in_row} in a row)")
        if not line["skipped"] and not math.isfinite(line["update_norm"]):
            self.metrics.sync()
            raise NonFiniteError(
                f"step {step} made an update that is not finite out of a gradient that is, at a learning rate of "
                f"{line['lr']:g}. The last complete checkpoint is untouched. Fix: lower optimizer.learning_rate."
            )
        if in_row >= self.cfg.train.max_skipped:
            self.metrics.sync()
            raise NonFiniteError(
                f"{in_row} steps in a row, up to step {step}, had a loss or gradient that is not finite "
                f"(train.max_skipped={self.cfg.train.max_skipped}). The last complete checkpoint is untouched. "
                "Fix: lower optimizer.learning_rate or check the data, then run again."
            )

    @contextlib.contextmanager
    def _not_a_step(self, state):
        """What is done inside counts for no step's time."""
        jax.block_until_ready(state)
        start = time.monotonic()
        yield
        if self.last_ready:
            self.last_ready += time.monotonic() - start

    def _evaluate(self, state, step):
        with self._not_a_step(state):
            start = time.monotonic()
            evaluation = self.stage.evaluator.run(state["params"], partial(self._should_stop, step))
            if evaluation:
                self.progress.say(
                    f"held out at step {step}: {evaluation['eval/loss']:.4f} nats per token, "
                    f"{evaluation['eval/bits_per_byte']:.4f} bits per byte ({clock(time.monotonic() - start)})"
                )
        return evaluation

    def _should_stop(self, step):
        """Asked between the batches of an evaluation: each is a sign of life."""
        self.watchdog.at("evaluation", step)
        return self._asked_to_stop()

    def _save(self, state, step):
        with self._not_a_step(state):
            self.watchdog.at("save", step)
            self.metrics.sync()
            meta = {"data": self.stage.data.get_state(), "config": dataclasses.asdict(self.cfg), "step": step}
            self.checkpoints.save(step, state, meta)

    # --- profile ------------------------------------------------------------------------------------------------

    def _check_profile(self):
        first, last = self.first_step + 1, self.cfg.train.steps
        if self.profile and first <= last and not (self.profile[0] <= last and self.profile[1] >= first):
            raise ValueError(
                f"--profile={self.profile[0]}:{self.profile[1]}: this start runs steps {first} to {last}: "
                "name some of them"
            )

    def _start_trace(self, step, state):
        """Starts the trace before its first step; `state` is that of the step before."""
        if not self.profile or not is_first():
            return
        first, last = self.profile
        if first <= step <= last and not self.tracing:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self.workdir / "profile"))
            self.tracing = True

    def _stop_trace(self):
        if self.tracing:
            self.tracing = False
            jax.profiler.stop_trace()
            self.progress.say(f"profile in {self.workdir / 'profile'}: open it with TensorBoard or xprof")

    # --- end ----------------------------------------------------------------------------------------------------

    def _describe(self, state):
        """Before the last checkpoint is saved: where it exists, nothing of the run is missing."""
        with self._not_a_step(state):
            self.watchdog.at("selections and sample", self.cfg.train.steps)
            run = self.stage.run
            tokens_T = self.corpus.held_out_document(run.data.seq_len)
            write_selections(self.workdir, state["params"], run, tokens_T, self.corpus.tokenizer)
            if run.train.sample_tokens:
                text = write_sample(self.workdir, state["params"], run, self.corpus.tokenizer)
                self.progress.say(f"--- a sample ---\n{text}\n----------------")

    @contextlib.contextmanager
    def _signals(self):
        """SIGTERM and the first Ctrl-C ask for a checkpoint and a clean end; a second Ctrl-C ends without one."""

        def ask(number, frame):
            if self.signalled and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.signalled = number

        try:
            old = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # Not the main thread (a notebook's worker): signals are not ours to take there.
            old = {}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


def _make_mesh(cfg):
    try:
        mesh = sharding.make_mesh(dataclasses.asdict(cfg.mesh))
    except RuntimeError as error:  # No such platform, or its devices are taken.
        raise SetupError(
            f"no device can be used: {error}. Fix: JAX_PLATFORMS=cpu runs without accelerators."
        ) from error
    if jax.process_count() > 1 and mesh.size < jax.device_count():
        raise ValueError(
            f"mesh: its axes make {mesh.size} devices, but the {jax.process_count()} processes have "
            f"{jax.device_count()}: raise mesh.data, or start fewer processes"
        )
    return mesh
