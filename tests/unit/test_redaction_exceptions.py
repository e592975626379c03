# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Exceptions are copied without their secrets, and look the same."""

from __future__ import annotations

import errno
import logging
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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cellmw import exceptions
from cellmw.redaction import KNOWN, Secret, exposure, records
from cellmw.redaction.copies import bare_copy
from tests import odd_urls

PASSWORD = "hunter-two"
_FACTORY = records._in_front_of(logging.LogRecord)  # what install() puts in


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(records, "_scopes", {(frozenset(), frozenset())})
    records._scope_of.cache_clear()
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
    assert _without_marks(_text(copy)) == _without_marks(_text(error))
    assert isinstance(copy, type(error)) or isinstance(error, _NoSubclass)
    assert type(copy).__qualname__ == type(error).__qualname__
    assert type(copy).__module__ == type(error).__module__


def _without_marks(text: str) -> str:
    """Take out what points to a place in the line above."""
    lines = text.splitlines(keepends=True)
    return "".join(line for line in lines if set(line) - set(" ^~|\n"))


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


def test_objects_stay_unless_they_show_a_secret() -> None:
    error: Any = ValueError(PASSWORD)
    error.connection = [PASSWORD]
    error.shows = types.SimpleNamespace(password=PASSWORD)
    error.response = types.SimpleNamespace(status_code=404)
    copy: Any = bare_copy(error)
    assert copy.response is error.response
    assert copy.connection == copy.shows == "***"


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


class _Slotted(Exception):
    __slots__ = ("kept",)


class _Reduces(Exception):
    def __reduce__(self) -> NoReturn:
        raise AssertionError("nobody copies or pickles it")


class _Raising:
    """A descriptor that nobody may ask."""

    def __get__(self, owner: object, kind: object = None) -> NoReturn:
        raise AssertionError("nobody may ask this")

    def __set__(self, owner: object, value: object) -> NoReturn:
        raise AssertionError("nobody may set this")


class _Described(Exception):
    response = _Raising()
    kept = _Raising()


_REGISTRY: list[type] = []


class _Registers(Exception):
    def __init_subclass__(cls) -> None:
        _REGISTRY.append(cls)

    def __str__(self) -> str:
        return f"registered: {self.args[0]}"


class _Registered(_Registers):
    pass


class _Response:
    """What a client keeps on its errors."""

    status_code = 404

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return f"<Response {self.text}>"


_KINDS: tuple[type[Exception], ...] = (
    *(Exception, ValueError, KeyError, OSError, _Slotted, _Reduces),
    *(_Described, _Registered, _Unprintable),
)
_secret_or_not = st.sampled_from([PASSWORD, "nothing", f"a {PASSWORD} b"])
_WRAPS: tuple[Callable[[str], object], ...] = (
    *(str, str.encode, _Response, ValueError),
    *(lambda s: [s], lambda s: {"a": (s,)}, lambda s: {s}, lambda s: len(s)),
)


@st.composite
def _errors(draw: st.DrawFn, depth: int = 0) -> Exception:
    texts = st.builds(
        lambda wrap, text: wrap(text), st.sampled_from(_WRAPS), _secret_or_not
    )
    kind = draw(st.sampled_from(_KINDS))
    # An OSError of two arguments or more makes something of them.
    error = kind(*draw(st.lists(texts, min_size=1, max_size=1)))
    for name in draw(st.lists(st.sampled_from(["a", "b"]), max_size=2)):
        error.__dict__[name] = draw(texts)
    if kind is _Slotted:
        error.kept = draw(texts)  # type: ignore[attr-defined]  # a slot
    if draw(st.booleans()):
        error.add_note(draw(_secret_or_not))
    if depth < 2:
        inner = _errors(depth + 1)
        if draw(st.booleans()):
            error.__cause__ = draw(inner)
        if draw(st.booleans()):
            error.__context__ = draw(inner)
        if draw(st.booleans()):
            error = ExceptionGroup(draw(_secret_or_not), [error, draw(inner)])
    return error


def _logged(error: BaseException) -> logging.LogRecord:
    info = (type(error), error, error.__traceback__)
    return _FACTORY("nova", 40, "f", 1, "failed", (), info)


def _everything(error: BaseException) -> str:
    """All that any handler could show of an exception."""
    shown = _text(error, capture_locals=True)
    for one in _all_of(error):
        shown += f"{one.args!r} {vars(one)!r}"
        if isinstance(one, _Slotted):
            shown += repr(one.kept)  # type: ignore[attr-defined]  # a slot
    return shown


@settings(
    max_examples=max(60, odd_urls.COUNT // 10),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(_errors(), st.booleans())
def test_an_exception_is_the_same_if_it_is_clean_and_shows_nothing_if_not(
    error: Exception, has_variable: bool
) -> None:
    registered = len(_REGISTRY)
    _raised_with(error, PASSWORD if has_variable else "nothing")
    before = _everything(error)
    record = _logged(error)
    assert record.exc_info is not None
    shown = record.exc_info[1]
    assert shown is not None
    if PASSWORD in before:
        assert PASSWORD not in _everything(shown)
        assert type(shown).__name__ == type(error).__name__ or (
            type(shown) is Exception
        )
    else:
        assert shown is error
        assert record.exc_info[2] is error.__traceback__
    assert _everything(error) == before
    assert len(_REGISTRY) == registered


def _raised_with(error: Exception, password: str) -> None:
    variable = [password]
    try:
        raise error
    except Exception:
        del password
        assert variable


def test_a_filter_finds_what_an_error_keeps() -> None:
    # As requests.HTTPError does.
    error: Any = OSError("404 for http://h/")
    error.response = _Response("clean")

    class Filter(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            shown: Any = record.exc_info and record.exc_info[1]
            return bool(shown.response.status_code != 404)

    assert not Filter().filter(_logged(error))
    # And what is clean on one that is not.
    error.request = f"http://u:{PASSWORD}@h/"
    record = _logged(error)
    assert not Filter().filter(record)
    assert record.exc_info is not None
    shown: Any = record.exc_info[1]
    assert shown.response is error.response
    assert shown.request == "http://***@h/"


def test_a_base_that_registers_its_classes_gets_none_of_ours() -> None:
    before = len(_REGISTRY)
    copy = bare_copy(_Registered(PASSWORD))
    assert str(copy) == "registered: ***"
    assert type(copy).__name__ == "_Registered"
    assert len(_REGISTRY) == before


def test_what_a_frame_lets_go_is_not_kept_alive() -> None:
    class Thing:
        pass

    thing: Thing | None = Thing()
    gone = weakref.ref(thing)
    try:
        raise ValueError("clean")
    except ValueError as error:
        record = _logged(error)
    assert record.exc_info is not None
    thing = None
    assert gone() is None


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
    assert len(frames) == exposure.MOST_FRAMES


def test_a_function_keeps_what_it_has_of_its_own_variables() -> None:
    kept = "a value"
    variables = locals()
    with pytest.raises(ValueError) as raised:
        raise ValueError(kept)
    assert exposure.is_clean(raised.value)
    assert variables["kept"] is kept


class _Grows:
    """Changes a set while somebody looks at it."""

    def __init__(self) -> None:
        self.members: set[Any] = {self}

    def __repr__(self) -> str:
        self.members.add(object())
        return "grows"


def test_a_container_that_changes_meanwhile_fails_no_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_Grows, "__module__", "kombu.entity")
    error = ValueError(_Grows().members)
    records.install()
    logging.getLogger("nova").error("failed", exc_info=error)
    assert caplog.records[-1].getMessage() == "failed"
    assert caplog.records[-1].exc_info


def test_what_was_seen_deep_is_seen_again_where_it_is_shallow() -> None:
    inner = [[["a secret of the cell: " + _PASSWORD]]]
    error = ValueError("failed")
    error.first, error.second = [[inner]], inner  # type: ignore[attr-defined]  # any error takes them
    with KNOWN.hold(Secret(f"rabbit://u:{_PASSWORD}@h/")):
        assert not exposure.is_clean(error)


_PASSWORD = "correct-horse-battery"
