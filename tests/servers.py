# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Real message brokers and databases for tests.

The shared servers are used as they stand: each test gets a vhost or a
database of its own, with a name that is unique, and it is removed at the end.
:class:`PrivateBroker` is a RabbitMQ node that the tests start themselves, so
that they can kill, stop and starve it.

Where a server cannot be had, the test is skipped with a message that says how
to get one; with CELLMW_REQUIRE_SERVERS=1 in the environment it fails.

========================== ==============================================
variable                   default
========================== ==============================================
CELLMW_TEST_RABBIT         ``rabbit://guest:guest@127.0.0.1:5672/``
CELLMW_TEST_RABBITMQCTL    ``rabbitmqctl``, the shared broker's
CELLMW_TEST_RABBITMQ_BIN   the folder of the scripts that start a broker
CELLMW_TEST_MYSQL          ``mysql+pymysql://root@127.0.0.1:3306/``
CELLMW_TEST_POSTGRESQL     ``postgresql+psycopg2://root@127.0.0.1:5432/postgres``
========================== ==============================================
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pwd
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn
from urllib import parse

import pytest
import sqlalchemy
import trustme
from sqlalchemy import engine

RABBIT = os.environ.get(
    "CELLMW_TEST_RABBIT", "rabbit://guest:guest@127.0.0.1:5672/"
)
MYSQL = os.environ.get(
    "CELLMW_TEST_MYSQL", "mysql+pymysql://root@127.0.0.1:3306/"
)
POSTGRESQL = os.environ.get(
    "CELLMW_TEST_POSTGRESQL",
    "postgresql+psycopg2://root@127.0.0.1:5432/postgres",
)

_VHOSTS_AT_ONCE = 6

_numbers = itertools.count(1)


def servers_required() -> bool:
    """Whether a missing server is a failure."""
    return os.environ.get("CELLMW_REQUIRE_SERVERS", "") not in {"", "0"}


def missing(what: str, how: str) -> NoReturn:
    """End the test that runs: it cannot have what it needs.

    :param what: what is missing, and why
    :param how: how to get it
    """
    message = f"{what}; to run this test, {how}"
    if servers_required():
        pytest.fail(message, pytrace=False)
    pytest.skip(message)


def unique(prefix: str = "cellmw") -> str:
    """A name that no other test or process uses at this time."""
    return f"{prefix}_{os.getpid()}_{next(_numbers)}_{secrets.token_hex(3)}"


def free_port() -> int:
    """A port on 127.0.0.1 that was free just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def answers(host: str, port: int) -> bool:
    """Whether somebody accepts connections there."""
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True


# RabbitMQ


@dataclasses.dataclass(frozen=True)
class Vhost:
    """A virtual host of a broker, for one test.

    :ivar name: its name on the broker
    :ivar url: its transport URL
    """

    broker: Broker
    name: str
    url: str

    def url_via(self, address: str) -> str:
        """The transport URL through another ``host:port``, a proxy's."""
        parts = parse.urlsplit(self.url)
        login, _, _ = parts.netloc.rpartition("@")
        return parts._replace(netloc=f"{login}@{address}").geturl()

    def connections(self) -> list[dict[str, Any]]:
        """The connections to it, as the broker itself lists them."""
        return [
            row
            for row in self.broker.table(
                "list_connections", "vhost", "name", "pid", "state", "user"
            )
            if row["vhost"] == self.name
        ]

    def queues(self) -> dict[str, int]:
        """Messages in each of its queues, as the broker itself counts."""
        return {
            row["name"]: row["messages"]
            for row in self.broker.table(
                "list_queues", "-p", self.name, "name", "messages"
            )
        }

    def close_connections(self, reason: str = "a test") -> None:
        """Let the broker close all connections to it.

        It lists them as ``closed`` until the client has confirmed that.
        """
        self.broker.ctl("close_all_connections", "-p", self.name, reason)


class Broker:
    """A RabbitMQ broker that answers, and the commands that govern it.

    :param url: a transport URL with user, password, host and port
    :param ctl: the command that stands for ``rabbitmqctl``
    """

    def __init__(self, url: str, ctl: list[str]) -> None:
        parts = parse.urlsplit(url)
        self.scheme = parts.scheme
        self.host = parts.hostname or "127.0.0.1"
        self.port = parts.port or 5672
        self.user = parse.unquote(parts.username or "guest")
        self.password = parse.unquote(parts.password or "guest")
        self._ctl = ctl
        self._spare: list[str] = []
        self._used: list[str] = []

    def ctl(self, *args: str, timeout: float = 60) -> str:
        """Run ``rabbitmqctl`` and give what it prints."""
        command = self._as_user([*self._ctl, "-q", *args])
        done: subprocess.CompletedProcess[str] = subprocess.run(
            **command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(
                f"rabbitmqctl {args[0]}: status {done.returncode}: "
                f"{done.stdout}{done.stderr}"
            )
        return done.stdout

    def _as_user(self, args: list[str]) -> dict[str, Any]:
        return {"args": args}

    def table(self, *args: str) -> list[dict[str, Any]]:
        """The rows of one of its ``list_...`` commands."""
        rows: list[dict[str, Any]] = json.loads(
            self.ctl(*args, "--formatter", "json") or "[]"
        )
        return rows

    def url(
        self,
        vhost: str,
        *,
        user: str | None = None,
        password: str | None = None,
    ) -> str:
        """The transport URL of a vhost, for its user or another one."""
        user = parse.quote(user or self.user, safe="")
        password = parse.quote(password or self.password, safe="")
        return (
            f"{self.scheme}://{user}:{password}@{self.host}:{self.port}/"
            f"{parse.quote(vhost, safe='')}"
        )

    @contextlib.contextmanager
    def vhost(
        self, *, user: str | None = None, password: str | None = None
    ) -> Iterator[Vhost]:
        """A new vhost, which its user or another one may use.

        It is removed with the next few others, at the end of the run at the
        latest, for each call of rabbitmqctl takes half a second.  Nobody
        gets it a second time.
        """
        if not self._spare:
            self.sweep()
            self._make_vhosts([unique() for _ in range(_VHOSTS_AT_ONCE)])
        name = self._spare.pop()
        try:
            if user is not None:
                self.permit(name, user=user)
            url = self.url(name, user=user, password=password)
            yield Vhost(self, name, url)
        finally:
            self._used.append(name)

    def _make_vhosts(self, names: list[str]) -> None:
        # What is interrupted here is swept up all the same.
        self._spare.extend(names)
        self._for_each_vhost(
            names,
            "rabbit_vhost:add(V, By), "
            "rabbit_auth_backend_internal:set_permissions("
            f"{_binary(self.user)}, V, All, All, All, By)",
        )

    def sweep(self, *, all_of_them: bool = False) -> None:
        """Remove the vhosts whose tests are over, or also the spare ones."""
        names, self._used = self._used, []
        if all_of_them:
            names, self._spare = names + self._spare, []
        if names:
            self._for_each_vhost(
                names,
                "rabbit_vhost:exists(V) andalso rabbit_vhost:delete(V, By)",
            )

    def _for_each_vhost(self, names: list[str], action: str) -> None:
        listed = ", ".join(_binary(name) for name in names)
        self.ctl(
            "eval",
            f"By = {_binary('tests')}, All = {_binary('.*')}, "
            f"[begin {action} end || V <- [{listed}]], {{All, ok}}.",
        )

    def permit(self, vhost: str, *, user: str | None = None) -> None:
        """Let a user do everything in a vhost."""
        self.ctl(
            "set_permissions", "-p", vhost, user or self.user, *[".*"] * 3
        )

    @contextlib.contextmanager
    def new_user(self, password: str) -> Iterator[str]:
        """A new user, by name; it may use what :meth:`permit` allows."""
        name = unique("user")
        self.ctl("add_user", name, password)
        try:
            yield name
        finally:
            self.ctl("delete_user", name)


def _binary(text: str) -> str:
    """A text as Erlang writes it."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'<<"{escaped}"/utf8>>'


@functools.cache
def _shared_broker() -> Broker | str:
    ctl = shlex.split(os.environ.get("CELLMW_TEST_RABBITMQCTL", "rabbitmqctl"))
    broker = Broker(RABBIT, ctl)
    where = f"{broker.host}:{broker.port}"
    if not answers(broker.host, broker.port):
        return f"no RabbitMQ answers on {where}"
    if shutil.which(ctl[0]) is None:
        return f"there is no command {ctl[0]}"
    try:
        broker.table("list_vhosts", "name")
    except (RuntimeError, ValueError, subprocess.TimeoutExpired):
        return f"this user may not govern the RabbitMQ on {where}"
    # What fixtures leave, and what is used without them.
    atexit.register(broker.sweep, all_of_them=True)
    return broker


def shared_broker() -> Broker:
    """The RabbitMQ that is there for all tests.  Never stop it."""
    broker = _shared_broker()
    if isinstance(broker, str):
        missing(
            broker,
            "start RabbitMQ with user guest on 127.0.0.1:5672 and run the "
            "tests as a user who may call rabbitmqctl (on Debian: apt-get "
            "install rabbitmq-server, and root), or set CELLMW_TEST_RABBIT "
            "and CELLMW_TEST_RABBITMQCTL",
        )
    return broker


@contextlib.contextmanager
def rabbit_vhost() -> Iterator[Vhost]:
    """A vhost of the shared broker."""
    with shared_broker().vhost() as vhost:
        yield vhost


def _rabbitmq_scripts() -> Path | None:
    """Where RabbitMQ's own scripts are.

    Not the wrappers that Debian puts before them: those change the user and
    throw away the environment.
    """
    candidates = ["/usr/lib/rabbitmq/bin", "/opt/rabbitmq/sbin"]
    if named := os.environ.get("CELLMW_TEST_RABBITMQ_BIN"):
        candidates = [named]
    elif found := shutil.which("rabbitmq-server"):
        candidates.append(str(Path(found).resolve().parent))
    for candidate in candidates:
        if Path(candidate, "rabbitmq-server").is_file():
            return Path(candidate)
    return None


class PrivateBroker(Broker):
    """A RabbitMQ node of our own, on free ports of 127.0.0.1.

    Made by :func:`private_broker`.  Its files, its port mapper and its
    processes are its own; :meth:`close` removes them all.  It runs as the
    user ``rabbitmq`` where we are root and there is such a user, else as
    ourselves.  Starting takes about six seconds.

    :ivar folder: where its files are
    :ivar tls_port: where it listens for TLS
    :ivar authority: the certificate that TLS clients trust, in PEM
    """

    def __init__(self, scripts: Path, epmd: str) -> None:
        super().__init__(
            f"rabbit://guest:guest@127.0.0.1:{free_port()}/",
            [str(scripts / "rabbitmqctl")],
        )
        self._server = str(scripts / "rabbitmq-server")
        self._epmd = epmd
        self._process: subprocess.Popen[bytes] | None = None
        self._mapper: subprocess.Popen[bytes] | None = None
        self._paused = self._alarmed = False
        self.folder = Path(tempfile.mkdtemp(prefix="cellmw-broker-"))
        self.tls_port = free_port()
        self.authority = self.folder / "authority.pem"
        self._account = _account()
        self._environment = self._settle()

    def _settle(self) -> dict[str, str]:
        """Write its configuration; the environment that leads there."""
        folder = self.folder
        cookie = folder / ".erlang.cookie"
        cookie.write_text(secrets.token_hex(16), "ascii")
        cookie.chmod(0o400)
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(self.authority))
        certificate = authority.issue_cert(self.host)
        identity = folder / "identity.pem"
        certificate.private_key_and_cert_chain_pem.write_to_path(str(identity))
        config = folder / "rabbitmq.conf"
        config.write_text(
            f"listeners.tcp.local = 127.0.0.1:{self.port}\n"
            f"listeners.ssl.local = 127.0.0.1:{self.tls_port}\n"
            f"ssl_options.cacertfile = {self.authority}\n"
            f"ssl_options.certfile = {identity}\n"
            f"ssl_options.keyfile = {identity}\n"
            "ssl_options.verify = verify_none\n"
            "log.file = broker.log\n"
            "log.console = false\n",
            "ascii",
        )
        (folder / "enabled_plugins").write_text("[].\n", "ascii")
        (folder / "environment").write_text("", "ascii")
        if self._account is not None:
            for path in (folder, *folder.iterdir()):
                os.chown(path, self._account.pw_uid, self._account.pw_gid)
        return {
            "PATH": os.environ.get("PATH", os.defpath),
            "LANG": "C.UTF-8",
            "HOME": str(folder),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(free_port()),
            "ERL_FLAGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "RABBITMQ_CONF_ENV_FILE": str(folder / "environment"),
            "RABBITMQ_CONFIG_FILE": str(config),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "none.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(folder / "data"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_PID_FILE": str(folder / "pid"),
            "RABBITMQ_NODENAME": f"{unique()}@localhost",
            "RABBITMQ_DIST_PORT": str(free_port()),
        }

    def _as_user(self, args: list[str]) -> dict[str, Any]:
        command: dict[str, Any] = {
            "args": args,
            "cwd": self.folder,
            "env": self._environment,
        }
        if self._account is not None:
            command |= {
                "user": self._account.pw_uid,
                "group": self._account.pw_gid,
                "extra_groups": [],
            }
        return command

    def over_tls(self, url: str, address: str | None = None) -> str:
        """A vhost's transport URL over TLS.

        :param url: one without a query
        :param address: ``host:port`` of a proxy before the TLS port
        """
        parts = parse.urlsplit(url)
        login, _, _ = parts.netloc.rpartition("@")
        address = address or f"{self.host}:{self.tls_port}"
        query = parse.urlencode({"ssl": 1, "ssl_ca_file": self.authority})
        return parts._replace(
            netloc=f"{login}@{address}", query=query
        ).geturl()

    @property
    def node(self) -> str:
        """The name of its Erlang node."""
        return self._environment["RABBITMQ_NODENAME"]

    @property
    def running(self) -> bool:
        """Whether its process is there, paused or not."""
        return self._process is not None and self._process.poll() is None

    def start(self, timeout: float = 90) -> None:
        """Start it, with the data it had, and wait until it answers."""
        if self.running:
            return
        if self._mapper is None:
            self._mapper = self._spawn(self._epmd)
        # The address of a notification socket makes the script become the
        # server instead of waiting for it with signal handlers of its own.
        self._process = self._spawn(
            self._server, NOTIFY_SOCKET=str(self.folder / "nobody")
        )
        deadline = time.monotonic() + timeout
        while not _speaks_amqp(self.host, self.port):
            if not self.running or time.monotonic() > deadline:
                pytest.fail(
                    f"RabbitMQ does not start:\n{self.log()}", pytrace=False
                )
            time.sleep(0.1)
        # Listening is not the end of the start.
        self.ctl("await_startup")

    def _spawn(self, *args: str, **environ: str) -> subprocess.Popen[bytes]:
        command = self._as_user(list(args))
        command["env"] = command["env"] | environ
        with (self.folder / "output").open("ab") as output:
            return subprocess.Popen(
                **command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def log(self, size: int = 4000) -> str:
        """The end of what it has written."""
        texts = [
            path.read_text("utf-8", "replace")
            for path in (
                self.folder / "log" / "broker.log",
                self.folder / "output",
            )
            if path.exists()
        ]
        return "\n".join(texts)[-size:]

    def kill(self) -> None:
        """Kill it hard; wait until it is gone."""
        process, self._process = self._process, None
        self._paused = self._alarmed = False
        if process is not None:
            _kill(process)

    def restart(self) -> None:
        """Kill it and start it again."""
        self.kill()
        self.start()

    def pause(self) -> None:
        """Stop it in its tracks: connections stay, nothing is answered."""
        self._signal(signal.SIGSTOP)
        self._paused = True

    def resume(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)
        self._paused = False

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None, "it does not run"
        os.killpg(self._process.pid, number)

    def raise_memory_alarm(self) -> None:
        """Make it stop reading from those who publish."""
        self._alarmed = True
        self.ctl("set_vm_memory_high_watermark", "0")

    def clear_memory_alarm(self) -> None:
        """Let it read from those who publish again."""
        self.ctl("set_vm_memory_high_watermark", "0.4")
        self._alarmed = False

    def heal(self) -> None:
        """Make it what it was after the start; keeps vhosts and queues."""
        if self._paused:
            self.resume()
        self.start()
        if self._alarmed:
            self.clear_memory_alarm()

    def close(self) -> None:
        """End it and remove its files.  May be called twice."""
        self.kill()
        mapper, self._mapper = self._mapper, None
        if mapper is not None:
            _kill(mapper)
        shutil.rmtree(self.folder, ignore_errors=True)


def _account() -> pwd.struct_passwd | None:
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("rabbitmq")
    except KeyError:
        return None


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)


def _speaks_amqp(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=2) as probe:
            probe.sendall(b"AMQP\x00\x00\x09\x01")
            return bool(probe.recv(1))
    except OSError:
        return False


@contextlib.contextmanager
def private_broker() -> Iterator[PrivateBroker]:
    """A RabbitMQ node that the caller may kill, pause and starve."""
    scripts, epmd = _rabbitmq_scripts(), shutil.which("epmd")
    if scripts is None or epmd is None:
        missing(
            "RabbitMQ's scripts or Erlang's epmd are not installed",
            "install RabbitMQ (on Debian: apt-get install rabbitmq-server) "
            "or set CELLMW_TEST_RABBITMQ_BIN to the folder of "
            "rabbitmq-server",
        )
    broker = PrivateBroker(scripts, epmd)
    try:
        broker.start()
        yield broker
    finally:
        broker.close()


# Databases


class Database:
    """A database of a test's own on a shared server.

    :ivar url: its SQLAlchemy URL
    :ivar name: its name on the server; the file's path for SQLite
    :ivar kind: ``sqlite``, ``mysql`` or ``postgresql``
    """

    def __init__(self, url: engine.URL, admin: engine.Engine | None) -> None:
        self.url = url.render_as_string(hide_password=False)
        self.name = url.database or ""
        self.kind = url.get_backend_name()
        host = "127.0.0.1" if url.host is None else url.host
        self.address = (
            host,
            url.port or {"mysql": 3306, "postgresql": 5432}.get(self.kind, 0),
        )
        self._url = url
        self._admin = admin

    def url_via(self, address: str) -> str:
        """The same database through another ``host:port``, a proxy's."""
        host, _, port = address.rpartition(":")
        url = self._url.set(host=host, port=int(port))
        return url.render_as_string(hide_password=False)

    def url_as(self, user: str, password: str) -> str:
        """The same database for another user of the server."""
        url = self._url.set(username=user, password=password)
        return url.render_as_string(hide_password=False)

    def administer(
        self, statement: str, **values: object
    ) -> list[dict[str, Any]]:
        """Execute a statement as the server's administrator.

        Not in this database, and each in a transaction of its own.
        """
        assert self._admin is not None, "SQLite has no administrator"
        with self._admin.connect() as connection:
            result = connection.execute(sqlalchemy.text(statement), values)
            if not result.returns_rows:
                return []
            return [dict(row) for row in result.mappings()]

    def connections(self) -> list[int]:
        """The server's ids of the connections to this database."""
        statement = {
            "mysql": (
                "SELECT id FROM information_schema.processlist "
                "WHERE db = :name"
            ),
            "postgresql": (
                "SELECT pid AS id FROM pg_stat_activity WHERE datname = :name"
            ),
        }[self.kind]
        rows = self.administer(statement, name=self.name)
        return [row["id"] for row in rows]

    def kill_connections(self) -> None:
        """Let the server end all connections to this database."""
        kill = {
            "mysql": "KILL {}",
            "postgresql": "SELECT pg_terminate_backend({})",
        }[self.kind]
        for number in self.connections():
            # It may have ended by itself in the meantime.
            with contextlib.suppress(sqlalchemy.exc.DBAPIError):
                self.administer(kill.format(number))


@functools.cache
def _admin(url: str) -> engine.Engine | str:
    try:
        admin = sqlalchemy.create_engine(
            url,
            isolation_level="AUTOCOMMIT",
            poolclass=sqlalchemy.NullPool,
            connect_args={"connect_timeout": 5},
        )
        with admin.connect():
            return admin
    except ImportError as error:
        return f"{error}"
    except sqlalchemy.exc.DBAPIError as error:
        return f"{type(error.orig).__name__}"


@contextlib.contextmanager
def _database(
    url: str, hints: Mapping[str, str], create: str, drop: str
) -> Iterator[Database]:
    parsed = sqlalchemy.make_url(url)
    admin = _admin(url)
    if isinstance(admin, str):
        missing(
            f"{hints['name']} on {parsed.host}:{parsed.port} does not let "
            f"us in ({admin})",
            f"start one there (on Debian: apt-get install "
            f"{hints['package']}) or set {hints['variable']}",
        )
    name = unique()
    database = Database(parsed.set(database=name), admin)
    database.administer(create.format(name))
    try:
        yield database
    finally:
        # A connection that was left would make the server wait for it.
        database.kill_connections()
        database.administer(drop.format(name))


@contextlib.contextmanager
def mariadb_database() -> Iterator[Database]:
    """A new, empty database on the shared MariaDB."""
    with _database(
        MYSQL,
        {
            "name": "MariaDB",
            "package": "mariadb-server",
            "variable": "CELLMW_TEST_MYSQL",
        },
        "CREATE DATABASE {} CHARACTER SET utf8mb4",
        "DROP DATABASE IF EXISTS {}",
    ) as database:
        yield database


@contextlib.contextmanager
def postgresql_database() -> Iterator[Database]:
    """A new, empty database on the shared PostgreSQL."""
    with _database(
        POSTGRESQL,
        {
            "name": "PostgreSQL",
            "package": "postgresql",
            "variable": "CELLMW_TEST_POSTGRESQL",
        },
        "CREATE DATABASE {}",
        "DROP DATABASE IF EXISTS {} WITH (FORCE)",
    ) as database:
        yield database


@contextlib.contextmanager
def sqlite_database() -> Iterator[Database]:
    """A new SQLite file that nobody has opened yet."""
    with tempfile.TemporaryDirectory(prefix="cellmw-sqlite-") as folder:
        path = Path(folder, "api.sqlite")
        yield Database(sqlalchemy.make_url(f"sqlite:///{path}"), None)


DATABASES = {
    "sqlite": sqlite_database,
    "mariadb": mariadb_database,
    "postgresql": postgresql_database,
}
