# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What is, and what is not, a fault of a cell: on a real RabbitMQ."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import amqp
import oslo_messaging
import pytest

import cellmw
from cellmw import exceptions, runtime
from tests import servers
from tests.fakes import PATIENCE, Threads
from tests.faults.service import (
    HOST,
    Inbox,
    Outcome,
    Service,
    durable,
)
from tests.functional import stack
from tests.proxy import Proxy

pytestmark = pytest.mark.servers

# More failures in a row than take a cell down.
MANY = 4
PASSWORD = "pass-not-for-logs"
TARGET = oslo_messaging.Target(topic=stack.TOPIC, server=HOST)


@pytest.fixture
def api(
    request: pytest.FixtureRequest, sqlite: servers.Database
) -> Iterator[Service]:
    """The service; its options may be a parameter."""
    made = Service(
        sqlite, **{"send_timeout": PATIENCE, **getattr(request, "param", {})}
    )
    yield made
    made.close()


def send_raw(api: Service, cell: str, **details: Any) -> list[Exception]:
    """What several attempts at one message raise, in one request."""
    raised: list[Exception] = []
    message = {"method": "reboot_instance", "args": {"number": -1}}
    details = {"target": TARGET, "ctxt": {}, "message": message, **details}

    def handler(context: Any) -> None:
        for _ in range(MANY):
            with pytest.raises(Exception) as caught:
                context.mq_connection._send(**details)
            raised.append(caught.value)

    assert api.request(cell, handler).status_int == 200
    return raised


class Answering(stack.Host):
    """A compute host that answers with what it was sent."""

    def __init__(self) -> None:
        super().__init__(HOST)

    def reboot_instance(  # type: ignore[override]
        self, ctxt: dict[str, Any], number: int
    ) -> int:
        return number


class _Unkind:
    """A context that fails as a broker would."""

    def to_dict(self) -> dict[str, Any]:
        raise ConnectionResetError("a database of the service")


CIRCLE: dict[str, Any] = {}
CIRCLE["itself"] = CIRCLE

INVALID = exceptions.InvalidMessage
MISTAKES: dict[str, tuple[dict[str, Any], type[Exception]]] = {
    "past": ({"timeout": -0.5}, oslo_messaging.MessagingTimeout),
    "now": ({"timeout": 0}, oslo_messaging.MessagingTimeout),
    "too far": ({"timeout": 1e12}, INVALID),
    "endless": ({"timeout": math.inf}, INVALID),
    "no number": ({"timeout": math.nan}, INVALID),
    "text": ({"timeout": "5"}, INVALID),
    "truth": ({"timeout": True}, INVALID),
    "monitor in the past": (
        {"timeout": 5, "call_monitor_timeout": -1},
        INVALID,
    ),
    "monitor as text": (
        {"timeout": 5, "call_monitor_timeout": "1"},
        INVALID,
    ),
    "topic too long": (
        {"target": oslo_messaging.Target(topic="t" * 300)},
        INVALID,
    ),
    "topic that is no text": (
        {"target": oslo_messaging.Target(topic=object())},
        Exception,
    ),
    "exchange of another type": (
        {"target": oslo_messaging.Target(topic="t", exchange="other")},
        INVALID,
    ),
    "exchange of the broker's": (
        {"target": oslo_messaging.Target(topic="t", exchange="amq.mine")},
        INVALID,
    ),
    "context that fails": ({"ctxt": _Unkind()}, ConnectionResetError),
    "no message": ({"message": None}, TypeError),
    "options that are none": ({"transport_options": "mandatory"}, Exception),
}


@pytest.mark.parametrize("call", [False, True])
def test_a_callers_mistake_says_nothing_against_the_cell(
    api: Service, vhost: servers.Vhost, call: bool
) -> None:
    with amqp.Connection(
        f"{vhost.broker.host}:{vhost.broker.port}",
        userid=vhost.broker.user,
        password=vhost.broker.password,
        virtual_host=vhost.name,
    ) as connection:
        connection.channel().exchange_declare(
            "other", "fanout", durable=True, auto_delete=False
        )
    cell = api.add_cell(durable(vhost.url))
    inbox = Inbox(vhost.url)
    usual: dict[str, Any] = (
        {"timeout": 5, "wait_for_reply": True} if call else {}
    )
    for name, (mistake, kind) in MISTAKES.items():
        details = {**usual, **mistake}
        for error in send_raw(api, cell, **details):
            assert isinstance(error, kind), (name, error)
            assert not isinstance(error, exceptions.CellUnavailable), name
            if isinstance(error, exceptions.SendError):
                assert not error.maybe_delivered
        outcome = api.send_one(cell)
        assert outcome.error is None, name
        assert inbox.wait_for(1) == [outcome.number]
        stats = api.guard(cell)
        assert (stats.failures, stats.failed, stats.under_way) == (0, 0, 0)
        assert api.process.pool.stats().total.opened == 1


def test_a_message_too_large_says_nothing_against_the_cell(
    api: Service, private_broker: servers.PrivateBroker
) -> None:
    limit = "application:set_env(rabbit, max_message_size, {})."
    with private_broker.vhost() as vhost:
        cell = api.add_cell(durable(vhost.url))
        inbox = Inbox(vhost.url)
        private_broker.ctl("eval", limit.format(100_000))
        try:
            raised = send_raw(
                api,
                cell,
                message={"method": "m", "args": {"it": "x" * 200_000}},
            )
        finally:
            private_broker.ctl("eval", limit.format(134_217_728))
        for error in raised:
            assert isinstance(error, exceptions.InvalidMessage), repr(error)
        (outcome,) = api.send(cell)
        assert outcome.error is None
        assert inbox.wait_for(1) == [outcome.number]
        assert api.guard(cell).failed == 0


def test_rights_that_are_missing_are_the_cells(
    api: Service, vhost: servers.Vhost
) -> None:
    with vhost.broker.new_user(PASSWORD) as user:
        vhost.broker.ctl(
            "set_permissions", "-p", vhost.name, user, "^$", "^$", "^$"
        )
        url = vhost.broker.url(vhost.name, user=user, password=PASSWORD)
        cell = api.add_cell(url)
        (outcome,) = api.send(cell)
        assert outcome.kind == "not delivered"
        assert type(outcome.error) is exceptions.CellUnavailable
        assert api.guard(cell).failures == 1


@pytest.mark.parametrize("api", [{"send_timeout": 3.0}], indirect=True)
def test_the_confirmation_of_what_was_returned_is_not_the_next_ones(
    api: Service, vhost: servers.Vhost, make_proxy: Callable[[str], Proxy]
) -> None:
    proxy = make_proxy(vhost.url)
    inbox = Inbox(vhost.url)
    cell = api.add_cell(durable(vhost.url_via(proxy.address)))
    numbers = [api.next_number() for _ in range(2)]

    def send(context: Any, number: int, **details: Any) -> None:
        message = {"method": "reboot_instance", "args": {"number": number}}
        details = {"target": TARGET, **details}
        context.mq_connection._send(ctxt={}, message=message, **details)

    def handler(context: Any) -> None:
        send(context, numbers[0])
        # The confirmation comes that much later.
        proxy.trickle(0.002)
        with pytest.raises(oslo_messaging.MessageUndeliverable):
            send(
                context,
                -1,
                target=oslo_messaging.Target(topic="nobodys"),
                transport_options=oslo_messaging.TransportOptions(
                    at_least_once=True
                ),
            )
        proxy.swallow("to_server")
        with pytest.raises(exceptions.DeliveryUncertain):
            send(context, numbers[1])

    assert api.request(cell, handler).status_int == 200
    assert inbox.numbers() == numbers[:1]


# Limits of the broker.


@pytest.mark.parametrize("limit", ["max-connections", "max-channels"])
@pytest.mark.parametrize(
    "api", [{"breaker_failures": 1}], indirect=True, ids=[""]
)
def test_a_limit_leaves_the_connections_that_work(
    api: Service, vhost: servers.Vhost, limit: str
) -> None:
    broker = vhost.broker
    outcomes: list[Outcome] = []
    start = threading.Barrier(16)
    with (
        broker.new_user(PASSWORD) as user,
        stack.serving(vhost.url, Answering(), server=HOST),
        Threads() as threads,
    ):
        broker.permit(vhost.name, user=user)
        broker.ctl("set_user_limits", user, f'{{"{limit}": 6}}')
        url = broker.url(vhost.name, user=user, password=PASSWORD)
        cell = api.add_cell(url)

        def send(kind: str) -> None:
            start.wait(PATIENCE)
            for _ in range(10):
                outcomes.extend(api.send(cell, kind, timeout=PATIENCE))

        for number in range(16):
            threads.start(send, "call" if number % 2 else "cast")
        threads.join()
        queues = list(vhost.queues())
    assert [one.error for one in outcomes if one.error] == []
    stats = api.guard(cell)
    assert (stats.sent, stats.failed, stats.went_down) == (160, 0, 0)
    assert sum(name.startswith("reply_") for name in queues) == 1
    assert api.process.pool.stats().total.opened == 1


def test_a_vhost_that_takes_no_connection_at_all_is_the_cells(
    api: Service, vhost: servers.Vhost
) -> None:
    vhost.broker.ctl(
        "set_vhost_limits", "-p", vhost.name, '{"max-connections": 0}'
    )
    cell = api.add_cell(vhost.url)
    (outcome,) = api.send(cell)
    assert outcome.kind == "not delivered"
    assert api.guard(cell).failures == 1


@pytest.mark.parametrize(
    "api", [{"max_sends_per_cell": 2, "send_timeout": 5.0}], indirect=True
)
def test_calls_that_await_their_reply_keep_nobody_out(
    api: Service, vhost: servers.Vhost
) -> None:
    cell = api.add_cell(durable(vhost.url))
    inbox = Inbox(vhost.url)
    with Threads() as threads:
        for _ in range(8):
            threads.start(lambda: api.send(cell, "call", timeout=8.0))
        inbox.wait_for(8)
        outcome = api.send_one(cell)
        assert outcome.error is None
        assert outcome.seconds < 4
    assert api.guard(cell).refused_busy == 0


# A message for which all is open.


def names_of_ours(send: Callable[[], object]) -> list[str]:
    """Which functions of the package it calls, in this thread."""
    folder = str(Path(cellmw.__file__).parent)
    names: list[str] = []

    def note(frame: FrameType, event: str, arg: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(folder):
            names.append(frame.f_code.co_qualname)

    sys.setprofile(note)
    try:
        send()
    finally:
        sys.setprofile(None)
    return names


@pytest.mark.parametrize("kind,most", [("cast", 33), ("call", 36)])
def test_a_warm_message_costs_few_functions_and_no_thread(
    api: Service, vhost: servers.Vhost, kind: str, most: int
) -> None:
    cell = api.add_cell(durable(vhost.url))
    found: list[list[str]] = []

    def handler(context: Any) -> None:
        def send() -> None:
            context.mq_connection._send(
                TARGET,
                {},
                {"method": "reboot_instance", "args": {"number": 1}},
                wait_for_reply=kind == "call",
                timeout=PATIENCE if kind == "call" else None,
            )

        send()
        send()
        found.append(names_of_ours(send))

    with stack.serving(durable(vhost.url), Answering(), server=HOST):
        assert api.request(cell, handler).status_int == 200
    (names,) = found
    # The worker's part would not be among those of this thread.
    assert "Sending.written" in names
    assert len(names) <= most, names


# Connections that were cut while nobody used them.


@pytest.mark.parametrize(
    "how,kind,times",
    [("reset", "cast", 100), ("reset", "call", 10), ("closed", "cast", 5)],
)
def test_a_message_after_a_cut_arrives_once(
    api: Service,
    vhost: servers.Vhost,
    make_proxy: Callable[[str], Proxy],
    how: str,
    kind: str,
    times: int,
) -> None:
    proxy = make_proxy(vhost.url)
    inbox = Inbox(vhost.url)
    cell = api.add_cell(durable(vhost.url_via(proxy.address)))
    cut = proxy.cut if how == "reset" else vhost.close_connections
    outcomes = api.send(cell, kind, timeout=0.05, times=times, between=cut)
    assert {one.kind for one in outcomes} == {"delivered"}
    numbers = [one.number for one in outcomes]
    if kind == "cast":
        assert inbox.wait_for(times) == numbers
    stats = api.guard(cell)
    assert (stats.sent, stats.failed) == (times, 0)
    assert api.process.pool.stats().total.opened == 1


@pytest.mark.leaves_sockets_to_gc
def test_messages_after_a_restart_of_the_broker_arrive_once(
    api: Service, private_broker: servers.PrivateBroker
) -> None:
    with private_broker.vhost() as vhost, Threads() as threads:
        inbox = Inbox(vhost.url)
        cell = api.add_cell(durable(vhost.url))
        outcomes: list[Outcome] = []
        for round_ in range(2):
            for _ in range(6):
                threads.start(lambda: outcomes.extend(api.send(cell)))
            threads.join()
            if not round_:
                private_broker.restart()
        assert {one.kind for one in outcomes} == {"delivered"}
        numbers = sorted(one.number for one in outcomes)
        assert sorted(inbox.wait_for(12)) == numbers


# A queue manager, whose reply queues keep their names.


def test_a_queue_manager_locks_where_the_file_says(
    sqlite: servers.Database, vhost: servers.Vhost, tmp_path: Path
) -> None:
    own = tmp_path / "service.conf"
    own.write_text(
        f"""
[DEFAULT]
transport_url = {vhost.url}
[oslo_messaging_rabbit]
use_queue_manager = true
hostname = {vhost.name}
processname = test
[oslo_concurrency]
lock_path = {tmp_path}
"""
    )
    database = stack.ApiDatabase(sqlite.url)
    instance = database.add_instance(database.add_cell(vhost.url))
    found: list[int] = []

    def handler(context: Any) -> None:
        client = oslo_messaging.get_rpc_client(
            context.mq_connection, TARGET, timeout=PATIENCE
        )
        found.append(client.call({}, "reboot_instance", number=7))

    for cache in ("true", "false"):
        application = cellmw.filter_factory(
            {},
            oslo_config_file=str(own),
            api_database_connection=sqlite.url,
            transport_cache=cache,
        )(stack.Api(handler))
        path = f"/servers/{instance}/action"
        with stack.serving(vhost.url, Answering(), server=HOST):
            response = stack.request(application, path, "POST")
        assert response.status_int == 200
        # As after the service's end: the next one starts from its own name.
        runtime.registry().close()
        Path(f"/dev/shm/{vhost.name}_test_qmanager").unlink()
    database.close()
    assert found == [7, 7]
