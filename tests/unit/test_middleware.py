# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""One request through the filter, with a runtime that notes what is asked.

What goes on through sockets is in ``tests/functional/test_contract_*.py``.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from typing import Any

import pytest
import webob
from oslo_config import cfg
from oslo_context import context as oslo_context

from cellmw import exceptions, options
from cellmw.cells.mapping import CELL0_UUID, Cell
from cellmw.context import RequestContext
from cellmw.middleware import CellMW
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
            question
            for process in self.processes
            for question in process.directory.asked
        ]


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
