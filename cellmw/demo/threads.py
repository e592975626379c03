# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Doing several things at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from cellmw.workers import Workers

T = TypeVar("T")


def at_once(function: Callable[[T], object], items: Iterable[T]) -> None:
    """Call a function for each item, in threads, and wait for all.

    Their threads do not keep the process from ending.  The first error is
    raised, when all of them are done.
    """
    workers = Workers(name="demo-worker")
    jobs = [workers.submit(function, item) for item in items]
    try:
        for job in jobs:
            job.wait()
        for job in jobs:
            if job.error is not None:
                raise job.error
    finally:
        workers.close()
