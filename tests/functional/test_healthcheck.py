# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The health check as oslo.middleware serves it, beside the filter."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from paste import deploy

from cellmw import runtime
from tests import servers
from tests.faults.service import Service, our_client
from tests.functional import stack

PASSWORD = "s3cr3t-p4ssw0rd"


@pytest.fixture
def api(
    request: pytest.FixtureRequest, sqlite: servers.Database
) -> Iterator[Service]:
    made = Service(sqlite, breaker_failures=1, **getattr(request, "param", {}))
    yield made
    made.close()


def health(tmp_path: Path, detailed: bool = False) -> Any:
    """The application, as a paste file has it."""
    config = tmp_path / "api-paste.ini"
    config.write_text(
        "[app:main]\n"
        "use = egg:oslo.middleware#healthcheck\n"
        "oslo_config_project = cellmw-test\n"
        "backends = cellmw\n"
        f"detailed = {detailed}\n"
    )
    return deploy.loadapp(f"config:{config}")


def add_dead_cell(api: Service) -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    url = f"rabbit://user:{PASSWORD}@127.0.0.1:{port}/"
    cell = api.add_cell(url, name="a-name")

    def send(context: Any) -> None:
        our_client(context).cast(context, "reboot_instance", number=0)

    assert api.request(cell, send).status_int == 503
    return cell


def test_it_is_healthy_before_anything_was_asked(
    api: Service, tmp_path: Path
) -> None:
    response = stack.request(health(tmp_path), "/")
    assert response.status_int == 200
    assert "no requests served" in response.text
    (made,) = runtime.registry()
    # It has made nothing for that.
    assert made.current is None


@pytest.mark.parametrize(
    "api", [{}, {"healthcheck_max_cells_down": 1}], indirect=True
)
def test_one_cell_that_is_down_is_told_and_no_reason_to_fail(
    api: Service, tmp_path: Path
) -> None:
    cell = add_dead_cell(api)
    opened = api.process.pool.stats().total.opened
    response = stack.request(health(tmp_path), "/")
    assert response.status_int == 200
    assert response.text == "cellmw: 1 of 1 cells down"
    detailed = stack.request(
        health(tmp_path, detailed=True),
        "/",
        headers={"Accept": "application/json"},
    )
    (reason,) = detailed.json_body["reasons"]
    assert f"cell {cell} is down" in reason["details"]
    for text in (response.text, reason["details"]):
        assert PASSWORD not in text
        assert "a-name" not in text
    assert api.process.pool.stats().total.opened == opened


@pytest.mark.parametrize(
    "api", [{"healthcheck_max_cells_down": 1}], indirect=True
)
def test_more_cells_than_allowed_make_it_fail(
    api: Service, tmp_path: Path
) -> None:
    for _ in range(2):
        add_dead_cell(api)
    response = stack.request(health(tmp_path), "/")
    assert response.status_int == 503
    assert "2 of 2 cells down" in response.text


def test_a_cell_that_is_removed_is_no_longer_down(
    api: Service, tmp_path: Path
) -> None:
    dead, other = add_dead_cell(api), add_dead_cell(api)
    api.remove_cell(dead)
    api.process.directory.refresh()
    response = stack.request(health(tmp_path), "/")
    assert response.text == "cellmw: 1 of 1 cells down"
    assert [stats.cell_uuid for stats in api.process.guards.stats()] == [other]
