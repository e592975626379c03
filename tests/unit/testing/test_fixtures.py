# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The fixtures fail a test that leaks, and no other."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import oslo_messaging
import pytest
from oslo_config import cfg

from cellmw import options, runtime, testing
from cellmw.cells import engines
from cellmw.cells.mapping import Generation
from cellmw.redaction import Secret
from cellmw.transports import oslo
from cellmw.transports.pool import Lease

pytest_plugins = ["pytester"]

URL = "cellmw-memory://user:secret-word@host/vhost"


@pytest.fixture(autouse=True)
def _own_brokers() -> Iterator[None]:
    with testing.own_brokers():
        yield


def open_transport(url: str = URL) -> oslo_messaging.RPCTransport:
    return oslo_messaging.get_rpc_transport(cfg.CONF, url)


def load_filter() -> runtime.Runtime:
    conf = cfg.ConfigOpts()
    conf([], default_config_files=[])
    settings = options.load(conf, {})
    oslo.prepare(conf)
    engines.register_options(conf)
    return runtime.registry().get(
        object(), lambda: runtime.Runtime(settings, conf)
    )


def acquire(known: runtime.Runtime, cell: str = "a-cell") -> Lease:
    generation = Generation.of(cell, Secret(f"cellmw-memory://h/{cell}"))
    return known.process().pool.acquire(generation, timeout=5)


def test_what_is_cleaned_up_is_no_leak() -> None:
    with testing.no_leaks():
        open_transport().cleanup()


def test_what_was_open_before_is_no_leak() -> None:
    open_transport()
    with testing.no_leaks():
        pass


def test_a_transport_that_stays_open_is_a_leak() -> None:
    with (
        pytest.raises(testing.LeakError) as caught,
        testing.no_leaks(within=0),
    ):
        open_transport()
        open_transport().cleanup()
    assert str(caught.value) == (
        "a transport for host:5672/vhost was not cleaned up"
    )


def test_a_block_that_fails_is_not_failed_twice() -> None:
    with pytest.raises(KeyError), testing.no_leaks():
        open_transport()
        acquire(load_filter())
        raise KeyError("the test's own")


def test_what_a_filter_keeps_cached_is_no_leak() -> None:
    with testing.no_leaks():
        acquire(load_filter()).release()
    assert not list(runtime.registry())
    assert testing.broker("h", "a-cell").stats().transports == 0


def test_a_lease_that_is_never_released_is_a_leak() -> None:
    with (
        pytest.raises(testing.LeakError, match="a-cell is still leased"),
        testing.no_leaks(within=0),
    ):
        kept = acquire(load_filter())
        acquire(load_filter(), "another").release()
    kept.release()


def test_a_lease_that_is_about_to_end_is_no_leak() -> None:
    with testing.no_leaks():
        threading.Timer(0.05, acquire(load_filter()).release).start()


def test_a_filter_of_before_keeps_what_it_caches() -> None:
    with testing.no_leaks():
        before = load_filter()
        acquire(before, "one").release()
        with testing.no_leaks():
            acquire(before, "two").release()
        assert list(runtime.registry()) == [before]
        assert before.process().pool.stats().total.open == 2


def test_beside_a_filter_of_before_a_transport_is_a_leak() -> None:
    with testing.no_leaks():
        before = load_filter()
        with (
            pytest.raises(testing.LeakError, match="not cleaned up"),
            testing.no_leaks(within=0),
        ):
            acquire(before, "two").release()
            left = open_transport()
        left.cleanup()


def test_own_brokers_ends_every_fault() -> None:
    with testing.own_brokers():
        broker = testing.broker("host", "vhost")
        broker.refuse()
        transport = open_transport()
    client = oslo_messaging.get_rpc_client(
        transport, oslo_messaging.Target(topic="compute"), retry=0
    )
    client.cast({}, "note")
    assert testing.brokers() == []


def test_the_pytest_plugin_has_both(pytester: pytest.Pytester) -> None:
    pytester.makeconftest('pytest_plugins = ["cellmw.testing.pytest_plugin"]')
    pytester.makepyfile(
        """
        import oslo_messaging
        import pytest
        from oslo_config import cfg
        from cellmw import testing

        @pytest.fixture
        def cellmw_leaks_end_within():
            return 0.0

        def leak():
            oslo_messaging.get_rpc_transport(cfg.CONF, "cellmw-memory://h/v")

        @pytest.mark.usefixtures("cellmw_no_leaks")
        def test_leaks():
            leak()

        @pytest.mark.usefixtures("cellmw_own_brokers")
        def test_does_as_it_likes():
            assert testing.brokers() == []
            leak()
        """
    )
    pytester.runpytest_inprocess("-p", "no:cacheprovider").assert_outcomes(
        passed=2, errors=1
    )
