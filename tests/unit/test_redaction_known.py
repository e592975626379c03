# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Known credentials are found by their value, however they are written."""

from __future__ import annotations

import collections
import contextlib
import gc
import json
import logging
import os
import re
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellmw.redaction import KNOWN, Hold, Secret, Secrets
from cellmw.redaction.index import Index
from tests import odd_urls
from tests.odd_urls import Sample, some_urls

PASSWORD = "Tr0ub4dor/&3 'ü\"€"
URL = Secret(f"rabbit://nova:{quote(PASSWORD, safe='')}@h/vh")


@pytest.fixture
def secrets() -> Secrets:
    return Secrets()


FORMS: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "quote": lambda p: quote(p, safe=""),
    "quote with slashes": quote,
    "quote_plus": quote_plus,
    "as SQLAlchemy renders it": lambda p: quote(p, safe=" +"),
    "lower-case escapes": lambda p: re.sub(
        "%..", lambda found: found.group().lower(), quote(p, safe="")
    ),
    "repr": repr,
    "repr with both quotes": lambda p: repr([p, "'\""]),
    "repr of a text with both quotes": lambda p: repr(f"'\" {p} '\""),
    "ascii": ascii,
    "JSON": json.dumps,
    "JSON as unicode": lambda p: json.dumps(p, ensure_ascii=False),
    "bytes": lambda p: repr(p.encode()),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(
    "password",
    [PASSWORD, "correct-horse-battery", "12345678", "%41%42 {+}#?&", "a" * 60],
)
def test_each_form_is_hidden(
    secrets: Secrets, form: Callable[[str], str], password: str
) -> None:
    secrets.hold(Secret(f"rabbit://nova:{quote(password, safe='')}@h/vh"))
    written = form(password)
    for before in ("", "x", "xy ", "xyz=", "ü: "):
        shown = secrets.hide(f"{before}{written} and more")
        assert written not in shown
        assert "***" in shown
        assert shown.endswith(" and more")
        assert shown.startswith(before.rstrip("xyz=")[:1])


@some_urls
@given(
    odd_urls.passwords(),
    st.sampled_from(sorted(FORMS)),
    st.text(max_size=5),
    st.text(max_size=5),
    st.booleans(),
)
def test_a_password_is_hidden_in_any_form_and_place(
    password: str, form: str, before: str, after: str, encoded: bool
) -> None:
    secrets = Secrets()
    written_in_url = quote(password, safe="") if encoded else password
    secrets.hold(Secret(f"rabbit://nova:{written_in_url}@h/vh"))
    written = FORMS[form](password)
    text = f"{before} {written} {after}"
    shown = secrets.hide(text)
    assert shown != text
    assert written not in shown
    assert password not in shown


@some_urls
@given(
    st.one_of(
        odd_urls.proper_urls(), odd_urls.raw_urls(), odd_urls.raw_clusters()
    )
)
def test_the_passwords_of_all_hosts_are_known(sample: Sample) -> None:
    if odd_urls.has_host_in_password(sample):
        return
    secrets = Secrets()
    secrets.hold(Secret(sample.url))
    for password in sample.passwords:
        shown = secrets.hide(f"say {password}!")
        assert shown == "say ***!"


@pytest.mark.parametrize("password", ["guest", "é€ü", "%41%42%43", "a'b c"])
def test_a_short_password_is_hidden_behind_its_user_only(
    secrets: Secrets, password: str
) -> None:
    secrets.hold(Secret(f"rabbit://guest:{password}@h/vh"))
    assert secrets.hide(f"the {password} is here") == (
        f"the {password} is here"
    )
    assert secrets.hide(f"log in as guest:{password}") == "log in as ***"


def test_of_a_template_nothing_is_hidden(secrets: Secrets) -> None:
    secrets.hold(Secret("rabbit://{username}:{password}@{hostname}/vh"))
    text = "{username}:{password}@{hostname}"
    assert secrets.hide(text) == text


def test_values_that_overlap_are_hidden_together(secrets: Secrets) -> None:
    secrets.hold(
        Secret("a://u:abcdefgh1234@h"), Secret("a://u:1234ijklmnop@h")
    )
    assert secrets.hide("x abcdefgh1234ijklmnop y") == "x *** y"


def test_a_text_without_secrets_is_the_same_object(secrets: Secrets) -> None:
    text = "a text of some length, without anything in it"
    assert secrets.hide(text) is text
    secrets.hold(URL)
    assert secrets.hide(text) is text
    assert secrets.hide("") == ""


def test_half_a_surrogate_pair_is_no_obstacle(secrets: Secrets) -> None:
    secrets.hold(Secret("a://u:\ud800hunter-two@h"))
    shown = secrets.hide("\udfff \ud800hunter-two \udfff")
    assert shown == "\udfff *** \udfff"


def _is_known(secrets: Secrets) -> bool:
    return secrets.hide(f"see {PASSWORD}!") == "see ***!"


def test_a_credential_is_known_until_its_last_hold_is_dropped(
    secrets: Secrets,
) -> None:
    other = Secret(f"mysql://u:{quote(PASSWORD, safe='')}@other/db")
    first, second, third = (
        secrets.hold(URL),
        secrets.hold(URL, None),
        secrets.hold(other),
    )
    first.drop()
    assert _is_known(secrets)
    first.drop()  # twice is once
    assert _is_known(secrets)
    second.drop()
    assert _is_known(secrets)
    assert len(secrets) == 1
    third.drop()
    assert not _is_known(secrets)
    assert len(secrets) == 0


WEIRD = (
    "rabbit://u:pa/ss@h/vh",
    "rabbit://u:p q'r\"@h/vh",
    "u:guest@h/vh",
    "rabbit://u:guest@h/vh",
    "rabbit://u:p@h1,u:hunter-two@h2/vh?password=hunter-three",
    "no url at all, but long",
    "rabbit://u:\ud800hunter-two\n@h",
    "rabbit://:@/",
    "://@",
    "",
)


def test_what_was_dropped_leaves_nothing(secrets: Secrets) -> None:
    before = _sizes(secrets)
    holds = [secrets.hold(*map(Secret, WEIRD)) for _ in range(3)]
    holds.append(secrets.hold(URL))
    assert _sizes(secrets) != before
    for hold in holds:
        hold.drop()
    assert _sizes(secrets) == before


def _sizes(secrets: Secrets) -> dict[str, int]:
    parts = [secrets, *secrets._indexes]
    return {
        f"{part} {name}": len(value)
        for part, owner in enumerate(parts)
        for name, value in vars(owner).items()
        if isinstance(value, (dict, collections.deque)) and name != "_locks"
    }


def test_a_hold_ends_with_its_block(secrets: Secrets) -> None:
    with secrets.hold(URL):
        assert _is_known(secrets)
    assert not _is_known(secrets)


def test_a_hold_shows_nothing(secrets: Secrets) -> None:
    assert PASSWORD not in repr(secrets.hold(URL))
    assert quote(PASSWORD, safe="") not in repr(secrets.hold(URL))


@pytest.mark.parametrize("url", WEIRD)
def test_anything_can_be_held(secrets: Secrets, url: str) -> None:
    secrets.hold(Secret(url)).drop()


def test_the_option_of_a_short_password_is_named_once(
    secrets: Secrets, caplog: pytest.LogCaptureFixture
) -> None:
    short = Secret("rabbit://u:guest@h/")
    with caplog.at_level(logging.WARNING, "cellmw"):
        secrets.hold(short)
        secrets.hold(URL, short, names=["first", "transport_url of 1"])
        secrets.hold(None, short, names=["first", "transport_url of 1"])
        secrets.hold(short, names=["connection in [api_database]"])
        secrets.hold(URL, short, names=["third"])
        # Its readings have short parts, it has none.
        secrets.hold(Secret("rabbit://u:a/b@c-long-enough@h"), names=["4"])
        secrets.hold(Secret("rabbit://u:a/b@c@h"), names=["fifth"])
    named = [
        record.getMessage().partition(" has a password of less than 8")[0]
        for record in caplog.records
    ]
    assert named == [
        "transport_url of 1",
        "connection in [api_database]",
        "fifth",
    ]
    assert "guest" not in caplog.text


def test_work_for_a_text_does_not_grow_with_the_secrets() -> None:
    text = "nothing secret is in this text, and that is soon found out"
    counts = [_calls(_with(number), text) for number in (1, 100, 1000)]
    assert counts[0] == counts[1] == counts[2]


def test_work_for_a_secret_does_not_grow_with_the_secrets() -> None:
    # All begin alike, so all have the same first word.
    text = "see prefix-of-all-0000001"
    secrets = [
        _with(number, "prefix-of-all-{:07}".format) for number in (2, 1000)
    ]
    assert all(s.hide(text) == "see ***" for s in secrets)
    assert _calls(secrets[0], text) == _calls(secrets[1], text)


def _with(
    number: int, password: Callable[[int], str] = "Zq{:07}w!".format
) -> Secrets:
    secrets = Secrets()
    for index in range(number):
        secrets.hold(Secret(f"rabbit://u:{password(index)}@h/vh"))
    return secrets


def _calls(secrets: Secrets, text: str) -> int:
    """Calls and lines of Python, and calls of C functions."""
    count = 0

    def trace(*args: object) -> Any:
        nonlocal count
        count += 1
        return trace

    previous = sys.gettrace()
    gc.disable()  # other tools' callbacks would be counted
    sys.settrace(trace)
    sys.setprofile(trace)
    try:
        secrets.hide(text)
    finally:
        sys.setprofile(None)
        sys.settrace(previous)
        gc.enable()
    return count


def test_threads_may_hold_hide_and_drop_at_once(secrets: Secrets) -> None:
    kept = secrets.hold(URL)
    barrier = threading.Barrier(8)
    problems: list[object] = []
    urls = [Secret(f"a://u:password-{n}@h") for n in range(8)]

    def work(number: int) -> None:
        barrier.wait()
        try:
            for turn in range(150):
                hold = secrets.hold(URL, urls[(number + turn) % 8])
                assert _is_known(secrets)
                assert secrets.hide(f"password-{(number + turn) % 8}") == "***"
                hold.drop()
                assert _is_known(secrets)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    kept.drop()
    assert _sizes(secrets) == _sizes(Secrets())


@contextlib.contextmanager
def _locked(secrets: Secrets) -> Iterator[None]:
    with secrets._lock():
        yield


def test_hiding_takes_no_lock(secrets: Secrets) -> None:
    secrets.hold(URL)
    with _locked(secrets):
        assert _is_known(secrets)


def test_dropping_never_waits(secrets: Secrets) -> None:
    # As a finalizer that runs in the middle of a hold.
    hold, other = secrets.hold(URL), secrets.hold(Secret(WEIRD[0]))
    with _locked(secrets):
        hold.drop()
    assert _is_known(secrets)
    other.drop()
    assert not _is_known(secrets)
    assert _sizes(secrets) == _sizes(Secrets())


def test_a_drop_in_the_middle_of_a_hold_is_settled_by_it(
    secrets: Secrets, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = secrets.hold(URL)
    enter = secrets._enter

    def drop_then_enter(*args: object) -> None:
        hold.drop()
        enter(*args)  # type: ignore[arg-type]  # handed on

    monkeypatch.setattr(secrets, "_enter", drop_then_enter)
    secrets.hold(Secret("a://u:hunter-two@h"))
    assert not _is_known(secrets)


class _Owner:
    """Something that a finalizer is put on."""


def test_a_finalizer_may_drop(secrets: Secrets) -> None:
    owner = _Owner()
    owner.itself = owner  # type: ignore[attr-defined]  # makes a cycle
    weakref.finalize(owner, secrets.hold(URL).drop)
    del owner
    gc.collect()
    assert not _is_known(secrets)


@pytest.mark.parametrize("is_locked", [False, True])
def test_a_forked_child_can_hold_and_drop(
    secrets: Secrets, is_locked: bool
) -> None:
    hold = secrets.hold(URL)
    with _locked(secrets) if is_locked else contextlib.nullcontext():
        child = os.fork()
        if child == 0:  # pragma: no cover  # coverage ends with the fork
            os._exit(_in_the_child(secrets, hold))
        # A child that hangs is ended, and fails the test.
        for _ in range(500):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
            time.sleep(0.01)
        else:
            os.kill(child, 9)
            ended, status = os.waitpid(child, 0)
    assert status == 0
    assert _is_known(secrets)


def _in_the_child(secrets: Secrets, hold: Hold) -> int:
    try:
        assert _is_known(secrets)
        new = secrets.hold(Secret("a://u:hunter-two@h"))
        assert secrets.hide("hunter-two") == "***"
        new.drop()
        assert secrets.hide("hunter-two") == "hunter-two"
        hold.drop()
        assert not _is_known(secrets)
    except BaseException:
        return 1
    return 0


def test_a_hold_that_a_fork_cut_short_is_made_whole(
    secrets: Secrets, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*args: object) -> None:
        raise InterruptedError

    monkeypatch.setattr(Index, "_words_of", cut)
    with pytest.raises(InterruptedError):
        secrets.hold(URL)
    monkeypatch.undo()
    assert not _is_known(secrets)
    secrets.hold(URL)
    assert _is_known(secrets)


def test_each_hold_calls_back(secrets: Secrets) -> None:
    calls = []
    secrets.on_hold = lambda: calls.append(1)
    secrets.hold(URL)
    assert calls == [1]


def test_there_is_one_registry_for_the_process() -> None:
    assert isinstance(KNOWN, Secrets)
