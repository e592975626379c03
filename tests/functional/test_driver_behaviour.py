# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What an RPC user sees is the same on cellmw-memory and on RabbitMQ."""

from __future__ import annotations

import contextlib
import datetime
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import amqp.exceptions
import kombu.exceptions
import oslo_messaging
import pytest
from oslo_config import cfg

from cellmw import testing
from tests import servers

TOPIC = "compute"
# Longer than any message needs, shorter than a person's patience.
SOON = 10


class Backend(Protocol):
    url: str

    def another_vhost(self) -> str: ...

    def wrong_password(self) -> str: ...

    def refused(self) -> str: ...


class Memory:
    url = "cellmw-memory://guest:guest@host/one"

    def another_vhost(self) -> str:
        return "cellmw-memory://guest:guest@host/other"

    def wrong_password(self) -> str:
        testing.broker_of(self.url).require_credentials("guest", "another")
        return self.url

    def refused(self) -> str:
        testing.broker_of(self.url).refuse()
        return self.url


class RabbitMQ:
    def __init__(self, make_vhost: Callable[[], servers.Vhost]) -> None:
        self._make_vhost = make_vhost
        self._vhost = make_vhost()
        self.url = self._vhost.url

    def another_vhost(self) -> str:
        return self._make_vhost().url

    def wrong_password(self) -> str:
        return self._vhost.broker.url(self._vhost.name, password="another")

    def refused(self) -> str:
        return self._vhost.url_via(f"127.0.0.1:{servers.free_port()}")


@pytest.fixture(
    params=["memory", pytest.param("rabbit", marks=pytest.mark.servers)]
)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    if request.param == "rabbit":
        yield RabbitMQ(request.getfixturevalue("make_vhost"))
        return
    with testing.own_brokers(), testing.no_leaks():
        yield Memory()


class AllowedError(Exception):
    pass


class OtherError(Exception):
    pass


class Endpoint:
    """Keeps what it was sent."""

    def __init__(self) -> None:
        self.seen: queue.Queue[tuple[dict[str, Any], Any]] = queue.Queue()

    def note(self, ctxt: dict[str, Any], value: Any) -> None:
        self.seen.put((ctxt, value))

    def echo(self, ctxt: dict[str, Any], value: Any) -> Any:
        return value

    def fail(self, ctxt: dict[str, Any], text: str) -> None:
        raise AllowedError(text)

    def unserializable(self, ctxt: dict[str, Any]) -> Any:
        return object()

    def linger(self, ctxt: dict[str, Any], seconds: float) -> str:
        threading.Event().wait(seconds)
        return "done"

    def values_until(self, last: Any) -> list[Any]:
        """What was noted, in order, up to and without ``last``."""
        values = []
        while (value := self.seen.get(timeout=SOON)[1]) != last:
            values.append(value)
        return values


@contextlib.contextmanager
def transport(
    url: str, allowed: list[str] | None = None
) -> Iterator[oslo_messaging.RPCTransport]:
    made = oslo_messaging.get_rpc_transport(
        cfg.CONF, url, allowed_remote_exmods=allowed or []
    )
    try:
        yield made
    finally:
        made.cleanup()


@contextlib.contextmanager
def server(
    backend: Backend, name: str, *, topic: str = TOPIC, url: str = ""
) -> Iterator[Endpoint]:
    endpoint = Endpoint()
    target = oslo_messaging.Target(topic=topic, server=name)
    with transport(url or backend.url) as own:
        rpc_server = oslo_messaging.get_rpc_server(own, target, [endpoint])
        rpc_server.start()
        try:
            yield endpoint
        finally:
            rpc_server.stop()
            rpc_server.wait()


def client(
    of: oslo_messaging.RPCTransport, **options: Any
) -> oslo_messaging.RPCClient:
    options.setdefault("timeout", SOON)
    options.setdefault("retry", 0)
    return oslo_messaging.get_rpc_client(
        of, oslo_messaging.Target(topic=TOPIC), **options
    )


def test_a_cast_to_a_server_reaches_that_server_only(
    backend: Backend,
) -> None:
    with (
        server(backend, "a") as a,
        server(backend, "b") as b,
        transport(backend.url) as t,
    ):
        client(t).prepare(server="a").cast({}, "note", value="for a")
        for name in ("a", "b"):
            client(t).prepare(server=name).cast({}, "note", value="last")
        assert a.values_until("last") == ["for a"]
        assert b.values_until("last") == []


def test_servers_of_a_topic_take_turns(backend: Backend) -> None:
    with (
        server(backend, "a") as a,
        server(backend, "b") as b,
        transport(backend.url) as t,
    ):
        for number in range(6):
            client(t).cast({}, "note", value=number)
        # A queue of one's own keeps no order with the shared one.
        noted = [
            [e.seen.get(timeout=SOON)[1] for _ in range(3)] for e in (a, b)
        ]
        assert sorted(noted[0] + noted[1]) == [0, 1, 2, 3, 4, 5]
        assert a.seen.empty()
        assert b.seen.empty()


def test_a_fanout_reaches_each_server_of_the_topic(backend: Backend) -> None:
    with (
        server(backend, "a") as a,
        server(backend, "b") as b,
        server(backend, "c", topic="other") as c,
        transport(backend.url) as t,
    ):
        client(t).prepare(fanout=True).cast({}, "note", value="all")
        assert a.seen.get(timeout=SOON)[1] == "all"
        assert b.seen.get(timeout=SOON)[1] == "all"
        client(t).prepare(topic="other").cast({}, "note", value="last")
        assert c.values_until("last") == []


def test_a_call_returns_what_json_makes_of_the_result(
    backend: Backend,
) -> None:
    moment = datetime.datetime(2026, 1, 2, 3, 4, 5)  # noqa: DTZ001  # as sent
    value = {"a": (1, 2.5, None), 7: {"deep": [True]}, "when": moment}
    with server(backend, "a"), transport(backend.url) as t:
        assert client(t).call({}, "echo", value=value) == {
            "a": [1, 2.5, None],
            "7": {"deep": [True]},
            "when": "2026-01-02T03:04:05.000000",
        }


def test_a_context_arrives_as_the_driver_gives_it_on(
    backend: Backend,
) -> None:
    with server(backend, "a") as a, transport(backend.url) as t:
        client(t).cast({"user": "u", "roles": ["r"]}, "note", value=1)
        ctxt, _value = a.seen.get(timeout=SOON)
    assert ctxt == {"user": "u", "roles": ["r"], "client_timeout": None}


def test_an_error_of_an_allowed_module_comes_back_as_itself(
    backend: Backend,
) -> None:
    with server(backend, "a"), transport(backend.url, [__name__]) as t:
        with pytest.raises(AllowedError, match="no such disk") as caught:
            client(t).call({}, "fail", text="no such disk")
    assert type(caught.value).__name__ == "AllowedError_Remote"


def test_any_other_error_comes_back_as_remote_error(backend: Backend) -> None:
    with server(backend, "a"), transport(backend.url) as t:
        with pytest.raises(oslo_messaging.RemoteError) as caught:
            client(t).call({}, "fail", text="no such disk")
    assert caught.value.exc_type == "AllowedError"
    assert caught.value.value == "no such disk"


def test_a_method_that_is_not_there_comes_back_as_an_error(
    backend: Backend,
) -> None:
    with server(backend, "a"), transport(backend.url) as t:
        with pytest.raises(oslo_messaging.RemoteError) as caught:
            client(t).call({}, "no_such_method")
    assert caught.value.exc_type == "NoSuchMethod"


def test_a_call_that_nobody_answers_times_out(backend: Backend) -> None:
    with transport(backend.url) as t:
        with pytest.raises(oslo_messaging.MessagingTimeout):
            client(t, timeout=0.2).prepare(server="nobody").call({}, "echo")


def test_a_call_whose_result_cannot_be_sent_times_out(
    backend: Backend,
) -> None:
    with server(backend, "a"), transport(backend.url) as t:
        with pytest.raises(oslo_messaging.MessagingTimeout):
            client(t, timeout=0.5).call({}, "unserializable")


def test_heartbeats_keep_a_long_call_alive(backend: Backend) -> None:
    with server(backend, "a"), transport(backend.url) as t:
        monitored = client(t, timeout=30, call_monitor_timeout=2)
        assert monitored.call({}, "linger", seconds=3.2) == "done"


def test_without_a_heartbeat_a_monitored_call_times_out(
    backend: Backend,
) -> None:
    with transport(backend.url) as t:
        monitored = client(t, timeout=60, call_monitor_timeout=1)
        with pytest.raises(oslo_messaging.MessagingTimeout):
            monitored.prepare(server="nobody").call({}, "echo")


def test_a_message_without_a_queue_is_dropped_in_silence(
    backend: Backend,
) -> None:
    with transport(backend.url) as t:
        client(t).prepare(server="a").cast({}, "note", value="too early")
        client(t).cast({}, "note", value="too early")
        client(t).prepare(fanout=True).cast({}, "note", value="too early")
        with server(backend, "a") as a:
            client(t).prepare(server="a").cast({}, "note", value="last")
            assert a.values_until("last") == []


def test_a_mandatory_message_without_a_queue_is_an_error(
    backend: Backend,
) -> None:
    must = oslo_messaging.TransportOptions(at_least_once=True)
    with transport(backend.url) as t:
        with pytest.raises(oslo_messaging.MessageUndeliverable):
            client(t, transport_options=must).cast({}, "note", value=1)


def test_a_servers_queue_outlives_it(backend: Backend) -> None:
    with server(backend, "a"):
        pass
    with transport(backend.url) as t:
        client(t).prepare(server="a").cast({}, "note", value="kept")
        with server(backend, "a") as again:
            client(t).prepare(server="a").cast({}, "note", value="last")
            assert again.values_until("last") == ["kept"]


def test_a_fanout_does_not_wait_for_a_server(backend: Backend) -> None:
    with server(backend, "a"):
        pass
    with transport(backend.url) as t:
        client(t).prepare(fanout=True).cast({}, "note", value="missed")
        with server(backend, "a") as again:
            client(t).prepare(server="a").cast({}, "note", value="last")
            assert again.values_until("last") == []


def test_a_call_that_was_given_up_is_not_run_later(backend: Backend) -> None:
    with server(backend, "a"):
        pass
    with transport(backend.url) as t:
        to_a = client(t, timeout=0.2).prepare(server="a")
        with pytest.raises(oslo_messaging.MessagingTimeout):
            to_a.call({}, "note", value="given up")
        with server(backend, "a") as again:
            to_a.cast({}, "note", value="last")
            assert again.values_until("last") == []


def test_what_cannot_be_serialized_fails_at_the_sender(
    backend: Backend,
) -> None:
    with server(backend, "a") as a, transport(backend.url) as t:
        with pytest.raises(ValueError, match="object"):
            client(t).cast({}, "note", value=object())
        client(t).cast({}, "note", value="last")
        assert a.values_until("last") == []


def test_virtual_hosts_are_apart(backend: Backend) -> None:
    other = backend.another_vhost()
    with (
        server(backend, "a") as of_one,
        server(backend, "a", url=other) as of_other,
        transport(backend.url) as t,
        transport(other) as u,
    ):
        client(t).prepare(server="a").cast({}, "note", value="one")
        client(u).prepare(server="a").cast({}, "note", value="other")
        for via in (t, u):
            client(via).prepare(server="a").cast({}, "note", value="last")
        assert of_one.values_until("last") == ["one"]
        assert of_other.values_until("last") == ["other"]


def test_an_exchange_is_part_of_the_address(backend: Backend) -> None:
    with server(backend, "a") as a, transport(backend.url) as t:
        client(t).prepare(exchange="else").cast({}, "note", value="lost")
        client(t).prepare(server="a").cast({}, "note", value="last")
        assert a.values_until("last") == []


def test_replies_of_calls_at_once_do_not_cross(backend: Backend) -> None:
    crossed = []
    with server(backend, "a"), transport(backend.url) as t:
        of_all = client(t)
        start = threading.Barrier(8)

        def caller(number: int) -> None:
            start.wait()
            for turn in range(25):
                value = [number, turn]
                if of_all.call({}, "echo", value=value) != value:
                    crossed.append(value)

        threads = [
            threading.Thread(target=caller, args=(n,)) for n in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert crossed == []


def test_cleanup_leaves_other_transports_alone(backend: Backend) -> None:
    with server(backend, "a"), transport(backend.url) as kept:
        with transport(backend.url) as closed:
            assert client(closed).call({}, "echo", value=1) == 1
            assert client(kept).call({}, "echo", value=2) == 2
        assert client(kept).call({}, "echo", value=3) == 3


def test_a_cleaned_up_transport_fails(backend: Backend) -> None:
    with transport(backend.url) as t:
        client(t).cast({}, "note", value=1)
    t.cleanup()
    with pytest.raises(AttributeError):
        client(t).cast({}, "note", value=1)
    with pytest.raises(AttributeError):
        client(t).call({}, "echo", value=1)


def test_wrong_credentials_fail_at_once(backend: Backend) -> None:
    with transport(backend.wrong_password()) as t:
        with pytest.raises(amqp.exceptions.AccessRefused):
            client(t).cast({}, "note", value=1)
        with pytest.raises(amqp.exceptions.AccessRefused):
            client(t, retry=None).cast({}, "note", value=1)


def test_a_broker_that_refuses_fails_a_cast_without_retry(
    backend: Backend,
) -> None:
    with transport(backend.refused()) as t:
        with pytest.raises(kombu.exceptions.OperationalError):
            client(t).cast({}, "note", value=1)


def test_a_notification_waits_for_its_listener(backend: Backend) -> None:
    own = oslo_messaging.get_notification_transport(cfg.CONF, backend.url)
    notifier = oslo_messaging.Notifier(
        own, "compute.a", driver="messagingv2", topics=[TOPIC]
    )
    notifier.info({}, "instance.start", {"uuid": "u"})
    seen: queue.Queue[tuple[str, Any]] = queue.Queue()

    class Listener:
        def info(
            self,
            ctxt: Any,
            publisher_id: str,
            event_type: str,
            payload: Any,
            metadata: Any,
        ) -> str | None:
            seen.put((event_type, payload))
            if seen.qsize() == 1:
                return str(oslo_messaging.NotificationResult.REQUEUE)
            return None

    listener = oslo_messaging.get_notification_listener(
        own,
        [oslo_messaging.Target(topic=TOPIC)],
        [Listener()],
        executor="threading",
        allow_requeue=True,
    )
    listener.start()
    try:
        # Twice, for it was put back once.
        for _ in range(2):
            assert seen.get(timeout=SOON) == (
                "instance.start",
                {"uuid": "u"},
            )
    finally:
        listener.stop()
        listener.wait()
        own.cleanup()
