# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The site that all tests of stock Nova share.

They run in tox environments of their own, in which Nova is installed, and
are not collected elsewhere.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nova.site import Site

if importlib.util.find_spec("nova") is None:
    collect_ignore_glob = ["test_*.py"]


# The site takes a minute to make, and its first user pays for that.
_TIMEOUT = 900


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.timeout(_TIMEOUT))
            item.add_marker(
                pytest.mark.leaves_threads("connections through the proxy")
            )


@pytest.fixture(scope="session")
def made_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with contextlib.ExitStack() as owned:
        yield Site(tmp_path_factory.mktemp("nova"), owned)


@pytest.fixture
def site(made_site: Site) -> Iterator[Site]:
    """Stock Nova; cell two is healed after each test."""
    yield made_site
    made_site.heal()
