# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Puts compute hosts and instances into the cells, with Nova's own objects.

``python -m tests.nova.populate NOVA_CONF CELL=HOST:COUNT...`` prints the
UUIDs of each cell's instances, by the cell's name, as JSON.
"""

from __future__ import annotations

import json
import sys
import uuid
from typing import Any

from nova import config, context, objects
from oslo_utils import timeutils

from tests.nova import identity


def _service(cell_context: Any, host: str) -> None:
    service = objects.Service(cell_context)
    service.host = host
    service.binary = "nova-compute"
    service.topic = "compute"
    service.report_count = 1
    service.create()


def _instance(cell_context: Any, host: str) -> Any:
    instance = objects.Instance(
        cell_context,
        uuid=str(uuid.uuid4()),
        display_name="a-server",
        hostname="a-server",
        host=host,
        node=host,
        compute_id=1,
        project_id=identity.PROJECT,
        user_id=identity.USER,
        vm_state="active",
        task_state=None,
        power_state=1,
        image_ref="",
        launched_at=timeutils.utcnow(),
        memory_mb=64,
        vcpus=1,
        root_gb=1,
        ephemeral_gb=0,
        metadata={"color": "blue"},
        system_metadata={},
        flavor=_flavor(),
        old_flavor=None,
        new_flavor=None,
    )
    instance.create()
    return instance


def _flavor() -> Any:
    return objects.Flavor(
        id=1,
        flavorid="1",
        name="small",
        memory_mb=64,
        vcpus=1,
        root_gb=1,
        ephemeral_gb=0,
        swap=0,
        rxtx_factor=1.0,
        vcpu_weight=0,
        disabled=False,
        is_public=True,
        extra_specs={},
        projects=[],
        description=None,
    )


def main() -> None:
    conf, *wanted = sys.argv[1:]
    objects.register_all()
    config.parse_args(["populate"], default_config_files=[conf])
    admin = context.get_admin_context()
    mappings = {
        mapping.name: mapping
        for mapping in objects.CellMappingList.get_all(admin)
    }
    made: dict[str, list[str]] = {}
    for cell, _, rest in (text.partition("=") for text in wanted):
        host, _, count = rest.partition(":")
        mapping = mappings[cell]
        with context.target_cell(admin, mapping) as cell_context:
            _service(cell_context, host)
            for _ in range(int(count)):
                instance = _instance(cell_context, host)
                objects.InstanceMapping(
                    admin,
                    instance_uuid=instance.uuid,
                    project_id=identity.PROJECT,
                    user_id=identity.USER,
                    cell_mapping=mapping,
                    queued_for_delete=False,
                ).create()
                made.setdefault(cell, []).append(instance.uuid)
    sys.stdout.write(json.dumps(made) + "\n")


if __name__ == "__main__":
    main()
