# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What a forked child does with what its parent had open: nothing."""

from __future__ import annotations

import ctypes


def keep_for_ever(inherited: object) -> None:
    """Let an object never be collected, not even when the process ends.

    A forked child has a copy of its parent's transports and engines.  Were
    those collected, in use or at exit, their drivers' finalizers would run in
    the wrong process.  Those of amqp 5.2 and 5.4, PyMySQL and psycopg2 were
    seen to leave the parent's connections alone; no driver promises that.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(inherited))
