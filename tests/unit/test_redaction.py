# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""A secret shows itself to nobody who does not ask."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import traceback

import pytest

from cellmw.redaction import Secret

URL = "rabbit://nova:hunter2hunter2@h/vh"


@dataclasses.dataclass
class _Holder:
    url: Secret


@pytest.mark.parametrize(
    "show",
    [
        repr,
        str,
        format,
        ascii,
        "{}".format,
        "{!r}".format,
        lambda secret: f"{secret:>20}",
        "%s".__mod__,
        "%r".__mod__,
        lambda secret: repr(dataclasses.asdict(_Holder(secret))),
        lambda secret: repr(_Holder(secret)),
        lambda secret: repr([secret]),
        lambda secret: repr(copy.deepcopy({"url": secret})),
        lambda secret: json.dumps(secret, default=repr),
    ],
)
def test_no_way_of_showing_shows_it(show: object) -> None:
    shown = show(Secret(URL))  # type: ignore[operator]  # one of the above
    assert "***" in shown
    assert "hunter2" not in shown
    assert "nova" not in shown


def test_a_traceback_with_locals_does_not_show_it() -> None:
    url = Secret(URL)
    try:
        raise ValueError
    except ValueError as error:
        shown = traceback.TracebackException.from_exception(
            error, capture_locals=True
        )
    assert "hunter2" not in "".join(shown.format())
    assert url.reveal() == URL


def test_it_has_no_variables() -> None:
    with pytest.raises(TypeError):
        vars(Secret(URL))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_it_is_not_pickled(protocol: int) -> None:
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(Secret(URL), protocol)
    with pytest.raises(TypeError, match="not pickled"):
        Secret(URL).__getstate__()


def test_copies_are_the_secret_itself() -> None:
    secret = Secret(URL)
    assert copy.copy(secret) is secret
    assert copy.deepcopy(secret) is secret


def test_it_equals_what_holds_the_same() -> None:
    assert Secret(URL) == Secret(URL)
    assert hash(Secret(URL)) == hash(Secret(URL))
    assert Secret(URL) != Secret("other")
    assert Secret(URL) != URL
    assert Secret(URL)
    assert not Secret("")
