# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Compute hosts of many cells, in a process of their own.

Reads the transport URL of each cell, as one line of JSON; says ``ready`` when
all of them are served, and ends when its input does.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import Any

import futurist._thread
import oslo_messaging

from tests.functional import stack

SERVER = "host"


class Host:
    """What is asked of the hosts."""

    def reboot_instance(
        self, ctxt: dict[str, Any], number: int, pad: str = ""
    ) -> int:
        return number

    def get_console_output(self, ctxt: dict[str, Any], cell: int) -> int:
        return cell

    def take_a_snapshot(self, ctxt: dict[str, Any], seconds: float) -> None:
        """A call that takes its time."""
        time.sleep(seconds)


def main() -> None:
    # Brokers are killed under it, which it need not tell about.
    logging.disable()
    # Many servers idle here, and nobody waits for their end; in the process of
    # the tests it stays as it is, for this module is imported there as well.
    vars(futurist._thread)["ThreadWorker"].MAX_IDLE_FOR = 60
    for url in json.loads(sys.stdin.readline()):
        transport = oslo_messaging.get_rpc_transport(
            stack.configuration(), url
        )
        server = oslo_messaging.get_rpc_server(
            transport,
            oslo_messaging.Target(topic=stack.TOPIC, server=SERVER),
            [Host()],
        )
        transport.conf.set_override("executor_thread_pool_size", 4)
        server.start()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.read()
    # Stopping a server can wait for its broker for ever.
    os._exit(0)


if __name__ == "__main__":
    main()
