# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What a forked child does with what its parent had open: nothing."""

from __future__ import annotations

import ctypes


def keep_for_ever(inherited: object) -> None:
    """Let an object never be collected, not even when the process ends.

    A forked child has a copy of its parent's transports and engines.  Were
    those collected, in use or at exit, their finalizers would shut down the
    sockets, and with them the parent's connections.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(inherited))
