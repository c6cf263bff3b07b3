"""The words with which a port of a guest is asked for, and what is made of the answer."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pandastack.errors import RuntimeFailed
from pandastack.host.runtimes.firecracker import vsock


@contextmanager
def device(place: Path, *answers: Callable[[socket.socket], None]) -> Iterator[list[bytes]]:
    """What stands for a Firecracker: each connection that it accepts is given to the next of `answers`."""
    heard: list[bytes] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(place))
        listener.listen()

        def serve() -> None:
            for answer in answers:
                connection, _ = listener.accept()
                with connection:
                    heard.append(connection.recv(100))
                    answer(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        yield heard
        thread.join(10)
        assert not thread.is_alive()


def soon() -> float:
    return time.monotonic() + 5


def test_a_port_is_asked_for_and_then_the_stream_begins(tmp_path: Path) -> None:
    def accept(connection: socket.socket) -> None:
        connection.sendall(b"OK 1073741824\n")
        assert connection.recv(100) == b"opening"
        connection.sendall(b"answerand more")

    with device(tmp_path / "v.sock", accept) as heard:
        connection, answer = vsock.dialed(tmp_path / "v.sock", b"opening", 6, soon())
        with connection:
            assert answer == b"answer"
            assert connection.recv(100) == b"and more"
    assert heard == [b"CONNECT 1024\n"]


@pytest.mark.parametrize("said", [b"", b"OK", b"NO\n", b"OK " + b"1" * 100])
def test_what_is_no_yes_is_an_error(tmp_path: Path, said: bytes) -> None:
    with device(tmp_path / "v.sock", lambda connection: connection.sendall(said)), pytest.raises((RuntimeFailed, OSError)):
        vsock.dialed(tmp_path / "v.sock", b"", 0, soon())


def test_silence_has_an_end(tmp_path: Path) -> None:
    def wait(connection: socket.socket) -> None:
        connection.recv(100)

    with device(tmp_path / "v.sock", wait), pytest.raises(TimeoutError):
        vsock.dialed(tmp_path / "v.sock", b"", 0, time.monotonic() + 0.1)


def test_whether_somebody_listens_is_asked_until_it_is_so(tmp_path: Path) -> None:
    """A connection waits while the guest boots, is closed when that takes too long, and then another one is made."""
    booted = threading.Event()

    def accept(connection: socket.socket) -> None:
        assert booted.wait(5)
        connection.sendall(b"OK 1\n")

    looks = vsock.Listens(tmp_path / "v.sock")
    assert not looks.now(), "there is no device yet"
    with device(tmp_path / "v.sock", lambda _: None, accept) as heard:
        ends = soon()
        while len(heard) < 2 and time.monotonic() < ends:
            assert not looks.now()
            time.sleep(0.01)
        assert not looks.now()
        booted.set()
        while not looks.now() and time.monotonic() < ends:
            time.sleep(0.01)
        assert time.monotonic() < ends
        looks.close()
    assert heard == [b"CONNECT 1024\n"] * 2
