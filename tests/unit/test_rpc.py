# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Which transport a message is given to, and with what."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import oslo_messaging
import pytest
from oslo_config import cfg
from oslo_messaging.transport import RPCTransport

from cellmw import exceptions, redaction, rpc, testing
from cellmw.context import RequestContext
from cellmw.testing.memory import MemoryDriver
from cellmw.transports import oslo

TARGET = oslo_messaging.Target(topic="compute", server="host", version="1.0")
# At import time, as services do.
client = rpc.get_client(TARGET)


def configuration(**options: Any) -> cfg.ConfigOpts:
    conf = cfg.ConfigOpts()
    conf([], project="cellmw-test", default_config_files=[])
    oslo.prepare(conf)
    for name, value in options.items():
        conf.set_override(name, value)
    return conf


class Recorder(RPCTransport):
    """A transport that notes what it is given."""

    def __init__(self, conf: cfg.ConfigOpts | None = None) -> None:
        self.conf = conf or configuration()
        self.sent: list[tuple[Any, ...]] = []
        self.options: list[dict[str, Any]] = []

    def _send(
        self, target: Any, ctxt: Any, message: Any, **options: Any
    ) -> Any:
        self.sent.append((target.server, ctxt, message["method"]))
        self.options.append(options)
        return "answer"

    def cleanup(self) -> None:
        raise AssertionError("it is somebody else's")


class Context:
    """A context of a service."""

    def __init__(self, mq_connection: Any = None) -> None:
        self.mq_connection = mq_connection
        self.cell_uuid = "the-cell"

    def to_dict(self) -> dict[str, Any]:
        return {"user": "u", **vars(self)}


@pytest.fixture
def default(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """The default transport, as init() has set it up."""
    recorder = Recorder()

    def make(conf: cfg.ConfigOpts, **options: Any) -> Recorder:
        recorder.conf = conf
        return recorder

    with monkeypatch.context() as patch:
        patch.setattr(oslo_messaging, "get_rpc_transport", make)
        rpc.init(configuration(rpc_response_timeout=11))
    yield recorder
    monkeypatch.setattr(recorder, "cleanup", lambda: None)
    rpc.cleanup()


def test_a_message_goes_to_the_transport_of_its_context(
    default: Recorder,
) -> None:
    one, two = Recorder(), Recorder()
    for recorder in (one, two, one):
        assert client.call(Context(recorder), "do", x=1) == "answer"
    client.cast(Context(two), "do")
    assert [len(r.sent) for r in (one, two, default)] == [2, 2, 0]


@pytest.mark.parametrize(
    "context",
    [{}, {"mq_connection": Recorder()}, Context(), RequestContext()],
    ids=["a dict", "a dict with the name", "a service's", "ours"],
)
def test_without_one_it_goes_to_the_default(
    context: Any, default: Recorder
) -> None:
    client.cast(context, "do")
    assert len(default.sent) == 1
    _, ctxt, _ = default.sent[0]
    assert not {"mq_connection", "cell_uuid"} & ctxt.keys()


def test_a_transport_that_is_false_counts_as_one(default: Recorder) -> None:
    class Falsy(Recorder):
        def __bool__(self) -> bool:
            return False

    recorder = Falsy()
    client.cast(Context(recorder), "do")
    assert len(recorder.sent) == 1
    assert default.sent == []


def test_the_default_client_looks_at_no_context(default: Recorder) -> None:
    recorder = Recorder()
    rpc.get_default_client(TARGET).call(Context(recorder), "do")
    assert recorder.sent == []
    assert len(default.sent) == 1


def test_what_travels_is_a_plain_dict_without_the_two_names(
    default: Recorder,
) -> None:
    recorder = Recorder()
    context = Context(recorder)
    client.cast(context, "do")
    ((_, ctxt, _),) = recorder.sent
    assert type(ctxt) is dict
    assert ctxt == {"user": "u"}
    assert context.mq_connection is recorder
    assert context.cell_uuid == "the-cell"


def test_a_dict_that_is_passed_is_not_changed(default: Recorder) -> None:
    context = {"user": "u", "cell_uuid": "c", "db_connection": "d"}
    client.cast(context, "do")
    assert context == {"user": "u", "cell_uuid": "c", "db_connection": "d"}


@pytest.mark.parametrize("context", [None, object(), 7, "text"])
def test_what_is_no_context_is_a_type_error(
    context: Any, default: Recorder
) -> None:
    with pytest.raises(TypeError, match=r"to_dict"):
        client.cast(context, "do")
    assert default.sent == []


class Serializer(oslo_messaging.Serializer):
    def serialize_context(self, ctxt: Any) -> dict[str, Any]:
        return {"by": "serializer", **ctxt.to_dict()}

    def deserialize_context(self, ctxt: Any) -> Any:
        return ("deserialized", ctxt)

    def serialize_entity(self, ctxt: Any, entity: Any) -> Any:
        return (type(ctxt).__name__, entity)

    def deserialize_entity(self, ctxt: Any, entity: Any) -> Any:
        return (type(ctxt).__name__, entity)


def test_a_serializer_has_the_callers_context(default: Recorder) -> None:
    recorder = Recorder()
    made = rpc.get_client(TARGET, serializer=Serializer())
    answer = made.call(Context(recorder), "do", x=1)
    assert answer == ("Context", "answer")
    ((_, ctxt, _),) = recorder.sent
    assert ctxt == {"by": "serializer", "user": "u"}
    assert made.serializer.deserialize_context({}) == ("deserialized", {})


# retry, timeout


@pytest.mark.parametrize("retry", [None, -1, 0, 1, 5])
def test_retry_is_taken_and_not_used(
    retry: int | None, default: Recorder
) -> None:
    recorder = Recorder()
    for made in (
        rpc.get_client(TARGET, retry=retry),
        rpc.get_default_client(TARGET, retry=retry),
        client.prepare(retry=retry),
    ):
        made.cast(Context(recorder), "do")
        made.call(Context(recorder), "do")
        made.call(Context(), "do")
    for options in (*recorder.options, *default.options):
        assert options["retry"] == 0


def test_a_call_has_the_timeout_of_the_transports_configuration(
    default: Recorder,
) -> None:
    recorder = Recorder(configuration(rpc_response_timeout=7))
    client.call(Context(recorder), "do")
    client.call(Context(), "do")
    assert recorder.options[0]["timeout"] == 7
    assert default.options[0]["timeout"] == 11
    client.prepare(timeout=3).call(Context(recorder), "do")
    assert recorder.options[1]["timeout"] == 3


def test_a_cast_has_none(default: Recorder) -> None:
    client.cast(Context(), "do")
    assert default.options[0]["timeout"] is None
    assert not default.options[0]["wait_for_reply"]


def test_the_rest_is_handed_on(default: Recorder) -> None:
    options = oslo_messaging.TransportOptions(at_least_once=True)
    made = rpc.get_client(TARGET, call_monitor_timeout=9)
    made.prepare(transport_options=options).call(Context(), "do")
    assert default.options[0]["call_monitor_timeout"] == 9
    assert default.options[0]["transport_options"] is options
    assert default.options[0]["wait_for_reply"]


def test_versions_are_capped(default: Recorder) -> None:
    made = rpc.get_client(TARGET, version_cap="1.4")
    assert made.can_send_version("1.4")
    assert not made.can_send_version("1.5")
    with pytest.raises(oslo_messaging.RPCVersionCapError):
        made.prepare(version="1.5").cast({}, "do")
    assert default.sent == []


# The default transport


@pytest.mark.parametrize("make", [rpc.get_client, rpc.get_default_client])
def test_a_default_that_was_not_set_up_is_an_error_at_the_first_send(
    make: Any,
) -> None:
    made = make(TARGET)
    made.prepare(timeout=1)
    for send in (made.cast, made.call):
        with pytest.raises(exceptions.RPCNotInitialized, match="init"):
            send({}, "do")
    # A cell needs no default.
    if make is rpc.get_client:
        assert made.call(Context(Recorder()), "do") == "answer"


def test_a_second_init_closes_the_first_when_the_second_serves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Closing can take seconds, in which others send."""
    published: list[int] = []
    with testing.own_brokers():
        rpc.init(configuration(transport_url="cellmw-memory://one/"))
        client.cast({}, "do")

        def closing(driver: MemoryDriver) -> None:
            client.cast({}, "do")
            published.append(testing.broker("two").stats().published)

        with monkeypatch.context() as patch:
            patch.setattr(MemoryDriver, "cleanup", closing)
            rpc.init(configuration(transport_url="cellmw-memory://two/"))
        rpc.cleanup()
    assert published == [1]


def test_a_client_made_before_init_uses_what_init_sets_up() -> None:
    with testing.own_brokers():
        rpc.init(configuration(transport_url="cellmw-memory://one/"))
        client.cast({}, "do")
        assert testing.broker("one").stats().published == 1
        rpc.init(configuration(transport_url="cellmw-memory://two/"))
        client.cast({}, "do")
        assert testing.broker("one").stats().published == 1
        assert testing.broker("one").stats().transports == 0
        assert testing.broker("two").stats().published == 1
        rpc.cleanup()
        assert testing.broker("two").stats().transports == 0
        with pytest.raises(exceptions.RPCNotInitialized):
            client.cast({}, "do")


def test_the_defaults_password_is_known_until_it_is_cleaned_up() -> None:
    first, second = (f"pass-{number}-not-for-logs" for number in (1, 2))
    with testing.own_brokers():
        for password in (first, second):
            url = f"cellmw-memory://u:{password}@one/"
            rpc.init(configuration(transport_url=url))
            assert redaction.scrub(password) == "***"
        assert redaction.scrub(first) == first
        bad = f"nosuchdriver://u:{first}@h/"
        with pytest.raises(oslo_messaging.DriverLoadFailure):
            rpc.init(configuration(transport_url=bad))
        assert redaction.scrub(first) == first
        rpc.cleanup()
        assert redaction.scrub(second) == second


def test_an_init_that_fails_leaves_the_default_as_it_was(
    default: Recorder,
) -> None:
    with pytest.raises(oslo_messaging.DriverLoadFailure):
        rpc.init(configuration(transport_url="nosuchdriver://h/"))
    client.cast({}, "do")
    assert len(default.sent) == 1


# ClientRouter


@pytest.mark.parametrize("plain", [True, False])
def test_a_router_gives_the_default_client_where_no_cell_is_named(
    plain: bool, default: Recorder
) -> None:
    made = oslo_messaging.get_rpc_client(default, TARGET) if plain else client
    router = rpc.ClientRouter(made)
    for context in (Context(), RequestContext(), {}, object()):
        assert router.client(context) is made


@pytest.mark.parametrize("plain", [True, False])
def test_a_routers_client_is_for_the_contexts_cell(
    plain: bool, default: Recorder
) -> None:
    made = (
        oslo_messaging.get_rpc_client(
            default, TARGET, version_cap="1.3", serializer=Serializer()
        )
        if plain
        else rpc.get_client(TARGET, version_cap="1.3", serializer=Serializer())
    )
    before = dict(vars(made))
    recorder = Recorder(configuration(rpc_response_timeout=7))
    context = Context(recorder)
    routed = rpc.ClientRouter(made).client(context)
    assert type(routed) is type(made)
    assert routed.call(context, "do") == ("Context", "answer")
    ((server, ctxt, method),) = recorder.sent
    assert (server, method) == ("host", "do")
    assert ctxt["by"] == "serializer"
    assert recorder.options[0]["timeout"] == 7
    assert not routed.can_send_version("1.4")
    assert routed.prepare(server="another").call(context, "do")
    assert recorder.sent[1][0] == "another"
    # The default client is what it was.
    assert vars(made) == before
    assert default.sent == []


def test_clients_can_be_copied(default: Recorder) -> None:
    recorder = Recorder()
    copy.copy(client).cast(Context(recorder), "do")
    assert len(recorder.sent) == 1
