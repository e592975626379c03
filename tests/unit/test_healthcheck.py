# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What the health check says of cells, and that it cannot fail."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable
from typing import Any

import pytest
from oslo_config import cfg
from oslo_middleware.healthcheck import pluginbase

from cellmw import healthcheck, runtime
from cellmw.transports.guard import Guard, Guards

PASSWORD = "s3cr3t-p4ssw0rd"


@dataclasses.dataclass
class Directory:
    cells: int = 20
    reachable: bool = True

    def stats(self) -> Directory:
        return self


@dataclasses.dataclass
class Settings:
    healthcheck_max_cells_down: int = 0


@dataclasses.dataclass
class Process:
    """As much of a process as the health check may look at."""

    settings: Settings = dataclasses.field(default_factory=Settings)
    directory: Directory = dataclasses.field(default_factory=Directory)
    pid: int = dataclasses.field(default_factory=os.getpid)

    def __post_init__(self) -> None:
        self.guards = Guards(
            lambda uuid, name: Guard(
                uuid, name, breaker_failures=1, clock=lambda: 100.0
            )
        )

    def take_down(self, cell: str) -> None:
        guard, admission = self.guards.admit(cell, f"name of {cell}", 0)
        guard.leave()
        guard.report(False, admission, cause=PASSWORD)


@dataclasses.dataclass
class Runtime:
    current: Process | None

    def process(self) -> None:
        raise AssertionError("it makes the state of a process")


Check = Callable[..., pluginbase.HealthcheckResult]


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Check:
    """Asks the plugin about these processes' runtimes."""

    def look(*processes: Process | None) -> pluginbase.HealthcheckResult:
        found = [Runtime(process) for process in processes]
        monkeypatch.setattr(runtime, "registry", lambda: found)
        plugin = healthcheck.CellsHealthcheck(cfg.ConfigOpts(), {})
        return plugin.healthcheck(8774)

    return look


def test_all_is_well(check: Check) -> None:
    result = check(Process())
    assert result.available
    assert result.reason == "cellmw: 0 of 20 cells down"


def test_cells_that_are_down_are_counted_and_not_named(check: Check) -> None:
    process = Process()
    process.take_down("cell-a")
    process.take_down("cell-b")
    process.guards.admit("cell-c", "fine", 0)
    result = check(process)
    assert result.reason == "cellmw: 2 of 20 cells down"
    assert result.details is not None
    assert "cell cell-a is down, next trial in 30 seconds" in result.details
    assert "cell-b" in result.details
    assert "cell-c" not in result.details
    for text in (result.reason, result.details):
        assert "name of" not in text
        assert PASSWORD not in text


@pytest.mark.parametrize(
    "most,down,available",
    [(0, 1, True), (0, 20, True), (1, 1, True), (1, 2, False), (3, 4, False)],
)
def test_it_fails_for_more_cells_than_allowed_only(
    check: Check, most: int, down: int, available: bool
) -> None:
    process = Process(Settings(most))
    for number in range(down):
        process.take_down(str(number))
    assert check(process).available is available


def test_each_filter_has_its_own_limit(check: Check) -> None:
    strict, easy = Process(Settings(1)), Process()
    for cell in ("1", "2"):
        easy.take_down(cell)
    assert check(strict, easy).available
    for cell in ("1", "2"):
        strict.take_down(cell)
    result = check(strict, easy)
    assert not result.available
    # A cell is counted once.
    assert result.reason == "cellmw: 2 of 20 cells down"


def test_a_database_that_does_not_answer_is_told_and_no_reason_to_fail(
    check: Check,
) -> None:
    result = check(Process(Settings(1), Directory(reachable=False)))
    assert result.available
    assert result.reason.endswith("the API database did not answer")


def test_threads_that_are_stuck_are_told(check: Check) -> None:
    process = Process()
    guard, _ = process.guards.admit("1", None, 0)
    guard.note_stuck()
    details = check(process).details
    assert details == "threads stuck at brokers: 1"


def test_nothing_is_made_where_nothing_is(check: Check) -> None:
    parent = Process()
    parent.pid += 1
    for processes in ((), (None,), (parent,)):
        result = check(*processes)
        assert result.available
        assert "no requests served" in result.reason


def test_what_goes_wrong_is_told_and_not_raised(
    check: Check, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Directory):
        def stats(self) -> Any:
            raise ValueError("a mistake of ours")

    with caplog.at_level(logging.ERROR):
        result = check(Process(directory=Broken()))
    assert result.available
    assert result.reason == "cellmw: the state is not known"
    assert "a mistake of ours" in caplog.text


def test_a_uuid_that_is_none_forges_no_line(check: Check) -> None:
    process = Process()
    process.take_down("x\nthreads: 0")
    details = check(process).details
    assert details is not None
    assert len(details.splitlines()) == 2
