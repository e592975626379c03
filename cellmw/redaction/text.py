# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Texts that may leave: known values and URLs hidden, on one line."""

from __future__ import annotations

import re
from collections.abc import Iterator

from cellmw.redaction import urls
from cellmw.redaction.known import KNOWN

_ROUNDS = 16

_scheme = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.\-]*|\{\w+\})\Z")
_MAX_SCHEME = 61
# An IPv6 address with its zone and brackets.
_MAX_ADDRESS = 64
# What stands between two URLs, but not within a password of one.
_between = frozenset(" \t\r\n'\"`<>()[]{},;=|")
_space = re.compile(r"\s")
_line_end = re.compile(r"[\r\n]")
_after_quote = re.compile(r"[\s,;:.)\]}>!?=|\\'\"]|\Z")
_closing = ").,;:]>'\"`"

# What urllib quotes of a URL that it cannot parse: with a password that was
# decoded once too often a piece of that, too short to be known.
_PARSE_ERRORS = ("Port could not be cast", "characters under NFKC")
_LITERAL = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_parse_error = re.compile(rf"(?<=integer value as ){_LITERAL}")
_NETLOC, _INVALID = "netloc '", "' contains invalid"
# What int() quotes: of a URL where our own errors tell why it is no good, of
# anything elsewhere.
_int_error = re.compile(rf"(?<=with base 10: ){_LITERAL}")

# C0, C1, line and paragraph separators, what changes the direction of the
# line, and halves of surrogate pairs, which cannot be written to a file.
_unprintable = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069"
    "\u200e\u200f\u061c\ud800-\udfff]"
)


def scrub(text: str) -> str:
    """Any text without the secrets in it.

    Hides the known values wherever they stand, and the credentials in
    whatever looks like a URL.  A text that shows none is given back itself.
    Scrubbing twice changes nothing.  Takes no lock; never raises.
    """
    try:
        return _scrub(text if type(text) is str else str(text))
    except Exception:
        # Better to lose a text than what it may hold.
        return urls.HIDDEN


def is_clean(text: str) -> bool:
    """Whether a quick look finds nothing to hide; False: perhaps."""
    return not ("://" in text or _is_of_parser(text) or KNOWN.may_show(text))


def one_line(text: str, limit: int = 1000) -> str:
    """A text that cannot forge a line of a log or a header.

    Control characters and line breaks become escapes that can be read.
    Never raises.

    :param limit: most characters; what is longer is cut and ends in dots
    """
    try:
        text = escape(text)
    except Exception:
        return urls.HIDDEN
    return text if len(text) <= limit else text[: max(0, limit - 3)] + "..."


def escape(text: str) -> str:
    """Control characters and line breaks as escapes; all else as it is."""
    return _unprintable.sub(lambda found: ascii(found.group())[1:-1], text)


def describe(error: BaseException, limit: int = 500) -> str:
    """The class and the message of an error, scrubbed, on one line.

    What errors of this package say of those that caused them.  Never raises.

    :param limit: most characters
    """
    name = getattr(type(error), "__name__", "Exception")
    try:
        message = _int_error.sub(urls.HIDDEN, scrub(str(error)))
    except Exception:
        message = ""
    return one_line(f"{name}: {message}" if message else name, limit)


def _scrub(text: str) -> str:
    for _ in range(_ROUNDS):
        clean = KNOWN.hide(text)
        if "://" in clean:
            clean = _hide_in_links(clean)
        if _is_of_parser(clean):
            clean = _hide_what_is_parsed(clean)
        if clean == text:
            return text
        text = clean
    # Hiding makes a text that is to be hidden, over and over: made to.
    return urls.HIDDEN


def _is_of_parser(text: str) -> bool:
    return _PARSE_ERRORS[0] in text or _PARSE_ERRORS[1] in text


def _hide_what_is_parsed(text: str) -> str:
    text = _parse_error.sub(urls.HIDDEN, text)
    end = text.rfind(_INVALID)
    start = text.find(_NETLOC, 0, max(0, end))
    if start < 0:
        return text
    head = text[: start + len(_NETLOC) - 1]
    return f"{head}{urls.HIDDEN}{text[end + 1 :]}"


def _hide_in_links(text: str) -> str:
    parts, done = [], 0
    for start, end, shown in _links(text):
        parts += [text[done:start], shown]
        done = end
    return "".join((*parts, text[done:])) if parts else text


def _links(text: str) -> Iterator[tuple[int, int, str]]:
    """The URLs in a text: where they begin and end, and what to show."""
    position = 0
    while (found := _next_link(text, position)) is not None:
        start, position = found
        known = KNOWN.head_at(text, start)
        if known is not None:
            position, shown = known
            yield start, position, shown
            continue
        position = _end_of_link(text, start, position)
        yield start, position, urls.redact_link(text[start:position])


def _next_link(text: str, position: int) -> tuple[int, int] | None:
    """Where the next URL begins, and where the part behind its ``//``."""
    while (colon := text.find("://", position)) >= 0:
        first = max(position, colon - _MAX_SCHEME)
        scheme = _scheme.search(text[first:colon])
        if scheme is not None:
            return first + scheme.start(), colon + 3
        position = colon + 3
    return None


def _end_of_link(text: str, start: int, authority: int) -> int:
    limit = _next_start(text, authority)
    end = _end_of_quoted(text, start, authority, limit)
    if end is None:
        end = _find(_space, text, authority, limit)
        end = _without_closing(text, authority, end)
    if urls.is_whole(text[authority:end]):
        return end
    # A password with a space or a quote in it, perhaps.
    last = text.rfind("@", end, _find(_line_end, text, end, limit))
    if last < 0:
        return end
    return _without_closing(text, last, _find(_space, text, last, limit))


def _find(pattern: re.Pattern[str], text: str, start: int, end: int) -> int:
    found = pattern.search(text, start, end)
    return end if found is None else found.start()


def _next_start(text: str, position: int) -> int:
    while (found := _next_link(text, position)) is not None:
        start, position = found
        before = text[start - 1]
        # All that ends a URL: or of many, each is looked at to the very end.
        if before in _between or before.isspace():
            return start
    return len(text)


def _end_of_quoted(
    text: str, start: int, authority: int, limit: int
) -> int | None:
    quote = text[start - 1 : start]
    if not quote or quote not in "'\"`":
        return None
    end = authority
    while (end := text.find(quote, end, limit)) >= 0:
        if _after_quote.match(text, end + 1):
            # JSON in JSON: the backslash belongs to the quote.
            return end - 1 if text[end - 1] == "\\" else end
        end += 1
    return None


def _without_closing(text: str, start: int, end: int) -> int:
    """The end of what stands before a full stop or a closing bracket."""
    while end > start and text[end - 1] in _closing:
        first = max(start, end - _MAX_ADDRESS)
        if text[end - 1] == "]" and "[" in text[first:end]:
            return end
        end -= 1
    return end
