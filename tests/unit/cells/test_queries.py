# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Who waits for which query, and which is asked when."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest

from cellmw.cells.outage import Deadline, Outage, describe
from cellmw.cells.queries import (
    Queries,
    Query,
)
from cellmw.workers import Job
from tests.directories import Clock, Held, Inline, NoThreads


class Desk:
    """Queries, the clock and the threads behind them, and what was asked.

    ``during`` maps a key to what happens while its query is asked.
    """

    def __init__(self, concurrency: int = 8, workers: Any = None) -> None:
        self.clock = Clock()
        self.workers = Held() if workers is None else workers
        self.queries = Queries(
            self.workers,
            concurrency=concurrency,
            overdue_after=5.0,
            clock=self.clock,
        )
        self.asked: list[Any] = []
        self.during: dict[Any, Callable[[], object]] = {}

    def ask(self, key: Any = "key", **how: Any) -> Query:
        query, self.was_new = self.queries.submit(key, self.answer, **how)
        assert query is not None
        return query

    def answer(self, query: Query) -> str:
        self.asked.append(query.key)
        self.during.pop(query.key, lambda: None)()
        return f"answer {query.number}"

    def do_all(self) -> None:
        self.workers.do_all()

    @property
    def out(self) -> int:
        return self.queries.load().running


def test_who_asks_the_same_shares_the_query() -> None:
    desk = Desk()
    first = desk.ask()
    assert desk.was_new
    second = desk.ask()
    assert not desk.was_new
    desk.do_all()
    assert second is first
    assert first.wait(0)
    assert first.result == "answer 1"
    assert desk.asked == ["key"]


def test_who_asks_another_thing_does_not_share_it() -> None:
    desk = Desk()
    assert desk.ask("one") is not desk.ask("other")


def test_a_query_that_ended_is_not_shared() -> None:
    desk = Desk()
    first = desk.ask()
    desk.do_all()
    assert desk.ask() is not first


def test_a_query_being_asked_is_shared() -> None:
    desk = Desk()
    joined: list[Query] = []
    desk.during["key"] = lambda: joined.append(desk.ask())
    first = desk.ask()
    desk.do_all()
    assert joined == [first]
    assert desk.asked == ["key"]


def test_a_query_not_yet_asked_is_shared_by_who_wants_it_fresh() -> None:
    desk = Desk()
    assert desk.ask() is desk.ask(fresh=True)


def test_a_query_being_asked_is_not_shared_by_who_wants_it_fresh() -> None:
    desk = Desk()
    fresh: list[Query] = []
    desk.during["key"] = lambda: fresh.extend(
        desk.ask(fresh=True) for _ in range(100)
    )
    first = desk.ask()
    desk.do_all()
    # However many come: one that runs and one that follows it.
    assert len(set(fresh)) == 1
    assert fresh[0] is not first
    assert fresh[0].result == "answer 2"
    assert desk.asked == ["key", "key"]
    assert desk.out == 0


def test_who_does_not_want_it_fresh_shares_the_one_being_asked() -> None:
    desk = Desk()
    joined: list[Query] = []

    def during() -> None:
        desk.ask(fresh=True)
        joined.append(desk.ask())

    desk.during["key"] = during
    first = desk.ask()
    desk.do_all()
    assert joined == [first]


def test_what_is_outdated_is_not_shared_by_anybody() -> None:
    desk = Desk()
    later: list[Query] = []

    def during() -> None:
        desk.queries.outdate("key")
        later.append(desk.ask())

    desk.during["key"] = during
    first = desk.ask()
    desk.do_all()
    assert first.outdated
    assert first.result == "answer 1"
    assert later[0].result == "answer 2"
    assert not later[0].outdated


def test_what_is_not_asked_yet_cannot_be_outdated() -> None:
    desk = Desk()
    first = desk.ask()
    desk.queries.outdate("key")
    desk.queries.outdate("another key")
    desk.do_all()
    assert not first.outdated


def test_no_more_are_out_than_there_are_places() -> None:
    desk = Desk(concurrency=2)
    for number in range(5):
        desk.ask(number)
    load = desk.queries.load()
    assert (load.running, load.queued) == (2, 3)
    assert len(desk.workers.jobs) == 2
    desk.do_all()
    assert desk.asked == [0, 1, 2, 3, 4]
    load = desk.queries.load()
    assert (load.started, load.running, load.queued) == (5, 0, 0)


def test_the_line_is_served_in_order_but_for_what_is_urgent() -> None:
    desk = Desk(concurrency=1)
    for key in ("first", "second", "third"):
        desk.ask(key)
    desk.ask("cells", urgent=True)
    desk.do_all()
    assert desk.asked == ["first", "cells", "second", "third"]


def test_what_follows_goes_to_the_end_of_the_line() -> None:
    desk = Desk(concurrency=1)
    desk.during["key"] = lambda: desk.ask(fresh=True)
    for key in ("key", "other"):
        desk.ask(key)
    desk.do_all()
    assert desk.asked == ["key", "other", "key"]


def test_nobody_waits_then_it_is_not_asked() -> None:
    desk = Desk(concurrency=1)
    first = desk.ask("first")
    for key in ("second", "third"):
        assert not desk.queries.wait(desk.ask(key), 0)
    assert desk.queries.load().queued == 0
    assert not desk.queries.wait(first, 0)
    desk.do_all()
    assert desk.asked == []
    assert desk.out == 0


def test_one_of_two_waits_then_it_is_asked() -> None:
    desk = Desk(concurrency=1)
    desk.ask("first")
    second = desk.ask("second")
    assert not desk.queries.wait(desk.ask("second"), 0)
    desk.do_all()
    assert second.result == "answer 2"


def test_who_comes_after_the_last_has_left_asks_anew() -> None:
    desk = Desk(concurrency=1)
    left = desk.ask()
    desk.queries.leave(left)
    anew = desk.ask()
    assert anew is not left
    desk.do_all()
    assert anew.wait(0)
    assert desk.asked == ["key"]


def test_nobody_waits_for_what_follows_then_it_is_not_asked() -> None:
    desk = Desk()
    desk.during["key"] = lambda: desk.queries.leave(desk.ask(fresh=True))
    desk.ask()
    desk.do_all()
    assert desk.asked == ["key"]


def test_who_gives_up_leaves_the_query_its_place() -> None:
    desk = Desk(concurrency=1)
    during: list[int] = []

    def give_up() -> None:
        desk.queries.leave(first)
        desk.ask("second")
        during.append(desk.out)

    desk.during["first"] = give_up
    first = desk.ask("first")
    desk.do_all()
    assert during == [1]
    assert desk.asked == ["first", "second"]


def test_one_that_is_overdue_is_replaced_and_its_answer_outdated() -> None:
    desk = Desk()
    replaced: list[Query] = []

    def hang() -> None:
        desk.clock.now += 5.0
        replaced.append(desk.ask())
        desk.do_all()

    desk.during["key"] = hang
    first = desk.ask()
    desk.do_all()
    assert replaced[0].result == "answer 2"
    assert not replaced[0].outdated
    assert first.outdated
    assert desk.out == 0


def test_one_that_is_nearly_overdue_is_shared() -> None:
    desk = Desk()
    joined: list[Query] = []

    def hang() -> None:
        desk.clock.now += 4.999
        joined.append(desk.ask())

    desk.during["key"] = hang
    first = desk.ask()
    desk.do_all()
    assert joined == [first]


def test_one_thing_has_two_queries_running_at_most() -> None:
    desk = Desk()
    most: list[int] = []

    def hang() -> None:
        desk.clock.now += 5.0
        desk.during["key"] = hang_as_well
        desk.ask()
        desk.do_all()

    def hang_as_well() -> None:
        for _ in range(10):
            desk.clock.now += 5.0
            desk.ask()
            desk.ask(fresh=True)
            most.append(desk.out)

    desk.during["key"] = hang
    desk.ask()
    desk.do_all()
    assert set(most) == {2}
    assert desk.out == 0
    # And when these came back, two may hang again.
    desk.during["key"] = hang
    desk.ask()
    desk.do_all()
    assert max(most) == 2
    assert len(most) == 20


def test_what_follows_takes_the_place_of_one_that_is_overdue() -> None:
    desk = Desk()
    following: list[Query] = []

    def hang() -> None:
        following.append(desk.ask(fresh=True))
        desk.clock.now += 5.0
        assert desk.ask(unless=lambda key: True) is following[0]
        desk.do_all()
        assert following[0].wait(0)

    desk.during["key"] = hang
    desk.ask()
    desk.do_all()
    assert desk.asked == ["key", "key"]


def test_a_query_that_is_long_overdue_costs_one_query_more() -> None:
    desk = Desk()

    def during() -> None:
        desk.clock.now += 3600.0
        for _ in range(10):
            desk.ask()
        desk.do_all()

    desk.during["key"] = during
    desk.ask()
    desk.do_all()
    assert len(desk.asked) == 2


def test_a_clock_read_before_the_query_began_is_not_overdue() -> None:
    desk = Desk()
    joined: list[Query] = []

    def during() -> None:
        desk.clock.now -= 0.001
        joined.append(desk.ask())

    desk.during["key"] = during
    first = desk.ask()
    desk.do_all()
    assert joined == [first]


def test_nothing_is_asked_that_is_known_by_then() -> None:
    desk = Desk()
    query, is_new = desk.queries.submit(
        "key", desk.answer, unless=lambda key: key == "key"
    )
    assert (query, is_new) == (None, False)
    assert desk.ask(unless=lambda key: False) is not None


def test_a_query_that_can_be_shared_is_not_looked_up() -> None:
    desk = Desk()
    first = desk.ask()
    assert desk.ask(unless=lambda key: pytest.fail("asked")) is first


def test_a_failure_is_a_text_and_keeps_nothing_of_the_driver() -> None:
    desk = Desk()

    def fail() -> None:
        raise ConnectionError("gone")

    desk.during["key"] = fail
    query = desk.ask()
    desk.do_all()
    assert query.wait(0)
    assert query.failure == "ConnectionError: gone"
    assert query.error is None
    assert query.result is None


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, MemoryError])
def test_the_place_comes_back_whatever_is_raised(
    error: type[BaseException],
) -> None:
    desk = Desk(concurrency=1)

    def fail() -> None:
        raise error

    desk.during["key"] = fail
    failed, other = desk.ask(), desk.ask("other")
    desk.do_all()
    assert failed.failure == error.__name__
    assert other.result == "answer 2"
    assert desk.out == 0


def test_no_thread_can_be_started_then_all_in_line_fail() -> None:
    desk = Desk(concurrency=1, workers=NoThreads())
    query = desk.ask()
    assert query.wait(0)
    assert query.failure is not None
    assert "can't start new thread" in query.failure
    assert desk.out == 0


def test_no_thread_can_be_started_then_nobody_is_left_in_line() -> None:
    class Late(NoThreads):
        def start(self, job: Job) -> None:
            if not waiting:
                # As another request does, in its own thread.
                thread = threading.Thread(
                    target=lambda: waiting.append(desk.ask("other"))
                )
                thread.start()
                thread.join()
            super().start(job)

    waiting: list[Query] = []
    desk = Desk(concurrency=1, workers=Late())
    desk.ask()
    assert waiting[0].wait(0)
    assert desk.out == 0


def test_closed_then_what_stands_in_line_fails_at_once() -> None:
    desk = Desk(concurrency=1)
    seen: list[Any] = []

    def during() -> None:
        following, waiting = desk.ask(fresh=True), desk.ask("other")
        desk.queries.close()
        seen.extend(
            (q.wait(0), q.failure)
            for q in (following, waiting, desk.ask("third"), desk.ask())
        )

    desk.during["key"] = during
    asked = desk.ask()
    desk.do_all()
    assert seen == [(True, "closed")] * 4
    # The database was at this one.
    assert asked.result == "answer 1"
    assert desk.out == 0
    desk.queries.close()


def test_closed_then_what_a_thread_was_about_to_ask_is_not_asked() -> None:
    desk = Desk()
    query = desk.ask()
    desk.queries.close()
    desk.do_all()
    assert query.wait(0)
    assert query.failure == "closed"
    assert desk.asked == []


@pytest.mark.parametrize("later,left", [(0.0, 2.0), (0.5, 1.5), (9.0, 0.0)])
def test_a_deadline_leaves_what_is_left_of_its_limit(
    later: float, left: float
) -> None:
    clock = Clock()
    deadline = Deadline(2.0, clock)
    clock.now += later
    assert deadline.left() == left


class Wrapped(Exception):
    def __init__(self, text: str, **inner: object) -> None:
        super().__init__(text)
        vars(self).update(inner)


def test_the_cause_is_what_the_driver_says() -> None:
    driver = ConnectionRefusedError("no server at 127.0.0.1")
    statement = Wrapped("[SQL: SELECT ...]", orig=driver)
    assert (
        describe(Wrapped("more", inner_exception=statement))
        == "ConnectionRefusedError: no server at 127.0.0.1"
    )
    assert describe(Wrapped("bare", inner_exception=None)) == "Wrapped: bare"


def test_the_cause_is_told_without_credentials() -> None:
    error = ValueError("cannot use mysql://nova:S3cret-word@db/nova_api")
    assert "S3cret-word" not in describe(error)


def test_an_error_that_cannot_be_told_has_a_class() -> None:
    class Odd(Exception):
        def __str__(self) -> str:
            raise ValueError("no text")

    assert describe(Odd()) == "Odd"


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_an_outage_is_told_once_and_its_end_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    clock = Clock()
    outage = Outage("cell mappings", "old ones serve", clock)
    outage.end()
    for _ in range(10):
        outage.begin("refused")
        clock.now += 1
    assert outage.lasting
    for _ in range(10):
        outage.end()
    assert not outage.lasting
    assert lines(caplog) == [
        "API database unreachable (cell mappings): refused; old ones serve",
        "API database reachable again (cell mappings), after 10 seconds",
    ]


def test_an_outage_lasts_until_there_is_quiet(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    outage = Outage("where an instance is", "some fail", clock, quiet=1.0)
    for _ in range(50):
        outage.begin("deadlock")
        clock.now += 0.5
        outage.end()
    assert outage.lasting
    assert len(caplog.records) == 1
    clock.now += 0.5
    outage.end()
    assert not outage.lasting
    assert len(caplog.records) == 2


def test_an_outage_notes_what_is_raised_and_lets_it_pass() -> None:
    outage = Outage("this", "that", Clock())
    with pytest.raises(ZeroDivisionError), outage:
        raise ZeroDivisionError
    assert outage.lasting
    with outage:
        pass
    assert not outage.lasting


def test_an_outage_holds_for_a_time_after_it_was_seen() -> None:
    clock = Clock()
    outage = Outage("this", "that", clock)
    assert not outage.holds(5.0)
    outage.begin("refused")
    clock.now += 4.9
    assert outage.holds(5.0)
    clock.now += 0.1
    assert not outage.holds(5.0)


def test_one_in_a_second_sees_whether_an_outage_lasts() -> None:
    clock = Clock()
    outage = Outage("this", "that", clock)
    outage.begin("refused")
    assert not outage.may_probe(1.0)
    clock.now += 1.0
    assert outage.may_probe(1.0)
    assert not outage.may_probe(1.0)


def test_threads_that_come_one_after_the_other_share_nothing() -> None:
    desk = Desk(workers=Inline())
    assert [desk.ask().result for _ in range(3)] == [
        "answer 1",
        "answer 2",
        "answer 3",
    ]
