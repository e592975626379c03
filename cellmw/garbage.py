# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Whether a thread is collecting garbage.

What the collector finalizes runs in the thread that happens to collect, in
the middle of whatever that was doing, also with a lock held: a generator that
nobody finished is ended there, with its ``finally`` and all.  What would take
a lock then is left to another thread.
"""

from __future__ import annotations

import gc
import threading

# There is one collection at a time in a process.
_collector: int | None = None


def _note(phase: str, info: object) -> None:
    global _collector  # noqa: PLW0603 - of the process, as the collector is
    _collector = threading.get_ident() if phase == "start" else None


gc.callbacks.append(_note)


def is_collected_here() -> bool:
    """Whether the calling thread is in the middle of a collection."""
    return _collector is not None and _collector == threading.get_ident()
