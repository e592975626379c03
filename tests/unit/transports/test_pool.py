# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The contract of the pool, on both settings; no I/O."""

from __future__ import annotations

import copy
import gc
import logging
import os
import pickle
import sys
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cellmw import exceptions
from cellmw.cells.mapping import Generation
from cellmw.redaction import Secret
from cellmw.transports import pool as pool_module
from cellmw.transports.pool import Lease
from tests.fakes import (
    PASSWORD,
    PATIENCE,
    Gate,
    Rig,
    Threads,
    Transport,
    cell_uuid,
    generation,
    in_child,
)


@pytest.fixture(params=[16, 0], ids=["cached", "uncached"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    """A pool of each setting in turn."""
    with Rig(max_size=request.param) as rig:
        yield rig


@pytest.fixture
def cache() -> Iterator[Rig]:
    """A pool with room for three."""
    with Rig(max_size=3) as rig:
        yield rig


# Leases, on both settings.


def test_nothing_is_opened_before_somebody_acquires(rig: Rig) -> None:
    assert rig.transports.attempts == 0
    assert rig.stats.total.open == 0


def test_a_lease_gives_the_transport_of_its_generation(rig: Rig) -> None:
    with rig.leased(1) as one, rig.leased(2) as two:
        assert one.generation is generation(1)
        assert two.generation is generation(2)
        assert rig.open_cells() == [1, 2]


def test_what_is_leased_stays_open_until_the_last_release(rig: Rig) -> None:
    first = rig.acquire()
    second = first.share()
    assert second.transport is first.transport
    first.release()
    rig.pool.keep_only({})
    assert rig.open_cells() == [1]
    second.release()
    assert rig.open_cells() == []


def test_a_lease_that_is_released_twice_counts_once(rig: Rig) -> None:
    first = rig.acquire()
    second = first.share()
    first.release()
    first.release()
    rig.pool.keep_only({})
    assert rig.open_cells() == [1]
    assert rig.stats.leases == 1
    second.release()
    second.release()
    assert rig.open_cells() == []


def test_a_lease_that_is_released_gives_no_transport(rig: Rig) -> None:
    lease = rig.acquire()
    lease.release()
    assert lease.transport is None


def test_a_lease_is_released_by_whoever_has_it(rig: Rig) -> None:
    lease = rig.acquire()
    with Threads() as threads:
        threads.start(lease.release)
    assert rig.stats.leases == 0


def test_a_share_of_a_lease_that_is_over_is_refused(rig: Rig) -> None:
    lease = rig.acquire()
    lease.release()
    with pytest.raises(AssertionError):
        lease.share()


def test_leases_are_counted_exactly(rig: Rig) -> None:
    leases = [rig.acquire(1), rig.acquire(1), rig.acquire(2)]
    leases.append(leases[0].share())
    assert rig.stats.leases == 4
    assert rig.stats.total.leased == (2 if rig.cached else 3)
    for expected, lease in enumerate(reversed(leases)):
        assert rig.stats.leases == 4 - expected
        lease.release()
    assert rig.stats.leases == 0


def test_leases_that_there_were_stay_counted(rig: Rig) -> None:
    with rig.leased(1), rig.leased(1):
        assert rig.stats.total.acquired == 2
        rig.visit(1, 2)
    assert rig.stats.total.acquired == 4
    rig.pool.keep_only({})
    rig.settle()
    assert rig.stats.total.acquired == 4
    assert rig.stats.cells[cell_uuid(1)].acquired == 3
    assert rig.stats.cells[cell_uuid(2)].acquired == 1


def test_who_finds_it_booked_just_now_has_a_lease_like_others(
    cache: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread has booked it between the two looks."""
    faster: list[Lease] = []

    class Entry(pool_module._Entry):
        __slots__ = ()

        def __init__(self, of: Generation) -> None:
            super().__init__(of)
            if not faster:
                monkeypatch.undo()
                faster.append(cache.acquire(1))

    monkeypatch.setattr(pool_module, "_Entry", Entry)
    lease = cache.acquire(1)
    assert lease.transport is faster[0].transport
    assert cache.stats.leases == cache.stats.total.acquired == 2
    faster[0].release()
    lease.release()
    assert len(cache.transports.opened) == 1


# What is shared, and what is not.


def test_one_generation_shares_one_transport(cache: Rig) -> None:
    with cache.leased(1) as one, cache.leased(1) as other:
        assert one is other
    with cache.leased(1) as later:
        assert later is one
    assert len(cache.transports.opened) == 1


def test_uncached_shares_nothing() -> None:
    with Rig(max_size=0) as rig:
        with rig.leased(1) as one, rig.leased(1) as other:
            assert one is not other
        assert rig.open_cells() == []
        assert [one.one_request for one in rig.transports.opened] == [True] * 2


@pytest.mark.parametrize(
    "one,other",
    [
        ("rabbit://u:p@a,u:p@b/v", "rabbit://u:p@b,u:p@a/v"),
        ("rabbit://u:p@a/v", "rabbit://u:q@a/v"),
        ("rabbit://u:p@a/v", "rabbit://u:p@a/v?ssl=1"),
        ("rabbit://u:p@a/v?x=1&y=2", "rabbit://u:p@a/v?y=2&x=1"),
        ("rabbit://u:p@a/v", "rabbit://u:p@a/V"),
        ("rabbit://u:p@a/v", "rabbit://u:p@a/v/"),
    ],
    ids=["hosts", "password", "query", "query order", "case", "slash"],
)
def test_strings_that_differ_anywhere_share_nothing(
    cache: Rig, one: str, other: str
) -> None:
    made = [Generation.of(cell_uuid(1), Secret(url)) for url in (one, other)]
    leases = [cache.pool.acquire(each, timeout=1) for each in made]
    assert leases[0].transport is not leases[1].transport
    for lease in leases:
        lease.release()


def test_strings_that_are_equal_share_one_transport(cache: Rig) -> None:
    url = "rabbit://u:p@a,u:p@b/v?x=1"
    kept = Generation.of(cell_uuid(1), Secret(url))
    equal = Generation.of(cell_uuid(1), Secret("".join(list(url))))
    first = cache.pool.acquire(kept, timeout=1)
    second = cache.pool.acquire(equal, timeout=1)
    assert first.transport is second.transport
    first.release()
    second.release()


def test_cells_with_the_same_url_share_nothing(cache: Rig) -> None:
    url = Secret("rabbit://u:p@a/v")
    leases = [
        cache.pool.acquire(Generation.of(cell_uuid(n), url), timeout=1)
        for n in (1, 2)
    ]
    assert leases[0].transport is not leases[1].transport
    for lease in leases:
        lease.release()


# Opening.


def test_opening_that_fails_costs_no_place(rig: Rig) -> None:
    def fail(of: Generation) -> None:
        raise exceptions.CellMisconfigured("no such driver", cell_uuid="x")

    rig.transports.on_open = fail
    for _ in range(40):
        with pytest.raises(exceptions.CellMisconfigured, match="no such"):
            rig.acquire()
    assert rig.stats.leases == rig.stats.total.open == 0
    assert rig.stats.total.failed == 40
    rig.transports.on_open = lambda of: None
    with rig.leased():
        assert rig.stats.total.open == 1


def test_a_foreign_error_of_opening_is_told_without_it(rig: Rig) -> None:
    def fail(of: Generation) -> None:
        raise OSError(f"cannot connect to {of.url.reveal()}")

    rig.transports.on_open = fail
    with pytest.raises(exceptions.CellUnavailable, match="OSError") as caught:
        rig.acquire()
    error = caught.value
    assert error.cell_uuid == cell_uuid(1)
    assert not error.maybe_delivered
    assert error.__cause__ is None
    assert error.__context__ is None
    assert PASSWORD not in "".join(traceback.format_exception(error))


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, SystemExit, GeneratorExit]
)
def test_opening_that_is_broken_off_costs_no_place(
    rig: Rig, error: type[BaseException]
) -> None:
    def fail(of: Generation) -> None:
        raise error

    rig.transports.on_open = fail
    with pytest.raises(error):
        rig.acquire()
    rig.transports.on_open = lambda of: None
    assert rig.stats.total.failed == 1
    with rig.leased():
        assert rig.stats.leases == 1


def test_opening_holds_up_nobody_else(rig: Rig) -> None:
    gate = Gate()
    rig.transports.on_open = lambda of: (
        gate.wait() if of is generation(1) else None
    )
    with Threads() as threads:
        threads.start(rig.visit, 1)
        gate.await_arrival()
        with rig.leased(2):
            assert rig.stats.total.open == 1
            rig.pool.sweep()
            rig.pool.keep_only({})
        gate.open()


def test_what_is_being_opened_has_its_place_already() -> None:
    gate = Gate()
    with Rig(max_size=1, refuse_over_limit=True) as rig, Threads() as threads:
        rig.transports.on_open = gate.wait
        threads.start(rig.visit, 1)
        gate.await_arrival()
        with pytest.raises(exceptions.CellBusy):
            rig.acquire(2)
        assert rig.transports.attempts == 1
        gate.open()


def test_many_misses_at_once_open_one_transport(cache: Rig) -> None:
    gate = Gate()
    cache.transports.on_open = gate.wait
    leases: list[Lease] = []
    with Threads() as threads:
        for _ in range(50):
            threads.start(lambda: leases.append(cache.acquire()))
        gate.await_arrival()
        _until(lambda: _holds(cache) == 50)
        gate.open()
    assert len({id(lease.transport) for lease in leases}) == 1
    assert len(cache.transports.opened) == 1
    assert cache.stats.leases == 50
    for lease in leases:
        lease.release()


def test_waiters_get_the_error_of_the_opener(cache: Rig) -> None:
    gate = Gate()

    def fail(of: Generation) -> None:
        gate.wait()
        raise exceptions.CellMisconfigured("bad", cell_uuid=cell_uuid(1))

    cache.transports.on_open = fail
    errors: list[BaseException] = []

    def acquire() -> None:
        try:
            cache.acquire()
        except exceptions.CellMisconfigured as error:
            errors.append(error)

    with Threads() as threads:
        for _ in range(20):
            threads.start(acquire)
        gate.await_arrival()
        _until(lambda: _holds(cache) == 20)
        gate.open()
    assert len(errors) == len({id(error) for error in errors}) == 20
    assert cache.transports.attempts == 1
    cache.transports.on_open = lambda of: None
    cache.visit(1, 2, 3)
    assert cache.open_cells() == [1, 2, 3]


def test_waiters_are_told_where_the_opener_was_ended(cache: Rig) -> None:
    gate = Gate()

    def fail(of: Generation) -> None:
        gate.wait()
        raise SystemExit

    cache.transports.on_open = fail
    with Threads() as threads:
        opener = threads.start(_ignoring(SystemExit, cache.acquire))
        gate.await_arrival()
        waiter = threads.start(_expecting(cache.acquire, "broken off"))
        _until(lambda: _holds(cache) == 2)
        gate.open()
        opener.join(PATIENCE)
        waiter.join(PATIENCE)
    cache.transports.on_open = lambda of: None
    cache.visit(1)


def test_opening_that_hangs_holds_nobody_longer_than_he_wants(
    cache: Rig,
) -> None:
    gate = Gate()
    cache.transports.on_open = gate.wait
    with Threads() as threads:
        threads.start(cache.visit, 1)
        gate.await_arrival()
        for timeout in (0.01, 0, -1):
            with pytest.raises(exceptions.CellUnavailable, match="too long"):
                cache.pool.acquire(generation(1), timeout=timeout)
        assert _holds(cache) == 1
        gate.open()
    assert cache.open_cells() == [1]


def test_a_waiter_that_is_ended_leaves_no_lease(cache: Rig) -> None:
    gate = Gate()
    cache.transports.on_open = gate.wait

    class Ended:
        def acquire(self, **options: Any) -> bool:
            raise SystemExit

    with Threads() as threads:
        threads.start(cache.visit, 1)
        gate.await_arrival()
        entry = cache.pool._entries[generation(1)]
        # As much of a lock as is used.
        opened, entry.opened = entry.opened, Ended()  # type: ignore[assignment]
        with pytest.raises(SystemExit):
            cache.acquire(1)
        entry.opened = opened
        assert _holds(cache) == 1
        gate.open()


# Room.


def test_the_least_recently_used_makes_room(cache: Rig) -> None:
    for number in (1, 2, 3):
        cache.visit(number)
        cache.clock.now += 1
    cache.visit(1)
    cache.visit(4)
    assert cache.open_cells() == [1, 3, 4]
    assert cache.stats.total.evicted == 1
    assert cache.stats.cells[cell_uuid(2)].evicted == 1


def test_what_is_leased_makes_no_room(cache: Rig) -> None:
    with cache.leased(1), cache.leased(2):
        cache.clock.now += 1
        cache.visit(3)
        cache.visit(4)
        assert cache.open_cells() == [1, 2, 4]


def test_over_the_limit_one_is_opened_for_the_request_alone(
    cache: Rig,
) -> None:
    with cache.leased(1), cache.leased(2), cache.leased(3):
        with cache.leased(4) as outside, cache.leased(4) as another:
            assert outside is not another
            assert outside.one_request
            assert another.one_request
            assert cache.stats.total.open == 5
            assert cache.stats.total.over_limit == 2
        assert cache.open_cells() == [1, 2, 3]
    assert cache.open_cells() == [1, 2, 3]
    assert cache.stats.total.evicted == 0


def test_over_the_limit_messages_are_refused_where_that_is_wanted() -> None:
    with Rig(max_size=2, refuse_over_limit=True) as rig:
        with rig.leased(1), rig.leased(2):
            with pytest.raises(exceptions.CellBusy) as caught:
                rig.acquire(3)
            assert caught.value.cell_uuid == cell_uuid(3)
            with rig.leased(1), rig.leased(2):
                pass
        rig.visit(3)
        assert rig.stats.total.refused == 1
        assert len(rig.transports.opened) == 3


def test_eviction_comes_before_the_bound_is_exceeded(cache: Rig) -> None:
    most = 0

    def count(of: Generation) -> None:
        nonlocal most
        most = max(most, len(cache.pool._entries))

    cache.transports.on_open = count
    cache.visit(*range(1, 20))
    assert most == 3
    assert cache.open_cells() == [17, 18, 19]


def test_open_is_cached_and_over_the_limit_and_draining(cache: Rig) -> None:
    with cache.leased(1), cache.leased(2), cache.leased(3), cache.leased(4):
        cache.pool.keep_only({cell_uuid(n): generation(n) for n in (1, 2, 4)})
        cache.visit(1)
        total = cache.stats.total
        assert (total.open, total.leased, total.draining) == (4, 4, 2)
        with cache.leased(5):
            # There is room again, but nobody knows of this cell.
            assert cache.stats.total.open == 5
    assert cache.open_cells() == [1, 2]


# Rotation.


def test_a_new_generation_serves_at_once_and_the_old_one_drains(
    rig: Rig,
) -> None:
    rig.visit(1)
    with rig.leased(1, state=0) as old:
        rig.pool.keep_only({cell_uuid(1): generation(1, 1)})
        with rig.leased(1, state=1) as new:
            assert new is not old
            assert new.generation is generation(1, 1)
            assert not old.closed
            assert rig.stats.total.draining >= 1
    rig.settle()
    assert [old.closed, new.closed] == [1, 0 if rig.cached else 1]


def test_an_old_generation_that_nobody_uses_is_closed_at_once(
    cache: Rig,
) -> None:
    cache.visit(1, 2)
    cache.pool.keep_only(
        {cell_uuid(1): generation(1, 1), cell_uuid(2): generation(2)}
    )
    assert cache.open_cells() == [2]


def test_a_cell_that_is_gone_is_closed(cache: Rig) -> None:
    cache.visit(1, 2)
    cache.pool.keep_only({cell_uuid(2): generation(2)})
    assert cache.open_cells() == [2]


def test_a_cell_that_can_no_longer_be_sent_to_is_closed(cache: Rig) -> None:
    cache.visit(1)
    cache.pool.keep_only({cell_uuid(1): None})
    assert cache.open_cells() == []


def test_an_outdated_generation_is_opened_for_one_request_only(
    cache: Rig,
) -> None:
    cache.pool.keep_only({cell_uuid(1): generation(1, 1)})
    with cache.leased(1, state=0) as one, cache.leased(1, state=0) as other:
        assert one is not other
        assert one.one_request
    assert cache.open_cells() == []
    cache.visit(1)
    with cache.leased(1, state=1) as new:
        assert not new.one_request
    assert cache.open_cells() == [1]


def test_a_generation_is_fixed_when_opening_starts(cache: Rig) -> None:
    gate = Gate()
    cache.transports.on_open = lambda of: (
        gate.wait() if of is generation(1, 0) else None
    )
    found: list[Transport] = []

    def use() -> None:
        with cache.leased(1, state=0) as transport:
            found.append(transport)

    with Threads() as threads:
        threads.start(use)
        gate.await_arrival()
        cache.pool.keep_only({cell_uuid(1): generation(1, 1)})
        with cache.leased(1, state=1) as new:
            gate.open()
            threads.join()
            with cache.leased(1, state=1) as again:
                assert again is new
    cache.settle()
    assert found[0].generation is generation(1, 0)
    assert found[0].closed == 1
    assert new.closed == 0


def test_a_rotation_misses_nobody_who_is_just_booking(cache: Rig) -> None:
    """Told that its generation is current, and booked after the rotation."""
    cache.pool.keep_only({cell_uuid(1): generation(1, 0)})

    class Slow(dict[str, Generation | None]):
        def get(self, key: str, default: Any = None) -> Any:
            found = super().get(key, default)
            if not rotated:
                rotated.append(
                    threads.start(
                        cache.pool.keep_only,
                        {cell_uuid(1): generation(1, 1)},
                    )
                )
                # It has the lock or waits for it, or has ended without.
                rotated[0].join(0.2)
            return found

    rotated: list[Any] = []
    with Threads() as threads:
        cache.pool._current = Slow({cell_uuid(1): generation(1, 0)})
        cache.visit(1)
        threads.join()
    assert cache.open_cells() == []


def test_who_comes_while_the_old_ones_are_retired_is_told(
    cache: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rotation has seen what is cached, and does not look again."""
    alone: list[bool] = []
    real = cache.pool._retire

    def retire(entries: list[Any]) -> None:
        with cache.leased(1, state=0) as late:
            alone.append(late.one_request)
        real(entries)

    monkeypatch.setattr(cache.pool, "_retire", retire)
    cache.pool.keep_only({cell_uuid(1): generation(1, 1)})
    monkeypatch.undo()
    assert alone == [True]
    assert cache.open_cells() == []


def test_a_transport_that_is_given_up_serves_nobody_new(rig: Rig) -> None:
    dead = rig.acquire()
    other = dead.share()
    transport: Any = dead.transport
    dead.give_up()
    assert other.given_up
    with rig.leased() as fresh:
        assert fresh is not transport
    dead.give_up()
    dead.release()
    dead.give_up()
    rig.settle()
    assert not transport.closed
    other.release()
    rig.settle()
    assert transport.closed == 1
    assert not dead.given_up


# Locking.


def _watching(base: Any, names: tuple[str, ...], look: Any) -> Any:
    """A class that looks around each time one of its methods is called."""

    def wrapped(name: str) -> Any:
        real = getattr(base, name)

        def method(self: Any, *args: Any) -> Any:
            look(name)
            return real(self, *args)

        return method

    return type("Watching", (base,), {name: wrapped(name) for name in names})


def _watched_entry(look: Any) -> Any:
    class Entry(pool_module._Entry):
        __slots__ = ("_leases",)
        _leases: int

        @property
        def leases(self) -> int:
            look("leases")
            return self._leases

        @leases.setter
        def leases(self, value: int) -> None:
            # A new one nobody else knows yet.
            if hasattr(self, "_leases"):
                look("leases")
            self._leases = value

    return Entry


@pytest.mark.parametrize("max_size", [2, 0], ids=["cached", "uncached"])
def test_what_threads_share_is_touched_under_the_lock_only(
    monkeypatch: pytest.MonkeyPatch, max_size: int
) -> None:
    with Rig(max_size=max_size) as rig:
        pool = rig.pool
        touched: list[str] = []

        def look(what: str) -> None:
            if not pool._lock.locked():
                caller = sys._getframe(2).f_code.co_qualname
                touched.append(f"{what} in {caller}")

        read = ("__contains__", "__getitem__", "__len__", "get", "values")
        written = ("__setitem__", "__delitem__")
        of_set = ("add", "discard", "__iter__")
        pool._entries = _watching(dict, read + written, look)()
        pool._outside = _watching(set, of_set, look)()
        pool._totals = _watching(dict, written, look)(pool._totals)
        pool._counts = _watching(dict, written, look)()
        monkeypatch.setattr(pool_module, "_Entry", _watched_entry(look))
        lease = rig.acquire(1)
        more = lease.share()
        rig.visit(1, 2, 3, 4)
        lease.give_up()
        with rig.leased(5), rig.leased(6), rig.leased(7):
            rig.pool.keep_only({cell_uuid(5): generation(5)})
        rig.clock.now += 1000
        rig.pool.sweep()
        rig.transports.on_open = _raise_value_error
        with pytest.raises(exceptions.CellUnavailable):
            rig.acquire(8)
        assert rig.stats.leases == 2
        more.release()
        lease.release()
        rig.pool.close(0)
        assert touched == []


@pytest.mark.parametrize("max_size", [2, 0], ids=["cached", "uncached"])
def test_nothing_foreign_is_called_under_the_lock(max_size: int) -> None:
    """Neither opening nor closing, the clock, nor chance."""

    rigs: list[Rig] = []

    def look(*_: object) -> None:
        # In the thread that calls it, or one that was started by it.
        for each in rigs:
            assert each.pool._lock.acquire(timeout=PATIENCE)
            each.pool._lock.release()

    def clock() -> float:
        look()
        return 0.0

    with Rig(max_size=max_size, clock=clock, chance=clock) as rig:
        rigs.append(rig)
        rig.transports.on_open = look
        rig.transports.on_close = look
        rig.visit(1, 2, 3)
        with rig.leased(4), rig.leased(5), rig.leased(6):
            rig.pool.keep_only({})
        rig.pool.sweep()


def test_what_the_cells_were_before_is_let_go_after_the_lock() -> None:
    """The last of a generation may go with it, and what it is known by."""
    with Rig() as rig:
        before = Generation.of(cell_uuid(7), Secret("rabbit://u:p@h/before"))
        locked: list[bool] = []
        weakref.finalize(
            before, lambda: locked.append(rig.pool._lock.locked())
        )
        rig.pool.keep_only({cell_uuid(7): before})
        del before
        assert not locked
        rig.pool.keep_only({})
        assert locked == [False]


@pytest.mark.parametrize("max_size", [2, 0], ids=["cached", "uncached"])
def test_nothing_is_handed_over_for_closing_under_the_lock(
    monkeypatch: pytest.MonkeyPatch, max_size: int
) -> None:
    """That starts a thread."""
    with Rig(max_size=max_size) as rig:
        locked: list[bool] = []
        real = rig.closer.close

        def close(*args: Any, **options: Any) -> None:
            locked.append(rig.pool._lock.locked())
            real(*args, **options)

        monkeypatch.setattr(rig.closer, "close", close)
        rig.visit(1, 2, 3)
        with rig.leased(4), rig.leased(5), rig.leased(6):
            rig.pool.keep_only({})
        rig.visit(7)
        lease = rig.acquire(8)
        lease.give_up()
        lease.release()
        rig.clock.now += 10_000
        rig.pool.sweep()
        rig.pool.close(0)
        assert len(locked) == rig.transports.count
        assert not any(locked)


# Time.


def test_what_is_idle_for_long_enough_is_closed(cache: Rig) -> None:
    cache.visit(1)
    cache.clock.now += 300
    cache.visit(2)
    cache.clock.now += 299
    cache.pool.sweep()
    assert cache.open_cells() == [1, 2]
    cache.clock.now += 1
    cache.pool.sweep()
    assert cache.open_cells() == [2]
    cache.clock.now += 300
    cache.pool.sweep()
    assert cache.open_cells() == []
    assert cache.stats.total.evicted == 0


def test_idle_is_counted_from_the_last_release(cache: Rig) -> None:
    lease = cache.acquire(1)
    cache.clock.now += 10_000
    cache.pool.sweep()  # leased, and so not idle; but old
    lease.release()
    with Rig(max_lifetime=0) as rig:
        with rig.leased(1):
            rig.clock.now += 10_000
            rig.pool.sweep()
        rig.clock.now += 599
        rig.pool.sweep()
        assert rig.open_cells() == [1]
        rig.clock.now += 1
        rig.pool.sweep()
        assert rig.open_cells() == []


def test_what_is_old_is_replaced_though_it_is_in_use(cache: Rig) -> None:
    chance = 0.5
    with cache.leased(1) as old:
        cache.clock.now += 3600 * (1 - 0.1 * chance) - 1
        cache.pool.sweep()
        with cache.leased(1) as same:
            assert same is old
        cache.clock.now += 1
        cache.pool.sweep()
        with cache.leased(1) as new:
            assert new is not old
        assert not old.closed
    assert cache.open_cells() == [1]
    assert [old.closed, new.closed] == [1, 0]


def test_those_opened_together_are_not_replaced_together() -> None:
    chances = iter([0.0, 0.5, 1.0])
    with Rig(chance=lambda: next(chances), idle_timeout=1e9) as rig:
        rig.visit(1, 2, 3)
        gone: list[float] = []
        for _ in range(3600):
            rig.clock.now += 1
            rig.pool.sweep()
            if len(rig.pool._entries) < 3 - len(gone):
                gone.append(rig.clock.now - 1000)
        assert gone == [3240, 3420, 3600]


def test_a_lifetime_of_zero_is_none() -> None:
    with Rig(max_lifetime=0, idle_timeout=1e9) as rig:
        rig.visit(1)
        rig.clock.now += 1e8
        rig.pool.sweep()
        assert rig.open_cells() == [1]


def test_what_is_being_opened_is_neither_idle_nor_old(cache: Rig) -> None:
    gate = Gate()
    cache.transports.on_open = gate.wait
    with Threads() as threads:
        threads.start(cache.visit, 1)
        gate.await_arrival()
        cache.clock.now += 1e6
        cache.pool.sweep()
        assert generation(1) in cache.pool._entries
        gate.open()
    cache.pool.sweep()
    assert cache.open_cells() == [1]


@pytest.mark.parametrize("jump", [-3600, -1e6])
def test_a_clock_that_goes_back_closes_nothing_early_nor_never(
    cache: Rig, jump: float
) -> None:
    cache.visit(1)
    cache.clock.now += jump
    cache.pool.sweep()
    assert cache.open_cells() == [1]
    cache.clock.now += 599
    cache.pool.sweep()
    assert cache.open_cells() == [1]
    cache.clock.now += 1
    cache.pool.sweep()
    assert cache.open_cells() == []


def test_a_clock_that_goes_back_lets_nothing_grow_old(cache: Rig) -> None:
    cache.visit(1)
    cache.clock.now -= 3600
    for _ in range(3600 // 100):
        cache.pool.sweep()
        cache.clock.now += 100
        cache.visit(1)
    cache.pool.sweep()
    assert len(cache.transports.opened) == 1
    assert cache.open_cells() == []


def test_a_clock_that_goes_on_closes_nothing_in_use(cache: Rig) -> None:
    with cache.leased(1) as used:
        cache.visit(2)
        cache.clock.now += 3600
        cache.pool.sweep()
        cache.settle()
        assert not used.closed
        assert cache.open_cells() == [1]


def test_a_wall_clock_that_jumps_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wall = time.time()
    with Rig(clock=time.monotonic) as rig:
        rig.visit(1)
        for jump in (3600, -3600):
            monkeypatch.setattr(time, "time", lambda jump=jump: wall + jump)
            rig.pool.sweep()
            rig.visit(1)
            rig.pool.sweep()
        monkeypatch.undo()
        assert len(rig.transports.opened) == 1
        assert rig.open_cells() == [1]


# Closing.


def test_closing_happens_in_another_thread(rig: Rig) -> None:
    gate = Gate()
    rig.transports.on_close = gate.wait
    rig.visit(1)
    rig.pool.keep_only({})
    gate.await_arrival()
    # This thread goes on all the same.
    rig.visit(2)
    gate.open()


def test_credentials_are_known_until_the_transport_is_closed(
    rig: Rig,
) -> None:
    """What is being closed may still tell the log of its broker."""
    url = Secret("rabbit://user:of-this-one@host/")
    wanted = Generation.of(cell_uuid(1), url)
    alive = weakref.ref(wanted)
    gate = Gate()

    def close(one: Transport) -> None:
        del one.generation
        gate.wait()

    rig.transports.on_close = close
    rig.pool.acquire(wanted, timeout=PATIENCE).release()
    del wanted
    rig.pool.keep_only({})
    gate.await_arrival()
    gc.collect()
    assert alive() is not None
    gate.open()
    rig.settle()
    rig.closer.watch()
    rig.transports.opened.clear()
    gc.collect()
    assert alive() is None


def test_closing_that_raises_is_told_once_and_counts(rig: Rig) -> None:
    def fail(one: Transport) -> None:
        raise OSError(f"lost {one.generation.url.reveal()}")

    rig.transports.on_close = fail
    rig.visit(1)
    rig.pool.keep_only({})
    rig.settle()
    assert rig.stats.total.closed == 1
    assert len(rig.records.matching("failed: OSError")) == 1


def test_closing_that_hangs_holds_up_no_other(rig: Rig) -> None:
    gate = Gate()
    rig.transports.on_close = lambda one: (
        gate.wait() if one.generation is generation(1) else None
    )
    rig.visit(1)
    rig.pool.keep_only({})
    gate.await_arrival()
    rig.visit(2)
    rig.pool.keep_only({})
    _until(lambda: rig.stats.total.closed == 1)
    rig.clock.now += 10
    rig.closer.watch()
    assert rig.stats.hanging == rig.stats.total.hung == 1
    assert rig.stats.cells[cell_uuid(1)].hung == 1
    assert rig.stats.cells[cell_uuid(2)].hung == 0
    gate.open()
    rig.settle()
    assert (rig.stats.hanging, rig.stats.total.hung) == (0, 1)


# The end.


def test_after_the_end_nothing_is_opened(rig: Rig) -> None:
    rig.visit(1)
    assert rig.pool.close(PATIENCE) == 0
    for number in (1, 2):
        with pytest.raises(exceptions.ShuttingDown) as caught:
            rig.acquire(number)
        assert caught.value.cell_uuid == cell_uuid(number)
    assert len(rig.transports.opened) == 1
    assert rig.open_cells() == []


def test_the_end_waits_for_what_is_leased(rig: Rig) -> None:
    lease = rig.acquire()
    with Threads() as threads:
        ended: list[int] = []
        threads.start(lambda: ended.append(rig.pool.close(PATIENCE)))
        _until(lambda: rig.pool._closed)
        with pytest.raises(exceptions.ShuttingDown):
            rig.acquire(2)
        more = lease.share()
        lease.release()
        assert not ended
        more.release()
    assert ended == [0]


def test_the_end_is_told_of_the_last_release_and_of_no_other(
    rig: Rig,
) -> None:
    """Or it would come too early, or not before its time is up."""
    lease = rig.acquire(1)
    other = rig.acquire(2)
    assert rig.pool.close(0) == 2
    lease.release()
    assert not rig.pool._all_gone.is_set()
    other.release()
    assert rig.pool._all_gone.is_set()


@pytest.mark.parametrize("how", ["release", "retire", "sweep"])
def test_the_end_does_not_come_before_the_last_is_with_the_closer(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Who waits for it goes on to wait for what is being closed."""
    gone: list[bool] = []
    real = rig.closer.close

    def close(*args: Any, **options: Any) -> None:
        pool.close(0)
        gone.append(pool._all_gone.is_set())
        real(*args, **options)

    pool = rig.pool
    monkeypatch.setattr(rig.closer, "close", close)
    lease = rig.acquire()
    if how == "retire":
        lease.retire()
    lease.release()
    if how == "sweep":
        rig.clock.now += 10_000
        pool.sweep()
    pool.close(0)
    assert gone == [False]
    assert pool._all_gone.is_set()


def test_the_end_of_a_pool_without_leases_waits_for_nothing(rig: Rig) -> None:
    assert rig.pool.close(0) == 0
    assert rig.pool._all_gone.is_set()


def test_the_end_tells_what_is_still_leased(rig: Rig) -> None:
    leases = [rig.acquire(1), rig.acquire(2)]
    assert rig.pool.close(0) == 2
    assert rig.open_cells() == [1, 2]
    leases.pop().release()
    assert rig.pool.close(-1) == 1
    assert rig.open_cells() == [1]
    leases.pop().release()
    assert rig.pool.close(0) == 0
    assert rig.open_cells() == []


def test_the_end_comes_though_opening_hangs(rig: Rig) -> None:
    gate = Gate()
    rig.transports.on_open = gate.wait
    with Threads() as threads:
        threads.start(rig.visit, 1)
        gate.await_arrival()
        assert rig.pool.close(0.01) == 1
        gate.open()
    assert rig.pool.close(PATIENCE) == 0


def test_the_end_comes_though_opening_fails(rig: Rig) -> None:
    gate = Gate()

    def fail(of: Generation) -> None:
        gate.wait()
        raise SystemExit

    rig.transports.on_open = fail
    with Threads() as threads:
        threads.start(_ignoring(SystemExit, rig.acquire))
        gate.await_arrival()
        ended: list[int] = []
        threads.start(lambda: ended.append(rig.pool.close(PATIENCE)))
        _until(lambda: rig.pool._closed)
        gate.open()
    assert ended == [0]
    # Told so, and not for want of patience.
    assert rig.pool._all_gone.is_set()


def test_the_end_comes_though_closing_hangs(rig: Rig) -> None:
    gate = Gate()
    rig.transports.on_close = gate.wait
    rig.visit(1)
    assert rig.pool.close(PATIENCE) == 0
    assert rig.closer.wait(0.01) == 1
    gate.open()


# After a fork.


def test_a_child_gives_back_nothing_of_its_parent(rig: Rig) -> None:
    lease = rig.acquire()

    def child() -> tuple[int, int]:
        with rig.pool._lock:  # as a thread of the parent may have had it
            lease.give_up()
            lease.release()
        return rig.stats.leases, len(rig.transports.left)

    assert in_child(child) == (1, 1)
    assert rig.stats.leases == 1
    lease.release()


def test_a_child_has_a_pool_of_its_own(rig: Rig) -> None:
    lease = rig.acquire()

    def child() -> list[int]:
        with Rig(max_size=rig.max_size) as own:
            with own.leased(1) as transport:
                assert transport is not lease.transport
                lease.release()
            return [len(rig.transports.left), len(own.transports.opened)]

    assert in_child(child) == [1, 1]
    with rig.leased():
        lease.release()


# What there is to see.


def test_numbers_are_told_by_cell_and_in_all(cache: Rig) -> None:
    with cache.leased(1), cache.leased(1), cache.leased(2):
        cache.visit(3)
        cache.visit(4)
        cache.settle()
        cache.pool.keep_only({cell_uuid(n): generation(n) for n in (2, 3, 4)})
        stats = cache.stats
        one, two, three, four = (
            stats.cells[cell_uuid(n)] for n in range(1, 5)
        )
        assert (one.open, one.leased, one.draining, one.opened) == (1, 1, 1, 1)
        assert (two.open, two.leased, two.draining, two.opened) == (1, 1, 0, 1)
        assert (three.open, three.closed, three.evicted) == (0, 1, 1)
        assert (four.open, four.leased, four.opened) == (1, 0, 1)
        assert stats.leases == 3
        for name in ("open", "leased", "draining", "opened", "closed"):
            assert getattr(stats.total, name) == sum(
                getattr(cell, name) for cell in stats.cells.values()
            )


def test_numbers_of_cells_not_used_are_dropped_but_in_the_total() -> None:
    with Rig(max_size=2) as rig:
        with rig.leased(1):
            rig.visit(*range(2, 1001))
            rig.settle()
            assert len(rig.stats.cells) <= 256
            assert rig.stats.cells[cell_uuid(1)].opened == 1
            assert rig.stats.total.opened == 1000
            assert rig.stats.total.closed == 998


# What a lease and a pool must not do.


def test_a_lease_keeps_nothing_alive_after_its_release(cache: Rig) -> None:
    lease = cache.acquire()
    transport = weakref.ref(lease.transport)
    cache.transports.opened.clear()
    lease.release()
    cache.pool.keep_only({})
    cache.settle()
    gc.collect()
    assert transport() is None


def test_no_secret_is_in_what_can_be_printed(rig: Rig) -> None:
    lease = rig.acquire()
    for thing in (lease, lease.generation, rig.stats, rig.pool):
        assert PASSWORD not in f"{thing!r} {thing!s}"
    with pytest.raises(TypeError):
        pickle.dumps(lease.generation)
    assert copy.deepcopy(lease.generation) is lease.generation
    lease.release()


def test_nothing_is_logged_where_nothing_is_wrong(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "cellmw"):
        rig.visit(1, 2)
        rig.pool.keep_only({})
        rig.pool.sweep()
        rig.settle()
    assert not rig.records.lines


def _raise_value_error(_: object) -> None:
    raise ValueError


def _holds(rig: Rig) -> int:
    """Leases, with those on what is being opened."""
    with rig.pool._lock:
        return sum(entry.leases for entry in rig.pool._everything())


def _until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it has not come to that"
        os.sched_yield()


def _expecting(function: Callable[[], Any], match: str) -> Callable[[], None]:
    def run() -> None:
        with pytest.raises(exceptions.CellUnavailable, match=match):
            function()

    return run


def _ignoring(
    kind: type[BaseException], function: Callable[[], Any]
) -> Callable[[], None]:
    def run() -> None:
        with pytest.raises(kind):
            function()

    return run
