# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Copy tracebacks without the variables of their frames.

A traceback leads to the frames, and those lead to every local variable of the
libraries that it went through: the message of an error may be clean, and the
password stands in a frame.
"""

from __future__ import annotations

import ast
import functools
import itertools
import linecache
import types

from cellmw.redaction.exposure import MOST_ERRORS, MOST_FRAMES

_Position = tuple[int, int, int, int]

_GENERATOR = "def f():\n yield"


def bare_traceback(
    traceback: types.TracebackType | None,
) -> types.TracebackType | None:
    """The same traceback without any local or global variable."""
    entries: list[types.TracebackType] = []
    while traceback is not None and len(entries) < MOST_FRAMES:
        entries.append(traceback)
        traceback = traceback.tb_next
    copy = None
    for entry in reversed(entries):
        frame, instruction = _bare_frame_of(entry)
        copy = types.TracebackType(copy, frame, instruction, entry.tb_lineno)
    return copy


def strip_frames(error: BaseException) -> None:
    """Take the variables out of the tracebacks of an exception's chain.

    The exceptions themselves stay what they are.
    """
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting and len(seen) < MOST_ERRORS:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        BaseException.__setattr__(
            one, "__traceback__", bare_traceback(one.__traceback__)
        )
        waiting += [one.__cause__, one.__context__]
        if isinstance(one, BaseExceptionGroup):
            waiting += one.exceptions


def _bare_frame_of(
    entry: types.TracebackType,
) -> tuple[types.FrameType, int]:
    frame = entry.tb_frame
    code = frame.f_code
    # The bare frame cannot find sources that a loader has.
    linecache.lazycache(code.co_filename, frame.f_globals)
    return _bare_frame(
        code.co_filename,
        code.co_name,
        code.co_qualname,
        str(frame.f_globals.get("__name__", "")),
        _position(code, entry.tb_lasti),
    )


def _position(code: types.CodeType, instruction: int) -> _Position | None:
    if instruction < 0:
        return None
    found = next(
        itertools.islice(code.co_positions(), instruction // 2, None), (None,)
    )
    if None in found:
        return None
    return found  # type: ignore[return-value]  # checked just now


@functools.lru_cache(maxsize=2048)
def _bare_frame(
    filename: str,
    name: str,
    qualified_name: str,
    module: str,
    position: _Position | None,
) -> tuple[types.FrameType, int]:
    """A frame that stands at this place, and the instruction there.

    That of a generator which was never started: it ran nothing, has no
    variables and no caller.
    """
    tree = ast.parse(_GENERATOR)
    if position is not None:
        for node in ast.walk(tree):
            if isinstance(node, (ast.stmt, ast.expr)):
                node.lineno, node.end_lineno = position[:2]
                node.col_offset, node.end_col_offset = position[2:]
    code = next(
        constant
        for constant in compile(tree, "", "exec").co_consts
        if isinstance(constant, types.CodeType)
    ).replace(co_filename=filename, co_name=name, co_qualname=qualified_name)
    frame = types.FunctionType(code, {"__name__": module})().gi_frame
    for index, found in enumerate(code.co_positions()):
        if found == position:
            return frame, index * 2
    return frame, -1
