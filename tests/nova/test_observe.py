# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""``mode = observe`` in front of stock Nova."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.functional import stack
from tests.nova.site import Answer, Api, Site, from_threads
from tests.proxy import Proxy

REQUESTS = 1000


@pytest.fixture(scope="module")
def proxy(made_site: Site) -> Iterator[Proxy]:
    """Stands between the filter, not Nova, and the API database."""
    host, port = made_site.databases["api"].address
    with Proxy(host, port) as made:
        yield made


@pytest.fixture(scope="module")
def api(made_site: Site, proxy: Proxy) -> Iterator[Api]:
    url = made_site.databases["api"].url_via(proxy.address)
    with made_site.api(
        mode="observe", lookup_timeout="1", api_database_connection=url
    ) as served:
        yield served


def observed(api: Api) -> dict[str, float]:
    name = "cellmw_observed_total"
    return {
        key.removeprefix(f'{name}{{result="').removesuffix('"}'): value
        for key, value in api.metrics().items()
        if key.startswith(name)
    }


def _requests(api: Api, site: Site, number: int) -> list[Answer]:
    both = [*site.instances["one"], *site.instances["two"]]
    jobs = [both[count % len(both)] for count in range(number)]
    return from_threads(api.cast, jobs, 8)


def test_a_thousand_requests_agree(site: Site) -> None:
    with site.api(mode="observe", lookup_timeout="30") as api:
        answers = _requests(api, site, REQUESTS)
        assert {answer.status for answer in answers} == {202}
        stack.eventually(
            lambda: sum(observed(api).values()) >= REQUESTS, within=60
        )
        assert observed(api) == {"same": REQUESTS}


@pytest.mark.parametrize(
    "break_database",
    [Proxy.refuse, Proxy.swallow, lambda proxy: proxy.delay(2.0)],
    ids=["stopped", "hanging", "slow"],
)
def test_no_request_waits_for_the_lookups(
    site: Site,
    api: Api,
    proxy: Proxy,
    break_database: Callable[[Proxy], None],
) -> None:
    before = sum(observed(api).values())
    usual = max(a.seconds for a in _requests(api, site, 50))
    break_database(proxy)
    answers = _requests(api, site, 100)
    assert {answer.status for answer in answers} == {202}
    # With a lookup in its way each of them takes a second more.
    assert sorted(a.seconds for a in answers)[50] < max(0.9, usual)
    stack.eventually(lambda: observed(api).get("failed", 0) > 0, within=30)
    proxy.restore()
    proxy.cut()
    stack.eventually(
        lambda: sum(observed(api).values()) >= before + 150, within=180
    )
    same = observed(api)["same"]
    _requests(api, site, 20)
    stack.eventually(lambda: observed(api)["same"] >= same + 20, within=30)
    assert set(observed(api)) <= {"same", "failed", "dropped"}
