# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Which context manager serves a cell, and when; nothing connects."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from oslo_config import cfg

from cellmw import exceptions
from cellmw.cells import databases
from cellmw.cells.databases import Databases
from cellmw.cells.mapping import Cell
from cellmw.redaction import Secret, scrub
from tests.directories import Inline
from tests.fakes import cell_uuid

PASSWORD = "pass-not-for-logs"
UUID = cell_uuid(1)


class Manager:
    """Stands for oslo.db's."""

    def __init__(self) -> None:
        self.hooks: list[Callable[[Any], None]] = []

    def append_on_engine_create(self, hook: Callable[[Any], None]) -> None:
        self.hooks.append(hook)


class Made(list[Secret]):
    """The URLs for which a context manager was made."""

    def __init__(self) -> None:
        self.before: Callable[[], object] = lambda: None

    def make(self, url: Secret) -> Manager:
        self.append(url)
        self.before()
        return Manager()


@pytest.fixture
def made() -> Made:
    return Made()


@pytest.fixture
def known(made: Made) -> Databases:
    return Databases(made.make, Inline())


def cell(state: int | None = 0, number: int = 1) -> Cell:
    url = f"sqlite:///{PASSWORD}-{state}"
    database = None if state is None else Secret(url)
    return Cell(cell_uuid(number), "a-cell", database=database)


def test_none_where_the_mapping_names_no_database(
    known: Databases, made: Made
) -> None:
    assert known.of(cell(None)) is None
    assert not made


def test_the_same_as_long_as_the_url_is(known: Databases, made: Made) -> None:
    first = known.of(cell())
    for _ in range(3):
        known.keep_only({UUID: cell()})
        assert known.of(cell()) is first
    assert known.of(cell(number=2)) is not first
    assert len(made) == 2


def test_another_once_the_url_has_changed(
    known: Databases, made: Made
) -> None:
    first = known.of(cell())
    known.keep_only({UUID: cell(1)})
    # Also for a request that found its cell before.
    second = known.of(cell())
    assert second is not first
    assert known.of(cell(1)) is second
    assert known.of(cell()) is second
    assert len(made) == 2
    known.keep_only({UUID: cell(None)})
    assert known.of(cell(1)) is None


def test_a_change_while_one_is_made_is_not_missed(
    known: Databases, made: Made
) -> None:
    made.before = lambda: known.keep_only({UUID: cell(1)})
    found = known.of(cell())
    assert made == [cell(0).database, cell(1).database]
    assert known.of(cell(1)) is found
    assert len(made) == 2


def test_of_two_threads_both_get_the_first(
    known: Databases, made: Made
) -> None:
    inner: list[Any] = []

    def meanwhile() -> None:
        if len(made) == 1:
            inner.append(known.of(cell()))

    made.before = meanwhile
    assert known.of(cell()) is inner[0]


@pytest.mark.parametrize(
    "url, reason",
    [
        (f"{PASSWORD}", "it is no database URL"),
        (f"oracel://u:{PASSWORD}@h/d", "no dialect or driver"),
        (f"mysql+mysqldb://u:{PASSWORD}@h/d", "Python package mysqlclient "),
    ],
)
def test_what_nothing_can_connect_to_refuses_when_used(
    url: str, reason: str, known: Databases, made: Made
) -> None:
    found = known.of(Cell(UUID, "a-cell", database=Secret(url)))
    uses: list[Callable[[], Any]] = [
        lambda: found.writer,
        lambda: found.reader.using(None),
        lambda: copy.deepcopy(found).independent,
    ]
    for use in uses:
        with pytest.raises(exceptions.DatabaseMisconfigured) as caught:
            use()
        assert reason in str(caught.value)
        assert f"cell {UUID} (a-cell)" in str(caught.value)
        assert PASSWORD not in str(caught.value)
    assert not made


def test_a_template_that_cannot_be_filled_in_refuses(
    known: Databases,
) -> None:
    found = known.of(Cell(UUID, None, database="it is a template"))
    with pytest.raises(exceptions.CellMisconfigured, match="is a template"):
        found.reader.using(None)
    known.keep_only({UUID: cell()})
    assert isinstance(known.of(cell()), Manager)


def test_a_url_is_known_as_long_as_its_context_manager_lives(
    known: Databases,
) -> None:
    secret = "an-odd-password-42"
    found = known.of(
        Cell(UUID, None, database=Secret(f"mysql+pymysql://u:{secret}@h/d"))
    )
    known.keep_only({})
    assert secret not in scrub(secret)
    del found
    # The cell is on a second list until the next reading.
    known.keep_only({})
    gc.collect()
    assert scrub(secret) == secret


@pytest.mark.parametrize(
    "line", ["max_pool_size = hunter2", "connection = x$hunter2"]
)
def test_a_bad_option_is_found_at_load(line: str, tmp_path: Path) -> None:
    file = tmp_path / "nova.conf"
    file.write_text(f"[database]\n{line}\n")
    conf = cfg.ConfigOpts()
    conf([], default_config_files=[str(file)])
    with pytest.raises(exceptions.ConfigurationError) as caught:
        databases.prepare(conf)
    name = line.partition(" ")[0]
    assert f"option {name} in [database]" in str(caught.value)
    assert "hunter2" not in str(caught.value)
