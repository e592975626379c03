# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Worker threads under many submitters at once."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from cellmw.workers import Job, Workers
from tests.fakes import PATIENCE, Threads


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_each_job_is_done_once_and_by_one() -> None:
    workers = Workers()
    done: list[int] = []

    def submit(first: int) -> None:
        for number in range(first, first + 500):
            job = workers.submit(done.append, number)
            assert job.wait(PATIENCE)

    with Threads() as threads:
        for number in range(8):
            threads.start(submit, number * 500)
    assert sorted(done) == list(range(4000))
    # No more than there ever were jobs at once, and a few that were late.
    assert len(workers) <= 32
    workers.close()


def test_no_job_is_lost_where_threads_end_all_the_time() -> None:
    """Idle threads give up just when they are taken for the next job."""
    workers = Workers(idle_timeout=0.0005)
    lost: list[int] = []

    def submit(seed: int) -> None:
        chance = random.Random(seed)
        for number in range(300):
            job = workers.submit(int, number)
            if not job.wait(PATIENCE) or job.result != number:
                lost.append(number)
            time.sleep(chance.choice([0, 0.0004, 0.0005, 0.0006]))

    with Threads() as threads:
        for seed in range(6):
            threads.start(submit, seed)
    assert not lost
    _until_empty(workers)


def test_the_end_in_the_middle_of_it_loses_no_job_and_no_thread() -> None:
    for _ in range(30):
        workers = Workers()
        jobs: list[Job] = []
        barrier = threading.Barrier(5)

        def submit(
            workers: Workers = workers,
            jobs: list[Job] = jobs,
            barrier: threading.Barrier = barrier,
        ) -> None:
            barrier.wait()
            for number in range(30):
                job = workers.submit(int, number)
                jobs.append(job)
                assert job.wait(PATIENCE)

        with Threads() as threads:
            for _ in range(4):
                threads.start(submit)
            barrier.wait()
            workers.close()
        assert len(jobs) == 120
        _until_empty(workers)
        assert not workers._idle


def test_many_threads_wait_for_one_job_with_all_kinds_of_patience() -> None:
    workers = Workers()
    for _ in range(50):
        job = workers.submit(time.sleep, 0.001)
        told: list[bool] = []

        def wait(
            timeout: float, job: Job = job, told: list[bool] = told
        ) -> None:
            while not job.wait(timeout):
                pass
            told.append(job.done)

        with Threads() as threads:
            for timeout in (0, 0.0005, 0.001, 1):
                threads.start(wait, timeout)
        assert told == [True] * 4
    workers.close()


def _until_empty(workers: Workers) -> None:
    deadline = time.monotonic() + PATIENCE
    while len(workers):
        assert time.monotonic() < deadline, "a thread does not end"
        time.sleep(0.001)
