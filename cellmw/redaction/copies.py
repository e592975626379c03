# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Copy exceptions without the secrets that they show.

The copy is of the same class, or of one that derives from it and has its
name.  It keeps the attributes that show nothing.  Its frames print as the same
file and line, and hold no variables.  The chain, the notes and the members of
groups are copied the same way.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

from cellmw.redaction import exposure, urls
from cellmw.redaction.arguments import is_shown_by_c
from cellmw.redaction.text import describe, scrub
from cellmw.redaction.tracebacks import bare_traceback, strip_frames

_DEEPEST_GROUP = 20
_MORE = "(more errors)"
_TEXT = "_cellmw_text"


def safe_copy(error: BaseException) -> BaseException:
    """Return the exception itself if it shows no secret, otherwise a copy.

    Never raises.
    """
    try:
        if exposure.is_clean(error):
            return error
        return bare_copy(error)
    except Exception:
        return Exception(describe(error))


def made_safe(error: BaseException) -> BaseException:
    """Make an exception safe to raise to a service, whatever prints it then.

    If the exception or its frames show a secret, the variables are taken out
    of the frames, which still print as the same lines.

    :returns: the exception itself, or a copy where its own text, arguments or
        attributes show one
    """
    if exposure.is_clean(error):
        return error
    strip_frames(error)
    return safe_copy(error)


def bare_copy(error: BaseException) -> BaseException:
    """Return a copy of an exception, with its chain, that is safe to show."""
    errors = exposure.chain_of(error)[: exposure.MOST_ERRORS - 1]
    copies: dict[int, BaseException] = {}
    for one in errors:
        copy = _copy_of(one, copies)
        _set(copy, "__suppress_context__", one.__suppress_context__)
    for one in errors:
        for name in ("__cause__", "__context__"):
            other = getattr(one, name)
            if other is not None:
                linked = copies.get(id(other)) or Exception(_MORE)
                _set(copies[id(one)], name, linked)
    copy = copies[id(error)]
    return copy if exposure.is_clean(copy) else Exception(describe(error))


def _copy_of(
    error: BaseException, copies: dict[int, BaseException], depth: int = 0
) -> BaseException:
    """Return the copy of one exception, made once, without its chain."""
    copy = copies.get(id(error))
    if copy is not None:
        return copy
    if len(copies) >= exposure.MOST_ERRORS or depth > _DEEPEST_GROUP:
        return Exception(_MORE)
    members = None
    if isinstance(error, BaseExceptionGroup):
        members = [
            _copy_of(one, copies, depth + 1) for one in error.exceptions
        ]
    copy = copies[id(error)] = _copy_one(error, members)
    _set(copy, "__traceback__", bare_traceback(error.__traceback__))
    return copy


# Past the class's own way to set attributes.
_set = BaseException.__setattr__


def _copy_one(
    error: BaseException, members: list[BaseException] | None
) -> BaseException:
    try:
        text = scrub(str(error))
    except Exception:
        # As the traceback module says it.
        text = "<exception str() failed>"
    args = tuple(_kept(arg) for arg in error.args)
    if members is not None:
        args = (_kept(error.args[0]), members)
    for kind in _kinds(type(error)):
        with contextlib.suppress(Exception):
            copy = _new(kind, args)
            _fill(copy, error, text)
            if str(copy) == text:
                return copy
    return Exception(text)


def _kinds(kind: Any) -> tuple[type[BaseException], ...]:
    # A text that the class's own code makes may need what the copy lacks.
    shown = _derived(kind)
    return (kind, shown) if is_shown_by_c(kind) else (shown,)


@functools.lru_cache(maxsize=256)
def _derived(kind: type[BaseException]) -> type[BaseException]:
    """Make a class that looks like this one, and prints a scrubbed text.

    It derives from the first base without a hook for subclasses, because some
    classes register each subclass.
    """
    namespace = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__str__": _show,
        "__repr__": BaseException.__repr__,
    }
    # The last one is object, whose hook does nothing.
    hooked = {b for b in kind.__mro__[:-1] if "__init_subclass__" in vars(b)}
    base = next(
        base
        for base in kind.__mro__
        if type(base) is type and hooked.isdisjoint(base.__mro__)
    )
    return type(kind.__name__, (base,), namespace)


def _show(error: BaseException) -> str:
    text: str = error.__dict__[_TEXT]
    return text


def _new(kind: type[BaseException], args: tuple[Any, ...]) -> BaseException:
    builtin = next(b for b in kind.__mro__ if b.__module__ == "builtins")
    copy: BaseException = builtin.__new__(kind, *args)
    if type(copy) is not kind:
        raise TypeError(kind)
    return copy


def _fill(copy: BaseException, error: BaseException, text: str) -> None:
    """Copy the attributes that show nothing."""
    for name, value, descriptor in exposure.attributes(error):
        if name == "__notes__":
            # Printing makes their texts.
            copy.__dict__[name] = _notes(value)
        elif descriptor is None:
            copy.__dict__[name] = _kept(value)
        else:
            # Some are read-only.
            with contextlib.suppress(Exception):
                _set_member(copy, descriptor, value)
    if type(copy).__str__ is _show:
        copy.__dict__[_TEXT] = text


def _set_member(copy: BaseException, descriptor: Any, value: Any) -> None:
    current = None
    with contextlib.suppress(AttributeError):
        current = descriptor.__get__(copy)
    # An OSError shows whatever was set, None as well.
    if current is not value:
        descriptor.__set__(copy, _kept(value))


def _notes(notes: Any) -> list[str]:
    if isinstance(notes, (list, tuple)):
        return [scrub(str(note)) for note in notes]
    return [scrub(repr(notes))]


def _kept(value: Any) -> Any:
    if exposure.shows_nothing(value):
        return value
    if isinstance(value, str):
        return scrub(str.__str__(value))
    return urls.HIDDEN
