# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The RPC API of the compute hosts, as the API service uses it.

There is nothing of cells in it: the client goes where the context leads.
"""

from __future__ import annotations

from typing import Any

import oslo_messaging

from cellmw import rpc

TOPIC = "compute"


class ComputeAPI:
    """Sends messages to compute hosts.  Thread-safe."""

    def __init__(self) -> None:
        target = oslo_messaging.Target(topic=TOPIC, version="1.0")
        self._client = rpc.get_client(target)

    def get_instance(self, context: Any, host: str, instance_uuid: str) -> Any:
        """Ask the host how the instance is."""
        return self._client.prepare(server=host).call(
            context, "get_instance", instance_uuid=instance_uuid
        )

    def get_console_output(
        self, context: Any, host: str, instance_uuid: str
    ) -> Any:
        """Ask the host for what the instance has printed."""
        return self._client.prepare(server=host).call(
            context, "get_console_output", instance_uuid=instance_uuid
        )

    def reboot_instance(
        self, context: Any, host: str, instance_uuid: str
    ) -> None:
        """Tell the host to reboot the instance; do not wait for it."""
        self._client.prepare(server=host).cast(
            context, "reboot_instance", instance_uuid=instance_uuid
        )

    def delete_instance(
        self, context: Any, host: str, instance_uuid: str
    ) -> None:
        """Tell the host to delete the instance; do not wait for it."""
        self._client.prepare(server=host).cast(
            context, "delete_instance", instance_uuid=instance_uuid
        )
