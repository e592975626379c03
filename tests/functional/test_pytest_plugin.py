# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The pytest plugin in a test run of a user."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytest_plugins = ["pytester"]


USERS_TEST = """
    import oslo_messaging, pytest, webob
    from webob.dec import wsgify
    from cellmw import rpc

    pytest_plugins = ["cellmw.testing.pytest_plugin"]
    client = rpc.get_client(oslo_messaging.Target(topic="compute"))
    kept = []

    @wsgify
    def application(request):
        context = request.environ["cellmw.context"]
        kept.append(context)
        client.cast(context, "reboot", uuid=request.path_info.split("/")[2])
        return webob.Response(status=202, app_iter=body())

    def body():
        yield b"body"

    def test_reboot(cellmw_site):
        cellmw_site.load(application)
        uuid = cellmw_site.add_instance("cell2")
        response = cellmw_site.request(f"/servers/{uuid}/reboot", "POST")
        assert response.status_int == 202
        cellmw_site.assert_received("cell2", "reboot", uuid=uuid)

    def test_leak(cellmw_site):
        served = cellmw_site.load(application)
        uuid = cellmw_site.add_instance("cell2")
        environ = webob.Request.blank(f"/servers/{uuid}").environ
        kept.append(served(environ, lambda *args: None))
        cellmw_site.assert_received("cell2", "reboot")

    @pytest.fixture
    def cellmw_leaks_end_within():
        return 0.2
"""


def test_the_example_in_the_documentation_passes(
    pytester: pytest.Pytester,
) -> None:
    example = ROOT / "doc/source/how-to/test_reboot.py"
    pytester.makepyfile(test_reboot=example.read_text("utf-8"))
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=2)


def test_the_fixture_fails_a_test_that_leaks(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(textwrap.dedent(USERS_TEST))
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*LeakError*still leased*"])
