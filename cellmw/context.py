# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What a handler has besides the RPC clients.

The request context of a service that has none of its own, work that goes to a
cell without a request for an instance in it, and what to say after moving one.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, Protocol, TypeVar

from oslo_context import context as oslo_context

from cellmw import runtime
from cellmw.cells.mapping import KnownCell
from cellmw.process import Process
from cellmw.transports.handle import Handle

T = TypeVar("T")


class RequestContext(oslo_context.RequestContext):
    """oslo.context's, with the three attributes that this package sets.

    None of them is in :meth:`to_dict` or travels with a message.  A copy
    shares both connections; a pickle has neither.

    :ivar mq_connection: transport for the cell of the request's instance,
        or None
    :ivar cell_uuid: UUID of that cell, or None
    :ivar db_connection: with the option ``db_connection``, oslo.db's
        transaction context manager for that cell's database, or None
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.mq_connection: Any = None
        self.cell_uuid: str | None = None
        self.db_connection: Any = None
        super().__init__(*args, **kwargs)

    @classmethod
    def from_request(cls, environ: dict[str, Any]) -> RequestContext:
        """The context of a request that has passed auth_token.

        Without a confirmed identity (``X-Identity-Status``) it is
        anonymous: the other headers are the client's own then.
        """
        if environ.get("HTTP_X_IDENTITY_STATUS") == "Confirmed":
            made: RequestContext = cls.from_environ(environ)
            return made
        return cls(
            request_id=environ.get("openstack.request_id"),
            global_request_id=environ.get("openstack.global_request_id"),
            is_admin_project=False,
        )

    def __copy__(self) -> RequestContext:
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> RequestContext:
        new = object.__new__(type(self))
        memo[id(self)] = new
        # It has locks and an engine, which all contexts of the cell share.
        memo[id(self.db_connection)] = self.db_connection
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def __getstate__(self) -> dict[str, Any]:
        connections = {"mq_connection": None, "db_connection": None}
        return {**self.__dict__, **connections}


class HasUUID(Protocol):
    """A cell, as far as it is looked at here: ours or Nova's mapping too."""

    @property
    def uuid(self) -> str:
        """UUID of the cell."""


@contextlib.contextmanager
def target_cell(context: T, cell: HasUUID | str) -> Iterator[T]:
    """A copy of a context whose messages go to this cell.

    For work that outlives its request, or goes to another cell than that of
    the request's instance.  The copy has a lease of its own, which ends with
    the ``with`` block.  With the option ``db_connection`` the copy has the
    cell's database too.  Asks the API database where the mappings are not
    fresh, for ``lookup_timeout`` at most.  Thread-safe.

    :param context: any context that takes attributes; it is not changed
    :param cell: a cell mapping, an item of :func:`cells`, a cell's UUID, or
        its name; a text that is both is a UUID.  Of a mapping only the UUID
        is used: the API database says where the cell's queue is.
    :raises CellNotFound: there is no such cell
    :raises CellNameAmbiguous: several cells have this name
    :raises LookupFailed: the mappings are not known and cannot be read
    :raises LookupError: no filter has been loaded in this process, or
        several with different settings, and the context came through none
    """
    process = runtime.registry().of(context).process()
    with target(process, context, cell) as cell_context:
        yield cell_context


@contextlib.contextmanager
def target(process: Process, context: T, cell: HasUUID | str) -> Iterator[T]:
    """:func:`target_cell` in the runtime that the caller has found."""
    if isinstance(cell, str):
        found = process.directory.cell(cell, or_name=True)
    else:
        found = process.directory.cell(cell.uuid)
    cell_context: Any = copy.copy(context)
    handle = Handle(process, found)
    try:
        cell_context.mq_connection = handle
        cell_context.cell_uuid = found.uuid
        if process.settings.db_connection:
            cell_context.db_connection = process.databases.of(found)
        yield cell_context
    finally:
        handle.release()


def cells(context: Any) -> list[KnownCell]:
    """The known cells, in the order of their ids.

    Blocks only where the mappings are not fresh, for ``lookup_timeout`` at
    most.  Thread-safe.

    :param context: the request's; tells which filter's memory it is
    :raises LookupFailed: the mappings are not known and cannot be read
    :raises LookupError: as for :func:`target_cell`
    """
    process = runtime.registry().of(context).process()
    return [KnownCell.of(row) for row in process.directory.mappings()]


def forget_instance(context: Any, instance_uuid: str) -> None:
    """Let this process look anew where an instance is.

    For a handler that has just moved one, after the new mapping is
    committed: no request that begins after this call gets an answer from
    before.  Other processes find out within ``instance_cache_ttl``.  Does not
    block.  Thread-safe.

    :param context: the request's; tells which filter's memory it is
    :raises LookupError: as for :func:`target_cell`
    """
    process = runtime.registry().of(context).process()
    process.directory.forget(instance_uuid.lower())


def refresh_cells(context: Any, *, timeout: float | None = None) -> None:
    """Read the cell mappings now, in this process.

    For a handler that has just changed one.  Other processes read them
    within twice ``cell_refresh_interval``.  Thread-safe.

    :param context: the request's; tells which filter's memory it is
    :param timeout: the longest to block, in seconds; None:
        ``lookup_timeout``
    :raises LookupFailed: the database did not answer; the mappings that were
        known before are used on
    :raises LookupError: as for :func:`target_cell`
    """
    process = runtime.registry().of(context).process()
    process.directory.refresh(timeout=timeout)
