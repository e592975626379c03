# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Scrub the message and the arguments of log records.

An argument that shows no secret stays the very object.  If an object's own
code makes its text, a :class:`Shown` takes its place, and scrubs the text when
a formatter asks for it.  So ``__str__`` and ``__repr__`` run as often as
without this package.
"""

from __future__ import annotations

import datetime
import functools
import numbers
import operator
import types
import uuid
from collections.abc import Callable, Collection, Mapping
from typing import Any

from cellmw.redaction.secret import Secret

Tidy = Callable[[str], str]

#: Their texts hold digits, and no more.
NUMBERS = frozenset({int, float, bool, complex, type(None), Secret})
#: And texts.
PLAIN = NUMBERS | {str}
_HARMLESS = (
    numbers.Number,
    datetime.date,
    datetime.time,
    datetime.timedelta,
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.ModuleType,
    uuid.UUID,
)
_CONTAINERS = (dict, list, tuple, set, frozenset)
_DEEPEST = 4
# What formatters that write JSON open.
_OPENS = ("items", "iteritems", "to_dict")


class Shown:
    """Replaces an object in a log record, and scrubs its texts.

    It has the object's attributes, except those that list what it holds.
    """

    __slots__ = ("_shown", "_tidy")

    def __init__(self, value: object, tidy: Tidy) -> None:
        self._shown = value
        self._tidy = tidy

    # For filters that call isinstance().
    @property  # type: ignore[misc]  # object has a writable one
    def __class__(self) -> type:
        kind: Any = type(self._shown)
        return Shown if _is_opened(kind) else kind

    def __str__(self) -> str:
        return self._tidy(str(self._shown))

    def __repr__(self) -> str:
        return self._tidy(repr(self._shown))

    def __format__(self, spec: str) -> str:
        return self._tidy(format(self._shown, spec))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in _OPENS:
            raise AttributeError(name)
        return getattr(self._shown, name)

    def __eq__(self, other: object) -> bool:
        return bool(self._shown == other)

    def __hash__(self) -> int:
        return hash(self._shown)

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return str, (str(self),)


class _ShownMapping(Shown):
    """Replaces a mapping from which ``%(name)s`` takes values."""

    __slots__ = ()

    def __getitem__(self, key: object) -> object:
        mapping: Any = self._shown
        return clean(mapping[key], self._tidy)


class Formatted:
    """A message that is formatted and scrubbed when it is shown."""

    __slots__ = ("_args", "_message", "_tidy")

    def __init__(self, message: str, args: Any, tidy: Tidy) -> None:
        self._message = message
        self._args = args
        self._tidy = tidy

    def __str__(self) -> str:
        return self._tidy(self._message % self._args)

    __repr__ = __str__

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return str, (str(self),)


def clean(value: Any, tidy: Tidy, around: tuple[int, ...] = ()) -> Any:
    """Return the value itself if nothing that is shown of it is secret.

    :param around: the containers that it stands in
    """
    kind: Any = type(value)
    if kind is str:
        return tidy(value)
    if kind in NUMBERS or is_harmless(kind):
        return value
    if kind in _CONTAINERS:
        if len(around) < _DEEPEST and id(value) not in around:
            return _clean_container(value, tidy, (*around, id(value)))
    elif is_shown_by_c(kind) and (
        not isinstance(value, BaseException) or are_plain(value.args)
    ):
        shown, written = str(value), repr(value)
        if tidy(shown) == shown and tidy(written) == written:
            return value
    return Shown(value, tidy)


def clean_args(args: Any, tidy: Tidy) -> Any:
    """Clean the arguments of a record: a tuple, or a mapping."""
    if type(args) is tuple:
        return tuple([clean(value, tidy) for value in args])
    if isinstance(args, Mapping) and type(args) is not dict:
        return _ShownMapping(args, tidy)
    return clean(args, tidy)


def are_plain(args: object) -> bool:
    """Say whether arguments are texts and numbers only."""
    values = values_of(args)
    return len(values) <= 32 and PLAIN.issuperset(map(type, values))


def values_of(args: object) -> Collection[Any]:
    """Return all that a format may show of a record's arguments."""
    if type(args) is tuple:
        return args
    return [*args, *args.values()] if type(args) is dict else (args,)


def _clean_container(value: Any, tidy: Tidy, around: tuple[int, ...]) -> Any:
    members = values_of(value) if type(value) is dict else list(value)
    if PLAIN.issuperset(map(type, members)):
        # One look at all of them: most containers hold nothing.
        joined = " ".join([one for one in members if type(one) is str])
        if tidy(joined) == joined:
            return value
    cleaned = [clean(member, tidy, around) for member in members]
    if all(map(operator.is_, members, cleaned)):
        return value
    if type(value) is dict:
        half = len(value)
        return dict(zip(cleaned[:half], cleaned[half:], strict=True))
    return type(value)(cleaned)


@functools.lru_cache(maxsize=1024)
def is_harmless(kind: type) -> bool:
    """Say whether objects of this class have no text that tells anything."""
    if issubclass(kind, _HARMLESS):
        return True
    return (
        not _is_opened(kind)
        and kind.__str__ is object.__str__
        and kind.__repr__ is object.__repr__
    )


def _is_opened(kind: type) -> bool:
    """Say whether formatters that write JSON show what is in such objects."""
    names = {"__iter__", *_OPENS}
    return any(not names.isdisjoint(vars(base)) for base in kind.__mro__)


@functools.lru_cache(maxsize=1024)
def is_shown_by_c(kind: type) -> bool:
    """Say whether the texts of such objects come from C code."""
    return issubclass(kind, (str, bytes, bytearray, BaseException)) and all(
        isinstance(method, types.WrapperDescriptorType)
        for method in (kind.__str__, kind.__repr__)
    )
