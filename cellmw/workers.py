# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Threads that do what may block for longer than a request can wait.

Neither oslo.messaging nor a database driver can be given a deadline that
holds whatever the other side does: a broker under a memory alarm keeps a
cast for ever.  So such work runs here, and the request waits for it as long
as it wants to and no longer.  A thread that does not come back is then ours,
not the server's.

:class:`Workers` owns its threads.  They are daemons, for one that hangs must
not hold the process at its end.  The standard library's executor is not used:
it joins its threads at exit, and costs a cast more than twice as much.
"""

from __future__ import annotations

import collections
import itertools
import threading
from collections.abc import Callable
from typing import Any


class Job:
    """One function under way, once :class:`Workers` have started it.

    Any number of threads may wait for it.

    :ivar done: whether it has ended
    :ivar result: what the function returned, once it is done
    :ivar error: what it raised, or None
    :ivar thread_id: the thread that runs it, once it has been started
    """

    __slots__ = (
        "_args",
        "_function",
        "_running",
        "done",
        "error",
        "result",
        "thread_id",
    )

    def __init__(
        self, function: Callable[..., Any], args: tuple[Any, ...]
    ) -> None:
        self._function: Callable[..., Any] | None = function
        self._args = args
        self._running = threading.Lock()
        self._running.acquire()
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None
        self.thread_id: int | None = None

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is done.

        :param timeout: seconds; None waits without end
        :returns: whether it is done
        """
        limit = -1.0
        if timeout is not None:
            limit = min(max(0.0, timeout), threading.TIMEOUT_MAX)
        if not self._running.acquire(timeout=limit):
            # Another thread that waits may have it just now.
            return self.done
        # Hand on to the next thread that waits.
        self._running.release()
        return True

    def run(self) -> None:
        """Do it, in the calling thread.  Never raises."""
        function, args = self._function, self._args
        self._function, self._args = None, ()
        self.thread_id = threading.get_ident()
        try:
            assert function is not None, "a job runs once"
            self.result = function(*args)
        except BaseException as error:
            self.error = error
        finally:
            # What a waiter finds must not keep alive what the job used, nor
            # lead back here: this frame is part of the error's traceback.
            del function, args, self

    def finish(self) -> None:
        """Let those go on who wait."""
        self.done = True
        self._running.release()


class Workers:
    """A growing and shrinking set of threads, each doing one job at a time.

    It has no bound of its own and no queue: who submits bounds what is under
    way, for only there it is known for whom.  Thread-safe.  Starts no thread
    before the first job.

    :param idle_timeout: seconds after which a thread without work ends
    :param name: the beginning of the threads' names
    """

    def __init__(
        self, *, idle_timeout: float = 30.0, name: str = "cellmw-worker"
    ) -> None:
        self._idle_timeout = idle_timeout
        self._name = name
        self._numbers = itertools.count(1)
        # The most recently used thread is taken first, so that those not
        # needed reach their idle timeout.
        self._idle: collections.deque[_Worker] = collections.deque()
        self._threads: set[_Worker] = set()
        self._closed = False

    def submit(self, function: Callable[..., Any], *args: Any) -> Job:
        """Start a function in a thread of its own.  Does not block.

        A thread that cannot be started is the job's error.
        """
        job = Job(function, args)
        self.start(job)
        return job

    def start(self, job: Job) -> None:
        """Start a job made beforehand; the rest as :meth:`submit`."""
        try:
            worker = self._idle.pop()
        except IndexError:
            worker = _Worker(self, f"{self._name}-{next(self._numbers)}")
            worker.give(job)
            try:
                worker.start()
            except RuntimeError as error:
                job.error = error
                job.finish()
        else:
            worker.give(job)

    def __len__(self) -> int:
        """How many threads there are, idle ones included."""
        return len(self._threads)

    @property
    def busy(self) -> int:
        """How many jobs are under way, about."""
        return max(0, len(self._threads) - len(self._idle))

    def close(self, timeout: float = 1.0) -> None:
        """End the idle threads, and the busy ones after their job.

        Waits for the idle ones, at most ``timeout`` seconds each.  May be
        called twice.
        """
        self._closed = True
        while True:
            try:
                worker = self._idle.pop()
            except IndexError:
                return
            worker.give(None)
            worker.join(timeout)


class _Worker(threading.Thread):
    def __init__(self, owner: Workers, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._owner = owner
        self._job: Job | None = None
        self._given = threading.Lock()
        self._given.acquire()

    def give(self, job: Job | None) -> None:
        self._job = job
        self._given.release()

    def run(self) -> None:
        owner = self._owner
        owner._threads.add(self)
        try:
            while (job := self._next_job()) is not None:
                job.run()
                # Idle first: who is woken by the job's end and submits the
                # next one finds this thread, instead of starting another.
                owner._idle.append(self)
                job.finish()
                if owner._closed and not self._taken():
                    return
                # Or what it has given would live until the next one comes.
                del job
        finally:
            owner._threads.discard(self)

    def _next_job(self) -> Job | None:
        if not self._given.acquire(timeout=self._owner._idle_timeout):
            if not self._taken():
                return None
            # Taken from the idle ones just now: the job is on its way.
            self._given.acquire()
        job, self._job = self._job, None
        return job

    def _taken(self) -> bool:
        """Whether somebody has this thread; if not, nobody gets it now."""
        try:
            self._owner._idle.remove(self)
        except ValueError:
            return True
        return False
