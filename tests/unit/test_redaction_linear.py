# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Whatever a client sends, scrubbing it takes time in proportion to it."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator

import pytest

from cellmw.redaction import KNOWN, Secret, redact_url, scrub

PIECES = (
    *("_a://b ", "a://", "http://", "://", "a", "ü", "\u2028", "\\"),
    *("@", ":", "%", "%41", ",", "/", "?", "#", "&", "=", "token="),
    *(" ", "\n", "'", '"', "`", "<", "[", "]", "{", "}", "{a}", "***"),
    *("hunter-t", "hunter-two", "hunter-two/3", "long-hunter-two-", "u:p"),
    " truncated) ... ",
)
SHORT, LONG = 2_000, 32_000


@pytest.fixture(scope="module", autouse=True)
def _known() -> Iterator[None]:
    """Passwords that begin alike, and one that repeats itself."""
    odd = [f"rabbit://u:hunter-two%2F{'3' * n}@h" for n in range(20)]
    urls = (*odd, "rabbit://u:long-hunter-two-x@h", f"a://u:{'@:' * 99}@h")
    with KNOWN.hold(*map(Secret, urls)):
        yield


def _units() -> Iterator[str]:
    yield from PIECES
    chosen = random.Random(7)
    for _ in range(60):
        yield "".join(chosen.choices(PIECES, k=chosen.randint(2, 4)))


def _seconds(work: Callable[[str], object], text: str) -> float:
    began = time.thread_time()
    work(text)
    return time.thread_time() - began


@pytest.mark.parametrize("work", [scrub, redact_url])
def test_the_time_grows_as_the_text(work: Callable[[str], object]) -> None:
    for unit in _units():
        short, long = (unit * (size // len(unit)) for size in (SHORT, LONG))
        # The least of a few is what the work takes; a busy machine adds to it.
        times = [(_seconds(work, short), _seconds(work, long))]
        while _exponent(times) > 1.3 and len(times) < 12:
            times.append((_seconds(work, short), _seconds(work, long)))
        assert _exponent(times) <= 1.3, unit


def _exponent(times: list[tuple[float, float]]) -> float:
    short, long = (min(column) for column in zip(*times, strict=True))
    # Starting takes the same for all, and is no part of the growth.
    return math.log(long / (short + 2e-5)) / math.log(LONG / SHORT)
