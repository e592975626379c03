# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Fixtures for the tests of services that use this package.

Plain context managers, for any test framework; for pytest there are
fixtures in :mod:`cellmw.testing.pytest_plugin`.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator

from cellmw import runtime
from cellmw.process import Process
from cellmw.testing import memory_brokers


class LeakError(AssertionError):
    """A test has left something open or in use."""


@contextlib.contextmanager
def own_brokers() -> Iterator[None]:
    """Memory brokers that no other test has used.

    At the end all faults are healed, so that whoever is held goes on, and
    the brokers are forgotten.
    """
    memory_brokers.forget_brokers()
    try:
        yield
    finally:
        memory_brokers.forget_brokers()


@contextlib.contextmanager
def no_leaks(*, within: float = 5.0) -> Iterator[None]:
    """Fail with :class:`LeakError` if the block leaves something behind.

    That is a lease on a cell's transport, which the first message takes: a
    response that was never closed, a ``target_cell`` block that was not
    left; or a transport with a ``cellmw-memory`` URL.  What a filter keeps
    cached is no leak: filters that were loaded in the block are shut down at
    its end, so it must include the use of them.  A block that raises is not
    failed twice.

    :param within: how long to wait for what is just ending, in seconds
    """
    transports = _open_transports()
    filters = list(runtime.registry())
    cached = sum(_open(known) for known in filters)
    try:
        yield
    except BaseException:
        _shut_down_others(filters, 0)
        raise
    deadline = time.monotonic() + within
    leaks = _still(_leases, deadline)
    _shut_down_others(filters, max(0, deadline - time.monotonic()))

    def left() -> list[str]:
        """New transports, but for what filters from before have cached."""
        new = _open_transports().keys() - transports.keys()
        kept = sum(_open(known) for known in filters) - cached
        return _describe(new) if len(new) > max(0, kept) else []

    leaks += _still(left, deadline)
    if leaks:
        raise LeakError("; ".join(leaks))


def _still(find: Callable[[], list[str]], deadline: float) -> list[str]:
    """What is found until the deadline, or nothing as soon as it is gone."""
    while (found := find()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


def _process(known: runtime.Runtime) -> Process | None:
    """A runtime's state, unless it has done nothing in this process."""
    process = known.current
    if process is None or process.pid != os.getpid():
        return None
    return process


def _open(known: runtime.Runtime) -> int:
    process = _process(known)
    return 0 if process is None else process.pool.stats().total.open


def _leases() -> list[str]:
    leaks = []
    for known in runtime.registry():
        process = _process(known)
        if process is None:
            continue
        for cell, numbers in process.pool.stats().cells.items():
            if numbers.leased:
                leaks.append(f"a transport of cell {cell} is still leased")
    return leaks


def _shut_down_others(kept: list[runtime.Runtime], timeout: float) -> None:
    for known in runtime.registry():
        if known not in kept:
            known.close(timeout)


def _open_transports() -> dict[int, memory_brokers.Broker]:
    return {
        number: broker
        for broker in memory_brokers.brokers()
        for number in broker.open_transports()
    }


def _describe(left: set[int]) -> list[str]:
    found = _open_transports()
    return [
        f"a transport for {found[number].address} was not cleaned up"
        for number in sorted(left & found.keys())
    ]
