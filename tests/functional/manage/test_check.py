# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""``cellmw-manage cell check`` with real brokers, and with none."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from cellmw.cells.tables import cell_mappings
from tests import servers
from tests.functional.manage.manage import Manage

Check = Callable[..., dict[str, Any]]


@pytest.fixture
def check(manage: Manage) -> Check:
    """A function that checks one cell with this URL."""

    def check(url: str | None, *options: str) -> dict[str, Any]:
        name = str(uuid.uuid4())
        with manage.engine.begin() as connection:
            connection.execute(
                sa.insert(cell_mappings).values(uuid=name, transport_url=url)
            )
        done = manage("cell", "check", name, *options, "-f", "json")
        assert done.err == ""
        (row,) = done.json
        good = row["state"] in ("reachable", "no queue")
        assert done.status == (0 if good else 1)
        found: dict[str, Any] = row
        return found

    return check


@pytest.fixture
def silent() -> Iterator[int]:
    """A port that accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.servers
def test_a_broker_that_answers_is_reachable_and_left_as_it_was(
    check: Check, vhost: servers.Vhost
) -> None:
    before = exchanges(vhost)
    found = check(vhost.url)
    assert (found["state"], found["detail"]) == ("reachable", "")
    assert 0 < found["seconds"] < 10
    assert vhost.queues() == {}
    assert exchanges(vhost) == before
    deadline = time.monotonic() + 20
    while any(row["state"] == "running" for row in vhost.connections()):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def exchanges(vhost: servers.Vhost) -> list[str]:
    rows = vhost.broker.table("list_exchanges", "-p", vhost.name, "name")
    return sorted(row["name"] for row in rows)


@pytest.mark.servers
def test_wrong_credentials_are_told_and_not_shown(
    check: Check, vhost: servers.Vhost
) -> None:
    parts = sa.make_url(vhost.url).set(username="Zuser", password="Zpw")
    found = check(parts.render_as_string(hide_password=False))
    assert found["state"] == "unreachable"
    assert "ACCESS_REFUSED" in found["detail"]


@pytest.mark.servers
def test_a_virtual_host_that_is_not_there_is_told(
    check: Check, vhost: servers.Vhost
) -> None:
    found = check(f"{vhost.url}-none")
    assert found["state"] == "unreachable"
    assert "NOT_ALLOWED" in found["detail"]


def test_a_port_where_nobody_listens_is_unreachable(check: Check) -> None:
    found = check(f"rabbit://Zuser:Zpw@127.0.0.1:{servers.free_port()}/")
    assert found["state"] == "unreachable"
    assert "refused" in found["detail"]
    assert found["transport_url"].startswith("rabbit://***@127.0.0.1:")


@pytest.mark.leaves_threads("the attempts never come back")
def test_brokers_that_say_nothing_are_given_up_together(
    manage: Manage, silent: int
) -> None:
    with manage.engine.begin() as connection:
        connection.execute(
            sa.insert(cell_mappings),
            [
                {
                    "uuid": str(uuid.uuid4()),
                    "transport_url": f"rabbit://h@127.0.0.1:{silent}/{n}",
                }
                for n in range(5)
            ],
        )
    start = time.monotonic()
    done = manage("cell", "check", "--timeout", "1", "-f", "json")
    assert time.monotonic() - start < 5
    assert done.status == 1
    assert len(done.json) == 5
    for row in done.json:
        assert row["state"] == "unreachable"
        assert row["detail"] == "no answer within 1 s"


def test_a_program_with_attempts_that_hang_ends(
    manage: Manage, silent: int
) -> None:
    with manage.engine.begin() as connection:
        connection.execute(
            sa.insert(cell_mappings).values(
                uuid=str(uuid.uuid4()),
                transport_url=f"rabbit://Zuser:Zpw@127.0.0.1:{silent}/",
            )
        )
    done = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-m", "cellmw.cli.main"),
            *("--config-file", str(manage.file), "cell", "check"),
            *("--timeout", "0.5", "-f", "value", "-c", "state"),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout == "unreachable\n"


@pytest.mark.parametrize(
    "url, state, detail",
    [
        ("none:///", "no queue", "nothing is sent"),
        (None, "misconfigured", "it is empty"),
        ("rabbit://Zuser:{Zpw}@h/", "misconfigured", "braces"),
        ("rabbit://Zuser:Zpw@h/?none=1", "misconfigured", "unknown option"),
        ("cellmw-memory://h/v", "reachable", ""),
        # Its driver does not tell when it has a connection.
        ("fake://h/v", "not tried", "only to send"),
    ],
)
def test_other_cells(
    check: Check, url: str | None, state: str, detail: str
) -> None:
    found = check(url)
    assert found["state"] == state
    assert detail in found["detail"]


def test_a_cell_that_is_not_there_cannot_be_checked(manage: Manage) -> None:
    name = str(uuid.uuid4())
    assert name in manage.refuses("cell", "check", name)
