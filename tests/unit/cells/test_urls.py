# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Templates and URLs of cells."""

from __future__ import annotations

import contextlib
import urllib.parse

import oslo_messaging
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from oslo_config import cfg
from oslo_utils import netutils

from cellmw.cells import urls

KNOWN = frozenset({"rabbit", "fake", "kafka"})
ONE_HOST = "rabbit://bob:s3kret@localhost:123/nova?munchies=doritos#baz"
TWO_HOSTS = "rabbit://alice:n0ts3kret@other:456,bob:s3kret@localhost:123/nova"


def reason_of(url: str, base: str | None = ONE_HOST) -> str:
    with pytest.raises(urls.UnusableURL) as caught:
        urls.check(urls.fill_in(url, base), KNOWN)
    return caught.value.reason


def meaning(template: str, base: str) -> str:
    """The template language, told by its parts: str.format over a URL."""
    parsed = urllib.parse.urlparse(base)
    parts: dict[str, object] = {
        "scheme": parsed.scheme,
        "username": parsed.username,
        "password": parsed.password,
        "hostname": parsed.hostname,
        "path": parsed.path.lstrip("/"),
        "query": parsed.query,
        "fragment": parsed.fragment,
    }
    with contextlib.suppress(ValueError):
        parts["port"] = parsed.port
    if "," in parsed.netloc:
        for number, host in enumerate(parsed.netloc.split(","), 1):
            userinfo, _, address = host.rpartition("@")
            name, colon, password = userinfo.partition(":")
            parts[f"username{number}"] = name
            parts[f"password{number}"] = password if colon else None
            with contextlib.suppress(ValueError):
                found = netutils.parse_host_port(address)
                parts[f"hostname{number}"], parts[f"port{number}"] = found
    return template.format(**parts)


@pytest.mark.parametrize(
    "template, base, filled",
    [
        (
            "{scheme}://not{username}:{password}@{hostname}:1{port}/{path}"
            "?{query}&flavor=coolranch#{fragment}",
            ONE_HOST,
            "rabbit://notbob:s3kret@localhost:1123/nova"
            "?munchies=doritos&flavor=coolranch#baz",
        ),
        (
            "rabbit://{username2}:{password1}@{hostname2}:{port1}/{path}",
            TWO_HOSTS,
            "rabbit://bob:n0ts3kret@localhost:456/nova",
        ),
        (
            "rabbit://{username}:{password}@[{hostname}]:{port}/",
            "rabbit://u:p@[1:2::7]:5/",
            "rabbit://u:p@[1:2::7]:5/",
        ),
        # An IPv6 address without a port needs no brackets.
        ("rabbit://{hostname},h/", "rabbit://[::1]:5/", "rabbit://::1,h/"),
        ("rabbit://h/{path}", "rabbit://u:p@h//", "rabbit://h/"),
        ("rabbit://{username1}@h/", "rabbit://a:1,b@b:2/", "rabbit://@h/"),
        # A host's name is in lower case where there is one host only.
        ("rabbit://{hostname}/", "rabbit://BROKER/", "rabbit://broker/"),
        ("rabbit://{hostname1}/", "rabbit://A:1,u@B:2/", "rabbit://A/"),
        # Encoded parts stay encoded.
        (
            "rabbit://u:{password}@h/{path}",
            "rabbit://u:p%40%7B@h/%2Fv",
            "rabbit://u:p%40%7B@h/%2Fv",
        ),
        # A brace in the base's password is filled in as it is.
        ("rabbit://u:{password}@h/", "rabbit://u:a{b@h/", "rabbit://u:a{b@h/"),
        ("rabbit://h/{{vhost}}", ONE_HOST, "rabbit://h/{vhost}"),
        ("rabbit://h:{port:05d}/{path!s}", ONE_HOST, "rabbit://h:00123/nova"),
    ],
)
def test_what_can_be_filled_in_comes_out_as_nova_has_it(
    template: str, base: str, filled: str
) -> None:
    assert urls.fill_in(template, base) == filled
    assert meaning(template, base) == filled
    urls.check(filled, KNOWN)


def test_a_url_without_braces_needs_no_base() -> None:
    for base in (None, "", "not a URL", ONE_HOST):
        assert urls.fill_in("rabbit://h/v%7Bx", base) == "rabbit://h/v%7Bx"


def test_several_hosts_without_credentials_can_be_filled_in() -> None:
    base = "kafka://a:1,b:2/"
    assert urls.fill_in("kafka://{hostname2}:{port2}/", base) == "kafka://b:2/"


@pytest.mark.parametrize("base", [None, ""])
def test_a_template_without_a_base_is_unusable(base: str | None) -> None:
    assert "is not set" in reason_of("rabbit://{hostname}/", base)


@pytest.mark.parametrize("base", ["x", "rabbit:/h/", "rabbit://[h/"])
def test_a_template_over_a_bad_base_is_unusable(base: str) -> None:
    assert "is no URL" in reason_of("rabbit://h/{path}", base)


@pytest.mark.parametrize("name", ["username", "password", "hostname", "port"])
def test_plain_names_on_a_base_with_several_hosts_are_unusable(
    name: str,
) -> None:
    reason = reason_of(f"rabbit://x{{{name}}}/", TWO_HOSTS)
    assert "has several hosts" in reason
    assert f"{{{name}1}}" in reason


@pytest.mark.parametrize(
    "template, base",
    [
        ("rabbit://h:{port}/", "rabbit://u:p@h/"),
        ("rabbit://h:{port}/", "rabbit://u:p@h:/"),
        ("rabbit://h:{port}/", "rabbit://u:p@h:port/"),
        ("rabbit://h:{port2}/", "rabbit://u:p@h:1,u:p@h:port/"),
        ("rabbit://h:1{port}/", "rabbit://u:p@h/"),
        ("rabbit://h:{port2}/", "rabbit://u:p@h:1,u:p@h/"),
        ("rabbit://{username}@h/", "rabbit://h/"),
        ("rabbit://u:{password}@h/", "rabbit://u@h/"),
        ("rabbit://u:{password1}@h/", "rabbit://u@h:1,u:p@i:1/"),
        ("rabbit://{hostname}/", "rabbit://"),
        ("rabbit://{hostname2}/", "rabbit://u:p@h:1,u:p@/"),
    ],
)
def test_a_part_that_the_base_lacks_is_unusable(
    template: str, base: str
) -> None:
    assert f"{{{template.partition('{')[2].partition('}')[0]}}}" in reason_of(
        template, base
    )


@pytest.mark.parametrize(
    "url",
    [
        "rabbit://u:p{w@h/",
        "rabbit://u:p}w@h/",
        "rabbit://u:p{w0rd}@h/",
        "rabbit://u:p{{w@h/",
        "rabbit://u:p}}w@h/",
        "rabbit://{{u:p@h/",
        "rabbit://u:p@h,u:{{@h2/",
        "rabbit://u:p{}w@h/",
        "rabbit://u:p{0}w@h/",
        "rabbit://u:p{username.x}w@h/",
        "rabbit://u:p{username[0]}w@h/",
        "rabbit://u:p{ username }w@h/",
        "rabbit://u:p{username!x}w@h/",
        "rabbit://u:p{username!}w@h/",
        "rabbit://u:p{username:{port}}w@h/",
        "rabbit://u:p{username:9999999999}w@h/",
        "rabbit://u:p{username:q}w@h/",
        "rabbit://h/{hostname1}",
        "rabbit://h/v{",
    ],
)
def test_a_brace_that_is_no_known_name_is_unusable(url: str) -> None:
    reason = reason_of(url)
    assert "brace" in reason
    assert "w0rd" not in reason


def test_a_double_brace_after_the_host_is_one_brace() -> None:
    for url in ("rabbit://u:p@h/a{{@b", "rabbit://h/?x={{@", "rabbit://h{{"):
        assert urls.fill_in(url, ONE_HOST) == url.replace("{{", "{")


def test_a_name_of_a_host_that_the_base_lacks_is_unusable() -> None:
    assert "does not fill" in reason_of("rabbit://{hostname3}/", TWO_HOSTS)
    assert "does not fill" in reason_of("rabbit://{hostname01}/", TWO_HOSTS)


def test_a_host_with_two_at_signs_is_not_filled_in() -> None:
    base = "rabbit://u@realm@a:1,u:p@b:2/"
    assert "more than one '@'" in reason_of("rabbit://{hostname1}/", base)
    assert urls.fill_in("rabbit://{hostname2}/", base) == "rabbit://b/"


@pytest.mark.parametrize(
    "template",
    [
        "rabbit://{hostname}:5672/",
        "rabbit://u:p@{hostname}:5672/",
        "rabbit://u:p@x{hostname}/",
        "rabbit://[{hostname}/",
        "rabbit://{hostname}]/",
    ],
)
def test_an_ipv6_address_with_a_port_needs_brackets(template: str) -> None:
    assert "brackets" in reason_of(template, "rabbit://u:p@[::1]:5/")


@pytest.mark.parametrize(
    "url, part_of_reason",
    [
        ("", "does not begin"),
        (" ", "does not begin"),
        ("h", "does not begin"),
        ("u:p@h", "does not begin"),
        ("rabbit:/h/v", "does not begin"),
        ("rabbit:h", "does not begin"),
        ("://h", "does not begin"),
        ("ra_bbit://h", "does not begin"),
        ("rabbit://h:port/", "malformed"),
        ("rabbit://u:p@h:56x/", "malformed"),
        ("rabbit://u:p@h:1,u:p@h:y/", "malformed"),
        ("rabbit://h:/", "malformed"),
        ("rabbit://[::1/", "malformed"),
        ("rabbit://[::1]]:5/", "malformed"),
        ("rabbit://u:p@[::1]:x/", "malformed"),
        ("rabbit://u:p@::1:5672/v", "write [ADDRESS] or [ADDRESS]:PORT"),
        ("rabbit://u:p@fd00::a:5672/v", "no brackets"),
        ("rabbit://u:p@1:2:3:4:5:6:7:8:5672/v", "no brackets"),
        ("rabbit://u:p@h:1,u:p@::1:5671/v", "no brackets"),
        ("rabbit://h..x/", "malformed"),
        (f"rabbit://{'h' * 64}/", "malformed"),
        (f"rabbit://h/{'%2F' * 256}", "longer than 255 bytes"),
        ("rabbit://h:65536/", "not between"),
        ("rabbit://h:-1/", "not between"),
        ("amqp91://h/", "no oslo.messaging driver"),
        ("kombu+memory://h/", "no oslo.messaging driver"),
    ],
)
def test_a_url_that_cannot_be_used(url: str, part_of_reason: str) -> None:
    assert part_of_reason in reason_of(url)


@pytest.mark.parametrize(
    "url, broker",
    [
        (
            "rabbit://u:p@a:1,u:p%2C@[::1]:2,::2/%2Fv",
            urls.Broker("rabbit", (("a", 1), ("::1", 2), ("::2", None)), "/v"),
        ),
        ("RABBIT://A", urls.Broker("rabbit", (("A", None),), None)),
        ("rabbit://", urls.Broker("rabbit", (), None)),
        ("rabbit:///", urls.Broker("rabbit", (), "")),
        ("rabbit://u@x:p@h//", urls.Broker("rabbit", (("h", None),), "/")),
        ("rabbit+ssl://h,,/", urls.Broker("rabbit", (("h", None),), "")),
        (
            "rabbit://u:p@fe80::7%eth0/",
            urls.Broker("rabbit", (("fe80::7%eth0", None),), ""),
        ),
        (
            f"rabbit://h/{'%2F' * 255}",
            urls.Broker("rabbit", (("h", None),), "/" * 255),
        ),
        ("\n rabbit://h/v\n", urls.Broker("rabbit", (("h", None),), "v")),
    ],
)
def test_where_a_url_leads_to(url: str, broker: urls.Broker) -> None:
    assert urls.check(url, KNOWN) == broker


def test_the_scheme_is_in_lower_case_and_nothing_is_no_scheme() -> None:
    assert urls.scheme_of("NONE:///") == "none"
    assert urls.scheme_of("none:") == "none"
    assert urls.scheme_of("none") == ""
    assert urls.scheme_of("") == ""


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("rabbit://a:b@h/v", "rabbit://c:d@H:5672/v?x=1", True),
        ("rabbit://a:b@h:1,a:b@i:1/v", "rabbit://a:b@i:1,a:b@j:1/v", True),
        ("rabbit://h", "rabbit://h//", True),
        ("rabbit://", "rabbit://localhost/", True),
        ("rabbit://h/v", "rabbit://h/w", False),
        ("rabbit://h/v", "rabbit://h:5673/v", False),
        ("rabbit://h/v", "rabbit://i/v", False),
        ("rabbit://h/v", "fake://h/v", False),
    ],
)
def test_two_urls_that_lead_to_the_same_queues(
    one: str, other: str, same: bool
) -> None:
    brokers = urls.broker_of(one), urls.broker_of(other)
    assert urls.same_queues(*brokers) is same
    assert urls.same_queues(*reversed(brokers)) is same


# Pieces that meet each other in ways that nobody thinks of.
_PIECES = st.sampled_from(
    [
        *("rabbit", "fake", "none", "://", "/", "//", ":", "@", ",", "?"),
        *("#", "[", "]", "{", "}", "{{", "}}", "%7B", "%", " ", "\n", "é"),
        *("h", "u", "pw", "1", "5672", "::1", "127.0.0.1", "x=1", "&"),
        *("{scheme}", "{username}", "{password}", "{hostname}", "{port}"),
        *("{path}", "{query}", "{fragment}", "{port1}", "{hostname2}"),
        *("{password2}", "{username1}", "{nobody}", "{port:03}", "{path!r}"),
    ]
)
_MESS = st.one_of(st.lists(_PIECES).map("".join), st.text())
_WORD = st.text("abcxyzABC019-._~!$&'()*+;=%", min_size=1, max_size=6)
_ADDRESS = st.one_of(_WORD, st.sampled_from(["[::1]", "[fe80::2]"]))
_HOST = st.builds(
    lambda user, password, host, port: (
        (f"{user}:{password}@" if password else f"{user}@" if user else "")
        + host
        + (f":{port}" if port is not None else "")
    ),
    st.one_of(st.just(""), _WORD),
    st.one_of(st.just(""), _WORD),
    _ADDRESS,
    st.one_of(st.none(), st.integers(0, 65535)),
)
_URL = st.builds(
    lambda hosts, path, tail: f"rabbit://{','.join(hosts)}{path}{tail}",
    st.lists(_HOST, min_size=1, max_size=3),
    st.sampled_from(["", "/", "//", "/v", "/%2F", "/a/b"]),
    st.sampled_from(["", "?a=1", "#f", "?a=1&b=2#f"]),
)


@given(_MESS, st.one_of(st.none(), _MESS, _URL))
@example("rabbit://u:p{{@h", ONE_HOST)
def test_whatever_is_written_either_works_or_is_unusable(
    url: str, base: str | None
) -> None:
    try:
        filled = urls.fill_in(url, base)
        broker = urls.check(filled, KNOWN)
    except urls.UnusableURL:
        return
    parsed = oslo_messaging.TransportURL.parse(cfg.ConfigOpts(), filled)
    assert parsed.transport.split("+")[0] == broker.driver
    assert parsed.virtual_host == broker.virtual_host
    assert broker.hosts == tuple(
        (host.hostname, host.port) for host in parsed.hosts
    )
    if urls.is_template(url):
        assert base is not None
        assert filled == meaning(url, base)


@given(_URL)
def test_what_oslo_messaging_parses_is_usable(url: str) -> None:
    try:
        for host in parse(url).hosts:
            # The resolver takes no other name.
            (host.hostname or "").encode("idna")
    except Exception:
        with pytest.raises(urls.UnusableURL):
            urls.check(url, KNOWN)
    else:
        urls.check(url, KNOWN)


def parse(url: str) -> oslo_messaging.TransportURL:
    return oslo_messaging.TransportURL.parse(cfg.ConfigOpts(), url)


@given(_URL, st.integers(0, 2), st.booleans())
def test_a_host_filled_in_is_the_host_that_is_used(
    base: str, index: int, brackets: bool
) -> None:
    several = "," in urllib.parse.urlparse(base).netloc
    n = str(index + 1) if several else ""
    host = f"[{{hostname{n}}}]" if brackets else f"{{hostname{n}}}"
    template = f"rabbit://{{username{n}}}:{{password{n}}}@{host}:{{port{n}}}/"
    try:
        filled = urls.fill_in(template, base)
        broker = urls.check(filled, KNOWN)
    except urls.UnusableURL:
        return
    there = parse(base).hosts[index if several else 0]
    (here,) = parse(filled).hosts
    assert here.username == (there.username or "")
    assert here.password == there.password
    assert here.hostname.lower() == there.hostname.lower()
    assert here.port == there.port
    assert broker.hosts == ((here.hostname, here.port),)


_SECRET_URL = st.builds(
    "rabbit://Zuser{}:Zpass{}@Zhost{}:{}/Zvhost{}".format, *([_MESS] * 5)
)


@given(_SECRET_URL, st.one_of(st.none(), _SECRET_URL))
def test_no_reason_holds_a_part_of_a_url(url: str, base: str | None) -> None:
    error = None
    try:
        urls.check(urls.fill_in(url, base), KNOWN)
    except urls.UnusableURL as caught:
        error = caught
    if error is not None:
        for part in ("Zuser", "Zpass", "Zhost", "Zvhost", "nobody", "5672"):
            assert part not in error.reason
        assert str(error) == error.reason
        assert error.__cause__ is None
