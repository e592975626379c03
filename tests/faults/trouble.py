# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Each state that a broker can be in, and what becomes of messages then.

:class:`Site` owns a broker with one cell's vhost, the proxies before its two
ports, and a compute host in a process of its own.  :meth:`Site.meet` puts the
broker into a state, sends messages, heals it, and tells what was said of the
messages and which of them arrived.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any, Self

from tests import servers
from tests.faults.outage import Child
from tests.faults.service import (
    SOON,
    Outcome,
    Service,
    durable,
    plain_client,
)
from tests.faults.witness import Witness, contradictions
from tests.functional import stack
from tests.proxy import Proxy

SEND_TIMEOUT = 2.0
# Longer than the above: the driver takes it as a socket's timeout as well, and
# must not end a wait before we do.
REPLY = 3.0


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """A broker, and the proxy through which the cell reaches it."""

    broker: servers.PrivateBroker
    proxy: Proxy

    def heal(self) -> None:
        """Make both what they were; what the network has lost is reset."""
        self.broker.heal()
        self.proxy.restore()
        self.proxy.cut()


def _hang_new(place: Place) -> None:
    place.proxy.swallow()
    place.proxy.cut()


@dataclasses.dataclass(frozen=True, slots=True)
class State:
    """A state of a broker.

    :ivar enter: puts the broker into it
    :ivar later: done when the messages are under way
    :ivar pad: bytes that each message carries
    :ivar query: what the transport's URL says besides
    :ivar cold: whether a transport that is new can meet it
    """

    enter: Callable[[Place], object]
    later: Callable[[Place], object] = lambda place: None
    pad: int = 0
    query: str = ""
    cold: bool = True


# More than the buffers of two sockets and of a proxy hold.
_LARGE = 12 << 20
# The broker then sends a heartbeat each second.
_HEARTBEATS = "&heartbeat_timeout_threshold=2"

# By what a table calls them.
STATES = {
    "refuses": State(lambda at: at.proxy.refuse()),
    "accepts, says nothing": State(_hang_new),
    "stopped": State(lambda at: at.broker.pause()),
    "stopped, 12 MB": State(lambda at: at.broker.pause(), pad=_LARGE),
    "killed": State(lambda at: at.broker.kill()),
    "memory alarm": State(lambda at: at.broker.raise_memory_alarm()),
    "memory alarm, heartbeats": State(
        lambda at: at.broker.raise_memory_alarm(), query=_HEARTBEATS
    ),
    "swallows packets": State(lambda at: at.proxy.swallow()),
    "swallows answers": State(lambda at: at.proxy.swallow("to_client")),
    "trickles": State(lambda at: at.proxy.trickle(0.3)),
    "cut when idle": State(lambda at: at.proxy.cut(), cold=False),
    "cut under way": State(
        lambda at: at.proxy.delay(0.1), lambda at: at.proxy.cut()
    ),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """How messages meet a state.

    :ivar warm: on a transport that has been used, or on a new one
    :ivar kind: ``cast`` or ``call``
    """

    state: str
    warm: bool
    kind: str
    tls: bool

    def __str__(self) -> str:
        warm = "warm" if self.warm else "cold"
        transport = "TLS" if self.tls else "plain"
        return f"{self.state:24}  {warm}  {self.kind}  {transport:5}"


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """What became of the messages of one case.

    :ivar outcomes: of those that met the state
    :ivar arrived: how many of these the broker took, each counted once
    :ivar wrong: what was said of any message and is not true of it
    """

    outcomes: list[Outcome]
    arrived: int
    wrong: list[str]

    @property
    def longest(self) -> float:
        """Seconds; of a call that was delivered, those without its reply."""
        return max(held(outcome) for outcome in self.outcomes)

    @property
    def verdicts(self) -> collections.Counter[str]:
        return collections.Counter(o.verdict for o in self.outcomes)


def held(outcome: Outcome) -> float:
    """For how long delivering it held its thread, at least; seconds."""
    if outcome.verdict == "no reply":
        return outcome.seconds - REPLY
    return outcome.seconds


class Site:
    """One cell on a broker of its own, and its compute host.

    :param threads: how many send at once
    :param each: how many messages each of them sends
    """

    def __init__(
        self,
        broker: servers.PrivateBroker,
        *,
        threads: int = 4,
        each: int = 2,
    ) -> None:
        self._broker = broker
        self._threads = threads
        self._each = each
        self._owned = contextlib.ExitStack()
        try:
            self._set_up()
        except BaseException:
            self._owned.close()
            raise

    def _set_up(self) -> None:
        own, broker = self._owned, self._broker
        self._vhost = own.enter_context(broker.vhost())
        self._proxies = {
            tls: own.enter_context(Proxy(broker.host, port))
            for tls, port in ((False, broker.port), (True, broker.tls_port))
        }
        host = Child("tests.faults.hosts", [durable(self._vhost.url)])
        own.callback(host.end)
        assert host.line() == "ready"

    def _url(self, case: Case) -> str:
        address = self._proxies[case.tls].address
        if case.tls:
            url = self._broker.over_tls(self._vhost.url, address)
            url = f"{url}&amqp_durable_queues=true"
        else:
            url = durable(self._vhost.url_via(address))
        return url + STATES[case.state].query

    def meet(self, case: Case) -> Found:
        """Put the broker into a state and send; it is healed afterwards."""
        state = STATES[case.state]
        place = Place(self._broker, self._proxies[case.tls])
        with (
            servers.sqlite_database() as database,
            Witness(self._vhost.url) as witness,
            contextlib.closing(
                Service(
                    database, send_timeout=SEND_TIMEOUT, breaker_failures=0
                )
            ) as service,
        ):
            before = self._wait_for_host(service)
            cell = service.add_cell(self._url(case))
            senders = _Senders(service, cell)
            if case.warm:
                before += senders.warm_up(self._threads)
            # Making long messages keeps all threads from the interpreter.
            threads = 1 if state.pad else self._threads
            arguments = {"pad": "x" * state.pad} if state.pad else {}
            try:
                state.enter(place)
                under_way = senders.start(
                    threads, self._each, case.kind, arguments
                )
                time.sleep(0.15)
                state.later(place)
                outcomes = under_way()
            finally:
                place.heal()
            stack.eventually(
                lambda: service.guard(cell).under_way == 0, within=SOON
            )
            arrived = witness.arrived()
        return Found(
            outcomes,
            sum(1 for outcome in outcomes if arrived[outcome.number]),
            contradictions(before + outcomes, arrived),
        )

    def _wait_for_host(self, service: Service) -> list[Outcome]:
        """Call it until it is connected again and answers."""
        cell = service.add_cell(durable(self._vhost.url), name="direct")
        outcomes: list[Outcome] = []

        def answers() -> bool:
            outcomes.append(service.send_one(cell, "call", timeout=1.0))
            return outcomes[-1].error is None

        stack.eventually(answers, within=3 * SOON)
        return outcomes

    def close(self) -> None:
        """End it all."""
        self._owned.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class _Senders:
    """Threads that each send messages in one request."""

    def __init__(self, service: Service, cell: str) -> None:
        self._service, self._cell = service, cell

    def start(
        self, threads: int, each: int, kind: str, arguments: dict[str, Any]
    ) -> Callable[[], list[Outcome]]:
        """Begin to send; the result waits and gives the outcomes."""
        outcomes: list[Outcome] = []

        def send() -> None:
            outcomes.extend(
                self._service.send(
                    self._cell,
                    kind,
                    plain_client,
                    timeout=REPLY,
                    times=each,
                    **arguments,
                )
            )

        running = [threading.Thread(target=send) for _ in range(threads)]
        for thread in running:
            thread.start()

        def wait() -> list[Outcome]:
            for thread in running:
                thread.join()
            assert len(outcomes) == threads * each
            return outcomes

        return wait

    def warm_up(self, threads: int) -> list[Outcome]:
        """So that each thread will find a connection that is open."""
        outcomes = []
        for kind in ("call", "cast"):
            outcomes += self.start(threads, 3, kind, {})()
        assert {outcome.verdict for outcome in outcomes} == {"delivered"}
        return outcomes


def cases(states: list[str] | None = None, **only: object) -> list[Case]:
    """All cases of some states, or of all, with what is wanted of them."""
    return [
        case
        for name in states or STATES
        for tls in (False, True)
        for warm in (False, True)
        for kind in ("cast", "call")
        if warm or STATES[name].cold
        for case in [Case(name, warm, kind, tls)]
        if all(getattr(case, key) == value for key, value in only.items())
    ]
