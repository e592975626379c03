# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Which threads are left."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Iterable


def left_since(
    before: Iterable[threading.Thread], *, within: float
) -> set[threading.Thread]:
    """The threads that were not there before and do not end by themselves.

    :param within: seconds that they may take to end
    """
    deadline = time.monotonic() + within
    while left := set(threading.enumerate()).difference(before):
        if time.monotonic() > deadline:
            break
        for thread in left:
            thread.join(0.05)
    return left


def describe(threads: Iterable[threading.Thread]) -> str:
    """Each thread's name, and where it is."""
    frames = sys._current_frames()
    lines = []
    for thread in threads:
        lines.append(f"{thread!r}\n")
        frame = frames.get(thread.ident or 0)
        if frame is not None:
            lines.extend(traceback.format_stack(frame)[-3:])
    return "".join(lines)
