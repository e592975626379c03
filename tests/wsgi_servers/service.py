# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The service that the servers under test serve.

Its last path segment says how it answers.  ``/stats`` tells what the process
that answers holds.  WSGI servers import ``application`` from here; the
environment names the paste file and the configuration file.
"""

from __future__ import annotations

import io
import json
import os
import threading
import wsgiref.validate
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import oslo_messaging
import psutil
from oslo_config import cfg
from paste import deploy

from cellmw import rpc, runtime
from cellmw.transports import oslo

CHUNK = b"x" * 8192
CHUNKS = 64

Start = Callable[..., Callable[[bytes], object]]
Environ = dict[str, Any]

_client = rpc.get_client(oslo_messaging.Target(topic="compute"))


class Failed(Exception):
    """What the application raises when it is told to."""


def _cast(environ: Environ) -> None:
    _client.cast(environ["cellmw.context"], "reboot_instance")


def _text(start: Start, body: bytes) -> list[bytes]:
    start(
        "200 OK",
        [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))],
    )
    return [body]


def cast(environ: Environ, start: Start) -> Iterable[bytes]:
    """Cast, and answer with a list."""
    _cast(environ)
    return _text(start, b"cast")


def call(environ: Environ, start: Start) -> Iterable[bytes]:
    """Call the host, and answer with what it says."""
    context = environ["cellmw.context"]
    name, _ = _client.call(context, "get_console_output")
    return _text(start, name.encode())


def stream(environ: Environ, start: Start) -> Iterable[bytes]:
    """Cast while the body is produced."""
    start("200 OK", [("Content-Type", "application/octet-stream")])

    def body() -> Iterator[bytes]:
        _cast(environ)
        for _ in range(CHUNKS):
            yield CHUNK

    return body()


def file(environ: Environ, start: Start) -> Iterable[bytes]:
    """Cast, and give a file to the server's wrapper, if it has one."""
    _cast(environ)
    opened = io.BytesIO(CHUNK)
    start(
        "200 OK",
        [
            ("Content-Type", "application/octet-stream"),
            ("Content-Length", str(len(CHUNK))),
        ],
    )
    wrapper = environ.get("wsgi.file_wrapper")
    if wrapper is None:
        return iter(lambda: opened.read(4096), b"")
    wrapped: Iterable[bytes] = wrapper(opened, 4096)
    return wrapped


def write(environ: Environ, start: Start) -> Iterable[bytes]:
    """Cast, and answer through write()."""
    _cast(environ)
    put = start("200 OK", [("Content-Type", "text/plain")])
    put(b"writ")
    put(b"ten")
    return []


def raise_before(environ: Environ, start: Start) -> Iterable[bytes]:
    """Cast, and fail before the response starts."""
    _cast(environ)
    raise Failed


def raise_after(environ: Environ, start: Start) -> Iterable[bytes]:
    """Cast, and fail after start_response."""
    _cast(environ)
    start("200 OK", [("Content-Type", "text/plain")])
    raise Failed


def raise_in_body(environ: Environ, start: Start) -> Iterable[bytes]:
    """Cast, and fail after the first chunk."""
    start("200 OK", [("Content-Type", "text/plain")])

    def body() -> Iterator[bytes]:
        _cast(environ)
        yield CHUNK
        raise Failed

    return body()


def stats(environ: Environ, start: Start) -> Iterable[bytes]:
    """What this process holds."""
    leased = opened = 0
    for known in runtime.registry():
        found = known.process().pool.stats()
        leased += found.leases
        opened += found.total.open
    own = psutil.Process()
    answer = {
        "pid": os.getpid(),
        "leased": leased,
        "open": opened,
        "threads": threading.active_count(),
        "descriptors": own.num_fds(),
        "memory": own.memory_info().rss,
    }
    return _text(start, json.dumps(answer).encode())


_HANDLERS = {
    handler.__name__: handler
    for handler in (
        cast,
        call,
        stream,
        file,
        write,
        raise_before,
        raise_after,
        raise_in_body,
        stats,
    )
}


def api(environ: Environ, start: Start) -> Iterable[bytes]:
    """The WSGI application."""
    name = environ["PATH_INFO"].rpartition("/")[2]
    return _HANDLERS[name](environ, start)


def app_factory(
    global_conf: Mapping[str, str], **local_conf: str
) -> Callable[[Environ, Start], Iterable[bytes]]:
    """For ``paste.app_factory``.  Sets up the default transport."""
    conf = cfg.ConfigOpts()
    conf(
        [],
        project="cellmw-test",
        default_config_files=[global_conf["oslo_config_file"]],
    )
    oslo.prepare(conf)
    rpc.init(conf)
    if os.environ.get("SERVICE_VALIDATE"):
        return wsgiref.validate.validator(api)
    return api


def _load() -> Any:
    loaded = deploy.loadapp(
        f"config:{os.environ['SERVICE_PASTE_FILE']}",
        global_conf={"oslo_config_file": os.environ["SERVICE_CONFIG_FILE"]},
    )
    if os.environ.get("SERVICE_VALIDATE"):
        return wsgiref.validate.validator(loaded)
    return loaded


if "SERVICE_PASTE_FILE" in os.environ:
    application = _load()
