# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Each command: what it does, shows in each format, and refuses."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import re
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import yaml
from oslo_config import cfg

from cellmw.cells.changes import Changes
from cellmw.cells.mapping import CELL0_UUID
from cellmw.cells.tables import cell_mappings, instance_mappings
from cellmw.cli import base
from cellmw.cli import main as cli
from tests import servers
from tests.functional.database import schema
from tests.functional.manage.manage import (
    BAD,
    NOBODY,
    ONE,
    TWO,
    Manage,
    instance,
)

LIST_FORMATS = ("table", "json", "yaml", "csv", "value")
SHOW_FORMATS = ("table", "json", "yaml", "value", "shell")

# Each command with arguments with which it succeeds on the filled tables.
LISTS: dict[str, tuple[str, ...]] = {
    "cell list": (),
    "cell check": (CELL0_UUID,),
    "instance list": (),
    "route": (f"http://api:8774/v2.1/servers/{instance(2)}",),
}
SHOWS: dict[str, tuple[str, ...]] = {
    "cell show": (ONE,),
    "cell create": (
        *("--uuid", NOBODY, "--name", "new"),
        *("--transport-url", "rabbit://Zuser:Zpw@new.example/v"),
        *("--database-connection", "mysql://Zuser:Zpw@db.example/new"),
    ),
    "cell update": (ONE, "--transport-url", "rabbit://Zuser:Zpw@new/v"),
    "instance show": (instance(2),),
    "instance map": (instance(9), "--cell", ONE, "--project-id", "p"),
}
OTHERS: dict[str, tuple[str, ...]] = {
    "db sync": (),
    "cell delete": (BAD,),
    "instance unmap": (instance(4),),
}
COMMANDS = LISTS | SHOWS | OTHERS


@pytest.fixture
def filled(manage: Manage) -> Manage:
    manage.fill()
    return manage


def parsed(text: str, how: str) -> Any:
    """What a reader of that format sees."""
    if how == "json":
        return json.loads(text)
    if how == "yaml":
        return yaml.safe_load(text)
    if how == "csv":
        return list(csv.DictReader(io.StringIO(text)))
    return text


def test_each_command_is_tested_here() -> None:
    # What is wrong is a row of doctor's; it has a module of its own.
    assert {*COMMANDS, "doctor"} == set(cli.COMMANDS)


@pytest.mark.parametrize("how", LIST_FORMATS)
@pytest.mark.parametrize("name", list(LISTS))
def test_lists_in_each_format(filled: Manage, name: str, how: str) -> None:
    done = filled(*name.split(), *LISTS[name], "-f", how)
    assert (done.status, done.err) == (0, "")
    found = parsed(done.out, how)
    if how in ("json", "yaml", "csv"):
        expected = filled(*name.split(), *LISTS[name], "-f", "json").json
        # YAML comes with its columns in another order.
        assert [sorted(row) for row in found] == [
            sorted(row) for row in expected
        ]
        assert len(found) == len(expected) > 0
    else:
        assert (CELL0_UUID if name.startswith("cell") else ONE) in found


@pytest.mark.parametrize("how", SHOW_FORMATS)
@pytest.mark.parametrize("name", list(SHOWS))
def test_shows_in_each_format(filled: Manage, name: str, how: str) -> None:
    done = filled(*name.split(), *SHOWS[name], "-f", how)
    assert (done.status, done.err) == (0, "")
    found = parsed(done.out, how)
    assert len(found) > 3 if how in ("json", "yaml") else found.count("\n") > 2


def test_the_others_say_what_they_did(filled: Manage) -> None:
    assert "nothing was changed" in filled("db", "sync").out
    done = filled("instance", "unmap", instance(4))
    assert instance(4) in done.out
    assert "30 s" in done.out
    done = filled("cell", "delete", BAD)
    assert f"Cell {BAD} was deleted" in done.out
    assert "10 s old (cell_refresh_interval)" in done.out
    assert "until these are 20 s old" in done.out
    cells, instances = filled.tables()
    assert BAD not in [row["uuid"] for row in cells]
    assert instance(4) not in [row["instance_uuid"] for row in instances]


def test_columns_can_be_chosen(filled: Manage) -> None:
    done = filled("cell", "list", "-f", "value", "-c", "uuid", "-c", "name")
    assert done.out.splitlines()[1] == f"{ONE} one"


def names_of(name: str) -> tuple[str, ...]:
    entry = importlib.metadata.EntryPoint(
        name, cli.COMMANDS[name].value, "cellmw-manage"
    )
    names: tuple[str, ...] = entry.load().names
    return names


@pytest.mark.parametrize("name", [*LISTS, *SHOWS])
def test_a_column_that_is_not_there_is_refused_and_nothing_is_done(
    filled: Manage, name: str
) -> None:
    arguments = (*name.split(), *COMMANDS[name], "-f", "json")
    # One that is there does not make up for it.
    said = filled.refuses(*arguments, "-c", "nosuch", "-c", "uuid")
    names = names_of(name)
    assert f"no column 'nosuch' (known: {', '.join(names)})" in said
    done = filled(*arguments, *("-c", names[0].upper()))
    row = done.json if name in SHOWS else done.json[0]
    assert list(row) == [names[0]]


@pytest.mark.parametrize("name", [*LISTS, *SHOWS])
def test_the_columns_are_those_that_the_command_names(
    filled: Manage, name: str
) -> None:
    done = filled(*name.split(), *COMMANDS[name], "-f", "json")
    row = done.json if name in SHOWS else done.json[0]
    assert tuple(row) == names_of(name)


EVIL = "a\x1b[2J\nforged\u202e"


@pytest.mark.parametrize(
    "name, how",
    [
        *(("cell list", how) for how in LIST_FORMATS),
        *(("cell show", how) for how in SHOW_FORMATS),
        *(("instance show", how) for how in SHOW_FORMATS),
        *(("route", how) for how in LIST_FORMATS),
    ],
)
def test_what_cannot_be_printed_is_escaped(
    filled: Manage, name: str, how: str
) -> None:
    with filled.engine.begin() as connection:
        connection.execute(sa.update(cell_mappings).values(name=EVIL))
        connection.execute(sa.update(instance_mappings).values(user_id=EVIL))
    done = filled(*name.split(), *COMMANDS[name], "-f", how)
    assert done.status == 0
    assert not [c for c in done.out if not c.isprintable() and c != "\n"]
    if how in ("json", "yaml"):
        assert any(EVIL in value for value in texts(parsed(done.out, how)))
    else:
        assert "\\x1b[2J\\nforged\\u202e" in done.out.replace("\\\\", "\\")
        assert "\nforged" not in done.out


def texts(value: Any) -> list[str]:
    """All texts in a value that was read from JSON or YAML."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for part in value for text in texts(part)]
    return [str(value)]


def test_a_path_that_cannot_be_printed_is_escaped(filled: Manage) -> None:
    for how in ("table", "value"):
        done = filled("route", "/x%1b[2J%0aforged", "-f", how)
        assert "/x\\x1b[2J\\nforged" in done.out
    done = filled("route", "/x%1b[2J%0aforged", "-f", "json")
    assert done.json[0]["found"] == "/x\x1b[2J\nforged"


@pytest.mark.parametrize(
    "url, said",
    [
        ("rabbit://Zuser:Zpw@h/v?nosuch=3", "names an unknown option"),
        ("rabbit://Zuser:Zpw@h/v?heartbeat_rate=Zpw", "option heartbeat_rate"),
    ],
)
def test_the_state_is_what_opening_its_transport_shows(
    filled: Manage, url: str, said: str
) -> None:
    with filled.engine.begin() as connection:
        connection.execute(
            sa.update(cell_mappings)
            .where(cell_mappings.c.uuid == ONE)
            .values(transport_url=url)
        )
    state = filled("cell", "show", ONE, "-f", "json").json["state"]
    assert state.startswith("misconfigured: transport_url: ")
    assert said in state
    rows = filled("cell", "list", "-f", "json").json
    assert rows[1]["state"] == state
    steps = filled("route", *LISTS["route"], "-f", "json").json
    (request,) = [row for row in steps if row["step"] == "request"]
    assert "refuses to send" in request["found"]
    assert said in request["meaning"]


def test_cells_are_listed_with_what_their_state_is(filled: Manage) -> None:
    rows = {
        row["uuid"]: row for row in filled("cell", "list", "-f", "json").json
    }
    assert list(rows) == [CELL0_UUID, ONE, TWO, BAD]
    assert rows[CELL0_UUID]["state"] == "no queue"
    assert rows[ONE] == {
        "uuid": ONE,
        "name": "one",
        "disabled": False,
        "transport_url": "rabbit://***@one.example:5672/v",
        "database_connection": "mysql://***@db/2",
        "state": "usable",
    }
    assert rows[TWO]["state"] == "disabled (still receives messages)"
    assert rows[BAD]["state"].startswith("misconfigured: transport_url: it")


def test_an_empty_list_is_a_list(manage: Manage) -> None:
    assert manage("cell", "list", "-f", "json").json == []
    assert manage("cell", "check", "-f", "json").status == 0


def test_a_cell_is_shown_with_its_url_filled_in_and_its_instances(
    filled: Manage,
) -> None:
    shown = filled("cell", "show", TWO.upper(), "-f", "json").json
    assert shown["transport_url"] == "{scheme}://***@two.example:{port}/w"
    assert (
        shown["transport_url_filled_in"] == "rabbit://***@two.example:5672/w"
    )
    assert (shown["instances"], shown["queued_for_delete"]) == (1, 1)
    shown = filled("cell", "show", BAD, "-f", "json").json
    assert shown["transport_url_filled_in"] is None
    assert NOBODY in filled.refuses("cell", "show", NOBODY)


def test_a_cell_is_created_and_shown(manage: Manage) -> None:
    url = "rabbit://Zuser:Zpw@new.example/v"
    done = manage(
        "cell", "create", "--name", "new", "--transport-url", url, "-f", "json"
    )
    ((row,), _) = manage.tables()
    assert row["transport_url"] == url
    assert row["uuid"] == done.json["uuid"]
    assert row["disabled"] is False
    done = manage(
        *("cell", "create", "--uuid", ONE.upper(), "--disabled"),
        *("--transport-url", "rabbit://Zuser:Zpw@other.example/v"),
        *("--database-connection", "mysql://{username}:{password}@db/new"),
    )
    assert done.status == 0
    row = manage.tables()[0][1]
    assert (row["uuid"], row["disabled"], row["name"]) == (ONE, True, None)
    assert row["database_connection"] == "mysql://{username}:{password}@db/new"


def test_a_url_can_come_from_standard_input(
    manage: Manage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("rabbit://Zuser:Zpw@h/v\n"))
    assert manage("cell", "create", "--transport-url", "-").status == 0
    assert manage.tables()[0][0]["transport_url"] == "rabbit://Zuser:Zpw@h/v"
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert "empty" in manage.refuses("cell", "create", "--transport-url", "-")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--uuid", ONE, "--transport-url", "rabbit://n/"), "already exists"),
        (("--name", "one", "--transport-url", "rabbit://n/"), "same name"),
        (("--transport-url", "rabbit://x:y@one.example/v"), "same broker"),
        (("--transport-url", "rabbit://Zuser:Zpw{@h/"), "brace"),
        (("--transport-url", "rabbit://Zuser:Zpw@h:port/"), "malformed"),
        (("--transport-url", "zmq://Zuser:Zpw@h/"), "no oslo.messaging"),
        (("--transport-url", "Zpw"), "does not begin"),
        (("--transport-url", "rabbit://{hostname2}/"), "does not fill"),
        (("--transport-url", "rabbit://n/?heartbeat_rat=3"), "unknown option"),
        (
            ("--transport-url", "rabbit://n/?heartbeat_rate=Zpw"),
            "transport_ur",
        ),
        (
            *(
                (
                    *("--transport-url", "rabbit://n/"),
                    *("--database-connection", "nosuch://Zuser:Zpw@h/x"),
                ),
            ),
            "database_connection: SQLAlchemy has no dialect",
        ),
        (
            ("--transport-url", "rabbit://n/", "--database-connection", "Zpw"),
            "database_connection: it is not a database URL",
        ),
        (
            *(("--uuid", CELL0_UUID, "--transport-url", "none:///"),),
            "already exists",
        ),
    ],
)
def test_a_cell_that_cannot_be_is_not_created(
    filled: Manage, arguments: tuple[str, ...], said: str
) -> None:
    assert said in filled.refuses("cell", "create", *arguments)


def test_cell0_is_not_disabled(manage: Manage) -> None:
    create = ("cell", "create", "--uuid", CELL0_UUID, "--transport-url")
    assert "disabled" in manage.refuses(*create, "none:///", "--disabled")
    assert manage(*create, "none:///").status == 0
    for option in ("--disable", "--enable"):
        assert "cell0" in manage.refuses("cell", "update", CELL0_UUID, option)


def test_nova_needs_the_connection_of_a_cells_database(
    manage: Manage, tmp_path: Path
) -> None:
    with servers.sqlite_database() as database:
        schema.create_nova_tables(database)
        manage.configure(database.url)
        create = ("cell", "create", "--transport-url", "rabbit://h/v")
        assert "--database-connection" in manage.refuses(*create)
        done = manage(*create, "--database-connection", "mysql://h/x")
        assert done.status == 0


def test_a_cell_is_updated_and_it_is_said_what_that_does(
    filled: Manage,
) -> None:
    url = "rabbit://Zuser:Zpw@new/v"
    done = filled("cell", "update", ONE, "--transport-url", url, "-f", "json")
    assert filled.tables()[0][1]["transport_url"] == url
    effect = done.json["running_processes"]
    assert "finds them 10 s old (cell_refresh_interval)" in effect
    assert "until these are 20 s old" in effect
    assert "go to the new URL" in effect
    done = filled(
        "cell", "update", TWO, "--enable", "--name", "zwei", "-f", "json"
    )
    row = filled.tables()[0][2]
    assert (row["name"], row["disabled"]) == ("zwei", False)
    assert "to the same broker as before" in done.json["running_processes"]
    filled("cell", "update", TWO, "--disable")
    assert filled.tables()[0][2]["disabled"] is True


def test_the_interval_that_is_named_is_the_configured_one(
    filled: Manage, sqlite: servers.Database
) -> None:
    filled.configure(
        sqlite.url, "cell_refresh_interval = 3.5", "instance_cache_ttl = 0"
    )
    assert "3.5 s old" in filled("cell", "update", ONE, "--name", "x").out
    assert "at once" in filled("instance", "unmap", instance(1)).out
    filled.configure(sqlite.url, "instance_cache_for = all")
    assert "all requests" in filled("instance", "unmap", instance(2)).out


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((ONE,), "no option says what to change"),
        ((NOBODY, "--name", "x"), "does not exist"),
        ((ONE, "--name", "two"), "same name"),
        ((ONE, "--transport-url", "rabbit://h:x/"), "malformed"),
        ((ONE, "--transport-url", "rabbit://h/?nosuch=3"), "unknown option"),
        (
            (ONE, "--database-connection", "nosuch://Zuser:Zpw@h/x"),
            "no dialect",
        ),
        ((ONE, "--transport-url", "rabbit://two.example:5672/w"), "same brok"),
        ((ONE, "--database-connection", "mysql://Zuser:Zpw@db/3"), "same dat"),
        ((ONE, "--database-connection", "Zpw"), "not a database URL"),
    ],
)
def test_a_change_that_cannot_be_is_not_made(
    filled: Manage, arguments: tuple[str, ...], said: str
) -> None:
    assert said in filled.refuses("cell", "update", *arguments)


def test_a_bad_cell_can_be_renamed_and_repaired(filled: Manage) -> None:
    assert filled("cell", "update", BAD, "--name", "worse").status == 0
    done = filled("cell", "update", BAD, "--transport-url", "rabbit://h/v")
    assert done.status == 0


def test_a_cell_with_instances_is_not_deleted_and_they_are_counted(
    filled: Manage,
) -> None:
    said = filled.refuses("cell", "delete", TWO)
    assert f"1 instance is mapped to cell {TWO}" in said
    assert "1 of them queued for delete" in said
    assert "does not exist" in filled.refuses("cell", "delete", NOBODY)


def test_an_instance_is_shown_with_its_cell(filled: Manage) -> None:
    shown = filled("instance", "show", instance(3), "-f", "json").json
    assert shown == {
        "instance_uuid": instance(3),
        "cell_uuid": TWO,
        "cell_name": "two",
        "project_id": "p",
        "user_id": "u",
        "queued_for_delete": True,
    }
    shown = filled("instance", "show", instance(5), "-f", "json").json
    assert shown["cell_uuid"] is None
    assert "not mapped" in filled.refuses("instance", "show", instance(9))


def test_an_instance_is_mapped_and_moved(filled: Manage) -> None:
    one = ("instance", "map", instance(9).upper(), "--project-id", "p")
    done = filled(*one, "--cell", ONE, "-f", "json")
    assert (done.json["added"], done.json["changed"]) == (1, 0)
    done = filled(*one, "--cell", ONE, "-f", "json")
    assert (done.json["added"], done.json["unchanged"]) == (0, 1)
    assert f"cell {ONE}" in filled.refuses(*one, "--cell", TWO)
    done = filled(*one, "--cell", TWO, "--replace", "-f", "json")
    assert done.json["changed"] == 1
    shown = filled("instance", "show", instance(9), "-f", "json").json
    assert shown["cell_uuid"] == TWO


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((instance(9),), "--cell is missing"),
        ((instance(9), "--cell", ONE), "--project-id is missing"),
        ((instance(9), "--cell", NOBODY, "--project-id", "p"), "not exist"),
        (("--file", "/nowhere"), "No such file"),
        (("--file", "/"), "Is a directory"),
    ],
)
def test_a_mapping_that_cannot_be_is_not_made(
    filled: Manage, arguments: tuple[str, ...], said: str
) -> None:
    assert said in filled.refuses("instance", "map", *arguments)


def test_an_instance_that_is_not_mapped_is_not_unmapped(
    filled: Manage,
) -> None:
    assert "not mapped" in filled.refuses("instance", "unmap", instance(9))


# Files of instances.


@pytest.fixture
def write(manage: Manage) -> Callable[..., str]:
    def write(*lines: str, encoding: str = "utf-8") -> str:
        path = manage.folder / "instances.csv"
        path.write_text("\n".join(lines) + "\n", encoding)
        return str(path)

    return write


def test_a_file_of_instances_is_mapped_in_batches_and_again(
    filled: Manage, write: Callable[..., str]
) -> None:
    path = write(
        "project_id,instance_uuid,cell_uuid,user_id",
        *(
            f"p{number},{instance(number)},{(ONE, TWO)[number % 2].upper()},"
            for number in range(100, 125)
        ),
        "",
    )
    command = ("instance", "map", "--file", path, "--batch-size", "10")
    done = filled(*command, "-f", "json")
    assert done.status == 0
    assert done.json["added"] == 25
    assert done.err.splitlines() == [
        "checked 25 of 25 (100 %), 25 new",
        "mapped 25 of 25 (100 %), 25 new",
    ]
    row = filled.tables()[1][-1]
    assert (row["instance_uuid"], row["project_id"]) == (instance(124), "p124")
    assert (row["cell_id"], row["user_id"]) == (2, None)
    done = filled("-q", *command, "-f", "json")
    assert (done.json["added"], done.json["unchanged"]) == (0, 25)
    assert done.err == ""


def test_columns_that_the_file_lacks_are_options(
    filled: Manage,
    write: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write("instance_uuid", instance(9), encoding="utf-8-sig")
    options = ("--cell", ONE, "--project-id", "p9", "--user-id", "u9")
    assert filled("instance", "map", "--file", path, *options).status == 0
    row = filled.tables()[1][-1]
    assert (row["cell_id"], row["project_id"]) == (2, "p9")
    assert row["user_id"] == "u9"
    for number, mark in ((10, ""), (11, "\ufeff")):
        text = f"{mark}instance_uuid\r\n{instance(number)}\r\n"
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        assert filled("instance", "map", "--file", "-", *options).status == 0
        assert filled.tables()[1][-1]["instance_uuid"] == instance(number)


HEADER = "instance_uuid,cell_uuid,project_id"
GOOD = f"{instance(9)},{ONE},p"


@pytest.mark.parametrize(
    "lines, said",
    [
        ((), "line 1"),
        ((HEADER,), "names no instance"),
        (("instance_uuid,cell,project_id", GOOD), "line 1 has to name"),
        (("instance_uuid,instance_uuid", GOOD), "line 1 has to name"),
        (
            ("instance_uuid,cell_uuid", GOOD),
            "line 1 does not name column project_id",
        ),
        ((HEADER, GOOD, "x"), "line 3: it has 1 columns, not 3"),
        ((HEADER, GOOD, f"x,{ONE},p"), "line 3: instance_uuid: it is not"),
        ((HEADER, GOOD, f"{instance(8)},x,p"), "line 3: cell_uuid: it is"),
        ((HEADER, GOOD, f"{instance(8)},{ONE},"), "line 3: project_id: it"),
        ((HEADER, GOOD, f"{instance(8)},{NOBODY},p"), "line 3: cell "),
        ((HEADER, GOOD, "", GOOD.upper()), "line 4: another line names the"),
        ((HEADER, GOOD, f'{instance(8)},{ONE},"p'), "line 3: unexpected end"),
        ((HEADER, GOOD, f"{instance(8)},{ONE},{'p' * 256}"), "line 3: proj"),
        (
            (f"{HEADER},user_id", f"{GOOD},", f"{instance(8)},{ONE},p,\x07"),
            "line 3: user_id",
        ),
    ],
)
def test_a_file_with_a_bad_line_maps_nothing(
    filled: Manage,
    write: Callable[..., str],
    lines: tuple[str, ...],
    said: str,
) -> None:
    path = write(*lines)
    assert said in filled.refuses(
        "instance", "map", "--file", path, "--batch-size", "1"
    )


def test_each_bad_line_of_a_file_is_told(
    filled: Manage, write: Callable[..., str]
) -> None:
    before = filled.tables()
    path = write(HEADER, GOOD, "x", f"x,{ONE},p", GOOD, f"{instance(8)},y,p")
    done = filled("instance", "map", "--file", path)
    assert done.status == 1
    assert [line.split(": ")[1] for line in done.err.splitlines()] == [
        *("line 3", "line 4", "line 5", "line 6"),
        "4 lines cannot be used; nothing was changed",
    ]
    path = write(
        HEADER, GOOD, *(f"{instance(n)},{TWO},p" for n in (2, 1, 8, 4))
    )
    done = filled("-q", "instance", "map", "--file", path, "--batch-size", "2")
    said = [line.split(" is already")[0] for line in done.err.splitlines()]
    assert said == [
        *(f"cellmw-manage: instance {instance(n)}" for n in (2, 1, 4)),
        "cellmw-manage: 3 lines cannot be used; nothing was changed",
    ]
    assert filled.tables() == before


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_long_work_has_a_bar(
    filled: Manage,
    write: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write(
        HEADER, *(f"{instance(n)},{ONE},p" for n in (2, *range(20, 26)))
    )
    filled("instance", "map", instance(20), "--cell", ONE, "--project-id", "p")
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    done = filled.run(
        *("--config-file", str(filled.file), "instance", "map"),
        *("--file", path, "--batch-size", "2", "-f", "json"),
    )
    assert done.json["added"] == 5
    shown = terminal.getvalue()
    for part in ("checked: 100%", "mapped: 100%", "7/7", "new=5"):
        assert part in shown


# Names


def test_a_cell_may_be_named(filled: Manage, tmp_path: Path) -> None:
    assert filled("cell", "show", "one", "-f", "json").json["uuid"] == ONE
    (row,) = filled("cell", "check", "two", "-f", "json").json
    assert row["uuid"] == TWO
    done = filled("cell", "update", "one", "--name", "eins", "-f", "json")
    assert (done.json["uuid"], done.json["name"]) == (ONE, "eins")
    command = ("instance", "map", instance(9), "--project-id", "p", "--cell")
    assert filled(*command, "eins").status == 0
    assert filled.tables()[1][-1]["cell_id"] == 2
    filled("instance", "unmap", instance(4))
    assert f"Cell {BAD} was" in filled("cell", "delete", "bad").out
    assert "cell one does not exist" in filled.refuses("cell", "show", "one")
    assert "cell x does not exist" in filled.refuses(*command, "x")


def test_a_name_that_several_cells_have_is_refused(filled: Manage) -> None:
    with filled.engine.begin() as connection:
        connection.execute(
            sa.update(cell_mappings)
            .where(cell_mappings.c.uuid == TWO)
            .values(name="one")
        )
    said = filled.refuses("cell", "delete", "one")
    assert f"several cells are named one; give a UUID: {ONE}, {TWO}" in said


def test_instances_are_listed_in_pages(filled: Manage) -> None:
    def page(*arguments: str) -> tuple[list[str], str]:
        done = filled("instance", "list", *arguments, "-f", "json")
        assert done.status == 0
        return [row["instance_uuid"] for row in done.json], done.err

    everything, err = page()
    assert everything == [instance(number) for number in range(1, 7)]
    assert err == ""
    assert page("--cell", "two") == ([instance(3)], "")
    found: list[str] = []
    more: tuple[str, ...] = ()
    while True:
        some, err = page("--limit", "4", *more)
        found += some
        if not err:
            break
        assert f"--marker {some[-1]} shows the next page" in err
        more = ("--marker", some[-1])
    assert found == everything
    said = filled.refuses("instance", "list", "--marker", instance(99))
    assert "is not mapped" in said


def test_cell0_is_deleted_only_if_that_is_confirmed(
    filled: Manage, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled("instance", "unmap", instance(1))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert "--yes" in filled.refuses("cell", "delete", CELL0_UUID)
    for answer in ("\n", "no\n"):
        monkeypatch.setattr(sys, "stdin", _Terminal(answer))
        done = filled("cell", "delete", CELL0_UUID)
        assert done.status == 1
        assert "Delete cell0? [y/N]" in done.err
    monkeypatch.setattr(sys, "stdin", _Terminal("y\n"))
    assert f"Cell {CELL0_UUID} was" in filled("cell", "delete", CELL0_UUID).out


def test_yes_deletes_cell0_without_a_question(filled: Manage) -> None:
    filled("instance", "unmap", instance(1))
    done = filled("cell", "delete", "--yes", CELL0_UUID)
    assert (done.status, done.err) == (0, "")


def test_a_file_that_is_no_text_maps_nothing(filled: Manage) -> None:
    path = filled.folder / "instances.csv"
    path.write_bytes(b"\xff\xfe\x00")
    said = filled.refuses("instance", "map", "--file", str(path))
    assert "not UTF-8" in said


def test_a_mapping_that_says_something_else_stops_the_whole_file(
    filled: Manage, write: Callable[..., str]
) -> None:
    path = write(HEADER, GOOD, f"{instance(2)},{TWO},p")
    before = filled.tables()
    command = ("-q", "instance", "map", "--file", path, "--batch-size", "1")
    done = filled(*command)
    assert done.status == 1
    assert f"instance {instance(2)} is already mapped" in done.err
    assert filled.tables() == before
    done = filled(*command, "--replace", "-f", "json")
    assert (done.json["added"], done.json["changed"]) == (1, 1)


def test_a_batch_that_fails_leaves_those_before_it(
    filled: Manage,
    write: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write(
        HEADER, *(f"{instance(number)},{ONE},p" for number in range(20, 26))
    )
    command = ("instance", "map", "--file", path, "--batch-size", "2")
    real = Changes.map_instances
    calls = []

    def fail_once(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("rabbit://Zuser:Zpw@h/ fell over")
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Changes, "map_instances", fail_once)
        done = filled(*command)
    assert done.status == 1
    assert done.err.splitlines()[1] == "mapped 4 of 6 (66 %), 4 new"
    assert done.err.splitlines()[2].startswith("cellmw-manage: unexpected")
    done = filled(*command, "-f", "json")
    assert (done.json["added"], done.json["unchanged"]) == (2, 4)
    assert done.err.splitlines()[-1] == "mapped 6 of 6 (100 %), 2 new"
    assert len(filled.tables()[1]) == 6 + 6


# What the configuration leads to.


def test_the_configuration_may_stand_before_the_command(
    filled: Manage,
) -> None:
    done = filled.run("--config-file", str(filled.file), "cell", "list")
    assert ONE in done.out


def test_files_and_directories_can_be_repeated_and_later_ones_win(
    filled: Manage, tmp_path: Path
) -> None:
    folder = tmp_path / "conf.d"
    folder.mkdir()
    text = filled.file.read_text("utf-8")
    bad = re.sub("connection = .*", "connection = nosuch://", text)
    (folder / "10.conf").write_text(bad, "utf-8")
    good = ("--config-file", str(filled.file))
    other = f"--config-dir={folder}"
    for arguments in (
        (other, *good, "cell", "list"),
        ("cell", "list", other, *good),
        ("--config-dir", str(folder), "cell", "list", *good),
    ):
        assert ONE in filled.run(*arguments).out
    done = filled.run(*good, "cell", "list", other)
    assert "has no dialect or driver" in done.err
    done = filled.run("cell", "list", "--config-dir", str(tmp_path / "none"))
    assert done.err == f"cellmw-manage: no such directory: {tmp_path}/none\n"
    done = filled.run("--config-dir", "", "cell", "list")
    assert done.err == "cellmw-manage: argument --config-dir: it is empty\n"


BAD_CONFIGURATIONS = [
    (None, "no such file"),
    ("", "no API database is configured: give a --config-file with"),
    ("", "nova.conf)"),
    ("[api_database]\nconnection = Zpw", "no database URL"),
    ("[api_database]\nconnection Zpw", "nova.conf, line 2: No ':' or '='"),
    (
        "[api_database]\nconnection = sqlite://\nmax_pool_size = Zpw",
        "option max_pool_size in [api_database]",
    ),
    (
        "[api_database]\nconnection = sqlite://\n"
        "[cellmw]\nlookup_timeout = Zpw",
        "option lookup_timeout in [cellmw]",
    ),
    (
        "[api_database]\nconnection = sqlite:////nowhere/x.sqlite",
        "SQLite database /nowhere/x.sqlite does not exist",
    ),
    (
        "[api_database]\nconnection = mysql+nothing://Zuser:Zpw@h/x",
        "no dialect or driver",
    ),
    (
        "[api_database]\nconnection = mysql+pymysql://u:pa$Zpw@h/x",
        "option connection in [api_database] has a bad value: it refers "
        "to an option that is not there (a $ is written $$ in a "
        "configuration file)",
    ),
    (
        "[DEFAULT]\ntransport_url = rabbit://u:pa$Zpw@h/\n"
        "[api_database]\nconnection = sqlite://",
        "option transport_url in [DEFAULT] has a bad value: it refers",
    ),
]


@pytest.mark.parametrize(
    "name, text, said",
    [
        (name, text, said)
        for name in COMMANDS
        for text, said in BAD_CONFIGURATIONS
        # That one makes the file.
        if name != "db sync" or "SQLite database" not in said
    ],
)
def test_a_bad_configuration_is_one_line(
    manage: Manage, name: str, text: str | None, said: str
) -> None:
    if text is None:
        manage.file.unlink()
    else:
        manage.file.write_text(text, "utf-8")
    arguments = COMMANDS[name]
    done = manage(*name.split(), *arguments)
    assert done.status == 1
    assert said in done.err.splitlines()[-1]
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("name", list(COMMANDS))
def test_a_database_that_cannot_be_reached_is_one_line(
    manage: Manage, name: str
) -> None:
    port = servers.free_port()
    manage.configure(f"mysql+pymysql://Zuser:Zpw@127.0.0.1:{port}/nova_api")
    done = manage(*name.split(), *COMMANDS[name])
    assert done.status == 1
    assert done.err.count("\n") == 1
    assert "the API database cannot be reached" in done.err
    assert "Connection refused" in done.err
    # What a request would get is what route is about.
    assert bool(done.out) == (name == "route")


@pytest.mark.parametrize("driver", ["mysql+pymysql", "postgresql+psycopg2"])
def test_a_database_that_says_nothing_is_waited_for_shortly(
    manage: Manage, monkeypatch: pytest.MonkeyPatch, driver: str
) -> None:
    monkeypatch.setattr(base, "_CONNECT_TIMEOUT", 1.0)
    began = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        manage.configure(f"{driver}://Zuser:Zpw@{address}/nova_api")
        done = manage("cell", "list")
    # A hundredth of what a statement may take.
    assert time.monotonic() - began < base._STATEMENT_TIMEOUT / 10
    assert done.status == 1
    assert done.err.count("\n") == 1
    assert "the API database cannot be reached" in done.err
    assert "Zpw" not in done.err


@pytest.mark.parametrize(
    "name",
    [name for name in COMMANDS if name != "db sync"],
)
def test_missing_tables_are_one_line(manage: Manage, name: str) -> None:
    path = manage.folder / "empty.sqlite"
    path.touch()
    manage.configure(f"sqlite:///{path}")
    done = manage(*name.split(), *COMMANDS[name])
    assert done.status == 1
    assert done.err.count("\n") == 1
    assert "no table cell_mappings" in done.err


def test_a_cell_database_is_refused(manage: Manage) -> None:
    path = manage.folder / "new.sqlite"
    manage.configure(f"sqlite:///{path}")
    assert (
        manage("db", "sync").out
        == "The tables were created (revision 0001).\n"
    )
    done = manage("db", "sync")
    assert done.out == "The tables are up to date (revision 0001).\n"


@pytest.mark.parametrize(
    "what", ["cellmw.cli.base.options.load", "cellmw.cells.store.Store.cells"]
)
def test_an_error_of_the_configuration_shows_no_value(
    manage: Manage, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def fail(*args: object) -> None:
        raise cfg.NoSuchOptError("Zs3kret")

    monkeypatch.setattr(what, fail)
    said = manage.refuses("cell", "list")
    assert "configuration cannot be used (NoSuchOptError); a $ in" in said


def test_an_error_of_the_configuration_is_not_logged_either(
    manage: Manage,
) -> None:
    manage.configure("mysql+pymysql://u:pa$Zpw@h/x")
    done = manage("-v", "cell", "list")
    assert done.status == 1
    assert "option connection in [api_database]" in done.err


def test_an_error_that_nobody_expects_is_one_line(
    manage: Manage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("about rabbit://Zuser:Zpw@h/\nand more")

    monkeypatch.setattr("cellmw.cells.store.Store.cells", fail)
    said = manage.refuses("cell", "list")
    assert "unexpected RuntimeError: about rabbit://***@h/" in said


def test_logs_are_shown_on_demand_and_scrubbed(filled: Manage) -> None:
    done = filled("-v", "cell", "list")
    assert done.status == 0
    assert "DEBUG" in done.err
