# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The definitions of the metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

import prometheus_client
from prometheus_client import CollectorRegistry, values
from prometheus_client.metrics_core import Metric

from cellmw.durations import BOUNDS


def is_shared() -> bool:
    """Whether a page shows the numbers of all processes."""
    # prometheus_client decides this when it is imported.
    return bool(values.ValueClass._multiprocess)


@dataclasses.dataclass(frozen=True, slots=True)
class Definition:
    """One metric.

    :ivar name: without the prefix ``cellmw_``
    :ivar mode: how a page adds up the gauges of several processes
    """

    name: str
    text: str
    labels: tuple[str, ...] = ()
    mode: Literal["livesum", "livemax"] = "livesum"


COUNTERS = (
    Definition(
        "sends", "Messages that the broker of a cell accepted.", ("cell",)
    ),
    Definition(
        "send_failures",
        "Messages that were not delivered, or may not have been.",
        ("cell",),
    ),
    Definition(
        "send_rejections",
        "Messages refused without asking the broker.",
        ("cell", "reason"),
    ),
    Definition(
        "refusals",
        "Refusals and failures to deliver, as they are logged.",
        ("cell", "reason"),
    ),
    Definition(
        "cell_went_down", "Times that a cell was marked down.", ("cell",)
    ),
    Definition(
        "leases", "Leases of a cell's transport by requests.", ("cell",)
    ),
    Definition("transport_opens", "Transports opened.", ("cell",)),
    Definition(
        "transport_open_failures",
        "Transports that could not be opened.",
        ("cell",),
    ),
    Definition("transport_closes", "Transports closed.", ("cell",)),
    Definition(
        "transport_closes_hung",
        "Closes of transports that exceeded their budget.",
        ("cell",),
    ),
    Definition(
        "transport_evictions",
        "Transports closed to make room for another cell's.",
        ("cell",),
    ),
    Definition(
        "transports_over_limit",
        "Transports opened for one request because the cache was full.",
        ("cell",),
    ),
    Definition(
        "transport_refusals",
        "Messages refused because the cache of transports was full.",
        ("cell",),
    ),
    Definition("lookups", "Lookups of instances' cells.", ("source",)),
    Definition("lookup_failures", "Lookups that failed."),
    Definition(
        "observed",
        "Requests observed, by how their handler's cell compared.",
        ("result",),
    ),
)

GAUGES = (
    Definition(
        "cell_down", "Processes in which the cell is marked down.", ("cell",)
    ),
    Definition("sends_under_way", "Messages being delivered.", ("cell",)),
    Definition(
        "sends_waiting",
        "Messages that wait for max_sends_per_cell.",
        ("cell",),
    ),
    Definition(
        "threads_stuck",
        "Threads that have not come back from a cell's broker.",
        ("cell",),
    ),
    Definition("transports_leased", "Transports that are in use.", ("cell",)),
    Definition("transports_open", "Transports that are open.", ("cell",)),
    Definition(
        "transports_draining",
        "Open transports that no new request gets.",
        ("cell",),
    ),
    Definition(
        "transport_closes_hanging", "Closes that have not ended in time."
    ),
    Definition(
        "database_questions_out", "Queries that the API database is running."
    ),
    Definition(
        "database_questions_waiting",
        "Queries that wait for lookup_concurrency.",
    ),
    Definition(
        "database_unreachable",
        "Processes that could not read the cell mappings last.",
    ),
    Definition(
        "cells_age_seconds",
        "How long ago the cell mappings in use were read, at most.",
        mode="livemax",
    ),
    Definition("instances_remembered", "Cached instances."),
    Definition("worker_threads", "Threads for calls that may block."),
)

HISTOGRAMS = (
    Definition(
        "send_duration_seconds",
        "Duration of messages; for calls including the reply.",
        ("cell", "kind"),
    ),
    Definition(
        "database_question_duration_seconds",
        "Duration of queries to the API database.",
    ),
)


class Metrics:
    """The metrics by name, as prometheus_client's objects."""

    def __init__(self) -> None:
        self._registry = None if is_shared() else CollectorRegistry()
        self._by_name: dict[str, Any] = {}
        for one in COUNTERS:
            self._by_name[one.name] = prometheus_client.Counter(
                f"cellmw_{one.name}",
                one.text,
                one.labels,
                registry=self._registry,
            )
        for one in GAUGES:
            self._by_name[one.name] = prometheus_client.Gauge(
                f"cellmw_{one.name}",
                one.text,
                one.labels,
                registry=self._registry,
                multiprocess_mode=one.mode,
            )
        for one in HISTOGRAMS:
            self._by_name[one.name] = prometheus_client.Histogram(
                f"cellmw_{one.name}",
                one.text,
                one.labels,
                registry=self._registry,
                buckets=BOUNDS,
            )

    def __getitem__(self, name: str) -> Any:
        """The metric with this name, without the prefix ``cellmw_``."""
        return self._by_name[name]

    def collect(self) -> Iterable[Metric]:
        """The current values of this process alone."""
        assert self._registry is not None
        return self._registry.collect()
