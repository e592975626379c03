# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The cache of cells and instances.

One query reads all cell mappings (tens to thousands) into a snapshot.  The
cell of an instance is read by a query of its own and cached for
``instance_cache_ttl``.  The cached value is the cell, not its connection
information: that comes from the snapshot, so a new URL holds for all
instances of its cell at once.  The key of a cell is its UUID, which the query
for an instance reads too: when the snapshot was read, the id in an instance
mapping may have been another cell's.

The directory owns its cache and its queries; the database and the threads are
lent to it.  It belongs to one process: after a fork the child makes its own.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping

from cellmw import exceptions
from cellmw.cells.instances import INDEX_BITS, INDEX_MASK, TICKS, Instances
from cellmw.cells.known import CellReader, KnownCells, Source
from cellmw.cells.lookups import Lookups
from cellmw.cells.mapping import Cell, CellMapping
from cellmw.cells.outage import Outage
from cellmw.cells.queries import Queries, Query
from cellmw.cells.snapshot import Snapshot
from cellmw.durations import Durations
from cellmw.workers import Workers

# ``instance_cache_for = safe`` serves these methods from the cache (the safe
# methods of RFC 9110, 9.2.1, that an API serves).
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

# Failures less than this many seconds apart belong to one outage, whatever
# succeeds between them.
_QUIET = 1.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Statistics for operators.

    :ivar cells: known cell mappings
    :ivar snapshot_age: seconds since they were read; None: never
    :ivar reachable: whether the last attempt to read them succeeded
    :ivar instances: cached instances, expired ones included
    :ivar hits: requests served from memory so far
    :ivar misses: requests that needed the database so far
    :ivar failures: requests that got LookupFailed so far
    :ivar queries: queries that the database got so far
    :ivar queries_running: queries that have not returned yet
    :ivar queries_queued: queries that wait for ``lookup_concurrency``
    :ivar durations: how long the finished queries took
    """

    cells: int
    snapshot_age: float | None
    reachable: bool
    instances: int
    hits: int
    misses: int
    failures: int
    queries: int
    queries_running: int
    queries_queued: int
    durations: Durations


class Directory:
    """The cells and instances that a process knows.  Thread-safe.

    The first query is submitted by the first :meth:`find`.  No method waits
    for the database longer than ``lookup_timeout``, or than its own timeout,
    whatever the database does.  All times are in seconds.

    :param source: the API database; lent
    :param expand: makes the cell that requests get from its mapping; pure,
        raises nothing
    :param workers: the threads that run queries; lent
    :param on_refresh: called with all cells by UUID after each reading, in
        the thread that reads, by one thread at a time, and never with an
        older state after a newer one; only requests that wait for the
        reading wait for it
    :param clock: seconds, monotonic
    """

    def __init__(
        self,
        source: Source,
        *,
        expand: Callable[[CellMapping], Cell],
        workers: Workers,
        lookup_timeout: float,
        lookup_concurrency: int,
        cell_refresh_interval: float,
        instance_cache_ttl: float,
        instance_cache_for: str,
        instance_cache_size: int,
        on_refresh: Callable[[Mapping[str, Cell]], None] = lambda cells: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        # Without a cache each request needs a query of its own.
        self._for_all = instance_cache_for == "all" and instance_cache_ttl > 0
        self._clock = clock
        self._queries = queries = Queries(
            workers,
            concurrency=lookup_concurrency,
            overdue_after=lookup_timeout,
            clock=clock,
        )
        self._lookups = Lookups(queries, timeout=lookup_timeout, clock=clock)
        self._instances = Instances(instance_cache_ttl, instance_cache_size)
        self._snapshot = snapshot = Snapshot(expand)
        interval = cell_refresh_interval
        self._reader = CellReader(
            source, snapshot, interval=interval, on_refresh=on_refresh
        )
        self._cells = KnownCells(
            self._reader, snapshot, self._lookups, workers
        )
        self._outage = Outage(
            "instance mappings",
            "requests for instances that are not remembered fail",
            clock,
            quiet=_QUIET,
        )

    def find(self, instance_uuid: str, method: str = "GET") -> Cell | None:
        """The cell of an instance.

        Blocks for at most ``lookup_timeout``, and not at all if the instance
        is cached and the snapshot is current.

        A request that may be served from memory may also join a query that
        was running when the request came.  Other requests join only a query
        that has not started: the result of a running query may be older than
        the request.

        :param instance_uuid: in lower case
        :param method: the request's, as in its environ
        :returns: None if the instance has no mapping, or no cell yet; a cell
            that refuses if the mapping names a cell that does not exist
        :raises LookupFailed: the database did not answer
        """
        if method not in SAFE_METHODS and not self._for_all:
            return self._find(instance_uuid, from_memory=False)
        # The rest is the cached case of _find() without further calls.
        now = self._clock()
        reader = self._reader
        if now < reader.fresh_until:
            instances = self._instances
            packed = instances.recent.get(instance_uuid)
            if packed is None:
                packed = instances.older.get(instance_uuid)
            # Most entries outlive the snapshot.  Comparing two ints shows
            # that in a fifth of the time that an int and a float take.
            if packed is not None and (
                packed > reader.lasting or packed >> INDEX_BITS > now * TICKS
            ):
                cell = self._snapshot.slots[packed & INDEX_MASK]
                if cell is not None:
                    self._lookups.hits += 1
                    return cell
        return self._find(instance_uuid, from_memory=True)

    def cell(
        self,
        cell_uuid: str,
        *,
        timeout: float | None = None,
        or_name: bool = False,
    ) -> Cell:
        """A cell by its UUID.  Blocks as :meth:`find` does.

        :param cell_uuid: as in its mapping; in any case if the mapping has
            lower case
        :param timeout: seconds; None: ``lookup_timeout``
        :param or_name: whether the text may also be the name of a cell
        :raises CellNotFound: no such mapping exists
        :raises CellNameAmbiguous: several cells have this name
        :raises LookupFailed: the database did not answer
        """
        known = self.cell_now(cell_uuid)
        if known is not None:
            return known
        deadline = self._lookups.deadline(timeout)
        self._cells.be_current(deadline)
        cell = self._cells.find(cell_uuid, deadline, or_name=or_name)
        if cell is None:
            raise exceptions.CellNotFound(
                cell_uuid=cell_uuid, retry_after=self.refresh_due_in()
            )
        return cell

    def cell_now(self, cell_uuid: str) -> Cell | None:
        """A cell if the snapshot is current.  Does not block."""
        if self._clock() < self._reader.fresh_until:
            return self._snapshot.cells.get(cell_uuid)
        return None

    def mappings(self) -> list[CellMapping]:
        """The cell mappings in the order of their ids.

        Blocks as :meth:`find` does.

        :raises LookupFailed: no mappings are known, and the database did not
            answer
        """
        self._cells.be_current(self._lookups.deadline())
        return list(self._snapshot.rows.values())

    def refresh(self, *, timeout: float | None = None) -> None:
        """Read the cell mappings now.

        The reading starts after this call.  Cached instances stay.

        :param timeout: seconds; None: ``lookup_timeout``
        :raises LookupFailed: the database did not answer; the old mappings
            stay in use
        """
        self._cells.read_now(self._lookups.deadline(timeout))

    def forget(self, instance_uuid: str) -> None:
        """Drop the cached cell of an instance.  Does not block.

        Call it after the new mapping is committed.  Requests that begin
        after this call do not get an older result.
        """
        # In this order: see Instances.learn().
        self._queries.outdate(instance_uuid)
        self._instances.forget(instance_uuid)

    def remembered_for(self, instance_uuid: str) -> float | None:
        """Seconds for which an instance stays cached; None: it is not."""
        entry = self._instances.entry(instance_uuid, self._clock())
        if entry is None or self._snapshot.slots[entry[0]] is None:
            return None
        return entry[1]

    def refresh_due_in(self) -> float:
        """Seconds until the snapshot is old; 0: it is old."""
        return max(0.0, self._reader.fresh_until - self._clock())

    def stats(self) -> Stats:
        """The statistics now.  The counts of requests are approximate."""
        load = self._queries.load()
        age = self._cells.age()
        return Stats(
            cells=len(self._snapshot.rows),
            snapshot_age=max(0.0, age) if math.isfinite(age) else None,
            reachable=not self._cells.outage.lasting,
            instances=len(self._instances),
            hits=self._lookups.hits,
            misses=self._lookups.misses,
            failures=self._lookups.failures,
            queries=load.started,
            queries_running=load.running,
            queries_queued=load.queued,
            durations=load.durations,
        )

    def close(self) -> None:
        """Drop the cache and fail later lookups.  Does not block.

        Running queries go on.  May be called twice.
        """
        self._queries.close()
        self._instances.close()

    def _find(self, instance_uuid: str, *, from_memory: bool) -> Cell | None:
        lookups = self._lookups
        deadline = lookups.deadline()
        outdated = self._cells.be_current(deadline)
        query = None
        while query is None:
            if from_memory:
                cell = self._remembered(instance_uuid)
                if cell is not None:
                    lookups.hits += 1
                    return cell
            if outdated is not None and deadline.left() <= 0:
                lookups.misses += 1
                raise lookups.failure(outdated)
            # Of many misses at once the last may come here after the result
            # was cached: then no query is needed, and the loop finds it.
            query, _ = self._queries.submit(
                instance_uuid,
                self._read_instance,
                fresh=not from_memory,
                unless=self._remembered if from_memory else None,
            )
        lookups.misses += 1
        cause = lookups.wait(query, deadline, self._outage)
        if cause is not None:
            raise lookups.failure(cause)
        if query.result is None:
            return None
        cell_id, cell_uuid = query.result
        cell = None
        if cell_uuid is not None:
            cell = self._cells.find(cell_uuid, deadline)
        return cell or self._snapshot.gone(cell_id)

    def _remembered(self, instance_uuid: str) -> Cell | None:
        entry = self._instances.entry(instance_uuid, self._clock())
        return None if entry is None else self._snapshot.slots[entry[0]]

    def _read_instance(self, query: Query) -> tuple[int, str | None] | None:
        """Read the mapping of an instance, in a worker thread."""
        with self._outage:
            found = self._source.cell_of(str(query.key))
        index = None
        if found is not None and found[1] is not None:
            # In a worker thread: see KnownCells.
            self._snapshot.expand(found[1])
            index = self._snapshot.index_of(found[1])
        self._instances.learn(query, index)
        return found
