# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What keeps a cell in trouble from taking the process with it.

One :class:`Guard` a cell: it lets so many messages at once on their way, and
after so many failures to deliver in a row none for a while, but for one
trial.  It knows nothing of transports; what a failure is, its callers say.

No circuit breaker library is used: those that were read count every
exception of a call, hold their lock while they call listeners, and know no
trial of which there is one at a time, nor a wait in line with a deadline.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable

from cellmw import exceptions, redaction

LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class GuardStats:
    """The state of one cell, as this process sees it.

    :ivar down: whether the cell is taken as down
    :ivar failures: failures to deliver in a row
    :ivar under_way: messages being delivered or awaited, stuck ones included
    :ivar waiting: messages that wait in line for a place
    :ivar stuck: messages whose request gave up, and whose thread has not
        come back
    :ivar retry_after: seconds until the next trial, where it is down
    :ivar sent: messages that were handed to the broker
    :ivar failed: messages that were not, or perhaps not
    :ivar rejected: messages refused without asking the broker
    """

    cell_uuid: str
    cell_name: str | None
    down: bool
    failures: int
    under_way: int
    waiting: int
    stuck: int
    retry_after: float
    sent: int
    failed: int
    rejected: int


class Guard:
    """The limit and the breaker of one cell.  Thread-safe.

    :param max_sends: most messages under way at once
    :param breaker_failures: failures in a row after which the cell is taken
        as down; 0: never
    :param breaker_reset_after: seconds from then to the next trial
    """

    __slots__ = (
        "_breaker_failures",
        "_breaker_reset_after",
        "_clock",
        "_down",
        "_failed",
        "_failures",
        "_lock",
        "_max_sends",
        "_next_trial",
        "_rejected",
        "_sent",
        "_stuck",
        "_trial",
        "_under_way",
        "_waiters",
        "cell_name",
        "cell_uuid",
        "discarded",
    )

    def __init__(
        self,
        cell_uuid: str,
        cell_name: str | None = None,
        *,
        max_sends: int = 64,
        breaker_failures: int = 5,
        breaker_reset_after: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.cell_uuid = cell_uuid
        self.cell_name = cell_name
        self._max_sends = max_sends
        self._breaker_failures = breaker_failures
        self._breaker_reset_after = breaker_reset_after
        self._clock = clock
        self._lock = threading.Lock()
        self._under_way = 0
        self._waiters: collections.deque[threading.Lock] = collections.deque()
        self._stuck = 0
        self._failures = 0
        self._down = False
        self._trial = False
        self._next_trial = 0.0
        self._sent = 0
        self._failed = 0
        self._rejected = 0
        self.discarded = False

    def admit(self, timeout: float) -> bool:
        """Take a place for one message.

        Whoever gets one gives it back with :meth:`leave`, and says with
        :meth:`report` how it went, each once.

        :param timeout: the longest to wait in line, in seconds
        :returns: whether this message is the trial of a cell that is down
        :raises CellUnavailable: the cell is taken as down
        :raises CellBusy: no place became free in time
        """
        with self._lock:
            quick = not self._down and self._under_way < self._max_sends
            if quick:
                self._under_way += 1
        if quick:
            return False
        return self._admit_slowly(timeout)

    def _admit_slowly(self, timeout: float) -> bool:
        # Nobody waits in line for a cell that is down anyway.
        self._raise_if_down()
        waiter: threading.Lock | None = None
        with self._lock:
            if self._under_way < self._max_sends:
                self._under_way += 1
            else:
                waiter = threading.Lock()
                waiter.acquire()
                self._waiters.append(waiter)
        if waiter is not None:
            self._wait_in_line(waiter, timeout)
        return self._start_trial_if_down()

    def _raise_if_down(self) -> None:
        now = self._clock()
        with self._lock:
            left = self._refused_for(now)
            if left is not None:
                self._rejected += 1
        if left is not None:
            raise self._unavailable(left)

    def _refused_for(self, now: float) -> float | None:
        """Seconds for which messages are refused; None: they are not."""
        if not self._down:
            return None
        # A clock that went back must not make the wait longer.
        self._next_trial = min(
            self._next_trial, now + self._breaker_reset_after
        )
        if self._trial:
            return max(0.0, self._next_trial - now)
        if now < self._next_trial:
            return self._next_trial - now
        return None

    def _wait_in_line(self, waiter: threading.Lock, timeout: float) -> None:
        if waiter.acquire(timeout=max(0.0, timeout)):
            return
        with self._lock:
            try:
                self._waiters.remove(waiter)
            except ValueError:
                # The place was handed over between the two lines above.
                return
            self._rejected += 1
        raise exceptions.CellBusy(
            f"{self._max_sends} messages are under way there",
            cell_uuid=self.cell_uuid,
            cell_name=self.cell_name,
            retry_after=1.0,
        )

    def _start_trial_if_down(self) -> bool:
        now = self._clock()
        with self._lock:
            left = self._refused_for(now)
            if left is None:
                self._trial = self._down
                return self._down
            self._rejected += 1
        self.leave()
        raise self._unavailable(left)

    def _unavailable(self, left: float) -> exceptions.CellUnavailable:
        return exceptions.CellUnavailable(
            "it is taken as down after failures in a row",
            cell_uuid=self.cell_uuid,
            cell_name=self.cell_name,
            retry_after=left,
        )

    def leave(self, *, stuck: bool = False) -> None:
        """Give back a place.

        :param stuck: the place had been reported as stuck
        """
        with self._lock:
            if stuck:
                self._stuck -= 1
            waiter = self._waiters.popleft() if self._waiters else None
            if waiter is None:
                self._under_way -= 1
        if waiter is not None:
            waiter.release()

    def note_stuck(self) -> None:
        """A message's request gave up; its place stays taken."""
        with self._lock:
            self._stuck += 1

    def report(
        self, delivered: bool | None, *, trial: bool, cause: str = ""
    ) -> None:
        """Say how a message went.

        :param delivered: True: the broker took it, whatever came of it
            there.  False: delivering failed.  None: it says nothing about
            the cell.
        :param trial: what :meth:`admit` returned for it
        :param cause: for the log, without credentials
        """
        if delivered and not trial and not self._failures:
            # A count for looking at, on the way of every message: one that
            # two threads raise at once may be one too low.
            self._sent += 1
            return
        changed = False
        now = self._clock()
        with self._lock:
            self._sent += delivered is True
            self._failed += delivered is False
            if trial:
                self._trial = False
                if delivered:
                    self._down = False
                    self._failures = 0
                    changed = True
                elif delivered is False:
                    self._failures += 1
                    self._next_trial = now + self._breaker_reset_after
            elif self._down:
                pass  # from before it was taken as down
            elif delivered:
                self._failures = 0
            elif delivered is False:
                self._failures += 1
                if 0 < self._breaker_failures <= self._failures:
                    self._down = True
                    self._next_trial = now + self._breaker_reset_after
                    changed = True
        if changed:
            self._log_change(down=not delivered, cause=cause)

    def _log_change(self, *, down: bool, cause: str) -> None:
        name = redaction.one_line(self.cell_name or "no name")
        if down:
            LOG.error(
                "Cell %s (%s) is taken as down after %d failures to deliver "
                "in a row, the last: %s. Messages to it are refused; a trial "
                "goes out after %s seconds.",
                self.cell_uuid,
                name,
                self._breaker_failures,
                cause,
                self._breaker_reset_after,
            )
        else:
            LOG.warning(
                "Cell %s (%s) is up again: a trial message was delivered.",
                self.cell_uuid,
                name,
            )

    def discard_if_idle(self) -> bool:
        """Whether it has nothing to remember and is to be thrown away.

        From then on :attr:`discarded` is True, and who finds it so takes the
        cell's next guard.
        """
        with self._lock:
            if self._under_way or self._down or self._failures:
                return False
            self.discarded = True
            return True

    def stats(self) -> GuardStats:
        """The state of this moment."""
        now = self._clock()
        with self._lock:
            left = self._next_trial - now if self._down else 0.0
            return GuardStats(
                cell_uuid=self.cell_uuid,
                cell_name=self.cell_name,
                down=self._down,
                failures=self._failures,
                under_way=self._under_way,
                waiting=len(self._waiters),
                stuck=self._stuck,
                retry_after=max(0.0, left),
                sent=self._sent,
                failed=self._failed,
                rejected=self._rejected,
            )


class Guards:
    """The guards of all cells of this process.  Thread-safe.

    Keeps one for each cell that has something to remember, and
    ``max_idle`` more.
    """

    def __init__(
        self, make: Callable[[str, str | None], Guard], max_idle: int = 1024
    ) -> None:
        self._make = make
        self._max_idle = max_idle
        self._guards: dict[str, Guard] = {}

    def get(self, cell_uuid: str, cell_name: str | None = None) -> Guard:
        """The guard of a cell."""
        guard = self._guards.get(cell_uuid)
        if guard is None:
            guard = self._guards.setdefault(
                cell_uuid, self._make(cell_uuid, cell_name)
            )
        return guard

    def admit(
        self, cell_uuid: str, cell_name: str | None, timeout: float
    ) -> tuple[Guard, bool]:
        """As :meth:`Guard.admit`, for a cell."""
        while True:
            guard = self.get(cell_uuid, cell_name)
            trial = guard.admit(timeout)
            if not guard.discarded:
                return guard, trial
            # Thrown away between the two lines; nobody else will find it.
            guard.leave()

    def sweep(self) -> None:
        """Throw away guards that remember nothing, if there are many."""
        surplus = len(self._guards) - self._max_idle
        for cell_uuid, guard in list(self._guards.items()):
            if surplus <= 0:
                return
            if guard.discard_if_idle():
                del self._guards[cell_uuid]
                surplus -= 1

    def stats(self) -> list[GuardStats]:
        """The state of every cell that has been sent to."""
        return [guard.stats() for guard in list(self._guards.values())]
