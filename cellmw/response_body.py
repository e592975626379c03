# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""A response body whose end releases the request's handle.

A server's own file goes through unwrapped, so that ``sendfile`` still works.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from cellmw import exceptions
from cellmw.transports.handle import Handle

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

LOG = logging.getLogger(__name__)

# Gives the body of our own answer to an error, or None.
Answer = Callable[[BaseException], Iterable[bytes] | None]


def wrap(
    body: Iterable[bytes],
    file_wrapper: Any,
    answer: Answer,
    handle: Handle | None,
) -> Iterable[bytes]:
    """Give a body that is still to come an end, unless it is a server's file.

    :param file_wrapper: ``wsgi.file_wrapper`` of the environ, or None
    :param answer: called with an error that iterating the body raises
    :param handle: what the end of the body releases
    """
    try:
        if _is_servers_file(body, file_wrapper):
            if handle is not None:
                handle.release()
            return body
        # The class is asked, as len() does: a __getattr__ has no say.
        wrapper = _SizedBody if hasattr(type(body), "__len__") else _Body
        return wrapper(body, answer, handle)
    except BaseException:
        # The server gets nothing that it could close.
        _end(body, handle)
        raise


def _end(body: object, handle: Handle | None) -> None:
    """Close the application's body, and release the handle."""
    try:
        close = getattr(body, "close", None)
        if close is not None:
            close()
    finally:
        if handle is not None:
            handle.release()


class _FileWrapper:
    """A server's file wrapper that is a function, and what it has made.

    uWSGI's gives back the file itself and knows it again by identity.
    """

    def __init__(self, wrapper: Callable[..., Any]) -> None:
        self._wrapper = wrapper
        self.made: object = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.made = self._wrapper(*args, **kwargs)
        return self.made


def know_files_again(environ: WSGIEnvironment) -> None:
    """Have the server's file wrapper remember what it makes."""
    wrapper = environ.get("wsgi.file_wrapper")
    if wrapper is not None and not isinstance(wrapper, type):
        environ["wsgi.file_wrapper"] = _FileWrapper(wrapper)


def _is_servers_file(body: object, file_wrapper: Any) -> bool:
    if isinstance(file_wrapper, type):
        return isinstance(body, file_wrapper)
    return isinstance(file_wrapper, _FileWrapper) and (
        body is file_wrapper.made
    )


class _Body:
    """The application's body, with an end at which the handle is released.

    Owned by the server, which closes it (PEP 3333).
    """

    __slots__ = ("_answer", "_body", "_handle", "_iterator")

    def __init__(
        self, body: Iterable[bytes], answer: Answer, handle: Handle | None
    ) -> None:
        self._body = body
        self._iterator: Iterator[bytes] | None = None
        self._answer = answer
        self._handle = handle

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            if self._iterator is None:
                self._iterator = iter(self._body)
            return next(self._iterator)
        except exceptions.CellMWError as error:
            answer = self._answer(error)
            if answer is None:
                raise
        self._iterator = iter(answer)
        return next(self._iterator)

    def close(self) -> None:
        """Close the application's body, and release the handle."""
        body, self._body = self._body, ()
        try:
            _end(body, self._handle)
        finally:
            self._iterator = None

    def __del__(self) -> None:
        handle = self._handle
        if handle is not None and handle.abandon():
            LOG.warning(
                "Nobody closed a response: neither the server nor a filter "
                "in front of this one called close(), as PEP 3333 requires. "
                "%r was held until now.",
                handle,
            )


class _SizedBody(_Body):
    """A body whose number of chunks is known: servers make use of it."""

    __slots__ = ()

    def __iter__(self) -> Iterator[bytes]:
        # One without a length: list() would ask for it, and a length that
        # raises is the body's, not its iterator's.
        return iter(self.__next__, self)

    def __bool__(self) -> bool:
        return bool(self._body)

    def __len__(self) -> int:
        return len(self._body)  # type: ignore[arg-type]  # only where it has
