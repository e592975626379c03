# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The sample pipeline with real tokens: what they get, and what they send."""

from __future__ import annotations

import contextlib
import json
import logging
import socketserver
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from wsgiref import simple_server

import pytest
import requests
from keystoneauth1 import exceptions as ksa_exceptions
from paste import deploy

from cellmw import rpc, runtime, testing
from tests import servers
from tests.functional import stack
from tests.keystone.identity import ADMIN_PASSWORD, Keystone

SAMPLE = Path(__file__).resolve().parents[2] / "etc" / "api-paste.ini.sample"
CELL = "cellmw-memory://cell/"

_CONFIGURATION = """
[DEFAULT]
transport_url = cellmw-memory://default/
[api_database]
connection = {database}
[cellmw]
breaker_reset_after = 1
send_timeout = 1
[demo]
instances = {instances}
[keystone_authtoken]
www_authenticate_uri = {url}
auth_url = {url}
auth_type = password
username = admin
password = {password}
project_name = admin
user_domain_id = default
project_domain_id = default
service_token_roles = admin
service_token_roles_required = true
{more}
"""


class _Server(socketserver.ThreadingMixIn, simple_server.WSGIServer):
    daemon_threads = False


class _Quiet(simple_server.WSGIRequestHandler):
    def log_message(self, *args: object) -> None:
        """Say nothing."""


class Api:
    """The sample pipeline, served over HTTP.

    :ivar statuses: of its responses, in their order
    :ivar on_answer: called with each
    """

    def __init__(
        self, folder: Path, database: str, keystone: Keystone
    ) -> None:
        self._folder = folder
        self._database = database
        self._keystone = keystone
        self.statuses: list[int] = []
        self.on_answer: Callable[[int], object] = self.statuses.append
        self._closing = contextlib.ExitStack()
        self.host = self._closing.enter_context(
            stack.serving(CELL, stack.Host("host of the cell"))
        )
        self.default = self._closing.enter_context(
            stack.serving("cellmw-memory://default/", stack.Host("default"))
        )
        api_database = stack.ApiDatabase(database)
        self.instance = api_database.add_instance(api_database.add_cell(CELL))
        api_database.close()

    def start(self, *more: str) -> None:
        """Load and serve it, with more lines for ``authtoken``."""
        known = self._folder / "instances.json"
        known.write_text(
            json.dumps({self.instance: {"name": "it", "host": "host"}})
        )
        home = self._folder / ".myapi"
        home.mkdir()
        (home / "myapi.conf").write_text(
            _CONFIGURATION.format(
                database=self._database,
                instances=known,
                url=self._keystone.url,
                password=ADMIN_PASSWORD,
                more="\n".join(more),
            ),
            "utf-8",
        )
        pipeline = deploy.loadapp(f"config:{SAMPLE}")

        def application(environ: Any, start_response: Any) -> Any:
            def started(status: str, *rest: Any) -> Any:
                self.on_answer(int(status[:3]))
                return start_response(status, *rest)

            return pipeline(environ, started)

        self._server = simple_server.make_server(
            "127.0.0.1", 0, application, _Server, _Quiet
        )
        thread = threading.Thread(target=self._server.serve_forever)
        thread.start()
        self._closing.callback(thread.join)
        self._closing.callback(self._server.server_close)
        self._closing.callback(self._server.shutdown)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @property
    def action(self) -> str:
        """Where the actions of its instance are posted to."""
        return f"{self.url}/v2.1/servers/{self.instance}/action"

    def act(
        self,
        token: str | None,
        action: str = "os-getConsoleOutput",
        **headers: str,
    ) -> requests.Response:
        """Post an action, with a token or without one."""
        if token is not None:
            headers["X-Auth-Token"] = token
        return requests.post(
            self.action, json={action: {}}, headers=headers, timeout=30
        )

    def queries(self) -> int:
        """How often the API database was asked."""
        (shared,) = runtime.registry()
        return shared.process().directory.stats().queries

    def close(self) -> None:
        """End it and its hosts."""
        self._closing.close()


@pytest.fixture
def api(
    keystone: Keystone,
    tmp_path: Path,
    sqlite: servers.Database,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Api]:
    monkeypatch.setenv("HOME", str(tmp_path))
    with testing.own_brokers(), testing.no_leaks():
        made = Api(tmp_path, sqlite.url, keystone)
        yield made
        testing.broker_of(CELL).heal()
        made.close()
        for shared in runtime.registry():
            shared.close(stack.SOON)
        rpc.cleanup()


def forged(token: str) -> str:
    """The token with another signature."""
    other = "A" if token[-10] != "A" else "B"
    return token[:-10] + other + token[-9:]


@pytest.fixture(scope="session")
def expired(keystone: Keystone) -> str:
    """A token whose time is over."""
    return keystone.expired_token()


def test_a_valid_token_reaches_the_cell_with_its_identity(
    api: Api, keystone: Keystone
) -> None:
    api.start()
    access = keystone.login().get_access(keystone.session())
    answer = api.act(access.auth_token, "reboot")
    assert answer.status_code == 202, answer.text
    stack.eventually(lambda: api.host.messages)
    ((_, uuid, context),) = api.host.messages
    assert uuid == api.instance
    assert context["user"] == access.user_id
    assert context["project_id"] == access.project_id
    assert set(context["roles"]) == set(access.role_names or ())
    assert context["request_id"] == answer.headers["x-openstack-request-id"]
    # Once more, from the cache of the filter.
    assert api.act(access.auth_token).json() == [api.host.name, api.instance]


@pytest.mark.parametrize("which", ["missing", "forged", "garbage", "expired"])
@pytest.mark.parametrize("delayed", [False, True])
def test_a_token_that_is_not_good_sends_nothing(
    api: Api, keystone: Keystone, expired: str, which: str, delayed: bool
) -> None:
    api.start(f"delay_auth_decision = {delayed}")
    good = keystone.token()
    token = {
        "missing": None,
        "forged": forged(good),
        "garbage": "no token at all",
        "expired": expired,
    }[which]
    for action in ("reboot", "os-getConsoleOutput"):
        answer = api.act(token, action)
        if delayed:
            # The filter answers: the demo's handlers check nobody.
            assert answer.status_code == 503, answer.text
            assert list(answer.json()) == ["serviceUnavailable"]
        else:
            assert answer.status_code == 401, answer.text
            assert keystone.url in answer.headers["WWW-Authenticate"]
    assert not len(runtime.registry()) or api.queries() == 0
    # One that follows arrives, as the only one.
    assert api.act(good).status_code == 200
    assert api.host.instances() == [api.instance]
    assert api.default.messages == []


def test_a_revoked_token_sends_nothing(api: Api, keystone: Keystone) -> None:
    api.start()
    token = keystone.token()
    keystone.revoke(token)
    assert api.act(token).status_code == 401
    assert api.host.messages == []
    # One that authtoken has seen serves until its cache forgets it.
    token = keystone.token()
    assert api.act(token).status_code == 200
    keystone.revoke(token)
    assert api.act(token).status_code == 200


def test_an_expired_token_with_a_service_token_is_served(
    api: Api, keystone: Keystone, expired: str
) -> None:
    """A service goes on with a user's request that has taken long."""
    api.start()
    answer = api.act(expired, **{"X-Service-Token": keystone.token()})
    assert answer.json() == [api.host.name, api.instance]
    answer = api.act(expired, **{"X-Service-Token": forged(keystone.token())})
    assert answer.status_code == 401


def test_a_session_of_keystoneauth_tries_a_503_again(
    api: Api, keystone: Keystone, caplog: pytest.LogCaptureFixture
) -> None:
    api.start()
    broker = testing.broker_of(CELL)
    broker.refuse()

    def heal(status: int) -> None:
        api.statuses.append(status)
        if status == 503:
            broker.heal()

    api.on_answer = heal
    session = keystone.session()
    with caplog.at_level(logging.WARNING, "keystoneauth"):
        answer = session.post(
            api.action,
            json={"os-getConsoleOutput": {}},
            status_code_retries=3,
        )
    assert answer.json() == [api.host.name, api.instance]
    assert api.statuses == [503, 200]
    # As long as Retry-After says.
    assert "Retriable status code 503. Retrying in 1.0s" in caplog.text


def test_a_session_of_keystoneauth_does_not_repeat_a_504(
    api: Api, keystone: Keystone
) -> None:
    """The message may have arrived, and would be sent twice."""
    api.start()
    testing.broker_of(CELL).lose_confirms()
    with pytest.raises(ksa_exceptions.GatewayTimeout):
        keystone.session().post(
            api.action, json={"reboot": {}}, status_code_retries=3
        )
    assert api.statuses == [504]
    stack.eventually(lambda: api.host.messages)
    assert api.host.instances() == [api.instance]
