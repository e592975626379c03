# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Say whether an exception shows a secret to anybody who logs it.

A log handler shows the text of an exception, its arguments and its notes, the
same of its chain and of the members of groups, and, as error trackers do, its
attributes and the variables of its frames.  A :class:`Look` collects all that
as text.  It reads what stands in an object itself, and calls no property,
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
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from cellmw.redaction import text
from cellmw.redaction.arguments import NUMBERS

#: Most exceptions and frames that are looked at; what has more is replaced.
MOST_ERRORS = 500
MOST_FRAMES = 2000
_MOST_VALUES = 50_000
# Of one container.  No handler shows more.
_MOST_MEMBERS = 1000
_DEEPEST = 4
# The frame's, the variable's and the argument's (CPython 3.11 and 3.12; later
# versions make no snapshot).
_REFERENCES_OF_SNAPSHOT = 3

# Packages whose objects may show a credential by their repr.
_LIBRARIES = frozenset(
    {
        "MySQLdb",
        "amqp",
        "cellmw",
        "kombu",
        "oslo_db",
        "oslo_messaging",
        "pg8000",
        "psycopg",
        "psycopg2",
        "pymysql",
        "sqlalchemy",
    }
)
# Those of C and of ``__slots__``.
_DESCRIPTORS = (types.MemberDescriptorType, types.GetSetDescriptorType)
_TELL_NOTHING = (
    type,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
)


def is_clean(
    error: BaseException, traceback: types.TracebackType | None = None
) -> bool:
    """Say whether an exception can be given to any handler as it is.

    :param traceback: another one that the handler gets with it
    """
    look = Look()
    look.at_traceback(traceback)
    look.at_error(error)
    return look.is_clean()


def shows_nothing(value: object) -> bool:
    """Say whether an attribute of an exception can be shown."""
    look = Look()
    look.at(value)
    return look.is_clean()


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


class Look:
    """The texts that handlers could show."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._left = _MOST_VALUES
        self._frames_left = MOST_FRAMES
        self._waiting: list[BaseException] = []
        self._errors: set[int] = set()
        # With the depth at which it was seen.  Kept alive, so that no other
        # object gets the same id.
        self._seen: dict[int, tuple[int, object]] = {}

    def is_clean(self) -> bool:
        """Say whether nothing of what was looked at is secret."""
        if min(self._left, self._frames_left) < 0:
            return False
        joined = "\n".join(self._texts)
        return text.scrub(joined) is joined

    def at_error(self, error: BaseException) -> None:
        """Look at an exception, its chain and the members of groups."""
        self._await(error)
        while self._waiting:
            one = self._waiting.pop()
            self._at_one(one)
            self.at_traceback(_get(one, "__traceback__"))
            self._await(_get(one, "__cause__"))
            self._await(_get(one, "__context__"))
            if isinstance(one, BaseExceptionGroup):
                for member in _members_of(one):
                    self._await(member)

    def at_traceback(self, traceback: types.TracebackType | None) -> None:
        """Look at the variables of the frames of a traceback."""
        while traceback is not None and self._frames_left >= 0:
            self._frames_left -= 1
            self._at_variables(traceback.tb_frame)
            traceback = traceback.tb_next

    def at(self, value: Any, depth: int = 0) -> None:
        """Look at one value, and again only if it stands less deep."""
        kind: Any = type(value)
        if kind in NUMBERS or self._was_seen(value, depth):
            return
        if isinstance(value, str):
            self._texts.append(str.__str__(value))
        elif isinstance(value, (bytes, bytearray)):
            self._texts.append(value.decode("utf-8", "replace"))
        elif isinstance(value, (list, tuple, set, frozenset, dict)):
            if depth < _DEEPEST:
                self._at_all(_items(value), depth + 1)
        elif isinstance(value, BaseException):
            if depth < _DEEPEST:
                self._at_one(value, depth + 1)
        elif not isinstance(value, _TELL_NOTHING):
            self._at_object(value, kind)

    def _was_seen(self, value: Any, depth: int) -> bool:
        seen = self._seen.get(id(value))
        if seen is not None and seen[0] <= depth:
            return True
        self._seen[id(value)] = depth, value
        self._left -= 1
        return self._left < 0

    def _await(self, error: BaseException | None) -> None:
        if error is None or id(error) in self._errors:
            return
        self._errors.add(id(error))
        if len(self._errors) > MOST_ERRORS:
            self._left = -1
        else:
            self._waiting.append(error)

    def _at_one(self, error: BaseException, depth: int = 0) -> None:
        # What fails here fails in a handler as well.
        with contextlib.suppress(Exception):
            self._texts.append(str.__str__(str(error)))
        self._at_all(_get(error, "args"), depth)
        self._at_all((value for _, value, _ in attributes(error)), depth)

    def _at_all(self, values: Iterable[Any], depth: int) -> None:
        try:
            for value in itertools.islice(values, _MOST_MEMBERS):
                self.at(value, depth)
        except RuntimeError:
            # Another thread changes the container at this moment.
            self._left = -1

    def _at_object(self, value: Any, kind: Any) -> None:
        if _is_configuration(kind):
            # Error trackers open it, and find every connection string.
            self._left = -1
        if kind.__repr__ is object.__repr__:
            return
        if not _is_of_library(kind):
            look = Look()
            for one in _dictionary(value).values():
                if isinstance(one, str):
                    look.at(one)
            if look.is_clean():
                return
        with contextlib.suppress(Exception):
            self._texts.append(str.__str__(repr(value)))

    def _at_variables(self, frame: types.FrameType) -> None:
        variables = frame.f_locals
        self._at_all(list(variables.values()), 0)
        if frame.f_code.co_flags & inspect.CO_OPTIMIZED and (
            type(variables) is dict
            and sys.getrefcount(variables) == _REFERENCES_OF_SNAPSHOT
        ):
            # A snapshot that would keep alive what the frame lets go.  The
            # function itself may hold the same one, from locals().
            variables.clear()


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


def _get(error: BaseException, name: str) -> Any:
    """Read one of the built-in attributes, whatever the class makes of it."""
    return vars(BaseException)[name].__get__(error)


def _members_of(group: BaseExceptionGroup[Any]) -> tuple[BaseException, ...]:
    found: tuple[BaseException, ...] = vars(BaseExceptionGroup)[
        "exceptions"
    ].__get__(group)
    return found


def _items(value: Any) -> Iterator[Any]:
    kinds: tuple[Any, ...] = (list, tuple, set, frozenset)
    for kind in kinds:
        if isinstance(value, kind):
            found: Iterator[Any] = kind.__iter__(value)
            return found
    pairs = itertools.islice(dict.items(value), _MOST_MEMBERS)
    return itertools.chain.from_iterable(list(pairs))


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
