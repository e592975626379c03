# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""These tests take ten minutes, and run in a tox environment of their own."""

from __future__ import annotations

import os

if not os.environ.get("CELLMW_TEST_WSGI_SERVERS"):
    collect_ignore_glob = ["test_*.py"]
