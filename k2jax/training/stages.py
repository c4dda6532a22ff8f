"""One stage of a run, ready to train: its data, its step and its evaluation.

Legend: A micro-batches, B sequences of a micro-batch, T tokens.
"""

from functools import partial

import jax

from k2jax import sharding
from k2jax.config import RunConfig, Stage
from k2jax.data.pipeline import Source, held_out_batches, train_iterator
from k2jax.model import flops_per_token
from k2jax.training.corpus import Corpus
from k2jax.training.evaluate import HeldOut
from k2jax.training.feed import Feed
from k2jax.training.memory import batch_shapes
from k2jax.training.optimizer import make_optimizer
from k2jax.training.step import train_step


class StageWork:
    """Everything of a stage that does not need parameters. `data` is its TrainIterator."""

    def __init__(self, stage: Stage, corpus: Corpus, mesh, rate):
        """rate: the whole run's learning rate by finished steps.

        Raises ValueError where the corpus is too small for the stage.
        """
        self.name, self.start, self.stop, self.run = stage.name, stage.start, stage.stop, stage.run
        data, micro = self.run.data, self.run.train.accumulation
        shape = (micro, data.batch_size // micro, data.seq_len)
        self._mesh = mesh
        self._feed = Feed(sharding.named(mesh, None, "batch", "length"), shape)
        self.data = _train_data(self.run, corpus, data.prefetch, self._feed.rows)
        feed = Feed(sharding.named(mesh, "batch", "length"), shape[1:])
        batches = held_out_batches(
            corpus.held_out, pad_id=corpus.tokenizer.pad_id,
            seq_len=data.seq_len, batch_size=shape[1], rows=feed.rows,
        )  # fmt: skip
        self.evaluator = HeldOut(self.run, batches, feed)
        self.tx = make_optimizer(self.run, rate)
        self._step = jax.jit(partial(train_step, cfg=self.run, tx=self.tx, rate=rate), donate_argnums=0)
        self.flops = flops_per_token(self.run.model, data.seq_len) * self.run.tokens_per_step

    def next_batch(self) -> dict:
        """Arrays [A, B, T] over the mesh."""
        return self._feed.arrays(next(self.data))

    def check(self, state) -> None:
        """Traces the step over shapes: a stage that cannot run is found before the first one starts."""
        jax.eval_shape(self._step, state, batch_shapes(self.run, self._mesh))

    def compile(self, state):
        """The compiled step for a state (arrays or shapes)."""
        return self._step.lower(state, batch_shapes(self.run, self._mesh)).compile()


def _train_data(run, corpus, prefetch, rows):
    # A source that a stage leaves out stays in its mixture without a share, so that its place is kept.
    weights = {source.path: source.weight for source in run.data.sources}
    sources = [Source(path, stream, weights.get(path, 0.0)) for path, stream in corpus.streams.items()]
    return train_iterator(
        sources, pad_id=corpus.tokenizer.pad_id, seq_len=run.data.seq_len, batch_size=run.data.batch_size,
        seed=run.data.seed, prefetch=prefetch, rows=rows,
    )  # fmt: skip


def check_sizes(cfg: RunConfig, corpus: Corpus) -> None:
    """Raises ValueError where the corpus is too small for a stage; asks no device."""
    for part in cfg.parts:
        _train_data(part.run, corpus, 0, None).close()


def stages_of(cfg: RunConfig, corpus: Corpus, mesh, rate) -> list[StageWork]:
    """The stages of a run in order."""
    return [StageWork(part, corpus, mesh, rate) for part in cfg.parts]
