# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Messages of stock Nova's handlers: to their cells, in time, healed."""

from __future__ import annotations

import concurrent.futures
import itertools
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Self

import pytest

from tests import servers
from tests.functional import stack
from tests.nova.site import (
    REFRESH,
    REPLY_TIMEOUT,
    RESET_AFTER,
    SEND_TIMEOUT,
    Answer,
    Api,
    Site,
    from_threads,
)

# What the machine may add to a bound, in seconds.
_SLACK = 1.5
# An answer for which nobody waited for a broker.
_AT_ONCE = 1.0
_PREFORKED = pytest.param(2, id="preforked")


@pytest.fixture(
    scope="module", params=[pytest.param(1, id="one-process"), _PREFORKED]
)
def api(made_site: Site, request: pytest.FixtureRequest) -> Iterator[Api]:
    """The API behind the filter, in one process or forked after the load."""
    with made_site.api(workers=request.param) as served:
        for cell in made_site.instances.values():
            from_threads(served.call, cell, 4)
        yield served


def send_to(api: Api, instance: str, number: int) -> Answer:
    return api.call(instance) if number % 2 else api.cast(instance)


def test_each_message_reaches_its_own_cell(site: Site, api: Api) -> None:
    both = [*site.instances["one"], *site.instances["two"]] * 2
    before = len(site.hosts.got())
    answers = from_threads(
        lambda job: send_to(api, job[1], job[0] // len(both)),
        enumerate(both * 2),
        16,
    )
    assert {answer.status for answer in answers} == {200, 202}
    stack.eventually(lambda: len(site.hosts.got()) >= before + 2 * len(both))
    got = site.hosts.got()[before:]
    assert len(got) == 2 * len(both)
    wanted = [
        (f"host-{cell}", method, instance)
        for cell, instances in site.instances.items()
        for instance in instances
        for method in ("inject_network_info", "get_console_output")
    ]
    assert sorted(got) == sorted(wanted * 2)
    assert not [q for q in site.default.queues() if "compute" in q]


def refuse(site: Site) -> None:
    site.proxy.refuse()


def hang(site: Site) -> None:
    site.broker.pause()


def kill(site: Site) -> None:
    site.broker.kill()


def lose_packets(site: Site) -> None:
    site.proxy.swallow()


def raise_alarm(site: Site) -> None:
    site.broker.raise_memory_alarm()


@pytest.mark.parametrize(
    "break_broker", [refuse, hang, kill, lose_packets, raise_alarm]
)
def test_a_broken_broker_holds_no_thread_and_no_other_cell(
    site: Site, api: Api, break_broker: Callable[[Site], None]
) -> None:
    _all_is_well(site, api)
    break_broker(site)
    broken = site.instances["two"][:8]
    with concurrent.futures.ThreadPoolExecutor(12) as executor:
        first = [
            executor.submit(send_to, api, instance, number)
            for number, instance in enumerate(broken)
        ]
        healthy = [
            executor.submit(send_to, api, instance, number)
            for number, instance in enumerate(site.instances["one"][:16])
        ]
        answers = [future.result() for future in first]
        others = [future.result() for future in healthy]
    for answer in answers:
        _refuses(answer)
        assert answer.seconds <= SEND_TIMEOUT + REPLY_TIMEOUT + _SLACK
    for answer in others:
        assert answer.status in (200, 202)
    # Less than what waits for the broken one; most of it is the machine's.
    assert statistics.median(a.seconds for a in others) < SEND_TIMEOUT
    _is_refused_at_once(api, broken)
    site.heal()
    stack.eventually(
        lambda: api.cast(broken[0]).status == 202,
        within=4 * RESET_AFTER + 4 * SEND_TIMEOUT + stack.SOON,
    )
    _all_is_well(site, api)


def _refuses(answer: Answer) -> None:
    assert answer.status in (503, 504), answer
    if answer.status == 503:
        assert answer.retry_after is not None
        assert int(answer.retry_after) >= 1
    else:
        assert answer.retry_after is None


def _is_refused_at_once(api: Api, broken: list[str]) -> None:
    """Once the breakers are open; each process then sends one trial."""

    def all_but_trials_at_once() -> bool:
        answers = from_threads(api.cast, broken, 8)
        for answer in answers:
            _refuses(answer)
        trials = [
            answer
            for answer in answers
            if answer.status != 503 or answer.seconds >= _AT_ONCE
        ]
        return len(trials) <= api.workers

    stack.eventually(all_but_trials_at_once, within=30)


def _all_is_well(site: Site, api: Api) -> None:
    instances = [*site.instances["one"][:4], *site.instances["two"][:4]]

    def every_worker_sends() -> bool:
        answers = from_threads(
            lambda job: send_to(api, job[1], job[0]),
            enumerate(instances * 2),
            4,
        )
        return {answer.status for answer in answers} == {200, 202}

    stack.eventually(every_worker_sends, within=30)


def _counted(vhost: servers.Vhost) -> int:
    """Open connections, those of its compute host included."""
    return sum(row["state"] == "running" for row in vhost.connections())


class Load:
    """Casts to one cell from four threads, until it is left."""

    def __init__(self, api: Api, instances: list[str]) -> None:
        self._api = api
        self._instances = itertools.cycle(instances)
        self._over = threading.Event()
        self.answers: list[Answer] = []

    def __enter__(self) -> Self:
        self._executor = concurrent.futures.ThreadPoolExecutor(4)
        self._running = [self._executor.submit(self._run) for _ in range(4)]
        return self

    def _run(self) -> None:
        while not self._over.is_set():
            self.answers.append(self._api.cast(next(self._instances)))

    def __exit__(self, *args: object) -> None:
        self._over.set()
        self._executor.shutdown()
        for thread in self._running:
            thread.result()


def test_a_changed_transport_url_is_followed_under_load(
    site: Site, api: Api
) -> None:
    with servers.rabbit_vhost() as new:
        site.hosts.serve(new.url, "host-one", "host-one-new")
        of_old, of_new = _counted(site.one), _counted(new)
        with Load(api, site.instances["one"]) as load:
            stack.eventually(lambda: len(load.answers) > 20)
            site.change_cell("one", "transport_url", new.url)
            time.sleep(REFRESH + _SLACK)
            start = len(site.hosts.got())
            sent = len(load.answers)
            stack.eventually(lambda: len(load.answers) > sent + 40)
            got = site.hosts.got()[start + 8 :]
        assert {answer.status for answer in load.answers} == {202}
        assert {host for host, _, _ in got} == {"host-one-new"}
        assert _counted(new) > of_new
        stack.eventually(lambda: _counted(site.one) < of_old, within=20)
        with Load(api, site.instances["one"]) as load:
            site.change_cell("one", "transport_url", site.one.url)
            time.sleep(2 * REFRESH + _SLACK)
        assert {answer.status for answer in load.answers} == {202}
        stack.eventually(lambda: _counted(new) == of_new, within=20)


def test_a_changed_database_is_followed_under_load(
    site: Site, api: Api
) -> None:
    old = site.databases["one"]
    new = site.copy_database("one")
    try:
        with Load(api, site.instances["one"]) as load:
            stack.eventually(lambda: len(load.answers) > 20)
            assert old.connections()
            site.change_cell("one", "database_connection", new.url)
            stack.eventually(lambda: len(new.connections()) > 0)
            stack.eventually(lambda: not old.connections(), within=20)
            site.change_cell("one", "database_connection", old.url)
            stack.eventually(lambda: not new.connections(), within=20)
    finally:
        site.change_cell("one", "database_connection", old.url)
    assert {answer.status for answer in load.answers} == {202}
