# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The steps of the schema, each a module that alembic runs."""
