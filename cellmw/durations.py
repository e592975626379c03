# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""How long things took, counted by classes."""

from __future__ import annotations

import bisect
import dataclasses
import threading

# Upper bounds of the classes, in seconds; what takes longer than the last is
# in a class of its own.
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
    """What was counted.

    :ivar counts: how many, by the classes of :data:`BOUNDS`, each without
        those of the classes before it
    :ivar total: all of them together, in seconds
    """

    counts: tuple[int, ...] = (0,) * (len(BOUNDS) + 1)
    total: float = 0.0


class DurationCounter:
    """Counts durations.  Thread-safe."""

    __slots__ = ("_counts", "_lock", "_total")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = [0] * (len(BOUNDS) + 1)
        self._total = 0.0

    def add(self, seconds: float) -> None:
        """Count one.  Below zero, by a clock that was set back, it is 0."""
        seconds = max(seconds, 0.0)
        index = bisect.bisect_left(BOUNDS, seconds)
        with self._lock:
            self._counts[index] += 1
            self._total += seconds

    def counted(self) -> Durations:
        """What was counted so far; the total may lack what is just counted.

        Takes no lock: a signal handler may have interrupted it, and wait for
        a thread that counts.
        """
        return Durations(tuple(self._counts), self._total)
