"""Log-linear histogram bins: two significant decimal digits a bin, as in OpenHistogram (circllhist), which Envoy uses.

A bin is one int, so that a set of bins is a plain `dict[int, int]` from bin to count: 0 holds the value zero; the values from `d * 10**e` (d from 1.0 to
9.9, e >= 0) to the next such number are in bin `(e + 1) * 100 + 10 * d`. Bins compare as their values do. Values are whole numbers: milliseconds, bytes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

Bins = dict[int, int]

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999, 1.0)

DEFAULT_BUCKETS = (
    0.5, 1, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000, 30000, 60000, 300000, 600000, 1800000, 3600000,
)  # fmt: skip


def bin_of(value: int) -> int:
    """The bin of a whole number. Negative numbers count as zero: none of our measures can be below it."""
    if value <= 0:
        return 0
    if value < 10:
        return 100 + value * 10
    exponent = 1
    while value >= 100:
        value //= 10
        exponent += 1
    return (exponent + 1) * 100 + value


def fold(values: Iterable[float], bins: Bins) -> None:
    """Count `values` into `bins`. Fractions are cut off, as Envoy records whole units only."""
    for value, count in Counter(values).items():
        key = bin_of(int(value))
        bins[key] = bins.get(key, 0) + count


def add(bins: Bins, more: Bins) -> None:
    """Add the counts of `more` to `bins`."""
    for key, count in more.items():
        bins[key] = bins.get(key, 0) + count


def bounds(key: int) -> tuple[float, float]:
    """Lower bound and width of a bin. The bin of zero has width 0."""
    if key == 0:
        return 0.0, 0.0
    exponent, digits = divmod(key, 100)
    scale = 10.0 ** (exponent - 1)
    return digits / 10.0 * scale, scale / 10.0


def count(bins: Bins) -> int:
    """How many values were recorded."""
    return sum(bins.values())


def total(bins: Bins) -> float:
    """The approximate sum of all values. Each counts as the point of its bin where a uniform distribution over all scales has its mean."""
    result = 0.0
    for key in sorted(bins):
        left, width = bounds(key)
        if left:
            result += (left + width * (left / (left + left + width))) * bins[key]
    return result


def quantiles(bins: Bins, wanted: Sequence[float] = QUANTILES) -> list[float]:
    """The values at the ascending fractions `wanted`; NaN for all of them when there are no values.

    A quantile is a sample, not a point between two; the n samples of a bin are thought to divide it into n + 1 equal parts.
    """
    ordered = sorted(bins)
    everything = count(bins)
    if not everything:
        return [math.nan] * len(wanted)
    result: list[float] = []
    position = 0
    lower, upper = 0, bins[ordered[0]]
    for fraction in wanted:
        rank = max(1, math.ceil(everything * fraction))
        while upper < rank:
            position += 1
            lower = upper
            upper += bins[ordered[position]]
        left, width = bounds(ordered[position])
        result.append(left + (rank - lower) / (upper - lower + 1) * width)
    return result


def cumulative(bins: Bins, buckets: Sequence[float] = DEFAULT_BUCKETS) -> list[int]:
    """For each upper bound, how many values are in bins that begin at or below it: of whole numbers, those that are at most the bound."""
    begins = [(bounds(key)[0], bins[key]) for key in sorted(bins)]
    result: list[int] = []
    position = running = 0
    for bucket in buckets:
        while position < len(begins) and begins[position][0] <= bucket:
            running += begins[position][1]
            position += 1
        result.append(running)
    return result


def disjoint(counts: Sequence[int]) -> list[int]:
    """Cumulative bucket counts as counts of each bucket alone."""
    return [value - previous for value, previous in zip(counts, [0, *counts[:-1]], strict=True)]
