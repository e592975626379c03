# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Copies of exceptions that can be shown: scrubbed, and without variables.

A traceback leads to the frames, and those to every local variable of the
libraries that it went through: the message of an error may be clean, and the
password stands in a frame.  So a copy has frames of its own, which print as
the same file, line and marks, and hold nothing.  The copy is of the same
class, or of a class made for it that derives from that one, has its name and
shows the scrubbed text.  The chain, the notes and the members of groups are
copied the same way.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import itertools
import linecache
import types
from typing import Any

from cellmw.redaction import urls
from cellmw.redaction.text import escape, scrub

_Position = tuple[int, int, int, int]

# What tells nothing but itself.
_NUMBERS = (int, float, bool, type(None))
_SYNTAX = (
    "msg",
    "filename",
    "lineno",
    "offset",
    "text",
    "end_lineno",
    "end_offset",
    "print_file_and_line",
)
_MOST_ERRORS = 500
_MOST_FRAMES = 2000
_DEEPEST_GROUP = 20

_GENERATOR = "def f():\n yield"


def bare_copy(error: BaseException) -> BaseException:
    """A copy of an exception, with its chain, that is safe to show."""
    copies = _Copies()
    copy = copies.of(error)
    copies.link()
    return copy


def bare_traceback(
    traceback: types.TracebackType | None,
) -> types.TracebackType | None:
    """The same traceback without any local or global variable."""
    entries: list[types.TracebackType] = []
    while traceback is not None and len(entries) < _MOST_FRAMES:
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
    while waiting and len(seen) < _MOST_ERRORS:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        _set(one, "__traceback__", bare_traceback(one.__traceback__))
        waiting += [one.__cause__, one.__context__]
        if isinstance(one, BaseExceptionGroup):
            waiting += one.exceptions


class _Copies:
    """The copies of the exceptions of one chain, each made once."""

    def __init__(self) -> None:
        self._made: dict[int, BaseException] = {}
        self._originals: list[BaseException] = []

    def of(self, error: BaseException, depth: int = 0) -> BaseException:
        made = self._made.get(id(error))
        if made is not None:
            return made
        if len(self._originals) >= _MOST_ERRORS or depth > _DEEPEST_GROUP:
            return Exception("(more errors)")
        members = None
        if isinstance(error, BaseExceptionGroup):
            members = [
                self.of(member, depth + 1) for member in error.exceptions
            ]
        copy = _copy_one(error, members)
        _set(copy, "__traceback__", bare_traceback(error.__traceback__))
        self._made[id(error)] = copy
        self._originals.append(error)
        return copy

    def link(self) -> None:
        # Grows while it is gone through: a chain may be a long one.
        for error in self._originals:
            copy = self._made[id(error)]
            if error.__cause__ is not None:
                _set(copy, "__cause__", self.of(error.__cause__))
            if error.__context__ is not None:
                _set(copy, "__context__", self.of(error.__context__))
            _set(copy, "__suppress_context__", error.__suppress_context__)


def _copy_one(
    error: BaseException, members: list[BaseException] | None
) -> BaseException:
    text = _text_of(error)
    args = tuple(_plain(arg) for arg in error.args)
    if members is not None:
        args = (_plain(error.args[0]), members)
    for make in (_of_same_class, _of_derived_class, _of_no_class):
        with contextlib.suppress(Exception):
            copy = make(type(error), args, text)
            _fill(copy, error)
            if str(copy) == text:
                return copy
    return Exception(text)


def _of_same_class(
    kind: type[BaseException], args: tuple[Any, ...], text: str
) -> BaseException:
    for method in ("__str__", "__repr__"):
        if not _is_builtin(_owner(kind, method)):
            # It needs what the copy lacks.
            raise TypeError(method)
    return _new(kind, args)


def _of_derived_class(
    kind: type[BaseException], args: tuple[Any, ...], text: str
) -> BaseException:
    # mypy takes the __hash__ of the instances for that of the class.
    copy = _new(_derived(kind), args)  # type: ignore[arg-type]
    copy.__dict__[_TEXT] = text
    return copy


def _of_no_class(
    kind: type[BaseException], args: tuple[Any, ...], text: str
) -> BaseException:
    name = kind.__name__
    stand_in: Any = type(name, (Exception,), _shown_as(kind))
    copy: BaseException = stand_in(text)
    return copy


def _new(kind: type[BaseException], args: tuple[Any, ...]) -> BaseException:
    builtin = next(base for base in kind.__mro__ if _is_builtin(base))
    copy = builtin.__new__(kind, *args)
    if type(copy) is not kind:
        raise TypeError(kind)
    assert isinstance(copy, BaseException)
    return copy


_TEXT = "_cellmw_text"


@functools.lru_cache(maxsize=256)
def _derived(kind: type[BaseException]) -> type[BaseException]:
    namespace = {
        **_shown_as(kind),
        "__str__": _show,
        "__repr__": BaseException.__repr__,
    }
    return type(kind.__name__, (kind,), namespace)


def _show(error: BaseException) -> str:
    text: str = error.__dict__[_TEXT]
    return text


def _shown_as(kind: type[BaseException]) -> dict[str, Any]:
    return {"__module__": kind.__module__, "__qualname__": kind.__qualname__}


def _owner(kind: type[BaseException], method: str) -> type:
    return next(base for base in kind.__mro__ if method in base.__dict__)


def _is_builtin(kind: type) -> bool:
    return kind.__module__ == "builtins"


def _fill(copy: BaseException, error: BaseException) -> None:
    """What handlers may look at, as far as it is numbers and text."""
    for name, value in vars(error).items():
        if isinstance(value, str) or type(value) in _NUMBERS:
            copy.__dict__.setdefault(name, _plain(value))
    notes = getattr(error, "__notes__", None)
    if isinstance(notes, (list, tuple)):
        copy.__dict__["__notes__"] = [scrub(str(note)) for note in notes]
    elif notes is not None:
        copy.__dict__["__notes__"] = [scrub(repr(notes))]
    if isinstance(error, SyntaxError):
        for name in _SYNTAX:
            _set(copy, name, _plain(getattr(error, name, None)))


# Whatever the class itself does when somebody sets something.
_set = BaseException.__setattr__


def _plain(value: object) -> object:
    if type(value) in _NUMBERS:
        return value
    try:
        return scrub(str(value))
    except Exception:
        return urls.HIDDEN


def _text_of(error: BaseException) -> str:
    try:
        text = scrub(str(error))
    except Exception:
        # The words of the traceback module.
        return "<exception str() failed>"
    ours = type(error).__module__.partition(".")[0] == "cellmw"
    return escape(text) if ours else text


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
