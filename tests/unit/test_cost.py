# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What stands in every request's way, counted in function calls and memory.

These numbers are the same on every machine, as seconds are not; how long it
takes is measured in ``benchmarks/``.  A change that makes one larger has a
reason, and one that makes it smaller lowers the bound here.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import sys
import tracemalloc
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from cellmw.cells.directory import Directory
from cellmw.middleware import CellMW
from cellmw.refusals import Refusals
from tests.directories import Database, Inline, instance_uuid, make
from tests.fakes import Rig, Stack, call, cast, generation
from tests.unit.test_middleware import Runtime

NO_INSTANCE = "/v2.1/6f70656e737461636b20342065766572/servers/detail"
# What repeating something a thousand times may leave: the interpreter's own.
SOME = 20


def calls(way: Callable[[], object]) -> int:
    """How many functions it calls, Python's and C's, in this thread."""
    counted = 0

    def note(frame: FrameType, event: str, arg: object) -> None:
        nonlocal counted
        counted += event in ("call", "c_call")

    way()  # what is made or imported once is not counted
    sys.setprofile(note)
    try:
        way()
    finally:
        sys.setprofile(None)
    return counted - 2  # way() itself, and the end of counting


def peak(way: Callable[[], object]) -> int:
    """How many bytes it has at most besides what was there before."""
    way()
    gc.collect()
    tracemalloc.start()
    try:
        way()
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        way()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def growth(way: Callable[[], object], times: int = 1000) -> int:
    """How many blocks of memory are left of it when it is over."""
    way()
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(times):
        way()
    gc.collect()
    return sys.getallocatedblocks() - before


class Process:
    """As much of a process's state as a request that sends nothing needs."""

    def __init__(self, directory: Directory) -> None:
        self.pid = os.getpid()
        self.runtime_id = 1
        self.refusals = Refusals()
        self.directory = directory


class Context:
    """A service's own."""


def application(environ: Any, start_response: Any) -> list[bytes]:
    return []


def known(cells: int = 1, instances: int = 1) -> Directory:
    database = Database()
    for number in range(1, cells + 1):
        database.put(number)
    for number in range(instances):
        database.instances[instance_uuid(number)] = number % cells + 1
    directory = make(database)
    for number in range(instances):
        directory.find(instance_uuid(number))
    return directory


def request(
    path: str, directory: Directory | None = None
) -> Callable[[], object]:
    """A request through the filter; what the application does is nothing."""
    runtime: Any = Runtime()
    runtime.current = Process(directory or known())
    served = CellMW(application, runtime)
    environ = {
        "REQUEST_METHOD": "GET",
        "PATH_INFO": path,
        "cellmw.context": Context(),
    }

    def way() -> object:
        # Nobody calls it.
        return served(environ, None)  # type: ignore[arg-type]

    return way


def for_instance(directory: Directory | None = None) -> Callable[[], object]:
    return request(f"/v2.1/servers/{instance_uuid(0)}", directory)


def test_a_request_without_an_instance_costs_hardly_anything() -> None:
    way = request(NO_INSTANCE)
    assert calls(way) <= 6
    assert peak(way) <= 400
    assert growth(way) < SOME


def test_a_request_whose_instance_is_remembered_costs_little() -> None:
    way = for_instance()
    assert calls(way) <= 20
    assert peak(way) <= 1600
    assert growth(way) < SOME


def test_what_is_known_makes_no_request_dearer() -> None:
    many = known(cells=200, instances=2000)
    assert calls(for_instance(many)) == calls(for_instance())
    wanted = instance_uuid(7)
    assert calls(lambda: many.find(wanted)) <= 3


def test_a_lease_costs_little() -> None:
    wanted = generation(1)
    with Rig() as rig:
        pool = rig.pool

        def way() -> None:
            lease = pool.acquire_now(wanted)
            assert lease is not None
            lease.release()

        pool.acquire(wanted, timeout=1).release()
        assert calls(way) <= 7
        assert peak(way) <= 320
        assert growth(way) < SOME


@pytest.mark.parametrize("send", [cast, call])
def test_a_message_costs_what_its_protection_needs(
    send: Callable[..., Any],
) -> None:
    """Guard and lease; the driver's part, which is a fake's, included."""
    with Stack(ready=True) as stack:
        stack.put(1)
        stack.transports.keep_sent = False
        with stack.handle() as handle:
            send(handle)
            assert calls(lambda: send(handle)) <= 72
            assert growth(lambda: send(handle)) < SOME


@pytest.mark.parametrize("send", [cast, call])
def test_a_message_that_a_worker_sends_costs_little_more(
    send: Callable[..., Any],
) -> None:
    """The same with the hand-over, and the worker's part in this thread."""
    with Stack() as stack:
        stack.put(1)
        stack.transports.keep_sent = False
        with stack.handle() as handle:
            send(handle)
            stack.delivering = dataclasses.replace(
                stack.delivering,
                workers=Inline(),
            )
            assert calls(lambda: send(handle)) <= 107
            assert growth(lambda: send(handle)) < SOME
