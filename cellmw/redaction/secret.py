# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""A string that does not print itself."""

from __future__ import annotations

from typing import Any, NoReturn


class Secret:
    """A string that only :meth:`reveal` shows.

    This package holds every connection string in this form.  ``repr``,
    ``str``, ``format``, ``vars``, ``dataclasses.asdict`` and tracebacks with
    locals show three asterisks.  Equal if the strings are; hashable; cannot
    be pickled.
    """

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """Return the string.  Pass it on at once, and do not keep it."""
        return self._value

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Secret):
            return self._value == other._value
        return NotImplemented

    def __hash__(self) -> int:
        return hash((Secret, self._value))

    def __bool__(self) -> bool:
        return bool(self._value)

    def __repr__(self) -> str:
        return "***"

    def __format__(self, spec: str) -> str:
        return format(repr(self), spec)

    def __copy__(self) -> Secret:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Secret:
        return self

    def __getstate__(self) -> NoReturn:
        raise TypeError("a secret is not pickled")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a secret is not pickled")
