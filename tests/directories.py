# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What tests of the directory are made of: clock, database, threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from cellmw.cells import directory, known
from cellmw.cells.mapping import Cell, CellMapping, expand
from cellmw.cells.queries import Query
from cellmw.redaction import Secret
from cellmw.workers import Job, Workers

_Answer = TypeVar("_Answer")

DRIVERS = frozenset({"rabbit"})


class Clock:
    """Stands still until a test sets it."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Inline(Workers):
    """Does each job in the thread that submits it."""

    def start(self, job: Job) -> None:
        job.run()
        job.finish()


class Prompt(Workers):
    """Does each job in another thread, before :meth:`start` returns."""

    def start(self, job: Job) -> None:
        thread = threading.Thread(target=job.run)
        thread.start()
        thread.join()
        job.finish()


class Later(Prompt):
    """Does queries at once, and other jobs when the test says so.

    :param refuse: there is no thread for other jobs
    """

    def __init__(self, *, refuse: bool = False) -> None:
        super().__init__()
        self._refuse = refuse
        self._jobs: list[Job] = []

    def start(self, job: Job) -> None:
        if isinstance(job, Query):
            super().start(job)
        elif self._refuse:
            NoThreads().start(job)
        else:
            self._jobs.append(job)

    def do_the_rest(self) -> None:
        for job in self._jobs:
            super().start(job)
            assert job.error is None


class Held(Workers):
    """Does each job when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs: list[Job] = []

    def start(self, job: Job) -> None:
        self.jobs.append(job)

    def do_all(self) -> None:
        while self.jobs:
            job = self.jobs.pop(0)
            job.run()
            job.finish()
            assert job.error is None


class NoThreads(Workers):
    """The operating system has no thread left."""

    def start(self, job: Job) -> None:
        job.error = RuntimeError("can't start new thread")
        job.finish()


class Database:
    """A source that is a few dicts, and records what it is asked.

    :ivar asked: one entry for each query: ``"cells"`` or an instance's UUID
    :ivar error: each query raises it, while it is set
    :ivar before: called with that entry before the query looks it up
    :ivar after: called with that entry before the query returns its answer
    """

    def __init__(self) -> None:
        self.rows: dict[str, CellMapping] = {}
        self.instances: dict[str, int | None] = {}
        self.asked: list[str] = []
        self.error: BaseException | None = None
        self.before: Callable[[str], None] = lambda what: None
        self.after: Callable[[str], None] = lambda what: None
        self._lock = threading.Lock()
        self.out = 0
        self.most_out = 0

    def put(
        self, number: int, url: str | None = None, *, uuid: str | None = None
    ) -> str:
        """Make or change the cell with this id; gives its UUID."""
        uuid = uuid or cell_uuid(number)
        row = CellMapping(
            uuid=uuid,
            id=number,
            name=f"cell-{number}",
            transport_url=Secret(
                url or f"rabbit://u:secret-{number}@host/{number}"
            ),
        )
        self.rows = {**self.rows, uuid: row}
        return uuid

    def remove(self, number: int) -> None:
        self.rows = {
            uuid: row for uuid, row in self.rows.items() if row.id != number
        }

    def count(self, what: str) -> int:
        return self.asked.count(what)

    def cells(self) -> Iterable[CellMapping]:
        return self._answer("cells", lambda: list(self.rows.values()))

    def cell_of(self, instance_uuid: str) -> tuple[int, str | None] | None:
        def look() -> tuple[int, str | None] | None:
            number = self.instances.get(instance_uuid)
            if number is None:
                return None
            uuids = [
                row.uuid for row in self.rows.values() if row.id == number
            ]
            return number, uuids[0] if uuids else None

        return self._answer(instance_uuid, look)

    def _answer(self, what: str, look: Callable[[], _Answer]) -> _Answer:
        with self._lock:
            self.asked.append(what)
            self.out += 1
            self.most_out = max(self.most_out, self.out)
        try:
            self.before(what)
            if self.error is not None:
                raise self.error
            answer = look()
            self.after(what)
            return answer
        finally:
            with self._lock:
                self.out -= 1


def cell_uuid(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012x}"


def instance_uuid(number: int) -> str:
    return f"10000000-0000-4000-8000-{number:012x}"


def make(
    database: Database | known.Source,
    *,
    workers: Workers | None = None,
    **settings: Any,
) -> directory.Directory:
    """A directory with the defaults of the options."""
    settings = {
        "expand": expanded,
        "lookup_timeout": 5.0,
        "lookup_concurrency": 8,
        "cell_refresh_interval": 10.0,
        "instance_cache_ttl": 30.0,
        "instance_cache_for": "safe",
        "instance_cache_size": 100_000,
        **settings,
    }
    # Workers without a thread are false.
    workers = Prompt() if workers is None else workers
    return directory.Directory(database, workers=workers, **settings)


def expanded(row: CellMapping) -> Cell:
    return expand(row, None, DRIVERS)


def url_of(cell: Cell | None) -> str:
    assert cell is not None
    assert cell.generation is not None
    return cell.generation.url.reveal()
