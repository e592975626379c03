# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""``cellmw-manage cell update`` while requests send."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest
import sqlalchemy as sa

from cellmw import rpc
from tests import servers
from tests.functional import stack
from tests.functional.manage.manage import Manage

INTERVAL = 1.0
THREADS = 16
# What one refresh may take on a machine that is busy, in seconds: meanwhile
# other requests go on with what was read before.
REFRESH = 1.0


class Load:
    """Threads that make requests, each of which sends one message.

    :ivar begun: when each message's request began, by the message's number
    :ivar failures: what went wrong
    """

    def __init__(self, application: Any, instances: list[str]) -> None:
        self._application = application
        self._instances = instances
        self._stop = threading.Event()
        self.begun: dict[str, float] = {}
        self.failures: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._run, args=(number,))
            for number in range(THREADS)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, thread: int) -> None:
        instance = self._instances[thread % len(self._instances)]
        for number in itertools.count():
            if self._stop.is_set():
                return
            name = f"{thread}-{number}"
            self.begun[name] = time.monotonic()
            try:
                response = stack.request(
                    self._application,
                    f"/servers/{instance}/action",
                    "POST",
                    environ={"test.message": name},
                )
                assert response.status_code == 200
            except BaseException as error:
                self.failures.append(error)


@pytest.mark.servers
def test_messages_follow_a_cell_and_none_is_lost(
    api_database: stack.ApiDatabase,
    make_filter: stack.MakeFilter,
    make_vhost: Callable[[], servers.Vhost],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    old, new = make_vhost(), make_vhost()
    cell = api_database.add_cell(old.url)
    instances = [api_database.add_instance(cell) for _ in range(4)]
    engine = sa.create_engine(api_database.url, poolclass=sa.NullPool)
    manage = Manage(tmp_path, api_database.url, engine, capsys)
    client = rpc.get_client(stack.target(server="host"))

    def application(environ: dict[str, Any], start_response: Any) -> Any:
        client.cast(
            environ["cellmw.context"],
            "reboot_instance",
            instance_uuid=environ["test.message"],
        )
        start_response("200 OK", [])
        return []

    filtered = make_filter(cell_refresh_interval=str(INTERVAL))(application)
    old_host, new_host = stack.Host("old"), stack.Host("new")
    with contextlib.ExitStack() as hosts:
        hosts.enter_context(stack.serving(new.url, new_host))
        with stack.serving(old.url, old_host):
            with Load(filtered, instances) as load:
                stack.eventually(lambda: len(old_host.messages) > THREADS)
                done = manage(
                    "cell", "update", cell, "--transport-url", new.url
                )
                updated = time.monotonic()
                assert (done.status, done.err) == (0, "")
                time.sleep(INTERVAL + REFRESH + 1)
            assert load.failures == []
            stack.eventually(
                lambda: (
                    len(old_host.messages) + len(new_host.messages)
                    == len(load.begun)
                )
            )
        # Each arrived once, and where it belongs.
        arrived = sorted(old_host.instances() + new_host.instances())
        assert arrived == sorted(load.begun)
        late = {
            name
            for name, begun in load.begun.items()
            if begun > updated + INTERVAL + REFRESH
        }
        assert len(late) > THREADS
        assert late.isdisjoint(old_host.instances())
        # The old host's server is gone by now, and so is all of ours.
        stack.eventually(
            lambda: (
                not [
                    row
                    for row in old.connections()
                    if row["state"] == "running"
                ]
            ),
            within=20,
        )
        assert new.connections()
