# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Compute hosts of Nova's cells, in a process of their own.

Each line of the input is a JSON object: the ``url`` of a cell's broker, the
``host`` to serve there, and the ``name`` to record; the answer is a line
``ready``.  What the
hosts get is appended to the file that is named on the command line, a JSON
list for each message: host, method, instance UUID.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from pathlib import Path
from typing import Any

import oslo_messaging

from tests.functional import stack

# Nova's compute hosts speak this or a lower one.
_VERSION = "6.99"


class Host:
    """Takes what Nova's API sends, and answers calls."""

    target = oslo_messaging.Target(version=_VERSION)

    def __init__(self, name: str, record: Record) -> None:
        self._name = name
        self._record = record

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)

        def endpoint(ctxt: dict[str, Any], **arguments: Any) -> str:
            instance = arguments.get("instance") or {}
            uuid = instance.get("nova_object.data", {}).get("uuid")
            self._record.add([self._name, method, uuid])
            return f"the console of {uuid} on {self._name}"

        return endpoint


class Record:
    """What the hosts got, in a file."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._file = path.open("a", buffering=1)

    def add(self, message: list[str | None]) -> None:
        with self._lock:
            self._file.write(json.dumps(message) + "\n")


def main() -> None:
    logging.disable()
    record = Record(Path(sys.argv[1]))
    for line in sys.stdin:
        asked = json.loads(line)
        transport = oslo_messaging.get_rpc_transport(
            stack.configuration(), asked["url"]
        )
        oslo_messaging.get_rpc_server(
            transport,
            oslo_messaging.Target(
                exchange="nova", topic="compute", server=asked["host"]
            ),
            [Host(asked["name"], record)],
            access_policy=oslo_messaging.LegacyRPCAccessPolicy,
        ).start()
        sys.stdout.write("ready\n")
        sys.stdout.flush()
    # Stopping a server can wait for its broker for ever.
    os._exit(0)


if __name__ == "__main__":
    main()
