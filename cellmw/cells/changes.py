# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Changes of the API database that ``cellmw-manage`` makes.

Each change is one transaction, which also checks it.  A change that fails its
checks is a :class:`ChangeRefused`, and writes nothing.  The engine is lent.
Calls block for as long as the driver does.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Container, Sequence
from typing import Any

import sqlalchemy as sa
from oslo_db import exception as db_exception

from cellmw.cells import instance_changes, urls
from cellmw.cells.instance_changes import InstanceMapping, Plan, Tally
from cellmw.cells.mapping import Cell, CellMapping
from cellmw.cells.store import as_mapping
from cellmw.cells.tables import cell_mappings, instance_mappings
from cellmw.cells.transactions import ChangeRefused, only_cell_change
from cellmw.redaction import Secret

# A deadlock ends one of two correct transactions; it is worth another try.
_ATTEMPTS = 5

# ER_TABLEACCESS_DENIED_ERROR of MariaDB and MySQL.
_TABLE_ACCESS_DENIED = 1142

_UNIQUE = ("name", "database_connection", "transport_url")
_FOREIGN_TABLES = {
    # Nova's other tables that refer to cells, and the noun for their rows.
    "host_mappings": "host",
}


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(tzinfo=None)


class Changes:
    """Writes cell and instance mappings.

    :param expand: makes the cell that requests would get; two cells must not
        have the same queues
    :param now: UTC without a zone, as the tables hold it
    """

    def __init__(
        self,
        engine: sa.Engine,
        *,
        expand: Callable[[CellMapping], Cell],
        now: Callable[[], datetime.datetime] = _now,
    ) -> None:
        self._engine = engine
        self._expand = expand
        self._now = now

    def create_cell(self, mapping: CellMapping) -> None:
        """Add a cell.

        :raises ChangeRefused: another cell has the same UUID, name, database,
            or broker and virtual host
        """
        with only_cell_change(self._engine) as connection:
            self._refuse_duplicate(connection, mapping, _UNIQUE)
            try:
                connection.execute(
                    sa.insert(cell_mappings).values(
                        **_columns(mapping),
                        uuid=mapping.uuid,
                        created_at=self._now(),
                    )
                )
            except db_exception.DBDuplicateEntry:
                # Another client has just added it.
                raise ChangeRefused(
                    f"cell {mapping.uuid} already exists"
                ) from None

    def update_cell(self, uuid: str, **values: Any) -> CellMapping:
        """Change a cell.

        :param values: fields of CellMapping
        :returns: the cell as it is now
        :raises ChangeRefused: the cell does not exist, or another cell has
            the same name, database, or broker and virtual host
        """
        with only_cell_change(self._engine) as connection:
            mapping = dataclasses.replace(
                _cell_for_update(connection, uuid), **values
            )
            self._refuse_duplicate(connection, mapping, values)
            connection.execute(
                sa.update(cell_mappings)
                .where(cell_mappings.c.id == mapping.id)
                .values(**_columns(mapping), updated_at=self._now())
            )
            return mapping

    def delete_cell(self, uuid: str) -> None:
        """Remove a cell.

        :raises ChangeRefused: the cell does not exist, or instances or hosts
            are mapped to it; the text has their number
        """
        with self._engine.begin() as connection:
            mapping = _cell_for_update(connection, uuid)
            mapped, queued = instance_changes.count_in_cell(
                connection, mapping.id
            )
            if mapped:
                also = f" ({queued} of them queued for delete)" * bool(queued)
                raise ChangeRefused(
                    f"{_number(mapped, 'instance')} mapped to cell "
                    f"{uuid}{also}"
                )
            for table, noun in _FOREIGN_TABLES.items():
                count = _count_foreign(connection, table, mapping.id)
                if count:
                    raise ChangeRefused(
                        f"{_number(count, noun)} mapped to cell {uuid}"
                    )
            try:
                connection.execute(
                    sa.delete(cell_mappings).where(
                        cell_mappings.c.id == mapping.id
                    )
                )
            except db_exception.DBReferenceError:
                raise ChangeRefused(
                    f"a row has just been mapped to cell {uuid}"
                ) from None

    def count_instances(self, cell_id: int) -> tuple[int, int]:
        """Count the instances of a cell, and those queued for delete."""
        with self._engine.connect() as connection:
            return instance_changes.count_in_cell(connection, cell_id)

    def instance(self, instance_uuid: str) -> InstanceMapping | None:
        """The mapping of an instance; None: it has none."""
        with self._engine.connect() as connection:
            found = instance_changes.read(connection, [instance_uuid])
            return found.get(instance_uuid)

    def instances(
        self, cell_id: int | None, *, after: str | None, limit: int
    ) -> list[InstanceMapping]:
        """A page of the instance mappings, in the order of their creation.

        :param cell_id: only those of this cell; None: all
        :param after: the last instance of the previous page
        :param limit: most mappings on the page
        :raises ChangeRefused: the instance ``after`` is not mapped
        """
        with self._engine.connect() as connection:
            return instance_changes.read_page(
                connection, cell_id, after=after, limit=limit
            )

    def check_instances(
        self, wanted: Sequence[InstanceMapping], *, replace: bool = False
    ) -> Tally:
        """Check what :meth:`map_instances` would write."""
        with self._engine.connect() as connection:
            return self._plan(connection, wanted, replace=replace).tally

    def map_instances(
        self, wanted: Sequence[InstanceMapping], *, replace: bool = False
    ) -> Tally:
        """Map instances to cells in one transaction.  Idempotent.

        An equal mapping stays as it is; a mapping without a cell gets one.

        :param replace: change existing mappings that differ
        :raises ChangeRefused: a cell does not exist, or a mapping differs
        """
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                with self._engine.begin() as connection:
                    plan = self._plan(
                        connection, wanted, replace=replace, lock=True
                    )
                    plan.carry_out(self._now())
                    return plan.tally
            except (db_exception.DBDeadlock, db_exception.DBDuplicateEntry):
                # Another client maps at the same time: plan again.
                if attempt == _ATTEMPTS:
                    raise
        raise AssertionError("unreachable")

    def unmap_instance(self, instance_uuid: str) -> None:
        """Remove the mapping of an instance.

        :raises ChangeRefused: the instance is not mapped
        """
        with self._engine.begin() as connection:
            result = connection.execute(
                sa.delete(instance_mappings).where(
                    instance_mappings.c.instance_uuid == instance_uuid
                )
            )
            if not result.rowcount:
                raise ChangeRefused(f"instance {instance_uuid} is not mapped")

    @staticmethod
    def _plan(
        connection: sa.Connection,
        wanted: Sequence[InstanceMapping],
        *,
        replace: bool,
        lock: bool = False,
    ) -> Plan:
        cell_ids = {cell.uuid: cell.id for cell in _cells(connection)}
        return Plan(connection, wanted, cell_ids, replace=replace, lock=lock)

    def _refuse_duplicate(
        self,
        connection: sa.Connection,
        mapping: CellMapping,
        fields: Container[str],
    ) -> None:
        for other in _cells(connection):
            if other.uuid == mapping.uuid:
                if mapping.id is None:
                    raise ChangeRefused(f"cell {other.uuid} already exists")
                continue
            same = self._common(mapping, other, fields)
            if same is not None:
                raise ChangeRefused(f"cell {other.uuid} has the same {same}")

    def _common(
        self, one: CellMapping, other: CellMapping, fields: Container[str]
    ) -> str | None:
        """The first of these fields that two cells must not share."""
        if "name" in fields and one.name and one.name == other.name:
            return "name"
        if (
            "database_connection" in fields
            and one.database_connection
            and one.database_connection == other.database_connection
        ):
            return "database connection"
        if "transport_url" in fields:
            queue, other_queue = self._queue(one), self._queue(other)
            if queue and other_queue and urls.same_queues(queue, other_queue):
                return "broker and virtual host"
        return None

    def _queue(self, mapping: CellMapping) -> urls.Broker | None:
        generation = self._expand(mapping).generation
        if generation is None:
            return None
        return urls.broker_of(generation.url.reveal())


def _columns(mapping: CellMapping) -> dict[str, Any]:
    return {
        "name": mapping.name,
        "transport_url": _reveal(mapping.transport_url),
        "database_connection": _reveal(mapping.database_connection),
        "disabled": mapping.disabled,
    }


def _reveal(secret: Secret | None) -> str | None:
    return None if secret is None else secret.reveal()


def _number(count: int, noun: str) -> str:
    return f"{count} {noun} is" if count == 1 else f"{count} {noun}s are"


def _cells(connection: sa.Connection) -> list[CellMapping]:
    rows = connection.execute(sa.select(cell_mappings)).mappings()
    return [as_mapping(row) for row in rows]


def _cell_for_update(connection: sa.Connection, uuid: str) -> CellMapping:
    # The lock keeps others from mapping instances to the cell: the check of
    # a foreign key locks the row that it refers to.
    row = (
        connection.execute(
            sa.select(cell_mappings)
            .where(cell_mappings.c.uuid == uuid)
            .with_for_update()
        )
        .mappings()
        .first()
    )
    if row is None:
        raise ChangeRefused(f"cell {uuid} does not exist")
    return as_mapping(row)


def _count_foreign(
    connection: sa.Connection, table: str, cell_id: int | None
) -> int:
    if not has_table(connection, table):
        return 0
    found = sa.table(table, sa.column("cell_id"))
    return connection.execute(
        sa.select(sa.func.count())
        .select_from(found)
        .where(found.c.cell_id == cell_id)
    ).scalar_one()


def has_table(bind: sa.Engine | sa.Connection, name: str) -> bool:
    """Whether a table exists and may be read."""
    try:
        return sa.inspect(bind).has_table(name)
    except (db_exception.DBError, sa.exc.DBAPIError) as error:
        inner = getattr(error, "inner_exception", None) or error
        arguments = getattr(getattr(inner, "orig", inner), "args", ())
        # MariaDB and MySQL say this of tables without rights, even of tables
        # that do not exist.  If rows of the table refer to a cell, its foreign
        # key still keeps the cell from being deleted.
        if arguments[:1] == (_TABLE_ACCESS_DENIED,):
            return False
        raise
