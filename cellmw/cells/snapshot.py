# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The cell mappings of the last reading, and the cells made from them.

Expanding a mapping checks its URL and registers its credentials, which takes
longer than reading it.  If many cells are new at once, each is expanded on
first use, and the rest after the first result.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from cellmw import exceptions
from cellmw.cells.mapping import Cell, CellMapping
from cellmw.cells.outage import describe

LOG = logging.getLogger(__name__)

# Up to this many new cells are expanded before the first result.
_AT_ONCE = 100


class Snapshot:
    """The known cells.  Thread-safe; readers take no lock.

    :param expand: makes the cell that requests get from its mapping
    :ivar rows: the mappings by UUID
    :ivar cells: the cells by UUID; a new cell may be missing
    :ivar slots: the cells by index.  A cell keeps its index for good, even
        after it was deleted: a cached instance must never change its cell.
    """

    __slots__ = (
        "_expand",
        "_gone",
        "_index_of",
        "_lock",
        "cells",
        "rows",
        "slots",
    )

    def __init__(self, expand: Callable[[CellMapping], Cell]) -> None:
        self._expand = expand
        # Only worker threads hold it, and signal handlers interrupt none.
        self._lock = threading.Lock()
        self._index_of: dict[str, int] = {}
        self._gone: Mapping[int | None, Cell] = {}
        self.rows: Mapping[str, CellMapping] = {}
        self.cells: dict[str, Cell] = {}
        self.slots: list[Cell | None] = []

    def find(self, text: str, *, or_name: bool = False) -> str | None:
        """The UUID of a cell as its mapping has it.

        :param text: the UUID, in any case if the mapping's is in lower case
        :param or_name: whether the text may be a cell's name as well
        :returns: None: the cell does not exist
        :raises CellNameAmbiguous: several cells have this name
        """
        rows = self.rows
        for uuid in (text, text.lower()):
            if uuid in rows:
                return uuid
        if not or_name or not text:
            return None
        named = [row.uuid for row in rows.values() if row.name == text]
        if len(named) > 1:
            uuids = ", ".join(named)
            raise exceptions.CellNameAmbiguous(uuids, cell_name=text)
        return named[0] if named else None

    def index_of(self, cell_uuid: str) -> int | None:
        """The index of a cell; None: it does not exist."""
        if cell_uuid not in self.rows:
            return None
        return self._index_of.get(cell_uuid)

    def gone(self, cell_id: int) -> Cell:
        """The cell of an instance whose mapping names a missing cell."""
        cause = f"the instance's mapping names the cell with id {cell_id}"
        return self._gone.get(cell_id) or _refusing("", None, cause)

    def expand(self, cell_uuid: str) -> Cell | None:
        """Make a cell on first use; None: it does not exist.

        Called in worker threads.
        """
        with self._lock:
            cell = self.cells.get(cell_uuid)
            row = self.rows.get(cell_uuid)
            if cell is None and row is not None:
                cell = self.cells[cell_uuid] = self._expanded(row)
                self.slots[self._index_of[cell_uuid]] = cell
            return cell

    def install(self, mappings: list[CellMapping]) -> bool:
        """Make these the known cells.

        The cell of a row that has not changed stays the same object.

        :returns: whether all of them are expanded
        """
        rows = {row.uuid: row for row in mappings}
        with self._lock:
            known = {
                uuid: self.cells[uuid]
                for uuid, row in rows.items()
                if uuid in self.cells and self.rows[uuid] == row
            }
            cells = known
            complete = len(rows) - len(known) <= _AT_ONCE
            if complete:
                cells = {
                    uuid: known.get(uuid) or self._expanded(row)
                    for uuid, row in rows.items()
                }
            for uuid in rows:
                self._index_of.setdefault(uuid, len(self._index_of))
            slots: list[Cell | None] = [None] * len(self._index_of)
            for uuid, cell in cells.items():
                slots[self._index_of[uuid]] = cell
            gone = self._now_gone({row.id for row in mappings})
            # Readers take no lock: slots come first, because an entry made
            # from the new rows leads to them.
            self.slots, self.cells = slots, cells
            self.rows, self._gone = rows, gone
        return complete

    def _now_gone(self, ids: set[int | None]) -> dict[int | None, Cell]:
        gone = {
            row.id: _refusing(row.uuid, row.name, "")
            for row in self.rows.values()
            if row.id not in ids
        }
        return {
            cell_id: cell
            for cell_id, cell in {**self._gone, **gone}.items()
            if cell_id not in ids
        }

    def _expanded(self, row: CellMapping) -> Cell:
        try:
            return self._expand(row)
        except Exception as error:
            # A broken cell must not block the others.
            LOG.error(
                "Cell %s (%s) cannot be used: %s; correct its mapping",
                row.uuid,
                row.name,
                describe(error),
            )
            refusal = (exceptions.CellMisconfigured, describe(error))
            return Cell(row.uuid, row.name, refusal=refusal)


def _refusing(uuid: str, name: str | None, cause: str) -> Cell:
    return Cell(uuid, name, refusal=(exceptions.CellNotFound, cause))
