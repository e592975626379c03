# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""One request, from its start to its end.

Plain WSGI (PEP 3333): the response is the application's own, to the byte and
to the call.  What is added to it is an end: when the application has raised,
or has returned a body that is complete, or the server has closed the body,
the request's hold on its cell's transport ends.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import webob

from cellmw import (
    exceptions,
    faults,
    hidden_errors,
    instance_path,
    lenient_path,
    response_body,
)
from cellmw import runtime as runtimes
from cellmw.cells.mapping import Cell
from cellmw.context import RequestContext
from cellmw.pipeline import Pipeline
from cellmw.transports.handle import Handle

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

LOG = logging.getLogger(__name__)

_NOT_CONFIRMED = Cell("", None, refusal=(exceptions.IdentityNotConfirmed, ""))
_ID = "openstack.request_id"
_NO_CELL = Cell("", None, refusal=(exceptions.InstanceHasNoCell, ""))
_AMBIGUOUS = Cell("", None, refusal=(exceptions.AmbiguousPath, ""))


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
        self._refuse_without_cell = settings.on_no_cell == "refuse"
        self._sets_database = settings.db_connection
        self._pipeline = Pipeline(settings.context_key, self._registry.first)

    def __call__(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        """Serve one request (PEP 3333)."""
        if "HTTP_X_AUTH_TOKEN" in environ and self._pipeline.watches_order:
            self._pipeline.check_order(environ)
        path = environ.get("PATH_INFO", "")
        if self._may_hold_uuid(path):
            uuid = self._find_instance(path)
            if uuid is not None or self._is_ambiguous(path):
                return self._serve(environ, start_response, uuid)
        if environ.get(self._context_key) is None:
            self._make_context(environ)
        if self._registry.several:
            self._registry.remember(environ[self._context_key], self._runtime)
        return self._respond(environ, start_response, None)

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
            answer = self._answer_to(error, environ)
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
            self._pipeline.tell_no_attributes(context, error)
            return faults.not_set_up()(environ, start_response)
        if self._registry.several:
            self._registry.remember(context, self._runtime)
        response_body.know_files_again(environ)
        return self._respond(environ, start_response, handle)

    def _connect(
        self, environ: WSGIEnvironment, uuid: str | None
    ) -> tuple[Handle | None, str | None, Any]:
        """What goes on the context of this request."""
        runtime = self._runtime
        process = runtime.current
        if process is None or process.pid != os.getpid():
            process = runtime.process()
        # Not get(), which is one more call in the way of each request.
        request_id = environ[_ID] if _ID in environ else None  # noqa: SIM401  # get() costs a call
        if uuid is None:
            return Handle(process, _AMBIGUOUS, request_id), None, None
        identity = environ.get("HTTP_X_IDENTITY_STATUS", "Confirmed")
        if identity != "Confirmed":
            return Handle(process, _NOT_CONFIRMED, request_id), None, None
        try:
            cell = process.directory.find(uuid, environ["REQUEST_METHOD"])
        except exceptions.LookupFailed as error:
            if not self._pass_on_failure:
                raise
            refusal = (exceptions.CellNotKnown, error.cause)
            unknown = Cell("", None, refusal=refusal)
            return Handle(process, unknown, request_id), None, None
        if cell is None:
            if self._refuse_without_cell:
                return Handle(process, _NO_CELL, request_id), None, None
            return None, None, None
        database = None
        if self._sets_database:
            database = process.databases.of(cell)
        handle = Handle(process, cell, request_id)
        return handle, cell.uuid or None, database

    def _respond(
        self,
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
            body = self._application(environ, start)
        except BaseException as error:
            if handle is not None:
                handle.release()
            answer = self._answer(environ, start_response, called, error)
            if answer is None:
                raise
            return answer
        kind = type(body)
        if kind is list or kind is tuple:
            if handle is not None:
                handle.release()
            return body
        if handle is None and called:
            # Nothing to release, and no error in it can be answered.
            return body
        answers = functools.partial(
            self._answer, environ, start_response, called
        )
        file_wrapper = environ.get("wsgi.file_wrapper")
        return response_body.wrap(body, file_wrapper, answers, handle)

    def _answer(
        self,
        environ: WSGIEnvironment,
        start_response: StartResponse,
        called: list[bool],
        error: BaseException,
    ) -> Iterable[bytes] | None:
        """Answer for an error; None: it is to be raised again."""
        answer = None if called else self._answer_to(error, environ)
        if answer is None:
            return None
        started: Iterable[bytes] = answer(environ, start_response)
        return started

    def _answer_to(
        self, error: BaseException, environ: WSGIEnvironment
    ) -> webob.Response | None:
        """Turn an error into a response, and note it."""
        answer = faults.answer_to(error)
        if answer is not None and isinstance(error, exceptions.CellMWError):
            refusals = self._runtime.process().refusals
            refusals.note(error, self._request_id(environ))
        return answer

    def _request_id(self, environ: WSGIEnvironment) -> object:
        try:
            of_context = environ[self._context_key].request_id
        except Exception:
            of_context = None  # there is none yet, or it is not an oslo one
        return of_context or environ.get(_ID)

    def _make_context(self, environ: WSGIEnvironment) -> RequestContext:
        self._pipeline.look_for_other_context(environ)
        context = RequestContext.from_request(environ)
        environ[self._context_key] = context
        return context
