"""Intervals: of a mean over seeds by Student's t distribution, and of bootstrap values."""

import math
import statistics
from collections.abc import Sequence

import numpy as np

Interval = tuple[float, float]


def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution, above the median.

    torch and numpy have none, and scipy is no dependency. For whole degrees of freedom the distribution is a finite
    series (Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4), inverted here by bisection.

    Args:
        probability: In [0.5, 1).
        degrees: Degrees of freedom, at least 1.
    """
    if not (0.5 <= probability < 1 and degrees >= 1):
        raise ValueError(f"t_quantile({probability}, {degrees}): give 0.5 <= probability < 1 and degrees >= 1")
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        angle = (low + high) / 2
        low, high = (angle, high) if _t_inside(angle, degrees) < 2 * probability - 1 else (low, angle)
    return math.sqrt(degrees) * math.tan(low)


def _t_inside(angle: float, degrees: int) -> float:
    """P(|T| < t) with angle = atan(t / sqrt(degrees))."""
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0 if degrees == 1 else term
    for k in range(2 + odd, degrees - 1, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval | None:
    """Interval of the mean over seeds: mean -+ t s / sqrt(n).

    None for a single value, which has no spread, and where a value isn't finite.
    """
    if not values:
        raise ValueError("t_interval needs at least one value")
    if len(values) == 1 or not all(map(math.isfinite, values)):
        return None
    mean, count = statistics.fmean(values), len(values)
    half = t_quantile((1 + level) / 2, count - 1) * statistics.stdev(values) / math.sqrt(count)
    return mean - half, mean + half


def paired_interval(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Interval | None:
    """Interval of the mean difference a - b, where the i-th values share a seed. None as in `t_interval`."""
    if len(a) != len(b):
        raise ValueError(f"paired_interval compares seed by seed, but got {len(a)} and {len(b)} values")
    return t_interval([x - y for x, y in zip(a, b, strict=True)], level)


def percentile_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The middle `level` of bootstrap values."""
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
