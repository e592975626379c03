# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Nova's handlers send through the cell cache: section 8 of the contract.

A small stand-in for Nova serves here; ``tests/nova`` runs the real one.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import oslo_messaging
import pytest

import cellmw
from cellmw import exceptions, runtime, testing
from cellmw.cells import tables
from cellmw.cells.mapping import CELL0_UUID
from tests import fake_nova
from tests.functional import stack
from tests.functional.stack import ApiDatabase, Host, MakeFilter, Serve

OPTIONS: dict[str, Any] = {
    "nova_cell_cache": "true",
    "context_key": "nova.context",
    "cell_refresh_interval": "0.05",
    "breaker_failures": "2",
    "breaker_reset_after": "30",
}


class Context:
    """Nova's request context, as far as it is used here."""

    db_connection: Any = None
    mq_connection: Any = None
    cell_uuid: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {}


@pytest.fixture
def known_nova(monkeypatch: pytest.MonkeyPatch) -> fake_nova.Nova:
    return fake_nova.Nova(monkeypatch)


class Site:
    """A cell with a host, and handlers in front of it that target cells."""

    def __init__(
        self,
        url: str,
        api_database: ApiDatabase,
        known_nova: fake_nova.Nova,
        make_filter: MakeFilter,
    ) -> None:
        self.url = url
        self.database = api_database
        self.nova = known_nova
        self.uuid = api_database.add_cell(url)
        self.instance = api_database.add_instance(self.uuid)
        self.make_filter = make_filter
        # Of the next request.
        self.context = Context()

    def load(self, **options: str) -> Any:
        return self.make_filter(**{**OPTIONS, **options})

    def target(self, uuid: str | None = None, **mapping: Any) -> Context:
        """A context that a handler has targeted."""
        context = Context()
        self.nova.context.set_target_cell(
            context,
            types.SimpleNamespace(
                uuid=uuid or self.uuid,
                database_connection="sqlite://",
                transport_url="cellmw-memory://not-ours/",
                **mapping,
            ),
        )
        return context

    def send(self, context: Context, instance: str) -> None:
        client = oslo_messaging.get_rpc_client(
            context.mq_connection, stack.target(server="host")
        )
        client.cast(context, "reboot_instance", instance_uuid=instance)

    def request(self, handler: Callable[[], object], **options: str) -> Any:
        """A request whose handler is Nova's: every error is a 500."""

        def application(environ: Any, start_response: Any) -> list[bytes]:
            status = "202 Accepted"
            try:
                handler()
            except Exception:
                status = "500 Internal Server Error"
            start_response(status, [])
            return [b"Nova's own"]

        return stack.request(
            self.load(**options)(application),
            f"/servers/{self.instance}/action",
            "POST",
            environ={"nova.context": self.context},
        )


@pytest.fixture(
    params=["memory", pytest.param("rabbit", marks=pytest.mark.servers)]
)
def site(
    request: pytest.FixtureRequest,
    api_database: ApiDatabase,
    known_nova: fake_nova.Nova,
    make_filter: MakeFilter,
) -> Site:
    url = "cellmw-memory://one/"
    if request.param == "rabbit":
        url = request.getfixturevalue("make_vhost")().url
    return Site(url, api_database, known_nova, make_filter)


@pytest.fixture
def memory_site(
    api_database: ApiDatabase,
    known_nova: fake_nova.Nova,
    make_filter: MakeFilter,
) -> Site:
    return Site("cellmw-memory://one/", api_database, known_nova, make_filter)


def test_a_message_reaches_the_cell_that_was_targeted(
    site: Site, serve: Serve
) -> None:
    host = serve(site.url, Host("one"))
    response = site.request(lambda: site.send(site.target(), "an-instance"))
    assert (response.status_int, response.text) == (202, "Nova's own")
    stack.eventually(lambda: host.instances() == ["an-instance"])


def test_the_connection_belongs_to_no_request(
    site: Site, serve: Serve
) -> None:
    host = serve(site.url, Host("one"))
    contexts = []
    site.request(lambda: contexts.append(site.target()))
    site.send(contexts[0], "afterwards")
    stack.eventually(lambda: host.instances() == ["afterwards"])


def test_a_changed_url_is_followed(memory_site: Site, serve: Serve) -> None:
    hosts = [serve(f"cellmw-memory://{name}/") for name in ("one", "two")]
    memory_site.load()
    context = memory_site.target()
    memory_site.send(context, "before")
    memory_site.database.change_cell(
        memory_site.uuid, transport_url="cellmw-memory://two/"
    )

    def has_moved() -> bool:
        memory_site.send(context, "after")
        return bool(hosts[1].instances())

    stack.eventually(has_moved)
    assert hosts[0].instances()[0] == "before"
    assert set(hosts[1].instances()) == {"after"}


def test_the_database_is_made_by_nova_and_replaced(memory_site: Site) -> None:
    memory_site.load()
    memory_site.database.change_cell(
        memory_site.uuid, database_connection="sqlite:///one"
    )
    first = memory_site.target().db_connection
    assert isinstance(first, fake_nova.Manager)
    assert first.url.reveal() == "sqlite:///one"
    assert memory_site.target().db_connection is first
    memory_site.database.change_cell(
        memory_site.uuid, database_connection="sqlite:///two"
    )
    stack.eventually(lambda: memory_site.target().db_connection is not first)
    second = memory_site.target().db_connection
    assert second.url.reveal() == "sqlite:///two"
    assert memory_site.target().cell_uuid == memory_site.uuid


def test_cell0_refuses(memory_site: Site) -> None:
    memory_site.database.add_cell0()
    memory_site.load()
    context = memory_site.target(CELL0_UUID)
    assert isinstance(context.db_connection, fake_nova.Manager)
    # Nova's router would else take the default queue.
    assert context.mq_connection
    with pytest.raises(exceptions.CellHasNoQueue):
        memory_site.send(context, "an-instance")


def test_a_cell_that_is_new_is_read(memory_site: Site, serve: Serve) -> None:
    memory_site.load(cell_refresh_interval="600")
    memory_site.target()
    new = memory_site.database.add_cell("cellmw-memory://new/")
    host = serve("cellmw-memory://new/")
    memory_site.send(memory_site.target(new), "an-instance")
    stack.eventually(lambda: host.instances() == ["an-instance"])


def test_nova_never_connects_to_an_unknown_cell_by_itself(
    memory_site: Site,
) -> None:
    memory_site.load()
    with pytest.raises(exceptions.CellNotFound):
        memory_site.target("11111111-1111-1111-1111-111111111111")
    assert list(memory_site.nova.context.CELL_CACHE) == []


def test_a_deleted_cell_keeps_its_database_and_refuses_messages(
    memory_site: Site,
) -> None:
    memory_site.load()
    before = memory_site.target()
    table = tables.cell_mappings
    memory_site.database._execute(
        table.delete().where(table.c.uuid == memory_site.uuid)
    )
    cellmw.refresh_cells(before)
    after = memory_site.target()
    assert after.db_connection is before.db_connection
    with pytest.raises(exceptions.CellNotFound):
        memory_site.send(after, "an-instance")


def test_what_nova_puts_into_the_cache_is_ignored(memory_site: Site) -> None:
    memory_site.load()
    cache = memory_site.nova.context.CELL_CACHE
    cache[memory_site.uuid] = (None, None)
    assert memory_site.target().mq_connection is not None


def test_a_hidden_refusal_is_answered(memory_site: Site) -> None:
    memory_site.database.change_cell(memory_site.uuid, transport_url="no://")
    response = memory_site.request(
        lambda: memory_site.send(memory_site.target(), "an-instance")
    )
    assert response.status_int == 503
    assert int(response.headers["Retry-After"]) >= 1
    assert response.json["serviceUnavailable"]["code"] == 503


def test_a_hidden_refusal_through_the_request_s_own_is_answered(
    memory_site: Site,
) -> None:
    memory_site.database.change_cell(memory_site.uuid, transport_url="no://")
    response = memory_site.request(
        lambda: memory_site.send(memory_site.context, "an-instance")
    )
    assert response.status_int == 503
    assert int(response.headers["Retry-After"]) >= 1


def test_a_hidden_uncertain_delivery_is_answered(memory_site: Site) -> None:
    testing.broker("one").lose_confirms()
    response = memory_site.request(
        lambda: memory_site.send(memory_site.target(), "an-instance"),
    )
    assert response.status_int == 504
    assert "Retry-After" not in response.headers
    assert response.json["gatewayTimeout"]["code"] == 504


def test_a_hidden_failure_to_target_is_answered(memory_site: Site) -> None:
    response = memory_site.request(
        lambda: memory_site.target("11111111-1111-1111-1111-111111111111")
    )
    assert response.status_int == 503


def test_an_error_of_nova_s_own_stays_its_500(memory_site: Site) -> None:
    response = memory_site.request(lambda: 1 / 0)
    assert (response.status_int, response.text) == (500, "Nova's own")


def test_two_pipelines_share_one_cache(memory_site: Site) -> None:
    memory_site.load()
    cache = memory_site.nova.context.CELL_CACHE
    transport = memory_site.target().mq_connection
    memory_site.load()
    assert memory_site.nova.context.CELL_CACHE is cache
    assert len(runtime.registry()) == 1
    again = memory_site.target().mq_connection
    assert again is not None
    assert type(again) is type(transport)


def test_the_filter_that_was_loaded_last_counts(
    memory_site: Site, serve: Serve
) -> None:
    host = serve(memory_site.url, Host("one"))
    memory_site.load()
    before = memory_site.target()
    memory_site.load(send_timeout="7")
    first, second = runtime.registry()
    for context in (before, memory_site.target()):
        memory_site.send(context, "an-instance")
    stack.eventually(lambda: len(host.instances()) == 2)
    assert first.current is None or (
        not first.process().pool.stats().total.opened
    )
    assert second.process().pool.stats().total.opened == 1


def test_what_nova_opened_in_the_load_is_closed(memory_site: Site) -> None:
    opened = memory_site.target().db_connection
    memory_site.load()
    memory_site.load()
    assert opened.disposed == 1
    assert memory_site.target().db_connection is not opened


def test_loading_opens_nothing(memory_site: Site) -> None:
    before = threading.enumerate()
    memory_site.load()
    (made,) = runtime.registry()
    assert made.current is None
    assert threading.enumerate() == before


def test_a_forked_child_makes_its_own(memory_site: Site) -> None:
    memory_site.load()
    mine = memory_site.target()
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        theirs = memory_site.target()
        others = theirs.db_connection is not mine.db_connection
        os.write(write, b"%d" % others)
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(write)
    with os.fdopen(read) as told:
        assert told.read() == "1"


def test_the_exceptions_that_nova_lets_in_may_come_back(
    memory_site: Site,
) -> None:
    memory_site.load(allowed_remote_exmods="mine")
    (made,) = runtime.registry()
    assert made.settings.allowed_remote_exmods == ("mine", "nova.exception")


def test_the_transport_is_not_pickled(memory_site: Site) -> None:
    memory_site.load()
    with pytest.raises(TypeError):
        pickle.dumps(memory_site.target().mq_connection)


@pytest.mark.parametrize(
    "options", [{"nova_cell_cache": "false"}, {"mode": "observe"}]
)
def test_it_is_placed_only_where_it_shall_be(
    memory_site: Site, options: dict[str, str]
) -> None:
    memory_site.load(**options)
    assert type(memory_site.nova.context.CELL_CACHE) is dict


def _no_cache(module: Any) -> None:
    del module.CELL_CACHE


def _another_type(module: Any) -> None:
    module.CELL_CACHE = []


def _triples(module: Any) -> None:
    module.CELL_CACHE = {"a-cell": (1, 2, 3)}


def _no_function(module: Any) -> None:
    del module.set_target_cell


def _another_name(module: Any) -> None:
    cache = {"cellmw-probe": (1, 2)}

    def set_target_cell(context: Any, mapping: Any) -> None:
        context.db_connection, context.mq_connection = cache[mapping.uuid]
        context.cell_uuid = mapping.uuid

    module.set_target_cell = set_target_cell


def _another_order(module: Any) -> None:
    def set_target_cell(context: Any, mapping: Any) -> None:
        pair = module.CELL_CACHE[mapping.uuid]
        context.mq_connection, context.db_connection = pair
        context.cell_uuid = mapping.uuid

    module.set_target_cell = set_target_cell


def _raising(module: Any) -> None:
    def set_target_cell(context: Any, mapping: Any) -> None:
        raise ZeroDivisionError

    module.set_target_cell = set_target_cell


@pytest.mark.parametrize(
    "spoil, told",
    [
        (_no_cache, "CELL_CACHE is not a dictionary"),
        (_another_type, "CELL_CACHE is not a dictionary"),
        (_triples, "does not hold pairs"),
        (_no_function, "no function set_target_cell"),
        (_another_name, "does not take its pairs from CELL_CACHE"),
        (_another_order, "does not take its pairs from CELL_CACHE"),
        (_raising, "ZeroDivisionError"),
    ],
)
def test_a_nova_that_is_not_known_stops_the_load(
    memory_site: Site, spoil: Callable[[Any], None], told: str
) -> None:
    module = memory_site.nova.context
    spoil(module)
    before = vars(module).get("CELL_CACHE")
    with pytest.raises(exceptions.ConfigurationError) as caught:
        memory_site.load()
    for part in ("nova_cell_cache", told):
        assert part in str(caught.value)
    assert vars(module).get("CELL_CACHE") is before


@pytest.mark.parametrize(
    "module, name",
    [
        ("nova.db.main.api", "create_context_manager"),
        ("nova.rpc", "get_allowed_exmods"),
    ],
)
def test_a_nova_without_its_functions_stops_the_load(
    memory_site: Site,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    name: str,
) -> None:
    monkeypatch.delattr(f"{module}.{name}")
    with pytest.raises(exceptions.ConfigurationError, match=name):
        memory_site.load()


def test_without_nova_the_load_stops(
    memory_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nova.context", None)
    with pytest.raises(exceptions.ConfigurationError) as caught:
        memory_site.load()
    assert "nova.context cannot be imported" in str(caught.value)
