# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What stock Nova's handlers target themselves goes through this package.

Nova's ``set_target_cell`` takes a cell's database and transport from
``nova.context.CELL_CACHE``, a dictionary by cell UUID that Nova fills once.
:func:`place` puts a :class:`CellCache` there, which gives what the cell's
mapping says now.  Nova's code is neither patched nor copied.

This module imports Nova in functions only: no other service needs it.
"""

from __future__ import annotations

import dataclasses
import importlib
import types
from collections.abc import Callable
from typing import Any, Protocol

from cellmw import exceptions, hidden_errors
from cellmw.cells.databases import Databases
from cellmw.options import Settings
from cellmw.redaction import Secret
from cellmw.transports import handle

_OPTION = "nova_cell_cache = true"
_CACHE = "CELL_CACHE"


class Process(handle.Process, Protocol):
    """What the cache needs of the process that it is in."""

    databases: Databases


class CellCache(dict[str, tuple[Any, Any]]):
    """Stands in the place of ``nova.context.CELL_CACHE``.  Thread-safe.

    ``[uuid]`` gives the pair that Nova expects, ``db_connection`` and
    ``mq_connection``, as the cell's mapping says now.  It never raises
    KeyError: Nova would then connect by itself, past this package.  What
    Nova puts into it is ignored.  It may be used on both sides of a fork.

    The dictionary's own items are the pairs that were given last.

    :param here: gives the state of the calling process
    """

    def __init__(self, here: Callable[[], Process]) -> None:
        super().__init__()
        self.here = here

    def __getitem__(self, cell_uuid: str) -> tuple[Any, Any]:
        """The pair of a cell.

        Blocks for ``lookup_timeout`` at most, and only where the known cell
        mappings are too old.

        :raises CellNotFound: there is no such cell, and never was
        :raises LookupFailed: the API database could not be asked, and never
            was
        """
        process = self.here()
        last = self.get(cell_uuid)
        try:
            cell = process.cell(cell_uuid)
        except exceptions.CellNotFound as error:
            # Nova remembers the cells that it has seen and goes on asking
            # their databases.  A message to one that is gone is refused.
            if last is None:
                self._note(process, error)
                raise
            return last
        except exceptions.LookupFailed as error:
            self._note(process, error)
            raise
        if last is None:
            transport: Any = handle.CellTransport(self._here, cell_uuid)
        else:
            transport = last[1]
        pair = process.databases.of(cell), transport
        if pair != last:
            super().__setitem__(cell_uuid, pair)
        return pair

    def _note(self, process: Process, error: exceptions.CellMWError) -> None:
        process.refusals.note(error, hidden_errors.request_id())
        hidden_errors.note(error)

    def __setitem__(self, cell_uuid: str, pair: tuple[Any, Any]) -> None:
        """Ignore what Nova has made itself."""

    def _here(self) -> Process:
        # A filter that was loaded later may have changed it.
        return self.here()


def prepare(settings: Settings) -> Settings:
    """Check that Nova is one that we know; imports it.

    :returns: the settings, with the exceptions that Nova lets come back
    :raises ConfigurationError: it is not
    """
    context = _imported("nova.context")
    _check_cache(context)
    _function("nova.db.main.api", "create_context_manager")
    modules = _function("nova.rpc", "get_allowed_exmods")()
    allowed = dict.fromkeys((*settings.allowed_remote_exmods, *modules))
    return dataclasses.replace(settings, allowed_remote_exmods=tuple(allowed))


def place(here: Callable[[], Process]) -> None:
    """Put our cache in the place of Nova's, or renew ours.

    Opens nothing, and closes the database connections that Nova has opened
    in the load.  Of several filters with different settings in a process
    the one that was loaded last counts.
    """
    context: Any = importlib.import_module("nova.context")
    placed = getattr(context, _CACHE)
    if isinstance(placed, CellCache):
        placed.clear()
        placed.here = here
        return
    setattr(context, _CACHE, CellCache(here))
    for database, _ in placed.values():
        # A server that forks after the load would keep them for ever.
        dispose = getattr(database, "dispose_pool", None)
        if dispose is not None:
            dispose()


def make_database(url: Secret) -> Any:
    """The context manager of a cell's database, as Nova makes it itself.

    Opens no connection.
    """
    return _function("nova.db.main.api", "create_context_manager")(
        url.reveal()
    )


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        # Nova's modules do more than import others, and fail in other ways.
        problem = f"{name} cannot be imported ({type(error).__name__})"
    raise _unknown(problem)


def _function(module: str, name: str) -> Callable[..., Any]:
    found = getattr(_imported(module), name, None)
    if not callable(found):
        raise _unknown(f"{module} has no function {name}")
    function: Callable[..., Any] = found
    return function


def _check_cache(context: Any) -> None:
    """See whether ``set_target_cell`` uses the cache as we know it."""
    cache = getattr(context, _CACHE, None)
    if not isinstance(cache, dict):
        raise _unknown(f"nova.context.{_CACHE} is not a dictionary")
    if not all(isinstance(v, tuple) and len(v) == 2 for v in cache.values()):
        raise _unknown(f"nova.context.{_CACHE} does not hold pairs")
    set_target_cell = _function("nova.context", "set_target_cell")
    database, transport = object(), object()
    mapping = types.SimpleNamespace(uuid="cellmw-probe")
    target = types.SimpleNamespace()
    setattr(context, _CACHE, {mapping.uuid: (database, transport)})
    try:
        set_target_cell(target, mapping)
    except Exception as error:
        problem = f"set_target_cell raises {type(error).__name__}"
    else:
        problem = f"set_target_cell does not take its pairs from {_CACHE}"
    finally:
        setattr(context, _CACHE, cache)
    if vars(target) != {
        "db_connection": database,
        "mq_connection": transport,
        "cell_uuid": mapping.uuid,
    }:
        raise _unknown(problem)


def _unknown(problem: str) -> exceptions.ConfigurationError:
    return exceptions.ConfigurationError(
        f"cellmw: {_OPTION} needs a Nova that this package knows: {problem}. "
        "Install a version that is listed in the documentation, or set "
        "nova_cell_cache = false."
    )
