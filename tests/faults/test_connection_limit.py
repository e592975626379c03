# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""A broker that takes no more connections still takes messages.

``benchmarks/connection_limit.py`` measures how many.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import oslo_messaging
import pytest

from tests import servers
from tests.faults import limits
from tests.faults.service import SLACK, Service
from tests.functional import stack

pytestmark = [pytest.mark.servers, pytest.mark.leaves_sockets_to_gc]

# As many rounds as there are, each of so many seconds.
ROUNDS, SECONDS = 3, 0.7


@pytest.fixture
def api(sqlite: servers.Database) -> Iterator[Service]:
    with contextlib.closing(Service(sqlite)) as made:
        yield made


def bare_way(
    vhost: servers.Vhost, own: contextlib.ExitStack, kind: str
) -> Callable[[], limits.Tally]:
    transport = oslo_messaging.get_rpc_transport(
        stack.configuration(), vhost.url
    )
    own.callback(transport.cleanup)
    return lambda: limits.bare(transport, kind, SECONDS)


@pytest.mark.parametrize("kind", ["cast", "call"])
def test_connections_that_work_are_used_where_no_more_are_let_in(
    api: Service, make_vhost: Callable[[], servers.Vhost], kind: str
) -> None:
    vhost, other = make_vhost(), make_vhost()
    with contextlib.ExitStack() as own:
        for one in (vhost, other):
            if kind == "call":
                own.enter_context(limits.served(one))
        place = limits.Limited(vhost)
        place.limit()
        limits.Limited(other).limit()
        cell = api.add_cell(vhost.url)
        bare = bare_way(other, own, kind)
        before = place.reply_queues()
        found = limits.Tally.of([])
        wanted = 0
        for _ in range(ROUNDS):
            wanted += bare().delivered
            found += limits.ours(api, cell, kind, SECONDS)
        # Each waits for a connection that works; none is refused.
        assert found.outcomes == {"delivered": found.delivered}
        # Half of what the benchmark wants, for other tests run meanwhile.
        assert found.delivered >= 0.45 * wanted
        assert found.longest <= api.send_timeout + SLACK
        assert not api.guard(cell).down
        assert place.reply_queues() <= before + 1
        if kind == "cast":
            assert place.cast() == found.delivered
