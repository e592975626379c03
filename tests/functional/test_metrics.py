# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The metrics page beside the filter, in one process and in several."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from paste import deploy

from cellmw import testing
from cellmw.metrics import page as pages
from tests import servers
from tests.faults.service import Service, our_client
from tests.functional import stack

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "tests.functional.preforking"


def series(text: str) -> dict[str, float]:
    return {
        name: float(value)
        for name, _, value in (
            line.rpartition(" ")
            for line in text.splitlines()
            if line and not line.startswith("#")
        )
    }


# One process


@pytest.fixture
def api(
    sqlite: servers.Database, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Service]:
    monkeypatch.setattr(pages, "_here", pages._Here())
    with testing.own_brokers():
        made = Service(sqlite, breaker_failures=2)
        yield made
        made.close()


def page_of(tmp_path: Path) -> Any:
    config = tmp_path / "api-paste.ini"
    config.write_text("[app:main]\nuse = egg:cellmw#metrics\nmax_cells = 50\n")
    return deploy.loadapp(f"config:{config}")


def test_what_requests_do_is_on_the_page(api: Service, tmp_path: Path) -> None:
    page = page_of(tmp_path)
    good = api.add_cell("cellmw-memory://host/one", name="good")
    dead = api.add_cell(
        f"rabbit://user:s3cr3t-p4ssw0rd@127.0.0.1:{servers.free_port()}/",
        name="dead",
    )

    def cast(context: Any) -> None:
        our_client(context).cast(context, "reboot_instance", number=0)

    def cast_twice(context: Any) -> None:
        cast(context)
        cast(context)

    for _ in range(3):
        assert api.request(good, cast_twice).status_int == 200
    for _ in range(4):
        assert api.request(dead, cast).status_int == 503
    response = stack.request(page, "/")
    assert "s3cr3t-p4ssw0rd" not in response.text
    found = series(response.text)
    assert found['cellmw_sends_total{cell="good"}'] == 6
    # One for each request.
    assert found['cellmw_leases_total{cell="good"}'] == 3
    assert found['cellmw_transport_opens_total{cell="good"}'] == 1
    took = 'cellmw_send_duration_seconds_count{cell="good",kind="cast"}'
    assert found[took] == 6
    assert found['cellmw_send_failures_total{cell="dead"}'] == 2
    down = 'cellmw_send_rejections_total{cell="dead",reason="down"}'
    assert found[down] == 2
    assert found['cellmw_cell_down{cell="dead"}'] == 1
    assert found['cellmw_lookups_total{source="database"}'] == 7
    # Each POST asks, and the cells were read.
    queries = "cellmw_database_question_duration_seconds_count"
    assert found[queries] >= 8


# Several processes


class Server:
    """The program in preforking.py, from outside."""

    def __init__(self, folder: Path, database: str, path: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", PROGRAM, database, path],
            cwd=ROOT,
            env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def tell(self, worker: int, command: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{worker} {command}\n")
        self._process.stdin.flush()
        lines: list[str] = []
        for line in self._process.stdout:
            if line == ".\n":
                return "".join(lines)
            lines.append(line)
        raise AssertionError("the server has ended")

    def send(self, worker: int, count: int) -> None:
        self.tell(worker, f"send {count}")

    def page(self, worker: int) -> dict[str, float]:
        text = self.tell(worker, "page")
        assert text.startswith("# All processes that share")
        return series(text)

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        assert self._process.wait(30) == 0
        self._process.stdout.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "prometheus"
    made.mkdir()
    return made


@pytest.fixture
def server(folder: Path, sqlite: servers.Database) -> Iterator[Server]:
    database = stack.ApiDatabase(sqlite.url)
    cell = database.add_cell("cellmw-memory://host/one", name="one")
    instance = database.add_instance(cell)
    database.close()
    made = Server(folder, sqlite.url, f"/servers/{instance}/action")
    yield made
    made.close()


SENDS = 'cellmw_sends_total{cell="one"}'
THREADS = "cellmw_worker_threads"
OPEN = 'cellmw_transports_open{cell="one"}'


def test_the_page_of_one_process_covers_all(
    server: Server, folder: Path
) -> None:
    server.send(0, 3)
    server.send(1, 4)
    # Its own at once, those of the other within a few seconds.
    assert server.page(0)[SENDS] >= 3
    stack.eventually(lambda: server.page(0)[SENDS] == 7, within=20)
    assert server.page(1)[SENDS] == 7
    took = 'cellmw_send_duration_seconds_count{cell="one",kind="cast"}'
    assert server.page(1)[took] == 7
    assert server.page(1)[OPEN] == 2

    # One that ends leaves what happened, and nothing of the present.
    server.send(1, 5)
    server.tell(1, "end")
    found = server.page(0)
    assert found[SENDS] == 12
    assert found[OPEN] == 1

    # So does one that is killed: as if one had been.
    (live,) = folder.glob("gauge_livesum_*.db")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    left = folder / f"gauge_livesum_{dead.pid}.db"
    left.write_bytes(live.read_bytes())
    assert server.page(0)[OPEN] == 1
    assert not left.exists()
    assert live.exists()


def test_the_server_itself_counts_nothing_before_it_forks(
    server: Server, folder: Path
) -> None:
    server.page(0)
    pids = {path.stem.rpartition("_")[2] for path in folder.iterdir()}
    assert len(pids) == 1


def test_a_directory_that_is_not_there_stops_the_load(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from cellmw import metrics; metrics.app_factory({})",
        ],
        cwd=ROOT,
        env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "no")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    last = done.stderr.splitlines()[-1]
    assert "ConfigurationError: cellmw: PROMETHEUS_MULTIPROC_DIR" in last
