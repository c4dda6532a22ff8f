"""Some of a call's key heads, for kernels that take a few at a time."""

from typing import NamedTuple

import jax


class KeyHeads(NamedTuple):
    """Some key heads of some batch rows: `num_heads` of them from `head` on in each of `num_rows` from `batch` on.

    They follow each other: either there is one batch row, or they are all of a row's.
    """

    batch: jax.Array | int
    head: jax.Array | int
    num_rows: int
    num_heads: int
    all_heads: int

    def first_block(self, num_blocks):
        """The number (b * G + g) * D + n of their first block, of `num_blocks` for each head."""
        return (self.batch * self.all_heads + self.head) * num_blocks

    def first_query(self, num_heads, length):
        """The place (b * H + h) * T of their first query in a vector of all: H query heads of `length` each."""
        return (self.batch * num_heads + self.head * (num_heads // self.all_heads)) * length
