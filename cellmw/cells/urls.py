# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Transport URLs of cells: filling in templates, and checking the result.

Pure.  A template means what it means to Nova: it is a ``str.format`` string
over the parts of the service's own ``[DEFAULT] transport_url``, and what
Nova fills in correctly comes out the same here, to the letter.  Where Nova
goes on with a URL that nobody meant (a port ``None``, credentials of one
host mixed with another's, a brace that vanished from a password), or with
the template itself, :class:`UnusableURL` is raised instead.

A reason says what is wrong without any part of the URL: the name in an
unknown ``{name}`` may be a piece of a password.
"""

from __future__ import annotations

import contextlib
import dataclasses
import encodings.idna
import ipaddress
import re
import string
from collections.abc import Iterator, Mapping
from urllib import parse as urlparse

from oslo_utils import netutils

_BASE = "[DEFAULT] transport_url"
_HOST_PARTS = ("username", "password", "hostname", "port")

_BRACE = (
    "it holds a brace that belongs to no template; "
    "in a user name or password it is written %7B or %7D"
)
_NO_SCHEME = "it does not begin with the name of a driver and '://'"
_HOST = "a host or port in it is malformed"
_PORT_RANGE = "a port in it is not between 0 and 65535"
_DRIVER = "no oslo.messaging driver of its name is installed"
_BARE_IPV6 = (
    "an IPv6 address in it has no brackets; write [ADDRESS] or [ADDRESS]:PORT"
)
_LONG_VHOST = "its virtual host is longer than 255 bytes"
_IPV6 = "an IPv6 address is filled in without brackets; write [{hostname}]"

_scheme = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):").match
# What urllib takes away in front of a URL.
_CONTROL = "".join(map(chr, range(0x21)))
# Fields within a format, or so wide that they could fill the memory.
_excessive = re.compile(r"[{}]|[0-9]{4}").search


# Loaded on use otherwise, and then the first request would pay for it.
_ = encodings.idna


class UnusableURL(ValueError):
    """Nothing can be sent with this URL.

    :ivar reason: what is wrong with it, without any part of it
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclasses.dataclass(frozen=True, slots=True)
class Broker:
    """Where a URL leads to, without the credentials.

    :ivar driver: name of the oslo.messaging driver
    :ivar hosts: hosts in their order, each with its port, or None
    :ivar virtual_host: decoded; None if the URL has no path
    """

    driver: str
    hosts: tuple[tuple[str | None, int | None], ...]
    virtual_host: str | None


def scheme_of(url: str) -> str:
    """The scheme in lower case, or an empty text."""
    found = _scheme(url.lstrip(_CONTROL))
    return found[1].lower() if found else ""


def is_template(url: str) -> bool:
    """Whether something in it is to be filled in, or cannot be."""
    return "{" in url or "}" in url


def broker_of(url: str) -> Broker:
    """Take a URL apart as oslo.messaging does.

    :raises UnusableURL: oslo.messaging would refuse it, or would take it for
        one without a host because the slashes after the scheme are missing
    """
    parts = _parts(url)
    try:
        hosts = tuple(_hosts(parts.netloc))
    except UnusableURL:
        raise
    except ValueError:
        raise UnusableURL(_HOST) from None
    for _, port in hosts:
        if port is not None and not 0 <= port <= 65535:
            raise UnusableURL(_PORT_RANGE)
    path = parts.path
    virtual_host = urlparse.unquote(path[1:]) if path[:1] == "/" else None
    if len((virtual_host or "").encode("utf-8", "surrogatepass")) > 255:
        raise UnusableURL(_LONG_VHOST)
    return Broker(parts.scheme.partition("+")[0], hosts, virtual_host)


def check(url: str, known_drivers: frozenset[str]) -> Broker:
    """Check a URL that has been filled in.

    :raises UnusableURL: it cannot be parsed, or its driver is not known
    """
    broker = broker_of(url)
    if broker.driver not in known_drivers:
        raise UnusableURL(_DRIVER)
    return broker


def same_queues(one: Broker, other: Broker) -> bool:
    """Whether messages for the one would arrive at the other.

    They have the virtual host and at least one host of the cluster in
    common.
    """
    return (
        one.driver == other.driver
        and (one.virtual_host or "/") == (other.virtual_host or "/")
        and not _addresses(one).isdisjoint(_addresses(other))
    )


def _addresses(broker: Broker) -> frozenset[tuple[str, int]]:
    default = 5672 if broker.driver == "rabbit" else 0
    return frozenset(
        ((host or "localhost").lower(), port or default)
        for host, port in broker.hosts or ((None, None),)
    )


def fill_in(url: str, base_url: str | None, base_option: str = _BASE) -> str:
    """Fill in a template; a URL without braces comes back as it is.

    :param base_url: the service's own URL
    :param base_option: the option that holds it; reasons name it
    :raises UnusableURL: it cannot be filled in, or not with what was meant
    """
    if not is_template(url):
        return url
    try:
        if not base_url:
            raise UnusableURL(f"it is a template, and {_BASE} is not set")
        return _Filling(_values(base_url)).fill_in(url)
    except UnusableURL as error:
        reason = error.reason.replace(_BASE, base_option)
    raise UnusableURL(reason)


def _parts(url: str) -> urlparse.ParseResult:
    scheme = scheme_of(url)
    if not scheme or url.lstrip(_CONTROL)[len(scheme) :][:3] != "://":
        raise UnusableURL(_NO_SCHEME)
    try:
        return urlparse.urlparse(url)
    except ValueError:
        raise UnusableURL(_HOST) from None


def _hosts(netloc: str) -> Iterator[tuple[str | None, int | None]]:
    for part in netloc.split(","):
        if part:
            address = part.rpartition("@")[2]
            if _lacks_brackets(address):
                raise UnusableURL(_BARE_IPV6)
            host, port = netutils.parse_host_port(address)
            # The resolver refuses what this refuses, in each attempt.
            (host or "").encode("idna")
            yield host, port


def _lacks_brackets(address: str) -> bool:
    """Whether this is an IPv6 address that runs into a port.

    oslo.messaging takes an address without brackets for one without a port.
    It connects to it, so an address that cannot end in a port is accepted.
    """
    host, _, port = address.rpartition(":")
    if address.startswith("[") or ":" not in host:
        return False
    if not _is_ipv6(address):
        return True
    return len(port) > 3 and port.isdecimal() and _is_ipv6(host)


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


@dataclasses.dataclass(frozen=True, slots=True)
class _Missing:
    """A known name with no value that could be filled in."""

    reason: str


_Value = str | int | _Missing


def _values(base_url: str) -> Mapping[str, _Value]:
    try:
        base = _parts(base_url)
    except UnusableURL as error:
        raise UnusableURL(
            f"it is a template, and {_BASE} is no URL: {error.reason}"
        ) from None
    values: dict[str, _Value] = {
        "scheme": base.scheme,
        "path": base.path.lstrip("/"),
        "query": base.query,
        "fragment": base.fragment,
    }
    if "," in base.netloc:
        for name in _HOST_PARTS:
            values[name] = _Missing(
                f"{_BASE} has several hosts, so it takes "
                f"{{{name}1}}, {{{name}2}} and so on, not {{{name}}}"
            )
        for number, part in enumerate(base.netloc.split(","), 1):
            values.update(_numbered_values(part, number))
    else:
        values.update(_plain_values(base))
    return values


def _plain_values(base: urlparse.ParseResult) -> Iterator[tuple[str, _Value]]:
    for name in _HOST_PARTS:
        try:
            value = getattr(base, name)
        except ValueError:
            # A port that is no number, or what looks like one in an IPv6
            # address without brackets.
            value = None
        yield name, _no(name) if value is None else value


def _numbered_values(part: str, number: int) -> Iterator[tuple[str, _Value]]:
    userinfo, _, address = part.rpartition("@")
    names = [f"{name}{number}" for name in _HOST_PARTS]
    if "@" in userinfo:
        # oslo.messaging takes the last one as the separator, Nova the first.
        reason = f"host {number} of {_BASE} has more than one '@'"
        yield from ((name, _Missing(reason)) for name in names)
        return
    username, colon, password = userinfo.partition(":")
    host: str | None = None
    port: int | None = None
    # One bad host does not take away the others.
    with contextlib.suppress(ValueError):
        host, port = netutils.parse_host_port(address)
    found = (username, password if colon else None, host, port)
    for name, value in zip(names, found, strict=True):
        yield name, _no(name) if value is None else value


def _no(name: str) -> _Missing:
    return _Missing(f"{_BASE} has nothing for {{{name}}}")


class _Filling:
    """One template being filled in, piece by piece."""

    def __init__(self, values: Mapping[str, _Value]) -> None:
        self._values = values
        self._text = ""
        # Where braces that were written double now stand.
        self._braces: list[int] = []
        # Where IPv6 addresses were filled in, from and to.
        self._addresses: list[tuple[int, int]] = []

    def fill_in(self, template: str) -> str:
        formatter = string.Formatter()
        try:
            for literal, name, spec, conversion in formatter.parse(template):
                self._add_literal(literal)
                if name is not None:
                    self._add_value(name, spec or "", conversion)
        except UnusableURL:
            raise
        except ValueError:
            raise UnusableURL(_BRACE) from None
        if any(_in_userinfo(self._text, at) for at in self._braces):
            raise UnusableURL(_BRACE)
        if not all(_is_whole_host(self._text, *at) for at in self._addresses):
            raise UnusableURL(_IPV6)
        return self._text

    def _add_literal(self, literal: str) -> None:
        start = len(self._text)
        self._braces += [
            start + at for at, char in enumerate(literal) if char in "{}"
        ]
        self._text += literal

    def _add_value(self, name: str, spec: str, conversion: str | None) -> None:
        value = self._values.get(name)
        if value is None or _excessive(spec):
            raise UnusableURL(
                f"it holds a name in braces that {_BASE} does not fill; "
                "in a password, braces are written %7B and %7D"
            )
        if isinstance(value, _Missing):
            raise UnusableURL(value.reason)
        formatter = string.Formatter()
        converted = formatter.convert_field(value, conversion)
        text = formatter.format_field(converted, spec)
        start = len(self._text)
        self._text += text
        if name.startswith("hostname") and ":" in text:
            self._addresses.append((start, len(self._text)))


def _in_userinfo(url: str, position: int) -> bool:
    start = url.find("//") + 2
    rest = re.split("[/?#]", url[start:], maxsplit=1)[0]
    end = start + len(rest)
    if not start <= position < end:
        return False
    return "@" in url[position:end].split(",", 1)[0]


def _is_whole_host(url: str, start: int, end: int) -> bool:
    """Whether what stands there is read as one host by oslo.messaging."""
    before, after = url[:start], url[end:]
    if before.endswith("[") and after.startswith("]"):
        return True
    return before.endswith(("@", ",", "/")) and after[:1] in (
        "",
        *",/?#",
    )
