# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What the check takes as right and as wrong."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from cellmw.demo import check
from cellmw.demo.hosts import HOST_NAME, Ledger, Received
from cellmw.demo.site import Instance

INSTANCE = Instance("uuid-1", "web-1", "cell1")
SHOW = check.Request("GET", "/", "show", 200, INSTANCE, "get_instance")
REBOOT = check.Request("POST", "/", "reboot", 202, INSTANCE, "reboot_instance")
LIST = check.Request("GET", "/", "list", 200)


def received(
    cell: str = "cell1",
    method: str = "reboot_instance",
    uuid: str = "uuid-1",
    request_id: str = "req-1",
) -> Received:
    return Received(cell, HOST_NAME, method, uuid, request_id)


def answer(cell: str = "cell1", host: str = HOST_NAME) -> bytes:
    return json.dumps({"server": {"host": host, "cell": cell}}).encode()


SHOWN = received(method="get_instance")


@pytest.mark.parametrize(
    "request_,status,body,messages",
    [
        (REBOOT, 202, b"", [received()]),
        (SHOW, 200, answer(), [SHOWN]),
        (LIST, 200, b"{}", []),
    ],
)
def test_what_is_right(
    request_: check.Request, status: int, body: bytes, messages: Any
) -> None:
    assert check._judge(request_, status, body, messages) is None


@pytest.mark.parametrize(
    "request_,status,body,messages,wrong",
    [
        (REBOOT, 503, b"", [received()], "answered 503 instead of 202"),
        (REBOOT, 202, b"", [], "its message arrived nowhere"),
        (
            REBOOT,
            202,
            b"",
            [received("cell2")],
            "its message is for cell1, and is in cell2",
        ),
        (
            REBOOT,
            202,
            b"",
            [received(), received("default")],
            "its message is for cell1, and is in default",
        ),
        (REBOOT, 202, b"", [received()] * 2, "its message arrived 2 times"),
        (
            SHOW,
            200,
            answer("cell2"),
            [SHOWN],
            "another host's reply, from cell2",
        ),
        (LIST, 200, b"{}", [received()], "a message was sent"),
    ],
)
def test_what_is_wrong(
    request_: check.Request,
    status: int,
    body: bytes,
    messages: Any,
    wrong: str,
) -> None:
    assert check._judge(request_, status, body, messages) == wrong


def test_a_ledger_waits_for_what_is_on_its_way() -> None:
    ledger = Ledger()
    ledger.add(received(request_id="req-0"))
    late = threading.Timer(0.05, ledger.add, [received()])
    late.start()
    assert ledger.of("req-1", count=1, timeout=10) == [received()]
    late.join()


def test_a_ledger_does_not_wait_for_ever() -> None:
    assert Ledger().of("req-1", count=1, timeout=0.01) == []


def test_a_ledger_tells_of_each_message() -> None:
    told: list[Received] = []
    Ledger(told.append).add(received())
    assert told == [received()]
