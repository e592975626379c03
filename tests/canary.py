# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Canaries: passwords that sing wherever they get out.

Each password is unique, has an odd character or two in its middle, and a
mark at both ends that no encoding changes but base64, whose forms of it are
known.  So whatever left the process is searched for the mark alone, and a
piece of a password is found as well as all of it.

A :class:`Canary` makes the passwords and takes in what left: everything that
reached a log handler, at all levels, as several formatters write it and with
the local variables of tracebacks; what was printed; what HTTP clients got;
what commands said; how objects and errors show themselves in all ways that
Python has.  :func:`assert_nothing_leaked` tells what of it held a password.

The fixture :func:`canary` is one for a single test.  For a run of whole
suites see :mod:`tests.canary_plugin`.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import copy
import dataclasses
import itertools
import json
import logging
import pickle
import re
import secrets
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from oslo_log import formatters

from cellmw import redaction
from cellmw.redaction import copies, exposure, records, urls

#: What is odd in the passwords of each kind.
KINDS = {
    "at": "@",
    "colon": ":",
    "slash": "/",
    "comma": ",",
    "percent": "%",
    "plus": "+",
    "braces": "{}",
    "hash and question": "#?",
    "ampersand": "&",
    "space": " ",
    "unicode": "ü€\U0001f600",
    "quotes": "'\"",
}

_MARK = "zqXj7W"
_TESTS = str(Path(__file__).parent)


def _forms_of_the_mark() -> list[str]:
    forms = [_MARK.lower(), _MARK.encode().hex()]
    for offset, start in ((0, 0), (1, 2), (2, 3)):
        coded = base64.b64encode(b"\0" * offset + _MARK.encode()).decode()
        # In lower case, as the texts that are searched.
        forms.append(coded[start : (len(_MARK) + offset) * 8 // 6].lower())
    return forms


_FORMS = _forms_of_the_mark()
_any_form = re.compile("|".join(map(re.escape, _FORMS)))
_number = re.compile(
    rf"{_MARK}([0-9a-f]{{8}})|([0-9a-f]{{8}}){_MARK}", re.IGNORECASE
)


@dataclasses.dataclass(frozen=True, slots=True)
class Password:
    """A password, and whose it is."""

    value: str
    kind: str
    whose: str


@dataclasses.dataclass(frozen=True, slots=True)
class Leak:
    """A piece of a password in something that left."""

    where: str
    around: str
    password: Password | None

    def __str__(self) -> str:
        whose = "unknown"
        if self.password is not None:
            whose = f"{self.password.whose} ({self.password.kind})"
        return f"{self.where}: password of {whose}: ...{self.around}..."


class Canary:
    """Passwords, and what was seen of them.  Thread-safe.

    :ivar leaks: what held a piece of one
    :ivar seen: characters that were looked at, by where they were seen
    :ivar is_looking: whether it takes notice of what is logged
    """

    def __init__(self) -> None:
        self.leaks: list[Leak] = []
        self.seen: collections.Counter[str] = collections.Counter()
        self._passwords: dict[str, Password] = {}
        self._kinds = itertools.cycle(KINDS)
        self.is_looking = True

    def password(self, whose: str, kind: str | None = None) -> str:
        """A new password, of the next kind if none is given."""
        kind = kind or next(self._kinds)
        number = secrets.token_hex(4)
        value = f"{_MARK}{number}{KINDS[kind]}{number}{_MARK}"
        self._passwords[number] = Password(value, kind, whose)
        return value

    def saw(self, where: str, what: object) -> None:
        """Look at something that left."""
        if isinstance(what, (bytes, bytearray)):
            what = bytes(what).decode("utf-8", "replace")
        shown = str(what)
        self.seen[where.partition(":")[0]] += len(shown)
        lower = shown.lower()
        if not any(form in lower for form in _FORMS):
            return
        for found in _any_form.finditer(lower):
            around = shown[max(0, found.start() - 60) : found.end() + 60]
            self.leaks.append(Leak(where, around, self._whose(around)))

    def saw_files(self, *paths: Path) -> None:
        """Look at files that were written."""
        for path in paths:
            self.saw(f"file: {path.name}", path.read_bytes())

    def saw_response(self, status: str, headers: object, body: object) -> None:
        """Look at what an HTTP client got."""
        for part, value in (
            ("status", status),
            ("headers", headers),
            ("body", body),
        ):
            self.saw(f"HTTP: {part}", value)

    def saw_object(self, where: str, thing: object) -> None:
        """Look at all that Python shows of an object, one way or another."""
        for name, show in _WAYS_TO_SHOW.items():
            try:
                shown = show(thing)
            except Exception as error:
                # Refusing is fine; what it says must be fine too.
                shown = repr(error)
            self.saw(f"{where}: {name} of {type(thing).__name__}", shown)

    def saw_error(self, where: str, error: BaseException) -> None:
        """Look at an exception, its chain, and the variables of its frames.

        Those of the tests' own frames are none of our business.
        """
        for one in _all_of(error):
            self.saw_object(where, one)
            self.saw(where, f"{one.args!r} {getattr(one, '__notes__', '')!r}")
            shown = traceback.TracebackException.from_exception(
                one, capture_locals=True
            )
            self.saw(where, "".join(shown.format_exception_only()))
            for frame in shown.stack:
                if not frame.filename.startswith(_TESTS):
                    self.saw(
                        f"{where}: variables of {frame.name} in "
                        f"{frame.filename}:{frame.lineno}",
                        frame.locals,
                    )

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Look at all that is logged, by whatever logger at any level."""
        handler = _Handler(self)
        logging.root.addHandler(handler)
        levels = listen_to_all()
        try:
            yield
        finally:
            for logger, level in levels.items():
                logger.setLevel(level)
            logging.root.removeHandler(handler)

    @contextlib.contextmanager
    def looking_away(self) -> Iterator[None]:
        """Take no notice of what is logged: it is the tests' own."""
        self.is_looking = False
        try:
            yield
        finally:
            self.is_looking = True

    def _whose(self, around: str) -> Password | None:
        found = _number.search(around)
        if found is None:
            return None
        number = (found.group(1) or found.group(2)).lower()
        return self._passwords.get(number)


def assert_nothing_leaked(canary: Canary) -> None:
    """Fail with what held a piece of a password, and where."""
    if canary.leaks:
        shown = "\n".join(f"  {leak}" for leak in canary.leaks[:20])
        pytest.fail(
            f"{len(canary.leaks)} times a password got out:\n{shown}",
            pytrace=False,
        )


def listen_to_all() -> dict[logging.Logger, int]:
    """Let all loggers log at all levels; gives the levels before.

    Some have a level of their own, as SQLAlchemy's, or get one from a test.
    """
    known = logging.Logger.manager.loggerDict.values()
    loggers = [one for one in known if isinstance(one, logging.Logger)]
    levels = {
        logger: logger.level
        for logger in (logging.root, *loggers)
        if logger.level > 1 or logger is logging.root
    }
    for logger in levels:
        logger.setLevel(1)
    return levels


def _all_of(error: BaseException) -> Iterator[BaseException]:
    waiting, done = [error], set()
    while waiting:
        one = waiting.pop()
        if id(one) in done:
            continue
        done.add(id(one))
        yield one
        waiting += [e for e in (one.__cause__, one.__context__) if e]
        if isinstance(one, BaseExceptionGroup):
            waiting += one.exceptions


def _of_method(name: str) -> Callable[[Any], str]:
    def show(thing: Any) -> str:
        return repr(getattr(thing, name)())

    return show


_WAYS_TO_SHOW: dict[str, Callable[[Any], object]] = {
    "repr": repr,
    "str": str,
    "format": format,
    "vars": lambda thing: repr(vars(thing)),
    "asdict": lambda thing: repr(dataclasses.asdict(thing)),
    "pickle": pickle.dumps,
    "copy": lambda thing: repr(copy.copy(thing)),
    "deepcopy": lambda thing: repr(copy.deepcopy(thing)),
    "JSON": lambda thing: json.dumps(thing, default=repr),
    **{
        # oslo.context's.
        name: _of_method(name)
        for name in (
            "to_dict",
            "get_logging_values",
            "redacted_copy",
            "to_policy_values",
        )
    },
}


class _WithVariables(logging.Formatter):
    # The base class calls it so.
    def formatException(self, ei: Any) -> str:  # noqa: N802
        shown = traceback.TracebackException(*ei, capture_locals=True)
        return "".join(shown.format())


class _Handler(logging.Handler):
    """Writes each record in several ways, as services configure it."""

    def __init__(self, canary: Canary) -> None:
        super().__init__(1)
        self._canary = canary
        self._formatters = (
            logging.Formatter("%(asctime)s %(name)s %(message)s"),
            _WithVariables(),
            formatters.JSONFormatter(),
            formatters.FluentFormatter(),
        )

    def emit(self, record: logging.LogRecord) -> None:
        if not self._canary.is_looking:
            return
        where = f"log: {record.name}: {record.pathname}:{record.lineno}"
        for formatter in self._formatters:
            # As in a file: one formatter's result is not the next one's.
            fresh = copy.copy(record)
            if fresh.exc_info:
                fresh.exc_text = None
            try:
                shown = formatter.format(fresh)
            except Exception as error:
                # A handler prints this to standard error.
                shown = f"{record.msg!r} {record.args!r} {error!r}"
            self._canary.saw(where, shown)
        if f"{record.name}.".startswith("cellmw."):
            self._canary.saw(where, vars(record))


#: Where scrubbing can be switched off, and what that takes.  A canary must
#: sing at each.
PLACES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "values": lambda patch: _know_nothing(patch),
    "URLs": lambda patch: patch.setattr(urls, "spans", lambda text: []),
    "messages": lambda patch: patch.setattr(
        records, "_plain_text_of", lambda record, scope: ""
    ),
    "arguments": lambda patch: patch.setattr(
        records, "clean_args", lambda args, tidy: args
    ),
    "exceptions": lambda patch: patch.setattr(
        records, "_clean_exception", lambda record: None
    ),
    "summaries": lambda patch: _leave_summaries(patch),
    "variables": lambda patch: _leave_variables(patch),
    "stacks": lambda patch: patch.setattr(
        records, "_clean_stack", lambda record: None
    ),
    "causes": lambda patch: patch.setattr(
        redaction, "describe", lambda error: f"{error}"
    ),
    "shown URLs": lambda patch: patch.setattr(
        redaction, "redact_url", lambda url: url
    ),
    "secrets": lambda patch: patch.setattr(
        redaction.Secret, "__repr__", lambda self: self.reveal()
    ),
    "pickles": lambda patch: _let_secrets_be_pickled(patch),
}


def _know_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(redaction.Secrets, "spans", lambda self, text: [])
    patch.setattr(redaction.Secrets, "may_show", lambda self, text: False)


def _leave_variables(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(exposure, "add_variables_of", lambda traceback, values: None)
    patch.setattr(copies, "bare_traceback", lambda traceback: traceback)


def _leave_summaries(patch: pytest.MonkeyPatch) -> None:
    guarded = formatters._get_error_summary
    original = getattr(guarded, "__wrapped__", guarded)
    patch.setattr(formatters, "_get_error_summary", original)
    patch.setattr(records, "_guard", lambda *args: None)


def _let_secrets_be_pickled(patch: pytest.MonkeyPatch) -> None:
    def reduce(secret: redaction.Secret, protocol: object) -> Any:
        return redaction.Secret, (secret.reveal(),)

    patch.setattr(redaction.Secret, "__reduce_ex__", reduce)


@pytest.fixture
def canary(capfd: pytest.CaptureFixture[str]) -> Iterator[Canary]:
    """A canary that listens to all logs and to what is printed.

    The test fails at its end if anything leaked.
    """
    made = Canary()
    with made.listening():
        yield made
    _saw_output(made, capfd.readouterr())
    assert_nothing_leaked(made)


def _saw_output(canary: Canary, output: Iterable[str]) -> None:
    for name, shown in zip(("stdout", "stderr"), output, strict=True):
        canary.saw(f"printed: {name}", shown)
