# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Queries to a database that may not answer.

A query runs on a worker thread, so that a request waits for the result only
as long as it chooses, whatever the driver does.  Requests that need the same
result share one query.  The number of running queries is limited; the others
wait in a queue.

:class:`Queries` owns the queue and the slots.  A query keeps its slot until
the driver returns, even if no request waits for it any more.

A signal handler may submit a query too.  It runs in the main thread between
any two instructions, perhaps while that thread holds the lock of this module;
waiting for the lock would then never end.  So each thread marks itself while
it is in here.  A handler that finds its own thread marked submits its query
without the lock.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from cellmw.cells.outage import describe
from cellmw.durations import Durations, Histogram
from cellmw.workers import Job, Workers

_CLOSED = "closed"


class Query(Job):
    """One query.  Made by :meth:`Queries.submit`.

    After :meth:`wait` has returned True, either ``result`` is the result or
    ``failure`` is set.

    :ivar key: what the query is about; queries with equal keys are
        interchangeable
    :ivar number: the position in the order of starting, from 1
    :ivar started_at: when the database got the query; None: not yet
    :ivar failure: why the query has no result, without credentials
    :ivar outdated: the result may be older than a known change; it serves
        those who wait and must not be cached
    :ivar waiters: how many threads wait for the result
    """

    __slots__ = (
        "_owner",
        "failure",
        "key",
        "number",
        "outdated",
        "started_at",
        "urgent",
        "waiters",
    )

    def __init__(
        self,
        key: Hashable,
        function: Callable[[Query], Any],
        owner: Queries | None = None,
        *,
        urgent: bool = False,
    ) -> None:
        super().__init__(function, ())
        self._owner = owner
        self.key = key
        self.urgent = urgent
        self.number = 0
        self.started_at: float | None = None
        self.failure: str | None = None
        self.outdated = False
        self.waiters = 0

    def run(self) -> None:
        """Run the query in the calling thread, in a slot.  Never raises."""
        self.thread_id = threading.get_ident()
        owner = self._owner
        if owner is None or owner._begin(self):
            # Not earlier: the arguments of a query that never runs would
            # keep it alive.
            self._args = (self,)
            super().run()
        if owner is not None:
            owner._end(self)

    def fail(self, cause: str) -> None:
        """End the query without running it."""
        self.failure = cause
        self.finish()

    def finish(self) -> None:
        """Wake the threads that wait."""
        if self.error is not None:
            self.failure = describe(self.error)
            # Its traceback holds the driver's variables.
            self.error = None
        super().finish()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The state of the queries at one moment.

    :ivar started: queries that the database got so far
    :ivar running: slots in use
    :ivar queued: queries that wait for a slot
    :ivar durations: how long the finished queries took
    """

    started: int
    running: int
    queued: int
    durations: Durations


class _Slots:
    """The slots for running queries, and the queue.  Needs the lock."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.running = 0
        # Ordered, because a query is also removed from the middle.
        self.queue: collections.OrderedDict[Query, None] = (
            collections.OrderedDict()
        )

    def take(self, query: Query) -> bool:
        """Take a slot if one is free; queue the query otherwise."""
        if self.running < self._count:
            self.running += 1
            return True
        self.enqueue(query)
        return False

    def enqueue(self, query: Query) -> None:
        self.queue[query] = None
        if query.urgent:
            self.queue.move_to_end(query, last=False)

    def release(self) -> Query | None:
        """Hand the slot to the next query; free it if none is queued."""
        if self.queue:
            return self.queue.popitem(last=False)[0]
        self.running -= 1
        return None


class _Sharing:
    """The query of each key that new callers join.  Needs the lock."""

    def __init__(self, overdue_after: float) -> None:
        self._overdue_after = overdue_after
        self.current: dict[Hashable, Query] = {}
        # The query that runs after the current one.
        self.following: dict[Hashable, Query] = {}
        # Running queries that took too long; a key has at most one.
        self._overdue: dict[Hashable, Query] = {}

    def find(self, new: Query, *, fresh: bool, now: float) -> Query | None:
        """The query to join, perhaps ``new`` itself; None: start another."""
        key = new.key
        current = self.current.get(key)
        if current is None or current.started_at is None:
            return current
        late = now - current.started_at >= self._overdue_after
        if late and key not in self._overdue:
            self._overdue[key] = self.current.pop(key)
            current.outdated = True
            return None
        if fresh or current.outdated:
            return self.following.setdefault(key, new)
        return current

    def drop(self, query: Query) -> None:
        """Keep later callers from joining this query."""
        for by_key in (self.current, self.following):
            if by_key.get(query.key) is query:
                del by_key[query.key]

    def end(self, query: Query) -> Query | None:
        """Note the end of a query; give the one that follows it, if any."""
        key = query.key
        if self._overdue.get(key) is query:
            del self._overdue[key]
            return None
        if self.current.get(key) is not query:
            return None
        del self.current[key]
        following = self.following.pop(key, None)
        if following is not None:
            self.current[key] = following
        return following


class Queries:
    """The queries of one process.  Thread-safe.

    :param concurrency: most queries that run at once
    :param overdue_after: seconds after which new callers no longer join a
        running query.  One more query with the same key may then run, but
        not a third, so that one hanging statement does not take all slots.
    """

    def __init__(
        self,
        workers: Workers,
        *,
        concurrency: int,
        overdue_after: float,
        clock: Callable[[], float],
    ) -> None:
        self._workers = workers
        self._clock = clock
        self._lock = threading.Lock()
        # Threads that hold the lock, or are about to take or release it, or
        # are about to start a query that others may have joined.
        self._inside: set[int] = set()
        self._slots = _Slots(concurrency)
        self._sharing = _Sharing(overdue_after)
        self._numbers = itertools.count(1)
        self._started = 0
        self._durations = Histogram()
        self._closed = False

    def submit(
        self,
        key: Hashable,
        function: Callable[[Query], Any],
        *,
        fresh: bool = False,
        urgent: bool = False,
        unless: Callable[[Any], object] | None = None,
    ) -> tuple[Query | None, bool]:
        """Start a query, or join one.  Does not block.

        The caller then calls :meth:`wait` or :meth:`leave`.

        :param key: what the query is about
        :param function: called with the query, in another thread
        :param fresh: join only a query that has not started yet
        :param urgent: put the query at the head of the queue
        :param unless: called with the key if no query can be joined; a true
            value means that no query is needed.  The lock is held during the
            call, so it must be a mere look-up.
        :returns: the query, or None if no query is needed; and whether the
            query is new
        """
        if threading.get_ident() in self._inside:
            return self._submit_alone(key, function), True
        new = Query(key, function, self, urgent=urgent)
        now = self._clock()
        # Marked until the query is started: a handler must not join a query
        # that only the interrupted thread can start.
        with self._entered():
            with self._lock:
                query = self._sharing.find(new, fresh=fresh, now=now)
                if query is not None:
                    query.waiters += 1
                    return query, query is new
                query = self._sharing.following.pop(key, None)
                if query is None:
                    # An earlier query stores its result before it ends.
                    if unless is not None and unless(key):
                        return None, False
                    query = new
                query.waiters += 1
                closed = self._closed
                if not closed:
                    self._sharing.current[key] = query
                    starts = self._slots.take(query)
            if closed:
                query.fail(_CLOSED)
            elif starts:
                self._start(query)
        return query, query is new

    @contextlib.contextmanager
    def _entered(self) -> Iterator[None]:
        thread = threading.get_ident()
        self._inside.add(thread)
        try:
            yield
        finally:
            self._inside.discard(thread)

    def _submit_alone(
        self, key: Hashable, function: Callable[[Query], Any]
    ) -> Query:
        """Submit for a signal handler that has interrupted this object.

        The query takes no slot, and nobody joins it.
        """
        query = Query(key, function)
        query.waiters = 1
        # outdate() does not find this query.
        query.outdated = True
        query.number = self._started = next(self._numbers)
        query.started_at = self._clock()
        if self._closed:
            query.fail(_CLOSED)
        else:
            self._workers.start(query)
        return query

    def wait(self, query: Query, timeout: float) -> bool:
        """Wait for the result or the failure of a query.

        :param timeout: seconds
        :returns: whether the query has ended
        """
        done = False
        try:
            done = query.wait(timeout)
        finally:
            if not done:
                self.leave(query)
        return done

    def leave(self, query: Query) -> None:
        """Stop waiting.  A queued query without waiters never runs."""
        if query._owner is None:
            return
        with self._entered(), self._lock:
            query.waiters -= 1
            if not query.waiters and query.started_at is None:
                self._slots.queue.pop(query, None)
                self._sharing.drop(query)

    def outdate(self, key: Hashable) -> None:
        """Mark the running query of a key as outdated.

        Its waiters still get its result.  Later callers wait for a query
        that starts after this call.
        """
        # Without the lock: a query that has not started when this thread
        # looks at it starts after this call.
        query = self._sharing.current.get(key)
        if query is not None and query.started_at is not None:
            query.outdated = True

    def load(self) -> Load:
        """The approximate state now.  Takes no lock."""
        return Load(
            started=self._started,
            running=self._slots.running,
            queued=len(self._slots.queue),
            durations=self._durations.snapshot(),
        )

    def close(self) -> None:
        """Fail the queued queries, and each query that is submitted later.

        Running queries go on, and so do the threads that wait for them.
        """
        self._closed = True
        if threading.get_ident() in self._inside:
            # Each queued query fails when it gets a slot.
            return
        slots, sharing = self._slots, self._sharing
        with self._entered(), self._lock:
            left = [*slots.queue, *sharing.following.values()]
            slots.queue.clear()
            sharing.following.clear()
            sharing.current.clear()
        for query in left:
            query.fail(_CLOSED)

    def _start(self, query: Query | None) -> None:
        while query is not None:
            self._workers.start(query)
            # In this order: the query may have ended by now.
            if not query.done or query.thread_id is not None:
                return
            # No thread could be started.  The query has failed.
            query = self._release_slot(query)

    def _begin(self, query: Query) -> bool:
        """Whether the query still has to run."""
        now = self._clock()
        with self._lock:
            if self._closed:
                query.failure = _CLOSED
                return False
            if not query.waiters:
                return False
            query.number = self._started = next(self._numbers)
            query.started_at = now
        return True

    def _end(self, query: Query) -> None:
        if query.started_at is not None:
            self._durations.observe(self._clock() - query.started_at)
        self._start(self._release_slot(query))

    def _release_slot(self, query: Query) -> Query | None:
        """The query that uses the slot next."""
        with self._lock:
            following = self._sharing.end(query)
            if following is not None:
                self._slots.enqueue(following)
            return self._slots.release()
