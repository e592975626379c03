# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""However a service sets up logging, no secret gets into its logs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import canary as canaries
from tests.canary import Canary, assert_nothing_leaked
from tests.functional import logging_service

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("setup", logging_service.SETUPS)
def test_no_setup_lets_a_secret_out(
    setup: str, order: str, tmp_path: Path
) -> None:
    canary = Canary()
    passwords = [canary.password("cell 1", kind) for kind in canaries.KINDS]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.functional.logging_service",
            setup,
            order,
            str(tmp_path),
        ],
        input=json.dumps(passwords),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    canary.saw("printed: stdout", done.stdout)
    canary.saw("printed: stderr", done.stderr)
    canary.saw_files(*tmp_path.iterdir())
    assert_nothing_leaked(canary)
    assert done.returncode == 0, done.stderr[-2000:]
    (log,) = tmp_path.iterdir()
    text = log.read_text()
    assert logging_service.TO_END in text
    # It said a lot, all the same.
    for said in (
        "rabbit://***@127.0.0.1:1/vh",
        "cannot log in with ***",
        "Casting failed",
        "Sending failed",
        "no such column: wrong",
        "Using",
    ):
        assert said in text
