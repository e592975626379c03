# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What a cell is: the row of the API database, and what becomes of it.

A :class:`CellMapping` is the row as it stands there.  A :class:`Cell` is
what a request gets of it: either the :class:`Generation` to send with, or
the reason why nothing can be sent.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any, ClassVar, NoReturn

from cellmw import exceptions
from cellmw.cells import urls
from cellmw.redaction import Secret

CELL0_UUID = "00000000-0000-0000-0000-000000000000"
NO_QUEUE_SCHEME = "none"
DATABASE_OPTION = "[database] connection"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CellMapping:
    """A row of ``cell_mappings``.

    The two connection strings may be given as ``str``; they are kept as
    :class:`~cellmw.redaction.Secret`.
    """

    uuid: str
    name: str | None = None
    transport_url: Secret | None = None
    database_connection: Secret | None = None
    disabled: bool = False
    id: int | None = None

    def __post_init__(self) -> None:
        for field in ("transport_url", "database_connection"):
            value = getattr(self, field)
            if isinstance(value, str):
                object.__setattr__(self, field, Secret(value))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KnownCell:
    """A cell as :func:`cellmw.cells` gives it, without connection strings.

    :ivar disabled: whether the scheduler leaves it out; messages still reach
        its instances
    :ivar is_cell0: whether it is cell0, which has no message queue
    """

    uuid: str
    name: str | None
    disabled: bool
    is_cell0: bool

    @classmethod
    def of(cls, mapping: CellMapping) -> KnownCell:
        """What may be shown of a mapping."""
        return cls(
            uuid=mapping.uuid,
            name=mapping.name,
            disabled=mapping.disabled,
            is_cell0=mapping.uuid == CELL0_UUID,
        )


class Generation:
    """One state of a cell's connection information.

    Made by :meth:`of` only, which gives the same object for the same cell
    UUID and the same expanded URL, to the letter, as long as anybody holds
    it: so identity is equality, and hashing one runs no Python code.
    """

    __slots__ = ("__weakref__", "cell_uuid", "url")

    _known: ClassVar[
        weakref.WeakValueDictionary[tuple[str, str], Generation]
    ] = weakref.WeakValueDictionary()

    cell_uuid: str
    url: Secret

    def __init__(self) -> None:
        raise TypeError("use Generation.of")

    @classmethod
    def of(cls, cell_uuid: str, url: Secret) -> Generation:
        """The generation of this cell with this URL."""
        key = (cell_uuid, url.reveal())
        new = object.__new__(cls)
        new.cell_uuid = cell_uuid
        new.url = url
        # setdefault of a WeakValueDictionary is not atomic; no lock would
        # survive a fork, and two equal objects cost one transport more.
        return cls._known.setdefault(key, new)

    def __repr__(self) -> str:
        return f"<Generation of cell {self.cell_uuid}>"

    def __copy__(self) -> Generation:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Generation:
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a generation holds a secret and is not pickled")


@dataclasses.dataclass(frozen=True, slots=True)
class Cell:
    """What requests for a cell get.

    :ivar generation: what to send with; None: nothing can be sent
    :ivar refusal: the error class and the reason where nothing can be sent
    :ivar database: URL of the cell's own database; a ``str``: why that URL
        cannot be used; None: the mapping names no database
    """

    uuid: str
    name: str | None
    generation: Generation | None = None
    refusal: tuple[type[exceptions.SendError], str] | None = None
    database: Secret | str | None = None

    def refuse(self, retry_after: float | None = None) -> exceptions.SendError:
        """The error that says why nothing can be sent."""
        assert self.refusal is not None
        error, cause = self.refusal
        return error(
            cause,
            # Where the cell is not known it has none.
            cell_uuid=self.uuid or None,
            cell_name=self.name,
            retry_after=retry_after,
        )


def expand(
    mapping: CellMapping,
    base_url: str | None,
    known_drivers: frozenset[str],
    base_database: str | None = None,
) -> Cell:
    """What requests for this cell get.  Pure; raises nothing.

    :param base_url: the service's own ``[DEFAULT] transport_url``, over
        whose parts a template is filled in
    :param known_drivers: names in the entry point group
        ``oslo.messaging.drivers``
    :param base_database: the service's own ``[database] connection``, which
        serves templates of ``database_connection`` the same way
    :returns: a cell with a generation, or with a refusal whose reason holds
        no part of any URL
    """
    generation, refusal = _queue_of(mapping, base_url, known_drivers)
    database = _database_of(mapping, base_database)
    return Cell(mapping.uuid, mapping.name, generation, refusal, database)


def _queue_of(
    mapping: CellMapping,
    base_url: str | None,
    known_drivers: frozenset[str],
) -> tuple[Generation | None, tuple[type[exceptions.SendError], str] | None]:
    """The generation, or the refusal."""
    if not mapping.uuid.strip():
        # What is sent, held and counted for a cell goes by its UUID.
        return None, (exceptions.CellMisconfigured, "uuid: it is empty")
    no_queue = (None, (exceptions.CellHasNoQueue, ""))
    url = mapping.transport_url.reveal() if mapping.transport_url else ""
    if mapping.uuid == CELL0_UUID or urls.scheme_of(url) == NO_QUEUE_SCHEME:
        return no_queue
    try:
        filled = urls.fill_in(url, base_url)
        if urls.scheme_of(filled) == NO_QUEUE_SCHEME:
            return no_queue
        urls.check(filled, known_drivers)
    except urls.UnusableURL as error:
        reason = error.reason if url else "it is empty"
        cause = f"transport_url: {reason}"
        return None, (exceptions.CellMisconfigured, cause)
    return Generation.of(mapping.uuid, Secret(filled)), None


def _database_of(
    mapping: CellMapping, base_database: str | None
) -> Secret | str | None:
    url = mapping.database_connection
    if not url:
        return None
    try:
        filled = urls.fill_in(url.reveal(), base_database, DATABASE_OPTION)
    except urls.UnusableURL as error:
        return error.reason
    return Secret(filled)
