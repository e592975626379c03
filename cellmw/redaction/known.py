# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The credentials that this process knows, to be found by their value.

:class:`Secrets` owns them, counted: the same password may serve many cells
and many generations of one, and stays known until nobody holds it.

To find thousands of values in a text without trying each, the text is cut
into words of four bytes.  A form has eight bytes or more, so wherever it
stands it covers one of these words whole, and that word is one of the four
that begin within its first four bytes.  A text none of whose words is among
those holds no known value; for most texts that ends it, and how many values
there are does not matter.  Else the first eight bytes lead to the lengths,
and each length to one look-up.
"""

from __future__ import annotations

import array
import collections
import logging
import os
import re
import string
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Self, TypeVar
from urllib.parse import unquote

from cellmw.redaction import spellings, urls
from cellmw.redaction.secret import Secret

_LOG = logging.getLogger(__name__)

_WORD = array.array("I").itemsize
_PREFIX = 8
_UTF8 = ("utf-8", "surrogatepass")
_HIDDEN = urls.HIDDEN.encode()
_base64 = frozenset(f"{string.ascii_letters}{string.digits}+/_-".encode())
_base64_after = re.compile(rb"[A-Za-z0-9+/_\-]*={0,2}")

# In a text such a URL may seem to go on, or to end early.
_hard_to_end = re.compile(r"[\s'\"`<>\\\x00-\x1f\x7f]")

_Key = TypeVar("_Key")


class _Spelled(NamedTuple):
    """What is to be found of one connection string."""

    plain: tuple[bytes, ...]
    base64: tuple[bytes, ...]
    heads: dict[str, str]
    has_short: bool


class Hold:
    """Some credentials, known until :meth:`drop`.

    Who asked for it drops it.  A context manager too.
    """

    __slots__ = ("_secrets", "_urls")

    def __init__(self, secrets: Secrets, held: tuple[Secret, ...]) -> None:
        self._secrets = secrets
        # A list, for taking the last item out of one is atomic.
        self._urls = [held]

    def drop(self) -> None:
        """Forget them, unless somebody else holds them too.

        Never blocks, so a finalizer may call it.  Twice is once.
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
    """Known credentials; hides them in texts.

    Thread-safe, and works on after a fork in the middle of anything.  Hiding
    takes no lock: it looks into dictionaries, each look-up atomic, that are
    filled from the last one it asks to the first and emptied the other way.
    """

    def __init__(self) -> None:
        #: called without arguments at each hold
        self.on_hold: Callable[[], object] = bool
        self._held: dict[Secret, tuple[int, _Spelled]] = {}
        self._forms: dict[bytes, int] = {}
        self._base64_forms: dict[bytes, int] = {}
        self._lengths: dict[bytes, dict[int, int]] = {}
        self._words: dict[int, int] = {}
        # Only of those URLs whose end cannot be seen in a text.
        self._heads: dict[str, tuple[int, str]] = {}
        self._head_lengths: dict[int, int] = {}
        self._dropped: collections.deque[tuple[Secret, ...]] = (
            collections.deque()
        )
        self._warned: dict[str, object] = {}
        self._locks: dict[int, threading.Lock] = {}

    def hold(self, *urls: Secret | None, owner: str | None = None) -> Hold:
        """Know the credentials of these connection strings.

        Blocks for no longer than it takes to enter them.  None is passed
        over.

        :param owner: whose they are, for the warning about a password that
            is too short to be found by its value
        :returns: what ends it; the caller drops it
        """
        held = tuple(url for url in urls if url)
        spelled = [self._spelled(url) for url in held]
        with self._lock():
            for url, forms in zip(held, spelled, strict=True):
                self._enter(url, forms)
        self._settle()
        self.on_hold()
        if owner is not None and any(forms.has_short for forms in spelled):
            self._warn(owner)
        return Hold(self, held)

    def __len__(self) -> int:
        """How many connection strings are known."""
        return len(self._held)

    def may_show(self, text: str) -> bool:
        """False: there is no known value in the text.  True: perhaps."""
        return not self._words.keys().isdisjoint(_cut(text.encode(*_UTF8)))

    def hide(self, text: str) -> str:
        """The text with asterisks in place of the known values.

        A text without one is given back itself.  One pass: what is left may
        hold a value that has come about by hiding another one.
        """
        data = text.encode(*_UTF8)
        words = _cut(data)
        if self._words.keys().isdisjoint(words):
            return text
        spans = list(self._spans(data, words))
        if not spans:
            return text
        return _without(data, spans).decode(*_UTF8)

    def head_at(self, text: str, start: int) -> tuple[int, str] | None:
        """Whether a known connection string begins here in the text.

        :returns: where its secret part ends, and what to show in its place
        """
        for length in self._head_lengths:
            found = self._heads.get(text[start : start + length])
            if found is not None:
                return start + length, found[1]
        return None

    def _spans(
        self, data: bytes, words: Iterable[int]
    ) -> Iterator[tuple[int, int]]:
        # Up to where the base64 texts that were found go: no part of one is
        # looked at twice.
        done = 0
        for index, word in enumerate(words):
            if word not in self._words:
                continue
            for start in range(
                max(0, index * _WORD - _WORD + 1), index * _WORD + 1
            ):
                lengths = self._lengths.get(data[start : start + _PREFIX])
                for length in lengths or ():
                    form = data[start : start + length]
                    if form in self._forms:
                        yield start, start + length
                    if form in self._base64_forms and start >= done:
                        first, done = _around(
                            data, start, start + length, done
                        )
                        yield first, done

    def _spelled(self, url: Secret) -> _Spelled:
        known = self._held.get(url)
        return _spell(url.reveal()) if known is None else known[1]

    def _forget(self, held: tuple[Secret, ...]) -> None:
        self._dropped.append(held)
        self._settle()

    def _settle(self) -> None:
        # A finalizer can run in a thread that is in here: so nobody waits,
        # and who has the lock looks once more after giving it back.
        while self._dropped:
            lock = self._lock()
            if not lock.acquire(blocking=False):
                return
            try:
                self._forget_dropped()
            finally:
                lock.release()

    def _forget_dropped(self) -> None:
        while self._dropped:
            for url in self._dropped.popleft():
                self._leave(url)

    def _enter(self, url: Secret, forms: _Spelled) -> None:
        count, forms = self._held.get(url, (0, forms))
        if not count:
            self._add(forms)
        # Last, and first in _leave: what a fork cuts short counts as not
        # known, and is added once more by who needs it.
        self._held[url] = (count + 1, forms)

    def _leave(self, url: Secret) -> None:
        count, forms = self._held[url]
        if count > 1:
            self._held[url] = (count - 1, forms)
        else:
            del self._held[url]
            self._remove(forms)

    def _add(self, spelled: _Spelled) -> None:
        for forms, known in self._kinds(spelled):
            for form in forms:
                _count(known, form)
                # Readers go over the lengths of a prefix: replaced, never
                # changed.
                lengths = dict(self._lengths.get(form[:_PREFIX], {}))
                _count(lengths, len(form))
                self._lengths[form[:_PREFIX]] = lengths
                for word in _words_of(form):
                    _count(self._words, word)
        for head, shown in spelled.heads.items():
            count = self._heads.get(head, (0, ""))[0]
            self._heads[head] = (count + 1, shown)
            lengths = dict(self._head_lengths)
            _count(lengths, len(head))
            self._head_lengths = _longest_first(lengths)

    def _remove(self, spelled: _Spelled) -> None:
        for forms, known in self._kinds(spelled):
            for form in forms:
                for word in _words_of(form):
                    _uncount(self._words, word)
                lengths = dict(self._lengths[form[:_PREFIX]])
                _uncount(lengths, len(form))
                if lengths:
                    self._lengths[form[:_PREFIX]] = lengths
                else:
                    del self._lengths[form[:_PREFIX]]
                _uncount(known, form)
        for head, shown in spelled.heads.items():
            lengths = dict(self._head_lengths)
            _uncount(lengths, len(head))
            self._head_lengths = lengths
            count = self._heads[head][0]
            if count > 1:
                self._heads[head] = (count - 1, shown)
            else:
                del self._heads[head]

    def _kinds(
        self, spelled: _Spelled
    ) -> tuple[tuple[tuple[bytes, ...], dict[bytes, int]], ...]:
        return (
            (spelled.plain, self._forms),
            (spelled.base64, self._base64_forms),
        )

    def _lock(self) -> threading.Lock:
        # One for each process: a fork may have copied it locked.
        pid = os.getpid()
        lock = self._locks.get(pid)
        return lock or self._locks.setdefault(pid, threading.Lock())

    def _warn(self, owner: str) -> None:
        this = object()
        if self._warned.setdefault(owner, this) is this:
            _LOG.warning(
                "%s has a password of less than %d characters: it is hidden "
                "in connection strings, and shown elsewhere",
                owner,
                spellings.MIN_LENGTH,
            )


#: What this process knows.
KNOWN = Secrets()


def _spell(url: str) -> _Spelled:
    """All that is to be found of a connection string.  Costs some 0.1 ms."""
    reading = urls.read(url)
    plain: set[str] = set()
    in_base64: set[str] = set()
    for user, password in reading.logins:
        plain.update(spellings.fewest(spellings.plain(password)))
        in_base64.update(spellings.in_base64(user, password))
    for piece in reading.pieces:
        plain.update(spellings.fewest(spellings.plain(piece)))
    heads = {}
    if not reading.is_certain or _hard_to_end.search(url):
        heads = _heads(url)
    return _Spelled(
        tuple(form.encode(*_UTF8) for form in plain),
        tuple(form.encode() for form in spellings.fewest(in_base64)),
        heads,
        _has_short(url, reading),
    )


def _heads(url: str) -> dict[str, str]:
    shown = urls.head_of(urls.redact_url(url))
    head = urls.head_of(url)
    if head.endswith("@") and not shown.endswith("@"):
        # All of it is hidden; another URL, which begins with the same login,
        # shows its host.
        shown += "@"
    forms = spellings.escaped(head) | {head}
    return {form: shown for form in forms if len(form) > len(shown)}


def _has_short(url: str, reading: urls.Reading) -> bool:
    logins = reading.logins if reading.is_certain else urls.whole_login(url)
    return any(
        len(unquote(password)) < spellings.MIN_LENGTH for _, password in logins
    )


def _words_of(form: bytes) -> Iterator[int]:
    """The words of which any text with this form in it has at least one."""
    for start in range(_WORD):
        yield int.from_bytes(form[start : start + _WORD], sys.byteorder)


def _cut(data: bytes) -> array.array[int]:
    return array.array("I", data[: len(data) // _WORD * _WORD])


def _around(data: bytes, start: int, end: int, limit: int) -> tuple[int, int]:
    """The whole of the base64 text that this is a part of.

    :param limit: before this nothing belongs to it
    """
    while start > limit and data[start - 1] in _base64:
        start -= 1
    after = _base64_after.match(data, end)
    assert after is not None
    return start, after.end()


def _without(data: bytes, spans: list[tuple[int, int]]) -> bytes:
    parts, done = [], 0
    spans.sort()
    for start, end in spans:
        if start >= done:
            parts += [data[done:start], _HIDDEN]
        done = max(done, end)
    return b"".join((*parts, data[done:]))


def _count(counts: dict[_Key, int], key: _Key) -> None:
    counts[key] = counts.get(key, 0) + 1


def _uncount(counts: dict[_Key, int], key: _Key) -> None:
    if counts[key] > 1:
        counts[key] -= 1
    else:
        del counts[key]


def _longest_first(counts: dict[int, int]) -> dict[int, int]:
    return dict(sorted(counts.items(), reverse=True))
