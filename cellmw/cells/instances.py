# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The cache of instances: the cell of each, and until when it is valid.

The cache must hold a million instances, and every request reads it.  So an
instance is one entry of a plain dict, and its value is one int: the time until
which it is valid, and the index of the cell in a list of the directory.
"""

from __future__ import annotations

import math
import threading

from cellmw.cells.queries import Query

# Times are in units of 1/1024 s, which are exact in binary.  With the index
# they stay below 2**60 for 34 years of uptime, and such an int takes 32 bytes.
TICKS = 1024.0
INDEX_BITS = 20
INDEX_MASK = (1 << INDEX_BITS) - 1


def pack(until: float, index: int) -> int:
    """The entry of an instance.  An entry that ends later is larger."""
    return math.floor(until * TICKS) << INDEX_BITS | index


class Instances:
    """A cache that drops its oldest entries first.  Thread-safe.

    It has two dicts.  New entries go to ``recent``.  When ``recent`` holds
    half of ``size``, or all entries of ``older`` have expired, ``recent``
    becomes ``older``, and the old ``older`` is dropped as a whole.  So the
    cache keeps at least half of ``size`` and never more than ``size``, and
    never searches for entries to drop.

    Readers read both dicts without a lock, ``recent`` first.  A reader that
    misses an entry while the dicts rotate queries the database again.

    :param ttl: seconds for which an entry is valid; 0: nothing is cached
    :param size: most entries; 0: nothing is cached
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

    def __init__(self, ttl: float, size: int) -> None:
        self._ttl = ttl
        self._size = size if ttl > 0 else 0
        self._half = (size + 1) // 2
        self._lock = threading.Lock()
        self._rotated_at = 0.0
        self.recent: dict[str, int] = {}
        self.older: dict[str, int] = {}

    def __len__(self) -> int:
        """The number of entries, expired ones included."""
        return len(self.recent) + len(self.older)

    def entry(
        self, instance_uuid: str, now: float
    ) -> tuple[int, float] | None:
        """The cell's index, and the seconds for which it stays valid."""
        packed = self.recent.get(instance_uuid)
        if packed is None:
            packed = self.older.get(instance_uuid)
            if packed is None:
                return None
        left = (packed >> INDEX_BITS) / TICKS - now
        if left <= 0:
            return None
        return packed & INDEX_MASK, left

    def learn(self, query: Query, index: int | None) -> None:
        """Cache the result of a query.

        :param query: its key is the instance; the result of an outdated
            query is not cached
        :param index: the cell's; None: the instance has no cell
        """
        instance_uuid, started_at = query.key, query.started_at
        assert isinstance(instance_uuid, str)
        assert started_at is not None
        # Freed after the lock is released: many entries take a while.
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
        # Directory.forget() outdates the query before it drops the entry.  If
        # the entry above came after that drop, the query is outdated by now.
        if query.outdated:
            self.forget(instance_uuid)

    def forget(self, instance_uuid: str) -> None:
        """Drop an instance.

        Takes no lock: a signal handler calls this too, and would wait for a
        worker that waits for the lock.
        """
        self.recent.pop(instance_uuid, None)
        self.older.pop(instance_uuid, None)

    def close(self) -> None:
        """Drop all entries, and cache no more."""
        with self._lock:
            self._size = 0
            self.recent = {}
            self.older = {}

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
