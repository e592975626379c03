# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Stock Nova's cell cache: ours beside Nova's own dictionary.

First ``set_target_cell`` on either, which may take half as long again on
ours.  Then a cast through what our cache gives, beside the same cast through
one request's ``mq_connection``; it may take a twentieth more.  Needs Nova
(``tox -e nova -- python -m benchmarks.nova``) and RabbitMQ.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import time
from collections.abc import Callable
from typing import Any

import oslo_messaging

import cellmw
from benchmarks import _measure, send
from cellmw import runtime
from cellmw.transports.handle import Handle
from tests import servers
from tests.functional import stack

TARGETING, MESSAGE = 1.5, 1.05


class Cell:
    """A cell of a Nova that has this filter.

    :ivar mapping: Nova's object
    """

    def __init__(self, own: contextlib.ExitStack) -> None:
        import nova.conf
        from nova import objects

        objects.register_all()
        nova.conf.CONF([], project="nova", default_config_files=[])
        vhost = own.enter_context(servers.rabbit_vhost())
        send.keep_what_is_cast(vhost.url)
        database = own.enter_context(servers.sqlite_database())
        api = stack.ApiDatabase(database.url)
        own.callback(api.close)
        self.uuid = api.add_cell(vhost.url)
        api.change_cell(self.uuid, database_connection="sqlite://")
        self.mapping = objects.CellMapping(
            uuid=self.uuid,
            transport_url=vhost.url,
            database_connection="sqlite://",
        )
        cellmw.filter_factory(
            {},
            oslo_config_config=stack.configuration(),
            api_database_connection=database.url,
            nova_cell_cache="true",
            cell_refresh_interval="600",
        )
        own.callback(runtime.registry().close)

    def targeting(self, cache: dict[str, Any]) -> Callable[[int], None]:
        """So many ``set_target_cell`` on a cache."""
        import nova.context

        target, mapping = nova.context.RequestContext(), self.mapping

        def way(count: int) -> None:
            nova.context.CELL_CACHE = cache
            for _ in range(count):
                nova.context.set_target_cell(target, mapping)

        return way

    @staticmethod
    def casting(transport: Any) -> Callable[[int], None]:
        """So many casts through a transport."""
        client = oslo_messaging.get_rpc_client(transport, stack.target())
        prepared = client.prepare(server=send.SERVERS["cast"])

        def way(count: int) -> None:
            for number in range(count):
                prepared.cast(send.CONTEXT, "reboot_instance", number=number)

        return way


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    chosen = parser.parse_args()
    if importlib.util.find_spec("nova") is None:
        print("Nova is not installed here: nothing is measured")
        return 0
    os.environ.setdefault("OS_NOVA_DISABLE_EVENTLET_PATCHING", "true")
    met = []
    with contextlib.ExitStack() as own:
        cell = Cell(own)
        import nova.context

        ours = nova.context.CELL_CACHE
        theirs: dict[str, Any] = {}
        targeting = _measure.Rounds(
            {
                "Nova's dictionary": cell.targeting(theirs),
                "our cache": cell.targeting(ours),
            },
            clock=time.thread_time,
        )
        targeting.run(chosen.rounds, 500)
        process = next(iter(runtime.registry())).process()
        handle = Handle(process, process.cell(cell.uuid))
        own.callback(handle.release)
        messages = _measure.Rounds(
            {
                "mq_connection": cell.casting(handle),
                "our cache": cell.casting(ours[cell.uuid][1]),
            }
        )
        messages.run(chosen.rounds, 200)
    for name, rounds, other, bound in (
        ("set_target_cell", targeting, "Nova's dictionary", TARGETING),
        ("a cast", messages, "mq_connection", MESSAGE),
    ):
        for way in (other, "our cache"):
            print(f"{name}, {way}: {rounds.microseconds(way):.1f} us")
        ratio = rounds.ratio("our cache", other)
        print(f"{name}, our cache / {other}: {ratio:.3f}")
        met.append(_measure.verdict(name, ratio.median, bound))
    return not all(met)


if __name__ == "__main__":
    raise SystemExit(main())
