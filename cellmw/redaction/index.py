# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Search a text for thousands of passwords without trying each.

An :class:`Index` knows keys: pieces of passwords, all of one length, twice the
length of a machine word.  A text is cut into such words.  A key covers one of
them whole wherever it stands, and that word begins in the key's first half.
So a text none of whose words is known holds no key, and for most texts that
ends the search, however many keys there are.  Otherwise a key leads to the
places and lengths of the forms that hold it, and each of these to one look-up.
So each character of a text is looked at a number of times that depends on the
passwords alone.
"""

from __future__ import annotations

import array
import functools
import struct
from collections.abc import Callable, Iterator, Sequence

from cellmw.redaction import spellings
from cellmw.redaction.urls import Login, Span

#: Up to this many bytes of a text one call reads into a tuple, which is
#: searched quicker than an array, and takes more memory.
SHORT = 2048

#: How to search a text: whether words are all unknown; and for each length of
#: the text, the last one for all that are longer, what cuts it into words.
Search = tuple[
    Callable[[Sequence[int]], bool],
    Sequence[Callable[[bytes], Sequence[int]]],
]


class _Entry:
    """The logins that one key leads to, counted."""

    __slots__ = ("logins", "shapes", "version")

    def __init__(self) -> None:
        self.logins: dict[Login, int] = {}
        self.version = 0
        self.shapes: tuple[int, set[bytes], set[tuple[int, int]]]
        self.shapes = 0, set(), set()

    def shapes_of(self, key: bytes) -> tuple[set[bytes], set[tuple[int, int]]]:
        """Spell the logins, for the first text that holds the key.

        :returns: the forms, and where in them the key stands with their length
        """
        seen, forms, places = self.shapes
        if seen != self.version:
            # Read first: a login that is entered meanwhile makes these
            # outdated.
            version = self.version
            logins = tuple(self.logins)
            forms = set().union(*map(spellings.forms_of, logins))
            places = {(f.index(key), len(f)) for f in forms if key in f}
            self.shapes = version, forms, places
        return forms, places


class Index:
    """Keys of one length.

    One thread at a time changes it.  Searching takes no lock: each look-up is
    atomic, and the dictionaries are filled from the last one that a search
    asks to the first, and emptied the other way.

    :param word: the type of a word, as :mod:`array` names it
    :param step: how many bytes a word begins after the one before it
    """

    def __init__(self, word: str, step: int) -> None:
        self._type = word
        self._size = struct.calcsize(word)
        self._step = step
        self.key_length = step + self._size - 1
        self._entries: dict[bytes, _Entry] = {}
        self.words: dict[int, int] = {}

    @functools.cached_property
    def search(self) -> Search:
        """Made for the first key, because a process may never need it."""
        step, gap = self._step, self._step - self._size
        short = [
            struct.Struct(f"{gap}x".join(self._type * number)).unpack_from
            for number in range((SHORT + gap) // step + 1)
        ]
        cuts = [short[(size + gap) // step] for size in range(SHORT)]
        return self.words.keys().isdisjoint, (*cuts, self._cut_long)

    def add(self, key: bytes, login: Login) -> None:
        """Find a login by this piece of its password."""
        entry = self._entries.get(key) or _Entry()
        entry.logins[login] = entry.logins.get(login, 0) + 1
        entry.version += 1
        self._entries[key] = entry
        words = self.words
        for word in self._words_of(key):
            words[word] = words.get(word, 0) + 1

    def remove(self, key: bytes, login: Login) -> None:
        """Undo one :meth:`add`."""
        words = self.words
        for word in self._words_of(key):
            count = words[word] - 1
            if count:
                words[word] = count
            else:
                del words[word]
        entry = self._entries[key]
        entry.logins[login] -= 1
        if not entry.logins[login]:
            del entry.logins[login]
        entry.version += 1
        if not entry.logins:
            del self._entries[key]

    def spans(self, data: bytes) -> Iterator[Span]:
        """Find where the passwords stand in a text, in UTF-8."""
        words = self._cut_long(data)
        if self.words.keys().isdisjoint(words):
            return
        for index, word in enumerate(words):
            if word not in self.words:
                continue
            last = index * self._step
            for start in range(max(0, last - self._step + 1), last + 1):
                key = data[start : start + self.key_length]
                entry = self._entries.get(key)
                if entry is None:
                    continue
                forms, places = entry.shapes_of(key)
                for offset, length in places:
                    first = start - offset
                    if first >= 0 and data[first : first + length] in forms:
                        yield first, first + length

    def _cut_long(self, data: bytes) -> Sequence[int]:
        end = len(data) // self._size * self._size
        return array.array(self._type, data[:end])[:: self._step // self._size]

    def _words_of(self, key: bytes) -> Sequence[int]:
        """Return the words of which any text with the key has one."""
        size = self._size
        return array.array(
            self._type,
            b"".join([key[at : at + size] for at in range(self._step)]),
        )
