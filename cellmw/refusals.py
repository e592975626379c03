# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The trace that each refusal and each failure to deliver leaves.

Errors meet here wherever they are raised: in a transport, where a message
could not be sent, and in the filter, where a request could not be served.
Each error is noted once.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable

from cellmw import exceptions, redaction

LOG = logging.getLogger(__name__)

# Seconds between two warnings for the same cell and reason.
_WARN_EVERY = 60.0

# Most pairs of cell and reason that are kept; cells come and go.
_MAX_KINDS = 10_000

_WORDS = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


class _Kind:
    """The refusals of one cell for one reason."""

    __slots__ = ("cell_name", "count", "not_warned", "warned_at")

    def __init__(self) -> None:
        self.cell_name: str | None = None
        self.count = 0
        self.not_warned = 0
        self.warned_at: float | None = None


class Refusals:
    """Counts and logs the refusals of one process.  Thread-safe.

    :param clock: seconds, monotonic
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._kinds: dict[tuple[str, str], _Kind] = {}

    def note(
        self, error: exceptions.CellMWError, request_id: object = None
    ) -> None:
        """Count an error and write one log line, unless it has been noted.

        The first of a cell and reason in a minute is a WARNING, the others
        are INFO.

        :param request_id: of the request that met the error, where known
        """
        if error.is_noted:
            return
        error.is_noted = True
        reason = reason_of(error)
        cell_uuid, cell_name = _cell_of(error)
        # In a forked child, a lock that another thread of the parent held is
        # never free.
        if not self._lock.acquire(timeout=1.0):
            return
        try:
            kind = self._kind(cell_uuid, reason)
            kind.cell_name = cell_name
            kind.count += 1
            not_warned = self._not_warned_before(kind)
        finally:
            self._lock.release()
        more = (
            f" (and {not_warned} more since the last warning)"
            if not_warned
            else ""
        )
        LOG.log(
            logging.INFO if not_warned is None else logging.WARNING,
            "Refused request %s, reason %s: %s%s",
            redaction.one_line(str(request_id or "without an id"), 100),
            reason,
            redaction.one_line(str(error)),
            more,
        )

    def counts(self) -> list[tuple[str, str | None, str, int]]:
        """Cell UUID or ``""``, cell name, reason, number so far."""
        with self._lock:
            return [
                (cell_uuid, kind.cell_name, reason, kind.count)
                for (cell_uuid, reason), kind in self._kinds.items()
            ]

    def _kind(self, cell_uuid: str, reason: str) -> _Kind:
        key = (cell_uuid, reason)
        kind = self._kinds.get(key)
        if kind is None:
            if len(self._kinds) >= _MAX_KINDS:
                key = ("", reason)
            kind = self._kinds.setdefault(key, _Kind())
        return kind

    def _not_warned_before(self, kind: _Kind) -> int | None:
        """How many had no warning since the last one; None: nor has this."""
        now = self._clock()
        if kind.warned_at is not None and now - kind.warned_at < _WARN_EVERY:
            kind.not_warned += 1
            return None
        kind.warned_at = now
        not_warned, kind.not_warned = kind.not_warned, 0
        return not_warned


def _cell_of(error: exceptions.CellMWError) -> tuple[str, str | None]:
    if isinstance(error, exceptions.SendError) and error.cell_uuid:
        return error.cell_uuid, error.cell_name
    return "", None


def reason_of(error: exceptions.CellMWError) -> str:
    """The reason as the metric has it: ``cell_busy`` for CellBusy."""
    for kind in type(error).__mro__:
        # Services may derive classes; the reasons are a fixed set.
        if kind.__module__ == exceptions.__name__:
            return _WORDS.sub("_", kind.__name__).lower()
    return "unknown"
