# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""``transport_cache = false`` leaves nothing behind, the broker says."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from cellmw import rpc, runtime, workers
from tests import servers
from tests.functional import stack
from tests.functional.stack import Api, ApiDatabase, MakeFilter

PASSWORD = "of-a-user-of-our-own"
REQUESTS = 200
AT_ONCE = 4

client = rpc.get_client(stack.target(server="host"))


@pytest.fixture
def vhost_of_our_own(broker: servers.Broker) -> Iterator[servers.Vhost]:
    """A vhost with a host in it that connects as another user than we."""
    with (
        broker.new_user(PASSWORD) as user,
        broker.vhost(user=user, password=PASSWORD) as vhost,
        stack.host_process(broker.url(vhost.name), "the host"),
    ):
        yield vhost


@pytest.fixture
def short_lived_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads without work end at once, not after half a minute."""
    monkeypatch.setitem(
        workers.Workers.__init__.__kwdefaults__ or {}, "idle_timeout", 0.2
    )


def ours(vhost: servers.Vhost) -> list[str]:
    """Our connections, as the broker lists them."""
    user, _, _ = vhost.url.removeprefix("rabbit://").partition(":")
    return [row["name"] for row in vhost.connections() if row["user"] == user]


def reply_queues(vhost: servers.Vhost) -> list[str]:
    return [name for name in vhost.queues() if name.startswith("reply_")]


def names() -> str:
    return " ".join(thread.name for thread in threading.enumerate())


def held() -> dict[str, int]:
    """What this process has open."""
    process = psutil.Process()
    return {
        "threads": process.num_threads(),
        "python threads": threading.active_count(),
        "descriptors": process.num_fds(),
        "sockets": len(process.net_connections()),
    }


@pytest.mark.servers
@pytest.mark.usefixtures("short_lived_threads")
def test_after_many_requests_nothing_is_left_on_either_side(
    vhost_of_our_own: servers.Vhost,
    api_database: ApiDatabase,
    make_filter: MakeFilter,
    runtimes: runtime.Registry,
) -> None:
    vhost = vhost_of_our_own
    cell = api_database.add_cell(vhost.url)
    instances = api_database.add_instances([cell] * 50)
    seen: list[int] = []

    def handler(context: Any) -> Any:
        uuid = context.request_id
        client.cast(context, "reboot_instance", instance_uuid=uuid)
        answer = client.call(context, "get_console_output", instance_uuid=uuid)
        assert answer == ["the host", uuid]
        seen.append(1)
        return ""

    application = make_filter(transport_cache="false")(Api(handler))

    path = f"/servers/{instances[0]}/action"

    def request(number: int) -> None:
        path = f"/servers/{instances[number % len(instances)]}/action"
        response = stack.request(application, path, "POST")
        assert response.status_int == 200

    request(0)
    (shared,) = runtimes
    pool = shared.process().pool
    stack.eventually(lambda: pool.stats().total.closed == 1)
    stack.eventually(lambda: "cellmw-worker" not in names())
    before = held()

    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as threads:
        list(threads.map(request, range(REQUESTS)))

    assert len(seen) == REQUESTS + 1
    total = pool.stats().total
    assert total.opened == REQUESTS + 1
    stack.eventually(lambda: pool.stats().total.closed == total.opened)
    stack.eventually(lambda: held() == before, within=20)
    stack.eventually(lambda: ours(vhost) == [], within=20)
    # The broker keeps them for two seconds.
    stack.eventually(lambda: reply_queues(vhost) == [], within=30)

    # Of a transport that is kept the broker tells.
    response = stack.request(make_filter()(Api(handler)), path)
    assert response.status_int == 200
    stack.eventually(lambda: len(ours(vhost)) == 2, within=20)
    assert len(reply_queues(vhost)) == 1
