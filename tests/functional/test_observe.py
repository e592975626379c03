# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""``mode = observe``: section 8 of the contract."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from cellmw import runtime
from cellmw.cells import store
from cellmw.metrics.recorder import Recorder
from tests.functional import stack
from tests.functional.stack import ApiDatabase, MakeFilter


class Context:
    """A service's own request context."""

    def __init__(self) -> None:
        self.cell_uuid: str | None = None


class Site:
    """Instances in a cell, and handlers that target their cells."""

    def __init__(self, api_database: ApiDatabase) -> None:
        self.cell = api_database.add_cell("cellmw-memory://one/")
        self.instances = api_database.add_instances([self.cell] * 10)
        self.contexts: list[Context] = []

    def application(
        self, environ: dict[str, Any], start_response: Any
    ) -> list[bytes]:
        context = environ["cellmw.context"]
        assert vars(context) == {"cell_uuid": None}
        context.cell_uuid = self.cell
        start_response("202 Accepted", [("X-From", "application")])
        return [b"body"]

    def request(self, application: Any, number: int = 0) -> None:
        context = Context()
        self.contexts.append(context)
        response = stack.request(
            application,
            f"/servers/{self.instances[number]}/action",
            "POST",
            environ={"cellmw.context": context},
        )
        assert response.status_int == 202
        assert response.body == b"body"
        assert set(vars(context)) == {"cell_uuid"}


def counts() -> dict[str, int]:
    (made,) = runtime.registry()
    return made.process().observer.counts()


@pytest.fixture
def site(api_database: ApiDatabase) -> Site:
    return Site(api_database)


def test_agreement_is_counted_and_published(
    site: Site, make_filter: MakeFilter
) -> None:
    application = make_filter(mode="observe")(site.application)
    for number in range(10):
        site.request(application, number)
    stack.eventually(lambda: counts()["same"] == 10)
    recorder = Recorder()
    recorder.record()
    samples = {
        (sample.name, sample.labels.get("result")): sample.value
        for metric in recorder.metrics.collect()
        for sample in metric.samples
    }
    assert samples["cellmw_observed_total", "same"] == 10
    assert ("cellmw_observed_total", "another") not in samples


def test_loading_and_what_names_no_instance_start_nothing(
    site: Site, make_filter: MakeFilter
) -> None:
    before = threading.enumerate()
    application = make_filter(mode="observe")(stack.Api())
    assert stack.request(application, "/servers").status_int == 200
    (made,) = runtime.registry()
    assert made.current is None
    assert threading.enumerate() == before


def test_a_database_that_hangs_holds_no_request(
    site: Site, make_filter: MakeFilter, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    asked = threading.Event()
    cells = store.Store.cells

    def hang(self: Any) -> Any:
        asked.set()
        assert go_on.wait(stack.SOON)
        return cells(self)

    monkeypatch.setattr(store.Store, "cells", hang)
    application = make_filter(mode="observe", lookup_timeout="0.2")(
        site.application
    )
    for number in range(10):
        site.request(application, number)
    assert asked.wait(stack.SOON)
    stack.eventually(lambda: counts()["failed"] >= 1)
    go_on.set()
    stack.eventually(lambda: sum(counts().values()) == 10)
