# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""A small compute API, as a user of this package writes one.

It knows its instances and the host of each, and nothing of cells.  The
context stands where the filter has put it; errors of sending are left to the
filter, which makes a 503 of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import oslo_messaging
import webob
import webob.dec
import webob.exc
from oslo_config import cfg

from cellmw import configuration, deploy, options, rpc
from cellmw.demo.rpcapi import ComputeAPI
from cellmw.exceptions import ConfigurationError

OPTS = [
    cfg.StrOpt(
        "instances",
        help="A JSON file with the instances: UUID to name and host.",
    )
]
_ROUTE = re.compile(
    r"(?:/v2(?:\.1)?)?/servers"
    r"(?:/(?P<uuid>[^/]+)(?P<action>/action)?)?/?\Z"
)


class Instances:
    """What the service knows of its instances.  Stands for its database."""

    def __init__(self, known: dict[str, dict[str, str]]) -> None:
        self._known = known

    def get(self, uuid: str) -> dict[str, str]:
        """Name and host of an instance."""
        found = self._known.get(uuid.lower())
        if found is None:
            raise _fault(webob.exc.HTTPNotFound, "no such instance")
        return found

    def delete(self, uuid: str) -> None:
        """Forget an instance."""
        self._known.pop(uuid.lower(), None)

    def __iter__(self) -> Iterator[tuple[str, dict[str, str]]]:
        return iter(list(self._known.items()))


class API:
    """The WSGI application."""

    def __init__(self, instances: Instances, compute: ComputeAPI) -> None:
        self._instances = instances
        self._compute = compute
        self._actions: dict[str, Callable[..., webob.Response]] = {
            "reboot": self._reboot,
            "os-getConsoleOutput": self._console_output,
        }

    @webob.dec.wsgify
    def __call__(self, request: webob.Request) -> webob.Response:
        """Answer one request."""
        context = request.environ["cellmw.context"]
        route = _ROUTE.match(request.path_info)
        if route is None:
            raise _fault(webob.exc.HTTPNotFound, "no such resource")
        try:
            return self._dispatch(request, context, **route.groupdict())
        except oslo_messaging.MessagingTimeout:
            raise _fault(
                webob.exc.HTTPGatewayTimeout, "the host does not answer"
            ) from None

    def _dispatch(
        self,
        request: webob.Request,
        context: Any,
        uuid: str | None,
        action: str | None,
    ) -> webob.Response:
        match (request.method, bool(uuid), bool(action)):
            case ("GET", False, False):
                return self._list()
            case ("GET", True, False):
                return self._show(context, uuid)
            case ("DELETE", True, False):
                return self._delete(context, uuid)
            case ("POST", True, True):
                return self._act(request, context, uuid)
        raise _fault(webob.exc.HTTPMethodNotAllowed, "not here")

    def _list(self) -> webob.Response:
        servers = [
            {"id": uuid, "name": known["name"]}
            for uuid, known in self._instances
        ]
        return _answer({"servers": servers})

    def _show(self, context: Any, uuid: Any) -> webob.Response:
        known = self._instances.get(uuid)
        seen = self._compute.get_instance(context, known["host"], uuid)
        return _answer({"server": {"id": uuid, "name": known["name"]} | seen})

    def _delete(self, context: Any, uuid: Any) -> webob.Response:
        host = self._instances.get(uuid)["host"]
        self._compute.delete_instance(context, host, uuid)
        self._instances.delete(uuid)
        return webob.Response(status=204)

    def _act(
        self, request: webob.Request, context: Any, uuid: Any
    ) -> webob.Response:
        host = self._instances.get(uuid)["host"]
        try:
            (name,) = request.json_body
            act = self._actions[name]
        except (ValueError, TypeError, KeyError):
            raise _fault(
                webob.exc.HTTPBadRequest,
                f"the body names one action of {', '.join(self._actions)}",
            ) from None
        return act(context, host, uuid)

    def _reboot(self, context: Any, host: str, uuid: str) -> webob.Response:
        self._compute.reboot_instance(context, host, uuid)
        return webob.Response(status=202)

    def _console_output(
        self, context: Any, host: str, uuid: str
    ) -> webob.Response:
        output = self._compute.get_console_output(context, host, uuid)
        return _answer(output)


def _answer(body: Any) -> webob.Response:
    return webob.Response(json_body=body, content_type="application/json")


def _fault(
    kind: type[webob.exc.WSGIHTTPException], message: str
) -> webob.exc.WSGIHTTPException:
    words = kind.__name__.removeprefix("HTTP")
    name = words[0].lower() + words[1:]
    body = {name: {"code": kind.code, "message": message}}
    return kind(
        body=json.dumps(body).encode(), content_type="application/json"
    )


def app_factory(global_conf: Mapping[str, Any], **local_conf: Any) -> API:
    """Make the application, for Paste (``paste.app_factory``).

    It reads the configuration that the filter reads: one is found by the
    same options.
    """
    source = {
        name: value
        for name in options.PASTE_SOURCE_OPTIONS
        if (value := local_conf.get(name) or global_conf.get(name))
    }
    conf, _ = deploy.read_source(source)
    conf.register_opts(OPTS, group="demo")
    if not conf.demo.instances:
        raise ConfigurationError(
            "the demo's API needs option instances in [demo] "
            f"({configuration.tell_files_of(conf)})"
        )
    rpc.init(conf)
    text = Path(conf.demo.instances).read_text("utf-8")
    return API(Instances(json.loads(text)), ComputeAPI())
