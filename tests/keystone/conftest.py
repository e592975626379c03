# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""A real Keystone, and the sample pipeline in front of real tokens.

The tests run in a tox environment of their own, in which Keystone is
installed, and are not collected elsewhere.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if importlib.util.find_spec("keystone") is None:
    collect_ignore_glob = ["test_*.py"]

if TYPE_CHECKING:
    from tests.keystone.identity import Keystone


@pytest.fixture(scope="session")
def keystone(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Keystone]:
    from tests.keystone.identity import Keystone

    with contextlib.closing(Keystone(tmp_path_factory.mktemp("ks"))) as made:
        yield made
