# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""All of a runtime that is alive in one process, and how it fits together.

A :class:`Process` owns its worker threads, directory, pool and guards, and
ends them.  It never crosses a fork: a child makes its own.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from oslo_config import cfg

from cellmw import exceptions, redaction
from cellmw.cells import mapping, store
from cellmw.cells.databases import Databases
from cellmw.cells.directory import Directory
from cellmw.cells.mapping import Cell, CellMapping
from cellmw.janitor import Janitor
from cellmw.observe import Observer
from cellmw.options import Settings
from cellmw.refusals import Refusals
from cellmw.transports.closer import Closer
from cellmw.transports.guard import Guard, Guards, StuckThreads
from cellmw.transports.handle import RequestLease
from cellmw.transports.oslo import OsloTransports, base_url
from cellmw.transports.pool import Pool
from cellmw.transports.sending import Delivering
from cellmw.workers import Workers

LOG = logging.getLogger(__name__)


class Runtime(Protocol):
    """What a process needs of the runtime that it belongs to."""

    id: int
    settings: Settings
    conf: cfg.ConfigOpts
    clock: Callable[[], float]
    known_drivers: frozenset[str]

    def make_engine(self) -> Any:
        """The engine of the API database."""

    def make_database(self, url: redaction.Secret) -> Any:
        """Make the context manager of a cell's database."""

    def base_database(self) -> redaction.Secret | None:
        """What templates of ``database_connection`` are filled in over."""

    def process(self) -> Process:
        """The state of the calling process."""

    def tell_watchers(self) -> None:
        """Let those know that time has passed who watch this process."""


class Process:
    """The state of one runtime in one process.

    :ivar lock: for what requests change in a few instructions
    """

    def __init__(self, runtime: Runtime) -> None:
        settings = runtime.settings
        clock = runtime.clock
        self.runtime_id = runtime.id
        self.pid = os.getpid()
        self.lock = threading.Lock()
        self.conf = runtime.conf
        self.settings = settings
        self._runtime = runtime
        self.refusals = Refusals(clock)
        self.workers = Workers()
        self.closer = Closer(self.workers, clock=clock)
        transports = OsloTransports(
            runtime.conf, settings.allowed_remote_exmods, self.workers
        )
        self.pool = Pool(
            transports.open,
            self.closer,
            max_size=(
                settings.transport_cache_size
                if settings.transport_cache
                else 0
            ),
            refuse_over_limit=settings.transport_overflow == "refuse",
            idle_timeout=settings.transport_idle_timeout,
            max_lifetime=settings.transport_max_lifetime,
            clock=clock,
        )
        self._stuck_threads = StuckThreads(settings.max_stuck_sends)
        self.guards = Guards(self._make_guard)
        self._secrets = _CellSecrets()
        base = base_url(runtime.conf)
        self._base_url = redaction.Secret(base) if base else None
        self._base_database = runtime.base_database()
        # The configuration may have been read again since the filter was
        # loaded.
        base_known = redaction.KNOWN.hold(self._base_url, self._base_database)
        weakref.finalize(self, base_known.drop).atexit = False
        self._known_drivers = runtime.known_drivers
        self.databases = Databases(runtime.make_database, self.workers)
        self.store = store.Store(runtime.make_engine)
        self.directory = Directory(
            self.store,
            expand=self._expand,
            workers=self.workers,
            lookup_timeout=settings.lookup_timeout,
            lookup_concurrency=settings.lookup_concurrency,
            cell_refresh_interval=settings.cell_refresh_interval,
            instance_cache_ttl=settings.instance_cache_ttl,
            instance_cache_for=settings.instance_cache_for,
            instance_cache_size=settings.instance_cache_size,
            on_refresh=self._cells_changed,
            clock=clock,
        )
        # Does nothing before the first request of mode = observe.
        self.observer = Observer(self.directory.find)
        self.delivering = Delivering(
            guards=self.guards,
            workers=self.workers,
            send_timeout=settings.send_timeout,
            refresh=self.directory.refresh,
            refresh_due_in=self.directory.refresh_due_in,
        )
        self._janitor = Janitor(
            (
                self._end_abandoned,
                self.pool.sweep,
                self.closer.watch,
                self._close_here,
                self.guards.sweep,
                _keep_scrubbing,
                runtime.tell_watchers,
            ),
            interval=_interval(settings),
        )
        self._abandoned: collections.deque[RequestLease] = collections.deque()
        self._ending = False

    def start(self) -> None:
        """Start tidying up; the first message does so too."""
        self._janitor.start()

    def here(self) -> Process:
        """The state of the calling process: another one after a fork."""
        return self._runtime.process()

    def cell(self, cell_uuid: str) -> Cell:
        """What is known of a cell.  May block for ``lookup_timeout``.

        :raises CellNotFound: there is no such mapping
        :raises LookupFailed: the API database could not be asked
        """
        return self.directory.cell(cell_uuid)

    def borrower(self, cell: Cell) -> RequestLease:
        """A borrower of this cell's transports."""
        self._janitor.start()

        def current() -> Cell:
            return self._current(cell)

        def known() -> Cell | None:
            return self.directory.cell_now(cell.uuid)

        return RequestLease(self.pool, current, known)

    def abandon(self, borrower: RequestLease) -> None:
        """End a request's hold in another thread.  Takes no lock.

        After the shutdown in this one, for then hardly anybody has a lock.
        """
        self._abandoned.append(borrower)
        self._janitor.wake()
        if self._janitor.stopped:
            self._end_abandoned()

    def _end_abandoned(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._abandoned.popleft().end()

    def _close_here(self) -> None:
        """Close at the end what there is no other thread for any more."""
        if self._ending:
            self.closer.close_here()

    def _current(self, cell: Cell) -> Cell:
        """What the cell is now; it may have changed since the request's
        beginning.

        The request may have waited for the database as long as it can then,
        so that this is short: what it began with will do.
        """
        limit = min(1.0, self.settings.lookup_timeout / 4)
        try:
            now = self.directory.cell(cell.uuid, timeout=limit)
        except exceptions.LookupFailed:
            return cell
        if now.generation is None:
            raise now.refuse(self.directory.refresh_due_in())
        return now

    def _expand(self, row: CellMapping) -> Cell:
        base, database = (
            secret.reveal() if secret else None
            for secret in (self._base_url, self._base_database)
        )
        cell = mapping.expand(row, base, self._known_drivers, database)
        self._secrets.hold(row, cell)
        return cell

    def _cells_changed(self, cells: Mapping[str, Cell]) -> None:
        self.pool.keep_only(
            {uuid: cell.generation for uuid, cell in cells.items()}
        )
        self.databases.keep_only(cells)
        self.guards.keep_only(cells)
        self._secrets.keep_only(cells)

    def _make_guard(self, cell_uuid: str, cell_name: str | None) -> Guard:
        settings = self.settings
        return Guard(
            cell_uuid,
            cell_name,
            max_sends=settings.max_sends_per_cell,
            breaker_failures=settings.breaker_failures,
            breaker_reset_after=settings.breaker_reset_after,
            stuck_threads=self._stuck_threads,
            clock=self._runtime.clock,
        )

    def close(self, timeout: float) -> int:
        """Open nothing more, close everything; see :meth:`Runtime.close`."""
        deadline = time.monotonic() + timeout
        leased = self.pool.close(timeout)
        # At least a moment: closing takes one even where time is up.
        left = max(0.5, deadline - time.monotonic())
        self._ending = True
        self._janitor.wake()
        hanging = self.closer.wait(left)
        self.closer.watch()
        self._janitor.stop()
        self._end_abandoned()
        self.observer.close()
        self.directory.close()
        self.databases.close(max(0.5, deadline - time.monotonic()))
        self.store.close()
        self.workers.close()
        if leased or hanging:
            LOG.warning(
                "Shut down with %d transports still in use and %d still "
                "closing",
                leased,
                hanging,
            )
        return leased


class _CellSecrets:
    """Makes the credentials of the cells known, as long as they are used."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[CellMapping, redaction.Hold]] = {}
        weakref.finalize(self, _drop_all, self._held).atexit = False

    def hold(self, row: CellMapping, cell: Cell) -> None:
        old = self._held.get(row.uuid)
        if old is not None and old[0] == row:
            return
        urls = [row.transport_url, row.database_connection]
        if isinstance(cell.database, redaction.Secret):
            urls.append(cell.database)
        if cell.generation is not None:
            # Still used while it drains, when the row is gone or another.
            drained = redaction.KNOWN.hold(cell.generation.url)
            weakref.finalize(cell.generation, drained.drop).atexit = False
        owner = f"cell {row.uuid} ({row.name or 'no name'})"
        hold = redaction.KNOWN.hold(
            *urls,
            names=(
                f"transport_url of {owner}",
                f"database_connection of {owner}",
            ),
        )
        self._held[row.uuid] = (row, hold)
        if old is not None:
            old[1].drop()

    def keep_only(self, cells: Mapping[str, Cell]) -> None:
        for uuid in self._held.keys() - cells.keys():
            self._held.pop(uuid)[1].drop()


def _drop_all(held: dict[str, tuple[CellMapping, redaction.Hold]]) -> None:
    while held:
        held.popitem()[1][1].drop()


def _keep_scrubbing() -> None:
    # Another library may have put a log record factory in place of ours.
    redaction.KNOWN.on_hold()


def _interval(settings: Settings) -> float:
    """Seconds between two rounds: none of the timeouts is missed by more."""
    spans = [1.0, settings.transport_idle_timeout / 2]
    if settings.transport_max_lifetime:
        spans.append(settings.transport_max_lifetime / 2)
    return max(0.05, min(spans))
