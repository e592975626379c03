# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Nothing secret leaves.

``Secret`` carries a connection string.  ``KNOWN`` holds the credentials that
this process knows, and ``scrub`` hides them, and those in whatever looks like
a URL, in any text.  ``install`` puts that between all loggers of the process
and their handlers.  Imports nothing but the standard library.
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
