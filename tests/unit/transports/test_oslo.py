# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What is known of oslo.messaging's inside holds, on its own code."""

from __future__ import annotations

import traceback
from pathlib import Path

import oslo_messaging
import pytest
from oslo_config import cfg
from oslo_messaging._drivers import impl_rabbit
from oslo_messaging.transport import RPCTransport

from cellmw import exceptions
from cellmw.cells.mapping import Generation
from cellmw.redaction import Secret
from cellmw.transports import oslo
from cellmw.workers import Workers

UUID = "11111111-1111-1111-1111-111111111111"
PASSWORD = "s3cr3t-p4ssw0rd"
LONG = 30.0


@pytest.mark.parametrize(
    "lines, found",
    [
        ("", None),
        ("transport_url =", ""),
        ("transport_url = rabbit://", "rabbit://"),
        ("transport_url = rabbit://u:p@h/v", "rabbit://u:p@h/v"),
    ],
)
def test_only_a_url_that_somebody_has_set_is_filled_in(
    tmp_path: Path, lines: str, found: str | None
) -> None:
    path = tmp_path / "service.conf"
    path.write_text(f"[DEFAULT]\n{lines}\n", "utf-8")
    conf = cfg.ConfigOpts()
    conf([], project="cellmw-test", default_config_files=[str(path)])
    oslo.prepare(conf)
    assert oslo.base_url(conf) == found


def test_a_url_that_a_service_sets_in_its_code_is_filled_in() -> None:
    conf = cfg.ConfigOpts()
    conf([], project="cellmw-test", default_config_files=[])
    oslo.prepare(conf)
    conf.set_override("transport_url", "rabbit://u:p@h/v")
    assert oslo.base_url(conf) == "rabbit://u:p@h/v"


@pytest.fixture(scope="module")
def conf() -> cfg.ConfigOpts:
    conf = cfg.ConfigOpts()
    conf([], project="cellmw-test", default_config_files=[])
    oslo.prepare(conf)
    return conf


# Making transports


@pytest.mark.parametrize("hosts,retries", [(0, 0), (1, 0), (3, 2)])
@pytest.mark.parametrize("asked", [None, 0, 7])
def test_a_connection_tries_each_host_once_when_it_is_opened(
    conf: cfg.ConfigOpts,
    monkeypatch: pytest.MonkeyPatch,
    hosts: int,
    retries: int,
    asked: int | None,
) -> None:
    opened: list[tuple[str, int]] = []

    def init(
        self: object, conf: object, url: object, purpose: str, retry: int
    ) -> None:
        opened.append((purpose, retry))

    monkeypatch.setattr(impl_rabbit.Connection, "__init__", init)
    url = "rabbit://" + ",".join(f"h{n}" for n in range(hosts)) + "/"
    transport = open_transport(conf, url)
    pool = transport._driver._connection_pool
    pool.create("listen")
    pool.create(retry=asked)
    assert opened == [("listen", retries), ("send", retries)]


def open_transport(
    conf: cfg.ConfigOpts, url: str, *, one_request: bool = False
) -> RPCTransport:
    made = oslo.OsloTransports(conf, (), Workers())
    return made.open(Generation.of(UUID, Secret(url)), one_request)


def test_a_reply_queue_of_one_request_does_not_stay(
    conf: cfg.ConfigOpts,
) -> None:
    def ttl(url: str, one_request: bool) -> int:
        transport = open_transport(conf, url, one_request=one_request)
        value = transport._driver.conf.oslo_messaging_rabbit
        seconds: int = value.rabbit_transient_queues_ttl
        return seconds

    assert ttl("rabbit://", True) == oslo.ONE_REQUEST_QUEUE_TTL
    assert ttl("rabbit://", False) == 1800
    asked = "rabbit://h/?rabbit_transient_queues_ttl=60"
    assert ttl(asked, True) == 60


@pytest.mark.parametrize(
    "url,reason",
    [
        (f"rabbit://u:{PASSWORD}@h:port/", "cannot be parsed"),
        (f"rabbit://u:{PASSWORD}@[h/", "cannot be parsed"),
        (f"unheard-of://u:{PASSWORD}@h/", "driver"),
        (f"rabbit://u:{PASSWORD}@h/?unheard_of=1", "query"),
        (f"rabbit://u:{PASSWORD}@h/?heartbeat_rate={PASSWORD}", "number"),
        (f"kafka://u:{PASSWORD}@h/", "pip install 'oslo.messaging[kafka]'"),
    ],
)
def test_a_url_that_cannot_be_used_is_not_shown(
    conf: cfg.ConfigOpts, url: str, reason: str
) -> None:
    with pytest.raises(exceptions.CellMisconfigured) as caught:
        open_transport(conf, url)
    error = caught.value
    assert reason in str(error)
    assert error.cell_uuid == UUID
    assert error.__cause__ is error.__context__ is None
    frames = traceback.StackSummary.extract(
        traceback.walk_tb(error.__traceback__), capture_locals=True
    )
    shown = [
        f"{frame.name}: {frame.locals}"
        for frame in frames
        if "cellmw/transports" in frame.filename
    ]
    assert shown
    assert PASSWORD not in "".join([str(error), *shown])


def test_a_private_configuration_can_send(conf: cfg.ConfigOpts) -> None:
    private = cfg.ConfigOpts()
    private([], project="cellmw-test", default_config_files=[])
    oslo.prepare(private)
    oslo.prepare(private)
    # Private, because oslo.messaging 17 has only one of these groups.
    for group in oslo._GLOBAL_ONLY_GROUPS:
        if group in cfg.CONF:
            assert getattr(private, group)
    assert private.rpc_response_timeout == 60
    transport = oslo_messaging.get_rpc_transport(
        private, "cellmw-memory://h/v"
    )
    oslo_messaging.get_rpc_client(
        transport, oslo_messaging.Target(topic="topic")
    ).cast({}, "method")
    transport.cleanup()


def test_the_drivers_that_are_installed_are_known() -> None:
    assert {"rabbit", "cellmw-memory"} <= oslo.known_drivers()
    assert "none" not in oslo.known_drivers()
