# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Making the tables, and leaving alone those of others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from cellmw.cells import migrations
from cellmw.cells.tables import metadata
from tests import servers
from tests.functional.database import kinds, schema
from tests.functional.database.engines import make_engine


@pytest.fixture
def empty(database: servers.Database) -> Iterator[sa.Engine]:
    engine = make_engine(database.url)
    yield engine
    engine.dispose()


def tables_of(engine: sa.Engine) -> set[str]:
    return set(sa.inspect(engine).get_table_names())


def described(engine: sa.Engine) -> dict[str, Any]:
    """All that the database tells of the two tables."""
    inspector = sa.inspect(engine)
    return {
        name: {
            "columns": {
                column["name"]: (
                    str(column["type"]),
                    column["nullable"],
                    bool(column.get("autoincrement", True)),
                )
                for column in inspector.get_columns(name)
            },
            "primary key": inspector.get_pk_constraint(name)[
                "constrained_columns"
            ],
            "foreign keys": [
                (key["constrained_columns"], key["referred_table"])
                for key in inspector.get_foreign_keys(name)
            ],
            "unique": sorted(
                (unique["name"] or "", unique["column_names"])
                for unique in inspector.get_unique_constraints(name)
            ),
            "indexes": sorted(
                (index["name"] or "", index["column_names"], index["unique"])
                for index in inspector.get_indexes(name)
            ),
        }
        for name in metadata.tables
    }


def test_the_tables_are_made_and_then_left_as_they_are(
    empty: sa.Engine,
) -> None:
    assert migrations.sync(empty) == migrations.Outcome(None, "0001")
    assert tables_of(empty) == {*metadata.tables, migrations.VERSION_TABLE}
    assert migrations.sync(empty) == migrations.Outcome("0001", "0001")


def test_the_tables_are_those_of_the_schema(
    empty: sa.Engine, database: servers.Database
) -> None:
    migrations.sync(empty)
    ours = described(empty)
    with servers.DATABASES[
        {"mysql": "mariadb"}.get(database.kind, database.kind)
    ]() as other:
        schema.create_tables(other)
        engine = make_engine(other.url)
        assert ours == described(engine)
        engine.dispose()


def test_the_tables_are_those_that_the_store_knows(empty: sa.Engine) -> None:
    migrations.sync(empty)
    with empty.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"version_table": migrations.VERSION_TABLE}
        )
        differences = compare_metadata(context, metadata)
    # A comment on the table holds the revision for users with few rights.
    assert {kind for kind, *_ in differences} <= {"remove_table_comment"}


def test_another_alembic_in_the_same_database_is_not_disturbed(
    empty: sa.Engine,
) -> None:
    with empty.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)"
        )
        connection.exec_driver_sql(
            "INSERT INTO alembic_version (version_num) VALUES ('abc')"
        )
    assert migrations.sync(empty).after == "0001"
    with empty.connect() as connection:
        versions = connection.exec_driver_sql(
            "SELECT version_num FROM alembic_version"
        ).all()
    assert [tuple(row) for row in versions] == [("abc",)]


@pytest.mark.parametrize(
    "make, owner",
    [
        (schema.create_nova_tables, "Nova"),
        (schema.create_tables, "somebody else"),
    ],
)
def test_tables_of_others_are_left_alone(
    empty: sa.Engine,
    database: servers.Database,
    make: Callable[[servers.Database], None],
    owner: str,
) -> None:
    make(database)
    before = tables_of(empty)
    outcome = migrations.sync(empty)
    assert outcome == migrations.Outcome(managed_by=owner)
    assert tables_of(empty) == before


@pytest.mark.parametrize(
    "statement, missing",
    [
        ("DROP TABLE instance_mappings", "instance_mappings lacks"),
        ("ALTER TABLE cell_mappings DROP COLUMN disabled", "lacks disabled"),
    ],
)
def test_tables_of_others_that_cannot_serve_are_refused(
    empty: sa.Engine,
    database: servers.Database,
    statement: str,
    missing: str,
) -> None:
    schema.create_tables(database)
    with empty.begin() as connection:
        connection.exec_driver_sql(statement)
    before = tables_of(empty)
    with pytest.raises(migrations.SchemaRefused, match=missing):
        migrations.sync(empty)
    assert tables_of(empty) == before


def test_the_database_of_a_cell_is_refused(empty: sa.Engine) -> None:
    with empty.begin() as connection:
        for name in ("instances", "compute_nodes", "services"):
            connection.exec_driver_sql(f"CREATE TABLE {name} (id INTEGER)")
    before = tables_of(empty)
    with pytest.raises(migrations.SchemaRefused, match="database of a cell"):
        migrations.sync(empty)
    assert tables_of(empty) == before


@pytest.mark.parametrize(
    "undone",
    [
        ["DROP TABLE instance_mappings"],
        ["DROP TABLE instance_mappings", "DROP TABLE cell_mappings"],
        ["DROP INDEX project_id_idx"],
    ],
)
def test_a_sync_that_was_interrupted_is_completed_by_the_next(
    empty: sa.Engine, database: servers.Database, undone: list[str]
) -> None:
    # On MariaDB what was made so far stays, without the revision.
    migrations.sync(empty)
    whole = described(empty)
    with empty.begin() as connection:
        connection.exec_driver_sql(f"DELETE FROM {migrations.VERSION_TABLE}")
        for statement in undone:
            if "INDEX" in statement and database.kind == "mysql":
                # It is made whole, and used once.
                statement = f"{statement} ON instance_mappings"  # noqa: PLW2901
            connection.exec_driver_sql(statement)
    assert migrations.sync(empty) == migrations.Outcome(None, "0001")
    assert described(empty) == whole


@pytest.fixture
def writer(
    empty: sa.Engine, database: servers.Database
) -> Iterator[sa.Engine]:
    """A user with the rights that the documentation names, and tables."""
    migrations.sync(empty)
    name = servers.unique("writer")
    postgresql = database.kind == "postgresql"
    how = "PASSWORD" if postgresql else "IDENTIFIED BY"
    database.administer(f"CREATE USER {name} {how} 'Zpw'")
    with empty.begin() as connection:
        for table in metadata.tables:
            connection.exec_driver_sql(
                f"GRANT SELECT, INSERT, UPDATE, DELETE ON {table} TO {name}"
            )
    engine = make_engine(database.url_as(name, "Zpw"))
    yield engine
    engine.dispose()
    if postgresql:
        with empty.begin() as connection:
            connection.exec_driver_sql(f"DROP OWNED BY {name}")
    database.administer(f"DROP USER {name}")


@pytest.mark.servers
@pytest.mark.parametrize("database", kinds.SERVERS, indirect=True)
def test_a_user_with_the_documented_rights_sees_whose_tables_they_are(
    empty: sa.Engine, writer: sa.Engine
) -> None:
    assert migrations.sync(writer) == migrations.Outcome("0001", "0001")
    text = f"{migrations._MARK}0000"
    table = sa.Table("cell_mappings", sa.MetaData(), comment=text)
    with empty.begin() as connection:
        connection.execute(sa.schema.SetTableComment(table))
    with pytest.raises(migrations.SchemaRefused, match="from revision 0000"):
        migrations.sync(writer)
    # Tables that were made before they had a comment.
    with empty.begin() as connection:
        connection.execute(sa.schema.DropTableComment(table))
    with pytest.raises(migrations.SchemaRefused, match="cannot see who man"):
        migrations.sync(writer)
    migrations.sync(empty)
    assert migrations.sync(writer) == migrations.Outcome("0001", "0001")
