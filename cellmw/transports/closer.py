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
        # Under way: the job, when it exceeds its budget, whose it is, and
        # whether that has been reported.
        self._under_way: dict[Job, tuple[float, str, bool]] = {}
        self.closed = 0
        self.failed = 0
        self.hung = 0

    def close(
        self,
        transport: Closable,
        cell_uuid: str,
        done: Callable[[], None] = lambda: None,
    ) -> None:
        """Start closing a transport.  Does not block and does not raise.

        :param done: called when it has ended, in the thread that closed it
        """
        job = Job(self._close, (transport, cell_uuid, done))
        with self._lock:
            self._under_way[job] = (
                self._clock() + self._budget,
                cell_uuid,
                False,
            )
        self._workers.start(job)

    def _close(
        self, transport: Closable, cell_uuid: str, done: Callable[[], None]
    ) -> None:
        problem = None
        try:
            transport.cleanup()
        except Exception as error:
            problem = redaction.describe(error)
        finally:
            del transport
            with self._lock:
                self.closed += 1
                self.failed += problem is not None
            done()
        if problem is not None:
            LOG.warning(
                "Closing a transport of cell %s failed: %s",
                cell_uuid,
                problem,
            )

    def watch(self) -> None:
        """Report what exceeds its budget.  Called now and then."""
        now = self._clock()
        late: list[str] = []
        ended: list[str] = []
        with self._lock:
            for job, (limit, cell_uuid, told) in list(self._under_way.items()):
                if job.done:
                    del self._under_way[job]
                    if told:
                        ended.append(cell_uuid)
                elif now >= limit and not told:
                    self._under_way[job] = (limit, cell_uuid, True)
                    self.hung += 1
                    late.append(cell_uuid)
        for cell_uuid in late:
            LOG.warning(
                "Closing a transport of cell %s has taken more than %s "
                "seconds and goes on; its thread and its sockets stay until "
                "it ends",
                cell_uuid,
                self._budget,
            )
        for cell_uuid in ended:
            LOG.info(
                "Closing a transport of cell %s has ended at last", cell_uuid
            )

    @property
    def hanging(self) -> int:
        """How many exceed their budget just now."""
        with self._lock:
            return sum(
                1
                for job, (_, _, told) in self._under_way.items()
                if told and not job.done
            )

    def wait(self, timeout: float) -> int:
        """Wait for what is under way.

        :param timeout: seconds, in all
        :returns: how many are not done
        """
        deadline = time.monotonic() + timeout
        with self._lock:
            jobs = list(self._under_way)
        left = [
            job
            for job in jobs
            if not job.wait(max(0.0, deadline - time.monotonic()))
        ]
        return len(left)
