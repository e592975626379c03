# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What is done around each test that breaks something."""

from __future__ import annotations

import gc

import pytest

from tests.faults import service


def pytest_itemcollected(item: pytest.Item) -> None:
    """What is collected in a test here may be the one's before it."""
    item.add_marker(service.leaves_sockets_to_gc)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Collect what a test leaves to the collector, in that test.

    When all of its fixtures are done and its threads have ended: a socket
    that amqp forgets is warned of where it is collected, and another test
    has nothing to do with it.
    """
    gc.collect()
