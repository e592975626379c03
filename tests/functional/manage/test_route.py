# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""``cellmw-manage route``: each row of the contract's table."""

from __future__ import annotations

import pytest

from cellmw.cells.mapping import CELL0_UUID
from tests import servers
from tests.functional.manage.manage import (
    BAD,
    NOBODY,
    ONE,
    TWO,
    Manage,
    instance,
)


@pytest.fixture
def filled(manage: Manage) -> Manage:
    manage.fill()
    return manage


def steps(manage: Manage, *arguments: str) -> dict[str, tuple[str, str]]:
    done = manage("route", *arguments, "-f", "json")
    assert (done.status, done.err) == (0, "")
    return {row["step"]: (row["found"], row["meaning"]) for row in done.json}


def test_an_instance_in_a_cell(filled: Manage) -> None:
    found = steps(filled, f"/v2.1/servers/{instance(2).upper()}/action")
    assert list(found) == [
        *("path", "instance", "mapping", "cell", "transport_url"),
        *("filled in", "driver", "request", "memory"),
    ]
    assert found["path"][1] == "instance_path_patterns, line 1"
    assert found["instance"][0] == instance(2)
    assert found["mapping"] == (f"cell {ONE}", "cell_id 2")
    assert found["cell"] == (f"{ONE} (one)", "enabled")
    assert found["transport_url"] == (
        "rabbit://***@one.example:5672/v",
        "not a template",
    )
    assert found["driver"][0] == "rabbit"
    assert found["request"][0] == (
        f"mq_connection for this cell, cell_uuid {ONE}"
    )


def test_an_instance_in_a_disabled_cell_that_is_queued_for_delete(
    filled: Manage,
) -> None:
    found = steps(filled, f"/servers/{instance(3)}")
    assert "queued for delete" in found["mapping"][1]
    assert "disabled" in found["cell"][1]
    assert found["transport_url"] == (
        "{scheme}://***@two.example:{port}/w",
        "a template, filled in from [DEFAULT] transport_url",
    )
    assert found["filled in"][0] == "rabbit://***@two.example:5672/w"
    assert found["request"][0].endswith(TWO)


@pytest.mark.parametrize(
    "number, request_, meaning",
    [
        (1, f"refuses to send, cell_uuid {CELL0_UUID}", "CellHasNoQueue"),
        (4, f"refuses to send, cell_uuid {BAD}", "CellMisconfigured: "),
        (5, "mq_connection None, cell_uuid None", "default transport"),
        (9, "mq_connection None, cell_uuid None", "default transport"),
    ],
)
def test_what_else_a_request_can_get(
    filled: Manage, number: int, request_: str, meaning: str
) -> None:
    found = steps(filled, f"/servers/{instance(number)}")
    assert request_ in found["request"][0]
    assert meaning in found["request"][1]


def test_a_cell_that_is_gone(filled: Manage) -> None:
    found = steps(filled, f"/servers/{instance(6)}")
    assert found["mapping"][0] == "cell id 99"
    assert found["request"][0] == (
        "mq_connection refuses to send, cell_uuid None"
    )
    assert found["request"][1].startswith("CellNotFound: ")


@pytest.mark.parametrize("number", [5, 6, 9])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_instance_in_no_known_cell_is_not_remembered(
    filled: Manage, number: int, method: str
) -> None:
    found = steps(filled, f"/servers/{instance(number)}", "--method", method)
    assert list(found)[-2:] == ["request", "memory"]
    assert "the instance: never" in found["memory"][0]
    assert "read again after 10 s" in found["memory"][0]


@pytest.mark.parametrize(
    "url",
    [
        "/servers",
        "/servers/detail",
        f"/flavors/{NOBODY}",
        "http://h:8774/",
        "/servers/%2e",
    ],
)
def test_no_instance_asks_nothing(filled: Manage, url: str) -> None:
    found = steps(filled, url)
    assert list(found) == ["path", "request"]
    assert found["request"][0] == "untouched"


@pytest.mark.parametrize(
    "url", [f"/servers/{instance(2)}{end}" for end in (".json", "%0A", "//")]
)
def test_what_another_reader_may_take_for_an_instance_is_refused(
    filled: Manage, url: str
) -> None:
    found = steps(filled, url)
    assert list(found) == ["path", "request"]
    assert found["request"][0].startswith("mq_connection refuses to send")
    assert found["request"][1].startswith("AmbiguousPath")


@pytest.mark.parametrize(
    "arguments",
    [
        (f"http://h:8774/v2.1/servers/{instance(2)}?x=1#y",),
        (f"https://h/v2/project/servers/{instance(2)}",),
        (f"/os-fping/{instance(2)}",),
        # A server decodes the path once.
        (f"/%73ervers/{instance(2)}",),
        (f"/compute/servers/{instance(2)}", "--script-name", "/compute"),
        (f"/compute/servers/{instance(2)}", "--script-name", "/compute/"),
    ],
)
def test_the_path_is_what_the_server_makes_of_the_url(
    filled: Manage, arguments: tuple[str, ...]
) -> None:
    assert steps(filled, *arguments)["instance"][0] == instance(2)


def test_a_mounted_service_is_hinted_at(filled: Manage) -> None:
    path = f"/compute/api/v2.1/servers/{instance(2)}"
    found = steps(filled, f"http://h{path}")
    assert found["path"][1].endswith(
        "; if the service is mounted at /compute/api, give --script-name "
        "/compute/api"
    )
    found = steps(filled, path, "--script-name", "/compute/api")
    assert found["instance"][0] == instance(2)
    assert "--script-name" not in steps(filled, "/servers")["path"][1]


def test_the_table_fits_into_a_pipe(filled: Manage) -> None:
    done = filled("route", f"/v2.1/servers/{instance(2)}/action")
    assert max(map(len, done.out.splitlines())) <= 80
    for uuid in (instance(2), ONE):
        assert uuid in done.out


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("",), "neither"),
        (("servers",), "neither"),
        (("ftp://h/x",), "neither"),
        (("http://h",), "neither"),
        (("rabbit://Zuser:Zpw@h/",), "neither"),
        (("http://[h/",), "not a URL"),
        (("/computers/x", "--script-name", "/compute"), "--script-name"),
    ],
)
def test_what_is_no_url_of_a_request(
    filled: Manage, arguments: tuple[str, ...], said: str
) -> None:
    assert said in filled.refuses("route", *arguments)


@pytest.mark.parametrize(
    "lines, method, said",
    [
        ((), "GET", "for up to 30 s"),
        ((), "POST", "not for POST (instance_cache_for = safe)"),
        (("instance_cache_for = all",), "post", "for up to 30 s"),
        (("instance_cache_ttl = 0",), "GET", "never"),
        (("cell_refresh_interval = 7",), "GET", "read again after 7 s"),
    ],
)
def test_what_processes_remember_and_for_how_long(
    filled: Manage,
    sqlite: servers.Database,
    lines: tuple[str, ...],
    method: str,
    said: str,
) -> None:
    filled.configure(sqlite.url, *lines)
    found = steps(filled, f"/servers/{instance(2)}", "--method", method)
    assert said in found["memory"][0]
    assert "each running process has its own memory" in found["memory"][1]


@pytest.mark.parametrize(
    "lines, said",
    [
        ((), "503"),
        (("on_lookup_failure = pass",), "mq_connection refuses to send"),
    ],
)
def test_a_database_that_cannot_be_asked(
    filled: Manage, lines: tuple[str, ...], said: str
) -> None:
    port = servers.free_port()
    filled.configure(f"mysql+pymysql://Zuser:Zpw@127.0.0.1:{port}/x", *lines)
    done = filled("route", f"/servers/{instance(2)}", "-f", "json")
    assert done.status == 1
    assert "cannot be reached" in done.err
    assert said in done.json[-1]["meaning"]
    assert "unless the process remembers" in done.json[-1]["meaning"]


def test_patterns_of_ones_own_are_named_by_their_line(
    filled: Manage, sqlite: servers.Database
) -> None:
    filled.configure(
        sqlite.url,
        "instance_path_patterns = /none/(?P<instance_uuid>x)",
        "  /boxes/(?P<instance_uuid>[^/]+)",
    )
    found = steps(filled, f"/boxes/{instance(2)}/lid")
    assert found["path"][1] == "instance_path_patterns, line 2"
