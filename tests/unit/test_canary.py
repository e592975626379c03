# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The canary sings when a password gets out, and at nothing else."""

from __future__ import annotations

import base64
import html
import json
import logging
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest

from cellmw import redaction
from tests import canary as canaries
from tests.canary import Canary, assert_nothing_leaked


@pytest.fixture
def silent() -> Canary:
    """One that has seen nothing yet, and that no fixture asks."""
    return Canary()


def test_there_are_twelve_kinds() -> None:
    assert len(canaries.KINDS) == 12
    odd = "".join(canaries.KINDS.values())
    assert set("@:/,%+{}#?& '\"ü") <= set(odd)


def test_passwords_are_unique_and_of_all_kinds(silent: Canary) -> None:
    passwords = [silent.password(f"cell {n}") for n in range(24)]
    assert len(set(passwords)) == 24
    for odd in canaries.KINDS.values():
        assert sum(odd in password for password in passwords) >= 2


def _in_base64(before: str, password: str) -> bytes:
    return base64.b64encode(f"{before}{password}".encode())


FORMS: dict[str, Callable[[str], object]] = {
    "itself": str,
    "upper case": str.upper,
    "lower case": str.lower,
    "its beginning": lambda password: password[:15],
    "its end": lambda password: password[-15:],
    "quote": lambda password: quote(password, safe=""),
    "quote_plus": quote_plus,
    "repr": repr,
    "ascii": ascii,
    "JSON": json.dumps,
    "HTML": html.escape,
    "bytes": str.encode,
    "hex": lambda password: password.encode().hex(),
    "pickle": pickle.dumps,
    "base64 after one byte": lambda password: _in_base64("x", password),
    "base64 after two": lambda password: _in_base64("xy", password),
    "base64 after three": lambda password: _in_base64("xyz", password),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("kind", canaries.KINDS)
def test_each_form_of_each_kind_is_noticed(
    silent: Canary, form: Callable[[str], object], kind: str
) -> None:
    silent.saw("a file", form(silent.password("cell 1", kind)))
    assert silent.leaks
    with pytest.raises(pytest.fail.Exception, match="a password got out"):
        assert_nothing_leaked(silent)


def test_it_tells_whose_password_got_out_and_where(silent: Canary) -> None:
    password = silent.password("cell 1", "at")
    silent.saw("log: nova", f"it is {password}")
    with pytest.raises(pytest.fail.Exception) as raised:
        assert_nothing_leaked(silent)
    assert "log: nova: password of cell 1 (at)" in str(raised.value)


def test_it_is_silent_where_nothing_leaks(silent: Canary) -> None:
    silent.password("cell 1")
    silent.saw("log: nova", "all is well: rabbit://***@h/vh")
    silent.saw("log: nova", b"\xff\x00")
    silent.saw("log: nova", None)
    silent.saw_object("value", {"a": 1})
    silent.saw_error("raised", ValueError("x"))
    assert silent.leaks == []
    assert silent.seen["log"] > 30
    assert_nothing_leaked(silent)


@pytest.mark.parametrize("name", ["cellmw", "kombu", "nova"])
def test_it_hears_every_logger_at_every_level(
    silent: Canary, name: str
) -> None:
    logger = logging.getLogger(name)
    with silent.listening():
        for level in (1, 5, logging.DEBUG, logging.CRITICAL):
            before = len(silent.leaks)
            logger.log(level, "a %s", silent.password("cell 1"))
            assert len(silent.leaks) > before
    before = len(silent.leaks)
    logger.error("a %s", silent.password("cell 1"))
    assert len(silent.leaks) == before


def test_it_can_look_away(silent: Canary) -> None:
    with silent.listening(), silent.looking_away():
        logging.getLogger("nova").error("a %s", silent.password("cell 1"))
    assert silent.leaks == []
    assert silent.is_looking


def test_levels_are_as_before_when_it_has_listened(silent: Canary) -> None:
    logger = logging.getLogger("nova")
    logger.setLevel(logging.ERROR)
    with silent.listening():
        logger.debug("a %s", silent.password("cell 1"))
    assert logger.level == logging.ERROR
    assert silent.leaks
    logger.setLevel(logging.NOTSET)


def test_it_sees_what_a_handler_would_print_of_a_broken_record(
    silent: Canary,
) -> None:
    with silent.listening():
        handler = logging.root.handlers[-1]
        record = logging.makeLogRecord({"msg": "%d", "args": (_password(),)})
        handler.handle(record)
    assert silent.leaks


def _password() -> str:
    return Canary().password("nobody")


def _fail(password: str) -> None:
    raise ValueError


def test_it_sees_the_variables_of_frames_that_are_not_the_tests_own(
    silent: Canary,
) -> None:
    namespace = {"ValueError": ValueError}
    exec(  # as if it stood in a library
        compile("def fail(password): raise ValueError", "lib.py", "exec"),
        namespace,
    )
    for fail, leaks in ((_fail, False), (namespace["fail"], True)):
        with pytest.raises(ValueError) as raised:
            fail(silent.password("cell 1"))
        silent.saw_error("raised", raised.value)
        assert bool(silent.leaks) is leaks


def test_it_sees_the_whole_chain_of_an_error(silent: Canary) -> None:
    first = ValueError(silent.password("cell 1"))
    first.__cause__ = first
    for error in (
        _with(ValueError(), __cause__=first),
        _with(ValueError(), __context__=first),
        ExceptionGroup("", [KeyError(), first]),
    ):
        silent.leaks.clear()
        silent.saw_error("raised", error)
        assert silent.leaks


def _with(error: Exception, **attributes: object) -> Exception:
    for name, value in attributes.items():
        setattr(error, name, value)
    return error


class _Shows:
    def __init__(self, password: str) -> None:
        self.password = password


def test_it_sees_what_an_object_holds(silent: Canary) -> None:
    silent.saw_object("value", _Shows(silent.password("cell 1")))
    assert any("vars" in leak.where for leak in silent.leaks)


def test_it_reads_files(silent: Canary, tmp_path: Path) -> None:
    path = tmp_path / "api.log"
    path.write_text(silent.password("cell 1", "unicode"), "utf-8")
    silent.saw_files(path)
    assert silent.leaks[0].where == "file: api.log"


def test_it_reads_responses(silent: Canary) -> None:
    silent.saw_response("503", {"Retry-After": "1"}, b"{}")
    assert silent.leaks == []
    silent.saw_response("503", {"X-Cell": silent.password("c")}, b"{}")
    assert silent.leaks[0].where == "HTTP: headers"


@pytest.mark.parametrize("place", canaries.PLACES)
def test_a_place_can_be_switched_off(place: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        before = _state()
        canaries.PLACES[place](patch)
        assert _state() != before
    assert _state() == before


def _state() -> list[object]:
    modules = [
        module
        for name, module in sorted(sys.modules.items())
        if name.startswith("cellmw.redaction")
    ]
    classes = (redaction.Secrets, redaction.Secret)
    holders: list[object] = [*modules, *classes]
    return [dict(vars(holder)) for holder in holders]
