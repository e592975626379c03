# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The request context of a service that has none of its own."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
from oslo_config import cfg
from oslo_context import context as oslo_context
from oslo_db.sqlalchemy import enginefacade

import cellmw
from cellmw import context as contexts
from cellmw import exceptions, options, runtime
from cellmw.cells import engines, store
from cellmw.cells.mapping import CELL0_UUID, CellMapping
from cellmw.context import RequestContext
from cellmw.transports import oslo

CONFIRMED = {
    "HTTP_X_IDENTITY_STATUS": "Confirmed",
    "HTTP_X_AUTH_TOKEN": "the-token",
    "HTTP_X_USER_ID": "the-user",
    "HTTP_X_PROJECT_ID": "the-project",
    "HTTP_X_ROLES": "admin,member",
    "HTTP_X_IS_ADMIN_PROJECT": "True",
    "openstack.request_id": "req-1",
    "openstack.global_request_id": (
        "req-6f70656e-7374-6163-6b20-346576657221"
    ),
}


class Connection:
    """Stands for a request's handle, which cannot be pickled either."""

    def __deepcopy__(self, memo: object) -> Connection:
        return self

    def __reduce_ex__(self, protocol: object) -> Any:
        raise TypeError("not this one")


def test_a_new_one_names_no_cell() -> None:
    made = RequestContext(user_id="u", project_id="p", roles=["r"])
    assert made.mq_connection is None
    assert made.cell_uuid is None
    assert made.db_connection is None
    assert made.user_id == "u"
    assert isinstance(made, oslo_context.RequestContext)


def test_a_confirmed_identity_is_taken_from_the_environ() -> None:
    made = RequestContext.from_request(dict(CONFIRMED))
    expected = oslo_context.RequestContext.from_environ(dict(CONFIRMED))
    assert type(made) is RequestContext
    assert made.to_dict() == expected.to_dict()
    assert made.roles == ["admin", "member"]


@pytest.mark.parametrize("status", [None, "", "Invalid", "CONFIRMED"])
def test_any_other_is_anonymous(status: str | None) -> None:
    environ = dict(CONFIRMED)
    del environ["HTTP_X_IDENTITY_STATUS"]
    if status is not None:
        environ["HTTP_X_IDENTITY_STATUS"] = status
    made = RequestContext.from_request(environ)
    anonymous = oslo_context.RequestContext(
        request_id="req-1",
        global_request_id=CONFIRMED["openstack.global_request_id"],
        is_admin_project=False,
    )
    assert made.to_dict() == anonymous.to_dict()
    assert not made.is_admin
    assert not made.is_admin_project


def connected() -> RequestContext:
    made = RequestContext(user_id="u", roles=["r"])
    made.mq_connection = Connection()
    made.cell_uuid = "the-cell"
    made.db_connection = enginefacade.transaction_context()
    return made


def test_no_attribute_is_in_the_dictionary() -> None:
    values = connected().to_dict()
    assert values.keys() == oslo_context.RequestContext().to_dict().keys()
    assert "the-cell" not in repr(values)


def test_what_is_made_from_a_dictionary_names_no_cell() -> None:
    made = RequestContext.from_dict(connected().to_dict())
    assert type(made) is RequestContext
    assert made.user_id == "u"
    assert made.mq_connection is None
    assert made.cell_uuid is None
    assert made.db_connection is None


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy])
def test_a_copy_has_it(copier: Any) -> None:
    first = connected()
    made = copier(first)
    assert type(made) is RequestContext
    assert made is not first
    assert made.mq_connection is first.mq_connection
    assert made.db_connection is first.db_connection
    assert made.cell_uuid == "the-cell"
    assert made.to_dict() == first.to_dict()
    made.mq_connection = None
    made.user_id = "another"
    assert isinstance(first.mq_connection, Connection)
    assert first.user_id == "u"


def test_a_deep_copy_shares_nothing_that_changes() -> None:
    first = connected()
    made = copy.deepcopy(first)
    made.roles.append("another")
    assert first.roles == ["r"]


def test_a_deep_copy_of_what_refers_to_itself_ends() -> None:
    first = connected()
    first.itself = first  # type: ignore[attr-defined]  # a service may
    made: Any = copy.deepcopy(first)
    assert made.itself is made


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_without_it(protocol: int) -> None:
    first = connected()
    made = pickle.loads(pickle.dumps(first, protocol))
    assert type(made) is RequestContext
    assert made.mq_connection is None
    assert made.db_connection is None
    assert made.to_dict() == first.to_dict()
    # Nor does pickling take it from the one that was pickled.
    assert isinstance(first.mq_connection, Connection)
    assert first.db_connection is not None


def test_a_subclass_of_a_service_keeps_what_it_adds() -> None:
    class Own(RequestContext):
        def __init__(self, quota: int = 0, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.quota = quota

    made = Own(quota=3, user_id="u")
    made.mq_connection = Connection()
    for copied in (copy.copy(made), copy.deepcopy(made)):
        assert type(copied) is Own
        assert copied.quota == 3
        assert copied.mq_connection is made.mq_connection
    assert type(Own.from_request(dict(CONFIRMED))) is Own
    assert type(Own.from_request({})) is Own


def test_target_cell_wants_a_filter() -> None:
    with pytest.raises(LookupError):
        with contexts.target_cell(connected(), "a-cell"):
            pytest.fail("entered")


UPPER = "AAAAAAAA-0000-4000-8000-00000000000A"
LOWER = "bbbbbbbb-0000-4000-8000-00000000000b"
TWIN_A, TWIN_B = (f"cccccccc-0000-4000-8000-{n:012}" for n in (1, 2))
# The last one's name is another one's UUID.
ROWS = (
    (UPPER, "upper", False),
    (LOWER, "lower", True),
    (CELL0_UUID, None, False),
    (TWIN_B, "twin", False),
    (TWIN_A, "twin", False),
    ("dddddddd-0000-4000-8000-00000000000d", LOWER, False),
)


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Grows each time that the cells are read: one's UUID is upper case."""
    found: list[str] = []

    def cells(self: store.Store) -> list[CellMapping]:
        found.append("cells")
        return [
            CellMapping(uuid=uuid, id=number, name=name, disabled=disabled)
            for number, (uuid, name, disabled) in enumerate(ROWS)
        ]

    monkeypatch.setattr(store.Store, "cells", cells)
    conf = cfg.ConfigOpts()
    conf([], project="cellmw-test", default_config_files=[])
    oslo.prepare(conf)
    engines.register_options(conf)
    made = runtime.registry().get(
        "test", lambda: runtime.Runtime(options.load(conf, {}), conf)
    )
    yield found
    assert made.close() == 0


def found_with(uuid: str) -> str | None:
    with contexts.target_cell(connected(), uuid) as cell_context:
        return cell_context.cell_uuid


@pytest.mark.parametrize(
    "uuid, spelled",
    [
        (UPPER, UPPER),
        (LOWER, LOWER),
        (LOWER.upper(), LOWER),
    ],
)
def test_target_cell_finds_a_uuid_as_its_row_spells_it(
    uuid: str, spelled: str, readings: list[str]
) -> None:
    assert found_with(uuid) == spelled


def test_target_cell_asks_no_more_for_a_cell_that_is_known(
    readings: list[str],
) -> None:
    found_with(LOWER)
    assert len(readings) == 1
    for _ in range(3):
        found_with(UPPER)
        found_with(LOWER)
        found_with(LOWER.upper())
    assert len(readings) == 1


@pytest.mark.parametrize("uuid", ["no-such-cell", "No-Such-Cell", ""])
def test_target_cell_names_the_cell_that_is_not_there(
    uuid: str, readings: list[str]
) -> None:
    with pytest.raises(exceptions.CellNotFound) as caught:
        found_with(uuid)
    assert caught.value.cell_uuid == uuid
    assert len(readings) == 2


def test_target_cell_takes_a_name(readings: list[str]) -> None:
    for _ in range(3):
        assert found_with("upper") == UPPER
        assert found_with("lower") == LOWER
    assert len(readings) == 1


def test_a_text_that_is_a_uuid_and_a_name_is_a_uuid(
    readings: list[str],
) -> None:
    assert found_with(LOWER) == LOWER


def test_a_name_of_several_cells_takes_a_uuid(readings: list[str]) -> None:
    with pytest.raises(exceptions.CellNameAmbiguous) as caught:
        found_with("twin")
    assert str(caught.value) == (
        "cell 'twin': several cells have this name, so it takes a UUID: "
        f"{TWIN_B}, {TWIN_A}"
    )
    assert found_with(TWIN_A) == TWIN_A


def test_the_uuid_of_a_mapping_is_no_name(readings: list[str]) -> None:
    with pytest.raises(exceptions.CellNotFound):
        with contexts.target_cell(connected(), CellMapping(uuid="upper")):
            pytest.fail("entered")


def test_the_cells_come_in_the_order_of_their_ids(
    readings: list[str],
) -> None:
    found = cellmw.cells(connected())
    assert [(c.uuid, c.name, c.disabled) for c in found] == list(ROWS)
    assert [c.uuid for c in found if c.is_cell0] == [CELL0_UUID]
    assert len(readings) == 1
    for cell in found:
        assert hash(cell)
        with contexts.target_cell(connected(), cell) as cell_context:
            assert cell_context.cell_uuid == cell.uuid


def test_the_function_does_not_hide_the_package_of_its_name() -> None:
    package: Any = importlib.import_module("cellmw.cells")
    assert package.store is store
    assert cellmw.cells is package


def test_asking_for_the_cells_wants_a_filter() -> None:
    with pytest.raises(LookupError):
        cellmw.cells(connected())
