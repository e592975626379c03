# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Options in the query of a cell's transport URL, good and bad.

No value of an option makes a connection fail in a way of its own: either the
mapping is refused, and the reason names the option, or the driver connects.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib import parse

import oslo_messaging
import pytest
from oslo_config import cfg, types
from oslo_messaging._drivers import amqp, common, impl_rabbit
from oslo_messaging.transport import RPCTransport

from cellmw import exceptions, rpc, runtime
from cellmw.cells.mapping import Generation
from cellmw.redaction import Secret
from cellmw.transports import oslo
from cellmw.transports.driver import Verdict, judge
from cellmw.workers import Workers
from tests import servers
from tests.functional import stack

OPTIONS = {
    opt.dest: opt for opt in (*impl_rabbit.rabbit_opts, *amqp.amqp_opts)
}
SECRET = "Zs3kret/é"
NUMBERS = (
    *("-2", "-1", "0", "1", "5", "60", "65535", "65536", "2147483", "2147484"),
    *("4294967", "4294968", "1" + "0" * 11, "1" + "0" * 25, "1" + "0" * 400),
)


def open_transport(conf: cfg.ConfigOpts, url: str) -> RPCTransport:
    made = oslo.OsloTransports(conf, (), Workers())
    return made.open(Generation.of("cell", Secret(url)), False)


def values_of(name: str) -> Iterator[str]:
    yield SECRET
    kind = OPTIONS[name].type
    if isinstance(kind, types.Number):
        yield from NUMBERS
    elif isinstance(kind, types.Boolean):
        yield from ("true", "0", "2")
    else:
        yield from (getattr(kind, "choices", None) or ())
        yield from (
            "gzip",
            "TLSv1_2",
            "tlsv9",
            "a" * 300,
            "/etc",
            "/etc/hosts",
        )


@pytest.mark.servers
@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_a_value_is_refused_by_name_or_connects(
    name: str, vhost: servers.Vhost, recwarn: pytest.WarningsRecorder
) -> None:
    """Connecting as for a cast and as for a reply."""
    conf = stack.configuration()
    # Refused before anything speaks TLS with a broker that does not.
    also = "ssl=1&" if name.startswith("ssl_") else ""
    for value in values_of(name):
        url = f"{vhost.url}?{also}{name}={parse.quote(value, '')}"
        reason = connect(conf, url)
        assert SECRET not in reason
        assert not reason or f"option {name} in its query" in reason, value
        if value == SECRET and not isinstance(
            OPTIONS[name].type, types.String
        ):
            assert "accepted: " in reason


def connect(conf: cfg.ConfigOpts, url: str) -> str:
    """Open both connections of a transport; what its mapping is refused for.

    A broker or network may refuse it too, as the tests of its TLS show.
    """
    problem: Exception | None = None
    try:
        transport = open_transport(conf, url)
        pool = transport._driver._connection_pool
        for purpose in (common.PURPOSE_SEND, common.PURPOSE_LISTEN):
            pool.create(purpose).close()
    except Exception as error:
        problem = error
    if isinstance(problem, exceptions.CellMisconfigured):
        assert problem.__context__ is None
        return problem.cause
    if problem is not None:
        verdict = judge(problem)
        assert verdict in (Verdict.REFUSED, Verdict.UNREACHABLE)
    return ""


@pytest.mark.parametrize(
    "query, said",
    [
        ("sll=1", "names an unknown option; the nearest known one is ssl"),
        ("Zs3kret=1", "names an unknown option"),
        ("ssl=1&ssl_version=TLSv1.2", "accepted: sslv23 or tlsv1 or tlsv1_1"),
        ("ssl=maybe", "option ssl in its query has a bad value; accepted: tr"),
        ("rpc_conn_pool_size=1", "option rpc_conn_pool_size in its query"),
        ("rabbit_login_method=RABBIT-CR-DEMO", "AMQPLAIN or PLAIN or EXT"),
        ("rabbit_stream_fanout=1", "requires rabbit_qos_prefetch_count"),
        (
            "rabbit_stream_fanout=1&rabbit_qos_prefetch_count=1",
            "requires rabbit_transient_quorum_queue",
        ),
        # The first message or its reply queue would fail.
        ("kombu_compression=Zs3kret", "kombu_compression in its query has a"),
        ("rabbit_transient_queues_ttl=4294968", "a whole number, 0 to 42949"),
        ("conn_pool_ttl=-1", "option conn_pool_ttl in its query has a bad va"),
        ("use_queue_manager=1&hostname=a/b", "option hostname in its query"),
        ("use_queue_manager=1&processname=", ""),
        ("kombu_reconnect_delay=900", "accepted: a number, 0.0 to 4.5"),
    ],
)
def test_what_is_said_of_a_query(query: str, said: str) -> None:
    conf = stack.configuration()
    if not said:
        assert open_transport(conf, f"rabbit://h/?{query}")
        return
    with pytest.raises(exceptions.CellMisconfigured) as caught:
        open_transport(conf, f"rabbit://h/?{query}")
    assert said in caught.value.cause
    assert "Zs3kret" not in caught.value.cause


@pytest.mark.parametrize(
    "line, said",
    [
        ("ssl = maybe", "option ssl in [oslo_messaging_rabbit] has a bad val"),
        ("heartbeat_rate = 0", "heartbeat_rate in [oslo_messaging_rabbit] ha"),
        ("kombu_compression = $Zs3kret", "option kombu_compression in [oslo"),
    ],
)
def test_an_option_in_the_file_is_named_with_its_section(
    tmp_path: Path, line: str, said: str
) -> None:
    file = tmp_path / "service.conf"
    file.write_text(f"[oslo_messaging_rabbit]\n{line}\n", "utf-8")
    conf = cfg.ConfigOpts()
    conf([], project="cellmw-test", default_config_files=[str(file)])
    oslo.prepare(conf)
    with pytest.raises(exceptions.CellMisconfigured) as caught:
        open_transport(conf, "rabbit://h/")
    assert said in caught.value.cause
    assert "Zs3kret" not in str(caught.value)


# Certificates


@pytest.fixture(scope="module")
def pems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``cert``, its ``key``, the same ``encrypted``, an ``other`` key."""
    folder = tmp_path_factory.mktemp("pems")

    def openssl(*arguments: str) -> None:
        subprocess.run(
            ["openssl", *arguments],
            cwd=folder,
            check=True,
            capture_output=True,
        )

    for name, key in (("cert", "key"), ("unused", "other")):
        openssl(
            *("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj"),
            *("/CN=h", "-keyout", key, "-out", name),
        )
    openssl(
        *("rsa", "-in", "key", "-aes256", "-passout", "pass:x"),
        *("-out", "encrypted"),
    )
    (folder / "junk").write_text("no certificate\n")
    os.mkfifo(folder / "pipe")
    return folder


@pytest.mark.parametrize(
    "query, said",
    [
        ("ssl_ca_file=cert", ""),
        ("ssl_cert_file=cert&ssl_key_file=key", ""),
        ("ssl_ca_file=none", "ssl_ca_file in its query names a file that doe"),
        ("ssl_cert_file=none", "ssl_cert_file in its query names a file that"),
        ("ssl_key_file=none", "ssl_key_file in its query names a file that d"),
        ("ssl_ca_file=pipe", "names a file that does not exist"),
        ("ssl_ca_file=.", "names a file that does not exist"),
        ("ssl_ca_file=a%00b", "names a file that does not exist"),
        ("ssl_ca_file=junk", "ssl_ca_file in its query holds no certificate"),
        ("ssl_cert_file=junk", "ssl_cert_file in its query holds no certifi"),
        ("ssl_cert_file=cert", "that belongs to the key in ssl_key_file"),
        ("ssl_cert_file=cert&ssl_key_file=other", "that belongs to the key"),
        ("ssl_cert_file=cert&ssl_key_file=encrypted", "an encrypted key"),
    ],
)
def test_certificate_files_are_tried_without_a_broker(
    pems: Path, monkeypatch: pytest.MonkeyPatch, query: str, said: str
) -> None:
    monkeypatch.chdir(pems)
    conf = stack.configuration()
    # They do not matter without TLS.
    assert open_transport(conf, f"rabbit://h/?{query}")
    if not said:
        assert open_transport(conf, f"rabbit://h/?ssl=1&{query}")
        return
    with pytest.raises(exceptions.CellMisconfigured) as caught:
        open_transport(conf, f"rabbit://h/?ssl=1&{query}")
    assert said in caught.value.cause


def test_a_file_that_vanishes_before_the_first_connection(
    pems: Path, tmp_path: Path
) -> None:
    file = tmp_path / "ca"
    file.write_bytes((pems / "cert").read_bytes())
    url = f"rabbit://h/?ssl=1&ssl_ca_file={file}"
    transport = open_transport(stack.configuration(), url)
    file.unlink()
    with pytest.raises(exceptions.CellMisconfigured, match="ssl_ca_file"):
        transport._driver._connection_pool.create()


# In a service


@pytest.mark.parametrize(
    "url, said",
    [
        ("rabbit://u:Zs3kret@h/?ssl=1&ssl_version=TLSv1.2", "ssl_version"),
        ("rabbit://u:Zs3kret@h/?ssl=1&ssl_ca_file=/nosuch", "ssl_ca_file"),
        ("rabbit://u:Zs3kret@h/?heartbeat_rate=0", "heartbeat_rate"),
        ("kafka://u:Zs3kret@h/", "pip install 'oslo.messaging[kafka]'"),
        # Only the first connection shows this.
        ("kombu+nosuch://u:Zs3kret@h/", "cannot be used to connect (KeyErr"),
    ],
)
def test_a_broken_url_is_503_until_the_next_refresh(
    url: str,
    said: str,
    make_filter: stack.MakeFilter,
    api_database: stack.ApiDatabase,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The breaker hears nothing of it, however often it is tried."""
    cell = api_database.add_cell(url, name="broken")
    instance = api_database.add_instance(cell)
    client = rpc.get_client(oslo_messaging.Target(topic="compute"))
    errors: list[exceptions.CellMWError] = []

    def application(environ: dict[str, object], start: object) -> None:
        context = environ["cellmw.context"]
        try:
            client.cast(context, "reboot_instance")
        except exceptions.CellMWError as error:
            errors.append(error)
            raise

    filtered = make_filter(breaker_failures=2, cell_refresh_interval=20)(
        application
    )
    for _ in range(3):
        response = stack.request(filtered, f"/servers/{instance}", "POST")
        assert response.status_int == 503
        assert 1 <= int(response.headers["Retry-After"]) <= 20
    for error in errors:
        assert type(error) is exceptions.CellMisconfigured
        assert f"cell {cell} (broken)" in str(error)
        assert said in str(error)
        assert "Zs3kret" not in str(error)
    (made,) = runtime.registry()
    for guard in made.process().guards.stats():
        assert (guard.failures, guard.failed, guard.down) == (0, 0, False)
    assert "Zs3kret" not in caplog.text
