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
import sys
import threading
import time
from collections.abc import Callable, Container

from cellmw import exceptions, redaction
from cellmw.durations import Durations, Histogram

LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GuardStats:
    """The state of one cell, as this process sees it.

    :ivar down: whether the cell is marked down
    :ivar failures: failures to deliver in a row
    :ivar under_way: messages being delivered, stuck ones included
    :ivar waiting: messages that wait in line for a place
    :ivar stuck: messages whose request gave up, and whose thread has not
        come back
    :ivar retry_after: seconds until the next trial, where it is down
    :ivar sent: messages that the broker took
    :ivar failed: messages that were not delivered, or perhaps not
    :ivar refused_down: messages refused because the cell is marked down
    :ivar refused_busy: messages refused for want of a place
    :ivar went_down: how often the cell was marked down
    :ivar casts: how long casts took, from their beginning
    :ivar calls: the same of calls, the reply included
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
    refused_down: int
    refused_busy: int
    went_down: int
    casts: Durations
    calls: Durations


# The part of a message's time that sending it needs; a place that becomes free
# later than that goes to the next message.
_NEEDED = 0.05


class StuckThreads:
    """The threads of a process that do not come back from brokers.

    Thread-safe.

    :param limit: most of them, see ``max_stuck_sends``
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._count = 0
        self._lock = threading.Lock()

    def add(self, number: int) -> None:
        """Count so many more, or less."""
        with self._lock:
            self._count += number

    @property
    def are_too_many(self) -> bool:
        """Whether no more may be put at risk."""
        return self._count >= self.limit


class _Waiter:
    """A message in the queue."""

    __slots__ = ("admission", "turn")

    def __init__(self) -> None:
        # Locked until it is this one's turn, one way or the other.
        self.turn = threading.Lock()
        self.turn.acquire()
        # What admit() returns; None: the cell went down meanwhile.
        self.admission: int | None = None


class Guard:
    """The limit and the breaker of one cell.  Thread-safe.

    :param max_sends: most messages under way at once
    :param breaker_failures: failures in a row after which the cell is
        marked down; 0: never
    :param breaker_reset_after: seconds from then to the next trial
    :param stuck_threads: those of all cells; None: of this one alone, and
        without a limit
    """

    __slots__ = (
        "_breaker_failures",
        "_breaker_reset_after",
        "_calls",
        "_casts",
        "_clock",
        "_down",
        "_era",
        "_failed",
        "_failures",
        "_lock",
        "_max_sends",
        "_next_trial",
        "_queue",
        "_refused_busy",
        "_refused_down",
        "_sent",
        "_stuck",
        "_stuck_threads",
        "_trial",
        "_under_way",
        "_went_down",
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
        stuck_threads: StuckThreads | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.cell_uuid = cell_uuid
        self.cell_name = cell_name
        self.discarded = False
        self._max_sends = max_sends
        self._breaker_failures = breaker_failures
        self._breaker_reset_after = breaker_reset_after
        self._stuck_threads = stuck_threads or StuckThreads(sys.maxsize)
        self._clock = clock
        self._lock = threading.Lock()
        self._under_way = 0
        self._stuck = 0
        # The first to come is the first to get a place.  While a message
        # waits, all places are taken: one that becomes free is handed over.
        self._queue: collections.deque[_Waiter] = collections.deque()
        self._failures = 0
        self._down = False
        self._trial = False
        self._next_trial = 0.0
        # A new one begins each time that the cell goes down.  The verdict
        # on a message counts only in the era in which it was let in: what
        # comes later tells of a state that is over.
        self._era = 0
        self._casts = Histogram()
        self._calls = Histogram()
        self._sent = 0
        self._failed = 0
        self._refused_down = 0
        self._refused_busy = 0
        self._went_down = 0

    def admit(self, timeout: float) -> int:
        """Take a place for one message.

        Whoever gets one gives it back with :meth:`leave`, and says with
        :meth:`report` how it went, each once.

        Blocks only while all places are taken.  A cell that is marked down
        has no queue: the messages that wait at that moment are refused.

        :param timeout: the longest to wait in the queue, in seconds
        :returns: what :meth:`report` wants to have
        :raises CellUnavailable: the cell is marked down
        :raises CellBusy: no place became free in time
        """
        with self._lock:
            quick = (
                not self._down
                and self._under_way < self._max_sends
                # Of such a cell it is asked whether it may hold up a thread.
                and not self._failures
                and not self._stuck
            )
            if quick:
                self._under_way += 1
                admission = self._era
        if quick:
            return admission
        return self._admit_slowly(timeout)

    def _admit_slowly(self, timeout: float) -> int:
        now = self._clock()
        left = 0.0
        waiter: _Waiter | None = None
        with self._lock:
            if self._down and (left := self._refused_for(now)):
                self._refused_down += 1
            elif self._answers_no_more() and self._stuck_threads.are_too_many:
                self._refused_busy += 1
            elif self._down:
                return self._begin_trial()
            elif self._under_way < self._max_sends:
                self._under_way += 1
                return self._era
            else:
                waiter = _Waiter()
                self._queue.append(waiter)
        if waiter is not None:
            return self._wait_in_queue(waiter, timeout)
        if left:
            raise self._unavailable(left)
        raise self._busy(
            f"{self._stuck_threads.limit} threads of this process are stuck "
            "with brokers that do not answer"
        )

    def _answers_no_more(self) -> bool:
        return self._failures > 0 or self._stuck > 0

    def _refused_for(self, now: float) -> float:
        """Seconds for which messages are refused at least; 0: one may go."""
        # A clock that went back must not make the wait longer.
        self._next_trial = min(
            self._next_trial, now + self._breaker_reset_after
        )
        left = self._next_trial - now
        if self._trial or self._under_way >= self._max_sends:
            # For a trial too there must be a place: those that do not come
            # back are a bound on how many there can be.
            return max(left, 1.0)
        return max(left, 0.0)

    def _begin_trial(self) -> int:
        self._under_way += 1
        self._trial = True
        return self._era

    def _wait_in_queue(self, waiter: _Waiter, timeout: float) -> int:
        enough_until = self._clock() + timeout * (1 - _NEEDED)
        try:
            in_time = waiter.turn.acquire(timeout=max(0.0, timeout))
        except BaseException:
            if not self._leave_queue(waiter) and waiter.admission is not None:
                self.leave()
            raise
        if not in_time and self._leave_queue(waiter):
            raise self._busy(f"{self._max_sends} messages are under way there")
        if waiter.admission is None:
            raise self._unavailable(self._breaker_reset_after)
        if self._clock() > enough_until:
            # Its deadline would break off a connection that works, and count
            # against the cell.
            self.leave()
            with self._lock:
                self._refused_busy += 1
            raise self._busy("its place became free too late to send")
        return waiter.admission

    def _leave_queue(self, waiter: _Waiter) -> bool:
        """Give up waiting; if that is False, it was its turn just now."""
        with self._lock:
            try:
                self._queue.remove(waiter)
            except ValueError:
                return False
            self._refused_busy += 1
            return True

    def _busy(self, cause: str) -> exceptions.CellBusy:
        return exceptions.CellBusy(
            cause,
            cell_uuid=self.cell_uuid,
            cell_name=self.cell_name,
            retry_after=1.0,
        )

    def _unavailable(self, left: float) -> exceptions.CellUnavailable:
        return exceptions.CellUnavailable(
            "it is marked down after repeated failures",
            cell_uuid=self.cell_uuid,
            cell_name=self.cell_name,
            retry_after=left,
        )

    def leave(self, *, stuck: bool = False) -> None:
        """Give back a place.

        :param stuck: it had been reported as stuck
        """
        waiter: _Waiter | None = None
        with self._lock:
            if stuck:
                self._stuck -= 1
                self._stuck_threads.add(-1)
            if self._queue:
                waiter = self._queue.popleft()
                waiter.admission = self._era
            else:
                self._under_way -= 1
        if waiter is not None:
            waiter.turn.release()

    def note_stuck(self) -> None:
        """A message's request gave up; its place stays taken."""
        with self._lock:
            self._stuck += 1
            self._stuck_threads.add(1)

    def leave_confirmed(self, admission: int, seconds: float | None) -> None:
        """Give back a place for a message that the broker took.

        The same as :meth:`leave` and :meth:`report`, in one step where the
        cell is healthy and nobody waits.
        """
        with self._lock:
            quick = not (self._down or self._failures or self._queue)
            if quick:
                self._sent += 1
                self._under_way -= 1
        if not quick:
            self.leave()
            self.report(True, admission, seconds=seconds)
        elif seconds is not None:
            self._casts.observe(seconds)

    def report(
        self,
        delivered: bool | None,
        admission: int,
        *,
        seconds: float | None = None,
        call: bool = False,
        cause: str = "",
    ) -> float:
        """Say how a message went.

        :param delivered: True: the broker took it, whatever came of it
            there.  False: delivering failed.  None: it says nothing about
            the cell.
        :param admission: what :meth:`admit` returned for it
        :param seconds: how long it took, to be counted; None: that is not
            known yet, see :meth:`note_duration`
        :param call: whether a reply is in that
        :param cause: for the log, without credentials
        :returns: seconds until the next trial, where it was not delivered
            and the cell is down
        """
        now = 0.0 if delivered else self._clock()
        left = 0.0
        change: bool | None = None
        refused: list[_Waiter] = []
        with self._lock:
            if delivered:
                self._sent += 1
            elif delivered is False:
                self._failed += 1
            if admission == self._era and (self._failures or not delivered):
                change = self._judge(delivered, now)
                if change:
                    refused = self._empty_queue()
            if self._down and not delivered:
                left = self._next_trial - now
        if seconds is not None:
            self.note_duration(seconds, call=call)
        for waiter in refused:
            waiter.turn.release()
        if change is not None:
            self._log_change(down=change, cause=cause)
        return left

    def note_duration(self, seconds: float, *, call: bool) -> None:
        """Count how long a message took that the broker took.

        :param call: whether the reply is in that
        """
        (self._calls if call else self._casts).observe(seconds)

    def _judge(self, delivered: bool | None, now: float) -> bool | None:
        """Whether the cell is down from now on; None: that is not new."""
        if delivered:
            self._failures = 0
        if self._down:
            return self._end_trial(delivered, now)
        if delivered is False:
            return self._count_failure(now)
        return None

    def _end_trial(self, delivered: bool | None, now: float) -> bool | None:
        self._trial = False
        if delivered:
            self._down = False
            return False
        if delivered is False:
            self._failures += 1
            self._next_trial = now + self._breaker_reset_after
        return None

    def _count_failure(self, now: float) -> bool | None:
        self._failures += 1
        if not 0 < self._breaker_failures <= self._failures:
            return None
        self._down = True
        self._went_down += 1
        self._era += 1
        self._next_trial = now + self._breaker_reset_after
        return True

    def _empty_queue(self) -> list[_Waiter]:
        refused = list(self._queue)
        self._queue.clear()
        self._refused_down += len(refused)
        return refused

    def _log_change(self, *, down: bool, cause: str) -> None:
        name = redaction.one_line(self.cell_name or "no name")
        if down:
            LOG.error(
                "Cell %s (%s) marked down after %d failed deliveries "
                "in a row, the last: %s. Messages to it are refused; the "
                "next trial is in %s seconds.",
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

    def discard_if_idle(self, *, forget: bool = False) -> bool:
        """Whether it has nothing to remember and is to be thrown away.

        From then on :attr:`discarded` is True, and who finds it so takes the
        cell's next guard.

        :param forget: failures are nothing to remember, for the cell is gone
        """
        with self._lock:
            if self._under_way:
                return False
            if (self._down or self._failures) and not forget:
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
                waiting=len(self._queue),
                stuck=self._stuck,
                retry_after=max(0.0, left),
                sent=self._sent,
                failed=self._failed,
                refused_down=self._refused_down,
                refused_busy=self._refused_busy,
                went_down=self._went_down,
                casts=self._casts.snapshot(),
                calls=self._calls.snapshot(),
            )


class Place:
    """A message's place in a guard, and its verdict.  Thread-safe.

    :param admission: what :meth:`Guard.admit` returned for it
    """

    __slots__ = ("_admission", "_held", "_lock", "_stuck", "_told", "guard")

    def __init__(self, guard: Guard, admission: int) -> None:
        self.guard = guard
        self._admission = admission
        self._lock = threading.Lock()
        self._held = True
        self._stuck = False
        self._told = False

    def settle(
        self,
        delivered: bool | None,
        *,
        seconds: float | None = None,
        cause: str = "",
        stuck: bool = False,
    ) -> float:
        """Give the place back, and say how the message went.

        Each counts once, whoever comes first.

        :param delivered: as :meth:`Guard.report` has it, and ``seconds``
        :param stuck: keep the place until :meth:`leave`, because a thread
            does not come back
        :returns: seconds until the next trial
        """
        with self._lock:
            told, self._told = self._told, True
            leave = self._held and not stuck
            if leave:
                self._held = False
            elif self._held and not self._stuck:
                self._stuck = True
                self.guard.note_stuck()
        if delivered and leave and not (told or self._stuck):
            self.guard.leave_confirmed(self._admission, seconds)
            return 0.0
        if leave:
            self.guard.leave(stuck=self._stuck)
        if told:
            return 0.0
        return self.guard.report(
            delivered, self._admission, seconds=seconds, cause=cause
        )

    def leave(self) -> None:
        """Give the place back, if it was not yet."""
        with self._lock:
            held, self._held = self._held, False
        if held:
            self.guard.leave(stuck=self._stuck)


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

    def get(self, cell_uuid: str, cell_name: str | None) -> Guard:
        """The guard of a cell."""
        guard = self._guards.get(cell_uuid)
        if guard is None:
            guard = self._guards.setdefault(
                cell_uuid, self._make(cell_uuid, cell_name)
            )
        if guard.cell_name is not cell_name:
            # A cell can be renamed.
            guard.cell_name = cell_name
        return guard

    def admit(
        self, cell_uuid: str, cell_name: str | None, timeout: float
    ) -> tuple[Guard, int]:
        """As :meth:`Guard.admit`, for a cell."""
        while True:
            guard = self._guards.get(cell_uuid)
            if guard is None or guard.cell_name is not cell_name:
                guard = self.get(cell_uuid, cell_name)
            admission = guard.admit(timeout)
            if not guard.discarded:
                return guard, admission
            # Thrown away between the two lines; nobody else will find it.
            guard.leave()

    def keep_only(self, cells: Container[str]) -> None:
        """Forget cells that are gone, by UUID, as soon as they are idle.

        A cell that is down would otherwise be counted as such for ever.
        Called with each new state of the cell mappings.
        """
        for cell_uuid, guard in list(self._guards.items()):
            if cell_uuid not in cells and guard.discard_if_idle(forget=True):
                self._guards.pop(cell_uuid, None)

    def sweep(self) -> None:
        """Throw away guards that remember nothing, if there are many."""
        surplus = len(self._guards) - self._max_idle
        for cell_uuid, guard in list(self._guards.items()):
            if surplus <= 0:
                return
            if guard.discard_if_idle():
                self._guards.pop(cell_uuid, None)
                surplus -= 1

    def stats(self) -> list[GuardStats]:
        """The state of every cell that has been sent to."""
        return [guard.stats() for guard in list(self._guards.values())]
