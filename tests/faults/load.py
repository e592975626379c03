# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Clients of an API, in a process of their own.

Reads a line of JSON: ``port``, ``paths`` (a list of paths for each cell) and
``groups`` of clients, each with its ``cells``, how many ``clients`` there are
and their ``rate`` (requests in a second, all of them together).  Each client
makes one request after another, for one of its cells by chance, none sooner
than its part of the rate allows.  It says ``ready`` when they begin.  When its
input ends, so do they; then it prints what became of each request, as JSON:
the cell's number, when it was sent and for how many seconds it took (by the
monotonic clock, which all processes of a machine share), and the status, 0
where there was no answer.
"""

from __future__ import annotations

import http.client
import json
import random
import sys
import threading
import time
from typing import Any

# Longer than any request may take, in seconds.
_PATIENCE = 30.0


class Clients:
    def __init__(
        self, port: int, paths: list[list[str]], groups: list[dict[str, Any]]
    ) -> None:
        self._port = port
        self._paths = paths
        self._ended = threading.Event()
        self.done: list[tuple[int, float, float, int]] = []
        self.threads = [
            threading.Thread(
                target=self._run,
                args=(group["cells"], group["clients"] / group["rate"]),
            )
            for group in groups
            for _ in range(group["clients"])
        ]

    def _run(self, cells: list[int], pause: float) -> None:
        dice = random.Random()
        due = time.monotonic() + dice.random() * pause
        while not self._ended.wait(due - time.monotonic()):
            cell = dice.choice(cells)
            path = dice.choice(self._paths[cell])
            sent = time.monotonic()
            status = self._request(path)
            now = time.monotonic()
            self.done.append((cell, sent, now - sent, status))
            # Who is late does not catch up, nor do all go at once.
            due = max(due, now - pause) + pause

    def _request(self, path: str) -> int:
        connection = http.client.HTTPConnection(
            "127.0.0.1", self._port, timeout=_PATIENCE
        )
        try:
            connection.request("POST", path)
            response = connection.getresponse()
            response.read()
            return response.status
        except (OSError, http.client.HTTPException):
            return 0
        finally:
            connection.close()

    def stop(self) -> None:
        self._ended.set()
        for thread in self.threads:
            thread.join()


def main() -> None:
    wanted: dict[str, Any] = json.loads(sys.stdin.readline())
    clients = Clients(**wanted)
    for thread in clients.threads:
        thread.start()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.read()
    clients.stop()
    json.dump(clients.done, sys.stdout)


if __name__ == "__main__":
    main()
