# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The transports of this process: shared, leased, replaced, closed.

One entry a generation.  An entry is either cached, where later messages find
it, or outside: opened for one request alone, or draining, which means that
nobody new gets it and the last release closes it.  The pool owns every
transport from the moment that it is opened until it is handed to the
:class:`~cellmw.transports.closer.Closer`; who holds a :class:`Lease` may use
the transport until it releases the lease.

The pool belongs to one process.  After a fork the child makes its own and
never touches this one.

Everything that several threads see is guarded by one lock, under which
nothing is opened, closed, logged or waited for.  On the way of a message
nothing is even called under it: a call lets the interpreter switch threads,
and 32 threads that do so in turn cost twenty times what one does.
"""

from __future__ import annotations

import dataclasses
import os
import random
import threading
import time
from collections.abc import Callable, Mapping

from oslo_messaging.transport import RPCTransport

from cellmw import exceptions, redaction
from cellmw.cells.mapping import Generation
from cellmw.transports.closer import Closer

# Lifetimes are shortened by up to this part, by chance, so that transports
# opened together are not replaced together.
_JITTER = 0.1


class _Entry:
    """One transport, or the place of one that is being opened."""

    __slots__ = (
        "acquired",
        "cached",
        "error",
        "expires_at",
        "generation",
        "given_up",
        "last_used",
        "leases",
        "opened",
        "transport",
    )

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.transport: RPCTransport | None = None
        self.error: BaseException | None = None
        self.leases = 1
        self.acquired = 1
        self.cached = True
        self.given_up = False
        self.last_used = 0.0
        self.expires_at: float | None = None
        # Locked until the opener is done, one way or the other.
        self.opened = threading.Lock()
        self.opened.acquire()


class Lease:
    """One borrower's hold on a transport.

    Made by :meth:`Pool.acquire`.  Who acquired it releases it, whatever
    happens in between.  As long as it is held, its transport is not closed.
    """

    __slots__ = ("_entry", "_pool", "generation", "transport")

    def __init__(self, pool: Pool, entry: _Entry) -> None:
        self._pool = pool
        self._entry: _Entry | None = entry
        self.generation = entry.generation
        self.transport = entry.transport

    def share(self) -> Lease:
        """Another hold on the same transport, released on its own.

        Only for somebody who knows that this one is not being released at
        the same time.
        """
        pool, entry = self._pool, self._entry
        assert entry is not None
        with pool._lock:
            entry.leases += 1
        return Lease(pool, entry)

    def release(self) -> None:
        """Give it back.  Does not block; a second time does nothing."""
        pool = self._pool
        if pool._pid != os.getpid():
            return  # it is the parent's, and so is the lock
        now = pool._clock()
        with pool._lock:
            entry = self._entry
            if entry is None:
                return
            self._entry = None
            self.transport = None
            entry.leases -= 1
            entry.last_used = now
            if entry.cached:
                return
            finished = pool._finish(entry)
        if finished:
            pool._dispose(entry)

    def give_up(self) -> None:
        """Let nobody new have this transport: its connections are dead.

        Who has a lease on it finds that in :attr:`given_up`.  The lease
        itself is still to be released.
        """
        entry = self._entry
        if entry is not None and self._pool._pid == os.getpid():
            entry.given_up = True
            self.retire()

    def retire(self) -> None:
        """Let nobody new have this transport.

        Who has a lease on it keeps it.
        """
        pool, entry = self._pool, self._entry
        if entry is not None and pool._pid == os.getpid():
            pool._retire([entry])

    @property
    def given_up(self) -> bool:
        """Whether somebody has found its connections dead."""
        entry = self._entry
        return entry is not None and entry.given_up


@dataclasses.dataclass(frozen=True, slots=True)
class CellTransports:
    """Numbers on the transports of one cell, or of all.

    :ivar open: opened and not yet handed over for closing
    :ivar leased: those of them that are in use
    :ivar draining: those of them that nobody new gets
    :ivar acquired: how many leases requests have ever had
    :ivar opened: how many were ever opened
    :ivar closed: how many were ever closed
    :ivar failed: how many could not be opened
    :ivar evicted: how many made room for another cell's
    :ivar refused: how many messages found no room
    :ivar over_limit: how many were opened beyond the limit, for one request
    :ivar hung: how many closes ever exceeded their budget, whether or not
        they ended
    """

    open: int = 0
    leased: int = 0
    draining: int = 0
    acquired: int = 0
    opened: int = 0
    closed: int = 0
    failed: int = 0
    evicted: int = 0
    refused: int = 0
    over_limit: int = 0
    hung: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class PoolStats:
    """What :meth:`Pool.stats` gives.

    :ivar total: all cells together
    :ivar leases: holds on transports, by requests and by messages
    :ivar hanging: how many closes exceed their budget just now
    :ivar cells: by cell UUID; a cell that was not used for long may be
        missing here, its numbers are in the total all the same
    """

    total: CellTransports
    leases: int
    hanging: int
    cells: Mapping[str, CellTransports]


# Of an open entry: cell, whether leased, whether draining, leases, and leases
# that it ever had.
_Row = tuple[str, int, int, int, int]

_COUNTED = (
    "acquired",
    "opened",
    "closed",
    "failed",
    "evicted",
    "refused",
    "over_limit",
    "hung",
)


class Pool:
    """Opens, shares and replaces transports.  Thread-safe.

    :param open_transport: opens the transport of a generation; may block,
        and is called in the thread that acquires
    :param closer: where transports end
    :param max_size: most transports cached; 0 caches none, so that each
        lease that is acquired has a transport of its own
    :param refuse_over_limit: with all of those in use, refuse (CellBusy)
        instead of opening one for the one request
    :param idle_timeout: seconds unused before one is closed
    :param max_lifetime: seconds before one is replaced; 0: never
    """

    def __init__(
        self,
        open_transport: Callable[[Generation, bool], RPCTransport],
        closer: Closer,
        *,
        max_size: int,
        refuse_over_limit: bool = False,
        idle_timeout: float = 600.0,
        max_lifetime: float = 3600.0,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._open_transport = open_transport
        self._closer = closer
        self._max_size = max_size
        self._refuse_over_limit = refuse_over_limit
        self._idle_timeout = idle_timeout
        self._max_lifetime = max_lifetime
        self._clock = clock
        self._chance = chance
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._entries: dict[Generation, _Entry] = {}
        self._outside: set[_Entry] = set()
        self._current: Mapping[str, Generation | None] | None = None
        # Neither there any more nor with the closer yet.
        self._handing_over = 0
        self._closed = False
        self._all_gone = threading.Event()
        self._totals = dict.fromkeys(_COUNTED, 0)
        self._counts: dict[str, dict[str, int]] = {}
        self._max_counts = max(256, 2 * max_size)

    def acquire(self, generation: Generation, *, timeout: float) -> Lease:
        """Take a lease on the transport of this generation.

        Opens it where there is none, in this thread; where another thread
        is opening it, waits for that.

        :param timeout: the longest to wait for another thread's opening, in
            seconds
        :raises SendError: it cannot be opened (CellMisconfigured), or was
            not opened in time (CellUnavailable), or there is no room
            (CellBusy), or the pool is closed (ShuttingDown)
        """
        lease = self.acquire_now(generation)
        if lease is not None:
            return lease
        entry, mine = self._book(generation)
        if mine:
            self._open(entry)
        elif entry.transport is None:
            self._await(entry, timeout)
        return Lease(self, entry)

    def acquire_now(self, generation: Generation) -> Lease | None:
        """Take a lease on a transport that is open.  Does not block.

        :returns: None: it is not, or not yet
        """
        entries = self._entries
        with self._lock:
            entry = entries[generation] if generation in entries else None  # noqa: SIM401  # get() costs a call
            if entry is None or entry.transport is None:
                return None
            entry.leases += 1
            entry.acquired += 1
        return Lease(self, entry)

    def _book(self, generation: Generation) -> tuple[_Entry, bool]:
        """A place for a transport, and whether the caller has to open it."""
        new = _Entry(generation)
        refusal: exceptions.SendError | None = None
        finished: _Entry | None = None
        with self._lock:
            entry = self._entries.get(generation)
            if entry is not None:
                # Another thread booked between the two looks.
                entry.leases += 1
                entry.acquired += 1
                return entry, False
            if self._closed:
                refusal = exceptions.ShuttingDown(
                    cell_uuid=generation.cell_uuid
                )
            elif self._max_size == 0 or self._outdated(generation):
                new.cached = False
            elif len(self._entries) >= self._max_size:
                finished, refusal = self._make_room(new)
            if refusal is None:
                # Booked before it is opened: the bound holds meanwhile.
                if new.cached:
                    self._entries[generation] = new
                else:
                    self._outside.add(new)
        if finished is not None:
            self._dispose(finished)
        if refusal is not None:
            raise refusal
        return new, True

    def _make_room(
        self, new: _Entry
    ) -> tuple[_Entry | None, exceptions.SendError | None]:
        """What is to be closed for a new entry, or why there is no room."""
        cell_uuid = new.generation.cell_uuid
        evicted = self._least_recently_used()
        if evicted is not None:
            self._count(evicted.generation.cell_uuid, "evicted")
            return (evicted if self._uncache(evicted) else None), None
        if self._refuse_over_limit:
            self._count(cell_uuid, "refused")
            return None, exceptions.CellBusy(
                "all cached transports are in use", cell_uuid=cell_uuid
            )
        new.cached = False
        self._count(cell_uuid, "over_limit")
        return None, None

    def _outdated(self, generation: Generation) -> bool:
        """Whether the cell is known to have another generation by now."""
        if self._current is None:
            return False
        return self._current.get(generation.cell_uuid) is not generation

    def _least_recently_used(self) -> _Entry | None:
        unused = [
            entry for entry in self._entries.values() if not entry.leases
        ]
        return min(unused, key=lambda entry: entry.last_used, default=None)

    def _open(self, entry: _Entry) -> None:
        problem: exceptions.SendError | None = None
        try:
            transport = self._open_transport(
                entry.generation, not entry.cached
            )
        except exceptions.SendError as error:
            problem = error
        except Exception as error:
            problem = exceptions.CellUnavailable(
                redaction.describe(error),
                cell_uuid=entry.generation.cell_uuid,
            )
        except BaseException as error:
            self._forget(entry, error)
            raise
        if problem is not None:
            self._forget(entry, problem)
            raise problem.again()
        now = self._clock()
        if self._max_lifetime:
            part = 1 - _JITTER * self._chance()
            entry.expires_at = now + self._max_lifetime * part
        with self._lock:
            entry.last_used = now
            entry.transport = transport
            self._count(entry.generation.cell_uuid, "opened")
        entry.opened.release()

    def _forget(self, entry: _Entry, error: BaseException) -> None:
        """Give back the place of a transport that could not be opened."""
        with self._lock:
            entry.error = error
            if self._entries.get(entry.generation) is entry:
                del self._entries[entry.generation]
            self._outside.discard(entry)
            self._count(entry.generation.cell_uuid, "failed")
            self._note_if_gone()
        entry.opened.release()

    def _await(self, entry: _Entry, timeout: float) -> None:
        """Wait for the thread that opens, as long as the caller may."""
        ended = False
        try:
            ended = entry.opened.acquire(timeout=max(0.0, timeout))
        finally:
            # Also where something ends the waiting thread.
            if not ended:
                Lease(self, entry).release()
        if not ended:
            raise exceptions.CellUnavailable(
                "opening its transport takes too long",
                cell_uuid=entry.generation.cell_uuid,
            )
        entry.opened.release()
        if entry.transport is not None:
            return
        error = entry.error
        if isinstance(error, exceptions.SendError):
            raise error.again()
        raise exceptions.CellUnavailable(
            "opening its transport was broken off",
            cell_uuid=entry.generation.cell_uuid,
        )

    def keep_only(self, current: Mapping[str, Generation | None]) -> None:
        """Retire what is no cell's current generation.

        Called with each new state of the cell mappings.  From then on a
        generation that is not in it is opened for one request at most.

        :param current: by cell UUID; the pool keeps it
        """
        with self._lock:
            # Together: who books at this moment is either told that its
            # generation is outdated, or found here.  The old state goes
            # after the lock: the last of a generation may go with it.
            before, self._current = self._current, current
            outdated = [
                entry
                for entry in self._entries.values()
                if self._outdated(entry.generation)
            ]
        self._retire(outdated)
        del before

    def _retire(self, entries: list[_Entry]) -> None:
        """Let nobody new have these; close them when they are released."""
        finished = []
        with self._lock:
            for entry in entries:
                cached = self._entries.get(entry.generation) is entry
                if cached and self._uncache(entry):
                    finished.append(entry)
        for entry in finished:
            self._dispose(entry)

    def _uncache(self, entry: _Entry) -> bool:
        """Take a cached entry out; whether it is to be closed at once."""
        del self._entries[entry.generation]
        entry.cached = False
        self._outside.add(entry)
        return self._finish(entry)

    def _finish(self, entry: _Entry) -> bool:
        """Whether the caller has to close it.

        Of one that is not cached the last release finds that, and so it is
        found once; while it is being opened, the opener has a lease.
        """
        if entry.leases:
            return False
        self._outside.discard(entry)
        self._count(entry.generation.cell_uuid, "acquired", entry.acquired)
        self._handing_over += 1
        return True

    def _dispose(self, entry: _Entry) -> None:
        """Hand an entry that :meth:`_finish` chose over for closing."""
        transport, entry.transport = entry.transport, None
        assert transport is not None
        # Alive until it is closed, and with it its credentials known: closing
        # tells the log, too.
        generation = entry.generation

        def done() -> None:
            with self._lock:
                self._count(generation.cell_uuid, "closed")

        def hung() -> None:
            with self._lock:
                self._count(generation.cell_uuid, "hung")

        self._closer.close(
            transport, generation.cell_uuid, done=done, hung=hung
        )
        with self._lock:
            self._handing_over -= 1
            self._note_if_gone()

    def sweep(self) -> None:
        """Close what is idle, replace what is old.  Called now and then."""
        now = self._clock()
        with self._lock:
            overdue = [
                entry
                for entry in self._entries.values()
                if self._overdue(entry, now)
            ]
            finished = [entry for entry in overdue if self._uncache(entry)]
        for entry in finished:
            self._dispose(entry)

    def _overdue(self, entry: _Entry, now: float) -> bool:
        if entry.transport is None:
            return False
        # A clock that went back must not keep anything for ever.
        entry.last_used = min(entry.last_used, now)
        if entry.expires_at is not None:
            entry.expires_at = min(entry.expires_at, now + self._max_lifetime)
            if now >= entry.expires_at:
                return True
        return not entry.leases and now - entry.last_used >= self._idle_timeout

    def close(self, timeout: float) -> int:
        """Open nothing more, and close everything that is given back.

        Waits until all leases are released, ``timeout`` seconds at most.  A
        transport that is leased then is closed at its release.  May be
        called twice.

        :returns: how many transports are still leased
        """
        with self._lock:
            self._closed = True
            entries = list(self._entries.values())
            self._note_if_gone()
        self._retire(entries)
        self._all_gone.wait(max(0.0, timeout))
        with self._lock:
            return len(self._entries) + len(self._outside)

    def _note_if_gone(self) -> None:
        if not self._closed or self._handing_over:
            return
        if not self._entries and not self._outside:
            self._all_gone.set()

    def _count(self, cell_uuid: str, what: str, number: int = 1) -> None:
        self._totals[what] += number
        counts = self._counts.get(cell_uuid)
        if counts is None:
            if len(self._counts) >= self._max_counts:
                self._drop_counts()
            counts = self._counts[cell_uuid] = dict.fromkeys(_COUNTED, 0)
        counts[what] += number

    def _drop_counts(self) -> None:
        """Forget the numbers of cells that have no transport open."""
        used = {entry.generation.cell_uuid for entry in self._everything()}
        self._counts = {
            cell_uuid: counts
            for cell_uuid, counts in self._counts.items()
            if cell_uuid in used
        }

    def _everything(self) -> list[_Entry]:
        return [*self._entries.values(), *self._outside]

    def stats(self) -> PoolStats:
        """Numbers of this moment.  Takes the lock shortly."""
        with self._lock:
            entries = [
                (
                    entry.generation.cell_uuid,
                    int(entry.leases > 0),
                    int(not entry.cached),
                    entry.leases,
                    entry.acquired,
                )
                for entry in self._everything()
                if entry.transport is not None
            ]
            counts = {uuid: dict(c) for uuid, c in self._counts.items()}
            totals = dict(self._totals)
        rows: dict[str, list[_Row]] = {cell_uuid: [] for cell_uuid in counts}
        for row in entries:
            rows.setdefault(row[0], []).append(row)
        cells = {
            cell_uuid: _numbers(of_cell, counts.get(cell_uuid, {}))
            for cell_uuid, of_cell in rows.items()
        }
        return PoolStats(
            total=_numbers(entries, totals),
            leases=sum(row[3] for row in entries),
            hanging=self._closer.hanging,
            cells=cells,
        )


def _numbers(rows: list[_Row], counts: dict[str, int]) -> CellTransports:
    closed = dict(counts)
    acquired = closed.pop("acquired", 0)
    return CellTransports(
        open=len(rows),
        leased=sum(row[1] for row in rows),
        draining=sum(row[2] for row in rows),
        acquired=acquired + sum(row[4] for row in rows),
        **closed,
    )
