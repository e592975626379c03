# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Which cell an instance is in, remembered for a while.

The cells, of which there are tens to thousands, are known as one snapshot
that one query reads anew.  Instances are asked for one at a time and
remembered for ``instance_cache_ttl``.  What is remembered of an instance is
the cell, not its connection information: that comes from the snapshot, so a
new URL holds for all instances of its cell at once.  A cell is known by its
UUID, which the query for an instance reads too: the id in an instance's
mapping may have been another cell's when the snapshot was read.

The directory owns what it remembers and the queries that it has asked; the
database and the threads are lent to it.  It belongs to one process: after a
fork the child makes its own.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from cellmw import exceptions
from cellmw.cells.instances import (
    INDEX_BITS,
    INDEX_MASK,
    TICKS,
    Instances,
    pack,
)
from cellmw.cells.mapping import Cell, CellMapping
from cellmw.cells.outage import Deadline, Outage, describe
from cellmw.cells.queries import Queries, Query
from cellmw.cells.snapshot import Snapshot
from cellmw.durations import Durations
from cellmw.workers import Workers

LOG = logging.getLogger(__name__)

# What is remembered serves these where ``instance_cache_for`` is ``safe``
# (the methods of RFC 9110, 9.2.1, that an API serves).
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

# Once the mappings could not be read: seconds from one attempt to the next,
# and seconds for which the one request waits that makes it.
_PROBE_EVERY = 1.0
_PROBE_WAIT = 0.25

# Where mappings that are a little too old will do, the share of a request's
# time that it waits for new ones; the rest is for its instance.
_SHARE = 0.5

# The share of lookup_timeout that an answer has to fail to come in, at least,
# for that to be an outage.
_TELLING = 0.9

# A failure of a lookup belongs to the same outage as the one before if less
# than this lies between them, in seconds, whatever has succeeded meanwhile.
_QUIET = 1.0

# Cells that were looked for and are not there; this many are kept at most.
_MOST_MISSING = 1000

_NEVER = -math.inf
_CELLS = object()


class Source(Protocol):
    """The API database, as far as it is read here.

    Both methods may block for as long as they like and raise what they like;
    they are called in threads of their own.
    """

    def cells(self) -> Iterable[CellMapping]:
        """All cell mappings, read with one query."""
        ...

    def cell_of(self, instance_uuid: str) -> tuple[int, str | None] | None:
        """The cell that an instance is in, read with one query.

        :returns: ``id`` and UUID of the cell mapping, the UUID None where
            there is no mapping with this id; None: the instance has no
            mapping, or no cell yet
        """
        ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Numbers for an operator to look at.

    :ivar cells: known cell mappings
    :ivar snapshot_age: seconds since they were read; None: never
    :ivar reachable: whether the last attempt to read them succeeded
    :ivar instances: instances remembered, expired ones included
    :ivar hits: requests served from memory, so far
    :ivar misses: requests for which the database was asked, so far
    :ivar failures: requests that got LookupFailed, so far
    :ivar queries: queries put to the database, so far
    :ivar queries_running: of these, how many it is still at
    :ivar queries_queued: queries that stand in line for a place
    :ivar durations: how long the database was at those it came back from
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
    """What a process knows of cells and instances.  Thread-safe.

    Nothing is asked before the first :meth:`find`.  No method waits for the
    database longer than ``lookup_timeout``, or the timeout that it is given,
    whatever the database does.  All times are in seconds.

    :param source: the API database; lent
    :param expand: what requests for a cell get; pure, raises nothing
    :param workers: the threads that ask; lent
    :param on_refresh: called with all cells by UUID each time that they were
        read, in the thread that read them, by one at a time and never with
        an older state after a younger one; no request waits for it but those
        that wait for the reading
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
        self._timeout = lookup_timeout
        self._interval = cell_refresh_interval
        # For how long an outage is, after somebody has seen to it.
        self._taken_for_granted = (
            max(cell_refresh_interval, _PROBE_EVERY) + lookup_timeout
        )
        # Where nothing is remembered, no answer is shared for being recent.
        self._for_all = instance_cache_for == "all" and instance_cache_ttl > 0
        self._on_refresh = on_refresh
        self._clock = clock
        self._queries = Queries(
            workers,
            concurrency=lookup_concurrency,
            overdue_after=lookup_timeout,
            clock=clock,
        )
        self._instances = Instances(
            ttl=instance_cache_ttl, size=instance_cache_size
        )
        self._workers = workers
        self._snapshot = Snapshot(expand)
        # Only the holder of this lock changes what follows.
        self._installing = threading.Lock()
        self._installed = 0
        self._missing: dict[str, float] = {}
        self._read_at = _NEVER
        self._fresh_until = _NEVER
        # Entries of instances above this hold until then at least.
        self._lasting = 0
        self._cells_outage = Outage(
            "cell mappings",
            "the known cells stay in use",
            clock,
        )
        self._instances_outage = Outage(
            "instance mappings",
            "requests for instances that are not remembered fail",
            clock,
            quiet=_QUIET,
        )
        self._hits = 0
        self._misses = 0
        self._failures = 0

    def find(self, instance_uuid: str, method: str = "GET") -> Cell | None:
        """The cell of an instance.

        Blocks for at most ``lookup_timeout``, and not at all if the instance
        is remembered and the snapshot is current.

        A request that is served from memory may share a query that was
        under way when it came.  One that is not shares none that was put to
        the database before: the answer might be older than the request.

        :param instance_uuid: in lower case
        :param method: the request's, as it stands in its environ
        :returns: None where there is no mapping, or no cell in it yet; a
            cell that refuses where the mapping names one that does not exist
        :raises LookupFailed: the database did not answer
        """
        if method not in SAFE_METHODS and not self._for_all:
            return self._find(instance_uuid, from_memory=False)
        # The rest is _find() for what is remembered, without a call.
        now = self._clock()
        if self._read_at <= now < self._fresh_until:
            instances = self._instances
            packed = instances.recent.get(instance_uuid)
            if packed is None:
                packed = instances.older.get(instance_uuid)
            # Most entries outlive the snapshot.  That is seen by comparing two
            # ints, which takes a fifth of comparing an int with a float.
            if packed is not None and (
                packed > self._lasting or packed >> INDEX_BITS > now * TICKS
            ):
                cell = self._snapshot.slots[packed & INDEX_MASK]
                if cell is not None:
                    self._hits += 1
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

        :param cell_uuid: as its mapping has it; if that is in lower case, any
            case will do
        :param timeout: seconds; None: ``lookup_timeout``
        :param or_name: whether the text may be a cell's name as well
        :raises CellNotFound: there is no such mapping
        :raises CellNameAmbiguous: several cells have this name
        :raises LookupFailed: the database did not answer
        """
        known = self.cell_now(cell_uuid)
        if known is not None:
            return known
        deadline = self._deadline(timeout)
        self._be_current(deadline)
        cell = self._cell_of(cell_uuid, deadline, or_name=or_name)
        if cell is None:
            raise exceptions.CellNotFound(
                cell_uuid=cell_uuid, retry_after=self.refresh_due_in()
            )
        return cell

    def cell_now(self, cell_uuid: str) -> Cell | None:
        """A cell, if what is known is current; does not block."""
        if self._read_at <= self._clock() < self._fresh_until:
            return self._snapshot.cells.get(cell_uuid)
        return None

    def mappings(self) -> list[CellMapping]:
        """The cell mappings in the order of their ids.

        Blocks as :meth:`find` does.

        :raises LookupFailed: they are not known, and the database did not
            answer
        """
        self._be_current(self._deadline(None))
        return list(self._snapshot.rows.values())

    def refresh(self, *, timeout: float | None = None) -> None:
        """Read the cell mappings now.

        They are read after this was called: a reading that was under way is
        waited for and done again.  What is remembered of instances stays.

        :param timeout: seconds; None: ``lookup_timeout``
        :raises LookupFailed: the database did not answer; the mappings that
            were known before are used on
        """
        self._read_now(self._deadline(timeout))

    def forget(self, instance_uuid: str) -> None:
        """Know nothing about an instance.  Does not block.

        For who has just moved it, after the new mapping is committed: no
        request that begins after this call gets an answer from before.
        """
        # In this order: see Instances.learn().
        self._queries.outdate(instance_uuid)
        self._instances.forget(instance_uuid)

    def remembered_for(self, instance_uuid: str) -> float | None:
        """For how many seconds an instance is remembered; None: it is not."""
        entry = self._instances.entry(instance_uuid, self._clock())
        if entry is None or self._snapshot.slots[entry[0]] is None:
            return None
        return entry[1]

    def refresh_due_in(self) -> float:
        """Seconds until the snapshot is no longer current; 0: it is not."""
        return max(0.0, self._fresh_until - self._clock())

    def stats(self) -> Stats:
        """Numbers to look at.  The counts of requests are about right."""
        load = self._queries.load()
        age = self._age()
        return Stats(
            cells=len(self._snapshot.rows),
            snapshot_age=age if math.isfinite(age) else None,
            reachable=not self._cells_outage.lasting,
            instances=len(self._instances),
            hits=self._hits,
            misses=self._misses,
            failures=self._failures,
            queries=load.started,
            queries_running=load.running,
            queries_queued=load.queued,
            durations=load.durations,
        )

    def close(self) -> None:
        """Forget all, and ask nothing any more.  Does not block.

        Queries that the database is at are left to it.  May be called
        twice.  What is asked for afterwards is LookupFailed.
        """
        self._queries.close()
        self._instances.close()

    def _find(self, instance_uuid: str, *, from_memory: bool) -> Cell | None:
        deadline = self._deadline(None)
        outdated = self._be_current(deadline)
        query = None
        while query is None:
            if from_memory:
                cell = self._remembered(instance_uuid)
                if cell is not None:
                    self._hits += 1
                    return cell
            if outdated is not None and deadline.left() <= 0:
                # No time left to ask for the instance.
                self._misses += 1
                raise self._failure(outdated)
            # What was learned since we looked is found, not asked for again:
            # of many misses at once the last ones come that late.
            query, _ = self._queries.submit(
                instance_uuid,
                self._read_instance,
                fresh=not from_memory,
                unless=self._remembered if from_memory else None,
            )
        self._misses += 1
        cause = self._wait(query, deadline, self._instances_outage)
        if cause is not None:
            raise self._failure(cause)
        if query.result is None:
            return None
        cell_id, cell_uuid = query.result
        cell = None
        if cell_uuid is not None:
            cell = self._cell_of(cell_uuid, deadline)
        return cell or self._snapshot.gone(cell_id)

    def _remembered(self, instance_uuid: str) -> Cell | None:
        entry = self._instances.entry(instance_uuid, self._clock())
        return None if entry is None else self._snapshot.slots[entry[0]]

    def _cell_of(
        self, cell_uuid: str, deadline: Deadline, *, or_name: bool = False
    ) -> Cell | None:
        """A cell that may have come since the snapshot."""
        find = self._snapshot.find
        known = find(cell_uuid, or_name=or_name)
        if known is None and not self._is_missing(cell_uuid):
            self._read_now(deadline)
            known = find(cell_uuid, or_name=or_name)
            if known is None:
                self._note_missing(cell_uuid)
        if known is None:
            return None
        return self._snapshot.cells.get(known) or self._expand(known, deadline)

    def _expand(self, cell_uuid: str, deadline: Deadline) -> Cell | None:
        # In a worker's thread: it takes locks, which a signal handler that
        # interrupts this thread would wait for.
        query, _ = self._queries.submit(
            (_CELLS, cell_uuid),
            lambda _: self._snapshot.expand(cell_uuid),
            urgent=True,
        )
        assert query is not None
        if not self._queries.wait(query, deadline.left()):
            raise self._failure("no thread became free to check the cell")
        if query.failure is not None:
            raise self._failure(query.failure)
        cell: Cell | None = query.result
        return cell

    def _is_missing(self, cell_uuid: str) -> bool:
        """Whether it was looked for, in vain, since a refresh was due."""
        looked_at = self._missing.get(cell_uuid, _NEVER)
        return 0 <= self._clock() - looked_at < self._interval

    def _note_missing(self, cell_uuid: str) -> None:
        # Only after looking: who comes meanwhile looks as well.
        if len(self._missing) >= _MOST_MISSING:
            self._missing = {}
        self._missing[cell_uuid] = self._clock()

    def _age(self) -> float:
        # In this order, or a reading in between looks like time going back.
        read_at = self._read_at
        return self._clock() - read_at

    def _is_current(self, _: object) -> bool:
        return 0 <= self._age() < self._interval

    def _be_current(self, deadline: Deadline) -> str | None:
        """Have a snapshot that may be used.

        One that is a little too old serves all, and the request that has it
        read waits for that only a part of its time; one that is much too old
        serves nobody, unless the database does not answer.

        :returns: why an old one has to do, where the request has waited for
            a new one in vain
        """
        age = self._age()
        if 0 <= age < self._interval:
            return None
        outage = self._cells_outage
        known = self._installed > 0
        usable = known and 0 <= age < 2 * self._interval
        wait = deadline.limit * _SHARE if usable else math.inf
        if known and outage.holds(self._taken_for_granted):
            # One request now and then sees whether it still lasts, and does
            # not wait long for that.
            if not outage.may_probe(_PROBE_EVERY):
                return None
            wait = min(wait, _PROBE_WAIT)
        query, is_new = self._queries.submit(
            _CELLS, self._read_cells, urgent=True, unless=self._is_current
        )
        if query is None:
            return None
        if usable and not is_new:
            self._queries.leave(query)
            return None
        cause = self._wait(query, deadline, outage, wait)
        if cause is not None and not known:
            raise self._failure(cause)
        return cause

    def _read_now(self, deadline: Deadline) -> None:
        query, _ = self._queries.submit(
            _CELLS, self._read_cells, urgent=True, fresh=True
        )
        assert query is not None
        cause = self._wait(query, deadline, self._cells_outage)
        if cause is not None:
            raise self._failure(cause)

    def _deadline(self, timeout: float | None) -> Deadline:
        return Deadline(
            self._timeout if timeout is None else timeout, self._clock
        )

    def _wait(
        self,
        query: Query,
        deadline: Deadline,
        outage: Outage,
        at_most: float = math.inf,
    ) -> str | None:
        """Wait for an answer; why there is none, or None."""
        limit = min(at_most, deadline.left())
        if self._queries.wait(query, limit):
            return query.failure
        if query.started_at is None:
            cause = "no place among lookup_concurrency became free"
        else:
            cause = "no answer"
        cause = f"{cause} within {limit:.3g} seconds"
        # Who hardly waited does not know.
        if limit >= self._timeout * _TELLING:
            outage.begin(cause)
        return cause

    def _failure(self, cause: str) -> exceptions.LookupFailed:
        self._failures += 1
        return exceptions.LookupFailed(
            "the API database could not be asked", cause=cause
        )

    # From here on: in a worker's thread.

    def _read_instance(self, query: Query) -> tuple[int, str | None] | None:
        with self._instances_outage:
            found = self._source.cell_of(str(query.key))
        index = None
        if found is not None and found[1] is not None:
            # Here, not in the request's thread: see _expand().
            self._snapshot.expand(found[1])
            index = self._snapshot.index_of(found[1])
        self._instances.learn(query, index)
        return found

    def _read_cells(self, query: Query) -> None:
        with self._cells_outage:
            mappings = list(self._source.cells())
            # Handed on in line as well: of two readings the younger one last,
            # and none finds to be gone what another one is just putting in.
            with self._installing:
                if query.number < self._installed:
                    return
                complete = self._install(query, mappings)
                if complete:
                    self._hand_on()
        if not complete:
            job = self._workers.submit(self._complete, query.number)
            if job.error is not None:
                self._complete(query.number)

    def _complete(self, number: int) -> None:
        """Expand what is left of a reading, behind the first answer."""
        for cell_uuid in list(self._snapshot.rows):
            if number != self._installed:
                return
            self._snapshot.expand(cell_uuid)
        with self._installing:
            if number == self._installed:
                self._hand_on()

    def _hand_on(self) -> None:
        """Tell of the new cells.  The caller has the lock."""
        try:
            self._on_refresh(self._snapshot.cells)
        except Exception as error:
            LOG.error("Applying new cell mappings failed: %s", describe(error))

    def _install(self, query: Query, mappings: list[CellMapping]) -> bool:
        """Make this the snapshot.  The caller has the lock.

        :returns: whether all cells are expanded
        """
        complete = self._snapshot.install(mappings)
        assert query.started_at is not None
        if query.started_at < self._read_at:
            # The clock was set back: no entry's time means anything.
            self._instances.clear()
        self._read_at = query.started_at
        until = query.started_at + self._interval
        # Never an old one beside the new time.
        self._lasting = pack(until, INDEX_MASK)
        self._fresh_until = until
        self._installed = query.number
        return complete
