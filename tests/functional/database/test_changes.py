# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Writing cell and instance mappings, on each kind of database."""

from __future__ import annotations

import concurrent.futures
import datetime
import functools
import threading
import uuid
from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa

from cellmw.cells.changes import Changes
from cellmw.cells.instance_changes import InstanceMapping, Tally
from cellmw.cells.mapping import CELL0_UUID, CellMapping, expand
from cellmw.cells.store import Store
from cellmw.cells.tables import cell_mappings, instance_mappings
from cellmw.cells.transactions import ChangeRefused
from cellmw.redaction import Secret
from tests import servers
from tests.functional.database import kinds
from tests.functional.database.engines import make_engine

ONE = "3a0a4dd6-7cb9-4a9c-9a0b-7b1d2b6a0001"
TWO = "3a0a4dd6-7cb9-4a9c-9a0b-7b1d2b6a0002"
# The tables know no zones.
NOW = datetime.datetime(2031, 2, 3, 4, 5, 6)  # noqa: DTZ001
BASE = "rabbit://u:p@base:5672/v"


def instance(number: int) -> str:
    return f"5f4b3a52-39d5-4c11-8f2b-{number:012}"


def cell(uuid: str, url: str | None, **fields: object) -> CellMapping:
    return CellMapping(
        uuid=uuid,
        transport_url=None if url is None else Secret(url),
        # Each test gives what fits.
        **fields,  # type: ignore[arg-type]
    )


def mapped(
    number: int, cell_uuid: str | None = ONE, **fields: str | None
) -> InstanceMapping:
    return InstanceMapping(
        instance_uuid=instance(number),
        cell_uuid=cell_uuid,
        project_id=fields.pop("project_id", None) or "p",
        # The same.
        **fields,  # type: ignore[arg-type]
    )


@pytest.fixture
def changes(engine: sa.Engine) -> Changes:
    return Changes(
        engine,
        expand=functools.partial(
            expand,
            base_url=BASE,
            known_drivers=frozenset({"rabbit", "fake"}),
        ),
        now=lambda: NOW,
    )


@pytest.fixture
def cells(changes: Changes, engine: sa.Engine) -> list[CellMapping]:
    """Two cells that are there."""
    changes.create_cell(cell(ONE, "rabbit://u:p@one/v", name="one"))
    changes.create_cell(cell(TWO, "rabbit://u:p@two/v", name="two"))
    return Store(lambda: engine).cells()


def rows(engine: sa.Engine, table: sa.Table) -> list[dict[str, object]]:
    with engine.connect() as connection:
        found = connection.execute(sa.select(table).order_by(table.c.id))
        return [dict(row) for row in found.mappings()]


def test_a_cell_is_created_with_all_that_it_has(
    changes: Changes, engine: sa.Engine
) -> None:
    changes.create_cell(
        CellMapping(
            uuid=ONE,
            name="one",
            transport_url=Secret("rabbit://u:p@h/v"),
            database_connection=Secret("mysql://u:p@h/d"),
            disabled=True,
        )
    )
    (row,) = rows(engine, cell_mappings)
    assert row.pop("id")
    assert row == {
        "uuid": ONE,
        "name": "one",
        "transport_url": "rabbit://u:p@h/v",
        "database_connection": "mysql://u:p@h/d",
        "disabled": True,
        "created_at": NOW,
        "updated_at": None,
    }


@pytest.mark.parametrize(
    "other, what",
    [
        (cell(ONE, "rabbit://u:p@new/v"), "already exists"),
        (cell(TWO, "rabbit://u:p@new/v", name="one"), "same name"),
        (cell(TWO, "rabbit://u:p@one:5672/v"), "same broker"),
        (cell(TWO, "rabbit://a:b@x,a:b@ONE/v"), "same broker"),
        (
            cell(
                TWO,
                "rabbit://u:p@new/v",
                database_connection=Secret("mysql://u:p@h/d"),
            ),
            "same database",
        ),
    ],
)
def test_a_duplicate_cell_is_refused(
    changes: Changes, engine: sa.Engine, other: CellMapping, what: str
) -> None:
    changes.create_cell(
        cell(
            ONE,
            "rabbit://u:p@one/v",
            name="one",
            database_connection=Secret("mysql://u:p@h/d"),
        )
    )
    with pytest.raises(ChangeRefused, match=what):
        changes.create_cell(other)
    assert len(rows(engine, cell_mappings)) == 1


def test_cells_that_differ_in_what_matters_are_no_duplicates(
    changes: Changes, engine: sa.Engine
) -> None:
    urls = [
        *("rabbit://u:p@one/v", "rabbit://u:p@one/w", "rabbit://u:p@one:1/v"),
        *("fake://one/v", "{scheme}://{hostname}/{path}1", "none:///"),
        None,
    ]
    for number, url in enumerate(urls, 1):
        changes.create_cell(cell(instance(number), url))
    # cell0 has another cell's broker in some deployments.
    changes.create_cell(cell(CELL0_UUID, "rabbit://u:p@one/v"))
    assert len(rows(engine, cell_mappings)) == len(urls) + 1


def test_a_cell_is_changed_in_what_is_given(
    changes: Changes, engine: sa.Engine, cells: list[CellMapping]
) -> None:
    changed = changes.update_cell(ONE, disabled=True, name="uno")
    first, second = rows(engine, cell_mappings)
    assert (first["name"], first["disabled"]) == ("uno", True)
    assert first["transport_url"] == "rabbit://u:p@one/v"
    assert (first["updated_at"], second["updated_at"]) == (NOW, None)
    assert changed.name == "uno"
    assert changed == Store(lambda: engine).cells()[0]


def test_a_change_that_makes_a_duplicate_is_refused(
    changes: Changes, engine: sa.Engine, cells: list[CellMapping]
) -> None:
    before = rows(engine, cell_mappings)
    for values in (
        {"name": "two"},
        {"transport_url": Secret("rabbit://x:y@two:5672/v")},
    ):
        with pytest.raises(ChangeRefused, match=TWO):
            changes.update_cell(ONE, **values)
    with pytest.raises(ChangeRefused, match=r"cell .* does not exist"):
        changes.update_cell(CELL0_UUID, name="x")
    assert rows(engine, cell_mappings) == before


def test_duplicates_that_are_there_do_not_hinder_other_changes(
    changes: Changes, engine: sa.Engine, cells: list[CellMapping]
) -> None:
    with engine.begin() as connection:
        connection.execute(
            sa.update(cell_mappings).values(transport_url="rabbit://u:p@one/v")
        )
    assert changes.update_cell(ONE, name="uno").name == "uno"
    changes.update_cell(ONE, transport_url=Secret("rabbit://u:p@new/v"))


def test_a_cell_with_instances_is_not_deleted(
    changes: Changes, engine: sa.Engine, cells: list[CellMapping]
) -> None:
    changes.map_instances([mapped(number) for number in (1, 2, 3)])
    with engine.begin() as connection:
        connection.execute(
            sa.update(instance_mappings)
            .where(instance_mappings.c.instance_uuid == instance(2))
            .values(queued_for_delete=True)
        )
    with pytest.raises(ChangeRefused) as caught:
        changes.delete_cell(ONE)
    assert str(caught.value) == (
        f"3 instances are mapped to cell {ONE} (1 of them queued for delete)"
    )
    one = cells[0].id
    assert one is not None
    assert changes.count_instances(one) == (3, 1)
    changes.delete_cell(TWO)
    for number in (1, 2):
        changes.unmap_instance(instance(number))
    with pytest.raises(ChangeRefused, match="1 instance is mapped"):
        changes.delete_cell(ONE)
    changes.unmap_instance(instance(3))
    changes.delete_cell(ONE)
    assert rows(engine, cell_mappings) == []
    with pytest.raises(ChangeRefused, match=r"cell .* does not exist"):
        changes.delete_cell(ONE)


@kinds.only(tables=["nova"])
def test_a_cell_with_hosts_of_nova_is_not_deleted(
    changes: Changes, engine: sa.Engine, cells: list[CellMapping]
) -> None:
    with engine.begin() as connection:
        connection.execute(
            sa.text(
                "INSERT INTO host_mappings (cell_id, host) VALUES (:i, 'h')"
            ),
            {"i": cells[0].id},
        )
    with pytest.raises(ChangeRefused, match="1 host is mapped"):
        changes.delete_cell(ONE)


def test_what_was_mapped_meanwhile_keeps_a_cell_from_being_deleted(
    changes: Changes,
    engine: sa.Engine,
    cells: list[CellMapping],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes.map_instances([mapped(1)])
    monkeypatch.setattr(
        "cellmw.cells.instance_changes.count_in_cell", lambda *args: (0, 0)
    )
    with pytest.raises(ChangeRefused, match="just been mapped"):
        changes.delete_cell(ONE)
    assert len(rows(engine, cell_mappings)) == 2


def test_instances_are_mapped_with_all_that_they_have(
    changes: Changes, engine: sa.Engine, cells: list[CellMapping]
) -> None:
    wanted = [mapped(1, project_id="p1", user_id="u1"), mapped(2, TWO)]
    assert changes.check_instances(wanted) == Tally(added=2)
    assert rows(engine, instance_mappings) == []
    assert changes.map_instances(wanted) == Tally(added=2)
    first, second = rows(engine, instance_mappings)
    assert first.pop("id")
    assert first == {
        "instance_uuid": instance(1),
        "cell_id": cells[0].id,
        "project_id": "p1",
        "user_id": "u1",
        "queued_for_delete": False,
        "created_at": NOW,
        "updated_at": None,
    }
    assert (second["cell_id"], second["user_id"]) == (cells[1].id, None)
    assert changes.instance(instance(1)) == wanted[0]
    assert changes.instance(instance(3)) is None


def test_mapping_again_changes_nothing(
    changes: Changes, engine: sa.Engine, cells: list[CellMapping]
) -> None:
    wanted = [mapped(1, user_id="u"), mapped(2)]
    changes.map_instances(wanted)
    before = rows(engine, instance_mappings)
    assert changes.map_instances(wanted) == Tally(unchanged=2)
    # The user that was not asked for stays.
    assert changes.map_instances([mapped(1)]) == Tally(unchanged=1)
    assert rows(engine, instance_mappings) == before


@pytest.mark.parametrize(
    "other, what",
    [
        (mapped(1, TWO), f"cell {ONE}"),
        (mapped(1, project_id="q"), "project p"),
        (mapped(1, user_id="w"), "user u"),
        (mapped(1, TWO, project_id="q"), f"cell {ONE} and project p"),
    ],
)
def test_a_mapping_that_says_something_else_is_changed_on_demand_only(
    changes: Changes,
    engine: sa.Engine,
    cells: list[CellMapping],
    other: InstanceMapping,
    what: str,
) -> None:
    changes.map_instances([mapped(1, user_id="u")])
    before = rows(engine, instance_mappings)
    for call in (changes.check_instances, changes.map_instances):
        with pytest.raises(ChangeRefused, match=what):
            call([mapped(2), other])
    assert rows(engine, instance_mappings) == before
    tally = changes.map_instances([mapped(2), other], replace=True)
    assert tally == Tally(added=1, changed=1)
    now = changes.instance(instance(1))
    assert now is not None
    assert now.cell_uuid == other.cell_uuid
    assert now.project_id == other.project_id
    assert now.user_id == (other.user_id or "u")
    assert rows(engine, instance_mappings)[0]["updated_at"] == NOW


def test_a_mapping_without_a_cell_gets_one(
    changes: Changes, engine: sa.Engine, cells: list[CellMapping]
) -> None:
    with engine.begin() as connection:
        connection.execute(
            sa.insert(instance_mappings).values(
                instance_uuid=instance(1), project_id="p"
            )
        )
    found = changes.instance(instance(1))
    assert found is not None
    assert found.cell_uuid is None
    assert changes.map_instances([mapped(1)]) == Tally(changed=1)
    assert Store(lambda: engine).cell_of(instance(1)) == (
        cells[0].id,
        cells[0].uuid,
    )


def test_a_user_that_the_mapping_lacks_is_added_on_demand_only(
    changes: Changes, cells: list[CellMapping], engine: sa.Engine
) -> None:
    changes.map_instances([mapped(1)])
    wanted = [mapped(1, user_id="u")]
    assert changes.map_instances(wanted) == Tally(unchanged=1)
    assert changes.map_instances(wanted, replace=True) == Tally(changed=1)
    assert rows(engine, instance_mappings)[0]["user_id"] == "u"
    assert changes.map_instances(wanted, replace=True) == Tally(unchanged=1)


def test_an_unknown_cell_maps_nothing(
    changes: Changes, engine: sa.Engine, cells: list[CellMapping]
) -> None:
    with pytest.raises(ChangeRefused, match=CELL0_UUID):
        changes.map_instances([mapped(1), mapped(2, CELL0_UUID)])
    assert rows(engine, instance_mappings) == []


def test_an_instance_that_is_not_mapped_cannot_be_unmapped(
    changes: Changes, cells: list[CellMapping]
) -> None:
    with pytest.raises(ChangeRefused, match="is not mapped"):
        changes.unmap_instance(instance(1))


@kinds.only(kinds.SERVERS)
def test_two_who_map_the_same_instances_at_once_both_succeed(
    changes: Changes, cells: list[CellMapping]
) -> None:
    barrier = threading.Barrier(2)
    tallies: list[Tally] = []

    def run(order: Callable[[range], list[int]]) -> None:
        barrier.wait()
        for start in range(0, 200, 20):
            batch = [mapped(n) for n in order(range(start, start + 20))]
            tallies.append(changes.map_instances(batch))

    threads = [
        threading.Thread(target=run, args=(order,))
        for order in (list, lambda numbers: list(reversed(numbers)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total = sum(tallies, Tally())
    assert total == Tally(added=200, unchanged=200)


@pytest.mark.parametrize("field", ["name", "broker", "database"])
def test_of_duplicates_that_come_at_once_one_is_created(
    changes: Changes, engine: sa.Engine, field: str
) -> None:
    rounds, at_once = 5, 4
    barrier = threading.Barrier(at_once, timeout=30)
    refused: list[str] = []

    def run(number: int) -> None:
        for round_ in range(rounds):
            own = f"{round_}-{number}"
            same = dict.fromkeys(("name", "broker", "database"), own)
            same[field] = f"{round_}"
            mapping = cell(
                str(uuid.uuid4()),
                f"rabbit://u:p@{same['broker']}/v",
                name=same["name"],
                database_connection=Secret(
                    f"mysql://u:p@h/{same['database']}"
                ),
            )
            barrier.wait()
            try:
                changes.create_cell(mapping)
            except ChangeRefused as error:
                refused.append(str(error))

    at_once_run(run, at_once)
    assert len(rows(engine, cell_mappings)) == rounds
    assert len(refused) == rounds * (at_once - 1)
    assert all("has the same" in text for text in refused)


def test_of_updates_to_the_same_that_come_at_once_one_is_made(
    changes: Changes, cells: list[CellMapping], engine: sa.Engine
) -> None:
    barrier = threading.Barrier(2, timeout=30)
    refused: list[str] = []

    def run(number: int) -> None:
        for round_ in range(10):
            barrier.wait()
            try:
                changes.update_cell((ONE, TWO)[number], name=f"{round_}")
            except ChangeRefused as error:
                refused.append(str(error))

    at_once_run(run, 2)
    assert len(refused) == 10
    assert len({row["name"] for row in rows(engine, cell_mappings)}) == 2


def at_once_run(run: Callable[[int], None], count: int) -> None:
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        for job in [pool.submit(run, number) for number in range(count)]:
            job.result(timeout=120)


def test_a_change_that_is_refused_keeps_nobody_out(
    changes: Changes, cells: list[CellMapping], api_database: servers.Database
) -> None:
    with pytest.raises(ChangeRefused):
        changes.create_cell(cells[0])
    other = make_engine(api_database.url)
    try:
        Changes(other, expand=changes._expand).update_cell(ONE, name="new")
    finally:
        other.dispose()


@pytest.fixture
def writer(api_database: servers.Database) -> Iterator[sa.Engine]:
    """The engine of who has the rights that the documentation names."""
    name = servers.unique("writer")
    rights = [
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON {table} TO {name}"
        for table in (cell_mappings.name, instance_mappings.name)
    ]
    identified = "IDENTIFIED BY"
    if api_database.kind == "postgresql":
        identified = "PASSWORD"
        rights += [
            f"GRANT USAGE ON SEQUENCE {table}_id_seq TO {name}"
            for table in (cell_mappings.name, instance_mappings.name)
        ]
    api_database.administer(f"CREATE USER {name} {identified} 'Zpw'")
    owner = sa.create_engine(api_database.url, poolclass=sa.NullPool)
    if sa.inspect(owner).has_table("host_mappings"):
        rights.append(f"GRANT SELECT ON host_mappings TO {name}")
    with owner.begin() as connection:
        for right in rights:
            connection.exec_driver_sql(right)
    of_writer = make_engine(api_database.url_as(name, "Zpw"))
    yield of_writer
    of_writer.dispose()
    if api_database.kind == "postgresql":
        with owner.begin() as connection:
            connection.exec_driver_sql(f"DROP OWNED BY {name}")
    api_database.administer(f"DROP USER {name}")


@kinds.only(kinds.SERVERS)
def test_the_rights_in_the_documentation_are_enough(
    changes: Changes, writer: sa.Engine
) -> None:
    own = Changes(writer, expand=changes._expand)
    database = Secret("mysql://u:p@h/d")
    own.create_cell(cell(ONE, "rabbit://h/v", database_connection=database))
    own.update_cell(ONE, name="new")
    own.map_instances([mapped(1)])
    with pytest.raises(ChangeRefused, match="1 instance is mapped"):
        own.delete_cell(ONE)
    own.unmap_instance(instance(1))
    own.delete_cell(ONE)
