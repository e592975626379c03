# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The driver by itself; what it shares with RabbitMQ is a functional test."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import amqp.exceptions
import kombu.exceptions
import oslo_messaging
import pytest
from futurist import _thread
from oslo_config import cfg

from cellmw import testing
from cellmw.testing import memory

URL = "cellmw-memory://host/vhost"
# Long enough for a thread that is not held to come through.
HELD = 0.05
SOON = 10


@pytest.fixture(autouse=True)
def _own_brokers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Else each server that a test stops takes a second for it: its idle
    # threads look that often whether they are to end.
    monkeypatch.setattr(_thread.ThreadWorker, "MAX_IDLE_FOR", 0.01)
    with testing.own_brokers():
        yield


@pytest.fixture
def broker() -> testing.Broker:
    return testing.broker("host", "vhost")


@pytest.fixture
def make_transport() -> Iterator[Callable[..., oslo_messaging.RPCTransport]]:
    made = []

    def make(url: str = URL) -> oslo_messaging.RPCTransport:
        transport = oslo_messaging.get_rpc_transport(cfg.CONF, url)
        made.append(transport)
        return transport

    yield make
    testing.forget_brokers()
    for transport in made:
        transport.cleanup()


@pytest.fixture
def transport(
    make_transport: Callable[..., oslo_messaging.RPCTransport],
) -> oslo_messaging.RPCTransport:
    return make_transport()


class Endpoint:
    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.entered = threading.Event()
        self.go_on = threading.Event()

    def note(self, ctxt: dict[str, Any], value: Any) -> Any:
        self.seen.append(value)
        return value

    def wait(self, ctxt: dict[str, Any]) -> str:
        self.entered.set()
        assert self.go_on.wait(SOON)
        return "done"


@pytest.fixture
def make_server(
    make_transport: Callable[..., oslo_messaging.RPCTransport],
) -> Iterator[Callable[..., Endpoint]]:
    made = []

    def make(url: str = URL, name: str = "a") -> Endpoint:
        endpoint = Endpoint()
        server = oslo_messaging.get_rpc_server(
            make_transport(url),
            oslo_messaging.Target(topic="compute", server=name),
            [endpoint],
        )
        server.start()
        made.append((server, endpoint))
        return endpoint

    yield make
    testing.forget_brokers()
    for server, endpoint in made:
        endpoint.go_on.set()
        server.stop()
        server.wait()


def client(
    transport: oslo_messaging.RPCTransport, **options: Any
) -> oslo_messaging.RPCClient:
    options = {"timeout": SOON, "retry": 0} | options
    target = oslo_messaging.Target(topic="compute", server="a")
    return oslo_messaging.get_rpc_client(transport, target, **options)


class Background:
    """A function that runs in a thread, and may be held there."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._function()
        except Exception as error:
            self.error = error

    @property
    def held(self) -> bool:
        self._thread.join(HELD)
        return self._thread.is_alive()

    def ended(self) -> bool:
        self._thread.join(SOON)
        return not self._thread.is_alive()


def test_a_transport_opens_nothing_before_it_sends(
    broker: testing.Broker,
    transport: oslo_messaging.RPCTransport,
) -> None:
    client(transport)
    stats = broker.stats()
    assert (stats.transports, stats.connections_opened) == (1, 0)


def test_the_first_cast_opens_one_connection(
    broker: testing.Broker,
    transport: oslo_messaging.RPCTransport,
) -> None:
    for _ in range(3):
        client(transport).cast({}, "note", value=1)
    assert broker.stats().connections_opened == 1
    assert broker.queues() == {}


def test_the_first_call_opens_one_more_and_a_reply_queue(
    broker: testing.Broker,
    transport: oslo_messaging.RPCTransport,
    make_server: Callable[..., Endpoint],
) -> None:
    make_server()
    before = broker.stats().connections_opened
    for _ in range(3):
        client(transport).call({}, "note", value=1)
    # Two of the caller, and the one that the server replies on.
    assert broker.stats().connections_opened == before + 3
    replies = [name for name in broker.queues() if name.startswith("reply_")]
    assert len(replies) == 1


def test_first_casts_at_once_leave_one_connection(
    broker: testing.Broker,
    transport: oslo_messaging.RPCTransport,
) -> None:
    broker.hang()
    senders = [
        Background(lambda: client(transport).cast({}, "note", value=1))
        for _ in range(4)
    ]
    assert all(sender.held for sender in senders)
    broker.heal()
    assert all(sender.ended() for sender in senders)
    assert broker.stats().connections == 1
    assert broker.stats().published == 4


def test_cleanup_closes_what_was_opened_exactly_once(
    broker: testing.Broker,
    transport: oslo_messaging.RPCTransport,
) -> None:
    with pytest.raises(oslo_messaging.MessagingTimeout):
        client(transport, timeout=0.01).call({}, "note", value=1)
    assert broker.stats().connections == 2
    transport.cleanup()
    transport.cleanup()
    stats = broker.stats()
    assert (stats.transports, stats.connections) == (0, 0)
    assert (stats.transports_closed, stats.connections_closed) == (1, 2)
    assert broker.queues() == {}


def test_a_server_has_a_connection_until_it_has_ended(
    broker: testing.Broker,
    transport: oslo_messaging.RPCTransport,
) -> None:
    server = oslo_messaging.get_rpc_server(
        transport,
        oslo_messaging.Target(topic="compute", server="a"),
        [Endpoint()],
    )
    server.start()
    assert broker.stats().connections == 1
    assert broker.stats().consumers == 1
    server.stop()
    server.wait()
    assert broker.stats().connections == 0
    assert set(broker.queues()) == {"compute", "compute.a"}


@pytest.mark.parametrize(
    "other",
    [
        "cellmw-memory://host/another",
        "cellmw-memory://another/vhost",
        "cellmw-memory://host:5673/vhost",
    ],
)
def test_brokers_are_apart(
    other: str,
    transport: oslo_messaging.RPCTransport,
    make_server: Callable[..., Endpoint],
) -> None:
    make_server(other)
    with pytest.raises(oslo_messaging.MessagingTimeout):
        client(transport, timeout=0.01).call({}, "note", value=1)


@pytest.mark.parametrize(
    "same",
    [
        "cellmw-memory://HOST/vhost",
        "cellmw-memory://host:5672/vhost",
        "cellmw-memory://user:password@host/vhost",
        "cellmw-memory://host/vhost?heartbeat_rate=2",
    ],
)
def test_one_broker_has_many_urls(
    same: str,
    transport: oslo_messaging.RPCTransport,
    make_server: Callable[..., Endpoint],
) -> None:
    make_server(same)
    assert client(transport).call({}, "note", value=1) == 1


def test_the_hosts_of_a_cluster_have_no_order() -> None:
    one = testing.broker_of("cellmw-memory://u:p@a,u:p@b:1/v")
    other = testing.broker_of("cellmw-memory://u:p@b:1,u:p@a/v")
    assert one is other
    assert one is not testing.broker("a", "v")


def test_the_driver_warns_once_a_process(
    caplog: pytest.LogCaptureFixture,
    make_transport: Callable[..., oslo_messaging.RPCTransport],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "_warned", set())
    with caplog.at_level(logging.WARNING, logger="cellmw"):
        make_transport()
        make_transport()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "do not leave this process" in record.getMessage()
    assert str(os.getpid()) in record.getMessage()


def test_a_call_in_flight_fails_when_its_transport_is_cleaned_up(
    transport: oslo_messaging.RPCTransport,
    make_server: Callable[..., Endpoint],
) -> None:
    endpoint = make_server()
    call = Background(lambda: client(transport).call({}, "wait"))
    assert endpoint.entered.wait(SOON)
    transport.cleanup()
    assert call.ended()
    assert isinstance(call.error, testing.UsedAfterCleanup)
    assert isinstance(call.error, AttributeError)


def test_a_reply_to_a_transport_that_is_gone_is_dropped(
    broker: testing.Broker,
    caplog: pytest.LogCaptureFixture,
    transport: oslo_messaging.RPCTransport,
    make_server: Callable[..., Endpoint],
    make_transport: Callable[..., oslo_messaging.RPCTransport],
) -> None:
    endpoint = make_server()
    call = Background(lambda: client(transport).call({}, "wait"))
    assert endpoint.entered.wait(SOON)
    transport.cleanup()
    assert call.ended()
    with caplog.at_level(logging.WARNING, logger="cellmw"):
        endpoint.go_on.set()
        # The server is there for the next one.
        again = client(make_transport())
        assert again.call({}, "note", value=1) == 1


def test_a_late_reply_is_nobody_elses(
    transport: oslo_messaging.RPCTransport,
    make_server: Callable[..., Endpoint],
) -> None:
    endpoint = make_server()
    with pytest.raises(oslo_messaging.MessagingTimeout):
        client(transport, timeout=0.01).call({}, "wait")
    assert endpoint.entered.wait(SOON)
    endpoint.go_on.set()
    assert client(transport).call({}, "note", value="mine") == "mine"


def test_messages_that_a_stopped_server_did_not_take_wait_in_order(
    broker: testing.Broker,
) -> None:
    sender = broker.attach(None, None)
    first = sender.consume([("q", "x", "q")])
    for number in range(3):
        sender.send("x", "q", str(number), retry=0)
    taken = first.get(0)
    assert taken is not None
    assert taken.body == "0"
    first.stop()
    assert first.get() is None
    assert broker.queues() == {"q": 2}
    second = sender.consume([("q", "x", "q")])
    bodies = [d.body for d in iter(lambda: second.get(0), None)]
    assert bodies == ["1", "2"]


def test_what_was_not_acknowledged_is_given_to_the_next(
    broker: testing.Broker,
) -> None:
    sender = broker.attach(None, None)
    first = sender.consume([("q", "x", "q")], auto_ack=False)
    for body in ("done", "open", "put back", "not taken"):
        sender.send("x", "q", body, retry=0)
    done, _open, put_back = (first.get(0) for _ in range(3))
    assert done is not None
    assert put_back is not None
    first.acknowledge(done)
    first.stop()
    first.requeue(put_back)
    first.close()
    first.close()
    assert broker.stats().connections_closed == 1
    second = sender.consume([("q", "x", "q")])
    bodies = [d.body for d in iter(lambda: second.get(0), None)]
    assert bodies == ["open", "put back", "not taken"]


def test_an_expired_message_does_not_count(broker: testing.Broker) -> None:
    now = 100.0
    broker._state.clock = lambda: now
    sender = broker.attach(None, None)
    sender.consume([("q", "x", "q")]).close()
    sender.send("x", "q", "short", retry=0, ttl=5)
    sender.send("x", "q", "long", retry=0, ttl=50)
    assert broker.stats().waiting == 2
    now += 5
    assert broker.stats().waiting == 1
    assert broker.queues() == {"q": 1}


def test_what_was_published_and_dropped_is_counted(
    broker: testing.Broker,
    transport: oslo_messaging.RPCTransport,
    make_server: Callable[..., Endpoint],
) -> None:
    client(transport).cast({}, "note", value=1)
    make_server()
    client(transport).call({}, "note", value=1)
    stats = broker.stats()
    assert (stats.published, stats.dropped, stats.replies) == (2, 1, 1)


# A broker that is made to fail


def test_a_cut_connection_fails_a_cast_as_not_surely_delivered(
    broker: testing.Broker,
    transport: oslo_messaging.RPCTransport,
) -> None:
    client(transport).cast({}, "note", value=1)
    broker.refuse()
    with pytest.raises(oslo_messaging.MessageDeliveryFailure):
        client(transport).cast({}, "note", value=1)
    broker.heal()
    client(transport).cast({}, "note", value=1)
    assert broker.stats().published == 2


def test_without_a_limit_of_retries_a_cast_is_held_until_healed(
    broker: testing.Broker,
    transport: oslo_messaging.RPCTransport,
) -> None:
    broker.refuse()
    cast = Background(
        lambda: client(transport, retry=None).cast({}, "note", value=1)
    )
    assert cast.held
    broker.heal()
    assert cast.ended()
    assert cast.error is None
    assert broker.stats().published == 1


def test_the_call_that_opens_the_reply_queue_is_held_whatever_its_limits(
    broker: testing.Broker,
    transport: oslo_messaging.RPCTransport,
) -> None:
    broker.refuse()
    call = Background(
        lambda: client(transport, timeout=0.01).call({}, "note", value=1)
    )
    assert call.held
    broker.heal()
    assert call.ended()
    assert isinstance(call.error, oslo_messaging.MessagingTimeout)


def test_who_is_held_fails_when_the_transport_is_cleaned_up(
    broker: testing.Broker,
    transport: oslo_messaging.RPCTransport,
) -> None:
    broker.hang()
    cast = Background(lambda: client(transport).cast({}, "note", value=1))
    call = Background(lambda: client(transport).call({}, "note", value=1))
    assert cast.held
    assert call.held
    transport.cleanup()
    assert cast.ended()
    assert call.ended()
    assert isinstance(cast.error, testing.UsedAfterCleanup)
    assert isinstance(call.error, testing.UsedAfterCleanup)
    assert broker.stats().connections == 0


def test_a_hung_broker_delivers_when_it_is_healed(
    broker: testing.Broker,
    transport: oslo_messaging.RPCTransport,
) -> None:
    client(transport).cast({}, "note", value=1)
    broker.hang()
    cast = Background(lambda: client(transport).cast({}, "note", value=2))
    assert cast.held
    broker.heal()
    assert cast.ended()
    assert cast.error is None
    assert broker.stats().published == 2


@pytest.mark.parametrize("fault", ["refuse", "hang"])
def test_a_reply_comes_when_the_broker_is_back(
    fault: str,
    broker: testing.Broker,
    transport: oslo_messaging.RPCTransport,
    make_server: Callable[..., Endpoint],
) -> None:
    endpoint = make_server()
    results: list[Any] = []
    call = Background(
        lambda: results.append(client(transport).call({}, "wait"))
    )
    assert endpoint.entered.wait(SOON)
    getattr(broker, fault)()
    endpoint.go_on.set()
    assert call.held
    broker.heal()
    assert call.ended()
    assert results == ["done"]


def test_a_lost_confirm_means_perhaps(
    broker: testing.Broker,
    transport: oslo_messaging.RPCTransport,
    make_server: Callable[..., Endpoint],
) -> None:
    endpoint = make_server()
    broker.lose_confirms()
    with pytest.raises(oslo_messaging.MessageDeliveryFailure):
        client(transport).cast({}, "note", value="once")
    client(transport, retry=1).cast({}, "note", value="twice")
    broker.heal()
    assert client(transport).call({}, "note", value="last") == "last"
    assert sorted(endpoint.seen) == ["last", "once", "twice", "twice"]


def test_credentials_count_where_they_are_required(
    broker: testing.Broker,
    make_transport: Callable[..., oslo_messaging.RPCTransport],
) -> None:
    open_before = make_transport("cellmw-memory://u:old@host/vhost")
    client(open_before).cast({}, "note", value=1)
    broker.require_credentials("u", "n:ew/@")
    right = make_transport("cellmw-memory://u:n%3Aew%2F%40@host/vhost")
    client(right).cast({}, "note", value=1)
    client(open_before).cast({}, "note", value=1)
    for url in (URL, "cellmw-memory://u:old@host/vhost"):
        with pytest.raises(amqp.exceptions.AccessRefused) as caught:
            client(make_transport(url)).cast({}, "note", value=1)
        assert "n:ew" not in str(caught.value)
    broker.heal()
    client(make_transport()).cast({}, "note", value=1)


def test_closing_can_be_held(
    broker: testing.Broker,
    transport: oslo_messaging.RPCTransport,
) -> None:
    broker.hold_closing()
    cleanup = Background(transport.cleanup)
    assert cleanup.held
    assert broker.stats().transports == 1
    broker.heal()
    assert cleanup.ended()
    assert broker.stats().transports == 0


def test_each_broker_fails_by_itself(
    broker: testing.Broker,
    make_transport: Callable[..., oslo_messaging.RPCTransport],
) -> None:
    broker.refuse()
    with pytest.raises(kombu.exceptions.OperationalError):
        client(make_transport()).cast({}, "note", value=1)
    client(make_transport("cellmw-memory://host/else")).cast(
        {}, "note", value=1
    )


def test_brokers_can_be_listed_and_forgotten(
    broker: testing.Broker,
    transport: oslo_messaging.RPCTransport,
) -> None:
    assert testing.brokers() == [broker]
    assert repr(broker) == "<memory broker host:5672/vhost>"
    broker.refuse()
    testing.forget_brokers()
    assert testing.brokers() == []
    assert testing.broker("host", "vhost") is not broker
    # Faults of a forgotten one hold nobody.
    client(transport).cast({}, "note", value=1)


def test_a_forked_child_begins_with_no_brokers(
    broker: testing.Broker,
    make_transport: Callable[..., oslo_messaging.RPCTransport],
) -> None:
    # What another thread of the parent holds, nobody releases in the child.
    broker._state.lock.acquire()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SOON)
        own = make_transport()
        client(own).cast({}, "note", value=1)
        known = testing.brokers()
        os._exit(0 if known and broker not in known else 1)
    broker._state.lock.release()
    _pid, status = os.waitpid(child, 0)
    assert status == 0
