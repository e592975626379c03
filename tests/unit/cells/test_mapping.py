# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Rows of cells, generations, and what requests get."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellmw import exceptions
from cellmw.cells import mapping
from cellmw.cells.mapping import CELL0_UUID, CellMapping, Generation, expand
from cellmw.redaction import Secret

KNOWN = frozenset({"rabbit", "fake"})
UUID = "6f4b3a52-39d5-4c11-8f2b-000000000001"
BASE = "rabbit://Zbob:Zs3kret@Zlocalhost:123/Znova"


def cell(url: str | None, uuid: str = UUID) -> CellMapping:
    return CellMapping(
        uuid=uuid,
        name="one",
        transport_url=None if url is None else Secret(url),
    )


def test_connection_strings_become_secrets() -> None:
    row = CellMapping(
        uuid=UUID,
        # That is what is tested.
        transport_url="rabbit://Zpw@h",  # type: ignore[arg-type]
        # The same.
        database_connection="mysql://Zpw@h",  # type: ignore[arg-type]
    )
    assert row.transport_url == Secret("rabbit://Zpw@h")
    assert "Zpw" not in repr(row)


def test_a_usable_cell_has_a_generation_and_no_refusal() -> None:
    found = expand(cell("rabbit://u:p@h/v"), None, KNOWN)
    assert (found.uuid, found.name, found.refusal) == (UUID, "one", None)
    assert found.generation is not None
    assert found.generation.url.reveal() == "rabbit://u:p@h/v"
    assert found.generation.cell_uuid == UUID


def test_a_template_is_filled_in_from_the_base() -> None:
    found = expand(cell("{scheme}://{username}@h/{path}"), BASE, KNOWN)
    assert found.generation is not None
    assert found.generation.url.reveal() == "rabbit://Zbob@h/Znova"


def test_a_disabled_cell_is_sent_to() -> None:
    row = CellMapping(
        uuid=UUID, transport_url=Secret("fake://"), disabled=True
    )
    assert expand(row, None, KNOWN).generation is not None


@pytest.mark.parametrize(
    "url, uuid",
    [
        ("none:///", UUID),
        ("none://", UUID),
        ("None:", UUID),
        ("none:///{", UUID),
        ("none:///", CELL0_UUID),
        ("rabbit://u:p@h/v", CELL0_UUID),
        ("{nobody}", CELL0_UUID),
        ("", CELL0_UUID),
        (None, CELL0_UUID),
    ],
)
def test_cell0_has_no_queue(url: str | None, uuid: str) -> None:
    found = expand(cell(url, uuid), BASE, KNOWN)
    assert found.generation is None
    assert found.refusal == (exceptions.CellHasNoQueue, "")


def test_a_template_that_becomes_the_scheme_none_has_no_queue() -> None:
    found = expand(cell("{scheme}://"), "none:///", KNOWN)
    assert found.refusal == (exceptions.CellHasNoQueue, "")


@pytest.mark.parametrize("url", [None, ""])
def test_a_cell_without_a_url_is_misconfigured(url: str | None) -> None:
    # oslo.messaging takes an empty URL as the default transport's.
    found = expand(cell(url), BASE, KNOWN)
    assert found.refusal == (
        exceptions.CellMisconfigured,
        "transport_url: it is empty",
    )


@pytest.mark.parametrize(
    "url",
    ["{query}", " ", "h", "zmq://h", "rabbit://h:x", "rabbit://{nobody}@h"],
)
def test_a_cell_that_cannot_be_used_is_misconfigured(url: str) -> None:
    found = expand(cell(url), BASE, KNOWN)
    assert found.generation is None
    assert found.refusal is not None
    error = found.refuse(retry_after=7)
    assert isinstance(error, exceptions.CellMisconfigured)
    assert error.retry_after == 7
    assert UUID in str(error)
    assert "(one)" in str(error)


@given(
    st.one_of(
        st.none(),
        st.text("{}[]:/@,?#%\n aé1", max_size=12).map("rabbit://Zu{}".format),
        st.text("{}[]:/@,?#%\n aé1", max_size=12),
    ),
    st.one_of(st.none(), st.just(BASE), st.text("{}[]:/@,rabit", max_size=12)),
)
def test_expanding_raises_nothing_and_tells_nothing(
    url: str | None, base: str | None
) -> None:
    found = expand(cell(url), base, KNOWN)
    assert (found.generation is None) != (found.refusal is None)
    assert "Z" not in repr(found)
    if found.refusal is not None:
        assert "Z" not in str(found.refuse())


@pytest.mark.parametrize("transport_url", ["rabbit://h/v", "none:///", "zmq"])
@pytest.mark.parametrize(
    "database, base, expected",
    [
        (None, None, None),
        ("", "mysql://u:p@h/d", None),
        ("mysql://u:p@h/d", None, Secret("mysql://u:p@h/d")),
        (
            "{scheme}://{username}:{password}@h2/{path}_1?{query}",
            "mysql+pymysql://u:Zp@h/nova?charset=utf8",
            Secret("mysql+pymysql://u:Zp@h2/nova_1?charset=utf8"),
        ),
        (
            "{scheme}://h/d",
            None,
            "it is a template, and [database] connection is not set",
        ),
        (
            "mysql://{username}@h/d",
            "sqlite:///x",
            "[database] connection has nothing for {username}",
        ),
    ],
)
def test_a_cell_has_its_database_whatever_its_queue_is(
    transport_url: str,
    database: str | None,
    base: str | None,
    expected: Secret | str | None,
) -> None:
    row = CellMapping(
        uuid=UUID,
        transport_url=Secret(transport_url),
        database_connection=None if database is None else Secret(database),
    )
    assert expand(row, None, KNOWN, base).database == expected


def test_the_same_cell_and_url_are_the_same_generation() -> None:
    one = Generation.of(UUID, Secret("rabbit://u:p@h/v"))
    same = Generation.of(UUID, Secret("rabbit://u:p@h/v"))
    query = Generation.of(UUID, Secret("rabbit://u:p@h/v?heartbeat=1"))
    other = Generation.of(CELL0_UUID, Secret("rabbit://u:p@h/v"))
    assert one is same
    assert len({one, same, query, other}) == 3


def test_a_generation_that_nobody_holds_is_forgotten() -> None:
    url = Secret("rabbit://forgotten/")
    Generation.of(UUID, url)
    gc.collect()
    assert (UUID, url.reveal()) not in Generation._known


def test_a_generation_shows_no_url_and_is_neither_copied_nor_pickled() -> None:
    one = Generation.of(UUID, Secret("rabbit://u:Zpw@h/v"))
    assert "Zpw" not in repr(one)
    assert copy.copy(one) is one
    assert copy.deepcopy(one) is one
    with pytest.raises(TypeError):
        pickle.dumps(one)
    with pytest.raises(TypeError):
        mapping.Generation()
