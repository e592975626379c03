# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Our own answer where an application hides our error behind a 500.

Nova answers 500 for every error that it does not know.  An ``mq_connection``
notes each error of its own; a 500 of that request that has not started is then
replaced.  A context variable leads from the message to the request: a
transport of Nova's cache belongs to none.  The variable is set only while the
application runs, and only in its thread, so threads that the application
starts note nothing.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import webob

from cellmw import exceptions, faults

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

_GATEWAY_TIMEOUT = 504


class _Noted:
    """The answer to the errors of one request."""

    __slots__ = ("answer", "request_id")

    def __init__(self, request_id: object) -> None:
        self.request_id = request_id
        self.answer: webob.Response | None = None

    def note(self, error: exceptions.CellMWError) -> None:
        # Once a message may have arrived, no later error invites a retry.
        last = self.answer
        if last is None or last.status_int != _GATEWAY_TIMEOUT:
            self.answer = faults.answer_to(error) or last


_current: contextvars.ContextVar[_Noted | None] = contextvars.ContextVar(
    "cellmw_noted", default=None
)


def note(error: exceptions.CellMWError) -> None:
    """Note an error for the request that this thread serves, if any.

    Keeps what the answer needs, and not the error itself.
    """
    noted = _current.get()
    if noted is not None:
        noted.note(error)


def request_id() -> object:
    """The id of the request that this thread serves, where it is known."""
    noted = _current.get()
    return None if noted is None else noted.request_id


class Revealing:
    """A WSGI application whose 500 gives way to the answer to our error.

    Everything else passes unchanged: the body is never wrapped, and a
    response that starts after the application has returned is left alone.

    :param application: the one that hides errors
    """

    def __init__(self, application: WSGIApplication) -> None:
        self._application = application

    def __call__(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        """Serve one request (PEP 3333)."""
        noted = _Noted(environ.get("openstack.request_id"))
        running = True
        hidden = False

        def start(
            status: str, headers: list[tuple[str, str]], *exc_info: Any
        ) -> Callable[[bytes], object]:
            nonlocal hidden
            hidden = (
                running
                and noted.answer is not None
                and status.startswith("500")
            )
            if hidden:
                return _discard
            return start_response(status, headers, *exc_info)

        token = _current.set(noted)
        try:
            body = self._application(environ, start)
        finally:
            running = False
            _current.reset(token)
        if not hidden or noted.answer is None:
            return body
        close = getattr(body, "close", None)
        if close is not None:
            close()
        answer: Iterable[bytes] = noted.answer(environ, start_response)
        return answer


def _discard(_: bytes) -> None:
    """The ``write`` of a response that nobody gets."""
