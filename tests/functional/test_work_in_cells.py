# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Handlers that work in cells of their choice, on real queues and databases.

Sections 4 and 5 of the contract: ``db_connection``, ``cells``,
``target_cell``, ``scatter_gather``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import oslo_messaging
import pytest
import sqlalchemy as sa

import cellmw
from cellmw import exceptions, rpc, testing
from tests import servers
from tests.fakes import Threads, in_child
from tests.functional import stack
from tests.functional.stack import Api, ApiDatabase, MakeFilter, Serve

client = rpc.get_client(stack.target(server="host"))

Pair = tuple[servers.Database, servers.Database]


def name_in(context: Any) -> str:
    """Where the sessions of a context arrive."""
    with context.db_connection.reader.using(context) as session:
        found: str = session.execute(sa.text("SELECT name FROM here")).scalar()
        return found


def get(
    application: Callable[[Any], Any],
    instance: str,
    handler: Callable[[Any], Any],
    context: Any = None,
) -> Any:
    """What a handler gives in a request for an instance."""
    found: list[Any] = []
    environ = {} if context is None else {"cellmw.context": context}
    api = application(Api(lambda own: found.append(handler(own))))
    response = stack.request(api, f"/servers/{instance}", environ=environ)
    assert response.status_int == 200, response
    return found[0]


def add_cell(
    database: ApiDatabase, name: str, connection: str | None, **values: Any
) -> tuple[str, str]:
    """A cell with this database, and an instance in it."""
    url = values.pop("url", f"cellmw-memory://{name}/")
    cell = database.add_cell(url, name=name, **values)
    database.change_cell(cell, database_connection=connection)
    return cell, database.add_instance(cell)


# The databases of cells.


def test_a_request_has_the_database_of_its_cell(
    pair: Pair, api_database: ApiDatabase, make_filter: MakeFilter
) -> None:
    old, new = pair
    _, in_old = add_cell(api_database, "one", old.url)
    other, in_new = add_cell(api_database, "two", new.url)
    cell0, in_cell0 = add_cell(
        api_database, "cell0", new.url, url="none:///", uuid=CELL0
    )
    served = make_filter(db_connection="true")
    assert get(served, in_old, name_in) == "old"
    assert get(served, in_new, name_in) == "new"
    # It has no queue, and a database all the same.
    assert get(served, in_cell0, name_in) == "new"
    for cell in (other, "two", cell0):
        with cellmw.target_cell(cellmw.RequestContext(), cell) as context:
            assert name_in(context) == "new"
    with cellmw.target_cell(cellmw.RequestContext(), "one") as context:
        with context.db_connection.writer.using(context):
            with cellmw.target_cell(context, "two") as inner:
                # The session of the one cell is not the other's.
                assert name_in(inner) == "new"


CELL0 = "00000000-0000-0000-0000-000000000000"


def test_none_where_there_is_no_database(
    api_database: ApiDatabase, make_filter: MakeFilter
) -> None:
    cell, instance = add_cell(api_database, "one", None)
    nowhere = api_database.add_instance(None)
    served = make_filter(db_connection="true")
    for each in (instance, nowhere):
        # What stood there before is another cell's.
        context = cellmw.RequestContext()
        context.db_connection = "another"
        assert get(served, each, lambda c: c.db_connection, context) is None
    with cellmw.target_cell(context, cell) as cell_context:
        assert cell_context.db_connection is None


def test_without_the_option_it_is_left_alone(
    api_database: ApiDatabase, make_filter: MakeFilter
) -> None:
    cell, instance = add_cell(api_database, "one", "sqlite://")
    context = cellmw.RequestContext()
    context.db_connection = "the service's own"
    served = make_filter()
    own = get(served, instance, lambda c: c.db_connection, context)
    assert own == "the service's own"
    with cellmw.target_cell(context, cell) as cell_context:
        assert cell_context.db_connection == "the service's own"


def test_a_database_that_cannot_be_used_stops_only_who_uses_it(
    api_database: ApiDatabase, make_filter: MakeFilter, serve: Serve
) -> None:
    host = serve("cellmw-memory://one/")
    _, instance = add_cell(api_database, "one", "{scheme}://h/d")

    def handler(context: Any) -> str:
        client.cast(context, "reboot_instance", instance_uuid=instance)
        with pytest.raises(exceptions.DatabaseMisconfigured) as caught:
            name_in(context)
        return str(caught.value)

    message = get(make_filter(db_connection="true"), instance, handler)
    assert "[database] connection is not set" in message
    stack.eventually(lambda: host.instances() == [instance])
    served = make_filter(db_connection="true")(Api(name_in))
    response = stack.request(served, f"/servers/{instance}")
    assert response.status_int == 503


def test_a_template_is_filled_in_over_the_database_group(
    pair: Pair, api_database: ApiDatabase, make_filter: MakeFilter
) -> None:
    old, new = pair
    conf = stack.configuration()
    served = make_filter(db_connection="true", conf=conf)
    conf.set_override("connection", old.url, group="database")
    template = f"{{scheme}}{new.url[new.url.index('://') :]}"
    _, instance = add_cell(api_database, "one", template)
    assert get(served, instance, name_in) == "new"


def test_under_load_a_changed_url_is_followed_and_nothing_fails(
    pair: Pair, api_database: ApiDatabase, make_filter: MakeFilter
) -> None:
    old, new = pair
    cell, instance = add_cell(api_database, "one", old.url)
    served = make_filter(
        db_connection="true", cell_refresh_interval="0.2", lookup_timeout="60"
    )
    barrier = threading.Barrier(17)
    arrived: list[str] = []

    def load() -> None:
        barrier.wait(stack.SOON)
        while arrived.count("new") < 50:
            arrived.append(get(served, instance, name_in))

    with Threads() as threads:
        for _ in range(16):
            threads.start(load)
        barrier.wait(stack.SOON)
        stack.eventually(lambda: len(arrived) > 50)
        api_database.change_cell(cell, database_connection=new.url)
    assert set(arrived) == {"old", "new"}
    if old.kind != "sqlite":

        def gone() -> bool:
            # A request now and then, as an API has it, reads the mappings.
            assert get(served, instance, name_in) == "new"
            return not old.connections()

        stack.eventually(gone)
        assert new.connections()


def test_connections_close_where_nobody_asks_for_the_cell_any_more(
    pair: Pair, api_database: ApiDatabase, make_filter: MakeFilter
) -> None:
    old, new = pair
    cell, instance = add_cell(api_database, "one", old.url)
    context = get(
        make_filter(db_connection="true"),
        instance,
        lambda c: (c, name_in(c))[0],
    )
    manager = context.db_connection
    api_database.change_cell(cell, database_connection=new.url)
    cellmw.refresh_cells(context)
    if old.kind != "sqlite":
        stack.eventually(lambda: not old.connections())
    # What a request was given works on.
    assert context.db_connection is manager
    assert name_in(context) == "old"


def test_a_forked_child_has_connections_of_its_own(
    pair: Pair, api_database: ApiDatabase, make_filter: MakeFilter
) -> None:
    old, _ = pair
    _, instance = add_cell(api_database, "one", old.url)
    served = make_filter(db_connection="true")
    kept = get(served, instance, lambda c: (name_in(c), c)[1])
    before = set() if old.kind == "sqlite" else set(old.connections())

    def child() -> tuple[str, str]:
        # A context that has come along, and a request of its own.
        return name_in(kept), get(served, instance, name_in)

    for _ in range(3):
        assert in_child(child) == ("old", "old")
    if old.kind != "sqlite":
        assert before <= set(old.connections())
    assert name_in(kept) == "old"


# Many cells.


@pytest.fixture(
    params=["memory", pytest.param("rabbit", marks=pytest.mark.servers)]
)
def urls(request: pytest.FixtureRequest) -> list[str]:
    """Of three cells."""
    if request.param == "memory":
        return [f"cellmw-memory://host-{number}/" for number in range(3)]
    make_vhost = request.getfixturevalue("make_vhost")
    return [make_vhost().url for _ in range(3)]


def ask(context: Any, instance: str) -> Any:
    return client.call(context, "get_console_output", instance_uuid=instance)


def test_a_gather_reaches_the_host_of_each_cell(
    urls: list[str],
    api_database: ApiDatabase,
    make_filter: MakeFilter,
    serve: Serve,
) -> None:
    for number, url in enumerate(urls):
        serve(url, stack.Host(f"host-{number}"))
        api_database.add_cell(url, name=f"cell-{number}", disabled=number == 1)
    api_database.add_cell0()
    instance = api_database.add_instance(None)

    def handler(context: Any) -> Any:
        cells = cellmw.cells(context)
        assert [cell.is_cell0 for cell in cells] == [False] * 3 + [True]
        assert [cell.disabled for cell in cells] == [False, True, False, False]
        found = cellmw.scatter_gather(context, cells, ask, instance)
        assert list(found) == cells
        *answers, last = found.values()
        assert isinstance(last, exceptions.CellHasNoQueue)
        return answers

    found = get(make_filter(), instance, handler)
    assert found == [[f"host-{number}", instance] for number in range(3)]


def test_a_host_that_does_not_answer_delays_the_others_by_nothing(
    urls: list[str],
    api_database: ApiDatabase,
    make_filter: MakeFilter,
    serve: Serve,
) -> None:
    hosts: list[stack.Host] = [
        stack.Host("zero"),
        stack.SlowHost("slow"),
        stack.Host("two"),
    ]
    slow = hosts[1]
    assert isinstance(slow, stack.SlowHost)
    for number, (url, host) in enumerate(zip(urls, hosts, strict=True)):
        serve(url, host)
        api_database.add_cell(url, name=f"cell-{number}")
    instance = api_database.add_instance(None)
    ended = threading.Event()

    def work(context: Any) -> Any:
        try:
            return ask(context, instance)
        finally:
            if context.cell_uuid == cells[1].uuid:
                ended.set()

    cells: list[cellmw.KnownCell] = []

    def handler(context: Any) -> Any:
        cells.extend(cellmw.cells(context))
        return cellmw.scatter_gather(context, cells, work, timeout=8)

    found = list(get(make_filter(), instance, handler).values())
    assert slow.busy.is_set()
    assert found[0] == ["zero", instance]
    assert isinstance(found[1], cellmw.CellTimeout)
    assert found[2] == ["two", instance]
    # The late one ends as every other, with its lease.
    slow.go_on.set()
    assert ended.wait(stack.SOON)
    assert isinstance(found[1], cellmw.CellTimeout)


@pytest.mark.parametrize("count", [1, 20, 200])
def test_cells_that_hang_and_fail_among_many(
    count: int,
    api_database: ApiDatabase,
    make_filter: MakeFilter,
    serve: Serve,
) -> None:
    """Every tenth cell's broker hangs, and every tenth refuses."""
    names = [f"cell-{number}" for number in range(count)]
    for name in names:
        api_database.add_cell(f"cellmw-memory://{name}/", name=name)
    instance = api_database.add_instance(None)
    target = oslo_messaging.Target(topic="t")
    hanging, refusing = names[0::10], names[1::10]
    for name in hanging:
        testing.broker_of(f"cellmw-memory://{name}/").hang()
    for name in refusing:
        testing.broker_of(f"cellmw-memory://{name}/").refuse()

    def work(context: Any) -> str:
        rpc.get_client(target).cast(context, "ping")
        return "sent"

    def handler(context: Any) -> Any:
        return cellmw.scatter_gather(context, names, work, timeout=6)

    served = make_filter(send_timeout="12", transport_cache_size="256")
    found = get(served, instance, handler)
    assert list(found) == names
    for name in hanging:
        assert isinstance(found.pop(name), cellmw.CellTimeout)
    for name in refusing:
        assert isinstance(found.pop(name), cellmw.CellUnavailable)
    assert set(found.values()) <= {"sent"}
    for name in hanging:
        testing.broker_of(f"cellmw-memory://{name}/").heal()
