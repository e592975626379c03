# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The transport of a cell that belongs to no request; no I/O."""

from __future__ import annotations

import copy
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import oslo_messaging
import pytest
from oslo_messaging.transport import RPCTransport

from cellmw import exceptions
from cellmw.cells.mapping import Cell
from cellmw.transports.handle import CellTransport, runtime_id_of
from tests.fakes import (
    PASSWORD,
    Gate,
    Stack,
    Threads,
    call,
    cast,
    cell_uuid,
    generation,
    in_child,
)


@pytest.fixture(params=[16, 0], ids=["cached", "uncached"])
def stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    with Stack(max_size=request.param) as stack:
        stack.put(1)
        yield stack


@pytest.fixture
def transport(stack: Stack) -> CellTransport:
    return CellTransport(stack.here, cell_uuid(1))


def states(stack: Stack) -> list[str]:
    """The generations that messages went out with."""
    return [
        one.generation.url.reveal().rpartition("/")[2]
        for one in stack.transports.opened
        for _ in one.sent
    ]


def test_each_message_leases_and_releases(
    stack: Stack, transport: CellTransport
) -> None:
    leases = []
    stack.transports.on_send = lambda one, sent: leases.append(
        stack.stats.leases
    )
    for number in range(1, 4):
        cast(transport)
        assert len(stack.transports.sent) == number
        assert stack.stats.leases == 0
    assert min(leases) >= 1
    assert stack.transports.count == (1 if stack.cached else 3)


def test_a_reply_comes_back(stack: Stack, transport: CellTransport) -> None:
    stack.transports.on_send = lambda one, sent: sent.message["method"]
    assert call(transport, method="what") == "what"


def test_a_call_without_a_timeout_has_the_configured_one(
    stack: Stack, transport: CellTransport
) -> None:
    oslo_messaging.get_rpc_client(
        transport, oslo_messaging.Target(topic="compute")
    )
    call(transport, timeout=None)
    assert stack.transports.sent[0].options["timeout"] == 60


def test_the_next_message_follows_the_mapping(
    stack: Stack, transport: CellTransport
) -> None:
    cast(transport)
    stack.put(1, state=1)
    stack.keep_only()
    cast(transport)
    assert states(stack) == ["state-0", "state-1"]
    assert stack.open_cells() == ([1] if stack.cached else [])


def test_a_message_in_flight_stays_with_its_generation(
    stack: Stack, transport: CellTransport
) -> None:
    gate = Gate()
    stack.transports.on_send = lambda one, sent: (
        gate.wait() if sent.message["method"] == "held" else None
    )
    with Threads() as threads:
        threads.start(lambda: cast(transport, method="held"))
        gate.await_arrival()
        stack.put(1, state=1)
        stack.keep_only()
        cast(transport)
        held = stack.transports.opened[0]
        closed_at_first = held.closed
        gate.open()
    stack.settle()
    assert (closed_at_first, held.closed) == (0, 1)
    assert states(stack) == ["state-0", "state-1"]


def test_a_failure_counts_for_the_cell(
    stack: Stack, transport: CellTransport
) -> None:
    def fail(*_: object) -> None:
        raise ConnectionResetError("gone")

    stack.transports.before_writing = fail
    for _ in range(5):
        with pytest.raises(exceptions.CellUnavailable):
            cast(transport)
    attempts = stack.transports.attempts
    with pytest.raises(exceptions.CellUnavailable, match="marked down"):
        cast(transport)
    assert stack.transports.attempts == attempts


@pytest.mark.parametrize(
    "kind", [exceptions.CellHasNoQueue, exceptions.CellMisconfigured]
)
def test_a_cell_that_cannot_be_sent_to_refuses(
    stack: Stack,
    transport: CellTransport,
    kind: type[exceptions.SendError],
) -> None:
    uuid = cell_uuid(1)
    stack.cells[uuid] = Cell(uuid, "one", refusal=(kind, "why"))
    with pytest.raises(kind) as caught:
        cast(transport)
    assert caught.value.cell_uuid == uuid
    assert not caught.value.maybe_delivered
    assert stack.transports.attempts == 0
    assert not len(stack.workers)
    # It refuses for as long as the mapping is so, and no longer.
    stack.put(1)
    cast(transport)
    assert stack.transports.count == 1


def test_it_is_never_released(stack: Stack, transport: CellTransport) -> None:
    transport.cleanup()
    transport.cleanup()
    cast(transport)
    assert len(stack.transports.sent) == 1


def test_an_application_that_ends_its_thread_leaves_no_lease(
    stack: Stack, transport: CellTransport
) -> None:
    def interrupt(*_: object) -> None:
        raise SystemExit

    stack.guards.admit = interrupt  # type: ignore[method-assign, assignment]
    with pytest.raises(SystemExit):
        cast(transport)
    assert stack.stats.leases == 0


def test_each_process_sends_with_its_own_state(
    stack: Stack, transport: CellTransport
) -> None:
    parent = os.getpid()
    others: list[Stack] = []

    def here() -> Stack:
        if os.getpid() == parent:
            return stack
        if not others:
            others.append(Stack())
            others[0].put(1)
        return others[0]

    shared = CellTransport(here, cell_uuid(1))
    cast(shared)

    def child() -> tuple[int, int]:
        cast(shared)
        return len(others[0].transports.sent), len(stack.transports.sent)

    assert in_child(child) == (1, 1)
    cast(shared)
    assert len(stack.transports.sent) == 2


@pytest.mark.parametrize(
    "look",
    [
        bool,
        repr,
        hash,
        copy.copy,
        copy.deepcopy,
        lambda transport: transport.conf,
        lambda transport: transport.cleanup(),
        dir,
    ],
)
def test_looking_at_it_opens_nothing(
    stack: Stack,
    transport: CellTransport,
    look: Callable[[CellTransport], object],
) -> None:
    before = threading.active_count()
    look(transport)
    assert stack.transports.attempts == 0
    assert threading.active_count() == before


def test_copies_are_itself(transport: CellTransport) -> None:
    assert isinstance(transport, RPCTransport)
    assert copy.copy(transport) is transport
    assert copy.deepcopy({"cache": [transport]})["cache"][0] is transport
    assert transport == copy.copy(transport)


def test_it_cannot_be_pickled(transport: CellTransport) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match="no pickling"):
            pickle.dumps(transport, protocol)


def test_it_shows_its_cell_and_no_secret(
    stack: Stack, transport: CellTransport
) -> None:
    cast(transport)
    shown = f"{transport!r} {transport} {vars(transport)}"
    assert cell_uuid(1) in shown
    assert PASSWORD in generation(1).url.reveal()
    assert PASSWORD not in shown


def test_it_tells_its_runtime(transport: CellTransport) -> None:
    assert runtime_id_of(transport) == Stack.runtime_id


@pytest.mark.parametrize(
    "use",
    [
        lambda transport: transport._driver,
        lambda transport: transport._listen(None, 1, None),
        lambda transport: transport._send_notification(None, {}, {}, 2.0),
        lambda transport: transport._require_driver_features(requeue=True),
    ],
)
def test_it_only_sends(
    transport: CellTransport, use: Callable[[Any], object]
) -> None:
    with pytest.raises(exceptions.SendOnly) as caught:
        use(transport)
    assert caught.value.cell_uuid == cell_uuid(1)


def test_what_is_not_sending_leaves_a_trace(
    transport: CellTransport, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(exceptions.SendOnly):
        transport._listen(None, 1, None)
    assert f"reason send_only: cell {cell_uuid(1)}" in caplog.text


def test_a_target_without_a_topic_is_the_callers_mistake(
    stack: Stack, transport: CellTransport
) -> None:
    with pytest.raises(oslo_messaging.InvalidTarget):
        transport._send(oslo_messaging.Target(), {}, {"method": "ping"})
    assert stack.transports.attempts == 0
