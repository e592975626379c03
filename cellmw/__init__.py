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

from cellmw.cells.mapping import CellMapping
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
    CellUnavailable,
    ConfigurationError,
    TransportReleased,
)

__all__ = [
    "CellBusy",
    "CellMWError",
    "CellMapping",
    "CellMisconfigured",
    "CellUnavailable",
    "ConfigurationError",
    "RequestContext",
    "TransportReleased",
    "filter_factory",
    "forget_instance",
    "refresh_cells",
    "target_cell",
]
