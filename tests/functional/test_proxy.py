# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The proxy that tests of failures rely on does what it says."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.proxy import Proxy


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that sends back what it gets."""
    listener = socket.create_server(("127.0.0.1", 0))
    threads = []

    def serve(end: socket.socket) -> None:
        with end:
            try:
                while data := end.recv(4096):
                    end.sendall(data)
            except OSError:
                return

    def accept() -> None:
        while True:
            try:
                end, _ = listener.accept()
            except OSError:
                return
            threads.append(threading.Thread(target=serve, args=(end,)))
            threads[-1].start()

    acceptor = threading.Thread(target=accept)
    acceptor.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    acceptor.join()
    for thread in threads:
        thread.join()


@pytest.fixture
def proxy(echo: int) -> Iterator[Proxy]:
    with Proxy("127.0.0.1", echo) as proxy:
        yield proxy


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection((proxy.host, proxy.port), timeout=5)


def exchange(end: socket.socket, data: bytes) -> bytes:
    end.sendall(data)
    answer = b""
    while len(answer) < len(data):
        piece = end.recv(4096)
        if not piece:
            break
        answer += piece
    return answer


def test_it_passes_and_counts(proxy: Proxy) -> None:
    with connect(proxy) as end:
        assert exchange(end, b"x" * 100_000) == b"x" * 100_000
        assert (proxy.accepted, proxy.open) == (1, 1)
        assert proxy.passed("to_client") == 100_000
        assert proxy.passed("to_server") == 100_000


def test_the_end_of_a_side_is_passed_on(proxy: Proxy) -> None:
    with connect(proxy) as end:
        end.sendall(b"last")
        end.shutdown(socket.SHUT_WR)
        assert end.recv(10) == b"last"
        assert end.recv(10) == b""


def test_cutting_ends_open_connections_only(proxy: Proxy) -> None:
    with connect(proxy) as end:
        assert exchange(end, b"1") == b"1"
        proxy.cut()
        with pytest.raises(ConnectionError):
            assert exchange(end, b"2") == b"2" or _raise()
    with connect(proxy) as end:
        assert exchange(end, b"3") == b"3"


def test_a_cut_in_good_order_is_an_end_of_stream(proxy: Proxy) -> None:
    with connect(proxy) as end:
        assert exchange(end, b"1") == b"1"
        proxy.cut(reset=False)
        assert end.recv(10) == b""
    with connect(proxy) as end:
        assert exchange(end, b"2") == b"2"


def test_trickling_passes_single_bytes_until_restored(proxy: Proxy) -> None:
    with connect(proxy) as end:
        assert exchange(end, b"1") == b"1"
        # So long that a second byte cannot come by itself.
        proxy.trickle(60)
        end.sendall(b"23")
        assert end.recv(10) == b"2"
        end.settimeout(0.2)
        with pytest.raises(TimeoutError):
            end.recv(10)
    proxy.restore()
    with connect(proxy) as end:
        assert exchange(end, b"45") == b"45"


def _raise() -> bool:
    raise ConnectionError("closed by the peer")


def test_refusing_keeps_the_port_and_ends_with_restore(proxy: Proxy) -> None:
    proxy.refuse()
    proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
    proxy.restore()
    proxy.restore()
    with connect(proxy) as end:
        assert exchange(end, b"1") == b"1"


def test_refusing_can_spare_open_connections(proxy: Proxy) -> None:
    with connect(proxy) as end:
        assert exchange(end, b"1") == b"1"
        proxy.refuse(cut=False)
        assert exchange(end, b"2") == b"2"


@pytest.mark.parametrize("direction", ["to_server", "to_client"])
def test_it_swallows_in_one_direction(proxy: Proxy, direction: str) -> None:
    with connect(proxy) as end:
        assert exchange(end, b"1") == b"1"
        before = proxy.passed("to_server")
        if direction == "to_server":
            proxy.swallow("to_server")
        else:
            proxy.swallow("to_client")
        end.settimeout(0.2)
        end.sendall(b"lost")
        with pytest.raises(TimeoutError):
            end.recv(10)
        reached = proxy.passed("to_server") - before
        assert reached == (0 if direction == "to_server" else 4)
        proxy.restore()
        end.settimeout(5)
        assert exchange(end, b"2") == b"2"


def test_it_is_deaf_to_new_connections_too(proxy: Proxy) -> None:
    proxy.swallow()
    with connect(proxy) as end:
        end.settimeout(0.2)
        end.sendall(b"lost")
        with pytest.raises(TimeoutError):
            end.recv(10)


def test_it_delays_in_both_directions(proxy: Proxy) -> None:
    proxy.delay(0.1)
    with connect(proxy) as end:
        start = time.monotonic()
        assert exchange(end, b"1") == b"1"
        assert time.monotonic() - start >= 0.2


def test_without_a_server_connections_are_reset() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with (
            Proxy("127.0.0.1", unused.getsockname()[1]) as proxy,
            pytest.raises(ConnectionError),
            connect(proxy) as end,
        ):
            assert exchange(end, b"1") == b"1" or _raise()


def test_closing_ends_a_connection_that_waits(proxy: Proxy) -> None:
    with connect(proxy) as end:
        assert exchange(end, b"1") == b"1"
        proxy.swallow()
        proxy.delay(60)
        end.sendall(b"lost")
        proxy.close()
        proxy.close()
        assert proxy.open == 0
