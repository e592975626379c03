# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The known cell mappings, which are read again when they are old.

:class:`CellReader` runs in worker threads: it reads the mappings and installs
them as the snapshot.  :class:`KnownCells` runs in request threads: it decides
when a request has to wait for the reader.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from cellmw.cells.instances import INDEX_MASK, pack
from cellmw.cells.lookups import Lookups
from cellmw.cells.mapping import Cell, CellMapping
from cellmw.cells.outage import Deadline, Outage, describe
from cellmw.cells.queries import Query
from cellmw.cells.snapshot import Snapshot
from cellmw.workers import Workers

LOG = logging.getLogger(__name__)

# The key of the query for all cell mappings.
CELLS = object()

# During an outage one request in so many seconds tries the database, and
# waits this many seconds for it.
PROBE_EVERY = 1.0
_PROBE_WAIT = 0.25

# While slightly old mappings are usable, a request waits this share of its
# time for new ones.  The rest of its time is for the query of its instance.
_SHARE_FOR_CELLS = 0.5

# The most UUIDs of missing cells that are kept.
_MOST_MISSING = 1000

_NEVER = -math.inf


class Source(Protocol):
    """The read access to the API database.

    Both methods may block for any time and raise any exception.  Worker
    threads call them.
    """

    def cells(self) -> Iterable[CellMapping]:
        """Read all cell mappings with one query."""
        ...

    def cell_of(self, instance_uuid: str) -> tuple[int, str | None] | None:
        """Read the cell of an instance with one query.

        :returns: ``id`` and UUID of the cell mapping; the UUID is None if no
            cell mapping has this id.  None if the instance has no mapping,
            or no cell yet.
        """
        ...


class CellReader:
    """Reads the cell mappings and installs them.  Thread-safe.

    :param on_refresh: called with all cells by UUID after each reading, in
        the thread that reads, by one thread at a time, and never with an
        older state after a newer one
    :ivar installed: number of the query whose result is installed; 0: none
    :ivar read_at: when that query started
    :ivar fresh_until: when the mappings become old
    :ivar lasting: entries of instances above this hold until then
    """

    def __init__(
        self,
        source: Source,
        snapshot: Snapshot,
        *,
        interval: float,
        on_refresh: Callable[[Mapping[str, Cell]], None],
    ) -> None:
        self._source = source
        self._snapshot = snapshot
        self._on_refresh = on_refresh
        self.interval = interval
        # Only the holder of this lock changes the attributes below.
        self._lock = threading.Lock()
        self.installed = 0
        self.read_at = _NEVER
        self.fresh_until = _NEVER
        self.lasting = 0

    def read(self, query: Query) -> bool:
        """Read the mappings and install them, unless newer ones are.

        :returns: whether all cells are expanded
        """
        mappings = list(self._source.cells())
        # on_refresh runs under the lock too: a slower thread must not pass
        # an older state, and must not remove what a newer state adds.
        with self._lock:
            if query.number < self.installed:
                return True
            complete = self._install(query, mappings)
            if complete:
                self._notify()
        return complete

    def complete(self, number: int) -> None:
        """Expand the remaining cells of a reading."""
        for cell_uuid in list(self._snapshot.rows):
            if number != self.installed:
                return
            self._snapshot.expand(cell_uuid)
        with self._lock:
            if number == self.installed:
                self._notify()

    def _install(self, query: Query, mappings: list[CellMapping]) -> bool:
        complete = self._snapshot.install(mappings)
        assert query.started_at is not None
        self.read_at = query.started_at
        until = query.started_at + self.interval
        # In this order: a reader without the lock must not see the old value
        # beside the new time.
        self.lasting = pack(until, INDEX_MASK)
        self.fresh_until = until
        self.installed = query.number
        return complete

    def _notify(self) -> None:
        try:
            self._on_refresh(self._snapshot.cells)
        except Exception as error:
            LOG.error("Applying new cell mappings failed: %s", describe(error))


class KnownCells:
    """Gives requests cells that are current.  Thread-safe.

    :param workers: run the rest of a long reading; lent
    :ivar outage: whether the mappings cannot be read
    """

    def __init__(
        self,
        reader: CellReader,
        snapshot: Snapshot,
        lookups: Lookups,
        workers: Workers,
    ) -> None:
        self._reader = reader
        self._snapshot = snapshot
        self._queries = lookups.queries
        self._lookups = lookups
        self._workers = workers
        self._clock = lookups.clock
        # Missing cells, and when each was looked for.
        self._missing: dict[str, float] = {}
        self.outage = Outage(
            "cell mappings", "the known cells stay in use", self._clock
        )

    def age(self) -> float:
        """Seconds since the mappings were read."""
        return self._clock() - self._reader.read_at

    def find(
        self, cell_uuid: str, deadline: Deadline, *, or_name: bool = False
    ) -> Cell | None:
        """A cell, perhaps a new one; None: it is not in the database.

        :raises LookupFailed: the database did not answer
        """
        find = self._snapshot.find
        known = find(cell_uuid, or_name=or_name)
        if known is None and not self._is_missing(cell_uuid):
            self.read_now(deadline)
            known = find(cell_uuid, or_name=or_name)
            if known is None:
                self._note_missing(cell_uuid)
        if known is None:
            return None
        return self._snapshot.cells.get(known) or self._expand(known, deadline)

    def be_current(self, deadline: Deadline) -> str | None:
        """Wait for usable mappings.

        Slightly old mappings are usable.  The request that starts the next
        reading waits for a part of its time; the others do not wait.  Much
        older mappings are used only during an outage.

        :returns: why the request has to use old mappings, if it waited for
            new ones in vain
        :raises LookupFailed: no mappings are known, and the database did not
            answer
        """
        reader = self._reader
        age = self.age()
        if age < reader.interval:
            return None
        known = reader.installed > 0
        usable = known and age < 2 * reader.interval
        wait = deadline.limit * _SHARE_FOR_CELLS if usable else math.inf
        # An outage is known for as long as a probe may take to renew it.
        lasts = max(reader.interval, PROBE_EVERY) + self._lookups.timeout
        if known and self.outage.holds(lasts):
            if not self.outage.may_probe(PROBE_EVERY):
                return None
            wait = min(wait, _PROBE_WAIT)
        query, is_new = self._queries.submit(
            CELLS, self._read, urgent=True, unless=self._is_current
        )
        if query is None:
            return None
        if usable and not is_new:
            self._queries.leave(query)
            return None
        cause = self._lookups.wait(query, deadline, self.outage, wait)
        if cause is not None and not known:
            raise self._lookups.failure(cause)
        return cause

    def read_now(self, deadline: Deadline) -> None:
        """Wait for a reading that starts after this call.

        :raises LookupFailed: the database did not answer
        """
        query, _ = self._queries.submit(
            CELLS, self._read, urgent=True, fresh=True
        )
        assert query is not None
        cause = self._lookups.wait(query, deadline, self.outage)
        if cause is not None:
            raise self._lookups.failure(cause)

    def _is_current(self, _: object) -> bool:
        return self.age() < self._reader.interval

    def _expand(self, cell_uuid: str, deadline: Deadline) -> Cell | None:
        # In a worker thread: expanding takes locks.  A signal handler that
        # interrupted this thread while it holds one would never get it.
        query, _ = self._queries.submit(
            (CELLS, cell_uuid),
            lambda _: self._snapshot.expand(cell_uuid),
            urgent=True,
        )
        assert query is not None
        if not self._queries.wait(query, deadline.left()):
            raise self._lookups.failure(
                "no thread became free to check the cell"
            )
        if query.failure is not None:
            raise self._lookups.failure(query.failure)
        cell: Cell | None = query.result
        return cell

    def _is_missing(self, cell_uuid: str) -> bool:
        """Whether a recent reading did not contain the cell."""
        looked_at = self._missing.get(cell_uuid, _NEVER)
        return self._clock() - looked_at < self._reader.interval

    def _note_missing(self, cell_uuid: str) -> None:
        if len(self._missing) >= _MOST_MISSING:
            self._missing = {}
        self._missing[cell_uuid] = self._clock()

    def _read(self, query: Query) -> None:
        """Read the mappings, in a worker thread."""
        with self.outage:
            complete = self._reader.read(query)
        if not complete:
            # Behind the result, so that no request waits for it.
            job = self._workers.submit(self._reader.complete, query.number)
            if job.error is not None:
                self._reader.complete(query.number)
