"""Which rows read a unit of keys in the keys' gradients, against every pair of a row and a key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax.kernels.attention.keys_gradient_sm90 import ROWS, UNIT, reach
from k2jax.kernels.attention.tiles_sm90 import padded, starts_of
from k2jax.kernels.moba.grouping import group

# name: queries, keys, where the first query lies in each row, where documents begin
CASES = {
    "one document": (1000, 1000, [0], [0]),
    "packed documents": (1536, 1536, [0], [0, 5, 64, 200, 511, 700, 1216]),
    "a document for every token": (300, 300, [0], range(300)),
    "a chunk": (200, 1536, [0, 37, 640, 1336], [0]),
    "a chunk of packed documents": (328, 1536, [0, 64, 1100, 1208], [0, 130, 600, 1163, 1400]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_unit_is_read_by_the_rows_that_see_it_and_masked_where_some_do_not(case):
    T, S, offsets, begins = CASES[case]
    position_BT = np.array(offsets)[:, None] + np.arange(T)
    start_BT = np.array(begins)[np.searchsorted(begins, position_BT, side="right") - 1]
    found_BU6 = np.array(reach(starts_of(jnp.array(start_BT, jnp.int32), position_BT[:, 0]), S))

    seen_BTS = (np.arange(S) >= start_BT[..., None]) & (np.arange(S) <= position_BT[..., None])
    seen_BTS = np.pad(seen_BTS, ((0, 0), (0, padded(T) - T), (0, -S % UNIT)))
    tiles_BYUQ = seen_BTS.reshape(len(offsets), -1, ROWS, found_BU6.shape[1], UNIT).swapaxes(2, 3)
    for b, u in np.ndindex(found_BU6.shape[:2]):
        first_row, position, steps, clear_from, clear_to, first_key = found_BU6[b, u]
        assert first_row % ROWS == 0
        assert position == offsets[b] + first_row - u * UNIT
        any_Y = np.any(tiles_BYUQ[b, :, u], axis=(1, 2))
        clear_Y = np.all(tiles_BYUQ[b, :, u] == (np.arange(UNIT) >= first_key), axis=(1, 2))
        begin = first_row // ROWS
        assert not any_Y[:begin].any()
        assert not any_Y[begin + steps :].any()
        assert any_Y[begin : begin + steps].sum() >= steps - 1  # The first one may lie before the unit.
        # What is not masked sees all from the first key on, and what does is masked only beside the last query.
        assert clear_Y[begin + clear_from : begin + clear_to].all()
        masked = np.r_[0:clear_from, clear_to:steps]
        whole = masked < (min(T, S - offsets[b]) // ROWS - begin)
        assert not clear_Y[begin + masked[whole]].any() or (u + 1) * UNIT > S


def test_no_search_is_a_loop_of_small_kernels():
    """One of 15 steps, as over 32K tokens, was 45 kernels of a GPU, at 4K tokens more than the attention."""

    def traced(starts, winner_BHJT):
        return reach(starts_of(starts, 0), 4096), group(winner_BHJT, 1, 32, 128, 300)

    of = jax.ShapeDtypeStruct
    program = jax.jit(traced).lower(of((2, 4096), jnp.int32), of((2, 1, 3, 4096), jnp.int32)).as_text()
    assert "stablehlo.compare" in program
    assert "stablehlo.while" not in program
