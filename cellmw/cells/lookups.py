# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Waiting for queries within a deadline, and counting the lookups."""

from __future__ import annotations

import math
from collections.abc import Callable

from cellmw import exceptions
from cellmw.cells.outage import Deadline, Outage
from cellmw.cells.queries import Queries, Query

# A missing result is an outage only if the request waited for at least this
# share of lookup_timeout.
_SHARE_FOR_OUTAGE = 0.9


class Lookups:
    """The lookups of a directory.  Thread-safe.

    The counts are approximate: no lock guards them.

    :ivar timeout: ``lookup_timeout``
    :ivar hits: requests served from memory so far
    :ivar misses: requests that needed the database so far
    :ivar failures: requests that got LookupFailed so far
    """

    __slots__ = (
        "clock",
        "failures",
        "hits",
        "misses",
        "queries",
        "timeout",
    )

    def __init__(
        self, queries: Queries, *, timeout: float, clock: Callable[[], float]
    ) -> None:
        self.queries = queries
        self.timeout = timeout
        self.clock = clock
        self.hits = 0
        self.misses = 0
        self.failures = 0

    def deadline(self, timeout: float | None = None) -> Deadline:
        """A deadline.

        :param timeout: seconds; None: ``lookup_timeout``
        """
        return Deadline(
            self.timeout if timeout is None else timeout, self.clock
        )

    def wait(
        self,
        query: Query,
        deadline: Deadline,
        outage: Outage,
        at_most: float = math.inf,
    ) -> str | None:
        """Wait for the result of a query.

        :param outage: begins if the result does not arrive in time
        :param at_most: seconds
        :returns: the cause if the query has no result, None otherwise
        """
        limit = min(at_most, deadline.left())
        if self.queries.wait(query, limit):
            return query.failure
        if query.started_at is None:
            cause = "no place among lookup_concurrency became free"
        else:
            cause = "no answer"
        cause = f"{cause} within {limit:.3g} seconds"
        if limit >= self.timeout * _SHARE_FOR_OUTAGE:
            outage.begin(cause)
        return cause

    def failure(self, cause: str) -> exceptions.LookupFailed:
        """The error of a request, which is counted."""
        self.failures += 1
        return exceptions.LookupFailed(
            "the API database could not be asked", cause=cause
        )
