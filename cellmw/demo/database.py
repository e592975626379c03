# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The API database of the demo: its tables, and the mappings in them.

:class:`Database` owns the two tables.  Where one of them is there already it
is somebody else's, and nothing is touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import sqlalchemy as sa

from cellmw import redaction
from cellmw.cells import changes, mapping, tables
from cellmw.cells.instance_changes import InstanceMapping
from cellmw.demo.errors import DemoError
from cellmw.transports.oslo import known_drivers


class Database:
    """The tables on a database that is there already, or on SQLite.

    :param url: SQLAlchemy's; None: a SQLite file
    :param folder: where that file would be
    """

    def __init__(self, url: str | None, folder: Path) -> None:
        self.url = url or f"sqlite:///{folder / 'api.sqlite'}"
        self._ours = False
        try:
            parsed = sa.make_url(self.url)
            self._engine = sa.create_engine(parsed, poolclass=sa.NullPool)
        except (sa.exc.ArgumentError, sa.exc.NoSuchModuleError):
            raise DemoError(
                "--database takes a URL like mysql+pymysql://host/database"
            ) from None
        except ImportError as error:
            raise DemoError(
                f"the driver of --database is not installed ({error.name}): "
                "pip install 'cellmw[mysql]' or 'cellmw[postgresql]'"
            ) from None
        where = f" at {parsed.host}" if parsed.host else ""
        self.kind = f"{self._engine.dialect.name}{where}"

    def create(
        self,
        cells: Sequence[mapping.CellMapping],
        instances: Sequence[InstanceMapping],
    ) -> None:
        """Make the tables and fill them.

        :raises DemoError: the database does not let us, or is in use
        """
        try:
            there = sa.inspect(self._engine).get_table_names()
            taken = sorted(tables.metadata.tables.keys() & set(there))
            if taken:
                raise DemoError(
                    f"there is a table {taken[0]} already in the database; "
                    "give --database one of the demo's own, with no tables"
                )
            self._ours = True
            tables.metadata.create_all(self._engine)
            self._fill(cells, instances)
        except sa.exc.SQLAlchemyError as error:
            # The driver's own words, without what SQLAlchemy adds.
            cause = getattr(error, "orig", None) or error
            raise DemoError(
                f"the database: {redaction.describe(cause)}"
            ) from None

    def _fill(
        self,
        cells: Sequence[mapping.CellMapping],
        instances: Sequence[InstanceMapping],
    ) -> None:
        drivers = known_drivers()
        writer = changes.Changes(
            self._engine,
            expand=lambda row: mapping.expand(row, None, drivers),
        )
        for cell in cells:
            writer.create_cell(cell)
        writer.map_instances(instances)

    def remove(self) -> None:
        """Remove the tables, if they are ours."""
        ours, self._ours = self._ours, False
        try:
            if ours:
                tables.metadata.drop_all(self._engine)
        finally:
            self._engine.dispose()
