# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Messages that go on while their broker is cut off or restarted.

:class:`Traffic` owns its threads.  :class:`Breaks` notes when the
connections were ended, and finds the messages that have no part in that.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator

from tests.faults.service import Outcome, Service
from tests.functional import stack

# A call among casts, all from one thread.
_KINDS = ("cast", "cast", "call")


def at_once(count: int, send: Callable[[], Outcome]) -> list[Outcome]:
    """Send from so many threads, all of which begin together."""
    outcomes: list[Outcome] = []
    together = threading.Barrier(count)

    def run() -> None:
        together.wait()
        outcomes.append(send())

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == count
    return outcomes


class Traffic:
    """Threads that send one message after another, each in a request."""

    def __init__(self, api: Service, cell: str, threads: int) -> None:
        self._api, self._cell = api, cell
        self._done = threading.Event()
        self.outcomes: list[Outcome] = []
        self._errors: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._run) for _ in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        try:
            for kind in itertools.cycle(_KINDS):
                if self._done.wait(0.05):
                    return
                self.outcomes.append(self._api.send_one(self._cell, kind))
        except BaseException as error:
            self._errors.append(error)

    def delivered(self) -> int:
        return sum(o.kind == "delivered" for o in list(self.outcomes))

    def wait_for(self, count: int) -> None:
        """Until so many more have been delivered."""
        before = self.delivered()
        stack.eventually(lambda: self.delivered() >= before + count, within=60)

    def stop(self) -> list[Outcome]:
        self._done.set()
        for thread in self._threads:
            thread.join()
        assert not self._errors, self._errors
        return self.outcomes


class Breaks:
    """When connections were ended."""

    def __init__(self) -> None:
        self._times: list[tuple[float, float]] = []

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """At its end no connection of before is left."""
        began = time.monotonic()
        yield
        self._times.append((began, time.monotonic()))

    def _meets(self, outcome: Outcome) -> bool:
        """Whether a message was under way when connections were ended."""
        ended = outcome.began + outcome.seconds
        return any(
            outcome.began <= last and first <= ended
            for first, last in self._times
        )

    def needless(self, outcomes: list[Outcome]) -> list[Outcome]:
        """Messages that are uncertain, though nothing ended under them."""
        return [
            outcome
            for outcome in outcomes
            if outcome.kind == "uncertain" and not self._meets(outcome)
        ]
