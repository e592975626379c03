# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Scrub all log records of a process before any handler sees them.

The module sets a log record factory in front of the one that is there.
Unlike a filter, a factory sees the records of all loggers, however and
whenever handlers and formatters are configured.  It scrubs the records of all
loggers, because a service also logs what libraries raised.

A record that shows no secret stays as it is, and so does its exception.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterable
from typing import Any

from cellmw.redaction import exposure
from cellmw.redaction.arguments import (
    NUMBERS,
    Formatted,
    Tidy,
    are_plain,
    clean,
    clean_args,
    is_harmless,
    values_of,
)
from cellmw.redaction.copies import safe_copy
from cellmw.redaction.known import KNOWN
from cellmw.redaction.text import escape, is_clean, scrub
from cellmw.redaction.tracebacks import bare_traceback

_Factory = Callable[..., logging.LogRecord]


def install(loggers: Iterable[str] = (), left_out: Iterable[str] = ()) -> None:
    """Scrub the log records of this process from now on.

    A second call adds its loggers to those of the first, and a forked child
    scrubs as its parent does.  The loggers of this package are scrubbed in any
    case.  Where another library later sets a factory that does not chain, the
    next :meth:`~cellmw.redaction.Secrets.hold` puts this one back in front of
    it.

    :param loggers: their names, each with all loggers below it; none: all
    :param left_out: loggers that are not scrubbed, with all below them
    """
    _scopes.add((frozenset(loggers), frozenset(left_out)))
    _scope_of.cache_clear()
    KNOWN.on_hold = _ensure
    _ensure()
    _guard(logging.Handler, "handleError", _report)


_scopes: set[tuple[frozenset[str], frozenset[str]]] = set()
# What a logger's records are: left alone, scrubbed, or scrubbed and kept on
# one line.
_ALONE, _SCRUBBED, _OURS = range(3)


@functools.lru_cache(maxsize=4096)
def _scope_of(name: object) -> int:
    """Say how the records of a logger are treated."""
    parts = f"{name}".split(".")
    names = {".".join(parts[: end + 1]) for end in range(len(parts))}
    if "cellmw" in names:
        return _OURS
    is_scrubbed = any(
        (not loggers or names & loggers) and not names & left_out
        for loggers, left_out in list(_scopes)
    )
    return _SCRUBBED if is_scrubbed else _ALONE


def _ensure() -> None:
    """Put ours back in front of a factory that another library has set."""
    current = logging.getLogRecordFactory()
    # One that wraps ours may have the attribute of ours.
    if getattr(current, "_cellmw_factory", None) is not current:
        logging.setLogRecordFactory(_in_front_of(current))
    _guard(
        sys.modules.get("oslo_log.formatters"),
        "_get_error_summary",
        _summarize,
    )


def _in_front_of(previous: _Factory) -> _Factory:
    """Return a log record factory that scrubs what another one makes."""

    def scrubbing(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = previous(*args, **kwargs)
        try:
            scope = _scope_of(record.name)
            if scope == _ALONE:
                return record
            shown = _plain_text_of(record, scope)
            if (
                shown is None
                or not is_clean(shown)
                or (scope == _OURS and not shown.isprintable())
            ):
                _clean_message(record, scope)
            if record.exc_info:
                _clean_exception(record)
            if record.exc_text or record.stack_info:
                _clean_stack(record)
        except Exception as error:
            _withhold(record, error)
        return record

    scrubbing._cellmw_factory = scrubbing  # type: ignore[attr-defined]  # a mark
    return scrubbing


def _withhold(record: logging.LogRecord, error: Exception) -> None:
    record.msg = "this record is withheld: scrubbing it failed with %s"
    record.args = (type(error).__name__,)
    record.exc_info = record.exc_text = record.stack_info = None


def _scrub_line(text: str) -> str:
    return escape(scrub(text))


def _plain_text_of(record: logging.LogRecord, scope: int) -> str | None:
    """Return all that is shown of a message that needs no close look.

    None where the format was not looked at yet or may put a secret together,
    and where the code of an object makes a text.
    """
    message, args = record.msg, record.args
    if type(message) is not str:
        return None
    value: Any
    if not args:
        return message
    if _formats[scope].get(message) != KNOWN.version:
        return None
    texts = []
    for value in args if type(args) is tuple else values_of(args):
        kind: Any = type(value)
        if kind is str:
            texts.append(value)
        elif kind not in NUMBERS and not is_harmless(kind):
            return None
    return " ".join(texts)


def _clean_message(record: logging.LogRecord, scope: int) -> None:
    tidy = _scrub_line if scope == _OURS else scrub
    message, args = record.msg, record.args
    if not args or type(message) is not str:
        record.msg = clean(message, tidy)
        if args:
            record.args = clean_args(args, tidy)
        return
    record.args = clean_args(args, tidy)
    if _formats[scope].get(message) != KNOWN.version:
        _clean_format(record, args, scope, tidy)


# By scope: formats that show nothing and put nothing together, each with the
# version of the known values that it was searched for.
_formats: tuple[dict[str, int], ...] = ({}, {}, {})
_MOST_FORMATS = 2000


def _clean_format(
    record: logging.LogRecord, args: Any, scope: int, tidy: Tidy
) -> None:
    """Scrub the text that a format puts together, if that may be needed."""
    message, version = record.msg, KNOWN.version
    is_clean = tidy(message) == message
    # What such a format puts together may be more than its parts are.
    if is_clean and "://" not in message and "s%" not in message:
        if len(_formats[scope]) >= _MOST_FORMATS:
            _formats[scope].clear()
        _formats[scope][message] = version
        return
    if not are_plain(args):
        record.msg, record.args = Formatted(message, args, tidy), ()
        return
    try:
        shown = message % args
    except Exception:
        # The handler reports the error, and shows message and arguments.
        record.msg = tidy(message)
        return
    if tidy(shown) != shown:
        record.msg, record.args = tidy(shown), ()


def _clean_exception(record: logging.LogRecord) -> None:
    info = record.exc_info
    if not isinstance(info, tuple) or not isinstance(info[1], BaseException):
        return
    if exposure.is_clean(info[1], info[2]):
        return
    copy = safe_copy(info[1])
    traceback = copy.__traceback__
    if info[2] is not info[1].__traceback__:
        traceback = bare_traceback(info[2])
    record.exc_info = (type(copy), copy, traceback)


def _clean_stack(record: logging.LogRecord) -> None:
    record.exc_text = record.exc_text and scrub(record.exc_text)
    record.stack_info = record.stack_info and scrub(record.stack_info)


def _guard(owner: Any, name: str, replace: Callable[..., Any]) -> None:
    """Put a function of ours in front of another one, once."""
    original = getattr(owner, name, None)
    if original is not None and not hasattr(original, "_cellmw_guard"):

        @functools.wraps(original)
        def guarded(*args: Any) -> Any:
            return replace(original, *args)

        guarded._cellmw_guard = True  # type: ignore[attr-defined]  # a mark
        setattr(owner, name, guarded)


def _summarize(
    original: Callable[[logging.LogRecord], str], record: logging.LogRecord
) -> str:
    """Scrub oslo.log's summary of the exception that is being handled."""
    return scrub(original(record))


def _report(
    original: Callable[..., None],
    handler: logging.Handler,
    record: logging.LogRecord,
) -> None:
    """Scrub what logging prints when a handler fails.

    It prints the handler's exception and the one that was handled when the
    record was made.
    """
    error = sys.exc_info()[1]
    copy = None if error is None else safe_copy(error)
    if copy is error or copy is None:
        original(handler, record)
        return
    del error
    try:
        raise copy from None
    except BaseException as shown:
        # Raising has put the unscrubbed exception into its chain.
        shown.__context__ = None
        original(handler, record)
