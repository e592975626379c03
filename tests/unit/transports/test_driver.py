# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The seam to the drivers, against the installed libraries; no broker."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any, Self

import amqp.exceptions
import amqp.transport
import oslo_messaging
import pytest
from oslo_config import cfg
from oslo_messaging._drivers import amqpdriver, impl_rabbit

from cellmw.transports import driver, oslo
from cellmw.transports.driver import Verdict, fit, rabbit, under_way
from cellmw.transports.driver.connections import (
    ConnectionPool,
    NoConnectionFree,
)
from cellmw.transports.driver.rabbit import NotReady, judge, judge_publishing
from cellmw.transports.driver.wire import Expired, Wire
from tests.fakes import PATIENCE, Gate, Threads


@pytest.fixture
def conf() -> cfg.ConfigOpts:
    conf = cfg.ConfigOpts()
    conf([], project="cellmw-test", default_config_files=[])
    oslo.prepare(conf)
    return conf


class Message:
    """What is under way, and what its driver says of it."""

    def __init__(self, seconds: float = PATIENCE) -> None:
        self.deadline = time.monotonic() + seconds
        self.reserved: Any = None
        self.told: list[str] = []
        self.verdict: Verdict | None = None

    def writing(self) -> None:
        self.told.append("writing")

    def written(self) -> None:
        self.told.append("written")

    def failed(self, verdict: Verdict, error: BaseException) -> None:
        self.verdict = self.verdict or verdict

    def __enter__(self) -> Self:
        under_way.message = self
        return self

    def __exit__(self, *error: object) -> None:
        under_way.message = None


# Whether it fits.


@pytest.fixture
def afresh() -> Iterator[None]:
    driver.check.cache_clear()
    yield
    driver.check.cache_clear()


def test_the_seam_fits_the_installed_libraries() -> None:
    assert fit.misfits() == []


@pytest.mark.parametrize(
    "owner,name",
    [
        (amqpdriver.AMQPDriverBase, "_get_reply_q"),
        (impl_rabbit.Connection, "_ensure_publishing"),
        (impl_rabbit.Connection, "_heartbeat_start"),
        (amqp.transport.TCPTransport, "_setup_transport"),
    ],
)
@pytest.mark.parametrize("how", ["renamed", "rewritten"])
def test_where_it_does_not_fit_the_driver_is_left_alone(
    conf: cfg.ConfigOpts,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    afresh: None,
    owner: type,
    name: str,
    how: str,
) -> None:
    if how == "renamed":
        monkeypatch.delattr(owner, name)
    else:
        monkeypatch.setattr(owner, name, lambda self: None)
    with caplog.at_level(logging.WARNING, "cellmw"):
        for _ in range(2):
            transport = oslo_messaging.get_rpc_transport(conf, "rabbit://h/")
            driver.install(transport, lambda function: True)
            assert not driver.reports(transport)
            assert not driver.connect(transport)
    (record,) = caplog.records
    assert f"{owner.__qualname__}.{name}" in record.getMessage()
    assert fit.TRIED in record.getMessage()


@pytest.mark.parametrize(
    "url,reports",
    [
        ("rabbit://h/", True),
        ("fake://", False),
        ("cellmw-memory://h/v", True),
    ],
)
def test_which_drivers_tell_how_far_a_message_is(
    conf: cfg.ConfigOpts, url: str, reports: bool
) -> None:
    transport = oslo_messaging.get_rpc_transport(conf, url)
    driver.install(transport, lambda function: True)
    assert driver.reports(transport) is reports
    transport.cleanup()


# What errors say.


@pytest.mark.parametrize(
    "error,opening,publishing",
    [
        (amqp.exceptions.AccessRefused("no"), "REFUSED", "REFUSED"),
        (
            amqp.exceptions.AccessRefused("a reserved prefix 'amq.*'"),
            "REFUSED",
            "INVALID",
        ),
        (amqp.exceptions.NotAllowed("no vhost"), "REFUSED", "UNREACHABLE"),
        (amqp.exceptions.NotFound("no exchange"), "UNREACHABLE", "INVALID"),
        (amqp.exceptions.ResourceLocked("x"), "UNREACHABLE", "INVALID"),
        (amqp.exceptions.PreconditionFailed("x"), "UNREACHABLE", "INVALID"),
        (amqp.exceptions.ContentTooLarge("x"), "UNREACHABLE", "INVALID"),
        (amqp.exceptions.FrameSyntaxError("x"), "UNREACHABLE", "INVALID"),
        (amqp.exceptions.MessageNacked(), "UNRELATED", "NACKED"),
        (amqp.exceptions.ConnectionForced("x"), "UNREACHABLE", "UNREACHABLE"),
        (ConnectionResetError("x"), "UNREACHABLE", "UNREACHABLE"),
        (TimeoutError("x"), "UNREACHABLE", "UNREACHABLE"),
        (EOFError("x"), "UNREACHABLE", "UNREACHABLE"),
        (Expired(), "LATE", "LATE"),
        (
            oslo_messaging.MessageUndeliverable(None, None, None, None),
            "ANSWERED",
            "ANSWERED",
        ),
        (UnicodeEncodeError("a", "b", 0, 1, "c"), "UNRELATED", "INVALID"),
        (TypeError("x"), "UNRELATED", "UNRELATED"),
    ],
    ids=lambda value: getattr(type(value), "__name__", value),
)
def test_what_an_error_says_of_the_cell(
    error: Exception, opening: str, publishing: str
) -> None:
    if opening != "UNRELATED" or publishing != "NACKED":
        assert judge(error) is Verdict[opening]
    assert judge_publishing(error) is Verdict[publishing]


@pytest.mark.parametrize("is_call", [True, False])
def test_what_a_silent_driver_raises_is_judged_by_its_class(
    is_call: bool,
) -> None:
    def verdict(error: Exception) -> str:
        return driver.judge_silent(error, is_call=is_call).name

    timeout = oslo_messaging.MessagingTimeout()
    assert verdict(timeout) == ("ANSWERED" if is_call else "UNREACHABLE")
    assert verdict(oslo_messaging.RemoteError("E", "m")) == "ANSWERED"
    assert verdict(OSError("x")) == "UNREACHABLE"


# The socket.


@contextlib.contextmanager
def wired() -> Iterator[tuple[Wire, Any, socket.socket]]:
    here, there = socket.socketpair()
    transport = amqp.transport.TCPTransport("localhost")
    transport.sock = here
    transport._setup_transport()
    transport.connected = True
    with here, there:
        yield Wire(transport), transport, there


def test_a_wire_tells_what_has_arrived() -> None:
    with wired() as (wire, transport, there):
        assert wire.is_quiet()
        there.sendall(b"more than one")
        assert not wire.is_quiet()
        assert transport._read(4) == b"more"
        # The rest was received with it.
        assert not wire.is_quiet()
        assert transport._read(9) == b" than one"
        assert wire.is_quiet()
        there.close()
        assert not wire.is_quiet()


def test_each_wait_ends_at_the_deadline_of_the_message() -> None:
    with wired() as (wire, transport, there):
        wire.deadline = time.monotonic() + 0.3
        started = time.monotonic()
        stop = threading.Event()

        def trickle() -> None:
            with contextlib.suppress(OSError):
                while not stop.wait(0.05):
                    there.sendall(b"x")

        with Threads() as threads:
            threads.start(trickle)
            with pytest.raises(Expired):
                transport._read(100_000)
            stop.set()
        assert 0.2 < time.monotonic() - started < PATIENCE / 2
        assert not wire.is_open
        # What the driver does next with it fails at once.
        with pytest.raises(Expired):
            transport._read(100_000)
        with pytest.raises(Expired):
            transport.write(b"x")


def test_a_write_that_the_other_side_does_not_read_ends_as_well() -> None:
    with wired() as (wire, transport, _):
        wire.deadline = time.monotonic() + 0.2
        with pytest.raises(Expired):
            transport.write(b"x" * 50_000_000)


def test_nothing_in_the_middle_of_a_frame_is_no_busy_loop() -> None:
    with wired() as (_, transport, there):
        there.sendall(b"par")
        transport.sock.settimeout(0)
        with pytest.raises(TimeoutError):
            transport._read(4)
        there.sendall(b"t")
        assert transport._read(4) == b"part"


def test_bytes_of_a_message_are_announced_before_they_are_written() -> None:
    with wired() as (wire, transport, there):
        transport.write(b"head")
        message: Any = Message()
        wire.publishing = message
        transport.write(b"body")
        assert message.told == ["writing"]

        def refuse() -> None:
            raise ZeroDivisionError

        message.writing = refuse
        with pytest.raises(ZeroDivisionError):
            transport.write(b"never")
        assert there.recv(100) == b"headbody"


def test_a_short_deadline_is_not_left_on_the_socket() -> None:
    with wired() as (wire, transport, there):
        there.sendall(b"x")
        wire.deadline = time.monotonic() + 0.5
        transport._read(1)
        assert wire.is_short


@pytest.mark.timeout(PATIENCE)
@pytest.mark.parametrize("purpose", ["send", "listen"])
def test_opening_ends_where_the_other_side_says_nothing(
    conf: cfg.ConfigOpts, monkeypatch: pytest.MonkeyPatch, purpose: str
) -> None:
    # No hook from outside reaches it, and nobody wants to wait so long.
    monkeypatch.setattr(rabbit, "_OPENING", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"rabbit://u:a-long-password@127.0.0.1:{silent.getsockname()[1]}"
        transport = oslo_messaging.get_rpc_transport(conf, url)
        driver.install(transport, run)
        connections = transport._driver._connection_pool
        with (
            Message(0.1) as message,
            pytest.raises(Exception, match="time is"),
        ):
            if purpose == "send":
                connections.get(retry=0)
            else:
                connections.create(purpose)
    assert message.verdict is Verdict.UNREACHABLE


# The connections.


class Connection:
    """As much of one as the pool uses."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.is_alive = True
        self.is_usable = True
        self.is_ready = True
        self.is_pooled = False
        self.closed = threading.Event()

    def take(self, message: object, *, wait: bool = True) -> bool:
        if not wait and not self.is_ready:
            raise NotReady
        return self.is_alive

    def leave(self) -> bool:
        return self.is_usable

    def close(self) -> None:
        self.closed.set()


class Broker:
    """Opens connections, so many at once.

    :ivar most: how many it allows
    """

    def __init__(self) -> None:
        self.opened: list[Connection] = []
        self.most = 1000
        self.on_open: Any = lambda: None

    def open(self, conf: Any, url: Any, purpose: str, retry: Any) -> Any:
        self.on_open()
        if sum(not one.closed.is_set() for one in self.opened) >= self.most:
            raise amqp.exceptions.NotAllowed("connection limit is reached")
        self.opened.append(Connection(len(self.opened)))
        return self.opened[-1]


@pytest.fixture
def broker() -> Broker:
    return Broker()


@pytest.fixture
def pool(broker: Broker) -> Any:
    like = types.SimpleNamespace(
        conf=None, url=None, _max_size=3, _min_size=1, _item_ttl=PATIENCE
    )
    made = ConnectionPool(like, run)
    # Private: nothing outside tells that a thread waits for a connection.
    made._cond = Turnstile()
    made.connection_cls = broker.open
    return made


class Turnstile(threading.Condition):
    """A condition that tells each time when a thread begins to wait.

    It has the lock then, so whoever takes the lock afterwards finds that
    thread waiting.
    """

    def __init__(self) -> None:
        super().__init__()
        self._entered = threading.Semaphore(0)

    def wait(self, timeout: float | None = None) -> bool:
        self._entered.release()
        return super().wait(timeout)

    def await_one(self) -> None:
        assert self._entered.acquire(timeout=PATIENCE)


def run(function: Any) -> bool:
    function()
    return True


def queue_for(
    pool: Any, held: Connection, take: Callable[[], Connection]
) -> list[int]:
    """Let four threads wait for a connection; the order in which they got it.

    :param held: the pool's only connection, which is given back
    :param take: takes one, for a message
    """
    got: list[int] = []

    def wait(number: int) -> None:
        connection = take()
        got.append(number)
        pool.put(connection)

    with Threads() as threads:
        for number in range(4):
            threads.start(wait, number)
            pool._cond.await_one()
        pool.put(held)
        threads.join()
    return got


def test_a_full_pool_is_waited_for_in_turn(pool: Any, broker: Broker) -> None:
    pool._max_size = 1
    with Message() as message:
        held = pool.get()

    def take() -> Connection:
        with Message():
            connection: Connection = pool.get()
            return connection

    assert queue_for(pool, held, take) == [0, 1, 2, 3]
    assert len(broker.opened) == 1
    assert message.verdict is None


def test_a_full_pool_is_waited_for_until_the_deadline(pool: Any) -> None:
    with Message():
        held = [pool.get() for _ in range(3)]
    with Message(0.05) as message:
        with pytest.raises(NoConnectionFree, match="all 3"):
            pool.get()
    assert message.verdict is Verdict.FULL
    assert pool._waiting == 0
    for connection in held:
        pool.put(connection)


def test_what_is_reserved_is_what_the_message_gets(
    pool: Any, broker: Broker
) -> None:
    with Message() as message:
        assert not pool.reserve(message)
        held = [pool.get(), pool.get()]
        for connection in held:
            pool.put(connection)
        assert pool.reserve(message)
        assert message.reserved is held[1]
        assert pool.get() is held[1]
        # Once.
        assert pool.get() is held[0]


def test_what_is_reserved_and_not_used_is_given_back(pool: Any) -> None:
    transport: Any = types.SimpleNamespace(
        _driver=types.SimpleNamespace(_connection_pool=pool, _reply_q=None)
    )
    with Message() as message:
        pool.put(pool.get())
        # Its reply queue would have to be opened.
        assert not driver.reserve(transport, message, is_call=True)
        transport._driver._reply_q = "reply"
        assert driver.reserve(transport, message, is_call=True)
        assert not pool._items
        for _ in range(2):
            driver.release(transport, message)
        assert len(pool._items) == 1


def test_a_full_pool_is_waited_for_to_reserve_from_it(pool: Any) -> None:
    pool._max_size = 1
    with Message() as message:
        assert not pool.reserve(message)  # it may be opened
        assert pool._current_size == 0
        held = pool.get()

    def take() -> Connection:
        with Message() as message:
            assert pool.reserve(message)
            connection: Connection = pool.get()
            return connection

    assert queue_for(pool, held, take) == [0, 1, 2, 3]
    held = pool.get()
    with Message(0.05) as message:
        with pytest.raises(NoConnectionFree, match="all 1"):
            pool.reserve(message)
    assert message.verdict is Verdict.FULL
    pool.put(held)


def test_a_reservation_waits_for_no_heartbeat(
    pool: Any, broker: Broker
) -> None:
    with Message() as message:
        pool.put(pool.get())
        broker.opened[0].is_ready = False
        assert not pool.reserve(message)
        broker.opened[0].is_ready = True
        assert pool.get() is broker.opened[0]


def test_a_reservation_passes_over_dead_connections_and_closes_none(
    pool: Any, broker: Broker
) -> None:
    closing: list[Any] = []

    def later(close: Any) -> bool:
        closing.append(close)
        return True

    pool._later = later
    with Message() as message:
        for connection in [pool.get(), pool.get()]:
            pool.put(connection)
        broker.opened[1].is_alive = False
        assert pool.reserve(message)
        assert message.reserved is broker.opened[0]
    assert closing == [broker.opened[1].close]
    assert not broker.opened[1].closed.is_set()


def test_what_is_given_back_twice_is_there_once(pool: Any) -> None:
    with Message():
        connection = pool.get()
    for _ in range(2):
        pool.put(connection)
    assert len(pool._items) == 1


class Bare(rabbit.Connection):
    """A connection without a broker."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.channel = object()
        self.is_taken = self.is_pooled = False
        self._connection_lock = rabbit._Lock()
        self._heartbeat_thread = None


def test_a_connection_in_use_by_its_heartbeat_is_not_ready() -> None:
    gate = Gate()
    with wired() as (wire, _, _there), Threads() as threads:
        connection = Bare(wire)

        def heartbeat() -> None:
            with connection._connection_lock.for_heartbeat():
                gate.wait()

        threads.start(heartbeat)
        gate.await_arrival()
        message: Any = Message()
        with pytest.raises(NotReady):
            connection.take(message, wait=False)
        gate.open()
        threads.join()
        assert connection.take(message, wait=False)
        assert connection.leave()
        # A channel would have to be opened.
        connection.channel = None
        with pytest.raises(NotReady):
            connection.take(message, wait=False)
        connection.channel, connection.wire = object(), None
        with pytest.raises(NotReady):
            connection.take(message, wait=False)


class Interrupted(rabbit._Lock):  # type: ignore[misc]  # final in typeshed only
    """A signal's handler raises as soon as the lock has been taken."""

    def acquire(self, *args: Any, **kwargs: Any) -> bool:
        super().acquire(*args, **kwargs)
        raise KeyboardInterrupt


def test_a_signal_at_the_taking_leaves_no_lock() -> None:
    with wired() as (wire, _, _there), Message() as message, Threads() as all_:
        connection = Bare(wire)
        # Private: no signal can be made to strike at this very point.
        connection._connection_lock = Interrupted()
        with pytest.raises(KeyboardInterrupt):
            connection.take(message, wait=False)
        assert connection.leave()
        free: list[bool] = []
        lock = connection._connection_lock
        all_.start(
            lambda: free.append(rabbit._Lock.acquire(lock, blocking=False))
        )
        all_.join()
        assert free == [True]


def test_a_signal_in_the_middle_of_a_message_ends_its_connection() -> None:
    """The next one must not take the confirmation for its own."""

    def publish() -> None:
        raise KeyboardInterrupt

    with wired() as (wire, _, _there), Message() as message:
        connection = Bare(wire)
        assert connection.take(message, wait=False)
        with pytest.raises(KeyboardInterrupt):
            connection.ensure(publish, retry=0)
        assert message.told == []
        assert not connection.leave()


def test_dead_connections_are_passed_over(pool: Any, broker: Broker) -> None:
    with Message():
        held = [pool.get() for _ in range(3)]
        for connection in held:
            connection.is_alive = False
            pool.put(connection)
        assert pool.get() is broker.opened[3]
    assert all(one.closed.is_set() for one in held)
    assert pool._current_size == 1


def test_a_broken_connection_does_not_come_back(
    pool: Any, broker: Broker
) -> None:
    with Message():
        broken = pool.get()
        broken.is_usable = False
        pool.put(broken)
        assert broken.closed.is_set()
        assert pool.get() is not broken


def test_where_the_broker_allows_no_more_those_that_work_serve(
    pool: Any, broker: Broker
) -> None:
    broker.most = 2
    with Message() as message:
        held = [pool.get(), pool.get()]
        with Threads() as threads:
            got: list[Connection] = []

            def take() -> None:
                with Message():
                    got.append(pool.get())

            threads.start(take)
            pool._cond.await_one()
            pool.put(held[0])
            threads.join()
    assert got == [held[0]]
    assert message.verdict is None
    assert pool._current_size == 2


def test_a_first_connection_that_is_not_allowed_is_told(
    pool: Any, broker: Broker
) -> None:
    broker.most = 0
    with Message() as message, pytest.raises(amqp.exceptions.NotAllowed):
        pool.get()
    assert message.verdict is Verdict.REFUSED
    assert pool._current_size == 0


def test_one_to_send_with_makes_room_for_the_replies(
    pool: Any, broker: Broker
) -> None:
    broker.most = 2
    with Message() as message:
        for connection in [pool.get(), pool.get()]:
            pool.put(connection)
        replies = pool.create("listen")
    assert replies is broker.opened[-1]
    assert message.verdict is None
    assert pool._current_size == 1
    assert sum(one.closed.is_set() for one in broker.opened) == 1


def test_replies_get_their_room_from_those_that_came_meanwhile(
    pool: Any, broker: Broker
) -> None:
    broker.most = 2
    held: list[Any] = []

    once = iter([None])

    def come() -> None:
        # While the connection for replies is being opened.
        for _ in once:
            with Message():
                held.extend([pool.get(), pool.get()])
            for connection in held:
                pool.put(connection)

    broker.on_open = come
    with Message() as message:
        replies = pool.create("listen")
    assert replies is broker.opened[-1]
    assert message.verdict is None
    assert pool._current_size == 1


def test_what_is_unused_for_too_long_is_closed(
    pool: Any, broker: Broker
) -> None:
    pool._item_ttl = 0.0
    with Message():
        held = [pool.get(), pool.get(), pool.get()]
        for connection in held:
            pool.put(connection)
    assert [one.closed.is_set() for one in held] == [True, True, False]


def test_opening_holds_no_lock(pool: Any, broker: Broker) -> None:
    gate = Gate()
    broker.on_open = gate.wait
    with Threads() as threads:

        def take() -> None:
            with Message():
                pool.put(pool.get())

        threads.start(take)
        gate.await_arrival()
        assert pool._cond.acquire(timeout=PATIENCE)
        pool._cond.release()
        gate.open()


def test_what_no_thread_can_close_is_closed_with_the_rest(
    pool: Any, broker: Broker
) -> None:
    pool._later = lambda function: False
    with Message():
        broken = pool.get()
        broken.is_usable = False
        pool.put(broken)
    assert not broken.closed.is_set()
    pool.empty()
    assert broken.closed.is_set()
