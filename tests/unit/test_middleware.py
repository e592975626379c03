# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""One request through the filter, with a runtime that notes what is asked.

What goes on through sockets is in ``tests/functional/test_contract_*.py``.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import webob
from oslo_config import cfg
from oslo_context import context as oslo_context

from cellmw import exceptions, middleware, options, pipeline
from cellmw import runtime as runtimes
from cellmw.cells.mapping import CELL0_UUID, Cell
from cellmw.context import RequestContext
from cellmw.middleware import CellMW
from cellmw.refusals import Refusals
from cellmw.transports.handle import Handle

UUID = "6f70656e-7374-6163-6b20-346576657221"
PATH = f"/v2.1/demo/servers/{UUID}/action"
KEY = "cellmw.context"
# Any cell will do: nothing is sent here.
CELL = Cell(
    "11111111-1111-4111-8111-111111111111",
    "a-cell",
    refusal=(exceptions.CellMisconfigured, "in a test"),
)


class Directory:
    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.answer: Cell | Exception | None = CELL

    def find(self, uuid: str, method: str = "GET") -> Cell | None:
        self.asked.append((uuid, method))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class Process:
    """As much of a process's state as is looked at when nothing is sent."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.runtime_id = 1
        self.refusals = Refusals()
        self.directory = Directory()


class Runtime:
    def __init__(self, **values: Any) -> None:
        conf = cfg.ConfigOpts()
        conf([], project="cellmw-test", default_config_files=[])
        self.id = 1
        self.settings = options.load(conf, values)
        self.current: Process | None = None
        self.processes: list[Process] = []
        self.answer: Cell | Exception | None = CELL

    def process(self) -> Process:
        self.current = Process()
        self.current.directory.answer = self.answer
        self.processes.append(self.current)
        return self.current

    def asked(self) -> list[tuple[str, str]]:
        return [
            query
            for process in self.processes
            for query in process.directory.asked
        ]


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A registry in which nothing has been told yet; gives another one."""

    def begin_anew() -> None:
        monkeypatch.setattr(runtimes, "_registry", runtimes.Registry())

    begin_anew()
    return begin_anew


def filtered(
    application: Any = None, runtime: Runtime | None = None
) -> CellMW:
    made: Any = runtime or Runtime()
    return CellMW(application or webob.Response(), made)


def environ_of(path: str = PATH, *more: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = webob.Request.blank(path).environ
    for values in more:
        made |= values
    return made


def run(application: Any, environ: dict[str, Any]) -> webob.Response:
    return webob.Request(environ).get_response(application)


def test_a_path_without_an_instance_asks_nobody() -> None:
    runtime = Runtime()
    for path in ("/", "/servers", f"/flavors/{UUID}"):
        run(filtered(runtime=runtime), environ_of(path))
    assert runtime.processes == []


def test_patterns_of_ones_own_are_read_as_others_may_read_them() -> None:
    runtime = Runtime(
        instance_path_patterns=r"/vms/(?P<instance_uuid>[0-9a-f-]+)\Z"
    )
    application = filtered(runtime=runtime)
    for path, has_connection in (
        (f"/vms/{UUID}", True),
        (f"/vms/{UUID}\n", True),
        (f"/VMs//{UUID}.json", True),
        (f"/servers/{UUID}\n", False),
        (f"/images/{UUID}\n", False),
    ):
        environ = environ_of("/", {"PATH_INFO": path})
        run(application, environ)
        context = environ[KEY]
        assert isinstance(context.mq_connection, Handle) is has_connection
    assert runtime.asked() == [(UUID, "GET")]


def test_the_directory_is_asked_for_the_uuid_and_the_method() -> None:
    runtime = Runtime()
    application = filtered(runtime=runtime)
    run(application, environ_of(PATH.replace(UUID, UUID.upper())))
    run(application, environ_of(PATH, {"REQUEST_METHOD": "POST"}))
    assert runtime.asked() == [(UUID, "GET"), (UUID, "POST")]
    assert len(runtime.processes) == 1


def test_after_a_fork_it_is_the_childs_state_that_is_asked() -> None:
    runtime = Runtime()
    application = filtered(runtime=runtime)
    run(application, environ_of())
    runtime.processes[0].pid += 1
    run(application, environ_of())
    assert len(runtime.processes) == 2
    assert runtime.processes[1].directory.asked == [(UUID, "GET")]


@pytest.mark.parametrize(
    "answer, has_connection, cell_uuid",
    [
        (CELL, True, CELL.uuid),
        (
            Cell(CELL0_UUID, "cell0", refusal=(exceptions.CellHasNoQueue, "")),
            True,
            CELL0_UUID,
        ),
        # What the mapping names is gone.
        (Cell("", None, refusal=(exceptions.CellNotFound, "")), True, None),
        (None, False, None),
    ],
)
def test_the_context_gets_what_the_directory_says(
    answer: Cell | None, has_connection: bool, cell_uuid: str | None
) -> None:
    runtime = Runtime()
    runtime.answer = answer
    environ = environ_of()
    run(filtered(runtime=runtime), environ)
    context = environ[KEY]
    assert isinstance(context.mq_connection, Handle) is has_connection
    assert context.cell_uuid == cell_uuid


def test_a_context_is_made_where_there_is_none() -> None:
    for path in (PATH, "/servers"):
        for environ in (environ_of(path), environ_of(path, {KEY: None})):
            run(filtered(), environ)
            assert type(environ[KEY]) is RequestContext


def test_a_connection_of_the_request_before_does_not_stay() -> None:
    # A service may use a context again.
    context = RequestContext()
    context.mq_connection = before = object()
    context.cell_uuid = "before"
    runtime = Runtime()
    runtime.answer = None
    run(filtered(runtime=runtime), environ_of(PATH, {KEY: context}))
    assert context.mq_connection is not before
    assert context.mq_connection is None
    assert context.cell_uuid is None


@pytest.mark.parametrize("status", ["Invalid", "", "confirmed"])
def test_an_identity_that_is_not_confirmed_is_looked_up_nothing_for(
    status: str,
) -> None:
    runtime = Runtime()
    environ = environ_of(PATH, {"HTTP_X_IDENTITY_STATUS": status})
    run(filtered(runtime=runtime), environ)
    assert isinstance(environ[KEY].mq_connection, Handle)
    assert environ[KEY].cell_uuid is None
    assert runtime.asked() == []


def test_a_failed_lookup_is_503_before_the_application_is_called() -> None:
    runtime = Runtime()
    runtime.answer = exceptions.LookupFailed("x", retry_after=2.5)
    called: list[bool] = []
    response = run(
        filtered(lambda e, s: called.append(True), runtime), environ_of()
    )
    assert called == []
    assert response.status_int == 503
    assert response.headers["Retry-After"] == "3"
    assert response.content_type == "application/json"
    assert json.loads(response.body)["serviceUnavailable"]["code"] == 503


def test_a_failed_lookup_may_be_passed_on() -> None:
    runtime = Runtime(on_lookup_failure="pass")
    runtime.answer = exceptions.LookupFailed("x", cause="y")
    environ = environ_of()
    assert run(filtered(runtime=runtime), environ).status_int == 200
    assert isinstance(environ[KEY].mq_connection, Handle)
    assert environ[KEY].cell_uuid is None


def test_other_errors_of_a_lookup_are_not_hidden() -> None:
    runtime = Runtime()
    runtime.answer = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        run(filtered(runtime=runtime), environ_of())


# What the application and the server see of each other


def test_start_response_is_called_as_the_application_calls_it() -> None:
    calls: list[tuple[Any, ...]] = []
    write = object()
    headers = [("A", "b")]

    def start_response(*args: Any) -> Any:
        calls.append(args)
        return write

    def application(environ: Any, start_response: Any) -> list[bytes]:
        assert start_response("200 OK", headers) is write
        assert start_response("500 Oh", headers, None) is write
        return []

    for path in (PATH, "/servers"):
        filtered(application)(environ_of(path), start_response)
    first, second = calls[:2]
    assert calls == [first, second] * 2
    assert first == ("200 OK", headers)
    assert second[:2] == ("500 Oh", headers)
    assert all(call[1] is headers for call in calls)


@pytest.mark.parametrize("path", [PATH, "/servers"])
def test_the_environ_is_the_servers_and_nothing_else_is_put_in_it(
    path: str,
) -> None:
    environ = environ_of(path)
    before = dict(environ)
    seen: list[Any] = []

    def application(environ: Any, start_response: Any) -> list[bytes]:
        seen.append(environ)
        start_response("200 OK", [])
        return []

    filtered(application)(environ, lambda *args: None)  # type: ignore[arg-type]  # needs none
    assert seen[0] is environ
    assert set(environ) - set(before) == {KEY}
    assert all(environ[name] is value for name, value in before.items())


# Bodies of every kind


class Body:
    """Two chunks, and a note of how often it was closed."""

    closed = 0

    def __iter__(self) -> Iterator[bytes]:
        yield b"te"
        yield b"xt"

    def close(self) -> None:
        self.closed += 1


class FalseBody(Body):
    """As a ``requests.Response`` with 404 is."""

    def __bool__(self) -> bool:
        return False


class EmptyLooking(Body):
    def __len__(self) -> int:
        return 0


class NoLengthAfterAll(Body):
    def __len__(self) -> int:
        raise TypeError("not known")


class BrokenLength(Body):
    def __bool__(self) -> bool:
        return True

    def __len__(self) -> int:
        raise RuntimeError("not known")


class NoOtherAttributes(Body):
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


class Proxy(Body):
    """Has a length for who asks the instance; ``len()`` asks the class."""

    def __getattr__(self, name: str) -> Any:
        return getattr([], name)


BODIES = [
    Body,
    FalseBody,
    EmptyLooking,
    NoLengthAfterAll,
    BrokenLength,
    NoOtherAttributes,
    Proxy,
]


def starting(start_response: Any) -> None:
    start_response("200 OK", [("Content-Type", "text/plain")])


def answering(body: object) -> Any:
    def application(environ: Any, start_response: Any) -> Any:
        starting(start_response)
        return body

    return application


def serve(application: Any, environ: dict[str, Any]) -> Any:
    """What the server gets to iterate and to close."""
    return filtered(application)(environ, lambda *args: None)  # type: ignore[arg-type]  # needs none


@pytest.mark.parametrize("kind", BODIES)
def test_a_body_is_sent_whatever_its_truth_and_its_length_are(
    kind: type[Body],
) -> None:
    body = kind()
    given = serve(answering(body), environ_of())
    assert given is not body
    sent = []
    for chunk in given:  # which asks for no length
        sent.append(chunk)  # noqa: PERF402  # list() would
    assert sent == [b"te", b"xt"]
    given.close()
    assert body.closed == 1


@pytest.mark.parametrize("kind", BODIES)
def test_what_a_server_makes_of_a_bodys_iterator_asks_for_no_length(
    kind: type[Body],
) -> None:
    given = serve(answering(kind()), environ_of())
    assert list(iter(given)) == [b"te", b"xt"]
    given.close()


@pytest.mark.parametrize("kind", [EmptyLooking, BrokenLength, Proxy])
def test_a_wrapped_bodys_truth_is_its_own(kind: type[Body]) -> None:
    given = serve(answering(kind()), environ_of())
    assert bool(given) is bool(kind())
    given.close()


@pytest.mark.parametrize("kind", [Body, FalseBody, EmptyLooking])
def test_a_body_that_is_closed_has_nothing_more(kind: type[Body]) -> None:
    given = serve(answering(kind()), environ_of())
    assert next(iter(given)) == b"te"
    given.close()
    assert list(given) == []
    if kind is EmptyLooking:
        assert len(given) == 0
    given.close()


@pytest.mark.parametrize("path", [PATH, "/servers"])
def test_no_body_at_all_is_the_servers_error(path: str) -> None:
    given = serve(answering(None), environ_of(path))
    with pytest.raises(TypeError):
        list(given)


class Lying(Body):
    """What the filter asks of it first raises."""

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":
            raise RuntimeError("asked")
        return super().__getattribute__(name)


@pytest.mark.parametrize("path", [PATH, "/servers"])
def test_a_body_that_the_server_never_gets_is_closed(path: str) -> None:
    body = Lying()

    def application(environ: Any, start_response: Any) -> Any:
        return body

    environ = environ_of(path, {"wsgi.file_wrapper": type("File", (), {})})
    with pytest.raises(RuntimeError, match="asked"):
        serve(application, environ)
    assert body.closed == 1
    if path == PATH:
        assert released(environ[KEY].mq_connection)


def released(handle: Handle) -> bool:
    return repr(handle).endswith(", released>")


class ClassApplication:
    """PEP 3333's application that is a class."""

    def __init__(self, environ: Any, start_response: Any) -> None:
        self.start_response = start_response

    def __iter__(self) -> Iterator[bytes]:
        self.first()
        yield b"text"

    def first(self) -> None:
        raise exceptions.CellBusy


class IteratorApplication(ClassApplication):
    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        self.first()
        raise StopIteration


class SizedApplication(ClassApplication):
    def __len__(self) -> int:
        return 1


class StartedApplication(IteratorApplication):
    def first(self) -> None:
        starting(self.start_response)
        super().first()


def mapping_application(environ: Any, start_response: Any) -> Any:
    def chunk(number: int) -> bytes:
        raise exceptions.CellBusy

    return map(chunk, [1])


@pytest.mark.parametrize("path", [PATH, "/servers"])
@pytest.mark.parametrize(
    "application",
    [
        ClassApplication,
        IteratorApplication,
        SizedApplication,
        mapping_application,
    ],
)
def test_an_error_of_a_lazy_application_is_503(
    path: str, application: Any
) -> None:
    response = run(filtered(application), environ_of(path))
    assert response.status_int == 503
    assert "Retry-After" in response.headers
    fault = json.loads(response.body)["serviceUnavailable"]
    assert fault["code"] == 503


@pytest.mark.parametrize("path", [PATH, "/servers"])
def test_an_error_after_a_lazy_start_is_raised(path: str) -> None:
    given = serve(StartedApplication, environ_of(path))
    with pytest.raises(exceptions.CellBusy):
        next(iter(given))
    given.close()


def test_what_has_started_and_holds_nothing_goes_through_unwrapped() -> None:
    for body in (Body(), iter([b"a"]), (chunk for chunk in [b"a"])):
        assert serve(answering(body), environ_of("/servers")) is body


def test_a_servers_file_goes_through_unwrapped_before_the_start() -> None:
    body = Body()
    environ = environ_of("/servers", {"wsgi.file_wrapper": Body})
    assert serve(lambda e, s: body, environ) is body


# Contexts that cannot be used, or stand elsewhere


def messages(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [
        (record.levelname, record.getMessage())
        for record in caplog.records
        if record.levelno >= logging.WARNING
    ]


def test_a_context_without_attributes_is_told_of_once_a_filter(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for _ in range(2):
        application = filtered()
        for _ in range(3):
            response = run(application, environ_of(PATH, {KEY: {}}))
            assert response.status_int == 500
            assert json.loads(response.body)["computeFault"]["code"] == 500
    assert [level for level, _ in messages(caplog)] == ["ERROR", "ERROR"]
    assert all("context_key" in text for _, text in messages(caplog))


class HalfContext:
    """Takes the one, and raises for the other."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.mq_connection: Any = None

    @property
    def cell_uuid(self) -> str:
        return ""

    @cell_uuid.setter
    def cell_uuid(self, value: object) -> None:
        raise self.error


@pytest.mark.parametrize(
    "error", [AttributeError(), TypeError(), ValueError(), RuntimeError()]
)
def test_a_context_that_takes_one_of_two_keeps_no_live_connection(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    context = HalfContext(error)
    response = run(filtered(), environ_of(PATH, {KEY: context}))
    assert response.status_int == 500
    assert released(context.mq_connection)
    ((level, text),) = messages(caplog)
    assert level == "ERROR"
    assert f"context_key = {KEY}" in text
    assert type(error).__name__ in text


def test_a_context_that_raises_is_500_where_there_is_no_connection() -> None:
    runtime = Runtime()
    runtime.answer = None
    context = HalfContext(ValueError())
    response = run(filtered(runtime=runtime), environ_of(PATH, {KEY: context}))
    assert response.status_int == 500
    assert context.mq_connection is None


def between_lines(
    way: Callable[[], object], other: Callable[[], object], skip: int
) -> bool:
    """Do the other before a line of the filter's, as a thread may.

    :param skip: before how many lines it is not done
    :returns: whether there was such a line
    """
    left = skip
    before = sys.gettrace()
    files = {module.__file__ for module in (middleware, pipeline, runtimes)}

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            left -= 1
            if left == -1:
                sys.settrace(None)
                other()
        return trace

    sys.settrace(trace)
    try:
        way()
    finally:
        sys.settrace(before)
    return left < 0


@pytest.mark.parametrize(
    "path, values",
    [
        ("/servers", {"nova.context": oslo_context.RequestContext()}),
        (PATH, {KEY: {}}),
    ],
)
def test_two_requests_at_once_tell_once(
    path: str,
    values: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
    registry: Callable[[], None],
) -> None:
    skip = 0
    while True:
        registry()
        application = filtered()

        def request(application: CellMW = application) -> object:
            return run(application, environ_of(path, values))

        caplog.clear()
        met = between_lines(request, request, skip)
        assert len(messages(caplog)) == 1, f"other before line {skip}"
        if not met:
            break
        skip += 1
    assert skip > 10


def test_a_context_elsewhere_is_told_of_once_and_not_looked_for_for_ever(
    caplog: pytest.LogCaptureFixture,
) -> None:
    application = filtered()
    elsewhere = {"nova.context": oslo_context.RequestContext()}
    run(application, environ_of("/servers"))
    assert messages(caplog) == []
    for _ in range(3):
        run(application, environ_of("/servers", elsewhere))
    ((level, text),) = messages(caplog)
    assert level == "WARNING"
    assert "'nova.context'" in text
    assert "context_key = nova.context" in text


@pytest.mark.parametrize(
    "path, values",
    [
        ("/servers", {"nova.context": oslo_context.RequestContext()}),
        ("/servers", {"HTTP_X_AUTH_TOKEN": "t", KEY: RequestContext()}),
        (PATH, {"HTTP_X_AUTH_TOKEN": "t"}),
    ],
)
def test_what_is_wrong_with_two_pipelines_is_told_once_in_a_process(
    path: str, values: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        application = filtered()
        for _ in range(2):
            run(application, environ_of(path, values))
    ((_, text),) = messages(caplog)
    if "HTTP_X_AUTH_TOKEN" in values:
        assert "authtoken" in text


@pytest.mark.parametrize("path", [PATH, "/servers"])
def test_behind_authtoken_nothing_is_told(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    application = filtered()
    for status in ("Confirmed", "Invalid"):
        behind = {"HTTP_X_AUTH_TOKEN": "t", "HTTP_X_IDENTITY_STATUS": status}
        run(application, environ_of(path, behind))
    # Nor where there is no token, and so perhaps no authtoken.
    run(filtered(), environ_of(path))
    assert messages(caplog) == []


def test_a_name_in_the_environ_cannot_forge_a_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    elsewhere = {"a\nERROR": oslo_context.RequestContext()}
    run(filtered(), environ_of("/servers", elsewhere))
    ((_, text),) = messages(caplog)
    assert "\n" not in text


RAISES: list[Callable[[], BaseException]] = [
    lambda: exceptions.TransportReleased(),
    lambda: RuntimeError("x"),
    lambda: KeyboardInterrupt(),
]


@pytest.mark.parametrize("make", RAISES)
@pytest.mark.parametrize("path", [PATH, "/servers"])
def test_what_is_not_ours_to_answer_is_raised_as_it_is(
    path: str, make: Callable[[], BaseException]
) -> None:
    error = make()

    def application(environ: Any, start_response: Any) -> Any:
        raise error

    with pytest.raises(type(error)) as caught:
        run(filtered(application), environ_of(path))
    assert caught.value is error
