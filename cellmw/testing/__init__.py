# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""For the tests of services that use this package.

The transport URL ``cellmw-memory://HOST/VHOST`` names a message broker that
lives in the test's process; :func:`broker` gives it to look at and to break.
:func:`no_leaks` fails a test that leaves a transport open.  :func:`open_site`
puts an application behind the filter, with two cells and a recording host in
each.
"""

from __future__ import annotations

from cellmw.testing.fixtures import LeakError, no_leaks, own_brokers
from cellmw.testing.hosts import Received
from cellmw.testing.memory_brokers import (
    Broker,
    BrokerStats,
    broker,
    broker_of,
    brokers,
    forget_brokers,
)
from cellmw.testing.memory_clients import UsedAfterCleanup
from cellmw.testing.site import FaultLeftOn, Site, SiteError, open_site

__all__ = [
    "Broker",
    "BrokerStats",
    "FaultLeftOn",
    "LeakError",
    "Received",
    "Site",
    "SiteError",
    "UsedAfterCleanup",
    "broker",
    "broker_of",
    "brokers",
    "forget_brokers",
    "no_leaks",
    "open_site",
    "own_brokers",
]
