# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The API database's tables in the words of each database.

Written down apart from the package, so that the tests see when its tables
become others than Nova's.
"""

from __future__ import annotations

import sqlalchemy as sa

from tests import servers

_WORDS = {
    "sqlite": {
        "ID": "id INTEGER NOT NULL",
        "TIME": "DATETIME",
        "BOOLEAN": "BOOLEAN",
        "OPTIONS": "",
    },
    "mysql": {
        "ID": "id INTEGER NOT NULL AUTO_INCREMENT",
        "TIME": "DATETIME",
        "BOOLEAN": "BOOL",
        "OPTIONS": "ENGINE=InnoDB CHARSET=utf8",
    },
    "postgresql": {
        "ID": "id SERIAL NOT NULL",
        "TIME": "TIMESTAMP WITHOUT TIME ZONE",
        "BOOLEAN": "BOOLEAN",
        "OPTIONS": "",
    },
}

_TABLES = (
    """
    CREATE TABLE cell_mappings (
        created_at {TIME}, updated_at {TIME}, {ID},
        uuid VARCHAR(36) NOT NULL,
        name VARCHAR(255),
        transport_url TEXT,
        database_connection TEXT,
        disabled {BOOLEAN},
        PRIMARY KEY (id),
        CONSTRAINT uniq_cell_mappings0uuid UNIQUE (uuid)
    ) {OPTIONS}
    """,
    "CREATE INDEX uuid_idx ON cell_mappings (uuid)",
    """
    CREATE TABLE instance_mappings (
        created_at {TIME}, updated_at {TIME}, {ID},
        instance_uuid VARCHAR(36) NOT NULL,
        cell_id INTEGER,
        project_id VARCHAR(255) NOT NULL,
        queued_for_delete {BOOLEAN},
        user_id VARCHAR(255),
        PRIMARY KEY (id),
        CONSTRAINT uniq_instance_mappings0instance_uuid
            UNIQUE (instance_uuid),
        FOREIGN KEY (cell_id) REFERENCES cell_mappings (id)
    ) {OPTIONS}
    """,
    "CREATE INDEX instance_uuid_idx ON instance_mappings (instance_uuid)",
    "CREATE INDEX project_id_idx ON instance_mappings (project_id)",
    "CREATE INDEX instance_mappings_user_id_project_id_idx "
    "ON instance_mappings (user_id, project_id)",
)

# What else Nova has in the same database, as much as matters here.
_NOVA = (
    """
    CREATE TABLE host_mappings (
        created_at {TIME}, updated_at {TIME}, {ID},
        cell_id INTEGER NOT NULL,
        host VARCHAR(255) NOT NULL,
        PRIMARY KEY (id),
        CONSTRAINT uniq_host_mappings0host UNIQUE (host),
        FOREIGN KEY (cell_id) REFERENCES cell_mappings (id)
    ) {OPTIONS}
    """,
    """
    CREATE TABLE request_specs (
        created_at {TIME}, updated_at {TIME}, {ID},
        instance_uuid VARCHAR(36) NOT NULL,
        spec TEXT NOT NULL,
        PRIMARY KEY (id)
    ) {OPTIONS}
    """,
    "CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)",
    "INSERT INTO alembic_version (version_num) VALUES ('cdeec0c85668')",
)


def _execute(database: servers.Database, templates: tuple[str, ...]) -> None:
    engine = sa.create_engine(database.url, poolclass=sa.NullPool)
    with engine.begin() as connection:
        for template in templates:
            connection.exec_driver_sql(
                template.format(**_WORDS[database.kind])
            )


def create_tables(database: servers.Database) -> None:
    """Make the two tables."""
    _execute(database, _TABLES)


def create_nova_tables(database: servers.Database) -> None:
    """Make what ``nova-manage api_db sync`` makes, as far as it matters."""
    _execute(database, _TABLES + _NOVA)
