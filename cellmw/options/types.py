# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The types of the options in ``[cellmw]``."""

from __future__ import annotations

import math
import threading
from typing import Any

from oslo_config import types

from cellmw import instance_path


class Seconds(types.Float):
    """A number of seconds, at most what a thread can wait."""

    def __init__(self, *, above_zero: bool = False) -> None:
        # The sample file would list a minimum of 0 as accepted.
        least = None if above_zero else 0
        name = "seconds, above 0" if above_zero else "seconds"
        super().__init__(min=least, type_name=name)
        self.above_zero = above_zero

    def __call__(self, value: Any) -> float | None:
        """Convert and check a value.

        :raises ValueError: the value is not accepted
        """
        number: float | None = super().__call__(value)
        if number is not None:
            if not math.isfinite(number):
                raise ValueError("is not finite")
            if self.above_zero and number <= 0:
                raise ValueError("must be above 0")
            if number > threading.TIMEOUT_MAX:
                raise ValueError("is too long")
        return number


class Patterns(types.ConfigType):
    """Regular expressions, one per line."""

    def __init__(self) -> None:
        super().__init__(type_name="regular expressions, one per line")

    def __call__(self, value: Any) -> tuple[str, ...]:
        """Convert and check a value.

        :raises ValueError: the value is not accepted
        """
        lines = value.splitlines() if isinstance(value, str) else value
        patterns = tuple(line.strip() for line in lines if line.strip())
        if not patterns:
            raise ValueError("holds no pattern")
        for pattern in patterns:
            instance_path.compile_pattern(pattern)
        return patterns

    def _formatter(self, value: Any) -> str:
        return "\n".join(value)

    def __repr__(self) -> str:
        return "Patterns"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))


class Key(types.String):
    """A non-empty string."""

    def __call__(self, value: Any) -> str:
        """Check a value.

        :raises ValueError: the value is empty
        """
        text: str = super().__call__(value)
        if not text:
            raise ValueError("is empty")
        return text


def accepted(kind: types.ConfigType) -> str:
    """Describe the accepted values of a type."""
    if isinstance(kind, Patterns):
        return (
            "regular expressions, one per line, each with a group "
            f"(?P<{instance_path.GROUP}>...)"
        )
    if isinstance(kind, Key):
        return "a string that is not empty"
    if isinstance(kind, Seconds):
        bound = "above 0" if kind.above_zero else "0 or more"
        most = int(threading.TIMEOUT_MAX)
        return f"a number of seconds, {bound}, at most {most}"
    if isinstance(kind, types.Number):
        return _accepted_number(kind)
    if isinstance(kind, types.Boolean):
        return "true or false"
    if isinstance(kind, types.List):
        return "names, separated by commas"
    assert isinstance(kind, types.String)
    return " or ".join(kind.choices or ()) or "a string"


def _accepted_number(kind: types.Number) -> str:
    what = "a whole number" if isinstance(kind, types.Integer) else "a number"
    if kind.min is None:
        return what if kind.max is None else f"{what}, at most {kind.max}"
    bound = "or more" if kind.max is None else f"to {kind.max}"
    return f"{what}, {kind.min} {bound}"


def may_be(kind: types.ConfigType, given: Any) -> bool:
    """Whether a value is a string, or has the type that strings become.

    oslo.config's types convert anything with ``str()``, or fail with errors
    of other types.
    """
    if isinstance(given, str):
        return True
    if isinstance(kind, (Patterns, types.List)):
        return isinstance(given, (list, tuple)) and all(
            isinstance(item, str) for item in given
        )
    if isinstance(given, bool) or isinstance(kind, types.Boolean):
        return isinstance(given, bool) and isinstance(kind, types.Boolean)
    if isinstance(kind, types.Integer):
        return isinstance(given, int)
    return isinstance(kind, Seconds) and isinstance(given, (int, float))
