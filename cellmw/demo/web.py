# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""A WSGI server on a port of this machine: the standard library's."""

from __future__ import annotations

import socketserver
import threading
from typing import TYPE_CHECKING, Any
from wsgiref import simple_server

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

HOST = "127.0.0.1"


class _Server(socketserver.ThreadingMixIn, simple_server.WSGIServer):
    # A request that hangs must not hold the demo's end.
    daemon_threads = True
    request_queue_size = 128

    def server_bind(self) -> None:
        # Not WSGIServer's, which asks the resolver for the machine's name.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.server_address[1]
        self.setup_environ()


class _Handler(simple_server.WSGIRequestHandler):
    # The base class calls it so.
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the base class names it so
        """Say nothing; the demo tells what it wants to tell."""


class WebServer:
    """Serves an application, a thread for each request, until :meth:`stop`.

    :param port: 0: any that is free
    :ivar url: where it is
    :raises OSError: the port is taken
    """

    def __init__(self, application: WSGIApplication, port: int = 0) -> None:
        self._server = _Server((HOST, port), _Handler)
        self._server.set_app(application)
        self.port: int = self._server.server_port
        self.url = f"http://{HOST}:{self.port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever,
            kwargs={"poll_interval": 0.05},
            name=f"demo-http-{self.port}",
            daemon=True,
        )
        self._thread.start()

    def stop(self) -> None:
        """Take no more requests, and close the port."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
