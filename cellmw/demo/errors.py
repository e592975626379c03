# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What keeps the demo from running."""

from __future__ import annotations


class DemoError(Exception):
    """The demo cannot run; the text says why, and what to do, in a line."""
