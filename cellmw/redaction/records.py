# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Scrubs all log records of a process before any handler sees them.

It stands in the process-wide log record factory: unlike a filter it sees the
records of all loggers, whoever configures handlers and formatters and when.
It chains to the factory before it.  All loggers, not only those of the
libraries that we use: a service logs what those raised, and to look at each
record is cheaper than to keep a list of names right.

What the factory cannot see it arranges for: ``extra`` is put on the record
later, so our own loggers get a filter with their first record; oslo.log looks
for an exception that nobody gave to it, so that function is wrapped.

A record that shows no secret stays as it is, but for its exception: that is
always replaced by a copy without local variables.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterable
from typing import Any

from cellmw.redaction import urls
from cellmw.redaction.known import KNOWN
from cellmw.redaction.secret import Secret
from cellmw.redaction.text import describe, escape, is_clean, scrub
from cellmw.redaction.tracebacks import bare_copy, bare_traceback

_Tidy = Callable[[str], str]
_Factory = Callable[..., logging.LogRecord]

# Their texts hold digits, and no more.
_NUMBERS = frozenset({int, float, bool, complex, type(None), Secret})
_DEEPEST = 4
_CONTAINERS = (dict, list, tuple, set)
# What else a formatter opens that writes JSON (oslo.serialization's
# to_primitive), a configuration for example.  Not so here: to go through it
# may take for ever, or ask a database.
_OPENS = ("__iter__", "items", "iteritems", "to_dict")
_CLOSED = (str, bytes, bytearray, type, BaseException)

_made_by_logging = vars(logging.LogRecord("", 0, "", 0, "", (), None)).keys()
_standard = _made_by_logging | {"message", "asctime", "taskName"}


def install() -> None:
    """Scrub all log records of this process from now on.

    Once a process; again is harmless.  Forked children have it too.  Where
    another library later puts a factory in its place that does not chain,
    it is put back at the next hold and at our own next record.
    """
    KNOWN.on_hold = _ensure
    _ensure()


def _ensure() -> None:
    """Put ours back in front of a factory that another library has set."""
    current = logging.getLogRecordFactory()
    if not isinstance(current, _Scrubbing):
        logging.setLogRecordFactory(_Scrubbing(current))


class _Scrubbing:
    """The log record factory, in front of another one."""

    def __init__(self, previous: _Factory) -> None:
        self._previous = previous

    def __call__(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        try:
            record = self._previous(*args, **kwargs)
        except Exception:
            record = logging.LogRecord(*args, **kwargs)
        clean(record)
        return record


def clean(record: logging.LogRecord) -> None:
    """Scrub a record in place.  Never raises."""
    try:
        ours = _is_ours(record.name)
        if ours:
            _watch_extra(record.name)
        if not _is_plain(record, ours):
            _clean_message(record, _scrub_line if ours else scrub)
        _clean_exception(record)
        _clean_stack(record)
    except Exception as error:
        _withhold(record, error)


def _is_plain(record: logging.LogRecord, ours: bool) -> bool:
    """Whether a quick look shows that the message can stay as it is."""
    text, args = record.msg, record.args
    if type(text) is not str:
        return False
    if args:
        if type(args) not in (tuple, dict):
            return False
        try:
            text %= args
        except Exception:
            return False
        for arg in _values(args):
            if type(arg) not in _NUMBERS and (
                type(arg) is not str or arg not in text
            ):
                return False
    return is_clean(text) and (not ours or text.isprintable())


def _withhold(record: logging.LogRecord, error: Exception) -> None:
    record.msg = "this record is withheld: to scrub it failed with %s"
    record.args = (type(error).__name__,)
    record.exc_info = record.exc_text = record.stack_info = None


def _is_ours(name: object) -> bool:
    return isinstance(name, str) and f"{name}.".startswith("cellmw.")


def _scrub_line(text: str) -> str:
    return escape(scrub(text))


def _clean_message(record: logging.LogRecord, tidy: _Tidy) -> None:
    if not record.args:
        record.msg = _clean(record.msg, tidy)
        return
    text = _message(record)
    if text is None:
        # The handler will say so, and show both.
        record.msg = _clean(record.msg, tidy)
        record.args = _clean_args(record.args, tidy)
        if sys.exc_info()[1] is not None:
            # And the exception that is being handled with it.
            record.msg = f"{record.msg!r} with arguments {record.args!r}"
            record.args = ()
        return
    if tidy(text) == text and _is_clean(record, text, tidy):
        return
    record.args = _clean_args(record.args, tidy)
    again = _message(record)
    if again is None or tidy(again) != again or type(record.msg) is not str:
        record.msg = tidy(text)
        record.args = ()


def _message(record: logging.LogRecord) -> str | None:
    try:
        return record.getMessage()
    except Exception:
        return None


def _is_clean(record: logging.LogRecord, text: str, tidy: _Tidy) -> bool:
    """Whether what a formatter finds besides the message is clean too."""
    if type(record.msg) is not str and _clean(record.msg, tidy) is not (
        record.msg
    ):
        return False
    for arg in _values(record.args):
        if type(arg) in _NUMBERS or (type(arg) is str and arg in text):
            continue
        if _clean(arg, tidy) is not arg:
            return False
    return True


def _values(args: object) -> Iterable[object]:
    if isinstance(args, tuple):
        return args
    return args.values() if isinstance(args, dict) else (args,)


def _clean_args(args: Any, tidy: _Tidy) -> Any:
    if type(args) is tuple or isinstance(args, dict):
        return _clean(args, tidy)
    return (_clean(args, tidy),)


def _clean(value: Any, tidy: _Tidy, depth: int = 0) -> Any:
    """The value itself if nothing that is shown of it is secret."""
    kind = type(value)
    if kind in _NUMBERS:
        return value
    if kind is str:
        text = tidy(value)
        return value if text == value else text
    if isinstance(value, tuple) and "password" in getattr(
        value, "_fields", ()
    ):
        return _clean_parsed_url(value, tidy)
    if depth < _DEEPEST:
        found = _clean_container(value, tidy, depth + 1)
        if found is not value or kind in _CONTAINERS:
            return found
    shown, written = _show(str, value), _show(repr, value)
    if shown is None or written is None:
        return f"<{kind.__name__} that cannot be shown>"
    if tidy(shown) != shown or tidy(written) != written:
        return tidy(shown)
    return value


def _clean_container(value: Any, tidy: _Tidy, depth: int) -> Any:
    """A copy without secrets, a text in its place, or the value itself."""
    if isinstance(value, _CONTAINERS):
        copy = _clean_members(value, tidy, depth)
        if type(value) in _CONTAINERS or copy is value:
            return copy
    elif _is_opened(value):
        return _Shown(value, tidy)
    else:
        return value
    return tidy(_show(str, value) or urls.HIDDEN)


class _Shown:
    """Looks like an object, and cannot be opened."""

    __slots__ = ("_as_repr", "_as_str")

    def __init__(self, value: object, tidy: _Tidy) -> None:
        self._as_str = tidy(_show(str, value) or urls.HIDDEN)
        self._as_repr = tidy(_show(repr, value) or urls.HIDDEN)

    def __str__(self) -> str:
        return self._as_str

    def __repr__(self) -> str:
        return self._as_repr


def _is_opened(value: object) -> bool:
    return not isinstance(value, _CLOSED) and any(
        hasattr(type(value), name) for name in _OPENS
    )


def _clean_parsed_url(value: Any, tidy: _Tidy) -> Any:
    """A named tuple as SQLAlchemy's URL: JSON shows all that is in it."""
    password = value.password
    if not isinstance(password, str) or not password:
        return value
    text = tidy(_show(str, value) or urls.HIDDEN)
    return urls.HIDDEN if password in text else text


def _clean_members(value: Any, tidy: _Tidy, depth: int) -> Any:
    if isinstance(value, dict):
        old = [member for item in value.items() for member in item]
    else:
        old = list(value)
    new = [_clean(member, tidy, depth) for member in old]
    if all(a is b for a, b in zip(old, new, strict=True)):
        return value
    if isinstance(value, dict):
        return dict(zip(new[::2], new[1::2], strict=True))
    kinds: tuple[type, ...] = (list, set, tuple)
    return next(k for k in kinds if isinstance(value, k))(new)


def _show(show: Callable[[Any], str], value: object) -> str | None:
    try:
        return show(value)
    except Exception:
        return None


def _clean_exception(record: logging.LogRecord) -> None:
    info = record.exc_info
    if isinstance(info, tuple) and isinstance(info[1], BaseException):
        try:
            copy = bare_copy(info[1])
        except Exception:
            copy = Exception(describe(info[1]))
        traceback = copy.__traceback__
        if info[2] is not info[1].__traceback__:
            traceback = bare_traceback(info[2])
        record.exc_info = (type(copy), copy, traceback)
    elif (
        # makeLogRecord() puts it, and all else, into the record later.
        isinstance(record.levelno, int)
        and record.levelno >= logging.WARNING
        and sys.exc_info()[1] is not None
    ):
        _guard_summary()
    if record.exc_text:
        record.exc_text = scrub(record.exc_text)


def _clean_stack(record: logging.LogRecord) -> None:
    if record.stack_info:
        record.stack_info = scrub(record.stack_info)


def _guard_summary() -> None:
    """Scrub what oslo.log says of an exception that is being handled."""
    formatters = sys.modules.get("oslo_log.formatters")
    original = getattr(formatters, "_get_error_summary", None)
    if original is None or hasattr(original, "_cellmw_guard"):
        return

    @functools.wraps(original)
    def summary(record: logging.LogRecord) -> str:
        return scrub(original(record))

    summary._cellmw_guard = True  # type: ignore[attr-defined]  # a mark
    # What has no such function has returned above.
    formatters._get_error_summary = summary  # type: ignore[union-attr]


class _ExtraFilter(logging.Filter):
    """Scrubs what ``extra`` has put on a record of one of our loggers."""

    def filter(self, record: logging.LogRecord) -> bool:
        try:
            if not isinstance(logging.getLogRecordFactory(), _Scrubbing):
                _ensure()
                clean(record)
            for name in vars(record).keys() - _standard:
                value = vars(record)[name]
                vars(record)[name] = _clean(value, _scrub_line)
        except Exception:
            for name in vars(record).keys() - _standard:
                vars(record)[name] = urls.HIDDEN
        return True


_extra_filter = _ExtraFilter()


def _watch_extra(name: str) -> None:
    logger = logging.Logger.manager.loggerDict.get(name)
    if (
        isinstance(logger, logging.Logger)
        and _extra_filter not in logger.filters
    ):
        # First, for another one may write it somewhere.
        logger.filters.insert(0, _extra_filter)
