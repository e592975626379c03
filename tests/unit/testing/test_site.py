# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The site finds what a test of a handler does not assert."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import oslo_messaging
import pytest
import webob
import webob.dec

from cellmw import rpc, target_cell, testing

Handler = Callable[[Any, str], Any]

client = rpc.get_client(oslo_messaging.Target(topic="compute", version="1.0"))


def application(handler: Handler) -> Any:
    """An API whose handler gets the context and the path's last UUID."""

    @webob.dec.wsgify
    def serve(request: webob.Request) -> webob.Response:
        uuid = request.path_info.split("/")[2]
        result = handler(request.environ["cellmw.context"], uuid)
        return webob.Response(json.dumps(result), status=202)

    return serve


def reboot(context: Any, uuid: str) -> None:
    to_host = client.prepare(server="host-7")
    to_host.cast(context, "reboot_instance", instance_uuid=uuid)


def console(context: Any, uuid: str) -> Any:
    return client.call(context, "get_console_output", instance_uuid=uuid)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with testing.own_brokers(), testing.no_leaks():
        yield tmp_path


def post(site: testing.Site, instance: str) -> webob.Response:
    return site.request(f"/servers/{instance}/action", "POST")


def test_a_message_is_recorded_in_the_instances_cell(folder: Path) -> None:
    with testing.open_site(folder) as site:
        site.load(application(reboot))
        one, two = site.add_instance("cell1"), site.add_instance("cell2")
        assert post(site, one).status_int == 202
        assert post(site, two).status_int == 202
        found = site.assert_received("cell2", "reboot_instance")
        assert found.args == {"instance_uuid": two}
        assert found.context["user"] == "test-user"
        assert not found.is_call
        site.assert_received("cell1", "reboot_instance", instance_uuid=one)
        assert len(site.received()) == 2
        site.assert_nothing_received("default")


def test_a_call_is_answered(folder: Path) -> None:
    with testing.open_site(folder) as site:
        site.load(application(console))
        one, two = site.add_instance("cell1"), site.add_instance("cell2")
        assert post(site, one).json is None
        site.answer("get_console_output", lambda call: call.cell)
        site.answer("get_console_output", ["fixed"], cell="cell2")
        assert post(site, one).json == "cell1"
        assert post(site, two).json == ["fixed"]
        assert all(one.is_call for one in site.received())


def fails(call: testing.Received) -> None:
    raise ValueError(call.method)


def test_an_answer_can_be_an_error(folder: Path) -> None:
    errors: list[str] = []

    def handler(context: Any, uuid: str) -> None:
        try:
            console(context, uuid)
        except ValueError as error:
            errors.append(str(error))

    with testing.open_site(folder) as site:
        site.load(application(handler))
        site.answer("get_console_output", fails)
        assert post(site, site.add_instance("cell1")).status_int == 202
    assert errors[0].startswith("get_console_output")


def test_instances_move_and_may_have_no_cell(folder: Path) -> None:
    with testing.open_site(folder) as site:
        site.load(application(reboot))
        instance = site.add_instance(None)
        assert post(site, instance).status_int == 202
        site.assert_received("default", "reboot_instance")
        site.move_instance(instance, "cell2")
        # What has arrived before the move is where it belonged then.
        site.expect_elsewhere("default", "reboot_instance")
        assert post(site, instance).status_int == 202
        site.assert_received("cell2", "reboot_instance")


def test_cell0_refuses(folder: Path) -> None:
    with testing.open_site(folder) as site:
        site.load(application(reboot))
        response = post(site, site.add_instance("cell0"))
        assert response.status_int == 503
        site.assert_nothing_received()


def to_cell2(context: Any, uuid: str) -> None:
    with target_cell(context, SITE[0].cells["cell2"]) as other:
        client.cast(other, "prepare_migration", instance_uuid=uuid)


SITE: list[testing.Site] = []


def test_a_message_in_another_cell_fails_the_test(folder: Path) -> None:
    with (
        pytest.raises(testing.SiteError, match="is in cell1; if the handler"),
        testing.open_site(folder) as site,
    ):
        SITE[:] = [site]
        site.load(application(to_cell2))
        post(site, site.add_instance("cell1"))
        site.assert_received("cell2", "prepare_migration")


def test_a_message_of_a_request_needs_no_instance_to_be_astray(
    folder: Path,
) -> None:
    def handler(context: Any, uuid: str) -> None:
        with target_cell(context, SITE[0].cells["cell2"]) as other:
            client.cast(other, "anything")

    with (
        pytest.raises(testing.SiteError, match="anything"),
        testing.open_site(folder) as site,
    ):
        SITE[:] = [site]
        site.load(application(handler))
        post(site, site.add_instance("cell1"))
        site.assert_received("cell2", "anything")


def test_a_message_in_the_default_queue_fails_the_test(folder: Path) -> None:
    default = rpc.get_default_client(oslo_messaging.Target(topic="compute"))

    def handler(context: Any, uuid: str) -> None:
        default.cast(context, "reboot_instance", instance_uuid=uuid)

    with (
        pytest.raises(testing.SiteError, match="is in cell1"),
        testing.open_site(folder) as site,
    ):
        site.load(application(handler))
        post(site, site.add_instance("cell1"))
        site.assert_received("default", "reboot_instance")


def test_a_message_that_is_meant_for_another_cell_passes(
    folder: Path,
) -> None:
    with testing.open_site(folder) as site:
        SITE[:] = [site]
        site.load(application(to_cell2))
        site.expect_elsewhere("cell2", "prepare_migration")
        post(site, site.add_instance("cell1"))
        site.assert_received("cell2", "prepare_migration")


@pytest.mark.parametrize(
    "fault, status",
    [
        ("refuse", 503),
        ("hang", 504),
        ("lose_confirms", 504),
        ("refuse_credentials", 503),
    ],
)
def test_a_fault_is_met_and_healed(
    folder: Path, fault: str, status: int
) -> None:
    with testing.open_site(folder) as site:
        site.load(application(reboot), send_timeout=0.3)
        one, two = site.add_instance("cell1"), site.add_instance("cell2")
        with site.fault("cell2", fault):
            assert post(site, two).status_int in (status, 503)
            assert post(site, one).status_int == 202
        assert post(site, two).status_int == 202


def test_a_fault_that_no_message_met_fails_the_test(folder: Path) -> None:
    with (
        pytest.raises(testing.SiteError, match="'refuse' of cell2 was never"),
        testing.open_site(folder) as site,
    ):
        site.load(application(reboot))
        with site.fault("cell2", "refuse"):
            post(site, site.add_instance("cell1"))


def test_a_fault_that_is_left_on_is_told(folder: Path) -> None:
    with contextlib.ExitStack() as stack:
        site = stack.enter_context(testing.open_site(folder))
        site.load(application(reboot))
        site.fault("cell1", "refuse")
        assert post(site, site.add_instance("cell1")).status_int == 503
        with pytest.warns(testing.FaultLeftOn, match="of cell1 was still set"):
            stack.close()


def test_wrong_names_are_errors(folder: Path) -> None:
    with testing.open_site(folder) as site:
        with pytest.raises(LookupError, match="there are cell1, cell2"):
            site.fault("cell3", "refuse")
        with pytest.raises(LookupError, match="there are refuse, hang"):
            site.fault("cell1", "explode")
        for use in (site.add_instance, site.received, site.heal):
            with pytest.raises(LookupError, match="'cell-1'"):
                use("cell-1")
        with pytest.raises(LookupError, match="'cell-1'"):
            site.answer("method", None, cell="cell-1")
        with pytest.raises(testing.SiteError, match="call load"):
            site.request("/")


def test_what_did_not_arrive_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with testing.open_site(folder) as site:
        site.load(application(reboot))
        post(site, site.add_instance("cell1"))
        site.assert_received("cell1", "reboot_instance")
        monkeypatch.setattr("cellmw.testing.site._SOON", 0.0)
        with pytest.raises(
            testing.SiteError, match=r"no stop.*received: reboot_instance \("
        ):
            site.assert_received("cell1", "stop")
        with pytest.raises(testing.SiteError, match="reboot_instance"):
            site.assert_nothing_received()


def test_a_failing_test_is_not_failed_twice(folder: Path) -> None:
    with pytest.raises(ZeroDivisionError), testing.open_site(folder) as site:
        site.load(application(reboot))
        site.fault("cell1", "refuse")
        raise ZeroDivisionError
