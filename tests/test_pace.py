"""Keeping pace, by counting: nobody waits for a part that not everybody will have begun."""

import jax
import jax.numpy as jnp
import pytest

from k2jax.kernels.attention import pace_sm90 as pace
from k2jax.kernels.attention.shares_sm90 import most_steps, shares_of_tiles

STEPS_OF_TILES = tuple(range(1, 300))


class Counters:
    """Stands for semaphores in global memory: a part of it is its number."""

    at = property(lambda self: self)

    def __getitem__(self, index):
        return int(index)


def walked(monkeypatch, steps, parts, num_sms):
    """(the parts that a share of so many steps says it has begun, (awaited, count) of each of its waits)."""
    begun, waits = [], []
    monkeypatch.setattr(pace.plgpu, "semaphore_signal", lambda part, by, memory_scope: begun.extend([part] * by))
    monkeypatch.setattr(pace, "linger", lambda passed, _, count: waits.append((passed, count, begun[-1])))
    monkeypatch.setattr(pace.lax, "axis_size", lambda _: num_sms)
    with jax.disable_jit():
        for number in range(steps):
            pace.begin_step(Counters(), parts, jnp.int32(number))
        pace.end(Counters(), parts, jnp.int32(steps))
    return begun, waits


def test_the_largest_share_is_found_by_its_steps():
    table = shares_of_tiles(3, 2, STEPS_OF_TILES, 2**26, 7)
    shares = [table[1 : 1 + count, sm] for sm, count in enumerate(table[0])]
    assert most_steps(table, STEPS_OF_TILES) == max(sum(STEPS_OF_TILES[i % 299] for i in share) for share in shares)
    assert len({len(share) for share in shares}) > 1


@pytest.mark.parametrize("steps", [0, 1, 64, 65, 200, 256])
def test_every_share_begins_every_part_once(monkeypatch, steps):
    parts = pace.parts_of(256)
    begun, waits = walked(monkeypatch, steps, parts, 3)
    assert begun == list(range(parts)) == [0, 1, 2, 3]
    assert [awaited for awaited, *_ in waits] == list(range(pace.parts_of(steps) - pace.AHEAD))
    assert all(count == 3 and own == awaited + pace.AHEAD for awaited, count, own in waits)
