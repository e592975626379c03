# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""S4: one cell of twenty is dead, and the other nineteen do not notice.

How fast they are meanwhile is measured by ``benchmarks/outage.py``; here no
thread is held beyond its bound, and each request for a healthy cell gets its
answer.  Half of the messages go through our client, half through a plain one
of oslo.messaging.
"""

from __future__ import annotations

import pytest

from tests import servers
from tests.faults.outage import CELLS, KINDS, Api, Broken
from tests.faults.service import SLACK, SOON
from tests.functional import stack
from tests.proxy import Proxy

pytestmark = [pytest.mark.servers, pytest.mark.leaves_sockets_to_gc]

SEND, REPLY = 3.0, 6.0


@pytest.mark.timeout(600)
def test_s4_nobody_is_held_and_the_others_get_their_answers(
    sqlite: servers.Database, private_broker: servers.PrivateBroker
) -> None:
    with (
        Proxy(private_broker.host, private_broker.port) as proxy,
        Api(
            sqlite,
            Broken(private_broker, proxy),
            rate=40.0,
            reply=REPLY,
            send_timeout=SEND,
            breaker_failures=3,
            breaker_reset_after=2.0,
        ) as api,
    ):
        for kind in KINDS:
            check_outage(api, kind)


def check_outage(api: Api, kind: str) -> None:
    found = api.outage(kind, seconds=2.0)
    for name, phase in found.phases.items():
        assert phase.others == (), (kind, name)
    for name in ("before", "during", "after"):
        assert found.phases[name].took, (kind, name)
    assert found.held["cast"] <= SEND + SLACK, kind
    assert found.held["call"] <= SEND + REPLY + SLACK, kind
    # It was refused meanwhile, and no error was another one than that.
    assert found.refused.keys() <= {503, 504}, kind
    assert found.refused[503], kind
    assert set(api.ask_broken()) == {200, 202}, kind
    stack.eventually(
        lambda: (stats := api.guard()) is not None and not stats.under_way,
        within=SOON,
    )
    stats = api.service.process.pool.stats()
    assert stats.leases == 0, kind
    assert stats.total.open <= CELLS, kind
