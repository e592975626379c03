# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""``cellmw-manage`` as a test uses it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from cellmw.cells.mapping import CELL0_UUID
from cellmw.cells.tables import cell_mappings, instance_mappings
from cellmw.cli import main as cli

ONE = "3a0a4dd6-7cb9-4a9c-9a0b-7b1d2b6a0001"
TWO = "3a0a4dd6-7cb9-4a9c-9a0b-7b1d2b6a0002"
BAD = "3a0a4dd6-7cb9-4a9c-9a0b-7b1d2b6a000b"
NOBODY = "3a0a4dd6-7cb9-4a9c-9a0b-7b1d2b6a000f"
BASE = "rabbit://Zbob:Zs3kret@base.example:5672/v"


def instance(number: int) -> str:
    """The UUID of an instance."""
    return f"5f4b3a52-39d5-4c11-8f2b-{number:012}"


@dataclasses.dataclass(frozen=True)
class Done:
    """What the command has left."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Its output, read as JSON."""
        return json.loads(self.out)


class Manage:
    """Runs the command in this process.

    :ivar engine: for looking at the tables
    """

    def __init__(
        self,
        folder: Path,
        url: str,
        engine: sa.Engine,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        self.folder = folder
        self.engine = engine
        self._capsys = capsys
        self.file = folder / "nova.conf"
        self.configure(url)

    def configure(self, url: str, *lines: str) -> None:
        """Write its configuration anew."""
        text = "\n".join(
            [
                "[DEFAULT]",
                f"transport_url = {BASE}",
                "[api_database]",
                f"connection = {url}",
                "[cellmw]",
                *lines,
            ]
        )
        self.file.write_text(text, "utf-8")

    def __call__(self, *arguments: str) -> Done:
        """Run it with its configuration; what it prints holds no secret."""
        return self.run(*arguments, "--config-file", str(self.file))

    def run(self, *arguments: str) -> Done:
        """Run it with these arguments alone."""
        self._capsys.readouterr()
        status = cli.main(arguments)
        captured = self._capsys.readouterr()
        for text in captured:
            for secret in ("Zbob", "Zs3kret", "Zuser", "Zpw", "Traceback"):
                assert secret not in text
        return Done(status, captured.out, captured.err)

    def refuses(self, *arguments: str) -> str:
        """Run what cannot be done; nothing changes.  What it says."""
        before = self.tables()
        done = self(*arguments)
        assert done.status in (1, 2)
        assert done.out == ""
        assert done.err.startswith("cellmw-manage: ")
        assert done.err.count("\n") == 1
        assert self.tables() == before
        return done.err

    def tables(self) -> list[list[dict[str, Any]]]:
        """All rows of the two tables."""
        with self.engine.connect() as connection:
            return [
                [
                    dict(row)
                    for row in connection.execute(
                        sa.select(table).order_by(table.c.id)
                    ).mappings()
                ]
                for table in (cell_mappings, instance_mappings)
            ]

    def fill(self) -> None:
        """Two cells, cell0, a bad one, and instances in them."""
        urls = {
            CELL0_UUID: "none:///",
            ONE: "rabbit://Zuser:Zpw@one.example:5672/v",
            TWO: "{scheme}://{username}:{password}@two.example:{port}/w",
            BAD: "rabbit://Zuser:{Zpw}@h/",
        }
        names = {ONE: "one", TWO: "two", BAD: "bad"}
        with self.engine.begin() as connection:
            connection.execute(
                sa.insert(cell_mappings),
                [
                    {
                        "id": number,
                        "uuid": uuid,
                        "name": names.get(uuid),
                        "transport_url": url,
                        "database_connection": f"mysql://Zuser:Zpw@db/{number}",
                        "disabled": uuid == TWO,
                    }
                    for number, (uuid, url) in enumerate(urls.items(), 1)
                ],
            )
            connection.execute(
                sa.insert(instance_mappings),
                [
                    {
                        "instance_uuid": instance(number),
                        "cell_id": cell_id,
                        "project_id": "p",
                        "user_id": "u",
                        "queued_for_delete": number == 3,
                    }
                    for number, cell_id in enumerate((1, 2, 3, 4, None, 99), 1)
                ],
            )
