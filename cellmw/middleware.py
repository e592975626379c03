# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""One request, from its start to its end.

Plain WSGI (PEP 3333): the response is the application's own, to the byte and
to the call.  What is added to it is an end: when the application has raised,
or has returned a body that is complete, or the server has closed the body,
the request's hold on its cell's transport ends.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import webob
from oslo_context import context as oslo_context

from cellmw import (
    exceptions,
    faults,
    hidden_errors,
    instance_path,
    lenient_path,
    redaction,
)
from cellmw import runtime as runtimes
from cellmw.cells.mapping import Cell
from cellmw.context import RequestContext
from cellmw.transports.handle import Handle

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

LOG = logging.getLogger(__name__)

_NOT_CONFIRMED = Cell("", None, refusal=(exceptions.IdentityNotConfirmed, ""))
_AMBIGUOUS = Cell("", None, refusal=(exceptions.AmbiguousPath, ""))

# In how many requests without a context at its key another key is looked
# for.  The pipeline does not change, so the first ones tell.
_LOOKS_FOR_OTHER_KEY = 1000


class CellMW:
    """The filter: gives each request the queue of its instance's cell.

    Made by :func:`cellmw.filter_factory`.  Thread-safe.

    :param application: what stands behind it
    :param runtime: what it shares with filters of equal settings
    """

    def __init__(
        self, application: WSGIApplication, runtime: runtimes.Runtime
    ) -> None:
        if runtime.settings.nova_cell_cache:
            application = hidden_errors.Revealing(application)
        self._application = application
        self._runtime = runtime
        self._registry = runtimes.registry()
        settings = runtime.settings
        self._context_key = settings.context_key
        patterns = settings.instance_path_patterns
        self._may_hold_uuid = instance_path.quick_check(patterns)
        self._find_instance = instance_path.finder(patterns)
        self._is_ambiguous = lenient_path.checker(patterns)
        self._pass_on_failure = settings.on_lookup_failure == "pass"
        self._sets_database = settings.db_connection
        self._looks_left = _LOOKS_FOR_OTHER_KEY
        self._first_other_key = _Once()
        self._first_no_attributes = _Once()

    def __call__(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        """Serve one request (PEP 3333)."""
        path = environ.get("PATH_INFO", "")
        if self._may_hold_uuid(path):
            uuid = self._find_instance(path)
            if uuid is not None or self._is_ambiguous(path):
                return self._serve(environ, start_response, uuid)
        if environ.get(self._context_key) is None:
            self._make_context(environ)
        if self._registry.several:
            self._registry.remember(environ[self._context_key], self._runtime)
        return _respond(self._application, environ, start_response, None)

    def _serve(
        self,
        environ: WSGIEnvironment,
        start_response: StartResponse,
        uuid: str | None,
    ) -> Iterable[bytes]:
        """Serve a request that names an instance, or might (None)."""
        try:
            handle, cell_uuid, database = self._connect(environ, uuid)
        except exceptions.LookupFailed as error:
            answer = faults.answer_to(error)
            assert answer is not None
            return answer(environ, start_response)
        context = environ.get(self._context_key)
        if context is None:
            context = self._make_context(environ)
        try:
            context.mq_connection = handle
            context.cell_uuid = cell_uuid
            if self._sets_database:
                context.db_connection = database
        except Exception as error:
            # Some of these may be on it already.
            if handle is not None:
                handle.release()
            answer = self._no_attributes(context, error)
            return answer(environ, start_response)
        if self._registry.several:
            self._registry.remember(context, self._runtime)
        _know_files_again(environ)
        return _respond(self._application, environ, start_response, handle)

    def _connect(
        self, environ: WSGIEnvironment, uuid: str | None
    ) -> tuple[Handle | None, str | None, Any]:
        """What goes on the context of this request."""
        runtime = self._runtime
        process = runtime.current
        if process is None or process.pid != os.getpid():
            process = runtime.process()
        if uuid is None:
            return Handle(process, _AMBIGUOUS), None, None
        identity = environ.get("HTTP_X_IDENTITY_STATUS", "Confirmed")
        if identity != "Confirmed":
            return Handle(process, _NOT_CONFIRMED), None, None
        try:
            cell = process.directory.find(uuid, environ["REQUEST_METHOD"])
        except exceptions.LookupFailed as error:
            if not self._pass_on_failure:
                raise
            refusal = (exceptions.CellNotKnown, error.cause)
            return Handle(process, Cell("", None, refusal=refusal)), None, None
        if cell is None:
            return None, None, None
        database = None
        if self._sets_database:
            database = process.databases.of(cell)
        return Handle(process, cell), cell.uuid or None, database

    def _make_context(self, environ: WSGIEnvironment) -> RequestContext:
        if self._looks_left > 0:
            self._look_for_other_key(environ)
        context = RequestContext.from_request(environ)
        environ[self._context_key] = context
        return context

    def _look_for_other_key(self, environ: WSGIEnvironment) -> None:
        self._looks_left -= 1
        for key, value in environ.items():
            if isinstance(value, oslo_context.RequestContext):
                self._looks_left = 0
                if self._first_other_key():
                    self._tell_of_other_key(redaction.one_line(key))
                return

    def _tell_of_other_key(self, key: str) -> None:
        LOG.warning(
            "Nothing stands in the environ under %r, but a request "
            "context stands under %r. If that is the service's own, "
            "set context_key = %s in the filter's section.",
            self._context_key,
            key,
            key,
        )

    def _no_attributes(
        self, context: object, error: Exception
    ) -> webob.Response:
        if self._first_no_attributes():
            LOG.error(
                "The request context under context_key = %s is a %s and "
                "takes no attributes (%s), so requests for instances get "
                "500. Point context_key to the service's request context.",
                self._context_key,
                type(context).__qualname__,
                type(error).__qualname__,
            )
        return faults.not_set_up()


class _Once:
    """Says yes the first time that it is asked, to one thread only."""

    __slots__ = ("_answers",)

    def __init__(self) -> None:
        self._answers = [True]

    def __call__(self) -> bool:
        try:
            return self._answers.pop()  # one step: no other thread between
        except IndexError:
            return False


def _respond(
    application: WSGIApplication,
    environ: WSGIEnvironment,
    start_response: StartResponse,
    handle: Handle | None,
) -> Iterable[bytes]:
    """Call the application, and see to it that the handle is released."""
    called: list[bool] = []

    def start(
        status: str, headers: list[tuple[str, str]], *exc_info: Any
    ) -> Callable[[bytes], object]:
        called.append(True)
        return start_response(status, headers, *exc_info)

    try:
        body = application(environ, start)
    except BaseException as error:
        if handle is not None:
            handle.release()
        answer = None if called else faults.answer_to(error)
        if answer is None:
            raise
    else:
        kind = type(body)
        if kind is list or kind is tuple:
            if handle is not None:
                handle.release()
            return body
        return _wrap(body, environ, start_response, called, handle)
    return answer(environ, start_response)


def _wrap(
    body: Iterable[bytes],
    environ: WSGIEnvironment,
    start_response: StartResponse,
    called: list[bool],
    handle: Handle | None,
) -> Iterable[bytes]:
    """Give a body that is still to come an end, but for a server's file.

    Where there is nothing to release, it is wrapped only as long as the
    response has not started: an error in it may yet be answered.
    """
    if handle is None and called:
        return body
    try:
        if _is_servers_file(body, environ.get("wsgi.file_wrapper")):
            if handle is not None:
                handle.release()
            return body
        # The class is asked, as len() does: a __getattr__ has no say.
        wrapper = _SizedBody if hasattr(type(body), "__len__") else _Body
        return wrapper(body, environ, start_response, called, handle)
    except BaseException:
        # The server gets nothing that it could close.
        _end(body, handle)
        raise


def _end(body: object, handle: Handle | None) -> None:
    """Close the application's body, and release the handle."""
    try:
        close = getattr(body, "close", None)
        if close is not None:
            close()
    finally:
        if handle is not None:
            handle.release()


class _FileWrapper:
    """A server's file wrapper that is a function, and what it has made.

    uWSGI's gives back the file itself and knows it again by identity.
    """

    def __init__(self, wrapper: Callable[..., Any]) -> None:
        self._wrapper = wrapper
        self.made: object = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.made = self._wrapper(*args, **kwargs)
        return self.made


def _know_files_again(environ: WSGIEnvironment) -> None:
    wrapper = environ.get("wsgi.file_wrapper")
    if wrapper is not None and not isinstance(wrapper, type):
        environ["wsgi.file_wrapper"] = _FileWrapper(wrapper)


def _is_servers_file(body: object, file_wrapper: Any) -> bool:
    if isinstance(file_wrapper, type):
        return isinstance(body, file_wrapper)
    return isinstance(file_wrapper, _FileWrapper) and (
        body is file_wrapper.made
    )


class _Body:
    """The application's body, with an end at which the handle is released.

    Owned by the server, which closes it (PEP 3333).
    """

    __slots__ = (
        "_body",
        "_called",
        "_environ",
        "_handle",
        "_iterator",
        "_start_response",
    )

    def __init__(
        self,
        body: Iterable[bytes],
        environ: WSGIEnvironment,
        start_response: StartResponse,
        called: list[bool],
        handle: Handle | None,
    ) -> None:
        self._body = body
        self._iterator: Iterator[bytes] | None = None
        self._environ = environ
        self._start_response = start_response
        self._called = called
        self._handle = handle

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            if self._iterator is None:
                self._iterator = iter(self._body)
            return next(self._iterator)
        except exceptions.CellMWError as error:
            answer = None if self._called else faults.answer_to(error)
            if answer is None:
                raise
        self._iterator = iter(answer(self._environ, self._start_response))
        return next(self._iterator)

    def close(self) -> None:
        """Close the application's body, and release the handle."""
        body, self._body = self._body, ()
        try:
            _end(body, self._handle)
        finally:
            self._iterator = None

    def __del__(self) -> None:
        handle = self._handle
        if handle is not None and handle.abandon():
            LOG.warning(
                "A response was neither closed by the server nor by what "
                "stands in front of this filter (PEP 3333 wants close() to "
                "be called); %r was held until now.",
                handle,
            )


class _SizedBody(_Body):
    """A body whose number of chunks is known: servers make use of it."""

    __slots__ = ()

    def __iter__(self) -> Iterator[bytes]:
        # One without a length: list() would ask for it, and a length that
        # raises is the body's, not its iterator's.
        return iter(self.__next__, self)

    def __bool__(self) -> bool:
        return bool(self._body)

    def __len__(self) -> int:
        return len(self._body)  # type: ignore[arg-type]  # only where it has
