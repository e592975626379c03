# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The definitions of the options in ``[cellmw]``."""

from __future__ import annotations

from oslo_config import cfg

from cellmw import instance_path
from cellmw.options.types import Key, Patterns, Seconds

OPTS: list[cfg.Opt] = [
    cfg.Opt(
        "context_key",
        type=Key(),
        default="cellmw.context",
        help="Key of the request context in the WSGI environ. A context "
        "that is already there is used, whatever its class. "
        "Otherwise the filter makes one from the environ and stores "
        "it there.",
    ),
    cfg.Opt(
        "instance_path_patterns",
        type=Patterns(),
        default=instance_path.DEFAULT_PATTERNS,
        help="Regular expressions, one per line, each with a group "
        "instance_uuid. The filter matches them in order at the beginning of "
        "PATH_INFO, as the server decoded it, without SCRIPT_NAME. "
        "The default matches the instance routes of the compute API. An "
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
        help="What happens to a request while the API database cannot be "
        "reached and the cell of its instance is not cached.",
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
        help="What a request gets if its instance has no mapping, or a "
        "mapping without a cell.",
    ),
    cfg.Opt(
        "lookup_timeout",
        type=Seconds(above_zero=True),
        default=5.0,
        help="Longest time in seconds that a request waits for the API "
        "database. It includes connecting and waiting in the queue.",
    ),
    cfg.IntOpt(
        "lookup_concurrency",
        default=8,
        min=1,
        help="Most queries to the API database that one process runs at once.",
    ),
    cfg.Opt(
        "cell_refresh_interval",
        type=Seconds(),
        default=10.0,
        help="Seconds until the known cell mappings are read again.",
    ),
    cfg.Opt(
        "instance_cache_ttl",
        type=Seconds(),
        default=30.0,
        help="Seconds for which the cell of an instance is cached. 0: never.",
    ),
    cfg.StrOpt(
        "instance_cache_for",
        default="safe",
        choices=[
            ("safe", "GET, HEAD and OPTIONS; other methods ask each time"),
            ("all", "every method"),
        ],
        help="Which requests may use the cached cell of an instance. A "
        "message that changes something must not go to a cell that "
        "the instance has left.",
    ),
    cfg.IntOpt(
        "instance_cache_size",
        default=100000,
        min=1,
        help="Most instances cached in one process.",
    ),
    cfg.BoolOpt(
        "transport_cache",
        default=True,
        help="Keep the transports of cells open for later requests. If "
        "false, each request that sends opens one, which is closed "
        "when its response ends.",
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
        help="What happens to a message when all transports that "
        "transport_cache_size allows are in use.",
    ),
    cfg.Opt(
        "transport_idle_timeout",
        type=Seconds(),
        default=600.0,
        help="Seconds without use before a cached transport is closed.",
    ),
    cfg.Opt(
        "transport_max_lifetime",
        type=Seconds(),
        default=3600.0,
        help="Seconds before a new transport replaces a cached one. A "
        "random tenth at most is subtracted, so that transports are "
        "not all replaced at once. 0: never.",
    ),
    cfg.Opt(
        "send_timeout",
        type=Seconds(above_zero=True),
        default=10.0,
        help="Longest time in seconds that delivering one message to a "
        "cell may block the thread of a request. Waiting for a reply "
        "has its own timeout.",
    ),
    cfg.IntOpt(
        "max_sends_per_cell",
        default=64,
        min=1,
        help="Most messages that one process delivers to one cell at "
        "once. A further message waits within its send_timeout, and "
        "is then refused (CellBusy). Waiting for a reply does not "
        "count.",
    ),
    cfg.IntOpt(
        "max_stuck_sends",
        default=256,
        min=1,
        help="Most threads of one process that may be stuck with brokers "
        "that do not answer, over all cells. Beyond it, messages to "
        "cells that do not answer are refused at once (CellBusy).",
    ),
    cfg.IntOpt(
        "breaker_failures",
        default=5,
        min=0,
        help="Number of consecutive delivery failures after which a cell "
        "is marked down. 0: never.",
    ),
    cfg.Opt(
        "breaker_reset_after",
        type=Seconds(),
        default=30.0,
        help="Seconds before a cell that is marked down gets one trial "
        "message.",
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
        help="For Nova, whose handlers target cells themselves: their "
        "messages go through this package too. Loading the filter "
        "replaces nova.context.CELL_CACHE by a mapping of this "
        "package.",
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
        help="The health check fails if more cells than this are marked "
        "down. 0: it does not check cells.",
    ),
    cfg.ListOpt(
        "scrub_loggers",
        default=[],
        help="Names of the loggers whose records are scrubbed, including "
        "all loggers below them. Empty: all loggers. A process "
        "scrubs the loggers of all its filters, and always those of "
        "cellmw.",
    ),
    cfg.ListOpt(
        "scrub_loggers_except",
        default=[],
        help="Names of loggers whose records are not scrubbed, including "
        "all loggers below them.",
    ),
]
