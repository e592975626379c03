# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The pool under many threads, on transports that record what is wrong.

A fake closes nothing while it is used, and is closed once, or the test fails:
see tests/fakes.py.
"""

from __future__ import annotations

import contextlib
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from cellmw import exceptions
from cellmw.cells.mapping import Generation
from cellmw.transports.handle import Handle
from cellmw.transports.pool import Lease
from tests.fakes import (
    PATIENCE,
    Gate,
    Rig,
    Sent,
    Stack,
    Threads,
    Transport,
    cast,
    cell_uuid,
    generation,
)


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    """Let threads change places often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.fixture(params=[16, 0], ids=["cached", "uncached"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    with Rig(max_size=request.param) as rig:
        yield rig


def _bounded(rig: Rig) -> None:
    """Fail where more is cached than there is room for."""
    before = rig.transports.on_open

    def look(of: Generation) -> None:
        if len(rig.pool._entries) > rig.max_size:
            rig.transports.violations.append("more cached than allowed")
        before(of)

    rig.transports.on_open = look


# Leases.


def test_leases_are_exact_under_any_interleaving(rig: Rig) -> None:
    """Acquire, share, release, retire, sweep and give up, all at once."""
    _bounded(rig)
    stop = threading.Event()

    def disturb() -> None:
        chance = random.Random(7)
        while not stop.is_set():
            rig.clock.now += chance.choice([0, 1, 400])
            rig.pool.sweep()
            rig.pool.keep_only(
                {
                    cell_uuid(n): generation(n, chance.randrange(2))
                    for n in range(30)
                }
            )

    def borrow(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(400):
            lease = rig.acquire(chance.randrange(30), chance.randrange(2))
            transport: Any = lease.transport
            with transport.use():
                if chance.random() < 0.3:
                    other = lease.share()
                    lease.release()
                    lease = other
                if chance.random() < 0.05:
                    lease.give_up()
            lease.release()
            lease.release()

    with Threads() as threads:
        disturber = threads.start(disturb)
        borrowers = [threads.start(borrow, n) for n in range(16)]
        for thread in borrowers:
            thread.join(PATIENCE)
        stop.set()
        disturber.join(PATIENCE)
    assert rig.stats.leases == 0
    assert rig.stats.total.leased == 0


def test_eviction_and_acquisition_of_the_same_cell_at_once() -> None:
    """What is chosen to make room is not handed out any more."""
    with Rig(max_size=1) as rig:
        _bounded(rig)

        def borrow(number: int) -> None:
            for _ in range(1500):
                with rig.leased(number):
                    pass

        with Threads() as threads:
            for number in (1, 1, 2, 2):
                threads.start(borrow, number)
        assert rig.stats.total.evicted > 0


def test_one_request_ended_by_many_threads_is_released_once(rig: Rig) -> None:
    with rig.leased(1):
        for _ in range(200):
            lease = rig.acquire(1)
            barrier = threading.Barrier(4)

            def release(
                barrier: threading.Barrier = barrier, lease: Lease = lease
            ) -> None:
                barrier.wait()
                lease.release()

            with Threads() as threads:
                for _ in range(4):
                    threads.start(release)
            assert rig.stats.leases == 1


# S1


class Load:
    """Requests for some of many cells, while those change.

    5 % of them meet an opening or a broker that fails, 5 % end while their
    message is in flight.
    """

    def __init__(self, stack: Stack, cells: int) -> None:
        self.stack = stack
        self.cells = cells
        self.mixed: list[object] = []
        self.done = 0
        stack.transports.keep_sent = False
        stack.transports.on_send = self._note
        _bounded(stack)
        self._looking = stack.transports.on_open
        stack.transports.on_open = self._open
        for number in range(cells):
            stack.put(number)

    def _open(self, of: Generation) -> None:
        self._looking(of)
        if random.random() < 0.02:
            raise OSError("cannot open")

    def _note(self, one: Transport, sent: Sent) -> None:
        sent.context["seen"].append(one.generation)
        if sent.message["method"] == "fail":
            raise OSError("reset")

    def request(self, chance: random.Random) -> None:
        number = chance.randrange(self.cells)
        context: dict[str, Any] = {"seen": []}
        with self.stack.handle(number) as handle:
            if chance.random() < 0.05:
                job = self.stack.workers.submit(self._send, handle, context)
                handle.release()
                assert job.wait(PATIENCE)
            else:
                for _ in range(chance.choice([1, 1, 2])):
                    failing = chance.random() < 0.03
                    self._send(handle, context, "fail" if failing else "ping")
        seen = set(context["seen"])
        if len(seen) > 1 or {g.cell_uuid for g in seen} - {cell_uuid(number)}:
            self.mixed.append((number, seen))

    def _send(
        self, handle: Handle, context: dict[str, Any], method: str = "ping"
    ) -> None:
        with contextlib.suppress(
            exceptions.CellUnavailable, exceptions.TransportReleased
        ):
            cast(handle, ctxt=context, method=method)

    def rotate_now_and_then(self, stop: threading.Event) -> None:
        chance = random.Random(1)
        state = 0
        while not stop.wait(0.02):
            state += 1
            self.stack.put(chance.randrange(self.cells), state)
            self.stack.keep_only()
            self.stack.pool.sweep()
            self.stack.closer.watch()
            self.stack.guards.sweep()

    def run(self, threads: int, requests: int) -> None:
        stop = threading.Event()

        def work(seed: int) -> None:
            chance = random.Random(seed)
            for _ in range(requests):
                self.request(chance)

        with Threads() as running:
            rotator = running.start(self.rotate_now_and_then, stop)
            workers = [running.start(work, n) for n in range(threads)]
            for worker in workers:
                worker.join()
            stop.set()
            rotator.join()


@pytest.mark.parametrize(
    "threads,requests,evictions",
    [
        pytest.param(16, 150, 100, id="short"),
        pytest.param(
            64,
            10_000,
            50_000,
            id="full",
            marks=[pytest.mark.full, pytest.mark.timeout(3600)],
        ),
    ],
)
def test_s1_many_requests_for_many_cells(
    threads: int, requests: int, evictions: int
) -> None:
    process = psutil.Process()
    before = process.num_fds(), threading.active_count()
    with Stack(max_size=16, breaker_failures=0) as stack:
        load = Load(stack, cells=200)
        load.run(threads, requests)
        assert not load.mixed
        assert stack.stats.leases == 0
        total = stack.stats.total
        assert total.evicted + total.over_limit >= evictions
        assert total.evicted >= min(evictions, total.over_limit)
        assert total.failed > 0
        assert total.draining == 0
        assert total.open <= 16
    _until(lambda: threading.active_count() <= before[1])
    assert process.num_fds() <= before[0]


# S2


@pytest.mark.parametrize("fails_first", [False, True])
def test_s2_a_thousand_misses_at_once_open_one(fails_first: bool) -> None:
    gate = Gate()
    failures = [fails_first]

    def open_slowly(of: Generation) -> None:
        gate.wait()
        if failures.pop():
            raise OSError("not yet")
        failures.append(False)

    def miss(rig: Rig, leases: list[Lease], errors: list[Exception]) -> None:
        try:
            leases.append(rig.acquire())
        except exceptions.CellUnavailable as error:
            errors.append(error)

    with Rig(max_size=16) as rig:
        rig.transports.on_open = open_slowly
        for again in range(1 + fails_first):
            leases: list[Lease] = []
            errors: list[Exception] = []
            failures[:] = [fails_first and not again]
            with Threads() as threads:
                for _ in range(1000):
                    threads.start(miss, rig, leases, errors)
                gate.await_arrival()
                _until(lambda: _holds(rig) == 1000)
                gate.open()
            if failures == []:
                assert (len(leases), len(errors)) == (0, 1000)
                gate = Gate()
        assert (len(leases), len(errors)) == (1000, 0)
        assert len(rig.transports.opened) == 1
        assert rig.stats.leases == 1000
        for lease in leases:
            lease.release()


# S3


class Rotation(Load):
    """Load while the connection information of all cells changes.

    :ivar replaced: when each old generation was replaced
    """

    def __init__(self, stack: Stack, cells: int) -> None:
        super().__init__(stack, cells)
        self.replaced: dict[Generation, float] = {}
        self.stop = threading.Event()

    def _open(self, of: Generation) -> None:
        self._looking(of)
        time.sleep(random.choice([0, 0, 0.01, 0.06]))

    def rotate(self) -> None:
        state = 0
        while not self.stop.wait(0.05):
            state += 1
            before = self.stack.cells
            for number in range(self.cells):
                self.stack.put(number, state)
            self.stack.keep_only()
            now = time.monotonic()
            for one in before.values():
                assert one.generation is not None
                self.replaced[one.generation] = now

    def work(self, seed: int) -> None:
        chance = random.Random(seed)
        while not self.stop.is_set():
            context: dict[str, Any] = {"seen": []}
            with self.stack.handle(chance.randrange(self.cells)) as handle:
                for _ in range(chance.choice([1, 2, 5])):
                    cast(handle, ctxt=context)
                    time.sleep(chance.choice([0, 0.01]))
            if len(set(context["seen"])) != 1:
                self.mixed.append(context)

    def old(self) -> list[Transport]:
        """The transports of generations that were replaced."""
        opened = self.stack.transports.opened
        return [one for one in opened if one.generation in self.replaced]

    def closed_late(self) -> list[Transport]:
        return [
            one
            for one in self.old()
            if one.closed_at
            > 1.0 + max(one.used_until, self.replaced[one.generation])
        ]


@pytest.mark.parametrize(
    "seconds",
    [
        pytest.param(2.0, id="short"),
        pytest.param(
            60.0,
            id="full",
            marks=[pytest.mark.full, pytest.mark.timeout(600)],
        ),
    ],
)
@pytest.mark.parametrize("max_size", [16, 0], ids=["cached", "uncached"])
def test_s3_rotation_under_load(max_size: int, seconds: float) -> None:
    """Every 50 ms; no request fails or is mixed, the old ones end soon."""
    with Stack(max_size=max_size) as stack:
        load = Rotation(stack, cells=3)
        with Threads() as threads:
            threads.start(load.rotate)
            for seed in range(8):
                threads.start(load.work, seed)
            time.sleep(seconds)
            load.stop.set()
        assert not load.mixed
        stack.settle()
        assert len({one.generation for one in load.old()}) > seconds * 10
        assert not load.closed_late()
        assert all(one.closed == 1 for one in load.old())
        assert stack.stats.total.draining == 0


# S10


@pytest.mark.parametrize("max_size", [4, 0], ids=["cached", "uncached"])
def test_s10_shutdown_in_the_middle_of_traffic(max_size: int) -> None:
    """A hundred times in all."""
    for _ in range(50):
        with Stack(max_size=max_size, breaker_failures=0) as stack:
            for number in range(8):
                stack.put(number)
            going = threading.Semaphore(0)

            def work(
                seed: int,
                stack: Stack = stack,
                going: threading.Semaphore = going,
            ) -> None:
                chance = random.Random(seed)
                while True:
                    with stack.handle(chance.randrange(8)) as handle:
                        try:
                            cast(handle)
                            cast(handle)
                        except exceptions.ShuttingDown:
                            return
                    going.release()

            with Threads() as threads:
                for seed in range(6):
                    threads.start(work, seed)
                for _ in range(12):
                    assert going.acquire(timeout=PATIENCE)
                assert stack.pool.close(PATIENCE) == 0
                opened = stack.transports.attempts
                assert stack.stats.leases == 0
            assert stack.transports.attempts == opened
            stack.settle()
            assert not stack.transports.left


def _holds(rig: Rig) -> int:
    with rig.pool._lock:
        return sum(entry.leases for entry in rig.pool._everything())


def _until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it has not come to that"
        time.sleep(0.001)
