# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""S11: a connection that is gone costs no message that is sent afterwards.

A message that is under way when its connection ends may be uncertain.  One
that begins later finds the connection closed before it writes, and takes
another.  What was answered "ok" arrived exactly once.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import servers
from tests.faults.outage import Child
from tests.faults.service import SOON, Outcome, Service, durable
from tests.faults.traffic import Breaks, Traffic, at_once
from tests.faults.witness import Witness, contradictions
from tests.functional import stack
from tests.proxy import Proxy

pytestmark = [pytest.mark.servers, pytest.mark.leaves_sockets_to_gc]

THREADS = 6


@contextlib.contextmanager
def hosted(vhost: servers.Vhost) -> Iterator[Witness]:
    """A cell's host, and what counts the messages that come to it."""
    with Witness(vhost.url) as witness:
        host = Child("tests.faults.hosts", [durable(vhost.url)])
        try:
            assert host.line() == "ready"
            yield witness
        finally:
            host.end()


def service(database: servers.Database) -> Service:
    """One that takes no cell as down: each message meets the broker.

    A broker that starts takes the machine for itself, so look-ups have time.
    """
    return Service(database, breaker_failures=0, lookup_timeout=2 * SOON)


def end_in_turn(number: int, proxy: Proxy, vhost: servers.Vhost) -> None:
    """End all connections of the cell: reset, in good order, by AMQP."""
    if number % 10 == 9:
        vhost.close_connections()
    else:
        proxy.cut(reset=number % 2 == 0)


@pytest.mark.parametrize(
    "cuts",
    [
        pytest.param(20, marks=pytest.mark.timeout(300)),
        pytest.param(100, marks=[pytest.mark.full, pytest.mark.timeout(1800)]),
    ],
)
def test_s11_cuts_under_traffic(
    cuts: int,
    sqlite: servers.Database,
    vhost: servers.Vhost,
    make_proxy: Callable[[str], Proxy],
) -> None:
    proxy = make_proxy(vhost.url)
    breaks = Breaks()
    with (
        hosted(vhost) as witness,
        contextlib.closing(service(sqlite)) as api,
    ):
        cell = api.add_cell(durable(vhost.url_via(proxy.address)))
        traffic = Traffic(api, cell, THREADS)
        for number in range(cuts):
            # So that several connections are open again, most of them idle.
            traffic.wait_for(3 * THREADS)
            with breaks.one():
                end_in_turn(number, proxy, vhost)
        traffic.wait_for(3 * THREADS)
        outcomes = traffic.stop()
        assert contradictions(outcomes, witness.arrived()) == []
        assert breaks.needless(outcomes) == []
        assert max(o.seconds for o in outcomes) <= SOON


@pytest.mark.parametrize(
    "reset", [True, False], ids=["reset", "in good order"]
)
def test_messages_at_once_after_a_cut_all_arrive(
    sqlite: servers.Database,
    vhost: servers.Vhost,
    make_proxy: Callable[[str], Proxy],
    reset: bool,
) -> None:
    proxy = make_proxy(vhost.url)
    with (
        hosted(vhost) as witness,
        contextlib.closing(Service(sqlite)) as api,
    ):
        cell = api.add_cell(durable(vhost.url_via(proxy.address)))
        outcomes: list[Outcome] = []
        for _ in range(3):
            outcomes += at_once(THREADS, lambda: api.send_one(cell))
            proxy.cut(reset=reset)
            outcomes += at_once(THREADS, lambda: api.send_one(cell))
        assert {o.kind for o in outcomes} == {"delivered"}
        assert contradictions(outcomes, witness.arrived()) == []


def kill(broker: servers.PrivateBroker) -> None:
    broker.kill()


def stop(broker: servers.PrivateBroker) -> None:
    """In good order: it tells its clients."""
    broker.ctl("stop_app")


def start(broker: servers.PrivateBroker) -> None:
    if broker.running:
        broker.ctl("start_app")
    broker.start()


@pytest.mark.parametrize(
    "restarts",
    [
        pytest.param(3, marks=pytest.mark.timeout(300)),
        pytest.param(100, marks=[pytest.mark.full, pytest.mark.timeout(3600)]),
    ],
)
def test_s11_restarts_under_traffic_leave_nothing_behind(
    restarts: int,
    sqlite: servers.Database,
    private_broker: servers.PrivateBroker,
) -> None:
    threads = threading.active_count()
    files = descriptors()
    breaks = Breaks()
    with private_broker.vhost() as vhost, hosted(vhost) as witness:
        api = service(sqlite)
        cell = api.add_cell(durable(vhost.url))
        traffic = Traffic(api, cell, THREADS)
        for number in range(restarts):
            # It is back, and used, before it goes again.
            traffic.wait_for(3 * THREADS)
            with breaks.one():
                (stop if number % 2 else kill)(private_broker)
            start(private_broker)
        traffic.wait_for(3 * THREADS)
        outcomes = traffic.stop()
        stack.eventually(lambda: not api.guard(cell).under_way, within=SOON)
        assert contradictions(outcomes, witness.arrived()) == []
        assert breaks.needless(outcomes) == []
        assert max(o.seconds for o in outcomes) <= SOON
        assert api.guard(cell).stuck == 0
        stats = api.process.pool.stats()
        assert (stats.leases, stats.total.open) == (0, 1)
        api.close()
    stack.eventually(lambda: descriptors() <= files, within=SOON)
    stack.eventually(lambda: threading.active_count() <= threads, within=SOON)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
