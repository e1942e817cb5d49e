"""Student's t: how wide a 95 % interval of a mean is where few documents or seeds stand behind it."""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray

NORMAL = 1.96  # of as many as you like


@functools.cache
def t_quantile(freedom: float, probability: float = 0.975) -> float:
    """Quantile of Student's t: bisection on its integral (fractional degrees of freedom included)."""
    log_c = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    # x = tan(u): the tails become a finite stretch
    u: NDArray[np.float64] = np.linspace(0, math.pi / 2 - 1e-9, 20_001)
    x = np.tan(u)
    with np.errstate(over="ignore"):
        density = np.exp(log_c - (freedom + 1) / 2 * np.log1p(np.square(x) / freedom)) * (1 + np.square(x))
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(u))]) + 0.5
    return float(np.interp(probability, below, x))


def half_width(standard_error: float, count: int) -> float:
    """Half of a mean's 95 % interval; 0 where nothing is known of its error.

    Args:
        standard_error: of the mean; NaN where it is not known. count: of what it is the mean; 0: many, or not told.
    """
    if math.isnan(standard_error):
        return 0.0
    return standard_error * (t_quantile(count - 1) if 2 <= count <= 120 else NORMAL)
