# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Each refusal leaves one log line and is counted."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest

from cellmw import exceptions
from cellmw.exceptions import CellBusy, CellHasNoQueue, SendError
from cellmw.refusals import Refusals, reason_of

ONE: dict[str, Any] = {
    "cell_uuid": "11111111-1111-4111-8111-111111111111",
    "cell_name": "one",
}
TWO: dict[str, Any] = {
    "cell_uuid": "22222222-2222-4222-8222-222222222222",
    "cell_name": "two",
}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def refusals(clock: Clock, caplog: pytest.LogCaptureFixture) -> Refusals:
    caplog.set_level(logging.DEBUG, "cellmw")
    return Refusals(clock)


def levels(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.levelname for record in caplog.records]
    caplog.clear()
    return found


def test_a_line_tells_the_request_the_cell_and_the_reason(
    refusals: Refusals, caplog: pytest.LogCaptureFixture
) -> None:
    refusals.note(CellBusy("a cause", **ONE), "req-7")
    (record,) = caplog.records
    text = record.getMessage()
    for part in ("req-7", ONE["cell_uuid"], "one", "cell_busy", "a cause"):
        assert part in text


def test_the_first_of_a_cell_and_reason_in_a_minute_is_a_warning(
    refusals: Refusals, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        refusals.note(CellBusy(**ONE))
    assert levels(caplog) == ["WARNING", "INFO", "INFO"]
    # Another cell, another reason, no cell.
    refusals.note(CellBusy(**TWO))
    refusals.note(CellHasNoQueue(**ONE))
    refusals.note(exceptions.LookupFailed("x"))
    assert levels(caplog) == ["WARNING"] * 3
    clock.now += 59.9
    refusals.note(CellBusy(**ONE))
    assert levels(caplog) == ["INFO"]
    clock.now += 0.2
    refusals.note(CellBusy(**ONE))
    assert "and 3 more" in caplog.text
    assert levels(caplog) == ["WARNING"]
    clock.now += 61
    refusals.note(CellBusy(**ONE))
    assert "more" not in caplog.text
    assert levels(caplog) == ["WARNING"]


def test_an_error_is_noted_once_wherever_it_comes_by(
    refusals: Refusals, caplog: pytest.LogCaptureFixture
) -> None:
    error = CellBusy(**ONE)
    refusals.note(error)
    refusals.note(error)
    assert levels(caplog) == ["WARNING"]
    assert refusals.counts() == [(ONE["cell_uuid"], "one", "cell_busy", 1)]
    # A new error that says the same is another refusal.
    refusals.note(error.again())
    assert refusals.counts() == [(ONE["cell_uuid"], "one", "cell_busy", 2)]


def test_nothing_in_it_forges_a_line(
    refusals: Refusals, caplog: pytest.LogCaptureFixture
) -> None:
    cell = {**ONE, "cell_name": "one\nERROR"}
    refusals.note(CellBusy("a\nERROR", **cell), "req\nERROR")
    (record,) = caplog.records
    assert record.getMessage().isprintable()


def all_kinds() -> set[type[exceptions.CellMWError]]:
    # Not by __subclasses__: other tests derive classes that look the same.
    return {
        kind
        for kind in vars(exceptions).values()
        if isinstance(kind, type) and issubclass(kind, exceptions.CellMWError)
    }


def test_each_class_of_error_has_a_reason_of_its_own() -> None:
    reasons = {reason_of(kind("x")) for kind in all_kinds()}
    assert len(reasons) == len(all_kinds()) > 15
    assert {
        "cell_busy",
        "cell_has_no_queue",
        "cell_misconfigured",
        "delivery_uncertain",
        "rpc_not_initialized",
    } <= reasons


def test_what_a_service_derives_has_no_reason_of_its_own() -> None:
    class Derived(CellBusy):
        pass

    assert reason_of(Derived()) == "cell_busy"


def test_cells_that_come_and_go_take_no_memory_for_ever(
    refusals: Refusals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cellmw.refusals._MAX_KINDS", 10)
    for number in range(100):
        refusals.note(CellBusy(cell_uuid=str(number)))
        refusals.note(SendError(cell_uuid=str(number)))
    counts = refusals.counts()
    assert len(counts) <= 12
    assert sum(count for *_, count in counts) == 200


def test_many_threads_lose_no_count(refusals: Refusals) -> None:
    begin = threading.Barrier(8)

    def refuse() -> None:
        begin.wait()
        for _ in range(250):
            refusals.note(CellBusy(**ONE))

    threads = [threading.Thread(target=refuse) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ((*_, count),) = refusals.counts()
    assert count == 2000
