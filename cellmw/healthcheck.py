# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""A plugin for oslo.middleware's health check: how the cells are.

It reads what this process has found out by sending, and opens nothing.  Its
reasons are public, so they hold numbers and nothing else; which cells are
down stands in the details, which oslo.middleware shows where ``detailed`` is
set.  oslo.middleware makes it apart from the filter and does not catch what
it raises, so it raises nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator

from oslo_middleware.healthcheck import pluginbase

from cellmw import redaction, runtime
from cellmw.process import Process
from cellmw.transports.guard import GuardStats

LOG = logging.getLogger(__name__)


class CellsHealthcheck(pluginbase.HealthcheckBaseExtension):
    """Reports cells that this process takes as down.

    Enabled with ``backends = cellmw`` in oslo.middleware's section.  It is
    unhealthy only where more cells are down than
    ``healthcheck_max_cells_down``, if that is not 0.
    """

    def healthcheck(self, server_port: int) -> pluginbase.HealthcheckResult:
        """How the cells are.  Blocks for nothing; never raises."""
        try:
            return _look()
        except Exception as error:
            LOG.error(
                "The health check could not look at the cells: %s",
                redaction.describe(error),
            )
            return pluginbase.HealthcheckResult(
                available=True, reason="cellmw: the state is not known"
            )


def _look() -> pluginbase.HealthcheckResult:
    processes = list(_processes())
    if not processes:
        return pluginbase.HealthcheckResult(
            available=True, reason="cellmw: no requests served yet"
        )
    healthy = True
    down: dict[str, GuardStats] = {}
    stuck = 0
    for process in processes:
        guards = process.guards.stats()
        these = {stats.cell_uuid: stats for stats in guards if stats.down}
        most = process.settings.healthcheck_max_cells_down
        healthy = healthy and not 0 < most < len(these)
        stuck += sum(stats.stuck for stats in guards)
        down.update(these)
    known = [process.directory.stats() for process in processes]
    reason = (
        f"cellmw: {len(down)} of {max(stats.cells for stats in known)} "
        "cells down"
    )
    if not all(stats.reachable for stats in known):
        reason += ", the API database did not answer"
    return pluginbase.HealthcheckResult(
        available=healthy,
        reason=reason,
        details=_details(down.values(), stuck),
    )


def _processes() -> Iterator[Process]:
    """What is alive in this process.  Makes nothing."""
    for found in runtime.registry():
        process = found.current
        if process is not None and process.pid == os.getpid():
            yield process


def _details(down: Iterable[GuardStats], stuck: int) -> str:
    lines = [
        # By UUID: names are text of somebody's, and this becomes HTML.
        f"cell {redaction.one_line(stats.cell_uuid)} is down, "
        f"next trial in {stats.retry_after:.0f} seconds"
        for stats in down
    ]
    lines.append(f"threads stuck at brokers: {stuck}")
    return "\n".join(lines)
