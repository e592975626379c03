# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What is remembered of instances: which cell each is in, and until when.

A million of them must fit, and reading stands in every request's way.  So an
instance is one entry of a plain dict, whose value is one int: the time until
which it holds, and the cell's index in a list that the directory keeps.
"""

from __future__ import annotations

import math
import threading

from cellmw.cells.queries import Query

# Times are kept in 1/1024 of a second: exact in binary, and with the index
# they stay below 2**60 for 34 years of uptime, where an int is 32 bytes.
TICKS = 1024.0
INDEX_BITS = 20
INDEX_MASK = (1 << INDEX_BITS) - 1


def pack(until: float, index: int) -> int:
    """The entry of an instance.  The later it ends the larger it is."""
    return math.floor(until * TICKS) << INDEX_BITS | index


class Instances:
    """Instances, of which the oldest are forgotten first.  Thread-safe.

    There are two dicts.  New entries go to ``recent``; when that holds half
    of what there may be, or when all that stands in ``older`` has expired, it
    becomes the older one, and what the older one held is forgotten in one
    step.  So between half of ``size`` and all of it is kept, never more, and
    nothing is ever searched for.

    Readers read both dicts without a lock, ``recent`` first.  What they miss
    while the dicts change places is asked for again, which is always right.

    :param ttl: seconds for which an entry holds; 0: nothing is kept
    :param size: most entries; 0: nothing is kept
    """

    __slots__ = (
        "_half",
        "_lock",
        "_rotated_at",
        "_size",
        "_ttl",
        "older",
        "recent",
    )

    def __init__(self, *, ttl: float, size: int) -> None:
        self._ttl = ttl
        self._size = size if ttl > 0 else 0
        self._half = (size + 1) // 2
        self._lock = threading.Lock()
        self._rotated_at = 0.0
        self.recent: dict[str, int] = {}
        self.older: dict[str, int] = {}

    def __len__(self) -> int:
        """How many entries there are, expired ones included."""
        return len(self.recent) + len(self.older)

    def entry(
        self, instance_uuid: str, now: float
    ) -> tuple[int, float] | None:
        """The cell's index, and for how many seconds that holds still.

        An entry with more time left than it ever had is from before the clock
        was set back, and does not hold.
        """
        packed = self.recent.get(instance_uuid)
        if packed is None:
            packed = self.older.get(instance_uuid)
            if packed is None:
                return None
        left = (packed >> INDEX_BITS) / TICKS - now
        if not 0 < left <= self._ttl + 1 / TICKS:
            return None
        return packed & INDEX_MASK, left

    def learn(self, query: Query, index: int | None) -> None:
        """Keep what was asked, in place of what was known.

        :param query: its key is the instance; where it is outdated
            nothing changes
        :param index: the cell's; None: there is nothing to remember
        """
        instance_uuid, started_at = query.key, query.started_at
        assert isinstance(instance_uuid, str)
        assert started_at is not None
        # Let go after the lock: freeing many entries takes a while.
        dropped = None
        if query.outdated:
            return
        with self._lock:
            self.older.pop(instance_uuid, None)
            if index is None or index > INDEX_MASK or not self._size:
                self.recent.pop(instance_uuid, None)
                return
            if instance_uuid not in self.recent:
                dropped = self._make_room(started_at)
            self.recent[instance_uuid] = pack(started_at + self._ttl, index)
        del dropped
        # Outdated first, then forgotten: what was kept after the forgetting
        # is found here.
        if query.outdated:
            self.forget(instance_uuid)

    def forget(self, instance_uuid: str) -> None:
        """Know nothing about an instance.

        Takes no lock: a signal handler may have interrupted it, and would
        wait for a worker that waits for the lock.
        """
        self.recent.pop(instance_uuid, None)
        self.older.pop(instance_uuid, None)

    def clear(self) -> None:
        """Know nothing."""
        with self._lock:
            self.recent = {}
            self.older = {}

    def close(self) -> None:
        """Know nothing, and learn nothing any more."""
        with self._lock:
            self._size = 0
        self.clear()

    def _make_room(self, now: float) -> list[dict[str, int]]:
        dropped = []
        if now - self._rotated_at >= self._ttl:
            dropped.append(self._rotate(now))
        while len(self.recent) >= self._half or len(self) >= self._size:
            dropped.append(self._rotate(now))
        return dropped

    def _rotate(self, now: float) -> dict[str, int]:
        dropped = self.older
        self.older = self.recent
        self.recent = {}
        self._rotated_at = now
        return dropped
