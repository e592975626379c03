# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Closing transports where no request waits for it.

oslo.messaging's ``cleanup()`` can block for ever: it joins a thread that
reconnects without end, or waits for a lock that a stuck call holds.  So each
close runs in a thread of its own, has a budget, and is reported when it
exceeds that.  One that hangs holds up neither the next close nor the
shutdown.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from cellmw import redaction
from cellmw.workers import Job, Workers

LOG = logging.getLogger(__name__)


class Closable(Protocol):
    """What oslo.messaging calls a transport, as far as closing goes."""

    def cleanup(self) -> None:
        """Release all that it holds.  May block for ever."""


class _Closing:
    """One transport on its way out."""

    __slots__ = (
        "cell_uuid",
        "done",
        "hung",
        "job",
        "limit",
        "told",
        "transport",
    )

    def __init__(
        self,
        transport: Closable,
        cell_uuid: str,
        done: Callable[[], object],
        hung: Callable[[], object],
        limit: float,
    ) -> None:
        # None as soon as a thread is at it.
        self.transport: Closable | None = transport
        self.cell_uuid = cell_uuid
        self.done = done
        self.hung = hung
        # When it exceeds its budget, and whether that has been reported.
        self.limit = limit
        self.told = False
        self.job = Job(lambda: None, ())


class Closer:
    """Closes transports, each exactly once.  Thread-safe.

    :param workers: where the closing runs
    :param budget: seconds after which a close is reported as hanging
    :ivar closed: how many were closed, those included that failed in it
    :ivar failed: how many raised in it
    :ivar hung: how many exceeded their budget, whether or not they ended
    """

    def __init__(
        self,
        workers: Workers,
        *,
        budget: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._workers = workers
        self._budget = budget
        self._clock = clock
        self._lock = threading.Lock()
        self._under_way: set[_Closing] = set()
        self.closed = 0
        self.failed = 0
        self.hung = 0

    def close(
        self,
        transport: Closable,
        cell_uuid: str,
        *,
        done: Callable[[], object] = bool,
        hung: Callable[[], object] = bool,
    ) -> None:
        """Start closing a transport.  Does not block and does not raise.

        :param done: called when it has ended, in the thread that closed it
        :param hung: called when it exceeds its budget, in the thread that
            watches; before ``done``, if that comes at all
        """
        limit = self._clock() + self._budget
        closing = _Closing(transport, cell_uuid, done, hung, limit)
        self._start(closing)
        if closing.job.done and closing.transport is not None:
            LOG.warning(
                "Could not start a thread to close a transport of cell %s; "
                "trying again later",
                cell_uuid,
            )

    def _start(self, closing: _Closing) -> None:
        closing.job = Job(self._close, (closing,))
        with self._lock:
            self._under_way.add(closing)
        self._workers.start(closing.job)

    def _close(self, closing: _Closing) -> None:
        transport, closing.transport = closing.transport, None
        assert transport is not None
        problem = None
        try:
            transport.cleanup()
        except BaseException as error:
            problem = redaction.describe(error)
        del transport
        with self._lock:
            self.closed += 1
            self.failed += problem is not None
        closing.done()
        if problem is not None:
            LOG.warning(
                "Closing a transport of cell %s failed: %s",
                closing.cell_uuid,
                problem,
            )

    def watch(self) -> None:
        """Report what exceeds its budget.  Called now and then."""
        now = self._clock()
        late: list[_Closing] = []
        with self._lock:
            ended = {one for one in self._under_way if one.job.done}
            self._under_way -= ended
            for closing in self._under_way:
                if now >= closing.limit and not closing.told:
                    closing.told = True
                    self.hung += 1
                    late.append(closing)
        for closing in late:
            closing.hung()
            LOG.warning(
                "Closing a transport of cell %s takes more than %s seconds; "
                "its thread and its sockets stay until it ends",
                closing.cell_uuid,
                self._budget,
            )
        for closing in ended:
            if closing.transport is not None:
                # There was no thread for it.
                self._start(closing)
            elif closing.told:
                LOG.info(
                    "Closing a transport of cell %s has ended after all",
                    closing.cell_uuid,
                )

    @property
    def hanging(self) -> int:
        """How many exceed their budget just now."""
        with self._lock:
            return sum(
                closing.told and not closing.job.done
                for closing in self._under_way
            )

    def wait(self, timeout: float) -> int:
        """Wait for what is under way.

        :param timeout: seconds, in all
        :returns: how many are not done
        """
        deadline = time.monotonic() + timeout
        while True:
            with self._lock:
                under_way = list(self._under_way)
            left = [
                closing
                for closing in under_way
                if not closing.job.wait(deadline - time.monotonic())
                or closing.transport is not None
            ]
            if not left or time.monotonic() >= deadline:
                return len(left)
            # What has no thread may be closed by close_here().
            time.sleep(0.01)

    def close_here(self) -> None:
        """Close in this thread what no thread could be started for.

        May block for ever.  For the end of a process: some versions of
        Python (3.12) start no thread then.
        """
        while (closing := self._without_thread()) is not None:
            closing.job.run()
            closing.job.finish()

    def _without_thread(self) -> _Closing | None:
        with self._lock:
            for closing in self._under_way:
                if closing.job.done and closing.transport is not None:
                    closing.job = Job(self._close, (closing,))
                    return closing
        return None
