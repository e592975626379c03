# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""S12: fifty cells hang at once, and the others do not notice.

A message that hangs can keep a thread of the package beyond its request.  The
limit of each cell does not bound those of all cells together; that of the
process does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
import time
from collections.abc import Iterator

import pytest

from tests import servers
from tests.faults.service import SLACK, SOON, Inbox, Outcome, Service, durable
from tests.functional import stack

pytestmark = [pytest.mark.servers, pytest.mark.leaves_sockets_to_gc]

HANGING, HEALTHY = 50, 5
REQUESTS = 64
STUCK = 80
SECONDS = 6.0
# Those that ask the API database and close transports, among others.
OTHERS = 40


@dataclasses.dataclass(frozen=True)
class Cells:
    """The cells by their UUIDs, and where the healthy ones' messages go."""

    hanging: list[str]
    healthy: list[str]
    inbox: Inbox


@pytest.fixture
def api(sqlite: servers.Database) -> Iterator[Service]:
    """No cell is marked down: each message meets its broker."""
    with contextlib.closing(
        Service(
            sqlite,
            send_timeout=1.0,
            breaker_failures=0,
            max_stuck_sends=STUCK,
        )
    ) as made:
        yield made


@pytest.fixture
def cells(
    api: Service,
    vhost: servers.Vhost,
    private_broker: servers.PrivateBroker,
) -> Iterator[Cells]:
    with private_broker.vhost() as hanging:
        inbox = Inbox(vhost.url)
        made = Cells(
            [
                api.add_cell(durable(hanging.url), name=f"hanging-{number}")
                for number in range(HANGING)
            ],
            [
                api.add_cell(durable(vhost.url), name=f"healthy-{number}")
                for number in range(HEALTHY)
            ],
            inbox,
        )
        Inbox(hanging.url)
        # Half of them have been used; the others hang while connecting.
        for cell in [*made.hanging[::2], *made.healthy]:
            assert api.send_one(cell).error is None
        assert len(inbox.numbers()) == HEALTHY
        yield made
        private_broker.heal()


class Requests:
    """Threads that serve requests for all cells in turn."""

    def __init__(self, api: Service, cells: list[str]) -> None:
        self._api = api
        self._cells = itertools.cycle(cells)
        self._over = threading.Event()
        self.outcomes: dict[str, list[Outcome]] = {cell: [] for cell in cells}
        self._threads = [
            threading.Thread(target=self._run) for _ in range(REQUESTS)
        ]

    def _run(self) -> None:
        while not self._over.is_set():
            cell = next(self._cells)
            self.outcomes[cell].append(self._api.send_one(cell))

    def run(self, seconds: float) -> int:
        """Serve for a while; the most threads there were meanwhile."""
        for thread in self._threads:
            thread.start()
        most = 0
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            most = max(most, sum(map(_counts, threading.enumerate())))
            self._over.wait(0.02)
        self._over.set()
        for thread in self._threads:
            thread.join()
        return most


def _counts(thread: threading.Thread) -> bool:
    """Each connection of the driver has a thread of its own for heartbeats."""
    return "heartbeat" not in thread.name


def test_s12_fifty_cells_hang_at_once(
    api: Service, cells: Cells, private_broker: servers.PrivateBroker
) -> None:
    before = sum(map(_counts, threading.enumerate()))
    requests = Requests(api, [*cells.hanging, *cells.healthy])
    private_broker.pause()
    most = requests.run(SECONDS)
    # The requests' own threads, those that are stuck, and one for each
    # message that is under way and not stuck yet.
    assert most <= before + 2 * REQUESTS + STUCK + OTHERS
    numbers = set()
    for cell in cells.healthy:
        outcomes = requests.outcomes[cell]
        assert len(outcomes) > SECONDS
        assert {o.kind for o in outcomes} == {"delivered"}
        assert max(o.seconds for o in outcomes) <= 1.0 + SLACK
        numbers |= {outcome.number for outcome in outcomes}
    assert set(cells.inbox.numbers()) == numbers
    for cell in cells.hanging:
        outcomes = requests.outcomes[cell]
        assert "delivered" not in {o.kind for o in outcomes}
        assert max(o.seconds for o in outcomes) <= 1.0 + SLACK
    private_broker.resume()
    stack.eventually(
        lambda: not any(api.guard(cell).under_way for cell in cells.hanging),
        within=SOON,
    )
    assert {api.send_one(cell).kind for cell in cells.hanging} == {"delivered"}
