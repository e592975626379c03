# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Changing the API database: what ``cellmw-manage`` writes.

Each change is one transaction, and is checked within it.  What is wrong with
it is a :class:`ChangeRefused`, and nothing was written then.  The engine is
lent.  Calls block for as long as the driver does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from collections.abc import (
    Callable,
    Container,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from typing import Any

import sqlalchemy as sa
from oslo_db import exception as db_exception

from cellmw.cells import urls
from cellmw.cells.mapping import Cell, CellMapping
from cellmw.cells.store import as_mapping
from cellmw.cells.tables import cell_mappings, instance_mappings
from cellmw.exceptions import CellMWError
from cellmw.redaction import Secret

# A deadlock ends one of two transactions, through no fault of its own.
_ATTEMPTS = 5

# ER_TABLEACCESS_DENIED_ERROR of MariaDB and MySQL.
_TABLE_ACCESS_DENIED = 1142

# How long another change of the cells may keep this one waiting.  Seconds.
_LOCK_TIMEOUT = 60
# That of PostgreSQL is a number of the database's own: "cellmw".
_LOCK_NUMBER = int.from_bytes(b"cellmw")

_UNIQUE = ("name", "database_connection", "transport_url")
_FOREIGN_TABLES = {
    # Nova's tables that refer to a cell as well, and what their rows are.
    "host_mappings": "host",
}


_INSTANCES = sa.select(
    instance_mappings.c.instance_uuid,
    cell_mappings.c.uuid.label("cell_uuid"),
    instance_mappings.c.project_id,
    instance_mappings.c.user_id,
    instance_mappings.c.queued_for_delete,
).select_from(instance_mappings.outerjoin(cell_mappings))


class ChangeRefused(CellMWError):
    """The change cannot be made; nothing was written.

    :ivar problems: all that is wrong with it, where that is more than one
    """

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems = problems or (message,)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class InstanceMapping:
    """A row of ``instance_mappings``, with its cell's UUID in place of id.

    :ivar cell_uuid: None: the instance has no cell yet
    """

    instance_uuid: str
    cell_uuid: str | None
    project_id: str
    user_id: str | None = None
    queued_for_delete: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Tally:
    """How many instance mappings were written, and how."""

    added: int = 0
    changed: int = 0
    unchanged: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.added + other.added,
            self.changed + other.changed,
            self.unchanged + other.unchanged,
        )


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(tzinfo=None)


class Changes:
    """Writes cell and instance mappings.

    :param expand: what requests for a cell would get; two cells are refused
        that lead to the same queues
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

        :raises ChangeRefused: there is one with its UUID, its name, its
            database or its broker and virtual host
        """
        with _only_change(self._engine) as connection:
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
                # Somebody else was faster.
                raise ChangeRefused(
                    f"there is a cell {mapping.uuid} already"
                ) from None

    def update_cell(self, uuid: str, **values: Any) -> CellMapping:
        """Change a cell.

        :param values: fields of CellMapping
        :returns: the cell as it is now
        :raises ChangeRefused: there is no such cell, or another one with the
            same name, database, or broker and virtual host
        """
        with _only_change(self._engine) as connection:
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

        :raises ChangeRefused: there is no such cell, or something is mapped
            to it; says how many
        """
        with self._engine.begin() as connection:
            mapping = _cell_for_update(connection, uuid)
            mapped, queued = _count_instances(connection, mapping.id)
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
                    f"something has just been mapped to cell {uuid}"
                ) from None

    def count_instances(self, cell_id: int) -> tuple[int, int]:
        """Instances mapped to a cell; of these, those queued for delete."""
        with self._engine.connect() as connection:
            return _count_instances(connection, cell_id)

    def instance(self, instance_uuid: str) -> InstanceMapping | None:
        """The mapping of an instance, if there is one."""
        with self._engine.connect() as connection:
            found = _instances(connection, [instance_uuid])
            return found.get(instance_uuid)

    def instances(
        self, cell_id: int | None, *, after: str | None, limit: int
    ) -> list[InstanceMapping]:
        """A page of the instance mappings, in the order they were made.

        :param cell_id: only those of this cell; None: all
        :param after: the instance at the end of the page before
        :param limit: how many at most
        :raises ChangeRefused: the instance ``after`` is not mapped
        """
        im = instance_mappings.c
        query = _INSTANCES.order_by(im.id).limit(limit)
        if cell_id is not None:
            query = query.where(im.cell_id == cell_id)
        with self._engine.connect() as connection:
            if after is not None:
                last = connection.execute(
                    sa.select(im.id).where(im.instance_uuid == after)
                ).scalar()
                if last is None:
                    raise ChangeRefused(f"instance {after} is not mapped")
                query = query.where(im.id > last)
            rows = connection.execute(query).mappings()
            return [_as_instance(row) for row in rows]

    def check_instances(
        self, wanted: Sequence[InstanceMapping], *, replace: bool = False
    ) -> Tally:
        """What :meth:`map_instances` would do; writes nothing."""
        with self._engine.connect() as connection:
            return _Plan(connection, wanted, replace=replace).tally

    def map_instances(
        self, wanted: Sequence[InstanceMapping], *, replace: bool = False
    ) -> Tally:
        """Map instances to cells, all in one transaction; can be repeated.

        A mapping that is there already is left as it is; one with no cell
        yet gets its cell.

        :param replace: change mappings that say something else
        :raises ChangeRefused: there is no such cell, or a mapping says
            something else
        """
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                with self._engine.begin() as connection:
                    plan = _Plan(
                        connection, wanted, replace=replace, lock=True
                    )
                    plan.carry_out(self._now())
                    return plan.tally
            except (db_exception.DBDeadlock, db_exception.DBDuplicateEntry):
                # Somebody else maps at the same time; see what it has done.
                if attempt == _ATTEMPTS:
                    raise
        raise AssertionError("unreachable")

    def unmap_instance(self, instance_uuid: str) -> None:
        """Remove the mapping of an instance.

        :raises ChangeRefused: there is none
        """
        with self._engine.begin() as connection:
            result = connection.execute(
                sa.delete(instance_mappings).where(
                    instance_mappings.c.instance_uuid == instance_uuid
                )
            )
            if not result.rowcount:
                raise ChangeRefused(f"instance {instance_uuid} is not mapped")

    def _refuse_duplicate(
        self,
        connection: sa.Connection,
        mapping: CellMapping,
        fields: Container[str],
    ) -> None:
        for other in _cells(connection):
            if other.uuid == mapping.uuid:
                if mapping.id is None:
                    raise ChangeRefused(
                        f"there is a cell {other.uuid} already"
                    )
                continue
            same = self._common(mapping, other, fields)
            if same is not None:
                raise ChangeRefused(f"cell {other.uuid} has the same {same}")

    def _common(
        self, one: CellMapping, other: CellMapping, fields: Container[str]
    ) -> str | None:
        """What two cells must not have in common, of these fields."""
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


@contextlib.contextmanager
def _only_change(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A transaction while which nobody else creates or updates a cell.

    Whether another cell has the same broker is seen by looking at all of
    them, and no unique key tells it.  On a cluster of MariaDB the lock holds
    off those only who use the same server.

    :raises ChangeRefused: somebody else is at it for too long
    """
    with (
        engine.connect() as connection,
        _LOCKS.get(engine.dialect.name, _begun)(connection),
    ):
        yield connection


def _begun(
    connection: sa.Connection,
) -> contextlib.AbstractContextManager[object]:
    return connection.begin()


@contextlib.contextmanager
def _mysql_lock(connection: sa.Connection) -> Iterator[None]:
    # It belongs to the connection, not to the transaction, and has to
    # outlive that: whoever gets it next must see what was committed.  Its
    # name is the server's, and has at most 64 characters.
    name = {"name": f"cellmw {connection.engine.url.database}"[:64]}
    got = connection.execute(
        sa.text(f"SELECT GET_LOCK(:name, {_LOCK_TIMEOUT})"), name
    ).scalar()
    if not got:
        raise ChangeRefused("somebody else is changing the cells")
    try:
        connection.rollback()
        with connection.begin():
            yield
    finally:
        # One that cannot be told so is dead, and then it is released.
        with contextlib.suppress(sa.exc.SQLAlchemyError, db_exception.DBError):
            connection.execute(sa.text("DO RELEASE_LOCK(:name)"), name)
            connection.rollback()


@contextlib.contextmanager
def _postgresql_lock(connection: sa.Connection) -> Iterator[None]:
    with connection.begin():
        # Released at the end of the transaction, when others can see it.
        connection.execute(
            sa.text("SELECT pg_advisory_xact_lock(:number)"),
            {"number": _LOCK_NUMBER},
        )
        yield


@contextlib.contextmanager
def _sqlite_lock(connection: sa.Connection) -> Iterator[None]:
    with connection.begin():
        # As BEGIN IMMEDIATE, for oslo.db has begun already: a transaction
        # whose first statement writes lets no other one write.
        connection.execute(sa.delete(cell_mappings).where(sa.false()))
        yield


_LOCKS: Mapping[
    str,
    Callable[[sa.Connection], contextlib.AbstractContextManager[object]],
] = {
    "mysql": _mysql_lock,
    "mariadb": _mysql_lock,
    "postgresql": _postgresql_lock,
    "sqlite": _sqlite_lock,
}


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
    # Holds off who would map an instance to it: a foreign key is checked
    # with a lock on the row that it refers to.
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
        raise ChangeRefused(f"there is no cell {uuid}")
    return as_mapping(row)


def _count_instances(
    connection: sa.Connection, cell_id: int | None
) -> tuple[int, int]:
    queued = instance_mappings.c.queued_for_delete
    count = sa.func.count()
    mapped, deleted = connection.execute(
        sa.select(
            count, sa.func.sum(sa.case((queued == sa.true(), 1), else_=0))
        ).where(instance_mappings.c.cell_id == cell_id)
    ).one()
    return mapped, int(deleted or 0)


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
    """Whether there is a table; one that we may not look at is none."""
    try:
        return sa.inspect(bind).has_table(name)
    except (db_exception.DBError, sa.exc.DBAPIError) as error:
        inner = getattr(error, "inner_exception", None) or error
        arguments = getattr(getattr(inner, "orig", inner), "args", ())
        # What MariaDB and MySQL say of tables without a right on them, of
        # those too that are not there.  A cell that rows of one refer to
        # is not deleted all the same: the foreign key sees to that.
        if arguments[:1] == (_TABLE_ACCESS_DENIED,):
            return False
        raise


def _instances(
    connection: sa.Connection, uuids: Iterable[str], *, lock: bool = False
) -> dict[str, InstanceMapping]:
    im = instance_mappings.c
    query = _INSTANCES.where(im.instance_uuid.in_(list(uuids)))
    if lock:
        query = query.with_for_update(of=instance_mappings)
    rows = connection.execute(query).mappings()
    return {row["instance_uuid"].lower(): _as_instance(row) for row in rows}


def _as_instance(row: sa.RowMapping) -> InstanceMapping:
    return InstanceMapping(
        instance_uuid=row["instance_uuid"],
        cell_uuid=row["cell_uuid"],
        project_id=row["project_id"],
        user_id=row["user_id"],
        queued_for_delete=bool(row["queued_for_delete"]),
    )


class _Plan:
    """What has to be written so that instances are mapped as wanted."""

    def __init__(
        self,
        connection: sa.Connection,
        wanted: Sequence[InstanceMapping],
        *,
        replace: bool,
        lock: bool = False,
    ) -> None:
        self._connection = connection
        self._cell_ids = {cell.uuid: cell.id for cell in _cells(connection)}
        self._added: list[dict[str, Any]] = []
        self._changed: list[dict[str, Any]] = []
        uuids = [one.instance_uuid for one in wanted]
        known = _instances(connection, uuids, lock=lock)
        problems = [
            problem
            for one in wanted
            if (
                problem := self._consider(
                    one, known.get(one.instance_uuid), replace
                )
            )
        ]
        if problems:
            raise ChangeRefused(problems[0], problems=problems)
        self.tally = Tally(
            len(self._added),
            len(self._changed),
            len(wanted) - len(self._added) - len(self._changed),
        )

    def _consider(
        self,
        wanted: InstanceMapping,
        there: InstanceMapping | None,
        replace: bool,
    ) -> str:
        """Plan one mapping; why that is not possible, or nothing."""
        if wanted.cell_uuid not in self._cell_ids:
            return f"there is no cell {wanted.cell_uuid}"
        values = {
            "instance_uuid": wanted.instance_uuid,
            "cell_id": self._cell_ids[wanted.cell_uuid],
            "project_id": wanted.project_id,
            "user_id": wanted.user_id,
        }
        if there is None:
            self._added.append({**values, "queued_for_delete": False})
            return ""
        if wanted.user_id is None:
            values["user_id"] = there.user_id
        different = _differences(wanted, there)
        if different and not replace:
            return (
                f"instance {wanted.instance_uuid} is mapped already, with "
                f"{different}; --replace changes it"
            )
        says_more = (
            replace and wanted.user_id is not None and there.user_id is None
        )
        if different or says_more or there.cell_uuid is None:
            self._changed.append(values)
        return ""

    def carry_out(self, now: datetime.datetime) -> None:
        if self._added:
            self._connection.execute(
                sa.insert(instance_mappings),
                [{**row, "created_at": now} for row in self._added],
            )
        if self._changed:
            self._connection.execute(
                sa.update(instance_mappings)
                .where(
                    instance_mappings.c.instance_uuid
                    == sa.bindparam("of_instance")
                )
                .values(
                    cell_id=sa.bindparam("to_cell_id"),
                    project_id=sa.bindparam("to_project_id"),
                    user_id=sa.bindparam("to_user_id"),
                    updated_at=now,
                ),
                [
                    {
                        "of_instance": row["instance_uuid"],
                        "to_cell_id": row["cell_id"],
                        "to_project_id": row["project_id"],
                        "to_user_id": row["user_id"],
                    }
                    for row in self._changed
                ],
            )


def _differences(wanted: InstanceMapping, there: InstanceMapping) -> str:
    found: Mapping[str, tuple[str | None, str | None]] = {
        "cell": (wanted.cell_uuid, there.cell_uuid),
        "project": (wanted.project_id, there.project_id),
        "user": (wanted.user_id, there.user_id),
    }
    # What the row does not say, or is not asked for, is no difference.
    return " and ".join(
        f"{what} {is_there}"
        for what, (is_wanted, is_there) in found.items()
        if is_there is not None
        and is_wanted is not None
        and is_wanted != is_there
    )
