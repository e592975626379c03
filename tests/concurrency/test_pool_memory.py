# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""S9: visiting many cells makes the process no larger."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterable, Iterator

import pytest

from cellmw.cells.directory import Directory
from cellmw.cells.mapping import Cell, CellMapping
from cellmw.redaction import Secret
from cellmw.transports.handle import Handle, RequestLease
from tests.directories import Database, cell_uuid, instance_uuid, make
from tests.fakes import Stack, cast

CELLS = 10_000


class Visited(Stack):
    """A process that asks a directory, as the real one does."""

    directory: Directory

    def borrower(self, of: Cell) -> RequestLease:
        return RequestLease(self.pool, lambda: self.directory.cell(of.uuid))

    def visit_all(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            found = self.directory.find(instance_uuid(number))
            assert found is not None
            handle = Handle(self, found)
            cast(handle)
            handle.release()
            if number % 500 == 0:
                self.tidy()

    def tidy(self) -> None:
        """What the janitor does each second."""
        self.pool.sweep()
        self.closer.watch()
        self.guards.sweep()

    def size(self) -> int:
        self.settle()
        self.tidy()
        gc.collect()
        return tracemalloc.get_traced_memory()[0]


@pytest.fixture
def stack() -> Iterator[Visited]:
    tracemalloc.start()
    try:
        with Visited(max_size=100) as stack:
            stack.transports.keep_sent = False
            stack.transports.keep_closed = False
            stack.directory = make(
                _database(),
                on_refresh=lambda cells: stack.pool.keep_only(
                    {uuid: cell.generation for uuid, cell in cells.items()}
                ),
                clock=stack.clock,
                lookup_timeout=60.0,
                cell_refresh_interval=1e9,
                instance_cache_ttl=1e9,
            )
            yield stack
    finally:
        tracemalloc.stop()


def _database() -> Database:
    database = Database()
    database.rows = {
        cell_uuid(number): CellMapping(
            uuid=cell_uuid(number),
            id=number,
            name=f"cell-{number}",
            transport_url=Secret(f"rabbit://u:hidden@host/{number}"),
        )
        for number in range(CELLS)
    }
    database.instances = {instance_uuid(n): n for n in range(CELLS)}
    return database


def test_s9_memory_is_flat_over_ten_thousand_cells(stack: Visited) -> None:
    # What the directory remembers of each instance is no part of this.
    for number in range(CELLS):
        stack.directory.find(instance_uuid(number))
    empty = stack.size()
    # What is kept up to its bound: guards, counts, transports.
    stack.visit_all(range(1, 2001))
    sizes = [stack.size()]
    for start in range(2001, CELLS, 2000):
        stack.visit_all(range(start, min(start + 2000, CELLS)))
        sizes.append(stack.size())
    # Of the whole, and of what is not the directory's too.
    assert max(sizes) - min(sizes) < 0.05 * min(sizes), sizes
    mine = [size - empty for size in sizes]
    assert max(mine) - min(mine) < 0.25 * min(mine), mine
    assert len(stack.guards.stats()) <= 1024
    assert len(stack.stats.cells) <= 256
