"""Shares of tiles, by counting: everything once, few key heads at a time, nobody much longer at work than others."""

import itertools

import pytest

from k2jax.kernels.attention.shares_sm90 import BEGIN_AND_END, CACHE_BYTES, heads_at_a_time, shares_of_tiles

CAUSAL = tuple(range(1, 65))


def listed(table):
    return [list(table[1 : 1 + count, sm]) for sm, count in enumerate(table[0])]


@pytest.mark.parametrize(
    ("key_heads", "group", "steps", "bytes_of_a_head", "num_sms"),
    [
        (8, 4, CAUSAL, CACHE_BYTES, 132),
        (6, 1, CAUSAL, CACHE_BYTES // 4, 132),
        (1, 1, (3, 2, 1), 1, 7),
        (4, 2, (1,) * 9, 2 * CACHE_BYTES, 5),
    ],
    ids=["grouped heads", "heads that do not fill the cache", "more multiprocessors than tiles", "equal tiles"],
)
def test_every_tile_is_in_one_share(key_heads, group, steps, bytes_of_a_head, num_sms):
    shares = listed(shares_of_tiles(key_heads, group, steps, bytes_of_a_head, num_sms))
    assert len(shares) == num_sms
    assert sorted(itertools.chain(*shares)) == list(range(key_heads * group * len(steps)))


@pytest.mark.parametrize("tokens", [8192, 32768, 131072])
@pytest.mark.parametrize("heads", [8, 32, 40])
def test_nobody_works_much_longer_than_others(tokens, heads):
    steps = tuple(range(1, tokens // 128 + 1))
    shares = listed(shares_of_tiles(heads, 1, steps, 512 * tokens, 132))
    work = [sum(steps[number % len(steps)] + BEGIN_AND_END for number in share) for share in shares]
    assert max(work) < 1.01 * sum(work) / len(work)


def test_key_heads_take_turns_and_a_turn_begins_with_the_longest_tiles():
    for share in listed(shares_of_tiles(8, 4, CAUSAL, CACHE_BYTES // 2, 16)):
        turns = [number // (2 * 4 * len(CAUSAL)) for number in share]  # two key heads of four query heads each
        assert turns == sorted(turns)
        for turn in range(4):
            tiles = [number % len(CAUSAL) for number, which in zip(share, turns, strict=True) if which == turn]
            assert tiles == sorted(tiles, reverse=True)


@pytest.mark.parametrize(
    ("num_heads", "part_of_the_cache", "at_a_time"),
    [(32, 2, 1), (32, 1 / 8, 8), (32, 1 / 100, 32), (13, 1 / 8, 13), (12, 1 / 8, 6), (7, 1, 1)],
)
def test_as_many_heads_at_a_time_as_fill_the_cache(num_heads, part_of_the_cache, at_a_time):
    assert heads_at_a_time(num_heads, CACHE_BYTES * part_of_the_cache) == at_a_time
