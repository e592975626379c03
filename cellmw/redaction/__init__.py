# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Redaction of credentials in logs, errors and other texts.

``Secret`` holds a connection string.  ``KNOWN`` has the credentials that this
process knows.  ``scrub`` hides them, and the credentials of anything that
looks like a URL, in any text.  ``install`` scrubs the records of all loggers
before any handler sees them.  Imports only the standard library.
"""

from __future__ import annotations

from cellmw.redaction.copies import made_safe
from cellmw.redaction.known import KNOWN, Hold, Secrets
from cellmw.redaction.records import install
from cellmw.redaction.secret import Secret
from cellmw.redaction.text import describe, one_line, scrub, scrub_data
from cellmw.redaction.tracebacks import strip_frames
from cellmw.redaction.urls import redact_url

__all__ = [
    "KNOWN",
    "Hold",
    "Secret",
    "Secrets",
    "describe",
    "install",
    "made_safe",
    "one_line",
    "redact_url",
    "scrub",
    "scrub_data",
    "strip_frames",
]
