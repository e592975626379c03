# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The ``cellmw-manage db`` commands, which manage the tables."""

from __future__ import annotations

import argparse

from cellmw.cells import migrations
from cellmw.cli import base


class DbSync(base.Command):
    """Create or upgrade the tables of the API database.

    The command does not change tables that Nova or another tool manages.
    """

    may_make_database = True

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        """Create or upgrade the tables, and print the outcome."""
        outcome = migrations.sync(self.configuration.engine)
        self.app.stdout.write(f"{_describe(outcome)}\n")


def _describe(outcome: migrations.Outcome) -> str:
    if outcome.managed_by == "Nova":
        return (
            "Nova manages the tables of this database; nothing was changed. "
            "nova-manage api_db sync upgrades them."
        )
    if outcome.managed_by is not None:
        return (
            f"{outcome.managed_by.capitalize()} manages the tables of this "
            "database, and they can be used; nothing was changed."
        )
    if outcome.before == outcome.after:
        return f"The tables are up to date (revision {outcome.after})."
    if outcome.before is None:
        return f"The tables were created (revision {outcome.after})."
    return (
        f"The tables were upgraded from revision {outcome.before} to "
        f"{outcome.after}."
    )
