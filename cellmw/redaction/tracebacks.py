# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Copy tracebacks without the variables of their frames.

A traceback leads to the frames, and those lead to every local variable of the
libraries that it went through: the message of an error may be clean, and the
password stands in a frame.
"""

from __future__ import annotations

import functools
import linecache
import types
from collections.abc import Iterator

from cellmw.redaction.exposure import MOST_FRAMES, chain_of


def bare_traceback(
    traceback: types.TracebackType | None,
) -> types.TracebackType | None:
    """Copy a traceback, without any local or global variable.

    It prints the same files, lines and functions, without the marks below a
    line that tell the place in it.
    """
    entries: list[types.TracebackType] = []
    while traceback is not None and len(entries) < MOST_FRAMES:
        entries.append(traceback)
        traceback = traceback.tb_next
    copy = None
    for entry in reversed(entries):
        code, names = entry.tb_frame.f_code, entry.tb_frame.f_globals
        # The bare frame cannot find sources that a loader has.
        linecache.lazycache(code.co_filename, names)
        module = str(names.get("__name__", ""))
        frame = _bare_frame(
            code.co_filename, code.co_name, code.co_qualname, module
        )
        copy = types.TracebackType(copy, frame, -1, entry.tb_lineno)
    return copy


def strip_frames(error: BaseException) -> None:
    """Take the variables out of the tracebacks of an exception's chain.

    The exceptions themselves stay what they are.
    """
    for one in chain_of(error):
        BaseException.__setattr__(
            one, "__traceback__", bare_traceback(one.__traceback__)
        )


def _never_started() -> Iterator[None]:
    yield


@functools.lru_cache(maxsize=2048)
def _bare_frame(
    filename: str, name: str, qualified_name: str, module: str
) -> types.FrameType:
    """Make the frame of a generator that has run nothing.

    So it has no variables and no caller.
    """
    code = _never_started.__code__.replace(
        co_filename=filename, co_name=name, co_qualname=qualified_name
    )
    frame: types.FrameType
    frame = types.FunctionType(code, {"__name__": module})().gi_frame
    return frame
