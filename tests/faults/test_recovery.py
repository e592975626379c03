# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""After an outage a cell is back soon, at the price of few messages."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from cellmw import exceptions
from tests import servers
from tests.faults.service import (
    SLACK,
    SOON,
    Inbox,
    Outcome,
    Service,
    check_error,
    check_messages,
    durable,
)
from tests.faults.traffic import at_once
from tests.functional import stack
from tests.proxy import Proxy

pytestmark = [pytest.mark.servers, pytest.mark.leaves_sockets_to_gc]

Break = Callable[[servers.PrivateBroker, Proxy], None]


@pytest.fixture
def api(
    request: pytest.FixtureRequest, sqlite: servers.Database
) -> Iterator[Service]:
    """The service; its options may be a parameter."""
    made = Service(sqlite, **getattr(request, "param", {}))
    yield made
    made.close()


def refuse(broker: servers.PrivateBroker, proxy: Proxy) -> None:
    proxy.refuse()


def swallow(broker: servers.PrivateBroker, proxy: Proxy) -> None:
    proxy.swallow()


def pause(broker: servers.PrivateBroker, proxy: Proxy) -> None:
    broker.pause()


def alarm(broker: servers.PrivateBroker, proxy: Proxy) -> None:
    broker.raise_memory_alarm()


def kill(broker: servers.PrivateBroker, proxy: Proxy) -> None:
    broker.kill()


def send_until_delivered(
    api: Service, cell: str, kind: str, within: float
) -> list[Outcome]:
    """Send as clients do that are refused; it gets through in time."""
    deadline = time.monotonic() + within
    outcomes = [api.send_one(cell, kind)]
    while outcomes[-1].kind != "delivered":
        assert time.monotonic() < deadline, outcomes[-1]
        time.sleep(0.05)
        outcomes.append(api.send_one(cell, kind))
    return outcomes


@pytest.mark.parametrize(
    "breaks,kind",
    [
        (refuse, "cast"),
        (refuse, "call"),
        (swallow, "cast"),
        (swallow, "call"),
        (pause, "cast"),
        (alarm, "call"),
        (kill, "cast"),
    ],
)
@pytest.mark.parametrize(
    "api",
    [{"send_timeout": 1.0, "breaker_reset_after": 2.0}],
    indirect=True,
    ids=[""],
)
def test_a_cell_is_back_when_its_next_trial_is(
    api: Service,
    private_broker: servers.PrivateBroker,
    make_proxy: Callable[[str], Proxy],
    breaks: Break,
    kind: str,
) -> None:
    with private_broker.vhost() as vhost:
        proxy = make_proxy(vhost.url)
        inbox = Inbox(vhost.url)
        cell = api.add_cell(durable(vhost.url_via(proxy.address)))
        # Some connections, all of which die.
        outcomes = at_once(6, lambda: api.send_one(cell, "call", timeout=0.5))
        assert all(outcome.kind == "delivered" for outcome in outcomes)
        breaks(private_broker, proxy)
        while not api.guard(cell).down:
            outcomes.append(api.send_one(cell, kind))
        # A trial or two find it down still.
        until = time.monotonic() + 2.5
        while time.monotonic() < until:
            outcomes.append(api.send_one(cell, kind))
            time.sleep(0.05)
        private_broker.heal()
        proxy.restore()
        # A trial that was under way as it came back may fail; the next one
        # is due so much later.
        within = api.send_timeout + 2.0 + SLACK
        outcomes += send_until_delivered(api, cell, kind, within)
        assert not api.guard(cell).down
        last = api.send_one(cell)
        assert last.error is None
        # Whoever is stuck yet is so in what the network has lost.
        proxy.cut()
        stack.eventually(lambda: not api.guard(cell).under_way, within=SOON)
        check_messages([*outcomes, last], inbox.numbers())


class LongRequest(threading.Thread):
    """A request that has sent one message, and sends another when told."""

    def __init__(self, api: Service, cell: str) -> None:
        super().__init__()
        self._api, self._cell = api, cell
        self.has_sent = threading.Event()
        self._go_on = threading.Event()
        self.outcomes: list[Outcome] = []

    def run(self) -> None:
        self.outcomes = self._api.send(
            self._cell, times=2, between=self._pause
        )

    def _pause(self) -> None:
        self.has_sent.set()
        self._go_on.wait(60)

    def finish(self) -> Outcome:
        self._go_on.set()
        self.join()
        return self.outcomes[1]


def test_connections_that_are_cut_cost_no_message(
    api: Service,
    private_broker: servers.PrivateBroker,
    make_proxy: Callable[[str], Proxy],
) -> None:
    with private_broker.vhost() as vhost:
        proxy = make_proxy(vhost.url)
        inbox = Inbox(vhost.url)
        cell = api.add_cell(durable(vhost.url_via(proxy.address)))
        proxy.delay(0.02)
        requests = [LongRequest(api, cell) for _ in range(6)]
        for request in requests:
            request.start()
        for request in requests:
            assert request.has_sent.wait(SOON)
        # Several connections, of one transport that all these have leased.
        assert proxy.open > 1
        proxy.restore()
        proxy.cut()
        # None of these was under way.
        outcomes = [request.finish() for request in requests]
        outcomes += [api.send_one(cell) for _ in range(6)]
        assert {outcome.kind for outcome in outcomes} == {"delivered"}
        assert proxy.accepted > 6
        arrived = inbox.numbers()
        assert {o.number for o in outcomes} <= set(arrived)
        assert len(arrived) == len(set(arrived))
        assert api.process.pool.stats().total.open == 1


# Credentials that change


@pytest.fixture
def secured(
    broker: servers.Broker,
) -> Iterator[tuple[servers.Vhost, str, str]]:
    """A vhost with a user of its own; and that user's password."""
    password = "first-p4ssw0rd"
    with (
        broker.new_user(password) as user,
        broker.vhost(user=user, password=password) as vhost,
    ):
        yield vhost, user, password


def change_password(
    api: Service, cell: str, vhost: servers.Vhost, user: str, password: str
) -> None:
    """On the broker and in the API database; nobody is told."""
    vhost.broker.ctl("change_password", user, password)
    url = vhost.broker.url(vhost.name, user=user, password=password)
    api.database.change_cell(cell, transport_url=durable(url))
    # A connection that is open stays so.
    vhost.close_connections()


without_refresh = pytest.mark.parametrize(
    "api",
    # Only what is refused can lead to a new reading of the mappings.
    [{"cell_refresh_interval": 3600, "send_timeout": 10.0}],
    indirect=True,
    ids=[""],
)


@without_refresh
@pytest.mark.parametrize("kind", ["cast", "call"])
def test_a_refused_message_goes_out_with_the_new_password(
    api: Service, secured: tuple[servers.Vhost, str, str], kind: str
) -> None:
    vhost, user, _ = secured
    inbox = Inbox(vhost.broker.url(vhost.name))
    cell = api.add_cell(durable(vhost.url))
    assert api.send_one(cell).error is None
    change_password(api, cell, vhost, user, "second-p4ssw0rd")
    queries = api.process.directory.stats().queries
    # It finds the connection gone, and is refused another one.
    outcome = api.send_one(cell, kind)
    assert outcome.kind == "delivered"
    stats = api.guard(cell)
    assert (stats.failed, stats.failures) == (0, 0)
    # The instance, for a POST asks each time, and the mappings once more.
    assert api.process.directory.stats().queries == queries + 2
    assert api.send_one(cell).error is None
    # A call that nobody reads in time is thrown away by the broker.
    assert len(inbox.numbers()) == (3 if kind == "cast" else 2)
    # One with each password.
    assert api.process.pool.stats().total.opened == 2


@without_refresh
def test_a_request_that_has_sent_stays_with_the_old_password(
    api: Service, secured: tuple[servers.Vhost, str, str]
) -> None:
    vhost, user, _ = secured
    inbox = Inbox(vhost.broker.url(vhost.name))
    cell = api.add_cell(durable(vhost.url))

    changes = iter([True, False])

    def change() -> None:
        if next(changes):
            change_password(api, cell, vhost, user, "second-p4ssw0rd")

    sent, *refused = api.send(cell, times=3, between=change)
    assert sent.kind == "delivered"
    for outcome in refused:
        check_error(
            outcome,
            exceptions.CellUnavailable,
            cell,
            ("first-p4ssw0rd", "second-p4ssw0rd"),
        )
    assert api.send_one(cell).error is None
    assert len(inbox.numbers()) == 2


@without_refresh
def test_a_password_that_is_wrong_everywhere_is_read_once_a_message(
    api: Service, secured: tuple[servers.Vhost, str, str]
) -> None:
    vhost, user, _ = secured
    cell = api.add_cell(durable(vhost.url))
    vhost.broker.ctl("change_password", user, "second-p4ssw0rd")
    outcome = api.send_one(cell)
    check_error(
        outcome,
        exceptions.CellUnavailable,
        cell,
        ("first-p4ssw0rd", "second-p4ssw0rd"),
    )
    assert "AccessRefused" in str(outcome.error)
    # The mappings, the instance, and the mappings once more.
    assert api.process.directory.stats().queries == 3
    assert api.process.pool.stats().total.opened == 1
