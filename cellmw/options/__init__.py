# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The options of ``[cellmw]``, and the settings made from them.

An option may be set in the configuration of the service, or in the paste
section of the filter, which takes precedence.  Loading the filter reads,
converts and checks both once.  The result is an immutable :class:`Settings`.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from oslo_config import cfg

from cellmw import redaction
from cellmw.exceptions import ConfigurationError
from cellmw.options.definitions import OPTS
from cellmw.options.types import Patterns, accepted, may_be

__all__ = [
    "DATABASE_GROUP",
    "DATABASE_OPTIONS",
    "GROUP",
    "OPTS",
    "PASTE_DATABASE_OPTION",
    "PASTE_SOURCE_OPTIONS",
    "Settings",
    "accepted",
    "list_opts",
    "load",
    "register",
    "scrubbed_loggers",
]

GROUP = "cellmw"

PASTE_SOURCE_OPTIONS = (
    "oslo_config_project",
    "oslo_config_file",
    "oslo_config_dir",
    "oslo_config_program",
)
PASTE_DATABASE_OPTION = "api_database_connection"

_BY_NAME: dict[str, cfg.Opt] = {opt.name: opt for opt in OPTS}


# The options of oslo.db that apply to reading the API database.
DATABASE_GROUP = "api_database"
DATABASE_OPTIONS = frozenset(
    {
        *("connection", "connection_parameters", "connection_debug"),
        *("connection_recycle_time", "connection_trace", "max_overflow"),
        *("max_pool_size", "mysql_sql_mode", "mysql_wsrep_sync_wait"),
        *("pool_timeout", "sqlite_synchronous"),
    }
)


def list_opts() -> list[tuple[str, list[cfg.Opt]]]:
    """All options, for the entry point ``oslo.config.opts``."""
    from oslo_db import options as oslo_db_options

    database = [
        opt
        for opt in copy.deepcopy(oslo_db_options.database_opts)
        if opt.dest in DATABASE_OPTIONS
    ]
    return [(GROUP, list(OPTS)), (DATABASE_GROUP, database)]


def register(conf: cfg.ConfigOpts) -> None:
    """Register the options on a configuration.  Idempotent."""
    conf.register_opts(OPTS, group=GROUP)


def scrubbed_loggers(conf: cfg.ConfigOpts) -> tuple[list[str], list[str]]:
    """Read the names of loggers that are scrubbed, and of exceptions."""
    register(conf)
    names = ("scrub_loggers", "scrub_loggers_except")
    chosen, left_out = (list(_from_conf(conf, _BY_NAME[n])) for n in names)
    return chosen, left_out


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The converted and checked options of one filter.

    Durations are in seconds.  Hashable; filters with equal settings share a
    runtime.
    """

    context_key: str
    instance_path_patterns: tuple[str, ...]
    allowed_remote_exmods: tuple[str, ...]
    on_lookup_failure: str
    on_no_cell: str
    lookup_timeout: float
    lookup_concurrency: int
    cell_refresh_interval: float
    instance_cache_ttl: float
    instance_cache_for: str
    instance_cache_size: int
    transport_cache: bool
    transport_cache_size: int
    transport_overflow: str
    transport_idle_timeout: float
    transport_max_lifetime: float
    send_timeout: float
    max_sends_per_cell: int
    max_stuck_sends: int
    breaker_failures: int
    breaker_reset_after: float
    mode: str
    nova_cell_cache: bool
    db_connection: bool
    healthcheck_max_cells_down: int
    scrub_loggers: tuple[str, ...]
    scrub_loggers_except: tuple[str, ...]


def load(conf: cfg.ConfigOpts, paste: Mapping[str, Any]) -> Settings:
    """Make the settings of one filter.

    :param conf: the configuration of the service; the options are
        registered on it, nothing else is changed
    :param paste: the section of the filter: strings, or from Python also
        values of the type of the option
    :raises ConfigurationError: an option is unknown or has a bad value; it
        names the option and what is accepted, and shows no value
    """
    register(conf)
    for name in paste:
        if name not in _BY_NAME:
            raise ConfigurationError(_unknown(name))
    values: dict[str, Any] = {}
    for name, opt in _BY_NAME.items():
        if name in paste:
            values[name] = _from_paste(opt, paste[name])
        else:
            values[name] = _from_conf(conf, opt)
    # Lists are not hashable.
    for name, value in values.items():
        if isinstance(value, list):
            values[name] = tuple(value)
    return Settings(**values)


# oslo.config's numbers convert an empty string to None.
_EMPTY = " (it is empty)"
_WRONG_TYPE = " (of a type that it does not take)"


def _from_paste(opt: cfg.Opt, given: Any) -> Any:
    problem = _WRONG_TYPE
    if may_be(opt.type, given):
        problem = _EMPTY
        try:
            value = opt.type(given)
            if value is not None:
                return value
        except (ValueError, TypeError, OverflowError) as error:
            problem = _reason(opt, error)
    raise ConfigurationError(
        f"cellmw: paste option {opt.name} has a bad value{problem}; "
        f"accepted: {accepted(opt.type)}"
    )


def _from_conf(conf: cfg.ConfigOpts, opt: cfg.Opt) -> Any:
    problem = _EMPTY
    try:
        value = conf[GROUP][opt.name]
        if value is not None:
            return value
    except (cfg.Error, ValueError, TypeError) as error:
        problem = _reason(opt, error)
    raise ConfigurationError(
        f"cellmw: option {opt.name} in [{GROUP}] has a bad value{problem}; "
        f"accepted: {accepted(opt.type)}"
    )


def _reason(opt: cfg.Opt, error: Exception) -> str:
    # Only the errors of these types are known not to quote the value, which
    # may be a connection string under the wrong name.
    if isinstance(opt.type, Patterns) and isinstance(error, ValueError):
        text = str(error)
        for known in ("holds no pattern", "has no group"):
            if known in text:
                return f" ({text[text.index(known) :]})"
        return " (not a regular expression)"
    return ""


def _unknown(name: str) -> str:
    known = [*_BY_NAME, *PASTE_SOURCE_OPTIONS, PASTE_DATABASE_OPTION]
    # All names are in lower case.
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0)[0]
    # A connection string on a line of its own looks like a name.
    shown = redaction.one_line(redaction.scrub(name))
    return (
        f"cellmw: unknown paste option {shown!r}; the nearest known one is "
        f"{near} (known: {', '.join(sorted(known))})"
    )
