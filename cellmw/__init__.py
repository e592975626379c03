# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""A request for an instance goes to the message queue of its cell.

A Paste-deployable WSGI filter for OpenStack-style APIs.  What is imported
here is what users of the package need; see the documentation.
"""

import importlib
import types
import warnings
from typing import TYPE_CHECKING, Any

# oslo.messaging imports eventlet where it is installed, which then says on
# standard error that it is deprecated.  Nobody who runs one of the commands
# can do anything about that; a service that uses eventlet is refused at load.
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", r"\s*Eventlet is deprecated")
    importlib.import_module("oslo_messaging")

from cellmw import context as contexts
from cellmw.cells.mapping import CellMapping, KnownCell
from cellmw.context import (
    RequestContext,
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

if TYPE_CHECKING:
    from cellmw.context import cells
else:
    from cellmw import cells

    class _Cells(types.ModuleType):
        """The package ``cellmw.cells``, which is the function as well.

        A function in its place would hide the modules of the package.
        """

        def __call__(self, context: Any) -> list[KnownCell]:
            """The known cells; see :func:`cellmw.context.cells`."""
            return contexts.cells(context)

    cells.__class__ = _Cells

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
