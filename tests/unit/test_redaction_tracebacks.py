# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Exceptions are copied without their secrets, and look the same."""

from __future__ import annotations

import errno
import gc
import sys
import traceback
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, Self

import amqp.exceptions
import kombu.exceptions
import pytest
import sqlalchemy.exc
from hypothesis import given
from hypothesis import strategies as st

from cellmw import exceptions
from cellmw.redaction import KNOWN, Secret, tracebacks
from cellmw.redaction.tracebacks import bare_copy

PASSWORD = "hunter-two"


@pytest.fixture(autouse=True)
def _known() -> Iterator[None]:
    with KNOWN.hold(Secret(f"rabbit://u:{PASSWORD}@h/")):
        yield


def _raised(error: BaseException) -> BaseException:
    password = PASSWORD  # a variable that tracebacks with locals show
    try:
        _raise(error, password)
    except BaseException as raised:
        return raised


def _raise(error: BaseException, password: str) -> NoReturn:
    _raise_deep(error, [password])


def _raise_deep(error: BaseException, passwords: list[str]) -> NoReturn:
    raise error


def _text(error: BaseException, *, capture_locals: bool = False) -> str:
    shown = traceback.TracebackException.from_exception(
        error, capture_locals=capture_locals
    )
    return "".join(shown.format())


class _Odd(Exception):
    """Keeps things, and can be made in one way only."""

    def __init__(self, url: str, *, code: int) -> None:
        super().__init__(code)
        self.url = url
        self.code = code

    def __str__(self) -> str:
        return f"{self.url} gave {self.code}"


class _Closed(Exception):
    """Takes nothing that it does not know."""

    __slots__ = ("first",)

    def __new__(cls, first: int) -> Self:
        if not isinstance(first, int):
            raise TypeError
        return super().__new__(cls, first)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(name)


class _NoSubclass(Exception):
    def __init_subclass__(cls) -> None:
        raise TypeError

    def __str__(self) -> str:
        return "no subclass"


class _Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError(PASSWORD)


def _group() -> BaseException:
    return BaseExceptionGroup(
        "several",
        [_raised(ValueError("one")), ExceptionGroup("more", [KeyError("x")])],
    )


def _with_chain() -> BaseException:
    try:
        try:
            _raise(ValueError("first"), PASSWORD)
        except ValueError:
            _raise(OSError(errno.ENOENT, "gone", "file"), PASSWORD)
    except OSError as error:
        try:
            raise RuntimeError("third") from error
        except RuntimeError as third:
            third.add_note("a note")
            third.add_note("another\none")
            return third
    raise AssertionError


def _from_none() -> BaseException:
    try:
        try:
            raise ValueError("hidden")
        except ValueError:
            raise KeyError("shown") from None
    except KeyError as error:
        return error


def _recursion() -> BaseException:
    def recur(count: int) -> None:
        if count:
            recur(count - 1)
        raise ValueError("deep")

    try:
        recur(50)
    except ValueError as error:
        return error
    raise AssertionError


def _syntax() -> BaseException:
    try:
        compile("x = = 1", "file.py", "exec")
    except SyntaxError as error:
        return error
    raise AssertionError


CLEAN: dict[str, Callable[[], BaseException]] = {
    "ValueError": lambda: ValueError("wrong"),
    "no text": lambda: ValueError(),
    "several arguments": lambda: ValueError("a", 1, None, ["x"]),
    "KeyError": lambda: KeyError("key"),
    "OSError": lambda: OSError(errno.ECONNREFUSED, "refused"),
    "OSError with a file": lambda: OSError(
        errno.ENOENT, "gone", "a", None, "b"
    ),
    "plain OSError": lambda: OSError("timed out"),
    "UnicodeDecodeError": lambda: UnicodeDecodeError(
        "utf-8", b"\xff", 0, 1, "invalid"
    ),
    "StopIteration": lambda: StopIteration(3),
    "SystemExit": lambda: SystemExit(2),
    "KeyboardInterrupt": lambda: KeyboardInterrupt(),
    "SyntaxError": _syntax,
    "keeps things": lambda: _Odd("there", code=4),
    "takes nothing": lambda: _Closed(1),
    "has no subclass": lambda: _NoSubclass(1),
    "cannot be shown": lambda: _Unprintable("x"),
    "group": _group,
    "chain": _with_chain,
    "from None": _from_none,
    "recursion": _recursion,
    "amqp": lambda: amqp.exceptions.AccessRefused(
        403, "refused", (10, 40), "Connection.open"
    ),
    "kombu": lambda: kombu.exceptions.OperationalError("away"),
    "SQLAlchemy": lambda: sqlalchemy.exc.OperationalError(
        "SELECT 1", {"a": 1}, Exception("away")
    ),
    "ours": lambda: exceptions.CellUnavailable("away", cell_uuid="c"),
}


@pytest.mark.parametrize("make", CLEAN.values(), ids=CLEAN)
def test_a_copy_of_what_is_clean_prints_the_same(
    make: Callable[[], BaseException],
) -> None:
    error = _raised(make())
    copy = bare_copy(error)
    assert _text(copy) == _text(error)
    assert isinstance(copy, type(error)) or isinstance(error, _NoSubclass)
    assert type(copy).__qualname__ == type(error).__qualname__
    assert type(copy).__module__ == type(error).__module__


@pytest.mark.parametrize("make", CLEAN.values(), ids=CLEAN)
def test_no_frame_of_a_copy_leads_to_a_variable(
    make: Callable[[], BaseException],
) -> None:
    error = _raised(make())
    assert PASSWORD in _text(error, capture_locals=True)
    copy = bare_copy(error)
    assert PASSWORD not in _text(copy, capture_locals=True)
    for one in _all_of(copy):
        for frame, _ in traceback.walk_tb(one.__traceback__):
            assert frame.f_locals == {}
            assert frame.f_back is None
            assert frame.f_globals.keys() <= {"__name__", "__builtins__"}


def _all_of(error: BaseException) -> Iterator[BaseException]:
    yield error
    for other in (error.__cause__, error.__context__):
        if other is not None:
            yield from _all_of(other)
    if isinstance(error, BaseExceptionGroup):
        for member in error.exceptions:
            yield from _all_of(member)


DIRTY: dict[str, Callable[[str], BaseException]] = {
    "ValueError": ValueError,
    "several arguments": lambda secret: ValueError("a", secret, [secret]),
    "KeyError": KeyError,
    "OSError": lambda secret: OSError(errno.ENOENT, secret, secret),
    "UnicodeDecodeError": lambda secret: UnicodeDecodeError(
        "utf-8", secret.encode(), 0, 1, secret
    ),
    "SyntaxError": lambda secret: SyntaxError(
        "bad", (secret, 1, 1, f"x = {secret}")
    ),
    "keeps things": lambda secret: _Odd(secret, code=4),
    "cannot be shown": _Unprintable,
    "group": lambda secret: ExceptionGroup(secret, [ValueError(secret)]),
    "note": lambda secret: _noted(secret),
    "notes that are no notes": lambda secret: _noted_badly(secret),
    "cause": lambda secret: _caused(ValueError(secret)),
    "SQLAlchemy": lambda secret: sqlalchemy.exc.OperationalError(
        f"SELECT {secret}", {"a": secret}, Exception(secret)
    ),
    "amqp": lambda secret: amqp.exceptions.AccessRefused(secret),
    "in a variable": lambda secret: ValueError("clean"),
}


def _noted(note: str) -> BaseException:
    error = ValueError("x")
    error.add_note(note)
    return error


def _noted_badly(note: str) -> BaseException:
    error = ValueError("x")
    error.__notes__ = {note: note}  # type: ignore[assignment]  # on purpose
    return error


def _caused(cause: BaseException) -> BaseException:
    error = ValueError("x")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("make", DIRTY.values(), ids=DIRTY)
def test_a_copy_shows_no_secret_anywhere(
    make: Callable[[str], BaseException],
) -> None:
    copy = bare_copy(_raised(make(PASSWORD)))
    shown = _text(copy, capture_locals=True)
    assert PASSWORD not in shown
    for one in _all_of(copy):
        shown += f"{one!r} {one.args!r} {vars(one)!r}"
        for name in ("filename", "text", "object", "orig", "params"):
            shown += repr(getattr(one, name, ""))
    assert PASSWORD not in shown


@given(st.text(max_size=20), st.text(max_size=20))
def test_texts_of_any_kind_are_copied(text: str, note: str) -> None:
    error = ValueError(text)
    error.add_note(note)
    assert _text(bare_copy(error)) == _text(error)


def test_numbers_and_texts_on_an_error_stay_for_handlers() -> None:
    copy: Any = bare_copy(_Odd(f"at {PASSWORD}", code=4))
    assert (copy.code, copy.url) == (4, "at ***")
    copy = bare_copy(OSError(errno.ENOENT, "gone"))
    assert copy.errno == errno.ENOENT
    assert copy.args == (errno.ENOENT, "gone")


def test_objects_on_an_error_do_not_stay() -> None:
    error: Any = ValueError("x")
    error.connection = [PASSWORD]
    error.password_of = types.SimpleNamespace(password=PASSWORD)
    assert vars(bare_copy(error)) == {}


def test_what_an_error_holds_is_not_kept_alive_by_its_copy() -> None:
    class Thing:
        pass

    def fail() -> NoReturn:
        thing = Thing()
        things.append(weakref.ref(thing))
        raise ValueError(thing)

    things: list[weakref.ref[Thing]] = []
    try:
        fail()
    except ValueError as error:
        copy = bare_copy(error)
    gc.collect()
    assert things[0]() is None
    assert "Thing" in str(copy)


def test_a_chain_in_a_circle_is_copied() -> None:
    first, second = ValueError("1"), ValueError("2")
    first.__cause__, second.__cause__ = second, first
    copy = bare_copy(first)
    assert copy.__cause__ is not None
    assert copy.__cause__.__cause__ is copy


def test_a_long_chain_is_copied_up_to_a_limit() -> None:
    error = ValueError("0")
    for number in range(1, 5000):
        following = ValueError(str(number))
        following.__context__ = error
        error = following
    copy: BaseException | None = bare_copy(error)
    length = 0
    while copy is not None:
        length += 1
        copy, last = copy.__context__, copy
    assert 100 < length < 1000
    assert str(last) == "(more errors)"


def test_groups_in_groups_are_copied_up_to_a_limit() -> None:
    error: Exception = ValueError("0")
    for number in range(500):
        error = ExceptionGroup(str(number), [error])
    assert isinstance(bare_copy(error), ExceptionGroup)


def test_our_own_errors_are_copied_on_one_line() -> None:
    copy = bare_copy(exceptions.CellUnavailable("a\nb", cell_uuid="c"))
    assert "\n" not in str(copy)
    assert "a\\nb" in str(copy)


def test_code_without_columns_is_copied() -> None:
    def fail() -> NoReturn:
        raise ValueError

    code = fail.__code__
    # One entry for each instruction, of the kind that has a line only.
    lines = bytes([0x80 | 13 << 3, 0]) * (len(code.co_code) // 2)
    plain = types.FunctionType(code.replace(co_linetable=lines), globals())
    with pytest.raises(ValueError) as raised:
        plain()
    assert "^" not in _text(raised.value).splitlines()[-2]
    assert _text(bare_copy(raised.value)) == _text(raised.value)


def test_an_endless_traceback_is_cut() -> None:
    def recur(count: int) -> None:
        if count:
            recur(count - 1)
        raise ValueError("deep")

    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10_000)
    try:
        recur(5_000)
    except ValueError as error:
        copy = bare_copy(error)
    finally:
        sys.setrecursionlimit(limit)
    frames = list(traceback.walk_tb(copy.__traceback__))
    assert len(frames) == tracebacks._MOST_FRAMES
