# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Scrub all log records of a process before any handler sees them.

The module puts itself into the process-wide log record factory: unlike a
filter, a factory sees the records of all loggers, whoever configures handlers
and formatters, and when.  It chains to the factory before it.  It looks at the
records of all loggers, not only those of the libraries that this package
calls: a service logs what those libraries raised.

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
    are_plain,
    clean,
    clean_args,
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
    _is_scrubbed.cache_clear()
    KNOWN.on_hold = _ensure
    _ensure()
    _guard(logging.Handler, "handleError", _report)


_scopes: set[tuple[frozenset[str], frozenset[str]]] = set()


@functools.lru_cache(maxsize=4096)
def _is_scrubbed(name: object) -> bool:
    """Say whether any scope covers a logger."""
    parts = f"{name}".split(".")
    names = {".".join(parts[: end + 1]) for end in range(len(parts))}
    return "cellmw" in names or any(
        (not loggers or names & loggers) and not names & left_out
        for loggers, left_out in list(_scopes)
    )


def _ensure() -> None:
    """Put ours back in front of a factory that another library has set."""
    current = logging.getLogRecordFactory()
    if not isinstance(current, _Scrubbing):
        logging.setLogRecordFactory(_Scrubbing(current))
    _guard(
        sys.modules.get("oslo_log.formatters"),
        "_get_error_summary",
        _summarize,
    )


class _Scrubbing:
    """The log record factory, in front of another one."""

    def __init__(self, previous: _Factory) -> None:
        self._previous = previous

    def __call__(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record = self._previous(*args, **kwargs)
        try:
            if not _is_scrubbed(record.name):
                return record
            if not _is_plain_and_clean(record):
                _clean_message(record)
            if record.exc_info:
                _clean_exception(record)
            if record.exc_text or record.stack_info:
                _clean_stack(record)
        except Exception as error:
            _withhold(record, error)
        return record


def _is_plain_and_clean(record: logging.LogRecord) -> bool:
    """Say whether a quick look shows that the message can stay as it is."""
    shown, args = record.msg, record.args
    if type(shown) is not str:
        return False
    if args:
        # What such a format puts together may be more than its parts are.
        if "://" in shown or "s%" in shown:
            return False
        texts = [shown]
        values: Any = args
        if type(args) is dict:
            # A format may show the whole dictionary.
            values = [*args, *args.values()]
        for arg in values:
            if type(arg) is str:
                texts.append(arg)
            elif type(arg) not in NUMBERS:
                return False
        shown = " ".join(texts)
    return is_clean(shown) and (shown.isprintable() or not _is_ours(record))


def _is_ours(record: logging.LogRecord) -> bool:
    # makeLogRecord() fills in the name, and all else, later.
    return f"{record.name}.".startswith("cellmw.")


def _withhold(record: logging.LogRecord, error: Exception) -> None:
    record.msg = "this record is withheld: scrubbing it failed with %s"
    record.args = (type(error).__name__,)
    record.exc_info = record.exc_text = record.stack_info = None


def _scrub_line(text: str) -> str:
    return escape(scrub(text))


def _clean_message(record: logging.LogRecord) -> None:
    tidy = _scrub_line if _is_ours(record) else scrub
    message, args = record.msg, record.args
    if not args or type(message) is not str:
        record.msg = clean(message, tidy)
        record.args = clean_args(args, tidy)
        return
    record.args = clean_args(args, tidy)
    if not are_plain(args):
        if tidy(message) is not message:
            record.msg, record.args = Formatted(message, args, tidy), ()
        return
    try:
        shown = message % args
    except Exception:
        # The handler will say so, and show both.
        record.msg = tidy(message)
        return
    try:
        again = message % record.args
    except Exception:
        again = ""
    if not again or tidy(again) != again:
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
    """Scrub what oslo.log says of an exception that nobody gave to it."""
    return scrub(original(record))


def _report(
    original: Callable[..., None],
    handler: logging.Handler,
    record: logging.LogRecord,
) -> None:
    """Scrub what logging prints of a handler that has failed.

    It prints the exception, and with it the one that was being handled when
    the record was made.
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
        # Raising has put the one that is handled here into its chain.
        shown.__context__ = None
        original(handler, record)
