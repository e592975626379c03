# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Nova's API answers as without the filter, in every mode."""

from __future__ import annotations

import hmac
import itertools
import re
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from tests.nova import identity
from tests.nova.site import METADATA_SECRET, Answer, Api, Site

UNKNOWN = str(uuid.UUID(int=0x42))
# Of the older pipeline the microversions are none of the client's business.
PIPELINES = (
    ("/v2.1", "2.1"),
    ("/v2.1", "2.73"),
    ("/v2.1", "latest"),
    ("/v2", None),
)

MODES: dict[str, dict[str, Any]] = {
    "route": {"nova_cell_cache": "false"},
    "nova_cell_cache": {},
    "observe": {"mode": "observe"},
}

# What differs from one request to the next, whoever answers.
_TIMES = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?Z?")
_REQUEST_IDS = re.compile(rb"req-[0-9a-f-]{36}")
_OWN_HEADERS = ("Date", "x-openstack-request-id", "x-compute-request-id")

_Request = tuple[str, str, object]


def _requests(base: str, tagged: bool) -> Iterator[_Request]:
    """Method, path and body of each request for one instance."""
    server = f"{base}/servers/INSTANCE"

    def action(name: str, argument: object = None) -> _Request:
        return "POST", f"{server}/action", {name: argument}

    reset = action("os-resetState", {"state": "active"})
    yield action("os-getConsoleOutput", {})
    yield action("os-getConsoleOutput", {"length": 10})
    for name, argument in (("reboot", {"type": "SOFT"}), ("pause", None)):
        yield action(name, argument)
        yield action(name, argument)  # no longer possible in its state
        yield reset
    yield from (action("lock"), action("unlock"), action("injectNetworkInfo"))
    yield from (action("no-such-action"), action("reboot", {"type": "ODD"}))
    yield "POST", f"{server}/action", {}
    yield "GET", f"{server}/metadata", None
    yield "POST", f"{server}/metadata", {"metadata": {"a": "b", "c": "d"}}
    yield "GET", f"{server}/metadata/a", None
    yield "DELETE", f"{server}/metadata/a", None
    yield "GET", f"{server}/metadata/a", None
    yield "PUT", f"{server}/metadata", {"metadata": {"color": "blue"}}
    yield "GET", f"{server}/os-instance-actions", None
    yield "GET", f"{server}/os-instance-actions/req-none", None
    if tagged:
        yield "PUT", f"{server}/tags/a-tag", None
        yield "GET", f"{server}/tags", None
        yield "GET", f"{server}/tags/a-tag", None
        yield "DELETE", f"{server}/tags/a-tag", None
        yield "GET", f"{server}/tags/a-tag", None
    yield "GET", f"{base}/servers", None
    yield "GET", f"{base}/", None
    yield "GET", f"{base}/no-such-thing", None


def _answers(api: Api, instances: list[str]) -> list[tuple[Any, ...]]:
    """What the API answers, without what differs each time."""
    found = []
    for base, version in PIPELINES:
        tagged = version not in (None, "2.1")
        for instance in instances:
            for method, path, body in _requests(base, tagged):
                answer = api.request(
                    path.replace("INSTANCE", instance),
                    body,
                    method=method,
                    version=version,
                )
                asked = (method, path, repr(body), version)
                named = instance if "INSTANCE" in path else UNKNOWN
                found.append((*asked, *_normal(answer, named)))
    return found


def _normal(answer: Answer, instance: str) -> tuple[Any, ...]:
    body = answer.body.replace(instance.encode(), b"INSTANCE")
    body = _TIMES.sub(b"TIME", _REQUEST_IDS.sub(b"req-ID", body))
    headers = [
        (
            name,
            ""
            if name in _OWN_HEADERS
            else value.replace(instance, "INSTANCE"),
        )
        for name, value in answer.headers
    ]
    return answer.status, headers, body


# It builds on a list that every action makes longer; so each mode has
# instances of its own, in the same order.
def _instances(site: Site, number: int) -> list[str]:
    # Counted from the end: tests of messages use the first ones.
    return [
        site.instances["one"][-1 - number],
        site.instances["two"][-1 - number],
        UNKNOWN,
    ]


@pytest.fixture(scope="module")
def stock(made_site: Site) -> list[tuple[Any, ...]]:
    """The answers without the filter."""
    with made_site.api(filtered=False) as api:
        return _answers(api, _instances(made_site, 0))


@pytest.mark.parametrize("mode", MODES)
def test_the_answers_are_stock_nova_s(
    site: Site, stock: list[tuple[Any, ...]], mode: str
) -> None:
    number = 1 + list(MODES).index(mode)
    with site.api(**MODES[mode]) as api:
        answers = _answers(api, _instances(site, number))
    assert len(answers) == len(stock) > 300
    statuses = {answer[4] for answer in stock}
    assert statuses >= {200, 201, 202, 204, 400, 404, 409}
    for answer, wanted in zip(answers, stock, strict=True):
        assert answer == wanted


# Of an instance in each cell, of none, and what the proxy would not sign.
_METADATA = ("/", "/latest/meta-data/", "/openstack/latest/meta_data.json")


def _metadata(api: Api, instances: list[str]) -> list[tuple[Any, ...]]:
    """What the metadata API answers its proxy."""
    found = []
    for path, instance in itertools.product(_METADATA, instances):
        signed = hmac.new(
            METADATA_SECRET.encode(), instance.encode(), "sha256"
        ).hexdigest()
        for signature in (signed, "forged"):
            answer = api.request(
                path,
                more_headers={
                    "X-Instance-ID": instance,
                    "X-Tenant-ID": identity.PROJECT,
                    "X-Instance-ID-Signature": signature,
                    "X-Forwarded-For": "192.0.2.7",
                },
            )
            found.append((path, signature, *_normal(answer, instance)))
    return found


@pytest.mark.parametrize("mode", ["nova_cell_cache", "observe"])
def test_the_metadata_answers_are_stock_nova_s(site: Site, mode: str) -> None:
    instances = _instances(site, 0)
    with site.api(service="metadata", filtered=False) as api:
        stock = _metadata(api, instances)
    with site.api(service="metadata", **MODES[mode]) as api:
        assert _metadata(api, instances) == stock
    # It has found the instance in its cell, and there is no Neutron to ask.
    assert {answer[2] for answer in stock} == {200, 403, 404, 500}
