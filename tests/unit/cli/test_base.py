# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What commands say of a database that refuses."""

from __future__ import annotations

import io

import pytest
import sqlalchemy as sa
from oslo_db import exception as db_exception

from cellmw.cli import arguments, base
from cellmw.redaction import KNOWN, Secret


def refused(text: str) -> sa.exc.DBAPIError:
    """What SQLAlchemy makes of an error of a driver."""
    return sa.exc.DBAPIError(
        "INSERT INTO cell_mappings", {"transport_url": "Zpw"}, Exception(text)
    )


@pytest.mark.parametrize("wrap", [lambda error: error, db_exception.DBError])
def test_only_the_drivers_first_line_is_told(wrap: object) -> None:
    # What follows on PostgreSQL quotes the statement, or the whole row.
    error = refused(
        "null value in column\nDETAIL:  Failing row contains (1, Zpw)."
    )
    assert callable(wrap)
    said = base._cause(wrap(error))
    assert said == "Exception: null value in column"


def test_a_driver_that_says_nothing_is_named() -> None:
    assert base._cause(refused("")) == "Exception: "


def test_a_complaint_is_one_line_without_credentials() -> None:
    stream = io.StringIO()
    with KNOWN.hold(Secret("rabbit://user:Zpassw0rd@h/")):
        arguments.complain(stream, "a\nb Zpassw0rd rabbit://u:Zpw@h/v\x1b[2J")
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("cellmw-manage: a")
    assert "Zpassw0rd" not in line
    assert "Zpw" not in line
    assert "\x1b" not in line
