"""Coefficients of Newton-Schulz: the composition of odd quintics that is nearest to the sign function.

A step maps every singular value s to a s + b s^3 + c s^5. Polar Express (Amsel and others, arXiv 2505.16932) takes,
step by step, the quintic with the smallest largest distance from one on the interval in which the singular values can
then lie. Everything is float64 on a few numbers, once, when an `NS` is made.
"""

import math

import numpy as np

Triple = tuple[float, float, float]

_ROUNDS = 100  # the exchange below settles within about ten


def polar_express(l: float = 1e-3, steps: int = 6, eps: float = 0.01, cushion: float = 0.02) -> tuple[Triple, ...]:
    """The (a, b, c) of every step, for singular values in [l, 1] after normalisation.

    Args:
      l: the smallest singular value to care for, after division by the Frobenius norm. Smaller ones move towards
        one too, but do not arrive.
      steps: number of steps.
      eps: safety: every step but the last is made for values larger by the factor 1 + eps, since rounding may
        carry a value past the end of its interval, where the quintic grows quickly.
      cushion: a step treats [cushion * u, u] at least, u being the upper end: a better fit of a wider interval
        would let values just below its upper end fall far.

    Raises:
      ValueError: `l` or `cushion` outside (0, 1), fewer than one step, or a negative `eps`.

    Source: Amsel, Persson, Musco, Gower, arXiv 2505.16932. (1e-3, 5, 0.02, 0.02) gives
    the numbers of modded-nanogpt, (1e-3, 8, 0, 0.02407327424182761) those of the paper's code.
    """
    if not (0 < l < 1 and 0 < cushion < 1 and steps >= 1 and eps >= 0):
        raise ValueError(
            f"polar_express needs l and cushion in (0, 1), steps >= 1 and eps >= 0, "
            f"got l={l}, steps={steps}, eps={eps}, cushion={cushion}"
        )
    lower, upper = l, 1.0
    triples = []
    for t in range(steps):
        triple = _optimal_quintic(max(lower, cushion * upper), upper)
        if cushion * upper > lower:
            # The fit ignored [lower, cushion * upper]; centre the image of the whole interval on one again.
            triple = _times(triple, 2 / (_at(triple, lower) + _at(triple, upper)))
        if t < steps - 1:
            a, b, c = triple
            triple = a / (1 + eps), b / (1 + eps) ** 3, c / (1 + eps) ** 5  # the quintic of s / (1 + eps)
        triples.append(triple)
        lower = _at(triple, lower)
        upper = 2 - lower
        lower = min(lower, upper)
    return tuple(triples)


def _optimal_quintic(l: float, u: float) -> Triple:
    """The odd quintic with the smallest largest distance from one on [l, u], by Remez' exchange.

    The best one errs by the same E with alternating sign at l, at its two stationary points q < r, and at u.
    """
    if l / u >= 1 - 5e-6:  # the system below becomes singular; this is its limit, the Pade form around one
        return 15 / 8 / u, -10 / 8 / u**3, 3 / 8 / u**5
    q, r = (3 * l + u) / 4, (l + 3 * u) / 4
    error = math.inf
    for _ in range(_ROUNDS):
        points = np.array([l, q, r, u])
        system = np.stack([points, points**3, points**5, [1, -1, 1, -1]], axis=1)
        a, b, c, new_error = np.linalg.solve(system, np.ones(4))
        root = math.sqrt(9 * b * b - 20 * a * c)
        q, r = (math.sqrt((-3 * b + sign * root) / (10 * c)) for sign in (-1, 1))
        if abs(error - new_error) < 1e-15:
            break
        error = new_error
    return float(a), float(b), float(c)


def _at(triple: Triple, x: float) -> float:
    a, b, c = triple
    return a * x + b * x**3 + c * x**5


def _times(triple: Triple, factor: float) -> Triple:
    a, b, c = triple
    return a * factor, b * factor, c * factor
