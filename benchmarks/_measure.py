# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Measuring several ways to do a thing, in turn, in one run.

What else the machine does falls upon all ways alike, so their ratios are
steadier than their times.  Both are told as the median of all rounds, with
the quarters beside it.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Spread:
    """The median of some numbers, and what lies a quarter from each end."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Spread:
        low, median, high = statistics.quantiles(numbers, n=4)
        return cls(low, median, high)

    def __format__(self, spec: str) -> str:
        low, median, high = (
            format(number, spec)
            for number in (self.low, self.median, self.high)
        )
        return f"{median} ({low} to {high})"


class Rounds:
    """Seconds that one operation took, of each way in each round.

    :param clock: where nothing waits, ``time.thread_time`` leaves out what
        other processes take
    """

    def __init__(
        self,
        ways: Mapping[str, Callable[[int], object]],
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._ways = dict(ways)
        self._clock = clock
        self.seconds: dict[str, list[float]] = {name: [] for name in ways}

    def run(
        self,
        rounds: int,
        count: int,
        prepare: Callable[[], object] = lambda: None,
    ) -> None:
        """Do ``count`` operations of each way, ``rounds`` times in turn.

        Each way is called with the number of operations to do.  A first round
        is not counted, for it opens and imports what is needed.  ``prepare``
        is called before each measurement.
        """
        names = list(self._ways)
        for number in range(rounds + 1):
            # Who comes first has no advantage in all rounds.
            order = names if number % 2 else list(reversed(names))
            for name in order:
                way = self._ways[name]
                prepare()
                gc.collect()
                began = self._clock()
                way(count)
                took = (self._clock() - began) / count
                if number:
                    self.seconds[name].append(took)

    def microseconds(self, name: str) -> Spread:
        return Spread.of([s * 1e6 for s in self.seconds[name]])

    def without(self, name: str, other: str) -> list[float]:
        """What one way takes more than another, in each round; seconds."""
        return [
            mine - theirs
            for mine, theirs in zip(
                self.seconds[name], self.seconds[other], strict=True
            )
        ]

    def ratio(self, name: str, other: str) -> Spread:
        """How many times as long one way takes as another."""
        return Spread.of(
            [
                mine / theirs
                for mine, theirs in zip(
                    self.seconds[name], self.seconds[other], strict=True
                )
            ]
        )


def verdict(what: str, found: float, bound: float) -> bool:
    """Print whether a bound is met; gives that."""
    met = found <= bound
    print(
        f"{'met' if met else 'NOT MET'}: {what}: {found:.3g}, "
        f"at most {bound:.3g}"
    )
    return met
