# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Find the credentials in connection strings, and in texts that hold URLs.

The functions take transport and database URLs, with several hosts, as
templates, and broken in every way.  A password that nobody encoded may hold
each character that separates the parts of a URL, so everything up to the last
``@`` counts as credentials, except hosts that nothing else can be meant by.

The functions look at each character a bounded number of times: they search
for single characters, and match regular expressions that repeat one class of
characters and never backtrack.  They are pure, and never raise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple
from urllib.parse import quote, unquote, unquote_plus

HIDDEN = "***"

Span = tuple[int, int]

# RFC 3986 has none of these in a URL.  They end one in a text, so what a
# client sends hides nothing that a log line says after it.
_url = re.compile(r"[^\s'\"`<>\\\x00-\x1f\x7f-\x9f]*+")
# Where one begins, and where SQLAlchemy goes on with a long value.
_begin = re.compile(r"://| truncated\) \.\.\. ")
_authority = re.compile(r"[^/?#]*+")
_scheme = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*+|\{\w++\}")
_host = re.compile(r"[\w.*%{}\-]*+")
_address = re.compile(r"\[[\w:.*%{}\-]*+\]")
_port = re.compile(r":(?:[0-9]{1,5}|\{\w++\}|\*\*\*)?")
_name = re.compile(r"\{\w++\}")
_key = re.compile(r"[\w.{}*\-]++")
_path = re.compile(r"[\w./:,+{}*\-]*+")
_number = re.compile(r"[0-9]{1,6}(?:\.[0-9]{1,6})?")
_truths = frozenset({"true", "false", "yes", "no", "on", "off"})
# What all drivers read the same: one login, one host, no query.
_plain_url = re.compile(
    r"[\w+.\-]+://([^\s:@/?#]*):([^\s@/?#{}]+)@[\w.\-]*(?::[0-9]{1,5})?(?:/[^@?#]*)?"
)
# Punctuation of the text around a URL; brackets unless one opens in the URL.
_PUNCTUATION = ".,;:!?"
_BRACKETS = {")": "(", "]": "[", "}": "{"}

# Options of drivers whose values are names, files and hosts.  The value of
# any other option is shown if it is a number or a truth value.
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
    r"pass|pwd|secret|token|auth|cred|sasl|sign|session|login|api.?key",
    re.IGNORECASE,
)


class Login(NamedTuple):
    """A user name and a password, as they are written in a URL.

    The name is empty where the password stands in the query.
    """

    user: str
    password: str


def redact_url(text: str) -> str:
    """Return a connection string without its credentials.

    User names count as credentials, because some are tokens.  Hosts, ports,
    the virtual host or database and harmless query values stay.  Redacting
    twice changes nothing.  Never raises.
    """
    scheme, found, _ = text.partition("://")
    if found and _scheme.fullmatch(scheme):
        start = len(scheme) + len(found)
        return hide(text, _strict(text, start, len(text), text.rfind("@")))
    at = text.rfind("@")
    if at >= 0 and are_hosts(_authority_at(text, at + 1)):
        return hide(text, _strict(text, 0, len(text), at))
    return HIDDEN if text.strip() else text


def spans(text: str) -> list[Span]:
    """Find what to hide of the URLs in any text, known or not.

    A URL ends at white space, a quote, an angle bracket, a backslash or a
    control character.
    """
    found: list[Span] = []
    end = at = done = 0
    for begin in _begin.finditer(text):
        start = begin.end()
        if start < done:
            continue
        if start >= end:
            end = _end(text, start)
            at = text.rfind("@", start, end)
        done = end
        authority = _authority_at(text, start, end)
        login, mark, hosts = authority.rpartition("@")
        if _is_of_the_web(text, begin.start()) and are_hosts(hosts):
            # An "@" behind the host of a web page means nothing.
            if mark:
                found.append((start, start + len(login)))
            done = start + len(authority)
            following = text.find("://", done, end)
            stop = end if following < 0 else following
            found += _of_query(text, done, stop, _is_harmless_on_the_web)
        elif begin.group() == "://" or at >= start:
            found += _strict(text, start, end, at)
    return found


def hide(text: str, found: list[Span]) -> str:
    """Return the text with asterisks in place of these spans."""
    if not found:
        return text
    parts, done = [], -1
    for start, end in sorted(found):
        if start > done:
            parts += [text[max(done, 0) : start], HIDDEN]
        done = max(done, end)
    return "".join((*parts, text[done:]))


class Reading(NamedTuple):
    """The logins in a connection string.

    :ivar is_certain: all drivers find the same
    """

    logins: set[Login]
    is_certain: bool


def read(text: str) -> Reading:
    """Find the logins of a connection string, by all readings of drivers.

    Drivers split a URL with odd characters in different ways, and each may
    quote its own part in an error.
    """
    plain = _plain_url.fullmatch(text)
    if plain is not None:
        return Reading({Login(*plain.groups())}, is_certain=True)
    _, has_scheme, rest = text.partition("://")
    rest = rest or text
    found = set(_query_passwords(rest))
    region, at, tail = rest.rpartition("@")
    authority = _authority_at(rest, 0)
    if not at:
        is_certain = are_hosts(authority)
        return Reading(
            found if is_certain else found | _as_login(rest), is_certain
        )
    written = [region[start:end] for start, end in _login_spans(region)]
    is_certain = (
        bool(has_scheme)
        and are_hosts(_authority_at(tail, 0))
        and _authority.fullmatch(region) is not None
        and region.count("@") + 1 == len(written)
    )
    if not is_certain:
        # As oslo.messaging and kombu split it, and as SQLAlchemy does.
        parts = (authority, *authority.split(","))
        written += [part.rpartition("@")[0] for part in parts]
        written += [region, rest.partition("@")[0]]
    return Reading(found.union(*map(_as_login, written)), is_certain)


def port_of(login: Login, decoded: str) -> Login | None:
    """Return the part of a password that urllib takes for a port, and quotes.

    oslo.messaging hands a slash in a password to kombu as it is, and nobody
    encoded any character of some URLs: for urllib the hosts end there.
    """
    part = _authority_at(decoded, 0)
    if not part or part == decoded:
        return None
    return Login(login.user, quote(part, safe=""))


def are_hosts(text: str, *, with_ports: bool = False) -> bool:
    """Say whether a text can be the hosts of a URL, separated by commas."""
    return all(_is_host(part, with_ports) for part in text.split(","))


def decoded(written: str) -> set[str]:
    """Return a part of a URL as the drivers decode it."""
    if "%" not in written and "+" not in written:
        return {written}
    return {unquote(written), unquote_plus(written)}


def _end(text: str, start: int) -> int:
    """Find the end of a URL in a text, before the text's punctuation."""
    found = _url.match(text, start)
    assert found is not None
    url = text[start : found.end()]
    hosts = url[url.rfind("@") + 1 :]
    closing = [end for end, begin in _BRACKETS.items() if begin not in hosts]
    return start + len(url.rstrip(_PUNCTUATION + "".join(closing)))


def _is_of_the_web(text: str, colon: int) -> bool:
    scheme = text[max(0, colon - 5) : colon].lower()
    return scheme.endswith(("http", "https"))


def _authority_at(text: str, start: int, end: int | None = None) -> str:
    found = _authority.match(text, start, len(text) if end is None else end)
    return "" if found is None else found.group()


def _is_host(text: str, with_port: bool) -> bool:
    address = _address.match(text) or _host.match(text)
    assert address is not None
    port = text[address.end() :]
    if not port:
        return not with_port
    return (
        _port.fullmatch(port) is not None
        and (len(port) > 1 and bool(address.group())) >= with_port
    )


def _strict(text: str, start: int, end: int, at: int) -> list[Span]:
    """Find what to hide of a URL whose last ``@`` stands at ``at``."""
    host = max(start, at + 1)
    authority = _authority_at(text, host, end)
    # A login that was cut off behind its colon is no host without a port.
    cut_off = at < start and authority.endswith(":")
    if cut_off or not are_hosts(authority):
        return [(start, end)] if end > start else []
    found = []
    if at >= start:
        found = [
            (start + first, start + last)
            for first, last in _login_spans(text[start:at])
        ]
    found += _of_query(text, host + len(authority), end, _is_harmless)
    return found


def _login_spans(region: str) -> list[Span]:
    """Find the logins in what precedes the last ``@`` of a URL.

    A host between two others is shown where its port proves that it is one,
    or where all drivers read the URL the same: ``@ss,`` is as likely to stand
    in a password.
    """
    found = _split(region, with_ports=False)
    has_colon = {":" in region[start:end] for start, end in found}
    if len(has_colon) > 1 or _authority.fullmatch(region) is None:
        found = _split(region, with_ports=True)
    return found


def _split(region: str, *, with_ports: bool) -> list[Span]:
    found, start, position = [], 0, 0
    for part in region.split("@"):
        hosts, comma, _ = part.rpartition(",")
        if position and comma and are_hosts(hosts, with_ports=with_ports):
            found.append((start, position - 1))
            start = position + len(hosts) + 1
        position += len(part) + 1
    return [*found, (start, len(region))]


def _as_login(text: str) -> set[Login]:
    user, colon, password = text.partition(":")
    if not colon or not password or _name.fullmatch(password):
        return set()
    return {Login(user, password)}


def _query_passwords(rest: str) -> Iterator[Login]:
    query = rest.rpartition("@")[2].partition("?")[2].partition("#")[0]
    for item in query.split("&"):
        key, _, value = item.partition("=")
        if value and _secret_key.search(key) and not _name.fullmatch(value):
            yield Login("", value)


def _of_query(
    text: str, start: int, end: int, is_harmless: Callable[[str, str], bool]
) -> Iterator[Span]:
    """Find what to hide behind the hosts of a URL: in query and fragment."""
    sharp = text.find("#", start, end)
    stop = end if sharp < 0 else sharp
    mark = text.find("?", start, stop)
    if mark >= 0:
        first = mark + 1
        for item in text[first:stop].split("&"):
            key, equals, value = item.partition("=")
            last = first + len(item)
            if not is_harmless(*((key, value) if equals else ("", key))):
                shown = len(key) + 1 if equals and _key.fullmatch(key) else 0
                yield first + shown, last
            first = last + 1
    if 0 <= sharp < end - 1 and not is_harmless("", text[sharp + 1 : end]):
        yield sharp + 1, end


def _is_harmless(key: str, value: str) -> bool:
    if not value or _name.fullmatch(value):
        return True
    if _secret_key.search(key) or not _key.fullmatch(key):
        return False
    if key in _plain_keys:
        return _path.fullmatch(value) is not None
    return value.lower() in _truths or _number.fullmatch(value) is not None


def _is_harmless_on_the_web(key: str, value: str) -> bool:
    return not value or _secret_key.search(key) is None
