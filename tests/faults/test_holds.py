# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""No state of a broker holds a thread beyond its bound, or makes us lie.

The short form of ``benchmarks/holds.py``, which measures all cases.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import servers
from tests.faults import trouble
from tests.faults.service import SLACK

pytestmark = [
    pytest.mark.servers,
    pytest.mark.leaves_sockets_to_gc,
    pytest.mark.timeout(900),
]

# As few as show each way in which a broker can hold a thread.
SHORT = [
    trouble.Case("refuses", warm=False, kind="call", tls=True),
    trouble.Case("stopped", warm=True, kind="cast", tls=True),
    trouble.Case("stopped, 12 MB", warm=True, kind="cast", tls=False),
    trouble.Case(
        "memory alarm, heartbeats", warm=True, kind="cast", tls=False
    ),
    trouble.Case("memory alarm", warm=True, kind="call", tls=False),
    trouble.Case("swallows answers", warm=True, kind="call", tls=False),
    trouble.Case("trickles", warm=True, kind="cast", tls=False),
    trouble.Case("cut under way", warm=False, kind="cast", tls=True),
    trouble.Case("cut under way", warm=True, kind="call", tls=False),
]


@pytest.fixture
def site(
    private_broker: servers.PrivateBroker,
) -> Iterator[trouble.Site]:
    with trouble.Site(private_broker, threads=3, each=2) as made:
        yield made


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(SHORT, id="short"),
        pytest.param(
            trouble.cases(),
            id="all",
            marks=[pytest.mark.full, pytest.mark.timeout(3600)],
        ),
    ],
)
def test_no_message_is_held_too_long_and_what_is_said_of_it_is_true(
    site: trouble.Site, cases: list[trouble.Case]
) -> None:
    for case in cases:
        found = site.meet(case)
        assert not found.wrong, str(case)
        assert found.longest <= trouble.SEND_TIMEOUT + SLACK, str(case)
