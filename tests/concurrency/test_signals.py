# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""A signal handler that looks up, wherever it interrupts a lookup."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Self

import pytest

import cellmw
from cellmw.cells.directory import Directory
from cellmw.workers import Workers
from tests.directories import Database, cell_uuid, instance_uuid, make

FOLDER = str(Path(cellmw.__file__).parent)
# Far more than a lookup takes, and far less than lookup_timeout.
TIMEOUT = 60.0


@pytest.fixture
def database() -> Database:
    database = Database()
    for number in (1, 2):
        database.put(number)
        database.instances[instance_uuid(number)] = number
    return database


@pytest.fixture
def directory(database: Database) -> Iterator[Directory]:
    workers = Workers()
    directory = make(
        database,
        workers=workers,
        lookup_timeout=TIMEOUT,
        lookup_concurrency=1,
    )
    yield directory
    directory.close()
    workers.close()


class Interrupting:
    """Raises a real signal at one instruction of ours, counted from 0.

    :ivar reached: how many there were before it struck
    """

    def __init__(self, at: int) -> None:
        self._at = at
        self.reached = 0
        self.where = ""

    def __enter__(self) -> Self:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *exc_info: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, arg: object) -> Any:
        if not frame.f_code.co_filename.startswith(FOLDER):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            if self.reached == self._at:
                sys.settrace(None)
                self.where = f"{frame.f_code.co_qualname}:{frame.f_lineno}"
                self.reached += 1
                signal.raise_signal(signal.SIGUSR1)
                return None
            if self.reached < self._at:
                self.reached += 1
        return self._trace


@pytest.fixture
def on_signal() -> Iterator[Callable[[Callable[[], None]], None]]:
    before = signal.getsignal(signal.SIGUSR1)

    def install(action: Callable[[], None]) -> None:
        signal.signal(signal.SIGUSR1, lambda number, frame: action())

    yield install
    signal.signal(signal.SIGUSR1, before)


WAYS: dict[str, Callable[[Directory], object]] = {
    "find": lambda directory: directory.find(instance_uuid(1), "POST"),
    "refresh": lambda directory: directory.refresh(),
    "forget": lambda directory: directory.forget(instance_uuid(1)),
    "stats": lambda directory: directory.stats(),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wanted", [1, 2])
def test_a_handler_looks_up_wherever_it_strikes(
    directory: Directory,
    on_signal: Callable[[Callable[[], None]], None],
    way: str,
    wanted: int,
) -> None:
    found: list[str] = []

    def look_up() -> None:
        cell = directory.find(instance_uuid(wanted), "POST")
        assert cell is not None
        found.append(cell.uuid)

    on_signal(look_up)
    directory.refresh()
    at = 0
    while True:
        del found[:]
        with Interrupting(at) as interrupting:
            WAYS[way](directory)
        if not interrupting.where:
            break
        # It would have waited for TIMEOUT, and for the test's own.
        assert found == [cell_uuid(wanted)], interrupting.where
        at += 1
    assert at > 3
    load = directory.stats()
    assert (load.queries_running, load.queries_queued) == (0, 0)
