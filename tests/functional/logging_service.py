# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""A small service that logs, started as a process by tests of redaction.

``python -m tests.functional.logging_service SETUP ORDER FOLDER`` sets up
logging in one of several ways, installs scrubbing before or after that, and
then does what makes libraries log secrets.  It reads the passwords from
standard input, as JSON, and writes its logs into the folder.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import traceback
from collections.abc import Callable
from logging import config as logging_config
from logging import handlers
from pathlib import Path
from typing import Any
from urllib.parse import quote

import oslo_messaging
import sqlalchemy as sa
from oslo_config import cfg
from oslo_log import log as oslo_log

from cellmw import exceptions, redaction

LOG = logging.getLogger("nova.api")
OURS = logging.getLogger("cellmw.middleware")
TO_END = "the service has ended"


class _WithVariables(logging.Formatter):
    # The base class calls it so.
    def formatException(self, ei: Any) -> str:  # noqa: N802
        shown = traceback.TracebackException(*ei, capture_locals=True)
        return "".join(shown.format())


def basic(folder: Path) -> None:
    logging.basicConfig(level=1, filename=folder / "basic.log")


def variables(folder: Path) -> None:
    handler = logging.FileHandler(folder / "variables.log")
    handler.setFormatter(_WithVariables("%(name)s %(message)s"))
    logging.root.addHandler(handler)
    logging.root.setLevel(1)


def dictionary(folder: Path) -> None:
    file = {
        "class": "logging.handlers.WatchedFileHandler",
        "filename": str(folder / "dictionary.log"),
        "formatter": "full",
    }
    logging_config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {
                "full": {"format": "%(asctime)s %(name)s %(message)s"}
            },
            "handlers": {"file": file},
            "loggers": {
                "cellmw": {
                    "level": 1,
                    "handlers": ["file"],
                    "propagate": False,
                }
            },
            "root": {"level": 1, "handlers": ["file"]},
        }
    )


def queued(folder: Path) -> None:
    channel: queue.SimpleQueue[Any] = queue.SimpleQueue()
    file = logging.FileHandler(folder / "queued.log")
    logging.root.addHandler(handlers.QueueHandler(channel))
    logging.root.setLevel(1)
    listener = handlers.QueueListener(channel, file)
    listener.start()
    _at_end.append(listener.stop)


def oslo(folder: Path) -> None:
    _oslo(folder, "oslo.log", use_json=False)


def oslo_json(folder: Path) -> None:
    _oslo(folder, "oslo.json.log", use_json=True)


def _oslo(folder: Path, name: str, **options: Any) -> None:
    conf = cfg.ConfigOpts()
    oslo_log.register_options(conf)
    conf([], project="nova", default_config_files=[])
    conf.set_override("debug", True)
    conf.set_override("log_file", str(folder / name))
    conf.set_override("default_log_levels", ["root=TRACE"])
    for option, value in options.items():
        conf.set_override(option, value)
    oslo_log.setup(conf, "nova")
    logging.root.setLevel(1)
    # The JSON of its entry points has no end.
    logging.getLogger("stevedore").setLevel(logging.WARNING)


SETUPS: dict[str, Callable[[Path], None]] = {
    setup.__name__: setup
    for setup in (basic, variables, dictionary, queued, oslo, oslo_json)
}

_at_end: list[Callable[[], object]] = []


def make_libraries_log(url: str, password: str) -> None:
    """What happens in a service, and tells too much."""
    _read_rows(url)
    hold = redaction.KNOWN.hold(redaction.Secret(url), names=["cell 1"])
    _log_values(url, password)
    _log_failures(url, password)
    _send(url)
    child = os.fork()
    if child == 0:
        _log_values(url, password)
        _log_failures(url, password)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    hold.drop()


def _read_rows(url: str) -> None:
    # SQLAlchemy logs what it reads before anybody can make it known.
    engine = sa.create_engine("sqlite://")
    with engine.connect() as connection:
        row = connection.execute(sa.text("select :url"), {"url": url}).one()
        assert row[0] == url
        try:
            connection.execute(sa.text("select wrong"), {"url": url})
        except sa.exc.SQLAlchemyError:
            LOG.exception("Asking failed")


def _log_values(url: str, password: str) -> None:
    parsed = oslo_messaging.TransportURL.parse(cfg.ConfigOpts(), url)
    for logger in (LOG, OURS, logging.getLogger("kombu.connection")):
        logger.debug("Using %s for %s", parsed, [parsed.hosts, password])
        logger.debug("Using %(url)s", {"url": url, "password": password})
        # As careless services do.
        logger.debug(f"Sending for {password!r}")  # noqa: G004
        logger.debug("Sending %s", {"a": json.dumps([password])})
        logger.debug("Wrong %d", password)
        logger.debug("Truncated %.9s", url)


def _log_failures(url: str, password: str) -> None:
    try:
        try:
            raise ValueError(f"cannot log in with {password}")
        except ValueError as error:
            error.add_note(f"it was {url}")
            raise exceptions.CellUnavailable(
                redaction.describe(error)
            ) from error
    except exceptions.CellUnavailable as error:
        LOG.exception("Sending failed")
        LOG.warning("Sending failed with %s", error)
        LOG.warning("Sending failed", stack_info=True)
        OURS.error("Sending failed", exc_info=error)


def _send(url: str) -> None:
    conf = cfg.CONF
    conf([], project="nova", default_config_files=[])
    transport = oslo_messaging.get_rpc_transport(conf, url)
    client = oslo_messaging.get_rpc_client(
        transport, oslo_messaging.Target(topic="compute"), retry=0
    )
    try:
        client.cast({}, "reboot")
    except Exception as error:
        LOG.exception("Casting failed")
        LOG.warning("Casting failed: %s", error)
    transport.cleanup()


def main() -> None:
    # SQLAlchemy raises it while nobody has set it.
    logging.getLogger("sqlalchemy").setLevel(1)
    setup, order, folder = sys.argv[1:]
    given = json.load(sys.stdin)
    steps: list[Callable[[], None]] = [
        lambda: SETUPS[setup](Path(folder)),
        redaction.install,
    ]
    for step in steps if order == "before" else reversed(steps):
        step()
    for password in given:
        url = f"rabbit://nova:{quote(password, safe='')}@127.0.0.1:1/vh"
        make_libraries_log(url, password)
    LOG.info(TO_END)
    for end in _at_end:
        end()


if __name__ == "__main__":
    main()
