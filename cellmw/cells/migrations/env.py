# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What alembic runs to apply the steps, on the connection that it is given."""

from __future__ import annotations

from alembic import context

from cellmw.cells.migrations import VERSION_TABLE
from cellmw.cells.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
)
with context.begin_transaction():
    context.run_migrations()
