# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Adds the statistics of a process to the metrics."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import prometheus_client

from cellmw import redaction, runtime
from cellmw.durations import Durations
from cellmw.metrics.definitions import Metrics
from cellmw.process import Process
from cellmw.transports.pool import CellTransports

# The shared label of the cells beyond max_cells, and its default.
OTHER = "_other"
# The label if the cell is unknown.
NO_CELL = "_none"
MAX_CELLS = 200

# Seconds between two updates for the pages of other processes.
INTERVAL = 5.0


class _Labels:
    """The labels of cells, a limited number.

    Names of cells are not unique: cells of one name are counted together.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._given: set[str] = set()
        self._of: dict[str, tuple[str, str]] = {}

    def of(self, cell_uuid: str, cell_name: str | None = None) -> str:
        """The label of a cell; without a name, its last one."""
        text = cell_name or cell_uuid
        known = self._of.get(cell_uuid)
        if known is not None and (cell_name is None or known[0] == text):
            return known[1]
        label = redaction.one_line(redaction.scrub(text), 100)
        if label not in self._given:
            if len(self._given) < self._most:
                self._given.add(label)
            else:
                label = OTHER
        self._of[cell_uuid] = (text, label)
        return label


_Key = tuple[Any, tuple[str, ...]]


class Recorder:
    """Updates the metrics of this process.  Thread-safe.

    :param max_cells: most cells with a label of their own
    """

    def __init__(self, max_cells: int = MAX_CELLS) -> None:
        self.metrics = Metrics()
        self._labels = _Labels(max_cells)
        self._lock = threading.Lock()
        # The last value of each source, and the values of this update.  A
        # source without a value in an update is dropped.
        self._counted: dict[tuple[str, _Key], float] = {}
        self._counts: dict[tuple[str, _Key], float] = {}
        self._observed: dict[tuple[str, _Key], Durations] = {}
        self._durations: dict[tuple[str, _Key], Durations] = {}
        # The sums added so far, by runtime and metric.
        self._added: dict[tuple[int, Any], float] = {}
        # Gauges with a value.  A gauge without one in an update becomes 0.
        self._shown: dict[_Key, float] = {}
        self._gauges: dict[_Key, float] = {}
        self._recorded_at: float | None = None

    def record(self) -> None:
        """Add the changes since the last update."""
        with self._lock:
            self._gauges = dict.fromkeys(self._shown, 0.0)
            self._counts, self._durations = {}, {}
            for process in _processes():
                self._record_cells(process)
                self._record_refusals(process)
                self._record_lookups(process)
                self._gauge(
                    self.metrics["worker_threads"], len(process.workers)
                )
            for key, value in self._gauges.items():
                if self._shown.get(key) != value:
                    _child(key).set(value)
            self._shown = self._gauges
            self._counted, self._observed = self._counts, self._durations
            self._recorded_at = time.monotonic()

    def record_now_and_then(self) -> None:
        """Update unless the last update is recent."""
        at = self._recorded_at
        if at is None or time.monotonic() - at >= INTERVAL:
            self.record()

    def _record_cells(self, process: Process) -> None:
        metrics = self.metrics
        # The pool first: the guard of each cell with a transport then exists
        # and knows the name of the cell.
        pool = process.pool.stats()
        for stats in process.guards.stats():
            cell = self._labels.of(stats.cell_uuid, stats.cell_name)
            source = f"{process.runtime_id} {stats.cell_uuid}"
            self._gauge(metrics["cell_down"], stats.down, cell)
            self._gauge(metrics["sends_under_way"], stats.under_way, cell)
            self._gauge(metrics["sends_waiting"], stats.waiting, cell)
            self._gauge(metrics["threads_stuck"], stats.stuck, cell)
            for metric, value, *labels in (
                (metrics["sends"], stats.sent),
                (metrics["send_failures"], stats.failed),
                (metrics["cell_went_down"], stats.went_down),
                (metrics["send_rejections"], stats.refused_down, "down"),
                (metrics["send_rejections"], stats.refused_busy, "busy"),
            ):
                self._count(source, metric, value, cell, *labels)
            took = metrics["send_duration_seconds"]
            self._observe(source, took, stats.casts, cell, "cast")
            self._observe(source, took, stats.calls, cell, "call")
        self._gauge(metrics["transport_closes_hanging"], pool.hanging)
        for cell_uuid, transports in pool.cells.items():
            cell = self._labels.of(cell_uuid)
            self._gauge(metrics["transports_open"], transports.open, cell)
            self._gauge(metrics["transports_leased"], transports.leased, cell)
            self._gauge(
                metrics["transports_draining"], transports.draining, cell
            )
            source = f"{process.runtime_id} {cell_uuid}"
            for of_cell, count in self._counts_of(transports):
                added = self._count(source, of_cell, count, cell)
                self._note_added(process, of_cell, added)
        # The pool drops the counts of cells that are long unused, but keeps
        # them in its total.  The difference goes to the shared label.
        for of_all, count in self._counts_of(pool.total):
            self._count_rest(process, of_all, count)

    def _record_refusals(self, process: Process) -> None:
        for cell_uuid, cell_name, reason, count in process.refusals.counts():
            label = (
                self._labels.of(cell_uuid, cell_name) if cell_uuid else NO_CELL
            )
            source = f"{process.runtime_id} {cell_uuid}"
            self._count(source, self.metrics["refusals"], count, label, reason)

    def _counts_of(
        self, transports: CellTransports
    ) -> Iterator[tuple[object, float]]:
        metrics = self.metrics
        yield metrics["leases"], transports.acquired
        yield metrics["transport_opens"], transports.opened
        yield metrics["transport_open_failures"], transports.failed
        yield metrics["transport_closes"], transports.closed
        yield metrics["transport_closes_hung"], transports.hung
        yield metrics["transport_evictions"], transports.evicted
        yield metrics["transports_over_limit"], transports.over_limit
        yield metrics["transport_refusals"], transports.refused

    def _count_rest(
        self, process: Process, metric: object, total: float
    ) -> None:
        rest = total - self._added.get((process.runtime_id, metric), 0.0)
        if rest > 0:
            _child((metric, (OTHER,))).inc(rest)
            self._note_added(process, metric, rest)

    def _note_added(
        self, process: Process, metric: object, number: float
    ) -> None:
        key = (process.runtime_id, metric)
        self._added[key] = self._added.get(key, 0.0) + number

    def _record_lookups(self, process: Process) -> None:
        metrics = self.metrics
        stats = process.directory.stats()
        self._gauge(metrics["database_questions_out"], stats.queries_running)
        self._gauge(
            metrics["database_questions_waiting"], stats.queries_queued
        )
        self._gauge(metrics["database_unreachable"], not stats.reachable)
        self._gauge(metrics["instances_remembered"], stats.instances)
        self._gauge_most(
            metrics["cells_age_seconds"], stats.snapshot_age or 0.0
        )
        source = str(process.runtime_id)
        for metric, value, *labels in (
            (metrics["lookups"], stats.hits, "memory"),
            (metrics["lookups"], stats.misses, "database"),
            (metrics["lookup_failures"], stats.failures),
        ):
            self._count(source, metric, value, *labels, exact=False)
        for result, count in process.observer.counts().items():
            self._count(source, metrics["observed"], count, result)
        took = metrics["database_question_duration_seconds"]
        self._observe(source, took, stats.durations)

    def _gauge(self, metric: object, value: float, *labels: str) -> None:
        key = (metric, labels)
        self._gauges[key] = self._gauges.get(key, 0.0) + value

    def _gauge_most(self, metric: object, value: float) -> None:
        key: _Key = (metric, ())
        self._gauges[key] = max(self._gauges.get(key, 0.0), value)

    def _count(
        self,
        source: str,
        metric: object,
        value: float,
        *labels: str,
        exact: bool = True,
    ) -> float:
        """Count up to a value.

        :param exact: a value that is less than before began anew, as that of
            a cell which was forgotten.  If not, it was counted without a
            lock, and some were lost.
        :returns: how much was added
        """
        key = (metric, labels)
        before = self._counted.get((source, key), 0.0)
        if value < before:
            if not exact:
                value = before
            else:
                before = 0.0
        self._counts[source, key] = value
        if value > before:
            _child(key).inc(value - before)
        return value - before

    def _observe(
        self,
        source: str,
        metric: prometheus_client.Histogram,
        durations: Durations,
        *labels: str,
    ) -> None:
        """Add durations that are already in buckets.

        prometheus_client's public way takes one duration at a time.
        """
        key = (metric, labels)
        before = self._observed.get((source, key), Durations())
        if sum(durations.counts) < sum(before.counts):
            before = Durations()
        self._durations[source, key] = durations
        if durations == before:
            return
        child = _child(key)
        for bucket, now, then in zip(
            child._buckets, durations.counts, before.counts, strict=True
        ):
            if now > then:
                bucket.inc(now - then)
        child._sum.inc(max(0.0, durations.total - before.total))


def _child(key: _Key) -> Any:
    metric, labels = key
    return metric.labels(*labels) if labels else metric


def _processes() -> Iterator[Process]:
    """The live runtimes of this process."""
    for found in runtime.registry():
        process = found.current
        if process is not None and process.pid == os.getpid():
            yield process
