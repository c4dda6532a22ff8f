"""Batches: an endless shuffled training stream with an exact saved state, and a whole held-out set.

Legend: B rows of the batch, R of them that this process feeds, T window length, K sources.

Every batch is a dict of numpy arrays [R, T]: tokens int32, targets int32, segment_ids int32 (0 = padding),
loss_mask float32 (see `packing.window`). Where one process feeds all devices, R = B.

Row r of a stage is row r % B of its batch r // B. Its source is a pure function of r and the weights (`mixture`); it
is the next row of that source; and the n-th row of a source with W windows is entry n % W of a shuffle of its windows
that is drawn anew for every pass n // W over it (grain's index shuffle, a bijection that needs no table). So any
process can make any row, and the state counts batches: it does not depend on processes or threads.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import grain
import numpy as np

from k2jax.data.mixture import Shares
from k2jax.data.packing import PackedWindows, window
from k2jax.data.stream import TokenStream

_MAX_THREADS = 2  # The windows are slices of memory; more threads only fight for the interpreter's lock.

_FIX = (
    "Fix: resume with the same sources (for 'stdlib', the same Python release), tokenizer and arguments, or start a "
    "new run folder."
)


@dataclass(frozen=True)
class Source:
    """A stream of tokens and its weight in the mixture; `name` is what error messages call it."""

    name: str
    stream: TokenStream
    weight: float = 1.0  # share of the rows, on any scale; 0: not in this stage


class TrainIterator:
    """Endless batches; `get_state()` after n batches describes batch n + 1, whatever was prefetched.

    The state is a small JSON-able dict, the same on every process. It counts batches of the stage and rows of each
    source, and names the data and the arguments, because the same count over another corpus or batch size would
    silently train on the wrong text.
    """

    def __init__(self, batches: "_Batches", options: grain.ReadOptions, identity: dict, names: list[str]):
        self._batches = batches
        self._options = options
        self._identity = identity
        self._names = names
        self._restart([0] * len(names), 0)

    def __iter__(self) -> Iterator[dict]:
        return self

    def __next__(self) -> dict:
        return next(self._iterator)

    def get_state(self) -> dict:
        """The place in the data, and what data it is a place in.

        'batches': taken so far in this stage; 'stage_start' and 'position': rows of each source [K] before the stage
        and now; 'streams' [K]: fingerprints; and the arguments.
        """
        batches = self._iterator.get_state()["next_index"]
        start = self._batches.stage_start
        position = self._batches.position(batches * self._identity["batch_size"])
        return {"batches": batches, "stage_start": start, "position": position, **self._identity}

    def set_state(self, state: dict) -> None:
        """Continue after the batches that `state` counts.

        Raises ValueError if the state was saved over other data or with other arguments, or is damaged.
        """
        self._refuse_changes(state, self._identity)
        _check(state)
        self._restart(state["stage_start"], state["batches"])

    def begin_stage(self, state: dict) -> dict[str, int]:
        """Start a stage where the stage that `state` describes ended; this iterator's arguments are the new ones.

        Weights and batch size may differ: every source goes on with its next window, none is lost or repeated.
        A new seq_len cuts other windows, and what was read of a shuffled pass is no range of tokens, so every
        source then starts a new pass.

        Returns the windows (of the old length) that each source had left in its pass and that are skipped: empty
        unless seq_len differs. Raises ValueError for other sources or another seed, or a damaged state.
        """
        self._refuse_changes(state, {key: self._identity[key] for key in ("streams", "seed")})
        _check(state)
        start, left = state["position"], {}
        if state["seq_len"] != self._identity["seq_len"]:
            old = [self._batches.num_windows(k, state["seq_len"]) for k in range(len(start))]
            left = {self._names[k]: -n % old[k] for k, n in enumerate(start) if n % old[k]}
            passes = [-(-n // size) for n, size in zip(start, old, strict=True)]
            start = [p * self._batches.num_windows(k, self._identity["seq_len"]) for k, p in enumerate(passes)]
        self._restart(start, 0)
        return left

    def origin(self, batch: int) -> np.ndarray:
        """Where each row of a batch of this stage comes from: [R, 3] source, pass over it, window in the stream."""
        return np.array([self._batches.origin(row) for row in self._batches.rows_of(batch)])

    def close(self) -> None:
        """Stop the prefetch threads; the iterator cannot be used afterwards."""
        self._iterator.close()

    def _restart(self, stage_start, batches):
        self._batches = self._batches.starting_at(stage_start)
        self._iterator = iter(grain.MapDataset.source(self._batches).to_iter_dataset(self._options))
        self._iterator.set_state({"next_index": batches})

    def _refuse_changes(self, state, wanted):
        if not isinstance(state, dict):
            raise ValueError(f"data state: {state!r:.60} is no state. {_FIX}")
        changed = [_difference(key, state.get(key), now, self._names) for key, now in wanted.items()]
        changed = [text for text in changed if text]
        if changed:
            raise ValueError(f"data state: saved for other data or arguments ({', '.join(changed)}). {_FIX}")


class _Batches:
    """A grain RandomAccessDataSource: item b holds this process's rows of batch b of the stage."""

    def __init__(self, sources, shares, orders, windows, batch_size, rows, stage_start):
        self._sources, self._shares, self._orders, self._windows = sources, shares, orders, windows
        self._batch_size, self._rows, self.stage_start = batch_size, rows, stage_start

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, batch) -> dict:
        made = [self._row(row) for row in self.rows_of(int(batch))]
        return {key: np.stack([row[key] for row in made]) for key in made[0]}

    def __repr__(self) -> str:
        return f"_Batches({len(self._rows)} of {self._batch_size} rows, {self._shares.parts} of {self._windows})"

    def starting_at(self, stage_start) -> "_Batches":
        return _Batches(
            self._sources, self._shares, self._orders, self._windows, self._batch_size, self._rows, list(stage_start)
        )

    def rows_of(self, batch) -> list[int]:
        return [batch * self._batch_size + row for row in self._rows]

    def origin(self, row) -> tuple[int, int, int]:
        k = self._shares.source(row)
        n = self.stage_start[k] + self._shares.counts(row)[k]
        return k, n // len(self._windows[k]), self._orders[k][n]

    def position(self, rows) -> list[int]:
        """Rows of each source after this many rows of the stage."""
        return [a + b for a, b in zip(self.stage_start, self._shares.counts(rows), strict=True)]

    def num_windows(self, k, seq_len) -> int:
        return -(-(self._sources[k].stream.num_tokens - 1) // seq_len)

    def _row(self, row):
        k, _, index = self.origin(row)
        return self._windows[k][index]


def train_iterator(
    sources: Sequence[Source],
    *,
    pad_id: int,
    seq_len: int,
    batch_size: int,
    seed: int,
    prefetch: int = 4,
    rows: Sequence[int] | None = None,
) -> TrainIterator:
    """Endless training batches over a mixture of packed streams, each shuffled globally, anew in each pass.

    Each pass over a source holds every window once; a batch may span two passes, so nothing is dropped. The same
    streams, weights and seed give the same order. `batch_size` is the number of windows of one optimizer step over
    all devices: the train step cuts micro-batches and shards from it. `rows` are those of 0 .. batch_size - 1 that
    this process feeds (None: all). `prefetch` batches are prepared ahead by threads (0: none).

    Raises ValueError if a source has fewer windows than a batch takes of it, or for weights, sizes, rows or a seed
    out of range.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("prefetch", prefetch, 0), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}. Fix: set {name}={least} or more.")
    rows = list(range(batch_size) if rows is None else map(int, rows))
    if not rows or min(rows) < 0 or max(rows) >= batch_size:
        raise ValueError(f"rows={rows}: must name some of 0 .. {batch_size - 1}. Fix: pass None for all of them.")
    if not sources:
        raise ValueError("data.source: no source given. Fix: name at least one.")
    shares = Shares([source.weight for source in sources])
    windows = [PackedWindows(source.stream, seq_len, pad_id) for source in sources]
    for source, part, of_source in zip(sources, shares.parts, windows, strict=True):
        _check_size(source, of_source, seq_len, batch_size, -(-batch_size * part // sum(shares.parts)))
    orders = [
        grain.MapDataset.range(len(of_source)).shuffle(seed=_spread(seed, k)).repeat()
        for k, of_source in enumerate(windows)
    ]
    options = grain.ReadOptions(num_threads=min(prefetch, _MAX_THREADS), prefetch_buffer_size=prefetch)
    identity = {
        "streams": [source.stream.fingerprint for source in sources],
        "weights": shares.parts,
        "seq_len": seq_len,
        "batch_size": batch_size,
        "seed": seed,
    }
    batches = _Batches(sources, shares, orders, windows, batch_size, rows, [0] * len(sources))
    return TrainIterator(batches, options, identity, [source.name for source in sources])


def _spread(seed, k):
    # grain shuffles pass p with seed + p, so neighbouring seeds would share orders (seed 0's second pass is seed 1's
    # first). Spreading the seed over 32 bits keeps runs of a seed sweep, and the sources of one run, apart.
    return int(np.random.SeedSequence(seed, spawn_key=(k,) if k else ()).generate_state(1)[0])


def _check_size(source, windows, seq_len, batch_size, rows):
    num_tokens = source.stream.num_tokens
    if len(windows) < rows or num_tokens <= seq_len:
        raise ValueError(
            f"data.source {source.name!r}: its {len(source.stream.doc_starts)} training documents have {num_tokens} "
            f"tokens = {len(windows)} windows of seq_len={seq_len}; one batch of batch_size={batch_size} needs {rows} "
            "of them, the first one full. Fix: add text, or lower data.seq_len, data.batch_size or its weight."
        )


def _check(state):
    """Raises ValueError unless the state's counts are counts and follow from each other."""
    try:
        start, position, batches = state["stage_start"], state["position"], state["batches"]
        counts = [*start, *position, batches, *state["weights"], state["batch_size"], state["seq_len"]]
        sound = all(type(n) is int and n >= 0 for n in counts) and state["seq_len"] > 0
        if sound:
            of_stage = Shares(state["weights"]).counts(batches * state["batch_size"])
            sound = position == [a + b for a, b in zip(start, of_stage, strict=True)]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"data state: damaged ({error!r}). Fix: resume from another checkpoint.") from error
    if not sound:
        raise ValueError(
            f"data state: damaged: position={position} does not follow from stage_start={start} and batches={batches}. "
            "Fix: resume from another checkpoint."
        )


def _difference(key, saved, now, names):
    """What changed in one field, as text; empty if nothing did."""
    if saved == now:
        return ""
    if key != "streams":
        return f"{key}: saved {saved}, now {now}"
    if not isinstance(saved, list) or len(saved) != len(now):
        return f"sources: saved {len(saved) if isinstance(saved, list) else saved}, now {len(now)}"
    pairs = zip(names, saved, now, strict=True)
    return "streams: " + ", ".join(f"{name!r} has tokens {b:.12}, saved {a:.12}" for name, a, b in pairs if a != b)


class HeldOutBatches:
    """The whole held-out set: iterate for batches, as often as needed.

    `num_bytes` counts the bytes of the text, whatever the tokenizer. `num_predictions` counts the positions with
    loss_mask 1: one per token of the text and one per document for its EOS.
    """

    def __init__(self, stream: TokenStream, seq_len: int, batch_size: int, pad_id: int, rows: Sequence[int]):
        self.num_bytes = stream.num_text_bytes
        self.num_predictions = stream.num_tokens - len(stream.doc_starts)
        self._stream, self._seq_len, self._pad_id = stream, seq_len, pad_id
        self._batch_size, self._rows = batch_size, rows
        lasts = np.append(stream.doc_starts[1:], stream.num_tokens) - 1  # of each document: a target only
        windows = -(-(lasts - stream.doc_starts) // seq_len)  # of each document
        within = np.arange(windows.sum()) - np.repeat(np.cumsum(windows) - windows, windows)
        self._starts = np.repeat(stream.doc_starts, windows) + within * seq_len
        self._stops = np.minimum(self._starts + seq_len, np.repeat(lasts, windows))

    def __iter__(self) -> Iterator[dict]:
        for batch in range(len(self)):
            made = [self._window(batch * self._batch_size + row) for row in self._rows]
            yield {key: np.stack([row[key] for row in made]) for key in made[0]}

    def __len__(self) -> int:
        return -(-len(self._starts) // self._batch_size)

    def bits_per_byte(self, total_nats: float) -> float:
        """Bits per byte of text, from the loss summed (not averaged) over every position with loss_mask 1.

        The nats of the EOS predictions count and EOS is no byte: a model pays for saying where a file ends.
        """
        return total_nats / math.log(2) / self.num_bytes

    def _window(self, row):
        # Rows past the last window are padding alone.
        start, stop = (self._starts[row], self._stops[row]) if row < len(self._starts) else (0, 0)
        return window(self._stream, int(start), int(stop), self._seq_len, self._pad_id)


def held_out_batches(
    stream: TokenStream, *, pad_id: int, seq_len: int, batch_size: int, rows: Sequence[int] | None = None
) -> HeldOutBatches:
    """Every token of the stream's documents predicted exactly once, in batches [batch_size, seq_len].

    Each document (BOS, text, EOS) is cut into windows of `seq_len` predictions that do not overlap; the
    first begins with BOS, a later one with the last token predicted before it. Context never crosses a
    window's edge, so the number is slightly pessimistic for text longer than a window. Rows that fill the
    last batch are padding (segment 0, mask 0). `rows`: those of each batch that this process feeds (None: all).

    Raises ValueError for sizes below 1.
    """
    for name, value, example in (("seq_len", seq_len, 256), ("batch_size", batch_size, 8)):
        if value < 1:
            raise ValueError(f"data.{name}={value} must be at least 1. Fix: try {example}.")
    return HeldOutBatches(stream, seq_len, batch_size, pad_id, list(range(batch_size)) if rows is None else list(rows))
