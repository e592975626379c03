# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Background maintenance thread."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable

from cellmw import redaction

LOG = logging.getLogger(__name__)


class Janitor:
    """Runs chores in a thread of its own every ``interval`` seconds.

    Thread-safe.  If a chore raises, its error is logged and the others run.

    :ivar stopped: whether :meth:`stop` was called
    """

    def __init__(
        self, chores: tuple[Callable[[], None], ...], *, interval: float
    ) -> None:
        self._chores = chores
        self._interval = interval
        self.stopped = False
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        # Released to wake the thread.  An event has a lock of its own, which
        # a finalizer that calls wake() may have interrupted.
        self._asleep = threading.Lock()
        self._asleep.acquire()

    def start(self) -> None:
        """Start the thread, unless it runs or has been stopped."""
        if self._thread is not None:
            return
        with self._lock:
            if self._thread is None and not self.stopped:
                thread = threading.Thread(
                    target=self._run, name="cellmw-janitor", daemon=True
                )
                try:
                    thread.start()
                except RuntimeError:
                    return  # no thread is available; the next message tries
                self._thread = thread

    def _run(self) -> None:
        while not self.stopped:
            self._asleep.acquire(timeout=self._interval)
            for chore in self._chores:
                try:
                    chore()
                except Exception as error:
                    LOG.error(
                        "Background maintenance failed: %s",
                        redaction.describe(error),
                    )

    def wake(self) -> None:
        """Run the chores now.  Finalizers call this, so it takes no lock."""
        # This raises if the thread is awake already.
        with contextlib.suppress(RuntimeError):
            self._asleep.release()

    def stop(self) -> None:
        """End the thread for good.  Waits for it, five seconds at most."""
        with self._lock:
            self.stopped = True
            thread = self._thread
        self.wake()
        if thread is not None and thread is not threading.current_thread():
            thread.join(5.0)
