# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What really arrived at a broker, beside what senders were told.

The hosts of a cell take their messages out of their own queue.  A
:class:`Witness` binds a second queue to the same key, from which nobody
reads, so it holds one copy of each message as often as the broker took it.
A message that expires there moves on to another queue and is counted too.
"""

from __future__ import annotations

import collections
import json
import time
from typing import Self

import kombu

from tests import servers
from tests.faults.service import HOST, Outcome
from tests.functional import stack

# Nothing arrives any more when so many looks in a row have found nothing, with
# so many seconds between them.
_LOOKS, _PAUSE = 5, 0.1


class Witness:
    """Counts the messages for one host, by their number.

    :param url: the vhost's transport URL, not through a proxy
    """

    def __init__(self, url: str) -> None:
        self._url = url.replace("rabbit://", "amqp://").partition("?")[0]
        late = servers.unique("late")
        exchange = kombu.Exchange("openstack", type="topic", durable=True)
        self._queues = [
            kombu.Queue(
                servers.unique("witness"),
                exchange,
                routing_key=f"{stack.TOPIC}.{HOST}",
                durable=True,
                queue_arguments={
                    "x-dead-letter-exchange": "",
                    "x-dead-letter-routing-key": late,
                },
            ),
            kombu.Queue(late, durable=True),
        ]
        with self._connect() as connection:
            for queue in self._queues:
                queue(connection.default_channel).declare()

    def _connect(self) -> kombu.Connection:
        return kombu.Connection(self._url, connect_timeout=5)

    def arrived(self) -> collections.Counter[int]:
        """Take out all messages, until nothing more arrives."""
        found: collections.Counter[int] = collections.Counter()
        with self._connect() as connection:
            queues = [q(connection.default_channel) for q in self._queues]
            looks_in_vain = 0
            while looks_in_vain < _LOOKS:
                before = found.total()
                for queue in queues:
                    while message := queue.get(no_ack=True):
                        body = json.loads(message.payload["oslo.message"])
                        found[body["args"]["number"]] += 1
                looks_in_vain += 1
                if found.total() > before:
                    looks_in_vain = 0
                time.sleep(_PAUSE)
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        with self._connect() as connection:
            for queue in self._queues:
                queue(connection.default_channel).delete()


def contradictions(
    outcomes: list[Outcome], arrived: collections.Counter[int]
) -> list[str]:
    """What was said of a message and is not true of it."""
    allowed = {
        "delivered": (1,),
        "no reply": (1,),
        "uncertain": (0, 1),
        "not delivered": (0,),
    }
    wrong = [
        f"{outcome.verdict}, and arrived {arrived[outcome.number]} times: "
        f"{outcome}"
        for outcome in outcomes
        if arrived[outcome.number] not in allowed[outcome.verdict]
    ]
    known = {outcome.number for outcome in outcomes}
    wrong += [
        f"nobody sent {number}" for number in arrived if number not in known
    ]
    return wrong
