# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""However a response ends, the request's lease ends with it, once.

Section 4 of the contract and scenario S5 of the goals, on both pools.
"""

from __future__ import annotations

import gc
import io
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any
from wsgiref import handlers, util, validate

import oslo_messaging
import pytest
import webob.dec

from cellmw import exceptions, rpc, runtime
from tests.functional import stack
from tests.functional.stack import ApiDatabase, MakeFilter

URL = "cellmw-memory://broker/cell"
TEXT = [("Content-Type", "text/plain")]


class Cell:
    """A cell, requests for an instance in it, and who uses its transports.

    Another request has a lease of its own all the time: were a lease given
    back twice, that one would go.
    """

    def __init__(
        self,
        make_filter: MakeFilter,
        registry: runtime.Registry,
        instance: str,
        cached: bool,
    ) -> None:
        self.filtered = make_filter(transport_cache=str(cached).lower())
        (self._runtime,) = registry
        self.path = f"/v2.1/demo/servers/{instance}"
        self._cached = cached
        self._other = self.start(streamed)
        assert self.leases() == 0

    def leases(self) -> int:
        """How many leases there are beside the other request's."""
        leases: int = self._stats().leases
        return leases - 1

    def _stats(self) -> Any:
        return self._runtime.process().pool.stats()

    def start(
        self,
        application: Any,
        method: str = "GET",
        environ: dict[str, Any] | None = None,
    ) -> Any:
        """Begin a request as a server does; gives what it has to close."""
        return self.filtered(application)(
            stack.environ_of(self.path, method, environ), start_response
        )

    def handled(self, application: Any) -> bytes:
        """Let the standard library's server handle a whole request."""
        out = io.BytesIO()
        environ = stack.environ_of(self.path)
        for name in list(environ):
            # What the server sets itself, and what is not a request's.
            if name.startswith(("wsgi.", "webob.")):
                del environ[name]
        handler = handlers.SimpleHandler(
            io.BytesIO(), out, io.StringIO(), environ
        )
        handler.run(self.filtered(application))
        return out.getvalue()

    def check(self) -> None:
        """The other request has its lease yet, and nobody else has one."""
        assert self.leases() == 0
        total = self._stats().total
        assert total.opened == (1 if self._cached else 2), "none has sent"
        # Closing is off the request's thread.
        stack.eventually(
            lambda: self._stats().total.closed == total.opened - 1
        )
        self._other.close()
        assert self._stats().leases == 0


def start_response(
    status: str, headers: Any, exc_info: Any = None
) -> Callable[[bytes], object]:
    return lambda data: None


def send(environ: dict[str, Any]) -> None:
    """Take the lease: send a message."""
    client.cast(environ["cellmw.context"], "reboot_instance")


client = rpc.get_client(
    oslo_messaging.Target(topic=stack.TOPIC, server="host")
)


class Body:
    """A body that notes what is done with it."""

    def __init__(self, chunks: list[bytes]) -> None:
        self.chunks = list(chunks)
        self.closed = 0

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if not self.chunks:
            raise StopIteration
        return self.chunks.pop(0)

    def close(self) -> None:
        self.closed += 1


class SizedBody(Body):
    def __init__(self, chunks: list[bytes]) -> None:
        super().__init__(chunks)
        self._length = len(chunks)

    def __len__(self) -> int:
        return self._length


def answering(body: Any) -> Any:
    """An application that sends a message, and answers with this body."""

    def application(environ: dict[str, Any], start_response: Any) -> Any:
        send(environ)
        start_response("200 OK", [*TEXT])
        return body

    return application


def streamed(environ: dict[str, Any], start_response: Any) -> Any:
    return answering(Body([b"a", b"b", b"c"]))(environ, start_response)


def generator(environ: dict[str, Any], start_response: Any) -> Any:
    send(environ)
    start_response("200 OK", [*TEXT])
    yield b"a"
    send(environ)
    yield b"b"


@pytest.fixture(params=[True, False], ids=["cached", "uncached"])
def cell(
    request: pytest.FixtureRequest,
    make_filter: MakeFilter,
    runtimes: runtime.Registry,
    api_database: ApiDatabase,
) -> Iterator[Cell]:
    instance = api_database.add_instance(api_database.add_cell(URL))
    made = Cell(make_filter, runtimes, instance, request.param)
    yield made
    made.check()


# A body that is complete


@pytest.mark.parametrize("body", [[b"a", b"b"], (b"a",), [], ()])
def test_a_list_or_tuple_goes_through_unwrapped(cell: Cell, body: Any) -> None:
    assert cell.start(answering(body)) is body
    assert cell.leases() == 0


class ServersFile:
    """A server's file wrapper of the kind that is a class."""

    def __init__(self, file: Any, size: int = 8192) -> None:
        self.file = file
        self.closed = 0

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.file)

    def close(self) -> None:
        self.closed += 1


def function_wrapper(file: Any, size: int = 8192) -> Any:
    """One that is a function, and gives another kind of object."""
    return ServersFile(file, size)


def identity_wrapper(file: Any, size: int = 8192) -> Any:
    """One that gives back the file itself, as uWSGI's does."""
    return file


class CallableWrapper:
    """One that is an instance."""

    def __call__(self, file: Any, size: int = 8192) -> Any:
        return ServersFile(file, size)


@pytest.mark.parametrize(
    "wrapper",
    [
        ServersFile,
        util.FileWrapper,
        function_wrapper,
        identity_wrapper,
        CallableWrapper(),
        io.BufferedReader,
    ],
)
def test_the_servers_file_goes_through_unwrapped(
    cell: Cell, wrapper: Any
) -> None:
    made: list[Any] = []

    def application(environ: dict[str, Any], start_response: Any) -> Any:
        send(environ)
        file = io.BytesIO(b"text")
        made.append(environ["wsgi.file_wrapper"](file, 4))
        start_response("200 OK", [*TEXT])
        return made[0]

    body = cell.start(application, environ={"wsgi.file_wrapper": wrapper})
    assert body is made[0]
    assert cell.leases() == 0
    if not isinstance(wrapper, type):
        # The server knows its own by what it has made.
        expected = wrapper(io.BytesIO(b""))
        assert type(body) is type(expected)


@pytest.mark.parametrize("wrapper", [ServersFile, function_wrapper, None])
def test_a_file_that_is_not_the_servers_is_held_until_closed(
    cell: Cell, wrapper: Any
) -> None:
    file = io.BytesIO(b"text")
    environ = {} if wrapper is None else {"wsgi.file_wrapper": wrapper}
    body = cell.start(answering(file), environ=environ)
    assert cell.leases() == 1
    assert list(body) == [b"text"]
    body.close()
    assert file.closed


# A body that is iterated


def test_the_lease_lasts_until_the_body_is_closed(cell: Cell) -> None:
    body = Body([b"a", b"b"])
    given = cell.start(answering(body))
    assert list(given) == [b"a", b"b"]
    assert cell.leases() == 1
    given.close()
    assert cell.leases() == 0
    assert body.closed == 1


def test_a_body_may_never_be_iterated(cell: Cell) -> None:
    body = Body([b"a", b"b"])
    given = cell.start(answering(body))
    given.close()
    assert cell.leases() == 0
    assert body.closed == 1


def test_a_body_may_be_half_iterated(cell: Cell) -> None:
    body = Body([b"a", b"b"])
    given = cell.start(answering(body))
    assert next(iter(given)) == b"a"
    given.close()
    assert cell.leases() == 0
    assert body.closed == 1
    assert body.chunks == [b"b"]


def test_chunks_are_not_gathered(cell: Cell) -> None:
    body = Body([b"a", b"b", b"c"])
    given = cell.start(answering(body))
    assert body.chunks == [b"a", b"b", b"c"]
    assert next(iter(given)) == b"a"
    assert body.chunks == [b"b", b"c"]
    given.close()


def test_a_body_may_be_closed_twice(cell: Cell) -> None:
    body = Body([b"a"])
    given = cell.start(answering(body))
    given.close()
    given.close()
    assert cell.leases() == 0
    assert body.closed == 1


def test_a_body_without_close_is_given_one(cell: Cell) -> None:
    given = cell.start(answering(iter([b"a"])))
    assert list(given) == [b"a"]
    given.close()
    assert cell.leases() == 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_body_may_raise(cell: Cell, error: type[BaseException]) -> None:
    class Raising(Body):
        def __next__(self) -> bytes:
            if len(self.chunks) == 1:
                raise error("in the middle")
            return super().__next__()

    body = Raising([b"a", b"b"])
    given = cell.start(answering(body))
    assert next(given) == b"a"
    with pytest.raises(error, match="in the middle"):
        next(given)
    given.close()
    assert cell.leases() == 0
    assert body.closed == 1


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_closing_the_body_may_raise(
    cell: Cell, error: type[BaseException]
) -> None:
    class Raising(Body):
        def close(self) -> None:
            super().close()
            raise error("at the end")

    body = Raising([b"a"])
    given = cell.start(answering(body))
    with pytest.raises(error, match="at the end"):
        given.close()
    assert cell.leases() == 0
    given.close()
    assert body.closed == 1


def test_a_body_may_be_false(cell: Cell) -> None:
    class FalseBody(Body):
        def __bool__(self) -> bool:
            return False

    sent = cell.handled(answering(FalseBody([b"te", b"xt"])))
    assert sent.endswith(b"\r\n\r\ntext")


def test_a_bodys_length_may_raise(cell: Cell) -> None:
    class NoLength(Body):
        def __len__(self) -> int:
            raise TypeError("not known")

    sent = cell.handled(answering(NoLength([b"te", b"xt"])))
    assert b"200 OK" in sent
    assert sent.endswith(b"\r\n\r\ntext")


def test_looking_at_the_body_may_raise(cell: Cell) -> None:
    class Raising(Body):
        def __getattribute__(self, name: str) -> Any:
            if name == "__class__":
                raise RuntimeError("when looked at")
            return super().__getattribute__(name)

    body = Raising([b"a"])
    environ = {"wsgi.file_wrapper": ServersFile}
    with pytest.raises(RuntimeError, match="when looked at"):
        cell.start(answering(body), environ=environ)
    assert cell.leases() == 0
    assert body.closed == 1


def test_making_the_bodys_iterator_may_raise(cell: Cell) -> None:
    class Raising(Body):
        def __iter__(self) -> Iterator[bytes]:
            raise RuntimeError("before the first")

    given = cell.start(answering(Raising([])))
    with pytest.raises(RuntimeError, match="before the first"):
        list(given)
    given.close()
    assert cell.leases() == 0


def test_a_body_may_send_until_it_is_closed(cell: Cell) -> None:
    given = cell.start(generator)
    assert next(iter(given)) == b"a"
    assert cell.leases() == 1
    assert list(given) == [b"b"]
    assert cell.leases() == 1
    given.close()
    assert cell.leases() == 0


def test_a_generator_that_is_never_iterated_takes_no_lease(cell: Cell) -> None:
    given = cell.start(generator)
    assert cell.leases() == 0
    # So that the other pool's count comes out as well.
    assert next(iter(given)) == b"a"
    given.close()


def test_a_bodys_length_is_kept_where_it_has_one(cell: Cell) -> None:
    given = cell.start(answering(SizedBody([b"only"])))
    assert len(given) == 1
    given.close()


@pytest.mark.parametrize(
    "body, has_length", [(SizedBody, True), (Body, False)]
)
def test_a_server_adds_content_length_where_it_did_without_us(
    cell: Cell, body: Any, has_length: bool
) -> None:
    # PEP 3333: a server may do so for a body of one chunk.
    sent = cell.handled(answering(body([b"only"])))
    assert (b"\r\nContent-Length: 4\r\n" in sent) is has_length
    assert sent.endswith(b"\r\n\r\nonly")


# No body


@pytest.mark.parametrize(
    "method, status", [("HEAD", 200), ("GET", 304), ("GET", 204)]
)
def test_a_response_without_a_body_is_closed(
    cell: Cell, method: str, status: int
) -> None:
    body = Body([b"never", b"sent"])

    def application(environ: dict[str, Any], start_response: Any) -> Any:
        send(environ)
        response = webob.Response(status=status)
        response.app_iter = body
        return response(environ, start_response)

    given = cell.start(application, method)
    if status == 200:
        # HEAD never iterates the body.
        assert list(given) == []
    given.close()
    assert cell.leases() == 0
    assert body.closed == 1


def test_write_reaches_the_server(cell: Cell) -> None:
    def application(environ: dict[str, Any], start_response: Any) -> Any:
        write = start_response("200 OK", [*TEXT])
        write(b"written ")
        send(environ)
        write(b"twice ")
        return iter([b"and returned"])

    sent = cell.handled(application)
    assert sent.endswith(b"written twice and returned")


def test_the_applications_exc_info_reaches_the_server(cell: Cell) -> None:
    def application(environ: dict[str, Any], start_response: Any) -> Any:
        send(environ)
        start_response("200 OK", [*TEXT])
        try:
            raise RuntimeError("on second thoughts")
        except RuntimeError:
            start_response("500 Oh", [*TEXT], sys.exc_info())
        return [b"sorry"]

    sent = cell.handled(application)
    assert b"500 Oh" in sent
    assert b"200 OK" not in sent


# An application that raises


@pytest.mark.parametrize(
    "error", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit]
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_application_may_raise(
    cell: Cell, when: str, error: type[BaseException]
) -> None:
    def application(environ: dict[str, Any], start_response: Any) -> Any:
        send(environ)
        if when == "after":
            start_response("200 OK", [*TEXT])
        raise error(when)

    with pytest.raises(error, match=when):
        cell.start(application)
    assert cell.leases() == 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_starting_the_response_may_raise(
    cell: Cell, error: type[BaseException]
) -> None:
    def broken(*args: Any) -> Any:
        raise error("the client is gone")

    filtered = cell.filtered(streamed)
    with pytest.raises(error, match="gone"):
        filtered(stack.environ_of(cell.path), broken)
    assert cell.leases() == 0


@pytest.mark.parametrize("lazy", [False, True])
def test_an_error_that_is_answered_ends_the_lease(
    cell: Cell, lazy: bool
) -> None:
    def application(environ: dict[str, Any], start_response: Any) -> Any:
        send(environ)
        raise exceptions.CellBusy

    def later(environ: dict[str, Any], start_response: Any) -> Any:
        application(environ, start_response)
        yield b""

    given = cell.start(later if lazy else application)
    assert b"serviceUnavailable" in b"".join(given)
    if hasattr(given, "close"):
        given.close()
    assert cell.leases() == 0


@pytest.mark.parametrize("times", [0, 1])
def test_a_generator_may_raise(cell: Cell, times: int) -> None:
    def application(environ: dict[str, Any], start_response: Any) -> Any:
        send(environ)
        start_response("200 OK", [*TEXT])
        for _ in range(times):
            yield b"a"
        raise RuntimeError("in the generator")

    given = cell.start(application)
    with pytest.raises(RuntimeError, match="in the generator"):
        list(given)
    given.close()
    assert cell.leases() == 0


# Servers and middleware


APPLICATIONS: dict[str, Callable[[], Any]] = {
    "a list": lambda: answering([b"text"]),
    "a body": lambda: answering(Body([b"te", b"xt"])),
    "a body with a length": lambda: answering(SizedBody([b"text"])),
    "a generator": lambda: three_chunks,
    "an application of WebOb": lambda: webob.dec.wsgify(by_webob),
    "a file": lambda: a_file,
}


def three_chunks(environ: dict[str, Any], start_response: Any) -> Any:
    send(environ)
    start_response("200 OK", [*TEXT])
    yield b"t"
    yield b"ex"
    yield b"t"


def by_webob(request: webob.Request) -> webob.Response:
    send(request.environ)
    return webob.Response("text", content_type="text/plain")


def a_file(environ: dict[str, Any], start_response: Any) -> Any:
    send(environ)
    start_response("200 OK", [*TEXT])
    wrap = environ.get("wsgi.file_wrapper", lambda file, size: file)
    return wrap(io.BytesIO(b"text"), 2)


def passing_on(application: Any) -> Any:
    """A middleware of the kind that oslo.middleware has."""

    def middleware(request: webob.Request) -> Any:
        return request.get_response(application)

    return webob.dec.wsgify(middleware)


@pytest.fixture(params=APPLICATIONS)
def application(request: pytest.FixtureRequest) -> Any:
    return APPLICATIONS[request.param]()


def test_a_server_of_the_standard_library_ends_it(
    cell: Cell, application: Any
) -> None:
    assert cell.handled(application).endswith(b"\r\n\r\ntext")


def test_it_keeps_to_the_protocol_on_both_sides(
    cell: Cell, application: Any
) -> None:
    # wsgiref.validate looks at what either side does with the other.
    def between(app: Any) -> Any:
        return validate.validator(filtered(validate.validator(app)))

    filtered, cell.filtered = cell.filtered, between
    sent = cell.handled(application)
    assert sent.endswith(b"\r\n\r\ntext"), sent


def test_webob_ends_it(cell: Cell, application: Any) -> None:
    response = stack.request(cell.filtered(application), cell.path)
    assert response.text == "text"
    assert cell.leases() == 0


@pytest.mark.parametrize("where", ["in front", "behind", "both"])
def test_a_middleware_of_webob_ends_it(
    cell: Cell, application: Any, where: str
) -> None:
    if where != "in front":
        application = passing_on(application)
    filtered = cell.filtered(application)
    if where != "behind":
        filtered = passing_on(filtered)
    assert stack.request(filtered, cell.path).text == "text"
    assert cell.leases() == 0


def test_a_server_that_ends_in_the_middle_ends_it(cell: Cell) -> None:
    class Gone(io.BytesIO):
        def write(self, data: Any) -> int:
            raise ConnectionResetError

    environ = stack.environ_of(cell.path)
    handler = handlers.SimpleHandler(
        io.BytesIO(), Gone(), io.StringIO(), environ
    )
    body = Body([b"a", b"b"])
    handler.run(cell.filtered(answering(body)))
    assert cell.leases() == 0
    assert body.closed == 1


# A server that never closes


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.WARNING and "response" in record.msg
    ]


@pytest.mark.parametrize("chunks", [0, 1, 9])
@pytest.mark.parametrize("lazy", [False, True])
def test_a_body_that_is_never_closed_ends_when_it_is_collected(
    cell: Cell, lazy: bool, chunks: int, caplog: pytest.LogCaptureFixture
) -> None:
    if lazy and not chunks:
        chunks = 1
    given = cell.start(three_chunks if lazy else answering(Body([b"a"] * 9)))
    for _, _ in zip(range(chunks), given, strict=False):
        assert cell.leases() == 1
    assert warnings_in(caplog) == []
    del given
    gc.collect()
    # By another thread: a finalizer runs wherever it happens to.
    stack.eventually(lambda: cell.leases() == 0)
    (warning,) = warnings_in(caplog)
    assert "close" in warning


def test_a_body_that_was_closed_is_not_warned_of(
    cell: Cell, caplog: pytest.LogCaptureFixture
) -> None:
    given = cell.start(streamed)
    given.close()
    del given
    gc.collect()
    assert warnings_in(caplog) == []


# Requests without an instance


@pytest.mark.parametrize("path", ["/servers", "/v2.1/demo/flavors/1"])
def test_a_response_without_an_instance_is_the_applications_own(
    make_filter: MakeFilter, path: str
) -> None:
    filtered = make_filter()
    for body in ([b"a"], (b"a",), Body([b"a"]), SizedBody([b"a"])):

        def application(environ: Any, start_response: Any, body: Any) -> Any:
            start_response("200 OK", [*TEXT])
            return body

        given = filtered(lambda e, s, body=body: application(e, s, body))(
            stack.environ_of(path), start_response
        )
        assert given is body
    closed: list[bool] = []

    def a_generator(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [*TEXT])
        try:
            yield b"a"
            yield b"b"
        finally:
            closed.append(True)

    given = filtered(a_generator)(stack.environ_of(path), start_response)
    assert next(iter(given)) == b"a"
    given.close()
    assert closed == [True]
