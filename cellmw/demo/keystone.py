# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""As much of Keystone as auth_token asks to check a token.

The one token that it knows is the demo's; anybody on this machine may use it
as long as the demo runs.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

TOKEN = "demo"  # noqa: S105  # known to everybody
SERVICE_TOKEN = "demo-service"  # noqa: S105  # the same
PROJECT = "demo"


def application(
    environ: WSGIEnvironment, start_response: StartResponse
) -> Iterable[bytes]:
    """Answer ``GET /v3/auth/tokens``, with the token in X-Subject-Token."""
    known = (
        environ["REQUEST_METHOD"] == "GET"
        and environ["PATH_INFO"] == "/v3/auth/tokens"
        and environ.get("HTTP_X_AUTH_TOKEN") == SERVICE_TOKEN
        and environ.get("HTTP_X_SUBJECT_TOKEN") == TOKEN
    )
    status = "200 OK" if known else "404 Not Found"
    answer = {"token": _token()} if known else {"error": {"code": 404}}
    body = json.dumps(answer).encode()
    start_response(
        status,
        [
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
        ],
    )
    return [body]


def _token() -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    domain = {"id": "default", "name": "Default"}
    return {
        "methods": ["token"],
        "user": {"id": "demo", "name": "demo", "domain": domain},
        "project": {"id": PROJECT, "name": PROJECT, "domain": domain},
        "roles": [{"id": "member", "name": "member"}],
        "catalog": [],
        "issued_at": _text(now),
        "expires_at": _text(now + datetime.timedelta(days=1)),
    }


def _text(moment: datetime.datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S.000000Z")
