"""Percentiles."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile of at least one value, between two of them in proportion."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * q / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True, slots=True)
class Distribution:
    count: int
    mean: float
    min: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Distribution | None":
        """None of no values."""
        known = list(values)
        if not known:
            return None
        return cls(
            count=len(known),
            mean=statistics.fmean(known),
            min=min(known),
            p50=percentile(known, 50),
            p90=percentile(known, 90),
            p99=percentile(known, 99),
            max=max(known),
        )
