# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""A preforking server in little, for the test of the metrics page.

Loads the filter and the page, then forks two workers.  Each does what it
reads from its pipe, one line after another: sends so many casts, shows the
page, or ends.  Run with the URL of the API database, the path of a request,
and the URL of a cell's queue.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import oslo_messaging

from cellmw import filter_factory, metrics, rpc
from tests.functional import stack

WORKERS = 2


def work(commands: Any, answers: Any, api: Any, page: Any, path: str) -> None:
    for line in commands:
        what, _, count = line.strip().partition(" ")
        if what == "send":
            for _ in range(int(count)):
                stack.request(api, path, "POST")
            text = ""
        else:
            text = stack.request(page, "/").text
        answers.write(f"{text}\n.\n")
        answers.flush()


def say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def main() -> None:
    database, path = sys.argv[1:]
    client = rpc.get_client(oslo_messaging.Target(topic=stack.TOPIC))

    def send(context: Any) -> None:
        client.cast(context, "reboot_instance")

    make = filter_factory(
        {},
        oslo_config_config=stack.configuration(),
        api_database_connection=database,
    )
    api = make(stack.Api(send))
    page = metrics.app_factory({})
    to_workers: list[int] = []
    from_workers: list[int] = []
    for _ in range(WORKERS):
        commands, to_worker = os.pipe()
        from_worker, answers = os.pipe()
        if os.fork() == 0:
            for other in (*to_workers, to_worker, from_worker):
                os.close(other)
            with os.fdopen(commands) as read, os.fdopen(answers, "w") as write:
                work(read, write, api, page, path)
            sys.exit(0)
        os.close(commands)
        os.close(answers)
        to_workers.append(to_worker)
        from_workers.append(from_worker)
    # To the test: hand on what it says, and what they answer.
    pipes = [
        (os.fdopen(there, "w"), os.fdopen(back))
        for there, back in zip(to_workers, from_workers, strict=True)
    ]
    for line in sys.stdin:
        number, _, command = line.strip().partition(" ")
        there, back = pipes[int(number)]
        if command == "end":
            there.close()
            os.wait()
            say("ended\n.\n")
            continue
        there.write(f"{command}\n")
        there.flush()
        for answer in back:
            say(answer)
            if answer == ".\n":
                break


if __name__ == "__main__":
    main()
