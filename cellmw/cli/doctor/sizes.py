# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""How many connections and threads a service's processes will need."""

from __future__ import annotations

import dataclasses
import resource
from collections.abc import Iterator

import oslo_messaging.opts
import sqlalchemy as sa
from oslo_config import cfg

from cellmw.cells import engines
from cellmw.cli import base
from cellmw.cli.doctor.findings import Finding, ok, warn
from cellmw.transports import url_options

_MOST = {
    "mysql": "SELECT @@GLOBAL.max_connections",
    "mariadb": "SELECT @@GLOBAL.max_connections",
    "postgresql": "SELECT current_setting('max_connections')",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What one process needs at most while all of its threads are busy.

    :ivar for_cell: connections to the broker of one cell: one for each
        message that is being delivered, and one for replies
    :ivar cells: cells with an open transport
    :ivar database: connections to the API database
    :ivar threads: each connection to a broker has one
    """

    for_cell: int
    cells: int
    database: int
    threads: int

    @property
    def to_brokers(self) -> int:
        """Connections to the brokers of all cells."""
        return self.for_cell * self.cells

    @property
    def sockets(self) -> int:
        """Connections of the process."""
        return self.to_brokers + self.database


def of_process(
    configuration: base.Configuration, cells: int, threads: int
) -> Sizes:
    """The sizes of one process.

    :param cells: how many have a queue
    :param threads: that serve requests in one process
    """
    conf, settings = configuration.conf, configuration.settings
    for group, known in oslo_messaging.opts.list_opts():
        if group == url_options.RABBIT:
            conf.register_opts(known, group=group)
    pool = _number(conf, url_options.RABBIT, "rpc_conn_pool_size")
    sending = min(threads, settings.max_sends_per_cell, pool)
    open_cells = min(cells, settings.transport_cache_size)
    if not settings.transport_cache:
        open_cells = min(cells, threads)
    queries = settings.lookup_concurrency
    at_most = max(
        queries, _number(conf, engines.GROUP, "max_pool_size")
    ) + _number(conf, engines.GROUP, "max_overflow")
    to_brokers = (sending + 1) * open_cells
    return Sizes(
        for_cell=sending + 1,
        cells=open_cells,
        database=min(queries, at_most),
        threads=threads + to_brokers + queries,
    )


def _number(conf: cfg.ConfigOpts, group: str, name: str) -> int:
    try:
        return int(conf[group][name])
    except (cfg.Error, ValueError, TypeError):
        return 1  # it is wrong, which another check tells


def check(
    configuration: base.Configuration,
    cells: int,
    processes: int,
    threads: int,
) -> Iterator[Finding]:
    """What so many processes need, and whether there is so much."""
    one = of_process(configuration, cells, threads)
    name = "connections and threads"
    yield ok(
        name,
        f"processes: {processes} (--processes), threads in each: {threads} "
        f"(--threads), cells with a queue: {cells}. Each cell's broker gets "
        f"up to {processes * one.for_cell} connections ({one.for_cell} from "
        f"each process), all brokers together {processes * one.to_brokers}, "
        f"the API database {processes * one.database}. A process has up to "
        f"{one.sockets} of these connections and {one.threads} threads",
    )
    settings = configuration.settings
    if settings.transport_cache and cells > settings.transport_cache_size:
        yield warn(
            name,
            f"{cells} cells have a queue, and a process keeps "
            f"{settings.transport_cache_size} transports "
            "(transport_cache_size), so it closes and opens them in turn",
            f"set transport_cache_size to {cells} or more",
        )
    # Those of this shell; the service may have others.
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and one.sockets > files:
        yield warn(
            name,
            f"a process may have {one.sockets} connections, and this shell "
            f"allows {files} open files",
            "raise the limit of the service: LimitNOFILE in systemd, ulimit "
            "-n in a shell",
        )
    yield from _database(configuration, name, processes * one.database)


def _database(
    configuration: base.Configuration, name: str, wanted: int
) -> Iterator[Finding]:
    statement = _MOST.get(configuration.engine.name)
    if statement is None:
        return
    try:
        with configuration.engine.connect() as connection:
            most = int(connection.execute(sa.text(statement)).scalar_one())
    except Exception:
        return  # whether it can be asked, another check tells
    if wanted > most:
        yield warn(
            name,
            f"the API database may get {wanted} connections, and it allows "
            f"{most} to all of its clients (max_connections)",
            "raise max_connections there, lower lookup_concurrency, or use "
            "fewer processes",
        )
