# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Whatever state a cell's broker is in, nobody is held, or told wrong.

Each state is met by a message on a transport that is new and by one on a
transport that has been used, as a cast and as a call, through our client and
through a plain one of oslo.messaging.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator

import oslo_messaging
import pytest

from cellmw import exceptions
from tests import servers
from tests.faults import service
from tests.faults.service import (
    CLIENTS,
    SLACK,
    SOON,
    Client,
    Inbox,
    Outcome,
    Service,
    check_error,
    check_messages,
    durable,
)
from tests.functional import stack
from tests.proxy import Proxy

pytestmark = [pytest.mark.servers, pytest.mark.leaves_sockets_to_gc]

# So long that the driver, which uses it for the socket too, does not end the
# wait before we do; and a thread that gets through at last waits this long.
REPLY = 5.0
PASSWORD = "s3cr3t-p4ssw0rd"

Uncertain = exceptions.DeliveryUncertain
Unavailable = exceptions.CellUnavailable


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell with a broker of its own behind a proxy."""

    broker: servers.PrivateBroker
    proxy: Proxy
    vhost: servers.Vhost
    uuid: str
    inbox: Inbox


@pytest.fixture
def api(
    request: pytest.FixtureRequest, sqlite: servers.Database
) -> Iterator[Service]:
    """The service; its options may be a parameter."""
    made = Service(sqlite, **getattr(request, "param", {}))
    yield made
    made.close()


@pytest.fixture
def cell(
    private_broker: servers.PrivateBroker,
    make_proxy: Callable[[str], Proxy],
    api: Service,
) -> Iterator[Cell]:
    with private_broker.vhost() as vhost:
        proxy = make_proxy(vhost.url)
        inbox = Inbox(vhost.url)
        uuid = api.add_cell(durable(vhost.url_via(proxy.address)))
        yield Cell(private_broker, proxy, vhost, uuid, inbox)
        # Whatever the test did: its threads are to end.
        private_broker.heal()
        proxy.restore()
        proxy.cut()


@pytest.fixture(params=["ours", "plain"])
def client(request: pytest.FixtureRequest) -> Client:
    return CLIENTS[request.param]


def refuse(cell: Cell) -> None:
    cell.proxy.refuse()


def swallow(cell: Cell) -> None:
    cell.proxy.swallow()


def pause(cell: Cell) -> None:
    cell.broker.pause()


def alarm(cell: Cell) -> None:
    cell.broker.raise_memory_alarm()


def heal(cell: Cell) -> None:
    cell.broker.heal()
    cell.proxy.restore()


def nothing_is_stuck(api: Service, cell: Cell) -> None:
    stack.eventually(lambda: api.guard(cell.uuid).under_way == 0, within=SOON)
    assert api.guard(cell.uuid).stuck == 0


def of_each_kind(api: Service, cell: Cell) -> list[Outcome]:
    """A cast and a call through each client, at once."""
    outcomes: list[Outcome] = []

    def send(kind: str, client: Client) -> None:
        outcomes.append(api.send_one(cell.uuid, kind, client, timeout=REPLY))

    threads = [
        threading.Thread(target=send, args=(kind, client))
        for kind in ("cast", "call")
        for client in CLIENTS.values()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 4
    return outcomes


# Takes no cell as down: each message meets the broker.
without_breaker = pytest.mark.parametrize(
    "api", [{"breaker_failures": 0}], indirect=True, ids=["no breaker"]
)


@without_breaker
@pytest.mark.parametrize(
    "breaks,error,stuck",
    [
        (refuse, Unavailable, 0),
        # Opening may take longer than the message may be waited for.
        (swallow, Unavailable, 4),
        (pause, Unavailable, 4),
        (alarm, Uncertain, 0),
    ],
)
def test_a_new_transport_to_a_broker_in_trouble(
    api: Service,
    cell: Cell,
    breaks: Callable[[Cell], None],
    error: type[exceptions.SendError],
    stuck: int,
) -> None:
    breaks(cell)
    outcomes = of_each_kind(api, cell)
    for outcome in outcomes:
        check_error(outcome, error, cell.uuid, ("guest:guest",))
        assert outcome.seconds <= api.send_timeout + SLACK
    stats = api.guard(cell.uuid)
    assert stats.failures == 4
    if breaks is not refuse:
        shortest = min(outcome.seconds for outcome in outcomes)
        assert shortest >= api.send_timeout * 0.95
    assert stats.stuck == stuck
    # But not for ever, though nothing is mended.
    nothing_is_stuck(api, cell)
    heal(cell)
    again = api.send_one(cell.uuid)
    assert again.error is None
    check_messages([*outcomes, again], cell.inbox.numbers())
    # One to send with for each message, one for replies, one for each retry.
    assert cell.proxy.accepted <= 2 * len(outcomes) + 2


@without_breaker
@pytest.mark.parametrize("breaks", [refuse, swallow, pause, alarm])
def test_a_used_transport_to_a_broker_in_trouble(
    api: Service, cell: Cell, breaks: Callable[[Cell], None]
) -> None:
    before = [api.send_one(cell.uuid), api.send_one(cell.uuid, "call")]
    breaks(cell)
    # The first has the connection that there is.
    outcomes = [api.send_one(cell.uuid, "call", timeout=REPLY)]
    # That it was cut is seen before anything is written.
    error = Unavailable if breaks is refuse else Uncertain
    check_error(outcomes[0], error, cell.uuid, ("guest:guest",))
    outcomes += of_each_kind(api, cell)
    for outcome in outcomes:
        assert outcome.error is not None
        assert outcome.seconds <= api.send_timeout + SLACK
    heal(cell)
    if breaks is swallow:
        # What was swallowed is lost to a connection that is being opened.
        cell.proxy.cut()
    nothing_is_stuck(api, cell)
    again = api.send_one(cell.uuid)
    assert again.error is None
    check_messages([*before, *outcomes, again], cell.inbox.numbers())


def test_what_a_blocked_broker_took_at_last_arrives_once(
    api: Service, cell: Cell
) -> None:
    alarm(cell)
    outcomes = [api.send_one(cell.uuid) for _ in range(3)]
    assert [outcome.kind for outcome in outcomes] == ["uncertain"] * 3
    assert api.guard(cell.uuid).stuck == 0
    assert api.guard(cell.uuid).down
    refused = api.send_one(cell.uuid)
    check_error(refused, Unavailable, cell.uuid, ())
    assert refused.seconds < api.send_timeout / 2
    cell.broker.clear_memory_alarm()
    nothing_is_stuck(api, cell)
    check_messages([*outcomes, refused], cell.inbox.numbers())


def test_a_message_given_up_before_it_was_written_never_is(
    api: Service, cell: Cell
) -> None:
    # Three are at connecting when their requests give up, and get through
    # afterwards.
    cell.proxy.delay(0.4)
    outcomes = [api.send_one(cell.uuid) for _ in range(3)]
    assert [outcome.kind for outcome in outcomes] == ["not delivered"] * 3
    assert api.guard(cell.uuid).stuck > 0
    cell.proxy.restore()
    nothing_is_stuck(api, cell)
    assert cell.inbox.numbers() == []
    # What was opened too late for its message is not opened again for it.
    assert cell.proxy.accepted <= len(outcomes)


def test_a_confirmation_that_is_lost_makes_no_second_message(
    api: Service, cell: Cell
) -> None:
    api.send_one(cell.uuid)
    assert len(cell.inbox.numbers()) == 1
    cell.proxy.swallow("to_client")
    outcomes: list[Outcome] = []
    thread = threading.Thread(
        target=lambda: outcomes.append(api.send_one(cell.uuid))
    )
    thread.start()
    arrived = cell.inbox.wait_for(1)
    # It dies in the middle of publishing.
    cell.proxy.restore()
    cell.proxy.cut()
    thread.join()
    assert outcomes[0].kind == "uncertain"
    assert outcomes[0].seconds < api.send_timeout
    assert arrived == [outcomes[0].number]
    assert cell.inbox.numbers() == []


def test_a_broker_that_dies_in_the_middle_of_a_call(
    api: Service, cell: Cell, client: Client
) -> None:
    api.send_one(cell.uuid, "call")
    outcomes: list[Outcome] = []
    thread = threading.Thread(
        target=lambda: outcomes.append(
            api.send_one(cell.uuid, "call", client, timeout=2.0)
        )
    )
    cell.inbox.numbers()
    thread.start()
    cell.inbox.wait_for(1)
    cell.proxy.refuse()
    thread.join()
    # It was delivered: a reply that does not come is not the cell's fault.
    assert isinstance(outcomes[0].error, oslo_messaging.MessagingTimeout)
    assert outcomes[0].seconds <= api.send_timeout + 2.0 + SLACK
    assert api.guard(cell.uuid).failures == 0
    heal(cell)
    nothing_is_stuck(api, cell)


def test_a_reply_is_awaited_beyond_the_send_timeout(
    api: Service, cell: Cell, client: Client
) -> None:
    outcome = api.send_one(
        cell.uuid, "call", client, timeout=2 * api.send_timeout
    )
    assert isinstance(outcome.error, oslo_messaging.MessagingTimeout)
    assert outcome.seconds >= 2 * api.send_timeout
    assert outcome.seconds <= 3 * api.send_timeout + SLACK
    stats = api.guard(cell.uuid)
    assert (stats.sent, stats.failed, stats.stuck) == (1, 0, 0)
    assert sum(stats.calls.counts) == 1
    assert stats.calls.total >= 2 * api.send_timeout


def test_a_call_that_waits_is_a_trial_that_arrived(
    api: Service, cell: Cell
) -> None:
    refuse(cell)
    for _ in range(3):
        api.send_one(cell.uuid)
    assert api.guard(cell.uuid).down
    heal(cell)
    time.sleep(api.guard(cell.uuid).retry_after)
    thread = threading.Thread(
        target=api.send_one, args=(cell.uuid, "call"), kwargs={"timeout": 4.0}
    )
    thread.start()
    stack.eventually(lambda: not api.guard(cell.uuid).down)
    assert thread.is_alive()
    assert api.guard(cell.uuid).under_way == 0
    assert api.send_one(cell.uuid).error is None
    thread.join()


def test_a_broker_gone_between_two_messages_of_a_request(
    api: Service, cell: Cell, client: Client
) -> None:
    outcomes = api.send(
        cell.uuid, client=client, times=4, between=cell.proxy.cut
    )
    kinds = [outcome.kind for outcome in outcomes]
    assert kinds == ["delivered"] * 4
    check_messages(outcomes, cell.inbox.numbers())


@pytest.mark.parametrize(
    "api", [{"send_timeout": 20.0}], indirect=True, ids=[""]
)
@pytest.mark.parametrize("what", ["password", "vhost", "port"])
def test_who_is_not_let_in_is_told_so_at_once(
    api: Service,
    private_broker: servers.PrivateBroker,
    client: Client,
    what: str,
) -> None:
    if what == "password":
        url = private_broker.url("/", password=PASSWORD)
    elif what == "vhost":
        url = private_broker.url(service.unique_name())
    else:
        url = f"rabbit://user:{PASSWORD}@127.0.0.1:{servers.free_port()}/"
    cell = api.add_cell(url)
    for kind in ("cast", "call", "cast"):
        outcome = api.send_one(cell, kind, client)
        check_error(outcome, Unavailable, cell, (PASSWORD, "guest:guest"))
        assert outcome.seconds < api.send_timeout / 2
    assert api.guard(cell).down
    assert api.process.pool.stats().leases == 0


@pytest.mark.parametrize(
    "api", [{"breaker_reset_after": 12.5}], indirect=True, ids=[""]
)
def test_an_error_that_is_let_through_becomes_a_fault(
    api: Service, cell: Cell
) -> None:
    refuse(cell)

    def handler(context: object) -> None:
        service.our_client(context).cast(context, "reboot_instance", number=0)

    response = api.request(cell.uuid, handler)
    assert response.status_int == 503
    assert response.headers["Retry-After"] == "1"
    fault = response.json_body["serviceUnavailable"]
    assert fault["code"] == 503
    assert fault["message"]
    for _ in range(2):
        api.send_one(cell.uuid)
    response = api.request(cell.uuid, handler)
    assert response.status_int == 503
    assert response.headers["Retry-After"] == "13"
