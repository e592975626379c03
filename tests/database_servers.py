# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Database servers of the tests' own, which they may stop, kill and freeze.

Each is a MariaDB or PostgreSQL with its own files and a free port of
127.0.0.1.  Who makes one closes it: that ends its processes and removes its
files.  Where the programs are not installed the test is skipped, with a
message that says how to get them.
"""

from __future__ import annotations

import abc
import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import sqlalchemy as sa

from tests import servers

_START_WITHIN = 60.0


class PrivateDatabaseServer(abc.ABC):
    """One server.  Not running before :meth:`start`."""

    # The folders of the programs, where they may not be on the path.
    folders: tuple[str, ...]
    package: str
    # Where the server does not run for root.
    account: str | None = None
    stop_signal = signal.SIGTERM

    def __init__(self) -> None:
        self.port = servers.free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="cellmw-db-"))
        self._process: subprocess.Popen[bytes] | None = None
        self.user = self.account if os.geteuid() == 0 else None
        if self.user is not None:
            owner = pwd.getpwnam(self.user)
            os.chown(self.folder, owner.pw_uid, owner.pw_gid)
        self._admin = sa.create_engine(
            self.url(""),
            isolation_level="AUTOCOMMIT",
            poolclass=sa.NullPool,
            connect_args={"connect_timeout": 5},
        )
        self._install()

    @abc.abstractmethod
    def url(self, name: str) -> sa.URL:
        """The SQLAlchemy URL of a database."""

    @abc.abstractmethod
    def _install(self) -> None: ...

    @abc.abstractmethod
    def _command(self) -> list[str]: ...

    @abc.abstractmethod
    def end_idle_connections(self) -> None:
        """Let connections without work end after a second."""

    @abc.abstractmethod
    def allow_reading_only(self) -> None:
        """Take no changes any more."""

    @abc.abstractmethod
    def reset(self) -> None:
        """Take back what the two methods above have set."""

    def program(self, name: str) -> str:
        """Where a program of the server is."""
        path = os.pathsep.join([os.environ.get("PATH", ""), *self.folders])
        found = shutil.which(name, path=path)
        if found is None:
            servers.missing(
                f"{name} is not installed",
                f"install it (on Debian: apt-get install {self.package})",
            )
        return found

    def run(self, *command: str) -> None:
        """Run a program of the server to its end."""
        subprocess.run(
            command,
            check=True,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_START_WITHIN,
            user=self.user,
        )

    def start(self) -> None:
        """Start it, if it is not running, and wait until it answers."""
        if self._process is None:
            with (self.folder / "log").open("ab") as log:
                self._process = subprocess.Popen(
                    self._command(),
                    cwd=self.folder,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    user=self.user,
                )
        deadline = time.monotonic() + _START_WITHIN
        while True:
            try:
                self.administer("SELECT 1")
            except sa.exc.DBAPIError:
                assert time.monotonic() < deadline, self._log()
                assert self._process.poll() is None, self._log()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(0.1)
            else:
                return

    def administer(self, *statements: str) -> None:
        """Execute statements, each in a transaction of its own."""
        with self._admin.connect() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)

    def stop(self) -> None:
        """End it as an operator does."""
        self._end(self.stop_signal)

    def kill(self) -> None:
        """End it as a power failure does."""
        self._end(signal.SIGKILL)

    def freeze(self) -> None:
        """Let it do nothing, and its connections stay."""
        for process in self._all():
            process.suspend()

    def thaw(self) -> None:
        """End that."""
        for process in self._all():
            process.resume()

    def close(self) -> None:
        """End it for good.  May be called twice."""
        self.kill()
        self._admin.dispose()
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def database(self) -> Iterator[servers.Database]:
        """A database of its own on this server, which has to run."""
        name = servers.unique()
        self.administer(f"CREATE DATABASE {name}")
        database = servers.Database(self.url(name), self._admin)
        try:
            yield database
        finally:
            database.kill_connections()
            self.administer(f"DROP DATABASE {name}")

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        process.wait(_START_WITHIN)
        # PostgreSQL's see by themselves that the first of them is gone.
        psutil.wait_procs(children, _START_WITHIN)

    def _all(self) -> list[psutil.Process]:
        assert self._process is not None
        first = psutil.Process(self._process.pid)
        return [first, *first.children(recursive=True)]

    def _log(self) -> str:
        return (self.folder / "log").read_text("utf-8", "replace")[-4000:]


class PrivateMariaDB(PrivateDatabaseServer):
    """A MariaDB."""

    folders = ("/usr/sbin", "/usr/libexec", "/usr/local/sbin")
    package = "mariadb-server"
    account = "mysql"

    def url(self, name: str) -> sa.URL:
        return sa.URL.create(
            "mysql+pymysql", "root", None, "127.0.0.1", self.port, name
        )

    def _install(self) -> None:
        self.run(
            self.program("mariadb-install-db"),
            "--no-defaults",
            f"--datadir={self.folder / 'data'}",
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
        )

    def _command(self) -> list[str]:
        return [
            self.program("mariadbd"),
            "--no-defaults",
            f"--datadir={self.folder / 'data'}",
            f"--socket={self.folder / 'socket'}",
            f"--pid-file={self.folder / 'pid'}",
            "--bind-address=127.0.0.1",
            f"--port={self.port}",
            "--innodb-buffer-pool-size=16M",
            # With 0, what was written in the last second is lost by a kill.
            "--innodb-flush-log-at-trx-commit=2",
            "--debug-no-sync",
        ]

    def end_idle_connections(self) -> None:
        self.administer("SET GLOBAL wait_timeout = 1")

    def allow_reading_only(self) -> None:
        self.administer("SET GLOBAL read_only = 1")

    def reset(self) -> None:
        self.administer(
            "SET GLOBAL wait_timeout = 28800",
            "SET GLOBAL read_only = 0",
        )


class PrivatePostgreSQL(PrivateDatabaseServer):
    """A PostgreSQL."""

    package = "postgresql"
    account = "postgres"
    # Does not wait for clients to go away by themselves.
    stop_signal = signal.SIGINT
    folders = tuple(
        str(path)
        for path in sorted(
            Path("/usr/lib/postgresql").glob("*/bin"), reverse=True
        )
    )

    def url(self, name: str) -> sa.URL:
        return sa.URL.create(
            "postgresql+psycopg2",
            "root",
            None,
            "127.0.0.1",
            self.port,
            name or "postgres",
        )

    def _install(self) -> None:
        self.run(
            self.program("initdb"),
            "--auth=trust",
            "--username=root",
            "--no-sync",
            f"--pgdata={self.folder / 'data'}",
        )

    def _command(self) -> list[str]:
        return [
            self.program("postgres"),
            "-D",
            str(self.folder / "data"),
            "-k",
            str(self.folder),
            "-p",
            str(self.port),
            "-c",
            "fsync=off",
        ]

    def end_idle_connections(self) -> None:
        self._set("idle_session_timeout", "'1s'")

    def allow_reading_only(self) -> None:
        self._set("default_transaction_read_only", "on")

    def reset(self) -> None:
        # This connection may be one that takes no changes.
        self.administer(
            "SET default_transaction_read_only = off",
            "ALTER SYSTEM RESET ALL",
            "SELECT pg_reload_conf()",
        )

    def _set(self, name: str, value: str) -> None:
        self.administer(
            f"ALTER SYSTEM SET {name} = {value}", "SELECT pg_reload_conf()"
        )


KINDS = {"mariadb": PrivateMariaDB, "postgresql": PrivatePostgreSQL}


@contextlib.contextmanager
def private_server(kind: str) -> Iterator[PrivateDatabaseServer]:
    """A server that runs, of this kind."""
    server = KINDS[kind]()
    try:
        server.start()
        yield server
    finally:
        server.close()
