# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Scrub texts: hide known values and URLs' credentials, keep lines whole."""

from __future__ import annotations

import re
from typing import Any

from cellmw.redaction import urls
from cellmw.redaction.known import KNOWN

#: Most characters of a text that are looked at and shown.
LIMIT = 2**20
# What is looked at beyond, for a secret that begins before the limit.
_BEYOND = 2**13

# A URL that is more than a host, a port and a path: there may be something to
# hide.
_odd_url = re.compile(
    r"://[A-Za-z0-9_.\-]*+(?::[0-9]{1,5}+)?+(?:/[A-Za-z0-9_./\-]*+)?+[^\s'\"]"
)

# C0, C1, line and paragraph separators, what changes the direction of the
# line, and halves of surrogate pairs, which cannot be written to a file.
_unprintable = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069"
    "\u200e\u200f\u061c\ud800-\udfff]"
)


def scrub(text: str) -> str:
    """Return a text without the secrets in it.

    Hides the known values wherever they stand, and the credentials in
    whatever looks like a URL.  Returns a text that shows none itself.
    Scrubbing twice changes nothing.  Takes no lock, and time in proportion to
    the text.  Never raises.

    :param text: what stands behind the first :data:`LIMIT` characters is
        withheld, and the result says how much
    """
    try:
        if type(text) is not str:
            text = str(text)
        if is_clean(text):
            return text
        return _scrub_long(text) if len(text) > LIMIT else _scrub(text)
    except Exception:
        # A lost text is better than a secret that leaks.
        return urls.HIDDEN


def scrub_data(data: Any) -> Any:
    """Return a copy of nested data without the secrets in its texts.

    For an error tracker's event and the like: dictionaries, lists and tuples
    are copied, texts are scrubbed, all else stays.
    """
    if isinstance(data, str):
        return scrub(data)
    if isinstance(data, dict):
        return {
            scrub_data(key): scrub_data(value) for key, value in data.items()
        }
    if isinstance(data, (list, tuple)):
        return [scrub_data(member) for member in data]
    return data


def is_clean(text: str) -> bool:
    """False: a quick look finds something to hide, perhaps."""
    if "://" in text and _odd_url.search(text):
        return False
    return len(text) <= LIMIT and not KNOWN.may_show(text)


def one_line(text: str, limit: int = 1000) -> str:
    """Return a text that cannot forge a line of a log or a header.

    Control characters and line breaks become readable escapes.
    Never raises.

    :param limit: most characters; what is longer is cut and ends in dots
    """
    try:
        text = escape(text)
    except Exception:
        return urls.HIDDEN
    return text if len(text) <= limit else text[: max(0, limit - 3)] + "..."


def escape(text: str) -> str:
    """Replace control characters and line breaks with escapes."""
    return _unprintable.sub(lambda found: ascii(found.group())[1:-1], text)


def describe(error: BaseException, limit: int = 500) -> str:
    """Return the class and the scrubbed message of an error, on one line.

    Errors of this package describe their causes with it.  Never raises.

    :param limit: most characters
    """
    name = getattr(type(error), "__name__", "Exception")
    try:
        message = scrub(str(error))
    except Exception:
        message = ""
    return one_line(f"{name}: {message}" if message else name, limit)


def _scrub(text: str) -> str:
    known = KNOWN.spans(text)
    if known:
        # A URL may end in the middle of a known value, and the other way
        # round.
        text = urls.hide(text, known + urls.spans(text))
    hidden = urls.hide(text, urls.spans(text))
    return text if hidden == text else hidden


def _scrub_long(text: str) -> str:
    """Scrub the beginning, and say how much is withheld."""
    looked_at = text[: LIMIT + _BEYOND]
    end = LIMIT - 100
    for start, last in KNOWN.spans(looked_at) + urls.spans(looked_at):
        if start < end < last or last == len(looked_at):
            end = start
    withheld = len(text) - end
    return f"{_scrub(text[:end])}... ({withheld} characters are withheld)"
