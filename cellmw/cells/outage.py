# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Deadlines, and telling the log when a database fails and recovers."""

from __future__ import annotations

import logging
import threading
import types
from collections.abc import Callable

from cellmw import redaction

LOG = logging.getLogger(__name__)


class Deadline:
    """A time up to which somebody waits.

    What is left is never more than the limit, even if the clock is set back.

    :param limit: seconds from now
    """

    __slots__ = ("_clock", "_end", "limit")

    def __init__(self, limit: float, clock: Callable[[], float]) -> None:
        self.limit = limit
        self._clock = clock
        self._end = clock() + limit

    def left(self) -> float:
        """Seconds; not below 0."""
        return min(self.limit, max(0.0, self._end - self._clock()))


class Outage:
    """Whether one kind of query fails.  Thread-safe.

    It logs one line when it begins and one when it ends.  Around a query it
    is a context manager, which lets errors pass.

    Nothing here waits for the lock, because a signal handler may have
    interrupted the thread that holds it.  A caller that finds it taken leaves
    the news to the holder, or to the next query.

    :param what: what is asked, for the log
    :param meanwhile: what becomes of requests, for the log
    :param quiet: seconds without a failure before a success ends it, so that
        a database that answers half of the queries does not fill the log
    """

    __slots__ = (
        "_clock",
        "_last",
        "_lock",
        "_meanwhile",
        "_quiet",
        "_since",
        "_what",
        "lasting",
    )

    def __init__(
        self,
        what: str,
        meanwhile: str,
        clock: Callable[[], float],
        *,
        quiet: float = 0.0,
    ) -> None:
        self._what = what
        self._meanwhile = meanwhile
        self._clock = clock
        self._quiet = quiet
        self._lock = threading.Lock()
        self._since = 0.0
        self._last = 0.0
        self.lasting = False

    def __enter__(self) -> None:
        return

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        if error is None:
            self.end()
        else:
            self.begin(describe(error))

    def begin(self, cause: str) -> None:
        """A query has failed."""
        now = self._clock()
        self._last = now
        if not self._lock.acquire(blocking=False):
            return
        try:
            begins, self.lasting = not self.lasting, True
            if begins:
                self._since = now
        finally:
            self._lock.release()
        if begins:
            LOG.warning(
                "API database unreachable (%s): %s; %s",
                self._what,
                cause,
                self._meanwhile,
            )

    def end(self) -> None:
        """A query was answered."""
        if self.lasting:
            self._end()

    def _end(self) -> None:
        now = self._clock()
        if not self._lock.acquire(blocking=False):
            return
        try:
            quiet = abs(now - self._last) >= self._quiet
            ends = self.lasting and quiet
            if ends:
                self.lasting = False
            lasted = now - self._since
        finally:
            self._lock.release()
        if ends:
            LOG.warning(
                "API database reachable again (%s), after %.0f seconds",
                self._what,
                lasted,
            )

    def holds(self, seconds: float) -> bool:
        """Whether it lasts, and was seen to within these seconds."""
        return self.lasting and abs(self._clock() - self._last) < seconds

    def may_probe(self, every: float) -> bool:
        """Whether the caller is to see if it still lasts.

        Says yes once in so many seconds.
        """
        now = self._clock()
        if not self._lock.acquire(blocking=False):
            return False
        try:
            if abs(now - self._last) < every:
                return False
            self._last = now
            return True
        finally:
            self._lock.release()


def describe(error: BaseException) -> str:
    """What went wrong in the database, as one line without credentials.

    SQLAlchemy and oslo.db wrap the driver's error and add the statement; what
    the driver says is what an operator needs.
    """
    inner = error
    for name in ("inner_exception", "orig"):
        inner = getattr(inner, name, None) or inner
    return redaction.describe(inner)
