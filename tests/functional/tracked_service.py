# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""A small service with an error tracker, started as a process by tests.

``python -m tests.functional.tracked_service``: standard input gives, as JSON,
a transport URL at which nobody answers, and the source of ``before_send``,
which may be empty.  The service sends a message through its default transport,
and then loads a filter that cannot work.  It prints the events that its error
tracker would have sent away, one a line, and what structlog wrote.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import oslo_messaging
import sentry_sdk
import structlog
from oslo_config import cfg
from sentry_sdk.envelope import Envelope
from sentry_sdk.transport import Transport

import cellmw
from cellmw import rpc

LOG = logging.getLogger("nova.api")
# What the service's own functions know would stand in its own frames.
CONF = cfg.ConfigOpts()
GIVEN: dict[str, str] = {}


class _Printed(Transport):
    def capture_envelope(self, envelope: Envelope) -> None:
        shown = json.dumps({"event": envelope.get_event()}, default=repr)
        sys.stdout.write(f"{shown}\n")


def _write_live_exception(
    logger: object, name: str, event: Any
) -> dict[str, Any]:
    """Format what is being handled, as renderers of structlog do."""
    if sys.exc_info()[1] is not None:
        event["exception"] = structlog.processors.ExceptionRenderer(
            structlog.tracebacks.ExceptionDictTransformer(show_locals=True)
        )(None, "", {"exc_info": True})
    return dict(event)


def _set_up_logging() -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[
                _write_live_exception,
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(default=repr),
            ]
        )
    )
    LOG.addHandler(handler)


def _connect(url: str) -> None:
    """Log while it runs, as a driver does, and knows a connection string."""
    LOG.error("Connecting failed")


def _send() -> None:
    rpc.init(CONF)
    _connect(GIVEN["url"])
    client = rpc.get_client(oslo_messaging.Target(topic="t", server="s"))
    try:
        client.cast({}, "reboot")
    except Exception:
        LOG.warning("Casting failed")
        LOG.exception("Casting failed")
        sentry_sdk.capture_exception()
    rpc.cleanup()


def _load() -> None:
    try:
        cellmw.filter_factory(
            {},
            oslo_config_config=CONF,
            api_database_connection=f"no{GIVEN['url']}",
        )
    except Exception:
        LOG.exception("Loading failed")
        sentry_sdk.capture_exception()


def main() -> None:
    GIVEN.update(json.load(sys.stdin))
    names: dict[str, Any] = {}
    exec(GIVEN["before_send"], names)
    before_send = names.get("before_send")
    sentry_sdk.init(
        "http://key@127.0.0.1/1",
        transport=_Printed,
        attach_stacktrace=before_send is not None,
        before_send=before_send,
        max_value_length=100_000,
    )
    _set_up_logging()
    CONF([], project="nova", default_config_files=[])
    oslo_messaging.TransportURL(CONF)
    CONF.set_override("transport_url", GIVEN["url"])
    _send()
    _load()


if __name__ == "__main__":
    main()
