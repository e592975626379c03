# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What filters with equal settings share, and where everything finds it.

A :class:`Runtime` is made when a filter is loaded and does nothing then: no
thread, no connection, no lock, for servers fork after it.  What it does, it
does through a :class:`Process`, the state that belongs to one process and
owns all that is alive there: worker threads, directory, pool, guards.  Who
asks for it in a forked child gets a new one.

The parent's state stays in the child, untouched and for ever: were it
collected there, the sockets in it would be shut down, and they are the
parent's.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import itertools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, ClassVar

from oslo_config import cfg
from oslo_messaging.transport import RPCTransport

from cellmw import exceptions, redaction
from cellmw.cells import mapping, store
from cellmw.cells.directory import Directory
from cellmw.cells.mapping import Cell, CellMapping, Generation
from cellmw.forks import keep_for_ever
from cellmw.options import Settings
from cellmw.transports.closer import Closer
from cellmw.transports.delivery import Borrower, Courier
from cellmw.transports.guard import Guard, Guards
from cellmw.transports.handle import Handle, runtime_id_of
from cellmw.transports.oslo import OsloTransports, known_drivers
from cellmw.transports.pool import Pool
from cellmw.workers import Workers

LOG = logging.getLogger(__name__)

# How long the end of a process waits for requests that still use a
# transport.  Seconds.
EXIT_TIMEOUT = 2.0


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
        self.workers = Workers()
        self.closer = Closer(self.workers, clock=clock)
        self._transports = OsloTransports(
            runtime.conf, settings.allowed_remote_exmods
        )
        self.pool = Pool(
            self._open,
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
        self.guards = Guards(self._make_guard)
        self.courier = Courier(
            self.guards,
            self.workers,
            send_timeout=settings.send_timeout,
            clock=clock,
        )
        self._secrets = _CellSecrets()
        self._base_url = runtime.conf.transport_url
        self._known_drivers = runtime.known_drivers
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
        self._janitor = _Janitor(
            (
                self._release_abandoned,
                self.pool.sweep,
                self.closer.watch,
                self.guards.sweep,
            ),
            interval=_interval(settings),
        )
        self._abandoned: collections.deque[Handle] = collections.deque()

    def here(self) -> Process:
        """The state of the calling process: another one after a fork."""
        return self._runtime.process()

    def borrower(self, cell: Cell) -> Borrower:
        """A borrower of this cell's transports."""
        self._janitor.start()

        def current() -> Cell:
            return self._current(cell)

        return Borrower(self.pool, current)

    def refresh(self) -> None:
        """Read the cell mappings again, now.

        Blocks for ``lookup_timeout`` at most.

        :raises LookupFailed: the API database could not be asked
        """
        self.directory.refresh()

    def abandon(self, handle: Handle) -> None:
        """Release a handle in another thread.  Takes no lock."""
        self._abandoned.append(handle)
        self._janitor.wake()

    def _release_abandoned(self) -> None:
        while self._abandoned:
            self._abandoned.popleft().release()

    def _current(self, cell: Cell) -> Cell:
        """What the cell is now; it may have changed since the request's
        beginning.
        """
        try:
            now = self.directory.cell(cell.uuid)
        except exceptions.LookupFailed:
            return cell
        if now.generation is None:
            raise now.refuse(self.directory.refresh_due_in())
        return now

    def _open(self, generation: Generation, one_request: bool) -> RPCTransport:
        problem: exceptions.CellMisconfigured | None = None
        try:
            return self._transports.open(generation, one_request)
        except exceptions.CellMisconfigured as error:
            problem = error
        # Nothing changes before the mapping is read again.
        problem.retry_after = self.directory.refresh_due_in()
        raise problem.again()

    def _expand(self, row: CellMapping) -> Cell:
        cell = mapping.expand(row, self._base_url, self._known_drivers)
        self._secrets.hold(row, cell)
        return cell

    def _cells_changed(self, cells: Mapping[str, Cell]) -> None:
        self.pool.keep_only(
            {uuid: cell.generation for uuid, cell in cells.items()}
        )
        self._secrets.keep_only(cells)

    def _make_guard(self, cell_uuid: str, cell_name: str | None) -> Guard:
        settings = self.settings
        return Guard(
            cell_uuid,
            cell_name,
            max_sends=settings.max_sends_per_cell,
            breaker_failures=settings.breaker_failures,
            breaker_reset_after=settings.breaker_reset_after,
            clock=self._runtime.clock,
        )

    def close(self, timeout: float) -> int:
        """Open nothing more, close everything; see :meth:`Runtime.close`."""
        deadline = time.monotonic() + timeout
        leased = self.pool.close(timeout)
        # At least a moment: closing takes one even where time is up.
        left = max(0.5, deadline - time.monotonic())
        hanging = self.closer.wait(left)
        self.closer.watch()
        self._janitor.stop()
        self._release_abandoned()
        self.directory.close()
        self.store.close()
        self.workers.close()
        if leased or hanging:
            LOG.warning(
                "Shut down with %d transports still in use and %d whose "
                "closing has not ended",
                leased,
                hanging,
            )
        return leased


class _CellSecrets:
    """Makes the credentials of the cells known, as long as they are used."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[CellMapping, redaction.Hold]] = {}

    def hold(self, row: CellMapping, cell: Cell) -> None:
        old = self._held.get(row.uuid)
        if old is not None and old[0] == row:
            return
        urls = [row.transport_url, row.database_connection]
        if cell.generation is not None:
            # Still used while it drains, when the row is gone or another.
            drained = redaction.KNOWN.hold(cell.generation.url)
            weakref.finalize(cell.generation, drained.drop).atexit = False
        hold = redaction.KNOWN.hold(
            *urls, owner=f"cell {row.uuid} ({row.name or 'no name'})"
        )
        self._held[row.uuid] = (row, hold)
        if old is not None:
            old[1].drop()

    def keep_only(self, cells: Mapping[str, Cell]) -> None:
        for uuid in self._held.keys() - cells.keys():
            self._held.pop(uuid)[1].drop()


class _Janitor:
    """A thread that does small things now and then, once it is started."""

    def __init__(
        self, chores: tuple[Callable[[], None], ...], *, interval: float
    ) -> None:
        self._chores = chores
        self._interval = interval
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        # Released to wake it.  Not an event, which has a lock of its own:
        # wake() is called by finalizers.
        self._asleep = threading.Lock()
        self._asleep.acquire()

    def start(self) -> None:
        if self._thread is not None:
            return
        with self._lock:
            if self._thread is None and not self._stopping:
                thread = threading.Thread(
                    target=self._run, name="cellmw-janitor", daemon=True
                )
                try:
                    thread.start()
                except RuntimeError:
                    return  # no thread can be had; the next message tries
                self._thread = thread

    def _run(self) -> None:
        while not self._stopping:
            self._asleep.acquire(timeout=self._interval)
            for chore in self._chores:
                try:
                    chore()
                except Exception as error:
                    LOG.error(
                        "Tidying up failed: %s", redaction.describe(error)
                    )

    def wake(self) -> None:
        # It is awake already where that raises.
        with contextlib.suppress(RuntimeError):
            self._asleep.release()

    def stop(self) -> None:
        with self._lock:
            self._stopping = True
            thread = self._thread
        self.wake()
        if thread is not None and thread is not threading.current_thread():
            thread.join(5.0)


def _interval(settings: Settings) -> float:
    """Seconds between two rounds: none of the timeouts is missed by more."""
    spans = [1.0, settings.transport_idle_timeout / 2]
    if settings.transport_max_lifetime:
        spans.append(settings.transport_max_lifetime / 2)
    return max(0.05, min(spans))


class Runtime:
    """What filters with equal settings share.  Thread-safe, fork-safe.

    :param settings: the filters' options
    :param conf: the configuration that transports and the engine of the API
        database are made with
    :param connection: the API database, where the paste section gives it
    """

    _ids = itertools.count(1)
    _all: ClassVar[weakref.WeakSet[Runtime]] = weakref.WeakSet()

    def __init__(
        self,
        settings: Settings,
        conf: cfg.ConfigOpts,
        connection: redaction.Secret | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.id = next(self._ids)
        self.settings = settings
        self.conf = conf
        self.clock = clock
        self.known_drivers = known_drivers()
        self._connection = connection
        self.current: Process | None = None
        self._all.add(self)
        # By process id; see process().
        self._processes: dict[int, Process] = {}
        self._hold = redaction.KNOWN.hold(
            redaction.Secret(conf.transport_url),
            connection or _secret(conf.api_database.connection),
            owner="the service's own configuration",
        )

    def make_engine(self) -> Any:
        """The engine of the API database.  Blocks; see oslo.db."""
        connection = self._connection
        return store.make_engine(
            self.conf,
            connection.reveal() if connection else None,
            timeout=self.settings.lookup_timeout,
        )

    def process(self) -> Process:
        """The state of the calling process, made on first use."""
        process = self.current
        if process is not None and process.pid == os.getpid():
            return process
        return self._enter_process()

    def _enter_process(self) -> Process:
        # No lock: one that a thread of the parent held while it forked would
        # never be free here.  Of several threads one wins; what the others
        # made has opened nothing.
        pid = os.getpid()
        inherited = self.current
        process = self._processes.get(pid)
        if process is None:
            process = self._processes.setdefault(pid, Process(self))
        self.current = process
        if inherited is not None and inherited is not process:
            keep_for_ever(inherited)
        return process

    @classmethod
    def leave_to_parent(cls) -> None:
        """Forget what there was before the fork.  Called in the child.

        A help only, for some servers do not call it, and then
        :meth:`process` does without.  It knows what a process id, which can
        be another process's the second time, does not tell; and it keeps
        what a child that never asks for anything would collect at its end.
        """
        for runtime in list(cls._all):
            inherited, runtime.current = runtime.current, None
            runtime._processes = {}
            keep_for_ever(inherited)

    def close(self, timeout: float = EXIT_TIMEOUT) -> int:
        """Shut down: lease nothing more, and close all transports.

        Waits for requests that use one, ``timeout`` seconds at most; then
        theirs is closed when they release it.  Filters that use this runtime
        refuse to send from then on.  May be called twice.

        :returns: how many transports were still in use
        """
        registry().discard(self)
        process = self.process()
        return process.close(timeout)


def _secret(value: str | None) -> redaction.Secret | None:
    return redaction.Secret(value) if value else None


class Registry:
    """The runtimes of this process.  Iterating gives them in their order.

    The health check, the metrics page and ``target_cell`` read it.
    """

    def __init__(self) -> None:
        self._runtimes: dict[Hashable, Runtime] = {}
        # By the id of a context: which runtime it came through.  Kept only
        # where there is a choice, see remember().
        self._came_through: dict[int, tuple[Any, Runtime]] = {}
        self.several = False

    def __iter__(self) -> Iterator[Runtime]:
        return iter(list(self._runtimes.values()))

    def __len__(self) -> int:
        return len(self._runtimes)

    def get(self, key: Hashable, make: Callable[[], Runtime]) -> Runtime:
        """The runtime of these settings, made where there is none."""
        found = self._runtimes.get(key)
        if found is None:
            found = self._runtimes.setdefault(key, make())
        self.several = len(self._runtimes) > 1
        return found

    def discard(self, runtime: Runtime) -> None:
        """Take a runtime out, for it is closed."""
        for key, found in list(self._runtimes.items()):
            if found is runtime:
                self._runtimes.pop(key, None)
        self.several = len(self._runtimes) > 1

    def remember(self, context: Any, runtime: Runtime) -> None:
        """Note which runtime a context came through.

        Needed where a process has several, and nothing on the context tells:
        a request that names no instance.
        """
        key = id(context)
        try:
            reference = weakref.ref(
                context, lambda _: self._came_through.pop(key, None)
            )
        except TypeError:
            return  # a class that takes no weak references
        self._came_through[key] = (reference, runtime)

    def of(self, context: Any) -> Runtime:
        """The runtime that a context came through.

        :raises LookupError: it came through none, and there is not just one
        """
        runtimes = list(self)
        if len(runtimes) == 1:
            return runtimes[0]
        if not runtimes:
            raise LookupError("no cellmw filter is loaded in this process")
        wanted = runtime_id_of(getattr(context, "mq_connection", None))
        for runtime in runtimes:
            if runtime.id == wanted:
                return runtime
        noted = self._came_through.get(id(context))
        if noted is not None and noted[0]() is context:
            return noted[1]
        raise LookupError(
            "several cellmw filters with different settings are loaded in "
            "this process, and this context came through none of them"
        )

    def close(self, timeout: float = EXIT_TIMEOUT) -> None:
        """Shut all of them down, within ``timeout`` seconds in all or so."""
        deadline = time.monotonic() + timeout
        for runtime in self:
            current = runtime.current
            if current is not None and current.pid != os.getpid():
                keep_for_ever(current)  # never used in this process
            elif current is not None:
                runtime.close(max(0.0, deadline - time.monotonic()))


_registry = Registry()


def registry() -> Registry:
    """The one registry of this process."""
    return _registry


atexit.register(_registry.close)
os.register_at_fork(after_in_child=Runtime.leave_to_parent)
