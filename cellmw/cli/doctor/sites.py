# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Checks of what a service connects to: the API database and the cells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import sqlalchemy as sa

from cellmw import exceptions, redaction
from cellmw.cells import engines, urls
from cellmw.cells.mapping import CellMapping
from cellmw.cli import base, check
from cellmw.cli.doctor.findings import Finding, fail, ok, warn

_DATABASE = "API database"
# An instance that nobody has: the question is what matters.
_NOBODY = "00000000-0000-0000-0000-000000000000"
_UPDATE = "cellmw-manage cell update {} --transport-url -"


def database(configuration: base.Configuration) -> Iterator[Finding]:
    """Whether the API database lets us in and may be read."""
    try:
        configuration.engine.connect().close()
    except Exception as error:
        yield fail(
            _DATABASE,
            _told(configuration, error),
            f"start the server, or correct connection in [{engines.GROUP}]; "
            "requests for instances get 503 until then",
        )
        return
    url = configuration.engine.url
    shown = redaction.redact_url(url.render_as_string(hide_password=True))
    yield ok(_DATABASE, f"{shown} lets the service in")
    try:
        configuration.cells()
        yield ok(_DATABASE, "cell_mappings can be read")
    except Exception as error:
        yield _unreadable(configuration, error, "cell_mappings")
    try:
        configuration.store.cell_of(_NOBODY)
        yield ok(_DATABASE, "instance_mappings can be read")
    except Exception as error:
        yield _unreadable(configuration, error, "instance_mappings")


def known_cells(
    configuration: base.Configuration,
) -> list[CellMapping] | None:
    """All cell mappings; None: they cannot be read."""
    if "engine" not in vars(configuration):
        return None  # the database refused before: do not wait again
    try:
        return configuration.cells()
    except Exception:
        return None  # the check of the database reports why


def _told(configuration: base.Configuration, error: Exception) -> str:
    if isinstance(error, (base.Failed, exceptions.CellMWError)):
        return str(error)
    return base.about_database(configuration, error)


def _unreadable(
    configuration: base.Configuration, error: Exception, table: str
) -> Finding:
    engine = configuration.engine
    try:
        is_there = sa.inspect(engine).has_table(table)
    except Exception:
        is_there = True  # MariaDB does not tell a user who may not read it
    if not is_there:
        return fail(
            _DATABASE,
            f"it has no table {table}",
            "correct the name of the database in connection in "
            f"[{engines.GROUP}], or make the tables with nova-manage api_db "
            "sync, or with cellmw-manage db sync",
        )
    name = engine.url.database
    table = f"{name}.{table}" if engine.name in ("mysql", "mariadb") else table
    return fail(
        _DATABASE,
        f"{table} cannot be read: {_told(configuration, error)}",
        "let the service's database user read it: GRANT SELECT ON "
        f"{table} TO that user",
    )


def cells(
    configuration: base.Configuration,
    known: Sequence[CellMapping],
    timeout: float,
) -> Iterator[Finding]:
    """Each cell's URL and broker, tried as a request would."""
    if not known:
        yield warn(
            "cells",
            "there is no cell mapping, so no request gets a message queue",
            "add the cells with cellmw-manage cell create, or with "
            "nova-manage cell_v2 create_cell",
        )
    for cell, finding, _ in check.Attempts(configuration, timeout).run(known):
        yield _broker(cell, finding)
    yield from _shared(configuration, known)


def _named(cell: CellMapping) -> str:
    return (
        f"cell {cell.name} ({cell.uuid})"
        if cell.name
        else (f"cell {cell.uuid}")
    )


def _broker(cell: CellMapping, finding: check.Finding) -> Finding:
    name, update = _named(cell), _UPDATE.format(cell.uuid)
    note = "; it is disabled, and still receives messages"
    note = note if cell.disabled else ""
    if finding.state == "reachable":
        return ok(name, f"its broker can be reached{note}")
    if finding.good:
        return ok(name, f"{finding.state}: {finding.detail}{note}")
    if finding.state == "misconfigured":
        return fail(
            name,
            f"its mapping cannot be used: {finding.detail}{note}",
            f"correct it with '{update}'; messages to it are refused",
        )
    if finding.state == "not tried":
        return warn(
            name,
            f"its broker was not tried: {finding.detail}{note}",
            "send a message to an instance in this cell",
        )
    return fail(
        name,
        f"its broker cannot be reached: {finding.detail}{note}",
        _how_to_reach(finding.detail, update),
    )


def _how_to_reach(detail: str, update: str) -> str:
    if "ACCESS_REFUSED" in detail or "AccessRefused" in detail:
        return f"correct user and password with '{update}', or on the broker"
    if "NOT_ALLOWED" in detail or "NotAllowed" in detail:
        return (
            "see on the broker that the virtual host is there and the user "
            "may use it (rabbitmqctl add_vhost, set_permissions), and that "
            "no limit of connections is reached; or correct the URL with "
            f"'{update}'"
        )
    return (
        "start the broker, let this machine through its firewall, or correct "
        f"host, port and TLS options with '{update}'"
    )


def _shared(
    configuration: base.Configuration, known: Sequence[CellMapping]
) -> Iterator[Finding]:
    """Cells whose messages would end in each other's queues."""
    first: dict[urls.Broker, CellMapping] = {}
    for cell in known:
        generation = configuration.expand(cell).generation
        if generation is None:
            continue
        broker = urls.broker_of(generation.url.reveal())
        other = first.setdefault(broker, cell)
        if other is not cell:
            yield warn(
                _named(cell),
                "it has the broker and virtual host of "
                f"{_named(other)}, so each gets the other's messages",
                "give each cell a virtual host of its own",
            )
