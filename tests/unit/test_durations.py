# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""A histogram counts each duration in its bucket."""

from __future__ import annotations

import pytest

from cellmw.durations import BOUNDS, Durations, Histogram


def test_nothing_is_counted_at_first() -> None:
    assert Histogram().snapshot() == Durations()


@pytest.mark.parametrize(
    "seconds,index",
    [
        (0.0, 0),
        (BOUNDS[0], 0),
        (BOUNDS[0] * 1.01, 1),
        (BOUNDS[-1], len(BOUNDS) - 1),
        (1e9, len(BOUNDS)),
    ],
)
def test_a_bound_belongs_to_its_bucket(seconds: float, index: int) -> None:
    counter = Histogram()
    counter.observe(seconds)
    counted = counter.snapshot()
    assert counted.counts.index(1) == index
    assert sum(counted.counts) == 1
    assert counted.total == seconds


def test_the_bounds_are_in_order() -> None:
    assert list(BOUNDS) == sorted(set(BOUNDS))
