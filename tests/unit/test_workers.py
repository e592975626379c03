# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Worker threads; no I/O."""

from __future__ import annotations

import gc
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any, NoReturn

import pytest

from cellmw.workers import Job, Workers
from tests.fakes import PATIENCE, Gate, Threads


@pytest.fixture
def workers() -> Iterator[Workers]:
    workers = Workers(name="test-worker")
    yield workers
    workers.close()


def _raise(error: BaseException) -> NoReturn:
    raise error


def test_no_thread_is_there_before_the_first_job(workers: Workers) -> None:
    assert len(workers) == workers.busy == 0


def test_a_job_gives_what_its_function_returns(workers: Workers) -> None:
    job = workers.submit(divmod, 7, 2)
    assert job.wait(PATIENCE)
    assert job.done
    assert job.result == (3, 1)
    assert job.error is None


def test_a_job_runs_in_a_daemon_thread_that_says_whose_it_is(
    workers: Workers,
) -> None:
    job = workers.submit(threading.current_thread)
    assert job.wait()
    thread = job.result
    assert thread.daemon
    assert thread.name.startswith("test-worker-")
    assert job.thread_id == thread.ident != threading.get_ident()


@pytest.mark.parametrize("kind", [ValueError, SystemExit, KeyboardInterrupt])
def test_what_a_function_raises_is_the_jobs_error(
    workers: Workers, kind: type[BaseException]
) -> None:
    error = kind("it")
    job = workers.submit(_raise, error)
    assert job.wait(PATIENCE)
    assert job.error is error
    assert job.result is None
    # And the thread lives on.
    again = workers.submit(threading.get_ident)
    assert again.wait(PATIENCE)
    assert again.result == job.thread_id


def test_who_waits_for_too_short_is_told_so(workers: Workers) -> None:
    gate = Gate()
    job = workers.submit(gate.wait)
    assert not job.wait(0)
    assert not job.wait(-1)
    assert not job.wait(0.01)
    assert not job.done
    gate.open()
    assert job.wait(PATIENCE)
    assert job.wait(0)


def test_a_timeout_may_be_as_long_as_one_likes(workers: Workers) -> None:
    assert workers.submit(int).wait(sys.maxsize)


def test_any_number_of_threads_may_wait(workers: Workers) -> None:
    gate = Gate()
    job = workers.submit(gate.wait)
    found: list[bool] = []
    with Threads() as threads:
        for _ in range(20):
            threads.start(lambda: found.append(job.wait(PATIENCE)))
        gate.open()
    assert found == [True] * 20


def test_a_waiter_does_not_make_a_job_look_unfinished(
    workers: Workers,
) -> None:
    job = workers.submit(int)
    assert job.wait(PATIENCE)
    with job._running:  # as another waiter has it for a moment
        assert job.done
        assert job.wait(0)


def test_a_thread_is_used_again(workers: Workers) -> None:
    idents = set()
    for _ in range(50):
        job = workers.submit(threading.get_ident)
        assert job.wait(PATIENCE)
        idents.add(job.result)
    assert len(idents) == len(workers) == 1


def test_no_job_waits_for_another(workers: Workers) -> None:
    gate = Gate()
    jobs = [workers.submit(gate.wait) for _ in range(30)]
    gate.await_arrival(30)
    assert len(workers) == workers.busy == 30
    gate.open()
    assert all(job.wait(PATIENCE) for job in jobs)
    _until_none_is_busy(workers)


def test_threads_without_work_end() -> None:
    workers = Workers(idle_timeout=0.02)
    gate = Gate()
    for _ in range(5):
        workers.submit(gate.wait)
    gate.await_arrival(5)
    before = set(workers._threads)
    gate.open()
    for thread in before:
        thread.join(PATIENCE)
    assert len(workers) == 0
    assert not workers._idle
    # And there is one again when there is work.
    assert workers.submit(int).wait(PATIENCE)
    workers.close()


def test_a_job_given_just_as_a_thread_gives_up_is_done(
    workers: Workers,
) -> None:
    """The thread was taken from the idle ones, and has no job yet."""
    assert workers.submit(int).wait(PATIENCE)
    worker = workers._idle.pop()
    assert worker._taken()
    job = Job(threading.get_ident, ())
    worker.give(job)
    assert job.wait(PATIENCE)
    assert job.result == worker.ident


def test_a_thread_that_cannot_be_started_is_the_jobs_error(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    job = workers.submit(int)
    assert job.wait(0)
    assert isinstance(job.error, RuntimeError)
    assert job.thread_id is None
    monkeypatch.undo()
    assert len(workers) == 0
    assert workers.submit(int).wait(PATIENCE)


def test_the_end_ends_idle_threads_at_once_and_busy_ones_after(
    workers: Workers,
) -> None:
    gate = Gate()
    busy = workers.submit(gate.wait)
    gate.await_arrival()
    assert workers.submit(int).wait(PATIENCE)
    threads = set(workers._threads)
    workers.close()
    workers.close()
    assert [thread.is_alive() for thread in threads].count(True) == 1
    gate.open()
    assert busy.wait(PATIENCE)
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_after_the_end_a_job_is_done_and_its_thread_ends(
    workers: Workers,
) -> None:
    workers.close()
    job = workers.submit(threading.current_thread)
    assert job.wait(PATIENCE)
    job.result.join(PATIENCE)
    assert not job.result.is_alive()


class Thing:
    """Something that can be looked for."""


def test_nothing_of_a_job_outlives_it(workers: Workers) -> None:
    """Not what it was given, what it gave, nor what it raised."""

    def give(thing: Thing, out: list[Any]) -> Thing:
        out.append(weakref.ref(thing))
        made = Thing()
        out.append(weakref.ref(made))
        return made

    def fail(thing: Thing, out: list[Any]) -> NoReturn:
        out.append(weakref.ref(thing))
        raise ValueError

    found: list[Any] = []
    gc.disable()  # not even in a cycle
    try:
        for function in (give, fail):
            job = workers.submit(function, Thing(), found)
            assert job.wait(PATIENCE)
            thread = workers.submit(threading.current_thread)
            assert thread.wait(PATIENCE)
            del job, thread
            _until_none_is_busy(workers)
        deadline = time.monotonic() + PATIENCE
        while any(each() is not None for each in found):
            assert time.monotonic() < deadline, "something is kept alive"
    finally:
        gc.enable()
    assert len(found) == 3


def test_the_last_job_does_not_live_until_the_next(workers: Workers) -> None:
    job = workers.submit(Thing)
    assert job.wait(PATIENCE)
    found = weakref.ref(job.result)
    del job
    deadline = time.monotonic() + PATIENCE
    while found() is not None:
        assert time.monotonic() < deadline, "the result is kept alive"


def _until_none_is_busy(workers: Workers) -> None:
    deadline = time.monotonic() + PATIENCE
    while workers.busy:
        assert time.monotonic() < deadline
