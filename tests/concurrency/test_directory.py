# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The directory with many threads at once, on real worker threads."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cellmw import exceptions
from cellmw.cells.known import CELLS
from cellmw.cells.mapping import Cell
from cellmw.cells.queries import Queries, Query
from cellmw.workers import Workers
from tests.directories import (
    Clock,
    Database,
    Held,
    cell_uuid,
    instance_uuid,
    make,
    url_of,
)

INSTANCE = instance_uuid(1)
# How long a test waits for what has to come, in seconds.
PATIENCE = 30.0


@pytest.fixture
def workers() -> Iterator[Workers]:
    workers = Workers()
    yield workers
    workers.close()


@pytest.fixture
def database() -> Database:
    database = Database()
    database.put(1)
    database.instances = {INSTANCE: 1}
    return database


@pytest.fixture
def _switch_often() -> Iterator[None]:
    """Let threads change places as often as the interpreter can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class Gate:
    """Holds who comes through :meth:`__call__` until it is opened."""

    def __init__(self, *whats: str) -> None:
        self._whats = whats
        self._open = threading.Event()
        self.reached = threading.Event()

    def __call__(self, what: str) -> None:
        if not self._whats or what in self._whats:
            self.reached.set()
            assert self._open.wait(PATIENCE)

    def open(self) -> None:
        self._open.set()


class Crowd:
    """Threads that do the same at once.

    :ivar results: what each returned or raised, in the order of their ends
    """

    def __init__(self, count: int, action: Callable[[int], Any]) -> None:
        self.results: list[Any] = []
        self._action = action
        self._barrier = threading.Barrier(count)
        self._threads = [
            threading.Thread(target=self._run, args=(number,))
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        self._barrier.wait(PATIENCE)
        try:
            result = self._action(number)
        except exceptions.CellMWError as error:
            result = error
        self.results.append(result)

    def join(self) -> list[Any]:
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        return self.results


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(0.001)


def waiters(directory: Any, key: object) -> int:
    """How many wait for what is asked about this, now and next."""
    queries = directory._queries
    return sum(
        of_key[key].waiters
        for of_key in (queries._sharing.current, queries._sharing.following)
        if key in of_key
    )


def cells_key(directory: Any) -> object:
    """What the reading of the cells that is under way goes by."""
    until(lambda: CELLS in directory._queries._sharing.current)
    return CELLS


def number_of(cell: Cell) -> int:
    return int(cell.uuid[-12:], 16)


# Sharing a query.


@pytest.mark.parametrize("scope", ["safe", "all"])
def test_a_thousand_misses_at_once_are_one_query(
    database: Database, workers: Workers, scope: str
) -> None:
    directory = make(
        database,
        workers=workers,
        instance_cache_for=scope,
        lookup_timeout=PATIENCE,
    )
    method = "GET" if scope == "safe" else "POST"
    crowd = Crowd(1000, lambda number: directory.find(INSTANCE, method))
    assert {number_of(cell) for cell in crowd.join()} == {1}
    assert database.asked == ["cells", INSTANCE]


def test_those_who_wait_for_one_answer_get_it_all(
    database: Database, workers: Workers
) -> None:
    database.before = gate = Gate(INSTANCE)
    database.instances = {}
    directory = make(database, workers=workers, lookup_timeout=PATIENCE)
    crowd = Crowd(100, lambda number: directory.find(INSTANCE))
    until(lambda: waiters(directory, INSTANCE) == 100)
    gate.open()
    # There is no such instance, so nothing is remembered that would serve.
    assert crowd.join() == [None] * 100
    assert database.count(INSTANCE) == 1


@pytest.mark.parametrize(
    "count,settings",
    [
        (1000, {}),
        (50, {"instance_cache_for": "all", "instance_cache_ttl": 0}),
    ],
)
def test_many_unsafe_misses_at_once_are_two_queries(
    database: Database, workers: Workers, count: int, settings: dict[str, Any]
) -> None:
    directory = make(
        database, workers=workers, lookup_timeout=PATIENCE, **settings
    )
    directory.refresh()
    database.before = gate = Gate(INSTANCE)
    first = Crowd(1, lambda number: directory.find(INSTANCE, "POST"))
    assert gate.reached.wait(PATIENCE)
    crowd = Crowd(count, lambda number: directory.find(INSTANCE, "POST"))
    until(lambda: waiters(directory, INSTANCE) == count + 1)
    gate.open()
    assert {number_of(cell) for cell in first.join() + crowd.join()} == {1}
    assert database.count(INSTANCE) == 2


def test_one_failure_is_told_to_all_who_waited_and_to_nobody_else(
    database: Database, workers: Workers
) -> None:
    directory = make(database, workers=workers, lookup_timeout=PATIENCE)
    directory.refresh()
    database.before = gate = Gate(INSTANCE)
    database.error = ConnectionError("refused")
    crowd = Crowd(50, lambda number: directory.find(INSTANCE))
    until(lambda: waiters(directory, INSTANCE) == 50)
    gate.open()
    errors = crowd.join()
    assert {type(error) for error in errors} == {exceptions.LookupFailed}
    # One error for two threads would mix their tracebacks.
    assert len({id(error) for error in errors}) == 50
    database.error = None
    assert directory.find(INSTANCE) is not None


class SlowKey(str):
    """Gives way to other threads whenever it is looked up."""

    __slots__ = ()

    def __hash__(self) -> int:
        threading.Event().wait(0.001)
        return super().__hash__()


def test_threads_that_ask_at_the_same_time_share_one_query() -> None:
    workers = Held()
    queries = Queries(workers, concurrency=1, overdue_after=5.0, clock=Clock())

    def ask(number: int) -> Query:
        query, _ = queries.submit(SlowKey("key"), lambda query: None)
        assert query is not None
        return query

    asked = Crowd(16, ask).join()
    assert len(set(asked)) == 1
    assert asked[0].waiters == 16
    assert queries.load().running == 1
    Crowd(16, lambda number: queries.leave(asked[0])).join()
    assert asked[0].waiters == 0
    workers.do_all()
    assert queries.load().started == 0
    assert queries.load().running == 0


# The snapshot.


def test_one_request_refreshes_while_the_others_go_on(
    database: Database, workers: Workers
) -> None:
    clock = Clock()
    directory = make(
        database, workers=workers, clock=clock, lookup_timeout=PATIENCE
    )
    old = directory.find(INSTANCE)
    database.put(1, "rabbit://u:p@elsewhere/1")
    database.before = gate = Gate("cells")
    clock.now += 19.9
    one = Crowd(1, lambda number: directory.find(INSTANCE))
    assert gate.reached.wait(PATIENCE)
    others = Crowd(50, lambda number: directory.find(INSTANCE))
    assert others.join() == [old] * 50
    assert one.results == []
    gate.open()
    assert [url_of(cell) for cell in one.join()] == [
        "rabbit://u:p@elsewhere/1"
    ]
    assert database.count("cells") == 2


def test_all_wait_for_a_snapshot_that_is_much_too_old(
    database: Database, workers: Workers
) -> None:
    clock = Clock()
    directory = make(
        database, workers=workers, clock=clock, lookup_timeout=PATIENCE
    )
    directory.find(INSTANCE)
    database.put(1, "rabbit://u:p@elsewhere/1")
    database.before = gate = Gate("cells")
    clock.now += 20.0
    crowd = Crowd(50, lambda number: directory.find(INSTANCE))
    key = cells_key(directory)
    until(lambda: waiters(directory, key) == 50)
    assert crowd.results == []
    gate.open()
    urls = {url_of(cell) for cell in crowd.join()}
    assert urls == {"rabbit://u:p@elsewhere/1"}
    assert database.count("cells") == 2


def test_a_refresh_that_was_under_way_does_not_count_as_one_asked_for(
    database: Database, workers: Workers
) -> None:
    directory = make(database, workers=workers, lookup_timeout=PATIENCE)
    gate = Gate("cells")
    # The rows are at hand, and not yet given.
    database.after = gate
    early = Crowd(1, lambda number: directory.cell(cell_uuid(1)))
    assert gate.reached.wait(PATIENCE)
    database.put(1, "rabbit://u:p@elsewhere/1")
    late = Crowd(10, lambda number: directory.refresh())
    key = cells_key(directory)
    until(lambda: waiters(directory, key) == 11)
    gate.open()
    early.join()
    late.join()
    assert url_of(directory.cell(cell_uuid(1))) == "rabbit://u:p@elsewhere/1"
    assert database.count("cells") == 2


def test_a_new_cell_is_found_by_all_who_look_for_it_at_once(
    database: Database, workers: Workers
) -> None:
    directory = make(database, workers=workers, lookup_timeout=PATIENCE)
    directory.refresh()
    database.put(2)
    database.instances = {instance_uuid(n): 2 for n in range(20)}
    database.before = gate = Gate("cells")
    crowd = Crowd(20, lambda number: directory.find(instance_uuid(number)))
    assert gate.reached.wait(PATIENCE)
    key = cells_key(directory)
    until(lambda: waiters(directory, key) == 20)
    gate.open()
    assert {url_of(cell) for cell in crowd.join()} == {
        "rabbit://u:secret-2@host/2"
    }
    assert database.count("cells") <= 3


# A database that does not answer.


@pytest.mark.parametrize("known", ["nothing", "cells", "old cells"])
def test_no_request_waits_longer_than_its_timeout(
    database: Database, workers: Workers, known: str
) -> None:
    """Some are asked, the others stand in line or wait for the cells."""
    directory = make(
        database,
        workers=workers,
        lookup_timeout=1.0,
        lookup_concurrency=4,
        cell_refresh_interval=0.0 if known == "old cells" else 10.0,
    )
    if known != "nothing":
        directory.refresh(timeout=PATIENCE)
    database.before = gate = Gate()
    took: list[float] = []

    def find(number: int) -> None:
        began = time.monotonic()
        try:
            directory.find(instance_uuid(number), "POST")
        finally:
            took.append(time.monotonic() - began)

    errors = Crowd(40, find).join()
    assert {type(error) for error in errors} == {exceptions.LookupFailed}
    # Twice as long would be one timeout after the other.
    assert max(took) < 1.9
    assert database.most_out <= 4
    gate.open()
    until(lambda: directory.stats().queries_running == 0)


def test_an_old_snapshot_serves_at_once_while_the_database_hangs(
    database: Database, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make(
        database,
        workers=workers,
        lookup_timeout=0.2,
        cell_refresh_interval=0.05,
        instance_cache_ttl=1000.0,
    )
    expected = directory.find(INSTANCE)
    database.before = gate = Gate("cells")
    until(lambda: (directory.stats().snapshot_age or 0) > 0.1)
    # Those who find out wait for it, and are served then.
    crowd = Crowd(10, lambda number: directory.find(INSTANCE))
    assert crowd.join() == [expected] * 10
    until(lambda: not directory.stats().reachable)
    waited: list[float] = []
    real_wait = directory._queries.wait

    def wait(query: Any, timeout: float) -> bool:
        waited.append(timeout)
        return real_wait(query, timeout)

    monkeypatch.setattr(directory._queries, "wait", wait)
    crowd = Crowd(
        20, lambda number: [directory.find(INSTANCE) for _ in range(100)]
    )
    assert crowd.join() == [[expected] * 100] * 20
    # One request a second sees whether it is back.
    assert len(waited) <= 2
    assert directory.stats().queries_running <= 2
    gate.open()
    until(lambda: directory.find(INSTANCE) and directory.stats().reachable)


def test_no_more_queries_are_out_than_allowed(
    database: Database, workers: Workers
) -> None:
    directory = make(
        database,
        workers=workers,
        lookup_concurrency=3,
        lookup_timeout=PATIENCE,
    )
    directory.refresh()
    database.before = gate = Gate()
    for number in range(60):
        database.instances[instance_uuid(number)] = 1
    crowd = Crowd(60, lambda number: directory.find(instance_uuid(number)))
    until(lambda: directory.stats().queries_queued == 57)
    assert directory.stats().queries_running == 3
    until(lambda: database.out == 3)
    gate.open()
    assert {number_of(cell) for cell in crowd.join()} == {1}
    assert database.most_out == 3
    assert len(database.asked) == 61
    # A place is given back after the waiting requests were told.
    until(lambda: directory.stats().queries_running == 0)


def test_who_gave_up_leaves_nothing_but_the_place(
    database: Database, workers: Workers
) -> None:
    directory = make(
        database, workers=workers, lookup_concurrency=2, lookup_timeout=0.1
    )
    directory.refresh(timeout=PATIENCE)
    database.before = gate = Gate()
    for _ in range(2):
        crowd = Crowd(
            50, lambda number: directory.find(instance_uuid(100 + number))
        )
        assert {type(error) for error in crowd.join()} == {
            exceptions.LookupFailed
        }
    stats = directory.stats()
    assert (stats.queries_running, stats.queries_queued) == (2, 0)
    queries: Any = directory._queries
    assert len(queries._sharing.current) <= 2
    assert not queries._sharing.following
    gate.open()
    until(lambda: directory.stats().queries_running == 0)
    # Those who gave up in line have cost the database nothing.
    assert len(database.asked) == 3
    assert directory.find(INSTANCE) is not None
    assert not queries._sharing.current


def test_one_instance_whose_lookup_hangs_does_not_block_the_others(
    database: Database, workers: Workers
) -> None:
    directory = make(
        database, workers=workers, lookup_concurrency=4, lookup_timeout=0.05
    )
    directory.refresh(timeout=PATIENCE)
    database.instances[instance_uuid(2)] = 1
    database.before = gate = Gate(INSTANCE)
    for method in ["GET", "POST"] * 10:
        with pytest.raises(exceptions.LookupFailed):
            directory.find(INSTANCE, method)
    assert directory.stats().queries_running == 2
    assert directory.find(instance_uuid(2)) is not None
    gate.open()
    until(lambda: directory.stats().queries_running == 0)
    assert directory.find(INSTANCE) is not None


def test_closed_while_threads_wait_then_all_of_them_end(
    database: Database, workers: Workers
) -> None:
    directory = make(
        database, workers=workers, lookup_concurrency=2, lookup_timeout=0.5
    )
    directory.refresh(timeout=PATIENCE)
    database.before = gate = Gate()
    crowd = Crowd(
        30, lambda number: directory.find(instance_uuid(number % 10), "POST")
    )
    until(lambda: directory.stats().queries_running == 2)
    directory.close()
    assert {type(error) for error in crowd.join()} == {exceptions.LookupFailed}
    gate.open()
    until(lambda: directory.stats().queries_running == 0)
    assert directory.stats().instances == 0


# Nobody gets what is no longer true.


class Mover:
    """Moves one instance through cells 1, 2, 3, ...; readers look on.

    The cell's number is the version: who is told a lower one than was
    committed before it asked was told something outdated.
    """

    def __init__(self, database: Database, **settings: Any) -> None:
        self.database = database
        self.moves = 300
        for number in range(1, self.moves + 1):
            database.put(number)
        self.directory = make(
            database,
            lookup_timeout=PATIENCE,
            cell_refresh_interval=1000.0,
            instance_cache_ttl=1000.0,
            **settings,
        )
        self.committed = 1
        self.done = threading.Event()
        self.outdated: list[tuple[int, int]] = []

    def look(self, method: str) -> None:
        while not self.done.is_set():
            floor = self.committed
            cell = self.directory.find(INSTANCE, method)
            assert cell is not None
            if number_of(cell) < floor:
                self.outdated.append((floor, number_of(cell)))

    def move(self, *, forget: bool) -> None:
        try:
            for number in range(1, self.moves + 1):
                asked = len(self.database.asked)
                self.database.instances[INSTANCE] = number
                if forget:
                    self.directory.forget(INSTANCE)
                self.committed = number
                self._let_them_ask(asked)
        finally:
            self.done.set()

    def _let_them_ask(self, asked: int) -> None:
        until(lambda: len(self.database.asked) > asked)


@pytest.mark.usefixtures("_switch_often")
def test_forgotten_then_no_answer_from_before_is_given_or_remembered(
    database: Database, workers: Workers
) -> None:
    mover = Mover(database, workers=workers)
    readers = Crowd(6, lambda number: mover.look("GET"))
    mover.move(forget=True)
    readers.join()
    assert mover.outdated == []


@pytest.mark.usefixtures("_switch_often")
def test_an_unsafe_method_gets_no_answer_from_before_it_came(
    database: Database, workers: Workers
) -> None:
    mover = Mover(database, workers=workers)
    readers = Crowd(6, lambda number: mover.look("POST"))
    others = Crowd(
        2,
        lambda number: [
            mover.directory.find(INSTANCE)
            for _ in iter(mover.done.is_set, True)
        ],
    )
    mover.move(forget=False)
    readers.join()
    others.join()
    assert mover.outdated == []
    assert database.most_out <= 8


@pytest.mark.usefixtures("_switch_often")
def test_no_instance_is_ever_found_in_another_cell(
    database: Database, workers: Workers
) -> None:
    """Cells come, go and change, and hardly anything is remembered long."""
    directory = make(
        database,
        workers=workers,
        lookup_timeout=PATIENCE,
        cell_refresh_interval=0.001,
        instance_cache_ttl=0.005,
        instance_cache_size=7,
    )
    for number in range(20):
        database.put(number)
        database.instances[instance_uuid(number)] = number
    done = threading.Event()
    wrong: list[Any] = []

    def look(number: int) -> None:
        dice = random.Random(number)
        while not done.is_set():
            wanted = dice.randrange(20)
            method = dice.choice(["GET", "GET", "GET", "POST"])
            cell = directory.find(instance_uuid(wanted), method)
            assert cell is not None
            if cell.generation is None:
                good = cell.refusal is not None and (
                    cell.refusal[0] is exceptions.CellNotFound
                )
            else:
                good = number_of(cell) == wanted and url_of(cell).endswith(
                    f"/{wanted}"
                )
            if not good:
                wrong.append((wanted, cell))
            if dice.random() < 0.01:
                directory.forget(instance_uuid(wanted))

    readers = Crowd(8, look)
    dice = random.Random(99)
    for turn in range(400):
        number = dice.randrange(20)
        if dice.random() < 0.5:
            database.remove(number)
        else:
            database.put(number, f"rabbit://u:p@host-{turn}/{number}")
        directory.refresh()
        assert directory.stats().instances <= 7
    done.set()
    readers.join()
    assert wrong == []
