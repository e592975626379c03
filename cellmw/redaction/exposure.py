# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Check whether logging an exception would show a secret.

A log handler shows the text of an exception, its arguments and its notes, the
same of its chain and of the members of groups, and, as error trackers do, its
attributes and the variables of its frames.  This module collects all that as
texts.  It reads what stands in an object itself, and calls no property,
descriptor or iterator of somebody else's.  It calls ``repr`` of an object only
where that belongs to a library that holds credentials, or where an attribute
of the object is secret and the question is whether ``repr`` shows it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

from cellmw.redaction import text
from cellmw.redaction.arguments import NUMBERS, PLAIN, is_shown_by_c

#: Most exceptions and frames that are looked at; what has more is replaced.
MOST_ERRORS = 500
MOST_FRAMES = 2000
_MOST_VALUES = 50_000
# Of one container.  No handler shows more.
_MOST_MEMBERS = 1000
_DEEPEST = 4
_TOO_MUCH = "there is more than is looked at"
# The frame's, the variable's and the argument's (CPython 3.11 and 3.12; later
# versions make no snapshot).
_REFERENCES_OF_SNAPSHOT = 3

# Packages whose objects may show a credential by their repr.
_LIBRARIES = frozenset(
    (
        *("MySQLdb", "amqp", "cellmw", "kombu", "oslo_db", "oslo_messaging"),
        *("pg8000", "psycopg", "psycopg2", "pymysql", "sqlalchemy"),
    )
)
# Those of C and of ``__slots__``.
_DESCRIPTORS = (types.MemberDescriptorType, types.GetSetDescriptorType)
_CONTAINERS = (list, tuple, set, frozenset)
_TELL_NOTHING = (
    type,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
)
# Read past what a class makes of these names.
_args_of = vars(BaseException)["args"].__get__
_cause_of = vars(BaseException)["__cause__"].__get__
_context_of = vars(BaseException)["__context__"].__get__
_traceback_of = vars(BaseException)["__traceback__"].__get__
_members_of = vars(BaseExceptionGroup)["exceptions"].__get__


def is_clean(
    error: BaseException, traceback: types.TracebackType | None = None
) -> bool:
    """Say whether an exception can be given to any handler as it is.

    :param traceback: another one that the handler gets with it
    """
    texts: list[str] = []
    values: list[Any] = []
    errors = chain_of(error)
    try:
        for one in errors:
            _add_values_of(one, values, texts)
            own = _traceback_of(one)
            add_variables_of(own, values)
            if traceback is own:
                traceback = None
        add_variables_of(traceback, values)
        return len(errors) <= MOST_ERRORS and _are_clean(values, texts)
    except RuntimeError:
        return False


def shows_nothing(value: object) -> bool:
    """Say whether an attribute of an exception can be shown."""
    try:
        return _are_clean([value], [])
    except RuntimeError:
        return False


def chain_of(error: BaseException) -> list[BaseException]:
    """Return an exception, its chain and the members of groups.

    Ends behind :data:`MOST_ERRORS`.
    """
    waiting = [_cause_of(error), _context_of(error)]
    if waiting == [None, None] and not isinstance(error, BaseExceptionGroup):
        return [error]
    found: dict[int, BaseException] = {}
    waiting = [error]
    while waiting and len(found) <= MOST_ERRORS:
        one = waiting.pop()
        if one is None or id(one) in found:
            continue
        found[id(one)] = one
        waiting += (_cause_of(one), _context_of(one))
        if isinstance(one, BaseExceptionGroup):
            waiting += _members_of(one)
    return list(found.values())


def add_variables_of(
    traceback: types.TracebackType | None, values: list[Any]
) -> None:
    """Collect the values of the variables of a traceback's frames.

    :raises RuntimeError: there are more frames than are looked at
    """
    left = MOST_FRAMES
    while traceback is not None:
        frame = traceback.tb_frame
        variables = frame.f_locals
        if variables:
            values += variables.values()
            if frame.f_code.co_flags & inspect.CO_OPTIMIZED and (
                type(variables) is dict
                and sys.getrefcount(variables) == _REFERENCES_OF_SNAPSHOT
            ):
                # A snapshot that would keep alive what the frame lets go.
                # The function itself may hold the same one, from locals().
                variables.clear()
        traceback = traceback.tb_next
        left -= 1
        if not left and traceback is not None:
            raise RuntimeError(_TOO_MUCH)


def attributes(error: BaseException) -> Iterator[tuple[str, Any, Any]]:
    """Read what an exception holds, past its class's own ways to do so.

    :returns: name, value, and the descriptor that reads and sets it; None for
        what stands in the instance's dictionary
    """
    for name, value in _dictionary(error).items():
        yield name, value, None
    kind: Any = type(error)
    for name, descriptor in _members(kind):
        with contextlib.suppress(Exception):
            yield name, descriptor.__get__(error), descriptor


def _are_clean(values: list[Any], texts: list[str]) -> bool:
    """Say whether values, and what these hold, show nothing.

    :raises RuntimeError: there is more than is looked at, or another thread
        changes a container meanwhile
    """
    odd = []
    for value in values:
        kind: Any = type(value)
        if kind is str:
            texts.append(value)
        elif kind not in NUMBERS:
            odd.append(value)
    if odd:
        seen: dict[int, Any] = {}
        for _ in range(_DEEPEST + 1):
            odd = _look_at(odd, texts, seen)
    joined = "\n".join(texts)
    return text.is_clean(joined) or text.scrub(joined) is joined


def _look_at(
    values: list[Any], texts: list[str], seen: dict[int, Any]
) -> list[Any]:
    """Collect the texts of some values.

    :param seen: those that were looked at, which keeps them alive
    :returns: the values that these hold
    """
    held: list[Any] = []
    for value in values:
        kind: Any = type(value)
        if kind is str:
            texts.append(value)
        elif kind in NUMBERS or id(value) in seen:
            continue
        else:
            seen[id(value)] = value
            if len(seen) + len(texts) > _MOST_VALUES:
                raise RuntimeError(_TOO_MUCH)
            if isinstance(value, str):
                texts.append(str.__str__(value))
            elif isinstance(value, (bytes, bytearray)):
                texts.append(value.decode("utf-8", "replace"))
            elif isinstance(value, (*_CONTAINERS, dict)):
                held += _items(value)
            elif isinstance(value, BaseException):
                _add_values_of(value, held, texts)
            elif not isinstance(value, _TELL_NOTHING):
                _look_at_object(value, kind, texts)
    return held


def _add_values_of(
    error: BaseException, values: list[Any], texts: list[str]
) -> None:
    """Collect what an exception holds, and its text."""
    kind: Any = type(error)
    is_by_c, dictionary, members = _nature_of(kind)
    args = _args_of(error)
    if not is_by_c or not PLAIN.issuperset(map(type, args)):
        # What fails here fails in a handler as well.
        with contextlib.suppress(Exception):
            texts.append(str.__str__(str(error)))
    values += args
    values += dictionary.__get__(error).values()
    if members:
        values += [value for _, value, _ in attributes(error)]


@functools.lru_cache(maxsize=1024)
def _nature_of(kind: Any) -> tuple[bool, Any, bool]:
    """Say whether C makes an exception's text, and where its values are."""
    return is_shown_by_c(kind), _dictionary_of(kind), bool(_members(kind))


def _look_at_object(value: Any, kind: Any, texts: list[str]) -> None:
    if _is_configuration(kind):
        # Error trackers open it, and find every connection string.
        raise RuntimeError(_TOO_MUCH)
    if kind.__repr__ is object.__repr__:
        return
    if not _is_of_library(kind):
        own = _dictionary(value).values()
        if text.is_clean("\n".join([one for one in own if type(one) is str])):
            return
    with contextlib.suppress(Exception):
        texts.append(str.__str__(repr(value)))


@functools.lru_cache(maxsize=1024)
def _is_of_library(kind: type) -> bool:
    return any(
        str(base.__module__).partition(".")[0] in _LIBRARIES
        for base in kind.__mro__
    )


@functools.lru_cache(maxsize=1024)
def _is_configuration(kind: type) -> bool:
    return kind.__module__.startswith("oslo_config.") and issubclass(
        kind, Mapping
    )


def _items(value: Any) -> list[Any]:
    kind: Any
    for kind in _CONTAINERS:
        if isinstance(value, kind):
            return list(itertools.islice(kind.__iter__(value), _MOST_MEMBERS))
    pairs = itertools.islice(dict.items(value), _MOST_MEMBERS)
    return list(itertools.chain.from_iterable(pairs))


def _dictionary(value: object) -> dict[str, Any]:
    kind: Any = type(value)
    descriptor = _dictionary_of(kind)
    return {} if descriptor is None else descriptor.__get__(value)


@functools.lru_cache(maxsize=1024)
def _dictionary_of(kind: type) -> Any:
    for base in kind.__mro__:
        found = vars(base).get("__dict__")
        if isinstance(found, _DESCRIPTORS):
            return found
    return None


@functools.lru_cache(maxsize=1024)
def _members(kind: type) -> tuple[tuple[str, Any], ...]:
    """Return what C and ``__slots__`` keep of such exceptions."""
    return tuple(
        (name, descriptor)
        for base in kind.__mro__
        if base not in (BaseException, Exception, object)
        for name, descriptor in vars(base).items()
        if isinstance(descriptor, _DESCRIPTORS)
        and not name.startswith("__")
        and name != "exceptions"
    )
