# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The two tables as Nova's release 2023.1 has them.

Each part is made only where it is missing: on MariaDB a statement that
changes the schema cannot be rolled back, so a sync that was interrupted has
left a part of this, and the next one makes the rest.
"""

from __future__ import annotations

from collections.abc import Mapping

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_INDEXES: Mapping[str, Mapping[str, list[str]]] = {
    "cell_mappings": {"uuid_idx": ["uuid"]},
    "instance_mappings": {
        "instance_uuid_idx": ["instance_uuid"],
        "project_id_idx": ["project_id"],
        "instance_mappings_user_id_project_id_idx": ["user_id", "project_id"],
    },
}


def upgrade() -> None:
    """Make the tables and their indexes."""
    inspector = sa.inspect(op.get_bind())
    if not inspector.has_table("cell_mappings"):
        _create_cell_mappings()
    if not inspector.has_table("instance_mappings"):
        _create_instance_mappings()
    inspector.clear_cache()
    for table, indexes in _INDEXES.items():
        there = {index["name"] for index in inspector.get_indexes(table)}
        for name, columns in indexes.items():
            if name not in there:
                op.create_index(name, table, columns)


def _create_cell_mappings() -> None:
    op.create_table(
        "cell_mappings",
        sa.Column("created_at", sa.DateTime),
        sa.Column("updated_at", sa.DateTime),
        sa.Column("id", sa.Integer, primary_key=True, nullable=False),
        sa.Column("uuid", sa.String(36), nullable=False),
        sa.Column("name", sa.String(255)),
        sa.Column("transport_url", sa.Text),
        sa.Column("database_connection", sa.Text),
        sa.Column("disabled", sa.Boolean),
        sa.UniqueConstraint("uuid", name="uniq_cell_mappings0uuid"),
        mysql_engine="InnoDB",
        mysql_charset="utf8",
    )


def _create_instance_mappings() -> None:
    op.create_table(
        "instance_mappings",
        sa.Column("created_at", sa.DateTime),
        sa.Column("updated_at", sa.DateTime),
        sa.Column("id", sa.Integer, primary_key=True, nullable=False),
        sa.Column("instance_uuid", sa.String(36), nullable=False),
        sa.Column("cell_id", sa.Integer, sa.ForeignKey("cell_mappings.id")),
        sa.Column("project_id", sa.String(255), nullable=False),
        sa.Column("queued_for_delete", sa.Boolean),
        sa.Column("user_id", sa.String(255)),
        sa.UniqueConstraint(
            "instance_uuid", name="uniq_instance_mappings0instance_uuid"
        ),
        mysql_engine="InnoDB",
        mysql_charset="utf8",
    )
