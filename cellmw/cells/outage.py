# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Deadlines, and the log lines about outages of the database."""

from __future__ import annotations

import logging
import threading
import types
from collections.abc import Callable

from cellmw import redaction

LOG = logging.getLogger(__name__)


class Deadline:
    """The end of a wait.

    :param limit: seconds from now
    """

    __slots__ = ("_clock", "_end", "limit")

    def __init__(self, limit: float, clock: Callable[[], float]) -> None:
        self.limit = limit
        self._clock = clock
        self._end = clock() + limit

    def left(self) -> float:
        """Seconds until the end, at least 0."""
        return max(0.0, self._end - self._clock())


class Outage:
    """The state of one type of query: failing or not.  Thread-safe.

    An outage logs one line when it begins and one when it ends.  As a context
    manager around a query it notes errors and lets them pass.

    No method waits for the lock, because a signal handler may have
    interrupted the thread that holds it.  A caller that finds the lock taken
    leaves the change to the holder, or to the next query.

    :param what: what the queries read, for the log
    :param meanwhile: the effect on requests, for the log
    :param quiet: seconds without a failure before a success ends the outage,
        so that a database that fails every second query does not fill the log
    :ivar lasting: whether the queries fail
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
        """Note that a query has failed."""
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
        """Note that a query has succeeded."""
        if self.lasting:
            self._end()

    def _end(self) -> None:
        now = self._clock()
        if not self._lock.acquire(blocking=False):
            return
        try:
            quiet = now - self._last >= self._quiet
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
        """Whether the outage lasts and a query has failed this recently."""
        return self.lasting and self._clock() - self._last < seconds

    def may_probe(self, every: float) -> bool:
        """Whether the caller should probe the database.

        Returns True once in ``every`` seconds.
        """
        now = self._clock()
        if not self._lock.acquire(blocking=False):
            return False
        try:
            if now - self._last < every:
                return False
            self._last = now
            return True
        finally:
            self._lock.release()


def describe(error: BaseException) -> str:
    """The driver's error as one line without credentials.

    SQLAlchemy and oslo.db wrap the driver's error and add the statement; an
    operator needs the driver's text.
    """
    inner = error
    for name in ("inner_exception", "orig"):
        inner = getattr(inner, name, None) or inner
    return redaction.describe(inner)
