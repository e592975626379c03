# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The fixtures of :mod:`cellmw.testing.fixtures` for pytest.

In a ``conftest.py``::

    pytest_plugins = ["cellmw.testing.pytest_plugin"]

Then a test takes ``cellmw_site``, or is marked with
``pytest.mark.usefixtures("cellmw_no_leaks")``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cellmw.testing import fixtures, site


@pytest.fixture
def cellmw_own_brokers() -> Iterator[None]:
    """Memory brokers that no other test has used."""
    with fixtures.own_brokers():
        yield


@pytest.fixture
def cellmw_leaks_end_within() -> float:
    """Seconds to wait for what is just ending; to be overridden."""
    return 5.0


@pytest.fixture
def cellmw_no_leaks(
    cellmw_own_brokers: None, cellmw_leaks_end_within: float
) -> Iterator[None]:
    """Fail a test that leaves a lease or a transport behind."""
    with fixtures.no_leaks(within=cellmw_leaks_end_within):
        yield


@pytest.fixture
def cellmw_site(cellmw_no_leaks: None, tmp_path: Path) -> Iterator[site.Site]:
    """Two cells with a recording host each, and a service in front of them.

    Fails a test whose messages reached another cell, that left a lease or a
    transport behind, or that set a fault which no message met.
    """
    with site.open_site(tmp_path) as opened:
        yield opened
