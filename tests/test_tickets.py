"""Tiles by tickets: each has one, in the order in which long ones are early and heads take turns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax.kernels.attention import shares_sm90
from k2jax.kernels.attention.tiles_sm90 import TILE, _Work


@pytest.mark.parametrize(("B", "T", "H", "G", "at_a_time"), [(2, 700, 4, 2, 2), (1, 300, 6, 3, 1), (3, 128, 2, 1, 3)])
def test_every_tile_has_one_ticket_and_a_turn_begins_with_the_last_rows(monkeypatch, B, T, H, G, at_a_time):
    monkeypatch.setattr(shares_sm90, "CACHE_BYTES", at_a_time * 2 * T * 256)
    q, k = (jax.ShapeDtypeStruct((B, T, heads, 128), jnp.bfloat16) for heads in (H, G))
    work, num_tiles = _Work(q, k, 128, 1024, 128, object(), None), -(-T // TILE)
    numbers = np.array(jax.vmap(work._number)(jnp.arange(B * H * num_tiles)))
    assert sorted(numbers) == list(range(B * H * num_tiles))
    heads, tiles = numbers // num_tiles, numbers % num_tiles
    turns = heads // (at_a_time * H // G)
    assert (np.diff(turns) >= 0).all()
    assert len(set(turns)) == B * G // at_a_time
    for turn in set(turns):
        assert (np.diff(tiles[turns == turn]) <= 0).all()
        assert set(tiles[turns == turn]) == set(range(num_tiles))
