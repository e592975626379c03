# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Mistakes in the service's pipeline that only a request can show.

What concerns the order of filters is logged once in a process, whichever of
ours finds it first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

from oslo_context import context as oslo_context

from cellmw import redaction

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

LOG = logging.getLogger(__name__)

# In how many requests without a context at its key another key is looked
# for.  The pipeline does not change, so the first ones tell.
_LOOKS_FOR_OTHER_KEY = 1000


class Pipeline:
    """What stands around one filter.  Thread-safe.

    :param context_key: where the request context is expected
    :param first: whether the calling thread is the first of the process to
        ask about a mistake
    :ivar watches_order: whether requests with a token are still to be
        looked at
    """

    def __init__(
        self, context_key: str, first: Callable[[Hashable], bool]
    ) -> None:
        self._context_key = context_key
        self._first = first
        self._looks_left = _LOOKS_FOR_OTHER_KEY
        self.watches_order = True

    def check_order(self, environ: WSGIEnvironment) -> None:
        """Warn if a request with a token has not passed authtoken."""
        self.watches_order = False
        if "HTTP_X_IDENTITY_STATUS" not in environ and self._first("order"):
            LOG.warning(
                "A request has X-Auth-Token but no X-Identity-Status, so "
                "authtoken has not seen it yet. If authtoken stands behind "
                "this filter in the pipeline, move this filter behind "
                "authtoken. Until then identities are not checked, and a "
                "request context made here is anonymous."
            )

    def look_for_other_context(self, environ: WSGIEnvironment) -> None:
        """Warn if the context stands under another key than expected."""
        if self._looks_left <= 0:
            return
        self._looks_left -= 1
        for key, value in environ.items():
            if isinstance(value, oslo_context.RequestContext):
                self._looks_left = 0
                if self._first("context_key"):
                    self._warn_of_other_key(redaction.one_line(key))
                return

    def _warn_of_other_key(self, key: str) -> None:
        LOG.warning(
            "Nothing stands in the environ under %r, but a request "
            "context stands under %r. If that is the service's own, "
            "set context_key = %s in the filter's section.",
            self._context_key,
            key,
            key,
        )

    def tell_no_attributes(self, context: object, error: Exception) -> None:
        """Log that a context took no ``mq_connection``."""
        # Once for each filter: their contexts may differ.
        if self._first(("no attributes", self)):
            LOG.error(
                "The request context under context_key = %s is a %s and "
                "takes no attributes (%s), so requests for instances get "
                "500. Point context_key to the service's request context.",
                self._context_key,
                type(context).__qualname__,
                type(error).__qualname__,
            )
