# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""One request's messages and their guard, in every order that there is.

Seen from outside: a handle, a driver that does what the test says, and the
guard's numbers.  Each message has a thread, which stands still at each step
of its driver until the machine lets it go on.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable

import amqp.exceptions
import hypothesis
import oslo_messaging
import pytest
from hypothesis import strategies
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cellmw import exceptions
from cellmw.transports.driver.wire import Expired
from cellmw.transports.handle import Handle
from tests.fakes import PATIENCE, Sent, Stack, Transport, cell_uuid

MAX_SENDS = 3
# The send_timeout of a message that is to take too long, in seconds.  Its
# driver gets to where it is to stand sooner than that.
HASTE = 0.3


class Message:
    """One message: its request's thread, and what its driver is to do.

    :ivar at: the step at which its driver stands
    :ivar written: with which states of the cell it was written
    :ivar confirmed: whether the broker has confirmed it
    :ivar rejected: whether the broker has said that it does not take it
    :ivar expired: whether its request has given up
    :ivar outcome: what its request got
    """

    def __init__(self, number: int, *, is_call: bool) -> None:
        self.number = number
        self.is_call = is_call
        self.written: list[str] = []
        self.confirmed = False
        self.rejected = False
        self.outcome: object = None
        self.steps: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.arrivals: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.at = "begun"
        self.expired = False
        self._thread = threading.Thread()

    def start(self, handle: Handle) -> None:
        self._thread = threading.Thread(
            target=self._run, args=(handle,), daemon=True
        )
        self._thread.start()
        self.await_arrival()

    def _run(self, handle: Handle) -> None:
        target = oslo_messaging.Target(topic="compute", server="host")
        try:
            handle._send(
                target,
                {},
                {"method": "ping", "args": {"number": self.number}},
                wait_for_reply=self.is_call,
                timeout=PATIENCE if self.is_call else None,
            )
            self.outcome = "ok"
        except Exception as error:
            self.outcome = error
        self.arrivals.put("returned")

    # In the driver's thread.

    def stand(self, at: str) -> None:
        self.arrivals.put(at)
        step = self.steps.get(timeout=PATIENCE)
        if step == "fail":
            raise OSError("reset")
        if step == "late":
            raise Expired
        if step == "refuse":
            self.rejected = True
            raise amqp.exceptions.AccessRefused("no")

    # In the machine's.

    def await_arrival(self) -> str:
        self.at = self.arrivals.get(timeout=PATIENCE)
        return self.at

    def let_go(self, step: str = "go on") -> str:
        self.steps.put(step)
        return self.await_arrival()

    def expire(self) -> None:
        """Wait until its request has given up; its driver has not."""
        standing = self.at
        self.join()
        assert self.await_arrival() == "returned"
        self.expired = True
        self.at = standing

    def join(self) -> None:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()


class Machine(RuleBasedStateMachine):
    """The request, its messages, and the process around them."""

    messages: Bundle[Message] = Bundle("messages")
    # Whether messages are sent in their request's thread, where they can be.
    ready = False

    def __init__(self) -> None:
        super().__init__()
        self.stack = Stack(
            max_sends=MAX_SENDS, send_timeout=PATIENCE, ready=self.ready
        )
        self.stack.__enter__()
        self.stack.put(1)
        self.handle = Handle(self.stack, self.stack.cells[cell_uuid(1)])
        self.all: list[Message] = []
        self.state = 0
        self.released = False
        transports = self.stack.transports
        transports.before_send = lambda one, sent: self._of(sent).stand(
            "connected"
        )
        transports.on_send = self._write
        transports.on_reply = lambda one, sent, answer: self._of(sent).stand(
            "awaiting"
        )

    def _of(self, sent: Sent) -> Message:
        number: int = sent.message["args"]["number"]
        return self.all[number]

    def _write(self, one: Transport, sent: Sent) -> None:
        message = self._of(sent)
        message.written.append(one.generation.url.reveal()[-1])
        message.stand("writing")
        message.confirmed = True

    def _under_way(self) -> int:
        return self.stack.guard().stats().under_way

    @property
    def under_way(self) -> list[Message]:
        return [one for one in self.all if one.at in ("connected", "writing")]

    @precondition(lambda self: len(self.under_way) < MAX_SENDS)
    @precondition(lambda self: not self.stack.guard().stats().down)
    @rule(target=messages, is_call=strategies.booleans())
    def begin(self, is_call: bool) -> Message | MultipleResults[Message]:
        message = self._begin(is_call)
        assert (message.at == "returned") is self.released
        if self.released:
            assert isinstance(message.outcome, exceptions.TransportReleased)
            return multiple()
        return message

    def _begin(self, is_call: bool) -> Message:
        message = Message(len(self.all), is_call=is_call)
        self.all.append(message)
        message.start(self.handle)
        return message

    @rule(message=consumes(messages), target=messages)
    def go_on(self, message: Message) -> Message | MultipleResults[Message]:
        return self._step(message, "go on")

    @rule(message=consumes(messages), target=messages)
    def cut(self, message: Message) -> Message | MultipleResults[Message]:
        return self._step(message, "fail")

    @rule(message=consumes(messages), target=messages)
    def meet_the_deadline(
        self, message: Message
    ) -> Message | MultipleResults[Message]:
        return self._step(message, "late")

    @rule(message=consumes(messages), target=messages)
    def refuse(self, message: Message) -> Message | MultipleResults[Message]:
        return self._step(message, "refuse")

    def _step(
        self, message: Message, step: str
    ) -> Message | MultipleResults[Message]:
        if message.expired:
            # Nobody waits for it any more.
            message.steps.put(step)
            if message.is_call and (message.at, step) == ("writing", "go on"):
                assert message.await_arrival() == "awaiting"
                message.steps.put("go on")
            message.at = "returned"
            _until(lambda: self._under_way() == len(self.under_way))
            return multiple()
        if message.let_go(step) == "returned":
            return multiple()
        return message

    # A driver that is ready keeps the deadline itself.
    @precondition(lambda self: not (self.ready or self.released))
    @precondition(lambda self: len(self.under_way) < MAX_SENDS)
    @precondition(lambda self: not self.stack.guard().stats().down)
    @rule(
        target=messages,
        is_call=strategies.booleans(),
        steps=strategies.integers(0, 1),
    )
    def begin_one_that_takes_too_long(
        self, is_call: bool, steps: int
    ) -> Message | MultipleResults[Message]:
        usual = self.stack.delivering
        self.stack.delivering = dataclasses.replace(usual, send_timeout=HASTE)
        message = self._begin(is_call)
        self.stack.delivering = usual
        if message.at == "connected" and steps:
            message.let_go()
        if message.at == "returned":
            return multiple()
        message.expire()
        self.what_was_said_is_true()
        return message

    @rule()
    def change_the_cell(self) -> None:
        self.state += 1
        self.stack.put(1, state=self.state)
        self.stack.keep_only()

    @rule()
    def end_the_request(self) -> None:
        self.handle.release()
        self.released = True

    @invariant()
    def what_was_said_is_true(self) -> None:
        for message in self.all:
            assert len(message.written) <= 1
            outcome = message.outcome
            if isinstance(outcome, exceptions.SendError):
                if not outcome.maybe_delivered:
                    assert not message.written or message.rejected
                # What is confirmed too late was said to be uncertain.
                late = message.expired and outcome.maybe_delivered
                assert not message.confirmed or late
            elif outcome == "ok":
                assert message.confirmed

    @invariant()
    def one_generation_serves_the_request(self) -> None:
        used = {state for message in self.all for state in message.written}
        assert len(used) <= 1

    @invariant()
    def a_place_is_held_until_it_is_confirmed(self) -> None:
        stats = self.stack.guard().stats()
        assert self._under_way() == len(self.under_way)
        assert stats.waiting == 0
        assert stats.stuck == sum(one.expired for one in self.under_way)
        assert stats.sent == sum(
            one.confirmed and not one.expired for one in self.all
        )

    def teardown(self) -> None:
        try:
            for message in self.all:
                while message.at != "returned":
                    self._step(message, "go on")
                message.join()
            self.what_was_said_is_true()
            self.handle.release()
            self.stack.close()
        finally:
            self.stack._hold.drop()
            self.stack.records.__exit__()
            self.stack.workers.close()


class ReadyMachine(Machine):
    """The same where a connection is always open."""

    ready = True


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


@pytest.mark.parametrize(
    "examples",
    [
        pytest.param(20, id="short"),
        pytest.param(
            1000,
            id="full",
            marks=[pytest.mark.full, pytest.mark.timeout(7200)],
        ),
    ],
)
@pytest.mark.parametrize("machine", [Machine, ReadyMachine])
def test_what_is_said_of_each_message_is_true(
    machine: type[Machine], examples: int
) -> None:
    run_state_machine_as_test(
        machine,
        settings=hypothesis.settings(
            max_examples=examples,
            stateful_step_count=20,
            deadline=None,
            database=None,
            # The short form tries the same examples on every machine.
            derandomize=examples < 100,
            suppress_health_check=list(hypothesis.HealthCheck),
        ),
    )
