# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Nothing secret leaves a service, and each place where it could is guarded.

The whole functional and fault suites run with canaries too, see
:mod:`tests.canary_plugin`; this is the short form, with the proof that the
canaries sing when scrubbing is switched off anywhere.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import oslo_messaging
import pytest
import sqlalchemy as sa
from oslo_config import cfg

from cellmw import exceptions, redaction, rpc
from cellmw.cells.mapping import CellMapping
from tests import canary as canaries
from tests import servers
from tests.canary import Canary, assert_nothing_leaked
from tests.functional import stack

CLIENT = rpc.get_client(oslo_messaging.Target(topic=stack.TOPIC))


def _url(password: str, where: str = "127.0.0.1:1/vh") -> str:
    return f"rabbit://nova:{quote(password, safe='')}@{where}"


@pytest.fixture
def _as_before() -> Iterator[None]:
    """Other tests see the logging that they saw without this one."""
    factory = logging.getLogRecordFactory()
    on_hold = redaction.KNOWN.on_hold
    yield
    redaction.KNOWN.on_hold = on_hold
    logging.setLogRecordFactory(factory)


def _try_all_ways_out(canary: Canary, password: str) -> None:
    """Each way out of a process, once, for a password and its URL."""
    logging.getLogger("sqlalchemy").setLevel(1)
    url = _url(password)
    log = logging.getLogger("nova")
    # Before anybody knows it.
    with sa.create_engine("sqlite://").connect() as connection:
        connection.execute(sa.text("select :url"), {"url": url}).one()
    secret = redaction.Secret(url)
    with redaction.KNOWN.hold(secret, names=["cell 1"]):
        log.debug("It is %s", password)
        log.debug("It begins with %.3s", password)
        _fail(canary, log, url, password)
    canary.saw_object("value", secret)
    canary.saw_object(
        "value",
        CellMapping(uuid="c", transport_url=secret, name="n"),
    )
    canary.saw("printed: stdout", redaction.redact_url(url))


def _fail(
    canary: Canary, log: logging.Logger, url: str, password: str
) -> None:
    try:
        # The variable of a library's frame holds it, its message does not.
        oslo_messaging.TransportURL.parse(cfg.ConfigOpts(), f"//{url}")
    except Exception:
        log.exception("It failed")
    try:
        # oslo.log passes over the commonest ones.
        raise RuntimeError(f"It is {password}")
    except RuntimeError as error:
        log.exception("It failed")
        log.warning("It failed")
        log.handle(
            logging.getLogRecordFactory()(
                *("nova", 10, "", 0, "It failed", (), None, None),
                sinfo=f"It is {password}",
            )
        )
        ours = exceptions.CellUnavailable(redaction.describe(error))
    canary.saw_error("raised", ours)


@pytest.mark.parametrize("kind", canaries.KINDS)
@pytest.mark.usefixtures("_as_before")
def test_nothing_leaves_by_any_way(
    canary: Canary, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    redaction.install()
    _try_all_ways_out(canary, canary.password("cell 1", kind))
    assert_nothing_leaked(canary)
    assert canary.seen["log"] > 10_000
    assert canary.seen["raised"] > 100
    assert canary.seen["value"] > 100


@pytest.mark.parametrize("place", canaries.PLACES)
@pytest.mark.usefixtures("_as_before")
def test_it_leaves_where_scrubbing_is_switched_off(place: str) -> None:
    canary = Canary()
    with pytest.MonkeyPatch.context() as patch, canary.listening():
        canaries.PLACES[place](patch)
        redaction.install()
        _try_all_ways_out(canary, canary.password("cell 1", "plus"))
    assert canary.leaks


@pytest.mark.usefixtures("_as_before")
def test_it_leaves_where_nothing_is_installed() -> None:
    canary = Canary()
    redaction.KNOWN.on_hold = bool
    logging.setLogRecordFactory(logging.LogRecord)
    with canary.listening():
        _try_all_ways_out(canary, canary.password("cell 1", "plus"))
    assert canary.leaks


@pytest.fixture
def cells(
    canary: Canary, api_database: stack.ApiDatabase
) -> Callable[..., str]:
    """Adds a cell with this URL; gives the path of an instance in it."""

    def add(url: str | None) -> str:
        cell = api_database.add_cell(url, name="cell\none")
        return f"/servers/{api_database.add_instance(cell)}"

    return add


def _cast(context: Any) -> None:
    CLIENT.cast(context, "reboot_instance", instance_uuid="i")


class _Handlers:
    """What applications do with what they got, all of them seen."""

    def __init__(self, canary: Canary) -> None:
        self._canary = canary

    def __call__(self, context: Any) -> str:
        canary, log = self._canary, logging.getLogger("nova.api")
        canary.saw_object("context", context)
        canary.saw_object("handle", context.mq_connection)
        log.debug("Serving %s with %s", context, vars(context))
        try:
            _cast(context)
        except Exception as error:
            canary.saw_error("raised", error)
            log.exception("Casting failed: %s", error)
            log.warning("Casting failed")
            raise
        return "done"


def _request(canary: Canary, application: Any, path: str) -> int:
    response = stack.request(application, path, "POST")
    canary.saw_response(response.status, response.headers, response.body)
    return int(response.status_int)


@pytest.mark.servers
@pytest.mark.usefixtures("_as_before")
def test_nothing_leaves_a_service_that_serves_and_fails(
    canary: Canary,
    broker: servers.Broker,
    make_vhost: Callable[[], servers.Vhost],
    cells: Callable[..., str],
    make_filter: stack.MakeFilter,
) -> None:
    vhost = make_vhost()
    api = make_filter(send_timeout="3")(stack.Api(_Handlers(canary)))
    passwords = {kind: canary.password(kind, kind) for kind in canaries.KINDS}
    with broker.new_user(passwords["at"]) as user:
        broker.permit(vhost.name, user=user)
        good = broker.url(vhost.name, user=user, password=passwords["at"])
        assert _request(canary, api, cells(good)) == 200
    wrong = [
        # Nobody lets this one in, nobody answers there.
        broker.url(vhost.name, user=user, password=passwords["comma"]),
        _url(passwords["space"], f"127.0.0.1:{servers.free_port()}/vh"),
        # Nobody encoded it.
        f"rabbit://nova:{passwords['hash and question']}@127.0.0.1:1/vh",
        f"rabbit://nova:{passwords['quotes']}@127.0.0.1:1/vh",
        f"nosuch://nova:{quote(passwords['unicode'])}@127.0.0.1/vh",
        f"rabbit://{{nosuch}}:{passwords['percent']}@{{hostname}}/vh",
        f"{passwords['braces']}",
        f"rabbit://nova:{quote(passwords['ampersand'])}@h:1/vh?no_such=x",
    ]
    for url in wrong:
        assert _request(canary, api, cells(url)) == 503, redaction.redact_url(
            url
        )


@pytest.mark.parametrize(
    "url",
    [
        # Written without its host.
        lambda canary: f"rabbit://nova:{canary.password('cell', 'plus')}",
        lambda canary: f"rabbit://nova@h:{canary.password('cell', 'plus')}",
        # oslo.messaging leaves a slash as it is in what it hands to kombu.
        lambda canary: _url(canary.password("cell", "slash")),
        # It takes a host with two colons for an IPv6 address.
        lambda canary: f"rabbit://u:p@h:{canary.password('c', 'colon')}",
    ],
)
@pytest.mark.usefixtures("_as_before")
def test_nothing_leaves_where_the_driver_cannot_use_a_url(
    url: Callable[[Canary], str],
    api_database: stack.ApiDatabase,
    make_filter: stack.MakeFilter,
) -> None:
    canary = Canary()
    cell = api_database.add_cell(url(canary))
    path = f"/servers/{api_database.add_instance(cell)}"
    api = make_filter(send_timeout="3")(stack.Api(_Handlers(canary)))
    with canary.listening():
        assert _request(canary, api, path) == 503
    assert_nothing_leaked(canary)


@pytest.mark.parametrize("kind", canaries.KINDS)
@pytest.mark.usefixtures("_as_before")
def test_nothing_leaves_where_the_database_cannot_be_asked(
    canary: Canary, kind: str, make_filter: stack.MakeFilter
) -> None:
    password = quote(canary.password("the API database", kind), safe="")
    url = f"mysql+pymysql://nova:{password}@127.0.0.1:1/nova_api"
    api = make_filter(database=url, lookup_timeout="2")(
        stack.Api(_Handlers(canary))
    )
    path = "/servers/6f5f1b0a-9c0c-4b8b-8a8c-0c1c5f8f7d11"
    assert _request(canary, api, path) == 503
