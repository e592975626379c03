# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Clients that follow the context: section 5 of the contract.

The same on cellmw-memory and on RabbitMQ.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import oslo_messaging
import pytest
from oslo_config import cfg
from oslo_context import context as oslo_context
from oslo_messaging import transport as oslo_transport

import cellmw
from cellmw import exceptions, rpc, runtime, testing
from tests.functional import stack
from tests.functional.stack import Api, ApiDatabase, Host, MakeFilter, Serve

MEMORY = [f"cellmw-memory://{host}/" for host in ("one", "two", "default")]

# Made when this module is imported, long before anything is configured.
client = rpc.get_client(stack.target(server="host", version="1.0"))
default_client = rpc.get_default_client(stack.target(server="host"))


class Cells:
    """Two cells and a default queue, with a host each, and a filter.

    :ivar hosts: of the two cells, and of the service's own queue
    """

    def __init__(
        self,
        urls: list[str],
        api_database: ApiDatabase,
        serve: Serve,
        make_filter: MakeFilter,
    ) -> None:
        self.urls = urls
        names = ("one", "two", "default")
        self.hosts = [
            serve(url, Host(name))
            for url, name in zip(urls, names, strict=True)
        ]
        self.uuids = [api_database.add_cell(url) for url in urls[:2]]
        self.instances = api_database.add_instances(self.uuids)
        self._make_filter = make_filter
        self.conf = stack.configuration(transport_url=urls[2])
        rpc.init(self.conf, allowed_remote_exmods=[stack.__name__])

    def request(
        self,
        handler: stack.Handler,
        *,
        cell: int | None = 0,
        context: Any = None,
        conf: cfg.ConfigOpts | None = None,
        **paste: Any,
    ) -> Any:
        """Do something in a request for an instance of a cell, or of none."""
        found: list[Any] = []
        path = "/servers"
        if cell is not None:
            path += f"/{self.instances[cell]}"
        environ = {} if context is None else {"cellmw.context": context}
        response = stack.request(
            self._make_filter(conf=conf, **paste)(
                Api(lambda c: found.append(handler(c)))
            ),
            path,
            "POST",
            environ=environ,
        )
        assert response.status_int == 200, response
        return found[0]

    def arrived(self) -> list[list[str]]:
        """The instances of the messages that are at the hosts."""
        return [host.instances() for host in self.hosts]


@pytest.fixture(
    params=["memory", pytest.param("rabbit", marks=pytest.mark.servers)]
)
def urls(request: pytest.FixtureRequest) -> list[str]:
    if request.param == "memory":
        return MEMORY
    make_vhost = request.getfixturevalue("make_vhost")
    return [make_vhost().url for _ in range(3)]


@pytest.fixture
def cells_anywhere(
    urls: list[str],
    api_database: ApiDatabase,
    serve: Serve,
    make_filter: MakeFilter,
) -> Cells:
    return Cells(urls, api_database, serve, make_filter)


@pytest.fixture
def cells(
    api_database: ApiDatabase, serve: Serve, make_filter: MakeFilter
) -> Cells:
    return Cells(MEMORY, api_database, serve, make_filter)


def call(of: Any, context: Any, instance: str = "x") -> Any:
    name, _ = of.call(context, "get_console_output", instance_uuid=instance)
    return name


class Foreign:
    """A service's context, whose to_dict tells all that it has."""

    def to_dict(self) -> dict[str, Any]:
        return {"user": "u", **vars(self)}


class Wrapping(oslo_messaging.Serializer):
    """A serializer as a service has it."""

    def serialize_context(self, ctxt: Any) -> dict[str, Any]:
        return {"wrapped": type(ctxt).__name__, **vars(ctxt)}

    def deserialize_context(self, ctxt: dict[str, Any]) -> dict[str, Any]:
        return ctxt

    def serialize_entity(self, ctxt: Any, entity: Any) -> Any:
        return f"<{entity}>"

    def deserialize_entity(self, ctxt: Any, entity: Any) -> Any:
        return (type(ctxt).__name__, entity)


# All that goes out at once, so that RabbitMQ is set up once


def every_way(context: Any) -> dict[str, Any]:
    """Send in each way that there is to send; what answered."""
    target = stack.target(server="host")
    router = rpc.ClientRouter(rpc.get_client(target))
    plain_router = rpc.ClientRouter(
        oslo_messaging.get_rpc_client(rpc._default.transport(), target)
    )
    client.cast(context, "reboot_instance", instance_uuid="cast")
    client.prepare(fanout=True, server=None).cast(
        context, "reboot_instance", instance_uuid="fanout"
    )
    connection = getattr(context, "mq_connection", None)
    found = {
        "get_client": call(client, context),
        "prepare": call(client.prepare(timeout=stack.SOON), context),
        "ClientRouter": call(router.client(context), context),
        "of a plain client": call(plain_router.client(context), {}),
        "get_default_client": call(default_client, context),
    }
    if connection is not None:
        found["plain"] = call(
            oslo_messaging.get_rpc_client(connection, target), {}
        )
        found["like Nova's"] = call(NovasRouter().client(context), context)
    return found


class NovasRouter:
    """A router as services have it that knew cells before.

    It makes an RPCClient for each context, from the parts of the default
    one.
    """

    def __init__(self) -> None:
        self._default = rpc.get_client(stack.target(server="host"))

    def client(self, context: Any) -> Any:
        transport = context.mq_connection
        if not transport:
            return self._default
        return oslo_messaging.get_rpc_client(
            transport,
            self._default.target,
            version_cap=self._default.version_cap,
            serializer=self._default.serializer,
            call_monitor_timeout=self._default.call_monitor_timeout,
        )


@pytest.mark.parametrize("kind", ["made here", "foreign"])
@pytest.mark.parametrize("configuration", ["private", "global"])
def test_each_way_to_send_leads_to_the_cell_of_the_context(
    cells_anywhere: Cells, configuration: str, kind: str
) -> None:
    cells = cells_anywhere
    with contextlib.ExitStack() as cleanup:
        conf = None
        if configuration == "global":
            conf = cfg.CONF
            conf([], project="cellmw-test", default_config_files=[])
            cleanup.callback(conf.reset)
        for cell, name in ((0, "one"), (1, "two"), (None, "default")):
            given = None if kind == "made here" else Foreign()
            answers = cells.request(
                every_way, cell=cell, context=given, conf=conf
            )
            assert answers.pop("get_default_client") == "default"
            assert set(answers.values()) == {name}
            assert len(answers) == (4 if cell is None else 6)
    stack.eventually(
        lambda: all("fanout" in uuids for uuids in cells.arrived())
    )
    for host in cells.hosts:
        uuids = host.instances()
        assert uuids.count("cast") == 1
        assert uuids.count("fanout") == 1
        for _, _, context in host.messages:
            assert not {"mq_connection", "cell_uuid"} & context.keys()


# Without a default


def test_without_init_a_cell_can_be_sent_to_and_the_default_cannot(
    cells: Cells,
) -> None:
    rpc.cleanup()

    def handler(context: Any) -> Any:
        for send in (default_client.cast, default_client.call):
            with pytest.raises(exceptions.RPCNotInitialized):
                send(context, "reboot_instance")
        return call(client, context)

    assert cells.request(handler) == "one"
    contexts: list[Any] = [{}, cellmw.RequestContext(), Foreign()]
    for context in contexts:
        for send in (client.cast, client.call):
            with pytest.raises(exceptions.RPCNotInitialized) as caught:
                send(context, "reboot_instance")
            assert isinstance(caught.value, oslo_messaging.MessagingException)
            assert isinstance(caught.value, exceptions.CellMWError)
            assert "init" in str(caught.value)


def test_init_may_be_called_again(cells: Cells) -> None:
    assert call(client, {}) == "default"
    before = testing.broker_of(cells.urls[2]).stats().transports
    rpc.init(stack.configuration(transport_url=cells.urls[1]))
    assert call(client, {}) == "two"
    assert testing.broker_of(cells.urls[2]).stats().transports == before - 1
    rpc.cleanup()
    rpc.cleanup()
    with pytest.raises(exceptions.RPCNotInitialized):
        client.cast({}, "reboot_instance")


def test_init_opens_no_connection_and_no_thread(memory: None) -> None:
    threads = threading.active_count()
    rpc.init(stack.configuration(transport_url=MEMORY[2]))
    made = rpc.get_client(stack.target(server="host"))
    made.prepare(timeout=1)
    assert testing.broker_of(MEMORY[2]).stats().connections == 0
    assert threading.active_count() == threads
    rpc.cleanup()


# Serializers and contexts


def test_a_serializer_is_used_for_all_that_it_serializes(
    cells: Cells,
) -> None:
    made = rpc.get_client(stack.target(server="host"), serializer=Wrapping())
    kind, answer = cells.request(
        lambda context: made.call(
            context, "get_console_output", instance_uuid="x"
        ),
        context=Foreign(),
    )
    assert kind == "Foreign"
    assert answer == ["one", "<x>"]
    ((_, uuid, context),) = cells.hosts[0].messages
    assert uuid == "<x>"
    assert context["wrapped"] == "Foreign"
    assert not {"mq_connection", "cell_uuid"} & context.keys()


class Entities(oslo_messaging.NoOpSerializer):
    """A serializer that is asked for the contexts of entities."""

    def __init__(self) -> None:
        self.contexts: list[Any] = []

    def serialize_entity(self, ctxt: Any, entity: Any) -> Any:
        self.contexts.append(ctxt)
        return entity

    def deserialize_entity(self, ctxt: Any, entity: Any) -> Any:
        self.contexts.append(ctxt)
        return entity

    def serialize_context(self, ctxt: Any) -> Any:
        return ctxt.to_dict()


def test_a_serializer_sees_the_callers_own_context(cells: Cells) -> None:
    entities = Entities()
    made = rpc.get_client(stack.target(server="host"), serializer=entities)
    mine = cells.request(
        lambda context: call(made, context) and context, context=Foreign()
    )
    assert entities.contexts == [mine, mine]


def test_a_context_may_be_a_dict(cells: Cells) -> None:
    local = {"mq_connection", "cell_uuid", "db_connection"}
    context = {"user": "u", **{name: object() for name in local}}
    assert call(client, context) == "default"
    ((_, _, arrived),) = cells.hosts[2].messages
    assert arrived["user"] == "u"
    assert not local & arrived.keys()
    assert context.keys() == {"user"} | local


def test_a_context_that_is_neither_is_an_error(cells: Cells) -> None:
    with pytest.raises(TypeError, match="to_dict"):
        client.cast(object(), "reboot_instance")


def test_what_travels_of_our_context_is_what_oslo_context_has(
    cells: Cells,
) -> None:
    def handler(context: Any) -> Any:
        call(client, context)
        # A plain client has no serializer: the driver asks for to_dict.
        call(
            oslo_messaging.get_rpc_client(
                context.mq_connection, stack.target(server="host")
            ),
            context,
        )
        return oslo_context.RequestContext().to_dict().keys()

    expected = cells.request(handler)
    for _, _, arrived in cells.hosts[0].messages:
        assert arrived.keys() - {"client_timeout"} == expected


# One client for all messages


def test_no_client_is_built_for_a_message(
    cells: Cells, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first message of a transport makes it.
    cells.request(lambda context: call(client, context))
    router = rpc.ClientRouter(rpc.get_client(stack.target(server="host")))
    call(default_client, {})
    built: list[Any] = []
    original = oslo_messaging.RPCClient.__init__

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        built.append(self)
        original(self, *args, **kwargs)

    registered: list[Any] = []
    register = cfg.ConfigOpts.register_opts

    def count(self: Any, *args: Any, **kwargs: Any) -> Any:
        registered.append(self)
        return register(self, *args, **kwargs)

    def handler(context: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(oslo_messaging.RPCClient, "__init__", counted)
            patch.setattr(cfg.ConfigOpts, "register_opts", count)
            for _ in range(3):
                call(client, context)
                call(client.prepare(timeout=5), context)
                call(router.client(context), context)
                call(default_client, context)
                client.cast(context, "reboot_instance")

    cells.request(handler)
    assert built == []
    # It would empty the configuration's cache of values.
    assert registered == []


# What oslo.messaging is given


class Sends:
    """What a driver is given with each message."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.options: list[dict[str, Any]] = []
        original = oslo_transport.Transport._send

        def send(transport: Any, *args: Any, **kwargs: Any) -> Any:
            self.options.append(kwargs)
            return original(transport, *args, **kwargs)

        monkeypatch.setattr(oslo_transport.Transport, "_send", send)

    def take(self, name: str) -> set[Any]:
        found = {options[name] for options in self.options}
        self.options.clear()
        return found


RETRIES: dict[str, Callable[[Any], Any]] = {
    "get_client": lambda context: rpc.get_client(
        stack.target(server="host"), retry=5
    ),
    "get_client without one": lambda context: rpc.get_client(
        stack.target(server="host")
    ),
    "prepare": lambda context: client.prepare(retry=5),
    "prepare without end": lambda context: client.prepare(retry=None),
    "get_default_client": lambda context: rpc.get_default_client(
        stack.target(server="host"), retry=-1
    ),
    "ClientRouter": lambda context: rpc.ClientRouter(
        rpc.get_client(stack.target(server="host"), retry=3)
    ).client(context),
    "a plain client": lambda context: oslo_messaging.get_rpc_client(
        context.mq_connection, stack.target(server="host"), retry=7
    ),
    "a plain client without one": (
        lambda context: oslo_messaging.get_rpc_client(
            context.mq_connection, stack.target(server="host")
        )
    ),
}


@pytest.mark.parametrize("way", RETRIES)
def test_a_message_is_handed_over_once_whatever_the_caller_wants(
    way: str, cells: Cells, monkeypatch: pytest.MonkeyPatch
) -> None:
    sends = Sends(monkeypatch)

    def handler(context: Any) -> None:
        made = RETRIES[way](context)
        made.cast(context, "reboot_instance")
        call(made, context)

    cells.request(handler)
    assert len(sends.options) == 2
    assert sends.take("retry") == {0}


def test_the_other_options_of_a_client_arrive(
    cells: Cells, monkeypatch: pytest.MonkeyPatch
) -> None:
    sends = Sends(monkeypatch)
    made = rpc.get_client(stack.target(server="host"), call_monitor_timeout=7)

    def handler(context: Any) -> None:
        call(made.prepare(timeout=9), context)
        assert sends.take("timeout") == {9}
        call(made, context)
        assert sends.take("call_monitor_timeout") == {7}
        call(made.prepare(call_monitor_timeout=8), context)
        assert sends.take("call_monitor_timeout") == {8}

    for cell in (0, None):
        cells.request(handler, cell=cell)


@pytest.mark.parametrize("cell", [0, None])
def test_a_call_without_a_timeout_has_the_configured_one(
    cell: int | None, cells: Cells, monkeypatch: pytest.MonkeyPatch
) -> None:
    sends = Sends(monkeypatch)
    cells.conf.set_override("rpc_response_timeout", 33)

    def handler(context: Any) -> None:
        call(client, context)
        assert sends.take("timeout") == {33}
        client.cast(context, "reboot_instance")
        assert sends.take("timeout") == {None}

    cells.request(handler, cell=cell, conf=cells.conf)


def test_a_call_that_nobody_answers_times_out(cells: Cells) -> None:
    nobody = client.prepare(server="nobody", timeout=0.1)

    def handler(context: Any) -> None:
        with pytest.raises(oslo_messaging.MessagingTimeout):
            nobody.call(context, "get_console_output")
        # That says nothing about the cell.
        assert call(client, context) == "one"

    cells.request(handler, breaker_failures="1")


def test_version_caps_hold(cells: Cells) -> None:
    made = rpc.get_client(
        stack.target(server="host", version="1.0"), version_cap="1.1"
    )
    assert made.can_send_version("1.1")
    assert not made.can_send_version("1.2")
    assert made.prepare(version="1.1").can_send_version()

    def handler(context: Any) -> None:
        for of in (made, rpc.ClientRouter(made).client(context)):
            assert of.can_send_version("1.1")
            assert not of.can_send_version("2.0")
            with pytest.raises(oslo_messaging.RPCVersionCapError):
                of.prepare(version="1.2").cast(context, "reboot_instance")

    cells.request(handler)
    assert cells.arrived() == [[], [], []]


# What comes back


@pytest.mark.parametrize("cell", [0, None])
def test_exceptions_of_allowed_modules_come_back(
    cell: int | None, cells: Cells
) -> None:
    def handler(context: Any) -> None:
        with pytest.raises(stack.AllowedError, match="no such disk"):
            client.call(context, "fail", text="no such disk")

    cells.request(handler, cell=cell, allowed_remote_exmods=stack.__name__)


def test_other_exceptions_come_back_as_remote_errors(cells: Cells) -> None:
    def handler(context: Any) -> None:
        with pytest.raises(oslo_messaging.RemoteError, match="no such disk"):
            client.call(context, "fail", text="no such disk")

    cells.request(handler, breaker_failures="1")
    # What the host has raised does not count against its cell.
    assert cells.request(lambda c: call(client, c), breaker_failures="1")


# At most once


def test_an_error_tells_whether_the_message_may_have_arrived(
    cells: Cells,
) -> None:
    broker = testing.broker_of(cells.urls[0])

    def handler(context: Any) -> None:
        broker.lose_confirms()
        with pytest.raises(exceptions.DeliveryUncertain) as caught:
            client.cast(context, "reboot_instance", instance_uuid="once")
        assert caught.value.maybe_delivered
        broker.heal()

    cells.request(handler)
    stack.eventually(lambda: cells.hosts[0].instances() == ["once"])
    assert broker.stats().published == 1


def test_a_message_that_was_not_delivered_says_so(
    cells: Cells, runtimes: runtime.Registry
) -> None:
    broker = testing.broker_of(cells.urls[0])
    broker.require_credentials("somebody", "else")

    def handler(context: Any) -> None:
        with pytest.raises(exceptions.CellUnavailable) as caught:
            client.cast(context, "reboot_instance", instance_uuid="never")
        assert not caught.value.maybe_delivered
        assert caught.value.cell_uuid == cells.uuids[0]

    cells.request(handler)
    assert broker.stats().published == 0


@pytest.fixture(autouse=True)
def _no_default_left() -> Iterator[None]:
    yield
    rpc.cleanup()
