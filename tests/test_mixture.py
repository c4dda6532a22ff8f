"""Mixtures: shares that are exact, rows that any process can make, stages that lose and repeat nothing."""

import copy
import json
import random
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from k2jax.data.mixture import MAX_PERIOD, Shares
from k2jax.data.pipeline import Source, train_iterator
from tests.test_pipeline import PAD, assert_same_batches, make_documents, make_stream, take

STREAMS = [make_stream(make_documents(seed=seed)) for seed in range(3)]
NAMES = ["code", "prose", "math"]
ARGUMENTS = {"seq_len": 16, "batch_size": 4, "seed": 5}


def mixture(weights=(2, 1, 1), streams=None, **arguments):
    sources = [Source(name, s, w) for name, s, w in zip(NAMES, streams or STREAMS, weights, strict=False)]
    return train_iterator(sources, pad_id=PAD, **{"prefetch": 0} | ARGUMENTS | arguments)


def num_windows(seq_len=16):
    return [-(-(stream.num_tokens - 1) // seq_len) for stream in STREAMS]


def origins(iterator, batches):
    """(source, pass, window) of every row of the next batches, which are taken, and checked to be those rows."""
    first = iterator.get_state()["batches"]
    rows = []
    for batch in range(first, first + batches):
        made, said = next(iterator), iterator.origin(batch)
        for tokens, (k, _, window) in zip(made["tokens"], said, strict=True):
            start = window * made["tokens"].shape[1]
            expected = STREAMS[k].read(start, min(start + tokens.size, STREAMS[k].num_tokens - 1))
            np.testing.assert_array_equal(tokens[: expected.size], expected)
        rows += [tuple(map(int, row)) for row in said]
    return rows


def assert_whole_passes(rows):
    """Every finished pass over a source holds each of its windows once; returns how many passes were finished."""
    finished = 0
    for k, size in enumerate(num_windows()):
        windows = [window for source, _, window in rows if source == k]
        passes = [p for source, p, _ in rows if source == k]
        assert passes == [n // size for n in range(len(windows))]
        for first in range(0, len(windows) - size + 1, size):
            assert sorted(windows[first : first + size]) == list(range(size))
            finished += 1
        rest = windows[len(windows) // size * size :]
        assert len(set(rest)) == len(rest)
    return finished


# --- shares -------------------------------------------------------------------------------------------------------


def some_weights(seed):
    rng = random.Random(seed)
    return [rng.choice([1, 2, 3, 5, 17, 40, 99]) for _ in range(rng.randint(1, 7))]


@pytest.mark.parametrize("seed", range(40))
def test_counts_never_leave_the_proven_bound_and_are_exact_after_a_period(seed):
    weights = some_weights(seed)
    shares, total, sources = Shares(weights), sum(weights), len(weights)
    bound = 1 - Fraction(1, max(2 * sources - 2, 1))
    taken = [0] * sources
    for row in range(2 * total):
        taken[shares.source(row)] += 1
        assert shares.counts(row + 1) == taken
        assert all(abs(n - Fraction(w * (row + 1), total)) <= bound for n, w in zip(taken, weights, strict=True))
    assert taken == [2 * w for w in weights]


def test_counts_of_far_rows_continue_those_of_near_ones():
    shares = Shares([0.7, 0.2, 0.1])
    assert shares.parts == [7, 2, 1]
    assert shares.counts(10**12) == [7 * 10**11, 2 * 10**11, 10**11]
    for row in (10**12 + 3, 10**15 + 7):
        before, after = shares.counts(row), shares.counts(row + 1)
        assert [b - a for a, b in zip(before, after, strict=True)] == [int(k == shares.source(row)) for k in range(3)]


def test_only_the_ratio_of_weights_matters_and_floats_are_the_decimals_that_they_print():
    assert Shares([0.3, 0.1]).parts == Shares([3, 1]).parts == Shares([np.float64(1.5), 0.5]).parts == [3, 1]
    assert Shares([1e-3, 1]).parts == [1, 1000]


def test_a_source_without_weight_gets_no_row():
    shares = Shares([0, 2, 0.0, 1])
    assert {shares.source(row) for row in range(30)} == {1, 3}
    assert shares.counts(30) == [0, 20, 0, 10]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, -0.5], r"weights\[1\]=-0.5: must be 0 or more"),
        ([float("nan")], r"weights\[0\]=nan"),
        ([1, float("inf")], r"weights\[1\]=inf"),
        ([0, 0], r"none is positive\. Fix: "),
        ([], r"none is positive\. Fix: "),
        (
            [1_234_567, 7_654_321],
            rf"after 8888888 rows, more than {MAX_PERIOD}\. Fix: .* for example \[0\.139, 0\.861\]",
        ),
    ],
)
def test_weights_that_cannot_be_shares_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        Shares(weights)


# --- rows ---------------------------------------------------------------------------------------------------------


def test_every_window_comes_once_in_each_pass_over_its_source():
    rows = origins(mixture(), 60)
    assert Counter(k for k, _, _ in rows) == {0: 120, 1: 60, 2: 60}
    assert assert_whole_passes(rows) >= 9


def test_each_pass_and_each_source_has_an_order_of_its_own():
    rows = origins(mixture(), 60)
    size = num_windows()[0]
    assert len(set(num_windows())) == 1, "equal sizes, or the orders differ anyway"
    orders = {
        tuple(window for source, p, window in rows if (source, p) == (k, number))
        for k, passes in ((0, 4), (1, 2), (2, 2))
        for number in range(passes)
    }
    assert len(orders) == 8
    assert tuple(range(size)) not in orders


@pytest.mark.parametrize("seed", range(5))
def test_rows_do_not_depend_on_processes_or_threads(seed):
    rng = random.Random(seed)
    whole = take(mixture(batch_size=6), 12)
    rows = list(range(6))
    rng.shuffle(rows)
    cuts = sorted(rng.sample(range(1, 6), rng.randint(1, 4)))
    parts = [sorted(rows[a:b]) for a, b in pairwise([0, *cuts, 6])]
    made = [take(mixture(batch_size=6, rows=part, prefetch=rng.randint(0, 5)), 12) for part in parts]
    for batch, *of_processes in zip(whole, *made, strict=True):
        for part, mine in zip(parts, of_processes, strict=True):
            assert_same_batches([mine], [{key: x[part] for key, x in batch.items()}])


@pytest.mark.parametrize("rows", [[], [4], [-1], [0, 7]])
def test_rows_outside_the_batch_are_refused(rows):
    with pytest.raises(ValueError, match=r"must name some of 0 \.\. 3\. Fix: "):
        mixture(rows=rows)


def test_a_source_too_small_for_its_share_of_a_batch_is_named():
    tiny = make_stream(make_documents((30,)))
    with pytest.raises(ValueError, match=r"'prose': its 1 training documents have 32 tokens = 2 windows .* needs 3 of"):
        mixture((1, 1), [STREAMS[0], tiny], batch_size=6)
    mixture((2, 1), [STREAMS[0], tiny], batch_size=6)


# --- state --------------------------------------------------------------------------------------------------------


def test_every_state_goes_on_exactly_on_any_number_of_processes():
    iterator, states, batches = mixture(), [], []
    for _ in range(40):
        states.append(json.loads(json.dumps(iterator.get_state())))
        batches.append(next(iterator))
    for n, state in enumerate(states):
        for rows in ([0, 1, 2, 3], [0, 1], [3]):
            fresh = mixture(rows=rows, prefetch=n % 3)
            fresh.set_state(state)
            assert fresh.get_state() == state
            assert_same_batches(take(fresh, 1), [{key: x[rows] for key, x in batches[n].items()}])


def test_restarts_on_other_numbers_of_processes_lose_and_repeat_no_row():
    state, fed = mixture().get_state(), []
    for processes, batches in ((2, 7), (1, 5), (4, 9), (2, 30)):
        share = 4 // processes
        iterators = [mixture(rows=range(p * share, (p + 1) * share)) for p in range(processes)]
        for iterator in iterators:
            iterator.set_state(state)
        for _ in range(batches):
            here = [origins(iterator, 1) for iterator in iterators]
            fed += [row for part in here for row in part]
        states = [iterator.get_state() for iterator in iterators]
        assert all(s == states[0] for s in states)
        state = states[0]
    assert fed == origins(mixture(), 51)
    assert assert_whole_passes(fed) >= 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": (1, 1, 1)}, r"weights: saved \[2, 1, 1\], now \[1, 1, 1\]"),
        (
            {"streams": [STREAMS[0], STREAMS[2], STREAMS[1]]},
            r"streams: 'prose' has tokens \w{12}, saved \w{12}, 'math'",
        ),
        ({"weights": (2, 1), "streams": STREAMS[:2]}, "sources: saved 3, now 2"),
        ({"seed": 6}, "seed: saved 5, now 6"),
        ({"batch_size": 8}, "batch_size: saved 4, now 8"),
    ],
    ids=["weights", "streams", "number", "seed", "batch"],
)
def test_a_changed_mixture_is_refused_with_the_difference_and_the_fix(change, message):
    state = mixture().get_state()
    with pytest.raises(ValueError, match=f"{message}.*Fix: resume with the same sources"):
        mixture(**change).set_state(state)


def test_weights_on_another_scale_are_no_change():
    state = mixture((0.5, 0.25, 0.25)).get_state()
    mixture((2, 1, 1)).set_state(state)


def numbers(tree, path=()):
    """The path of every number in a state."""
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from numbers(value, (*path, key))
    elif isinstance(tree, int):
        yield path


@pytest.mark.parametrize("value", [-1, 1.0, None, "3", True, "+1"])
def test_a_tampered_state_is_refused(value):
    iterator = mixture()
    take(iterator, 7)
    iterator.begin_stage(iterator.get_state())
    take(iterator, 3)
    state = iterator.get_state()
    paths = list(numbers(state))
    assert len(paths) == 1 + 3 + 3 + 3 + 3, "batches, stage_start, position, weights, sizes and seed"
    for path in paths:
        tampered = copy.deepcopy(state)
        *parents, last = path
        node = tampered
        for key in parents:
            node = node[key]
        node[last] = node[last] + 1 if value == "+1" else value
        if tampered == state:  # 1 is True, and 1.0.
            continue
        with pytest.raises(ValueError, match=r"data state: .*Fix: resume"):
            mixture().set_state(tampered)


@pytest.mark.parametrize("state", [None, [], {}, "state", {"batches": 3}])
def test_what_is_no_state_is_refused(state):
    with pytest.raises(ValueError, match=r"data state: .*Fix: resume"):
        mixture().set_state(state)


@pytest.mark.parametrize("missing", ["batches", "stage_start", "position", "weights", "streams", "batch_size", "seed"])
def test_a_state_without_a_field_is_refused(missing):
    state = mixture().get_state()
    del state[missing]
    with pytest.raises(ValueError, match=r"data state: .*Fix: resume"):
        mixture().set_state(state)


# --- stages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_new_weights_and_batch_sizes_lose_and_repeat_no_window(seed):
    rng = random.Random(seed)
    iterator = mixture()
    rows = origins(iterator, rng.randint(1, 20))
    for _ in range(5):
        weights = rng.choice([(1, 1, 1), (0.7, 0.2, 0.1), (0, 1, 3), (5, 2, 0)])
        following = mixture(weights, batch_size=rng.choice([2, 4, 6]))
        assert following.begin_stage(json.loads(json.dumps(iterator.get_state()))) == {}
        iterator, stage = following, origins(following, rng.randint(0, 30))
        got, wanted = Counter(k for k, _, _ in stage), np.array(weights) / sum(weights) * len(stage)
        assert all(abs(got[k] - wanted[k]) < 1 for k in range(3)), "shares hold from the stage's first row on"
        rows += stage
        state = json.loads(json.dumps(iterator.get_state()))
        resumed = mixture(weights, batch_size=state["batch_size"])
        resumed.set_state(state)
        assert_same_batches(take(resumed, 2), take(iterator, 2))
        iterator.set_state(state)
    assert_whole_passes(rows)


def test_every_token_is_a_target_once_across_a_change_of_weights():
    iterator = mixture((3, 1), STREAMS[:2], batch_size=3)
    size = num_windows()[0]
    batches = [*take(iterator, 5)]
    following = mixture((1, 3), STREAMS[:2], batch_size=3)
    following.begin_stage(iterator.get_state())
    while following.get_state()["position"] < [size, size]:
        batches += take(following, 1)
    targets = Counter()
    seen = [0, 0]
    for number, batch in enumerate(batches):
        which = iterator.origin(number) if number < 5 else following.origin(number - 5)
        for (k, passes, window), real in zip(which, batch["segment_ids"] > 0, strict=True):
            if passes == 0:
                targets.update((int(k), int(window) * 16 + int(t) + 1) for t in np.flatnonzero(real))
                seen[k] += 1
    whole = [k for k in range(2) if seen[k] == size]
    assert whole
    for k in whole:
        assert {t for source, t in targets if source == k} == set(range(1, STREAMS[k].num_tokens))
    assert set(targets.values()) == {1}


def test_another_window_length_starts_a_new_pass_and_tells_what_was_left():
    iterator = mixture((1, 1, 0))
    take(iterator, 5)
    longer = mixture((1, 1, 1), seq_len=24, batch_size=3)
    size = num_windows()[0]
    assert longer.begin_stage(iterator.get_state()) == {"code": size - 10, "prose": size - 10}
    rows = origins(longer, num_windows(24)[0])
    for k, first in ((0, 1), (1, 1), (2, 0)):  # 'math' was not begun, so it has nothing left.
        assert [p for source, p, _ in rows if source == k] == [first] * num_windows(24)[k]
        assert sorted(window for source, _, window in rows if source == k) == list(range(num_windows(24)[k]))


def test_a_stage_over_other_sources_is_refused():
    state = mixture().get_state()
    with pytest.raises(ValueError, match=r"sources: saved 3, now 2.*Fix: "):
        mixture((1, 1), STREAMS[:2]).begin_stage(state)
    with pytest.raises(ValueError, match=r"seed: saved 5, now 1.*Fix: "):
        mixture(seed=1).begin_stage(state)
