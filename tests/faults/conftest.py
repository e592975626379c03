# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What is done around each test that breaks something."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Generator

import pytest

_WARNING = "Exception ignored in. <socket.socket"


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.get_closest_marker("leaves_sockets_to_gc"):
        item.add_marker(
            pytest.mark.filterwarnings(
                f"ignore:{_WARNING}:pytest.PytestUnraisableExceptionWarning"
            )
        )


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None]:
    """Collect what a test leaves to the collector before the next one.

    Around all others: what the test has logged, and with that the frames of
    what it has seen raised, is let go by one of them.
    """
    try:
        return (yield)
    finally:
        if item.get_closest_marker("leaves_sockets_to_gc"):
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", "unclosed <socket", ResourceWarning
                )
                gc.collect()
