# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Durations are counted in the class that they belong to."""

from __future__ import annotations

import pytest

from cellmw.durations import BOUNDS, DurationCounter, Durations


def test_nothing_is_counted_at_first() -> None:
    assert DurationCounter().counted() == Durations()


@pytest.mark.parametrize(
    "seconds,index",
    [
        (0.0, 0),
        (BOUNDS[0], 0),
        (BOUNDS[0] * 1.01, 1),
        (BOUNDS[-1], len(BOUNDS) - 1),
        (1e9, len(BOUNDS)),
        (-5.0, 0),
    ],
)
def test_a_bound_belongs_to_its_class(seconds: float, index: int) -> None:
    counter = DurationCounter()
    counter.add(seconds)
    counted = counter.counted()
    assert counted.counts.index(1) == index
    assert sum(counted.counts) == 1
    assert counted.total == max(0.0, seconds)


def test_the_classes_are_in_order() -> None:
    assert list(BOUNDS) == sorted(set(BOUNDS))
