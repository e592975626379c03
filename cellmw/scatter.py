# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The same work in many cells at once.

A gather puts one call for each cell into the line of its process.  At most
:data:`MOST_THREADS` threads take calls from that line; a thread ends when the
line is empty.  They are daemons: a call that hangs holds its thread and
neither its gather nor the end of the process.
"""

from __future__ import annotations

import collections
import contextvars
import copy
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from oslo_context import context as oslo_context

from cellmw import exceptions, redaction, runtime
from cellmw.context import HasUUID, target

C = TypeVar("C", bound=HasUUID | str)
R = TypeVar("R")

MOST_THREADS = 64


def scatter_gather(
    context: Any,
    cells: Iterable[C],
    function: Callable[..., R],
    *args: Any,
    timeout: float = 60.0,
) -> dict[C, R | BaseException]:
    """Call ``function(cell_context, *args)`` for each cell at once.

    Each call has a thread and a copy of the context, targeted at its cell as
    by :func:`cellmw.target_cell`, with a lease that ends when the call ends.
    Its context variables are the caller's; its copy is oslo.context's
    current context, so that log lines show the request's id.  Blocks until
    all cells have answered, and for ``timeout`` at most.  All gathers of a
    process share 64 threads, those inside a call too.
    Thread-safe.

    :param cells: what :func:`cellmw.target_cell` takes; has to be hashable
    :param timeout: seconds
    :returns: for each cell, in the order given, what the function returned or
        the exception that stands for it.  That is what the function or
        ``target_cell`` raised, its traceback without variables, or
        :class:`~cellmw.CellTimeout` where no answer came in time or no
        thread became free.  A call that answers later changes nothing here.
    :raises LookupError: as for :func:`cellmw.target_cell`
    """
    deadline = time.monotonic() + timeout
    process = runtime.registry().of(context).process()
    answers: queue.SimpleQueue[tuple[C, R | BaseException]]
    answers = queue.SimpleQueue()

    def call(cell: C, own: Any) -> None:
        answer: R | BaseException
        try:
            with target(process, own, cell) as cell_context:
                # oslo.log shows the request's id.
                if isinstance(cell_context, oslo_context.RequestContext):
                    cell_context.update_store()
                answer = function(cell_context, *args)
        except BaseException as error:
            redaction.strip_frames(error)
            answer = error
        answers.put((cell, answer))

    calls = {cell: _Call(call, cell, copy.copy(context)) for cell in cells}
    results: dict[C, R | BaseException] = {}
    threads = _threads_here()
    try:
        for cell, each in calls.items():
            try:
                threads.take(each)
            except RuntimeError as error:
                results[cell] = error
        while len(results) < len(calls):
            left = min(deadline - time.monotonic(), threading.TIMEOUT_MAX)
            cell, answer = answers.get(timeout=max(0.0, left))
            results[cell] = answer
    except queue.Empty:
        pass
    finally:
        threads.forget(calls.values())
    return {
        cell: results[cell] if cell in results else _timeout(each, timeout)
        for cell, each in calls.items()
    }


class _Call:
    """One call, which a thread takes from the line."""

    def __init__(
        self, function: Callable[..., None], cell: HasUUID | str, own: Any
    ) -> None:
        self._function = function
        self._context = own
        self._variables = contextvars.copy_context()
        self.cell = cell
        self.is_started = False

    def run(self) -> None:
        self.is_started = True
        self._variables.run(self._function, self.cell, self._context)


def _timeout(call: _Call, timeout: float) -> exceptions.CellTimeout:
    cell = call.cell
    name = redaction.one_line(cell if isinstance(cell, str) else cell.uuid)
    problem = "has not answered"
    if not call.is_started:
        problem = f"found none of {MOST_THREADS} threads free"
    return exceptions.CellTimeout(
        f"cell {name} {problem} within {timeout:g} seconds", cell
    )


class _Threads:
    """The threads of all gathers of one process."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._line: collections.deque[_Call] = collections.deque()
        self._threads: set[threading.Thread] = set()

    def take(self, call: _Call) -> None:
        """Put a call in the line, and start a thread if there may be more.

        :raises RuntimeError: there is no thread and none can be started
        """
        thread = threading.Thread(
            target=self._run, name="cellmw-gather", daemon=True
        )
        try:
            with self._lock:
                self._line.append(call)
                if len(self._threads) >= MOST_THREADS:
                    return
                self._threads.add(thread)
            thread.start()
        except RuntimeError:
            with self._lock:
                self._threads.discard(thread)
                if not self._threads:
                    raise
        finally:
            # A signal's handler may have raised before the start.
            if thread.ident is None:
                self._threads.discard(thread)

    def forget(self, calls: Iterable[_Call]) -> None:
        """Take those out of the line that no thread has taken."""
        with self._lock:
            if self._line:
                ended = set(calls)
                self._line = collections.deque(
                    call for call in self._line if call not in ended
                )

    def _run(self) -> None:
        # A call may fork; its child goes on here, where a lock may be held.
        while self._pid == os.getpid():
            with self._lock:
                if not self._line:
                    self._threads.discard(threading.current_thread())
                    return
                call = self._line.popleft()
            call.run()
            # Or what it has would live as long as the next one takes.
            del call


# By process id, without a lock: one that another thread held during a fork
# would never be free in the child.
_threads: dict[int, _Threads] = {}
os.register_at_fork(after_in_child=_threads.clear)


def _threads_here() -> _Threads:
    return _threads.setdefault(os.getpid(), _Threads())
