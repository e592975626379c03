# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Connection strings taken apart, far enough to know what is secret in them.

Transport URLs and database URLs, with several hosts, as templates, and
broken in every way.  A password that was written without percent encoding
may hold each of the characters that part a URL, so where it ends is a guess.
What decides here: everything up to the last ``@`` is taken as credentials,
but for the hosts between that nothing else can be meant by.  What is neither
a host nor a path by its form is hidden.  Pure functions; none raises.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import unquote, unquote_plus

HIDDEN = "***"

_NAME = r"\{\w+\}"
_SCHEME = rf"(?:[A-Za-z][A-Za-z0-9+.\-]{{0,60}}|{_NAME})"
_PORT = rf"(?:[0-9]{{1,5}}|{_NAME})"
_HOST = (
    r"(?:\[[\w:.%{}\-]*\]"
    rf"|(?:[\w.*\-]|{_NAME}|%[0-9A-Fa-f]{{2}})*)"
    rf"(?::(?:{_PORT}|\*\*\*)?)?"
)
# A host between two others is shown only where its port tells that it is
# one: ``@ss,`` is as likely to stand in a password.
_SURE_HOST = rf"(?:\[[\w:.%\-]*\]|[\w.\-]+|{_NAME})(?::{_PORT})"

_scheme = re.compile(_SCHEME)
_hosts = re.compile(rf"{_HOST}(?:,{_HOST})*")
_one_way = re.compile(rf"[^@,/?#]*(?:@{_HOST}(?:,{_HOST})*,[^@,/?#]*)*")
_next_login = re.compile(rf"@((?:{_HOST},)+)")
_sure_next_login = re.compile(rf"@((?:{_SURE_HOST},)+)")
_any_next_login = re.compile(r"@(?:\[[^\]@,]*\]|[\w.\-]+)(?::[0-9]{1,5})?,")
_name = re.compile(_NAME)
_delimiters = re.compile(r"[@:/,?#&=\s]+")
_authority_end = re.compile(r"[/?#]")

# Options of drivers whose values are names, files and hosts.  Anything else
# in a query is shown if it is a number or a truth value.
_plain_keys = frozenset(
    {
        "charset",
        "driver",
        "host",
        "kombu_failover_strategy",
        "plugin",
        "port",
        "rabbit_ha_queues",
        "read_default_file",
        "read_default_group",
        "ssl",
        "ssl_ca",
        "ssl_ca_file",
        "ssl_cert",
        "ssl_cert_file",
        "ssl_version",
        "sslmode",
        "sslrootcert",
        "unix_socket",
        "use_unicode",
    }
)
_secret_key = re.compile(
    r"pass|pwd|secret|token|auth|key|cred|sasl|sign|session|login|user",
    re.IGNORECASE,
)
_key = re.compile(r"[\w.{}\-]+")
_plain_value = re.compile(rf"(?:[\w./:,+\-]|{_NAME})*")
_number = re.compile(
    rf"[0-9]{{1,6}}(?:\.[0-9]{{1,6}})?|true|false|yes|no|on|off|{_NAME}",
    re.IGNORECASE,
)


_Judge = Callable[[str, str], bool]


class Login(NamedTuple):
    """A user name and a password, as they are written in a URL.

    Without a name where the password stands in the query.
    """

    user: str
    password: str


def redact_url(text: str) -> str:
    """One connection string without its credentials.

    User names count as credentials, and go with the passwords.  Hosts, ports,
    the virtual host or database and harmless query values stay, where it is
    beyond doubt that they are that.  Redacting twice changes nothing.  Never
    raises.
    """
    scheme, found, rest = text.partition("://")
    if not found:
        return _without_scheme(text)
    if _scheme.fullmatch(scheme) is None:
        return _without_scheme(text)
    return f"{scheme}://{_redact_rest(rest)}"


def redact_link(text: str) -> str:
    """A URL met in any text: a web page's keeps more than ours do.

    In an ``http`` URL an ``@`` behind the host means nothing, and query
    values are hidden only where their key tells that they are secret.
    """
    scheme, _, rest = text.partition("://")
    if scheme.lower() not in ("http", "https"):
        return redact_url(text)
    authority, tail = _split_authority(rest)
    _, at, host = authority.rpartition("@")
    if _hosts.fullmatch(host) is None:
        return redact_url(text)
    shown = f"{HIDDEN}@{host}" if at else host
    path, mark, query = tail.partition("?")
    if mark:
        query = "&".join(
            _redact_item(item, _is_harmless_on_the_web)
            for item in query.split("&")
        )
    return f"{scheme}://{shown}{path}{mark}{query}"


class Reading(NamedTuple):
    """What may be secret in a connection string.

    :ivar logins: each user name and password that some driver may read
    :ivar pieces: what an error may quote of them: a driver that writes a URL
        for the next one does not always encode it again
    :ivar is_certain: all drivers read the same
    """

    logins: frozenset[Login]
    pieces: frozenset[str]
    is_certain: bool


def read(text: str) -> Reading:
    """What may be secret in this connection string.

    The several drivers part a URL with odd characters in different ways,
    and each may then quote its part in an error; so every reading is given.
    """
    _, has_scheme, rest = text.partition("://")
    rest = rest or text
    found = set(_query_passwords(rest))
    region, at, tail = rest.rpartition("@")
    if not at:
        if _is_host_and_more(rest):
            return _reading(found, "", is_certain=True)
        found.update(_as_login(rest))
        return _reading(found, rest, is_certain=False)
    # In a text one without a scheme is not seen to be a URL, so all of it that
    # may be secret is looked for by its value.
    if has_scheme and _has_one_reading(region, tail):
        found.update(_split_logins(region, _next_login))
        return _reading(found, "", is_certain=True)
    found.update(_as_login(region))
    found.update(_split_logins(region, _any_next_login))
    # As oslo.messaging and kombu do, and as SQLAlchemy does.
    authority = _split_authority(rest)[0]
    for part in (authority, *authority.split(",")):
        found.update(_as_login(part.rpartition("@")[0]))
    found.update(_as_login(rest.partition("@")[0]))
    return _reading(found, region, is_certain=False)


def is_whole(rest: str) -> bool:
    """Whether this, behind the scheme, can be all of a URL."""
    return _is_host_and_more(rest.rpartition("@")[2])


def whole_login(text: str) -> list[Login]:
    """The login if everything up to the last ``@`` is one."""
    rest = text.partition("://")[2] or text
    region, at, _ = rest.rpartition("@")
    return _as_login(region if at else rest)


def head_of(text: str) -> str:
    """A connection string up to its last ``@``; all of it without one."""
    head, at, _ = text.rpartition("@")
    return head + at if at else text


def _without_scheme(text: str) -> str:
    _, at, tail = text.rpartition("@")
    if at and _is_host_and_more(tail):
        return f"{HIDDEN}@{_redact_tail(tail)}"
    return HIDDEN if text.strip() else text


def _redact_rest(rest: str) -> str:
    region, at, tail = rest.rpartition("@")
    if not _is_host_and_more(tail):
        return HIDDEN
    if not at:
        # A login that was cut off behind its colon is no host without port.
        cut_off = _split_authority(tail)[0].endswith(":")
        return HIDDEN if cut_off else _redact_tail(tail)
    pattern = (
        _next_login if _has_one_reading(region, tail) else _sure_next_login
    )
    hosts = "".join(
        f"@{found.group(1)}{HIDDEN}" for found in pattern.finditer(region)
    )
    return f"{HIDDEN}{hosts}@{_redact_tail(tail)}"


def _split_authority(rest: str) -> tuple[str, str]:
    end = _authority_end.search(rest)
    index = len(rest) if end is None else end.start()
    return rest[:index], rest[index:]


def _is_host_and_more(tail: str) -> bool:
    return _hosts.fullmatch(_split_authority(tail)[0]) is not None


def _has_one_reading(region: str, tail: str) -> bool:
    """Whether all who parse URLs find the same logins and hosts."""
    if not _is_host_and_more(tail) or _one_way.fullmatch(region) is None:
        return False
    written = _next_login.split(region)[::2]
    return len({":" in login for login in written}) == 1


def _split_logins(region: str, between: re.Pattern[str]) -> list[Login]:
    step = between.groups + 1
    return [
        login
        for part in between.split(region)[::step]
        for login in _as_login(part)
    ]


def _as_login(text: str) -> list[Login]:
    user, colon, password = text.partition(":")
    if not colon or not password or _name.fullmatch(password):
        return []
    return [Login(user, password)]


def _reading(found: set[Login], region: str, *, is_certain: bool) -> Reading:
    # The first one is the user's name.
    pieces = set(_delimiters.split(region)[1:])
    for login in found:
        for password in decoded(login.password):
            pieces.update(_delimiters.split(password))
        pieces -= decoded(login.password)
    # Where one is taken for a host it is written in lower case.
    pieces |= {piece.lower() for piece in pieces}
    return Reading(frozenset(found), frozenset(pieces), is_certain)


def _query_passwords(rest: str) -> list[Login]:
    query = rest.rpartition("@")[2].partition("?")[2].partition("#")[0]
    found = []
    for item in query.split("&"):
        key, _, value = item.partition("=")
        if value and _secret_key.search(key) and not _name.fullmatch(value):
            found.append(Login("", value))
    return found


def _redact_tail(tail: str) -> str:
    """What stands behind the last ``@``: hosts, path, query, fragment."""
    tail, hash_mark, fragment = tail.partition("#")
    if hash_mark and fragment and _name.fullmatch(fragment) is None:
        fragment = HIDDEN
    tail, mark, query = tail.partition("?")
    if mark:
        query = "&".join(
            _redact_item(item, _is_harmless) for item in query.split("&")
        )
    return f"{tail}{mark}{query}{hash_mark}{fragment}"


def _redact_item(item: str, is_harmless: _Judge) -> str:
    key, equals, value = item.partition("=")
    if not equals:
        return item if not item or _name.fullmatch(item) else HIDDEN
    if _key.fullmatch(key) is None:
        return f"{HIDDEN}={HIDDEN}"
    return item if is_harmless(key, value) else f"{key}={HIDDEN}"


def _is_harmless(key: str, value: str) -> bool:
    if _secret_key.search(key):
        return not value
    if key in _plain_keys:
        return _plain_value.fullmatch(value) is not None
    return not value or _number.fullmatch(value) is not None


def _is_harmless_on_the_web(key: str, value: str) -> bool:
    return not value or _secret_key.search(key) is None


def decoded(text: str) -> set[str]:
    """A part of a URL as it stands and as the drivers decode it."""
    return {text, unquote(text), unquote_plus(text)}
