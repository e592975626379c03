# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What an error tracker or structlog prints of an exception is no secret."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.canary import Canary, assert_nothing_leaked

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "doc/source/explanation/secrets.rst"
PASS_ON = "def before_send(event, hint):\n    return event\n"


def _before_send_of_the_page() -> str:
    found = re.search(
        r"\.\. testcode:: before_send\n\n((?: {4}.*\n|\n)+)", PAGE.read_text()
    )
    assert found is not None
    return textwrap.dedent(found.group(1))


def _run(before_send: str, password: str) -> str:
    url = f"rabbit://nova:{quote(password, safe='')}@127.0.0.1:1/vh"
    done = subprocess.run(
        [sys.executable, "-m", "tests.functional.tracked_service"],
        input=json.dumps({"url": url, "before_send": before_send}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Casting failed") >= 3
    assert "ConfigurationError" in done.stdout
    return done.stdout


@pytest.mark.parametrize("kind", ["plus", "quotes"])
def test_exceptions_show_no_secret_to_who_formats_them_itself(
    kind: str,
) -> None:
    canary = Canary()
    canary.saw("printed", _run("", canary.password("default", kind)))
    assert_nothing_leaked(canary)


@pytest.mark.parametrize("kind", ["plus", "quotes"])
def test_the_pages_before_send_hides_what_live_frames_show(kind: str) -> None:
    canary = Canary()
    password = canary.password("default", kind)
    canary.saw("printed", _run(_before_send_of_the_page(), password))
    assert_nothing_leaked(canary)


def test_live_frames_show_secrets_without_it() -> None:
    canary = Canary()
    canary.saw("printed", _run(PASS_ON, canary.password("default", "plus")))
    assert canary.leaks
