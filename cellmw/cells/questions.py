# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Asking a database that may not answer.

A question runs on a worker's thread, so that a request waits for its answer
as long as it wants to and no longer, whatever the driver does.  Requests that
want to know the same share one question, and only so many are out at once;
the others stand in line.

:class:`Questions` owns the line and the places.  A question that was asked
keeps its place until the driver comes back from it, whether or not anybody
still waits.

A signal handler may ask too.  It runs in the main thread between any two
instructions, perhaps while that thread holds the lock here, and then neither
the handler nor a worker would ever get it.  So each thread marks itself while
it is in here, and a handler that finds its own thread marked asks alone,
without the lock.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from cellmw.cells.outage import describe
from cellmw.durations import DurationCounter, Durations
from cellmw.workers import Job, Workers

_CLOSED = "closed"


class Question(Job):
    """One question.  Made by :meth:`Questions.ask`.

    After :meth:`wait` has returned True, either ``result`` is the answer or
    ``failure`` is set.

    :ivar key: what it is about; two questions with one key are the same
    :ivar number: which question it is, counted from 1 in the order of asking
    :ivar asked_at: when it was put to the database; None: not yet
    :ivar failure: why there is no answer, without credentials
    :ivar outdated: something has happened since it was asked, so that the
        answer serves those who wait, and is not to be remembered
    """

    __slots__ = (
        "_owner",
        "asked_at",
        "failure",
        "key",
        "number",
        "outdated",
        "overdue",
        "urgent",
        "waiters",
    )

    def __init__(
        self,
        key: Hashable,
        function: Callable[[Question], Any],
        owner: Questions | None = None,
        *,
        urgent: bool = False,
    ) -> None:
        super().__init__(function, ())
        self._owner = owner
        self.key = key
        self.urgent = urgent
        self.number = 0
        self.asked_at: float | None = None
        self.failure: str | None = None
        self.outdated = False
        self.overdue = False
        self.waiters = 0

    def run(self) -> None:
        """Ask it, in the calling thread, on a place.  Never raises."""
        self.thread_id = threading.get_ident()
        owner = self._owner
        if owner is None or owner._begin(self):
            # Not before: one that is not asked would keep itself alive.
            self._args = (self,)
            super().run()
        if owner is not None:
            owner._end(self)

    def finish(self) -> None:
        """Let those go on who wait."""
        if self.error is not None:
            self.failure = describe(self.error)
            # Its traceback holds the driver's variables.
            self.error = None
        super().finish()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is going on.

    :ivar asked: questions put to the database so far
    :ivar out: of these, how many the driver has not come back from
    :ivar waiting: questions that stand in line
    :ivar durations: how long the database was at those it came back from
    """

    asked: int
    out: int
    waiting: int
    durations: Durations


class Questions:
    """The questions of one process.  Thread-safe.

    :param concurrency: most questions out at once
    :param overdue_after: seconds after which a question is taken as lost, so
        that nobody new waits for it.  One other may then be out for the same
        key, but not a third, so that one statement that hangs does not take
        all places.
    """

    def __init__(
        self,
        workers: Workers,
        *,
        concurrency: int,
        overdue_after: float,
        clock: Callable[[], float],
    ) -> None:
        self._workers = workers
        self._concurrency = concurrency
        self._overdue_after = overdue_after
        self._clock = clock
        self._lock = threading.Lock()
        # Threads that hold the lock, or are about to take or to leave it, or
        # to start what others may have joined.
        self._inside: set[int] = set()
        # The question of each key that who comes now may wait for, and the
        # one that is asked after it.
        self._current: dict[Hashable, Question] = {}
        self._following: dict[Hashable, Question] = {}
        # Keys with a question out that is overdue and no longer current.
        self._overdue: set[Hashable] = set()
        # Taken at its front, and from anywhere when nobody waits any more.
        self._line: collections.OrderedDict[Question, None] = (
            collections.OrderedDict()
        )
        self._out = 0
        self._numbers = itertools.count(1)
        self._asked = 0
        self._durations = DurationCounter()
        self._closed = False

    def ask(
        self,
        key: Hashable,
        function: Callable[[Question], Any],
        *,
        fresh: bool = False,
        urgent: bool = False,
        unless: Callable[[Any], object] | None = None,
    ) -> tuple[Question | None, bool]:
        """Have a question asked, or join one.  Does not block.

        Who asks waits for it with :meth:`wait`, or says with :meth:`leave`
        that it does not.

        :param key: what it is about
        :param function: called with the question, in another thread
        :param fresh: join only a question that is not asked yet
        :param urgent: goes to the head of the line
        :param unless: called with the key where no question could be joined;
            if it gives a true value, nothing is asked.  A lock is held, so
            it only looks something up.
        :returns: the question, None if nothing is asked; and whether it is a
            new one
        """
        if threading.get_ident() in self._inside:
            return self._ask_alone(key, function), True
        new = Question(key, function, self, urgent=urgent)
        now = self._clock()
        # Marked until it is started: a handler must not join what only this
        # thread can start.
        with self._entered():
            with self._lock:
                question = self._to_join(new, fresh=fresh, now=now)
                if question is not None:
                    question.waiters += 1
                    return question, question is new
                question = self._following.pop(key, None)
                if question is None:
                    # What an earlier question learned was kept before it
                    # ended.
                    if unless is not None and unless(key):
                        return None, False
                    question = new
                question.waiters += 1
                closed = self._closed
                if not closed:
                    self._current[key] = question
                    starts = self._has_place(question)
            if closed:
                question.failure = _CLOSED
                question.finish()
            elif starts:
                self._start(question)
        return question, question is new

    @contextlib.contextmanager
    def _entered(self) -> Iterator[None]:
        thread = threading.get_ident()
        self._inside.add(thread)
        try:
            yield
        finally:
            self._inside.discard(thread)

    def _ask_alone(
        self, key: Hashable, function: Callable[[Question], Any]
    ) -> Question:
        """Ask for a signal handler that has interrupted this object.

        The question has no place and nobody joins it.
        """
        question = Question(key, function)
        question.waiters = 1
        # Whatever outdates it would not find it.
        question.outdated = True
        question.number = self._asked = next(self._numbers)
        question.asked_at = self._clock()
        if self._closed:
            question.failure = _CLOSED
            question.finish()
        else:
            self._workers.start(question)
        return question

    def wait(self, question: Question, timeout: float) -> bool:
        """Wait for an answer or a failure.

        :param timeout: seconds
        :returns: whether there is one
        """
        done = False
        try:
            done = question.wait(timeout)
        finally:
            if not done:
                self.leave(question)
        return done

    def leave(self, question: Question) -> None:
        """Wait no longer.  A question that nobody waits for is not asked."""
        if question._owner is None:
            return
        with self._entered(), self._lock:
            question.waiters -= 1
            if not question.waiters and question.asked_at is None:
                self._line.pop(question, None)
                for of_key in (self._current, self._following):
                    if of_key.get(question.key) is question:
                        del of_key[question.key]

    def outdate(self, key: Hashable) -> None:
        """What was asked about this is not true any more.

        Those who wait get the answer all the same; who comes now waits for
        one that is asked after this call.
        """
        # Without the lock: one that is asked after it is looked at here is
        # asked after this call.
        question = self._current.get(key)
        if question is not None and question.asked_at is not None:
            question.outdated = True

    def load(self) -> Load:
        """What is going on just now, about."""
        return Load(
            asked=self._asked,
            out=self._out,
            waiting=len(self._line),
            durations=self._durations.counted(),
        )

    def close(self) -> None:
        """Ask nothing any more: what is asked from now on fails at once.

        What the database is at stays there; who waits for it goes on waiting.
        """
        self._closed = True
        if threading.get_ident() in self._inside:
            # What stands in line fails when its turn comes.
            return
        with self._entered(), self._lock:
            left = [*self._line, *self._following.values()]
            self._line.clear()
            self._following.clear()
            self._current.clear()
        for question in left:
            question.failure = _CLOSED
            question.finish()

    def _to_join(
        self, new: Question, *, fresh: bool, now: float
    ) -> Question | None:
        """The question to wait for; None: there has to be another one."""
        key = new.key
        current = self._current.get(key)
        if current is None or current.asked_at is None:
            return current
        if key not in self._overdue and self._is_overdue(current, now):
            self._overdue.add(key)
            current.outdated = current.overdue = True
            del self._current[key]
            return None
        if fresh or current.outdated:
            return self._following.setdefault(key, new)
        return current

    def _is_overdue(self, question: Question, now: float) -> bool:
        assert question.asked_at is not None
        # Before and after, for the clock may have been set back.
        return abs(now - question.asked_at) >= self._overdue_after

    def _has_place(self, question: Question) -> bool:
        """Give it a place, or else put it in line."""
        if self._out < self._concurrency:
            self._out += 1
            return True
        self._stand_in_line(question)
        return False

    def _stand_in_line(self, question: Question) -> None:
        self._line[question] = None
        if question.urgent:
            self._line.move_to_end(question, last=False)

    def _start(self, question: Question | None) -> None:
        while question is not None:
            self._workers.start(question)
            # In this order: it may have been asked and answered by now.
            if not question.done or question.thread_id is not None:
                return
            # No thread could be started, and its waiters know.
            question = self._leave_place(question)

    def _begin(self, question: Question) -> bool:
        """Whether it is to be asked still."""
        now = self._clock()
        with self._lock:
            if self._closed:
                question.failure = _CLOSED
                return False
            if not question.waiters:
                return False
            question.number = self._asked = next(self._numbers)
            question.asked_at = now
        return True

    def _end(self, question: Question) -> None:
        if question.asked_at is not None:
            self._durations.add(self._clock() - question.asked_at)
        self._start(self._leave_place(question))

    def _leave_place(self, question: Question) -> Question | None:
        """Who uses its place next; if nobody, the place is given back."""
        key = question.key
        with self._lock:
            if question.overdue:
                self._overdue.discard(key)
            elif self._current.get(key) is question:
                del self._current[key]
                following = self._following.pop(key, None)
                if following is not None:
                    self._current[key] = following
                    self._stand_in_line(following)
            if self._line:
                return self._line.popitem(last=False)[0]
            self._out -= 1
            return None
