# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""cellmw-demo does what it says, fails when it must, and leaves nothing."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from cellmw import rpc
from cellmw.cells import tables
from cellmw.demo import brokers, check, database, main, rpcapi, web
from cellmw.demo.errors import DemoError
from tests import servers

DEMO = [sys.executable, "-m", "cellmw.demo.main"]
SECONDS = 120


def environment(tmp_path: Path) -> dict[str, str]:
    """Temporary files go where they can be counted."""
    return {
        **os.environ,
        "TMPDIR": str(tmp_path),
        "PYTHONWARNINGS": "ignore",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def run(tmp_path: Path, *command: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command,
        env=environment(tmp_path),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert list(tmp_path.iterdir()) == []
    return done


@contextlib.contextmanager
def serving(tmp_path: Path, *options: str) -> Iterator[tuple[Any, str]]:
    """A demo that serves, and what it has printed until then."""
    with subprocess.Popen(
        [*DEMO, *options],
        env=environment(tmp_path),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        # A signal to its group is Ctrl-C in a terminal.
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        try:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if line.startswith("Ctrl-C"):
                    break
            yield process, "".join(lines)
        finally:
            process.kill()


def ask(url: str, body: Any = None) -> tuple[int, Any]:
    request = urllib.request.Request(
        url,
        None if body is None else json.dumps(body).encode(),
        {"X-Auth-Token": "demo", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=20) as response:
        text = response.read()
        return response.status, json.loads(text) if text else None


def demo_vhosts(broker: servers.Broker) -> set[str]:
    names = {row["name"] for row in broker.table("list_vhosts", "name")}
    return {name for name in names if name.startswith("cellmw-demo-")}


def tables_of(url: str) -> list[str]:
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    return sa.inspect(engine).get_table_names()


def test_the_check_is_right_on_memory_and_sqlite(tmp_path: Path) -> None:
    done = run(tmp_path, *DEMO, "--check")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(
        r"^(show|reboot|console output|delete) +web-\d \w+ +(cell\d) +"
        r"compute-1 in (cell\d)$",
        done.stdout,
        re.MULTILINE,
    )
    assert len(rows) == 24
    assert all(cell == answered for _, cell, answered in rows)
    assert "240 right, 0 wrong" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("OK: 267 requests")


def test_the_check_holds_without_a_cache(tmp_path: Path) -> None:
    with (tmp_path.parent / "demo-options").open("w") as options:
        options.write("[cellmw]\ntransport_cache = false\n")
    done = run(tmp_path, *DEMO, "--check", "--config-file", options.name)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.servers
def test_the_check_is_right_on_rabbitmq_and_mariadb(
    tmp_path: Path, broker: servers.Broker, mariadb: servers.Database
) -> None:
    before = demo_vhosts(broker)
    rabbit = ("--rabbit", broker.url(""))
    done = run(tmp_path, *DEMO, "--check", *rabbit, "--database", mariadb.url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"RabbitMQ at {broker.host}:{broker.port}" in done.stdout
    assert "the API database is mysql at" in done.stdout
    assert tables_of(mariadb.url) == []
    assert demo_vhosts(broker) <= before


@pytest.mark.servers
def test_the_check_is_right_on_postgresql(
    tmp_path: Path, postgresql: servers.Database
) -> None:
    done = run(tmp_path, *DEMO, "--check", "--database", postgresql.url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the API database is postgresql at" in done.stdout
    assert tables_of(postgresql.url) == []


WRONG_CELL = """
import sys
from cellmw.cells import store
from cellmw.demo.main import main
right = store.Store.cell_of
def wrong(self, uuid):
    found = right(self, uuid)
    cells = {cell.id: cell.uuid for cell in self.cells()}
    return (2, cells[2]) if found and found[0] == 1 else found
store.Store.cell_of = wrong
sys.exit(main(["--check"]))
"""


def test_the_check_fails_when_messages_go_to_another_cell(
    tmp_path: Path,
) -> None:
    done = run(tmp_path, sys.executable, "-c", WRONG_CELL)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "its message is for cell1, and is in cell2" in done.stdout
    assert re.search(
        r"^FAILED: 88 of 267 requests went wrong; 88 messages arrived where "
        r"none belongs, 88 are missing\.$",
        done.stdout,
        re.MULTILINE,
    )


@pytest.fixture
def _signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def to_the_default_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        rpc._Router, "_choose", lambda self, ctxt: rpc._default.transport()
    )


def to_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_PATIENCE", 0.05)
    monkeypatch.setattr(
        rpcapi.ComputeAPI, "reboot_instance", lambda *args: None
    )


def to_the_right_cell_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rpcapi.ComputeAPI.reboot_instance

    def twice(*args: Any) -> None:
        right(*args)
        right(*args)

    monkeypatch.setattr(rpcapi.ComputeAPI, "reboot_instance", twice)


@pytest.mark.usefixtures("_signals")
@pytest.mark.parametrize(
    "mistake,told",
    [
        (
            to_the_default_queue,
            "its message is for cell1, and is in default",
        ),
        (to_nowhere, "its message arrived nowhere"),
        (
            to_the_right_cell_twice,
            "126 messages arrived where none belongs, 0 are missing",
        ),
    ],
)
def test_the_check_fails_when_messages_go(
    mistake: Callable[[pytest.MonkeyPatch], None],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mistake(monkeypatch)
    assert main.main(["--check"]) == 1
    printed = capsys.readouterr().out
    assert told in printed
    assert "\nFAILED: " in printed
    assert "\nOK" not in printed


def test_the_demo_serves_until_it_is_told_to_end(tmp_path: Path) -> None:
    with serving(tmp_path) as (process, printed):
        (servers_url,) = set(re.findall(r"http://\S+/servers\b", printed))
        status, listed = ask(servers_url)
        assert (status, len(listed["servers"])) == (200, 7)
        uuid = listed["servers"][1]["id"]
        status, _ = ask(f"{servers_url}/{uuid}/action", {"reboot": {}})
        assert status == 202
        process.stdout.readline()
        assert process.stdout.readline() == (
            f"  compute-1 in cell2: reboot_instance {uuid}\n"
        )
        (config,) = re.findall(r"--config-file (\S+)", printed)
        explained = subprocess.run(
            [
                *(sys.executable, "-m", "cellmw.cli.main"),
                *("--config-file", config),
                *("route", f"/v2.1/servers/{uuid}"),
            ],
            env=environment(tmp_path),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=True,
        )
        assert "cell2" in explained.stdout
        process.terminate()
        assert process.wait(SECONDS) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.servers
def test_ctrl_c_removes_vhosts_and_tables(
    tmp_path: Path,
    broker: servers.Broker,
    mariadb: servers.Database,
) -> None:
    before = demo_vhosts(broker)
    options = ["--rabbit", broker.url(""), "--database", mariadb.url]
    with serving(tmp_path, *options) as (process, printed):
        assert "http://" in printed
        assert len(demo_vhosts(broker) - before) == 4
        assert sorted(tables_of(mariadb.url)) == [
            "cell_mappings",
            "instance_mappings",
        ]
        os.killpg(process.pid, signal.SIGINT)
        # A second one, by an impatient person, changes nothing.
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(SECONDS) == 0
    assert demo_vhosts(broker) <= before
    assert tables_of(mariadb.url) == []
    assert list(tmp_path.iterdir()) == []


def test_tables_that_are_there_are_left_alone(
    tmp_path: Path, sqlite: servers.Database
) -> None:
    engine = sa.create_engine(sqlite.url, poolclass=sa.NullPool)
    tables.metadata.create_all(engine)
    done = run(tmp_path, *DEMO, "--check", "--database", sqlite.url)
    assert done.returncode == 2
    assert done.stderr == (
        "cellmw-demo: there is a table cell_mappings already in the "
        "database; give --database one of the demo's own, with no tables\n"
    )
    assert len(tables_of(sqlite.url)) == 2


@pytest.mark.usefixtures("_signals")
@pytest.mark.parametrize(
    "arguments,told",
    [
        (["--no-such-option"], "unrecognized arguments: --no-such-option"),
        (
            ["--port", "many"],
            "argument --port: it takes a number from 0 to 65535",
        ),
        (["--rabbit", "amqp://u:hidden-1@h/"], "--rabbit takes a URL like"),
        (
            ["--rabbit", "rabbit://u:hidden-1@127.0.0.1:1/"],
            "no broker answers at 127.0.0.1:1",
        ),
        (["--database", "hidden-1"], "--database takes a URL like"),
        (
            ["--database", "mysql+pymysql://u:hidden-1@127.0.0.1:1/d"],
            "the database: OperationalError",
        ),
        (
            ["--database", "oracle+oracledb://u:hidden-1@h/d"],
            "the driver of --database is not installed",
        ),
        (["--config-file", "/no/such/file"], "/no/such/file cannot be read"),
    ],
)
def test_what_is_wrong_is_told_on_one_line(
    arguments: list[str], told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        sys.exit(main.main(["--check", *arguments]))
    assert ended.value.code == 2
    told_on = capfd.readouterr().err
    assert told_on.count("\n") == 1
    assert told_on.startswith("cellmw-demo: ")
    assert told in told_on
    assert "hidden-1" not in told_on


def test_the_version_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(["--version"])
    assert ended.value.code == 0
    version = metadata.version("cellmw")
    assert capsys.readouterr().out == f"cellmw-demo {version}\n"


def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run(tmp_path, *DEMO, "--port", str(port))
    assert done.returncode == 2
    assert done.stderr == (
        f"cellmw-demo: port {port}: Address already in use\n"
    )


@pytest.mark.parametrize("port", ["65536", "99999", "-1", "x", "1" * 9])
def test_a_port_that_there_cannot_be_is_told(
    port: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main([f"--port={port}"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "cellmw-demo: argument --port: it takes a number from 0 to 65535\n"
    )


def test_a_bad_option_is_told(tmp_path: Path) -> None:
    file = tmp_path.parent / "bad-options"
    file.write_text("[cellmw]\nsend_timeout = soon\n")
    done = run(tmp_path, *DEMO, "--check", "--config-file", str(file))
    assert done.returncode == 2
    assert "option send_timeout in [cellmw] has a bad value" in done.stderr
    assert done.stderr.count("\n") == 1


# How virtual hosts are made


class Management:
    """As much of RabbitMQ's management API as is used."""

    def __init__(self, status: str) -> None:
        self.requests: list[tuple[str, str, str]] = []
        self._status = status

    def __call__(self, environ: Any, start_response: Any) -> list[bytes]:
        # Decoded once by the server; the names need no more than that.
        self.requests.append(
            (
                environ["REQUEST_METHOD"],
                environ["PATH_INFO"],
                environ["HTTP_AUTHORIZATION"],
            )
        )
        start_response(self._status, [("Content-Length", "0")])
        return []


@contextlib.contextmanager
def management(
    monkeypatch: pytest.MonkeyPatch, status: str
) -> Iterator[tuple[Management, str]]:
    api = Management(status)
    server = web.WebServer(api)
    monkeypatch.setattr(brokers, "_MANAGEMENT_PORT", server.port)
    try:
        # The broker's own port is only tried.
        yield api, f"rabbit://us%20er:pass@127.0.0.1:{server.port}/"
    finally:
        server.stop()


def test_vhosts_are_made_through_the_management_api(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with management(monkeypatch, "201 Created") as (api, url):
        rabbit = brokers.RabbitMQ(url, "no-such-command")
        urls = rabbit.create(["one", "two"])
        rabbit.remove()
        rabbit.remove()
    vhosts = {name: url.rpartition("/")[2] for name, url in urls.items()}
    login = "Basic dXMgZXI6cGFzcw=="
    assert sorted(api.requests) == sorted(
        (verb, path.format(vhost), login)
        for vhost in vhosts.values()
        for verb, path in (
            ("PUT", "/api/vhosts/{}"),
            ("PUT", "/api/permissions/{}/us er"),
            ("DELETE", "/api/vhosts/{}"),
        )
    )
    assert len(set(vhosts.values())) == 2
    assert urls["one"] == url + vhosts["one"]


def test_what_to_do_is_told_where_no_vhosts_can_be_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with management(monkeypatch, "401 Unauthorized") as (_api, url):
        rabbit = brokers.RabbitMQ(url, "no-such-command")
        with pytest.raises(DemoError) as caught:
            rabbit.create(["one"])
    assert "there is no command no-such-command" in str(caught.value)
    assert "the management API answered 401" in str(caught.value)
    assert "rabbitmq-plugins enable rabbitmq_management" in str(caught.value)


def test_rabbitmqctl_is_not_used_for_a_broker_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with management(monkeypatch, "201 Created") as (api, url):
        monkeypatch.setattr(brokers, "_is_here", lambda host: False)
        rabbit = brokers.RabbitMQ(url)
        rabbit.create(["one"])
        rabbit.remove()
    assert len(api.requests) == 3


def test_tables_of_others_are_not_removed(
    tmp_path: Path, sqlite: servers.Database
) -> None:
    engine = sa.create_engine(sqlite.url, poolclass=sa.NullPool)
    tables.metadata.create_all(engine)
    taken = database.Database(sqlite.url, tmp_path)
    with pytest.raises(DemoError, match="already in the database"):
        taken.create([], [])
    taken.remove()
    assert len(tables_of(sqlite.url)) == 2
