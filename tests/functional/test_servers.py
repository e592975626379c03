# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The servers that the tests run against can be had, disturbed, given back."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from pathlib import Path

import kombu
import pytest
import sqlalchemy

from tests import servers
from tests.functional import stack
from tests.proxy import Proxy

pytestmark = pytest.mark.servers


def connected(url: str) -> kombu.Connection:
    return kombu.Connection(
        url.replace("rabbit://", "amqp://"), connect_timeout=5
    )


def publish(connection: kombu.Connection, queue: str) -> None:
    queue_ = connection.SimpleQueue(queue)
    queue_.put("message")
    queue_.close()


def test_a_vhost_is_apart_and_is_removed(
    broker: servers.Broker, make_vhost: Callable[[], servers.Vhost]
) -> None:
    one, two = make_vhost(), make_vhost()
    with connected(one.url) as connection:
        publish(connection, "a")
        publish(connection, "a")
        assert len(one.connections()) == 1
        assert two.connections() == []
        assert one.queues() == {"a": 2}
        assert two.queues() == {}
    names = {row["name"] for row in broker.table("list_vhosts", "name")}
    assert {one.name, two.name} <= names
    with broker.vhost() as gone:
        pass
    broker.sweep()
    names = {row["name"] for row in broker.table("list_vhosts", "name")}
    assert {one.name, two.name} <= names
    assert gone.name not in names


def test_the_broker_closes_connections_when_told(
    vhost: servers.Vhost,
) -> None:
    with connected(vhost.url) as connection:
        publish(connection, "a")
        vhost.close_connections()
        states = {row["state"] for row in vhost.connections()}
        assert states <= {"closing", "closed"}


def test_a_user_of_its_own_may_use_a_vhost(broker: servers.Broker) -> None:
    password = "p@ss:w/rd,%+{}"
    with (
        broker.new_user(password) as user,
        broker.vhost(user=user, password=password) as vhost,
        connected(vhost.url) as connection,
    ):
        publish(connection, "a")
        assert [row["user"] for row in vhost.connections()] == [user]


def test_a_broker_through_a_proxy(
    vhost: servers.Vhost, make_proxy: Callable[[str], Proxy]
) -> None:
    proxy = make_proxy(vhost.url)
    with connected(vhost.url_via(proxy.address)) as connection:
        publish(connection, "a")
        assert proxy.open == 1
        # Nobody has waited for the broker to have it.
        stack.eventually(lambda: vhost.queues() == {"a": 1})
        proxy.cut()
        with pytest.raises(connection.connection_errors):
            connection.drain_events(timeout=5)
    assert vhost.queues() == {"a": 1}


def test_a_private_broker_can_be_broken_and_healed(
    private_broker: servers.PrivateBroker, broker: servers.Broker
) -> None:
    assert private_broker.port != broker.port
    with private_broker.vhost() as vhost:
        private_broker.raise_memory_alarm()
        assert "memory" in private_broker.ctl(
            "eval", "rabbit_alarm:get_alarms()."
        )
        private_broker.heal()
        assert private_broker.ctl(
            "eval", "rabbit_alarm:get_alarms()."
        ).split() == ["[]"]

        private_broker.pause()
        with socket.create_connection(
            (private_broker.host, private_broker.port), timeout=5
        ) as end:
            end.settimeout(0.2)
            end.sendall(b"AMQP\x00\x00\x09\x01")
            with pytest.raises(TimeoutError):
                end.recv(1)
        private_broker.resume()

        private_broker.kill()
        assert not private_broker.running
        assert not servers.answers(private_broker.host, private_broker.port)
        private_broker.heal()
        # A vhost outlives the kill.
        with connected(vhost.url) as connection:
            publish(connection, "a")
        assert vhost.queues() == {"a": 1}


def test_a_private_broker_speaks_tls_that_is_verified(
    private_broker: servers.PrivateBroker,
) -> None:
    address = (private_broker.host, private_broker.tls_port)
    trusting = ssl.create_default_context(cafile=private_broker.authority)
    with (
        socket.create_connection(address, timeout=5) as end,
        trusting.wrap_socket(end, server_hostname=private_broker.host) as tls,
    ):
        tls.sendall(b"AMQP\x00\x00\x09\x01")
        assert tls.recv(1)
    with (
        socket.create_connection(address, timeout=5) as end,
        pytest.raises(ssl.SSLCertVerificationError),
    ):
        ssl.create_default_context().wrap_socket(
            end, server_hostname=private_broker.host
        )


def test_a_private_broker_is_removed_when_the_test_fails() -> None:
    kept = []
    with (
        pytest.raises(ZeroDivisionError),
        servers.private_broker() as private,
    ):
        kept.append(private)
        raise ZeroDivisionError
    (private,) = kept
    assert not private.running
    assert not servers.answers(private.host, private.port)
    assert not Path(private.folder).exists()


def test_a_database_is_empty_and_is_removed(
    database: servers.Database,
) -> None:
    engine = sqlalchemy.create_engine(database.url)
    assert sqlalchemy.inspect(engine).get_table_names() == []
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("CREATE TABLE t (i INTEGER)"))
    assert sqlalchemy.inspect(engine).get_table_names() == ["t"]
    engine.dispose()


@pytest.mark.parametrize("kind", ["mariadb", "postgresql"])
def test_a_database_can_be_disturbed(
    kind: str, make_proxy: Callable[[str], Proxy]
) -> None:
    with servers.DATABASES[kind]() as database:
        proxy = make_proxy(database.url)
        engine = sqlalchemy.create_engine(database.url_via(proxy.address))
        with engine.connect() as connection:
            assert connection.scalar(sqlalchemy.text("SELECT 1")) == 1
            assert len(database.connections()) == 1
            assert proxy.open == 1
            database.kill_connections()
            with pytest.raises(sqlalchemy.exc.DBAPIError):
                connection.scalar(sqlalchemy.text("SELECT 1"))
            connection.invalidate()
        engine.dispose()
    with pytest.raises(sqlalchemy.exc.DBAPIError):
        sqlalchemy.create_engine(database.url).connect()


def test_a_missing_server_skips_or_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CELLMW_REQUIRE_SERVERS", "1")
    with pytest.raises(pytest.fail.Exception, match=r"no X; .* install Y"):
        servers.missing("no X", "install Y")
    monkeypatch.setenv("CELLMW_REQUIRE_SERVERS", "0")
    with pytest.raises(pytest.skip.Exception, match=r"no X; .* install Y"):
        servers.missing("no X", "install Y")
