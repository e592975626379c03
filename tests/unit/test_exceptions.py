# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""An error says the same wherever it gets to."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
from oslo_messaging._drivers import common

from cellmw import exceptions
from cellmw.exceptions import SendError

KINDS = [SendError, *SendError.__subclasses__(), exceptions.DeliveryUncertain]


def through_a_pickle(error: SendError) -> SendError:
    found: SendError = pickle.loads(pickle.dumps(error))
    return found


@pytest.mark.parametrize(
    "carried", [copy.copy, copy.deepcopy, through_a_pickle, SendError.again]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_says_the_same(
    kind: type[SendError], carried: Callable[[SendError], SendError]
) -> None:
    error = kind("c", cell_uuid="u", cell_name="n", retry_after=2.0)
    found = carried(error)
    assert type(found) is kind
    assert str(found) == str(error)
    assert str(found).endswith(f"cell u (n): {kind.summary}: c")
    assert vars(found) == vars(error)


def test_one_that_comes_back_from_a_host_has_its_cause() -> None:
    sent = common.serialize_remote_exception(
        (exceptions.CellBusy, exceptions.CellBusy("a cause"), None)
    )
    found = common.deserialize_remote_exception(sent, [exceptions.__name__])
    assert isinstance(found, exceptions.CellBusy)
    assert found.cause == "a cause"


def test_a_cells_name_forges_no_line() -> None:
    name = "one\n2026-01-01 INFO all is well\x1b[2J"
    error = exceptions.CellBusy(cell_uuid="u", cell_name=name)
    assert str(error).isprintable()
    assert error.cell_name == name


def test_without_a_cell_and_a_cause_it_is_its_summary() -> None:
    assert str(exceptions.ShuttingDown()) == exceptions.ShuttingDown.summary
