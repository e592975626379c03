# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Transports that record what becomes of them, and a pool that opens such.

:class:`Rig` is a pool with all that it needs.  At its end it sees to it that
each transport was closed exactly once, that none was closed in use, and that
no password was logged.  :class:`Stack` is a rig with the rest of a process:
directory, guards, delivery.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import pickle
import signal
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Self, TypeVar

import oslo_messaging
from oslo_config import cfg
from oslo_messaging.transport import RPCTransport

from cellmw import redaction
from cellmw.cells.mapping import Cell, Generation
from cellmw.redaction import Secret
from cellmw.refusals import Refusals
from cellmw.transports import driver
from cellmw.transports.closer import Closer
from cellmw.transports.driver import Message, Reporting, under_way
from cellmw.transports.guard import Guard, Guards, StuckThreads
from cellmw.transports.handle import Handle, RequestLease
from cellmw.transports.pool import Lease, Pool, PoolStats
from cellmw.transports.sending import Delivering
from cellmw.workers import Workers
from tests.directories import Clock

_Result = TypeVar("_Result")

# Stands in every URL here, and must stand in no log and no error.
PASSWORD = "pass-not-for-logs"
# How long a test waits for what has to come, in seconds.
PATIENCE = 30.0


def cell_uuid(number: int) -> str:
    return f"c0000000-0000-4000-8000-{number:012}"


def generation(number: int = 1, state: int = 0) -> Generation:
    """A state of a cell's connection information."""
    url = f"rabbit://user:{PASSWORD}@host-{number}:5672/state-{state}"
    return Generation.of(cell_uuid(number), Secret(url))


def cell(number: int = 1, state: int = 0) -> Cell:
    return Cell(cell_uuid(number), f"cell-{number}", generation(number, state))


@dataclasses.dataclass(frozen=True)
class Sent:
    """A message that was written."""

    target: oslo_messaging.Target
    context: Any
    message: dict[str, Any]
    options: dict[str, Any]


class Silent:
    """A driver that does not tell what it does."""


class Ready(Reporting):
    """A driver that always has a connection open, and keeps deadlines."""

    def reserve(self, message: Message) -> bool:
        return True


class Transport:
    """One transport, as the pool and a delivery see it.

    :ivar closed: how often it was closed
    :ivar closed_at: when, in seconds of the real clock
    :ivar using: how many use it just now
    :ivar used_until: when the last of them had done with it
    """

    def __init__(
        self, transports: Transports, of: Generation, one_request: bool
    ) -> None:
        self._transports = transports
        self._driver: object = transports.make_driver()
        self.generation = of
        self.one_request = one_request
        self.closed = 0
        self.closed_at = 0.0
        self.using = 0
        self.used_until = 0.0
        self.sent: list[Sent] = []

    def __repr__(self) -> str:
        return f"<fake transport of cell {self.generation.cell_uuid}>"

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """It must stay open until the end of this."""
        transports = self._transports
        with transports.lock:
            self.using += 1
            if self.closed:
                transports.violations.append(f"{self} used after its end")
        try:
            yield
        finally:
            with transports.lock:
                self.using -= 1
                self.used_until = time.monotonic()

    def _send(
        self,
        target: oslo_messaging.Target,
        ctxt: Any,
        message: dict[str, Any],
        **options: Any,
    ) -> Any:
        transports = self._transports
        sent = Sent(target, ctxt, message, options)
        under: Any = None
        if isinstance(self._driver, Reporting):
            under = under_way.message
        with self.use():
            try:
                transports.before_writing(self)
                transports.before_send(self, sent)
                if under is not None:
                    under.writing()
                answer = transports.on_send(self, sent)
            except Exception as error:
                if under is not None:
                    under.failed(driver.judge(error), error)
                raise
            if under is not None:
                under.written()
            if transports.keep_sent:
                self.sent.append(sent)
            if options["wait_for_reply"]:
                return transports.on_reply(self, sent, answer)
            return answer

    def cleanup(self) -> None:
        transports = self._transports
        with transports.lock:
            self.closed += 1
            self.closed_at = time.monotonic()
            if self.using:
                transports.violations.append(f"{self} closed in use")
            if self.closed > 1:
                transports.violations.append(f"{self} closed again")
            elif not transports.keep_closed:
                transports.opened.remove(self)
        transports.on_close(self)


class Transports:
    """Opens transports and remembers them all.

    The hooks may block and raise.

    :ivar opened: those that were opened, in that order
    :ivar violations: what must never happen, and did
    :ivar count: how many were opened
    :ivar keep_sent: whether they remember what was sent
    :ivar keep_closed: whether those that are closed stay in ``opened``
    :ivar make_driver: makes the driver of one
    :ivar on_open: called before one is opened
    :ivar before_writing: called before one finds out whether it may write
    :ivar before_send: the same, with what is to be sent
    :ivar on_send: called when one writes
    :ivar on_reply: called when one awaits the reply, with what ``on_send``
        returned; what it returns is the reply
    :ivar on_close: called when one is closed
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.opened: list[Transport] = []
        self.violations: list[str] = []
        self.attempts = 0
        self.count = 0
        self.keep_sent = True
        self.keep_closed = True
        self.make_driver: Callable[[], object] = Reporting
        self.on_open: Callable[[Generation], None] = lambda of: None
        self.before_writing: Callable[[Transport], None] = lambda one: None
        self.before_send: Callable[[Transport, Sent], Any]
        self.before_send = lambda one, sent: None
        self.on_send: Callable[[Transport, Sent], Any] = lambda one, sent: None
        self.on_reply: Callable[[Transport, Sent, Any], Any] = (
            lambda one, sent, answer: answer
        )
        self.on_close: Callable[[Transport], None] = lambda one: None

    def open(self, of: Generation, one_request: bool) -> Transport:
        with self.lock:
            self.attempts += 1
        self.on_open(of)
        transport = Transport(self, of, one_request)
        with self.lock:
            self.count += 1
            self.opened.append(transport)
        return transport

    @property
    def left(self) -> list[Transport]:
        """Those that are open."""
        return [one for one in self.opened if not one.closed]

    @property
    def sent(self) -> list[Sent]:
        return [sent for one in self.opened for sent in one.sent]

    def check(self) -> None:
        """Each was closed once, and none in use."""
        assert not self.violations, self.violations
        assert not self.left, self.left


class Records(logging.Handler):
    """What the package logs while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._logger = logging.getLogger("cellmw")
        self._level = self._logger.level

    def emit(self, record: logging.LogRecord) -> None:
        text = logging.Formatter("%(levelname)s %(message)s").format(record)
        self.lines.append(text)

    def matching(self, part: str) -> list[str]:
        return [line for line in self.lines if part in line]

    def __enter__(self) -> Self:
        self._level = self._logger.level
        self._logger.setLevel(logging.DEBUG)
        self._logger.addHandler(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._logger.removeHandler(self)
        self._logger.setLevel(self._level)


class Rig:
    """A pool, and what it needs.

    Closed by its end as a context, which fails a test that has left a lease
    or a transport.  A test that is failing already is not failed again.
    """

    def __init__(self, *, max_size: int = 16, **settings: Any) -> None:
        self.clock = Clock()
        self.transports = Transports()
        self.records = Records()
        self.workers = Workers()
        self.closer = Closer(self.workers, budget=10.0, clock=self.clock)
        self.max_size = max_size
        self.pool = Pool(
            self.transports.open,
            self.closer,
            max_size=max_size,
            **{
                "idle_timeout": 600.0,
                "max_lifetime": 3600.0,
                "clock": self.clock,
                "chance": lambda: 0.5,
                **settings,
            },
        )

    @property
    def cached(self) -> bool:
        return self.max_size > 0

    def acquire(self, number: int = 1, state: int = 0) -> Lease:
        return self.pool.acquire(generation(number, state), timeout=PATIENCE)

    @contextlib.contextmanager
    def leased(self, number: int = 1, state: int = 0) -> Iterator[Transport]:
        """A transport, in use for so long."""
        lease = self.acquire(number, state)
        try:
            transport: Any = lease.transport
            assert transport.generation is lease.generation
            with transport.use():
                yield transport
        finally:
            lease.release()

    def visit(self, *numbers: int) -> None:
        """Open the transports of these cells, and give them back."""
        for number in numbers:
            self.acquire(number).release()

    @property
    def stats(self) -> PoolStats:
        return self.pool.stats()

    def settle(self) -> None:
        """Wait until all that is being closed is closed."""
        assert self.closer.wait(PATIENCE) == 0
        self.closer.watch()

    def open_cells(self) -> list[int]:
        """Of which cells transports are open, when all closing is done."""
        self.settle()
        return sorted(
            int(one.generation.cell_uuid[-12:]) for one in self.transports.left
        )

    def close(self) -> None:
        assert self.pool.close(PATIENCE) == 0
        self.settle()
        self.workers.close()
        self.transports.check()
        total = self.stats.total
        assert self.stats.leases == 0
        assert total.opened == total.closed == self.transports.count
        assert not self.records.matching(PASSWORD)

    def __enter__(self) -> Self:
        self.records.__enter__()
        # As the process does for the cells that it knows.
        self._hold = redaction.KNOWN.hold(generation().url)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.close()
        finally:
            self._hold.drop()
            self.records.__exit__()
            self.workers.close()


class Stack(Rig):
    """A rig with the rest of what a handle needs of its process.

    :ivar ready: messages are sent in the request's thread where they can be
    :ivar cells: what the API database says, by cell UUID
    :ivar refreshed: how often it was asked anew
    :ivar on_refresh: called then
    """

    runtime_id = 1

    def __init__(
        self,
        *,
        send_timeout: float = PATIENCE,
        max_sends: int = 64,
        max_stuck: int = 256,
        breaker_failures: int = 5,
        ready: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.ready = ready
        if ready:
            self.transports.make_driver = Ready
        self.pid = os.getpid()
        self.lock = threading.Lock()
        self.conf = cfg.ConfigOpts()
        self.refusals = Refusals(self.clock)
        self.cells: dict[str, Cell] = {}
        self.refreshed = 0
        self.on_refresh: Callable[[], None] = lambda: None
        stuck_threads = StuckThreads(max_stuck)
        self.guards = Guards(
            lambda uuid, name: Guard(
                uuid,
                name,
                max_sends=max_sends,
                breaker_failures=breaker_failures,
                stuck_threads=stuck_threads,
                clock=self.clock,
            )
        )
        self.delivering = Delivering(
            guards=self.guards,
            workers=self.workers,
            send_timeout=send_timeout,
            refresh=self.refresh,
            refresh_due_in=lambda: 7.5,
        )

    def put(self, number: int = 1, state: int = 0) -> Cell:
        """Make or change a cell in the database."""
        made = cell(number, state)
        self.cells = {**self.cells, made.uuid: made}
        return made

    def keep_only(self) -> None:
        """Tell the pool what the database says."""
        self.pool.keep_only(
            {uuid: one.generation for uuid, one in self.cells.items()}
        )

    def here(self) -> Stack:
        return self

    def cell(self, cell_uuid: str) -> Cell:
        return self.cells[cell_uuid]

    def borrower(self, of: Cell) -> RequestLease:
        return RequestLease(
            self.pool,
            lambda: self.cells[of.uuid],
            lambda: self.cells[of.uuid],
        )

    def refresh(self) -> None:
        self.refreshed += 1
        self.on_refresh()
        self.keep_only()

    def abandon(self, borrower: RequestLease) -> None:
        borrower.end()

    @contextlib.contextmanager
    def handle(self, number: int = 1) -> Iterator[Handle]:
        """What a request for this cell has on its context."""
        made = Handle(self, self.cells[cell_uuid(number)])
        try:
            yield made
        finally:
            made.release()

    def guard(self, number: int = 1) -> Guard:
        return self.guards.get(cell_uuid(number), None)

    def close(self) -> None:
        super().close()
        for stats in self.guards.stats():
            assert stats.under_way == stats.waiting == stats.stuck == 0


def message(method: str = "ping") -> dict[str, Any]:
    return {"method": method, "args": {}}


def send(
    handle: RPCTransport,
    *,
    ctxt: dict[str, Any] | None = None,
    method: str = "ping",
    **options: Any,
) -> Any:
    """What an RPCClient does with a transport."""
    target = oslo_messaging.Target(topic="compute", server="host")
    return handle._send(target, ctxt or {}, message(method), **options)


def cast(handle: RPCTransport, **options: Any) -> Any:
    return send(handle, wait_for_reply=False, **options)


def call(handle: RPCTransport, **options: Any) -> Any:
    return send(handle, **{"wait_for_reply": True, "timeout": 5, **options})


class Threads:
    """Threads that a test runs, and what they came to.

    At the end of the context all have ended, and the first error of one is
    raised.
    """

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self.errors: list[BaseException] = []

    def start(
        self, function: Callable[..., Any], *args: Any
    ) -> threading.Thread:
        def run() -> None:
            try:
                function(*args)
            except BaseException as error:
                self.errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def join(self) -> None:
        for thread in self._threads:
            thread.join(PATIENCE * 4)
            assert not thread.is_alive(), "a thread of the test hangs"
        if self.errors:
            raise self.errors[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        if error is None:
            self.join()


class Gate:
    """Holds who waits at it until the test opens it.

    :ivar held: the threads that have come to it
    """

    def __init__(self) -> None:
        self._arrived = threading.Semaphore(0)
        self._open = threading.Event()
        self.held: set[int] = set()

    def wait(self, *_: object) -> None:
        """Called by who is held."""
        self.held.add(threading.get_ident())
        self._arrived.release()
        assert self._open.wait(PATIENCE), "nobody has opened the gate"

    def await_arrival(self, count: int = 1) -> None:
        """Called by the test: until so many have come."""
        for _ in range(count):
            assert self._arrived.acquire(timeout=PATIENCE), "nobody has come"

    def open(self) -> None:
        self._open.set()


def in_child(function: Callable[[], _Result]) -> _Result:
    """What a function gives in a forked child, or raise what it raises.

    The child ends without finalizing anything.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # It forks while threads run, as a server does that is asked for it.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        # One that hangs ends, and its test fails.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(int(PATIENCE))
        status = 1
        outcome: tuple[bool, object]
        try:
            try:
                outcome = (True, function())
            except BaseException as error:
                outcome = (False, f"{type(error).__name__}: {error}")
            with os.fdopen(writing, "wb") as pipe:
                pickle.dump(outcome, pipe)
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"the child has ended with {status}"
    worked, result = pickle.loads(data)
    assert worked, result
    # The caller's function says what it is.
    return result  # type: ignore[no-any-return]
