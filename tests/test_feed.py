"""Rows to arrays over devices: every device holds what the mesh says, every process makes what it needs."""

import json

import pytest

from k2jax.training.feed import Feed
from tests.on_devices import told_by

SPREAD = """
import json, sys
import jax, numpy as np
from k2jax import sharding
from k2jax.training.feed import Feed

told = []
for sizes in json.loads(sys.argv[1]):
    mesh = sharding.make_mesh(sizes)
    batch = np.arange(2 * 4 * 8, dtype=np.int32).reshape(2, 4, 8)
    place = sharding.named(mesh, None, "batch", "length")
    feed = Feed(place, batch.shape)
    made = feed.arrays({"tokens": batch.reshape(8, 8)[feed.rows]})["tokens"]
    expected = jax.device_put(batch, place)
    same = all(np.array_equal(a.data, b.data) and a.device == b.device
               for a, b in zip(made.addressable_shards, expected.addressable_shards, strict=True))
    told.append([feed.rows, same, made.sharding == place])
print(json.dumps(told))
"""

MESHES = [{"data": 4}, {"data": 2, "seq": 2}, {"fsdp": 2, "expert": 2}, {"seq": 4}, {"data": 2, "tensor": 2}, {}]


@pytest.fixture(scope="module")
def spread():
    return told_by(SPREAD, devices=4, arguments=[json.dumps(MESHES)])


@pytest.mark.parametrize("mesh", range(len(MESHES)), ids=lambda i: f"mesh{i}")
def test_every_device_gets_the_rows_and_tokens_that_the_mesh_gives_it(spread, mesh):
    rows, same, placed = spread[mesh]
    assert rows == list(range(8)), "a lone process feeds every row"
    assert same
    assert placed


class Place:
    """A sharding of which this process has some devices."""

    def __init__(self, *indices):
        self.indices = dict(enumerate(indices))
        self.mesh = type("Mesh", (), {"size": 4})

    def addressable_devices_indices_map(self, shape):
        return self.indices


WHOLE = slice(None)


@pytest.mark.parametrize(
    ("indices", "rows"),
    [
        ([(WHOLE, slice(2, 3), WHOLE), (WHOLE, slice(3, 4), WHOLE)], [2, 3, 6, 7]),
        ([(WHOLE, slice(0, 2), slice(0, 4)), (WHOLE, slice(0, 2), slice(4, 8))], [0, 1, 4, 5]),
        ([(WHOLE, slice(0, 1), WHOLE), (WHOLE, slice(2, 3), WHOLE)], [0, 2, 4, 6]),
        ([(WHOLE, WHOLE, slice(4, 8))], list(range(8))),
    ],
    ids=["its share", "tokens cut", "not contiguous", "all rows"],
)
def test_a_process_feeds_the_rows_of_its_own_devices_in_every_micro_batch(indices, rows):
    assert Feed(Place(*indices), (2, 4, 8)).rows == rows


def test_a_process_outside_the_mesh_is_told():
    with pytest.raises(ValueError, match=r"mesh: process 0 of 1 has none of its 4 devices\. Fix: "):
        Feed(Place(), (2, 4, 8))
