# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The check for threads that a test leaves behind can fail."""

from __future__ import annotations

import threading

from tests import threads


def test_a_thread_that_stays_is_found_and_shown() -> None:
    before = threading.enumerate()
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="left-behind")
    thread.start()
    try:
        left = threads.left_since(before, within=0)
        assert left == {thread}
        text = threads.describe(left)
        assert "left-behind" in text
        assert "in wait" in text
    finally:
        end.set()
        thread.join()


def test_a_thread_that_ends_in_time_is_none() -> None:
    before = threading.enumerate()
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    end.set()
    assert not threads.left_since(before, within=5)
