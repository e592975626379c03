# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""A service with the filter in front of it, and what a test sees of it.

:class:`Service` owns its filter, its runtime and its API database.
:class:`Inbox` is the queue of a compute host that no host reads from.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import kombu
import oslo_messaging
import webob
from oslo_context import context as oslo_context

import cellmw
from cellmw import exceptions, rpc, runtime
from cellmw.cells import tables
from cellmw.process import Process
from cellmw.transports.guard import GuardStats
from tests import servers
from tests.functional import stack

HOST = "host"
NAME = "cell-one"
# Longer than anything takes that works, in seconds.
SOON = 15.0
# What a loaded machine may add to a bound, in seconds.
SLACK = 1.5

_OURS = rpc.get_client(oslo_messaging.Target(topic=stack.TOPIC))


def our_client(context: Any) -> oslo_messaging.RPCClient:
    """The package's own client, as a service has it: made once."""
    return _OURS


def plain_client(context: Any) -> oslo_messaging.RPCClient:
    """oslo.messaging's own, as a service makes one for a context."""
    return oslo_messaging.get_rpc_client(
        context.mq_connection,
        oslo_messaging.Target(topic=stack.TOPIC),
        serializer=_ToDict(),
    )


class _ToDict(oslo_messaging.NoOpSerializer):
    def serialize_context(self, ctxt: Any) -> dict[str, Any]:
        plain: dict[str, Any] = ctxt.to_dict()
        return plain


Client = Callable[[Any], oslo_messaging.RPCClient]
CLIENTS = {"ours": our_client, "plain": plain_client}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one message.

    :ivar call: whether it was a call; one that nobody reads in time is
        thrown away by the broker
    :ivar number: which message it was
    :ivar began: when it was sent, by the monotonic clock
    :ivar seconds: for how long it held its thread
    :ivar error: None: it was delivered
    """

    number: int
    call: bool
    began: float
    seconds: float
    result: Any
    error: Exception | None

    @property
    def kind(self) -> str:
        """``delivered``, ``uncertain`` or ``not delivered``."""
        if self.error is None:
            return "delivered"
        if isinstance(self.error, oslo_messaging.MessagingTimeout):
            return "delivered"
        assert isinstance(self.error, exceptions.SendError), repr(self.error)
        return "uncertain" if self.error.maybe_delivered else "not delivered"

    @property
    def verdict(self) -> str:
        """The kind, but ``no reply`` for a call that waited in vain."""
        if isinstance(self.error, oslo_messaging.MessagingTimeout):
            return "no reply"
        return self.kind


class Service:
    """An API service whose handlers send messages.

    :ivar send_timeout: its option
    """

    def __init__(
        self,
        database: servers.Database,
        *,
        send_timeout: float = 2.0,
        breaker_failures: int = 3,
        breaker_reset_after: float = 1.0,
        **paste: Any,
    ) -> None:
        self.send_timeout = send_timeout
        self.database = stack.ApiDatabase(database.url)
        options = {
            "send_timeout": send_timeout,
            "breaker_failures": breaker_failures,
            "breaker_reset_after": breaker_reset_after,
            **paste,
        }
        self.filter = cellmw.filter_factory(
            {},
            oslo_config_config=stack.configuration(),
            api_database_connection=database.url,
            **{name: str(value) for name, value in options.items()},
        )
        self._instances: dict[str, str] = {}
        self._numbers = iter(range(10**9))
        self._lock = threading.Lock()

    @property
    def process(self) -> Process:
        (made,) = runtime.registry()
        return made.process()

    def add_cell(self, url: str, *, name: str = NAME) -> str:
        """A cell with one instance; gives the cell's UUID."""
        cell = self.database.add_cell(url, name=name)
        self._instances[cell] = self.database.add_instance(cell)
        return cell

    def instance(self, cell: str) -> str:
        """The instance in a cell."""
        return self._instances[cell]

    def remove_cell(self, cell: str) -> None:
        """Take the cell mapping out of the API database."""
        table = tables.cell_mappings
        self.database._execute(table.delete().where(table.c.uuid == cell))

    def request(
        self, cell: str, handler: Callable[[Any], Any]
    ) -> webob.Response:
        """A request for the cell's instance."""
        path = f"/servers/{self._instances[cell]}/action"
        application = self.filter(stack.Api(handler))
        return stack.request(application, path, "POST")

    def send(
        self,
        cell: str,
        kind: str = "cast",
        client: Client = our_client,
        *,
        timeout: float = 0.5,
        times: int = 1,
        between: Callable[[], object] = lambda: None,
        **arguments: Any,
    ) -> list[Outcome]:
        """Send messages in one request; those that fail do not end it."""
        outcomes: list[Outcome] = []

        def handler(context: oslo_context.RequestContext) -> None:
            for count in range(times):
                if count:
                    between()
                prepared = client(context).prepare(
                    server=HOST, timeout=timeout
                )
                method = getattr(prepared, kind)
                outcomes.append(self._send(context, method, arguments))

        response = self.request(cell, handler)
        assert response.status_int == 200, response
        assert len(outcomes) == times
        return outcomes

    def send_one(
        self,
        cell: str,
        kind: str = "cast",
        client: Client = our_client,
        *,
        timeout: float = 0.5,
        **arguments: Any,
    ) -> Outcome:
        """Send one message in a request of its own."""
        (outcome,) = self.send(
            cell, kind, client, timeout=timeout, **arguments
        )
        return outcome

    def _send(
        self, context: Any, method: Callable[..., Any], arguments: Any
    ) -> Outcome:
        number = self.next_number()
        error = result = None
        began = time.monotonic()
        try:
            result = method(
                context, "reboot_instance", number=number, **arguments
            )
        except (
            exceptions.CellMWError,
            oslo_messaging.MessagingException,
        ) as caught:
            error = caught
        seconds = time.monotonic() - began
        call = method.__name__ == "call"
        return Outcome(number, call, began, seconds, result, error)

    def next_number(self) -> int:
        with self._lock:
            return next(self._numbers)

    def guard(self, cell: str) -> GuardStats:
        """What the process says of a cell."""
        (found,) = [
            stats
            for stats in self.process.guards.stats()
            if stats.cell_uuid == cell
        ]
        return found

    def close(self) -> None:
        """Shut down; nothing that was opened is left."""
        (made,) = runtime.registry()
        process = made.process()
        leased = made.close(SOON)
        self.database.close()
        gc.collect()
        stack.eventually(lambda: process.closer.wait(0) == 0, within=SOON)
        total = process.pool.stats().total
        assert not leased
        assert total.opened == total.closed, total
        assert total.open == 0


class Inbox:
    """The queue of a compute host, which keeps what comes.

    Durable, as the exchange must be: ``amqp_durable_queues`` in the
    transport's URL.

    :param url: the vhost's, not through a proxy
    """

    def __init__(self, url: str) -> None:
        self._url = url.replace("rabbit://", "amqp://").partition("?")[0]
        exchange = kombu.Exchange("openstack", type="topic", durable=True)
        key = f"{stack.TOPIC}.{HOST}"
        self._queue = kombu.Queue(key, exchange, routing_key=key, durable=True)
        with self._channel() as channel:
            self._queue(channel).declare()

    def _channel(self) -> Any:
        connection = kombu.Connection(self._url, connect_timeout=5)
        return _Channel(connection)

    def numbers(self) -> list[int]:
        """Take out all messages; their numbers, in the order of arrival."""
        found = []
        with self._channel() as channel:
            queue = self._queue(channel)
            while (message := queue.get()) is not None:
                body = json.loads(message.payload["oslo.message"])
                found.append(body["args"]["number"])
                message.ack()
        return found

    def wait_for(self, count: int) -> list[int]:
        """As :meth:`numbers`, when so many have come."""
        found: list[int] = []
        deadline = time.monotonic() + SOON
        while len(found) < count:
            found += self.numbers()
            assert time.monotonic() < deadline, found
        return found


class _Channel:
    def __init__(self, connection: kombu.Connection) -> None:
        self._connection = connection

    def __enter__(self) -> Any:
        return self._connection.channel()

    def __exit__(self, *args: object) -> None:
        self._connection.release()


class Responder:
    """A compute host that answers."""

    def reboot_instance(self, ctxt: dict[str, Any], number: int) -> int:
        return number


def durable(url: str) -> str:
    """A transport URL whose messages outlive a restart of the broker."""
    return f"{url}?amqp_durable_queues=true"


def check_error(
    outcome: Outcome,
    wanted: type[exceptions.SendError],
    cell: str,
    secrets: tuple[str, ...],
) -> None:
    """It is of this class, helps who gets it, and shows nothing secret."""
    error = outcome.error
    assert type(error) is wanted, repr(error)
    assert isinstance(error, oslo_messaging.MessagingException)
    is_failure = isinstance(error, oslo_messaging.MessageDeliveryFailure)
    assert is_failure is error.maybe_delivered
    assert (error.cell_uuid, error.cell_name) == (cell, NAME)
    assert error.cause
    assert error.retry_after is not None
    assert error.retry_after > 0
    assert error.__cause__ is None
    assert error.__context__ is None
    shown = [str(error), repr(error), repr(vars(error)), *_frames(error)]
    for secret in secrets:
        assert secret not in "".join(shown)


def _frames(error: BaseException) -> Iterator[str]:
    for frame, line in traceback.walk_tb(error.__traceback__):
        if "/tests/" not in frame.f_code.co_filename:
            yield f"{frame.f_code.co_qualname}:{line} {frame.f_locals}"


def check_messages(outcomes: list[Outcome], arrived: list[int]) -> None:
    """What was reported of each message is true of it."""
    counts = {outcome.number: 0 for outcome in outcomes}
    for number in arrived:
        counts[number] += 1
    for outcome in outcomes:
        times = counts[outcome.number]
        allowed = {
            "delivered": (0, 1) if outcome.call else (1,),
            "uncertain": (0, 1),
            "not delivered": (0,),
        }[outcome.kind]
        assert times in allowed, (times, outcome)


def unique_name() -> str:
    return uuid.uuid4().hex
