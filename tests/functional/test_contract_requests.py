# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What a request gets: section 3 of the contract, row by row."""

from __future__ import annotations

import functools
import json
import logging
import pickle
import uuid as uuids
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import oslo_messaging
import pytest
from oslo_context import context as oslo_context
from oslo_messaging.transport import RPCTransport

import cellmw
from cellmw import exceptions, rpc, runtime, testing
from cellmw.cells.mapping import CELL0_UUID
from tests.functional import stack
from tests.functional.stack import Api, ApiDatabase, MakeFilter, Serve

SECRET = "s3cr3t-Passw0rd"  # to be recognized
ONE = f"cellmw-memory://cell:{SECRET}@one/cell1"
TWO = f"cellmw-memory://cell:{SECRET}@two/cell2"
DEFAULT = "cellmw-memory://default/"
KEY = "service.context"


class Foreign:
    """A context that is nobody's subclass and has no such attributes."""

    def __init__(self) -> None:
        self.user = "u"

    def to_dict(self) -> dict[str, Any]:
        return {"user": self.user}


class ServiceContext(oslo_context.RequestContext):
    """What a service like Nova has."""


@pytest.fixture(params=["made here", "foreign", "of oslo.context"])
def kind(request: pytest.FixtureRequest) -> Callable[[], Any]:
    """Makes what stands in the environ already, or None."""
    made: dict[str, Callable[[], Any]] = {
        "made here": lambda: None,
        "foreign": Foreign,
        "of oslo.context": ServiceContext,
    }
    return made[request.param]


class Service:
    """A filter with an application that tells what it got."""

    def __init__(
        self, kind: Callable[[], Any], make_filter: MakeFilter, **paste: Any
    ) -> None:
        self.api = Api(key=KEY)
        self._kind = kind
        self._application = make_filter(context_key=KEY, **paste)(self.api)

    def get(
        self,
        path: str,
        handler: stack.Handler = type,
        method: str = "GET",
        headers: dict[str, str] | None = None,
    ) -> Any:
        self.api.handler = handler
        context = self._kind()
        environ = {} if context is None else {KEY: context}
        response = stack.request(
            self._application, path, method, headers=headers, environ=environ
        )
        if response.status_int == 200 and context is not None:
            assert self.api.contexts[-1] is context
        return response

    def context_for(
        self,
        path: str,
        handler: stack.Handler = type,
        headers: dict[str, str] | None = None,
    ) -> Any:
        """The context that the application got for this path."""
        response = self.get(path, handler, headers=headers)
        assert response.status_int == 200
        assert response.headers["X-From"] == "application"
        return self.api.contexts[-1]


Services = Callable[..., Service]


@pytest.fixture
def service(kind: Callable[[], Any], make_filter: MakeFilter) -> Services:
    def make(**paste: Any) -> Service:
        return Service(kind, make_filter, **paste)

    return make


@pytest.fixture
def default_host(serve: Serve, runtimes: object) -> Iterator[stack.Host]:
    """A host on the service's own queue, where nothing may arrive.

    A message that may arrive proves at the end that it would have.
    """
    host = serve(DEFAULT)
    rpc.init(stack.configuration(transport_url=DEFAULT))
    yield host
    for method in ("reboot_instance", "get_console_output"):
        client().call({}, method, instance_uuid="last")
    assert host.instances() == ["last", "last"]


def client(timeout: float = stack.SOON) -> oslo_messaging.RPCClient:
    target = oslo_messaging.Target(topic=stack.TOPIC)
    return rpc.get_client(target).prepare(server="host", timeout=timeout)


def refusals(context: Any) -> list[exceptions.SendError]:
    """What a cast and a call through a context raise."""
    found = []
    # A call that no host gets ends with the test.
    for send in (client().cast, client(timeout=0.2).call):
        with pytest.raises(exceptions.SendError) as caught:
            send(context, "reboot_instance", instance_uuid="x")
        assert isinstance(caught.value, oslo_messaging.MessagingException)
        found.append(caught.value)
    return found


# No instance


def test_a_request_without_an_instance_leaves_a_context_untouched(
    make_filter: MakeFilter, tmp_path: Path
) -> None:
    application = make_filter(
        context_key=KEY, database=f"sqlite:///{tmp_path}/none/there"
    )(Api(key=KEY))
    for context in (Foreign(), ServiceContext()):
        before = dict(vars(context))
        response = stack.request(
            application, "/v2.1/demo/servers/detail", environ={KEY: context}
        )
        assert response.status_int == 200
        assert vars(context) == before


def test_a_request_without_an_instance_gets_a_context_with_none_in_it(
    make_filter: MakeFilter, tmp_path: Path
) -> None:
    api = Api()
    application = make_filter(database=f"sqlite:///{tmp_path}/none/there")(api)
    assert stack.request(application, "/servers").status_int == 200
    (context,) = api.contexts
    assert type(context) is cellmw.RequestContext
    assert context.mq_connection is None
    assert context.cell_uuid is None


def test_the_database_is_not_asked_for_a_path_without_an_instance(
    runtimes: runtime.Registry, service: Services
) -> None:
    made = service()
    made.get("/v2.1/demo/flavors/6f70656e-7374-6163-6b20-346576657221")
    (shared,) = runtimes
    assert shared.process().directory.stats().queries == 0


# An instance for another reader only


@pytest.mark.parametrize(
    "path", ["/servers/{}%0A", "/v2.1//demo/servers/{}", "/SERVERS/{}/action"]
)
def test_a_path_that_another_reader_takes_for_an_instances_cannot_send(
    path: str,
    service: Services,
    out_of_reach: str,
    default_host: stack.Host,
    runtimes: runtime.Registry,
) -> None:
    made = service(database=out_of_reach)
    errors: list[exceptions.SendError] = []
    context = made.context_for(
        path.format("6f70656e-7374-6163-6b20-346576657221"),
        lambda context: errors.extend(refusals(context)),
    )
    assert isinstance(context.mq_connection, RPCTransport)
    assert vars(context)["cell_uuid"] is None
    assert {type(error) for error in errors} == {exceptions.AmbiguousPath}
    (shared,) = runtimes
    assert shared.process().directory.stats().queries == 0


# Mapped to a cell


def sent(context: Any) -> list[str]:
    """Cast and call; gives what the host answered."""
    assert isinstance(context.mq_connection, RPCTransport)
    client().cast(context, "reboot_instance", instance_uuid="cast")
    answer: list[str] = client().call(
        context, "get_console_output", instance_uuid="call"
    )
    return answer


def has_got(host: stack.Host, count: int) -> bool:
    return len(host.messages) == count


def test_a_mapped_instance_gets_its_cells_transport(
    service: Services,
    api_database: ApiDatabase,
    serve: Serve,
    default_host: stack.Host,
) -> None:
    made = service()
    hosts = [serve(ONE), serve(TWO)]
    for url, host in zip((ONE, TWO), hosts, strict=True):
        cell = api_database.add_cell(url)
        instance = api_database.add_instance(cell)
        response = made.get(
            f"/v2.1/demo/servers/{instance}/action",
            lambda context: (sent(context), context.cell_uuid),
            "POST",
        )
        assert response.text == repr(([url, "call"], cell))
        stack.eventually(functools.partial(has_got, host, 2))
        assert sorted(host.instances()) == ["call", "cast"]


def test_an_upper_case_uuid_finds_the_instance(
    service: Services, api_database: ApiDatabase
) -> None:
    cell = api_database.add_cell(ONE)
    instance = api_database.add_instance(cell)
    context = service().context_for(f"/servers/{instance.upper()}")
    assert context.cell_uuid == cell


def test_script_name_is_not_looked_at(
    service: Services, api_database: ApiDatabase, make_filter: MakeFilter
) -> None:
    cell = api_database.add_cell(ONE)
    instance = api_database.add_instance(cell)
    other = api_database.add_instance(None)
    api = Api()
    application = make_filter()(api)
    for script_name, path in (
        ("/v2.1", f"/servers/{instance}"),
        ("/compute/v2.1", f"/demo/servers/{instance}"),
        (f"/servers/{other}", f"/servers/{instance}"),
    ):
        stack.request(application, path, environ={"SCRIPT_NAME": script_name})
        assert api.contexts[-1].cell_uuid == cell
    stack.request(
        application, "/action", environ={"SCRIPT_NAME": f"/servers/{instance}"}
    )
    assert api.contexts[-1].cell_uuid is None


def test_the_path_is_taken_as_the_server_decoded_it(
    api_database: ApiDatabase, make_filter: MakeFilter
) -> None:
    cell = api_database.add_cell(ONE)
    instance = api_database.add_instance(cell)
    api = Api()
    application = make_filter()(api)
    # WebOb decodes once, as a server does.
    for path, found in (
        (f"/servers%2F{instance}", cell),
        (f"/%73ervers/{instance}", cell),
        (f"/servers%252F{instance}", None),
        (f"/servers/{instance}%252Faction", None),
        (f"/a%252Fb/servers/{instance}", cell),
        (f"/a%2Fb/servers/{instance}", None),
    ):
        stack.request(application, path)
        assert api.contexts[-1].cell_uuid == found, path


def test_a_cell_that_is_disabled_is_sent_to_all_the_same(
    service: Services, api_database: ApiDatabase, serve: Serve
) -> None:
    serve(ONE)
    cell = api_database.add_cell(ONE, disabled=True)
    instance = api_database.add_instance(cell)
    context = service().context_for(f"/servers/{instance}", sent)
    assert context.cell_uuid == cell


def test_an_instance_that_is_queued_for_delete_is_sent_to_all_the_same(
    service: Services, api_database: ApiDatabase, serve: Serve
) -> None:
    serve(ONE)
    cell = api_database.add_cell(ONE)
    instance = api_database.add_instance(cell, queued_for_delete=True)
    context = service().context_for(f"/servers/{instance}", sent)
    assert context.cell_uuid == cell


# No mapping, or none with a cell


@pytest.mark.parametrize("mapped", [False, True])
def test_an_instance_without_a_cell_gets_none(
    mapped: bool, service: Services, api_database: ApiDatabase
) -> None:
    instance = "6f70656e-7374-6163-6b20-346576657221"
    if mapped:
        instance = api_database.add_instance(None)
    context = service().context_for(f"/servers/{instance}")
    assert vars(context)["mq_connection"] is None
    assert vars(context)["cell_uuid"] is None


def test_an_instance_is_found_as_soon_as_it_is_scheduled(
    service: Services, api_database: ApiDatabase
) -> None:
    cell = api_database.add_cell(ONE)
    instance = api_database.add_instance(None)
    made = service()
    path = f"/servers/{instance}"
    assert made.context_for(path).cell_uuid is None
    api_database.move_instance(instance, cell)
    assert made.context_for(path).cell_uuid == cell


# cell0


@pytest.mark.parametrize(
    "uuid, url",
    [
        (CELL0_UUID, "none:///"),
        (CELL0_UUID, ONE),
        (CELL0_UUID, None),
        (CELL0_UUID, "rabbit://{username}@nowhere/"),
        (None, "none:///"),
        (None, "none://"),
    ],
)
def test_cell0_refuses_to_send(
    uuid: str | None,
    url: str | None,
    service: Services,
    api_database: ApiDatabase,
    default_host: stack.Host,
    serve: Serve,
) -> None:
    host = serve(ONE)
    cell = api_database.add_cell(url, uuid=uuid)
    instance = api_database.add_instance(cell)
    context = service().context_for(
        f"/servers/{instance}",
        lambda context: [
            pytest.fail(f"{error!r}")
            for error in refusals(context)
            if type(error) is not exceptions.CellHasNoQueue
            or error.cell_uuid != cell
        ],
    )
    assert isinstance(context.mq_connection, RPCTransport)
    assert context.cell_uuid == cell
    assert host.messages == []


# A mapping that cannot be used


@pytest.mark.parametrize(
    "url, wrong",
    [
        (None, "empty"),
        ("", "empty"),
        (SECRET, "driver"),
        (f"rabbit:/{SECRET}@host/", "driver"),
        (f"://u:{SECRET}@host/", "driver"),
        (f"rabbit://u:{SECRET}@host:port/", "port"),
        (f"rabbit://u:{SECRET}@host:99999/", "port"),
        (f"rabbit://u:{SECRET}@[::1/", "host"),
        (f"zeromq://u:{SECRET}@host/", "driver"),
        (f"{{scheme}}://u:{SECRET}@{{nothing}}/", "brace"),
        (f"rabbit://u:{SECRET}@{{hostname}}/", "hostname"),
        (f"rabbit://u:{SECRET}@{{hostname/", "brace"),
        (f"rabbit://u:{SECRET}@host/?unknown_option=1", "query"),
    ],
)
def test_a_mapping_that_cannot_be_used_refuses_and_says_why(
    url: str | None,
    wrong: str,
    service: Services,
    api_database: ApiDatabase,
    default_host: stack.Host,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cell = api_database.add_cell(url, name="broken-cell")
    instance = api_database.add_instance(cell)
    errors: list[exceptions.SendError] = []
    # With nothing for a template but a scheme.
    conf = stack.configuration(transport_url="rabbit://")
    context = service(conf=conf).context_for(
        f"/servers/{instance}",
        lambda context: errors.extend(refusals(context)),
    )
    assert isinstance(context.mq_connection, RPCTransport)
    assert context.cell_uuid == cell
    for error in errors:
        assert type(error) is exceptions.CellMisconfigured
        assert not error.maybe_delivered
        assert error.cell_uuid == cell
        assert cell in str(error)
        assert "broken-cell" in str(error)
        assert error.cause
        assert not (url and url in str(error))
        for text in (str(error), repr(error), repr(vars(error))):
            assert SECRET not in text
    with pytest.raises(exceptions.CellMisconfigured, match=wrong):
        raise errors[0]
    assert SECRET not in caplog.text


# The API database cannot be asked


@pytest.fixture
def out_of_reach(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/{SECRET}/none"


INSTANCE = "/v2.1/demo/servers/6f70656e-7374-6163-6b20-346576657221"


def test_without_the_database_the_answer_is_503(
    service: Services, out_of_reach: str, caplog: pytest.LogCaptureFixture
) -> None:
    made = service(database=out_of_reach)
    response = made.get(INSTANCE)
    is_a_fault(response)
    assert made.api.contexts == []
    assert SECRET not in response.text + caplog.text


def test_without_the_database_a_request_may_go_on_and_cannot_send(
    service: Services, out_of_reach: str, default_host: stack.Host
) -> None:
    made = service(database=out_of_reach, on_lookup_failure="pass")
    errors: list[exceptions.SendError] = []
    context = made.context_for(
        INSTANCE, lambda context: errors.extend(refusals(context))
    )
    assert isinstance(context.mq_connection, RPCTransport)
    assert vars(context)["cell_uuid"] is None
    for error in errors:
        assert type(error) is exceptions.CellNotKnown
        assert error.cell_uuid is None
        assert SECRET not in f"{error!s}{error!r}{vars(error)!r}"
    # Not caught, it is the same answer after all.
    is_a_fault(made.get(INSTANCE, refuse))


def refuse(context: Any) -> None:
    client().cast(context, "reboot_instance", instance_uuid="x")


# X-Identity-Status


@pytest.mark.parametrize("status", ["Invalid", "confirmed", "", "Unknown"])
def test_an_identity_that_is_not_confirmed_cannot_send(
    status: str,
    service: Services,
    out_of_reach: str,
    default_host: stack.Host,
    runtimes: runtime.Registry,
) -> None:
    made = service(database=out_of_reach)
    errors: list[exceptions.SendError] = []
    context = made.context_for(
        INSTANCE,
        lambda context: errors.extend(refusals(context)),
        headers={"X-Identity-Status": status},
    )
    assert isinstance(context.mq_connection, RPCTransport)
    assert vars(context)["cell_uuid"] is None
    assert {type(error) for error in errors} == {
        exceptions.IdentityNotConfirmed
    }
    (shared,) = runtimes
    assert shared.process().directory.stats().queries == 0


def test_a_confirmed_identity_is_served(
    service: Services, api_database: ApiDatabase
) -> None:
    cell = api_database.add_cell(ONE)
    instance = api_database.add_instance(cell)
    context = service().context_for(
        f"/servers/{instance}", headers={"X-Identity-Status": "Confirmed"}
    )
    assert context.cell_uuid == cell


# Never to another queue


def test_a_known_cell_that_is_down_gets_none_of_its_messages_sent_elsewhere(
    service: Services,
    api_database: ApiDatabase,
    serve: Serve,
    default_host: stack.Host,
) -> None:
    other = serve(TWO)
    api_database.add_instance(api_database.add_cell(TWO))
    instance = api_database.add_instance(api_database.add_cell(ONE))
    testing.broker_of(ONE).refuse()
    made = service(send_timeout="0.5", breaker_failures="2")
    for _ in range(4):
        made.context_for(
            f"/servers/{instance}",
            lambda context: [
                pytest.fail(f"{error!r}")
                for error in refusals(context)
                if not isinstance(error, exceptions.CellUnavailable)
            ],
        )
    testing.broker_of(ONE).heal()
    assert other.messages == []


def test_a_released_connection_is_no_way_to_the_default_queue(
    service: Services, api_database: ApiDatabase, default_host: stack.Host
) -> None:
    instance = api_database.add_instance(api_database.add_cell(ONE))
    context = service().context_for(f"/servers/{instance}")
    for error in refusals(context):
        assert type(error) is exceptions.TransportReleased


# Errors that the application lets through


def is_a_fault(response: Any) -> None:
    """The compute API's, with nothing in it but what a client may know."""
    assert response.status_int == 503
    assert response.content_type == "application/json"
    fault = json.loads(response.body)
    assert fault.keys() == {"serviceUnavailable"}
    assert fault["serviceUnavailable"].keys() == {"code", "message"}
    assert fault["serviceUnavailable"]["code"] == 503
    message = fault["serviceUnavailable"]["message"]
    assert isinstance(message, str)
    assert message
    assert response.headers["Retry-After"].isascii()
    assert response.headers["Retry-After"].isdigit()
    assert int(response.headers["Retry-After"]) >= 1
    assert int(response.headers["Content-Length"]) == len(response.body)


def test_a_cell_that_cannot_be_used_becomes_503_until_the_next_refresh(
    service: Services, api_database: ApiDatabase
) -> None:
    cell = api_database.add_cell(f"zeromq://u:{SECRET}@h/", name="the-cell")
    instance = api_database.add_instance(cell)
    made = service(cell_refresh_interval="40")
    response = made.get(f"/servers/{instance}/action", refuse, "POST")
    is_a_fault(response)
    assert 30 <= int(response.headers["Retry-After"]) <= 40
    # Clients are told nothing of cells.
    for told in (cell, "the-cell", SECRET, "zeromq"):
        assert told not in response.text


def test_a_cell_that_is_down_becomes_503_until_the_next_trial(
    service: Services, api_database: ApiDatabase
) -> None:
    instance = api_database.add_instance(api_database.add_cell(ONE))
    testing.broker_of(ONE).refuse()
    made = service(breaker_failures="2", breaker_reset_after="40")
    responses = [
        made.get(f"/servers/{instance}/action", refuse, "POST")
        for _ in range(3)
    ]
    for response in responses:
        is_a_fault(response)
    # The second one is what the cell is marked down for.
    for response in responses[1:]:
        assert 30 <= int(response.headers["Retry-After"]) <= 40


@pytest.mark.parametrize("mapped", [True, False])
def test_an_instance_in_no_cell_can_be_refused(
    service: Services,
    api_database: ApiDatabase,
    default_host: stack.Host,
    mapped: bool,
) -> None:
    instance = str(uuids.uuid4())
    if mapped:
        instance = api_database.add_instance(None)
    errors: list[exceptions.SendError] = []
    context = service(on_no_cell="refuse").context_for(
        f"/servers/{instance}",
        lambda context: errors.extend(refusals(context)),
    )
    assert context.cell_uuid is None
    assert {type(error) for error in errors} == {exceptions.InstanceHasNoCell}
    assert default_host.messages == []


@pytest.mark.parametrize(
    "error, retry_after, can_help",
    [
        (exceptions.CellMWError("x"), "1", False),
        (exceptions.LookupFailed("x", retry_after=1.2), "2", True),
        (exceptions.CellUnavailable(retry_after=29.01), "30", True),
        (exceptions.CellUnavailable(retry_after=0.0), "1", True),
        (exceptions.CellBusy(retry_after=-3.0), "1", True),
        (exceptions.CellNotKnown(), "1", True),
        (exceptions.ShuttingDown(), "1", True),
        (exceptions.CellMisconfigured(retry_after=9.5), "10", False),
        (exceptions.CellHasNoQueue(), "1", False),
        (exceptions.CellNotFound(), "1", False),
        (exceptions.IdentityNotConfirmed(), "1", False),
        (exceptions.InstanceHasNoCell(), "1", True),
        (exceptions.AmbiguousPath(), "1", False),
        (exceptions.RPCNotInitialized("x"), "1", False),
    ],
)
def test_each_error_of_ours_becomes_503(
    error: exceptions.CellMWError,
    retry_after: str,
    can_help: bool,
    service: Services,
    api_database: ApiDatabase,
) -> None:
    for response in answers_to(error, service, api_database):
        is_a_fault(response)
        assert response.headers["Retry-After"] == retry_after
        assert ("again" in response.text.lower()) is can_help


def answers_to(
    error: exceptions.CellMWError,
    service: Services,
    api_database: ApiDatabase,
) -> Iterator[Any]:
    """For an instance, for one that has no cell, and without any."""
    instance = api_database.add_instance(api_database.add_cell(ONE))
    made = service()

    def fail(context: Any) -> None:
        raise error

    for path in (f"/servers/{instance}", INSTANCE, "/servers"):
        yield made.get(path, fail)


def test_an_uncertain_delivery_becomes_504_and_invites_no_repetition(
    service: Services, api_database: ApiDatabase
) -> None:
    error = exceptions.DeliveryUncertain(retry_after=7.0)
    for response in answers_to(error, service, api_database):
        is_a_gateway_timeout(response)


def is_a_gateway_timeout(response: Any) -> None:
    assert response.status_int == 504
    assert response.content_type == "application/json"
    fault = json.loads(response.body)
    assert fault.keys() == {"gatewayTimeout"}
    assert fault["gatewayTimeout"].keys() == {"code", "message"}
    assert fault["gatewayTimeout"]["code"] == 504
    assert "again" not in fault["gatewayTimeout"]["message"].lower()
    assert "Retry-After" not in response.headers
    assert int(response.headers["Content-Length"]) == len(response.body)


@pytest.mark.parametrize(
    "error", [exceptions.TransportReleased(), RuntimeError("x"), KeyError(1)]
)
def test_other_errors_stay_what_they_are(
    error: Exception, service: Services, api_database: ApiDatabase
) -> None:
    instance = api_database.add_instance(api_database.add_cell(ONE))
    made = service()

    def fail(context: Any) -> None:
        raise error

    for path in (f"/servers/{instance}", INSTANCE, "/servers"):
        with pytest.raises(type(error)) as caught:
            made.get(path, fail)
        assert caught.value is error


def test_an_application_that_catches_them_answers_for_itself(
    service: Services, api_database: ApiDatabase
) -> None:
    cell = api_database.add_cell("zeromq://h/")
    instance = api_database.add_instance(cell)

    def handler(context: Any) -> str:
        with pytest.raises(cellmw.CellMWError):
            refuse(context)
        return "my own answer"

    response = service().get(f"/servers/{instance}", handler)
    assert (response.status_int, response.text) == (200, "my own answer")


@pytest.mark.parametrize("path", [INSTANCE, "/servers"])
@pytest.mark.parametrize("lazy", [False, True])
def test_after_the_response_has_started_they_are_raised_again(
    path: str, lazy: bool, make_filter: MakeFilter
) -> None:
    error = exceptions.CellUnavailable("too late")
    started: list[Any] = []

    def application(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])(b"a part")
        raise error

    def later(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        yield b"a part"
        raise error

    def start_response(*args: Any) -> Any:
        if args[2:] and started:
            # A server that has sent its headers (PEP 3333).
            raise args[2][1]
        started.append(args)
        return lambda data: None

    filtered = make_filter()(later if lazy else application)
    environ = stack.environ_of(path)
    with pytest.raises(exceptions.CellUnavailable) as caught:
        body = filtered(environ, start_response)
        try:
            list(body)
        finally:
            body.close()
    assert caught.value is error
    assert [args[0] for args in started] == ["200 OK"]


@pytest.mark.parametrize("path", [INSTANCE, "/servers"])
def test_a_generator_that_has_not_started_yet_is_answered_for(
    path: str, make_filter: MakeFilter
) -> None:
    errors: list[exceptions.SendError] = []

    def application(environ: Any, start_response: Any) -> Any:
        if environ["REQUEST_METHOD"]:
            raise errors.pop()
        yield b""

    filtered = make_filter()(application)
    errors.append(exceptions.CellUnavailable("x", retry_after=3))
    response = stack.request(filtered, path)
    is_a_fault(response)
    assert response.headers["Retry-After"] == "3"
    errors.append(exceptions.DeliveryUncertain("x", retry_after=3))
    is_a_gateway_timeout(stack.request(filtered, path))


# Every refusal leaves a trace


def traces(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [
        (record.levelname, record.getMessage())
        for record in caplog.records
        if record.name == "cellmw.refusals"
    ]


def counted(runtimes: runtime.Registry) -> dict[tuple[str, str], int]:
    """How often each cell's messages were refused for each reason."""
    (shared,) = runtimes
    return {
        (cell_uuid, reason): count
        for cell_uuid, _, reason, count in shared.process().refusals.counts()
    }


@pytest.mark.parametrize(
    "url, reason",
    [
        ("none:///", "cell_has_no_queue"),
        ("rabbit://{hostname}/", "cell_misconfigured"),
        (ONE, "cell_unavailable"),
    ],
)
@pytest.mark.parametrize("is_caught", [False, True])
def test_a_refusal_leaves_a_trace(
    url: str,
    reason: str,
    is_caught: bool,
    service: Services,
    api_database: ApiDatabase,
    runtimes: runtime.Registry,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "cellmw")
    testing.broker_of(ONE).refuse()
    cell = api_database.add_cell(url, name="the-cell")
    instance = api_database.add_instance(cell)
    made = service(conf=stack.configuration(transport_url="rabbit://"))

    def handler(context: Any) -> None:
        context.request_id = "req-of-the-context"
        if not is_caught:
            refuse(context)
        with pytest.raises(exceptions.SendError):
            refuse(context)

    for _ in range(3):
        made.get(f"/servers/{instance}", handler)
    testing.broker_of(ONE).heal()
    found = traces(caplog)
    assert [level for level, _ in found] == ["WARNING", "INFO", "INFO"]
    for _, text in found:
        for part in (cell, "the-cell", reason):
            assert part in text
    assert counted(runtimes) == {(cell, reason): 3}


@pytest.mark.parametrize(
    "path, headers, reason",
    [
        (INSTANCE, {"X-Identity-Status": "Invalid"}, "identity_not_confirmed"),
        (f"{INSTANCE}.json", {}, "ambiguous_path"),
        (INSTANCE, {}, "cell_not_known"),
    ],
)
def test_a_refusal_without_a_cell_leaves_a_trace_with_the_requests_id(
    path: str,
    headers: dict[str, str],
    reason: str,
    make_filter: MakeFilter,
    out_of_reach: str,
    runtimes: runtime.Registry,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "cellmw")
    application = make_filter(
        context_key=KEY, database=out_of_reach, on_lookup_failure="pass"
    )(Api(refuse, key=KEY))
    for context in (Foreign(), ServiceContext(request_id="req-service")):
        stack.request(
            application,
            path,
            headers=headers,
            environ={KEY: context, "openstack.request_id": "req-environ"},
        )
    (first, one), (second, two) = traces(caplog)
    assert (first, second) == ("WARNING", "INFO")
    assert "req-environ" in one
    assert "req-service" in two
    assert counted(runtimes) == {("", reason): 2}


def test_a_503_for_a_failed_lookup_leaves_a_trace(
    service: Services,
    out_of_reach: str,
    runtimes: runtime.Registry,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    made = service(database=out_of_reach)
    for _ in range(2):
        is_a_fault(made.get(INSTANCE))
    ((level, text),) = traces(caplog)
    assert level == "WARNING"
    assert "lookup_failed" in text
    assert SECRET not in text
    assert counted(runtimes) == {("", "lookup_failed"): 2}


def test_an_error_that_the_application_raises_itself_leaves_a_trace(
    make_filter: MakeFilter,
    runtimes: runtime.Registry,
) -> None:
    def later(environ: Any, start_response: Any) -> Iterator[bytes]:
        if environ["PATH_INFO"]:
            raise exceptions.LookupFailed("x")
        yield b""

    def at_once(environ: Any, start_response: Any) -> Iterator[bytes]:
        raise exceptions.RPCNotInitialized("x")

    for application in (later, at_once):
        is_a_fault(stack.request(make_filter()(application), "/servers"))
    assert counted(runtimes) == {
        ("", "lookup_failed"): 1,
        ("", "rpc_not_initialized"): 1,
    }


# Contexts


class Slotted:
    __slots__ = ("user",)


class Frozen:
    def __setattr__(self, name: str, value: object) -> None:
        raise TypeError("is frozen")


class HalfOpen:
    __slots__ = ("mq_connection",)


@pytest.mark.parametrize(
    "context", [Slotted(), {}, {"user": "u"}, Frozen(), HalfOpen(), (), "text"]
)
def test_a_context_that_takes_no_attributes_is_one_error_and_500(
    context: object,
    make_filter: MakeFilter,
    api_database: ApiDatabase,
    caplog: pytest.LogCaptureFixture,
) -> None:
    instance = api_database.add_instance(api_database.add_cell(ONE))
    api = Api(key=KEY)
    application = make_filter(context_key=KEY)(api)
    for _ in range(3):
        response = stack.request(
            application, f"/servers/{instance}", environ={KEY: context}
        )
        assert response.status_int == 500
    assert api.contexts == []
    (record,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert record.levelname == "ERROR"
    assert "context_key" in record.getMessage()
    assert KEY in record.getMessage()
    # Nothing was to be set on this one.
    assert (
        stack.request(
            application, "/servers", environ={KEY: context}
        ).status_int
        == 200
    )


def test_slots_with_the_two_names_are_taken(
    make_filter: MakeFilter, api_database: ApiDatabase
) -> None:
    class WithThem:
        __slots__ = ("cell_uuid", "mq_connection")

    cell = api_database.add_cell(ONE)
    instance = api_database.add_instance(cell)
    context: Any = WithThem()
    application = make_filter(context_key=KEY)(Api(key=KEY))
    stack.request(application, f"/servers/{instance}", environ={KEY: context})
    assert context.cell_uuid == cell


IDENTITY = {
    "X-User-Id": "the-user",
    "X-Project-Id": "the-project",
    "X-Roles": "admin,member",
    "X-Is-Admin-Project": "True",
    "X-Auth-Token": "the-token",
}


def context_of(
    make_filter: MakeFilter,
    path: str,
    headers: dict[str, str],
    environ: dict[str, Any] | None = None,
) -> Any:
    api = Api()
    response = stack.request(
        make_filter()(api), path, headers=headers, environ=environ
    )
    assert response.status_int == 200
    return api.contexts[0]


@pytest.mark.parametrize("path", [INSTANCE, "/servers"])
def test_a_context_made_here_has_a_confirmed_identity(
    path: str, make_filter: MakeFilter
) -> None:
    made = context_of(
        make_filter, path, {**IDENTITY, "X-Identity-Status": "Confirmed"}
    )
    assert type(made) is cellmw.RequestContext
    assert made.user_id == "the-user"
    assert made.project_id == "the-project"
    assert made.roles == ["admin", "member"]
    assert made.auth_token == "the-token"


@pytest.mark.parametrize("path", [INSTANCE, "/servers"])
@pytest.mark.parametrize("status", [None, "Invalid", "confirmed", ""])
def test_a_context_made_here_is_anonymous_without_a_confirmed_identity(
    path: str, status: str | None, make_filter: MakeFilter
) -> None:
    headers = dict(IDENTITY)
    if status is not None:
        headers["X-Identity-Status"] = status
    made = context_of(make_filter, path, headers)
    assert made.user_id is None
    assert made.project_id is None
    assert made.roles == []
    assert made.auth_token is None
    assert not made.is_admin
    assert not made.is_admin_project
    values = repr(made.to_dict())
    for value in ("the-user", "the-project", "member", "the-token"):
        assert value not in values


@pytest.mark.parametrize("status", ["Confirmed", "Invalid"])
def test_a_context_made_here_has_the_requests_id(
    status: str, make_filter: MakeFilter
) -> None:
    made = context_of(
        make_filter,
        "/servers",
        {"X-Identity-Status": status},
        {"openstack.request_id": "req-the-one"},
    )
    assert made.request_id == "req-the-one"


def test_a_context_under_another_key_is_warned_of_once(
    make_filter: MakeFilter,
    api_database: ApiDatabase,
    caplog: pytest.LogCaptureFixture,
) -> None:
    instance = api_database.add_instance(api_database.add_cell(ONE))
    api = Api()
    application = make_filter()(api)
    for path in ("/servers", f"/servers/{instance}", "/servers"):
        stack.request(
            application, path, environ={"nova.context": ServiceContext()}
        )
    assert all(type(c) is cellmw.RequestContext for c in api.contexts)
    (record,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert record.levelname == "WARNING"
    assert "nova.context" in record.getMessage()


def test_a_context_where_it_belongs_is_warned_of_never(
    make_filter: MakeFilter, caplog: pytest.LogCaptureFixture
) -> None:
    application = make_filter(context_key="nova.context")(Api())
    environ = {"nova.context": ServiceContext(), "other": ServiceContext()}
    stack.request(application, "/servers", environ=environ)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


# Apart from that


def test_the_response_is_the_applications_own(
    service: Services, api_database: ApiDatabase, serve: Serve
) -> None:
    serve(ONE)
    instance = api_database.add_instance(api_database.add_cell(ONE))
    api = Api(lambda context: "text")
    environ = stack.environ_of(f"/servers/{instance}")
    bare = list(api(environ, lambda *args: None))
    made = service()
    response = made.get(f"/servers/{instance}", lambda context: "text")
    assert response.status == "200 OK"
    assert [response.body] == bare
    assert sorted(response.headers) == [
        "Content-Type",
        "X-From",
    ] or sorted(response.headers) == [
        "Content-Length",
        "Content-Type",
        "X-From",
    ]


def test_what_the_service_pickles_of_a_context_made_here_has_no_connection(
    make_filter: MakeFilter, api_database: ApiDatabase
) -> None:
    instance = api_database.add_instance(api_database.add_cell(ONE))
    copies: list[Any] = []
    api = Api(lambda context: copies.append(pickle.dumps(context)))
    stack.request(make_filter()(api), f"/servers/{instance}")
    assert pickle.loads(copies[0]).mq_connection is None
    assert SECRET.encode() not in copies[0]
