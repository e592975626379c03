# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""``mode = observe``: look up as ever, compare, and change nothing.

The filter hands two notes to the :class:`Observer` of the process: the
instance that a request names, and the cell that the handler then had on its
context.  One thread looks up the first and compares it with the second, in
the order of the notes.  Requests wait for neither that thread nor the API
database: a note that finds the queue full is dropped and counted.
"""

from __future__ import annotations

import collections
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from cellmw import exceptions, instance_path, redaction
from cellmw.cells.mapping import Cell
from cellmw.options import Settings

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

LOG = logging.getLogger(__name__)

RESULTS = ("same", "another", "none", "failed", "dropped")

# Most notes that wait for the thread; a few megabytes.
_QUEUE_SIZE = 10_000
# Seconds for which further differences of the same result are not logged.
_LOG_EVERY = 60.0
# How long the end of a process waits for the thread, in seconds.
_STOP_TIMEOUT = 0.5


class _Observation:
    """One request for an instance."""

    __slots__ = ("cell", "instance_uuid", "is_looked_up", "method", "seen")

    def __init__(self, instance_uuid: str, method: str) -> None:
        self.instance_uuid = instance_uuid
        self.method = method
        self.is_looked_up = False
        self.cell: str | None = None
        self.seen: str | None = None


class Observer:
    """Looks up and compares, behind the requests of one process.

    Thread-safe.  Starts its thread with the first request.  Its public
    methods never block and never raise.

    :param find: gives the cell of an instance; may block and raise
    :param clock: seconds, monotonic
    """

    def __init__(
        self,
        find: Callable[[str, str], Cell | None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._find = find
        self._clock = clock
        # None ends the thread.
        self._notes: queue.SimpleQueue[Callable[[], None] | None] = (
            queue.SimpleQueue()
        )
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._counts: collections.Counter[str] = collections.Counter()
        self._told_at: dict[str, float] = {}

    def begin(self, instance_uuid: str, method: str) -> _Observation | None:
        """Note that a request begins; None where it cannot be observed."""
        if self._notes.qsize() >= _QUEUE_SIZE or not self._is_running():
            self._count("dropped")
            return None
        observation = _Observation(instance_uuid, method)
        self._notes.put(lambda: self._look_up(observation))
        return observation

    def end(self, observation: _Observation, seen: object) -> None:
        """Note which cell the request's handler had on its context."""
        # Not bounded once more: each beginning has one end at most.
        observation.seen = seen if isinstance(seen, str) else None
        self._notes.put(lambda: self._compare(observation))

    def counts(self) -> dict[str, int]:
        """How many requests had each result so far."""
        with self._lock:
            return {result: self._counts[result] for result in RESULTS}

    def close(self) -> None:
        """End the thread.  Waits for it for half a second at most."""
        thread = self._thread
        if thread is not None:
            self._notes.put(None)
            thread.join(_STOP_TIMEOUT)

    def _is_running(self) -> bool:
        if self._thread is None:
            with self._lock:
                if self._thread is None:
                    thread = threading.Thread(
                        target=self._run, name="cellmw-observer", daemon=True
                    )
                    try:
                        thread.start()
                    except RuntimeError:
                        return False  # the process has no thread left
                    self._thread = thread
        return True

    def _count(self, result: str) -> None:
        with self._lock:
            self._counts[result] += 1

    # From here on: in the observer's thread.

    def _run(self) -> None:
        while (note := self._notes.get()) is not None:
            try:
                note()
            except Exception as error:
                self._count("failed")
                LOG.error("Observing failed: %s", redaction.describe(error))

    def _look_up(self, observation: _Observation) -> None:
        try:
            cell = self._find(observation.instance_uuid, observation.method)
        except exceptions.LookupFailed:
            return  # logged where the outage begins
        observation.cell = cell.uuid if cell is not None else None
        observation.is_looked_up = True

    def _compare(self, observation: _Observation) -> None:
        if not observation.is_looked_up:
            self._count("failed")
            return
        cell, seen = observation.cell or None, observation.seen
        if seen is None:
            result = "none"
        elif cell is not None and seen.lower() == cell.lower():
            result = "same"
        else:
            result = "another"
        self._count(result)
        if result != "same" and cell != seen:
            self._tell(result, observation)

    def _tell(self, result: str, observation: _Observation) -> None:
        now = self._clock()
        told_at = self._told_at.get(result)
        if told_at is not None and now - told_at < _LOG_EVERY:
            return
        self._told_at[result] = now
        LOG.warning(
            "Instance %s is in %s, but the handler of a %s request had %s on "
            "its context (result %s; further ones are not logged for %d "
            "seconds).",
            observation.instance_uuid,
            _named(observation.cell),
            redaction.one_line(observation.method, 20),
            _named(observation.seen),
            result,
            _LOG_EVERY,
        )


def _named(cell_uuid: str | None) -> str:
    if not cell_uuid:
        return "no cell"
    return f"cell {redaction.one_line(cell_uuid, 100)}"


class Observing:
    """The filter of ``mode = observe``.  Thread-safe.

    The application gets the environ, and the server the response, as if this
    filter were not there.

    :param application: what stands behind it
    :param here: gives the observer of the calling process
    """

    def __init__(
        self,
        application: WSGIApplication,
        settings: Settings,
        here: Callable[[], Observer],
    ) -> None:
        self._application = application
        self._context_key = settings.context_key
        self._find_instance = instance_path.finder(
            settings.instance_path_patterns
        )
        self._here = here

    def __call__(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        """Serve one request (PEP 3333)."""
        uuid = self._find_instance(environ.get("PATH_INFO", ""))
        identity = environ.get("HTTP_X_IDENTITY_STATUS", "Confirmed")
        if uuid is None or identity != "Confirmed":
            return self._application(environ, start_response)
        observer = self._here()
        observation = observer.begin(uuid, environ["REQUEST_METHOD"])
        if observation is None:
            return self._application(environ, start_response)
        has_started = has_returned = False

        def end() -> None:
            observer.end(observation, self._seen(environ))

        def start(*args: Any) -> Callable[[bytes], object]:
            nonlocal has_started
            write = start_response(*args)
            if has_returned and not has_started:
                end()  # the handler runs while its body is iterated
            has_started = True
            return write

        try:
            body = self._application(environ, start)
        except BaseException:
            end()
            raise
        has_returned = True
        if has_started:
            end()
        return body

    def _seen(self, environ: WSGIEnvironment) -> object:
        try:
            return getattr(environ.get(self._context_key), "cell_uuid", None)
        except Exception:
            return None  # a property of the service's own context
