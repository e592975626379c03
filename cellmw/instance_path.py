# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The instance UUID in the path of a request.  Pure; no I/O.

A path is looked at as the server decoded it (PEP 3333: ``PATH_INFO``), and
never decoded again: what the application's router sees is what counts here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

GROUP = "instance_uuid"

# Written out, for a repeated group costs half as much again.
_UUID_FORM = "-".join(rf"[0-9A-Fa-f]{{{n}}}" for n in (8, 4, 4, 4, 12))
_UUID = rf"(?P<{GROUP}>{_UUID_FORM})"
_is_uuid = re.compile(_UUID_FORM).fullmatch

# The instance routes of the compute API (api-ref/compute), each with and
# without a version and a project in front.  A slash at the end is the same
# route to a Routes mapper; a doubled one is none.
_PREFIX = r"(?:/v2(?:\.1)?)?(?:/[^/]+)?"
DEFAULT_PATTERNS = (
    rf"{_PREFIX}/servers/{_UUID}(?:/[^/]+)*/?\Z",
    rf"{_PREFIX}/os-volumes_boot/{_UUID}(?:/action)?/?\Z",
    rf"{_PREFIX}/os-fping/{_UUID}/?\Z",
)


def compile_pattern(text: str) -> re.Pattern[str]:
    """Compile one pattern of ``instance_path_patterns``.

    :raises ValueError: it is no regular expression, or has no group
        ``instance_uuid``
    """
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    if GROUP not in pattern.groupindex:
        raise ValueError(f"has no group (?P<{GROUP}>...)")
    return pattern


def finder(patterns: Iterable[str]) -> Callable[[str], str | None]:
    """Make the function that finds the instance UUID in a path.

    The patterns are tried in their order, each with :func:`re.match`.  What
    the group holds counts only if it is a UUID in its usual form; it is
    given in lower case, as Nova stores it.

    :raises ValueError: a pattern cannot be used
    """
    patterns = tuple(patterns)
    compiled = [compile_pattern(text) for text in patterns]
    if patterns == DEFAULT_PATTERNS:
        return _find_by_default
    matchers = [pattern.match for pattern in compiled]

    def find(path: str) -> str | None:
        for match in matchers:
            found = match(path)
            if found is not None:
                uuid = found[GROUP]
                if uuid is not None and _is_uuid(uuid):
                    return uuid.lower()
        return None

    return find


# The default patterns as one: every request's path is looked at.
# Possessive quantifiers keep it from trying a segment letter by letter.
_ALL_DEFAULTS = re.compile(
    r"(?:/v2(?:\.1)?)?(?:/[^/]++)?/(?:"
    + "|".join(
        (
            rf"servers/({_UUID_FORM})(?:/[^/]++)*+/?",
            rf"os-volumes_boot/({_UUID_FORM})(?:/action)?/?",
            rf"os-fping/({_UUID_FORM})/?",
        )
    )
    + r")\Z"
).match


def _find_by_default(path: str) -> str | None:
    """What the default patterns find, in a fifth of their time."""
    found = _ALL_DEFAULTS(path)
    return found[found.lastindex or 0].lower() if found else None


_long_segment = re.compile(r"(?:\A|/)[^/]{32}").search
# Its end is behind 40 characters, or more: one of the words is in front.
_long_segment_behind_word = re.compile(
    r"(?s)/[^/]{32}(?:[^/]{8}|(?<=.{41}))"
).search


def quick_check(patterns: Iterable[str]) -> Callable[[str], object]:
    """Make the function at which most paths without an instance stop.

    What it returns is false only if no reader can see an instance in the
    path: no segment is as long as the 32 digits of a UUID.
    """
    if tuple(patterns) == DEFAULT_PATTERNS:
        return _may_hold_uuid_by_default
    return _long_segment


def _may_hold_uuid_by_default(path: str) -> bool:
    # In a path of 72 characters or less, each segment that is long enough and
    # ends behind the word covers these.  Slices cost less than a search.
    if "/" in path[-32:41] and not path[72:]:
        return False
    return not path[72:] or _long_segment_behind_word(path) is not None
