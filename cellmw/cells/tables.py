# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The two tables of the API database that tell where an instance is.

They are Nova's: names, types, indexes and constraints are those that
``nova-manage api_db sync`` makes, so that a database made by either serves
both.  Nothing here reads or writes; the store and the migrations do.
"""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData()

cell_mappings = sa.Table(
    "cell_mappings",
    metadata,
    sa.Column("created_at", sa.DateTime),
    sa.Column("updated_at", sa.DateTime),
    sa.Column("id", sa.Integer, primary_key=True, nullable=False),
    sa.Column("uuid", sa.String(36), nullable=False),
    sa.Column("name", sa.String(255)),
    sa.Column("transport_url", sa.Text),
    sa.Column("database_connection", sa.Text),
    sa.Column("disabled", sa.Boolean, default=False),
    sa.UniqueConstraint("uuid", name="uniq_cell_mappings0uuid"),
    sa.Index("uuid_idx", "uuid"),
    mysql_engine="InnoDB",
    mysql_charset="utf8",
)

instance_mappings = sa.Table(
    "instance_mappings",
    metadata,
    sa.Column("created_at", sa.DateTime),
    sa.Column("updated_at", sa.DateTime),
    sa.Column("id", sa.Integer, primary_key=True, nullable=False),
    sa.Column("instance_uuid", sa.String(36), nullable=False),
    sa.Column("cell_id", sa.Integer, sa.ForeignKey("cell_mappings.id")),
    sa.Column("project_id", sa.String(255), nullable=False),
    sa.Column("queued_for_delete", sa.Boolean, default=False),
    sa.Column("user_id", sa.String(255)),
    sa.UniqueConstraint(
        "instance_uuid", name="uniq_instance_mappings0instance_uuid"
    ),
    sa.Index("instance_uuid_idx", "instance_uuid"),
    sa.Index("project_id_idx", "project_id"),
    sa.Index(
        "instance_mappings_user_id_project_id_idx", "user_id", "project_id"
    ),
    mysql_engine="InnoDB",
    mysql_charset="utf8",
)
