# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Which modules a new process loads with the parts of the package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

COMMANDS = (
    *("alembic", "cliff", "cellmw.cli", "cellmw.demo", "cellmw.testing"),
    *("oslo_db.sqlalchemy.enginefacade", "prometheus_client"),
)


def loaded(imports: str, *names: str) -> list[str]:
    """Those of the names that a process loads which runs the imports."""
    program = (
        f"{imports}; import sys; "
        f"print(*[name for name in {names!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.split()


@pytest.mark.parametrize(
    "modules", ["cellmw", "cellmw, cellmw.deploy, cellmw.healthcheck"]
)
def test_the_filter_loads_neither_commands_nor_metrics(modules: str) -> None:
    assert loaded(f"import {modules}", *COMMANDS) == []


def test_the_store_loads_no_commands() -> None:
    names = ("alembic", "cliff", "cellmw.cli")
    assert loaded("import cellmw.cells.store", *names) == []


def test_a_command_does_not_load_what_eventlet_patches_with() -> None:
    """It is a third of the start of a command that uses oslo.messaging."""
    imports = "from cellmw.cli import main; import oslo_messaging"
    assert loaded(imports, "dns", "alembic") == []
