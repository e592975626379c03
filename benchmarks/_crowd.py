# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Many threads that send, beside threads that compute.

What a message takes is measured for each of them; which of several ways to
send is the cheaper is told from rounds that take turns in one run.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import threading
import time
from collections.abc import Callable, Mapping

from benchmarks import _measure

Send = Callable[[], object]
# Runs a loop with something to send with, in the calling thread.
Way = Callable[[Callable[[Send], None]], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """What goes on at once in the process.

    :ivar threads: how many send
    :ivar busy: how many compute
    """

    threads: int
    busy: int


@dataclasses.dataclass(frozen=True, slots=True)
class Round:
    """What was measured of one way in one round.

    :ivar seconds: what each message took, in no order
    :ivar each: the time of the round, divided by its messages; seconds
    :ivar processor: the same of the time that the process had a processor
    """

    seconds: list[float]
    each: float
    processor: float

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def _compute(over: Callable[[], bool]) -> None:
    number = 1
    while not over():
        for step in range(200):
            number = (number * 31 + step) & 0xFFFF


def measure(way: Way, setting: Setting, seconds: float) -> Round:
    """Send for a while from all threads.  An error of any ends it all."""
    over = threading.Event()
    took: list[list[float]] = [[] for _ in range(setting.threads)]
    errors: list[BaseException] = []
    begin = threading.Barrier(setting.threads + 1)

    def body(mine: list[float]) -> None:
        def loop(send: Send) -> None:
            begin.wait()
            clock = time.perf_counter
            while not over.is_set():
                began = clock()
                send()
                mine.append(clock() - began)

        try:
            way(loop)
        except BaseException as error:
            errors.append(error)
            begin.abort()
            over.set()

    threads = [threading.Thread(target=body, args=(mine,)) for mine in took]
    busy = [
        threading.Thread(target=_compute, args=(over.is_set,))
        for _ in range(setting.busy)
    ]
    for thread in threads:
        thread.start()
    try:
        begin.wait()
    except threading.BrokenBarrierError:
        raise errors[0] from None
    began, worked = time.perf_counter(), time.process_time()
    for thread in busy:
        thread.start()
    over.wait(seconds)
    over.set()
    for thread in threads + busy:
        thread.join()
    if errors:
        raise errors[0]
    elapsed = time.perf_counter() - began
    worked = time.process_time() - worked
    every = [one for mine in took for one in mine]
    return Round(every, elapsed / len(every), worked / len(every))


class Comparison:
    """Several ways in the same setting, by turns.

    :param ways: by name
    :param base: the name of the one that the others are divided by
    """

    def __init__(
        self, ways: Mapping[str, Way], base: str, setting: Setting
    ) -> None:
        self._ways = ways
        self._base = base
        self._setting = setting
        self._rounds: dict[str, list[Round]] = {name: [] for name in ways}

    def run(self, rounds: int, seconds: float) -> None:
        """A first round opens what is needed, and does not count."""
        names = list(self._ways)
        idle = dataclasses.replace(self._setting, busy=0)
        for name in names:
            measure(self._ways[name], idle, 0.1)
        for number in range(rounds):
            gc.collect()
            # Whoever comes first has no advantage in all rounds.
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                found = measure(self._ways[name], self._setting, seconds)
                self._rounds[name].append(found)

    def _ratios(
        self, name: str, number: Callable[[Round], float]
    ) -> _measure.Spread:
        pairs = zip(self._rounds[name], self._rounds[self._base], strict=True)
        return _measure.Spread.of([number(m) / number(b) for m, b in pairs])

    def median(self, name: str) -> _measure.Spread:
        """Ratio of the medians of what one message takes, of the rounds."""
        return self._ratios(name, lambda found: found.median)

    def each(self, name: str) -> _measure.Spread:
        """Ratio of what messages take together: of throughput, inverted."""
        return self._ratios(name, lambda found: found.each)

    def processor(self, name: str) -> _measure.Spread:
        """Ratio of what messages take of a processor; no busy threads."""
        return self._ratios(name, lambda found: found.processor)

    def p99(self, name: str) -> float:
        """Ratio of what one in a hundred takes or more, of all rounds."""
        return self._slowest(name) / self._slowest(self._base)

    def _slowest(self, name: str) -> float:
        every = [one for found in self._rounds[name] for one in found.seconds]
        return statistics.quantiles(every, n=100)[-1]

    def base_microseconds(self) -> float:
        """The median of what a message takes in the way of reference."""
        return 1e6 * statistics.median(
            found.median for found in self._rounds[self._base]
        )
