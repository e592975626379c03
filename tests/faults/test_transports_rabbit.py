# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The pool on a real RabbitMQ, whose own list of connections is asserted.

S3, S5 and S7; S6, the forks, is in test_transports_forks.py.
"""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from wsgiref.util import FileWrapper

import oslo_messaging
import pytest
from oslo_messaging.transport import Transport

from cellmw import runtime
from cellmw.transports.pool import PoolStats
from tests import servers
from tests.fakes import PATIENCE, Records, Threads
from tests.faults.service import HOST, Responder, Service, our_client
from tests.functional import stack
from tests.proxy import Proxy

pytestmark = pytest.mark.servers

# What rabbitmqctl and a loaded machine may add to a bound, in seconds.
SLACK = 4.0
PASSWORD = "pass-not-for-logs"


@contextlib.contextmanager
def service_of(database: servers.Database, **paste: Any) -> Iterator[Service]:
    """A service that is not hasty and takes no cell as down."""
    service = Service(
        database, send_timeout=PATIENCE, breaker_failures=0, **paste
    )
    try:
        yield service
    finally:
        service.close()


def pool_stats(service: Service) -> PoolStats:
    return service.process.pool.stats()


def names(vhost: servers.Vhost) -> set[str]:
    """What the broker calls the connections to it."""
    return {row["name"] for row in vhost.connections()}


def count_of(
    broker: servers.Broker, user: str, vhosts: list[servers.Vhost]
) -> list[int]:
    """How many connections a user has to each, says the broker."""
    rows = broker.table("list_connections", "vhost", "user")
    return [
        rows.count({"vhost": vhost.name, "user": user}) for vhost in vhosts
    ]


class Witness(Responder):
    """A compute host that remembers which messages came to it."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def reboot_instance(self, ctxt: dict[str, Any], number: int) -> int:
        self.seen.append(number)
        return number


# S3


class Rotation:
    """Requests of one and of several messages, while the cell moves about."""

    def __init__(self, service: Service, urls: list[str]) -> None:
        self.service = service
        self.urls = urls
        self.cell = service.add_cell(urls[0])
        self.stop = threading.Event()
        self.requests: list[list[int]] = []
        self.failures: list[object] = []
        self.most_open = 0
        self.turns = 0

    def rotate(self) -> None:
        while not self.stop.wait(0.05):
            self.turns += 1
            url = self.urls[self.turns % len(self.urls)]
            self.service.database.change_cell(self.cell, transport_url=url)
            self.most_open = max(
                self.most_open, pool_stats(self.service).total.open
            )

    def work(self, seed: int) -> None:
        while not self.stop.is_set():
            for kind, times in (("cast", 3), ("call", 1), ("cast", 1)):
                outcomes = self.service.send(
                    self.cell, kind, timeout=PATIENCE, times=times
                )
                self.requests.append([one.number for one in outcomes])
                self.failures += [
                    one for one in outcomes if one.error is not None
                ]


@pytest.mark.parametrize(
    "seconds",
    [
        pytest.param(2.5, id="short"),
        pytest.param(
            60.0,
            id="full",
            marks=[pytest.mark.full, pytest.mark.timeout(600)],
        ),
    ],
)
def test_s3_the_cell_moves_every_50_ms(
    sqlite: servers.Database,
    broker: servers.Broker,
    make_vhost: Callable[[], servers.Vhost],
    seconds: float,
) -> None:
    vhosts = [make_vhost() for _ in range(3)]
    witnesses = [Witness() for _ in vhosts]
    with contextlib.ExitStack() as stack_:
        # The hosts have another, so that the broker tells who is who.
        user = stack_.enter_context(broker.new_user(PASSWORD))
        _permit(broker, user, vhosts)
        urls = [
            broker.url(vhost.name, user=user, password=PASSWORD)
            for vhost in vhosts
        ]
        for vhost, witness in zip(vhosts, witnesses, strict=True):
            stack_.enter_context(_serving(vhost.url, witness))
        service = stack_.enter_context(
            service_of(
                sqlite, cell_refresh_interval=0.05, instance_cache_for="all"
            )
        )
        load = Rotation(service, urls)
        with Threads() as threads:
            threads.start(load.rotate)
            for seed in range(4):
                threads.start(load.work, seed)
            time.sleep(seconds)
            load.stop.set()
        assert not load.failures
        _end_of_rotation(load)
        left = count_of(broker, user, vhosts)
        assert left.pop(load.turns % 3) > 0
        assert left == [0, 0]
        _no_request_is_mixed(load, witnesses)
        service.process.close(PATIENCE)
        assert count_of(broker, user, vhosts) == [0, 0, 0]


def _permit(
    broker: servers.Broker, user: str, vhosts: list[servers.Vhost]
) -> None:
    """As :meth:`servers.Broker.permit`, in one call of rabbitmqctl."""
    listed = ", ".join(f'<<"{vhost.name}">>' for vhost in vhosts)
    broker.ctl(
        "eval",
        "[ok = rabbit_auth_backend_internal:set_permissions("
        f'<<"{user}">>, V, <<".*">>, <<".*">>, <<".*">>, <<"tests">>) '
        f"|| V <- [{listed}]].",
    )


def _end_of_rotation(load: Rotation) -> None:
    """The broker has connections of the last generation only, and soon."""
    service = load.service
    service.process.directory.refresh()
    before = time.monotonic()
    stack.eventually(
        lambda: pool_stats(service).total.draining == 0, within=1 + SLACK
    )
    assert service.process.closer.wait(1 + SLACK) == 0
    assert time.monotonic() - before < 1 + SLACK
    assert service.send_one(load.cell).error is None
    total = pool_stats(service).total
    assert (total.open, total.leased) == (1, 0)
    assert total.opened > load.turns / 4
    # Those of a few generations, and no pile of them.
    assert load.most_open < 20


def _no_request_is_mixed(load: Rotation, witnesses: list[Witness]) -> None:
    sent = {number for numbers in load.requests for number in numbers}
    arrived = [number for witness in witnesses for number in witness.seen]
    stack.eventually(
        lambda: sent <= {n for witness in witnesses for n in witness.seen},
        within=PATIENCE,
    )
    assert len(arrived) == len(set(arrived))
    for numbers in load.requests:
        places = [
            place
            for place, witness in enumerate(witnesses)
            if not set(numbers).isdisjoint(witness.seen)
        ]
        assert len(places) == 1, (numbers, places)


@contextlib.contextmanager
def _serving(url: str, witness: Witness) -> Iterator[None]:
    transport = oslo_messaging.get_rpc_transport(stack.configuration(), url)
    server = oslo_messaging.get_rpc_server(
        transport,
        oslo_messaging.Target(topic=stack.TOPIC, server=HOST),
        [witness],
    )
    server.start()
    try:
        yield
    finally:
        server.stop()
        server.wait()
        transport.cleanup()


# S5


class Raised(Exception):
    """What an application raises."""


def _send(environ: dict[str, Any]) -> None:
    context = environ["cellmw.context"]
    client = our_client(context).prepare(server=HOST)
    client.cast(context, "reboot_instance", number=0)


def _generator(environ: dict[str, Any], start: Any) -> Iterator[bytes]:
    start("200 OK", [])
    yield b"1"
    _send(environ)
    yield b"2"


def _list(environ: dict[str, Any], start: Any) -> list[bytes]:
    _send(environ)
    start("200 OK", [])
    return [b"1", b"2"]


def _closing(environ: dict[str, Any], start: Any) -> Iterable[bytes]:
    _send(environ)
    start("200 OK", [])
    return io.BytesIO(b"1\n2\n")


def _not_modified(environ: dict[str, Any], start: Any) -> list[bytes]:
    _send(environ)
    start("304 Not Modified", [])
    return []


def _written(environ: dict[str, Any], start: Any) -> tuple[bytes, ...]:
    write = start("200 OK", [])
    write(b"1")
    _send(environ)
    return (b"2",)


def _file(environ: dict[str, Any], start: Any) -> Any:
    _send(environ)
    start("200 OK", [])
    return environ["wsgi.file_wrapper"](io.BytesIO(b"1\n2\n"))


def _raises_before(environ: dict[str, Any], start: Any) -> list[bytes]:
    _send(environ)
    raise Raised


def _raises_after(environ: dict[str, Any], start: Any) -> list[bytes]:
    _send(environ)
    start("200 OK", [])
    raise Raised


def _raises_while_iterated(
    environ: dict[str, Any], start: Any
) -> Iterator[bytes]:
    _send(environ)
    start("200 OK", [])
    yield b"1"
    raise Raised


def _restarts(environ: dict[str, Any], start: Any) -> list[bytes]:
    _send(environ)
    start("200 OK", [])
    try:
        raise Raised
    except Raised as error:
        start("500 Oops", [], (Raised, error, error.__traceback__))
    return [b"oops"]


APPLICATIONS = [
    _generator,
    _list,
    _closing,
    _not_modified,
    _written,
    _file,
    _raises_before,
    _raises_after,
    _raises_while_iterated,
    _restarts,
]


def _never(body: Any) -> None:
    pass


def _half(body: Any) -> None:
    next(iter(body), None)


def _whole(body: Any) -> None:
    with contextlib.suppress(Raised):
        list(body)


def _serve(application: Any, path: str, read: Any, method: str) -> None:
    """What a server does, to the letter or nearly so."""

    def start(status: str, headers: Any, exc_info: Any = None) -> Any:
        if exc_info is not None and "raise" in path:
            raise exc_info[1]
        return lambda data: None

    environ = stack.environ_of(path, method)
    environ["wsgi.file_wrapper"] = FileWrapper
    try:
        body = application(environ, start)
    except Raised:
        return
    if method != "HEAD":
        read(body)
    for _ in range(2):
        close = getattr(body, "close", None)
        if close is not None:
            close()


@pytest.mark.parametrize(
    "cache", ["true", "false"], ids=["cached", "uncached"]
)
def test_s5_every_end_of_a_response_gives_back_once(
    sqlite: servers.Database, vhost: servers.Vhost, cache: str
) -> None:
    requests = 0
    with service_of(sqlite, transport_cache=cache) as service:
        cell = service.add_cell(vhost.url)
        path = f"/servers/{service._instances[cell]}"
        for application in APPLICATIONS:
            filtered = service.filter(application)
            for read in (_never, _half, _whole):
                for method in ("GET", "HEAD"):
                    _serve(filtered, path, read, method)
                    requests += 1
                    stats = pool_stats(service)
                    assert stats.leases == 0, (application, read, method)
        stats = pool_stats(service)
        assert service.process.closer.wait(PATIENCE) == 0
        if cache == "true":
            assert stats.total.opened == 1
            # One of the sending kind is all that one thread at a time needs.
            assert len(names(vhost)) == 1
        else:
            assert requests / 2 < stats.total.opened <= requests
            assert names(vhost) == set()
    assert names(vhost) == set()


# S7


@pytest.fixture
def hanging(
    sqlite: servers.Database,
    vhost: servers.Vhost,
    make_proxy: Callable[[str], Proxy],
) -> Iterator[tuple[Service, str, Proxy]]:
    """A transport whose closing hangs until the proxy cuts its connection.

    What is sent through it is lost, and closing waits for an answer.
    """
    proxy = make_proxy(vhost.url)
    with service_of(sqlite, cell_refresh_interval=3600) as service:
        cell = service.add_cell(vhost.url_via(proxy.address))
        assert service.send_one(cell).error is None
        service.process.closer._budget = 0.3
        proxy.swallow()
        yield service, cell, proxy
        proxy.cut()
        assert service.process.closer.wait(PATIENCE) == 0


def test_s7_closing_that_hangs_delays_nobody(
    hanging: tuple[Service, str, Proxy], vhost: servers.Vhost
) -> None:
    service, cell, proxy = hanging
    service.database.change_cell(cell, transport_url=vhost.url)
    with Records() as records:
        service.process.directory.refresh()
        outcome = service.send_one(cell)
        assert outcome.error is None
        assert outcome.seconds < SLACK
        stack.eventually(
            lambda: pool_stats(service).total.hung == 1, within=SLACK
        )
        assert pool_stats(service).hanging == 1
        assert len(records.matching("its thread and its sockets stay")) == 1
        assert service.send_one(cell).error is None
        # The new one, and the one that is not closed yet.
        assert len(names(vhost)) == 2
        proxy.cut()
        stack.eventually(
            lambda: pool_stats(service).hanging == 0, within=PATIENCE
        )
    assert len(names(vhost)) == 1


@pytest.mark.usefixtures("hanging")
def test_s7_the_shutdown_ends_though_closing_hangs() -> None:
    started = time.monotonic()
    with Records() as records:
        (made,) = runtime.registry()
        assert made.close(1.0) == 0
    assert time.monotonic() - started < 1.0 + SLACK
    assert records.matching("1 still closing")
    # For the fixture, which asks for the one that there is.
    runtime.registry().get(made, lambda: made)


def test_s7_closing_that_raises_is_reported_and_over(
    sqlite: servers.Database,
    vhost: servers.Vhost,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = Transport.cleanup

    def fail(transport: Any) -> None:
        real(transport)
        raise OSError(f"lost {vhost.url}")

    with service_of(sqlite, transport_cache="false") as service:
        cell = service.add_cell(vhost.url)
        monkeypatch.setattr(Transport, "cleanup", fail)
        with Records() as records:
            for _ in range(3):
                assert service.send_one(cell).error is None
            assert service.process.closer.wait(PATIENCE) == 0
            stack.eventually(
                lambda: len(records.matching("failed: OSError")) == 3,
                within=PATIENCE,
            )
        monkeypatch.undo()
        assert not records.matching(vhost.broker.password + "@")
        assert pool_stats(service).total.closed == 3
        assert names(vhost) == set()
