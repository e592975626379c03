# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The whole site: put up, and taken down again whatever happens.

A :class:`Site` owns queues, tables, hosts, servers and the temporary folder;
:func:`open_site` closes all of them in the reverse order.  Something that
cannot be closed is reported, and does not keep the rest from being closed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import shutil
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from oslo_config import cfg
from paste import deploy

import cellmw
from cellmw import redaction, rpc, runtime
from cellmw.cells.instance_changes import InstanceMapping
from cellmw.cells.mapping import CELL0_UUID, CellMapping
from cellmw.demo import keystone
from cellmw.demo.brokers import Brokers
from cellmw.demo.database import Database
from cellmw.demo.errors import DemoError
from cellmw.demo.hosts import HOST_NAME, Host, Ledger
from cellmw.demo.threads import at_once
from cellmw.demo.web import WebServer
from cellmw.transports import oslo
from cellmw.workers import Workers

CELLS = ("cell1", "cell2", "cell3")
# The service's own queue.  A host listens there too, where nothing arrives.
DEFAULT = "default"
CELL0 = "cell0"
INSTANCES = 6
# How long starting or ending one thing may take, in seconds.
_PATIENCE = 30.0
_SAMPLE = "api-paste.ini.sample"


@dataclasses.dataclass(frozen=True, slots=True)
class Instance:
    """An instance of the demo.

    :ivar cell: the name of its cell
    """

    uuid: str
    name: str
    cell: str


@dataclasses.dataclass(frozen=True, slots=True)
class Site:
    """What is up.

    :ivar url: of the API
    :ivar paste_file: the pipeline that it serves
    :ivar config_file: the configuration, as ``cellmw-manage`` takes it
    """

    url: str
    paste_file: Path
    config_file: Path
    brokers: str
    database: str
    instances: tuple[Instance, ...]
    ledger: Ledger


def paste_file() -> Path:
    """The sample paste file: the checkout's, or the one installed."""
    # First: the copy of an editable install may be out of date.
    here = Path(cellmw.__file__).parents[1] / "etc" / _SAMPLE
    if here.is_file():
        return here
    for file in importlib.metadata.files("cellmw") or ():
        if file.name == _SAMPLE:
            return Path(str(file.locate())).resolve()
    raise DemoError(f"{_SAMPLE} is missing from this installation")


class _Cleanup:
    """What is to be done at the end, the last thing first."""

    def __init__(self) -> None:
        self._chores: list[tuple[str, Callable[[], object]]] = []
        self._workers = Workers(name="demo-worker")

    def add(self, what: str, function: Callable[[], object]) -> None:
        """Do this at the end.

        :param what: what could not be done, if it fails
        """
        self._chores.append((what, function))

    def bounded(self, what: str, function: Callable[[], object]) -> None:
        """Do something now that may hang.

        :raises DemoError: it failed, or did not end in time
        """
        job = self._workers.submit(function)
        if not job.wait(_PATIENCE):
            raise DemoError(f"{what}: it takes too long")
        if isinstance(job.error, DemoError):
            raise DemoError(f"{what}: {job.error}")
        if job.error is not None:
            raise DemoError(f"{what}: {redaction.describe(job.error)}")

    def run(self) -> None:
        """Do all of it, and tell what failed."""
        while self._chores:
            what, function = self._chores.pop()
            try:
                self.bounded(what, function)
            except DemoError as error:
                print(f"cellmw-demo: not cleaned up: {error}", file=sys.stderr)
        self._workers.close()


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C, so that the clean-up is complete."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.SIG_IGN) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


@contextlib.contextmanager
def open_site(
    brokers: Brokers,
    ledger: Ledger,
    *,
    database_url: str | None = None,
    port: int = 0,
    options: str = "",
) -> Iterator[Site]:
    """Put the site up; take it down at the end.

    :param ledger: where the hosts note what reaches them
    :param database_url: None: SQLite
    :param options: text of a configuration file, to be used as well
    :raises DemoError: something cannot be had
    """
    cleanup = _Cleanup()
    try:
        yield _put_up(cleanup, brokers, ledger, database_url, port, options)
    except KeyboardInterrupt:
        print("\nTaking it down ...", file=sys.stderr)
        raise
    finally:
        with _uninterrupted():
            cleanup.run()


def _put_up(
    cleanup: _Cleanup,
    brokers: Brokers,
    ledger: Ledger,
    database_url: str | None,
    port: int,
    options: str,
) -> Site:
    folder = Path(tempfile.mkdtemp(prefix="cellmw-demo-"))
    cleanup.add("temporary files", lambda: shutil.rmtree(folder))
    database = Database(database_url, folder)
    cleanup.add("tables", database.remove)
    cleanup.add("message queues", brokers.remove)
    urls = brokers.create([DEFAULT, *CELLS])
    instances = _instances()
    database.create(*_mappings(urls, instances))

    identity = WebServer(keystone.application)
    cleanup.add("web server", identity.stop)
    config_file = _write_configuration(
        folder, options, urls[DEFAULT], database.url, identity.url, instances
    )
    conf = cfg.ConfigOpts()
    conf([], project="cellmw-demo", default_config_files=[str(config_file)])
    oslo.prepare(conf)
    hosts = [
        Host(conf, cell, urls[cell], ledger) for cell in (DEFAULT, *CELLS)
    ]
    cleanup.add("hosts", lambda: at_once(Host.stop, hosts))
    cleanup.bounded("hosts", lambda: at_once(Host.start, hosts))

    sample = paste_file()
    web = _serve(cleanup, sample, config_file, port)
    return Site(
        url=web.url,
        paste_file=sample,
        config_file=config_file,
        brokers=brokers.kind,
        database=database.kind,
        instances=instances,
        ledger=ledger,
    )


def _serve(
    cleanup: _Cleanup, sample: Path, config_file: Path, port: int
) -> WebServer:
    """Serve the pipeline of the sample paste file."""
    cleanup.add("default transport", rpc.cleanup)
    cleanup.add("cells' transports", runtime.registry().close)
    none = config_file.parent / "conf.d"
    none.mkdir()
    application = deploy.loadapp(
        f"config:{sample}",
        global_conf={
            "oslo_config_file": str(config_file),
            # /etc/myapi belongs to another service.
            "oslo_config_dir": str(none),
        },
    )
    try:
        web = WebServer(application, port)
    except OSError as error:
        raise DemoError(f"port {port}: {error.strerror}") from None
    cleanup.add("web server", web.stop)
    return web


def _instances() -> tuple[Instance, ...]:
    placed = [
        (f"web-{number + 1}", CELLS[number % len(CELLS)])
        for number in range(INSTANCES)
    ]
    # Where Nova keeps what never got a host.
    placed.append(("never-built", CELL0))
    return tuple(
        Instance(str(uuid.uuid4()), name, cell) for name, cell in placed
    )


def _mappings(
    urls: dict[str, str], instances: tuple[Instance, ...]
) -> tuple[list[CellMapping], list[InstanceMapping]]:
    cells = [
        CellMapping(
            uuid=str(uuid.uuid4()),
            name=name,
            transport_url=redaction.Secret(urls[name]),
        )
        for name in CELLS
    ]
    cells.append(
        CellMapping(
            uuid=CELL0_UUID,
            name=CELL0,
            transport_url=redaction.Secret("none:///"),
        )
    )
    uuids = {cell.name: cell.uuid for cell in cells}
    return cells, [
        InstanceMapping(
            instance_uuid=instance.uuid,
            cell_uuid=uuids[instance.cell],
            project_id=keystone.PROJECT,
        )
        for instance in instances
    ]


def _write_configuration(
    folder: Path,
    options: str,
    transport_url: str,
    database_url: str,
    identity_url: str,
    instances: tuple[Instance, ...],
) -> Path:
    known = {
        instance.uuid: {"name": instance.name, "host": HOST_NAME}
        for instance in instances
    }
    inventory = folder / "instances.json"
    inventory.write_text(json.dumps(known), "utf-8")
    sections = {
        "DEFAULT": {"transport_url": transport_url},
        "api_database": {"connection": database_url},
        "keystone_authtoken": {
            "auth_type": "admin_token",
            "endpoint": f"{identity_url}/v3",
            "token": keystone.SERVICE_TOKEN,
            "www_authenticate_uri": identity_url,
            "service_token_roles_required": "true",
        },
        "demo": {"instances": str(inventory)},
    }
    # Of an option that stands there twice, the last one counts.
    lines = ["[DEFAULT]", "rpc_response_timeout = 10", options]
    for section, values in sections.items():
        lines.append(f"[{section}]")
        # A dollar sign would begin the name of another option.
        lines.extend(
            f"{name} = {value.replace('$', '$$')}"
            for name, value in values.items()
        )
    file = folder / "demo.conf"
    file.write_text("\n".join(lines) + "\n", "utf-8")
    return file
