# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""``cellmw-demo --check``: drive the API, and see where each message went.

A request is told from the others by the id that the pipeline gives it, which
travels with its message.  Every host has the same name, so a message that
went to another cell's queue, or to the service's own, is taken and noted
there; one that went nowhere is missed.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import http.client
import itertools
import json
from collections.abc import Iterator
from typing import Any
from urllib import parse

from cellmw.demo import keystone
from cellmw.demo.hosts import HOST_NAME, Received
from cellmw.demo.site import CELL0, Instance, Site

REQUEST_ID = "x-openstack-request-id"
REBOOT = {"reboot": {"type": "SOFT"}}
CONSOLE: dict[str, Any] = {"os-getConsoleOutput": {}}
# How long a message may be on its way, in seconds.
_PATIENCE = 10.0
_CROWD_THREADS = 8
_CROWD_REQUESTS = 240
# Of those that go wrong in the crowd, this many are told.
_SHOWN = 5


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """A request, and what is to come of it.

    :ivar instance: None: it names none
    :ivar method: what the host is asked for; None: no message is sent
    """

    verb: str
    path: str
    title: str
    status: int
    instance: Instance | None = None
    method: str | None = None
    body: Any = None
    token: str | None = keystone.TOKEN


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it.

    :ivar received: the messages of this request, wherever they arrived
    :ivar wrong: what is not as it should be
    """

    request: Request
    status: int
    received: list[Received]
    wrong: str | None


def requests_of(instance: Instance) -> Iterator[Request]:
    """What can be done with an instance, deleting it last."""
    path = f"/v2.1/servers/{instance.uuid}"
    action = f"{path}/action"
    yield Request("GET", path, "show", 200, instance, "get_instance")
    yield Request(
        "POST", action, "reboot", 202, instance, "reboot_instance", REBOOT
    )
    yield Request(
        "POST",
        action,
        "console output",
        200,
        instance,
        "get_console_output",
        CONSOLE,
    )
    yield Request("DELETE", path, "delete", 204, instance, "delete_instance")


def refused(instance: Instance) -> Iterator[Request]:
    """What is refused, and sends nothing."""
    action = f"/v2.1/servers/{instance.uuid}/action"
    if instance.cell == CELL0:
        yield Request("POST", action, "reboot", 503, instance, body=REBOOT)
    else:
        yield Request(
            "POST",
            action,
            "reboot, no token",
            401,
            instance,
            body=REBOOT,
            token=None,
        )


class Check:
    """Drives one site and keeps what came of it."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._address = parse.urlsplit(site.url).netloc
        self.outcomes: list[Outcome] = []

    def run(self) -> bool:
        """Send it all, and print it.  Gives whether all of it is right."""
        built = [i for i in self._site.instances if i.cell != CELL0]
        never_built = [i for i in self._site.instances if i.cell == CELL0]
        # Stage by stage, so that each request is for another cell than the
        # one before.
        shows, reboots, outputs, deletes = zip(
            *(requests_of(instance) for instance in built), strict=True
        )
        print(_ROW.format("REQUEST", "INSTANCE", "CELL", "ANSWERED BY"))
        self._one_by_one(
            Request("GET", "/v2.1/servers", "list", 200),
            *refused(built[0]),
            *refused(never_built[0]),
        )
        self._one_by_one(*shows, *reboots, *outputs)
        # Many at once, so that something is mixed up if it can be.
        crowd = list(
            itertools.islice(
                itertools.cycle((*reboots, *outputs)), _CROWD_REQUESTS
            )
        )
        with concurrent.futures.ThreadPoolExecutor(_CROWD_THREADS) as threads:
            outcomes = list(threads.map(self._send, crowd))
        self.outcomes += outcomes
        self._one_by_one(*deletes)
        wrong = [outcome for outcome in outcomes if outcome.wrong]
        print(
            f"\n{len(crowd)} more, from {_CROWD_THREADS} threads at once: "
            f"{len(crowd) - len(wrong)} right, {len(wrong)} wrong"
        )
        for outcome in wrong[:_SHOWN]:
            print(_row(outcome))
        return self._verdict()

    def _one_by_one(self, *plan: Request) -> None:
        for request in plan:
            outcome = self._send(request)
            self.outcomes.append(outcome)
            print(_row(outcome), flush=True)

    def _send(self, request: Request) -> Outcome:
        headers = {"Content-Type": "application/json"}
        if request.token is not None:
            headers["X-Auth-Token"] = request.token
        connection = http.client.HTTPConnection(
            self._address, timeout=2 * _PATIENCE
        )
        try:
            connection.request(
                request.verb,
                request.path,
                None if request.body is None else json.dumps(request.body),
                headers,
            )
            response = connection.getresponse()
            body = response.read()
        except OSError as error:
            return Outcome(request, 0, [], f"no answer: {error}")
        finally:
            connection.close()
        received = self._site.ledger.of(
            response.headers.get(REQUEST_ID, ""),
            count=0 if request.method is None else 1,
            timeout=_PATIENCE,
        )
        wrong = _judge(request, response.status, body, received)
        return Outcome(request, response.status, received, wrong)

    def _verdict(self) -> bool:
        wrong = sum(outcome.wrong is not None for outcome in self.outcomes)
        expected = collections.Counter(
            (request.instance.cell, request.method, request.instance.uuid)
            for request in (outcome.request for outcome in self.outcomes)
            if request.instance is not None and request.method is not None
        )
        arrived = collections.Counter(
            (received.cell, received.method, received.instance_uuid)
            for received in self._site.ledger.all()
        )
        strays = (arrived - expected).total()
        missing = (expected - arrived).total()
        if wrong or strays or missing:
            print(
                f"\nFAILED: {wrong} of {len(self.outcomes)} requests went "
                f"wrong; {strays} messages arrived where none belongs, "
                f"{missing} are missing."
            )
            return False
        print(
            f"\nOK: {len(self.outcomes)} requests, {expected.total()} "
            "messages, each at the host in its instance's cell and nowhere "
            "else."
        )
        return True


def _judge(
    request: Request, status: int, body: bytes, received: list[Received]
) -> str | None:
    """What is wrong, or None."""
    if status != request.status:
        return f"answered {status} instead of {request.status}"
    if request.method is None or request.instance is None:
        return "a message was sent" if received else None
    if not received:
        return "its message arrived nowhere"
    cell = request.instance.cell
    right = (cell, request.method, request.instance.uuid)
    for found in received:
        if (found.cell, found.method, found.instance_uuid) != right:
            return f"its message is for {cell}, and is in {found.cell}"
    if len(received) > 1:
        return f"its message arrived {len(received)} times"
    if request.status == 200:
        answered = json.loads(body)
        answered = answered.get("server", answered)
        if (answered["host"], answered["cell"]) != (HOST_NAME, cell):
            return f"another host's reply, from {answered['cell']}"
    return None


_ROW = "{:<17} {:<21} {:<6} {}"


def _row(outcome: Outcome) -> str:
    request, instance = outcome.request, outcome.request.instance
    hosts = ", ".join(f"{r.host} in {r.cell}" for r in outcome.received)
    text = _ROW.format(
        request.title,
        f"{instance.name} {instance.uuid[:8]}" if instance else "-",
        instance.cell if instance else "-",
        hosts or f"nobody, no message ({outcome.status})",
    )
    return f"{text}   WRONG: {outcome.wrong}" if outcome.wrong else text
