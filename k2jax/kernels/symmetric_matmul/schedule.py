"""Which block computes which tiles of a symmetric matrix: plain numpy, worked out while tracing.

A matrix is cut into square tiles, and a block of the GPU computes two of them at a time, one by each of its two
warpgroups: both in one column of tiles, so that they share the right operand. With an even number of tiles a side,
rows 2q and 2q + 1 and a column c <= 2q make such a pair, the last one with the diagonal tile (2q, 2q). What these
pairs leave over is every other diagonal tile, (2q + 1, 2q + 1); those are paired among themselves, and need no third
operand since each is a product of rows with themselves. So every tile of the lower triangle is computed once.
Where the right operand is another matrix, each of those diagonal tiles takes its own column and no real partner.

A cluster is two blocks. Where both have the same rows, each loads half of them and sends it to both.

An odd number of tiles is rounded up. What has no partner gets one that lies behind the matrix, where copies load zeros
and store nothing; each such tile has a place of its own, so that no two units ever store to the same one.
"""

from itertools import count, zip_longest

import numpy as np

# Column of a pair of diagonal tiles: each warpgroup multiplies its own rows with themselves.
OWN_ROWS = -1


def table(num_tiles: int, cluster: int, band: int, own_rows: bool = True) -> np.ndarray:
    """The units of one matrix in the order in which to compute them.

    Args:
      num_tiles: tiles a side.
      cluster: blocks of a cluster, 1 or 2.
      band: pairs of rows that are walked through together, column by column, so that blocks that run at the same time
        share operands.
      own_rows: whether the right operand's rows are the left one's.

    Returns:
      int32 [units, 3 * cluster + 1]: for every block two rows and a column; last, 1 where its blocks share the rows.
    """
    half = -(-num_tiles // 2)
    outside = count(2 * half)
    # Columns 2p and 2p + 1 stay together: they are the two blocks of a cluster.
    below = sorted(
        ((2 * q, 2 * q + 1, column) for q in range(half) for column in range(2 * q)),
        key=lambda pair: (pair[0] // 2 // band, pair[2] // 2, pair[0], pair[2]),
    )
    touching = [(2 * q, 2 * q + 1, 2 * q) for q in range(half)]
    odd = [2 * q + 1 for q in range(half)]
    if own_rows:
        diagonal = [(a, next(outside) if b is None else b, OWN_ROWS) for a, b in zip_longest(odd[::2], odd[1::2])]
    else:
        diagonal = [(row, next(outside), row) for row in odd]
    if cluster == 1:
        return np.array([(*pair, 0) for pair in below + touching + diagonal], np.int32)

    def idle():
        return next(outside), next(outside), OWN_ROWS

    shared = [(*a, *b, 1) for a, b in zip(below[::2], below[1::2], strict=True)]
    alone = [(*a, *(b or idle()), 0) for rest in (touching, diagonal) for a, b in zip_longest(rest[::2], rest[1::2])]
    return np.array(shared + alone, np.int32)
