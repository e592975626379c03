# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The limit and the breaker of a cell, one step after another."""

from __future__ import annotations

import logging
import types
from collections.abc import Callable
from typing import Any

import pytest

from cellmw import exceptions
from cellmw.durations import BOUNDS
from cellmw.transports import guard as guards_module
from cellmw.transports.guard import Guard, Guards, Place, StuckThreads

UUID = "11111111-1111-1111-1111-111111111111"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make_guard(clock: Clock) -> Callable[..., Guard]:
    def make(**options: Any) -> Guard:
        settings: dict[str, Any] = {
            "max_sends": 4,
            "breaker_failures": 3,
            "breaker_reset_after": 30.0,
            "clock": clock,
            **options,
        }
        return Guard(UUID, "cell-one", **settings)

    return make


@pytest.fixture
def guard(make_guard: Callable[..., Guard]) -> Guard:
    return make_guard()


def go(guard: Guard, delivered: bool | None, **details: Any) -> float:
    """A message's whole way."""
    admission = guard.admit(0)
    guard.leave()
    return guard.report(delivered, admission, **details)


def take_down(guard: Guard, failures: int = 3) -> None:
    for _ in range(failures):
        go(guard, False, cause="no way")
    assert guard.stats().down


def guard_due(guard: Guard, clock: Clock) -> float:
    """When the next trial may go."""
    return clock.now + guard.stats().retry_after


# The limit


def test_so_many_at_once_and_not_one_more(guard: Guard) -> None:
    for _ in range(4):
        guard.admit(0)
    with pytest.raises(exceptions.CellBusy) as caught:
        guard.admit(0)
    assert caught.value.cell_uuid == UUID
    assert caught.value.cell_name == "cell-one"
    assert caught.value.retry_after == 1
    assert not caught.value.maybe_delivered
    assert guard.stats().under_way == 4
    assert guard.stats().refused_busy == 1


def test_a_place_that_is_given_back_is_free(guard: Guard) -> None:
    for _ in range(100):
        guard.admit(0)
        guard.leave()
    for _ in range(4):
        guard.admit(0)
    guard.leave()
    guard.admit(0)
    assert guard.stats().under_way == 4


def test_a_place_that_is_stuck_stays_taken(guard: Guard) -> None:
    for _ in range(4):
        guard.admit(0)
        guard.note_stuck()
    stats = guard.stats()
    assert (stats.under_way, stats.stuck) == (4, 4)
    with pytest.raises(exceptions.CellBusy):
        guard.admit(0)
    guard.leave(stuck=True)
    stats = guard.stats()
    assert (stats.under_way, stats.stuck) == (3, 3)
    guard.admit(0)


class OwnTurn:
    """The lock of a message in line; the test says how the wait ends."""

    def __init__(self, wait: Callable[[], bool]) -> None:
        self._wait = wait

    def acquire(self, timeout: float) -> bool:
        return self._wait()

    def release(self) -> None:
        pass


@pytest.fixture
def wait_by(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[Callable[[], bool]], None]:
    """Sets what happens while a message waits in line."""

    def set_wait(wait: Callable[[], bool]) -> None:
        def make() -> Any:
            return types.SimpleNamespace(turn=OwnTurn(wait), admission=None)

        monkeypatch.setattr(guards_module, "_Waiter", make)

    return set_wait


def test_a_place_handed_over_as_the_time_ends_is_taken(
    guard: Guard, wait_by: Callable[[Callable[[], bool]], None]
) -> None:
    def hand_over_too_late() -> bool:
        guard.leave()
        return False

    for _ in range(4):
        guard.admit(0)
    wait_by(hand_over_too_late)
    guard.admit(1)
    stats = guard.stats()
    assert (stats.under_way, stats.waiting) == (4, 0)
    assert stats.refused_busy == 0


def test_a_place_that_leaves_no_time_to_send_goes_to_the_next(
    guard: Guard, clock: Clock, wait_by: Callable[[Callable[[], bool]], None]
) -> None:
    """Else the message's deadline would count against a healthy cell."""

    def hand_over_late() -> bool:
        clock.now += 9.9
        guard.leave()
        return True

    for _ in range(4):
        guard.admit(0)
    wait_by(hand_over_late)
    with pytest.raises(exceptions.CellBusy, match="too late to send"):
        guard.admit(10)
    stats = guard.stats()
    assert (stats.under_way, stats.waiting) == (3, 0)
    assert (stats.refused_busy, stats.failures) == (1, 0)


@pytest.mark.parametrize("handed_over", [False, True])
def test_who_is_interrupted_in_line_keeps_no_place(
    guard: Guard,
    wait_by: Callable[[Callable[[], bool]], None],
    handed_over: bool,
) -> None:
    def interrupt() -> bool:
        if handed_over:
            guard.leave()
        raise KeyboardInterrupt

    for _ in range(4):
        guard.admit(0)
    wait_by(interrupt)
    with pytest.raises(KeyboardInterrupt):
        guard.admit(1)
    stats = guard.stats()
    assert (stats.under_way, stats.waiting) == (4 - handed_over, 0)
    for _ in range(stats.under_way):
        guard.leave()
    assert guard.stats().under_way == 0


def test_who_is_interrupted_as_the_cell_goes_down_gives_nothing_back(
    guard: Guard, wait_by: Callable[[Callable[[], bool]], None]
) -> None:
    admissions = [guard.admit(0) for _ in range(4)]

    def interrupt() -> bool:
        for admission in admissions:
            guard.report(False, admission)
        raise KeyboardInterrupt

    wait_by(interrupt)
    with pytest.raises(KeyboardInterrupt):
        guard.admit(1)
    assert guard.stats().under_way == 4


def test_who_is_in_line_when_the_cell_goes_down_is_refused(
    guard: Guard, wait_by: Callable[[Callable[[], bool]], None]
) -> None:
    admissions = [guard.admit(0) for _ in range(4)]

    def fail() -> bool:
        for admission in admissions:
            guard.report(False, admission)
        return True

    wait_by(fail)
    with pytest.raises(exceptions.CellUnavailable) as caught:
        guard.admit(1)
    assert caught.value.retry_after == 30
    stats = guard.stats()
    assert (stats.under_way, stats.waiting) == (4, 0)
    assert stats.refused_down == 1


# The breaker


def test_failures_in_a_row_take_a_cell_down(
    guard: Guard, clock: Clock
) -> None:
    assert go(guard, False) == 0
    assert go(guard, False) == 0
    assert not guard.stats().down
    assert go(guard, False) == 30
    assert guard.stats().down
    clock.now += 12.5
    with pytest.raises(exceptions.CellUnavailable) as caught:
        guard.admit(5)
    assert not isinstance(caught.value, exceptions.DeliveryUncertain)
    assert caught.value.cell_uuid == UUID
    assert caught.value.cell_name == "cell-one"
    assert caught.value.retry_after == 17.5
    assert caught.value.retry_after_header == "18"
    stats = guard.stats()
    assert stats.retry_after == 17.5
    assert (stats.failed, stats.refused_down, stats.went_down) == (3, 1, 1)
    assert stats.under_way == 0


def test_a_success_in_between_starts_the_row_anew(guard: Guard) -> None:
    for _ in range(10):
        go(guard, False)
        go(guard, False)
        assert go(guard, True) == 0
    assert not guard.stats().down
    assert guard.stats().failures == 0


def test_what_says_nothing_of_the_cell_changes_nothing(guard: Guard) -> None:
    for _ in range(10):
        go(guard, None)
    go(guard, False)
    go(guard, None)
    go(guard, False)
    assert guard.stats().failures == 2
    assert not guard.stats().down
    go(guard, None)
    go(guard, False)
    assert guard.stats().down


def test_without_a_breaker_no_cell_goes_down(
    make_guard: Callable[..., Guard],
) -> None:
    guard = make_guard(breaker_failures=0)
    for _ in range(100):
        assert go(guard, False) == 0
    guard.admit(0)


def test_one_trial_goes_when_its_time_has_come(
    guard: Guard, clock: Clock
) -> None:
    take_down(guard)
    clock.now += 29.9
    with pytest.raises(exceptions.CellUnavailable):
        guard.admit(0)
    clock.now += 0.1
    guard.admit(0)
    for _ in range(3):
        with pytest.raises(exceptions.CellUnavailable) as caught:
            guard.admit(5)
        assert caught.value.retry_after == 1
    assert guard.stats().under_way == 1
    assert guard.stats().retry_after == 0


def test_a_trial_that_arrives_brings_the_cell_up(
    guard: Guard, clock: Clock
) -> None:
    take_down(guard)
    clock.now += 30
    assert go(guard, True) == 0
    stats = guard.stats()
    assert (stats.down, stats.failures, stats.retry_after) == (False, 0, 0)
    # The row begins anew.
    go(guard, False)
    go(guard, False)
    assert not guard.stats().down
    go(guard, False)
    assert guard.stats().down
    assert guard.stats().went_down == 2


def test_a_trial_that_fails_leaves_it_down_for_as_long_again(
    guard: Guard, clock: Clock
) -> None:
    take_down(guard)
    for _ in range(3):
        clock.now = guard_due(guard, clock)
        assert go(guard, False) == 30
        with pytest.raises(exceptions.CellUnavailable) as caught:
            guard.admit(0)
        assert caught.value.retry_after == 30
    assert guard.stats().went_down == 1


def test_a_trial_counts_its_wait_from_its_end(
    guard: Guard, clock: Clock
) -> None:
    take_down(guard)
    clock.now += 30
    admission = guard.admit(0)
    clock.now += 10
    guard.leave()
    assert guard.report(False, admission) == 30


def test_a_trial_that_says_nothing_lets_the_next_one_go(
    guard: Guard, clock: Clock
) -> None:
    take_down(guard)
    clock.now += 30
    go(guard, None)
    assert guard.stats().down
    assert go(guard, True) == 0
    assert not guard.stats().down


def test_a_trial_needs_a_place_and_nobody_waits_for_one(
    guard: Guard, clock: Clock
) -> None:
    admissions = [guard.admit(0) for _ in range(4)]
    for admission in admissions:
        guard.note_stuck()
        guard.report(False, admission)
    assert guard.stats().down
    clock.now += 100
    # It would wait for longer than the test may take.
    with pytest.raises(exceptions.CellUnavailable) as caught:
        guard.admit(1e6)
    assert caught.value.retry_after == 1
    guard.leave(stuck=True)
    assert guard.report(True, guard.admit(1e6)) == 0
    assert not guard.stats().down


def test_a_success_from_before_does_not_bring_a_cell_up(
    guard: Guard, clock: Clock
) -> None:
    early = guard.admit(0)
    take_down(guard)
    guard.report(True, early)
    assert guard.stats().down
    assert guard.stats().failures == 3
    # Nor does it end a trial.
    clock.now += 30
    guard.admit(0)
    guard.report(True, early)
    with pytest.raises(exceptions.CellUnavailable):
        guard.admit(0)


def test_a_failure_from_before_does_not_put_off_the_trial(
    guard: Guard, clock: Clock
) -> None:
    early = guard.admit(0)
    take_down(guard)
    clock.now += 20
    assert guard.report(False, early) == 10
    clock.now += 10
    guard.leave()
    guard.admit(0)


def test_a_failure_from_before_does_not_count_when_it_is_up_again(
    guard: Guard, clock: Clock
) -> None:
    early = [guard.admit(0) for _ in range(3)]
    take_down(guard)
    clock.now += 30
    go(guard, True)
    for admission in early:
        assert guard.report(False, admission) == 0
    stats = guard.stats()
    assert (stats.down, stats.failures) == (False, 0)
    assert stats.failed == 6


def test_a_success_from_before_does_not_end_a_new_row(
    guard: Guard, clock: Clock
) -> None:
    early = guard.admit(0)
    take_down(guard)
    clock.now += 30
    go(guard, True)
    go(guard, False)
    guard.report(True, early)
    assert guard.stats().failures == 1


@pytest.mark.parametrize("jump", [-3600.0, -15.0])
def test_a_clock_that_goes_back_makes_no_wait_longer(
    guard: Guard, clock: Clock, jump: float
) -> None:
    take_down(guard)
    clock.now += jump
    with pytest.raises(exceptions.CellUnavailable) as caught:
        guard.admit(0)
    assert caught.value.retry_after == 30
    clock.now += 30
    guard.admit(0)


def test_a_clock_that_jumps_ahead_lets_one_trial_go(
    guard: Guard, clock: Clock
) -> None:
    take_down(guard)
    clock.now += 3600
    assert guard.stats().retry_after == 0
    guard.admit(0)
    with pytest.raises(exceptions.CellUnavailable):
        guard.admit(0)


def test_each_change_is_one_line_in_the_log(
    guard: Guard, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    guard.cell_name = "cell\none"
    take_down(guard)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    line = record.getMessage()
    assert UUID in line
    assert r"cell\none" in line
    assert "3 failed" in line
    assert "no way" in line
    assert "30.0 seconds" in line
    caplog.clear()
    for _ in range(5):
        with pytest.raises(exceptions.CellUnavailable):
            guard.admit(0)
    clock.now += 30
    go(guard, False)
    assert not caplog.records
    clock.now += 30
    go(guard, True)
    go(guard, True)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "up again" in record.getMessage()
    assert UUID in record.getMessage()


# Numbers


def test_durations_are_counted_by_class(guard: Guard) -> None:
    go(guard, True, seconds=0.0)
    go(guard, True, seconds=BOUNDS[0])
    go(guard, True, seconds=0.0006)
    go(guard, True, seconds=61.0)
    go(guard, True, seconds=0.3, call=True)
    go(guard, False)
    go(guard, None)
    # A call that was delivered, and whose reply is still awaited.
    go(guard, True, call=True)
    stats = guard.stats()
    assert stats.sent == 6
    assert stats.casts.counts[:2] == (2, 1)
    assert stats.casts.counts[-1] == 1
    assert sum(stats.casts.counts) == 4
    assert stats.casts.total == pytest.approx(61.0011)
    assert sum(stats.calls.counts) == 1
    assert stats.calls.total == 0.3
    guard.note_duration(12.0, call=True)
    stats = guard.stats()
    assert sum(stats.calls.counts) == 2
    assert stats.calls.counts[BOUNDS.index(30.0)] == 1
    assert stats.sent == 6


# Guards


def test_a_cell_has_one_guard(make_guard: Callable[..., Guard]) -> None:
    made: list[str] = []

    def make(cell_uuid: str, cell_name: str | None) -> Guard:
        made.append(cell_uuid)
        return Guard(cell_uuid, cell_name)

    guards = Guards(make)
    one, _ = guards.admit("1", "one", 0)
    again, _ = guards.admit("1", "one", 0)
    other, _ = guards.admit("2", "two", 0)
    assert one is again
    assert one is not other
    assert made == ["1", "2"]
    assert [stats.under_way for stats in guards.stats()] == [2, 1]


def test_a_cell_that_is_renamed_keeps_its_guard() -> None:
    guards = Guards(Guard)
    before, _ = guards.admit("1", "old", 0)
    after, _ = guards.admit("1", "new", 0)
    assert before is after
    assert [stats.cell_name for stats in guards.stats()] == ["new"]


def test_surplus_guards_that_remember_nothing_are_thrown_away() -> None:
    clock = Clock()

    def make(cell_uuid: str, cell_name: str | None) -> Guard:
        return Guard(cell_uuid, cell_name, breaker_failures=2, clock=clock)

    guards = Guards(make, max_idle=2)
    for number in range(6):
        guard, admission = guards.admit(str(number), None, 0)
        if number == 0:
            continue  # under way
        guard.leave()
        if number == 1:
            guard.report(False, admission)
        if number == 2:
            take_down(guard, 2)
    guards.sweep()
    left = {stats.cell_uuid for stats in guards.stats()}
    # Three have something to remember, which is one more than the surplus
    # leaves room for; the others go.
    assert left == {"0", "1", "2"}
    kept = guards.get("2", None)
    assert kept.stats().down


def test_a_cell_that_is_gone_is_forgotten_though_it_is_down() -> None:
    guards = Guards(Guard)
    for cell in ("down", "busy", "there"):
        guard, admission = guards.admit(cell, None, 0)
        if cell != "busy":
            guard.leave()
        guard.report(False, admission)
    gone = guards.get("down", None)
    take_down(gone, 4)
    guards.keep_only({"there": None})
    assert gone.discarded
    assert {stats.cell_uuid for stats in guards.stats()} == {"busy", "there"}
    # One that comes back begins anew.
    assert not guards.get("down", None).stats().down
    guards.get("busy", None).leave()
    guards.keep_only({"there": None})
    assert {stats.cell_uuid for stats in guards.stats()} == {"there"}


def test_as_many_guards_as_there_may_be_are_kept() -> None:
    guards = Guards(Guard, max_idle=3)
    for number in range(3):
        guard, _ = guards.admit(str(number), None, 0)
        guard.leave()
    guards.sweep()
    assert len(guards.stats()) == 3


def test_a_message_never_goes_through_a_guard_thrown_away() -> None:
    guards = Guards(Guard, max_idle=0)
    first = guards.get("1", None)
    admit = Guard.admit

    class Late(Guard):
        __slots__ = ()

        def admit(self, timeout: float) -> int:
            # Found, and thrown away before a place was taken.
            guards.sweep()
            return admit(self, timeout)

    first.__class__ = Late
    guard, _ = guards.admit("1", None, 0)
    assert guard is not first
    assert not guard.discarded
    assert first.discarded
    assert first.stats().under_way == 0
    assert guard.stats().under_way == 1
    assert guards.get("1", None) is guard


def test_a_guard_in_use_is_not_thrown_away(guard: Guard) -> None:
    admission = guard.admit(0)
    assert not guard.discard_if_idle()
    guard.leave()
    guard.report(True, admission)
    assert guard.discard_if_idle()
    assert guard.discarded


# The bound on stuck threads of a process.


def test_stuck_threads_keep_messages_from_cells_that_do_not_answer(
    make_guard: Callable[..., Guard],
) -> None:
    threads = StuckThreads(3)
    bad, worse, good = (
        make_guard(stuck_threads=threads, max_sends=16) for _ in range(3)
    )
    places = [Place(guard, guard.admit(0)) for guard in (bad, worse, worse)]
    for place in places:
        place.settle(False, cause="late", stuck=True)
    for guard in (bad, worse):
        with pytest.raises(exceptions.CellBusy, match="3 threads"):
            guard.admit(0)
        assert guard.stats().refused_busy == 1
    # The others go on, however many are stuck elsewhere.
    go(good, True)
    places[0].leave()
    go(bad, True)
    for place in places:
        place.leave()
    assert bad.stats().stuck == worse.stats().stuck == 0


def test_a_trial_is_bounded_by_stuck_threads_too(
    make_guard: Callable[..., Guard], clock: Clock
) -> None:
    threads = StuckThreads(1)
    guard = make_guard(stuck_threads=threads)
    stuck = Place(guard, guard.admit(0))
    take_down(guard)
    stuck.settle(False, stuck=True)
    clock.now += 60
    with pytest.raises(exceptions.CellBusy, match="stuck"):
        guard.admit(0)
    stuck.leave()
    go(guard, True)
    assert not guard.stats().down


# A place and its verdict.


def test_a_place_is_given_back_once_and_the_first_verdict_counts(
    guard: Guard,
) -> None:
    place = Place(guard, guard.admit(0))
    place.settle(False, cause="late")
    place.settle(True)
    place.leave()
    stats = guard.stats()
    assert (stats.under_way, stats.failed, stats.sent) == (0, 1, 0)


@pytest.mark.parametrize("first", ["request", "sender"])
def test_a_request_and_its_sender_agree_whether_that_is_stuck(
    guard: Guard, first: str
) -> None:
    place = Place(guard, guard.admit(0))
    if first == "request":
        place.settle(False, cause="late", stuck=True)
        assert guard.stats().stuck == guard.stats().under_way == 1
    place.settle(True)
    if first == "sender":
        place.settle(False, cause="late", stuck=True)
    assert guard.stats().stuck == guard.stats().under_way == 0
