# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""One message's way to a queue, and a request's hold on it; no I/O."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import amqp.exceptions
import kombu.exceptions
import oslo_messaging
import pytest
from oslo_config import cfg

from cellmw import exceptions
from cellmw.cells.mapping import Cell, Generation
from cellmw.transports.driver import Reporting, Verdict, under_way
from cellmw.transports.driver.wire import Expired
from cellmw.transports.handle import RequestLease
from cellmw.transports.pool import Lease
from cellmw.transports.sending import OtherGeneration, Sending
from cellmw.workers import Job, Workers
from tests.fakes import (
    PASSWORD,
    PATIENCE,
    Gate,
    Sent,
    Silent,
    Stack,
    Threads,
    Transport,
    call,
    cast,
    cell_uuid,
    generation,
    message,
    send,
)

TARGET = oslo_messaging.Target(
    topic="compute", server="host", exchange="e", namespace="n", version="6.0"
)


@pytest.fixture(params=["cached", "uncached", "ready"])
def stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    max_size = 0 if request.param == "uncached" else 16
    with Stack(max_size=max_size, ready=request.param == "ready") as stack:
        stack.put(1)
        yield stack


@pytest.fixture
def hasty() -> Iterator[Stack]:
    """One whose requests soon give up."""
    with Stack(send_timeout=0.25) as stack:
        stack.put(1)
        yield stack


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    """A gate; for a request whose worker stands at it, delivering has taken
    too long.

    Not before and not later, however fast the machine is.
    """
    gate = Gate()
    real = Job.wait
    late: set[Job] = set()

    def wait(job: Job, timeout: float | None = None) -> bool:
        if job in late:
            # It has been delivered, and now waits for the reply.
            return real(job, timeout)
        late.add(job)
        _until(lambda: job.done or job.thread_id in gate.held)
        return real(job, 0)

    monkeypatch.setattr(Job, "wait", wait)
    return gate


# What is sent.


def test_a_message_goes_out_as_it_was_given_but_once(stack: Stack) -> None:
    given = message("boot")
    options = oslo_messaging.TransportOptions(at_least_once=True)

    def write(one: Transport, sent: Sent) -> None:
        sent.message["_unique_id"] = "the driver's"

    stack.transports.on_send = write
    with stack.handle() as handle:
        handle._send(
            TARGET,
            {"user": "u"},
            given,
            wait_for_reply=True,
            timeout=7,
            call_monitor_timeout=3,
            retry=5,
            transport_options=options,
        )
    (sent,) = stack.transports.sent
    assert given == message("boot")
    assert sent.context == {"user": "u"}
    assert sent.options == {
        "wait_for_reply": True,
        "timeout": 7,
        "call_monitor_timeout": 3,
        "retry": 0,
        "transport_options": options,
    }
    for name in (
        "exchange",
        "topic",
        "namespace",
        "version",
        "server",
        "fanout",
        "accepted_namespaces",
    ):
        assert getattr(sent.target, name) == getattr(TARGET, name)


def test_a_call_gives_the_reply(stack: Stack) -> None:
    stack.transports.on_send = lambda one, sent: {"answer": 42}
    with stack.handle() as handle:
        assert call(handle) == {"answer": 42}
        assert cast(handle) == {"answer": 42}  # whatever the driver gives


def test_a_call_waits_as_long_as_configured(stack: Stack) -> None:
    with stack.handle() as handle:
        stack.conf.register_opt(
            _option("rpc_response_timeout", 17), group=None
        )
        call(handle, timeout=None)
        cast(handle)
    assert [one.options["timeout"] for one in stack.transports.sent] == [
        17,
        None,
    ]


# Who sends it.


@pytest.fixture
def senders(stack: Stack) -> list[str]:
    """In which thread each message was written."""
    found: list[str] = []
    here = threading.current_thread()

    def note(one: Transport, sent: Sent) -> None:
        thread = threading.current_thread()
        found.append("here" if thread is here else thread.name[:13])

    stack.transports.on_send = note
    return found


def test_the_thread_of_the_request_sends_where_all_is_open(
    stack: Stack, senders: list[str]
) -> None:
    with stack.handle() as handle:
        cast(handle)
        cast(handle)
        call(handle)
    with stack.handle() as handle:
        cast(handle)
    here = "here" if stack.ready else "cellmw-worker"
    assert senders == ["cellmw-worker", here, here, here]


@pytest.mark.parametrize("stack", ["ready"], indirect=True)
def test_a_worker_sends_where_something_would_be_waited_for(
    stack: Stack, senders: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with stack.handle() as handle:
        cast(handle)
    # The database would have to be asked for the cell.
    unknown = RequestLease(
        stack.pool, lambda: stack.cells[cell_uuid(1)], lambda: None
    )
    monkeypatch.setattr(stack, "borrower", lambda of: unknown)
    with stack.handle() as handle:
        cast(handle)
        cast(handle)
    # A connection would have to be opened.
    stack.transports.opened[0]._driver = Reporting()
    with stack.handle() as handle:
        cast(handle)
    assert senders == ["cellmw-worker"] * 2 + ["here", "cellmw-worker"]


@pytest.mark.parametrize("stack", ["ready"], indirect=True)
def test_a_transport_that_is_being_opened_is_not_waited_for_here(
    stack: Stack, senders: list[str]
) -> None:
    gate = Gate()
    stack.transports.on_open = gate.wait
    with stack.handle() as handle, Threads() as threads:
        threads.start(lambda: stack.acquire().release())
        gate.await_arrival()
        assert stack.borrower(stack.cells[cell_uuid(1)]).lease_now() is None
        gate.open()
        threads.join()
        cast(handle)
    assert senders == ["here"]


@pytest.mark.parametrize("stack", ["ready"], indirect=True)
@pytest.mark.parametrize(
    "error", [OSError("reset"), amqp.exceptions.AccessRefused("no")]
)
def test_what_was_not_written_here_a_worker_tries_once_more(
    stack: Stack, senders: list[str], error: Exception
) -> None:
    with stack.handle() as handle:
        cast(handle)

    def rotate() -> None:
        stack.put(1, state=1)

    stack.on_refresh = rotate
    stack.transports.before_writing = _failing_one(error, times=1)
    with stack.handle() as handle:
        cast(handle)
        # And no third time.
        stack.on_refresh = lambda: None
        stack.transports.before_writing = _failing_one(error, times=2)
        with pytest.raises(exceptions.CellUnavailable):
            cast(handle)
    assert senders == ["cellmw-worker"] * 2
    assert (stack.guard().stats().sent, stack.guard().stats().failed) == (2, 1)


@pytest.mark.parametrize("stack", ["ready"], indirect=True)
@pytest.mark.parametrize("at", ["before_writing", "on_send"])
def test_what_meets_its_deadline_here_is_told_as_it_is(
    stack: Stack, at: str
) -> None:
    with stack.handle() as handle:
        cast(handle)
        setattr(stack.transports, at, _failing(Expired()))
        with pytest.raises(
            exceptions.CellUnavailable, match="longer than 30 s"
        ) as caught:
            cast(handle)
    assert caught.value.maybe_delivered is (at == "on_send")
    assert len(stack.transports.opened) == 1
    stats = stack.guard().stats()
    assert (stats.failed, stats.stuck, stats.under_way) == (1, 0, 0)


@pytest.mark.parametrize("stack", ["ready"], indirect=True)
def test_a_message_of_another_generation_is_sent_by_a_worker(
    stack: Stack, senders: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with stack.handle() as handle:
        cast(handle)
    borrower = stack.borrower(stack.cells[cell_uuid(1)])
    monkeypatch.setattr(stack, "borrower", lambda of: borrower)
    real = stack.transports.before_writing

    def decide(one: Transport) -> None:
        stack.transports.before_writing = real
        # Another message of the request has gone out with it.
        borrower.pin(generation(1, 1))

    stack.transports.before_writing = decide
    with stack.handle() as handle:
        cast(handle)
    assert senders == ["cellmw-worker"] * 2
    assert stack.transports.opened[-1].generation is generation(1, 1)


@pytest.mark.parametrize("stack", ["ready"], indirect=True)
@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("at", ["before_writing", "on_send", "on_reply"])
def test_a_signal_while_it_is_sent_here_leaves_nothing(
    stack: Stack, kind: type[BaseException], at: str
) -> None:
    with stack.handle() as handle:
        cast(handle)
        setattr(stack.transports, at, _failing(kind()))
        with pytest.raises(kind):
            call(handle)
        assert under_way.message is None
        assert stack.stats.leases == 1
        stats = stack.guard().stats()
        assert (stats.under_way, stats.failed, stats.stuck) == (0, 0, 0)


@pytest.mark.parametrize("stack", ["ready"], indirect=True)
def test_a_signal_after_a_failure_is_raised_all_the_same(
    stack: Stack,
) -> None:
    def fail_and_end(one: Transport, sent: object) -> None:
        assert under_way.message is not None
        under_way.message.failed(Verdict.UNREACHABLE, OSError("reset"))
        raise SystemExit

    with stack.handle() as handle:
        cast(handle)
        stack.transports.on_send = fail_and_end
        with pytest.raises(SystemExit):
            cast(handle)
        assert stack.stats.leases == 1
        stats = stack.guard().stats()
        assert (stats.under_way, stats.failed, stats.stuck) == (0, 0, 0)


# The request's hold.


def test_all_messages_of_a_request_use_one_transport(stack: Stack) -> None:
    with stack.handle() as handle:
        for _ in range(5):
            cast(handle)
        assert stack.stats.leases == 1
    assert len(stack.transports.opened) == 1
    assert len(stack.transports.opened[0].sent) == 5
    assert stack.stats.leases == 0
    assert stack.open_cells() == ([1] if stack.cached else [])


def test_messages_at_once_leave_the_request_one_transport(
    stack: Stack,
) -> None:
    gate = Gate()
    stack.transports.on_send = lambda one, sent: gate.wait()
    with stack.handle() as handle:
        with Threads() as threads:
            for _ in range(5):
                threads.start(cast, handle)
            gate.await_arrival(5)
            gate.open()
        stack.settle()
        assert stack.stats.leases == 1
        assert len(stack.transports.left) == 1
        cast(handle)
    assert stack.stats.leases == 0


def test_of_messages_that_lease_at_once_one_lease_stays() -> None:
    """Both have opened one before either has given it to the request."""
    gate = Gate()
    with Stack(max_size=0) as stack:
        stack.put(1)
        stack.transports.on_open = gate.wait
        with stack.handle() as handle:
            with Threads() as threads:
                threads.start(cast, handle)
                threads.start(cast, handle)
                gate.await_arrival(2)
                gate.open()
            stack.settle()
            assert len(stack.transports.opened) == 2
            assert len(stack.transports.left) == 1
            assert stack.stats.leases == 1


def test_a_message_in_flight_keeps_the_transport_after_the_end(
    stack: Stack,
) -> None:
    gate = Gate()
    stack.transports.on_send = lambda one, sent: gate.wait()
    with Threads() as threads:
        with stack.handle() as handle:
            threads.start(cast, handle)
            gate.await_arrival()
        stack.pool.keep_only({})
        stack.settle()
        assert stack.stats.leases == 1
        assert stack.transports.opened[0].closed == 0
        gate.open()
    assert stack.stats.leases == 0
    assert stack.open_cells() == []


def test_a_message_that_leases_after_the_end_leaves_nothing(
    stack: Stack,
) -> None:
    gate = Gate()
    stack.transports.on_open = gate.wait
    with Threads() as threads:
        with stack.handle() as handle:
            threads.start(cast, handle)
            gate.await_arrival()
        gate.open()
    assert len(stack.transports.sent) == 1
    assert stack.stats.leases == 0


def _watched(base: Any, touched: list[str], *names: str) -> Any:
    """A class that notes what is touched without its lock."""

    def watching(name: str) -> property:
        def look(self: Any) -> None:
            # In its constructor nobody else knows it.
            caller = sys._getframe(2).f_code
            if caller.co_name != "__init__" and not self._lock.locked():
                touched.append(f"{name} in {caller.co_qualname}")

        def get(self: Any) -> Any:
            look(self)
            return self.__dict__[name]

        def put(self: Any, value: Any) -> None:
            look(self)
            self.__dict__[name] = value

        return property(get, put)

    return type("Watched", (base,), {name: watching(name) for name in names})


def test_what_messages_of_a_request_share_is_touched_under_its_lock(
    stack: Stack,
) -> None:
    touched: list[str] = []
    watched = _watched(RequestLease, touched, "_lease", "_pinned", "_ended")
    of = stack.cells[cell_uuid(1)]
    borrower = watched(stack.pool, lambda: stack.cells[of.uuid])
    first, second = borrower.lease(PATIENCE), borrower.lease(PATIENCE)
    second.give_up()
    other = borrower.lease(PATIENCE)
    borrower.pin(other.generation)
    with pytest.raises(OtherGeneration):
        borrower.pin(generation(1, 1))
    borrower.drop(other)
    borrower.lease(PATIENCE).release()
    borrower.end()
    late = borrower.lease(PATIENCE)
    for lease in (first, second, other, late):
        lease.release()
    assert touched == []
    assert stack.stats.leases == 0


# One generation for a request.


def test_a_request_keeps_its_generation(stack: Stack) -> None:
    stack.keep_only()
    with stack.handle() as handle, stack.handle() as other:
        cast(handle)
        stack.put(1, state=1)
        stack.keep_only()
        cast(handle)
        cast(other)
    assert [one.generation for one in stack.transports.opened] == [
        generation(1, 0),
        generation(1, 1),
    ]
    assert [len(one.sent) for one in stack.transports.opened] == [2, 1]


def test_a_request_keeps_it_also_where_the_connection_died(
    stack: Stack,
) -> None:
    def die(one: Transport, sent: Sent) -> None:
        raise OSError("reset")

    with stack.handle() as handle:
        cast(handle)
        stack.put(1, state=1)
        stack.keep_only()
        stack.transports.on_send = die
        with pytest.raises(exceptions.DeliveryUncertain):
            cast(handle)
        stack.transports.on_send = lambda one, sent: None
        cast(handle)
    used = {one.generation for one in stack.transports.opened}
    assert used == {generation(1, 0)}


def test_a_request_that_has_sent_nothing_takes_the_new_one(
    stack: Stack,
) -> None:
    with stack.handle() as handle:
        stack.put(1, state=1)
        stack.keep_only()
        cast(handle)
    (only,) = stack.transports.opened
    assert only.generation is generation(1, 1)


def test_a_message_that_could_not_be_written_binds_to_nothing(
    stack: Stack,
) -> None:
    def fail(one: Transport) -> None:
        raise OSError("refused")

    with stack.handle() as handle:
        stack.transports.before_writing = fail
        with pytest.raises(exceptions.CellUnavailable) as caught:
            cast(handle)
        assert not caught.value.maybe_delivered
        stack.transports.before_writing = lambda one: None
        stack.put(1, state=1)
        stack.keep_only()
        cast(handle)
    assert stack.transports.opened[-1].generation is generation(1, 1)
    assert len(stack.transports.sent) == 1


def test_two_first_messages_go_out_with_one_generation(stack: Stack) -> None:
    """Each has leased another one; who writes first decides for both."""
    gate = Gate()
    held: list[Transport] = []

    def hold_the_first(one: Transport) -> None:
        if not held:
            held.append(one)
            gate.wait()

    stack.transports.before_writing = hold_the_first
    stack.keep_only()
    with stack.handle() as handle:
        with Threads() as threads:
            threads.start(cast, handle)
            gate.await_arrival()
            # Its connections are dead, says another request, so that the
            # next message leases anew; and by then the cell has moved on.
            stack.pool._retire(list(stack.pool._entries.values()))
            for entry in stack.pool._everything():
                entry.given_up = True
            stack.put(1, state=1)
            stack.keep_only()
            cast(handle)
            gate.open()
        cast(handle)
    used = {one.generation for one in stack.transports.opened if one.sent}
    assert used == {generation(1, 1)}
    assert len(stack.transports.sent) == 3


def test_a_late_lease_of_another_generation_is_let_go(stack: Stack) -> None:
    """What was leased before the other message decided must not stay."""
    gate = Gate()
    held: list[Transport] = []

    def hold_the_first(one: Transport) -> None:
        if not held:
            held.append(one)
            gate.wait()

    stack.transports.before_writing = hold_the_first
    with stack.handle() as handle:
        with Threads() as threads:
            threads.start(cast, handle)
            gate.await_arrival()
            # The first one's lease is taken from the request, as after a
            # failure, and a second message leases the new generation.
            _, borrower = handle._borrow()
            assert borrower._lease is not None
            borrower.drop(borrower._lease)
            stack.put(1, state=1)
            stack.keep_only()
            lease = borrower.lease(PATIENCE)
            assert lease.generation is generation(1, 1)
            gate.open()
            threads.join()
        lease.release()
        for _ in range(3):
            cast(handle)
    used = {one.generation for one in stack.transports.opened if one.sent}
    assert used == {generation(1, 0)}
    assert len(stack.transports.sent) == 4


def test_who_leases_while_the_generation_is_decided_gets_that_one(
    stack: Stack,
) -> None:
    """It had asked for the newer one before, and waited for its opening."""
    gate = Gate()
    stack.put(1, state=1)
    stack.transports.on_open = lambda of: (
        gate.wait() if of is generation(1, 1) else None
    )
    borrower = stack.borrower(stack.cells[cell_uuid(1)])
    with Threads() as threads:
        leases: list[Lease] = []
        threads.start(lambda: leases.append(borrower.lease(PATIENCE)))
        gate.await_arrival()
        borrower.pin(generation(1, 0))
        gate.open()
        threads.join()
    assert leases[0].generation is generation(1, 0)
    leases[0].release()
    borrower.end()


def test_what_is_written_with_the_other_generation_is_decided_as_well(
    stack: Stack,
) -> None:
    """A request that gives up then must not say that it never will be."""
    torn = [True]

    class Torn(RequestLease):
        """Another message of the request decides first."""

        def pin(self, of: Generation) -> None:
            if torn:
                torn.clear()
                raise OtherGeneration
            super().pin(of)

    of = stack.cells[cell_uuid(1)]
    borrower = Torn(stack.pool, lambda: of)
    options = {"wait_for_reply": False, "timeout": None}
    stack.transports.on_send = _failing(OSError("reset"))
    with pytest.raises(exceptions.DeliveryUncertain):
        Sending(
            stack.delivering, of, borrower, (TARGET, {}, message()), options
        ).deliver()
    borrower.end()
    assert not torn
    assert stack.guard().stats().failed == 1


def test_a_cell_that_can_no_longer_be_sent_to_refuses(stack: Stack) -> None:
    refusal = (exceptions.CellMisconfigured, "no URL")
    with stack.handle() as handle:
        stack.cells = {
            cell_uuid(1): _without_generation(
                stack.cells[cell_uuid(1)], refusal
            )
        }
        with pytest.raises(exceptions.CellMisconfigured, match="no URL"):
            cast(handle)
    assert stack.transports.attempts == 0


# Dead connections.


def test_dead_connections_are_given_up_by_all_requests(stack: Stack) -> None:
    with stack.handle() as handle, stack.handle() as other:
        cast(handle)
        cast(other)
        if not stack.cached:
            return
        dead = stack.transports.opened[0]
        stack.transports.on_send = _failing(OSError("reset"), times=1)
        with pytest.raises(exceptions.DeliveryUncertain):
            cast(handle)
        cast(other)
        cast(handle)
        assert len(stack.transports.opened) == 2
        stack.settle()
        assert dead.closed == 1


def test_dead_connections_are_let_go_before_the_next_message(
    stack: Stack,
) -> None:
    stack.transports.on_send = _failing(OSError("reset"))
    with stack.handle() as handle:
        with pytest.raises(exceptions.DeliveryUncertain):
            cast(handle)
        assert stack.stats.leases == 0
        assert stack.open_cells() == []


def test_what_is_leased_anew_is_kept_when_the_old_one_is_let_go(
    stack: Stack,
) -> None:
    borrower = stack.borrower(stack.cells[cell_uuid(1)])
    dead = borrower.lease(PATIENCE)
    dead.give_up()
    borrower.lease(PATIENCE).release()
    borrower.drop(dead)
    dead.release()
    assert stack.stats.leases == 1
    borrower.end()


def test_an_error_of_the_far_side_leaves_the_transport(stack: Stack) -> None:
    stack.transports.on_reply = _failing(oslo_messaging.RemoteError("E", "m"))
    with stack.handle() as handle:
        for _ in range(3):
            with pytest.raises(oslo_messaging.RemoteError):
                call(handle)
    assert len(stack.transports.opened) == 1
    assert stack.guard().stats().failures == 0


# Trying again, where nothing can have been written.


@pytest.mark.parametrize(
    "error",
    [
        OSError("refused"),
        kombu.exceptions.OperationalError("refused"),
        oslo_messaging.MessageDeliveryFailure("no connection"),
    ],
)
def test_it_is_tried_once_more_on_a_fresh_transport(
    stack: Stack, error: Exception
) -> None:
    stack.transports.before_writing = _failing_one(error, times=1)
    with stack.handle() as handle:
        cast(handle)
    first, second = stack.transports.opened
    assert not first.sent
    assert len(second.sent) == 1
    assert stack.guard().stats().failures == 0


def test_it_is_tried_no_third_time(stack: Stack) -> None:
    stack.transports.before_writing = _failing_one(OSError("refused"))
    with stack.handle() as handle:
        with pytest.raises(exceptions.CellUnavailable, match="OSError") as it:
            cast(handle)
    assert not isinstance(it.value, exceptions.DeliveryUncertain)
    assert not it.value.maybe_delivered
    assert it.value.cell_uuid == cell_uuid(1)
    assert it.value.cell_name == "cell-1"
    assert it.value.retry_after == 1.0
    assert len(stack.transports.opened) == 2
    assert stack.guard().stats().failures == 1


def test_what_keeps_it_from_being_tried_again_is_what_is_told(
    stack: Stack,
) -> None:
    def fail(of: object) -> None:
        raise exceptions.CellMisconfigured("no such driver", cell_uuid="x")

    def refuse(one: Transport) -> None:
        stack.transports.on_open = fail
        raise OSError("refused")

    stack.transports.before_writing = refuse
    with stack.handle() as handle:
        with pytest.raises(exceptions.CellMisconfigured, match="no such"):
            cast(handle)
    assert stack.guard().stats().failures == 0


@pytest.mark.parametrize("known, told", [(None, 7.5), (3.0, 3.0)])
def test_a_url_that_cannot_be_used_is_tried_again_when_it_is_read_again(
    stack: Stack, known: float | None, told: float
) -> None:
    error = exceptions.CellMisconfigured("no port", retry_after=known)
    stack.transports.before_writing = _failing(error)
    with stack.handle() as handle:
        with pytest.raises(exceptions.CellMisconfigured) as caught:
            cast(handle)
    assert caught.value.retry_after == told
    assert caught.value.cell_uuid == cell_uuid(1)


def test_an_error_of_the_far_side_keeps_its_cell(stack: Stack) -> None:
    """It may itself have sent on, to another one."""
    theirs = exceptions.CellBusy("too much", cell_uuid="theirs")
    stack.transports.on_reply = _failing(theirs)
    with stack.handle() as handle:
        with pytest.raises(exceptions.CellBusy) as caught:
            call(handle)
    assert caught.value is theirs


def test_what_may_have_been_written_is_not_tried_again(stack: Stack) -> None:
    stack.transports.on_send = _failing(OSError("reset"))
    with stack.handle() as handle:
        with pytest.raises(exceptions.DeliveryUncertain) as caught:
            cast(handle)
    assert caught.value.maybe_delivered
    assert len(stack.transports.opened) == 1
    assert stack.guard().stats().failures == 1


def test_to_a_driver_that_does_not_announce_all_may_have_been_written(
    stack: Stack,
) -> None:
    def strange(one: Transport) -> None:
        one._driver = Silent()

    with stack.handle() as handle:
        cast(handle)
        strange(stack.transports.opened[0])
        stack.transports.before_writing = _failing_one(OSError("refused"))
        with pytest.raises(exceptions.DeliveryUncertain):
            cast(handle)


def test_refused_credentials_are_read_again_and_it_goes_out(
    stack: Stack,
) -> None:
    def refuse(one: Transport) -> None:
        if one.generation is generation(1, 0):
            raise amqp.exceptions.AccessRefused(f"login was {PASSWORD}")

    stack.transports.before_writing = refuse

    def rotate() -> None:
        stack.put(1, state=1)

    stack.on_refresh = rotate
    with stack.handle() as handle:
        cast(handle)
    assert stack.refreshed == 1
    assert [one.generation for one in stack.transports.opened] == [
        generation(1, 0),
        generation(1, 1),
    ]
    assert len(stack.transports.sent) == 1
    assert stack.open_cells() == ([1] if stack.cached else [])


def test_refused_credentials_that_are_no_others_fail(stack: Stack) -> None:
    stack.transports.before_writing = _failing_one(
        amqp.exceptions.AccessRefused(f"login was {PASSWORD}")
    )
    with stack.handle() as handle:
        with pytest.raises(exceptions.CellUnavailable) as caught:
            cast(handle)
    assert stack.refreshed == 1
    assert len(stack.transports.opened) == 1
    assert stack.guard().stats().failures == 1
    _assert_tells_no_secret(caught.value)


def test_refused_credentials_leave_others_the_connections_that_they_have(
    stack: Stack,
) -> None:
    """A broker whose password is changed ends no connection for it."""
    with stack.handle() as before, stack.handle() as after:
        cast(before)
        used = stack.transports.opened[0]

        def refuse(one: Transport) -> None:
            # All its connections are in use: it wants another one.
            if one.generation is generation(1, 0):
                raise amqp.exceptions.AccessRefused("login refused")

        def rotate() -> None:
            stack.put(1, state=1)

        stack.transports.before_writing = refuse
        stack.on_refresh = rotate
        cast(after)
        stack.transports.before_writing = lambda one: None
        cast(before)
    assert len(used.sent) == 2
    assert len(stack.transports.sent) == 3
    assert stack.open_cells() == ([1] if stack.cached else [])


@pytest.mark.parametrize(
    "kind", [exceptions.LookupFailed, exceptions.CellNotFound]
)
def test_refused_credentials_that_cannot_be_read_again_fail(
    stack: Stack, kind: type[Exception]
) -> None:
    stack.transports.before_writing = _failing_one(
        amqp.exceptions.NotAllowed("no vhost")
    )

    def fail() -> None:
        raise kind("no database")

    stack.on_refresh = fail
    with stack.handle() as handle:
        with pytest.raises(exceptions.CellUnavailable, match="NotAllowed"):
            cast(handle)
    assert len(stack.transports.opened) == 1


# Errors.


def test_an_error_of_the_callers_own_comes_as_it_is(stack: Stack) -> None:
    error = TypeError("not serializable")
    stack.transports.before_writing = _failing_one(error)
    with stack.handle() as handle:
        with pytest.raises(TypeError) as caught:
            cast(handle)
    assert caught.value is error
    # Nothing of the worker, whose frames know the URL.
    frames = [
        frame.name for frame in traceback.extract_tb(error.__traceback__)
    ]
    assert "_send" in frames
    assert "_send_once" not in frames
    assert len(stack.transports.opened) == 1
    assert stack.guard().stats().failed == 0
    _assert_tells_no_secret(error)


@pytest.mark.parametrize(
    "error",
    [
        amqp.exceptions.AccessRefused(f"user:{PASSWORD}@host"),
        OSError(f"no route to amqp://user:{PASSWORD}@host"),
        ValueError("of the caller"),
    ],
)
def test_no_error_brings_a_secret_along(
    stack: Stack, error: Exception
) -> None:
    def fail(one: Transport) -> None:
        url = one.generation.url.reveal()
        try:
            raise KeyError(url)
        except KeyError:
            raise error from None

    stack.transports.before_writing = fail
    with stack.handle() as handle:
        with pytest.raises(Exception) as it:
            cast(handle)
    _assert_tells_no_secret(it.value)


def test_an_error_of_the_far_side_says_that_the_cell_is_there(
    stack: Stack,
) -> None:
    with stack.handle() as handle:
        stack.transports.on_send = _failing(OSError("reset"))
        with pytest.raises(exceptions.DeliveryUncertain):
            cast(handle)
        assert stack.guard().stats().failures == 1
        stack.transports.on_send = lambda one, sent: None
        stack.transports.on_reply = _failing(
            oslo_messaging.RemoteError("E", "m")
        )
        with pytest.raises(oslo_messaging.RemoteError):
            call(handle)
    stats = stack.guard().stats()
    assert (stats.failures, stats.sent, stats.failed) == (0, 1, 1)
    assert sum(stats.calls.counts) == 1


def test_no_reply_in_time_says_nothing_against_the_cell(stack: Stack) -> None:
    stack.transports.on_reply = _failing(oslo_messaging.MessagingTimeout())
    with stack.handle() as handle:
        for _ in range(10):
            with pytest.raises(oslo_messaging.MessagingTimeout):
                call(handle)
    stats = stack.guard().stats()
    assert (stats.failures, stats.down) == (0, False)


def test_a_message_without_a_topic_is_not_sent(stack: Stack) -> None:
    with stack.handle() as handle:
        with pytest.raises(oslo_messaging.InvalidTarget):
            handle._send(oslo_messaging.Target(server="h"), {}, message())
    assert stack.transports.attempts == 0


def test_where_no_thread_can_be_started_it_is_refused(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    with stack.handle() as handle:
        for _ in range(100):
            with pytest.raises(exceptions.CellBusy, match="no thread"):
                cast(handle)
    monkeypatch.undo()
    assert stack.guard().stats().under_way == 0


# Giving up.


def test_what_was_not_written_in_time_never_is(
    hasty: Stack, gate: Gate
) -> None:
    hasty.transports.before_writing = gate.wait
    with hasty.handle() as handle:
        with pytest.raises(exceptions.CellUnavailable, match="longer") as it:
            cast(handle)
        assert not it.value.maybe_delivered
        assert hasty.guard().stats().stuck == 1
        assert hasty.guard().stats().failures == 1
    gate.open()
    _until(lambda: hasty.guard().stats().under_way == 0)
    assert hasty.transports.sent == []
    assert hasty.stats.leases == 0
    assert hasty.guard().stats().stuck == 0


def test_what_was_being_written_may_have_been(
    hasty: Stack, gate: Gate
) -> None:
    hasty.transports.on_send = lambda one, sent: gate.wait()
    with hasty.handle() as handle:
        with pytest.raises(exceptions.DeliveryUncertain):
            cast(handle)
    # The request is over; the message still has its transport.
    hasty.settle()
    assert hasty.stats.leases == 1
    assert hasty.transports.opened[0].closed == 0
    gate.open()
    _until(lambda: hasty.guard().stats().under_way == 0)
    assert hasty.open_cells() == []


def test_a_transport_that_holds_a_message_serves_nobody_else(
    hasty: Stack, gate: Gate
) -> None:
    hasty.transports.on_send = lambda one, sent: (
        gate.wait() if one is hasty.transports.opened[0] else None
    )
    with hasty.handle() as handle, hasty.handle() as other:
        with pytest.raises(exceptions.DeliveryUncertain):
            cast(handle)
        cast(other)
        cast(handle)
    assert len(hasty.transports.opened) == 2
    gate.open()
    _until(lambda: hasty.guard().stats().under_way == 0)


def test_what_ends_just_as_the_request_gives_up_counts(
    hasty: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reply is there between the last look and the decision."""
    hasty.transports.on_send = lambda one, sent: "a reply"
    real = Job.wait

    def wait(job: Job, timeout: float | None = None) -> bool:
        real(job, PATIENCE)
        return False

    monkeypatch.setattr(Job, "wait", wait)
    with hasty.handle() as handle:
        assert call(handle) == "a reply"
        hasty.transports.on_reply = _failing(ValueError("the far side's"))
        with pytest.raises(ValueError, match="the far side's"):
            call(handle)
    monkeypatch.undo()
    assert hasty.guard().stats().failures == 0


def test_a_message_revoked_at_the_last_moment_tells_no_inner_error(
    hasty: Stack, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker finds that between the revocation and the last look."""
    real = Sending._revoke

    def revoke(sending: Sending) -> Any:
        before = real(sending)
        gate.open()
        _until(lambda: hasty.guard().stats().under_way == 0)
        _until(lambda: not hasty.workers.busy)
        return before

    # No hook from outside reaches between the two.
    monkeypatch.setattr(Sending, "_revoke", revoke)
    hasty.transports.before_writing = gate.wait
    with hasty.handle() as handle:
        with pytest.raises(exceptions.CellUnavailable, match="longer than"):
            cast(handle)
    assert not hasty.transports.sent


def test_a_reply_may_come_later_than_the_message_must(
    hasty: Stack, gate: Gate
) -> None:

    def answer(*_: object) -> str:
        gate.wait()
        return "late"

    hasty.transports.on_reply = answer
    found: list[Any] = []
    with hasty.handle() as handle, Threads() as threads:
        threads.start(lambda: found.append(call(handle, timeout=PATIENCE)))
        gate.await_arrival()
        _until(lambda: hasty.guard().stats().sent == 1)
        assert not found
        gate.open()
    assert found == ["late"]
    assert hasty.guard().stats().failures == 0


def test_a_reply_that_comes_later_is_counted_once(
    hasty: Stack, gate: Gate
) -> None:
    hasty.transports.on_reply = gate.wait
    with hasty.handle() as handle, Threads() as threads:
        threads.start(lambda: call(handle, timeout=PATIENCE))
        _until(lambda: hasty.guard().stats().sent == 1)
        assert sum(hasty.guard().stats().calls.counts) == 0
        gate.open()
    stats = hasty.guard().stats()
    assert (stats.sent, stats.failed) == (1, 0)
    assert sum(stats.calls.counts) == 1


def test_a_reply_that_is_overdue_is_a_timeout(
    hasty: Stack, gate: Gate
) -> None:
    hasty.transports.on_reply = gate.wait
    with hasty.handle() as handle:
        with pytest.raises(oslo_messaging.MessagingTimeout):
            call(handle, timeout=0.05)
    assert hasty.guard().stats().failures == 0
    gate.open()
    _until(lambda: hasty.guard().stats().under_way == 0)


def test_a_cast_that_is_confirmed_is_delivered(
    hasty: Stack, gate: Gate
) -> None:
    """Whatever holds up the driver then, and whatever fails then."""

    def linger(*_: object) -> None:
        assert under_way.message is not None
        under_way.message.written()
        gate.wait()
        raise OSError("closing failed")

    hasty.transports.on_send = linger
    with hasty.handle() as handle:
        cast(handle)
        assert hasty.guard().stats().under_way == 0
        gate.open()
        cast(handle)
    stats = hasty.guard().stats()
    assert (stats.sent, stats.failed) == (2, 0)


def test_a_call_that_awaits_its_reply_holds_no_place(gate: Gate) -> None:
    with Stack(max_sends=1) as stack, Threads() as threads:
        stack.put(1)
        stack.transports.on_reply = gate.wait
        with stack.handle() as handle:
            for _ in range(5):
                threads.start(lambda: call(handle, timeout=PATIENCE))
            gate.await_arrival(5)
            stats = stack.guard().stats()
            assert (stats.sent, stats.under_way) == (5, 0)
            cast(handle)
            gate.open()
            threads.join()


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_a_thread_that_is_ended_leaves_nothing(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    gate = Gate()
    stack.transports.before_writing = gate.wait

    def end(job: Job, timeout: float | None = None) -> bool:
        raise kind

    with stack.handle() as handle:
        monkeypatch.setattr(Job, "wait", end)
        with pytest.raises(kind):
            cast(handle)
        monkeypatch.undo()
    gate.open()
    _until(lambda: stack.guard().stats().under_way == 0)
    assert stack.transports.sent == []
    assert stack.guard().stats().failures == 0
    assert stack.stats.leases == 0


@pytest.mark.parametrize("handed_over", [False, True])
@pytest.mark.parametrize("stack", ["cached", "uncached"], indirect=True)
def test_a_thread_that_is_ended_while_it_hands_over_leaves_nothing(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, handed_over: bool
) -> None:
    """The place is given back, and not by both of the threads."""
    real = Workers.start

    def start(workers: Workers, job: Job) -> None:
        if handed_over:
            real(workers, job)
        raise KeyboardInterrupt

    with stack.handle() as handle:
        cast(handle)
        monkeypatch.setattr(Workers, "start", start)
        with pytest.raises(KeyboardInterrupt):
            cast(handle)
        monkeypatch.undo()
        _until(lambda: stack.guard().stats().under_way == 0)
        # Whatever the worker does yet, it does before this one.
        _until(lambda: not stack.workers.busy)
        assert stack.guard().stats().under_way == 0
        cast(handle)
    assert stack.guard().stats().under_way == 0
    assert stack.stats.leases == 0


def test_a_thread_that_is_ended_leaves_its_worker_as_stuck(
    stack: Stack, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack.transports.before_writing = gate.wait

    def end(job: Job, timeout: float | None = None) -> bool:
        gate.await_arrival()
        raise SystemExit

    with stack.handle() as handle:
        monkeypatch.setattr(Job, "wait", end)
        with pytest.raises(SystemExit):
            cast(handle)
        monkeypatch.undo()
        assert stack.guard().stats().stuck == 1
        stack.transports.before_writing = lambda one: None
        cast(handle)
        assert len(stack.transports.opened) == 2
    gate.open()
    _until(lambda: stack.guard().stats().under_way == 0)
    assert stack.guard().stats().stuck == 0


def test_a_trial_that_is_broken_off_is_followed_by_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def end(job: Job, timeout: float | None = None) -> bool:
        real(job, PATIENCE)
        raise SystemExit

    real = Job.wait
    with Stack(breaker_failures=1) as stack:
        stack.put(1)
        with stack.handle() as handle:
            stack.transports.on_send = _failing(OSError("reset"), times=1)
            with pytest.raises(exceptions.DeliveryUncertain):
                cast(handle)
            assert stack.guard().stats().down
            stack.clock.now += 60
            with monkeypatch.context() as patch:
                patch.setattr(Job, "wait", end)
                with pytest.raises(SystemExit):
                    cast(handle)
            cast(handle)
        assert not stack.guard().stats().down


def test_waiting_in_line_counts_as_well(gate: Gate) -> None:
    with Stack(max_sends=1, send_timeout=0.2) as stack, Threads() as threads:
        stack.put(1)
        stack.transports.on_send = lambda one, sent: gate.wait()

        def first() -> None:
            with stack.handle() as handle:
                with pytest.raises(exceptions.DeliveryUncertain):
                    cast(handle)

        threads.start(first)
        gate.await_arrival()
        with stack.handle() as handle:
            with pytest.raises(exceptions.CellBusy):
                cast(handle)
        threads.join()
        gate.open()
        _until(lambda: stack.guard().stats().under_way == 0)


# Bookkeeping.


def test_places_and_leases_are_given_back_whatever_happens(
    stack: Stack,
) -> None:
    errors = [
        OSError("reset"),
        ValueError("x"),
        oslo_messaging.RemoteError("E", "m"),
        oslo_messaging.MessagingTimeout(),
        amqp.exceptions.AccessRefused("no"),
        exceptions.CellMisconfigured("y", cell_uuid="z"),
        SystemExit(1),
    ]
    with stack.handle() as handle:
        for error in errors:
            for hook in ("before_writing", "on_send"):
                setattr(stack.transports, hook, _failing(error))
                with pytest.raises((Exception, SystemExit)):
                    send(handle, wait_for_reply=True, timeout=1)
                setattr(stack.transports, hook, lambda *args: None)
                assert stack.guard().stats().under_way == 0
            call(handle)  # or the breaker would open
    assert stack.stats.leases == 0


def _failing(
    error: BaseException, times: int = 1_000_000
) -> Callable[..., Any]:
    left = [times]

    def fail(*args: object) -> None:
        if left[0]:
            left[0] -= 1
            raise error

    return fail


def _failing_one(
    error: BaseException, times: int = 1_000_000
) -> Callable[[Transport], None]:
    return _failing(error, times)


def _assert_tells_no_secret(error: BaseException) -> None:
    told = traceback.TracebackException.from_exception(
        error, capture_locals=True
    )
    # The frames of the test itself, which know the password, aside.
    told.stack = traceback.StackSummary.from_list(
        [frame for frame in told.stack if "/tests/" not in frame.filename]
    )
    text = "".join(told.format())
    own = str(error)
    assert PASSWORD not in text.replace(own, "")
    if isinstance(error, exceptions.CellMWError):
        assert PASSWORD not in own
    assert error.__cause__ is None
    assert error.__context__ is None


def _without_generation(
    cell: Cell, refusal: tuple[type[exceptions.SendError], str]
) -> Cell:
    return Cell(cell.uuid, cell.name, refusal=refusal)


def _option(name: str, default: int) -> Any:
    return cfg.IntOpt(name, default=default)


def _until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it has not come to that"
        time.sleep(0.001)
