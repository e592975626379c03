# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Which metrics there are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import prometheus_client
from prometheus_client import CollectorRegistry, values
from prometheus_client.metrics_core import Metric

from cellmw.durations import BOUNDS


def is_shared() -> bool:
    """Whether the numbers of all processes are brought together."""
    # What prometheus_client has found when it was imported counts.
    return bool(values.ValueClass._multiprocess)


class Metrics:
    """The metrics themselves, in prometheus_client's hands."""

    def __init__(self) -> None:
        self._registry = None if is_shared() else CollectorRegistry()
        # Messages
        self.sends = self._counter(
            "sends", "Messages that the broker of a cell took.", "cell"
        )
        self.failures = self._counter(
            "send_failures",
            "Messages that were not delivered, or perhaps not.",
            "cell",
        )
        self.rejections = self._counter(
            "send_rejections",
            "Messages refused without asking the broker.",
            "cell",
            "reason",
        )
        self.refusals = self._counter(
            "refusals",
            "Refusals and failures to deliver, as they are logged.",
            "cell",
            "reason",
        )
        self.send_seconds = self._histogram(
            "send_duration_seconds",
            "How long messages took; of calls, the reply included.",
            "cell",
            "kind",
        )
        self.down = self._gauge(
            "cell_down", "Processes that take the cell as down.", "cell"
        )
        self.went_down = self._counter(
            "cell_went_down", "How often a cell was marked down.", "cell"
        )
        self.under_way = self._gauge(
            "sends_under_way", "Messages being delivered.", "cell"
        )
        self.waiting = self._gauge(
            "sends_waiting", "Messages that wait in line.", "cell"
        )
        self.stuck = self._gauge(
            "threads_stuck",
            "Threads that have not come back from a cell's broker.",
            "cell",
        )
        # Transports
        self.leases = self._counter(
            "leases", "Leases of a cell's transport by requests.", "cell"
        )
        self.leased = self._gauge(
            "transports_leased", "Transports that are in use.", "cell"
        )
        self.transports = self._gauge(
            "transports_open", "Transports that are open.", "cell"
        )
        self.draining = self._gauge(
            "transports_draining", "Open transports nobody new gets.", "cell"
        )
        self.opens = self._counter(
            "transport_opens", "Transports opened.", "cell"
        )
        self.open_failures = self._counter(
            "transport_open_failures",
            "Transports that could not be opened.",
            "cell",
        )
        self.closes = self._counter(
            "transport_closes", "Transports closed.", "cell"
        )
        self.hung = self._counter(
            "transport_closes_hung",
            "Closes of transports that exceeded their budget.",
            "cell",
        )
        self.evictions = self._counter(
            "transport_evictions",
            "Transports closed to make room for another cell's.",
            "cell",
        )
        self.over_limit = self._counter(
            "transports_over_limit",
            "Transports opened beyond the limit, for one request.",
            "cell",
        )
        self.no_room = self._counter(
            "transport_refusals",
            "Messages refused for want of room for a transport.",
            "cell",
        )
        self.hanging = self._gauge(
            "transport_closes_hanging", "Closes that do not end."
        )
        # Lookups
        self.lookups = self._counter(
            "lookups", "Lookups of instances' cells.", "source"
        )
        self.lookup_failures = self._counter(
            "lookup_failures", "Lookups that failed."
        )
        self.observed = self._counter(
            "observed",
            "Requests observed, by how their handler's cell compared.",
            "result",
        )
        self.query_seconds = self._histogram(
            "database_question_duration_seconds",
            "Duration of queries to the API database.",
        )
        self.queries_running = self._gauge(
            "database_questions_out",
            "Queries that the API database is running.",
        )
        self.queries_queued = self._gauge(
            "database_questions_waiting",
            "Queries that wait for lookup_concurrency.",
        )
        self.unreachable = self._gauge(
            "database_unreachable",
            "Processes that could not read the cell mappings last.",
        )
        self.cells_age = self._gauge(
            "cells_age_seconds",
            "How long ago the cell mappings in use were read, at most.",
            mode="livemax",
        )
        self.instances = self._gauge(
            "instances_remembered", "Instances remembered."
        )
        # Threads
        self.workers = self._gauge(
            "worker_threads", "Threads for what may block."
        )

    def _counter(
        self, name: str, text: str, *labels: str
    ) -> prometheus_client.Counter:
        return prometheus_client.Counter(
            f"cellmw_{name}", text, labels, registry=self._registry
        )

    def _gauge(
        self,
        name: str,
        text: str,
        *labels: str,
        mode: Literal["livesum", "livemax"] = "livesum",
    ) -> prometheus_client.Gauge:
        return prometheus_client.Gauge(
            f"cellmw_{name}",
            text,
            labels,
            registry=self._registry,
            multiprocess_mode=mode,
        )

    def _histogram(
        self, name: str, text: str, *labels: str
    ) -> prometheus_client.Histogram:
        return prometheus_client.Histogram(
            f"cellmw_{name}",
            text,
            labels,
            registry=self._registry,
            buckets=BOUNDS,
        )

    def collect(self) -> Iterable[Metric]:
        """What they are now, in this process alone."""
        assert self._registry is not None
        return self._registry.collect()
