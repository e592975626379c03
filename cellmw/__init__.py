# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""A request for an instance goes to the message queue of its cell.

A Paste-deployable WSGI filter for OpenStack-style APIs.  What is imported
here is what users of the package need; see the documentation.

Each name is loaded when it is first used, so that a command which needs
neither oslo.messaging nor SQLAlchemy starts without them.
"""

import importlib
import types
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cellmw.cells.mapping import CellMapping, KnownCell
    from cellmw.context import (
        RequestContext,
        cells,
        forget_instance,
        refresh_cells,
        target_cell,
    )
    from cellmw.deploy import filter_factory
    from cellmw.exceptions import (
        CellBusy,
        CellMisconfigured,
        CellMWError,
        CellTimeout,
        CellUnavailable,
        ConfigurationError,
        TransportReleased,
    )
    from cellmw.scatter import scatter_gather
else:
    from cellmw import cells

    class _Cells(types.ModuleType):
        """The package ``cellmw.cells``, which is the function as well.

        A function in its place would hide the modules of the package.
        """

        def __call__(self, context: Any) -> list[Any]:
            """The known cells; see :func:`cellmw.context.cells`."""
            return importlib.import_module("cellmw.context").cells(context)

    cells.__class__ = _Cells

# oslo.messaging imports eventlet where it is installed, which then says on
# standard error that it is deprecated.  Nobody who runs one of the commands
# can do anything about that; a service that uses eventlet is refused at load.
warnings.filterwarnings("ignore", r"\s*Eventlet is deprecated")

__all__ = [
    "CellBusy",
    "CellMWError",
    "CellMapping",
    "CellMisconfigured",
    "CellTimeout",
    "CellUnavailable",
    "ConfigurationError",
    "KnownCell",
    "RequestContext",
    "TransportReleased",
    "cells",
    "filter_factory",
    "forget_instance",
    "refresh_cells",
    "scatter_gather",
    "target_cell",
]

# Where each name comes from, unless it is an error.
_HOMES = {
    "CellMapping": "cellmw.cells.mapping",
    "KnownCell": "cellmw.cells.mapping",
    "RequestContext": "cellmw.context",
    "filter_factory": "cellmw.deploy",
    "forget_instance": "cellmw.context",
    "refresh_cells": "cellmw.context",
    "scatter_gather": "cellmw.scatter",
    "target_cell": "cellmw.context",
}


def __getattr__(name: str) -> Any:
    if name in __all__:
        home = importlib.import_module(_HOMES.get(name, "cellmw.exceptions"))
        value = getattr(home, name)
        globals()[name] = value
        return value
    if not name.startswith("_"):
        # A module of this package, which was not imported yet.
        try:
            return importlib.import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
