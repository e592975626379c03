# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What filters with equal settings share, and where everything finds it.

A :class:`Runtime` is made when a filter is loaded and does nothing then: no
thread, no connection, no lock, for servers fork after it.  What it does, it
does through a :class:`~cellmw.process.Process`, the state that belongs to one
process.  Who asks for it in a forked child gets a new one.

The parent's state stays in the child, untouched and for ever: were it
collected there, the sockets in it would be shut down, and they are the
parent's.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import time
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any, ClassVar

from oslo_config import cfg

from cellmw import nova, redaction
from cellmw.cells import databases, engines
from cellmw.forks import keep_for_ever
from cellmw.options import Settings
from cellmw.process import Process
from cellmw.transports.handle import runtime_id_of
from cellmw.transports.oslo import known_drivers

LOG = logging.getLogger(__name__)

# How long the end of a process waits for requests that still use a
# transport, and for transports to be closed.  Seconds.  oslo.messaging's
# takes more than three after a call.
EXIT_TIMEOUT = 5.0


class Runtime:
    """What filters with equal settings share.  Thread-safe, fork-safe.

    :param settings: the filters' options
    :param conf: the configuration that transports and the engine of the API
        database are made with
    :param connection: the API database; None: what the configuration says
        when it is first used
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
            names=(
                "transport_url in [DEFAULT]",
                "api_database_connection in the paste section"
                if connection
                else "connection in [api_database]",
            ),
        )
        weakref.finalize(self, self._hold.drop).atexit = False

    def make_engine(self) -> Any:
        """The engine of the API database.  Blocks; see oslo.db."""
        return engines.make_engine(
            self.conf,
            self._connection,
            timeout=self.settings.lookup_timeout,
            for_reading=True,
            at_once=self.settings.lookup_concurrency,
        )

    def make_database(self, url: redaction.Secret) -> Any:
        """Make the context manager of a cell's database; see databases."""
        if self.settings.nova_cell_cache:
            return nova.make_database(url)
        return databases.make(self.conf, url)

    def base_database(self) -> redaction.Secret | None:
        """What templates of ``database_connection`` are filled in over."""
        settings = self.settings
        if not (settings.db_connection or settings.nova_cell_cache):
            return None
        return _secret(
            engines.option(self.conf, "connection", databases.GROUP)
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
        if _registry.watchers:
            process.start()
        return process

    def tell_watchers(self) -> None:
        """Let those know that time has passed who watch this process."""
        for watcher in list(_registry.watchers):
            watcher()

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
            if inherited is not None:
                inherited.databases.leave_to_parent()
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
        self._asked: dict[Hashable, object] = {}
        # Called about once a second in each process in which a filter is
        # used, in a thread of ours.
        self.watchers: list[Callable[[], None]] = []

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

    def first(self, question: Hashable) -> bool:
        """Whether nobody has asked this in the process; one thread is it.

        For what is logged once.  Where the last filter is gone, all begins
        anew.
        """
        mine = object()
        return self._asked.setdefault(question, mine) is mine

    def discard(self, runtime: Runtime) -> None:
        """Take a runtime out, for it is closed."""
        for key, found in list(self._runtimes.items()):
            if found is runtime:
                self._runtimes.pop(key, None)
        if not self._runtimes:
            self._asked.clear()
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
