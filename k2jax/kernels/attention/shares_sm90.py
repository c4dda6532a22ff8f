"""Which tiles of rows each multiprocessor of a Hopper GPU computes, and in which order, known before a kernel runs.

Key heads take turns: as many at a time as have their keys and values in the GPU's second-level cache together. With all
heads at once 192 GB came from memory for 2 x 16 heads at 64K tokens, with one at a time 12, and as a GPU at work is
limited by its power, the rest is faster too. Inside a turn the longest tiles are first, and each goes to who is the
first to be free, so that shares are equal wherever the turns end.
"""

import functools
import heapq

import numpy as np

# Of the 50 MB of an H100 or H200, whose halves keep copies of what both read.
CACHE_BYTES = 2**25
# What a tile takes beside its steps, in steps.
BEGIN_AND_END = 1


def fits_into_cache(bytes_of_a_head) -> bool:
    return bytes_of_a_head <= CACHE_BYTES


def heads_at_a_time(num_heads, bytes_of_a_head):
    """The divisor of the number of heads that comes nearest to filling the cache with so many bytes of each."""
    fit = max(1.0, CACHE_BYTES / bytes_of_a_head)
    divisors = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
    return min(divisors, key=lambda n: max(n / fit, fit / n))


@functools.lru_cache(maxsize=64)
def shares_of_tiles(num_key_heads, group, steps_of_tiles, bytes_of_a_head, num_sms):
    """The share of each multiprocessor.

    Args:
      num_key_heads: of all batch rows.
      group: query heads of a key head.
      steps_of_tiles: of each tile of a query head, a tuple.
      bytes_of_a_head: of a key head's keys and values.
      num_sms: M, how many multiprocessors there are.

    Returns: int32 [1 + most tiles of one, M]: how many tiles it has, and their numbers, head * tiles of a head + tile.
      Behind the last one are zeros.
    """
    num_tiles = len(steps_of_tiles)
    longest_first = sorted(range(num_tiles), key=lambda tile: (-steps_of_tiles[tile], -tile))
    heads = heads_at_a_time(num_key_heads, bytes_of_a_head) * group
    shares = [[] for _ in range(num_sms)]
    free = [(0, sm) for sm in range(num_sms)]
    for turn in range(0, num_key_heads * group, heads):
        for tile in longest_first:
            for head in range(turn, turn + heads):
                at, sm = free[0]
                heapq.heapreplace(free, (at + steps_of_tiles[tile] + BEGIN_AND_END, sm))
                shares[sm].append(head * num_tiles + tile)
    table = np.zeros((1 + max(map(len, shares)), num_sms), np.int32)
    for sm, share in enumerate(shares):
        table[0, sm], table[1 : 1 + len(share), sm] = len(share), share
    return table


def most_steps(share_LM, steps_of_tiles):
    """How many steps the tiles of the largest share have."""
    steps_LM = np.array(steps_of_tiles)[share_LM[1:] % len(steps_of_tiles)]
    is_one_LM = np.arange(len(steps_LM))[:, None] < share_LM[0]
    return int((steps_LM * is_one_LM).sum(axis=0).max())
