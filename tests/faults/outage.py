# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Twenty cells behind one API, and what an outage of one does to the others.

All but one of the cells are vhosts of the shared broker; the last has a broker
of its own, behind a proxy.  The API is served over HTTP by so many threads and
no more, as a server in production has it; its clients and the compute hosts
are processes of their own.

:class:`Api` owns all of it.  :meth:`Api.outage` breaks the one cell under
traffic, lets it be broken for a while, and heals it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import http.client
import itertools
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self
from urllib import parse

import oslo_messaging

from cellmw import runtime
from cellmw.demo import web
from cellmw.transports.guard import GuardStats
from tests import servers
from tests.faults import hosts
from tests.faults.service import CLIENTS, SOON, Service
from tests.functional import stack
from tests.proxy import Proxy

CELLS = 20
THREADS = 32
# Each waits for its answer.  Those of the cell that breaks are others than
# those of the healthy ones, and so many that what they ask for does not become
# less while they wait.
CLIENTS_OF_HEALTHY, CLIENTS_OF_BROKEN = 32, 40
# What the call waits for that is under way when a broker dies, in seconds.
LONG_CALL = 1.0

OPTIONS = {
    "send_timeout": 2.0,
    "breaker_failures": 5,
    "breaker_reset_after": 5.0,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Broken:
    """The cell that is broken: its broker, and the proxy before it."""

    broker: servers.PrivateBroker
    proxy: Proxy

    def refuse(self) -> None:
        self.proxy.refuse()

    def swallow(self) -> None:
        self.proxy.swallow()

    def hang(self) -> None:
        self.broker.pause()

    def raise_alarm(self) -> None:
        self.broker.raise_memory_alarm()

    def die(self) -> None:
        self.broker.kill()

    def heal(self) -> None:
        """As it was; what the network has lost is reset at last."""
        self.broker.heal()
        self.proxy.restore()
        self.proxy.cut()


# By what an operator calls it.
KINDS: dict[str, Callable[[Broken], None]] = {
    "refuses": Broken.refuse,
    "swallows packets": Broken.swallow,
    "hangs": Broken.hang,
    "memory alarm": Broken.raise_alarm,
    "dies during a call": Broken.die,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Phase:
    """What clients of the healthy cells saw for a while.

    :ivar seconds: how long it was
    :ivar took: seconds of each request that was answered as it should be
    :ivar others: statuses of the other ones
    """

    seconds: float
    took: tuple[float, ...]
    others: tuple[int, ...]

    def __add__(self, other: Phase) -> Phase:
        """Both together: the same phase of several outages."""
        return Phase(
            self.seconds + other.seconds,
            self.took + other.took,
            self.others + other.others,
        )

    @property
    def throughput(self) -> float:
        """Answers in a second."""
        return len(self.took) / self.seconds

    @property
    def p99(self) -> float:
        """Seconds that one in a hundred took, or longer."""
        if len(self.took) < 2:
            return 0.0
        return statistics.quantiles(self.took, n=100)[-1]


@dataclasses.dataclass(frozen=True, slots=True)
class Outage:
    """What an outage did.

    :ivar phases: by name, in their order: ``before``; ``opening``, until the
        cell is marked down; ``during``; ``recovery``, until it is not any
        more; ``after``
    :ivar held: the longest that a request for the broken cell held a thread
        of the server with a cast, and with a call; seconds
    :ivar refused: requests for the broken cell that were refused at once or
        failed, by status
    """

    phases: dict[str, Phase]
    held: dict[str, float]
    refused: dict[int, int]


class _Server(web._Server):
    """Serves with a fixed number of threads; who finds none waits."""

    def __init__(self, application: Any) -> None:
        super().__init__((web.HOST, 0), web._Handler)
        self.set_app(application)
        self.threads = concurrent.futures.ThreadPoolExecutor(THREADS)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.threads.submit(
            self.process_request_thread, request, client_address
        )


class Child:
    """A module of ours in a process of its own; ends with its input."""

    def __init__(self, module: str, wanted: object) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", module],
            cwd=Path(__file__).resolve().parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(f"{json.dumps(wanted)}\n")
        self._process.stdin.flush()

    def line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def end(self) -> str:
        """All that it has printed, when it has ended."""
        try:
            output, _ = self._process.communicate(timeout=60)
        finally:
            self._process.kill()
        return output


class Api:
    """The API with its cells, hosts and clients.

    :param database: the API database
    :param broken: what the last cell's broker is
    :param clients: the RPC clients to send with, by turns: names in
        :data:`tests.faults.service.CLIENTS`
    :param rate: requests in a second, to all cells together
    :param reply: seconds for which a call waits for its reply
    """

    def __init__(
        self,
        database: servers.Database,
        broken: Broken,
        *,
        clients: tuple[str, ...] = tuple(CLIENTS),
        rate: float = 150.0,
        reply: float = 2.0,
        **options: Any,
    ) -> None:
        self._broken = broken
        self._clients = clients
        self._rate = rate
        self._reply = reply
        self.options = OPTIONS | options
        self._owned = contextlib.ExitStack()
        self._held: list[tuple[str, str, float, float]] = []
        try:
            self._set_up(database)
        except BaseException:
            self._owned.close()
            raise

    def _set_up(self, database: servers.Database) -> None:
        own = self._owned
        shared = servers.shared_broker()
        vhosts = [
            own.enter_context(shared.vhost()).url for _ in range(CELLS - 1)
        ]
        vhost = own.enter_context(self._broken.broker.vhost())
        through_proxy = vhost.url_via(self._broken.proxy.address)
        self._hosts = Child("tests.faults.hosts", [*vhosts, vhost.url])
        own.callback(self._hosts.end)
        self.service = Service(database, **self.options)
        own.callback(self.service.close)
        self.cells = [
            self.service.add_cell(url, name=f"cell-{number}")
            for number, url in enumerate([*vhosts, through_proxy])
        ]
        assert self._hosts.line() == "ready"
        # What is opened and imported at first is no part of any outage.
        for cell in self.cells:
            for kind in ("cast", "call"):
                self._warm(cell, kind)
        self._serve()

    def _warm(self, cell: str, kind: str) -> None:
        def handler(context: Any) -> None:
            for client in self._clients:
                prepared = CLIENTS[client](context).prepare(
                    server=hosts.SERVER, timeout=SOON
                )
                send = getattr(prepared, kind)
                send(context, "get_console_output", cell=0)

        assert self.service.request(cell, handler).status_int == 200

    def _serve(self) -> None:
        server = _Server(self._timed(self.service.filter(self._application)))
        thread = threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.05}
        )
        thread.start()
        self._port = server.server_port

        def stop() -> None:
            server.shutdown()
            thread.join()
            server.server_close()
            server.threads.shutdown()

        self._owned.callback(stop)

    def _timed(self, application: Any) -> Any:
        """Note how long each request has its thread."""

        def served(environ: Any, start_response: Any) -> Any:
            began = time.monotonic()
            try:
                return application(environ, start_response)
            finally:
                kind = parse.parse_qs(environ["QUERY_STRING"])["kind"][0]
                path = environ["PATH_INFO"]
                took = time.monotonic() - began
                self._held.append((path, kind, began, took))

        return served

    def _application(self, environ: Any, start_response: Any) -> list[bytes]:
        """An API as its developer would write it, but for the choice."""
        asked = parse.parse_qs(environ["QUERY_STRING"])
        context = environ["cellmw.context"]
        client = CLIENTS[asked["client"][0]](context)
        prepared = client.prepare(server=hosts.SERVER, timeout=self._reply)
        number = int(asked["cell"][0])
        status = "202 Accepted"
        try:
            if asked["kind"][0] == "cast":
                prepared.cast(context, "reboot_instance", number=number)
            elif "seconds" in asked:
                seconds = float(asked["seconds"][0])
                prepared.call(context, "take_a_snapshot", seconds=seconds)
            else:
                status = "200 OK"
                found = prepared.call(
                    context, "get_console_output", cell=number
                )
                assert found == number
        except oslo_messaging.MessagingTimeout:
            status = "504 Gateway Timeout"
        start_response(status, [("Content-Length", "0")])
        return [b""]

    def _paths(self, number: int) -> list[str]:
        instance = self.service.instance(self.cells[number])
        return [
            f"/v2.1/servers/{instance}/action?"
            f"cell={number}&kind={kind}&client={client}"
            for kind in ("cast", "call")
            for client in self._clients
        ]

    def guard(self) -> GuardStats | None:
        """What the process knows of the broken cell."""
        (made,) = runtime.registry()
        for stats in made.process().guards.stats():
            if stats.cell_uuid == self.cells[-1]:
                return stats
        return None

    @property
    def down(self) -> bool:
        """Whether the broken cell is marked down."""
        stats = self.guard()
        return stats is not None and stats.down

    def outage(self, kind: str, seconds: float) -> Outage:
        """Break the one cell under traffic, and heal it.

        :param kind: in :data:`KINDS`
        :param seconds: how long ``before``, ``during`` and ``after`` last
        """
        clients = Child(
            "tests.faults.load",
            {
                "port": self._port,
                "paths": [self._paths(n) for n in range(CELLS)],
                "groups": [
                    {
                        "cells": list(range(CELLS - 1)),
                        "clients": CLIENTS_OF_HEALTHY,
                        "rate": self._rate * (CELLS - 1) / CELLS,
                    },
                    {
                        "cells": [CELLS - 1],
                        "clients": CLIENTS_OF_BROKEN,
                        "rate": self._rate / CELLS,
                    },
                ],
            },
        )
        marks = []
        try:
            assert clients.line() == "ready"
            # These sleeps wait for nothing: they are how long the traffic of
            # a phase lasts.  The first is for clients to get under way.
            time.sleep(1.0)
            marks.append(("before", time.monotonic()))
            time.sleep(seconds)
            with self._long_call(kind):
                marks.append(("opening", time.monotonic()))
                KINDS[kind](self._broken)
                stack.eventually(lambda: self.down, within=SOON)
            marks.append(("during", time.monotonic()))
            time.sleep(seconds)
            marks.append(("recovery", time.monotonic()))
            self._broken.heal()
            stack.eventually(lambda: not self.down, within=2 * SOON)
            marks.append(("after", time.monotonic()))
            time.sleep(seconds)
            marks.append(("end", time.monotonic()))
        except BaseException:
            # Not twice: that cuts the connections made since.
            self._broken.heal()
            raise
        finally:
            printed = clients.end()
        return self._tell(marks, json.loads(printed))

    @contextlib.contextmanager
    def _long_call(self, kind: str) -> Iterator[None]:
        """A call to the broken cell that is under way when it breaks."""
        if "call" not in kind:
            yield
            return
        path = f"{self._paths(CELLS - 1)[-1]}&seconds={LONG_CALL}"
        connection = self._request(path)
        stats = self.guard()
        assert stats is not None
        stack.eventually(lambda: (self.guard() or stats).under_way > 0)
        time.sleep(LONG_CALL / 4)
        yield
        connection.getresponse().read()
        connection.close()

    def ask_broken(self) -> list[int]:
        """One request of each kind for the cell that breaks: the statuses."""
        found = []
        for path in self._paths(CELLS - 1):
            connection = self._request(path)
            response = connection.getresponse()
            response.read()
            found.append(response.status)
            connection.close()
        return found

    def _request(self, path: str) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(web.HOST, self._port)
        connection.request("POST", path)
        return connection

    def _tell(
        self,
        marks: list[tuple[str, float]],
        done: list[tuple[int, float, float, int]],
    ) -> Outage:
        phases = {}
        for (name, began), (_, ended) in itertools.pairwise(marks):
            phases[name] = _phase(
                ended - began,
                [
                    one
                    for one in done
                    if one[0] != CELLS - 1 and began <= one[1] < ended
                ],
            )
        times = dict(marks)
        broken = [one for one in done if one[0] == CELLS - 1]
        refused: dict[int, int] = {}
        for _, sent, _, status in broken:
            if status not in (200, 202) and sent >= times["opening"]:
                refused[status] = refused.get(status, 0) + 1
        return Outage(phases, self._longest(times["opening"]), refused)

    def _longest(self, since: float) -> dict[str, float]:
        mine = self.service.instance(self.cells[-1])
        return {
            kind: max(
                (
                    took
                    for path, of_kind, began, took in list(self._held)
                    if mine in path and of_kind == kind and began >= since
                ),
                default=0.0,
            )
            for kind in ("cast", "call")
        }

    def close(self) -> None:
        """End it all."""
        self._owned.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _phase(seconds: float, done: list[tuple[int, float, float, int]]) -> Phase:
    return Phase(
        seconds,
        tuple(one[2] for one in done if one[3] in (200, 202)),
        tuple(one[3] for one in done if one[3] not in (200, 202)),
    )
