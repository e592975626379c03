# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What is known of oslo.messaging's inside holds, on its own code."""

from __future__ import annotations

import gc
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import amqp.exceptions
import kombu.exceptions
import oslo_messaging
import pytest
from oslo_config import cfg
from oslo_messaging._drivers import amqpdriver, common, impl_rabbit
from oslo_messaging.transport import RPCTransport
from oslo_serialization import jsonutils

from cellmw import exceptions, redaction
from cellmw.cells.mapping import Generation
from cellmw.redaction import Secret
from cellmw.transports import oslo
from cellmw.transports.oslo import Verdict
from tests.fakes import in_child

UUID = "11111111-1111-1111-1111-111111111111"
PASSWORD = "s3cr3t-p4ssw0rd"
LONG = 30.0


@pytest.mark.parametrize(
    "lines, found",
    [
        ("", None),
        ("transport_url =", ""),
        ("transport_url = rabbit://", "rabbit://"),
        ("transport_url = rabbit://u:p@h/v", "rabbit://u:p@h/v"),
    ],
)
def test_only_a_url_that_somebody_has_set_is_filled_in(
    tmp_path: Path, lines: str, found: str | None
) -> None:
    path = tmp_path / "service.conf"
    path.write_text(f"[DEFAULT]\n{lines}\n", "utf-8")
    conf = cfg.ConfigOpts()
    conf([], project="cellmw-test", default_config_files=[str(path)])
    oslo.prepare(conf)
    assert oslo.base_url(conf) == found


def test_a_url_that_a_service_sets_in_its_code_is_filled_in() -> None:
    conf = cfg.ConfigOpts()
    conf([], project="cellmw-test", default_config_files=[])
    oslo.prepare(conf)
    conf.set_override("transport_url", "rabbit://u:p@h/v")
    assert oslo.base_url(conf) == "rabbit://u:p@h/v"


@pytest.fixture(scope="module")
def conf() -> cfg.ConfigOpts:
    conf = cfg.ConfigOpts()
    conf([], project="cellmw-test", default_config_files=[])
    oslo.prepare(conf)
    return conf


class Connections:
    """A connection pool and its connections, which write down what happens.

    :ivar events: what happened, in its order
    """

    def __init__(self, problem: BaseException | None = None) -> None:
        self.events: list[str] = []
        self.problem = problem

    def get(self, retry: int | None = None) -> Connections:
        self.events.append(f"connected, retry={retry}")
        return self

    def put(self, connection: object) -> None:
        pass

    def empty(self) -> None:
        pass

    def reset(self) -> None:
        pass

    def topic_send(self, **details: Any) -> None:
        self._write(f"written to {details['topic']}, {details['retry']=}")

    def fanout_send(self, topic: str, *args: Any, **details: Any) -> None:
        self._write(f"written to all of {topic}, {details['retry']=}")

    def _write(self, what: str) -> None:
        self.events.append(what.replace("details['retry']", "retry"))
        if self.problem is not None:
            raise self.problem


class Driver(amqpdriver.AMQPDriverBase):
    """The driver's own code, from the message to the connection."""

    def __init__(self, conf: cfg.ConfigOpts, connections: Connections) -> None:
        super().__init__(
            conf,
            oslo_messaging.TransportURL(conf),
            connections,
            default_exchange="exchange",
            allowed_remote_exmods=["oslo_messaging.exceptions"],
        )
        # As if its reply queue had been opened.
        self._reply_q = "reply"
        self._waiter = object.__new__(amqpdriver.ReplyWaiter)
        self._waiter.waiters = amqpdriver.ReplyWaiters()
        self._waiter.allowed_remote_exmods = self._allowed_remote_exmods
        self._waiter.msg_id_cache = types.SimpleNamespace(
            check_duplicate_message=lambda data: None
        )

    def cleanup(self) -> None:
        pass

    def answer(self, result: object = None, failure: object = None) -> None:
        """Let the one call that awaits a reply have it."""
        (msg_id,) = self._waiter.waiters._queues
        self._waiter.waiters.put(
            msg_id, {"result": result, "failure": failure, "ending": True}
        )


@pytest.fixture
def connections() -> Connections:
    return Connections()


@pytest.fixture
def driver(conf: cfg.ConfigOpts, connections: Connections) -> Driver:
    return Driver(conf, connections)


def send(
    driver: Driver,
    announce: Callable[[], None],
    *,
    call: bool = False,
    **target: Any,
) -> Any:
    return RPCTransport(driver)._send(
        oslo.AnnouncingTarget(
            oslo_messaging.Target(topic="topic", **target), announce
        ),
        {},
        {"method": "method", "args": {}},
        wait_for_reply=call or None,
        timeout=LONG if call else None,
        retry=0,
    )


# When a message is written


@pytest.mark.parametrize(
    "target,written",
    [
        ({}, "written to topic, retry=0"),
        ({"server": "host"}, "written to topic.host, retry=0"),
        ({"fanout": True}, "written to all of topic, retry=0"),
    ],
)
@pytest.mark.parametrize("call", [False, True])
def test_a_driver_tells_when_it_has_a_connection_and_before_it_writes(
    driver: Driver,
    connections: Connections,
    target: dict[str, Any],
    written: str,
    call: bool,
) -> None:
    def announce() -> None:
        connections.events.append("announced")
        if call:
            driver.answer("reply")

    assert send(driver, announce, call=call, **target) == (
        "reply" if call else None
    )
    assert connections.events == ["connected, retry=0", "announced", written]


@pytest.mark.parametrize("call", [False, True])
def test_what_is_raised_at_the_announcement_keeps_it_from_being_written(
    driver: Driver, connections: Connections, call: bool
) -> None:
    def refuse() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        send(driver, refuse, call=call)
    assert connections.events == ["connected, retry=0"]
    assert not driver._waiter.waiters._queues


def test_a_target_that_announces_says_all_that_a_target_does() -> None:
    target = oslo_messaging.Target(
        exchange="exchange",
        topic="topic",
        namespace="space",
        version="1.2",
        server="host",
        fanout=False,
        legacy_namespaces=["old"],
    )
    announced: list[bool] = []
    made = oslo.AnnouncingTarget(target, lambda: announced.append(True))
    for name in vars(target):
        assert getattr(made, name) == getattr(target, name), name
    assert announced == [True]


def test_only_drivers_that_are_known_announce(
    driver: Driver, conf: cfg.ConfigOpts
) -> None:
    assert oslo.announces(RPCTransport(driver))
    for url, announces in (
        ("rabbit://", True),
        ("fake://", False),
        ("cellmw-memory://host/vhost", True),
    ):
        transport = oslo_messaging.get_rpc_transport(conf, url)
        assert oslo.announces(transport) is announces, url
        transport.cleanup()


# What an error says


def raised_by(function: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as caught:
        function()
    return caught.value


def failure(error: Exception) -> str:
    """An exception of the far side as it travels."""
    serialized: str = common.serialize_remote_exception(
        (type(error), error, None)
    )
    return serialized


@pytest.mark.parametrize(
    "error",
    [
        OSError("disk full"),
        ConnectionRefusedError("its own client was refused"),
        TimeoutError("there"),
        EOFError("there"),
        ValueError("there"),
        KeyError("there"),
        oslo_messaging.MessagingTimeout("there"),
        oslo_messaging.MessageDeliveryFailure("from there to elsewhere"),
        exceptions.CellUnavailable("there"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_the_far_side_tells_that_the_cell_is_there(
    driver: Driver, error: Exception
) -> None:
    came = raised_by(
        lambda: send(
            driver, lambda: driver.answer(failure=failure(error)), call=True
        )
    )
    assert oslo.judge(came, answerable=True) is Verdict.ANSWERED
    if isinstance(came, OSError | EOFError):
        # What makes the difference is where it rose.
        assert oslo.judge(error, answerable=True) is not Verdict.ANSWERED


def test_a_reply_that_never_comes_tells_that_the_cell_is_there(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.unit.transports.test_oslo.LONG", 0.0)
    came = raised_by(lambda: send(driver, lambda: None, call=True))
    assert isinstance(came, oslo_messaging.MessagingTimeout)
    assert oslo.judge(came, answerable=True) is Verdict.ANSWERED


def test_a_timeout_of_another_driver_is_about_the_reply() -> None:
    error = oslo_messaging.MessagingTimeout()
    assert oslo.judge(error, answerable=True) is Verdict.ANSWERED
    assert oslo.judge(error, answerable=False) is Verdict.UNREACHABLE


def test_a_reply_that_cannot_be_read_tells_that_the_cell_is_there(
    driver: Driver,
) -> None:
    came = raised_by(
        lambda: send(driver, lambda: driver.answer(failure="{"), call=True)
    )
    assert oslo.judge(came, answerable=True) is Verdict.ANSWERED


@pytest.mark.parametrize(
    "error,verdict",
    [
        (kombu.exceptions.OperationalError("refused"), "UNREACHABLE"),
        (oslo_messaging.MessageDeliveryFailure("lost"), "UNREACHABLE"),
        (amqp.exceptions.ConnectionForced("shutting down"), "UNREACHABLE"),
        (amqp.exceptions.RecoverableConnectionError("x"), "UNREACHABLE"),
        (ConnectionResetError("reset"), "UNREACHABLE"),
        (TimeoutError("timed out"), "UNREACHABLE"),
        (amqp.exceptions.AccessRefused("no"), "REFUSED"),
        (amqp.exceptions.NotAllowed("no such vhost"), "REFUSED"),
        (oslo_messaging.RemoteError("ValueError", "there"), "ANSWERED"),
        (TypeError("cannot be serialized"), "UNRELATED"),
        (AttributeError("a mistake"), "UNRELATED"),
        (oslo_messaging.InvalidTarget("no topic", None), "UNRELATED"),
    ],
    ids=lambda value: getattr(type(value), "__name__", value),
)
@pytest.mark.parametrize("call", [False, True])
def test_an_error_from_before_the_reply_tells_of_the_cell(
    driver: Driver,
    connections: Connections,
    error: Exception,
    verdict: str,
    call: bool,
) -> None:
    connections.problem = error
    came = raised_by(lambda: send(driver, lambda: None, call=call))
    assert came is error
    assert oslo.judge(came, answerable=call) is Verdict[verdict]


def test_an_error_of_a_call_not_yet_written_is_no_answer(
    driver: Driver,
) -> None:
    # As after cleanup(): it rises where replies do.
    driver._waiter = None
    came = raised_by(lambda: send(driver, lambda: None, call=True))
    assert isinstance(came, AttributeError)
    assert oslo.judge(came, answerable=False) is Verdict.UNRELATED


def test_a_message_that_was_returned_tells_that_the_cell_is_there() -> None:
    error = oslo_messaging.MessageUndeliverable(None, None, None, None)
    assert oslo.judge(error, answerable=False) is Verdict.ANSWERED


# Where a thread is


@pytest.fixture
def in_thread() -> Iterator[Callable[[Callable[[], object]], int]]:
    threads: list[threading.Thread] = []

    def start(function: Callable[[], object]) -> int:
        threads.append(threading.Thread(target=function, daemon=True))
        threads[-1].start()
        assert threads[-1].ident is not None
        return threads[-1].ident

    yield start
    for thread in threads:
        thread.join(LONG)
        assert not thread.is_alive()


def test_a_call_that_was_delivered_awaits_its_reply(
    driver: Driver, in_thread: Callable[[Callable[[], object]], int]
) -> None:
    announced, go_on = threading.Event(), threading.Event()

    def announce() -> None:
        announced.set()
        go_on.wait(LONG)

    thread_id = in_thread(lambda: send(driver, announce, call=True))
    announced.wait(LONG)
    assert not oslo.is_awaiting_reply(thread_id)
    go_on.set()
    while not oslo.is_awaiting_reply(thread_id):
        pass
    driver.answer()


def test_a_memory_driver_that_awaits_a_reply_is_seen(
    conf: cfg.ConfigOpts, in_thread: Callable[[Callable[[], object]], int]
) -> None:
    transport = oslo_messaging.get_rpc_transport(conf, "cellmw-memory://h/v")
    client = oslo_messaging.get_rpc_client(
        transport, oslo_messaging.Target(topic="nobody"), timeout=0.2
    )
    seen: list[Exception] = []
    thread_id = in_thread(
        lambda: seen.append(raised_by(lambda: client.call({}, "method")))
    )
    while not oslo.is_awaiting_reply(thread_id) and not seen:
        pass
    assert not seen
    while not seen:
        pass
    assert oslo.judge(seen[0], answerable=True) is Verdict.ANSWERED
    transport.cleanup()


def test_a_thread_that_is_gone_or_never_was_awaits_nothing() -> None:
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    assert not oslo.is_awaiting_reply(thread.ident)
    assert not oslo.is_awaiting_reply(None)
    assert not oslo.is_awaiting_reply(threading.get_ident())


@pytest.mark.parametrize("collects", [True, False])
def test_nothing_is_collected_while_it_is_found_out_where_threads_are(
    monkeypatch: pytest.MonkeyPatch, collects: bool
) -> None:
    """CPython 3.11 has a lock then that finalizers must not meet."""
    real = sys._current_frames
    collected: list[bool] = []

    def look() -> dict[int, types.FrameType]:
        collected.append(gc.isenabled())
        return real()

    monkeypatch.setattr(sys, "_current_frames", look)
    before = gc.isenabled()
    try:
        (gc.enable if collects else gc.disable)()
        assert not oslo.is_awaiting_reply(threading.get_ident())
        assert collected == [False]
        assert gc.isenabled() is collects
    finally:
        (gc.enable if before else gc.disable)()


def test_a_child_finds_out_where_its_threads_are() -> None:
    """Also where a thread of its parent was just about it."""

    def child() -> bool:
        return oslo.is_awaiting_reply(threading.get_ident())

    with oslo._frames_lock():
        assert in_child(child) is False


# Making transports


@pytest.mark.parametrize("hosts,retries", [(0, 0), (1, 0), (3, 2)])
@pytest.mark.parametrize("asked", [None, 0, 7])
def test_a_connection_tries_each_host_once_when_it_is_opened(
    conf: cfg.ConfigOpts,
    monkeypatch: pytest.MonkeyPatch,
    hosts: int,
    retries: int,
    asked: int | None,
) -> None:
    opened: list[tuple[str, int]] = []

    def init(
        self: object, conf: object, url: object, purpose: str, retry: int
    ) -> None:
        opened.append((purpose, retry))

    monkeypatch.setattr(impl_rabbit.Connection, "__init__", init)
    url = "rabbit://" + ",".join(f"h{n}" for n in range(hosts)) + "/"
    transport = open_transport(conf, url)
    pool = transport._driver._connection_pool
    pool.create("listen")
    pool.create(retry=asked)
    assert opened == [("listen", retries), ("send", retries)]


def open_transport(
    conf: cfg.ConfigOpts, url: str, *, one_request: bool = False
) -> RPCTransport:
    made = oslo.OsloTransports(conf, ())
    return made.open(Generation.of(UUID, Secret(url)), one_request)


def test_a_reply_queue_of_one_request_does_not_stay(
    conf: cfg.ConfigOpts,
) -> None:
    def ttl(url: str, one_request: bool) -> int:
        transport = open_transport(conf, url, one_request=one_request)
        value = transport._driver.conf.oslo_messaging_rabbit
        seconds: int = value.rabbit_transient_queues_ttl
        return seconds

    assert ttl("rabbit://", True) == oslo.ONE_REQUEST_QUEUE_TTL
    assert ttl("rabbit://", False) == 1800
    asked = "rabbit://h/?rabbit_transient_queues_ttl=60"
    assert ttl(asked, True) == 60


@pytest.mark.parametrize(
    "url,reason",
    [
        (f"rabbit://u:{PASSWORD}@h:port/", "cannot be parsed"),
        (f"rabbit://u:{PASSWORD}@[h/", "cannot be parsed"),
        (f"unheard-of://u:{PASSWORD}@h/", "driver"),
        (f"rabbit://u:{PASSWORD}@h/?unheard_of=1", "query"),
        (f"rabbit://u:{PASSWORD}@h/?heartbeat_rate={PASSWORD}", "number"),
        (f"kafka://u:{PASSWORD}@h/", "pip install 'oslo.messaging[kafka]'"),
    ],
)
def test_a_url_that_cannot_be_used_is_not_shown(
    conf: cfg.ConfigOpts, url: str, reason: str
) -> None:
    with pytest.raises(exceptions.CellMisconfigured) as caught:
        open_transport(conf, url)
    error = caught.value
    assert reason in str(error)
    assert error.cell_uuid == UUID
    assert error.__cause__ is error.__context__ is None
    frames = traceback.StackSummary.extract(
        traceback.walk_tb(error.__traceback__), capture_locals=True
    )
    shown = [
        f"{frame.name}: {frame.locals}"
        for frame in frames
        if "cellmw/transports" in frame.filename
    ]
    assert shown
    assert PASSWORD not in "".join([str(error), *shown])


def test_a_private_configuration_can_send(conf: cfg.ConfigOpts) -> None:
    private = cfg.ConfigOpts()
    private([], project="cellmw-test", default_config_files=[])
    oslo.prepare(private)
    oslo.prepare(private)
    for group in oslo._GLOBAL_ONLY_GROUPS:
        assert getattr(private, group)
    assert private.rpc_response_timeout == 60
    transport = oslo_messaging.get_rpc_transport(
        private, "cellmw-memory://h/v"
    )
    oslo_messaging.get_rpc_client(
        transport, oslo_messaging.Target(topic="topic")
    ).cast({}, "method")
    transport.cleanup()


def test_the_drivers_that_are_installed_are_known() -> None:
    assert {"rabbit", "cellmw-memory"} <= oslo.known_drivers()
    assert "none" not in oslo.known_drivers()


def test_the_far_side_tells_its_errors_as_expected() -> None:
    # What the tests above stand on.
    data = jsonutils.loads(failure(OSError("text")))
    assert (data["class"], data["module"]) == ("OSError", "builtins")
    rebuilt = common.deserialize_remote_exception(jsonutils.dumps(data), [])
    assert type(rebuilt) is OSError
    assert redaction.describe(rebuilt).startswith("OSError")
