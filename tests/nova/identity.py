# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""A filter in the place of ``authtoken``: everybody is the administrator."""

from __future__ import annotations

from typing import Any

PROJECT = "0123456789abcdef0123456789abcdef"
USER = "fedcba9876543210fedcba9876543210"

_HEADERS = {
    "HTTP_X_IDENTITY_STATUS": "Confirmed",
    "HTTP_X_USER_ID": USER,
    "HTTP_X_PROJECT_ID": PROJECT,
    "HTTP_X_ROLES": "admin,manager,member,reader",
}


def filter_factory(global_conf: Any, **local_conf: Any) -> Any:
    """For ``paste.filter_factory``."""

    def make(application: Any) -> Any:
        def confirmed(environ: dict[str, Any], start_response: Any) -> Any:
            environ.update(_HEADERS)
            return application(environ, start_response)

        return confirmed

    return make
