# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""A request for an instance goes to the message queue of its cell.

A Paste-deployable WSGI filter for OpenStack-style APIs.  What is imported
here is what users of the package need; see the documentation.
"""

import importlib
import warnings

# oslo.messaging imports eventlet where it is installed, which then says on
# standard error that it is deprecated.  Nobody who runs one of the commands
# can do anything about that; a service that uses eventlet is refused at load.
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", r"\s*Eventlet is deprecated")
    importlib.import_module("oslo_messaging")

from cellmw.cells.mapping import CellMapping, KnownCell

# The function hides the package of this name as an attribute: in here, and
# only here, "from cellmw import cells" gives the function.  Modules are
# imported with "from cellmw.cells import ..." as ever.
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
