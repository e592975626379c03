# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""``cellmw-manage doctor``: each fault that it finds, made for real."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import re
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import sqlalchemy as sa

from cellmw import rpc
from cellmw.cells.tables import cell_mappings
from cellmw.cli import base
from cellmw.cli.doctor import sizes
from cellmw.transports.driver import fit
from tests import fake_nova, servers
from tests.functional import stack
from tests.functional.database import schema
from tests.functional.manage.manage import Manage

PASTE = """
[pipeline:main]
pipeline = {pipeline}

[filter:cellmw]
use = egg:cellmw
{section}

[filter:authtoken]
paste.filter_factory = keystonemiddleware.auth_token:filter_factory

[filter:keystonecontext]
paste.filter_factory = nova.api.auth:NovaKeystoneContext.factory

[filter:ownctx]
paste.filter_factory = myapi.middleware:RequestContextMiddleware.factory

[app:api]
paste.app_factory = myapi.none:app_factory
"""
GOOD = "authtoken cellmw api"


@dataclasses.dataclass(frozen=True)
class Report:
    """The rows of one run."""

    rows: list[dict[str, str]]

    def of(self, check: str) -> list[tuple[str, str]]:
        """Status and text of the rows of a check, by its beginning."""
        return [
            (row["status"], f"{row['finding']} -> {row['advice']}")
            for row in self.rows
            if row["check"].startswith(check)
        ]

    def one(self, check: str) -> tuple[str, str]:
        """The only row of a check."""
        (row,) = self.of(check)
        return row

    @property
    def bad(self) -> list[dict[str, str]]:
        """The rows that are not OK."""
        return [row for row in self.rows if row["status"] != "OK"]


class Doctor:
    """Runs the command on a paste file that a test writes."""

    def __init__(self, manage: Manage, folder: Path) -> None:
        self.manage = manage
        self.file = folder / "api-paste.ini"

    def write(
        self,
        pipeline: str = GOOD,
        section: str = "",
        *,
        before: str = "",
        after: str = "",
    ) -> None:
        text = PASTE.format(pipeline=pipeline, section=section)
        self.file.write_text(f"{before}\n{text}\n{after}\n", "utf-8")

    def __call__(self, *arguments: str, alone: bool = False) -> Report:
        """Run it.

        :param alone: without ``--config-file``
        """
        run = self.manage.run if alone else self.manage
        done = run(
            *("doctor", "--paste-file", str(self.file), "-f", "json"),
            *arguments,
        )
        assert done.err == ""
        report = Report(done.json)
        statuses = {row["status"] for row in report.rows}
        assert statuses <= {"OK", "WARN", "FAIL"}
        assert done.status == (1 if "FAIL" in statuses else 0)
        # Whatever is not good comes with what to do.
        assert all(row["advice"] for row in report.bad)
        return report

    def on(self, *args: str, **kwargs: str) -> Report:
        """Write a paste file, and run it."""
        self.write(*args, **kwargs)
        return self()

    def add_cell(self, url: str | None, name: str = "one", **row: Any) -> None:
        with self.manage.engine.begin() as connection:
            connection.execute(
                sa.insert(cell_mappings).values(
                    uuid=f"3a0a4dd6-7cb9-4a9c-9a0b-7b1d2b6a{len(name):04}",
                    name=name,
                    transport_url=url,
                    **row,
                )
            )


@pytest.fixture
def doctor(manage: Manage, tmp_path: Path) -> Doctor:
    """One cell, on a broker in memory, and a paste file without a fault."""
    made = Doctor(manage, tmp_path)
    made.add_cell("cellmw-memory://h/v")
    made.write()
    return made


@pytest.mark.servers
def test_all_is_well(doctor: Doctor, vhost: servers.Vhost) -> None:
    doctor.add_cell(vhost.url, "rabbit")
    report = doctor()
    assert report.bad == []
    for check in ("pipeline main", "configuration", "filter cellmw"):
        assert report.one(check)[0] == "OK"
    assert report.one("cell rabbit")[1].startswith("its broker can be reached")
    done = doctor.manage("doctor", "--paste-file", str(doctor.file))
    assert done.status == 0
    lines = done.out.splitlines()
    assert all(line.startswith(("OK    ", "      ")) for line in lines)
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("how", ["line", "table", "json", "yaml", "csv"])
def test_it_prints_in_each_format(doctor: Doctor, how: str) -> None:
    done = doctor.manage("doctor", "-f", how, "-c", "status", "-c", "check")
    assert (done.status, done.err) == (0, "")
    assert "API database" in done.out
    assert "WARN" in done.out


@pytest.mark.parametrize(
    "pipeline, status, said",
    [
        ("cellmw authtoken api", "FAIL", "put the filter behind authtoken"),
        ("cellmw api", "WARN", "put authtoken before the filter"),
        ("authtoken cellmw cellmw api", "FAIL", "stands in it 2 times"),
        ("authtoken cellmw", "FAIL", "put the application behind it"),
        ("authtoken cellmw ratelimit api", "FAIL", "[filter:ratelimit]"),
        ("authtoken cellmw app", "FAIL", "names app, and the file has no"),
        (
            "authtoken cellmw keystonecontext api",
            "FAIL",
            "put the filter behind keystonecontext",
        ),
        ("authtoken cellmw ownctx api", "FAIL", "behind ownctx"),
    ],
)
def test_a_place_that_is_wrong(
    doctor: Doctor, pipeline: str, status: str, said: str
) -> None:
    found, text = doctor.on(pipeline).one("pipeline main")
    assert found == status
    assert said in text


def test_a_filter_in_no_pipeline(doctor: Doctor) -> None:
    status, text = doctor.on("authtoken api").one("pipelines")
    assert status == "FAIL"
    assert "put cellmw behind authtoken" in text


def test_a_second_pipeline_without_the_filter(doctor: Doctor) -> None:
    report = doctor.on(after="[pipeline:v3]\npipeline = authtoken api")
    assert report.one("pipeline main")[0] == "OK"
    status, text = report.one("pipeline v3")
    assert status == "WARN"
    assert "add cellmw behind authtoken" in text
    report = doctor.on(after="[pipeline:versions]\npipeline = api")
    assert report.of("pipeline versions") == []


NOVA = """
[composite:compute]
use = call:nova.api.auth:pipeline_factory_v21
keystone = {pipeline}

[composite:osapi]
use = call:nova.api.openstack.urlmap:urlmap_factory
/v2.1 = compute

[app:osapi_compute_app_v21]
paste.app_factory = nova.api.openstack.compute:APIRouterV21.factory
"""


def test_lists_in_a_composite_are_pipelines(doctor: Doctor) -> None:
    good = "authtoken keystonecontext cellmw osapi_compute_app_v21"
    section = "context_key = nova.context\nmode = observe"
    report = doctor.on(section=section, after=NOVA.format(pipeline=good))
    status, text = report.one("pipeline compute, keystone")
    assert status == "OK"
    assert "after authtoken and keystonecontext and before osapi" in text
    bad = "cellmw authtoken keystonecontext osapi_compute_app_v21"
    report = doctor.on(section=section, after=NOVA.format(pipeline=bad))
    found = report.of("pipeline compute, keystone")
    assert [status for status, _ in found] == ["FAIL", "FAIL"]


def test_novas_handlers_send_past_the_filter(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = "authtoken keystonecontext cellmw osapi_compute_app_v21"
    after = NOVA.format(pipeline=pipeline)
    report = doctor.on(section="context_key = nova.context", after=after)
    status, text = report.one("nova_cell_cache")
    assert status == "WARN"
    assert "set nova_cell_cache = true" in text
    both = "context_key = nova.context\nnova_cell_cache = true"
    status, text = doctor.on(section=both, after=after).one("filter cellmw")
    assert status == "FAIL"
    assert "needs a Nova that this package knows" in text
    fake_nova.Nova(monkeypatch)
    report = doctor.on(section=both, after=after)
    assert report.one("filter cellmw")[0] == "OK"
    assert report.of("nova_cell_cache") == []


@pytest.mark.parametrize(
    "after, pipeline",
    [
        ("", "authtoken egg:cellmw api"),
        ("", "authtoken egg:cellmw#cellmw api"),
        ("[filter:f]\nuse = cellmw", "authtoken f api"),
        (
            "[filter:f]\npaste.filter_factory = cellmw:filter_factory",
            "authtoken f api",
        ),
        ("[filter:f]\nuse = call:cellmw:filter_factory", "authtoken f api"),
        # At the end Paste takes an application of that name.
        ("[filter:api]\nuse = cellmw", "authtoken cellmw api"),
        (
            "[filter:a]\nuse = egg:keystonemiddleware#auth_token",
            "a cellmw api",
        ),
        ("[app:a]\nuse = api\nfilter-with = cellmw", "authtoken a"),
        (
            "[filter-app:a]\nuse = cellmw\nnext = api\nsend_timeout = 3",
            "authtoken a",
        ),
        (
            "[filter-app:a]\npaste.filter_factory = cellmw:filter_factory\n"
            "next = api",
            "authtoken a",
        ),
        ("[pipeline:inner]\npipeline = cellmw api", "authtoken inner"),
    ],
)
def test_each_way_in_which_paste_can_name_the_filter(
    doctor: Doctor, after: str, pipeline: str
) -> None:
    report = doctor.on(pipeline, after=after)
    assert report.bad == []
    assert report.one("pipeline ")[0] == "OK"
    report = doctor.on(f"egg:cellmw {pipeline}", after=after)
    said = [text for _, text in report.of("pipeline main")]
    assert "stands in it 2 times" in " ".join(said)


@pytest.mark.parametrize(
    "after, check",
    [
        ("[app:a]\nuse = api\nfilter-with = cellmw", "pipeline app:a"),
        ("[filter-app:a]\nuse = cellmw\nnext = api", "pipeline filter-app:a"),
    ],
)
def test_a_filter_around_one_application(
    doctor: Doctor, after: str, check: str
) -> None:
    status, text = doctor.on("authtoken api", after=after).one(check)
    assert status == "WARN"
    assert "put authtoken before the filter" in text


@pytest.mark.parametrize(
    "pipeline, key, status, said",
    [
        ("authtoken cellmw api", "", "OK", "the filter itself"),
        (
            "authtoken keystonecontext cellmw api",
            "",
            "FAIL",
            "set context_key = nova.context",
        ),
        (
            "authtoken keystonecontext cellmw api",
            "nova.context",
            "OK",
            "where keystonecontext keeps its context",
        ),
        ("authtoken ownctx cellmw api", "", "WARN", "set context_key to"),
        ("authtoken ownctx cellmw api", "my.context", "OK", "ownctx makes"),
        ("authtoken cellmw api", "my.context", "WARN", "put the filter behi"),
    ],
)
def test_the_key_of_the_context(
    doctor: Doctor, pipeline: str, key: str, status: str, said: str
) -> None:
    section = f"context_key = {key}" if key else ""
    found, text = doctor.on(pipeline, section).one("context_key")
    assert found == status
    assert said in text


def test_unknown_options_of_a_file_are_told_with_the_nearest(
    doctor: Doctor, sqlite: servers.Database
) -> None:
    doctor.manage.configure(sqlite.url, "send_timout = 3", "mode = route")
    status, text = doctor().one("options in [cellmw]")
    assert status == "WARN"
    assert "send_timout in " in text
    assert "write send_timeout" in text


@pytest.mark.parametrize(
    "section, said",
    [
        ("send_timout = 3", "the nearest known one is send_timeout"),
        ("send_timeout = soon", "option send_timeout has a bad value"),
        ("oslo_config_config = x", "takes a ConfigOpts from Python"),
    ],
)
def test_what_stops_the_filters_load(
    doctor: Doctor, section: str, said: str
) -> None:
    report = doctor.on(section=section)
    status, text = report.one("filter cellmw")
    assert status == "FAIL"
    assert said in text
    # The rest is looked at all the same.
    assert report.one("cell one")[0] == "OK"


@pytest.mark.parametrize(
    "before, section, said",
    [
        ("[DEFAULT]\nsend_timeout = 3", "", "take send_timeout out of"),
        ("", "api_database_connection = a%b", "%%"),
        ("", "get send_timeout = nothing", "which is set nowhere"),
    ],
)
def test_what_paste_does_to_values(
    doctor: Doctor, before: str, section: str, said: str
) -> None:
    report = doctor.on(section=section, before=before)
    assert said in " ".join(
        f"{row['finding']} {row['advice']}" for row in report.bad
    )


@pytest.mark.parametrize(
    "text, said",
    [
        (None, "cannot be read (FileNotFoundError)"),
        (b"\xff\xfe[", "is not text"),
        (b"[pipeline:main\n", "at line 1"),
        (b"[pipeline:main]\npipeline = Zpw%s\n", "written %%"),
    ],
)
def test_a_paste_file_that_cannot_be_used(
    doctor: Doctor, text: bytes | None, said: str
) -> None:
    doctor.file.unlink()
    if text is not None:
        doctor.file.write_bytes(text)
    status, found = doctor().one("paste file")
    assert status == "FAIL"
    assert said in found


def test_without_a_paste_file(doctor: Doctor) -> None:
    done = doctor.manage("doctor", "-f", "json")
    assert done.status == 0
    report = Report(done.json)
    assert report.one("paste file")[0] == "WARN"
    assert report.one("cell one")[0] == "OK"


def test_the_configuration_that_the_section_names(
    doctor: Doctor, tmp_path: Path, sqlite: servers.Database
) -> None:
    config = f"oslo_config_file = {doctor.manage.file}"
    doctor.write(section=config)
    assert doctor(alone=True).bad == []
    # Given as well, it is the same one.
    assert doctor().bad == []
    other = tmp_path / "other.conf"
    other.write_text("", "utf-8")
    doctor.write(section=f"oslo_config_file = {other}")
    status, text = doctor().of("configuration")[1]
    assert status == "WARN"
    assert f"but {other}" in text
    doctor.write(section=f"oslo_config_file = {tmp_path}/none.conf")
    status, text = doctor(alone=True).one("configuration")
    assert status == "FAIL"
    assert "no such file" in text
    doctor.write()
    found = doctor(alone=True)
    assert found.one("configuration")[0] == "FAIL"
    assert "no API database is configured" in found.one("filter cellmw")[1]


def test_the_database_of_the_section_is_the_one_that_is_checked(
    doctor: Doctor, sqlite: servers.Database
) -> None:
    doctor.manage.configure("sqlite:////none/there")
    report = doctor.on(section=f"api_database_connection = {sqlite.url}")
    assert report.bad == []
    assert report.one("cell one")[0] == "OK"


@pytest.fixture(
    params=[
        pytest.param("mariadb", marks=pytest.mark.servers),
        pytest.param("postgresql", marks=pytest.mark.servers),
    ]
)
def served(request: pytest.FixtureRequest) -> Iterator[servers.Database]:
    """A database on a server, with the tables."""
    with servers.DATABASES[request.param]() as database:
        schema.create_tables(database)
        yield database


@pytest.fixture
def reader(
    served: servers.Database,
) -> Iterator[Callable[..., str]]:
    """Makes a user who may read some tables; gives the user's URL."""
    name = servers.unique("Zuser").lower()
    is_mysql = served.kind == "mysql"
    admin = sa.create_engine(served.url, poolclass=sa.NullPool)

    def run(*statements: str) -> None:
        with admin.begin() as connection:
            for statement in statements:
                connection.execute(sa.text(statement))

    def make(*tables: str) -> str:
        run(*(f"GRANT SELECT ON {table} TO {name}" for table in tables))
        return served.url_as(name, "Zpw")

    how = "IDENTIFIED BY" if is_mysql else "PASSWORD"
    run(f"CREATE USER {name} {how} 'Zpw'")
    if is_mysql:
        # Without any right the database itself does not let the user in.
        run("CREATE TABLE open (a INT)", f"GRANT SELECT ON open TO {name}")
    try:
        yield make
    finally:
        if not is_mysql:
            run(f"DROP OWNED BY {name}")
        run(f"DROP USER {name}")


TABLES = ("cell_mappings", "instance_mappings")


@pytest.mark.parametrize("missing", [(), *[(t,) for t in TABLES], TABLES])
def test_the_rights_on_the_mapping_tables(
    doctor: Doctor,
    served: servers.Database,
    reader: Callable[..., str],
    missing: tuple[str, ...],
) -> None:
    url = reader(*(table for table in TABLES if table not in missing))
    doctor.manage.configure(url)
    found = doctor().of("API database")
    assert found[0][0] == "OK"
    for table, (status, text) in zip(TABLES, found[1:], strict=True):
        # To ask for an instance reads the cells' UUIDs too.
        bad = table in missing or (missing and table == "instance_mappings")
        assert status == ("FAIL" if bad else "OK"), text
        assert not bad or "GRANT SELECT ON " in text


def test_a_database_that_lets_nobody_in(
    doctor: Doctor, served: servers.Database
) -> None:
    for url in (
        served.url_as("Znobody", "Zpw"),
        served.url_via(f"127.0.0.1:{servers.free_port()}"),
    ):
        doctor.manage.configure(url)
        status, text = doctor().one("API database")
        assert status == "FAIL"
        assert "correct connection in [api_database]" in text


def test_a_database_that_says_nothing_is_waited_for_once(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Private: how long a command waits for the database to let it in.
    monkeypatch.setattr(base, "_CONNECT_TIMEOUT", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        doctor.manage.configure(
            f"mysql+pymysql://Zuser:Zpw@127.0.0.1:{port}/x"
        )
        assert doctor().one("API database")[0] == "FAIL"
        silent.setblocking(False)
        silent.accept()[0].close()
        with pytest.raises(BlockingIOError):
            silent.accept()


def test_a_database_without_the_tables(
    doctor: Doctor, database: servers.Database
) -> None:
    if database.kind == "sqlite":
        sa.create_engine(database.url).connect().close()
        Path(database.name).touch()
    doctor.manage.configure(database.url)
    opened, *found = doctor().of("API database")
    assert opened[0] == "OK"
    for table, (status, text) in zip(TABLES, found, strict=True):
        assert status == "FAIL"
        assert f"no table {table}" in text
        assert "cellmw-manage db sync" in text


def test_no_cells(doctor: Doctor) -> None:
    with doctor.manage.engine.begin() as connection:
        connection.execute(sa.delete(cell_mappings))
    status, text = doctor().one("cells")
    assert status == "WARN"
    assert "cellmw-manage cell create" in text


@pytest.mark.parametrize(
    "url, status, said",
    [
        ("none:///", "OK", "no queue"),
        (None, "FAIL", "it is empty"),
        ("rabbit://Zuser:{Zpw}@h/", "FAIL", "braces"),
        ("rabbit://Zuser:Zpw@h/?heartbeat_rat=1", "FAIL", "heartbeat_rate"),
        ("rabbit://Zuser:Zpw@h/?ssl=1&ssl_ca_file=/no", "FAIL", "not exist"),
        ("nosuch://Zuser:Zpw@h/", "FAIL", "driver"),
        ("fake://h/v", "WARN", "send a message to an instance"),
    ],
)
def test_what_a_cells_url_can_be(
    doctor: Doctor, url: str | None, status: str, said: str
) -> None:
    doctor.add_cell(url, "other", disabled=True)
    found, text = doctor().one("cell other")
    assert found == status
    assert said in text
    assert "still receives messages" in text
    if status == "FAIL":
        assert "its mapping cannot be used" in text
        assert "cell update 3a0a4dd6-" in text


def test_a_broker_that_is_not_there(doctor: Doctor) -> None:
    url = f"rabbit://Zuser:Zpw@127.0.0.1:{servers.free_port()}/"
    doctor.add_cell(url, "other")
    status, text = doctor().one("cell other")
    assert status == "FAIL"
    assert "start the broker" in text


@pytest.mark.servers
def test_what_a_broker_refuses(doctor: Doctor, vhost: servers.Vhost) -> None:
    parts = sa.make_url(vhost.url).set(username="Zuser", password="Zpw")
    doctor.add_cell(parts.render_as_string(hide_password=False), "login")
    doctor.add_cell(f"{vhost.url}-none", "vhost!")
    report = doctor()
    assert "correct user and password" in report.one("cell login")[1]
    assert "the virtual host is there" in report.one("cell vhost!")[1]
    assert {row["status"] for row in report.bad} == {"FAIL"}


def test_two_cells_with_one_broker(doctor: Doctor) -> None:
    doctor.add_cell("cellmw-memory://Zuser:Zpw@h/v", "other")
    status, text = doctor().of("cell other")[1]
    assert status == "WARN"
    assert "of cell one (" in text
    assert "a virtual host of its own" in text


def test_libraries_that_were_not_tried(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No other versions can be had here: those that were tried are made others.
    monkeypatch.setitem(fit._TRIED, "kombu", ((1, 0), (2, 0)))
    status, text = doctor().one("library kombu")
    assert status == "WARN"
    assert "was not tried (tried: 1.0 to 2.0)" in text


def test_libraries_that_do_not_fit(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if a method of the library had another name.
    facts = ((fit, "no_such_function", "name"),)
    monkeypatch.setattr(fit, "_FACTS", facts)
    status, text = doctor().one("libraries")
    assert status == "WARN"
    assert "no_such_function" in text
    assert "install versions that were tried" in text


SIZE = "connections and threads"


def test_the_connections_of_so_many_processes(doctor: Doctor) -> None:
    doctor.add_cell("cellmw-memory://h/w", "other")
    doctor.add_cell("none:///", "nowhere")
    status, text = doctor("--processes", "10", "--threads", "8").one(SIZE)
    assert status == "OK"
    assert "cells with a queue: 2" in text
    assert "up to 90 connections (9 from each process)" in text
    assert "all brokers together 180, the API database 80" in text
    assert "26 of these connections and 34 threads" in text


def connections_to(vhost: servers.Vhost) -> int:
    """How many this process has; those of the host are its own."""
    ports = [
        one.raddr.port
        for one in psutil.Process().net_connections("tcp")
        if one.raddr and one.status == psutil.CONN_ESTABLISHED
    ]
    return ports.count(vhost.broker.port)


@pytest.mark.servers
def test_a_process_opens_no_more_connections_than_was_said(
    manage: Manage,
    vhost: servers.Vhost,
    api_database: stack.ApiDatabase,
    make_filter: stack.MakeFilter,
) -> None:
    threads = 4
    instance = api_database.add_instance(api_database.add_cell(vhost.url))
    done = manage("doctor", "--threads", str(threads), "-f", "json")
    _, text = Report(done.json).one(SIZE)
    (said,) = re.findall(r"\((\d+) from each process\)", text)
    (said_threads,) = re.findall(r"connections and (\d+) threads", text)
    client = rpc.get_client(stack.target()).prepare(server="host")

    def handle(context: Any) -> Any:
        return client.call(
            context, "get_console_output", instance_uuid=instance
        )

    application = make_filter()(stack.Api(handle))
    with stack.host_process(vhost.url, "host"):
        before = connections_to(vhost)
        threads_before = threading.active_count()
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            answers = pool.map(
                lambda _: stack.request(application, f"/servers/{instance}"),
                range(40 * threads),
            )
            assert {answer.status_int for answer in answers} == {200}
            started = threading.active_count() - threads_before
        opened = connections_to(vhost) - before
    assert 2 <= opened <= int(said) == threads + 1
    assert threads < started <= int(said_threads)


def test_options_that_bound_the_connections(
    doctor: Doctor, sqlite: servers.Database
) -> None:
    doctor.manage.configure(
        sqlite.url,
        *("max_sends_per_cell = 5", "lookup_concurrency = 3"),
        *("[oslo_messaging_rabbit]", "rpc_conn_pool_size = 4"),
    )
    _, text = doctor("--threads", "9").one(SIZE)
    assert "(5 from each process)" in text
    assert "the API database 3." in text


@pytest.mark.parametrize(
    "cells, options, each, brokers, threads",
    [
        (50, (), 17, 850, 874),
        (500, ("transport_cache_size = 512",), 17, 8500, 8524),
        (5000, ("transport_cache_size = 512",), 17, 8704, 8728),
        (
            500,
            ("transport_cache_size = 512", "max_sends_per_cell = 4"),
            *(5, 2500, 2524),
        ),
    ],
)
def test_the_figures_of_the_page_on_sizes(
    doctor: Doctor,
    sqlite: servers.Database,
    cells: int,
    options: tuple[str, ...],
    each: int,
    brokers: int,
    threads: int,
) -> None:
    doctor.manage.configure(sqlite.url, *options)
    conf = base.read([f"--config-file={doctor.manage.file}"])
    with contextlib.closing(base.Configuration(conf)) as configuration:
        found = sizes.of_process(configuration, cells, 16)
    assert found.for_cell == each
    assert found.to_brokers == brokers
    assert found.threads == threads
    assert found.database == 8


def test_more_cells_than_transports(
    doctor: Doctor, sqlite: servers.Database
) -> None:
    doctor.add_cell("cellmw-memory://h/w", "other")
    doctor.manage.configure(sqlite.url, "transport_cache_size = 1")
    status, text = doctor().of(SIZE)[1]
    assert status == "WARN"
    assert "set transport_cache_size to 2 or more" in text


@pytest.fixture
def few_files() -> Iterator[None]:
    """This process may open 50 files more than it has."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = len(list(Path("/proc/self/fd").iterdir())) + 50
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, before)
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, before[1]))
        yield


def test_more_connections_than_open_files(
    doctor: Doctor, sqlite: servers.Database, few_files: None
) -> None:
    doctor.manage.configure(
        sqlite.url,
        "max_sends_per_cell = 9999",
        *("[oslo_messaging_rabbit]", "rpc_conn_pool_size = 9999"),
    )
    status, text = doctor("--threads", "9999").of(SIZE)[1]
    assert status == "WARN"
    assert "LimitNOFILE" in text


def test_more_connections_than_the_database_takes(
    doctor: Doctor, served: servers.Database
) -> None:
    doctor.manage.configure(served.url)
    assert [status for status, _ in doctor().of(SIZE)] == ["OK"]
    status, text = doctor("--processes", "90000").of(SIZE)[1]
    assert status == "WARN"
    assert "raise max_connections there" in text


def test_nothing_secret_is_shown(
    doctor: Doctor, sqlite: servers.Database
) -> None:
    """Manage looks for the canaries in whatever is printed."""
    doctor.add_cell("rabbit://Zuser:Zpw@127.0.0.1:1/Zpw%zz?ssl=Zpw", "other")
    for section in (
        "api_database_connection = mysql+pymysql://Zuser:Zpw@127.0.0.1:1/x",
        "api_database_connection = Zuser:Zpw",
        "mysql+pymysql://Zuser:Zpw@127.0.0.1/x = 1",
        "context_key =\nmysql://Zuser:Zpw@h/ = Zs3kret",
        "oslo_config_file = mysql://Zuser:Zpw@h/",
    ):
        doctor.write(section=section)
        assert doctor().bad
        doctor(alone=True)
