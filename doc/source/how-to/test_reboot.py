"""A test of a service: a reboot goes to the cell of its instance."""

import oslo_messaging
import webob
from webob.dec import wsgify

from cellmw import rpc

pytest_plugins = ["cellmw.testing.pytest_plugin"]

compute = rpc.get_client(oslo_messaging.Target(topic="compute"))


@wsgify
def application(request):
    uuid = request.path_info.split("/")[2]
    context = request.environ["cellmw.context"]
    compute.cast(context, "reboot_instance", instance_uuid=uuid)
    return webob.Response(status=202)


def test_a_reboot_reaches_the_cell_of_the_instance(cellmw_site):
    cellmw_site.load(application)
    uuid = cellmw_site.add_instance("cell2")
    response = cellmw_site.request(f"/servers/{uuid}/action", "POST")
    assert response.status_int == 202
    cellmw_site.assert_received("cell2", "reboot_instance", instance_uuid=uuid)


def test_a_dead_broker_is_answered_with_503(cellmw_site):
    cellmw_site.load(application)
    uuid = cellmw_site.add_instance("cell1")
    with cellmw_site.fault("cell1", "refuse"):
        response = cellmw_site.request(f"/servers/{uuid}/action", "POST")
    assert response.status_int == 503
