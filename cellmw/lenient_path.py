# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Paths in which a reader other than this filter could see an instance.

Routers, handlers and databases read a path more freely than
``instance_path_patterns`` do: ``$`` matches before a line break, a database
ignores trailing spaces, case and accents, a proxy merges slashes.  A message
of such a request must not go to the default queue, so the filter refuses it.

The patterns are relaxed once, when the filter is loaded: the group takes
every segment with at least the 32 hexadecimal digits of a UUID.  They are
then tried on a bounded number of normal forms of the path.  Each form takes
time in proportion to the path's length.  Pure; no I/O.
"""

from __future__ import annotations

import functools
import re
import unicodedata
import uuid
from collections.abc import Callable, Iterable, Iterator

from cellmw.instance_path import GROUP

Matcher = Callable[[str], object]

# The rest of a segment, if it holds as many digits as a UUID.
SEGMENT_WITH_UUID = r"(?=(?:[^/0-9a-fA-F]*+[0-9a-fA-F]){32})[^/]*"

# A path of which every reader sees the same segments.
_is_plain = re.compile(
    r"(?:/[\w~-]++(?:\.[0-9][\w~-]*+)*+)++/?", re.ASCII
).fullmatch

# One with other characters than the digits and dashes of a UUID.
_LONG_SEGMENT = re.compile(r"(?<![^/])(?![0-9a-fA-F-]*+(?:/|\Z))[^/]{32,}+")
# From the first character of a segment that is not plain.
_EXTRAS = re.compile(
    r"(?<![^/])[\w~-]*+(?:\.[0-9][\w~-]*+)*+[^\w~/-][^/]*+", re.ASCII
)
_bare = re.compile(r"[\w~-]+(?:\.[0-9][\w~-]*)*", re.ASCII).search
_EMPTY_SEGMENTS = re.compile(r"/(?:\.*+/)+")

# However often it was encoded.
_ESCAPE = re.compile(r"%(?:25)*([0-9A-Fa-f]{2})")

_DROP_INVISIBLE = dict.fromkeys((*range(0x21), 0x7F))
_INVISIBLE = frozenset({"Cc", "Cf", "Mn", "Zl", "Zp", "Zs"})


def checker(patterns: Iterable[str]) -> Callable[[str], bool]:
    """Make the function that looks for an instance as other readers do.

    It is called for paths in which the patterns themselves find none.
    """
    matchers = [relaxed(pattern) for pattern in patterns]

    def may_name_instance(path: str) -> bool:
        forms = _forms(path)
        return any(match(form) for form in forms for match in matchers)

    return may_name_instance


def relaxed(pattern: str) -> Matcher:
    """Compile a pattern whose group takes all that may hold a UUID.

    Where the group cannot be replaced, because the rest of the pattern
    refers to a group in it, only case is ignored.
    """
    opening = f"(?P<{GROUP}>"
    begin = pattern.find(opening)
    end = _end_of_group(pattern, begin)
    text = f"{pattern[:begin]}{opening}{SEGMENT_WITH_UUID}{pattern[end:]}"
    try:
        return re.compile(text, re.IGNORECASE).match
    except re.error:
        return re.compile(pattern, re.IGNORECASE).match


def _end_of_group(pattern: str, begin: int) -> int:
    """Where the parenthesis stands that closes the group."""
    depth, in_class = 0, False
    tokens = re.compile(r"\\.|\[\^?\]?|[\]()]", re.DOTALL)
    for token in tokens.finditer(pattern, begin):
        text = token[0]
        if in_class:
            in_class = text != "]"
        elif text[0] == "[":
            in_class = True
        elif text in ("(", ")"):
            depth += 1 if text == "(" else -1
            if not depth:
                return token.start()
    return len(pattern)


def _forms(path: str) -> Iterator[str]:
    """The path as others may read it, each form without empty segments."""
    if _is_plain(path):
        text = _with_usual_uuids(path).lower()
        yield text
        if text[-1] == "/":
            yield text[:-1]
        return
    for text in _readings(path):
        for kept in {text, _EXTRAS.sub(_without_extras, text)}:
            yield from _with_and_without_slash(_EMPTY_SEGMENTS.sub("/", kept))
            if "/.." in kept:
                yield from _with_and_without_slash(_resolved(kept))


def _with_and_without_slash(text: str) -> Iterator[str]:
    text = "/" + text.strip("/.")
    yield text
    yield f"{text}/"


def _resolved(path: str) -> str:
    """The path after each ``..`` has removed the segment before it."""
    kept: list[str] = []
    for segment in path.split("/"):
        if segment != "..":
            if segment.strip("."):
                kept.append(segment)
        elif kept:
            kept.pop()
    return "/".join(kept)


def _readings(path: str) -> Iterator[str]:
    """The path decoded again or not, and in lower case, as ASCII."""
    unescaped = _ESCAPE.sub(lambda found: chr(int(found[1], 16)), path)
    texts = {path, unescaped, _decoded(path), _decoded(unescaped)}
    for text in texts:
        for backslash in ("/", "") if "\\" in text else ("/",):
            kept = _with_usual_uuids(text.replace("\\", backslash))
            yield _folded(kept.encode("ascii", "ignore").decode())
            if not text.isascii():
                yield _folded("".join(_ascii(char, "") for char in kept))
                yield _folded("".join(_ascii(char, "00") for char in kept))


def _decoded(text: str) -> str:
    # PEP 3333: each character stands for a byte, which many decode again.
    try:
        return text.encode("latin-1").decode("utf-8", "ignore")
    except UnicodeEncodeError:
        return text


def _folded(text: str) -> str:
    return text.translate(_DROP_INVISIBLE).lower()


def _with_usual_uuids(path: str) -> str:
    return _LONG_SEGMENT.sub(_in_usual_form, path)


def _in_usual_form(segment: re.Match[str]) -> str:
    """A UUID in its usual form, if Python's own parser takes this for one.

    The parser also takes signs, white space and underscores in place of
    leading zeros.
    """
    try:
        return str(uuid.UUID(segment[0]))
    except ValueError:
        return segment[0]


@functools.lru_cache(maxsize=1024)
def _ascii(char: str, other: str) -> str:
    """ASCII characters that a reader may take a character for.

    :param other: what stands for a character that no rule here maps.  Some
        readers drop it.  To a database it may equal one digit or two:
        MariaDB takes U+00F0 for "d" and U+00E6 for "ae", depending on the
        collation.
    """
    if char.isascii():
        return char
    digit = unicodedata.digit(char, None)
    if digit is not None:
        return str(digit)
    text = unicodedata.normalize("NFKD", char)
    kept = "".join(each for each in text if each.isascii())
    if kept:
        return kept
    category = unicodedata.category(char)
    if category == "Pd":
        return "-"
    is_letter = "LETTER" in unicodedata.name(char, "")
    return "" if category in _INVISIBLE and not is_letter else other


def _without_extras(found: re.Match[str]) -> str:
    """A segment without what some readers cut off, unless it holds a UUID.

    These are parameters, quotes and the suffix that names a format.
    """
    segment = found[0]
    name, _, _ = segment.partition(";")
    if name in (".", ".."):
        return name
    if _holds_uuid(segment):
        return segment
    bare = _bare(name)
    return bare[0] if bare else ""


_holds_uuid = re.compile(SEGMENT_WITH_UUID).match
