# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What stands around the filter in a test: API database, hosts, service.

Each class owns what it opens and is closed by the fixture that makes it, see
``conftest.py``.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
import threading
import time
import uuid as uuids
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import futurist._thread
import oslo_messaging
import sqlalchemy as sa
import webob
from oslo_config import cfg

from cellmw.cells import tables
from cellmw.cells.mapping import CELL0_UUID
from cellmw.transports import oslo

TOPIC = "compute"
# Longer than anything takes that works, in seconds.
SOON = 10.0

# How often an idle thread of a server looks whether that has been stopped, in
# seconds: with 1, its default, that is how long stopping takes.
vars(futurist._thread)["ThreadWorker"].MAX_IDLE_FOR = 0.02

Handler = Callable[[Any], Any]


def eventually(
    condition: Callable[[], object], *, within: float = SOON
) -> None:
    """Wait until something holds that another thread or a server brings."""
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            # Once more, for what pytest tells of it.
            assert condition()
            return
        time.sleep(0.02)


def configuration(**options: Any) -> cfg.ConfigOpts:
    """A private configuration, with options of ``[DEFAULT]``."""
    conf = cfg.ConfigOpts()
    conf([], project="cellmw-test", default_config_files=[])
    oslo.prepare(conf)
    for name, value in options.items():
        conf.set_override(name, value)
    return conf


class ApiDatabase:
    """The two tables, and what a test puts into them.

    :ivar url: SQLAlchemy's
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._engine = sa.create_engine(url, poolclass=sa.NullPool)
        if self._engine.dialect.name == "sqlite":
            sa.event.listen(self._engine, "connect", _do_not_sync)
        tables.metadata.create_all(self._engine)
        self._ids: dict[str, int] = {}

    def add_cell(
        self,
        url: str | None,
        *,
        uuid: str | None = None,
        name: str = "a-cell",
        disabled: bool = False,
    ) -> str:
        """Add a cell mapping; gives its UUID."""
        uuid = uuid or str(uuids.uuid4())
        self._ids[uuid] = len(self._ids) + 1
        self._execute(
            tables.cell_mappings.insert().values(
                id=self._ids[uuid],
                uuid=uuid,
                name=name,
                transport_url=url,
                database_connection="mysql+pymysql://unused",
                disabled=disabled,
            )
        )
        return uuid

    def add_cell0(self, url: str = "none:///") -> str:
        return self.add_cell(url, uuid=CELL0_UUID, name="cell0")

    def change_cell(self, uuid: str, **values: Any) -> None:
        table = tables.cell_mappings
        self._execute(
            table.update().where(table.c.uuid == uuid).values(**values)
        )

    def add_instances(
        self, cells: Iterable[str | None], *, queued_for_delete: bool = False
    ) -> list[str]:
        """Add an instance mapping for each cell; gives their UUIDs."""
        rows = [
            {
                "instance_uuid": str(uuids.uuid4()),
                "cell_id": None if cell is None else self._ids[cell],
                "project_id": "demo",
                "queued_for_delete": queued_for_delete,
            }
            for cell in cells
        ]
        self._execute(tables.instance_mappings.insert().values(rows))
        return [str(row["instance_uuid"]) for row in rows]

    def add_instance(
        self, cell: str | None, *, queued_for_delete: bool = False
    ) -> str:
        (uuid,) = self.add_instances(
            [cell], queued_for_delete=queued_for_delete
        )
        return uuid

    def move_instance(self, uuid: str, cell: str | None) -> None:
        table = tables.instance_mappings
        self._execute(
            table.update()
            .where(table.c.instance_uuid == uuid)
            .values(cell_id=None if cell is None else self._ids[cell])
        )

    def _execute(self, statement: sa.Executable) -> None:
        with self._engine.begin() as connection:
            connection.execute(statement)

    def close(self) -> None:
        self._engine.dispose()


def _do_not_sync(connection: Any, _: object) -> None:
    # Waiting for the disk is most of what these tests would do.
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute("PRAGMA journal_mode = MEMORY")


class AllowedError(Exception):
    """Raised at a host; the test lets its module's errors come back."""


class Host:
    """An RPC server, and the messages that reached it.

    :ivar name: what it answers with
    :ivar messages: method, instance UUID and context of each
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.messages: list[tuple[str, str, dict[str, Any]]] = []

    def instances(self) -> list[str]:
        """The instances of its messages, in the order of their arrival."""
        return [uuid for _, uuid, _ in self.messages]

    def reboot_instance(
        self, ctxt: dict[str, Any], instance_uuid: str = ""
    ) -> None:
        self.messages.append(("reboot_instance", instance_uuid, ctxt))

    def get_console_output(
        self, ctxt: dict[str, Any], instance_uuid: str = ""
    ) -> list[str]:
        self.messages.append(("get_console_output", instance_uuid, ctxt))
        return [self.name, instance_uuid]

    def fail(self, ctxt: dict[str, Any], text: str) -> None:
        raise AllowedError(text)


class SlowHost(Host):
    """A host whose calls end when the test lets them."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.busy = threading.Event()
        self.go_on = threading.Event()

    def get_console_output(
        self, ctxt: dict[str, Any], instance_uuid: str = ""
    ) -> list[str]:
        self.busy.set()
        assert self.go_on.wait(SOON)
        return super().get_console_output(ctxt, instance_uuid)


@contextlib.contextmanager
def serving(
    url: str, host: Host, *, server: str = "host", topic: str = TOPIC
) -> Iterator[Host]:
    """Let a host take the messages of its cell."""
    transport = oslo_messaging.get_rpc_transport(configuration(), url)
    rpc_server = oslo_messaging.get_rpc_server(
        transport,
        oslo_messaging.Target(topic=topic, server=server),
        [host],
    )
    rpc_server.start()
    try:
        yield host
    finally:
        rpc_server.stop()
        rpc_server.wait()
        transport.cleanup()


class MakeFilter(Protocol):
    def __call__(
        self,
        *,
        conf: cfg.ConfigOpts | None = None,
        database: str | None = None,
        **paste: Any,
    ) -> Callable[[Any], Any]: ...


class Serve(Protocol):
    def __call__(
        self,
        url: str,
        host: Host | None = None,
        *,
        server: str = "host",
        topic: str = TOPIC,
    ) -> Host: ...


class Api:
    """A WSGI application: what it does with a context, the test says.

    :ivar contexts: of its requests, in their order
    """

    def __init__(
        self, handler: Handler = repr, *, key: str = "cellmw.context"
    ) -> None:
        self.handler = handler
        self.key = key
        self.contexts: list[Any] = []

    def __call__(
        self, environ: dict[str, Any], start_response: Any
    ) -> list[bytes]:
        context = environ.get(self.key)
        self.contexts.append(context)
        body = str(self.handler(context)).encode()
        start_response(
            "200 OK",
            [("Content-Type", "text/plain"), ("X-From", "application")],
        )
        return [body]


def request(
    application: Any,
    path: str,
    method: str = "GET",
    *,
    headers: Mapping[str, str] | None = None,
    environ: Mapping[str, Any] | None = None,
) -> webob.Response:
    """Make a request as a server does, and read the response to its end."""
    made = webob.Request.blank(
        path,
        method=method,
        headers=dict(headers or {}),
        environ=dict(environ or {}),
    )
    response = made.get_response(application)
    # Reads it to its end, and closes it.
    assert isinstance(response.body, bytes)
    return response


def environ_of(
    path: str, method: str = "GET", environ: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The environ of a request, as a server makes it."""
    made: dict[str, Any] = webob.Request.blank(
        path, method=method, environ=dict(environ or {})
    ).environ
    return made


def target(**options: Any) -> oslo_messaging.Target:
    """What a client of the hosts asks for."""
    return oslo_messaging.Target(topic=TOPIC, **options)


def app_factory(global_conf: Mapping[str, str]) -> Api:
    """For ``paste.app_factory``."""
    return Api()


def run_python(
    code: str, *args: str, env: Mapping[str, str] | None = None
) -> str:
    """Run code in a process of its own; gives what it prints."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), *args],
        env={**os.environ, "PYTHONPATH": str(root), **(env or {})},
        cwd=root,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


_HOST_PROCESS = """
    import sys
    from tests.functional import stack

    with stack.serving(sys.argv[1], stack.Host(sys.argv[2])):
        print("ready", flush=True)
        sys.stdin.read()
"""


@contextlib.contextmanager
def host_process(url: str, name: str) -> Iterator[None]:
    """A host in a process of its own, that its connections are not ours."""
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [
            *(sys.executable, "-W", "ignore", "-c"),
            *(textwrap.dedent(_HOST_PROCESS), url, name),
        ],
        env={**os.environ, "PYTHONPATH": str(root)},
        cwd=root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"ready\n"
            yield
        finally:
            process.stdin.close()
            process.wait(SOON)
