# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The limit and the breaker of a cell, with many threads at them at once."""

from __future__ import annotations

import contextlib
import itertools
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from cellmw import exceptions
from cellmw.transports.guard import Guard, Guards

UUID = "11111111-1111-1111-1111-111111111111"
# Far more than anything here takes, in seconds.
LONG = 60.0


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    """Let threads meet at every line, and not only after 5 ms."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def all_at_once(count: int, work: Callable[[int], object]) -> None:
    """Run a function in so many threads that begin together."""
    barrier = threading.Barrier(count)
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            barrier.wait(LONG)
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=run, args=(number,)) for number in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
        assert not thread.is_alive()
    assert not errors, errors


def until_equal(value: Callable[[], int], wanted: int) -> None:
    deadline = time.monotonic() + LONG
    while value() != wanted:
        assert time.monotonic() < deadline
        time.sleep(0.0005)


class Inside:
    """How many are in at once, and the most that ever were."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.now = 0
        self.most = 0

    def __enter__(self) -> None:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)

    def __exit__(self, *args: object) -> None:
        with self._lock:
            self.now -= 1


def test_never_more_than_the_limit_and_everybody_gets_in() -> None:
    guard = Guard(UUID, max_sends=5)
    inside = Inside()

    def send(number: int) -> None:
        for _ in range(200):
            admission = guard.admit(LONG)
            with inside:
                time.sleep(0.0001)
            guard.leave()
            guard.report(True, admission, seconds=0.001, call=number % 2 == 0)

    all_at_once(32, send)
    assert inside.most == 5
    stats = guard.stats()
    assert (stats.under_way, stats.waiting, stats.stuck) == (0, 0, 0)
    assert stats.sent == 6400
    assert sum(stats.casts.counts) == sum(stats.calls.counts) == 3200
    assert (stats.refused_busy, stats.refused_down) == (0, 0)


def test_the_line_is_served_in_the_order_of_coming() -> None:
    guard = Guard(UUID, max_sends=2)
    served: list[int] = []
    go_on = threading.Event()

    def wait(number: int) -> None:
        guard.admit(LONG)
        served.append(number)
        go_on.wait(LONG)

    guard.admit(0)
    guard.admit(0)
    threads = []
    for number in range(10):
        threads.append(threading.Thread(target=wait, args=(number,)))
        threads[-1].start()
        until_equal(lambda: guard.stats().waiting, number + 1)
    for number in range(10):
        guard.leave()
        until_equal(lambda: len(served), number + 1)
        # Who comes now does not overtake those in line.
        with pytest.raises(exceptions.CellBusy):
            guard.admit(0)
    assert served == list(range(10))
    go_on.set()
    for thread in threads:
        thread.join()


def test_who_waits_too_long_leaves_the_line_to_the_others() -> None:
    guard = Guard(UUID, max_sends=1)
    guard.admit(0)
    served: list[str] = []
    refused: list[float] = []

    def patient() -> None:
        guard.admit(LONG)
        served.append("patient")

    def hasty() -> None:
        started = time.monotonic()
        with pytest.raises(exceptions.CellBusy):
            guard.admit(0.05)
        refused.append(time.monotonic() - started)

    first = threading.Thread(target=hasty)
    first.start()
    until_equal(lambda: guard.stats().waiting, 1)
    second = threading.Thread(target=patient)
    second.start()
    first.join()
    assert refused[0] >= 0.05
    assert not served
    guard.leave()
    second.join()
    assert served == ["patient"]
    assert guard.stats().under_way == 1
    assert guard.stats().refused_busy == 1


def test_no_place_is_lost_between_handing_over_and_giving_up() -> None:
    guard = Guard(UUID, max_sends=3)
    inside = Inside()
    got = [0] * 16

    def send(number: int) -> None:
        chance = random.Random(number)
        for _ in range(400):
            try:
                guard.admit(chance.uniform(0, 0.0003))
            except exceptions.CellBusy:
                continue
            got[number] += 1
            with inside:
                time.sleep(0.0001)
            guard.leave()

    all_at_once(16, send)
    assert inside.most <= 3
    stats = guard.stats()
    assert (stats.under_way, stats.waiting) == (0, 0)
    assert sum(got) + stats.refused_busy == 6400
    # Both have happened, or this shows nothing.
    assert 0 < stats.refused_busy < 6400


def test_those_in_line_are_refused_as_soon_as_the_cell_goes_down() -> None:
    guard = Guard(UUID, max_sends=2, breaker_failures=2)
    admissions = [guard.admit(0), guard.admit(0)]
    errors: list[Exception] = []

    def wait() -> None:
        with pytest.raises(exceptions.CellUnavailable) as caught:
            guard.admit(LONG)
        errors.append(caught.value)

    threads = [threading.Thread(target=wait) for _ in range(8)]
    for thread in threads:
        thread.start()
    until_equal(lambda: guard.stats().waiting, 8)
    started = time.monotonic()
    for admission in admissions:
        guard.report(False, admission)
    for thread in threads:
        thread.join()
    assert time.monotonic() - started < LONG / 2
    assert len(errors) == 8
    stats = guard.stats()
    assert (stats.under_way, stats.waiting) == (2, 0)
    assert stats.refused_down == 8


def test_of_many_at_once_one_is_the_trial() -> None:
    now = [0.0]
    guard = Guard(
        UUID,
        max_sends=64,
        breaker_failures=1,
        breaker_reset_after=30,
        clock=lambda: now[0],
    )
    guard.report(False, guard.admit(0))
    guard.leave()
    for round_ in range(1, 20):
        now[0] += 30
        admitted: list[int] = []

        def send(number: int, admitted: list[int] = admitted) -> None:
            with contextlib.suppress(exceptions.CellUnavailable):
                admitted.append(guard.admit(LONG))

        all_at_once(16, send)
        assert len(admitted) == 1, round_
        guard.leave()
        guard.report(False, admitted[0])
    assert guard.stats().refused_down == 19 * 15


def test_the_breaker_opens_once_whoever_fails_last() -> None:
    for _ in range(20):
        guard = Guard(UUID, breaker_failures=8, max_sends=64)
        barrier = threading.Barrier(16)

        def fail(
            number: int,
            guard: Guard = guard,
            barrier: threading.Barrier = barrier,
        ) -> None:
            admission = guard.admit(0)
            barrier.wait(LONG)
            guard.leave()
            guard.report(False, admission)

        all_at_once(16, fail)
        stats = guard.stats()
        assert stats.down
        assert (stats.went_down, stats.failures, stats.failed) == (1, 8, 16)


def test_a_storm_of_everything_leaves_nothing_behind() -> None:
    ticks = itertools.count()
    tick = 2.0**-20  # seconds; a sum of ticks is exact
    guard = Guard(
        UUID,
        max_sends=6,
        breaker_failures=3,
        breaker_reset_after=10 * tick,
        clock=lambda: next(ticks) * tick,
    )
    inside = Inside()
    counted = [[0, 0, 0, 0, 0] for _ in range(16)]

    def send(number: int) -> None:
        chance = random.Random(number)
        counts = counted[number]
        for _ in range(300):
            try:
                admission = guard.admit(chance.uniform(0, 0.001))
            except exceptions.CellUnavailable:
                counts[3] += 1
                continue
            except exceptions.CellBusy:
                counts[4] += 1
                continue
            with inside:
                time.sleep(0.0001)
                verdict = chance.choice([True, False, None])
            stuck = chance.random() < 0.2
            if stuck:
                guard.note_stuck()
            # Either order: the worker leaves, the request reports.
            if chance.random() < 0.5:
                guard.leave(stuck=stuck)
                guard.report(verdict, admission)
            else:
                guard.report(verdict, admission)
                guard.leave(stuck=stuck)
            counts[(True, False, None).index(verdict)] += 1

    all_at_once(16, send)
    assert inside.most <= 6
    sent, failed, _, refused_down, refused_busy = map(
        sum, zip(*counted, strict=True)
    )
    stats = guard.stats()
    assert (stats.under_way, stats.waiting, stats.stuck) == (0, 0, 0)
    assert (stats.sent, stats.failed) == (sent, failed)
    assert stats.refused_down == refused_down
    assert stats.refused_busy == refused_busy
    assert stats.went_down > 1
    # Nothing keeps it from being up again.
    for _ in range(10):
        next(ticks)
    guard.report(True, guard.admit(0))
    assert not guard.stats().down


def test_guards_are_thrown_away_under_traffic_without_losing_a_place() -> None:
    guards = Guards(
        lambda uuid, name: Guard(uuid, name, max_sends=4), max_idle=0
    )
    inside = {str(number): Inside() for number in range(3)}
    done = threading.Event()

    def send(number: int) -> None:
        cell = str(number % 3)
        for _ in range(500):
            guard, admission = guards.admit(cell, None, LONG)
            with inside[cell]:
                time.sleep(0.0001)
            guard.leave()
            guard.report(True, admission)

    def sweep() -> None:
        while not done.is_set():
            guards.sweep()

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    all_at_once(12, send)
    done.set()
    sweeper.join()
    assert all(cell.most <= 4 for cell in inside.values())
    guards.sweep()
    assert not guards.stats()
