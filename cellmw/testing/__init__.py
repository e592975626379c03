# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""For the tests of services that use this package.

The transport URL ``cellmw-memory://HOST/VHOST`` names a message broker that
lives in the test's process; :func:`broker` gives it to look at and to break.
:func:`no_leaks` fails a test that leaves a transport open.
"""

from __future__ import annotations

from cellmw.testing.fixtures import LeakError, no_leaks, own_brokers
from cellmw.testing.memory_brokers import (
    Broker,
    BrokerStats,
    UsedAfterCleanup,
    broker,
    broker_of,
    brokers,
    forget_brokers,
)

__all__ = [
    "Broker",
    "BrokerStats",
    "LeakError",
    "UsedAfterCleanup",
    "broker",
    "broker_of",
    "brokers",
    "forget_brokers",
    "no_leaks",
    "own_brokers",
]
