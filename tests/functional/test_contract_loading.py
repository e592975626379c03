# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What loading the filter does, and what stops it: section 1 of the contract.

Most of it goes through a paste file, as an operator's does.
"""

from __future__ import annotations

import configparser
import json
import re
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from oslo_concurrency import lockutils
from oslo_config import cfg
from paste import deploy

import cellmw
from cellmw import options, rpc, runtime, testing
from cellmw.cells import engines
from cellmw.exceptions import ConfigurationError
from tests import servers
from tests.functional import stack
from tests.functional.stack import ApiDatabase, MakeFilter

SECRET = "s3cr3t-Passw0rd"
PIPELINE = """
[pipeline:main]
pipeline = cellmw api
[app:api]
paste.app_factory = tests.functional.stack:app_factory
"""
Load = Callable[..., Any]


@pytest.fixture
def load(
    tmp_path: Path,
    runtimes: runtime.Registry,
    monkeypatch: pytest.MonkeyPatch,
) -> Load:
    """Loads a paste file with these sections, at home in ``tmp_path``."""
    monkeypatch.setenv("HOME", str(tmp_path))

    def load_file(
        section: str, default: str = "", more: str = "", name: str = "main"
    ) -> Any:
        paste_file = tmp_path / "api-paste.ini"
        paste_file.write_text(
            f"[DEFAULT]\n{textwrap.dedent(default)}\n"
            f"{PIPELINE}{textwrap.dedent(more)}\n"
            f"[filter:cellmw]\nuse = egg:cellmw\n{textwrap.dedent(section)}\n"
        )
        return deploy.loadapp(f"config:{paste_file}", name=name)

    return load_file


@pytest.fixture
def problem(load: Load) -> Callable[..., str]:
    """The message of the one error that stops a load."""

    def message(*args: Any, **kwargs: Any) -> str:
        with pytest.raises(ConfigurationError) as caught:
            load(*args, **kwargs)
        return checked(caught.value)

    return message


def checked(error: ConfigurationError) -> str:
    """What an operator reads of it; there is no secret anywhere in it."""
    text = str(error)
    assert "\n" not in text
    assert error.__cause__ is None
    for shown in (
        text,
        repr(error),
        repr(vars(error)),
        "".join(traceback.format_exception(error)),
    ):
        assert SECRET not in shown
    return text


class Known:
    """An API database with one cell and one instance in it."""

    def __init__(self, database: ApiDatabase) -> None:
        self.url = database.url
        self.cell = database.add_cell("cellmw-memory://one/")
        self.instance = database.add_instance(self.cell)

    def is_asked_by(self, application: Any) -> bool:
        """Whether a filter uses this database."""
        key = "cellmw.context"
        environ = stack.environ_of(f"/servers/{self.instance}")
        application(environ, lambda status, headers: None)
        return bool(environ[key].cell_uuid == self.cell)


@pytest.fixture
def known(api_database: ApiDatabase) -> Known:
    return Known(api_database)


def write(path: Path, *sections: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{textwrap.dedent(s)}\n" for s in sections))
    return path


def database_section(url: str) -> str:
    return f"[api_database]\nconnection = {url}\n"


# Where the configuration comes from


def test_the_two_ways_to_name_the_filter_are_the_same(
    known: Known, tmp_path: Path, runtimes: runtime.Registry
) -> None:
    applications = []
    for number, use in enumerate(
        (
            "use = egg:cellmw",
            "use = egg:cellmw#cellmw",
            "paste.filter_factory = cellmw:filter_factory",
        )
    ):
        paste_file = write(
            tmp_path / f"{number}.ini",
            PIPELINE,
            f"[filter:cellmw]\n{use}\napi_database_connection = {known.url}\n",
        )
        applications.append(deploy.loadapp(f"config:{paste_file}"))
    assert all(known.is_asked_by(made) for made in applications)
    assert len(runtimes) == 1


@pytest.mark.parametrize("where", ["section", "default"])
def test_oslo_config_project_finds_the_services_file(
    where: str, known: Known, load: Load, tmp_path: Path
) -> None:
    write(tmp_path / ".myapi" / "myapi.conf", database_section(known.url))
    line = {where: "oslo_config_project = myapi"}
    assert known.is_asked_by(load(line.pop("section", ""), **line))


@pytest.mark.parametrize("where", ["section", "default"])
def test_oslo_config_file_is_enough_by_itself(
    where: str, known: Known, load: Load, tmp_path: Path
) -> None:
    nova_conf = write(
        tmp_path / "nova.conf",
        "[DEFAULT]\ntransport_url = cellmw-memory://default/\n"
        "osapi_compute_workers = 2\n",
        f"[database]\nconnection = mysql+pymysql://u:{SECRET}@h/nova\n",
        f"[api_database]\nconnection = {known.url}\nmax_retries = -1\n",
        "[libvirt]\nvirt_type = kvm\n",
    )
    line = {where: f"oslo_config_file = {nova_conf}"}
    assert known.is_asked_by(load(line.pop("section", ""), **line))


def test_oslo_config_program_names_the_file(
    known: Known, load: Load, tmp_path: Path
) -> None:
    write(tmp_path / ".myapi" / "myapi-wsgi.conf", database_section(known.url))
    application = load(
        "oslo_config_project = myapi\noslo_config_program = myapi-wsgi"
    )
    assert known.is_asked_by(application)


def test_the_filters_own_section_wins_over_default(
    known: Known, load: Load, tmp_path: Path
) -> None:
    right = write(tmp_path / "right.conf", database_section(known.url))
    wrong = write(tmp_path / "wrong.conf", database_section("sqlite:///x"))
    application = load(
        # Paste's own way to say so: without "set" it leaves [DEFAULT]'s.
        f"set oslo_config_file = {right}",
        f"oslo_config_file = {wrong}",
    )
    assert known.is_asked_by(application)


def test_oslo_config_file_is_all_that_is_read(
    known: Known, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/my-api"])
    other = write(
        tmp_path / "my-api.conf.d" / "other.conf",
        "[cellmw]\ncontext_key = from.directory\n",
    )
    # Where oslo.config would look.
    assert str(other.parent) in cfg.find_config_dirs(None, "my-api")
    file = write(tmp_path / "service.conf", database_section(known.url))
    assert key_of(load(f"oslo_config_file = {file}")) == "cellmw.context"


@pytest.mark.parametrize("with_file", [True, False])
def test_a_project_has_its_directory_as_in_oslo_middleware(
    with_file: bool, known: Known, load: Load, tmp_path: Path
) -> None:
    write(
        tmp_path / ".myapi" / "myapi.conf.d" / "10-database.conf",
        database_section(known.url),
    )
    file = write(tmp_path / "service.conf", "[cellmw]\ncontext_key = a.file\n")
    section = "oslo_config_project = myapi\n"
    if with_file:
        section += f"oslo_config_file = {file}\n"
    application = load(section)
    environ = stack.environ_of(f"/servers/{known.instance}")
    application(environ, lambda status, headers: None)
    key = "a.file" if with_file else "cellmw.context"
    assert environ[key].cell_uuid == known.cell


@pytest.mark.parametrize("separator", [",", ", ", "\n    ", ",\n    "])
def test_several_files_and_directories_and_later_ones_win(
    separator: str, known: Known, load: Load, tmp_path: Path
) -> None:
    def keyed(name: str, *more: str) -> Path:
        key = name.replace("/", ".")
        text = f"[cellmw]\ncontext_key = {key}\n"
        return write(tmp_path / name, text, *more)

    one = keyed("one", database_section(known.url))
    two = keyed("two")
    files = f"oslo_config_file = {one}{separator}{two}\n"
    assert key_of(load(files)) == "two"
    keyed("b.d/20.conf")
    keyed("a.d/30.conf")
    keyed("a.d/40.conf")
    keyed("a.d/50.txt")
    folders = f"{tmp_path}/b.d{separator}{tmp_path}/a.d"
    assert key_of(load(f"{files}oslo_config_dir = {folders}")) == "a.d.40.conf"
    folders = f"{tmp_path}/a.d{separator}{tmp_path}/b.d"
    application = load(f"oslo_config_dir = {folders}", files)
    assert key_of(application) == "b.d.20.conf"


def test_an_unknown_option_of_a_file_is_told_once(
    known: Known,
    load: Load,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    url = f"mysql://u:{SECRET}@h"
    main = write(tmp_path / "main.conf", database_section(known.url))
    folder = tmp_path / "conf.d"
    write(
        folder / "10.conf",
        "[CellMW]\nsend_timout = 3\nsend_timeout = 4\n",
        f"[cellmw]\n{url} = 1\n[other]\nlookup_timeot = 3\n",
    )
    for _ in range(2):
        load(f"oslo_config_file = {main}\noslo_config_dir = {folder}")
    told = [
        record.getMessage()
        for record in caplog.records
        if record.name == "cellmw.deploy"
    ]
    assert len(told) == 2
    assert SECRET not in caplog.text
    (first,) = (text for text in told if "send_timout" in text)
    assert f"of {folder}/10.conf has no effect" in first
    assert first.endswith("is send_timeout")


@pytest.fixture
def global_conf() -> Iterator[cfg.ConfigOpts]:
    conf = cfg.CONF
    conf([], project="cellmw-test", default_config_files=[])
    yield conf
    conf.clear()
    conf.reset()


def test_with_none_of_them_it_is_the_global_configuration(
    known: Known, load: Load, global_conf: cfg.ConfigOpts, tmp_path: Path
) -> None:
    file = write(tmp_path / "service.conf", database_section(known.url))
    global_conf([], project="x", default_config_files=[str(file)])
    assert known.is_asked_by(load(""))


def test_python_may_pass_the_configuration_itself(
    known: Known, runtimes: runtime.Registry, tmp_path: Path
) -> None:
    file = write(tmp_path / "service.conf", database_section(known.url))
    conf = cfg.ConfigOpts()
    conf([], project="x", default_config_files=[str(file)])
    made = cellmw.filter_factory({}, oslo_config_config=conf)(stack.Api())
    assert known.is_asked_by(made)
    # Python may also leave Paste's dictionary out.
    made = cellmw.filter_factory(None, oslo_config_config=conf)(stack.Api())
    assert known.is_asked_by(made)
    assert len(runtimes) == 1


@pytest.mark.parametrize("where", ["section", "default"])
def test_in_a_paste_file_the_configuration_itself_is_an_error(
    where: str, problem: Callable[..., str], known: Known
) -> None:
    lines = {
        "section": f"api_database_connection = {known.url}\n",
        "default": "",
    }
    lines[where] += f"oslo_config_config = {SECRET}\n"
    message = problem(lines["section"], lines["default"])
    assert "oslo_config_config" in message
    assert "oslo_config_project" in message


def test_what_else_stands_in_default_is_not_ours(
    known: Known, load: Load
) -> None:
    application = load(
        f"api_database_connection = {known.url}",
        """
        lookup_timeout = no number
        context_key = other.context
        no_such_option = 1
        lookup_timeot = 3
        debug = true
        """,
    )
    assert known.is_asked_by(application)


def test_default_does_not_configure_the_database(
    known: Known,
    problem: Callable[..., str],
    global_conf: cfg.ConfigOpts,
) -> None:
    message = problem("", f"api_database_connection = {known.url}")
    assert "no API database is configured" in message


def told_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The paste options that warnings of ours name."""
    found = [
        record.getMessage()
        for record in caplog.records
        if record.name == "cellmw.deploy"
    ]
    assert all("[DEFAULT]" in text for text in found)
    return sorted(
        text.partition("paste option ")[2].partition(" ")[0] for text in found
    )


def test_an_option_that_default_takes_away_is_told_of(
    known: Known,
    load: Load,
    runtimes: runtime.Registry,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    file = write(tmp_path / "service.conf", database_section(known.url))
    # Paste keeps the lines of the section to itself.
    load(
        f"""
        oslo_config_file = {file}
        send_timeout = 3
        api_database_connection = sqlite:///{SECRET}
        lookup_timeout = 4
        set context_key = {SECRET}
        """,
        f"""
        oslo_config_project = other
        send_timeout = {SECRET}
        api_database_connection = sqlite:///{SECRET}
        debug = true
        """,
    )
    names = ["api_database_connection", "context_key", "send_timeout"]
    assert told_of(caplog) == names
    assert SECRET not in caplog.text
    (made,) = runtimes
    assert made.settings.send_timeout == 10
    assert made.settings.lookup_timeout == 4
    assert made.settings.context_key == "cellmw.context"


def test_the_two_lines_that_the_warning_proposes_do_it(
    known: Known,
    load: Load,
    runtimes: runtime.Registry,
    caplog: pytest.LogCaptureFixture,
) -> None:
    load(
        f"""
        api_database_connection = {known.url}
        set send_timeout = 3
        get send_timeout = send_timeout
        """,
        "send_timeout = 7",
    )
    assert told_of(caplog) == []
    (made,) = runtimes
    assert made.settings.send_timeout == 3


def test_a_percent_sign_in_a_paste_file_is_written_twice(load: Load) -> None:
    key = load("context_key = a%%40b\napi_database_connection = sqlite://")
    assert key_of(key) == "a%40b"
    with pytest.raises(configparser.InterpolationSyntaxError):
        load("context_key = a%40b\napi_database_connection = sqlite://")


# Paste wins, and is private


def key_of(application: Any) -> str:
    """Where a filter puts its context."""
    environ = stack.environ_of("/")
    before = set(environ)
    application(environ, lambda status, headers: None)
    (key,) = set(environ) - before
    return key


def test_a_paste_option_wins_and_is_private_to_its_filter(
    known: Known, runtimes: runtime.Registry, tmp_path: Path
) -> None:
    file = write(
        tmp_path / "service.conf",
        database_section(known.url),
        "[cellmw]\ncontext_key = from.file\nlookup_timeout = 7\n",
    )
    conf = cfg.ConfigOpts()
    conf([], project="x", default_config_files=[str(file)])

    def made(**paste: str) -> Any:
        factory = cellmw.filter_factory({}, oslo_config_config=conf, **paste)
        return factory(stack.Api())

    assert key_of(made()) == "from.file"
    with_paste = made(context_key="from.paste", lookup_timeout="3")
    assert key_of(with_paste) == "from.paste"
    assert key_of(made()) == "from.file"
    assert key_of(with_paste) == "from.paste"
    assert conf.cellmw.context_key == "from.file"
    assert conf.cellmw.lookup_timeout == 7
    assert [made.settings.lookup_timeout for made in runtimes] == [7, 3]


def test_each_option_may_be_set_in_both_places(
    known: Known, load: Load, tmp_path: Path, runtimes: runtime.Registry
) -> None:
    values = {
        "context_key": ("a.context", "a.context"),
        "instance_path_patterns": (
            "/a/(?P<instance_uuid>[^/]+)",
            ("/a/(?P<instance_uuid>[^/]+)",),
        ),
        "allowed_remote_exmods": ("one.two,three", ("one.two", "three")),
        "on_lookup_failure": ("pass", "pass"),
        "on_no_cell": ("refuse", "refuse"),
        "lookup_timeout": ("1.5", 1.5),
        "lookup_concurrency": ("3", 3),
        "cell_refresh_interval": ("2.5", 2.5),
        "instance_cache_ttl": ("0", 0),
        "instance_cache_for": ("all", "all"),
        "instance_cache_size": ("7", 7),
        "transport_cache": ("no", False),
        "transport_cache_size": ("8", 8),
        "transport_overflow": ("refuse", "refuse"),
        "transport_idle_timeout": ("9", 9),
        "transport_max_lifetime": ("0", 0),
        "send_timeout": ("11", 11),
        "max_sends_per_cell": ("12", 12),
        "max_stuck_sends": ("15", 15),
        "breaker_failures": ("0", 0),
        "breaker_reset_after": ("13", 13),
        "db_connection": ("yes", True),
        # Other values of these two change others, or need Nova.
        "mode": ("route", "route"),
        "nova_cell_cache": ("no", False),
        "healthcheck_max_cells_down": ("14", 14),
        "scrub_loggers": ("nova,oslo_messaging", ("nova", "oslo_messaging")),
        "scrub_loggers_except": ("nova.wsgi", ("nova.wsgi",)),
    }
    assert values.keys() == {opt.name for opt in options.OPTS}
    lines = "".join(f"{name} = {text}\n" for name, (text, _) in values.items())
    file = write(
        tmp_path / "service.conf",
        database_section(known.url),
        f"[cellmw]\n{lines}",
    )
    load(f"api_database_connection = {known.url}\n{lines}")
    load(f"oslo_config_file = {file}")
    in_paste, in_file = (made.settings for made in runtimes)
    for name, (_, value) in values.items():
        assert getattr(in_paste, name) == value, name
    assert in_file == in_paste


def test_patterns_may_stand_one_a_line(known: Known, load: Load) -> None:
    api = load(
        f"""
        api_database_connection = {known.url}
        instance_path_patterns =
            /vms/(?P<instance_uuid>[^/]+)
            /boxes/(?P<instance_uuid>[^/]+)
        """
    )
    for path, found in (
        (f"/vms/{known.instance}", known.cell),
        (f"/boxes/{known.instance}", known.cell),
        (f"/servers/{known.instance}", None),
    ):
        environ = stack.environ_of(path)
        api(environ, lambda status, headers: None)
        assert environ["cellmw.context"].cell_uuid == found


def test_what_changes_after_the_load_changes_nothing(
    known: Known, make_filter: MakeFilter
) -> None:
    conf = stack.configuration()
    made = make_filter(conf=conf)(stack.Api())
    conf.set_override("context_key", "later.context", group="cellmw")
    conf.set_override("connection", "sqlite:///later", group="api_database")
    assert key_of(made) == "cellmw.context"
    assert known.is_asked_by(made)


# What stops the load


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("transport_cach", "transport_cache"),
        ("transport_cache_sise", "transport_cache_size"),
        ("lookup-timeout", "lookup_timeout"),
        ("Context_Key", "context_key"),
        ("send_timout", "send_timeout"),
        ("SEND_TIMEOUT", "send_timeout"),
        ("api_database_conection", "api_database_connection"),
        ("oslo_config_projekt", "oslo_config_project"),
        ("connection", "db_connection"),
        ("database_connection", "api_database_connection"),
    ],
)
def test_an_unknown_option_names_the_nearest_known_one(
    name: str, nearest: str, known: Known, problem: Callable[..., str]
) -> None:
    message = problem(
        f"api_database_connection = {known.url}\n{name} = {SECRET}"
    )
    assert repr(name) in message
    assert f"nearest known one is {nearest} " in message


def test_an_unknown_option_shows_no_secret_in_its_name(
    known: Known, runtimes: runtime.Registry
) -> None:
    # A connection string on a line of its own is a name to some parsers.
    name = f"mysql+pymysql://nova:{SECRET}@db/nova_api"
    section: dict[str, Any] = {
        name: "",
        "api_database_connection": known.url,
    }
    with pytest.raises(ConfigurationError) as caught:
        cellmw.filter_factory({}, **section)
    assert "mysql+pymysql://" in checked(caught.value)


BAD_VALUES = {
    "context_key": ("", "not empty"),
    "instance_path_patterns": (f"/{SECRET}/(", "regular expressions"),
    "on_lookup_failure": (SECRET, "fail or pass"),
    "lookup_timeout": (SECRET, "seconds, above 0"),
    "lookup_concurrency": (SECRET, "whole number, 1 or more"),
    "cell_refresh_interval": (SECRET, "seconds, 0 or more"),
    "instance_cache_ttl": (SECRET, "seconds, 0 or more"),
    "instance_cache_for": (SECRET, "safe or all"),
    "instance_cache_size": (SECRET, "whole number, 1 or more"),
    "transport_cache": (SECRET, "true or false"),
    "transport_cache_size": (SECRET, "whole number, 1 or more"),
    "transport_overflow": (SECRET, "open or refuse"),
    "transport_idle_timeout": (SECRET, "seconds, 0 or more"),
    "transport_max_lifetime": (SECRET, "seconds, 0 or more"),
    "send_timeout": (SECRET, "seconds, above 0"),
    "max_sends_per_cell": (SECRET, "whole number, 1 or more"),
    "breaker_failures": (SECRET, "whole number, 0 or more"),
    "breaker_reset_after": (SECRET, "seconds, 0 or more"),
    "db_connection": (SECRET, "true or false"),
    "healthcheck_max_cells_down": (SECRET, "whole number, 0 or more"),
}


@pytest.mark.parametrize("name", BAD_VALUES)
@pytest.mark.parametrize("where", ["paste", "file"])
def test_a_bad_value_names_the_option_and_what_is_accepted(
    where: str,
    name: str,
    known: Known,
    problem: Callable[..., str],
    tmp_path: Path,
) -> None:
    value, accepted = BAD_VALUES[name]
    if where == "paste":
        message = problem(
            f"api_database_connection = {known.url}\n{name} = {value}"
        )
    else:
        file = write(
            tmp_path / "service.conf",
            database_section(known.url),
            f"[cellmw]\n{name} = {value}",
        )
        message = problem(f"oslo_config_file = {file}")
        assert "[cellmw]" in message
    assert name in message
    assert accepted in message


@pytest.mark.parametrize(
    "name, value",
    [
        ("lookup_timeout", "0"),
        ("lookup_timeout", "-1"),
        ("lookup_timeout", "nan"),
        ("lookup_timeout", "inf"),
        ("lookup_timeout", ""),
        ("send_timeout", "0"),
        ("send_timeout", "inf"),
        ("send_timeout", "1e10"),
        ("transport_idle_timeout", "-0.1"),
        ("transport_max_lifetime", "nan"),
        ("transport_cache_size", "0"),
        ("transport_cache_size", ""),
        ("instance_cache_ttl", ""),
        ("transport_cache_size", "1.5"),
        ("lookup_concurrency", "0"),
        ("max_sends_per_cell", "0"),
        ("breaker_failures", "-1"),
        ("on_lookup_failure", "Fail"),
        ("on_lookup_failure", ""),
        ("transport_cache", ""),
        ("transport_cache", "2"),
        ("instance_path_patterns", ""),
        ("instance_path_patterns", "/servers/(.*)"),
        ("instance_path_patterns", "/servers/(?P<uuid>.*)"),
    ],
)
def test_a_value_that_makes_no_sense_is_a_bad_one(
    name: str, value: str, known: Known, problem: Callable[..., str]
) -> None:
    message = problem(
        f"api_database_connection = {known.url}\n{name} = {value}"
    )
    assert name in message
    assert "accepted" in message


def test_without_an_api_database_it_says_where_to_configure_one(
    problem: Callable[..., str], tmp_path: Path
) -> None:
    file = write(
        tmp_path / "service.conf",
        f"[database]\nconnection = mysql+pymysql://u:{SECRET}@h/nova\n",
    )
    message = problem(f"oslo_config_file = {file}")
    for told in (
        "no API database is configured",
        "[api_database]",
        "connection",
        "api_database_connection",
        f"(read: {file})",
    ):
        assert told in message


def test_a_load_that_has_read_nothing_says_so(
    problem: Callable[..., str], tmp_path: Path
) -> None:
    cfg.CONF.clear()
    cfg.CONF.reset()
    assert "(no file was read)" in problem("")
    # There is no such project here.
    assert "(no file was read)" in problem("oslo_config_project = x-y-z")


def test_a_queue_manager_without_a_place_for_its_locks_stops_the_load(
    problem: Callable[..., str],
    known: Known,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OSLO_LOCK_PATH", raising=False)
    lockutils.set_defaults("")  # another filter has set it for the process
    file = write(
        tmp_path / "service.conf",
        database_section(known.url),
        "[oslo_messaging_rabbit]\nuse_queue_manager = true\n",
    )
    message = problem(f"oslo_config_file = {file}")
    assert "[oslo_messaging_rabbit] use_queue_manager" in message
    assert "set [oslo_concurrency] lock_path" in message


@pytest.mark.parametrize(
    "url",
    [
        SECRET,
        f"mysql+pymysql:/u:{SECRET}@h/d",
        f"mysql+pymysql://u:{SECRET}@h:port/d",
        f"nosuchdb://u:{SECRET}@h/d",
        f"mysql+nosuchdriver://u:{SECRET}@h/d",
        f"mysql+pyodbc://u:{SECRET}@h/d",
        f"postgresql+asyncpg://u:{SECRET}@h/d",
    ],
)
@pytest.mark.parametrize("where", ["paste", "file"])
def test_a_database_url_that_cannot_be_used_stops_the_load(
    where: str, url: str, load: Load, tmp_path: Path
) -> None:
    name = "paste option api_database_connection: "
    section = f"api_database_connection = {url}"
    if where == "file":
        name = "option connection in [api_database]: "
        file = write(tmp_path / "service.conf", database_section(url))
        section = f"oslo_config_file = {file}"
    with pytest.raises(ConfigurationError) as caught:
        load(section)
    assert checked(caught.value).startswith(f"cellmw: {name}")
    assert_our_frames_know_no_secret(caught.value)


def assert_our_frames_know_no_secret(error: ConfigurationError) -> None:
    ours = [
        (frame, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_globals["__name__"].startswith("cellmw.")
    ]
    shown = traceback.StackSummary.extract(iter(ours), capture_locals=True)
    assert shown
    assert SECRET not in "".join(shown.format())


def test_a_load_that_another_option_stops_has_no_frame_with_the_database(
    load: Load,
) -> None:
    url = f"mysql+pymysql://u:{SECRET}@h/d"
    with pytest.raises(ConfigurationError) as caught:
        load(f"api_database_connection = {url}\nsend_timeout = 0")
    assert_our_frames_know_no_secret(caught.value)


@pytest.mark.parametrize(
    "name, accepted",
    [
        ("max_pool_size", "a whole number"),
        ("connection_debug", "a whole number, 0 to 100"),
        ("connection_trace", "true or false"),
    ],
)
def test_a_bad_value_of_the_databases_own_options_stops_the_load(
    name: str,
    accepted: str,
    known: Known,
    problem: Callable[..., str],
    tmp_path: Path,
) -> None:
    file = write(
        tmp_path / "service.conf",
        database_section(known.url) + f"{name} = {SECRET}\n",
    )
    message = problem(f"oslo_config_file = {file}")
    assert f"option {name} in [api_database]" in message
    assert message.endswith(f"accepted: {accepted}")


@pytest.mark.parametrize("name", ["connection", "transport_url"])
def test_a_dollar_sign_in_a_url_shows_nothing_of_it(
    name: str, known: Known, problem: Callable[..., str], tmp_path: Path
) -> None:
    # oslo.config takes the rest of the password for an option's name.
    lines = {
        "transport_url": "rabbit://u:p@h/",
        "connection": "sqlite://",
        name: "rabbit://u:x$hunter2@h/",
    }
    file = write(
        tmp_path / "service.conf",
        f"[DEFAULT]\ntransport_url = {lines['transport_url']}\n",
        database_section(lines["connection"]),
    )
    message = problem(f"oslo_config_file = {file}")
    assert f"option {name} in [" in message
    assert "$$" in message
    assert "hunter2" not in message


@pytest.mark.parametrize(
    "paste, accepted",
    [
        ({"context_key": None}, "a string that is not empty"),
        ({"context_key": SECRET.encode()}, "a string that is not empty"),
        ({"allowed_remote_exmods": 4}, "names"),
        ({"allowed_remote_exmods": [3]}, "names"),
        ({"allowed_remote_exmods": None}, "names"),
        ({"instance_path_patterns": [3]}, "regular expressions"),
        ({"instance_path_patterns": SECRET.encode()}, "regular expressions"),
        ({"on_lookup_failure": None}, "fail or pass"),
        ({"transport_cache": 1}, "true or false"),
        ({"lookup_concurrency": 1.5}, "a whole number"),
        ({"lookup_concurrency": True}, "a whole number"),
        ({"send_timeout": 10**400}, "a number of seconds"),
        ({"send_timeout": False}, "a number of seconds"),
        ({"send_timeout": [SECRET]}, "a number of seconds"),
        ({"oslo_config_project": 4}, "a string"),
        ({"oslo_config_file": SECRET.encode()}, "names, sep"),
        ({"oslo_config_dir": [1]}, "names, sep"),
        ({"api_database_connection": 4}, "a string"),
        ({"api_database_connection": SECRET.encode()}, "a string"),
    ],
)
def test_a_value_from_python_of_another_type_is_a_bad_one(
    paste: dict[str, Any], accepted: str, known: Known
) -> None:
    section: dict[str, Any] = {"api_database_connection": known.url, **paste}
    with pytest.raises(ConfigurationError) as caught:
        cellmw.filter_factory({}, **section)
    message = checked(caught.value)
    assert next(iter(paste)) in message
    assert accepted in message.partition("accepted: ")[2]


def test_a_configuration_file_that_is_not_there_stops_the_load(
    problem: Callable[..., str], tmp_path: Path
) -> None:
    file = tmp_path / "not-there.conf"
    message = problem(f"oslo_config_file = {file}")
    assert f"oslo_config_file = {file}" in message
    assert message.endswith(f"no such file: {file}")


@pytest.mark.parametrize(
    "value",
    [
        f"mysql+pymysql://nova:{SECRET}@db/nova_api",
        f"/etc/mysql+pymysql:/nova:{SECRET}@db/nova_api",
        f"nova:{SECRET}@db/nova_api",
    ],
)
def test_a_database_url_in_place_of_a_file_shows_no_secret(
    value: str, problem: Callable[..., str]
) -> None:
    message = problem(f"oslo_config_file = {value}")
    assert "oslo_config_file" in message
    assert "no such file" in message
    assert "@db/nova_api" in message


@pytest.mark.parametrize("where", ["file", "directory"])
@pytest.mark.parametrize(
    "text, said",
    [
        (f"connection {SECRET}\n", "line 1: No ':' or '=' found"),
        (f"\n[cellmw]\n= {SECRET}\n", "line 3: Key cannot be empty"),
        (
            f"[api_database\nconnection = mysql+pymysql://u:{SECRET}@h/d\n",
            "line 1: Invalid section",
        ),
        (f"[api_database]\n  {SECRET}\n", "line 2: Unexpected continuation"),
        (f"\n\n\xff\xfe\x00{SECRET}", "line 3: it is not UTF-8 text"),
    ],
)
def test_a_file_that_cannot_be_parsed_is_named_with_the_line(
    text: str,
    said: str,
    where: str,
    problem: Callable[..., str],
    tmp_path: Path,
) -> None:
    good = write(tmp_path / "good.conf", "[cellmw]\n")
    file = tmp_path / "conf.d" / "10-service.conf"
    file.parent.mkdir()
    file.write_bytes(text.encode("latin-1"))
    lines = {
        "file": f"oslo_config_file = {good}, {file}",
        "directory": f"oslo_config_dir = {file.parent}",
    }
    assert f"{file}, {said}" in problem(lines[where])


def test_a_directory_that_is_not_there_stops_the_load(
    problem: Callable[..., str], tmp_path: Path
) -> None:
    folder = tmp_path / "conf.d"
    message = problem(f"oslo_config_dir = {folder}")
    assert message.endswith(f"no such directory: {folder}")
    write(folder / "10.conf", "[cellmw]\n")
    assert f"(read: {folder}/10.conf)" in problem(
        f"oslo_config_dir = {folder}"
    )
    assert "cannot be read" in problem(f"oslo_config_file = {folder}")


LOAD = """
    import sys
    import cellmw
    from oslo_config import cfg

    def load(database="sqlite:///unused", **paste):
        conf = cfg.ConfigOpts()
        conf([], project="cellmw-test", default_config_files=[])
        return cellmw.filter_factory(
            {}, oslo_config_config=conf, api_database_connection=database,
            **paste
        )
"""


@pytest.mark.parametrize(
    "library, patching",
    [
        ("eventlet", "eventlet.monkey_patch()"),
        ("eventlet", "eventlet.monkey_patch(thread=True)"),
        ("eventlet", "eventlet.monkey_patch(socket=True)"),
        ("eventlet", "eventlet.monkey_patch(os=True, select=True)"),
        ("gevent", "gevent.monkey.patch_all()"),
        ("gevent", "gevent.monkey.patch_thread()"),
        ("gevent", "gevent.monkey.patch_socket()"),
        ("gevent", "gevent.monkey.patch_time()"),
    ],
)
def test_a_process_that_is_monkey_patched_does_not_load(
    library: str, patching: str
) -> None:
    printed = stack.run_python(
        f"import {patching.rpartition('.')[0]}; {patching}"
        + textwrap.dedent(LOAD)
        + textwrap.dedent(
            """
            try:
                load()
            except cellmw.ConfigurationError as error:
                print(error)
            else:
                print("loaded")
            """
        )
    )
    assert f"cellmw: {library} has monkey patched this process" in printed
    assert "native threads" in printed


@pytest.mark.parametrize("library", ["eventlet.patcher", "gevent.monkey"])
def test_a_library_that_is_only_imported_is_no_reason_to_stop(
    library: str,
) -> None:
    code = f"import {library}\n" + textwrap.dedent(LOAD)
    assert stack.run_python(f"{code}\nload()\nprint('loaded')") == "loaded\n"


# What does not stop it


@pytest.mark.parametrize(
    "url",
    [
        f"mysql+pymysql://u:{SECRET}@127.0.0.1:{{port}}/d",
        f"mysql+pymysql://u:{SECRET}@host.invalid/d",
        f"postgresql+psycopg2://u:{SECRET}@127.0.0.1:{{port}}/d",
        f"sqlite:////no/such/{SECRET}/folder",
    ],
)
def test_a_database_that_cannot_be_reached_does_not_stop_the_load(
    url: str, load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    url = url.format(port=servers.free_port())
    application = load(f"api_database_connection = {url}\nlookup_timeout = 1")
    # It is found out by a request, and only by one for an instance.
    for path, status in (
        ("/servers", 200),
        ("/servers/6f70656e-7374-6163-6b20-346576657221", 503),
    ):
        response = stack.request(application, path)
        assert response.status_int == status
        assert SECRET not in response.text
    assert SECRET not in caplog.text


MEASURE = """
    import json, os, threading
    import psutil

    def measured():
        process = psutil.Process()
        return {
            "threads": process.num_threads(),
            "python threads": sorted(t.name for t in threading.enumerate()),
            "connections": len(process.net_connections()),
            "files": sorted(os.listdir("/proc/self/fd")),
            "children": len(process.children()),
        }
"""


def test_loading_starts_no_thread_and_opens_nothing() -> None:
    code = textwrap.dedent(LOAD) + textwrap.dedent(MEASURE)
    code += textwrap.dedent(
        """
        # What importing opens is not loading's.
        before = measured()
        made = [
            load(url, transport_cache=cached)(None)
            for url in (sys.argv[1], sys.argv[2], "sqlite:///" + sys.argv[3])
            for cached in ("true", "false")
        ]
        print(json.dumps([before, measured()]))
        """
    )
    port = servers.free_port()
    before, after = json.loads(
        stack.run_python(
            code,
            f"mysql+pymysql://u:p@127.0.0.1:{port}/d",
            f"postgresql+psycopg2://u:p@127.0.0.1:{port}/d",
            "/no/such/folder",
        )
    )
    assert before == after
    assert after["python threads"] == ["MainThread"]


def test_loading_creates_no_database_file(
    make_filter: MakeFilter, tmp_path: Path
) -> None:
    make_filter(database=f"sqlite:///{tmp_path}/new.db")
    assert not (tmp_path / "new.db").exists()


# What is imported, and when


def test_loading_imports_neither_alembic_nor_cliff() -> None:
    code = textwrap.dedent(LOAD) + "\nload()(None)\n"
    code += "print([n for n in ('alembic', 'cliff') if n in sys.modules])"
    assert stack.run_python(code) == "[]\n"


REQUESTS = """
    import json, logging
    import oslo_messaging
    from cellmw import rpc

    database, instance = sys.argv[1:3]
    client = rpc.get_client(oslo_messaging.Target(topic="compute"))

    def application(environ, start_response):
        context = environ["cellmw.context"]
        host = client.prepare(server="host", timeout=10)
        host.cast(context, "reboot_instance", instance_uuid="x")
        body = host.call(context, "get_console_output", instance_uuid="x")
        start_response("200 OK", [])
        return [repr(body).encode()]

    def request(path, method):
        environ = {
            "REQUEST_METHOD": method, "PATH_INFO": path, "SCRIPT_NAME": "",
            "QUERY_STRING": "", "SERVER_NAME": "s", "SERVER_PORT": "80",
            "SERVER_PROTOCOL": "HTTP/1.1", "wsgi.url_scheme": "http",
            "HTTP_X_IDENTITY_STATUS": "Confirmed", "HTTP_X_USER_ID": "u",
        }
        body = filtered(environ, lambda status, headers: None)
        return b"".join(body).decode()

    filtered = load(database)(application)
    before = set(sys.modules)
    answers = [request(f"/servers/{instance}", m) for m in ("GET", "POST")]
    print(json.dumps([answers, sorted(set(sys.modules) - before)]))
"""


@pytest.mark.servers
@pytest.mark.parametrize("kind", ["mariadb", "postgresql"])
def test_the_first_request_pays_for_no_import(
    kind: str,
    request: pytest.FixtureRequest,
    vhost: servers.Vhost,
    serve: stack.Serve,
) -> None:
    database = ApiDatabase(request.getfixturevalue(kind).url)
    instance = database.add_instance(database.add_cell(vhost.url))
    database.close()
    serve(vhost.url, stack.Host("the host"))
    printed = stack.run_python(
        textwrap.dedent(LOAD) + textwrap.dedent(REQUESTS),
        database.url,
        instance,
    )
    answers, imported = json.loads(printed)
    assert answers == ["['the host', 'x']"] * 2
    assert imported == []


def test_a_fault_pays_for_no_import_either() -> None:
    code = textwrap.dedent(LOAD) + textwrap.dedent(REQUESTS)
    printed = stack.run_python(
        code, "sqlite:////none/there", "6f70656e-7374-6163-6b20-346576657221"
    )
    answers, imported = json.loads(printed)
    assert all("serviceUnavailable" in answer for answer in answers)
    assert imported == []


# What filters share


def test_two_pipelines_with_the_same_filter_share_one_runtime(
    known: Known, load: Load, runtimes: runtime.Registry
) -> None:
    section = f"api_database_connection = {known.url}"
    second = "[pipeline:second]\npipeline = cellmw api\n"
    first = load(section, more=second)
    other = load(section, more=second, name="second")
    assert first is not other
    assert len(runtimes) == 1
    assert known.is_asked_by(first)
    assert known.is_asked_by(other)


@pytest.mark.parametrize(
    "second, transports", [({}, 1), ({"send_timeout": "9"}, 2)]
)
def test_filters_with_equal_settings_open_one_transport_for_a_cell(
    second: dict[str, Any],
    transports: int,
    known: Known,
    make_filter: MakeFilter,
) -> None:
    client = rpc.get_client(stack.target(server="host"))

    def handler(context: Any) -> None:
        client.cast(context, "reboot_instance")

    # Paste makes the filter once for each pipeline.
    applications = [
        make_filter(**paste)(stack.Api(handler))
        for paste in ({}, second, {}, second)
    ]
    for application in applications:
        path = f"/servers/{known.instance}"
        assert stack.request(application, path).status_int == 200
    stats = testing.broker("one").stats()
    assert stats.published == 4
    assert stats.transports_opened == transports


def test_settings_are_equal_by_what_they_mean(
    known: Known, load: Load, runtimes: runtime.Registry
) -> None:
    section = f"api_database_connection = {known.url}\n"
    load(section)
    load(section + "transport_cache = yes\nlookup_timeout = 5.0\n")
    load(section + "transport_cache = 1\nsend_timeout = 10\n")
    assert len(runtimes) == 1
    load(section + "transport_cache = 0\n")
    assert len(runtimes) == 2


def test_another_database_is_another_runtime(
    known: Known, load: Load, runtimes: runtime.Registry, tmp_path: Path
) -> None:
    first = load(f"api_database_connection = {known.url}")
    other = load(f"api_database_connection = sqlite:///{tmp_path}/other.db")
    assert len(runtimes) == 2
    assert known.is_asked_by(first)
    environ = stack.environ_of(f"/servers/{known.instance}")
    assert b"serviceUnavailable" in b"".join(
        other(environ, lambda status, headers: None)
    )


def test_filters_of_one_file_share_one_runtime(
    known: Known, load: Load, tmp_path: Path, runtimes: runtime.Registry
) -> None:
    file = write(tmp_path / "service.conf", database_section(known.url))
    load(f"oslo_config_file = {file}")
    load(f"oslo_config_file = {file}")
    assert len(runtimes) == 1
    copy = write(tmp_path / "copy.conf", database_section(known.url))
    load(f"oslo_config_file = {copy}")
    assert len(runtimes) == 2


@pytest.mark.parametrize("name", ["connection", "transport_url"])
def test_one_file_that_says_something_else_is_another_runtime(
    name: str, load: Load, tmp_path: Path, runtimes: runtime.Registry
) -> None:
    def load_with(value: str) -> None:
        lines = {
            "transport_url": "cellmw-memory://one/",
            "connection": "sqlite:///one.db",
            name: value,
        }
        file = write(
            tmp_path / "service.conf",
            f"[DEFAULT]\ntransport_url = {lines['transport_url']}\n",
            database_section(lines["connection"]),
        )
        load(f"oslo_config_file = {file}")

    first, second = {
        "transport_url": ("cellmw-memory://a/", "cellmw-memory://b/"),
        "connection": ("sqlite:///a.db", "sqlite:///b.db"),
    }[name]
    for value in (first, second, first):
        load_with(value)
    assert len(runtimes) == 2


def test_another_database_in_one_configuration_is_another_runtime(
    known: Known, runtimes: runtime.Registry, tmp_path: Path
) -> None:
    conf = stack.configuration()
    engines.register_options(conf)

    def made_with(url: str) -> Any:
        conf.set_override("connection", url, group=engines.GROUP)
        factory = cellmw.filter_factory({}, oslo_config_config=conf)
        return factory(stack.Api())

    first = made_with(known.url)
    made_with(f"sqlite:///{tmp_path}/other.db")
    assert len(runtimes) == 2
    # The first one has asked nothing so far.
    assert known.is_asked_by(first)


# The options, published


def sample() -> str:
    """What ``oslo-config-generator`` writes."""
    return subprocess.run(
        [
            Path(sys.executable).with_name("oslo-config-generator"),
            *("--namespace", "cellmw"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout


def test_the_generator_writes_a_sample_that_is_the_defaults(
    tmp_path: Path,
) -> None:
    text = sample()
    for section in ("[cellmw]", "[api_database]"):
        assert f"\n{section}\n" in text
    for opt in options.OPTS:
        assert f"\n#{opt.name} =" in text
    assert "\n#connection = " in text
    assert "/v1/boxes/(?P<instance_uuid>" in text
    # Each default is a line that begins with "#" and no space.
    file = tmp_path / "sample.conf"
    lines = re.sub("^#(?! )(.)", r"\1", text, flags=re.MULTILINE)
    lines = re.sub("^#    ", "    ", lines, flags=re.MULTILINE)
    file.write_text(lines.replace("<None>", ""), "utf-8")
    conf = cfg.ConfigOpts()
    conf([], project="cellmw-test", default_config_files=[str(file)])
    assert options.load(conf, {}) == options.load(stack.configuration(), {})
    assert "/servers/" in text.partition("#instance_path_patterns = ")[2]
