# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The options, their defaults, and what becomes of their values."""

from __future__ import annotations

import copy
import dataclasses
import threading
from typing import Any

import pytest
from oslo_config import cfg

from cellmw import instance_path, options
from cellmw.cells import engines
from cellmw.exceptions import ConfigurationError

# Section 2 of the contract.
DEFAULTS: dict[str, Any] = {
    "context_key": "cellmw.context",
    "instance_path_patterns": instance_path.DEFAULT_PATTERNS,
    "allowed_remote_exmods": (),
    "on_lookup_failure": "fail",
    "on_no_cell": "none",
    "lookup_timeout": 5,
    "lookup_concurrency": 8,
    "cell_refresh_interval": 10,
    "instance_cache_ttl": 30,
    "instance_cache_for": "safe",
    "instance_cache_size": 100000,
    "transport_cache": True,
    "transport_cache_size": 128,
    "transport_overflow": "open",
    "transport_idle_timeout": 600,
    "transport_max_lifetime": 3600,
    "send_timeout": 10,
    "max_sends_per_cell": 64,
    "max_stuck_sends": 256,
    "breaker_failures": 5,
    "breaker_reset_after": 30,
    "mode": "route",
    "nova_cell_cache": False,
    "db_connection": False,
    "healthcheck_max_cells_down": 0,
    "scrub_loggers": (),
    "scrub_loggers_except": (),
}


def configuration(**values: Any) -> cfg.ConfigOpts:
    conf = cfg.ConfigOpts()
    conf([], project="cellmw-test", default_config_files=[])
    options.register(conf)
    for name, value in values.items():
        conf.set_override(name, value, group="cellmw")
    return conf


def test_the_defaults_are_the_published_ones() -> None:
    settings = options.load(configuration(), {})
    assert dataclasses.asdict(settings) == DEFAULTS


def test_all_options_are_published() -> None:
    published = dict(options.list_opts())
    assert list(published) == ["cellmw", "api_database"]
    assert {opt.name for opt in published["cellmw"]} == set(DEFAULTS)
    assert all(opt.help for opts in published.values() for opt in opts)


def test_of_oslo_dbs_options_those_are_published_that_are_read() -> None:
    published = {opt.dest for opt in dict(options.list_opts())["api_database"]}
    assert published == options.DATABASE_OPTIONS
    assert published >= {"connection", *engines.ENGINE_OPTIONS}


def test_what_is_published_is_a_copy() -> None:
    # The generator sorts and changes what it is given.
    for _, published in options.list_opts():
        published.clear()
    assert options.OPTS
    assert dict(options.list_opts())["api_database"]


def test_registering_again_changes_nothing() -> None:
    conf = configuration(lookup_timeout=3)
    options.register(conf)
    assert options.load(conf, {}).lookup_timeout == 3


def test_the_configuration_is_used_and_paste_wins() -> None:
    conf = configuration(lookup_timeout=3, send_timeout=4)
    settings = options.load(conf, {"send_timeout": "5"})
    assert settings.lookup_timeout == 3
    assert settings.send_timeout == 5
    assert conf.cellmw.send_timeout == 4


def test_settings_with_equal_values_are_equal() -> None:
    one = options.load(configuration(), {"lookup_timeout": "5"})
    two = options.load(configuration(), {"lookup_timeout": " 5.0 "})
    three = options.load(configuration(lookup_timeout=5), {})
    other = options.load(configuration(), {"lookup_timeout": "6"})
    assert one == two == three
    assert len({one, two, three}) == 1
    assert one != other


def test_nothing_changes_settings() -> None:
    settings = options.load(configuration(), {})
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.lookup_timeout = 1  # type: ignore[misc]  # is what is tested
    with pytest.raises((AttributeError, TypeError)):
        settings.another = 1  # type: ignore[attr-defined]  # the same
    hash(settings)


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("transport_cache", "true", True),
        ("transport_cache", "YES", True),
        ("transport_cache", "on", True),
        ("transport_cache", "1", True),
        ("transport_cache", "false", False),
        ("transport_cache", "no", False),
        ("transport_cache", "Off", False),
        ("transport_cache", "0", False),
        ("lookup_timeout", "0.25", 0.25),
        ("lookup_timeout", "1e3", 1000.0),
        ("instance_cache_ttl", "0", 0.0),
        ("breaker_failures", "0", 0),
        ("transport_cache_size", " 7 ", 7),
        ("allowed_remote_exmods", "", ()),
        ("allowed_remote_exmods", "a.b", ("a.b",)),
        ("allowed_remote_exmods", "a.b, c ,d", ("a.b", "c", "d")),
        ("context_key", "nova.context", "nova.context"),
    ],
)
def test_paste_strings_are_converted(name: str, text: str, value: Any) -> None:
    settings = options.load(configuration(), {name: text})
    found = getattr(settings, name)
    assert found == value
    assert type(found) is type(value)


def test_patterns_stand_one_a_line_and_blank_lines_do_not_count() -> None:
    text = "\n  /a/(?P<instance_uuid>.*)\n\n\t/b/(?P<instance_uuid>.*)  \n"
    settings = options.load(configuration(), {"instance_path_patterns": text})
    assert settings.instance_path_patterns == (
        "/a/(?P<instance_uuid>.*)",
        "/b/(?P<instance_uuid>.*)",
    )


SECONDS = [
    "lookup_timeout",
    "cell_refresh_interval",
    "instance_cache_ttl",
    "transport_idle_timeout",
    "transport_max_lifetime",
    "send_timeout",
    "breaker_reset_after",
]


@pytest.mark.parametrize("name", SECONDS)
@pytest.mark.parametrize("value", ["1e10", str(2 * threading.TIMEOUT_MAX)])
def test_more_seconds_than_a_thread_can_wait_are_refused(
    name: str, value: str
) -> None:
    message = message_for({name: value})
    assert f"at most {int(threading.TIMEOUT_MAX)}" in message


def test_as_many_as_it_can_wait_are_taken() -> None:
    most = int(threading.TIMEOUT_MAX)
    settings = options.load(configuration(), {"send_timeout": str(most)})
    assert settings.send_timeout == most
    lock = threading.Lock()
    assert lock.acquire(timeout=settings.send_timeout)


@pytest.mark.parametrize(
    "name, given, value",
    [
        ("transport_cache", False, False),
        ("lookup_concurrency", 3, 3),
        ("send_timeout", 3, 3.0),
        ("send_timeout", 0.5, 0.5),
        ("allowed_remote_exmods", ["a", "b"], ("a", "b")),
        ("allowed_remote_exmods", (), ()),
        (
            "instance_path_patterns",
            ["/a/(?P<instance_uuid>.*)"],
            ("/a/(?P<instance_uuid>.*)",),
        ),
    ],
)
def test_from_python_a_value_may_have_the_options_own_type(
    name: str, given: Any, value: Any
) -> None:
    settings = options.load(configuration(), {name: given})
    assert getattr(settings, name) == value


@pytest.mark.parametrize(
    "name, given",
    [
        ("context_key", None),
        ("context_key", b"x"),
        ("allowed_remote_exmods", 4),
        ("allowed_remote_exmods", [3]),
        ("instance_path_patterns", [3]),
        ("instance_path_patterns", 3),
        ("transport_cache", 0),
        ("lookup_concurrency", 1.5),
        pytest.param("send_timeout", 10**400, id="huge"),
        ("send_timeout", True),
    ],
)
def test_from_python_no_value_may_have_another_type(
    name: str, given: Any
) -> None:
    (opt,) = (opt for opt in options.OPTS if opt.name == name)
    message = message_for({name: given})
    assert f"paste option {name} has a bad value" in message
    assert f"accepted: {options.accepted(opt.type)}" in message


@pytest.mark.parametrize("name", DEFAULTS)
def test_each_option_says_what_it_accepts(name: str) -> None:
    (opt,) = (opt for opt in options.OPTS if opt.name == name)
    assert options.accepted(opt.type)


def message_for(paste: dict[str, Any], **values: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        options.load(configuration(**values), paste)
    return str(caught.value)


@pytest.mark.parametrize("name", ["contextkey", "x", "", "Lookup Timeout"])
def test_an_unknown_option_is_named_with_a_known_one(name: str) -> None:
    message = message_for({name: "value-of-it"})
    assert repr(name) in message
    assert "value-of-it" not in message
    nearest = message.partition("nearest known one is ")[2].partition(" ")[0]
    assert nearest in {
        *DEFAULTS,
        *options.PASTE_SOURCE_OPTIONS,
        options.PASTE_DATABASE_OPTION,
    }


def test_an_unknown_option_cannot_forge_a_line() -> None:
    assert "\n" not in message_for({"a\nERROR all is lost": ""})


def test_the_same_option_may_be_wrong_in_both_places() -> None:
    # Only what is used is looked at.
    conf = configuration()
    conf.set_override("lookup_timeout", 3, group="cellmw")
    assert options.load(conf, {"lookup_timeout": "4"}).lookup_timeout == 4


@pytest.mark.parametrize("opt", options.OPTS, ids=lambda opt: opt.name)
def test_each_type_can_be_copied_and_compared(opt: cfg.Opt) -> None:
    # oslo.config does both when an option is registered twice.
    assert copy.deepcopy(opt) == opt
