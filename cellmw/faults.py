# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Responses to errors, in the form of the compute API's faults.

The form is that of the API guide, "Faults".  The texts are for clients: they
name no cell, and they say "try again" only where that can help.
"""

from __future__ import annotations

import webob

from cellmw import exceptions

_TEMPORARY = "The service cannot serve this request now. Try again later."
_LASTING = "The service cannot serve this request."
_UNCERTAIN = (
    "The service does not know whether this request was carried out. Look at "
    "the state of the resource before you send another request."
)
_NOT_SET_UP = "The service is not set up to serve this request."


def answer_to(error: BaseException) -> webob.Response | None:
    """The response to an error that an application has let through.

    :returns: None where the error is not this package's, or is the
        application's own mistake
    """
    if not isinstance(error, exceptions.CellMWError) or isinstance(
        error, exceptions.TransportReleased | exceptions.InvalidMessage
    ):
        return None
    if isinstance(error, exceptions.SendError) and error.maybe_delivered:
        # No Retry-After: a client that repeats the request may act twice.
        return _fault(504, "gatewayTimeout", _UNCERTAIN)
    text = _TEMPORARY if error.is_temporary else _LASTING
    response = _fault(503, "serviceUnavailable", text)
    response.headers["Retry-After"] = error.retry_after_header
    return response


def not_set_up() -> webob.Response:
    """The response where the service itself is put together wrongly."""
    return _fault(500, "computeFault", _NOT_SET_UP)


def _fault(code: int, kind: str, message: str) -> webob.Response:
    response = webob.Response(status=code, charset="UTF-8")
    response.content_type = "application/json"
    response.json_body = {kind: {"code": code, "message": message}}
    return response
