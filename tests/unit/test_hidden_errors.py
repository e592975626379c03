# Licensed under the Apache License, Version 2.0; see the file LICENSE.
from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from cellmw import exceptions, hidden_errors
from tests.functional import stack

DOWN = exceptions.CellUnavailable("it is down", retry_after=7.0)
UNCERTAIN = exceptions.DeliveryUncertain("no confirm")
RELEASED = exceptions.TransportReleased()


def serve(handler: Callable[[], Any], status: str = "500 Hidden") -> Any:
    """The response where an application hides what its handler does."""

    def application(environ: Any, start_response: Any) -> list[bytes]:
        handler()
        start_response(status, [("X-From", "application")])
        return [b"hidden"]

    revealing = hidden_errors.Revealing(application)
    return stack.request(revealing, "/")


def noting(*errors: exceptions.CellMWError) -> Callable[[], None]:
    def handler() -> None:
        for error in errors:
            hidden_errors.note(error)

    return handler


def test_a_500_gives_way_to_the_answer_to_our_error() -> None:
    response = serve(noting(DOWN))
    assert response.status_int == 503
    assert response.headers["Retry-After"] == "7"
    assert response.json["serviceUnavailable"]["code"] == 503
    assert "X-From" not in response.headers


@pytest.mark.parametrize("status", ["200 OK", "409 Conflict", "503 Busy"])
def test_any_other_status_is_the_applications(status: str) -> None:
    response = serve(noting(DOWN), status)
    assert (response.status, response.body) == (status, b"hidden")


@pytest.mark.parametrize("errors", [(), (RELEASED,)])
def test_a_500_without_an_error_of_ours_stays(
    errors: tuple[exceptions.CellMWError, ...],
) -> None:
    response = serve(noting(*errors))
    assert (response.status_int, response.body) == (500, b"hidden")


@pytest.mark.parametrize(
    "errors",
    [
        (UNCERTAIN, DOWN),
        (DOWN, UNCERTAIN),
        (DOWN, UNCERTAIN, RELEASED),
    ],
)
def test_what_may_have_arrived_outweighs_what_did_not(
    errors: tuple[exceptions.CellMWError, ...],
) -> None:
    assert serve(noting(*errors)).status_int == 504


def test_the_last_error_is_answered() -> None:
    last = exceptions.CellBusy("too many", retry_after=9.0)
    assert serve(noting(DOWN, last)).headers["Retry-After"] == "9"


def test_an_error_is_forgotten_with_its_request() -> None:
    serve(noting(DOWN))
    hidden_errors.note(DOWN)
    assert serve(noting()).status_int == 500


def test_an_application_s_mistake_takes_no_answer_away() -> None:
    assert serve(noting(DOWN, RELEASED)).status_int == 503


def test_an_error_after_an_inner_request_is_the_outer_one_s() -> None:
    def handler() -> None:
        assert serve(noting()).status_int == 500
        hidden_errors.note(DOWN)

    assert serve(handler).status_int == 503


def test_an_error_does_not_reach_another_thread_s_request() -> None:
    noted, answered = threading.Event(), threading.Event()
    statuses = []

    def failing() -> None:
        hidden_errors.note(DOWN)
        noted.set()
        assert answered.wait(stack.SOON)

    thread = threading.Thread(
        target=lambda: statuses.append(serve(failing).status_int)
    )
    thread.start()
    assert noted.wait(stack.SOON)
    assert serve(noting()).status_int == 500
    answered.set()
    thread.join()
    assert statuses == [503]


def test_the_application_s_exception_passes() -> None:
    def fail() -> None:
        hidden_errors.note(DOWN)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        serve(fail)
    assert serve(noting()).status_int == 500


class Body:
    """A body that tells whether it was closed."""

    def __init__(self) -> None:
        self.closed = 0

    def __iter__(self) -> Iterator[bytes]:
        yield b"body"

    def close(self) -> None:
        self.closed += 1


def test_the_body_of_the_hidden_response_is_closed() -> None:
    body = Body()

    def application(environ: Any, start_response: Any) -> Iterable[bytes]:
        hidden_errors.note(DOWN)
        start_response("500 Hidden", [])(b"written")
        return body

    response = stack.request(hidden_errors.Revealing(application), "/")
    assert (response.status_int, body.closed) == (503, 1)


def test_a_body_that_is_not_replaced_is_the_very_same() -> None:
    body = Body()

    def application(environ: Any, start_response: Any) -> Iterable[bytes]:
        hidden_errors.note(DOWN)
        start_response("200 OK", [])
        return body

    revealing = hidden_errors.Revealing(application)
    given = revealing(stack.environ_of("/"), lambda *args: lambda data: None)
    assert given is body
    assert body.closed == 0


def test_a_response_that_starts_after_the_return_is_left_alone() -> None:
    def application(environ: Any, start_response: Any) -> Iterable[bytes]:
        hidden_errors.note(DOWN)

        def lazy() -> Iterator[bytes]:
            start_response("500 Late", [])
            yield b"late"

        return lazy()

    response = stack.request(hidden_errors.Revealing(application), "/")
    assert (response.status, response.body) == ("500 Late", b"late")


def test_a_500_that_the_application_takes_back_is_not_replaced() -> None:
    def application(environ: Any, start_response: Any) -> Iterable[bytes]:
        hidden_errors.note(DOWN)
        start_response("500 Hidden", [])
        start_response("200 OK", [])
        return [b"mended"]

    response = stack.request(hidden_errors.Revealing(application), "/")
    assert (response.status_int, response.body) == (200, b"mended")
