# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""In which forms a password can turn up in a text.

As it stands in the URL and decoded; percent-encoded as the libraries do it;
escaped as ``repr``, ``ascii``, JSON, HTML and XML do it, twice over where an
error quotes an error; and in base64, as SASL and HTTP send it.  Pure.
"""

from __future__ import annotations

import base64
import html
import json
import re
import struct
from collections.abc import Iterable, Iterator
from urllib.parse import quote, quote_plus

from cellmw.redaction import urls

#: Shorter values are hidden in URLs only: they are words of every day.
MIN_LENGTH = 8

_percent = re.compile(r"%[0-9A-F]{2}")
# Nothing encodes or escapes these (RFC 3986, 2.3).
_always_same = re.compile(r"[A-Za-z0-9_.\-]+")
# No literal and no markup escapes these.
_never_escaped = re.compile(r"[\w .,:;!?@#$%*+=~^|/()\[\]{}\-]*", re.ASCII)
# Percent encoding with what oslo.messaging and kombu, urllib, SQLAlchemy,
# browsers and RFC 3986 (3.2.1) leave as it is.
_SAFE = ("", "/", " +", "!'()*", "!$&'()*+,;=:")
_QUOTES = "'\""


def plain(password: str) -> set[str]:
    """Forms in which the password can be read."""
    if _always_same.fullmatch(password):
        return {password} if len(password) >= MIN_LENGTH else set()
    found: set[str] = set()
    for value in urls.decoded(password):
        if len(value) < MIN_LENGTH:
            continue
        found |= escaped(value)
        encoded = {quote(value, safe, errors=_ANY) for safe in _SAFE}
        encoded.add(quote_plus(value, errors=_ANY))
        # A URL that is an argument of a URL.
        encoded.add(quote(quote(value, "", errors=_ANY), ""))
        for form in encoded:
            found |= {form, _percent.sub(_lower, form)}
    return found


def in_base64(user: str, password: str) -> set[str]:
    """Forms in which base64 shows the password.

    The part of the base64 text that is the same whatever stands around the
    password, for each of the three offsets; for a short password the whole
    of what SASL PLAIN, AMQPLAIN and HTTP send.
    """
    found: set[str] = set()
    for value in urls.decoded(password):
        data = _bytes(value)
        if len(value) >= MIN_LENGTH:
            found.update(_core(data, offset) for offset in range(3))
            continue
        for name in urls.decoded(user):
            found.update(
                base64.b64encode(message).decode().rstrip("=")
                for message in _handshakes(_bytes(name), data)
            )
    found |= {form.translate(_url_safe) for form in found}
    # Some leave a slash as it is.
    found |= {quote(form, safe) for form in found for safe in ("", "/")}
    return {form for form in found if len(form) >= MIN_LENGTH}


def fewest(forms: Iterable[str]) -> tuple[str, ...]:
    """Those forms that no other one is a part of."""
    kept: list[str] = []
    for form in sorted(forms, key=len):
        if not any(part in form for part in kept):
            kept.append(form)
    return tuple(kept)


_ANY = "surrogatepass"
_url_safe = str.maketrans("+/", "-_")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", _ANY)


def _lower(found: re.Match[str]) -> str:
    return found.group().lower()


def escaped(value: str) -> set[str]:
    """As it stands in a literal, JSON or markup, and in a literal of that."""
    if _never_escaped.fullmatch(value):
        return {value}
    once = {value, html.escape(value), html.escape(value, quote=False)}
    once.add(value.encode("ascii", "xmlcharrefreplace").decode())
    once.update(_as_literals(value))
    twice = (form for text in once for form in _as_literals(text))
    return once.union(twice)


def _as_literals(value: str) -> Iterator[str]:
    # In a text with both kinds of quotes repr escapes one of them.
    for show in (repr, ascii, json.dumps, _json):
        yield show(value)[1:-1]
        yield show(value + _QUOTES)[1:-1].removesuffix(show(_QUOTES)[1:-1])
    data = _bytes(value)
    yield repr(data)[2:-1]
    yield repr(data + _QUOTES.encode())[2:-4]


def _json(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)


def _core(data: bytes, offset: int) -> str:
    text = base64.b64encode(b"\0" * offset + data).decode()
    whole = (len(data) + offset) * 8 // 6
    return text[(0, 2, 3)[offset] : whole]


def _handshakes(user: bytes, password: bytes) -> Iterator[bytes]:
    yield b"\0" + user + b"\0" + password
    yield user + b"\0" + user + b"\0" + password
    yield user + b":" + password
    yield (
        b"\5LOGINS"
        + struct.pack(">I", len(user))
        + user
        + b"\10PASSWORDS"
        + struct.pack(">I", len(password))
        + password
    )
