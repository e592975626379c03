# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What the tests of messages show is the cache's doing.

With ``nova_cell_cache = false`` the same Nova holds its threads, and follows
no change.
"""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Iterator

import pytest

from tests import servers
from tests.functional import stack
from tests.nova.site import (
    REFRESH,
    REPLY_TIMEOUT,
    SEND_TIMEOUT,
    Api,
    Site,
    from_threads,
)

_HELD = SEND_TIMEOUT + REPLY_TIMEOUT + 3.0


@pytest.fixture
def api(site: Site) -> Iterator[Api]:
    with site.api(nova_cell_cache="false") as served:
        for cell in site.instances.values():
            from_threads(served.call, cell[:4], 4)
        yield served


def test_a_hung_broker_holds_threads(site: Site, api: Api) -> None:
    site.broker.pause()
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        held = [
            threads.submit(api.cast, instance, timeout=_HELD)
            for instance in site.instances["two"][:4]
        ]
        errors = [future.exception() for future in held]
    assert all(isinstance(error, TimeoutError) for error in errors), errors


def test_a_changed_url_is_not_followed(site: Site, api: Api) -> None:
    with servers.rabbit_vhost() as new:
        site.hosts.serve(new.url, "host-one", "host-one-new")
        site.change_cell("one", "transport_url", new.url)
        try:
            time.sleep(2 * REFRESH)
            start = len(site.hosts.got())
            for instance in site.instances["one"][:8]:
                assert api.cast(instance).status == 202
            stack.eventually(lambda: len(site.hosts.got()) >= start + 8)
            got = site.hosts.got()[start:]
            assert {host for host, _, _ in got} == {"host-one"}
        finally:
            site.change_cell("one", "transport_url", site.one.url)
