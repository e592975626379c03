# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""A stock Nova with two cells, and its API behind the filter.

:class:`Site` owns the databases, which ``nova-manage`` makes, the vhosts and
the compute hosts.  Cell ``one`` uses the shared RabbitMQ; cell ``two`` has a
broker of its own behind a proxy, so that tests can break it.  :meth:`Site.api`
serves Nova's API with gunicorn, in processes of its own.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import http.client
import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from tests import servers
from tests.functional import stack
from tests.proxy import Proxy

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
CELLS = ("one", "two")
INSTANCES = 24
# Nova's own, for calls; in seconds.
REPLY_TIMEOUT = 3.0
SEND_TIMEOUT = 2.0
REFRESH = 1.0
RESET_AFTER = 2.0

# What the filter is loaded with; a test may say otherwise.
OPTIONS = {
    "context_key": "nova.context",
    "nova_cell_cache": "true",
    "send_timeout": f"{SEND_TIMEOUT:g}",
    "cell_refresh_interval": f"{REFRESH:g}",
    "breaker_failures": "3",
    "breaker_reset_after": f"{RESET_AFTER:g}",
}
METADATA_SECRET = "of the metadata proxy"
_ENVIRONMENT = {
    "OS_NOVA_DISABLE_EVENTLET_PATCHING": "true",
    "PYTHONWARNINGS": "ignore",
}
_STARTS_WITHIN = 90.0
_AUTHTOKEN = "keystonemiddleware.auth_token:filter_factory"


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a client got.

    :ivar seconds: how long it waited
    """

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    seconds: float

    @property
    def retry_after(self) -> str | None:
        return dict(self.headers).get("Retry-After")


class Api:
    """Nova's API, served on a port of 127.0.0.1.

    :ivar workers: how many processes serve it
    """

    def __init__(self, port: int, folder: Path, workers: int) -> None:
        self.workers = workers
        self._port = port
        self._folder = folder

    def request(
        self,
        path: str,
        body: object = None,
        *,
        method: str | None = None,
        version: str | None = None,
        more_headers: Mapping[str, str] = types.MappingProxyType({}),
        timeout: float = 60.0,
    ) -> Answer:
        """Make one request; a body is sent as JSON with POST."""
        # Links in answers name it, and the port is another each time.
        headers = {"Host": "nova.test", **more_headers}
        if version:
            headers["X-OpenStack-Nova-API-Version"] = version
        data = None
        if body is not None:
            data = json.dumps(body)
            headers["Content-Type"] = "application/json"
        started = time.monotonic()
        connection = http.client.HTTPConnection(
            "127.0.0.1", self._port, timeout=timeout
        )
        with contextlib.closing(connection):
            connection.request(
                method or ("GET" if body is None else "POST"),
                path,
                data,
                headers,
            )
            response = connection.getresponse()
            content = response.read()
        return Answer(
            response.status,
            response.getheaders(),
            content,
            time.monotonic() - started,
        )

    def act(self, instance: str, action: str, **keywords: Any) -> Answer:
        """Post an action without arguments to an instance."""
        return self.request(
            f"/v2.1/servers/{instance}/action",
            {action: {} if action.startswith("os-get") else None},
            **keywords,
        )

    def cast(self, instance: str, **keywords: Any) -> Answer:
        """An action that sends one cast and changes no state."""
        return self.act(instance, "injectNetworkInfo", **keywords)

    def call(self, instance: str, **keywords: Any) -> Answer:
        """An action that calls the compute host."""
        return self.act(instance, "os-getConsoleOutput", **keywords)

    def metrics(self) -> dict[str, float]:
        """The samples of the metrics page."""
        text = self.request("/cellmw-metrics").body.decode()
        return {
            name: float(value)
            for name, _, value in (
                line.rpartition(" ")
                for line in text.splitlines()
                if not line.startswith("#")
            )
        }

    def log(self) -> str:
        """What Nova and its server have written."""
        return "".join(
            path.read_text() for path in sorted(self._folder.glob("*.log"))
        )


class Hosts:
    """The compute hosts, in a process of their own."""

    def __init__(self, folder: Path) -> None:
        self._record = folder / "record"
        self._record.touch()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.nova.hosts", str(self._record)],
            cwd=ROOT,
            env={**os.environ, **_ENVIRONMENT},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def serve(self, url: str, host: str, name: str | None = None) -> None:
        """Serve a host of a cell; it is recorded by its name."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        asked = {"url": url, "host": host, "name": name or host}
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()
        assert process.stdout.readline() == "ready\n"

    def got(self) -> list[tuple[str, str, str]]:
        """Host, method and instance of each message so far."""
        lines = self._record.read_text().splitlines()
        return [(h, m, i) for h, m, i in map(json.loads, lines)]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(stack.SOON)
        assert self._process.stdout is not None
        self._process.stdout.close()


class Site:
    """See the module.

    :ivar instances: UUIDs of the instances of each cell, by its name
    """

    def __init__(self, folder: Path, owned: contextlib.ExitStack) -> None:
        self.folder = folder
        self._owned = owned
        names = ("api", "cell0", *CELLS)
        with concurrent.futures.ThreadPoolExecutor() as threads:
            broker = threads.submit(
                owned.enter_context, servers.private_broker()
            )
            self.databases = {
                name: owned.enter_context(servers.mariadb_database())
                for name in names
            }
            self.default = owned.enter_context(servers.rabbit_vhost())
            self.one = owned.enter_context(servers.rabbit_vhost())
            self._make_databases()
            self.broker = broker.result()
        self.two = owned.enter_context(self.broker.vhost())
        self.proxy = owned.enter_context(
            Proxy(self.broker.host, self.broker.port)
        )
        self._map_cells()
        self.hosts = Hosts(folder)
        owned.callback(self.hosts.close)
        self.hosts.serve(self.one.url, "host-one")
        self.hosts.serve(self.two.url, "host-two")

    def _make_databases(self) -> None:
        for name in ("cell0", *CELLS):
            self._write_conf(self.folder / f"{name}.conf", name)
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            done = threads.map(
                lambda job: self._manage(*job),
                [
                    ("one", "db", "sync", "--local_cell"),
                    ("two", "db", "sync", "--local_cell"),
                    ("cell0", "db", "sync", "--local_cell"),
                    ("cell0", "api_db", "sync"),
                ],
            )
            assert len(list(done)) == 4

    def _map_cells(self) -> None:
        cell0 = self.databases["cell0"].url
        self._manage(
            "cell0", "cell_v2", "map_cell0", "--database_connection", cell0
        )
        urls = (self.one.url, self.two.url_via(self.proxy.address))
        for name, url in zip(CELLS, urls, strict=True):
            self._manage(
                *("cell0", "cell_v2", "create_cell", "--name", name),
                *("--transport-url", url),
                *("--database_connection", self.databases[name].url),
            )
        wanted = [f"{name}=host-{name}:{INSTANCES}" for name in CELLS]
        conf = str(self.folder / "cell0.conf")
        told = _run(
            [sys.executable, "-m", "tests.nova.populate", conf, *wanted]
        )
        made = json.loads(told.splitlines()[-1])
        self.instances: dict[str, list[str]] = made
        self.cells: dict[str, str] = {
            row["name"]: row["uuid"] for row in self._cell_mappings()
        }

    def _manage(self, conf: str, *command: str) -> None:
        path = self.folder / f"{conf}.conf"
        _run([str(BIN / "nova-manage"), "--config-file", str(path), *command])

    def _write_conf(self, path: Path, database: str) -> None:
        path.write_text(
            f"""
            [DEFAULT]
            transport_url = {self.default.url}
            state_path = {self.folder}
            log_file = {path.with_suffix(".log")}
            rpc_response_timeout = {REPLY_TIMEOUT:g}
            [api_database]
            connection = {self.databases["api"].url}
            [database]
            connection = {self.databases[database].url}
            [oslo_concurrency]
            lock_path = {self.folder}
            """.replace("            ", "")
        )

    def _cell_mappings(self) -> list[dict[str, Any]]:
        return self.query("api", "SELECT uuid, name FROM cell_mappings")

    def query(
        self, database: str, statement: str, **values: object
    ) -> list[dict[str, Any]]:
        """Execute a statement in one of the databases."""
        engine = sa.create_engine(
            self.databases[database].url, poolclass=sa.NullPool
        )
        with engine.begin() as connection:
            result = connection.execute(sa.text(statement), values)
            if not result.returns_rows:
                return []
            return [dict(row) for row in result.mappings()]

    def change_cell(self, name: str, column: str, value: str) -> None:
        """Change the mapping of a cell."""
        self.query(
            "api",
            f"UPDATE cell_mappings SET {column} = :value WHERE name = :name",
            value=value,
            name=name,
        )

    def copy_database(self, name: str) -> servers.Database:
        """A second database with what is in one of the cells'."""
        copy = self._owned.enter_context(servers.mariadb_database())
        source = self.databases[name]
        for row in self.query(name, "SHOW TABLES"):
            (table,) = row.values()
            new, old = f"{copy.name}.{table}", f"{source.name}.{table}"
            copy.administer(f"CREATE TABLE {new} LIKE {old}")
            copy.administer(f"INSERT INTO {new} SELECT * FROM {old}")
        return copy

    @contextlib.contextmanager
    def api(
        self,
        *,
        workers: int = 1,
        filtered: bool = True,
        service: str = "osapi_compute",
        **options: str,
    ) -> Iterator[Api]:
        """Serve the API; ``options`` are the filter's.

        :param service: which of Nova's WSGI applications
        """
        folder = self.folder / servers.unique("served")
        folder.mkdir()
        self._write_conf(folder / "nova.conf", "cell0")
        self._write_paste(
            folder / "api-paste.ini", filtered, {**OPTIONS, **options}
        )
        with (folder / "nova.conf").open("a") as conf:
            conf.write(f"[wsgi]\napi_paste_config = {folder}/api-paste.ini\n")
            conf.write(
                "[neutron]\nservice_metadata_proxy = true\n"
                f"metadata_proxy_shared_secret = {METADATA_SECRET}\n"
            )
        port = servers.free_port()
        # Nova reads the command line as its own.
        (folder / "gunicorn.py").write_text(
            f"bind = '127.0.0.1:{port}'\n"
            f"wsgi_app = 'nova.wsgi.{service}:application'\n"
            "worker_class = 'gthread'\n"
            "threads = 20\n"
            f"workers = {workers}\n"
            f"preload_app = {workers > 1}\n"
            "timeout = 300\n"
            "graceful_timeout = 1\n"
            "control_socket_disable = True\n"
        )
        with (folder / "gunicorn.log").open("w") as log:
            process = subprocess.Popen(
                [str(BIN / "gunicorn")],
                cwd=ROOT,
                env={
                    **os.environ,
                    **_ENVIRONMENT,
                    "OS_NOVA_CONFIG_DIR": str(folder),
                    "GUNICORN_CMD_ARGS": f"-c {folder}/gunicorn.py",
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        served = Api(port, folder, workers)
        try:
            self._wait_for(served, process)
            yield served
        finally:
            servers._kill(process)

    def _wait_for(self, api: Api, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + _STARTS_WITHIN
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if api.request("/").status in (200, 300):
                    return
            assert process.poll() is None, api.log()
            assert time.monotonic() < deadline, api.log()
            time.sleep(0.2)

    def _write_paste(
        self, path: Path, filtered: bool, options: dict[str, str]
    ) -> None:
        """Write Nova's own file, with our filter in each pipeline."""
        stock = (BIN.parent / "etc/nova/api-paste.ini").read_text()
        assert stock.count(_AUTHTOKEN) == 1
        text = stock.replace(_AUTHTOKEN, "tests.nova.identity:filter_factory")
        if filtered:
            assert text.count("authtoken keystonecontext") == 2
            text = text.replace(
                "authtoken keystonecontext", "authtoken keystonecontext cellmw"
            )
            assert text.count("http_proxy_to_wsgi metaapp") == 1
            text = text.replace(
                "http_proxy_to_wsgi metaapp",
                "http_proxy_to_wsgi cellmw metaapp",
            )
            lines = [f"{name} = {value}" for name, value in options.items()]
            text += "\n".join(["[filter:cellmw]", "use = egg:cellmw", *lines])
            text = text.replace(
                "/v2.1/+:", "/cellmw-metrics: cellmw_metrics\n/v2.1/+:"
            )
            text += "\n[app:cellmw_metrics]\nuse = egg:cellmw#metrics\n"
        path.write_text(text)

    def heal(self) -> None:
        """Make cell two what it was."""
        self.broker.heal()
        self.proxy.restore()
        self.proxy.cut()


def _run(command: list[str]) -> str:
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **_ENVIRONMENT},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def from_threads(
    function: Callable[[Any], Answer], arguments: Iterable[Any], threads: int
) -> list[Answer]:
    """Call a function in so many threads; the answers in order."""
    with concurrent.futures.ThreadPoolExecutor(threads) as executor:
        return list(executor.map(function, arguments))
