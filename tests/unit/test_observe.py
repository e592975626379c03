# Licensed under the Apache License, Version 2.0; see the file LICENSE.
from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from cellmw import exceptions, observe, options
from cellmw.cells.mapping import Cell
from tests.functional import stack
from tests.unit.test_options import configuration

ONE, OTHER = str(uuid.UUID(int=1)), str(uuid.UUID(int=0xAB))
INSTANCE = str(uuid.UUID(int=3))
PATH = f"/servers/{INSTANCE}/action"


class Context:
    """A service's own request context."""

    cell_uuid: str | None = None


class Site:
    """An observer, and an application behind it."""

    def __init__(
        self, find: Callable[[str, str], Cell | None] | None = None
    ) -> None:
        self.found: list[tuple[str, str]] = []
        self.cell: Cell | None = Cell(ONE, "one")
        self.now = 0.0
        self.seen: str | None = ONE
        self.observer = observe.Observer(
            find or self._find, clock=lambda: self.now
        )
        settings = options.load(configuration(), {})
        self.filter = observe.Observing(
            self._application, settings, lambda: self.observer
        )

    def _find(self, instance_uuid: str, method: str) -> Cell | None:
        self.found.append((instance_uuid, method))
        return self.cell

    def _application(self, environ: Any, start_response: Any) -> list[bytes]:
        environ["cellmw.context"].cell_uuid = self.seen
        start_response("200 OK", [])
        return [b"body"]

    def request(self, path: str = PATH, **environ: Any) -> Context:
        context = Context()
        given = {"cellmw.context": context, **environ}
        response = stack.request(self.filter, path, "POST", environ=given)
        assert (response.status_int, response.body) == (200, b"body")
        return context

    def counted(self, number: int) -> dict[str, int]:
        """The results that are not 0, when there are so many in all."""
        stack.eventually(
            lambda: sum(self.observer.counts().values()) == number
        )
        return {k: v for k, v in self.observer.counts().items() if v}


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()
    yield made
    made.observer.close()


@pytest.mark.parametrize(
    "cell, seen, result",
    [
        (Cell(ONE, "one"), ONE, "same"),
        (Cell(OTHER, "one"), OTHER.upper(), "same"),
        (Cell(ONE, "one"), OTHER, "another"),
        (Cell(ONE, "one"), None, "none"),
        (None, ONE, "another"),
        (None, None, "none"),
    ],
)
def test_the_handler_s_cell_is_compared(
    site: Site, cell: Cell | None, seen: str | None, result: str
) -> None:
    site.cell, site.seen = cell, seen
    context = site.request()
    assert site.counted(1) == {result: 1}
    assert site.found == [(INSTANCE, "POST")]
    assert vars(context) == {"cell_uuid": seen}


@pytest.mark.parametrize(
    "path, environ",
    [
        ("/servers/detail", {}),
        (PATH, {"HTTP_X_IDENTITY_STATUS": "Invalid"}),
    ],
)
def test_what_is_not_looked_up_is_not_counted(
    site: Site, path: str, environ: dict[str, Any]
) -> None:
    site.request(path, **environ)
    site.request()
    assert site.counted(1) == {"same": 1}
    assert site.found == [(INSTANCE, "POST")]


def test_a_context_is_not_made() -> None:
    site = Site()

    def application(environ: Any, start_response: Any) -> list[bytes]:
        assert "cellmw.context" not in environ
        start_response("200 OK", [])
        return []

    site.filter._application = application  # what it was made for
    stack.request(site.filter, PATH)
    assert site.counted(1) == {"none": 1}
    site.observer.close()


def test_the_first_difference_of_a_kind_in_a_minute_is_logged(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.seen = OTHER
    for count, now in enumerate((0.0, 59.0, 61.0), 1):
        site.now = now
        site.request()
        site.counted(count)
    site.seen = None
    site.request()
    site.counted(4)
    texts = [r.getMessage() for r in caplog.records]
    assert len(texts) == 3
    for text, seen in zip(texts, (OTHER, OTHER, "no cell"), strict=True):
        for part in (INSTANCE, ONE, seen):
            assert part in text
    assert {r.levelno for r in caplog.records} == {logging.WARNING}


def test_agreement_is_not_logged(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.request()
    site.counted(1)
    site.cell = site.seen = None
    site.request()
    site.counted(2)
    assert not caplog.records


def test_lookups_that_fail_are_counted() -> None:
    def find(instance_uuid: str, method: str) -> Cell | None:
        raise exceptions.LookupFailed("no database")

    site = Site(find)
    site.request()
    assert site.counted(1) == {"failed": 1}
    site.observer.close()


def test_no_request_waits_for_a_lookup_that_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(observe, "_QUEUE_SIZE", 200)
    hanging, go_on = threading.Event(), threading.Event()

    def find(instance_uuid: str, method: str) -> Cell | None:
        hanging.set()
        go_on.wait()
        return Cell(ONE, "one")

    site = Site(find)
    site.request()
    assert hanging.wait(stack.SOON)
    requests = 2 * observe._QUEUE_SIZE
    for _ in range(requests):
        site.request()
    counts = site.observer.counts()
    assert counts["dropped"] > requests / 3
    assert counts["same"] == 0
    go_on.set()
    assert site.counted(requests + 1)["same"] == (
        requests + 1 - counts["dropped"]
    )
    site.observer.close()


def test_an_error_in_looking_up_ends_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cells = iter([None, Cell(ONE, "one")])

    def find(instance_uuid: str, method: str) -> Cell | None:
        cell = next(cells)
        if cell is None:
            raise ZeroDivisionError
        return cell

    site = Site(find)
    site.request()
    site.request()
    stack.eventually(lambda: site.observer.counts()["same"] == 1)
    assert "ZeroDivisionError" in caplog.text
    site.observer.close()


def test_an_application_that_raises_is_observed(site: Site) -> None:
    def application(environ: Any, start_response: Any) -> Iterable[bytes]:
        environ["cellmw.context"].cell_uuid = ONE
        raise ZeroDivisionError

    site.filter._application = application  # what it was made for
    with pytest.raises(ZeroDivisionError):
        site.request()
    assert site.counted(1) == {"same": 1}


def test_a_handler_that_runs_with_its_body_is_observed(site: Site) -> None:
    def application(environ: Any, start_response: Any) -> Iterator[bytes]:
        environ["cellmw.context"].cell_uuid = ONE
        start_response("200 OK", [])
        yield b"body"

    site.filter._application = application  # what it was made for
    site.request()
    assert site.counted(1) == {"same": 1}


def test_the_body_is_the_application_s_own(site: Site) -> None:
    body = [b"body"]

    def application(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [])
        return body

    site.filter._application = application  # what it was made for
    given = site.filter(
        stack.environ_of(PATH), lambda *args: lambda data: None
    )
    assert given is body
    assert site.counted(1) == {"none": 1}


def test_without_a_thread_requests_are_served(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        site.request()
    assert site.observer.counts()["dropped"] == 1
    site.request()
    assert site.counted(2) == {"dropped": 1, "same": 1}
