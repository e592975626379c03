# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Connection strings are shown without their credentials."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cellmw.redaction import redact_url, urls
from tests import odd_urls
from tests.odd_urls import Sample, many_urls, some_urls


@many_urls
@given(odd_urls.any_urls())
def test_no_url_shows_its_credentials_and_each_shows_the_rest(
    sample: Sample,
) -> None:
    shown = redact_url(sample.url)
    for password in sample.passwords:
        assert password not in shown
    assert redact_url(shown) == shown
    if not odd_urls.has_host_in_password(sample):
        # No letter of a user name or a password.
        assert not any(map(str.isupper, shown))
        assert sample.shown in (None, shown)


@some_urls
@given(odd_urls.proper_urls())
def test_all_but_credentials_stays_in_a_proper_url(sample: Sample) -> None:
    assert redact_url(sample.url) == sample.shown


@some_urls
@given(odd_urls.raw_urls())
def test_a_password_that_was_not_encoded_is_hidden(sample: Sample) -> None:
    shown = redact_url(sample.url)
    assert sample.passwords[0] not in shown
    if not odd_urls.has_host_in_password(sample):
        assert shown == sample.shown


@some_urls
@given(odd_urls.raw_clusters())
def test_hosts_with_ports_stay_between_odd_passwords(sample: Sample) -> None:
    shown = redact_url(sample.url)
    for password in sample.passwords:
        assert password not in shown
    if not odd_urls.has_host_in_password(sample):
        assert shown == sample.shown


@some_urls
@given(odd_urls.template_urls())
def test_the_names_of_a_template_stay(sample: Sample) -> None:
    assert redact_url(sample.url) == sample.shown


@some_urls
@given(odd_urls.broken_urls())
def test_a_broken_url_shows_no_password(sample: Sample) -> None:
    shown = redact_url(sample.url)
    for password in sample.passwords:
        assert password not in shown
    if not odd_urls.has_host_in_password(sample):
        assert not any(map(str.isupper, shown))


@some_urls
@given(st.text(st.sampled_from("ab1:/@,?#&={}[]*.% \n'\"ü"), max_size=40))
@example("://")
@example("a://b:c")
@example("***://***@***:***/?***=***#***")
def test_any_text_is_redacted_and_redacting_it_twice_changes_nothing(
    text: str,
) -> None:
    once = redact_url(text)
    assert redact_url(once) == once


@pytest.mark.parametrize(
    "url, shown",
    [
        ("rabbit://u:p@h:5672/vh", "rabbit://***@h:5672/vh"),
        # A user name without a password may be a token.
        ("rabbit://token@h/vh", "rabbit://***@h/vh"),
        ("rabbit://u:p@h1,h2:5672/vh", "rabbit://***@h1,h2:5672/vh"),
        ("rabbit://u:p@h1,u:q@h2/vh", "rabbit://***@h1,***@h2/vh"),
        # One realm, as SASL has it, in the name.
        ("rabbit://u@r:p@h1:1,u@r:q@h2:2/", "rabbit://***@h1:1,***@h2:2/"),
        # Without a port ``@ss,`` can be a piece of a password.
        ("rabbit://u:p/@ss,w/rd@h/vh", "rabbit://***@h/vh"),
        ("rabbit://u:http://x@h/vh", "rabbit://***@h/vh"),
        ("none:///", "none:///"),
        ("sqlite://", "sqlite://"),
        ("sqlite:////var/lib/api.db", "sqlite:////var/lib/api.db"),
        (
            "postgresql://u:p@/db?host=/run/pg&host=h2",
            "postgresql://***@/db?host=/run/pg&host=h2",
        ),
        ("mysql://u:p@h/db?read_timeout=5", "mysql://***@h/db?read_timeout=5"),
        ("mysql://u:p@h/db?passwd=5", "mysql://***@h/db?passwd=***"),
        ("mysql://u:p@h/db?charset=a%20b", "mysql://***@h/db?charset=***"),
        ("mysql://h/db?a=&b", "mysql://h/db?a=&***"),
        ("mysql://h/db?a b=c", "mysql://h/db?***"),
        ("mysql://u:p@h/db#f", "mysql://***@h/db#***"),
        # The host was forgotten: what is left of the login is hidden.
        ("rabbit://u:word", "rabbit://***"),
        ("rabbit://u:/word", "rabbit://***"),
        ("rabbit://u:word/and/more", "rabbit://***"),
        ("u:word@h/vh", "***@h/vh"),
        ("rabbit:/u:word@h/vh", "***@h/vh"),
        ("word", "***"),
        ("", ""),
        (" ", " "),
        ("1://u:p@h/vh", "***@h/vh"),
    ],
)
def test_what_stays(url: str, shown: str) -> None:
    assert redact_url(url) == shown


def _passwords(url: str) -> set[str]:
    return {password for _, password in urls.read(url).logins}


@some_urls
@given(odd_urls.proper_urls())
def test_the_passwords_of_a_proper_url_are_found_and_no_more(
    sample: Sample,
) -> None:
    reading = urls.read(sample.url.partition("?")[0])
    decoded = [urls.decoded(password) for _, password in reading.logins]
    assert reading.is_certain
    assert all(
        any(password in forms for forms in decoded)
        for password in sample.passwords
    )
    assert len(decoded) <= len(sample.passwords)
    assert {user for user, _ in reading.logins} <= set(sample.users)


@some_urls
@given(st.one_of(odd_urls.raw_urls(), odd_urls.raw_clusters()))
def test_raw_passwords_are_found(sample: Sample) -> None:
    if not odd_urls.has_host_in_password(sample):
        assert set(sample.passwords) <= _passwords(sample.url)


def test_each_reading_of_a_broken_url_is_found() -> None:
    reading = urls.read("rabbit://user:pa@ss,wo/rd-and-more@h/vh")
    passwords = {password for _, password in reading.logins}
    assert "pa@ss,wo/rd-and-more" in passwords
    assert "pa" in passwords  # SQLAlchemy's
    assert not reading.is_certain


def test_a_password_in_the_query_is_found() -> None:
    assert _passwords("mysql://h/db?password=a%20b&charset=utf8") == {"a%20b"}


def test_a_name_in_a_template_is_no_password() -> None:
    assert _passwords("rabbit://{username}:{password}@h/?token={query}") == (
        set()
    )
