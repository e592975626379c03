# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""How much is remembered of instances, for how long, in how little room."""

from __future__ import annotations

import gc
import tracemalloc
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellmw.cells.instances import INDEX_MASK, Instances, pack
from cellmw.cells.queries import Query
from tests.directories import instance_uuid


def learn(
    instances: Instances,
    number: int,
    index: int | None,
    *,
    at: float = 100.0,
    outdated: bool = False,
) -> None:
    query = Query(instance_uuid(number), lambda query: None, urgent=False)
    query.started_at = at
    query.outdated = outdated
    instances.learn(query, index)


def indexes(
    instances: Instances, numbers: range, now: float = 100.0
) -> dict[int, int]:
    """What is remembered of these instances."""
    entries = {n: instances.entry(instance_uuid(n), now) for n in numbers}
    return {n: entry[0] for n, entry in entries.items() if entry is not None}


def test_an_entry_gives_its_cell_and_its_time() -> None:
    instances = Instances(30.0, 10)
    learn(instances, 1, 7, at=100.25)
    assert instances.entry(instance_uuid(1), 100.25) == (7, 30.0)
    assert instances.entry(instance_uuid(1), 130.0) == (7, 0.25)
    assert instances.entry(instance_uuid(1), 130.25) is None
    assert instances.entry(instance_uuid(2), 100.25) is None


@given(
    at=st.floats(-1e6, 1e9),
    ttl=st.floats(0.001, 1e6),
    index=st.integers(0, INDEX_MASK),
)
def test_an_entry_never_outlives_its_time(
    at: float, ttl: float, index: int
) -> None:
    until = at + ttl
    packed = pack(until, index)
    assert packed & INDEX_MASK == index
    assert until - 0.001 <= (packed >> 20) / 1024 <= until
    instances = Instances(ttl, 1)
    learn(instances, 1, index, at=at)
    assert instances.entry(instance_uuid(1), until) is None


@given(later=st.floats(0, 1e6), index=st.integers(0, INDEX_MASK))
def test_an_entry_above_the_mark_holds_until_then(
    later: float, index: int
) -> None:
    mark = pack(500.0, INDEX_MASK)
    packed = pack(500.0 + later, index)
    if packed > mark:
        assert (packed >> 20) / 1024 > 500.0
    else:
        assert later < 0.001


def test_a_clock_below_zero_is_as_good_as_any() -> None:
    instances = Instances(30.0, 10)
    assert instances.entry(instance_uuid(1), -10.0) is None
    learn(instances, 1, 3, at=-10.0)
    assert instances.entry(instance_uuid(1), -10.0) == (3, 30.0)
    assert instances.entry(instance_uuid(1), 20.0) is None


def test_what_is_learned_takes_the_place_of_what_was_known() -> None:
    instances = Instances(30.0, 10)
    learn(instances, 1, 7)
    learn(instances, 1, 8)
    assert indexes(instances, range(3)) == {1: 8}
    learn(instances, 1, None)
    assert indexes(instances, range(3)) == {}
    assert len(instances) == 0


def test_what_is_learned_takes_the_place_of_an_older_entry() -> None:
    instances = Instances(30.0, 4)
    learn(instances, 1, 7)
    learn(instances, 2, 7)
    learn(instances, 3, 7)
    assert instance_uuid(1) in instances.older
    learn(instances, 1, 8)
    learn(instances, 2, None)
    assert indexes(instances, range(9)) == {1: 8, 3: 7}
    assert len(instances) == 2


def test_an_outdated_answer_changes_nothing() -> None:
    instances = Instances(30.0, 10)
    learn(instances, 1, 7)
    learn(instances, 1, 8, outdated=True)
    learn(instances, 1, None, outdated=True)
    learn(instances, 2, 8, outdated=True)
    assert indexes(instances, range(3)) == {1: 7}


def test_forgotten_is_forgotten_wherever_it_stands() -> None:
    instances = Instances(30.0, 4)
    for number in (1, 2, 3):
        learn(instances, number, 7)
    instances.forget(instance_uuid(1))
    instances.forget(instance_uuid(3))
    instances.forget(instance_uuid(9))
    assert indexes(instances, range(9)) == {2: 7}


@pytest.mark.parametrize("ttl,size", [(0.0, 10), (30.0, 0), (0.0, 0)])
def test_nothing_is_kept_where_nothing_may(ttl: float, size: int) -> None:
    instances = Instances(ttl, size)
    learn(instances, 1, 7)
    assert len(instances) == 0


def test_a_cell_beyond_what_an_entry_can_name_is_not_kept() -> None:
    instances = Instances(30.0, 10)
    learn(instances, 1, INDEX_MASK)
    learn(instances, 2, INDEX_MASK + 1)
    assert indexes(instances, range(3)) == {1: INDEX_MASK}


@given(
    size=st.integers(1, 12),
    numbers=st.lists(st.integers(0, 30), max_size=200),
)
def test_never_more_than_the_size_and_half_of_it_at_least(
    size: int, numbers: list[int]
) -> None:
    instances = Instances(30.0, size)
    known: dict[int, int] = {}
    for index, number in enumerate(numbers):
        learn(instances, number, index)
        known[number] = index
        assert len(instances) <= size
        found = indexes(instances, range(31))
        # What is found is the last that was learned ...
        assert found.items() <= known.items()
        # ... and the last few that were learned are found.
        last = list(dict.fromkeys(reversed(numbers[: index + 1])))
        assert set(last[: max(1, size // 2)]) <= found.keys()


def test_as_many_fit_as_were_allowed() -> None:
    instances = Instances(30.0, 1000)
    for number in range(1000):
        learn(instances, number, 7)
    assert len(indexes(instances, range(1000))) == 1000


def test_what_has_expired_is_let_go() -> None:
    instances = Instances(30.0, 1000)
    for number in range(100):
        learn(instances, number, 7, at=100.0)
    learn(instances, 100, 7, at=130.0)
    assert len(instances) == 101
    learn(instances, 101, 7, at=160.0)
    assert len(instances) == 2
    learn(instances, 102, 7, at=190.0)
    assert len(instances) == 2


def test_closed_it_caches_no_more() -> None:
    instances = Instances(30.0, 4)
    for number in (1, 2, 3):
        learn(instances, number, 7)
    instances.close()
    assert len(instances) == 0
    learn(instances, 2, 8)
    assert len(instances) == 0


@pytest.mark.parametrize("count", [700, 1_000, 5_500])
def test_an_instance_takes_250_bytes_at_most(count: int) -> None:
    """Its UUID included, just before and just after a dict has grown."""
    instances = Instances(30.0, count)
    # What is made once, on first use, belongs to no instance.
    learn(Instances(30.0, 4), int(uuid.uuid4().hex[:4], 16), 7)
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(count):
            query = Query(str(uuid.uuid4()), lambda query: None, urgent=False)
            query.started_at = 1e9
            instances.learn(query, INDEX_MASK)
        del query
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(instances) == count
    assert (after - before) / count <= 250
