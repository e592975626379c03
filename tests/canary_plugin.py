# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""A run of whole suites in which every credential is a canary.

``pytest --canary tests/functional tests/faults``: each virtual host and each
database that a test gets belongs to a user with a unique password of one of
twelve kinds, each cell and each service has one too, all loggers log at all
levels, and everything that leaves is looked at: logs, what is printed, what
HTTP clients and commands get, and the contexts, handles and errors that
reach a handler.  A test fails if a piece of a password was in it.

``--canary-off=PLACE`` switches scrubbing off in one place of
:data:`tests.canary.PLACES`, to see that a canary sings then.

What tests put into a URL themselves is not looked for, for those tell what is
printed; and the tests of the canary, which let it out on purpose, do not run.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator
from typing import Any
from urllib.parse import quote

import pytest

from cellmw import redaction
from cellmw.transports.handle import Handle
from tests import canary as canaries
from tests import servers
from tests.canary import Canary
from tests.functional import stack

# A password with a slash cannot be used with RabbitMQ: oslo.messaging does
# not encode it in what it hands to kombu.
_FOR_RABBIT = [kind for kind in canaries.KINDS if kind != "slash"]
# PyMySQL encodes passwords as Latin-1.
_FOR_DATABASES = [kind for kind in canaries.KINDS if kind != "unicode"]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("canary")
    group.addoption(
        "--canary",
        action="store_true",
        help="make every credential a canary, and fail what leaks one",
    )
    group.addoption(
        "--canary-off",
        choices=sorted(canaries.PLACES),
        help="switch scrubbing off in this place",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--canary"):
        config.pluginmanager.register(Suite(config), "canary-suite")


class Suite:
    """What is done around each test of the run."""

    def __init__(self, config: pytest.Config) -> None:
        self.canary = Canary()
        self._stack = contextlib.ExitStack()
        self._off = config.getoption("--canary-off")
        self._reported = 0

    def pytest_sessionstart(self) -> None:
        patch = self._stack.enter_context(pytest.MonkeyPatch.context())
        self._stack.enter_context(self.canary.listening())
        if self._off:
            canaries.PLACES[self._off](patch)
        # As in a service that has loaded the filter.
        redaction.install()
        logins = _Logins(self.canary, self._stack)
        patch.setattr(
            servers.Broker, "vhost", logins.for_vhosts(servers.Broker.vhost)
        )
        for kind in ("mariadb", "postgresql"):
            name = f"{kind}_database"
            made = logins.for_databases(getattr(servers, name))
            patch.setattr(servers, name, made)
            patch.setitem(servers.DATABASES, kind, made)
        for owner, name, wrap in (
            (stack.ApiDatabase, "add_cell", logins.for_cells),
            (stack.Api, "__call__", self._watch_application),
            (stack, "request", self._watch_requests),
            (Handle, "_send", self._watch_sending),
            (subprocess, "run", self._watch_command),
            (subprocess.Popen, "communicate", self._watch_command),
            (urllib.request, "urlopen", self._watch_urlopen),
        ):
            patch.setattr(owner, name, wrap(getattr(owner, name)))

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        own = [item for item in items if item.path.name == "test_canary.py"]
        config.hook.pytest_deselected(items=own)
        items[:] = [item for item in items if item not in own]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        canaries.listen_to_all()

    def pytest_unconfigure(self) -> None:
        self._stack.close()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, Any, Any]:
        report = yield
        if report.passed:
            # What a failure shows is for those who run the tests.
            for name, text in report.sections:
                if "stdout" in name or "stderr" in name:
                    self.canary.saw(f"printed: {name}", text)
        leaks = self.canary.leaks[self._reported :]
        self._reported = len(self.canary.leaks)
        if leaks and report.passed:
            report.outcome = "failed"
            report.longrepr = "\n".join(
                ["passwords got out:", *(str(leak) for leak in leaks[:10])]
            )
        return report

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.section("canary")
        for where, count in sorted(self.canary.seen.items()):
            terminalreporter.line(f"{where}: {count} characters looked at")
        terminalreporter.line(f"{len(self.canary.leaks)} leaks")
        for leak in self.canary.leaks[:20]:
            terminalreporter.line(f"  {leak}")

    def _watch_application(self, call: Callable[..., Any]) -> Any:
        @functools.wraps(call)
        def watched(api: stack.Api, *args: Any) -> Any:
            try:
                return call(api, *args)
            finally:
                context = api.contexts[-1]
                self.canary.saw_object("context", context)
                self.canary.saw_object(
                    "handle", getattr(context, "mq_connection", None)
                )

        return watched

    def _watch_requests(self, request: Callable[..., Any]) -> Any:
        @functools.wraps(request)
        def watched(*args: Any, **kwargs: Any) -> Any:
            response = request(*args, **kwargs)
            self.canary.saw_response(
                response.status, response.headers, response.body
            )
            return response

        return watched

    def _watch_sending(self, send: Callable[..., Any]) -> Any:
        @functools.wraps(send)
        def watched(*args: Any, **kwargs: Any) -> Any:
            try:
                return send(*args, **kwargs)
            except BaseException as error:
                self.canary.saw_error("raised", error)
                raise

        return watched

    def _watch_command(self, run: Callable[..., Any]) -> Any:
        @functools.wraps(run)
        def watched(*args: Any, **kwargs: Any) -> Any:
            done = run(*args, **kwargs)
            output = (
                done if isinstance(done, tuple) else (done.stdout, done.stderr)
            )
            for shown in output:
                self.canary.saw("command", shown or "")
            return done

        return watched

    def _watch_urlopen(self, urlopen: Callable[..., Any]) -> Any:
        @functools.wraps(urlopen)
        def watched(*args: Any, **kwargs: Any) -> Any:
            try:
                response = urlopen(*args, **kwargs)
            except urllib.error.HTTPError as error:
                self.canary.saw_response(str(error), error.headers, "")
                raise
            self.canary.saw_response(
                str(response.status), response.headers, ""
            )
            read = response.read

            def saw(*args: Any) -> Any:
                body = read(*args)
                self.canary.saw("HTTP: body", body)
                return body

            response.read = saw
            return response

        return watched


class _Logins:
    """Gives each server's users passwords that are canaries."""

    def __init__(self, canary: Canary, stack: contextlib.ExitStack) -> None:
        self._canary = canary
        self._stack = stack
        self._for_rabbit = itertools.cycle(_FOR_RABBIT)
        self._for_databases = itertools.cycle(_FOR_DATABASES)
        self._users: dict[servers.Broker, dict[str, tuple[str, str]]] = {}

    def for_vhosts(self, vhost: Callable[..., Any]) -> Any:
        @contextlib.contextmanager
        def made(
            broker: servers.Broker,
            *,
            user: str | None = None,
            password: str | None = None,
        ) -> Iterator[servers.Vhost]:
            if user is None:
                user, password = self._user_of(broker)
            with vhost(broker, user=user, password=password) as one:
                yield one

        return made

    def _user_of(self, broker: servers.Broker) -> tuple[str, str]:
        users = self._users.setdefault(broker, {})
        kind = next(self._for_rabbit)
        if kind not in users:
            password = self._canary.password(f"{broker.host}, {kind}", kind)
            name = servers.unique("canary")
            broker.ctl("add_user", name, password)
            users[kind] = name, password
            if not isinstance(broker, servers.PrivateBroker):
                self._stack.callback(broker.ctl, "delete_user", name)
        return users[kind]

    def for_databases(self, database: Callable[..., Any]) -> Any:
        @contextlib.contextmanager
        def made() -> Iterator[servers.Database]:
            name = servers.unique("canary")
            with contextlib.ExitStack() as at_end:
                with database() as one:
                    password = self._canary.password(
                        f"user of {one.kind}", next(self._for_databases)
                    )
                    with self._canary.looking_away():
                        _create_user(one, name, password)
                    # When what it owns is gone.
                    at_end.callback(_drop_user, one, name)
                    one._url = one._url.set(username=name, password=password)
                    one.url = one.url_as(name, password)
                    yield one

        return made

    def for_cells(self, add_cell: Callable[..., str]) -> Any:
        @functools.wraps(add_cell)
        def added(
            database: stack.ApiDatabase, url: str | None, **kwargs: Any
        ) -> str:
            return add_cell(database, self._with_login(url), **kwargs)

        return added

    def _with_login(self, url: str | None) -> str | None:
        scheme, found, rest = (url or "").partition("://")
        if not found or "@" in rest or not scheme.startswith("cellmw-memory"):
            return url
        password = quote(self._canary.password(f"cell {rest}"), safe="")
        return f"{scheme}://nova:{password}@{rest}"


def _create_user(database: servers.Database, name: str, password: str) -> None:
    if database.kind == "mysql":
        for user in _mysql_users(name):
            database.administer(
                f"CREATE USER {user} IDENTIFIED BY :password",
                password=password,
            )
            database.administer(
                f"GRANT ALL ON *.* TO {user} WITH GRANT OPTION"
            )
    else:
        database.administer(
            f"CREATE ROLE {name} SUPERUSER LOGIN PASSWORD :password",
            password=password,
        )
        database.administer(f"ALTER DATABASE {database.name} OWNER TO {name}")


def _drop_user(database: servers.Database, name: str) -> None:
    if database.kind == "mysql":
        for user in _mysql_users(name):
            database.administer(f"DROP USER {user}")
    else:
        database.administer(f"DROP ROLE {name}")


def _mysql_users(name: str) -> list[str]:
    # The second one goes before an anonymous user.
    return [f"'{name}'@'{host}'" for host in ("%", "localhost")]
