# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Find known credentials by their value.

:class:`Secrets` counts who holds each, because many cells, and many
generations of a cell, may share a password.
"""

from __future__ import annotations

import collections
import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self
from urllib.parse import unquote

from cellmw.redaction import spellings, urls
from cellmw.redaction.index import SHORT, Index, Search
from cellmw.redaction.secret import Secret

_LOG = logging.getLogger(__name__)


_Key = tuple[Index, bytes, urls.Login]


class _Needles(NamedTuple):
    """What a text is searched for because of one connection string."""

    keys: tuple[_Key, ...]
    has_short: bool


class Hold:
    """Keeps credentials known until :meth:`drop`.

    The caller of :meth:`Secrets.hold` drops it.  Also a context manager.
    """

    __slots__ = ("_secrets", "_urls")

    def __init__(self, secrets: Secrets, held: tuple[Secret, ...]) -> None:
        self._secrets = secrets
        # Taking the last item out of a list is atomic.
        self._urls = [held]

    def drop(self) -> None:
        """Stop holding the credentials.

        They are forgotten with their last hold.  Never blocks, so a finalizer
        may call it.  A second call does nothing.
        """
        try:
            held = self._urls.pop()
        except IndexError:
            return
        self._secrets._forget(held)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.drop()

    def __repr__(self) -> str:
        return f"<Hold at {id(self):#x}>"


class Secrets:
    """Known credentials, to be found in texts.

    Thread-safe, and usable after a fork at any moment.  Searching takes no
    lock.
    """

    def __init__(self) -> None:
        #: called without arguments at each hold
        self.on_hold: Callable[[], object] = bool
        #: another number after each value that becomes known
        self.version = 0
        self._held: dict[Secret, tuple[int, _Needles]] = {}
        # Long keys stand in few texts, and few words of a text are looked up
        # for them.  Each password is found by the longest that it has.
        self._indexes = (Index("Q", 16), Index("Q", 8), Index("I", 4))
        self._used: tuple[Search, ...] = ()
        self._dropped: collections.deque[tuple[Secret, ...]] = (
            collections.deque()
        )
        self._warned: dict[str, object] = {}
        self._locks: dict[int, threading.Lock] = {}

    def hold(self, *urls: Secret | None, names: Sequence[str] = ()) -> Hold:
        """Make the credentials of connection strings known.

        Blocks only while other threads add or remove theirs.  None is skipped.

        :param names: which option or column each stands in, for the warning
            about a password that is too short to be found by its value
        :returns: keeps them known; the caller drops it
        """
        entered = [(url, self._needles(url)) for url in urls if url]
        with self._lock():
            for url, needles in entered:
                self._enter(url, needles)
        self._settle()
        self.on_hold()
        short = {url for url, needles in entered if needles.has_short}
        if short:
            # There may be fewer names than URLs.
            for one, name in zip(urls, names, strict=False):
                if one in short:
                    self._warn(name)
        return Hold(self, tuple(url for url, _ in entered))

    def __len__(self) -> int:
        """How many connection strings are known."""
        return len(self._held)

    def may_show(self, text: str) -> bool:
        """False: the text holds no known value.  True: perhaps."""
        data = text.encode("utf-8", "surrogatepass")
        for holds_none_of, cuts in self._used:
            cut = cuts[len(data)] if len(data) < SHORT else cuts[-1]
            if not holds_none_of(cut(data)):
                return True
        return False

    def spans(self, text: str) -> list[urls.Span]:
        """Find where known values stand in a text."""
        data = text.encode("utf-8", "surrogatepass")
        found = [span for index in self._indexes for span in index.spans(data)]
        if len(data) == len(text) or not found:
            return found
        return _in_characters(data, found)

    def hide(self, text: str) -> str:
        """Return the text with asterisks in place of the known values."""
        return urls.hide(text, self.spans(text))

    def _needles(self, url: Secret) -> _Needles:
        known = self._held.get(url)
        return self._needles_of(url.reveal()) if known is None else known[1]

    def _forget(self, held: tuple[Secret, ...]) -> None:
        self._dropped.append(held)
        self._settle()

    def _settle(self) -> None:
        # A finalizer can run in a thread that is in here, so nobody waits,
        # and whoever has the lock looks once more after giving it back.
        while self._dropped:
            lock = self._lock()
            if not lock.acquire(blocking=False):
                return
            try:
                while self._dropped:
                    for url in self._dropped.popleft():
                        self._leave(url)
            finally:
                lock.release()

    def _enter(self, url: Secret, needles: _Needles) -> None:
        count, needles = self._held.get(url, (0, needles))
        if not count:
            for index, key, login in needles.keys:
                index.add(key, login)
            self._used = tuple([i.search for i in self._indexes if i.words])
            self.version += 1
        # Last, and first in _leave: what a fork cuts short counts as not
        # known, and the next hold adds it once more.
        self._held[url] = (count + 1, needles)

    def _leave(self, url: Secret) -> None:
        count, needles = self._held[url]
        if count > 1:
            self._held[url] = (count - 1, needles)
        else:
            del self._held[url]
            for index, key, login in needles.keys:
                index.remove(key, login)
            self._used = tuple([i.search for i in self._indexes if i.words])

    def _needles_of(self, url: str) -> _Needles:
        reading = urls.read(url)
        keys: list[_Key] = []
        lengths = []
        for login in reading.logins:
            decoded = unquote(login.password)
            lengths.append(len(decoded))
            keys += self._keys_of(login, decoded)
            port = urls.port_of(login, decoded)
            if port is not None:
                keys += self._keys_of(port, unquote(port.password))
        # Of several readings the longest is taken: the others are parts of it.
        shortest = min if reading.is_certain else max
        has_short = bool(lengths) and shortest(lengths) < spellings.MIN_LENGTH
        return _Needles(tuple(keys), has_short)

    def _keys_of(self, login: urls.Login, decoded: str) -> list[_Key]:
        part = spellings.common_part(login.password, decoded)
        for index in self._indexes:
            if len(part) >= index.key_length:
                return [(index, part[: index.key_length], login)]
        length, forms = index.key_length, spellings.forms_of(login)
        return [(index, key, login) for key in {f[:length] for f in forms}]

    def _lock(self) -> threading.Lock:
        # One for each process: a fork may have copied it locked.
        pid = os.getpid()
        lock = self._locks.get(pid)
        return lock or self._locks.setdefault(pid, threading.Lock())

    def _warn(self, name: str) -> None:
        this = object()
        if self._warned.setdefault(name, this) is this:
            _LOG.warning(
                "%s has a password of less than %d characters: logs hide it "
                "in connection strings, and show it elsewhere. Set a longer "
                "password",
                name,
                spellings.MIN_LENGTH,
            )


#: What this process knows.
KNOWN = Secrets()


def _in_characters(data: bytes, found: list[urls.Span]) -> list[urls.Span]:
    """Count positions in characters that were counted in bytes."""
    at, characters, index = 0, 0, {}
    for position in sorted({one for span in found for one in span}):
        part = data[at:position].decode("utf-8", "surrogatepass")
        at, characters = position, characters + len(part)
        index[position] = characters
    return [(index[start], index[end]) for start, end in found]
