"""Which source each row of a mixture comes from: a pure function of the row's number.

Legend: K sources, D rows of a period.

The weights are exact fractions a_k / D with whole a_k, and the sources follow each other in an order that repeats
after D rows. Within it a row goes, among the sources that are at least 1 / (2P - 2) of a row behind their share, to
the one whose next row falls due first; P is the number of sources with a positive weight. R. Tijdeman ("The chairman
assignment problem", Discrete Mathematics 32, 1980) proves that a source's rows then never differ from n times its
share by more than 1 - 1 / (2P - 2), whatever n is, which no rule can better. Between any two rows of a stage the
count is therefore less than 2 rows off, and after every D rows it is exact.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

# Rows after which the order repeats, at most: the order is kept as a table.
MAX_PERIOD = 2**16


class Shares:
    """The rows of K sources among the rows of a stage, in proportion to `weights`."""

    def __init__(self, weights: Sequence[float]):
        """weights: any scale; a float counts as the decimal number that it prints as, so 0.1 is a tenth.

        Raises ValueError for a weight that is negative or not finite, for no positive one, and for weights whose
        order repeats only after more than 65,536 rows.
        """
        for k, weight in enumerate(weights):
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"weights[{k}]={weight}: must be 0 or more. Fix: give a positive number.")
        if not sum(weights) > 0:
            raise ValueError(f"weights={list(weights)}: none is positive. Fix: give each source its share.")
        self.parts = _whole_parts(weights)
        self._period = sum(self.parts)
        order = _order(self.parts)
        self._source_D = np.array(order, np.int32)
        # Rows of each source among the first 0 .. D rows.
        chosen_DK = self._source_D[:, None] == np.arange(len(self.parts))
        self._counts_DK = np.concatenate([np.zeros_like(chosen_DK[:1]), chosen_DK]).cumsum(axis=0, dtype=np.int64)

    def source(self, row: int) -> int:
        """The source of this row of the stage, counted from 0."""
        return int(self._source_D[row % self._period])

    def counts(self, rows: int) -> list[int]:
        """How many of the stage's first `rows` rows come from each source."""
        periods, rest = divmod(rows, self._period)
        return [periods * part + int(count) for part, count in zip(self.parts, self._counts_DK[rest], strict=True)]


def _whole_parts(weights):
    """The smallest whole numbers in proportion to the weights."""
    exact = [Fraction(str(weight)) for weight in weights]
    common = math.lcm(*(share.denominator for share in exact))
    whole = [int(share * common) for share in exact]
    divisor = math.gcd(*whole)
    parts = [part // divisor for part in whole]
    if sum(parts) > MAX_PERIOD:
        rounded = [round(1000 * float(share / sum(exact))) / 1000 for share in exact]
        raise ValueError(
            f"weights={list(weights)}: their order would repeat only after {sum(parts)} rows, more than {MAX_PERIOD}. "
            f"Fix: give shares with fewer digits, for example {rounded}."
        )
    return parts


def _order(parts):
    """The source of each of the period's rows, by Tijdeman's rule, in whole numbers."""
    period = sum(parts)
    present = [k for k, part in enumerate(parts) if part]
    scale = max(2 * len(present) - 2, 1)
    taken = [0] * len(parts)
    order = []
    for row in range(1, period + 1):
        # By how much a source is behind its share, in units of 1 / D row.
        behind = {k: parts[k] * row - period * taken[k] for k in present}
        eligible = [k for k in present if scale * behind[k] >= period]
        k = min(eligible, key=lambda k: Fraction((scale - 1) * period - scale * behind[k], parts[k]))
        taken[k] += 1
        order.append(k)
    return order
