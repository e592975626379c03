# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Sharing an engine among threads and processes."""

from __future__ import annotations

import logging
import os
import sqlite3
from pathlib import Path

import pytest
import sqlalchemy as sa
from oslo_config import cfg
from oslo_db.sqlalchemy import engines as oslo_db_engines

from cellmw.cells import engines, store


def configuration() -> cfg.ConfigOpts:
    conf = cfg.ConfigOpts()
    conf([], default_config_files=[])
    return conf


def test_an_engine_is_made_on_first_use_and_once() -> None:
    made: list[sa.Engine] = []

    def make() -> sa.Engine:
        made.append(sa.create_engine("sqlite://"))
        return made[-1]

    reading = store.Store(make)
    assert not made
    assert reading.engine() is reading.engine()
    assert len(made) == 1


def test_another_process_makes_an_engine_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reading = store.Store(lambda: sa.create_engine("sqlite://"))
    disposed: list[object] = []
    parents = reading.engine()
    monkeypatch.setattr(parents, "dispose", lambda: disposed.append(parents))
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        assert reading.engine() is not parents
    other = store.Store(lambda: parents)
    other.engine()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        other.close()
    assert not disposed
    other.engine()
    other.close()
    other.close()
    assert disposed == [parents]


# What fails is told by the error.


def break_it(engine: sa.Engine) -> sa.Engine:
    """No statement succeeds, and no connection is given back in order."""

    def execute(*args: object) -> None:
        raise sqlite3.DatabaseError("broken")

    def reset(*args: object) -> None:
        raise OSError("gone")

    sa.event.listen(engine, "do_execute", execute)
    sa.event.listen(engine, "reset", reset)
    return engine


@pytest.fixture
def broken(tmp_path: Path) -> sa.Engine:
    url = f"sqlite:///{tmp_path}/x.sqlite"
    engine = engines.make_engine(configuration(), url)
    engine.connect().close()
    return break_it(engine)


def fails_elsewhere(engine: sa.Engine) -> None:
    with (
        pytest.raises(Exception, match="broken"),
        engine.connect() as connection,
    ):
        connection.exec_driver_sql("SELECT 1")


EXC_FILTERS = "oslo_db.sqlalchemy.exc_filters"


def test_no_traceback_is_logged_of_what_is_raised(
    broken: sa.Engine, caplog: pytest.LogCaptureFixture
) -> None:
    reading = store.Store(lambda: broken)
    for _ in range(3):
        with pytest.raises(Exception, match="broken"):
            reading.cells()
        with pytest.raises(Exception, match="broken"):
            reading.cell_of("x")
    assert not caplog.records


def test_what_others_read_is_logged_as_ever(
    broken: sa.Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    others = oslo_db_engines.create_engine(f"sqlite:///{tmp_path}/x.sqlite")
    break_it(others)
    with pytest.raises(Exception, match="broken"):
        store.Store(lambda: broken).cells()
    for engine in (broken, others):
        caplog.clear()
        fails_elsewhere(engine)
        assert {record.name for record in caplog.records} == {
            EXC_FILTERS,
            f"sqlalchemy.pool.impl.{type(engine.pool).__name__}",
        }


def test_at_debug_all_is_logged(
    broken: sa.Engine, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, EXC_FILTERS):
        with pytest.raises(Exception, match="broken"):
            store.Store(lambda: broken).cells()
    assert {record.name for record in caplog.records} == {EXC_FILTERS}


def test_a_filter_is_added_once(broken: sa.Engine, tmp_path: Path) -> None:
    logger = logging.getLogger(EXC_FILTERS)
    before = list(logger.filters)
    engines.make_engine(configuration(), "sqlite://")
    assert logger.filters == before
