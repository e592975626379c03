# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The options of ``[cellmw]``, and the settings that they become.

An option may stand in the service's configuration or in the filter's paste
section, where it wins.  Both are read, converted and checked once, when the
filter is loaded; what is left is a :class:`Settings`, which nothing changes.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import threading
from collections.abc import Mapping
from typing import Any

from oslo_config import cfg, types

from cellmw import instance_path, redaction
from cellmw.exceptions import ConfigurationError

GROUP = "cellmw"

PASTE_SOURCE_OPTIONS = (
    "oslo_config_project",
    "oslo_config_file",
    "oslo_config_dir",
    "oslo_config_program",
)
PASTE_DATABASE_OPTION = "api_database_connection"


class _Seconds(types.Float):
    """A number of seconds that a thread can wait."""

    def __init__(self, *, above_zero: bool = False) -> None:
        # The sample would publish a minimum of 0 as one that is accepted.
        least = None if above_zero else 0
        name = "seconds, above 0" if above_zero else "seconds"
        super().__init__(min=least, type_name=name)
        self.above_zero = above_zero

    def __call__(self, value: Any) -> float | None:
        number: float | None = super().__call__(value)
        if number is not None:
            if not math.isfinite(number):
                raise ValueError("is not finite")
            if self.above_zero and number <= 0:
                raise ValueError("must be above 0")
            if number > threading.TIMEOUT_MAX:
                raise ValueError("is too long")
        return number


class _Patterns(types.ConfigType):
    """Regular expressions, one a line."""

    def __init__(self) -> None:
        super().__init__(type_name="regular expressions, one a line")

    def __call__(self, value: Any) -> tuple[str, ...]:
        lines = value.splitlines() if isinstance(value, str) else value
        patterns = tuple(line.strip() for line in lines if line.strip())
        if not patterns:
            raise ValueError("holds no pattern")
        for pattern in patterns:
            instance_path.compile_pattern(pattern)
        return patterns

    def _formatter(self, value: Any) -> str:
        return "\n".join(value)

    def __repr__(self) -> str:
        return "Patterns"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    # As Python says that something cannot be hashed.
    __hash__ = None  # type: ignore[assignment]


class _Key(types.String):
    """A string that is not empty."""

    def __call__(self, value: Any) -> str:
        text: str = super().__call__(value)
        if not text:
            raise ValueError("is empty")
        return text


OPTS: list[cfg.Opt] = [
    cfg.Opt(
        "context_key",
        type=_Key(),
        default="cellmw.context",
        help="Key of the WSGI environ under which the request context "
        "stands. A context already there is used, whatever its class; else "
        "one is made from the environ and stored there.",
    ),
    cfg.Opt(
        "instance_path_patterns",
        type=_Patterns(),
        default=instance_path.DEFAULT_PATTERNS,
        help="Regular expressions, one a line, each with a group "
        "instance_uuid. The filter tries them in their order at the beginning "
        "of PATH_INFO, as the server decoded it; SCRIPT_NAME is not part of "
        "that. The default matches the instance routes of the compute API. An "
        "API that serves instances under /v1/boxes would set "
        r"/v1/boxes/(?P<instance_uuid>[^/]+)(?:/[^/]+)*/?\Z instead. Write "
        "each $ as $$.",
    ),
    cfg.ListOpt(
        "allowed_remote_exmods",
        default=[],
        help="Modules whose exceptions may come back from a cell. The "
        "exceptions of other modules arrive as RemoteError.",
    ),
    cfg.StrOpt(
        "on_lookup_failure",
        default="fail",
        choices=[
            ("fail", "answer 503"),
            (
                "pass",
                "let the request go on with an mq_connection that refuses "
                "to send",
            ),
        ],
        help="What becomes of a request while the API database cannot be "
        "asked and nothing is remembered of its instance.",
    ),
    cfg.StrOpt(
        "on_no_cell",
        default="none",
        choices=[
            (
                "none",
                "mq_connection is None, so that messages of clients that "
                "follow the context go to the default queue",
            ),
            ("refuse", "mq_connection refuses to send"),
        ],
        help="What a request gets whose instance has no mapping, or a mapping "
        "with no cell yet.",
    ),
    cfg.Opt(
        "lookup_timeout",
        type=_Seconds(above_zero=True),
        default=5.0,
        help="Longest that a request waits for the API database, in "
        "seconds, connecting and waiting in line included.",
    ),
    cfg.IntOpt(
        "lookup_concurrency",
        default=8,
        min=1,
        help="Most queries to the API database at once in one process.",
    ),
    cfg.Opt(
        "cell_refresh_interval",
        type=_Seconds(),
        default=10.0,
        help="Seconds for which the known cell mappings are taken as current.",
    ),
    cfg.Opt(
        "instance_cache_ttl",
        type=_Seconds(),
        default=30.0,
        help="Seconds for which an instance's cell is remembered. 0: never.",
    ),
    cfg.StrOpt(
        "instance_cache_for",
        default="safe",
        choices=[
            ("safe", "GET, HEAD and OPTIONS; other methods ask each time"),
            ("all", "every method"),
        ],
        help="Which requests may use what is remembered of an instance. A "
        "message that changes something must not go to a cell that the "
        "instance has left.",
    ),
    cfg.IntOpt(
        "instance_cache_size",
        default=100000,
        min=1,
        help="Most instances remembered in one process.",
    ),
    cfg.BoolOpt(
        "transport_cache",
        default=True,
        help="Keep the transports of cells open for later requests. If "
        "not, one is opened for each request that sends, and closed when "
        "its response ends.",
    ),
    cfg.IntOpt(
        "transport_cache_size",
        default=128,
        min=1,
        help="Most transports kept open in one process.",
    ),
    cfg.StrOpt(
        "transport_overflow",
        default="open",
        choices=[
            ("open", "open one for the one request"),
            ("refuse", "refuse to send (CellBusy)"),
        ],
        help="What becomes of a message when as many transports as "
        "transport_cache_size are all in use.",
    ),
    cfg.Opt(
        "transport_idle_timeout",
        type=_Seconds(),
        default=600.0,
        help="Seconds unused before a cached transport is closed.",
    ),
    cfg.Opt(
        "transport_max_lifetime",
        type=_Seconds(),
        default=3600.0,
        help="Seconds before a cached transport is replaced by a new one; "
        "up to a tenth less, by chance, so that not all are replaced at "
        "once. 0: never.",
    ),
    cfg.Opt(
        "send_timeout",
        type=_Seconds(above_zero=True),
        default=10.0,
        help="Longest that delivering one message to a cell may hold a "
        "request's thread, in seconds. Waiting for a reply has its own "
        "timeout.",
    ),
    cfg.IntOpt(
        "max_sends_per_cell",
        default=64,
        min=1,
        help="Most messages being delivered in one cell at once in one "
        "process. One more waits within its send_timeout, and is refused "
        "then (CellBusy). Awaiting a reply holds no place.",
    ),
    cfg.IntOpt(
        "max_stuck_sends",
        default=256,
        min=1,
        help="Threads that may be stuck with brokers that do not answer, in "
        "one process, all cells together. Messages to cells that do not "
        "answer are refused at once then (CellBusy).",
    ),
    cfg.IntOpt(
        "breaker_failures",
        default=5,
        min=0,
        help="Failures to deliver in a row after which a cell is taken as "
        "down. 0: never.",
    ),
    cfg.Opt(
        "breaker_reset_after",
        type=_Seconds(),
        default=30.0,
        help="Seconds before one trial message is let through to a cell "
        "that is marked down.",
    ),
    cfg.StrOpt(
        "mode",
        default="route",
        choices=[
            ("route", "give each request the queue of its instance's cell"),
            (
                "observe",
                "look up, leave the request and its context alone, and "
                "count whether the handler had the same cell on its context",
            ),
        ],
        help="What the filter does with requests. With observe no request "
        "waits for the API database, and nova_cell_cache and db_connection "
        "have no effect.",
    ),
    cfg.BoolOpt(
        "nova_cell_cache",
        default=False,
        help="For Nova: its handlers, which target cells themselves, also "
        "send through this package. Loading the filter puts a mapping of "
        "ours in the place of nova.context.CELL_CACHE.",
    ),
    cfg.BoolOpt(
        "db_connection",
        default=False,
        help="Also set db_connection on the context: oslo.db's transaction "
        "context manager for the database of the request's cell, made with "
        "the options in [database]. None where the cell mapping names no "
        "database.",
    ),
    cfg.IntOpt(
        "healthcheck_max_cells_down",
        default=0,
        min=0,
        help="The health check fails when more cells than this are taken "
        "as down. 0: it never does for cells.",
    ),
    cfg.ListOpt(
        "scrub_loggers",
        default=[],
        help="Names of the loggers whose records lose their secrets, with "
        "all loggers below them. Empty: all loggers. A process scrubs what "
        "any of its filters scrubs, and always the loggers of cellmw.",
    ),
    cfg.ListOpt(
        "scrub_loggers_except",
        default=[],
        help="Names of loggers whose records are left alone, with all "
        "loggers below them.",
    ),
]

_BY_NAME: dict[str, cfg.Opt] = {opt.name: opt for opt in OPTS}


# Those of oslo.db's options that reading the API database takes.
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
    """Register the options on a configuration; may be called again."""
    conf.register_opts(OPTS, group=GROUP)


def scrubbed_loggers(conf: cfg.ConfigOpts) -> tuple[list[str], list[str]]:
    """Read which loggers are scrubbed, and which of them are not."""
    register(conf)
    names = ("scrub_loggers", "scrub_loggers_except")
    chosen, left_out = (list(_from_conf(conf, _BY_NAME[n])) for n in names)
    return chosen, left_out


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The options of one filter, converted and checked.

    Durations are in seconds.  Hashable; two that are equal behave alike.
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

    :param conf: the service's configuration; only read, but for
        registering the options
    :param paste: the filter's own section: strings, and from Python also
        values of an option's own type
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
    # As the compiled pattern does not go into Settings, neither do lists.
    for name, value in values.items():
        if isinstance(value, list):
            values[name] = tuple(value)
    return Settings(**values)


# What oslo.config's numbers make None of.
_EMPTY = " (it is empty)"
_WRONG_TYPE = " (of a type that it does not take)"


def _from_paste(opt: cfg.Opt, given: Any) -> Any:
    problem = _WRONG_TYPE
    if _may_be(opt.type, given):
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


def _may_be(kind: types.ConfigType, given: Any) -> bool:
    """Whether a value is a string, or of the type that strings become.

    oslo.config's types take ``str()`` of anything, or fail in ways of their
    own.
    """
    if isinstance(given, str):
        return True
    if isinstance(kind, (_Patterns, types.List)):
        return isinstance(given, (list, tuple)) and all(
            isinstance(item, str) for item in given
        )
    if isinstance(given, bool) or isinstance(kind, types.Boolean):
        return isinstance(given, bool) and isinstance(kind, types.Boolean)
    if isinstance(kind, types.Integer):
        return isinstance(given, int)
    return isinstance(kind, _Seconds) and isinstance(given, (int, float))


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
    # Only these types' messages are known to quote no value: somebody may
    # have put a connection string under the wrong name.
    if isinstance(opt.type, _Patterns) and isinstance(error, ValueError):
        text = str(error)
        for known in ("holds no pattern", "has no group"):
            if known in text:
                return f" ({text[text.index(known) :]})"
        return " (not a regular expression)"
    return ""


def accepted(kind: types.ConfigType) -> str:
    """What values an option of this type takes, in words."""
    if isinstance(kind, _Patterns):
        return (
            "regular expressions, one a line, each with a group "
            f"(?P<{instance_path.GROUP}>...)"
        )
    if isinstance(kind, _Key):
        return "a string that is not empty"
    if isinstance(kind, _Seconds):
        bound = "above 0" if kind.above_zero else "0 or more"
        most = int(threading.TIMEOUT_MAX)
        return f"a number of seconds, {bound}, at most {most}"
    if isinstance(kind, types.Number):
        return _accepted_number(kind)
    if isinstance(kind, types.Boolean):
        return "true or false"
    if isinstance(kind, types.List):
        return "names, separated by commas"
    assert isinstance(kind, types.String)
    return " or ".join(kind.choices or ()) or "a string"


def _accepted_number(kind: types.Number) -> str:
    what = "a whole number" if isinstance(kind, types.Integer) else "a number"
    if kind.min is None:
        return what if kind.max is None else f"{what}, at most {kind.max}"
    bound = "or more" if kind.max is None else f"to {kind.max}"
    return f"{what}, {kind.min} {bound}"


def _unknown(name: str) -> str:
    known = [*_BY_NAME, *PASTE_SOURCE_OPTIONS, PASTE_DATABASE_OPTION]
    # Every name is in lower case.
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0)[0]
    # A connection string that stands on a line of its own looks like one.
    shown = redaction.one_line(redaction.scrub(name))
    return (
        f"cellmw: unknown paste option {shown!r}; the nearest known one is "
        f"{near} (known: {', '.join(sorted(known))})"
    )
