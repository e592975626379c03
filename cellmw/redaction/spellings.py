# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""List the forms in which libraries print a password.

A password appears as it stands in the URL and decoded, percent-encoded as the
libraries do it, and escaped as ``repr``, ``ascii`` and JSON do it.  Pure.
"""

from __future__ import annotations

import json.encoder
import re
from urllib.parse import quote, unquote

from cellmw.redaction import urls

#: Shorter values are hidden in URLs only: they are everyday words.
MIN_LENGTH = 8

# Nothing encodes or escapes these (RFC 3986, 2.3).
_always_same = re.compile(r"[A-Za-z0-9_.\-]++")
_never_escaped = re.compile(r"[ !#-&(-\[\]-~]*+")


def common_part(written: str, decoded: str) -> bytes:
    """Return the longest piece of a password that all its forms share."""
    if written == decoded and _always_same.fullmatch(written):
        return written.encode()
    pieces = _always_same.findall(decoded)
    shared = [piece for piece in pieces if piece in written]
    return max(shared, key=len, default="").encode()


def forms_of(login: urls.Login) -> set[bytes]:
    """Return the forms of a password, as bytes that a text is searched for.

    A password shorter than :data:`MIN_LENGTH` is found together with its
    user's name only.
    """
    user, written = login
    found = {written}
    for value in urls.decoded(written):
        found |= _escaped(value)
        found |= _encoded(value)
    if len(unquote(written)) < MIN_LENGTH:
        found = {f"{user}:{form}" for form in found}
    return {
        form.encode("utf-8", "surrogatepass")
        for form in found
        if len(form) >= MIN_LENGTH
    }


def _encoded(value: str) -> set[str]:
    # oslo.messaging and kombu encode everything, or all but slashes;
    # SQLAlchemy leaves spaces and plus signs; HTML forms write a plus sign
    # for a space.
    whole = quote(value, safe="", errors="surrogatepass")
    first, *others = whole.split("%")
    lower = (f"%{escape[:2].lower()}{escape[2:]}" for escape in others)
    return {
        whole,
        whole.replace("%2F", "/"),
        whole.replace("%20", " ").replace("%2B", "+"),
        whole.replace("%20", "+"),
        "".join((first, *lower)),
    }


def _escaped(value: str) -> set[str]:
    """Return a value as it stands in literals of Python and in JSON."""
    if _never_escaped.fullmatch(value):
        return {value}
    found = {
        value,
        json.encoder.encode_basestring(value)[1:-1],
        json.encoder.encode_basestring_ascii(value)[1:-1],
    }
    data = value.encode("utf-8", "surrogatepass")
    for literal in (repr(value)[1:-1], ascii(value)[1:-1], repr(data)[2:-1]):
        found.add(literal)
        # In a text with both kinds of quotes repr escapes this one.
        found.add(literal.replace("\\'", "'").replace("'", "\\'"))
    return found
