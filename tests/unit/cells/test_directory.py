# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What the directory remembers, for how long, and what it asks."""

from __future__ import annotations

import gc
import logging
import math
import sys
import threading
import types
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from cellmw import exceptions
from cellmw.cells.directory import Directory
from cellmw.cells.known import CELLS
from cellmw.cells.mapping import CELL0_UUID, Cell, CellMapping
from cellmw.cells.queries import Query
from cellmw.process import Process
from cellmw.redaction import Secret
from tests.directories import (
    Clock,
    Database,
    Held,
    Later,
    NoThreads,
    cell_uuid,
    instance_uuid,
    make,
    url_of,
)
from tests.fakes import PATIENCE

INSTANCE = instance_uuid(1)
OTHER = instance_uuid(2)
SAFE = ["GET", "HEAD", "OPTIONS"]
UNSAFE = ["POST", "PUT", "PATCH", "DELETE", "get", "PROPFIND", ""]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def database() -> Database:
    """Cells 1 and 2; one instance in the first, one in the second."""
    database = Database()
    database.put(1)
    database.put(2)
    database.instances = {INSTANCE: 1, OTHER: 2}
    return database


@pytest.fixture
def directory(database: Database, clock: Clock) -> Directory:
    return make(database, clock=clock)


def cell_of(cell: Cell | None) -> str:
    assert cell is not None
    return cell.uuid


def cause_of(cell: Cell | None) -> type[exceptions.SendError]:
    assert cell is not None
    assert cell.refusal is not None
    return cell.refusal[0]


# Instances.


def test_an_instance_is_in_the_cell_that_its_mapping_names(
    directory: Directory, database: Database
) -> None:
    assert database.asked == []
    cell = directory.find(INSTANCE)
    assert cell_of(cell) == cell_uuid(1)
    assert url_of(cell) == "rabbit://u:secret-1@host/1"
    assert cell_of(directory.find(OTHER)) == cell_uuid(2)
    assert database.asked == ["cells", INSTANCE, OTHER]


@pytest.mark.parametrize("method", SAFE)
def test_what_is_remembered_serves_a_safe_method(
    directory: Directory, database: Database, method: str
) -> None:
    assert directory.find(INSTANCE) is directory.find(INSTANCE, method)
    assert database.count(INSTANCE) == 1


@pytest.mark.parametrize("method", UNSAFE)
def test_every_other_method_asks_each_time(
    directory: Directory, database: Database, method: str
) -> None:
    directory.find(INSTANCE)
    database.instances[INSTANCE] = 2
    assert cell_of(directory.find(INSTANCE, method)) == cell_uuid(2)
    directory.find(INSTANCE, method)
    assert database.count(INSTANCE) == 3


@pytest.mark.parametrize("method", SAFE + UNSAFE)
def test_what_is_remembered_serves_all_methods_if_asked_to(
    database: Database, clock: Clock, method: str
) -> None:
    directory = make(database, clock=clock, instance_cache_for="all")
    directory.find(INSTANCE)
    directory.find(INSTANCE, method)
    assert database.count(INSTANCE) == 1


def test_what_an_unsafe_method_learns_is_remembered(
    directory: Directory, database: Database
) -> None:
    directory.find(INSTANCE)
    database.instances[INSTANCE] = 2
    directory.find(INSTANCE, "POST")
    assert cell_of(directory.find(INSTANCE)) == cell_uuid(2)
    assert database.count(INSTANCE) == 2


@pytest.mark.parametrize("now", [{}, {INSTANCE: None}])
def test_what_an_unsafe_method_does_not_find_is_forgotten(
    directory: Directory, database: Database, now: dict[str, int | None]
) -> None:
    directory.find(INSTANCE)
    database.instances = now
    assert directory.find(INSTANCE, "POST") is None
    assert directory.find(INSTANCE) is None
    assert database.count(INSTANCE) == 3


@pytest.mark.parametrize("now", [{}, {INSTANCE: None}])
@pytest.mark.parametrize("scope", ["safe", "all"])
def test_nothing_is_remembered_about_an_instance_without_a_cell(
    database: Database, clock: Clock, now: dict[str, int | None], scope: str
) -> None:
    directory = make(database, clock=clock, instance_cache_for=scope)
    database.instances = now
    assert directory.find(INSTANCE) is None
    assert directory.find(INSTANCE) is None
    assert directory.remembered_for(INSTANCE) is None
    assert directory.stats().instances == 0
    database.instances = {INSTANCE: 1}
    assert cell_of(directory.find(INSTANCE)) == cell_uuid(1)


@pytest.mark.parametrize("interval", [0.0, 10.0, 1000.0])
def test_an_instance_is_asked_for_again_when_its_time_is_over(
    database: Database, clock: Clock, interval: float
) -> None:
    directory = make(database, clock=clock, cell_refresh_interval=interval)
    directory.find(INSTANCE)
    database.instances[INSTANCE] = 2
    clock.now += 29.9
    assert cell_of(directory.find(INSTANCE)) == cell_uuid(1)
    clock.now += 0.1
    assert cell_of(directory.find(INSTANCE)) == cell_uuid(2)


@pytest.mark.parametrize("interval", [0.0, 10.0, 1000.0])
def test_its_time_begins_when_the_query_is_asked(
    database: Database, clock: Clock, interval: float
) -> None:
    def take_long(what: str) -> None:
        clock.now += 4.0

    database.after = take_long
    directory = make(database, clock=clock, cell_refresh_interval=interval)
    directory.find(INSTANCE)
    assert directory.remembered_for(INSTANCE) == 26.0
    database.after = lambda what: None
    clock.now += 26.0
    directory.find(INSTANCE)
    assert database.count(INSTANCE) == 2


@pytest.mark.parametrize("scope", ["safe", "all"])
def test_no_time_at_all_then_nothing_is_remembered(
    database: Database, clock: Clock, scope: str
) -> None:
    directory = make(
        database, clock=clock, instance_cache_ttl=0, instance_cache_for=scope
    )
    for _ in range(3):
        directory.find(INSTANCE)
    assert database.count(INSTANCE) == 3
    assert directory.stats().instances == 0


@pytest.mark.parametrize("size", [1, 2, 3, 10])
def test_no_more_are_remembered_than_there_is_room_for(
    database: Database, clock: Clock, size: int
) -> None:
    directory = make(database, clock=clock, instance_cache_size=size)
    for number in range(50):
        database.instances[instance_uuid(number)] = 1
        directory.find(instance_uuid(number))
        assert directory.stats().instances <= size
    asked = len(database.asked)
    directory.find(instance_uuid(49))
    assert len(database.asked) == asked


def test_how_long_an_instance_is_remembered_can_be_seen(
    directory: Directory, database: Database, clock: Clock
) -> None:
    assert directory.remembered_for(INSTANCE) is None
    directory.find(INSTANCE)
    assert directory.remembered_for(INSTANCE) == 30.0
    clock.now += 29.0
    assert directory.remembered_for(INSTANCE) == 1.0
    clock.now += 1.0
    assert directory.remembered_for(INSTANCE) is None
    assert database.count(INSTANCE) == 1


def test_forgotten_then_it_is_asked_for_again(
    directory: Directory, database: Database
) -> None:
    directory.find(INSTANCE)
    directory.find(OTHER)
    directory.forget(INSTANCE)
    directory.forget(instance_uuid(99))
    assert directory.remembered_for(INSTANCE) is None
    assert directory.remembered_for(OTHER) is not None
    directory.find(INSTANCE)
    assert database.count(INSTANCE) == 2


def test_an_answer_from_before_it_was_forgotten_is_not_remembered(
    directory: Directory, database: Database
) -> None:
    database.after = directory.forget
    assert cell_of(directory.find(INSTANCE)) == cell_uuid(1)
    assert directory.remembered_for(INSTANCE) is None
    database.after = lambda what: None
    directory.find(INSTANCE)
    assert directory.remembered_for(INSTANCE) is not None


# Cells.


def test_the_cells_are_read_once_as_long_as_they_are_current(
    directory: Directory, database: Database, clock: Clock
) -> None:
    for _ in range(5):
        directory.find(INSTANCE)
        directory.cell(cell_uuid(2))
    clock.now += 9.9
    directory.find(INSTANCE)
    assert database.count("cells") == 1
    assert directory.refresh_due_in() == pytest.approx(0.1)
    clock.now += 0.1
    assert directory.refresh_due_in() == 0.0
    directory.find(INSTANCE)
    assert database.count("cells") == 2


def test_a_snapshot_is_as_old_as_its_query(
    directory: Directory, database: Database, clock: Clock
) -> None:
    def take_long(what: str) -> None:
        clock.now += 3.0

    database.after = take_long
    directory.refresh()
    assert directory.stats().snapshot_age == 3.0
    assert directory.refresh_due_in() == 7.0


def test_a_new_url_holds_at_once_for_instances_that_are_remembered(
    directory: Directory, database: Database, clock: Clock
) -> None:
    old = directory.find(INSTANCE)
    database.put(1, "rabbit://u:p@elsewhere/1")
    assert directory.find(INSTANCE) is old
    clock.now += 10.0
    assert url_of(directory.find(INSTANCE)) == "rabbit://u:p@elsewhere/1"
    assert database.count(INSTANCE) == 1


def test_a_cell_stays_the_same_object_as_long_as_its_row_does(
    directory: Directory, database: Database
) -> None:
    first, second = directory.find(INSTANCE), directory.find(OTHER)
    database.put(2, "rabbit://u:p@elsewhere/2")
    directory.refresh()
    assert directory.find(INSTANCE) is first
    assert directory.find(OTHER) is not second


def test_a_generation_stays_the_same_as_long_as_the_url_does(
    directory: Directory, database: Database
) -> None:
    before = directory.cell(cell_uuid(1))
    row = database.rows[cell_uuid(1)]
    object.__setattr__(row, "name", "renamed")
    database.rows = {}
    directory.refresh()
    database.rows = {row.uuid: row}
    directory.refresh()
    after = directory.cell(cell_uuid(1))
    assert after.name == "renamed"
    assert after.generation is before.generation


def test_expanding_is_done_for_rows_that_changed_only(
    database: Database, clock: Clock
) -> None:
    expanded: list[str] = []

    def expand(row: Any) -> Cell:
        expanded.append(row.uuid)
        return Cell(row.uuid, row.name)

    directory = make(database, clock=clock, expand=expand)
    directory.refresh()
    database.put(2, "rabbit://u:p@elsewhere/2")
    for _ in range(3):
        directory.refresh()
    assert expanded == [cell_uuid(1), cell_uuid(2), cell_uuid(2)]


def test_a_cell_that_refuses_is_remembered_like_any_other(
    directory: Directory, database: Database
) -> None:
    database.put(3, "none:///", uuid=CELL0_UUID)
    database.put(4, "no-such-driver://host/")
    database.instances = {INSTANCE: 3, OTHER: 4}
    for _ in range(2):
        assert cause_of(directory.find(INSTANCE)) is exceptions.CellHasNoQueue
        assert cause_of(directory.find(OTHER)) is exceptions.CellMisconfigured
    assert database.asked == ["cells", INSTANCE, OTHER]


def test_a_cell_that_is_gone_is_refused_from_the_next_refresh_on(
    directory: Directory, database: Database, clock: Clock
) -> None:
    directory.find(INSTANCE)
    database.remove(1)
    assert url_of(directory.find(INSTANCE))
    clock.now += 10.0
    for method in ("GET", "POST"):
        cell = directory.find(INSTANCE, method)
        assert cell is not None
        assert cell.generation is None
        error = cell.refuse()
        assert isinstance(error, exceptions.CellNotFound)
        assert (error.cell_uuid, error.cell_name) == (cell_uuid(1), "cell-1")
    assert directory.remembered_for(INSTANCE) is None
    # It is known to be gone: that costs no refresh.
    assert database.count("cells") == 2
    clock.now += 100.0
    assert cell_of(directory.find(INSTANCE)) == cell_uuid(1)


def test_an_instance_that_has_left_a_cell_that_is_gone_is_found(
    directory: Directory, database: Database
) -> None:
    directory.find(INSTANCE)
    database.instances[INSTANCE] = 2
    database.remove(1)
    directory.refresh()
    assert cell_of(directory.find(INSTANCE)) == cell_uuid(2)


def test_a_cell_that_comes_back_is_served_again(
    directory: Directory, database: Database
) -> None:
    directory.find(INSTANCE)
    database.remove(1)
    directory.refresh()
    database.put(1)
    directory.refresh()
    assert url_of(directory.find(INSTANCE))


def test_an_id_that_was_given_to_another_cell_leads_nobody_there(
    directory: Directory, database: Database
) -> None:
    directory.find(INSTANCE)
    database.remove(1)
    database.put(1, uuid=cell_uuid(77))
    database.instances[INSTANCE] = 2
    directory.refresh()
    assert cell_of(directory.find(INSTANCE)) == cell_uuid(2)
    assert database.count(INSTANCE) == 2


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_id_used_again_leads_to_its_new_cell_at_once(
    directory: Directory, database: Database, method: str
) -> None:
    assert cell_of(directory.find(INSTANCE)) == cell_uuid(1)
    database.remove(1)
    new = database.put(1, uuid=cell_uuid(77))
    database.instances[OTHER] = 1
    assert cell_of(directory.find(OTHER, method)) == new
    assert cell_of(directory.find(OTHER)) == new
    assert database.count("cells") == 2


@pytest.mark.parametrize("uuid", ["", " ", "\n"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_cell_without_a_uuid_is_refused_and_others_are_not(
    directory: Directory, database: Database, uuid: str, method: str
) -> None:
    # The fake would put in a UUID of its own.
    row = CellMapping(id=3, uuid=uuid, transport_url=Secret("rabbit://h/3"))
    database.rows = {**database.rows, uuid: row}
    database.instances[OTHER] = 3
    for _ in range(2):
        cell = directory.find(OTHER, method)
        assert cause_of(cell) is exceptions.CellMisconfigured
        assert cell is not None
        assert "uuid: it is empty" in str(cell.refuse())
        assert url_of(directory.find(INSTANCE, method))


@pytest.mark.parametrize("uuid", ["x", "ABC", "abc", "é", "1" * 36, "%s"])
def test_an_odd_uuid_is_a_cell_like_others(
    directory: Directory, database: Database, uuid: str
) -> None:
    for number, one in ((4, uuid.swapcase()), (3, uuid)):
        database.put(number, f"rabbit://u:p@odd/{one}", uuid=one)
    database.instances[OTHER] = 3
    assert url_of(directory.find(OTHER)) == f"rabbit://u:p@odd/{uuid}"
    assert directory.cell(uuid).uuid == uuid


def test_an_id_that_is_gone_never_stands_for_the_cell_that_had_it(
    directory: Directory, database: Database
) -> None:
    directory.find(INSTANCE)
    database.remove(1)
    database.instances[OTHER] = 1
    for method in ("GET", "POST"):
        cell = directory.find(OTHER, method)
        assert cause_of(cell) is exceptions.CellNotFound


@pytest.mark.parametrize("count", [100, 101, 1000])
def test_of_many_new_cells_one_is_enough_for_the_first_answer(
    database: Database, clock: Clock, count: int
) -> None:
    for number in range(1, count + 1):
        database.put(number)
    handed: list[int] = []
    expanded: list[str] = []

    def expand(row: Any) -> Cell:
        expanded.append(row.uuid)
        return Cell(row.uuid, row.name)

    workers = Later()
    directory = make(
        database,
        clock=clock,
        workers=workers,
        expand=expand,
        on_refresh=lambda cells: handed.append(len(cells)),
    )
    assert cell_of(directory.find(INSTANCE)) == cell_uuid(1)
    at_once = count <= 100
    assert len(expanded) == (count if at_once else 1)
    assert directory.stats().cells == count
    # A cell is there for whoever asks for it by its UUID.
    assert directory.cell(cell_uuid(77)).uuid == cell_uuid(77)
    workers.do_the_rest()
    assert sorted(expanded) == sorted(database.rows)
    assert handed == [count]
    assert all(directory.cell(uuid).uuid == uuid for uuid in database.rows)
    assert database.asked == ["cells", INSTANCE]


def test_what_is_left_of_an_older_reading_is_not_handed_on(
    database: Database, clock: Clock
) -> None:
    for number in range(1, 201):
        database.put(number)
    handed: list[str] = []
    workers = Later()
    directory = make(
        database,
        clock=clock,
        workers=workers,
        on_refresh=lambda cells: handed.append(url_of(cells[cell_uuid(1)])),
    )
    directory.refresh()
    for number in range(1, 201):
        database.put(number, f"rabbit://u:p@younger/{number}")
    directory.refresh()
    assert url_of(directory.cell(cell_uuid(1))) == "rabbit://u:p@younger/1"
    workers.do_the_rest()
    assert handed == ["rabbit://u:p@younger/1"]


def test_no_thread_for_the_rest_then_the_first_answer_waits_for_it(
    database: Database, clock: Clock
) -> None:
    for number in range(1, 201):
        database.put(number)
    handed: list[int] = []
    workers = Later(refuse=True)
    directory = make(
        database,
        clock=clock,
        workers=workers,
        on_refresh=lambda cells: handed.append(len(cells)),
    )
    directory.refresh()
    assert handed == [200]


def test_a_cell_that_the_snapshot_lacks_refreshes_it_at_once(
    directory: Directory, database: Database
) -> None:
    directory.find(INSTANCE)
    database.put(3)
    database.instances[OTHER] = 3
    assert cell_of(directory.find(OTHER)) == cell_uuid(3)
    assert database.count("cells") == 2


def test_a_cell_that_stays_unknown_does_not_refresh_for_each_request(
    directory: Directory, database: Database, clock: Clock
) -> None:
    database.instances = {INSTANCE: 98, OTHER: 99}
    for _ in range(20):
        for instance in (INSTANCE, OTHER):
            cell = directory.find(instance)
            assert cause_of(cell) is exceptions.CellNotFound
    # The query for an instance tells that there is no cell with this id.
    assert database.count("cells") == 1
    assert directory.stats().instances == 0
    clock.now += 10.0
    database.put(99)
    assert cell_of(directory.find(OTHER)) == cell_uuid(99)
    assert cause_of(directory.find(INSTANCE)) is exceptions.CellNotFound


def test_an_unknown_cell_and_no_database_is_a_failed_lookup(
    directory: Directory, database: Database
) -> None:
    directory.find(INSTANCE)
    database.put(99)
    database.instances[OTHER] = 99

    def fail(what: str) -> None:
        if what == "cells":
            raise ConnectionError("gone")

    database.before = fail
    with pytest.raises(exceptions.LookupFailed, match="gone"):
        directory.find(OTHER)


def test_a_cell_is_found_by_its_uuid(
    directory: Directory, database: Database
) -> None:
    assert directory.cell(cell_uuid(1)).name == "cell-1"
    assert directory.cell(cell_uuid(1)) is directory.cell(cell_uuid(1))
    database.put(3)
    assert directory.cell(cell_uuid(3)).uuid == cell_uuid(3)


def test_a_uuid_that_no_cell_has_is_an_error(
    directory: Directory, database: Database, clock: Clock
) -> None:
    for _ in range(20):
        for number in (98, 99):
            with pytest.raises(exceptions.CellNotFound) as caught:
                directory.cell(cell_uuid(number))
    assert caught.value.cell_uuid == cell_uuid(99)
    assert caught.value.retry_after == 10.0
    assert database.count("cells") == 3
    clock.now += 10.0
    database.put(99)
    assert directory.cell(cell_uuid(99)).uuid == cell_uuid(99)


def test_uuids_that_no_cell_has_do_not_fill_the_memory(
    directory: Directory,
) -> None:
    for number in range(100, 1200):
        with pytest.raises(exceptions.CellNotFound):
            directory.cell(cell_uuid(number))
    assert len(directory._cells._missing) <= 1000


def test_asked_to_it_reads_the_cells_now(
    directory: Directory, database: Database
) -> None:
    for _ in range(3):
        directory.refresh()
    assert database.asked == ["cells"] * 3


def test_all_that_is_read_is_handed_on(
    database: Database, clock: Clock
) -> None:
    seen: list[list[str]] = []
    locked: list[bool] = []

    def on_refresh(cells: Mapping[str, Cell]) -> None:
        seen.append([f"{uuid}={cell.uuid}" for uuid, cell in cells.items()])
        locked.append(ours._queries._lock.locked())
        locked.append(ours._instances._lock.locked())

    ours = make(database, clock=clock, on_refresh=on_refresh)
    ours.refresh()
    database.remove(2)
    database.error = ConnectionError("gone")
    with pytest.raises(exceptions.LookupFailed):
        ours.refresh()
    database.error = None
    ours.refresh()
    one, two = (f"{cell_uuid(n)}={cell_uuid(n)}" for n in (1, 2))
    assert seen == [[one, two], [one]]
    assert not any(locked)


def test_a_younger_state_is_handed_on_last(
    database: Database, clock: Clock
) -> None:
    """A second reading comes back while the first is being handed on."""
    seen: list[str] = []

    def on_refresh(cells: Mapping[str, Cell]) -> None:
        if not seen:
            database.put(1, "rabbit://u:p@younger/1")
            clock.now += 5.0  # the first one is no longer waited for
            younger.start()
            # It has read, and is at the one place where it can be held.
            assert read.wait(PATIENCE)
            younger.join(0.2)
        seen.append(url_of(cells[cell_uuid(1)]))

    def read_by(what: str) -> None:
        if younger.ident is not None:
            read.set()

    read = threading.Event()
    younger = threading.Thread(target=lambda: ours.refresh(), daemon=True)
    ours = make(database, clock=clock, on_refresh=on_refresh)
    database.after = read_by
    ours.refresh()
    younger.join(PATIENCE)
    assert seen == ["rabbit://u:secret-1@host/1", "rabbit://u:p@younger/1"]


def test_who_is_handed_cells_may_use_the_directory(
    database: Database, clock: Clock
) -> None:
    found: list[str] = []

    def on_refresh(cells: Mapping[str, Cell]) -> None:
        found.append(cell_of(ours.find(INSTANCE)))
        found.append(ours.cell(cell_uuid(2)).uuid)

    ours = make(database, clock=clock, on_refresh=on_refresh)
    ours.refresh()
    assert found == [cell_uuid(1), cell_uuid(2)]


def test_who_is_handed_cells_and_fails_harms_no_request(
    database: Database, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    def on_refresh(cells: Mapping[str, Cell]) -> None:
        raise RuntimeError("the pool is broken")

    directory = make(database, clock=clock, on_refresh=on_refresh)
    assert cell_of(directory.find(INSTANCE)) == cell_uuid(1)
    assert [record.getMessage() for record in caplog.records] == [
        "Applying new cell mappings failed: RuntimeError: the pool is broken"
    ]


# The database in trouble.


def test_a_database_that_was_never_reached_is_a_failed_lookup(
    directory: Directory, database: Database, clock: Clock
) -> None:
    database.error = ConnectionError("refused mysql://nova:S3cret-word@db/")
    for _ in range(3):
        with pytest.raises(exceptions.LookupFailed) as caught:
            directory.find(INSTANCE)
        error = caught.value
        assert error.__cause__ is None
        assert error.__context__ is None
        assert error.cause.startswith("ConnectionError: refused mysql://")
        assert "S3cret-word" not in str(error)
        assert error.retry_after == 1.0
    assert directory.stats().failures == 3
    assert directory.stats().snapshot_age is None
    database.error = None
    assert cell_of(directory.find(INSTANCE)) == cell_uuid(1)


def test_nothing_of_the_driver_is_kept(
    directory: Directory, database: Database
) -> None:
    class DriverError(Exception):
        pass

    database.error = DriverError("password")
    for method in ("GET", "POST"):
        with pytest.raises(exceptions.LookupFailed):
            directory.find(INSTANCE, method)
    database.error = None
    gc.collect()
    left = [o for o in gc.get_objects() if isinstance(o, DriverError)]
    assert left == []


def test_an_old_snapshot_serves_while_the_database_is_away(
    directory: Directory,
    database: Database,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    long = make(database, clock=clock, instance_cache_ttl=1e6)
    expected = long.find(INSTANCE)
    database.error = ConnectionError("refused")
    for _ in range(100):
        clock.now += 10.0
        assert long.find(INSTANCE) is expected
        assert long.find(INSTANCE) is expected
    assert long.stats().snapshot_age == 1000.0
    assert not long.stats().reachable
    # One attempt each time that one is due.
    assert database.count("cells") == 101
    assert len(caplog.records) == 1
    database.error = None
    clock.now += 1.0
    database.put(1, "rabbit://u:p@elsewhere/1")
    assert url_of(long.find(INSTANCE)) == "rabbit://u:p@elsewhere/1"
    assert long.stats().reachable
    assert long.stats().snapshot_age == 0.0
    assert [record.getMessage() for record in caplog.records] == [
        "API database unreachable (cell mappings):"
        " ConnectionError: refused;"
        " the known cells stay in use",
        "API database reachable again (cell mappings), after 991 seconds",
    ]


def test_one_request_a_second_sees_whether_the_database_is_back(
    directory: Directory, database: Database, clock: Clock
) -> None:
    directory.find(INSTANCE)
    clock.now += 10.0
    database.error = ConnectionError("refused")
    for _ in range(100):
        directory.find(INSTANCE)
    assert database.count("cells") == 2
    clock.now += 0.99
    directory.find(INSTANCE)
    assert database.count("cells") == 2
    clock.now += 0.01
    for _ in range(100):
        directory.find(INSTANCE)
    assert database.count("cells") == 3


@pytest.mark.parametrize(
    "interval,timeout,steps,expected",
    [
        # It begins; it is known; it was seen not long ago; it was, long ago.
        (10.0, 5.0, (10.0, 0.5, 14.0, 15.0), [2.5, 0.25, 5.0]),
        # Known from one look to the next, however short the times are.
        (0.1, 0.5, (0.1, 0.9, 0.1, 0.9, 0.1), [0.25, 0.25, 0.25]),
    ],
)
def test_an_outage_is_known_for_a_while_and_not_for_ever(
    database: Database,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    interval: float,
    timeout: float,
    steps: tuple[float, ...],
    expected: list[float],
) -> None:
    directory = make(
        database,
        clock=clock,
        cell_refresh_interval=interval,
        lookup_timeout=timeout,
    )
    waited: list[float] = []

    def wait(query: Query, timeout: float) -> bool:
        waited.append(timeout)
        return real_wait(query, timeout)

    directory.refresh()
    real_wait = directory._queries.wait
    monkeypatch.setattr(directory._queries, "wait", wait)
    database.error = ConnectionError("refused")
    for later in steps:
        clock.now += later
        directory.cell(cell_uuid(1))
    assert waited == expected


def test_what_is_not_remembered_is_a_failed_lookup_meanwhile(
    directory: Directory,
    database: Database,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    directory.find(INSTANCE)
    database.error = ConnectionError("refused")
    for _ in range(10):
        with pytest.raises(exceptions.LookupFailed, match="refused"):
            directory.find(OTHER)
        with pytest.raises(exceptions.LookupFailed, match="refused"):
            directory.find(INSTANCE, "POST")
        assert cell_of(directory.find(INSTANCE)) == cell_uuid(1)
    database.error = None
    clock.now += 1.0
    assert cell_of(directory.find(OTHER)) == cell_uuid(2)
    assert [record.getMessage() for record in caplog.records] == [
        "API database unreachable (instance mappings):"
        " ConnectionError: refused;"
        " requests for instances that are not remembered fail",
        "API database reachable again (instance mappings), after 1 seconds",
    ]


def test_a_failed_refresh_is_told_and_leaves_the_snapshot(
    directory: Directory, database: Database
) -> None:
    directory.find(INSTANCE)
    database.error = ConnectionError("refused")
    with pytest.raises(exceptions.LookupFailed, match="refused"):
        directory.refresh()
    assert cell_of(directory.find(INSTANCE)) == cell_uuid(1)


def test_a_row_that_cannot_be_expanded_is_refused_and_harms_no_other(
    database: Database, clock: Clock
) -> None:
    def expand(row: Any) -> Cell:
        if row.id == 3:
            raise ValueError("bug")
        return Cell(row.uuid, row.name)

    directory = make(database, clock=clock, expand=expand)
    database.put(3)
    database.instances[OTHER] = 3
    assert cell_of(directory.find(INSTANCE)) == cell_uuid(1)
    cell = directory.find(OTHER)
    assert cause_of(cell) is exceptions.CellMisconfigured
    assert cell is not None
    assert "bug" in str(cell.refuse())


def test_no_answer_in_time_is_a_failed_lookup(
    database: Database, clock: Clock
) -> None:
    workers = Held()
    directory = make(
        database, workers=workers, clock=clock, lookup_timeout=0.001
    )
    with pytest.raises(exceptions.LookupFailed) as caught:
        directory.find(INSTANCE)
    assert "within 0.001 seconds" in caught.value.cause
    assert directory.stats().queries_running == 1
    workers.do_all()
    assert directory.stats().queries_running == 0


def test_no_place_in_time_says_which_option_it_was(
    database: Database, clock: Clock
) -> None:
    directory = make(
        database,
        workers=Held(),
        clock=clock,
        lookup_timeout=0.001,
        lookup_concurrency=1,
    )
    for _ in range(2):
        with pytest.raises(exceptions.LookupFailed) as caught:
            directory.find(INSTANCE)
    assert "lookup_concurrency" in caught.value.cause


@pytest.mark.parametrize("timeout", [0.0, 0.001])
def test_who_waits_less_is_told_sooner(
    database: Database, clock: Clock, timeout: float
) -> None:
    directory = make(database, workers=Held(), clock=clock)
    with pytest.raises(exceptions.LookupFailed):
        directory.cell(cell_uuid(1), timeout=timeout)
    with pytest.raises(exceptions.LookupFailed):
        directory.refresh(timeout=timeout)
    # That says nothing about the database.
    assert directory.stats().reachable


class Slow(Held):
    """The database answers some queries when the test says so.

    Who waits for one of these waits by the clock, in no time.
    """

    def __init__(self, database: Database, clock: Clock, **settings: Any):
        super().__init__()
        self.clock = clock
        self.waited: list[float] = []
        self.held: Callable[[Any], bool] = lambda key: False
        # Seconds until the answer to any of them.
        self.takes = math.inf
        self.directory = make(database, workers=self, clock=clock, **settings)
        queries = self.directory._queries
        self.wait = queries.wait
        queries.wait = self.wait_by_the_clock  # type: ignore[method-assign]  # of this object alone

    def start(self, job: Any) -> None:
        super().start(job)
        if not self.held(job.key):
            self.do_all()

    def wait_by_the_clock(self, query: Query, timeout: float) -> bool:
        self.waited.append(timeout)
        if not query.done:
            self.clock.now += min(timeout, self.takes)
            if self.takes <= timeout:
                self.do_all()
        return self.wait(query, 0.0)


@pytest.fixture
def slow(database: Database, clock: Clock) -> Slow:
    return Slow(database, clock)


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_cells_that_are_slow_leave_time_for_the_instance(
    slow: Slow, clock: Clock, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    slow.directory.refresh()
    del slow.waited[:]
    slow.held = lambda key: key is CELLS
    # A little too old: this request has them read, and can go on with them.
    clock.now += 11.0
    assert cell_of(slow.directory.find(OTHER, method)) == cell_uuid(2)
    assert slow.waited == [2.5, 2.5]
    # That was no time to tell by.
    assert not caplog.records


@pytest.mark.parametrize("method", SAFE)
def test_cells_that_are_slow_are_waited_for_if_much_too_old(
    database: Database, clock: Clock, method: str
) -> None:
    slow = Slow(database, clock, instance_cache_ttl=3600.0)
    slow.directory.find(INSTANCE)
    database.put(1, "rabbit://u:p@new/1")
    slow.held = lambda key: key is CELLS
    slow.takes = 4.75
    clock.now += 20.0
    assert (
        url_of(slow.directory.find(INSTANCE, method)) == "rabbit://u:p@new/1"
    )


def test_cells_that_are_not_answered_in_time_are_an_outage(
    database: Database, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    slow = Slow(database, clock, instance_cache_ttl=3600.0)
    slow.directory.find(INSTANCE)
    del slow.waited[:]
    slow.held = lambda key: key is CELLS
    clock.now += 1000.0
    # What is remembered is served all the same.
    assert cell_of(slow.directory.find(INSTANCE)) == cell_uuid(1)
    assert slow.waited == [5.0]
    (record,) = caplog.records
    assert "unreachable (cell mappings)" in record.getMessage()
    assert "within 5 seconds" in record.getMessage()
    # For the rest there is time once that is known.
    assert cell_of(slow.directory.find(OTHER)) == cell_uuid(2)
    assert slow.waited == [5.0, 5.0]


def test_who_has_no_time_left_is_told_what_took_it(
    slow: Slow, clock: Clock
) -> None:
    slow.directory.refresh()
    del slow.waited[:]
    slow.held = lambda key: key is CELLS
    clock.now += 1000.0
    with pytest.raises(exceptions.LookupFailed) as caught:
        slow.directory.find(OTHER)
    assert "within 5 seconds" in caught.value.cause
    assert slow.waited == [5.0]
    stats = slow.directory.stats()
    assert (stats.misses, stats.failures) == (1, 1)


def test_who_could_hardly_wait_tells_of_no_outage(
    slow: Slow, caplog: pytest.LogCaptureFixture
) -> None:
    slow.held = lambda key: True
    slow.takes = 3.75
    with pytest.raises(exceptions.LookupFailed, match=r"within 1\.25 sec"):
        slow.directory.find(INSTANCE)
    assert slow.waited == [5.0, 1.25]
    assert not caplog.records


@pytest.mark.parametrize(
    "timeout,most", [(5.0, 1.0), (1.0, 0.25), (60.0, 1.0)]
)
def test_a_message_waits_little_for_what_its_cell_is_now(
    database: Database,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
    timeout: float,
    most: float,
) -> None:
    slow = Slow(database, clock, lookup_timeout=timeout)
    cell = slow.directory.cell(cell_uuid(1))
    del slow.waited[:]
    slow.held = lambda key: True
    clock.now += 1000.0
    process: Any = types.SimpleNamespace(
        directory=slow.directory,
        settings=types.SimpleNamespace(lookup_timeout=timeout),
    )
    assert Process._current(process, cell) is cell
    assert slow.waited == [most]
    # So short a time says nothing about the database.
    assert slow.directory.stats().reachable
    assert not caplog.records


def test_no_thread_to_ask_with_is_a_failed_lookup(
    database: Database, clock: Clock
) -> None:
    directory = make(database, workers=NoThreads(), clock=clock)
    for _ in range(20):
        with pytest.raises(exceptions.LookupFailed, match="new thread"):
            directory.find(INSTANCE)
    assert directory.stats().queries_running == 0


def test_an_answer_that_comes_late_does_not_replace_a_younger_one(
    database: Database, clock: Clock
) -> None:
    """A reading that hangs is given up, and comes back after another one."""
    directory = make(database, clock=clock)
    database.put(1, "rabbit://u:p@first/1")
    directory.refresh()

    def hang(what: str) -> None:
        database.after = lambda what: None
        clock.now += 5.0
        database.put(1, "rabbit://u:p@third/1")
        directory.refresh()

    database.put(1, "rabbit://u:p@second/1")
    database.after = hang
    directory.refresh()
    assert url_of(directory.cell(cell_uuid(1))) == "rabbit://u:p@third/1"
    assert directory.stats().snapshot_age == 0.0


def test_a_lookup_that_comes_late_does_not_replace_a_younger_one(
    directory: Directory, database: Database, clock: Clock
) -> None:
    directory.refresh()

    def hang(what: str) -> None:
        database.after = lambda what: None
        clock.now += 5.0
        database.instances[INSTANCE] = 2
        assert cell_of(directory.find(INSTANCE)) == cell_uuid(2)

    database.after = hang
    assert cell_of(directory.find(INSTANCE)) == cell_uuid(1)
    assert cell_of(directory.find(INSTANCE)) == cell_uuid(2)
    assert database.count(INSTANCE) == 2


# The clock.


def test_a_process_that_was_stopped_for_an_hour_costs_a_query_and_no_more(
    directory: Directory, database: Database, clock: Clock
) -> None:
    directory.find(INSTANCE)
    clock.now += 3600.0
    database.instances[INSTANCE] = 2
    for _ in range(3):
        assert cell_of(directory.find(INSTANCE)) == cell_uuid(2)
    assert database.asked == ["cells", INSTANCE] * 2
    # From then on everything lasts as long as ever.
    clock.now += 9.9
    directory.find(INSTANCE)
    assert database.count("cells") == 2
    clock.now += 20.0
    directory.find(INSTANCE)
    assert database.count(INSTANCE) == 2
    clock.now += 0.1
    directory.find(INSTANCE)
    assert database.count(INSTANCE) == 3


# What happens in another thread between two steps of this one.


class Meanwhile(Clock):
    """Does something when a function looks at the clock; once."""

    def __init__(self) -> None:
        super().__init__()
        self._function = ""
        self._action: Callable[[], object] = list

    def when(self, function: str, action: Callable[[], object]) -> None:
        self._function, self._action = function, action

    def __call__(self) -> float:
        now = self.now
        if sys._getframe(1).f_code.co_name == self._function:
            self._function = ""
            self._action()
        return now


def test_what_was_learned_since_we_looked_is_not_asked_for_again(
    database: Database,
) -> None:
    clock = Meanwhile()
    directory = make(database, clock=clock)
    directory.refresh()
    clock.when("submit", lambda: directory.find(INSTANCE))
    assert cell_of(directory.find(INSTANCE)) == cell_uuid(1)
    assert database.count(INSTANCE) == 1
    stats = directory.stats()
    assert (stats.hits, stats.misses) == (1, 1)


def test_what_was_learned_since_we_came_is_asked_for_again_if_unsafe(
    database: Database,
) -> None:
    clock = Meanwhile()
    directory = make(database, clock=clock)
    directory.refresh()
    clock.when("submit", lambda: directory.find(INSTANCE))
    directory.find(INSTANCE, "POST")
    assert database.count(INSTANCE) == 2


def test_a_snapshot_that_was_read_since_we_looked_is_not_read_again(
    database: Database,
) -> None:
    clock = Meanwhile()
    directory = make(database, clock=clock)
    clock.when("submit", lambda: directory.cell(cell_uuid(1)))
    directory.cell(cell_uuid(2))
    assert database.count("cells") == 1


def test_a_snapshot_that_is_younger_than_our_time_is_current(
    database: Database,
) -> None:
    clock = Meanwhile()
    directory = make(database, clock=clock)

    def refresh() -> None:
        clock.now += 0.1
        directory.refresh()

    directory.find(INSTANCE)
    clock.now += 10.0
    clock.when("age", refresh)
    directory.find(INSTANCE)
    assert database.count("cells") == 2


@pytest.mark.parametrize("function", ["find", "cell_now"])
def test_a_refresh_after_our_time_was_read_costs_nothing(
    database: Database, function: str
) -> None:
    clock = Meanwhile()
    directory = make(database, clock=clock)

    def refresh() -> None:
        clock.now += 0.1
        directory.refresh()

    directory.find(INSTANCE)
    clock.when(function, refresh)
    directory.find(INSTANCE)
    directory.cell(cell_uuid(1))
    assert database.asked == ["cells", INSTANCE, "cells"]


def test_an_answer_that_comes_while_it_is_forgotten_is_not_remembered(
    database: Database, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outdate(key: str) -> None:
        # Between the two steps of forget(), or before them.
        workers.do_all()
        real_outdate(key)

    workers = Held()
    directory = make(database, clock=clock, workers=workers)
    real_outdate = directory._queries.outdate
    directory._queries.submit(CELLS, directory._cells._read)
    workers.do_all()
    directory._queries.submit(INSTANCE, directory._read_instance)
    monkeypatch.setattr(directory._queries, "outdate", outdate)
    directory.forget(INSTANCE)
    assert database.count(INSTANCE) == 1
    assert directory.remembered_for(INSTANCE) is None


# The end.


def test_closed_then_it_asks_and_knows_nothing(
    directory: Directory, database: Database
) -> None:
    directory.find(INSTANCE)
    directory.close()
    directory.close()
    asked = len(database.asked)
    for method in ("GET", "POST"):
        with pytest.raises(exceptions.LookupFailed, match="closed"):
            directory.find(INSTANCE, method)
    with pytest.raises(exceptions.LookupFailed, match="closed"):
        directory.refresh()
    assert len(database.asked) == asked
    assert directory.stats().instances == 0


def test_an_answer_after_the_end_is_not_remembered(
    directory: Directory, database: Database
) -> None:
    directory.refresh()
    database.after = lambda what: directory.close()
    assert cell_of(directory.find(INSTANCE)) == cell_uuid(1)
    assert directory.stats().instances == 0


# What it costs.


def test_numbers_to_look_at(
    directory: Directory, database: Database, clock: Clock
) -> None:
    directory.find(INSTANCE)
    directory.find(INSTANCE)
    directory.find(OTHER, "POST")
    clock.now += 3.0
    stats = directory.stats()
    assert stats.cells == 2
    assert stats.snapshot_age == 3.0
    assert stats.reachable
    assert stats.instances == 2
    assert (stats.hits, stats.misses, stats.failures) == (1, 2, 0)
    assert stats.queries == 3
    assert (stats.queries_running, stats.queries_queued) == (0, 0)


def calls(function: Any, *args: Any) -> list[str]:
    """The functions that are called, Python's and C's, itself included."""
    seen: list[str] = []

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            seen.append(frame.f_code.co_name)
        elif event == "c_call":
            seen.append(argument.__name__)

    sys.setprofile(note)
    try:
        function(*args)
    finally:
        sys.setprofile(None)
    return seen[:-1]


@pytest.mark.parametrize("interval", [10.0, 1000.0])
def test_a_remembered_instance_costs_three_calls(
    database: Database, interval: float
) -> None:
    """Itself, the clock, and a look into a dict; sometimes into a second."""
    directory = make(database, cell_refresh_interval=interval)
    directory.find(INSTANCE)
    expected = ["find", "monotonic", "get"]
    assert calls(directory.find, INSTANCE, "GET") == expected
    directory._instances._rotate(0.0)
    assert calls(directory.find, INSTANCE, "GET") == [*expected, "get"]


def test_a_remembered_instance_leaves_nothing_behind(
    database: Database,
) -> None:
    directory = make(database)
    directory.find(INSTANCE)
    directory.find(INSTANCE)
    before = sys.getallocatedblocks()
    for _ in range(10_000):
        directory.find(INSTANCE)
    assert sys.getallocatedblocks() - before < 20


def test_a_known_cell_costs_four_calls(database: Database) -> None:
    directory = make(database)
    directory.refresh()
    expected = ["cell", "cell_now", "monotonic", "get"]
    assert calls(directory.cell, cell_uuid(1)) == expected
