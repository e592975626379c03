# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The sample paste file, loaded by Paste, with everything real around it.

Nothing in it is replaced but Keystone: which tokens are good, the fixture of
keystonemiddleware says.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import webob
from keystonemiddleware import fixture as keystone_fixture
from paste import deploy

from cellmw import rpc, runtime
from tests import servers
from tests.functional import stack

SAMPLE = Path(__file__).resolve().parents[2] / "etc" / "api-paste.ini.sample"
PROJECT = "myapi"
TOKEN = "a-good-token"  # of the fixture
CELLS = 3
INSTANCES = 300
REQUESTS = 1000
THREADS = 16


@dataclasses.dataclass
class Backend:
    """Where the queues and the tables are.

    :ivar urls: of the cells, and of the service's own queue at the end
    """

    urls: list[str]
    database: str


def in_memory(request: pytest.FixtureRequest) -> list[str]:
    hosts = [f"cell{number}" for number in range(CELLS)]
    return [f"cellmw-memory://{host}/" for host in (*hosts, "default")]


def on_rabbitmq(request: pytest.FixtureRequest) -> list[str]:
    make_vhost = request.getfixturevalue("make_vhost")
    return [make_vhost().url for _ in range(CELLS + 1)]


BACKENDS: dict[str, tuple[Callable[[pytest.FixtureRequest], list[str]], str]]
BACKENDS = {
    "memory and SQLite": (in_memory, "sqlite"),
    "RabbitMQ and MariaDB": (on_rabbitmq, "mariadb"),
    "RabbitMQ and PostgreSQL": (on_rabbitmq, "postgresql"),
}


ON_ALL = pytest.mark.parametrize(
    "backend",
    [
        "memory and SQLite",
        pytest.param("RabbitMQ and MariaDB", marks=pytest.mark.servers),
        pytest.param("RabbitMQ and PostgreSQL", marks=pytest.mark.servers),
    ],
    indirect=True,
)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Backend:
    name = getattr(request, "param", "memory and SQLite")
    make_urls, database = BACKENDS[name]
    found: servers.Database = request.getfixturevalue(database)
    return Backend(make_urls(request), found.url)


class Site:
    """The service as the sample file makes it, and the hosts of its cells.

    :ivar cell_of: number of the cell of each instance
    """

    def __init__(
        self, folder: Path, backend: Backend, serve: stack.Serve
    ) -> None:
        self.hosts = [
            serve(url, stack.Host(f"host of cell {number}"))
            for number, url in enumerate(backend.urls[:CELLS])
        ]
        self.default_host = serve(backend.urls[CELLS])
        database = stack.ApiDatabase(backend.database)
        database.add_cell0()
        cells = [database.add_cell(url) for url in backend.urls[:CELLS]]
        wanted = [number % CELLS for number in range(INSTANCES)]
        instances = database.add_instances(cells[n] for n in wanted)
        self.cell_of = dict(zip(instances, wanted, strict=True))
        database.close()
        self._write(folder, backend)
        self.application = deploy.loadapp(f"config:{SAMPLE}")

    def _write(self, folder: Path, backend: Backend) -> None:
        """The service's configuration, where oslo.config looks for it."""
        known = folder / "instances.json"
        known.write_text(
            json.dumps(
                {
                    uuid: {"name": f"instance {number}", "host": "host"}
                    for number, uuid in enumerate(self.cell_of)
                }
            )
        )
        home = folder / f".{PROJECT}"
        home.mkdir()
        (home / f"{PROJECT}.conf").write_text(
            "[DEFAULT]\n"
            f"transport_url = {backend.urls[CELLS]}\n"
            "[api_database]\n"
            f"connection = {backend.database}\n"
            "[keystone_authtoken]\n"
            "delay_auth_decision = true\n"
            "www_authenticate_uri = http://127.0.0.1/identity\n"
            "[demo]\n"
            f"instances = {known}\n"
        )

    def act(
        self, instance: str, action: str, token: str = TOKEN
    ) -> webob.Response:
        """Make an action request, as an HTTP server does."""
        request = webob.Request.blank(
            f"/v2.1/servers/{instance}/action",
            method="POST",
            headers={"X-Auth-Token": token},
        )
        request.json_body = {action: {}}
        return request.get_response(self.application)

    def messages(self) -> int:
        return sum(len(host.messages) for host in self.hosts)


@pytest.fixture
def site(
    tmp_path: Path,
    backend: Backend,
    serve: stack.Serve,
    runtimes: runtime.Registry,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Site]:
    monkeypatch.setenv("HOME", str(tmp_path))
    with keystone_fixture.AuthTokenFixture() as tokens:
        tokens.add_token_data(
            token_id=TOKEN,
            user_id="the-user",
            project_id="the-project",
            role_list=["member"],
        )
        yield Site(tmp_path, backend, serve)


def at_once(function: Callable[[Any], Any], arguments: list[Any]) -> list[Any]:
    """Call it for each, from so many threads that begin together."""
    barrier = threading.Barrier(THREADS)

    def begin() -> None:
        barrier.wait(stack.SOON)

    with concurrent.futures.ThreadPoolExecutor(THREADS, "", begin) as threads:
        return list(threads.map(function, arguments))


@ON_ALL
def test_each_message_of_many_requests_is_at_its_own_cells_host(
    site: Site, runtimes: runtime.Registry
) -> None:
    instances = list(site.cell_of)
    # Each instance in turn; every second round is a cast.
    wanted = [
        (
            instances[number % INSTANCES],
            "reboot" if number // INSTANCES % 2 else "os-getConsoleOutput",
        )
        for number in range(REQUESTS)
    ]

    responses = at_once(lambda arguments: site.act(*arguments), wanted)

    expected: list[collections.Counter[tuple[str, str, str]]]
    expected = [collections.Counter() for _ in range(CELLS)]
    for (instance, action), response in zip(wanted, responses, strict=True):
        cell = site.cell_of[instance]
        if action == "reboot":
            assert response.status_int == 202, response
            method = "reboot_instance"
        else:
            # No reply crossed another.
            assert response.status_int == 200, response
            assert response.json == [site.hosts[cell].name, instance]
            method = "get_console_output"
        request_id = response.headers["x-openstack-request-id"]
        expected[cell][method, instance, request_id] += 1
    stack.eventually(lambda: site.messages() >= REQUESTS)
    for host, its_own in zip(site.hosts, expected, strict=True):
        arrived = collections.Counter(
            (method, instance, context["request_id"])
            for method, instance, context in host.messages
        )
        assert arrived == its_own
        for _, _, context in host.messages:
            assert context["user"] == "the-user"
            assert context["project_id"] == "the-project"
            assert context["roles"] == ["member"]
            assert not {"mq_connection", "cell_uuid"} & context.keys()
    # Nothing is at the service's own host, where it would have arrived.
    client = rpc.get_client(stack.target(server="host"))
    client.call({}, "get_console_output", instance_uuid="the only one")
    assert site.default_host.instances() == ["the only one"]
    # All of it through one transport a cell.
    (shared,) = runtimes
    pool = shared.process().pool.stats()
    assert pool.total.opened == CELLS
    assert pool.leases == 0


def test_a_token_that_is_not_good_sends_nothing(
    site: Site, runtimes: runtime.Registry
) -> None:
    instance = next(iter(site.cell_of))
    for action in ("reboot", "os-getConsoleOutput"):
        response = site.act(instance, action, token="a-bad-token")
        assert response.status_int == 503
        assert list(response.json) == ["serviceUnavailable"]
    # The one that follows on the same way arrives.
    assert site.act(instance, "os-getConsoleOutput").status_int == 200
    assert site.messages() == 1
    assert site.default_host.messages == []
    (shared,) = runtimes
    # The cells and that instance: no query before the good token.
    assert shared.process().directory.stats().queries == 2


def test_the_line_that_names_a_file_is_enough_for_the_api(
    tmp_path: Path, runtimes: runtime.Registry, sqlite: servers.Database
) -> None:
    """The other line is taken out, as the sample says."""
    instances = tmp_path / "instances.json"
    instances.write_text("{}", "utf-8")
    file = tmp_path / "nova.conf"
    file.write_text(
        "[DEFAULT]\ntransport_url = cellmw-memory://default/\n"
        f"[api_database]\nconnection = {sqlite.url}\n"
        f"[demo]\ninstances = {instances}\n",
        "utf-8",
    )
    text = SAMPLE.read_text("utf-8")
    text = text.replace("\noslo_config_project", "\n# oslo_config_project")
    text = text.replace(
        "# oslo_config_file = /etc/nova/nova.conf",
        f"oslo_config_file = {file}",
    )
    # Keystone's filter reads no file that is named in this way.
    text = text.replace(" authtoken cellmw", " cellmw")
    paste_file = tmp_path / "api-paste.ini"
    paste_file.write_text(text, "utf-8")
    application = deploy.loadapp(f"config:{paste_file}")
    response = webob.Request.blank("/v2.1/servers").get_response(application)
    assert response.json == {"servers": []}
