# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Any text can be made fit to leave."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from urllib.parse import quote

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from cellmw.redaction import (
    KNOWN,
    Secret,
    Secrets,
    describe,
    one_line,
    redact_url,
    scrub,
    text,
)
from tests import odd_urls
from tests.odd_urls import Sample, many_urls, some_urls


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> Secrets:
    """Known to nobody but this test."""
    secrets = Secrets()
    monkeypatch.setattr(text, "KNOWN", secrets)
    return secrets


@pytest.mark.parametrize(
    "before, after",
    [
        ("", ""),
        ("cannot reach ", ""),
        ("cannot reach ", ": refused"),
        ("cannot reach ", ", refused"),
        ("(", ")"),
        ("<", ">"),
        ("url=", " "),
        ("['", "', 'bob@example.org']"),
        ('{"url":"', '","mail":"bob@example.org"}'),
        ('"{\\"url\\": \\"', '\\", \\"mail\\": \\"bob@x\\"}"'),
        ("one\n", "\ntwo: bob@example.org"),
    ],
)
def test_a_url_in_a_text_loses_its_credentials_and_no_more(
    before: str, after: str
) -> None:
    shown = scrub(f"{before}rabbit://nova:guest@h1:5672/vh{after}")
    before = before.replace("u:p@", "***@")
    assert shown == f"{before}rabbit://***@h1:5672/vh{after}"


@some_urls
@given(
    st.one_of(odd_urls.proper_urls(), odd_urls.template_urls()),
    st.sampled_from(["", "see ", "'", '"', "(", "\n", "a://b/ "]),
)
def test_a_proper_url_is_redacted_wherever_it_stands(
    sample: Sample, before: str
) -> None:
    # A quote ends a URL in a text.
    assume("'" not in sample.url)
    after = {"(": ")"}.get(before, before if before in "'\"" else " x")
    assert scrub(f"{before}{sample.url}{after}") == (
        f"{before}{sample.shown}{after}"
    )


@many_urls
@given(
    odd_urls.any_urls(),
    st.sampled_from(["{}", "x {} y", "{!r}", "({})", "'{}'", "x{}, y@z"]),
)
def test_a_known_url_shows_nothing_in_any_text(
    sample: Sample, around: str
) -> None:
    with KNOWN.hold(Secret(sample.url)):
        shown = scrub(around.format(sample.url))
        for password in sample.passwords:
            assert password not in shown
            assert repr(password)[1:-1] not in shown
        assert scrub(shown) == shown


@pytest.mark.parametrize(
    "password",
    ["g st", "g'st", 'g"st', "g\nst", "g@s,t", "1 2", "/", "g`<st", "g\\ü"],
)
@pytest.mark.parametrize("around", ["see {} now", "{!r}", "'{}'", "{}"])
def test_a_known_url_with_a_short_odd_password_is_hidden_as_a_whole(
    secrets: Secrets, password: str, around: str
) -> None:
    url = f"rabbit://nova:{password}@h1:5672/vh"
    hold = secrets.hold(Secret(url))
    shown = scrub(around.format(url))
    assert shown in (
        around.format("rabbit://***@h1:5672/vh"),
        f'"{around.format("rabbit://***@h1:5672/vh")[1:-1]}"',
    )
    hold.drop()


@pytest.mark.parametrize(
    "told, shown",
    [
        # As SQLAlchemy shortens a long value.
        (
            "'rabbit://u:pas ... (5 characters truncated) ... rd@h/vh'",
            "'rabbit://*** ... (5 characters truncated) ... ***@h/vh'",
        ),
        ("rabbit://u:word", "rabbit://***"),
        ("http://h/a@b?token=x&c=d.", "http://h/a@b?token=***&c=d."),
        ("://u", "://u"),
        ("a ://u:p@h b", "a ://***@h b"),
        ("http://u:p/q@h/ b", "http://***@h/ b"),
        ("http://h/?a=http://u:p@h/", "http://h/?a=http://***@h/"),
        ("http://h/?a=1&token=x&b[]=y", "http://h/?a=1&token=***&b[]=y"),
        # A client hides nothing that the line says after this.
        (
            'GET /42?a://[ HTTP/1.1" 204 0 "-" "curl@h"',
            'GET /42?a://*** HTTP/1.1" 204 0 "-" "curl@h"',
        ),
        ("a://u:p\t200 @h", "a://***\t200 @h"),
        ("a://u:p'200 @h", "a://***'200 @h"),
        ("see http://h:8774.", "see http://h:8774."),
        ("[http://[::1]:8774/a]", "[http://[::1]:8774/a]"),
        ("1amqp://u:p@h", "1amqp://***@h"),
        ("x" * 100 + "://u:p@h", "x" * 100 + "://***@h"),
    ],
)
def test_what_is_unknown_is_hidden_by_its_form(told: str, shown: str) -> None:
    assert scrub(told) == shown


def test_known_values_are_hidden(secrets: Secrets) -> None:
    secrets.hold(Secret("rabbit://u:hunter-two@h/"))
    assert scrub("hunter-two, b'hunter-two'") == "***, b'***'"


def test_a_known_value_is_hidden_where_a_url_ends_in_it(
    secrets: Secrets,
) -> None:
    secrets.hold(Secret("rabbit://u:one two 'three'@h1:1/vh"))
    for around in ("{}", "{!r}"):
        shown = scrub(around.format("rabbit://u:one two 'three'@h1:1/vh x"))
        assert shown.strip("'\"") == "rabbit://***@h1:1/vh x"


def test_a_text_without_secrets_is_the_same_object(secrets: Secrets) -> None:
    secrets.hold(Secret("rabbit://u:hunter-two@h/"))
    for clean in ("nothing", "see amqp://***@h:5672/vh and http://h/?a=b"):
        assert scrub(clean) is clean


def test_what_stands_behind_the_limit_is_withheld(
    secrets: Secrets, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert text.LIMIT == 2**20
    monkeypatch.setattr(text, "LIMIT", 1000)
    secrets.hold(Secret("rabbit://u:hunter-two-three@h/"))
    for length in range(870, 930):
        shown = scrub("x" * length + "hunter-two-three" + "y" * 200)
        assert len(shown) <= 1000
        assert "hunt" not in shown
        assert shown.endswith(" characters are withheld)")
        assert scrub(shown) == shown
    assert scrub("x" * 1000) == "x" * 1000
    assert scrub("x" * 1001) == f"{'x' * 900}... (101 characters are withheld)"
    shown = scrub("x" * 890 + " a://u:" + "y" * 9000 + "@h")
    assert "u:" not in shown


@some_urls
@given(st.text(st.sampled_from("ab1:/@,?#&={}[]*.% \n'\"\\ü;<"), max_size=60))
@example("a://'b@c' d@e 'a://b@c")
@example("'a://b' c://d")
def test_scrubbing_twice_changes_nothing(told: str) -> None:
    once = scrub(told)
    assert scrub(once) == once


@some_urls
@given(
    st.one_of(
        odd_urls.proper_urls(), odd_urls.raw_urls(), odd_urls.broken_urls()
    ),
    st.text(max_size=5),
    st.text(max_size=5),
)
def test_scrubbing_urls_twice_changes_nothing(
    sample: Sample, before: str, after: str
) -> None:
    once = scrub(f"{before}{sample.url}{after}{sample.url}")
    assert scrub(once) == once
    with KNOWN.hold(Secret(sample.url)):
        once = scrub(f"{before}{sample.url}{after}{sample.url}")
        assert scrub(once) == once


@given(st.text())
def test_scrub_takes_any_text(told: str) -> None:
    assert isinstance(scrub(told), str)


class _Message(str):
    """A text that is looked up late, as translations are."""

    __slots__ = ()

    def __str__(self) -> str:
        return "see amqp://u:p@h/"


def test_a_lazy_text_is_looked_up() -> None:
    assert scrub(_Message("id")) == "see amqp://***@h/"


def test_what_cannot_be_scrubbed_is_hidden(
    secrets: Secrets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secrets, "may_show", None)
    assert scrub("see hunter-two") == "***"


@pytest.mark.parametrize(
    "hostile",
    [
        *("\n", "\r\n", "\x00", "\x1b[2J", "\x7f", "\x85"),
        *("\u2028", "\u2029", "\u202e", "\u2066", "\udc80", "\u200f"),
        *("\t", "\x0b", "\x0c"),
    ],
)
def test_one_line_escapes_what_could_forge_a_line(hostile: str) -> None:
    line = one_line(f"a{hostile}b")
    assert len(line.splitlines()) == 1
    assert line.isprintable()
    assert line.encode()
    assert line == f"a{ascii(hostile)[1:-1]}b"


@given(st.text())
def test_one_line_twice_is_once(told: str) -> None:
    once = one_line(told)
    assert one_line(once) == once
    assert len(once.splitlines()) <= 1


def test_one_line_keeps_what_can_be_read() -> None:
    assert one_line("a 'ü' \u20ac \\n") == "a 'ü' \u20ac \\n"


def test_one_line_is_cut() -> None:
    assert one_line("x" * 2000) == "x" * 997 + "..."
    assert one_line("x" * 10, limit=10) == "x" * 10
    assert one_line("x" * 11, limit=10) == "x" * 7 + "..."
    assert len(one_line("\n" * 50, limit=10)) == 10


def test_one_line_never_raises() -> None:
    assert one_line(7) == "***"  # type: ignore[arg-type]  # as it says


class _Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("hunter-two")


def test_an_error_is_described(secrets: Secrets) -> None:
    secrets.hold(Secret("rabbit://u:hunter-two@h/"))
    assert describe(ValueError("a hunter-two\n\x1b[1m")) == (
        "ValueError: a ***\\n\\x1b[1m"
    )
    assert describe(OSError(111, "refused amqp://u:p@h/")) == (
        "ConnectionRefusedError: [Errno 111] refused amqp://***@h/"
    )
    assert describe(ValueError()) == "ValueError"
    assert describe(_Unprintable()) == "_Unprintable"
    assert describe(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_a_description_is_cut_after_it_is_scrubbed(secrets: Secrets) -> None:
    secrets.hold(Secret("rabbit://u:hunter-two@h/"))
    for length in range(480, 500):
        line = describe(ValueError("x" * length + "hunter-two"))
        assert len(line) <= 500
        assert "hunt" not in line


def test_a_known_url_that_shows_nothing_hides_no_other_ones_host(
    secrets: Secrets,
) -> None:
    secrets.hold(Secret("rabbit://nova:short@h:no-port"))
    shown = scrub("rabbit://nova:short@h1:1,nova:short@h2:2/vh")
    assert shown == "rabbit://***@h1:1,***@h2:2/vh"
    assert scrub("at rabbit://nova:short@h:no-port") == "at rabbit://***"


@pytest.mark.parametrize(
    "url",
    [
        "rabbit:A:HU:@,:NT@h_",
        "rabbit://A:HU:@,:NT@h_",
        "rabbit:A:HU@:,:NT@h_",
        "rabbit:A:HU@A,:NT@h_",
        "A:HU@A,:NT@h_",
    ],
)
def test_a_password_that_looks_like_several_logins_is_hidden(
    url: str, secrets: Secrets
) -> None:
    secrets.hold(Secret(url))
    assert "HU" not in scrub(f"no use: {url}")


def test_what_is_shown_is_the_same_in_json() -> None:
    # A formatter of JSON runs after this: what it escapes is clean.
    password = quote("ü\"'\\", safe="")
    shown = scrub(json.dumps({"url": f"rabbit://u:{password}@h/vh"}))
    assert json.loads(shown) == {"url": "rabbit://***@h/vh"}


def test_both_kinds_agree_on_connection_strings() -> None:
    url = "rabbit://u:p@h1:1,u:p@h2:2/vh?a=b&charset=utf8#c"
    assert scrub(url) == redact_url(url)


@pytest.fixture(scope="module", autouse=True)
def _nothing_stays_known() -> Iterator[None]:
    gc.collect()  # what other tests have left
    before = len(KNOWN)
    yield
    assert len(KNOWN) <= before
