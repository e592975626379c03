# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Instance mappings: reading them, and planning how to write them."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from cellmw.cells.tables import cell_mappings, instance_mappings
from cellmw.cells.transactions import ChangeRefused

_SELECT = sa.select(
    instance_mappings.c.instance_uuid,
    cell_mappings.c.uuid.label("cell_uuid"),
    instance_mappings.c.project_id,
    instance_mappings.c.user_id,
    instance_mappings.c.queued_for_delete,
).select_from(instance_mappings.outerjoin(cell_mappings))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class InstanceMapping:
    """A row of ``instance_mappings``, with the UUID of its cell.

    :ivar cell_uuid: None: the instance has no cell yet
    """

    instance_uuid: str
    cell_uuid: str | None
    project_id: str
    user_id: str | None = None
    queued_for_delete: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Tally:
    """The numbers of instance mappings that a change writes."""

    added: int = 0
    changed: int = 0
    unchanged: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.added + other.added,
            self.changed + other.changed,
            self.unchanged + other.unchanged,
        )


def count_in_cell(
    connection: sa.Connection, cell_id: int | None
) -> tuple[int, int]:
    """Count the instances of a cell, and those queued for delete."""
    queued = instance_mappings.c.queued_for_delete
    count = sa.func.count()
    mapped, deleted = connection.execute(
        sa.select(
            count, sa.func.sum(sa.case((queued == sa.true(), 1), else_=0))
        ).where(instance_mappings.c.cell_id == cell_id)
    ).one()
    return mapped, int(deleted or 0)


def read(
    connection: sa.Connection, uuids: Iterable[str], *, lock: bool = False
) -> dict[str, InstanceMapping]:
    """Read instance mappings by UUID, which is in lower case.

    :param lock: keep others from changing the rows
    """
    im = instance_mappings.c
    query = _SELECT.where(im.instance_uuid.in_(list(uuids)))
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


def read_page(
    connection: sa.Connection,
    cell_id: int | None,
    *,
    after: str | None,
    limit: int,
) -> list[InstanceMapping]:
    """Read a page; see :meth:`cellmw.cells.changes.Changes.instances`."""
    im = instance_mappings.c
    query = _SELECT.order_by(im.id).limit(limit)
    if cell_id is not None:
        query = query.where(im.cell_id == cell_id)
    if after is not None:
        last = connection.execute(
            sa.select(im.id).where(im.instance_uuid == after)
        ).scalar()
        if last is None:
            raise ChangeRefused(f"instance {after} is not mapped")
        query = query.where(im.id > last)
    return [_as_instance(r) for r in connection.execute(query).mappings()]


class Plan:
    """The rows to write so that instances are mapped as wanted.

    :param cell_ids: the ``id`` of each cell by UUID
    :param replace: change existing mappings that differ
    :param lock: keep others from changing the rows meanwhile
    :raises ChangeRefused: a cell does not exist, or a mapping differs
    """

    def __init__(
        self,
        connection: sa.Connection,
        wanted: Sequence[InstanceMapping],
        cell_ids: Mapping[str, int | None],
        *,
        replace: bool,
        lock: bool = False,
    ) -> None:
        self._connection = connection
        self._cell_ids = cell_ids
        self._added: list[dict[str, Any]] = []
        self._changed: list[dict[str, Any]] = []
        uuids = [one.instance_uuid for one in wanted]
        known = read(connection, uuids, lock=lock)
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
        """Plan one mapping; an empty text, or why it is refused."""
        cell_id = self._cell_ids.get(wanted.cell_uuid or "")
        if cell_id is None:
            return f"cell {wanted.cell_uuid} does not exist"
        values = {
            "instance_uuid": wanted.instance_uuid,
            "cell_id": cell_id,
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
                f"instance {wanted.instance_uuid} is already mapped with "
                f"{different}; --replace changes it"
            )
        says_more = (
            replace and wanted.user_id is not None and there.user_id is None
        )
        if different or says_more or there.cell_uuid is None:
            self._changed.append(values)
        return ""

    def carry_out(self, now: datetime.datetime) -> None:
        """Write the rows.

        :param now: UTC without a zone
        """
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
    # A value that either side leaves open is not a difference.
    return " and ".join(
        f"{what} {is_there}"
        for what, (is_wanted, is_there) in found.items()
        if is_there is not None
        and is_wanted is not None
        and is_wanted != is_there
    )
