# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Histograms of durations."""

from __future__ import annotations

import bisect
import dataclasses
import threading

# Upper bounds of the buckets, in seconds.  One more bucket has no bound.
BOUNDS = (
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
)


@dataclasses.dataclass(frozen=True, slots=True)
class Durations:
    """A histogram at one moment.

    :ivar counts: the number of durations in each bucket (not cumulative)
    :ivar total: the sum of all durations, in seconds
    """

    counts: tuple[int, ...] = (0,) * (len(BOUNDS) + 1)
    total: float = 0.0


class Histogram:
    """A histogram of durations, with the buckets of :data:`BOUNDS`.

    Thread-safe.
    """

    __slots__ = ("_counts", "_lock", "_total")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = [0] * (len(BOUNDS) + 1)
        self._total = 0.0

    def observe(self, seconds: float) -> None:
        """Add one duration."""
        index = bisect.bisect_left(BOUNDS, seconds)
        with self._lock:
            self._counts[index] += 1
            self._total += seconds

    def snapshot(self) -> Durations:
        """The histogram now; the total may lack the last duration.

        Takes no lock: a signal handler may have interrupted the thread that
        holds it.
        """
        return Durations(tuple(self._counts), self._total)
