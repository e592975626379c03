# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Metrics for Prometheus, and the page that shows them.

Needs the extra ``cellmw[metrics]``; nothing else of this package imports it.

Nothing is measured here.  The parts count what they do anyway; now and then,
and when the page is asked for, what they have counted since is added to
prometheus_client's metrics.  So a message costs nothing for it, and with
``PROMETHEUS_MULTIPROC_DIR``, which prometheus_client wants to be set before
it is imported, a page of one process of a preforking server shows the
numbers of all.
"""

from __future__ import annotations

from cellmw.metrics.page import app_factory, install

__all__ = ["app_factory", "install"]
