# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The page that shows the metrics, and counting in each process."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import prometheus_client
from prometheus_client import CollectorRegistry
from prometheus_client import multiprocess as _multiprocess
from prometheus_client.metrics_core import Metric

from cellmw import runtime
from cellmw.exceptions import ConfigurationError
from cellmw.metrics.definitions import is_shared
from cellmw.metrics.recorder import MAX_CELLS, Recorder

if TYPE_CHECKING:
    from _typeshed.wsgi import (
        StartResponse,
        WSGIApplication,
        WSGIEnvironment,
    )

# That module has no annotations.
multiprocess: Any = _multiprocess

_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
_LIVE_FILE = re.compile(r"gauge_live[a-z]+_(\d+)\.db\Z")


class _Here:
    """What there is once in each process."""

    def __init__(self) -> None:
        self.max_cells = MAX_CELLS
        # By process id: a lock that another thread held during a fork would
        # never be free in the child.
        self.recorders: dict[int, Recorder] = {}

    def recorder(self) -> Recorder:
        pid = os.getpid()
        found = self.recorders.get(pid)
        if found is None:
            found = self.recorders.setdefault(pid, Recorder(self.max_cells))
        return found

    def look(self) -> None:
        """Keep the numbers up to date for the pages of other processes."""
        self.recorder().record_now_and_then()

    def leave(self) -> None:
        """At the end of the process."""
        recorder = self.recorders.get(os.getpid())
        if recorder is not None:
            # Whatever is wrong now, it is too late to do anything about it.
            with contextlib.suppress(Exception):
                recorder.record()
                multiprocess.mark_process_dead(os.getpid())


_here = _Here()
os.register_at_fork(after_in_child=_here.recorders.clear)


class Collector:
    """Gives our metrics to a registry of prometheus_client."""

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that it can be registered before a fork."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """The metrics, up to date."""
        recorder = _here.recorder()
        recorder.record()
        if not is_shared():
            return recorder.metrics.collect()
        _forget_the_dead(Path(os.environ[_DIRECTORY]))
        return [
            metric
            for metric in multiprocess.MultiProcessCollector(None).collect()
            if metric.name.startswith("cellmw_")
        ]


def _forget_the_dead(directory: Path) -> None:
    """Remove what processes that were killed had to say of the present."""
    found = {
        int(match[1])
        for path in directory.iterdir()
        if (match := _LIVE_FILE.match(path.name))
    }
    # Files can be named after something else than process ids.
    if os.getpid() not in found:
        return
    for pid in found:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            with contextlib.suppress(FileNotFoundError):
                multiprocess.mark_process_dead(pid)
        except PermissionError:
            continue


def install(
    registry: CollectorRegistry = prometheus_client.REGISTRY,
    *,
    max_cells: int = MAX_CELLS,
) -> None:
    """Count in this process and those that it forks.

    For services that have a page of their own; :func:`app_factory` does it
    itself.  Starts no thread.  May be called again.

    :param registry: where the metrics are shown, unless
        ``PROMETHEUS_MULTIPROC_DIR`` is in effect: then prometheus_client's
        MultiProcessCollector finds them
    :param max_cells: most cells with a label of their own; the others are
        counted under one
    :raises ConfigurationError: the directory cannot be written to
    """
    _here.max_cells = max_cells
    if is_shared():
        _check_directory()
        watchers = runtime.registry().watchers
        if _here.look not in watchers:
            watchers.append(_here.look)
            atexit.register(_here.leave)
    elif registry not in _installed:
        _installed.append(registry)
        registry.register(Collector())


_installed: list[CollectorRegistry] = []


def _check_directory() -> None:
    directory = os.environ.get(_DIRECTORY, "")
    if not Path(directory).is_dir() or not os.access(directory, os.W_OK):
        raise ConfigurationError(
            f"cellmw: {_DIRECTORY} is set, and names no directory that this "
            "process may write to"
        )


class MetricsPage:
    """The page, as a WSGI application.  Made by :func:`app_factory`."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        install(self._registry, max_cells=_here.max_cells)
        if is_shared():
            self._registry.register(Collector())

    def __call__(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        """Show the metrics, up to date.  Blocks for nothing but files."""
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            start_response(
                "405 Method Not Allowed",
                [("Allow", "GET, HEAD"), ("Content-Length", "0")],
            )
            return []
        page = _scope().encode() + prometheus_client.generate_latest(
            self._registry
        )
        start_response(
            "200 OK",
            [
                ("Content-Type", prometheus_client.CONTENT_TYPE_LATEST),
                ("Content-Length", str(len(page))),
            ],
        )
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [page]


def _scope() -> str:
    """Which processes the page covers, as a comment on it."""
    if is_shared():
        return f"# All processes that share {_DIRECTORY}.\n"
    why = (
        "was set after prometheus_client had been imported"
        if os.environ.get(_DIRECTORY)
        else "is not set"
    )
    return f"# Process {os.getpid()} alone: {_DIRECTORY} {why}.\n"


def app_factory(
    global_conf: Mapping[str, Any] | None, **local_conf: Any
) -> WSGIApplication:
    """Make the page, for Paste (``paste.app_factory``).

    Opens nothing and starts no thread.

    :param global_conf: Paste's ``[DEFAULT]``, not looked at
    :param local_conf: ``max_cells``, most cells with a label of their own
    :raises ConfigurationError: an option is unknown or has a bad value
    """
    text = local_conf.pop("max_cells", None)
    if local_conf:
        raise ConfigurationError(
            f"cellmw: unknown option {min(local_conf)!r} of the metrics "
            "page; it has max_cells"
        )
    if text is not None:
        if not str(text).isdecimal() or int(text) < 1:
            raise ConfigurationError(
                "cellmw: option max_cells of the metrics page has a bad "
                "value; accepted: a whole number, 1 or more"
            )
        _here.max_cells = int(text)
    return MetricsPage()
