# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""A TCP proxy on 127.0.0.1 whose connections a test can disturb.

It stands between the code under test and a real server, and can pass, cut,
refuse, swallow in either direction, delay and trickle; it counts what went
through.
:class:`Proxy` owns its sockets and threads: :meth:`Proxy.close` ends them all.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import types
from collections.abc import Callable
from typing import Literal, Self

Direction = Literal["to_server", "to_client"]
BOTH: tuple[Direction, Direction] = ("to_server", "to_client")

_CHUNK = 65536
# What close() does with this is to send a reset, not an orderly end.
_RESET = struct.pack("ii", 1, 0)


class Proxy:
    """Passes connections to one server until it is told otherwise.

    Every method may be called from any thread.  What a method changes holds
    for the connections there are and for those to come.

    :param host: where the server is
    :param port: the server's port
    :ivar port: the port on 127.0.0.1 to connect to; stays the same
    """

    host = "127.0.0.1"

    def __init__(self, host: str, port: int) -> None:
        self._server = (host, port)
        self._lock = threading.Lock()
        self._links: set[_Link] = set()
        self._threads: list[threading.Thread] = []
        self._swallowed: frozenset[Direction] = frozenset()
        self._delay = 0.0
        self._trickle = 0.0
        self._closed = threading.Event()
        self._accepted = 0
        self._bytes: dict[Direction, int] = dict.fromkeys(BOTH, 0)
        self._placeholder: socket.socket | None = None
        self._listener: socket.socket | None = _bind(0)
        self.port: int = self._listener.getsockname()[1]
        self._listen(self._listener)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        self.close()

    @property
    def address(self) -> str:
        """``host:port`` for a URL."""
        return f"{self.host}:{self.port}"

    @property
    def accepted(self) -> int:
        """How many connections were accepted so far."""
        with self._lock:
            return self._accepted

    @property
    def open(self) -> int:
        """How many connections are open now."""
        with self._lock:
            return len(self._links)

    def passed(self, direction: Direction) -> int:
        """How many bytes were handed on in this direction so far."""
        with self._lock:
            return self._bytes[direction]

    def cut(self, *, reset: bool = True) -> None:
        """End all connections; new ones are accepted as before.

        :param reset: with a reset, or in good order
        """
        with self._lock:
            links = list(self._links)
        for link in links:
            link.close(reset=reset)

    def refuse(self, *, cut: bool = True) -> None:
        """Refuse new connections; reset the open ones too unless told not to.

        The port stays ours meanwhile, so that nobody else gets it.
        """
        with self._lock:
            listener, self._listener = self._listener, None
            if listener is not None:
                _shut(listener)
                self._placeholder = _bind(self.port)
        if cut:
            self.cut()

    def swallow(self, *directions: Direction) -> None:
        """Read and throw away what comes, in these directions or in both.

        Neither side notices by itself: connections stay, new ones too.
        """
        self._swallowed = frozenset(directions or BOTH)

    def delay(self, seconds: float) -> None:
        """Hold back each piece of data for a time, in both directions."""
        self._delay = seconds

    def trickle(self, seconds: float) -> None:
        """Pass one byte at a time to the client, each after a pause."""
        self._trickle = seconds

    def restore(self) -> None:
        """Accept and pass everything again.

        What was swallowed does not come back, so a connection that was deaf
        may be of no use any more.
        """
        self._swallowed = frozenset()
        self._delay = self._trickle = 0.0
        with self._lock:
            if self._listener is not None or self._closed.is_set():
                return
            if self._placeholder is not None:
                self._placeholder.close()
                self._placeholder = None
            self._listener = listener = _bind(self.port)
        self._listen(listener)

    def close(self) -> None:
        """End everything and wait for the threads.  May be called twice."""
        self._closed.set()
        self.refuse()
        with self._lock:
            if self._placeholder is not None:
                self._placeholder.close()
                self._placeholder = None
        # The accepting thread may start others until it has ended.
        while threads := self._take_threads():
            for thread in threads:
                thread.join()

    def _take_threads(self) -> list[threading.Thread]:
        with self._lock:
            threads, self._threads = self._threads, []
        return threads

    def _listen(self, listener: socket.socket) -> None:
        listener.listen(256)
        self._start(self._accept, listener)

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(
            target=target,
            args=args,
            name=f"proxy-{self.port}",
            daemon=True,
        )
        with self._lock:
            self._threads = [t for t in self._threads if t.is_alive()]
            # Started here: a thread not yet alive must not be dropped by
            # another that comes along.
            thread.start()
            self._threads.append(thread)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError), listener:
            while True:
                client, _ = listener.accept()
                self._connect(client)

    def _connect(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(self._server, timeout=5)
        except OSError:
            with self._lock:
                self._accepted += 1
            _reset(client)
            return
        server.settimeout(None)
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link = _Link(client, server)
        with self._lock:
            self._accepted += 1
            self._links.add(link)
        self._start(self._pump, link, client, server, "to_server")
        self._start(self._pump, link, server, client, "to_client")
        if self._closed.is_set():
            link.close(reset=True)

    def _pump(
        self,
        link: _Link,
        source: socket.socket,
        target: socket.socket,
        direction: Direction,
    ) -> None:
        try:
            while data := source.recv(_CHUNK):
                if self._delay:
                    self._closed.wait(self._delay)
                if direction in self._swallowed:
                    continue
                # Counted first: whoever has received it finds it counted.
                with self._lock:
                    self._bytes[direction] += len(data)
                if direction == "to_client":
                    data = self._send_slowly(target, data)
                target.sendall(data)
            # A deaf proxy does not tell that a side has gone, either.
            if direction not in self._swallowed:
                target.shutdown(socket.SHUT_WR)
        except OSError:
            link.close(reset=True)
        finally:
            if link.ended(direction):
                link.close()
                with self._lock:
                    self._links.discard(link)

    def _send_slowly(self, target: socket.socket, data: bytes) -> bytes:
        """Send single bytes while told to; gives what is left."""
        while data and self._trickle and not self._closed.is_set():
            target.sendall(data[:1])
            data = data[1:]
            self._closed.wait(self._trickle)
        return data


class _Link:
    """The two sockets of one connection."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self._ends = (client, server)
        self._lock = threading.Lock()
        self._running: set[Direction] = set(BOTH)

    def ended(self, direction: Direction) -> bool:
        """Note that a direction has ended; whether it was the last one."""
        with self._lock:
            self._running.discard(direction)
            return not self._running

    def close(self, *, reset: bool = False) -> None:
        """Close both sockets.

        While a thread still reads, they are shut down only, for a closed
        descriptor might by then be somebody else's.
        """
        with self._lock:
            running = bool(self._running)
            for end in self._ends:
                if reset:
                    with contextlib.suppress(OSError):
                        end.setsockopt(
                            socket.SOL_SOCKET, socket.SO_LINGER, _RESET
                        )
                if running:
                    with contextlib.suppress(OSError):
                        end.shutdown(socket.SHUT_RDWR)
                else:
                    end.close()


def _bind(port: int) -> socket.socket:
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind((Proxy.host, port))
    return bound


def _shut(listener: socket.socket) -> None:
    # close() alone would not wake the thread that waits in accept().
    with contextlib.suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def _reset(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    end.close()
