"""Means with their 95 % intervals."""

import math
import statistics


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """Mean of independent numbers, and half the width of its 95 % interval: nan for fewer than four of them.

    Student's t quantile by Fisher's expansion in 1 / degrees of freedom: within 1 % from three degrees on.
    With fewer, an interval is many times as wide as the values differ, and says nothing.
    """
    n, mean = len(values), statistics.fmean(values)
    if n < 4:
        return mean, math.nan
    t = 1.960 + 2.372 / (n - 1) + 2.823 / (n - 1) ** 2 + 2.556 / (n - 1) ** 3
    return mean, t * statistics.stdev(values) / math.sqrt(n)


def written(mean: float, half: float) -> str:
    """'0.5123 ± 0.0310', without an interval if there is none."""
    return f"{mean:.4f}" + ("" if math.isnan(half) else f" ± {half:.4f}")
